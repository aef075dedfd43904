//! Reports as text for people. Colour is left to the stream, which knows whether it is a terminal and whether `NO_COLOR` is set.

use std::fmt::Write as _;

use anstyle::{AnsiColor, Style};

use super::finding::{Finding, Identity, Report, Severity};
use super::verify::Measurement;

/// Columns of a line.
const WIDTH: usize = 110;
/// Where the text of a finding begins.
const INDENT: usize = 9;

/// One device in full.
pub fn report(report: &Report) -> String {
    let mut text = String::new();
    let bold = Style::new().bold();
    let device = &report.device;
    let _ = writeln!(text, "{bold}{}{bold:#}  {} [{}]", device.address, device.class, device.id);
    let group = device.group.map_or("no IOMMU group".to_owned(), |group| format!("group {group}"));
    let driver = device.driver.as_deref().unwrap_or("no driver");
    let place = if device.ports.is_empty() {
        "on the root bus".to_owned()
    } else {
        format!("below {}", device.ports.join(", "))
    };
    let status = device.runtime_status.as_deref().unwrap_or("unknown");
    let _ = writeln!(text, "driver {driver}, {group}, {place}, {} ({status})\n", power_state(device));
    for finding in &report.findings {
        one(&mut text, finding);
    }
    if let Some(measured) = &report.verification {
        measurement(&mut text, measured);
    }
    let style = style(report.severity);
    let _ = writeln!(text, "\n{bold}Verdict:{bold:#} {style}{}{style:#}", report.verdict);
    text
}

/// All devices, one line each.
pub fn table(reports: &[Report]) -> String {
    let head = ["DEVICE", "CLASS", "DRIVER", "GROUP", "POWER", "VERDICT"].map(str::to_owned);
    let rows: Vec<[String; 6]> = reports
        .iter()
        .map(|report| {
            let device = &report.device;
            [
                device.address.clone(),
                device.class.clone(),
                device.driver.clone().unwrap_or_else(|| "-".to_owned()),
                device.group.map_or("-".to_owned(), |group| group.to_string()),
                power_state(device).to_owned(),
                report.verdict.clone(),
            ]
        })
        .collect();
    let width = |column: usize| {
        std::iter::once(&head).chain(&rows).map(|row| row[column].chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len() - 1).map(width).collect();
    let mut text = String::new();
    let mut line = |row: &[String; 6], cells: Style, verdict: Style| {
        let _ = write!(text, "{cells}");
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(text, "{cell:width$}  ");
        }
        let _ = writeln!(text, "{cells:#}{verdict}{}{verdict:#}", row[head.len() - 1]);
    };
    line(&head, Style::new().bold(), Style::new().bold());
    for (row, report) in rows.iter().zip(reports) {
        line(row, Style::new(), style(report.severity));
    }
    if reports.is_empty() {
        text.push_str("There is no PCI device on this host that could be assigned.\n");
    }
    text
}

fn power_state(device: &Identity) -> &str {
    device.power_state.as_deref().unwrap_or("unknown")
}

/// A finding: what it means; and unless all is well, what was read and what to do.
fn one(text: &mut String, finding: &Finding) {
    let style = style(finding.severity);
    let word = finding.severity.word();
    let meaning = format!("{}: {}", finding.check.name(), finding.meaning);
    let _ = write!(text, "{style}{word:INDENT$}{style:#}");
    paragraph(text, &meaning, "");
    if finding.severity == Severity::Ok {
        return;
    }
    for reading in &finding.read {
        let value = match reading.value.as_deref() {
            None => "absent, or not readable",
            Some("") => "empty",
            Some(value) => value,
        };
        let line = format!("{}: {}", reading.path.display(), value.lines().next().unwrap_or_default());
        let _ = writeln!(text, "{:INDENT$}read {line}", "");
    }
    if let Some(remedy) = &finding.remedy {
        let _ = write!(text, "{:INDENT$}", "");
        paragraph(text, remedy, "do   ");
    }
}

/// Words broken into lines, the first of which has been begun with the indent.
fn paragraph(text: &mut String, words: &str, mark: &str) {
    let mut column = INDENT + mark.len();
    text.push_str(mark);
    for (number, word) in words.split_whitespace().enumerate() {
        let length = word.chars().count();
        if number > 0 && column + 1 + length > WIDTH {
            let indent = INDENT + mark.len();
            let _ = write!(text, "\n{:indent$}", "");
            column = indent;
        } else if number > 0 {
            text.push(' ');
            column += 1;
        }
        text.push_str(word);
        column += length;
    }
    text.push('\n');
}

fn measurement(text: &mut String, measured: &Measurement) {
    let bold = Style::new().bold();
    let _ = writeln!(text, "\n{bold}Attempt{bold:#}");
    if measured.bound_for_this {
        text.push_str("  bound to vfio-pci for the attempt, and given back\n");
    }
    let _ = writeln!(text, "  low power allowed in {:.1} ms", measured.entry_ms);
    for step in &measured.steps {
        let _ = writeln!(text, "  {:>8.1} ms  {} ({})", step.after_ms, step.power_state, step.runtime_status);
    }
    if let Some(woken) = measured.woken_after_ms {
        let _ = writeln!(text, "  {woken:>8.1} ms  woken by the host or by itself");
    }
    let answers = if measured.answers { "answers" } else { "does not answer" };
    let _ = writeln!(text, "  back in {:.1} ms, {answers}", measured.exit_ms);
}

fn style(severity: Severity) -> Style {
    let colour = match severity {
        Severity::Ok => AnsiColor::Green,
        Severity::Info => AnsiColor::Cyan,
        Severity::Warning => AnsiColor::Yellow,
        Severity::Blocker => AnsiColor::Red,
    };
    let style = Style::new().fg_color(Some(colour.into()));
    if severity == Severity::Blocker { style.bold() } else { style }
}
