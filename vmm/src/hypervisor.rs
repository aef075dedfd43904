//! KVM: the VM with its in-kernel interrupt controllers, and vCPUs in the state in which they enter a kernel.
//!
//! Follows Linux `Documentation/virt/kvm/api.rst`; what the registers hold is decided in crate `arch`.

use std::io;

use arch::boot;
use arch::cpuid::{CpuidOptions, CpuidTemplate, has_amx};
use arch::layout;
use arch::loader::EntryPoint;
use arch::topology::Topology;
use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_CAP_HYPERV_SYNIC2, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2,
    kvm_create_device, kvm_device_type_KVM_DEV_TYPE_VFIO, kvm_enable_cap,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use vfio_ioctls::VfioDeviceFd;

use crate::config::{ConfigError, CpusConfig};
use crate::processors::amx;
use crate::remedy::remedy;
use crate::snapshot::vcpu::VcpuState;

/// KVM cannot do what the machine needs.
#[derive(Debug, thiserror::Error)]
pub enum HypervisorError {
    /// `/dev/kvm` is missing or closed to this user.
    #[error("cannot open /dev/kvm: {source}; {remedy}")]
    Open {
        /// What the kernel said.
        source: io::Error,
        /// What to do.
        remedy: &'static str,
    },
    /// An ancient or foreign KVM.
    #[error(
        "/dev/kvm speaks version {0} of its interface; version {KVM_API_VERSION} is needed, which every Linux since 2.6.22 has"
    )]
    Version(i32),
    /// A capability is missing.
    #[error("this host's KVM lacks {0}, which the machine needs; use a newer kernel")]
    Missing(&'static str),
    /// Advanced matrix extensions that the host does not have.
    #[error(
        "--cpus features=[amx]: this host cannot give them to a guest ({0}); take amx out, or use a host whose processors have \
         AMX, with Linux 5.17 or newer"
    )]
    Amx(io::Error),
    /// More vCPUs than the host's KVM allows.
    #[error(
        "--cpus max={asked}: this host's KVM allows {limit} vCPUs (highest APIC ID {max_id}); give the guest fewer"
    )]
    Vcpus {
        /// vCPUs asked for.
        asked: u16,
        /// What KVM allows.
        limit: usize,
        /// `KVM_CAP_MAX_VCPU_ID`, less one.
        max_id: usize,
    },
    /// More of something than KVM takes in one call.
    #[error("KVM cannot take so many {0} at once; this is a defect, please report it")]
    TooMany(&'static str),
    /// A register that KVM does not set.
    #[error(
        "KVM does not set model-specific register {index:#x} of vCPU {vcpu}; use a newer kernel, or see the host's \
         kernel log (dmesg)"
    )]
    Msr {
        /// The register.
        index: u32,
        /// The vCPU.
        vcpu: u16,
    },
    /// An ioctl failed.
    #[error("KVM failed at {what}: {source}; {}", remedy(source))]
    Ioctl {
        /// Which one.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The vCPUs cannot be as asked.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Boot structures do not fit into guest memory.
    #[error("the boot structures cannot be written to guest memory: {0}; this is a defect, please report it")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// For `map_err`: what an ioctl of KVM was to do.
pub fn ioctl(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> HypervisorError {
    move |e| HypervisorError::Ioctl { what, source: io::Error::from_raw_os_error(e.errno()) }
}

/// Opens `/dev/kvm`.
pub fn open() -> Result<Kvm, HypervisorError> {
    let kvm = Kvm::new().map_err(|e| {
        let source = io::Error::from_raw_os_error(e.errno());
        let remedy = match source.kind() {
            io::ErrorKind::NotFound => {
                "load the module (modprobe kvm-intel or kvm-amd) and see that virtualization is enabled in firmware"
            }
            io::ErrorKind::PermissionDenied => "add this user to the group that owns it (usually 'kvm')",
            _ => "see the host's kernel log",
        };
        HypervisorError::Open { source, remedy }
    })?;
    let version = kvm.get_api_version();
    if u32::try_from(version) != Ok(KVM_API_VERSION) {
        return Err(HypervisorError::Version(version));
    }
    for (cap, name) in [
        (Cap::Irqchip, "in-kernel interrupt controllers"),
        (Cap::Irqfd, "irqfd"),
        (Cap::IrqfdResample, "resampling irqfd"),
        (Cap::SignalMsi, "message-signalled interrupts"),
        (Cap::ImmediateExit, "immediate exit"),
    ] {
        if !kvm.check_extension(cap) {
            return Err(HypervisorError::Missing(name));
        }
    }
    Ok(kvm)
}

/// Creates the VM. Guest RAM comes next, [`create_interrupt_controllers`] after that.
pub fn create_vm(kvm: &Kvm) -> Result<VmFd, HypervisorError> {
    // KVM_CREATE_VM is interrupted by any signal that arrives meanwhile.
    let vm = loop {
        match kvm.create_vm() {
            Err(e) if e.errno() == libc::EINTR => {}
            result => break result.map_err(ioctl("creating the VM"))?,
        }
    };
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP.0).map_err(ioctl("placing the identity map"))?;
    let tss = usize::try_from(layout::KVM_TSS.0).unwrap_or(usize::MAX);
    vm.set_tss_address(tss).map_err(ioctl("placing the task state segment"))?;
    Ok(vm)
}

/// Creates the interrupt controllers.
///
/// After the memory slots of RAM: the kernel installs a slot at once while the VM is fresh, and waits some
/// milliseconds for a grace period when it has interrupt routes already.
pub fn create_interrupt_controllers(vm: &VmFd) -> Result<(), HypervisorError> {
    vm.create_irq_chip().map_err(ioctl("creating the interrupt controllers"))
}

/// KVM's own VFIO device: through it the kernel learns which guest an IOMMU group belongs to.
pub fn create_vfio_device(vm: &VmFd) -> Result<VfioDeviceFd, HypervisorError> {
    let mut device = kvm_create_device { type_: kvm_device_type_KVM_DEV_TYPE_VFIO, fd: 0, flags: 0 };
    let fd = vm.create_device(&mut device).map_err(ioctl("creating the VFIO device"))?;
    Ok(VfioDeviceFd::new_from_kvm(fd))
}

/// What all vCPUs of a machine have in common.
#[derive(Debug)]
pub struct Processors {
    topology: Topology,
    at_boot: u16,
    most: u16,
    hyperv: bool,
    cpuid: CpuidTemplate,
}

impl Processors {
    /// For `config`, after checking that KVM allows so many.
    pub fn new(kvm: &Kvm, config: &CpusConfig) -> Result<Self, HypervisorError> {
        let (at_boot, most, topology) = (config.vcpus()?, config.most_vcpus()?, config.arch_topology()?);
        let (limit, max_id) = (kvm.get_max_vcpus(), kvm.get_max_vcpu_id());
        let last_id = usize::try_from(topology.apic_id(most.saturating_sub(1))).unwrap_or(usize::MAX);
        if usize::from(most) > limit || last_id >= max_id {
            return Err(HypervisorError::Vcpus { asked: most, limit, max_id: max_id.saturating_sub(1) });
        }
        if config.features.amx {
            amx::request_permission().map_err(HypervisorError::Amx)?;
        }
        if config.kvm_hyperv && !kvm.check_extension(Cap::HypervSynic2) {
            return Err(HypervisorError::Missing("Hyper-V's interrupt controller (--cpus kvm_hyperv=on)"));
        }
        let supported =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(ioctl("reading the supported CPUID"))?;
        if config.features.amx && !has_amx(supported.as_slice()) {
            return Err(HypervisorError::Amx(io::ErrorKind::Unsupported.into()));
        }
        let options = CpuidOptions {
            topology,
            max_phys_bits: config.max_phys_bits,
            tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
            tsc_khz: None,
            nested: config.nested,
            amx: config.features.amx,
            hyperv: config.kvm_hyperv,
        };
        let cpuid = CpuidTemplate::new(supported.as_slice(), &options);
        Ok(Self { topology, at_boot, most, hyperv: config.kvm_hyperv, cpuid })
    }

    /// How many there are at boot.
    pub fn at_boot(&self) -> u16 {
        self.at_boot
    }

    /// How many there can be.
    pub fn most(&self) -> u16 {
        self.most
    }

    /// The APIC IDs of all that there can be, in the order of the vCPUs.
    pub fn apic_ids(&self) -> Vec<u32> {
        (0..self.most).map(|vcpu| self.topology.apic_id(vcpu)).collect()
    }

    /// The physical address bits that the guest sees.
    pub fn phys_bits(&self) -> u8 {
        self.cpuid.phys_bits()
    }

    /// Creates the vCPUs that are there at boot. The first one will enter the kernel at `entry`, the others wait for it to start them.
    pub fn create(&self, vm: &VmFd, entry: &EntryPoint) -> Result<Vec<(u16, VcpuFd)>, HypervisorError> {
        let create = |vcpu| Ok((vcpu, self.create_one(vm, vcpu, Some(entry).filter(|_| vcpu == 0))?));
        (0..self.at_boot).map(create).collect()
    }

    /// Creates vCPUs that go on from these states.
    pub fn restore(&self, vm: &VmFd, saved: &[VcpuState]) -> Result<Vec<(u16, VcpuFd)>, HypervisorError> {
        let create = |state: &VcpuState| {
            let fd = self.create_one(vm, state.number, None)?;
            state.apply(vm, &fd)?;
            Ok((state.number, fd))
        };
        saved.iter().map(create).collect()
    }

    /// What the guest is told of the first processor; of others it is told the same but for their numbers.
    pub fn cpuid(&self) -> Vec<kvm_cpuid_entry2> {
        self.cpuid.entries(0)
    }

    /// Tells the guest what it was told elsewhere.
    pub fn go_on_with(&mut self, cpuid: Vec<kvm_cpuid_entry2>) {
        self.cpuid = CpuidTemplate::of_guest(cpuid, self.topology);
    }

    /// Creates one of the others, which waits for the guest to start it.
    pub fn create_later(&self, vm: &VmFd, vcpu: u16) -> Result<VcpuFd, HypervisorError> {
        let fd = self.create_one(vm, vcpu, None)?;
        // KVM looks for the local APICs that interrupts can be sent to when one of them changes, and not when there is a new one. At boot the
        // guest's own changes do it; here the guest would start a processor that is not found.
        let lapic = fd.get_lapic().map_err(ioctl("reading the local APIC"))?;
        fd.set_lapic(&lapic).map_err(ioctl("setting the local APIC"))?;
        Ok(fd)
    }

    fn create_one(
        &self,
        vm: &VmFd,
        vcpu: u16,
        entry: Option<&EntryPoint>,
    ) -> Result<VcpuFd, HypervisorError> {
        let fd = vm.create_vcpu(u64::from(self.topology.apic_id(vcpu))).map_err(ioctl("creating a vCPU"))?;
        if self.hyperv {
            let synic = kvm_enable_cap { cap: KVM_CAP_HYPERV_SYNIC2, ..Default::default() };
            fd.enable_cap(&synic).map_err(ioctl("enabling Hyper-V's interrupt controller"))?;
        }
        let entries = self.cpuid.entries(vcpu);
        let cpuid = CpuId::from_entries(&entries).map_err(|_| HypervisorError::TooMany("CPUID leaves"))?;
        fd.set_cpuid2(&cpuid).map_err(ioctl("setting CPUID"))?;
        set_msrs(&fd, vcpu)?;
        if let Some(entry) = entry {
            let mut lapic = fd.get_lapic().map_err(ioctl("reading the local APIC"))?;
            arch::apic::set_local_interrupt_pins(&mut lapic);
            fd.set_lapic(&lapic).map_err(ioctl("setting the local APIC"))?;
            let mut sregs = fd.get_sregs().map_err(ioctl("reading special registers"))?;
            boot::set_special_registers(entry, &mut sregs);
            fd.set_sregs(&sregs).map_err(ioctl("setting special registers"))?;
            fd.set_regs(&boot::registers(entry)).map_err(ioctl("setting registers"))?;
            fd.set_fpu(&boot::fpu()).map_err(ioctl("setting the floating-point state"))?;
        }
        Ok(fd)
    }
}

fn set_msrs(fd: &VcpuFd, vcpu: u16) -> Result<(), HypervisorError> {
    let wanted = boot::boot_msrs();
    let msrs =
        Msrs::from_entries(&wanted).map_err(|_| HypervisorError::TooMany("model-specific registers"))?;
    let set = fd.set_msrs(&msrs).map_err(ioctl("setting model-specific registers"))?;
    // KVM stops at the first one that it refuses, and says how many it has set.
    wanted.get(set).map_or(Ok(()), |msr| Err(HypervisorError::Msr { index: msr.index, vcpu }))
}
