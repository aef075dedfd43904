//! The hot-plug slot of a root port: presence, power, attention button, and the events that tell of them (PCI Express Base 6.0, sections 6.7
//! and 7.5.3.9 to 7.5.3.11).
//!
//! Commands complete at once, so there is no command-completed event. A device is put into an empty slot and shows in Presence Detect;
//! the guest turns the slot's power on and finds the link up. To take it out again the attention button is pressed; the guest lets
//! go of the device and turns the power off.

use crate::registers::Registers;

use super::pcie::LEN;

const PCIE_CAPABILITIES: usize = 0x02;
const LINK_STATUS: usize = 0x12;
const SLOT_CAPABILITIES: usize = 0x14;
const SLOT_CONTROL: usize = 0x18;
const SLOT_STATUS: usize = 0x1a;

/// PCI Express Capabilities: there is a slot.
const SLOT_IMPLEMENTED: u16 = 1 << 8;
/// Link Status: the data link layer is up.
const LINK_ACTIVE: u16 = 1 << 13;

/// Attention button, power controller, attention and power indicator, hot-plug capable, no command-completed events.
const CAPABILITIES: u32 = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 18;
/// Where the slot's number is.
const NUMBER_SHIFT: u32 = 19;

/// Slot Control: enables of the events below, each at the place of its status bit; then the interrupt's own enable, both indicators, and the power
/// controller, where one means off.
const CONTROL_STORED: u16 = 0x1f | HOT_PLUG_INTERRUPT | 0xf << 6 | POWER_OFF | LINK_CHANGED_ENABLE;
const HOT_PLUG_INTERRUPT: u16 = 1 << 5;
const INDICATORS_OFF: u16 = 0xf << 6;
const POWER_OFF: u16 = 1 << 10;
const LINK_CHANGED_ENABLE: u16 = 1 << 12;

/// Slot Status: events, cleared by writing one.
const BUTTON_PRESSED: u16 = 1 << 0;
const PRESENCE_CHANGED: u16 = 1 << 3;
const LINK_CHANGED: u16 = 1 << 8;
const EVENTS: u16 = 0x1f | LINK_CHANGED;
/// Slot Status: there is a device.
const PRESENT: u16 = 1 << 6;

/// The registers of the root port's PCI Express capability.
type Block = Registers<{ LEN as usize }>;

/// A slot, which lives in the registers of its port's capability.
#[derive(Clone, Copy, Debug)]
pub(super) struct HotPlugSlot;

impl HotPlugSlot {
    /// Turns the capability into that of a port with an empty slot of this number.
    pub(super) fn install(registers: &mut Block, number: u8) -> Self {
        registers.set_u16(PCIE_CAPABILITIES, registers.u16(PCIE_CAPABILITIES) | SLOT_IMPLEMENTED);
        registers.set_u32(SLOT_CAPABILITIES, CAPABILITIES | u32::from(number) << NUMBER_SHIFT);
        registers.allow_u16(SLOT_CONTROL, CONTROL_STORED);
        registers.set_u16(SLOT_CONTROL, INDICATORS_OFF | POWER_OFF);
        registers.set_u16(SLOT_STATUS, 0);
        registers.clear_on_one_u16(SLOT_STATUS, EVENTS);
        registers.set_u16(LINK_STATUS, registers.u16(LINK_STATUS) & !LINK_ACTIVE);
        Self
    }

    /// A device is there now, or is not any more.
    pub(super) fn set_present(self, registers: &mut Block, present: bool) {
        let status = registers.u16(SLOT_STATUS);
        let state = if present { status | PRESENT } else { status & !PRESENT };
        if state != status {
            registers.set_u16(SLOT_STATUS, state | PRESENCE_CHANGED);
        }
        self.follow_link(registers);
    }

    /// Somebody presses the attention button.
    pub(super) fn press_button(self, registers: &mut Block) {
        registers.set_u16(SLOT_STATUS, registers.u16(SLOT_STATUS) | BUTTON_PRESSED);
    }

    /// Whether the guest has the slot's power on.
    pub(super) fn is_powered(self, registers: &Block) -> bool {
        registers.u16(SLOT_CONTROL) & POWER_OFF == 0
    }

    /// Whether the port is to interrupt: an event that is enabled, and the interrupt too.
    pub(super) fn wants_interrupt(self, registers: &Block) -> bool {
        let control = registers.u16(SLOT_CONTROL);
        let link = if control & LINK_CHANGED_ENABLE == 0 { 0 } else { LINK_CHANGED };
        let enabled = control & 0x1f | link;
        control & HOT_PLUG_INTERRUPT != 0 && registers.u16(SLOT_STATUS) & enabled != 0
    }

    /// Brings the link in line with presence and power.
    pub(super) fn follow_link(self, registers: &mut Block) {
        let up = registers.u16(SLOT_STATUS) & PRESENT != 0 && self.is_powered(registers);
        let status = registers.u16(LINK_STATUS);
        let state = if up { status | LINK_ACTIVE } else { status & !LINK_ACTIVE };
        if state != status {
            registers.set_u16(LINK_STATUS, state);
            registers.set_u16(SLOT_STATUS, registers.u16(SLOT_STATUS) | LINK_CHANGED);
        }
    }
}
