//! Virtio devices as a guest's own drivers find them: what all of them have in common.

use super::{scenario, with_old_kernels};
use crate::error::{Result, ensure};
use crate::guest::{Guest, VmSpec};
use crate::runner::{Case, Scenario};

pub fn table() -> Vec<Scenario> {
    let mut all =
        with_old_kernels(scenario("a_guest_gets_random_numbers_from_the_entropy_device", random_numbers));
    all.push(scenario("a_virtio_device_works_again_after_its_driver_was_unbound_and_bound", rebind));
    all
}

fn spec(case: &Case<'_>) -> VmSpec {
    let mut spec = VmSpec::new(case.guest);
    spec.modules = vec!["virtio_pci", "virtio_rng"];
    spec
}

/// Two draws that differ, from the virtio device and no other source.
fn draws(guest: &Guest<'_>) -> Result<()> {
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
