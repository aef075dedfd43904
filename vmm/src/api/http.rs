//! One HTTP connection: requests in, replies out (RFC 9112, in the form that Cloud Hypervisor's clients expect).
//!
//! Heads and chunk sizes are parsed by `httparse`, the parser beneath hyper. What is written here by hand is the framing that those clients
//! depend on and that no library offers: a status line without a reason phrase, HTTP/1.1 whatever the client speaks, capital
//! letters in the names of headers, file descriptors beside the bytes, and the limits.
//!
//! The client is trusted with the machine, but not to be without mistakes: what it sends is bounded before it is stored.

use std::io::{self, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};

/// Longest request line and longest header line, in bytes without the line's end.
pub const MAX_LINE: usize = 1024;
/// Most header lines.
const MAX_HEADERS: usize = 64;
/// Longest head. Empty lines before a request count too, so that a client which sends nothing else is given up.
const MAX_HEAD: usize = (MAX_HEADERS + 2) * (MAX_LINE + 2);
/// Longest body, in bytes.
pub const MAX_BODY: usize = 4 << 20;
/// Most file descriptors with one message, the kernel's own limit (`SCM_MAX_FD`).
const MAX_DESCRIPTORS: usize = 253;
/// What is read at once.
const READ_BYTES: usize = 8 << 10;
/// How long what a client still sends is thrown away after its connection has been given up, so that it can read the answer.
const LINGER: Duration = Duration::from_secs(1);

/// What the `Server` header says: clients look for it.
const SERVER: &str = "Cloud Hypervisor API";

/// A request's method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// GET.
    Get,
    /// PUT.
    Put,
    /// PATCH or DELETE: known, and served nowhere.
    Unserved,
}

/// A whole request.
#[derive(Debug)]
pub struct Request {
    /// Its method.
    pub method: Method,
    /// The path with everything behind it; no query is split off.
    pub path: String,
    /// The body; `None` if it is empty.
    pub body: Option<Vec<u8>>,
    /// Descriptors that came with it.
    pub descriptors: Vec<OwnedFd>,
    /// Whether `Accept` names plain text and not OpenMetrics: the only two forms of anything here.
    pub wants_plain_text: bool,
}

/// What the body of a reply is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// JSON.
    Json,
    /// OpenMetrics text.
    OpenMetrics,
    /// Prometheus's text format.
    PlainText,
}

impl Content {
    fn media_type(self) -> &'static str {
        match self {
            Self::Json => "application/json",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::PlainText => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// Status code.
    pub status: u16,
    /// The body, if there is one.
    pub body: Option<(Content, Vec<u8>)>,
}

impl Reply {
    /// A reply without a body.
    pub fn empty(status: u16) -> Self {
        Self { status, body: None }
    }

    /// The bytes on the wire.
    pub fn encode(&self) -> Vec<u8> {
        let mut head = format!("HTTP/1.1 {} \r\nServer: {SERVER}\r\nConnection: keep-alive\r\n", self.status);
        match &self.body {
            Some((content, body)) => {
                head +=
                    &format!("Content-Type: {}\r\nContent-Length: {}\r\n", content.media_type(), body.len());
            }
            None if self.status == 204 || self.status == 100 => {}
            None => head += "Content-Length: 0\r\n",
        }
        head += "\r\n";
        let mut bytes = head.into_bytes();
        if let Some((_, body)) = &self.body {
            bytes.extend_from_slice(body);
        }
        bytes
    }
}

/// What comes next on a connection.
#[derive(Debug)]
pub enum Next {
    /// A request.
    Request(Request),
    /// Something that is no request for us, though it is known where it ends: answer and go on.
    Refused(Reply),
    /// What cannot be read: answer and give the connection up.
    Broken(Reply),
    /// The client has gone.
    Closed,
}

/// A connection with a client.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    buffer: Vec<u8>,
    descriptors: Vec<OwnedFd>,
}

