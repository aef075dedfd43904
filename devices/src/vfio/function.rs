//! An assigned PCI function on the guest's bus: its gate, and what has to stand or fall with it. What an access of the guest
//! does is in `function/access.rs`.
//!
//! **The gate.** Hardware is reached only while three things hold: the power is on (the power domain says so),
//! the virtual PMCSR says D0, and the device has not been lost. Otherwise configuration space is answered from the
//! shadow and BARs read all ones, with no memory slot standing. One mutex covers the gate and all registers; every
//! access takes it, and a change of the gate is complete, memory slots included, before it is given back. So once
//! [`FunctionGate::close`] returns, no access of the guest can be on its way to VFIO.
//!
//! Lock order: `pm_turn`, then a function's mutex, then those of the BAR windows, the interrupt router and the memory
//! slots. The power domain is called without the mutex, under `pm_turn` alone, which no gate call takes: so the domain
//! hears of the guest's PMCSR writes in the order in which they took effect.
//!
//! Follows PCI Local Bus 3.0 chapter 6, PCI-PM 1.2 section 3.2 and PCI Express Base 6.0 chapter 5.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use log::{debug, info, warn};
use pci::assign::FunctionNeeds;
use pci::bar::{Bar as DecodedBar, BarKind, BarRegisters};
use pci::cap::msi::MsiVectors;
use pci::cap::msix::MsixVectors;
use pci::cap::pm::{DState, PmCapability, PmeSupport};
use pci::cap::vectors::VectorSet;
use pci::function::BarIndex;
use pci::interrupt::{IntxLine, MsiAllocator};
use pci::regs::{COMMAND_INTX_DISABLE, COMMAND_IO, COMMAND_MEMORY};
use pci::window::{BarWindow, Placement};
use pci::{Bdf, DevFn, PciFunction};
use vfio_pm::{FunctionGate, PowerDomain};

use super::bar::{Bar, GuestMapper, Mapping, PAGE_SIZE};
use super::config::ConfigShadow;
use super::doorbell::Doorbells;
use super::irq::{HostIrqs, Wanted};
use super::layout::{FunctionLayout, LayoutError};
use super::open::Handle;

mod access;

/// Command register (PCI 3.0, section 6.2.2).
const COMMAND: u16 = 0x04;
/// Revision and class code: never virtualised by VFIO, so all ones here means that nobody answers.
const CLASS_REVISION: u64 = 0x08;
/// PMCSR within the PM capability, and the PowerState value of D3hot.
const PMCSR: u16 = 4;
const POWER_STATE_D3HOT: u16 = 3;
const NO_SOFT_RESET: u16 = 1 << 3;

/// Where BARs are decoded.
#[derive(Clone, Debug)]
pub struct Windows {
    /// Memory below 4 GiB.
    pub mmio32: Arc<BarWindow>,
    /// Memory above RAM.
    pub mmio64: Arc<BarWindow>,
    /// I/O ports.
    pub io: Arc<BarWindow>,
}

/// What a function needs of the machine.
#[derive(Debug)]
pub struct FunctionSpec {
    /// The opened device.
    pub handle: Arc<Handle>,
    /// What it consists of.
    pub layout: FunctionLayout,
    /// Its place on the bus of its root port.
    pub devfn: DevFn,
    /// Whether it has a power resource. Then its virtual PM capability signals PME from every state.
    pub power_offered: bool,
    /// Where BARs are decoded.
    pub windows: Windows,
    /// Shows BARs to the guest.
    pub mapper: Arc<dyn GuestMapper>,
    /// Gives out message vectors.
    pub msi: Arc<dyn MsiAllocator>,
    /// Its INTx line, if it has an interrupt pin.
    pub intx: Option<Arc<dyn IntxLine>>,
}

/// An assigned function.
///
/// Fields are dropped in their order: guest mappings, then the host mappings behind them, then the device.
pub struct VfioFunction {
    inner: Mutex<Inner>,
    bars: Vec<Bar>,
    handle: Arc<Handle>,
    devfn: DevFn,
    /// Where the host has the PM capability.
    hardware_pm: Option<u16>,
    windows: Windows,
    mapper: Arc<dyn GuestMapper>,
    this: Weak<Self>,
    domain: OnceLock<Weak<PowerDomain>>,
    pm_turn: Mutex<()>,
}

