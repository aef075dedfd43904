//! What the host says of a device by itself: it wants it back, or the bus has reported an error of it.
//!
//! Neither is a reason to touch a device that sleeps. One that is on is asked whether it is still there: a device that has been pulled
//! out is taken from the guest at once, before its driver believes all ones.

use std::time::Instant;

use super::{Shared, lock};
use crate::state::{Hardware, PowerEvent};
use crate::stats::FailureKind;

impl Shared {
    /// The eventfd of a function's release request (or, with `error`, of an error) has fired. Worker thread, with no operation under way.
    pub(super) fn host_says(&self, number: usize, error: bool) {
        let Some(member) = self.spec.members.get(number) else { return };
        let (kind, message) = if error {
            let message = "the bus has reported an error of it; see the host's kernel log (AER), and reset the device from the guest or \
                           start the VM again";
            (FailureKind::BusError, message)
        } else {
            let message = "the host wants it back, and waits: its driver is being unbound or it is being removed; stop the VM to let it go";
            (FailureKind::ReleaseWanted, message)
        };
        let now = Instant::now();
        let on = {
            let mut state = lock(&self.state);
            let member = &mut state.members[number];
            member.failed(kind, message.to_owned(), now);
            member.power.hardware == Hardware::D0
        };
        log::error!("power {}: {message}", self.members[number].bdf);
        // After an error the device may be stuck in a way that makes reads of it dangerous to the host.
        if !error && on && !member.gate.answers() {
            self.gone(number, now);
        }
    }

    fn gone(&self, number: usize, now: Instant) {
        let message = "lost: it has left the host while it was on; the guest reads all ones";
        {
            let mut state = lock(&self.state);
            self.latch(&mut state, number, now);
            let member = &mut state.members[number];
            member.failed(FailureKind::Gone, message.to_owned(), now);
            member.apply(PowerEvent::Gone, now);
        }
        log::error!("power {}: {message}", self.members[number].bdf);
        self.sync_gate(number);
        self.lose_gate(number);
    }
}
