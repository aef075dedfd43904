//! The VM under test: how the VMM is started, and the guest that answers on its console.

use std::cell::Cell;
use std::time::Duration;

use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::host::Host;
use crate::image::guest_path;
use crate::rpc::{Call, Output, wait_for};
use crate::spec::Kernel;
use crate::wire::VMM_EXIT;

/// The longest a guest may take to boot: some 10 s on an idle machine.
const BOOT: Duration = Duration::from_secs(100);
/// What a guest is asked when a scenario has failed.
const POST_MORTEM: &str = "grep . /sys/bus/pci/devices/*/power/runtime_status /sys/bus/pci/devices/*/power_state; dmesg | tail -n 25";
/// How long the VMM may take to end when told to.
const STOP: Duration = Duration::from_secs(30);

/// A VM, as the VMM's command line will say it.
#[derive(Debug, Clone)]
pub struct VmSpec {
    /// The guest's kernel.
    pub kernel: Kernel,
    /// Another initramfs than the kernel's usual one; a path on the host.
    pub initramfs: Option<String>,
    /// Boot the uncompressed ELF by its PVH entry.
    pub pvh: bool,
    /// Virtual processors.
    pub cpus: u32,
    /// RAM, as `--memory size=` takes it.
    pub memory: String,
    /// Values of `--device`.
    pub devices: Vec<String>,
    /// Modules the guest loads while booting.
    pub modules: Vec<&'static str>,
    /// More words for the guest's command line.
    pub cmdline: String,
    /// More options of the VMM.
    pub options: String,
    /// Start the VMM without a machine, with the REST API on [`API`]: the machine is to come through it.
    pub by_api: bool,
    /// Another command line altogether.
    pub command: Option<String>,
}

/// The API socket of a VMM that was started by [`VmSpec::by_api`].
pub const API: &str = "/run/vmm.api";

impl VmSpec {
    /// A VM with one processor, 512 MiB and no devices.
    pub fn new(kernel: Kernel) -> Self {
        Self {
            kernel,
            initramfs: None,
            pvh: false,
            cpus: 1,
            memory: "512M".to_owned(),
            devices: Vec::new(),
            modules: Vec::new(),
            cmdline: String::new(),
            options: String::new(),
            by_api: false,
            command: None,
        }
    }

    /// The same VM with the function at host address `bdf`; the guest loads its driver while booting.
    pub fn device(self, host: &Host, bdf: &str) -> Self {
        let modules = host.spec.device_at(bdf).map(|device| device.modules()).unwrap_or_default();
        let mut vm = self.device_with(bdf, "");
        vm.modules.extend(modules);
        vm
    }

    /// The same VM with a function, with more keys (`,power=off`) and without its driver.
    pub fn device_with(mut self, bdf: &str, keys: &str) -> Self {
        self.devices.push(format!("path=/sys/bus/pci/devices/{bdf}{keys}"));
        self
    }

    /// The same VM with other processors.
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// The same VM with other RAM.
    pub fn memory(mut self, size: &str) -> Self {
        self.memory = size.to_owned();
        self
    }

    /// The same VM, booted from the ELF.
    pub fn pvh(mut self) -> Self {
        self.pvh = true;
        self
    }

    /// The same VM with more words on the guest's command line.
    pub fn cmdline(mut self, words: &str) -> Self {
        self.cmdline.push(' ');
        self.cmdline.push_str(words);
        self
    }

    /// The same VM with more options of the VMM.
    pub fn options(mut self, words: &str) -> Self {
        self.options.push(' ');
        self.options.push_str(words);
        self
    }

    /// The same VM, for the API to create and boot.
    pub fn by_api(mut self) -> Self {
        self.by_api = true;
        self
    }

