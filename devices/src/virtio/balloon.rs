//! The traditional memory balloon (VIRTIO 1.2, section 5.5): the guest gives pages up, as many as it is asked for, and reports those that it does not
//! use at the moment.
//!
//! While an assigned device has the guest's memory pinned, nothing is given back to the host: the guest's balloon grows and shrinks as
//! asked, and the pages stay where they are. See [`discard`](super::discard).

use std::io::Read;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use log::warn;
use vmm_sys_util::eventfd::EventFd;

use super::MemoryView;
use super::chain::Chain;
use super::device::{Activation, Active, DeviceError, DeviceType, F_RINGS, Interrupt, Saved, VirtioDevice};
use super::discard::{Discarder, PAGE_SIZE};
use super::queue::{ActiveQueue, Served};
use super::worker::{Event, Handler, Watch, Worker};

const QUEUE_SIZE: u16 = 128;
const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
/// The queues that are not there have no numbers, so this one comes third.
const REPORTING: u16 = 2;

const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_PAGE_REPORTING: u64 = 1 << 5;

/// Offset of `actual` in the configuration, which is two 32-bit numbers of pages.
const ACTUAL: u64 = 4;
/// Page numbers in one request that are looked at, so that no request takes for ever. Linux sends 256.
const PAGES_MAX: usize = 1 << 15;

/// What the guest may do of its own accord.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BalloonOptions {
    /// Take pages back when it has no others.
    pub deflate_on_oom: bool,
    /// Tell of pages that are free.
    pub free_page_reporting: bool,
}

/// The device.
#[derive(Debug)]
pub struct Balloon {
    name: String,
    options: BalloonOptions,
    discarder: Arc<Discarder>,
    shared: Arc<Shared>,
    /// The way to the driver while there is one.
    interrupt: Mutex<Option<Arc<dyn Interrupt>>>,
}

#[derive(Debug)]
struct Shared {
    /// Pages that the guest is asked to give up.
    wanted: AtomicU32,
    /// Pages that it says it has given up.
    actual: AtomicU32,
    complained: AtomicBool,
}

impl Balloon {
    /// A balloon that asks for `size` bytes.
    pub fn new(name: &str, size: u64, options: BalloonOptions, discarder: Arc<Discarder>) -> Self {
        let shared = Shared {
            wanted: AtomicU32::new(pages(size)),
            actual: AtomicU32::new(0),
            complained: AtomicBool::new(false),
        };
        Self {
            name: name.to_owned(),
            options,
            discarder,
            shared: Arc::new(shared),
            interrupt: Mutex::new(None),
        }
    }
}

/// Whole pages in `size` bytes.
fn pages(size: u64) -> u32 {
    u32::try_from(size / PAGE_SIZE).unwrap_or(u32::MAX)
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> DeviceType {
        DeviceType::BALLOON
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; if self.options.free_page_reporting { 3 } else { 2 }]
    }

    fn features(&self) -> u64 {
        let mut features = F_RINGS;
        if self.options.deflate_on_oom {
            features |= F_DEFLATE_ON_OOM;
        }
        if self.options.free_page_reporting {
            features |= F_PAGE_REPORTING;
        }
        features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 8];
        config[..4].copy_from_slice(&self.shared.wanted.load(Ordering::Acquire).to_le_bytes());
        config[4..].copy_from_slice(&self.shared.actual.load(Ordering::Acquire).to_le_bytes());
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        config.iter().skip(from).zip(data).for_each(|(value, byte)| *byte = *value);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        if let (ACTUAL, Ok(actual)) = (offset, <[u8; 4]>::try_from(data)) {
            self.shared.actual.store(u32::from_le_bytes(actual), Ordering::Release);
        }
    }

    fn activate(&self, mut activation: Activation) -> Result<Box<dyn Active>, DeviceError> {
        let inflate = activation.take_queue(INFLATE)?;
        let deflate = activation.take_queue(DEFLATE)?;
        let reporting =
            if activation.has(F_PAGE_REPORTING) { Some(activation.take_queue(REPORTING)?) } else { None };
        let interrupt = Arc::clone(&activation.interrupt);
        *self.interrupt.lock().unwrap_or_else(PoisonError::into_inner) = Some(interrupt);
        let handler = Servant {
            name: self.name.clone(),
            inflate,
            deflate,
            reporting,
            discarder: Arc::clone(&self.discarder),
            shared: Arc::clone(&self.shared),
        };
        Ok(Box::new(Worker::start(&self.name, Box::new(handler), activation.interrupt)?))
    }

    fn resize(&self, size: u64) -> Result<(), String> {
        self.shared.wanted.store(pages(size), Ordering::Release);
        if let Some(interrupt) = &*self.interrupt.lock().unwrap_or_else(PoisonError::into_inner) {
            interrupt.config();
        }
        Ok(())
    }

    fn withheld_memory(&self) -> u64 {
        u64::from(self.shared.actual.load(Ordering::Acquire)) * PAGE_SIZE
    }

    fn save(&self) -> Result<Saved, String> {
        let load = |count: &AtomicU32| count.load(Ordering::Acquire);
        Ok(serde_json::json!({ "wanted": load(&self.shared.wanted), "actual": load(&self.shared.actual) }))
    }

    fn restore(&self, saved: &Saved) -> Result<(), String> {
        for (name, place) in [("wanted", &self.shared.wanted), ("actual", &self.shared.actual)] {
            let count = saved[name].as_u64().and_then(|count| u32::try_from(count).ok());
            place.store(count.ok_or_else(|| format!("{name} is no number of pages"))?, Ordering::Release);
        }
        Ok(())
    }
}

