//! The places on bus 0 of each PCI segment: which slot, port or nothing is in each, and which can be filled and emptied while the guest runs.
//!
//! Functions of one host slot share one guest slot below a root port, as they share the host's power. A function that is added later goes
//! onto bus 0 itself, as Cloud Hypervisor's do and its clients expect, or below a root port that was kept for it. The tables are written
//! once, so every place that can be filled later has its node and its power resource from the start.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use acpi::event_abi::{PLACE_COUNT, PlaceAddress};
use acpi::notify_abi::{RESOURCE_COUNT, ResourceIndex};
use acpi::platform::{FunctionDescription, RootPortDescription};
use devices::emulated::EmulatedFunction;
use devices::vfio::open::Handle;
use pci::assign::{FunctionNeeds, PortNeeds};
use pci::bar::BarKind;
use pci::{Bdf, DevFn};

use crate::assigned::{AssignedError, Assignment, Seat, Slot, Surroundings, build_slot};
use crate::emulated::Unit;
use crate::machine::MachineError;

/// Memory that is kept below each reserved port: for registers of most devices, and for the memory of a large GPU.
const RESERVED_MMIO32: u64 = 64 << 20;
const RESERVED_MMIO64: u64 = 32 << 30;

/// One place.
#[derive(Debug)]
pub struct Place {
    /// PCI segment.
    pub segment: u16,
    /// What is there all the time: a port, or nothing.
    pub seat: Seat,
    /// The assigned functions there.
    pub slot: Option<Slot>,
    /// The machine's own function there.
    pub emulated: Option<Arc<dyn EmulatedFunction>>,
    /// Power resources that the tables give the first function and its port.
    resources: [Option<ResourceIndex>; 2],
    /// Whether it can be filled and emptied.
    removable: bool,
    /// Whether its port has a hot-plug slot, through which the guest hears of what comes and goes; else the event device tells it.
    pub has_slot: bool,
    /// Whether the guest has been asked to let go.
    pub leaving: bool,
}

/// Where a slot is to be.
struct Planned<'a> {
    at: PlaceAddress,
    below_port: bool,
    content: Content<'a>,
}

/// What is to be in a place.
enum Content<'a> {
    Assigned(Vec<&'a Assignment>),
    Emulated(&'a Unit),
    Reserved,
}

/// What there is to be beside the devices of the configuration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reserve {
    /// Whether devices can come and go at all.
    pub hotplug: bool,
    /// Root ports for devices that come later.
    pub ports: u8,
    /// How many PCI segments there are.
    pub segments: u16,
}

/// Where slots go on bus 0, and which functions are in each.
fn plan<'a>(
    devices: &'a [Assignment],
    units: &'a [Unit],
    reserve: Reserve,
) -> Result<Vec<Planned<'a>>, AssignedError> {
    let slots = slots(devices)?;
    let assigned = slots.into_iter().map(|(seat, port, members)| (seat, port, Content::Assigned(members)));
    // In segment 0, where clients expect devices that come later.
    let ports = (0..reserve.ports).map(|_| ((0, None), true, Content::Reserved));
    let emulated = units.iter().map(|unit| ((unit.segment, unit.place), false, Content::Emulated(unit)));
    let wanted: Vec<_> = assigned.chain(ports).chain(emulated).collect();
    let mut taken = HashSet::new();
    for ((segment, device), ..) in &wanted {
        let Some(device) = *device else { continue };
        if !is_place(device) || !taken.insert((*segment, device)) {
            return Err(AssignedError::PlaceTaken { segment: *segment, device });
        }
    }
    let counts = count_by_segment(wanted.iter().map(|((segment, _), ..)| *segment));
    wanted
        .into_iter()
        .map(|((segment, device), below_port, content)| {
            let free = || (1..PLACE_COUNT).find(|device| !taken.contains(&(segment, *device)));
            let count = counts.get(&segment).copied().unwrap_or(0);
            let device = device.or_else(free).ok_or(AssignedError::Slots { segment, count })?;
            taken.insert((segment, device));
            Ok(Planned { at: PlaceAddress { segment, device }, below_port, content })
        })
        .collect()
}

/// Whether something can be there: device 0 is the host bridge.
fn is_place(device: u8) -> bool {
    (1..PLACE_COUNT).contains(&device)
}

fn count_by_segment(segments: impl Iterator<Item = u16>) -> HashMap<u16, usize> {
    let mut counts = HashMap::new();
    segments.for_each(|segment| *counts.entry(segment).or_default() += 1);
    counts
}

