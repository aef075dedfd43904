//! Processors: they come and go while the guest runs, run where they are to, and look as they are to.

use std::time::Duration;

use serde_json::Value;

use super::steps::{FIRST, IDLE, bdf, guest_is_content, nic_to_sleep, pass_traffic, vm};
use super::{E1000E, on, scenario, with_old_kernels};
use crate::error::{Error, Result, ensure};
use crate::guest::{Guest, VmSpec};
use crate::host::Host;
use crate::rpc::{Output, wait_for};
use crate::runner::{Case, Scenario};
use crate::spec::{HostSpec, Kernel};

/// Where the VMM takes orders.
const API: &str = "/run/cpus.sock";
/// The registers through which processors come and go (docs/power.md does not have them: acpi/src/processor_abi.rs), and how far past their
/// end a hostile guest goes.
const REGISTERS: &str = "0xfed50000 0x80";
/// The event device's, which tell of it.
const EVENTS: &str = "0xfed20000 0x20";
/// How long a hostile guest has.
const STORM: u64 = 20;

pub fn table() -> Vec<Scenario> {
    let mut all = with_old_kernels(scenario("vcpus_come_and_go_beside_a_sleeping_device", come_and_go));
    all.retain(|scenario| !scenario.name.ends_with("in_the_host"));
    let mut small = vec![
        on(HostSpec::new(&[]), "a_vcpu_that_is_to_go_is_waited_for_and_asked_for_again", pending),
        on(
            HostSpec::new(&[]),
            "a_guest_that_writes_at_random_to_the_processors_registers_harms_nobody",
            storm,
        ),
        on(HostSpec::new(&[]), "a_windows_guest_would_find_hyper_v_and_a_linux_guest_kvm", hyperv),
        on(HostSpec::new(&[]), "processors_look_as_they_are_to", looks),
        on(HostSpec::new(&[]).cpus(2), "vcpus_run_where_they_are_to", affinity),
        on(HostSpec::new(&[]), "vcpus_that_cannot_be_are_refused_before_there_is_a_guest", refused),
    ];
    for scenario in &mut small {
        scenario.guest = Kernel::Cloud6_12;
    }
    all.extend(small);
    all
}

fn ctl(host: &Host, words: &str) -> Result<Output> {
    host.run(&format!("dormouse ctl --api-socket {API} {words}"))
}

fn order(host: &Host, words: &str) -> Result<String> {
    let output = ctl(host, words)?;
    ensure(output.status == 0, || format!("{words}: {}", output.text))?;
    Ok(output.text)
}

/// What an order that must fail says.
fn refusal(host: &Host, words: &str) -> Result<String> {
    let output = ctl(host, words)?;
    ensure(output.status == 1, || format!("{words} has been done: {}", output.text))?;
    Ok(output.text)
}

fn boot_vcpus(host: &Host) -> Result<u64> {
    let info = order(host, "info --json")?;
    let info: Value = serde_json::from_str(&info).map_err(|e| Error::Check(format!("{e}: {info}")))?;
    info["config"]["cpus"]["boot_vcpus"].as_u64().ok_or_else(|| Error::Check(format!("no number in {info}")))
}

/// Names of the VMM's vCPU threads.
fn threads(host: &Host) -> Result<String> {
    host.sh("cat /proc/$(pidof dormouse | cut -d' ' -f1)/task/*/comm | grep vcpu | sort | tr '\\n' ' '")
}

fn expect_threads(host: &Host, count: usize) -> Result<()> {
    let expected: Vec<String> = (0..count).map(|number| format!("vcpu{number}")).collect();
    wait_for("the VMM has a thread for each vCPU", IDLE, || {
        let seen = threads(host)?;
        Ok(if seen.trim() == expected.join(" ") { Ok(()) } else { Err(seen) })
    })
}

/// Waits for the guest to have these processors, switches them on, and has each of them work.
fn expect_processors(guest: &Guest<'_>, count: usize) -> Result<()> {
    let all = if count == 1 { "0".to_owned() } else { format!("0-{}", count - 1) };
    guest.wait_file("/sys/devices/system/cpu/present", &all, IDLE)?;
    for number in 1..count {
        // Debian has no rule that does it.
        let online = format!("/sys/devices/system/cpu/cpu{number}/online");
        guest.sh(&format!("[ $(cat {online}) = 1 ] || echo 1 >{online}"))?;
    }
    guest.wait_file("/sys/devices/system/cpu/online", &all, IDLE)?;
    for number in 0..count {
        let sum = guest.sh(&format!(
            "taskset -c {number} sh -c 'n=0; for i in $(seq 200); do n=$((n+i)); done; echo $n'"
        ))?;
        ensure(sum == "20100", || format!("processor {number} counts {sum}"))?;
    }
    Ok(())
}

