//! The device's configuration (VIRTIO 1.2, section 5.2.4).

use crate::block::{SECTOR, Topology};

/// The most ranges of one discard or write-zeroes request.
pub(super) const RANGES_MAX: u32 = 32;
/// The most sectors of one such range: what a host does in a reasonable time.
pub(super) const DISCARD_MAX: u32 = 1 << 22;
/// Where the host cannot do it otherwise, zeroes are written.
pub(super) const ZEROES_MAX: u32 = 1 << 16;
/// The longest segment.
const SIZE_MAX: u32 = 4 << 20;
/// Bytes of `struct virtio_blk_config` up to what of it there is here.
const LEN: usize = 60;
/// Where the cache mode is.
const WRITEBACK: u64 = 32;

/// What the configuration says.
#[derive(Clone, Copy, Debug)]
pub(super) struct ConfigLayout {
    pub sectors: u64,
    pub queue_size: u16,
    pub num_queues: u16,
    pub topology: Topology,
    pub writeback: bool,
    pub unmaps: bool,
}

impl ConfigLayout {
    fn image(&self) -> [u8; LEN] {
        let mut image = [0; LEN];
        let mut put = |at: usize, bytes: &[u8]| {
            if let Some(target) = image.get_mut(at..at + bytes.len()) {
                target.copy_from_slice(bytes);
            }
        };
        let Topology { logical, physical, optimal } = self.topology;
        let logical = logical.max(512);
        let blocks = |bytes: u32| bytes / logical;
        put(0, &self.sectors.to_le_bytes());
        put(8, &SIZE_MAX.to_le_bytes());
        // The rest of a chain are header and status.
        put(12, &u32::from(self.queue_size.saturating_sub(2).max(1)).to_le_bytes());
        put(20, &logical.to_le_bytes());
        put(24, &[u8::try_from(blocks(physical).max(1).ilog2()).unwrap_or(0)]);
        put(26, &u16::try_from(blocks(physical)).unwrap_or(0).to_le_bytes());
        put(28, &blocks(optimal).to_le_bytes());
        put(32, &[u8::from(self.writeback)]);
        put(34, &self.num_queues.max(1).to_le_bytes());
        put(36, &DISCARD_MAX.to_le_bytes());
        put(40, &RANGES_MAX.to_le_bytes());
        put(44, &(u64::from(physical) / SECTOR).max(1).to_le_bytes()[..4]);
        put(48, &ZEROES_MAX.to_le_bytes());
        put(52, &RANGES_MAX.to_le_bytes());
        put(56, &[u8::from(self.unmaps)]);
        image
    }

    /// The driver's read.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        let image = self.image();
        let from = usize::try_from(offset).ok().and_then(|offset| image.get(offset..)).unwrap_or_default();
        data.iter_mut().zip(from).for_each(|(byte, from)| *byte = *from);
    }

    /// The cache mode, if the driver's write is of it. Nothing else can be written.
    pub(super) fn written(offset: u64, data: &[u8]) -> Option<bool> {
        let at = usize::try_from(WRITEBACK.checked_sub(offset)?).ok()?;
        data.get(at).map(|byte| byte & 1 != 0)
    }
}
