//! Putting the tables together: placement, pointers and checksums (ACPI 6.5, section 5.2).
//!
//! ```text
//! RSDP ──> XSDT ──> FADT ──> DSDT, FACS
//!               ──> MADT
//!               ──> MCFG
//!               ──> SRAT, SLIT                         where there are nodes, or memory may be added
//! ```

use std::collections::BTreeSet;

use acpi_tables::fadt::FADT;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use pci::DevFn;

use crate::affinity;
use crate::dsdt;
use crate::event_abi::SEGMENT_COUNT;
use crate::fixed::{self, HEADER_LENGTH, OEM_ID, OEM_REVISION, OEM_TABLE_ID, bytes};
use crate::notify_abi::{self, ResourceIndex};
use crate::platform::{AddressRange, FunctionDescription, PciDescription, PlatformDescription};
use crate::processor_abi::{self, PROCESSOR_COUNT};

/// Tables start at multiples of this; FACS needs it, the others take it.
const ALIGNMENT: u64 = 64;
/// Revision of a DSDT whose integers have 64 bits.
const DSDT_REVISION: u8 = 2;
/// A processor's node is called `C` and three hexadecimal digits.
const MAX_PROCESSORS: usize = 0x1000;

/// A table and where to put it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlacedTable {
    /// Its signature; `RSD PTR ` is shortened to `RSDP`.
    pub signature: [u8; 4],
    /// Guest physical address.
    pub address: u64,
    /// Its contents.
    pub bytes: Vec<u8>,
}

impl PlacedTable {
    fn end(&self) -> u64 {
        self.address.saturating_add(self.bytes.len() as u64)
    }
}

/// All tables, ready to be copied to guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcpiTables {
    /// Address of the RSDP: that of the area.
    pub rsdp: u64,
    /// The tables, from low to high addresses, not overlapping. The first is the RSDP.
    pub tables: Vec<PlacedTable>,
}

impl AcpiTables {
    /// The table with this signature.
    pub fn table(&self, signature: [u8; 4]) -> Option<&PlacedTable> {
        self.tables.iter().find(|table| table.signature == signature)
    }
}

/// Why a machine cannot be described.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// The area does not start at a multiple of 64.
    #[error("the ACPI tables cannot start at {0:#x}: the address must be a multiple of 64")]
    UnalignedArea(u64),
    /// No vCPU, or more than the tables can name.
    #[error("the ACPI tables can describe 1 to {MAX_PROCESSORS} vCPUs, not {0}")]
    Processors(usize),
    /// More than the registers can name, or more there than there can be.
    #[error(
        "{present} of {processors} processors cannot come and go: 1 to all of them can be there, of at most {PROCESSOR_COUNT}"
    )]
    PresentProcessors {
        /// How many are there at boot.
        present: usize,
        /// How many there can be.
        processors: usize,
    },
    /// A range is empty, or does not fit where it has to.
    #[error(
        "the {what} at {base:#x} of {size:#x} bytes cannot be described: it is empty, wraps around or leaves its space"
    )]
    Range {
        /// What the range is for.
        what: &'static str,
        /// Its first address.
        base: u64,
        /// Its length.
        size: u64,
    },
    /// No PCI segment, more than there is room for, or not in the order of their numbers.
    #[error(
        "the ACPI tables can describe 1 to {SEGMENT_COUNT} PCI segments, numbered from 0 on, not these {0}"
    )]
    Segments(usize),
    /// Two functions are at one address.
    #[error("two functions are at {devfn} of one bus 0 or below one root port")]
    DuplicateFunction {
        /// Their address.
        devfn: DevFn,
    },
    /// Two functions have one power resource.
    #[error("power resource {0} is given to two functions; each needs one of its own")]
    DuplicateResource(ResourceIndex),
    /// The system control interrupt is no ISA interrupt.
    #[error("the system control interrupt must be an ISA interrupt under 16, not {0}")]
    SystemControlInterrupt(u8),
}

/// Tables that the XSDT lists, as far as there are such.
const LISTED: [[u8; 4]; 5] = [*b"FACP", *b"APIC", *b"MCFG", *b"SRAT", *b"SLIT"];

/// The tables of a machine before it is known where they go. Their sizes are final; what holds addresses of other tables is
/// still empty.
#[derive(Clone, Debug)]
pub struct UnplacedTables<'a> {
    platform: &'a PlatformDescription,
    /// Addresses count from the start of the area.
    tables: Vec<PlacedTable>,
}

/// Generates the tables for `platform`.
pub fn generate(platform: &PlatformDescription) -> Result<UnplacedTables<'_>, TableError> {
    check(platform)?;
    let mut dsdt = Sdt::new(*b"DSDT", HEADER_LENGTH, DSDT_REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&dsdt::contents(platform));
    let mut unplaced = UnplacedTables { platform, tables: Vec::new() };
    unplaced.add(*b"RSDP", vec![0; Rsdp::len()]);
    unplaced.add(*b"DSDT", dsdt.as_slice().to_vec());
    unplaced.add(*b"FACS", fixed::facs());
    unplaced.add(*b"FACP", vec![0; FADT::len()]);
    unplaced.add(*b"APIC", fixed::madt(platform));
    unplaced.add(*b"MCFG", fixed::mcfg(platform));
    if let Some(numa) = &platform.numa {
        unplaced.add(*b"SRAT", affinity::srat(numa));
        if numa.nodes > 1 {
            unplaced.add(*b"SLIT", affinity::slit(numa));
        }
    }
    unplaced.add(*b"XSDT", xsdt(&unplaced.listed()));
    Ok(unplaced)
}

