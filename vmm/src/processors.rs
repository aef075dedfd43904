//! The processors of a running machine that come and go (docs/compatibility.md, `--cpus max`).
//!
//! A processor comes at once: its vCPU is made, its thread waits for the guest to start it, and the guest is told. It goes when the guest
//! has ejected it: then its thread ends. KVM makes a vCPU once in a VM's life, so that of a processor that has gone is kept for the
//! next time.

pub mod amx;
pub mod placement;

use std::collections::BTreeMap;
use std::sync::Arc;

use acpi::platform::ProcessorHotplugDescription;
use arch::layout;
use devices::event_device::EventDevice;
use devices::processors::{Answers, ProcessorDevice, ProcessorSink};
use kvm_bindings::{KVM_MP_STATE_UNINITIALIZED, kvm_mp_state};
use kvm_ioctls::{VcpuFd, VmFd};
use log::{info, warn};

use crate::hypervisor::{HypervisorError, Processors};
use crate::processors::placement::PlacementError;
use crate::vcpu::Vcpus;

/// A number of processors that the machine cannot have, or not now.
#[derive(Debug, thiserror::Error)]
pub enum ResizeError {
    /// Fewer than one or more than there can be.
    #[error(
        "the number of vCPUs cannot be changed to {wanted}: this machine has from 1 to {max}; for more, shut it down and create it \
         with a larger max_vcpus (--cpus max)"
    )]
    Range {
        /// How many were asked for.
        wanted: u32,
        /// How many there can be.
        max: u16,
    },
    /// The guest has not answered yet.
    #[error(
        "Too Many Requests: the guest has not let go of vCPU {vcpus:?} yet, and has been asked again; try again later"
    )]
    Pending {
        /// Those that are to go.
        vcpus: Vec<u8>,
    },
    /// No vCPU.
    #[error("vCPU {vcpu} cannot be added")]
    Vcpu {
        /// Which one.
        vcpu: u16,
        /// Why not.
        source: HypervisorError,
    },
    /// No thread for it.
    #[error(transparent)]
    Placement(#[from] PlacementError),
}

/// What processors there are and can be.
#[derive(Debug)]
pub struct ProcessorPool {
    processors: Processors,
    vm: Arc<VmFd>,
    /// Where the guest hears of it; `None` where processors cannot come or go.
    device: Option<Arc<ProcessorDevice>>,
    /// vCPUs of processors that have gone.
    parked: BTreeMap<u8, VcpuFd>,
}

impl ProcessorPool {
    /// For a machine that is started with the first ones. `hotplug`: whether there is somebody to order that processors come and go.
    pub fn new(
        processors: Processors,
        vm: Arc<VmFd>,
        hotplug: bool,
        events: &Arc<EventDevice>,
        sink: Arc<dyn ProcessorSink>,
    ) -> Self {
        let (boot, max) = (processors.at_boot(), processors.most());
        // Where nobody can order it, what the configuration promises is still described.
        let device = (max > boot || hotplug && max > 1).then(|| {
            let boot = u8::try_from(boot).unwrap_or(u8::MAX);
            Arc::new(ProcessorDevice::new(boot, Arc::clone(events), sink))
        });
        Self { processors, vm, device, parked: BTreeMap::new() }
    }

    /// Its registers, to be put on the bus at [`layout::PROCESSORS`].
    pub fn device(&self) -> Option<&Arc<ProcessorDevice>> {
        self.device.as_ref()
    }

    /// What all processors have in common.
    pub fn processors(&self) -> &Processors {
        &self.processors
    }

    /// What the ACPI tables say of it.
    pub fn description(&self) -> Option<ProcessorHotplugDescription> {
        self.device.as_ref().map(|_| ProcessorHotplugDescription {
            registers: layout::PROCESSORS.start.0,
            present: usize::from(self.processors.at_boot()),
        })
    }

