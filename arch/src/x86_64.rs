//! The PC: flat memory map, bzImage and PVH boot, CPUID, registers.

pub mod apic;
pub mod boot;
pub mod cpuid;
mod hyperv;
pub mod layout;
pub mod loader;
pub mod segments;
pub mod topology;
