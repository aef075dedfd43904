//! Wrong command lines and unfit hosts: one line on standard error, status 1, the device untouched.

use super::steps::{UIO, VFIO, bdf, give};
use super::{E1000E, GPU, NVME, on, scenario};
use crate::error::{Result, ensure};
use crate::host::Host;
use crate::runner::{Case, Scenario};
use crate::spec::{Device, HostSpec, Slot};

/// A kernel that the emulated host has.
const KERNEL: &str = "--kernel /guest/6.12/vmlinuz --serial null --console off";

pub fn table() -> Vec<Scenario> {
    let two = HostSpec::new(&[Slot::with(&[Device::Gpu, Device::E1000e])]);
    let mut without_iommu = HostSpec::new(&[Slot::new(Device::E1000e)]);
    without_iommu.iommu = false;
    vec![
        scenario("bad_input_is_refused_in_one_line", refused),
        scenario("unbound_device_is_refused_with_the_way_to_bind_it", unbound),
        scenario("device_in_use_is_refused", in_use),
        scenario("low_memlock_limit_is_refused_with_the_value_needed", memlock),
        scenario("bind_and_unbind_move_a_device_and_say_so", bind_and_unbind),
        on(two, "group_that_is_not_viable_is_refused_with_its_members", not_viable),
        on(without_iommu, "host_without_an_iommu_is_refused", no_iommu),
    ]
}

/// Who runs the VMM.
#[derive(Clone, Copy)]
pub(super) enum As {
    Root,
    Nobody,
}

/// Runs the VMM with `arguments`; it must end with status 1 and one line that has all of `words`.
pub(super) fn refuse(host: &Host, user: As, arguments: &str, words: &[&str]) -> Result<()> {
    let command = match user {
        As::Root => format!("timeout 20 dormouse {arguments} 2>/run/refusal"),
        As::Nobody => format!("su -s /bin/sh nobody -c 'timeout 20 dormouse {arguments}' 2>/run/refusal"),
    };
    let output = host.run(&command)?;
    let line = host.run("cat /run/refusal")?.text;
    ensure(output.status == 1, || format!("`dormouse {arguments}`: status {}, {line}", output.status))?;
    ensure(line.lines().count() == 1, || format!("`dormouse {arguments}`: not one line: {line}"))?;
    let lower = line.to_lowercase();
    for word in words {
        let said = lower.contains(&word.to_lowercase());
        ensure(said, || format!("`dormouse {arguments}` does not say {word:?}: {line}"))?;
    }
    Ok(())
}

fn device(slot: usize) -> String {
    format!("--device path=/sys/bus/pci/devices/{}", bdf(slot))
}

fn refused(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let gpu = device(GPU);
    let since = host.timeline.now();
    refuse(host, As::Root, "--kernel /no/such/kernel", &["/no/such/kernel"])?;
    refuse(host, As::Root, "--kernel /etc/motd", &["/etc/motd"])?;
    refuse(host, As::Root, &format!("{KERNEL} --memory size=1M"), &["memory"])?;
    refuse(host, As::Root, &format!("{KERNEL} --initramfs /no/such/file"), &["/no/such/file"])?;
    refuse(
        host,
        As::Root,
        &format!("{KERNEL} --device path=/sys/bus/pci/devices/0000:7f:00.0"),
        &["0000:7f:00.0"],
    )?;
    refuse(host, As::Root, &format!("{KERNEL} --device path=/etc"), &["/etc"])?;
    refuse(host, As::Root, &format!("{KERNEL} {gpu} {gpu}"), &[&bdf(GPU), "twice"])?;
    refuse(host, As::Root, &format!("{KERNEL} --cpus boot=0"), &["cpus"])?;
    host.sh("mv /dev/kvm /dev/kvm.away")?;
    let result = refuse(host, As::Root, &format!("{KERNEL} {gpu}"), &["/dev/kvm"]);
    host.sh("mv /dev/kvm.away /dev/kvm")?;
    result?;
    refuse(host, As::Nobody, &format!("{KERNEL} {gpu}"), &["permission"])?;
    ensure(host.power_count(GPU, true, since) == 0, || "a refused command woke the device".to_owned())
}

fn unbound(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let bdf = bdf(NVME);
    host.sh(&format!("echo {bdf} >/sys/bus/pci/devices/{bdf}/driver/unbind"))?;
    let result =
        refuse(host, As::Root, &format!("{KERNEL} {}", device(NVME)), &[&bdf, "dormouse bind", "vfio-pci"]);
    host.sh(&format!("echo {bdf} >/sys/bus/pci/drivers_probe"))?;
    result
}

fn in_use(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let vm = super::steps::vm(case, &[GPU]);
    let guest = host.start_vm(&vm)?;
    refuse(host, As::Root, &format!("{KERNEL} {}", device(GPU)), &[&bdf(GPU), "use"])?;
    guest.sh("timeout 20 guest_tool drm")?;
    guest.power_off()
}

fn memlock(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    // A plain user with the rights to the device files, and a limit too low for the guest's RAM.
    host.sh("chmod 666 /dev/kvm /dev/vfio/*")?;
    let arguments = format!("{KERNEL} --memory size=256M {}", device(E1000E));
    let result = refuse(host, As::Nobody, &arguments, &["locked memory", "ulimit -l"]);
    host.sh("chmod 600 /dev/kvm /dev/vfio/[0-9]*")?;
    result
}

fn bind_and_unbind(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let bdf = bdf(E1000E);
    let driver = || host.run(&format!("basename $(readlink /sys/bus/pci/devices/{bdf}/driver) 2>/dev/null"));
    let said = host.sh(&format!("dormouse unbind {bdf} 2>&1"))?;
    ensure(said.contains(&bdf), || format!("unbind does not say what it did: {said}"))?;
    ensure(driver()?.text != "vfio-pci", || "still bound to vfio-pci".to_owned())?;
    let said = host.sh(&format!("dormouse bind {bdf} 2>&1"))?;
    ensure(said.contains(&bdf) && said.contains("vfio-pci"), || {
        format!("bind does not say what it did: {said}")
    })?;
    ensure(driver()?.text == "vfio-pci", || "not bound to vfio-pci".to_owned())
}

fn not_viable(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let other = crate::spec::address(0, 1);
    // A group of which another driver has a part: the port driver of a function cannot be had here, so pci-stub is no
    // help; a driver that binds to anything is.
    give(host, &other, UIO)?;
    let result = refuse(host, As::Root, &format!("{KERNEL} {}", device(0)), &[&other, UIO]);
    give(host, &other, VFIO)?;
    result
}

fn no_iommu(case: &Case<'_>) -> Result<()> {
    refuse(case.host, As::Root, &format!("{KERNEL} {}", device(0)), &["IOMMU"])
}
