//! Replies for tests, made of the values that a VMM makes them of.

use std::time::Duration;

use acpi::notify_abi::ResourceIndex;
use serde_json::{Value, json};
use vfio_pm::{
    Counters, FailureKind, Histogram, MemberReport, Phase, Policy, PolicyChange, PowerChoice, Snapshot,
    WakeCause,
};

/// One device of `vm.power`, as the VMM makes it of a snapshot.
pub fn device(id: &str, guest_bdf: &str, report: MemberReport, host: &Value) -> Value {
    let mut value = serde_json::to_value(Snapshot::from(report)).unwrap();
    value["id"] = id.into();
    value["guest_bdf"] = guest_bdf.into();
    value["host"] = host.clone();
    value
}

/// A function that has been in `phase` for `age`.
pub fn member(bdf: &str, phase: Phase, age: Duration) -> MemberReport {
    let mut counters = Counters::default();
    counters.time_in[phase as usize] = age;
    MemberReport {
        bdf: bdf.parse().unwrap(),
        devfn: pci::DevFn::new(0, 0).unwrap(),
        resource: Some(ResourceIndex(0)),
        phase,
        phase_age: age,
        latched_by: None,
        policy: PolicyChange::from(&Policy::default()),
        last_wake: None,
        counters,
    }
}

/// Some times that took this many microseconds.
pub fn histogram(all: &[u64]) -> Histogram {
    let mut histogram = Histogram::default();
    for us in all {
        histogram.buckets[(u64::BITS - us.leading_zeros()) as usize] += 1;
        histogram.count += 1;
        histogram.total_us += us;
        histogram.longest_us = histogram.longest_us.max(*us);
    }
    histogram
}

/// A GPU that sleeps nine tenths of its time, a NIC that is on, and a drive that did not come back.
pub fn power() -> Value {
    let mut gpu = member("0000:01:00.0", Phase::Off, Duration::from_secs(90));
    gpu.counters.time_in[Phase::On as usize] = Duration::from_secs(10);
    (gpu.counters.entries, gpu.counters.wakes) = (7, 3);
    gpu.counters.entry_latency = histogram(&[400, 450]);
    gpu.counters.exit_latency = histogram(&[12_000, 13_000]);
    gpu.last_wake = Some((Duration::from_secs(125), WakeCause::Pme));
    let mut nic = member("0000:02:00.0", Phase::On, Duration::from_millis(3_661_000));
    nic.policy.power = Some(PowerChoice::D3hot);
    nic.resource = None;
    let mut drive = member("0000:03:00.0", Phase::Lost, Duration::from_secs(5));
    drive.latched_by = Some(drive.bdf);
    drive.counters.failures[FailureKind::NoAnswer as usize] = 2;
    drive.policy.hold_off = Some(50);
    let asleep =
        json!({"power_state": "D3cold", "runtime_status": "suspended", "runtime_suspended_ms": 90_000});
    let awake = json!({"power_state": "D0", "runtime_status": "active", "runtime_suspended_ms": 0});
    let unknown = json!({"power_state": null, "runtime_status": null, "runtime_suspended_ms": null});
    json!({"state": "Running", "devices": [
        device("gpu0", "0000:01:00.0", gpu, &asleep),
        device("_vfio1", "0000:02:00.0", nic, &awake),
        device("nvme", "0000:03:00.0", drive, &unknown),
    ]})
}

/// `vm.info` of the same machine.
pub fn info() -> Value {
    json!({
        "config": {
            "cpus": {"boot_vcpus": 2, "max_vcpus": 2},
            "memory": {"size": 1u64 << 30},
            "payload": {"kernel": "/boot/vmlinuz-6.12", "cmdline": "console=ttyS0"},
            "serial": {"mode": "Pty", "file": "/dev/pts/3"},
            "console": {"mode": "Off"},
            "devices": [{"id": "gpu0", "path": "/sys/bus/pci/devices/0000:01:00.0"}],
            "platform": {"system_uuid": "9a6f3c1e-8d0b-4a56-b1d7-2f0c5a8e7b64"},
        },
        "state": "Running",
        "memory_actual_size": 1u64 << 30,
    })
}

/// `vmm.ping` of it.
pub fn ping(pid: u32) -> Value {
    json!({"build_version": "v0.1.0", "version": "54.0.0", "pid": pid, "features": ["kvm"]})
}
