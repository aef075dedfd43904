//! The VMM as its clients see it: under the names of Cloud Hypervisor's programs, driven as libvirt drives those, and scraped
//! by Prometheus.

use std::time::Duration;

use super::steps::{FIRST, IDLE, bdf, guest_is_content, nic_to_sleep, pass_traffic, vm};
use super::{E1000E, scenario};
use crate::error::{Error, Result, ensure};
use crate::guest::Guest;
use crate::host::{Host, sysfs};
use crate::image::guest_path;
use crate::promtool;
use crate::rpc::wait_for;
use crate::runner::{Case, Scenario};

/// Where the links are; the host's scenarios share it.
const LINKS: &str = "/run/links";
const SOCKET: &str = "/run/clients.sock";
/// How long a client waits for the VMM.
const CLIENT: Duration = Duration::from_secs(10);
/// How long a guest may take to its prompt.
const BOOT: Duration = Duration::from_secs(90);

pub fn table() -> Vec<Scenario> {
    vec![
        scenario("libvirts_calls_start_a_domain_whose_device_sleeps", libvirt),
        scenario("metrics_of_a_sleeping_device_pass_promtool", metrics),
    ]
}

/// Makes the links anew.
fn make_links(host: &Host) -> Result<()> {
    host.sh(&format!(
        "rm -rf {LINKS} {SOCKET}*; mkdir {LINKS} && for name in cloud-hypervisor ch-remote; do ln -s /bin/dormouse {LINKS}/$name; done"
    ))
    .map(drop)
}

fn remote(host: &Host, words: &str) -> Result<String> {
    host.sh(&format!("{LINKS}/ch-remote --api-socket {SOCKET} {words}"))
}

/// Starts the VMM without a machine and waits until it answers, as clients do.
fn start(host: &Host, options: &str) -> Result<()> {
    make_links(host)?;
    host.sh(&format!(
        "rm -f /run/vmm.status; ({LINKS}/cloud-hypervisor --api-socket {SOCKET} {options} >/run/vmm.log 2>&1; \
         echo $? >/run/vmm.status) </dev/null &"
    ))?;
    wait_for("the VMM answers", CLIENT, || {
        let ping = host.run(&format!("{LINKS}/ch-remote --api-socket {SOCKET} ping"))?;
        Ok(if ping.status == 0 { Ok(()) } else { Err(ping.text) })
    })
}

fn ended_well(host: &Host) -> Result<()> {
    wait_for("the VMM ends", CLIENT, || {
        let status = host.probe("cat /run/vmm.status 2>/dev/null")?.text;
        Ok(if status.trim() == "0" { Ok(()) } else { Err(status) })
    })
}

/// Writes a body to a file of the host; it has no single quotes.
fn body(host: &Host, json: &serde_json::Value) -> Result<&'static str> {
    host.sh(&format!("echo '{json}' >/run/body.json"))?;
    Ok("/run/body.json")
}

