//! The built program through links with the names of Cloud Hypervisor's programs: what libvirt and Kata see of it.

#![allow(clippy::unwrap_used, reason = "a test may panic, and its helpers too")]

// The peer of the unit tests, which has more than is needed here.
#[allow(dead_code, missing_docs, missing_debug_implementations)]
#[path = "../src/client/peer.rs"]
mod peer;

use std::os::unix::fs::symlink;
use std::process::{Command, Stdio};

use peer::{Answer, Peer, Scratch, reply};

const INFO: &str = r#"{"config":{"payload":{"kernel":"/boot/vmlinuz"}},"state":"Running"}"#;

/// Runs the program under `name` with `words`; exit status, standard output and standard error.
fn run(scratch: &Scratch, name: &str, words: &[&str]) -> (i32, String, String) {
    let link = scratch.path(name);
    if !link.exists() {
        symlink(env!("CARGO_BIN_EXE_dormouse"), &link).unwrap();
    }
    let output = Command::new(link).args(words).stdin(Stdio::null()).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

#[test]
fn a_link_named_cloud_hypervisor_tells_its_version_as_libvirt_reads_it() {
    let (status, text, complaint) = run(&Scratch::new(), "cloud-hypervisor", &["--version"]);
    assert_eq!((status, complaint.as_str()), (0, ""));
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 2, "{text}");
    assert!(lines[0].starts_with("cloud-hypervisor v54.0.0-"), "{text}");
    assert!(lines[1].starts_with("Migration Protocol Versions: "), "{text}");
}

#[test]
fn a_link_named_cloud_hypervisor_fails_with_the_line_that_clients_look_for() {
    let scratch = Scratch::new();
    for words in [&["--kernel", "/nowhere/vmlinuz"][..], &["--kernel", "k", "--disk", "path=d"], &["doctor"]]
    {
        let (status, text, complaint) = run(&scratch, "cloud-hypervisor", words);
        assert_eq!((status, text.as_str()), (1, ""), "{words:?}");
        let (first, second) = complaint.split_once('\n').unwrap();
        assert_eq!(first, "Error: Cloud Hypervisor exited with the following chain of errors:");
        assert!(second.starts_with("cloud-hypervisor: error: "), "{complaint}");
        assert_eq!(second.trim_end().lines().count(), 1, "{complaint}");
    }
    let (status, _, complaint) = run(&scratch, "dormouse", &["--kernel", "k", "--disk", "path=d"]);
    assert_eq!(status, 1);
    assert!(complaint.starts_with("dormouse: error: --disk "), "{complaint}");
}

#[test]
fn a_link_named_ch_remote_prints_what_the_vmm_replies() {
    let scratch = Scratch::new();
    let socket = scratch.path("api.sock");
    let _vmm = Peer::serve(&socket, |line, _| {
        Answer::Bytes(match line {
            "GET /api/v1/vm.info" => reply(200, INFO),
            "PUT /api/v1/vm.pause" => reply(204, ""),
            _ => reply(500, r#"["Error from API","The VM could not boot","VM config is missing"]"#),
        })
    });
    let socket = socket.to_str().unwrap();
    let remote = |words: &[&str]| run(&scratch, "ch-remote", &[&["--api-socket", socket], words].concat());
    assert_eq!(remote(&["info"]), (0, format!("{INFO}\n"), String::new()));
    assert_eq!(remote(&["pause"]), (0, String::new(), String::new()));
    let (status, text, complaint) = remote(&["boot"]);
    assert_eq!((status, text.as_str()), (1, ""));
    assert!(
        complaint.starts_with("ch-remote: error: ") && complaint.contains("VM config is missing"),
        "{complaint}"
    );
    let (status, version, _) = run(&scratch, "ch-remote", &["--version"]);
    assert!(status == 0 && version.starts_with("ch-remote v54.0.0-"), "{version}");
}
