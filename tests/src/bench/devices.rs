//! What each of the machine's own devices costs: private memory of the VMM beside guest RAM, with the guest's driver at work on it.
//!
//! A guest with several of a kind is compared with one that has none, and the difference is divided.

use super::{Figure, private_memory};
use crate::artifacts::Artifacts;
use crate::error::Result;
use crate::guest::VmSpec;
use crate::host::Host;
use crate::spec::{HostSpec, Kernel};

/// How many of a kind that a machine can have several of.
const SEVERAL: u32 = 4;

/// One kind of device.
struct Kind {
    name: &'static str,
    /// The option, with `{n}` in the place of a number; empty for none at all.
    option: &'static str,
    count: u32,
}

const fn kind(name: &'static str, option: &'static str, count: u32) -> Kind {
    Kind { name, option, count }
}

const KINDS: [Kind; 6] = [
    kind("memory of a disk", "--disk path=/run/bench.{n},image_type=raw", SEVERAL),
    kind("memory of a network device", "--net tap=bench{n}", SEVERAL),
    kind("memory of the console", "--console file=/run/bench.console", 1),
    kind("memory of the socket device", "--vsock cid=9,socket=/run/bench.vsock", 1),
    kind("memory of the balloon", "--balloon size=0", 1),
    kind("memory of persistent memory", "--pmem file=/run/bench.pmem{n}", SEVERAL),
];

/// KiB for each kind.
pub fn measure(artifacts: &Artifacts) -> Result<Vec<Figure>> {
    // All drivers there are.
    let guest = Kernel::Generic6_12;
    let host = Host::boot(&HostSpec::new(&[]), artifacts, &[guest])?;
    host.sh("modprobe tun; for n in 0 1 2 3; do truncate -s 16M /run/bench.$n /run/bench.pmem$n; done")?;
    let bare = memory(&host, guest, "")?;
    KINDS
        .iter()
        .map(|kind| {
            let options: String =
                (0..kind.count).map(|n| format!(" {}", kind.option.replace("{n}", &n.to_string()))).collect();
            let value = (memory(&host, guest, &options)? - bare) / f64::from(kind.count);
            let note = if kind.count > 1 { format!("each of {}", kind.count) } else { String::new() };
            Ok(Figure { name: kind.name, value, unit: "KiB", target: None, note })
        })
        .collect()
}

fn memory(host: &Host, guest: Kernel, options: &str) -> Result<f64> {
    let mut vm = VmSpec::new(guest).memory("256M").options(options);
    vm.modules = vec![
        "virtio_pci",
        "virtio_blk",
        "virtio_net",
        "virtio_rng",
        "virtio_console",
        "virtio_balloon",
        "vmw_vsock_virtio_transport",
        "virtio_pmem",
        "nd_pmem",
    ];
    let guest = host.start_vm(&vm)?;
    let kib = private_memory(host)?;
    guest.power_off()?;
    Ok(kib)
}
