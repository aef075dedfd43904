//! What a wake by the host leads to: telling the guest, or letting the function sleep again (PCI-PM 1.2, section 3.2.4, PME).
//!
//! A wake takes one path at a time. First the event device: the function's WAKE bit and an interrupt, answered by
//! `Notify(function, 2)`. A guest in suspend-to-idle does not take that interrupt, so a bit that is still unread after a moment
//! is withdrawn and the root port's native PME used instead, which needs the guest's PME_En. A guest that does neither is
//! told again a few times; hardware stays on meanwhile, since a driver may be at work.

use std::time::Instant;

use super::member::{MemberState, TimerKind};
use super::{Shared, lock, millis};
use crate::state::Phase;
use crate::stats::WakeCause;

impl Shared {
    /// A wake: a `new` one, or one kept while the guest was paused or told before.
    pub(super) fn deliver_wake(&self, number: usize, new: bool) {
        let now = Instant::now();
        let told = || {
            if new {
                log::info!("power {}: woken by the host", self.members[number].bdf);
            }
        };
        let policy = {
            let mut state = lock(&self.state);
            let paused = state.paused;
            let member = &mut state.members[number];
            if !is_awake(member) || paused {
                member.wake.deferred = is_awake(member);
                drop(state);
                told();
                return;
            }
            member.policy
        };
        let ignored = policy.hides_wakes();
        let pme_enabled = !ignored && self.spec(number).gate.latch_pme();
        {
            let mut state = lock(&self.state);
            let member = &mut state.members[number];
            if std::mem::take(&mut member.wake.unbooked) {
                member.woken(if pme_enabled { WakeCause::Pme } else { WakeCause::Unknown }, now);
            }
        }
        if pme_enabled || policy.needs_driver {
            self.notify_guest(number, pme_enabled, told);
            return;
        }
        told();
        let wait = {
            let mut state = lock(&self.state);
            let member = &mut state.members[number];
            if !is_awake(member) {
                return;
            }
            // It has been told while it asked for PMEs, and asks no more: it has begun to wake the function, slowly.
            let begun = (1..self.spec.timing.retries.len()).contains(&member.wake.retries);
            if begun && !ignored {
                self.arm_retry(member, now);
                return;
            }
            let wait = member.next_backoff(now, &self.spec.timing);
            member.arm(wait, TimerKind::Reentry, now);
            wait
        };
        let why = if ignored { "by policy" } else { "the guest has not asked for PMEs" };
        log::info!(
            "power {}: wake not delivered, {why}; sleeps again in {}",
            self.members[number].bdf,
            millis(wait)
        );
    }

    /// Sets the WAKE bit and interrupts the guest. `told` logs the wake, for which the guest does not wait.
    fn notify_guest(&self, number: usize, pme_enabled: bool, told: impl FnOnce()) {
        let now = Instant::now();
        let last = {
            let mut state = lock(&self.state);
            let member = &mut state.members[number];
            if !is_awake(member) {
                drop(state);
                told();
                return;
            }
            member.wake.bit = true;
            member.count_notification(now);
            if pme_enabled {
                member.arm(self.spec.timing.confirm, TimerKind::Confirm, now);
            } else {
                self.arm_retry(member, now);
            }
            member.wake.retries > 0 && member.wake.retries >= self.spec.timing.retries.len()
        };
        self.spec.wake.notify();
        told();
        let bdf = self.members[number].bdf;
        log::info!("power {bdf}: PME raised (event device)");
        if last {
            log::warn!(
                "power {bdf}: the guest does not answer wakes; not told again, and stays powered until its next _ON or _OFF"
            );
        }
    }

    /// The guest has had time to read the WAKE register: if it has not, take the root port.
    pub(super) fn confirm_wake(&self, number: usize) {
        {
            let mut state = lock(&self.state);
            let member = &mut state.members[number];
            if !is_awake(member) {
                return;
            }
            self.arm_retry(member, Instant::now());
            if !std::mem::take(&mut member.wake.bit) {
                return;
            }
        }
        let raised = self.spec.pme.pme(self.spec(number).devfn);
        {
            let mut state = lock(&self.state);
            let member = &mut state.members[number];
            if raised {
                member.count_native_pme();
            } else if is_awake(member) {
                // The port has no PME interrupt: the event device is all there is.
                member.wake.bit = true;
            }
        }
        if raised {
            log::info!("power {}: PME raised (root port)", self.members[number].bdf);
        } else {
            self.spec.wake.notify();
        }
    }

    /// The guest was told and has not answered with `_ON`: tell it again, or put the function back if it no longer asks for PMEs.
    pub(super) fn retry_wake(&self, number: usize) {
        {
            let mut state = lock(&self.state);
            let member = &mut state.members[number];
            if !is_awake(member) {
                return;
            }
            member.wake.retries = member.wake.retries.saturating_add(1);
        }
        self.deliver_wake(number, false);
    }

    /// Arms the next attempt to tell the guest; there is none after the last.
    fn arm_retry(&self, member: &mut MemberState, now: Instant) {
        match self.spec.timing.retries.get(member.wake.retries) {
            Some(wait) => member.arm(*wait, TimerKind::Retry, now),
            None => member.timer = None,
        }
    }
}

fn is_awake(member: &MemberState) -> bool {
    member.power.phase() == Phase::Awake
}
