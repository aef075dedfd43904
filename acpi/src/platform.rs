//! What the tables have to describe: the machine as plain data.
//!
//! The builder of the machine fills in a [`PlatformDescription`] once everything has its address, and hands it to
//! [`tables::generate`](crate::tables::generate). Nothing here is x86 memory map knowledge: every address is an argument.

use pci::DevFn;

use crate::notify_abi::ResourceIndex;

/// Where the CMOS clock keeps the century, among its 128 bytes. The FADT tells the guest.
pub const RTC_CENTURY_BYTE: u8 = 0x32;

/// A range of physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressRange {
    /// First address.
    pub base: u64,
    /// Length in bytes.
    pub size: u64,
}

/// A range of I/O ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortRange {
    /// First port.
    pub base: u16,
    /// How many ports.
    pub size: u16,
}

/// The whole machine, as far as firmware describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlatformDescription {
    /// APIC id of each vCPU that there is or can be later, in the order of their numbers; the first is the one that boots.
    pub processors: Vec<u32>,
    /// How processors come and go; `None` when all are there for good.
    pub processor_hotplug: Option<ProcessorHotplugDescription>,
    /// Interrupt controllers.
    pub interrupts: InterruptDescription,
    /// The PCI Express hierarchy, segment by segment; the first one is segment 0.
    pub pci: Vec<PciDescription>,
    /// Address of the power notification device's page (see [`notify_abi`](crate::notify_abi)).
    pub power_notification: u64,
    /// The generic event device.
    pub event_device: EventDeviceDescription,
    /// Registers of memory devices that are added later (see [`memory_abi`](crate::memory_abi)); `None` when there can be none.
    pub memory_slots: Option<u64>,
    /// What belongs to which node; `None` leaves out the tables that say so.
    pub numa: Option<NumaDescription>,
    /// Sleep registers and fixed events.
    pub fixed_hardware: FixedHardwareDescription,
    /// The reset register.
    pub reset: ResetDescription,
    /// The first serial port; `None` leaves it out of the tables.
    pub serial: Option<LegacyDeviceDescription>,
    /// The CMOS real-time clock; `None` tells the guest that there is none.
    pub rtc: Option<LegacyDeviceDescription>,
}

/// Processors that come and go while the guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessorHotplugDescription {
    /// Address of their registers (see [`processor_abi`](crate::processor_abi)).
    pub registers: u64,
    /// How many are there at boot: the first ones.
    pub present: usize,
}

/// The interrupt controllers of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InterruptDescription {
    /// Physical address of every local APIC.
    pub local_apic_address: u32,
    /// Identification of the one I/O APIC, whose pins are the GSIs from 0 on.
    pub io_apic_id: u8,
    /// Physical address of the I/O APIC.
    pub io_apic_address: u32,
}

/// A PCI segment: its configuration space, its windows, and what sits on its bus 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciDescription {
    /// Its number. Segment 0 has configuration mechanism #1 too.
    pub segment: u16,
    /// Enhanced configuration space: 1 MiB per bus, from bus 0 on.
    pub ecam: AddressRange,
    /// Memory window below 4 GiB.
    pub mmio32: AddressRange,
    /// Memory window above 4 GiB; `None` when there is none.
    pub mmio64: Option<AddressRange>,
    /// Window of I/O ports; `None` when there is none.
    pub io: Option<PortRange>,
    /// First of the eight GSIs that INTx pins share. Device `d` of bus 0 raises pin `p` (0 is INTA) on
    /// `intx_gsi_base + (d + p) % 8`.
    pub intx_gsi_base: u32,
    /// Root ports and what is below them.
    pub root_ports: Vec<RootPortDescription>,
    /// Functions that sit on bus 0 itself: all that have a power resource or may raise an interrupt pin.
    pub functions: Vec<FunctionDescription>,
}

/// A root port on bus 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootPortDescription {
    /// Where it sits on bus 0.
    pub devfn: DevFn,
    /// Its power resource; `None` when nothing below it is offered power control.
    pub resource: Option<ResourceIndex>,
    /// What is on the bus below it.
    pub functions: Vec<FunctionDescription>,
}

/// A function: an assigned device or one of its functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FunctionDescription {
    /// Where it sits on its bus.
    pub devfn: DevFn,
    /// Its power resource; `None` when it is not offered power control.
    pub resource: Option<ResourceIndex>,
    /// The function can come and go while the guest runs, and this is its place in the registers for that
    /// ([`event_abi`](crate::event_abi)); below [`PLACE_COUNT`](crate::event_abi::PLACE_COUNT). There may be no function now.
    pub place: Option<u8>,
}

/// Processors, memory and devices by node. A node's number is its proximity domain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NumaDescription {
    /// One more than the largest number of a node.
    pub nodes: u16,
    /// APIC id and node of each vCPU.
    pub processors: Vec<(u32, u32)>,
    /// All RAM, and all ranges where RAM may be added.
    pub memory: Vec<MemoryAffinity>,
    /// Assigned functions that are nodes of their own.
    pub initiators: Vec<InitiatorAffinity>,
    /// Distance from one node to another, where it is not 20.
    pub distances: Vec<(u32, u32, u8)>,
    /// PCI segments of which it is said, and the node of each.
    pub pci_nodes: Vec<(u16, u32)>,
}

/// A range of memory and its node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryAffinity {
    /// The addresses.
    pub range: AddressRange,
    /// The node.
    pub node: u32,
    /// Whether the memory may come while the guest runs.
    pub hotplug: bool,
}

/// A function that accesses memory by itself, and its node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InitiatorAffinity {
    /// Its PCI segment.
    pub segment: u16,
    /// Its bus.
    pub bus: u8,
    /// Where it is on its bus.
    pub devfn: DevFn,
    /// The node.
    pub node: u32,
}

/// The generic event device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventDeviceDescription {
    /// Address of its register (see [`event_abi`](crate::event_abi)).
    pub address: u64,
    /// Its interrupt: edge-triggered, active high.
    pub gsi: u32,
}

/// The fixed hardware of ACPI 6.5, section 4.8: the PM1 blocks of [`pm1`](crate::pm1) at I/O ports.
///
/// This is what a guest needs to be woken from suspend-to-idle by its clock. Linux arms the clock's alarm as a wake-up
/// through the fixed RTC event and through nothing else when ACPI is there (`rtc-cmos.c`: `wake_on` replaces
/// `enable_irq_wake`), and that event wakes through the system control interrupt. A hardware-reduced machine has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FixedHardwareDescription {
    /// First port of the PM1a event block ([`pm1::EVENT_BLOCK_SIZE`](crate::pm1::EVENT_BLOCK_SIZE) ports).
    pub event_block: u16,
    /// First port of the PM1a control block ([`pm1::CONTROL_BLOCK_SIZE`](crate::pm1::CONTROL_BLOCK_SIZE) ports).
    pub control_block: u16,
    /// The system control interrupt, under 16: edge-triggered, active high. The GSI has the same number.
    pub sci: u8,
}

/// The reset register (ACPI 6.5, section 4.8.3.6): one byte of memory space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResetDescription {
    /// Its address.
    pub address: u64,
    /// What the guest writes to it to reset the machine.
    pub value: u8,
}

/// A device at fixed I/O ports with an ISA interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LegacyDeviceDescription {
    /// Its first port.
    pub port: u16,
    /// Its interrupt: edge-triggered, active high. The GSI has the same number.
    pub irq: u8,
}
