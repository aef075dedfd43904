//! RAM as operators change it: at once where it grows, with the next boot where it shrinks, as in Cloud Hypervisor.

use devices::virtio::device::VirtioDevice;
use log::info;

use super::Lifecycle;
use crate::config::HotplugMethod;
use crate::memory::growth::{GrowthError, find_zone, grow};
use crate::vm_error::VmError;

/// The whole of a machine without zones, or one zone.
#[derive(Clone, Copy, Debug)]
pub enum Resized<'a> {
    /// The machine.
    Whole,
    /// The zone with this name.
    Zone(&'a str),
}

impl Lifecycle {
    /// Changes how much RAM there is. A machine that runs grows; the configuration is what the next one boots with.
    pub(super) fn resize_memory(&mut self, what: Resized<'_>, wanted: u64) -> Result<(), VmError> {
        let name = match what {
            Resized::Whole => "the guest's RAM",
            Resized::Zone(_) => "the memory zone",
        };
        let refused = |why: String| VmError::Resize { what: name, wanted, why };
        let vm = self.vm()?;
        let mut memory = vm.config.memory.clone();
        let zone = match what {
            Resized::Whole if memory.has_zones() => {
                return Err(refused(
                    "its memory is made of zones; resize one of them with vm.resize-zone".to_owned(),
                ));
            }
            Resized::Whole => None,
            Resized::Zone(id) => {
                let known: Vec<_> = memory.zones.iter().flatten().map(|zone| zone.id.clone()).collect();
                let zone = memory.zones.iter_mut().flatten().find(|zone| zone.id == id);
                let known = if known.is_empty() {
                    "there is none".to_owned()
                } else {
                    format!("there is {}", known.join(", "))
                };
                Some(zone.ok_or_else(|| refused(format!("there is no zone {id:?}; {known}")))?)
            }
        };
        let Some((running, _)) = &mut vm.machine else {
            // Only the configuration changes; it is looked at when the machine starts.
            match zone {
                None => memory.size = wanted,
                Some(zone) => zone.size = wanted,
            }
            vm.config.memory = memory;
            self.show_config();
            return Ok(());
        };
        let machine = running.machine_mut();
        let number = match &zone {
            None => 0,
            Some(zone) => find_zone(&machine.ram, &zone.id).map_err(|e| refused(e.to_string()))?,
        };
        let by_plugging = memory.hotplug_method == HotplugMethod::VirtioMem;
        let added = match zone {
            None if !by_plugging => {
                memory.size = wanted;
                memory.hotplugged_size = None;
                0
            }
            None => beyond(wanted, memory.size, &mut memory.hotplugged_size).map_err(refused)?,
            Some(zone) => beyond(wanted, zone.size, &mut zone.hotplugged_size).map_err(refused)?,
        };
        memory.validate()?;
        if by_plugging {
            let zone = machine.ram.zones().get(number).map_or("", |zone| zone.config.id.as_str());
            let mem = machine.ram.pluggable().iter().find(|mem| mem.name() == zone);
            match mem {
                Some(mem) => mem.resize(added).map_err(refused)?,
                None if added > 0 => {
                    return Err(refused(GrowthError::NoRoom { zone: zone.to_owned() }.to_string()));
                }
                None => {}
            }
            vm.config.memory = memory;
            self.show_config();
            return Ok(());
        }
        let now = machine.ram.size(number);
        match wanted.checked_sub(now) {
            Some(0) => {}
            Some(more) => grow(machine, number, more).map_err(|e| refused(e.to_string()))?,
            None => info!("{name} is {now} bytes until the next boot, and {wanted} from then on"),
        }
        vm.config.memory = memory;
        self.show_config();
        Ok(())
    }
}

/// How much `wanted` is beyond what was there at boot, which is also noted.
fn beyond(wanted: u64, at_boot: u64, hotplugged: &mut Option<u64>) -> Result<u64, String> {
    let added = wanted.checked_sub(at_boot);
    let added = added.ok_or_else(|| format!("it has {at_boot} bytes from the start, which stay"))?;
    *hotplugged = (added > 0).then_some(added);
    Ok(added)
}
