//! All devices of the host that could be assigned, each with its verdict.

use std::fs;

use devices::vfio::host::HostFunction;
use pci::Bdf;

use super::checks::{ExamineError, examine};
use super::finding::{Report, Severity};
use super::host::Host;

/// Examines every function that is no bridge, by address. One that disappears meanwhile is left out.
///
/// # Errors
/// A device cannot be read.
pub fn survey(host: &Host) -> Result<Vec<Report>, ExamineError> {
    let sysfs = host.functions();
    let directory = host.sysfs.join("bus/pci/devices");
    let mut all: Vec<Bdf> = fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    all.sort_by_key(|bdf| (bdf.segment, bdf.bus, bdf.devfn));
    all.into_iter()
        .filter(|bdf| HostFunction::read(&sysfs, *bdf).is_ok_and(|function| !function.is_topology()))
        .map(|bdf| examine(host, bdf))
        .collect()
}

/// The severity that counts for the exit status: that of the device that is best off.
pub fn best(reports: &[Report]) -> Severity {
    reports.iter().map(|report| report.severity).min().unwrap_or(Severity::Ok)
}
