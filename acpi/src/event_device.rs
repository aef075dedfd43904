//! The generic event device and the power button (ACPI 6.5, sections 5.6.9 and 4.8.3.2.2).
//!
//! `_EVT` reads EVENTS ([`event_abi`](crate::event_abi)), which clears it. For a wake it reads each WAKE register of the power
//! notification device that can name a function, which clears that too, and notifies the functions named. For functions that
//! come and go it does the same with ADDED and LEAVING. `RLSE` is where their `_OST` reports. For memory that is added it reads CHANGED
//! of [`memory_abi`](crate::memory_abi).

use acpi_tables::Aml;
use acpi_tables::aml::{
    And, Arg, EISAName, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If,
    Interrupt, Local, Method, Name, Notify, OpRegion, OpRegionSpace, Or, Path, ResourceTemplate, ShiftLeft,
    Store, ZERO,
};
use pci::DevFn;

use crate::event_abi::{
    EVENT_MEMORY, EVENT_PLACES, EVENT_POWER_BUTTON, EVENT_WAKE, NOTIFY_DEVICE_CHECK, NOTIFY_DEVICE_WAKE,
    NOTIFY_EJECT_REQUEST, NOTIFY_POWER_BUTTON, block_size,
};
use crate::memory_devices;
use crate::notify_abi::{ResourceIndex, WAKE_OFFSET, WAKE_WORD_COUNT, WakeWord};
use crate::ops::Terms;
use crate::pci_root::{device, node_path};
use crate::platform::{FunctionDescription, PciDescription, PlatformDescription};

/// `Device (\_SB.PWRB)` and `Device (\_SB.GED)`, to be put into the scope of `\_SB`.
pub(crate) fn event_device(terms: &mut Terms, platform: &PlatformDescription) {
    let mut button = Terms::new();
    button.push(&Name::new("_HID".into(), &EISAName::new("PNP0C0C")));
    device(terms, "PWRB", &button);

    let mut ged = Terms::new();
    ged.push(&Name::new("_HID".into(), &"ACPI0013"));
    ged.push(&Name::new("_UID".into(), &ZERO));
    let interrupt = Interrupt::new(true, true, false, false, platform.event_device.gsi);
    ged.push(&Name::new("_CRS".into(), &ResourceTemplate::new(vec![&interrupt])));
    let others = (1_u16..).zip(platform.pci.iter().skip(1)).flat_map(|(segment, _)| place_fields(segment));
    let events = [*b"EVTS", *b"ADDD", *b"LEAV", *b"RLSD"].into_iter().chain(others);
    let events = events.map(|name| FieldEntry::Named(name, 32)).collect();
    let size = block_size(platform.pci.len());
    registers(&mut ged, "EREG", platform.event_device.address, size, events);
    let words = (0..WAKE_WORD_COUNT).map(|word| FieldEntry::Named(wake_field(word), 32)).collect();
    let wake_registers = platform.power_notification.saturating_add(WAKE_OFFSET);
    registers(&mut ged, "WREG", wake_registers, WAKE_WORD_COUNT as u64 * 4, words);

    let wakes = wakes(&platform.pci);
    let places = places(&platform.pci);
    let mut with_places = Terms::new();
    if !places.0.is_empty() {
        with_places.push(&If::new(&And::new(&ZERO, &Local(0), &EVENT_PLACES), vec![&places]));
        release(&mut ged);
    }
    let mut processors = Terms::new();
    crate::processors::on_event(&mut processors, platform);
    let mut with_memory = Terms::new();
    if platform.memory_slots.is_some() {
        let added = memory_devices::notifications();
        with_memory.push(&If::new(&And::new(&ZERO, &Local(0), &EVENT_MEMORY), vec![&added]));
    }
    ged.push(&Method::new(
        "_EVT".into(),
        1,
        true,
        vec![
            &Store::new(&Local(0), &Path::new("EVTS")),
            &If::new(
                &And::new(&ZERO, &Local(0), &EVENT_POWER_BUTTON),
                vec![&Notify::new(&Path::new("\\_SB_.PWRB"), &NOTIFY_POWER_BUTTON)],
            ),
            &If::new(&And::new(&ZERO, &Local(0), &EVENT_WAKE), vec![&wakes]),
            &with_places,
            &processors,
            &with_memory,
        ],
    ));
    device(terms, "GED_", &ged);
}

