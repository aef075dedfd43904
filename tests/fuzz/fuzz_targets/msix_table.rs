//! MSI-X and MSI under random accesses, against a second model that only knows the specification (PCI Local Bus 3.0,
//! sections 6.8.1 and 6.8.2): what is masked is not armed, what is armed carries the message that the guest wrote, pending
//! bits are those of interrupts held back, each held-back interrupt arrives once, and vectors never outnumber the table.

#![no_main]

use std::os::fd::AsRawFd;
use std::sync::Arc;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use pci::cap::msi::{MsiCapability, MsiLayout, MsiVectors};
use pci::cap::msix::{MsixCapability, MsixLayout, MsixVectors};
use pci::cap::vectors::VectorSet;
use pci::cap::vectors::fake::FakeAllocator;
use pci::interrupt::{MsiMessage, MsiVector};

/// Few vectors, so that steps meet and all of them can be looked at after each.
const FEW_VECTORS: u16 = 6;
/// That many more make the pending bit array two words long.
const MORE_VECTORS: u16 = 64;

#[derive(Arbitrary, Debug)]
enum Input {
    Msix {
        vectors: u16,
        #[arbitrary(with = fuzz::steps::<Step, 200>)]
        steps: Vec<Step>,
    },
    Msi {
        exponent: u8,
        address_64: bool,
        per_vector_mask: bool,
        #[arbitrary(with = fuzz::steps::<Step, 200>)]
        steps: Vec<Step>,
    },
}

#[derive(Arbitrary, Debug)]
enum Step {
    /// To the capability, at any offset.
    Control {
        offset: u8,
        width: Width,
        value: u64,
    },
    /// To the capability's control register alone.
    Flags {
        value: u8,
    },
    ReadControl {
        offset: u8,
        width: Width,
    },
    Table {
        offset: u16,
        width: Width,
        value: u64,
    },
    /// To an entry that exists: the field that counts most.
    Mask {
        vector: u16,
        masked: bool,
    },
    ReadTable {
        offset: u16,
        width: Width,
    },
    /// Far out, where offsets overflow.
    Wild {
        offset: u64,
        width: Width,
    },
    ReadPending {
        offset: u16,
        width: Width,
    },
    Signal {
        vector: u16,
    },
    Reserve,
    Fail {
        failing: bool,
    },
    /// Seldom: it undoes all before it.
    Reset {
        sure: u8,
    },
}

/// Bytes of an access: what a CPU can do, and what it cannot.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Width {
    Natural(u8),
    Odd(u8),
}

impl Width {
    fn bytes(self) -> usize {
        match self {
            Self::Natural(power) => 1 << (power % 4),
            Self::Odd(bytes) => usize::from(bytes % 17),
        }
    }

    /// An access of `len` bytes at `offset` that a register serves.
    fn is_natural(offset: u64, len: usize) -> bool {
        matches!(len, 1 | 2 | 4 | 8) && offset.is_multiple_of(len as u64)
    }

    fn data(self, value: u64) -> Vec<u8> {
        value.to_le_bytes().into_iter().cycle().take(self.bytes()).collect()
    }
}

/// The enable bit of either capability, more often set than not: little happens without it.
fn mostly_enabled(flags: u8) -> u8 {
    if flags & 6 == 0 { flags } else { flags | 0x81 }
}

/// The interrupts of one capability as a guest and its device see them.
struct Interrupts {
    allocator: Arc<FakeAllocator>,
    /// Signalled and not delivered.
    held: Vec<bool>,
    /// An allocation may have failed since the capability was enabled: then vectors may be missing.
    failed: bool,
}

impl Interrupts {
    fn new(vectors: usize) -> Self {
        Self { allocator: FakeAllocator::new(), held: vec![false; vectors], failed: false }
    }

    fn signal(&mut self, enabled: bool, vector: usize) {
        if enabled && let Some(held) = self.held.get_mut(vector) {
            *held = true;
        }
    }

    /// Compares everything that exists with what the guest has written.
    fn check(&mut self, enabled: bool, set: &VectorSet, message: impl Fn(u16) -> Option<MsiMessage>) {
        if !enabled {
            self.held.fill(false);
            self.failed = false;
        }
        let live = self.allocator.vectors();
        assert_eq!(live.len(), set.iter().count(), "vectors that nobody gave back");
        assert!(live.len() <= self.held.len(), "more vectors than the table has");
        assert!(enabled || live.is_empty(), "vectors of a capability that is disabled");
        for (vector, held) in (0..).zip(&mut self.held) {
            let expected = message(vector);
            let Some(made) = set.get(vector) else {
                assert!(expected.is_none() || self.failed, "vector {vector} is unmasked and not there");
                assert_eq!(set.is_waiting(vector), *held, "vector {vector}");
                continue;
            };
            let descriptor = made.eventfd().as_raw_fd();
            let fake = live.iter().find(|fake| fake.eventfd().as_raw_fd() == descriptor);
            let Some(fake) = fake else { panic!("vector {vector} is not of the allocator") };
            assert_eq!(fake.message(), expected, "vector {vector} is not armed as the guest wrote");
            if expected.is_some() {
                // As the kernel does with what is armed: the signal is taken and becomes the message.
                assert_eq!(fake.signals() > 0, std::mem::take(held), "vector {vector}");
            }
        }
    }
}

