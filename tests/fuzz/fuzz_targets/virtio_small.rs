//! The devices of few lines under a hostile driver: entropy, balloon, watchdog (VIRTIO 1.2, sections 5.4 and 5.5). As long as the driver keeps to the
//! rules, each chain comes back once with what belongs into it, also over pauses and resets; else the device stops at most, and a reset helps.

#![no_main]

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use arbitrary::Arbitrary;
use devices::virtio::Memory;
use devices::virtio::balloon::{Balloon, BalloonOptions};
use devices::virtio::device::{Active, F_RINGS, VirtioDevice};
use devices::virtio::discard::Discarder;
use devices::virtio::ring::RingFeatures;
use devices::virtio::rng::Rng;
use devices::virtio::testing::{DriverQueue, Interrupts, activation, memory};
use devices::virtio::watchdog::{CurrentMachine, Watchdog};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

const QUEUES: u64 = 0x1_0000;
const QUEUE_STEP: u64 = 0x1_0000;
const QUEUE_LEN: u16 = 8;
/// Page numbers of a request; buffers; pages that the balloon may take, with a mark in each.
const NUMBERS: u64 = 0x8_0000;
const BUFFERS: u64 = 0x10_0000;
const PAGES: u64 = 0x20_0000;
const PAGE_COUNT: u64 = 64;
const PAGE: u64 = 4096;
const MARK: u8 = 0xa5;
/// VIRTIO_BALLOON_F_REPORTING.
const F_REPORTING: u64 = 1 << 5;

#[derive(Arbitrary, Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Rng,
    Balloon,
    Watchdog,
}

#[derive(Arbitrary, Debug)]
struct Input {
    kind: Kind,
    packed: bool,
    event_idx: bool,
    #[arbitrary(with = fuzz::steps::<Step, 60>)]
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    /// As many chains as drivers send at once, of buffers for the device to write or, for the balloon, of page numbers and of pages.
    Send {
        queue: u8,
        count: u8,
        len: u16,
        pages: [u8; 6],
    },
    /// Configuration.
    Config {
        offset: u8,
        len: u8,
        value: u64,
    },
    /// A pause, and chains that come meanwhile.
    Pause {
        queue: u8,
        len: u16,
    },
    /// The driver starts anew, with rings of this form.
    Reset {
        packed: bool,
        event_idx: bool,
    },
    Resize {
        mib: u16,
    },
    /// A chain of any form.
    Chain {
        queue: u8,
        parts: [(u32, u32, bool); 3],
    },
    /// Something else in a ring's memory.
    Poke {
        queue: u8,
        offset: u16,
        value: u16,
    },
}

struct Model {
    kind: Kind,
    device: Arc<dyn VirtioDevice>,
    memory: Memory,
    interrupts: Arc<Interrupts>,
    queues: Vec<DriverQueue>,
    active: Option<Box<dyn Active>>,
    hostile: bool,
}

impl Model {
    fn start(&mut self, form: RingFeatures) {
        self.active = None;
        let count = self.device.queue_sizes().len() as u64;
        let view = self.memory.memory();
        view.write_slice(&[0; (3 * QUEUE_STEP) as usize], GuestAddress(QUEUES)).expect("memory");
        self.queues = (0..count)
            .map(|n| DriverQueue::new(&self.memory, QUEUES + n * QUEUE_STEP, QUEUE_LEN, form))
            .collect();
        self.interrupts = Arc::default();
        let features = F_RINGS | self.device.features() & F_REPORTING;
        let activation = activation(&self.memory, features, &self.queues, &self.interrupts);
        self.active = Some(self.device.activate(activation).expect("rings that are right"));
        self.hostile = false;
        for page in 0..PAGE_COUNT {
            view.write_obj(MARK, GuestAddress(PAGES + page * PAGE)).expect("memory");
        }
    }

    fn queue(&self, queue: u8) -> usize {
        usize::from(queue) % self.queues.len()
    }

