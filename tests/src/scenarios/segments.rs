//! Machines of several PCI segments: what is in the others works, sleeps, comes and goes as in the first.

use std::time::Duration;

use super::steps::{
    IDLE, bdf, guest_is_content, nic_to_sleep, pass_traffic, unbind, unbound_wake, wait_for_drive,
};
use super::{E1000E, IGB, NVME, scenario, with_old_kernels};
use crate::error::{Error, Result, ensure};
use crate::guest::{Guest, VmSpec};
use crate::host::{Host, sysfs};
use crate::rpc::wait_for;
use crate::runner::{Case, Scenario};

/// Where the VMM answers, and its events.
const SOCKET: &str = "/run/segments.sock";
const EVENTS: &str = "/run/segments.events";
/// An image of 16 MiB.
const IMAGE: &str = "/run/segments.img";

pub fn table() -> Vec<Scenario> {
    let mut all =
        with_old_kernels(scenario("devices_in_three_pci_segments_work_and_lose_their_power", three));
    all.extend(with_old_kernels(scenario("devices_come_and_go_in_the_second_pci_segment", come_and_go)));
    all.extend([
        scenario("a_guest_of_96_pci_segments_finds_a_device_in_the_last", most),
        scenario("a_pci_segment_that_there_is_not_is_refused_with_the_remedy", refused),
    ]);
    all
}

fn spec(case: &Case<'_>, options: &str) -> VmSpec {
    let mut spec = VmSpec::new(case.guest)
        .options(&format!("--api-socket {SOCKET} --event-monitor path={EVENTS} {options}"));
    spec.modules = vec!["e1000e", "igb", "nvme", "virtio_pci", "virtio_blk", "virtio_rng"];
    spec
}

fn ctl(host: &Host, words: &str) -> Result<serde_json::Value> {
    let reply = host.sh(&format!("dormouse ctl --api-socket {SOCKET} --json {words}"))?;
    serde_json::from_str(&reply).map_err(|e| Error::Check(format!("{reply}: {e}")))
}

/// Adds a device; where the guest has it.
fn add(host: &Host, words: &str) -> Result<String> {
    let reply = ctl(host, words)?;
    reply["bdf"].as_str().map(str::to_owned).ok_or_else(|| Error::Check(format!("no bdf in {reply}")))
}

/// Removes a device, and waits for the event that names its address in the guest.
fn remove(host: &Host, guest: &Guest<'_>, id: &str, function: &str) -> Result<()> {
    host.sh(&format!(": >{EVENTS}"))?;
    host.sh(&format!("dormouse ctl --api-socket {SOCKET} remove-device {id}"))?;
    wait_for("the device is removed", IDLE, || {
        let text = host.probe(&format!("grep -A6 device-removed {EVENTS}"))?.text;
        let told = text.contains(&format!("\"{id}\"")) && text.contains(&format!("\"{function}\""));
        Ok(if told { Ok(()) } else { Err(text) })
    })?;
    let there = guest.run(&format!("test -e {}", sysfs(function, "vendor")))?;
    ensure(there.status != 0, || format!("the guest still has {function}"))
}

/// What is written to the guest's only virtio disk is in the image.
fn use_disk(host: &Host, guest: &Guest<'_>, function: &str) -> Result<()> {
    guest.wait_file(&sysfs(function, "vendor"), "0x1af4", IDLE)?;
    wait_for("the guest has the disk", IDLE, || {
        let disk = guest.probe("test -b /dev/vda")?;
        Ok(if disk.status == 0 { Ok(()) } else { Err("no /dev/vda".to_owned()) })
    })?;
    let way = guest.sh("readlink -f /sys/block/vda")?;
    ensure(way.contains(&format!("/{function}/")), || format!("the disk is {way} and not at {function}"))?;
    guest.sh("dd if=/dev/urandom of=/dev/vda bs=1M count=2 conv=fsync 2>/dev/null")?;
    let written = guest.sh("dd if=/dev/vda bs=1M count=2 2>/dev/null | sha256sum")?;
    let there = host.sh(&format!("dd if={IMAGE} bs=1M count=2 2>/dev/null | sha256sum"))?;
    ensure(written == there, || format!("the guest has {written}, the image {there}"))
}

