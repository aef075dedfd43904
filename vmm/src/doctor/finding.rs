//! What the doctor has to say: findings with their readings, gathered in a report, in the form that `--json` prints.
//!
//! The names of checks and fields are an interface: docs/doctor.md lists them, and scripts rely on them.

use std::path::PathBuf;

use pci::Bdf;
use serde::Serialize;

/// Version of the JSON form. Raised when a field changes its meaning or goes away.
pub const JSON_VERSION: u32 = 1;

/// How much a finding matters, least first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// As it should be.
    Ok,
    /// Good to know.
    Info,
    /// The device can lose its power, but not always, or at a price.
    Warning,
    /// The device cannot lose its power, or no guest can have it.
    Blocker,
}

impl Severity {
    /// The word for people.
    pub fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Blocker => "BLOCKER",
        }
    }

    /// The process's exit status. 1 is left to the doctor's own failure.
    pub fn exit_status(self) -> u8 {
        match self {
            Self::Ok | Self::Info => 0,
            Self::Warning => 2,
            Self::Blocker => 3,
        }
    }
}

/// What was looked at. One check can have several findings, one for each device that it concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Check {
    /// The kernel's version.
    Kernel,
    /// Whether the host has an IOMMU for the device.
    Iommu,
    /// `vfio-pci` and the IOMMU back end.
    VfioModule,
    /// `disable_idle_d3` of vfio-pci.
    IdleD3,
    /// Rights to VFIO's nodes.
    VfioNode,
    /// `/dev/kvm`.
    Kvm,
    /// How much memory may be locked.
    Memlock,
    /// Bridge, virtual function, or something with power of its own.
    Kind,
    /// The driver that has the device.
    Driver,
    /// What the host itself uses the device for.
    HostUse,
    /// The others in its IOMMU group.
    Group,
    /// The process that has the device open.
    Owner,
    /// The PCI power management capability.
    PmCapability,
    /// `d3cold_allowed`.
    D3coldAllowed,
    /// `power/control`.
    PowerControl,
    /// SR-IOV virtual functions that are switched on.
    VirtualFunctions,
    /// `_PR3` in the host's firmware.
    PowerResources,
    /// `_EJ0` in the host's firmware.
    Ejectable,
    /// Wakeup from D3cold.
    Wakeup,
    /// Limits of PM QoS.
    PmQos,
    /// Devices that need this one awake.
    Consumers,
    /// Ways to reset the device.
    Reset,
    /// The console's GPU.
    Console,
    /// Whether a port above may sleep.
    Port,
    /// Hotplug of the slot.
    Hotplug,
    /// Others that share the power.
    Neighbour,
    /// The state that the device is in.
    State,
    /// A real attempt.
    Verify,
}

impl Check {
    /// All of them.
    #[cfg(test)]
    pub const ALL: [Self; 28] = [
        Self::Kernel,
        Self::Iommu,
        Self::VfioModule,
        Self::IdleD3,
        Self::VfioNode,
        Self::Kvm,
        Self::Memlock,
        Self::Kind,
        Self::Driver,
        Self::HostUse,
        Self::Group,
        Self::Owner,
        Self::PmCapability,
        Self::D3coldAllowed,
        Self::PowerControl,
        Self::VirtualFunctions,
        Self::PowerResources,
        Self::Ejectable,
        Self::Wakeup,
        Self::PmQos,
        Self::Consumers,
        Self::Reset,
        Self::Console,
        Self::Port,
        Self::Hotplug,
        Self::Neighbour,
        Self::State,
        Self::Verify,
    ];

    /// Its name, as JSON has it.
    pub fn name(self) -> String {
        match serde_json::to_value(self) {
            Ok(serde_json::Value::String(name)) => name,
            _ => String::new(),
        }
    }
}

/// One thing that was read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Reading {
    /// Where.
    pub path: PathBuf,
    /// What it said; none when it is not there or cannot be read.
    pub value: Option<String>,
}

impl Reading {
    /// What was found at `path`.
    pub fn new(path: PathBuf, value: Option<impl Into<String>>) -> Self {
        Self { path, value: value.map(Into::into) }
    }