    /// Sends chains and checks each that comes back.
    fn send(&mut self, queue: u8, count: u8, len: u16, pages: [u8; 6], pause: bool) {
        let number = self.queue(queue);
        let view = self.memory.memory();
        let pages = pages.map(|page| u64::from(page) % PAGE_COUNT);
        let mut taken = Vec::new();
        let parts = match (self.kind, number) {
            (Kind::Balloon, 2) => {
                taken.extend(pages);
                pages.iter().take(2).map(|page| (PAGES + page * PAGE, PAGE as u32, true)).collect()
            }
            (Kind::Balloon, number) => {
                for (at, page) in (0..).zip(pages) {
                    let frame = u32::try_from(PAGES / PAGE + page).expect("a small number");
                    view.write_obj(frame.to_le(), GuestAddress(NUMBERS + at * 4)).expect("memory");
                }
                if number == 0 {
                    taken.extend(pages);
                }
                // The end of the request may cut a number short.
                let len = u32::from(len) % 25;
                taken.truncate(len as usize / 4);
                vec![(NUMBERS, len, false)]
            }
            _ => vec![(BUFFERS, u32::from(len), true)],
        };
        if (self.kind, number) == (Kind::Balloon, 2) {
            taken.truncate(2);
        }
        let before: Vec<u8> = self.marks();
        if pause && let Some(active) = &self.active {
            active.pause();
        }
        let count = usize::from(count) % 4 + 1;
        let mut sent = HashMap::new();
        for _ in 0..count {
            sent.insert(self.queues[number].add(&parts), ());
        }
        self.queues[number].ring();
        if pause && let Some(active) = &self.active {
            assert!(self.queues[number].used().is_none(), "a paused device gives nothing back");
            active.resume();
        }
        for _ in 0..count {
            let used = self.queues[number].wait_used();
            let stopped = self.interrupts.seen().stopped;
            let Some((id, written)) = used else { panic!("not all came back; stopped: {stopped:?}") };
            assert!(sent.remove(&id).is_some(), "chain {id} came back twice");
            let right = match self.kind {
                Kind::Rng => (len == 0) == (written == 0) && written <= u32::from(len),
                Kind::Watchdog => written == u32::from(len.min(1)),
                Kind::Balloon => written == 0,
            };
            assert!(right, "{written} bytes written of {len}");
        }
        for (page, (before, after)) in (0..).zip(before.into_iter().zip(self.marks())) {
            let expected = if taken.contains(&page) { 0 } else { before };
            assert_eq!(after, expected, "page {page}");
        }
    }

    fn marks(&self) -> Vec<u8> {
        let view = self.memory.memory();
        (0..PAGE_COUNT)
            .map(|page| view.read_obj(GuestAddress(PAGES + page * PAGE)).expect("memory"))
            .collect()
    }

    fn run(&mut self, step: &Step) {
        match *step {
            Step::Send { queue, count, len, pages } if !self.hostile => {
                self.send(queue, count, len, pages, false);
            }
            Step::Pause { queue, len } => {
                if !self.hostile {
                    self.send(queue, 0, len, [0; 6], true);
                } else if let Some(active) = &self.active {
                    active.pause();
                    active.resume();
                }
            }
            Step::Config { offset, len, value } => {
                let bytes = value.to_le_bytes();
                let len = usize::from(len) % 9;
                self.device.write_config(offset.into(), &bytes[..len]);
                self.device.read_config(offset.into(), &mut [0; 8][..len]);
                let _ = self.device.withheld_memory();
            }
            Step::Reset { packed, event_idx } => {
                self.start(RingFeatures { packed, event_idx, indirect: true });
            }
            Step::Resize { mib } => drop(self.device.resize(u64::from(mib) << 20)),
            Step::Chain { queue, parts } => {
                if !self.hostile {
                    self.hostile = true;
                    let parts = parts.map(|(address, len, writable)| (address.into(), len, writable));
                    let number = self.queue(queue);
                    self.queues[number].add(&parts);
                    self.queues[number].ring();
                }
            }
            Step::Poke { queue, offset, value } => {
                self.hostile = true;
                let number = self.queue(queue);
                let place = QUEUES + number as u64 * QUEUE_STEP + u64::from(offset % 0x7000);
                self.memory.memory().write_obj(value, GuestAddress(place)).expect("memory");
                self.queues[number].ring();
            }
            Step::Send { .. } => {}
        }
    }
}

fuzz_target!(|input: Input| {
    let device: Arc<dyn VirtioDevice> = match input.kind {
        Kind::Rng => Arc::new(Rng::new("rng", Path::new("/dev/urandom")).expect("the host's own")),
        Kind::Balloon => {
            let options = BalloonOptions { deflate_on_oom: true, free_page_reporting: true };
            Arc::new(Balloon::new("balloon", 0, options, Arc::new(Discarder::default())))
        }
        Kind::Watchdog => Arc::new(Watchdog::new("watchdog", Arc::new(CurrentMachine::default()))),
    };
    let mut model = Model {
        kind: input.kind,
        device,
        memory: memory(),
        interrupts: Arc::default(),
        queues: Vec::new(),
        active: None,
        hostile: false,
    };
    let form = RingFeatures { packed: input.packed, event_idx: input.event_idx, indirect: true };
    model.start(form);
    for step in &input.steps {
        model.run(step);
        assert!(model.hostile || model.interrupts.seen().stopped.is_empty(), "the device has stopped");
    }
    // Whatever was done to it.
    model.start(form);
    model.send(0, 0, 16, [1, 2, 3, 4, 5, 6], false);
});
