//! The thread that talks to the backend of one device, and all that is known of it.
//!
//! Nothing it waits for lasts longer than [`LIMIT`]: then the connection is cut, and the backend counts as gone. What it is asked comes by mail;
//! who asks waits for the answer as long as it likes, or not at all.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use log::{debug, error, info, warn};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use vm_memory::GuestAddressSpace;

use super::deputy;
use super::device::{ConfigSource, Description};
use super::error::VhostUserError;
use super::link::Link;
use super::peer::Peer;
use crate::virtio::Memory;
use crate::virtio::device::{Active, F_RING_PACKED, Interrupt};
use crate::virtio::queue::ActiveQueue;
use crate::virtio::ring::{RingPosition, load_index};
use crate::virtio::worker::Worker;

/// The longest that the backend may take for what one call asks of it.
pub(super) const LIMIT: Duration = Duration::from_secs(5);
/// Queues of a pair.
pub(super) const PAIR: u16 = 2;
/// Writes to the configuration that may wait to be passed on: a driver could write without end.
const WRITES_MAX: usize = 16;
const GUARD_STACK_BYTES: usize = 64 << 10;

/// What the keeper can be asked.
#[derive(Debug)]
pub(super) enum Job {
    /// The driver is ready.
    Activate(Duty),
    /// The driver has reset the device.
    Stop(Arc<End>),
    Pause,
    Resume,
    /// Guest memory has changed.
    Memory,
    /// The driver has written to the configuration.
    Write(u32, Vec<u8>),
    /// How many queues, from the first, the driver wants to use.
    Enable(u16),
}

/// The device between the driver's DRIVER_OK and its reset.
#[derive(Debug)]
pub(super) struct Duty {
    pub(super) queues: Vec<ActiveQueue>,
    pub(super) memory: Memory,
    pub(super) features: u64,
    pub(super) interrupt: Arc<dyn Interrupt>,
    /// How many queues, from the first, are in use.
    pub(super) enabled: u16,
}

impl Duty {
    fn queues(&self) -> Vec<&ActiveQueue> {
        self.queues.iter().collect()
    }

    fn in_use(&self, from: u16, to: u16) -> Vec<&ActiveQueue> {
        self.queues.iter().filter(|queue| (from..to).contains(&queue.index())).collect()
    }
}

/// Whether a duty has ended.
#[derive(Debug, Default)]
pub(super) struct End {
    ended: Mutex<bool>,
    changed: Condvar,
}

impl End {
    fn set(&self) {
        *self.ended.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }

    pub(super) fn wait(&self, limit: Duration) -> bool {
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        let result = self.changed.wait_timeout_while(ended, limit, |ended| !*ended);
        *result.unwrap_or_else(PoisonError::into_inner).0
    }
}

#[derive(Debug, Default)]
struct Mail {
    jobs: VecDeque<(Job, Sender<()>)>,
    quit: bool,
}

/// What the keeper and those who ask it share.
#[derive(Debug)]
pub(super) struct Desk {
    wake: OwnedFd,
    mail: Mutex<Mail>,
    /// The device's configuration as it was when last looked at.
    config: Mutex<Vec<u8>>,
    /// The connection, to be cut.
    line: Mutex<Option<UnixStream>>,
    /// The backend passes on writes to its configuration in good time.
    pub(super) prompt: AtomicBool,
    /// How many queues, from the first, the driver of a network device uses.
    pub(super) enabled: AtomicU16,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Desk {
    pub(super) fn new() -> Result<Arc<Self>, VhostUserError> {
        let wake = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC);
        let wake = wake.map_err(|e| VhostUserError::host("an eventfd")(e.into()))?;
        Ok(Arc::new(Self {
            wake,
            mail: Mutex::default(),
            config: Mutex::default(),
            line: Mutex::default(),
            prompt: AtomicBool::new(true),
            enabled: AtomicU16::new(PAIR),
        }))
    }

    /// Asks for something. The receiver hears when it is done.
    pub(super) fn post(&self, job: Job) -> Receiver<()> {
        let (done, receiver) = mpsc::channel();
        let mut mail = lock(&self.mail);
        // A driver may ask for this as often as it likes; the last one counts.
        if matches!(job, Job::Enable(_)) {
            mail.jobs.retain(|(job, _)| !matches!(job, Job::Enable(_)));
        }
        let writes = mail.jobs.iter().filter(|(job, _)| matches!(job, Job::Write(..))).count();
        if !matches!(job, Job::Write(..)) || writes < WRITES_MAX {
            mail.jobs.push_back((job, done));
        }
        drop(mail);
        self.wake();
        receiver
    }

