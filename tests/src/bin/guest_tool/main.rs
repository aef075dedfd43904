//! What a shell in the guest cannot do: touch the BARs of a function, change its configuration, use the GPU.
//!
//! - `guest_tool bars BDF`: prints `barN FIRST` for each memory BAR, FIRST being its first 32 bits.
//! - `guest_tool hammer BDF`: reads and writes each memory BAR in all widths at many places; prints `barN ones` when
//!   every read gave all ones, else `barN OFFSET VALUE`. For functions that are off: on a live one it does damage.
//! - `guest_tool config BDF OFFSET [VALUE]`: reads, or writes, 16 bits of config space.
//! - `guest_tool cam BDF OFFSET`: reads 32 bits of config space by the ports 0xCF8 and 0xCFC, behind the kernel's back.
//! - `guest_tool kexec KERNEL INITRAMFS COMMAND_LINE`: starts another kernel at once, without shutting anything down
//!   but the drivers.
//! - `guest_tool kexec-load KERNEL INITRAMFS COMMAND_LINE` and `guest_tool kexec-start`: the same in two steps
//! - `guest_tool pmcsr BDF [STATE]`: reads the power state bits (PCI PM 1.2 section 3.2.4), or sets them: 0 for D0, 3
//!   for D3hot.
//! - `guest_tool cycle BDF COUNT MS`: lets a function without a driver suspend, leaves it so for MS milliseconds, wakes
//!   it, COUNT times; each time it must be in D3cold, then in D0 with the identity it had.
//! - `guest_tool abuse SECONDS SEED BDF...`: random accesses to everything within reach; see [`abuse`].
//! - `guest_tool storm SECONDS SEED ADDRESS LENGTH`: random accesses to registers in memory space; see [`storm`].
//! - `guest_tool cpuid LEAF`: the four registers that CPUID gives for a leaf.
//! - `guest_tool disk ...`: accesses to a disk, for measuring; see [`disk`].
//! - `guest_tool vsock ...`: sockets to the host; see [`vsock`].
//! - `guest_tool break-rings BDF QUEUE [survive]`: a virtio driver that does all that it must not; see [`virtio`]. With `survive` the device need not notice.
//! - `guest_tool break-rings BDF QUEUE hold WAY SECONDS`: breaks a ring in one of these ways and leaves it so for so long.
//! - `guest_tool watchdog BDF COUNT`: gives the virtio watchdog COUNT signs of life, one a second, and then none.
//! - `guest_tool records write DISK`, `guest_tool records check IMAGE N`: whether a disk keeps what was flushed; see
//!   [`records`].
//! - `guest_tool drm`: fills a buffer of `/dev/dri/card0` and waits for the GPU's interrupt.
#![allow(unsafe_code)] // mmap and ioctl have no safe form in the standard library.

mod abuse;
mod disk;
mod records;
mod storm;
mod virtio;
mod vsock;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use std::ptr;
use std::thread;
use std::time::{Duration, Instant};

const PAGE: usize = 4096;
/// Pages of a large BAR that are touched, spread over it.
const PAGES: usize = 16;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["bars", bdf] => each_bar(bdf, |bar| Ok(format!("{:#010x}", bar.read::<u32>(0)))),
        ["hammer", bdf] => each_bar(bdf, hammer),
        ["config", bdf, offset] => config(bdf, offset, None),
        ["config", bdf, offset, value] => config(bdf, offset, Some(value)),
        ["cam", bdf, offset] => cam(bdf, offset),
        ["kexec", kernel, initramfs, cmdline] => {
            load(kernel, initramfs, cmdline).and_then(|()| start_loaded())
        }
        ["kexec-load", kernel, initramfs, cmdline] => load(kernel, initramfs, cmdline),
        ["kexec-start"] => start_loaded(),
        ["pmcsr", bdf] => pmcsr(bdf, None),
        ["pmcsr", bdf, state] => pmcsr(bdf, Some(state)),
        ["cycle", bdf, count, dwell] => cycle(bdf, count, dwell),
        ["abuse", seconds, seed, bdfs @ ..] if !bdfs.is_empty() => abuse::run(seconds, seed, bdfs),
        ["storm", seconds, seed, address, length] => storm::run(seconds, seed, address, length),
        ["cpuid", leaf] => cpuid(leaf),
        ["disk", words @ ..] => disk::run(words),
        ["drm"] => drm::draw(),
        ["vsock", rest @ ..] => vsock::run(rest),
        ["break-rings", bdf, queue] => virtio::break_rings(bdf, queue, false),
        ["break-rings", bdf, queue, "survive"] => virtio::break_rings(bdf, queue, true),
        ["break-rings", bdf, queue, "hold", way, seconds] => virtio::hold_broken(bdf, queue, way, seconds),
        ["watchdog", bdf, count] => virtio::watchdog(bdf, count),
        ["records", "write", disk] => records::write(disk),
        ["records", "check", image, flushed] => records::check(image, flushed),
        _ => Err(io::Error::other(
            "usage: guest_tool bars|hammer|config|cam|pmcsr|kexec|cycle|abuse|storm|cpuid|disk|drm|vsock|break-rings|watchdog|records ...",
        )),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("guest_tool: {}: {error}", words.join(" "));
            ExitCode::FAILURE
        }
    }
}

