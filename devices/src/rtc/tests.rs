//! The register model against a clock of the test's own, and the device against the host's.

use event_manager::{EventManager, SubscriberOps};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;

const SECOND: i128 = 1_000_000_000;
/// 2024-02-29 23:59:58 UTC, a Thursday, and a tenth of a second.
const LEAP_EVE: i128 = 1_709_251_198 * SECOND + SECOND / 10;

const ALARM: u8 = 0x20;
const UPDATE: u8 = 0x10;
const PERIODIC: u8 = 0x40;
const HOURS_24: u8 = 0x02;
const BINARY: u8 = 0x04;
const SET: u8 = 0x80;

struct Chip(Registers);

impl Chip {
    fn new(now: i128) -> Self {
        Self(Registers::new(Battery::default(), now))
    }

    fn read(&mut self, index: u8, now: i128) -> u8 {
        self.0.select(index);
        self.0.read(now)
    }

    fn write(&mut self, index: u8, value: u8, now: i128) {
        self.0.select(index);
        self.0.write(value, now);
    }

    /// Century, year, month, day, weekday, hour, minute, second.
    fn time(&mut self, now: i128) -> [u8; 8] {
        [0x32, 9, 8, 7, 6, 4, 2, 0].map(|index| self.read(index, now))
    }

    /// What Linux's `mc146818_set_time` writes, with (`divider`) or without the reset of the divider chain.
    fn set_time(&mut self, time: [u8; 7], divider: bool, now: i128) {
        let control = self.read(0x0b, now);
        self.write(0x0b, control | SET, now);
        let rate = self.read(0x0a, now);
        if divider {
            self.write(0x0a, rate | 0x70, now);
        }
        for (index, value) in [9, 8, 7, 4, 2, 0, 0x32].into_iter().zip(time) {
            self.write(index, value, now);
        }
        self.write(0x0b, control, now);
        self.write(0x0a, rate, now);
    }
}

#[test]
fn a_new_clock_shows_the_hosts_time_in_bcd_and_24_hours() {
    let mut chip = Chip::new(LEAP_EVE);
    assert_eq!(chip.read(0x0b, LEAP_EVE), HOURS_24);
    assert_eq!(chip.read(0x0d, LEAP_EVE), 0x80);
    assert_eq!(chip.time(LEAP_EVE), [0x20, 0x24, 0x02, 0x29, 0x05, 0x23, 0x59, 0x58]);
    assert_eq!(chip.time(LEAP_EVE + 2 * SECOND), [0x20, 0x24, 0x03, 0x01, 0x06, 0x00, 0x00, 0x00]);
}

#[test]
fn binary_and_12_hour_formats_show_the_same_time() {
    let mut chip = Chip::new(LEAP_EVE);
    chip.write(0x0b, BINARY | HOURS_24, LEAP_EVE);
    assert_eq!(chip.time(LEAP_EVE), [20, 24, 2, 29, 5, 23, 59, 58]);
    chip.write(0x0b, 0, LEAP_EVE);
    assert_eq!(chip.read(4, LEAP_EVE), 0x91);
    assert_eq!(chip.read(4, LEAP_EVE + 2 * SECOND), 0x12);
    chip.write(0x0b, BINARY, LEAP_EVE);
    assert_eq!(chip.read(4, LEAP_EVE + 2 * SECOND + 12 * 3600 * SECOND), 0x8c);
}

#[test]
fn an_update_is_announced_and_the_time_then_stands_until_it() {
    let mut chip = Chip::new(LEAP_EVE);
    let boundary = LEAP_EVE - SECOND / 10 + SECOND;
    for (before, updating) in [(1, true), (243_999, true), (244_001, false), (500_000_000, false)] {
        assert_eq!(chip.read(0x0a, boundary - before) & 0x80 != 0, updating, "{before}");
        assert_eq!(chip.read(0, boundary - before), 0x58);
    }
    assert_eq!(chip.read(0x0a, boundary) & 0x80, 0);
    assert_eq!(chip.read(0, boundary), 0x59);
}