/// A slot of assigned functions: the segment and the place that it wants, whether it is below a port, and what is in it.
type WantedSlot<'a> = ((u16, Option<u8>), bool, Vec<&'a Assignment>);

/// Puts functions of one host slot together.
fn slots(devices: &[Assignment]) -> Result<Vec<WantedSlot<'_>>, AssignedError> {
    let mut slots: Vec<WantedSlot<'_>> = Vec::new();
    for device in devices {
        let bdf = device.host.bdf;
        let below_port = device.config.root_port.unwrap_or(true);
        let same_slot = |other: &Assignment| {
            let other = other.host.bdf;
            (other.segment, other.bus, other.devfn.device()) == (bdf.segment, bdf.bus, bdf.devfn.device())
        };
        let (segment, wish) = (device.config.pci_segment, device.config.pci_device_id);
        let sibling =
            slots.iter_mut().find(|(_, port, members)| *port && below_port && same_slot(members[0]));
        match sibling {
            Some(((other, place), ..))
                if *other != segment || place.is_some() && wish.is_some() && *place != wish =>
            {
                return Err(AssignedError::PlaceConflict { bdf });
            }
            Some(((_, place), _, members)) => {
                *place = place.or(wish);
                members.push(device);
            }
            None => slots.push(((segment, wish), below_port, vec![device])),
        }
    }
    slots.iter_mut().for_each(|(.., members)| members.sort_by_key(|member| member.host.bdf));
    Ok(slots)
}

/// Whether there is a place for every slot, before any device is opened.
pub fn check_places(devices: &[Assignment], units: &[Unit], reserve: Reserve) -> Result<(), AssignedError> {
    plan(devices, units, reserve).map(drop)
}

/// Puts all slots together and keeps places for those that come later. `opened` holds the handles of `devices`.
pub fn build_places(
    devices: &[Assignment],
    opened: &[Arc<Handle>],
    units: &[Unit],
    around: &Surroundings,
    reserve: Reserve,
) -> Result<Vec<Place>, MachineError> {
    let mut indices = (0..RESOURCE_COUNT).filter_map(|index| u8::try_from(index).ok()).map(ResourceIndex);
    let mut places = Vec::new();
    for Planned { at, below_port, content } in plan(devices, units, reserve)? {
        let PlaceAddress { segment, device } = at;
        let reserved = matches!(content, Content::Reserved);
        let seat = match below_port {
            true if reserved => Seat::new_slot(at, around).map_err(AssignedError::from)?,
            true => Seat::new_port(device, around).map_err(AssignedError::from)?,
            false => Seat::Bus0(device),
        };
        let stays = matches!(&content, Content::Emulated(unit) if !unit.is_removable());
        let (mut slot, mut emulated) = (None, None);
        match content {
            Content::Assigned(members) => {
                let handle_of = |bdf: Bdf| opened.iter().find(|handle| handle.bdf() == bdf);
                let handles =
                    members.iter().filter_map(|m| Some((*m, Arc::clone(handle_of(m.host.bdf)?)))).collect();
                slot = Some(build_slot(&seat, handles, around, &mut indices, false)?);
            }
            Content::Emulated(unit) => {
                emulated = Some(unit.function(DevFn::from_bits(device << 3), around)?);
            }
            Content::Reserved => {}
        }
        let resources = match &slot {
            Some(slot) => [slot.functions.first().and_then(|place| place.resource), slot.port_resource],
            // The machine's own functions have no power to cut. What comes after one may have.
            None if emulated.is_some() && !reserve.hotplug => [None, None],
            None if emulated.is_some() => [indices.next(), None],
            None => [indices.next(), indices.next()],
        };
        if let (Seat::Port(port), Some(slot)) = (&seat, &slot) {
            port.attach(slot)?;
        }
        let alone = slot.as_ref().is_none_or(|slot| slot.functions.len() == 1);
        places.push(Place {
            segment,
            seat,
            slot,
            emulated,
            resources,
            removable: reserve.hotplug && alone && !stays,
            has_slot: reserved,
            leaving: false,
        });
    }
    if reserve.hotplug {
        let taken: HashSet<_> = places.iter().map(Place::address).collect();
        // Device by device, so that every segment gets its part of the power resources.
        let all = (1..PLACE_COUNT)
            .flat_map(|device| (0..reserve.segments).map(move |segment| PlaceAddress { segment, device }));
        places.extend(all.filter(|at| !taken.contains(at)).map(|at| Place {
            segment: at.segment,
            seat: Seat::Bus0(at.device),
            slot: None,
            emulated: None,
            resources: [indices.next(), None],
            removable: true,
            has_slot: false,
            leaving: false,
        }));
    }
    Ok(places)
}

