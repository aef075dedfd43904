//! The PCI Express capability of a root port, with the intake of power management events (PCI Express Base 6.0, sections 7.5.3
//! and 6.1.6).

use std::collections::VecDeque;

use crate::pme::RequesterId;
use crate::registers::Registers;

use super::slot::HotPlugSlot;

/// Length of the capability in bytes, version 2.
pub const LEN: u16 = 0x3c;

const CAPABILITIES: usize = 0x02;
const DEVICE_CAPABILITIES: usize = 0x04;
const DEVICE_CONTROL: usize = 0x08;
const DEVICE_STATUS: usize = 0x0a;
const LINK_CAPABILITIES: usize = 0x0c;
const LINK_CONTROL: usize = 0x10;
const LINK_STATUS: usize = 0x12;
const SLOT_STATUS: usize = 0x1a;
const ROOT_CONTROL: usize = 0x1c;
const ROOT_STATUS: usize = 0x20;
const LINK_CAPABILITIES_2: usize = 0x2c;
const LINK_CONTROL_2: usize = 0x30;

/// Version 2, device/port type 4 (root port), no slot, interrupt message number 0.
const VERSION_AND_TYPE: u16 = 2 | 4 << 4;
/// Role-based error reporting, which every function must have; largest payload 128 bytes (field zero).
const ROLE_BASED_ERROR_REPORTING: u32 = 1 << 15;
/// Error reporting enables, relaxed ordering, extended tags, no-snoop, largest read request.
const DEVICE_CONTROL_STORED: u16 = 0x000f | 1 << 4 | 1 << 8 | 1 << 11 | 7 << 12;
/// Largest read request 512 bytes, its value after reset.
const DEVICE_CONTROL_RESET: u16 = 2 << 12;
const DEVICE_STATUS_ERRORS: u16 = 0xf;
const LINK_WIDTH_X1: u16 = 1 << 4;
const LINK_ACTIVE_REPORTING: u32 = 1 << 20;
/// Must be set by a port that is new enough not to support L0s.
const ASPM_OPTIONALITY: u32 = 1 << 22;
/// Read completion boundary, link disable, common clock, extended synch. Link disable is stored without effect.
const LINK_CONTROL_STORED: u16 = 1 << 3 | 1 << 4 | 1 << 6 | 1 << 7;
const LINK_COMMON_CLOCK: u16 = 1 << 12;
const LINK_ACTIVE: u16 = 1 << 13;
/// Presence detect state: hardwired to one where there is no slot (section 7.5.3.11).
const PRESENCE: u16 = 1 << 6;
/// Error reporting enables and PME interrupt enable.
const ROOT_CONTROL_STORED: u16 = 0xf;
const PME_INTERRUPT_ENABLE: u16 = 1 << 3;
const PME_STATUS: u32 = 1 << 16;
const PME_PENDING: u32 = 1 << 17;
const REQUESTER_MASK: u32 = 0xffff;

/// How many further messages are kept: more than there are functions below a port.
const QUEUE_LIMIT: usize = 32;

/// The link's speed, of which nothing depends but what the guest reads. Both spare the guest the long wait that faster links need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkSpeed {
    /// 2.5 GT/s.
    Gen1,
    /// 5 GT/s.
    Gen2,
}

impl LinkSpeed {
    const fn bits(self) -> u16 {
        match self {
            Self::Gen1 => 1,
            Self::Gen2 => 2,
        }
    }

    /// The vector of supported speeds in Link Capabilities 2.
    const fn supported(self) -> u32 {
        match self {
            Self::Gen1 => 1 << 1,
            Self::Gen2 => 1 << 1 | 1 << 2,
        }
    }
}

/// What a write of the guest asks of the port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct PortEffect {
    /// Raise the port's interrupt.
    pub interrupt: bool,
    /// The power of the slot was turned on or off.
    pub slot_power: Option<bool>,
}

/// A root port's PCI Express capability: link x1 with its state reported, ARI off. Without a slot the link is up; with one it is up
/// while there is a device that has power.
#[derive(Clone, Debug)]
pub struct PcieRootPortCapability {
    registers: Registers<{ LEN as usize }>,
    slot: Option<HotPlugSlot>,
    /// Messages that came while PME Status was set.
    queue: VecDeque<RequesterId>,
    /// The guest turned the interrupt off to look at a message, and has not turned it on again.
    in_service: bool,
}

