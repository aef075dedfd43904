//! The REST API with a real guest and an assigned device: what each call does, by whom it is called, and that watching wakes nothing.

mod asleep;
mod clients;
mod lifecycle;

use std::time::Duration;

use serde_json::Value;

use super::steps::vm;
use crate::error::{Error, Result, ensure};
use crate::guest::{API, Guest, VmSpec};
use crate::host::Host;
use crate::runner::{Case, Scenario};

/// How long one call may take on the emulated host; a boot with a device is the longest.
const CALL: Duration = Duration::from_secs(60);
/// Where a scenario's configuration is on the host.
const CONFIG: &str = "/run/vm.json";
/// Where the event monitor writes.
const EVENTS: &str = "/run/events";
/// The monitor's pipe, and what reads it.
const EVENT_PIPE: &str = "/run/events.fifo";

pub fn table() -> Vec<Scenario> {
    [lifecycle::table(), clients::table(), asleep::table()].concat()
}

/// An answer of the API.
#[derive(Debug)]
pub struct Answer {
    /// HTTP's.
    pub status: u16,
    /// What came with it.
    pub body: Value,
}

/// One call, from the host.
pub fn call(host: &Host, socket: &str, method: &str, name: &str, body: Option<&Value>) -> Result<Answer> {
    let body = body.map(|body| format!(" '{body}'")).unwrap_or_default();
    let output = host.run_for(&format!("api_client call {socket} {method} {name}{body}"), CALL)?;
    let (status, body) = output.text.split_once(' ').unwrap_or((&output.text, ""));
    match status.parse() {
        Ok(status) if output.status == 0 => {
            Ok(Answer { status, body: serde_json::from_str(body).unwrap_or_default() })
        }
        _ => Err(Error::Check(format!("{method} {name}: {}", output.text))),
    }
}

/// A call that reads and must succeed.
fn get(host: &Host, name: &str) -> Result<Value> {
    let answer = call(host, API, "GET", name, None)?;
    ensure(answer.status == 200, || format!("GET {name}: {answer:?}"))?;
    Ok(answer.body)
}

/// A call that must succeed.
fn put(host: &Host, name: &str, body: Option<&Value>) -> Result<Value> {
    let answer = call(host, API, "PUT", name, body)?;
    ensure(answer.status == 200 || answer.status == 204, || format!("PUT {name}: {answer:?}"))?;
    Ok(answer.body)
}

/// The VM's state.
fn expect_state(host: &Host, state: &str) -> Result<()> {
    let info = get(host, "vm.info")?;
    ensure(info["state"] == state, || format!("the state is {} and not {state}", info["state"]))
}

/// Starts a VMM without a machine and puts `vm`'s configuration beside it.
fn launch<'h>(host: &'h Host, vm: &VmSpec) -> Result<Guest<'h>> {
    let guest = Guest::launch(host, &vm.clone().by_api())?;
    host.sh(&format!("echo '{}' >{CONFIG}", vm.config()))?;
    host.sh(&format!(
        "for n in $(seq 100); do [ ! -S {API} ] || exit 0; usleep 20000; done; cat /run/vmm.err; exit 1"
    ))?;
    Ok(guest)
}

/// A guest that was created and booted through the API, with the functions of these slots.
fn booted<'a>(case: &Case<'a>, slots: &[usize], options: &str) -> Result<Guest<'a>> {
    let vm = vm(case, slots).options(options);
    let guest = launch(case.host, &vm)?;
    let mark = guest.mark();
    put(case.host, "vm.create", Some(&vm.config()))?;
    put(case.host, "vm.boot", None)?;
    guest.wait_ready(mark)?;
    Ok(guest)
}

/// Has the VMM end through the API.
pub fn shut_down(guest: &Guest<'_>, host: &Host) -> Result<()> {
    put(host, "vmm.shutdown", None)?;
    let status = guest.wait_exit()?;
    ensure(status == 0, || format!("the VMM ended with status {status} after vmm.shutdown"))
}

/// Option and pipe of an event monitor whose reader comes once the VMM has started, as libvirt's does.
fn monitored(host: &Host) -> Result<String> {
    host.sh(&format!("rm -f {EVENT_PIPE} {EVENTS}; mkfifo {EVENT_PIPE}; (sleep 1; cat {EVENT_PIPE} >{EVENTS}) </dev/null >/dev/null 2>&1 &"))?;
    Ok(format!("--event-monitor path={EVENT_PIPE}"))
}

/// Checks that these are the events so far but those of devices' power, as `source:event`.
fn expect_events(host: &Host, expected: &[&str]) -> Result<()> {
    let list = event_objects(host)?;
    let of_the_vm = list.iter().filter(|event| event["event"] != "device-power");
    let name =
        |event: &Value| ["source", "event"].map(|name| event[name].as_str().unwrap_or_default()).join(":");
    let told: Vec<String> = of_the_vm.map(name).collect();
    ensure(told == expected, || format!("the events were {told:?}"))
}

/// The events so far: objects with an empty line after each.
fn event_objects(host: &Host) -> Result<Vec<Value>> {
    let text = host.sh(&format!("cat {EVENTS}"))?;
    text.split("\n\n")
        .filter(|part| !part.trim().is_empty())
        .map(|part| serde_json::from_str(part).map_err(|e| Error::Check(format!("no event: {e}: {part}"))))
        .collect()
}
