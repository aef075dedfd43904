//! What a hostile driver does to a virtio block device: its rings, requests, configuration, resets, pauses and new sizes.
//!
//! A tame driver makes whole requests, and the disk is held against a plain model of it. A wild one writes anything into the rings, and then only
//! what nobody may do counts: no panic, no wait without end, no write to a disk that is only read.
#![no_main]

use std::fs::{self, File};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use arbitrary::Arbitrary;
use devices::block::{Disk, DiskSpec, ImageType};
use devices::virtio::block::{Block, BlockOptions};
use devices::virtio::device::{Active, F_RINGS, VirtioDevice};
use devices::virtio::ring::RingFeatures;
use devices::virtio::testing::{DriverQueue, Interrupts, activation, memory};
use devices::virtio::{Memory, MemoryView};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

const SECTORS: u64 = 64;
const QUEUE: u16 = 16;
const RING: u64 = 0x1_0000;
const HEADER: u64 = 0x4_0000;
const STATUS: u64 = 0x5_0000;
const DATA: u64 = 0x10_0000;
/// VIRTIO_BLK_F_FLUSH and VIRTIO_BLK_F_CONFIG_WCE.
const FEATURES: u64 = F_RINGS | 1 << 9 | 1 << 11;
const STEPS: usize = 24;
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Arbitrary, Debug)]
enum Step {
    /// Read or write so many sectors.
    Access {
        write: bool,
        sector: u8,
        count: u8,
        byte: u8,
        cut: u8,
    },
    /// Discard or write zeroes.
    Range {
        discard: bool,
        sector: u8,
        count: u8,
        flags: u8,
    },
    /// Any type, with a header of any kind.
    Odd {
        kind: u8,
        sector: u64,
        readable: u16,
        writable: u16,
    },
    Config {
        offset: u16,
        bytes: [u8; 4],
    },
    Resize {
        sectors: u8,
    },
    Pause,
    Reset,
    /// Bytes anywhere in the ring (wild).
    Scribble {
        at: u16,
        bytes: [u8; 8],
    },
    /// A descriptor (wild).
    Descriptor {
        place: u8,
        address: u32,
        len: u32,
        flags: u16,
        next: u8,
    },
    /// A chain made available, or an index written (wild, split rings).
    Available {
        head: u16,
        index: Option<u16>,
    },
}

#[derive(Arbitrary, Debug)]
struct Input {
    wild: bool,
    packed: bool,
    event_idx: bool,
    readonly: bool,
    plain_io: bool,
    direct: bool,
    steps: Vec<Step>,
}

struct Bench {
    device: Block,
    memory: Memory,
    queue: DriverQueue,
    interrupts: Arc<Interrupts>,
    active: Option<Box<dyn Active>>,
    form: RingFeatures,
    model: Vec<u8>,
    readonly: bool,
    wild: bool,
}

impl Bench {
    fn view(&self) -> MemoryView {
        self.memory.memory()
    }

    fn activate(&mut self) {
        self.active = None;
        self.queue = DriverQueue::new(&self.memory, RING, QUEUE, self.form);
        // A ring begins with nothing in it.
        self.view().write_slice(&[0; 0x8000], GuestAddress(RING)).expect("memory");
        self.interrupts = Arc::new(Interrupts::default());
        let queues = std::slice::from_ref(&self.queue);
        let activation = activation(&self.memory, FEATURES, queues, &self.interrupts);
        self.active = Some(self.device.activate(activation).expect("one queue is enough"));
    }

    /// Returns when all that was rung for has been looked at.
    fn settle(&self) {
        let active = self.active.as_ref().expect("active");
        for _ in 0..2 {
            active.pause();
            active.resume();
        }
    }

    fn stopped(&self) -> bool {
        !self.interrupts.seen().stopped.is_empty()
    }

    /// A whole request; its status.
    fn request(&mut self, kind: u32, sector: u64, parts: &[(u64, u32, bool)]) -> Option<u8> {
        let view = self.view();
        view.write_obj(u64::from(kind).to_le(), GuestAddress(HEADER)).expect("memory");
        view.write_obj(sector.to_le(), GuestAddress(HEADER + 8)).expect("memory");
        view.write_obj(0xff_u8, GuestAddress(STATUS)).expect("memory");
        self.queue.add(parts);
        self.queue.ring();
        if self.wild {
            self.settle();
            // With what was scribbled, nobody knows what is a chain and what has come back.
            self.activate();
            return None;
        }
        assert!(self.queue.wait_used().is_some(), "no answer");
        let status: u8 = view.read_obj(GuestAddress(STATUS)).expect("memory");
        assert!(status <= 2, "status {status}");
        Some(status)
    }

    fn bytes(&self, sector: u64, count: u64) -> Option<std::ops::Range<usize>> {
        let range = (sector * 512) as usize..((sector + count) * 512) as usize;
        (range.end <= self.model.len()).then_some(range)
    }

    fn access(&mut self, write: bool, sector: u64, count: u64, byte: u8, cut: u64) {
        let len = count * 512;
        let bytes: Vec<u8> = (0..len).map(|i| byte.wrapping_add((i / 64) as u8)).collect();
        let fill = if write { bytes.clone() } else { vec![0xee; len as usize] };
        self.view().write_slice(&fill, GuestAddress(DATA)).expect("memory");
        // In two pieces.
        let cut = cut.min(len);
        let parts = [
            (HEADER, 16, false),
            (DATA, cut as u32, !write),
            (DATA + cut, (len - cut) as u32, !write),
            (STATUS, 1, true),
        ];
        let Some(status) = self.request(u32::from(write), sector, &parts) else { return };
        let Some(range) = self.bytes(sector, count).filter(|_| !(write && self.readonly)) else {
            assert_eq!(status, 1, "sector {sector}, {count} of them");
            return;
        };
        assert_eq!(status, 0, "sector {sector}, {count} of them");
        if write {
            self.model[range].copy_from_slice(&bytes);
        } else {
            let mut now = vec![0; len as usize];
            self.view().read_slice(&mut now, GuestAddress(DATA)).expect("memory");
            assert_eq!(now, self.model[range], "sector {sector}");
        }
    }

