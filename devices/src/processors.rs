//! The trap half of the registers through which processors come and go (ACPI 6.5, section 8.4).
//!
//! The registers are [`acpi::processor_abi`]'s, which the AML is generated from too. A processor comes in one step: its bit is in
//! PRESENT, and the guest is told. It goes in two: the guest is asked, and once it has ejected the processor its bit is gone; only then
//! does the VMM stop it. What the guest ejects without being asked stays.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::{fmt, mem};

use acpi::event_abi::{Event, NOTIFY_EJECT_REQUEST, OST_SUCCESS};
use acpi::processor_abi::{OST_EJECTION_IN_PROGRESS, Register, WORD_COUNT, decode, position, status};
use serde::{Deserialize, Serialize};
use vm_device::DeviceMmio;
use vm_device::bus::{MmioAddress, MmioAddressOffset};

use crate::event_device::EventDevice;

/// Hears that the guest has said something of a processor that is to go, which [`ProcessorDevice::take_answers`] has. Called from vCPU
/// threads, as often as the guest likes: it must not block.
pub trait ProcessorSink: Send + Sync {
    /// There is something to look at.
    fn processors_answered(&self);
}

/// A set of processors, one bit each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Set([u32; WORD_COUNT]);

impl Set {
    fn contains(&self, processor: u8) -> bool {
        let (word, mask) = position(processor);
        self.word(word) & mask != 0
    }

    fn insert(&mut self, processor: u8) {
        let (word, mask) = position(processor);
        if let Some(bits) = self.0.get_mut(word) {
            *bits |= mask;
        }
    }

    fn remove(&mut self, processor: u8) -> bool {
        let (word, mask) = position(processor);
        let there = self.contains(processor);
        if let Some(bits) = self.0.get_mut(word) {
            *bits &= !mask;
        }
        there
    }

    fn word(&self, word: usize) -> u32 {
        self.0.get(word).copied().unwrap_or(0)
    }

    fn take_word(&mut self, word: usize) -> u32 {
        self.0.get_mut(word).map_or(0, mem::take)
    }

    fn numbers(&self) -> Vec<u8> {
        (0..=u8::MAX).filter(|processor| self.contains(*processor)).collect()
    }
}

/// The registers' content, which is also what is saved of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessorState {
    present: Set,
    /// Told to the guest when it next reads.
    added: Set,
    leaving: Set,
    /// The guest has been asked to let go of them, and has not said yes or no.
    asked: Set,
    ejected: Set,
    /// The last one that the guest does not let go of, with the status that it gives.
    refused: Option<(u8, u8)>,
}

/// What the guest has said of processors that are to go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answers {
    /// It has let go of these.
    pub ejected: Vec<u8>,
    /// It does not let go of this one, and gives this status (of `_OST`).
    pub refused: Option<(u8, u8)>,
}

/// The registers on the MMIO bus.
pub struct ProcessorDevice {
    /// A leaf: nothing is called under it.
    state: Mutex<ProcessorState>,
    event_device: Arc<EventDevice>,
    sink: Arc<dyn ProcessorSink>,
}

impl fmt::Debug for ProcessorDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProcessorDevice").field("state", &self.state).finish_non_exhaustive()
    }
}

impl ProcessorState {
    /// The processors that there are, in ascending order.
    pub fn present(&self) -> Vec<u8> {
        self.present.numbers()
    }
}

impl ProcessorDevice {
    /// A machine whose processors from 0 up to, not including, `present` are there.
    pub fn new(present: u8, event_device: Arc<EventDevice>, sink: Arc<dyn ProcessorSink>) -> Self {
        let mut state = ProcessorState::default();
        (0..present).for_each(|processor| state.present.insert(processor));
        Self { state: Mutex::new(state), event_device, sink }
    }

    fn state(&self) -> MutexGuard<'_, ProcessorState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What must go on elsewhere as it is here.
    pub fn save(&self) -> ProcessorState {
        self.state().clone()
    }

    /// Goes on as saved.
    pub fn restore(&self, saved: &ProcessorState) {
        *self.state() = saved.clone();
    }

    /// The processors that there are, in ascending order.
    pub fn present(&self) -> Vec<u8> {
        self.state().present.numbers()
    }

    /// The processors that the guest has been asked to let go of and has not answered for.
    pub fn asked(&self) -> Vec<u8> {
        self.state().asked.numbers()
    }

