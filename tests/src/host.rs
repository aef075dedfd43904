//! A booted emulated host: run commands on it, read what its kernel and firmware say about power, start VMs on it.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crate::artifacts::Artifacts;
use crate::error::{Error, Result, ensure, file_error};
use crate::firmware;
use crate::guest::{Guest, VmSpec};
use crate::image;
use crate::kernel;
use crate::paths;
use crate::qemu::{Boot, Qemu, device_id};
use crate::rpc::{Output, Rpc, wait_for};
use crate::spec::{HostSpec, Kernel};
use crate::timeline::{Lane, Timeline};
use crate::uefi;
use crate::wire::{Wire, connect};

/// The longest a host may take to boot: some 5 s on an idle machine.
const BOOT: Duration = Duration::from_secs(120);

/// QEMU now and then loses the emulated host's timer interrupt while a guest runs, and the host then sleeps until another
/// interrupt comes (docs/testing.md): this often one comes, from its serial port.
const PULSE: Duration = Duration::from_millis(200);

/// One change of a slot's power, by the firmware's own record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PowerEvent {
    /// Since the timeline began.
    pub at: Duration,
    /// The slot, from 0.
    pub slot: usize,
    /// On, or off.
    pub on: bool,
}

/// The emulated host.
#[derive(Debug)]
pub struct Host {
    /// What it was made from.
    pub spec: HostSpec,
    /// All that happened on it.
    pub timeline: Arc<Timeline>,
    pub(crate) guest: Rpc,
    rpc: Rpc,
    console: Wire,
    _vmm: Wire,
    pub(crate) qemu: Qemu,
    dir: PathBuf,
}

impl Host {
    /// Boots a host that can start guests with the kernels `guests`, and waits until it answers.
    pub fn boot(spec: &HostSpec, artifacts: &Artifacts, guests: &[Kernel]) -> Result<Self> {
        let dir = paths::run_dir()?;
        let initramfs = dir.join("host.cpio");
        image::build_host(artifacts, spec.kernel, guests, &initramfs)?;
        if spec.uefi {
            let guest = *guests.first().unwrap_or(&Kernel::Cloud6_12);
            uefi::add(artifacts, guest, spec.debian, &initramfs, &dir)?;
        }
        let files = kernel::obtain(spec.kernel)?;
        let timeline = Arc::new(Timeline::default());
        let qemu = Qemu::start(&Boot {
            spec,
            kernel: &files.vmlinuz,
            initramfs: &initramfs,
            cmdline: "",
            dir: &dir,
            terminal: false,
        })?;
        let wire = |name: &str, lane| Wire::connect(&dir.join(name), lane, Arc::clone(&timeline));
        let host = Self {
            console: wire("console", Lane::Host)?,
            guest: Rpc::new(wire("guest", Lane::Guest)?, Lane::Guest, Arc::clone(&timeline)),
            rpc: Rpc::new(wire("rpc", Lane::Host)?, Lane::Host, Arc::clone(&timeline)),
            _vmm: wire("vmm", Lane::Vmm)?,
            spec: spec.clone(),
            timeline,
            qemu,
            dir,
        };
        host.record_power()?;
        host.rpc.wait_ready(0, BOOT).map_err(|error| host.explain(error))?;
        if !spec.deterministic {
            host.rpc.wire().pulse(PULSE);
        }
        let _ = fs::remove_file(&initramfs);
        Ok(host)
    }

    /// Runs a shell line on the host.
    pub fn run(&self, command: &str) -> Result<Output> {
        self.rpc.run(command)
    }

    /// Runs a shell line on the host, kept off the timeline.
    pub fn probe(&self, command: &str) -> Result<Output> {
        self.rpc.probe(command)
    }

    /// Runs a shell line on the host, waiting for it up to `timeout`.
    pub fn run_for(&self, command: &str, timeout: Duration) -> Result<Output> {
        self.rpc.run_for(command, timeout)
    }

    /// Runs a shell line that must succeed; what it printed.
    pub fn sh(&self, command: &str) -> Result<String> {
        self.rpc.sh(command)
    }

