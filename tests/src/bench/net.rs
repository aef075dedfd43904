//! The network: a file each way over a tap and round trips, between the guest and a peer on the emulated host.
//!
//! Twice: on a host whose time is counted instructions, where a figure is the work that the VMM, its host and its guest have in all, and on the
//! ordinary one, as time.

use std::time::Duration;

use super::stopwatch::{GUEST, HOST, Stopwatch, join, networked};
use super::{Figure, least, on_hosts};
use crate::artifacts::Artifacts;
use crate::error::Result;
use crate::guest::VmSpec;
use crate::host::Host;
use crate::spec::{HostSpec, Kernel};

/// What is sent each way, and how many round trips are made.
const MIB: u32 = 32;
const TRIPS: u32 = 1000;
/// Times that each is measured.
const ROUNDS: usize = 5;
/// How long each may take: some seconds on an idle machine.
const PATIENCE: Duration = Duration::from_secs(40);

/// The seconds of each round: to the guest, from the guest, round trips.
type Rounds = [Vec<f64>; 3];

/// Instructions, then time.
pub fn measure(artifacts: &Artifacts) -> Result<Vec<Figure>> {
    let [work, time] = [rounds(artifacts, true)?, rounds(artifacts, false)?];
    let figure = |name, rounds: &[f64], value: &dyn Fn(f64) -> f64, unit| least(name, rounds, value, unit);
    // A counted second is 10^9 instructions.
    let (mib, trips) = (f64::from(MIB), f64::from(TRIPS));
    Ok(vec![
        figure("net: instructions for 1 MiB to the guest", &work[0], &|took| took * 1e3 / mib, "M"),
        figure("net: instructions for 1 MiB from the guest", &work[1], &|took| took * 1e3 / mib, "M"),
        figure("net: instructions for a round trip", &work[2], &|took| took * 1e6 / trips, "k"),
        figure("net: to the guest", &time[0], &|took| mib / took, "MiB/s"),
        figure("net: from the guest", &time[1], &|took| mib / took, "MiB/s"),
        figure("net: packets in round trips", &time[2], &|took| 2.0 * trips / took, "/s"),
    ])
}

fn rounds(artifacts: &Artifacts, deterministic: bool) -> Result<Rounds> {
    let mut rounds = Rounds::default();
    on_hosts(deterministic, || on_one_host(artifacts, deterministic, &mut rounds))?;
    Ok(rounds)
}

/// Goes on with what is missing of `rounds`, until all is there or the host is lost.
fn on_one_host(artifacts: &Artifacts, deterministic: bool, rounds: &mut Rounds) -> Result<()> {
    let kernel = Kernel::Generic6_12;
    let spec = HostSpec { deterministic, ..HostSpec::new(&[]).memory_mib(2048) };
    let host = Host::boot(&spec, artifacts, &[kernel])?;
    let watch = Stopwatch::new(&host, PATIENCE)?;
    let guest = host.start_vm(&networked(&host, VmSpec::new(kernel))?)?;
    join(&guest)?;
    let file = format!("dd if=/dev/zero of=/tmp/f bs=1M count={MIB} 2>/dev/null; httpd -h /tmp");
    host.sh(&file)?;
    guest.sh(&file)?;
    let [to_guest, from_guest, trips] = rounds;
    while from_guest.len() < ROUNDS {
        from_guest.push(watch.host(&format!("wget -q -O /dev/null http://{GUEST}/f"))?);
    }
    while trips.len() < ROUNDS {
        trips.push(watch.host(&format!("ping -A -q -c {TRIPS} {GUEST} >/dev/null"))?);
    }
    while to_guest.len() < ROUNDS {
        to_guest.push(
            watch.guest(
                &guest,
                &format!("{{ echo ready; read go; wget -q -O /dev/null http://{HOST}/f; }}"),
            )?,
        );
    }
    guest.power_off()
}
