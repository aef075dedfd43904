//! Asking VMMs. Each is asked on a thread of its own within [`PATIENCE`], so that one that hangs holds up no other.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Value, json};

use super::TopError;
use super::board::{Answer, Board, Vm};
use super::sensors::Meter;
use super::sockets::{self, Source};
use crate::client::report::VmPower;
use crate::client::{Client, ClientError};

/// How long a VMM may take for all that it is asked at one look.
pub const PATIENCE: Duration = Duration::from_millis(900);
/// Time between the two readings of a counter of energy where there is only one look.
const BETWEEN_READINGS: Duration = Duration::from_millis(250);

/// What stands for the state of a VMM without a VM.
const NO_VM: &str = "no VM";

/// Something new.
#[derive(Debug)]
pub enum News {
    /// Of a VM.
    Vm(Box<Vm>),
    /// A VMM has ended.
    Gone(PathBuf),
    /// Watts of the platform.
    Platform(f64),
    /// There is nowhere to look any more.
    Failed(TopError),
}

/// What does not change while a VMM runs.
#[derive(Clone, Debug, Default)]
struct Identity {
    pid: Option<u32>,
    name: Option<String>,
}

/// One VMM that is asked again and again.
#[derive(Debug)]
struct Vmm {
    socket: PathBuf,
    identity: Option<Identity>,
    state: Option<String>,
    changed: bool,
    meter: Meter,
}

impl Vmm {
    fn new(socket: &Path, meter: Meter) -> Self {
        Self { socket: socket.to_owned(), identity: None, state: None, changed: false, meter }
    }

    /// One look at it.
    fn look(&mut self) -> Result<Vm, ClientError> {
        let result = self.ask();
        if result.is_err() {
            // Whoever answers next may be another one.
            let pid = sockets::pid(&self.socket);
            self.identity = self.identity.take().filter(|identity| identity.pid == pid && pid.is_some());
        }
        let answer = match result {
            Ok(answer) => Ok(answer),
            Err(gone @ (ClientError::Refused(_) | ClientError::NoSocket(_))) => return Err(gone),
            Err(error) => Err(self.reason(&error)),
        };
        Ok(self.vm(answer))
    }

    /// An error without the socket, which is said beside it.
    fn reason(&self, error: &ClientError) -> String {
        let text = error.to_string();
        let socket = format!("{}: ", self.socket.display());
        text.strip_prefix(&socket).unwrap_or(&text).to_owned()
    }

    fn vm(&self, answer: Result<Answer, String>) -> Vm {
        let identity = self.identity.clone().unwrap_or_default();
        let pid = identity.pid.or_else(|| sockets::pid(&self.socket));
        Vm { socket: self.socket.clone(), pid, name: identity.name, answer }
    }

    fn ask(&mut self) -> Result<Answer, ClientError> {
        let client = Client::for_all(&self.socket, PATIENCE);
        let ask = |call: &str| {
            let reply = client.get(call)?;
            serde_json::from_slice::<Value>(&reply.body).map_err(|error| client.not_understood(call, &error))
        };
        let named = self.identity.as_ref().is_some_and(|identity| identity.name.is_some());
        if !named || std::mem::take(&mut self.changed) {
            let ping = ask("vmm.ping")?;
            let pid = ping["pid"].as_u64().and_then(|pid| pid.try_into().ok());
            let name = match ask("vm.info") {
                Ok(info) => name(&info["config"]),
                Err(ClientError::Api { .. }) => None,
                Err(error) => return Err(error),
            };
            self.identity = Some(Identity { pid, name });
        }
        let raw = match ask("vm.power") {
            // A VMM without a VM is no failure.
            Err(error) if error.is_about_nothing() => json!({"state": NO_VM}),
            reply => reply?,
        };
        let power = VmPower::deserialize(&raw).map_err(|error| client.not_understood("vm.power", &error))?;
        // After a change of state it may be another VM, with another name.
        let before = self.state.replace(power.state.clone());
        self.changed |= before.is_some_and(|state| state != power.state);
        let now = Instant::now();
        let devices = power.devices.iter();
        let draw = devices
            .filter_map(|device| Some((device.bdf.clone(), self.meter.device(&device.bdf, now)?)))
            .collect();
        Ok(Answer { power, raw, draw })
    }
}

