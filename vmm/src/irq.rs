//! Interrupts into the guest: GSI routing, message vectors and INTx lines on KVM's irqfds (Linux
//! `Documentation/virt/kvm/api.rst`, sections 4.52 and 4.75).

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arch::layout::{IOAPIC_PINS, MSI_GSI_BASE};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;
use log::warn;
use pci::interrupt::{IntxLine, MsiAllocator, MsiMessage, MsiVector};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// KVM takes no more routes than this (`KVM_MAX_IRQ_ROUTES`).
const MAX_ROUTES: u32 = 4096;

/// A GSI: KVM's number for an interrupt source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Gsi(pub u32);

/// The routing table of one VM.
///
/// Lock order: a vector's own lock, then `messages`.
pub struct IrqRouter {
    vm: Arc<VmFd>,
    messages: Mutex<Messages>,
}

#[derive(Default)]
struct Messages {
    /// GSIs given out; `None` until the guest has programmed a message.
    given: BTreeMap<Gsi, Option<MsiMessage>>,
}

impl fmt::Debug for IrqRouter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IrqRouter").field("vectors", &self.messages().given.len()).finish()
    }
}

impl IrqRouter {
    /// For `vm`, which has its in-kernel interrupt controllers and KVM's default routes for their pins.
    pub fn new(vm: Arc<VmFd>) -> Arc<Self> {
        Arc::new(Self { vm, messages: Mutex::default() })
    }

    fn messages(&self) -> MutexGuard<'_, Messages> {
        self.messages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Connects `event` to an interrupt pin as an edge.
    pub fn edge_line(&self, gsi: Gsi) -> io::Result<EventFd> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        self.vm.register_irqfd(&event, gsi.0).map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
        Ok(event)
    }

    /// An INTx line on `gsi`. Several functions may share one.
    pub fn intx_line(self: &Arc<Self>, gsi: Gsi) -> io::Result<Arc<dyn IntxLine>> {
        let trigger = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let resample = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        self.vm
            .register_irqfd_with_resample(&trigger, &resample, gsi.0)
            .map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
        Ok(Arc::new(KvmIntxLine { router: Arc::clone(self), gsi, trigger, resample }))
    }

    fn allocate_gsi(&self) -> io::Result<Gsi> {
        let mut messages = self.messages();
        let mut free = Gsi(MSI_GSI_BASE);
        for gsi in messages.given.keys() {
            if *gsi != free {
                break;
            }
            free = Gsi(free.0 + 1);
        }
        // The pins of both PICs and the IOAPIC have routes too.
        if free.0 >= MAX_ROUTES - 16 {
            return Err(io::Error::other("all interrupt routes of KVM are in use"));
        }
        messages.given.insert(free, None);
        Ok(free)
    }

    fn set_message(&self, gsi: Gsi, message: Option<MsiMessage>) -> io::Result<()> {
        let mut messages = self.messages();
        let old = messages.given.insert(gsi, message);
        let result = self.commit(&messages);
        if result.is_err() {
            messages.given.insert(gsi, old.flatten());
        }
        result
    }

    fn release_gsi(&self, gsi: Gsi) {
        let mut messages = self.messages();
        // A route nobody's irqfd uses does no harm; the next commit leaves it out.
        messages.given.remove(&gsi);
    }

    fn commit(&self, messages: &Messages) -> io::Result<()> {
        let mut entries: Vec<_> = (0..IOAPIC_PINS).flat_map(pin_routes).collect();
        entries.extend(messages.given.iter().filter_map(|(gsi, message)| Some(msi_route(*gsi, (*message)?))));
        let table = KvmIrqRouting::from_entries(&entries).map_err(|e| io::Error::other(format!("{e:?}")))?;
        self.vm.set_gsi_routing(&table).map_err(|e| io::Error::from_raw_os_error(e.errno()))
    }
}

