//! The PCI segments of a machine: each with a bus 0, configuration space and windows of its own, and the addresses of all that is in it
//! (PCI Firmware Specification 3.3, sections 3 and 4).

use std::sync::Arc;

use acpi::platform::{AddressRange, PciDescription, PortRange};
use arch::layout::{self, MemoryMap};
use arch::segments::{SegmentMap, SegmentNeeds};
use pci::DevFn;
use pci::assign::{Aperture, Apertures, AssignError, Assignment as Plan};
use pci::bus::{RootBus, RootBusBuilder};
use pci::ecam::{ECAM_LEN, Ecam};
use pci::host_bridge::HostBridge;

use crate::buses::Buses;
use crate::config::PciSegmentConfig;
use crate::machine::MachineError;
use crate::places::Place;

/// BARs that a segment has no room for.
#[derive(Debug, thiserror::Error)]
#[error("PCI segment {segment}: {source}, or give the segment a larger share with --pci-segment")]
pub struct SegmentFull {
    /// The segment.
    pub segment: u16,
    /// What does not fit.
    #[source]
    pub source: AssignError,
}

/// A segment.
struct Segment {
    number: u16,
    map: SegmentMap,
    bus: Arc<RootBus>,
    plan: Plan,
}

/// All segments of a machine, in the order of their numbers.
pub struct PciSegments(Vec<Segment>);

impl PciSegments {
    /// The buses with their bridges, and where all BARs are to be; functions on the buses 0 themselves are still to come.
    ///
    /// # Errors
    /// What is there does not fit.
    pub fn new(
        places: &[Place],
        map: &MemoryMap,
        configs: &[PciSegmentConfig],
    ) -> Result<Self, MachineError> {
        let ports = |number| {
            places.iter().filter(move |place| place.segment == number && place.seat.port().is_some())
        };
        let needs = |config: &PciSegmentConfig| SegmentNeeds {
            buses: u16::try_from(ports(config.pci_segment).count())
                .map_or(u16::MAX, |ports| ports.saturating_add(1)),
            mmio32_weight: config.mmio32_aperture_weight,
            mmio64_weight: config.mmio64_aperture_weight,
        };
        let maps = map.segments(&configs.iter().map(needs).collect::<Vec<_>>())?;
        let several = configs.len() > 1;
        let segments = configs.iter().zip(maps).map(|(config, map)| {
            let number = config.pci_segment;
            let here: Vec<_> = places.iter().filter(|place| place.segment == number).collect();
            let plan = plan(number, &here, &map).map_err(|source| match several {
                true => MachineError::SegmentFull(SegmentFull { segment: number, source }),
                false => source.into(),
            })?;
            Ok(Segment { number, map, bus: bus(&here)?, plan })
        });
        segments.collect::<Result<_, _>>().map(Self)
    }

    /// Bus 0 of each segment.
    pub fn buses(&self) -> Vec<Arc<RootBus>> {
        self.0.iter().map(|segment| Arc::clone(&segment.bus)).collect()
    }

    /// Gives the guest its memory-mapped configuration space.
    ///
    /// # Errors
    /// Something else is there.
    pub fn register(&self, buses: &mut Buses) -> Result<(), MachineError> {
        // One alone has all there is: its ports can be given any numbers through the ports of mechanism #1.
        let several = self.0.len() > 1;
        self.0.iter().try_for_each(|segment| {
            let ecam = segment.map.ecam;
            let len = if several { ecam.len } else { ECAM_LEN };
            let device = Arc::new(Ecam::new(Arc::clone(&segment.bus)));
            buses.mmio("PCI configuration space", ecam.start.0, len, device)
        })
    }

    /// Writes all addresses into the registers of what is on the buses now.
    pub fn program(&self) {
        self.0.iter().for_each(|segment| segment.plan.program(&segment.bus));
    }

    /// All addresses.
    pub fn into_plan(self) -> Plan {
        let mut whole = Plan::default();
        for segment in self.0 {
            whole.ports.extend(segment.plan.ports);
            whole.bars.extend(segment.plan.bars);
        }
        whole
    }

    /// What the tables say of the segments.
    pub fn describe(&self, places: &[Place]) -> Vec<PciDescription> {
        let range = |range: layout::AddressRange| AddressRange { base: range.start.0, size: range.len };
        let describe = |segment: &Segment| {
            let here = || places.iter().filter(|place| place.segment == segment.number);
            let io = PortRange {
                base: layout::PCI_IO_START,
                size: layout::PCI_IO_LAST - layout::PCI_IO_START + 1,
            };
            PciDescription {
                segment: segment.number,
                ecam: range(segment.map.ecam),
                mmio32: range(segment.map.mmio32),
                mmio64: Some(range(segment.map.mmio64)),
                io: (segment.number == 0).then_some(io),
                intx_gsi_base: layout::PCI_INTX_GSI_BASE,
                root_ports: here().filter_map(Place::port_description).collect(),
                functions: here().filter_map(Place::bus_0_description).collect(),
            }
        };
        self.0.iter().map(describe).collect()
    }
}

fn bus(places: &[&Place]) -> Result<Arc<RootBus>, MachineError> {
    let mut bus = RootBusBuilder::new();
    bus.add_function(DevFn::from_bits(0), Arc::new(HostBridge::new())).map_err(MachineError::Bus)?;
    for port in places.iter().filter_map(|place| place.seat.port()) {
        bus.add_bridge(port.devfn(), Arc::clone(port) as _).map_err(MachineError::Bus)?;
    }
    Ok(Arc::new(bus.build()))
}

fn plan(segment: u16, places: &[&Place], map: &SegmentMap) -> Result<Plan, AssignError> {
    let aperture = |range: layout::AddressRange| Aperture { start: range.start.0, size: range.len };
    let ports = u64::from(layout::PCI_IO_LAST - layout::PCI_IO_START) + 1;
    let apertures = Apertures {
        segment,
        mmio32: aperture(map.mmio32),
        mmio64: aperture(map.mmio64),
        // There is one space of ports, and segment 0 has it.
        io: Aperture { start: u64::from(layout::PCI_IO_START), size: if segment == 0 { ports } else { 0 } },
    };
    let on_bus_0: Vec<_> = places.iter().filter_map(|place| place.bus_0_needs()).collect();
    let below: Vec<_> = places.iter().filter_map(|place| place.port_needs()).collect();
    pci::assign::assign(&on_bus_0, &below, &apertures)
}
