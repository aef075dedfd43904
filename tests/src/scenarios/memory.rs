//! Guest memory of every kind: huge pages, zones and nodes, files that others map, and memory that is added while the guest runs, also
//! under an assigned drive.

use std::time::Duration;

use serde_json::Value;

use super::bad_input::{As, refuse};
use super::steps::{FIRST, IDLE, guest_is_content, vm, wait_for_drive};
use super::{NVME, scenario, with_old_kernels};
use crate::error::{Error, Result, ensure};
use crate::guest::{Guest, VmSpec};
use crate::host::Host;
use crate::rpc::wait_for;
use crate::runner::{Case, Scenario};

/// The VM's control socket, on the host.
const SOCKET: &str = "/run/memory.sock";
/// A kernel for what does not get as far as booting it.
const KERNEL: &str = "--kernel /guest/6.12/vmlinuz --serial null --console off";
/// Where the host's huge pages of 2 MiB are set aside.
const HUGE_PAGES: &str = "/proc/sys/vm/nr_hugepages";
const MIB: u64 = 1 << 20;
/// How long 64 MiB through the emulated drive may take.
const COPY: Duration = Duration::from_secs(180);

pub fn table() -> Vec<Scenario> {
    let mut all = with_old_kernels(scenario(
        "memory_that_is_added_can_be_used_and_stays_over_a_reboot",
        added_and_kept,
    ));
    all.extend([
        scenario("an_assigned_drive_reaches_memory_that_was_added", drive_reaches_added),
        scenario("a_zone_grows_in_its_own_node", zone_grows),
        scenario("the_guest_sees_nodes_with_their_zones_processors_and_distances", nodes),
        scenario("huge_pages_are_taken_and_a_lack_of_them_is_refused", huge_pages),
        scenario("what_the_guest_writes_to_a_shared_zone_is_in_its_file", shared_zone),
        scenario("all_memory_is_there_before_the_guest_runs_if_wanted", prefault),
        scenario("memory_that_cannot_be_had_is_refused_in_one_line", refused),
    ]);
    all
}

fn ctl(host: &Host, words: &str) -> Result<String> {
    host.sh(&format!("dormouse ctl --api-socket {SOCKET} --json {words}"))
}

/// A change that must be refused; what was said.
fn refused_change(host: &Host, words: &str) -> Result<String> {
    let output = host.run(&format!("dormouse ctl --api-socket {SOCKET} {words} 2>&1"))?;
    ensure(output.status != 0, || format!("{words}: accepted: {}", output.text))?;
    Ok(output.text)
}

fn info(host: &Host) -> Result<Value> {
    let text = ctl(host, "info")?;
    serde_json::from_str(&text).map_err(|e| Error::Check(format!("{text}: {e}")))
}

/// Writes so much to the assigned drive, and reads it, that memory which has come (`what`) must have been used for it.
pub(super) fn drive_uses(guest: &Guest<'_>, what: &str) -> Result<()> {
    const FREE: &str = "grep -A1 'zone *Normal' /proc/zoneinfo";
    let free = line(&guest.sh(FREE)?, "pages free")?;
    guest.sh_for("dd if=/dev/urandom of=/run/data bs=1M count=48", COPY)?;
    guest.sh_for(
        "dd if=/run/data of=/dev/nvme0n1 bs=1M conv=fsync && echo 3 >/proc/sys/vm/drop_caches",
        COPY,
    )?;
    let sum =
        |file: &str| guest.sh_for(&format!("dd if={file} bs=1M count=48 2>/dev/null | sha256sum"), COPY);
    let written = sum("/run/data")?;
    // What has been read stays in memory as long as somebody has the drive open.
    let read = guest.sh_for(
        &format!("exec 3</dev/nvme0n1; dd if=/dev/nvme0n1 bs=1M count=48 2>/dev/null | sha256sum; {FREE}"),
        COPY,
    )?;
    ensure(read.starts_with(&written), || format!("wrote {written}, read {read}"))?;
    // Both the file and the pages that the drive was read into.
    let used = free.saturating_sub(line(&read, "pages free")?) * 4 / 1024;
    ensure(used >= 80, || format!("only {used} MiB of the {what} memory were used"))
}