    /// Whether it said exactly this.
    pub fn is(&self, value: &str) -> bool {
        self.value.as_deref() == Some(value)
    }
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub check: Check,
    /// How much it matters.
    pub severity: Severity,
    /// The device it is about: a PCI address, or `host`.
    pub subject: String,
    /// What it means, a sentence.
    pub meaning: String,
    /// What to do; none where there is nothing to do.
    pub remedy: Option<String>,
    /// What was read.
    pub read: Vec<Reading>,
}

impl Finding {
    /// A finding about the whole host.
    pub fn host(check: Check, severity: Severity, meaning: impl Into<String>) -> Self {
        Self::about("host", check, severity, meaning)
    }

    /// A finding about one device.
    pub fn device(bdf: Bdf, check: Check, severity: Severity, meaning: impl Into<String>) -> Self {
        Self::about(bdf.to_string(), check, severity, meaning)
    }

    fn about(
        subject: impl Into<String>,
        check: Check,
        severity: Severity,
        meaning: impl Into<String>,
    ) -> Self {
        let (subject, meaning) = (subject.into(), meaning.into());
        Self { check, severity, subject, meaning, remedy: None, read: Vec::new() }
    }

    /// The same finding with what to do.
    pub fn remedy(mut self, text: impl Into<String>) -> Self {
        self.remedy = Some(text.into());
        self
    }

    /// The same finding with one more reading.
    pub fn read(mut self, reading: Reading) -> Self {
        self.read.push(reading);
        self
    }

    /// The same finding with more readings.
    pub fn reads(mut self, readings: impl IntoIterator<Item = Reading>) -> Self {
        self.read.extend(readings);
        self
    }
}

/// Who a report is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Identity {
    /// PCI address on the host.
    pub address: String,
    /// Name of its class.
    pub class: String,
    /// Vendor and device ID, as `8086:10d3`.
    pub id: String,
    /// Its driver.
    pub driver: Option<String>,
    /// Its IOMMU group.
    pub group: Option<u32>,
    /// The bridges above it, nearest first.
    pub ports: Vec<String>,
    /// `power_state`.
    pub power_state: Option<String>,
    /// `power/runtime_status`.
    pub runtime_status: Option<String>,
}

/// All findings about one device.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// The device.
    pub device: Identity,
    /// The worst severity of all findings.
    pub severity: Severity,
    /// The verdict in words.
    pub verdict: String,
    /// Worst first; within one severity in the order in which they were looked for.
    pub findings: Vec<Finding>,
    /// What `--verify` has measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verification: Option<super::verify::Measurement>,
}

impl Report {
    /// A report of these findings.
    pub fn new(device: Identity, mut findings: Vec<Finding>) -> Self {
        findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
        let severity = findings.first().map_or(Severity::Ok, |finding| finding.severity);
        let verdict = verdict(&device, severity, &findings);
        Self { device, severity, verdict, findings, verification: None }
    }

    /// Adds the outcome of an attempt, which counts like any other finding.
    pub fn add(&mut self, finding: Finding) {
        let mut findings = std::mem::take(&mut self.findings);
        findings.push(finding);
        let verification = self.verification.take();
        *self = Self { verification, ..Self::new(self.device.clone(), findings) };
    }

    /// The findings of one check.
    #[cfg(test)]
    pub fn of(&self, check: Check) -> Vec<&Finding> {
        self.findings.iter().filter(|finding| finding.check == check).collect()
    }
}

/// The verdict as it stands in the table of all devices.
fn verdict(device: &Identity, severity: Severity, findings: &[Finding]) -> String {
    let named = |severity: Severity| {
        let mut names: Vec<String> =
            findings.iter().filter(|f| f.severity == severity).map(|f| f.check.name()).collect();
        names.dedup();
        names.join(", ")
    };
    let asleep = device.power_state.as_deref() == Some("D3cold");
    let able = if asleep { "is without power now" } else { "can lose its power" };
    match severity {
        Severity::Ok | Severity::Info => able.to_owned(),
        Severity::Warning => format!("{able}; look at {}", named(Severity::Warning)),
        Severity::Blocker => format!("blocked by {}", named(Severity::Blocker)),
    }
}
