//! AML terms that the table-generating library lacks (ACPI 6.5, section 20.2).

use acpi_tables::{Aml, AmlSink};

const EXTENDED: u8 = 0x5b;

/// `Timer`: a clock that never goes back, in units of 100 ns (section 20.2.5.4, TimerOp).
pub(crate) struct Timer;

impl Aml for Timer {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&[EXTENDED, 0x33]);
    }
}

/// `Sleep (milliseconds)`: lets other methods and other tasks run meanwhile (section 20.2.5.3, DefSleep).
pub(crate) struct Sleep(pub(crate) u8);

impl Aml for Sleep {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&[EXTENDED, 0x22]);
        self.0.to_aml_bytes(sink);
    }
}

/// `Break`: leaves the innermost `While` (section 20.2.5.3, DefBreak).
pub(crate) struct Break;

impl Aml for Break {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.byte(0xa5);
    }
}

/// Terms one after the other, where the library wants a list that is known only at run time.
pub(crate) struct Terms(pub(crate) Vec<u8>);

impl Terms {
    pub(crate) fn new() -> Self {
        Self(Vec::new())
    }

    pub(crate) fn push(&mut self, term: &dyn Aml) {
        term.to_aml_bytes(&mut self.0);
    }
}

impl Aml for Terms {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// Writes a package length (section 20.2.4) for `content`, and then `content`.
///
/// The length counts its own bytes: one up to 63, else two to four, of which the first holds the count of the others and
/// the low four bits. Four bytes reach 256 MiB, far past any table.
pub(crate) fn package(content: &[u8], sink: &mut dyn AmlSink) {
    let following = match content.len() {
        0..=0x3e => 0,
        0x3f..=0xffd => 1,
        0xffe..=0xf_fffc => 2,
        _ => 3,
    };
    let length = content.len() + 1 + following;
    let low_byte = |value: usize| value.to_le_bytes()[0];
    if following == 0 {
        sink.byte(low_byte(length));
    } else {
        sink.byte(low_byte(following << 6) | low_byte(length) & 0x0f);
        sink.vec(&(length >> 4).to_le_bytes()[..following]);
    }
    sink.vec(content);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn package_lengths_grow_exactly_when_they_must() {
        for (content, expected) in [
            (0, &[0x01][..]),
            (0x3e, &[0x3f]),
            (0x3f, &[0x41, 0x04]),
            (0xffd, &[0x4f, 0xff]),
            (0xffe, &[0x81, 0x00, 0x01]),
            (0xf_fffc, &[0x8f, 0xff, 0xff]),
            (0xf_fffd, &[0xc1, 0x00, 0x00, 0x01]),
        ] {
            let mut bytes = Vec::new();
            package(&vec![0; content], &mut bytes);
            assert_eq!(&bytes[..expected.len()], expected, "{content:#x}");
            assert_eq!(bytes.len(), content + expected.len());
        }
    }
}
