//! The capabilities of a virtio function (VIRTIO 1.2, section 4.1.4): where each part of the registers is, and the window through which they can
//! be reached by configuration cycles alone.

use pci::cap::{msix, pm};
use pci::config::{CapabilitySpan, ConfigSpace, NoRoom};
use pci::regs;
use serde::{Deserialize, Serialize};

use super::{BAR, COMMON, CONFIG, DOORBELL_STEP, DOORBELLS, ISR, SECTION};

/// Kinds of a virtio capability.
const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const ISR_CFG: u8 = 3;
const DEVICE_CFG: u8 = 4;
const PCI_CFG: u8 = 5;

const LEN: u16 = 16;
/// With the distance of doorbells, or the window's data.
const LONG_LEN: u16 = 20;
/// Offsets in a capability.
const BAR_AT: u16 = 4;
const DATA_AT: u16 = 16;

/// Where they stand.
#[derive(Debug)]
pub(super) struct Capabilities {
    pub(super) pm: CapabilitySpan,
    pub(super) msix: CapabilitySpan,
    pub(super) access: CapabilitySpan,
}

impl Capabilities {
    pub(super) fn add(config: &mut ConfigSpace) -> Result<Self, NoRoom> {
        let pm = config.add_capability(regs::CAP_PM, pm::LEN)?;
        let msix = config.add_capability(regs::CAP_MSIX, msix::LEN)?;
        for (kind, offset) in [(COMMON_CFG, COMMON), (ISR_CFG, ISR), (DEVICE_CFG, CONFIG)] {
            let span = config.add_capability(regs::CAP_VENDOR, LEN)?;
            describe(config, span, LEN, kind, offset, if kind == ISR_CFG { 4 } else { SECTION });
        }
        let span = config.add_capability(regs::CAP_VENDOR, LONG_LEN)?;
        describe(config, span, LONG_LEN, NOTIFY_CFG, DOORBELLS, SECTION);
        put(config, span, DATA_AT, &DOORBELL_STEP.to_le_bytes()[..4]);
        let access = config.add_capability(regs::CAP_VENDOR, LONG_LEN)?;
        describe(config, access, LONG_LEN, PCI_CFG, 0, 0);
        Ok(Self { pm, msix, access })
    }
}

fn put(config: &mut ConfigSpace, span: CapabilitySpan, at: u16, bytes: &[u8]) {
    config.set(span.start() + at, bytes);
}

fn describe(config: &mut ConfigSpace, span: CapabilitySpan, len: u16, kind: u8, offset: u64, size: u64) {
    put(config, span, 2, &[len.to_le_bytes()[0], kind]);
    put(config, span, BAR_AT, &[BAR]);
    put(config, span, 8, &offset.to_le_bytes()[..4]);
    put(config, span, 12, &size.to_le_bytes()[..4]);
}

/// VIRTIO_PCI_CAP_PCI_CFG: the driver names a BAR, an offset and a length, and reads or writes there through the data register.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(super) struct Window {
    /// The capability's bytes from its BAR on, without the data.
    registers: [u8; 12],
}

impl Window {
    pub(super) fn read(&self, at: u16, data: &mut [u8]) {
        for (at, byte) in (at..).zip(data) {
            let place = at.checked_sub(BAR_AT).and_then(|at| self.registers.get(usize::from(at)));
            if let Some(value) = place {
                *byte = *value;
            } else if at >= DATA_AT {
                *byte = 0xff;
            }
        }
    }

    pub(super) fn write(&mut self, at: u16, data: &[u8]) {
        for (at, byte) in (at..).zip(data) {
            // The BAR, then three bytes that are none of the driver's, then offset and length.
            let place = at.checked_sub(BAR_AT).filter(|at| *at == 0 || *at >= 4);
            if let Some(register) = place.and_then(|at| self.registers.get_mut(usize::from(at))) {
                *register = *byte;
            }
        }
    }

    /// Where in the BAR an access of `len` bytes at `at` of the capability goes, if it goes there.
    pub(super) fn target(&self, at: u16, len: usize, bar_size: u64) -> Option<u64> {
        let [bar, _, _, _, offset @ .., l0, l1, l2, l3] = self.registers;
        let (offset, length) = (u32::from_le_bytes(offset), u32::from_le_bytes([l0, l1, l2, l3]));
        let fits = usize::try_from(length) == Ok(len) && matches!(len, 1 | 2 | 4);
        let aligned = offset.is_multiple_of(length.max(1));
        let inside = u64::from(offset) + u64::from(length) <= bar_size;
        (at == DATA_AT && bar == BAR && fits && aligned && inside).then_some(offset.into())
    }
}
