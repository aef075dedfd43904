//! What the drivers of GPUs check in the guest before they let a device lose its power, read back through the guest's sysfs: the
//! objects, the topology and the SMBIOS fields of docs/gpu.md.

use super::steps::{FIRST, SECOND, guest_is_content, vm};
use super::{GPU, IGB, with_old_kernels};
use crate::error::{Result, ensure};
use crate::guest::Guest;
use crate::host::sysfs;
use crate::runner::{Case, Scenario};

/// The root ports above the first two assigned functions.
const PORTS: [&str; 2] = ["0000:00:01.0", "0000:00:02.0"];
/// A PCI-to-PCI bridge, and bit 15 of the PM capabilities register: PME from D3cold.
const BRIDGE: &str = "0x060400";
/// Lists of `_PR0` and `_PR3`, as the guest's kernel shows them.
const LISTS: [&str; 2] = ["power_resources_D0", "power_resources_D3hot"];

pub fn table() -> Vec<Scenario> {
    with_old_kernels(super::scenario("guest_finds_what_gpu_drivers_check_before_they_cut_power", checks))
        .into_iter()
        .filter(|scenario| !scenario.name.ends_with("in_the_host"))
        .collect()
}

fn checks(case: &Case<'_>) -> Result<()> {
    let spec = vm(case, &[GPU, IGB])
        .options("--platform chassis_type=10,system_manufacturer=ACME,system_product_name=Toaster");
    let guest = case.host.start_vm(&spec)?;
    let mut resources = Vec::new();
    for (function, port) in [FIRST, SECOND].into_iter().zip(PORTS) {
        // amdgpu, nouveau and xe look at the root port, NVIDIA's driver at the function or the port above it.
        for node in [function, port] {
            resources.push(own_resource(&guest, node)?);
        }
        let above = guest.sh(&format!("basename $(dirname $(readlink -f {}))", sysfs(function, "")))?;
        ensure(above == port, || format!("{function} is below {above} and not {port}"))?;
        let class = guest.sh(&format!("cat {}", sysfs(port, "class")))?;
        ensure(class == BRIDGE, || format!("{port} is of class {class}"))?;
        for (node, file, wanted) in [
            // The guest's kernel lets both lose their power.
            (port, "d3cold_allowed", "1"),
            (function, "d3cold_allowed", "1"),
            (port, "power/control", "auto"),
        ] {
            let seen = guest.sh(&format!("cat {}", sysfs(node, file)))?;
            ensure(seen == wanted, || format!("{node}: {file} is {seen} and not {wanted}"))?;
        }
        // Empty where the function cannot signal PME.
        let wakeup = guest.sh(&format!("cat {}", sysfs(function, "power/wakeup")))?;
        ensure(!wakeup.is_empty(), || format!("{function} cannot wake the guest"))?;
        let interrupts = guest.sh(&format!("ls {} | wc -l", sysfs(port, "msi_irqs")))?;
        ensure(interrupts == "1", || format!("{port} has {interrupts} MSIs for its PMEs"))?;
    }
    let count = resources.len();
    resources.sort();
    resources.dedup();
    ensure(resources.len() == count, || format!("power resources are shared: {resources:?}"))?;
    let year = guest.sh("cat /sys/class/dmi/id/bios_date")?;
    let young =
        year.rsplit('/').next().and_then(|year| year.parse::<u32>().ok()).is_some_and(|year| year >= 2015);
    ensure(young, || format!("the BIOS is of {year}: Linux lets no root port suspend"))?;
    for (field, wanted) in [
        ("chassis_type", "10"),
        ("chassis_vendor", "ACME"),
        ("sys_vendor", "ACME"),
        ("product_name", "Toaster"),
    ] {
        let seen = guest.sh(&format!("cat /sys/class/dmi/id/{field}"))?;
        ensure(seen == wanted, || format!("SMBIOS: {field} is {seen} and not {wanted}"))?;
    }
    guest_is_content(&guest)?;
    guest.power_off()
}

/// The one power resource that a node has for D0 and for D3hot; its ACPI name. The node must not be ejectable.
fn own_resource(guest: &Guest<'_>, node: &str) -> Result<String> {
    let firmware = sysfs(node, "firmware_node");
    let ejectable = guest.run(&format!("test -e {firmware}/eject"))?.status == 0;
    ensure(!ejectable, || format!("{node} is ejectable, so Linux leaves its power alone"))?;
    let path = guest.sh(&format!("cat {firmware}/path"))?;
    let mut names = Vec::new();
    for list in LISTS {
        // A list of one name. The directory holds links to the resources' own devices.
        let name = guest.sh(&format!("cd {firmware}/{list} && ls"))?;
        ensure(name.lines().count() == 1, || format!("{node}: {list} has {name:?}"))?;
        names.push(name);
    }
    ensure(names[0] == names[1], || format!("{node}: {names:?} for D0 and D3hot"))?;
    ensure(path.starts_with("\\_SB_.PCI0."), || format!("{node} is {path}"))?;
    Ok(names.remove(0))
}
