//! Devices that other processes are, against those that Debian has: virtiofsd, qemu-storage-daemon and passt. They serve, they are killed, they come
//! back; the VM lives all the time.

use std::time::Duration;

use super::on;
use super::steps::guest_is_content;
use crate::error::{Error, Result, ensure};
use crate::guest::{Guest, VmSpec};
use crate::host::{Host, sysfs};
use crate::rpc::wait_for;
use crate::runner::{Case, Scenario};
use crate::spec::HostSpec;

/// Where the VMM answers, and its events.
const API: &str = "/run/vhost.sock";
const EVENTS: &str = "/run/vhost.events";
/// The directory that is shared.
pub const SHARED: &str = "/run/shared";
pub const FS: &str = "/run/fs.vhost";
/// The image of the disk, and its size in bytes.
pub const IMAGE: &str = "/run/vhost.img";
const IMAGE_SIZE: u64 = 32 << 20;
pub const DISK: &str = "/run/disk.vhost";
const QMP: &str = "/run/qmp.sock";
const NET: &str = "/tmp/net.vhost";
/// For what takes long in an emulated machine.
const LONG: Duration = Duration::from_secs(60);

pub fn table() -> Vec<Scenario> {
    let host = || HostSpec::new(&[]).debian();
    vec![
        on(host(), "a_directory_of_the_host_is_the_guests_and_its_death_is_an_error_there", file_system),
        on(host(), "vhost_user_devices_come_and_go_while_the_guest_runs", come_and_go),
        on(host(), "a_vhost_user_disk_keeps_what_is_written_and_its_death_is_an_error", disk),
        on(host(), "a_network_behind_a_vhost_user_backend_carries_files", net),
        on(host(), "a_vhost_user_backend_that_is_not_there_is_named_with_the_remedy", not_there),
    ]
}

/// A program of the host, killed at the latest when it is dropped.
pub struct Peer<'h> {
    host: &'h Host,
    name: &'static str,
}

impl<'h> Peer<'h> {
    /// Starts `command` and waits until `ready` succeeds.
    fn start(host: &'h Host, name: &'static str, ready: &str, command: &str) -> Result<Self> {
        host.sh(&format!("({command} & echo $! >/run/{name}.pid) </dev/null >/run/{name}.log 2>&1"))?;
        let peer = Self { host, name };
        wait_for(&format!("{name} listens"), LONG, || {
            let listens = host.probe(ready)?.status == 0;
            Ok(if listens { Ok(()) } else { Err(host.probe(&format!("cat /run/{name}.log"))?.text) })
        })?;
        Ok(peer)
    }

    pub fn kill(&self) -> Result<()> {
        let name = self.name;
        self.host.sh(&format!(
            "pid=$(cat /run/{name}.pid); kill -9 $pid 2>/dev/null; while [ -d /proc/$pid ]; do usleep 20000; done"
        ))?;
        Ok(())
    }
}

impl Drop for Peer<'_> {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

pub fn virtiofsd(host: &Host) -> Result<Peer<'_>> {
    host.sh(&format!("mkdir -p {SHARED}; rm -f {FS}"))?;
    let command = format!("virtiofsd --socket-path={FS} --shared-dir={SHARED} --sandbox=none --tag=generic");
    Peer::start(host, "virtiofsd", &format!("test -S {FS}"), &command)
}

pub fn storage_daemon(host: &Host) -> Result<Peer<'_>> {
    host.sh(&format!("rm -f {IMAGE} {QMP} {DISK}; truncate -s {IMAGE_SIZE} {IMAGE}"))?;
    let command = format!(
        "qemu-storage-daemon --blockdev driver=file,node-name=image,filename={IMAGE} \
         --export type=vhost-user-blk,id=export,addr.type=unix,addr.path={DISK},node-name=image,writable=on \
         --chardev socket,id=qmp,path={QMP},server=on,wait=off --monitor chardev=qmp"
    );
    Peer::start(host, "storage-daemon", &format!("test -S {DISK}"), &command)
}