fn come_and_go(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let spec = vm(case, &[E1000E]).cpu_keys(",max=3").options(&format!("--api-socket {API}"));
    let guest = host.start_vm(&spec)?;
    let possible = guest.sh("cat /sys/devices/system/cpu/possible")?;
    ensure(possible == "0-2", || format!("the guest expects processors {possible}"))?;
    host.set_link(E1000E, true)?;
    pass_traffic(&guest, FIRST)?;
    nic_to_sleep(host, &guest, E1000E, FIRST)?;
    let since = host.timeline.now();
    expect_threads(host, 1)?;

    order(host, "resize --cpus 3")?;
    expect_processors(&guest, 3)?;
    expect_threads(host, 3)?;
    let said = refusal(host, "resize --cpus 4")?;
    ensure(said.contains('4') && said.contains("from 1 to 3"), || said.clone())?;
    ensure(boot_vcpus(host)? == 3, || "vm.info shows another number".to_owned())?;
    order(host, "resize --cpus 2")?;
    expect_processors(&guest, 2)?;
    expect_threads(host, 2)?;
    ensure(boot_vcpus(host)? == 2, || "vm.info shows another number".to_owned())?;
    host.stays_in(&bdf(E1000E), "D3cold", Duration::from_secs(1))?;
    ensure(host.power_count(E1000E, true, since) == 0, || "the device was woken by it".to_owned())?;

    // The one that has gone comes again, while the guest is paused; all of them go on after it.
    order(host, "pause")?;
    order(host, "resize --cpus 3")?;
    order(host, "resume")?;
    expect_processors(&guest, 3)?;
    order(host, "pause")?;
    order(host, "resume")?;
    order(host, "nmi")?;
    expect_processors(&guest, 3)?;
    host.set_link(E1000E, true)?;
    pass_traffic(&guest, FIRST)?;
    nic_to_sleep(host, &guest, E1000E, FIRST)?;
    guest_is_content(&guest)?;

    // Once by the operator and once by the guest.
    for command in [None, Some("reboot -f")] {
        let mark = guest.mark();
        match command {
            Some(command) => drop(guest.begin(command)?),
            None => drop(order(host, "reboot")?),
        }
        guest.wait_ready(mark)?;
        let seen = guest.sh("nproc")?;
        ensure(seen == "3", || format!("{seen} processors after a reboot"))?;
    }
    order(host, "resize --cpus 1")?;
    expect_processors(&guest, 1)?;
    expect_threads(host, 1)?;
    host.set_link(E1000E, true)?;
    pass_traffic(&guest, FIRST)?;
    guest_is_content(&guest)?;
    guest.power_off()
}

fn pending(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    // All at boot: they can go all the same.
    let guest = host.start_vm(&VmSpec::new(case.guest).cpus(2).options(&format!("--api-socket {API}")))?;
    order(host, "pause")?;
    order(host, "resize --cpus 1")?;
    for wanted in [1, 2] {
        let said = refusal(host, &format!("resize --cpus {wanted}"))?;
        ensure(said.contains("429") || said.contains("Too Many Requests"), || said.clone())?;
    }
    expect_threads(host, 2)?;
    order(host, "resume")?;
    expect_processors(&guest, 1)?;
    expect_threads(host, 1)?;
    // One that the guest does not let go of stays: the only one left cannot be switched off.
    order(host, "resize --cpus 2")?;
    expect_processors(&guest, 2)?;
    for words in ["resize --cpus 0", "resize --cpus 3"] {
        let said = refusal(host, words)?;
        ensure(said.contains("from 1 to 2"), || said.clone())?;
    }
    guest_is_content(&guest)?;
    guest.power_off()
}

fn storm(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let spec = VmSpec::new(case.guest).cpus(2).cpu_keys(",max=40").cmdline("iomem=relaxed");
    let guest = host.start_vm(&spec.options(&format!("--api-socket {API}")))?;
    order(host, "resize --cpus 3")?;
    expect_processors(&guest, 3)?;
    let vmm = host.sh("pidof dormouse")?;
    let one = |cpu: usize, seed: u64, block: &str| {
        format!("taskset -c {cpu} guest_tool storm {STORM} {seed} {block}")
    };
    let storm = guest.begin(&format!(
        "dmesg -n 1; {} & one=$!; {} && wait $one",
        one(0, 2021, REGISTERS),
        one(1, 71_077_345, EVENTS)
    ))?;
    // Asked for in the middle of it, so that there is something that a random write can say.
    for wanted in [2, 4, 3, 5] {
        let output = ctl(host, &format!("resize --cpus {wanted}"))?;
        ensure(output.status == 0 || output.text.contains("Too Many"), || output.text.clone())?;
        host.sh("usleep 500000")?;
    }
    let output = guest.finish(&storm, Duration::from_secs(STORM + 120))?;
    ensure(output.status == 0, || format!("the guest's tool: {}", output.text))?;
    ensure(host.sh("pidof dormouse")? == vmm, || "the VMM has not survived".to_owned())?;
    let mark = guest.mark();
    order(host, "reboot")?;
    guest.wait_ready(mark)?;
    let (seen, shown) = (guest.sh("nproc")?, boot_vcpus(host)?);
    ensure(seen == shown.to_string(), || format!("{seen} processors, and vm.info shows {shown}"))?;
    order(host, &format!("resize --cpus {}", shown + 1))?;
    expect_processors(&guest, usize::try_from(shown + 1).unwrap_or_default())?;
    guest_is_content(&guest)?;
    guest.power_off()
}

