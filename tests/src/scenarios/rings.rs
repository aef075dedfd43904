//! Drivers that break the rings of every kind of device, in a guest whose other devices work meanwhile and whose own driver has the device back
//! afterwards.

use std::thread;
use std::time::{Duration, Instant};

use super::everything::life_events;
use super::scenario;
use super::steps::guest_is_content;
use super::virtio::{draws, function, functions, without_driver};
use crate::error::{Result, ensure};
use crate::guest::{Guest, VmSpec};
use crate::host::Host;
use crate::rpc::wait_for;
use crate::runner::{Case, Scenario};

/// For what takes long in an emulated machine.
const LONG: Duration = Duration::from_secs(120);
/// Where the VMM answers, and its events.
const API: &str = "/run/rings.sock";
const EVENTS: &str = "/run/rings.events";
/// The socket device's socket, and images of disks.
const SOCKET: &str = "/run/rings.vsock";
const PLACE: &str = "/run/rings";
/// Lines that the log has of one device at most in ten seconds, whatever the guest does.
const LOG_LIMIT: usize = 20;
/// After that long it takes as many again.
const LOG_PERIOD: Duration = Duration::from_secs(11);
/// Events of one device that may come at once, and seconds until there may be one more.
const EVENTS_AT_ONCE: usize = 20;
const EVENT_PERIOD: u64 = 5;
/// Addresses of host and guest, one network for each device.
const NETS: [(&str, &str, &str); 2] =
    [("rings0", "10.8.0.1", "10.8.0.2"), ("rings1", "10.8.1.1", "10.8.1.2")];

/// Types of devices (VIRTIO 1.2, chapter 5).
const NET: u16 = 1;
const BLOCK: u16 = 2;
const CONSOLE: u16 = 3;
const RNG: u16 = 4;
const BALLOON: u16 = 5;
const VSOCK: u16 = 19;
const WATCHDOG: u16 = 35;

pub fn table() -> Vec<Scenario> {
    vec![
        scenario("malformed_rings_stop_their_device_and_nothing_else", small_devices),
        scenario("malformed_rings_of_disks_and_networks_stop_them_and_nothing_else", disks_and_networks),
    ]
}

fn spec(case: &Case<'_>, options: &str) -> VmSpec {
    let mut spec = VmSpec::new(case.guest)
        .cmdline("iomem=relaxed")
        .options(&format!("--api-socket {API} --event-monitor path={EVENTS} {options}"));
    spec.modules = vec![
        "virtio_pci",
        "virtio_rng",
        "virtio_balloon",
        "virtio_console",
        "virtio_blk",
        "virtio_net",
        "vmw_vsock_virtio_transport",
    ];
    spec
}

/// Lines of the log about stops of this device.
fn stops(guest: &Guest<'_>, name: &str) -> Result<usize> {
    let about = format!("device {name} has stopped until the guest resets it: ");
    Ok(guest.log()?.lines().filter(|line| line.contains(&about)).count())
}

/// Breaks these queues of a device, which the operator calls `name`, and gives it back to its driver.
fn break_and_rebind(guest: &Guest<'_>, name: &str, function: &str, queues: &[u16]) -> Result<()> {
    without_driver(guest, function)?;
    // Devices may share a slot of the log's limit: what it has taken of the one before counts until then.
    thread::sleep(LOG_PERIOD);
    for queue in queues {
        let before = stops(guest, name)?;
        let said = guest.sh_for(&format!("guest_tool break-rings {function} {queue}"), LONG)?;
        ensure(said.contains("reset 50 times"), || format!("{function} queue {queue}: {said}"))?;
        // Each is in the log, up to what the log has of one place, and no flood.
        let offences = said.matches(": stopped").count();
        ensure(offences >= 15, || format!("{function} queue {queue}: {said}"))?;
        let lines = stops(guest, name)? - before;
        // The rest may be held back: the log takes so many in ten seconds.
        let (least, most) = (if before == 0 { offences.min(LOG_LIMIT) } else { 0 }, offences + LOG_LIMIT * 4);
        ensure((least..=most).contains(&lines), || {
            format!("{name} queue {queue}: {offences} stops, {lines} lines in the log")
        })?;
    }
    bind(guest, function)
}

fn bind(guest: &Guest<'_>, function: &str) -> Result<()> {
    guest.sh(&format!("echo {function} >/sys/bus/pci/drivers/virtio-pci/bind")).map(drop)
}

