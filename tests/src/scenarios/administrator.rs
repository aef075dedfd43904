//! What the host's administrator, or a program of theirs, does to a device while a guest has it asleep: forbids its sleep, forbids D3cold,
//! reads it all the time, uses what shares its power, makes virtual functions of it, takes it away. Rows 13, 20 and 22 of the failure
//! modes in docs/power.md.

use std::time::Duration;

use super::recovery::{Baseline, Footprint};
use super::steps::{
    FIRST, IDLE, VFIO, WAKE, bdf, bind, guest_is_content, nic_asleep, no_driver, pass_traffic, unbind,
    unbound_to_sleep, unbound_wake, vendor, vm, wait_for_drive,
};
use super::{IGB, NVME, on, scenario};
use crate::error::{Result, ensure};
use crate::guest::{Guest, VmSpec};
use crate::host::{Host, sysfs};
use crate::rpc::wait_for;
use crate::runner::{Case, Scenario};
use crate::spec::{Device, HostSpec, Kernel, Slot, address};

/// How long something on the host reads the device all the time.
const STORM: Duration = Duration::from_secs(10);
/// After a storm the VMM waits this long at most before it lets the device sleep again (docs/power.md), and some more.
const CALM: Duration = Duration::from_secs(20);

pub fn table() -> Vec<Scenario> {
    let pair = HostSpec::new(&[Slot::with(&[Device::Gpu, Device::E1000e])]);
    vec![
        scenario("sleep_forbidden_by_the_host_and_allowed_again_costs_the_guest_nothing", forbidden),
        scenario("d3cold_forbidden_by_the_host_leaves_d3hot_and_comes_back", shallow),
        scenario("storm_of_reads_by_the_host_ends_with_the_device_asleep", storm),
        on(pair, "partner_that_the_host_keeps_awake_keeps_the_power_on_and_the_guest_unharmed", partner),
        scenario(
            "virtual_functions_made_while_the_device_sleeps_keep_it_awake_until_they_go",
            virtual_functions,
        ),
        scenario("device_that_the_host_removes_is_let_go_when_the_vm_ends", removed),
    ]
}

/// A guest with the drive, which no driver uses and which has no power; what its VMM was like then.
fn asleep<'a>(case: &Case<'a>) -> Result<(Guest<'a>, Footprint)> {
    let guest = case.host.start_vm(&vm(case, &[NVME]))?;
    unbind(&guest, FIRST)?;
    case.host.wait_power_state(&bdf(NVME), "D3cold", IDLE)?;
    let footprint = Footprint::of(case.host)?;
    Ok((guest, footprint))
}

