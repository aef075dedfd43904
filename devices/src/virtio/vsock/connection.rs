//! One connection between a port of the guest and a Unix socket of the host: states, credit, and the two halves of its end (VIRTIO 1.2, sections
//! 5.10.6.3 to 5.10.6.5).
//!
//! What comes from the host stays in its socket until the guest has room for it. What comes from the guest is written at once; only what the host does not
//! take is kept, and that is never more than the guest was told there is room for.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::packet::{HOST_CID, Header, STREAM, op, shutdown};

/// Room for data of the guest that the host has not taken yet.
pub const ROOM: u32 = 128 << 10;

/// What a connection is called by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// The port on the host's side.
    pub host: u32,
    /// The port on the guest's side.
    pub guest: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The guest has been, or is to be, asked.
    Asking {
        asked: bool,
    },
    /// The guest has asked, and is to be told that it is connected.
    Answering,
    Open,
    /// The guest has done with it: what it has sent goes to the host still.
    Lingering,
}

/// What is to be sent to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Nothing now.
    Nothing,
    /// This, with so many bytes of data.
    Packet(Header, usize),
    /// This, and then the connection is no more.
    Last(Header),
}

/// What has become of the connection by something that happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It goes on.
    On,
    /// It is to be reset, and forgotten.
    Reset,
    /// It has ended, and the guest knows.
    Over,
}

/// A connection.
#[derive(Debug)]
pub struct Connection {
    /// Its ports.
    pub key: Key,
    /// Whether it waits for its turn to send.
    pub queued: bool,
    cid: u64,
    stream: Option<UnixStream>,
    state: State,
    /// There may be something to read from the host.
    readable: bool,
    /// The host sends no more.
    host_done: bool,
    /// The host takes no more.
    host_deaf: bool,
    /// What the guest has been told of these two.
    told: u32,
    /// What the guest has said of its own end.
    guest_end: u32,
    /// Bytes sent to the guest, its room, and what it has taken out of that.
    sent: u32,
    guest_room: u32,
    guest_taken: u32,
    /// The guest was asked for room.
    begged: bool,
    /// Bytes come from the guest, those given to the host, and how much of the latter the guest knows.
    received: u32,
    given: u32,
    given_told: u32,
    /// The guest has asked how much room there is.
    wants_update: bool,
    /// From the guest, for the host.
    backlog: VecDeque<u8>,
}

impl Connection {
    fn new(cid: u64, key: Key, stream: UnixStream, state: State) -> Self {
        Self {
            key,
            queued: false,
            cid,
            stream: Some(stream),
            state,
            readable: true,
            host_done: false,
            host_deaf: false,
            told: 0,
            guest_end: 0,
            sent: 0,
            guest_room: 0,
            guest_taken: 0,
            begged: false,
            received: 0,
            given: 0,
            given_told: 0,
            wants_update: false,
            backlog: VecDeque::new(),
        }
    }

    /// A client of the host wants to reach the guest with number `cid`.
    pub fn asking(cid: u64, key: Key, stream: UnixStream) -> Self {
        Self::new(cid, key, stream, State::Asking { asked: false })
    }

    /// The guest wanted to reach the host, and has.
    pub fn answering(cid: u64, key: Key, stream: UnixStream, request: &Header) -> Self {
        let mut connection = Self::new(cid, key, stream, State::Answering);
        connection.note_credit(request);
        connection
    }

    /// The host's end, as long as it is open.
    pub fn stream(&self) -> Option<&UnixStream> {
        self.stream.as_ref()
    }

    /// Whether the guest has not answered yet.
    pub fn is_asking(&self) -> bool {
        matches!(self.state, State::Asking { .. })
    }

    /// Whether nothing is left of it on the host: the guest alone keeps it.
    pub fn is_dead(&self) -> bool {
        self.stream.is_none()
    }

    /// Whether [`Self::next`] would have something, as far as can be known without asking the host.
    pub fn wants_turn(&self) -> bool {
        match self.state {
            State::Asking { asked } => !asked,
            State::Answering => true,
            State::Lingering => false,
            State::Open => {
                let reads = self.may_read() && (self.credit() > 0 || !self.begged);
                reads || self.untold() != 0 || self.wants_update || self.owes_update()
            }
        }
    }

    /// What the host has of its end that the guest does not know.
    fn untold(&self) -> u32 {
        let send = if self.host_done { shutdown::SEND } else { 0 };
        let receive = if self.host_deaf { shutdown::RECEIVE } else { 0 };
        (send | receive) & !self.told
    }

