//! The root port: bridge to one slot, and intake of the power management events that rise from it (PCI Express Base 6.0, sections
//! 1.3.1, 5.3.3 and 6.1.6; PCI-to-PCI Bridge 1.2).

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};

use crate::bdf::DevFn;
use crate::cap::msi::{MsiCapability, MsiLayout, MsiLayoutError, MsiVectors};
use crate::cap::pcie::{self, LinkSpeed, PcieRootPortCapability};
use crate::cap::pm::{self, DState, PmCapability, PmeSupport};
use crate::config::{CapabilitySpan, ConfigSpace, Identity, NoRoom};
use crate::function::{BarIndex, PciBridge, PciFunction};
use crate::interrupt::MsiAllocator;
use crate::pme::{PmeSink, RequesterId};
use crate::regs;

/// Red Hat's generic PCI Express root port.
const IDENTITY: Identity =
    Identity { vendor: 0x1b36, device: 0x000c, revision: 0, class: 0x06_0400, subsystem: (0x1af4, 0x1100) };

const MSI: MsiLayout = MsiLayout { vectors: 1, address_64: true, per_vector_mask: false };

/// A root port that cannot be made: its capabilities contradict this crate's own limits.
#[derive(Debug, thiserror::Error)]
#[error("the root port at 00:{devfn} cannot be made; this is a defect, please report it")]
pub struct RootPortError {
    /// Which port.
    pub devfn: DevFn,
    /// What is wrong.
    #[source]
    pub source: RootPortErrorCause,
}

/// See [`RootPortError`].
#[derive(Debug, thiserror::Error)]
pub enum RootPortErrorCause {
    /// A capability does not fit.
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
    /// The MSI capability is impossible.
    #[error(transparent)]
    Msi(#[from] MsiLayoutError),
}

/// Functions that cannot stand below a root port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChildrenError {
    /// Only device 0 can be there (PCI Express Base 6.0, section 7.3.1).
    #[error("a function cannot be at {0} below a root port; only device 00 can be there")]
    Device(DevFn),
    /// Two functions at one place.
    #[error("two functions want {0} below the same root port; give one of them another function number")]
    Taken(DevFn),
    /// There is no function 0, without which a guest does not look for others.
    #[error("the functions below a root port have no function 0; a guest would not look for the others")]
    NoFunctionZero,
    /// There are functions already.
    #[error("there are functions below this root port already; they have to go first")]
    AlreadySet,
}

/// Functions with their places on the secondary bus.
type Children = Vec<(DevFn, Arc<dyn PciFunction>)>;

/// Called when the guest resets the bus below the port.
pub type SecondaryResetHook = Box<dyn Fn() + Send + Sync>;

/// Called when the guest turns the power of the port's slot on or off.
pub type SlotPowerHook = Box<dyn Fn(bool) + Send + Sync>;

#[derive(Debug)]
struct State {
    config: ConfigSpace,
    pm: PmCapability,
    pcie: PcieRootPortCapability,
    msi: MsiVectors,
}

#[derive(Clone, Copy, Debug)]
struct Spans {
    pm: CapabilitySpan,
    pcie: CapabilitySpan,
    msi: CapabilitySpan,
}

/// A root port. It has no BARs and uses no INTx; it tells of PMEs by MSI.
///
/// Its configuration space answers in every power state: the guest must be able to see the port, and the port to take a PME, while it sleeps.
/// Nothing is lost while its power is off.
///
/// Lock order: the port's lock comes before whatever [`MsiAllocator`] and its vectors lock. The functions below and the reset hook are called
/// without it. Functions below hold this port weakly (as their [`PmeSink`]), since the port holds them.
pub struct RootPort {
    devfn: DevFn,
    spans: Spans,
    state: Mutex<State>,
    children: RwLock<Option<Children>>,
    reset_hook: OnceLock<SecondaryResetHook>,
    slot_power_hook: OnceLock<SlotPowerHook>,
}

impl fmt::Debug for RootPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let children: Vec<_> = self.children().into_iter().map(|(devfn, _)| devfn).collect();
        f.debug_struct("RootPort")
            .field("devfn", &self.devfn)
            .field("children", &children)
            .finish_non_exhaustive()
    }
}

