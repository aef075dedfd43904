//! What the host's administrator, or a program of theirs, does to a device while a guest has it asleep: forbids its sleep, forbids D3cold,
//! reads it all the time, takes it away. Rows 13, 20 and 22 of the failure modes in docs/power.md.

use std::time::Duration;

use super::steps::{FIRST, IDLE, VFIO, WAKE, bdf, bind, guest_is_content, unbind, vm, wait_for_drive};
use super::{NVME, scenario};
use crate::error::{Result, ensure};
use crate::guest::Guest;
use crate::host::{Host, sysfs};
use crate::rpc::wait_for;
use crate::runner::{Case, Scenario};

/// How long something on the host reads the device all the time.
const STORM: Duration = Duration::from_secs(10);
/// After a storm the VMM waits this long at most before it lets the device sleep again (docs/power.md), and some more.
const CALM: Duration = Duration::from_secs(20);

pub fn table() -> Vec<Scenario> {
    vec![
        scenario("sleep_forbidden_by_the_host_and_allowed_again_costs_the_guest_nothing", forbidden),
        scenario("d3cold_forbidden_by_the_host_leaves_d3hot_and_comes_back", shallow),
        scenario("storm_of_reads_by_the_host_ends_with_the_device_asleep", storm),
        scenario("device_that_the_host_removes_is_let_go_when_the_vm_ends", removed),
    ]
}

/// A guest with the drive, which no driver uses and which has no power.
fn asleep<'a>(case: &Case<'a>) -> Result<Guest<'a>> {
    let guest = case.host.start_vm(&vm(case, &[NVME]))?;
    unbind(&guest, FIRST)?;
    case.host.wait_power_state(&bdf(NVME), "D3cold", IDLE)?;
    Ok(guest)
}

/// The guest's driver finds its drive, and the guest's kernel nothing to complain about.
fn works(guest: Guest<'_>) -> Result<()> {
    bind(&guest, FIRST)?;
    wait_for_drive(&guest)?;
    guest.sh("dd if=/dev/nvme0n1 of=/dev/null bs=1M count=4")?;
    guest_is_content(&guest)?;
    guest.power_off()
}

fn set(host: &Host, file: &str, value: &str) -> Result<()> {
    host.sh(&format!("echo {value} >{}", sysfs(&bdf(NVME), file))).map(drop)
}

fn forbidden(case: &Case<'_>) -> Result<()> {
    let (host, guest) = (case.host, asleep(case)?);
    set(host, "power/control", "on")?;
    host.wait_power_state(&bdf(NVME), "D0", WAKE)?;
    host.stays_in(&bdf(NVME), "D0", Duration::from_secs(2))?;
    set(host, "power/control", "auto")?;
    host.wait_power_state(&bdf(NVME), "D3cold", CALM)?;
    works(guest)
}

fn shallow(case: &Case<'_>) -> Result<()> {
    let (host, guest) = (case.host, asleep(case)?);
    // The kernel wakes the device to apply it, and lets it sleep as far as it is allowed.
    set(host, "d3cold_allowed", "0")?;
    let result = host.wait_power_state(&bdf(NVME), "D3hot", CALM);
    set(host, "d3cold_allowed", "1")?;
    result?;
    host.wait_power_state(&bdf(NVME), "D3cold", CALM)?;
    works(guest)
}

fn storm(case: &Case<'_>) -> Result<()> {
    let (host, guest) = (case.host, asleep(case)?);
    let config = sysfs(&bdf(NVME), "config");
    host.run_for(
        &format!("end=$(($(date +%s) + {})); while [ $(date +%s) -lt $end ]; do head -c 4 {config} >/dev/null; done", STORM.as_secs()),
        STORM * 3,
    )?;
    guest.sh("true")?;
    host.wait_power_state(&bdf(NVME), "D3cold", CALM)?;
    works(guest)
}

fn removed(case: &Case<'_>) -> Result<()> {
    let (host, guest) = (case.host, asleep(case)?);
    let device = sysfs(&bdf(NVME), "");
    host.sh(&format!("(echo 1 >{} &) </dev/null >/dev/null 2>&1", sysfs(&bdf(NVME), "remove")))?;
    let told = wait_for("the VMM tells of it", WAKE, || {
        let log = guest.log()?;
        Ok(if log.contains("the host wants it back") { Ok(()) } else { Err(log) })
    });
    guest.sh("true")?;
    guest.power_off()?;
    let gone = wait_for("the device is let go", IDLE, || {
        Ok(if host.run(&format!("test -e {device}"))?.status == 0 {
            Err("still there".to_owned())
        } else {
            Ok(())
        })
    });
    host.sh(&format!(
        "echo 1 >/sys/bus/pci/rescan; cd {device} && echo {VFIO} >driver_override && echo {0} >/sys/bus/pci/drivers_probe; test -e driver",
        bdf(NVME)
    ))?;
    told.and(gone)?;
    let id = host.poke(&bdf(NVME))?;
    ensure(id.starts_with("361b"), || format!("the drive answers {id}"))?;
    works(case.host.start_vm(&vm(case, &[NVME]))?)
}
