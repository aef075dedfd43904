//! Faults of the host's firmware and slots: a power supply that fails, a device whose slot's button is pressed, a device that is pulled
//! out. The guest is told or reads all ones, the VM lives, and afterwards host and device are as before. Rows 9, 19 and 20 of the
//! failure modes in docs/power.md.

use std::time::Duration;

use super::recovery::Baseline;
use super::steps::{FIRST, IDLE, WAKE, bdf, bind, nic_to_sleep, pass_traffic, unbind, vm, wait_for_drive};
use super::{FRAGILE_NVME, PLUGGED_IGB, faulty, on};
use crate::error::{Result, ensure};
use crate::guest::{Guest, VmSpec};
use crate::host::{Host, sysfs};
use crate::rpc::wait_for;
use crate::runner::{Case, Scenario};

/// How long the guest's `_ON` may take before it is told that the device is lost (the default of `on_timeout`), and some more.
const ON_TIMEOUT: Duration = Duration::from_secs(15);
/// The host's kernel looks ever more rarely whether a device that is being reset answers.
const RESET: Duration = Duration::from_secs(60);

pub fn table() -> Vec<Scenario> {
    vec![
        on(faulty(), "device_that_gets_no_power_is_lost_and_the_vm_lives_on", dead),
        on(faulty(), "device_that_gets_its_power_late_comes_back_by_its_reset", late),
        on(faulty(), "device_whose_slot_button_is_pressed_works_until_the_vm_ends", button),
        on(faulty(), "device_pulled_out_while_on_is_taken_from_a_guest_that_lives_on", |case| {
            pulled(case, false)
        }),
        on(faulty(), "device_pulled_out_while_asleep_is_lost_at_its_next_on", |case| pulled(case, true)),
    ]
}

/// Waits until the VMM's log has all of `wanted`.
fn told(guest: &Guest<'_>, wanted: &[&str], timeout: Duration) -> Result<()> {
    wait_for(&format!("the VMM's log says {wanted:?}"), timeout, || {
        let log = guest.log()?;
        let missing: Vec<_> = wanted.iter().filter(|text| !log.contains(**text)).collect();
        Ok(if missing.is_empty() { Ok(()) } else { Err(format!("missing {missing:?}")) })
    })
}

/// The guest answers, its clock goes on, and the function reads all ones.
fn lives_with_all_ones(guest: &Guest<'_>) -> Result<()> {
    guest.sh("sleep 1")?;
    let id = guest.sh(&format!("guest_tool cam {FIRST} 0"))?;
    ensure(id == "0xffffffff", || format!("the lost function's identity reads {id}"))
}

/// A guest with the drive, which no driver uses and which has no power, and will get none.
fn without_power<'a>(host: &'a Host, spec: &VmSpec) -> Result<Guest<'a>> {
    let guest = host.start_vm(spec)?;
    unbind(&guest, FIRST)?;
    host.wait_power_state(&bdf(FRAGILE_NVME), "D3cold", IDLE)?;
    host.break_power(FRAGILE_NVME)?;
    Ok(guest)
}

/// Tries to wake the function from the guest; what the VMM is to say of it. The guest's method returns in any case.
fn fails_to_wake(guest: &Guest<'_>, wanted: &[&str]) -> Result<()> {
    let wake = guest.begin(&format!("echo on >{}", sysfs(FIRST, "power/control")))?;
    let said = told(guest, wanted, ON_TIMEOUT);
    guest.finish(&wake, IDLE)?;
    said
}

fn dead(case: &Case<'_>) -> Result<()> {
    let (host, device) = (case.host, bdf(FRAGILE_NVME));
    let spec = vm(case, &[FRAGILE_NVME]);
    let before = Baseline::of(host, spec.clone())?;
    let mut keep = VmSpec::new(case.guest).device_with(&device, ",on_lost=keep");
    keep.modules.clone_from(&spec.modules);
    let guest = without_power(host, &keep)?;
    let lost = fails_to_wake(
        &guest,
        &[
            "lost: the device does not answer after the end of low power; the guest reads all ones",
            "look in the host's kernel log",
            "latched: no device of its slot is cut from power any more",
        ],
    );
    let lived = lives_with_all_ones(&guest);
    host.mend_power(FRAGILE_NVME)?;
    lost.and(lived)?;
    guest.power_off()?;
    before.holds_again(host, &device)?;
    // The latch was that VM's.
    let guest = host.start_vm(&spec)?;
    drive_works(&guest)?;
    unbind(&guest, FIRST)?;
    host.wait_power_state(&device, "D3cold", IDLE)?;
    bind(&guest, FIRST)?;
    drive_works(&guest)?;
    guest.power_off()
}

