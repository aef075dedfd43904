//! Snapshots of machines to which much was added: memory of either kind, persistent memory, disks in two PCI segments. All of it goes on where the
//! machine is restored, can grow and shrink there, and outlives a reboot.

use std::time::Duration;

use serde_json::Value;

use super::memory::line;
use super::on;
use super::snapshot::{API, PLACE, clean, order, prepare, refusal, restore, save, wait_state, with_disk};
use super::steps::{IDLE, guest_is_content};
use crate::error::{Error, Result, ensure};
use crate::guest::{Guest, VmSpec};
use crate::host::Host;
use crate::rpc::wait_for;
use crate::runner::{Case, Scenario};
use crate::spec::HostSpec;

const MIB: u64 = 1 << 20;
/// For what takes long in an emulated machine.
const LONG: Duration = Duration::from_secs(180);
/// The persistent memory's file.
const IMAGE: &str = "/run/snap/pmem";

pub fn table() -> Vec<Scenario> {
    let host = || HostSpec::new(&[]);
    vec![
        on(host(), "what_a_guest_has_plugged_goes_on_from_its_snapshot", plugged),
        on(host(), "what_a_guest_has_plugged_in_a_zone_goes_on_from_its_snapshot", plugged_zone),
        on(host(), "memory_that_was_added_with_data_in_it_goes_on_from_its_snapshot", added),
        on(host(), "a_second_machine_from_the_same_snapshot_is_refused_the_disk_of_the_first", second),
        on(host(), "a_tap_that_a_restored_machine_makes_has_the_link_address_of_the_old_one", link_address),
    ]
}

/// How a machine is given more memory.
struct Growth {
    /// Keys of `--memory`, and what else is to be said.
    memory: &'static str,
    options: &'static str,
    /// What asks for a size in MiB: before and after it.
    resize: &'static str,
    /// The device that plugs it, if one does: such memory can go again.
    device: Option<&'static str>,
    /// MiB that are asked for: at first, before the snapshot, and after it.
    sizes: [u64; 3],
}

fn plugged(case: &Case<'_>) -> Result<()> {
    goes_on(
        case,
        &Growth {
            memory: "512M,hotplug_size=1G,hotplug_method=virtio-mem",
            options: "",
            resize: "resize --memory",
            device: Some("mem0"),
            sizes: [512, 768, 1152],
        },
    )
}

fn plugged_zone(case: &Case<'_>) -> Result<()> {
    goes_on(
        case,
        &Growth {
            memory: "0,hotplug_method=virtio-mem",
            options: "--memory-zone id=a,size=384M id=b,size=128M,hotplug_size=1G",
            resize: "resize-zone --id b --size",
            device: Some("b"),
            sizes: [128, 384, 768],
        },
    )
}

fn added(case: &Case<'_>) -> Result<()> {
    goes_on(
        case,
        &Growth {
            memory: "512M,hotplug_size=1G",
            options: "",
            resize: "resize --memory",
            device: None,
            sizes: [512, 768, 1152],
        },
    )
}

impl Growth {
    /// Asks for a size, and waits until the guest has that much more than the `least` KiB that it began with.
    fn ask(&self, host: &Host, guest: &Guest<'_>, mib: u64, least: u64) -> Result<()> {
        order(host, &format!("{} {mib}M", self.resize))?;
        self.has(host, guest, mib, least)
    }

    fn has(&self, host: &Host, guest: &Guest<'_>, mib: u64, least: u64) -> Result<()> {
        let more = mib - self.sizes[0];
        wait_for(&format!("the guest has {more} MiB more"), LONG, || {
            let now = line(&guest.probe("cat /proc/meminfo")?.text, "MemTotal")?;
            if now < least + more * 1024 * 9 / 10 || now > least + (more + 16) * 1024 {
                return Ok(Err(format!("{least} KiB at first, {now} KiB now")));
            }
            let Some(device) = self.device else { return Ok(Ok(())) };
            let bytes = counters(host)?[device]["plugged_bytes"].as_u64();
            Ok(if bytes == Some(more * MIB) { Ok(()) } else { Err(format!("{bytes:?} bytes are plugged")) })
        })
    }
}

fn counters(host: &Host) -> Result<Value> {
    let text = order(host, "counters --json")?;
    serde_json::from_str(&text).map_err(|e| Error::Check(format!("{text}: {e}")))
}