    /// Has as many processors as are wanted, as soon as the guest lets go of those that are too many.
    ///
    /// # Errors
    /// See [`ResizeError`]; then there are as many as before.
    pub fn resize(&mut self, wanted: u32, vcpus: &mut Vcpus) -> Result<(), ResizeError> {
        let max = self.processors.most();
        let range = ResizeError::Range { wanted, max };
        let Some(wanted) = u16::try_from(wanted).ok().filter(|wanted| (1..=max).contains(wanted)) else {
            return Err(range);
        };
        let Some(device) = self.device.clone() else {
            return if wanted == self.processors.at_boot() { Ok(()) } else { Err(range) };
        };
        let asked = device.asked();
        if !asked.is_empty() {
            // It may not have been ready to hear it the first time.
            device.request_removal(&asked);
            return Err(ResizeError::Pending { vcpus: asked });
        }
        let (present, wanted) = (device.present(), usize::from(wanted));
        let most = u8::try_from(max).unwrap_or(u8::MAX);
        if let Some(more) = wanted.checked_sub(present.len()).filter(|more| *more > 0) {
            let absent: Vec<u8> = (0..most).filter(|n| !present.contains(n)).take(more).collect();
            self.start(&absent, vcpus)?;
            device.add(&absent);
            info!("vCPU {absent:?}: the guest is told that they are there");
        } else if wanted < present.len() {
            // Never the first.
            let leaving: Vec<u8> = present.into_iter().skip(1).skip(wanted - 1).collect();
            info!("vCPU {leaving:?}: the guest is asked to let go of them");
            device.request_removal(&leaving);
        }
        Ok(())
    }

    /// Makes and starts these, or none of them.
    fn start(&mut self, numbers: &[u8], vcpus: &mut Vcpus) -> Result<(), ResizeError> {
        for (done, number) in numbers.iter().enumerate() {
            if let Err(e) = self.start_one(*number, vcpus) {
                for started in numbers.iter().take(done) {
                    self.park(*started, vcpus);
                }
                return Err(e);
            }
        }
        Ok(())
    }

    fn start_one(&mut self, number: u8, vcpus: &mut Vcpus) -> Result<(), ResizeError> {
        let vcpu = u16::from(number);
        let fd = match self.parked.remove(&number) {
            Some(fd) => fd,
            None => self
                .processors
                .create_later(&self.vm, vcpu)
                .map_err(|source| ResizeError::Vcpu { vcpu, source })?,
        };
        vcpus.add(vcpu, fd).map_err(|(e, fd)| {
            self.parked.insert(number, fd);
            e.into()
        })
    }

    /// Ends a vCPU's thread and keeps the vCPU as it was when it was new: it waits for the guest to start it.
    fn park(&mut self, number: u8, vcpus: &mut Vcpus) {
        let Some(fd) = vcpus.remove(number.into()) else {
            warn!(
                "vCPU {number} has not ended in order, and cannot be added again before the machine restarts"
            );
            return;
        };
        let waits = kvm_mp_state { mp_state: KVM_MP_STATE_UNINITIALIZED };
        if let Err(e) = fd.set_mp_state(waits) {
            warn!("vCPU {number} goes on where it was when it is added again: {e}");
        }
        self.parked.insert(number, fd);
    }

    /// Looks at what the guest has said of processors that are to go. Returns how many there are to be now.
    pub fn take_answers(&mut self, vcpus: &mut Vcpus) -> Option<u32> {
        let device = self.device.clone()?;
        let Answers { ejected, refused } = device.take_answers();
        for number in &ejected {
            self.park(*number, vcpus);
            info!("vCPU {number} has been removed");
        }
        if let Some((number, status)) = refused {
            warn!(
                "vCPU {number}: the guest does not let go of it (status {status:#x}): see its kernel's log for why, and resize again"
            );
        }
        let stay = device.present().len().saturating_sub(device.asked().len());
        u32::try_from(stay).ok()
    }
}
