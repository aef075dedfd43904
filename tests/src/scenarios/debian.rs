//! Debian, from its disk: systemd, network, and an assigned GPU that sleeps while one works in it.

use std::time::Duration;

use super::on;
use super::steps::{FIRST, IDLE, bdf, bind, guest_is_content, unbind};
use crate::debian::network::{HOST, Network, TAP};
use crate::debian::{self, QCOW2, RAW};
use crate::error::{Error, Result, ensure};
use crate::guest::{Guest, VmSpec};
use crate::host::Host;
use crate::rpc::wait_for;
use crate::runner::{Case, Scenario};
use crate::spec::{Device, HostSpec, Slot};
use crate::timeline::Lane;

/// Slot of the GPU.
const GPU: usize = 0;
/// For what takes long in an emulated machine.
const LONG: Duration = Duration::from_secs(60);
/// How long a power cycle leaves the GPU off, in milliseconds.
const DWELL: u32 = 500;

pub fn table() -> Vec<Scenario> {
    let host = || HostSpec::new(&[Slot::new(Device::Gpu)]).debian();
    vec![
        on(host(), "images_of_debian_and_its_programs_are_on_the_emulated_host", on_the_host),
        on(host(), "debian_on_a_raw_disk_works_with_a_gpu_that_sleeps_and_wakes_meanwhile", raw),
        on(host(), "debian_on_a_qcow2_disk_works_with_a_gpu_that_sleeps_and_wakes_meanwhile", qcow2_works),
        on(host(), "debian_on_a_qcow2_disk_keeps_its_files_when_the_vmm_is_killed", qcow2),
    ]
}

/// The ground the others stand on: the images are whole, and each program that VMs are tried against runs.
fn on_the_host(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    for command in [
        "qemu-img check /images/debian.qcow2",
        "virtiofsd --version",
        "passt --version",
        "qemu-storage-daemon --version",
        "socat -V",
        "iperf3 --version",
        "fio --version",
        "dmsetup version",
        "test -c /dev/net/tun && test -c /dev/vhost-net && test -c /dev/vhost-vsock && test -c /dev/fuse",
        "qemu-img compare -f raw -F qcow2 /images/debian.raw /images/debian.qcow2",
    ] {
        let output = host.run_for(command, LONG)?;
        ensure(output.status == 0, || format!("the host's `{command}` fails: {}", output.text))?;
    }
    listen(host)
}

/// Each server of a vhost-user device starts, and waits for a VMM at its socket. passt gives up its rights before it makes that.
fn listen(host: &Host) -> Result<()> {
    host.sh("mkdir -p /run/peers/shared && chmod 777 /run/peers && truncate -s 8M /images/peer")?;
    let outcome = [
        ("fs", "virtiofsd --socket-path /run/peers/fs --shared-dir /run/peers/shared --sandbox none"),
        ("net", "passt --vhost-user --foreground --socket /run/peers/net"),
        (
            "blk",
            "qemu-storage-daemon --blockdev driver=file,node-name=disk,filename=/images/peer --export \
             type=vhost-user-blk,id=disk,node-name=disk,writable=on,addr.type=unix,addr.path=/run/peers/blk",
        ),
    ]
    .into_iter()
    .try_for_each(|(name, command)| {
        host.sh(&format!(
            "({command} & echo $! >/run/peers/{name}.pid) </dev/null >/run/peers/{name}.log 2>&1"
        ))?;
        wait_for(&format!("`{command}` listens"), LONG, || {
            let there =
                host.probe(&format!("test -S /run/peers/{name} && kill -0 $(cat /run/peers/{name}.pid)"))?;
            Ok(if there.status == 0 { Ok(()) } else { Err(host.sh(&format!("cat /run/peers/{name}.log"))?) })
        })
    });
    host.sh("kill $(cat /run/peers/*.pid); sleep 1; rm -r /run/peers /images/peer")?;
    outcome
}

fn raw(case: &Case<'_>) -> Result<()> {
    works(case, RAW)
}

