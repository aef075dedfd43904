//! The table of failure modes in docs/power.md: thirty rows, and every test that it names exists.

use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate is in the workspace").to_owned()
}

/// All Rust sources below `directory`, one after the other.
fn sources(directory: &Path, text: &mut String) {
    for entry in fs::read_dir(directory).expect("the sources are there") {
        let path = entry.expect("the sources can be listed").path();
        if path.is_dir() {
            sources(&path, text);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            text.push_str(&fs::read_to_string(path).expect("the sources can be read"));
        }
    }
}

#[test]
fn the_table_has_thirty_rows_and_names_only_tests_that_there_are() {
    let page = fs::read_to_string(root().join("docs/power.md")).unwrap();
    let table = page.split("\n## Failure modes\n").nth(1).expect("docs/power.md has the table");
    let mut text = String::new();
    for crate_name in ["acpi", "pci", "vfio_pm", "tests"] {
        sources(&root().join(crate_name), &mut text);
    }
    let mut numbers = Vec::new();
    for row in table.lines().filter(|line| line.starts_with("| ")) {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let Ok(number) = cells[0].parse::<u32>() else { continue };
        numbers.push(number);
        assert_eq!(cells.len(), 4, "{row}");
        for name in cells[3].split('`').skip(1).step_by(2).filter(|name| name.matches('_').count() > 2) {
            let there = text.contains(&format!("fn {name}()")) || text.contains(&format!("\"{name}\""));
            assert!(there, "row {number} names {name}, which there is not");
        }
    }
    assert_eq!(numbers, (1..=30).collect::<Vec<u32>>());
}
