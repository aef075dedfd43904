//! Start on the native `/dev/kvm`: exec of the VMM to the first byte its guest writes to the serial port.

use std::fs;
use std::io::Read;
use std::process::{Command, Stdio};
use std::time::Instant;

use super::{Figure, median};
use crate::artifacts::Artifacts;
use crate::error::{Error, Result, file_error};
use crate::paths;
use crate::payload::elf;

/// Starts; the middle one counts.
const RUNS: usize = 51;

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
