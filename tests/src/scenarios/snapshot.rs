//! Machines that are saved and go on elsewhere: in another process, with everything that their guests were in the middle of.

use std::time::Duration;

use super::steps::{IDLE, bdf, guest_is_content, vm};
use super::{E1000E, scenario, with_old_kernels};
use crate::error::{Result, ensure};
use crate::guest::{Guest, VmSpec};
use crate::host::Host;
use crate::rpc::{Output, wait_for};
use crate::runner::{Case, Scenario};

/// Where the VMM takes orders.
pub(super) const API: &str = "/run/snap.sock";
/// Where its guest's disk, socket and snapshots are.
pub(super) const PLACE: &str = "/run/snap";
const HOST: &str = "10.9.0.1";
const GUEST: &str = "10.9.0.2";
/// How long the host may take to write or read a snapshot.
const SAVING: Duration = Duration::from_secs(120);

pub fn table() -> Vec<Scenario> {
    let mut all =
        with_old_kernels(scenario("a_guest_goes_on_from_its_snapshot_with_all_its_devices", goes_on));
    all.extend([
        scenario("a_machine_that_has_grown_goes_on_as_large_as_it_was", grown),
        scenario("a_machine_with_an_assigned_device_is_not_saved_until_that_is_removed", assigned),
        scenario("a_snapshot_that_cannot_be_used_is_refused_by_what_is_wrong", refused),
    ]);
    all
}

fn ctl(host: &Host, words: &str) -> Result<Output> {
    host.run_for(&format!("dormouse ctl --timeout 300 --api-socket {API} {words} 2>&1"), SAVING)
}

pub(super) fn order(host: &Host, words: &str) -> Result<String> {
    let output = ctl(host, words)?;
    ensure(output.status == 0, || format!("{words}: {}", output.text))?;
    Ok(output.text)
}

/// What an order that must fail says.
pub(super) fn refusal(host: &Host, words: &str, says: &str) -> Result<()> {
    let output = ctl(host, words)?;
    ensure(output.status == 1 && output.text.contains(says), || {
        format!("{words}: status {}: {}", output.status, output.text)
    })
}

pub(super) fn prepare(host: &Host) -> Result<()> {
    host.sh(&format!("rm -rf {PLACE}; mkdir {PLACE}; truncate -s 64M {PLACE}/disk; modprobe tun")).map(drop)
}

pub(super) fn clean(host: &Host) -> Result<()> {
    host.sh(&format!("rm -rf {PLACE}")).map(drop)
}

/// A small machine with a disk, and a socket for orders.
pub(super) fn with_disk(case: &Case<'_>) -> VmSpec {
    let mut spec = VmSpec::new(case.guest)
        .options(&format!("--api-socket {API} --disk path={PLACE}/disk,image_type=raw"));
    spec.modules = vec!["virtio_pci", "virtio_blk"];
    spec
}

/// Pauses and saves the guest, and ends its VMM.
pub(super) fn save(host: &Host, guest: Guest<'_>, name: &str) -> Result<()> {
    order(host, "pause")?;
    order(host, &format!("snapshot file://{PLACE}/{name}"))?;
    order(host, "shutdown-vmm")?;
    let status = guest.wait_exit()?;
    ensure(status == 0, || format!("the VMM ended with {status}"))
}

/// A VMM that goes on from there, with the guest's agent on the serial port as before.
pub(super) fn restore<'a>(case: &Case<'a>, keys: &str) -> Result<Guest<'a>> {
    let mut spec = VmSpec::new(case.guest);
    spec.command = Some(format!("dormouse --api-socket {API} --restore source_url=file://{PLACE}/{keys}"));
    Guest::launch(case.host, &spec)
}

/// Waits until the VMM has restored the machine.
pub(super) fn wait_state(host: &Host, state: &str) -> Result<()> {
    wait_for(&format!("the VM is {state}"), SAVING, || {
        let ended = host.probe("cat /run/vmm.status /run/vmm.err 2>/dev/null")?;
        ensure(ended.text.is_empty(), || format!("the VMM says: {}", ended.text))?;
        let info = host.probe(&format!("dormouse ctl --api-socket {API} --json info 2>&1"))?;
        Ok(if info.text.contains(&format!("\"state\":\"{state}\"")) { Ok(()) } else { Err(info.text) })
    })
}

