//! One guest with every device that there is, each against its real peer: what they do at the same time, and that they do nothing when there is
//! nothing to do.

use std::time::Duration;

use super::on;
use super::steps::{FIRST, IDLE, bdf, guest_is_content, unbind};
use super::vhost_user::{self, Peer, files};
use super::virtio::{draws, functions, without_driver};
use crate::error::{Error, Result, ensure};
use crate::guest::{Guest, VmSpec};
use crate::host::Host;
use crate::rpc::wait_for;
use crate::runner::{Case, Scenario};
use crate::spec::{Device, HostSpec, Slot};

/// Slot of the GPU.
pub const GPU: usize = 0;
/// For what takes long in an emulated machine.
const LONG: Duration = Duration::from_secs(120);
/// Where the VMM answers, and its events.
pub const API: &str = "/run/every.sock";
pub const EVENTS: &str = "/run/every.events";
/// The socket device's socket.
pub const SOCKET: &str = "/run/every.vsock";
/// Where images are, and what the console has said.
pub const PLACE: &str = "/run/every";
pub const SAID: &str = "/run/every/said";
/// Two networks, moved by the VMM and by the host's kernel: tap, host, guest, the guest's interface's address.
pub const NETS: [(&str, &str, &str, &str); 2] = [
    ("every0", "10.9.0.1", "10.9.0.2", "02:00:00:09:00:02"),
    ("every1", "10.9.1.1", "10.9.1.2", "02:00:00:09:01:02"),
];
/// Disks in the guest, in the order of the options: raw, qcow2, vhost-user.
const DISKS: [&str; 3] = ["vda", "vdb", "vdc"];
/// The most that the guest is told to be idle before it counts, and for how long nothing may happen then.
const SETTLES: Duration = Duration::from_secs(20);
const SILENCE: Duration = Duration::from_secs(10);

pub fn table() -> Vec<Scenario> {
    let host = || HostSpec::new(&[Slot::new(Device::Gpu)]).debian();
    vec![
        on(host(), "a_guest_with_every_device_attached_wakes_no_thread_of_the_vmm", idle),
        on(host(), "every_device_works_again_after_its_driver_was_unbound_and_bound", rebind),
        on(host(), "a_guest_that_reboots_while_it_uses_every_device_has_them_all_again", reboot),
        on(host(), "a_pause_in_the_middle_of_transfers_loses_nothing", pause),
    ]
}

/// What serves the devices on the host. All ends with it.
pub struct Peers<'h> {
    host: &'h Host,
    /// virtiofsd and the storage daemon.
    served: Vec<Peer<'h>>,
}

impl<'h> Peers<'h> {
    pub fn start(host: &'h Host) -> Result<Self> {
        host.sh(&format!(
            "modprobe tun; modprobe vhost_net; rm -rf {PLACE} {EVENTS} {SOCKET}*; mkdir {PLACE}; truncate -s 64M {PLACE}/raw; \
             for f in all default; do echo 1 >/proc/sys/net/ipv6/conf/$f/disable_ipv6; done 2>/dev/null; true"
        ))?;
        super::disk::qcow2_image(host, "q")?;
        host.sh(&format!("mv {}/q {PLACE}/qcow2", super::disk::PLACE))?;
        Ok(Self { host, served: Self::serve(host)? })
    }

    fn serve(host: &'h Host) -> Result<Vec<Peer<'h>>> {
        Ok(vec![vhost_user::virtiofsd(host)?, vhost_user::storage_daemon(host)?])
    }

    /// Starts those anew that serve one VMM and end when it leaves them.
    pub fn again(&mut self) -> Result<()> {
        // Each ends with what stands for it, before there is another of its name.
        self.served.clear();
        self.served = Self::serve(self.host)?;
        Ok(())
    }
}

impl Drop for Peers<'_> {
    fn drop(&mut self) {
        self.served.clear();
        let shared = vhost_user::SHARED;
        let _ = self.host.sh(&format!(
            "killall httpd socat cat 2>/dev/null; rm -rf {PLACE} {shared} {} {} {EVENTS} {SOCKET}*; \
             for f in all default; do echo 0 >/proc/sys/net/ipv6/conf/$f/disable_ipv6; done 2>/dev/null; true",
            vhost_user::IMAGE,
            super::disk::PLACE
        ));
    }
}

