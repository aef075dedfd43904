//! HTTP as `ch-remote` and Kata's client speak it: one request at a time over a Unix socket, and a reader that depends on the exact form of
//! status line and `Content-Length`.

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::Value;

/// The longest any call may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Its status.
    pub status: u16,
    /// Its body, perhaps empty.
    pub body: String,
}

impl Answer {
    /// The body as JSON; null if it is none.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_default()
    }
}

/// A connection.
pub struct Connection {
    stream: UnixStream,
    buffer: Vec<u8>,
}

impl Connection {
    /// Connects.
    pub fn new(socket: &str) -> Result<Self, String> {
        let stream = UnixStream::connect(socket).map_err(|e| format!("{socket}: {e}"))?;
        let connection = Self { stream, buffer: Vec::new() };
        connection.patience(PATIENCE)?;
        Ok(connection)
    }

    /// How long a call may take.
    pub fn patience(&self, time: Duration) -> Result<(), String> {
        self.stream.set_read_timeout(Some(time)).map_err(|e| e.to_string())
    }

    /// One call. `name` is an endpoint, or a path if it begins with a slash.
    pub fn call(&mut self, method: &str, name: &str, body: Option<&str>) -> Result<Answer, String> {
        let path = if name.starts_with('/') { name.to_owned() } else { format!("/api/v1/{name}") };
        let mut request = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n");
        if let Some(body) = body {
            request += &format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len());
        }
        request += "\r\n";
        request += body.unwrap_or_default();
        self.send(request.as_bytes())?;
        self.answer().map_err(|e| format!("{method} {name}: {e}"))
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: &[u8]) -> Result<(), String> {
        self.stream.write_all(bytes).map_err(|e| format!("cannot send: {e}"))
    }

    /// Sends a whole request and open files in one message, as Kata Containers and libvirt do.
    pub fn send_with(&mut self, bytes: &[u8], files: &[BorrowedFd<'_>]) -> Result<(), String> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(files)) {
            return Err("too many files".to_owned());
        }
        let sent = sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL);
        match sent {
            Ok(count) if count == bytes.len() => Ok(()),
            other => Err(format!("cannot send {} bytes in one message: {other:?}", bytes.len())),
        }
    }

    /// The next answer. Its head must have the form that such clients can read.
    pub fn answer(&mut self) -> Result<Answer, String> {
        let end = loop {
            match self.buffer.windows(4).position(|four| four == b"\r\n\r\n") {
                Some(end) => break end,
                None => self.receive()?,
            }
        };
        let head: Vec<u8> = self.buffer.drain(..end + 4).collect();
        let head = String::from_utf8(head).map_err(|e| e.to_string())?;
        let line = head.lines().next().unwrap_or_default();
        // The whole rest of the line is the number.
        let status = line.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.trim().parse().ok());
        let status = status.ok_or_else(|| format!("the status line is {line:?}"))?;
        let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
        let length: usize = length.map_or(Ok(0), str::parse).map_err(|e| format!("Content-Length: {e}"))?;
        while self.buffer.len() < length {
            self.receive()?;
        }
        let body: Vec<u8> = self.buffer.drain(..length).collect();
        Ok(Answer { status, body: String::from_utf8(body).map_err(|e| e.to_string())? })
    }

    fn receive(&mut self) -> Result<(), String> {
        let mut bytes = [0; 8192];
        let count = self.stream.read(&mut bytes).map_err(|e| format!("no answer: {e}"))?;
        if count == 0 {
            return Err("the VMM has closed the connection".to_owned());
        }
        self.buffer.extend_from_slice(bytes.get(..count).unwrap_or_default());
        Ok(())
    }
}
