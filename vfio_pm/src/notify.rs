//! The power notification device: the trap half of [`acpi::notify_abi`]. Decodes the guest's accesses and routes them to the
//! power domains.

use std::sync::{Arc, PoisonError, RwLock};

use acpi::notify_abi::{
    ID, REQUEST_OFF, REQUEST_ON, RESOURCE_COUNT, RESOURCES_PER_WAKE_WORD, Register, ResourceIndex, STATUS_ON,
    VERSION, WakeWord, decode,
};
use vm_device::DeviceMmio;
use vm_device::bus::{MmioAddress, MmioAddressOffset};

use crate::domain::PowerDomain;

/// Routes the register page's accesses to the power domains.
#[derive(Debug)]
pub struct NotifyDevice {
    /// By resource index. Held for a look only, never over a call of a domain.
    routes: RwLock<Vec<Option<Arc<PowerDomain>>>>,
    /// Resources of functions that have no power to cut, likewise.
    always_on: RwLock<Vec<bool>>,
}

impl NotifyDevice {
    /// A device for these domains. Where two claim one resource index, the first has it.
    pub fn new(domains: Vec<Arc<PowerDomain>>) -> Self {
        let device = Self {
            routes: RwLock::new(vec![None; RESOURCE_COUNT]),
            always_on: RwLock::new(vec![false; RESOURCE_COUNT]),
        };
        domains.iter().for_each(|domain| device.add(domain));
        device
    }

    /// Routes to one more domain, whose indices nobody has.
    pub fn add(&self, domain: &Arc<PowerDomain>) {
        let mut routes = self.routes.write().unwrap_or_else(PoisonError::into_inner);
        for index in domain.resources() {
            if let Some(route) = routes.get_mut(index.as_usize()) {
                route.get_or_insert_with(|| Arc::clone(domain));
            }
        }
    }

    /// Forgets a domain: its registers read as if there had never been one.
    pub fn remove(&self, domain: &Arc<PowerDomain>) {
        let mut routes = self.routes.write().unwrap_or_else(PoisonError::into_inner);
        for route in routes.iter_mut() {
            if route.as_ref().is_some_and(|present| Arc::ptr_eq(present, domain)) {
                *route = None;
            }
        }
    }

    /// The tables give this resource to a function that has no power to cut: it reads as on, whatever is asked for. Or no longer.
    pub fn set_always_on(&self, index: ResourceIndex, on: bool) {
        let mut always_on = self.always_on.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = always_on.get_mut(index.as_usize()) {
            *place = on;
        }
    }

    fn is_always_on(&self, index: ResourceIndex) -> bool {
        let always_on = self.always_on.read().unwrap_or_else(PoisonError::into_inner);
        always_on.get(index.as_usize()).copied().unwrap_or(false)
    }

    fn domain(&self, index: ResourceIndex) -> Option<Arc<PowerDomain>> {
        let routes = self.routes.read().unwrap_or_else(PoisonError::into_inner);
        routes.get(index.as_usize()).cloned().flatten()
    }

    fn read(&self, register: Register) -> u32 {
        match register {
            Register::Id => ID,
            Register::Version => VERSION,
            Register::Wake(word) => self.take_wakes(word),
            Register::Request(_) => 0,
            Register::Status(index) => match self.domain(index) {
                Some(domain) => domain.status(index),
                None if self.is_always_on(index) => STATUS_ON,
                None => 0,
            },
        }
    }

    fn take_wakes(&self, word: WakeWord) -> u32 {
        let bits = (0..).take(RESOURCES_PER_WAKE_WORD).filter_map(|bit| word.resource(bit));
        bits.filter(|index| self.domain(*index).is_some_and(|domain| domain.take_wake(*index)))
            .fold(0, |word, index| word | index.wake_mask())
    }
}

impl DeviceMmio for NotifyDevice {
    fn mmio_read(&self, _base: MmioAddress, offset: MmioAddressOffset, data: &mut [u8]) {
        let register = if data.len() == 4 { decode(offset) } else { None };
        match register {
            Some(register) => data.copy_from_slice(&self.read(register).to_le_bytes()),
            None => data.fill(0xff),
        }
    }

