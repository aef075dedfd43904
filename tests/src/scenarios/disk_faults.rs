//! Disks that fail, and a VMM that is killed: what was flushed is kept, and all else is an I/O error of the guest's.

use std::time::Duration;

use super::debian::last_number;
use super::on;
use crate::error::{Result, ensure};
use crate::guest::{Guest, VmSpec};
use crate::host::Host;
use crate::rpc::wait_for;
use crate::runner::{Case, Scenario};
use crate::spec::{Device, HostSpec, Slot};

/// For what takes long in an emulated machine.
const LONG: Duration = Duration::from_secs(90);
/// Flushed records after which the VMM is killed.
const ENOUGH: u64 = 800;

pub fn table() -> Vec<Scenario> {
    // The host of the scenarios with Debian, so that they share a boot.
    let host = || HostSpec::new(&[Slot::new(Device::Gpu)]).debian();
    vec![
        on(host(), "disks_keep_every_flushed_record_when_the_vmm_is_killed_while_it_writes", killed),
        on(host(), "a_full_disk_a_cut_off_image_and_a_failing_device_are_io_errors_of_the_guest", failing),
    ]
}

/// A small guest with these disks.
fn vm(case: &Case<'_>, disks: &[&str]) -> VmSpec {
    let mut vm = VmSpec::new(case.guest);
    vm.modules.extend(["virtio_pci", "virtio_blk"]);
    disks.iter().fold(vm, |vm, disk| vm.options(&format!("--disk {disk}")))
}

fn killed(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let disks = [("raw", "/dev/vda"), ("qcow2", "/dev/vdb")];
    let image = |format: &str| format!("/images/records.{format}");
    let keys = disks.map(|(format, _)| format!("path={},image_type={format}", image(format)));
    host.sh("rm -f /images/records.*")?;
    for (format, _) in disks {
        host.sh(&format!("qemu-img create -f {format} {} 64M", image(format)))?;
    }
    let guest = host.start_vm(&vm(case, &keys.each_ref().map(String::as_str)))?;
    let mark = guest.mark();
    guest.begin("guest_tool records write /dev/vda & guest_tool records write /dev/vdb; wait")?;
    let flushed = |disk: &str| last_number(host, mark, &format!("flushed {disk} "));
    for (_, disk) in disks {
        wait_for(&format!("enough records are flushed on {disk}"), LONG, || {
            Ok(flushed(disk)
                .filter(|n| *n >= ENOUGH)
                .ok_or_else(|| format!("{:?} of {ENOUGH}", flushed(disk))))
        })?;
    }
    guest.signal("KILL")?;
    guest.wait_exit()?;
    for (format, disk) in disks {
        let (flushed, image) = (flushed(disk).unwrap_or_default(), image(format));
        if format == "qcow2" {
            let check = host.run_for(&format!("qemu-img check {image}"), LONG)?;
            // 3: clusters that nobody uses. An image that was cut off in its growth may have them.
            ensure(matches!(check.status, 0 | 3), || format!("the image is damaged: {}", check.text))?;
        }
        let look = format!(
            "qemu-img convert -f {format} -O raw {image} /images/records.plain && \
             guest_tool records check /images/records.plain {flushed}"
        );
        let verdict = host.run_for(&look, LONG)?;
        ensure(verdict.status == 0, || format!("{format}, of {flushed} flushed records: {}", verdict.text))?;
    }
    host.sh("rm -f /images/records.*").map(drop)
}

/// Three disks: one in a file system of 8 MiB, an image that is cut off while it is used, and a device of the host that fails in its middle.
fn failing(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    host.sh("mkdir -p /run/small && mount -t tmpfs -o size=8M small /run/small && truncate -s 64M /run/small/disk")?;
    host.sh("rm -f /images/cut && dd if=/dev/urandom of=/images/cut bs=1M count=8")?;
    host.sh(
        "truncate -s 16M /images/broken && losetup /dev/loop0 /images/broken && printf '0 16384 linear /dev/loop0 0\\n\
         16384 8192 error\\n24576 8192 linear /dev/loop0 24576\\n' | dmsetup create broken",
    )?;
    let outcome = fail(case);
    host.sh("dmsetup remove --retry broken; losetup -d /dev/loop0; umount /run/small; rm -f /images/cut /images/broken")?;
    outcome
}

