//! All connections of the device: who is new, whose turn it is to send to the guest, and what is refused.
//!
//! Sockets are watched edge-triggered (epoll(7)): each says once that it is ready, and a connection remembers that until it has read all there was. So nothing
//! is asked of the kernel while a connection waits for the guest, and nothing wakes the thread while both are idle.
//!
//! Everything is bounded: connections, refusals that wait for the guest, and in each connection what the host has not taken. When there is no
//! room for another refusal, the guest's packets wait in its own queue; when there are no more connections to be had, clients wait in the
//! listening socket.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{debug, warn};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use vmm_sys_util::epoll::EventSet;

use super::connection::{Connection, Fate, Key, Next};
use super::greeting::{Greeting, Heard};
use super::listener::HostSocket;
use super::packet::{HOST_CID, Header, STREAM, op};
use crate::virtio::device::DeviceError;
use crate::virtio::worker::Watch;

/// The most clients and connections at a time.
pub const CONNECTIONS_MAX: usize = 1023;
/// The most clients that have not said what they want; the one that has waited longest makes room for the next.
const GREETINGS_MAX: usize = 64;
/// The most refusals that wait for the guest.
const REFUSALS_MAX: usize = 256;
/// How long the guest may take to answer a client.
const PATIENCE: Duration = Duration::from_secs(10);
/// Ports of clients: none that a program would choose.
const CLIENT_PORTS: std::ops::Range<u32> = 1 << 30..1 << 31;

/// Tokens of the listening socket and of the timer; those of connections are above.
const LISTENER: u32 = 0;
const TIMER: u32 = 1;
const FIRST: u32 = 16;

#[derive(Debug)]
enum Slot {
    Greeting(Greeting),
    Connection(Box<Connection>),
}

/// The connections.
#[derive(Debug)]
pub struct Muxer {
    cid: u64,
    socket: Arc<HostSocket>,
    slots: HashMap<u32, Slot>,
    by_key: HashMap<Key, u32>,
    /// Those that have something for the guest.
    ready: VecDeque<u32>,
    refusals: VecDeque<Header>,
    greetings: VecDeque<u32>,
    /// When the guest has had enough time to answer.
    deadlines: VecDeque<(Instant, u32)>,
    timer: OwnedFd,
    next_token: u32,
    next_port: u32,
    listening: bool,
    /// A descriptor to give up for a client that must be sent away when there is none left.
    spare: Option<File>,
}

