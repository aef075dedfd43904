//! Sockets by path and by descriptor, as whoever starts the VMM finds them.

use std::io::{Read, Write};
use std::os::fd::{AsFd, IntoRawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::*;

const OPTION: &str = "--api-socket";

/// A directory that goes with the test.
struct Place(PathBuf);

impl Place {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("dormouse-sockets-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn open(path: &Path) -> Result<Listener, SocketError> {
    Listener::open(OPTION, &Endpoint::Path(path.to_owned()))
}

#[test]
fn a_socket_is_its_owners_alone_and_goes_with_the_vmm_while_its_lock_stays() {
    let place = Place::new();
    let path = place.join("vm.sock");
    let listener = open(&path).unwrap();
    assert_eq!(path.metadata().unwrap().mode() & 0o7777, 0o600);
    assert_eq!(place.join("vm.sock.lock").metadata().unwrap().mode() & 0o7777, 0o600);
    UnixStream::connect(&path).unwrap();
    drop(listener);
    assert!(!path.exists());
    assert!(place.join("vm.sock.lock").exists());
    open(&path).unwrap();
}

#[test]
fn a_second_vmm_is_refused_the_socket_and_leaves_it_alone() {
    let place = Place::new();
    let path = place.join("vm.sock");
    let _first = open(&path).unwrap();
    let error = open(&path).unwrap_err();
    assert!(matches!(error, SocketError::InUse { .. }), "{error}");
    assert!(error.to_string().contains("another VMM uses this socket"), "{error}");
    UnixStream::connect(&path).unwrap();
}

#[test]
fn a_socket_that_a_dead_vmm_left_is_replaced() {
    let place = Place::new();
    let path = place.join("vm.sock");
    drop(UnixListener::bind(&path).unwrap());
    assert!(UnixStream::connect(&path).is_err(), "it is there, and nobody listens");
    let listener = open(&path).unwrap();
    let mut client = UnixStream::connect(&path).unwrap();
    listener.socket.accept().unwrap().0.write_all(b"!").unwrap();
    assert_eq!(client.read(&mut [0]).unwrap(), 1);
}

#[test]
fn a_file_in_the_sockets_place_is_not_removed() {
    let place = Place::new();
    let path = place.join("precious");
    std::fs::write(&path, "data").unwrap();
    let error = open(&path).unwrap_err().to_string();
    assert!(error.contains("no socket") && error.contains("precious"), "{error}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "data");
    let link = place.join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    assert!(open(&link).is_err());
    assert!(link.is_symlink());
}

#[test]
fn a_path_that_cannot_be_had_says_why_and_what_to_do() {
    let place = Place::new();
    let error = open(&place.join("none/vm.sock")).unwrap_err().to_string();
    assert!(error.starts_with("--api-socket ") && error.contains("No such file or directory"), "{error}");
    let long = open(&place.join(&"a".repeat(200))).unwrap_err().to_string();
    assert!(long.contains("cannot be opened"), "{long}");
}

/// The number of a descriptor that the code under test is to own. Numbers are never taken twice in one process, so each has its own.
fn inherited(descriptor: impl AsFd, number: i32) -> i32 {
    let given = rustix::io::fcntl_dupfd_cloexec(descriptor, number).unwrap().into_raw_fd();
    assert_eq!(given, number);
    given
}

#[test]
fn a_descriptor_that_listens_is_taken_over_and_its_path_left_to_its_owner() {
    let place = Place::new();
    let path = place.join("given.sock");
    let given = UnixListener::bind(&path).unwrap();
    given.set_nonblocking(true).unwrap();
    let number = inherited(&given, 701);
    drop(given);
    let listener = Listener::open(OPTION, &Endpoint::Descriptor(number)).unwrap();
    let again = Listener::open(OPTION, &Endpoint::Descriptor(number)).unwrap_err();
    assert!(again.to_string().contains("is not open"), "two options cannot name one descriptor: {again}");
    UnixStream::connect(&path).unwrap();
    listener.socket.accept().unwrap();
    // It would return at once if it still did not block.
    let accepting = listener.accepting().unwrap();
    let waiting = std::thread::spawn(move || accepting.accept().map(drop));
    std::thread::sleep(Duration::from_millis(50));
    assert!(!waiting.is_finished());
    UnixStream::connect(&path).unwrap();
    waiting.join().unwrap().unwrap();
    drop(listener);
    assert!(path.exists());
}

#[test]
fn a_descriptor_of_another_kind_is_refused() {
    let (stream, _other) = UnixStream::pair().unwrap();
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    for number in [inherited(&stream, 702), inherited(&tcp, 703)] {
        let error = Listener::open(OPTION, &Endpoint::Descriptor(number)).unwrap_err();
        assert!(matches!(error, SocketError::NotListening { .. }), "{error}");
    }
    for number in [0, 1, 2, 9999] {
        let error = Listener::open(OPTION, &Endpoint::Descriptor(number)).unwrap_err();
        assert!(error.to_string().contains("is not open"), "{error}");
    }
}

#[test]
fn output_to_a_path_begins_anew_and_one_to_a_pipe_waits_for_its_reader() {
    let place = Place::new();
    let path = place.join("events");
    std::fs::write(&path, "old").unwrap();
    open_output("--event-monitor", &Endpoint::Path(path.clone())).unwrap().write_all(b"new").unwrap();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "new");

    let pipe = place.join("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, Mode::RWXU, 0).unwrap();
    let endpoint = Endpoint::Path(pipe.clone());
    let opening =
        std::thread::spawn(move || open_output("--event-monitor", &endpoint).unwrap().write_all(b"!"));
    std::thread::sleep(Duration::from_millis(50));
    assert!(!opening.is_finished(), "nobody reads yet");
    let mut reader = File::open(&pipe).unwrap();
    assert_eq!(reader.read(&mut [0]).unwrap(), 1);
    opening.join().unwrap().unwrap();
}
