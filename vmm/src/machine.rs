//! One machine, built whole and then frozen; `running.rs` runs it and takes it apart.
//!
//! A guest reboot takes the machine apart and builds it again: every device starts from its reset state, assigned
//! devices are closed and opened, which resets them. What must survive that (the console's other end, the clock's
//! battery, signal handling) is in [`Lifetime`].

use std::io;
use std::sync::Arc;

use arch::layout::{self, LayoutError, MemoryMap};
use arch::loader::{BootImages, ImageFile, LoadError, Role};
use devices::event_device::EventDevice;
use devices::memory_slots::{MemoryInSlot, MemorySlots};
use devices::reset::{MachineControl, ResetControl};
use devices::rtc::{Battery, RtcError};
use devices::serial::{Backend, BackendError, SerialError};
use devices::vfio::check::{CheckError, Preflight};
use devices::vfio::dma::{self, DmaError};
use devices::vfio::function::Windows;
use devices::vfio::open::{ContextKind, Handle, IommuContext, OpenError};
use devices::virtio::discard::Discarder;
use kvm_ioctls::{Kvm, VmFd};
use pci::Bdf;
use pci::assign::{AssignError, Assignment as Plan};
use pci::bus::{RootBus, SlotTaken};
use pci::ecam::{CAM_LEN, Cam};
use pci::window::BarWindow;
use vfio_pm::NotifyDevice;
use vm_device::DevicePio;
use vm_device::bus::PioAddress;

use crate::assigned::{AssignedError, Assignment, Surroundings, device_paths};
use crate::buses::Buses;
use crate::config::{ConfigError, DeviceConfig, VmConfig};
use crate::control::Control;
use crate::emulated::{EmulatedError, Shared, Unit};
use crate::event_loop::{EventLoop, EventLoopError, Signals, Subscriber};
use crate::events::Events;
use crate::firmware::{self, FirmwareError};
use crate::hotplug::{AssignedDevices, Board, CloseBars, Iommu};
use crate::hypervisor::{self, HypervisorError, Processors};
use crate::ioevents::KvmDoorbells;
use crate::irq::IrqRouter;
use crate::memory::persistent::PersistentSpace;
use crate::memory::{self, GuestRam, MemoryError};
use crate::memslot::{BarMapper, Memslots};
use crate::orders::Orders;
use crate::pci_segments::{PciSegments, SegmentFull};
use crate::places::{Reserve, build_places, check_places};
use crate::platform::Platform;
use crate::processors::ProcessorPool;
use crate::processors::placement::{Placement, PlacementError};
use crate::remedy::remedy;
use crate::snapshot::{Saved, SnapshotError};
use crate::vcpu::VcpuContext;

