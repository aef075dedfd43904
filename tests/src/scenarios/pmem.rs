//! Persistent memory: files of the host that a guest's own drivers make disks of, which are there to be mapped (DAX); that come and go beside a
//! sleeping device; and that the host takes away.

use std::time::Duration;

use super::steps::{FIRST, IDLE, bdf, guest_is_content, nic_to_sleep, pass_traffic, vm};
use super::{IGB, on, scenario, with_old_kernels};
use crate::error::{Result, ensure};
use crate::guest::{Guest, VmSpec};
use crate::host::Host;
use crate::rpc::wait_for;
use crate::runner::{Case, Scenario};
use crate::spec::HostSpec;

/// The VM's control socket and its events, on the host.
const SOCKET: &str = "/run/pmem.sock";
const EVENTS: &str = "/run/pmem.events";
/// The files behind the devices.
const IMAGE: &str = "/run/pmem.img";
/// For what takes long in an emulated machine.
const LONG: Duration = Duration::from_secs(120);

pub fn table() -> Vec<Scenario> {
    let mut all = with_old_kernels(on(
        HostSpec::new(&[]),
        "a_file_is_memory_of_the_guest_and_keeps_what_it_flushes",
        keeps,
    ));
    all.push(scenario("persistent_memory_comes_and_goes_beside_a_sleeping_device", comes_and_goes));
    all.push(on(
        HostSpec::new(&[]),
        "a_file_that_the_host_takes_away_is_an_error_in_the_guest_that_lives_on",
        taken_away,
    ));
    all
}

fn with_drivers(mut spec: VmSpec, options: &str) -> VmSpec {
    spec = spec.options(&format!("--api-socket {SOCKET} --event-monitor path={EVENTS} {options}"));
    spec.modules.extend(["virtio_pci", "virtio_pmem", "nd_pmem", "ext4", "crc32c_generic"]);
    spec
}

fn ctl(host: &Host, words: &str) -> Result<String> {
    host.sh(&format!("dormouse ctl --api-socket {SOCKET} --json {words}"))
}

fn wait_disk(guest: &Guest<'_>, name: &str) -> Result<()> {
    wait_for("the guest has a disk of it", IDLE, || {
        let devices = guest.run("ls /sys/bus/nd/devices")?.text;
        Ok(if guest.run(&format!("test -b /dev/{name}"))?.status == 0 { Ok(()) } else { Err(devices) })
    })
}

/// Makes a file with a file system in it whose files can be mapped.
fn make(host: &Host, size: &str) -> Result<()> {
    host.sh(&format!("truncate -s {size} {IMAGE} && mkfs.ext4 -q -F -b 4096 {IMAGE}")).map(drop)
}

/// Mounts it so that they are.
fn mount(guest: &Guest<'_>, name: &str) -> Result<()> {
    wait_disk(guest, name)?;
    guest.sh(&format!("mkdir -p /mnt && mount -t ext4 -o dax /dev/{name} /mnt"))?;
    let mounted = guest.sh("grep /mnt /proc/mounts")?;
    ensure(mounted.contains("dax"), || format!("mounted without DAX: {mounted}"))
}

fn sum(host: &Host) -> Result<String> {
    host.run_for(&format!("sha256sum <{IMAGE}"), LONG).map(|output| output.text)
}

/// Whether the host finds a word in the file. The guest puts it together, so that no command has it.
fn find(host: &Host, word: &str) -> Result<bool> {
    Ok(host.run_for(&format!("grep -q {word} {IMAGE}"), LONG)?.status == 0)
}

fn keeps(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    make(host, "64M")?;
    let guest = host.start_vm(&with_drivers(VmSpec::new(case.guest), &format!("--pmem file={IMAGE}")))?;
    mount(&guest, "pmem0")?;
    guest.sh("echo dormouse-was-$((6*7)) >/mnt/word && head -c 8388608 /dev/urandom >/mnt/data && sync")?;
    let written = guest.sh_for("sha256sum </mnt/data", LONG)?;
    ensure(find(host, "dormouse-was-42")?, || "the file has nothing of the guest's".to_owned())?;
    // It is the same memory after a reboot, and what was not unmounted is there.
    let mark = guest.mark();
    ctl(host, "reboot")?;
    guest.wait_ready(mark)?;
    mount(&guest, "pmem0")?;
    let read = guest.sh_for("sha256sum </mnt/data", LONG)?;
    ensure(read == written, || format!("wrote {written}, read {read}"))?;
    guest.sh("umount /mnt")?;
    guest_is_content(&guest)?;
    guest.power_off()?;

    let before = sum(host)?;
    let discarding = format!("--pmem file={IMAGE},discard_writes=on file=/run,size=16M,id=scratch");
    let guest = host.start_vm(&with_drivers(VmSpec::new(case.guest), &discarding))?;
    wait_disk(&guest, "pmem1")?;
    mount(&guest, "pmem0")?;
    let read = guest.sh_for("sha256sum </mnt/data", LONG)?;
    ensure(read == written, || format!("wrote {written}, read {read}"))?;
    guest.sh("echo dormouse-will-$((6*8)) >/mnt/other && rm /mnt/word && sync && cat /mnt/other")?;
    guest.sh_for("dd if=/dev/urandom of=/dev/pmem1 bs=1M conv=fsync count=16", LONG)?;
    guest_is_content(&guest)?;
    guest.power_off()?;
    ensure(sum(host)? == before, || "what was to be discarded is in the file".to_owned())?;
    host.sh(&format!("rm {IMAGE}")).map(drop)
}

