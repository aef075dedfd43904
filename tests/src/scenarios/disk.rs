//! Disks as a guest's own driver has them, and what the host has of them afterwards: contents, room, locks.

use std::time::Duration;

use serde_json::Value;

use super::{scenario, with_old_kernels};
use crate::error::{Error, Result, ensure};
use crate::guest::{Guest, VmSpec};
use crate::host::Host;
use crate::rpc::wait_for;
use crate::runner::{Case, Scenario};

/// Where the VMM answers, and its events.
const SOCKET: &str = "/run/disk.sock";
const EVENTS: &str = "/run/disk.events";
/// Where images are: the host's memory.
pub const PLACE: &str = "/run/disks";
/// How long a guest may take to see a change.
const SOON: Duration = Duration::from_secs(20);
/// An empty qcow2 image of 64 MiB as `qemu-img create` makes it (version 3, clusters of 64 KiB): the header, and where refcount table, refcount
/// block and L1 table are. The host has no tools for such images.
const QCOW2: &[(u32, &[u8])] = &[
    (0, b"QFI\xfb\0\0\0\x03"),
    (20, &[0, 0, 0, 16]),
    (24, &[0, 0, 0, 0, 4, 0, 0, 0]),
    (36, &[0, 0, 0, 1]),
    (40, &[0, 0, 0, 0, 0, 3, 0, 0]),
    (48, &[0, 0, 0, 0, 0, 1, 0, 0]),
    (56, &[0, 0, 0, 1]),
    (96, &[0, 0, 0, 4, 0, 0, 0, 104]),
    (0x1_0000, &[0, 0, 0, 0, 0, 2, 0, 0]),
    (0x2_0000, &[0, 1, 0, 1, 0, 1, 0, 1]),
];

pub fn table() -> Vec<Scenario> {
    let mut all = with_old_kernels(scenario("a_raw_disk_keeps_what_the_guest_writes", raw_disk));
    all.extend(with_old_kernels(scenario("a_qcow2_disk_keeps_what_the_guest_writes", qcow2_disk)));
    all.extend([
        scenario("disks_come_and_go_while_the_guest_runs", come_and_go),
        scenario("a_disk_gets_another_size_while_the_guest_uses_it", resize),
        scenario("a_disk_belongs_to_one_vm_unless_all_only_read_it", locking),
        scenario("a_discard_in_the_guest_gives_room_back_to_the_host", discard),
        scenario("a_full_host_file_system_is_an_io_error_in_the_guest", full),
        scenario("a_rate_limit_and_a_group_slow_disks_down", rate_limit),
        scenario("what_a_guest_has_flushed_survives_the_death_of_the_vmm", sigkill),
        scenario("an_idle_guest_with_disks_wakes_no_thread_of_the_vmm", idle),
    ]);
    all
}

fn spec(case: &Case<'_>, disks: &str) -> VmSpec {
    let mut spec =
        VmSpec::new(case.guest).options(&format!("--api-socket {SOCKET} --event-monitor path={EVENTS}"));
    if !disks.is_empty() {
        spec = spec.options(&format!("--disk {disks}"));
    }
    spec.modules = vec!["virtio_pci", "virtio_blk"];
    spec
}

/// Images of nothing but holes.
fn raw_images(host: &Host, images: &[(&str, &str)]) -> Result<()> {
    host.sh(&format!("rm -rf {PLACE}; mkdir {PLACE}"))?;
    for (name, size) in images {
        host.sh(&format!("truncate -s {size} {PLACE}/{name}"))?;
    }
    Ok(())
}

/// An empty qcow2 image of this name in [`PLACE`].
pub fn qcow2_image(host: &Host, name: &str) -> Result<()> {
    host.sh(&format!("mkdir -p {PLACE}; rm -f {PLACE}/{name}; truncate -s 256K {PLACE}/{name}"))?;
    for (at, bytes) in QCOW2 {
        let bytes: String = bytes.iter().map(|byte| format!("\\{byte:03o}")).collect();
        host.sh(&format!("printf '{bytes}' | dd of={PLACE}/{name} bs=1 seek={at} conv=notrunc 2>/dev/null"))?;
    }
    Ok(())
}

