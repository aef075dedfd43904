//! What the user can do about an answer of the kernel: the last part of an error message (errno(3)).

use std::io;

/// A remedy for `error`, to be put behind a semicolon.
pub fn remedy(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EMFILE) => {
            "raise this process's limit on open files (ulimit -n, or LimitNOFILE= in a service)"
        }
        Some(libc::ENFILE) => "the whole host has too many files open: close some, or raise fs.file-max",
        Some(libc::ENOMEM) => "free memory on the host, or give the guest less",
        Some(libc::EAGAIN) => "raise the limit on processes (ulimit -u, or TasksMax= in a service)",
        Some(libc::EPERM | libc::EACCES) => "run as root, or as a user who may do it",
        Some(libc::ENOENT | libc::ENOTDIR) => "check the path",
        Some(libc::ENOSPC | libc::EDQUOT) => "make room on that file system",
        _ => "the host's kernel log (dmesg) may say more",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_named_with_the_command_that_raises_it() {
        assert!(remedy(&io::Error::from_raw_os_error(libc::EMFILE)).contains("ulimit -n"));
        assert!(remedy(&io::Error::from_raw_os_error(libc::EAGAIN)).contains("ulimit -u"));
        assert!(remedy(&io::Error::other("made up")).contains("dmesg"));
    }
}
