//! What the thread of one queue does.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{debug, info, warn};
use rustix::thread::CpuSet;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use vm_memory::Permissions;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::Shared;
use super::request::{Range, Request, Status, put_id, put_status, read_data, write_data};
use crate::block::raw::Way;
use crate::block::uring::{Operation, Uring};
use crate::block::{Buffers, Image};
use crate::virtio::MemoryView;
use crate::virtio::chain::Chain;
use crate::virtio::device::DeviceError;
use crate::virtio::queue::{ActiveQueue, Served};
use crate::virtio::worker::{Event, Handler, Watch};

/// Tokens of what the thread sleeps on beside its doorbell.
const RING: u32 = 0;
const TIMER: u32 = 1;
const IDLE: u32 = 2;

/// How long a queue must have nothing to do before its thread is changed for one that the kernel has no workers for.
const IDLE_TIME: Duration = Duration::from_secs(2);

/// The work on one queue.
pub(super) struct QueueTask {
    /// Dropped before what its operations use.
    ring: Option<Uring<Flight>>,
    queue: ActiveQueue,
    shared: Arc<Shared>,
    cpus: Vec<usize>,
    by_uring: bool,
    /// Rings when a limit lets the next request through. Not running unless one waits for that.
    timer: Option<OwnedFd>,
    /// What has finished and could not be given back: never more than one round's.
    done: VecDeque<(Flight, io::Result<()>)>,
    idle: Option<IdleWatch>,
}

/// Finds out when there is nothing to do any more. For operations that would have to wait, io_uring has a thread of the kernel's, one of
/// which stays as long as the thread that began them and wakes every five seconds for nothing (fs/io_uring/io-wq.c). So it is made to go.
struct IdleWatch {
    timer: OwnedFd,
    /// It is to ring: the kernel has been asked for something since this thread is there.
    set: bool,
    /// It has been asked again since the timer was set.
    busy: bool,
    /// Long enough without.
    over: bool,
}

/// A request that the host's kernel has.
struct Flight {
    chain: Chain,
    kind: Kind,
    begun: Instant,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read(u64),
    Write(u64),
    Flush,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Read(_) => "a read",
            Self::Write(_) => "a write",
            Self::Flush => "a flush",
        }
    }
}

/// What is served, without the queue that it comes from.
struct Desk<'a> {
    ring: &'a mut Option<Uring<Flight>>,
    shared: &'a Shared,
    timer: Option<&'a OwnedFd>,
}

impl QueueTask {
    pub(super) fn new(queue: ActiveQueue, shared: Arc<Shared>, cpus: Vec<usize>, by_uring: bool) -> Self {
        Self { ring: None, queue, shared, cpus, by_uring, timer: None, done: VecDeque::new(), idle: None }
    }

    fn serve(&mut self) -> Result<(), DeviceError> {
        loop {
            let Self { ring, queue, shared, timer, .. } = self;
            let mut desk = Desk { ring, shared, timer: timer.as_ref() };
            queue.serve(|view, chain| desk.serve(view, chain))?;
            // Much has finished by the time that it is begun: what is in the host's cache.
            if !self.submit_and_reap()? {
                return Ok(());
            }
        }
    }

    /// Tells the kernel what has been begun and gives back what has finished; whether requests may have waited for that.
    fn submit_and_reap(&mut self) -> Result<bool, DeviceError> {
        let mut was_full = false;
        loop {
            let Some(ring) = &mut self.ring else { return Ok(false) };
            was_full |= ring.is_full();
            let asks = !ring.is_idle();
            ring.submit().map_err(DeviceError::host("io_uring"))?;
            let left = ring.waiting();
            while let Some(finished) = ring.finished() {
                self.done.push_back(finished);
            }
            // What was done in part is begun anew at once.
            let again = ring.waiting() > left;
            if !again && ring.is_held_up() {
                self.queue.ring_own_doorbell();
            }
            if asks {
                self.note_use();
            }
            self.give_back()?;
            if !again {
                break;
            }
        }
        Ok(was_full && self.ring.as_ref().is_some_and(|ring| !ring.is_full()))
    }

