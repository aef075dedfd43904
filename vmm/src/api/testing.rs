//! For tests: the API's server on a Unix socket, as clients find it, and a client that sees every byte.
//!
//! Server, socket and threads are the real ones. The main thread's part is played by one that notes each order and carries it out
//! at once; what orders do to machines is tried on the emulated host (`tests/src/scenarios/api.rs`).

use std::io::{Read, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};

use super::{Access, Api, serve};
use crate::config::VmConfig;
use crate::orders::{Completion, Order, Orders};
use crate::status::Status;

/// How long a test waits for an answer.
const PATIENCE: Duration = Duration::from_secs(20);

/// A server.
pub struct Server {
    path: PathBuf,
    taken: Arc<Mutex<Vec<String>>>,
    orders: Arc<Orders>,
}

impl Server {
    /// Starts one.
    pub fn start(access: Access) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("dormouse-api-{}-{number}.sock", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        let orders = Arc::new(Orders::new().unwrap());
        let status = Arc::new(Status::default());
        let api = Api::new(Arc::clone(&status), Arc::clone(&orders), Instant::now());
        serve(listener, Arc::new(api), access).unwrap();
        let taken = Arc::new(Mutex::new(Vec::new()));
        let (carrying_out, noted, shown) = (Arc::clone(&orders), Arc::clone(&taken), status);
        thread::spawn(move || {
            let mut present = VmConfig::default();
            loop {
                let _ = poll(&mut [PollFd::new(carrying_out.event(), PollFlags::IN)], None);
                while let Some((order, waiter)) = carrying_out.take() {
                    noted.lock().unwrap().push(format!("{order:?}"));
                    match order {
                        Order::Create(config) => present = *config,
                        Order::AddEmulated(addition) => (addition.0)(&mut present),
                        _ => {
                            waiter.answer(Ok(Completion::Plain));
                            continue;
                        }
                    }
                    shown.set_config(Some(&present));
                    waiter.answer(Ok(Completion::Plain));
                }
            }
        });
        Self { path, taken, orders }
    }

    /// A connected client.
    pub fn client(&self) -> Client {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Client { stream, buffer: Vec::new() }
    }

    /// A client that the server has a place for: one that has gone gives its place back when its thread has seen that.
    pub fn admitted(&self) -> Client {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut client = self.client();
            client.send("GET /api/v1/vmm.ping HTTP/1.1\r\n\r\n");
            if client.answer().status == 200 {
                return client;
            }
            assert!(Instant::now() < deadline, "the places stay taken");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// The orders that have been carried out so far.
    pub fn taken(&self) -> Vec<String> {
        assert!(!self.orders.are_waiting());
        self.taken.lock().unwrap().clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// An answer, taken apart.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// The status.
    pub status: u16,
    /// Everything up to the empty line.
    pub head: String,
    /// The body.
    pub body: String,
}

impl Answer {
    /// The body as JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap()
    }
}

/// A client.
pub struct Client {
    /// Its end of the connection.
    pub stream: UnixStream,
    buffer: Vec<u8>,
}

impl Client {
    /// Sends bytes.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).unwrap();
    }

    /// Sends bytes and descriptors in one message.
    pub fn send_with(&mut self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
        use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
        let sent = sendmsg(&self.stream, &[std::io::IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL);
        assert_eq!(sent.unwrap(), bytes.len());
    }

    /// The next answer.
    pub fn answer(&mut self) -> Answer {
        let end = loop {
            if let Some(end) = self.buffer.windows(4).position(|four| four == b"\r\n\r\n") {
                break end + 4;
            }
            assert!(
                self.receive(),
                "the server has gone; so far: {:?}",
                String::from_utf8_lossy(&self.buffer)
            );
        };
        let head = String::from_utf8(self.buffer.drain(..end).collect()).unwrap();
        let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
        let length: usize = length.map_or(0, |text| text.parse().unwrap());
        while self.buffer.len() < length {
            assert!(self.receive(), "the server has gone within a body");
        }
        let body = String::from_utf8(self.buffer.drain(..length).collect()).unwrap();
        let status = head.strip_prefix("HTTP/1.1 ").unwrap()[..3].parse().unwrap();
        Answer { status, head, body }
    }

    /// Sends a request without a body and takes the answer.
    pub fn call(&mut self, request: &str) -> Answer {
        self.send(format!("{request} HTTP/1.1\r\nHost: localhost\r\n\r\n"));
        self.answer()
    }

    /// Sends a request with a body and takes the answer.
    pub fn put(&mut self, name: &str, body: &str) -> Answer {
        let length = body.len();
        self.send(format!(
            "PUT /api/v1/{name} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{body}"
        ));
        self.answer()
    }

    /// Whether the server has closed the connection, with everything read that it had sent.
    pub fn closed(&mut self) -> bool {
        self.buffer.is_empty() && !self.receive()
    }

    /// Whether there is nothing to read for a while.
    pub fn is_quiet(&mut self) -> bool {
        self.stream.set_read_timeout(Some(Duration::from_millis(150))).unwrap();
        let quiet = self.stream.read(&mut [0]).is_err_and(|e| e.kind() == std::io::ErrorKind::WouldBlock);
        self.stream.set_read_timeout(Some(PATIENCE)).unwrap();
        quiet && self.buffer.is_empty()
    }

    fn receive(&mut self) -> bool {
        let mut bytes = [0; 4096];
        match self.stream.read(&mut bytes) {
            Ok(0) => false,
            Ok(count) => {
                self.buffer.extend_from_slice(&bytes[..count]);
                true
            }
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => false,
            Err(e) => panic!("no answer: {e}"),
        }
    }
}
