//! Guests that touch a function's BARs when they must not: they read all ones, live on, and wake nothing.

use std::time::Duration;

use super::recovery::{Baseline, Footprint};
use super::steps::{FIRST, IDLE, SECOND, WAKE, bdf, nic_to_sleep, no_driver, pass_traffic, unbind, vm};
use super::{E1000E, GPU, NVME, scenario};
use crate::error::{Result, ensure};
use crate::guest::Guest;
use crate::host::sysfs;
use crate::runner::{Case, Scenario};

/// `COMMAND.MEM`, in the 16-bit command register at offset 4.
const MEMORY_DECODE: u16 = 2;
/// The third assigned function, as the guest sees it.
const THIRD: &str = "0000:03:00.0";
/// Vendor and device of an 82574L, as one double word.
const E1000E_ID: &str = "0x10d38086";

pub fn table() -> Vec<Scenario> {
    vec![
        scenario("bars_of_an_nvme_in_d3hot_read_all_ones", |case| in_d3hot(case, NVME)),
        scenario("bars_of_a_gpu_in_d3hot_read_all_ones", |case| in_d3hot(case, GPU)),
        scenario("bars_without_memory_decode_read_all_ones", without_decode),
        scenario("bars_in_d3cold_read_all_ones_and_wake_nothing", in_d3cold),
        scenario("config_space_in_d3cold_answers_and_wakes_nothing", config_in_d3cold),
        scenario("guest_that_does_its_worst_from_two_vcpus_harms_nobody", abuse),
        scenario("memory_decode_switched_while_another_vcpu_reads_harms_nothing", decode_race),
    ]
}

fn in_d3hot(case: &Case<'_>, slot: usize) -> Result<()> {
    let guest = case.host.start_vm(&free_to_touch(case, slot))?;
    let before = prepare(&guest)?;
    guest.sh(&format!("guest_tool pmcsr {FIRST} 3"))?;
    all_ones(&guest)?;
    let state = guest.sh(&format!("guest_tool pmcsr {FIRST}"))?;
    ensure(state == "3", || format!("the function went to D{state} by itself"))?;
    guest.sh(&format!("guest_tool pmcsr {FIRST} 0; usleep 20000"))?;
    working_again(&guest, &before)
}

fn without_decode(case: &Case<'_>) -> Result<()> {
    let guest = case.host.start_vm(&free_to_touch(case, NVME))?;
    let before = prepare(&guest)?;
    let command = guest.sh(&format!("guest_tool config {FIRST} 4"))?;
    let value = u16::from_str_radix(command.trim_start_matches("0x"), 16).unwrap_or(0x406);
    guest.sh(&format!("guest_tool config {FIRST} 4 {}", value & !MEMORY_DECODE))?;
    all_ones(&guest)?;
    guest.sh(&format!("guest_tool config {FIRST} 4 {value}"))?;
    working_again(&guest, &before)
}

fn in_d3cold(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let guest = host.start_vm(&vm(case, &[E1000E]).cmdline("iomem=relaxed"))?;
    host.set_link(E1000E, true)?;
    pass_traffic(&guest, FIRST)?;
    nic_to_sleep(host, &guest, E1000E, FIRST)?;
    let since = host.timeline.now();
    all_ones(&guest)?;
    all_ones(&guest)?;
    host.stays_in(&bdf(E1000E), "D3cold", Duration::from_secs(1))?;
    ensure(host.power_count(E1000E, true, since) == 0, || "the guest's accesses woke the device".to_owned())?;
    host.set_link(E1000E, true)?;
    pass_traffic(&guest, FIRST)?;
    guest.power_off()
}

fn config_in_d3cold(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let guest = host.start_vm(&vm(case, &[E1000E]))?;
    host.set_link(E1000E, true)?;
    pass_traffic(&guest, FIRST)?;
    nic_to_sleep(host, &guest, E1000E, FIRST)?;
    let since = host.timeline.now();
    let id = guest.sh(&format!("guest_tool cam {FIRST} 0"))?;
    ensure(id == E1000E_ID, || format!("its identity reads {id} instead of {E1000E_ID}"))?;
    guest.sh(&format!("for offset in 4 8 16 52 64 200; do guest_tool cam {FIRST} $offset; done"))?;
    host.stays_in(&bdf(E1000E), "D3cold", Duration::from_secs(1))?;
    ensure(host.power_count(E1000E, true, since) == 0, || "a config read woke the device".to_owned())?;
    host.set_link(E1000E, true)?;
    pass_traffic(&guest, FIRST)?;
    guest.power_off()
}