fn sysfs(bdf: &str, file: &str) -> String {
    format!("/sys/bus/pci/devices/{bdf}/{file}")
}

fn number(text: &str) -> io::Result<u64> {
    let digits = text.strip_prefix("0x");
    let value = digits.map_or_else(|| text.parse(), |hex| u64::from_str_radix(hex, 16));
    value.map_err(|_| io::Error::other(format!("{text} is no number")))
}

fn each_bar(bdf: &str, look: impl Fn(&Mapping) -> io::Result<String>) -> io::Result<()> {
    for (index, bar) in map_bars(bdf)? {
        println!("bar{index} {}", look(&bar)?);
    }
    Ok(())
}

/// The memory BARs by their number; at least one.
fn map_bars(bdf: &str) -> io::Result<Vec<(usize, Mapping)>> {
    const MEMORY: u64 = 0x200; // IORESOURCE_MEM
    let mut bars = Vec::new();
    for (index, line) in fs::read_to_string(sysfs(bdf, "resource"))?.lines().take(6).enumerate() {
        let fields: Vec<u64> = line.split_whitespace().map_while(|f| number(f).ok()).collect();
        let &[start, end, flags] = fields.as_slice() else { continue };
        if flags & MEMORY == 0 || end <= start {
            continue;
        }
        let length = usize::try_from(end - start + 1).map_err(io::Error::other)?;
        let file = OpenOptions::new().read(true).write(true).open(sysfs(bdf, &format!("resource{index}")))?;
        bars.push((index, Mapping::new(&file, length)?));
    }
    if bars.is_empty() { Err(io::Error::other("no memory BAR")) } else { Ok(bars) }
}

fn hammer(bar: &Mapping) -> io::Result<String> {
    let pages = (bar.length / PAGE).max(1);
    let step = pages.div_ceil(PAGES).max(1);
    for offset in (0..pages).step_by(step).map(|page| page * PAGE).flat_map(|base| [base, base + 0x18]) {
        bar.write::<u32>(offset, 0);
        bar.write::<u8>(offset + 1, 0x5a);
        bar.write::<u16>(offset + 2, 0x1234);
        bar.write::<u64>(offset, 0x0123_4567_89ab_cdef);
        let reads = [
            (u64::from(bar.read::<u8>(offset + 1)), 0xff),
            (u64::from(bar.read::<u16>(offset + 2)), 0xffff),
            (u64::from(bar.read::<u32>(offset)), 0xffff_ffff),
            (bar.read::<u64>(offset), u64::MAX),
        ];
        if let Some((value, _)) = reads.iter().find(|(value, ones)| value != ones) {
            return Ok(format!("{offset:#x} {value:#x}"));
        }
    }
    Ok("ones".to_owned())
}

fn config(bdf: &str, offset: &str, value: Option<&str>) -> io::Result<()> {
    let file = OpenOptions::new().read(true).write(value.is_some()).open(sysfs(bdf, "config"))?;
    let offset = number(offset)?;
    if let Some(value) = value {
        let value = u16::try_from(number(value)?).map_err(io::Error::other)?;
        return file.write_all_at(&value.to_le_bytes(), offset);
    }
    println!("{:#06x}", word(&file, offset)?);
    Ok(())
}

fn cycle(bdf: &str, count: &str, dwell: &str) -> io::Result<()> {
    let dwell = Duration::from_millis(number(dwell)?);
    let identity = || fs::File::open(sysfs(bdf, "config")).and_then(|file| word(&file, 2));
    let device = identity()?;
    for round in 0..number(count)? {
        fs::write(sysfs(bdf, "power/control"), "auto")?;
        await_state(bdf, round, "D3cold")?;
        thread::sleep(dwell);
        fs::write(sysfs(bdf, "power/control"), "on")?;
        await_state(bdf, round, "D0")?;
        let now = identity()?;
        if now != device {
            return Err(io::Error::other(format!(
                "round {round}: the device is {now:#06x}, was {device:#06x}"
            )));
        }
    }
    Ok(())
}

