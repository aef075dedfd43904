//! The power management capability as the guest sees it (PCI-PM 1.2, section 3.2; PCI Express Base 6.0, section 7.5.2).
//!
//! All of it is virtual: VFIO offers no PME bits at all, and its PowerState shows the hardware, which must not be touched
//! while the function sleeps.

use bitflags::bitflags;

/// Length of the capability in bytes.
pub const LEN: u16 = 8;

const PMC: u16 = 2;
const PMCSR: u16 = 4;

/// PMC, Version: 3, that is PCI-PM 1.2.
const VERSION: u16 = 3;
const POWER_STATE_MASK: u8 = 0x3;
const NO_SOFT_RESET: u8 = 1 << 3;
/// PME_En and PME_Status as they stand in the upper byte of PMCSR.
const PME_ENABLE: u8 = 1 << 0;
const PME_STATUS: u8 = 1 << 7;

bitflags! {
    /// The power states from which a function can signal PME, as PMC holds them.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct PmeSupport: u16 {
        /// From D0.
        const D0 = 1 << 11;
        /// From D3hot.
        const D3_HOT = 1 << 14;
        /// From D3cold, on auxiliary power.
        const D3_COLD = 1 << 15;
    }
}

/// What PowerState in PMCSR can hold here; D1 and D2 are not offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DState {
    /// Fully on.
    D0,
    /// Asleep with main power on.
    D3Hot,
}

impl DState {
    /// The value of the PowerState field.
    pub const fn bits(self) -> u8 {
        match self {
            Self::D0 => 0,
            Self::D3Hot => 3,
        }
    }
}

/// What a write to the capability did, for those who act on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct PmChange {
    /// PowerState moved `(from, to)`.
    pub state: Option<(DState, DState)>,
    /// PME_En now has this value, and had the other.
    pub pme_enabled: Option<bool>,
    /// The guest cleared PME_Status, which was set.
    pub pme_acknowledged: bool,
}

/// One function's power management capability.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PmCapability {
    support: PmeSupport,
    no_soft_reset: bool,
    state: DState,
    /// Main power is there, as far as the guest's `_OFF` and `_ON` say.
    powered: bool,
    pme_enable: bool,
    pme_status: bool,
}

impl PmCapability {
    /// In D0, powered, no PME. `no_soft_reset`: the way from D3hot back to D0 keeps the function's registers.
    pub const fn new(support: PmeSupport, no_soft_reset: bool) -> Self {
        Self {
            support,
            no_soft_reset,
            state: DState::D0,
            powered: true,
            pme_enable: false,
            pme_status: false,
        }
    }

