//! A client of the VMM's REST API, for the emulated host: single calls, and the sequences of calls that real clients make.
//!
//! - `api_client call SOCKET METHOD NAME [BODY]`: one call; prints the status and the body. NAME is a path if it begins with a slash.
//! - `api_client sdk SOCKET STEP...`: the crate `cloud-hypervisor-client`; see [`sdk`].
//! - `api_client kata SOCKET CONFIG`: creates and boots as Kata Containers does; see [`kata`]. With TAP behind it, adds a network device in between.
//! - `api_client net SOCKET TAP PAIRS BODY`: hands a tap over with `vm.add-net`; see [`net`].
//! - `api_client load COUNT SOCKET...`: COUNT calls that read, in turn on each socket; see [`load`].
//! - `api_client watch SECONDS SOCKET PID BDF`: reads `top`, metrics and doctor every second; see [`load`].
//! - `api_client orders SOCKET KERNEL`: every call in every state; see [`orders`].
//! - `api_client abuse SOCKET PID`: what is no proper use of the API; see [`abuse`].
//! - `api_client payload FILE`: writes the smallest guest.
//! - `api_client listen PATH PROGRAM ARGUMENT...`: runs PROGRAM with a socket that listens on PATH as its descriptor 7.

mod abuse;
mod kata;
mod load;
mod net;
mod orders;
#[path = "../../payload.rs"]
mod payload;
mod sdk;
mod wire;

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

/// What a part ends with: a line about what went wrong.
type Outcome = Result<(), String>;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["call", socket, method, name] => call(socket, method, name, None),
        ["call", socket, method, name, body] => call(socket, method, name, Some(body)),
        ["sdk", socket, steps @ ..] if !steps.is_empty() => sdk::run(socket, steps),
        ["kata", socket, config] => kata::run(socket, config, None),
        ["kata", socket, config, tap] => kata::run(socket, config, Some(tap)),
        ["net", socket, tap, pairs, body] => net::add(socket, tap, pairs, body),
        ["load", count, sockets @ ..] if !sockets.is_empty() => load::run(count, sockets),
        ["watch", seconds, socket, pid, bdf] => load::watch(seconds, socket, pid, bdf),
        ["orders", socket, kernel] => orders::run(socket, kernel),
        ["abuse", socket, pid] => abuse::run(socket, pid),
        ["payload", file] => std::fs::write(file, payload::elf()).map_err(|e| e.to_string()),
        ["listen", path, program, arguments @ ..] => Err(listen(path, program, arguments).to_string()),
        _ => Err("usage: api_client call|sdk|kata|net|load|watch|orders|abuse|payload|listen ...".to_owned()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("api_client: {}: {error}", words.join(" "));
            ExitCode::FAILURE
        }
    }
}

fn call(socket: &str, method: &str, name: &str, body: Option<&str>) -> Outcome {
    let answer = wire::Connection::new(socket)?.call(method, name, body)?;
    println!("{} {}", answer.status, answer.body);
    Ok(())
}

/// Becomes `program`; returns only if that fails.
fn listen(path: &str, program: &str, arguments: &[&str]) -> io::Error {
    const DESCRIPTOR: i32 = 7;
    let _ = std::fs::remove_file(path);
    let given =
        UnixListener::bind(path).and_then(|socket| Ok(rustix::io::fcntl_dupfd_cloexec(&socket, DESCRIPTOR)?));
    let given = match given {
        Ok(given) => given,
        Err(e) => return e,
    };
    // Only what is not closed on exec is there for the program.
    if let Err(e) = rustix::io::fcntl_setfd(given.as_fd(), rustix::io::FdFlags::empty()) {
        return e.into();
    }
    Command::new(program).args(arguments).exec()
}