/// Fills the memory that has come: pages of files are taken from there first, since it is the only one that is movable. Two files of noise, many times.
fn fill(guest: &Guest<'_>) -> Result<()> {
    const USED: &str = "grep -A1 'zone *Movable' /proc/zoneinfo";
    let free = line(&guest.sh(USED)?, "pages free")?;
    guest.sh_for(
        "mkdir -p /run/much && mount -t tmpfs -o size=300M much /run/much && cd /run/much && head -c 4194304 /dev/urandom >0 && \
         for n in $(seq 47); do cp 0 $n; done",
        LONG,
    )?;
    let used = free.saturating_sub(line(&guest.sh(USED)?, "pages free")?) * 4 / 1024;
    ensure(used >= 150, || format!("only {used} MiB of the memory that has come were used"))
}

/// Nothing of that has changed.
fn filled(guest: &Guest<'_>) -> Result<()> {
    let text = guest.sh_for("cd /run/much; for n in $(seq 47); do cmp 0 $n; done 2>&1", LONG)?;
    ensure(text.is_empty(), || format!("memory holds something else: {text}"))
}

/// Writes noise; its sum as it is read past the cache.
fn write(guest: &Guest<'_>, disk: &str) -> Result<String> {
    guest.sh_for(
        &format!("head -c 6291456 /dev/urandom >/run/noise && dd if=/run/noise of={disk} bs=1M conv=fsync,notrunc 2>/dev/null"),
        LONG,
    )?;
    let (written, read) = (guest.sh_for("sha256sum </run/noise", LONG)?, sum(guest, disk)?);
    ensure(written == read, || format!("{disk}: wrote {written}, read {read}"))?;
    Ok(read)
}

fn sum(guest: &Guest<'_>, file: &str) -> Result<String> {
    let command =
        format!("echo 3 >/proc/sys/vm/drop_caches; dd if={file} bs=1M count=6 2>/dev/null | sha256sum");
    guest.sh_for(&command, LONG)
}

/// Adds a disk of the host's file of that name, and waits for it.
fn add_disk(host: &Host, guest: &Guest<'_>, name: &str, keys: &str, block: &str) -> Result<()> {
    host.sh(&format!("truncate -s 16M {PLACE}/{name}"))?;
    order(host, &format!("add-disk path={PLACE}/{name},image_type=raw,id={name}{keys}"))?;
    guest.wait_file(&format!("/sys/block/{block}/size"), "32768", IDLE)
}

fn mount_pmem(guest: &Guest<'_>) -> Result<()> {
    wait_for("the guest has persistent memory", IDLE, || {
        let there = guest.probe("test -b /dev/pmem0")?;
        Ok(if there.status == 0 { Ok(()) } else { Err("not yet".to_owned()) })
    })?;
    guest.sh("mkdir -p /mnt && mount -t ext4 -o dax /dev/pmem0 /mnt").map(drop)
}