    /// Something has been asked of the kernel.
    fn note_use(&mut self) {
        if let Some(idle) = &mut self.idle {
            idle.busy = true;
            if !std::mem::replace(&mut idle.set, true) {
                idle.set_again();
            }
        }
    }

    fn give_back(&mut self) -> Result<(), DeviceError> {
        if self.done.is_empty() {
            return Ok(());
        }
        let view = self.queue.view();
        while let Some((Flight { chain, kind, begun }, result)) = self.done.pop_front() {
            let (status, written) = self.shared.settle(kind, begun, result);
            put_status(&view, &chain, status)?;
            self.queue.push(&view, chain, written)?;
        }
        Ok(self.queue.notify(&view)?)
    }
}

impl Handler for QueueTask {
    fn doorbells(&self) -> Vec<(u16, Arc<EventFd>)> {
        vec![(self.queue.index(), Arc::clone(self.queue.kick()))]
    }

    fn start(&mut self, watch: &Watch) -> Result<(), DeviceError> {
        self.settle_down();
        if self.by_uring {
            match Uring::new(self.queue.layout().size) {
                Ok(ring) => {
                    watch.add(&ring, EventSet::IN, RING).map_err(DeviceError::host("watching io_uring"))?;
                    self.ring = Some(ring);
                    self.idle = Some(IdleWatch::new(watch)?);
                }
                // Kernels can be built or told to do without.
                Err(e) => info!("disk {}: goes without io_uring: {e}", self.shared.name),
            }
        }
        if self.shared.limiter.is_some() {
            self.timer = Some(timer(watch, TIMER)?);
        }
        Ok(())
    }

    fn event(&mut self, event: Event, _watch: &Watch) -> Result<(), DeviceError> {
        match event {
            Event::Kick(_) => self.serve(),
            Event::Ready(TIMER, _) => {
                if let Some(timer) = &self.timer {
                    // How often it has rung does not matter, and nothing is lost if it has not.
                    let _ = rustix::io::read(timer, &mut [0_u8; 8]);
                }
                self.serve()
            }
            Event::Ready(IDLE, _) => {
                if let Some(idle) = &mut self.idle {
                    idle.rings();
                }
                Ok(())
            }
            Event::Ready(..) => {
                if self.submit_and_reap()? {
                    self.serve()?;
                }
                Ok(())
            }
        }
    }

    fn wants_new_thread(&mut self) -> bool {
        let is_idle = self.done.is_empty() && self.ring.as_ref().is_none_or(Uring::is_idle);
        let over = self.idle.as_ref().is_some_and(|idle| idle.over) && is_idle;
        if over {
            // Made anew by the thread that will use it.
            (self.ring, self.idle, self.timer) = (None, None, None);
        }
        over
    }

    fn quiesce(&mut self) {
        while let Some(ring) = &mut self.ring {
            if ring.is_idle() {
                break;
            }
            let waited = ring.wait();
            while let Some(finished) = ring.finished() {
                self.done.push_back(finished);
            }
            if let Err(e) = waited {
                warn!("disk {}: its requests cannot be waited for: {e}", self.shared.name);
                self.ring = None;
            }
            if let Err(e) = self.give_back() {
                self.done.clear();
                self.queue.interrupt().needs_reset(&e.to_string());
            }
        }
    }
}

impl IdleWatch {
    fn new(watch: &Watch) -> Result<Self, DeviceError> {
        Ok(Self { timer: timer(watch, IDLE)?, set: false, busy: false, over: false })
    }

    fn set_again(&mut self) {
        self.busy = false;
        if let Err(e) = set_timer(&self.timer, IDLE_TIME) {
            debug!("a disk is not found idle: {e}");
        }
    }

