//! File descriptors that a program inherited and names by number (`fd=5`), made our own without unsafe code: pidfd_getfd(2) on this process.

use std::io;
use std::os::fd::OwnedFd;

use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};

/// A number behind which there is nothing to pass on.
#[derive(Debug, thiserror::Error)]
#[error(
    "fd={number} cannot be passed on: {cause}; the program that starts this one has to leave it open, as with {number}<>FILE in a shell"
)]
pub struct DescriptorError {
    number: i32,
    cause: io::Error,
}

/// A duplicate of the open file behind `number`.
///
/// # Errors
/// There is none.
pub fn own(number: i32) -> Result<OwnedFd, DescriptorError> {
    let duplicate =
        || pidfd_getfd(pidfd_open(getpid(), PidfdFlags::empty())?, number, PidfdGetfdFlags::empty());
    duplicate().map_err(|error| DescriptorError { number, cause: error.into() })
}