fn spec(case: &Case<'_>, options: &str) -> VmSpec {
    let mut vm = VmSpec::new(case.guest)
        .memory("512M,shared=on")
        .options(&format!("--api-socket {API} --event-monitor path={EVENTS} {options}"));
    vm.modules = vec!["virtio_pci", "virtio_rng", "virtiofs", "virtio_blk", "virtio_net"];
    vm
}

fn ctl(host: &Host, words: &str) -> Result<String> {
    host.sh(&format!("dormouse ctl --api-socket {API} --json {words}"))
}

/// The sum of what a command prints.
fn same(host: &Host, guest: &Guest<'_>, there: &str, here: &str) -> Result<()> {
    let (there, here) =
        (guest.sh_for(&format!("{there} | sha256sum"), LONG)?, host.sh(&format!("{here} | sha256sum"))?);
    ensure(there == here, || format!("the guest has {there}, the host {here}"))
}

/// Files pass both ways between the directory and `mount`.
pub fn files(host: &Host, guest: &Guest<'_>, mount: &str) -> Result<()> {
    host.sh(&format!("head -c 3000000 /dev/urandom >{SHARED}/down"))?;
    same(host, guest, &format!("cat {mount}/down"), &format!("cat {SHARED}/down"))?;
    guest.sh_for(
        &format!("head -c 5000000 /dev/urandom >/run/up && cp /run/up {mount}/up && sync && mv {mount}/up {mount}/moved"),
        LONG,
    )?;
    same(host, guest, "cat /run/up", &format!("cat {SHARED}/moved"))?;
    guest.sh(&format!("rm {mount}/moved {mount}/down && test ! -e {mount}/moved"))?;
    let left = host.sh(&format!("ls {SHARED}"))?;
    ensure(left.is_empty(), || format!("the host still has {left}"))
}

/// The rest of the machine works: another virtio device, and the guest's kernel.
fn vm_lives(guest: &Guest<'_>) -> Result<()> {
    guest.sh("timeout 20 dd if=/dev/hwrng of=/dev/null bs=64 count=4 2>/dev/null")?;
    guest_is_content(guest)
}

/// The VMM says so in one line, and no more.
fn one_line(guest: &Guest<'_>, name: &str) -> Result<()> {
    let log = guest.log()?;
    let lines: Vec<_> = log.lines().filter(|line| line.contains(name) && line.contains("has gone")).collect();
    ensure(lines.len() == 1, || format!("the log has {} lines of it: {lines:?}", lines.len()))
}

/// The command ends with an error, and does end.
fn fails(guest: &Guest<'_>, command: &str) -> Result<()> {
    let output = guest.probe(&format!("timeout -s KILL 30 {command}"))?;
    ensure(!matches!(output.status, 0 | 137), || format!("`{command}`: {} {}", output.status, output.text))
}

fn end(host: &Host, guest: &Guest<'_>) -> Result<()> {
    guest.power_off()?;
    host.sh(&format!("rm -rf {EVENTS} {SHARED} {IMAGE}")).map(drop)
}

fn file_system(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let daemon = virtiofsd(host)?;
    let guest = host.start_vm(&spec(case, &format!("--fs tag=share,socket={FS}")))?;
    guest.sh("mkdir /mnt && mount -t virtiofs share /mnt")?;
    files(host, &guest, "/mnt")?;
    ctl(host, "pause")?;
    ctl(host, "resume")?;
    files(host, &guest, "/mnt")?;
    daemon.kill()?;
    fails(&guest, "ls /mnt/none")?;
    fails(&guest, "touch /mnt/new")?;
    one_line(&guest, "_fs0")?;
    vm_lives(&guest)?;
    // A new backend, and the driver from the start.
    guest.sh("umount /mnt")?;
    let again = virtiofsd(host)?;
    let driver = "/sys/bus/virtio/drivers/virtiofs";
    guest.sh(&format!(
        "device=$(cd {driver}; echo virtio*); echo $device >{driver}/unbind; echo $device >{driver}/bind"
    ))?;
    guest.sh("mount -t virtiofs share /mnt")?;
    files(host, &guest, "/mnt")?;
    vm_lives(&guest)?;
    end(host, &guest)?;
    drop(again);
    Ok(())
}

