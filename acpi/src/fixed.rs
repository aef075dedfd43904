//! The tables that are plain structures (ACPI 6.5): FADT (section 5.2.9), MADT (5.2.12), FACS (5.2.10), and MCFG (PCI
//! Firmware Specification 3.3, section 4.1.2).

use acpi_tables::Aml;
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::mcfg::MCFG;
use acpi_tables::sdt::Sdt;

use crate::pci_root::last_bus;
use crate::platform::{FixedHardwareDescription, PlatformDescription, RTC_CENTURY_BYTE};
use crate::pm1;

pub(crate) const OEM_ID: [u8; 6] = *b"DORMSE";
pub(crate) const OEM_TABLE_ID: [u8; 8] = *b"DORMOUSE";
pub(crate) const OEM_REVISION: u32 = 1;

/// Length of the header that all tables but FACS share.
pub(crate) const HEADER_LENGTH: u32 = 36;

/// IA-PC boot architecture flags (table 5.10). Absent from them: an i8042 to look for (its reset line works all the same)
/// and legacy devices, all of which the DSDT lists.
mod boot_architecture {
    pub(super) const VGA_NOT_PRESENT: u16 = 1 << 2;
    /// The links of assigned devices are the host's to manage.
    pub(super) const ASPM_NOT_SUPPORTED: u16 = 1 << 4;
    pub(super) const RTC_NOT_PRESENT: u16 = 1 << 5;
}

/// Latencies that say: there is no such processor power state (table 5.9).
const NO_C2: u16 = 101;
const NO_C3: u16 = 1001;

/// The fixed ACPI description table.
pub(crate) fn fadt(platform: &PlatformDescription, dsdt: u64, facs: u64) -> Vec<u8> {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .firmware_ctrl_64(facs)
        .preferred_pm_profile(PmProfile::Unspecified)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        // Both buttons, were there any, are control-method devices.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::LowPowerS0IdleCapable);
    fadt.p_lvl2_lat = NO_C2.into();
    fadt.p_lvl3_lat = NO_C3.into();
    fadt.reset_reg = memory_byte(platform.reset.address);
    fadt.reset_value = platform.reset.value;

    let mut boot = boot_architecture::VGA_NOT_PRESENT | boot_architecture::ASPM_NOT_SUPPORTED;
    if platform.rtc.is_some() {
        fadt.century = RTC_CENTURY_BYTE;
    } else {
        boot |= boot_architecture::RTC_NOT_PRESENT;
    }
    fadt.iapc_boot_arch = boot.into();

    let FixedHardwareDescription { event_block, control_block, sci } = platform.fixed_hardware;
    fadt.sci_int = u16::from(sci).into();
    fadt.pm1a_evt_blk = u32::from(event_block).into();
    fadt.pm1_evt_len = pm1::EVENT_BLOCK_SIZE;
    fadt.x_pm1a_evt_blk = ports(event_block, pm1::EVENT_BLOCK_SIZE);
    fadt.pm1a_cnt_blk = u32::from(control_block).into();
    fadt.pm1_cnt_len = pm1::CONTROL_BLOCK_SIZE;
    fadt.x_pm1a_cnt_blk = ports(control_block, pm1::CONTROL_BLOCK_SIZE);
    bytes(&fadt.finalize())
}

/// The firmware control structure. Nothing in it is used, but fixed hardware must have one.
pub(crate) fn facs() -> Vec<u8> {
    bytes(&FACS::new())
}

/// The table of memory-mapped configuration space.
pub(crate) fn mcfg(platform: &PlatformDescription) -> Vec<u8> {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for pci in &platform.pci {
        mcfg.add_ecam(pci.ecam.base, pci.segment, 0, last_bus(pci.ecam));
    }
    bytes(&mcfg)
}

/// Interrupt controller structures (table 5.21 and those after it).
mod structure {
    pub(super) const LOCAL_APIC: u8 = 0;
    pub(super) const IO_APIC: u8 = 1;
    pub(super) const INTERRUPT_SOURCE_OVERRIDE: u8 = 2;
    pub(super) const LOCAL_APIC_NMI: u8 = 4;
    pub(super) const LOCAL_X2APIC: u8 = 9;
    pub(super) const LOCAL_X2APIC_NMI: u8 = 10;
}