#[derive(Debug)]
struct Inner {
    shadow: ConfigShadow,
    registers: BarRegisters,
    pm: Option<(u16, PmCapability)>,
    msi: Option<(u16, MsiVectors)>,
    msix: Option<(u16, MsixVectors)>,
    irqs: HostIrqs,
    doorbells: Option<Doorbells>,
    powered: bool,
    /// Hardware is in D0 as well: `false` from the guest's D3hot until the worker, or the domain's answer, says so.
    hardware_up: bool,
    lost: bool,
    direct: Direct,
    /// Guest mappings go before the placements they stand for.
    mapped: Vec<(BarIndex, Box<dyn Mapping>)>,
    placed: Vec<(DecodedBar, Placement)>,
}

/// Whether BARs that are decoded have memory slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direct {
    /// They have.
    Standing,
    /// They get them when the guest first touches one, and INTx is armed then. So it is after low power: to make and remove
    /// these costs as much as the rest of `_ON` or `_OFF` together, and a function without a driver, which sleeps with its port,
    /// is not touched at all. The trapped access that comes first is that of a driver to a register: what cannot be trapped
    /// (wide loads from video memory) comes later. A device asks for no interrupt before its driver has told it to.
    OnTouch,
    /// The host took BAR memory away under a running vCPU: trapped until the next `open`.
    Never,
}

impl fmt::Debug for VfioFunction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VfioFunction")
            .field("bdf", &self.handle.bdf())
            .field("devfn", &self.devfn)
            .finish_non_exhaustive()
    }
}

impl VfioFunction {
    /// Puts the function together, with nothing decoded and no interrupt armed.
    pub fn new(spec: FunctionSpec) -> Result<Arc<Self>, LayoutError> {
        let FunctionSpec { handle, layout, devfn, windows, mapper, msi: allocator, intx, .. } = spec;
        let mut shadow = layout.shadow;
        // Whatever firmware or an earlier user left: the guest finds nothing switched on.
        let config = |source| LayoutError::Config { bdf: handle.bdf(), source };
        handle.config_write(u64::from(COMMAND), &[0, 0]).map_err(config)?;
        let mut command = [0; 2];
        handle.config_read(u64::from(COMMAND), &mut command).map_err(config)?;
        shadow.note(usize::from(COMMAND), &command);

        let hardware_pm = shadow.capabilities().pm;
        let pm = hardware_pm.map(|at| {
            let support = if spec.power_offered {
                PmeSupport::D0 | PmeSupport::D3_HOT | PmeSupport::D3_COLD
            } else {
                PmeSupport::empty()
            };
            (
                at,
                PmCapability::new(
                    support,
                    shadow.raw_u16(at + PMCSR) & NO_SOFT_RESET != 0 || spec.power_offered,
                ),
            )
        });
        let inner = Inner {
            doorbells: Doorbells::of(&shadow),
            shadow,
            registers: layout.registers,
            pm,
            msi: layout.msi.map(|(at, msi)| (at, MsiVectors::new(msi, Arc::clone(&allocator)))),
            msix: layout.msix.map(|(at, msix)| (at, MsixVectors::new(msix, allocator))),
            irqs: HostIrqs::new(intx),
            powered: true,
            hardware_up: true,
            lost: false,
            direct: Direct::Standing,
            mapped: Vec::new(),
            placed: Vec::new(),
        };
        Ok(Arc::new_cyclic(|this| Self {
            handle,
            devfn,
            hardware_pm,
            bars: layout.bars,
            windows,
            mapper,
            this: Weak::clone(this),
            domain: OnceLock::new(),
            pm_turn: Mutex::new(()),
            inner: Mutex::new(inner),
        }))
    }

    /// Its place on the bus of its root port.
    pub fn devfn(&self) -> DevFn {
        self.devfn
    }

    /// The opened device.
    pub fn handle(&self) -> &Arc<Handle> {
        &self.handle
    }

    /// Tells the function which domain controls its power. Once, before the guest runs.
    pub fn join(&self, domain: &Arc<PowerDomain>) {
        if self.domain.set(Arc::downgrade(domain)).is_err() {
            warn!("device {}: already in a power domain", self.handle.name());
        }
    }

