//! The socket device against socat on the host and the guest's own vsock driver, and the console device in each of its modes.

use std::time::Duration;

use super::on;
use super::steps::{IDLE, guest_is_content};
use crate::error::{Error, Result, ensure};
use crate::guest::{Guest, VmSpec};
use crate::host::Host;
use crate::image::guest_path;
use crate::rpc::wait_for;
use crate::runner::{Case, Scenario};
use crate::spec::HostSpec;

/// The device's socket on the host, and the VM's control socket.
const SOCKET: &str = "/run/vm.vsock";
const API: &str = "/run/sockets.sock";
/// How long a transfer may take.
const TRANSFER: Duration = Duration::from_secs(90);
/// Bytes of a large one: 6 MiB.
const LARGE: &str = "6291456";

pub fn table() -> Vec<Scenario> {
    let host = || HostSpec::new(&[]);
    vec![
        on(host(), "vsock_carries_large_transfers_both_ways_and_closes_by_halves", both_ways),
        on(host(), "vsock_serves_many_connections_and_survives_clients_that_talk_nonsense", many),
        on(host(), "vsock_comes_and_goes_while_the_guest_runs", hotplug),
        on(host(), "the_console_has_a_pseudoterminal_beside_the_serial_port", pty),
        on(host(), "the_console_leads_to_a_file_a_socket_or_nowhere", file_and_socket),
        on(host(), "the_console_on_standard_input_serves_the_whole_guest", tty),
        on(host(), "idle_consoles_and_sockets_wake_nothing", idle),
    ]
}

fn spec(case: &Case<'_>, options: &str) -> VmSpec {
    let mut spec = VmSpec::new(case.guest).options(&format!("--api-socket {API} {options}"));
    spec.modules = vec!["virtio_pci", "virtio_console", "vmw_vsock_virtio_transport"];
    spec
}

fn vsock() -> String {
    format!("--vsock cid=42,socket={SOCKET}")
}

/// Runs a shell line on the host that may take long.
fn long(host: &Host, command: &str) -> Result<String> {
    let output = host.run_for(command, TRANSFER)?;
    ensure(output.status == 0, || {
        format!("host: `{command}` ended with {}: {}", output.status, output.text)
    })?;
    Ok(output.text)
}

fn same(what: &str, left: &str, right: &str) -> Result<()> {
    ensure(left.trim() == right.trim() && !left.trim().is_empty(), || {
        format!("{what}: {left:?} and {right:?}")
    })
}

fn ctl(host: &Host, words: &str) -> Result<String> {
    host.sh(&format!("dormouse ctl --api-socket {API} --json {words}"))
}

/// Starts an echo server on a port of the guest.
fn guest_echo(guest: &Guest<'_>, port: u32) -> Result<()> {
    guest.sh(&format!("guest_tool vsock echo {port} >/tmp/echo.{port} 2>&1 &"))?;
    guest.wait_file(&format!("/tmp/echo.{port}"), "listening", IDLE)
}

/// Waits until a socket of the host is there.
fn wait_socket(host: &Host, path: &str) -> Result<()> {
    wait_for(&format!("{path} is there"), IDLE, || {
        Ok(if host.probe(&format!("test -S {path}"))?.status == 0 { Ok(()) } else { Err("no".to_owned()) })
    })
}