/// MSI-X as section 6.8.2 has it, in bytes.
struct MsixModel {
    table: Vec<[u8; 16]>,
    enabled: bool,
    masked: bool,
}

impl MsixModel {
    fn new(vectors: usize) -> Self {
        let mut entry = [0; 16];
        entry[12] = 1;
        Self { table: vec![entry; vectors], enabled: false, masked: false }
    }

    fn message(&self, vector: u16) -> Option<MsiMessage> {
        let entry = self.table.get(usize::from(vector))?;
        let [address @ .., d0, d1, d2, d3, control, _, _, _] = *entry;
        (self.enabled && !self.masked && control & 1 == 0).then(|| MsiMessage {
            address: u64::from_le_bytes(address),
            data: u32::from_le_bytes([d0, d1, d2, d3]),
        })
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if !Width::is_natural(offset, data.len()) {
            return;
        }
        let Some(entry) = usize::try_from(offset / 16).ok().and_then(|index| self.table.get_mut(index))
        else {
            return;
        };
        for (at, byte) in ((offset % 16) as usize..).zip(data) {
            entry[at] = match at {
                0 => byte & 0xfc,
                1..12 => *byte,
                12 => byte & 1,
                _ => 0,
            };
        }
    }

    fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let entry = usize::try_from(offset / 16).ok().and_then(|index| self.table.get(index));
        match entry.filter(|_| Width::is_natural(offset, len)) {
            Some(entry) => entry[(offset % 16) as usize..][..len].to_vec(),
            None => vec![0xff; len],
        }
    }

    fn pending(&self, held: &[bool], offset: u64, len: usize) -> Vec<u8> {
        let words = held.len().div_ceil(64);
        if !Width::is_natural(offset, len) || offset / 8 >= words as u64 {
            return vec![0xff; len];
        }
        let bit = |vector: usize| {
            let waits = held.get(vector).copied().unwrap_or(false);
            self.enabled && waits && self.message(vector as u16).is_none()
        };
        let byte = |at: usize| (0..8).fold(0, |byte, n| byte | u8::from(bit(at * 8 + n)) << n);
        (offset as usize..offset as usize + len).map(byte).collect()
    }
}

