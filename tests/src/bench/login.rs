//! Boot of a whole Debian from its disk to the login prompt.

use std::time::Duration;

use super::stopwatch::Stopwatch;
use super::{Figure, on_hosts};
use crate::artifacts::Artifacts;
use crate::debian::{self, RAW};
use crate::error::Result;
use crate::host::Host;
use crate::spec::HostSpec;

/// A host that counts its instructions is several times slower than one that does not.
const LIMIT: Duration = Duration::from_secs(400);

/// Exec of the VMM to the login prompt on the console: in seconds of work of a host whose time is counted instructions (10^9 of them are one), and of the
/// ordinary emulated host. Once each on a host: the second boot would find a file system that was not unmounted.
pub fn measure(artifacts: &Artifacts) -> Result<Vec<Figure>> {
    [
        ("boot of Debian to its login prompt, instructions", true),
        ("boot of Debian from a raw disk to its login prompt", false),
    ]
    .into_iter()
    .map(|(name, deterministic)| {
        let value = on_hosts(deterministic, || boot(artifacts, deterministic))?;
        Ok(Figure { name, value, unit: "s", target: None, note: String::new() })
    })
    .collect()
}

fn boot(artifacts: &Artifacts, deterministic: bool) -> Result<f64> {
    let spec = HostSpec { deterministic, ..HostSpec::new(&[]).memory_mib(2048).debian() };
    let host = Host::boot(&spec, artifacts, &[debian::KERNEL])?;
    let watch = Stopwatch::new(&host, LIMIT)?;
    // The host itself sees the prompt: whoever looks from outside does so in another time.
    let shows = format!(
        "{} </dev/null 2>/dev/null | (while read -r line; do case $line in *Debian*ttyS0*) kill -KILL $(pidof dormouse); exit 0 ;; esac; done; \
         exit 1)",
        debian::vm(RAW).command()
    );
    watch.host(&shows)
}
