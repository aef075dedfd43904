//! What the guest sees of an assigned function's configuration space: the host's bytes, patched, and the shadow
//! that answers while the function sleeps.
//!
//! Follows PCI Local Bus 3.0 section 6.7 (capability list) and PCI Express Base 6.0 section 7.6 (extended
//! capabilities). Both lists come from a device and so are not to be trusted: walks are bounded, and a list that
//! loops or points into the header is refused.

use pci::Bdf;

/// Bytes of extended configuration space.
pub const CONFIG_SIZE: usize = 4096;
/// Bytes of conventional configuration space.
const CONVENTIONAL_SIZE: usize = 256;

const STATUS: usize = 0x06;
const STATUS_CAP_LIST: u8 = 1 << 4;
const HEADER_TYPE: usize = 0x0e;
const HEADER_MULTI_FUNCTION: u8 = 1 << 7;
const CAP_POINTER: usize = 0x34;

/// Capability ids (PCI Code and ID Assignment 1.14, section 2).
const CAP_PM: u8 = 0x01;
const CAP_MSI: u8 = 0x05;
const CAP_VENDOR: u8 = 0x09;
const CAP_PCIE: u8 = 0x10;
const CAP_MSIX: u8 = 0x11;

/// PCI Express device/port types in bits 7:4 of the PCI Express Capabilities register (section 7.5.3.2).
const PCIE_TYPE_ENDPOINT: u8 = 0x0;
const PCIE_TYPE_RC_ENDPOINT: u8 = 0x9;

/// Address Translation Services (section 10.5.1).
const ATS: u16 = 0x000f;

/// Extended capabilities that make no sense in a guest: it would size BARs the host has sized (ReBAR), make
/// functions it does not own (SR-IOV), number functions in a way its root port does not route (ARI), or use
/// translations that no virtual IOMMU gives (ATS, PRI, PASID).
const HIDDEN_EXTENDED: [u16; 7] = [0x000e, ATS, 0x0010, 0x0013, 0x0015, 0x001b, 0x0024];

/// A capability list that cannot be followed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "device {bdf}: its {list} list {fault} at {offset:#x}; the device is broken or half asleep: reset it with \
     'echo 1 > /sys/bus/pci/devices/{bdf}/reset' and try again"
)]
pub struct CapabilityError {
    bdf: Bdf,
    list: &'static str,
    fault: &'static str,
    offset: usize,
}

/// Where the capabilities lie that the VMM answers itself or looks at; offsets in configuration space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// Power Management.
    pub pm: Option<u16>,
    /// MSI.
    pub msi: Option<u16>,
    /// MSI-X.
    pub msix: Option<u16>,
    /// PCI Express.
    pub pcie: Option<u16>,
}

/// The configuration space of a function, byte by byte, as last seen.
pub struct ConfigShadow {
    bytes: Box<[u8; CONFIG_SIZE]>,
    /// Bits that the guest does not see as the host has them, and what it sees instead.
    patches: Vec<Patch>,
    capabilities: Capabilities,
    vendor: Vec<u16>,
    /// Whether it can keep translations of addresses (ATS; section 10.5.1).
    translations: bool,
}

#[derive(Clone, Copy, Debug)]
struct Patch {
    offset: usize,
    mask: u8,
    value: u8,
}

impl std::fmt::Debug for ConfigShadow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConfigShadow")
            .field("capabilities", &self.capabilities)
            .field("patches", &self.patches)
            .finish_non_exhaustive()
    }
}

impl ConfigShadow {
    /// From the function's whole configuration space. `multi_function`: the guest's slot has other functions too.
    pub fn new(
        bdf: Bdf,
        bytes: Box<[u8; CONFIG_SIZE]>,
        multi_function: bool,
    ) -> Result<Self, CapabilityError> {
        let (capabilities, vendor) = walk_conventional(bdf, &bytes)?;
        let mut patches = vec![Patch {
            offset: HEADER_TYPE,
            mask: HEADER_MULTI_FUNCTION,
            value: if multi_function { HEADER_MULTI_FUNCTION } else { 0 },
        }];
        let mut translations = false;
        for offset in walk_extended(bdf, &bytes)? {
            let id = u16::from_le_bytes([bytes[offset], bytes[offset + 1]]);
            translations |= id == ATS;
            if HIDDEN_EXTENDED.contains(&id) {
                // The null capability keeps its place in the list (section 7.9.28).
                patches.extend([offset, offset + 1].map(|offset| Patch { offset, mask: 0xff, value: 0 }));
            }
        }
        if let Some(pcie) = capabilities.pcie.map(usize::from) {
            // A function of the host's root complex becomes one behind a root port.
            if bytes[pcie + 2] >> 4 == PCIE_TYPE_RC_ENDPOINT {
                patches.push(Patch { offset: pcie + 2, mask: 0xf0, value: PCIE_TYPE_ENDPOINT << 4 });
            }
        }
        Ok(Self { bytes, patches, capabilities, vendor, translations })
    }