fn ctl(host: &Host, words: &str) -> Result<String> {
    host.sh(&format!("dormouse ctl --api-socket {SOCKET} --json {words}"))
}

fn ctl_json(host: &Host, words: &str) -> Result<Value> {
    let reply = ctl(host, words)?;
    serde_json::from_str(&reply).map_err(|e| Error::Check(format!("{reply}: {e}")))
}

/// A number that a command prints.
fn number(text: &str) -> Result<u64> {
    text.trim().parse().map_err(|e| Error::Check(format!("{text:?} is no number: {e}")))
}

/// Bytes that a file takes on the host.
fn room(host: &Host, name: &str) -> Result<u64> {
    Ok(number(&host.sh(&format!("stat -c %b {PLACE}/{name}"))?)? * 512)
}

fn end(host: &Host, guest: Guest<'_>) -> Result<()> {
    guest.power_off()?;
    host.sh(&format!("rm -rf {PLACE} {EVENTS}")).map(drop)
}

/// Writes `megabytes` of noise at `skip` MiB and returns its sum as the guest reads it back past its cache.
fn write_and_sum(guest: &Guest<'_>, disk: &str, skip: u32, megabytes: u32) -> Result<String> {
    guest.sh(&format!(
        "dd if=/dev/urandom of=/run/noise bs=1M count={megabytes} 2>/dev/null && \
         dd if=/run/noise of={disk} bs=1M seek={skip} conv=fsync,notrunc 2>/dev/null && echo 3 >/proc/sys/vm/drop_caches"
    ))?;
    let written = guest.sh("sha256sum </run/noise")?;
    let read =
        guest.sh(&format!("dd if={disk} bs=1M skip={skip} count={megabytes} 2>/dev/null | sha256sum"))?;
    ensure(written == read, || format!("{disk}: wrote {written}, read {read}"))?;
    Ok(written.trim().to_owned())
}

fn raw_disk(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    raw_images(host, &[("a", "32M"), ("b", "16M")])?;
    let disks = format!(
        "path={PLACE}/a,image_type=raw,serial=first-disk,num_queues=2 path={PLACE}/b,image_type=raw,readonly=on"
    );
    let guest = host.start_vm(&spec(case, &disks).cpus(2))?;
    let seen = guest.sh(
        "cat /sys/block/vda/serial; echo; cat /sys/block/vda/size /sys/block/vdb/ro; ls /sys/block/vda/mq | wc -l",
    )?;
    ensure(seen.split_whitespace().eq(["first-disk", "65536", "1", "2"]), || {
        format!("the guest sees {seen}")
    })?;
    let sum = write_and_sum(&guest, "/dev/vda", 3, 8)?;
    let there = host.sh(&format!("dd if={PLACE}/a bs=1M skip=3 count=8 2>/dev/null | sha256sum"))?;
    ensure(there.trim() == sum, || format!("the image has {there} and not {sum}"))?;
    let refused = guest.run("dd if=/dev/urandom of=/dev/vdb bs=4096 count=1 conv=fsync 2>&1")?;
    ensure(refused.status != 0, || "a readonly disk was written".to_owned())?;
    let nothing = host.sh(&format!("tr -d '\\0' <{PLACE}/b | wc -c"))?;
    ensure(number(&nothing)? == 0, || format!("{nothing} bytes of a readonly disk"))?;
    let counters = ctl_json(host, "counters")?;
    let bytes = counters["_disk0"]["write_bytes"].as_u64().unwrap_or(0);
    ensure(bytes == 8 << 20, || format!("counters: {counters}"))?;
    let threads = host.sh("cat /proc/$(cat /run/vmm.pid)/task/*/comm")?;
    for name in ["_disk0_q0", "_disk0_q1", "_disk1_q0"] {
        ensure(threads.lines().any(|line| line == name), || format!("threads: {threads}"))?;
    }
    end(host, guest)
}