/// A number of `/proc/meminfo`, or of another file with the same lines, in KiB.
pub(super) fn line(text: &str, name: &str) -> Result<u64> {
    let line = text.lines().find_map(|line| line.split_once(name).map(|(_, rest)| rest));
    let number = line.and_then(|rest| rest.trim_start_matches(':').split_whitespace().next()?.parse().ok());
    number.ok_or_else(|| Error::Check(format!("no {name} in {text}")))
}

/// KiB of memory that the guest counts.
pub(super) fn total(guest: &Guest<'_>) -> Result<u64> {
    line(&guest.sh("grep MemTotal /proc/meminfo")?, "MemTotal")
}

/// Brings memory blocks online as `how` says that are not yet, until there are `mib` MiB more than `before` KiB.
fn online(guest: &Guest<'_>, how: &str, before: u64, mib: u64) -> Result<()> {
    wait_for("the guest uses the added memory", IDLE, || {
        guest.sh(&format!(
            "for s in /sys/devices/system/memory/memory*/state; do [ $(cat $s) = online ] || echo {how} >$s; done"
        ))?;
        let now = total(guest)?;
        // What the kernel keeps for itself of it is some 2 %.
        Ok(if now >= before + mib * 1024 * 9 / 10 { Ok(()) } else { Err(format!("{before}, now {now} KiB")) })
    })
}

fn with_api(case: &Case<'_>, slots: &[usize]) -> VmSpec {
    vm(case, slots).options(&format!("--api-socket {SOCKET}"))
}

fn added_and_kept(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let guest = host.start_vm(&with_api(case, &[]).memory("512M,hotplug_size=1G"))?;
    let before = total(&guest)?;
    ctl(host, "resize --memory 768M")?;
    online(&guest, "online", before, 256)?;
    ctl(host, "resize --memory 896M")?;
    online(&guest, "online", before, 384)?;
    let actual = info(host)?["memory_actual_size"].as_u64();
    ensure(actual == Some(896 * MIB), || format!("memory_actual_size is {actual:?}"))?;
    for (words, said) in [
        ("resize --memory 900M", "128 MiB"),
        ("resize --memory 4G", "hotplug_size"),
        ("resize-zone --id mem0 --size 2G", "zone"),
    ] {
        let text = refused_change(host, words)?;
        ensure(text.contains(said), || format!("{words} does not say {said:?}: {text}"))?;
    }
    // Memory that is not there stays so; the guest writes to all that is.
    guest.sh_for("mkdir -p /run/much && mount -t tmpfs -o size=700M much /run/much && dd if=/dev/zero of=/run/much/all bs=1M count=600", COPY)?;
    guest_is_content(&guest)?;

    let mark = guest.mark();
    ctl(host, "reboot")?;
    guest.wait_ready(mark)?;
    let booted = total(&guest)?;
    ensure(booted >= before + 384 * 1024 * 9 / 10, || {
        format!("{before} before, {booted} KiB after the reboot")
    })?;
    ctl(host, "resize --memory 512M")?;
    ensure(total(&guest)? == booted, || "memory has gone from a running guest".to_owned())?;
    let mark = guest.mark();
    ctl(host, "reboot")?;
    guest.wait_ready(mark)?;
    let shrunk = total(&guest)?;
    ensure(shrunk.abs_diff(before) < 1024, || format!("{before} at first, {shrunk} KiB now"))?;
    guest_is_content(&guest)?;
    guest.power_off()
}

/// The drive's data goes to and from the page cache, which the guest's kernel takes from the highest memory there is. Above 4 GiB, in the
/// zone that is called normal, there is only what was added.
fn drive_reaches_added(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let guest = host.start_vm(&with_api(case, &[NVME]).memory("384M,hotplug_size=1G"))?;
    wait_for_drive(&guest)?;
    let before = total(&guest)?;
    // Debian's 6.12 does by itself what this says.
    guest.sh("echo online_kernel >/sys/devices/system/memory/auto_online_blocks")?;
    ctl(host, "resize --memory 896M")?;
    online(&guest, "online_kernel", before, 512)?;
    drive_uses(&guest, "added")?;
    guest_is_content(&guest)?;
    guest.power_off()
}

