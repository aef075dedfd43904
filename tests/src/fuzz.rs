//! `cargo testbed fuzz`: the fuzz targets in `tests/fuzz`, built by cargo-fuzz and run for a bounded time. Each is one test by
//! name.
//!
//! They are built without a sanitizer, since what they exercise is safe code: what they look for is a panic, an overflow, an
//! endless loop and their own assertions. That works with the stable toolchain.

use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use crate::cli::Fuzz;
use crate::command::{capture, output};
use crate::error::{Error, Result, file_error};
use crate::packages;
use crate::paths;
use crate::runner::Tally;

/// The targets: files in `tests/fuzz/fuzz_targets`.
const TARGETS: [&str; 12] = [
    "bar_moves",
    "msix_table",
    "notify_registers",
    "pm_config_shadow",
    "vhost_user",
    "virtio_blk",
    "virtio_console",
    "virtio_mem",
    "virtio_net",
    "virtio_pmem",
    "virtio_small",
    "virtio_vsock",
];
/// What a test's name begins with.
const PREFIX: &str = "fuzz: ";
/// Seconds for each target in `cargo testbed test`.
const IN_TEST: u32 = 7;
/// Targets at a time in `cargo testbed fuzz`.
const JOBS: usize = 2;
const CARGO_FUZZ: &str = "0.13.2";
const TRIPLE: &str = "x86_64-unknown-linux-gnu";
/// Seconds that one input may take.
const SLOWEST_INPUT: u32 = 10;
/// Bytes of an input, at most.
const LONGEST_INPUT: usize = 1024;
/// How many inputs of noise a search begins with.
const STARTS: usize = 32;
/// How often an input is run again: one that races with a power domain's thread does not fail each time.
const REPEATS: u32 = 20;
/// Lines of a panic that are shown: where, and the two sides of an assertion.
const SHOWN: usize = 4;

/// Names of the tests.
pub fn names() -> impl Iterator<Item = String> {
    TARGETS.iter().map(|target| format!("{PREFIX}{target}"))
}

/// `cargo testbed fuzz`.
pub fn command(options: &Fuzz) -> Result<bool> {
    let wanted = options.target.as_deref();
    let chosen: Vec<&str> =
        TARGETS.into_iter().filter(|target| wanted.is_none_or(|wanted| wanted == *target)).collect();
    if chosen.is_empty() {
        let known = TARGETS.join(", ");
        return Err(Error::Check(format!(
            "no fuzz target is called {:?}; there are {known}",
            wanted.unwrap_or_default()
        )));
    }
    build()?;
    let runs = chosen.iter().map(|target| match &options.input {
        Some(input) => Run { target, task: Task::Once(input.clone()) },
        None => Run { target, task: Task::Search { seconds: options.seconds, keep: true } },
    });
    let tally = run_all(runs.collect(), JOBS);
    println!("{tally}");
    Ok(tally.failed == 0)
}

/// Runs the tests of these names for a short time each, from fixed inputs alone: what earlier runs have collected would use up
/// that time.
pub fn test(names: &[String], jobs: usize) -> Tally {
    if let Err(error) = build() {
        names.iter().for_each(|name| println!("FAIL {name}: the fuzz targets cannot be built: {error}"));
        return Tally { failed: names.len(), ..Tally::default() };
    }
    let targets = TARGETS.into_iter().filter(|target| names.contains(&format!("{PREFIX}{target}")));
    let search = Task::Search { seconds: IN_TEST, keep: false };
    run_all(targets.map(|target| Run { target, task: search.clone() }).collect(), jobs)
}

/// Makes sure that compiler and cargo-fuzz are there; the path of the latter. It goes into the cache, not among the user's own
/// programs, one directory for each version.
pub fn tools() -> Result<PathBuf> {
    packages::ensure_compiler()?;
    let root = paths::cache()?.join(format!("cargo-fuzz-{CARGO_FUZZ}"));
    let program = root.join("bin/cargo-fuzz");
    let path = paths::cache()?.join("lock");
    let lock = fs::File::create(&path).map_err(file_error("create", &path))?;
    lock.lock().map_err(file_error("lock", &path))?;
    if !program.is_file() {
        eprintln!("testbed: installing cargo-fuzz {CARGO_FUZZ} in {}", root.display());
        let words = ["install", "cargo-fuzz", "--quiet", "--locked", "--version", CARGO_FUZZ, "--root"];
        capture(cargo().args(words).arg(&root).arg("--target-dir").arg(root.join("build")))?;
        // The program is all that is needed of it.
        let _ = fs::remove_dir_all(root.join("build"));
    }
    Ok(program)
}

/// Builds all targets.
fn build() -> Result<()> {
    let program = tools()?;
    let words = ["build", "--sanitizer", "none", "--target", TRIPLE, "--fuzz-dir", "tests/fuzz"];
    let mut command = Command::new(program);
    command.current_dir(paths::workspace()).args(words).arg("--target-dir").arg(target_dir());
    capture(&mut command).map(drop)
}

