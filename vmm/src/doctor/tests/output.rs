//! What is printed: the samples of docs/doctor.md, JSON, and the exit status.

use super::super::finding::{Check, Severity};
use super::super::fixture::{NIC, PORT, SIBLING, Tree};
use super::super::{DoctorOptions, consult, render};

const MANUAL: &str = include_str!("../../../../docs/doctor.md");

/// What is printed for `options`, without colour.
fn printed(tree: &Tree, options: DoctorOptions) -> (String, Severity) {
    let (text, severity) = consult(&tree.host, options).unwrap();
    (anstream::adapter::strip_str(&text).to_string(), severity)
}

fn of(bdf: Option<&str>, json: bool) -> DoctorOptions {
    DoctorOptions { bdf: bdf.map(|bdf| bdf.parse().unwrap()), json, verify: false }
}

/// The host of the manual: the sibling stays with the host, and somebody has set the card to `on`.
fn ill() -> Tree {
    let tree = Tree::new();
    tree.bind(SIBLING, "igb");
    tree.wake(SIBLING);
    tree.wake(NIC);
    tree.set(NIC, "power/control", "on");
    tree
}

/// Whether the manual has these lines as a block of its own.
fn is_in_the_manual(text: &str) {
    let block: String = text
        .lines()
        .map(|line| if line.is_empty() { "\n".to_owned() } else { format!("    {line}\n") })
        .collect();
    assert!(MANUAL.contains(&block), "docs/doctor.md does not have this sample:\n{block}");
}

#[test]
fn the_manuals_sample_of_one_device_is_what_is_printed() {
    let tree = ill();
    let mut report = tree.examine();
    assert_eq!(report.severity.exit_status(), 3);
    // As if the host were this one; before lines are broken, whose length the directory's name would change.
    let local = |text: &str| text.replace(tree.root().to_str().unwrap(), "");
    for finding in &mut report.findings {
        finding.remedy = finding.remedy.as_deref().map(local);
        finding
            .read
            .iter_mut()
            .for_each(|reading| reading.path = local(reading.path.to_str().unwrap()).into());
    }
    is_in_the_manual(&anstream::adapter::strip_str(&render::report(&report)).to_string());
}

#[test]
fn the_manuals_sample_of_the_table_is_what_is_printed() {
    let tree = ill();
    tree.add("devices/pci0000:00/0000:00:02.0", 0x06_04_00, Some("pcieport"), Some(2));
    tree.own_pr3("0000:00:02.0", "LNXPOWER:02");
    tree.set("0000:00:02.0", "secondary_bus_number", "2");
    tree.add("devices/pci0000:00/0000:00:02.0/0000:02:00.0", 0x01_08_02, Some("vfio-pci"), Some(10));
    tree.write("dev/vfio/10", "");
    let (text, severity) = printed(&tree, of(None, false));
    assert!(!text.contains(PORT), "{text}");
    // The drive is well, and the status is that of the best.
    assert_eq!(severity.exit_status(), 0);
    is_in_the_manual(&text);
}

#[test]
fn every_check_is_in_the_manual() {
    for check in Check::ALL {
        assert!(MANUAL.contains(&format!("| `{}` |", check.name())), "{}", check.name());
    }
}

#[test]
fn json_has_the_same_findings() {
    let tree = ill();
    let (text, severity) = printed(&tree, of(Some(NIC), true));
    let value: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!((value["version"].as_u64(), value["severity"].as_str()), (Some(1), Some("blocker")));
    assert_eq!((severity, value["device"]["address"].as_str()), (Severity::Blocker, Some(NIC)));
    let findings = value["findings"].as_array().unwrap();
    assert_eq!(findings.len(), tree.examine().findings.len());
    let control = findings.iter().find(|finding| finding["check"] == "power-control").unwrap();
    assert_eq!(control["read"][0]["value"], "on");
    assert!(control["read"][0]["path"].as_str().unwrap().ends_with("0000:01:00.0/power/control"));
    assert!(control["remedy"].as_str().unwrap().contains("echo auto"));
    let (text, _) = printed(&tree, of(None, true));
    let value: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(value["devices"].as_array().unwrap().len(), 2);
}

#[test]
fn a_device_that_is_not_there_is_an_error_by_name() {
    let tree = Tree::new();
    let error = consult(&tree.host, of(Some("0000:7f:00.0"), false)).unwrap_err().to_string();
    assert!(error.contains("0000:7f:00.0"), "{error}");
}

#[test]
fn the_text_is_coloured_by_severity() {
    let tree = Tree::new();
    let (text, _) = consult(&tree.host, of(Some(NIC), false)).unwrap();
    assert!(text.contains("\u{1b}[32mok"), "{text}");
}