fn hyperv(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let spec = VmSpec::new(case.guest).cpu_keys(",max=2,kvm_hyperv=on");
    let guest = host.start_vm(&spec.options(&format!("--api-socket {API}")))?;
    let interface = guest.sh("guest_tool cpuid 0x40000001")?;
    ensure(interface.starts_with("0x31237648 "), || format!("the interface is {interface} and not Hv#1"))?;
    let first = guest.sh("guest_tool cpuid 0x40000000")?;
    // "Microsoft Hv"
    ensure(first == "0x4000000a 0x7263694d 0x666f736f 0x76482074", || format!("the first leaf is {first}"))?;
    let clock = guest.sh("cat /sys/devices/system/clocksource/clocksource0/available_clocksource")?;
    ensure(clock.contains("kvm-clock"), || format!("Linux has lost KVM's clock: {clock}"))?;
    // A vCPU that comes later has them too.
    order(host, "resize --cpus 2")?;
    expect_processors(&guest, 2)?;
    let interface = guest.sh("taskset -c 1 guest_tool cpuid 0x40000001")?;
    ensure(interface.starts_with("0x31237648 "), || format!("the interface is {interface} on the second"))?;
    let mark = guest.mark();
    guest.begin("reboot -f")?;
    guest.wait_ready(mark)?;
    guest_is_content(&guest)?;
    guest.power_off()
}

fn looks(case: &Case<'_>) -> Result<()> {
    let spec = VmSpec::new(case.guest)
        .cpus(3)
        .cpu_keys(",max=8,topology=2:2:1:2,nested=off,max_phys_bits=38,profile=host,core_scheduling=vm");
    let guest = case.host.start_vm(&spec)?;
    let flags = guest.sh("grep -wcE 'svm|vmx' /proc/cpuinfo || true")?;
    ensure(flags == "0", || "the guest could run guests of its own".to_owned())?;
    let bits = guest.sh("grep -c 'address sizes.*: 38 bits physical' /proc/cpuinfo")?;
    ensure(bits == "3", || format!("{bits} processors have 38 physical address bits"))?;
    let topology =
        |cpu: usize, file: &str| guest.sh(&format!("cat /sys/devices/system/cpu/cpu{cpu}/topology/{file}"));
    for (cpu, file, wanted) in [
        (0, "thread_siblings_list", "0-1"),
        (1, "thread_siblings_list", "0-1"),
        (2, "thread_siblings_list", "2"),
        (0, "core_siblings_list", "0-2"),
        (2, "physical_package_id", "0"),
    ] {
        let seen = topology(cpu, file)?;
        ensure(seen == wanted, || format!("processor {cpu}: {file} is {seen} and not {wanted}"))?;
    }
    let possible = guest.sh("cat /sys/devices/system/cpu/possible")?;
    ensure(possible == "0-7", || format!("the guest expects processors {possible}"))?;
    // The emulated host's cores have one thread each.
    let said = guest.log()?.lines().filter(|line| line.contains("core scheduling:")).count();
    ensure(said == 1, || format!("the log says {said} times that there is no core scheduling"))?;
    guest_is_content(&guest)?;
    guest.power_off()
}

fn affinity(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let spec = VmSpec::new(case.guest).cpu_keys(",max=3,affinity=[0@[1],1@[0-1],2@[0]]");
    let guest = host.start_vm(&spec.options(&format!("--api-socket {API}")))?;
    order(host, "resize --cpus 3")?;
    expect_processors(&guest, 3)?;
    let places = host
        .sh("for task in /proc/$(pidof dormouse | cut -d' ' -f1)/task/*; do echo $(cat $task/comm) \
         $(sed -n 's/Cpus_allowed_list:\\t//p' $task/status); done | sort | tr '\\n' ' '")?;
    for wanted in ["vcpu0 1 ", "vcpu1 0-1 ", "vcpu2 0 ", "vmm 0-1 "] {
        ensure(places.contains(wanted), || format!("not {wanted}: {places}"))?;
    }
    guest_is_content(&guest)?;
    guest.power_off()
}

fn refused(case: &Case<'_>) -> Result<()> {
    for (keys, parts) in [
        ("boot=1,affinity=[0@[7]]", ["affinity", "vCPU 0"]),
        ("boot=1,features=[amx]", ["features=[amx]", "AMX"]),
        ("boot=2,max=1", ["max=1", "boot=2"]),
        ("boot=1,max=4,topology=1:2:1:1", ["topology", "4"]),
    ] {
        let kernel = crate::image::guest_path(case.guest, "vmlinuz");
        let output = case.host.run(&format!("timeout 20 dormouse --kernel {kernel} --cpus '{keys}' 2>&1"))?;
        ensure(output.status == 1 && output.text.lines().count() == 1, || {
            format!("{keys}: {}", output.text)
        })?;
        ensure(parts.iter().all(|part| output.text.contains(part)), || format!("{keys}: {}", output.text))?;
    }
    Ok(())
}