    /// Starts the VMM as `vm` says and waits until its guest answers.
    pub fn start_vm(&self, vm: &VmSpec) -> Result<Guest<'_>> {
        Guest::start(self, vm)
    }

    /// `power_state` of a function, by the kernel's record: reading it does not wake the device.
    pub fn power_state(&self, bdf: &str) -> Result<String> {
        let output = self.probe(&format!("cat {}", sysfs(bdf, "power_state")))?;
        ensure(output.status == 0, || format!("host: {bdf}: {}", output.text))?;
        Ok(output.text)
    }

    /// Waits until the kernel's `power_state` of a function is `wanted`.
    pub fn wait_power_state(&self, bdf: &str, wanted: &str, timeout: Duration) -> Result<()> {
        let mut last = String::new();
        wait_for(&format!("host: {bdf} in {wanted}"), timeout, || {
            let state = self.power_state(bdf)?;
            if state != last {
                self.timeline.record(Lane::Host, format!("[{bdf} in {state}]"));
                last.clone_from(&state);
            }
            Ok(if state == wanted { Ok(()) } else { Err(state) })
        })
    }

    /// Checks that a function stays in `wanted` for `time`.
    pub fn stays_in(&self, bdf: &str, wanted: &str, time: Duration) -> Result<()> {
        let end = self.timeline.now() + time;
        while self.timeline.now() < end {
            let state = self.power_state(bdf)?;
            ensure(state == wanted, || format!("host: {bdf} went from {wanted} to {state}"))?;
            thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    /// Wakes a function from the host's side, as `lspci` would: reads the first bytes of its config space.
    pub fn poke(&self, bdf: &str) -> Result<String> {
        self.sh(&format!("head -c 4 {} | xxd -p", sysfs(bdf, "config")))
    }

    /// The firmware's record of power since `since`.
    pub fn power_events(&self, since: Duration) -> Vec<PowerEvent> {
        self.timeline
            .lane(Lane::Power, since)
            .iter()
            .filter_map(|entry| {
                let mut words = entry.text.split_whitespace().skip(1);
                let slot = words.next()?.parse().ok()?;
                Some(PowerEvent { at: entry.at, slot, on: words.next()? == "on" })
            })
            .collect()
    }

    /// How often the firmware cut (`on` false) or gave (`on` true) power to `slot` since `since`.
    pub fn power_count(&self, slot: usize, on: bool, since: Duration) -> usize {
        self.power_events(since).iter().filter(|event| event.slot == slot && event.on == on).count()
    }

    /// Takes the cable of a NIC out, or puts it in.
    pub fn set_link(&self, slot: usize, up: bool) -> Result<()> {
        self.timeline.record(Lane::Host, format!("[cable of slot {slot} {}]", if up { "in" } else { "out" }));
        self.qemu.set_link(&device_id(slot, 0), up)
    }

    /// Adds the last words of the host's kernel and of QEMU to an error that came from the host's silence.
    pub fn explain(&self, error: Error) -> Error {
        let console = self.console.since(self.console.mark().saturating_sub(15)).join("\n");
        let qemu = fs::read_to_string(self.dir.join("qemu.log")).unwrap_or_default();
        let qemu: Vec<&str> = qemu.lines().filter(|line| !line.contains("TCG doesn't support")).collect();
        Error::Check(format!("{error}\nthe host's console ends:\n{console}\nQEMU says: {}", qemu.join("\n")))
    }

    fn record_power(&self) -> Result<()> {
        use std::io::Read as _;
        let mut stream = connect(&self.dir.join("power"))?;
        let timeline = Arc::clone(&self.timeline);
        thread::spawn(move || {
            let mut byte = [0];
            while matches!(stream.read(&mut byte), Ok(1)) {
                if let Some((slot, on)) = firmware::decode(byte[0]) {
                    timeline.record(Lane::Power, format!("slot {slot} {}", if on { "on" } else { "off" }));
                }
            }
        });
        Ok(())
    }

    /// Keeps QEMU's own messages and the timeline for later reading; the path.
    pub fn save_log(&self, name: &str) -> Result<PathBuf> {
        let dir = paths::cache()?.join("logs");
        fs::create_dir_all(&dir).map_err(file_error("create", &dir))?;
        let path = dir.join(format!("{name}.log"));
        let mut text = self.timeline.columns(Duration::ZERO, usize::MAX);
        text.push_str("\nQEMU:\n");
        text.push_str(&fs::read_to_string(self.dir.join("qemu.log")).unwrap_or_default());
        fs::write(&path, text).map_err(file_error("write", &path))?;
        Ok(path)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// A file of a PCI function in sysfs.
pub fn sysfs(bdf: &str, file: &str) -> String {
    format!("/sys/bus/pci/devices/{bdf}/{file}")
}
