//! Every call in every state: the status that it must have, and the state that follows. First each alone, then a long random
//! walk over the same table.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use crate::Outcome;
use crate::wire::Connection;

/// Calls of the random walk.
const STEPS: usize = 400;
/// Reboots during which somebody polls.
const REBOOTS: usize = 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    None,
    Created,
    Running,
    Paused,
}
use State::{Created, None as Nothing, Paused, Running};

const STATES: [State; 4] = [Nothing, Created, Running, Paused];

/// A call, and for each of [`STATES`] the status and the state that follows.
type Row = (&'static str, &'static str, &'static str, [(u16, State); 4]);

/// `CONFIG` stands for the configuration.
#[rustfmt::skip]
const TABLE: &[Row] = &[
    ("GET", "vmm.ping",         "",        [(200, Nothing), (200, Created), (200, Running), (200, Paused)]),
    ("GET", "vm.info",          "",        [(404, Nothing), (200, Created), (200, Running), (200, Paused)]),
    ("GET", "vm.counters",      "",        [(500, Nothing), (500, Created), (200, Running), (200, Paused)]),
    ("GET", "vm.power",         "",        [(404, Nothing), (200, Created), (200, Running), (200, Paused)]),
    ("GET", "/metrics",         "",        [(200, Nothing), (200, Created), (200, Running), (200, Paused)]),
    ("PUT", "vm.create",        "CONFIG",  [(204, Created), (500, Created), (500, Running), (500, Paused)]),
    ("PUT", "vm.boot",          "",        [(404, Nothing), (204, Running), (500, Running), (204, Running)]),
    ("PUT", "vm.delete",        "",        [(204, Nothing), (204, Nothing), (204, Nothing), (204, Nothing)]),
    ("PUT", "vm.shutdown",      "",        [(500, Nothing), (500, Created), (204, Created), (204, Created)]),
    ("PUT", "vm.reboot",        "",        [(404, Nothing), (404, Created), (204, Running), (204, Running)]),
    ("PUT", "vm.pause",         "",        [(500, Nothing), (500, Created), (204, Paused),  (500, Paused)]),
    ("PUT", "vm.resume",        "",        [(500, Nothing), (500, Created), (500, Running), (204, Running)]),
    ("PUT", "vm.power-button",  "",        [(500, Nothing), (500, Created), (204, Running), (204, Paused)]),
    ("PUT", "vm.nmi",           "",        [(500, Nothing), (500, Created), (204, Running), (204, Paused)]),
    ("PUT", "vm.resize",        r#"{"desired_vcpus":1}"#,
                                           [(404, Nothing), (204, Created), (204, Running), (204, Paused)]),
    ("PUT", "vm.resize",        r#"{"desired_balloon":1}"#,
                                           [(404, Nothing), (500, Created), (500, Running), (500, Paused)]),
    ("PUT", "vm.remove-device", r#"{"id":"none"}"#,
                                           [(404, Nothing), (404, Created), (404, Running), (404, Paused)]),
    ("PUT", "vm.power-policy",  r#"{"id":"none"}"#,
                                           [(404, Nothing), (404, Created), (404, Running), (404, Paused)]),
    ("PUT", "vm.power-wake",    r#"{"id":"none"}"#,
                                           [(404, Nothing), (404, Created), (404, Running), (404, Paused)]),
    ("PUT", "vm.power-reset",   r#"{"id":"none"}"#,
                                           [(404, Nothing), (404, Created), (404, Running), (404, Paused)]),
    // Where nothing can be written.
    ("PUT", "vm.snapshot",      r#"{"destination_url":"file:///proc/none"}"#,
                                           [(500, Nothing), (500, Created), (500, Running), (500, Paused)]),
    ("PUT", "vm.restore",       r#"{"source_url":"file:///proc/none"}"#,
                                           [(500, Nothing), (500, Created), (500, Running), (500, Paused)]),
];

struct Walker {
    connection: Connection,
    config: String,
    state: State,
}

pub fn run(socket: &str, kernel: &str) -> Outcome {
    let config = serde_json::json!({
        "payload": {"kernel": kernel}, "memory": {"size": 64 << 20}, "serial": {"mode": "Null"},
    });
    let mut walker =
        Walker { connection: Connection::new(socket)?, config: config.to_string(), state: Nothing };
    let mut calls = 0;
    for state in STATES {
        for row in TABLE {
            walker.go_to(state)?;
            walker.call(row)?;
            calls += 1;
        }
    }
    // Numerical Recipes' generator: the same walk each time.
    let mut random: u32 = 2026;
    for _ in 0..STEPS {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let row = &TABLE[(random >> 16) as usize % TABLE.len()];
        walker.call(row)?;
        calls += 1;
    }
    walker.go_to(Running)?;
    let looks = reboots_are_not_seen(socket, &mut walker)?;
    walker.go_to(Nothing)?;
    println!(
        "{calls} calls were answered as they must be, and {looks} looks at a VM that reboots saw it running"
    );
    Ok(())
}

/// Whoever polls a VM while it reboots sees it running all the time. How often somebody looked.
fn reboots_are_not_seen(socket: &str, walker: &mut Walker) -> Result<u32, String> {
    let rebooting = AtomicBool::new(true);
    thread::scope(|scope| {
        let polling = scope.spawn(|| {
            let mut connection = Connection::new(socket)?;
            let mut looks = 0;
            while rebooting.load(Ordering::SeqCst) {
                let info = connection.call("GET", "vm.info", None)?;
                let counters = connection.call("GET", "vm.counters", None)?;
                if info.json()["state"] != "Running" || counters.status != 200 {
                    return Err(format!("during a reboot: {info:?}, {counters:?}"));
                }
                looks += 1;
            }
            Ok(looks)
        });
        let reboots = (0..REBOOTS).try_for_each(|_| {
            walker.call(TABLE.iter().find(|row| row.1 == "vm.reboot").ok_or("no such call")?)
        });
        rebooting.store(false, Ordering::SeqCst);
        let looks = polling.join().map_err(|_| "the polling thread panicked".to_owned())?;
        reboots.and(looks)
    })
}

impl Walker {
    fn go_to(&mut self, state: State) -> Outcome {
        let way: &[&str] = match state {
            Nothing => &["vm.delete"],
            Created => &["vm.delete", "vm.create"],
            Running => &["vm.delete", "vm.create", "vm.boot"],
            Paused => &["vm.delete", "vm.create", "vm.boot", "vm.pause"],
        };
        for name in way {
            let row = TABLE.iter().find(|row| row.1 == *name).ok_or("no such call")?;
            self.call(row)?;
        }
        if self.state == state { Ok(()) } else { Err(format!("in {:?} and not in {state:?}", self.state)) }
    }

    fn call(&mut self, (method, name, body, expected): &Row) -> Outcome {
        let before = self.state;
        let (status, after) = expected[STATES.iter().position(|state| *state == before).unwrap_or(0)];
        let body = if *body == "CONFIG" { self.config.clone() } else { (*body).to_owned() };
        let answer = self.connection.call(method, name, (!body.is_empty()).then_some(&body))?;
        if answer.status != status {
            return Err(format!("{name} {body} in {before:?}: {answer:?} and not {status}"));
        }
        if status >= 400 && answer.json().as_array().is_none_or(|messages| messages.len() < 2) {
            return Err(format!("{name} in {before:?}: {answer:?} says no reason"));
        }
        let info = self.connection.call("GET", "vm.info", None)?;
        let state = match info.json()["state"].as_str() {
            Some("Created") => Created,
            Some("Running") => Running,
            Some("Paused") => Paused,
            None if info.status == 404 => Nothing,
            _ => return Err(format!("vm.info: {info:?}")),
        };
        if state != after {
            return Err(format!("{name} in {before:?} led to {state:?} and not to {after:?}"));
        }
        self.state = after;
        Ok(())
    }
}
