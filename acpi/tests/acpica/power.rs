//! Methods run by ACPICA's interpreter.
//!
//! The interpreter simulates memory space: every byte has a fill value until it is written, and then reads what was written.
//! So the power notification device does not answer; where a test needs it to, a second table plays its part.

use std::time::{Duration, Instant};

use acpi::event_abi::{EVENT_PLACES, EVENT_POWER_BUTTON, EVENT_WAKE};
use acpi::notify_abi::{
    REQUEST_OFF, REQUEST_ON, ResourceIndex, STATUS_BUSY, STATUS_LOST, STATUS_ON, request_offset,
};

use crate::sample;
use crate::tools::Scratch;

/// The function with resource 1.
const FUNCTION: &str = r"\_SB.PCI0.S08.S00";

/// Plays the power notification device for [`FUNCTION`]. `BOTH` is for two threads: the first turns the power on, the second
/// is the device, which takes half a second. (A method in the debugger's `background` would race with the next command: the
/// two share one description of what to run.)
const DEVICE: &str = r#"
DefinitionBlock ("", "SSDT", 2, "TEST", "DEVICE", 1) {
    External (\_SB.PCI0.S08.S00.PWRR, PowerResObj)
    External (\_SB.PCI0.S08.S00.PWRR.STAT, FieldUnitObj)
    External (\_SB.PCI0.S08.S00.PWRR._ON, MethodObj)
    External (\_SB.PCI0.S08.S00.PWRR._STA, MethodObj)
    Name (\ROLE, Zero)
    Name (\SEEN, Ones)
    Method (\TURN, 1, Serialized) { \_SB.PCI0.S08.S00.PWRR.STAT = Arg0 }
    Method (\BOTH, 3, NotSerialized) {
        Local0 = \ROLE
        \ROLE = One
        If (Local0 == Zero) {
            \_SB.PCI0.S08.S00.PWRR._ON ()
            \SEEN = \_SB.PCI0.S08.S00.PWRR._STA ()
        } Else {
            Sleep (500)
            \TURN (STATUS_ON)
        }
    }
}
"#;

/// Runs commands of the interpreter's debugger with every byte of memory space at `fill`, and returns what it printed.
fn interpret(fill: u8, commands: &[&str]) -> String {
    let scratch = Scratch::new();
    let tables = sample::tables(&sample::machine());
    scratch.write("dsdt.aml", &tables.table(*b"DSDT").unwrap().bytes);
    scratch.write("device.asl", DEVICE.replace("STATUS_ON", &STATUS_ON.to_string()));
    let (compiled, output) = scratch.run("iasl", &["device.asl"]);
    assert!(compiled, "{output}");
    let fill = fill.to_string();
    let commands = commands.join("; ");
    // Linux gives up on a loop after 30 s as well.
    let (_, output) =
        scratch.run("acpiexec", &["-to", "30", "-fv", &fill, "-b", &commands, "dsdt.aml", "device.aml"]);
    for failure in ["ACPI Error", "ACPI Warning", "failed with status", "AE_NOT_FOUND"] {
        assert!(!output.contains(failure), "{output}");
    }
    output
}

/// The integers that the evaluations returned, in their order.
fn integers(output: &str) -> Vec<u64> {
    let values = output.lines().filter_map(|line| line.trim().strip_prefix("[Integer] = "));
    values.map(|value| u64::from_str_radix(value.trim(), 16).unwrap()).collect()
}

fn evaluate(path: &str) -> String {
    format!("evaluate {path}")
}

#[test]
fn on_and_off_store_their_requests() {
    let (request, on, off) = (
        evaluate(&format!("{FUNCTION}.PWRR.REQU")),
        evaluate(&format!("{FUNCTION}.PWRR._ON")),
        evaluate(&format!("{FUNCTION}.PWRR._OFF")),
    );
    let output = interpret(0, &[&on, &request, &off, &request, &on, &request]);
    assert_eq!(integers(&output), [REQUEST_ON, REQUEST_OFF, REQUEST_ON].map(u64::from), "{output}");
}

