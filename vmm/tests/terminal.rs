//! The built program at a terminal and without one: what it leaves behind, what it prints, and its exit status.

#![allow(clippy::unwrap_used, reason = "a test may panic, and its helpers too")]

// The peer of the unit tests, which has more than is needed here.
#[allow(dead_code, missing_docs, missing_debug_implementations)]
#[path = "../src/client/peer.rs"]
mod peer;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use peer::{Answer, Peer, Scratch, reply};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Termios, Winsize, tcgetattr, tcsetwinsize};

const LONG: Duration = Duration::from_secs(20);
const ENTER_SCREEN: &str = "\x1b[?1049h";
const LEAVE_SCREEN: &str = "\x1b[?1049l";

const PING: &str = r#"{"build_version":"v0.1.0","version":"54.0.0","pid":77,"features":["kvm"]}"#;
const INFO: &str = r#"{"config":{"payload":{"kernel":"/boot/vmlinuz"}},"state":"Running"}"#;
const POWER: &str = r#"{"state":"Running","devices":[{"id":"gpu0","guest_bdf":"0000:01:00.0","bdf":"0000:01:00.0",
    "offered":true,"state":"off","state_ms":1500,"time_in_ms":{"on":1000,"off":3000},"host":{"power_state":"D3cold"}}]}"#;

fn vmm(socket: &Path) -> Peer {
    Peer::serve(socket, |line, _| {
        Answer::Bytes(match line {
            "GET /api/v1/vmm.ping" => reply(200, PING),
            "GET /api/v1/vm.info" => reply(200, INFO),
            "GET /api/v1/vm.power" => reply(200, POWER),
            "PUT /api/v1/vm.pause" => reply(204, ""),
            _ => reply(500, r#"["Error from API","The VM could not boot","VM config is missing"]"#),
        })
    })
}

fn dormouse(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dormouse"));
    command.args(words).env_remove("NO_COLOR").env("TERM", "xterm-256color");
    command
}

fn output(words: &[&str]) -> (i32, String, String) {
    let Output { status, stdout, stderr } = dormouse(words).stdin(Stdio::null()).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code().unwrap(), text(stdout), text(stderr))
}

/// A terminal of 80 columns and 12 lines with the program at it.
struct Terminal {
    program: Child,
    keys: File,
    /// The terminal's own end, which keeps it open and tells its mode.
    line: OwnedFd,
    before: Termios,
    shown: Receiver<Vec<u8>>,
    so_far: String,
}

impl Terminal {
    fn start(words: &[&str]) -> Self {
        let keys = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&keys).unwrap();
        unlockpt(&keys).unwrap();
        tcsetwinsize(&keys, Winsize { ws_row: 12, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
        let name = ptsname(&keys, Vec::new()).unwrap().into_string().unwrap();
        let line = File::options().read(true).write(true).open(name).unwrap();
        let before = tcgetattr(&line).unwrap();
        let end = || Stdio::from(line.try_clone().unwrap());
        let program = dormouse(words).stdin(end()).stdout(end()).stderr(end()).spawn().unwrap();
        let keys = File::from(keys);
        let mut screen = keys.try_clone().unwrap();
        let (sender, shown) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = screen.read(&mut buffer) {
                let _ = sender.send(buffer[..count].to_vec());
            }
        });
        Self { program, keys, line: line.into(), before, shown, so_far: String::new() }
    }

    /// Waits until `text` has been written to the terminal.
    fn wait_for(&mut self, text: &str) {
        let end = Instant::now() + LONG;
        while !self.so_far.contains(text) {
            let left = end.saturating_duration_since(Instant::now());
            let bytes = self.shown.recv_timeout(left);
            let bytes = bytes.unwrap_or_else(|_| panic!("no {text:?} in {:?}", self.so_far));
            self.so_far.push_str(&String::from_utf8_lossy(&bytes));
        }
    }

    /// Checks that the program ends well and leaves the terminal as it was.
    fn check_given_back(mut self) {
        self.wait_for(LEAVE_SCREEN);
        let end = Instant::now() + LONG;
        let status = loop {
            match self.program.try_wait().unwrap() {
                Some(status) => break status,
                None if Instant::now() > end => {
                    self.program.kill().unwrap();
                    panic!("it does not end; it has written {:?}", self.so_far);
                }
                None => std::thread::sleep(Duration::from_millis(10)),
            }
        };
        assert_eq!(status.code(), Some(0), "{}", self.so_far);
        let after = tcgetattr(&self.line).unwrap();
        assert_eq!(
            (after.local_modes, after.input_modes, after.output_modes),
            (self.before.local_modes, self.before.input_modes, self.before.output_modes)
        );
    }
}

