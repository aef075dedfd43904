//! What the backend asks of this process, by a channel of its own: that its device's configuration has changed. (Vhost-user Protocol, "Back-end
//! message types".)
//!
//! The library's own reader waits for the rest of a message that has begun, for ever if need be. This one never waits.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

/// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG.
const CONFIG_CHANGE: u32 = 2;
/// Flags of a message: version 1, a reply, a reply is wanted.
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
const HEADER: usize = 12;
/// The longest message that there is.
const BODY_MAX: usize = 4096;

/// The channel's end here.
#[derive(Debug)]
pub(super) struct Notices {
    stream: UnixStream,
    read: Vec<u8>,
}

impl Notices {
    /// A channel, and the end that the backend gets.
    pub(super) fn new() -> io::Result<(Self, UnixStream)> {
        let (here, there) = UnixStream::pair()?;
        here.set_nonblocking(true)?;
        Ok((Self { stream: here, read: Vec::new() }, there))
    }

    /// Readable when there is something.
    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Reads what there is; whether the configuration has changed.
    ///
    /// # Errors
    /// The channel is closed, or what comes is no message.
    pub(super) fn take(&mut self) -> io::Result<bool> {
        let mut bytes = [0; 1024];
        // Descriptors that are sent along are closed by the kernel: nobody asks for them.
        match (&self.stream).read(&mut bytes) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => self.read.extend_from_slice(&bytes[..count]),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(e) => return Err(e),
        }
        let mut changed = false;
        while let Some((request, flags, length)) = header(&self.read)? {
            if self.read.len() < HEADER + length {
                break;
            }
            self.read.drain(..HEADER + length);
            changed |= request == CONFIG_CHANGE;
            if flags & NEED_REPLY != 0 {
                self.reply(request, request == CONFIG_CHANGE)?;
            }
        }
        Ok(changed)
    }

    fn reply(&self, request: u32, done: bool) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(HEADER + 8);
        bytes.extend_from_slice(&request.to_le_bytes());
        bytes.extend_from_slice(&(VERSION | REPLY).to_le_bytes());
        bytes.extend_from_slice(&8_u32.to_le_bytes());
        bytes.extend_from_slice(&u64::from(!done).to_le_bytes());
        // Who does not read its answers loses the channel.
        (&self.stream).write_all(&bytes)
    }
}

fn header(bytes: &[u8]) -> io::Result<Option<(u32, u32, usize)>> {
    let word = |at: usize| {
        let bytes = bytes.get(at..at + 4)?.try_into().ok()?;
        Some(u32::from_le_bytes(bytes))
    };
    let (Some(request), Some(flags), Some(length)) = (word(0), word(4), word(8)) else { return Ok(None) };
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    if flags & 3 != VERSION || length > BODY_MAX {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(Some((request, flags, length)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(body.len()).unwrap();
        [&request.to_le_bytes()[..], &flags.to_le_bytes(), &length.to_le_bytes(), body].concat()
    }

    #[test]
    fn a_change_is_heard_of_however_it_is_cut_and_answered_if_need_be() {
        let (mut notices, mut backend) = Notices::new().unwrap();
        assert!(!notices.take().unwrap(), "nothing there yet");
        let text = [message(9, 1, b"12345678"), message(CONFIG_CHANGE, 1 | NEED_REPLY, b"")].concat();
        for byte in &text[..text.len() - 1] {
            backend.write_all(&[*byte]).unwrap();
            assert!(!notices.take().unwrap());
        }
        backend.write_all(&text[text.len() - 1..]).unwrap();
        assert!(notices.take().unwrap());
        let mut reply = [0; 20];
        backend.read_exact(&mut reply).unwrap();
        assert_eq!(reply.to_vec(), message(CONFIG_CHANGE, VERSION | REPLY, &[0; 8]));
    }

    #[test]
    fn what_is_no_message_and_an_end_close_the_channel() {
        for wrong in [message(CONFIG_CHANGE, 2, b""), message(CONFIG_CHANGE, 1, &[0; BODY_MAX + 1])] {
            let (mut notices, mut backend) = Notices::new().unwrap();
            backend.write_all(&wrong).unwrap();
            assert!(notices.take().is_err());
        }
        let (mut notices, backend) = Notices::new().unwrap();
        drop(backend);
        assert!(notices.take().is_err());
    }
}