#[test]
fn each_resource_has_its_own_registers() {
    let output = interpret(
        0,
        &[
            &evaluate(&format!("{FUNCTION}.PWRR._ON")),
            &evaluate(r"\_SB.PCI0.S08.PWRR.REQU"),
            &evaluate(r"\_SB.PCI0.S08.S01.PWRR.REQU"),
            &evaluate(r"\_SB.PCI0.S18.PWRR.REQU"),
            &format!("{} ", r"objects Region"),
        ],
    );
    assert_eq!(integers(&output), [0, 0, 0], "{output}");
    for index in [0, 1, 33, 200].map(ResourceIndex) {
        let address = sample::NOTIFICATION + request_offset(index);
        assert!(output.contains(&format!("{address:08X}")), "{address:08X}: {output}");
    }
}

#[test]
fn status_is_what_the_device_says() {
    let status = evaluate(&format!("{FUNCTION}.PWRR._STA"));
    let turn = |value: u32| format!(r"evaluate \TURN {value:X}");
    let (on, busy) = (turn(STATUS_ON), turn(STATUS_BUSY));
    let output =
        interpret(0, &[&status, &on, &status, &busy, &status, &turn(STATUS_ON | STATUS_LOST), &status]);
    assert_eq!(integers(&output), [0, 1, 0, 1], "{output}");
}

#[test]
fn on_returns_once_the_device_is_ready_and_lets_other_methods_run_meanwhile() {
    let begin = Instant::now();
    let output = interpret(
        0,
        &[
            &format!(r"evaluate \TURN {STATUS_BUSY:X}"),
            r"threads 2 1 \BOTH",
            r"evaluate \SEEN",
            &evaluate(&format!("{FUNCTION}.PWRR.REQU")),
        ],
    );
    assert_eq!(integers(&output), [u64::from(STATUS_ON), u64::from(REQUEST_ON)], "{output}");
    let took = begin.elapsed();
    assert!((Duration::from_millis(500)..Duration::from_secs(8)).contains(&took), "{took:?}");
}

#[test]
fn on_gives_up_on_a_device_that_stays_busy_and_returns() {
    let begin = Instant::now();
    let fill = u8::try_from(STATUS_BUSY).unwrap();
    let on = evaluate(&format!("{FUNCTION}.PWRR._ON"));
    let output = interpret(fill, &[&on, &evaluate(&format!("{FUNCTION}.PWRR._STA"))]);
    assert_eq!(integers(&output), [0], "{output}");
    assert!(
        (Duration::from_secs(9)..Duration::from_secs(25)).contains(&begin.elapsed()),
        "{:?}",
        begin.elapsed()
    );
}

#[test]
fn the_power_states_list_exactly_the_devices_own_resource() {
    for state in ["_PR0", "_PR2", "_PR3"] {
        let output = interpret(0, &[&evaluate(&format!("{FUNCTION}.{state}"))]);
        assert!(output.contains("Contains 1 Elements"), "{output}");
        assert!(output.contains("Name PWRR Power"), "{output}");
    }
}

#[test]
fn a_wake_notifies_the_functions_named_and_no_others() {
    // Bit 1 in every byte: EVENTS says wake, and the WAKE registers name resources 1, 9, 17, ... 33, ... but not 200.
    let output = interpret(u8::try_from(EVENT_WAKE).unwrap(), &[r"evaluate \_SB.GED._EVT A"]);
    let notified: Vec<&str> = output.lines().filter(|line| line.contains("Received a")).collect();
    assert_eq!(notified.len(), 2, "{output}");
    assert!(notified.iter().all(|line| line.contains("0x02 (Device Wake)")), "{output}");
    for node in ["[S00_]", "[S18_]"] {
        assert!(notified.iter().any(|line| line.contains(node)), "{node}: {output}");
    }
}

#[test]
fn a_pressed_power_button_notifies_the_button() {
    let output = interpret(u8::try_from(EVENT_POWER_BUTTON).unwrap(), &[r"evaluate \_SB.GED._EVT A"]);
    let notified: Vec<&str> = output.lines().filter(|line| line.contains("Received a")).collect();
    assert_eq!(notified.len(), 1, "{output}");
    assert!(notified[0].contains("[PWRB]") && notified[0].contains("0x80"), "{output}");
}