fn both_ways(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let guest = host.start_vm(&spec(case, &vsock()))?;
    host.sh(&format!("head -c {LARGE} /dev/urandom >/run/large"))?;
    let sum = host.sh("sha256sum </run/large")?;

    // A client of the host, to the guest and back.
    guest_echo(&guest, 52)?;
    let text = long(host, &format!("(echo CONNECT 52; echo hello) | socat -t 20 - UNIX-CONNECT:{SOCKET}"))?;
    ensure(text.starts_with("OK ") && text.ends_with("\nhello"), || format!("the client reads {text:?}"))?;
    let back = long(
        host,
        &format!(
            "(echo CONNECT 52; cat /run/large) | socat -t 60 - UNIX-CONNECT:{SOCKET} | tail -n +2 | sha256sum"
        ),
    )?;
    same("what came back from the guest", &back, &sum)?;

    // The guest sends to a server of the host.
    let server = format!("{SOCKET}_7000");
    host.sh(&format!("socat -u UNIX-LISTEN:{server} CREATE:/run/got >/dev/null 2>&1 &"))?;
    wait_socket(host, &server)?;
    let sent = guest.sh_for(
        &format!("head -c {LARGE} /dev/urandom >/tmp/large; guest_tool vsock connect 2 7000 </tmp/large && sha256sum </tmp/large"),
        TRANSFER,
    )?;
    wait_for("the server has everything", IDLE, || {
        let got = host.sh("sha256sum </run/got")?;
        Ok(if got.trim() == sent.trim() { Ok(()) } else { Err(got) })
    })?;

    // And reads from one, having closed its own half at once.
    let server = format!("{SOCKET}_7001");
    host.sh(&format!("socat -U UNIX-LISTEN:{server} OPEN:/run/large >/dev/null 2>&1 &"))?;
    wait_socket(host, &server)?;
    let read = guest.sh_for("guest_tool vsock connect 2 7001 </dev/null | sha256sum", TRANSFER)?;
    same("what the guest has read", &read, &sum)?;

    // An answer that is made only when the question has ended.
    let server = format!("{SOCKET}_7002");
    host.sh(&format!("socat -t 20 UNIX-LISTEN:{server} EXEC:sha256sum >/dev/null 2>&1 &"))?;
    wait_socket(host, &server)?;
    let answer = guest.sh_for("guest_tool vsock connect 2 7002 </tmp/large", TRANSFER)?;
    same("the answer to the guest", &answer, &sent)?;

    // Nobody listens.
    let refused = guest.run("guest_tool vsock connect 2 7003 </dev/null")?;
    ensure(refused.status != 0 && refused.text.contains("reset"), || {
        format!("port 7003 of the host: {}", refused.text)
    })?;
    let refused = long(host, &format!("echo CONNECT 53 | socat -t 20 - UNIX-CONNECT:{SOCKET}; echo end"))?;
    ensure(refused.trim() == "end", || format!("port 53 of the guest: {refused}"))?;
    guest_is_content(&guest)?;
    guest.power_off()?;
    let left = host.run(&format!("test -e {SOCKET}"))?;
    ensure(left.status != 0, || "the socket is left behind".to_owned())
}

fn many(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    // One that a dead VMM left.
    host.sh(&format!(
        "socat UNIX-LISTEN:{SOCKET},unlink-close=0 - </dev/null >/dev/null 2>&1 & sleep 1; kill -9 $!"
    ))?;
    wait_socket(host, SOCKET)?;
    let guest = host.start_vm(&spec(case, &vsock()))?;
    // As long as the next two are connected, everything goes on.
    host.sh(&format!("(sleep 100 | socat - UNIX-CONNECT:{SOCKET} >/dev/null 2>&1) &"))?;
    host.sh(&format!("((printf 'CONNECT 5'; sleep 100) | socat - UNIX-CONNECT:{SOCKET} >/dev/null 2>&1) &"))?;
    for nonsense in ["GET / HTTP/1.1", "CONNECT x", "CONNECT 99999999999", "CONNECT", ""] {
        let reply = long(
            host,
            &format!("printf '%s\\n' '{nonsense}' | socat -t 10 - UNIX-CONNECT:{SOCKET}; echo end"),
        )?;
        ensure(reply.trim() == "end", || format!("{nonsense:?} is answered with {reply}"))?;
    }
    long(host, &format!("head -c 5000 /dev/urandom | socat -t 10 - UNIX-CONNECT:{SOCKET}; true"))?;
    let server = format!("{SOCKET}_9000");
    host.sh(&format!(
        "socat UNIX-LISTEN:{server},fork,backlog=64 EXEC:cat >/dev/null 2>&1 & echo $! >/run/socat.pid"
    ))?;
    wait_socket(host, &server)?;
    let text = guest.sh_for("guest_tool vsock many 2 9000 40", TRANSFER)?;
    ensure(text.contains("40 connections"), || text.clone())?;
    guest_echo(&guest, 52)?;
    let replies = long(
        host,
        &format!(
            "for n in $(seq 30); do (echo CONNECT 52; echo number $n) | socat -t 30 - UNIX-CONNECT:{SOCKET} >/run/reply.$n & done; \
             wait; cat /run/reply.* | grep -c number"
        ),
    )?;
    same("replies to clients of the host", &replies, "30")?;
    // A reboot of the guest ends connections, and the socket stays.
    let mark = guest.mark();
    ctl(host, "reboot")?;
    guest.wait_ready(mark)?;
    guest_echo(&guest, 52)?;
    let text = long(host, &format!("(echo CONNECT 52; echo again) | socat -t 20 - UNIX-CONNECT:{SOCKET}"))?;
    ensure(text.ends_with("\nagain"), || format!("after the reboot: {text:?}"))?;
    // Another VMM does not take it.
    let other = host.run(&format!(
        "dormouse --kernel {} --serial null {} 2>&1",
        guest_path(case.guest, "vmlinuz"),
        vsock()
    ))?;
    ensure(other.status == 1 && other.text.contains("another program listens"), || other.text.clone())?;
    host.sh("kill $(cat /run/socat.pid); killall sleep || true")?;
    guest_is_content(&guest)?;
    guest.power_off()
}

