//! Memory that is added while the guest runs: a memory device (`PNP0C80`; ACPI 6.5, section 9.11) for each slot of
//! [`memory_abi`](crate::memory_abi), of which most are absent, as `_STA` says.
//!
//! ```text
//! \_SB.MREG          the registers of all slots
//! \_SB.MEM0 to MEM7  the memory devices: _STA, _CRS, _PXM, _OST
//! ```

use acpi_tables::aml::{
    Add, AddressSpace, AddressSpaceCacheable, And, Arg, CreateQWordField, EISAName, Field, FieldAccessType,
    FieldEntry, FieldLockRule, FieldUpdateRule, If, Local, Method, Name, Notify, ONE, OpRegion,
    OpRegionSpace, Path, ResourceTemplate, Return, Store, Subtract, ZERO,
};

use crate::event_abi::NOTIFY_DEVICE_CHECK;
use crate::memory_abi::{BLOCK_SIZE, SLOT_COUNT};
use crate::ops::Terms;
use crate::pci_root::device;

/// Where the numbers of a 64-bit address space descriptor are, in bytes (ACPI 6.5, section 6.4.3.5.1).
mod descriptor {
    pub(super) const MINIMUM: u8 = 14;
    pub(super) const MAXIMUM: u8 = 22;
    pub(super) const LENGTH: u8 = 38;
}

/// The registers and the devices, to be put into the scope of `\_SB`.
pub(crate) fn memory_devices(terms: &mut Terms, registers: u64) {
    terms.push(&OpRegion::new("MREG".into(), OpRegionSpace::SystemMemory, &registers, &BLOCK_SIZE));
    let slots = (0..SLOT_COUNT).flat_map(|slot| {
        [
            FieldEntry::Named(name(*b"MBA", slot), 64),
            FieldEntry::Named(name(*b"MLN", slot), 64),
            FieldEntry::Named(name(*b"MST", slot), 32),
            FieldEntry::Named(name(*b"MPX", slot), 32),
            FieldEntry::Named(name(*b"MOS", slot), 32),
            FieldEntry::Reserved(32),
        ]
    });
    let fields = slots.chain([FieldEntry::Named(*b"MCHG", 32)]).collect();
    terms.push(&Field::new(
        "MREG".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        fields,
    ));
    for slot in 0..SLOT_COUNT {
        memory_device(terms, slot);
    }
}

fn memory_device(terms: &mut Terms, slot: u8) {
    let register = |prefix: [u8; 3]| Path::new(&format!("\\_SB_.{}", text(name(prefix, slot))));
    let mut children = Terms::new();
    children.push(&Name::new("_HID".into(), &EISAName::new("PNP0C80")));
    children.push(&Name::new("_UID".into(), &slot));
    children.push(&Method::new("_STA".into(), 0, false, vec![&Return::new(&register(*b"MST"))]));
    children.push(&Method::new("_PXM".into(), 0, false, vec![&Return::new(&register(*b"MPX"))]));
    let answer = register(*b"MOS");
    children.push(&Method::new("_OST".into(), 3, true, vec![&Store::new(&answer, &Arg(1))]));
    resources(&mut children, &register(*b"MBA"), &register(*b"MLN"));
    device(terms, &text(name(*b"MEM", slot)), &children);
}

/// `_CRS`: one range of memory space, as the registers say. The last address is computed from an address that cannot be 0.
fn resources(terms: &mut Terms, base: &Path, length: &Path) {
    let empty = AddressSpace::new_memory(AddressSpaceCacheable::Cacheable, true, 0_u64, 1_u64, None);
    terms.push(&Method::new(
        "_CRS".into(),
        0,
        true,
        vec![
            &Name::new("BUFF".into(), &ResourceTemplate::new(vec![&empty])),
            &CreateQWordField::new(&Path::new("FRST"), &Path::new("BUFF"), &descriptor::MINIMUM),
            &CreateQWordField::new(&Path::new("LAST"), &Path::new("BUFF"), &descriptor::MAXIMUM),
            &CreateQWordField::new(&Path::new("SIZE"), &Path::new("BUFF"), &descriptor::LENGTH),
            &Store::new(&Path::new("FRST"), base),
            &Store::new(&Path::new("SIZE"), length),
            &Add::new(&Local(0), base, length),
            &Subtract::new(&Path::new("LAST"), &Local(0), &ONE),
            &Return::new(&Path::new("BUFF")),
        ],
    ));
}

/// For `_EVT`: reads CHANGED once and notifies the devices that have been filled.
pub(crate) fn notifications() -> Terms {
    let mut terms = Terms::new();
    terms.push(&Store::new(&Local(1), &Path::new("\\_SB_.MCHG")));
    for slot in 0..SLOT_COUNT {
        let mask = 1_u32.checked_shl(slot.into()).unwrap_or(0);
        let path = Path::new(&format!("\\_SB_.{}", text(name(*b"MEM", slot))));
        terms.push(&If::new(
            &And::new(&ZERO, &Local(1), &mask),
            vec![&Notify::new(&path, &NOTIFY_DEVICE_CHECK)],
        ));
    }
    terms
}

/// Three letters and the slot's digit.
fn name([a, b, c]: [u8; 3], slot: u8) -> [u8; 4] {
    [a, b, c, b'0'.saturating_add(slot)]
}

fn text(name: [u8; 4]) -> String {
    name.map(char::from).iter().collect()
}