impl RootPort {
    /// A port at `devfn` on bus 0 with nothing below it, its windows closed, its bus unnumbered. `port_number` (Link Capabilities)
    /// should differ between ports. Its message vector comes from `allocator` when the guest enables MSI.
    pub fn new(
        devfn: DevFn,
        port_number: u8,
        speed: LinkSpeed,
        allocator: Arc<dyn MsiAllocator>,
    ) -> Result<Self, RootPortError> {
        let pcie = PcieRootPortCapability::new(port_number, speed);
        Self::try_new(devfn, pcie, allocator).map_err(|source| RootPortError { devfn, source })
    }

    /// The same with an empty hot-plug slot, which [`insert`](Self::insert) fills.
    pub fn with_slot(
        devfn: DevFn,
        port_number: u8,
        speed: LinkSpeed,
        allocator: Arc<dyn MsiAllocator>,
    ) -> Result<Self, RootPortError> {
        let pcie = PcieRootPortCapability::with_slot(port_number, speed);
        Self::try_new(devfn, pcie, allocator).map_err(|source| RootPortError { devfn, source })
    }

    fn try_new(
        devfn: DevFn,
        pcie: PcieRootPortCapability,
        allocator: Arc<dyn MsiAllocator>,
    ) -> Result<Self, RootPortErrorCause> {
        let mut config = ConfigSpace::bridge(&IDENTITY);
        let spans = Spans {
            pm: config.add_capability(regs::CAP_PM, pm::LEN)?,
            pcie: config.add_capability(regs::CAP_PCIE, pcie::LEN)?,
            msi: config.add_capability(regs::CAP_MSI, MSI.capability_len())?,
        };
        config.add_bridge_subsystem(IDENTITY.subsystem)?;
        let state = State {
            config,
            pm: PmCapability::new(PmeSupport::all(), true),
            pcie,
            msi: MsiVectors::new(MsiCapability::new(MSI)?, allocator),
        };
        Ok(Self {
            devfn,
            spans,
            state: Mutex::new(state),
            children: RwLock::new(None),
            reset_hook: OnceLock::new(),
            slot_power_hook: OnceLock::new(),
        })
    }

    /// Its place on bus 0.
    pub const fn devfn(&self) -> DevFn {
        self.devfn
    }

