//! The host bridge, function 00.0 of bus 0: an identity and nothing else (PCI Express Base 6.0, section 1.3.1).

use std::sync::{Mutex, PoisonError};

use crate::config::{ConfigSpace, Identity};
use crate::function::{BarIndex, PciFunction};

/// Cloud Hypervisor's: firmware that is built for that VMM knows by it which machine it is in. No driver binds to it, and no quirk
/// knows it.
const IDENTITY: Identity =
    Identity { vendor: 0x8086, device: 0x0d57, revision: 0, class: 0x06_0000, subsystem: (0x1af4, 0x1100) };

/// The host bridge.
#[derive(Debug)]
pub struct HostBridge {
    config: Mutex<ConfigSpace>,
}

impl Default for HostBridge {
    fn default() -> Self {
        Self::new()
    }
}

impl HostBridge {
    /// A host bridge; put it at 00.0.
    pub fn new() -> Self {
        Self { config: Mutex::new(ConfigSpace::endpoint(&IDENTITY)) }
    }
}

impl PciFunction for HostBridge {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.config.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        self.config.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
    }

    fn bar_read(&self, _bar: BarIndex, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn bar_write(&self, _bar: BarIndex, _offset: u64, _data: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_reads_as_a_host_bridge_and_has_no_bars() {
        let bridge = HostBridge::new();
        bridge.config_write(0x10, &[0xff; 4]);
        let mut data = [0; 0x14];
        bridge.config_read(0, &mut data);
        assert_eq!(data[..4], [0x86, 0x80, 0x57, 0x0d]);
        assert_eq!(data[8..], [0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0, 0]);
        bridge.bar_read(0, 0, &mut data);
        assert_eq!(data, [0xff; 0x14]);
    }
}