/// A process of the guest that counts in a file, and one that writes to its disk and compares what it reads.
const WORK: &str = "(n=0; while echo $((n += 1)) >/tmp/count.new && mv /tmp/count.new /tmp/count; do usleep 20000; done) >/dev/null 2>&1 & \
    (while dd if=/dev/urandom of=/tmp/noise bs=64k count=8 2>/dev/null && dd if=/tmp/noise of=/dev/vda conv=fsync 2>/dev/null; do \
       echo 1 >/proc/sys/vm/drop_caches; cmp -n 524288 /tmp/noise /dev/vda || { echo differs >/tmp/wrong; break; }; echo >>/tmp/rounds; done) \
       >/dev/null 2>&1 & \
    (nice -n 10 sh -c 'while :; do :; done') >/dev/null 2>&1 & echo";

fn count(guest: &Guest<'_>) -> Result<u64> {
    let text = guest.sh("cat /tmp/count")?;
    text.trim().parse().map_err(|e| crate::error::Error::Check(format!("{text:?}: {e}")))
}

/// Everything that the guest did before still works.
fn works(host: &Host, guest: &Guest<'_>, before: u64) -> Result<u64> {
    let now = count(guest)?;
    ensure(now >= before, || format!("the guest had counted to {before} and is at {now}"))?;
    wait_for("the guest counts on", IDLE, || {
        Ok(if count(guest)? > now { Ok(()) } else { Err(format!("it stays at {now}")) })
    })?;
    let rounds = || guest.sh("wc -l </tmp/rounds");
    let done = rounds()?;
    wait_for("the guest's disk works", IDLE, || {
        Ok(if rounds()? != done { Ok(()) } else { Err(guest.sh("dmesg | tail -n 5")?) })
    })?;
    let wrong = guest.run("cat /tmp/wrong")?;
    ensure(wrong.status != 0, || format!("what the guest has written {}", wrong.text))?;
    let kept = guest.sh("cat /tmp/kept | sha256sum; cat /tmp/sum")?;
    let sums: Vec<_> = kept.lines().collect();
    ensure(sums.len() == 2 && sums[0] == sums[1], || format!("memory holds something else: {kept}"))?;
    guest.sh(&format!("ping -c 3 -i 0.2 -W 9 {HOST}"))?;
    host.sh(&format!("ping -c 3 -i 0.2 -W 9 {GUEST}"))?;
    guest.sh("dd if=/dev/hwrng bs=64 count=4 of=/dev/null 2>&1")?;
    wait_for("the guest's socket answers", IDLE, || {
        let echo = format!("(echo CONNECT 52; echo hello) | socat -t 5 - UNIX-CONNECT:{PLACE}/vsock");
        let text = host.run(&echo)?.text;
        Ok(if text.ends_with("\nhello") { Ok(()) } else { Err(text) })
    })?;
    guest.sh("echo to the console >/dev/hvc0")?;
    let clock =
        guest.sh("a=$(cut -d. -f1 /proc/uptime); sleep 2; b=$(cut -d. -f1 /proc/uptime); echo $((b - a))")?;
    ensure(matches!(clock.trim(), "2" | "3"), || format!("two seconds are {clock} of the guest"))?;
    guest_is_content(guest)?;
    count(guest)
}

fn goes_on(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    prepare(host)?;
    let mut spec = VmSpec::new(case.guest).cpus(2).options(&format!(
        "--api-socket {API} --disk path={PLACE}/disk,image_type=raw,num_queues=2 --net tap=tap0,ip={HOST},mask=255.255.255.0,host_mac=02:00:00:00:09:01 \
         --console file={PLACE}/console --vsock cid=9,socket={PLACE}/vsock --balloon size=0 --watchdog --pvpanic"
    ));
    spec.modules = vec![
        "virtio_pci",
        "virtio_blk",
        "virtio_net",
        "virtio_rng",
        "virtio_console",
        "virtio_balloon",
        "vmw_vsock_virtio_transport",
    ];
    let guest = host.start_vm(&spec)?;
    guest.sh(&format!("ip link set eth0 up; ip addr add {GUEST}/24 dev eth0"))?;
    guest.sh("head -c 4000000 /dev/urandom >/tmp/kept; sha256sum </tmp/kept >/tmp/sum")?;
    guest.sh("guest_tool vsock echo 52 >/tmp/echo.52 2>&1 & echo")?;
    guest.sh("touch /tmp/rounds")?;
    guest.sh(WORK)?;
    let mut before = works(host, &guest, 0)?;
    refusal(host, &format!("snapshot file://{PLACE}/one"), "pause it first")?;
    save(host, guest, "one")?;
    let size =
        host.sh(&format!("du -k {PLACE}/one/memory-ranges | cut -f1; ls {PLACE}/one | tr '\\n' ' '"))?;
    ensure(size.trim().ends_with("config.json memory-ranges state.json"), || size.clone())?;
    for (number, (from, keys, to)) in
        [("one", "", "two"), ("two", ",memory_restore_mode=ondemand,resume=on", "three")].iter().enumerate()
    {
        let guest = restore(case, &format!("{from}{keys}"))?;
        if number == 0 {
            wait_state(host, "Paused")?;
            order(host, "resume")?;
        } else {
            wait_state(host, "Running")?;
        }
        before = works(host, &guest, before)?;
        save(host, guest, to)?;
    }
    // The guest reboots where it is, and devices come and go.
    let guest = restore(case, "three,resume=on")?;
    wait_state(host, "Running")?;
    before = works(host, &guest, before)?;
    host.sh(&format!("truncate -s 8M {PLACE}/other"))?;
    order(host, &format!("add-disk path={PLACE}/other,image_type=raw,id=other"))?;
    guest.wait_file("/sys/block/vdb/size", "16384", IDLE)?;
    order(host, "remove-device other")?;
    wait_for("the guest lets go of a disk", IDLE, || {
        let there = guest.probe("test -e /sys/block/vdb")?.status == 0;
        Ok(if there { Err("it is there".to_owned()) } else { Ok(()) })
    })?;
    works(host, &guest, before)?;
    let mark = guest.mark();
    order(host, "reboot")?;
    guest.wait_ready(mark)?;
    guest.sh("test -b /dev/vda")?;
    guest_is_content(&guest)?;
    guest.power_off()?;
    clean(host)
}

