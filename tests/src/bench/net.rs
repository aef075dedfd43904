//! The network: a file each way over a tap and round trips, between the guest and a peer on the emulated host.
//!
//! Twice: on a host whose time is counted instructions, where a figure is the work that the VMM, its host and its guest have in all, and on the
//! ordinary one, as time.

use std::time::Duration;

use super::{Figure, go_on_with_other_hosts};
use crate::artifacts::Artifacts;
use crate::error::{Error, Result};
use crate::guest::{Guest, VmSpec};
use crate::host::Host;
use crate::spec::{HostSpec, Kernel};

/// What is sent each way, and how many round trips are made.
const MIB: u32 = 32;
const TRIPS: u32 = 1000;
/// Times that each is measured. The one that took least is the figure: what else the host has to do comes on top.
const ROUNDS: usize = 3;
/// How long each may take: some seconds on an idle machine.
const PATIENCE: Duration = Duration::from_secs(40);

const HOST: &str = "10.7.0.1";
const GUEST: &str = "10.7.0.2";

/// The seconds of each round: to the guest, from the guest, round trips.
type Rounds = [Vec<f64>; 3];

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
        figure("net: instructions for 1 MiB to the guest", work[0] * 1e3 / mib, "M"),
        figure("net: instructions for 1 MiB from the guest", work[1] * 1e3 / mib, "M"),
        figure("net: instructions for a round trip", work[2] * 1e3 / trips, "M"),
        figure("net: to the guest", mib / time[0], "MiB/s"),
        figure("net: from the guest", mib / time[1], "MiB/s"),
        figure("net: packets in round trips", 2.0 * trips / time[2], "/s"),
    ])
}

/// What each took at least: what else the host has to do comes on top.
fn seconds(artifacts: &Artifacts, spec: &HostSpec) -> Result<[f64; 3]> {
    let mut rounds = Rounds::default();
    go_on_with_other_hosts(|| on_one_host(artifacts, spec, &mut rounds))?;
    Ok(rounds.map(|round| round.into_iter().fold(f64::MAX, f64::min)))
}

/// Goes on with what is missing of `rounds`, until all is there or the host is lost.
fn on_one_host(artifacts: &Artifacts, spec: &HostSpec, rounds: &mut Rounds) -> Result<()> {
    let kernel = Kernel::Generic6_12;
    let host = Host::boot(spec, artifacts, &[kernel])?;
    host.sh("modprobe tun")?;
    let mut vm = VmSpec::new(kernel).options(&format!("--net tap=tap0,ip={HOST},mask=255.255.255.0"));
    vm.modules = vec!["virtio_pci", "virtio_net"];
    let guest = host.start_vm(&vm)?;
    go_on(&host, &guest, rounds)?;
    guest.power_off()
}

fn go_on(host: &Host, guest: &Guest<'_>, rounds: &mut Rounds) -> Result<()> {
    guest.sh(&format!("ip link set eth0 up; ip addr add {GUEST}/24 dev eth0; ping -c 1 -W 20 {HOST}"))?;
    let file = format!("dd if=/dev/zero of=/tmp/f bs=1M count={MIB} 2>/dev/null; httpd -h /tmp");
    host.sh(&file)?;
    guest.sh(&file)?;
    // All is timed by the host's clock, in nanoseconds, and begun by the host: the guest's side waits for a connection to tell it.
    let now = "$(sed -n 's/^now at \\([0-9]*\\) nsecs/\\1/p' /proc/timer_list)";
    let timed = |what: &str| -> Result<f64> {
        let line = format!("a={now}; {what} || exit 1; b={now}; echo $((b - a))");
        let output = host.run_for(&line, PATIENCE)?;
        match output.text.trim().parse::<f64>() {
            Ok(nanos) if nanos > 0.0 => Ok(nanos / 1e9),
            _ => Err(Error::Check(format!("{what}: {}", output.text))),
        }
    };
    let [to_guest, from_guest, trips] = rounds;
    while from_guest.len() < ROUNDS {
        from_guest.push(timed(&format!("wget -q -O /dev/null http://{GUEST}/f"))?);
    }
    while trips.len() < ROUNDS {
        trips.push(timed(&format!("ping -A -q -c {TRIPS} {GUEST} >/dev/null"))?);
    }
    while to_guest.len() < ROUNDS {
        let fetch = guest.begin(&format!(
            "nc -l -p 99 </dev/null >/dev/null; wget -q -O /dev/null http://{HOST}/f; nc {HOST} 98 </dev/null"
        ))?;
        let took = timed(&format!(
            "(until echo | nc {GUEST} 99 2>/dev/null; do usleep 10000; done) && nc -l -p 98 </dev/null >/dev/null"
        ))?;
        guest.finish(&fetch, PATIENCE)?;
        to_guest.push(took);
    }
    Ok(())
}
