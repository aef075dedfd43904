//! Who uses the API: the generated client crate, Kata Containers, libvirt by libcurl, and those who misuse it.

use std::time::Duration;

use serde_json::json;

use super::{CONFIG, EVENTS, booted, expect_events, get, launch, monitored, put, shut_down};
use crate::error::{Result, ensure};
use crate::guest::{API, Guest};
use crate::host::{Host, sysfs};
use crate::rpc::wait_for;
use crate::runner::{Case, Scenario};
use crate::scenarios::steps::{FIRST, IDLE, bdf, unbind, vm};
use crate::scenarios::{E1000E, GPU, IGB, NVME, scenario};

/// Longer than any of it takes.
const PATIENCE: Duration = Duration::from_secs(120);

pub fn table() -> Vec<Scenario> {
    vec![
        scenario("client_crate_drives_a_vm_with_an_assigned_device_from_creation_to_deletion", crate_client),
        scenario("kata_creates_and_boots_within_its_limits_with_an_assigned_device", kata),
        scenario("libvirt_drives_a_vmm_with_a_given_socket_and_an_event_pipe", libvirt),
        scenario("misuse_of_the_api_changes_nothing_and_takes_no_memory", misuse),
        scenario("second_vmm_is_refused_the_api_socket_and_that_of_a_dead_one_is_replaced", sockets),
    ]
}

/// Runs steps of the crate's client; what they printed.
fn sdk(host: &Host, steps: &str) -> Result<String> {
    let output = host.run_for(&format!("api_client sdk {API} {steps}"), PATIENCE)?;
    ensure(output.status == 0, || output.text.clone())?;
    Ok(output.text)
}

fn expect(text: &str, lines: &[&str]) -> Result<()> {
    ensure(text.lines().eq(lines.iter().copied()), || {
        format!("the client says:\n{text}\nand not:\n{}", lines.join("\n"))
    })
}

fn crate_client(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let guest = launch(host, &vm(case, &[GPU]))?;
    let mark = guest.mark();
    let device = format!("/sys/bus/pci/devices/{}", bdf(IGB));
    let text = sdk(
        host,
        &format!(
            "ping info create={CONFIG} info counters add-device={device},net0 add-device={device},net1 remove-device=net0 \
             remove-device=net0 resize=1 boot info"
        ),
    )?;
    let refused: Vec<&str> = text.lines().filter(|line| line.contains("Error from API")).collect();
    ensure(refused.len() == 4, || format!("the client says:\n{text}"))?;
    let wanted = [
        "info: 404 ",
        "counters: 500 ",
        "add-device=/sys/bus/pci/devices/0000:03:00.0,net1: 409 ",
        "remove-device=net0: 404 ",
    ];
    for (line, start) in refused.iter().zip(wanted) {
        ensure(line.starts_with(start), || format!("{line} and not {start}"))?;
    }
    ensure(
        text.ends_with(
            "boot: done\ninfo: Running [__rng 0000:00:02.0, __root_port1 0000:00:01.0, dev0 0000:01:00.0]",
        ),
        || format!("the client says:\n{text}"),
    )?;
    guest.wait_ready(mark)?;
    unbind(&guest, FIRST)?;
    host.wait_power_state(&bdf(GPU), "D3cold", IDLE)?;
    let text = sdk(host, "pause info pause resume info resize=1 resize=2 nmi")?;
    let lines: Vec<&str> = text.lines().collect();
    ensure(lines[1].starts_with("info: Paused [") && lines[4].starts_with("info: Running ["), || {
        text.clone()
    })?;
    ensure(lines[2].starts_with("pause: 500 ") && lines[6].starts_with("resize=2: 500 "), || text.clone())?;
    let mark = guest.mark();
    expect(&sdk(host, "reboot")?, &["reboot: done"])?;
    guest.wait_ready(mark)?;
    guest.sh("timeout 20 guest_tool drm")?;
    let text = sdk(host, &format!("add-device={device},net0 add-device={device},net1 info"))?;
    let lines: Vec<&str> = text.lines().collect();
    ensure(
        lines[0].ends_with(": net0 0000:00:03.0")
            && lines[1].contains(": 409 ")
            && lines[2].ends_with("dev0 0000:01:00.0, net0 0000:00:03.0]"),
        || text.clone(),
    )?;
    guest.wait_file(&sysfs("0000:00:03.0", "vendor"), "0x8086", IDLE)?;
    expect(&sdk(host, "remove-device=net0")?, &["remove-device=net0: done"])?;
    wait_for("the device goes", IDLE, || {
        let text = sdk(host, "info")?;
        Ok(if text.contains("net0") { Err(text) } else { Ok(()) })
    })?;
    expect(
        &sdk(host, "shutdown info delete shutdown-vmm")?,
        &["shutdown: done", "info: Created []", "delete: done", "shutdown-vmm: done"],
    )?;
    let status = guest.wait_exit()?;
    ensure(status == 0, || format!("the VMM ended with status {status}"))
}

