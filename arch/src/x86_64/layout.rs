//! The one guest memory map of the x86_64 machine: every address and interrupt number that the machine
//! decides, and none that the guest or a specification of a single device decides.
//!
//! Follows the E820 map of ACPI 6.5 section 15 (address range types), the PCI Firmware Specification 3.3
//! section 4.1 (ECAM), and the constraints of Linux' `Documentation/arch/x86/boot.rst`.
//!
//! ```text
//!          0 +-------------------------+
//!            | GDT, PVH start info,    |  BOOT_* : written once by the loader, free for the guest
//!            | zero page, page tables, |
//!            | command line            |
//!    9_FC00  +-------------------------+  reserved (EBDA)
//!    A_0000  +-------------------------+  not in the map (legacy video, option ROMs)
//!    E_0000  +-------------------------+  RSDP, then the ACPI tables            (reserved)
//!    F_0000  +-------------------------+  SMBIOS entry point and structures     (reserved)
//!   10_0000  +-------------------------+
//!            | kernel, ...             |
//!            | initramfs, page aligned |  at the top of low RAM
//!            | large ACPI tables       |  only when they do not fit below 1 MiB  (ACPI data)
//!            +-------------------------+  end of low RAM, at most C000_0000
//! C000_0000  +-------------------------+  32-bit PCI memory window, 512 MiB
//! E000_0000  +-------------------------+  ECAM, 256 buses of all segments        (reserved)
//! F000_0000  +-------------------------+
//! FEC0_0000  |  IOAPIC                 |
//! FED1_0000  |  power notification     |  one page each
//! FED2_0000  |  event device           |
//! FED3_0000  |  reset register         |
//! FED4_0000  |  memory slots           |
//! FED5_0000  |  processors' registers  |
//! FEE0_0000  |  local APICs            |
//! FFFB_C000  |  KVM identity map, TSS  |                                          (reserved)
//!  1_0000_0000 +-----------------------+  high RAM: what does not fit below
//!            | high RAM                |  (steps over FD_0000_0000..100_0000_0000)
//!            +-------------------------+
//!            | RAM that may be added   |  each range starts at a multiple of 128 MiB, and steps over the same
//!            +-------------------------+
//!            | persistent memory       |  from the next GiB on
//!            +-------------------------+
//! 2^(bits-1) +-------------------------+  64-bit PCI memory window: the upper half of the
//!            |                         |  guest-physical space
//!   2^bits   +-------------------------+
//! ```

use thiserror::Error;
use vm_memory::{Address, GuestAddress};

#[cfg(test)]
mod tests;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const PAGE: u64 = 4 * KIB;

// --- Low memory: what the loader writes for the kernel's first instructions. ---

/// Global descriptor table.
pub const BOOT_GDT: GuestAddress = GuestAddress(0x500);
/// Interrupt descriptor table: one empty gate, so that an early exception is a triple fault.
pub const BOOT_IDT: GuestAddress = GuestAddress(0x580);
/// PVH `hvm_start_info`.
pub const PVH_START_INFO: GuestAddress = GuestAddress(0x6000);
/// PVH module list: one entry, the initramfs.
pub const PVH_MODULES: GuestAddress = GuestAddress(0x6040);
/// PVH memory map table.
pub const PVH_MEMORY_MAP: GuestAddress = GuestAddress(0x6080);
/// Linux `boot_params`, one page.
pub const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
/// First stack of a 64-bit entry; it grows down towards the zero page.
pub const BOOT_STACK: GuestAddress = GuestAddress(0x8ff0);
/// Identity page tables: one PML4, one PDPT and four page directories map 4 GiB.
pub const BOOT_PAGE_TABLES: GuestAddress = GuestAddress(0x9000);
/// Kernel command line, NUL terminated.
pub const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);
/// Room for the command line with its NUL. A kernel may accept less.
pub const COMMAND_LINE_MAX: u64 = 64 * KIB;

// --- Below 1 MiB: what firmware leaves for an operating system. ---

/// Start of the extended BIOS data area: end of the first RAM range.
pub const EBDA: GuestAddress = GuestAddress(0x9_fc00);
/// End of conventional memory.
pub const CONVENTIONAL_END: GuestAddress = GuestAddress(0xa_0000);
/// Where the RSDP lies, with the other ACPI tables behind it when they fit in [`LOW_TABLES_SIZE`].
pub const RSDP: GuestAddress = GuestAddress(0xe_0000);
/// Room for ACPI tables below 1 MiB.
pub const LOW_TABLES_SIZE: u64 = 64 * KIB;
/// SMBIOS entry point; operating systems search for it from here to [`HIGH_MEMORY`].
pub const SMBIOS: GuestAddress = GuestAddress(0xf_0000);
/// Room for the SMBIOS entry point and structures.
pub const SMBIOS_SIZE: u64 = 64 * KIB;
/// 1 MiB: where RAM goes on, and the lowest address of a kernel.
pub const HIGH_MEMORY: GuestAddress = GuestAddress(0x10_0000);