fn goes_on(case: &Case<'_>, growth: &Growth) -> Result<()> {
    let host = case.host;
    prepare(host)?;
    host.sh(&format!("truncate -s 32M {IMAGE} && mkfs.ext4 -q -F -b 4096 {IMAGE}"))?;
    let [first, before, after] = growth.sizes;
    let mut spec = VmSpec::new(case.guest)
        .memory(growth.memory)
        .options(&format!(
            "--api-socket {API} --platform num_pci_segments=2 {} --disk path={PLACE}/disk,image_type=raw,pci_segment=1 \
             --rng src=/dev/urandom,pci_segment=1 --pmem file={IMAGE},pci_segment=1",
            growth.options
        ))
        .cmdline("memhp_default_state=online_movable");
    spec.modules = vec![
        "virtio_pci",
        "virtio_mem",
        "virtio_pmem",
        "nd_pmem",
        "virtio_blk",
        "virtio_rng",
        "ext4",
        "crc32c_generic",
    ];
    let guest = host.start_vm(&spec)?;
    let least = line(&guest.sh("cat /proc/meminfo")?, "MemTotal")?;
    growth.ask(host, &guest, before, least)?;
    fill(&guest)?;
    mount_pmem(&guest)?;
    add_disk(host, &guest, "far", ",pci_segment=1", "vdb")?;
    add_disk(host, &guest, "near", "", "vdc")?;
    let sums = ["/dev/vda", "/dev/vdb", "/dev/vdc", "/mnt/data"]
        .into_iter()
        .map(|disk| Ok((disk, write(&guest, disk)?)))
        .collect::<Result<Vec<_>>>()?;
    let same = |guest: &Guest<'_>| -> Result<()> {
        for (disk, written) in &sums {
            let read = sum(guest, disk)?;
            ensure(read == *written, || format!("{disk}: wrote {written}, read {read}"))?;
        }
        guest.sh("dd if=/dev/hwrng bs=64 count=4 of=/dev/null 2>&1").map(drop)
    };
    save(host, guest, "one")?;
    let guest = restore(case, "one,resume=on")?;
    wait_state(host, "Running")?;
    growth.has(host, &guest, before, least)?;
    filled(&guest)?;
    same(&guest)?;

    // All of it works on: more memory, less where that can be, other disks.
    growth.ask(host, &guest, after, least)?;
    if growth.device.is_some() {
        growth.ask(host, &guest, before, least)?;
        growth.ask(host, &guest, after, least)?;
    }
    filled(&guest)?;
    order(host, "remove-device far")?;
    wait_for("the guest lets go of a disk", IDLE, || {
        let there = guest.probe("test -e /sys/block/vdb")?.status == 0;
        Ok(if there { Err("it is there".to_owned()) } else { Ok(()) })
    })?;
    add_disk(host, &guest, "new", ",pci_segment=1", "vdb")?;
    for disk in ["/dev/vda", "/dev/vdb", "/dev/vdc", "/mnt/data"] {
        write(&guest, disk)?;
    }
    guest_is_content(&guest)?;

    // Once more, from a machine that was restored itself, with what is read when it is touched.
    save(host, guest, "two")?;
    let guest = restore(case, "two,resume=on,memory_restore_mode=ondemand")?;
    wait_state(host, "Running")?;
    growth.has(host, &guest, after, least)?;
    filled(&guest)?;
    if growth.device.is_some() {
        guest.sh("umount /run/much")?;
        growth.ask(host, &guest, first, least)?;
        growth.ask(host, &guest, before, least)?;
    }
    let written = write(&guest, "/mnt/data")?;
    guest.sh("umount /mnt")?;
    guest_is_content(&guest)?;

    let mark = guest.mark();
    order(host, "reboot")?;
    guest.wait_ready(mark)?;
    // What was added has become memory like any other; what was plugged is plugged anew.
    wait_for("the guest has its memory after the reboot", LONG, || {
        let now = line(&guest.probe("cat /proc/meminfo")?.text, "MemTotal")?;
        let wanted = if growth.device.is_some() { before } else { after } - first;
        Ok(if now >= least + wanted * 1024 * 9 / 10 {
            Ok(())
        } else {
            Err(format!("{least}, now {now} KiB"))
        })
    })?;
    mount_pmem(&guest)?;
    let read = sum(&guest, "/mnt/data")?;
    ensure(read == written, || format!("persistent memory: wrote {written}, read {read}"))?;
    for disk in ["/dev/vda", "/dev/vdb", "/dev/vdc"] {
        write(&guest, disk)?;
    }
    guest_is_content(&guest)?;
    guest.power_off()?;
    clean(host)
}

