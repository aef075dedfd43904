//! The devices of a running machine that are on PCI: those it was started with, and those that come and go.
//!
//! A device comes in one step: it is opened, put on its bus, and the guest is told. It goes in two: the guest is asked, and once it has let go of
//! the device, the device is closed. Closing can take as long as the host needs to give a sleeping device its power back,
//! so a thread of its own does it, and tells of it when the device is free for others.
//!
//! The guest is told and asked through the hot-plug slot of a reserved root port, and everywhere else through the event device.

use std::sync::{Arc, PoisonError, RwLock, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use acpi::event_abi::PlaceAddress;
use devices::emulated::EmulatedFunction;
use devices::event_device::EventDevice;
use devices::vfio::dma::{self, DmaError, UnmapGate};
use devices::vfio::function::VfioFunction;
use devices::vfio::open::{ContextKind, Handle, IommuContext};
use devices::virtio::discard::{Discarder, Pin};
use log::{debug, info, warn};
use pci::bus::RootBus;
use pci::{Bdf, PciFunction};
use vfio_ioctls::VfioDeviceFd;
use vfio_pm::NotifyDevice;
use vm_memory::{GuestMemoryMmap, GuestRegionMmap};

use crate::assigned::{AssignedError, Assignment, Seat, Slot, Surroundings, build_slot};
use crate::config::DeviceConfig;
use crate::emulated::Unit;
use crate::machine::MachineError;
use crate::memory::persistent::PersistentSpace;
use crate::places::Place;
use crate::vcpu::FaultCure;

/// All functions that may have direct mappings: closed when a vCPU finds their memory gone.
#[derive(Debug)]
pub struct CloseBars {
    functions: RwLock<Vec<Weak<VfioFunction>>>,
    /// Files that can lose pages too.
    persistent: Arc<PersistentSpace>,
}

impl CloseBars {
    /// For a machine without functions yet.
    pub fn new(persistent: &Arc<PersistentSpace>) -> Self {
        Self { functions: RwLock::default(), persistent: Arc::clone(persistent) }
    }

    fn add(&self, slot: &Slot) {
        let mut functions = self.functions.write().unwrap_or_else(PoisonError::into_inner);
        functions.retain(|function| function.strong_count() > 0);
        functions.extend(slot.functions.iter().map(|place| Arc::downgrade(&place.function)));
    }
}

impl UnmapGate for CloseBars {
    fn asleep_with_translations(&self) -> Option<Bdf> {
        // A function may be busy for as long as a reset takes: others do not wait for the list meanwhile.
        let functions: Vec<_> = {
            let functions = self.functions.read().unwrap_or_else(PoisonError::into_inner);
            functions.iter().filter_map(Weak::upgrade).collect()
        };
        let found = functions.iter().find(|function| function.is_asleep_with_translations());
        found.map(|function| function.handle().bdf())
    }
}

impl FaultCure for CloseBars {
    fn close_direct_mappings(&self, again: bool) -> bool {
        if self.persistent.mend() {
            return true;
        }
        let functions = self.functions.read().unwrap_or_else(PoisonError::into_inner);
        // All of them, not only the first that had something to close.
        let functions = functions.iter().filter_map(Weak::upgrade);
        functions.filter(|function| function.close_direct(again)).count() > 0
            || (again && self.persistent.give_up())
    }
}

/// The IOMMU context, and KVM's device that tells the kernel of it. A machine has one KVM device in its life, so that is kept.
#[derive(Debug)]
pub struct Iommu {
    /// Groups or device files.
    pub kind: ContextKind,
    /// KVM's VFIO device, once there was a first device.
    pub kvm: Option<Arc<VfioDeviceFd>>,
    /// The context, as long as there are devices.
    pub context: Option<Arc<IommuContext>>,
    /// Must not give memory back while there is a context.
    pub discarder: Arc<Discarder>,
    /// Keeps it from that.
    pub pin: Option<Arc<Pin>>,
}

/// Names of devices of which there is one, or none, from the start to the end begin so.
const RESERVED: &str = "__";

/// How long Linux ignores a slot after it has turned its power off (`pciehp_ctrl.c`: one second).
const SLOT_SETTLES: Duration = Duration::from_millis(1200);

/// The longest that an access of the guest takes: a reset of a device that does not come back.
const LONGEST_ACCESS: Duration = Duration::from_secs(70);

/// What the devices are connected to.
pub struct Board {
    /// Bus 0 of each PCI segment.
    pub buses: Vec<Arc<RootBus>>,
    /// The power notification device.
    pub notify: Arc<NotifyDevice>,
    /// Where the guest hears of devices that come and go.
    pub event_device: Arc<EventDevice>,
    /// For faults of vCPUs.
    pub close_bars: Arc<CloseBars>,
    /// What functions need.
    pub around: Surroundings,
}

impl Board {
    /// Puts a function on bus 0 of its segment.
    fn plug(&self, at: Bdf, function: Arc<dyn PciFunction>) -> Result<(), MachineError> {
        match self.buses.get(usize::from(at.segment)) {
            Some(bus) => bus.plug(at.devfn, function).map_err(MachineError::Bus),
            None => Err(AssignedError::NoFreePlace { segment: at.segment }.into()),
        }
    }

    fn unplug(&self, at: Bdf) {
        if let Some(bus) = self.buses.get(usize::from(at.segment)) {
            drop(bus.unplug(at.devfn));
        }
    }
}

/// The assigned devices of a machine. Fields are dropped in their order.
pub struct AssignedDevices {
    places: Vec<Place>,
    board: Board,
    iommu: Iommu,
    closing: Vec<JoinHandle<()>>,
}

/// A device that has been put somewhere or is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Moved {
    /// Its name.
    pub id: String,
    /// Its address in the guest.
    pub bdf: Bdf,
    /// Its device number on bus 0, or that of its root port.
    pub place: u8,
    /// Whether it is below a root port.
    pub below_port: bool,
}