// --- Below 4 GiB: devices. ---

/// Low RAM ends here at the latest.
pub const LOW_RAM_LIMIT: GuestAddress = GuestAddress(0xc000_0000);
/// 32-bit PCI memory window.
pub const PCI_MMIO32: AddressRange = AddressRange::new(LOW_RAM_LIMIT, 0x2000_0000);
/// Memory-mapped configuration space: 256 buses, of one PCI segment or of several, one behind the other.
pub const PCI_ECAM: AddressRange = AddressRange::new(GuestAddress(0xe000_0000), 0x1000_0000);
/// IOAPIC registers.
pub const IOAPIC: AddressRange = AddressRange::new(GuestAddress(0xfec0_0000), 0x1000);
/// The power notification device.
pub const POWER_NOTIFICATION: AddressRange = AddressRange::new(GuestAddress(0xfed1_0000), 0x1000);
/// The generic event device's register.
pub const EVENT_DEVICE: AddressRange = AddressRange::new(GuestAddress(0xfed2_0000), 0x1000);
/// The ACPI reset register.
pub const RESET_REGISTER: AddressRange = AddressRange::new(GuestAddress(0xfed3_0000), 0x1000);
/// The registers through which processors come and go.
pub const PROCESSORS: AddressRange = AddressRange::new(GuestAddress(0xfed5_0000), 0x1000);
/// The registers of memory devices that are added later.
pub const MEMORY_SLOTS: AddressRange = AddressRange::new(GuestAddress(0xfed4_0000), 0x1000);
/// Local APIC registers, the same address for every vCPU.
pub const LOCAL_APIC: AddressRange = AddressRange::new(GuestAddress(0xfee0_0000), 0x1000);
/// Page that KVM uses as identity page table where the processor cannot run real mode (one page).
pub const KVM_IDENTITY_MAP: GuestAddress = GuestAddress(0xfffb_c000);
/// Pages that KVM uses as task state segment for the same reason (three pages).
pub const KVM_TSS: GuestAddress = GuestAddress(0xfffb_d000);
/// Both of them.
pub const KVM_PRIVATE: AddressRange = AddressRange::new(KVM_IDENTITY_MAP, 4 * PAGE);
/// 4 GiB: where RAM goes on above the 32-bit devices.
pub const HIGH_RAM: GuestAddress = GuestAddress(0x1_0000_0000);
/// Addresses that AMD processors use for HyperTransport; neither RAM nor BARs can lie there, because the
/// IOMMU of an AMD host refuses to map them.
pub const HYPERTRANSPORT: AddressRange = AddressRange::new(GuestAddress(0xfd_0000_0000), 0x3_0000_0000);

// --- I/O ports. ---

/// First serial port (COM1), eight ports.
pub const SERIAL_PORT: u16 = 0x3f8;
/// i8042 data port; the command and status port is four behind it.
pub const I8042_PORT: u16 = 0x60;
/// CMOS index port; the data port follows it.
pub const CMOS_PORT: u16 = 0x70;
/// ACPI PM1a event block, with the control block right behind it: six ports in all.
pub const PM1_EVENT_PORT: u16 = 0x600;
/// Power management timer, where firmware built for Cloud Hypervisor has it.
pub const PM_TIMER_PORT: u16 = 0x608;
/// The debug console, unless it is asked for elsewhere.
pub const DEBUG_CONSOLE_PORT: u16 = 0xe9;
/// PCI configuration by ports (mechanism #1): four of address, four of data.
pub const PCI_CONFIG_PORT: u16 = 0xcf8;
/// Reset control register of PC chipsets, among those ports.
pub const RESET_CONTROL_PORT: u16 = 0xcf9;
/// First port of the PCI I/O window.
pub const PCI_IO_START: u16 = 0x1000;
/// Last port of the PCI I/O window.
pub const PCI_IO_LAST: u16 = 0xffff;

// --- Interrupts (global system interrupts). ---

