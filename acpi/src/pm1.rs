//! The PM1 register blocks of the fixed hardware (ACPI 6.5, sections 4.8.3.1 and 4.8.3.2), as data and as a register model.
//!
//! Two blocks of I/O ports. The event block holds status (offset 0) and enable (offset 2), the control block holds control;
//! all are 16 bits wide. An event sets its status bit; while the bit and its enable bit are both set, the system control
//! interrupt is wanted. The interrupt is described as edge-triggered, so it is pulsed each time the model says so.
//!
//! What belongs here is only what the guest gets: the clock's alarm (the one way it can wake a guest out of
//! suspend-to-idle) and the way into soft-off. The power button is a control-method device, woken by the event device.

/// Size of the event block in ports.
pub const EVENT_BLOCK_SIZE: u8 = 4;
/// Size of the control block in ports.
pub const CONTROL_BLOCK_SIZE: u8 = 2;

/// Status and enable bit 5: the global lock was released by firmware. Never raised, but its enable bit can be set.
pub const EVENT_GLOBAL: u16 = 1 << 5;
/// Status and enable bit 8: the fixed power button. Never raised, but its enable bit can be set.
pub const EVENT_POWER_BUTTON: u16 = 1 << 8;
/// Status and enable bit 9: the fixed sleep button. Never raised, but its enable bit can be set.
pub const EVENT_SLEEP_BUTTON: u16 = 1 << 9;
/// Status and enable bit 10: the clock's alarm.
pub const EVENT_RTC: u16 = 1 << 10;
/// Status bit 15: the machine woke up from a sleep state.
pub const STATUS_WAKE: u16 = 1 << 15;

/// Control bit 0: the machine is in ACPI mode. It always is.
pub const CONTROL_SCI_ENABLE: u16 = 1 << 0;
/// Control bits 12:10: the sleep type of the sleep state to enter.
pub const CONTROL_SLEEP_TYPE_SHIFT: u32 = 10;
/// Control bit 13: enter the sleep state. Reads 0.
pub const CONTROL_SLEEP_ENABLE: u16 = 1 << 13;

/// Sleep type of soft-off, as `\_S5` gives it to the guest and the control register takes it.
pub const SLEEP_TYPE_SOFT_OFF: u8 = 5;

const ENABLE_BITS: u16 = EVENT_GLOBAL | EVENT_POWER_BUTTON | EVENT_SLEEP_BUTTON | EVENT_RTC;
const CONTROL_SLEEP_TYPE_BITS: u16 = 7 << CONTROL_SLEEP_TYPE_SHIFT;

/// What a write to a block asks the machine to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Effect {
    /// Pulse the system control interrupt.
    pub interrupt: bool,
    /// Power off.
    pub power_off: bool,
}

/// Both blocks, as state. Accesses that do not lie inside a block read all ones and are dropped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pm1 {
    status: u16,
    enable: u16,
    sleep_type: u16,
}

/// What the registers hold, for a machine that goes on elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pm1Registers {
    /// The status register.
    pub status: u16,
    /// The enable register.
    pub enable: u16,
    /// The sleep type, as the control register has it.
    pub sleep_type: u16,
}

impl From<Pm1Registers> for Pm1 {
    /// Bits that the registers cannot hold are dropped.
    fn from(registers: Pm1Registers) -> Self {
        Self {
            status: registers.status & EVENT_RTC,
            enable: registers.enable & ENABLE_BITS,
            sleep_type: registers.sleep_type & CONTROL_SLEEP_TYPE_BITS,
        }
    }
}

impl Pm1 {
    /// The state at power-on and after a reset.
    pub fn new() -> Self {
        Self::default()
    }

    /// The event of `bits` (one of the `EVENT_` bits) happened. Returns whether to pulse the interrupt.
    pub fn raise(&mut self, bits: u16) -> bool {
        self.status |= bits & EVENT_RTC;
        self.interrupt_wanted()
    }

    /// Reads the event block.
    pub fn read_event(&self, offset: u64, data: &mut [u8]) {
        let [status_low, status_high] = self.status.to_le_bytes();
        let [enable_low, enable_high] = self.enable.to_le_bytes();
        read(&[status_low, status_high, enable_low, enable_high], offset, data);
    }

    /// Writes the event block: status bits written as one are cleared.
    pub fn write_event(&mut self, offset: u64, data: &[u8]) -> Effect {
        let before = self.status & self.enable;
        for (byte_offset, byte) in within(usize::from(EVENT_BLOCK_SIZE), offset, data) {
            let word = |low: u16| if byte_offset.is_multiple_of(2) { low } else { low << 8 };
            let value = word(u16::from(byte));
            if byte_offset < 2 {
                self.status &= !value;
            } else {
                self.enable = (self.enable & !word(0xff) | value) & ENABLE_BITS;
            }
        }
        Effect { interrupt: self.status & self.enable & !before != 0, power_off: false }
    }

    /// Reads the control block.
    pub fn read_control(&self, offset: u64, data: &mut [u8]) {
        read(&(CONTROL_SCI_ENABLE | self.sleep_type).to_le_bytes(), offset, data);
    }

