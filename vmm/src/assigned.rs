//! Assigned devices put together: slots with their root ports, the functions in them, and their power domains.
//!
//! Functions of one host slot share one guest slot, that is one root port, as they share the host's power. Whether a
//! function is offered a power resource is decided here, once, before boot; the reason is logged either way.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock, Weak};

use acpi::event_abi::PlaceAddress;
use acpi::notify_abi::ResourceIndex;
use arch::layout::{PCI_INTX_GSI_BASE, PCI_INTX_GSI_COUNT};
use devices::event_device::ReleaseSink;
use devices::vfio::bar::GuestMapper;
use devices::vfio::function::{FunctionSpec, VfioFunction, Windows};
use devices::vfio::host::HostFunction;
use devices::vfio::host_signals;
use devices::vfio::layout::{FunctionLayout, LayoutError};
use devices::vfio::open::{Handle, OpenError, name};
use devices::virtio::Memory;
use devices::virtio::mem::Mem;
use devices::virtio::pci::DoorbellMapper;
use log::{info, warn};
use pci::cap::pcie::LinkSpeed;
use pci::function::PciBridge;
use pci::interrupt::{IntxLine, MsiAllocator};
use pci::pme::PmeSink;
use pci::root_port::{ChildrenError, RootPort, RootPortError};
use pci::{Bdf, DevFn, PciFunction};
use vfio_bindings::bindings::vfio::VFIO_PCI_INTX_IRQ_INDEX;
use vfio_pm::offer::{Offer, PowerChoice, offer};
use vfio_pm::sysfs::{HostPower, SYSFS};
use vfio_pm::{
    CreateError, DomainSpec, LowPower, MemberSpec, Policy, PolicyError, PowerDomain, Support, Timing,
    VfioLowPower, WakePolicy, WakeSink,
};

use crate::config::DeviceConfig;
use crate::events::Events;
use crate::irq::{Gsi, IrqRouter, MsiVectors};
use crate::memory::persistent::PersistentSpace;
use crate::power_events::PowerTeller;
use crate::remedy::remedy;

/// Interrupt pin in configuration space: 1 is INTA.
const INTERRUPT_PIN: u16 = 0x3d;

