//! Assigned devices put together: slots with their root ports, the functions in them, and their power domains.
//!
//! Functions of one host slot share one guest slot, that is one root port, as they share the host's power. Whether a
//! function is offered a power resource is decided here, once, before boot; the reason is logged either way.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use acpi::notify_abi::{RESOURCE_COUNT, ResourceIndex};
use acpi::platform::{FunctionDescription, RootPortDescription};
use arch::layout::{PCI_INTX_GSI_BASE, PCI_INTX_GSI_COUNT};
use devices::vfio::bar::GuestMapper;
use devices::vfio::function::{FunctionSpec, VfioFunction, Windows};
use devices::vfio::host::HostFunction;
use devices::vfio::host_signals;
use devices::vfio::layout::{FunctionLayout, LayoutError};
use devices::vfio::open::{Handle, OpenError, name};
use log::{Level, debug, info, log_enabled, warn};
use pci::assign::PortNeeds;
use pci::cap::pcie::LinkSpeed;
use pci::interrupt::{IntxLine, MsiAllocator};
use pci::root_port::{ChildrenError, RootPort, RootPortError};
use pci::{Bdf, DevFn, PciFunction};
use vfio_bindings::bindings::vfio::VFIO_PCI_INTX_IRQ_INDEX;
use vfio_pm::offer::{Offer, PowerChoice, offer};
use vfio_pm::sysfs::{HostPower, SYSFS};
use vfio_pm::{
    CreateError, DomainSpec, LowPower, MemberSpec, News, NewsSink, Policy, PolicyError, PowerDomain,
    PowerNews, Support, Timing, VfioLowPower, WakePolicy, WakeSink,
};

use crate::config::DeviceConfig;
use crate::events::{Events, Properties};
use crate::irq::{Gsi, IrqRouter, MsiVectors};
use crate::remedy::remedy;

/// Interrupt pin in configuration space: 1 is INTA.
const INTERRUPT_PIN: u16 = 0x3d;

/// Assigned devices cannot be put into the machine.
#[derive(Debug, thiserror::Error)]
pub enum AssignedError {
    /// More slots than bus 0 has room for.
    #[error(
        "{0} slots of assigned devices do not fit: bus 0 has room for 31 root ports; assign fewer devices"
    )]
    Slots(usize),
    /// Two slots want the same place.
    #[error("--device pci_device_id={device}: that place on bus 0 is taken; choose another from 1 to 31")]
    PlaceTaken {
        /// Device number on bus 0.
        device: u8,
    },
    /// One slot is asked to be in two places.
    #[error("device {bdf}: the functions of one slot share a root port, so give them the same pci_device_id")]
    PlaceConflict {
        /// Host address of the later function.
        bdf: Bdf,
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

/// What assigned devices need of the machine.
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
}

/// One assigned device: the host's view and the user's wishes.
pub struct Assignment {
    /// The host's view.
    pub host: HostFunction,
    /// The user's wishes.
    pub config: DeviceConfig,
}

/// A slot that has been put together.
#[derive(Debug)]
pub struct Slot {
    /// Stopped and joined when the machine goes; before the functions, whose hardware it drives.
    pub domain: Arc<PowerDomain>,
    /// Its root port on bus 0.
    pub port: Arc<RootPort>,
    /// The port's power resource.
    pub port_resource: Option<ResourceIndex>,
    /// Its functions.
    pub functions: Vec<SlotFunction>,
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

impl Slot {
    /// What the slot's BARs need.
    pub fn needs(&self) -> PortNeeds {
        let functions = self.functions.iter().map(|place| place.function.needs()).collect();
        PortNeeds { devfn: self.port.devfn(), functions }
    }