/// What `src/ch/ch_monitor.c` sends for a domain with a kernel, an initramfs, a serial port and a host device.
fn libvirt(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    host.sh("rm -f /run/events && touch /run/events")?;
    start(host, "--event-monitor path=/run/events -v")?;
    let version = host.sh(&format!("{LINKS}/cloud-hypervisor --version"))?;
    ensure(version.starts_with("cloud-hypervisor v54.0.0-"), || format!("the version is {version}"))?;
    let domain = serde_json::json!({
        "serial": { "mode": "Pty" },
        "cpus": { "boot_vcpus": 2, "max_vcpus": 2 },
        "memory": { "size": 512 << 20 },
        "payload": {
            "kernel": guest_path(case.guest, "vmlinuz"),
            "initramfs": guest_path(case.guest, "initramfs"),
            "cmdline": "console=ttyS0 quiet panic=-1 bed.mode=shell",
        },
        "devices": [{ "path": sysfs(&bdf(E1000E), "") }],
    });
    let file = body(host, &domain)?;
    remote(host, &format!("create {file}"))?;
    remote(host, "boot")?;
    let info = remote(host, "info")?;
    let info: serde_json::Value =
        serde_json::from_str(&info).map_err(|e| Error::Check(format!("vm.info: {e}: {info}")))?;
    ensure(info["state"] == "Running", || format!("vm.info: {info}"))?;
    let terminal = info["config"]["serial"]["file"].as_str().unwrap_or_default().to_owned();
    ensure(terminal.starts_with("/dev/pts/"), || format!("no terminal in vm.info: {info}"))?;
    let threads = host.sh("cat /proc/$(pidof cloud-hypervisor | cut -d' ' -f1)/task/*/comm")?;
    for name in ["vmm", "vcpu0", "vcpu1", "http-server", "event-monitor"] {
        ensure(threads.lines().any(|thread| thread == name), || format!("no thread {name} in {threads}"))?;
    }
    to_sleep_from_the_console(host, &terminal)?;
    host.stays_in(&bdf(E1000E), "D3cold", Duration::from_secs(1))?;
    let log = host.sh("grep -c '^cloud-hypervisor: [0-9.]*s: <[^>]*> INFO:' /run/vmm.log")?;
    ensure(log.trim().parse::<u32>().is_ok_and(|lines| lines > 3), || format!("{log} lines in the log"))?;
    let policy = remote(host, "power-policy _vfio0 hold_off=1000")?;
    ensure(policy.contains(r#""hold_off":1000"#), || format!("the policy is {policy}"))?;
    remote(host, "shutdown")?;
    remote(host, "shutdown-vmm")?;
    ended_well(host)?;
    let events = host.sh("cat /run/events")?;
    for event in ["starting", "booting", "booted", "shutdown"] {
        ensure(events.contains(&format!("\"event\": \"{event}\"")), || format!("no {event} in {events}"))?;
    }
    Ok(())
}

/// Lets a card without a driver sleep, by the shell at the guest's serial port, whose other end libvirt's users open.
fn to_sleep_from_the_console(host: &Host, terminal: &str) -> Result<()> {
    host.sh(&format!(": >/run/console; stty -F {terminal} raw -echo; (cat {terminal} >/run/console &)"))?;
    wait_for("the guest's shell answers", BOOT, || {
        host.sh(&format!("echo 'echo sh''ell' >{terminal}"))?;
        let text = host.probe("tail -c 400 /run/console")?.text;
        Ok(if text.lines().any(|line| line.trim() == "shell") { Ok(()) } else { Err(text) })
    })?;
    host.sh(&format!("echo 'echo auto >{}' >{terminal}", sysfs(FIRST, "power/control")))?;
    host.wait_power_state(&bdf(E1000E), "D3cold", IDLE)
}

fn metrics(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let vm = vm(case, &[E1000E]).options("--metrics-socket /run/clients.sock");
    host.sh(&format!("rm -f {SOCKET}*"))?;
    let guest: Guest<'_> = host.start_vm(&vm)?;
    host.set_link(E1000E, true)?;
    pass_traffic(&guest, FIRST)?;
    nic_to_sleep(host, &guest, E1000E, FIRST)?;
    let mut text = host.sh(&format!("dormouse ctl --api-socket {SOCKET} metrics --plain"))?;
    text.push('\n');
    promtool::check_metrics(&text)?;
    let value = |name: &str, label: &str| -> Result<f64> {
        let found = text.lines().find(|line| line.starts_with(&format!("{name}{{")) && line.contains(label));
        let value = found.and_then(|line| line.rsplit(' ').next()?.parse().ok());
        value.ok_or_else(|| Error::Check(format!("no {name} with {label} in {text}")))
    };
    for (name, label, least) in [
        ("dormouse_device_host_d3cold", "0000:02:00.0", 1.0),
        ("dormouse_device_power_offered", "0000:02:00.0", 1.0),
        ("dormouse_device_power_state", "state=\"off\"", 1.0),
        ("dormouse_device_power_low_power_entries_total", "0000:02:00.0", 1.0),
        ("dormouse_device_power_entry_latency_seconds_count", "0000:02:00.0", 1.0),
        ("dormouse_device_power_state_time_seconds_total", "state=\"on\"", 0.1),
    ] {
        let value = value(name, label)?;
        ensure(value >= least, || format!("{name} is {value}"))?;
    }
    let open = host.sh(&format!("dormouse ctl --api-socket {SOCKET} metrics"))?;
    ensure(open.trim_end().ends_with("# EOF"), || format!("no OpenMetrics text: {open}"))?;
    guest_is_content(&guest)?;
    guest.power_off()
}
