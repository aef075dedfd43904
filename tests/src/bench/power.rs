//! The latency of power: what the VMM adds to the bare VFIO calls, both on the same device of the same host.

use std::time::Duration;

use super::{Figure, median};
use crate::artifacts::Artifacts;
use crate::error::{Error, Result};
use crate::guest::{Guest, VmSpec, log_time};
use crate::host::{Host, sysfs};
use crate::scenarios::steps::{FIRST, bdf, pass_traffic, unbind};
use crate::spec::{Device, HostSpec, Kernel};

/// Slots of the host.
const NVME: usize = 0;
const IGB: usize = 1;
/// Power cycles of the drive.
const CYCLES: usize = 20;
/// Power cycles of the card, whose driver waits 5 s before each.
const NIC_CYCLES: usize = 11;
/// Rounds of the bare calls.
const BARE: usize = 40;

/// What one device takes, all in milliseconds.
struct Latency {
    bare_off: f64,
    bare_exit: f64,
    off: f64,
    on: f64,
    cycles: usize,
}

/// `_OFF` to D3cold and `_ON` to ready, with the bare figures beside them.
pub fn measure(artifacts: &Artifacts) -> Result<Vec<Figure>> {
    let kernels = [Kernel::Cloud6_12, Kernel::Generic6_12];
    // Two processors: the log is copied to a serial port meanwhile, which is no part of the figures.
    let spec = HostSpec::devices(&[Device::Nvme, Device::Igb]).cpus(2);
    let host = Host::boot(&spec, artifacts, &kernels)?;
    let [cloud, generic] = kernels;
    let nic = latency(&host, IGB, generic, cycle_nic)?;
    let drive = latency(&host, NVME, cloud, cycle_drive)?;

    let mut figures = Vec::new();
    let names = [
        (nic, ["igb: bare ioctl to D3cold", "igb: _OFF to D3cold", "igb: bare EXIT", "igb: _ON to ready"]),
        (
            drive,
            [
                "nvme, no driver: bare ioctl to D3cold",
                "nvme, no driver: port's _OFF to D3cold",
                "nvme, no driver: bare EXIT",
                "nvme, no driver: port's _ON to ready",
            ],
        ),
    ];
    for (Latency { bare_off, bare_exit, off, on, cycles }, [name_bare, name_off, name_exit, name_on]) in names
    {
        let figure = |name, value, target| Figure { name, value, unit: "ms", target, note: String::new() };
        figures.push(figure(name_bare, bare_off, None));
        figures.push(Figure {
            note: format!("{cycles} cycles, no hold-off"),
            ..figure(name_off, off, Some(bare_off * 1.2))
        });
        figures.push(figure(name_exit, bare_exit, None));
        figures.push(figure(name_on, on, Some(bare_exit + 5.0)));
    }
    Ok(figures)
}

/// Measures the device in `slot`: bare, and then with a guest that `cycle` makes cut its power.
fn latency(
    host: &Host,
    slot: usize,
    kernel: Kernel,
    cycle: fn(&Host, &Guest<'_>) -> Result<()>,
) -> Result<Latency> {
    let device = bdf(slot);
    let bare = host.run_for(&format!("vfio_probe {device} {BARE}"), Duration::from_secs(120))?.text;
    let (entry, off, exit) = (bare_ms(&bare, "entry")?, bare_ms(&bare, "off")?, bare_ms(&bare, "exit")?);

    let mut vm = VmSpec::new(kernel).cpus(2).device_with(&device, ",hold_off=0");
    vm.modules.extend(host.spec.device_at(&device).map(|device| device.modules()).unwrap_or_default());
    let guest = host.start_vm(&vm)?;
    cycle(host, &guest)?;
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
    Ok(Latency {
        bare_off: off,
        bare_exit: exit,
        off: median(&mut to_entered) + off - entry,
        on: median(&mut to_ready),
        cycles: to_entered.len(),
    })
}

/// The card's driver cuts the power of its function.
fn cycle_nic(host: &Host, guest: &Guest<'_>) -> Result<()> {
    host.set_link(IGB, true)?;
    pass_traffic(guest, FIRST)?;
    host.set_link(IGB, false)?;
    let control = sysfs(FIRST, "power/control");
    for _ in 0..NIC_CYCLES {
        guest.sh(&format!("echo auto >{control}; sleep 6; echo on >{control}; usleep 100000"))?;
    }
    Ok(())
}

/// Without a driver the root port cuts the power of what is below it.
fn cycle_drive(_: &Host, guest: &Guest<'_>) -> Result<()> {
    if guest.run(&format!("test -e {}", sysfs(FIRST, "driver")))?.status == 0 {
        unbind(guest, FIRST)?;
    }
    let control = sysfs(FIRST, "power/control");
    for _ in 0..CYCLES {
        guest.sh(&format!("echo auto >{control}; usleep 300000; echo on >{control}; usleep 100000"))?;
    }
    Ok(())
}

/// The median of one of the figures of `vfio_probe`, which come in microseconds.
fn bare_ms(text: &str, name: &str) -> Result<f64> {
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.split_whitespace().nth(1)?.parse::<f64>().ok())
        .map(|us| us / 1000.0)
        .ok_or_else(|| Error::Check(format!("vfio_probe gives no {name}: {text}")))
}
