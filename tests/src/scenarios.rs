//! Every scenario there is. To add one: write a function that takes a [`Case`] in the file of its subject, and one line
//! in that file's table.

mod administrator;
mod api;
mod bad_input;
mod boot;
mod clients;
mod debian;
mod disk;
mod disk_faults;
mod doctor;
mod endings;
mod endurance;
mod faults;
mod gpu;
mod guest_view;
mod hostile;
mod hotplug;
mod nic;
mod nvme;
mod operator;
mod recovery;
mod slots;
pub mod steps;
mod tables;
mod virtio;

use crate::error::Result;
use crate::runner::{Case, Scenario};
use crate::spec::{Device, HostSpec, Hotplug, Kernel, Slot};

/// Slot of the GPU on the [`standard`] host.
const GPU: usize = 0;
/// Slot of the e1000e on the standard host.
const E1000E: usize = 1;
/// Slot of the igb on the standard host.
const IGB: usize = 2;
/// Slot of the NVMe drive on the standard host.
const NVME: usize = 3;

/// All scenarios, in the order they are listed and, on a host of one kind, run.
pub fn all() -> Vec<Scenario> {
    [
        // The longest first: it is not to be the last.
        endurance::table(),
        boot::table(),
        clients::table(),
        debian::table(),
        disk_faults::table(),
        bad_input::table(),
        doctor::table(),
        nic::table(),
        gpu::table(),
        guest_view::table(),
        nvme::table(),
        hostile::table(),
        hotplug::table(),
        slots::table(),
        endings::table(),
        administrator::table(),
        operator::table(),
        faults::table(),
        api::table(),
        tables::table(),
        virtio::table(),
        disk::table(),
    ]
    .concat()
}

/// The host most scenarios share: one of each device, each in a slot of its own.
fn standard() -> HostSpec {
    HostSpec::devices(&[Device::Gpu, Device::E1000e, Device::Igb, Device::Nvme])
}

/// Slot of the igb on the [`faulty`] host: its power supply takes 5 s to come up.
const SLOW_IGB: usize = 0;
/// Slot of the NVMe drive on that host, whose power supply can fail.
const FRAGILE_NVME: usize = 1;
/// Slot of the igb on that host that can be pulled out.
const PLUGGED_IGB: usize = 2;

/// A host with everything that can go wrong with slots.
fn faulty() -> HostSpec {
    HostSpec::new(&[
        Slot::new(Device::Igb).on_delay(5000),
        Slot { fragile: true, ..Slot::new(Device::Nvme) },
        Slot { hotplug: Hotplug::Native, ..Slot::new(Device::Igb) },
    ])
}

/// A scenario on the standard host with the 6.12 kernel that has every driver.
fn scenario(name: &str, run: fn(&Case<'_>) -> Result<()>) -> Scenario {
    on(standard(), name, run)
}

/// A scenario on a host of its own kind.
fn on(host: HostSpec, name: &str, run: fn(&Case<'_>) -> Result<()>) -> Scenario {
    Scenario { name: name.to_owned(), host, guest: Kernel::Generic6_12, run }
}

/// The scenario, once more with the 6.1 kernel in the guest, and once more with it in the host.
fn with_old_kernels(scenario: Scenario) -> Vec<Scenario> {
    let mut guest = scenario.clone();
    guest.name.push_str("_with_linux_6_1_in_the_guest");
    guest.guest = Kernel::Generic6_1;
    let mut host = scenario.clone();
    host.name.push_str("_with_linux_6_1_in_the_host");
    host.host = host.host.kernel(Kernel::Cloud6_1);
    vec![scenario, guest, host]
}