fn qcow2_disk(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    raw_images(host, &[])?;
    qcow2_image(host, "q")?;
    let sum = {
        // It is found out what the image is.
        let guest = host.start_vm(&spec(case, &format!("path={PLACE}/q")))?;
        let size = guest.sh("cat /sys/block/vda/size")?;
        ensure(size.trim() == "131072", || format!("{size} sectors"))?;
        let sum = write_and_sum(&guest, "/dev/vda", 5, 8)?;
        guest.power_off()?;
        sum
    };
    let guest = host.start_vm(&spec(case, &format!("path={PLACE}/q,image_type=qcow2")))?;
    let read = guest.sh("dd if=/dev/vda bs=1M skip=5 count=8 2>/dev/null | sha256sum")?;
    ensure(read.trim() == sum, || format!("after a restart {read} and not {sum}"))?;
    let rest = guest.sh("dd if=/dev/vda bs=1M skip=13 2>/dev/null | tr -d '\\0' | wc -c")?;
    ensure(number(&rest)? == 0, || format!("{rest} bytes where nothing was written"))?;
    end(host, guest)
}

fn come_and_go(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    raw_images(host, &[("a", "16M"), ("b", "16M")])?;
    qcow2_image(host, "q")?;
    let guest = host.start_vm(&spec(case, &format!("path={PLACE}/a,image_type=raw")))?;
    for (image, sectors, keys) in [
        ("b", "32768", "image_type=raw,direct=on"),
        ("q", "131072", "image_type=qcow2"),
        ("b", "32768", "image_type=raw,_disable_io_uring=on"),
    ] {
        let added = ctl_json(host, &format!("add-disk path={PLACE}/{image},id=extra,{keys}"))?;
        let bdf = added["bdf"].as_str().unwrap_or_default().to_owned();
        ensure(added["id"] == "extra" && bdf.starts_with("0000:00:"), || format!("added as {added}"))?;
        guest.wait_file("/sys/block/vdb/size", sectors, SOON)?;
        write_and_sum(&guest, "/dev/vdb", 1, 4)?;
        let again = host.run(&format!(
            "dormouse ctl --api-socket {SOCKET} add-disk path={PLACE}/{image},id=twice,image_type=raw"
        ))?;
        ensure(again.status != 0 && again.text.contains("in use by another disk of this machine"), || {
            again.text.clone()
        })?;
        ctl(host, "remove-device extra")?;
        wait_for("the disk is removed", SOON, || {
            let there = guest.run("test -e /sys/block/vdb")?;
            let locked =
                host.run(&format!("ls -l /proc/$(cat /run/vmm.pid)/fd | grep -q {PLACE}/{image}"))?;
            Ok(if there.status != 0 && locked.status != 0 { Ok(()) } else { Err("still there".to_owned()) })
        })?;
    }
    let unknown = host.run(&format!("dormouse ctl --api-socket {SOCKET} remove-device extra"))?;
    ensure(unknown.status != 0, || "a disk that is gone was removed".to_owned())?;
    write_and_sum(&guest, "/dev/vda", 1, 4)?;
    end(host, guest)
}

fn resize(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    raw_images(host, &[("a", "16M")])?;
    qcow2_image(host, "q")?;
    let guest = host.start_vm(&spec(
        case,
        &format!("path={PLACE}/a,image_type=raw,id=root path={PLACE}/q,image_type=qcow2"),
    ))?;
    for (id, disk, size, sectors) in
        [("root", "vda", "24M", 49152), ("_disk0", "vdb", "80M", 163_840), ("root", "vda", "8M", 16384)]
    {
        ctl(host, &format!("resize-disk --disk {id} --size {size}"))?;
        wait_for("the guest sees the new size", SOON, || {
            let now = guest.sh(&format!("cat /sys/block/{disk}/size"))?;
            Ok(if now.trim() == sectors.to_string() {
                Ok(())
            } else {
                Err(format!("{} sectors", now.trim()))
            })
        })?;
    }
    write_and_sum(&guest, "/dev/vdb", 70, 8)?;
    let size = host.sh(&format!("stat -c %s {PLACE}/a"))?;
    ensure(number(&size)? == 8 << 20, || format!("the file has {size} bytes"))?;
    for (words, expected) in [
        ("--disk nobody --size 1M", "no device \"nobody\""),
        ("--disk root --size 1000", "whole number of sectors"),
    ] {
        let refused = host.run(&format!("dormouse ctl --api-socket {SOCKET} resize-disk {words}"))?;
        ensure(refused.status != 0 && refused.text.contains(expected), || refused.text.clone())?;
    }
    end(host, guest)
}

