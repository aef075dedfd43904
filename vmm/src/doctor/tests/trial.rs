//! The attempt, with a function that changes sysfs as the kernel would.

use std::fs;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use devices::vfio::bind::Binder;
use pci::Bdf;
use vfio_pm::{EnterError, ExitError, LowPower, ProbeError, Support};
use vmm_sys_util::eventfd::EventFd;

use super::super::checks::Patient;
use super::super::finding::{Check, Severity};
use super::super::fixture::{NIC, SIBLING, Tree};
use super::super::verify::{Measurement, Patience, VerifyError, attempt, verify};

const PATIENCE: Patience = Patience {
    reach: Duration::from_millis(60),
    hold: Duration::from_millis(20),
    pause: Duration::from_millis(1),
};

/// A function that goes to `depth` as soon as it may.
#[derive(Debug)]
struct Sleeper<'a> {
    tree: &'a Tree,
    depth: &'static str,
    support: Support,
    wakes: bool,
    refuses: bool,
    exits: Mutex<u32>,
}

impl<'a> Sleeper<'a> {
    fn new(tree: &'a Tree, depth: &'static str) -> Self {
        tree.wake(NIC);
        Self { tree, depth, support: Support::FULL, wakes: false, refuses: false, exits: Mutex::new(0) }
    }

    fn attempt(&self, answers: bool, stop: bool) -> Result<Measurement, VerifyError> {
        let bdf: Bdf = NIC.parse().unwrap();
        let stop = AtomicBool::new(stop);
        attempt(self, &self.tree.host, bdf, &|| answers, &stop, PATIENCE)
    }

    fn exits(&self) -> u32 {
        *self.exits.lock().unwrap()
    }
}

impl LowPower for Sleeper<'_> {
    fn probe(&self) -> Result<Support, ProbeError> {
        Ok(self.support)
    }

    fn enter(&self, wake: Option<&EventFd>) -> Result<(), EnterError> {
        if self.refuses {
            return Err(EnterError::Engaged);
        }
        self.tree.set(NIC, "power/runtime_status", "suspended");
        self.tree.set(NIC, "power_state", self.depth);
        if self.wakes {
            wake.unwrap().write(1).unwrap();
        }
        Ok(())
    }

    fn exit(&self) -> Result<(), ExitError> {
        *self.exits.lock().unwrap() += 1;
        self.tree.wake(NIC);
        Ok(())
    }
}

#[test]
fn a_device_that_loses_its_power_is_measured_and_brought_back() {
    let tree = Tree::new();
    let sleeper = Sleeper::new(&tree, "D3cold");
    let measured = sleeper.attempt(true, false).unwrap();
    assert_eq!(
        (measured.deepest.as_str(), measured.answers, measured.woken_after_ms),
        ("D3cold", true, None)
    );
    assert_eq!(measured.steps.len(), 1);
    assert_eq!(sleeper.exits(), 1);
    assert_eq!(fs::read_to_string(tree.path(&tree.of(NIC)).join("power_state")).unwrap(), "D0\n");
}

#[test]
fn a_device_that_stays_in_d3hot_is_waited_for_and_said_so() {
    let tree = Tree::new();
    let sleeper = Sleeper::new(&tree, "D3hot");
    let measured = sleeper.attempt(true, false).unwrap();
    assert_eq!((measured.deepest.as_str(), sleeper.exits()), ("D3hot", 1));
}

#[test]
fn a_wake_during_the_attempt_is_reported() {
    let tree = Tree::new();
    let sleeper = Sleeper { wakes: true, ..Sleeper::new(&tree, "D3cold") };
    assert!(sleeper.attempt(true, false).unwrap().woken_after_ms.is_some());
    assert_eq!(sleeper.exits(), 1);
}

#[test]
fn a_device_that_does_not_come_back_is_seen() {
    let tree = Tree::new();
    let sleeper = Sleeper::new(&tree, "D3cold");
    assert!(!sleeper.attempt(false, false).unwrap().answers);
}

#[test]
fn an_interrupted_attempt_brings_the_device_back_first() {
    let tree = Tree::new();
    let sleeper = Sleeper::new(&tree, "D3hot");
    assert!(matches!(sleeper.attempt(true, true), Err(VerifyError::Interrupted(_))));
    assert_eq!(sleeper.exits(), 1);
}

#[test]
fn a_kernel_without_the_features_or_with_a_refusal_fails_by_name() {
    let tree = Tree::new();
    let sleeper = Sleeper { support: Support::default(), ..Sleeper::new(&tree, "D3cold") };
    assert!(matches!(sleeper.attempt(true, false), Err(VerifyError::Unsupported(_))));
    let sleeper = Sleeper { refuses: true, ..Sleeper::new(&tree, "D3cold") };
    let error = sleeper.attempt(true, false).unwrap_err();
    let finding = error.finding(NIC.parse().unwrap());
    assert_eq!((finding.check, finding.severity), (Check::Verify, Severity::Blocker));
    assert!(finding.meaning.contains("in low power already"), "{finding:?}");
}

#[test]
fn what_the_host_or_a_vm_uses_is_not_tried_and_nothing_is_bound() {
    let tree = Tree::new();
    let binder = Binder::new(tree.host.functions(), tree.host.dev.clone(), tree.host.proc.clone(), NoTouch);
    let refusal = || {
        let patient = Patient::read(&tree.host, NIC.parse().unwrap()).unwrap();
        match verify(&tree.host, &binder, &patient, &AtomicBool::new(false)) {
            Err(VerifyError::Refused { reason, .. }) => reason,
            other => panic!("{other:?}"),
        }
    };
    // Its partner would go with it.
    tree.bind(SIBLING, "igb");
    tree.interface(SIBLING, "eth1", "0x1003");
    assert!(refusal().contains("eth1 is up"));
    fs::create_dir_all(tree.path("proc/812/fd")).unwrap();
    std::os::unix::fs::symlink(tree.path("dev/vfio/9"), tree.path("proc/812/fd/14")).unwrap();
    assert!(refusal().contains("process 812"));
    tree.remove(&format!("{}/iommu_group", tree.of(NIC)));
    assert!(refusal().contains("intel_iommu=on"));
    assert!(!TOUCHED.load(Ordering::Relaxed));
}

static TOUCHED: AtomicBool = AtomicBool::new(false);

/// A kernel to which nothing may be written.
#[derive(Debug)]
struct NoTouch;

impl devices::vfio::bind::Kernel for NoTouch {
    fn write(&self, _path: &std::path::Path, _text: &str) -> std::io::Result<()> {
        TOUCHED.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn modprobe(&self, _module: &str) -> std::io::Result<()> {
        TOUCHED.store(true, Ordering::Relaxed);
        Ok(())
    }
}
