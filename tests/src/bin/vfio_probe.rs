//! Puts an assigned device to sleep and wakes it with bare VFIO calls: what the hardware and the host's kernel can do
//! by themselves, as the reference for the VMM's figures.
//!
//! `vfio_probe BDF [CYCLES]` opens the function by its group, and in each cycle calls
//! `VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP`, waits for `power_state` to read D3cold, then wakes it: by
//! `LOW_POWER_EXIT` in even cycles, by a read of its sysfs `config` in odd ones. Prints one line a figure,
//! `name minimum median maximum`, in microseconds. (linux/vfio.h.)
#![allow(unsafe_code)] // ioctl and eventfd have no safe form in the standard library.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd};
use std::process::ExitCode;
use std::time::{Duration, Instant};

const VFIO_BASE: u64 = 0x3b64;
const SET_IOMMU: u64 = VFIO_BASE + 2;
const GROUP_SET_CONTAINER: u64 = VFIO_BASE + 4;
const GROUP_GET_DEVICE_FD: u64 = VFIO_BASE + 6;
const DEVICE_FEATURE: u64 = VFIO_BASE + 17;
const TYPE1V2_IOMMU: usize = 3;
const FEATURE_SET: u32 = 1 << 17;
const ENTRY_WITH_WAKEUP: u32 = 4;
const EXIT: u32 = 5;
const PATIENCE: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Some(bdf) = arguments.first() else {
        eprintln!("usage: vfio_probe BDF [CYCLES]");
        return ExitCode::from(2);
    };
    let cycles = arguments.get(1).and_then(|text| text.parse().ok()).unwrap_or(4);
    match run(bdf, cycles) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vfio_probe: {bdf}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(bdf: &str, cycles: usize) -> io::Result<()> {
    let sysfs = format!("/sys/bus/pci/devices/{bdf}");
    let group_link = fs::read_link(format!("{sysfs}/iommu_group"))?;
    let number = group_link.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let open = |path: &str| OpenOptions::new().read(true).write(true).open(path);
    let container = open("/dev/vfio/vfio")?;
    let group = open(&format!("/dev/vfio/{number}"))?;
    let container_fd = container.as_raw_fd();
    ioctl(&group, GROUP_SET_CONTAINER, std::ptr::from_ref(&container_fd) as usize)?;
    ioctl(&container, SET_IOMMU, TYPE1V2_IOMMU)?;
    let name = format!("{bdf}\0");
    let fd = ioctl(&group, GROUP_GET_DEVICE_FD, name.as_ptr() as usize)?;
    // SAFETY: the kernel has just made this descriptor for us; nobody else closes it.
    let device = unsafe { File::from_raw_fd(fd) };

    let mut entry = Vec::new();
    let mut off = Vec::new();
    let mut exit = Vec::new();
    let mut wake = Vec::new();
    for cycle in 0..cycles {
        let mut event = eventfd()?;
        let start = Instant::now();
        feature(&device, ENTRY_WITH_WAKEUP, Some(event.as_raw_fd()))?;
        entry.push(start.elapsed());
        wait_for_d3cold(&sysfs)?;
        off.push(start.elapsed());
        let start = Instant::now();
        if cycle % 2 == 0 {
            feature(&device, EXIT, None)?;
            exit.push(start.elapsed());
        } else {
            let mut bytes = [0; 4];
            File::open(format!("{sysfs}/config"))?.read_exact(&mut bytes)?;
            event.read_exact(&mut [0; 8])?;
            wake.push(start.elapsed());
            feature(&device, EXIT, None)?;
        }
    }
    for (name, mut times) in [("entry", entry), ("off", off), ("exit", exit), ("wake", wake)] {
        times.sort();
        if let (Some(first), Some(last)) = (times.first(), times.last()) {
            let median = times[times.len() / 2];
            println!("{name} {} {} {}", first.as_micros(), median.as_micros(), last.as_micros());
        }
    }
    Ok(())
}

fn wait_for_d3cold(sysfs: &str) -> io::Result<()> {
    let start = Instant::now();
    loop {
        let state = fs::read_to_string(format!("{sysfs}/power_state"))?;
        if state.trim() == "D3cold" {
            return Ok(());
        }
        if start.elapsed() > PATIENCE {
            return Err(io::Error::other(format!("stays in {} after LOW_POWER_ENTRY", state.trim())));
        }
        std::thread::sleep(Duration::from_micros(100));
    }
}

fn feature(device: &File, feature: u32, eventfd: Option<i32>) -> io::Result<()> {
    // struct vfio_device_feature, then the payload of ENTRY_WITH_WAKEUP: eventfd, reserved.
    let size = if eventfd.is_some() { 16 } else { 8 };
    let descriptor = u32::from_ne_bytes(eventfd.unwrap_or(-1).to_ne_bytes());
    let request: [u32; 4] = [size, FEATURE_SET | feature, descriptor, 0];
    ioctl(device, DEVICE_FEATURE, request.as_ptr() as usize).map(drop)
}

fn eventfd() -> io::Result<File> {
    // SAFETY: no pointers are passed.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us; nobody else closes it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// `argument` is a number, or the address of a live object of the type that `request` takes.
fn ioctl(file: &File, request: u64, argument: usize) -> io::Result<i32> {
    // SAFETY: all callers are in this file, and each passes what its request is documented to take.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request, argument) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
