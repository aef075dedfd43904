//! KVM memory slots: what of the host's memory the guest reaches without an exit (`KVM_SET_USER_MEMORY_REGION`,
//! Linux `Documentation/virt/kvm/api.rst`, section 4.35).
#![allow(unsafe_code)] // A slot hands host addresses to the guest.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::vfio::bar::{GuestMapper, MappedArea, Mapping};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Cap, Kvm, VmFd};
use log::error;

use crate::control::{Control, StopReason};

/// Why a slot could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MemslotError {
    /// All slot numbers are taken.
    #[error("all {0} memory slots of KVM are in use")]
    Exhausted(u32),
    /// KVM refused.
    #[error("{0}")]
    Kvm(#[source] io::Error),
}

/// The slot numbers of one VM. A number is used again once its slot is gone.
pub struct Memslots {
    vm: Arc<VmFd>,
    control: Arc<Control>,
    limit: u32,
    used: Mutex<Vec<bool>>,
}

impl fmt::Debug for Memslots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Memslots").field("used", &self.count()).field("limit", &self.limit).finish()
    }
}

impl Memslots {
    /// For `vm`, with as many slots as KVM has. A slot that cannot be removed stops the machine through `control`.
    pub fn new(kvm: &Kvm, vm: Arc<VmFd>, control: Arc<Control>) -> Arc<Self> {
        // Older kernels answer 0 where they mean the architecture's minimum.
        let limit = u32::try_from(kvm.check_extension_int(Cap::NrMemslots)).unwrap_or(0).max(32);
        Arc::new(Self { vm, control, limit, used: Mutex::new(Vec::new()) })
    }

    /// How many slots stand now.
    pub fn count(&self) -> usize {
        self.used().iter().filter(|used| **used).count()
    }

    /// Makes a slot of `size` bytes at guest address `gpa` over host memory at `host`.
    ///
    /// The caller keeps the host mapping alive until the returned slot is dropped.
    pub fn add(self: &Arc<Self>, gpa: u64, host: u64, size: u64) -> Result<Memslot, MemslotError> {
        let number = {
            let mut used = self.used();
            let free = used.iter().position(|taken| !taken).unwrap_or(used.len());
            let number = u32::try_from(free).unwrap_or(u32::MAX);
            if number >= self.limit {
                return Err(MemslotError::Exhausted(self.limit));
            }
            if free == used.len() {
                used.push(true);
            } else {
                used[free] = true;
            }
            number
        };
        if let Err(e) = self.set(number, gpa, host, size) {
            self.release(number);
            return Err(MemslotError::Kvm(e));
        }
        Ok(Memslot { slots: Arc::clone(self), number, gpa })
    }

    fn set(&self, slot: u32, gpa: u64, host: u64, size: u64) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: gpa,
            memory_size: size,
            userspace_addr: host,
        };
        // SAFETY: `add`'s caller keeps the host range mapped while the slot stands; a size of 0 removes a slot.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(|e| io::Error::from_raw_os_error(e.errno()))
    }

    fn release(&self, number: u32) {
        if let Some(used) = self.used().get_mut(number as usize) {
            *used = false;
        }
    }

    fn used(&self) -> MutexGuard<'_, Vec<bool>> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Gives assigned functions slots for their BARs.
#[derive(Debug)]
pub struct BarMapper(pub Arc<Memslots>);

impl GuestMapper for BarMapper {
    fn map(&self, gpa: u64, area: &MappedArea) -> io::Result<Box<dyn Mapping>> {
        match self.0.add(gpa, area.host_address(), area.size()) {
            Ok(slot) => Ok(Box::new(slot)),
            Err(MemslotError::Kvm(e)) => Err(e),
            Err(e @ MemslotError::Exhausted(_)) => Err(io::Error::other(e)),
        }
    }
}

/// One slot; dropping it takes the memory from the guest. When the drop returns, no vCPU can reach it.
pub struct Memslot {
    slots: Arc<Memslots>,
    number: u32,
    gpa: u64,
}

impl fmt::Debug for Memslot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Memslot({} at {:#x})", self.number, self.gpa)
    }
}

impl Mapping for Memslot {}

impl Drop for Memslot {
    fn drop(&mut self) {
        match self.slots.set(self.number, self.gpa, 0, 0) {
            Ok(()) => self.slots.release(self.number),
            // The guest would go on to reach what it must not reach any more: a device that is about to sleep, or memory of
            // this process. The number stays taken: using it again could not work either.
            Err(e) => {
                let cause = format!("KVM cannot remove memory slot {} at {:#x}: {e}", self.number, self.gpa);
                error!("{cause}");
                self.slots.control.stop(StopReason::Fault(cause));
            }
        }
    }
}
