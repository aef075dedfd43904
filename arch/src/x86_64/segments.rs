//! How PCI segments share what the memory map keeps for PCI: configuration space (PCI Firmware Specification 3.3, section 4.1), and
//! the two windows for BARs.
//!
//! A machine of one segment has all of it, and is laid out as if there were no segments.

use vm_memory::GuestAddress;

use crate::layout::{AddressRange, LayoutError, MemoryMap, PCI_ECAM};

/// Configuration space of one bus.
pub const ECAM_PER_BUS: u64 = 1 << 20;

/// A share of the 32-bit window is a multiple of this: the granularity of a bridge's windows.
const ALIGN_32: u64 = 1 << 20;
/// And one of the 64-bit window of this, so that large BARs fit well.
const ALIGN_64: u64 = 1 << 30;

/// What a segment asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentNeeds {
    /// Buses: bus 0, and one behind each root port. Linux looks for devices on every bus that it is told of, and each look is an exit.
    pub buses: u16,
    /// Its weight when the 32-bit window is divided.
    pub mmio32_weight: u32,
    /// And the 64-bit window.
    pub mmio64_weight: u32,
}

/// What a segment has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentMap {
    /// Memory-mapped configuration space of its buses.
    pub ecam: AddressRange,
    /// Its 32-bit memory window.
    pub mmio32: AddressRange,
    /// Its 64-bit memory window.
    pub mmio64: AddressRange,
}

impl MemoryMap {
    /// Divides configuration space and windows among the segments.
    ///
    /// # Errors
    /// [`LayoutError::Buses`] or [`LayoutError::Share`].
    pub fn segments(&self, needs: &[SegmentNeeds]) -> Result<Vec<SegmentMap>, LayoutError> {
        let weights = |of: fn(&SegmentNeeds) -> u32| needs.iter().map(of).collect::<Vec<_>>();
        let mmio32 = divide(self.mmio32(), &weights(|need| need.mmio32_weight), ALIGN_32, "32-bit")?;
        let mmio64 = divide(self.mmio64(), &weights(|need| need.mmio64_weight), ALIGN_64, "64-bit")?;
        let buses = needs.iter().map(|need| u64::from(need.buses)).sum::<u64>();
        if buses > PCI_ECAM.len / ECAM_PER_BUS {
            return Err(LayoutError::Buses { buses });
        }
        let mut next = PCI_ECAM.start.0;
        let windows = mmio32.into_iter().zip(mmio64);
        Ok(needs
            .iter()
            .zip(windows)
            .map(|(need, (mmio32, mmio64))| {
                let ecam = AddressRange::new(GuestAddress(next), u64::from(need.buses) * ECAM_PER_BUS);
                next = ecam.end().0;
                SegmentMap { ecam, mmio32, mmio64 }
            })
            .collect())
    }
}

/// Parts of a window by weight, one after the other. Their sizes are multiples of `align`, or of 1 MiB where they are smaller.
fn divide(
    whole: AddressRange,
    weights: &[u32],
    align: u64,
    window: &'static str,
) -> Result<Vec<AddressRange>, LayoutError> {
    if weights.len() <= 1 {
        return Ok(vec![whole; weights.len()]);
    }
    let total: u128 = weights.iter().map(|weight| u128::from(*weight)).sum();
    let mut next = whole.start;
    (0..)
        .zip(weights)
        .map(|(segment, weight)| {
            let share = (u128::from(whole.len) * u128::from(*weight)).checked_div(total).unwrap_or(0);
            let share = u64::try_from(share).unwrap_or(whole.len);
            let len = share - share % if share >= align { align } else { ALIGN_32 };
            if len == 0 {
                return Err(LayoutError::Share { segment, window });
            }
            let part = AddressRange::new(next, len);
            next = part.end();
            Ok(part)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: SegmentNeeds = SegmentNeeds { buses: 1, mmio32_weight: 1, mmio64_weight: 1 };

    fn map(phys_bits: u8) -> MemoryMap {
        MemoryMap::new(512 << 20, phys_bits).unwrap()
    }

    #[test]
    fn a_lone_segment_has_both_windows_whole() {
        let map = map(46);
        let all = map.segments(&[SegmentNeeds { buses: 3, ..ONE }]).unwrap();
        let ecam = AddressRange::new(PCI_ECAM.start, 3 << 20);
        assert_eq!(all, [SegmentMap { ecam, mmio32: map.mmio32(), mmio64: map.mmio64() }]);
    }

    #[test]
    fn ninety_six_segments_fit_one_behind_the_other_even_in_a_small_address_space() {
        for bits in [36, 46, 52] {
            let map = map(bits);
            let all = map.segments(&[ONE; 96]).unwrap();
            for ranges in
                [all.iter().map(|s| s.mmio32).collect::<Vec<_>>(), all.iter().map(|s| s.mmio64).collect()]
            {
                assert!(ranges.iter().all(|range| range.len >= 1 << 20), "{bits} bits");
                assert!(ranges.windows(2).all(|pair| pair[0].end() <= pair[1].start));
            }
            assert!(all[95].mmio32.end() <= map.mmio32().end() && all[95].mmio64.end() <= map.mmio64().end());
            assert_eq!(all[95].ecam, AddressRange::new(GuestAddress(PCI_ECAM.start.0 + (95 << 20)), 1 << 20));
        }
    }

    #[test]
    fn a_segment_has_its_weight_of_each_window() {
        let heavy = SegmentNeeds { buses: 2, mmio32_weight: 3, mmio64_weight: 1 };
        let all = map(46).segments(&[ONE, heavy]).unwrap();
        assert_eq!((all[0].mmio32.len, all[1].mmio32.len), (128 << 20, 384 << 20));
        assert_eq!(all[0].mmio64.len, all[1].mmio64.len);
        assert_eq!(all[1].ecam.start.0, PCI_ECAM.start.0 + (1 << 20));
    }

    #[test]
    fn a_share_of_nothing_and_too_many_buses_are_refused() {
        let heavy = SegmentNeeds { mmio32_weight: u32::MAX, ..ONE };
        let error = map(46).segments(&[heavy, ONE]).unwrap_err();
        assert_eq!(error, LayoutError::Share { segment: 1, window: "32-bit" });
        let error = map(46).segments(&[SegmentNeeds { buses: 32, ..ONE }; 9]).unwrap_err();
        assert_eq!(error, LayoutError::Buses { buses: 288 });
    }
}