#[test]
fn the_time_that_linux_sets_is_kept_apart_from_the_hosts() {
    for divider in [false, true] {
        let mut chip = Chip::new(LEAP_EVE);
        chip.set_time([0x30, 0x12, 0x31, 0x23, 0x59, 0x59, 0x20], divider, LEAP_EVE);
        assert_eq!(chip.time(LEAP_EVE), [0x20, 0x30, 0x12, 0x31, 0x03, 0x23, 0x59, 0x59], "{divider}");
        // With the divider reset the next update is half a second off; without, the host's phase goes on.
        let next = if divider { SECOND / 2 } else { SECOND * 9 / 10 };
        assert_eq!(chip.read(0, LEAP_EVE + next - 1), 0x59);
        assert_eq!(chip.time(LEAP_EVE + next), [0x20, 0x31, 0x01, 0x01, 0x04, 0x00, 0x00, 0x00]);
        let mut after_reboot = Chip(Registers::new(chip.0.battery(), LEAP_EVE + next));
        assert_eq!(after_reboot.read(9, LEAP_EVE + next), 0x31);
    }
}

#[test]
fn a_set_bit_that_changes_nothing_loses_no_time() {
    let mut chip = Chip::new(LEAP_EVE);
    chip.write(0x0b, HOURS_24 | SET, LEAP_EVE);
    assert_eq!(chip.read(0, LEAP_EVE + 60 * SECOND), 0x58);
    chip.write(0x0b, HOURS_24, LEAP_EVE + 60 * SECOND);
    assert_eq!(chip.time(LEAP_EVE + 60 * SECOND), [0x20, 0x24, 0x03, 0x01, 0x06, 0x00, 0x00, 0x58]);
}

#[test]
fn an_alarm_fires_once_at_its_time_and_the_read_of_c_acknowledges_it() {
    let mut chip = Chip::new(LEAP_EVE);
    for (index, value) in [(5, 0x00), (3, 0x00), (1, 0x03)] {
        chip.write(index, value, LEAP_EVE);
    }
    assert_eq!(chip.0.deadline(), None);
    chip.write(0x0b, HOURS_24 | ALARM, LEAP_EVE);
    let at = LEAP_EVE - SECOND / 10 + 5 * SECOND;
    assert_eq!(chip.0.deadline(), Some(at));
    chip.0.catch_up(at - 1);
    assert!(!chip.0.asserted());
    chip.0.catch_up(at);
    assert!(chip.0.asserted());
    assert_eq!(chip.0.deadline(), None);
    assert_eq!(chip.read(0x0c, at) & (0x80 | ALARM), 0x80 | ALARM);
    assert_eq!(chip.read(0x0c, at), 0);
    // The same time of the next day.
    assert_eq!(chip.0.deadline(), Some(at + 86_400 * SECOND));
    chip.write(0x0b, HOURS_24, at);
    assert_eq!(chip.0.deadline(), None);
}

#[test]
fn alarm_bytes_of_all_ones_match_everything() {
    let mut chip = Chip::new(LEAP_EVE);
    let whole = LEAP_EVE - SECOND / 10;
    chip.write(0x0b, HOURS_24 | ALARM, LEAP_EVE);
    for (hour, minute, second, after) in [
        (0xff, 0xff, 0xff, 1),
        (0xff, 0xff, 0x57, 59),
        (0xff, 0x30, 0x00, 30 * 60 + 2),
        (0x23, 0xc0, 0x58, 86_400 - 59 * 60),
    ] {
        for (index, value) in [(5, hour), (3, minute), (1, second)] {
            chip.write(index, value, LEAP_EVE);
        }
        assert_eq!(chip.0.deadline(), Some(whole + after * SECOND), "{hour:x} {minute:x} {second:x}");
    }
}

