//! Accesses of a guest to its disks: 4 KiB anywhere at depths of 1 and 32, and a mebibyte at a time in a row. Images are in the host's memory, so
//! that the way there and back is what counts.
//!
//! Once on a host whose time is counted instructions (10^9 of them are a second), once on the ordinary emulated host.

use std::time::Duration;

use super::{Figure, go_on_with_other_hosts, median};
use crate::artifacts::Artifacts;
use crate::error::{Error, Result};
use crate::guest::{Guest, VmSpec};
use crate::host::Host;
use crate::spec::{HostSpec, Kernel};

const SPAN: u32 = 64 << 20;

/// Times that each load is measured.
const ROUNDS: usize = 5;

/// So many times as many accesses make a round where time counts: it takes some seconds then, as one of instructions does.
const MORE: u32 = 4;

/// The longest that a round may take: some 5 s on an idle machine.
const ROUND: Duration = Duration::from_secs(30);

/// One kind of access.
struct Load {
    instructions: &'static str,
    time: &'static str,
    direction: &'static str,
    bytes: u32,
    threads: u32,
    count: u32,
    order: &'static str,
}

const fn load(
    names: [&'static str; 2],
    direction: &'static str,
    bytes: u32,
    threads: u32,
    count: u32,
    order: &'static str,
) -> Load {
    Load { instructions: names[0], time: names[1], direction, bytes, threads, count, order }
}

const LOADS: [Load; 6] = [
    load(
        ["disk: 4K random read, depth 1, instructions", "disk: 4K random read, depth 1"],
        "read",
        4096,
        1,
        500,
        "random",
    ),
    load(
        ["disk: 4K random write, depth 1, instructions", "disk: 4K random write, depth 1"],
        "write",
        4096,
        1,
        500,
        "random",
    ),
    load(
        ["disk: 4K random read, depth 32, instructions", "disk: 4K random read, depth 32"],
        "read",
        4096,
        32,
        3200,
        "random",
    ),
    load(
        ["disk: 4K random write, depth 32, instructions", "disk: 4K random write, depth 32"],
        "write",
        4096,
        32,
        3200,
        "random",
    ),
    load(
        ["disk: read in a row, instructions for a MiB", "disk: read in a row, for a MiB"],
        "read",
        1 << 20,
        1,
        32,
        "row",
    ),
    load(
        ["disk: write in a row, instructions for a MiB", "disk: write in a row, for a MiB"],
        "write",
        1 << 20,
        1,
        32,
        "row",
    ),
];

/// All of them, on both kinds of host.
pub fn measure(artifacts: &Artifacts) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    for deterministic in [true, false] {
        let mut rounds: [Vec<f64>; LOADS.len()] = Default::default();
        go_on_with_other_hosts(|| on_one_host(artifacts, deterministic, &mut rounds))?;
        figures
            .extend(LOADS.iter().zip(&mut rounds).map(|(load, rounds)| figure(load, rounds, deterministic)));
    }
    Ok(figures)
}

/// Goes on with what is missing of `rounds`, until all is there or the host is lost.
fn on_one_host(artifacts: &Artifacts, deterministic: bool, rounds: &mut [Vec<f64>]) -> Result<()> {
    let mut spec = HostSpec::new(&[]).memory_mib(1536);
    spec.cpus = 1;
    spec.deterministic = deterministic;
    let host = Host::boot(&spec, artifacts, &[Kernel::Cloud6_12])?;
    // With something in it: what is a hole need not be read.
    host.sh(&format!("dd if=/dev/zero of=/run/bench.img bs=1M count={} 2>/dev/null", SPAN >> 20))?;
    let mut vm = VmSpec::new(Kernel::Cloud6_12).options("--disk path=/run/bench.img,image_type=raw");
    vm.modules = vec!["virtio_pci", "virtio_blk"];
    for (load, rounds) in LOADS.iter().zip(rounds) {
        if rounds.len() == ROUNDS {
            continue;
        }
        // A new guest for each: what the last load has left (threads that serve its depth, say) changes the next one by half.
        let guest = host.start_vm(&vm)?;
        while rounds.len() < ROUNDS {
            rounds.push(one(&guest, load, if deterministic { 1 } else { MORE })?);
        }
        guest.power_off()?;
    }
    Ok(())
}

/// Microseconds that an access took.
fn one(guest: &Guest<'_>, load: &Load, times: u32) -> Result<f64> {
    let Load { direction, bytes, threads, order, .. } = load;
    let count = load.count * times;
    let command = format!("guest_tool disk /dev/vda {direction} {bytes} {threads} {count} {order} {SPAN}");
    let text = guest.sh_for(&command, ROUND)?;
    let nanos: f64 = text.trim().parse().map_err(|_| Error::Check(format!("{command}: {text}")))?;
    Ok(nanos / f64::from(count) / 1000.0)
}

/// The round that took least: what else the host has to do comes on top of it, now more and now less.
fn figure(load: &Load, rounds: &mut [f64], deterministic: bool) -> Figure {
    let middle = median(rounds);
    let (least, most) =
        (rounds.first().copied().unwrap_or_default(), rounds.last().copied().unwrap_or_default());
    let what = if load.order == "row" { "MiB/s" } else { "accesses a second" };
    let note = format!("{:.0} {what}; middle {middle:.1}, most {most:.1}", 1e6 / least);
    let (name, unit) = if deterministic { (load.instructions, "k") } else { (load.time, "us") };
    Figure { name, value: least, unit, target: None, note }
}