fn locking(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    raw_images(host, &[("a", "16M"), ("b", "16M")])?;
    let disks = format!("path={PLACE}/a,image_type=raw path={PLACE}/b,image_type=raw,readonly=on");
    let guest = host.start_vm(&spec(case, &disks))?;
    let second = |disk: &str| {
        host.run(&format!(
            "timeout 20 dormouse --kernel /guest/{}/vmlinuz --disk {disk} 2>&1",
            case.guest.name()
        ))
    };
    for keys in ["image_type=raw", "image_type=raw,readonly=on", "image_type=raw,lock_granularity=full"] {
        let refused = second(&format!("path={PLACE}/a,{keys}"))?;
        ensure(
            refused.status == 1
                && refused.text.contains("in use by process")
                && refused.text.contains("dormouse"),
            || format!("{keys}: status {}: {}", refused.status, refused.text),
        )?;
    }
    let refused = second(&format!("path={PLACE}/b,image_type=raw"))?;
    ensure(refused.status == 1 && refused.text.contains("locked for writing"), || refused.text.clone())?;
    let shared = second(&format!("path={PLACE}/b,image_type=raw,readonly=on"))?;
    ensure(!shared.text.contains("in use"), || shared.text.clone())?;
    write_and_sum(&guest, "/dev/vda", 1, 2)?;
    end(host, guest)
}

fn discard(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    raw_images(host, &[("a", "64M")])?;
    qcow2_image(host, "q")?;
    let guest = host
        .start_vm(&spec(case, &format!("path={PLACE}/a,image_type=raw path={PLACE}/q,image_type=qcow2")))?;
    for (disk, image) in [("/dev/vda", "a"), ("/dev/vdb", "q")] {
        write_and_sum(&guest, disk, 0, 16)?;
        let before = room(host, image)?;
        guest.sh(&format!("blkdiscard -o 4194304 -l 8388608 {disk}; sync"))?;
        let after = room(host, image)?;
        ensure(after + (8 << 20) <= before + (256 << 10), || {
            format!("{image}: {before} bytes before, {after} after")
        })?;
    }
    end(host, guest)
}

fn full(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    host.sh(&format!(
        "rm -rf {PLACE}; mkdir {PLACE}; mount -t tmpfs -o size=4M none {PLACE}; truncate -s 32M {PLACE}/a"
    ))?;
    let guest = host.start_vm(&spec(case, &format!("path={PLACE}/a,image_type=raw")))?;
    let result = guest.run("dd if=/dev/zero of=/dev/vda bs=1M count=16 conv=fsync 2>&1")?;
    ensure(result.status != 0, || format!("16 MiB fit into 4: {}", result.text))?;
    let log = host.sh("grep -c 'failed, and the guest is told so' /run/vmm.log || true")?;
    ensure((1..=3).contains(&number(&log)?), || format!("{log} lines about it in the log"))?;
    // The guest gives room back and goes on.
    guest.sh("blkdiscard /dev/vda && dd if=/dev/zero of=/dev/vda bs=1M count=2 conv=fsync 2>/dev/null")?;
    let name = host.sh(&format!("rm {PLACE}/a; ls {PLACE} | wc -l"))?;
    ensure(number(&name)? == 0, || "the image is not gone".to_owned())?;
    write_and_sum(&guest, "/dev/vda", 0, 1)?;
    guest.power_off()?;
    host.sh(&format!("umount {PLACE}; rm -rf {PLACE} {EVENTS}")).map(drop)
}

/// Seconds, in hundredths, that a command takes in the guest.
fn hundredths(guest: &Guest<'_>, command: &str) -> Result<u64> {
    let text = guest.sh(&format!(
        "read a b </proc/uptime; {command} >/dev/null 2>&1; read c d </proc/uptime; echo $(( ${{c%.*}}${{c#*.}} - ${{a%.*}}${{a#*.}} ))"
    ))?;
    number(&text)
}