/// Assigned devices cannot be put into the machine.
#[derive(Debug, thiserror::Error)]
pub enum AssignedError {
    /// More slots than bus 0 has room for.
    #[error(
        "{count} slots of assigned devices, root ports and other devices do not fit in PCI segment {segment}: its bus 0 has room for \
         31; give the VM fewer, or put some in another segment (--platform num_pci_segments=N, and pci_segment of the device)"
    )]
    Slots {
        /// The segment.
        segment: u16,
        /// How many.
        count: usize,
    },
    /// Two slots want the same place.
    #[error(
        "pci_device_id={device}: that place on bus 0 of PCI segment {segment} is taken; choose another from 1 to 31"
    )]
    PlaceTaken {
        /// The segment.
        segment: u16,
        /// Device number on bus 0.
        device: u8,
    },
    /// One slot is asked to be in two places.
    #[error(
        "device {bdf}: the functions of one slot share a root port, so give them the same pci_segment and pci_device_id"
    )]
    PlaceConflict {
        /// Host address of the later function.
        bdf: Bdf,
    },
    /// No room for one more.
    #[error(
        "there is no free place for another device in PCI segment {segment}; remove one, or start the VM with more --platform \
         hotplug_ports=N (in segment 0) or num_pci_segments=N"
    )]
    NoFreePlace {
        /// The segment.
        segment: u16,
    },
    /// A device that the guest cannot let go of alone.
    #[error(
        "device {id} cannot be removed while the machine runs: it shares a root port with other functions of its slot; shut the VM down first"
    )]
    NotRemovable {
        /// Its name.
        id: String,
    },
    /// A device that is part of the machine.
    #[error(
        "device {id} cannot be removed while the machine runs: it is one of the machine's own; shut the VM down and start it without it"
    )]
    MachinesOwn {
        /// Its name.
        id: String,
    },
    /// A device cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A device that cannot be presented.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// A root port that cannot be made.
    #[error(transparent)]
    RootPort(#[from] RootPortError),
    /// Functions that do not go below one port.
    #[error("root port {port}: {source}")]
    Children {
        /// The port.
        port: DevFn,
        /// What is wrong.
        source: ChildrenError,
    },
    /// A power policy that makes no sense.
    #[error("device {bdf}: {source}")]
    Policy {
        /// Host address.
        bdf: Bdf,
        /// What is wrong.
        source: PolicyError,
    },
    /// A power domain that cannot be made.
    #[error(transparent)]
    Domain(#[from] CreateError),
    /// An INTx line that cannot be connected.
    #[error("device {bdf}: its interrupt line cannot be connected: {source}; {}", remedy(source))]
    Intx {
        /// Host address.
        bdf: Bdf,
        /// What KVM said.
        source: std::io::Error,
    },
}

/// What devices need of the machine.
pub struct Surroundings {
    /// Interrupt routes.
    pub router: Arc<IrqRouter>,
    /// Shows BARs to the guest.
    pub mapper: Arc<dyn GuestMapper>,
    /// Where BARs are decoded.
    pub windows: Windows,
    /// The event device.
    pub wake: Arc<dyn WakeSink>,
    /// Devices that did not come back from low power before the guest's last reset.
    pub latched: Vec<Bdf>,
    /// Where news of power goes.
    pub events: Events,
    /// Who hears that the guest has let go of a device.
    pub releases: Arc<dyn ReleaseSink>,
    /// Guest memory.
    pub memory: Memory,
    /// Doorbells of virtio devices.
    pub doorbells: Arc<dyn DoorbellMapper>,
    /// What memory zones grow by.
    pub pluggable: Vec<Arc<Mem>>,
    /// Where persistent memory is.
    pub persistent: Arc<PersistentSpace>,
}

/// One assigned device: the host's view and the user's wishes.
pub struct Assignment {
    /// The host's view.
    pub host: HostFunction,
    /// The user's wishes.
    pub config: DeviceConfig,
}

/// Functions that share power, put together.
#[derive(Debug)]
pub struct Slot {
    /// Stopped and joined when the machine goes; before the functions, whose hardware it drives.
    pub domain: Arc<PowerDomain>,
    /// The port's power resource, if there is a port and it has one.
    pub port_resource: Option<ResourceIndex>,
    /// Its functions.
    pub functions: Vec<SlotFunction>,
}

/// Where a slot is in the guest.
#[derive(Clone, Debug)]
pub enum Seat {
    /// Below a root port.
    Port(PortSeat),
    /// On bus 0 itself, as function 0 of this device.
    Bus0(u8),
}

/// A root port on bus 0.
#[derive(Clone, Debug)]
pub struct PortSeat {
    /// The port.
    pub port: Arc<RootPort>,
    /// What it resets with its bus.
    below: Arc<Below>,
}

/// The functions below a port, for its resets.
type Below = RwLock<Vec<Weak<VfioFunction>>>;

/// A function on bus 0 has no port that could take its PMEs: the event device is all there is.
#[derive(Debug)]
struct NoPort;

impl PmeSink for NoPort {
    fn pme(&self, _from: DevFn) -> bool {
        false
    }
}

/// A function in its slot.
#[derive(Debug)]
pub struct SlotFunction {
    /// Name that the operator knows it by.
    pub id: String,
    /// Address on the host.
    pub host: Bdf,
    /// The function.
    pub function: Arc<VfioFunction>,
    /// Its power resource, if it is offered one.
    pub resource: Option<ResourceIndex>,
}

/// Gives out message vectors of the machine.
pub fn message_vectors(around: &Surroundings) -> Arc<dyn MsiAllocator> {
    Arc::new(MsiVectors(Arc::clone(&around.router)))
}

impl Seat {
    /// A new root port at this device number on bus 0.
    ///
    /// # Errors
    /// See [`RootPortError`].
    pub fn new_port(device: u8, around: &Surroundings) -> Result<Self, RootPortError> {
        let devfn = DevFn::from_bits(device << 3);
        Ok(Self::with_port(RootPort::new(devfn, device, LinkSpeed::Gen2, message_vectors(around))?))
    }

    /// A new root port with an empty hot-plug slot. The guest turns the slot's power off when it has let go of what is there.
    ///
    /// # Errors
    /// See [`RootPortError`].
    pub fn new_slot(at: PlaceAddress, around: &Surroundings) -> Result<Self, RootPortError> {
        let devfn = DevFn::from_bits(at.device << 3);
        let port = RootPort::with_slot(devfn, at.device, LinkSpeed::Gen2, message_vectors(around))?;
        let releases = Arc::clone(&around.releases);
        port.on_slot_power(Box::new(move |on| {
            if !on {
                releases.released(at, Ok(()));
            }
        }));
        Ok(Self::with_port(port))
    }

    fn with_port(port: RootPort) -> Self {
        let port = Arc::new(port);
        let below = Arc::new(Below::default());
        let to_reset = Arc::clone(&below);
        port.on_secondary_reset(Box::new(move || {
            let functions = to_reset.read().unwrap_or_else(PoisonError::into_inner).clone();
            functions.iter().filter_map(Weak::upgrade).for_each(|function| function.reset());
        }));
        Self::Port(PortSeat { port, below })
    }

    /// Device number on bus 0: that of the port, or of the function.
    pub fn device(&self) -> u8 {
        match self {
            Self::Port(seat) => seat.port.devfn().device(),
            Self::Bus0(device) => *device,
        }
    }

    /// The root port.
    pub fn port(&self) -> Option<&Arc<RootPort>> {
        match self {
            Self::Port(seat) => Some(&seat.port),
            Self::Bus0(_) => None,
        }
    }
}

/// One function on its way into a slot.
struct Candidate<'a> {
    assignment: &'a Assignment,
    handle: Arc<Handle>,
    layout: FunctionLayout,
    low_power: Arc<dyn LowPower>,
    can_sleep: bool,
    resource: Option<ResourceIndex>,
    devfn: DevFn,
}

