//! Assigned devices that come to a running guest and go again, driven through the API: they sleep like those that were there from the start,
//! and leave nothing behind.

use std::time::Duration;

use super::steps::{FIRST, IDLE, bdf, guest_is_content, nic_to_sleep, pass_traffic, vm, wait_for_drive};
use super::{E1000E, IGB, NVME, scenario, with_old_kernels};
use crate::error::{Result, ensure};
use crate::guest::{Guest, VmSpec};
use crate::host::{Host, sysfs};
use crate::rpc::wait_for;
use crate::runner::{Case, Scenario};

/// The VM's control socket and its events, on the host.
const SOCKET: &str = "/run/hotplug.sock";
const EVENTS: &str = "/run/hotplug.events";
/// How often a device comes and goes.
const TIMES: usize = 100;

pub fn table() -> Vec<Scenario> {
    let mut all = with_old_kernels(scenario(
        "a_device_added_to_a_running_guest_sleeps_and_can_be_removed_asleep",
        added_sleeps_and_goes,
    ));
    all.extend([
        scenario("a_device_from_the_start_can_be_removed_and_comes_back_on_bus_0", cold_goes_and_comes_back),
        scenario("a_reserved_root_port_takes_a_device_that_sleeps", reserved_port),
        scenario("an_added_device_stays_in_its_place_when_the_guest_reboots", reboot),
        scenario("a_device_comes_and_goes_a_hundred_times_and_leaves_nothing_behind", hundred_times),
    ]);
    all
}

/// A VM that the API can reach, whose guest has the drivers of the NICs and the drive.
fn spec(case: &Case<'_>, slots: &[usize]) -> VmSpec {
    let mut spec = vm(case, slots).options(&format!("--api-socket {SOCKET} --event-monitor path={EVENTS}"));
    spec.modules = vec!["e1000e", "igb", "nvme"];
    spec
}

fn ctl(host: &Host, words: &str) -> Result<String> {
    host.sh(&format!("dormouse ctl --api-socket {SOCKET} --json {words}"))
}

/// Adds a function of the host and returns where the guest has it.
fn add(host: &Host, slot: usize, keys: &str) -> Result<String> {
    let reply = ctl(
        host,
        &format!("add-device path={},id=dev{slot}{keys}", sysfs(&bdf(slot), "").trim_end_matches('/')),
    )?;
    let json: serde_json::Value =
        serde_json::from_str(&reply).map_err(|e| crate::error::Error::Check(format!("{reply}: {e}")))?;
    let (id, guest) = (json["id"].as_str(), json["bdf"].as_str());
    ensure(id == Some(format!("dev{slot}").as_str()), || format!("added as {reply}"))?;
    guest.map(str::to_owned).ok_or_else(|| crate::error::Error::Check(format!("no bdf in {reply}")))
}

/// Removes a device by name and waits for the event that says it is free.
fn remove(host: &Host, id: &str) -> Result<()> {
    let count = || -> Result<usize> {
        let text = host.sh(&format!("grep -A6 device-removed {EVENTS} | grep -c '\"{id}\"' || true"))?;
        Ok(text.trim().parse().unwrap_or(0))
    };
    let before = count()?;
    ctl(host, &format!("remove-device {id}"))?;
    // Through a slot Linux waits five seconds for somebody to change their mind.
    wait_for("the device is removed", IDLE, || {
        let now = count()?;
        Ok(if now > before { Ok(()) } else { Err(format!("{now} times so far")) })
    })
}

fn is_gone(guest: &Guest<'_>, function: &str) -> Result<()> {
    let there = guest.run(&format!("test -e {}", sysfs(function, "vendor")))?;
    ensure(there.status != 0, || format!("the guest still has {function}"))
}

fn added_sleeps_and_goes(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let guest = host.start_vm(&spec(case, &[]))?;
    for slot in [E1000E, IGB] {
        let function = add(host, slot, "")?;
        ensure(function.starts_with("0000:00:") && function.ends_with(".0"), || {
            format!("clients expect it on bus 0, and it is at {function}")
        })?;
        host.set_link(slot, true)?;
        pass_traffic(&guest, &function)?;
        nic_to_sleep(host, &guest, slot, &function)?;
        host.stays_in(&bdf(slot), "D3cold", Duration::from_secs(1))?;
        host.set_link(slot, true)?;
        pass_traffic(&guest, &function)?;
        nic_to_sleep(host, &guest, slot, &function)?;
        remove(host, &format!("dev{slot}"))?;
        is_gone(&guest, &function)?;
        let vendor = host.poke(&bdf(slot))?;
        ensure(vendor.starts_with("8680"), || format!("the host's device answers {vendor}"))?;
    }
    guest_is_content(&guest)?;
    guest.power_off()
}