fn await_state(bdf: &str, round: u64, wanted: &str) -> io::Result<()> {
    let begin = Instant::now();
    loop {
        let state = fs::read_to_string(sysfs(bdf, "power_state"))?;
        if state.trim() == wanted {
            return Ok(());
        }
        if begin.elapsed() > Duration::from_secs(30) {
            return Err(io::Error::other(format!("round {round}: in {} instead of {wanted}", state.trim())));
        }
        thread::sleep(Duration::from_millis(1));
    }
}

fn pmcsr(bdf: &str, state: Option<&str>) -> io::Result<()> {
    const POWER_MANAGEMENT: u8 = 1;
    let file = OpenOptions::new().read(true).write(true).open(sysfs(bdf, "config"))?;
    let mut at = word(&file, 0x34)? & 0xfc;
    for _ in 0..48 {
        let [id, next] = word(&file, at.into())?.to_le_bytes();
        if id == POWER_MANAGEMENT {
            let register = u64::from(at) + 4;
            if let Some(state) = state {
                let state = u16::try_from(number(state)? & 3).map_err(io::Error::other)?;
                let value = word(&file, register)? & !0x8003 | state;
                file.write_all_at(&value.to_le_bytes(), register)?;
            }
            println!("{}", word(&file, register)? & 3);
            return Ok(());
        }
        at = u16::from(next & 0xfc);
        if at == 0 {
            break;
        }
    }
    Err(io::Error::other("no power management capability"))
}

fn cam(bdf: &str, offset: &str) -> io::Result<()> {
    let bad = || io::Error::other(format!("{bdf} is no SEGMENT:BUS:DEVICE.FUNCTION"));
    let fields: Vec<u64> = bdf.split([':', '.']).map_while(|f| u64::from_str_radix(f, 16).ok()).collect();
    let &[_, bus, device, function] = fields.as_slice() else { return Err(bad()) };
    let address = 1 << 31 | bus << 16 | device << 11 | function << 8 | number(offset)? & 0xfc;
    let address = u32::try_from(address).map_err(|_| bad())?;
    // Not by /dev/port, which moves one byte at a time: the address register takes only whole double words.
    println!("{:#010x}", port_io::config_read(address)?);
    Ok(())
}

fn cpuid(leaf: &str) -> io::Result<()> {
    let leaf = u32::try_from(number(leaf)?).map_err(io::Error::other)?;
    let registers = std::arch::x86_64::__cpuid(leaf);
    let (eax, ebx, ecx, edx) = (registers.eax, registers.ebx, registers.ecx, registers.edx);
    println!("{eax:#010x} {ebx:#010x} {ecx:#010x} {edx:#010x}");
    Ok(())
}