fn grown(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    prepare(host)?;
    let mut spec = VmSpec::new(case.guest)
        .cpu_keys(",max=4")
        .memory("512M,hotplug_size=1G")
        .options(&format!("--api-socket {API}"));
    spec.modules = vec!["virtio_pci", "virtio_blk"];
    spec = spec.cmdline("memhp_default_state=online");
    let guest = host.start_vm(&spec)?;
    order(host, "resize --cpus 3 --memory 1024M")?;
    order(host, &format!("add-disk path={PLACE}/disk,image_type=raw,id=late"))?;
    let online = "nproc; awk '/MemTotal/ {print ($2 > 900000)}' /proc/meminfo; cat /sys/block/vda/size";
    let all = |guest: &Guest<'_>| {
        wait_for("the guest has all of it", IDLE, || {
            guest.sh(
                "for c in /sys/devices/system/cpu/cpu[0-9]*/online; do echo 1 >$c 2>/dev/null; done; true",
            )?;
            let seen = guest.run(online)?.text;
            Ok(if seen == "3\n1\n131072" { Ok(()) } else { Err(seen) })
        })
    };
    all(&guest)?;
    guest
        .sh("dd if=/dev/urandom of=/tmp/kept bs=1M count=100 2>/dev/null; sha256sum </tmp/kept >/tmp/sum")?;
    save(host, guest, "a")?;
    let guest = restore(case, "a,resume=on")?;
    wait_state(host, "Running")?;
    all(&guest)?;
    let sums = guest.sh("sha256sum </tmp/kept; cat /tmp/sum")?;
    let sums: Vec<_> = sums.lines().collect();
    ensure(sums.len() == 2 && sums[0] == sums[1], || format!("memory holds something else: {sums:?}"))?;
    // More of both, and back.
    order(host, "resize --cpus 4 --memory 1536M")?;
    wait_for("the guest has more", IDLE, || {
        guest.sh("echo 1 >/sys/devices/system/cpu/cpu3/online; true")?;
        let seen = guest.run("nproc; awk '/MemTotal/ {print ($2 > 1400000)}' /proc/meminfo")?.text;
        Ok(if seen == "4\n1" { Ok(()) } else { Err(seen) })
    })?;
    order(host, "resize --cpus 1")?;
    wait_for("the guest lets go of processors", IDLE, || {
        let seen = guest.run("nproc")?.text;
        Ok(if seen == "1" { Ok(()) } else { Err(seen) })
    })?;
    guest_is_content(&guest)?;
    guest.power_off()?;
    clean(host)
}

