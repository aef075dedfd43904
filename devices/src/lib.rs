//! The devices of the machine: platform devices that every guest has, and assigned (VFIO) PCI functions.
//!
//! `vmm` creates them and puts them on its buses; nothing here knows KVM.

pub mod event_device;
pub mod i8042;
pub mod net;
pub mod pm1;
pub mod reset;
pub mod rtc;
pub mod serial;
pub mod vfio;