fn fail(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let guest = host.start_vm(&vm(
        case,
        &[
            "path=/run/small/disk,image_type=raw",
            "path=/images/cut,image_type=raw",
            "path=/dev/dm-0,image_type=raw,direct=on",
        ],
    ))?;
    no_room(host, &guest)?;
    cut_off(host, &guest)?;
    broken(host, &guest)?;
    let errors = guest.sh("dmesg | grep -c 'I/O error'")?;
    ensure(errors != "0", || "the guest's kernel has seen no I/O error".to_owned())?;
    let (now, before) = (host.sh("pidof dormouse")?, host.sh("cat /run/vmm.pid")?);
    ensure(now == before, || format!("the VMM was process {before}, and is {now} now"))?;
    guest.power_off()
}

fn no_room(host: &Host, guest: &Guest<'_>) -> Result<()> {
    let beyond = "dd if=/dev/zero of=/dev/vda bs=1M seek=16 count=32 conv=fsync";
    guest.sh("dd if=/dev/zero of=/dev/vda bs=1M count=4 conv=fsync")?;
    fails(guest, beyond)?;
    // What has room already still takes data, and more once there is room again.
    guest.sh("dd if=/dev/zero of=/dev/vda bs=1M count=4 conv=fsync")?;
    host.sh("mount -o remount,size=80M /run/small")?;
    guest.sh(beyond).map(drop)
}

fn cut_off(host: &Host, guest: &Guest<'_>) -> Result<()> {
    guest.sh("dd if=/dev/vdb of=/dev/null bs=1M count=2 iflag=direct")?;
    host.sh("truncate -s 4M /images/cut")?;
    fails(guest, "dd if=/dev/vdb of=/dev/null bs=1M skip=6 count=1 iflag=direct")?;
    guest.sh("dd if=/dev/vdb of=/dev/null bs=1M count=4 iflag=direct").map(drop)
}

/// It fails in its middle, then altogether, as if it were gone; then it is mended.
fn broken(host: &Host, guest: &Guest<'_>) -> Result<()> {
    for (at, good) in [(2, true), (9, false), (14, true)] {
        let read = format!("dd if=/dev/vdc of=/dev/null bs=1M skip={at} count=1 iflag=direct");
        let write = format!("dd if=/dev/zero of=/dev/vdc bs=1M seek={at} count=1 oflag=direct conv=fsync");
        for command in [read, write] {
            if good { guest.sh(&command).map(drop)? } else { fails(guest, &command)? }
        }
    }
    let table = |line: &str| {
        format!(
            "echo '{line}' | dmsetup load broken && dmsetup suspend --noflush broken && dmsetup resume broken"
        )
    };
    host.sh(&table("0 32768 error"))?;
    fails(guest, "dd if=/dev/vdc of=/dev/null bs=1M count=1 iflag=direct")?;
    fails(guest, "dd if=/dev/zero of=/dev/vdc bs=1M count=1 oflag=direct conv=fsync")?;
    host.sh(&table("0 32768 linear /dev/loop0 0"))?;
    guest.sh("dd if=/dev/zero of=/dev/vdc bs=1M count=16 oflag=direct conv=fsync")?;
    guest.sh("dd if=/dev/vdc of=/dev/null bs=1M count=16 iflag=direct").map(drop)
}

/// The guest is told of the error; it has not waited for the disk until its patience ended.
fn fails(guest: &Guest<'_>, command: &str) -> Result<()> {
    let output = guest.run(&format!("timeout 20 {command}"))?;
    let told = output.text.contains("Input/output error") || output.text.contains("No space");
    ensure(output.status == 1 && told, || {
        format!(
            "the guest's `{command}` ended with {} instead of an I/O error: {}",
            output.status, output.text
        )
    })
}
