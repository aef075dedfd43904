//! The common configuration of a virtio function (VIRTIO 1.2, section 4.1.4.3), as registers without a device behind them: features, status,
//! queues.
//!
//! A driver sets queues up before DRIVER_OK and not after it. One that does, or that writes to a queue that is not there, has broken the device.

use serde::{Deserialize, Serialize};

use super::super::device::{F_EVENT_IDX, F_INDIRECT_DESC, F_RING_PACKED, F_VERSION_1};
use super::super::ring::{QueueLayout, RingError, RingFeatures};

/// VIRTIO_MSI_NO_VECTOR.
pub const NO_VECTOR: u16 = 0xffff;

/// Bits of the device status (section 2.1).
pub const ACKNOWLEDGE: u8 = 1;
/// The driver knows the device.
pub const DRIVER: u8 = 2;
/// The driver is ready.
pub const DRIVER_OK: u8 = 4;
/// The features are settled.
pub const FEATURES_OK: u8 = 8;
/// The device has stopped.
pub const NEEDS_RESET: u8 = 64;
/// The driver has given up.
pub const FAILED: u8 = 128;

/// Length of the registers.
const LEN: usize = 64;

/// What a write asks for beyond the registers themselves.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub enum Effect {
    /// Nothing.
    None,
    /// Vectors have changed.
    Vectors,
    /// The driver is ready.
    Activate,
    /// The device is to be reset; [`CommonRegisters::reset`] when that is done.
    Reset,
    /// The driver must not do this.
    Violation(String),
}

/// One queue as the driver has set it up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueRegisters {
    max_size: u16,
    layout: QueueLayout,
    vector: u16,
    enabled: bool,
}

/// The registers. What of them goes on elsewhere is their whole content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommonRegisters {
    offered: u64,
    acknowledged: u64,
    device_select: u32,
    driver_select: u32,
    config_vector: u16,
    status: u8,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
}

impl CommonRegisters {
    /// Of a device that offers `features` and has queues of at most these sizes.
    pub fn new(features: u64, sizes: Vec<u16>) -> Self {
        let queue = |max_size| QueueRegisters {
            max_size,
            layout: QueueLayout { size: max_size, ..QueueLayout::default() },
            vector: NO_VECTOR,
            enabled: false,
        };
        Self {
            offered: features,
            acknowledged: 0,
            device_select: 0,
            driver_select: 0,
            config_vector: NO_VECTOR,
            status: 0,
            queue_select: 0,
            queues: sizes.into_iter().map(queue).collect(),
        }
    }

    /// As they were in the beginning.
    pub fn reset(&mut self) {
        *self = Self::new(self.offered, self.queues.iter().map(|queue| queue.max_size).collect());
    }

    /// Takes over what was saved of such registers.
    ///
    /// # Errors
    /// They were another device's, and in what.
    pub fn restore(&mut self, saved: Self) -> Result<(), String> {
        let sizes =
            |registers: &Self| registers.queues.iter().map(|queue| queue.max_size).collect::<Vec<_>>();
        let (then, now) = (sizes(&saved), sizes(self));
        if then != now {
            return Err(format!("it had queues of {then:?} descriptors and has queues of {now:?}"));
        }
        let missing = saved.acknowledged & !self.offered;
        if missing != 0 {
            return Err(format!("the guest uses features that it does not have here: {missing:#x}"));
        }
        // What is offered is this device's.
        *self = Self { offered: self.offered, ..saved };
        Ok(())
    }

    /// Number of queues.
    pub fn queues(&self) -> usize {
        self.queues.len()
    }

    /// Features that both sides have.
    pub fn negotiated(&self) -> u64 {
        self.acknowledged
    }

    /// What was negotiated of rings.
    pub fn ring_features(&self) -> RingFeatures {
        let has = |bit| self.acknowledged & bit != 0;
        RingFeatures {
            packed: has(F_RING_PACKED),
            event_idx: has(F_EVENT_IDX),
            indirect: has(F_INDIRECT_DESC),
        }
    }

    /// Whether the driver is ready.
    pub fn is_driver_ok(&self) -> bool {
        self.status & DRIVER_OK != 0
    }

    /// The vector of configuration changes.
    pub fn config_vector(&self) -> u16 {
        self.config_vector
    }

    /// The vector of a queue.
    pub fn queue_vector(&self, index: u16) -> u16 {
        self.queues.get(usize::from(index)).map_or(NO_VECTOR, |queue| queue.vector)
    }

    /// Where an enabled queue is; `None` if it is not enabled.
    pub fn layout(&self, index: u16) -> Option<Result<QueueLayout, RingError>> {
        let queue = self.queues.get(usize::from(index)).filter(|queue| queue.enabled)?;
        let size = queue.layout.size;
        Some(if size > queue.max_size { Err(RingError::Size(size)) } else { Ok(queue.layout) })
    }

    fn selected(&self) -> Option<&QueueRegisters> {
        self.queues.get(usize::from(self.queue_select))
    }

    /// The driver's read. `stopped`: the device has.
    pub fn read(&self, offset: u64, data: &mut [u8], generation: u8, stopped: bool) {
        let mut image = [0; LEN];
        self.image(&mut image, generation, stopped);
        data.fill(0);
        let from = usize::try_from(offset).unwrap_or(LEN);
        image.iter().skip(from).zip(data).for_each(|(value, byte)| *byte = *value);
    }