/// The VMM's control socket answers, and another device works.
fn vm_lives(host: &Host, guest: &Guest<'_>) -> Result<()> {
    host.sh(&format!("dormouse ctl --api-socket {API} ping"))?;
    draws(guest)
}

/// A device that its guest starts and resets without end is told of some times at once, then seldom, and the log says so once.
fn is_told_seldom(host: &Host, guest: &Guest<'_>, name: &str, since: Instant) -> Result<()> {
    let (activated, reset) = life_events(host, EVENTS, name)?;
    let most = EVENTS_AT_ONCE + usize::try_from(since.elapsed().as_secs() / EVENT_PERIOD).unwrap_or(0) + 1;
    ensure((EVENTS_AT_ONCE..=most).contains(&(activated + reset)), || {
        format!("{name}: {activated} activated and {reset} reset are told, at most {most} are right")
    })?;
    let about = format!("device {name}: the guest starts and resets it again and again");
    let lines = guest.log()?.lines().filter(|line| line.contains(&about)).count();
    ensure(lines == 1, || format!("{name}: {lines} lines in the log"))
}

fn small_devices(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let options =
        format!("--balloon size=0 --console file=/run/rings.said --vsock cid=9,socket={SOCKET} --watchdog");
    host.sh(&format!("rm -f {EVENTS}"))?;
    let started = Instant::now();
    let guest = host.start_vm(&spec(case, &options))?;

    break_and_rebind(&guest, "__rng", &function(&guest, RNG)?, &[0])?;
    vm_lives(host, &guest)?;
    is_told_seldom(host, &guest, "__rng", started)?;

    break_and_rebind(&guest, "__balloon", &function(&guest, BALLOON)?, &[0, 1])?;
    let balloon = |bytes: u64, left: &str| -> Result<()> {
        host.sh(&format!("dormouse ctl --api-socket {API} resize --balloon {bytes}"))?;
        wait_for("the balloon has its size", LONG, || {
            let info = host.sh(&format!("dormouse ctl --api-socket {API} --json info"))?;
            Ok(if info.contains(left) { Ok(()) } else { Err(info) })
        })
    };
    balloon(64 << 20, "469762048")?;
    balloon(0, "536870912,")?;
    vm_lives(host, &guest)?;

    break_and_rebind(&guest, "__console", &function(&guest, CONSOLE)?, &[0, 1])?;
    wait_for("the console's driver is back", LONG, || {
        let there = guest.probe("echo it is back >/dev/hvc0")?;
        Ok(if there.status == 0 { Ok(()) } else { Err(there.text) })
    })?;
    wait_for("what is printed arrives", LONG, || {
        let said = host.probe("tail -n 3 /run/rings.said")?.text;
        Ok(if said.contains("it is back") { Ok(()) } else { Err(said) })
    })?;
    vm_lives(host, &guest)?;

    break_and_rebind(&guest, "_vsock0", &function(&guest, VSOCK)?, &[0, 1, 2])?;
    guest.sh("(guest_tool vsock echo 52 >/tmp/echo 2>&1 &)")?;
    guest.wait_file("/tmp/echo", "listening", LONG)?;
    let said = host.sh(&format!("(echo CONNECT 52; echo back) | socat -t 20 - UNIX-CONNECT:{SOCKET}"))?;
    ensure(said.ends_with("\nback"), || format!("the guest's echo: {said:?}"))?;
    vm_lives(host, &guest)?;

    // Linux has no driver for it. After a sign of life it is reset, so that it does not miss the next.
    let watchdog = function(&guest, WATCHDOG)?;
    break_and_rebind(&guest, "__watchdog", &watchdog, &[0])?;
    without_driver(&guest, &watchdog)?;
    guest.sh(&format!(
        "(guest_tool watchdog {watchdog} 2 >/tmp/watchdog 2>&1 & echo $! >/tmp/watchdog.pid)"
    ))?;
    guest.wait_file("/tmp/watchdog", "silent", LONG)?;
    bind(&guest, &watchdog)?;
    guest.sh("kill $(cat /tmp/watchdog.pid)")?;
    vm_lives(host, &guest)?;
    guest_is_content(&guest)?;
    guest.power_off()?;
    host.sh(&format!("rm -f /run/rings.said {EVENTS}")).map(drop)
}

