//! Local APIC state at start.
//!
//! Follows the Intel SDM volume 3 chapter 11 (local vector table).

use kvm_bindings::kvm_lapic_state;

const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const DELIVERY_MODE_MASK: u32 = 7 << 8;
const LVT_MASKED: u32 = 1 << 16;
const DELIVERY_NMI: u32 = 4 << 8;
const DELIVERY_EXTINT: u32 = 7 << 8;

/// Sets the local interrupt pins as firmware leaves them: LINT0 takes interrupts from an 8259, LINT1 is the
/// non-maskable interrupt.
pub fn set_local_interrupt_pins(lapic: &mut kvm_lapic_state) {
    for (offset, mode) in [(LVT_LINT0, DELIVERY_EXTINT), (LVT_LINT1, DELIVERY_NMI)] {
        let value = read(lapic, offset) & !(DELIVERY_MODE_MASK | LVT_MASKED) | mode;
        for (register, byte) in lapic.regs[offset..offset + 4].iter_mut().zip(value.to_le_bytes()) {
            *register = byte.cast_signed();
        }
    }
}

fn read(lapic: &kvm_lapic_state, offset: usize) -> u32 {
    let byte = |i: usize| lapic.regs[offset + i].cast_unsigned();
    u32::from_le_bytes([byte(0), byte(1), byte(2), byte(3)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lint0_takes_the_8259_and_lint1_the_nmi() {
        let mut lapic = kvm_lapic_state::default();
        lapic.regs[LVT_LINT0 + 2] = 1; // masked
        lapic.regs[LVT_LINT1] = 0x20; // a vector
        set_local_interrupt_pins(&mut lapic);
        assert_eq!(read(&lapic, LVT_LINT0), 0x700);
        assert_eq!(read(&lapic, LVT_LINT1), 0x420);
    }
}
