//! What must hold after a fault, whatever it was: the host has its device back and nothing hangs, and the next VM starts as quickly as
//! one did before.

use std::time::{Duration, Instant};

use super::steps::{UIO, VFIO, give};
use crate::error::{Error, Result, ensure};
use crate::guest::{Guest, VmSpec, log_time};
use crate::host::Host;
use crate::rpc::wait_for;
use crate::spec::Device;
use crate::timeline::Lane;

/// Starts of which the quickest counts, before the fault.
const STARTS: usize = 3;
/// Starts after it, until one is quick enough.
const STARTS_AFTER: usize = 8;
/// How much longer the next VM may take to start than before.
const LIMIT: f64 = 1.2;
/// Work of which it is known that it is always the same: how long it takes tells how quick the emulated host is just now.
const YARDSTICK: &str = "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done";
/// How long the kernel may take to let go of what a VM had.
const SETTLE: Duration = Duration::from_secs(10);
/// Driver of virtio devices, which is built into the host's kernel.
const VIRTIO: &str = "virtio-pci";

/// How long a start takes: in seconds, and by the yardstick. The machine that emulates the host may be busier than before, with work
/// that the yardstick feels more than the start does or less; what has really become slower is so by both.
#[derive(Clone, Copy, Debug)]
struct Start {
    seconds: f64,
    yardsticks: f64,
}

impl Start {
    const NEVER: Self = Self { seconds: f64::MAX, yardsticks: f64::MAX };

    /// The shorter of each.
    fn min(self, other: Self) -> Self {
        Self { seconds: self.seconds.min(other.seconds), yardsticks: self.yardsticks.min(other.yardsticks) }
    }

    /// Whether it is as quick as `usual`, within the limit.
    fn is_like(self, usual: Self) -> bool {
        self.seconds <= usual.seconds * LIMIT || self.yardsticks <= usual.yardsticks * LIMIT
    }
}

/// How quickly a VM starts on a host that is well.
#[derive(Debug)]
pub struct Baseline {
    vm: VmSpec,
    usual: Start,
}

impl Baseline {
    /// Starts `vm` a few times.
    pub fn of(host: &Host, vm: VmSpec) -> Result<Self> {
        let mut usual = Start::NEVER;
        for _ in 0..STARTS {
            usual = usual.min(start_time(host, &vm)?);
        }
        Ok(Self { vm, usual })
    }

    /// After the fault, with no VM there: nothing on the host hangs or is held, the function `bdf` can be given to another driver and
    /// back, and the VM starts as before.
    pub fn holds_again(&self, host: &Host, bdf: &str) -> Result<()> {
        nothing_is_left(host)?;
        let own = if host.spec.device_at(bdf) == Some(Device::Gpu) { VIRTIO } else { UIO };
        for driver in [own, VFIO] {
            give(host, bdf, driver)?;
            let id = host.poke(bdf)?;
            ensure(id.len() == 8 && id != "ffffffff", || format!("{bdf} on {driver} answers {id}"))?;
        }
        let mut best = Start::NEVER;
        for _ in 0..STARTS_AFTER {
            best = best.min(start_time(host, &self.vm)?);
            if best.is_like(self.usual) {
                break;
            }
        }
        let both = format!("{best:.2?} to start, before the fault {:.2?}", self.usual);
        host.timeline.record(Lane::Host, format!("[a VM takes {both}]"));
        ensure(best.is_like(self.usual), || format!("the next VM takes {both}"))
    }
}

/// From the VMM's exec until its guest runs. The VM is ended then.
fn start_time(host: &Host, vm: &VmSpec) -> Result<Start> {
    let before = yardstick(host)?;
    let since = host.timeline.now();
    let guest = Guest::launch(host, vm)?;
    let line = wait_for("the guest runs", Duration::from_secs(60), || {
        let lines = host.timeline.lane(Lane::Vmm, since);
        let line = lines.into_iter().find(|entry| entry.text.contains("the guest runs"));
        Ok(line.map(|entry| entry.text).ok_or_else(|| "not yet".to_owned()))
    })?;
    guest.signal("TERM")?;
    guest.wait_exit()?;
    let took = log_time(&line).ok_or_else(|| Error::Check(format!("no time in {line:?}")))?;
    let after = yardstick(host)?;
    let seconds = took.as_secs_f64();
    Ok(Start { seconds, yardsticks: seconds / ((before + after).as_secs_f64() / 2.0) })
}

fn yardstick(host: &Host) -> Result<Duration> {
    let begin = Instant::now();
    host.probe(YARDSTICK)?;
    Ok(begin.elapsed())
}

/// No VMM, no open file of VFIO, and no task that waits for something that does not come.
fn nothing_is_left(host: &Host) -> Result<()> {
    wait_for("nothing of the VM is left", SETTLE, || {
        let left = host.probe(
            "pidof dormouse; ls -l /proc/[0-9]*/fd 2>/dev/null | grep vfio; \
             grep -l '^State:.D' /proc/[0-9]*/task/*/status 2>/dev/null",
        )?;
        Ok(if left.text.trim().is_empty() { Ok(()) } else { Err(left.text) })
    })
}

/// KiB by which private memory may differ: the allocator's own slack.
const SLACK_KIB: i64 = 512;

/// What a leak of the running VMM would show in.
#[derive(Debug, PartialEq, Eq)]
pub struct Footprint {
    descriptors: i64,
    threads: i64,
    mappings: i64,
    private_kib: i64,
}

impl Footprint {
    /// Of the VMM that runs.
    pub fn of(host: &Host) -> Result<Self> {
        // Anonymous memory beside guest RAM: the heap and stacks.
        let text = host.sh(
            "p=/proc/$(pidof dormouse); ls $p/fd | wc -l; ls $p/task | wc -l; wc -l <$p/maps; \
             awk '/^[0-9a-f]+-/ {ram = 0} /^Size:/ {ram = $2 > 262144} /^Private/ {if (!ram) s += $2} END {print s}' $p/smaps",
        )?;
        let numbers: Vec<i64> = text.lines().filter_map(|line| line.trim().parse().ok()).collect();
        let &[descriptors, threads, mappings, private_kib] = numbers.as_slice() else {
            return Err(Error::Check(format!("cannot read the VMM's footprint: {text}")));
        };
        Ok(Self { descriptors, threads, mappings, private_kib })
    }

    /// Checks that it has not grown, taken again in the same state of the guest.
    pub fn is_kept(&self, host: &Host) -> Result<()> {
        let after = Self::of(host)?;
        let fits = after.descriptors <= self.descriptors
            && after.threads <= self.threads
            && after.mappings <= self.mappings + 2
            && after.private_kib <= self.private_kib + SLACK_KIB;
        ensure(fits, || format!("the VMM has grown: before {self:?}, after {after:?}"))
    }
}