/// The head of a request.
struct Head {
    /// Bytes of the buffer that it takes.
    len: usize,
    /// `None` if the method is none that is known here.
    method: Option<Method>,
    path: String,
    length: BodyLength,
    expects_continue: bool,
    wants_plain_text: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BodyLength {
    Bytes(u64),
    Chunked,
}

/// Why a connection cannot go on.
enum Failure {
    Closed,
    Broken(String),
    /// The body is longer than allowed, and has been thrown away.
    TooLong(u64),
}

impl From<io::Error> for Failure {
    fn from(_: io::Error) -> Self {
        Self::Closed
    }
}

impl Connection {
    /// Over an accepted socket.
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, buffer: Vec::new(), descriptors: Vec::new() }
    }

    /// Waits for the next request.
    pub fn next(&mut self) -> Next {
        match self.read_request() {
            Ok(next) => next,
            Err(Failure::Closed) => Next::Closed,
            Err(Failure::Broken(why)) => Next::Broken(complaint(&why)),
            Err(Failure::TooLong(size)) => Next::Refused(complaint(&format!(
                "Request payload with size {size} is larger than the limit of {MAX_BODY} allowed by server."
            ))),
        }
    }

    fn read_request(&mut self) -> Result<Next, Failure> {
        let head = loop {
            if let Some(head) = parse_head(&self.buffer).map_err(Failure::Broken)? {
                break head;
            }
            self.receive()?;
        };
        self.buffer.drain(..head.len);
        let body = match head.length {
            BodyLength::Bytes(0) => Vec::new(),
            BodyLength::Bytes(length) => {
                let Some(length) = usize::try_from(length).ok().filter(|length| *length <= MAX_BODY) else {
                    // Told not to send it, a client that asked first does not.
                    if !head.expects_continue {
                        self.discard(length)?;
                    }
                    return Err(Failure::TooLong(length));
                };
                if head.expects_continue {
                    self.send(&Reply::empty(100))?;
                }
                while self.buffer.len() < length {
                    self.receive()?;
                }
                self.buffer.drain(..length).collect()
            }
            BodyLength::Chunked => {
                if head.expects_continue {
                    self.send(&Reply::empty(100))?;
                }
                self.read_chunks()?
            }
        };
        let descriptors = std::mem::take(&mut self.descriptors);
        // A client may stay for the VM's life; what its largest body took is not to stay with it.
        self.buffer.shrink_to(READ_BYTES);
        Ok(match head.method {
            Some(method) => Next::Request(Request {
                method,
                path: head.path,
                body: (!body.is_empty()).then_some(body),
                descriptors,
                wants_plain_text: head.wants_plain_text,
            }),
            None => Next::Refused(complaint("Invalid HTTP Method.")),
        })
    }

    /// Reads a chunked body (RFC 9112, section 7.1). Trailers are read and forgotten.
    fn read_chunks(&mut self) -> Result<Vec<u8>, Failure> {
        let mut body = Vec::new();
        loop {
            let (skip, size) = loop {
                match httparse::parse_chunk_size(&self.buffer) {
                    Ok(httparse::Status::Complete(found)) => break found,
                    Ok(httparse::Status::Partial) if self.buffer.len() <= MAX_LINE => self.receive()?,
                    _ => return Err(Failure::Broken("Invalid chunk size.".to_owned())),
                }
            };
            self.buffer.drain(..skip);
            if size == 0 {
                break;
            }
            let total = size.saturating_add(u64::try_from(body.len()).unwrap_or(u64::MAX));
            let Some(size) = usize::try_from(size).ok().filter(|_| total <= MAX_BODY as u64) else {
                return Err(Failure::Broken(format!(
                    "Request payload with size {total} is larger than the limit of {MAX_BODY} allowed by server."
                )));
            };
            while self.buffer.len() < size + 2 {
                self.receive()?;
            }
            body.extend(self.buffer.drain(..size));
            if self.buffer.drain(..2).ne(*b"\r\n") {
                return Err(Failure::Broken("Invalid chunk.".to_owned()));
            }
        }
        let mut trailers = 0;
        loop {
            let end = loop {
                match self.buffer.windows(2).position(|pair| pair == b"\r\n") {
                    Some(end) => break end,
                    None if self.buffer.len() <= MAX_LINE => self.receive()?,
                    None => return Err(Failure::Broken("Invalid trailer.".to_owned())),
                }
            };
            self.buffer.drain(..end + 2);
            trailers += 1;
            match end {
                0 => return Ok(body),
                _ if trailers > MAX_HEADERS => return Err(Failure::Broken("Too many trailers.".to_owned())),
                _ => {}
            }
        }
    }

    /// Reads and forgets `length` bytes.
    fn discard(&mut self, mut length: u64) -> Result<(), Failure> {
        loop {
            let here = self.buffer.len().min(usize::try_from(length).unwrap_or(usize::MAX));
            self.buffer.drain(..here);
            length -= here as u64;
            if length == 0 {
                self.descriptors.clear();
                return Ok(());
            }
            self.receive()?;
        }
    }

    /// Adds to the buffer what has arrived, at least one byte, and keeps descriptors that came with it.
    fn receive(&mut self) -> Result<(), Failure> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut bytes = [0; READ_BYTES];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let message = loop {
            match recvmsg(&self.stream, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags) {
                Err(rustix::io::Errno::INTR) => {}
                result => break result.map_err(io::Error::from)?,
            }
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                self.descriptors.extend(descriptors);
            }
        }
        if message.flags.contains(ReturnFlags::CTRUNC) || self.descriptors.len() > MAX_DESCRIPTORS {
            return Err(Failure::Broken("Too many file descriptors.".to_owned()));
        }
        if message.bytes == 0 {
            return Err(Failure::Closed);
        }
        self.buffer.extend_from_slice(bytes.get(..message.bytes).unwrap_or_default());
        Ok(())
    }

    /// Sends a reply in one piece.
    pub fn send(&mut self, reply: &Reply) -> io::Result<()> {
        self.stream.write_all(&reply.encode())
    }

    /// Ends the connection so that the client gets to read what was sent: a socket that is closed with unread bytes in it breaks.
    pub fn give_up(mut self) {
        let ended = self.stream.shutdown(std::net::Shutdown::Write);
        if ended.and_then(|()| self.stream.set_read_timeout(Some(LINGER))).is_err() {
            return;
        }
        let deadline = std::time::Instant::now() + LINGER;
        while std::time::Instant::now() < deadline && self.receive().is_ok() {
            self.buffer.clear();
            self.descriptors.clear();
        }
    }
}