    fn may_read(&self) -> bool {
        self.readable && !self.host_done && self.stream.is_some() && self.guest_end & shutdown::RECEIVE == 0
    }

    /// How many bytes the guest has room for.
    fn credit(&self) -> u32 {
        self.guest_room.saturating_sub(self.sent.wrapping_sub(self.guest_taken))
    }

    /// The guest thinks that half of the room is taken, and it is not.
    fn owes_update(&self) -> bool {
        self.given.wrapping_sub(self.given_told) >= ROOM / 2
    }

    fn note_credit(&mut self, header: &Header) {
        self.guest_room = header.buf_alloc;
        self.guest_taken = header.fwd_cnt;
        if self.credit() > 0 {
            self.begged = false;
        }
    }

    fn header(&mut self, op: u16) -> Header {
        self.given_told = self.given;
        self.wants_update = false;
        Header {
            src_cid: HOST_CID,
            dst_cid: self.cid,
            src_port: self.key.host,
            dst_port: self.key.guest,
            len: 0,
            kind: STREAM,
            op,
            flags: 0,
            buf_alloc: ROOM,
            fwd_cnt: self.given,
        }
    }

    /// Resets the connection in the guest.
    pub fn reset(&mut self) -> Header {
        self.header(op::RST)
    }

    /// The next packet for the guest. Data, at most as much as `buffer` takes, is read from the host into `buffer`.
    pub fn next(&mut self, buffer: &mut [u8]) -> Next {
        match self.state {
            State::Asking { asked: false } => {
                self.state = State::Asking { asked: true };
                return Next::Packet(self.header(op::REQUEST), 0);
            }
            State::Answering => {
                self.state = State::Open;
                return Next::Packet(self.header(op::RESPONSE), 0);
            }
            State::Asking { .. } | State::Lingering => return Next::Nothing,
            State::Open => {}
        }
        if self.may_read() {
            let credit = usize::try_from(self.credit()).unwrap_or(usize::MAX);
            if credit == 0 {
                if !self.begged {
                    self.begged = true;
                    return Next::Packet(self.header(op::CREDIT_REQUEST), 0);
                }
            } else if !buffer.is_empty() {
                let limit = credit.min(buffer.len());
                if let Some(count) = self.read(&mut buffer[..limit]) {
                    return self.data(count);
                }
            }
        }
        let untold = self.untold();
        if untold != 0 {
            self.told |= untold;
            let header = Header { flags: self.told, ..self.header(op::SHUTDOWN) };
            if self.told == shutdown::BOTH {
                self.stream = None;
                self.backlog = VecDeque::new();
                if self.guest_end == shutdown::BOTH {
                    return Next::Last(self.reset());
                }
            }
            return Next::Packet(header, 0);
        }
        if self.wants_update || self.owes_update() {
            return Next::Packet(self.header(op::CREDIT_UPDATE), 0);
        }
        Next::Nothing
    }

    fn data(&mut self, count: u32) -> Next {
        self.sent = self.sent.wrapping_add(count);
        let header = Header { len: count, ..self.header(op::RW) };
        Next::Packet(header, usize::try_from(count).unwrap_or(0))
    }

    /// Reads from the host; `None` if there is nothing, now or any more.
    fn read(&mut self, buffer: &mut [u8]) -> Option<u32> {
        let mut stream = self.stream.as_ref()?;
        loop {
            match stream.read(buffer) {
                // Whether it is one half or both is known by now, and the event that says so may come later.
                Ok(0) => (self.host_done, self.host_deaf) = (true, self.host_deaf || has_hung_up(stream)),
                Ok(count) => return u32::try_from(count).ok(),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                // The other end has gone with data of the guest unread.
                Err(_) => (self.host_done, self.host_deaf) = (true, true),
            }
            return None;
        }
    }

    /// The host's socket has something to say.
    pub fn host_ready(&mut self, hung_up: bool) -> Fate {
        self.readable = true;
        self.host_deaf |= hung_up;
        if self.is_asking() {
            // The client may only have ended its half; whether it has gone shows when it is answered.
            return if hung_up { Fate::Reset } else { Fate::On };
        }
        self.flush()
    }