/// Puts a slot together. `resources` gives out power resources: to each function that can sleep, then to the port. Where tables are written
/// already (`fixed`), a function gets the resource that they give it even if it cannot sleep: the guest uses it, and `_OFF` then cuts nothing.
///
/// # Errors
/// See [`AssignedError`].
pub fn build_slot(
    seat: &Seat,
    handles: Vec<(&Assignment, Arc<Handle>)>,
    around: &Surroundings,
    resources: &mut dyn Iterator<Item = ResourceIndex>,
    fixed: bool,
) -> Result<Slot, AssignedError> {
    let allocator = message_vectors(around);
    let multi_function = handles.len() > 1;
    let lowest = handles.iter().map(|(a, _)| a.host.bdf.devfn.function()).min().unwrap_or(0);
    let mut candidates = Vec::new();
    for (assignment, handle) in handles {
        let excluded = &assignment.config.x_exclude_mmap_bars;
        let layout =
            FunctionLayout::read(&handle, multi_function, |bar| !excluded.contains(&u64::from(bar)))?;
        let low_power: Arc<dyn LowPower> = Arc::new(VfioLowPower::new(Arc::clone(&handle)));
        let can_sleep = decide(assignment, &layout, low_power.as_ref());
        // The bus needs a function 0: the lowest one assigned takes that place, the others keep theirs.
        let function = match assignment.host.bdf.devfn.function() {
            function if function == lowest => 0,
            function => function,
        };
        let devfn = match seat {
            Seat::Port(_) => DevFn::from_bits(function),
            Seat::Bus0(device) => DevFn::from_bits(device << 3),
        };
        let resource = if can_sleep || fixed { resources.next() } else { None };
        candidates.push(Candidate { assignment, handle, layout, low_power, can_sleep, resource, devfn });
    }
    // A port's resource puts away whatever below it is still on: it needs every function to be able to sleep.
    let whole = fixed || candidates.iter().all(|candidate| candidate.resource.is_some());
    let port_resource = if whole && seat.port().is_some() { resources.next() } else { None };

    let mut functions = Vec::new();
    let mut members = Vec::new();
    for candidate in candidates {
        let Candidate { assignment, handle, layout, low_power, can_sleep, resource, devfn } = candidate;
        let signals = host_signals::listen(&handle);
        let intx = intx_line(&layout, &handle, seat.device(), around)?;
        let function = VfioFunction::new(FunctionSpec {
            handle,
            layout,
            devfn,
            power_offered: resource.is_some(),
            windows: around.windows.clone(),
            mapper: Arc::clone(&around.mapper),
            msi: Arc::clone(&allocator),
            intx,
        })?;
        let mut policy = policy(assignment)?;
        if !can_sleep && policy.power == PowerChoice::Auto && resource.is_some() {
            policy.power = PowerChoice::D3hot;
        }
        members.push(MemberSpec {
            resource,
            devfn,
            low_power,
            gate: Arc::clone(&function) as _,
            signals,
            policy,
        });
        functions.push(SlotFunction {
            id: assignment.config.id.clone().unwrap_or_else(|| assignment.host.bdf.to_string()),
            host: assignment.host.bdf,
            function,
            resource,
        });
    }
    let latched_by = members.iter().map(|member| member.gate.bdf()).find(|bdf| around.latched.contains(bdf));
    let pme: Arc<dyn PmeSink> = match seat {
        Seat::Port(seat) => Arc::clone(&seat.port) as _,
        Seat::Bus0(_) => Arc::new(NoPort),
    };
    let domain = PowerDomain::new(DomainSpec {
        port_resource,
        members,
        pme,
        wake: Arc::clone(&around.wake),
        news: Some(Arc::new(PowerTeller {
            events: around.events.clone(),
            ids: functions.iter().map(|place| (place.host.to_string(), place.id.clone())).collect(),
        })),
        latched_by,
        timing: Timing::default(),
    })?;
    functions.iter().for_each(|place| place.function.join(&domain));
    Ok(Slot { domain, port_resource, functions })
}