/// KVM's own default for a pin: the IOAPIC, and below 16 the PICs as well.
fn pin_routes(pin: u32) -> impl Iterator<Item = kvm_irq_routing_entry> {
    let route = |irqchip: u32, chip_pin: u32| kvm_irq_routing_entry {
        gsi: pin,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            irqchip: kvm_irq_routing_irqchip { irqchip, pin: chip_pin },
        },
        ..Default::default()
    };
    let pic = match pin {
        0..8 => Some(route(KVM_IRQCHIP_PIC_MASTER, pin)),
        8..16 => Some(route(KVM_IRQCHIP_PIC_SLAVE, pin - 8)),
        _ => None,
    };
    pic.into_iter().chain([route(KVM_IRQCHIP_IOAPIC, pin)])
}

fn msi_route(gsi: Gsi, message: MsiMessage) -> kvm_irq_routing_entry {
    let [a, b, c, d, high @ ..] = message.address.to_le_bytes();
    let msi = kvm_irq_routing_msi {
        address_lo: u32::from_le_bytes([a, b, c, d]),
        address_hi: u32::from_le_bytes(high),
        data: message.data,
        ..Default::default()
    };
    kvm_irq_routing_entry {
        gsi: gsi.0,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 { msi },
        ..Default::default()
    }
}

/// Gives out message vectors of one router.
#[derive(Debug)]
pub struct MsiVectors(pub Arc<IrqRouter>);

impl MsiAllocator for MsiVectors {
    fn allocate(&self) -> io::Result<Arc<dyn MsiVector>> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let gsi = self.0.allocate_gsi()?;
        let connection = Mutex::new(Connection { message: None, connected: false });
        Ok(Arc::new(KvmMsiVector { router: Arc::clone(&self.0), gsi, event, connection }))
    }
}

struct KvmMsiVector {
    router: Arc<IrqRouter>,
    gsi: Gsi,
    event: EventFd,
    connection: Mutex<Connection>,
}

struct Connection {
    message: Option<MsiMessage>,
    connected: bool,
}

impl fmt::Debug for KvmMsiVector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvmMsiVector").field("gsi", &self.gsi).finish_non_exhaustive()
    }
}

impl KvmMsiVector {
    fn connection(&self) -> MutexGuard<'_, Connection> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn disconnect(&self, connection: &mut Connection) -> io::Result<()> {
        if connection.connected {
            self.router
                .vm
                .unregister_irqfd(&self.event, self.gsi.0)
                .map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
            connection.connected = false;
        }
        Ok(())
    }
}

impl MsiVector for KvmMsiVector {
    fn eventfd(&self) -> &EventFd {
        &self.event
    }

    fn unmask(&self, message: MsiMessage) -> io::Result<()> {
        let mut connection = self.connection();
        if connection.message != Some(message) {
            self.router.set_message(self.gsi, Some(message))?;
            connection.message = Some(message);
        }
        if !connection.connected {
            self.router
                .vm
                .register_irqfd(&self.event, self.gsi.0)
                .map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
            connection.connected = true;
        }
        Ok(())
    }

    fn mask(&self) -> io::Result<()> {
        self.disconnect(&mut self.connection())
    }
}

impl Drop for KvmMsiVector {
    fn drop(&mut self) {
        let mut connection = self.connection();
        if let Err(e) = self.disconnect(&mut connection) {
            warn!("interrupt vector {:?} cannot be disconnected: {e}", self.gsi);
        }
        self.router.release_gsi(self.gsi);
    }
}

struct KvmIntxLine {
    router: Arc<IrqRouter>,
    gsi: Gsi,
    trigger: EventFd,
    resample: EventFd,
}

impl fmt::Debug for KvmIntxLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvmIntxLine").field("gsi", &self.gsi).finish_non_exhaustive()
    }
}

impl IntxLine for KvmIntxLine {
    fn trigger(&self) -> &EventFd {
        &self.trigger
    }

    fn resample(&self) -> &EventFd {
        &self.resample
    }
}

impl Drop for KvmIntxLine {
    fn drop(&mut self) {
        if let Err(e) = self.router.vm.unregister_irqfd(&self.trigger, self.gsi.0) {
            warn!("interrupt line {:?} cannot be disconnected: {e}", self.gsi);
        }
    }
}