struct Servant {
    name: String,
    inflate: ActiveQueue,
    deflate: ActiveQueue,
    reporting: Option<ActiveQueue>,
    discarder: Arc<Discarder>,
    shared: Arc<Shared>,
}

impl Drop for Servant {
    fn drop(&mut self) {
        // After a reset the guest has all of its memory: one that did not deflate before, as in a hard reboot, says nothing of it.
        self.shared.actual.store(0, Ordering::Release);
    }
}

impl Handler for Servant {
    fn doorbells(&self) -> Vec<(u16, Arc<EventFd>)> {
        let queues = [Some(&self.inflate), Some(&self.deflate), self.reporting.as_ref()];
        queues.into_iter().flatten().map(|queue| (queue.index(), Arc::clone(queue.kick()))).collect()
    }

    fn event(&mut self, event: Event, _watch: &Watch) -> Result<(), DeviceError> {
        let Self { name, inflate, deflate, reporting, discarder, shared } = self;
        let give = |view: &MemoryView, address: u64, len: u64| {
            if let Err(e) = discarder.discard(view, address, len)
                && !shared.complained.swap(true, Ordering::Relaxed)
            {
                warn!("device {name}: memory that the guest has given up cannot be given to the host: {e}");
            }
        };
        match event {
            Event::Kick(INFLATE) => inflate.serve::<DeviceError>(|view, chain| {
                for (first, count) in runs(&page_numbers(view, &chain)?) {
                    let address = u64::from(first).saturating_mul(PAGE_SIZE);
                    give(view, address, u64::from(count).saturating_mul(PAGE_SIZE));
                }
                Ok(Served::Done(chain, 0))
            }),
            // Pages that the guest takes back are there again when it touches them.
            Event::Kick(DEFLATE) => deflate.serve::<DeviceError>(|_, chain| Ok(Served::Done(chain, 0))),
            Event::Kick(_) => match reporting {
                Some(queue) => queue.serve::<DeviceError>(|view, chain| {
                    for buffer in chain.writable() {
                        give(view, buffer.address.0, buffer.len.into());
                    }
                    Ok(Served::Done(chain, 0))
                }),
                None => Ok(true),
            },
            Event::Ready(..) => Ok(true),
        }
        .map(drop)
    }
}

/// The page numbers of a request.
fn page_numbers(view: &MemoryView, chain: &Chain) -> Result<Vec<u32>, DeviceError> {
    let count = usize::try_from(chain.readable_len() / 4).unwrap_or(0).min(PAGES_MAX);
    let mut bytes = vec![0; count * 4];
    chain.reader(view).read_exact(&mut bytes).map_err(DeviceError::host("reading page numbers"))?;
    Ok(bytes.as_chunks().0.iter().map(|number| u32::from_le_bytes(*number)).collect())
}