/// Serial port.
pub const SERIAL_GSI: u32 = 4;
/// Generic event device.
pub const EVENT_DEVICE_GSI: u32 = 5;
/// Real-time clock.
pub const RTC_GSI: u32 = 8;
/// ACPI system control interrupt.
pub const SCI_GSI: u32 = 9;
/// First of the eight interrupts that PCI INTx pins are spread over.
pub const PCI_INTX_GSI_BASE: u32 = 16;
/// How many interrupts PCI INTx pins are spread over.
pub const PCI_INTX_GSI_COUNT: u32 = 8;
/// Input pins of the IOAPIC: GSIs 0 to 23.
pub const IOAPIC_PINS: u32 = 24;
/// First GSI with no pin, for routes to messages.
pub const MSI_GSI_BASE: u32 = IOAPIC_PINS;

/// The least RAM a machine can have, in bytes.
pub const MIN_RAM: u64 = 64 * MIB;

/// RAM that is added later starts at a multiple of this and comes in multiples of it: the memory blocks of Linux.
pub const HOTPLUG_ALIGN: u64 = 128 * MIB;

/// The most physical address bits a machine is given when nothing else is asked for: what a 4-level
/// second-stage page table and the IOMMUs in use can translate.
pub const DEFAULT_MAX_PHYS_BITS: u8 = 46;

/// A range of guest-physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressRange {
    /// First address.
    pub start: GuestAddress,
    /// Length in bytes.
    pub len: u64,
}

impl AddressRange {
    /// A range of `len` bytes from `start`. The end must be below 2^64.
    pub const fn new(start: GuestAddress, len: u64) -> Self {
        Self { start, len }
    }

    /// The range from `start` up to, not including, `end`; empty if `end` is not above `start`.
    pub fn between(start: GuestAddress, end: GuestAddress) -> Self {
        Self { start, len: end.0.saturating_sub(start.0) }
    }

    /// First address behind the range.
    pub const fn end(&self) -> GuestAddress {
        GuestAddress(self.start.0.saturating_add(self.len))
    }

    /// Whether the range holds no address.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether `address` lies in the range.
    pub const fn contains(&self, address: GuestAddress) -> bool {
        address.0 >= self.start.0 && address.0 - self.start.0 < self.len
    }

    /// Whether the two ranges share an address.
    pub const fn overlaps(&self, other: &Self) -> bool {
        self.start.0 < other.end().0 && other.start.0 < self.end().0
    }
}

/// What the guest may do with a range of addresses: the types of ACPI 6.5 section 15.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum RangeKind {
    /// Free for use.
    Ram = 1,
    /// Not for use.
    Reserved = 2,
    /// ACPI tables; free once they have been read.
    AcpiData = 3,
}

/// One entry of the memory map that the guest is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapEntry {
    /// The addresses.
    pub range: AddressRange,
    /// What they are.
    pub kind: RangeKind,
}

/// Why a machine of the size asked for has no memory map.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum LayoutError {
    /// Too little RAM to boot anything.
    #[error("{size} bytes of memory are too few; give the guest at least {MIN_RAM} bytes (64 MiB)")]
    TooSmall {
        /// RAM asked for, in bytes.
        size: u64,
    },
    /// A size that no memory slot can have.
    #[error("{size} bytes of memory are not a whole number of 4 KiB pages; round the size up")]
    NotPages {
        /// RAM asked for, in bytes.
        size: u64,
    },
    /// RAM would reach the 64-bit PCI window.
    #[error(
        "{size} bytes of memory do not fit: with {phys_bits} physical address bits the guest can have at most \
         {max} bytes; raise max_phys_bits if the host's processors have more, or give the guest less"
    )]
    TooLarge {
        /// RAM asked for, in bytes.
        size: u64,
        /// Physical address bits of the guest.
        phys_bits: u8,
        /// The most RAM there is room for, in bytes.
        max: u64,
    },
    /// RAM that is to be added later would reach the 64-bit PCI window.
    #[error(
        "{size} bytes of memory to add later do not fit below the 64-bit PCI window at {limit:#x}; lower hotplug_size, or \
         raise max_phys_bits if the host's processors have more"
    )]
    NoRoomToGrow {
        /// How much is to be added, in bytes.
        size: u64,
        /// Where the window starts.
        limit: u64,
    },
    /// A number of address bits that no x86_64 processor has.
    #[error("{phys_bits} physical address bits are not possible; use 36 to 52")]
    PhysBits {
        /// Physical address bits of the guest.
        phys_bits: u8,
    },
    /// More buses than there is configuration space for.
    #[error(
        "{buses} PCI buses in all segments, one of each segment and one behind each root port, are more than the 256 there is \
         configuration space for; assign fewer devices, or have fewer segments (--platform num_pci_segments)"
    )]
    Buses {
        /// How many.
        buses: u64,
    },
    /// A segment would have no memory window.
    #[error(
        "PCI segment {segment} has less than 1 MiB of the {window} memory window; give it a larger weight of it with \
         --pci-segment, or have fewer segments"
    )]
    Share {
        /// The segment.
        segment: u16,
        /// Which window.
        window: &'static str,
    },
    /// The ACPI tables are larger than what can be set aside for them.
    #[error("{size} bytes of ACPI tables do not fit into the guest's memory; give it more memory")]
    Tables {
        /// Length of the tables, in bytes.
        size: u64,
    },
}

