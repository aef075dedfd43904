//! The thread that serves queues of a device: it sleeps until a doorbell, one of the device's own descriptors, or an order.

use std::fmt::{self, Debug};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use log::{debug, error, warn};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::{Active, DeviceError, Interrupt};

/// Stack of a worker's thread.
const STACK_BYTES: usize = 256 << 10;
/// Names of threads are cut by the kernel at 15 bytes.
const NAME_MAX: usize = 15;

/// Tokens of the worker's own in epoll; a handler's tokens and queues are below.
const CONTROL: u64 = 1 << 32;
const QUEUE: u64 = 1 << 33;

/// What has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The driver has rung this queue's doorbell, or may have: it is called for every queue at the start and after a pause.
    Kick(u16),
    /// A descriptor of the handler's own is ready.
    Ready(u32, EventSet),
}

/// A device's work on some of its queues.
pub trait Handler: Send {
    /// The queues to listen for, with their doorbells.
    fn doorbells(&self) -> Vec<(u16, Arc<EventFd>)>;

    /// Registers descriptors of its own, on the worker's thread.
    ///
    /// # Errors
    /// The device stops until it is reset.
    fn start(&mut self, watch: &Watch) -> Result<(), DeviceError> {
        let _ = watch;
        Ok(())
    }

    /// Acts on what has happened. Must not wait for long: orders are heard between two calls.
    ///
    /// # Errors
    /// The device stops until it is reset.
    fn event(&mut self, event: Event, watch: &Watch) -> Result<(), DeviceError>;

    /// Ends what has begun: when it returns, nothing of the device's reaches guest memory. Called before a pause and at the end.
    fn quiesce(&mut self) {}

    /// Whether a new thread is to go on in the place of this one, with [`Self::start`] called anew: what the kernel has made for the thread goes with
    /// it. Asked after each event.
    fn wants_new_thread(&mut self) -> bool {
        false
    }
}

/// Descriptors that a worker sleeps on.
pub struct Watch(Epoll);

impl Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watch")
    }
}

impl Watch {
    /// Of nobody's, for tests of handlers without a worker.
    ///
    /// # Errors
    /// No descriptor is left.
    #[cfg(any(test, feature = "testing"))]
    pub fn new() -> io::Result<Self> {
        Epoll::new().map(Self)
    }

    fn control(
        &self,
        operation: ControlOperation,
        fd: RawFd,
        events: EventSet,
        token: u64,
    ) -> io::Result<()> {
        self.0.ctl(operation, fd, EpollEvent::new(events, token))
    }

    /// Watches `fd` for `events`; [`Event::Ready`] has the token.
    ///
    /// # Errors
    /// Of epoll.
    pub fn add(&self, fd: &impl AsRawFd, events: EventSet, token: u32) -> io::Result<()> {
        self.control(ControlOperation::Add, fd.as_raw_fd(), events, token.into())
    }

    /// Watches for other events. None at all, and nothing but errors is reported.
    ///
    /// # Errors
    /// Of epoll.
    pub fn change(&self, fd: &impl AsRawFd, events: EventSet, token: u32) -> io::Result<()> {
        self.control(ControlOperation::Modify, fd.as_raw_fd(), events, token.into())
    }

    /// Watches no longer.
    ///
    /// # Errors
    /// Of epoll.
    pub fn remove(&self, fd: &impl AsRawFd) -> io::Result<()> {
        self.control(ControlOperation::Delete, fd.as_raw_fd(), EventSet::empty(), 0)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Run,
    Pause,
    Stop,
}

#[derive(Debug)]
struct Orders {
    mode: Mode,
    /// The thread has quiesced and waits.
    parked: bool,
    ended: bool,
}

impl Orders {
    /// Whether an order to pause is still to be followed.
    fn are_open(&self) -> bool {
        !self.parked && !self.ended
    }
}

#[derive(Debug)]
struct Shared {
    orders: Mutex<Orders>,
    changed: Condvar,
    wake: EventFd,
    /// The thread, until somebody joins it.
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Shared {
    fn orders(&self) -> MutexGuard<'_, Orders> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn order(&self, mode: Mode) {
        let mut orders = self.orders();
        // Nothing comes after a stop.
        if orders.mode != Mode::Stop {
            orders.mode = mode;
        }
        drop(orders);
        self.changed.notify_all();
        if let Err(e) = self.wake.write(1) {
            error!("a device's worker cannot be woken: {e}");
        }
    }

