//! virtio over PCI (VIRTIO 1.2, section 4.1): a function on the bus with the registers of the transport in one BAR, MSI-X, and power management.
//!
//! ```text
//! BAR 0, 64 bits     0x0000  common configuration
//!                    0x1000  interrupt status
//!                    0x2000  device configuration
//!                    0x3000  doorbells, four bytes for each queue
//!                    0x4000  MSI-X table, then at 0xc000 pending bits
//! ```
//!
//! There are no interrupts but by MSI-X, and no legacy registers. A driver's mistake stops the device with DEVICE_NEEDS_RESET.
//!
//! Lock order: `inner`, then the locks of [`interrupts`]. The device and its workers are called with `inner` held, and never call back into
//! what takes it.

mod capabilities;
pub mod common;
mod doorbells;
pub mod interrupts;
mod saved;

use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use log::{debug, error};
use pci::assign::FunctionNeeds;
use pci::bar::{Bar, BarError, BarKind, BarRegisters};
use pci::cap::msix::{MsixLayout, MsixRegion};
use pci::cap::pm::{DState, PmCapability, PmeSupport};
use pci::config::{ConfigSpace, Identity};
use pci::function::BarIndex;
use pci::interrupt::MsiAllocator;
use pci::window::{BarWindow, Placement};
use pci::{DevFn, PciFunction, regs};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::capabilities::{Capabilities, Window};
use self::common::{CommonRegisters, Effect};
use self::doorbells::Doorbells;
pub use self::doorbells::{Doorbell, DoorbellMapper};
use self::interrupts::PciInterrupts;
use super::Memory;
use super::device::{Activation, Active, DeviceError, DeviceType, F_VERSION_1, VirtioDevice};
use super::life::LifeSink;
use super::queue::{ActiveQueue, Ring};
use super::ring::{RingPosition, SharedPosition};
use crate::emulated::{EmulatedFunction, Saved};

/// The one BAR.
const BAR: BarIndex = 0;
const BAR_SIZE: u64 = 64 << 10;
const COMMON: u64 = 0;
const ISR: u64 = 0x1000;
const CONFIG: u64 = 0x2000;
const DOORBELLS: u64 = 0x3000;
const MSIX_TABLE: u32 = 0x4000;
const MSIX_PBA: u32 = 0xc000;
const SECTION: u64 = 0x1000;
/// Distance of two doorbells in bytes.
const DOORBELL_STEP: u64 = 4;
/// The most queues there are doorbells for.
pub const QUEUES_MAX: u16 = 1024;

/// Vendor of all virtio devices, and the first device ID of those that keep to the standard.
const VENDOR: u16 = 0x1af4;
const DEVICE_BASE: u16 = 0x1040;
/// Subsystem IDs from here on are of no legacy device.
const SUBSYSTEM: (u16, u16) = (VENDOR, 0x0040);
const REVISION: u8 = 1;

/// How long a driver's reset may keep its vCPU: most devices stop at once, and some drivers do not look whether it has.
const RESET_PATIENCE: Duration = Duration::from_millis(10);

