//! The latency of power: what the VMM adds to the bare VFIO calls, both on the same host.

use std::time::Duration;

use super::{Figure, median};
use crate::artifacts::Artifacts;
use crate::error::{Error, Result};
use crate::guest::{VmSpec, log_time};
use crate::host::{Host, sysfs};
use crate::scenarios::steps::{FIRST, bdf, unbind};
use crate::spec::{Device, HostSpec, Kernel};

/// Power cycles of each kind.
const CYCLES: usize = 20;

/// `_OFF` to D3cold and `_ON` to ready, with the bare figures beside them.
pub fn measure(artifacts: &Artifacts) -> Result<Vec<Figure>> {
    let guest_kernel = Kernel::Cloud6_12;
    // Two processors: the log is copied to a serial port meanwhile, which is no part of the figures.
    let host = Host::boot(&HostSpec::devices(&[Device::Nvme]).cpus(2), artifacts, &[guest_kernel])?;
    let device = bdf(0);
    let bare = host.sh(&format!("vfio_probe {device} {}", 2 * CYCLES))?;
    let (entry, off, exit) = (bare_ms(&bare, "entry")?, bare_ms(&bare, "off")?, bare_ms(&bare, "exit")?);

    let vm = VmSpec::new(guest_kernel).cpus(2).device_with(&device, ",hold_off=0");
    let guest = host.start_vm(&vm)?;
    if guest.run(&format!("test -e {}", sysfs(FIRST, "driver")))?.status == 0 {
        unbind(&guest, FIRST)?;
    }
    let control = sysfs(FIRST, "power/control");
    for _ in 0..CYCLES {
        guest.sh(&format!("echo auto >{control}; usleep 300000; echo on >{control}; usleep 100000"))?;
    }
    std::thread::sleep(Duration::from_secs(1));
    let log = guest.log()?;
    guest.power_off()?;
    // The VMM's own log says when the guest asked and when the call had returned. What the host's kernel does after
    // that, it does alone: the same as after the bare call.
    let mut to_entered = Vec::new();
    let mut asked = None;
    let mut to_ready = Vec::new();
    for line in log.lines().filter(|line| line.contains(&device)) {
        let at = log_time(line);
        if line.contains("_OFF from the guest") {
            asked = asked.or(at);
        } else if line.contains("entered low power")
            && let (Some(asked), Some(at)) = (asked.take(), at)
        {
            to_entered.push((at - asked).as_secs_f64() * 1000.0);
        } else if let Some((_, after)) = line.split_once("ready after ") {
            to_ready.extend(after.split_whitespace().next().and_then(|ms| ms.parse::<f64>().ok()));
        }
    }
    if to_entered.is_empty() || to_ready.is_empty() {
        return Err(Error::Check(format!("the VMM's log tells no power cycles: {log}")));
    }
    let (cycles, wakes) = (to_entered.len(), to_ready.len());
    let ours = median(&mut to_entered) + off - entry;
    let figure = |name, value, target, note| Figure { name, value, unit: "ms", target, note };
    Ok(vec![
        figure("bare ioctl to D3cold", off, None, String::new()),
        figure("_OFF to D3cold", ours, Some(off * 1.2), format!("{cycles} cycles, no hold-off")),
        figure("bare EXIT", exit, None, String::new()),
        figure("_ON to ready", median(&mut to_ready), Some(exit + 5.0), format!("{wakes} wakes")),
    ])
}

/// The median of one of the figures of `vfio_probe`, which come in microseconds.
fn bare_ms(text: &str, name: &str) -> Result<f64> {
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.split_whitespace().nth(1)?.parse::<f64>().ok())
        .map(|us| us / 1000.0)
        .ok_or_else(|| Error::Check(format!("vfio_probe gives no {name}: {text}")))
}