impl AssignedDevices {
    /// Connects the devices that the machine is started with.
    ///
    /// # Errors
    /// Two want one place.
    pub fn new(places: Vec<Place>, board: Board, iommu: Iommu) -> Result<Self, MachineError> {
        for place in &places {
            if let Some(slot) = &place.slot {
                board.close_bars.add(slot);
                board.notify.add(&slot.domain);
                plug(&board, place, slot)?;
            }
            if let Some(function) = &place.emulated {
                plug_emulated(&board, place, function)?;
            }
        }
        let this = Self { places, board, iommu, closing: Vec::new() };
        let first = this.slots().flat_map(|slot| &slot.functions).next().map(|first| first.host);
        if let (Some(context), Some(first)) = (&this.iommu.context, first) {
            this.attach_pluggable(context, first)?;
        }
        Ok(this)
    }

    /// The places on bus 0 with the slots in them.
    pub fn places(&self) -> &[Place] {
        &self.places
    }

    /// All slots.
    pub fn slots(&self) -> impl Iterator<Item = &Slot> {
        self.places.iter().filter_map(|place| place.slot.as_ref())
    }

    /// Adds a device. `kvm` makes KVM's VFIO device, if it is the first.
    ///
    /// # Errors
    /// There is no place, or the device cannot be opened or presented; then it is as it was before.
    pub fn add(
        &mut self,
        assignment: &Assignment,
        memory: &GuestMemoryMmap,
        kvm: impl FnOnce() -> Result<VfioDeviceFd, MachineError>,
    ) -> Result<Moved, MachineError> {
        // It may be one of those that are being closed.
        self.wait_for_closing();
        let DeviceConfig { pci_segment, pci_device_id, root_port, .. } = assignment.config;
        let number = self.free_place(pci_segment, pci_device_id, root_port)?;
        let handle = self.open(assignment, memory, kvm)?;
        let place = &mut self.places[number];
        let result = build_slot(
            &place.seat,
            vec![(assignment, handle)],
            &self.board.around,
            &mut place.resources(),
            true,
        );
        let slot = match result {
            Ok(slot) => slot,
            Err(e) => {
                self.forget_context_of_nobody();
                return Err(e.into());
            }
        };
        // Before any vCPU can map a BAR.
        self.board.close_bars.add(&slot);
        if let Seat::Port(port) = &place.seat {
            port.attach(&slot)?;
        }
        plug(&self.board, place, &slot)?;
        self.board.notify.add(&slot.domain);
        let id = slot.functions.first().map(|function| function.id.clone()).unwrap_or_default();
        place.slot = Some(slot);
        place.leaving = false;
        let moved = moved(id, place);
        info!("device {} ({}) has been added at {} of the guest", assignment.host.bdf, moved.id, moved.bdf);
        match &place.seat {
            Seat::Port(port) if place.has_slot => port.port.insert(),
            _ => self.board.event_device.function_added(place.address()),
        }
        Ok(moved)
    }

