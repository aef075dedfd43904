//! What the guest's accesses to an assigned function do: configuration space, and BARs where they are trapped.
//!
//! Each access takes the function's mutex for as long as it lasts. Where the gate is closed, the models and the shadow
//! answer, and hardware is not asked.
//!
//! Follows PCI Local Bus 3.0 chapter 6 (configuration space) and section 6.8.2 (MSI-X table).

use log::debug;
use pci::PciFunction;
use pci::bar::BarRegisters;
use pci::cap::msix::{self, MsixRegion};
use pci::cap::pm;
use pci::function::BarIndex;

use super::{COMMAND, Inner, VfioFunction};

impl PciFunction for VfioFunction {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        let mut inner = self.inner();
        if inner.lost {
            return;
        }
        let at = usize::from(offset);
        if inner.accessible() && !is_constant(offset) {
            if self.handle.config_read(u64::from(offset), data).is_err() {
                data.fill(0xff);
                return;
            }
            inner.shadow.note(at, data);
        } else {
            inner.shadow.raw(at, data);
        }
        inner.overlay(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        if let Some(within) = self.hardware_pm.and_then(|at| within(at, pm::LEN, offset)) {
            self.write_pm(within, data);
            return;
        }
        let mut inner = self.inner();
        if !inner.accessible() {
            return;
        }
        if BarRegisters::covers(offset) {
            if inner.registers.write(offset, data) {
                self.apply(&mut inner);
            }
            return;
        }
        if (COMMAND..COMMAND + 2).contains(&offset) {
            self.write_command(&mut inner, offset, data);
            return;
        }
        if let Some((at, msi)) = &mut inner.msi {
            let len = msi.capability().layout().capability_len();
            if let Some(within) = within(*at, len, offset) {
                let _applied = msi.write(within, data);
                self.apply_irqs(&mut inner);
                return;
            }
        }
        if let Some((at, msix)) = &mut inner.msix
            && let Some(within) = within(*at, msix::LEN, offset)
        {
            let _applied = msix.write(within, data);
            self.apply_irqs(&mut inner);
            return;
        }
        self.forward(&mut inner, offset, data);
    }

    fn bar_read(&self, bar: BarIndex, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let mut inner = self.inner();
        if !inner.accessible() {
            return;
        }
        if let Some((_, msix)) = &mut inner.msix {
            match msix.capability().layout().region(bar, offset) {
                Some(MsixRegion::Table(at)) => return msix.table_read(at, data),
                Some(MsixRegion::Pba(at)) => return msix.pba_read(at, data),
                None => {}
            }
        }
        let Some(bar) = self.bars.iter().find(|b| b.index == bar) else { return };
        if self.handle.region_read(&bar.region, offset, data).is_err() {
            data.fill(0xff);
        }
        self.touched(&mut inner);
    }

    fn bar_write(&self, bar: BarIndex, offset: u64, data: &[u8]) {
        let mut inner = self.inner();
        if !inner.accessible() {
            if let Some(doorbells) = &mut inner.doorbells {
                doorbells.missed(bar, offset, data);
            }
            return;
        }
        if let Some((_, msix)) = &mut inner.msix {
            match msix.capability().layout().region(bar, offset) {
                Some(MsixRegion::Table(at)) => {
                    let applied = msix.table_write(at, data);
                    if !applied.allocated.is_empty() {
                        self.apply_irqs(&mut inner);
                    }
                    return;
                }
                Some(MsixRegion::Pba(_)) => return,
                None => {}
            }
        }
        let Some(bar) = self.bars.iter().find(|b| b.index == bar) else { return };
        if let Err(e) = self.handle.region_write(&bar.region, offset, data) {
            debug!("device {}: write to BAR {} at {offset:#x} failed: {e}", self.handle.name(), bar.index);
        }
        self.touched(&mut inner);
    }
}

impl Inner {
    /// Replaces the parts of `data`, read at `offset`, that the VMM answers itself.
    fn overlay(&mut self, offset: u16, data: &mut [u8]) {
        self.shadow.patch(usize::from(offset), data);
        self.registers.read(offset, data);
        if let Some((at, pm)) = &self.pm
            && let Some(within) = within(*at, pm::LEN, offset)
        {
            pm.read(within, data);
        }
        if let Some((at, msi)) = &mut self.msi {
            let len = msi.capability().layout().capability_len();
            if let Some(within) = within(*at, len, offset) {
                msi.read(within, data);
            }
        }
        if let Some((at, msix)) = &self.msix
            && let Some(within) = within(*at, msix::LEN, offset)
        {
            msix.read(within, data);
        }
    }
}

/// The offset within a capability at `start` of `len` bytes, for an access at `offset`.
fn within(start: u16, len: u16, offset: u16) -> Option<u16> {
    offset.checked_sub(start).filter(|within| *within < len)
}

/// Registers that never change and that drivers read often: answered without asking the device.
fn is_constant(offset: u16) -> bool {
    matches!(offset & !3, 0x00 | 0x08 | 0x2c | 0x34)
}