/// A VM with all of it.
pub fn spec(case: &Case<'_>, console: &str) -> VmSpec {
    let net = |(tap, here, _, mac): (&str, &str, &str, &str), keys: &str| {
        format!("tap={tap},ip={here},mask=255.255.255.0,mac={mac}{keys}")
    };
    let mut spec = VmSpec::new(case.guest).memory("512M,shared=on").device(case.host, &bdf(GPU)).options(&format!(
        "--api-socket {API} --event-monitor path={EVENTS} --console {console} \
         --disk path={PLACE}/raw,image_type=raw,ops_size=5000,ops_refill_time=100 path={PLACE}/qcow2,image_type=qcow2 \
         vhost_user=on,socket={} --net {} {} --fs tag=share,socket={} --vsock cid=9,socket={SOCKET} \
         --balloon size=0,free_page_reporting=on --watchdog --pvpanic",
        vhost_user::DISK,
        net(NETS[0], ""),
        net(NETS[1], ",vhost=on"),
        vhost_user::FS
    ));
    spec.modules.extend([
        "virtio_rng",
        "virtiofs",
        "virtio_blk",
        "virtio_net",
        "virtio_console",
        "virtio_balloon",
        "vmw_vsock_virtio_transport",
        "pvpanic_pci",
    ]);
    spec
}

pub fn ctl(host: &Host, words: &str) -> Result<String> {
    host.sh(&format!("dormouse ctl --api-socket {API} --json {words}"))
}

/// Uses each device once.
pub fn use_all(host: &Host, guest: &Guest<'_>) -> Result<()> {
    draws(guest)?;
    for disk in DISKS {
        use_disk(guest, disk)?;
    }
    for (_, here, there, mac) in NETS {
        use_net(host, guest, here, there, mac)?;
    }
    wait_for("the guest mounts the directory", LONG, || {
        let output = guest.probe("mkdir -p /mnt; mount -t virtiofs share /mnt")?;
        Ok(if output.status == 0 { Ok(()) } else { Err(output.text) })
    })?;
    files(host, guest, "/mnt")?;
    guest.sh("umount /mnt")?;
    use_vsock(host, guest)?;
    use_balloon(host)
}

pub fn use_disk(guest: &Guest<'_>, disk: &str) -> Result<()> {
    wait_for("the disk is there", LONG, || {
        let there = guest.probe(&format!("test -b /dev/{disk}"))?;
        Ok(if there.status == 0 { Ok(()) } else { Err(format!("no {disk}")) })
    })?;
    let sums = guest.sh_for(
        &format!(
            "dd if=/dev/urandom of=/run/noise bs=1M count=3 2>/dev/null && dd if=/run/noise of=/dev/{disk} bs=1M seek=2 conv=fsync 2>/dev/null && \
             echo 3 >/proc/sys/vm/drop_caches && sha256sum </run/noise && dd if=/dev/{disk} bs=1M skip=2 count=3 2>/dev/null | sha256sum; rm /run/noise"
        ),
        LONG,
    )?;
    let sums: Vec<_> = sums.lines().collect();
    ensure(matches!(sums.as_slice(), [one, two] if one == two), || format!("{disk}: {sums:?}"))
}

pub fn use_net(host: &Host, guest: &Guest<'_>, here: &str, there: &str, mac: &str) -> Result<()> {
    let name = net_name(guest, mac)?;
    guest.sh(&format!(
        "echo 1 >/proc/sys/net/ipv6/conf/{name}/disable_ipv6; ip link set {name} up; ip addr add {there}/24 dev {name} 2>/dev/null; true"
    ))?;
    wait_for("the host answers", LONG, || {
        let ping = guest.run(&format!("ping -c 1 -W 2 {here}"))?;
        Ok(if ping.status == 0 { Ok(()) } else { Err(ping.text) })
    })?;
    guest.sh(&format!("ping -c 2 -i 0.2 -W 5 -s 6000 {here}"))?;
    host.sh(&format!("ping -c 2 -i 0.2 -W 5 -s 6000 {there}")).map(drop)
}

/// The interface with this address, once it is there.
fn net_name(guest: &Guest<'_>, mac: &str) -> Result<String> {
    wait_for("the interface is there", LONG, || {
        let found = guest.probe(&format!("grep -l {mac} /sys/class/net/*/address"))?.text;
        Ok(found.split('/').nth(4).map(str::to_owned).ok_or(found))
    })
}

pub fn use_vsock(host: &Host, guest: &Guest<'_>) -> Result<()> {
    guest.sh(
        "pidof guest_tool >/dev/null || { rm -f /run/echo; (guest_tool vsock echo 52 >/run/echo 2>&1 &) }",
    )?;
    guest.wait_file("/run/echo", "listening", LONG)?;
    let said = host
        .run_for(&format!("(echo CONNECT 52; echo all of it) | socat -t 20 - UNIX-CONNECT:{SOCKET}"), LONG)?;
    ensure(said.text.ends_with("\nall of it"), || format!("the guest's echo: {}", said.text))
}

