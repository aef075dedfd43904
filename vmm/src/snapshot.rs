//! Snapshots: a machine that is paused, written to a directory, and one that goes on from there.
//!
//! ```text
//! directory  the files
//! ram        the content of memory
//! vcpu       the state of a vCPU
//! ```
//!
//! What the guest can see is saved as it sees it, and put back by the same code that serves the guest. A machine with assigned devices cannot be saved:
//! what is in their hardware stays there.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use devices::emulated::Saved as SavedFunction;
use devices::memory_slots::SlotsState;
use devices::processors::ProcessorState;
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_cpuid_entry2,
    kvm_irqchip,
};
use kvm_ioctls::{Kvm, VmFd};
use pci::bus::RootBus;
use pci::function::PciBridge;
use pci::{DevFn, PciFunction};
use serde::{Deserialize, Serialize};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::config::CpusConfig;
use crate::hypervisor::{HypervisorError, Processors, ioctl};
use crate::machine::Machine;
use crate::memory::{Content, GuestRam};
use crate::platform::PlatformState;
use crate::remedy::remedy;

pub mod directory;
pub mod ram;
pub mod vcpu;

use directory::Directory;
use ram::SavedRange;
use vcpu::{VcpuState, check_cpuid};

/// A machine that cannot be saved, or cannot go on from what was saved.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// Not a directory.
    #[error("{url:?} names no directory of this host; write file:///path/to/directory")]
    Url {
        /// What was given.
        url: String,
    },
    /// There is a snapshot already.
    #[error("{} exists; name another directory, or remove the snapshot that is there", path.display())]
    Exists {
        /// The file in the way.
        path: PathBuf,
    },
    /// A file.
    #[error("cannot {what} {}: {source}; {remedy}", path.display())]
    File {
        /// What was to be done.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
        /// What to do.
        remedy: &'static str,
    },
    /// The content of memory.
    #[error("the guest's memory cannot be written: {source}; {}", remedy(source))]
    Memory {
        /// What the system said.
        source: io::Error,
    },
    /// A file that is no JSON, or other JSON.
    #[error("{} cannot be used: {source}; it is damaged, or was changed by hand", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// A state of another format.
    #[error("{} was written by {version}, whose format this version cannot read; restore it with that", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Who wrote it.
        version: String,
    },
    /// The machine runs.
    #[error("the VM runs; pause it first (vm.pause)")]
    NotPaused,
    /// A device of the host's.
    #[error(
        "device {id} ({}) is assigned to the VM, and what is in a device of the host cannot be saved; remove it first \
         (vm.remove-device)",
        path.display()
    )]
    Assigned {
        /// Its name.
        id: String,
        /// Its directory.
        path: PathBuf,
    },
    /// A root port that no configuration makes.
    #[error(
        "the VM was booted with an assigned device that has been removed since, and its root port is still there; reboot the guest \
         (vm.reboot) before the snapshot"
    )]
    OldPorts,
    /// A device that cannot be saved or go on.
    #[error("{id}: {why}")]
    Device {
        /// Its name.
        id: String,
        /// Why not.
        why: String,
    },
    /// The configuration has been changed too much.
    #[error(
        "config.json and state.json do not fit together: {0}; change paths in it, but not what the machine has"
    )]
    Mismatch(String),
    /// The host's processor lacks something.
    #[error(transparent)]
    Processor(io::Error),
    /// KVM.
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    /// A vCPU that has stopped.
    #[error("vCPU {0} has stopped; see the VMM's log")]
    Vcpu(u16),
}

/// One of the machine's own functions.
#[derive(Debug, Serialize, Deserialize)]
pub struct FunctionState {
    /// Its name.
    pub id: String,
    /// Its device number.
    pub place: u8,
    /// Whether the guest has been asked to let go of it.
    pub leaving: bool,
    state: SavedFunction,
}

/// A root port: what the guest has written in its configuration space.
#[derive(Debug, Serialize, Deserialize)]
struct PortState {
    segment: usize,
    devfn: u8,
    config: Vec<u32>,
}

