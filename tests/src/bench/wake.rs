//! The latency of wakes: from the host's signal to the guest's interrupt, which is the VMM's own share, and to the driver's resume
//! callback.

use super::Figure;
use crate::artifacts::Artifacts;
use crate::error::Result;
use crate::host::Host;
use crate::spec::Kernel;
use crate::wakes;

/// Wakes of each of the cards.
const ROUNDS: usize = 6;

/// Median and 99th percentile of both.
pub fn measure(artifacts: &Artifacts) -> Result<Vec<Figure>> {
    let kernel = Kernel::Generic6_12;
    let host = Host::boot(&wakes::host(), artifacts, &[kernel])?;
    let guest = host.start_vm(&wakes::vm(&host, kernel))?;
    // The log's copy to a serial port is no part of the figures.
    let latencies = wakes::rounds(&host, &guest, ROUNDS, true).map_err(|error| host.explain(error))?;
    guest.power_off()?;
    let mut figures = Vec::new();
    for (names, values, targets) in [
        (
            ["wake: VMM's share, median", "wake: VMM's share, 99th percentile"],
            &latencies.share,
            [Some(1.0), None],
        ),
        (
            ["wake: to the driver's resume, median", "wake: to the driver's resume, 99th percentile"],
            &latencies.resume,
            [None; 2],
        ),
    ] {
        for ((name, percent), target) in names.into_iter().zip([50, 99]).zip(targets) {
            let value = wakes::percentile(values, percent);
            let note = format!("{} wakes", values.len());
            figures.push(Figure { name, value, unit: "ms", target, note });
        }
    }
    Ok(figures)
}