fn kata(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let mut vm = vm(case, &[E1000E]);
    // A device's thread is there once the guest has a driver for it.
    vm.modules.extend(["virtio_pci", "virtio_rng"]);
    let guest = launch(host, &vm)?;
    // What Kata writes into every configuration, with null for what it has not been told.
    let mut config = vm.config();
    config["platform"] = json!({"num_pci_segments": 1, "iommu_segments": null, "serial_number": null, "uuid": null, "tdx": false});
    config["cpus"]["topology"] =
        json!({"threads_per_core": 1, "cores_per_die": 1, "dies_per_package": 1, "packages": 1});
    config["memory"] = json!({"size": 512 << 20, "shared": true, "hugepages": false, "hotplug_method": "Acpi", "hotplug_size": null, "thp": true});
    config["serial"]["iommu"] = json!(false);
    config["console"] = json!({"mode": "Off", "iommu": false});
    config["rng"] = json!({"src": "/dev/urandom", "iommu": false});
    config["devices"][0]["iommu"] = json!(false);
    config["disks"] = json!(null);
    host.sh(&format!("echo '{config}' >{CONFIG}"))?;
    let mark = guest.mark();
    let output = host.run_for(&format!("modprobe tun; api_client kata {API} {CONFIG} tap_kata"), PATIENCE)?;
    println!("  {}", output.text);
    ensure(output.status == 0, || output.text)?;
    guest.wait_ready(mark)?;
    // 1af4:1041 is a network device.
    guest.sh("grep -l 0x1041 /sys/bus/pci/devices/*/device")?;
    // Kata finds its vCPUs by the names of the threads.
    let threads = host.sh("cat /proc/$(pidof dormouse)/task/*/comm | sort -u | tr '\\n' ' '")?;
    for name in ["vmm", "http-server", "vcpu0", "__rng"] {
        ensure(threads.split(' ').any(|thread| thread == name), || {
            format!("no thread {name} in: {threads}")
        })?;
    }
    // It stops so: a ping, the end, and three seconds for the process to go.
    get(host, "vmm.ping")?;
    let pid = host.sh("pidof dormouse")?;
    put(host, "vmm.shutdown", None)?;
    host.sh(&format!("for n in $(seq 150); do [ -d /proc/{pid} ] || exit 0; usleep 20000; done; exit 1"))?;
    let status = guest.wait_exit()?;
    ensure(status == 0, || format!("the VMM ended with status {status}"))
}

