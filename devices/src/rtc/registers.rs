//! The register model of the MC146818 (Motorola data sheet MC146818A), with the century byte of the PC where the FADT says.
//!
//! Pure: every function is told the host's time, and says when it next wants to be asked. Times are nanoseconds.

use serde::{Deserialize, Serialize};

use super::calendar::DateTime;

const SECONDS: u8 = 0x00;
const SECONDS_ALARM: u8 = 0x01;
const MINUTES: u8 = 0x02;
const MINUTES_ALARM: u8 = 0x03;
const HOURS: u8 = 0x04;
const HOURS_ALARM: u8 = 0x05;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const REGISTER_A: u8 = 0x0a;
const REGISTER_B: u8 = 0x0b;
const REGISTER_C: u8 = 0x0c;
const REGISTER_D: u8 = 0x0d;
const CENTURY: u8 = acpi::platform::RTC_CENTURY_BYTE;

/// Registers that hold the running time.
const TIME: [u8; 8] = [SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY];

const A_UPDATE_IN_PROGRESS: u8 = 1 << 7;
const A_RATE: u8 = 0x0f;
/// Bits 6 and 5 both set hold the divider chain in reset.
const A_DIVIDER_RESET: u8 = 0b0110_0000;
/// 32.768 kHz time base, 1024 Hz periodic rate.
const A_DEFAULT: u8 = 0x26;

const B_SET: u8 = 1 << 7;
const B_BINARY: u8 = 1 << 2;
const B_24_HOURS: u8 = 1 << 1;
/// BCD, 24 hours, no interrupts.
const B_DEFAULT: u8 = B_24_HOURS;

const C_ASSERTED: u8 = 1 << 7;
const PERIODIC: u8 = 1 << 6;
const ALARM: u8 = 1 << 5;
const UPDATE_ENDED: u8 = 1 << 4;
/// The flags of register C, and their enables at the same places of register B.
const SOURCES: u8 = PERIODIC | ALARM | UPDATE_ENDED;

const D_VALID: u8 = 1 << 7;

/// An alarm byte with both top bits set matches every value.
const DO_NOT_CARE: u8 = 0xc0;
const HOUR_PM: u8 = 1 << 7;

const SECOND: i128 = 1_000_000_000;
/// The update-in-progress bit is set this long before the update.
const UPDATE_NOTICE: i128 = 244_000;
/// The first update after the divider chain leaves reset comes after half a second.
const AFTER_DIVIDER_RESET: i128 = SECOND / 2;

/// What a battery keeps: the bytes, and how far the guest has set the clock from the host's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Battery {
    pub(super) bytes: [u8; 128],
    pub(super) offset: i128,
}

impl Default for Battery {
    fn default() -> Self {
        let mut bytes = [0; 128];
        bytes[usize::from(REGISTER_A)] = A_DEFAULT;
        bytes[usize::from(REGISTER_B)] = B_DEFAULT;
        Self { bytes, offset: 0 }
    }
}

/// The clock is standing still.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Stopped {
    /// The guest has written a time.
    set: bool,
    /// The divider chain has been in reset.
    divider: bool,
}

/// A number of nanoseconds as whole seconds and the rest, for formats that have no numbers of 128 bits.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Nanoseconds(i64, u32);

impl From<i128> for Nanoseconds {
    fn from(nanoseconds: i128) -> Self {
        Self(
            i64::try_from(nanoseconds.div_euclid(SECOND)).unwrap_or(0),
            u32::try_from(nanoseconds.rem_euclid(SECOND)).unwrap_or(0),
        )
    }
}

impl From<Nanoseconds> for i128 {
    fn from(Nanoseconds(seconds, rest): Nanoseconds) -> Self {
        Self::from(seconds) * SECOND + Self::from(rest)
    }
}

/// What is saved of the chip. Its clock goes on with the host's.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RtcState {
    bytes: Vec<u8>,
    /// How far the guest's clock is ahead of the host's.
    offset: Nanoseconds,
    /// Up to when the flags are worked out.
    seen: Nanoseconds,
    index: u8,
    flags: u8,
    stopped: Option<Stopped>,
}

/// The chip.
#[derive(Debug)]
pub(super) struct Registers {
    battery: Battery,
    index: u8,
    flags: u8,
    /// Set while the clock stands still: the time registers are then bytes like others.
    stopped: Option<Stopped>,
    /// Time of the clock up to which the flags are worked out.
    seen: i128,
}

impl Registers {
    pub(super) fn new(mut battery: Battery, now: i128) -> Self {
        // Register B keeps its formats; what the last machine was waiting for is forgotten.
        battery.bytes[usize::from(REGISTER_B)] &= !(B_SET | SOURCES);
        if battery.bytes[usize::from(REGISTER_A)] & A_DIVIDER_RESET == A_DIVIDER_RESET {
            battery.bytes[usize::from(REGISTER_A)] = A_DEFAULT;
        }
        let seen = now + battery.offset;
        Self { battery, index: 0, flags: 0, stopped: None, seen }
    }

