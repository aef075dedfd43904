//! `dormouse doctor` on hosts where something keeps a device from D3cold: the one cause by name, and nobody woken.

use std::time::Duration;

use serde_json::Value;

use super::steps::{IDLE, UIO, VFIO, bdf, give};
use super::{E1000E, GPU, NVME, on, scenario};
use crate::error::{Error, Result, ensure};
use crate::host::{Host, sysfs};
use crate::runner::{Case, Scenario};
use crate::spec::{Device, HostSpec, Hotplug, Kernel, Slot, address};

/// How often the sleeping device is examined.
const RUNS: usize = 100;
/// How long that may take on an emulated machine.
const LONG: Duration = Duration::from_secs(240);

pub fn table() -> Vec<Scenario> {
    let without = HostSpec::devices(&[Device::Bochs, Device::Xhci]);
    let mut no_iommu = HostSpec::new(&[Slot::new(Device::E1000e)]);
    no_iommu.iommu = false;
    let no_power = HostSpec::new(&[Slot { power: false, ..Slot::new(Device::E1000e) }]);
    let ejectable = HostSpec::new(&[Slot { hotplug: Hotplug::Firmware, ..Slot::new(Device::E1000e) }]);
    let two = HostSpec::new(&[Slot::with(&[Device::Gpu, Device::E1000e])]);
    let old = scenario("doctor_tries_a_device_with_linux_6_1_in_the_host", verify);
    let old = Scenario { host: old.host.clone().kernel(Kernel::Cloud6_1), ..old };
    vec![
        scenario("doctor_finds_nothing_on_a_sound_host_and_wakes_nobody", sound),
        scenario("doctor_names_power_control_and_d3cold_allowed", forbidden),
        scenario("doctor_names_the_hosts_driver", driver),
        scenario("doctor_names_a_kernel_that_is_too_old", old_kernel),
        scenario("doctor_tries_a_device_and_leaves_it_as_it_was", verify),
        old,
        on(without, "doctor_names_the_missing_power_management_capability", no_capability),
        on(ejectable, "doctor_names_a_slot_that_can_be_ejected", |case| {
            names(case.host, 0, &["ejectable"]).map(drop)
        }),
        on(two, "doctor_names_a_partner_on_another_driver", partner),
        on(no_iommu, "doctor_names_the_missing_iommu", |case| {
            names(case.host, 0, &["iommu", "driver"]).map(drop)
        }),
        on(no_power, "doctor_names_the_missing_power_resources", |case| {
            names(case.host, 0, &["power-resources"]).map(drop)
        }),
    ]
}

/// Examines a device: the exit status, and what was found as JSON.
fn examine(host: &Host, slot: usize, options: &str) -> Result<(i32, Value)> {
    let command = format!("dormouse doctor {} --json {options} 2>/run/doctor.err", bdf(slot));
    let output = host.run_for(&command, LONG)?;
    let value = serde_json::from_str(&output.text)
        .map_err(|error| Error::Check(format!("`{command}`: {error}: {}", output.text)))?;
    Ok((output.status, value))
}

/// The checks that found a blocker.
fn blockers(report: &Value) -> Vec<&str> {
    let findings = report["findings"].as_array().map(Vec::as_slice).unwrap_or_default();
    let found = findings.iter().filter(|finding| finding["severity"] == "blocker");
    found.filter_map(|finding| finding["check"].as_str()).collect()
}

/// Checks that the doctor names these blockers and no others, and says so by its exit status.
fn names(host: &Host, slot: usize, wanted: &[&str]) -> Result<Value> {
    let (status, report) = examine(host, slot, "")?;
    let found = blockers(&report);
    ensure(status == 3 && found == wanted, || {
        format!("status {status}, blockers {found:?} instead of {wanted:?}")
    })?;
    Ok(report)
}

fn write(host: &Host, file: &str, text: &str) -> Result<()> {
    host.sh(&format!("echo {text} >{file}")).map(drop)
}