fn qcow2_works(case: &Case<'_>) -> Result<()> {
    works(case, QCOW2)?;
    let check = case.host.run_for("qemu-img check /images/debian.qcow2", LONG)?;
    ensure(check.status == 0, || format!("the image after a day's work: {}", check.text))
}

/// The whole day's work on one boot.
fn works(case: &Case<'_>, disk: &str) -> Result<()> {
    let host = case.host;
    let network = Network::new(host)?;
    let guest = debian::start(host, &vm(host, disk))?;
    up(&guest)?;
    network.address(&guest)?;
    gpu_sleeps_and_draws(host, &guest)?;
    work(host, &guest, u64::from(case.minutes) * 60)?;
    gpu_sleeps_and_draws(host, &guest)?;
    guest_is_content(&guest)?;
    shut_down(&guest)
}

/// With the same network and GPU, so that all holds on this disk as well.
fn vm(host: &Host, disk: &str) -> VmSpec {
    debian::vm(disk).device(host, &bdf(GPU)).options(&format!("--net tap={TAP},mac=52:54:00:77:00:01"))
}

/// systemd has started all it was to start, and nothing has failed.
fn up(guest: &Guest<'_>) -> Result<()> {
    wait_for("systemd has started everything", LONG, || {
        let state = guest.run("systemctl is-system-running")?.text;
        match state.as_str() {
            "running" => Ok(Ok(())),
            "degraded" => {
                let failed = guest.run("systemctl --failed --no-pager --plain")?.text;
                Err(Error::Check(format!("units of the guest have failed: {failed}")))
            }
            _ => Ok(Err(state)),
        }
    })
}

fn gpu_sleeps_and_draws(host: &Host, guest: &Guest<'_>) -> Result<()> {
    guest.sh("timeout 20 guest_tool drm")?;
    let since = host.timeline.now();
    unbind(guest, FIRST)?;
    host.wait_power_state(&bdf(GPU), "D3cold", IDLE)?;
    ensure(host.power_count(GPU, false, since) > 0, || "the firmware cut no power".to_owned())?;
    host.stays_in(&bdf(GPU), "D3cold", Duration::from_secs(1))?;
    bind(guest, FIRST)?;
    guest.sh("timeout 20 guest_tool drm").map(drop)
}

/// fio, which verifies what it has written, and iperf3, one beside the other, for `seconds`, while the GPU loses its power and
/// gets it back all the time.
fn work(host: &Host, guest: &Guest<'_>, seconds: u64) -> Result<()> {
    unbind(guest, FIRST)?;
    let since = host.timeline.now();
    guest.sh(&format!(
        "cd /run && (end=$(($(date +%s) + {seconds})); while [ $(date +%s) -lt $end ]; do \
         fio --name=verify --filename=/var/tmp/fio --size=24M --rw=randwrite --bsrange=4k-64k --direct=1 \
         --ioengine=libaio --iodepth=8 --verify=crc32c --verify_fatal=1 --verify_state_save=0 --minimal >>fio.out 2>&1 \
         || exit 1; echo round >>fio.rounds; done; echo whole >fio.end) >/dev/null 2>&1 &"
    ))?;
    guest.sh(&format!(
        "cd /run && (iperf3 --client {HOST} --time {half} && iperf3 --client {HOST} --time {half} --reverse) \
         >iperf.out 2>&1 && echo whole >iperf.end &",
        half = seconds / 2
    ))?;
    // A loaded machine does less in the time, never for longer.
    let cycles = seconds * 1000 / (u64::from(DWELL) * 3);
    guest.sh_for(
        &format!("guest_tool cycle {FIRST} {cycles} {DWELL}"),
        Duration::from_secs(seconds * 10 + 120),
    )?;
    for (name, out) in [("fio", "fio.out"), ("iperf", "iperf.out")] {
        wait_for(&format!("{name} ends well"), Duration::from_secs(seconds + 120), || {
            let ended = guest.probe(&format!("cat /run/{name}.end"))?;
            Ok(if ended.status == 0 {
                Ok(())
            } else {
                Err(guest.run(&format!("tail -n 5 /run/{out}"))?.text)
            })
        })?;
    }
    let rounds =
        guest.sh("wc -l </run/fio.rounds; grep -c receiver /run/iperf.out; tail -n 6 /run/iperf.out")?;
    host.timeline.record(Lane::Host, format!("fio's verified rounds, iperf3's directions: {rounds}"));
    let errors =
        guest.run("dmesg | grep -E 'I/O error|blk_update_request|NETDEV WATCHDOG|virtio_net.*error'")?.text;
    ensure(errors.is_empty(), || format!("the guest's kernel has seen errors: {errors}"))?;
    let (cuts, returns) = (host.power_count(GPU, false, since), host.power_count(GPU, true, since));
    ensure(cuts as u64 * 2 >= cycles, || format!("of {cycles} cycles only {cuts} cut the GPU's power"))?;
    ensure(returns + 1 >= cuts, || format!("power was cut {cuts} times, and given {returns} times"))?;
    bind(guest, FIRST)
}

