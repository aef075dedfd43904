//! Doorbells of virtio devices on KVM's ioeventfds (Linux `Documentation/virt/kvm/api.rst`, section 4.59): a store signals an eventfd in the kernel.

use std::fmt;
use std::io;
use std::sync::Arc;

use devices::virtio::pci::{Doorbell, DoorbellMapper};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use log::warn;
use vmm_sys_util::eventfd::EventFd;

/// Makes doorbells of one VM.
pub struct KvmDoorbells(pub Arc<VmFd>);

impl fmt::Debug for KvmDoorbells {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KvmDoorbells")
    }
}

impl DoorbellMapper for KvmDoorbells {
    fn map(&self, address: u64, event: &Arc<EventFd>) -> io::Result<Box<dyn Doorbell>> {
        let place = IoEventAddress::Mmio(address);
        // Of any length, which KVM need not decode the instruction for.
        self.0
            .register_ioevent(event, &place, NoDatamatch)
            .map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
        Ok(Box::new(KvmDoorbell { vm: Arc::clone(&self.0), address, event: Arc::clone(event) }))
    }
}

struct KvmDoorbell {
    vm: Arc<VmFd>,
    address: u64,
    event: Arc<EventFd>,
}

impl fmt::Debug for KvmDoorbell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KvmDoorbell({:#x})", self.address)
    }
}

impl Doorbell for KvmDoorbell {}

impl Drop for KvmDoorbell {
    fn drop(&mut self) {
        let place = IoEventAddress::Mmio(self.address);
        if let Err(e) = self.vm.unregister_ioevent(&self.event, &place, NoDatamatch) {
            warn!("the doorbell at {:#x} cannot be disconnected: {e}", self.address);
        }
    }
}
