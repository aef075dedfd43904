//! `PowerResource` (ACPI 6.5, sections 7.2 and 20.2.5.2, DefPowerRes): a switch for the power of devices.
//!
//! The library's own `PowerResource` emits its two opcode bytes the wrong way round, which no interpreter accepts. This one
//! replaces it.

use acpi_tables::aml::Path;
use acpi_tables::{Aml, AmlSink};

use crate::ops;

const OPCODE: [u8; 2] = [0x5b, 0x84];

/// A power resource that may be off in every sleep state and has no order among others.
pub(crate) struct PowerResource<'a> {
    name: Path,
    children: Vec<&'a dyn Aml>,
}

impl<'a> PowerResource<'a> {
    /// `children` must define `_STA`, `_ON` and `_OFF`.
    pub(crate) fn new(name: Path, children: Vec<&'a dyn Aml>) -> Self {
        Self { name, children }
    }
}

impl Aml for PowerResource<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let mut content = Vec::new();
        self.name.to_aml_bytes(&mut content);
        let system_level = 0_u8;
        let order = 0_u16;
        content.push(system_level);
        content.extend_from_slice(&order.to_le_bytes());
        for child in &self.children {
            child.to_aml_bytes(&mut content);
        }
        sink.vec(&OPCODE);
        ops::package(&content, sink);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use acpi_tables::aml::{Method, Name, ONE};

    #[test]
    fn the_bytes_are_those_the_specification_asks_for() {
        let mut bytes = Vec::new();
        PowerResource::new("PWRR".into(), vec![&Name::new("_STA".into(), &ONE)]).to_aml_bytes(&mut bytes);
        assert_eq!(
            bytes, b"\x5b\x84\x0ePWRR\x00\x00\x00\x08_STA\x01",
            "ExtOpPrefix, PowerResOp, PkgLength, name, system level, order, then the objects"
        );
    }

    #[test]
    fn a_resource_longer_than_63_bytes_has_a_two_byte_length() {
        let mut bytes = Vec::new();
        let body: Vec<u8> = vec![1; 60];
        let terms = ops::Terms(body);
        PowerResource::new("PWRR".into(), vec![&Method::new("_ON_".into(), 0, true, vec![&terms])])
            .to_aml_bytes(&mut bytes);
        assert_eq!(bytes[..2], OPCODE);
        let length = usize::from(bytes[2] & 0x0f) | usize::from(bytes[3]) << 4;
        assert_eq!((bytes[2] >> 6, length), (1, bytes.len() - 2));
    }
}