/// Two VMMs, one snapshot: the disk belongs to the first of them.
fn second(case: &Case<'_>) -> Result<()> {
    const OTHER: &str = "/run/snap/other.sock";
    let host = case.host;
    prepare(host)?;
    let guest = host.start_vm(&with_disk(case))?;
    guest.sh("echo remembered >/tmp/word")?;
    save(host, guest, "one")?;
    let guest = restore(case, "one,resume=on")?;
    wait_state(host, "Running")?;
    let busy = guest.begin(
        "for n in $(seq 20); do head -c 1048576 /dev/urandom >/tmp/noise; dd if=/tmp/noise of=/dev/vda conv=fsync 2>/dev/null; \
         echo 1 >/proc/sys/vm/drop_caches; cmp -n 1048576 /tmp/noise /dev/vda || exit 1; done",
    )?;
    let refused =
        host.run(&format!("dormouse --restore source_url=file://{PLACE}/one,resume=on 2>&1 </dev/null"))?;
    let clear = |text: &str| text.contains(&format!("{PLACE}/disk")) && text.contains("in use by process");
    ensure(refused.status == 1 && clear(&refused.text), || format!("{}: {}", refused.status, refused.text))?;
    // A VMM that waits for orders lives on without a VM, and takes the machine once the disk is another one.
    host.sh(&format!("(dormouse --api-socket {OTHER} >/run/snap/other.log 2>&1 </dev/null &)"))?;
    let ask =
        |words: &str| host.run(&format!("dormouse ctl --timeout 300 --api-socket {OTHER} {words} 2>&1"));
    wait_for("the second VMM answers", IDLE, || {
        let answer = ask("ping")?;
        Ok(if answer.status == 0 { Ok(()) } else { Err(answer.text) })
    })?;
    let refused = ask(&format!("restore source_url=file://{PLACE}/one,resume=on"))?;
    ensure(refused.status == 1 && clear(&refused.text), || format!("{}: {}", refused.status, refused.text))?;
    host.sh(&format!(
        "cp {PLACE}/disk {PLACE}/copy; cp -r {PLACE}/one {PLACE}/two; sed -i 's|{PLACE}/disk|{PLACE}/copy|; s/\"mode\":\"Tty\"/\"mode\":\"Null\"/' {PLACE}/two/config.json"
    ))?;
    let restored =
        ask(&format!("restore source_url=file://{PLACE}/two,resume=on,memory_restore_mode=ondemand"))?;
    ensure(restored.status == 0, || restored.text.clone())?;
    let info = ask("info --json")?;
    ensure(info.text.contains("\"state\":\"Running\""), || info.text.clone())?;
    let done = guest.finish(&busy, LONG)?;
    ensure(done.status == 0, || format!("the first machine's disk: {}", done.text))?;
    ensure(guest.sh("cat /tmp/word")? == "remembered", || {
        "the first machine's memory is another".to_owned()
    })?;
    let ended = ask("shutdown-vmm")?;
    ensure(ended.status == 0, || ended.text.clone())?;
    // The first machine's guest ends it as any other.
    refusal(host, &format!("restore source_url=file://{PLACE}/one"), "already")?;
    guest_is_content(&guest)?;
    guest.power_off()?;
    clean(host)
}

/// The guest still has the host's old address among its neighbours, and must not notice.
fn link_address(case: &Case<'_>) -> Result<()> {
    const GUEST: &str = "10.9.0.2";
    let host = case.host;
    prepare(host)?;
    let mut spec = VmSpec::new(case.guest).options(&format!(
        "--api-socket {API} --net tap=tap0,ip=10.9.0.1,mask=255.255.255.0 ip=10.9.1.1,mask=255.255.255.0,vhost=auto"
    ));
    spec.modules = vec!["virtio_pci", "virtio_net"];
    let guest = host.start_vm(&spec)?;
    guest.sh(&format!("ip link set eth0 up; ip addr add {GUEST}/24 dev eth0"))?;
    guest.sh("ping -c 1 -W 9 10.9.0.1")?;
    // For good, so that there is no looking for another.
    let addresses = || host.sh("cat /sys/class/net/tap0/address /sys/class/net/vmtap0/address");
    let mut known = addresses()?;
    guest.sh(&format!("arp -i eth0 -s 10.9.0.1 {}", known.lines().next().unwrap_or_default()))?;
    let mut from = "one";
    save(host, guest, from)?;
    for to in ["two", "three"] {
        let guest = restore(case, &format!("{from},resume=on"))?;
        wait_state(host, "Running")?;
        let now = addresses()?;
        ensure(now == known, || format!("the taps had {known} and have {now}"))?;
        guest.sh("ping -c 3 -i 0.2 -W 9 10.9.0.1")?;
        host.sh(&format!("ping -c 3 -i 0.2 -W 9 {GUEST}"))?;
        save(host, guest, to)?;
        from = to;
    }
    // What somebody wants it to have goes before.
    host.sh(&format!("sed -i 's/\"tap\":\"tap0\"/\"tap\":\"tap0\",\"host_mac\":\"02:00:00:00:09:07\"/' {PLACE}/{from}/config.json"))?;
    let guest = restore(case, &format!("{from},resume=on"))?;
    wait_state(host, "Running")?;
    known.replace_range(..17, "02:00:00:00:09:07");
    let now = addresses()?;
    ensure(now == known, || format!("the taps are to have {known} and have {now}"))?;
    guest_is_content(&guest)?;
    guest.power_off()?;
    clean(host)
}