/// All that is saved of a machine but the content of its memory.
#[derive(Debug, Serialize, Deserialize)]
pub struct MachineState {
    /// Physical address bits that the guest sees, on which the memory map depends.
    pub phys_bits: u8,
    /// What the guest was told of its first processor.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// Whether a firmware was booted, on which it depends too.
    pub firmware: bool,
    /// The guest's clock.
    pub clock: kvm_clock_data,
    /// The vCPUs that there are.
    pub vcpus: Vec<VcpuState>,
    /// Where the content of memory is.
    pub ram: Vec<SavedRange>,
    /// The functions, with their places.
    pub functions: Vec<FunctionState>,
    pic_master: kvm_irqchip,
    pic_slave: kvm_irqchip,
    ioapic: kvm_irqchip,
    platform: PlatformState,
    processors: Option<ProcessorState>,
    memory_slots: Option<SlotsState>,
    config_address: u32,
    ports: Vec<PortState>,
}

impl MachineState {
    /// Of a machine whose vCPUs are `vcpus` and stand still.
    pub fn save(
        machine: &Machine,
        vcpus: Vec<VcpuState>,
        clock: kvm_clock_data,
        ram: Vec<SavedRange>,
    ) -> Result<Self, SnapshotError> {
        let mut functions = Vec::new();
        for place in machine.assigned.places() {
            let Some(function) = &place.emulated else { continue };
            let id = function.name().to_owned();
            let state =
                function.save().map_err(|why| SnapshotError::Device { id: format!("device {id}"), why })?;
            functions.push(FunctionState { id, place: place.device(), leaving: place.is_leaving(), state });
        }
        Ok(Self {
            phys_bits: machine.processors.processors().phys_bits(),
            cpuid: machine.processors.processors().cpuid(),
            firmware: machine.is_firmware,
            clock,
            vcpus,
            ram,
            functions,
            pic_master: chip(&machine.vm, KVM_IRQCHIP_PIC_MASTER)?,
            pic_slave: chip(&machine.vm, KVM_IRQCHIP_PIC_SLAVE)?,
            ioapic: chip(&machine.vm, KVM_IRQCHIP_IOAPIC)?,
            platform: machine.platform.save(),
            processors: machine.processors.device().map(|device| device.save()),
            memory_slots: machine.memory_slots.as_ref().map(|slots| slots.save()),
            config_address: machine.config_ports.address(),
            ports: ports(machine.assigned.buses()),
        })
    }

    /// The place of the device with this name.
    pub fn place_of(&self, id: &str) -> Option<u8> {
        self.functions.iter().find(|function| function.id == id).map(|function| function.place)
    }

    /// Puts a machine that has been built for it, and has not run, into this state. Its memory and its vCPUs are no business of this.
    pub fn apply(&self, machine: &mut Machine) -> Result<(), SnapshotError> {
        for chip in [&self.pic_master, &self.pic_slave, &self.ioapic] {
            machine.vm.set_irqchip(chip).map_err(ioctl("setting an interrupt controller"))?;
        }
        if let (Some(device), Some(saved)) = (machine.processors.device(), &self.processors) {
            device.restore(saved);
        }
        match (&machine.memory_slots, &self.memory_slots) {
            (Some(slots), Some(saved)) => slots.restore(saved),
            (None, None) => {}
            _ => return Err(SnapshotError::Mismatch("memory can grow in one of them only".to_owned())),
        }
        machine.config_ports.set_address(self.config_address);
        restore_ports(machine.assigned.buses(), &self.ports)?;
        let known: Vec<_> = machine.assigned.emulated().map(|function| function.name().to_owned()).collect();
        if let Some(new) = known.iter().find(|id| self.place_of(id).is_none()) {
            return Err(SnapshotError::Mismatch(format!("device {new} is in the first only")));
        }
        for function in &self.functions {
            let id = &function.id;
            let Some(device) = machine.assigned.emulated().find(|device| device.name() == id) else {
                return Err(SnapshotError::Mismatch(format!("device {id} is in the second only")));
            };
            device
                .restore(&function.state)
                .map_err(|why| SnapshotError::Device { id: format!("device {id}"), why })?;
            if function.leaving {
                machine.assigned.set_leaving(id);
            }
        }
        // Last, since it interrupts the guest for what it has not heard.
        machine.platform.restore(&self.platform)
    }
}

/// What a machine goes on from.
#[derive(Debug)]
pub struct Saved {
    /// Its state.
    pub machine: MachineState,
    memory: Arc<File>,
    path: PathBuf,
    /// Whether the content of private memory is read when it is first touched, and not at once.
    lazy: bool,
}

