//! The network: a file each way over a tap and round trips, between the guest and a peer on the emulated host.
//!
//! Twice: on a host whose time is counted instructions, where a figure is the work that the VMM, its host and its guest have in all, and on the
//! ordinary one, as time.

use std::time::Duration;

use super::Figure;
use crate::artifacts::Artifacts;
use crate::error::{Error, Result};
use crate::guest::{Guest, VmSpec};
use crate::host::Host;
use crate::spec::{HostSpec, Kernel};

/// What is sent each way, and how many round trips are made.
const MIB: u32 = 32;
const TRIPS: u32 = 1000;
/// How long each may take: counted instructions are slow.
const PATIENCE: Duration = Duration::from_secs(400);

const HOST: &str = "10.7.0.1";
const GUEST: &str = "10.7.0.2";

/// Seconds that each measurement took.
struct Seconds {
    to_guest: f64,
    from_guest: f64,
    trips: f64,
}

/// Instructions, then time.
pub fn measure(artifacts: &Artifacts) -> Result<Vec<Figure>> {
    let mut counted = HostSpec::new(&[]).memory_mib(2048);
    counted.deterministic = true;
    let work = seconds(artifacts, &counted)?;
    let time = seconds(artifacts, &HostSpec::new(&[]).memory_mib(2048))?;
    let figure = |name, value, unit| Figure { name, value, unit, target: None, note: String::new() };
    // A virtual second is 10^9 instructions.
    let (mib, trips) = (f64::from(MIB), f64::from(TRIPS));
    Ok(vec![
        figure("net: instructions for 1 MiB to the guest", work.to_guest * 1e3 / mib, "M"),
        figure("net: instructions for 1 MiB from the guest", work.from_guest * 1e3 / mib, "M"),
        figure("net: instructions for a round trip", work.trips * 1e3 / trips, "M"),
        figure("net: to the guest", mib / time.to_guest, "MiB/s"),
        figure("net: from the guest", mib / time.from_guest, "MiB/s"),
        figure("net: packets in round trips", 2.0 * trips / time.trips, "/s"),
    ])
}

fn seconds(artifacts: &Artifacts, spec: &HostSpec) -> Result<Seconds> {
    let kernel = Kernel::Generic6_12;
    let host = Host::boot(spec, artifacts, &[kernel])?;
    host.sh("modprobe tun")?;
    let mut vm = VmSpec::new(kernel).options(&format!("--net tap=tap0,ip={HOST},mask=255.255.255.0"));
    vm.modules = vec!["virtio_pci", "virtio_net"];
    let guest = host.start_vm(&vm).map_err(|error| host.explain(error))?;
    let result = rounds(&host, &guest).map_err(|error| host.explain(error))?;
    guest.power_off()?;
    Ok(result)
}

fn rounds(host: &Host, guest: &Guest<'_>) -> Result<Seconds> {
    guest.sh(&format!("ip link set eth0 up; ip addr add {GUEST}/24 dev eth0; ping -c 1 -W 20 {HOST}"))?;
    let file = format!("dd if=/dev/zero of=/tmp/f bs=1M count={MIB} 2>/dev/null; httpd -h /tmp");
    host.sh(&file)?;
    guest.sh(&file)?;
    // All is timed by the host's clock, and begun by the host: the guest's side waits for a connection to tell it.
    let timed = |what: &str| -> Result<f64> {
        let line = format!("read a b </proc/uptime; {what} || exit 1; read c d </proc/uptime; echo $a $c");
        let output = host.run_for(&line, PATIENCE)?;
        let times: Vec<f64> = output.text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        match times.as_slice() {
            &[before, after] if after > before => Ok(after - before),
            _ => Err(Error::Check(format!("{what}: {}", output.text))),
        }
    };
    let from_guest = timed(&format!("wget -q -O /dev/null http://{GUEST}/f"))?;
    let trips = timed(&format!("ping -A -q -c {TRIPS} {GUEST} >/dev/null"))?;
    let fetch = guest.begin(&format!(
        "nc -l -p 99 </dev/null >/dev/null; wget -q -O /dev/null http://{HOST}/f; nc {HOST} 98 </dev/null"
    ))?;
    let to_guest = timed(&format!(
        "(until echo | nc {GUEST} 99 2>/dev/null; do usleep 10000; done) && nc -l -p 98 </dev/null >/dev/null"
    ))?;
    guest.finish(&fetch, PATIENCE)?;
    host.sh("killall httpd; rm /tmp/f")?;
    Ok(Seconds { to_guest, from_guest, trips })
}