impl UnplacedTables<'_> {
    /// How many bytes the tables take from the RSDP to the end of the last one.
    pub fn size(&self) -> u64 {
        self.tables.last().map_or(0, PlacedTable::end)
    }

    /// Puts the RSDP at `area` and the others after it, and has them point at each other.
    pub fn place(mut self, area: u64) -> Result<AcpiTables, TableError> {
        if !area.is_multiple_of(ALIGNMENT) {
            return Err(TableError::UnalignedArea(area));
        }
        for table in &mut self.tables {
            table.address = table.address.saturating_add(area);
        }
        let fadt = fixed::fadt(self.platform, self.address(*b"DSDT"), self.address(*b"FACS"));
        let xsdt = xsdt(&self.listed());
        let rsdp = bytes(&Rsdp::new(OEM_ID, self.address(*b"XSDT")));
        self.fill(*b"FACP", fadt);
        self.fill(*b"XSDT", xsdt);
        self.fill(*b"RSDP", rsdp);
        Ok(AcpiTables { rsdp: area, tables: self.tables })
    }

    fn add(&mut self, signature: [u8; 4], bytes: Vec<u8>) {
        let address = self.size().checked_next_multiple_of(ALIGNMENT).unwrap_or(u64::MAX);
        self.tables.push(PlacedTable { signature, address, bytes });
    }

    /// Addresses of the tables that the XSDT lists.
    fn listed(&self) -> Vec<u64> {
        let of = |signature| self.tables.iter().find(|table| table.signature == signature);
        LISTED.into_iter().filter_map(of).map(|table| table.address).collect()
    }

    fn address(&self, signature: [u8; 4]) -> u64 {
        self.tables.iter().find(|table| table.signature == signature).map_or(0, |table| table.address)
    }

    fn fill(&mut self, signature: [u8; 4], bytes: Vec<u8>) {
        if let Some(table) = self.tables.iter_mut().find(|table| table.signature == signature) {
            debug_assert_eq!(table.bytes.len(), bytes.len(), "a table's length was foreseen");
            table.bytes = bytes;
        }
    }
}

fn xsdt(entries: &[u64]) -> Vec<u8> {
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    entries.iter().for_each(|address| xsdt.add_entry(*address));
    bytes(&xsdt)
}

/// Refuses what the generators cannot express, so that they need not fail.
fn check(platform: &PlatformDescription) -> Result<(), TableError> {
    let processors = platform.processors.len();
    if !(1..=MAX_PROCESSORS).contains(&processors) {
        return Err(TableError::Processors(processors));
    }
    if let Some(hotplug) = platform.processor_hotplug {
        if !(1..=processors.min(PROCESSOR_COUNT)).contains(&hotplug.present) || processors > PROCESSOR_COUNT {
            return Err(TableError::PresentProcessors { present: hotplug.present, processors });
        }
        let block = AddressRange { base: hotplug.registers, size: processor_abi::BLOCK_SIZE };
        check_range("processor registers", block, u64::MAX)?;
    }
    if let sci @ 16.. = platform.fixed_hardware.sci {
        return Err(TableError::SystemControlInterrupt(sci));
    }
    let segments = platform.pci.len();
    // Their registers have room for so many, in the order of their numbers.
    let in_order = (0..SEGMENT_COUNT).zip(&platform.pci).all(|(number, pci)| pci.segment == number);
    if !in_order || !(1..=usize::from(SEGMENT_COUNT)).contains(&segments) {
        return Err(TableError::Segments(segments));
    }
    let page = AddressRange { base: platform.power_notification, size: notify_abi::PAGE_SIZE };
    check_range("power notification device", page, u64::MAX)?;

    let mut resources = BTreeSet::new();
    platform.pci.iter().try_for_each(|pci| check_segment(pci, &mut resources))
}

fn check_segment(pci: &PciDescription, resources: &mut BTreeSet<ResourceIndex>) -> Result<(), TableError> {
    check_range("PCI configuration space", pci.ecam, u64::MAX)?;
    check_range("32-bit PCI memory window", pci.mmio32, u64::from(u32::MAX))?;
    if let Some(mmio64) = pci.mmio64 {
        check_range("64-bit PCI memory window", mmio64, u64::MAX)?;
    }
    if let Some(io) = pci.io {
        let io = AddressRange { base: u64::from(io.base), size: u64::from(io.size) };
        check_range("PCI I/O window", io, u64::from(u16::MAX))?;
    }
    let ports = pci.root_ports.iter().map(|port| FunctionDescription {
        devfn: port.devfn,
        resource: port.resource,
        place: None,
    });
    check_bus(pci.functions.iter().copied().chain(ports), resources)?;
    for port in &pci.root_ports {
        check_bus(port.functions.iter().copied(), resources)?;
    }
    Ok(())
}

fn check_range(what: &'static str, range: AddressRange, last_possible: u64) -> Result<(), TableError> {
    let AddressRange { base, size } = range;
    let last = size.checked_sub(1).and_then(|length| base.checked_add(length));
    // A whole 64-bit space has a length that no descriptor can hold.
    if last.is_some_and(|last| last <= last_possible) && size != u64::MAX {
        Ok(())
    } else {
        Err(TableError::Range { what, base, size })
    }
}

fn check_bus(
    functions: impl Iterator<Item = FunctionDescription>,
    resources: &mut BTreeSet<ResourceIndex>,
) -> Result<(), TableError> {
    let mut seen = BTreeSet::new();
    for function in functions {
        if !seen.insert(function.devfn) {
            return Err(TableError::DuplicateFunction { devfn: function.devfn });
        }
        if let Some(index) = function.resource
            && !resources.insert(index)
        {
            return Err(TableError::DuplicateResource(index));
        }
    }
    Ok(())
}