    fn image(&self, image: &mut [u8; LEN], generation: u8, stopped: bool) {
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.device_select.to_le_bytes());
        put(4, &half(self.offered, self.device_select).to_le_bytes());
        put(8, &self.driver_select.to_le_bytes());
        put(12, &half(self.acknowledged, self.driver_select).to_le_bytes());
        put(16, &self.config_vector.to_le_bytes());
        put(18, &u16::try_from(self.queues.len()).unwrap_or(u16::MAX).to_le_bytes());
        let stopped = if stopped { NEEDS_RESET } else { 0 };
        put(20, &[self.status | stopped, generation]);
        put(22, &self.queue_select.to_le_bytes());
        // A queue that is not there has no descriptors.
        let Some(queue) = self.selected() else { return };
        put(24, &queue.layout.size.to_le_bytes());
        put(26, &queue.vector.to_le_bytes());
        put(28, &u16::from(queue.enabled).to_le_bytes());
        put(30, &self.queue_select.to_le_bytes());
        put(32, &queue.layout.descriptors.to_le_bytes());
        put(40, &queue.layout.driver.to_le_bytes());
        put(48, &queue.layout.device.to_le_bytes());
    }

    /// The driver's write. Registers are written whole, or the 64-bit ones in halves; anything else is dropped.
    pub fn write(&mut self, offset: u64, data: &[u8], stopped: bool) -> Effect {
        let mut bytes = [0; 8];
        let Some(place) = bytes.get_mut(..data.len()) else { return Effect::None };
        place.copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        let low16 = u16::from_le_bytes([bytes[0], bytes[1]]);
        let low32 = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        match (offset, data.len()) {
            (0, 4) => self.device_select = low32,
            (8, 4) => self.driver_select = low32,
            (12, 4) => self.acknowledge(low32),
            (16, 2) => {
                self.config_vector = self.vector(low16);
                return Effect::Vectors;
            }
            (20, 1) => return self.set_status(bytes[0], stopped),
            (22, 2) => self.queue_select = low16,
            (24..56, _) => return self.write_queue(offset, data.len(), value),
            _ => {}
        }
        Effect::None
    }

    fn acknowledge(&mut self, bits: u32) {
        // Settled is settled.
        if self.status & FEATURES_OK == 0 && self.driver_select < 2 {
            let shift = 32 * self.driver_select;
            let mask = u64::from(u32::MAX) << shift;
            self.acknowledged = self.acknowledged & !mask | u64::from(bits) << shift;
        }
    }

    /// A vector that the function has, or none.
    fn vector(&self, vector: u16) -> u16 {
        if usize::from(vector) <= self.queues.len() { vector } else { NO_VECTOR }
    }

    fn set_status(&mut self, status: u8, stopped: bool) -> Effect {
        if status == 0 {
            return Effect::Reset;
        }
        let had = self.status;
        self.status |= status & !NEEDS_RESET;
        if self.status & !had & FEATURES_OK != 0 && !self.features_are_possible() {
            self.status &= !FEATURES_OK;
        }
        if self.status & !had & DRIVER_OK == 0 {
            return Effect::None;
        }
        if self.status & FEATURES_OK == 0 {
            self.status &= !DRIVER_OK;
            return Effect::Violation(
                "the driver says that it is ready before it has settled features".to_owned(),
            );
        }
        if stopped { Effect::None } else { Effect::Activate }
    }

    fn features_are_possible(&self) -> bool {
        self.acknowledged & !self.offered == 0 && self.acknowledged & F_VERSION_1 != 0
    }

    fn write_queue(&mut self, offset: u64, len: usize, value: u64) -> Effect {
        let index = self.queue_select;
        let driver_ok = self.is_driver_ok();
        let vector = self.vector(u16::try_from(value & 0xffff).unwrap_or(NO_VECTOR));
        let count = self.queues.len();
        let Some(queue) = self.queues.get_mut(usize::from(index)) else {
            return Effect::Violation(format!("the driver writes to queue {index} of {count}"));
        };
        if (offset, len) == (26, 2) {
            queue.vector = vector;
            return Effect::Vectors;
        }
        if driver_ok || queue.enabled {
            return match (offset, len, value) {
                // Enabling what is enabled changes nothing.
                (28, 2, 1) if queue.enabled => Effect::None,
                (24 | 28 | 32..56, ..) => {
                    Effect::Violation(format!("the driver changes queue {index} while it is in use"))
                }
                _ => Effect::None,
            };
        }
        let layout = &mut queue.layout;
        let halves = |register: &mut u64, at: u64| match (at, len) {
            (0, 8) => *register = value,
            (0, 4) => *register = *register & !u64::from(u32::MAX) | value,
            (4, 4) => *register = *register & u64::from(u32::MAX) | value << 32,
            _ => {}
        };
        match offset {
            24 if len == 2 => layout.size = u16::try_from(value).unwrap_or(0),
            28 if len == 2 => queue.enabled = value == 1,
            32..40 => halves(&mut layout.descriptors, offset - 32),
            40..48 => halves(&mut layout.driver, offset - 40),
            48..56 => halves(&mut layout.device, offset - 48),
            _ => {}
        }
        Effect::None
    }
}

/// Half number `select` of 64 feature bits.
fn half(bits: u64, select: u32) -> u32 {
    let [a, b, c, d, e, f, g, h] = bits.to_le_bytes();
    match select {
        0 => u32::from_le_bytes([a, b, c, d]),
        1 => u32::from_le_bytes([e, f, g, h]),
        _ => 0,
    }
}