/// Neighbouring pages, in either direction, as first page and count: a call to the kernel for each page would take too long.
fn runs(numbers: &[u32]) -> Vec<(u32, u32)> {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for &number in numbers {
        match runs.last_mut() {
            Some((first, count)) if first.checked_add(*count) == Some(number) => *count += 1,
            Some((first, count)) if number.checked_add(1) == Some(*first) => {
                (*first, *count) = (number, *count + 1)
            }
            _ => runs.push((number, 1)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

    use super::super::testing::{DriverQueue, Interrupts, activation, forms, memory};
    use super::*;

    const DATA: u64 = 0x20_0000;

    #[test]
    fn neighbouring_pages_are_given_back_at_once() {
        assert_eq!(runs(&[5, 6, 7, 3, 2, 9]), [(5, 3), (2, 2), (9, 1)]);
        assert_eq!(runs(&[u32::MAX, 0]), [(u32::MAX, 1), (0, 1)]);
        assert_eq!(runs(&[]), []);
    }

    #[test]
    fn pages_that_are_given_up_or_reported_free_are_given_to_the_host_unless_pinned() {
        for features in forms() {
            let memory = memory();
            let interrupts = Arc::new(Interrupts::default());
            let discarder = Arc::new(Discarder::default());
            let options = BalloonOptions { deflate_on_oom: true, free_page_reporting: true };
            let balloon = Balloon::new("__balloon", 8192, options, Arc::clone(&discarder));
            let mut queues: Vec<_> =
                (0..3).map(|n| DriverQueue::new(&memory, 0x10_0000 + n * 0x1_0000, 16, features)).collect();
            let negotiated = F_PAGE_REPORTING | F_RINGS;
            let _active = balloon.activate(activation(&memory, negotiated, &queues, &interrupts)).unwrap();
            let view = memory.memory();
            let mark = |address: u64| view.write_obj(5_u8, GuestAddress(address)).unwrap();
            let marked = |address: u64| view.read_obj::<u8>(GuestAddress(address)).unwrap() == 5;
            let (page, free) = (0x40_0000, 0x50_0000);
            for pinned in [false, true] {
                let _pin = pinned.then(|| Discarder::pinned(&discarder));
                mark(page);
                mark(free);
                // With one that is in no memory, and one beyond all addresses.
                for (at, number) in [(0, 0x400_u32), (4, 0x900), (8, u32::MAX)] {
                    view.write_obj(number.to_le(), GuestAddress(DATA + at)).unwrap();
                }
                queues[0].add(&[(DATA, 12, false)]);
                queues[0].ring();
                assert!(queues[0].wait_used().is_some(), "{features:?}");
                assert_eq!(marked(page), pinned, "{features:?}");
                queues[1].add(&[(DATA, 12, false)]);
                queues[1].ring();
                assert!(queues[1].wait_used().is_some(), "{features:?}");
                queues[2].add(&[(free, 8192, true)]);
                queues[2].ring();
                assert!(queues[2].wait_used().is_some(), "{features:?}");
                assert_eq!(marked(free), pinned, "{features:?}");
            }
            assert!(interrupts.seen().stopped.is_empty());
        }
    }

    #[test]
    fn a_new_size_is_told_to_the_driver_and_what_it_gives_up_is_counted() {
        let balloon = Balloon::new("__balloon", 4096, BalloonOptions::default(), Arc::default());
        let mut config = [0; 10];
        balloon.read_config(0, &mut config);
        assert_eq!(config, [1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let memory = memory();
        let interrupts = Arc::new(Interrupts::default());
        let queues: Vec<_> =
            (0..2).map(|n| DriverQueue::new(&memory, 0x10_0000 + n * 0x1_0000, 16, forms()[0])).collect();
        let active = balloon.activate(activation(&memory, F_RINGS, &queues, &interrupts)).unwrap();
        balloon.resize(3 << 20).unwrap();
        assert_eq!(interrupts.seen().config, 1);
        balloon.write_config(4, &0x300_u32.to_le_bytes());
        assert_eq!(balloon.withheld_memory(), 3 << 20);
        let saved = balloon.save().unwrap();
        let other = Balloon::new("__balloon", 0, BalloonOptions::default(), Arc::default());
        other.restore(&saved).unwrap();
        assert_eq!(other.withheld_memory(), 3 << 20);
        assert!(other.restore(&Saved::Null).is_err());
        drop(active);
        assert_eq!(balloon.withheld_memory(), 0, "after a reset the guest has all of its memory");
    }
}
