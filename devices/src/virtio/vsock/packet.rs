//! The header that every packet begins with (VIRTIO 1.2, section 5.10.6).
//!
//! The crate `virtio-vsock` has a type for it too, but only together with the descriptor chains of `virtio-queue`, which know no packed rings.

/// Bytes of a header.
pub const HEADER_LEN: usize = 44;
/// The context identifier of the host.
pub const HOST_CID: u64 = 2;
/// A reliable stream: the only type of socket there is.
pub const STREAM: u16 = 1;

/// What a packet is for.
pub mod op {
    /// Asks for a connection.
    pub const REQUEST: u16 = 1;
    /// Agrees to it.
    pub const RESPONSE: u16 = 2;
    /// Ends a connection, or refuses one.
    pub const RST: u16 = 3;
    /// Announces an end, or half of it.
    pub const SHUTDOWN: u16 = 4;
    /// Data.
    pub const RW: u16 = 5;
    /// Nothing but the credit that every header has.
    pub const CREDIT_UPDATE: u16 = 6;
    /// Asks for that.
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Flags of [`op::SHUTDOWN`].
pub mod shutdown {
    /// Its sender takes no more data.
    pub const RECEIVE: u32 = 1;
    /// Its sender sends no more data.
    pub const SEND: u32 = 2;
    /// Both.
    pub const BOTH: u32 = RECEIVE | SEND;
}

/// A header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Who sends.
    pub src_cid: u64,
    /// Who is to receive.
    pub dst_cid: u64,
    /// The sender's port.
    pub src_port: u32,
    /// The receiver's port.
    pub dst_port: u32,
    /// Bytes of data behind the header.
    pub len: u32,
    /// Type of socket.
    pub kind: u16,
    /// See [`op`].
    pub op: u16,
    /// What depends on `op`.
    pub flags: u32,
    /// The sender's room for data of this connection.
    pub buf_alloc: u32,
    /// How many bytes of this connection have left that room again, as a running number.
    pub fwd_cnt: u32,
}

impl Header {
    /// As it lies in memory.
    pub fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// From memory.
    pub fn from_bytes(bytes: &[u8; HEADER_LEN]) -> Self {
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let word = |at: usize| u32::from(half(at)) | u32::from(half(at + 2)) << 16;
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        Self {
            src_cid: long(0),
            dst_cid: long(8),
            src_port: word(16),
            dst_port: word(20),
            len: word(24),
            kind: half(28),
            op: half(30),
            flags: word(32),
            buf_alloc: word(36),
            fwd_cnt: word(40),
        }
    }

    /// The answer to a packet that belongs to no connection.
    pub fn refusal(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: op::RST,
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_its_way_through_memory_and_has_the_standards_layout() {
        let header = Header {
            src_cid: 0x0102_0304_0506_0708,
            dst_cid: HOST_CID,
            src_port: 0x1111_2222,
            dst_port: 52,
            len: 4096,
            kind: STREAM,
            op: op::RW,
            flags: 3,
            buf_alloc: 0x4000,
            fwd_cnt: u32::MAX,
        };
        let bytes = header.to_bytes();
        assert_eq!(Header::from_bytes(&bytes), header);
        assert_eq!((bytes[0], bytes[8], bytes[20], bytes[28], bytes[30]), (8, 2, 52, 1, 5));
    }
}
