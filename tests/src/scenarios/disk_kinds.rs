//! Every kind of disk at once (raw and qcow2, past the host's page cache and through it, by io_uring and without it), against what the host can do to
//! its image: kill the VMM, run out of room, fail, take the file away.

use std::time::Duration;

use super::debian::last_number;
use super::on;
use crate::error::{Result, ensure};
use crate::guest::{Guest, VmSpec};
use crate::rpc::wait_for;
use crate::runner::{Case, Scenario};
use crate::spec::{Device, HostSpec, Slot};

/// For what takes long in an emulated machine.
const LONG: Duration = Duration::from_secs(120);
/// Records that each disk has flushed at least when the VMM is killed.
const ENOUGH: u64 = 160;
/// Where the images are in a file system of their own, on a device that can be made to fail.
const PLACE: &str = "/run/kinds";

pub fn table() -> Vec<Scenario> {
    let host = || HostSpec::new(&[Slot::new(Device::Gpu)]).debian();
    vec![
        on(host(), "disks_of_every_kind_keep_every_flushed_record_when_the_vmm_is_killed", killed),
        on(host(), "a_full_file_system_and_a_failing_one_are_io_errors_for_disks_of_every_kind", failing),
    ]
}

/// The keys of each kind of disk, after its path, and its format.
fn kinds() -> Vec<(&'static str, String)> {
    let mut all = Vec::new();
    for format in ["raw", "qcow2"] {
        for way in ["", ",direct=on", ",_disable_io_uring=on", ",direct=on,_disable_io_uring=on"] {
            all.push((format, format!("image_type={format}{way}")));
        }
    }
    all
}

/// The disk of a kind in the guest.
fn disk(number: usize) -> String {
    format!("/dev/vd{}", char::from(b"abcdefgh"[number % 8]))
}

/// A small guest with a disk of each kind, whose images are in `place`.
fn start<'a>(case: &Case<'a>, place: &str, size: &str) -> Result<Guest<'a>> {
    let mut vm = VmSpec::new(case.guest);
    vm.modules.extend(["virtio_pci", "virtio_blk"]);
    for (number, (format, keys)) in kinds().iter().enumerate() {
        let image = format!("{place}/{number}");
        // Debian's programs do not see what is mounted below /run.
        case.host.sh(&match *format {
            "raw" => format!("truncate -s {size} {image}"),
            _ => format!(
                "qemu-img create -f {format} /images/new {size} && cat /images/new >{image} && rm /images/new"
            ),
        })?;
        vm = vm.options(&format!("--disk path={place}/{number},{keys}"));
    }
    case.host.start_vm(&vm)
}

fn killed(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    host.sh("rm -rf /images/kinds && mkdir /images/kinds")?;
    let guest = start(case, "/images/kinds", "64M")?;
    let mark = guest.mark();
    let writers: Vec<String> =
        (0..kinds().len()).map(|number| format!("guest_tool records write {} &", disk(number))).collect();
    guest.begin(&format!("{} wait", writers.join(" ")))?;
    let flushed = |number: usize| last_number(host, mark, &format!("flushed {} ", disk(number))).unwrap_or(0);
    wait_for("records are flushed on every disk", LONG * 2, || {
        let counts: Vec<u64> = (0..kinds().len()).map(flushed).collect();
        Ok(if counts.iter().all(|count| *count >= ENOUGH) { Ok(()) } else { Err(format!("{counts:?}")) })
    })?;
    guest.signal("KILL")?;
    guest.wait_exit()?;
    for (number, (format, keys)) in kinds().iter().enumerate() {
        let (flushed, image) = (flushed(number), format!("/images/kinds/{number}"));
        if *format == "qcow2" {
            let check = host.run_for(&format!("qemu-img check {image}"), LONG)?;
            // 3: clusters that nobody uses. An image that was cut off in its growth may have them.
            ensure(matches!(check.status, 0 | 3), || format!("{keys}: damaged: {}", check.text))?;
        }
        let look = format!(
            "qemu-img convert -f {format} -O raw {image} /images/kinds/plain && \
             guest_tool records check /images/kinds/plain {flushed}"
        );
        let verdict = host.run_for(&look, LONG)?;
        ensure(verdict.status == 0, || format!("{keys}, of {flushed} flushed records: {}", verdict.text))?;
    }
    host.sh("rm -rf /images/kinds").map(drop)
}

