//! The devices of the machine: platform devices that every guest has, assigned (VFIO) PCI functions, and
//! paravirtual (virtio) ones.
//!
//! `vmm` creates them and puts them on its buses; nothing here knows KVM.

pub mod block;
pub mod emulated;
pub mod event_device;
pub mod i8042;
pub mod memory_slots;
pub mod net;
pub mod pm1;
pub mod pm_timer;
pub mod processors;
pub mod pvpanic;
pub mod rate_limit;
pub mod reset;
pub mod rtc;
pub mod serial;
pub mod vfio;
pub mod vhost_user;
pub mod virtio;
