//! Processor devices (ACPI 6.5, section 8.4), and how they come and go.
//!
//! ```text
//! \_SB.Cnnn   a processor: _UID; where processors come and go also _STA, _MAT, _EJ0, _OST
//! \_SB.PREG   the registers (crate::processor_abi), as fields PPRw, PADw, PLVw, PEJT, PSTS
//! \_SB.PSCN   reads what has changed and notifies the processors named; called by the event device
//! \_SB.PRPT   where `_OST` reports
//! ```
//!
//! The first processor has no `_EJ0`: it cannot go.

use acpi_tables::aml::{
    And, Arg, BufferData, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If, Local,
    Method, MethodCall, Name, Notify, OpRegion, OpRegionSpace, Or, Path, Return, ShiftLeft, Store, ZERO,
};
use acpi_tables::{Aml, AmlSink};

use crate::event_abi::{EVENT_PROCESSORS, NOTIFY_DEVICE_CHECK, NOTIFY_EJECT_REQUEST};
use crate::fixed;
use crate::ops::Terms;
use crate::pci_root::device;
use crate::platform::PlatformDescription;
use crate::processor_abi::{BLOCK_SIZE, PROCESSOR_COUNT, WORD_COUNT, position};

/// `_STA` of a device that is there: present, enabled, shown, working (ACPI 6.5, section 6.3.7).
const STA_PRESENT: u8 = 0x0f;

/// The processors' nodes, and what they share, to be put into the scope of `\_SB`.
pub(crate) fn processors(terms: &mut Terms, platform: &PlatformDescription) {
    let Some(hotplug) = platform.processor_hotplug else {
        for uid in 0..platform.processors.len() {
            processor(terms, uid, &Terms::new());
        }
        return;
    };
    registers(terms, hotplug.registers);
    report(terms);
    scan(terms, platform.processors.len());
    for (uid, apic_id) in platform.processors.iter().enumerate() {
        // As many as the registers have bits for: checked before anything is generated.
        let number = u8::try_from(uid).unwrap_or(u8::MAX);
        processor(terms, uid, &removable(number, *apic_id));
    }
}

/// Has the event device look at the registers, where processors come and go.
pub(crate) fn on_event(terms: &mut Terms, platform: &PlatformDescription) {
    if platform.processor_hotplug.is_some() {
        let call = MethodCall::new("PSCN".into(), vec![]);
        terms.push(&If::new(&And::new(&ZERO, &Local(0), &EVENT_PROCESSORS), vec![&call]));
    }
}

/// A processor; the interrupt controller table names it by the same `_UID`.
fn processor(terms: &mut Terms, uid: usize, more: &Terms) {
    let mut children = Terms::new();
    children.push(&Name::new("_HID".into(), &"ACPI0007"));
    children.push(&Name::new("_UID".into(), &uid));
    children.push(more);
    device(terms, &node_name(uid), &children);
}

fn node_name(uid: usize) -> String {
    format!("C{uid:03X}")
}

/// The field of a word: `letters` and its number. Nodes find it in the scope above their own.
fn word_field(letters: [u8; 3], word: usize) -> [u8; 4] {
    // There are eight of them.
    let [a, b, c] = letters;
    [a, b, c, b'0'.saturating_add(word.to_le_bytes()[0])]
}

struct Word([u8; 3], usize);

impl Aml for Word {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&word_field(self.0, self.1));
    }
}

const PRESENT: [u8; 3] = *b"PPR";
const ADDED: [u8; 3] = *b"PAD";
const LEAVING: [u8; 3] = *b"PLV";

fn registers(terms: &mut Terms, address: u64) {
    let mut fields = Vec::new();
    for letters in [PRESENT, ADDED, LEAVING] {
        fields.extend((0..WORD_COUNT).map(|word| FieldEntry::Named(word_field(letters, word), 32)));
    }
    fields.extend([*b"PEJT", *b"PSTS"].map(|name| FieldEntry::Named(name, 32)));
    terms.push(&OpRegion::new("PREG".into(), OpRegionSpace::SystemMemory, &address, &BLOCK_SIZE));
    terms.push(&Field::new(
        "PREG".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        fields,
    ));
}

/// `PRPT(processor, event, status)`: tells the VMM what the guest says of an event.
fn report(terms: &mut Terms) {
    terms.push(&Method::new(
        "PRPT".into(),
        3,
        true,
        vec![
            &ShiftLeft::new(&Local(0), &And::new(&ZERO, &Arg(1), &0xff_u8), &8_u8),
            &ShiftLeft::new(&Local(1), &And::new(&ZERO, &Arg(2), &0xff_u8), &16_u8),
            &Or::new(&Local(0), &Local(0), &Local(1)),
            &Or::new(&Path::new("PSTS"), &Local(0), &Arg(0)),
        ],
    ));
}

/// Reads ADDED and LEAVING once each and notifies whom they name.
fn scan(terms: &mut Terms, count: usize) {
    let mut body = Terms::new();
    for (letters, value) in [(ADDED, NOTIFY_DEVICE_CHECK), (LEAVING, NOTIFY_EJECT_REQUEST)] {
        for uid in 0..count.min(PROCESSOR_COUNT) {
            let (word, mask) = position(u8::try_from(uid).unwrap_or(u8::MAX));
            if uid.is_multiple_of(32) {
                body.push(&Store::new(&Local(0), &Word(letters, word)));
            }
            let node = Path::new(&node_name(uid));
            body.push(&If::new(&And::new(&ZERO, &Local(0), &mask), vec![&Notify::new(&node, &value)]));
        }
    }
    terms.push(&Method::new("PSCN".into(), 0, true, vec![&body]));
}

/// What lets a processor come and go.
fn removable(number: u8, apic_id: u32) -> Terms {
    let (word, mask) = position(number);
    let mut terms = Terms::new();
    terms.push(&Method::new(
        "_STA".into(),
        0,
        false,
        vec![
            &If::new(&And::new(&ZERO, &Word(PRESENT, word), &mask), vec![&Return::new(&STA_PRESENT)]),
            &Return::new(&ZERO),
        ],
    ));
    // Enabled: it is read for a processor that is there, and the table says of those that come later only that they may.
    let entry = fixed::local_apic(number.into(), apic_id, fixed::PROCESSOR_ENABLED);
    terms.push(&Name::new("_MAT".into(), &BufferData::new(entry)));
    if number != 0 {
        let number = u32::from(number);
        terms.push(&Method::new("_EJ0".into(), 1, true, vec![&Store::new(&Path::new("PEJT"), &number)]));
    }
    terms.push(&Method::new(
        "_OST".into(),
        3,
        true,
        vec![&MethodCall::new("PRPT".into(), vec![&number, &Arg(0), &Arg(1)])],
    ));
    terms
}