/// The body that parsing errors have always had: an object, unlike those of the API.
fn complaint(why: &str) -> Reply {
    let body = format!("{{ \"error\": {} }}", serde_json::Value::from(why));
    Reply { status: 400, body: Some((Content::Json, body.into_bytes())) }
}

/// The head at the start of `bytes`, once it is all there.
fn parse_head(bytes: &[u8]) -> Result<Option<Head>, String> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let parsed = request.parse(bytes).map_err(|e| format!("Invalid request: {e}."))?;
    let end = match parsed {
        httparse::Status::Complete(end) => end,
        httparse::Status::Partial => bytes.len(),
    };
    let head = bytes.get(..end).unwrap_or_default();
    if head.split(|byte| *byte == b'\n').any(|line| line.len() > MAX_LINE + 1) {
        return Err(format!("A line of the request is longer than {MAX_LINE} bytes."));
    }
    if head.len() > MAX_HEAD {
        return Err(format!("The head of the request is longer than {MAX_HEAD} bytes."));
    }
    if parsed.is_partial() {
        return Ok(None);
    }
    let mut length = None;
    let mut chunked = false;
    let mut expects_continue = false;
    let (mut plain_text, mut open_metrics) = (false, false);
    for header in request.headers.iter() {
        let value = std::str::from_utf8(header.value).map_err(|_| "Invalid header.".to_owned())?.trim();
        if header.name.eq_ignore_ascii_case("content-length") {
            let digits = value.bytes().all(|byte| byte.is_ascii_digit());
            let parsed: u64 = value.parse().ok().filter(|_| digits).ok_or("Invalid Content-Length.")?;
            if length.replace(parsed).is_some_and(|before| before != parsed) {
                return Err("Content-Length is given twice.".to_owned());
            }
        } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
            if value.eq_ignore_ascii_case("chunked") {
                chunked = true;
            } else if !value.eq_ignore_ascii_case("identity") {
                return Err("Unsupported Transfer-Encoding.".to_owned());
            }
        } else if header.name.eq_ignore_ascii_case("expect") {
            expects_continue = value.eq_ignore_ascii_case("100-continue");
        } else if header.name.eq_ignore_ascii_case("accept") {
            plain_text |= value.contains("text/plain");
            open_metrics |= value.contains("application/openmetrics-text");
        }
    }
    let length = match (length, chunked) {
        (Some(_), true) => return Err("Content-Length and Transfer-Encoding exclude each other.".to_owned()),
        (None, true) => BodyLength::Chunked,
        (length, false) => BodyLength::Bytes(length.unwrap_or(0)),
    };
    let method = match request.method.unwrap_or_default() {
        "GET" => Some(Method::Get),
        "PUT" => Some(Method::Put),
        "PATCH" | "DELETE" => Some(Method::Unserved),
        _ => None,
    };
    let path = absolute_path(request.path.unwrap_or_default()).to_owned();
    let wants_plain_text = plain_text && !open_metrics;
    Ok(Some(Head { len: end, method, path, length, expects_continue, wants_plain_text }))
}

/// The path of a request target in origin or absolute form (RFC 9112, section 3.2).
fn absolute_path(target: &str) -> &str {
    match target.strip_prefix("http://") {
        Some(rest) => rest.find('/').map_or("", |start| &rest[start..]),
        None => target,
    }
}

#[cfg(test)]
mod tests;
