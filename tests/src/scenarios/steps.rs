//! What several scenarios do.

use std::time::Duration;

use crate::error::{Result, ensure};
use crate::guest::{Guest, VmSpec};
use crate::host::{Host, sysfs};
use crate::rpc::wait_for;
use crate::runner::Case;
use crate::spec::address;

/// The first assigned function, as the guest sees it.
pub const FIRST: &str = "0000:01:00.0";
/// The second, in a slot of its own.
pub const SECOND: &str = "0000:02:00.0";
/// How long anything may take that the drivers do after their own delays (5 s for the NICs).
pub const IDLE: Duration = Duration::from_secs(20);
/// How long a wake may take.
pub const WAKE: Duration = Duration::from_secs(10);

/// Host address of the function in `slot`.
pub fn bdf(slot: usize) -> String {
    address(slot, 0)
}

/// A VM with the functions of the given slots of the host.
pub fn vm(case: &Case<'_>, slots: &[usize]) -> VmSpec {
    slots.iter().fold(VmSpec::new(case.guest), |vm, slot| vm.device(case.host, &bdf(*slot)))
}

/// Name of the network interface of a function in the guest.
pub fn interface(guest: &Guest<'_>, function: &str) -> Result<String> {
    wait_for("the driver makes an interface", WAKE, || {
        let name = guest.probe(&format!("ls {}", sysfs(function, "net")))?;
        Ok(if name.status == 0 && !name.text.is_empty() { Ok(name.text) } else { Err(name.text) })
    })
}

/// Brings the link up and checks that traffic passes to the emulated gateway.
pub fn pass_traffic(guest: &Guest<'_>, function: &str) -> Result<()> {
    let name = interface(guest, function)?;
    // Down and up again: that is the use which makes a sleeping driver resume.
    guest.sh(&format!(
        "ip link set {name} down; ip link set {name} up; ip addr flush dev {name}; ip addr add 10.0.2.15/24 dev {name}"
    ))?;
    guest.wait_file(&format!("/sys/class/net/{name}/carrier"), "1", IDLE)?;
    wait_for("the gateway answers", IDLE, || {
        let ping = guest.run("ping -c 1 -W 2 10.0.2.2")?;
        Ok(if ping.status == 0 { Ok(()) } else { Err(ping.text) })
    })?;
    // Each card has a gateway of that address: the next one to be tried must be the only way to it.
    guest.sh(&format!("ip addr flush dev {name}")).map(drop)
}

/// Takes the cable out and lets the driver suspend; returns when the host's device has no power.
pub fn nic_to_sleep(host: &Host, guest: &Guest<'_>, slot: usize, function: &str) -> Result<()> {
    let since = host.timeline.now();
    host.set_link(slot, false)?;
    guest.sh(&format!("echo auto >{}", sysfs(function, "power/control")))?;
    nic_asleep(host, slot, since)
}

/// Waits until the NIC in `slot` has lost its power, and the firmware has cut it since `since`.
pub fn nic_asleep(host: &Host, slot: usize, since: Duration) -> Result<()> {
    host.wait_power_state(&bdf(slot), "D3cold", IDLE)?;
    wait_for("the firmware cuts the power", WAKE, || {
        let count = host.power_count(slot, false, since);
        Ok(if count > 0 { Ok(()) } else { Err("not yet".to_owned()) })
    })
}

/// VFIO's driver, and another that takes any function: the host's own drivers for the test bed's devices are not in its image.
pub const VFIO: &str = "vfio-pci";
/// See [`VFIO`].
pub const UIO: &str = "uio_pci_generic";

/// Moves a function of the host to another driver.
pub fn give(host: &Host, function: &str, driver: &str) -> Result<()> {
    host.sh(&format!(
        "modprobe {driver}; cd {} && echo {driver} >driver_override && echo {function} >driver/unbind \
         && echo {function} >/sys/bus/pci/drivers_probe && test -e driver",
        sysfs(function, "")
    ))
    .map(drop)
}

/// Detaches the guest's driver from a function and allows it to sleep.
pub fn unbind(guest: &Guest<'_>, function: &str) -> Result<()> {
    guest.sh(&format!(
        "echo {function} >{} && echo auto >{}",
        sysfs(function, "driver/unbind"),
        sysfs(function, "power/control")
    ))?;
    Ok(())
}

/// Attaches the guest's driver again.
pub fn bind(guest: &Guest<'_>, function: &str) -> Result<()> {
    guest
        .sh(&format!("echo {function} >/sys/bus/pci/drivers_probe; test -e {}", sysfs(function, "driver")))?;
    Ok(())
}

/// Waits until the guest's driver has found what is on the NVMe drive.
pub fn wait_for_drive(guest: &Guest<'_>) -> Result<()> {
    wait_for("the drive's namespace appears", IDLE, || {
        let list = guest.run("ls /dev/nvme*")?;
        Ok(if guest.run("test -b /dev/nvme0n1")?.status == 0 { Ok(()) } else { Err(list.text) })
    })
}

/// Takes a function from whatever driver is built into the guest's kernel (virtio_pci is).
pub fn no_driver(guest: &Guest<'_>, function: &str) -> Result<()> {
    let driver = sysfs(function, "driver");
    guest.sh(&format!("[ ! -e {driver} ] || echo {function} >{driver}/unbind")).map(drop)
}

/// Puts a function to sleep that no driver has, by `power/control` alone.
pub fn unbound_to_sleep(host: &Host, guest: &Guest<'_>, slot: usize, function: &str) -> Result<()> {
    guest.sh(&format!("echo auto >{}", sysfs(function, "power/control")))?;
    host.wait_power_state(&bdf(slot), "D3cold", IDLE)
}

/// Wakes such a function, from the guest.
pub fn unbound_wake(guest: &Guest<'_>, function: &str) -> Result<()> {
    guest.sh(&format!("echo on >{}", sysfs(function, "power/control")))?;
    guest.wait_file(&sysfs(function, "power_state"), "D0", WAKE)
}

/// The vendor identifier as the hardware's config space has it, read through the guest's kernel.
pub fn vendor(guest: &Guest<'_>, function: &str) -> Result<String> {
    guest.sh(&format!("guest_tool config {function} 0"))
}

/// Checks that the guest's kernel has had nothing to complain about.
pub fn guest_is_content(guest: &Guest<'_>) -> Result<()> {
    const TROUBLE: &str =
        "BUG:|Oops|WARNING: CPU|soft lockup|inaccessible|Spurious native|not ready|ACPI Error";
    // Warnings of the guest drivers themselves, as far as their sources tell (not tried without Dormouse): igb of 6.12 sets
    // its queues without the lock when it resumes, virtio_gpu leaves a buffer behind when it is unbound early. And the scheduler of 6.12 can
    // find its own deadline server among the tasks of a processor that goes offline.
    const KNOWN: &str = "netif_set_real_num_[rt]x_queues|drm_mm_takedown|sched_cpu_dying";
    let text = guest.run(&format!("dmesg | grep -E '{TROUBLE}' | grep -vE '{KNOWN}'"))?.text;
    ensure(text.is_empty(), || format!("the guest's kernel complains: {text}"))
}