    /// A packet from the guest, without its data.
    pub fn take(&mut self, header: &Header) -> Fate {
        self.note_credit(header);
        match (header.op, self.state) {
            (op::RST, _) => self.abandoned(),
            (op::RESPONSE, State::Asking { asked: true }) => self.connected(),
            (op::SHUTDOWN, State::Open | State::Answering) => {
                self.guest_end |= header.flags & shutdown::BOTH;
                self.flush()
            }
            (op::CREDIT_REQUEST, State::Open | State::Answering) => {
                self.wants_update = true;
                Fate::On
            }
            (op::CREDIT_UPDATE, _) => Fate::On,
            _ => Fate::Reset,
        }
    }

    /// Whether data of this length may come from the guest.
    pub fn admits(&self, len: u32) -> bool {
        let used = self.received.wrapping_sub(self.given);
        let open =
            matches!(self.state, State::Open | State::Answering) && self.guest_end & shutdown::SEND == 0;
        open && len <= ROOM.saturating_sub(used)
    }

    /// Data from the guest that was admitted.
    pub fn give(&mut self, mut data: &[u8]) -> Fate {
        self.received = self.received.wrapping_add(u32::try_from(data.len()).unwrap_or(u32::MAX));
        if self.backlog.is_empty() {
            let count = self.write(data);
            data = data.get(count..).unwrap_or_default();
        }
        if self.host_deaf {
            self.swallow(data.len());
        } else {
            self.backlog.extend(data);
        }
        Fate::On
    }

    /// Writes to the host; how much it has taken.
    fn write(&mut self, data: &[u8]) -> usize {
        let mut done = 0;
        while let Some(rest) = data.get(done..).filter(|rest| !rest.is_empty() && !self.host_deaf) {
            let Some(mut stream) = self.stream.as_ref() else { break };
            match stream.write(rest) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => self.host_deaf = true,
            }
        }
        self.swallow(done);
        done
    }

    /// So many bytes are no more in the room for the guest's data.
    fn swallow(&mut self, count: usize) {
        self.given = self.given.wrapping_add(u32::try_from(count).unwrap_or(u32::MAX));
    }

    /// Gives the host what waits for it, and carries on with what waits for that.
    fn flush(&mut self) -> Fate {
        while !self.backlog.is_empty() {
            let mut backlog = std::mem::take(&mut self.backlog);
            let count = self.write(backlog.as_slices().0);
            backlog.drain(..count);
            if self.host_deaf {
                self.swallow(backlog.len());
                backlog.clear();
            }
            self.backlog = backlog;
            if count == 0 {
                break;
            }
        }
        if !self.backlog.is_empty() {
            return Fate::On;
        }
        // Its memory too.
        self.backlog = VecDeque::new();
        if self.state == State::Lingering {
            return Fate::Over;
        }
        if self.guest_end == shutdown::BOTH {
            return Fate::Reset;
        }
        if let Some(stream) = &self.stream {
            // Either can fail only because the other end has done it already.
            if self.guest_end & shutdown::SEND != 0 {
                let _ = stream.shutdown(Shutdown::Write);
            }
            if self.guest_end & shutdown::RECEIVE != 0 {
                let _ = stream.shutdown(Shutdown::Read);
            }
        }
        Fate::On
    }

    /// The guest has accepted the client.
    fn connected(&mut self) -> Fate {
        self.state = State::Open;
        let reply = format!("OK {}\n", self.key.host);
        let Some(mut stream) = self.stream.as_ref() else { return Fate::Reset };
        // The first bytes in an empty socket: it takes all of them, or the client has gone.
        match stream.write(reply.as_bytes()) {
            Ok(count) if count == reply.len() => Fate::On,
            _ => Fate::Reset,
        }
    }

    /// The guest knows nothing of the connection any more. What it had sent before it ended its half in order still goes to the host.
    fn abandoned(&mut self) -> Fate {
        let in_order = self.guest_end & shutdown::SEND != 0;
        if in_order && !self.backlog.is_empty() && self.stream.is_some() {
            self.state = State::Lingering;
            return self.flush();
        }
        Fate::Over
    }

    /// Whether the guest has abandoned it, and only the host is still to get something.
    pub fn lingers(&self) -> bool {
        self.state == State::Lingering
    }
}

/// Whether the other end is closed altogether.
fn has_hung_up(stream: &UnixStream) -> bool {
    let mut watched = [PollFd::new(stream, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(poll(&mut watched, Some(&now)), Ok(1)) && watched[0].revents().contains(PollFlags::HUP)
}
