//! QEMU as the emulated host: its command line, its process, and its monitor.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};

use crate::error::{Error, Result, file_error};
use crate::firmware;
use crate::rootfs;
use crate::spec::{Device, FIRST_PORT, HostSpec, Hotplug};
use crate::uefi;
use crate::wire::connect;

/// Size of the emulated NVMe drive.
const DRIVE_BYTES: u64 = 64 << 20;

/// What an emulated host is started from.
#[derive(Debug, Clone, Copy)]
pub struct Boot<'a> {
    /// The machine.
    pub spec: &'a HostSpec,
    /// Its kernel.
    pub kernel: &'a Path,
    /// Its initramfs.
    pub initramfs: &'a Path,
    /// More words for its command line.
    pub cmdline: &'a str,
    /// Sockets and drive files go here.
    pub dir: &'a Path,
    /// The host's first serial port is this terminal and not a socket; the other channels are absent.
    pub terminal: bool,
}

/// The running process. Dropping it ends the machine.
#[derive(Debug)]
pub struct Qemu {
    child: Child,
    monitor: Option<Mutex<Monitor>>,
    stderr: PathBuf,
}

#[derive(Debug)]
struct Monitor {
    stream: UnixStream,
    reader: BufReader<UnixStream>,
}

impl Qemu {
    /// Starts the machine. Its serial ports are the sockets `console`, `guest`, `rpc` and `vmm` in the directory, the
    /// firmware's debug port is `power`, the monitor `monitor`.
    pub fn start(boot: &Boot<'_>) -> Result<Self> {
        let arguments = arguments(boot)?;
        let stderr = boot.dir.join("qemu.log");
        // Ends with us, however we end.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "qemu-system-x86_64"]).args(&arguments);
        if !boot.terminal {
            let log = fs::File::create(&stderr).map_err(file_error("create", &stderr))?;
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        }
        let child = command.spawn().map_err(|source| Error::Command {
            command: "setpriv --pdeathsig KILL qemu-system-x86_64".to_owned(),
            status: "not started".to_owned(),
            output: source.to_string(),
        })?;
        let mut qemu = Self { child, monitor: None, stderr };
        if !boot.terminal {
            qemu.monitor = Some(Mutex::new(qemu.monitor(&boot.dir.join("monitor"))?));
        }
        Ok(qemu)
    }

    /// Runs a monitor command and waits for its answer.
    pub fn execute(&self, command: &str, arguments: &Value) -> Result<Value> {
        let Some(monitor) = &self.monitor else {
            return Err(Error::Check("this host has no monitor".to_owned()));
        };
        monitor.lock().unwrap_or_else(PoisonError::into_inner).execute(command, arguments)
    }

    /// Takes the network cable of NIC `id` out, or puts it in.
    pub fn set_link(&self, id: &str, up: bool) -> Result<()> {
        self.execute("set_link", &json!({"name": id, "up": up})).map(drop)
    }

    /// Presses the slot's button, so to speak: the host is asked to let the device go.
    pub fn unplug(&self, id: &str) -> Result<()> {
        self.execute("device_del", &json!({"id": id})).map(drop)
    }

    /// Whether the device is there.
    pub fn has(&self, id: &str) -> Result<bool> {
        let answer = self.execute("qom-list", &json!({"path": "/machine/peripheral"}))?;
        let devices = answer.as_array().map(Vec::as_slice).unwrap_or_default();
        Ok(devices.iter().any(|device| device["name"] == id))
    }

    /// Puts a NIC back into its slot, with the cable that it had.
    pub fn plug(&self, device: Device, slot: usize) -> Result<()> {
        let line = format!("device_add {}", nic(device, slot, 0));
        let answer = self.execute("human-monitor-command", &json!({"command-line": line}))?;
        match answer.as_str().map(str::trim) {
            None | Some("") => Ok(()),
            Some(complaint) => Err(Error::Check(format!("QEMU refused `{line}`: {complaint}"))),
        }
    }

    /// Waits for QEMU to end by itself; its exit code.
    pub fn wait(&mut self) -> Result<i32> {
        let status = self.child.wait().map_err(file_error("wait for", "qemu-system-x86_64"))?;
        Ok(status.code().unwrap_or(-1))
    }

