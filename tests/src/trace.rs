//! The host kernel's own trace (tracefs, Documentation/trace/events.rst): what happened when, on one clock for kernel, VMM and guest.

use crate::error::Result;
use crate::host::Host;

const TRACING: &str = "/sys/kernel/tracing";

/// Has the host's kernel note `events`, each with a filter or `0` for all of it, in place of whatever it noted before.
pub fn start(host: &Host, events: &[(&str, &str)]) -> Result<()> {
    let mut script = format!(
        "[ -e {TRACING}/trace ] || mount -t tracefs trace {TRACING}; cd {TRACING} && echo 0 >tracing_on \
         && echo 0 >events/enable && echo mono >trace_clock && echo >trace"
    );
    for (event, filter) in events {
        script.push_str(&format!(
            " && echo '{filter}' >events/{event}/filter && echo 1 >events/{event}/enable"
        ));
    }
    host.sh(&format!("{script} && echo 1 >tracing_on")).map(drop)
}

/// Ends that; what was noted, one line an event.
pub fn stop(host: &Host) -> Result<String> {
    host.sh(&format!("cd {TRACING}; echo 0 >tracing_on; grep -v '^#' trace; echo 0 >events/enable"))
}

/// When the event of a line happened, in seconds.
pub fn time(line: &str) -> Option<f64> {
    line.split_whitespace().find_map(|word| word.strip_suffix(':')?.parse().ok())
}