fn use_balloon(host: &Host) -> Result<()> {
    for (bytes, left) in [(32_u32 << 20, "503316480"), (0, "536870912,")] {
        ctl(host, &format!("resize --balloon {bytes}"))?;
        wait_for("the balloon has its size", LONG, || {
            let info = ctl(host, "info")?;
            Ok(if info.contains(left) { Ok(()) } else { Err(info) })
        })?;
    }
    Ok(())
}

/// The console's output arrives at the host.
pub fn use_console(host: &Host, guest: &Guest<'_>, words: &str) -> Result<()> {
    wait_for("the console is there", LONG, || {
        let there = guest.probe(&format!("echo {words} >/dev/hvc0"))?;
        Ok(if there.status == 0 { Ok(()) } else { Err(there.text) })
    })?;
    wait_for("what is printed arrives", LONG, || {
        let said = host.probe(&format!("tail -n 3 {SAID}"))?.text;
        Ok(if said.contains(words) { Ok(()) } else { Err(said) })
    })
}

/// How often each thread of the VMM but the vCPUs was scheduled since it started.
fn wakes(host: &Host) -> Result<Vec<String>> {
    let text = host
        .sh("cd /proc/$(cat /run/vmm.pid)/task; for t in *; do read n <$t/comm; case $n in vcpu*) ;; *) \
         echo $n $(grep -h ctxt_switches $t/status | tr -cd '0-9\\n'); esac; done")?;
    Ok(text.lines().map(str::to_owned).collect())
}

/// Interrupts of the entropy device, which Linux draws from by itself too.
fn draws_so_far(guest: &Guest<'_>) -> Result<String> {
    guest.sh("grep 'virtio.*-input' /proc/interrupts")
}

fn idle(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let peers = Peers::start(host)?;
    let guest = host.start_vm(&spec(case, "pty"))?;
    let info = ctl(host, "info")?;
    let json: serde_json::Value =
        serde_json::from_str(&info).map_err(|e| Error::Check(format!("{info}: {e}")))?;
    let terminal = json["config"]["console"]["file"].as_str().unwrap_or_default().to_owned();
    host.sh(&format!("stty -F {terminal} raw -echo; (cat {terminal} >{SAID} 2>/dev/null &)"))?;
    use_all(host, &guest)?;
    use_console(host, &guest, "before the silence")?;
    // A connection that is open, a directory that is mounted, and a device that sleeps.
    host.sh(&format!(
        "((echo CONNECT 52; sleep 300) | socat - UNIX-CONNECT:{SOCKET} >/run/every/open 2>&1) &"
    ))?;
    guest.sh("mount -t virtiofs share /mnt")?;
    unbind(&guest, FIRST)?;
    host.wait_power_state(&bdf(GPU), "D3cold", IDLE)?;
    // Neighbours are looked for once more, free pages are reported, workers of io_uring leave.
    std::thread::sleep(SETTLES);
    let drawn = draws_so_far(&guest)?;
    std::thread::sleep(Duration::from_secs(1));
    let before = wakes(host)?;
    for name in [
        "_disk0_q0",
        "_disk1_q0",
        "_disk2",
        "_net0_qp0",
        "_net1_ctrl",
        "_fs0",
        "_vsock",
        "__console",
        "__balloon",
        "__rng",
        "pm-01:00",
    ] {
        ensure(before.iter().any(|line| line.starts_with(name)), || format!("no {name} in {before:?}"))?;
    }
    std::thread::sleep(SILENCE);
    let after = wakes(host)?;
    // Once a minute Linux draws from the entropy device for its own pool, which is not idle.
    let drew = draws_so_far(&guest)? != drawn;
    let woken: Vec<_> =
        after.iter().filter(|line| !(before.contains(line) || drew && line.starts_with("__rng "))).collect();
    ensure(woken.is_empty() && before.len() == after.len(), || {
        format!("woken while idle: {woken:?} of {before:?}")
    })?;
    host.power_state(&bdf(GPU))
        .and_then(|state| ensure(state == "D3cold", || format!("the GPU is in {state}")))?;
    host.sh("killall sleep || true")?;
    guest.sh("umount /mnt")?;
    use_all(host, &guest)?;
    guest_is_content(&guest)?;
    guest.power_off()?;
    drop(peers);
    Ok(())
}

