//! Every scenario there is. To add one: write a function that takes a [`Case`] in the file of its subject, and one line
//! in that file's table.

mod administrator;
mod api;
mod bad_input;
mod boot;
mod clients;
mod come_and_go;
mod cpus;
mod debian;
mod disk;
mod disk_faults;
mod disk_kinds;
mod doctor;
mod endings;
mod endurance;
mod everything;
mod faults;
mod firmware;
mod gpu;
mod guest_view;
mod hostile;
mod hotplug;
mod huge_pages;
mod kata;
mod kexec;
mod memory;
mod net;
mod nic;
mod nvme;
mod operator;
mod plugging;
mod pmem;
mod recovery;
mod rings;
mod saved;
mod segments;
mod slots;
mod snapshot;
mod sockets;
pub mod steps;
mod tables;
mod vhost_rings;
mod vhost_user;
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

/// What `--short` leaves out besides repetitions with old kernels: what takes long, and what others are close to.
const LONG: &[&str] = &[
    "a_reserved_root_port_takes_a_device_that_sleeps",
    "a_second_machine_from_the_same_snapshot_is_refused_the_disk_of_the_first",
    "vsock_serves_many_connections_and_survives_clients_that_talk_nonsense",
    "vsock_carries_large_transfers_both_ways_and_closes_by_halves",
    "the_console_has_a_pseudoterminal_beside_the_serial_port",
    "thousand_power_cycles_from_two_vcpus_leak_nothing",
    "host_wakes_the_guest_a_hundred_times",
    "device_that_gets_its_power_late_comes_back_by_its_reset",
    "device_whose_slot_button_is_pressed_works_until_the_vm_ends",
    "a_balloon_gives_memory_back_unless_a_device_has_it_pinned",
    "a_guest_that_falls_silent_is_reset_by_the_watchdog",
    "a_guest_that_writes_at_random_to_the_processors_registers_harms_nobody",
    "a_windows_guest_would_find_hyper_v_and_a_linux_guest_kvm",
    "vhost_user_devices_come_and_go_while_the_guest_runs",
    "a_vhost_user_disk_keeps_what_is_written_and_its_death_is_an_error",
    "slow_power_supply_blocks_no_vcpu",
    "device_pulled_out_while_asleep_is_lost_at_its_next_on",
    "device_that_gets_no_power_is_lost_and_the_vm_lives_on",
    "memory_decode_switched_while_another_vcpu_reads_harms_nothing",
    "a_device_comes_and_goes_a_hundred_times_and_leaves_nothing_behind",
    "vcpus_come_and_go_beside_a_sleeping_device",
    "a_directory_of_the_host_is_the_guests_and_its_death_is_an_error_there",
    "device_pulled_out_while_on_is_taken_from_a_guest_that_lives_on",
    "debian_on_a_raw_disk_works_with_a_gpu_that_sleeps_and_wakes_meanwhile",
    "debian_on_a_qcow2_disk_works_with_a_gpu_that_sleeps_and_wakes_meanwhile",
    "debian_boots_through_uefi_from_virtio_disks_to_its_login_prompt",
    "malformed_rings_of_disks_and_networks_stop_them_and_nothing_else",
    "every_device_works_again_after_its_driver_was_unbound_and_bound",
    "a_guest_that_reboots_while_it_uses_every_device_has_them_all_again",
    "a_pause_in_the_middle_of_transfers_loses_nothing",
    "every_device_that_can_comes_and_goes_and_leaves_nothing_behind",
    "debian_on_a_qcow2_disk_keeps_its_files_when_the_vmm_is_killed",
    "what_the_guest_writes_to_a_shared_zone_is_in_its_file",
    "a_zone_grows_in_its_own_node",
    "the_console_leads_to_a_file_a_socket_or_nowhere",
    "a_tap_with_several_queues_and_a_large_mtu_outlives_a_reboot_of_the_guest",
    "the_hosts_kernel_moves_the_packets_where_it_may",
    "a_tap_that_is_removed_cuts_the_guests_link_and_no_more",
    "a_rate_limit_of_a_network_device_holds",
    "a_network_behind_a_vhost_user_backend_carries_files",
    "malformed_rings_of_a_vhost_user_disk_harm_nothing_else",
    "malformed_rings_of_a_shared_directory_harm_nothing_else",
    "a_full_host_file_system_is_an_io_error_in_the_guest",
    "a_rate_limit_and_a_group_slow_disks_down",
    "what_a_guest_has_flushed_survives_the_death_of_the_vmm",
    "an_idle_guest_with_disks_wakes_no_thread_of_the_vmm",
    "devices_come_and_go_in_the_second_pci_segment",
    "persistent_memory_comes_and_goes_beside_a_sleeping_device",
    "a_file_that_the_host_takes_away_is_an_error_in_the_guest_that_lives_on",
    "a_zone_is_plugged_in_its_own_node",
    "a_guest_of_96_pci_segments_finds_a_device_in_the_last",
    "an_assigned_drive_reaches_what_is_plugged_and_no_more_is_pinned",
    "memory_is_plugged_and_unplugged_and_plugged_again_after_a_reboot",
    "a_file_is_memory_of_the_guest_and_keeps_what_it_flushes",
    "an_added_device_stays_in_its_place_when_the_guest_reboots",
    "storm_of_reads_by_the_host_ends_with_the_device_asleep",
    "operator_wakes_a_device_and_keeps_it_awake_and_lets_it_sleep_with_ctl",
    "sleeping_device_that_is_watched_every_second_stays_in_d3cold",
    "ten_thousand_calls_leave_a_sleeping_device_asleep",
    "a_machine_that_has_grown_goes_on_as_large_as_it_was",
    "a_machine_with_an_assigned_device_is_not_saved_until_that_is_removed",
    "virtual_functions_made_while_the_device_sleeps_keep_it_awake_until_they_go",
    "device_that_the_host_removes_is_let_go_when_the_vm_ends",
    "partner_that_the_host_keeps_awake_keeps_the_power_on_and_the_guest_unharmed",
    "a_disk_belongs_to_one_vm_unless_all_only_read_it",
    "reboot_and_shutdown_by_api_with_a_device_asleep_give_it_back_working",
    "a_guest_with_every_device_attached_wakes_no_thread_of_the_vmm",
    "what_a_guest_has_plugged_goes_on_from_its_snapshot",
    "what_a_guest_has_plugged_in_a_zone_goes_on_from_its_snapshot",
    "memory_that_was_added_with_data_in_it_goes_on_from_its_snapshot",
    "pages_of_1_gib_are_a_guests_memory_and_an_assigned_drive_reaches_them",
    "a_second_kernel_finds_every_device_that_the_first_one_left_busy",
    "a_full_file_system_and_a_failing_one_are_io_errors_for_disks_of_every_kind",
];