    fn range(&mut self, discard: bool, sector: u64, count: u64, flags: u32) {
        let view = self.view();
        view.write_obj(sector.to_le(), GuestAddress(DATA)).expect("memory");
        view.write_obj((count as u32).to_le(), GuestAddress(DATA + 8)).expect("memory");
        view.write_obj(flags.to_le(), GuestAddress(DATA + 12)).expect("memory");
        let kind = if discard { 11 } else { 13 };
        let parts = [(HEADER, 16, false), (DATA, 16, false), (STATUS, 1, true)];
        let Some(status) = self.request(kind, 0, &parts) else { return };
        if flags > u32::from(!discard) {
            assert_eq!(status, 2);
        } else if let Some(range) = self.bytes(sector, count).filter(|_| !self.readonly) {
            assert_eq!(status, 0);
            // A hole in a file reads as zeroes.
            self.model[range].fill(0);
        } else {
            assert_eq!(status, 1);
        }
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Access { write, sector, count, byte, cut } => {
                self.access(write, sector.into(), u64::from(count % 9), byte, u64::from(cut) * 8);
            }
            Step::Range { discard, sector, count, flags } => {
                self.range(discard, sector.into(), u64::from(count % 32), u32::from(flags % 3));
            }
            Step::Odd { kind, sector, readable, writable } => {
                // Not those that the model knows, but with a place for header and status.
                let kind = if matches!(kind, 0 | 1 | 11 | 13) && !self.wild { 77 } else { u32::from(kind) };
                let parts = [
                    (HEADER, 16 + u32::from(readable % 64), false),
                    (DATA, u32::from(writable), true),
                    (STATUS, 1, true),
                ];
                self.request(kind, sector, &parts);
            }
            Step::Config { offset, bytes } => {
                let mut read = bytes;
                self.device.read_config(offset.into(), &mut read);
                self.device.write_config(offset.into(), &bytes);
            }
            Step::Resize { sectors } => {
                let done = self.device.resize(u64::from(sectors) * 512).is_ok();
                assert_eq!(done, !self.readonly);
                if done {
                    self.model.resize(usize::from(sectors) * 512, 0);
                }
            }
            Step::Pause => self.settle(),
            Step::Reset => {
                let active = self.active.as_ref().expect("active");
                active.stop();
                assert!(active.wait_stopped(PATIENCE), "it does not stop");
                self.activate();
            }
            _ if !self.wild => {}
            Step::Scribble { at, bytes } => {
                self.view().write_slice(&bytes, GuestAddress(RING + u64::from(at % 0x7ff0))).expect("memory");
            }
            Step::Descriptor { place, address, len, flags, next } => {
                let at = RING + u64::from(u16::from(place) % QUEUE) * 16;
                let view = self.view();
                view.write_obj(u64::from(address).to_le(), GuestAddress(at)).expect("memory");
                view.write_obj(len.to_le(), GuestAddress(at + 8)).expect("memory");
                view.write_obj(flags.to_le(), GuestAddress(at + 12)).expect("memory");
                view.write_obj(u16::from(next).to_le(), GuestAddress(at + 14)).expect("memory");
            }
            Step::Available { head, index } => {
                if !self.form.packed {
                    match index {
                        Some(index) => self.queue.set_available_index(index),
                        None => self.queue.make_available(head),
                    }
                }
                self.queue.ring();
                self.settle();
                if self.stopped() {
                    self.activate();
                }
            }
        }
    }
}

fn image() -> PathBuf {
    std::env::temp_dir().join(format!("dormouse-fuzz-blk-{}", std::process::id()))
}

fuzz_target!(|input: Input| {
    let path = image();
    // An image of the run before has gone with its device.
    File::create(&path).and_then(|file| file.set_len(SECTORS * 512)).expect("a temporary file");
    let Input { wild, packed, event_idx, readonly, plain_io, direct, steps } = input;
    let spec = DiskSpec { image_type: ImageType::Raw, readonly, direct, ..DiskSpec::new(&path) };
    let disk = Disk::open(&spec).expect("an image");
    let options = BlockOptions {
        num_queues: 1,
        queue_size: QUEUE,
        disable_io_uring: plain_io,
        ..BlockOptions::default()
    };
    let memory = memory();
    let form = RingFeatures { packed, event_idx, indirect: true };
    let mut bench = Bench {
        device: Block::new("fuzz", disk, options),
        queue: DriverQueue::new(&memory, RING, QUEUE, form),
        memory,
        interrupts: Arc::new(Interrupts::default()),
        active: None,
        form,
        model: vec![0; (SECTORS * 512) as usize],
        readonly,
        wild,
    };
    bench.activate();
    for step in steps.iter().take(STEPS) {
        bench.step(step);
        assert!(
            wild || !bench.stopped(),
            "a tame driver's device has stopped: {:?}",
            bench.interrupts.seen()
        );
    }
    bench.active = None;
    let now = fs::read(&path).expect("the image");
    if readonly {
        assert!(
            now.len() as u64 == SECTORS * 512 && now.iter().all(|byte| *byte == 0),
            "a readonly disk was written"
        );
    } else if !wild {
        assert!(now == bench.model, "the image is not what the driver wrote");
    }
    let _ = fs::remove_file(&path);
});
