//! The driver's side of a device, for tests of devices and for fuzzing: rings in memory of its own, split or packed, and interrupts that are
//! counted.
#![allow(clippy::unwrap_used, clippy::missing_panics_doc)] // It is a test's.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::Memory;
use super::device::{Activation, Interrupt};
use super::queue::{ActiveQueue, Ring};
use super::ring::{QueueLayout, RingError, RingFeatures, RingPosition, SharedPosition};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// Interrupts that have come, for looking at.
#[derive(Debug, Default)]
pub struct Interrupts {
    seen: Mutex<Seen>,
    /// Whether the device begins paused.
    pub paused: AtomicBool,
}

/// What has come so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Numbers of queues, one for each interrupt.
    pub queues: Vec<u16>,
    /// Configuration changes.
    pub config: u32,
    /// Why the device has stopped, each time it said so.
    pub stopped: Vec<String>,
}

impl Interrupts {
    /// What has come so far.
    pub fn seen(&self) -> Seen {
        self.seen.lock().unwrap().clone()
    }
}

impl Interrupt for Interrupts {
    fn queue(&self, index: u16) {
        self.seen.lock().unwrap().queues.push(index);
    }

    fn config(&self) {
        self.seen.lock().unwrap().config += 1;
    }

    fn needs_reset(&self, why: &str) {
        self.seen.lock().unwrap().stopped.push(why.to_owned());
    }

    fn queue_event(&self, _index: u16) -> io::Result<EventFd> {
        EventFd::new(EFD_NONBLOCK)
    }

    fn begins_paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }
}

/// Memory of 16 MiB at address 0, with a hole from 8 MiB to 12 MiB.
pub fn memory() -> Memory {
    const MIB: usize = 1 << 20;
    let ranges = [(GuestAddress(0), 8 * MIB), (GuestAddress(12 << 20), 4 * MIB)];
    Memory::new(GuestMemoryMmap::from_ranges(&ranges).unwrap())
}

/// A buffer of a chain: address, length, whether the device writes it.
pub type Part = (u64, u32, bool);

/// The driver's side of one queue.
#[derive(Debug)]
pub struct DriverQueue {
    /// Where it lies.
    pub layout: QueueLayout,
    /// Its form.
    pub features: RingFeatures,
    memory: Memory,
    /// The doorbell.
    pub kick: Arc<EventFd>,
    /// Descriptors not in use, by number.
    free: Vec<u16>,
    /// Descriptors of each chain, by the chain's number.
    chains: Vec<Vec<u16>>,
    next: u16,
    wrap: bool,
    seen_used: u16,
    used_wrap: bool,
}

impl DriverQueue {
    /// A queue of `size` whose areas begin at `base`, in the first 64 KiB behind it.
    pub fn new(memory: &Memory, base: u64, size: u16, features: RingFeatures) -> Self {
        let layout = QueueLayout { size, descriptors: base, driver: base + 0x4000, device: base + 0x6000 };
        Self {
            layout,
            features,
            memory: memory.clone(),
            kick: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
            free: (0..size).rev().collect(),
            chains: vec![Vec::new(); usize::from(size)],
            next: 0,
            wrap: true,
            seen_used: 0,
            used_wrap: true,
        }
    }

    fn view(&self) -> super::MemoryView {
        use vm_memory::GuestAddressSpace;
        self.memory.memory()
    }

    /// The device's side, as number `index`.
    ///
    /// # Errors
    /// The ring cannot be there.
    pub fn device_side(&self, index: u16, interrupt: Arc<dyn Interrupt>) -> Result<ActiveQueue, RingError> {
        let ring = Ring::new(&self.layout, self.features, RingPosition::START, &self.view())?;
        Ok(ActiveQueue::new(
            index,
            ring,
            self.layout,
            self.memory.clone(),
            Arc::clone(&self.kick),
            interrupt,
            SharedPosition::new(RingPosition::START),
        ))
    }

    /// Makes a chain available, without ringing the doorbell; its number. Panics if there are not enough free descriptors.
    pub fn add(&mut self, parts: &[Part]) -> u16 {
        assert!(!parts.is_empty() && parts.len() <= self.free.len(), "no descriptors left");
        let taken = self.free.split_off(self.free.len() - parts.len());
        let id =
            if self.features.packed { self.add_packed(parts, &taken) } else { self.add_split(parts, &taken) };
        self.chains[usize::from(id)] = taken;
        id
    }

    fn descriptor(&self, place: u16) -> GuestAddress {
        GuestAddress(self.layout.descriptors + u64::from(place) * 16)
    }