fn decode_race(case: &Case<'_>) -> Result<()> {
    let guest = case.host.start_vm(&free_to_touch(case, NVME).cpus(2))?;
    let before = prepare(&guest)?;
    let script = format!(
        "taskset -c 1 sh -c 'for i in $(seq 60); do guest_tool bars {FIRST} >/dev/null; done' & \
         for i in $(seq 60); do guest_tool config {FIRST} 4 0x404; guest_tool config {FIRST} 4 0x406; done; wait"
    );
    guest.sh_for(&script, Duration::from_secs(120))?;
    working_again(&guest, &before)
}

/// On a host with one processor, as all scenarios: what two do to the emulator (docs/testing.md) happens within seconds when memory
/// slots come and go as quickly as here. The guest's two are switched in the middle of everything all the same.
fn abuse(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let seconds = u64::from(case.minutes) * 60;
    let spec = vm(case, &[GPU, E1000E, NVME]).cpus(2).memory("1G").cmdline("iomem=relaxed");
    let before = Baseline::of(host, spec.clone())?;
    let guest = host.start_vm(&spec)?;
    let footprint = Footprint::of(host)?;
    let functions = [FIRST, SECOND, THIRD];
    for function in functions {
        no_driver(&guest, function)?;
        guest.sh(&format!("echo 1 >{}", sysfs(function, "enable")))?;
    }
    // One of them is put to sleep by the guest's kernel as well.
    guest.sh(&format!("echo auto >{}", sysfs(THIRD, "power/control")))?;
    let vmm = host.sh("pidof dormouse")?;
    let one = |cpu: usize, seed: u64| {
        format!("taskset -c {cpu} guest_tool abuse {seconds} {seed} {}", functions.join(" "))
    };
    // What its kernel has to say of this guest's deeds does not matter; that it and the VMM live on does.
    guest.sh_for(
        &format!("dmesg -n 1; {} & one=$!; {} && wait $one", one(0, 2021), one(1, 71077345)),
        Duration::from_secs(seconds + 120),
    )?;
    ensure(host.sh("pidof dormouse")? == vmm, || "the VMM has not survived".to_owned())?;
    let mark = guest.mark();
    guest.begin("reboot -f")?;
    guest.wait_ready(mark)?;
    footprint.is_kept(host)?;
    guest.sh("timeout 20 guest_tool drm")?;
    host.set_link(E1000E, true)?;
    pass_traffic(&guest, SECOND)?;
    guest.sh("dd if=/dev/nvme0n1 of=/dev/null bs=1M count=4")?;
    for (slot, function) in [(GPU, FIRST), (NVME, THIRD)] {
        unbind(&guest, function)?;
        host.wait_power_state(&bdf(slot), "D3cold", IDLE)?;
    }
    guest.power_off()?;
    before.holds_again(host, &bdf(NVME))
}

/// A VM whose function has no driver and may be mapped by anybody.
fn free_to_touch(case: &Case<'_>, slot: usize) -> crate::guest::VmSpec {
    vm(case, &[slot]).cmdline("iomem=relaxed")
}

/// Takes the driver off, keeps the function awake and decoding; what its BARs read.
fn prepare(guest: &Guest<'_>) -> Result<String> {
    unbind(guest, FIRST)?;
    guest.sh(&format!("echo on >{}", sysfs(FIRST, "power/control")))?;
    guest.wait_file(&sysfs(FIRST, "power_state"), "D0", WAKE)?;
    guest.sh(&format!("echo 1 >{}", sysfs(FIRST, "enable")))?;
    let before = guest.sh(&format!("guest_tool bars {FIRST}"))?;
    ensure(before.lines().any(|line| !line.ends_with("0xffffffff")), || {
        format!("dead to begin with: {before}")
    })?;
    Ok(before)
}

fn all_ones(guest: &Guest<'_>) -> Result<()> {
    let text = guest.sh(&format!("guest_tool hammer {FIRST}"))?;
    ensure(text.lines().all(|line| line.ends_with("ones")), || format!("some reads gave values: {text}"))
}

fn working_again(guest: &Guest<'_>, before: &str) -> Result<()> {
    let after = guest.sh(&format!("guest_tool bars {FIRST}"))?;
    ensure(after == before, || format!("the BARs read {before} before, and {after} after"))?;
    guest.power_off()
}
