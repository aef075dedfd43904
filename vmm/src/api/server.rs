//! The listening socket and a thread for each client.
//!
//! A thread sleeps until its client sends something, so a silent client costs nothing and a slow one holds up nobody else.

use std::io::{self, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use log::warn;

use super::http::{Connection, Next};
use super::{Access, Api, routes};

/// Clients at a time.
const MAX_CONNECTIONS: usize = 10;
/// Stack of a client's thread.
const STACK_BYTES: usize = 256 << 10;
/// Name of all threads of the server, which management software looks for.
const THREAD: &str = "http-server";
/// What a client too many gets; its form is as old as the API.
const FULL: &[u8] =
    b"HTTP/1.1 503\r\nServer: Cloud Hypervisor API\r\nConnection: close\r\nContent-Length: 40\r\n\r\n\
{ \"error\": \"Too many open connections\" }";
/// How long to wait when no client can be accepted for want of descriptors or memory.
const RETRY: Duration = Duration::from_millis(100);

/// Accepts clients on a thread of its own, for the rest of the process's life.
pub fn serve(listener: UnixListener, api: Arc<Api>, access: Access) -> io::Result<()> {
    thread::Builder::new().name(THREAD.to_owned()).stack_size(STACK_BYTES).spawn(move || {
        let clients = Arc::new(AtomicUsize::new(0));
        loop {
            match listener.accept() {
                Ok((stream, _)) => admit(stream, &api, access, &clients),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    warn!("a client of the API cannot be accepted: {e}");
                    thread::sleep(RETRY);
                }
            }
        }
    })?;
    Ok(())
}

/// Counts a client for as long as it is there.
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn admit(mut stream: UnixStream, api: &Arc<Api>, access: Access, clients: &Arc<AtomicUsize>) {
    let place = Place(Arc::clone(clients));
    let full = clients.fetch_add(1, Ordering::SeqCst) >= MAX_CONNECTIONS;
    let result = if full {
        stream.write_all(FULL)
    } else {
        let api = Arc::clone(api);
        let serving = move || {
            let _place = place;
            converse(Connection::new(stream), &api, access);
        };
        thread::Builder::new().name(THREAD.to_owned()).stack_size(STACK_BYTES).spawn(serving).map(drop)
    };
    if let Err(e) = result {
        warn!("a client of the API cannot be served: {e}");
    }
}

fn converse(mut connection: Connection, api: &Api, access: Access) {
    loop {
        let next = connection.next();
        let one = api.answering.one();
        let reply = match next {
            Next::Request(request) => routes::answer(request, api, access),
            Next::Refused(reply) => reply,
            Next::Broken(reply) => {
                let sent = connection.send(&reply);
                drop(one);
                if sent.is_ok() {
                    connection.give_up();
                }
                return;
            }
            Next::Closed => return,
        };
        if connection.send(&reply).is_err() {
            return;
        }
    }
}