fn libvirt(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let socket = "/run/libvirt.sock";
    let monitor = monitored(host)?;
    let mut vm = vm(case, &[NVME]).options(&format!(" {monitor}"));
    vm.command = Some(format!("api_client listen {socket} dormouse --api-socket fd=7 {monitor}"));
    let guest = Guest::launch(host, &vm)?;
    host.sh(&format!("echo '{}' >{CONFIG}; for n in $(seq 100); do [ ! -S {socket} ] || exit 0; usleep 20000; done; exit 1", vm.config()))?;
    // libvirt is libcurl; only these two statuses are a success for it. A PUT without a body is an upload of nothing.
    let curl = |method: &str, name: &str, more: &str| {
        host.sh(&format!(
            "s=$(curl -sS -m 60 --unix-socket {socket} -o /run/reply -w '%{{http_code}}' -X {method} {more} \
             http://localhost/api/v1/{name} </dev/null) && case $s in 200|204) cat /run/reply 2>/dev/null; rm -f /run/reply ;; *) echo $s; cat /run/reply; exit 1 ;; esac"
        ))
    };
    let mark = guest.mark();
    curl("PUT", "vm.create", &format!("-H 'Content-Type: application/json' -d @{CONFIG}"))?;
    curl("PUT", "vm.boot", "-T - -H 'Expect: 100-continue'")?;
    guest.wait_ready(mark)?;
    let info = curl("GET", "vm.info", "")?;
    ensure(info.contains("\"state\":\"Running\""), || info)?;
    curl("PUT", "vm.pause", "-T -")?;
    curl("PUT", "vm.resume", "-T /dev/null")?;
    let mark = guest.mark();
    curl("PUT", "vm.reboot", "")?;
    guest.wait_ready(mark)?;
    curl("PUT", "vm.shutdown", "-H 'Content-Length: 0'")?;
    let mark = guest.mark();
    curl("PUT", "vm.boot", "-T -")?;
    guest.wait_ready(mark)?;
    guest.signal("TERM")?;
    let status = guest.wait_exit()?;
    ensure(status == 0, || format!("status {status} after SIGTERM"))?;
    // The given socket is libvirt's own, and stays.
    host.sh(&format!("test -S {socket}; test ! -e {socket}.lock; rm {socket}"))?;
    expect_events(
        host,
        &[
            "vmm:starting",
            "vm:booting",
            "vm:booted",
            "vm:pausing",
            "vm:paused",
            "vm:resuming",
            "vm:resumed",
            "vm:rebooting",
            "vm:rebooted",
            "vm:shutdown",
            "vm:booting",
            "vm:booted",
            "vm:shutdown",
            "vm:deleted",
            "vmm:shutdown",
        ],
    )?;
    // libvirt's reader has a buffer of fixed size.
    let longest =
        host.sh(&format!("awk 'BEGIN {{RS=\"\"}} {{if (length > n) n = length}} END {{print n}}' {EVENTS}"))?;
    ensure(longest.trim().parse::<usize>().is_ok_and(|length| length < 1024), || {
        format!("an event of {longest} bytes")
    })
}

fn misuse(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let guest = booted(case, &[NVME], "")?;
    let output = host.run_for(&format!("api_client abuse {API} $(pidof dormouse)"), PATIENCE)?;
    ensure(output.status == 0, || output.text)?;
    guest.sh("true")?;
    shut_down(&guest, host)
}

fn sockets(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let guest = launch(host, &vm(case, &[]))?;
    let mode = host.sh(&format!("stat -c '%a %F' {API}"))?;
    ensure(mode == "600 socket", || format!("{API} is {mode}"))?;
    let second = host.run(&format!("dormouse --api-socket {API} </dev/null"))?;
    ensure(second.status == 1 && second.text.contains("another VMM uses this socket"), || {
        format!("{second:?}")
    })?;
    get(host, "vmm.ping")?;
    guest.signal("KILL")?;
    guest.wait_exit()?;
    drop(guest);
    host.sh(&format!("test -S {API}"))?;
    // One on the path that a killed VMM has left.
    host.sh(&format!("(dormouse --api-socket path={API} </dev/null >/dev/null 2>&1 &) ; sleep 1; api_client call {API} GET vmm.ping"))?;
    put(host, "vmm.shutdown", None)?;
    host.sh(&format!("for n in $(seq 100); do [ -e {API} ] || exit 0; usleep 20000; done; exit 1")).map(drop)
}
