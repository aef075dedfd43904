//! Drivers that break the rings of devices that other processes serve: qemu-storage-daemon and virtiofsd. Each of these has its own way with them
//! (it ends, closes its connection, stops to serve, or does not mind), and is started again when it ends. Whatever it does, the VM lives, its other
//! devices work, no thread of the VMM spins, and the guest's own driver has the device back afterwards.

use std::time::Duration;

use super::on;
use super::steps::guest_is_content;
use super::vhost_user::{DISK, FS, IMAGE, SHARED, files};
use super::virtio::{draws, function, without_driver};
use crate::error::{Error, Result, ensure};
use crate::guest::{Guest, VmSpec};
use crate::host::Host;
use crate::rpc::wait_for;
use crate::runner::{Case, Scenario};
use crate::spec::HostSpec;

/// For what takes long in an emulated machine.
const LONG: Duration = Duration::from_secs(240);
/// Where the VMM answers.
const API: &str = "/run/vrings.sock";
/// How long a ring is left broken, and how much of that the VMM is looked at.
const HELD: u64 = 12;
const WATCHED: Duration = Duration::from_secs(5);
/// The most that threads of the VMM may work while they are looked at, in hundredths of a second: one that spins has five hundred.
const TICKS_MAX: u64 = 60;
/// Ways that each leave the backend with something else to find out.
const WAYS: [&str; 4] = ["loop", "head-past-the-table", "index-jump", "buffer-nowhere"];
/// What the VMM itself must see of a driver's mistakes, whoever serves the ring.
const SEEN_HERE: [&str; 8] = [
    "size-in-use",
    "address-in-use",
    "queue-that-is-not-there",
    "ring-nowhere",
    "ring-misaligned",
    "size-zero",
    "size-not-a-power-of-two",
    "size-huge",
];

pub fn table() -> Vec<Scenario> {
    let host = || HostSpec::new(&[]).debian();
    vec![
        on(host(), "malformed_rings_of_a_vhost_user_disk_harm_nothing_else", disk),
        on(host(), "malformed_rings_of_a_shared_directory_harm_nothing_else", file_system),
    ]
}

/// A backend that is started again whenever it ends, until this is dropped.
struct Supervised<'h> {
    host: &'h Host,
    name: &'static str,
}

impl<'h> Supervised<'h> {
    fn start(host: &'h Host, name: &'static str, socket: &str, command: &str) -> Result<Self> {
        host.sh(&format!(
            "rm -f {socket} /run/{name}.starts; (while :; do rm -f {socket}; {command} & echo $! >/run/{name}.pid; \
             echo >>/run/{name}.starts; wait; usleep 100000; done & echo $! >/run/{name}.loop) </dev/null >/run/{name}.log 2>&1"
        ))?;
        let supervised = Self { host, name };
        supervised.wait_listens(socket)?;
        Ok(supervised)
    }

    fn wait_listens(&self, socket: &str) -> Result<()> {
        let Self { host, name } = self;
        wait_for(&format!("{name} listens"), LONG, || {
            let listens = host.probe(&format!("test -S {socket}"))?.status == 0;
            Ok(if listens { Ok(()) } else { Err(host.probe(&format!("cat /run/{name}.log"))?.text) })
        })
    }

    /// Ends it, so that there is a new one, which knows nothing of what was.
    fn renew(&self, socket: &str) -> Result<()> {
        let name = self.name;
        // What it has said and how it is left, for whoever reads of a failure.
        self.host.sh(&format!(
            "tail -n 20 /run/{name}.log; wc -l </run/{name}.starts; cat /proc/$(cat /run/{name}.pid)/task/*/comm; true"
        ))?;
        self.host.sh(&format!("rm -f {socket}; kill -9 $(cat /run/{name}.pid)"))?;
        self.wait_listens(socket)
    }
}

impl Drop for Supervised<'_> {
    fn drop(&mut self) {
        let name = self.name;
        let _ = self.host.sh(&format!(
            "kill -9 $(cat /run/{name}.loop); kill -9 $(cat /run/{name}.pid) 2>/dev/null; rm -f /run/{name}.*; true"
        ));
    }
}

fn spec(case: &Case<'_>, options: &str) -> VmSpec {
    let mut vm = VmSpec::new(case.guest)
        .memory("512M,shared=on")
        .cmdline("iomem=relaxed")
        .options(&format!("--api-socket {API} {options}"));
    vm.modules = vec!["virtio_pci", "virtio_rng", "virtiofs", "virtio_blk"];
    vm
}

/// The VMM's control socket answers, another device works, and the guest's kernel has not complained.
fn vm_lives(host: &Host, guest: &Guest<'_>) -> Result<()> {
    host.sh(&format!("dormouse ctl --api-socket {API} ping"))?;
    draws(guest)?;
    guest_is_content(guest)
}

