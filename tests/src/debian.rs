//! Debian as the guest: its root file system on a disk, booted by systemd to a login prompt, logged in to by the test bed.
//!
//! The images are those of [`rootfs`](crate::rootfs), in `/images` of a host with [`HostSpec::debian`](crate::spec::HostSpec).
//! From the login on it is a [`Guest`] as any other: the shell of the user `bed` is the test bed's agent.

pub mod network;

use std::time::Duration;

use crate::error::{Error, Result};
use crate::guest::{Guest, VmSpec};
use crate::host::Host;
use crate::spec::Kernel;

/// The kernel that Debian's modules are for.
pub const KERNEL: Kernel = Kernel::Generic6_12;
/// The image as a plain file of sectors.
pub const RAW: &str = "path=/images/debian.raw,image_type=raw";
/// The same content as qcow2.
pub const QCOW2: &str = "path=/images/debian.qcow2,image_type=qcow2";
/// The longest Debian may take to its login prompt: some 40 s on an idle machine, minutes on a loaded one.
pub const BOOT: Duration = Duration::from_secs(420);
/// What a login may take.
const LOGIN: Duration = Duration::from_secs(30);

/// What Debian's systemd is told: no status on the console, a dumb terminal. And on a loaded machine the emulated host's clock may be several times
/// too fast, and so the guest's: its own limits of time, 90 s for a device, are then none to go by.
pub const WORDS: &str = "systemd.show_status=0 systemd.tty.term.ttyS0=dumb systemd.default_device_timeout_sec=1h \
    systemd.default_timeout_start_sec=1h systemd.service_watchdogs=0";

/// A VM with 512 MiB that boots Debian from the disk with these keys.
pub fn vm(disk: &str) -> VmSpec {
    VmSpec::new(KERNEL)
        .cmdline("bed.mode=disk bed.root=/dev/vda")
        .cmdline(WORDS)
        .options(&format!("--disk {disk}"))
}

/// Starts the VMM on `host`, waits for the login prompt and logs in.
pub fn start<'h>(host: &'h Host, vm: &VmSpec) -> Result<Guest<'h>> {
    let guest = Guest::launch(host, vm)?;
    log_in(host, &guest, 0)?;
    Ok(guest)
}

/// Waits for the login prompt, counting from line `mark` of the console, and logs in.
pub fn log_in(host: &Host, guest: &Guest<'_>, mark: usize) -> Result<()> {
    let wire = host.guest.wire();
    // The prompt itself does not end in a line end; the line above it does.
    let title = wire.wait("the login prompt", guest.first().max(mark), BOOT, |line| {
        line.contains("Debian GNU/Linux") && line.contains("ttyS0")
    })?;
    for _ in 0..3 {
        // What comes before the prompt is read by nobody.
        std::thread::sleep(Duration::from_secs(1));
        let before = wire.mark();
        wire.send("bed\n")?;
        match host.guest.wait_ready(before, LOGIN) {
            Ok(()) => {
                let seen = wire.since(title);
                let prompted = seen.iter().any(|line| line.starts_with("bed login: bed"));
                return if prompted { Ok(()) } else { Err(no_prompt(&seen)) };
            }
            Err(Error::Timeout { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Err(no_prompt(&wire.since(title)))
}

fn no_prompt(seen: &[String]) -> Error {
    Error::Check(format!("the guest's login prompt does not let the test bed in: {}", seen.join("\n")))
}
