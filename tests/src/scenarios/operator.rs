//! What an operator sees and does while a guest runs: `dormouse top` and `dormouse ctl`. Looking wakes nobody.

use std::time::Duration;

use serde_json::Value;

use super::steps::{FIRST, IDLE, WAKE, bdf, guest_is_content, nic_asleep, nic_to_sleep, pass_traffic, vm};
use super::{E1000E, scenario};
use crate::error::{Error, Result, ensure};
use crate::guest::Guest;
use crate::host::Host;
use crate::rpc::wait_for;
use crate::runner::{Case, Scenario};

/// Where the VMM takes orders.
const API: &str = "/run/operator.sock";
/// How often the sleeping device is looked at.
const LOOKS: usize = 30;
/// How long that may take on an emulated machine.
const LONG: Duration = Duration::from_secs(240);

pub fn table() -> Vec<Scenario> {
    vec![
        scenario("top_and_ctl_show_a_sleeping_device_and_do_not_wake_it", look),
        scenario("operator_wakes_a_device_and_keeps_it_awake_and_lets_it_sleep_with_ctl", order),
    ]
}

/// A VM with the e1000e, which has no power.
fn asleep<'h>(case: &Case<'h>) -> Result<Guest<'h>> {
    let host = case.host;
    let spec = vm(case, &[E1000E]).options(&format!("--api-socket path={API}"));
    let guest = host.start_vm(&spec)?;
    host.set_link(E1000E, true)?;
    pass_traffic(&guest, FIRST)?;
    nic_to_sleep(host, &guest, E1000E, FIRST)?;
    Ok(guest)
}

fn json(host: &Host, command: &str) -> Result<Value> {
    let text = host.sh(command)?;
    serde_json::from_str(&text).map_err(|error| Error::Check(format!("`{command}`: {error}: {text}")))
}

/// The device as the VMM has it.
fn device(host: &Host) -> Result<Value> {
    let power = json(host, &format!("dormouse ctl --api-socket {API} power --json"))?;
    let device = power["devices"].as_array().and_then(|devices| devices.first());
    device.cloned().ok_or_else(|| Error::Check(format!("no device in {power}")))
}

fn look(case: &Case<'_>) -> Result<()> {
    let (host, guest) = (case.host, asleep(case)?);
    let since = host.timeline.now();
    let id = device(host)?["id"].as_str().unwrap_or_default().to_owned();

    let top = json(host, "dormouse top --once --json")?;
    let shown = &top["vms"][0]["devices"][0];
    let asleep =
        shown["state"] == "off" && shown["host"]["power_state"] == "D3cold" && shown["bdf"] == *bdf(E1000E);
    ensure(asleep && shown["id"] == *id, || format!("top does not show the device asleep: {top}"))?;
    let table = host.sh("dormouse top --once | cat")?;
    ensure(table.contains("Running") && table.contains("D3cold"), || format!("no device in {table}"))?;
    ensure(!table.contains('\u{1b}'), || format!("escape codes in {table:?}"))?;

    // The status socket shows and does not obey.
    let status = "--api-socket $(ls /run/dormouse/*.sock)";
    let table = host.sh(&format!("dormouse ctl {status} power"))?;
    ensure(table.contains(&id) && table.contains("D3cold"), || format!("no device in {table}"))?;
    let refused = host.run(&format!("dormouse ctl {status} power-wake {id} 2>&1"))?;
    ensure(refused.status == 1, || format!("the status socket takes orders: {}", refused.text))?;

    let looks = format!(
        "i=0; while [ $i -lt {LOOKS} ]; do dormouse top --once >/dev/null && dormouse ctl --api-socket {API} metrics >/dev/null \
         && dormouse ctl --api-socket {API} info >/dev/null || exit 1; i=$((i+1)); done"
    );
    let output = host.run_for(&looks, LONG)?;
    ensure(output.status == 0, || format!("a look failed: {}", output.text))?;
    let state = host.power_state(&bdf(E1000E))?;
    ensure(state == "D3cold", || format!("the device is in {state} after {LOOKS} looks"))?;
    let woken = host.power_count(E1000E, true, since);
    ensure(woken == 0, || format!("{LOOKS} looks woke the device {woken} times"))?;
    guest_is_content(&guest)?;
    guest.power_off()
}

fn order(case: &Case<'_>) -> Result<()> {
    let (host, guest) = (case.host, asleep(case)?);
    let before = device(host)?;
    let id = before["id"].as_str().unwrap_or_default().to_owned();
    let ctl = |words: &str| host.sh(&format!("dormouse ctl --api-socket {API} {words}"));

    let since = host.timeline.now();
    ctl(&format!("power-wake {id}"))?;
    wait_for("the firmware gives power", WAKE, || {
        let count = host.power_count(E1000E, true, since);
        Ok(if count > 0 { Ok(()) } else { Err("not yet".to_owned()) })
    })?;
    // The guest's driver looks, finds no link, and lets it sleep again.
    nic_asleep(host, E1000E, since)?;
    let exits = |device: &Value| device["counts"]["exits"].as_u64().unwrap_or_default();
    let after = device(host)?;
    ensure(exits(&after) > exits(&before), || format!("no exit more than before: {after}"))?;

    let policy = ctl(&format!("power-policy {id} power=off"))?;
    ensure(policy.contains("power=off"), || format!("another policy: {policy}"))?;
    host.wait_power_state(&bdf(E1000E), "D0", IDLE)?;
    host.stays_in(&bdf(E1000E), "D0", Duration::from_secs(2))?;
    let since = host.timeline.now();
    ctl(&format!("power-policy {id} power=auto"))?;
    nic_asleep(host, E1000E, since)?;

    host.set_link(E1000E, true)?;
    pass_traffic(&guest, FIRST)?;
    guest_is_content(&guest)?;
    guest.power_off()
}