/// A machine that cannot be built or run.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// KVM.
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    /// The threads of the vCPUs.
    #[error(transparent)]
    Placement(#[from] PlacementError),
    /// The memory map.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// Guest RAM.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The kernel or the initramfs.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A device that must not be assigned.
    #[error(transparent)]
    Check(#[from] CheckError),
    /// A device that cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A DMA map.
    #[error(transparent)]
    Dma(#[from] DmaError),
    /// Assigned devices.
    #[error(transparent)]
    Assigned(#[from] AssignedError),
    /// The machine's own devices.
    #[error(transparent)]
    Emulated(#[from] EmulatedError),
    /// BARs that do not fit.
    #[error(transparent)]
    Bars(#[from] AssignError),
    /// The same where there are several segments.
    #[error(transparent)]
    SegmentFull(SegmentFull),
    /// Two things in one place of bus 0.
    #[error("two PCI functions want place {} on bus 0; give one of the devices another pci_device_id", .0.0)]
    Bus(SlotTaken),
    /// ACPI tables or SMBIOS.
    #[error(transparent)]
    Firmware(#[from] FirmwareError),
    /// The serial port.
    #[error(transparent)]
    Serial(#[from] SerialError),
    /// The other end of the serial port.
    #[error("--serial: {0}")]
    Console(#[from] BackendError),
    /// The other end of the debug console.
    #[error("the debug console (--debug-console) cannot be connected")]
    DebugConsole(#[source] BackendError),
    /// The clock.
    #[error(transparent)]
    Rtc(#[from] RtcError),
    /// Two devices at one address.
    #[error("the {0} has no place of its own on its bus; this is a defect, please report it")]
    Address(&'static str),
    /// Descriptors, threads, interrupts.
    #[error("cannot create {what}: {source}; {}", remedy(source))]
    Resources {
        /// Which part.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The main loop.
    #[error(transparent)]
    EventLoop(#[from] EventLoopError),
    /// A machine that cannot go on from a snapshot.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The guest cannot go on, for a reason that is not its own.
    #[error("the machine stopped: {0}; see the host's kernel log")]
    Fault(String),
}

/// For `map_err`: something that the host has no more of.
pub fn resources(what: &'static str) -> impl Fn(io::Error) -> MachineError {
    move |source| MachineError::Resources { what, source }
}

/// What outlives one machine: kept over guest reboots.
#[derive(Debug)]
pub struct Lifetime {
    pub(crate) kvm: Arc<Kvm>,
    pub(crate) signals: Arc<Signals>,
    pub(crate) orders: Arc<Orders>,
    pub(crate) events: Events,
    pub(crate) console: Option<Arc<Backend>>,
    pub(crate) debug_console: Option<Arc<Backend>>,
    pub(crate) battery: Battery,
    /// Devices that did not come back from low power: a reset of the guest is no reason to try again.
    pub(crate) latched: Vec<Bdf>,
    /// The machine's own PCI devices.
    pub(crate) units: Vec<Unit>,
    /// What they share.
    pub(crate) shared: Shared,
    /// Whether devices can come and go: only where there is an API to say so.
    pub(crate) hotplug: bool,
}

/// What a guest begins with: something to boot, or what was saved of it.
enum Origin<'a, B> {
    Boot(B),
    Saved(&'a Saved),
}

/// A machine that is ready to run. Fields are dropped in their order.
pub struct Machine {
    pub(crate) vcpus: Vec<(u16, kvm_ioctls::VcpuFd)>,
    pub(crate) placement: Placement,
    pub(crate) processors: ProcessorPool,
    pub(crate) event_loop: EventLoop,
    pub(crate) context: VcpuContext,
    pub(crate) platform: Platform,
    /// Ports of PCI configuration.
    pub(crate) config_ports: Arc<ConfigPorts>,
    /// Whether it was booted with a firmware.
    pub(crate) is_firmware: bool,
    // The power domains first, since their workers drive the functions' hardware; the functions with the last
    // reference to the buses; then the descriptors, the IOMMU context, and last of all the RAM that it maps.
    pub(crate) assigned: AssignedDevices,
    /// Where the guest finds memory that is added, if any can be.
    pub(crate) memory_slots: Option<Arc<MemorySlots>>,
    pub(crate) ram: GuestRam,
    pub(crate) vm: Arc<VmFd>,
    pub(crate) plan: Plan,
}

impl Machine {
    /// Builds the machine that `config` describes: a new one, or one that goes on from a snapshot.
    pub fn build(
        config: &VmConfig,
        lifetime: &Lifetime,
        saved: Option<&Saved>,
    ) -> Result<Self, MachineError> {
        // What can be wrong without a guest is found out before any device is touched.
        let origin = match saved {
            Some(saved) => Origin::Saved(saved),
            None => Origin::Boot(open_images(config)?),
        };
        let devices = check_devices(config)?;
        let reserve = Reserve {
            hotplug: lifetime.hotplug,
            ports: config.platform.as_ref().map_or(0, |platform| platform.hotplug_ports),
            segments: config.segment_count(),
        };
        check_places(&devices, &lifetime.units, reserve)?;
        let processors = match saved {
            Some(saved) => saved.processors(&lifetime.kvm, &config.cpus)?,
            None => Processors::new(&lifetime.kvm, &config.cpus)?,
        };
        let mut map = MemoryMap::new(config.memory.boot_size(), processors.phys_bits())?;
        let zones = memory::plan(&config.memory, config.numa.as_deref(), &mut map)?;
        let is_firmware = match &origin {
            Origin::Boot(images) => images.kernel.is_firmware()?,
            Origin::Saved(saved) => saved.machine.firmware,
        };
        if is_firmware {
            map.lower_mmio64();
        }

        let control = Arc::new(Control::new().map_err(resources("the descriptor for stop requests"))?);
        lifetime.shared.machine.set(Arc::downgrade(&(Arc::clone(&control) as Arc<dyn MachineControl>)));
        let vm = Arc::new(hypervisor::create_vm(&lifetime.kvm)?);
        let memslots = Memslots::new(&lifetime.kvm, Arc::clone(&vm), Arc::clone(&control));
        let ram = GuestRam::new(zones, &config.memory, &memslots, saved.and_then(|saved| saved.content()))?;
        hypervisor::create_interrupt_controllers(&vm)?;
        let router = IrqRouter::new(Arc::clone(&vm));

        let mut buses = Buses::default();
        let mut subscribers: Vec<Subscriber> = Vec::new();
        let platform = Platform::new(config, lifetime, &router, &control, &mut buses, &mut subscribers)?;
        let events = Arc::clone(&platform.event_device);
        let sink = Arc::clone(&control) as _;
        let processors = ProcessorPool::new(processors, Arc::clone(&vm), lifetime.hotplug, &events, sink);
        if let Some(device) = processors.device() {
            let at = layout::PROCESSORS;
            buses.mmio("processors' registers", at.start.0, at.len, Arc::clone(device) as _)?;
        }
        let memory_slots = memory_slots(&ram, &events, &mut buses)?;

        // Before any device is opened, so that a kernel that is none leaves the devices as they were.
        let origin = match origin {
            Origin::Boot(images) => {
                let entry = arch::loader::load(ram.memory(), &map, &images, layout::RSDP)?;
                Origin::Boot((images, entry, map.low_ram_end()))
            }
            Origin::Saved(saved) => {
                saved.fill(&ram)?;
                Origin::Saved(saved)
            }
        };

        let windows = bar_windows(&map, &mut buses)?;
        let around = Surroundings {
            router: Arc::clone(&router),
            mapper: Arc::new(BarMapper(Arc::clone(&memslots))),
            windows,
            wake: Arc::clone(&events) as _,
            latched: lifetime.latched.clone(),
            events: lifetime.events.clone(),
            releases: Arc::clone(&control) as _,
            memory: ram.space().clone(),
            doorbells: Arc::new(KvmDoorbells(Arc::clone(&vm))),
            pluggable: ram.pluggable().to_vec(),
            persistent: PersistentSpace::new(map.persistent(), &memslots),
        };
        let (handles, iommu) =
            open_devices(config, &devices, &vm, &ram.fixed()?, &lifetime.shared.discarder)?;
        let places = build_places(&devices, &handles, &lifetime.units, &around, reserve)?;
        drop(handles);
        let segments = PciSegments::new(&places, &map, &config.segments())?;
        segments.register(&mut buses)?;
        let bus = segments.buses().into_iter().next();
        let bus = bus.ok_or(MachineError::Address("first PCI segment"))?;
        let config_ports = Arc::new(ConfigPorts::new(bus, Arc::clone(&control) as _));
        buses.pio(
            "PCI configuration ports",
            layout::PCI_CONFIG_PORT,
            CAM_LEN,
            Arc::clone(&config_ports) as _,
        )?;
        let notify = Arc::new(NotifyDevice::new(Vec::new()));
        buses.mmio(
            "power notification device",
            layout::POWER_NOTIFICATION.start.0,
            layout::POWER_NOTIFICATION.len,
            Arc::clone(&notify) as _,
        )?;

        let description = firmware::Description {
            processors: processors.processors().apic_ids(),
            processor_hotplug: processors.description(),
            pci: segments.describe(&places),
            serial: lifetime.console.is_some(),
            memory_slots: memory_slots.is_some(),
            numa: memory::numa::describe(
                config.numa.as_deref(),
                ram.zones(),
                &processors.processors().apic_ids(),
                |id| places.iter().find_map(|place| place.address_of(id)),
            ),
            identity: config.platform.clone().unwrap_or_default().identity()?,
        };
        let vcpus = match origin {
            Origin::Boot((images, mut entry, low_ram_end)) => {
                let rsdp = firmware::write(ram.memory(), &mut map, description)?;
                if (rsdp, map.low_ram_end()) != (layout::RSDP, low_ram_end) {
                    // The tables have turned out large and took the top of low RAM.
                    entry = arch::loader::load(ram.memory(), &map, &images, rsdp)?;
                }
                arch::boot::write_tables(&entry, ram.memory()).map_err(HypervisorError::from)?;
                processors.processors().create(&vm, &entry)?
            }
            // Its tables are in its memory.
            Origin::Saved(saved) => processors.processors().restore(&vm, &saved.machine.vcpus)?,
        };
        let placement = Placement::new(&config.cpus);

        let close_bars = Arc::new(CloseBars::new(&around.persistent));
        let context = VcpuContext {
            io: buses.finish(),
            control: Arc::clone(&control),
            faults: Arc::clone(&close_bars) as _,
        };
        let board =
            Board { buses: segments.buses(), notify, event_device: Arc::clone(&events), close_bars, around };
        let assigned = AssignedDevices::new(places, board, iommu)?;
        if saved.is_none() {
            segments.program();
        }
        let orders = Arc::clone(&lifetime.orders);
        let event_loop = EventLoop::new(control, orders, Arc::clone(&lifetime.signals), subscribers)?;
        let mut machine = Self {
            vcpus,
            placement,
            processors,
            event_loop,
            context,
            platform,
            config_ports,
            is_firmware,
            assigned,
            memory_slots,
            ram,
            vm,
            plan: segments.into_plan(),
        };
        if let Some(saved) = saved {
            saved.machine.apply(&mut machine)?;
        }
        Ok(machine)
    }
}

/// The registers of memory that is added later, with what there is of it from the start.
fn memory_slots(
    ram: &GuestRam,
    events: &Arc<EventDevice>,
    buses: &mut Buses,
) -> Result<Option<Arc<MemorySlots>>, MachineError> {
    if !ram.pluggable().is_empty() || ram.zones().iter().all(|zone| zone.hotplug.is_none()) {
        return Ok(None);
    }
    let slots = Arc::new(MemorySlots::new(Arc::clone(events)));
    for added in ram.added() {
        let node = ram.zones().get(added.zone).map_or(0, |zone| zone.node);
        slots.fill_at_boot(MemoryInSlot { base: added.range.start.0, size: added.range.len, node });
    }
    let registers = layout::MEMORY_SLOTS;
    buses.mmio("memory slots", registers.start.0, registers.len, Arc::clone(&slots) as _)?;
    Ok(Some(slots))
}

fn open_images(config: &VmConfig) -> Result<BootImages, MachineError> {
    let payload = config.payload.clone().unwrap_or_default();
    let kernel = match (payload.kernel, payload.firmware) {
        (Some(kernel), _) => ImageFile::open(Role::Kernel, &kernel)?,
        (None, Some(firmware)) => ImageFile::open(Role::Firmware, &firmware)?,
        (None, None) => return Err(ConfigError::NoKernel.into()),
    };
    Ok(BootImages {
        kernel,
        initramfs: payload.initramfs.map(|path| ImageFile::open(Role::Initramfs, &path)).transpose()?,
        command_line: payload.cmdline.unwrap_or_default(),
    })
}

fn check_devices(config: &VmConfig) -> Result<Vec<Assignment>, MachineError> {
    check_some_devices(config, config.devices.clone().unwrap_or_default())
}

/// Whether these devices can be given to a machine of this configuration, of which nothing is opened or changed.
///
/// # Errors
/// See [`CheckError`].
pub fn check_some_devices(
    config: &VmConfig,
    devices: Vec<DeviceConfig>,
) -> Result<Vec<Assignment>, MachineError> {
    let hosts = Preflight::default().check(
        &device_paths(&devices),
        context_kind(config),
        config.memory.total_size(),
    )?;
    Ok(hosts.into_iter().zip(devices).map(|(host, config)| Assignment { host, config }).collect())
}

fn context_kind(config: &VmConfig) -> ContextKind {
    let iommufd = config.platform.as_ref().is_some_and(|platform| platform.iommufd);
    if iommufd { ContextKind::Iommufd } else { ContextKind::Container }
}

/// Opens all assigned functions and maps guest memory for them.
fn open_devices(
    config: &VmConfig,
    devices: &[Assignment],
    vm: &Arc<VmFd>,
    memory: &vm_memory::GuestMemoryMmap,
    discarder: &Arc<Discarder>,
) -> Result<(Vec<Arc<Handle>>, Iommu), MachineError> {
    let kind = context_kind(config);
    let discarder = Arc::clone(discarder);
    let Some(first) = devices.first() else {
        return Ok((Vec::new(), Iommu { kind, kvm: None, context: None, discarder, pin: None }));
    };
    let pin = Some(Arc::new(Discarder::pinned(&discarder)));
    let kvm = Arc::new(hypervisor::create_vfio_device(vm)?);
    let context = Arc::new(IommuContext::new(kind, Some(Arc::clone(&kvm)))?);
    let handles = devices
        .iter()
        .map(|device| context.open(device.host.bdf, &device.host.dir, device.config.id.as_deref()))
        .collect::<Result<Vec<_>, _>>()?;
    dma::map_guest_memory(&context, memory, first.host.bdf)?;
    Ok((handles, Iommu { kind, kvm: Some(kvm), context: Some(context), discarder, pin }))
}

fn bar_windows(map: &MemoryMap, buses: &mut Buses) -> Result<Windows, MachineError> {
    let window =
        |name, start, size| BarWindow::new(start, size).map(Arc::new).ok_or(MachineError::Address(name));
    let (low, high) = (map.mmio32(), map.mmio64());
    let ports = layout::PCI_IO_LAST - layout::PCI_IO_START + 1;
    let windows = Windows {
        mmio32: window("32-bit PCI window", low.start.0, low.len)?,
        mmio64: window("64-bit PCI window", high.start.0, high.len)?,
        io: window("PCI I/O window", u64::from(layout::PCI_IO_START), u64::from(ports))?,
    };
    buses.mmio("32-bit PCI window", low.start.0, low.len, Arc::clone(&windows.mmio32) as _)?;
    buses.mmio("64-bit PCI window", high.start.0, high.len, Arc::clone(&windows.mmio64) as _)?;
    buses.pio("PCI I/O window", layout::PCI_IO_START, ports, Arc::clone(&windows.io) as _)?;
    Ok(windows)
}

/// Ports 0xcf8 to 0xcff: PCI configuration, and the reset control register in the middle of it.
pub struct ConfigPorts {
    cam: Cam,
    reset: ResetControl,
}

impl ConfigPorts {
    fn new(bus: Arc<RootBus>, control: Arc<dyn MachineControl>) -> Self {
        Self { cam: Cam::new(bus), reset: ResetControl::new(control) }
    }

    /// What the guest has written to the address register.
    pub fn address(&self) -> u32 {
        self.cam.address()
    }

    /// Writes the address register.
    pub fn set_address(&self, address: u32) {
        self.cam.set_address(address);
    }

    fn is_reset(offset: u16, len: usize) -> bool {
        offset == layout::RESET_CONTROL_PORT - layout::PCI_CONFIG_PORT && len == 1
    }
}

impl DevicePio for ConfigPorts {
    fn pio_read(&self, base: PioAddress, offset: u16, data: &mut [u8]) {
        if Self::is_reset(offset, data.len()) {
            self.reset.pio_read(PioAddress(layout::RESET_CONTROL_PORT), 0, data);
        } else {
            self.cam.pio_read(base, offset, data);
        }
    }

    fn pio_write(&self, base: PioAddress, offset: u16, data: &[u8]) {
        if Self::is_reset(offset, data.len()) {
            self.reset.pio_write(PioAddress(layout::RESET_CONTROL_PORT), 0, data);
        } else {
            self.cam.pio_write(base, offset, data);
        }
    }
}