    /// Where the capabilities lie.
    pub fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    /// Whether the function can keep translations of addresses.
    pub fn has_translation_cache(&self) -> bool {
        self.translations
    }

    /// Where the vendor-specific capabilities lie, each at least 16 bytes from the end of conventional space.
    pub fn vendor_capabilities(&self) -> &[u16] {
        &self.vendor
    }

    /// Reads the shadow as the host has it.
    pub fn raw(&self, offset: usize, data: &mut [u8]) {
        let bytes = self.bytes.get(offset..).unwrap_or_default();
        data.iter_mut().zip(bytes).for_each(|(byte, shadow)| *byte = *shadow);
    }

    /// A 16-bit register as the host has it.
    pub fn raw_u16(&self, offset: u16) -> u16 {
        let mut data = [0xff; 2];
        self.raw(usize::from(offset), &mut data);
        u16::from_le_bytes(data)
    }

    /// A 32-bit register as the host has it.
    pub fn raw_u32(&self, offset: u16) -> u32 {
        let mut data = [0xff; 4];
        self.raw(usize::from(offset), &mut data);
        u32::from_le_bytes(data)
    }

    /// Notes what the host just answered, or was just told.
    pub fn note(&mut self, offset: usize, data: &[u8]) {
        if let Some(bytes) = self.bytes.get_mut(offset..offset.saturating_add(data.len())) {
            bytes.copy_from_slice(data);
        }
    }

    /// Replaces what the guest does not see as the host has it in `data`, read at `offset`.
    pub fn patch(&self, offset: usize, data: &mut [u8]) {
        for patch in &self.patches {
            let byte = patch.offset.checked_sub(offset).and_then(|index| data.get_mut(index));
            if let Some(byte) = byte {
                *byte = *byte & !patch.mask | patch.value;
            }
        }
    }
}

type Found = (Capabilities, Vec<u16>);

fn walk_conventional(bdf: Bdf, bytes: &[u8; CONFIG_SIZE]) -> Result<Found, CapabilityError> {
    let error = |fault, offset| CapabilityError { bdf, list: "capability", fault, offset };
    let (mut found, mut vendor) = (Capabilities::default(), Vec::new());
    if bytes[STATUS] & STATUS_CAP_LIST == 0 {
        return Ok((found, vendor));
    }
    let mut seen = [false; CONVENTIONAL_SIZE / 4];
    let mut next = usize::from(bytes[CAP_POINTER] & !3);
    while next != 0 {
        if next < 0x40 {
            return Err(error("points into the header", next));
        }
        if std::mem::replace(&mut seen[next / 4], true) {
            return Err(error("loops", next));
        }
        let position = u16::try_from(next).ok();
        if bytes[next] == CAP_VENDOR && next + 16 <= CONVENTIONAL_SIZE {
            vendor.extend(position);
        }
        let slot = match bytes[next] {
            CAP_PM => Some(&mut found.pm),
            CAP_MSI => Some(&mut found.msi),
            CAP_MSIX => Some(&mut found.msix),
            CAP_PCIE => Some(&mut found.pcie),
            0xff => return Err(error("reads all ones", next)),
            _ => None,
        };
        if let Some(slot) = slot {
            // Every capability looked at here is at least this long; one that runs out of the space is broken.
            if next + 12 > CONVENTIONAL_SIZE && bytes[next] != CAP_PM || next + 8 > CONVENTIONAL_SIZE {
                return Err(error("ends past configuration space", next));
            }
            slot.get_or_insert(position.unwrap_or_default());
        }
        next = usize::from(bytes[next + 1] & !3);
    }
    Ok((found, vendor))
}

