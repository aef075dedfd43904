//! What Kata Containers does from the start of the VMM to the running VM, with its limits of time: a ping every 10 ms that must be
//! answered within a second, state strings that must be exact, and ten seconds for creating and booting.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::Outcome;
use crate::wire::Connection;

/// Between two pings.
const PAUSE: Duration = Duration::from_millis(10);
/// For each ping.
const PING: Duration = Duration::from_secs(1);
/// Until the first answer, and for creating and booting.
const START: Duration = Duration::from_secs(10);

pub fn run(socket: &str, config: &str, tap: Option<&str>) -> Outcome {
    let begin = Instant::now();
    while ping(socket).is_err() {
        if begin.elapsed() > START {
            return Err("the VMM does not answer".to_owned());
        }
        thread::sleep(PAUSE);
    }
    let first = begin.elapsed();
    let config = std::fs::read_to_string(config).map_err(|e| format!("{config}: {e}"))?;
    let stop = Arc::new(AtomicBool::new(false));
    let pinging = thread::spawn({
        let (socket, stop) = (socket.to_owned(), Arc::clone(&stop));
        move || {
            let (mut count, mut longest) = (0, Duration::ZERO);
            while !stop.load(Ordering::SeqCst) {
                let begin = Instant::now();
                ping(&socket)?;
                longest = longest.max(begin.elapsed());
                count += 1;
                thread::sleep(PAUSE);
            }
            Ok::<_, String>((count, longest))
        }
    });
    let begin = Instant::now();
    let booted = boot(socket, &config, tap);
    let took = begin.elapsed();
    stop.store(true, Ordering::SeqCst);
    let (count, longest) = pinging.join().map_err(|_| "the pinging thread panicked".to_owned())??;
    booted?;
    println!(
        "first answer after {} ms, created and booted in {} ms, {count} pings meanwhile, the longest {} ms",
        first.as_millis(),
        took.as_millis(),
        longest.as_millis()
    );
    if took > START || longest > PING || count == 0 {
        return Err("too slow for Kata".to_owned());
    }
    Ok(())
}

fn ping(socket: &str) -> Outcome {
    let mut connection = Connection::new(socket)?;
    connection.patience(PING)?;
    let answer = connection.call("GET", "vmm.ping", None)?;
    if answer.status == 200 { Ok(()) } else { Err(format!("ping: {answer:?}")) }
}

fn boot(socket: &str, config: &str, tap: Option<&str>) -> Outcome {
    let mut connection = Connection::new(socket)?;
    let mut put = |name: &str, body| match connection.call("PUT", name, body)? {
        answer if answer.status == 204 => Ok(()),
        answer => Err(format!("{name}: {answer:?}")),
    };
    put("vm.create", Some(config))?;
    expect_state(socket, "Created")?;
    if let Some(tap) = tap {
        // With the defaults of its generated client, whatever the descriptors say.
        let body = r#"{"ip":"192.168.249.1","mask":"255.255.255.0","mac":"02:00:ca:fe:00:04","host_mac":null,"mtu":null,
            "iommu":false,"num_queues":2,"queue_size":256,"vhost_user":false,"vhost_socket":null,"vhost_mode":"Client","id":null,
            "pci_segment":0,"rate_limiter_config":null}"#;
        crate::net::add(socket, tap, "1", body)?;
        let info = Connection::new(socket)?.call("GET", "vm.info", None)?.json();
        for field in ["ip", "mask", "mac"] {
            if !info["config"]["net"][0][field].is_string() {
                return Err(format!("vm.info has no {field} of the network device: {info}"));
            }
        }
    }
    put("vm.boot", None)?;
    expect_state(socket, "Running")
}

/// Reads `vm.info` as Kata's runtime does, which fails if one of these is not there.
fn expect_state(socket: &str, state: &str) -> Outcome {
    const NEEDED: [&str; 6] =
        ["/serial/mode", "/console/mode", "/cpus/boot_vcpus", "/cpus/max_vcpus", "/rng/src", "/payload"];
    let info = Connection::new(socket)?.call("GET", "vm.info", None)?.json();
    if info["state"] != state {
        return Err(format!("the state is {} and not {state}", info["state"]));
    }
    match NEEDED.iter().find(|field| info["config"].pointer(field).is_none_or(Value::is_null)) {
        Some(field) => Err(format!("vm.info has no config{field}: {info}")),
        None => Ok(()),
    }
}