    fn thread(&self) -> MutexGuard<'_, Option<JoinHandle<()>>> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sleeps on orders and these doorbells.
    fn watch(&self, doorbells: &[(u16, Arc<EventFd>)]) -> io::Result<Watch> {
        let watch = Watch(Epoll::new()?);
        watch.control(ControlOperation::Add, self.wake.as_raw_fd(), EventSet::IN, CONTROL)?;
        for (index, kick) in doorbells {
            let token = QUEUE | u64::from(*index);
            watch.control(ControlOperation::Add, kick.as_raw_fd(), EventSet::IN, token)?;
        }
        Ok(watch)
    }
}

/// Starts a thread for a task, or gives that back.
fn spawn(name: String, task: Task) -> Result<JoinHandle<()>, (Option<Task>, io::Error)> {
    // A thread that cannot be started drops what it was given.
    let slot = Arc::new(Mutex::new(Some(task)));
    let take = |slot: &Mutex<Option<Task>>| slot.lock().unwrap_or_else(PoisonError::into_inner).take();
    let there = Arc::clone(&slot);
    let run = move || {
        if let Some(task) = take(&there) {
            task.run();
        }
    };
    thread::Builder::new().name(name).stack_size(STACK_BYTES).spawn(run).map_err(|e| (take(&slot), e))
}

/// One thread with its queues.
#[derive(Debug)]
pub struct Worker {
    shared: Arc<Shared>,
}

impl Worker {
    /// Starts the thread, called `name` as far as the kernel keeps names. What `handler` fails with is reported by `interrupt`.
    ///
    /// # Errors
    /// No thread or descriptor is left.
    pub fn start(
        name: &str,
        handler: Box<dyn Handler>,
        interrupt: Arc<dyn Interrupt>,
    ) -> Result<Self, DeviceError> {
        let failed =
            |source| DeviceError::Host { what: "the device's thread cannot be started".into(), source };
        let mode = if interrupt.begins_paused() { Mode::Pause } else { Mode::Run };
        let shared = Arc::new(Shared {
            orders: Mutex::new(Orders { mode, parked: false, ended: false }),
            changed: Condvar::new(),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(failed)?,
            thread: Mutex::default(),
        });
        let doorbells = handler.doorbells();
        let watch = shared.watch(&doorbells).map_err(failed)?;
        let name: String = name.chars().take(NAME_MAX).collect();
        let task = Task {
            name: name.clone(),
            shared: Arc::clone(&shared),
            watch,
            doorbells,
            handler,
            interrupt,
            failed: false,
        };
        // Held meanwhile, so that the first thread's successor is not taken for the first.
        let mut thread = shared.thread();
        *thread = Some(spawn(name, task).map_err(|(_, e)| failed(e))?);
        drop(thread);
        Ok(Self { shared })
    }
}

impl Active for Worker {
    fn stop(&self) {
        self.shared.order(Mode::Stop);
    }

    fn wait_stopped(&self, limit: Duration) -> bool {
        let orders = self.shared.orders();
        let result = self.shared.changed.wait_timeout_while(orders, limit, |orders| !orders.ended);
        result.map(|(orders, _)| orders.ended).unwrap_or_else(|e| e.into_inner().0.ended)
    }

    fn pause(&self) {
        self.shared.order(Mode::Pause);
        let orders = self.shared.orders();
        drop(self.shared.changed.wait_while(orders, |orders| orders.are_open()));
    }

    fn hold(&self, limit: Duration) {
        self.shared.order(Mode::Pause);
        let orders = self.shared.orders();
        drop(self.shared.changed.wait_timeout_while(orders, limit, |orders| orders.are_open()));
    }

    fn resume(&self) {
        self.shared.order(Mode::Run);
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop();
        // One may have started the next in the meantime.
        while let Some(thread) = { self.shared.thread().take() } {
            if thread.join().is_err() {
                error!("a device's worker panicked");
            }
        }
    }
}

/// Several workers of one device.
#[derive(Debug)]
pub struct Workers(pub Vec<Worker>);

impl Active for Workers {
    fn stop(&self) {
        self.0.iter().for_each(Worker::stop);
    }

    fn wait_stopped(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        self.0.iter().all(|worker| worker.wait_stopped(deadline.saturating_duration_since(Instant::now())))
    }

    fn pause(&self) {
        // All at once, then one after the other.
        self.0.iter().for_each(|worker| worker.shared.order(Mode::Pause));
        self.0.iter().for_each(Worker::pause);
    }

    fn hold(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        self.0.iter().for_each(|worker| worker.shared.order(Mode::Pause));
        for worker in &self.0 {
            worker.hold(deadline.saturating_duration_since(Instant::now()));
        }
    }

