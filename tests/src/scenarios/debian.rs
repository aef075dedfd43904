//! Debian, from its disk: systemd, network, and an assigned GPU that sleeps while one works in it.

use std::time::Duration;

use super::on;
use crate::error::{Result, ensure};
use crate::runner::{Case, Scenario};
use crate::spec::{Device, HostSpec, Slot};

pub fn table() -> Vec<Scenario> {
    let host = || HostSpec::new(&[Slot::new(Device::Gpu)]).debian();
    vec![on(host(), "images_of_debian_and_its_programs_are_on_the_emulated_host", on_the_host)]
}

/// The ground the others stand on: the images are whole, and each program that VMs are tried against runs.
fn on_the_host(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let limit = Duration::from_secs(60);
    for command in [
        "qemu-img check /images/debian.qcow2",
        "virtiofsd --version",
        "passt --version",
        "qemu-storage-daemon --version",
        "socat -V",
        "iperf3 --version",
        "fio --version",
        "dmsetup version",
        "test -c /dev/net/tun && test -c /dev/vhost-net && test -c /dev/vhost-vsock && test -c /dev/fuse",
    ] {
        let output = host.run_for(command, limit)?;
        ensure(output.status == 0, || format!("the host's `{command}` fails: {}", output.text))?;
    }
    let compare = "qemu-img compare -f raw -F qcow2 /images/debian.raw /images/debian.qcow2";
    let output = host.run_for(compare, limit)?;
    ensure(output.status == 0, || format!("the two images differ: {}", output.text))
}
