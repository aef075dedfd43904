#![allow(unsafe_code)] // TUNSETIFF has no safe form.
//! `vm.add-net` with an open tap: request and descriptors in one message, and an answer within the time that libvirt waits for it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use crate::Outcome;
use crate::wire::Connection;

/// libvirt's patience.
const PATIENCE: Duration = Duration::from_millis(500);

/// Opens `pairs` queues of the tap called `name`, creating it if need be.
fn open(name: &str, pairs: usize) -> io::Result<Vec<File>> {
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if pairs > 1 {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    let mut request = [0_u8; size_of::<libc::ifreq>()];
    for (to, from) in request.iter_mut().take(libc::IFNAMSIZ - 1).zip(name.bytes()) {
        *to = from;
    }
    request[libc::IFNAMSIZ..libc::IFNAMSIZ + 2].copy_from_slice(&flags.to_le_bytes()[..2]);
    let mut files = Vec::new();
    for _ in 0..pairs {
        let file = File::options().read(true).write(true).open("/dev/net/tun")?;
        // SAFETY: `request` is as large as a `struct ifreq` and has no pointers in it.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, request.as_mut_ptr()) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        files.push(file);
    }
    Ok(files)
}

/// Hands the tap over; prints the answer.
pub fn add(socket: &str, tap: &str, pairs: &str, body: &str) -> Outcome {
    let pairs = pairs.parse().map_err(|_| format!("{pairs} is no number"))?;
    let files = open(tap, pairs).map_err(|e| format!("{tap}: {e}"))?;
    let descriptors: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    let mut connection = Connection::new(socket)?;
    connection.patience(PATIENCE)?;
    let length = body.len();
    let request = format!(
        "PUT /api/v1/vm.add-net HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
    );
    let begin = Instant::now();
    connection.send_with(request.as_bytes(), &descriptors)?;
    let answer = connection.answer()?;
    println!("{} {} in {} ms", answer.status, answer.body, begin.elapsed().as_millis());
    match answer.status {
        200 | 204 => Ok(()),
        status => Err(format!("vm.add-net: {status} {}", answer.body)),
    }
}