    fn mmio_write(&self, _base: MmioAddress, offset: MmioAddressOffset, data: &[u8]) {
        let Ok(value) = <[u8; 4]>::try_from(data).map(u32::from_le_bytes) else { return };
        let Some(Register::Request(index)) = decode(offset) else { return };
        let Some(domain) = self.domain(index) else { return };
        match value {
            REQUEST_ON => domain.request(index, true),
            REQUEST_OFF => domain.request(index, false),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::Slot;

    fn read(device: &NotifyDevice, offset: u64, size: usize) -> Vec<u8> {
        let mut data = vec![0x5a; size];
        device.mmio_read(MmioAddress(0xfed0_0000), offset, &mut data);
        data
    }

    fn read_dword(device: &NotifyDevice, offset: u64) -> u32 {
        u32::from_le_bytes(read(device, offset, 4).try_into().unwrap())
    }

    #[test]
    fn off_and_on_written_by_the_guest_reach_the_function_and_status_follows() {
        let slot = Slot::new(1);
        let device = NotifyDevice::new(vec![Arc::clone(&slot.domain)]);
        let index = slot.resource(0);
        let request = |value: u32| {
            let offset = acpi::notify_abi::request_offset(index);
            device.mmio_write(MmioAddress(0), offset, &value.to_le_bytes());
        };
        let status = || read_dword(&device, acpi::notify_abi::status_offset(index));
        assert_eq!(status(), 1);
        request(7);
        assert_eq!(status(), 1, "values other than 0 and 1 are ignored");
        request(0);
        assert_eq!(status(), 0);
        slot.functions[0].wait_engaged();
        request(1);
        crate::fake::eventually("status says ready", || status() == 1);
    }

    #[test]
    fn a_domain_that_was_removed_is_as_one_that_never_was_and_can_come_again() {
        let slot = Slot::new(1);
        let device = NotifyDevice::new(Vec::new());
        let status = || read_dword(&device, acpi::notify_abi::status_offset(slot.resource(0)));
        assert_eq!(status(), 0);
        device.add(&slot.domain);
        assert_eq!(status(), 1);
        device.remove(&slot.domain);
        assert_eq!(status(), 0);
        device.add(&slot.domain);
        assert_eq!(status(), 1);
    }

    #[test]
    fn odd_accesses_and_holes_read_all_ones_and_unknown_resources_read_zero() {
        let slot = Slot::new(1);
        let device = NotifyDevice::new(vec![Arc::clone(&slot.domain)]);
        for (offset, size) in
            [(0, 1), (0, 2), (0, 8), (1, 4), (8, 4), (0xffc, 4), (0x1000, 4), (u64::MAX, 4), (0, 0)]
        {
            assert!(read(&device, offset, size).iter().all(|byte| *byte == 0xff), "{offset:#x}/{size}");
            device.mmio_write(MmioAddress(0), offset, &vec![0; size]);
        }
        assert_eq!(read_dword(&device, 0), ID);
        assert_eq!(read_dword(&device, 4), VERSION);
        let absent = ResourceIndex(200);
        device.mmio_write(MmioAddress(0), acpi::notify_abi::request_offset(absent), &1u32.to_le_bytes());
        assert_eq!(read_dword(&device, acpi::notify_abi::status_offset(absent)), 0);
        assert_eq!(read_dword(&device, acpi::notify_abi::request_offset(slot.resource(0))), 0);
        assert_eq!(slot.domain.status(slot.resource(0)), 1, "none of it touched the function");
    }

    #[test]
    fn a_wake_bit_is_read_once_at_its_functions_place() {
        let slot = Slot::with(2, |spec| spec.timing.confirm = std::time::Duration::from_secs(2));
        let device = NotifyDevice::new(vec![Arc::clone(&slot.domain)]);
        slot.functions[1].set_pme_enabled(true);
        slot.off_and_entered(1);
        slot.functions[1].host_wake();
        crate::fake::eventually("the event device is told", || slot.wake.count() == 1);
        let word = slot.resource(1).wake_word();
        assert_eq!(word.as_usize(), 1);
        assert_eq!(read_dword(&device, 0x10), 0, "that is the other word");
        assert_eq!(read_dword(&device, 0x14), slot.resource(1).wake_mask());
        assert_eq!(read_dword(&device, 0x14), 0);
    }
}
