//! What the figures are called, and that docs/metrics uses no other names.

use std::collections::BTreeSet;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::json;
use vfio_pm::{Counters, MemberReport, Phase};

use super::*;
use crate::api::http::{Connection, Next};

/// A VM with a sleeping device that has done everything once.
fn scrape() -> Scrape {
    let mut counters = Counters { entries: 3, wakes: 1, ..Counters::default() };
    counters.time_in[Phase::Off as usize] = Duration::from_millis(1500);
    counters.entry_latency.count = 3;
    counters.entry_latency.total_us = 30_000;
    counters.entry_latency.buckets[14] = 3;
    let power = Snapshot::from(MemberReport {
        bdf: "0000:01:00.0".parse().unwrap(),
        devfn: pci::DevFn::new(0, 0).unwrap(),
        resource: None,
        phase: Phase::Off,
        phase_age: Duration::from_millis(1500),
        latched_by: None,
        policy: vfio_pm::PolicyChange::default(),
        last_wake: None,
        counters,
    });
    let host = json!({ "power_state": "D3cold", "runtime_suspended_ms": 1400 });
    let labels = vec![("id", "gpu\"0".to_owned()), ("bdf", power.bdf.clone())];
    Scrape { uptime: 2.5, state: Some(VmState::Running), devices: vec![Device { labels, power, host }] }
}

/// Names of all samples.
fn names(text: &str) -> BTreeSet<&str> {
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    samples.filter_map(|line| line.split(['{', ' ']).next()).collect()
}

fn docs(file: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs").join(file);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Every word in `text` that is the name of a metric of the VMM.
fn used(text: &str) -> BTreeSet<&str> {
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':'));
    words.filter(|word| word.starts_with("dormouse_")).collect()
}

#[test]
fn a_sleeping_device_is_told_with_its_names_and_its_values() {
    let text = scrape().text();
    for line in [
        "dormouse_build_info{version=\"0.1.0\"} 1",
        "dormouse_vm_state{state=\"running\"} 1",
        "dormouse_device_power_state{id=\"gpu\\\"0\",bdf=\"0000:01:00.0\",state=\"off\"} 1",
        "dormouse_device_power_state_time_seconds_total{id=\"gpu\\\"0\",bdf=\"0000:01:00.0\",state=\"off\"} 1.5",
        "dormouse_device_power_low_power_entries_total{id=\"gpu\\\"0\",bdf=\"0000:01:00.0\"} 3",
        "dormouse_device_power_entry_latency_seconds_bucket{le=\"0.016384\",id=\"gpu\\\"0\",bdf=\"0000:01:00.0\"} 3",
        "dormouse_device_power_entry_latency_seconds_bucket{le=\"0.008192\",id=\"gpu\\\"0\",bdf=\"0000:01:00.0\"} 0",
        "dormouse_device_power_entry_latency_seconds_count{id=\"gpu\\\"0\",bdf=\"0000:01:00.0\"} 3",
        "dormouse_device_host_d3cold{id=\"gpu\\\"0\",bdf=\"0000:01:00.0\"} 1",
        "dormouse_device_host_suspended_seconds_total{id=\"gpu\\\"0\",bdf=\"0000:01:00.0\"} 1.4",
        "# EOF",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
    }
}

#[test]
fn both_formats_have_the_same_samples_and_describe_each_family() {
    let text = scrape().text();
    let plain = text::from_open_metrics(&text);
    let samples = |text: &str| -> Vec<String> {
        text.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect()
    };
    assert_eq!(samples(&text), samples(&plain));
    for name in names(&plain) {
        let family =
            ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
        for word in ["HELP", "TYPE"] {
            assert!(plain.contains(&format!("# {word} {family} ")), "{word} of {name} in\n{plain}");
        }
    }
}

#[test]
fn rules_and_dashboard_use_only_what_there_is() {
    let text = scrape().text();
    let there = names(&text);
    for file in
        ["metrics/dormouse.rules.yml", "metrics/dormouse.rules.test.yml", "metrics/dormouse.dashboard.json"]
    {
        let docs = docs(file);
        let used = used(&docs);
        assert!(used.len() > 5, "{file} uses {used:?}");
        let unknown: Vec<_> = used.difference(&there).collect();
        assert!(unknown.is_empty(), "{file}: {unknown:?} are not among {there:?}");
    }
}

#[test]
fn the_list_for_users_has_each_metric_and_no_other() {
    let text = scrape().text();
    let families: BTreeSet<&str> = names(&text)
        .into_iter()
        .filter(|name| !name.ends_with("_sum") && !name.ends_with("_count"))
        .map(|name| name.strip_suffix("_bucket").unwrap_or(name))
        .collect();
    let docs = docs("metrics.md");
    let rows = docs.lines().filter_map(|line| line.strip_prefix("| `"));
    let listed: BTreeSet<&str> =
        rows.filter_map(|row| row.split('`').next()).filter(|name| name.starts_with("dormouse_")).collect();
    assert_eq!(listed, families);
}

#[test]
fn the_dashboard_is_one_that_grafana_takes() {
    let dashboard: Value = serde_json::from_str(&docs("metrics/dormouse.dashboard.json")).unwrap();
    assert!(dashboard["schemaVersion"].as_u64().is_some_and(|version| version >= 39));
    assert!(dashboard["uid"].as_str().is_some_and(|uid| uid.len() <= 40) && dashboard["id"].is_null());
    let variables: BTreeSet<&str> = dashboard["templating"]["list"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|v| v["name"].as_str())
        .collect();
    let (mut ids, mut queries) = (BTreeSet::new(), 0);
    for panel in dashboard["panels"].as_array().unwrap() {
        let title = panel["title"].as_str().unwrap();
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "{title}: two panels have its id");
        let place = |key: &str| panel["gridPos"][key].as_u64().unwrap();
        assert!(place("x") + place("w") <= 24 && place("h") > 0, "{title} is wider than the page");
        for target in panel["targets"].as_array().into_iter().flatten() {
            queries += 1;
            assert_eq!(target["datasource"]["uid"], "${datasource}", "{title}");
            for word in target["expr"].as_str().unwrap().split('$').skip(1) {
                let name: String =
                    word.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect();
                assert!(variables.contains(name.as_str()) || name.starts_with("__"), "{title}: ${name}");
            }
        }
    }
    assert!(queries > 15, "{queries} queries");
}

#[test]
fn the_older_format_is_for_who_asks_for_nothing_newer() {
    for (accept, plain) in [
        ("", false),
        ("Accept: */*\r\n", false),
        ("Accept: text/plain\r\n", true),
        ("accept: text/plain;version=0.0.4, */*;q=0.1\r\n", true),
        ("Accept: application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5\r\n", false),
    ] {
        let (mut client, server) = UnixStream::pair().unwrap();
        client.write_all(format!("GET /metrics HTTP/1.1\r\n{accept}\r\n").as_bytes()).unwrap();
        let Next::Request(request) = Connection::new(server).next() else { panic!("{accept}") };
        assert_eq!(request.wants_plain_text, plain, "{accept}");
    }
}