    fn rings(&mut self) {
        let _ = rustix::io::read(&self.timer, &mut [0_u8; 8]);
        if self.busy {
            self.set_again();
        } else {
            self.over = true;
        }
    }
}

/// A timer that is watched and not set.
fn timer(watch: &Watch, token: u32) -> Result<OwnedFd, DeviceError> {
    let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
    let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags);
    let timer = timer.map_err(|e| DeviceError::host("a timer")(e.into()))?;
    watch.add(&timer, EventSet::IN, token).map_err(DeviceError::host("watching a timer"))?;
    Ok(timer)
}

impl QueueTask {
    /// Goes to the processors that the operator has named.
    fn settle_down(&self) {
        if self.cpus.is_empty() {
            return;
        }
        let mut set = CpuSet::new();
        for cpu in self.cpus.iter().filter(|cpu| **cpu < CpuSet::MAX_CPU) {
            set.set(*cpu);
        }
        if let Err(e) = rustix::thread::sched_setaffinity(None, &set) {
            warn!(
                "disk {}: queue {} runs anywhere, not on processors {:?}: {e}; name processors that this host has",
                self.shared.name,
                self.queue.index(),
                self.cpus
            );
        }
    }
}

impl Desk<'_> {
    fn serve(&mut self, view: &MemoryView, chain: Chain) -> Result<Served, DeviceError> {
        let request = Request::read(view, &chain, self.shared)?;
        if self.ring.as_ref().is_some_and(Uring::is_full) || !self.may_begin(&request) {
            return Ok(Served::NotNow(chain));
        }
        let begun = Instant::now();
        let (status, written) = match request {
            Request::Refused(status) => (status, 0),
            Request::Id => match put_id(view, &chain, &self.shared.serial) {
                Ok(written) => (Status::Ok, written.saturating_add(1)),
                Err(e) => return Err(DeviceError::host("writing the serial number")(e)),
            },
            Request::Read(offset, len) => {
                let buffers = buffers(view, read_data(&chain), Permissions::Write)?;
                return self.access(view, chain, (Kind::Read(len), begun), buffers, offset);
            }
            Request::Write(offset, len) => {
                let buffers = buffers(view, write_data(&chain), Permissions::Read)?;
                return self.access(view, chain, (Kind::Write(len), begun), buffers, offset);
            }
            Request::Flush => return self.flush(view, chain, begun),
            Request::Discard(ranges) => {
                self.on_ranges("a discard", &ranges, |image, range| image.discard(range.offset, range.len))
            }
            Request::Zeroes(ranges) => {
                let through = self.shared.is_writethrough();
                let unmaps = self.shared.disk.sparse;
                let (status, written) = self.on_ranges("writing zeroes", &ranges, |image, range| {
                    image.write_zeroes(range.offset, range.len, range.unmap && unmaps)?;
                    if through { image.flush() } else { Ok(()) }
                });
                (status, written)
            }
        };
        put_status(view, &chain, status)?;
        Ok(Served::Done(chain, written))
    }

    /// Whether the limits let a request through now. If not, the timer is set.
    fn may_begin(&self, request: &Request) -> bool {
        let (Some(limiter), Some(timer)) = (&self.shared.limiter, self.timer) else { return true };
        match limiter.ready(Instant::now()) {
            Ok(()) => {
                limiter.pay(request.bytes(), 1);
                true
            }
            Err(wait) => match set_timer(timer, wait) {
                Ok(()) => false,
                Err(e) => {
                    warn!("disk {}: its rate is not limited: {e}", self.shared.name);
                    true
                }
            },
        }
    }

    fn access(
        &mut self,
        view: &MemoryView,
        chain: Chain,
        (kind, begun): (Kind, Instant),
        mut buffers: Buffers,
        offset: u64,
    ) -> Result<Served, DeviceError> {
        let image = &self.shared.disk.image;
        let through = self.shared.is_writethrough();
        let chain = match (&mut *self.ring, image) {
            (Some(ring), Image::Raw(raw)) if !buffers.is_empty() => match raw.way(&buffers, offset) {
                Way::Straight(fd) => {
                    let operation = match kind {
                        Kind::Write(_) => Operation::Write { fd, buffers, offset, through },
                        _ => Operation::Read { fd, buffers, offset },
                    };
                    return begin(ring, Flight { chain, kind, begun }, operation);
                }
                Way::Bounce => chain,
            },
            _ => chain,
        };
        let result = match kind {
            Kind::Write(_) => image.write(&mut buffers, offset, through),
            _ => image.read(&mut buffers, offset),
        };
        self.done(view, Flight { chain, kind, begun }, result)
    }

    fn flush(&mut self, view: &MemoryView, chain: Chain, begun: Instant) -> Result<Served, DeviceError> {
        let flight = Flight { chain, kind: Kind::Flush, begun };
        let image = &self.shared.disk.image;
        if self.shared.disk.readonly {
            return self.done(view, flight, Ok(()));
        }
        if let (Some(ring), Image::Raw(raw)) = (&mut *self.ring, image) {
            return begin(ring, flight, Operation::Flush { fd: raw.flush_fd() });
        }
        self.done(view, flight, image.flush())
    }

    fn done(&self, view: &MemoryView, flight: Flight, result: io::Result<()>) -> Result<Served, DeviceError> {
        let Flight { chain, kind, begun } = flight;
        let (status, written) = self.shared.settle(kind, begun, result);
        put_status(view, &chain, status)?;
        Ok(Served::Done(chain, written))
    }

    fn on_ranges(
        &self,
        what: &str,
        ranges: &[Range],
        each: impl Fn(&Image, &Range) -> io::Result<()>,
    ) -> (Status, u32) {
        match ranges.iter().try_for_each(|range| each(&self.shared.disk.image, range)) {
            Ok(()) => (Status::Ok, 1),
            Err(e) => {
                self.shared.complain(what, &e);
                (Status::IoError, 0)
            }
        }
    }
}

