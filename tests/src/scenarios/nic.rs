//! Assigned network cards: idle without a cable they lose their power, and come back when used or when woken.

use std::collections::BTreeMap;
use std::time::Duration;

use super::recovery::{Baseline, Footprint};
use super::steps::{FIRST, WAKE, bdf, guest_is_content, nic_asleep, nic_to_sleep, pass_traffic, vm};
use super::{E1000E, IGB, SLOW_IGB, faulty, on, scenario, with_old_kernels};
use crate::error::{Result, ensure};
use crate::guest::{VmSpec, log_time};
use crate::host::sysfs;
use crate::rpc::wait_for;
use crate::runner::{Case, Scenario};
use crate::spec::Device;
use crate::timeline::Lane;
use crate::wakes;

/// Wakes of each of four NICs.
const ROUNDS: usize = 25;
/// The longest from the host's wake to the guest's PME.
const PME_LIMIT: Duration = Duration::from_millis(100);
/// The VMM's own share of a wake, in milliseconds: the median, and the 99th percentile, which is that of the emulator.
const SHARE_MEDIAN: f64 = 1.0;
const SHARE_MOST: f64 = 100.0;

pub fn table() -> Vec<Scenario> {
    let mut all = Vec::new();
    all.extend(with_old_kernels(scenario("idle_e1000e_loses_power_and_passes_traffic_after", |case| {
        idle(case, E1000E)
    })));
    all.extend(with_old_kernels(scenario("idle_igb_loses_power_and_passes_traffic_after", |case| {
        idle(case, IGB)
    })));
    all.extend(with_old_kernels(scenario("host_access_wakes_the_sleeping_guest_driver", host_access)));
    all.push(on(wakes::host(), "host_wakes_the_guest_a_hundred_times", hundred_wakes));
    all.push(on(faulty(), "slow_power_supply_blocks_no_vcpu", slow_on));
    all.push(scenario("wake_policy_ignore_leaves_the_guest_asleep", ignored_wake));
    all
}

fn idle(case: &Case<'_>, slot: usize) -> Result<()> {
    let (host, guest) = (case.host, case.host.start_vm(&vm(case, &[slot]))?);
    host.set_link(slot, true)?;
    pass_traffic(&guest, FIRST)?;
    nic_to_sleep(host, &guest, slot, FIRST)?;
    host.stays_in(&bdf(slot), "D3cold", Duration::from_secs(2))?;
    host.set_link(slot, true)?;
    pass_traffic(&guest, FIRST)?;
    let state = host.power_state(&bdf(slot))?;
    ensure(state == "D0", || format!("host: in {state} while it passes traffic"))?;
    guest_is_content(&guest)?;
    guest.power_off()
}

fn host_access(case: &Case<'_>) -> Result<()> {
    let (host, guest) = (case.host, case.host.start_vm(&vm(case, &[E1000E]))?);
    host.set_link(E1000E, true)?;
    pass_traffic(&guest, FIRST)?;
    nic_to_sleep(host, &guest, E1000E, FIRST)?;
    let before = active_time(&guest, FIRST)?;
    let since = host.timeline.now();
    host.poke(&bdf(E1000E))?;
    wait_for("the guest's driver wakes", WAKE, || {
        let now = active_time(&guest, FIRST)?;
        Ok(if now > before { Ok(()) } else { Err(now.to_string()) })
    })?;
    nic_asleep(host, E1000E, since)?;
    host.set_link(E1000E, true)?;
    pass_traffic(&guest, FIRST)?;
    guest_is_content(&guest)?;
    guest.power_off()
}