fn cold_goes_and_comes_back(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let guest = host.start_vm(&spec(case, &[NVME]))?;
    wait_for_drive(&guest)?;
    let id = "_vfio0";
    remove(host, id)?;
    is_gone(&guest, FIRST)?;
    let info = ctl(host, "info")?;
    ensure(!info.contains(id), || format!("still in vm.info: {info}"))?;
    let function = add(host, NVME, "")?;
    wait_for_drive(&guest)?;
    guest.sh("dd if=/dev/urandom of=/dev/nvme0n1 bs=1M count=4 conv=fsync")?;
    remove(host, &format!("dev{NVME}"))?;
    is_gone(&guest, &function)?;
    guest_is_content(&guest)?;
    guest.power_off()
}

fn reserved_port(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let guest = host.start_vm(&spec(case, &[]).options("--platform hotplug_ports=1"))?;
    let served = guest.sh("ls /sys/bus/pci_express/drivers/pciehp/")?;
    ensure(served.contains("0000:00:01.0"), || format!("the guest serves no slot: {served}"))?;
    for _ in 0..2 {
        let function = add(host, E1000E, "")?;
        ensure(function == FIRST, || format!("it is not below the port but at {function}"))?;
        host.set_link(E1000E, true)?;
        pass_traffic(&guest, &function)?;
        nic_to_sleep(host, &guest, E1000E, &function)?;
        let way = guest.sh(&format!("readlink {}", sysfs(&function, "").trim_end_matches('/')))?;
        ensure(way.contains("/0000:00:01.0/"), || format!("no port above it: {way}"))?;
        host.set_link(E1000E, true)?;
        pass_traffic(&guest, &function)?;
        remove(host, &format!("dev{E1000E}"))?;
        is_gone(&guest, &function)?;
    }
    // The port is full with one; the next goes to bus 0.
    add(host, E1000E, "")?;
    let second = add(host, NVME, "")?;
    ensure(second.starts_with("0000:00:"), || format!("the second is at {second}"))?;
    wait_for_drive(&guest)?;
    guest_is_content(&guest)?;
    guest.power_off()
}

fn reboot(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let guest = host.start_vm(&spec(case, &[]))?;
    let function = add(host, IGB, ",pci_device_id=9")?;
    ensure(function == "0000:00:09.0", || format!("it asked for 9 and is at {function}"))?;
    host.set_link(IGB, true)?;
    pass_traffic(&guest, &function)?;
    nic_to_sleep(host, &guest, IGB, &function)?;
    let mark = guest.mark();
    ctl(host, "reboot")?;
    guest.wait_ready(mark)?;
    host.set_link(IGB, true)?;
    pass_traffic(&guest, &function)?;
    nic_to_sleep(host, &guest, IGB, &function)?;
    remove(host, &format!("dev{IGB}"))?;
    is_gone(&guest, &function)?;
    guest_is_content(&guest)?;
    guest.power_off()
}

fn hundred_times(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let guest = host.start_vm(&spec(case, &[]))?;
    let left = || {
        host.sh(
            "cd /proc/$(pidof dormouse | cut -d' ' -f1) && ls fd | wc -l && ls task | wc -l && wc -l <maps",
        )
    };
    let mut before = None;
    for _ in 0..TIMES {
        let function = add(host, E1000E, "")?;
        guest.wait_file(&sysfs(&function, "vendor"), "0x8086", IDLE)?;
        remove(host, &format!("dev{E1000E}"))?;
        is_gone(&guest, &function)?;
        // What is made once and kept is there after the first time.
        if before.is_none() {
            before = Some(left()?);
        }
    }
    let after = left()?;
    ensure(before.as_deref() == Some(after.as_str()), || {
        format!("descriptors, threads, mappings: {before:?} after the first time, {after} after the last")
    })?;
    guest_is_content(&guest)?;
    guest.power_off()
}
