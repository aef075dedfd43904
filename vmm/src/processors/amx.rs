//! The permission to give a guest the advanced matrix extensions, whose state is too large to be saved unasked (Linux
//! `Documentation/arch/x86/xstate.rst`).

#![allow(unsafe_code)] // arch_prctl(2) has no safe form.

use std::io;

/// `ARCH_REQ_XCOMP_GUEST_PERM` and `XFEATURE_XTILEDATA` of Linux.
const REQUEST_GUEST_PERMISSION: libc::c_int = 0x1025;
const TILE_DATA: libc::c_ulong = 18;

/// Asks the host's kernel, for the whole process. Before KVM is asked what it supports, and before the first vCPU.
///
/// # Errors
/// The kernel does not know of it, or the processor has none.
pub fn request_permission() -> io::Result<()> {
    // SAFETY: passes two numbers and no pointers.
    let result = unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST_GUEST_PERMISSION, TILE_DATA) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