/// Removes a device and waits until it is gone from both sides.
fn remove(host: &Host, guest: &Guest<'_>, id: &str, place: &str) -> Result<()> {
    ctl(host, &format!("remove-device {id}"))?;
    wait_for(&format!("{id} is removed"), LONG, || {
        let info = ctl(host, "info")?;
        Ok(if info.contains(&format!("\"{id}\"")) { Err(info) } else { Ok(()) })
    })?;
    let there = guest.probe(&format!("test -e {}", sysfs(place, "vendor")))?;
    ensure(there.status != 0, || format!("the guest still has {place}"))
}

/// Adds a device; where the guest has it.
fn add(host: &Host, words: &str) -> Result<String> {
    let reply = ctl(host, words)?;
    let json: serde_json::Value =
        serde_json::from_str(&reply).map_err(|e| Error::Check(format!("{reply}: {e}")))?;
    json["bdf"].as_str().map(str::to_owned).ok_or_else(|| Error::Check(format!("no bdf in {reply}")))
}

fn mount(guest: &Guest<'_>, tag: &str) -> Result<()> {
    guest.sh("mkdir -p /mnt")?;
    wait_for("the guest mounts what was added", LONG, || {
        let output = guest.probe(&format!("mount -t virtiofs {tag} /mnt"))?;
        Ok(if output.status == 0 { Ok(()) } else { Err(output.text) })
    })
}

fn come_and_go(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let guest = host.start_vm(&spec(case, ""))?;
    for words in [
        format!("add-fs tag=share,socket={FS},id=added"),
        // The same program as a device of which only the type is known.
        format!("add-generic-vhost-user device_type=26,socket={FS},queue_sizes=[256,256],id=added"),
        format!("add-fs tag=share,socket={FS},id=added"),
    ] {
        let daemon = virtiofsd(host)?;
        let place = add(host, &words)?;
        let tag = if words.starts_with("add-fs") { "share" } else { "generic" };
        mount(&guest, tag)?;
        files(host, &guest, "/mnt")?;
        guest.sh("umount /mnt")?;
        remove(host, &guest, "added", &place)?;
        drop(daemon);
    }
    // One whose backend has died goes too.
    let daemon = storage_daemon(host)?;
    let place = add(host, &format!("add-disk vhost_user=on,socket={DISK},id=added"))?;
    wait_for("the guest sees the disk", LONG, || {
        let output = guest.probe("test -b /dev/vda")?;
        Ok(if output.status == 0 { Ok(()) } else { Err(output.text) })
    })?;
    daemon.kill()?;
    fails(&guest, "dd if=/dev/vda of=/dev/null bs=1M count=1")?;
    remove(host, &guest, "added", &place)?;
    let refused =
        host.run(&format!("dormouse ctl --api-socket {API} add-fs tag=share,socket=/run/nobody"))?;
    ensure(refused.status == 1 && refused.text.contains("start the backend first"), || refused.text)?;
    vm_lives(&guest)?;
    end(host, &guest)
}

fn disk(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let daemon = storage_daemon(host)?;
    let guest = host.start_vm(&spec(case, &format!("--disk vhost_user=on,socket={DISK}")))?;
    let size = || guest.sh("cat /sys/block/vda/size");
    ensure(size()?.trim() == (IMAGE_SIZE / 512).to_string(), || format!("the size is {:?}", size()))?;
    guest.sh_for("dd if=/dev/urandom of=/dev/vda bs=1M count=16 conv=fsync 2>/dev/null", LONG)?;
    guest.sh("echo 3 >/proc/sys/vm/drop_caches")?;
    same(host, &guest, "cat /dev/vda", &format!("cat {IMAGE}"))?;
    // The backend says that its disk has grown.
    let grown = IMAGE_SIZE * 2;
    host.sh(&format!(
        "(echo '{{\"execute\":\"qmp_capabilities\"}}'; echo '{{\"execute\":\"block_resize\",\"arguments\":\
         {{\"node-name\":\"image\",\"size\":{grown}}}}}'; sleep 1) | socat - UNIX-CONNECT:{QMP}"
    ))?;
    wait_for("the guest sees the new size", LONG, || {
        let size = size()?;
        Ok(if size.trim() == (grown / 512).to_string() { Ok(()) } else { Err(size) })
    })?;
    guest.sh_for("dd if=/dev/urandom of=/dev/vda bs=1M seek=40 count=8 conv=fsync 2>/dev/null", LONG)?;
    guest.sh("echo 3 >/proc/sys/vm/drop_caches")?;
    same(host, &guest, "cat /dev/vda", &format!("cat {IMAGE}"))?;
    daemon.kill()?;
    guest.sh("echo 3 >/proc/sys/vm/drop_caches")?;
    fails(&guest, "dd if=/dev/vda of=/dev/null bs=1M count=1")?;
    fails(&guest, "dd if=/dev/zero of=/dev/vda bs=1M count=1 conv=fsync")?;
    one_line(&guest, "_disk0")?;
    vm_lives(&guest)?;
    end(host, &guest)
}

