//! Start on the native `/dev/kvm`: exec of the VMM to the first byte its guest writes to the serial port.

use std::fs;
use std::io::Read;
use std::process::{Command, Stdio};
use std::time::Instant;

use super::{Figure, median};
use crate::artifacts::Artifacts;
use crate::error::{Error, Result, file_error};
use crate::paths;

/// Starts; the middle one counts.
const RUNS: usize = 51;
/// Where the guest's code is loaded and entered.
const ENTRY: u32 = 0x10_0000;
/// 32-bit code: `mov dx, 0x3f8; mov al, '!'; out dx, al; hlt; jmp` back to the `hlt`.
const CODE: [u8; 10] = [0x66, 0xba, 0xf8, 0x03, 0xb0, b'!', 0xee, 0xf4, 0xeb, 0xfd];

/// The start-up time in milliseconds.
pub fn measure(artifacts: &Artifacts) -> Result<Vec<Figure>> {
    if !std::path::Path::new("/dev/kvm").exists() {
        let how = "run on a machine with KVM (modprobe kvm-intel or kvm-amd)".to_owned();
        return Err(Error::Missing { what: "/dev/kvm, for the start-up time".to_owned(), how });
    }
    let dir = paths::run_dir()?;
    let kernel = dir.join("byte.elf");
    fs::write(&kernel, elf()).map_err(file_error("write", &kernel))?;
    let mut times = (0..RUNS).map(|_| once(artifacts, &kernel)).collect::<Result<Vec<f64>>>()?;
    let _ = fs::remove_dir_all(&dir);
    let value = median(&mut times);
    let note = format!("best {:.2}, worst {:.2}", times[0], times[times.len() - 1]);
    Ok(vec![Figure { name: "start to the guest's first byte", value, unit: "ms", target: Some(4.0), note }])
}

fn once(artifacts: &Artifacts, kernel: &std::path::Path) -> Result<f64> {
    let mut command = Command::new(&artifacts.dormouse);
    command.arg("--kernel").arg(kernel).args(["--cpus", "boot=1", "--memory", "size=256M"]);
    command.args(["--serial", "tty", "--console", "off"]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let begin = Instant::now();
    let mut child = command.spawn().map_err(file_error("start", &artifacts.dormouse))?;
    let mut byte = [0];
    let read = child.stdout.as_mut().map_or(Ok(0), |out| out.read(&mut byte));
    let took = begin.elapsed();
    let _ = child.kill();
    let _ = child.wait();
    if matches!(read, Ok(1)) && byte == *b"!" {
        return Ok(took.as_secs_f64() * 1000.0);
    }
    let mut why = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        let _ = stderr.read_to_string(&mut why);
    }
    Err(Error::Check(format!("the VMM gave no byte: {}", why.trim())))
}

/// A 64-bit ELF of one segment and one note, the PVH entry (`XEN_ELFNOTE_PHYS32_ENTRY`).
fn elf() -> Vec<u8> {
    const HEADERS: u64 = 64 + 2 * 56;
    const NOTE: u64 = 20;
    let code = HEADERS + NOTE;
    let length = CODE.len() as u64;
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let mut put = |bytes: &[u8]| elf.extend_from_slice(bytes);
    for half in [2_u16, 62] {
        put(&half.to_le_bytes()); // ET_EXEC, EM_X86_64
    }
    put(&1_u32.to_le_bytes());
    for word in [u64::from(ENTRY), 64, 0] {
        put(&word.to_le_bytes()); // entry, program headers, section headers
    }
    put(&0_u32.to_le_bytes());
    for half in [64_u16, 56, 2, 0, 0, 0] {
        put(&half.to_le_bytes());
    }
    let entry = u64::from(ENTRY);
    for (kind, flags, fields) in
        [(1_u32, 5_u32, [code, entry, entry, length, length, 1]), (4, 4, [HEADERS, 0, 0, NOTE, NOTE, 4])]
    {
        put(&kind.to_le_bytes());
        put(&flags.to_le_bytes());
        for field in fields {
            put(&field.to_le_bytes());
        }
    }
    for word in [4_u32, 4, 18] {
        put(&word.to_le_bytes()); // lengths of name and value, type
    }
    put(b"Xen\0");
    put(&ENTRY.to_le_bytes());
    put(&CODE);
    elf
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_payload_holds_its_code_where_the_segment_says() {
        let elf = elf();
        assert_eq!(elf.len(), 64 + 2 * 56 + 20 + CODE.len());
        let offset = usize::try_from(u64::from_le_bytes(elf[72..80].try_into().unwrap())).unwrap();
        assert_eq!(elf[offset..], CODE);
    }
}