/// What the VMM's threads but the vCPUs have worked so far, in hundredths of a second, and how many threads and descriptors it has.
fn vmm(host: &Host) -> Result<[u64; 3]> {
    let text = host.sh(
        "cd /proc/$(cat /run/vmm.pid); for t in task/*; do case $(cat $t/comm) in vcpu*) ;; *) cat $t/stat; esac; done | \
         sed 's/.*) //' | awk '{sum += $12 + $13} END {print sum}'; ls task | wc -l; ls fd | wc -l",
    )?;
    let numbers: Vec<u64> = text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    numbers.try_into().map_err(|_| Error::Check(format!("the VMM's work: {text}")))
}

/// Breaks these queues of a device without a driver in every way there is, and leaves them broken in some.
fn break_all(host: &Host, guest: &Guest<'_>, name: &str, function: &str, queues: &[u16]) -> Result<()> {
    without_driver(guest, function)?;
    let [_, threads, descriptors] = vmm(host)?;
    for queue in queues {
        let said = guest.sh_for(&format!("guest_tool break-rings {function} {queue} survive"), LONG)?;
        for offence in SEEN_HERE {
            ensure(said.contains(&format!("{offence}: stopped")), || format!("queue {queue}: {said}"))?;
        }
        vm_lives(host, guest)?;
    }
    let log = guest.log()?;
    let about = format!("device {name} has stopped until the guest resets it: ");
    ensure(log.contains(&about), || format!("no line about {name}: {log}"))?;
    for way in WAYS {
        let file = format!("/run/{way}");
        guest.sh(&format!(
            "(guest_tool break-rings {function} {} hold {way} {HELD} >{file} 2>&1 &)",
            queues[0]
        ))?;
        guest.wait_file(&file, "broken", LONG)?;
        // What comes at once has come by then: the backend's end, and the VMM's answer to it.
        std::thread::sleep(Duration::from_secs(2));
        let [before, ..] = vmm(host)?;
        std::thread::sleep(WATCHED);
        let [after, ..] = vmm(host)?;
        ensure(after - before <= TICKS_MAX, || {
            format!("{way}: the VMM has worked {} ms in {WATCHED:?}", (after - before) * 10)
        })?;
        vm_lives(host, guest)?;
        guest.wait_file(&file, "broken\nreset", LONG)?;
    }
    let [_, threads_now, descriptors_now] = vmm(host)?;
    ensure(threads_now <= threads && descriptors_now <= descriptors, || {
        format!("{threads} threads and {descriptors} descriptors became {threads_now} and {descriptors_now}")
    })?;
    Ok(())
}

fn bind(guest: &Guest<'_>, function: &str) -> Result<()> {
    guest.sh(&format!("echo {function} >/sys/bus/pci/drivers/virtio-pci/bind")).map(drop)
}

fn disk(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    host.sh(&format!("rm -f {IMAGE}; truncate -s 32M {IMAGE}"))?;
    let command = format!(
        "qemu-storage-daemon --blockdev driver=file,node-name=image,filename={IMAGE} \
         --export type=vhost-user-blk,id=export,addr.type=unix,addr.path={DISK},node-name=image,writable=on"
    );
    let daemon = Supervised::start(host, "storage-daemon", DISK, &command)?;
    let guest = host.start_vm(&spec(case, &format!("--disk vhost_user=on,socket={DISK}")))?;
    super::everything::use_disk(&guest, "vda")?;
    let function = function(&guest, 2)?;
    break_all(host, &guest, "_disk0", &function, &[0])?;
    bind(&guest, &function)?;
    super::everything::use_disk(&guest, "vda")?;
    vm_lives(host, &guest)?;
    guest.power_off()?;
    drop(daemon);
    host.sh(&format!("rm -f {IMAGE}")).map(drop)
}

fn file_system(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    host.sh(&format!("mkdir -p {SHARED}"))?;
    let command = format!("virtiofsd --socket-path={FS} --shared-dir={SHARED} --sandbox=none");
    let daemon = Supervised::start(host, "virtiofsd", FS, &command)?;
    let guest = host.start_vm(&spec(case, &format!("--fs tag=share,socket={FS}")))?;
    guest.sh("mkdir /mnt && mount -t virtiofs share /mnt")?;
    files(host, &guest, "/mnt")?;
    guest.sh("umount /mnt")?;
    let function = function(&guest, 26)?;
    break_all(host, &guest, "_fs0", &function, &[0, 1])?;
    // Of virtiofsd the thread of a ring may end with that, and the rest go on: it does not serve then, and nobody but itself can know.
    daemon.renew(FS)?;
    bind(&guest, &function)?;
    wait_for("the guest mounts the directory", LONG, || {
        let output = guest.probe("mount -t virtiofs share /mnt")?;
        Ok(if output.status == 0 { Ok(()) } else { Err(output.text) })
    })?;
    files(host, &guest, "/mnt")?;
    vm_lives(host, &guest)?;
    guest.power_off()?;
    drop(daemon);
    host.sh(&format!("rm -rf {SHARED}")).map(drop)
}
