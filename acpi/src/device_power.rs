//! What a device node needs so that a guest cuts the device's power (ACPI 6.5, sections 7.2 and 7.3).
//!
//! A node with a power resource gets, in its own scope:
//!
//! * `PWRR`, the power resource. `_ON` and `_OFF` store requests in the power notification device
//!   ([`notify_abi`](crate::notify_abi)), `_STA` returns what that device says, never a value remembered in AML: a crash
//!   kernel that starts while the device is off must see that it is.
//! * `_PR0`, `_PR2` and `_PR3`, each with exactly this resource. Linux needs the first and the last, Windows wants all three,
//!   and NVIDIA's driver evaluates `_PR3` and takes its first element.
//! * `_S0W` 4: the device can wake from D3cold.
//! * `_DSM` function 9 (PCI Firmware Specification 3.3, section 4.6.9): the device needs no delay after it was powered on, as
//!   `_ON` does not return before it is ready. Without it Linux waits 100 ms for each function.
//!
//! It must have neither `_EJ0` (Linux leaves the power of what can be ejected alone) nor `_STA`.

use acpi_tables::aml::{
    Add, And, Arg, BufferData, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule,
    GreaterEqual, GreaterThan, If, Local, Method, MethodCall, Name, OpRegion, OpRegionSpace, Package, Path,
    Return, Store, Uuid, While, ZERO,
};

use crate::notify_abi::{
    REQUEST_OFF, REQUEST_ON, RESOURCE_STRIDE, ResourceIndex, STATUS_BUSY, STATUS_ON, request_offset,
};
use crate::ops::{Break, Sleep, Terms, Timer};
use crate::power_resource::PowerResource;

/// How long `_ON` waits for the device, in units of 100 ns: 12 s. The VMM gives up before, after 10 s at most, and says so in
/// STATUS; ACPICA would end the loop after 30 s.
const ON_TIMEOUT: u64 = 12 * 10_000_000;
/// How long `_ON` sleeps between two looks, in milliseconds.
const POLL_INTERVAL: u8 = 1;

/// `_S0W`: the deepest state from which the device can wake the system, D3cold.
const WAKE_FROM_D3COLD: u8 = 4;

/// The PCI `_DSM`s (PCI Firmware Specification 3.3, section 4.6).
const PCI_DSM: &str = "e5c937d0-3553-4d7a-9117-ea4d19c3434d";
const DSM_QUERY: u8 = 0;
const DSM_READINESS_DURATIONS: u8 = 9;
const DSM_READINESS_REVISION: u8 = 3;
/// Which functions there are: bits 0 and 9.
const DSM_FUNCTIONS: [u8; 2] = [1 << DSM_QUERY, 1 << (DSM_READINESS_DURATIONS - 8)];

/// Path of the method that answers `_DSM` for every node, and where it is to be defined.
const SHARED_DSM: &str = "\\_SB_.PCI0.PDSM";

/// The method behind every node's `_DSM`, of UUID, revision and function; goes into the scope of `\_SB.PCI0`, before any node.
pub(crate) fn shared_dsm(terms: &mut Terms) {
    let zero_microseconds = Package::new(vec![&ZERO, &ZERO, &ZERO, &ZERO, &ZERO]);
    terms.push(&Method::new(
        "PDSM".into(),
        3,
        false,
        vec![
            &If::new(
                &Equal::new(&Arg(0), &Uuid::new(PCI_DSM)),
                vec![
                    &If::new(
                        &Equal::new(&Arg(2), &DSM_QUERY),
                        vec![&Return::new(&BufferData::new(DSM_FUNCTIONS.to_vec()))],
                    ),
                    &If::new(
                        &Equal::new(&Arg(2), &DSM_READINESS_DURATIONS),
                        vec![&If::new(
                            &GreaterEqual::new(&Arg(1), &DSM_READINESS_REVISION),
                            vec![&Return::new(&zero_microseconds)],
                        )],
                    ),
                ],
            ),
            &Return::new(&BufferData::new(vec![0])),
        ],
    ));
}

/// The objects of a node whose power resource is `index`. `notification_page` is where the power notification device is.
pub(crate) fn objects(terms: &mut Terms, index: ResourceIndex, notification_page: u64) {
    power_resource(terms, index, notification_page);
    let resource = Path::new("PWRR");
    for state in ["_PR0", "_PR2", "_PR3"] {
        terms.push(&Name::new(state.into(), &Package::new(vec![&resource])));
    }
    terms.push(&Name::new("_S0W".into(), &WAKE_FROM_D3COLD));
    terms.push(&Method::new(
        "_DSM".into(),
        4,
        false,
        vec![&Return::new(&MethodCall::new(SHARED_DSM.into(), vec![&Arg(0), &Arg(1), &Arg(2)]))],
    ));
}

fn power_resource(terms: &mut Terms, index: ResourceIndex, notification_page: u64) {
    // The page's address was checked to leave room for itself.
    let registers = notification_page.saturating_add(request_offset(index));
    let request = Path::new("REQU");
    let status = Path::new("STAT");
    terms.push(&PowerResource::new(
        "PWRR".into(),
        vec![
            &OpRegion::new("REGS".into(), OpRegionSpace::SystemMemory, &registers, &RESOURCE_STRIDE),
            &Field::new(
                "REGS".into(),
                FieldAccessType::DWord,
                FieldLockRule::NoLock,
                FieldUpdateRule::WriteAsZeroes,
                vec![FieldEntry::Named(*b"REQU", 32), FieldEntry::Named(*b"STAT", 32)],
            ),
            &Method::new("_STA".into(), 0, true, vec![&Return::new(&And::new(&ZERO, &status, &STATUS_ON))]),
            &Method::new(
                "_ON_".into(),
                0,
                true,
                vec![
                    &Store::new(&request, &REQUEST_ON),
                    &Add::new(&Local(0), &Timer, &ON_TIMEOUT),
                    &While::new(
                        &And::new(&ZERO, &status, &STATUS_BUSY),
                        vec![
                            &If::new(&GreaterThan::new(&Timer, &Local(0)), vec![&Break]),
                            &Sleep(POLL_INTERVAL),
                        ],
                    ),
                ],
            ),
            &Method::new("_OFF".into(), 0, true, vec![&Store::new(&request, &REQUEST_OFF)]),
        ],
    ));
}