#[test]
fn alarm_bytes_that_no_clock_shows_never_fire() {
    let mut chip = Chip::new(LEAP_EVE);
    chip.write(1, 0x7f, LEAP_EVE);
    chip.write(0x0b, HOURS_24 | ALARM, LEAP_EVE);
    assert_eq!(chip.0.deadline(), None);
    chip.0.catch_up(LEAP_EVE + 7 * 86_400 * SECOND);
    assert!(!chip.0.asserted());
}

#[test]
fn an_alarm_works_in_12_hour_format() {
    let mut chip = Chip::new(LEAP_EVE);
    chip.write(0x0b, ALARM, LEAP_EVE);
    for (index, value) in [(5, 0x81), (3, 0x00), (1, 0x00)] {
        chip.write(index, value, LEAP_EVE);
    }
    assert_eq!(chip.0.deadline(), Some(LEAP_EVE - SECOND / 10 + 2 * SECOND + 13 * 3600 * SECOND));
}

#[test]
fn update_and_periodic_interrupts_come_at_their_rates_and_only_once_until_acknowledged() {
    let mut chip = Chip::new(LEAP_EVE);
    let boundary = LEAP_EVE - SECOND / 10 + SECOND;
    chip.write(0x0b, HOURS_24 | UPDATE, LEAP_EVE);
    assert_eq!(chip.0.deadline(), Some(boundary));
    chip.0.catch_up(boundary);
    assert_eq!(chip.0.deadline(), None);
    assert_eq!(chip.read(0x0c, boundary) & UPDATE, UPDATE);
    assert_eq!(chip.0.deadline(), Some(boundary + SECOND));

    // Rate 6 is 1024 Hz, rate 15 is 2 Hz, rate 1 is 256 Hz, rate 0 is none.
    for (rate, hertz) in [(6, 1024), (15, 2), (1, 256)] {
        chip.write(0x0b, HOURS_24 | PERIODIC, boundary);
        chip.write(0x0a, 0x20 | rate, boundary);
        chip.read(0x0c, boundary);
        let deadline = chip.0.deadline().unwrap();
        assert!((1..=SECOND / hertz).contains(&(deadline - boundary)), "{rate}");
    }
    chip.write(0x0a, 0x20, boundary);
    assert_eq!(chip.0.deadline(), None);
}

#[test]
fn flags_are_set_without_being_enabled_but_do_not_interrupt() {
    let mut chip = Chip::new(LEAP_EVE);
    chip.0.catch_up(LEAP_EVE + SECOND);
    assert!(!chip.0.asserted());
    assert_eq!(chip.read(0x0c, LEAP_EVE + SECOND) & (0x80 | UPDATE), UPDATE);
}

#[test]
fn a_host_clock_set_back_brings_no_flag_and_keeps_alarms_coming() {
    let mut chip = Chip::new(LEAP_EVE);
    chip.write(0x0b, HOURS_24 | UPDATE, LEAP_EVE);
    chip.0.catch_up(LEAP_EVE - 3600 * SECOND);
    assert!(!chip.0.asserted());
    assert_eq!(chip.0.deadline(), Some(LEAP_EVE - SECOND / 10 - 3599 * SECOND));
}

#[test]
fn nvram_keeps_its_bytes_and_the_fixed_registers_theirs() {
    let mut chip = Chip::new(LEAP_EVE);
    for index in (0x0e..=0x7f).filter(|index| *index != 0x32) {
        chip.write(index, index ^ 0xa5, LEAP_EVE);
    }
    chip.write(0x0c, 0xff, LEAP_EVE);
    chip.write(0x0d, 0, LEAP_EVE);
    let mut after_reboot = Chip(Registers::new(chip.0.battery(), LEAP_EVE));
    for index in (0x0e..=0x7f).filter(|index| *index != 0x32) {
        assert_eq!(after_reboot.read(index, LEAP_EVE), index ^ 0xa5);
        // Bit 7 of the index is the NMI mask.
        assert_eq!(after_reboot.read(index | 0x80, LEAP_EVE), index ^ 0xa5);
    }
    assert_eq!(after_reboot.read(0x0c, LEAP_EVE), 0);
    assert_eq!(after_reboot.read(0x0d, LEAP_EVE), 0x80);
}

