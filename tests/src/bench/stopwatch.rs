//! What a piece of work takes on an emulated host, by the host's own clock.
//!
//! Where that clock is counted instructions (`-icount`), a host that sleeps skips the time until it wakes. So the sleep of its one processor, which
//! `/proc/timer_list` has in nanoseconds as it has the time, is taken off: what stays is what VMM, host and guest have executed.

use std::time::Duration;

use crate::error::{Error, Result};
use crate::guest::{Guest, VmSpec};
use crate::host::Host;

/// The addresses of a network of a guest and its host.
pub const HOST: &str = "10.7.0.1";
pub const GUEST: &str = "10.7.0.2";

/// Where the guest waits for the word to begin.
const PORT: u16 = 99;

/// The longest that it takes a guest to come to rest.
const REST: Duration = Duration::from_secs(60);

/// Measures on one host.
pub struct Stopwatch<'a> {
    host: &'a Host,
    patience: Duration,
}

impl<'a> Stopwatch<'a> {
    /// For pieces of work that take no longer than `patience`.
    pub fn new(host: &'a Host, patience: Duration) -> Result<Self> {
        if host.spec.deterministic {
            // A processor that spins for a while before it sleeps executes more or less by chance.
            host.sh("echo 0 >/sys/module/kvm/parameters/halt_poll_ns")?;
        }
        Ok(Self { host, patience })
    }

    /// What stands for the present, in nanoseconds, in a shell line of this host.
    pub fn now(&self) -> &'static str {
        if self.host.spec.deterministic {
            "$(awk '/^now at/ {n += $3} /[.](idle|iowait)_sleeptime/ {n -= $(NF - 1)} END {printf \"%.0f\", n}' /proc/timer_list)"
        } else {
            "$(awk '/^now at/ {print $3; exit}' /proc/timer_list)"
        }
    }

    /// Seconds that a shell line of the host takes; of counted ones 10^-9 is an instruction.
    pub fn host(&self, line: &str) -> Result<f64> {
        let now = self.now();
        self.seconds(line, &format!("a={now}; {line} || exit 1; b={now}; echo $((b - a))"))
    }

    /// The same for a shell line of a guest that [`join`] has given a network. The line says `ready`, and begins when it reads a line: the host gives it
    /// the word, and hears of its end, over a connection that is there before.
    pub fn guest(&self, guest: &Guest<'_>, line: &str) -> Result<f64> {
        guest
            .sh(&format!("echo 'if {line} 2>/tmp/said; then echo done; else echo failed; fi' >/tmp/work"))?;
        let work = guest.begin(&format!("nc -l -p {PORT} -e sh /tmp/work"))?;
        let now = self.now();
        let took = self.seconds(
            line,
            &format!(
                "[ -p /run/go ] || mkfifo /run/go; \
                 until nc {GUEST} {PORT} 2>/dev/null </run/go | {{ exec 3>/run/go; read -r ready || exit 1; a={now}; echo go >&3; \
                 read -r end; b={now}; [ \"$end\" = done ] && echo $((b - a)) || echo failed; }}; do usleep 10000; done"
            ),
        );
        let took = took.map_err(|error| match guest.sh("cat /tmp/said") {
            Ok(said) if !said.is_empty() => Error::Check(format!("{error}: {said}")),
            _ => error,
        })?;
        guest.finish(&work, self.patience)?;
        Ok(took)
    }

    fn seconds(&self, what: &str, timed: &str) -> Result<f64> {
        let output = self.host.run_for(timed, self.patience)?;
        // What the line itself says comes before.
        match output.text.lines().next_back().unwrap_or_default().trim().parse::<f64>() {
            Ok(nanos) if nanos > 0.0 => Ok(nanos / 1e9),
            _ => Err(Error::Check(format!("measuring `{what}`: {}", output.text))),
        }
    }
}

/// A VM with a network that [`join`] sets up, and the modules that its guest needs for it.
pub fn networked(host: &Host, vm: VmSpec) -> Result<VmSpec> {
    host.sh("modprobe tun")?;
    let mut vm = vm.options(&format!("--net tap=tap0,ip={HOST},mask=255.255.255.0"));
    vm.modules.extend(["virtio_pci", "virtio_net"]);
    Ok(vm)
}

/// Gives the guest of such a VM its address, and lets it come to rest: it tests its ciphers for seconds after it has booted, say, and whatever is measured
/// meanwhile takes twice as much.
pub fn join(guest: &Guest<'_>) -> Result<()> {
    guest.sh(&format!("ip link set eth0 up; ip addr add {GUEST}/24 dev eth0; ping -c 1 -W 20 {HOST}"))?;
    guest
        .sh_for(
            "until a=$(cut -d' ' -f2 /proc/uptime); sleep 1; b=$(cut -d' ' -f2 /proc/uptime); \
             awk \"BEGIN {exit !($b - $a > 0.7)}\"; do :; done",
            REST,
        )
        .map(drop)
}
