//! Memory that a guest's own driver plugs and unplugs (virtio-mem): as much as it is asked to, given back to the host when it has gone, in its node,
//! and reached by an assigned drive.

use std::time::Duration;

use serde_json::Value;

use super::memory::{drive_uses, line, total};
use super::steps::{FIRST, IDLE, bdf, guest_is_content, unbind, vm, wait_for_drive};
use super::{NVME, on, scenario, with_old_kernels};
use crate::error::{Error, Result, ensure};
use crate::guest::{Guest, VmSpec};
use crate::host::Host;
use crate::rpc::wait_for;
use crate::runner::{Case, Scenario};
use crate::spec::HostSpec;

/// The VM's control socket, on the host.
const SOCKET: &str = "/run/plugging.sock";
const MIB: u64 = 1 << 20;
/// For what takes long in an emulated machine.
const LONG: Duration = Duration::from_secs(180);

pub fn table() -> Vec<Scenario> {
    let mut all = with_old_kernels(on(
        HostSpec::new(&[]),
        "memory_is_plugged_and_unplugged_and_plugged_again_after_a_reboot",
        grows_and_shrinks,
    ));
    all.push(scenario("an_assigned_drive_reaches_what_is_plugged_and_no_more_is_pinned", drive_reaches));
    all.push(on(HostSpec::new(&[]), "a_zone_is_plugged_in_its_own_node", zone_grows));
    all
}

fn with_driver(mut spec: VmSpec, memory: &str, state: &str) -> VmSpec {
    spec = spec
        .memory(&format!("{memory},hotplug_method=virtio-mem"))
        .options(&format!("--api-socket {SOCKET}"))
        .cmdline(&format!("memhp_default_state={state}"));
    spec.modules.extend(["virtio_pci", "virtio_mem"]);
    spec
}

fn ctl(host: &Host, words: &str) -> Result<String> {
    host.sh(&format!("dormouse ctl --api-socket {SOCKET} --json {words}"))
}

fn json(host: &Host, words: &str) -> Result<Value> {
    let text = ctl(host, words)?;
    serde_json::from_str(&text).map_err(|e| Error::Check(format!("{text}: {e}")))
}

/// Bytes that the guest has plugged by a device.
fn plugged(host: &Host, device: &str) -> Result<u64> {
    let counters = json(host, "counters")?;
    let count = counters[device]["plugged_bytes"].as_u64();
    count.ok_or_else(|| Error::Check(format!("no plugged_bytes of {device} in {counters}")))
}

fn wait_plugged(host: &Host, device: &str, mib: u64) -> Result<()> {
    wait_for(&format!("{mib} MiB are plugged"), LONG, || {
        let now = plugged(host, device)?;
        Ok(if now == mib * MIB { Ok(()) } else { Err(format!("{} MiB", now / MIB)) })
    })
}

/// Waits until the guest counts what it has plugged, some of which its kernel keeps for itself.
fn has_more(guest: &Guest<'_>, before: u64, mib: u64) -> Result<()> {
    wait_for("the guest uses what it has plugged", IDLE, || {
        let now = total(guest)?;
        let enough = now >= before + mib * 1024 * 9 / 10;
        Ok(if enough { Ok(()) } else { Err(format!("{before} KiB before, {now} KiB with {mib} MiB more")) })
    })
}

fn of_vmm(host: &Host, name: &str) -> Result<u64> {
    line(&host.sh("cat /proc/$(cat /run/vmm.pid)/status")?, name)
}

