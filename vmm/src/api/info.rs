//! `vmm.ping`, `vm.info` and `vm.counters`, in Cloud Hypervisor's shapes.

use std::collections::BTreeMap;

use pci::Bdf;
use pci::bar::BarKind;
use serde_json::{Value, json};

use super::{Api, power};
use crate::multicall::VERSION;
use crate::status::{BarPlace, CounterMap, DeviceView, EmulatedView, MachineView, VmState};
use crate::vm_error::VmError;

/// The release of Cloud Hypervisor whose API this is; clients compare it.
pub const API_VERSION: &str = "54.0.0";

/// Who answers.
pub fn ping(_api: &Api) -> Result<Value, VmError> {
    Ok(json!({
        "build_version": VERSION,
        "version": API_VERSION,
        "pid": std::process::id(),
        "features": ["kvm"],
    }))
}

/// Configuration, state and devices.
pub fn info(api: &Api) -> Result<Value, VmError> {
    api.status
        .look(|config, state, machine| {
            let mut info = json!({
                "config": config,
                "state": state,
                "memory_actual_size": config.memory.total_size().saturating_sub(withheld(machine)),
            });
            if let (Some(machine), Some(fields)) = (machine, info.as_object_mut()) {
                fields.insert("device_tree".to_owned(), device_tree(machine));
            }
            info
        })
        .ok_or(VmError::NotCreated)
}

/// Bytes of memory that the guest has given up.
fn withheld(machine: Option<&MachineView>) -> u64 {
    machine.into_iter().flat_map(|machine| &machine.emulated).map(|d| d.function.withheld_memory()).sum()
}

/// The root ports and the functions below them. Cloud Hypervisor's devices are all on bus 0, so its tree has no ports; a port's
/// name cannot be a device's.
fn device_tree(machine: &MachineView) -> Value {
    let mut nodes: BTreeMap<String, Value> = BTreeMap::new();
    for device in &machine.devices {
        let port = device.port.map(|port| (port_name(port), port));
        if let Some((name, bdf)) = &port {
            let node = nodes.entry(name.clone()).or_insert_with(
                || json!({ "id": name, "resources": [], "children": [], "pci_bdf": bdf.to_string() }),
            );
            if let Some(children) = node["children"].as_array_mut() {
                children.push(json!(device.id));
            }
        }
        nodes.insert(device.id.clone(), function_node(device, port.map(|(name, _)| name)));
    }
    for device in &machine.emulated {
        nodes.insert(device.id.clone(), emulated_node(device));
    }
    json!(nodes)
}

/// A port of segment 0 is called by its device number alone.
fn port_name(port: Bdf) -> String {
    match port.segment {
        0 => format!("__root_port{}", port.devfn.device()),
        segment => format!("__root_port{segment}_{}", port.devfn.device()),
    }
}

fn emulated_node(device: &EmulatedView) -> Value {
    let bars = device.function.bars();
    let resources: Vec<Value> = bars
        .into_iter()
        .map(|bar| BarPlace { index: bar.index, base: bar.base, size: bar.size, kind: bar.kind })
        .map(|bar| bar_resource(&bar))
        .collect();
    json!({ "id": device.id, "resources": resources, "children": [], "pci_bdf": device.guest.to_string() })
}

fn function_node(device: &DeviceView, port: Option<String>) -> Value {
    let resources: Vec<Value> = device.bars.iter().map(bar_resource).collect();
    let mut node = json!({
        "id": device.id,
        "resources": resources,
        "children": [],
        "pci_bdf": device.guest.to_string(),
        "power": device.power().map(|power| json!({ "state": power.state, "since_ms": power.state_ms })),
    });
    if let (Some(port), Some(fields)) = (port, node.as_object_mut()) {
        fields.insert("parent".to_owned(), json!(port));
    }
    node
}

fn bar_resource(bar: &BarPlace) -> Value {
    let (kind, prefetchable) = match bar.kind {
        BarKind::Io => ("Io", false),
        BarKind::Rom => ("Mmio32", false),
        BarKind::Mem32 { prefetchable } => ("Mmio32", prefetchable),
        BarKind::Mem64 { prefetchable } => ("Mmio64", prefetchable),
    };
    json!({ "PciBar": {
        "index": bar.index,
        "base": bar.base,
        "size": bar.size,
        "type_": kind,
        "prefetchable": prefetchable,
    } })
}

/// Counters of each device: those of its power.
pub fn counters(api: &Api) -> Result<Value, VmError> {
    let counters = api.status.look(|_, state, machine| {
        (state != VmState::Created).then(|| {
            let assigned = machine.iter().flat_map(|machine| &machine.devices);
            let assigned = assigned.map(|device| (device.id.clone(), power::counters(device)));
            let emulated = machine.iter().flat_map(|machine| &machine.emulated).filter_map(|device| {
                let counters = device.function.counters();
                let counters: CounterMap =
                    counters.into_iter().map(|(name, count)| (name.to_owned(), count)).collect();
                (!counters.is_empty()).then(|| (device.id.clone(), counters))
            });
            assigned.chain(emulated).collect::<BTreeMap<_, _>>()
        })
    });
    counters.flatten().map(|counters| json!(counters)).ok_or(VmError::NotRunning)
}