/// Options for two zones of 256 MiB, each in a node of its own with a processor, `b` with `keys`.
fn two_nodes(keys: &str) -> String {
    format!(
        "--memory-zone id=a,size=256M id=b,size=256M{keys} --numa guest_numa_id=0,cpus=[0],memory_zones=[a],distances=[1@25] \
         guest_numa_id=1,cpus=[1],memory_zones=[b],distances=[0@26]"
    )
}

/// The same VM with a package for each of its two processors: Linux wants no node to end in the middle of what shares a cache.
fn two_packages(mut spec: VmSpec) -> VmSpec {
    spec.command = Some(spec.command().replace("boot=2", "boot=2,topology=1:1:1:2"));
    spec
}

/// Memory of a node, in KiB.
fn of_node(guest: &Guest<'_>, node: u32) -> Result<u64> {
    line(&guest.sh(&format!("grep MemTotal /sys/devices/system/node/node{node}/meminfo"))?, "MemTotal")
}

fn zone_grows(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let spec = with_api(case, &[]).cpus(2).memory("0").options(&two_nodes(",hotplug_size=512M"));
    let guest = host.start_vm(&two_packages(spec))?;
    let (before, of_b) = (total(&guest)?, of_node(&guest, 1)?);
    ctl(host, "resize-zone --id b --size 512M")?;
    online(&guest, "online", before, 256)?;
    let grown = of_node(&guest, 1)?;
    ensure(grown >= of_b + 256 * 1024 * 9 / 10, || format!("node 1 had {of_b} and has {grown} KiB"))?;
    let text = refused_change(host, "resize --memory 1G")?;
    ensure(text.contains("resize-zone"), || text.clone())?;
    let text = refused_change(host, "resize-zone --id none --size 1G")?;
    ensure(text.contains("a, b"), || text.clone())?;
    let actual = info(host)?["memory_actual_size"].as_u64();
    ensure(actual == Some(768 * MIB), || format!("memory_actual_size is {actual:?}"))?;
    // What has been added is a memory device again after a reboot, and nobody has to tell the guest.
    let mark = guest.mark();
    ctl(host, "reboot")?;
    guest.wait_ready(mark)?;
    online(&guest, "online", before, 256)?;
    ensure(of_node(&guest, 1)? >= grown - 4096, || "node 1 has not kept its memory".to_owned())?;
    guest_is_content(&guest)?;
    guest.power_off()
}

fn nodes(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let options = format!("{} guest_numa_id=2,device_id=drive", two_nodes(""));
    let mut spec = vm(case, &[NVME]).cpus(2).memory("0").options(&options);
    spec.devices[0].push_str(",id=drive");
    let guest = host.start_vm(&two_packages(spec))?;
    let read = |file: &str| guest.sh(&format!("cat /sys/devices/system/node/{file}"));
    for (file, wanted) in [
        ("online", "0-2"),
        ("has_memory", "0-1"),
        ("has_cpu", "0-1"),
        ("has_generic_initiator", "2"),
        ("node0/cpulist", "0"),
        ("node1/cpulist", "1"),
        ("node0/distance", "10 25 20"),
        ("node1/distance", "26 10 20"),
    ] {
        let found = read(file)?;
        ensure(found.trim() == wanted, || format!("{file} reads {found} and not {wanted}"))?;
    }
    for node in [0, 1] {
        let memory = of_node(&guest, node)?;
        ensure((150 * 1024..=256 * 1024).contains(&memory), || format!("node {node} has {memory} KiB"))?;
    }
    let node = guest.sh(&format!("cat /sys/bus/pci/devices/{FIRST}/class"))?;
    ensure(node.starts_with("0x0108"), || format!("the drive's class is {node}"))?;
    guest_is_content(&guest)?;
    guest.power_off()
}

