//! The guest's two ways to configuration space: memory-mapped (ECAM, PCI Express Base 6.0, section 7.2.2) and by the ports 0xcf8
//! and 0xcfc (configuration mechanism #1, PCI Local Bus 3.0, section 3.2.2.3.2).

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vm_device::bus::{MmioAddress, MmioAddressOffset, PioAddress, PioAddressOffset};
use vm_device::{DeviceMmio, DevicePio};

use crate::bdf::DevFn;
use crate::bus::RootBus;
use crate::registers::is_natural;

/// Bytes of ECAM for the 256 buses of one segment.
pub const ECAM_LEN: u64 = 256 << 20;
/// Ports of mechanism #1: a dword of address, a dword of data.
pub const CAM_LEN: u16 = 8;

const CAM_DATA: u16 = 4;
const CAM_ENABLE: u32 = 1 << 31;

/// The function and the register in it that an access goes to.
struct Target {
    bus: u8,
    devfn: DevFn,
    register: u16,
}

fn read(bus: &RootBus, target: &Target, data: &mut [u8]) {
    data.fill(0xff);
    let Some(function) = bus.find(target.bus, target.devfn) else { return };
    for (register, piece) in (target.register..).step_by(4).zip(data.chunks_mut(4)) {
        function.config_read(register, piece);
    }
}

fn write(bus: &RootBus, target: &Target, data: &[u8]) {
    let Some(function) = bus.find(target.bus, target.devfn) else { return };
    for (register, piece) in (target.register..).step_by(4).zip(data.chunks(4)) {
        function.config_write(register, piece);
    }
}

/// Memory-mapped configuration space of a segment. Goes on the bus with [`ECAM_LEN`] bytes, or fewer if fewer buses are to be reached.
///
/// Accesses of 1, 2, 4 or 8 bytes, naturally aligned, are served, dword by dword; others read all ones and are dropped.
#[derive(Debug)]
pub struct Ecam {
    bus: Arc<RootBus>,
}

impl Ecam {
    /// The ECAM of that bus.
    pub fn new(bus: Arc<RootBus>) -> Self {
        Self { bus }
    }

    fn target(offset: u64, len: usize) -> Option<Target> {
        if offset >= ECAM_LEN || !is_natural(offset, len) {
            return None;
        }
        let [low, middle, high, bus, ..] = (offset << 4).to_le_bytes();
        Some(Target { bus, devfn: DevFn::from_bits(high), register: u16::from_le_bytes([low, middle]) >> 4 })
    }
}

impl DeviceMmio for Ecam {
    fn mmio_read(&self, _base: MmioAddress, offset: MmioAddressOffset, data: &mut [u8]) {
        match Self::target(offset, data.len()) {
            Some(target) => read(&self.bus, &target, data),
            None => data.fill(0xff),
        }
    }

    fn mmio_write(&self, _base: MmioAddress, offset: MmioAddressOffset, data: &[u8]) {
        if let Some(target) = Self::target(offset, data.len()) {
            write(&self.bus, &target, data);
        }
    }
}

/// Configuration mechanism #1. Goes on the bus with [`CAM_LEN`] ports.
///
/// The address register takes dwords only: smaller accesses to its ports belong to others (0xcf9 is the reset control register).
#[derive(Debug)]
pub struct Cam {
    bus: Arc<RootBus>,
    address: AtomicU32,
}

impl Cam {
    /// Mechanism #1 of that bus, disabled.
    pub fn new(bus: Arc<RootBus>) -> Self {
        Self { bus, address: AtomicU32::new(0) }
    }

    /// The address register.
    pub fn address(&self) -> u32 {
        self.address.load(Ordering::Relaxed)
    }

    /// Sets the address register.
    pub fn set_address(&self, address: u32) {
        // Bits 30:24 and 1:0 are reserved.
        self.address.store(address & 0x80ff_fffc, Ordering::Relaxed);
    }

    fn target(&self, offset: u16, len: usize) -> Option<Target> {
        let address = self.address.load(Ordering::Relaxed);
        let within = offset.checked_sub(CAM_DATA).filter(|&at| at < 4)?;
        if len > 4 || !is_natural(u64::from(within), len) || address & CAM_ENABLE == 0 {
            return None;
        }
        let [register, devfn, bus, _] = address.to_le_bytes();
        Some(Target { bus, devfn: DevFn::from_bits(devfn), register: u16::from(register & !3) + within })
    }
}

impl DevicePio for Cam {
    fn pio_read(&self, _base: PioAddress, offset: PioAddressOffset, data: &mut [u8]) {
        if offset == 0 && data.len() == 4 {
            data.copy_from_slice(&self.address.load(Ordering::Relaxed).to_le_bytes());
            return;
        }
        match self.target(offset, data.len()) {
            Some(target) => read(&self.bus, &target, data),
            None => data.fill(0xff),
        }
    }

