//! Watching costs a sleeping device nothing, and what an operator orders of its power happens.

use std::time::Duration;

use serde_json::{Value, json};

use super::{booted, call, event_objects, get, monitored, put, shut_down};
use crate::error::{Error, Result, ensure};
use crate::guest::{API, Guest};
use crate::host::{Host, sysfs};
use crate::rpc::wait_for;
use crate::runner::{Case, Scenario};
use crate::scenarios::steps::{FIRST, IDLE, WAKE, bdf, guest_is_content, no_driver};
use crate::scenarios::{NVME, scenario};

/// Calls that read.
const CALLS: usize = 10_000;
/// How long a sleeping device is watched, in seconds, unless this variable says otherwise: ten minutes by hand, not in every run.
const WATCH: u64 = 20;
const WATCH_VARIABLE: &str = "TESTBED_WATCH_SECONDS";
/// Of the time watched, what the device must have spent in D3cold. Bare VFIO keeps it there all the time.
const RESIDENCY: f64 = 0.98;

pub fn table() -> Vec<Scenario> {
    vec![
        scenario("ten_thousand_calls_leave_a_sleeping_device_asleep", calls),
        scenario("sleeping_device_that_is_watched_every_second_stays_in_d3cold", watched),
        scenario("power_policy_wake_and_reset_by_api_do_what_they_say", policy),
    ]
}

/// A guest whose drive sleeps, without a driver.
fn with_device_asleep<'a>(case: &Case<'a>, options: &str) -> Result<Guest<'a>> {
    let guest = booted(case, &[NVME], options)?;
    to_sleep(case.host, &guest)?;
    Ok(guest)
}

fn to_sleep(host: &Host, guest: &Guest<'_>) -> Result<()> {
    no_driver(guest, FIRST)?;
    guest.sh(&format!("echo auto >{}", sysfs(FIRST, "power/control")))?;
    host.wait_power_state(&bdf(NVME), "D3cold", IDLE)
}

/// What the host's kernel has counted, and the VMM's own count of wakes.
#[derive(Debug)]
struct Record {
    active_ms: u64,
    suspended_ms: u64,
    wakes: u64,
    firmware_on: usize,
}

fn record(host: &Host) -> Result<Record> {
    let text = host
        .sh(&format!("cd {}; cat runtime_active_time runtime_suspended_time", sysfs(&bdf(NVME), "power")))?;
    let times: Vec<u64> = text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    let &[active_ms, suspended_ms] = times.as_slice() else {
        return Err(Error::Check(format!("the host's times are {text}")));
    };
    Ok(Record {
        active_ms,
        suspended_ms,
        wakes: wakes(&device(host)?),
        firmware_on: host.power_count(NVME, true, Duration::ZERO),
    })
}

/// `vm.power` of the one device.
fn device(host: &Host) -> Result<Value> {
    Ok(get(host, "vm.power")?["devices"][0].take())
}

/// All times that the device has left low power, whatever for.
fn wakes(device: &Value) -> u64 {
    let causes = device["wakes"].as_object().map(|wakes| wakes.values().filter_map(Value::as_u64).sum());
    causes.unwrap_or(u64::MAX)
}

fn still_asleep(host: &Host, before: &Record) -> Result<Record> {
    let after = record(host)?;
    let same = after.active_ms == before.active_ms
        && after.wakes == before.wakes
        && after.firmware_on == before.firmware_on;
    ensure(same, || format!("it was woken: {before:?}, then {after:?}"))?;
    let state = host.power_state(&bdf(NVME))?;
    ensure(state == "D3cold", || format!("host: in {state}"))?;
    Ok(after)
}

fn calls(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let guest = with_device_asleep(case, "--metrics-socket /run/vmm.metrics")?;
    let before = record(host)?;
    let load = format!("api_client load {CALLS} {API} /run/dormouse/$(pidof dormouse).sock");
    let output = host.run_for(&load, Duration::from_secs(180))?;
    ensure(output.status == 0 && output.text.starts_with("10000 calls"), || output.text)?;
    let metrics = host.sh("curl -sS --unix-socket /run/vmm.metrics http://localhost/metrics")?;
    ensure(metrics.contains("dormouse_device_host_d3cold{id=\"dev0\",bdf=\"0000:04:00.0\"} 1"), || metrics)?;
    still_asleep(host, &before)?;
    let refused = call(
        host,
        "/run/dormouse/$(pidof dormouse).sock",
        "PUT",
        "vm.power-wake",
        Some(&json!({"id": "dev0"})),
    )?;
    ensure(refused.status == 403, || format!("the status socket: {refused:?}"))?;
    still_asleep(host, &before)?;
    // One that is meant to wake it does.
    put(host, "vm.power-wake", Some(&json!({"id": "dev0"})))?;
    wait_for("the device has been awake", WAKE, || {
        let now = record(host)?;
        let woken = now.wakes > before.wakes
            && now.active_ms > before.active_ms
            && now.firmware_on > before.firmware_on;
        Ok(if woken { Ok(()) } else { Err(format!("{now:?}")) })
    })?;
    guest_is_content(&guest)?;
    shut_down(&guest, host)
}