    /// Asks for something and waits, but not for ever: then the connection is cut, and so comes an end.
    pub(super) fn ask(&self, job: Job) {
        let receiver = self.post(job);
        if receiver.recv_timeout(LIMIT * 2) == Err(RecvTimeoutError::Timeout) {
            self.cut();
            if receiver.recv_timeout(LIMIT) == Err(RecvTimeoutError::Timeout) {
                error!("a vhost-user device does not do what it is told; this is a defect, please report it");
            }
        }
    }

    /// Ends the connection under the keeper's hands.
    pub(super) fn cut(&self) {
        if let Some(line) = &*lock(&self.line) {
            let _ = line.shutdown(std::net::Shutdown::Both);
        }
    }

    /// Tells the keeper to end.
    pub(super) fn quit(&self) {
        lock(&self.mail).quit = true;
        self.cut();
        self.wake();
    }

    /// The device's configuration.
    pub(super) fn config(&self) -> MutexGuard<'_, Vec<u8>> {
        lock(&self.config)
    }

    fn wake(&self) {
        // It can only fail if the counter is full, and then it is readable.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    fn quits(&self) -> bool {
        lock(&self.mail).quit
    }
}

/// The thread's own.
#[derive(Debug)]
pub(super) struct Keeper {
    about: Description,
    desk: Arc<Desk>,
    peer: Peer,
    link: Option<Link>,
    duty: Option<Duty>,
    /// The rings are started.
    going: bool,
    paused: bool,
    /// Answers in the backend's place when that has gone.
    deputy: Option<Worker>,
    /// What the guest was offered of what the backend offered.
    relied: u64,
}

impl Keeper {
    /// Finds the backend, and says what it offers.
    pub(super) fn new(about: Description, desk: Arc<Desk>) -> Result<(Self, u64), VhostUserError> {
        let peer = Peer::new(&about.socket, about.mode)?;
        let mut keeper = Self {
            about,
            desk,
            peer,
            link: None,
            duty: None,
            going: false,
            paused: false,
            deputy: None,
            relied: 0,
        };
        keeper.connect()?;
        let features = keeper.link.as_ref().map_or(0, Link::features);
        keeper.relied = features & keeper.about.passed;
        Ok((keeper, features))
    }

    fn connect(&mut self) -> Result<(), VhostUserError> {
        let stream = self.peer.wait(|| !self.desk.quits())?;
        self.negotiate(stream)
    }

    fn negotiate(&mut self, stream: UnixStream) -> Result<(), VhostUserError> {
        let again = || stream.try_clone().map_err(VhostUserError::host("another descriptor of a socket"));
        *lock(&self.desk.line) = Some(again()?);
        let Description { queue_sizes, certain_queues, config, rings, .. } = &self.about;
        let queues = rings.unwrap_or(queue_sizes.len());
        let line = again()?;
        let link = within(&line, "the start", || {
            let mut link = Link::new(stream, queues, *certain_queues)?;
            if let Some(bytes) = read_config(&mut link, config)? {
                *self.desk.config() = bytes;
            }
            Ok(link)
        })?;
        let missing = self.relied & !link.features();
        if missing != 0 {
            return Err(VhostUserError::Changed(missing));
        }
        debug!("device {}: connected to {}: {link:?}", self.about.name, self.peer.socket().display());
        self.link = Some(link);
        Ok(())
    }

    /// Until it is told to quit.
    pub(super) fn run(mut self) {
        loop {
            let (jobs, quit) = {
                let mut mail = lock(&self.desk.mail);
                (std::mem::take(&mut mail.jobs), mail.quit)
            };
            for (job, done) in jobs {
                self.perform(job);
                drop(done);
            }
            if quit {
                return;
            }
            self.sleep();
        }
    }

    /// Waits for mail, a notice of the backend's, its end, or its return.
    fn sleep(&mut self) {
        let awaits = self.link.is_none() && self.resumes();
        let listener = self.peer.listener().filter(|_| awaits);
        let mut fds = vec![PollFd::new(&self.desk.wake, PollFlags::IN)];
        fds.extend(self.link.as_ref().map(|link| PollFd::new(link.stream(), PollFlags::RDHUP)));
        fds.extend(self.link.as_ref().and_then(Link::notice_stream).map(|n| PollFd::new(n, PollFlags::IN)));
        fds.extend(listener.map(|listener| PollFd::new(listener, PollFlags::IN)));
        // Nobody tells when a backend listens again. All else wakes by itself.
        let second = rustix::time::Timespec { tv_sec: 1, tv_nsec: 0 };
        let limit = (awaits && listener.is_none()).then_some(&second);
        if let Err(e) = poll(&mut fds, limit) {
            debug!("device {}: poll: {e}", self.about.name);
        }
        let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
        if ready.next().unwrap_or(false) {
            let _ = rustix::io::read(&self.desk.wake, &mut [0; 8]);
        }
        let has_link = self.link.is_some();
        let gone = has_link && ready.next().unwrap_or(false);
        let noticed = ready.next().unwrap_or(false);
        drop(ready);
        drop(fds);
        if gone {
            let socket = self.peer.socket().to_owned();
            self.fail(&VhostUserError::Gone { socket });
        } else if has_link && noticed {
            self.hear();
        } else if awaits && let Ok(stream) = self.peer.try_once() {
            self.take_up(Some(stream));
        }
    }