impl Saved {
    /// Reads a snapshot, but not the content of memory.
    pub fn open(directory: &Directory, lazy: bool) -> Result<Self, SnapshotError> {
        let machine = directory.state()?;
        let (memory, path) = directory.memory()?;
        Ok(Self { machine, memory: Arc::new(memory), path, lazy })
    }

    /// Processors such as the guest has, if the host can have them.
    pub fn processors(&self, kvm: &Kvm, config: &CpusConfig) -> Result<Processors, SnapshotError> {
        let phys_bits = self.machine.phys_bits;
        let config = CpusConfig { max_phys_bits: phys_bits, ..config.clone() };
        let mut processors = Processors::new(kvm, &config)?;
        if processors.phys_bits() != phys_bits {
            return Err(SnapshotError::Processor(io::Error::other(format!(
                "the guest uses a processor with {phys_bits} physical address bits, and this host's has {}; restore it on a host with as \
                 many, or boot it with --cpus max_phys_bits= before the snapshot",
                processors.phys_bits()
            ))));
        }
        check_cpuid(&self.machine.cpuid, &processors.cpuid()).map_err(SnapshotError::Processor)?;
        processors.go_on_with(self.machine.cpuid.clone());
        Ok(processors)
    }

    /// Where the content of private memory is, if it is read later.
    pub fn content(&self) -> Option<Content> {
        self.lazy.then(|| Content { file: Arc::clone(&self.memory), ranges: self.machine.ram.clone() })
    }

    /// Fills RAM with its content, as far as it did not come with it.
    pub fn fill(&self, memory: &GuestRam) -> Result<(), SnapshotError> {
        let now = memory.now();
        let ranges = &self.machine.ram;
        for region in now.iter() {
            let (start, len) = (region.start_addr().0, region.len());
            // What is in a file of the user's need not be in the snapshot.
            if ram::offset_of(ranges, start, len).is_none() && !memory.has_file(start) {
                return Err(SnapshotError::Mismatch(format!(
                    "the memory at {start:#x} has another size or another place"
                )));
            }
        }
        let absent: Vec<_> =
            ranges.iter().filter(|range| !memory.has_content(range.start)).copied().collect();
        ram::read(&now, &absent, &self.memory, |start| !memory.has_file(start))
            .map_err(directory::file_error("read", &self.path))
    }
}

fn chip(vm: &VmFd, chip_id: u32) -> Result<kvm_irqchip, HypervisorError> {
    let mut chip = kvm_irqchip { chip_id, ..Default::default() };
    vm.get_irqchip(&mut chip).map_err(ioctl("reading an interrupt controller"))?;
    Ok(chip)
}

/// Offsets in configuration space that a port's state is read from and written to: what is before them no guest can change.
fn registers() -> impl Iterator<Item = u16> {
    (4..pci::regs::CONFIG_SPACE_LEN.min(0x100)).step_by(4)
}

/// The root ports, with the numbers of their segments.
fn bridges(buses: &[Arc<RootBus>]) -> impl Iterator<Item = (usize, DevFn, &Arc<dyn PciBridge>)> {
    let numbered = buses.iter().enumerate();
    numbered.flat_map(|(segment, bus)| bus.bridges().map(move |(devfn, port)| (segment, devfn, port)))
}

fn ports(buses: &[Arc<RootBus>]) -> Vec<PortState> {
    let of = |port: &dyn PciFunction| {
        registers()
            .map(|offset| {
                let mut data = [0; 4];
                port.config_read(offset, &mut data);
                u32::from_le_bytes(data)
            })
            .collect()
    };
    let state = |(segment, devfn, port): (usize, DevFn, &Arc<dyn PciBridge>)| PortState {
        segment,
        devfn: devfn.bits(),
        config: of(port.as_ref()),
    };
    bridges(buses).map(state).collect()
}

fn restore_ports(buses: &[Arc<RootBus>], saved: &[PortState]) -> Result<(), SnapshotError> {
    let places = |number: usize| SnapshotError::Mismatch(format!("{number} root ports in the first"));
    let count = bridges(buses).count();
    if count != saved.len() {
        return Err(places(count));
    }
    for (segment, devfn, port) in bridges(buses) {
        let state = saved.iter().find(|state| (state.segment, state.devfn) == (segment, devfn.bits()));
        let state = state.ok_or_else(|| places(count))?;
        for (offset, value) in registers().zip(&state.config) {
            port.config_write(offset, &value.to_le_bytes());
        }
    }
    Ok(())
}
