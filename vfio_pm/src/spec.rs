//! What a power domain is made of: its functions, their policies, and where wakes go.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use acpi::notify_abi::ResourceIndex;
use pci::pme::PmeSink;
use pci::{Bdf, DevFn};

use crate::event::NewsSink;
use crate::gate::FunctionGate;
use crate::host_signals::HostSignals;
use crate::low_power::LowPower;
use crate::policy::Policy;
use crate::wake::WakeSink;

/// The domain's times. The defaults are for real hardware and guests; tests shorten them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timing {
    /// How long a function stays in the guest's D3hot before hardware is put there.
    pub park: Duration,
    /// The same for a function without a power resource, which will never get an `_OFF`.
    pub park_without_resource: Duration,
    /// How long a vCPU waits for hardware to come from D3hot to D0. The bound on every wait of a vCPU in this crate.
    pub unpark_wait: Duration,
    /// How long the guest has to read the WAKE register before the wake is taken to the root port instead.
    pub confirm: Duration,
    /// First wait before a wake nobody asked for is answered by entering low power again; doubles from wake to wake.
    pub reentry_first: Duration,
    /// Upper bound of that wait.
    pub reentry_max: Duration,
    /// After so long without a wake the wait starts at `reentry_first` again.
    pub reentry_quiet: Duration,
    /// What the first wake of a storm adds to the hold-off; doubles from wake to wake.
    pub storm_first: Duration,
    /// Upper bound of that.
    pub storm_max: Duration,
    /// When to tell the guest again, each counted from the time before, if it does not answer a wake with `_ON`.
    pub retries: Vec<Duration>,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            park: Duration::from_secs(1),
            park_without_resource: Duration::from_millis(100),
            unpark_wait: Duration::from_millis(50),
            confirm: Duration::from_millis(30),
            reentry_first: Duration::from_millis(100),
            reentry_max: Duration::from_secs(10),
            reentry_quiet: Duration::from_secs(60),
            storm_first: Duration::from_secs(1),
            storm_max: Duration::from_secs(60),
            retries: [1, 4, 16].map(Duration::from_secs).into(),
        }
    }
}

/// One function of a domain.
#[derive(Clone, Debug)]
pub struct MemberSpec {
    /// The function's power resource; `None` when it is not offered: then the function is never put in low power, only in D3hot.
    pub resource: Option<ResourceIndex>,
    /// The function's place on the root port's bus.
    pub devfn: DevFn,
    /// Its hardware.
    pub low_power: Arc<dyn LowPower>,
    /// Its way to the guest.
    pub gate: Arc<dyn FunctionGate>,
    /// What the host says of it.
    pub signals: HostSignals,
    /// How its power is handled at first.
    pub policy: Policy,
}

/// One slot: a root port and the functions below it.
#[derive(Clone, Debug)]
pub struct DomainSpec {
    /// The root port's power resource, if it has one.
    pub port_resource: Option<ResourceIndex>,
    /// The functions; each [`DevFn`] and each [`ResourceIndex`] once.
    pub members: Vec<MemberSpec>,
    /// The root port's intake of PME messages.
    pub pme: Arc<dyn PmeSink>,
    /// The event device.
    pub wake: Arc<dyn WakeSink>,
    /// Who is told of what happens, if anybody.
    pub news: Option<Arc<dyn NewsSink>>,
    /// The function that did not come back in an earlier domain of the same slot, for which the slot is latched from the start.
    pub latched_by: Option<Bdf>,
    /// Times; `Timing::default()` outside tests.
    pub timing: Timing,
}

/// A power domain could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The worker's descriptors could not be made.
    #[error("no descriptor for the power thread of {slot}; raise the limit on open files (ulimit -n)")]
    Descriptor {
        /// Which slot: the host address of its first function.
        slot: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The worker could not be started.
    #[error("cannot start the power thread of {slot}; raise the limit on processes (ulimit -u)")]
    Thread {
        /// Which slot: the host address of its first function.
        slot: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}