fn hotplug(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let guest = host.start_vm(&spec(case, ""))?;
    for round in 0..2 {
        let reply = ctl(host, &format!("add-vsock cid=7,socket={SOCKET}"))?;
        ensure(reply.contains("\"id\":\"_vsock") && reply.contains("\"bdf\":\"0000:00:"), || reply.clone())?;
        let second =
            host.run(&format!("dormouse ctl --api-socket {API} add-vsock cid=8,socket=/run/b 2>&1"))?;
        ensure(second.status == 1 && second.text.contains("Too many virtio-vsock devices"), || {
            second.text.clone()
        })?;
        let json: serde_json::Value =
            serde_json::from_str(&reply).map_err(|e| Error::Check(format!("{reply}: {e}")))?;
        let id = json["id"].as_str().ok_or_else(|| Error::Check(reply.clone()))?.to_owned();
        wait_for("the guest has its driver", IDLE, || {
            let text = guest
                .probe("grep -l virtio /sys/bus/virtio/drivers/vmw_vsock_virtio_transport/virtio*/uevent")?;
            Ok(if text.status == 0 { Ok(()) } else { Err(text.text) })
        })?;
        if round == 0 {
            guest_echo(&guest, 52)?;
        }
        let text = long(host, &format!("(echo CONNECT 52; echo hot) | socat -t 20 - UNIX-CONNECT:{SOCKET}"))?;
        ensure(text.ends_with("\nhot"), || format!("round {round}: {text:?}"))?;
        let info = ctl(host, "info")?;
        ensure(info.contains("\"cid\":7"), || format!("not in vm.info: {info}"))?;
        ctl(host, &format!("remove-device {id}"))?;
        wait_for("the device is gone", IDLE, || {
            let there = host.probe(&format!("test -e {SOCKET}"))?.status == 0
                || ctl(host, "info")?.contains("\"cid\":7");
            Ok(if there { Err("it is there".to_owned()) } else { Ok(()) })
        })?;
    }
    let bad = host.run(&format!("dormouse ctl --api-socket {API} add-vsock cid=2,socket=/run/b 2>&1"))?;
    ensure(bad.status == 1 && bad.text.contains("cid=2"), || bad.text.clone())?;
    guest_is_content(&guest)?;
    guest.power_off()
}

/// Has the guest serve commands on its virtio console.
fn serve_console(guest: &Guest<'_>) -> Result<()> {
    wait_for("the guest has the console", IDLE, || {
        let there = guest.probe("test -c /dev/hvc0")?;
        Ok(if there.status == 0 { Ok(()) } else { Err("no".to_owned()) })
    })?;
    // In one go: the driver forgets the terminal's modes when the last one closes it.
    guest.sh("(stty raw -echo; sh /etc/agent) </dev/hvc0 >/dev/hvc0 2>&1 &").map(drop)
}

/// Waits until what the console has said ends up in a file of the host.
fn wait_said(host: &Host, file: &str, text: &str) -> Result<()> {
    wait_for(&format!("the console says {text:?}"), IDLE, || {
        let found = host.probe(&format!("grep -c '{text}' {file}"))?;
        Ok(if found.status == 0 { Ok(()) } else { Err(host.probe(&format!("tail -c 300 {file}"))?.text) })
    })
}

/// The path of the console's pseudoterminal, as `vm.info` has it.
fn terminal(host: &Host) -> Result<String> {
    let info = ctl(host, "info")?;
    let json: serde_json::Value =
        serde_json::from_str(&info).map_err(|e| Error::Check(format!("{info}: {e}")))?;
    let path = json["config"]["console"]["file"].as_str();
    path.map(str::to_owned).ok_or_else(|| Error::Check(format!("no terminal in {info}")))
}

fn pty(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let guest = host.start_vm(&spec(case, "--console pty"))?;
    let path = terminal(host)?;
    host.sh(&format!(
        "stty -F {path} raw -echo; stty -F {path} rows 41 cols 133; (cat {path} >/run/said 2>/dev/null & echo $! >/run/cat.pid)"
    ))?;
    serve_console(&guest)?;
    host.sh(&format!("echo '7 echo it is $((6*7))' >{path}"))?;
    wait_said(host, "/run/said", "it is 42")?;
    wait_for("the guest has the terminal's size", IDLE, || {
        let size = guest.probe("stty -F /dev/hvc0 size")?.text;
        Ok(if size.trim() == "41 133" { Ok(()) } else { Err(size) })
    })?;
    // More output than a terminal holds, and more input than a buffer: a line as long as the agent's can be.
    host.sh(&format!("echo '8 seq 2000; echo that was all' >{path}"))?;
    wait_said(host, "/run/said", "that was all")?;
    let lines = host.sh("tr -d '\\r' </run/said | grep -c '^[0-9][0-9]*$'")?;
    same("lines of output", &lines, "2000")?;
    let word = "x".repeat(2000);
    host.sh(&format!("echo '9 echo {word} | wc -c' >{path}"))?;
    wait_said(host, "/run/said", "2001")?;
    // The same terminal after a reboot.
    let mark = guest.mark();
    ctl(host, "reboot")?;
    guest.wait_ready(mark)?;
    same("the terminal after a reboot", &terminal(host)?, &path)?;
    serve_console(&guest)?;
    host.sh(&format!("echo '7 echo again it is $((5*5))' >{path}"))?;
    wait_said(host, "/run/said", "again it is 25")?;
    host.sh("kill $(cat /run/cat.pid)")?;
    guest_is_content(&guest)?;
    guest.power_off()
}