    /// Names the devices `dev0`, `dev1`, and so on, in the configuration as the API takes it.
    pub fn config(&self) -> Value {
        let devices: Vec<Value> = (0..)
            .zip(&self.devices)
            .map(|(number, keys): (u32, _)| {
                let path = keys.trim_start_matches("path=").split(',').next();
                json!({ "id": format!("dev{number}"), "path": path })
            })
            .collect();
        json!({
            "payload": {
                "kernel": guest_path(self.kernel, "vmlinuz"),
                "initramfs": guest_path(self.kernel, "initramfs"),
                "cmdline": self.kernel_words(),
            },
            "cpus": { "boot_vcpus": self.cpus, "max_vcpus": self.cpus },
            "memory": { "size": 512 << 20 },
            "serial": { "mode": "Tty" },
            "console": { "mode": "Off" },
            "devices": devices,
        })
    }

    fn kernel_words(&self) -> String {
        format!("console=ttyS0 quiet panic=-1 bed.modules={}{}", self.modules.join(","), self.cmdline)
    }

    /// The command line, for the host's shell.
    pub fn command(&self) -> String {
        if let Some(command) = &self.command {
            return command.clone();
        }
        if self.by_api {
            return format!("dormouse --api-socket {API} {}", self.options);
        }
        let image = if self.pvh { "vmlinux" } else { "vmlinuz" };
        let initramfs = self.initramfs.clone().unwrap_or_else(|| guest_path(self.kernel, "initramfs"));
        let devices: String = self.devices.iter().map(|device| format!(" --device {device}")).collect();
        format!(
            "dormouse --kernel {} --initramfs {initramfs} --cmdline '{}' \
             --cpus boot={} --memory size={} --serial tty --console off{devices}{}",
            guest_path(self.kernel, image),
            self.kernel_words(),
            self.cpus,
            self.memory,
            self.options
        )
    }
}

/// A running VM. Dropping it kills the VMM, so that the next scenario finds the host free.
#[derive(Debug)]
pub struct Guest<'h> {
    host: &'h Host,
    /// Number of console lines before it was started.
    first: usize,
    ended: Cell<bool>,
}

impl<'h> Guest<'h> {
    /// Starts the VMM on `host` and waits for the guest.
    pub fn start(host: &'h Host, vm: &VmSpec) -> Result<Self> {
        let guest = Self::launch(host, vm)?;
        guest.wait_ready(guest.first)?;
        Ok(guest)
    }

    /// Starts the VMM on `host` without waiting for the guest.
    pub fn launch(host: &'h Host, vm: &VmSpec) -> Result<Self> {
        host.guest.wire().forget_end();
        let first = host.guest.wire().mark();
        host.sh(
            "rm -f /run/vmm.*; mkfifo /run/vmm.fifo; (tee /run/vmm.log </run/vmm.fifo >/dev/ttyS3 2>&1 &)",
        )?;
        // The serial port carries the guest's console; the VMM's own words go to files.
        host.sh(&format!(
            "({} --log-file /run/vmm.fifo -v </dev/ttyS1 >/dev/ttyS1 2>/run/vmm.err & \
             echo $! >/run/vmm.pid; wait $!; s=$?; echo $s >/run/vmm.status; \
             printf '\\n{VMM_EXIT}%s\\n' $s >/dev/ttyS1) </dev/null >/dev/null 2>&1 &",
            vm.command()
        ))?;
        Ok(Self { host, first, ended: Cell::new(false) })
    }

    /// Waits until the guest's agent announces itself, counting from line `mark` of its console.
    pub fn wait_ready(&self, mark: usize) -> Result<()> {
        self.host.guest.wait_ready(mark, BOOT).map_err(|error| self.explain(error))
    }

    /// Number of console lines before it was started.
    pub fn first(&self) -> usize {
        self.first
    }

    /// Number of console lines so far.
    pub fn mark(&self) -> usize {
        self.host.guest.wire().mark()
    }

    /// From now on a panic of the guest's kernel is not an end, but what the scenario wants.
    pub fn expect_panic(&self) {
        self.host.guest.wire().expect_panic();
    }

    /// Runs a shell line in the guest.
    pub fn run(&self, command: &str) -> Result<Output> {
        self.host.guest.run(command).map_err(|error| self.explain(error))
    }

    /// Runs a shell line in the guest, kept off the timeline.
    pub fn probe(&self, command: &str) -> Result<Output> {
        self.host.guest.probe(command).map_err(|error| self.explain(error))
    }