    /// Bus 0 of each PCI segment.
    pub fn buses(&self) -> &[Arc<RootBus>] {
        &self.board.buses
    }

    /// Notes that the guest has been asked to let go of the device with this name: where the machine began, before it was saved.
    pub fn set_leaving(&mut self, id: &str) {
        if let Some(place) = self.places.iter_mut().find(|place| place.ids().any(|name| name == id)) {
            place.leaving = true;
        }
    }

    /// The machine's own functions.
    pub fn emulated(&self) -> impl Iterator<Item = &Arc<dyn EmulatedFunction>> {
        self.places.iter().filter_map(|place| place.emulated.as_ref())
    }

    /// Adds one of the machine's own devices, on bus 0.
    ///
    /// # Errors
    /// There is no place, or it cannot be put there.
    pub fn add_emulated(&mut self, unit: &Unit) -> Result<Moved, MachineError> {
        let number = self.free_place(unit.segment, unit.place, Some(false))?;
        let place = &mut self.places[number];
        let function = unit.function(place.guest_address().devfn, &self.board.around)?;
        plug_emulated(&self.board, place, &function)?;
        place.emulated = Some(function);
        place.leaving = false;
        let moved = moved(unit.id.clone(), place);
        info!("device {} has been added at {} of the guest", moved.id, moved.bdf);
        self.board.event_device.function_added(place.address());
        Ok(moved)
    }

    /// Which place of its segment a device goes to: the one it asks for, below a reserved port if there is one, else on bus 0. `below_port`
    /// leaves only one of the two.
    fn free_place(
        &self,
        segment: u16,
        device: Option<u8>,
        below_port: Option<bool>,
    ) -> Result<usize, AssignedError> {
        let is_port = |place: &Place| place.seat.port().is_some();
        let fits = |place: &Place| {
            place.segment == segment
                && place.is_free()
                && below_port.is_none_or(|wanted| wanted == is_port(place))
        };
        let free = || self.places.iter().enumerate().filter(|(_, place)| fits(place));
        let found = match device {
            Some(device) => {
                let found = free().find(|(_, place)| place.seat.device() == device);
                found.ok_or(AssignedError::PlaceTaken { segment, device })?
            }
            None => {
                let port = free().find(|(_, place)| is_port(place) && place.resources().count() == 2);
                let bus_0 = || free().find(|(_, place)| !is_port(place));
                port.or_else(bus_0).ok_or(AssignedError::NoFreePlace { segment })?
            }
        };
        Ok(found.0)
    }

