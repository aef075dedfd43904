//! A VM's life through the API: boot, pause, reboot, buttons and ends, with a guest that notices.

use std::time::Duration;

use super::{booted, call, expect_events, expect_state, get, launch, monitored, put, shut_down};
use crate::error::{Error, Result, ensure};
use crate::guest::{API, Guest};
use crate::host::Host;
use crate::rpc::wait_for;
use crate::runner::{Case, Scenario};
use crate::scenarios::steps::{FIRST, IDLE, WAKE, bdf, guest_is_content, unbind, unbound_wake, vm};
use crate::scenarios::{GPU, IGB, NVME, scenario};

/// How long a guest is paused.
const PAUSE: Duration = Duration::from_secs(4);

pub fn table() -> Vec<Scenario> {
    vec![
        scenario("api_answers_every_call_in_every_state_as_it_must", every_order),
        scenario("paused_guest_stands_still_and_so_does_its_clock", paused),
        scenario("host_wake_while_paused_is_delivered_after_resume", wake_while_paused),
        scenario("reboot_and_shutdown_by_api_with_a_device_asleep_give_it_back_working", endings_asleep),
        scenario("guest_that_switches_itself_off_leaves_the_vmm_with_no_shutdown", no_shutdown),
        scenario("power_button_and_nmi_reach_the_guest_and_its_end_is_the_vmms", buttons),
    ]
}

fn every_order(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let guest = launch(host, &vm(case, &[]))?;
    let kernel = "/run/byte.elf";
    let text = host.run_for(
        &format!("api_client payload {kernel} && api_client orders {API} {kernel}"),
        Duration::from_secs(240),
    )?;
    ensure(text.status == 0, || text.text)?;
    shut_down(&guest, host)
}

/// Uptime in the guest, in seconds.
fn uptime(guest: &Guest<'_>) -> Result<f64> {
    let text = guest.sh("cut -d' ' -f1 /proc/uptime")?;
    text.trim().parse().map_err(|e| Error::Check(format!("uptime {text}: {e}")))
}

/// Nanoseconds that the vCPU threads have run.
fn vcpu_time(host: &Host) -> Result<String> {
    host.sh("for t in /proc/$(pidof dormouse)/task/*; do case $(cat $t/comm) in vcpu*) cut -d' ' -f1 $t/schedstat;; esac; done")
}

fn paused(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let guest = booted(case, &[NVME], "")?;
    let busy = guest.sh("(while :; do :; done) >/dev/null 2>&1 & echo $!")?;
    let before = uptime(&guest)?;
    put(host, "vm.pause", None)?;
    expect_state(host, "Paused")?;
    let ran = vcpu_time(host)?;
    std::thread::sleep(PAUSE);
    let still = vcpu_time(host)?;
    ensure(ran == still, || format!("the vCPUs ran while paused: {ran} ns, then {still} ns"))?;
    put(host, "vm.resume", None)?;
    expect_state(host, "Running")?;
    let passed = uptime(&guest)? - before;
    ensure(passed < PAUSE.as_secs_f64(), || {
        format!("the guest's clock went on by {passed} s in a pause of {PAUSE:?}")
    })?;
    guest.sh(&format!("kill {busy}"))?;
    guest_is_content(&guest)?;
    shut_down(&guest, host)
}

/// Counts in `vm.power` of the first device.
fn count(host: &Host, name: &str) -> Result<u64> {
    let power = get(host, "vm.power")?;
    let value = &power["devices"][0]["counts"][name];
    value.as_u64().ok_or_else(|| Error::Check(format!("vm.power has no count {name}: {power}")))
}

fn wake_while_paused(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let guest = booted(case, &[GPU], "")?;
    unbind(&guest, FIRST)?;
    host.wait_power_state(&bdf(GPU), "D3cold", IDLE)?;
    let (woken, entered) = (count(host, "wakes")?, count(host, "entries")?);
    put(host, "vm.pause", None)?;
    host.poke(&bdf(GPU))?;
    host.wait_power_state(&bdf(GPU), "D0", WAKE)?;
    // Nothing is entered and nothing told while paused.
    host.stays_in(&bdf(GPU), "D0", Duration::from_secs(2))?;
    ensure(count(host, "entries")? == entered, || "low power was entered while paused".to_owned())?;
    put(host, "vm.resume", None)?;
    wait_for("the wake is delivered", WAKE, || {
        let now = count(host, "wakes")?;
        Ok(if now == woken + 1 { Ok(()) } else { Err(format!("{now} wakes")) })
    })?;
    host.wait_power_state(&bdf(GPU), "D3cold", IDLE)?;
    unbound_wake(&guest, FIRST)?;
    guest_is_content(&guest)?;
    shut_down(&guest, host)
}