/// What distinguishes a VM: its UUID, or else the file that it boots.
fn name(config: &Value) -> Option<String> {
    if let Some(uuid) = config["platform"]["system_uuid"].as_str() {
        return Some(uuid.to_owned());
    }
    let payload = &config["payload"];
    let path = payload["kernel"].as_str().or_else(|| payload["firmware"].as_str())?;
    Path::new(path).file_name().map(|name| name.to_string_lossy().into_owned())
}

/// One look at all VMMs at the same time.
pub fn once(source: &Source, meter: Meter) -> Result<Board, TopError> {
    let vmms = source.sockets()?.into_iter().map(|socket| Vmm::new(&socket, meter.clone())).collect();
    let mut board = Board::default();
    let mut meter = meter;
    board.platform = meter.platform(Instant::now());
    let begin = Instant::now();
    let mut vmms = look_at_all(vmms, source, &mut board);
    if meter.is_waiting() || vmms.iter().any(|vmm| vmm.meter.is_waiting()) {
        thread::sleep(BETWEEN_READINGS.saturating_sub(begin.elapsed()));
        // Who gave no answer has had its time.
        vmms.retain(|vmm| board.vms().iter().any(|vm| vm.socket == vmm.socket && vm.answer.is_ok()));
        look_at_all(vmms, source, &mut board);
        board.platform = meter.platform(Instant::now());
    }
    Ok(board)
}

fn look_at_all(vmms: Vec<Vmm>, source: &Source, board: &mut Board) -> Vec<Vmm> {
    let threads: Vec<_> = vmms
        .into_iter()
        .map(|mut vmm| {
            thread::spawn(move || {
                let seen = vmm.look();
                (vmm, seen)
            })
        })
        .collect();
    let mut looked_at = Vec::new();
    for (vmm, seen) in threads.into_iter().filter_map(|thread| thread.join().ok()) {
        match seen {
            Ok(vm) => board.update(vm),
            Err(_) if source.forgets() => board.remove(&vmm.socket),
            Err(error) => board.update(vmm.vm(Err(vmm.reason(&error)))),
        }
        looked_at.push(vmm);
    }
    looked_at
}

/// Looks at all VMMs of `source` again and again, for as long as the receiver is there.
pub fn watch(source: Source, interval: Duration, meter: Meter) -> Receiver<News> {
    let (sender, receiver) = channel();
    thread::spawn(move || scan(&source, interval, meter, &sender));
    receiver
}

/// Finds VMMs that are new, and starts a thread for each.
fn scan(source: &Source, interval: Duration, mut meter: Meter, sender: &Sender<News>) {
    let watched = Arc::new(Mutex::new(HashSet::new()));
    loop {
        let found = match source.sockets() {
            Ok(found) => found,
            Err(error) => return drop(sender.send(News::Failed(error))),
        };
        for socket in found {
            let new = watched.lock().unwrap_or_else(PoisonError::into_inner).insert(socket.clone());
            if new {
                let (vmm, forgets) = (Vmm::new(&socket, meter.clone()), source.forgets());
                let (sender, watched) = (sender.clone(), Arc::clone(&watched));
                thread::spawn(move || {
                    follow(vmm, forgets, interval, &sender);
                    watched.lock().unwrap_or_else(PoisonError::into_inner).remove(&socket);
                });
            }
        }
        if let Some(watts) = meter.platform(Instant::now())
            && sender.send(News::Platform(watts)).is_err()
        {
            return;
        }
        thread::sleep(interval);
    }
}

/// Looks at one VMM again and again, until it has gone.
fn follow(mut vmm: Vmm, forgets: bool, interval: Duration, sender: &Sender<News>) {
    loop {
        let begin = Instant::now();
        let news = match vmm.look() {
            Ok(vm) => News::Vm(Box::new(vm)),
            Err(_) if forgets => return drop(sender.send(News::Gone(vmm.socket))),
            Err(error) => News::Vm(Box::new(vmm.vm(Err(vmm.reason(&error))))),
        };
        if sender.send(news).is_err() {
            return;
        }
        thread::sleep(interval.saturating_sub(begin.elapsed()));
    }
}
