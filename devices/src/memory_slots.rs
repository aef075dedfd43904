//! The trap half of memory that is added while the guest runs (`PNP0C80`; ACPI 6.5, section 9.11).
//!
//! The registers are [`acpi::memory_abi`]'s, which the AML is generated from too. A slot is filled once and stays so until the machine
//! ends. Nothing that the guest writes changes what it reads.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use acpi::event_abi::{Event, OST_SUCCESS};
use acpi::memory_abi::{Half, Register, SLOT_COUNT, STATUS_FILLED, decode};
use log::{info, warn};
use serde::{Deserialize, Serialize};
use vm_device::DeviceMmio;
use vm_device::bus::{MmioAddress, MmioAddressOffset};

use crate::event_device::EventDevice;

/// Memory in a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryInSlot {
    /// First address.
    pub base: u64,
    /// Length in bytes.
    pub size: u64,
    /// Its proximity domain.
    pub node: u32,
}

/// A slot with memory in it.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Filled {
    memory: MemoryInSlot,
    /// Whether the guest has been told and has not said yet what came of it.
    awaited: bool,
}

/// All of them, which is also what is saved of them.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct SlotsState {
    filled: Vec<Filled>,
    changed: u32,
}

/// The slots on the MMIO bus.
pub struct MemorySlots {
    slots: Mutex<SlotsState>,
    events: Arc<EventDevice>,
}

impl fmt::Debug for MemorySlots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemorySlots").field("slots", &*self.slots()).finish_non_exhaustive()
    }
}

impl MemorySlots {
    /// All empty. The guest is told through `events`.
    pub fn new(events: Arc<EventDevice>) -> Self {
        Self { slots: Mutex::default(), events }
    }

    fn slots(&self) -> MutexGuard<'_, SlotsState> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What must go on elsewhere as it is here.
    pub fn save(&self) -> SlotsState {
        self.slots().clone()
    }

    /// Goes on as saved. Slots beyond those that there are stay empty.
    pub fn restore(&self, saved: &SlotsState) {
        let mut slots = self.slots();
        slots.clone_from(saved);
        slots.filled.truncate(usize::from(SLOT_COUNT));
    }

    /// How many are still empty.
    pub fn free(&self) -> usize {
        usize::from(SLOT_COUNT).saturating_sub(self.slots().filled.len())
    }

    /// Puts memory into the next slot before the guest runs: it finds it there. Whether there was one left.
    pub fn fill_at_boot(&self, memory: MemoryInSlot) -> bool {
        self.fill(memory, false).is_some()
    }

    /// Puts memory, which must be usable by now, into the next slot and tells the guest. Whether there was one left.
    pub fn add(&self, memory: MemoryInSlot) -> bool {
        let Some(slot) = self.fill(memory, true) else { return false };
        info!("memory slot {slot}: {} MiB at {:#x}; the guest is told", memory.size >> 20, memory.base);
        self.events.raise(Event::Memory);
        true
    }

    fn fill(&self, memory: MemoryInSlot, awaited: bool) -> Option<usize> {
        let mut slots = self.slots();
        let slot = slots.filled.len();
        if slot >= usize::from(SLOT_COUNT) {
            return None;
        }
        slots.filled.push(Filled { memory, awaited });
        if awaited {
            slots.changed |= 1_u32.checked_shl(u32::try_from(slot).unwrap_or(u32::MAX)).unwrap_or(0);
        }
        Some(slot)
    }

    fn answered(&self, slot: usize, status: u32) {
        {
            let mut slots = self.slots();
            let Some(filled) = slots.filled.get_mut(slot) else { return };
            // One answer for each time it was told: the guest cannot fill the log.
            if !std::mem::take(&mut filled.awaited) {
                return;
            }
        }
        if status == u32::from(OST_SUCCESS) {
            info!("memory slot {slot}: the guest has taken it");
        } else {
            warn!(
                "memory slot {slot}: the guest cannot use it (status {status:#x}): its kernel log says why; a kernel without memory \
                 hotplug needs a reboot"
            );
        }
    }
}