#[test]
fn functions_that_come_and_go_are_notified_by_their_place() {
    // Bit 2 in every byte: EVENTS says places, and ADDED and LEAVING name place 10 but not 5.
    let output = interpret(u8::try_from(EVENT_PLACES).unwrap(), &[r"evaluate \_SB.GED._EVT A"]);
    let notified: Vec<&str> = output.lines().filter(|line| line.contains("Received a")).collect();
    assert_eq!(notified.len(), 2, "{output}");
    assert!(notified.iter().all(|line| line.contains("[S50_]")), "{output}");
    // Each handler is a thread of its own there, so they come in any order.
    for value in ["0x01", "0x03"] {
        assert!(notified.iter().any(|line| line.contains(value)), "{output}");
    }
}

#[test]
fn what_the_guest_says_of_an_eject_request_and_of_nothing_else_is_reported_with_its_place() {
    let report = |event: u32, status: u32| {
        let method = format!(r"evaluate \_SB.PCI0.S50_._OST {event} {status} (00)");
        let output = interpret(0, &[&method, &evaluate(r"\_SB.GED_.RLSD")]);
        integers(&output).pop().unwrap()
    };
    assert_eq!(report(3, 0), 10);
    assert_eq!(report(3, 0x82), 0x820a);
    assert_eq!(report(1, 0), 0, "a device check is not an ejection");
}

#[test]
fn the_devices_need_no_delay_after_power_on() {
    let uuid = "(D0 37 C9 E5 53 35 7A 4D 91 17 EA 4D 19 C3 43 4D)";
    let dsm =
        |revision: u8, function: u8| format!("evaluate {FUNCTION}._DSM {uuid} {revision:X} {function:X} [ ]");
    let output = interpret(0, &[&dsm(3, 9)]);
    assert!(output.contains("Contains 5 Elements"), "{output}");
    assert_eq!(integers(&output), [0; 5], "{output}");
    assert!(interpret(0, &[&dsm(3, 0)]).contains("0000: 01 02"), "functions 0 and 9");
    for other in [dsm(2, 9), dsm(3, 8), dsm(3, 9).replace("D0 37", "D0 38")] {
        assert!(interpret(0, &[&other]).contains("Length 01 =     0000: 00"), "{other}");
    }
}

#[test]
fn osc_grants_pme_hotplug_and_the_express_capability_and_says_when_it_withholds() {
    let uuid = "(5B 4D DB 33 F7 1F 1C 40 96 57 74 41 C0 3D D7 66)";
    let osc = |revision: u8, first: u8, control: u8| {
        interpret(
            0,
            &[&format!(
                r"evaluate \_SB.PCI0._OSC {uuid} {revision} 3 ({first:02X} 00 00 00 1F 01 00 00 {control:02X} 00 00 00)"
            )],
        )
    };
    let query_all = osc(1, 1, 0x3f);
    assert!(query_all.contains("11 00 00 00 1F 01 00 00 15 00 00 00"), "{query_all}");
    let commit = osc(1, 0, 0x15);
    assert!(commit.contains("00 00 00 00 1F 01 00 00 15 00 00 00"), "{commit}");
    let wrong_revision = osc(2, 0, 0x15);
    assert!(wrong_revision.contains("08 00 00 00 1F 01 00 00 15 00 00 00"), "{wrong_revision}");
    let wrong_uuid = interpret(
        0,
        &[&format!(
            r"evaluate \_SB.PCI0._OSC {} 1 3 (00 00 00 00 1F 01 00 00 3F 00 00 00)",
            uuid.replace("5B 4D", "5B 4E")
        )],
    );
    assert!(wrong_uuid.contains("04 00 00 00 1F 01 00 00 3F 00 00 00"), "{wrong_uuid}");
}

#[test]
fn soft_off_has_the_sleep_type_that_the_registers_know() {
    let output = interpret(0, &[&evaluate(r"\_S5")]);
    assert_eq!(
        integers(&output),
        [u64::from(acpi::pm1::SLEEP_TYPE_SOFT_OFF), u64::from(acpi::pm1::SLEEP_TYPE_SOFT_OFF), 0, 0]
    );
}
