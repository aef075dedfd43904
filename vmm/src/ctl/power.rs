//! Changes of a policy as keys and values, and the power of devices as a table.

use serde_json::Value;
use vfio_pm::PolicyChange;

use crate::client::report::{DevicePower, VmPower};
use crate::config::OptionError;
use crate::config::option_parser::{Key, Options};
use crate::table::{Cell, Tone, duration, table};

use Key::Value as Pair;

/// The power keys of `--device`.
const KEYS: &[Key] = &[
    Pair("power"),
    Pair("wake"),
    Pair("hold_off"),
    Pair("toggle_rate"),
    Pair("toggle_burst"),
    Pair("wake_storm"),
    Pair("on_timeout"),
    Pair("on_lost"),
];

/// What is to be different.
pub fn policy_change(text: &str) -> Result<PolicyChange, OptionError> {
    let options = Options::parse("power-policy", text, KEYS)?;
    Ok(PolicyChange {
        power: options.get("power")?,
        wake: options.get("wake")?,
        hold_off: options.get("hold_off")?,
        toggle_rate: options.get("toggle_rate")?,
        toggle_burst: options.get("toggle_burst")?,
        wake_storm: options.get("wake_storm")?,
        on_timeout: options.get("on_timeout")?,
        on_lost: options.get("on_lost")?,
    })
}

/// A policy as it is written for `--device`, in the order of its keys there.
pub fn policy_text(policy: &Value) -> String {
    let key = |key: &Key| match key {
        Pair(name) | Key::Word(name) => *name,
    };
    let pairs = KEYS.iter().filter_map(|name| match policy.get(key(name))? {
        Value::String(text) => Some(format!("{}={text}", key(name))),
        other => Some(format!("{}={other}", key(name))),
    });
    pairs.collect::<Vec<_>>().join(",")
}

/// All devices of a VM.
pub fn devices(power: &VmPower) -> String {
    if power.devices.is_empty() {
        return format!("The VM ({}) has no assigned device.\n", power.state);
    }
    let head =
        ["ID", "HOST", "GUEST", "STATE", "SINCE", "POWER", "LOW POWER", "ENTRIES", "WAKES", "FAILURES"];
    let row = |device: &DevicePower| {
        vec![
            Cell::new(&device.id, Tone::Strong),
            Cell::plain(&device.bdf),
            Cell::or_dash(device.guest_bdf.as_deref()),
            device.state_cell(),
            Cell::plain(duration(device.state_ms)),
            device.host_cell(),
            Cell::or_dash(device.residency().map(|percent| format!("{percent:.1} %")).as_deref()),
            Cell::count(device.count("entries")),
            Cell::count(device.count("wakes")),
            device.trouble_cell(),
        ]
    };
    table(&head, power.devices.iter().map(row).collect(), 0)
}
