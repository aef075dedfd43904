//! Prometheus's own tool, `promtool`, as the judge of the metrics, the rules and the dashboard.
//!
//! It is in Debian's package `prometheus`, which would start a server when installed. So it is downloaded and unpacked, as the kernels are.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use crate::command::{capture, capture_text, exists};
use crate::error::{Error, Result, ensure, file_error};
use crate::paths;
use crate::runner::Tally;

/// A check: its name, and what it does with the tool.
type Check = (&'static str, fn(&Path) -> Result<()>);

const CHECKS: [Check; 3] = [
    ("prometheus_rules_and_configuration_are_valid", rules_are_valid),
    ("each_prometheus_alert_fires_and_a_sound_device_fires_none", alerts_fire),
    ("dashboard_asks_valid_queries", queries_are_valid),
];

/// Names of all checks.
pub fn names() -> impl Iterator<Item = &'static str> {
    CHECKS.iter().map(|(name, _)| *name)
}

/// Runs the checks that `wanted` accepts; they are skipped where the tool cannot be had.
pub fn run(wanted: impl Fn(&str) -> bool) -> Tally {
    let mut tally = Tally::default();
    let chosen: Vec<&Check> = CHECKS.iter().filter(|(name, _)| wanted(name)).collect();
    if chosen.is_empty() {
        return tally;
    }
    let tool = obtain();
    for (name, check) in chosen {
        let begin = Instant::now();
        match tool.as_ref().map(|tool| check(tool)) {
            Err(missing) => {
                println!("SKIP {name}: {missing}");
                tally.skipped += 1;
                continue;
            }
            Ok(Ok(())) => println!("PASS {name} ({:.1} s)", begin.elapsed().as_secs_f64()),
            Ok(Err(error)) => {
                println!("FAIL {name} ({:.1} s)\n{error}", begin.elapsed().as_secs_f64());
                tally.failed += 1;
                continue;
            }
        }
        tally.passed += 1;
    }
    tally
}

/// Has `promtool` look at metrics in the text format; it must not have anything to say.
pub fn check_metrics(text: &str) -> Result<()> {
    let mut command = Command::new(obtain()?);
    command.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let failed = |source: std::io::Error| Error::Command {
        command: "promtool check metrics".to_owned(),
        status: "not run".to_owned(),
        output: source.to_string(),
    };
    let mut child = command.spawn().map_err(failed)?;
    if let Some(mut input) = child.stdin.take() {
        input.write_all(text.as_bytes()).map_err(failed)?;
    }
    let output = child.wait_with_output().map_err(failed)?;
    let said = [output.stdout, output.stderr].concat();
    ensure(output.status.success() && said.is_empty(), || {
        format!("promtool complains of the metrics: {}", String::from_utf8_lossy(&said).trim())
    })
}

/// The tool: that of the system, or one from the cache, or a fresh one from Debian.
fn obtain() -> Result<PathBuf> {
    if exists("promtool") {
        return Ok("promtool".into());
    }
    let root = paths::cache()?.join("prometheus");
    let tool = root.join("usr/bin/promtool");
    if !tool.is_file() {
        let missing = |why: &dyn std::fmt::Display| Error::Missing {
            what: format!("promtool ({why})"),
            how: "apt-get update, then run this again; or apt-get install prometheus".to_owned(),
        };
        fs::create_dir_all(&root).map_err(file_error("create", &root))?;
        capture(Command::new("apt-get").current_dir(&root).args(["download", "-q", "prometheus"]))
            .map_err(|e| missing(&e))?;
        let entries = fs::read_dir(&root).map_err(file_error("read", &root))?;
        let archive = entries
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.extension().is_some_and(|end| end == "deb"))
            .ok_or_else(|| missing(&"apt-get left no package"))?;
        capture(Command::new("dpkg").arg("-x").arg(&archive).arg(&root))?;
        let _ = fs::remove_file(&archive);
    }
    // One of another release of Debian may not start here.
    capture_text(Command::new(&tool).arg("--version"))?;
    Ok(tool)
}

fn docs(file: &str) -> PathBuf {
    paths::workspace().join("docs").join(file)
}

fn rules_are_valid(tool: &Path) -> Result<()> {
    let rules = docs("metrics/dormouse.rules.yml");
    capture(Command::new(tool).args(["check", "rules"]).arg(&rules))?;
    // The configuration names the rules by a path beside it.
    let dir = paths::run_dir()?;
    let copy = |from: PathBuf, name: &str| {
        fs::copy(&from, dir.join(name)).map_err(file_error("copy", from)).map(drop)
    };
    copy(rules, "dormouse.rules.yml")?;
    copy(docs("examples/prometheus.yml"), "prometheus.yml")?;
    let checked = capture(Command::new(tool).args(["check", "config"]).arg(dir.join("prometheus.yml")));
    let _ = fs::remove_dir_all(&dir);
    checked.map(drop)
}

fn alerts_fire(tool: &Path) -> Result<()> {
    let file = docs("metrics/dormouse.rules.test.yml");
    capture(Command::new(tool).args(["test", "rules"]).arg(file)).map(drop)
}

/// The queries as recording rules, for `promtool` of Debian 12 parses no single query. Grafana's variables become what they stand for.
fn queries_are_valid(tool: &Path) -> Result<()> {
    let path = docs("metrics/dormouse.dashboard.json");
    let text = fs::read_to_string(&path).map_err(file_error("read", &path))?;
    let dashboard: serde_json::Value =
        serde_json::from_str(&text).map_err(|e| Error::Check(format!("{}: {e}", path.display())))?;
    let panels = dashboard["panels"].as_array().into_iter().flatten();
    let queries = panels.flat_map(|panel| panel["targets"].as_array().into_iter().flatten());
    let rules: Vec<serde_json::Value> = queries
        .filter_map(|target| target["expr"].as_str())
        .enumerate()
        .map(|(number, expr)| {
            let expr = expr
                .replace("$__range_s", "3600")
                .replace("$__range", "1h")
                .replace("$__rate_interval", "1m");
            serde_json::json!({ "record": format!("query{number}"), "expr": expr })
        })
        .collect();
    ensure(rules.len() > 15, || format!("only {} queries in {}", rules.len(), path.display()))?;
    let dir = paths::run_dir()?;
    let file = dir.join("queries.yml");
    // JSON is YAML.
    let group = serde_json::json!({ "groups": [{ "name": "dashboard", "rules": rules }] });
    fs::write(&file, group.to_string()).map_err(file_error("write", &file))?;
    let checked = capture(Command::new(tool).args(["check", "rules"]).arg(&file));
    let _ = fs::remove_dir_all(&dir);
    checked.map(drop)
}
