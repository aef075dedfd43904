//! A thousand power cycles, each checked by the guest, and what the VMM has grown by afterwards.

use std::thread;
use std::time::Duration;

use super::recovery::Footprint;
use super::steps::{
    FIRST, IDLE, SECOND, bdf, guest_is_content, no_driver, unbound_to_sleep, unbound_wake, vendor,
};
use super::{GPU, NVME, scenario};
use crate::error::{Result, ensure};
use crate::guest::VmSpec;
use crate::runner::{Case, Scenario};

/// Cycles of each of the two devices.
const CYCLES: usize = 500;
/// Milliseconds that each cycle leaves the function off, for the host to suspend it in.
const DWELL: u32 = 60;
/// Cycles before the first look, for what is made once.
const WARM_UP: usize = 20;

pub fn table() -> Vec<Scenario> {
    vec![scenario("thousand_power_cycles_from_two_vcpus_leak_nothing", thousand)]
}

fn thousand(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    // No drivers and a short hold-off, so that every cycle really cuts power; two vCPUs, one device each.
    let vm = VmSpec::new(case.guest)
        .cpus(2)
        .memory("1G")
        .device_with(&bdf(GPU), ",hold_off=1")
        .device_with(&bdf(NVME), ",hold_off=1");
    let guest = host.start_vm(&vm)?;
    let ids = [vendor(&guest, FIRST)?, vendor(&guest, SECOND)?];
    no_driver(&guest, FIRST)?;
    no_driver(&guest, SECOND)?;
    cycle(&guest, WARM_UP)?;
    thread::sleep(Duration::from_secs(1));
    let before = Footprint::of(host)?;
    let since = host.timeline.now();
    for _ in 0..CYCLES / 50 {
        cycle(&guest, 50)?;
    }
    thread::sleep(Duration::from_secs(1));
    let grown = before.is_kept(host);
    for slot in [GPU, NVME] {
        let (cuts, returns) = (host.power_count(slot, false, since), host.power_count(slot, true, since));
        ensure(cuts == returns, || format!("slot {slot}: power cut {cuts} times, given {returns} times"))?;
        // A cycle whose resume overtakes the host's asynchronous suspend is right, and cuts no power.
        ensure(cuts * 2 >= CYCLES, || format!("slot {slot}: power was cut {cuts} times of {CYCLES}"))?;
    }
    grown?;
    for (function, id) in [FIRST, SECOND].into_iter().zip(ids) {
        let now = vendor(&guest, function)?;
        ensure(now == id, || format!("{function} answers {now} instead of {id}"))?;
    }
    for (slot, function) in [(GPU, FIRST), (NVME, SECOND)] {
        unbound_to_sleep(host, &guest, slot, function)?;
        host.wait_power_state(&bdf(slot), "D3cold", IDLE)?;
        unbound_wake(&guest, function)?;
    }
    guest_is_content(&guest)?;
    guest.power_off()
}

/// `count` cycles of both devices at once.
fn cycle(guest: &crate::guest::Guest<'_>, count: usize) -> Result<()> {
    let one =
        |cpu: usize, function: &str| format!("taskset -c {cpu} guest_tool cycle {function} {count} {DWELL}");
    let script = format!("{} & one=$!; {} && wait $one", one(0, FIRST), one(1, SECOND));
    guest.sh_for(&script, Duration::from_secs(180)).map(drop)
}
