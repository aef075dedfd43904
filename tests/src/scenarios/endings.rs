//! However a VM ends while its device is off, the device answers, resets, and can be assigned again at once.

use super::steps::{FIRST, IDLE, bdf, bind, unbind, vm};
use super::{GPU, scenario};
use crate::error::{Result, ensure};
use crate::guest::Guest;
use crate::host::sysfs;
use crate::image::guest_path;
use crate::runner::{Case, Scenario};

pub fn table() -> Vec<Scenario> {
    vec![
        scenario("sigkill_while_the_device_is_off_leaves_it_usable", |case| signalled(case, "KILL")),
        scenario("sigterm_while_the_device_is_off_leaves_it_usable", |case| signalled(case, "TERM")),
        scenario("guest_crash_while_the_device_is_off_restarts_with_it", crash),
        scenario("guest_reboot_while_the_device_is_off_restarts_with_it", reboot),
        scenario("kexec_while_the_device_is_off_finds_it_again", kexec),
        scenario("power_off_while_the_device_is_off_leaves_it_usable", power_off),
    ]
}

/// A guest whose GPU has worked and is off now.
fn with_gpu_off<'a>(case: &Case<'a>) -> Result<Guest<'a>> {
    let guest = case.host.start_vm(&vm(case, &[GPU]))?;
    gpu_off(case, &guest)?;
    Ok(guest)
}

fn gpu_off(case: &Case<'_>, guest: &Guest<'_>) -> Result<()> {
    guest.sh("timeout 20 guest_tool drm")?;
    unbind(guest, FIRST)?;
    case.host.wait_power_state(&bdf(GPU), "D3cold", IDLE)
}

/// The device as the next user finds it.
fn usable(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    host.sh(&format!("echo 1 >{}", sysfs(&bdf(GPU), "reset")))?;
    let id = host.poke(&bdf(GPU))?;
    ensure(id.starts_with("f41a"), || format!("the GPU answers {id}"))?;
    let guest = host.start_vm(&vm(case, &[GPU]))?;
    guest.sh("timeout 20 guest_tool drm")?;
    guest.power_off()
}

fn signalled(case: &Case<'_>, signal: &str) -> Result<()> {
    let guest = with_gpu_off(case)?;
    guest.signal(signal)?;
    let status = guest.wait_exit()?;
    ensure(status != 0 || signal == "TERM", || format!("status {status} after SIG{signal}"))?;
    drop(guest);
    usable(case)
}

fn power_off(case: &Case<'_>) -> Result<()> {
    with_gpu_off(case)?.power_off()?;
    usable(case)
}

fn crash(case: &Case<'_>) -> Result<()> {
    let guest = with_gpu_off(case)?;
    let mark = guest.mark();
    guest.expect_panic();
    guest.begin("echo c >/proc/sysrq-trigger")?;
    guest.wait_ready(mark)?;
    guest.sh("timeout 20 guest_tool drm")?;
    gpu_off(case, &guest)?;
    guest.power_off()
}

fn reboot(case: &Case<'_>) -> Result<()> {
    let guest = with_gpu_off(case)?;
    let mark = guest.mark();
    guest.begin("reboot -f")?;
    guest.wait_ready(mark)?;
    guest.sh("timeout 20 guest_tool drm")?;
    gpu_off(case, &guest)?;
    bind(&guest, FIRST)?;
    guest.sh("timeout 20 guest_tool drm")?;
    guest.power_off()
}

fn kexec(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    // The first guest carries the second: its kernel and initramfs, joined to its own initramfs.
    let kernel = guest_path(case.guest, "vmlinuz");
    let initramfs = guest_path(case.guest, "initramfs");
    let joined = "/run/kexec.initramfs";
    host.sh(&format!(
        "cd $(dirname {kernel}) && (cat {initramfs}; printf 'vmlinuz\\ninitramfs\\n' | cpio -o -H newc 2>/dev/null) >{joined}"
    ))?;
    let mut vm = vm(case, &[GPU]).memory("1G");
    vm.initramfs = Some(joined.to_owned());
    let guest = host.start_vm(&vm)?;
    gpu_off(case, &guest)?;
    let mark = guest.mark();
    guest.begin(
        "guest_tool kexec /vmlinuz /initramfs \"console=ttyS0 quiet panic=-1 bed.modules=virtio_pci,virtio_gpu $(sed -n 's/.*\\(acpi_rsdp=[^ ]*\\).*/\\1/p' /proc/cmdline)\"",
    )?;
    guest.wait_ready(mark)?;
    guest.sh("timeout 20 guest_tool drm")?;
    guest.power_off()?;
    host.sh(&format!("rm {joined}"))?;
    drop(guest);
    usable(case)
}