fn assigned(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    prepare(host)?;
    let guest = host.start_vm(&VmSpec::new(case.guest).options(&format!("--api-socket {API}")))?;
    let path = format!("/sys/bus/pci/devices/{}", bdf(E1000E));
    order(host, &format!("add-device path={path},id=nic"))?;
    order(host, "pause")?;
    refusal(host, &format!("snapshot file://{PLACE}/one"), "device nic (")?;
    refusal(host, &format!("snapshot file://{PLACE}/one"), &bdf(E1000E))?;
    let left = host.run(&format!("test -e {PLACE}/one"))?;
    ensure(left.status != 0, || "something has been written".to_owned())?;
    order(host, "resume")?;
    guest_is_content(&guest)?;
    order(host, "remove-device nic")?;
    wait_for("the device is gone", IDLE, || {
        let info = order(host, "info --json")?;
        Ok(if info.contains("\"nic\"") { Err(info) } else { Ok(()) })
    })?;
    save(host, guest, "one")?;
    let guest = restore(case, "one,resume=on")?;
    wait_state(host, "Running")?;
    guest_is_content(&guest)?;
    // The device is free for the guest that goes on.
    order(host, &format!("add-device path={path},id=nic"))?;
    wait_for("the guest sees the device", IDLE, || {
        let seen = guest.run("grep -l 0x10d3 /sys/bus/pci/devices/*/device")?;
        Ok(if seen.status == 0 { Ok(()) } else { Err(guest.sh("dmesg | tail -n 5")?) })
    })?;
    guest.power_off()?;
    // One that was there at boot has left its root port.
    let guest = host.start_vm(&vm(case, &[E1000E]).options(&format!("--api-socket {API}")))?;
    order(host, "pause")?;
    refusal(host, &format!("snapshot file://{PLACE}/two"), "is assigned to the VM")?;
    order(host, "resume")?;
    guest.power_off()?;
    clean(host)
}

fn refused(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    prepare(host)?;
    let guest = host.start_vm(&with_disk(case))?;
    order(host, "pause")?;
    for (url, says) in [
        ("/run/x", "file:///"),
        ("http://a/b", "file:///"),
        ("file:///proc/none/x", "/proc/none"),
        ("file:///dev/null", "/dev/null"),
    ] {
        refusal(host, &format!("snapshot {url}"), says)?;
    }
    // A file system without room for it.
    host.sh(&format!("mkdir {PLACE}/small; mount -t tmpfs -o size=1m none {PLACE}/small"))?;
    refusal(host, &format!("snapshot file://{PLACE}/small/s"), "No space left")?;
    let left = host.sh(&format!("ls {PLACE}/small/s | wc -l; umount {PLACE}/small"))?;
    ensure(left.trim() == "0", || format!("{left} files are left"))?;
    order(host, &format!("snapshot file://{PLACE}/one"))?;
    refusal(host, &format!("snapshot file://{PLACE}/one"), "exists")?;
    // It is as it was.
    order(host, "resume")?;
    guest_is_content(&guest)?;
    refusal(host, &format!("restore source_url=file://{PLACE}/one"), "already")?;
    // Its disk is still in use.
    let other = host.run(&format!("dormouse --restore source_url=file://{PLACE}/one,resume=on 2>&1"))?;
    ensure(other.status == 1 && other.text.contains(&format!("{PLACE}/disk")), || other.text.clone())?;
    guest.power_off()?;
    for (keys, says) in [
        ("resume=on", "source_url"),
        (&format!("source_url=file://{PLACE}/none") as &str, "config.json"),
        (&format!("source_url=file://{PLACE}/one,net_fds=[n@[7]]"), "no network device"),
        (&format!("source_url=file://{PLACE}/one,nonsense=1"), "nonsense"),
        (&format!("source_url=file://{PLACE}/one --kernel /k"), "--kernel"),
    ] {
        let output = host.run(&format!("dormouse --restore {keys} 2>&1"))?;
        ensure(
            output.status == 1 && output.text.contains(says) && output.text.trim().lines().count() == 1,
            || format!("{keys}: status {}: {}", output.status, output.text),
        )?;
    }
    let add_disk = format!(
        "truncate -s 1M {PLACE}/z; sed -i 's|\"disks\":\\[|\"disks\":[{{\"path\":\"{PLACE}/z\",\"id\":\"z\"}},|' $d/config.json"
    );
    for (damage, says) in [
        ("truncate -s 100M $d/memory-ranges", "memory-ranges"),
        ("truncate -s 300 $d/state.json", "state.json"),
        ("sed -i 's/\"format\":1/\"format\":99/' $d/state.json", "state.json"),
        ("rm $d/state.json", "state.json"),
        ("sed -i 's/536870912/268435456/' $d/config.json", "memory"),
        (&add_disk, "device z"),
        (&format!("truncate -s 32M {PLACE}/disk"), "67108864"),
    ] {
        host.sh(&format!("d={PLACE}/bad; rm -rf $d; cp -r {PLACE}/one $d; {damage}"))?;
        let output = host.run(&format!("dormouse --restore source_url=file://{PLACE}/bad,resume=on 2>&1"))?;
        ensure(output.status == 1 && output.text.contains(says), || {
            format!("{damage}: status {}: {}", output.status, output.text)
        })?;
    }
    clean(host)
}
