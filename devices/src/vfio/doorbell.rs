//! Notifications that a virtio driver sends to an assigned device while it is asleep.
//!
//! A virtio driver tells its device of new buffers by a write to a notification register, and with event suppression
//! negotiated it does so once, not again for every buffer (virtio 1.2, sections 2.7.10 and 4.1.4.4). Linux's virtio-gpu
//! keeps drawing the text console's cursor while the system suspends; the one notification that falls into the sleep
//! of the device is dropped as any other write is, and afterwards the driver waits for ever for an answer to what it
//! never announced.
//!
//! So for a virtio device these registers are remembered, and written once the device is awake: it only looks at its
//! queue again, which it may be asked to do at any time. The write itself neither wakes the device nor reaches it.

use std::collections::BTreeMap;

use pci::function::BarIndex;

use super::config::ConfigShadow;

/// PCI vendor of virtio devices (virtio 1.2, section 4.1.2).
const VENDOR_VIRTIO: u16 = 0x1af4;
/// `VIRTIO_PCI_CAP_NOTIFY_CFG` (section 4.1.4).
const CFG_TYPE_NOTIFY: u8 = 2;
/// So many different registers are remembered at most: one for each queue, and drivers use few.
const MAX_REMEMBERED: usize = 256;

/// The notification registers of a virtio device, and what was written to them while it slept.
#[derive(Debug)]
pub struct Doorbells {
    bar: BarIndex,
    start: u64,
    end: u64,
    /// The last write to each register: its value, and its length in bytes.
    missed: BTreeMap<u64, ([u8; 4], usize)>,
}

/// A write that the device missed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Missed {
    /// The BAR.
    pub bar: BarIndex,
    /// Offset in the BAR.
    pub offset: u64,
    value: [u8; 4],
    length: usize,
}

impl Missed {
    /// What was written: 2 or 4 bytes.
    pub fn data(&self) -> &[u8] {
        &self.value[..self.length]
    }
}

impl Doorbells {
    /// Those of the function with this configuration space; `None` when it is no virtio device.
    pub fn of(shadow: &ConfigShadow) -> Option<Self> {
        if shadow.raw_u16(0) != VENDOR_VIRTIO {
            return None;
        }
        shadow.vendor_capabilities().iter().find_map(|&at| {
            let mut capability = [0; 16];
            shadow.raw(usize::from(at), &mut capability);
            let [_, _, _, kind, bar, _, _, _, o0, o1, o2, o3, l0, l1, l2, l3] = capability;
            let start = u64::from(u32::from_le_bytes([o0, o1, o2, o3]));
            let end = start + u64::from(u32::from_le_bytes([l0, l1, l2, l3]));
            (kind == CFG_TYPE_NOTIFY && bar < 6).then(|| Self { bar, start, end, missed: BTreeMap::new() })
        })
    }

    /// The guest wrote to a BAR of the sleeping device.
    pub fn missed(&mut self, bar: BarIndex, offset: u64, data: &[u8]) {
        let inside = bar == self.bar && (self.start..self.end).contains(&offset);
        if !inside || !matches!(data.len(), 2 | 4) {
            return;
        }
        if self.missed.len() < MAX_REMEMBERED || self.missed.contains_key(&offset) {
            let mut value = [0; 4];
            value[..data.len()].copy_from_slice(data);
            self.missed.insert(offset, (value, data.len()));
        }
    }

    /// Hands over what was missed.
    pub fn take(&mut self) -> Vec<Missed> {
        let bar = self.bar;
        std::mem::take(&mut self.missed)
            .into_iter()
            .map(|(offset, (value, length))| Missed { bar, offset, value, length })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::config::{CONFIG_SIZE, ConfigShadow};
    use super::*;

    fn shadow(vendor: u16) -> ConfigShadow {
        let mut bytes = Box::new([0; CONFIG_SIZE]);
        bytes[0..2].copy_from_slice(&vendor.to_le_bytes());
        bytes[0x06] = 0x10;
        bytes[0x34] = 0x40;
        bytes[0x40..0x45].copy_from_slice(&[0x09, 0x50, 16, 1, 2]);
        bytes[0x50..0x60].copy_from_slice(&[0x09, 0, 20, 2, 4, 0, 0, 0, 0, 0x30, 0, 0, 0, 0x10, 0, 0]);
        ConfigShadow::new("0000:01:00.0".parse().unwrap(), bytes, false).unwrap()
    }

    #[test]
    fn a_missed_notification_is_handed_over_once() {
        let mut doorbells = Doorbells::of(&shadow(VENDOR_VIRTIO)).unwrap();
        doorbells.missed(4, 0x3004, &[1, 0]);
        doorbells.missed(4, 0x3004, &[1, 0]);
        let taken = doorbells.take();
        assert_eq!(taken.len(), 1);
        assert_eq!((taken[0].bar, taken[0].offset, taken[0].data()), (4, 0x3004, &[1, 0][..]));
        assert_eq!(doorbells.take(), []);
    }

    #[test]
    fn other_registers_and_other_devices_are_not_remembered() {
        let mut doorbells = Doorbells::of(&shadow(VENDOR_VIRTIO)).unwrap();
        for (bar, offset, data) in
            [(4, 0x14, &[0, 0][..]), (2, 0x3000, &[0, 0]), (4, 0x4000, &[0, 0]), (4, 0x3000, &[0])]
        {
            doorbells.missed(bar, offset, data);
        }
        assert_eq!(doorbells.take(), []);
        assert!(Doorbells::of(&shadow(0x8086)).is_none());
    }

    #[test]
    fn a_guest_cannot_make_the_memory_grow() {
        let mut doorbells = Doorbells::of(&shadow(VENDOR_VIRTIO)).unwrap();
        (0..0x1000).for_each(|at| doorbells.missed(4, 0x3000 + at, &[0, 0]));
        assert_eq!(doorbells.take().len(), MAX_REMEMBERED);
    }
}