    fn pio_write(&self, _base: PioAddress, offset: PioAddressOffset, data: &[u8]) {
        if let (0, &[a, b, c, d]) = (offset, data) {
            self.set_address(u32::from_le_bytes([a, b, c, d]));
        } else if let Some(target) = self.target(offset, data.len()) {
            write(&self.bus, &target, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::RootBusBuilder;
    use crate::testing::{FakeBridge, Recorder};

    const NOTHING: [&str; 0] = [];

    /// One recorder at 02.3 of bus 0, another at 00.0 of bus 0x81.
    fn machine() -> (Arc<RootBus>, Arc<Recorder>, Arc<Recorder>) {
        let (top, below) = (Recorder::new(), Recorder::new());
        let bridge = FakeBridge::new(DevFn::from_bits(0), below.clone());
        bridge.set_bus_range(0x81, 0x81);
        let mut builder = RootBusBuilder::new();
        builder.add_function(DevFn::new(2, 3).unwrap(), top.clone()).unwrap();
        builder.add_bridge(DevFn::new(1, 0).unwrap(), bridge).unwrap();
        (Arc::new(builder.build()), top, below)
    }

    fn ecam_read<const N: usize>(ecam: &Ecam, offset: u64) -> [u8; N] {
        let mut data = [0x55; N];
        ecam.mmio_read(MmioAddress(0xe000_0000), offset, &mut data);
        data
    }

    #[test]
    fn ecam_addresses_reach_their_function_and_register() {
        let (bus, top, below) = machine();
        let ecam = Ecam::new(bus);
        assert_eq!(ecam_read::<2>(&ecam, 0x1_3ffe), [0; 2]);
        ecam.mmio_write(MmioAddress(0), 0x810_0104, &[1]);
        assert_eq!(top.take(), ["config read ffe 2"]);
        assert_eq!(below.take(), ["config write 104 [1]"]);
    }

    #[test]
    fn a_qword_becomes_two_dwords() {
        let (bus, top, _) = machine();
        let ecam = Ecam::new(bus);
        assert_eq!(ecam_read::<8>(&ecam, 0x1_3ff8), [0; 8]);
        ecam.mmio_write(MmioAddress(0), 0x1_3010, &[1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(
            top.take(),
            [
                "config read ff8 4",
                "config read ffc 4",
                "config write 10 [1, 2, 3, 4]",
                "config write 14 [5, 6, 7, 8]"
            ]
        );
    }

    #[test]
    fn absent_functions_and_odd_accesses_read_all_ones_and_are_dropped() {
        let (bus, top, below) = machine();
        let ecam = Ecam::new(bus);
        assert_eq!(ecam_read::<4>(&ecam, 0), [0xff; 4], "no function");
        assert_eq!(ecam_read::<8>(&ecam, 0x820_0000), [0xff; 8], "no bus");
        assert_eq!(ecam_read::<4>(&ecam, 0x1_3002), [0xff; 4], "across two dwords");
        assert_eq!(ecam_read::<3>(&ecam, 0x1_3000), [0xff; 3]);
        assert_eq!(ecam_read::<0>(&ecam, 0x1_3000), [0; 0]);
        assert_eq!(ecam_read::<16>(&ecam, 0x1_3000), [0xff; 16]);
        assert_eq!(ecam_read::<8>(&ecam, 0x1_3004), [0xff; 8]);
        for beyond in [ECAM_LEN, ECAM_LEN + 0x1_3000, u64::MAX, u64::MAX - 7] {
            assert_eq!(ecam_read::<1>(&ecam, beyond), [0xff]);
            ecam.mmio_write(MmioAddress(0), beyond, &[0]);
        }
        ecam.mmio_write(MmioAddress(0), 0x1_3002, &[0; 4]);
        assert_eq!(top.take(), NOTHING);
        assert_eq!(below.take(), NOTHING);
    }

    /// The device sees offsets only.
    const CAM: PioAddress = PioAddress(0xcf8);

    fn cam_read<const N: usize>(cam: &Cam, offset: u16) -> [u8; N] {
        let mut data = [0x55; N];
        cam.pio_read(CAM, offset, &mut data);
        data
    }

    #[test]
    fn the_ports_reach_the_function_that_the_address_register_names() {
        let (bus, top, below) = machine();
        let cam = Cam::new(bus);
        cam.pio_write(CAM, 0, &0xff00_13ffu32.to_le_bytes());
        assert_eq!(cam_read::<4>(&cam, 0), 0x8000_13fcu32.to_le_bytes());
        assert_eq!(cam_read::<1>(&cam, 7), [0]);
        assert_eq!(cam_read::<2>(&cam, 6), [0; 2]);
        cam.pio_write(CAM, 4, &[1, 2, 3, 4]);
        assert_eq!(top.take(), ["config read ff 1", "config read fe 2", "config write fc [1, 2, 3, 4]"]);
        cam.pio_write(CAM, 0, &0x8081_0004u32.to_le_bytes());
        cam.pio_write(CAM, 4, &[7, 0]);
        assert_eq!(below.take(), ["config write 4 [7, 0]"]);
    }

    #[test]
    fn odd_port_accesses_read_all_ones_and_are_dropped() {
        let (bus, top, _) = machine();
        let cam = Cam::new(bus);
        assert_eq!(cam_read::<4>(&cam, 4), [0xff; 4], "not enabled");
        cam.pio_write(CAM, 0, &0x8000_1300u32.to_le_bytes());
        assert_eq!(cam_read::<1>(&cam, 1), [0xff], "the reset control register is another's");
        assert_eq!(cam_read::<2>(&cam, 0), [0xff; 2]);
        assert_eq!(cam_read::<4>(&cam, 6), [0xff; 4]);
        assert_eq!(cam_read::<2>(&cam, 5), [0xff; 2]);
        assert_eq!(cam_read::<8>(&cam, 4), [0xff; 8]);
        assert_eq!(cam_read::<1>(&cam, u16::MAX), [0xff]);
        for (offset, len) in [(1, 1), (0, 2), (2, 4), (6, 4), (8, 1)] {
            cam.pio_write(CAM, offset, &vec![0xff; len]);
        }
        assert_eq!(cam_read::<4>(&cam, 0), 0x8000_1300u32.to_le_bytes());
        assert_eq!(top.take(), NOTHING);
    }
}
