//! Much reading: calls that must cost a sleeping device nothing.

use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use crate::Outcome;
use crate::wire::Connection;

/// What reads.
const READS: [&str; 5] = ["vm.info", "vm.counters", "vm.power", "vmm.ping", "/metrics"];

/// So many calls, each kind in turn on each socket; prints how many and how long.
pub fn run(count: &str, sockets: &[&str]) -> Outcome {
    let count: usize = count.parse().map_err(|e| format!("{count}: {e}"))?;
    let mut connections =
        sockets.iter().map(|socket| Connection::new(socket)).collect::<Result<Vec<_>, _>>()?;
    let begin = Instant::now();
    let mut done = 0;
    'all: loop {
        for connection in &mut connections {
            for name in READS {
                if done == count {
                    break 'all;
                }
                let answer = connection.call("GET", name, None)?;
                if answer.status != 200 || answer.body.is_empty() {
                    return Err(format!("{name}: {answer:?}"));
                }
                done += 1;
            }
        }
    }
    println!("{done} calls in {} ms", begin.elapsed().as_millis());
    Ok(())
}

/// Once a second for so long: `dormouse top --once`, the metrics, and `dormouse doctor` for the device. Prints how often, and how much processor time the
/// threads of the VMM took between the readings: from shortly after one to shortly before the next.
pub fn watch(seconds: &str, socket: &str, pid: &str, bdf: &str) -> Outcome {
    let seconds: u64 = seconds.parse().map_err(|e| format!("{seconds}: {e}"))?;
    let mut connection = Connection::new(socket)?;
    let begin = Instant::now();
    let (mut readings, mut between) = (0_u64, 0_u64);
    while begin.elapsed() < Duration::from_secs(seconds) {
        let turn = Instant::now();
        // The first, so that the thread that has served it is gone when time is taken.
        let top = Command::new("dormouse").args(["top", "--once"]).output().map_err(|e| e.to_string())?;
        let shown = String::from_utf8_lossy(&top.stdout).into_owned();
        if !top.status.success() || !shown.contains(bdf) {
            return Err(format!("top: {shown}{}", String::from_utf8_lossy(&top.stderr)));
        }
        let answer = connection.call("GET", "/metrics", None)?;
        if answer.status != 200 || !answer.body.ends_with("# EOF\n") {
            return Err(format!("/metrics: {answer:?}"));
        }
        let doctor = Command::new("dormouse").args(["doctor", bdf]).output().map_err(|e| e.to_string())?;
        if doctor.status.code() == Some(1) {
            return Err(format!("doctor: {}", String::from_utf8_lossy(&doctor.stderr)));
        }
        readings += 1;
        let before = processor_time(pid)?;
        thread::sleep(Duration::from_secs(1).saturating_sub(turn.elapsed()));
        between += processor_time(pid)?.saturating_sub(before);
    }
    println!("{readings} readings, {between} ns of processor time between them");
    Ok(())
}

/// Nanoseconds that the threads of the process but the vCPUs have run (Linux `Documentation/scheduler/sched-stats.rst`): the guest has a life of its own.
fn processor_time(pid: &str) -> Result<u64, String> {
    let tasks =
        std::fs::read_dir(format!("/proc/{pid}/task")).map_err(|e| format!("/proc/{pid}/task: {e}"))?;
    let mut sum = 0;
    for task in tasks.flatten() {
        let read = |file| std::fs::read_to_string(task.path().join(file)).unwrap_or_default();
        if !read("comm").starts_with("vcpu") {
            sum += read("schedstat").split(' ').next().and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
        }
    }
    Ok(sum)
}