/// Traffic, sleep, a wake by the guest, and sleep again.
fn nic_works_and_sleeps(host: &Host, guest: &Guest<'_>, slot: usize, function: &str) -> Result<()> {
    for _ in 0..2 {
        host.set_link(slot, true)?;
        pass_traffic(guest, function)?;
        nic_to_sleep(host, guest, slot, function)?;
        host.stays_in(&bdf(slot), "D3cold", Duration::from_secs(1))?;
    }
    Ok(())
}

fn three(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    host.sh(&format!("rm -f {IMAGE} && truncate -s 16M {IMAGE}"))?;
    let options = format!(
        "--platform num_pci_segments=3 --pci-segment pci_segment=1,mmio32_aperture_weight=3 pci_segment=2,mmio64_aperture_weight=2 \
         --disk path={IMAGE},image_type=raw,pci_segment=1 --rng src=/dev/urandom,pci_segment=2"
    );
    let vm = spec(case, &options)
        .device_with(&bdf(IGB), ",pci_segment=1,id=card")
        .device_with(&bdf(NVME), ",pci_segment=2,id=drive");
    let guest = host.start_vm(&vm)?;
    let (card, drive) = ("0001:01:00.0", "0002:01:00.0");
    let buses = guest.sh("ls /sys/class/pci_bus")?;
    ensure(buses.split_whitespace().eq(["0000:00", "0001:00", "0001:01", "0002:00", "0002:01"]), || {
        format!("the guest's buses are {buses}")
    })?;
    use_disk(host, &guest, "0001:00:02.0")?;
    guest.sh("timeout 20 dd if=/dev/hwrng of=/dev/null bs=64 count=4 2>/dev/null")?;
    nic_works_and_sleeps(host, &guest, IGB, card)?;
    // The host wakes it: told through the event device, or by the PME of the port in its own segment.
    // Milliseconds that the guest's kernel has had it awake.
    let awake = || guest.probe(&format!("cat {}", sysfs(card, "power/runtime_active_time")));
    let before = awake()?.text;
    host.poke(&bdf(IGB))?;
    wait_for("the guest hears of the wake", IDLE, || {
        let now = awake()?.text;
        Ok(if now == before { Err(now) } else { Ok(()) })
    })?;
    host.wait_power_state(&bdf(IGB), "D3cold", IDLE)?;
    wait_for_drive(&guest)?;
    guest.sh("dd if=/dev/urandom of=/dev/nvme0n1 bs=1M count=2 conv=fsync 2>/dev/null")?;
    let sum = guest.sh("dd if=/dev/nvme0n1 bs=1M count=2 2>/dev/null | sha256sum")?;
    unbind(&guest, drive)?;
    host.wait_power_state(&bdf(NVME), "D3cold", IDLE)?;
    unbound_wake(&guest, drive)?;
    guest.sh(&format!("echo {drive} >/sys/bus/pci/drivers_probe"))?;
    wait_for_drive(&guest)?;
    let again = guest.sh("dd if=/dev/nvme0n1 bs=1M count=2 2>/dev/null | sha256sum")?;
    ensure(sum == again, || format!("the drive had {sum} and has {again}"))?;
    let tree = ctl(host, "info")?["device_tree"].clone();
    for (id, bdf) in [
        ("card", card),
        ("drive", drive),
        ("_disk0", "0001:00:02.0"),
        ("__rng", "0002:00:02.0"),
        ("__root_port1_1", "0001:00:01.0"),
    ] {
        ensure(tree[id]["pci_bdf"] == bdf, || format!("{id} is not at {bdf}: {tree}"))?;
    }
    guest_is_content(&guest)?;
    guest.power_off()
}