    /// Tells the guest that there are these processors now.
    pub fn add(&self, processors: &[u8]) {
        let mut state = self.state();
        for processor in processors {
            state.present.insert(*processor);
            state.added.insert(*processor);
            state.leaving.remove(*processor);
        }
        drop(state);
        self.event_device.raise(Event::Processors);
    }

    /// Asks the guest to let go of these processors; asks again if it was asked before.
    pub fn request_removal(&self, processors: &[u8]) {
        let mut state = self.state();
        for processor in processors.iter().copied() {
            if state.present.contains(processor) {
                state.asked.insert(processor);
                state.leaving.insert(processor);
            }
        }
        drop(state);
        self.event_device.raise(Event::Processors);
    }

    /// What the guest has said since the last look.
    pub fn take_answers(&self) -> Answers {
        let mut state = self.state();
        Answers { ejected: mem::take(&mut state.ejected).numbers(), refused: state.refused.take() }
    }

    /// Whether the guest's word changes anything.
    fn answer(&self, register: Register, value: u32) -> bool {
        let mut state = self.state();
        match register {
            Register::Eject => {
                let Ok(processor) = u8::try_from(value) else { return false };
                let goes = state.asked.remove(processor);
                if goes {
                    state.present.remove(processor);
                    state.leaving.remove(processor);
                    state.ejected.insert(processor);
                }
                goes
            }
            Register::Status => {
                let (processor, event, status) = status(value);
                let ends = !matches!(status, OST_SUCCESS | OST_EJECTION_IN_PROGRESS);
                let refused = event == NOTIFY_EJECT_REQUEST && ends && state.asked.remove(processor);
                if refused {
                    state.leaving.remove(processor);
                    state.refused = Some((processor, status));
                }
                refused
            }
            Register::Present(_) | Register::Added(_) | Register::Leaving(_) => false,
        }
    }
}

impl DeviceMmio for ProcessorDevice {
    fn mmio_read(&self, _base: MmioAddress, offset: MmioAddressOffset, data: &mut [u8]) {
        let Some(register) = decode(offset, data.len()) else { return data.fill(0xff) };
        let mut state = self.state();
        let value = match register {
            Register::Present(word) => state.present.word(word),
            Register::Added(word) => state.added.take_word(word),
            Register::Leaving(word) => state.leaving.take_word(word),
            Register::Eject | Register::Status => 0,
        };
        data.copy_from_slice(&value.to_le_bytes());
    }