/// As an administrator does it; the VMM ends with success.
fn shut_down(guest: &Guest<'_>) -> Result<()> {
    guest.begin("systemctl poweroff")?;
    let status = guest.wait_exit_for(debian::BOOT)?;
    ensure(status == 0, || {
        format!(
            "the VMM ended with status {status} after the guest's shutdown: {}",
            guest.stderr().unwrap_or_default()
        )
    })
}

/// Files that were written and synced are there after the VMM is killed: ext4's journal and the image's metadata hold.
fn qcow2(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let network = Network::new(host)?;
    let guest = debian::start(host, &vm(host, QCOW2))?;
    up(&guest)?;
    network.address(&guest)?;
    gpu_sleeps_and_draws(host, &guest)?;
    let mark = guest.mark();
    guest.begin(
        "mkdir /var/tmp/kept && cd /var/tmp/kept && n=0 && while n=$((n + 1)); do \
         seq $n $((n + 3000)) >$n && sync $n . && echo kept $n; done",
    )?;
    let kept = || last_number(host, mark, "kept ");
    wait_for("fifty files are written and synced", LONG * 3, || {
        Ok(kept().filter(|n| *n >= 50).ok_or_else(|| format!("{:?}", kept())))
    })?;
    guest.signal("KILL")?;
    guest.wait_exit()?;
    let kept = kept().unwrap_or_default();
    let check = host.run_for("qemu-img check /images/debian.qcow2", LONG)?;
    // 3: clusters that nobody uses. An image that was cut off in its growth may have them.
    ensure(matches!(check.status, 0 | 3), || format!("the image is damaged: {}", check.text))?;
    let guest = host.start_vm(&rescue(QCOW2))?;
    guest.sh("mkdir /disk && mount -t ext4 /dev/vda /disk && dmesg | grep -i ext4")?;
    let text = guest.sh_for(
        &format!(
            "cd /disk/var/tmp/kept; n=0; while [ $n -lt {kept} ]; do n=$((n + 1)); \
             seq $n $((n + 3000)) | cmp - $n || exit 1; done; echo $n"
        ),
        LONG * 2,
    )?;
    ensure(text == kept.to_string(), || format!("of {kept} files only {text} are there"))?;
    guest.sh("cd / && umount /disk")?;
    guest.power_off()
}

/// The test bed's own small guest, to look at a disk from without.
fn rescue(disk: &str) -> VmSpec {
    let mut vm = VmSpec::new(debian::KERNEL).options(&format!("--disk {disk}"));
    vm.modules.extend(["virtio_pci", "virtio_blk", "crc32c_generic", "ext4"]);
    vm
}

/// The number in the last line of the guest's console from `mark` on that begins with `prefix`.
pub fn last_number(host: &Host, mark: usize, prefix: &str) -> Option<u64> {
    let lines = host.guest.wire().since(mark);
    lines.iter().rev().find_map(|line| line.strip_prefix(prefix)?.trim().parse().ok())
}
