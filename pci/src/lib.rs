//! PCI Express as the guest sees it: addresses, configuration space, capabilities, BAR decode, root ports.
//!
//! Everything here is a register model. Nothing in this crate opens a file, knows KVM or touches hardware;
//! what must reach outside goes through the traits in [`interrupt`], [`pme`] and [`function`].

pub mod assign;
pub mod bar;
pub mod bdf;
pub mod bus;
pub mod cap;
pub mod config;
pub mod ecam;
pub mod function;
pub mod host_bridge;
pub mod interrupt;
pub mod pme;
pub mod registers;
pub mod regs;
pub mod root_port;
pub mod window;

#[cfg(test)]
mod testing;

pub use bdf::{Bdf, DevFn};
pub use function::PciFunction;
