//! Guests that boot through a firmware, what a firmware needs of the machine, and what is for the time when no driver works: the debug console and
//! the panic device.

use std::time::Duration;

use serde_json::{Value, json};

use super::bad_input::{As, refuse};
use super::on;
use super::steps::bdf;
use crate::debian::{self, RAW};
use crate::error::{Error, Result, ensure};
use crate::guest::{Guest, VmSpec};
use crate::host::Host;
use crate::payload::FIRMWARE_SAYS;
use crate::rpc::wait_for;
use crate::runner::{Case, Scenario};
use crate::spec::{Device, HostSpec, Kernel};
use crate::uefi::{DISK, FIRMWARE};

/// How often a guest is given its usual time to boot: EDK II alone takes longer than a whole Linux, where every instruction is emulated.
const PATIENCE: usize = 5;
/// How long a firmware of some hundred instructions may take, with the start of the VMM.
const SOON: Duration = Duration::from_secs(60);
/// The payload that looks at the machine as a firmware does.
const PAYLOAD: &str = "/run/firmware";
const SOCKET: &str = "/run/firmware.api";
const EVENTS: &str = "/run/events";

pub fn table() -> Vec<Scenario> {
    let small = || HostSpec::new(&[]);
    let mut uefi_host = HostSpec::devices(&[Device::Nvme]);
    uefi_host.uefi = true;
    let mut all = vec![
        on(small(), "firmware_finds_tables_ports_and_debug_console", payload),
        on(small(), "firmware_boots_by_the_api_and_drops_command_line_and_initramfs", by_api),
        on(small(), "what_is_no_firmware_is_refused_in_one_line", refused),
        on(small(), "panic_of_the_guests_kernel_becomes_an_event", panic),
        on(
            HostSpec { uefi: true, ..small().debian() },
            "debian_boots_through_uefi_from_virtio_disks_to_its_login_prompt",
            uefi_from_disks,
        ),
        on(uefi_host, "debian_boots_through_uefi_from_an_assigned_nvme_drive", uefi),
    ];
    for scenario in &mut all {
        scenario.guest = Kernel::Generic6_12;
    }
    all
}

/// Checks what the payload wrote to a file: a letter for each thing that it found right.
fn has_said_all(host: &Host, file: &str) -> Result<()> {
    let said = host.sh(&format!("cat {file}"))?;
    let expected = FIRMWARE_SAYS.trim_end();
    ensure(said.trim_end() == expected, || format!("{file} has '{said}' and not '{expected}'"))
}

fn payload(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    host.sh(&format!("api_client firmware {PAYLOAD}"))?;
    let run = |options: &str| {
        host.run_for(
            &format!(
                "timeout 60 dormouse --firmware {PAYLOAD} --memory size=128M --serial file=/run/serial {options} 2>/run/said"
            ),
            SOON,
        )
    };
    let output = run("--debug-console file=/run/debug")?;
    ensure(output.status == 0, || format!("status {} after soft-off", output.status))?;
    has_said_all(host, "/run/serial")?;
    has_said_all(host, "/run/debug")?;
    // At another port nobody hears it, and without a console it does no harm.
    run("--debug-console file=/run/debug,iobase=0x402")?;
    let said = host.sh("cat /run/debug")?;
    ensure(said.is_empty(), || format!("another port's debug console has '{said}'"))?;
    let output = run("--cmdline quiet --initramfs /no/such/file")?;
    ensure(output.status == 0, || format!("status {} with what a firmware ignores", output.status))?;
    has_said_all(host, "/run/serial")?;
    let warnings = host.sh("cat /run/said")?;
    ensure(warnings.contains("--cmdline") && warnings.contains("--initramfs"), || {
        format!("no warning of what is ignored: {warnings}")
    })
}

/// A call that must succeed; its answer.
fn call(host: &Host, method: &str, name: &str, body: &str) -> Result<Value> {
    let text = host.sh(&format!("api_client call {SOCKET} {method} {name} {body}"))?;
    let (status, body) = text.split_once(' ').unwrap_or((&text, ""));
    ensure(matches!(status, "200" | "204"), || format!("{method} {name}: {text}"))?;
    Ok(serde_json::from_str(body).unwrap_or_default())
}