impl PortSeat {
    /// The number that the guest has given to the port's bus.
    pub fn bus(&self) -> u8 {
        self.port.bus_range().0
    }

    /// Puts the slot's functions below the port.
    ///
    /// # Errors
    /// Functions that do not go below one port.
    pub fn attach(&self, slot: &Slot) -> Result<(), AssignedError> {
        let children = slot
            .functions
            .iter()
            .map(|place| (place.function.devfn(), Arc::clone(&place.function) as Arc<dyn PciFunction>))
            .collect();
        let port = self.port.devfn();
        self.port.set_children(children).map_err(|source| AssignedError::Children { port, source })?;
        let functions = slot.functions.iter().map(|place| Arc::downgrade(&place.function)).collect();
        *self.below.write().unwrap_or_else(PoisonError::into_inner) = functions;
        Ok(())
    }

    /// Takes all functions away from below the port.
    pub fn detach(&self) {
        self.port.remove_children();
        self.below.write().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// Whether the function is offered a power resource; tells the user why or why not.
fn decide(assignment: &Assignment, layout: &FunctionLayout, low_power: &dyn LowPower) -> bool {
    let bdf = assignment.host.bdf;
    let name = name(bdf, assignment.config.id.as_deref());
    let support = low_power.probe().unwrap_or_else(|e| {
        warn!("power {name}: {e}");
        Support::default()
    });
    let mut host = match HostPower::read(Path::new(SYSFS), bdf) {
        Ok(host) => host,
        Err(e) => {
            warn!("power {name}: not offered to the guest: {e}: {}", e.source);
            return false;
        }
    };
    host.pm_capability = Some(layout.shadow.capabilities().pm.is_some());
    let choice = assignment.config.power;
    match offer(&host, &support, choice) {
        Offer::Offered { warnings } => {
            info!("power {name}: offered to the guest");
            warnings.iter().for_each(|warning| warn!("power {name}: {warning}"));
            true
        }
        Offer::NotOffered { reason } => {
            // The user asked for it, or needs to know.
            match choice {
                PowerChoice::Off | PowerChoice::D3hot => {
                    info!("power {name}: not offered to the guest: {reason}");
                }
                PowerChoice::Auto => warn!("power {name}: not offered to the guest: {reason}"),
            }
            false
        }
    }
}

/// The defaults of the device's class with the user's changes.
fn policy(assignment: &Assignment) -> Result<Policy, AssignedError> {
    let bdf = assignment.host.bdf;
    let defaults = Policy::for_class(assignment.host.class);
    let change = assignment.config.policy_change();
    let policy = change.apply(&defaults).map_err(|source| AssignedError::Policy { bdf, source })?;
    if policy.needs_driver && policy.wake != WakePolicy::Notify {
        warn!(
            "power {bdf}: a display device's driver has to prepare each sleep, so the guest is told of wakes in spite of the wake key; \
             leave it out"
        );
    }
    Ok(policy)
}

/// The line of the function's interrupt pin, as `_PRT` describes it.
fn intx_line(
    layout: &FunctionLayout,
    handle: &Handle,
    device: u8,
    around: &Surroundings,
) -> Result<Option<Arc<dyn IntxLine>>, AssignedError> {
    let mut pin = [0; 1];
    layout.shadow.raw(usize::from(INTERRUPT_PIN), &mut pin);
    let (count, _) = handle.irq_count(VFIO_PCI_INTX_IRQ_INDEX);
    let Some(pin) = pin[0].checked_sub(1).filter(|pin| *pin < 4 && count > 0) else { return Ok(None) };
    // A function below a port is device 0 of its bus, so the pin arrives at the port unswizzled.
    let gsi = PCI_INTX_GSI_BASE + (u32::from(device) + u32::from(pin)) % PCI_INTX_GSI_COUNT;
    let line = around.router.intx_line(Gsi(gsi));
    line.map(Some).map_err(|source| AssignedError::Intx { bdf: handle.bdf(), source })
}

/// The sysfs paths of the devices, as the user gave them.
pub fn device_paths(devices: &[DeviceConfig]) -> Vec<PathBuf> {
    devices.iter().filter_map(|device| device.path.clone()).collect()
}
