//! The workspace's own tests: format, lints, documentation, unit tests. Each is one test by name, unit tests count
//! one by one.

use std::process::Command;
use std::time::Instant;

use crate::command::output;
use crate::fuzz;
use crate::paths;
use crate::runner::Tally;

/// A check: its name, what cargo is told, and how documentation is to be built.
struct Check {
    name: &'static str,
    words: &'static [&'static str],
}

/// The fuzz targets' manifest.
const FUZZ: &str = "tests/fuzz/Cargo.toml";

const CHECKS: [Check; 6] = [
    Check { name: "workspace_is_formatted", words: &["fmt", "--all", "--check"] },
    Check {
        name: "workspace_has_no_lints",
        words: &["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"],
    },
    Check { name: "workspace_documentation_builds", words: &["doc", "--quiet", "--workspace", "--no-deps"] },
    // A workspace of their own, which the two above do not see.
    Check { name: "fuzz_targets_are_formatted", words: &["fmt", "--manifest-path", FUZZ, "--check"] },
    Check {
        name: "fuzz_targets_have_no_lints",
        words: &["clippy", "--quiet", "--locked", "--manifest-path", FUZZ, "--", "-D", "warnings"],
    },
    Check { name: "workspace_unit_tests", words: &["test", "--workspace", "--no-fail-fast"] },
];

/// Names of all checks.
pub fn names() -> impl Iterator<Item = &'static str> {
    CHECKS.iter().map(|check| check.name)
}

/// Runs the checks that `wanted` accepts.
pub fn run(wanted: impl Fn(&str) -> bool) -> Tally {
    let mut tally = Tally::default();
    for check in CHECKS.iter().filter(|check| wanted(check.name)) {
        let begin = Instant::now();
        let mut command = Command::new(std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned()));
        command.current_dir(paths::workspace()).args(check.words).env("RUSTDOCFLAGS", "-D warnings");
        if check.words.contains(&FUZZ) {
            command.env("CARGO_TARGET_DIR", fuzz::target_dir());
        }
        let (held, text) = match output(&mut command) {
            Ok(output) => {
                let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
                text.push_str(&String::from_utf8_lossy(&output.stderr));
                (output.status.success(), text)
            }
            Err(error) => (false, error.to_string()),
        };
        let counts = count_unit_tests(&text);
        let took = begin.elapsed().as_secs_f64();
        if held {
            println!("PASS {} ({took:.1} s)", check.name);
        } else {
            println!("FAIL {} ({took:.1} s)\n{}", check.name, text.trim_end());
        }
        if counts == Tally::default() || (!held && counts.failed == 0) {
            tally.count(held);
        }
        tally.add(counts);
    }
    tally
}

/// Adds up the `test result:` lines of the test harness.
fn count_unit_tests(text: &str) -> Tally {
    let mut tally = Tally::default();
    for line in text.lines().filter_map(|line| line.strip_prefix("test result: ")) {
        let number = |word: &str| {
            let before = line.split(word).next().unwrap_or_default();
            before.split([' ', '.', ';']).rfind(|part| !part.is_empty())?.parse::<usize>().ok()
        };
        tally.passed += number(" passed").unwrap_or_default();
        tally.failed += number(" failed").unwrap_or_default();
        tally.skipped += number(" ignored").unwrap_or_default();
    }
    tally
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_results_of_all_crates_are_added_up() {
        let text = "running 3 tests\ntest result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out\n\
            test result: FAILED. 10 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.1s\n";
        assert_eq!(count_unit_tests(text), Tally { passed: 13, failed: 2, skipped: 1 });
    }

    #[test]
    fn text_without_results_counts_nothing() {
        assert_eq!(count_unit_tests("error[E0308]: mismatched types"), Tally::default());
    }
}