    fn monitor(&mut self, path: &Path) -> Result<Monitor> {
        let stream = connect(path).map_err(|error| {
            let log = fs::read_to_string(&self.stderr).unwrap_or_default();
            let ended = matches!(self.child.try_wait(), Ok(Some(_)));
            if ended { Error::Ended { lane: "QEMU", why: log.trim().to_owned() } } else { error }
        })?;
        stream.set_read_timeout(Some(Duration::from_secs(60))).map_err(file_error("configure", path))?;
        let reader = BufReader::new(stream.try_clone().map_err(file_error("clone", path))?);
        let mut monitor = Monitor { stream, reader };
        monitor.execute("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Monitor {
    fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let ended = |why: String| Error::Ended { lane: "QEMU", why };
        let request = json!({"execute": command, "arguments": arguments});
        writeln!(self.stream, "{request}").map_err(|e| ended(format!("monitor: {e}")))?;
        loop {
            let mut line = String::new();
            let count = self.reader.read_line(&mut line).map_err(|e| ended(format!("monitor: {e}")))?;
            if count == 0 {
                return Err(ended("monitor closed".to_owned()));
            }
            let answer: Value = serde_json::from_str(&line).unwrap_or_default();
            if let Some(value) = answer.get("return") {
                return Ok(value.clone());
            }
            if let Some(error) = answer.get("error") {
                return Err(Error::Check(format!("QEMU refused `{command}`: {error}")));
            }
            // The greeting, or an event.
        }
    }
}

/// The command line of the machine.
fn arguments(boot: &Boot<'_>) -> Result<Vec<String>> {
    let spec = boot.spec;
    let mut words: Vec<String> = Vec::new();
    let mut add = |text: &str| words.extend(text.split_whitespace().map(str::to_owned));
    let dir = boot.dir.display();
    add("-nodefaults -no-user-config -no-reboot -machine q35 -cpu EPYC-v4,+svm,+npt,+pdpe1gb");
    if spec.deterministic {
        add("-accel tcg,thread=single -icount shift=0,sleep=off");
    } else {
        add("-accel tcg,thread=multi");
    }
    add(&format!("-smp {} -m {}M", spec.cpus, spec.memory_mib));
    // With ACPI hotplug QEMU gives the slots `_EJ0`, and Linux then never asks the firmware to cut power.
    let by_firmware = if spec.firmware_hotplug() { "on" } else { "off" };
    add(&format!("-global ICH9-LPC.acpi-pci-hotplug-with-bridge-support={by_firmware}"));
    if spec.iommu {
        add("-device intel-iommu,intremap=on,device-iotlb=on");
    }
    for (slot, slot_spec) in spec.slots.iter().enumerate() {
        let port = FIRST_PORT + slot;
        let hotplug = if slot_spec.hotplug == Hotplug::None { "off" } else { "on" };
        add(&format!(
            "-device pcie-root-port,id=rp{slot},hotplug={hotplug},bus=pcie.0,addr={port:#x},chassis={}",
            slot + 1
        ));
        for (function, device) in slot_spec.functions.iter().enumerate() {
            let id = device_id(slot, function);
            let multi = if slot_spec.functions.len() > 1 { ",multifunction=on" } else { "" };
            let place = format!("id={id},bus=rp{slot},addr=0.{function}{multi}");
            match device {
                Device::Gpu => {
                    // Linux has no suspend handlers for virtio GPUs: from 6.12 on it leaves a device alone that says
                    // it loses nothing in D3hot, and resets any other for good.
                    add(&format!(
                        "-device virtio-gpu-pci,iommu_platform=on,disable-legacy=on,x-pcie-pm-no-soft-reset=on,{place}"
                    ));
                }
                Device::E1000e | Device::Igb => {
                    add(&format!("-netdev user,id=net-{id} -device {}{multi}", nic(*device, slot, function)));
                }
                Device::Nvme => {
                    let drive = boot.dir.join(format!("{id}.raw"));
                    if spec.uefi {
                        let image = boot.dir.join(uefi::DRIVE);
                        fs::copy(&image, &drive).map_err(file_error("copy", &image))?;
                    }
                    fs::File::options()
                        .write(true)
                        .create(true)
                        .truncate(false)
                        .open(&drive)
                        .and_then(|file| file.set_len(DRIVE_BYTES))
                        .map_err(file_error("create", &drive))?;
                    add(&format!(
                        "-drive if=none,id=drive-{id},format=raw,file={} -device nvme,drive=drive-{id},serial={id},{place}",
                        drive.display()
                    ));
                }
                Device::Bochs | Device::Xhci => add(&format!("-device {},{place}", device.name())),
            }
        }
    }
    if spec.debian {
        let disks = rootfs::obtain()?;
        // What is written goes into a file that is gone when QEMU ends.
        for (name, path, keys) in
            [("root", disks.root, "readonly=on"), ("images", disks.images, "snapshot=on")]
        {
            add(&format!(
                "-drive if=none,id={name},format=raw,cache=unsafe,discard=unmap,{keys},file={} -device virtio-blk-pci,drive={name},serial={name}",
                path.display()
            ));
        }
    }
    let table = boot.dir.join("power.aml");
    if firmware::compile(spec, &table)? {
        add(&format!("-acpitable file={}", table.display()));
    }
    if boot.terminal {
        add("-serial mon:stdio -display none");
    } else {
        let socket = |name: &str| format!("-chardev socket,id={name},path={dir}/{name},server=on,wait=off");
        for name in ["console", "guest", "rpc", "vmm", "power", "monitor"] {
            add(&socket(name));
        }
        add("-display none -serial chardev:console -serial chardev:guest");
        // Ports of their own interrupt: the customary ones of COM3 and COM4 are shared and edge-triggered.
        add("-device isa-serial,index=2,irq=5,chardev=rpc -device isa-serial,index=3,irq=7,chardev=vmm");
        add("-device isa-debugcon,iobase=0xe9,chardev=power -mon chardev=monitor,mode=control");
    }
    add(&format!("-kernel {} -initrd {} -append", boot.kernel.display(), boot.initramfs.display()));
    let iommu = if spec.iommu { "intel_iommu=on iommu=pt" } else { "" };
    let bind = spec.addresses().join(",");
    let debian = if spec.debian { "bed.debian=1" } else { "" };
    let pages = match spec.gigantic_pages {
        0 => String::new(),
        count => format!("hugepagesz=1G hugepages={count}"),
    };
    // On a loaded machine the timer is too slow for the kernel's check of it.
    words.push(format!(
        "console=ttyS0 {iommu} quiet loglevel=5 panic=-1 tsc=reliable no_timer_check initcall_blacklist=nvme_init bed.bind={bind} {debian} {pages} {}",
        boot.cmdline
    ));
    Ok(words)
}

/// A NIC and its place, for `-device` and `device_add`.
fn nic(device: Device, slot: usize, function: usize) -> String {
    let id = device_id(slot, function);
    format!("{},netdev=net-{id},id={id},bus=rp{slot},addr=0.{function}", device.name())
}

/// QEMU's name of a function.
pub fn device_id(slot: usize, function: usize) -> String {
    format!("dev{slot}f{function}")
}