    /// Puts functions below the port; there must be none.
    pub fn set_children(&self, children: Children) -> Result<(), ChildrenError> {
        let mut places: Vec<_> = children.iter().map(|(devfn, _)| *devfn).collect();
        places.sort_unstable();
        if let Some(&devfn) = places.iter().find(|devfn| devfn.device() != 0) {
            return Err(ChildrenError::Device(devfn));
        }
        if let Some(twice) = places.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(ChildrenError::Taken(twice[0]));
        }
        if places.first().is_some_and(|devfn| devfn.function() != 0) {
            return Err(ChildrenError::NoFunctionZero);
        }
        let mut present = self.children.write().unwrap_or_else(PoisonError::into_inner);
        if present.is_some() {
            return Err(ChildrenError::AlreadySet);
        }
        *present = Some(children);
        Ok(())
    }

    /// The functions below, with their places on the secondary bus.
    pub fn children(&self) -> Children {
        self.children.read().unwrap_or_else(PoisonError::into_inner).clone().unwrap_or_default()
    }

    /// Takes all functions away from below the port. Accesses under way may still reach them.
    pub fn remove_children(&self) -> Children {
        self.children.write().unwrap_or_else(PoisonError::into_inner).take().unwrap_or_default()
    }

    /// Sets what happens when the guest begins a secondary bus reset (Bridge Control). Called from a vCPU thread; must not block.
    /// Returns `false` if there already was a hook, which then stays.
    pub fn on_secondary_reset(&self, hook: SecondaryResetHook) -> bool {
        self.reset_hook.set(hook).is_ok()
    }

    /// Sets what happens when the guest turns the slot's power on or off. Called from a vCPU thread; must not block.
    /// Returns `false` if there already was a hook, which then stays.
    pub fn on_slot_power(&self, hook: SlotPowerHook) -> bool {
        self.slot_power_hook.set(hook).is_ok()
    }

    /// Shows the guest that the functions below are there now, in the port's slot.
    pub fn insert(&self) {
        self.slot_event(|pcie| pcie.set_present(true));
    }

    /// Asks the guest to let go of what is in the slot: it turns the slot's power off when it has.
    pub fn press_button(&self) {
        self.slot_event(PcieRootPortCapability::press_button);
    }

    /// Shows the guest that the slot is empty.
    pub fn empty(&self) {
        self.slot_event(|pcie| pcie.set_present(false));
    }

    fn slot_event(&self, event: impl FnOnce(&mut PcieRootPortCapability) -> bool) {
        let mut state = self.lock();
        let interrupt = event(&mut state.pcie);
        let asleep = state.pm.state() != DState::D0 || !state.pm.is_powered();
        if asleep {
            // The port itself asks for attention: it takes no other interrupt from a port that sleeps (section 6.7.3.4.1).
            if state.pm.latch_pme() {
                let has_interrupt = state.msi.capability().is_enabled();
                let port = RequesterId { bus: 0, devfn: self.devfn };
                if state.pcie.receive_pme(port, has_interrupt) {
                    state.msi.signal(0);
                }
            }
        } else if interrupt {
            state.msi.signal(0);
        }
    }

    /// PowerState of the port itself.
    pub fn power_state(&self) -> DState {
        self.lock().pm.state()
    }

    /// The port's power resource went off.
    pub fn power_off(&self) {
        self.lock().pm.power_off();
    }

    /// The port's power resource is on: D0.
    pub fn power_on(&self) {
        self.lock().pm.power_on();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Register models are whole between any two statements that can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PciFunction for RootPort {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        let mut state = self.lock();
        state.config.read(offset, data);
        if let Some(at) = self.spans.pm.relative(offset) {
            state.pm.read(at, data);
        } else if let Some(at) = self.spans.pcie.relative(offset) {
            state.pcie.read(at, data);
        } else if let Some(at) = self.spans.msi.relative(offset) {
            state.msi.read(at, data);
        }
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let mut state = self.lock();
        let in_reset = |state: &State| {
            state.config.registers().u16(regs::BRIDGE_CONTROL) & regs::BRIDGE_SECONDARY_RESET != 0
        };
        let was_in_reset = in_reset(&state);
        let mut slot_power = None;
        state.config.write(offset, data);
        if let Some(at) = self.spans.pm.relative(offset) {
            // The port's own state has no effect outside it: what it puts away is its power resource's to say.
            let _ = state.pm.write(at, data);
        } else if let Some(at) = self.spans.pcie.relative(offset) {
            let effect = state.pcie.write(at, data);
            if effect.interrupt {
                state.msi.signal(0);
            }
            slot_power = effect.slot_power;
        } else if let Some(at) = self.spans.msi.relative(offset) {
            // Our own model signals through the vector set, so nobody needs to learn of a new eventfd.
            let _ = state.msi.write(at, data);
        }
        let reset_begins = in_reset(&state) && !was_in_reset;
        drop(state);
        if reset_begins && let Some(hook) = self.reset_hook.get() {
            hook();
        }
        if let (Some(on), Some(hook)) = (slot_power, self.slot_power_hook.get()) {
            hook(on);
        }
    }

    fn bar_read(&self, _bar: BarIndex, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn bar_write(&self, _bar: BarIndex, _offset: u64, _data: &[u8]) {}
}

impl PciBridge for RootPort {
    fn bus_range(&self) -> (u8, u8) {
        let state = self.lock();
        let registers = state.config.registers();
        (registers.u8(regs::SECONDARY_BUS), registers.u8(regs::SUBORDINATE_BUS))
    }

    fn child(&self, devfn: DevFn) -> Option<Arc<dyn PciFunction>> {
        let children = self.children.read().unwrap_or_else(PoisonError::into_inner);
        children.iter().flatten().find(|(place, _)| *place == devfn).map(|(_, child)| Arc::clone(child))
    }
}

impl PmeSink for RootPort {
    fn power(&self, on: bool) {
        if on { self.power_on() } else { self.power_off() }
    }

    fn pme(&self, from: DevFn) -> bool {
        let mut state = self.lock();
        let bus = state.config.registers().u8(regs::SECONDARY_BUS);
        let has_interrupt = state.msi.capability().is_enabled();
        // Whatever state the port is in: a message from below is what brings it back.
        if state.pcie.receive_pme(RequesterId { bus, devfn: from }, has_interrupt) {
            state.msi.signal(0);
        }
        has_interrupt && state.pcie.is_listening()
    }
}

#[cfg(test)]
mod tests;
