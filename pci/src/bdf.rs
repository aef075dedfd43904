//! PCI addresses: segment, bus, device, function (PCI Express Base 6.0, section 2.2.4.2; `_ADR` in ACPI 6.5, section 6.1.1).

use std::fmt;
use std::str::FromStr;

/// Device (0 to 31) and function (0 to 7) on a bus, in the usual 8-bit packing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DevFn(u8);

impl DevFn {
    /// `None` when `device` is over 31 or `function` over 7.
    pub const fn new(device: u8, function: u8) -> Option<Self> {
        if device < 32 && function < 8 { Some(Self(device << 3 | function)) } else { None }
    }

    /// From the 8-bit packing; every value is valid.
    pub const fn from_bits(bits: u8) -> Self {
        Self(bits)
    }

    /// The 8-bit packing: device in bits 7:3, function in bits 2:0.
    pub const fn bits(self) -> u8 {
        self.0
    }

    /// Device number, 0 to 31.
    pub const fn device(self) -> u8 {
        self.0 >> 3
    }

    /// Function number, 0 to 7.
    pub const fn function(self) -> u8 {
        self.0 & 7
    }

    /// The value of `_ADR` for this device and function: device in the high word, function in the low one.
    pub const fn adr(self) -> u32 {
        (self.device() as u32) << 16 | self.function() as u32
    }
}

impl fmt::Display for DevFn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}.{}", self.device(), self.function())
    }
}

/// A full PCI address, written `0000:01:00.0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Bdf {
    /// Segment (Linux calls it domain).
    pub segment: u16,
    /// Bus number.
    pub bus: u8,
    /// Device and function.
    pub devfn: DevFn,
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{}", self.segment, self.bus, self.devfn)
    }
}

/// A string that is no PCI address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{0}' is no PCI address; expected [SEGMENT:]BUS:DEVICE.FUNCTION in hexadecimal, for example 0000:01:00.0"
)]
pub struct ParseBdfError(String);

impl FromStr for Bdf {
    type Err = ParseBdfError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let error = || ParseBdfError(s.to_owned());
        let hex = |part: &str, digits: usize| {
            let fits =
                !part.is_empty() && part.len() <= digits && part.bytes().all(|b| b.is_ascii_hexdigit());
            if fits { u16::from_str_radix(part, 16).map_err(|_| error()) } else { Err(error()) }
        };
        let (address, function) = s.rsplit_once('.').ok_or_else(error)?;
        let mut parts = address.rsplitn(3, ':');
        let device = hex(parts.next().ok_or_else(error)?, 2)?;
        let bus = hex(parts.next().ok_or_else(error)?, 2)?;
        let segment = parts.next().map_or(Ok(0), |part| hex(part, 4))?;
        let function = hex(function, 1)?;
        let byte = |value: u16| u8::try_from(value).map_err(|_| error());
        let devfn = DevFn::new(byte(device)?, byte(function)?).ok_or_else(error)?;
        Ok(Self { segment, bus: byte(bus)?, devfn })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_with_and_without_segment_parses_to_the_same() {
        assert_eq!("0000:01:00.0".parse::<Bdf>(), "01:00.0".parse());
        let bdf: Bdf = "00a1:ff:1f.7".parse().unwrap();
        assert_eq!(bdf.to_string(), "00a1:ff:1f.7");
        assert_eq!(bdf.devfn.adr(), 0x1f_0007);
    }

    #[test]
    fn strings_that_are_no_address_are_refused() {
        for bad in
            ["", "1", "01:00", "01:20.0", "01:00.8", "x:01:00.0", "0:0:0:0.0", "100:00.0", "+1:00.0", ":00.0"]
        {
            assert!(bad.parse::<Bdf>().is_err(), "{bad}");
        }
    }
}
