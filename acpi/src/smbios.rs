//! SMBIOS 3.0 tables (DMTF DSP0134, version 3.0.0): who made this machine.
//!
//! Two of its fields matter to power. A root port is let into D3 by Linux on x86 only when the BIOS date is 2015 or later, and the
//! chassis type is what NVIDIA's driver takes a notebook by; a virtual machine is "other".

/// Where the entry point must start: anywhere in 0xF0000 to 0xFFFFF at a multiple of 16, where the guest looks for it.
pub const ENTRY_POINT_ALIGNMENT: u64 = 16;

const BIOS_VENDOR: &str = "Dormouse";
const BIOS_VERSION: &str = env!("CARGO_PKG_VERSION");
const BIOS_RELEASE_DATE: &str = "01/01/2026";
const DEFAULT_MANUFACTURER: &str = "Dormouse";
const DEFAULT_PRODUCT_NAME: &str = "Dormouse VM";

const ENTRY_POINT_LENGTH: u8 = 24;
/// From the entry point to the first structure.
const STRUCTURES_OFFSET: u64 = 32;

/// Structure types (chapter 7).
mod kind {
    pub(super) const BIOS: u8 = 0;
    pub(super) const SYSTEM: u8 = 1;
    pub(super) const CHASSIS: u8 = 3;
    pub(super) const OEM_STRINGS: u8 = 11;
    pub(super) const END: u8 = 127;
}

/// What the operator may say of the machine. Fields that are `None` have defaults or are left empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SystemIdentity {
    /// Manufacturer of the system and of the chassis.
    pub manufacturer: Option<String>,
    /// Product name.
    pub product_name: Option<String>,
    /// Product version.
    pub version: Option<String>,
    /// Serial number of the system.
    pub serial_number: Option<String>,
    /// UUID of the system, its bytes in the order in which they are written.
    pub uuid: Option<[u8; 16]>,
    /// Stock-keeping unit.
    pub sku_number: Option<String>,
    /// Product family.
    pub family: Option<String>,
    /// Asset tag of the chassis.
    pub chassis_asset_tag: Option<String>,
    /// Type of the chassis (table 17, values 1 to 36); "other" when `None`.
    pub chassis_type: Option<u8>,
    /// Free-form strings for the software in the guest.
    pub oem_strings: Vec<String>,
}

/// Why the tables cannot be generated.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SmbiosError {
    /// A string contains a NUL byte, which ends a string in the table.
    #[error("the SMBIOS string {0:?} contains a NUL character; remove it")]
    NulInString(String),
    /// More OEM strings than one structure can number.
    #[error("there are {0} OEM strings; SMBIOS can hold at most 255; give fewer")]
    TooManyStrings(usize),
    /// The entry point is at no address where a guest would look.
    #[error("the SMBIOS entry point cannot be at {0:#x}: it must be a multiple of 16 in 0xf0000 to 0xfffff")]
    Address(u64),
    /// The tables do not fit in the 32-bit length of the entry point.
    #[error("the SMBIOS tables take {0} bytes, which is too long; use shorter strings")]
    TooLong(usize),
}

/// Generates the entry point, which is to be put at `entry_point`, and the structures after it, in one piece.
pub fn build(identity: &SystemIdentity, entry_point: u64) -> Result<Vec<u8>, SmbiosError> {
    if !entry_point.is_multiple_of(ENTRY_POINT_ALIGNMENT) || !(0xf_0000..0x10_0000).contains(&entry_point) {
        return Err(SmbiosError::Address(entry_point));
    }
    let structures = structures(identity)?;
    let length = u32::try_from(structures.len()).map_err(|_| SmbiosError::TooLong(structures.len()))?;

    let mut bytes = b"_SM3_".to_vec();
    let (checksum, major, minor, revision) = (0, 3, 0, 0);
    let (entry_point_revision, reserved) = (1, 0);
    bytes.extend_from_slice(&[
        checksum,
        ENTRY_POINT_LENGTH,
        major,
        minor,
        revision,
        entry_point_revision,
        reserved,
    ]);
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(&(entry_point + STRUCTURES_OFFSET).to_le_bytes());
    let sum = bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    bytes[5] = sum.wrapping_neg();
    bytes.resize(bytes.len().next_multiple_of(16), 0);
    bytes.extend_from_slice(&structures);
    Ok(bytes)
}

fn structures(identity: &SystemIdentity) -> Result<Vec<u8>, SmbiosError> {
    let manufacturer = identity.manufacturer.as_deref().or(Some(DEFAULT_MANUFACTURER));
    let mut table = Table::default();
    table.bios()?;
    table.system(identity, manufacturer)?;
    table.chassis(identity, manufacturer)?;
    if !identity.oem_strings.is_empty() {
        table.oem_strings(&identity.oem_strings)?;
    }
    Structure::new(kind::END).add_to(&mut table);
    Ok(table.bytes)
}

#[derive(Default)]
struct Table {
    bytes: Vec<u8>,
    count: u16,
}

