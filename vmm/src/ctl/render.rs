//! Replies as text for people.

use std::fmt::Write as _;

use serde_json::Value;

use super::args::CtlCommand;
use super::power;
use crate::table::{Cell, Tone, table};

/// `text`, the reply to `command`, which has a body.
pub fn reply(command: &CtlCommand, text: &str) -> Result<String, serde_json::Error> {
    use CtlCommand as C;
    Ok(match command {
        C::Power => power::devices(&serde_json::from_str(text)?),
        C::PowerPolicy { id, .. } => policy(id, &serde_json::from_str(text)?),
        C::Ping => ping(&serde_json::from_str(text)?),
        C::Info => info(&serde_json::from_str(text)?),
        C::Counters => counters(&serde_json::from_str(text)?),
        C::AddDevice { .. }
        | C::AddDisk { .. }
        | C::AddFs { .. }
        | C::AddGenericVhostUser { .. }
        | C::AddNet { .. }
        | C::AddPmem { .. }
        | C::AddUserDevice { .. }
        | C::AddVdpa { .. }
        | C::AddVsock { .. } => added(&serde_json::from_str(text)?),
        _ => pretty(&serde_json::from_str(text)?)?,
    })
}

fn pretty(value: &Value) -> Result<String, serde_json::Error> {
    Ok(format!("{}\n", serde_json::to_string_pretty(value)?))
}

fn word(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".to_owned(),
        other => other.to_string(),
    }
}

fn policy(id: &str, value: &Value) -> String {
    // The policy is the reply itself, or a part of it.
    let policy = value.get("policy").unwrap_or(value);
    format!("{}  {}\n", Cell::new(id, Tone::Strong).ansi(), Cell::plain(power::policy_text(policy)).text)
}

fn ping(value: &Value) -> String {
    let features: Vec<String> = value["features"].as_array().into_iter().flatten().map(word).collect();
    let mut text = format!("version {}, process {}", word(&value["build_version"]), word(&value["pid"]));
    if !features.is_empty() {
        let _ = write!(text, ", features {}", features.join(" "));
    }
    format!("{}\n", Cell::plain(text).text)
}

fn added(value: &Value) -> String {
    format!(
        "{} at {}\n",
        Cell::new(word(&value["id"]), Tone::Strong).ansi(),
        Cell::plain(word(&value["bdf"])).text
    )
}

/// What one wants to know at a glance.
fn info(value: &Value) -> String {
    let config = &value["config"];
    let mut rows: Vec<(&str, String)> = vec![("state", word(&value["state"]))];
    let payload = &config["payload"];
    for key in ["firmware", "kernel", "initramfs", "cmdline"] {
        if !payload[key].is_null() {
            rows.push((key, word(&payload[key])));
        }
    }
    rows.push(("vCPUs", word(&config["cpus"]["boot_vcpus"])));
    if let Some(bytes) = value["memory_actual_size"].as_u64().or_else(|| config["memory"]["size"].as_u64()) {
        rows.push(("memory", format!("{} MiB", bytes >> 20)));
    }
    for (name, console) in [("serial", &config["serial"]), ("console", &config["console"])] {
        if let Some(mode) = console["mode"].as_str().filter(|mode| *mode != "Off") {
            let place = [&console["file"], &console["socket"]].into_iter().find_map(Value::as_str);
            let place = place.map_or(String::new(), |place| format!(" {place}"));
            rows.push((name, format!("{mode}{place}")));
        }
    }
    for (key, name) in [("devices", "device"), ("disks", "disk"), ("net", "net")] {
        for device in config[key].as_array().into_iter().flatten() {
            let path = ["path", "tap", "mac"].iter().find_map(|key| device[key].as_str()).unwrap_or("-");
            rows.push((name, format!("{} {path}", word(&device["id"]))));
        }
    }
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
    let mut text = String::new();
    for (name, value) in rows {
        let name = Cell::new(format!("{name:width$}"), Tone::Strong);
        let _ = writeln!(text, "{}  {}", name.ansi(), Cell::plain(value).text);
    }
    text
}

fn counters(value: &Value) -> String {
    let mut rows = Vec::new();
    for (device, counters) in value.as_object().into_iter().flatten() {
        for (name, count) in counters.as_object().into_iter().flatten() {
            rows.push(vec![Cell::new(device, Tone::Strong), Cell::plain(name), Cell::plain(word(count))]);
        }
    }
    if rows.is_empty() {
        "no device counts anything\n".to_owned()
    } else {
        table(&["ID", "COUNTER", "VALUE"], rows, 0)
    }
}