    pub(super) fn battery(&self) -> Battery {
        self.battery.clone()
    }

    pub(super) fn save(&self) -> RtcState {
        RtcState {
            bytes: self.battery.bytes.to_vec(),
            offset: self.battery.offset.into(),
            seen: self.seen.into(),
            index: self.index,
            flags: self.flags,
            stopped: self.stopped,
        }
    }

    /// As saved. What the clock has come to since comes to the guest at the next look.
    pub(super) fn restored(saved: &RtcState) -> Option<Self> {
        let bytes = saved.bytes.as_slice().try_into().ok()?;
        Some(Self {
            battery: Battery { bytes, offset: saved.offset.into() },
            index: saved.index & 0x7f,
            flags: saved.flags & SOURCES,
            stopped: saved.stopped,
            seen: saved.seen.into(),
        })
    }

    pub(super) fn select(&mut self, index: u8) {
        // Bit 7 of the port masks the NMI.
        self.index = index & 0x7f;
    }

    /// Whether the interrupt line is asserted.
    pub(super) fn asserted(&self) -> bool {
        self.flags & self.byte(REGISTER_B) & SOURCES != 0
    }

    /// Whether the alarm is a reason for that.
    pub(super) fn alarm(&self) -> bool {
        self.flags & self.byte(REGISTER_B) & ALARM != 0
    }

    /// Reads the selected register.
    pub(super) fn read(&mut self, now: i128) -> u8 {
        self.catch_up(now);
        let time = now + self.battery.offset;
        match self.index {
            REGISTER_A => {
                let updating = self.stopped.is_none() && time.rem_euclid(SECOND) >= SECOND - UPDATE_NOTICE;
                self.byte(REGISTER_A) | if updating { A_UPDATE_IN_PROGRESS } else { 0 }
            }
            REGISTER_C => {
                let value = self.flags | if self.asserted() { C_ASSERTED } else { 0 };
                self.flags = 0;
                value
            }
            REGISTER_D => D_VALID,
            index if self.stopped.is_none() && TIME.contains(&index) => self.encode(index, date_of(time)),
            index => self.byte(index),
        }
    }

    /// Writes the selected register.
    pub(super) fn write(&mut self, value: u8, now: i128) {
        self.catch_up(now);
        match self.index {
            REGISTER_A => {
                self.put(REGISTER_A, value & !A_UPDATE_IN_PROGRESS);
                self.run_or_stop(now);
            }
            REGISTER_B => {
                // The time is latched in the format that was, and set in the format that is.
                if value & B_SET != 0 {
                    self.stop(now);
                }
                self.put(REGISTER_B, value);
                self.run_or_stop(now);
            }
            REGISTER_C | REGISTER_D => {}
            index if TIME.contains(&index) => {
                let running = self.stopped.is_none();
                self.stop(now);
                self.put(index, value);
                if let Some(stopped) = &mut self.stopped {
                    stopped.set = true;
                }
                if running {
                    self.run_or_stop(now);
                }
            }
            index => self.put(index, value),
        }
    }

    /// Works out which flags have been set since the last look.
    pub(super) fn catch_up(&mut self, now: i128) {
        if self.stopped.is_some() {
            return;
        }
        let time = now + self.battery.offset;
        let seen = std::mem::replace(&mut self.seen, time);
        // The host's clock may be set back.
        if time <= seen {
            return;
        }
        if time.div_euclid(SECOND) != seen.div_euclid(SECOND) {
            self.flags |= UPDATE_ENDED;
            if self.next_alarm(seen).is_some_and(|alarm| alarm <= time) {
                self.flags |= ALARM;
            }
        }
        if self.period().is_some_and(|period| time.div_euclid(period) != seen.div_euclid(period)) {
            self.flags |= PERIODIC;
        }
    }

    /// The host's time at which the interrupt line will next be asserted, if it will and is not.
    pub(super) fn deadline(&self) -> Option<i128> {
        if self.stopped.is_some() || self.asserted() {
            return None;
        }
        let enabled = self.byte(REGISTER_B);
        let next = |unit: i128| (self.seen.div_euclid(unit) + 1) * unit;
        let alarm = if enabled & ALARM != 0 { self.next_alarm(self.seen) } else { None };
        let update = (enabled & UPDATE_ENDED != 0).then(|| next(SECOND));
        let periodic = if enabled & PERIODIC != 0 { self.period().map(next) } else { None };
        [alarm, update, periodic].into_iter().flatten().min().map(|time| time - self.battery.offset)
    }

    fn byte(&self, index: u8) -> u8 {
        self.battery.bytes[usize::from(index & 0x7f)]
    }

    fn put(&mut self, index: u8, value: u8) {
        self.battery.bytes[usize::from(index & 0x7f)] = value;
    }