fn come_and_go(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    host.sh(&format!("rm -f {IMAGE} && truncate -s 16M {IMAGE}"))?;
    let guest = host.start_vm(&spec(case, "--platform num_pci_segments=2"))?;
    for _ in 0..2 {
        let disk = add(host, &format!("add-disk path={IMAGE},image_type=raw,pci_segment=1,id=disk"))?;
        ensure(disk == "0001:00:01.0", || format!("the disk is at {disk}"))?;
        use_disk(host, &guest, &disk)?;
        let device = sysfs(&bdf(E1000E), "");
        let nic =
            add(host, &format!("add-device path={},pci_segment=1,id=card", device.trim_end_matches('/')))?;
        ensure(nic == "0001:00:02.0", || format!("the card is at {nic}"))?;
        // The same place of the first segment is another one.
        let rng = sysfs("0000:00:02.0", "vendor");
        ensure(guest.run(&format!("test -e {rng}"))?.status != 0, || {
            "a function came to segment 0".to_owned()
        })?;
        nic_works_and_sleeps(host, &guest, E1000E, &nic)?;
        remove(host, &guest, "card", &nic)?;
        remove(host, &guest, "disk", &disk)?;
        let vendor = host.poke(&bdf(E1000E))?;
        ensure(vendor.starts_with("8680"), || format!("the host's device answers {vendor}"))?;
    }
    // It is where it was after a reboot of the guest, and sleeps there.
    let device = sysfs(&bdf(IGB), "");
    let words =
        format!("add-device path={},pci_segment=1,pci_device_id=31,id=card", device.trim_end_matches('/'));
    let nic = add(host, &words)?;
    ensure(nic == "0001:00:1f.0", || format!("the card is at {nic}"))?;
    nic_works_and_sleeps(host, &guest, IGB, &nic)?;
    let mark = guest.mark();
    host.sh(&format!("dormouse ctl --api-socket {SOCKET} reboot"))?;
    guest.wait_ready(mark)?;
    nic_works_and_sleeps(host, &guest, IGB, &nic)?;
    remove(host, &guest, "card", &nic)?;
    guest_is_content(&guest)?;
    guest.power_off()
}

fn most(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let options = "--platform num_pci_segments=96 --rng src=/dev/urandom,pci_segment=95";
    let guest = host.start_vm(&spec(case, options))?;
    let buses = guest.sh("ls /sys/class/pci_bus | wc -l")?;
    ensure(buses.trim() == "96", || format!("the guest has {buses} buses"))?;
    guest.sh("test -e /sys/bus/pci/devices/005f:00:01.0/driver")?;
    guest.sh("timeout 20 dd if=/dev/hwrng of=/dev/null bs=64 count=4 2>/dev/null")?;
    let device = sysfs(&bdf(E1000E), "");
    let nic = add(host, &format!("add-device path={},pci_segment=50,id=card", device.trim_end_matches('/')))?;
    ensure(nic == "0032:00:01.0", || format!("the card is at {nic}"))?;
    nic_works_and_sleeps(host, &guest, E1000E, &nic)?;
    remove(host, &guest, "card", &nic)?;
    guest_is_content(&guest)?;
    guest.power_off()
}

fn refused(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let vmm = |options: &str| {
        let vm = VmSpec::new(case.guest).options(options);
        host.run(&format!("timeout 60 {} </dev/null 2>&1", vm.command()))
    };
    for (options, words) in [
        ("--platform num_pci_segments=97", "num_pci_segments=97 is not possible; use 1 to 96"),
        ("--rng src=/dev/urandom,pci_segment=1", "pci_segment=1: there is no such PCI segment; use 0 to 0"),
        ("--pci-segment pci_segment=1", "--pci-segment pci_segment=1: there is no such PCI segment"),
        ("--platform num_pci_segments=2,iommu_segments=[1]", "iommu_segments is not in Dormouse yet"),
    ] {
        let output = vmm(options)?;
        ensure(output.status == 1 && output.text.contains(words), || {
            format!("{options}: status {}: {}", output.status, output.text)
        })?;
    }
    let guest = host.start_vm(&spec(case, ""))?;
    let output = host.run(&format!(
        "dormouse ctl --api-socket {SOCKET} add-disk path=/run/none,image_type=raw,pci_segment=1 2>&1"
    ))?;
    ensure(output.status == 1 && output.text.contains("there is no such PCI segment"), || {
        output.text.clone()
    })?;
    guest.power_off()
}