/// How often the event monitor has said that a device was activated, and that it was reset.
pub fn life_events(host: &Host, events: &str, id: &str) -> Result<(usize, usize)> {
    let text = host.sh(&format!("cat {events}"))?;
    let of_it: Vec<serde_json::Value> = text
        .split("\n\n")
        .filter_map(|part| serde_json::from_str(part).ok())
        .filter(|event: &serde_json::Value| {
            event["source"] == "virtio-device" && event["properties"]["id"] == id
        })
        .collect();
    let count = |what: &str| of_it.iter().filter(|event| event["event"] == what).count();
    let (activated, reset) = (count("activated"), count("reset"));
    ensure(activated + reset == of_it.len(), || format!("{id} has other events: {of_it:?}"))?;
    Ok((activated, reset))
}

/// Each device with a driver has begun and was reset so often.
fn life_is_told(host: &Host, activated: usize, reset: usize) -> Result<()> {
    for id in
        ["_disk0", "_disk1", "_disk2", "_net0", "_net1", "_fs0", "_vsock0", "__console", "__balloon", "__rng"]
    {
        let told = life_events(host, EVENTS, id)?;
        ensure(told == (activated, reset), || format!("{id}: activated and reset {told:?} times"))?;
    }
    Ok(())
}

fn rebind(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let peers = Peers::start(host)?;
    let guest = host.start_vm(&spec(case, &format!("file={SAID}")))?;
    use_all(host, &guest)?;
    // Network, block, console, entropy, balloon, sockets, file system, watchdog (VIRTIO 1.2, chapter 5).
    let mut all = Vec::new();
    for device_type in [1, 2, 3, 4, 5, 19, 26, 35] {
        all.extend(functions(&guest, device_type)?);
    }
    ensure(all.len() == 11, || format!("functions: {all:?}"))?;
    for round in 0..3 {
        // The server's socket would keep the driver's module.
        guest
            .sh("killall guest_tool 2>/dev/null; while pidof guest_tool >/dev/null; do usleep 20000; done")?;
        for function in &all {
            without_driver(&guest, function)?;
        }
        for function in &all {
            guest.sh(&format!("echo {function} >/sys/bus/pci/drivers/virtio-pci/bind"))?;
        }
        use_all(host, &guest)?;
        use_console(host, &guest, &format!("round {round}"))?;
    }
    life_is_told(host, 4, 3)?;
    let log = guest.log()?;
    ensure(!log.contains("has stopped until"), || format!("a device has stopped: {log}"))?;
    guest_is_content(&guest)?;
    guest.power_off()?;
    drop(peers);
    Ok(())
}

/// Keeps every device busy.
pub fn busy(host: &Host, guest: &Guest<'_>) -> Result<()> {
    guest.sh("mkdir -p /mnt && mount -t virtiofs share /mnt")?;
    guest.sh(
        "for d in vda vdb vdc; do (while :; do dd if=/dev/zero of=/dev/$d bs=64K count=64 seek=64 oflag=direct; dd if=/dev/$d of=/dev/null bs=64K \
         count=64 iflag=direct; done >/dev/null 2>&1 &); done; (while :; do dd if=/dev/zero of=/mnt/busy bs=64K count=16; done >/dev/null 2>&1 &); \
         (while :; do dd if=/dev/hwrng of=/dev/null bs=1K count=16; done >/dev/null 2>&1 &); (while :; do seq 500; done >/dev/hvc0 2>/dev/null &)",
    )?;
    for (_, here, there, _) in NETS {
        guest.sh(&format!("(ping -i 0.01 -s 6000 {here} >/dev/null 2>&1 &)"))?;
        host.sh(&format!("(timeout 300 ping -i 0.01 -s 6000 {there} >/dev/null 2>&1 &)"))?;
    }
    host.sh(&format!(
        "((echo CONNECT 52; timeout 300 yes) | socat - UNIX-CONNECT:{SOCKET} >/dev/null 2>&1) &"
    ))?;
    ctl(host, "resize --balloon 67108864").map(drop)
}

fn reboot(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let peers = Peers::start(host)?;
    let guest = host.start_vm(&spec(case, &format!("file={SAID}")))?;
    use_all(host, &guest)?;
    for way in ["api", "sysrq"] {
        busy(host, &guest)?;
        std::thread::sleep(Duration::from_secs(3));
        let mark = guest.mark();
        match way {
            "api" => drop(ctl(host, "reboot")?),
            _ => drop(guest.begin("echo b >/proc/sysrq-trigger")?),
        }
        guest.wait_ready(mark)?;
        host.sh(&format!("killall yes ping socat 2>/dev/null; rm -f {}/busy", vhost_user::SHARED))?;
        ctl(host, "resize --balloon 0")?;
        use_all(host, &guest)?;
        use_console(host, &guest, &format!("after {way}"))?;
        let log = guest.log()?;
        ensure(!log.contains("has stopped until") && !log.contains("defect"), || {
            format!("after {way}: {log}")
        })?;
    }
    guest_is_content(&guest)?;
    guest.power_off()?;
    drop(peers);
    Ok(())
}