const MADT_REVISION: u8 = 6;
/// There are 8259s beside the APICs, to be masked.
const MADT_PCAT_COMPATIBLE: u32 = 1;
/// The processor is there.
pub(crate) const PROCESSOR_ENABLED: u32 = 1;
/// The processor is not there and may come while the system runs.
const PROCESSOR_ONLINE_CAPABLE: u32 = 1 << 1;
/// Interrupt flags (table 5.26): edge-triggered, active high.
const EDGE_HIGH: u16 = 1 << 2 | 1;
/// The local interrupt pin that NMI is wired to.
const NMI_LINT: u8 = 1;

/// The multiple APIC description table.
pub(crate) fn madt(platform: &PlatformDescription) -> Vec<u8> {
    let mut madt = Sdt::new(*b"APIC", HEADER_LENGTH, MADT_REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    madt.append_slice(&platform.interrupts.local_apic_address.to_le_bytes());
    madt.append_slice(&MADT_PCAT_COMPATIBLE.to_le_bytes());

    let mut structures = Vec::new();
    let present = platform.processor_hotplug.map_or(usize::MAX, |hotplug| hotplug.present);
    let mut x2apic = false;
    for (number, apic_id) in platform.processors.iter().enumerate() {
        let flags = if number < present { PROCESSOR_ENABLED } else { PROCESSOR_ONLINE_CAPABLE };
        let entry = local_apic(u32::try_from(number).unwrap_or(u32::MAX), *apic_id, flags);
        x2apic |= entry.first() == Some(&structure::LOCAL_X2APIC);
        structures.extend_from_slice(&entry);
    }
    structures.extend_from_slice(&[structure::IO_APIC, 12, platform.interrupts.io_apic_id, 0]);
    let first_gsi = 0_u32;
    for field in [platform.interrupts.io_apic_address, first_gsi] {
        structures.extend_from_slice(&field.to_le_bytes());
    }
    let (isa_bus, sci) = (0, platform.fixed_hardware.sci);
    structures.extend_from_slice(&[structure::INTERRUPT_SOURCE_OVERRIDE, 10, isa_bus, sci]);
    structures.extend_from_slice(&u32::from(sci).to_le_bytes());
    structures.extend_from_slice(&EDGE_HIGH.to_le_bytes());
    let conforming = 0_u16.to_le_bytes();
    structures.extend_from_slice(&[
        structure::LOCAL_APIC_NMI,
        6,
        u8::MAX,
        conforming[0],
        conforming[1],
        NMI_LINT,
    ]);
    if x2apic {
        structures.extend_from_slice(&[structure::LOCAL_X2APIC_NMI, 12, conforming[0], conforming[1]]);
        structures.extend_from_slice(&u32::MAX.to_le_bytes());
        structures.extend_from_slice(&[NMI_LINT, 0, 0, 0]);
    }
    madt.append_slice(&structures);
    madt.as_slice().to_vec()
}

/// The interrupt controller structure of a processor.
pub(crate) fn local_apic(uid: u32, apic_id: u32, flags: u32) -> Vec<u8> {
    // 255 is the broadcast id of an APIC, and means all processors as a UID.
    if let (Ok(uid @ ..=254), Ok(apic_id @ ..=254)) = (u8::try_from(uid), u8::try_from(apic_id)) {
        let mut entry = vec![structure::LOCAL_APIC, 8, uid, apic_id];
        entry.extend_from_slice(&flags.to_le_bytes());
        return entry;
    }
    let mut entry = vec![structure::LOCAL_X2APIC, 16, 0, 0];
    for field in [apic_id, flags, uid] {
        entry.extend_from_slice(&field.to_le_bytes());
    }
    entry
}

fn memory_byte(address: u64) -> GAS {
    GAS::new(AddressSpace::SystemMemory, 8, 0, AccessSize::ByteAccess, address)
}

fn ports(base: u16, size: u8) -> GAS {
    GAS::new(AddressSpace::SystemIo, size.saturating_mul(8), 0, AccessSize::WordAccess, u64::from(base))
}

pub(crate) fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}
