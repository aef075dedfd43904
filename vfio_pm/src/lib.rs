//! Power of assigned devices: what turns a guest's `_OFF` into a host device without power, and a host wake into a guest PME.
//!
//! ```text
//!  guest AML   _OFF/_ON/_STA                                      Notify(function, 2)      native PME
//!                   │ MMIO                                                 ▲                  ▲
//!             NotifyDevice ── request/status/wake bits ──┐                 │ WakeSink         │ pci::PmeSink
//!                                                        ▼                 │                  │
//!  guest PMCSR  ── parked/unparked ──────────────▶ PowerDomain ────────────┴──────────────────┘
//!                                                  (one per slot: state, timers, one worker thread)
//!                                                        │ state::PowerState × PowerEvent -> effects
//!                     FunctionGate: close, open, settle  │  LowPower: enter, exit
//!                     (BAR slots, config shadow)         ▼  (VFIO_DEVICE_FEATURE on the device's descriptor)
//!                                               host kernel: runtime PM, D3cold
//! ```
//!
//! What the interface of the host kernel (`include/uapi/linux/vfio.h`, since Linux 6.1) does not say aloud, and how this crate answers:
//!
//! 1. BAR mappings are dead between entry and exit, and touching them does not wake the device: the gate closes before ENTRY and
//!    opens after the device has answered.
//! 2. Entry with wakeup is used up by the first wake, and any VFIO access wakes: while the gate is closed nothing is forwarded.
//! 3. EXIT signals the wakeup eventfd too: every entry has an eventfd of its own, dropped with the exit.
//! 4. EXIT blocks for as long as the device takes to get its power back: it runs on the domain's worker; the guest polls.
//! 5. EXIT succeeds for a device that is gone: the gate checks that it answers before the guest is told it is ready.
//! 6. ENTRY is a permission, not a power state: where a device really got to is read from sysfs ([`sysfs`]).
//! 7. A wake needs a receiver: the event device at run time, the root port's PME out of suspend-to-idle ([`WakeSink`]).
//!
//! How each function is handled is its [`Policy`]; an operator changes it, and looks at a domain, through [`domain`]'s methods for that.
//! What has happened is in [`stats`], and what happens is told to a [`NewsSink`]. docs/power.md lists the failure modes with their tests.
//!
//! Only the `ioctl` module is unsafe code.

pub mod bucket;
pub mod domain;
pub mod event;
pub mod fake;
pub mod gate;
pub mod host_signals;
pub mod ioctl;
pub mod low_power;
pub mod notify;
pub mod offer;
pub mod policy;
pub mod spec;
pub mod state;
pub mod stats;
pub mod sysfs;
pub mod wake;

pub use bucket::Rate;
pub use domain::{ControlError, PowerDomain};
pub use event::{News, NewsSink, PowerNews};
pub use gate::FunctionGate;
pub use host_signals::HostSignals;
pub use ioctl::VfioLowPower;
pub use low_power::{EnterError, ExitError, LowPower, ProbeError, Support};
pub use notify::NotifyDevice;
pub use offer::{Offer, PowerChoice, offer};
pub use policy::{LostPolicy, Policy, PolicyChange, PolicyError, WakePolicy};
pub use spec::{CreateError, DomainSpec, MemberSpec, Timing};
pub use state::Phase;
pub use stats::{Counters, Denial, FailureKind, Histogram, MemberReport, Snapshot, WakeCause};
pub use sysfs::HostPower;
pub use wake::WakeSink;