#[test]
fn no_sequence_of_writes_breaks_the_clock() {
    let mut chip = Chip::new(LEAP_EVE);
    let mut random = 0x2545_f491_4f6c_dd1du64;
    let mut now = LEAP_EVE;
    for _ in 0..50_000 {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let [index, value, how, ..] = random.to_le_bytes();
        let index = if how & 1 != 0 { index % 14 } else { index };
        now += i128::from(random >> 33) - (1 << 28);
        if how & 2 != 0 {
            chip.write(index, value, now);
        } else {
            chip.read(index, now);
        }
        if let Some(deadline) = chip.0.deadline() {
            assert!(deadline <= now + 49 * 3600 * SECOND);
        }
    }
    // And it can still be set.
    chip.write(0x0a, 0x26, now);
    chip.write(0x0b, HOURS_24, now);
    chip.set_time([0x26, 0x11, 0x22, 0x10, 0x20, 0x30, 0x20], true, now);
    assert_eq!(chip.time(now), [0x20, 0x26, 0x11, 0x22, 0x01, 0x10, 0x20, 0x30]);
}

fn port(rtc: &Rtc, index: u8, value: Option<u8>) -> u8 {
    let base = PioAddress(0x70);
    rtc.pio_write(base, INDEX, &[index]);
    let mut data = [0];
    match value {
        Some(value) => rtc.pio_write(base, DATA, &[value]),
        None => rtc.pio_read(base, DATA, &mut data),
    }
    data[0]
}

#[test]
fn an_alarm_interrupts_through_the_event_loop_and_no_timer_runs_without_one() {
    let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
    let alarms = Arc::new(AtomicU32::new(0));
    let count = alarms.clone();
    let rtc = Rtc::new(interrupt.try_clone().unwrap(), Battery::default()).unwrap();
    let rtc = Arc::new(rtc.on_alarm(move || {
        count.fetch_add(1, Ordering::SeqCst);
    }));
    let mut events: EventManager<Arc<dyn EventSubscriber>> = EventManager::new().unwrap();
    events.add_subscriber(rtc.clone());
    assert_eq!(events.run_with_timeout(10).unwrap(), 0);
    assert!(!rtc.armed());

    // Every second will do.
    for index in [1, 3, 5] {
        port(&rtc, index, Some(0xff));
    }
    port(&rtc, 0x0c, None);
    port(&rtc, 0x0b, Some(HOURS_24 | ALARM));
    assert!(rtc.armed());
    let start = Instant::now();
    while interrupt.read().is_err() {
        assert!(start.elapsed() < Duration::from_secs(3), "no interrupt");
        events.run_with_timeout(100).unwrap();
    }
    assert!(!rtc.armed());
    assert_eq!(alarms.load(Ordering::SeqCst), 1);
    assert_eq!(port(&rtc, 0x0c, None) & (0x80 | ALARM), 0x80 | ALARM);
    assert!(rtc.armed());
    port(&rtc, 0x0b, Some(HOURS_24));
    assert!(!rtc.armed());
}

#[test]
fn odd_accesses_read_all_ones_and_are_dropped() {
    let rtc = Rtc::new(EventFd::new(EFD_NONBLOCK).unwrap(), Battery::default()).unwrap();
    let base = PioAddress(0x70);
    port(&rtc, 0x40, Some(0x77));
    for (offset, size) in [(0, 1), (0, 2), (1, 2), (1, 4), (2, 1), (u16::MAX, 1), (1, 0)] {
        let mut data = vec![0; size];
        rtc.pio_read(base, offset, &mut data);
        assert_eq!(data, vec![0xff; size], "{offset} {size}");
    }
    rtc.pio_write(base, 1, &[1, 2]);
    rtc.pio_write(base, 2, &[1]);
    assert_eq!(port(&rtc, 0x40, None), 0x77);
}
