//! Bus 0 and the way to every function from it (PCI Express Base 6.0, section 7.3.3; PCI-to-PCI Bridge 1.2, section 3.1.1).

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use crate::bdf::DevFn;
use crate::function::{PciBridge, PciFunction};

#[derive(Clone, Debug)]
enum Slot {
    Function(Arc<dyn PciFunction>),
    Bridge(Arc<dyn PciBridge>),
}

/// Two functions for one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("two PCI functions want {0} on bus 0; give one of them another device number")]
pub struct SlotTaken(pub DevFn);

/// Collects the functions of bus 0.
#[derive(Debug, Default)]
pub struct RootBusBuilder {
    slots: BTreeMap<DevFn, Slot>,
}

impl RootBusBuilder {
    /// An empty bus.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a function that has no bus below it.
    pub fn add_function(&mut self, devfn: DevFn, function: Arc<dyn PciFunction>) -> Result<(), SlotTaken> {
        self.add(devfn, Slot::Function(function))
    }

    /// Adds a bridge, behind which configuration cycles are routed by its bus numbers.
    pub fn add_bridge(&mut self, devfn: DevFn, bridge: Arc<dyn PciBridge>) -> Result<(), SlotTaken> {
        self.add(devfn, Slot::Bridge(bridge))
    }

    /// Freezes the bus, but for functions that come and go.
    pub fn build(self) -> RootBus {
        RootBus { slots: self.slots, plugged: RwLock::default() }
    }

    fn add(&mut self, devfn: DevFn, slot: Slot) -> Result<(), SlotTaken> {
        if self.slots.contains_key(&devfn) {
            return Err(SlotTaken(devfn));
        }
        self.slots.insert(devfn, slot);
        Ok(())
    }
}

/// The functions of bus 0, and those below its bridges, at the bus numbers the guest gave them. Bridges are fixed; functions
/// can come and go.
#[derive(Debug)]
pub struct RootBus {
    slots: BTreeMap<DevFn, Slot>,
    plugged: RwLock<BTreeMap<DevFn, Arc<dyn PciFunction>>>,
}

impl RootBus {
    /// The function that answers there now. No lock of the bus is held by what comes back.
    ///
    /// A guest can give two bridges one bus number; then the bridge with the lower device number gets the cycle.
    pub fn find(&self, bus: u8, devfn: DevFn) -> Option<Arc<dyn PciFunction>> {
        if bus == 0 {
            return match self.slots.get(&devfn) {
                Some(Slot::Function(function)) => Some(Arc::clone(function)),
                Some(Slot::Bridge(bridge)) => Some(Arc::clone(bridge) as Arc<dyn PciFunction>),
                None => self.plugged.read().unwrap_or_else(PoisonError::into_inner).get(&devfn).cloned(),
            };
        }
        // No bridge stands below another one, so a bus beyond a secondary one is empty.
        let bridge = self.bridges().find(|(_, bridge)| {
            let (secondary, subordinate) = bridge.bus_range();
            secondary != 0 && (secondary..=subordinate).contains(&bus)
        });
        bridge.filter(|(_, bridge)| bridge.bus_range().0 == bus).and_then(|(_, bridge)| bridge.child(devfn))
    }

    /// Puts a function on bus 0 while the guest runs.
    pub fn plug(&self, devfn: DevFn, function: Arc<dyn PciFunction>) -> Result<(), SlotTaken> {
        let mut plugged = self.plugged.write().unwrap_or_else(PoisonError::into_inner);
        if self.slots.contains_key(&devfn) || plugged.contains_key(&devfn) {
            return Err(SlotTaken(devfn));
        }
        plugged.insert(devfn, function);
        Ok(())
    }

    /// Takes a function away that was put there by [`Self::plug`]. Accesses under way may still reach it.
    pub fn unplug(&self, devfn: DevFn) -> Option<Arc<dyn PciFunction>> {
        self.plugged.write().unwrap_or_else(PoisonError::into_inner).remove(&devfn)
    }

    /// The bridges, by their place on bus 0.
    pub fn bridges(&self) -> impl Iterator<Item = (DevFn, &Arc<dyn PciBridge>)> {
        self.slots.iter().filter_map(|(&devfn, slot)| match slot {
            Slot::Bridge(bridge) => Some((devfn, bridge)),
            Slot::Function(_) => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{FakeBridge, Recorder};

    fn at(device: u8) -> DevFn {
        DevFn::new(device, 0).unwrap()
    }

    fn answers(bus: &RootBus, number: u8, devfn: DevFn, recorder: &Recorder) -> bool {
        recorder.take();
        let Some(function) = bus.find(number, devfn) else { return false };
        function.config_read(0, &mut [0; 4]);
        !recorder.take().is_empty()
    }

    #[test]
    fn functions_come_and_go_where_there_is_no_other() {
        let (fixed, moving) = (Recorder::new(), Recorder::new());
        let mut builder = RootBusBuilder::new();
        builder.add_function(at(0), fixed.clone()).unwrap();
        let bus = builder.build();
        assert_eq!(bus.plug(at(0), moving.clone()), Err(SlotTaken(at(0))));
        assert_eq!(bus.plug(at(4), moving.clone()), Ok(()));
        assert_eq!(bus.plug(at(4), fixed.clone()), Err(SlotTaken(at(4))));
        assert!(answers(&bus, 0, at(4), &moving));
        assert!(bus.unplug(at(0)).is_none(), "what is fixed stays");
        assert!(bus.unplug(at(4)).is_some() && bus.find(0, at(4)).is_none());
        assert_eq!(bus.plug(at(4), moving), Ok(()));
    }

    #[test]
    fn functions_below_bridges_are_found_by_the_live_bus_numbers() {
        let (top, low, high) = (Recorder::new(), Recorder::new(), Recorder::new());
        let (first, second) = (FakeBridge::new(at(0), low.clone()), FakeBridge::new(at(0), high.clone()));
        let mut builder = RootBusBuilder::new();
        builder.add_function(at(0), top.clone()).unwrap();
        builder.add_bridge(at(1), first.clone()).unwrap();
        builder.add_bridge(at(2), second.clone()).unwrap();
        assert_eq!(builder.add_function(at(1), top.clone()), Err(SlotTaken(at(1))));
        let bus = builder.build();
        assert!(answers(&bus, 0, at(0), &top));
        assert!(bus.find(0, at(3)).is_none());
        assert!((1..=u8::MAX).all(|number| bus.find(number, at(0)).is_none()), "bridges not yet numbered");
        first.set_bus_range(1, 4);
        second.set_bus_range(5, 5);
        assert!(answers(&bus, 1, at(0), &low));
        assert!(answers(&bus, 5, at(0), &high));
        assert!(bus.find(1, at(1)).is_none());
        assert!(bus.find(2, at(0)).is_none(), "an empty bus of the first bridge");
        second.set_bus_range(1, 1);
        assert!(answers(&bus, 1, at(0), &low), "the first bridge wins");
        second.set_bus_range(9, 3);
        assert!(bus.find(9, at(0)).is_none(), "a range turned round is empty");
    }
}