fn huge_pages(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let free = || -> Result<u64> {
        let text = host.sh("cat /proc/meminfo")?;
        Ok(line(&text, "HugePages_Free")?.saturating_sub(line(&text, "HugePages_Rsvd")?))
    };
    let result = (|| {
        for keys in ["", ",shared=on"] {
            host.sh(&format!("echo 200 >{HUGE_PAGES}"))?;
            let before = free()?;
            ensure(before == 200, || format!("the host has {before} huge pages"))?;
            let memory = format!("256M,hugepages=on,hugepage_size=2M{keys}");
            let guest = host.start_vm(&vm(case, &[NVME]).memory(&memory))?;
            wait_for_drive(&guest)?;
            let taken = before - free()?;
            ensure(taken == 128, || format!("{taken} huge pages are taken"))?;
            guest_is_content(&guest)?;
            guest.power_off()?;
            ensure(free()? == before, || "huge pages have not come back".to_owned())?;
            host.sh(&format!("echo 100 >{HUGE_PAGES}"))?;
            let words = ["mem0", "128 huge pages of 2048 KiB", "100 are free", "nr_hugepages"];
            refuse(host, As::Root, &format!("{KERNEL} --memory size={memory}"), &words)?;
        }
        let one_gib = format!("{KERNEL} --memory size=1G,hugepages=on,hugepage_size=64K");
        refuse(host, As::Root, &one_gib, &["65536", "2048kB"])
    })();
    host.sh(&format!("echo 0 >{HUGE_PAGES}"))?;
    result
}

fn shared_zone(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    host.sh("truncate -s 256M /run/zone")?;
    // The first zone cannot hold all that is written, wherever in memory the guest's kernel has put itself.
    let zones = "--memory-zone id=a,size=128M id=b,size=256M,file=/run/zone,shared=on";
    let guest = host.start_vm(&vm(case, &[]).memory("0").options(zones))?;
    // The word is put together in the guest, so that the command itself is not what is found.
    guest.sh_for(
        "cd /run; echo dormouse-was-$((6*7)) >a; for n in $(seq 22); do cat a a >b; mv b a; done; cp a c",
        COPY,
    )?;
    // A search in lines is slow where a line is a hundred mebibytes of zeros.
    let found = host.run_for("tr -d '\\000' </run/zone | grep -m 1 -c dormouse-was-42", COPY)?;
    ensure(found.status == 0, || format!("the file has nothing of the guest's: {}", found.text))?;
    guest_is_content(&guest)?;
    guest.power_off()?;
    host.sh("rm /run/zone")?;
    let guest = host.start_vm(&vm(case, &[]).memory("256M,shared=on"))?;
    let maps = host.sh("grep memfd:dormouse-ram /proc/$(cat /run/vmm.pid)/maps")?;
    ensure(maps.contains("rw-s"), || format!("no shared mapping: {maps}"))?;
    guest.power_off()
}

fn prefault(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let guest = host.start_vm(&vm(case, &[]).memory("384M,prefault=on,reserve=on,mergeable=on"))?;
    let resident = line(&host.sh("cat /proc/$(cat /run/vmm.pid)/status")?, "VmRSS")?;
    ensure(resident >= 384 * 1024, || format!("{resident} KiB are resident"))?;
    let merged = host.sh("grep -A25 -i '^Size: *393216' /proc/$(cat /run/vmm.pid)/smaps | grep VmFlags")?;
    ensure(merged.contains(" mg"), || format!("its pages may not be merged: {merged}"))?;
    guest_is_content(&guest)?;
    guest.power_off()
}

fn refused(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let zones = |zones: &str| format!("{KERNEL} --memory size=0 --memory-zone {zones}");
    host.sh("truncate -s 1M /run/short")?;
    for (arguments, words) in [
        (zones("id=a,size=256M,file=/no/such/file,shared=on"), &["a", "/no/such/file", "truncate"][..]),
        (zones("id=a,size=256M,file=/run/short"), &["/run/short", "268435456"]),
        (zones("id=a,size=256M,file=/run"), &["/run", "directory"]),
        (zones("id=a,size=256M id=a,size=256M"), &["id=a", "twice"]),
        (zones("id=a,size=256M,host_numa_node=700"), &["host_numa_node=700"]),
        (
            format!("{} --numa guest_numa_id=0,memory_zones=[b]", zones("id=a,size=256M")),
            &["\"b\"", "there is a"],
        ),
        (format!("{KERNEL} --memory-zone id=a,size=256M"), &["size=0"]),
        (format!("{KERNEL} --memory size=256M,hotplugged_size=128M"), &["hotplug_size"]),
        (format!("{KERNEL} --memory size=256M,hotplug_size=64T"), &["no value"]),
        (format!("{KERNEL} --memory size=256M,hotplug_size=65536G"), &["max_phys_bits"]),
    ] {
        refuse(host, As::Root, &arguments, words)?;
    }
    host.sh("rm /run/short").map(drop)
}