/// Where RAM and the PCI windows of one machine lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryMap {
    ram: Vec<AddressRange>,
    /// Ranges for RAM that may be added later, in ascending order.
    hotplug: Vec<AddressRange>,
    mmio64: AddressRange,
    /// What [`MemoryMap::lower_mmio64`] leaves of the window for persistent memory.
    behind_mmio64: Option<AddressRange>,
    /// ACPI tables at the top of low RAM, when they do not fit below 1 MiB.
    tables: Option<AddressRange>,
}

impl MemoryMap {
    /// Lays out a machine with `ram_size` bytes of RAM and processors of `phys_bits` physical address bits.
    ///
    /// # Errors
    /// See [`LayoutError`].
    pub fn new(ram_size: u64, phys_bits: u8) -> Result<Self, LayoutError> {
        if !(36..=52).contains(&phys_bits) {
            return Err(LayoutError::PhysBits { phys_bits });
        }
        if ram_size < MIN_RAM {
            return Err(LayoutError::TooSmall { size: ram_size });
        }
        if !ram_size.is_multiple_of(PAGE) {
            return Err(LayoutError::NotPages { size: ram_size });
        }
        let mmio64 = mmio64_window(phys_bits);
        let too_large = LayoutError::TooLarge { size: ram_size, phys_bits, max: max_ram(mmio64.start) };

        let low = AddressRange::new(GuestAddress(0), ram_size.min(LOW_RAM_LIMIT.0));
        let mut ram = vec![low];
        let mut left = ram_size - low.len;
        for gap in high_ram_gaps(mmio64.start) {
            let part = AddressRange::new(gap.start, left.min(gap.len));
            if !part.is_empty() {
                ram.push(part);
                left -= part.len;
            }
        }
        if left > 0 {
            return Err(too_large);
        }
        Ok(Self { ram, hotplug: Vec::new(), mmio64, behind_mmio64: None, tables: None })
    }

    /// The RAM ranges, in ascending order: one memory slot each. The first one starts at 0.
    pub fn ram(&self) -> &[AddressRange] {
        &self.ram
    }

    /// Keeps `size` bytes, rounded up to whole blocks, above all RAM for RAM that may be added later, starting at a multiple of
    /// `align` and of [`HOTPLUG_ALIGN`].
    ///
    /// # Errors
    /// [`LayoutError::NoRoomToGrow`].
    pub fn reserve_hotplug(&mut self, size: u64, align: u64) -> Result<AddressRange, LayoutError> {
        let limit = self.mmio64.start;
        let refused = LayoutError::NoRoomToGrow { size, limit: limit.0 };
        let Some(len) = size.checked_next_multiple_of(HOTPLUG_ALIGN) else { return Err(refused) };
        let align = align.max(HOTPLUG_ALIGN);
        let above = self.ram.iter().chain(&self.hotplug).map(|range| range.end().0).max().unwrap_or(0);
        let range = high_ram_gaps(limit).into_iter().find_map(|gap| {
            let start = above.max(gap.start.0).checked_next_multiple_of(align)?;
            let fits = start.checked_add(len)? <= gap.end().0;
            fits.then(|| AddressRange::new(GuestAddress(start), len))
        });
        let range = range.ok_or(refused)?;
        self.hotplug.push(range);
        Ok(range)
    }

    /// The 32-bit PCI memory window.
    pub fn mmio32(&self) -> AddressRange {
        PCI_MMIO32
    }

    /// The 64-bit PCI memory window.
    pub fn mmio64(&self) -> AddressRange {
        self.mmio64
    }

    /// Has the 64-bit PCI window start right behind RAM instead of half-way up. A firmware that assigns BARs itself puts them there: it
    /// knows where RAM ends, and not where the tables say that the window is. What HyperTransport takes then ends the window.
    pub fn lower_mmio64(&mut self) {
        const GIB: u64 = 1 << 30;
        let ends = self.ram.iter().chain(&self.hotplug).map(AddressRange::end);
        let ram_end = ends.max().unwrap_or(HIGH_RAM).max(HIGH_RAM);
        let mut start = GuestAddress(ram_end.0.next_multiple_of(GIB));
        if HYPERTRANSPORT.contains(start) {
            start = HYPERTRANSPORT.end();
        }
        let mut window = AddressRange::between(start, self.mmio64.end());
        if window.overlaps(&HYPERTRANSPORT) {
            window = AddressRange::between(start, HYPERTRANSPORT.start);
        }
        // Persistent memory behind it. Linux reaches 10 TiB more than it has at boot, so not at the far end.
        let middle = GuestAddress(start.0 + (window.len / 4 * 3).min(4 << 40) / GIB * GIB);
        self.behind_mmio64 = Some(AddressRange::between(middle, window.end()));
        self.mmio64 = AddressRange::between(start, middle);
    }

