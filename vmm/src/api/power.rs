//! `vm.power`: the power of every assigned device, as the VMM and the host's sysfs have it. Neither wakes a device.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use vfio_pm::Snapshot;
use vfio_pm::sysfs::SYSFS;

use super::Api;
use crate::status::{CounterMap, DeviceView};
use crate::vm_error::VmError;

/// All devices.
pub fn power(api: &Api) -> Result<Value, VmError> {
    let mut devices = Vec::new();
    let state = api.status.look(|_, state, machine| {
        for device in machine.iter().flat_map(|machine| &machine.devices) {
            devices.extend(device.power().map(|power| (device.id.clone(), device.guest, power)));
        }
        state
    });
    let state = state.ok_or(VmError::NotCreated)?;
    let devices: Vec<Value> = devices
        .into_iter()
        .map(|(id, guest, snapshot)| {
            let host = host_power(Path::new(SYSFS), &snapshot.bdf);
            let mut value = json!(snapshot);
            if let Some(fields) = value.as_object_mut() {
                fields.insert("id".to_owned(), json!(id));
                fields.insert("guest_bdf".to_owned(), json!(guest.to_string()));
                fields.insert("host".to_owned(), json!(host));
            }
            value
        })
        .collect();
    Ok(json!({ "state": state, "devices": devices }))
}

/// What the host's kernel says of a device; these files are answered from memory (Linux `drivers/pci/pci-sysfs.c`,
/// `drivers/base/power/sysfs.c`).
pub fn host_power(sysfs: &Path, bdf: &str) -> Value {
    let device = sysfs.join("bus/pci/devices").join(bdf);
    let read = |file: &str| {
        let text = fs::read_to_string(device.join(file)).ok()?;
        Some(text.trim().to_owned())
    };
    let millis = |file| read(file).and_then(|text| text.parse::<u64>().ok());
    json!({
        "power_state": read("power_state"),
        "runtime_status": read("power/runtime_status"),
        "runtime_suspended_ms": millis("power/runtime_suspended_time"),
        "runtime_active_ms": millis("power/runtime_active_time"),
    })
}

/// A device's counters as one flat map.
pub fn counters(device: &DeviceView) -> CounterMap {
    device.power().map(|power| flat(&power)).unwrap_or_default()
}

fn flat(power: &Snapshot) -> CounterMap {
    let kinds = [
        ("", &power.counts),
        ("wakes_", &power.wakes),
        ("failures_", &power.failures),
        ("denials_", &power.denials),
        ("ms_", &power.time_in_ms),
    ];
    let named = kinds.into_iter().flat_map(|(prefix, values)| {
        values.iter().map(move |(name, value)| (format!("power_{prefix}{}", name.replace('-', "_")), *value))
    });
    named.chain([("power_transitions".to_owned(), power.transitions)]).collect()
}