fn pause(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let peers = Peers::start(host)?;
    let guest = host.start_vm(&spec(case, &format!("file={SAID}")))?;
    use_all(host, &guest)?;
    let shared = vhost_user::SHARED;
    host.sh(&format!(
        "head -c 9437184 /dev/urandom >{PLACE}/noise; cp {PLACE}/noise {shared}/noise; mkdir {PLACE}/www; cp {PLACE}/noise {PLACE}/www; \
         httpd -p 0.0.0.0:80 -h {PLACE}/www"
    ))?;
    let sum = host.sh(&format!("sha256sum <{PLACE}/noise"))?;
    guest.sh("mount -t virtiofs share /mnt && cp /mnt/noise /run/noise")?;
    // From the host to the guest, and back.
    let server = format!("{SOCKET}_700");
    host.sh(&format!("socat -u UNIX-LISTEN:{server} CREATE:{PLACE}/got >/dev/null 2>&1 &"))?;
    host.sh(&format!(": >{SAID}"))?;
    let jobs: Vec<String> = [
        ("vda", "dd if=/run/noise of=/dev/vda bs=16K oflag=direct && dd if=/dev/vda bs=16K count=576 iflag=direct | sha256sum".to_owned()),
        ("vdb", "dd if=/run/noise of=/dev/vdb bs=16K oflag=direct && dd if=/dev/vdb bs=16K count=576 iflag=direct | sha256sum".to_owned()),
        ("vdc", "dd if=/run/noise of=/dev/vdc bs=16K oflag=direct && dd if=/dev/vdc bs=16K count=576 iflag=direct | sha256sum".to_owned()),
        ("net0", format!("wget -q -O - http://{}/noise | sha256sum", NETS[0].1)),
        ("net1", format!("wget -q -O - http://{}/noise | sha256sum", NETS[1].1)),
        ("fs", "cp /run/noise /mnt/back && echo 3 >/proc/sys/vm/drop_caches && sha256sum </mnt/back".to_owned()),
        ("vsock", "guest_tool vsock connect 2 700 </run/noise && sha256sum </run/noise".to_owned()),
        ("console", "(stty raw -echo <&1 && cat /run/noise) <>/dev/hvc0 >&0 && sha256sum </run/noise".to_owned()),
    ]
    .into_iter()
    .map(|(name, command)| format!("(({command}) >/run/sum.{name} 2>/dev/null; echo >/run/end.{name}) &"))
    .collect();
    guest.sh(&format!("({}) </dev/null >/dev/null 2>&1", jobs.join(" ")))?;
    // How long it runs and stands still, in milliseconds.
    for (runs, stands) in [(1500, 5000), (300, 0), (700, 100), (50, 2000), (0, 0), (1500, 5000)] {
        std::thread::sleep(Duration::from_millis(runs));
        ctl(host, "pause")?;
        std::thread::sleep(Duration::from_millis(stands));
        ctl(host, "resume")?;
    }
    wait_for("all transfers end", LONG * 3, || {
        let ended = guest.probe("ls /run/end.* 2>/dev/null | wc -l")?.text;
        Ok(if ended.trim() == "8" { Ok(()) } else { Err(format!("{ended} of 8")) })
    })?;
    let sums = guest.sh("grep . /run/sum.*")?;
    ensure(sums.matches(sum.trim()).count() == 8, || format!("the sums are not all {sum}: {sums}"))?;
    for file in [format!("{PLACE}/got"), SAID.to_owned(), format!("{shared}/back")] {
        wait_for("all of it is on the host", LONG, || {
            let there = host.sh(&format!("sha256sum <{file}"))?;
            Ok(if there == sum {
                Ok(())
            } else {
                Err(format!("{file}: {}", host.sh(&format!("stat -c %s {file}"))?))
            })
        })?;
    }
    guest.sh("rm /mnt/back /mnt/noise; umount /mnt")?;
    use_all(host, &guest)?;
    guest_is_content(&guest)?;
    guest.power_off()?;
    drop(peers);
    Ok(())
}