fn rate_limit(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    raw_images(host, &[("a", "16M"), ("b", "16M"), ("c", "16M")])?;
    let limit = "bw_size=1048576,bw_refill_time=1000";
    let disks = format!(
        "path={PLACE}/a,image_type=raw,{limit} path={PLACE}/b,image_type=raw,rate_limit_group=g \
         path={PLACE}/c,image_type=raw,rate_limit_group=g --rate-limit-group id=g,{limit}"
    );
    let guest = host.start_vm(&spec(case, &disks))?;
    let read = |disk: &str| format!("dd if=/dev/{disk} of=/dev/null bs=256K count=16 iflag=direct");
    // Four MiB, of which one is free.
    let own = hundredths(&guest, &read("vda"))?;
    ensure((250..=900).contains(&own), || format!("4 MiB at 1 MiB/s took {own} hundredths"))?;
    let shared = hundredths(&guest, &format!("({} & {}; wait)", read("vdb"), read("vdc")))?;
    ensure((600..=1600).contains(&shared), || format!("8 MiB at 1 MiB/s took {shared} hundredths"))?;
    end(host, guest)
}

fn sigkill(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    raw_images(host, &[("raw", "32M")])?;
    qcow2_image(host, "q")?;
    for (image, keys) in [("raw", "image_type=raw"), ("q", "image_type=qcow2")] {
        let guest = host.start_vm(&spec(case, &format!("path={PLACE}/{image},{keys}")))?;
        // Each block says its number, and the console says so when it is flushed.
        guest.sh(
            "(n=0; while [ $n -lt 4000 ]; do n=$((n+1)); \
             printf '%07d\\n' $n | dd of=/dev/vda bs=4096 seek=$n conv=notrunc,fsync,sync 2>/dev/null && echo $n >/run/last && mv /run/last /run/flushed; \
             done) </dev/null >/dev/null 2>&1 &",
        )?;
        wait_for("some blocks are flushed", SOON, || {
            let n = guest.sh("cat /run/flushed 2>/dev/null || echo 0")?;
            Ok(if number(&n)? > 50 { Ok(()) } else { Err(n) })
        })?;
        let flushed = number(&guest.sh("cat /run/flushed")?)?;
        host.sh("kill -9 $(cat /run/vmm.pid)")?;
        let _ = guest.wait_exit()?;
        drop(guest);
        let guest = host.start_vm(&spec(case, &format!("path={PLACE}/{image},{keys}")))?;
        let text = guest.sh(&format!(
            "n=0; while [ $n -lt {flushed} ]; do n=$((n+1)); \
             l=$(dd if=/dev/vda bs=4096 skip=$n count=1 2>/dev/null | head -n1); \
             [ \"$l\" = $(printf '%07d' $n) ] || {{ echo block $n has \"$l\"; exit 0; }}; done; echo all"
        ))?;
        ensure(text.trim() == "all", || format!("{image}: of {flushed} flushed: {text}"))?;
        guest.power_off()?;
    }
    host.sh(&format!("rm -rf {PLACE} {EVENTS}")).map(drop)
}

fn idle(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    raw_images(host, &[("a", "16M"), ("b", "16M")])?;
    qcow2_image(host, "q")?;
    let disks = format!(
        "path={PLACE}/a,image_type=raw,ops_size=1000,ops_refill_time=100 path={PLACE}/b,image_type=raw,readonly=on path={PLACE}/q,image_type=qcow2"
    );
    let guest = host.start_vm(&spec(case, &disks))?;
    write_and_sum(&guest, "/dev/vda", 1, 2)?;
    write_and_sum(&guest, "/dev/vdc", 1, 2)?;
    // Workers of io_uring leave after five seconds without work.
    std::thread::sleep(Duration::from_secs(8));
    let wakes = || {
        host.sh("cd /proc/$(cat /run/vmm.pid)/task; for t in *; do read n <$t/comm; case $n in _disk*) \
             grep -h ^voluntary_ctxt_switches $t/status;; esac; done")
    };
    let before = wakes()?;
    ensure(before.lines().count() == 3, || format!("threads: {before}"))?;
    std::thread::sleep(Duration::from_secs(5));
    let after = wakes()?;
    ensure(before == after, || format!("woken while idle: {before} then {after}"))?;
    end(host, guest)
}