    /// What the tables say of the slot.
    pub fn description(&self) -> RootPortDescription {
        let functions = self
            .functions
            .iter()
            .map(|place| FunctionDescription { devfn: place.function.devfn(), resource: place.resource })
            .collect();
        RootPortDescription { devfn: self.port.devfn(), resource: self.port_resource, functions }
    }
}

/// Where slots go on bus 0, and which functions are in each.
fn places(devices: &[Assignment]) -> Result<Vec<(DevFn, Vec<&Assignment>)>, AssignedError> {
    let mut slots: Vec<(Option<u8>, Vec<&Assignment>)> = Vec::new();
    for device in devices {
        let bdf = device.host.bdf;
        let same_slot = |other: &Assignment| {
            let other = other.host.bdf;
            (other.segment, other.bus, other.devfn.device()) == (bdf.segment, bdf.bus, bdf.devfn.device())
        };
        let wish = device.config.pci_device_id;
        match slots.iter_mut().find(|(_, members)| same_slot(members[0])) {
            Some((place, _)) if place.is_some() && wish.is_some() && *place != wish => {
                return Err(AssignedError::PlaceConflict { bdf });
            }
            Some((place, members)) => {
                *place = place.or(wish);
                members.push(device);
            }
            None => slots.push((wish, vec![device])),
        }
    }
    let count = slots.len();
    // Device 0 is the host bridge.
    let mut taken = [false; 32];
    taken[0] = true;
    for device in slots.iter().filter_map(|(place, _)| *place) {
        let place = taken.get_mut(usize::from(device)).filter(|taken| !**taken);
        *place.ok_or(AssignedError::PlaceTaken { device })? = true;
    }
    slots
        .into_iter()
        .map(|(place, mut members)| {
            let device = match place {
                Some(device) => Some(device),
                None => taken.iter().position(|taken| !taken).and_then(|free| u8::try_from(free).ok()),
            };
            let devfn = device.and_then(|device| DevFn::new(device, 0)).ok_or(AssignedError::Slots(count))?;
            taken[usize::from(devfn.device())] = true;
            members.sort_by_key(|member| member.host.bdf);
            Ok((devfn, members))
        })
        .collect()
}

/// Whether there is a place on bus 0 for every slot, before any device is opened.
pub fn check_places(devices: &[Assignment]) -> Result<(), AssignedError> {
    places(devices).map(|_| ())
}

/// Puts all slots together. `opened` holds the handles in the order of `devices`.
pub fn build_slots(
    devices: &[Assignment],
    opened: &[Arc<Handle>],
    around: &Surroundings,
) -> Result<Vec<Slot>, AssignedError> {
    let mut resources = (0..RESOURCE_COUNT).filter_map(|index| u8::try_from(index).ok()).map(ResourceIndex);
    let mut slots = Vec::new();
    for (devfn, members) in places(devices)? {
        let handle_of = |bdf: Bdf| opened.iter().find(|handle| handle.bdf() == bdf);
        let handles = members.iter().filter_map(|m| Some((*m, Arc::clone(handle_of(m.host.bdf)?)))).collect();
        slots.push(build_slot(devfn, handles, around, &mut resources)?);
    }
    Ok(slots)
}

/// One function on its way into a slot.
struct Candidate<'a> {
    assignment: &'a Assignment,
    handle: Arc<Handle>,
    layout: FunctionLayout,
    low_power: Arc<dyn LowPower>,
    resource: Option<ResourceIndex>,
    devfn: DevFn,
}

