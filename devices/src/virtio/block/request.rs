//! A request of the driver (VIRTIO 1.2, section 5.2.6): a header, data, and a byte for the status, in buffers cut up in any way.

use std::io::{self, Read};

use vm_memory::{Bytes, GuestAddress};

use super::config::{DISCARD_MAX, RANGES_MAX, ZEROES_MAX};
use super::{SERIAL_LEN, Shared};
use crate::block::SECTOR;
use crate::virtio::MemoryView;
use crate::virtio::chain::{Buffer, Chain};
use crate::virtio::device::DeviceError;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

const HEADER_LEN: u32 = 16;
/// Bytes of `struct virtio_blk_discard_write_zeroes`.
const RANGE_LEN: usize = 16;
/// The one flag of a range: give the room back too.
const RANGE_UNMAP: u32 = 1;

/// What the driver is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// A range to discard or to fill with zeroes, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub offset: u64,
    pub len: u64,
    pub unmap: bool,
}

/// What is asked for, checked against the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// So many bytes from this offset on.
    Read(u64, u64),
    Write(u64, u64),
    Flush,
    Id,
    Discard(Vec<Range>),
    Zeroes(Vec<Range>),
    /// Not done, and why not.
    Refused(Status),
}

impl Request {
    /// Bytes that count against a limit.
    pub(super) fn bytes(&self) -> u64 {
        match self {
            Self::Read(_, len) | Self::Write(_, len) => *len,
            _ => 0,
        }
    }

    /// Reads a request.
    ///
    /// # Errors
    /// There is no header or no place for a status: nothing can be answered.
    pub(super) fn read(view: &MemoryView, chain: &Chain, shared: &Shared) -> Result<Self, DeviceError> {
        let protocol = |what: &str| DeviceError::Protocol(format!("a request {what}"));
        if chain.writable_len() == 0 {
            return Err(protocol("has no place for its status"));
        }
        if chain.readable_len() < HEADER_LEN {
            return Err(protocol("has no header"));
        }
        let mut header = [0; HEADER_LEN as usize];
        let mut reader = chain.reader(view);
        reader.read_exact(&mut header).map_err(DeviceError::host("reading a request"))?;
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let limits = Limits {
            sectors: shared.sectors(),
            readonly: shared.disk.readonly,
            protected: shared.disk.protected,
        };
        let request = match u32::from_le_bytes([t0, t1, t2, t3]) {
            T_IN => {
                limits.access(sector, chain.writable_len() - 1).map(|(offset, len)| Self::Read(offset, len))
            }
            T_OUT => limits
                .access(sector, chain.readable_len() - HEADER_LEN)
                .and_then(|range| limits.write(range))
                .map(|(offset, len)| Self::Write(offset, len)),
            T_FLUSH => Ok(Self::Flush),
            T_GET_ID => Ok(Self::Id),
            T_DISCARD if shared.disk.sparse || shared.disk.readonly => {
                limits.ranges(reader, DISCARD_MAX, 0).map(Self::Discard)
            }
            T_WRITE_ZEROES => limits.ranges(reader, ZEROES_MAX, RANGE_UNMAP).map(Self::Zeroes),
            _ => Err(Status::Unsupported),
        };
        Ok(request.unwrap_or_else(Self::Refused))
    }
}

/// What a request must keep to.
struct Limits {
    sectors: u64,
    readonly: bool,
    protected: bool,
}

impl Limits {
    /// The bytes of an access, if they are on the disk.
    fn access(&self, sector: u64, len: u32) -> Result<(u64, u64), Status> {
        let len = u64::from(len);
        if !len.is_multiple_of(SECTOR) {
            return Err(Status::IoError);
        }
        self.place(sector, len / SECTOR)
    }

    fn place(&self, sector: u64, count: u64) -> Result<(u64, u64), Status> {
        let end = sector.checked_add(count).filter(|end| *end <= self.sectors).ok_or(Status::IoError)?;
        // Less than the disk's size in bytes, which is a number of 64 bits.
        debug_assert!(end <= self.sectors);
        Ok((sector.saturating_mul(SECTOR), count.saturating_mul(SECTOR)))
    }

    /// Whether that can be changed.
    fn write(&self, (offset, len): (u64, u64)) -> Result<(u64, u64), Status> {
        if self.readonly || (self.protected && offset < SECTOR && len > 0) {
            return Err(Status::IoError);
        }
        Ok((offset, len))
    }

    /// The ranges in the data of a request.
    fn ranges(&self, data: impl Read, longest: u32, flags: u32) -> Result<Vec<Range>, Status> {
        let most = RANGE_LEN * RANGES_MAX as usize;
        let mut bytes = Vec::new();
        data.take(most as u64 + 1).read_to_end(&mut bytes).map_err(|_| Status::IoError)?;
        if bytes.is_empty() || bytes.len() > most || !bytes.len().is_multiple_of(RANGE_LEN) {
            return Err(Status::IoError);
        }
        let mut ranges = Vec::new();
        for range in bytes.as_chunks::<RANGE_LEN>().0 {
            let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f0, f1, f2, f3] = *range;
            let count = u32::from_le_bytes([n0, n1, n2, n3]);
            let given = u32::from_le_bytes([f0, f1, f2, f3]);
            if given & !flags != 0 {
                return Err(Status::Unsupported);
            }
            if count > longest {
                return Err(Status::IoError);
            }
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let (offset, len) = self.place(sector, count.into()).and_then(|range| self.write(range))?;
            if len > 0 {
                ranges.push(Range { offset, len, unmap: given & RANGE_UNMAP != 0 });
            }
        }
        Ok(ranges)
    }
}

/// The data of a write: what is readable, without the header.
pub(super) fn write_data(chain: &Chain) -> impl Iterator<Item = Buffer> + '_ {
    let mut skip = HEADER_LEN;
    chain.readable().iter().filter_map(move |buffer| {
        let skipped = skip.min(buffer.len);
        skip -= skipped;
        let address = GuestAddress(buffer.address.0.wrapping_add(skipped.into()));
        (buffer.len > skipped).then(|| Buffer { address, len: buffer.len - skipped })
    })
}

/// The place for the data of a read: what is writable, without the status.
pub(super) fn read_data(chain: &Chain) -> impl Iterator<Item = Buffer> + '_ {
    let mut left = chain.writable_len().saturating_sub(1);
    chain.writable().iter().filter_map(move |buffer| {
        let len = buffer.len.min(left);
        left -= len;
        (len > 0).then_some(Buffer { address: buffer.address, len })
    })
}

/// Writes the identity of the disk; how many bytes.
pub(super) fn put_id(view: &MemoryView, chain: &Chain, serial: &[u8; SERIAL_LEN]) -> io::Result<u32> {
    let mut put = 0;
    for buffer in read_data(chain) {
        let from = serial.get(put..).unwrap_or_default();
        let count = usize::try_from(buffer.len).unwrap_or(0).min(from.len());
        view.write_slice(from.get(..count).unwrap_or_default(), buffer.address).map_err(io::Error::other)?;
        put += count;
    }
    u32::try_from(put).map_err(io::Error::other)
}

/// Writes the status: the last byte that is writable.
///
/// # Errors
/// It is not in memory any more.
pub(super) fn put_status(view: &MemoryView, chain: &Chain, status: Status) -> Result<(), DeviceError> {
    let Some(last) = chain.writable().last() else { return Ok(()) };
    let address = GuestAddress(last.address.0.wrapping_add(u64::from(last.len.saturating_sub(1))));
    view.write_obj(status as u8, address)
        .map_err(|e| DeviceError::Protocol(format!("the status of a request cannot be written: {e}")))
}