impl Shared {
    /// Counts what has finished: the status, and how many bytes the driver finds written.
    fn settle(&self, kind: Kind, begun: Instant, result: io::Result<()>) -> (Status, u32) {
        if let Err(e) = result {
            self.complain(kind.name(), &e);
            return (Status::IoError, 0);
        }
        match kind {
            Kind::Read(len) => {
                self.counters.read(len, begun.elapsed());
                (Status::Ok, u32::try_from(len).unwrap_or(u32::MAX).saturating_add(1))
            }
            Kind::Write(len) => {
                self.counters.write(len, begun.elapsed());
                (Status::Ok, 1)
            }
            Kind::Flush => (Status::Ok, 1),
        }
    }
}

fn begin(ring: &mut Uring<Flight>, flight: Flight, operation: Operation) -> Result<Served, DeviceError> {
    match ring.begin(flight, operation) {
        Ok(()) => Ok(Served::Kept),
        Err(Flight { chain, .. }) => Ok(Served::NotNow(chain)),
    }
}

fn buffers(
    view: &MemoryView,
    data: impl Iterator<Item = crate::virtio::chain::Buffer>,
    access: Permissions,
) -> Result<Buffers, DeviceError> {
    let gone = || DeviceError::Protocol("the memory of a request is gone".to_owned());
    Buffers::new(view, data, access).ok_or_else(gone)
}

fn set_timer(timer: &OwnedFd, wait: Duration) -> io::Result<()> {
    // Zero would be never.
    let wait = wait.max(Duration::from_micros(1));
    let value = Timespec {
        tv_sec: wait.as_secs().try_into().unwrap_or(i64::MAX),
        tv_nsec: wait.subsec_nanos().into(),
    };
    let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
    rustix::time::timerfd_settime(timer.as_fd(), TimerfdTimerFlags::empty(), &once)?;
    Ok(())
}