/// Writes noise to a disk and reads it back past the cache.
fn disk_works(guest: &Guest<'_>, disk: &str) -> Result<()> {
    wait_for("the disk is back", LONG, || {
        let there = guest.probe(&format!("test -b {disk}"))?;
        Ok(if there.status == 0 { Ok(()) } else { Err(format!("no {disk}")) })
    })?;
    let sums = guest.sh(&format!(
        "dd if=/dev/urandom of=/run/noise bs=1M count=4 2>/dev/null && dd if=/run/noise of={disk} bs=1M seek=2 conv=fsync 2>/dev/null && \
         echo 3 >/proc/sys/vm/drop_caches && sha256sum </run/noise && dd if={disk} bs=1M skip=2 count=4 2>/dev/null | sha256sum"
    ))?;
    let sums: Vec<_> = sums.lines().collect();
    ensure(matches!(sums.as_slice(), [one, two] if one == two), || format!("{disk}: {sums:?}"))
}

/// The guest's interface for a function gets its address, and packets of any size pass.
fn net_works(host: &Host, guest: &Guest<'_>, function: &str, here: &str, there: &str) -> Result<()> {
    let mut name = String::new();
    wait_for("the network's driver is back", LONG, || {
        let output = guest.probe(&format!("basename /sys/bus/pci/devices/{function}/virtio*/net/*"))?;
        name = output.text.trim().to_owned();
        Ok(if name.is_empty() || name == "*" { Err(name.clone()) } else { Ok(()) })
    })?;
    guest.sh(&format!("ip link set {name} up; ip addr add {there}/24 dev {name}"))?;
    wait_for("the host answers", LONG, || {
        let ping = guest.run(&format!("ping -c 1 -W 2 {here}"))?;
        Ok(if ping.status == 0 { Ok(()) } else { Err(ping.text) })
    })?;
    guest.sh(&format!("ping -c 3 -i 0.2 -W 5 -s 8000 {here}"))?;
    host.sh(&format!("ping -c 3 -i 0.2 -W 5 -s 8000 {there}")).map(drop)
}

fn disks_and_networks(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    host.sh(&format!(
        "modprobe tun; modprobe vhost_net; rm -rf {PLACE}; mkdir {PLACE}; truncate -s 16M {PLACE}/raw"
    ))?;
    super::disk::qcow2_image(host, "q")?;
    host.sh(&format!("mv {}/q {PLACE}/qcow2", super::disk::PLACE))?;
    let net = |(tap, here, _): (&str, &str, &str), keys: &str| {
        format!("tap={tap},ip={here},mask=255.255.255.0{keys}")
    };
    let options = format!(
        "--disk path={PLACE}/raw,image_type=raw path={PLACE}/qcow2,image_type=qcow2 --net {} {}",
        net(NETS[0], ""),
        net(NETS[1], ",vhost=on")
    );
    let guest = host.start_vm(&spec(case, &options))?;
    for (at, disk) in functions(&guest, BLOCK)?.iter().enumerate() {
        break_and_rebind(&guest, &format!("_disk{at}"), disk, &[0])?;
        disk_works(&guest, &format!("/dev/vd{}", if at == 0 { 'a' } else { 'b' }))?;
        vm_lives(host, &guest)?;
    }
    let nets = functions(&guest, NET)?;
    ensure(nets.len() == 2, || format!("network devices: {nets:?}"))?;
    break_and_rebind(&guest, "_net0", &nets[0], &[0, 1, 2])?;
    net_works(host, &guest, &nets[0], NETS[0].1, NETS[0].2)?;
    vm_lives(host, &guest)?;
    // The host's kernel has these rings, and lets some things pass: a head that is there twice, an indirect table that was not agreed. It looks at the
    // first only when there is a packet.
    without_driver(&guest, &nets[1])?;
    for queue in [0, 1] {
        let said = guest.sh_for(&format!("guest_tool break-rings {} {queue} survive", nets[1]), LONG)?;
        let must: &[&str] = if queue == 0 {
            &["size-in-use", "address-in-use", "ring-nowhere"]
        } else {
            &[
                "loop",
                "self-loop",
                "next-past-the-table",
                "head-past-the-table",
                "index-jump",
                "buffer-nowhere",
                "size-in-use",
            ]
        };
        for offence in must {
            ensure(said.contains(&format!("{offence}: stopped")), || format!("queue {queue}: {said}"))?;
        }
    }
    ensure(stops(&guest, "_net1")? >= 10, || "not in the log".to_owned())?;
    bind(&guest, &nets[1])?;
    net_works(host, &guest, &nets[1], NETS[1].1, NETS[1].2)?;
    vm_lives(host, &guest)?;
    guest_is_content(&guest)?;
    guest.power_off()?;
    host.sh(&format!("rm -rf {PLACE} {}", super::disk::PLACE)).map(drop)
}