fn load(kernel: &str, initramfs: &str, cmdline: &str) -> io::Result<()> {
    let (kernel, initramfs) = (File::open(kernel)?, File::open(initramfs)?);
    let cmdline = format!("{cmdline}\0");
    // SAFETY: two open files and a string with its length, terminator included, as kexec_file_load(2) wants them.
    let result = unsafe {
        libc::syscall(
            libc::SYS_kexec_file_load,
            kernel.as_raw_fd(),
            initramfs.as_raw_fd(),
            cmdline.len(),
            cmdline.as_ptr(),
            0_usize,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn start_loaded() -> io::Result<()> {
    // SAFETY: passes no pointers; returns only on failure.
    unsafe { libc::reboot(libc::LINUX_REBOOT_CMD_KEXEC) };
    Err(io::Error::last_os_error())
}

fn word(file: &File, offset: u64) -> io::Result<u16> {
    let mut bytes = [0; 2];
    file.read_exact_at(&mut bytes, offset)?;
    Ok(u16::from_le_bytes(bytes))
}

/// A shared, writable mapping of a file, unmapped when dropped.
struct Mapping {
    address: *mut u8,
    length: usize,
}

impl Mapping {
    fn new(file: &File, length: usize) -> io::Result<Self> {
        Self::at(file, length, 0)
    }

    fn at(file: &File, length: usize, offset: i64) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let address = unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(ptr::null_mut(), length, protection, libc::MAP_SHARED, file.as_raw_fd(), offset)
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { address: address.cast(), length })
    }

    fn length(&self) -> usize {
        self.length
    }

    fn read<T: Copy + Default>(&self, offset: usize) -> T {
        if !self.holds::<T>(offset) {
            return T::default();
        }
        // SAFETY: inside the mapping and aligned (`holds`); device memory is read as volatile.
        unsafe { self.address.add(offset).cast::<T>().read_volatile() }
    }

    fn write<T>(&self, offset: usize, value: T) {
        if self.holds::<T>(offset) {
            // SAFETY: inside the mapping and aligned (`holds`); device memory is written as volatile.
            unsafe { self.address.add(offset).cast::<T>().write_volatile(value) }
        }
    }

    fn holds<T>(&self, offset: usize) -> bool {
        let size = size_of::<T>();
        offset.is_multiple_of(size) && offset.checked_add(size).is_some_and(|end| end <= self.length)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `at`, which nobody else refers to.
        unsafe { libc::munmap(self.address.cast(), self.length) };
    }
}

/// Port I/O from user space.
mod port_io {
    use std::arch::asm;
    use std::io;

    /// Reads a double word of config space (PCI 3.0 section 3.2.2.3.2).
    pub fn config_read(address: u32) -> io::Result<u32> {
        // SAFETY: passes no pointers.
        if unsafe { libc::syscall(libc::SYS_iopl, 3) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let value: u32;
        // SAFETY: iopl has been granted; the two ports touch no memory of this program. The kernel uses the same
        // ports under a lock of its own, which is why nothing else may probe PCI meanwhile.
        unsafe {
            asm!("out dx, eax", in("dx") 0xcf8_u16, in("eax") address, options(nostack));
            asm!("in eax, dx", in("dx") 0xcfc_u16, out("eax") value, options(nostack));
        }
        Ok(value)
    }
}

/// The few calls of DRM mode setting (drm/drm_mode.h) that give the GPU something to do, which it has to answer.
mod drm {
    use std::os::fd::AsRawFd;
    use std::thread;
    use std::time::Duration;

    use super::{File, Mapping, OpenOptions, fs, io};

    const WIDTH: u32 = 64;
    const HEIGHT: u32 = 64;

    /// `struct drm_mode_create_dumb`.
    #[repr(C)]
    #[derive(Default)]
    struct CreateDumb {
        height: u32,
        width: u32,
        bpp: u32,
        flags: u32,
        handle: u32,
        pitch: u32,
        size: u64,
    }

    /// `struct drm_mode_map_dumb`.
    #[repr(C)]
    #[derive(Default)]
    struct MapDumb {
        handle: u32,
        pad: u32,
        offset: u64,
    }

    pub fn draw() -> io::Result<()> {
        let before = interrupts()?;
        frame()?;
        for _ in 0..200 {
            if interrupts()? > before {
                println!("drawn");
                return Ok(());
            }
            thread::sleep(Duration::from_millis(10));
        }
        Err(io::Error::other("the GPU has not answered within 2 s"))
    }

    /// Makes a buffer, fills it, and gives it back, which the driver tells the device.
    fn frame() -> io::Result<()> {
        let card = OpenOptions::new().read(true).write(true).open("/dev/dri/card0")?;
        let mut dumb = CreateDumb { height: HEIGHT, width: WIDTH, bpp: 32, ..CreateDumb::default() };
        call(&card, 0xb2, &mut dumb)?;
        let mut map = MapDumb { handle: dumb.handle, ..MapDumb::default() };
        call(&card, 0xb3, &mut map)?;
        let length = usize::try_from(dumb.size).map_err(io::Error::other)?;
        let pixels = Mapping::at(&card, length, i64::try_from(map.offset).map_err(io::Error::other)?)?;
        for offset in (0..length).step_by(4) {
            pixels.write::<u32>(offset, 0x00aa_5500);
        }
        Ok(())
    }

    /// Interrupts of virtio devices so far, of all vectors and processors.
    fn interrupts() -> io::Result<u64> {
        let table = fs::read_to_string("/proc/interrupts")?;
        let lines = table.lines().filter(|line| line.contains("virtio"));
        Ok(lines.flat_map(str::split_whitespace).skip(1).filter_map(|word| word.parse::<u64>().ok()).sum())
    }

    /// A read-and-write ioctl of DRM (type `d`) on a structure.
    fn call<T>(card: &File, number: u64, argument: &mut T) -> io::Result<()> {
        let size = u64::try_from(size_of::<T>()).map_err(io::Error::other)?;
        let request = 3 << 30 | size << 16 | 0x64 << 8 | number;
        // SAFETY: each caller passes the structure of its request; the request carries its size.
        let result = unsafe { libc::ioctl(card.as_raw_fd(), request, std::ptr::from_mut(argument)) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}