fn build_slot(
    devfn: DevFn,
    handles: Vec<(&Assignment, Arc<Handle>)>,
    around: &Surroundings,
    resources: &mut impl Iterator<Item = ResourceIndex>,
) -> Result<Slot, AssignedError> {
    let allocator: Arc<dyn MsiAllocator> = Arc::new(MsiVectors(Arc::clone(&around.router)));
    let port = Arc::new(RootPort::new(devfn, devfn.device(), LinkSpeed::Gen2, Arc::clone(&allocator))?);
    let multi_function = handles.len() > 1;
    let lowest = handles.iter().map(|(a, _)| a.host.bdf.devfn.function()).min().unwrap_or(0);
    let mut candidates = Vec::new();
    for (assignment, handle) in handles {
        let excluded = &assignment.config.x_exclude_mmap_bars;
        let layout =
            FunctionLayout::read(&handle, multi_function, |bar| !excluded.contains(&u64::from(bar)))?;
        let low_power: Arc<dyn LowPower> = Arc::new(VfioLowPower::new(Arc::clone(&handle)));
        let offered = decide(assignment, &layout, low_power.as_ref());
        // The bus needs a function 0: the lowest one assigned takes that place, the others keep theirs.
        let function = match assignment.host.bdf.devfn.function() {
            function if function == lowest => 0,
            function => function,
        };
        let place = DevFn::from_bits(function);
        let resource = if offered { resources.next() } else { None };
        candidates.push(Candidate { assignment, handle, layout, low_power, resource, devfn: place });
    }
    // A port's resource puts away whatever below it is still on: it needs every function to be able to sleep.
    let whole = candidates.iter().all(|candidate| candidate.resource.is_some());
    let port_resource = if whole { resources.next() } else { None };

    let mut functions = Vec::new();
    let mut members = Vec::new();
    for candidate in candidates {
        let Candidate { assignment, handle, layout, low_power, resource, devfn: place } = candidate;
        let signals = host_signals::listen(&handle);
        let intx = intx_line(&layout, &handle, devfn, around)?;
        let function = VfioFunction::new(FunctionSpec {
            handle,
            layout,
            devfn: place,
            power_offered: resource.is_some(),
            windows: around.windows.clone(),
            mapper: Arc::clone(&around.mapper),
            msi: Arc::clone(&allocator),
            intx,
        })?;
        members.push(MemberSpec {
            resource,
            devfn: place,
            low_power,
            gate: Arc::clone(&function) as _,
            signals,
            policy: policy(assignment)?,
        });
        functions.push(SlotFunction {
            id: assignment.config.id.clone().unwrap_or_else(|| assignment.host.bdf.to_string()),
            host: assignment.host.bdf,
            function,
            resource,
        });
    }
    let children = functions
        .iter()
        .map(|place| (place.function.devfn(), Arc::clone(&place.function) as Arc<dyn PciFunction>))
        .collect();
    port.set_children(children).map_err(|source| AssignedError::Children { port: devfn, source })?;
    let to_reset: Vec<_> = functions.iter().map(|place| Arc::downgrade(&place.function)).collect();
    port.on_secondary_reset(Box::new(move || {
        to_reset.iter().filter_map(std::sync::Weak::upgrade).for_each(|function| function.reset());
    }));
    let latched_by = members.iter().map(|member| member.gate.bdf()).find(|bdf| around.latched.contains(bdf));
    let domain = PowerDomain::new(DomainSpec {
        port_resource,
        members,
        pme: Arc::clone(&port) as _,
        wake: Arc::clone(&around.wake),
        news: Some(Arc::new(PowerTeller {
            events: around.events.clone(),
            ids: functions.iter().map(|place| (place.host.to_string(), place.id.clone())).collect(),
        })),
        latched_by,
        timing: Timing::default(),
    })?;
    functions.iter().for_each(|place| place.function.join(&domain));
    Ok(Slot { domain, port, port_resource, functions })
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

/// All news of power: to the event monitor, and to the log as one JSON object a line for those who ask for debug messages.
#[derive(Debug)]
struct PowerTeller {
    events: Events,
    /// Names by host address.
    ids: Vec<(String, String)>,
}

/// Longest property of an event: readers have buffers of a fixed size.
const LONGEST_PROPERTY: usize = 300;

impl NewsSink for PowerTeller {
    fn tell(&self, news: &PowerNews) {
        if log_enabled!(Level::Debug)
            && let Ok(text) = serde_json::to_string(news)
        {
            debug!("power news: {text}");
        }
        if !self.events.are_heard() {
            return;
        }
        let id = self.ids.iter().find(|(bdf, _)| *bdf == news.bdf).map(|(_, id)| id.clone());
        let mut properties: Properties = [("bdf", news.bdf.clone())].into();
        properties.extend(id.map(|id| ("id", id)));
        if news.left_out > 0 {
            properties.insert("left_out", news.left_out.to_string());
        }
        let what = match &news.news {
            News::Transition { from, to, after_ms } => {
                properties.extend([
                    ("from", (*from).to_owned()),
                    ("state", (*to).to_owned()),
                    ("after_ms", after_ms.to_string()),
                ]);
                "transition"
            }
            News::Woken { cause } => {
                properties.insert("cause", (*cause).to_owned());
                "woken"
            }
            News::Failed { failure, message } => {
                properties.insert("failure", (*failure).to_owned());
                properties.insert("message", message.chars().take(LONGEST_PROPERTY).collect());
                "failed"
            }
            News::Denied { why, wait_ms } => {
                properties.insert("why", (*why).to_owned());
                properties.extend(wait_ms.map(|wait| ("wait_ms", wait.to_string())));
                "denied"
            }
            News::Latched => "latched",
            News::Unlatched => "unlatched",
            News::Recovered => "recovered",
        };
        properties.insert("what", what.to_owned());
        self.events.tell_with("vm", "device-power", properties);
    }
}

/// The line of the function's interrupt pin, as `_PRT` describes it.
fn intx_line(
    layout: &FunctionLayout,
    handle: &Handle,
    port: DevFn,
    around: &Surroundings,
) -> Result<Option<Arc<dyn IntxLine>>, AssignedError> {
    let mut pin = [0; 1];
    layout.shadow.raw(usize::from(INTERRUPT_PIN), &mut pin);
    let (count, _) = handle.irq_count(VFIO_PCI_INTX_IRQ_INDEX);
    let Some(pin) = pin[0].checked_sub(1).filter(|pin| *pin < 4 && count > 0) else { return Ok(None) };
    // The function is device 0 of its bus, so the pin arrives at the port unswizzled.
    let gsi = PCI_INTX_GSI_BASE + (u32::from(port.device()) + u32::from(pin)) % PCI_INTX_GSI_COUNT;
    let line = around.router.intx_line(Gsi(gsi));
    line.map(Some).map_err(|source| AssignedError::Intx { bdf: handle.bdf(), source })
}

/// The sysfs paths of the devices, as the user gave them.
pub fn device_paths(devices: &[DeviceConfig]) -> Vec<PathBuf> {
    devices.iter().filter_map(|device| device.path.clone()).collect()
}