    /// Period of the periodic interrupt with the 32.768 kHz time base.
    fn period(&self) -> Option<i128> {
        let ticks: u32 = match self.byte(REGISTER_A) & A_RATE {
            0 => return None,
            // The two slowest codes of the divider chain are those of 8 and 9.
            rate @ 1..=2 => 1 << (rate + 6),
            rate => 1 << (rate - 1),
        };
        Some(i128::from(ticks) * SECOND / 32_768)
    }

    /// Latches the time into its registers, unless that was done.
    fn stop(&mut self, now: i128) {
        if self.stopped.is_none() {
            let date = date_of(now + self.battery.offset);
            for index in TIME {
                self.put(index, self.encode(index, date));
            }
            self.stopped = Some(Stopped { set: false, divider: false });
        }
    }

    /// Makes the clock stand still or run, as registers A and B say.
    fn run_or_stop(&mut self, now: i128) {
        let divider = self.byte(REGISTER_A) & A_DIVIDER_RESET == A_DIVIDER_RESET;
        if divider || self.byte(REGISTER_B) & B_SET != 0 {
            self.stop(now);
            if let Some(stopped) = &mut self.stopped {
                stopped.divider |= divider;
            }
            return;
        }
        let Some(stopped) = self.stopped.take() else { return };
        if stopped.set || stopped.divider {
            let phase = if stopped.divider {
                SECOND - AFTER_DIVIDER_RESET
            } else {
                (now + self.battery.offset).rem_euclid(SECOND)
            };
            self.battery.offset = i128::from(self.decode().to_seconds()) * SECOND + phase - now;
        }
        self.seen = now + self.battery.offset;
    }

    /// The first time after `time` that the alarm bytes match, if there is one.
    fn next_alarm(&self, time: i128) -> Option<i128> {
        let matches = |wanted: u8, value: u8| wanted & DO_NOT_CARE == DO_NOT_CARE || wanted == value;
        let first = seconds_of(time) + 1;
        let midnight = first - first.rem_euclid(86_400);
        for hour in 0..48 {
            let of_day = u8::try_from(hour % 24).unwrap_or(0);
            if !matches(self.byte(HOURS_ALARM), self.encode_hour(of_day)) {
                continue;
            }
            for minute in 0..60u8 {
                // Nothing in this minute is late enough.
                let start = midnight + hour * 3600 + i64::from(minute) * 60;
                if start + 59 < first || !matches(self.byte(MINUTES_ALARM), self.encode_number(minute)) {
                    continue;
                }
                for second in 0..60u8 {
                    let at = start + i64::from(second);
                    if at >= first && matches(self.byte(SECONDS_ALARM), self.encode_number(second)) {
                        return Some(i128::from(at) * SECOND);
                    }
                }
            }
        }
        None
    }

    fn encode_number(&self, value: u8) -> u8 {
        if self.byte(REGISTER_B) & B_BINARY != 0 { value } else { ((value / 10 % 10) << 4) | (value % 10) }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.byte(REGISTER_B) & B_24_HOURS != 0 {
            return self.encode_number(hour);
        }
        let of_half = (hour + 11) % 12 + 1;
        self.encode_number(of_half) | if hour >= 12 { HOUR_PM } else { 0 }
    }

    fn encode(&self, index: u8, date: DateTime) -> u8 {
        let digits = |value: u16| self.encode_number(u8::try_from(value % 100).unwrap_or(0));
        match index {
            SECONDS => self.encode_number(date.second),
            MINUTES => self.encode_number(date.minute),
            HOURS => self.encode_hour(date.hour),
            WEEKDAY => self.encode_number(date.weekday),
            DAY => self.encode_number(date.day),
            MONTH => self.encode_number(date.month),
            YEAR => digits(date.year),
            _ => digits(date.year / 100),
        }
    }

    fn decode_number(&self, value: u8) -> u8 {
        if self.byte(REGISTER_B) & B_BINARY != 0 { value } else { (value >> 4) * 10 + (value & 0x0f) }
    }

    /// The latched time registers as a date; fields that no clock shows are moved to the nearest that one does.
    fn decode(&self) -> DateTime {
        let field = |index: u8, low: u8, high: u8| self.decode_number(self.byte(index)).clamp(low, high);
        let hour = if self.byte(REGISTER_B) & B_24_HOURS != 0 {
            field(HOURS, 0, 23)
        } else {
            let value = self.byte(HOURS);
            let of_half = self.decode_number(value & !HOUR_PM).clamp(1, 12) % 12;
            of_half + if value & HOUR_PM != 0 { 12 } else { 0 }
        };
        DateTime {
            year: u16::from(field(CENTURY, 0, 99)) * 100 + u16::from(field(YEAR, 0, 99)),
            month: field(MONTH, 1, 12),
            day: field(DAY, 1, 31),
            hour,
            minute: field(MINUTES, 0, 59),
            second: field(SECONDS, 0, 59),
            weekday: 1,
        }
    }
}

fn seconds_of(time: i128) -> i64 {
    i64::try_from(time.div_euclid(SECOND)).unwrap_or(i64::MAX / 2)
}

fn date_of(time: i128) -> DateTime {
    DateTime::from_seconds(seconds_of(time))
}