    fn open(
        &mut self,
        assignment: &Assignment,
        memory: &GuestMemoryMmap,
        kvm: impl FnOnce() -> Result<VfioDeviceFd, MachineError>,
    ) -> Result<Arc<Handle>, MachineError> {
        let host = &assignment.host;
        let id = assignment.config.id.as_deref();
        if let Some(context) = &self.iommu.context {
            return Ok(context.open(host.bdf, &host.dir, id)?);
        }
        if self.iommu.kvm.is_none() {
            self.iommu.kvm = Some(Arc::new(kvm()?));
        }
        let context = Arc::new(IommuContext::new(self.iommu.kind, self.iommu.kvm.clone())?);
        let pin = Arc::new(Discarder::pinned(&self.iommu.discarder));
        let handle = context.open(host.bdf, &host.dir, id)?;
        // All of the guest's memory, before the guest can program the device to reach it.
        dma::map_guest_memory(&context, memory, host.bdf)?;
        self.attach_pluggable(&context, host.bdf)?;
        self.iommu.context = Some(context);
        self.iommu.pin = Some(pin);
        Ok(handle)
    }

    /// Lets devices reach what the guest plugs.
    fn attach_pluggable(&self, context: &Arc<IommuContext>, first: Bdf) -> Result<(), DmaError> {
        let Surroundings { pluggable, .. } = &self.board.around;
        let gate = Arc::clone(&self.board.close_bars) as _;
        dma::attach_pluggable(context, pluggable, &gate, first).inspect_err(|_| self.detach_pluggable())
    }

    fn detach_pluggable(&self) {
        self.board.around.pluggable.iter().for_each(|mem| mem.blocks().detach());
    }

    /// Lets all devices reach more memory; `total` is how much there is then, in bytes.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn map_memory(&self, region: &GuestRegionMmap, total: u64) -> Result<(), DmaError> {
        let first = self.slots().flat_map(|slot| &slot.functions).next();
        match (&self.iommu.context, first) {
            (Some(context), Some(first)) => dma::map_region(context, region, total, first.host),
            _ => Ok(()),
        }
    }

    /// Undoes [`Self::map_memory`].
    pub fn unmap_memory(&self, region: &GuestRegionMmap) {
        if let Some(context) = &self.iommu.context {
            dma::unmap_region(context, region);
        }
    }

    /// Asks the guest to let go of a device; asks again if it was asked before. `None` if there is no such device.
    ///
    /// # Errors
    /// It shares its place with others, or the machine was not made for it.
    pub fn request_removal(&mut self, id: &str) -> Option<Result<(), AssignedError>> {
        let place = self.places.iter_mut().find(|place| place.ids().any(|name| name == id))?;
        if !place.is_removable() {
            return Some(Err(AssignedError::NotRemovable { id: id.to_owned() }));
        }
        // As in Cloud Hypervisor: what cannot be added cannot be removed either.
        if place.emulated.is_some() && id.starts_with(RESERVED) {
            return Some(Err(AssignedError::MachinesOwn { id: id.to_owned() }));
        }
        place.leaving = true;
        info!("device {id}: the guest is asked to let go of it");
        match &place.seat {
            Seat::Port(port) if place.has_slot => port.port.press_button(),
            _ => self.board.event_device.function_leaving(place.address()),
        }
        Some(Ok(()))
    }

    /// The guest has let go of the function in this place. If it was asked to, the device goes, and `then` is called once it is closed.
    /// `before` is called when nothing of the guest's can reach it any more.
    pub fn released(
        &mut self,
        at: PlaceAddress,
        before: impl FnOnce(&Moved),
        then: impl FnOnce(Moved) + Send + 'static,
    ) {
        let Some(place) = self.places.iter_mut().find(|place| place.address() == at && place.leaving) else {
            debug!("the guest lets go of {at:?}, and was not asked to");
            return;
        };
        place.leaving = false;
        if let Some(function) = place.emulated.take() {
            let moved = moved(function.name().to_owned(), place);
            self.board.unplug(moved.bdf);
            place.resources().for_each(|index| self.board.notify.set_always_on(index, false));
            before(&moved);
            self.close(move || {
                function.shutdown();
                drop(function);
                info!("device {} has been removed", moved.id);
                then(moved);
            });
            return;
        }
        let Some(slot) = place.slot.take() else { return };
        let id = slot.functions.first().map(|function| function.id.clone()).unwrap_or_default();
        let moved = moved(id, place);
        let mut settles = Duration::ZERO;
        match &place.seat {
            Seat::Port(port) => {
                port.detach();
                if place.has_slot {
                    port.port.empty();
                    settles = SLOT_SETTLES;
                }
            }
            Seat::Bus0(_) => self.board.unplug(moved.bdf),
        }
        self.board.notify.remove(&slot.domain);
        before(&moved);
        let context = (self.iommu.context.clone(), self.iommu.pin.clone());
        self.forget_context_of_nobody();
        self.close(move || {
            let id = moved.id.clone();
            slot.domain.shutdown();
            wait_until_unused(&slot);
            drop(slot);
            drop(context);
            thread::sleep(settles);
            info!("device {id} has been removed");
            then(moved);
        });
    }

    /// Closes a device, without keeping others waiting.
    fn close(&mut self, close: impl FnOnce() + Send + 'static) {
        match thread::Builder::new().name("unplug".to_owned()).spawn(close) {
            Ok(thread) => self.closing.push(thread),
            Err(e) => warn!("no thread to close a device: {e}; it has been closed on the main thread"),
        }
    }

    /// Says why the guest does not let go.
    pub fn refused(&mut self, at: PlaceAddress, status: u8) {
        if let Some(place) = self.places.iter().find(|place| place.address() == at && place.leaving) {
            let ids: Vec<_> = place.ids().collect();
            warn!(
                "device {}: the guest does not let go of it (status {status:#x}): end what uses it in the guest, and remove it again",
                ids.join(", ")
            );
        }
    }

    /// Waits for devices that are being closed: what is behind one (a tap, a locked image) may be wanted again at once.
    pub fn wait_for_closing(&mut self) {
        for thread in self.closing.drain(..) {
            if thread.join().is_err() {
                warn!("a device could not be closed in order");
            }
        }
    }

    /// Without devices the kernel gives up the mappings of guest memory, so they are made anew with the next device.
    fn forget_context_of_nobody(&mut self) {
        if self.places.iter().all(|place| place.slot.is_none()) {
            self.detach_pluggable();
            self.iommu.context = None;
            self.iommu.pin = None;
        }
    }
}