impl Muxer {
    /// No connection yet.
    ///
    /// # Errors
    /// No descriptor is left for the timer.
    pub fn new(cid: u64, socket: Arc<HostSocket>) -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Self {
            cid,
            socket,
            slots: HashMap::new(),
            by_key: HashMap::new(),
            ready: VecDeque::new(),
            refusals: VecDeque::new(),
            greetings: VecDeque::new(),
            deadlines: VecDeque::new(),
            timer: timerfd_create(TimerfdClockId::Monotonic, flags)?,
            next_token: FIRST,
            next_port: CLIENT_PORTS.start,
            listening: false,
            spare: File::open("/dev/null").ok(),
        })
    }

    /// Begins to listen.
    ///
    /// # Errors
    /// Of epoll.
    pub fn start(&mut self, watch: &Watch) -> Result<(), DeviceError> {
        watch.add(&self.timer, EventSet::IN, TIMER).map_err(DeviceError::host("watching a timer"))?;
        self.listen(watch).map_err(DeviceError::host("watching the listening socket"))
    }

    fn listen(&mut self, watch: &Watch) -> io::Result<()> {
        if !self.listening && self.slots.len() < CONNECTIONS_MAX {
            watch.add(&self.socket.listener, EventSet::IN, LISTENER)?;
            self.listening = true;
        }
        Ok(())
    }

    fn stop_listening(&mut self, watch: &Watch) {
        if self.listening {
            self.listening = false;
            if let Err(e) = watch.remove(&self.socket.listener) {
                debug!("the listening socket is still watched: {e}");
            }
        }
    }

    /// Whether another packet of the guest may be taken.
    pub fn has_room(&self) -> bool {
        self.refusals.len() < REFUSALS_MAX
    }

    /// Whether there may be something for the guest.
    pub fn has_ready(&self) -> bool {
        !self.refusals.is_empty() || !self.ready.is_empty()
    }

    /// The next packet for the guest, and how much of `buffer` is its data.
    pub fn next(&mut self, buffer: &mut [u8], watch: &Watch) -> Option<(Header, usize)> {
        if let Some(header) = self.refusals.pop_front() {
            return Some((header, 0));
        }
        while let Some(token) = self.ready.pop_front() {
            let Some(Slot::Connection(connection)) = self.slots.get_mut(&token) else { continue };
            connection.queued = false;
            let next = connection.next(buffer);
            self.queue(token);
            match next {
                Next::Nothing => {}
                Next::Packet(header, count) => return Some((header, count)),
                Next::Last(header) => {
                    self.forget(token, watch);
                    return Some((header, 0));
                }
            }
        }
        None
    }

    /// A descriptor of ours is ready.
    pub fn event(&mut self, token: u32, events: EventSet, watch: &Watch) {
        match token {
            LISTENER => self.accept(watch),
            TIMER => self.give_up_waiting(watch),
            token => match self.slots.get_mut(&token) {
                Some(Slot::Greeting(_)) => self.listen_to(token, watch),
                Some(Slot::Connection(connection)) => {
                    let fate = connection.host_ready(events.contains(EventSet::HANG_UP));
                    self.decide(token, fate, watch);
                }
                None => {}
            },
        }
    }

    /// A packet from the guest; `read` reads its data piece by piece.
    ///
    /// # Errors
    /// Of `read`.
    pub fn take(
        &mut self,
        header: &Header,
        read: impl FnMut(&mut dyn FnMut(&[u8])) -> Result<(), DeviceError>,
        watch: &Watch,
    ) -> Result<(), DeviceError> {
        if header.src_cid != self.cid {
            // Nobody to answer to.
            debug!("vsock: the guest sends as {}, and is {}", header.src_cid, self.cid);
            return Ok(());
        }
        if header.dst_cid != HOST_CID || header.kind != STREAM {
            self.refuse(header);
            return Ok(());
        }
        let key = Key { host: header.dst_port, guest: header.src_port };
        let Some(&token) = self.by_key.get(&key) else {
            match header.op {
                op::REQUEST => self.connect(key, header, watch),
                _ => self.refuse(header),
            }
            return Ok(());
        };
        let Some(Slot::Connection(connection)) = self.slots.get_mut(&token) else { return Ok(()) };
        let fate =
            if header.op == op::RW { receive(connection, header, read)? } else { connection.take(header) };
        self.decide(token, fate, watch);
        Ok(())
    }

    fn refuse(&mut self, header: &Header) {
        if header.op != op::RST {
            self.refusals.push_back(header.refusal());
        }
    }

    /// The guest wants to reach a port of the host.
    fn connect(&mut self, key: Key, request: &Header, watch: &Watch) {
        self.make_room(watch);
        let result = if self.slots.len() < CONNECTIONS_MAX {
            self.socket.connect_to_port(key.host)
        } else {
            Err(io::Error::other("there are too many connections"))
        };
        let result = result.and_then(|stream| {
            let connection = Connection::answering(self.cid, key, stream, request);
            self.add(Slot::Connection(Box::new(connection)), watch)
        });
        match result {
            Ok(token) => {
                self.by_key.insert(key, token);
                self.queue(token);
            }
            Err(e) => {
                debug!("vsock: no connection to port {} of the host: {e}", key.host);
                self.refuse(request);
            }
        }
    }

    /// A connection of which nothing is left on the host makes room for another.
    fn make_room(&mut self, watch: &Watch) {
        if self.slots.len() < CONNECTIONS_MAX {
            return;
        }
        let dead = self.slots.iter().find_map(|(token, slot)| match slot {
            Slot::Connection(connection) if connection.is_dead() => Some(*token),
            _ => None,
        });
        if let Some(token) = dead {
            self.decide(token, Fate::Reset, watch);
        }
    }

    fn accept(&mut self, watch: &Watch) {
        loop {
            if self.slots.len() >= CONNECTIONS_MAX {
                self.make_room(watch);
            }
            if self.slots.len() >= CONNECTIONS_MAX {
                self.stop_listening(watch);
                return;
            }
            match self.socket.listener.accept() {
                Ok((client, _)) => self.greet(client, watch),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(e) => {
                    self.send_away(&e, watch);
                    return;
                }
            }
        }
    }

    /// There is no descriptor for a client. It would be announced for ever, so it is sent away, in the place of the spare one.
    fn send_away(&mut self, error: &io::Error, watch: &Watch) {
        warn!("vsock: a client is sent away: {error}; raise the limit on open files (ulimit -n)");
        let had_spare = self.spare.take().is_some();
        if !had_spare || self.socket.listener.accept().is_err() {
            self.stop_listening(watch);
        }
        self.spare = File::open("/dev/null").ok();
    }

    fn greet(&mut self, client: UnixStream, watch: &Watch) {
        let added = client
            .set_nonblocking(true)
            .and_then(|()| self.add(Slot::Greeting(Greeting::new(client)), watch));
        match added {
            Ok(token) => {
                self.greetings.push_back(token);
                if self.greetings.len() > GREETINGS_MAX
                    && let Some(oldest) = self.greetings.pop_front()
                {
                    self.slots.remove(&oldest);
                }
                self.listen_to(token, watch);
            }
            Err(e) => debug!("vsock: a client cannot be served: {e}"),
        }
    }

    /// Hears a client out, and asks the guest for the port that it wants.
    fn listen_to(&mut self, token: u32, watch: &Watch) {
        let Some(Slot::Greeting(greeting)) = self.slots.get_mut(&token) else { return };
        let port = match greeting.read() {
            Heard::More => return,
            Heard::Port(port) => port,
            Heard::Useless => {
                debug!("vsock: a client goes, or does not begin with CONNECT and a port");
                self.forget(token, watch);
                return;
            }
        };
        self.greetings.retain(|greeting| *greeting != token);
        let Some(Slot::Greeting(greeting)) = self.slots.remove(&token) else { return };
        let Some(key) = self.free_key(port) else { return };
        let connection = Connection::asking(self.cid, key, greeting.stream);
        self.slots.insert(token, Slot::Connection(Box::new(connection)));
        self.by_key.insert(key, token);
        if self.first_deadline().is_none() {
            self.set_timer(PATIENCE);
        }
        self.deadlines.push_back((Instant::now() + PATIENCE, token));
        self.queue(token);
    }

    /// A key that is not in use. There are more ports than connections, so one is found soon.
    fn free_key(&mut self, guest: u32) -> Option<Key> {
        for _ in 0..=CONNECTIONS_MAX {
            let key = Key { host: self.next_port, guest };
            self.next_port = self.next_port.wrapping_add(1);
            if !CLIENT_PORTS.contains(&self.next_port) {
                self.next_port = CLIENT_PORTS.start;
            }
            if !self.by_key.contains_key(&key) {
                return Some(key);
            }
        }
        None
    }

    /// Keeps a client or connection, and watches its socket.
    fn add(&mut self, slot: Slot, watch: &Watch) -> io::Result<u32> {
        let mut token = self.next_token;
        while self.slots.contains_key(&token) {
            token = token.wrapping_add(1).max(FIRST);
        }
        self.next_token = token.wrapping_add(1).max(FIRST);
        let events = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        match &slot {
            Slot::Greeting(greeting) => watch.add(&greeting.stream, events, token)?,
            Slot::Connection(connection) => {
                if let Some(stream) = connection.stream() {
                    watch.add(stream, events, token)?;
                }
            }
        }
        self.slots.insert(token, slot);
        Ok(token)
    }

    /// Gives a connection its turn, if it wants one.
    fn queue(&mut self, token: u32) {
        if let Some(Slot::Connection(connection)) = self.slots.get_mut(&token)
            && !connection.queued
            && connection.wants_turn()
        {
            connection.queued = true;
            self.ready.push_back(token);
        }
    }

    fn decide(&mut self, token: u32, fate: Fate, watch: &Watch) {
        match fate {
            Fate::On => {
                if let Some(Slot::Connection(connection)) = self.slots.get(&token)
                    && connection.lingers()
                    && self.by_key.get(&connection.key) == Some(&token)
                {
                    // The guest may use its port again, and may have done so the next time.
                    self.by_key.remove(&connection.key);
                }
                self.queue(token);
            }
            Fate::Reset => {
                if let Some(Slot::Connection(connection)) = self.slots.get_mut(&token) {
                    let header = connection.reset();
                    self.refusals.push_back(header);
                }
                self.forget(token, watch);
            }
            Fate::Over => self.forget(token, watch),
        }
        if !self.deadlines.is_empty() && self.first_deadline().is_none() {
            self.set_timer(Duration::ZERO);
        }
    }

    /// When the client that has waited longest for the guest has waited long enough. Those that wait no more are forgotten.
    fn first_deadline(&mut self) -> Option<(Instant, u32)> {
        while let Some((deadline, token)) = self.deadlines.front().copied() {
            let asks = |slot: &Slot| matches!(slot, Slot::Connection(connection) if connection.is_asking());
            if self.slots.get(&token).is_some_and(asks) {
                return Some((deadline, token));
            }
            self.deadlines.pop_front();
        }
        None
    }

    /// Closes a client or connection. Closing takes its socket off the watch list: there is no second descriptor of it.
    fn forget(&mut self, token: u32, watch: &Watch) {
        match self.slots.remove(&token) {
            Some(Slot::Connection(connection)) => {
                if self.by_key.get(&connection.key) == Some(&token) {
                    self.by_key.remove(&connection.key);
                }
            }
            Some(Slot::Greeting(_)) => self.greetings.retain(|greeting| *greeting != token),
            None => return,
        }
        if let Err(e) = self.listen(watch) {
            warn!("vsock: clients cannot be accepted any more: {e}");
        }
    }

    /// Has the timer wake the thread once after this time; never, if that is none.
    fn set_timer(&self, time: Duration) {
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let value = Timespec {
            tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: time.subsec_nanos().into(),
        };
        let time = Itimerspec { it_interval: zero, it_value: value };
        if let Err(e) = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &time) {
            debug!("vsock: the guest has all the time it likes to answer: {e}");
        }
    }

    /// Sends clients away that the guest has not answered in time.
    fn give_up_waiting(&mut self, watch: &Watch) {
        let mut expirations = [0; 8];
        // An error means that it was armed again meanwhile.
        let _ = rustix::io::read(&self.timer, &mut expirations);
        let now = Instant::now();
        while let Some((deadline, token)) = self.first_deadline() {
            if deadline > now {
                self.set_timer(deadline.saturating_duration_since(now));
                return;
            }
            debug!("vsock: the guest does not answer a client");
            self.decide(token, Fate::Reset, watch);
        }
    }
}

/// Data from the guest.
fn receive(
    connection: &mut Connection,
    header: &Header,
    mut read: impl FnMut(&mut dyn FnMut(&[u8])) -> Result<(), DeviceError>,
) -> Result<Fate, DeviceError> {
    if !connection.admits(header.len) {
        return Ok(Fate::Reset);
    }
    // For the credit in its header alone.
    let update = Header { op: op::CREDIT_UPDATE, ..*header };
    let mut fate = connection.take(&update);
    read(&mut |data| fate = connection.give(data))?;
    Ok(fate)
}
