//! A virtio function that goes on elsewhere: what is saved of it, and how it comes to work again.
//!
//! Registers are restored by writing them as the guest has. A device that was active is activated again at the positions of its rings; it stays
//! paused, and when it goes on it looks at every ring and interrupts the driver for each, since what was signalled and not heard is
//! not saved.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::capabilities::Window;
use super::common::CommonRegisters;
use super::interrupts::InterruptState;
use super::{Inner, VirtioPci};
use crate::emulated::{Header, Saved};
use crate::virtio::device::Interrupt;
use crate::virtio::ring::{RingPosition, SharedPosition};

/// PMCSR in the power management capability.
const PMCSR: u16 = 4;

/// How long a reset that the driver has asked for may take before the function is saved.
const RESET_PATIENCE: Duration = Duration::from_secs(5);

/// What is saved of a function.
#[derive(Debug, Serialize, Deserialize)]
struct FunctionState {
    header: Header,
    pmcsr: u16,
    access: Window,
    interrupts: InterruptState,
    common: CommonRegisters,
    /// Of an active device: how far each ring has been served.
    positions: Option<Vec<RingPosition>>,
    /// Whether the guest has taken bus mastering from it.
    #[serde(default)]
    held: bool,
    device: Saved,
}

impl VirtioPci {
    pub(super) fn save_function(&self) -> Result<Saved, String> {
        let mut inner = self.lock();
        self.finish_reset(&mut inner, RESET_PATIENCE);
        if inner.resetting {
            return Err("it is being reset and has not stopped yet; try again later".to_owned());
        }
        let mut pmcsr = [0; 2];
        inner.pm.read(PMCSR, &mut pmcsr);
        let positions =
            inner.active.as_ref().map(|_| inner.positions.iter().map(SharedPosition::get).collect());
        let state = FunctionState {
            header: Header::save(&inner.config, &inner.bars),
            pmcsr: u16::from_le_bytes(pmcsr),
            access: inner.access,
            interrupts: self.interrupts.save(),
            common: inner.common.clone(),
            positions,
            held: inner.held,
            device: self.device.save()?,
        };
        serde_json::to_value(state).map_err(|e| e.to_string())
    }

    pub(super) fn restore_function(&self, saved: &Saved) -> Result<(), String> {
        let state: FunctionState = serde_json::from_value(saved.clone()).map_err(|e| e.to_string())?;
        let mut inner = self.lock();
        let Inner { config, bars, .. } = &mut *inner;
        state.header.restore(config, bars);
        inner.access = state.access;
        inner.common.restore(state.common)?;
        let _ = inner.pm.write(PMCSR, &state.pmcsr.to_le_bytes());
        self.decode(&mut inner);
        self.interrupts.restore(&state.interrupts);
        self.interrupts.set_vectors(&inner.common);
        self.device.restore(&state.device)?;
        inner.paused = true;
        inner.restored = true;
        inner.held = state.held;
        if let Some(mut positions) = state.positions.filter(|_| !self.interrupts.has_stopped()) {
            positions.resize(inner.common.queues(), RingPosition::START);
            self.activate_at(&mut inner, &positions).map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    /// Tells the driver to look at all of its rings.
    pub(super) fn signal_all(&self, inner: &Inner) {
        for index in (0..inner.common.queues()).filter_map(|index| u16::try_from(index).ok()) {
            if inner.common.layout(index).is_some() {
                self.interrupts.queue(index);
            }
        }
    }
}