fn asleep(host: &Host, guest: &Guest<'_>) -> Result<()> {
    unbind(guest, FIRST)?;
    host.wait_power_state(&bdf(GPU), "D3cold", IDLE)
}

fn endings_asleep(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let option = monitored(host)?;
    let guest = booted(case, &[GPU], &option)?;
    asleep(host, &guest)?;
    let mark = guest.mark();
    put(host, "vm.reboot", None)?;
    guest.wait_ready(mark)?;
    guest.sh("timeout 20 guest_tool drm")?;
    asleep(host, &guest)?;
    // While it wakes: the host's power comes back as the machine is taken apart.
    guest.begin(&format!("echo on >/sys/bus/pci/devices/{FIRST}/power/control"))?;
    let mark = guest.mark();
    put(host, "vm.reboot", None)?;
    guest.wait_ready(mark)?;
    guest.sh("timeout 20 guest_tool drm")?;
    asleep(host, &guest)?;
    put(host, "vm.pause", None)?;
    put(host, "vm.shutdown", None)?;
    expect_state(host, "Created")?;
    // Closed, it is the host's again: out of D3cold and back into it by vfio-pci's own doing, and it answers.
    let id = host.poke(&bdf(GPU))?;
    ensure(id.starts_with("f41a"), || format!("the GPU answers {id}"))?;
    put(host, "vm.delete", None)?;
    let answer = call(host, API, "GET", "vm.info", None)?;
    ensure(answer.status == 404, || format!("vm.info after vm.delete: {answer:?}"))?;
    shut_down(&guest, host)?;
    expect_events(
        host,
        &[
            "vmm:starting",
            "vm:booting",
            "vm:booted",
            "vm:rebooting",
            "vm:rebooted",
            "vm:rebooting",
            "vm:rebooted",
            "vm:pausing",
            "vm:paused",
            "vm:shutdown",
            "vm:deleted",
            "vmm:shutdown",
        ],
    )
}

fn no_shutdown(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let option = monitored(host)?;
    let guest = booted(case, &[IGB], &format!("--no-shutdown {option}"))?;
    // From inside: a reboot, and then the end.
    let mark = guest.mark();
    guest.begin("reboot -f")?;
    guest.wait_ready(mark)?;
    expect_state(host, "Running")?;
    guest.begin("poweroff -f")?;
    wait_for("the guest has switched itself off", WAKE, || {
        let info = get(host, "vm.info")?;
        Ok(if info["state"] == "Created" { Ok(()) } else { Err(info["state"].to_string()) })
    })?;
    put(host, "vm.boot", None)?;
    expect_state(host, "Running")?;
    shut_down(&guest, host)?;
    expect_events(
        host,
        &[
            "vmm:starting",
            "vm:booting",
            "vm:booted",
            "vm:rebooting",
            "vm:rebooted",
            "vm:shutdown",
            "vm:booting",
            "vm:booted",
            "vm:shutdown",
            "vm:deleted",
            "vmm:shutdown",
        ],
    )
}

fn buttons(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let option = monitored(host)?;
    let guest = booted(case, &[], &option)?;
    let count = |what: &str| -> Result<u64> {
        let text = guest.run(what)?.text;
        text.trim().parse().map_err(|e| Error::Check(format!("{what}: {text}: {e}")))
    };
    let (counted, logged) =
        ("awk '/NMI:/ {print $2}' /proc/interrupts", "dmesg | grep -c 'NMI received for unknown reason'");
    let before = count(counted)?;
    put(host, "vm.nmi", None)?;
    wait_for("the guest sees one non-maskable interrupt and finds no error behind it", WAKE, || {
        let now = (count(counted)?, count(logged)?);
        Ok(if now == (before + 1, 1) { Ok(()) } else { Err(format!("{now:?}")) })
    })?;
    // Paused, the button waits.
    guest.sh("modprobe evdev; modprobe button; for n in $(seq 50); do [ ! -e /dev/input/event0 ] || exit 0; usleep 20000; done; exit 1")?;
    guest.sh("grep -q 'Power Button' /proc/bus/input/devices")?;
    guest.sh("(head -c 24 /dev/input/event0 >/run/pressed; poweroff -f) </dev/null >/dev/null 2>&1 &")?;
    std::thread::sleep(Duration::from_secs(1));
    guest.sh("test ! -s /run/pressed")?;
    put(host, "vm.pause", None)?;
    put(host, "vm.power-button", None)?;
    expect_state(host, "Paused")?;
    put(host, "vm.resume", None)?;
    let status = guest.wait_exit()?;
    ensure(status == 0, || format!("the VMM ended with status {status} after the power button"))?;
    // The socket goes with the VMM, and the lock beside it stays.
    host.sh(&format!("test ! -e {API} && test -e {API}.lock"))?;
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
            "vm:shutdown",
            "vm:deleted",
            "vmm:shutdown",
        ],
    )
}
