//! A descriptor chain, taken apart and checked: buffers that the device may read, then buffers that it may write (VIRTIO 1.2, sections 2.6.4 and
//! 2.6.5, and 2.8.6 for what is alike in packed rings).

use std::io;

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

use super::ring::{CHAIN_MAX, RingError};

/// Bytes of a descriptor.
pub(super) const DESCRIPTOR_LEN: u64 = 16;

/// A piece of guest memory, all of which is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Where it starts.
    pub address: GuestAddress,
    /// Bytes.
    pub len: u32,
}

/// One request of the driver. The device has it until it is given back to its queue.
#[derive(Debug)]
#[must_use = "the driver waits for every chain to come back"]
pub struct Chain {
    /// The number under which it goes back.
    pub(super) id: u16,
    /// How many places of a packed ring it takes.
    pub(super) slots: u16,
    buffers: Vec<Buffer>,
    /// How many of the buffers the device reads.
    readable: usize,
}

impl Chain {
    /// The number of the chain among those that the device has: that of its first descriptor, or its buffer ID.
    pub fn id(&self) -> u16 {
        self.id
    }

    /// What the device reads, in order.
    pub fn readable(&self) -> &[Buffer] {
        &self.buffers[..self.readable]
    }

    /// What the device writes, in order.
    pub fn writable(&self) -> &[Buffer] {
        &self.buffers[self.readable..]
    }

    /// Bytes that the device can read. All buffers together are less than 4 GiB.
    pub fn readable_len(&self) -> u32 {
        self.readable().iter().fold(0, |sum, buffer| sum.saturating_add(buffer.len))
    }

    /// Bytes that the device can write.
    pub fn writable_len(&self) -> u32 {
        self.writable().iter().fold(0, |sum, buffer| sum.saturating_add(buffer.len))
    }

    /// Reads what the device may read, from its beginning.
    pub fn reader<'a>(&'a self, memory: &'a GuestMemoryMmap) -> Reader<'a> {
        Reader { memory, buffers: self.readable(), offset: 0 }
    }

    /// Writes what the device may write, from its beginning.
    pub fn writer<'a>(&'a self, memory: &'a GuestMemoryMmap) -> Writer<'a> {
        Writer { memory, buffers: self.writable(), offset: 0, written: 0 }
    }
}

/// Reads over the buffers of a chain.
#[derive(Debug)]
pub struct Reader<'a> {
    memory: &'a GuestMemoryMmap,
    buffers: &'a [Buffer],
    offset: u32,
}

/// Writes over the buffers of a chain.
#[derive(Debug)]
pub struct Writer<'a> {
    memory: &'a GuestMemoryMmap,
    buffers: &'a [Buffer],
    offset: u32,
    written: u32,
}

/// The piece of the next buffer that an access of `len` bytes gets, and the buffers behind it.
fn advance(buffers: &mut &[Buffer], offset: &mut u32, len: usize) -> Option<(GuestAddress, usize)> {
    while let [buffer, rest @ ..] = *buffers {
        let left = buffer.len.saturating_sub(*offset);
        if left == 0 {
            (*buffers, *offset) = (rest, 0);
            continue;
        }
        let count = u32::try_from(len).unwrap_or(u32::MAX).min(left);
        // Buffers were checked to lie in memory, whose addresses do not wrap.
        let address = GuestAddress(buffer.address.0.wrapping_add(u64::from(*offset)));
        *offset += count;
        return Some((address, usize::try_from(count).unwrap_or(0)));
    }
    None
}

impl io::Read for Reader<'_> {
    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        if data.is_empty() {
            return Ok(0);
        }
        let Some((address, count)) = advance(&mut self.buffers, &mut self.offset, data.len()) else {
            return Ok(0);
        };
        self.memory.read_slice(&mut data[..count], address).map_err(io::Error::other)?;
        Ok(count)
    }
}

impl Writer<'_> {
    /// Bytes written so far: what the driver is told.
    pub fn written(&self) -> u32 {
        self.written
    }
}

impl io::Write for Writer<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if data.is_empty() {
            return Ok(0);
        }
        let Some((address, count)) = advance(&mut self.buffers, &mut self.offset, data.len()) else {
            return Ok(0);
        };
        self.memory.write_slice(&data[..count], address).map_err(io::Error::other)?;
        self.written = self.written.saturating_add(u32::try_from(count).unwrap_or(u32::MAX));
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Collects the buffers of one chain.
pub(super) struct Builder<'a> {
    memory: &'a GuestMemoryMmap,
    buffers: Vec<Buffer>,
    readable: usize,
    total: u32,
    limit: usize,
}

impl<'a> Builder<'a> {
    /// For a queue of `size`.
    pub(super) fn new(memory: &'a GuestMemoryMmap, size: u16) -> Self {
        let limit = usize::from(size).max(CHAIN_MAX);
        Self { memory, buffers: Vec::with_capacity(4), readable: 0, total: 0, limit }
    }