    fn resume(&self) {
        self.0.iter().for_each(Worker::resume);
    }
}

struct Task {
    name: String,
    shared: Arc<Shared>,
    watch: Watch,
    doorbells: Vec<(u16, Arc<EventFd>)>,
    handler: Box<dyn Handler>,
    interrupt: Arc<dyn Interrupt>,
    failed: bool,
}

impl Task {
    fn run(mut self) {
        let started = self.handler.start(&self.watch);
        self.report(started);
        // After a pause all are kicked too.
        if self.shared.orders().mode == Mode::Run {
            self.kick_all();
        }
        let mut events = [EpollEvent::default(); 16];
        while self.follow_orders() {
            let count = match self.watch.0.wait(-1, &mut events) {
                Ok(count) => count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => {
                    self.report(Err(DeviceError::Host { what: "waiting for events".into(), source }));
                    break;
                }
            };
            for event in events.iter().take(count) {
                self.take(event);
            }
            if !self.failed && self.handler.wants_new_thread() {
                match self.hand_over() {
                    Some(task) => self = task,
                    None => return,
                }
            }
        }
        self.handler.quiesce();
        let Self { shared, handler, .. } = self;
        // With all that it holds, before anyone may take the device for stopped.
        drop(handler);
        shared.orders().ended = true;
        shared.changed.notify_all();
    }

    /// Has a new thread go on. If there can be none, this one does, as after a start.
    fn hand_over(self) -> Option<Self> {
        let shared = Arc::clone(&self.shared);
        let watch = match shared.watch(&self.doorbells) {
            Ok(watch) => watch,
            Err(e) => return Some(self.stay(&e)),
        };
        let (name, task) = (self.name.clone(), Self { watch, ..self });
        let mut thread = shared.thread();
        match spawn(name, task) {
            // This one ends, and nobody need wait for that.
            Ok(successor) => {
                *thread = Some(successor);
                None
            }
            Err((task, e)) => task.map(|task| task.stay(&e)),
        }
    }

    fn stay(mut self, why: &io::Error) -> Self {
        debug!("{}: no new thread: {why}", self.name);
        let started = self.handler.start(&self.watch);
        self.report(started);
        self.kick_all();
        self
    }

    /// Waits out a pause; whether to go on.
    fn follow_orders(&mut self) -> bool {
        let mode = self.shared.orders().mode;
        match mode {
            Mode::Run => true,
            Mode::Stop => false,
            Mode::Pause => {
                self.handler.quiesce();
                let mut orders = self.shared.orders();
                orders.parked = true;
                self.shared.changed.notify_all();
                orders = self
                    .shared
                    .changed
                    .wait_while(orders, |orders| orders.mode == Mode::Pause)
                    .unwrap_or_else(PoisonError::into_inner);
                orders.parked = false;
                let goes_on = orders.mode != Mode::Stop;
                drop(orders);
                if goes_on {
                    self.kick_all();
                }
                goes_on
            }
        }
    }

    fn kick_all(&mut self) {
        for index in 0..self.doorbells.len() {
            let number = self.doorbells[index].0;
            self.handle(Event::Kick(number));
        }
    }

    fn take(&mut self, event: &EpollEvent) {
        let token = event.data();
        if token == CONTROL {
            let _ = self.shared.wake.read();
        } else if token & QUEUE != 0 {
            let found = self.doorbells.iter().find(|(index, _)| QUEUE | u64::from(*index) == token);
            if let Some((index, kick)) = found {
                let _ = kick.read();
                self.handle(Event::Kick(*index));
            }
        } else if let Ok(token) = u32::try_from(token) {
            let events = EventSet::from_bits_truncate(event.events());
            self.handle(Event::Ready(token, events));
        }
    }

    fn handle(&mut self, event: Event) {
        if !self.failed {
            let result = self.handler.event(event, &self.watch);
            self.report(result);
        }
    }

    /// A device that has failed does nothing until it is reset, and sleeps meanwhile.
    fn report(&mut self, result: Result<(), DeviceError>) {
        let Err(e) = result else { return };
        self.failed = true;
        self.interrupt.needs_reset(&e.to_string());
        let wake = self.shared.wake.as_raw_fd();
        let quiet = Epoll::new().map(Watch).and_then(|watch| {
            watch.control(ControlOperation::Add, wake, EventSet::IN, CONTROL)?;
            Ok(watch)
        });
        match quiet {
            Ok(quiet) => self.watch = quiet,
            Err(e) => warn!("a stopped device goes on to be woken: {e}"),
        }
    }
}