fn msix(vectors: u16, steps: &[Step]) {
    let vectors = vectors % FEW_VECTORS + 1 + if vectors >> 12 == 1 { MORE_VECTORS } else { 0 };
    let layout = MsixLayout { vectors, table_bar: 1, table_offset: 0x2000, pba_bar: 1, pba_offset: 0x4000 };
    let Ok(capability) = MsixCapability::new(layout) else { panic!("{layout:?} is possible") };
    let mut interrupts = Interrupts::new(usize::from(vectors));
    let mut model = MsixModel::new(usize::from(vectors));
    let mut real = MsixVectors::new(capability, Arc::clone(&interrupts.allocator) as _);
    let identity = |real: &MsixVectors| {
        let mut bytes = [0; 12];
        real.read(0, &mut bytes);
        bytes[3] &= !0xc0;
        bytes
    };
    let unchanging = identity(&real);
    let mut failing = false;
    for step in steps {
        match *step {
            Step::Control { offset, width, value } => {
                let data = width.data(value);
                let flags = 3usize.checked_sub(offset.into()).and_then(|at| data.get(at));
                if let Some(flags) = flags {
                    (model.enabled, model.masked) = (flags & 0x80 != 0, flags & 0x40 != 0);
                }
                let _ = real.write(offset.into(), &data);
            }
            Step::Flags { value } => {
                let value = mostly_enabled(value);
                (model.enabled, model.masked) = (value & 0x80 != 0, value & 0x40 != 0);
                let _ = real.write(3, &[value]);
            }
            Step::ReadControl { offset, width } => {
                let mut data = vec![0; width.bytes()];
                real.read(offset.into(), &mut data);
                let flags = u8::from(model.enabled) << 7 | u8::from(model.masked) << 6;
                if let Some(read) = 3usize.checked_sub(offset.into()).and_then(|at| data.get(at)) {
                    assert_eq!(read & 0xc0, flags);
                }
            }
            Step::Table { offset, width, value } => {
                let (offset, data) = (u64::from(offset) % (u64::from(vectors) * 16 + 32), width.data(value));
                model.write(offset, &data);
                let _ = real.table_write(offset, &data);
            }
            Step::Mask { vector, masked } => {
                // As a driver does: an address, then the mask bit.
                let entry = u64::from(vector % vectors) * 16;
                let address = 0xfee0_0000u32.to_le_bytes();
                model.write(entry, &address);
                let _ = real.table_write(entry, &address);
                let (offset, data) = (entry + 12, u32::from(masked).to_le_bytes());
                model.write(offset, &data);
                let _ = real.table_write(offset, &data);
            }
            Step::ReadTable { offset, width } => {
                let (offset, len) = (u64::from(offset) % (u64::from(vectors) * 16 + 32), width.bytes());
                let mut data = vec![0x55; len];
                real.table_read(offset, &mut data);
                assert_eq!(data, model.read(offset, len), "table at {offset:#x}");
            }
            Step::Wild { offset, width } => {
                let mut data = width.data(!offset);
                model.write(offset, &data);
                let _ = real.table_write(offset, &data);
                real.table_read(offset, &mut data);
                assert_eq!(data, model.read(offset, data.len()), "table at {offset:#x}");
                real.pba_read(offset, &mut data);
                assert_eq!(data, model.pending(&interrupts.held, offset, data.len()), "{offset:#x}");
            }
            Step::ReadPending { offset, width } => {
                let (offset, len) = (u64::from(offset % 32), width.bytes());
                let mut data = vec![0x55; len];
                real.pba_read(offset, &mut data);
                assert_eq!(data, model.pending(&interrupts.held, offset, len), "pending bits at {offset:#x}");
            }
            Step::Signal { vector } => {
                // One that does not exist as well.
                let vector = vector % (vectors + 1);
                interrupts.signal(model.enabled, vector.into());
                real.signal(vector);
            }
            // As a function does when it tells its device of the vectors.
            Step::Reserve if model.enabled => {
                assert!(real.reserve_programmed() <= vectors);
            }
            Step::Reserve => {}
            Step::Fail { failing: now } => {
                failing = now;
                interrupts.allocator.fail(now);
            }
            Step::Reset { sure } if sure >= 32 => {}
            Step::Reset { .. } => {
                model = MsixModel::new(vectors.into());
                let _ = real.reset();
            }
        }
        interrupts.failed |= failing;
        interrupts.check(model.enabled, real.vectors(), |vector| model.message(vector));
        for vector in 0..=vectors {
            assert_eq!(real.capability().message(vector), model.message(vector), "vector {vector}");
        }
        assert_eq!(identity(&real), unchanging, "layout and table size are read-only");
        for offset in (0..u64::from(vectors) * 16).step_by(8) {
            let mut data = [0; 8];
            real.table_read(offset, &mut data);
            assert_eq!(data[..], model.read(offset, 8), "table at {offset:#x}");
        }
        let may_pend = matches!(step, Step::Signal { .. } | Step::Mask { .. } | Step::Flags { .. });
        for offset in (0..layout.pba().end - layout.pba().start).step_by(8).filter(|_| may_pend) {
            let mut data = [0; 8];
            real.pba_read(offset, &mut data);
            let expected = model.pending(&interrupts.held, offset, 8);
            assert_eq!(data[..], expected, "pending bits at {offset:#x}");
        }
    }
}

/// MSI as section 6.8.1 has it, in bytes.
struct MsiModel {
    layout: MsiLayout,
    bytes: [u8; 24],
}

impl MsiModel {
    fn new(layout: MsiLayout) -> Self {
        let mut bytes = [0; 24];
        bytes[2] = (layout.vectors.trailing_zeros() as u8) << 1 | u8::from(layout.address_64) << 7;
        bytes[3] = u8::from(layout.per_vector_mask);
        Self { layout, bytes }
    }

    fn data_at(&self) -> usize {
        if self.layout.address_64 { 12 } else { 8 }
    }

    fn enabled(&self) -> bool {
        self.bytes[2] & 1 != 0
    }

    fn allowed(&self) -> u16 {
        (1u16 << (self.bytes[2] >> 4 & 7)).min(self.layout.vectors.into())
    }

    fn write(&mut self, offset: usize, data: &[u8]) {
        let data_at = self.data_at();
        let vectors = ((1u64 << self.layout.vectors) - 1) as u32;
        for (at, byte) in (offset..).zip(data) {
            let writable = match at {
                2 => 0x71,
                4 => 0xfc,
                5..8 => 0xff,
                8..12 if self.layout.address_64 => 0xff,
                _ if at == data_at || at == data_at + 1 => 0xff,
                _ if self.layout.per_vector_mask && (data_at + 4..data_at + 8).contains(&at) => {
                    vectors.to_le_bytes()[at - data_at - 4]
                }
                _ => 0,
            };
            if let Some(own) = self.bytes.get_mut(at) {
                *own = *own & !writable | byte & writable;
            }
        }
    }