    /// Adds a buffer. One of no bytes is left out.
    pub(super) fn add(&mut self, address: u64, len: u32, writable: bool) -> Result<(), RingError> {
        if self.buffers.len() >= self.limit {
            return Err(RingError::TooLong(self.limit));
        }
        if !writable && self.buffers.len() > self.readable {
            return Err(RingError::Order);
        }
        if len == 0 {
            return Ok(());
        }
        self.total = self.total.checked_add(len).ok_or(RingError::TooLarge)?;
        let access = if writable { Permissions::Write } else { Permissions::Read };
        let outside = RingError::Outside { what: "buffer", address, len: len.into() };
        let count = usize::try_from(len).map_err(|_| outside)?;
        if !self.memory.check_range(GuestAddress(address), count, access) {
            return Err(outside);
        }
        self.buffers.push(Buffer { address: GuestAddress(address), len });
        if !writable {
            self.readable = self.buffers.len();
        }
        Ok(())
    }

    /// How many entries an indirect table of `len` bytes has.
    pub(super) fn indirect_entries(len: u32) -> Result<u16, RingError> {
        let wrong = RingError::Indirect(len);
        let entries = u16::try_from(u64::from(len) / DESCRIPTOR_LEN).map_err(|_| wrong)?;
        if entries == 0 || entries > 1 << 15 || !u64::from(len).is_multiple_of(DESCRIPTOR_LEN) {
            return Err(wrong);
        }
        Ok(entries)
    }

    /// Follows a split chain from descriptor `head` of the table at `table`, and once into an indirect table if `indirect`.
    pub(super) fn follow(
        &mut self,
        table: u64,
        size: u16,
        head: u16,
        indirect: bool,
    ) -> Result<(), RingError> {
        let mut index = head;
        for _ in 0..size {
            if index >= size {
                return Err(RingError::Index { index, size });
            }
            let address = table.wrapping_add(u64::from(index) * DESCRIPTOR_LEN);
            let descriptor: Descriptor = self
                .memory
                .read_obj(GuestAddress(address))
                .map_err(|_| RingError::Outside { what: "descriptor", address, len: DESCRIPTOR_LEN })?;
            if descriptor.refers_to_indirect_table() {
                if !indirect || descriptor.has_next() {
                    return Err(RingError::Indirect(descriptor.len()));
                }
                let entries = Self::indirect_entries(descriptor.len())?;
                return self.follow(descriptor.addr().0, entries, 0, false);
            }
            self.add(descriptor.addr().0, descriptor.len(), descriptor.is_write_only())?;
            if !descriptor.has_next() {
                return Ok(());
            }
            index = descriptor.next();
        }
        Err(RingError::TooLong(size.into()))
    }

    /// The chain, which goes back as `id` and takes `slots` places of a packed ring.
    pub(super) fn finish(self, id: u16, slots: u16) -> Chain {
        Chain { id, slots, buffers: self.buffers, readable: self.readable }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x2000), (GuestAddress(0x10000), 0x2000)]).unwrap()
    }

    #[test]
    fn reading_and_writing_go_over_all_buffers_and_stop_at_their_end() {
        let memory = memory();
        let mut builder = Builder::new(&memory, 8);
        for (address, len, writable) in
            [(0x100, 3, false), (0x200, 0, false), (0x10100, 2, false), (0x300, 2, true), (0x10300, 3, true)]
        {
            builder.add(address, len, writable).unwrap();
        }
        let chain = builder.finish(5, 1);
        assert_eq!((chain.readable_len(), chain.writable_len()), (5, 5));
        memory.write_slice(b"abc", GuestAddress(0x100)).unwrap();
        memory.write_slice(b"de", GuestAddress(0x10100)).unwrap();
        let mut text = Vec::new();
        chain.reader(&memory).read_to_end(&mut text).unwrap();
        assert_eq!(text, b"abcde");
        let mut writer = chain.writer(&memory);
        assert!(writer.write_all(b"123456").is_err(), "one byte too many");
        assert_eq!(writer.written(), 5);
        let mut end = [0; 3];
        memory.read_slice(&mut end, GuestAddress(0x10300)).unwrap();
        assert_eq!(&end, b"345");
    }

    #[test]
    fn buffers_that_cannot_be_are_refused() {
        let memory = memory();
        let refused = |parts: &[(u64, u32, bool)]| {
            let mut builder = Builder::new(&memory, 8);
            parts.iter().find_map(|&(address, len, writable)| builder.add(address, len, writable).err())
        };
        assert_eq!(refused(&[(0x100, 1, true), (0x200, 1, false)]), Some(RingError::Order));
        for address in [0x1fff, 0x8000, u64::MAX] {
            let error = refused(&[(address, 2, true)]);
            assert_eq!(error, Some(RingError::Outside { what: "buffer", address, len: 2 }));
        }
        assert_eq!(refused(&[(0, 0x2000, false); 3]), None);
        let huge = refused(&[(0, u32::MAX, false)]);
        assert!(matches!(huge, Some(RingError::Outside { .. })));
        let many = refused(&[(0, 1, true); CHAIN_MAX + 1]);
        assert_eq!(many, Some(RingError::TooLong(CHAIN_MAX)));
    }
}
