//! Guests of all sizes boot, see the machine they were promised, and power it off.

use super::on;
use crate::error::{Result, ensure};
use crate::guest::VmSpec;
use crate::runner::{Case, Scenario};
use crate::spec::{HostSpec, Kernel};

pub fn table() -> Vec<Scenario> {
    let small = || HostSpec::new(&[]);
    let large = || HostSpec::new(&[]).memory_mib(8192).cpus(2);
    let mut all = vec![
        on(small(), "guest_with_1_cpu_and_256_mib_boots", |case| boots(case, 1, 256)),
        on(small(), "guest_with_2_cpus_and_1_gib_boots", |case| boots(case, 2, 1024)),
        on(large(), "guest_with_4_cpus_and_6_gib_boots", |case| boots(case, 4, 6144)),
        on(large(), "guest_with_2_cpus_and_4_gib_boots_past_the_hole", |case| boots(case, 2, 4096)),
        on(small(), "guest_boots_from_a_pvh_elf", pvh),
        on(small(), "guest_reboot_restarts_the_vm_in_place", reboot),
        on(small(), "console_input_of_many_lines_arrives_whole", input),
    ];
    for scenario in &mut all {
        scenario.guest = Kernel::Cloud6_12;
    }
    all
}

fn boots(case: &Case<'_>, cpus: u32, mib: u32) -> Result<()> {
    let vm = VmSpec::new(case.guest).cpus(cpus).memory(&format!("{mib}M"));
    let guest = case.host.start_vm(&vm)?;
    let seen = guest.sh("nproc")?;
    ensure(seen == cpus.to_string(), || format!("the guest has {seen} CPUs instead of {cpus}"))?;
    let total = guest.sh("sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo")?;
    let total: u32 = total.parse().unwrap_or_default();
    // The kernel keeps some for itself, in proportion and at least its own size.
    let least = mib * 1024 / 100 * 93 - 90 * 1024;
    ensure(total > least && total <= mib * 1024, || format!("the guest has {total} KiB of {mib} MiB"))?;
    guest.power_off()
}

fn pvh(case: &Case<'_>) -> Result<()> {
    let guest = case.host.start_vm(&VmSpec::new(case.guest).pvh())?;
    guest.sh("uname -r")?;
    guest.power_off()
}

fn reboot(case: &Case<'_>) -> Result<()> {
    let guest = case.host.start_vm(&VmSpec::new(case.guest))?;
    let pid = case.host.sh("cat /run/vmm.pid")?;
    for _ in 0..2 {
        guest.sh("echo before >/run/mark")?;
        let mark = guest.mark();
        guest.begin("reboot -f")?;
        guest.wait_ready(mark)?;
        ensure(guest.run("cat /run/mark")?.status != 0, || "the guest did not really restart".to_owned())?;
    }
    let left = case.host.sh("pidof dormouse")?;
    ensure(left == pid, || format!("the VMM was process {pid}, and is now {left}"))?;
    guest.power_off()
}

fn input(case: &Case<'_>) -> Result<()> {
    let guest = case.host.start_vm(&VmSpec::new(case.guest))?;
    let long: String = (0..400).map(|n| format!("{n:04}.")).collect();
    let command = format!("echo {long}");
    let text = case.host.sh(&command)?;
    ensure(text == long, || format!("the host's own console lost some of it: {text}"))?;
    let text = guest.sh(&command)?;
    ensure(text == long, || format!("of {} characters these came back: {text}", long.len()))?;
    guest.power_off()
}