impl DeviceMmio for MemorySlots {
    fn mmio_read(&self, _base: MmioAddress, offset: MmioAddressOffset, data: &mut [u8]) {
        let Some((slot, register)) = decode(offset, data.len()) else { return data.fill(0xff) };
        let mut slots = self.slots();
        let half = |half: Half, value: fn(&MemoryInSlot) -> u64, filled: Option<&Filled>| {
            filled.map_or(0, |filled| half.of(value(&filled.memory)))
        };
        let filled = slots.filled.get(slot);
        let value = match register {
            Register::Base(which) => half(which, |memory| memory.base, filled),
            Register::Length(which) => half(which, |memory| memory.size, filled),
            Register::Status => filled.map_or(0, |_| STATUS_FILLED),
            Register::Domain => filled.map_or(0, |filled| filled.memory.node),
            Register::Answer => 0,
            Register::Changed => std::mem::take(&mut slots.changed),
        };
        data.copy_from_slice(&value.to_le_bytes());
    }

    fn mmio_write(&self, _base: MmioAddress, offset: MmioAddressOffset, data: &[u8]) {
        if let (Some((slot, Register::Answer)), &[a, b, c, d]) = (decode(offset, data.len()), data) {
            self.answered(slot, u32::from_le_bytes([a, b, c, d]));
        }
    }
}

#[cfg(test)]
mod tests {
    use acpi::event_abi::EVENT_MEMORY;
    use acpi::memory_abi::{ANSWER_OFFSET, BLOCK_SIZE, CHANGED_OFFSET, SLOT_SIZE};
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;
    use crate::event_device::ReleaseSink;

    const BASE: MmioAddress = MmioAddress(0xfed6_0000);
    const MEMORY: MemoryInSlot = MemoryInSlot { base: 0x1_4000_0000, size: 0x2_0800_0000, node: 3 };

    struct Nobody;

    impl ReleaseSink for Nobody {
        fn released(&self, _place: acpi::event_abi::PlaceAddress, _result: Result<(), u8>) {}
    }

    fn slots() -> (MemorySlots, Arc<EventDevice>, EventFd) {
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        let events = Arc::new(EventDevice::new(interrupt.try_clone().unwrap(), Arc::new(Nobody)));
        (MemorySlots::new(Arc::clone(&events)), events, interrupt)
    }

    fn read(device: &dyn DeviceMmio, offset: u64) -> u32 {
        let mut data = [0; 4];
        device.mmio_read(BASE, offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn added_memory_is_announced_once_and_described_by_its_slot() {
        let (slots, events, interrupt) = slots();
        let unused = |register| register % 8 == 7;
        let mut registers = (0..BLOCK_SIZE / 4).filter(|register| !unused(*register));
        assert!(registers.all(|register| read(&slots, register * 4) == 0), "empty slots read 0");
        assert!(slots.fill_at_boot(MemoryInSlot { base: 0x1_0000_0000, size: 0x4000_0000, node: 0 }));
        assert!(interrupt.read().is_err(), "nothing to tell before the guest runs");
        assert!(slots.add(MEMORY));
        assert_eq!(interrupt.read().unwrap(), 1);
        assert_eq!(read(events.as_ref(), 0), EVENT_MEMORY);
        assert_eq!(read(&slots, CHANGED_OFFSET), 0b10);
        assert_eq!(read(&slots, CHANGED_OFFSET), 0);
        let second: Vec<u32> = (0..8).map(|register| read(&slots, SLOT_SIZE + register * 4)).collect();
        assert_eq!(second, [0x4000_0000, 1, 0x0800_0000, 2, STATUS_FILLED, 3, 0, u32::MAX]);
    }

    #[test]
    fn there_are_eight_slots_and_no_ninth() {
        let (slots, _events, _interrupt) = slots();
        for number in 0..8 {
            assert_eq!(slots.free(), 8 - number);
            assert!(slots.add(MEMORY));
        }
        assert!(!slots.add(MEMORY) && !slots.fill_at_boot(MEMORY));
        assert_eq!((slots.free(), read(&slots, CHANGED_OFFSET)), (0, 0xff));
    }

    #[test]
    fn whatever_the_guest_writes_changes_nothing_and_one_answer_counts() {
        let (slots, _events, _interrupt) = slots();
        slots.add(MEMORY);
        let before: Vec<u32> = (0..CHANGED_OFFSET / 4).map(|register| read(&slots, register * 4)).collect();
        for offset in (0..0x200).chain([u64::MAX]) {
            for size in [1, 2, 4, 8] {
                slots.mmio_write(BASE, offset, &[0x5a; 8][..size]);
            }
        }
        let after: Vec<u32> = (0..CHANGED_OFFSET / 4).map(|register| read(&slots, register * 4)).collect();
        assert_eq!(before, after);
        assert!(!slots.slots().filled[0].awaited, "the answer has been heard");
        slots.mmio_write(BASE, ANSWER_OFFSET, &[0; 4]);
        assert!(!slots.slots().filled[0].awaited);
    }
}