/// passt gives the guest the address that the host has, and takes what is sent to the gateway to the host itself.
fn net(case: &Case<'_>) -> Result<()> {
    const ADDRESS: &str = "192.168.88.1/24";
    const MAC: &str = "02:00:00:00:88:01";
    const GATEWAY: &str = "192.168.88.2";
    let host = case.host;
    host.sh(&format!(
        "debian ip tuntap add vhost0 mode tap && ip addr add {ADDRESS} dev vhost0 && ip link set vhost0 up && \
         ip route add default via {GATEWAY} dev vhost0; mkdir -p {SHARED}; head -c 4000000 /dev/urandom >{SHARED}/down"
    ))?;
    let ready = "wget -q -O /dev/null http://127.0.0.1:8000/down";
    let server = Peer::start(host, "httpd", ready, &format!("httpd -f -p 8000 -h {SHARED}"))?;
    // It gives up being root before it makes its socket, and whoever is not may not ping by themselves on a host without systemd.
    host.sh(&format!(
        "chmod 1777 /tmp; rm -f {NET}; echo '0 2147483647' >/proc/sys/net/ipv4/ping_group_range"
    ))?;
    let command = format!("passt --foreground --vhost-user --socket {NET}");
    let passt = Peer::start(host, "passt", &format!("test -S {NET}"), &command)?;
    let guest =
        host.start_vm(&spec(case, &format!("--net vhost_user=on,socket={NET},mac={MAC},num_queues=2")))?;
    let mac = guest.sh("cat /sys/class/net/eth0/address")?;
    ensure(mac.trim() == MAC, || format!("the guest's address is {mac}"))?;
    guest.sh(&format!(
        "ip link set eth0 up && ip addr add {ADDRESS} dev eth0 && ip route add default via {GATEWAY}"
    ))?;
    guest.sh_for(&format!("ping -c 3 -W 10 {GATEWAY}"), LONG)?;
    guest.sh_for(&format!("wget -q -O /run/down http://{GATEWAY}:8000/down"), LONG)?;
    same(host, &guest, "cat /run/down", &format!("cat {SHARED}/down"))?;
    passt.kill()?;
    fails(&guest, &format!("ping -c 1 -W 2 {GATEWAY}"))?;
    one_line(&guest, "_net0")?;
    vm_lives(&guest)?;
    // It goes on by itself when the backend is back.
    host.sh(&format!("rm -f {NET}"))?;
    let passt = Peer::start(host, "passt", &format!("test -S {NET}"), &command)?;
    guest.sh_for(&format!("ping -c 3 -W 20 {GATEWAY}"), LONG)?;
    drop(passt);
    end(host, &guest)?;
    drop(server);
    host.sh("debian ip link del vhost0").map(drop)
}

fn not_there(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let spec = spec(case, "--fs tag=share,socket=/run/nobody");
    let refused = host.run_for(&spec.command(), LONG)?;
    ensure(refused.status == 1, || format!("ended with {}: {}", refused.status, refused.text))?;
    for part in ["/run/nobody", "No such file or directory", "start the backend first"] {
        ensure(refused.text.contains(part), || format!("nothing of '{part}' in {}", refused.text))?;
    }
    let refused = host.run_for(&spec.memory("512M").command(), LONG)?;
    ensure(refused.status == 1 && refused.text.contains("add shared=on to --memory"), || refused.text)
}