fn walk_extended(bdf: Bdf, bytes: &[u8; CONFIG_SIZE]) -> Result<Vec<usize>, CapabilityError> {
    let error = |fault, offset| CapabilityError { bdf, list: "extended capability", fault, offset };
    let header = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let mut found = Vec::new();
    let mut seen = [false; CONFIG_SIZE / 4];
    let mut next = CONVENTIONAL_SIZE;
    while next != 0 {
        let value = header(next);
        if value == 0 || value == u32::MAX && next == CONVENTIONAL_SIZE {
            // No extended space behind this function.
            break;
        }
        if std::mem::replace(&mut seen[next / 4], true) {
            return Err(error("loops", next));
        }
        found.push(next);
        next = usize::try_from(value >> 20).unwrap_or(0) & !3;
        if next != 0 && next < CONVENTIONAL_SIZE {
            return Err(error("points out of extended space", next));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bdf() -> Bdf {
        "0000:01:00.0".parse().unwrap()
    }

    fn space(caps: &[(usize, u8, u8)]) -> Box<[u8; CONFIG_SIZE]> {
        let mut bytes = Box::new([0; CONFIG_SIZE]);
        bytes[STATUS] = STATUS_CAP_LIST;
        bytes[CAP_POINTER] = u8::try_from(caps.first().map_or(0, |cap| cap.0)).unwrap();
        for &(at, id, next) in caps {
            bytes[at] = id;
            bytes[at + 1] = next;
        }
        bytes
    }

    #[test]
    fn capabilities_are_found_in_any_order() {
        let shadow = ConfigShadow::new(
            bdf(),
            space(&[(0xa0, CAP_MSIX, 0x40), (0x40, CAP_PM, 0x50), (0x50, CAP_PCIE, 0)]),
            false,
        )
        .unwrap();
        let expected = Capabilities { pm: Some(0x40), msi: None, msix: Some(0xa0), pcie: Some(0x50) };
        assert_eq!(shadow.capabilities(), expected);
    }

    #[test]
    fn a_list_that_loops_is_refused_whatever_the_length_of_the_loop() {
        for length in [1, 2, 48] {
            let caps: Vec<_> = (0..length)
                .map(|i| (0x40 + 4 * i, 0x09, u8::try_from(0x40 + 4 * ((i + 1) % length)).unwrap()))
                .collect();
            let error = ConfigShadow::new(bdf(), space(&caps), false).unwrap_err();
            assert!(error.to_string().contains("loops"), "{error}");
        }
    }

    #[test]
    fn a_pointer_into_the_header_and_a_space_of_all_ones_are_refused() {
        assert!(ConfigShadow::new(bdf(), space(&[(0x40, 0x09, 0x10)]), false).is_err());
        assert!(ConfigShadow::new(bdf(), Box::new([0xff; CONFIG_SIZE]), false).is_err());
        assert!(ConfigShadow::new(bdf(), space(&[(0xfc, CAP_MSIX, 0)]), false).is_err());
    }

    #[test]
    fn an_extended_list_that_loops_is_refused_and_sriov_becomes_a_null_capability() {
        let mut bytes = space(&[]);
        bytes[0x100..0x104].copy_from_slice(&(0x2000_0000 | 0x1_0001_u32).to_le_bytes());
        bytes[0x200..0x204].copy_from_slice(&0x0001_0010_u32.to_le_bytes());
        let shadow = ConfigShadow::new(bdf(), bytes.clone(), false).unwrap();
        let mut data = [0; 4];
        shadow.raw(0x200, &mut data);
        shadow.patch(0x200, &mut data);
        assert_eq!(u32::from_le_bytes(data), 0x0001_0000);
        bytes[0x200..0x204].copy_from_slice(&0x1000_0010_u32.to_le_bytes());
        assert!(ConfigShadow::new(bdf(), bytes, false).is_err());
    }

    #[test]
    fn the_multi_function_bit_is_the_guests_slot_not_the_hosts() {
        let mut bytes = space(&[]);
        bytes[HEADER_TYPE] = HEADER_MULTI_FUNCTION;
        for multi in [false, true] {
            let shadow = ConfigShadow::new(bdf(), bytes.clone(), multi).unwrap();
            let mut data = [0; 2];
            shadow.raw(HEADER_TYPE - 1, &mut data);
            shadow.patch(HEADER_TYPE - 1, &mut data);
            assert_eq!(data[1] == HEADER_MULTI_FUNCTION, multi);
        }
    }
}