fn removed(host: &Host, id: &str) -> Result<()> {
    ctl(host, &format!("remove-device {id}"))?;
    wait_for("the device is removed", IDLE, || {
        let gone = host.run(&format!("grep -A6 device-removed {EVENTS} | grep -q '\"{id}\"'"))?;
        Ok(if gone.status == 0 { Ok(()) } else { Err("not yet".to_owned()) })
    })
}

fn comes_and_goes(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    make(host, "32M")?;
    let guest = host.start_vm(&with_drivers(vm(case, &[IGB]), ""))?;
    pass_traffic(&guest, FIRST)?;
    nic_to_sleep(host, &guest, IGB, FIRST)?;
    let mapped = || -> Result<usize> {
        let count = host.run(&format!("grep -c {IMAGE} /proc/$(cat /run/vmm.pid)/maps"))?;
        Ok(count.text.trim().parse().unwrap_or(0))
    };
    for (number, word) in ["one", "two"].into_iter().enumerate() {
        let id = format!("added{number}");
        let reply = ctl(host, &format!("add-pmem file={IMAGE},id={id}"))?;
        ensure(reply.contains(&id) && reply.contains("0000:00:"), || reply.clone())?;
        mount(&guest, "pmem0")?;
        guest.sh(&format!("echo persist-$((6*7))-{word} >>/mnt/word && umount /mnt"))?;
        host.wait_power_state(&bdf(IGB), "D3cold", IDLE)?;
        let place = guest.sh("grep -i -B1 'persistent memory' /proc/iomem; true")?;
        ensure(mapped()? == 1, || "the file is not mapped".to_owned())?;
        removed(host, &id)?;
        let there = guest.run("test -e /dev/pmem0")?;
        ensure(there.status != 0, || format!("the guest still has its disk: {place}"))?;
        ensure(mapped()? == 0, || "the file is still mapped".to_owned())?;
        ensure(find(host, &format!("persist-42-{word}"))?, || format!("{word} is not in the file"))?;
        // Linux looks at all of bus 0 for what is new, and resumes what is there. It sleeps again, also while the memory is there.
        if number == 0 {
            host.wait_power_state(&bdf(IGB), "D3cold", IDLE)?;
        }
    }
    host.set_link(IGB, true)?;
    pass_traffic(&guest, FIRST)?;
    for (words, said) in [
        ("add-pmem file=/no/such/file", "truncate"),
        ("add-pmem file=/run,id=x", "size=SIZE"),
        ("add-pmem file=/run/pmem.img,size=3M", "2M"),
    ] {
        let output = host.run(&format!("dormouse ctl --api-socket {SOCKET} {words} 2>&1"))?;
        ensure(output.status != 0 && output.text.contains(said), || format!("{words}: {}", output.text))?;
    }
    guest_is_content(&guest)?;
    guest.power_off()?;
    host.sh(&format!("rm {IMAGE}")).map(drop)
}

/// A write that must fail once it is flushed, by a guest that goes on.
fn cannot_flush(guest: &Guest<'_>, disk: &str, blocks: u32) -> Result<()> {
    let write = format!("dd if=/dev/zero of=/dev/{disk} bs=1M count={blocks} conv=fsync");
    let output = guest.finish(&guest.begin(&write)?, LONG)?;
    ensure(output.status != 0 && output.text.to_lowercase().contains("error"), || {
        format!("{disk}: a flush of what is not there: {} {}", output.status, output.text)
    })
}

fn taken_away(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    host.sh(
        "mkdir -p /run/small && mount -t tmpfs -o size=24M small /run/small && truncate -s 64M /run/small/a",
    )?;
    host.sh(&format!("head -c 8388608 /dev/zero | tr '\\0' x >{IMAGE}"))?;
    let options = format!("--pmem file=/run/small/a,id=full file={IMAGE},id=short,pci_device_id=20");
    let guest = host.start_vm(&with_drivers(VmSpec::new(case.guest), &options))?;
    wait_disk(&guest, "pmem0")?;
    wait_disk(&guest, "pmem1")?;
    // There are 24 MiB for the 64 that the guest believes to have. A flush is what has the VMM look.
    guest.sh("dd if=/dev/zero of=/dev/pmem0 bs=4k count=1 conv=fsync")?;
    cannot_flush(&guest, "pmem0", 60)?;
    host.sh(&format!("truncate -s 2M {IMAGE}"))?;
    let read = guest.sh_for("tr -d x </dev/pmem1 | wc -c", LONG)?;
    ensure(read.trim() == "6291456", || format!("{read} bytes of 6 MiB read as zeroes"))?;
    cannot_flush(&guest, "pmem1", 8)?;
    let log = guest.log()?;
    for words in ["is its file system full?", "it has become shorter under the guest"] {
        ensure(log.matches(words).count() == 1, || format!("the log does not say once {words:?}"))?;
    }
    guest_is_content(&guest)?;
    guest.power_off()?;
    host.sh(&format!("umount /run/small && rm {IMAGE}")).map(drop)
}
