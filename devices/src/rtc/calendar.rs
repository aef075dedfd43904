//! Seconds since 1970-01-01 00:00:00 UTC to a date and back, in the proleptic Gregorian calendar.
//!
//! The day count uses years that begin on 1 March, so that the leap day is the last of its year.

const SECONDS_PER_DAY: i64 = 86_400;
/// Days of 400 years.
const DAYS_PER_ERA: i64 = 146_097;
/// Days from 0000-03-01 to 1970-01-01.
const EPOCH: i64 = 719_468;

/// A date and time of day. Years reach from 0 to 9999, as far as two BCD digits of century go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DateTime {
    pub(super) year: u16,
    /// 1 to 12.
    pub(super) month: u8,
    /// 1 to 31.
    pub(super) day: u8,
    pub(super) hour: u8,
    pub(super) minute: u8,
    pub(super) second: u8,
    /// 1 is Sunday.
    pub(super) weekday: u8,
}

/// For values that the arithmetic has already put in range.
fn small(value: i64) -> u8 {
    u8::try_from(value).unwrap_or(0)
}

impl DateTime {
    /// The date of `seconds` since the epoch; the nearest date there is for times out of range.
    pub(super) fn from_seconds(seconds: i64) -> Self {
        let first = Self { year: 0, month: 1, day: 1, hour: 0, minute: 0, second: 0, weekday: 1 };
        let last = Self { year: 9999, month: 12, day: 31, hour: 23, minute: 59, second: 59, weekday: 1 };
        let seconds = seconds.clamp(first.to_seconds(), last.to_seconds());
        let days = seconds.div_euclid(SECONDS_PER_DAY);
        let of_day = seconds.rem_euclid(SECONDS_PER_DAY);

        let shifted = days + EPOCH;
        let era = shifted.div_euclid(DAYS_PER_ERA);
        let day_of_era = shifted.rem_euclid(DAYS_PER_ERA);
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * day_of_year + 2) / 153;
        let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
        let year = era * 400 + year_of_era + i64::from(month <= 2);
        Self {
            year: u16::try_from(year).unwrap_or(0),
            month: small(month),
            day: small(day_of_year - (153 * march_month + 2) / 5 + 1),
            hour: small(of_day / 3600),
            minute: small(of_day / 60 % 60),
            second: small(of_day % 60),
            // 1 January 1970 was a Thursday.
            weekday: small((days + 4).rem_euclid(7) + 1),
        }
    }

    /// Seconds since the epoch. Fields out of range carry over; the weekday is not looked at.
    pub(super) fn to_seconds(self) -> i64 {
        let (month, day) = (i64::from(self.month), i64::from(self.day));
        let year = i64::from(self.year) - i64::from(month <= 2);
        let era = year.div_euclid(400);
        let year_of_era = year.rem_euclid(400);
        let march_month = if month > 2 { month - 3 } else { month + 9 };
        let day_of_year = (153 * march_month + 2) / 5 + day - 1;
        let days = era * DAYS_PER_ERA + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year
            - EPOCH;
        days * SECONDS_PER_DAY
            + i64::from(self.hour) * 3600
            + i64::from(self.minute) * 60
            + i64::from(self.second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_dates_convert_both_ways() {
        for (seconds, (year, month, day, hour, minute, second, weekday)) in [
            (0, (1970, 1, 1, 0, 0, 0, 5)),
            (951_782_399, (2000, 2, 28, 23, 59, 59, 2)),
            (951_782_400, (2000, 2, 29, 0, 0, 0, 3)),
            (1_709_251_199, (2024, 2, 29, 23, 59, 59, 5)),
            (4_107_542_400, (2100, 3, 1, 0, 0, 0, 2)),
            (-1, (1969, 12, 31, 23, 59, 59, 4)),
        ] {
            let date = DateTime { year, month, day, hour, minute, second, weekday };
            assert_eq!(DateTime::from_seconds(seconds), date);
            assert_eq!(date.to_seconds(), seconds);
        }
    }

    #[test]
    fn every_day_of_ten_millennia_survives_the_round_trip() {
        let mut seconds = DateTime::from_seconds(i64::MIN).to_seconds();
        let last = DateTime::from_seconds(i64::MAX);
        assert_eq!((last.year, last.month, last.day), (9999, 12, 31));
        while seconds < last.to_seconds() {
            assert_eq!(DateTime::from_seconds(seconds).to_seconds(), seconds);
            seconds += SECONDS_PER_DAY;
        }
    }
}