/// A device that cannot be put on the bus: its author's mistake.
#[derive(Debug, thiserror::Error)]
pub enum VirtioPciError {
    /// Its BAR.
    #[error(transparent)]
    Bar(#[from] BarError),
    /// Its capabilities.
    #[error(transparent)]
    Capabilities(#[from] pci::config::NoRoom),
    /// Its vectors.
    #[error(transparent)]
    Msix(#[from] pci::cap::msix::MsixLayoutError),
    /// Its queues.
    #[error("a virtio device cannot have {0} queues; {QUEUES_MAX} are possible")]
    Queues(usize),
}

/// What a function needs of the machine.
#[derive(Debug)]
pub struct VirtioPciSpec {
    /// What the operator calls it.
    pub name: String,
    /// The device.
    pub device: Arc<dyn VirtioDevice>,
    /// Its place on its bus.
    pub devfn: DevFn,
    /// Guest memory.
    pub memory: Memory,
    /// Where its BAR is decoded.
    pub window: Arc<BarWindow>,
    /// Where its interrupts come from.
    pub msi: Arc<dyn MsiAllocator>,
    /// Where its doorbells are.
    pub doorbells: Arc<dyn DoorbellMapper>,
    /// Who hears when it begins and ends to work.
    pub life: Arc<dyn LifeSink>,
}

/// A virtio device as a function of the bus.
#[derive(Debug)]
pub struct VirtioPci {
    name: String,
    device: Arc<dyn VirtioDevice>,
    devfn: DevFn,
    memory: Memory,
    window: Arc<BarWindow>,
    interrupts: Arc<PciInterrupts>,
    capabilities: Capabilities,
    msix: MsixLayout,
    life: Arc<dyn LifeSink>,
    this: Weak<Self>,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: ConfigSpace,
    bars: BarRegisters,
    pm: PmCapability,
    /// The capability through which BARs can be reached without a BAR.
    access: Window,
    placement: Option<(Bar, Placement)>,
    common: CommonRegisters,
    doorbells: Doorbells,
    positions: Vec<SharedPosition>,
    active: Option<Box<dyn Active>>,
    /// The driver has asked for a reset, and the device has not stopped yet.
    resetting: bool,
    paused: bool,
    /// The guest has taken bus mastering from the active device.
    held: bool,
    /// It was restored, and the driver may wait for what was signalled and not heard.
    restored: bool,
}

impl VirtioPci {
    /// Puts the function together, with its BAR not decoded and the device not active.
    ///
    /// # Errors
    /// See [`VirtioPciError`].
    pub fn new(spec: VirtioPciSpec) -> Result<Arc<Self>, VirtioPciError> {
        let VirtioPciSpec { name, device, devfn, memory, window, msi, doorbells, life } = spec;
        let sizes = device.queue_sizes();
        let queues = u16::try_from(sizes.len()).ok().filter(|queues| *queues < QUEUES_MAX);
        let queues = queues.ok_or(VirtioPciError::Queues(sizes.len()))?;
        let device_type = device.device_type();
        let mut config = ConfigSpace::endpoint(&Identity {
            vendor: VENDOR,
            device: DEVICE_BASE.wrapping_add(device_type.0),
            revision: REVISION,
            class: class(device_type),
            subsystem: SUBSYSTEM,
        });
        let mut bars = BarRegisters::new();
        bars.add(BAR, BarKind::Mem64 { prefetchable: false }, BAR_SIZE)?;
        let capabilities = Capabilities::add(&mut config)?;
        let msix = MsixLayout {
            // One for the configuration, one for each queue.
            vectors: queues + 1,
            table_bar: BAR,
            table_offset: MSIX_TABLE,
            pba_bar: BAR,
            pba_offset: MSIX_PBA,
        };
        let interrupts = Arc::new(PciInterrupts::new(&name, msix, msi, queues)?);
        let features = device.features() | F_VERSION_1;
        Ok(Arc::new_cyclic(|this| Self {
            name,
            device,
            devfn,
            memory,
            window,
            interrupts,
            capabilities,
            msix,
            life,
            this: Weak::clone(this),
            inner: Mutex::new(Inner {
                config,
                bars,
                pm: PmCapability::new(PmeSupport::empty(), true),
                access: Window::default(),
                placement: None,
                common: CommonRegisters::new(features, sizes),
                doorbells: Doorbells::new(doorbells, usize::from(queues)),
                positions: Vec::new(),
                active: None,
                resetting: false,
                paused: false,
                held: false,
                restored: false,
            }),
        }))
    }

    /// The device.
    pub fn device(&self) -> &Arc<dyn VirtioDevice> {
        &self.device
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Brings what is decoded in step with the registers.
    fn decode(&self, inner: &mut Inner) {
        let command = inner.config.registers().u16(regs::COMMAND);
        let decodes = inner.pm.state() == DState::D0;
        let wanted = inner.bars.decoded(command).next().filter(|_| decodes);
        if inner.placement.as_ref().map(|(bar, _)| *bar) == wanted {
            return;
        }
        inner.doorbells.disconnect();
        inner.placement = None;
        let Some(bar) = wanted else { return };
        let function: Weak<dyn PciFunction> = Weak::clone(&self.this) as _;
        match self.window.place(bar.base, bar.size, function, BAR) {
            Ok(placement) => {
                inner.placement = Some((bar, placement));
                self.connect_doorbells(inner);
            }
            // A sizing pattern left in the BAR, or a guest that means harm.
            Err(e) => debug!("device {}: its BAR is not decoded: {e}", self.name),
        }
    }

    /// Keeps the active device from the guest's memory once the guest has cleared Bus Master Enable (PCI 3.0, section 6.2.2), as Linux does before it
    /// starts another kernel with kexec: what the earlier one offered is no memory for packets any more. It goes on when the bit is set. A driver that
    /// never sets it is served all the same.
    fn follow_bus_master(&self, inner: &mut Inner, before: bool) {
        let now = bus_master(inner);
        let Some(active) = inner.active.as_ref().filter(|_| before != now && inner.held == now) else {
            return;
        };
        inner.held = !now;
        if !now {
            active.hold(RESET_PATIENCE);
        } else if !inner.paused {
            active.resume();
        }
    }

    fn connect_doorbells(&self, inner: &mut Inner) {
        if let Some((bar, _)) = &inner.placement
            && let Err(e) = inner.doorbells.connect(bar.base.wrapping_add(DOORBELLS), DOORBELL_STEP)
        {
            // The doorbells are trapped then.
            debug!("device {}: its doorbells are slower than they could be: {e}", self.name);
        }
    }

    fn act(&self, inner: &mut Inner, effect: Effect) {
        match effect {
            Effect::None => {}
            Effect::Vectors => self.interrupts.set_vectors(&inner.common),
            Effect::Violation(what) => self.interrupts.stop(&what),
            Effect::Activate => {
                if let Err(e) = self.activate(inner) {
                    self.interrupts.stop(&e.to_string());
                }
            }
            Effect::Reset => {
                if let Some(active) = &inner.active {
                    active.stop();
                }
                inner.resetting = true;
                self.finish_reset(inner, RESET_PATIENCE);
            }
        }
    }

    /// Ends a reset once the device has stopped.
    fn finish_reset(&self, inner: &mut Inner, patience: Duration) {
        if !inner.resetting || inner.active.as_ref().is_some_and(|active| !active.wait_stopped(patience)) {
            return;
        }
        let was_active = inner.active.take().is_some();
        inner.doorbells.disconnect();
        inner.doorbells.forget();
        inner.positions.clear();
        inner.common.reset();
        self.interrupts.reset();
        inner.resetting = false;
        inner.held = false;
        if was_active {
            self.life.reset();
        }
    }

    fn activate(&self, inner: &mut Inner) -> Result<(), DeviceError> {
        let positions = vec![RingPosition::START; inner.common.queues()];
        self.activate_at(inner, &positions)
    }

    fn activate_at(&self, inner: &mut Inner, positions: &[RingPosition]) -> Result<(), DeviceError> {
        self.interrupts.set_begins_paused(inner.paused);
        let features = inner.common.ring_features();
        let memory = self.memory.memory();
        let mut queues = Vec::new();
        inner.positions.clear();
        for (index, position) in (0_u16..).zip(positions) {
            let shared = SharedPosition::new(*position);
            inner.positions.push(shared.clone());
            let Some(layout) = inner.common.layout(index) else { continue };
            let wrong = |source| DeviceError::Ring { queue: index, source };
            let layout = layout.map_err(wrong)?;
            let ring = Ring::new(&layout, features, *position, &memory).map_err(wrong)?;
            let kick = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(DeviceError::host("a doorbell"))?;
            let kick = Arc::new(kick);
            inner.doorbells.set(index, Arc::clone(&kick));
            queues.push(ActiveQueue::new(
                index,
                ring,
                layout,
                self.memory.clone(),
                kick,
                Arc::clone(&self.interrupts) as _,
                shared,
            ));
        }
        let active = self.device.activate(Activation {
            memory: self.memory.clone(),
            queues,
            features: inner.common.negotiated(),
            interrupt: Arc::clone(&self.interrupts) as _,
        })?;
        if inner.paused {
            active.pause();
        }
        inner.active = Some(active);
        self.connect_doorbells(inner);
        self.life.activated();
        debug!("device {}: active, features {:#x}", self.name, inner.common.negotiated());
        Ok(())
    }

    fn common_read(&self, inner: &mut Inner, offset: u64, data: &mut [u8]) {
        self.finish_reset(inner, Duration::ZERO);
        inner.common.read(offset, data, self.interrupts.generation(), self.interrupts.has_stopped());
    }

    fn common_write(&self, inner: &mut Inner, offset: u64, data: &[u8]) {
        self.finish_reset(inner, Duration::ZERO);
        if inner.resetting {
            // Whoever does not wait for the end of a reset talks to a device that is not there yet.
            return;
        }
        let effect = inner.common.write(offset, data, self.interrupts.has_stopped());
        self.act(inner, effect);
    }

    fn registers_read(&self, inner: &mut Inner, offset: u64, data: &mut [u8]) {
        match offset {
            COMMON..ISR => self.common_read(inner, offset, data),
            ISR => data.fill_with(|| self.interrupts.take_status()),
            CONFIG..DOORBELLS => {
                data.fill(0);
                self.device.read_config(offset - CONFIG, data);
            }
            // A doorbell is not for reading.
            _ => data.fill(0),
        }
    }

    fn registers_write(&self, inner: &mut Inner, offset: u64, data: &[u8]) {
        match offset {
            COMMON..ISR => self.common_write(inner, offset, data),
            CONFIG..DOORBELLS => self.device.write_config(offset - CONFIG, data),
            DOORBELLS.. => {
                let index = u16::try_from((offset - DOORBELLS) / DOORBELL_STEP).unwrap_or(u16::MAX);
                if offset < DOORBELLS + SECTION {
                    inner.doorbells.ring(index);
                }
            }
            _ => {}
        }
    }

    fn bar_read_locked(&self, inner: &mut Inner, offset: u64, data: &mut [u8]) {
        match self.msix.region(BAR, offset) {
            Some(MsixRegion::Table(at)) => self.interrupts.table_read(at, data),
            Some(MsixRegion::Pba(at)) => self.interrupts.pba_read(at, data),
            None => self.registers_read(inner, offset, data),
        }
    }

    fn bar_write_locked(&self, inner: &mut Inner, offset: u64, data: &[u8]) {
        match self.msix.region(BAR, offset) {
            Some(MsixRegion::Table(at)) => self.interrupts.table_write(at, data),
            Some(MsixRegion::Pba(_)) => {}
            None => self.registers_write(inner, offset, data),
        }
    }
}

impl PciFunction for VirtioPci {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        let mut inner = self.lock();
        inner.config.read(offset, data);
        if BarRegisters::covers(offset) {
            inner.bars.read(offset, data);
        } else if let Some(at) = self.capabilities.pm.relative(offset) {
            inner.pm.read(at, data);
        } else if let Some(at) = self.capabilities.msix.relative(offset) {
            self.interrupts.capability_read(at, data);
        } else if let Some(at) = self.capabilities.access.relative(offset) {
            inner.access.read(at, data);
            if let Some(target) = inner.access.target(at, data.len(), BAR_SIZE) {
                self.bar_read_locked(&mut inner, target, data);
            }
        }
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let mut inner = self.lock();
        if BarRegisters::covers(offset) {
            inner.bars.write(offset, data);
            self.decode(&mut inner);
        } else if let Some(at) = self.capabilities.pm.relative(offset) {
            let _ = inner.pm.write(at, data);
            self.decode(&mut inner);
        } else if let Some(at) = self.capabilities.msix.relative(offset) {
            self.interrupts.capability_write(at, data);
        } else if let Some(at) = self.capabilities.access.relative(offset) {
            inner.access.write(at, data);
            if let Some(target) = inner.access.target(at, data.len(), BAR_SIZE) {
                self.bar_write_locked(&mut inner, target, data);
            }
        } else {
            let before = bus_master(&inner);
            inner.config.write(offset, data);
            self.follow_bus_master(&mut inner, before);
            self.decode(&mut inner);
        }
    }

    fn bar_read(&self, _bar: BarIndex, offset: u64, data: &mut [u8]) {
        let mut inner = self.lock();
        if inner.placement.is_none() {
            data.fill(0xff);
            return;
        }
        self.bar_read_locked(&mut inner, offset, data);
    }

    fn bar_write(&self, _bar: BarIndex, offset: u64, data: &[u8]) {
        let mut inner = self.lock();
        if inner.placement.is_some() {
            self.bar_write_locked(&mut inner, offset, data);
        }
    }
}

impl EmulatedFunction for VirtioPci {
    fn name(&self) -> &str {
        &self.name
    }

    fn devfn(&self) -> DevFn {
        self.devfn
    }

    fn needs(&self) -> FunctionNeeds {
        FunctionNeeds::of(self.devfn, &self.lock().bars)
    }

    fn bars(&self) -> Vec<Bar> {
        self.lock().bars.iter().collect()
    }

    fn pause(&self) {
        let mut inner = self.lock();
        inner.paused = true;
        if let Some(active) = &inner.active {
            active.pause();
        }
    }

    fn resume(&self) {
        let mut inner = self.lock();
        inner.paused = false;
        if let Some(active) = &inner.active {
            if !inner.held {
                active.resume();
            }
            if inner.restored {
                self.signal_all(&inner);
            }
        }
        inner.restored = false;
    }

    fn shutdown(&self) {
        let (active, placement) = {
            let mut inner = self.lock();
            inner.doorbells.disconnect();
            (inner.active.take(), inner.placement.take())
        };
        drop(active);
        drop(placement);
    }

    fn save(&self) -> Result<Saved, String> {
        self.save_function()
    }

    fn restore(&self, saved: &Saved) -> Result<(), String> {
        self.restore_function(saved)
    }

    fn memory_changed(&self) {
        self.device.memory_changed();
    }

    fn withheld_memory(&self) -> u64 {
        self.device.withheld_memory()
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.device.counters()
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        self.shutdown();
    }
}

fn bus_master(inner: &Inner) -> bool {
    inner.config.registers().u16(regs::COMMAND) & regs::COMMAND_BUS_MASTER != 0
}

/// The class code of a device of this type.
fn class(device_type: DeviceType) -> u32 {
    match device_type {
        DeviceType::NET => 0x02_0000,
        DeviceType::BLOCK | DeviceType::FS => 0x01_8000,
        DeviceType::CONSOLE => 0x07_8000,
        DeviceType::PMEM | DeviceType::MEM => 0x05_8000,
        // What fits nowhere.
        _ => 0xff_0000,
    }
}

/// Says that a device has stopped, in the log: once until it is reset, so that a guest cannot fill it. The log holds back what comes too often, of each
/// device for itself: one that stops again and again does not hide the others.
fn complain(name: &str, why: &str) {
    error!(target: name, "device {name} has stopped until the guest resets it: {why}");
}

#[cfg(test)]
mod tests;
