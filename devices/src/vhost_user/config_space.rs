//! Reading a device's configuration from its backend (Vhost-user Protocol, VHOST_USER_GET_CONFIG).
//!
//! By hand: a backend that refuses answers with a shorter message, for whose rest the library would wait. So nobody could ask how much there is.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

const GET_CONFIG: u32 = 24;
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
/// Offset, length, flags.
const FIELDS: usize = 12;
/// VHOST_USER_MAX_CONFIG_SIZE, with room for the fields.
const BODY_MAX: usize = 4096;

/// The first `size` bytes; `None` if the backend has not so many.
///
/// # Errors
/// What comes is no answer.
pub(super) fn read(mut stream: &UnixStream, size: u32) -> io::Result<Option<Vec<u8>>> {
    let length = usize::try_from(size).map_err(io::Error::other)?;
    let total = u32::try_from(FIELDS + length).map_err(io::Error::other)?;
    let mut message = Vec::with_capacity(2 * FIELDS + length);
    for word in [GET_CONFIG, VERSION, total, 0, size, 0] {
        message.extend_from_slice(&word.to_ne_bytes());
    }
    message.resize(2 * FIELDS + length, 0);
    stream.write_all(&message)?;

    let mut header = [0; FIELDS];
    stream.read_exact(&mut header)?;
    let [request, flags, total] = words(&header);
    let total = usize::try_from(total).unwrap_or(usize::MAX);
    if request != GET_CONFIG || flags & (VERSION | REPLY) != VERSION | REPLY || total > BODY_MAX {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut body = vec![0; total];
    stream.read_exact(&mut body)?;
    let Some((fields, config)) = body.split_first_chunk::<FIELDS>() else { return Ok(None) };
    let [offset, there, _] = words(fields);
    Ok((offset == 0 && there == size && config.len() == length).then(|| config.to_vec()))
}

fn words(bytes: &[u8; FIELDS]) -> [u32; 3] {
    let [a, b, c, d, e, f, g, h, i, j, k, l] = *bytes;
    [[a, b, c, d], [e, f, g, h], [i, j, k, l]].map(u32::from_ne_bytes)
}