fn file_and_socket(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let guest = host.start_vm(&spec(case, "--console file=/run/said"))?;
    guest.sh("seq 1000 >/dev/hvc0; echo to the file >/dev/hvc0")?;
    wait_said(host, "/run/said", "to the file")?;
    same("lines of output", &host.sh("tr -d '\\r' </run/said | grep -c '^[0-9]*$'")?, "1000")?;
    guest_is_content(&guest)?;
    guest.power_off()?;

    let guest = host.start_vm(&spec(case, "--console socket=/run/console.sock"))?;
    serve_console(&guest)?;
    for round in 0..2 {
        host.sh(&format!(
            "((echo '7 echo client {round} has $((6*7))'; sleep 3) | socat - UNIX-CONNECT:/run/console.sock >/run/said.{round} 2>&1) &"
        ))?;
        wait_said(host, &format!("/run/said.{round}"), &format!("client {round} has 42"))?;
    }
    guest.power_off()?;
    let left = host.run("test -e /run/console.sock")?;
    ensure(left.status != 0, || "the socket is left behind".to_owned())?;

    let guest = host.start_vm(&spec(case, "--console null"))?;
    guest.sh("seq 1000 >/dev/hvc0")?;
    guest_is_content(&guest)?;
    guest.power_off()?;

    let both =
        format!("dormouse --kernel {} --serial tty --console tty 2>&1", guest_path(case.guest, "vmlinuz"));
    let refused = host.run(&both)?;
    ensure(refused.status == 1 && refused.text.contains("both --serial and --console"), || {
        refused.text.clone()
    })
}

fn tty(case: &Case<'_>) -> Result<()> {
    let mut spec = spec(case, "");
    spec.command = Some(format!(
        "dormouse --kernel {} --initramfs {} --memory size=512M --serial null --console tty --cmdline \
         'console=hvc0 quiet panic=-1 bed.modules=virtio_pci,virtio_console bed.tty=hvc0'",
        guest_path(case.guest, "vmlinuz"),
        guest_path(case.guest, "initramfs"),
    ));
    let guest = case.host.start_vm(&spec)?;
    let consoles = guest.sh("cat /proc/consoles")?;
    ensure(consoles.contains("hvc0"), || format!("the guest's consoles are {consoles}"))?;
    let lines = guest.sh("seq 3000 | wc -l; seq 3000")?;
    ensure(lines.lines().count() == 3001, || format!("{} lines have arrived", lines.lines().count()))?;
    let word = "y".repeat(3000);
    same("a long line of input", &guest.sh(&format!("echo {word} | wc -c"))?, "3001")?;
    guest_is_content(&guest)?;
    guest.power_off()
}

fn idle(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let guest = host.start_vm(&spec(case, &format!("{} --console pty", vsock())))?;
    serve_console(&guest)?;
    guest_echo(&guest, 52)?;
    // One connection that is open and says nothing.
    host.sh(&format!("((echo CONNECT 52; sleep 100) | socat - UNIX-CONNECT:{SOCKET} >/run/said 2>&1) &"))?;
    wait_said(host, "/run/said", "OK")?;
    let wakes = || {
        host.sh(
            "for t in /proc/$(cat /run/vmm.pid)/task/*; do case $(cat $t/comm) in _vsock*|__console|__rng) \
             echo $(cat $t/comm) $(grep ctxt $t/status);; esac; done",
        )
    };
    // What the guest's own start has to say is over by then.
    std::thread::sleep(Duration::from_secs(3));
    let before = wakes()?;
    std::thread::sleep(Duration::from_secs(5));
    let after = wakes()?;
    ensure(before.contains("_vsock") && before.contains("__console"), || format!("threads: {before}"))?;
    same("wake-ups of idle devices", &before, &after)?;
    host.sh("killall sleep || true")?;
    guest.power_off()
}
