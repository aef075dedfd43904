//! All checks of one device, in the order in which a person would make them: can a guest have it, may it sleep, can its power be cut.
//!
//! What decides is Linux's `pci_target_state`, `acpi_pci_choose_state`, `acpi_pci_set_power_state` and `pci_bridge_d3_possible`: a
//! device loses its power by power resources of its own, or by those of a port above when everything below that port sleeps.

mod device;
mod platform;
mod port;
mod power;

use devices::vfio::host::{HostError, HostFunction, IommuGroup};
use pci::Bdf;
use vfio_pm::sysfs::{HostPower, ReadError};

use super::class;
use super::finding::{Check, Finding, Identity, Report, Severity};
use super::host::Host;
use super::pm::{self, Evidence};
use super::usage::{self, Owner};

/// Checks whose findings keep no device awake.
const NOT_ABOUT_POWER: [Check; 6] =
    [Check::Kvm, Check::Memlock, Check::VfioNode, Check::Reset, Check::Console, Check::HostUse];

/// A device cannot be examined.
#[derive(Debug, thiserror::Error)]
pub enum ExamineError {
    /// It is absent, or cannot be read.
    #[error(transparent)]
    Host(#[from] HostError),
    /// Its power attributes cannot be read.
    #[error(transparent)]
    Power(#[from] ReadError),
}

/// What is known of a device before the first judgement.
#[derive(Debug)]
pub struct Patient {
    /// The function.
    pub function: HostFunction,
    /// Its IOMMU group.
    pub group: Option<IommuGroup>,
    /// Its power and that of the devices around it.
    pub power: HostPower,
    /// Who has it open.
    pub owner: Option<Owner>,
    /// What is known of its power management capability.
    pub pm: Evidence,
}

impl Patient {
    /// Reads a device, without waking it.
    ///
    /// # Errors
    /// It is absent, or cannot be read.
    pub fn read(host: &Host, bdf: Bdf) -> Result<Self, ExamineError> {
        let sysfs = host.functions();
        let function = HostFunction::read(&sysfs, bdf)?;
        let group = IommuGroup::of(&sysfs, &function)?;
        let power = HostPower::read(&host.sysfs, bdf)?;
        let owner = usage::owner(host, &function);
        // A VM may put the device to sleep between a look at its state and a look into configuration space.
        let pm = pm::evidence(host, bdf, owner.is_none());
        Ok(Self { function, group, power, owner, pm })
    }

    /// Its address.
    pub fn bdf(&self) -> Bdf {
        self.function.bdf
    }

    fn identity(&self) -> Identity {
        Identity {
            address: self.bdf().to_string(),
            class: class::name(self.function.class).to_owned(),
            id: format!("{:04x}:{:04x}", self.function.vendor, self.function.device),
            driver: self.function.driver.clone(),
            group: self.function.iommu_group,
            ports: self.power.bridges.iter().map(|bridge| bridge.bdf.to_string()).collect(),
            power_state: self.power.device.power_state.clone(),
            runtime_status: self.power.device.runtime_status.clone(),
        }
    }
}

/// Examines one device.
///
/// # Errors
/// It is absent, or cannot be read.
pub fn examine(host: &Host, bdf: Bdf) -> Result<Report, ExamineError> {
    let patient = Patient::read(host, bdf)?;
    let mut findings = platform::check(host, &patient);
    findings.extend(device::check(host, &patient));
    // A virtual function and a bridge have no power to be cut in this way; that has been said.
    if !patient.power.is_virtual_function && !patient.function.is_bridge() {
        findings.extend(power::check(host, &patient));
        let explains = |finding: &Finding| {
            finding.severity >= Severity::Warning && !NOT_ABOUT_POWER.contains(&finding.check)
        };
        let clear = !findings.iter().any(explains);
        findings.push(power::state(host, &patient, clear));
    }
    Ok(Report::new(patient.identity(), findings))
}