    /// Where persistent memory may be: above all RAM that there is and may be, and outside of the PCI windows, in which the guest puts BARs
    /// as it likes.
    pub fn persistent(&self) -> AddressRange {
        const GIB: u64 = 1 << 30;
        if let Some(range) = self.behind_mmio64 {
            return range;
        }
        let ends = self.ram.iter().chain(&self.hotplug).map(AddressRange::end);
        let above = ends.max().unwrap_or(HIGH_RAM).max(HIGH_RAM).0.next_multiple_of(GIB);
        let rest = high_ram_gaps(self.mmio64.start)
            .map(|gap| AddressRange::between(GuestAddress(gap.start.0.max(above)), gap.end()));
        let largest = rest.into_iter().find(|gap| gap.len >= GIB);
        largest.unwrap_or(AddressRange::new(GuestAddress(above), 0))
    }

    /// First address behind the low RAM that the guest may use: the initramfs ends here.
    pub fn low_ram_end(&self) -> GuestAddress {
        self.tables.map_or_else(|| self.ram[0].end(), |tables| tables.start)
    }

    /// Sets `size` bytes aside for the ACPI tables and says where: below 1 MiB when they fit, else at the
    /// top of low RAM, where the map that the guest is given calls them ACPI data.
    ///
    /// # Errors
    /// [`LayoutError::Tables`] if they would take more than a quarter of low RAM.
    pub fn place_tables(&mut self, size: u64) -> Result<GuestAddress, LayoutError> {
        if size <= LOW_TABLES_SIZE {
            self.tables = None;
            return Ok(RSDP);
        }
        let low_end = self.ram[0].end();
        if size > low_end.0 / 4 {
            return Err(LayoutError::Tables { size });
        }
        let start = GuestAddress((low_end.0 - size) & !(PAGE - 1));
        self.tables = Some(AddressRange::between(start, low_end));
        Ok(start)
    }

    /// The map that the guest is given, in ascending order and free of overlaps. What is in no entry is
    /// for devices.
    pub fn entries(&self) -> Vec<MapEntry> {
        let entry = |kind, start, end| MapEntry { range: AddressRange::between(start, end), kind };
        let mut map = vec![
            entry(RangeKind::Ram, GuestAddress(0), EBDA),
            entry(RangeKind::Reserved, EBDA, CONVENTIONAL_END),
            entry(RangeKind::Reserved, RSDP, HIGH_MEMORY),
            entry(RangeKind::Ram, HIGH_MEMORY, self.low_ram_end()),
        ];
        if let Some(range) = self.tables {
            map.push(MapEntry { range, kind: RangeKind::AcpiData });
        }
        map.push(MapEntry { range: PCI_ECAM, kind: RangeKind::Reserved });
        map.push(MapEntry { range: KVM_PRIVATE, kind: RangeKind::Reserved });
        map.extend(self.ram[1..].iter().map(|&range| MapEntry { range, kind: RangeKind::Ram }));
        map
    }
}

/// The upper half of the guest-physical space, less what HyperTransport takes from it.
fn mmio64_window(phys_bits: u8) -> AddressRange {
    let start = GuestAddress(1 << (phys_bits - 1));
    let end = GuestAddress(1 << phys_bits);
    let window = AddressRange::between(start, end);
    if window.overlaps(&HYPERTRANSPORT) { AddressRange::between(start, HYPERTRANSPORT.start) } else { window }
}

/// Where high RAM can lie when it must end below `limit`.
fn high_ram_gaps(limit: GuestAddress) -> [AddressRange; 2] {
    [
        AddressRange::between(HIGH_RAM, limit.min(HYPERTRANSPORT.start)),
        AddressRange::between(HYPERTRANSPORT.end(), limit),
    ]
}

/// The most RAM there is room for below a 64-bit window that starts at `limit`.
fn max_ram(limit: GuestAddress) -> u64 {
    high_ram_gaps(limit).iter().fold(LOW_RAM_LIMIT.raw_value(), |sum, gap| sum + gap.len)
}