    fn perform(&mut self, job: Job) {
        match job {
            Job::Activate(duty) => {
                self.paused = duty.interrupt.begins_paused();
                self.duty = Some(duty);
                self.take_up(None);
            }
            Job::Stop(end) => {
                self.stop(true);
                self.deputy = None;
                self.duty = None;
                end.set();
            }
            Job::Pause => {
                self.paused = true;
                self.stop(false);
                if let Some(deputy) = &self.deputy {
                    deputy.pause();
                }
            }
            Job::Resume => {
                self.paused = false;
                self.start();
                if let Some(deputy) = &self.deputy {
                    deputy.resume();
                }
            }
            Job::Memory => self.remember(),
            Job::Write(offset, data) => {
                let name = self.about.name.clone();
                self.with_link("a write to its configuration", |link, _| {
                    // A backend may refuse what makes no sense, and is none the worse for it.
                    let _ = link.write_config(offset, &data).inspect_err(|e| debug!("device {name}: {e}"));
                    Ok(())
                });
                self.refresh();
                self.desk.prompt.store(true, Ordering::Relaxed);
            }
            Job::Enable(count) => self.enable(count),
        }
    }

    /// Whether the device waits for its backend to come back, and goes on where the rings say that it was.
    fn resumes(&self) -> bool {
        let split = |duty: &Duty| duty.features & F_RING_PACKED == 0;
        self.about.resumes && self.duty.as_ref().is_some_and(split)
    }

    /// Works for the driver, if need be over a new connection: `stream`, or one that is made.
    fn take_up(&mut self, stream: Option<UnixStream>) {
        let connected = match (stream, &self.link) {
            (Some(stream), _) => self.negotiate(stream),
            (None, None) if self.resumes() => match self.peer.try_once() {
                Ok(stream) => self.negotiate(stream),
                // It is waited for without keeping anyone.
                Err(_) => return,
            },
            (None, None) => self.connect(),
            (None, Some(_)) => Ok(()),
        };
        match connected {
            Ok(()) => self.start(),
            Err(e) => self.fail(&e),
        }
    }

    fn start(&mut self) {
        if self.paused || self.going || self.duty.is_none() || self.link.is_none() {
            return;
        }
        self.with_link("starting its queues", |link, duty| {
            let Some(duty) = duty else { return Ok(()) };
            let memory = duty.memory.memory();
            link.begin(duty.features, &memory)?;
            link.start(&duty.queues(), duty.features, &memory)?;
            let queues = duty.in_use(0, duty.enabled);
            link.enable(&queues, true)?;
            // Some backends hear a doorbell before the ring is enabled, do nothing, and have then heard it.
            queues.iter().for_each(|queue| queue.ring_own_doorbell());
            Ok(())
        });
        self.going = self.link.is_some();
    }

    /// Stops the rings; for good, the backend forgets the driver too.
    fn stop(&mut self, for_good: bool) {
        if !std::mem::take(&mut self.going) {
            return;
        }
        let done = self.with_link("stopping its queues", |link, duty| {
            let Some(duty) = duty else { return Ok(()) };
            link.stop(&duty.queues(), duty.features, &duty.memory.memory())?;
            if for_good { link.reset() } else { Ok(()) }
        });
        if !done {
            info!("device {}: the backend has not stopped its queues in good order", self.about.name);
        }
    }

    fn remember(&mut self) {
        if self.going {
            self.with_link("a change of the guest's memory", |link, duty| match duty {
                Some(duty) => link.share(&duty.memory.memory()),
                None => Ok(()),
            });
        }
    }

    fn enable(&mut self, count: u16) {
        let Some(duty) = &mut self.duty else { return };
        let before = std::mem::replace(&mut duty.enabled, count);
        if self.going {
            self.with_link("enabling its queues", |link, duty| {
                let Some(duty) = duty else { return Ok(()) };
                link.enable(&duty.in_use(before, count), true)?;
                duty.in_use(before, count).iter().for_each(|queue| queue.ring_own_doorbell());
                link.enable(&duty.in_use(count, before), false)
            });
        }
    }

