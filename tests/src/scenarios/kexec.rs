//! A guest that starts another kernel with kexec while every device is busy: what the first kernel left of rings, vectors and memory offered is
//! nothing to the second.

use std::time::Duration;

use super::everything::{GPU, PLACE, Peers, SAID, busy, ctl, spec, use_all, use_console};
use super::on;
use super::steps::{FIRST, IDLE, bdf, bind, guest_is_content, unbind};
use super::vhost_user::SHARED;
use crate::error::{Result, ensure};
use crate::guest::Guest;
use crate::host::Host;
use crate::image::guest_path;
use crate::runner::{Case, Scenario};
use crate::spec::{Device, HostSpec, Slot};

/// For what takes long in an emulated machine.
const LONG: Duration = Duration::from_secs(120);

pub fn table() -> Vec<Scenario> {
    let host = HostSpec::new(&[Slot::new(Device::Gpu)]).debian();
    vec![on(host, "a_second_kernel_finds_every_device_that_the_first_one_left_busy", kexec)]
}

/// The GPU sleeps, and does not mind who wakes it.
fn gpu_sleeps_and_wakes(host: &Host, guest: &Guest<'_>) -> Result<()> {
    unbind(guest, FIRST)?;
    host.wait_power_state(&bdf(GPU), "D3cold", IDLE)?;
    bind(guest, FIRST)?;
    guest.sh("timeout 20 guest_tool drm").map(drop)
}

fn kexec(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let peers = Peers::start(host)?;
    let guest = host.start_vm(&spec(case, &format!("file={SAID}")))?;
    use_all(host, &guest)?;
    for round in 0..2 {
        gpu_sleeps_and_wakes(host, &guest)?;
        for file in ["vmlinuz", "initramfs"] {
            host.sh(&format!("cp {} {SHARED}/{file}", guest_path(case.guest, file)))?;
        }
        // Beforehand: it takes long beside all that is busy.
        guest.sh("mkdir -p /mnt && mount -t virtiofs share /mnt")?;
        guest.sh_for("guest_tool kexec-load /mnt/vmlinuz /mnt/initramfs \"$(cat /proc/cmdline)\"", LONG)?;
        guest.sh("umount /mnt")?;
        if round == 1 {
            unbind(&guest, FIRST)?;
            host.wait_power_state(&bdf(GPU), "D3cold", IDLE)?;
        }
        busy(host, &guest)?;
        // Its packets also come when the second kernel has no driver for them yet.
        std::thread::sleep(Duration::from_secs(2));
        let mark = guest.mark();
        guest.begin("guest_tool kexec-start")?;
        guest.wait_ready(mark)?;
        host.sh(&format!("killall yes ping socat 2>/dev/null; rm -f {SHARED}/*; true"))?;
        ctl(host, "resize --balloon 0")?;
        let up = guest.sh("cut -d. -f1 /proc/uptime")?;
        use_all(host, &guest)?;
        use_console(host, &guest, &format!("kernel {round}"))?;
        guest.sh("timeout 20 guest_tool drm")?;
        let log = guest.log()?;
        ensure(!log.contains("has stopped until") && !log.contains("defect"), || {
            format!("kernel {round}, {up} s old: {log}")
        })?;
        guest_is_content(&guest)?;
    }
    gpu_sleeps_and_wakes(host, &guest)?;
    guest.power_off()?;
    host.sh(&format!("rm -f {PLACE}/noise"))?;
    drop(peers);
    Ok(())
}
