//! The assigned GPU: asleep without a driver through its root port, and in suspend-to-idle with one.

use std::time::Duration;

use super::steps::{FIRST, IDLE, bdf, bind, guest_is_content, unbind, vm};
use super::{E1000E, GPU, on, scenario, with_old_kernels};
use crate::error::{Result, ensure};
use crate::host::sysfs;
use crate::runner::{Case, Scenario};
use crate::spec::{Device, HostSpec, Kernel, Slot};

pub fn table() -> Vec<Scenario> {
    let mut all = Vec::new();
    all.extend(with_old_kernels(scenario("unbound_gpu_sleeps_and_draws_again_when_bound", unbound)));
    all.extend(with_old_kernels(scenario("gpu_sleeps_in_suspend_to_idle_and_draws_after", suspend_to_idle)));
    all.push(scenario("host_wake_ends_suspend_to_idle", wake_from_idle));
    all.push(scenario("power_off_by_policy_keeps_the_gpu_on", no_power));
    let bochs = HostSpec::new(&[Slot::new(Device::Bochs)]);
    all.push(on(bochs, "device_without_pm_capability_works_and_says_why_it_cannot_sleep", cannot_sleep));
    all
}

fn unbound(case: &Case<'_>) -> Result<()> {
    let (host, guest) = (case.host, case.host.start_vm(&vm(case, &[GPU]))?);
    guest.sh("timeout 20 guest_tool drm")?;
    for _ in 0..3 {
        let since = host.timeline.now();
        unbind(&guest, FIRST)?;
        host.wait_power_state(&bdf(GPU), "D3cold", IDLE)?;
        ensure(host.power_count(GPU, false, since) > 0, || "the firmware cut no power".to_owned())?;
        host.stays_in(&bdf(GPU), "D3cold", Duration::from_secs(1))?;
        bind(&guest, FIRST)?;
        guest.sh("test -c /dev/dri/card0")?;
        guest.sh("timeout 20 guest_tool drm")?;
    }
    guest_is_content(&guest)?;
    guest.power_off()
}

fn suspend_to_idle(case: &Case<'_>) -> Result<()> {
    let (host, guest) = (case.host, case.host.start_vm(&vm(case, &[GPU]))?);
    guest.sh("timeout 20 guest_tool drm")?;
    for _ in 0..2 {
        let since = host.timeline.now();
        let call = guest.begin(
            "echo 0 >/sys/class/rtc/rtc0/wakealarm; echo +8 >/sys/class/rtc/rtc0/wakealarm && echo freeze >/sys/power/state",
        )?;
        host.wait_power_state(&bdf(GPU), "D3cold", IDLE)?;
        ensure(host.power_count(GPU, false, since) > 0, || "the firmware cut no power".to_owned())?;
        let output = guest.finish(&call, Duration::from_secs(60))?;
        ensure(output.status == 0, || format!("the guest could not suspend: {}", output.text))?;
        if case.guest == Kernel::Generic6_1 {
            // This kernel resets a virtio GPU when it resumes and has no handler to set it up again, on any machine.
            unbind(&guest, FIRST)?;
            bind(&guest, FIRST)?;
        }
        guest.sh("timeout 20 guest_tool drm")?;
    }
    guest_is_content(&guest)?;
    guest.power_off()
}

fn wake_from_idle(case: &Case<'_>) -> Result<()> {
    let (host, guest) = (case.host, case.host.start_vm(&vm(case, &[E1000E]))?);
    let wakeup = sysfs(FIRST, "power/wakeup");
    guest.sh(&format!("echo enabled >{wakeup}"))?;
    // The alarm is there only so that a lost wake fails soon and by name.
    let call = guest.begin(
        "t=$(date +%s); echo +60 >/sys/class/rtc/rtc0/wakealarm; echo freeze >/sys/power/state; echo $(($(date +%s) - t))",
    )?;
    host.wait_power_state(&bdf(E1000E), "D3cold", IDLE)?;
    host.poke(&bdf(E1000E))?;
    let output = guest.finish(&call, Duration::from_secs(90))?;
    let slept: u32 = output.text.trim().parse().unwrap_or(u32::MAX);
    ensure(slept < 45, || format!("the guest slept {slept} s, until its alarm: the wake was lost"))?;
    guest.power_off()
}

fn no_power(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let mut vm = crate::guest::VmSpec::new(case.guest).device_with(&bdf(GPU), ",power=off");
    vm.modules.extend(Device::Gpu.modules());
    let guest = host.start_vm(&vm)?;
    let since = host.timeline.now();
    unbind(&guest, FIRST)?;
    std::thread::sleep(Duration::from_secs(3));
    ensure(host.power_count(GPU, false, since) == 0, || "power was cut in spite of power=off".to_owned())?;
    bind(&guest, FIRST)?;
    guest.sh("timeout 20 guest_tool drm")?;
    guest.power_off()
}

fn cannot_sleep(case: &Case<'_>) -> Result<()> {
    let (host, guest) = (case.host, case.host.start_vm(&vm(case, &[0]))?);
    let log = guest.log()?;
    let told = log.lines().any(|line| line.contains(&bdf(0)) && line.to_lowercase().contains("capability"));
    ensure(told, || format!("the log does not say that {} has no PM capability: {log}", bdf(0)))?;
    let node = guest.run(&format!("ls -d {}", sysfs(FIRST, "firmware_node/power_resources_D0")))?;
    ensure(node.status != 0, || "the guest was offered a power resource".to_owned())?;
    guest.sh(&format!("test $(cat {}) = 0x1234", sysfs(FIRST, "vendor")))?;
    let state = host.power_state(&bdf(0))?;
    ensure(state != "D3cold", || "a device without a PM capability was in D3cold".to_owned())?;
    guest.power_off()
}
