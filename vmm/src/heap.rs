//! What the heap keeps of memory that has been freed: little, so that a VMM whose clients once sent it much is small again (mallopt(3)).
//!
//! glibc learns from the largest blocks that are freed to keep such blocks for the next time, up to 64 MiB in the pool of each thread. A
//! VMM has no next time: it sleeps.
#![allow(unsafe_code)] // mallopt has no safe form.

/// Larger blocks are mappings of their own, which go when they are freed.
const LARGE: libc::c_int = 128 << 10;
/// Pools that the threads share.
const POOLS: libc::c_int = 2;

/// Sets this for the process. Called before there are threads.
pub fn keep_little() {
    #[cfg(target_env = "gnu")]
    for (parameter, value) in
        [(libc::M_MMAP_THRESHOLD, LARGE), (libc::M_TRIM_THRESHOLD, LARGE), (libc::M_ARENA_MAX, POOLS)]
    {
        // SAFETY: the call takes any two numbers and changes only how later allocations are served.
        if unsafe { libc::mallopt(parameter, value) } != 1 {
            log::debug!("the heap keeps what it likes: parameter {parameter} is not known");
        }
    }
}