fn grows_and_shrinks(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let memory = "512M,hotplug_size=1536M,thp=off";
    let guest = host.start_vm(&with_driver(VmSpec::new(case.guest), memory, "online_movable"))?;
    let before = total(&guest)?;
    wait_plugged(host, "mem0", 0)?;
    ctl(host, "resize --memory 1536M")?;
    wait_plugged(host, "mem0", 1024)?;
    has_more(&guest, before, 1024)?;
    let actual = json(host, "info")?["memory_actual_size"].as_u64();
    ensure(actual == Some(1536 * MIB), || format!("memory_actual_size is {actual:?}"))?;
    guest.sh_for("mkdir -p /run/much && mount -t tmpfs -o size=1G much /run/much && dd if=/dev/zero of=/run/much/all bs=1M count=700", LONG)?;
    let full = of_vmm(host, "VmRSS")?;
    guest.sh("rm /run/much/all")?;
    for (words, said) in [
        ("resize --memory 3G", "hotplug_size"),
        ("resize --memory 1025M", "2M"),
        ("resize --memory 256M", "from the start"),
        ("remove-device mem0", "mem0"),
    ] {
        let output = host.run(&format!("dormouse ctl --api-socket {SOCKET} {words} 2>&1"))?;
        ensure(output.status != 0 && output.text.contains(said), || format!("{words}: {}", output.text))?;
    }
    ctl(host, "resize --memory 640M")?;
    wait_plugged(host, "mem0", 128)?;
    has_more(&guest, before, 128)?;
    let less = of_vmm(host, "VmRSS")?;
    ensure(less + 400 * 1024 < full, || format!("{full} KiB of the host's memory before, {less} KiB after"))?;
    guest_is_content(&guest)?;
    // A machine that starts anew has nothing plugged, and its guest is asked for as much as before.
    let mark = guest.mark();
    ctl(host, "reboot")?;
    guest.wait_ready(mark)?;
    wait_plugged(host, "mem0", 128)?;
    has_more(&guest, before, 128)?;
    ctl(host, "resize --memory 512M")?;
    wait_plugged(host, "mem0", 0)?;
    guest_is_content(&guest)?;
    guest.power_off()
}

/// The drive's data goes to and from pages of the highest memory: above 4 GiB there is only what is plugged.
fn drive_reaches(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let guest = host.start_vm(&with_driver(vm(case, &[NVME]), "384M,hotplug_size=1G", "online_kernel"))?;
    wait_for_drive(&guest)?;
    let before = total(&guest)?;
    let pinned = of_vmm(host, "VmLck")?;
    ensure(pinned < 480 * 1024, || format!("{pinned} KiB are pinned for 384 MiB"))?;
    ctl(host, "resize --memory 896M")?;
    wait_plugged(host, "mem0", 512)?;
    has_more(&guest, before, 512)?;
    let more = of_vmm(host, "VmLck")?;
    ensure(more == pinned + 512 * 1024, || format!("{pinned} KiB were pinned, and {more} KiB are"))?;
    drive_uses(&guest, "plugged")?;
    // More is plugged while it has no power, which it does not need for that.
    unbind(&guest, FIRST)?;
    host.wait_power_state(&bdf(NVME), "D3cold", IDLE)?;
    ctl(host, "resize --memory 1G")?;
    wait_plugged(host, "mem0", 640)?;
    ensure(host.power_state(&bdf(NVME))? == "D3cold", || "the drive has been woken".to_owned())?;
    let most = of_vmm(host, "VmLck")?;
    ensure(most == pinned + 640 * 1024, || format!("{pinned} KiB were pinned, and {most} KiB are"))?;
    guest_is_content(&guest)?;
    guest.power_off()
}

fn zone_grows(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let zones = "--memory-zone id=a,size=256M id=b,size=256M,hotplug_size=512M \
                 --numa guest_numa_id=0,cpus=[0],memory_zones=[a] guest_numa_id=1,cpus=[1],memory_zones=[b]";
    let spec = VmSpec::new(case.guest).cpus(2).options(zones);
    let mut spec = with_driver(spec, "0", "online_movable");
    // Linux wants no node to end in the middle of what shares a cache.
    spec.command = Some(spec.command().replace("boot=2", "boot=2,topology=1:1:1:2"));
    let guest = host.start_vm(&spec)?;
    let of_node = |node: u32| {
        line(&guest.sh(&format!("grep MemTotal /sys/devices/system/node/node{node}/meminfo"))?, "MemTotal")
    };
    let (first, second) = (of_node(0)?, of_node(1)?);
    ctl(host, "resize-zone --id b --size 512M")?;
    wait_plugged(host, "b", 256)?;
    wait_for("the guest has it in node 1", IDLE, || {
        let (other, grown) = (of_node(0)?, of_node(1)?);
        let right = grown >= second + 256 * 1024 * 9 / 10 && other == first;
        let found = format!("node 0 had {first} and has {other}, node 1 had {second} and has {grown} KiB");
        Ok(if right { Ok(()) } else { Err(found) })
    })?;
    ctl(host, "resize-zone --id b --size 256M")?;
    wait_plugged(host, "b", 0)?;
    guest_is_content(&guest)?;
    guest.power_off()
}
