//! The device as its transport sees it: what it is, its configuration as last seen, and its time at work.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::control_queue;
use super::error::VhostUserError;
use super::keeper::{Desk, Duty, End, Job, Keeper, LIMIT, PAIR};
use super::peer::Mode;
use crate::virtio::device::{Activation, Active, DeviceError, DeviceType, Saved, VirtioDevice};
use crate::virtio::worker::Worker;

const STACK_BYTES: usize = 256 << 10;
/// Names of threads are cut by the kernel at 15 bytes.
const NAME_MAX: usize = 15;
/// How long a driver's write to the configuration may keep its vCPU, so that it reads what it has written. A backend that is slower once has no
/// second chance until it has answered.
const WRITE_PATIENCE: Duration = Duration::from_millis(100);

/// Where the device's configuration is from.
#[derive(Clone, Debug)]
pub enum ConfigSource {
    /// From here: the backend knows nothing of it.
    Own(Vec<u8>),
    /// From the backend.
    Backend {
        /// Bytes to ask for: the first of these that it has.
        sizes: &'static [u32],
        /// Where it says how many queues there are, and how many there are for the guest.
        queues: Option<(usize, u16)>,
    },
    /// From the backend, if it has one.
    IfAny {
        /// Bytes to ask for.
        sizes: &'static [u32],
    },
}

/// What a device is.
#[derive(Clone, Debug)]
pub struct Description {
    /// What the operator calls it.
    pub name: String,
    /// Its type.
    pub device_type: DeviceType,
    /// Descriptors of each queue.
    pub queue_sizes: Vec<u16>,
    /// How many of the queues are the backend's, if not all.
    pub rings: Option<usize>,
    /// How many queues every backend of the kind has.
    pub certain_queues: usize,
    /// The socket.
    pub socket: PathBuf,
    /// Who listens there.
    pub mode: Mode,
    /// Features of the backend's that the guest is offered.
    pub passed: u64,
    /// Features that it is offered whatever the backend has.
    pub own: u64,
    /// Its configuration.
    pub config: ConfigSource,
    /// Whether a backend that comes back can go on where the rings say that it was: its requests are done in order, and doing one twice does no harm.
    pub resumes: bool,
    /// Whether the last queue is served here, and says how many pairs of the others are in use.
    pub control_queue: bool,
}

/// A virtio device behind a vhost-user backend.
#[derive(Debug)]
pub struct VhostUser {
    about: Description,
    features: u64,
    desk: Arc<Desk>,
    thread: Option<JoinHandle<()>>,
    /// How many queues, from the first, a driver uses that is about to go on; zero if there is none.
    restored: AtomicU16,
}

impl VhostUser {
    /// Connects to the backend, or waits for it to connect, and asks what it offers.
    ///
    /// # Errors
    /// See [`VhostUserError`].
    pub fn new(about: Description) -> Result<Self, VhostUserError> {
        let desk = Desk::new()?;
        if let ConfigSource::Own(bytes) = &about.config {
            desk.config().clone_from(bytes);
        }
        let (tell, told) = mpsc::channel();
        let (description, its_desk) = (about.clone(), Arc::clone(&desk));
        let name: String = about.name.chars().take(NAME_MAX).collect();
        let thread =
            thread::Builder::new().name(name).stack_size(STACK_BYTES).spawn(move || {
                match Keeper::new(description, its_desk) {
                    Ok((keeper, features)) => {
                        let _ = tell.send(Ok(features));
                        keeper.run();
                    }
                    Err(e) => {
                        let _ = tell.send(Err(e));
                    }
                }
            });
        let thread = Some(thread.map_err(VhostUserError::host("a thread"))?);
        // It answers: nothing it does then has no limit.
        let features = told.recv().unwrap_or(Err(VhostUserError::Lacks("answer")))?;
        let features = features & about.passed | about.own;
        Ok(Self { about, features, desk, thread, restored: AtomicU16::new(0) })
    }

    fn is_backends(&self) -> bool {
        !matches!(self.about.config, ConfigSource::Own(_))
    }
}

