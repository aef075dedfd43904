//! The latency of power: what the VMM adds to the bare VFIO calls, both on the same device of the same host.

use std::time::Duration;

use super::{Figure, median};
use crate::artifacts::Artifacts;
use crate::error::{Error, Result};
use crate::guest::{Guest, VmSpec};
use crate::host::{Host, sysfs};
use crate::scenarios::steps::{FIRST, bdf, pass_traffic, unbind};
use crate::spec::{Device, HostSpec, Kernel};
use crate::trace;

/// Slots of the host.
const NVME: usize = 0;
const IGB: usize = 1;
/// Power cycles of the drive.
const CYCLES: usize = 20;
/// Power cycles of the card, whose driver waits 5 s before each.
const NIC_CYCLES: usize = 11;
/// Rounds of the bare calls.
const BARE: usize = 40;

/// `VFIO_DEVICE_FEATURE`.
const FEATURE_IOCTL: &str = "0x3b75";
/// Where a guest finds the power notification device (docs/power.md).
const NOTIFICATION: &str = "0xfed10000";
const NOTIFICATION_END: &str = "0xfed11000";

/// What one device takes, all in milliseconds.
struct Latency {
    bare_off: f64,
    bare_exit: f64,
    off: f64,
    share: f64,
    on: f64,
    cycles: usize,
}

/// `_OFF` to D3cold and `_ON` to ready, with the bare figures beside them.
pub fn measure(artifacts: &Artifacts) -> Result<Vec<Figure>> {
    let kernels = [Kernel::Cloud6_12, Kernel::Generic6_12];
    // One processor, as nearly everywhere in the test bed: with two the emulator's own threads get into each other's way.
    let spec = HostSpec::devices(&[Device::Nvme, Device::Igb]);
    let host = Host::boot(&spec, artifacts, &kernels)?;
    let [cloud, generic] = kernels;
    let nic = latency(&host, IGB, generic, cycle_nic).map_err(|error| host.explain(error))?;
    let drive = latency(&host, NVME, cloud, cycle_drive).map_err(|error| host.explain(error))?;

    let mut figures = Vec::new();
    let names = [
        (
            nic,
            [
                "igb: bare ioctl to D3cold",
                "igb: _OFF to D3cold",
                "igb: _OFF to the ioctl",
                "igb: bare EXIT",
                "igb: _ON to ready",
            ],
        ),
        (
            drive,
            [
                "nvme, no driver: bare ioctl to D3cold",
                "nvme, no driver: port's _OFF to D3cold",
                "nvme, no driver: port's _OFF to the ioctl",
                "nvme, no driver: bare EXIT",
                "nvme, no driver: port's _ON to ready",
            ],
        ),
    ];
    for (latency, [name_bare, name_off, name_share, name_exit, name_on]) in names {
        let Latency { bare_off, bare_exit, off, share, on, cycles } = latency;
        let figure = |name, value, target| Figure { name, value, unit: "ms", target, note: String::new() };
        figures.push(figure(name_bare, bare_off, None));
        figures.push(Figure {
            note: format!("{cycles} cycles, no hold-off"),
            ..figure(name_off, off, Some(bare_off * 1.2))
        });
        figures.push(figure(name_share, share, None));
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
    trace_on(host)?;
    let bare = host.run_for(&format!("vfio_probe {device} {BARE}"), Duration::from_secs(120))?.text;
    let mut bare_off = spans(&trace::stop(host)?, CALL, suspended(&device));
    let bare_exit = bare_ms(&bare, "exit")?;

    let mut vm = VmSpec::new(kernel).device_with(&device, ",hold_off=0");
    vm.modules.extend(host.spec.device_at(&device).map(|device| device.modules()).unwrap_or_default());
    let guest = host.start_vm(&vm)?;
    // The log's copy to a serial port is no part of the figures: it stays in the pipe meanwhile.
    host.sh("killall -STOP tee")?;
    trace_on(host)?;
    cycle(host, &guest)?;
    std::thread::sleep(Duration::from_secs(1));
    let trace = trace::stop(host)?;
    host.sh("killall -CONT tee; sleep 1")?;
    let mut off = spans(&trace, STORE, suspended(&device));
    let mut share = spans(&trace, STORE, |line| line.contains(CALL));
    let log = guest.log()?;
    guest.power_off()?;
    let mut on: Vec<f64> = log
        .lines()
        .filter(|line| line.contains(&device))
        .filter_map(|line| line.split_once("ready after ")?.1.split_whitespace().next()?.parse().ok())
        .collect();
    if bare_off.is_empty() || off.is_empty() || on.is_empty() {
        return Err(Error::Check(format!("no power cycles were seen; the VMM's log: {log}")));
    }
    let cycles = off.len();
    Ok(Latency {
        bare_off: median(&mut bare_off),
        bare_exit,
        off: median(&mut off),
        share: median(&mut share),
        on: median(&mut on),
        cycles,
    })
}

/// Lets the host's kernel note the three moments that count: a bare call, the guest's store to the power notification device, and
/// the end of the device's suspend.
fn trace_on(host: &Host) -> Result<()> {
    trace::start(
        host,
        &[
            ("syscalls/sys_enter_ioctl", &format!("cmd == {FEATURE_IOCTL}")),
            ("kvm/kvm_mmio", &format!("gpa >= {NOTIFICATION} && gpa < {NOTIFICATION_END}")),
            ("rpm/rpm_return_int", "0"),
        ],
    )
}

/// A bare call, and a guest's store to the power notification device, as the trace shows them.
const CALL: &str = "sys_ioctl(";
const STORE: &str = "kvm_mmio: mmio write";

/// The end of the suspend of `device`, as the trace shows it.
fn suspended(device: &str) -> impl Fn(&str) -> bool {
    move |line| line.contains("rpm_suspend+") && line.contains(device) && line.ends_with("ret=0")
}

/// Times from each request, a line with `request` in it, to the next line that is its `end`, in milliseconds.
fn spans(trace: &str, request: &str, end: impl Fn(&str) -> bool) -> Vec<f64> {
    let mut asked = None;
    let mut times = Vec::new();
    for line in trace.lines() {
        let at = trace::time(line);
        if line.contains(request) {
            // Low power's end is the same call as its begin: the last one before the suspend is what led to it. Of stores the
            // first one after `_ON` (1) counts, which is the function's; its port's may follow.
            let store = line.contains(" val 0x");
            asked =
                at.filter(|_| !line.ends_with(" val 0x1")).map(|at| asked.filter(|_| store).unwrap_or(at));
        } else if end(line)
            && let Some((asked, at)) = asked.take().zip(at)
        {
            times.push((at - asked) * 1000.0);
        }
    }
    times
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