/// Whether `--short` leaves a scenario out.
fn is_long(name: &str) -> bool {
    let repeats = name.contains("_with_linux_6_1_") && !name.starts_with("idle_e1000e");
    repeats || LONG.contains(&name)
}

/// All scenarios, in the order they are listed and, on a host of one kind, run.
pub fn all() -> Vec<Scenario> {
    [
        // The longest first: it is not to be the last.
        endurance::table(),
        boot::table(),
        firmware::table(),
        clients::table(),
        cpus::table(),
        kata::table(),
        debian::table(),
        everything::table(),
        come_and_go::table(),
        disk_faults::table(),
        disk_kinds::table(),
        kexec::table(),
        bad_input::table(),
        doctor::table(),
        nic::table(),
        gpu::table(),
        guest_view::table(),
        nvme::table(),
        memory::table(),
        huge_pages::table(),
        hostile::table(),
        hotplug::table(),
        segments::table(),
        slots::table(),
        endings::table(),
        administrator::table(),
        operator::table(),
        faults::table(),
        api::table(),
        tables::table(),
        virtio::table(),
        rings::table(),
        net::table(),
        disk::table(),
        sockets::table(),
        snapshot::table(),
        saved::table(),
        vhost_user::table(),
        vhost_rings::table(),
        pmem::table(),
        plugging::table(),
    ]
    .concat()
    .into_iter()
    .map(|scenario| Scenario { long: is_long(&scenario.name), ..scenario })
    .collect()
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
    Scenario { name: name.to_owned(), host, guest: Kernel::Generic6_12, run, long: false }
}

/// Where an old kernel is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Place {
    /// In the guest. Debian's own disks have modules of 6.12 only, and are booted with that.
    Guest,
    /// In the host.
    Host,
}

/// The scenario with the 6.1 kernel in one place.
pub fn with_old_kernel(mut scenario: Scenario, place: Place) -> Scenario {
    match place {
        Place::Guest => {
            scenario.name.push_str("_with_linux_6_1_in_the_guest");
            scenario.guest = match scenario.guest {
                Kernel::Cloud6_12 | Kernel::Cloud6_1 => Kernel::Cloud6_1,
                Kernel::Generic6_12 | Kernel::Generic6_1 => Kernel::Generic6_1,
            };
        }
        Place::Host => {
            scenario.name.push_str("_with_linux_6_1_in_the_host");
            scenario.host = scenario.host.kernel(Kernel::Cloud6_1);
        }
    }
    scenario
}

/// The scenario, once more with the 6.1 kernel in the guest, and once more with it in the host.
fn with_old_kernels(scenario: Scenario) -> Vec<Scenario> {
    let old = |place| with_old_kernel(scenario.clone(), place);
    vec![scenario.clone(), old(Place::Guest), old(Place::Host)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out_when_it_must_be_short_is_there_to_be_left_out() {
        let all = all();
        for name in LONG {
            assert!(all.iter().any(|scenario| scenario.name == *name && scenario.long), "{name}");
        }
    }
}
