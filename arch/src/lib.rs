//! What one processor architecture makes of a virtual machine: where things lie in guest memory, what a
//! kernel image is and how it is entered, and what the processors say about themselves.
//!
//! Everything here is data and pure functions over guest memory: no ioctl, no thread, no device. The
//! machine asks for a [`layout::MemoryMap`], loads a kernel with [`loader`], and hands the register values
//! of [`boot`] and [`cpuid`] to the hypervisor itself.
//!
//! One module per architecture; its parts are re-exported under names that do not say which one it is, so
//! that users of this crate need no `cfg`.

#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "x86_64")]
pub use x86_64::*;

#[cfg(not(target_arch = "x86_64"))]
compile_error!("Dormouse supports x86_64 hosts only so far");
