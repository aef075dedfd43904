//! A function's first 256 bytes: header type 0 or 1, and the list of capabilities (PCI Local Bus 3.0, section 6.1; PCI-to-PCI
//! Bridge 1.2, section 3.2; PCI Express Base 6.0, section 7.5.1).

use crate::registers::Registers;
use crate::regs;

/// First place for a capability.
const FIRST_CAPABILITY: u16 = 0x40;
/// Subsystem identification of a bridge (PCI-to-PCI Bridge 1.2, section 3.2.5.13).
const SUBSYSTEM_CAPABILITY_LEN: u16 = 8;

/// Who a function says it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Class code: base class, sub-class and interface in 24 bits.
    pub class: u32,
    /// Subsystem vendor ID and subsystem ID.
    pub subsystem: (u16, u16),
}

/// Where a capability stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CapabilitySpan {
    start: u16,
    len: u16,
}

impl CapabilitySpan {
    /// Offset of its first byte in configuration space.
    pub const fn start(self) -> u16 {
        self.start
    }

    /// The offset in the capability of an access that begins in it.
    pub fn relative(self, offset: u16) -> Option<u16> {
        offset.checked_sub(self.start).filter(|&at| at < self.len)
    }
}

/// No place is left for a capability: a mistake of the model's author.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "no {len} bytes are left in configuration space for capability {id:#04x}; the capabilities of a function must fit in 0x40 to 0xff"
)]
pub struct NoRoom {
    /// The capability's ID.
    pub id: u8,
    /// Bytes it needs.
    pub len: u16,
}

/// Header and capability list. The extended part (from 0x100) has no capabilities and reads zero.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    registers: Registers<{ regs::LEGACY_CONFIG_LEN }>,
    next_free: u16,
    /// Offset of the pointer that the next capability is linked from.
    last_pointer: usize,
}

impl ConfigSpace {
    /// A type 0 header. Its BARs are zero and read-only; a [`BarRegisters`](crate::bar::BarRegisters) may be laid over them.
    pub fn endpoint(identity: &Identity) -> Self {
        let mut space = Self::new(identity, 0);
        space.registers.set_u16(regs::SUBSYSTEM_VENDOR_ID, identity.subsystem.0);
        space.registers.set_u16(regs::SUBSYSTEM_VENDOR_ID + 2, identity.subsystem.1);
        space
    }

    /// A type 1 header, without BARs: 16-bit I/O window, 32-bit memory window, 64-bit prefetchable window, all closed.
    pub fn bridge(identity: &Identity) -> Self {
        let mut space = Self::new(identity, 1);
        let registers = &mut space.registers;
        registers.allow_u8(regs::PRIMARY_BUS, 0xff);
        registers.allow_u8(regs::SECONDARY_BUS, 0xff);
        registers.allow_u8(regs::SUBORDINATE_BUS, 0xff);
        registers.clear_on_one_u16(regs::SECONDARY_STATUS, regs::STATUS_ERRORS);
        for limit in [regs::IO_BASE, regs::IO_LIMIT] {
            registers.allow_u8(limit, 0xf0);
        }
        for limit in
            [regs::MEMORY_BASE, regs::MEMORY_LIMIT, regs::PREFETCHABLE_BASE, regs::PREFETCHABLE_LIMIT]
        {
            registers.allow_u16(limit, 0xfff0);
        }
        for upper in [regs::PREFETCHABLE_BASE_UPPER, regs::PREFETCHABLE_LIMIT_UPPER] {
            registers.allow_u32(upper, u32::MAX);
        }
        // Base above limit closes a window (PCI-to-PCI Bridge 1.2, section 3.2.5.6 and after).
        registers.set_u8(regs::IO_BASE, 0xf0);
        registers.set_u16(regs::MEMORY_BASE, 0xfff0);
        registers.set_u16(regs::PREFETCHABLE_BASE, 0xfff0 | regs::PREFETCHABLE_64);
        registers.set_u16(regs::PREFETCHABLE_LIMIT, regs::PREFETCHABLE_64);
        registers.allow_u16(regs::BRIDGE_CONTROL, regs::BRIDGE_CONTROL_STORED | regs::BRIDGE_SECONDARY_RESET);
        space
    }

    fn new(identity: &Identity, header_type: u8) -> Self {
        let mut registers = Registers::new();
        registers.set_u16(regs::VENDOR_ID, identity.vendor);
        registers.set_u16(regs::DEVICE_ID, identity.device);
        registers.set_u32(regs::REVISION_ID, identity.class << 8 | u32::from(identity.revision));
        registers.set_u8(regs::HEADER_TYPE, header_type);
        registers.allow_u16(
            regs::COMMAND,
            regs::COMMAND_IO
                | regs::COMMAND_MEMORY
                | regs::COMMAND_BUS_MASTER
                | regs::COMMAND_PARITY
                | regs::COMMAND_SERR
                | regs::COMMAND_INTX_DISABLE,
        );
        registers.clear_on_one_u16(regs::STATUS, regs::STATUS_ERRORS);
        registers.allow_u8(regs::CACHE_LINE_SIZE, 0xff);
        registers.allow_u8(regs::INTERRUPT_LINE, 0xff);
        Self { registers, next_free: FIRST_CAPABILITY, last_pointer: regs::CAPABILITIES }
    }

    /// Marks the device as having several functions.
    pub fn set_multifunction(&mut self) {
        let header_type = self.registers.u8(regs::HEADER_TYPE);
        self.registers.set_u8(regs::HEADER_TYPE, header_type | regs::HEADER_MULTIFUNCTION);
    }