fn by_api(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    host.sh(&format!("api_client firmware {PAYLOAD}; rm -f /run/debug {SOCKET}"))?;
    host.sh(&format!(
        "(dormouse --api-socket {SOCKET} 2>/run/said; echo $? >/run/status) </dev/null >/dev/null 2>&1 &"
    ))?;
    host.sh(&format!("for n in $(seq 200); do [ ! -S {SOCKET} ] || exit 0; usleep 50000; done; exit 1"))?;
    let config = json!({
        "payload": { "firmware": PAYLOAD, "cmdline": "quiet", "initramfs": "/no/such/file" },
        "memory": { "size": 128 << 20 },
        "debug_console": { "mode": "File", "file": "/run/debug" },
        "pvpanic": true,
    });
    call(host, "PUT", "vm.create", &format!("'{config}'"))?;
    let info = call(host, "GET", "vm.info", "")?;
    let shown = &info["config"];
    ensure(shown["payload"] == json!({ "firmware": PAYLOAD }) && shown["pvpanic"] == true, || {
        format!("vm.info has {shown}")
    })?;
    call(host, "PUT", "vm.boot", "")?;
    let status = wait_for("the firmware switches the machine off", SOON, || {
        let output = host.probe("cat /run/status 2>/dev/null")?;
        Ok(if output.text.is_empty() { Err("it runs".to_owned()) } else { Ok(output.text) })
    })?;
    host.sh("rm /run/status")?;
    ensure(status.trim() == "0", || format!("the VMM ended with status {status}"))?;
    has_said_all(host, "/run/debug")
}

fn refused(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    host.sh(&format!("api_client firmware {PAYLOAD}; head -c 300 {PAYLOAD} >/run/short; : >/run/empty"))?;
    let kernel = "/guest/6.12/vmlinuz";
    for (arguments, words) in [
        (format!("--firmware {kernel}"), ["Linux kernel", "--kernel"]),
        ("--firmware /run/short".to_owned(), ["/run/short", "truncated"]),
        ("--firmware /run/empty".to_owned(), ["/run/empty", "empty"]),
        ("--firmware /etc/motd".to_owned(), ["no ELF file", "CLOUDHV.fd"]),
        ("--firmware /bin/busybox".to_owned(), ["/bin/busybox", "PVH entry"]),
        ("--firmware /run".to_owned(), ["/run", "not a regular file"]),
        ("--firmware /no/such/file".to_owned(), ["/no/such/file", "firmware"]),
        (format!("--firmware {PAYLOAD} --kernel {kernel}"), ["--kernel", "--firmware"]),
        (format!("--firmware {PAYLOAD} --debug-console socket=/run/s"), ["--debug-console", "socket"]),
        (format!("--firmware {PAYLOAD} --debug-console tty,iobase=0x3f8"), ["0x3f8", "0xe9"]),
        (format!("--firmware {PAYLOAD} --debug-console file=/no/dir/f"), ["debug console", "/no/dir/f"]),
    ] {
        refuse(host, As::Root, &arguments, &words)?;
    }
    Ok(())
}

fn panic(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    host.sh(&format!("rm -f {EVENTS}"))?;
    let mut vm = VmSpec::new(case.guest).options(&format!("--pvpanic --event-monitor path={EVENTS}"));
    vm.modules = vec!["pvpanic_pci"];
    let guest = host.start_vm(&vm)?;
    let takes = guest.sh("cat /sys/bus/pci/drivers/pvpanic-pci/0000:*/capability")?;
    ensure(takes.trim().trim_start_matches("0x") == "3", || format!("the device takes {takes}"))?;
    let panics = || -> Result<Vec<Value>> {
        let text = host.probe(&format!("cat {EVENTS}"))?.text;
        let events = text.split("\n\n").filter(|part| !part.trim().is_empty()).map(|part| {
            serde_json::from_str(part).map_err(|e| Error::Check(format!("no event: {e}: {part}")))
        });
        let events = events.collect::<Result<Vec<Value>>>()?;
        Ok(events.into_iter().filter(|event| event["event"] == "panic").collect())
    };
    ensure(panics()?.is_empty(), || "a panic before there was one".to_owned())?;
    guest.expect_panic();
    let mark = guest.mark();
    guest.begin("echo c >/proc/sysrq-trigger")?;
    let told = wait_for("the panic is told", SOON, || {
        let told = panics()?;
        Ok(if told.is_empty() { Err("nothing told".to_owned()) } else { Ok(told) })
    })?;
    let right = told.len() == 1
        && told
            .iter()
            .all(|told| told["source"] == "guest" && told["properties"] == json!({"event": "panic"}));
    ensure(right, || format!("the events of the panic were {told:?}"))?;
    let log = guest.log()?;
    ensure(log.contains("the guest's kernel has panicked (panic)"), || format!("not in the log: {log}"))?;
    // It reboots by itself, in the same VMM.
    guest.wait_ready(mark)?;
    guest.power_off()
}