/// Where cargo builds the targets: not among the workspace's own artifacts, whose flags differ.
pub fn target_dir() -> PathBuf {
    paths::target().join("testbed-cache/fuzz/target")
}

fn cargo() -> Command {
    Command::new(std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned()))
}

/// One target's run.
#[derive(Debug, Clone)]
struct Run {
    target: &'static str,
    task: Task,
}

#[derive(Debug, Clone)]
enum Task {
    /// Look for failures. `keep`: begin with what earlier runs have collected, and add to it.
    Search { seconds: u32, keep: bool },
    /// Run one input.
    Once(PathBuf),
}

/// What came of a run that held.
#[derive(Debug, PartialEq, Eq)]
struct Held {
    inputs: u64,
}

fn run_all(runs: VecDeque<Run>, jobs: usize) -> Tally {
    let left = Mutex::new(runs);
    let tally = Mutex::new(Tally::default());
    thread::scope(|scope| {
        for _ in 0..jobs.max(1) {
            scope.spawn(|| {
                loop {
                    let next = left.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                    let Some(run) = next else { return };
                    let begin = Instant::now();
                    let result = run.start();
                    let (took, target) = (begin.elapsed().as_secs_f64(), run.target);
                    match &result {
                        Ok(held) => println!("PASS {PREFIX}{target} ({took:.1} s, {} inputs)", held.inputs),
                        Err(error) => println!("FAIL {PREFIX}{target} ({took:.1} s): {error}"),
                    }
                    tally.lock().unwrap_or_else(PoisonError::into_inner).count(result.is_ok());
                }
            });
        }
    });
    tally.into_inner().unwrap_or_else(PoisonError::into_inner)
}

impl Run {
    fn start(&self) -> Result<Held> {
        let own = |what: &str| Ok(paths::cache()?.join("fuzz").join(what).join(self.target));
        let mut command = Command::new(target_dir().join(TRIPLE).join("release").join(self.target));
        let found: PathBuf = own("found")?;
        fs::create_dir_all(&found).map_err(file_error("create", &found))?;
        command.env("RUST_BACKTRACE", "0").current_dir(paths::workspace());
        command.arg(format!("-timeout={SLOWEST_INPUT}")).arg("-print_final_stats=1");
        match &self.task {
            Task::Once(input) => {
                let input = std::path::absolute(input).map_err(file_error("find", input))?;
                if !input.is_file() {
                    return Err(Error::Check(format!("there is no file {}", input.display())));
                }
                // Otherwise it would be saved a second time.
                command.arg("-exact_artifact_path=/dev/null").arg(format!("-runs={REPEATS}")).arg(input);
            }
            Task::Search { seconds, keep } => {
                // Inputs are sequences of steps: short ones find little, so length is not to grow slowly.
                command.arg("-len_control=0").arg(format!("-max_len={LONGEST_INPUT}"));
                command.arg(format!("-max_total_time={seconds}"));
                command.arg(format!("-artifact_prefix={}/", found.display()));
                if *keep {
                    let corpus: PathBuf = own("corpus")?;
                    fs::create_dir_all(&corpus).map_err(file_error("create", &corpus))?;
                    command.arg(corpus);
                }
                let start: PathBuf = own("start")?;
                begin(&start)?;
                let mut seeds = files(&start)?;
                let kept = paths::workspace().join("tests/fuzz/seeds").join(self.target);
                if kept.is_dir() {
                    seeds.extend(files(&kept)?);
                }
                // Not as a directory: new inputs would go there.
                command.arg(format!("-seed_inputs={}", seeds.join(",")));
            }
        }
        let output = output(&mut command)?;
        let text = String::from_utf8_lossy(&output.stderr);
        if output.status.success() {
            return held(&text);
        }
        Err(Error::Check(self.explain(&text, &output.status.to_string())))
    }

    /// What a failed run has found, and how to see it again.
    fn explain(&self, text: &str, status: &str) -> String {
        let mut message = reason(text).unwrap_or_else(|| format!("{status}: {}", last_lines(text)));
        let saved = text.split("Test unit written to ").nth(1).and_then(|rest| rest.lines().next());
        if let (Some(path), Task::Search { .. }) = (saved, &self.task) {
            message.push_str(&format!(
                "\n  input: {path}\n  again: cargo testbed fuzz {} --input {path}",
                self.target
            ));
        }
        message
    }
}

/// A run without a failure must have tried something.
fn held(text: &str) -> Result<Held> {
    let once = text.matches("Running: ").count();
    let inputs = text
        .split("stat::number_of_executed_units:")
        .nth(1)
        .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())
        .unwrap_or_else(|| u64::try_from(once).unwrap_or_default());
    if inputs == 0 {
        return Err(Error::Check(format!("it ran no input at all: {}", last_lines(text))));
    }
    Ok(Held { inputs })
}

