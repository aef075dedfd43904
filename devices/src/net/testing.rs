//! The device without its threads, for fuzzing: whoever holds it says when each of them would have been woken.
#![allow(clippy::unwrap_used, clippy::missing_panics_doc)] // It is a test's.

use std::fs::File;
use std::sync::Arc;

use vmm_sys_util::epoll::EventSet;

use super::control::{Control, Workers};
use super::device::Features;
use super::pair::{PairSpec, QueuePair};
use super::shared::Shared;
use super::tap::Tap;
use crate::virtio::device::{Activation, DeviceError};
use crate::virtio::worker::{Event, Handler, Watch};

/// Queues: to the guest, from it, and for commands.
pub const RECEIVE: u16 = 0;
/// See [`RECEIVE`].
pub const SEND: u16 = 1;
/// See [`RECEIVE`].
pub const CONTROL: u16 = 2;

/// One pair of queues and the control queue.
pub struct Bench {
    pair: QueuePair,
    control: Control,
    watch: Watch,
}

impl std::fmt::Debug for Bench {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Bench")
    }
}

impl Bench {
    /// With `file` where a tap's would be.
    pub fn new(file: File, mut activation: Activation, mergeable: bool) -> Self {
        let tap = Arc::new(Tap::over_files(vec![file]));
        let shared = Arc::new(Shared::new(&tap));
        shared.set_offloads(super::device::offloads_of(activation.features));
        let control_queue = activation.take_queue(CONTROL).unwrap();
        let receive = activation.take_queue(RECEIVE).unwrap();
        let doorbells = vec![Arc::clone(receive.kick())];
        let spec = PairSpec {
            number: 0,
            device: "net".to_owned(),
            file: Arc::clone(&tap.files()[0]),
            receive,
            send: activation.take_queue(SEND).unwrap(),
            limiters: [None, None],
            mergeable,
        };
        let mover = Workers { shared: Arc::clone(&shared), tap: Arc::clone(&tap), doorbells };
        let control = Control {
            broken: Vec::new(),
            device: "net".to_owned(),
            queue: Some(control_queue),
            interrupt: activation.interrupt,
            features: Features(activation.features),
            pairs_max: 1,
            tap,
            shared: Arc::clone(&shared),
            mover: Box::new(mover),
        };
        let watch = Watch::new().unwrap();
        Self { pair: QueuePair::new(spec, &shared).unwrap(), control, watch }
    }

    /// The driver has rung this queue's doorbell.
    ///
    /// # Errors
    /// The device stops.
    pub fn kick(&mut self, queue: u16) -> Result<(), DeviceError> {
        match queue {
            CONTROL => self.control.event(Event::Kick(queue), &self.watch),
            _ => self.pair.event(Event::Kick(queue), &self.watch),
        }
    }

    /// The tap has something to read.
    ///
    /// # Errors
    /// The device stops.
    pub fn tap_readable(&mut self) -> Result<(), DeviceError> {
        self.pair.event(Event::Ready(0, EventSet::IN), &self.watch)
    }

    /// As before a pause.
    pub fn quiesce(&mut self) {
        self.pair.quiesce();
    }
}