fn registers(terms: &mut Terms, name: &str, address: u64, size: u64, fields: Vec<FieldEntry>) {
    terms.push(&OpRegion::new(name.into(), OpRegionSpace::SystemMemory, &address, &size));
    terms.push(&Field::new(
        name.into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        fields,
    ));
}

fn wake_field(word: usize) -> [u8; 4] {
    // There are eight of them.
    [b'W', b'A', b'K', b'0'.saturating_add(word.to_le_bytes()[0])]
}

/// ADDED and LEAVING of a segment.
fn place_fields(segment: u16) -> [[u8; 4]; 2] {
    if segment == 0 {
        return [*b"ADDD", *b"LEAV"];
    }
    ["A", "L"].map(|register| {
        let name = format!("{register}{segment:03X}");
        // There are at most 96 segments.
        name.as_bytes().first_chunk().copied().unwrap_or(*b"____")
    })
}

/// Functions with the paths of their nodes: those on bus 0, then those below root ports.
fn functions(pci: &PciDescription) -> impl Iterator<Item = (&FunctionDescription, Path)> {
    let on_bus_0 = pci.functions.iter().map(|function| (None, function));
    let below = pci.root_ports.iter().flat_map(|port| port.functions.iter().map(|f| (Some(port.devfn), f)));
    on_bus_0
        .chain(below)
        .map(|(port, function): (Option<DevFn>, _)| (function, node_path(pci.segment, port, function.devfn)))
}

/// Reads each WAKE register once and notifies whom it names. Root ports are never woken on their own account.
fn wakes(segments: &[PciDescription]) -> Terms {
    let mut functions: Vec<(ResourceIndex, Path)> =
        segments.iter().flat_map(functions).filter_map(|(f, path)| Some((f.resource?, path))).collect();
    functions.sort_by_key(|(index, _)| *index);

    let mut terms = Terms::new();
    let mut current: Option<WakeWord> = None;
    for (index, path) in &functions {
        let word = index.wake_word();
        if current != Some(word) {
            current = Some(word);
            terms.push(&Store::new(&Local(1), &Named(wake_field(word.as_usize()))));
        }
        terms.push(&If::new(
            &And::new(&ZERO, &Local(1), &index.wake_mask()),
            vec![&Notify::new(path, &NOTIFY_DEVICE_WAKE)],
        ));
    }
    terms
}

/// Reads ADDED and LEAVING of each segment once each and notifies whom they name.
fn places(segments: &[PciDescription]) -> Terms {
    let mut terms = Terms::new();
    for pci in segments {
        places_of(pci, &mut terms);
    }
    terms
}

fn places_of(pci: &PciDescription, terms: &mut Terms) {
    let removable: Vec<(u8, Path)> = functions(pci).filter_map(|(f, path)| Some((f.place?, path))).collect();
    if removable.is_empty() {
        return;
    }
    let notified = [NOTIFY_DEVICE_CHECK, NOTIFY_EJECT_REQUEST];
    for (register, value) in place_fields(pci.segment).into_iter().zip(notified) {
        terms.push(&Store::new(&Local(1), &Named(register)));
        for (place, path) in &removable {
            let mask = 1_u32.checked_shl(u32::from(*place)).unwrap_or(0);
            terms.push(&If::new(&And::new(&ZERO, &Local(1), &mask), vec![&Notify::new(path, &value)]));
        }
    }
}

/// `RLSE(place, event, status)`: tells the VMM how the guest has answered an eject request.
fn release(terms: &mut Terms) {
    terms.push(&Method::new(
        "RLSE".into(),
        3,
        true,
        vec![&If::new(
            &Equal::new(&Arg(1), &NOTIFY_EJECT_REQUEST),
            vec![
                &ShiftLeft::new(&Local(0), &And::new(&ZERO, &Arg(2), &0xff_u8), &8_u8),
                &Or::new(&Path::new("RLSD"), &Local(0), &Arg(0)),
            ],
        )],
    ));
}

/// A field by its name.
struct Named([u8; 4]);

impl Aml for Named {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}
