//! Accesses of a guest to its disks: 4 KiB anywhere at depths of 1 and 32, and a mebibyte at a time in a row. Images are in the host's memory, so
//! that the way there and back is what counts.
//!
//! Once on a host whose time is counted instructions (10^9 of them are a second), once on the ordinary emulated host.

use std::time::Duration;

use super::Figure;
use crate::artifacts::Artifacts;
use crate::error::{Error, Result};
use crate::guest::{Guest, VmSpec};
use crate::host::Host;
use crate::spec::{HostSpec, Kernel};

const SPAN: u32 = 64 << 20;

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
        2000,
        "random",
    ),
    load(
        ["disk: 4K random write, depth 1, instructions", "disk: 4K random write, depth 1"],
        "write",
        4096,
        1,
        2000,
        "random",
    ),
    load(
        ["disk: 4K random read, depth 32, instructions", "disk: 4K random read, depth 32"],
        "read",
        4096,
        32,
        6400,
        "random",
    ),
    load(
        ["disk: 4K random write, depth 32, instructions", "disk: 4K random write, depth 32"],
        "write",
        4096,
        32,
        6400,
        "random",
    ),
    load(
        ["disk: read in a row, instructions for a MiB", "disk: read in a row, for a MiB"],
        "read",
        1 << 20,
        1,
        64,
        "row",
    ),
    load(
        ["disk: write in a row, instructions for a MiB", "disk: write in a row, for a MiB"],
        "write",
        1 << 20,
        1,
        64,
        "row",
    ),
];

/// All of them, on both hosts.
pub fn measure(artifacts: &Artifacts) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    for deterministic in [true, false] {
        let mut spec = HostSpec::new(&[]).memory_mib(1536);
        spec.cpus = 1;
        spec.deterministic = deterministic;
        let host = Host::boot(&spec, artifacts, &[Kernel::Cloud6_12])?;
        // With something in it: what is a hole need not be read.
        host.sh(&format!("dd if=/dev/zero of=/run/bench.img bs=1M count={} 2>/dev/null", SPAN >> 20))?;
        let mut vm = VmSpec::new(Kernel::Cloud6_12).options("--disk path=/run/bench.img,image_type=raw");
        vm.modules = vec!["virtio_pci", "virtio_blk"];
        let guest = host.start_vm(&vm)?;
        for load in &LOADS {
            figures.push(one(&guest, load, deterministic)?);
        }
        guest.power_off()?;
    }
    Ok(figures)
}

fn one(guest: &Guest<'_>, load: &Load, deterministic: bool) -> Result<Figure> {
    let Load { direction, bytes, threads, count, order, .. } = load;
    let command = format!("guest_tool disk /dev/vda {direction} {bytes} {threads} {count} {order} {SPAN}");
    let text = guest.sh_for(&command, Duration::from_secs(180))?;
    let nanos: f64 = text.trim().parse().map_err(|_| Error::Check(format!("{command}: {text}")))?;
    let each = nanos / f64::from(*count) / 1000.0;
    let per_second = 1e6 / each;
    let note = if *order == "row" {
        format!("{per_second:.0} MiB/s")
    } else {
        format!("{per_second:.0} accesses a second")
    };
    let (name, unit) = if deterministic { (load.instructions, "k") } else { (load.time, "us") };
    Ok(Figure { name, value: each, unit, target: None, note })
}
