//! The figures in Prometheus's text format 0.0.4, for what does not read OpenMetrics: node_exporter's directory of text files, `promtool check
//! metrics`. It is the OpenMetrics text with other words in its comments: a counter's family is called as its samples are, an info
//! is a gauge, and there are no units and no end (OpenMetrics 1.0, section "Text Format").

/// OpenMetrics text in the older form.
pub fn from_open_metrics(text: &str) -> String {
    let mut to = String::with_capacity(text.len());
    let mut help: Option<(&str, &str)> = None;
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            // It is written with the type, on which the name depends.
            help = rest.split_once(' ');
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' '))
        {
            let (suffix, kind) = match kind {
                "counter" => ("_total", "counter"),
                "info" => ("_info", "gauge"),
                "unknown" => ("", "untyped"),
                kind => ("", kind),
            };
            if let Some((_, help)) = help.take().filter(|(family, _)| *family == name) {
                to.push_str(&format!("# HELP {name}{suffix} {help}\n"));
            }
            to.push_str(&format!("# TYPE {name}{suffix} {kind}\n"));
        } else if !line.starts_with('#') {
            to.push_str(line);
            to.push('\n');
        }
    }
    to
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_are_called_as_their_samples_are() {
        let text = "# HELP a_seconds Time.\n# TYPE a_seconds counter\n# UNIT a_seconds seconds\na_seconds_total{x=\"# TYPE\"} 1.5\n\
            # HELP b The VMM.\n# TYPE b info\nb_info{v=\"1\"} 1\n# HELP c Now.\n# TYPE c gauge\nc 0\n\
            # TYPE d histogram\nd_bucket{le=\"+Inf\"} 0\nd_sum 0.0\nd_count 0\n# EOF\n";
        assert_eq!(
            from_open_metrics(text),
            "# HELP a_seconds_total Time.\n# TYPE a_seconds_total counter\na_seconds_total{x=\"# TYPE\"} 1.5\n\
             # HELP b_info The VMM.\n# TYPE b_info gauge\nb_info{v=\"1\"} 1\n# HELP c Now.\n# TYPE c gauge\nc 0\n\
             # TYPE d histogram\nd_bucket{le=\"+Inf\"} 0\nd_sum 0.0\nd_count 0\n"
        );
    }
}