impl Drop for AssignedDevices {
    fn drop(&mut self) {
        // Before the memory that they can reach.
        self.wait_for_closing();
        self.detach_pluggable();
    }
}

/// Waits for vCPUs that found a function before it was unplugged and are still in the middle of an access: the last one to let go closes the
/// device, and that is not for a vCPU to do.
fn wait_until_unused(slot: &Slot) {
    // The slot and, for a function, its power domain.
    let in_use = || {
        Arc::strong_count(&slot.domain) > 1
            || slot.functions.iter().any(|place| Arc::strong_count(&place.function) > 2)
    };
    let deadline = Instant::now() + LONGEST_ACCESS;
    while in_use() && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(1));
    }
}

fn moved(id: String, place: &Place) -> Moved {
    Moved {
        id,
        bdf: place.guest_address(),
        place: place.seat.device(),
        below_port: place.seat.port().is_some(),
    }
}

/// Puts one of the machine's own functions on bus 0.
fn plug_emulated(
    board: &Board,
    place: &Place,
    function: &Arc<dyn EmulatedFunction>,
) -> Result<(), MachineError> {
    place.resources().for_each(|index| board.notify.set_always_on(index, true));
    let function = Arc::clone(function) as Arc<dyn PciFunction>;
    board.plug(place.guest_address(), function)
}

/// Puts what is on bus 0 itself there; a port is there already.
fn plug(board: &Board, place: &Place, slot: &Slot) -> Result<(), MachineError> {
    if let (Seat::Bus0(_), Some(first)) = (&place.seat, slot.functions.first()) {
        board.plug(place.guest_address(), Arc::clone(&first.function) as Arc<dyn PciFunction>)?;
    }
    Ok(())
}