    /// Runs a shell line that must succeed; what it printed.
    pub fn sh(&self, command: &str) -> Result<String> {
        self.host.guest.sh(command).map_err(|error| self.explain(error))
    }

    /// As [`Guest::sh`], with its own limit of time.
    pub fn sh_for(&self, command: &str, timeout: Duration) -> Result<String> {
        self.host.guest.sh_for(command, timeout).map_err(|error| self.explain(error))
    }

    /// Starts a shell line and does not wait for it.
    pub fn begin(&self, command: &str) -> Result<Call> {
        self.host.guest.start(command).map_err(|error| self.explain(error))
    }

    /// Waits for a started shell line.
    pub fn finish(&self, call: &Call, timeout: Duration) -> Result<Output> {
        self.host.guest.finish(call, timeout).map_err(|error| self.explain(error))
    }

    /// Waits for `file` (of sysfs, say) in the guest to read `wanted`.
    pub fn wait_file(&self, file: &str, wanted: &str, timeout: Duration) -> Result<()> {
        wait_for(&format!("guest: {file} reads {wanted}"), timeout, || {
            let text = self.probe(&format!("cat {file}"))?.text;
            Ok(if text == wanted { Ok(()) } else { Err(text) })
        })
    }

    /// Sends the VMM a signal, by name.
    pub fn signal(&self, name: &str) -> Result<()> {
        self.host.sh(&format!("kill -{name} $(cat /run/vmm.pid)")).map(drop)
    }

    /// Waits for the VMM to end; its exit status (128 + signal when killed).
    pub fn wait_exit(&self) -> Result<i32> {
        self.wait_exit_for(STOP)
    }

    /// As [`Guest::wait_exit`], with its own limit of time.
    pub fn wait_exit_for(&self, limit: Duration) -> Result<i32> {
        let status = wait_for("the VMM ends", limit, || {
            let output = self.host.probe("cat /run/vmm.status 2>/dev/null")?;
            Ok(output.text.trim().parse().map_err(|_| "still running".to_owned()))
        })?;
        self.ended.set(true);
        // Its last line comes by another channel: see it pass before somebody starts the next VM.
        let wire = self.host.guest.wire();
        let _ = wire.wait("the console ends", self.first, STOP, |line| line.contains(VMM_EXIT));
        Ok(status)
    }

    /// Has the guest power off, and checks that the VMM ends well.
    pub fn power_off(&self) -> Result<()> {
        self.begin("poweroff -f")?;
        let status = self.wait_exit()?;
        crate::error::ensure(status == 0, || {
            let stderr = self.stderr().unwrap_or_default();
            format!("the VMM ended with status {status} after power-off; it says: {}", stderr.trim())
        })
    }

    /// What the VMM wrote to its standard error.
    pub fn stderr(&self) -> Result<String> {
        self.host.sh("cat /run/vmm.err")
    }

    /// The VMM's log.
    pub fn log(&self) -> Result<String> {
        self.host.sh("cat /run/vmm.log")
    }

    /// Adds what the VMM said to an error that came from the guest's silence.
    fn explain(&self, error: Error) -> Error {
        if let Error::Ended { lane, why } = &error {
            let stderr = self.stderr().unwrap_or_default();
            return Error::Ended { lane, why: format!("{why}; the VMM says: {}", stderr.trim()) };
        }
        error
    }
}

/// The time in a line of the VMM's log (`dormouse: 1.042317s: ...`), since the VMM started.
pub fn log_time(line: &str) -> Option<Duration> {
    let seconds: f64 = line.split(": ").find_map(|word| word.trim().strip_suffix('s')?.parse().ok())?;
    Duration::try_from_secs_f64(seconds).ok()
}

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        if self.ended.get() {
            return;
        }
        // Nobody ended it in order: a scenario has failed. What the guest knows goes on the timelines.
        let _ = self.host.guest.run_for(POST_MORTEM, Duration::from_secs(10));
        let _ = self.host.run("kill -KILL $(cat /run/vmm.pid) 2>/dev/null");
        let _ = self.wait_exit();
    }
}