impl PcieRootPortCapability {
    /// As after reset. `port_number` is what Link Capabilities says; it should differ between the ports.
    pub fn new(port_number: u8, speed: LinkSpeed) -> Self {
        let mut registers = Registers::new();
        registers.set_u16(CAPABILITIES, VERSION_AND_TYPE);
        registers.set_u32(DEVICE_CAPABILITIES, ROLE_BASED_ERROR_REPORTING);
        registers.set_u16(DEVICE_CONTROL, DEVICE_CONTROL_RESET);
        registers.allow_u16(DEVICE_CONTROL, DEVICE_CONTROL_STORED);
        registers.clear_on_one_u16(DEVICE_STATUS, DEVICE_STATUS_ERRORS);
        let link = speed.bits() | LINK_WIDTH_X1;
        let number = u32::from(port_number) << 24;
        registers
            .set_u32(LINK_CAPABILITIES, u32::from(link) | LINK_ACTIVE_REPORTING | ASPM_OPTIONALITY | number);
        registers.allow_u16(LINK_CONTROL, LINK_CONTROL_STORED);
        registers.set_u16(LINK_STATUS, link | LINK_COMMON_CLOCK | LINK_ACTIVE);
        registers.set_u16(SLOT_STATUS, PRESENCE);
        registers.allow_u16(ROOT_CONTROL, ROOT_CONTROL_STORED);
        registers.clear_on_one_u32(ROOT_STATUS, PME_STATUS);
        registers.set_u32(LINK_CAPABILITIES_2, speed.supported());
        registers.set_u16(LINK_CONTROL_2, speed.bits());
        registers.allow_u16(LINK_CONTROL_2, 0xf);
        Self { registers, slot: None, queue: VecDeque::new(), in_service: false }
    }

    /// The same with an empty slot that devices can be put into while the guest runs.
    pub fn with_slot(port_number: u8, speed: LinkSpeed) -> Self {
        let mut port = Self::new(port_number, speed);
        port.slot = Some(HotPlugSlot::install(&mut port.registers, port_number));
        port
    }

    /// A device is in the slot now, or is not any more. Returns whether to raise the port's interrupt; nothing happens to a port without a slot.
    #[must_use]
    pub fn set_present(&mut self, present: bool) -> bool {
        self.slot_event(|slot, registers| slot.set_present(registers, present))
    }

    /// The slot's attention button is pressed: the guest is to let go of the device. Returns whether to raise the port's interrupt.
    #[must_use]
    pub fn press_button(&mut self) -> bool {
        self.slot_event(|slot, registers| slot.press_button(registers))
    }

    fn slot_event(&mut self, event: impl FnOnce(HotPlugSlot, &mut Registers<{ LEN as usize }>)) -> bool {
        let Some(slot) = self.slot else { return false };
        let before = slot.wants_interrupt(&self.registers);
        event(slot, &mut self.registers);
        !before && slot.wants_interrupt(&self.registers)
    }

