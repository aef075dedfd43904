//! Accesses of a guest to its disks: 4 KiB anywhere at depths of 1 and 32, and a mebibyte at a time in a row. Images are in the host's memory, so
//! that the way there and back is what counts.
//!
//! Once on a host whose time is counted instructions (10^9 of them are a second), once on the ordinary emulated host.

use std::time::Duration;

use super::stopwatch::{Stopwatch, join, networked};
use super::{Figure, least, on_hosts};
use crate::artifacts::Artifacts;
use crate::error::Result;
use crate::guest::VmSpec;
use crate::host::Host;
use crate::spec::{HostSpec, Kernel};

const SPAN: u32 = 64 << 20;

/// Times that each load is measured.
const ROUNDS: usize = 5;

/// So many times as many accesses make a round where time counts: it takes some seconds then, as one of instructions does.
const MORE: u32 = 8;

/// The longest that a round may take: some 5 s on an idle machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// One kind of access.
struct Load {
    instructions: &'static str,
    time: &'static str,
    direction: &'static str,
    bytes: u32,
    depth: u32,
    count: u32,
    order: &'static str,
}

const fn load(
    names: [&'static str; 2],
    direction: &'static str,
    bytes: u32,
    depth: u32,
    count: u32,
    order: &'static str,
) -> Load {
    Load { instructions: names[0], time: names[1], direction, bytes, depth, count, order }
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
        ["disk: read in a row, instructions for a MiB", "disk: read in a row"],
        "read",
        1 << 20,
        1,
        32,
        "row",
    ),
    load(
        ["disk: write in a row, instructions for a MiB", "disk: write in a row"],
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
        on_hosts(deterministic, || on_one_host(artifacts, deterministic, &mut rounds))?;
        for (load, rounds) in LOADS.iter().zip(&rounds) {
            let count = f64::from(count(load, deterministic));
            figures.push(match (deterministic, load.order) {
                (true, _) => least(load.instructions, rounds, &|took| took * 1e6 / count, "k"),
                (false, "row") => least(load.time, rounds, &|took| count / took, "MiB/s"),
                (false, _) => least(load.time, rounds, &|took| count / took, "/s"),
            });
        }
    }
    Ok(figures)
}

/// Goes on with what is missing of `rounds`, until all is there or the host is lost.
fn on_one_host(artifacts: &Artifacts, deterministic: bool, rounds: &mut [Vec<f64>]) -> Result<()> {
    let kernel = Kernel::Generic6_12;
    let spec = HostSpec { deterministic, ..HostSpec::new(&[]).memory_mib(2048) };
    let host = Host::boot(&spec, artifacts, &[kernel])?;
    let watch = Stopwatch::new(&host, PATIENCE)?;
    // With something in it: what is a hole need not be read.
    host.sh(&format!("dd if=/dev/zero of=/run/bench.img bs=1M count={} 2>/dev/null", SPAN >> 20))?;
    let vm = VmSpec::new(kernel).memory("768M").options("--disk path=/run/bench.img,image_type=raw");
    let mut vm = networked(&host, vm)?;
    vm.modules.push("virtio_blk");
    for (load, rounds) in LOADS.iter().zip(rounds) {
        if rounds.len() == ROUNDS {
            continue;
        }
        // A new guest for each, with none of the threads that the VMM has made for the last one.
        let guest = host.start_vm(&vm)?;
        join(&guest)?;
        let Load { direction, bytes, depth, order, .. } = load;
        let count = count(load, deterministic);
        let line = format!("guest_tool disk /dev/vda {direction} {bytes} {depth} {count} {order} {SPAN}");
        while rounds.len() < ROUNDS {
            rounds.push(watch.guest(&guest, &line)?);
        }
        guest.power_off()?;
    }
    Ok(())
}

/// Accesses of a round.
fn count(load: &Load, deterministic: bool) -> u32 {
    if deterministic { load.count } else { load.count * MORE }
}
