//! What is no proper use of the API: each request must be refused with a reason, change nothing and cost no memory.

use std::time::{Duration, Instant};

use crate::Outcome;
use crate::wire::Connection;

/// Requests in a row, between two looks at the memory.
const ROW: usize = 10_000;
/// Clients that stop in the middle; one place of ten is left for the one that does not.
const SLOW: usize = 9;
/// The longest that one waits because of them.
const PING: Duration = Duration::from_secs(1);
/// KiB that may be more resident after than before.
const GROWTH: u64 = 1024;

/// Name and body of what must be refused, whatever the state.
const WRONG: &[(&str, &str)] = &[
    ("vm.create", ""),
    ("vm.create", "{"),
    ("vm.create", "[1]"),
    ("vm.create", r#"{"cpus":{"boot_vcpus":"many","max_vcpus":1}}"#),
    ("vm.create", r#"{"memory":{"size":-1}}"#),
    ("vm.create", "{}"),
    ("vm.boot", "{}"),
    ("vm.boot", ""),
    ("vm.resume", ""),
    ("vm.resize", r#"{"desired_vcpus":300}"#),
    ("vm.resize", r#"{"desired_ram":18446744073709551615}"#),
    ("vm.resize", r#"{"desired_vcpus":"2"}"#),
    ("vm.add-device", r#"{"path":7}"#),
    ("vm.add-device", r#"{"id":"no_path"}"#),
    ("vm.remove-device", r#"{"id":""}"#),
    ("vm.remove-device", r#"{}"#),
    ("vm.power-policy", r#"{"id":"nobody","power":"off"}"#),
    ("vm.power-policy", r#"{"id":7}"#),
    ("vm.power-policy", r#"{"id":"nobody","hold_off":-1}"#),
    ("vm.power-wake", r#"{"id":"nobody"}"#),
    ("vm.power-reset", r#"{"id":"nobody","clear_latch":"yes"}"#),
    ("vm.restore", r#"{"source_url":"file:///"}"#),
    ("vm.add-disk", r#"{"path":"/dev/null"}"#),
    ("vm.none", "{}"),
    ("../../../etc/passwd", "{}"),
];

pub fn run(socket: &str, pid: &str) -> Outcome {
    let mut connection = Connection::new(socket)?;
    let before = connection.call("GET", "vm.info", None)?;
    refused(&mut connection)?;
    cut_off(socket)?;
    slow(socket)?;
    // Once to fill what is filled once.
    in_a_row(&mut connection, ROW / 10)?;
    large(&mut connection)?;
    let memory = resident(pid)?;
    in_a_row(&mut connection, ROW)?;
    large(&mut connection)?;
    let grown = resident(pid)?.saturating_sub(memory);
    if grown > GROWTH {
        return Err(format!("{grown} KiB more than before"));
    }
    let after = connection.call("GET", "vm.info", None)?;
    if static_part(&before.json()) != static_part(&after.json()) {
        return Err(format!("the VM has changed: {} {}", before.body, after.body));
    }
    println!(
        "{} kinds of wrong requests and {ROW} in a row: nothing has changed, {grown} KiB more",
        WRONG.len()
    );
    Ok(())
}

/// Configuration and state: what no wrong request may change.
fn static_part(info: &serde_json::Value) -> [serde_json::Value; 2] {
    ["config", "state"].map(|field| info[field].clone())
}

fn refused(connection: &mut Connection) -> Outcome {
    for (name, body) in WRONG {
        let answer = connection.call("PUT", name, (!body.is_empty()).then_some(body))?;
        let reason = answer.json().as_array().is_some_and(|messages| !messages.is_empty());
        if !(400..600).contains(&answer.status) || !reason {
            return Err(format!("{name} {body}: {answer:?}"));
        }
    }
    Ok(())
}

/// A request that ends at every place it can end at.
fn cut_off(socket: &str) -> Outcome {
    let request = b"PUT /api/v1/vm.shutdown HTTP/1.1\r\nContent-Length: 10\r\n\r\n{\"a\": 1}";
    for length in (0..request.len()).step_by(3) {
        let mut connection = Connection::new(socket)?;
        connection.send(&request[..length])?;
    }
    // Those clients' places are free once their threads have seen the end.
    let begin = Instant::now();
    while Connection::new(socket)?.call("GET", "vmm.ping", None).is_err() {
        if begin.elapsed() > Duration::from_secs(20) {
            return Err("clients that have gone keep their places".to_owned());
        }
    }
    Ok(())
}

fn slow(socket: &str) -> Outcome {
    let mut waiting = Vec::new();
    // The caller has a connection already.
    for number in 1..SLOW {
        let mut connection = Connection::new(socket)?;
        connection.send(&b"PUT /api/v1/vm.delete HTTP/1.1\r\nHost: x"[..number * 4])?;
        waiting.push(connection);
    }
    let mut quick = Connection::new(socket)?;
    for _ in 0..100 {
        let begin = Instant::now();
        let answer = quick.call("GET", "vmm.ping", None)?;
        if answer.status != 200 || begin.elapsed() > PING {
            return Err(format!("beside slow clients: {answer:?} after {} ms", begin.elapsed().as_millis()));
        }
    }
    Ok(())
}

fn in_a_row(connection: &mut Connection, count: usize) -> Outcome {
    for number in 0..count {
        let (name, body) = WRONG[number % 6];
        let answer = connection.call("PUT", name, (!body.is_empty()).then_some(body))?;
        if answer.status < 400 {
            return Err(format!("{name} {body}: {answer:?}"));
        }
    }
    Ok(())
}

/// Just within the limit of a body, and beyond it.
fn large(connection: &mut Connection) -> Outcome {
    for length in [4 << 20, (4 << 20) + 1] {
        let answer = connection.call("PUT", "vm.create", Some(&" ".repeat(length)))?;
        if answer.status != 400 || answer.body.is_empty() {
            return Err(format!("{length} bytes: {answer:?}"));
        }
    }
    Ok(())
}

/// KiB of the process that are not of files.
fn resident(pid: &str) -> Result<u64, String> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).map_err(|e| e.to_string())?;
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0)
    };
    Ok(field("Anonymous:"))
}