fn failing(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    host.sh(&format!(
        "rm -f /images/kinds.img; mkdir -p {PLACE}; truncate -s 48M /images/kinds.img && losetup /dev/loop0 /images/kinds.img && \
         echo '0 98304 linear /dev/loop0 0' | dmsetup create kinds && mkfs.ext4 -q -F /dev/dm-0 && mount -t ext4 /dev/dm-0 {PLACE}"
    ))?;
    let outcome = fail(case);
    host.sh(&format!(
        "umount {PLACE}; dmsetup remove --retry kinds; losetup -d /dev/loop0; rm -f /images/kinds.img"
    ))?;
    outcome
}

/// Writes to a disk, and what comes of it: 16 MiB from the 16th on.
fn write(guest: &Guest<'_>, number: usize) -> Result<crate::rpc::Output> {
    let command =
        format!("timeout 60 dd if=/dev/zero of={} bs=1M seek=16 count=16 conv=fsync 2>&1", disk(number));
    guest.finish(&guest.begin(&command)?, LONG)
}

/// Ended by an error that it was told, and not by its patience.
fn told(output: &crate::rpc::Output) -> bool {
    let text = &output.text;
    output.status == 1 && (text.contains("Input/output error") || text.contains("No space"))
}

fn fail(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let guest = start(case, PLACE, "64M")?;
    let pid = host.sh("cat /run/vmm.pid")?;
    // There is room for the beginnings of all, and for no more.
    for number in 0..kinds().len() {
        guest.sh(&format!(
            "dd if=/dev/zero of={} bs=64K count=4 oflag=direct conv=fsync 2>&1",
            disk(number)
        ))?;
    }
    host.sh(&format!(
        "dd if=/dev/zero of={PLACE}/filler bs=1M 2>/dev/null; sync; df -k {PLACE} | tail -n 1"
    ))?;
    for (number, (_, keys)) in kinds().iter().enumerate() {
        let output = write(&guest, number)?;
        ensure(told(&output), || format!("{keys}, full: {}: {}", output.status, output.text))?;
        guest.sh(&format!("dd if={} of=/dev/null bs=64K count=4 iflag=direct", disk(number)))?;
    }
    // With room again each works again.
    host.sh(&format!("rm {PLACE}/filler; sync"))?;
    for (number, (_, keys)) in kinds().iter().enumerate() {
        let command = format!("dd if=/dev/zero of={} bs=64K seek=32 count=8 conv=fsync 2>&1", disk(number));
        let output = guest.finish(&guest.begin(&command)?, LONG)?;
        ensure(output.status == 0, || format!("{keys}, with room again: {}", output.text))?;
    }
    // All of the device fails, as if it had been pulled out.
    host.sh("sync; echo 3 >/proc/sys/vm/drop_caches; echo '0 98304 error' | dmsetup load kinds && dmsetup suspend --noflush --nolockfs kinds && dmsetup resume kinds")?;
    for (number, (_, keys)) in kinds().iter().enumerate() {
        let output = write(&guest, number)?;
        ensure(told(&output), || format!("{keys}, vanished: {}: {}", output.status, output.text))?;
        let command =
            format!("timeout 60 dd if={} of=/dev/null bs=64K count=4 iflag=direct 2>&1", disk(number));
        let output = guest.finish(&guest.begin(&command)?, LONG)?;
        ensure(told(&output), || format!("{keys}, vanished, read: {}: {}", output.status, output.text))?;
    }
    let errors = guest.sh("dmesg | grep -c 'I/O error'")?;
    ensure(errors != "0", || "the guest's kernel has seen no I/O error".to_owned())?;
    let now = host.sh("pidof dormouse")?;
    ensure(now == pid, || format!("the VMM was process {pid}, and is {now} now"))?;
    guest.power_off()
}
