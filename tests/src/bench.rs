//! `cargo testbed bench`: the figures, each with its target, from the release build.
//!
//! Boot is measured on a host whose time is counted instructions, so it is the same on every machine; start and the API on the
//! native `/dev/kvm`; overhead and power on the ordinary emulated host, power against bare VFIO calls in the same run.

mod api;
mod devices;
mod disk;
mod login;
mod net;
mod power;
mod start;
mod stopwatch;
mod wake;

use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use crate::artifacts::{self, Artifacts, Profile};
use crate::error::{Error, Result, file_error};
use crate::guest::VmSpec;
use crate::host::Host;
use crate::image::guest_path;
use crate::scenarios::steps::bdf;
use crate::spec::{Device, HostSpec, Kernel};

/// Boots of which the middle one counts. Deterministic, so few are enough.
const BOOTS: usize = 3;
const MIB: f64 = 1024.0;
/// Hosts that may be lost for one part, ordinary ones and those that count their instructions.
const LOSSES: usize = 1;
const COUNTED_LOSSES: usize = 8;

/// One figure.
#[derive(Debug)]
struct Figure {
    name: &'static str,
    value: f64,
    unit: &'static str,
    /// It must not be more than this.
    target: Option<f64>,
    note: String,
}

impl fmt::Display for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<46} {:>9.3} {:<4}", self.name, self.value, self.unit)?;
        if let Some(target) = self.target {
            let verdict = if self.value <= target { "met" } else { "MISSED" };
            write!(f, " target {target:.3} {verdict}")?;
        }
        if self.note.is_empty() { Ok(()) } else { write!(f, "  ({})", self.note) }
    }
}

