//! What an operator does with a running domain: look at it, change a policy, and decide what becomes of a device that did not
//! come back. None of it touches a device on the caller's thread.

use std::time::Instant;

use pci::{Bdf, DevFn};

use super::{DomainState, PowerDomain, Shared, lock};
use crate::event::News;
use crate::offer::PowerChoice;
use crate::policy::{Policy, PolicyChange, PolicyError};
use crate::state::{Hardware, PowerEvent, PowerState, Want};
use crate::stats::{MemberReport, Snapshot};

/// An operator's wish that cannot be carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// No such function.
    #[error("there is no device {0} in this slot; see the list of assigned devices")]
    NoFunction(Bdf),
    /// The guest has no power resource for it.
    #[error(
        "the guest was not offered the power of {0} when it started, so power=auto cannot be set now; start the VM with power=auto, \
         and see its log for what else stands in the way"
    )]
    NotOffered(Bdf),
    /// There is nothing to recover.
    #[error("device {0} is not lost, so there is nothing to recover; look at its state first")]
    NotLost(Bdf),
    /// It cannot be woken.
    #[error("device {0} is lost, so it cannot be woken; have it reset instead")]
    Lost(Bdf),
    /// A policy that makes no sense.
    #[error(transparent)]
    Policy(#[from] PolicyError),
}

impl PowerDomain {
    /// Where each function is and what has happened to it; touches no device.
    pub fn report(&self) -> Vec<MemberReport> {
        let now = Instant::now();
        let state = lock(&self.shared.state);
        let latched_by = state.latched.map(|number| self.shared.members[number].bdf);
        let parts = self.shared.spec.members.iter().zip(&self.shared.members).zip(&state.members);
        parts
            .map(|((spec, member), state)| MemberReport {
                bdf: member.bdf,
                devfn: spec.devfn,
                resource: spec.resource,
                phase: state.power.phase(),
                phase_age: now.saturating_duration_since(state.since()),
                latched_by,
                policy: PolicyChange::from(&state.policy),
                last_wake: state.last_wake().map(|(at, cause)| (now.saturating_duration_since(at), cause)),
                counters: state.counters(now),
            })
            .collect()
    }

    /// The same for programs.
    pub fn snapshots(&self) -> Vec<Snapshot> {
        self.report().into_iter().map(Snapshot::from).collect()
    }

    /// The host addresses of the functions and their places on the root port's bus.
    pub fn functions(&self) -> impl Iterator<Item = (Bdf, DevFn)> + '_ {
        self.shared
            .members
            .iter()
            .zip(&self.shared.spec.members)
            .map(|(member, spec)| (member.bdf, spec.devfn))
    }

    /// The policy of the function with this host address.
    ///
    /// # Errors
    /// There is no such function.
    pub fn policy(&self, bdf: Bdf) -> Result<Policy, ControlError> {
        let number = self.shared.by_bdf(bdf)?;
        Ok(lock(&self.shared.state).members[number].policy)
    }

    /// Changes the policy of a function while the guest runs.
    ///
    /// A device that is deeper than it may be from now on is brought back, and one that was kept from sleeping is put to sleep after
    /// its hold-off. What a wake does changes with the next entry. A hold-off that has begun keeps its length.
    ///
    /// # Errors
    /// There is no such function, the policy makes no sense, or the function's power was not offered to the guest.
    pub fn change_policy(&self, bdf: Bdf, change: &PolicyChange) -> Result<Policy, ControlError> {
        let number = self.shared.by_bdf(bdf)?;
        let now = Instant::now();
        let policy = {
            let mut state = lock(&self.shared.state);
            let member = &mut state.members[number];
            let policy = change.apply(&member.policy)?;
            if change.power == Some(PowerChoice::Auto) && self.shared.spec(number).resource.is_none() {
                return Err(ControlError::NotOffered(bdf));
            }
            let moved = policy.power != member.policy.power;
            member.set_policy(policy, now);
            if moved {
                let event = if too_deep(member.power, policy.power) {
                    PowerEvent::Restrain
                } else {
                    PowerEvent::Reconsider
                };
                member.apply(event, now);
            }
            policy
        };
        log::info!("power {bdf}: policy changed to {policy}");
        self.shared.kick();
        self.shared.publish();
        Ok(policy)
    }

    /// Lets the slot be cut from power again after a device has not come back once. Whether there was a latch.
    pub fn clear_latch(&self) -> bool {
        let now = Instant::now();
        let latched = {
            let mut state = lock(&self.shared.state);
            let latched = state.latched.take();
            if let Some(number) = latched {
                state.members[number].outbox.plain(News::Unlatched, now);
                for member in &mut state.members {
                    member.reset_tried = false;
                    member.apply(PowerEvent::Reconsider, now);
                }
            }
            latched
        };
        if let Some(number) = latched {
            log::info!(
                "power {}: latch cleared; its slot may be cut from power again",
                self.shared.members[number].bdf
            );
            self.shared.kick();
            self.shared.publish();
        }
        latched.is_some()
    }

    /// Ends low power of a function that sleeps, on the worker's thread, and tells the guest as if the device had asked for it. A guest
    /// that wants no wakes of it lets it sleep again after a moment. Whether it slept: nothing is done to one that does not.
    ///
    /// # Errors
    /// There is no such function, or it is lost.
    pub fn wake(&self, bdf: Bdf) -> Result<bool, ControlError> {
        let number = self.shared.by_bdf(bdf)?;
        let sleeps = {
            let mut state = lock(&self.shared.state);
            let member = &mut state.members[number];
            if matches!(member.power.hardware, Hardware::Lost | Hardware::Resetting) {
                return Err(ControlError::Lost(bdf));
            }
            let sleeps = matches!(member.power.hardware, Hardware::LowPower | Hardware::Entering);
            member.wake.wanted = sleeps;
            sleeps
        };
        self.shared.kick();
        Ok(sleeps)
    }

    /// Resets a lost device on the worker's thread. The report and the log say what came of it. The latch stays.
    ///
    /// # Errors
    /// There is no such function, or it is not lost.
    pub fn recover(&self, bdf: Bdf) -> Result<(), ControlError> {
        let number = self.shared.by_bdf(bdf)?;
        {
            let mut state = lock(&self.shared.state);
            let member = &mut state.members[number];
            if member.power.hardware != Hardware::Lost {
                return Err(ControlError::NotLost(bdf));
            }
            member.apply(PowerEvent::Recover, Instant::now());
        }
        self.shared.kick();
        self.shared.publish();
        Ok(())
    }
}

impl Shared {
    fn by_bdf(&self, bdf: Bdf) -> Result<usize, ControlError> {
        self.members.iter().position(|member| member.bdf == bdf).ok_or(ControlError::NoFunction(bdf))
    }

    /// Keeps the slot from low power from now on, because this function did not come back. Whether it was not so already.
    pub(super) fn latch(&self, state: &mut DomainState, number: usize, now: Instant) -> bool {
        let first = state.latched.is_none();
        if first {
            state.latched = Some(number);
            state.members[number].outbox.plain(News::Latched, now);
        }
        first
    }
}

/// Whether hardware is where this policy does not let it be.
fn too_deep(power: PowerState, choice: PowerChoice) -> bool {
    match choice {
        PowerChoice::Auto => false,
        PowerChoice::D3hot => power.hardware == Hardware::LowPower,
        PowerChoice::Off => {
            matches!(power.hardware, Hardware::LowPower | Hardware::Shallow)
                || (power.want == Want::D3hot && power.hardware == Hardware::D3hot)
        }
    }
}

#[cfg(test)]
mod tests;