    /// Writes the control block. The machine sleeps when it is told to enter a state; soft-off is the only one it has.
    pub fn write_control(&mut self, offset: u64, data: &[u8]) -> Effect {
        let mut sleep = false;
        for (byte_offset, byte) in within(usize::from(CONTROL_BLOCK_SIZE), offset, data) {
            if byte_offset == 1 {
                let value = u16::from(byte) << 8;
                self.sleep_type = value & CONTROL_SLEEP_TYPE_BITS;
                sleep = value & CONTROL_SLEEP_ENABLE != 0;
            }
        }
        let soft_off = u16::from(SLEEP_TYPE_SOFT_OFF) << CONTROL_SLEEP_TYPE_SHIFT;
        Effect { interrupt: false, power_off: sleep && self.sleep_type == soft_off }
    }

    /// What the registers hold.
    pub fn registers(&self) -> Pm1Registers {
        Pm1Registers { status: self.status, enable: self.enable, sleep_type: self.sleep_type }
    }

    /// Whether the interrupt is wanted now.
    pub fn interrupt_wanted(&self) -> bool {
        self.status & self.enable != 0
    }
}

fn read(block: &[u8], offset: u64, data: &mut [u8]) {
    let bytes = usize::try_from(offset)
        .ok()
        .and_then(|start| block.get(start..start.checked_add(data.len())?))
        .filter(|bytes| !bytes.is_empty());
    match bytes {
        Some(bytes) => data.copy_from_slice(bytes),
        None => data.fill(0xff),
    }
}

/// The bytes of an access with their offsets; none at all when the access does not lie inside the block.
fn within(size: usize, offset: u64, data: &[u8]) -> impl Iterator<Item = (usize, u8)> {
    let start = usize::try_from(offset)
        .ok()
        .filter(|start| start.checked_add(data.len()).is_some_and(|end| end <= size));
    start.into_iter().flat_map(move |start| (start..).zip(data.iter().copied()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(pm1: &Pm1) -> (u16, u16) {
        let mut data = [0; 4];
        pm1.read_event(0, &mut data);
        (u16::from_le_bytes([data[0], data[1]]), u16::from_le_bytes([data[2], data[3]]))
    }

    #[test]
    fn an_alarm_interrupts_only_when_it_is_enabled() {
        let mut pm1 = Pm1::new();
        assert!(!pm1.raise(EVENT_RTC));
        assert_eq!(events(&pm1), (EVENT_RTC, 0));
        assert!(
            pm1.write_event(2, &EVENT_RTC.to_le_bytes()).interrupt,
            "a pending event interrupts once enabled"
        );
        assert!(!pm1.write_event(2, &EVENT_RTC.to_le_bytes()).interrupt, "and not again");
        pm1.write_event(0, &EVENT_RTC.to_le_bytes());
        assert_eq!(events(&pm1), (0, EVENT_RTC));
        assert!(pm1.raise(EVENT_RTC));
    }

    #[test]
    fn enable_bits_read_back_as_the_guest_checks() {
        let mut pm1 = Pm1::new();
        for bit in [EVENT_GLOBAL, EVENT_POWER_BUTTON, EVENT_SLEEP_BUTTON, EVENT_RTC] {
            pm1.write_event(2, &bit.to_le_bytes());
            assert_eq!(events(&pm1).1, bit);
        }
        pm1.write_event(2, &[0xff]);
        pm1.write_event(3, &[0xff]);
        assert_eq!(events(&pm1).1, ENABLE_BITS);
        pm1.write_event(3, &[0]);
        assert_eq!(events(&pm1).1, EVENT_GLOBAL, "a byte write leaves the other byte alone");
    }

    #[test]
    fn soft_off_needs_the_type_and_the_enable_bit() {
        let mut pm1 = Pm1::new();
        let soft_off = u16::from(SLEEP_TYPE_SOFT_OFF) << CONTROL_SLEEP_TYPE_SHIFT;
        assert!(!pm1.write_control(0, &soft_off.to_le_bytes()).power_off);
        assert!(!pm1.write_control(0, &CONTROL_SLEEP_ENABLE.to_le_bytes()).power_off);
        assert!(pm1.write_control(0, &(soft_off | CONTROL_SLEEP_ENABLE).to_le_bytes()).power_off);
        let mut data = [0; 2];
        pm1.read_control(0, &mut data);
        assert_eq!(u16::from_le_bytes(data), soft_off | CONTROL_SCI_ENABLE);
    }

    #[test]
    fn accesses_outside_a_block_read_all_ones_and_are_dropped() {
        let mut pm1 = Pm1::new();
        for (offset, size) in [(0, 8), (1, 4), (3, 2), (4, 1), (u64::MAX, 2), (u64::MAX, 1)] {
            let mut data = vec![0; size];
            pm1.read_event(offset, &mut data);
            assert!(data.iter().all(|byte| *byte == 0xff), "{offset} {size}");
            assert_eq!(pm1.write_event(offset, &data), Effect::default());
            pm1.read_control(offset.saturating_add(1), &mut data);
            assert!(data.iter().all(|byte| *byte == 0xff), "{offset} {size}");
            assert_eq!(pm1.write_control(offset.saturating_add(1), &data), Effect::default());
        }
        assert_eq!(pm1, Pm1::new());
    }
}