/// What measures some of the figures, and its name.
type Part = (&'static str, fn(&Artifacts) -> Result<Vec<Figure>>);

const PARTS: [Part; 11] = [
    ("size", size),
    ("start", start::measure),
    ("api", api::measure),
    ("overhead", |with| on_hosts(false, || overhead(with))),
    ("devices", |with| on_hosts(false, || devices::measure(with))),
    ("power", |with| on_hosts(false, || power::measure(with))),
    ("wake", |with| on_hosts(false, || wake::measure(with))),
    ("net", net::measure),
    ("boot", |with| on_hosts(true, || boot(with))),
    ("disk", disk::measure),
    ("login", login::measure),
];

/// Measures what is called `name`, or all of it; false when a target is missed.
pub fn run(name: Option<&str>, vmm: Option<PathBuf>) -> Result<bool> {
    let wanted = |part: &&Part| name.is_none_or(|name| part.0 == name);
    if PARTS.iter().filter(wanted).count() == 0 {
        let names = PARTS.map(|part| part.0).join(", ");
        return Err(Error::Check(format!(
            "there is no figure {:?}; there are {names}",
            name.unwrap_or_default()
        )));
    }
    let artifacts = artifacts::build(Profile::Release, vmm)?;
    println!("{}", artifacts::version(&artifacts)?);
    let mut good = true;
    for (_, measure) in PARTS.iter().filter(wanted) {
        match measure(&artifacts) {
            Ok(figures) => {
                for figure in figures {
                    good &= figure.target.is_none_or(|target| figure.value <= target);
                    println!("{figure}");
                }
            }
            Err(error) => {
                good = false;
                println!("not measured: {error}");
            }
        }
    }
    Ok(good)
}

fn size(artifacts: &Artifacts) -> Result<Vec<Figure>> {
    let path = &artifacts.dormouse;
    let bytes = fs::metadata(path).map_err(file_error("read", path))?.len();
    let value = u32::try_from(bytes).map_or(f64::MAX, f64::from) / 1e6;
    Ok(vec![Figure { name: "stripped binary", value, unit: "MB", target: Some(5.0), note: String::new() }])
}

/// Exec of the VMM to the guest's power-off, in virtual seconds.
fn boot(artifacts: &Artifacts) -> Result<Vec<Figure>> {
    let mut spec = HostSpec::new(&[]).memory_mib(1024);
    spec.cpus = 1;
    spec.deterministic = true;
    let guest = Kernel::Cloud6_12;
    let host = Host::boot(&spec, artifacts, &[guest])?;
    let command = format!(
        "dormouse --kernel {} --initramfs {} --cmdline 'console=ttyS0 quiet panic=-1 bed.mode=poweroff' \
         --cpus boot=1 --memory size=256M --serial tty --console off </dev/null >/dev/null 2>&1",
        guest_path(guest, "vmlinuz"),
        guest_path(guest, "initramfs")
    );
    let mut seconds = Vec::new();
    for _ in 0..BOOTS {
        // /proc/uptime counts hundredths, which is half a per cent here.
        let timed =
            format!("read a b </proc/uptime; {command} || exit 1; read c d </proc/uptime; echo $a $c");
        let output = host.run_for(&timed, Duration::from_secs(180))?;
        let times: Vec<f64> = output.text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        let &[before, after] = times.as_slice() else {
            return Err(Error::Check(format!("the boot for measuring failed: {}", output.text)));
        };
        seconds.push(after - before);
    }
    let note = format!("runs: {seconds:.2?}");
    let name = "boot to power-off, 1 vCPU, 256 MiB";
    Ok(vec![Figure { name, value: median(&mut seconds), unit: "s", target: Some(1.95), note }])
}

/// Private memory beside guest RAM, and wake-ups of the VMM's own threads.
fn overhead(artifacts: &Artifacts) -> Result<Vec<Figure>> {
    let guest_kernel = Kernel::Cloud6_12;
    let host = Host::boot(&HostSpec::devices(&[Device::Nvme]), artifacts, &[guest_kernel])?;
    let mut figures = Vec::new();
    for (name, device, target) in
        [("private memory, no device", false, 4.0), ("private memory, one device", true, 5.0)]
    {
        let mut vm = VmSpec::new(guest_kernel).memory("256M");
        if device {
            vm = vm.device(&host, &bdf(0));
        }
        let guest = host.start_vm(&vm)?;
        let value = private_memory(&host)? / MIB;
        figures.push(Figure { name, value, unit: "MiB", target: Some(target), note: String::new() });
        if !device {
            figures.push(wakeups(&host)?);
        }
        guest.power_off()?;
    }
    Ok(figures)
}

/// KiB of the VMM's private memory beside guest RAM, which is the only mapping of that size, and the files that are the guest's memory. Clean pages of
/// shared libraries are private only because nothing else on the emulated host uses them (its shell is linked statically).
fn private_memory(host: &Host) -> Result<f64> {
    let text = host.sh(
        "awk '/^[0-9a-f]+-/ {ram = /bench[.]pmem/; library = /[.]so/} /^Size:/ {ram = ram || $2 >= 131072} \
         /^Private/ {if (!ram && !(library && /Clean/)) s += $2} END {print s}' /proc/$(pidof dormouse)/smaps",
    )?;
    Ok(text.trim().parse::<f64>().unwrap_or(f64::MAX))
}

/// Times that a thread of the VMM other than a vCPU was scheduled in ten seconds of an idle guest.
fn wakeups(host: &Host) -> Result<Figure> {
    let count = "for t in /proc/$(pidof dormouse)/task/*; do read n <$t/comm; case $n in *vcpu*) ;; \
                 *) sed -n 's/^voluntary_ctxt_switches:[^0-9]*//p' $t/status ;; esac; done | awk '{s += $1} END {print s + 0}'";
    let output = host.run_for(
        &format!("a=$({count}); sleep 10; b=$({count}); echo $((b - a))"),
        Duration::from_secs(60),
    )?;
    let value = output.text.trim().parse().unwrap_or(f64::MAX);
    let name = "wake-ups of the VMM in 10 s, guest idle";
    Ok(Figure { name, value, unit: "", target: Some(0.0), note: String::new() })
}

/// Measures on one host after the other, as long as one is lost: the emulator now and then locks one up, those that count their instructions far more often
/// than others (docs/testing.md). A `measure` that keeps what it has measured goes on with the rest on the next host.
fn on_hosts<T>(counted: bool, mut measure: impl FnMut() -> Result<T>) -> Result<T> {
    let mut left = if counted { COUNTED_LOSSES } else { LOSSES };
    loop {
        match measure() {
            Err(error) if left > 0 => {
                println!("AGAIN: {error}");
                left -= 1;
            }
            end => return end,
        }
    }
}

/// What came of the round that took least: what else the host has to do comes on top of it, now more and now less. `value` makes a figure of the seconds
/// that a round took.
fn least(name: &'static str, rounds: &[f64], value: &dyn Fn(f64) -> f64, unit: &'static str) -> Figure {
    let mut rounds = rounds.to_vec();
    let middle = median(&mut rounds);
    let [least, most] = [rounds.first(), rounds.last()].map(|took| took.copied().unwrap_or(f64::MAX));
    let note = format!("middle {:.3}, worst {:.3}, of {}", value(middle), value(most), rounds.len());
    Figure { name, value: value(least), unit, target: None, note }
}

/// The middle one. The slice must not be empty.
fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::MAX)
}