fn late(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let spec = vm(case, &[FRAGILE_NVME]);
    let before = Baseline::of(host, spec.clone())?;
    let guest = without_power(host, &spec)?;
    let lost = fails_to_wake(
        &guest,
        &["resetting it once", "the guest is told that the device is lost, and gets it when"],
    );
    let lived = lives_with_all_ones(&guest);
    host.mend_power(FRAGILE_NVME)?;
    lost.and(lived)?;
    told(&guest, &["back after a reset", "back after all, too late"], RESET)?;
    // The guest's kernel has given the function up: found anew, it works, and keeps its power.
    guest.sh(&format!("echo 1 >{} && echo 1 >/sys/bus/pci/rescan", sysfs(FIRST, "remove")))?;
    drive_works(&guest)?;
    unbind(&guest, FIRST)?;
    told(&guest, &["a device of its slot did not come back before; clear the latch"], IDLE)?;
    host.stays_in(&bdf(FRAGILE_NVME), "D0", Duration::from_secs(1))?;
    guest.power_off()?;
    before.holds_again(host, &bdf(FRAGILE_NVME))
}

fn drive_works(guest: &Guest<'_>) -> Result<()> {
    wait_for_drive(guest)?;
    guest.sh("dd if=/dev/nvme0n1 of=/dev/null bs=1M count=4").map(drop)
}

fn button(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let spec = vm(case, &[PLUGGED_IGB]);
    let before = Baseline::of(host, spec.clone())?;
    let guest = host.start_vm(&spec)?;
    host.set_link(PLUGGED_IGB, true)?;
    pass_traffic(&guest, FIRST)?;
    nic_to_sleep(host, &guest, PLUGGED_IGB, FIRST)?;
    host.unplug(PLUGGED_IGB)?;
    // The host blinks for 5 s, in which the button can be pressed again.
    let asked = told(&guest, &["the host wants it back", "stop the VM to let it go"], IDLE);
    host.set_link(PLUGGED_IGB, true)?;
    let works = pass_traffic(&guest, FIRST);
    guest.power_off()?;
    back_in_its_slot(host)?;
    asked.and(works)?;
    before.holds_again(host, &bdf(PLUGGED_IGB))
}

fn pulled(case: &Case<'_>, asleep: bool) -> Result<()> {
    let host = case.host;
    let spec = vm(case, &[PLUGGED_IGB]);
    let before = Baseline::of(host, spec.clone())?;
    let guest = host.start_vm(&spec)?;
    host.set_link(PLUGGED_IGB, true)?;
    pass_traffic(&guest, FIRST)?;
    if asleep {
        nic_to_sleep(host, &guest, PLUGGED_IGB, FIRST)?;
    }
    host.pull(PLUGGED_IGB)?;
    let asked = told(&guest, &["the host wants it back"], IDLE);
    let lost = if asleep {
        let wake = guest.begin(&format!("echo on >{}", sysfs(FIRST, "power/control")))?;
        let lost = told(&guest, &["lost: the device does not answer after the end of low power"], WAKE);
        lost.and(guest.finish(&wake, Duration::from_secs(20)).map(drop))
    } else {
        told(&guest, &["lost: it has left the host while it was on; the guest reads all ones"], WAKE)
    };
    let lived = lives_with_all_ones(&guest);
    guest.power_off()?;
    back_in_its_slot(host)?;
    asked.and(lost).and(lived)?;
    before.holds_again(host, &bdf(PLUGGED_IGB))?;
    if asleep {
        return Ok(());
    }
    let guest = host.start_vm(&spec)?;
    host.set_link(PLUGGED_IGB, true)?;
    pass_traffic(&guest, FIRST)?;
    nic_to_sleep(host, &guest, PLUGGED_IGB, FIRST)?;
    guest.power_off()
}

/// The host has let the device go; it is put back and found.
fn back_in_its_slot(host: &Host) -> Result<()> {
    let directory = sysfs(&bdf(PLUGGED_IGB), "");
    wait_for("the device is let go", IDLE, || {
        let there = host.run(&format!("test -e {directory}"))?.status == 0;
        Ok(if there { Err("still there".to_owned()) } else { Ok(()) })
    })?;
    host.plug(PLUGGED_IGB)
}
