//! The other end of the socket, for tests: a thread that listens, reads whole requests, and answers with the bytes that it was told to.

use std::io::{IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

/// A directory of its own that goes with the test.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("dormouse-test-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Writes a file, and the directories above it.
    pub fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// One request as it arrived.
#[derive(Debug)]
pub struct Arrived {
    /// `PUT /api/v1/vm.boot`.
    pub line: String,
    /// The header fields.
    pub head: String,
    /// The body.
    pub body: String,
    /// Descriptors that came with its first message.
    pub fds: Vec<OwnedFd>,
    /// How many bytes that message had, and how many the request had.
    pub first: (usize, usize),
}

/// What the peer does with a request.
pub enum Answer {
    /// Sends these bytes and keeps the connection, as the API's servers do.
    Bytes(Vec<u8>),
    /// Sends these bytes and closes the connection.
    Last(Vec<u8>),
    /// Says nothing.
    Silence,
}

/// A server that is running.
#[derive(Debug)]
pub struct Peer {
    pub socket: PathBuf,
    pub arrived: Receiver<Arrived>,
}

impl Peer {
    /// Listens at `socket`. Each request is answered by `answer`, which is given its request line and its body.
    pub fn serve(socket: &Path, answer: impl Fn(&str, &str) -> Answer + Clone + Send + 'static) -> Self {
        let listener = UnixListener::bind(socket).unwrap();
        let (sender, arrived) = channel();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (mut stream, answer, sender) = (stream.unwrap(), answer.clone(), sender.clone());
                std::thread::spawn(move || {
                    while let Some(request) = read(&stream) {
                        let answer = answer(&request.line, &request.body);
                        let _ = sender.send(request);
                        match answer {
                            Answer::Bytes(bytes) => drop(stream.write_all(&bytes)),
                            Answer::Last(bytes) => return drop(stream.write_all(&bytes)),
                            Answer::Silence => std::thread::sleep(Duration::from_secs(30)),
                        }
                    }
                });
            }
        });
        Self { socket: socket.to_owned(), arrived }
    }

    /// The next request.
    pub fn next(&self) -> Arrived {
        self.arrived.recv_timeout(Duration::from_secs(10)).unwrap()
    }
}

/// A reply of the API: the status line without a reason phrase.
pub fn reply(status: u16, body: &str) -> Vec<u8> {
    let mut text =
        format!("HTTP/1.1 {status} \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n");
    if !body.is_empty() {
        text.push_str(&format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len()));
    } else if status != 204 {
        text.push_str("Content-Length: 0\r\n");
    }
    format!("{text}\r\n{body}").into_bytes()
}

fn read(stream: &UnixStream) -> Option<Arrived> {
    let (mut bytes, mut fds, mut first) = (Vec::new(), Vec::new(), 0);
    loop {
        let mut chunk = vec![0; 4 << 20];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(stream, &mut [IoSliceMut::new(&mut chunk)], &mut control, RecvFlags::empty());
        let count = received.ok().map(|received| received.bytes).filter(|count| *count > 0)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received);
            }
        }
        bytes.extend_from_slice(&chunk[..count]);
        first = if first == 0 { count } else { first };
        let text = String::from_utf8(bytes.clone()).unwrap();
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
        let length: usize = length.map_or(0, |length| length.parse().unwrap());
        if body.len() < length {
            continue;
        }
        let (line, head) = head.split_once("\r\n").unwrap();
        let line = line.strip_suffix(" HTTP/1.1").unwrap().to_owned();
        let first = (first, bytes.len());
        return Some(Arrived { line, head: head.to_owned(), body: body.to_owned(), fds, first });
    }
}