    fn write_descriptor(&self, place: u16, (address, len, _): Part, last: [u16; 2]) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&last[0].to_le_bytes());
        bytes[14..].copy_from_slice(&last[1].to_le_bytes());
        self.view().write_slice(&bytes, self.descriptor(place)).unwrap();
    }

    fn add_split(&mut self, parts: &[Part], taken: &[u16]) -> u16 {
        for (at, part) in parts.iter().enumerate() {
            let next = taken.get(at + 1);
            let flags = if part.2 { WRITE } else { 0 } | if next.is_some() { NEXT } else { 0 };
            self.write_descriptor(taken[at], *part, [flags, next.copied().unwrap_or(0)]);
        }
        let head = taken[0];
        self.make_available(head);
        head
    }

    /// Split: makes any number available as if it were a chain's head.
    pub fn make_available(&mut self, head: u16) {
        let place = u64::from(self.next % self.layout.size);
        let entry = GuestAddress(self.layout.driver + 4 + place * 2);
        self.view().write_obj(head.to_le(), entry).unwrap();
        self.next = self.next.wrapping_add(1);
        self.set_available_index(self.next);
    }

    /// Split: writes the available index.
    pub fn set_available_index(&mut self, index: u16) {
        let address = GuestAddress(self.layout.driver + 2);
        self.view().store(index.to_le(), address, Ordering::Release).unwrap();
    }

    fn add_packed(&mut self, parts: &[Part], taken: &[u16]) -> u16 {
        let id = taken[0];
        let first = self.next;
        let mut first_flags = 0;
        for (at, part) in parts.iter().enumerate() {
            let last = at + 1 == parts.len();
            let turn = if self.wrap { AVAIL } else { USED };
            let flags = turn | if part.2 { WRITE } else { 0 } | if last { 0 } else { NEXT };
            // The first one's flags come last, with all behind it in place.
            let shown = if at == 0 {
                (first_flags, _) = (flags, ());
                flags ^ (AVAIL | USED)
            } else {
                flags
            };
            self.write_descriptor(self.next, *part, [id, shown]);
            self.next += 1;
            if self.next == self.layout.size {
                (self.next, self.wrap) = (0, !self.wrap);
            }
        }
        let flags = GuestAddress(self.descriptor(first).0 + 14);
        self.view().store(first_flags.to_le(), flags, Ordering::Release).unwrap();
        id
    }

    /// Rings the doorbell.
    pub fn ring(&self) {
        self.kick.write(1).unwrap();
    }

    /// The next chain that has come back: its number and how much was written.
    pub fn used(&mut self) -> Option<(u16, u32)> {
        let (id, len) = if self.features.packed { self.used_packed()? } else { self.used_split()? };
        let freed = std::mem::take(&mut self.chains[usize::from(id)]);
        self.free.extend(freed);
        Some((id, len))
    }

    fn used_split(&mut self) -> Option<(u16, u32)> {
        let view = self.view();
        let index: u16 = view.load(GuestAddress(self.layout.device + 2), Ordering::Acquire).unwrap();
        if u16::from_le(index) == self.seen_used {
            return None;
        }
        let entry = self.layout.device + 4 + u64::from(self.seen_used % self.layout.size) * 8;
        let id: u32 = view.read_obj(GuestAddress(entry)).unwrap();
        let len: u32 = view.read_obj(GuestAddress(entry + 4)).unwrap();
        self.seen_used = self.seen_used.wrapping_add(1);
        Some((u16::try_from(u32::from_le(id)).unwrap(), u32::from_le(len)))
    }

    fn used_packed(&mut self) -> Option<(u16, u32)> {
        let view = self.view();
        let at = self.descriptor(self.seen_used).0;
        let flags: u16 = view.load(GuestAddress(at + 14), Ordering::Acquire).unwrap();
        let turn = if self.used_wrap { AVAIL | USED } else { 0 };
        if u16::from_le(flags) & (AVAIL | USED) != turn {
            return None;
        }
        let len: u32 = view.read_obj(GuestAddress(at + 8)).unwrap();
        let id: u16 = view.read_obj(GuestAddress(at + 12)).unwrap();
        let slots = u16::try_from(self.chains[usize::from(u16::from_le(id))].len()).unwrap();
        self.seen_used += slots;
        if self.seen_used >= self.layout.size {
            self.seen_used -= self.layout.size;
            self.used_wrap = !self.used_wrap;
        }
        Some((u16::from_le(id), u32::from_le(len)))
    }

    /// Waits for the next chain to come back, for some seconds at most.
    pub fn wait_used(&mut self) -> Option<(u16, u32)> {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            match self.used() {
                Some(used) => return Some(used),
                None if Instant::now() > deadline => return None,
                None => std::thread::sleep(Duration::from_micros(200)),
            }
        }
    }
}

/// An activation with these queues, numbered in their order.
///
/// # Panics
/// A ring cannot be there.
pub fn activation(
    memory: &Memory,
    features: u64,
    queues: &[DriverQueue],
    interrupts: &Arc<Interrupts>,
) -> Activation {
    let interrupt = Arc::clone(interrupts) as Arc<dyn Interrupt>;
    let queues =
        (0..).zip(queues).map(|(index, queue)| queue.device_side(index, Arc::clone(&interrupt)).unwrap());
    Activation { memory: memory.clone(), queues: queues.collect(), features, interrupt }
}

/// The forms of rings that tests go through.
pub fn forms() -> [RingFeatures; 4] {
    [(false, false), (false, true), (true, false), (true, true)].map(|(packed, event_idx)| RingFeatures {
        packed,
        event_idx,
        indirect: true,
    })
}
