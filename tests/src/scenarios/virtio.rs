//! Virtio devices as a guest's own drivers find them: what all of them have in common.

use std::time::Duration;

use super::steps::vm;
use super::{IGB, scenario, with_old_kernels};
use crate::error::{Error, Result, ensure};
use crate::guest::{Guest, VmSpec};
use crate::rpc::wait_for;
use crate::runner::{Case, Scenario};

/// For what takes long in an emulated machine.
const LONG: Duration = Duration::from_secs(120);

pub fn table() -> Vec<Scenario> {
    let mut all =
        with_old_kernels(scenario("a_guest_gets_random_numbers_from_the_entropy_device", random_numbers));
    all.push(scenario("a_virtio_device_works_again_after_its_driver_was_unbound_and_bound", rebind));
    all.push(scenario("a_guest_that_falls_silent_is_reset_by_the_watchdog", watchdog));
    all.push(scenario("a_balloon_gives_memory_back_unless_a_device_has_it_pinned", balloon));
    all
}

fn spec(case: &Case<'_>) -> VmSpec {
    let mut spec = VmSpec::new(case.guest);
    spec.modules = vec!["virtio_pci", "virtio_rng"];
    spec
}

/// Two draws that differ, from the virtio device and no other source.
pub fn draws(guest: &Guest<'_>) -> Result<()> {
    let source = guest.sh("cat /sys/class/misc/hw_random/rng_current")?;
    ensure(source.trim().starts_with("virtio_rng"), || format!("the guest's source is {source}"))?;
    let draw = || guest.sh("dd if=/dev/hwrng bs=256 count=64 2>/dev/null | sha256sum");
    let (first, second) = (draw()?, draw()?);
    ensure(first != second, || format!("drawn twice: {first}"))?;
    let count = guest.sh("dd if=/dev/hwrng bs=256 count=64 2>/dev/null | wc -c")?;
    ensure(count.trim() == "16384", || format!("{count} bytes of 16384"))
}

fn random_numbers(case: &Case<'_>) -> Result<()> {
    let guest = case.host.start_vm(&spec(case))?;
    draws(&guest)?;
    let interrupts = guest.sh("grep -c 'virtio.*-input' /proc/interrupts")?;
    ensure(interrupts.trim() != "0", || "no message vector of the device".to_owned())?;
    guest.power_off()
}

/// The functions of devices of this type (VIRTIO 1.2, chapter 5), in order.
pub fn functions(guest: &Guest<'_>, device_type: u16) -> Result<Vec<String>> {
    let id = format!("0x{:04x}", 0x1040 + device_type);
    let find =
        format!("cd /sys/bus/pci/devices; for d in *; do [ $(cat $d/device) = {id} ] && echo $d; done; true");
    Ok(guest.sh(&find)?.lines().filter(|line| line.starts_with("0000:")).map(str::to_owned).collect())
}

/// The first of them.
pub fn function(guest: &Guest<'_>, device_type: u16) -> Result<String> {
    let found = functions(guest, device_type)?.into_iter().next();
    found.ok_or_else(|| Error::Check(format!("no function of a virtio device of type {device_type}")))
}

/// Takes a function from its driver, if it has one.
pub fn without_driver(guest: &Guest<'_>, function: &str) -> Result<()> {
    let dir = format!("/sys/bus/pci/devices/{function}");
    guest.sh(&format!("[ ! -e {dir}/driver ] || echo {function} >{dir}/driver/unbind")).map(drop)
}

fn watchdog(case: &Case<'_>) -> Result<()> {
    let guest = case.host.start_vm(&spec(case).options("--watchdog").cmdline("iomem=relaxed"))?;
    let function = function(&guest, 35)?;
    let mark = guest.mark();
    guest.sh(&format!(
        "(setsid guest_tool watchdog {function} 25 >/dev/null 2>&1 &) ; sleep 24; echo alive"
    ))?;
    guest.wait_ready(mark)?;
    draws(&guest)?;
    guest.power_off()
}

/// Resident pages of the VMM, in KiB.
fn resident(case: &Case<'_>) -> Result<u64> {
    let text = case.host.sh("awk '/^VmRSS/ {print $2}' /proc/$(pidof dormouse)/status")?;
    text.trim().parse().map_err(|_| Error::Check(format!("VmRSS is {text}")))
}

fn balloon(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let socket = "/run/balloon.sock";
    let ctl = |words: &str| host.sh(&format!("dormouse ctl --api-socket {socket} --json {words}"));
    let options = format!("--api-socket {socket} --balloon size=0,deflate_on_oom=on");
    for pinned in [false, true] {
        let mut spec = if pinned { vm(case, &[IGB]) } else { spec(case) };
        // A huge page goes back only as a whole.
        spec.memory = "512M,thp=off".to_owned();
        spec.modules = vec!["virtio_pci", "virtio_rng", "virtio_balloon"];
        let guest = host.start_vm(&spec.options(&options))?;
        // Memory that the guest has used and given back to itself.
        guest.sh("dd if=/dev/zero of=/tmp/fill bs=1M count=200 2>/dev/null; rm /tmp/fill")?;
        let before = resident(case)?;
        ctl("resize --balloon 209715200")?;
        wait_for("the guest gives 200 MiB up", LONG, || {
            let info = ctl("info")?;
            Ok(if info.contains("327155712") { Ok(()) } else { Err("not all of it".to_owned()) })
        })?;
        let after = resident(case)?;
        let freed = before.saturating_sub(after);
        ensure(if pinned { freed < 20 << 10 } else { freed > 120 << 10 }, || {
            format!("pinned: {pinned}; {before} KiB before, {after} KiB after")
        })?;
        ctl("resize --balloon 0")?;
        wait_for("the guest takes it back", LONG, || {
            let info = ctl("info")?;
            Ok(if info.contains("536870912,") { Ok(()) } else { Err(info) })
        })?;
        guest.sh("dd if=/dev/zero of=/tmp/fill bs=1M count=200 2>/dev/null; rm /tmp/fill")?;
        draws(&guest)?;
        guest.power_off()?;
    }
    Ok(())
}

fn rebind(case: &Case<'_>) -> Result<()> {
    let guest = case.host.start_vm(&spec(case))?;
    draws(&guest)?;
    for _ in 0..3 {
        let driver = "/sys/bus/pci/drivers/virtio-pci";
        let device = guest.sh(&format!("ls {driver} | grep 0000: | head -n1"))?;
        let device = device.trim();
        guest.sh(&format!("echo {device} >{driver}/unbind && echo {device} >{driver}/bind"))?;
        draws(&guest)?;
    }
    guest.power_off()
}