/// The shortest period that the host's KVM gives a guest's periodic timer, in microseconds.
const SHORTEST_PERIOD: &str = "/sys/module/kvm/parameters/min_timer_period_us";

fn uefi(case: &Case<'_>) -> Result<()> {
    with_rare_ticks(case, boots_through_uefi)
}

fn uefi_from_disks(case: &Case<'_>) -> Result<()> {
    with_rare_ticks(case, boots_from_disks)
}

fn with_rare_ticks(case: &Case<'_>, boot: fn(&Case<'_>) -> Result<()>) -> Result<()> {
    let host = case.host;
    // EDK II writes CR8 at the end of each interrupt. If the next one is pending already, QEMU 10.0 ends with a failed assertion (`bql_locked()`): it
    // handles that write without its lock. So the firmware's ticks, which it asks for every 10 ms, are made rare.
    let period = host.sh(&format!("cat {SHORTEST_PERIOD}; echo 400000 >{SHORTEST_PERIOD}"))?;
    let result = boot(case);
    host.sh(&format!("echo {period} >{SHORTEST_PERIOD}"))?;
    result
}

fn boots_through_uefi(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let mut vm = VmSpec::new(case.guest);
    vm.command = Some(format!(
        "dormouse --firmware {FIRMWARE} --cpus boot=1 --memory size=512M --serial tty --console off --device path=/sys/bus/pci/devices/{}",
        bdf(0)
    ));
    let guest = Guest::launch(host, &vm)?;
    let mut ready = guest.wait_ready(0);
    for _ in 1..PATIENCE {
        ready = ready.or_else(|_| guest.wait_ready(0));
    }
    ready?;
    // The firmware's own tables lead to ours: Linux has the root bridge, the event device and the power resource from there.
    let efi = guest.sh("cat /sys/firmware/efi/systab")?;
    ensure(efi.contains("ACPI20=") && efi.contains("SMBIOS"), || format!("no EFI tables: {efi}"))?;
    let offered = guest.sh("ls -d /sys/bus/pci/devices/0000:01:00.0/firmware_node/power_resources_D3hot")?;
    ensure(!offered.is_empty(), || "the drive has no power resource".to_owned())?;
    // The drive that it booted from is there for Linux too, wherever the firmware has put its BARs.
    let boot = guest.sh("dd if=/dev/nvme0n1 bs=512 count=1 2>/dev/null | tail -c 2 | xxd -p")?;
    ensure(boot.trim() == "55aa", || format!("the drive's first sector ends in {boot}"))?;
    guest.power_off()
}

/// The drive's file system on one virtio disk, Debian on another.
fn boots_from_disks(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let mut vm = VmSpec::new(case.guest);
    vm.command = Some(format!(
        "dormouse --firmware {FIRMWARE} --cpus boot=1 --memory size=512M --serial tty --console off \
         --disk path={DISK},image_type=raw {RAW}"
    ));
    let guest = Guest::launch(host, &vm)?;
    let mut ready = debian::log_in(host, &guest, 0);
    for _ in 1..PATIENCE {
        ready = ready.or_else(|_| debian::log_in(host, &guest, 0));
    }
    ready?;
    let seen = guest.sh("cat /sys/firmware/efi/systab; findmnt -n -o SOURCE /; cat /proc/1/comm")?;
    for word in ["ACPI20=", "/dev/vdb", "systemd"] {
        ensure(seen.contains(word), || format!("no {word} in the guest: {seen}"))?;
    }
    guest.sh(
        "dd if=/dev/urandom of=/var/tmp/noise bs=1M count=4 conv=fsync 2>/dev/null && rm /var/tmp/noise",
    )?;
    guest.begin("systemctl poweroff")?;
    let status = guest.wait_exit_for(debian::BOOT)?;
    ensure(status == 0, || format!("the VMM ended with status {status} after the guest's shutdown"))
}