#[test]
fn top_shows_devices_and_gives_the_terminal_back_however_it_is_left() {
    let scratch = Scratch::new();
    let peer = vmm(&scratch.path("s"));
    let socket = peer.socket.to_str().unwrap();
    for way in ["q", "\x1b", "\x03", "SIGTERM", "SIGHUP"] {
        let mut terminal = Terminal::start(&["top", "--socket", socket, "--interval", "0.1"]);
        terminal.wait_for(ENTER_SCREEN);
        terminal.wait_for("gpu0");
        terminal.wait_for("D3cold");
        let raw = tcgetattr(&terminal.line).unwrap();
        assert_ne!(raw.local_modes, terminal.before.local_modes, "it is not raw");
        let signal = match way {
            "SIGTERM" => Some(Signal::TERM),
            "SIGHUP" => Some(Signal::HUP),
            _ => None,
        };
        match signal {
            Some(signal) => kill_process(Pid::from_child(&terminal.program), signal).unwrap(),
            None => terminal.keys.write_all(way.as_bytes()).unwrap(),
        }
        terminal.check_given_back();
    }
}

#[test]
fn top_without_a_terminal_says_what_to_give_and_once_prints_text_without_escape_codes() {
    let scratch = Scratch::new();
    let peer = vmm(&scratch.path("s"));
    let socket = peer.socket.to_str().unwrap();
    let (status, text, error) = output(&["top", "--socket", socket]);
    assert_eq!((status, text.as_str()), (1, ""));
    assert_eq!(
        error,
        "dormouse: error: top: standard output is no terminal; give --once for a table, or --once --json\n"
    );
    let expected = "\
VM 77  Running  vmlinuz  1 device
  DEVICE  HOST          STATE  SINCE  POWER   LOW POWER  LAST WAKE  DOWN / UP  POLICY
  gpu0    0000:01:00.0  off    1.5 s  D3cold  75.0 %     -          -          -
";
    let (status, text, error) = output(&["top", "--once", "--socket", socket]);
    // The platform's watts, where this machine has any.
    let text = text.split("\nplatform").next().unwrap();
    assert_eq!((status, text, error.as_str()), (0, expected, ""));
    let (status, text, _) = output(&["top", "--once", "--json", "--socket", socket]);
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!((status, &json["vms"][0]["devices"][0]["low_power_percent"]), (0, &serde_json::json!(75.0)));
}

#[test]
fn a_vmm_that_cannot_be_read_is_a_failure_of_one_look() {
    let scratch = Scratch::new();
    let missing = scratch.path("missing");
    let (status, text, error) = output(&["top", "--once", "--socket", missing.to_str().unwrap()]);
    assert_eq!(status, 1);
    assert!(text.contains("there is no such socket"), "{text}");
    assert!(error.contains("1 of 1 VMMs could not be read"), "{error}");
}

#[test]
fn one_look_at_a_terminal_is_coloured() {
    let scratch = Scratch::new();
    let peer = vmm(&scratch.path("s"));
    let mut terminal = Terminal::start(&["top", "--once", "--socket", peer.socket.to_str().unwrap()]);
    terminal.wait_for("\x1b[36moff\x1b[0m");
    assert!(terminal.program.wait().unwrap().success());
}

#[test]
fn ctl_ends_with_0_or_1_and_says_the_error_on_one_line() {
    let scratch = Scratch::new();
    let peer = vmm(&scratch.path("s"));
    let socket = peer.socket.to_str().unwrap();
    assert_eq!(output(&["ctl", "--api-socket", socket, "pause"]), (0, String::new(), String::new()));
    assert_eq!(output(&["ctl", "--api-socket", socket, "ping"]), (0, format!("{PING}\n"), String::new()));
    let (status, text, error) = output(&["ctl", "--api-socket", socket, "boot"]);
    let expected = "vm.boot: Error from API: The VM could not boot: VM config is missing";
    assert_eq!((status, text.as_str()), (1, ""));
    assert_eq!(error, format!("dormouse: error: {socket}: {expected}\n"));
}

#[test]
fn ctl_at_a_terminal_prints_text() {
    let scratch = Scratch::new();
    let peer = vmm(&scratch.path("s"));
    let mut terminal = Terminal::start(&["ctl", "--api-socket", peer.socket.to_str().unwrap(), "ping"]);
    terminal.wait_for("version v0.1.0, process 77, features kvm");
    assert!(terminal.program.wait().unwrap().success());
}

#[test]
fn what_is_printed_into_a_pipe_that_nobody_reads_is_no_failure() {
    let mut program =
        dormouse(&["completions", "bash"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(program.stdout.take());
    let mut error = String::new();
    program.stderr.take().unwrap().read_to_string(&mut error).unwrap();
    assert_eq!((program.wait().unwrap().code(), error.as_str()), (Some(0), ""));
}