fn watched(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let seconds = std::env::var(WATCH_VARIABLE).ok().and_then(|text| text.parse().ok()).unwrap_or(WATCH);
    let guest = with_device_asleep(case, "")?;
    let before = record(host)?;
    let uptime = || -> Result<f64> {
        let text = host.sh("cut -d' ' -f1 /proc/uptime")?;
        text.parse().map_err(|e| Error::Check(format!("{text}: {e}")))
    };
    let begin = uptime()?;
    let watch = format!("api_client watch {seconds} {API} $(pidof dormouse) {}", bdf(NVME));
    let output = host.run_for(&watch, Duration::from_secs(seconds * 2 + 60))?;
    ensure(output.status == 0, || output.text.clone())?;
    let after = still_asleep(host, &before)?;
    let passed = uptime()? - begin;
    #[expect(clippy::cast_precision_loss, reason = "milliseconds of minutes are exact")]
    let asleep = (after.suspended_ms - before.suspended_ms) as f64 / 1e3;
    let residency = asleep / passed;
    println!("  {}; in low power {asleep:.1} s of {passed:.1} s: {:.2} %", output.text, residency * 100.0);
    ensure(residency >= RESIDENCY, || format!("in low power {:.2} % of the time", residency * 100.0))?;
    ensure(output.text.contains(" 0 ns of processor time"), || output.text)?;
    guest_is_content(&guest)?;
    shut_down(&guest, host)
}

fn policy(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let option = monitored(host)?;
    let guest = with_device_asleep(case, &option)?;
    let set = |power: &str| put(host, "vm.power-policy", Some(&json!({"id": "dev0", "power": power})));
    let in_force = set("off")?;
    ensure(in_force["power"] == "off", || format!("the policy in force is {in_force}"))?;
    host.wait_power_state(&bdf(NVME), "D0", WAKE)?;
    host.stays_in(&bdf(NVME), "D0", Duration::from_secs(3))?;
    // It outlives a reboot of the guest.
    let mark = guest.mark();
    guest.begin("reboot -f")?;
    guest.wait_ready(mark)?;
    no_driver(&guest, FIRST)?;
    guest.sh(&format!("echo auto >{}", sysfs(FIRST, "power/control")))?;
    host.stays_in(&bdf(NVME), "D0", Duration::from_secs(3))?;
    let info = get(host, "vm.info")?;
    ensure(info["config"]["devices"][0]["power"] == "off", || {
        format!("vm.info: {}", info["config"]["devices"])
    })?;
    // Taken back, it leads to what the guest has wanted all the time; another reboot changes nothing of it.
    set("auto")?;
    host.wait_power_state(&bdf(NVME), "D3cold", IDLE)?;
    let mark = guest.mark();
    put(host, "vm.reboot", None)?;
    guest.wait_ready(mark)?;
    to_sleep(host, &guest)?;
    let wrong = call(host, API, "PUT", "vm.power-policy", Some(&json!({"id": "dev0", "pwoer": "off"})))?;
    ensure(wrong.status == 400, || format!("a field that is not known: {wrong:?}"))?;
    // There is nothing to recover, and asking wakes nothing.
    let before = record(host)?;
    let reset = call(host, API, "PUT", "vm.power-reset", Some(&json!({"id": "dev0"})))?;
    ensure(reset.status == 400, || format!("vm.power-reset of a device that is well: {reset:?}"))?;
    still_asleep(host, &before)?;
    put(host, "vm.power-wake", Some(&json!({"id": "dev0"})))?;
    host.wait_power_state(&bdf(NVME), "D0", WAKE)?;
    guest_is_content(&guest)?;
    shut_down(&guest, host)?;
    let told: Vec<Value> =
        event_objects(host)?.into_iter().filter(|event| event["event"] == "device-power").collect();
    ensure(!told.is_empty(), || "no device-power event was told".to_owned())?;
    for event in &told {
        let ours = event["source"] == "vm" && event["properties"]["id"] == "dev0";
        ensure(
            ours && event["properties"].as_object().is_some_and(|all| all.values().all(Value::is_string)),
            || format!("an event that clients cannot read: {event}"),
        )?;
    }
    Ok(())
}