    /// The guest's read at `offset` in the capability.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (at, byte) in (usize::from(offset)..).zip(data) {
            if let Some(value) = self.byte(at) {
                *byte = value;
            }
        }
    }

    /// The guest's write at `offset` in the capability; any size.
    ///
    /// Without power only the PME bits take it: a sleeping function stays asleep until `_ON`.
    pub fn write(&mut self, offset: u16, data: &[u8]) -> PmChange {
        let mut change = PmChange::default();
        for (at, &byte) in (usize::from(offset)..).zip(data) {
            if at == usize::from(PMCSR) {
                change.state = self.set_state(byte & POWER_STATE_MASK);
            } else if at == usize::from(PMCSR) + 1 {
                self.set_pme(byte, &mut change);
            }
        }
        change
    }

    /// PowerState as PMCSR shows it. Stays what it was while the power is off.
    pub const fn state(&self) -> DState {
        self.state
    }

    /// Whether main power is there: `false` from [`power_off`](Self::power_off) to [`power_on`](Self::power_on).
    pub const fn is_powered(&self) -> bool {
        self.powered
    }

    /// PME_En.
    pub const fn pme_enabled(&self) -> bool {
        self.pme_enable
    }

    /// PME_Status.
    pub const fn pme_status(&self) -> bool {
        self.pme_status
    }

    /// The states PME is offered from.
    pub const fn pme_support(&self) -> PmeSupport {
        self.support
    }

    /// The device asks for attention: sets PME_Status if PME is supported from the present state.
    ///
    /// Returns whether PME is to be signalled: the status was taken, and PME_En is set.
    pub fn latch_pme(&mut self) -> bool {
        let from = match (self.powered, self.state) {
            (false, _) => PmeSupport::D3_COLD,
            (true, DState::D3Hot) => PmeSupport::D3_HOT,
            (true, DState::D0) => PmeSupport::D0,
        };
        let supported = self.support.contains(from);
        self.pme_status |= supported;
        supported && self.pme_enable
    }

    /// Main power went away (D3cold).
    pub fn power_off(&mut self) {
        self.powered = false;
    }

    /// Main power is back: D0. The PME bits lived on auxiliary power if PME from D3cold is supported, else they are lost.
    pub fn power_on(&mut self) {
        let was_off = !std::mem::replace(&mut self.powered, true);
        self.state = DState::D0;
        if was_off && !self.support.contains(PmeSupport::D3_COLD) {
            self.pme_enable = false;
            self.pme_status = false;
        }
    }

    fn byte(&self, at: usize) -> Option<u8> {
        let pmc = (VERSION | self.support.bits()).to_le_bytes();
        let control = self.state.bits() | if self.no_soft_reset { NO_SOFT_RESET } else { 0 };
        let pme = if self.pme_enable { PME_ENABLE } else { 0 } | if self.pme_status { PME_STATUS } else { 0 };
        let bytes = [pmc[0], pmc[1], control, pme, 0, 0];
        bytes.get(at.checked_sub(usize::from(PMC))?).copied()
    }

    fn set_state(&mut self, bits: u8) -> Option<(DState, DState)> {
        // A write of a state that is not supported completes and changes nothing (PCI-PM 1.2, section 3.2.4).
        let to = [DState::D0, DState::D3Hot].into_iter().find(|state| state.bits() == bits)?;
        if !self.powered || to == self.state {
            return None;
        }
        Some((std::mem::replace(&mut self.state, to), to))
    }

    fn set_pme(&mut self, byte: u8, change: &mut PmChange) {
        if self.support.is_empty() {
            return;
        }
        let enable = byte & PME_ENABLE != 0;
        change.pme_enabled = (enable != self.pme_enable).then_some(enable);
        self.pme_enable = enable;
        if byte & PME_STATUS != 0 {
            change.pme_acknowledged = std::mem::replace(&mut self.pme_status, false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> PmCapability {
        PmCapability::new(PmeSupport::all(), true)
    }

    fn pmcsr(pm: &PmCapability) -> u16 {
        let mut data = [0; 2];
        pm.read(PMCSR, &mut data);
        u16::from_le_bytes(data)
    }

    #[test]
    fn the_capability_reads_version_3_and_the_chosen_pme_states_and_leaves_the_header_alone() {
        let mut data = [0x55; 10];
        all().read(0, &mut data);
        assert_eq!(data, [0x55, 0x55, 0x03, 0xc8, 0x08, 0, 0, 0, 0x55, 0x55]);
        PmCapability::new(PmeSupport::empty(), false).read(0, &mut data);
        assert_eq!(data[2..6], [3, 0, 0, 0]);
    }

    #[test]
    fn power_state_moves_by_byte_word_and_dword_writes() {
        let to_d3 = Some((DState::D0, DState::D3Hot));
        for data in [&[3u8][..], &[3, 0], &[3, 0, 0, 0]] {
            let mut pm = all();
            assert_eq!(pm.write(PMCSR, data).state, to_d3);
            assert_eq!(pm.write(PMCSR, data).state, None, "no change, none reported");
            assert_eq!(pmcsr(&pm) & 3, 3);
        }
        let mut pm = all();
        assert_eq!(
            pm.write(0, &[0, 0, 0, 0, 3, 1]),
            PmChange { state: to_d3, pme_enabled: Some(true), ..Default::default() }
        );
        assert_eq!(pm.write(PMCSR + 1, &[0]).state, None, "the upper byte alone does not move the state");
        assert_eq!(pm.state(), DState::D3Hot);
    }

    #[test]
    fn states_that_are_not_supported_are_ignored() {
        let mut pm = all();
        for bits in [1, 2] {
            assert_eq!(pm.write(PMCSR, &[bits, 1]).state, None);
            assert_eq!(pmcsr(&pm) & 3, 0);
        }
        assert!(pm.pme_enabled(), "the other fields of that write count");
    }

    #[test]
    fn pme_status_is_sticky_and_cleared_only_by_writing_one() {
        let mut pm = all();
        assert!(!pm.latch_pme(), "PME_En is clear");
        assert_eq!(pmcsr(&pm), 0x8008);
        let _ = pm.write(PMCSR, &[0, 1]);
        assert_eq!(pmcsr(&pm), 0x8108);
        assert_eq!(pm.write(PMCSR, &[0, 0]).pme_enabled, Some(false));
        assert_eq!(pmcsr(&pm), 0x8008, "clearing PME_En leaves PME_Status");
        assert!(pm.write(PMCSR, &[0, 0x80]).pme_acknowledged);
        assert_eq!(pmcsr(&pm), 0x0008);
        assert!(!pm.write(PMCSR, &[0, 0x80]).pme_acknowledged);
    }

    #[test]
    fn pme_is_latched_only_from_a_supported_state() {
        let mut pm = PmCapability::new(PmeSupport::D3_COLD, true);
        let _ = pm.write(PMCSR, &[3, 1]);
        assert!(!pm.latch_pme());
        assert!(!pm.pme_status());
        pm.power_off();
        assert!(pm.latch_pme());
        assert!(pm.pme_status());
    }

    #[test]
    fn without_power_only_the_pme_bits_can_be_written() {
        let mut pm = all();
        let _ = pm.write(PMCSR, &[3, 1]);
        pm.power_off();
        assert!(pm.latch_pme());
        let change = pm.write(PMCSR, &[0, 0x80]);
        assert_eq!(change, PmChange { state: None, pme_enabled: Some(false), pme_acknowledged: true });
        assert_eq!(pm.state(), DState::D3Hot);
    }

    #[test]
    fn power_on_gives_d0_and_keeps_pme_bits_that_live_on_auxiliary_power() {
        for (support, kept) in [(PmeSupport::all(), true), (PmeSupport::D0 | PmeSupport::D3_HOT, false)] {
            let mut pm = PmCapability::new(support, false);
            let _ = pm.write(PMCSR, &[3, 1]);
            pm.latch_pme();
            pm.power_off();
            pm.power_on();
            assert_eq!(pm.state(), DState::D0);
            assert_eq!((pm.pme_enabled(), pm.pme_status()), (kept, kept), "{support:?}");
        }
    }

    #[test]
    fn a_function_without_pme_has_no_pme_bits() {
        let mut pm = PmCapability::new(PmeSupport::empty(), true);
        assert_eq!(pm.write(PMCSR, &[0, 0x81]), PmChange::default());
        assert!(!pm.latch_pme());
        assert_eq!(pmcsr(&pm), 0x0008);
    }
}
