//! Boot of a whole Debian from its disk to the login prompt.

use std::time::Duration;

use super::Figure;
use crate::artifacts::Artifacts;
use crate::debian::{self, RAW};
use crate::error::{Error, Result};
use crate::host::Host;
use crate::spec::HostSpec;

/// A host that counts its instructions is several times slower than one that does not.
const LIMIT: Duration = Duration::from_secs(900);

/// Exec of the VMM to the login prompt on the console: in seconds of work of a host whose time is counted instructions (10^9 of them are one), and of the
/// ordinary emulated host. Once each: the second boot would find a file system that was not unmounted.
pub fn measure(artifacts: &Artifacts) -> Result<Vec<Figure>> {
    [
        ("boot of Debian to its login prompt, instructions", true),
        ("boot of Debian from a raw disk to its login prompt", false),
    ]
    .into_iter()
    .map(|(name, deterministic)| {
        let value = boot(artifacts, deterministic)?;
        Ok(Figure { name, value, unit: "s", target: None, note: String::new() })
    })
    .collect()
}

fn boot(artifacts: &Artifacts, deterministic: bool) -> Result<f64> {
    let spec = HostSpec { deterministic, ..HostSpec::new(&[]).memory_mib(2048).debian() };
    let host = Host::boot(&spec, artifacts, &[debian::KERNEL])?;
    let vm = debian::vm(RAW);
    // The host itself sees the prompt: whoever looks from outside does so in another time.
    let timed = format!(
        "read start idle </proc/uptime; {} </dev/null 2>/dev/null | while read -r line; do case $line in \
         *Debian*ttyS0*) read end later </proc/uptime; echo $start $end $idle $later; kill -KILL $(pidof dormouse); break ;; esac; done",
        vm.command()
    );
    let output = host.run_for(&timed, LIMIT)?;
    let times: Vec<f64> = output.text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    let &[start, end, idle, later] = times.as_slice() else {
        return Err(Error::Check(format!("Debian did not come to its login prompt: {}", output.text)));
    };
    // Where instructions are counted a host that sleeps skips the time until it wakes, which is no work.
    let slept = if deterministic { later - idle } else { 0.0 };
    Ok(end - start - slept)
}