    /// Reads a notice of the backend's.
    fn hear(&mut self) {
        let Some(notices) = self.link.as_mut().map(Link::notices) else { return };
        match notices.as_mut().map(super::notices::Notices::take) {
            Some(Ok(true)) => self.refresh(),
            Some(Err(e)) => {
                debug!("device {}: the backend's notices have ended: {e}", self.about.name);
                *notices = None;
            }
            _ => {}
        }
    }

    /// Looks at the configuration again, and tells the driver if it has changed.
    fn refresh(&mut self) {
        let source = self.about.config.clone();
        let mut read = None;
        self.with_link("reading its configuration", |link, _| {
            read = read_config(link, &source)?;
            Ok(())
        });
        let Some(read) = read else { return };
        let changed = std::mem::replace(&mut *self.desk.config(), read.clone()) != read;
        if let Some(duty) = self.duty.as_ref().filter(|_| changed) {
            duty.interrupt.config();
        }
    }

    /// Has the backend do something; whether it has. If not, it is gone.
    fn with_link(
        &mut self,
        what: &'static str,
        work: impl FnOnce(&mut Link, Option<&Duty>) -> Result<(), VhostUserError>,
    ) -> bool {
        let Some(link) = &mut self.link else { return false };
        let duty = self.duty.as_ref();
        let line = link.stream().try_clone().map_err(VhostUserError::host("another descriptor of a socket"));
        let result = line.and_then(|line| within(&line, what, || work(link, duty)));
        match result {
            Ok(()) => true,
            Err(e) => {
                self.fail(&e);
                false
            }
        }
    }

    /// There is no backend any more.
    fn fail(&mut self, error: &VhostUserError) {
        let name = &self.about.name;
        *lock(&self.desk.line) = None;
        let was_there = self.link.take().is_some();
        self.going = false;
        if self.resumes() {
            // Once for each time it goes.
            if was_there {
                warn!("device {name}: {error}; it goes on when the backend has come back");
            } else {
                debug!("device {name}: {error}");
            }
            self.duty.iter().for_each(note_positions);
            return;
        }
        let Some(duty) = &self.duty else {
            warn!("device {name}: {error}; the backend is looked for again when the guest starts the device");
            return;
        };
        duty.interrupt.needs_reset(&error.to_string());
        if self.deputy.is_none() {
            self.deputy = deputy::start(name, self.about.device_type, duty);
        }
        if let Some(deputy) = self.deputy.as_ref().filter(|_| self.paused) {
            deputy.pause();
        }
    }
}

/// Where the rings say that the backend was: all that it has taken and not given back is taken again.
fn note_positions(duty: &Duty) {
    let memory = duty.memory.memory();
    for queue in &duty.queues {
        if let Ok(used) = load_index(&memory, queue.layout().device) {
            queue.shared_position().set(RingPosition { avail: used, used, ..RingPosition::START });
        }
    }
}

fn read_config(link: &mut Link, source: &ConfigSource) -> Result<Option<Vec<u8>>, VhostUserError> {
    match source {
        ConfigSource::Own(_) => Ok(None),
        ConfigSource::Backend { sizes, queues } if link.has_config() => {
            let mut bytes = link.config(sizes)?.ok_or(VhostUserError::Config)?;
            if let Some((at, count)) = queues {
                let field = bytes.iter_mut().skip(*at);
                field.zip(count.to_le_bytes()).for_each(|(byte, wanted)| *byte = wanted);
            }
            Ok(Some(bytes))
        }
        ConfigSource::Backend { .. } => Err(VhostUserError::Lacks("VHOST_USER_PROTOCOL_F_CONFIG")),
        ConfigSource::IfAny { sizes } if link.has_config() => link.config(sizes),
        ConfigSource::IfAny { .. } => Ok(None),
    }
}

/// Does `work`, which talks to the backend over `line`, and cuts that if it takes too long.
fn within<R>(
    line: &UnixStream,
    what: &'static str,
    work: impl FnOnce() -> Result<R, VhostUserError>,
) -> Result<R, VhostUserError> {
    let (done, finished) = mpsc::channel::<()>();
    thread::scope(|scope| {
        let guard = thread::Builder::new().name("vhost-guard".into()).stack_size(GUARD_STACK_BYTES);
        let guard = guard.spawn_scoped(scope, move || {
            let late = finished.recv_timeout(LIMIT) == Err(RecvTimeoutError::Timeout);
            if late {
                let _ = line.shutdown(std::net::Shutdown::Both);
            }
            late
        });
        let guard = guard.map_err(VhostUserError::host("a thread"))?;
        let result = work();
        drop(done);
        match (guard.join(), result) {
            (Ok(true), Err(_)) => Err(VhostUserError::Silent { what, limit: LIMIT }),
            (_, result) => result,
        }
    })
}