fn hundred_wakes(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let guest = host.start_vm(&wakes::vm(host, case.guest))?;
    let latencies = wakes::rounds(host, &guest, ROUNDS, false)?;
    let log = guest.log()?;
    let slots = 0..host.spec.slots.len();
    for slot in slots.clone() {
        let bdf = bdf(slot);
        let answers =
            log.lines().filter(|line| line.contains(&bdf) && line.contains("_ON from the guest")).count();
        ensure(answers >= ROUNDS, || format!("slot {slot}: the driver woke {answers} times of {ROUNDS}"))?;
        host.wait_power_state(&bdf, "D3cold", WAKE)?;
    }
    let wakes = ROUNDS * slots.len();
    let delays = wake_delays(&log);
    ensure(delays.len() >= wakes, || format!("the log tells {} wakes", delays.len()))?;
    let late = delays.iter().filter(|delay| **delay > PME_LIMIT).count();
    ensure(late == 0, || format!("{late} of {} PMEs came late: {delays:?}", delays.len()))?;
    let [median, most] = [50, 99].map(|percent| wakes::percentile(&latencies.share, percent));
    host.timeline
        .record(Lane::Vmm, format!("[share of a wake: median {median:.3} ms, 99th percentile {most:.3} ms]"));
    ensure(latencies.share.len() * 100 >= wakes * 95, || {
        format!("the trace tells {} wakes", latencies.share.len())
    })?;
    ensure(median < SHARE_MEDIAN && most < SHARE_MOST, || {
        format!("the VMM's share of a wake: median {median:.3} ms, 99th percentile {most:.3} ms")
    })?;
    guest_is_content(&guest)?;
    guest.power_off()
}

/// From each host wake in the VMM's log to the PME that tells the guest.
fn wake_delays(log: &str) -> Vec<Duration> {
    let mut woken = BTreeMap::new();
    let mut delays = Vec::new();
    for line in log.lines() {
        let Some((_, message)) = line.split_once(" power ") else { continue };
        let Some((function, what)) = message.split_once(": ") else { continue };
        let Some(at) = log_time(line) else { continue };
        if what.starts_with("woken by the host") {
            woken.insert(function.to_owned(), at);
        } else if what.starts_with("PME raised")
            && let Some(since) = woken.remove(function)
        {
            delays.push(at.saturating_sub(since));
        }
    }
    delays
}

fn slow_on(case: &Case<'_>) -> Result<()> {
    let (host, spec) = (case.host, vm(case, &[SLOW_IGB]).cpus(2));
    let before = Baseline::of(host, spec.clone())?;
    let guest = host.start_vm(&spec)?;
    host.set_link(SLOW_IGB, true)?;
    pass_traffic(&guest, FIRST)?;
    let footprint = Footprint::of(host)?;
    nic_to_sleep(host, &guest, SLOW_IGB, FIRST)?;
    host.set_link(SLOW_IGB, true)?;
    // While the host's firmware takes its 5 s, both processors go on counting.
    let script = format!(
        "echo on >{} & for cpu in 0 1; do taskset -c $cpu sh -c \
         'e=$(($(date +%s)+4)); n=0; while [ $(date +%s) -lt $e ]; do n=$((n+1)); done; echo $n' & done; wait",
        sysfs(FIRST, "power/control")
    );
    let text = guest.sh_for(&script, Duration::from_secs(60))?;
    let counts: Vec<u32> = text.lines().filter_map(|line| line.trim().parse().ok()).collect();
    ensure(counts.len() == 2 && counts.iter().all(|count| *count > 3), || {
        format!("the vCPUs counted: {text}")
    })?;
    pass_traffic(&guest, FIRST)?;
    footprint.is_kept(host)?;
    guest_is_content(&guest)?;
    guest.power_off()?;
    before.holds_again(host, &bdf(SLOW_IGB))
}

fn ignored_wake(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let mut vm = VmSpec::new(case.guest).device_with(&bdf(IGB), ",wake=ignore");
    vm.modules.extend(Device::Igb.modules());
    let guest = host.start_vm(&vm)?;
    host.set_link(IGB, true)?;
    pass_traffic(&guest, FIRST)?;
    nic_to_sleep(host, &guest, IGB, FIRST)?;
    let before = active_time(&guest, FIRST)?;
    let since = host.timeline.now();
    host.poke(&bdf(IGB))?;
    nic_asleep(host, IGB, since)?;
    let after = active_time(&guest, FIRST)?;
    ensure(after == before, || "the guest's driver was woken all the same".to_owned())?;
    guest.power_off()
}

/// Milliseconds that the guest's kernel has had the function awake: grows at each wake, and only then.
fn active_time(guest: &crate::guest::Guest<'_>, function: &str) -> Result<u64> {
    let text = guest.probe(&format!("cat {}", sysfs(function, "power/runtime_active_time")))?.text;
    Ok(text.trim().parse().unwrap_or_default())
}