fn sound(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    host.wait_power_state(&bdf(GPU), "D3cold", IDLE)?;
    let since = host.timeline.now();
    let (_, report) = examine(host, GPU, "")?;
    ensure(blockers(&report).is_empty(), || format!("blockers on a sound host: {report}"))?;
    let table = host.sh("dormouse doctor || test $? = 2")?;
    ensure(table.contains(&bdf(NVME)), || format!("the table lacks a device: {table}"))?;
    let runs =
        format!("i=0; while [ $i -lt {RUNS} ]; do dormouse doctor {} >/dev/null; i=$((i+1)); done", bdf(GPU));
    host.run_for(&runs, LONG)?;
    let state = host.power_state(&bdf(GPU))?;
    ensure(state == "D3cold", || format!("the device is in {state} after {RUNS} runs"))?;
    let woken = host.power_count(GPU, true, since);
    ensure(woken == 0, || format!("{RUNS} runs woke the device {woken} times"))
}

fn forbidden(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let (control, allowed) = (sysfs(&bdf(E1000E), "power/control"), sysfs(&bdf(E1000E), "d3cold_allowed"));
    write(host, &control, "on")?;
    let by_control = names(host, E1000E, &["power-control"]);
    write(host, &control, "auto")?;
    by_control?;
    write(host, &allowed, "0")?;
    let by_ban = names(host, E1000E, &["d3cold-allowed"]);
    write(host, &allowed, "1")?;
    by_ban.map(drop)
}

fn driver(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    give(host, &bdf(NVME), UIO)?;
    let found = names(host, NVME, &["driver"]);
    give(host, &bdf(NVME), VFIO)?;
    let text = found?.to_string();
    ensure(text.contains("driver uio_pci_generic"), || format!("the driver is not named: {text}"))
}

/// The release that the kernel tells is covered by another.
fn old_kernel(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let release = "/proc/sys/kernel/osrelease";
    host.sh(&format!("echo 6.0.19 >/run/osrelease && mount -o bind /run/osrelease {release}"))?;
    let found = names(host, GPU, &["kernel"]);
    host.sh(&format!("umount {release}"))?;
    found.map(drop)
}

fn partner(case: &Case<'_>) -> Result<()> {
    let (host, other) = (case.host, address(0, 1));
    give(host, &other, UIO)?;
    let found = names(host, 0, &["group", "neighbour"]);
    give(host, &other, VFIO)?;
    let text = found?.to_string();
    ensure(text.contains("driver uio_pci_generic"), || format!("the partner's driver is not named: {text}"))
}

fn verify(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let cold = |slot| -> Result<()> {
        let (_, report) = examine(host, slot, "--verify")?;
        let deepest = &report["verification"]["deepest"];
        ensure(deepest == "D3cold", || format!("it reached {deepest}: {report}"))
    };
    cold(GPU)?;
    host.wait_power_state(&bdf(GPU), "D3cold", IDLE)?;
    // On another driver, which gets it back.
    give(host, &bdf(NVME), UIO)?;
    let attributes = format!(
        "cd {} && basename $(readlink driver) && cat driver_override power/control",
        sysfs(&bdf(NVME), "")
    );
    let before = host.sh(&attributes)?;
    let tried = cold(NVME);
    let after = host.sh(&attributes)?;
    give(host, &bdf(NVME), VFIO)?;
    tried?;
    ensure(before == after, || format!("before: {before}, after: {after}"))
}

fn no_capability(case: &Case<'_>) -> Result<()> {
    for slot in 0..case.host.spec.slots.len() {
        no_capability_in(case.host, slot)?;
    }
    Ok(())
}

fn no_capability_in(host: &Host, slot: usize) -> Result<()> {
    let says = |report: &Value| {
        let text = report.to_string();
        ensure(text.contains("no PCI power management capability"), || format!("not named: {text}"))
    };
    // Asleep, only what follows from it can be seen; awake, the capability itself.
    says(&names(host, slot, &["d3cold-allowed"])?)?;
    let control = sysfs(&bdf(slot), "power/control");
    write(host, &control, "on")?;
    let awake = names(host, slot, &["pm-capability", "power-control"]);
    write(host, &control, "auto")?;
    says(&awake?)
}