impl Table {
    /// Section 7.1.
    fn bios(&mut self) -> Result<(), SmbiosError> {
        const CHARACTERISTICS_NOT_SUPPORTED: u64 = 1 << 3;
        const ACPI_SUPPORTED: u8 = 1 << 0;
        const TARGETED_CONTENT_DISTRIBUTION: u8 = 1 << 2;
        const IS_VIRTUAL_MACHINE: u8 = 1 << 4;
        const UNKNOWN_RELEASE: u8 = 0xff;
        let (start_segment, rom_size) = (0_u16, 0);
        let mut structure = Structure::new(kind::BIOS);
        structure.string(Some(BIOS_VENDOR))?;
        structure.string(Some(BIOS_VERSION))?;
        structure.bytes(&start_segment.to_le_bytes());
        structure.string(Some(BIOS_RELEASE_DATE))?;
        structure.bytes(&[rom_size]);
        structure.bytes(&CHARACTERISTICS_NOT_SUPPORTED.to_le_bytes());
        structure.bytes(&[ACPI_SUPPORTED, TARGETED_CONTENT_DISTRIBUTION | IS_VIRTUAL_MACHINE]);
        // Releases of the BIOS and of the embedded controller, each as major and minor.
        structure.bytes(&[UNKNOWN_RELEASE; 4]);
        structure.add_to(self);
        Ok(())
    }

    /// Section 7.2.
    fn system(&mut self, identity: &SystemIdentity, manufacturer: Option<&str>) -> Result<(), SmbiosError> {
        const WAKE_UP_POWER_SWITCH: u8 = 6;
        let mut structure = Structure::new(kind::SYSTEM);
        structure.string(manufacturer)?;
        structure.string(identity.product_name.as_deref().or(Some(DEFAULT_PRODUCT_NAME)))?;
        structure.string(identity.version.as_deref())?;
        structure.string(identity.serial_number.as_deref())?;
        structure.bytes(&little_endian_uuid(identity.uuid.unwrap_or_default()));
        structure.bytes(&[WAKE_UP_POWER_SWITCH]);
        structure.string(identity.sku_number.as_deref())?;
        structure.string(identity.family.as_deref())?;
        structure.add_to(self);
        Ok(())
    }

    /// Section 7.4.
    fn chassis(&mut self, identity: &SystemIdentity, manufacturer: Option<&str>) -> Result<(), SmbiosError> {
        const OTHER: u8 = 1;
        const SAFE: u8 = 3;
        const SECURITY_NONE: u8 = 3;
        let no_oem_data = 0_u32;
        let (height, power_cords, elements, element_length) = (0, 0, 0, 0);
        let mut structure = Structure::new(kind::CHASSIS);
        structure.string(manufacturer)?;
        structure.bytes(&[identity.chassis_type.unwrap_or(OTHER)]);
        let (version, serial_number) = (None, None);
        structure.string(version)?;
        structure.string(serial_number)?;
        structure.string(identity.chassis_asset_tag.as_deref())?;
        // Boot-up, power supply and thermal state.
        structure.bytes(&[SAFE, SAFE, SAFE, SECURITY_NONE]);
        structure.bytes(&no_oem_data.to_le_bytes());
        structure.bytes(&[height, power_cords, elements, element_length]);
        structure.add_to(self);
        Ok(())
    }

    /// Section 7.12.
    fn oem_strings(&mut self, strings: &[String]) -> Result<(), SmbiosError> {
        let count = u8::try_from(strings.len()).map_err(|_| SmbiosError::TooManyStrings(strings.len()))?;
        let mut structure = Structure::new(kind::OEM_STRINGS);
        structure.bytes(&[count]);
        for string in strings {
            // An empty string would end the structure; a space keeps the numbers of those after it.
            structure.unreferenced_string(if string.is_empty() { " " } else { string })?;
        }
        structure.add_to(self);
        Ok(())
    }
}

/// A structure: formatted part, then the strings it refers to by number (section 6.1).
struct Structure {
    kind: u8,
    formatted: Vec<u8>,
    strings: Vec<u8>,
    string_count: u8,
}

impl Structure {
    fn new(kind: u8) -> Self {
        Self { kind, formatted: Vec::new(), strings: Vec::new(), string_count: 0 }
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.formatted.extend_from_slice(bytes);
    }

    /// Appends a string and its number to the formatted part; number 0 says that there is none.
    fn string(&mut self, string: Option<&str>) -> Result<(), SmbiosError> {
        let number = match string.filter(|string| !string.is_empty()) {
            Some(string) => self.unreferenced_string(string)?,
            None => 0,
        };
        self.bytes(&[number]);
        Ok(())
    }

    fn unreferenced_string(&mut self, string: &str) -> Result<u8, SmbiosError> {
        if string.contains('\0') {
            return Err(SmbiosError::NulInString(string.to_owned()));
        }
        self.strings.extend_from_slice(string.as_bytes());
        self.strings.push(0);
        self.string_count = self.string_count.saturating_add(1);
        Ok(self.string_count)
    }

    fn add_to(self, table: &mut Table) {
        const HEADER_LENGTH: u8 = 4;
        // No formatted part here is longer than a few dozen bytes.
        let length = u8::try_from(self.formatted.len()).unwrap_or(u8::MAX).saturating_add(HEADER_LENGTH);
        let handle = table.count;
        table.bytes.extend_from_slice(&[self.kind, length]);
        table.bytes.extend_from_slice(&handle.to_le_bytes());
        table.bytes.extend_from_slice(&self.formatted);
        table.bytes.extend_from_slice(&self.strings);
        // The strings end with an empty one; without any string there are two NULs.
        let terminator: &[u8] = if self.strings.is_empty() { &[0, 0] } else { &[0] };
        table.bytes.extend_from_slice(terminator);
        table.count = table.count.saturating_add(1);
    }
}

/// SMBIOS keeps the first three fields of a UUID little-endian (section 7.2.1).
fn little_endian_uuid(mut uuid: [u8; 16]) -> [u8; 16] {
    uuid[..4].reverse();
    uuid[4..6].reverse();
    uuid[6..8].reverse();
    uuid
}

#[cfg(test)]
mod tests;
