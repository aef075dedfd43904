//! Sockets of the family AF_VSOCK (vsock(7)), for which a shell has no program.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::thread;

use super::number;

/// Data of each of many connections.
const PIECE: usize = 3000;

/// `guest_tool vsock ...`.
pub fn run(words: &[&str]) -> io::Result<()> {
    match words {
        ["connect", cid, port] => talk(connect(parse(cid)?, parse(port)?)?),
        ["listen", port] => {
            let listener = listen(parse(port)?)?;
            talk(accept(&listener)?)
        }
        ["echo", port] => echo(&listen(parse(port)?)?),
        ["many", cid, port, count] => many(parse(cid)?, parse(port)?, parse(count)?),
        _ => Err(io::Error::other(
            "usage: guest_tool vsock connect CID PORT | listen PORT | echo PORT | many CID PORT COUNT",
        )),
    }
}

fn parse(text: &str) -> io::Result<u32> {
    number(text)?.try_into().map_err(io::Error::other)
}

fn socket() -> io::Result<OwnedFd> {
    // SAFETY: passes no pointers.
    let fd = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn address(cid: u32, port: u32) -> io::Result<(libc::sockaddr_vm, libc::socklen_t)> {
    // SAFETY: a structure of integers, of which zeros are all right.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK.try_into().map_err(io::Error::other)?;
    (address.svm_cid, address.svm_port) = (cid, port);
    Ok((address, size_of::<libc::sockaddr_vm>().try_into().map_err(io::Error::other)?))
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn connect(cid: u32, port: u32) -> io::Result<File> {
    let socket = socket()?;
    let (address, len) = address(cid, port)?;
    // SAFETY: an address of its type, with its length.
    check(unsafe { libc::connect(socket.as_raw_fd(), std::ptr::from_ref(&address).cast(), len) })?;
    Ok(File::from(socket))
}

fn listen(port: u32) -> io::Result<OwnedFd> {
    let socket = socket()?;
    let (address, len) = address(libc::VMADDR_CID_ANY, port)?;
    // SAFETY: an address of its type, with its length.
    check(unsafe { libc::bind(socket.as_raw_fd(), std::ptr::from_ref(&address).cast(), len) })?;
    // SAFETY: passes no pointers.
    check(unsafe { libc::listen(socket.as_raw_fd(), 128) })?;
    println!("listening");
    Ok(socket)
}

fn accept(listener: &OwnedFd) -> io::Result<File> {
    // SAFETY: nothing is to be written behind the null pointers.
    let fd = unsafe { libc::accept(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut()) };
    check(fd)?;
    // SAFETY: a new descriptor, which nobody else owns.
    Ok(unsafe { File::from_raw_fd(fd) })
}

fn end_half(socket: &File) -> io::Result<()> {
    // SAFETY: passes no pointers.
    check(unsafe { libc::shutdown(socket.as_raw_fd(), libc::SHUT_WR) })
}

/// Sends standard input, then ends that half; meanwhile prints what comes, to the end of the other half.
fn talk(mut socket: File) -> io::Result<()> {
    let mut out = socket.try_clone()?;
    let sender = thread::spawn(move || {
        io::copy(&mut io::stdin(), &mut out)?;
        end_half(&out)
    });
    io::copy(&mut socket, &mut io::stdout())?;
    sender.join().map_err(|_| io::Error::other("the sender has panicked"))?
}

/// Sends back to everybody what they send, for ever.
fn echo(listener: &OwnedFd) -> io::Result<()> {
    loop {
        let mut socket = accept(listener)?;
        thread::spawn(move || {
            let mut out = socket.try_clone()?;
            io::copy(&mut socket, &mut out)?;
            end_half(&out)
        });
    }
}

/// Makes many connections to somebody who sends everything back, all open at a time.
fn many(cid: u32, port: u32, count: u32) -> io::Result<()> {
    let mut sockets = (0..count).map(|_| connect(cid, port)).collect::<io::Result<Vec<_>>>()?;
    let data = |index: usize| -> Vec<u8> {
        (0..PIECE).map(|at| u8::try_from((at * 7 + index * 13) % 251).unwrap_or(0)).collect()
    };
    for (index, socket) in sockets.iter_mut().enumerate() {
        socket.write_all(&data(index))?;
    }
    for (index, socket) in sockets.iter_mut().enumerate() {
        end_half(socket)?;
        let mut back = Vec::new();
        socket.read_to_end(&mut back)?;
        if back != data(index) {
            return Err(io::Error::other(format!(
                "connection {index}: {} other bytes came back",
                back.len()
            )));
        }
    }
    println!("{count} connections");
    Ok(())
}
