//! Waking a guest's sleeping network cards from the host's side, many times, and how long each wake took by the trace of the host's
//! kernel.
//!
//! A wake begins when VFIO signals the VMM while the kernel resumes the device. The VMM's own share is from there, its thread running,
//! until it raises the guest's event interrupt; until the interrupt is there takes longer by what the host's kernel needs to let the
//! thread run and to deliver. The wake ends when the guest's driver first touches the card, which is in its resume callback: `_ON` and the guest's
//! PCI core do not touch its BARs.

use std::thread;
use std::time::Duration;

use crate::error::{Error, Result, ensure};
use crate::guest::{Guest, VmSpec};
use crate::host::{Host, sysfs};
use crate::rpc::wait_for;
use crate::scenarios::steps::{bdf, nic_to_sleep, pass_traffic};
use crate::spec::{Device, HostSpec, Kernel, address};
use crate::trace;

/// Cards: each sleeps 5 s after a wake, so four at a time save much waiting.
const NICS: [Device; 4] = [Device::E1000e, Device::Igb, Device::E1000e, Device::Igb];
/// The longest from a wake to D3cold again: 5 s are the driver's own delay.
const ROUND_LIMIT: Duration = Duration::from_secs(20);
/// How often a driver may have to be reminded that it is idle.
const NUDGES: usize = 5;
/// Between two wakes, so that one is over when the next begins.
const GAP: Duration = Duration::from_millis(500);
/// The guest's interrupt for events (docs/power.md).
const EVENT_GSI: u32 = 5;
/// The host for it.
pub fn host() -> HostSpec {
    HostSpec::devices(&NICS)
}

/// A VM with all the cards.
pub fn vm(host: &Host, kernel: Kernel) -> VmSpec {
    let vm = VmSpec::new(kernel).cpus(2).memory("1G");
    (0..NICS.len()).fold(vm, |vm, slot| vm.device(host, &bdf(slot)))
}

/// What the wakes took, in milliseconds.
#[derive(Debug, Default)]
pub struct Latencies {
    /// From the first moment that the VMM's thread runs to its raising of the interrupt: the VMM's own share.
    pub share: Vec<f64>,
    /// From the host's signal to the guest's interrupt.
    pub interrupt: Vec<f64>,
    /// From the host's signal to the driver's resume callback.
    pub resume: Vec<f64>,
}

/// Wakes each of the cards `rounds` times and lets it sleep again each time. With `quiet` the log's copy to a serial port waits
/// meanwhile.
pub fn rounds(host: &Host, guest: &Guest<'_>, rounds: usize, quiet: bool) -> Result<Latencies> {
    let slots: Vec<usize> = (0..NICS.len()).collect();
    for slot in &slots {
        host.set_link(*slot, true)?;
        pass_traffic(guest, &address(*slot, 0))?;
        nic_to_sleep(host, guest, *slot, &address(*slot, 0))?;
    }
    let bars = slots.iter().map(|slot| first_bar(guest, &address(*slot, 0))).collect::<Result<Vec<_>>>()?;
    let mut latencies = Latencies::default();
    let mut nudges = 0;
    for round in 0..rounds {
        let since = host.timeline.now();
        if quiet {
            host.sh("killall -STOP tee")?;
        }
        trace_on(host, &bars)?;
        for slot in &slots {
            host.poke(&bdf(*slot))?;
            thread::sleep(GAP);
        }
        latencies.add(&trace::stop(host)?, &bars);
        if quiet {
            host.sh("killall -CONT tee")?;
        }
        // A guest that is not woken does not let go of the device again: it would stay on. No commands meanwhile, they
        // would keep the host busy.
        thread::sleep(Duration::from_secs(5));
        for slot in &slots {
            if let Err(error) = on_and_off_again(host, round, *slot, since) {
                nudges += 1;
                ensure(nudges <= NUDGES, || format!("after {NUDGES} nudges: {error}"))?;
                let control = sysfs(&address(*slot, 0), "power/control");
                guest.sh(&format!("echo on >{control}; echo auto >{control}"))?;
                on_and_off_again(host, round, *slot, since)?;
            }
        }
    }
    Ok(latencies)
}

fn on_and_off_again(host: &Host, round: usize, slot: usize, since: Duration) -> Result<()> {
    wait_for(&format!("round {round}: slot {slot} has been on and is off again"), ROUND_LIMIT, || {
        let counts = [true, false].map(|on| host.power_count(slot, on, since));
        let done = counts[0] > 0 && counts[0] == counts[1];
        Ok(if done { Ok(()) } else { Err(format!("on {}, off {}", counts[0], counts[1])) })
    })
}

/// First address of a function's BAR 0 in the guest, in hexadecimal, and its last.
fn first_bar(guest: &Guest<'_>, function: &str) -> Result<(u64, u64)> {
    let text = guest.sh(&format!("head -n 1 {}", sysfs(function, "resource")))?;
    let numbers: Vec<u64> = text
        .split_whitespace()
        .filter_map(|word| u64::from_str_radix(word.trim_start_matches("0x"), 16).ok())
        .collect();
    match numbers.as_slice() {
        [first, last, ..] if first < last => Ok((*first, *last)),
        _ => Err(Error::Check(format!("{function} has no BAR 0: {text}"))),
    }
}