impl Drop for VhostUser {
    fn drop(&mut self) {
        self.desk.quit();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl VirtioDevice for VhostUser {
    fn device_type(&self) -> DeviceType {
        self.about.device_type
    }

    fn queue_sizes(&self) -> Vec<u16> {
        self.about.queue_sizes.clone()
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.desk.config();
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        for (byte, there) in data.iter_mut().zip(config.iter().skip(from)) {
            *byte = *there;
        }
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        let length = self.desk.config().len() as u64;
        let end = offset.checked_add(data.len() as u64);
        let (Ok(from), Some(true)) = (u32::try_from(offset), end.map(|end| end <= length)) else { return };
        if self.is_backends() {
            let done = self.desk.post(Job::Write(from, data.to_vec()));
            if self.desk.prompt.load(Ordering::Relaxed)
                && done.recv_timeout(WRITE_PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout)
            {
                self.desk.prompt.store(false, Ordering::Relaxed);
            }
        }
    }

    fn activate(&self, mut activation: Activation) -> Result<Box<dyn Active>, DeviceError> {
        let control = if self.about.control_queue {
            control_queue::start(&self.about.name, &mut activation, &self.desk)?
        } else {
            None
        };
        // A driver begins with one pair, unless it began elsewhere.
        let enabled = self.restored.swap(0, Ordering::Relaxed).max(PAIR);
        self.desk.enabled.store(enabled, Ordering::Relaxed);
        let duty = Duty {
            queues: activation.queues,
            memory: activation.memory,
            features: activation.features,
            interrupt: activation.interrupt,
            enabled: if control.is_some() { enabled } else { u16::MAX },
        };
        // The driver does not wait for it: what it rings in the meantime is heard later.
        drop(self.desk.post(Job::Activate(duty)));
        Ok(Box::new(AtWork { desk: Arc::clone(&self.desk), end: Arc::default(), control }))
    }

    fn memory_changed(&self) {
        self.desk.ask(Job::Memory);
    }

    fn save(&self) -> Result<Saved, String> {
        match self.about.device_type {
            // All else that these know is in their queues and on their medium.
            DeviceType::NET => Ok((self.desk.enabled.load(Ordering::Relaxed) / PAIR).into()),
            DeviceType::BLOCK => Ok(Saved::Null),
            _ => Err(format!(
                "device {}: what its vhost-user backend knows (open files, for example) cannot be saved; remove the device first",
                self.about.name
            )),
        }
    }

    fn restore(&self, saved: &Saved) -> Result<(), String> {
        // Snapshots of earlier versions did not say.
        let Some(pairs) = saved.as_u64() else { return Ok(()) };
        let most = self.about.queue_sizes.len() / usize::from(PAIR);
        let enabled = u16::try_from(pairs).ok().filter(|pairs| (1..=most).contains(&usize::from(*pairs)));
        let enabled =
            enabled.ok_or_else(|| format!("{pairs} pairs of queues were in use, and there are {most}"))?;
        self.restored.store(enabled * PAIR, Ordering::Relaxed);
        Ok(())
    }
}

/// The device while its driver uses it.
#[derive(Debug)]
struct AtWork {
    desk: Arc<Desk>,
    end: Arc<End>,
    control: Option<Worker>,
}

impl Active for AtWork {
    fn stop(&self) {
        if let Some(control) = &self.control {
            control.stop();
        }
        drop(self.desk.post(Job::Stop(Arc::clone(&self.end))));
    }

    fn wait_stopped(&self, limit: Duration) -> bool {
        self.end.wait(limit) && self.control.as_ref().is_none_or(|control| control.wait_stopped(limit))
    }

    fn pause(&self) {
        if let Some(control) = &self.control {
            control.pause();
        }
        self.desk.ask(Job::Pause);
    }

    fn hold(&self, limit: Duration) {
        let held = self.desk.post(Job::Pause);
        if let Some(control) = &self.control {
            control.hold(limit);
        }
        // A backend that takes its time stops later.
        let _ = held.recv_timeout(limit);
    }

    fn resume(&self) {
        // A guest may be the one that asks: it does not wait for the backend. What comes after this is done after it.
        drop(self.desk.post(Job::Resume));
        if let Some(control) = &self.control {
            control.resume();
        }
    }
}

impl Drop for AtWork {
    fn drop(&mut self) {
        if self.end.wait(Duration::ZERO) {
            return;
        }
        self.stop();
        if !self.end.wait(LIMIT * 2) {
            self.desk.cut();
            self.end.wait(LIMIT);
        }
    }
}