    fn mmio_write(&self, _base: MmioAddress, offset: MmioAddressOffset, data: &[u8]) {
        let (Some(register), &[a, b, c, d]) = (decode(offset, data.len()), data) else { return };
        if self.answer(register, u32::from_le_bytes([a, b, c, d])) {
            self.sink.processors_answered();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use acpi::event_abi::EVENT_PROCESSORS;
    use acpi::processor_abi::{
        ADDED_OFFSET, BLOCK_SIZE, EJECT_OFFSET, LEAVING_OFFSET, PRESENT_OFFSET, STATUS_OFFSET,
    };
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;
    use crate::event_device::ReleaseSink;

    const BASE: MmioAddress = MmioAddress(0xfed5_0000);

    #[derive(Default)]
    struct Sink(AtomicUsize);

    impl ProcessorSink for Sink {
        fn processors_answered(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    impl ReleaseSink for Sink {
        fn released(&self, _place: acpi::event_abi::PlaceAddress, _result: Result<(), u8>) {}
    }

    fn device(present: u8) -> (ProcessorDevice, Arc<Sink>, EventFd) {
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        let sink = Arc::new(Sink::default());
        let events = EventDevice::new(interrupt.try_clone().unwrap(), Arc::clone(&sink) as _);
        (ProcessorDevice::new(present, Arc::new(events), Arc::clone(&sink) as _), sink, interrupt)
    }

    fn read(device: &ProcessorDevice, offset: u64) -> u32 {
        let mut data = [0; 4];
        device.mmio_read(BASE, offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(device: &ProcessorDevice, offset: u64, value: u32) {
        device.mmio_write(BASE, offset, &value.to_le_bytes());
    }

    #[test]
    fn a_processor_comes_at_once_and_the_guest_is_told_once() {
        let (device, _sink, interrupt) = device(1);
        assert_eq!((read(&device, PRESENT_OFFSET), read(&device, ADDED_OFFSET)), (1, 0));
        device.add(&[1, 33]);
        assert_eq!(interrupt.read().unwrap(), 1);
        let mut events = [0; 4];
        device.event_device.mmio_read(BASE, 0, &mut events);
        assert_eq!(u32::from_le_bytes(events), EVENT_PROCESSORS);
        assert_eq!((read(&device, PRESENT_OFFSET), read(&device, PRESENT_OFFSET + 4)), (3, 2));
        assert_eq!((read(&device, ADDED_OFFSET), read(&device, ADDED_OFFSET + 4)), (2, 2));
        assert_eq!((read(&device, ADDED_OFFSET), read(&device, ADDED_OFFSET + 4)), (0, 0));
        assert_eq!(device.present(), [0, 1, 33]);
    }

    #[test]
    fn a_processor_goes_when_the_guest_has_ejected_it_and_not_before() {
        let (device, sink, _interrupt) = device(3);
        device.request_removal(&[2]);
        assert_eq!((read(&device, LEAVING_OFFSET), read(&device, LEAVING_OFFSET)), (4, 0));
        assert_eq!((read(&device, PRESENT_OFFSET), device.asked()), (7, vec![2]));
        // "In progress" is no answer.
        write(&device, STATUS_OFFSET, 0x84_0302);
        assert_eq!(device.asked(), [2]);
        write(&device, EJECT_OFFSET, 2);
        assert_eq!((read(&device, PRESENT_OFFSET), device.asked()), (3, vec![]));
        assert_eq!(sink.0.load(Ordering::SeqCst), 1);
        assert_eq!(device.take_answers(), Answers { ejected: vec![2], refused: None });
        assert_eq!(device.take_answers(), Answers::default());
        // What Linux says afterwards.
        write(&device, STATUS_OFFSET, 0x0302);
        assert_eq!(device.take_answers(), Answers::default());
    }

    #[test]
    fn a_guest_that_does_not_let_go_keeps_its_processor() {
        let (device, _sink, _interrupt) = device(3);
        device.request_removal(&[2]);
        write(&device, STATUS_OFFSET, 0x82_0302);
        assert_eq!((device.present(), device.asked()), (vec![0, 1, 2], vec![]));
        assert_eq!(device.take_answers().refused, Some((2, 0x82)));
        write(&device, EJECT_OFFSET, 2);
        assert_eq!(device.present(), [0, 1, 2]);
    }

    #[test]
    fn what_the_guest_ejects_without_being_asked_stays() {
        let (device, sink, _interrupt) = device(2);
        for value in [0, 1, 2, 255, 256, u32::MAX] {
            write(&device, EJECT_OFFSET, value);
            write(&device, STATUS_OFFSET, 0x82_0300 | value);
        }
        device.request_removal(&[9]);
        write(&device, EJECT_OFFSET, 9);
        assert_eq!((device.present(), device.take_answers()), (vec![0, 1], Answers::default()));
        assert_eq!(sink.0.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn odd_accesses_read_all_ones_and_change_nothing() {
        let (device, _sink, _interrupt) = device(2);
        device.add(&[2]);
        for (offset, size) in [(0x20, 1), (0x20, 2), (0x20, 8), (0x21, 4), (BLOCK_SIZE, 4), (u64::MAX, 4)] {
            let mut data = vec![0; size];
            device.mmio_read(BASE, offset, &mut data);
            assert_eq!(data, vec![0xff; size], "{offset:#x}");
            device.mmio_write(BASE, offset, &data);
        }
        assert_eq!((read(&device, ADDED_OFFSET), device.present()), (4, vec![0, 1, 2]));
    }

    #[test]
    fn whatever_the_guest_writes_only_what_it_was_asked_for_can_go() {
        let (device, _sink, _interrupt) = device(8);
        let mut random = 0x2021_u64;
        let mut next = || {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            random >> 33
        };
        device.request_removal(&[6, 7]);
        for _ in 0..100_000 {
            let (offset, value) = (next() % 0x70, next().to_le_bytes());
            let size = [1, 2, 4, 4, 4, 8][usize::try_from(next() % 6).unwrap()];
            let value = if next() % 2 == 0 { [value[0] % 16, 0, 0, 0, 0, 0, 0, 0] } else { value };
            device.mmio_write(BASE, offset, &value[..size]);
            device.mmio_read(BASE, offset, &mut [0; 8][..size]);
        }
        assert!(device.asked().is_empty());
        let present = device.present();
        assert!(present.len() >= 6 && present[..6] == [0, 1, 2, 3, 4, 5], "{present:?}");
    }
}