    fn message(&self, vector: u16) -> Option<MsiMessage> {
        let b = &self.bytes;
        let at = self.data_at();
        let masked = self.layout.per_vector_mask
            && vector < 32
            && b[at + 4 + usize::from(vector / 8)] >> (vector % 8) & 1 != 0;
        if !self.enabled() || masked || vector >= self.allowed() {
            return None;
        }
        let mut address = [b[4], b[5], b[6], b[7], 0, 0, 0, 0];
        if self.layout.address_64 {
            address[4..].copy_from_slice(&b[8..12]);
        }
        let data = u16::from_le_bytes([b[at], b[at + 1]]) / self.allowed() * self.allowed() + vector;
        Some(MsiMessage { address: u64::from_le_bytes(address), data: data.into() })
    }
}

fn msi(layout: MsiLayout, steps: &[Step]) {
    let Ok(capability) = MsiCapability::new(layout) else { panic!("{layout:?} is possible") };
    let mut interrupts = Interrupts::new(layout.vectors.into());
    let mut model = MsiModel::new(layout);
    let mut real = MsiVectors::new(capability, Arc::clone(&interrupts.allocator) as _);
    let mut failing = false;
    for step in steps {
        match *step {
            Step::Control { width, value, .. } | Step::Table { width, value, .. } => {
                let (offset, data) = (offset_of(step), width.data(value));
                model.write(offset.into(), &data);
                let _ = real.write(offset, &data);
            }
            Step::Flags { value } => {
                let value = mostly_enabled(value);
                model.write(2, &[value]);
                let _ = real.write(2, &[value]);
            }
            Step::Mask { vector, masked } => {
                let at = model.data_at() + 4 + usize::from(vector % 32 / 8);
                let bit = u8::from(masked) << (vector % 8);
                model.write(at, &[bit]);
                let _ = real.write(at as u16, &[bit]);
            }
            Step::Signal { vector } => {
                interrupts.signal(model.enabled(), vector.min(model.allowed() - 1).into());
                real.signal(vector);
            }
            Step::Reserve => {
                assert!(real.reserve_enabled() <= layout.vectors.into());
            }
            Step::Fail { failing: now } => {
                failing = now;
                interrupts.allocator.fail(now);
            }
            Step::Reset { sure } if sure >= 32 => {}
            Step::Reset { .. } => {
                model = MsiModel::new(layout);
                let _ = real.reset();
            }
            // Every read asks the eventfds, which takes its time: bytes one by one only now and then.
            Step::ReadControl { .. } => {
                let mut whole = [0x55; 32];
                real.read(0, &mut whole);
                for at in 0..32 {
                    let mut one = [0x55];
                    real.read(at, &mut one);
                    assert_eq!(one[0], whole[usize::from(at)], "byte {at} by itself");
                }
            }
            // Read after each step.
            Step::ReadTable { .. } | Step::ReadPending { .. } | Step::Wild { .. } => {}
        }
        interrupts.failed |= failing;
        interrupts.check(model.enabled(), real.vectors(), |vector| model.message(vector));
        for vector in 0..u16::from(layout.vectors) + 1 {
            assert_eq!(real.capability().message(vector), model.message(vector), "vector {vector}");
        }
        read_msi(&mut real, &model, &interrupts.held);
    }
}

fn offset_of(step: &Step) -> u16 {
    match step {
        Step::Control { offset, .. } => (*offset).into(),
        Step::Table { offset, .. } => offset % 32,
        _ => 0,
    }
}

fn read_msi(real: &mut MsiVectors, model: &MsiModel, held: &[bool]) {
    let len = usize::from(model.layout.capability_len());
    let mut expected = [0x55; 32];
    expected[2..len].copy_from_slice(&model.bytes[2..len]);
    if model.layout.per_vector_mask {
        let waits =
            |vector: u16| model.enabled() && held[usize::from(vector)] && model.message(vector).is_none();
        let bits = (0..u16::from(model.layout.vectors)).fold(0u32, |bits, n| bits | u32::from(waits(n)) << n);
        expected[len - 4..len].copy_from_slice(&bits.to_le_bytes());
    }
    let mut whole = [0x55; 32];
    real.read(0, &mut whole);
    assert_eq!(whole, expected, "{:?}", model.layout);
}

fuzz_target!(|input: Input| {
    match input {
        Input::Msix { vectors, steps } => msix(vectors, &steps),
        Input::Msi { exponent, address_64, per_vector_mask, steps } => {
            let layout = MsiLayout { vectors: 1 << (exponent % 6), address_64, per_vector_mask };
            msi(layout, &steps);
        }
    }
});