/// The panic, or what libFuzzer has to say.
fn reason(text: &str) -> Option<String> {
    let lines: Vec<&str> = text.lines().collect();
    if let Some(at) = lines.iter().position(|line| line.contains(" panicked at ")) {
        let end = lines.iter().skip(at).position(|line| line.starts_with("note: ") || line.starts_with("=="));
        let shown = end.unwrap_or(SHOWN).min(SHOWN);
        return Some(
            lines.iter().skip(at).take(shown).map(|line| line.trim()).collect::<Vec<_>>().join("\n    "),
        );
    }
    let error = lines.iter().find(|line| line.contains("ERROR: libFuzzer: "))?;
    error.split("ERROR: ").nth(1).map(str::to_owned)
}

fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.trim_end().lines().collect();
    lines[lines.len().saturating_sub(SHOWN)..].join("\n    ")
}

/// Writes the inputs that every search begins with: noise, the same each time, long enough for many steps. Left to itself
/// libFuzzer begins with an empty input and needs minutes to get from there to a sequence in which anything can go wrong.
fn begin(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).map_err(file_error("create", dir))?;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for number in 0..STARTS {
        let mut bytes = Vec::with_capacity(LONGEST_INPUT);
        while bytes.len() < LONGEST_INPUT {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.extend(state.to_le_bytes());
        }
        let path = dir.join(number.to_string());
        fs::write(&path, bytes).map_err(file_error("write", &path))?;
    }
    Ok(())
}

/// The files of a directory.
fn files(dir: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(dir).map_err(file_error("read", dir))?;
    let mut paths: Vec<String> = entries.flatten().map(|entry| entry.path().display().to_string()).collect();
    paths.sort();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PANIC: &str = "INFO: Seed: 1\n\nthread '<unnamed>' (7) panicked at fuzz_targets/msix_table.rs:113:13:\n\
        assertion `left == right` failed: vector 0\n  left: None\n right: Some(1)\nnote: run with `RUST_BACKTRACE=1`\n\
        ==9== ERROR: libFuzzer: deadly signal\nartifact_prefix='/c/'; Test unit written to /c/crash-12\nBase64: AA==\n";

    fn search() -> Run {
        Run { target: "msix_table", task: Task::Search { seconds: 1, keep: false } }
    }

    #[test]
    fn every_search_begins_with_the_same_long_inputs_which_differ() {
        let dir = std::env::temp_dir().join(format!("dormouse-fuzz-start-{}", std::process::id()));
        begin(&dir).unwrap();
        let read = || files(&dir).unwrap().iter().map(|path| fs::read(path).unwrap()).collect::<Vec<_>>();
        let first = read();
        begin(&dir).unwrap();
        assert_eq!(first, read());
        fs::remove_dir_all(&dir).unwrap();
        assert!(first.iter().all(|bytes| bytes.len() == LONGEST_INPUT));
        let different: std::collections::BTreeSet<_> = first.iter().collect();
        assert_eq!(different.len(), STARTS);
    }

    #[test]
    fn every_fuzz_target_is_run() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/fuzz_targets");
        let mut targets: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
        targets.sort();
        let names: Vec<_> = targets.iter().map(|path| path.file_stem().unwrap().to_str().unwrap()).collect();
        assert_eq!(names, TARGETS);
    }

    #[test]
    fn a_finding_is_told_with_its_input_and_the_command_that_shows_it_again() {
        assert_eq!(
            search().explain(PANIC, "exit status: 77"),
            "thread '<unnamed>' (7) panicked at fuzz_targets/msix_table.rs:113:13:\n    \
             assertion `left == right` failed: vector 0\n    left: None\n    right: Some(1)\n  \
             input: /c/crash-12\n  again: cargo testbed fuzz msix_table --input /c/crash-12"
        );
    }

    #[test]
    fn an_input_without_an_end_is_told_as_such() {
        let text = "==9== ERROR: libFuzzer: timeout after 11 seconds\nTest unit written to /c/timeout-1\n";
        assert!(
            search()
                .explain(text, "")
                .starts_with("libFuzzer: timeout after 11 seconds\n  input: /c/timeout-1")
        );
    }

    #[test]
    fn a_run_that_tried_nothing_has_not_passed() {
        assert_eq!(held("stat::number_of_executed_units: 517\n").unwrap(), Held { inputs: 517 });
        assert_eq!(held("Running: /c/crash-12\nExecuted /c/crash-12 in 3 ms\n").unwrap(), Held { inputs: 1 });
        assert!(held("stat::number_of_executed_units: 0\n").is_err());
        assert!(held("").is_err());
    }

    #[test]
    fn a_failure_without_a_panic_shows_the_end_of_what_was_said() {
        assert_eq!(
            search().explain("a\nno such file\n", "exit status: 1"),
            "exit status: 1: a\n    no such file"
        );
    }
}
