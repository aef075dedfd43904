//! Offsets and bits of configuration space (PCI Local Bus 3.0, section 6.1; PCI-to-PCI Bridge 1.2, section 3.2; PCI Express Base 6.0,
//! section 7.5.1). Offsets are in bytes; bits are of the register named before them.

/// Size of a function's configuration space (PCI Express Base 6.0, section 7.2.2).
pub const CONFIG_SPACE_LEN: u16 = 4096;
/// Size of the part that PCI had; extended capabilities come after it.
pub const LEGACY_CONFIG_LEN: usize = 256;

/// Vendor ID, 16 bits.
pub const VENDOR_ID: usize = 0x00;
/// Device ID, 16 bits.
pub const DEVICE_ID: usize = 0x02;
/// Command, 16 bits.
pub const COMMAND: usize = 0x04;
/// I/O space enable.
pub const COMMAND_IO: u16 = 1 << 0;
/// Memory space enable.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// Bus master enable.
pub const COMMAND_BUS_MASTER: u16 = 1 << 2;
/// Parity error response.
pub const COMMAND_PARITY: u16 = 1 << 6;
/// SERR# enable.
pub const COMMAND_SERR: u16 = 1 << 8;
/// Interrupt disable (INTx).
pub const COMMAND_INTX_DISABLE: u16 = 1 << 10;
/// Status, 16 bits.
pub const STATUS: usize = 0x06;
/// Capabilities list.
pub const STATUS_CAPABILITIES: u16 = 1 << 4;
/// The error bits, write-one-to-clear.
pub const STATUS_ERRORS: u16 = 0xf900;
/// Revision ID, 8 bits; the class code follows in 24 bits.
pub const REVISION_ID: usize = 0x08;
/// Cache line size, 8 bits.
pub const CACHE_LINE_SIZE: usize = 0x0c;
/// Header type, 8 bits.
pub const HEADER_TYPE: usize = 0x0e;
/// The device has more than one function.
pub const HEADER_MULTIFUNCTION: u8 = 1 << 7;
/// BAR 0, the first of six in a type 0 header.
pub const BAR0: usize = 0x10;
/// Subsystem vendor ID, 16 bits; the subsystem ID follows (type 0).
pub const SUBSYSTEM_VENDOR_ID: usize = 0x2c;
/// Expansion ROM base address, 32 bits (type 0).
pub const ROM_ADDRESS: usize = 0x30;
/// Pointer to the first capability, 8 bits.
pub const CAPABILITIES: usize = 0x34;
/// Interrupt line, 8 bits, software's scratch.
pub const INTERRUPT_LINE: usize = 0x3c;
/// Interrupt pin, 8 bits; 0: no INTx, 1 to 4: INTA to INTD.
pub const INTERRUPT_PIN: usize = 0x3d;

/// Primary bus number, 8 bits (type 1, like all that follow).
pub const PRIMARY_BUS: usize = 0x18;
/// Secondary bus number, 8 bits.
pub const SECONDARY_BUS: usize = 0x19;
/// Subordinate bus number, 8 bits.
pub const SUBORDINATE_BUS: usize = 0x1a;
/// I/O base, 8 bits: address bits 15:12 in bits 7:4.
pub const IO_BASE: usize = 0x1c;
/// I/O limit, 8 bits.
pub const IO_LIMIT: usize = 0x1d;
/// Secondary status, 16 bits.
pub const SECONDARY_STATUS: usize = 0x1e;
/// Memory base, 16 bits: address bits 31:20 in bits 15:4.
pub const MEMORY_BASE: usize = 0x20;
/// Memory limit, 16 bits.
pub const MEMORY_LIMIT: usize = 0x22;
/// Prefetchable memory base, 16 bits: address bits 31:20 in bits 15:4.
pub const PREFETCHABLE_BASE: usize = 0x24;
/// Prefetchable memory limit, 16 bits.
pub const PREFETCHABLE_LIMIT: usize = 0x26;
/// Prefetchable memory base, upper 32 bits.
pub const PREFETCHABLE_BASE_UPPER: usize = 0x28;
/// Prefetchable memory limit, upper 32 bits.
pub const PREFETCHABLE_LIMIT_UPPER: usize = 0x2c;
/// In the prefetchable base and limit: the window has 64-bit addresses.
pub const PREFETCHABLE_64: u16 = 1;
/// Bridge control, 16 bits.
pub const BRIDGE_CONTROL: usize = 0x3e;
/// Parity response, SERR# enable, ISA enable, VGA enable, VGA 16-bit decode, master abort mode: stored, without effect here.
pub const BRIDGE_CONTROL_STORED: u16 = 0x3f;
/// Secondary bus reset.
pub const BRIDGE_SECONDARY_RESET: u16 = 1 << 6;

/// Capability ID of power management.
pub const CAP_PM: u8 = 0x01;
/// Capability ID of MSI.
pub const CAP_MSI: u8 = 0x05;
/// Capability ID of a bridge's subsystem identification.
pub const CAP_SUBSYSTEM: u8 = 0x0d;
/// Capability ID of PCI Express.
pub const CAP_PCIE: u8 = 0x10;
/// Capability ID of MSI-X.
pub const CAP_MSIX: u8 = 0x11;
/// Vendor-specific capability.
pub const CAP_VENDOR: u8 = 0x09;
