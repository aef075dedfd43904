//! Which functions share power: those of one slot do, those of two slots do not.

use std::time::Duration;

use super::steps::{
    FIRST, IDLE, SECOND, WAKE, bdf, guest_is_content, no_driver, unbind, unbound_to_sleep, unbound_wake, vm,
};
use super::{GPU, NVME, on, scenario};
use crate::error::{Result, ensure};
use crate::runner::{Case, Scenario};
use crate::spec::{Device, HostSpec, Slot, address};

pub fn table() -> Vec<Scenario> {
    let shared = HostSpec::new(&[Slot::with(&[Device::Gpu, Device::E1000e])]);
    vec![
        scenario("two_slots_keep_separate_power", separate),
        on(shared, "two_functions_of_a_slot_share_its_power", shared_slot),
    ]
}

fn separate(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let guest = host.start_vm(&vm(case, &[GPU, NVME]).memory("1G"))?;
    unbind(&guest, FIRST)?;
    host.wait_power_state(&bdf(GPU), "D3cold", IDLE)?;
    ensure(host.power_state(&bdf(NVME))? == "D0", || "the other slot lost its power too".to_owned())?;
    unbind(&guest, SECOND)?;
    host.wait_power_state(&bdf(NVME), "D3cold", IDLE)?;
    let since = host.timeline.now();
    unbound_wake(&guest, FIRST)?;
    host.wait_power_state(&bdf(GPU), "D0", WAKE)?;
    host.stays_in(&bdf(NVME), "D3cold", Duration::from_secs(1))?;
    ensure(host.power_count(NVME, true, since) == 0, || "the other slot came on too".to_owned())?;
    guest_is_content(&guest)?;
    guest.power_off()
}

fn shared_slot(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let (first, second) = (address(0, 0), address(0, 1));
    let mut vm = crate::guest::VmSpec::new(case.guest).device_with(&first, "").device_with(&second, "");
    vm.memory = "1G".to_owned();
    let guest = host.start_vm(&vm)?;
    // No drivers: each function sleeps by its power/control alone.
    let (one, two) = (FIRST, "0000:01:00.1");
    no_driver(&guest, one)?;
    no_driver(&guest, two)?;
    unbound_to_sleep_partly(host, &guest, one, case.began)?;
    unbound_to_sleep(host, &guest, 0, two)?;
    host.wait_power_state(&first, "D3cold", IDLE)?;
    let events = host.power_count(0, false, case.began);
    ensure(events > 0, || "the firmware cut no power with both functions asleep".to_owned())?;
    unbound_wake(&guest, two)?;
    host.wait_power_state(&second, "D0", WAKE)?;
    unbound_wake(&guest, one)?;
    host.wait_power_state(&first, "D0", WAKE)?;
    for (function, id) in [(one, "0x1af4"), (two, "0x8086")] {
        guest.sh(&format!("test $(guest_tool config {function} 0) = {id}"))?;
    }
    guest_is_content(&guest)?;
    guest.power_off()
}

/// With one function asleep and the other in use, the slot must keep its power.
fn unbound_to_sleep_partly(
    host: &crate::host::Host,
    guest: &crate::guest::Guest<'_>,
    one: &str,
    began: Duration,
) -> Result<()> {
    let settled = host.timeline.now().max(began);
    guest.sh(&format!("echo auto >/sys/bus/pci/devices/{one}/power/control"))?;
    std::thread::sleep(Duration::from_secs(2));
    let cuts = host.power_count(0, false, settled);
    ensure(cuts == 0, || "the slot lost its power while its second function was in use".to_owned())
}