    /// The guest's read at `offset` in the capability.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        let header = 2usize.saturating_sub(usize::from(offset));
        if let Some(own) = data.get_mut(header..) {
            self.registers.read(usize::from(offset) + header, own);
        }
    }

    /// The guest's write at `offset` in the capability; any size.
    pub fn write(&mut self, offset: u16, data: &[u8]) -> PortEffect {
        let powered = self.slot.map(|slot| slot.is_powered(&self.registers));
        let wanted = self.slot.is_some_and(|slot| slot.wants_interrupt(&self.registers));
        let pme = self.write_registers(offset, data);
        let Some(slot) = self.slot else { return PortEffect { interrupt: pme, slot_power: None } };
        slot.follow_link(&mut self.registers);
        let power = slot.is_powered(&self.registers);
        PortEffect {
            interrupt: pme || (!wanted && slot.wants_interrupt(&self.registers)),
            slot_power: (powered != Some(power)).then_some(power),
        }
    }

    /// Takes the write; returns whether a PME is to interrupt.
    fn write_registers(&mut self, offset: u16, data: &[u8]) -> bool {
        let (enabled, latched) = (self.pme_interrupt_enabled(), self.latched());
        self.registers.write(usize::from(offset), data);
        let now_enabled = self.pme_interrupt_enabled();
        if now_enabled {
            self.in_service = false;
        } else if enabled && latched {
            self.in_service = true;
        }
        let acknowledged = latched && !self.latched();
        if acknowledged {
            self.present_next();
        }
        let fresh = acknowledged || !enabled;
        now_enabled && self.latched() && fresh
    }

    /// A PME message arrives. Returns whether to raise the port's interrupt now.
    ///
    /// One message is shown at a time; further ones wait, each requester once, until the guest clears PME Status. While nobody
    /// listens nothing waits: an operating system clears what it finds when it begins to listen, and asks the devices itself.
    /// `has_interrupt`: the port has a message to interrupt with; without one nobody listens.
    #[must_use]
    pub fn receive_pme(&mut self, from: RequesterId, has_interrupt: bool) -> bool {
        if !self.latched() {
            self.present(from);
            return has_interrupt && self.pme_interrupt_enabled();
        }
        let heard = has_interrupt && self.is_listening();
        if heard && !self.queue.contains(&from) && self.queue.len() < QUEUE_LIMIT {
            self.queue.push_back(from);
            self.registers.set_u32(ROOT_STATUS, self.registers.u32(ROOT_STATUS) | PME_PENDING);
        }
        false
    }

    /// Whether the guest takes PME interrupts from this port: they are enabled, or only off while it serves one.
    pub fn is_listening(&self) -> bool {
        self.pme_interrupt_enabled() || self.in_service
    }

    fn pme_interrupt_enabled(&self) -> bool {
        self.registers.u16(ROOT_CONTROL) & PME_INTERRUPT_ENABLE != 0
    }

    fn latched(&self) -> bool {
        self.registers.u32(ROOT_STATUS) & PME_STATUS != 0
    }

    fn present(&mut self, from: RequesterId) {
        let pending = if self.queue.is_empty() { 0 } else { PME_PENDING };
        self.registers.set_u32(ROOT_STATUS, u32::from(from.bits()) | PME_STATUS | pending);
    }

    fn present_next(&mut self) {
        match self.queue.pop_front() {
            Some(from) => self.present(from),
            // The requester stays readable; without PME Status it means nothing.
            None => {
                self.registers.set_u32(ROOT_STATUS, self.registers.u32(ROOT_STATUS) & REQUESTER_MASK);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bdf::DevFn;

    const ROOT_CONTROL_AT: u16 = 0x1c;
    const ROOT_STATUS_AT: u16 = 0x20;
    const CLEAR: [u8; 4] = [0, 0, 1, 0];

    fn port() -> PcieRootPortCapability {
        PcieRootPortCapability::new(3, LinkSpeed::Gen2)
    }

    fn listening() -> PcieRootPortCapability {
        let mut port = port();
        assert!(!port.write(ROOT_CONTROL_AT, &[8, 0]).interrupt);
        port
    }

    fn from(devfn: u8) -> RequesterId {
        RequesterId { bus: 1, devfn: DevFn::from_bits(devfn) }
    }

    fn dword(port: &PcieRootPortCapability, offset: u16) -> u32 {
        let mut data = [0; 4];
        port.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn it_reads_as_a_version_2_root_port_without_slot_and_with_its_link_up() {
        let mut all = [0xaa; 64];
        port().read(0, &mut all);
        assert_eq!(all[..4], [0xaa, 0xaa, 0x42, 0]);
        assert_eq!(all[0x3c..], [0xaa; 4]);
        let port = port();
        assert_eq!(dword(&port, 4), 0x8000);
        assert_eq!(dword(&port, 0x0c), 0x0350_0012);
        assert_eq!(dword(&port, 0x10) >> 16, 0x3012);
        assert_eq!(dword(&port, 0x18), 0x0040_0000);
        assert_eq!(dword(&port, 0x2c), 6);
        assert_eq!(PcieRootPortCapability::new(0, LinkSpeed::Gen1).registers.u32(LINK_CAPABILITIES) & 0xf, 1);
    }

    #[test]
    fn a_pme_is_latched_with_its_requester_and_interrupts_if_enabled() {
        let mut port = port();
        assert!(!port.receive_pme(from(0), true));
        assert_eq!(dword(&port, ROOT_STATUS_AT), 0x1_0100);
        assert!(port.write(ROOT_CONTROL_AT, &[8]).interrupt, "enabling with a message latched interrupts");
        assert!(!port.write(ROOT_CONTROL_AT, &[8]).interrupt, "but once");
        assert!(!port.write(ROOT_STATUS_AT, &CLEAR).interrupt);
        assert!(port.receive_pme(from(1), true));
        assert_eq!(dword(&port, ROOT_STATUS_AT), 0x1_0101);
    }

    #[test]
    fn further_messages_wait_and_are_presented_one_by_one() {
        let mut port = listening();
        assert!(port.receive_pme(from(0), true));
        for devfn in [1, 2, 1, 0] {
            assert!(!port.receive_pme(from(devfn), true));
        }
        let mut seen = Vec::new();
        loop {
            let status = dword(&port, ROOT_STATUS_AT);
            if status & PME_STATUS == 0 {
                break;
            }
            seen.push(status);
            let more = status & PME_PENDING != 0;
            assert_eq!(port.write(ROOT_STATUS_AT, &CLEAR).interrupt, more);
        }
        assert_eq!(seen, [0x3_0100, 0x3_0101, 0x3_0102, 0x1_0100]);
    }

    #[test]
    fn only_writing_one_to_the_status_bit_clears_it() {
        let mut port = listening();
        assert!(port.receive_pme(from(0), true));
        for (offset, data) in [(0x20, &[0xff, 0xff][..]), (0x22, &[2]), (0x23, &[0xff]), (0x20, &[0; 4])] {
            assert!(!port.write(offset, data).interrupt);
            assert_eq!(dword(&port, ROOT_STATUS_AT), 0x1_0100);
        }
        assert!(!port.write(0x22, &[1]).interrupt);
        assert_eq!(dword(&port, ROOT_STATUS_AT), 0x0100);
    }

    #[test]
    fn the_port_counts_as_listening_while_the_guest_serves_a_message() {
        let mut port = listening();
        assert!(port.is_listening());
        assert!(port.receive_pme(from(0), true));
        assert!(!port.write(ROOT_CONTROL_AT, &[0]).interrupt);
        assert!(port.is_listening());
        assert!(!port.receive_pme(from(1), true));
        assert!(!port.write(ROOT_STATUS_AT, &CLEAR).interrupt, "no interrupt while it is off");
        assert!(port.write(ROOT_CONTROL_AT, &[8]).interrupt, "the second message was waiting");
        assert!(!port.write(ROOT_STATUS_AT, &CLEAR).interrupt);
        assert!(!port.write(ROOT_CONTROL_AT, &[0]).interrupt);
        assert!(!port.is_listening(), "turned off with nothing to serve");
    }

    #[test]
    fn nothing_waits_while_nobody_listens() {
        let mut port = port();
        assert!(!port.receive_pme(from(0), true));
        assert!(!port.receive_pme(from(1), true));
        assert!(!port.write(ROOT_STATUS_AT, &CLEAR).interrupt);
        assert_eq!(dword(&port, ROOT_STATUS_AT) & (PME_STATUS | PME_PENDING), 0);
        let mut mute = listening();
        assert!(!mute.receive_pme(from(0), false) && !mute.receive_pme(from(1), false));
        assert_eq!(dword(&mute, ROOT_STATUS_AT), 0x1_0100);
    }

    #[test]
    fn the_queue_is_bounded() {
        let mut port = listening();
        for devfn in 0..=u8::MAX {
            let _ = port.receive_pme(from(devfn), true);
        }
        assert_eq!(port.queue.len(), QUEUE_LIMIT);
    }

    const SLOT_CONTROL_AT: u16 = 0x18;
    const SLOT_STATUS_AT: u16 = 0x1a;

    fn word(port: &PcieRootPortCapability, offset: u16) -> u16 {
        let mut data = [0; 2];
        port.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    /// A port with an empty slot whose driver listens to everything and has the slot's power off.
    fn slot() -> PcieRootPortCapability {
        let mut port = PcieRootPortCapability::with_slot(5, LinkSpeed::Gen2);
        let control: u16 = 0x1009 | 1 << 5 | 1 << 10;
        assert_eq!(port.write(SLOT_CONTROL_AT, &control.to_le_bytes()), PortEffect::default());
        port
    }

    fn set_power(port: &mut PcieRootPortCapability, on: bool) -> PortEffect {
        let control = word(port, SLOT_CONTROL_AT) & !(1 << 10) | if on { 0 } else { 1 << 10 };
        port.write(SLOT_CONTROL_AT, &control.to_le_bytes())
    }

    #[test]
    fn an_empty_slot_is_without_power_and_its_link_is_down() {
        let port = PcieRootPortCapability::with_slot(5, LinkSpeed::Gen2);
        assert_eq!(word(&port, 2) >> 8 & 1, 1, "there is a slot");
        assert_eq!(dword(&port, 0x14), 0x0004_005b | 5 << 19);
        assert_eq!(word(&port, SLOT_CONTROL_AT), 0x7c0);
        assert_eq!(word(&port, SLOT_STATUS_AT), 0);
        assert_eq!(word(&port, 0x12) & LINK_ACTIVE, 0);
    }

    #[test]
    fn a_device_that_is_put_in_interrupts_and_has_a_link_once_it_has_power() {
        let mut port = slot();
        assert!(port.set_present(true));
        assert_eq!(word(&port, SLOT_STATUS_AT), 0x48);
        assert!(!port.set_present(true), "it is there already");
        assert_eq!(port.write(SLOT_STATUS_AT, &[0x08, 0]), PortEffect::default());
        assert_eq!(word(&port, SLOT_STATUS_AT), 0x40);
        let effect = set_power(&mut port, true);
        assert_eq!(effect, PortEffect { interrupt: true, slot_power: Some(true) }, "the link is up");
        assert_ne!(word(&port, 0x12) & LINK_ACTIVE, 0);
    }

    #[test]
    fn the_button_interrupts_and_power_off_is_told() {
        let mut port = slot();
        assert!(port.set_present(true));
        let _ = set_power(&mut port, true);
        let _ = port.write(SLOT_STATUS_AT, &[0xff, 0xff]);
        assert!(port.press_button());
        let _ = port.write(SLOT_STATUS_AT, &[0x01, 0]);
        let effect = set_power(&mut port, false);
        assert_eq!(effect.slot_power, Some(false));
        assert_eq!(word(&port, 0x12) & LINK_ACTIVE, 0);
        let _ = port.write(SLOT_STATUS_AT, &[0xff, 0xff]);
        assert!(port.set_present(false));
        assert_eq!(word(&port, SLOT_STATUS_AT) & 0x40, 0);
    }

    #[test]
    fn events_that_came_while_nobody_listened_interrupt_when_somebody_does() {
        let mut port = PcieRootPortCapability::with_slot(5, LinkSpeed::Gen2);
        assert!(!port.set_present(true));
        assert!(port.write(SLOT_CONTROL_AT, &[0xe8, 0x07]).interrupt);
        assert!(!port.write(SLOT_CONTROL_AT, &[0xe8, 0x07]).interrupt, "but once");
    }

    #[test]
    fn a_port_without_a_slot_has_none_of_it() {
        let mut port = port();
        assert!(!port.set_present(false) && !port.press_button());
        let _ = port.write(SLOT_CONTROL_AT, &[0xff; 4]);
        assert_eq!(dword(&port, 0x18), 0x0040_0000);
    }

    #[test]
    fn writes_that_span_the_capability_or_miss_it_do_no_harm() {
        let mut port = listening();
        assert!(port.receive_pme(from(0), true));
        let _ = port.write(0, &[0xff; 80]).interrupt;
        assert_eq!(dword(&port, 0x0c), 0x0350_0012);
        assert_eq!(dword(&port, ROOT_STATUS_AT) & PME_STATUS, 0);
        assert!(!port.write(u16::MAX, &[0xff; 4]).interrupt);
        assert!(!port.write(0, &[]).interrupt);
    }
}