fn trace_on(host: &Host, bars: &[(u64, u64)]) -> Result<()> {
    let places: Vec<String> =
        bars.iter().map(|(first, last)| format!("(gpa >= {first:#x} && gpa <= {last:#x})")).collect();
    trace::start(
        host,
        &[
            ("sched/sched_waking", "comm ~ \"pm-*\""),
            ("sched/sched_switch", "next_comm ~ \"pm-*\""),
            ("workqueue/workqueue_queue_work", "COMM ~ \"pm-*\""),
            ("kvm/kvm_set_irq", &format!("gsi == {EVENT_GSI}")),
            ("kvm/kvm_mmio", &places.join(" || ")),
        ],
    )
}

impl Latencies {
    /// Books what the trace tells of wakes of the functions that have these BARs, in slot order.
    fn add(&mut self, trace: &str, bars: &[(u64, u64)]) {
        let mut signals = vec![None; bars.len()];
        let (mut last, mut worker, mut runs) = (None, None, None);
        for line in trace.lines() {
            let Some(at) = trace::time(line) else { continue };
            let since = |signal: f64| (at - signal) * 1000.0;
            if let Some(slot) = signalled(line).filter(|slot| *slot < bars.len()) {
                signals[slot] = Some(at);
                last = Some(at);
                worker = Some(format!("pm-{:02x}:00", slot + 1));
            } else if let Some(name) =
                worker.as_deref().filter(|name| line.contains(&format!("next_comm={name}")))
            {
                runs = Some((at, name.to_owned()));
                worker = None;
            } else if line.contains("workqueue_queue_work:") && line.contains("irqfd_inject") {
                let own = runs.take_if(|(_, name)| line.trim_start().starts_with(name.as_str()));
                self.share.extend(own.map(|(from, _)| since(from)));
            } else if line.contains("kvm_set_irq:") && line.contains("level 1") {
                self.interrupt.extend(last.take().map(since));
            } else if let Some(slot) = touched(line, bars) {
                self.resume.extend(signals[slot].take().map(since));
            }
        }
    }
}

/// The slot whose worker is woken by the program with which the host reads the device: VFIO has signalled its wake.
fn signalled(line: &str) -> Option<usize> {
    let worker = line.trim_start().strip_prefix("head-")?.split_once("sched_waking: comm=pm-")?.1;
    usize::from_str_radix(worker.split(':').next()?, 16).ok()?.checked_sub(1)
}

/// The slot whose BAR the guest touches.
fn touched(line: &str, bars: &[(u64, u64)]) -> Option<usize> {
    let address = line.split_once("kvm_mmio:")?.1.split_once(" gpa 0x")?.1.split_whitespace().next()?;
    let address = u64::from_str_radix(address, 16).ok()?;
    bars.iter().position(|(first, last)| (*first..=*last).contains(&address))
}

/// A value that `percent` of all do not exceed. Of an empty list, the largest there can be.
pub fn percentile(values: &[f64], percent: usize) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = (sorted.len() * percent).div_ceil(100).max(1) - 1;
    sorted.get(at).copied().unwrap_or(f64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_tells_both_times_of_each_wake_and_a_worker_woken_otherwise_is_none() {
        let trace = "\
            head-604     [000] d..5.    60.164000: sched_waking: comm=pm-01:00 pid=170 prio=120 target_cpu=000\n\
            head-604     [000] d..2.    60.164500: sched_switch: prev_comm=head prev_pid=604 prev_prio=120 prev_state=R ==> next_comm=pm-01:00 next_pid=170 next_prio=120\n\
        pm-01:00-170     [000] d..4.    60.165500: workqueue_queue_work: work struct=00000000ee function=irqfd_inject workqueue=kvm-irqfd-cleanup req_cpu=8192 cpu=0\n\
     kworker/0:1-11      [000] .....    60.166000: kvm_set_irq: gsi 5 level 1 source 0\n\
     kworker/0:1-11      [000] .....    60.166100: kvm_set_irq: gsi 5 level 0 source 0\n\
           vcpu1-174     [000] d..5.    60.212000: sched_waking: comm=pm-02:00 pid=171 prio=120 target_cpu=000\n\
           vcpu1-174     [000] .....    60.299000: kvm_mmio: mmio unsatisfied-read len 4 gpa 0xc0040f00 val 0x0\n\
           vcpu1-174     [000] .....    60.301000: kvm_mmio: mmio read len 4 gpa 0xc0040f00 val 0x8\n";
        let mut latencies = Latencies::default();
        latencies.add(trace, &[(0xc004_0000, 0xc005_ffff), (0xc010_0000, 0xc011_ffff)]);
        let rounded = |values: &[f64]| values.iter().map(|value| value.round()).collect::<Vec<_>>();
        assert_eq!(rounded(&latencies.share), [1.0]);
        assert_eq!(rounded(&latencies.interrupt), [2.0]);
        assert_eq!(rounded(&latencies.resume), [135.0]);
    }

    #[test]
    fn percentiles_are_of_the_sorted_values() {
        let values: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!([50, 99, 100].map(|percent| percentile(&values, percent)), [50.0, 99.0, 100.0]);
        assert_eq!(percentile(&[], 50), f64::MAX);
    }
}