impl Place {
    /// Where it is.
    pub fn address(&self) -> PlaceAddress {
        PlaceAddress { segment: self.segment, device: self.device() }
    }

    /// Its device number on bus 0, or that of its root port.
    pub fn device(&self) -> u8 {
        self.seat.device()
    }

    /// Whether the guest has been asked to let go of what is here.
    pub fn is_leaving(&self) -> bool {
        self.leaving
    }

    /// The power resources that the tables give to what is put here.
    pub fn resources(&self) -> impl Iterator<Item = ResourceIndex> + use<> {
        self.resources.into_iter().flatten()
    }

    /// Whether a function can be put here now.
    pub fn is_free(&self) -> bool {
        self.removable && self.is_empty()
    }

    /// Whether there is nothing here.
    pub fn is_empty(&self) -> bool {
        self.slot.is_none() && self.emulated.is_none()
    }

    /// Names of what is here.
    pub fn ids(&self) -> impl Iterator<Item = &str> {
        let assigned = self.slot.iter().flat_map(|slot| &slot.functions).map(|function| function.id.as_str());
        assigned.chain(self.emulated.iter().map(|function| function.name()))
    }

    /// Whether what is here can go while the guest runs.
    pub fn is_removable(&self) -> bool {
        self.removable
    }

    /// Address of the first function in the guest as it is now.
    pub fn guest_address(&self) -> Bdf {
        let segment = self.segment;
        match &self.seat {
            Seat::Bus0(device) => Bdf { segment, bus: 0, devfn: DevFn::from_bits(device << 3) },
            Seat::Port(seat) => Bdf { segment, bus: seat.bus(), devfn: DevFn::from_bits(0) },
        }
    }

    /// Address in the guest of the function with this name, if it is here.
    pub fn address_of(&self, id: &str) -> Option<Bdf> {
        let function = self.slot.as_ref()?.functions.iter().find(|function| function.id == id)?;
        let first = self.guest_address();
        let number = function.function.devfn().function();
        Some(Bdf { devfn: DevFn::new(first.devfn.device(), number).unwrap_or(first.devfn), ..first })
    }

    /// What the BARs of a port's functions need, or of those that may come.
    pub fn port_needs(&self) -> Option<PortNeeds> {
        let devfn = self.seat.port()?.devfn();
        let functions = match &self.slot {
            Some(slot) => slot.functions.iter().map(|place| place.function.needs()).collect(),
            None => vec![FunctionNeeds {
                devfn: DevFn::from_bits(0),
                bars: vec![
                    (0, BarKind::Mem32 { prefetchable: false }, RESERVED_MMIO32),
                    (2, BarKind::Mem64 { prefetchable: true }, RESERVED_MMIO64),
                ],
            }],
        };
        Some(PortNeeds { devfn, functions })
    }

    /// What the BARs of a function on bus 0 need.
    pub fn bus_0_needs(&self) -> Option<FunctionNeeds> {
        match (&self.seat, &self.slot) {
            (Seat::Bus0(_), Some(slot)) => slot.functions.first().map(|place| place.function.needs()),
            _ => self.emulated.as_ref().map(|function| function.needs()),
        }
    }

    fn function_description(&self, devfn: DevFn, resource: Option<ResourceIndex>) -> FunctionDescription {
        let notified = self.removable && !self.has_slot;
        FunctionDescription { devfn, resource, place: notified.then(|| self.seat.device()) }
    }

    /// What the tables say of a port and what is below it.
    pub fn port_description(&self) -> Option<RootPortDescription> {
        let devfn = self.seat.port()?.devfn();
        let functions = match &self.slot {
            Some(slot) => {
                let functions = slot.functions.iter();
                functions
                    .map(|place| self.function_description(place.function.devfn(), place.resource))
                    .collect()
            }
            None => vec![self.function_description(DevFn::from_bits(0), self.resources[0])],
        };
        Some(RootPortDescription { devfn, resource: self.resources[1], functions })
    }

    /// What the tables say of a function on bus 0.
    pub fn bus_0_description(&self) -> Option<FunctionDescription> {
        match self.seat {
            Seat::Bus0(device) => {
                Some(self.function_description(DevFn::from_bits(device << 3), self.resources[0]))
            }
            Seat::Port(_) => None,
        }
    }
}
