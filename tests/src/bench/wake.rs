//! The latency of wakes: the VMM's own share, and from the host's signal to the guest's interrupt and to the driver's resume callback.

use super::Figure;
use crate::artifacts::Artifacts;
use crate::error::Result;
use crate::host::Host;
use crate::spec::Kernel;
use crate::wakes;

/// Wakes of each of the cards.
const ROUNDS: usize = 25;

/// Median and 99th percentile of each.
pub fn measure(artifacts: &Artifacts) -> Result<Vec<Figure>> {
    let kernel = Kernel::Generic6_12;
    let host = Host::boot(&wakes::host(), artifacts, &[kernel])?;
    let guest = host.start_vm(&wakes::vm(&host, kernel))?;
    // The log's copy to a serial port is no part of the figures.
    let latencies = wakes::rounds(&host, &guest, ROUNDS, true).map_err(|error| host.explain(error))?;
    guest.power_off()?;
    let mut figures = Vec::new();
    for (names, values, target) in [
        (["wake: VMM's own share, median", "wake: VMM's own share, 99 %"], &latencies.share, Some(1.0)),
        (
            ["wake: to the guest's interrupt, median", "wake: to the guest's interrupt, 99 %"],
            &latencies.interrupt,
            None,
        ),
        (
            ["wake: to the driver's resume, median", "wake: to the driver's resume, 99 %"],
            &latencies.resume,
            None,
        ),
    ] {
        for ((name, percent), target) in names.into_iter().zip([50, 99]).zip([target, None]) {
            let value = wakes::percentile(values, percent);
            let note = format!("{} wakes", values.len());
            figures.push(Figure { name, value, unit: "ms", target, note });
        }
    }
    Ok(figures)
}
