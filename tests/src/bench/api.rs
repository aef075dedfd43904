//! The REST API on the native `/dev/kvm`: exec of the VMM to the first answer on its socket, and how fast the answers come after that.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::{Figure, median};
use crate::artifacts::Artifacts;
use crate::error::{Error, Result, file_error};
use crate::paths;

/// Starts; the middle one counts.
const RUNS: usize = 51;
/// Calls on one connection.
const CALLS: usize = 20_000;
/// The longest a start may take.
const PATIENCE: Duration = Duration::from_secs(5);
const PING: &[u8] = b"GET /api/v1/vmm.ping HTTP/1.1\r\nHost: localhost\r\n\r\n";
const SHUTDOWN: &[u8] = b"PUT /api/v1/vmm.shutdown HTTP/1.1\r\nHost: localhost\r\n\r\n";

/// Start to the first answer in milliseconds, and the ping's latency in microseconds.
pub fn measure(artifacts: &Artifacts) -> Result<Vec<Figure>> {
    let dir = paths::run_dir()?;
    let socket = dir.join("api");
    let mut times = Vec::new();
    let mut calls = Vec::new();
    for run in 0..RUNS {
        let begin = Instant::now();
        let mut vmm = start(artifacts, &socket)?;
        let outcome = first_answer(&socket, begin).and_then(|mut stream| {
            times.push(begin.elapsed().as_secs_f64() * 1e3);
            if run == 0 {
                for _ in 0..CALLS {
                    let begin = Instant::now();
                    ask(&mut stream, PING)?;
                    calls.push(begin.elapsed().as_secs_f64() * 1e6);
                }
            }
            ask(&mut stream, SHUTDOWN)
        });
        if outcome.is_err() {
            let _ = vmm.kill();
        }
        let status = vmm.wait().map_err(file_error("wait for", &artifacts.dormouse))?;
        outcome?;
        if !status.success() {
            return Err(Error::Check(format!("the VMM ended with {status} after vmm.shutdown")));
        }
    }
    let _ = std::fs::remove_dir_all(&dir);
    let whole: f64 = calls.iter().sum();
    let value = median(&mut times);
    let note = format!("best {:.2}, worst {:.2}", times[0], times[times.len() - 1]);
    let first =
        Figure { name: "start to the API's first answer", value, unit: "ms", target: Some(3.0), note };
    let value = median(&mut calls);
    let (late, worst) = (calls[calls.len() * 99 / 100], calls[calls.len() - 1]);
    #[expect(clippy::cast_precision_loss, reason = "a few thousand are exact")]
    let rate = calls.len() as f64 / whole * 1e6;
    let note =
        format!("99 of 100 below {late:.0}, worst {worst:.0}; {rate:.0} requests a second on one connection");
    Ok(vec![first, Figure { name: "vmm.ping", value, unit: "us", target: None, note }])
}

fn start(artifacts: &Artifacts, socket: &Path) -> Result<Child> {
    let mut command = Command::new(&artifacts.dormouse);
    command.arg("--api-socket").arg(socket);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().map_err(file_error("start", &artifacts.dormouse))
}

/// Asks as soon as there is somebody to ask.
fn first_answer(socket: &Path, begin: Instant) -> Result<UnixStream> {
    let mut stream = loop {
        match UnixStream::connect(socket) {
            Ok(stream) => break stream,
            Err(_) if begin.elapsed() < PATIENCE => thread::sleep(Duration::from_micros(20)),
            Err(source) => return Err(file_error("connect to", socket)(source)),
        }
    };
    stream.set_read_timeout(Some(PATIENCE)).map_err(file_error("use", socket))?;
    ask(&mut stream, PING)?;
    Ok(stream)
}

/// One request and its answer, which comes in one piece.
fn ask(stream: &mut UnixStream, request: &[u8]) -> Result<()> {
    let mut answer = [0; 1024];
    let count = stream.write_all(request).and_then(|()| stream.read(&mut answer));
    match count {
        Ok(count) if answer[..count].starts_with(b"HTTP/1.1 200 \r\n") => Ok(()),
        Ok(count) => {
            Err(Error::Check(format!("the API answers {:?}", String::from_utf8_lossy(&answer[..count]))))
        }
        Err(e) => Err(Error::Check(format!("the API does not answer: {e}"))),
    }
}