    /// The BARs and the ROM, to find addresses for.
    pub fn needs(&self) -> FunctionNeeds {
        FunctionNeeds::of(self.devfn, &self.inner().registers)
    }

    /// Takes all direct mappings away, because a vCPU found no memory behind one of them: the host has closed the
    /// device's memory under it. Where the device answers they are made anew; otherwise its BARs are trapped until
    /// the next [`FunctionGate::open`], as they are with `for_good`. Returns whether anything was mapped.
    pub fn close_direct(&self, for_good: bool) -> bool {
        let mut inner = self.inner();
        if inner.mapped.is_empty() {
            return false;
        }
        inner.mapped.clear();
        if !for_good && self.answers() && self.hardware_in_d0() {
            self.apply(&mut inner);
        } else {
            inner.direct = Direct::Never;
        }
        true
    }

    /// Whether it may know addresses from the host's IOMMU that it cannot be told to forget now.
    pub fn is_asleep_with_translations(&self) -> bool {
        let inner = self.inner();
        inner.shadow.has_translation_cache() && !inner.accessible()
    }

    /// Resets the device, as a secondary bus reset of its root port does. Does nothing while it is asleep.
    ///
    /// Takes 100 ms, and up to a minute if the device does not come back. The mutex is held meanwhile: an access would find the
    /// device in reset, and the gate must not close, or low power would be entered under the reset's feet.
    pub fn reset(&self) {
        let mut inner = self.inner();
        if inner.accessible() {
            inner.mapped.clear();
            info!("device {}: reset by the guest", self.handle.name());
            self.handle.reset();
            self.apply(&mut inner);
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Brings what is decoded and mapped in step with registers and gate.
    fn apply(&self, inner: &mut Inner) {
        let command = inner.shadow.raw_u16(COMMAND);
        let wanted: Vec<DecodedBar> = inner.registers.decoded(command).collect();
        let open = inner.accessible() && inner.hardware_up && inner.direct == Direct::Standing;
        // First everything that must go: a moved BAR's old memory slot goes before its placement.
        let stays = |bar: &DecodedBar| wanted.contains(bar);
        let gone: Vec<BarIndex> =
            inner.placed.iter().filter(|(bar, _)| !stays(bar)).map(|(bar, _)| bar.index).collect();
        inner.mapped.retain(|(index, _)| open && !gone.contains(index));
        inner.placed.retain(|(bar, _)| stays(bar));
        for bar in wanted {
            if !inner.placed.iter().any(|(placed, _)| *placed == bar) {
                match self.place(&bar) {
                    Ok(placement) => inner.placed.push((bar, placement)),
                    Err(e) => {
                        // A sizing pattern left in a BAR, or a guest that means harm: not decoded.
                        debug!("device {}: BAR {} is not decoded: {e}", self.handle.name(), bar.index);
                        continue;
                    }
                }
            }
            if open && !inner.mapped.iter().any(|(index, _)| *index == bar.index) {
                self.map(&bar, &mut inner.mapped);
            }
        }
    }

    /// Closes what reaches hardware without an access by us, once the state says that nothing may: memory slots, and INTx, whose
    /// resampling eventfd would unmask it in the configuration space of a device that is off.
    ///
    /// Done in D3hot already, where a device raises no interrupt: so `_OFF`, which follows, is spared the wait for the host's
    /// interrupt threads.
    fn shut(&self, inner: &mut Inner) {
        self.apply(inner);
        inner.irqs.quiesce_intx(&self.handle);
    }

    /// The guest has reached a BAR of a function that is on.
    fn touched(&self, inner: &mut Inner) {
        if inner.direct == Direct::OnTouch && inner.hardware_up {
            inner.direct = Direct::Standing;
            self.apply(inner);
            self.apply_irqs(inner);
        }
    }

    fn place(&self, bar: &DecodedBar) -> Result<Placement, pci::window::PlaceError> {
        let window = match bar.kind {
            BarKind::Io => &self.windows.io,
            _ if bar.base >= self.windows.mmio64.start() => &self.windows.mmio64,
            _ => &self.windows.mmio32,
        };
        let this: Weak<dyn PciFunction> = Weak::<Self>::clone(&self.this);
        window.place(bar.base, bar.size, this, bar.index)
    }

    fn map(&self, decoded: &DecodedBar, mapped: &mut Vec<(BarIndex, Box<dyn Mapping>)>) {
        let Some(bar) = self.bars.iter().find(|bar| bar.index == decoded.index) else { return };
        if !decoded.base.is_multiple_of(PAGE_SIZE) {
            return;
        }
        for area in &bar.areas {
            match self.mapper.map(decoded.base + area.offset(), area) {
                Ok(mapping) => mapped.push((bar.index, mapping)),
                Err(e) => warn!(
                    "device {}: BAR {} cannot be mapped at {:#x} ({e}); its accesses are trapped",
                    self.handle.name(),
                    bar.index,
                    decoded.base
                ),
            }
        }
    }

    /// Arms on the host what the guest has enabled.
    fn apply_irqs(&self, inner: &mut Inner) {
        if inner.accessible() && inner.hardware_up {
            let wanted = inner.wanted_irqs();
            inner.irqs.apply(&self.handle, wanted);
        }
    }

    fn write_command(&self, inner: &mut Inner, offset: u16, data: &[u8]) {
        let old = inner.shadow.raw_u16(COMMAND);
        let mut bytes = old.to_le_bytes();
        for (at, &byte) in (usize::from(offset - COMMAND)..2).zip(data) {
            bytes[at] = byte;
        }
        // What is switched off leaves the guest before the hardware stops to decode it.
        let closing = old & !u16::from_le_bytes(bytes) & (COMMAND_IO | COMMAND_MEMORY);
        inner.shadow.note(usize::from(COMMAND), &(old & !closing).to_le_bytes());
        self.apply(inner);
        self.forward(inner, offset, data);
        self.apply(inner);
        self.apply_irqs(inner);
    }

    /// Writes to the device and notes what it makes of it.
    fn forward(&self, inner: &mut Inner, offset: u16, data: &[u8]) {
        if let Err(e) = self.handle.config_write(u64::from(offset), data) {
            debug!("device {}: write to config {offset:#x} failed: {e}", self.handle.name());
            return;
        }
        let dword = offset & !3;
        let mut now = [0; 4];
        if self.handle.config_read(u64::from(dword), &mut now).is_ok() {
            inner.shadow.note(usize::from(dword), &now);
        }
    }

    /// The guest's write to the PM capability; hardware has no part in it.
    fn write_pm(&self, within: u16, data: &[u8]) {
        let _turn = self.pm_turn.lock().unwrap_or_else(PoisonError::into_inner);
        let mut inner = self.inner();
        if inner.lost {
            return;
        }
        let change = inner.pm.as_mut().and_then(|(_, pm)| pm.write(within, data).state);
        if let Some((_, to)) = change {
            self.state_changed(inner, to);
        }
    }

    /// The guest moved PowerState.
    fn state_changed(&self, mut inner: MutexGuard<'_, Inner>, to: DState) {
        let name = self.handle.name();
        let domain = self.domain.get().and_then(Weak::upgrade);
        match to {
            DState::D3Hot => {
                debug!("device {name}: D0 -> D3hot by the guest");
                inner.hardware_up = false;
                self.shut(&mut inner);
                drop(inner);
                if let Some(domain) = domain {
                    domain.parked(self.devfn);
                }
            }
            DState::D0 => {
                debug!("device {name}: D3hot -> D0 by the guest");
                // BARs stay closed until hardware is known to be in D0 as well.
                drop(inner);
                if domain.is_none_or(|domain| domain.unparked(self.devfn)) {
                    let mut inner = self.inner();
                    inner.hardware_up = true;
                    self.awake(&mut inner);
                }
            }
        }
    }

    /// Hardware is in D0 and the guest may reach it, unless something else stands in the way.
    fn awake(&self, inner: &mut Inner) {
        self.apply(inner);
        self.apply_irqs(inner);
        if !inner.accessible() {
            return;
        }
        for missed in inner.doorbells.as_mut().map(Doorbells::take).unwrap_or_default() {
            let Some(bar) = self.bars.iter().find(|bar| bar.index == missed.bar) else { continue };
            if let Err(e) = self.handle.region_write(&bar.region, missed.offset, missed.data()) {
                debug!("device {}: a missed notification cannot be made up for: {e}", self.handle.name());
            }
        }
    }

    /// Whether the device answers: all ones in a register that VFIO does not make up means that it does not.
    fn answers(&self) -> bool {
        let mut class = [0xff; 4];
        match self.handle.config_read(CLASS_REVISION, &mut class) {
            Ok(()) => class != [0xff; 4],
            Err(e) => {
                warn!("device {}: configuration space cannot be read: {e}", self.handle.name());
                false
            }
        }
    }

    /// PowerState of the hardware, which VFIO shows as it is.
    fn hardware_in_d0(&self) -> bool {
        let mut state = [0xff; 1];
        self.hardware_pm.is_none_or(|at| {
            self.handle.config_read(u64::from(at + PMCSR), &mut state).is_ok() && state[0] & 3 == 0
        })
    }

    fn write_hardware_state(&self, state: u16) -> io::Result<()> {
        match self.hardware_pm {
            Some(at) => self.handle.config_write(u64::from(at + PMCSR), &state.to_le_bytes()),
            None => Ok(()),
        }
    }
}

impl Inner {
    fn accessible(&self) -> bool {
        let in_d0 = self.pm.as_ref().is_none_or(|(_, pm)| pm.state() == DState::D0);
        self.powered && !self.lost && in_d0
    }

    fn wanted_irqs(&mut self) -> Wanted {
        // The longest run from the first vector on: where one could not be made, those before it still work.
        let all = |set: &VectorSet, count: u16| (0..count).map_while(|n| set.get(n).cloned()).collect();
        if let Some((_, msix)) = self.msix.as_mut().filter(|(_, msix)| msix.capability().is_enabled()) {
            let programmed = msix.reserve_programmed();
            let used = msix.vectors().iter().map(|(number, _)| number.saturating_add(1)).max().unwrap_or(0);
            return Wanted::msix(all(msix.vectors(), programmed.max(used)));
        }
        if let Some((_, msi)) = self.msi.as_mut().filter(|(_, msi)| msi.capability().is_enabled()) {
            let count = msi.reserve_enabled();
            return Wanted::msi(all(msi.vectors(), count));
        }
        let command = self.shadow.raw_u16(COMMAND);
        let decoding = command & (COMMAND_IO | COMMAND_MEMORY) != 0;
        let used = self.direct != Direct::OnTouch;
        if self.irqs.has_intx() && used && decoding && command & COMMAND_INTX_DISABLE == 0 {
            Wanted::Intx
        } else {
            Wanted::None
        }
    }
}

impl FunctionGate for VfioFunction {
    fn bdf(&self) -> Bdf {
        self.handle.bdf()
    }

    fn close(&self) {
        let mut inner = self.inner();
        inner.powered = false;
        if let Some((_, pm)) = &mut inner.pm {
            pm.power_off();
        }
        self.shut(&mut inner);
    }

    fn open(&self) {
        let mut inner = self.inner();
        inner.powered = true;
        inner.hardware_up = true;
        inner.lost = false;
        if inner.mapped.is_empty() {
            inner.direct = Direct::OnTouch;
        }
        if let Some((_, pm)) = &mut inner.pm {
            pm.power_on();
        }
        self.awake(&mut inner);
    }

    fn settle(&self) -> bool {
        if let Err(e) = self.write_hardware_state(0) {
            warn!("device {}: PMCSR cannot be written: {e}", self.handle.name());
            return false;
        }
        self.answers()
    }

    fn set_hardware_d3hot(&self, on: bool) -> bool {
        // The guest may have come back to D0 since the worker was told.
        if on && self.inner().accessible() {
            return false;
        }
        let state = if on { POWER_STATE_D3HOT } else { 0 };
        match self.write_hardware_state(state) {
            Ok(()) => on || self.answers(),
            Err(e) => {
                warn!("device {}: PMCSR cannot be written: {e}", self.handle.name());
                false
            }
        }
    }

    fn answers(&self) -> bool {
        Self::answers(self)
    }

    fn reset_hardware(&self) -> bool {
        self.handle.reset();
        self.settle()
    }

    fn latch_pme(&self) -> bool {
        self.inner().pm.as_mut().is_some_and(|(_, pm)| pm.latch_pme())
    }

    fn lost(&self) {
        let mut inner = self.inner();
        inner.lost = true;
        self.apply(&mut inner);
    }
}