/// The VMM of a drive that sleeps again has not grown, the guest's driver finds its drive, and the guest's kernel nothing to complain about.
fn works(host: &Host, (guest, footprint): (Guest<'_>, Footprint)) -> Result<()> {
    footprint.is_kept(host)?;
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
    let (host, vm) = (case.host, asleep(case)?);
    set(host, "power/control", "on")?;
    host.wait_power_state(&bdf(NVME), "D0", WAKE)?;
    host.stays_in(&bdf(NVME), "D0", Duration::from_secs(2))?;
    set(host, "power/control", "auto")?;
    host.wait_power_state(&bdf(NVME), "D3cold", CALM)?;
    works(host, vm)
}

fn shallow(case: &Case<'_>) -> Result<()> {
    let (host, vm) = (case.host, asleep(case)?);
    // The kernel wakes the device to apply it, and lets it sleep as far as it is allowed.
    set(host, "d3cold_allowed", "0")?;
    let result = host.wait_power_state(&bdf(NVME), "D3hot", CALM);
    set(host, "d3cold_allowed", "1")?;
    result?;
    host.wait_power_state(&bdf(NVME), "D3cold", CALM)?;
    works(host, vm)
}

fn storm(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let before = Baseline::of(host, vm(case, &[NVME]))?;
    let (guest, footprint) = asleep(case)?;
    let config = sysfs(&bdf(NVME), "config");
    host.run_for(
        &format!("end=$(($(date +%s) + {})); while [ $(date +%s) -lt $end ]; do head -c 4 {config} >/dev/null; done", STORM.as_secs()),
        STORM * 3,
    )?;
    guest.sh("true")?;
    host.wait_power_state(&bdf(NVME), "D3cold", CALM)?;
    works(host, (guest, footprint))?;
    before.holds_again(host, &bdf(NVME))
}

/// The first function of a slot is the guest's, the second is kept awake by the host. (With a driver of the host's own it would keep the
/// whole group from the guest; `pci-stub`, which would not, is not in this host's kernel.)
fn partner(case: &Case<'_>) -> Result<()> {
    let (host, first, other) = (case.host, address(0, 0), address(0, 1));
    let before = Baseline::of(host, vm(case, &[0]))?;
    let control = sysfs(&other, "power/control");
    host.sh(&format!("echo on >{control}"))?;
    let held = beside_one_that_is_awake(host, case.guest);
    host.sh(&format!("echo auto >{control}"))?;
    held?;
    before.holds_again(host, &first)
}

fn beside_one_that_is_awake(host: &Host, kernel: Kernel) -> Result<()> {
    let (first, other) = (address(0, 0), address(0, 1));
    let guest = host.start_vm(&VmSpec::new(kernel).device_with(&first, ""))?;
    let warned = guest.log()?.lines().any(|line| line.contains("WARN") && line.contains(&other));
    ensure(warned, || format!("the log does not say that {other} will keep the power on"))?;
    no_driver(&guest, FIRST)?;
    let id = vendor(&guest, FIRST)?;
    let since = host.timeline.now();
    guest.sh(&format!("echo auto >{}", sysfs(FIRST, "power/control")))?;
    wait_for("the VMM lets the host suspend it", IDLE, || {
        let log = guest.log()?;
        Ok(if log.contains("entered low power") { Ok(()) } else { Err(log) })
    })?;
    let footprint = Footprint::of(host)?;
    std::thread::sleep(Duration::from_secs(2));
    let cuts = host.power_count(0, false, since);
    ensure(cuts == 0, || format!("the firmware has cut the power of {other}, which is in use"))?;
    unbound_wake(&guest, FIRST)?;
    let back = vendor(&guest, FIRST)?;
    ensure(back == id, || format!("{FIRST} answers {back} instead of {id}"))?;
    // Allowed to sleep, the slot loses its power with the guest's next sleep.
    host.sh(&format!("echo auto >{}", sysfs(&other, "power/control")))?;
    unbound_to_sleep(host, &guest, 0, FIRST)?;
    nic_asleep(host, 0, since)?;
    footprint.is_kept(host)?;
    unbound_wake(&guest, FIRST)?;
    guest_is_content(&guest)?;
    guest.power_off()
}

fn virtual_functions(case: &Case<'_>) -> Result<()> {
    let (host, device) = (case.host, bdf(IGB));
    let guest = host.start_vm(&vm(case, &[IGB]))?;
    unbind(&guest, FIRST)?;
    host.wait_power_state(&device, "D3cold", IDLE)?;
    let footprint = Footprint::of(host)?;
    let count = sysfs(&device, "sriov_numvfs");
    host.sh(&format!("echo Y >/sys/module/vfio_pci/parameters/enable_sriov && echo 2 >{count}"))?;
    // They have no power of their own to lose: it stays on with them.
    let awake =
        host.wait_power_state(&device, "D0", WAKE).and_then(|()| host.stays_in(&device, "D0", CALM / 4));
    let lives = guest.sh("sleep 1");
    let report = host.run(&format!("dormouse doctor {device}"));
    host.sh(&format!("echo 0 >{count} && echo N >/sys/module/vfio_pci/parameters/enable_sriov"))?;
    awake?;
    lives?;
    let report = report?;
    ensure(report.status == 3 && report.text.contains("virtual-functions"), || {
        format!("the doctor does not name them: {}", report.text)
    })?;
    host.wait_power_state(&device, "D3cold", CALM)?;
    footprint.is_kept(host)?;
    bind(&guest, FIRST)?;
    host.set_link(IGB, true)?;
    pass_traffic(&guest, FIRST)?;
    guest_is_content(&guest)?;
    guest.power_off()
}

fn removed(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let (guest, _) = asleep(case)?;
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
    let again = asleep(case)?;
    works(host, again)
}