    /// Appends a capability to the list: ID and link are in place, the rest reads zero and is for the caller to lay over or set.
    pub fn add_capability(&mut self, id: u8, len: u16) -> Result<CapabilitySpan, NoRoom> {
        let start = self.next_free;
        let end = start + len.next_multiple_of(4);
        let pointer = u8::try_from(start).map_err(|_| NoRoom { id, len })?;
        if usize::from(end) > regs::LEGACY_CONFIG_LEN {
            return Err(NoRoom { id, len });
        }
        self.registers.set_u8(self.last_pointer, pointer);
        self.registers.set_u8(usize::from(start), id);
        let status = self.registers.u16(regs::STATUS);
        self.registers.set_u16(regs::STATUS, status | regs::STATUS_CAPABILITIES);
        self.last_pointer = usize::from(start) + 1;
        self.next_free = end;
        Ok(CapabilitySpan { start, len })
    }

    /// Sets bytes of a capability, which the guest can then read and not write. What is past the end is dropped.
    pub fn set(&mut self, offset: u16, bytes: &[u8]) {
        for (at, byte) in (usize::from(offset)..regs::LEGACY_CONFIG_LEN).zip(bytes) {
            self.registers.set_u8(at, *byte);
        }
    }

    /// Appends the capability by which a bridge tells its subsystem.
    pub fn add_bridge_subsystem(&mut self, (vendor, id): (u16, u16)) -> Result<CapabilitySpan, NoRoom> {
        let span = self.add_capability(regs::CAP_SUBSYSTEM, SUBSYSTEM_CAPABILITY_LEN)?;
        self.registers.set_u16(usize::from(span.start) + 4, vendor);
        self.registers.set_u16(usize::from(span.start) + 6, id);
        Ok(span)
    }

    /// The registers, for a model that looks at what the guest wrote.
    pub const fn registers(&self) -> &Registers<{ regs::LEGACY_CONFIG_LEN }> {
        &self.registers
    }

    /// The guest's read. All ones past the end of configuration space.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (at, byte) in (usize::from(offset)..).zip(data.iter_mut()) {
            *byte = if at < usize::from(regs::CONFIG_SPACE_LEN) { 0 } else { 0xff };
        }
        self.registers.read(usize::from(offset), data);
    }

    /// The guest's write.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        self.registers.write(usize::from(offset), data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDENTITY: Identity = Identity {
        vendor: 0x1b36,
        device: 0x000c,
        revision: 2,
        class: 0x06_0400,
        subsystem: (0x1af4, 0x1100),
    };

    fn dword(space: &ConfigSpace, offset: u16) -> u32 {
        let mut data = [0; 4];
        space.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn the_header_tells_the_identity_and_keeps_it() {
        let mut space = ConfigSpace::endpoint(&IDENTITY);
        space.write(0, &[0xff; 4]);
        space.write(8, &[0xff; 4]);
        space.write(0x10, &[0xff; 0x30]);
        let read = [0, 8, 0x0c, 0x10, 0x2c, 0x30, 0x34].map(|offset| dword(&space, offset));
        assert_eq!(read, [0x000c_1b36, 0x0604_0002, 0, 0, 0x1100_1af4, 0, 0]);
        space.set_multifunction();
        assert_eq!(dword(&space, 0x0c), 0x0080_0000);
    }

    #[test]
    fn command_takes_only_what_a_pci_express_function_has() {
        let mut space = ConfigSpace::endpoint(&IDENTITY);
        space.write(4, &[0xff; 4]);
        assert_eq!(dword(&space, 4), 0x0547);
    }

    #[test]
    fn capabilities_are_linked_in_order_and_dword_aligned() {
        let mut space = ConfigSpace::bridge(&IDENTITY);
        let msi = space.add_capability(regs::CAP_MSI, 14).unwrap();
        let subsystem = space.add_bridge_subsystem(IDENTITY.subsystem).unwrap();
        assert_eq!((msi.start(), subsystem.start()), (0x40, 0x50));
        assert_eq!(dword(&space, 0x34), 0x40);
        assert_eq!(dword(&space, 0x40), 0x5005);
        assert_eq!(dword(&space, 0x50), 0x000d);
        assert_eq!(dword(&space, 0x54), 0x1100_1af4);
        assert_eq!(dword(&space, 4) >> 16, 0x10);
        assert_eq!((msi.relative(0x4d), msi.relative(0x4e), msi.relative(0x3f)), (Some(13), None, None));
    }

    #[test]
    fn capabilities_that_do_not_fit_are_refused() {
        let mut space = ConfigSpace::bridge(&IDENTITY);
        space.add_capability(1, 0xbd).unwrap();
        assert_eq!(space.add_capability(5, 4), Err(NoRoom { id: 5, len: 4 }));
        assert_eq!(dword(&space, 0x40), 1, "the list ends where it did");
    }

    #[test]
    fn a_new_bridge_has_closed_windows_and_takes_numbers_in_them() {
        let mut space = ConfigSpace::bridge(&IDENTITY);
        assert_eq!([0x1c, 0x20, 0x24].map(|offset| dword(&space, offset)), [0x00f0, 0xfff0, 0x0001_fff1]);
        space.write(0x18, &[0xff; 0x18]);
        let read = [0x18, 0x1c, 0x20, 0x24, 0x28, 0x2c].map(|offset| dword(&space, offset));
        assert_eq!(read, [0x00ff_ffff, 0xf0f0, 0xfff0_fff0, 0xfff1_fff1, u32::MAX, u32::MAX]);
    }

    #[test]
    fn the_extended_part_reads_zero_and_what_follows_all_ones() {
        let mut space = ConfigSpace::endpoint(&IDENTITY);
        space.write(0x100, &[0xff; 4]);
        assert_eq!(dword(&space, 0x100), 0);
        assert_eq!(dword(&space, 0xffe), 0xffff_0000);
        assert_eq!(dword(&space, u16::MAX), u32::MAX);
    }
}
