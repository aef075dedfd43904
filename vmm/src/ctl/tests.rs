//! The commands against a server that notes what it is told and answers the bytes of the contract.

use std::os::fd::AsRawFd;

use clap::{CommandFactory, Parser};
use serde_json::{Value, json};

use super::*;
use crate::client::fixture;
use crate::client::peer::{Answer, Arrived, Peer, Scratch, reply};

/// The command by itself.
#[derive(Debug, Parser)]
struct Alone {
    #[command(flatten)]
    ctl: CtlArgs,
}

fn args(words: &[&str]) -> CtlArgs {
    Alone::try_parse_from(std::iter::once("ctl").chain(words.iter().copied())).unwrap().ctl
}

/// A VMM that answers each call with what is given for it, and others with 204.
struct Vmm {
    scratch: Scratch,
    peer: Peer,
}

impl Vmm {
    fn new(answers: &[(&'static str, u16, Value)]) -> Self {
        let scratch = Scratch::new();
        let answers = answers.to_vec();
        let peer = Peer::serve(&scratch.path("api.sock"), move |line, _| {
            let found = answers.iter().find(|(call, ..)| *call == line);
            Answer::Bytes(
                found.map_or_else(|| reply(204, ""), |(_, status, body)| reply(*status, &body.to_string())),
            )
        });
        Self { scratch, peer }
    }

    fn perform(&self, words: &[&str], terminal: bool) -> Result<String, CtlError> {
        let socket = self.peer.socket.to_str().unwrap();
        let words: Vec<&str> = ["--api-socket", socket].into_iter().chain(words.iter().copied()).collect();
        let text = perform(&args(&words), terminal)?;
        Ok(anstream::adapter::strip_str(&text).to_string())
    }

    /// What the VMM is told by these words.
    fn told(&self, words: &[&str]) -> Arrived {
        self.perform(words, false).unwrap();
        self.peer.next()
    }
}

#[test]
fn the_commands_are_those_of_ch_remote_and_five_more() {
    let command = Alone::command();
    let mut names: Vec<&str> = command.get_subcommands().map(clap::Command::get_name).collect();
    names.sort_unstable();
    let mut expected = vec![
        "add-device",
        "add-disk",
        "add-fs",
        "add-generic-vhost-user",
        "add-net",
        "add-pmem",
        "add-user-device",
        "add-vdpa",
        "add-vsock",
        "boot",
        "coredump",
        "counters",
        "create",
        "delete",
        "info",
        "nmi",
        "pause",
        "ping",
        "power-button",
        "reboot",
        "receive-migration",
        "remove-device",
        "resize",
        "resize-disk",
        "resize-zone",
        "restore",
        "resume",
        "send-migration",
        "shutdown",
        "shutdown-vmm",
        "snapshot",
        "metrics",
        "power",
        "power-policy",
        "power-reset",
        "power-wake",
    ];
    expected.sort_unstable();
    assert_eq!(names, expected);
}

#[test]
fn calls_without_a_body_have_none() {
    let vmm = Vmm::new(&[]);
    for (word, call) in [
        ("boot", "PUT /api/v1/vm.boot"),
        ("counters", "GET /api/v1/vm.counters"),
        ("delete", "PUT /api/v1/vm.delete"),
        ("info", "GET /api/v1/vm.info"),
        ("nmi", "PUT /api/v1/vm.nmi"),
        ("pause", "PUT /api/v1/vm.pause"),
        ("ping", "GET /api/v1/vmm.ping"),
        ("power-button", "PUT /api/v1/vm.power-button"),
        ("reboot", "PUT /api/v1/vm.reboot"),
        ("resume", "PUT /api/v1/vm.resume"),
        ("shutdown", "PUT /api/v1/vm.shutdown"),
        ("shutdown-vmm", "PUT /api/v1/vmm.shutdown"),
        ("power", "GET /api/v1/vm.power"),
        ("metrics", "GET /metrics"),
    ] {
        let arrived = vmm.told(&[word]);
        assert_eq!((arrived.line.as_str(), arrived.body.as_str()), (call, ""));
    }
}

#[test]
fn calls_with_a_body_have_the_json_of_the_schema() {
    let vmm = Vmm::new(&[]);
    let rate = json!({"bandwidth": {"size": 9, "refill_time": 100}, "ops": {"size": 5, "one_time_burst": 2}});
    let cases: &[(&[&str], &str, Value)] = &[
        (
            &[
                "add-disk",
                "path=/d.img,readonly=on,image_type=qcow2,queue_affinity=[0@[1-2],1@[3]],_disable_aio=on",
            ],
            "vm.add-disk",
            json!({"path": "/d.img", "readonly": true, "image_type": "Qcow2", "disable_aio": true, "queue_affinity":
                [{"queue_index": 0, "host_cpus": [1, 2]}, {"queue_index": 1, "host_cpus": [3]}]}),
        ),
        (
            &[
                "add-disk",
                "socket=/v,vhost_user=on,bw_size=9,bw_refill_time=100,ops_size=5,ops_one_time_burst=2",
            ],
            "vm.add-disk",
            json!({"vhost_socket": "/v", "vhost_user": true, "rate_limiter_config": rate}),
        ),
        (&["add-fs", "tag=t,socket=/s"], "vm.add-fs", json!({"tag": "t", "socket": "/s"})),
        (
            &["add-generic-vhost-user", "virtio_id=26,socket=/s,queue_sizes=[64,128]"],
            "vm.add-generic-vhost-user",
            json!({"device_type": 26, "socket": "/s", "queue_sizes": [64, 128]}),
        ),
        (
            &["add-net", "tap=t0,mac=52:54:00:00:00:01,mtu=9000,vhost_mode=server,offload_tso=off"],
            "vm.add-net",
            json!({"tap": "t0", "mac": "52:54:00:00:00:01", "mtu": 9000, "vhost_mode": "Server", "offload_tso": false}),
        ),
        (&["add-pmem", "file=/p,size=2M"], "vm.add-pmem", json!({"file": "/p", "size": 2 << 20})),
        (&["add-user-device", "socket=/s,id=u"], "vm.add-user-device", json!({"socket": "/s", "id": "u"})),
        (&["add-vdpa", "path=/v,num_queues=2"], "vm.add-vdpa", json!({"path": "/v", "num_queues": 2})),
        (&["add-vsock", "cid=3,socket=/s"], "vm.add-vsock", json!({"cid": 3, "socket": "/s"})),
        (&["remove-device", "gpu0"], "vm.remove-device", json!({"id": "gpu0"})),
        (&["resize", "--cpus", "4"], "vm.resize", json!({"desired_vcpus": 4})),
        (
            &["resize", "--memory", "1G", "--balloon", "0"],
            "vm.resize",
            json!({"desired_ram": 1 << 30, "desired_balloon": 0}),
        ),
        (
            &["resize-disk", "--disk", "d", "--size", "4K"],
            "vm.resize-disk",
            json!({"id": "d", "desired_size": 4096}),
        ),
        (
            &["resize-zone", "--id", "z", "--size", "1"],
            "vm.resize-zone",
            json!({"id": "z", "desired_ram": 1}),
        ),
        (&["snapshot", "file:///s"], "vm.snapshot", json!({"destination_url": "file:///s"})),
        (&["coredump", "file:///c"], "vm.coredump", json!({"destination_url": "file:///c"})),
        (
            &["restore", "source_url=file:///s,prefault=on,memory_restore_mode=ondemand,zone_updates=[z@1]"],
            "vm.restore",
            json!({"source_url": "file:///s", "prefault": true, "memory_restore_mode": "OnDemand",
                "zone_updates": [{"id": "z", "host_numa_node": 1}]}),
        ),
        (
            &["receive-migration", "unix:/m.sock"],
            "vm.receive-migration",
            json!({"receiver_url": "unix:/m.sock"}),
        ),
        (
            &["send-migration", "destination_url=tcp:h:1,local=on,timeout_strategy=ignore"],
            "vm.send-migration",
            json!({"destination_url": "tcp:h:1", "local": true, "timeout_strategy": "Ignore"}),
        ),
        (
            &["power-policy", "gpu0", "power=off,wake=host-only,hold_off=50,on_lost=keep"],
            "vm.power-policy",
            json!({"id": "gpu0", "power": "off", "wake": "host-only", "hold_off": 50, "on_lost": "keep"}),
        ),
        (&["power-policy", "gpu0"], "vm.power-policy", json!({"id": "gpu0"})),
        (&["power-wake", "gpu0"], "vm.power-wake", json!({"id": "gpu0"})),
        (&["power-reset", "gpu0"], "vm.power-reset", json!({"id": "gpu0"})),
        (
            &["power-reset", "gpu0", "--clear-latch"],
            "vm.power-reset",
            json!({"id": "gpu0", "clear_latch": true}),
        ),
    ];
    for (words, call, body) in cases {
        let arrived = vmm.told(words);
        assert_eq!(arrived.line, format!("PUT /api/v1/{call}"));
        assert_eq!(serde_json::from_str::<Value>(&arrived.body).unwrap(), *body, "{words:?}");
    }
}

#[test]
fn a_device_is_written_as_for_the_vmm_itself() {
    let vmm = Vmm::new(&[]);
    let text = "path=/sys/bus/pci/devices/0000:01:00.0,id=gpu0,power=d3hot,hold_off=9";
    let arrived = vmm.told(&["add-device", text]);
    let sent: crate::config::DeviceConfig = serde_json::from_str(&arrived.body).unwrap();
    assert_eq!(sent, crate::config::DeviceConfig::parse(text).unwrap());
    assert_eq!(arrived.line, "PUT /api/v1/vm.add-device");
}

#[test]
fn descriptors_are_taken_out_of_the_json_and_sent_in_their_order() {
    let vmm = Vmm::new(&[]);
    let files = ["a", "b", "c", "d"].map(|name| {
        vmm.scratch.write(name, name);
        std::fs::File::open(vmm.scratch.path(name)).unwrap()
    });
    let [a, b, c, d] = files.each_ref().map(AsRawFd::as_raw_fd);
    let contents = |arrived: Arrived| -> Vec<String> {
        let files = arrived.fds.into_iter().map(std::fs::File::from);
        files
            .map(|file| {
                let mut text = [0; 1];
                std::os::unix::fs::FileExt::read_exact_at(&file, &mut text, 0).unwrap();
                String::from_utf8(text.to_vec()).unwrap()
            })
            .collect()
    };
    let arrived = vmm.told(&["add-net", &format!("fd=[{b},{a}],num_queues=4")]);
    assert_eq!(arrived.body, r#"{"num_queues":4}"#);
    assert_eq!(contents(arrived), ["b", "a"]);

    let arrived = vmm.told(&["add-device", &format!("fd={c},id=x")]);
    assert!(!arrived.body.contains("fd") && arrived.body.contains(r#""id":"x""#), "{}", arrived.body);
    assert_eq!(contents(arrived), ["c"]);

    let text = format!("iommufd_fd={d},vfio_fds=[v@{c}],source_url=file:///s,net_fds=[n@[{a},{b}]]");
    let arrived = vmm.told(&["restore", &text]);
    let body: Value = serde_json::from_str(&arrived.body).unwrap();
    assert_eq!(
        (&body["net_fds"], &body["vfio_fds"]),
        (&json!([{"id": "n", "num_fds": 2}]), &json!([{"id": "v"}]))
    );
    assert!(body.get("iommufd_fd").is_none(), "{body}");
    assert_eq!(contents(arrived), ["a", "b", "c", "d"]);
}

#[test]
fn a_configuration_comes_from_a_file_as_it_is() {
    let vmm = Vmm::new(&[]);
    vmm.scratch.write("vm.json", "{\"payload\": {\"kernel\": \"/k\"}, \"unknown\": 1}\n");
    let path = vmm.scratch.path("vm.json");
    let arrived = vmm.told(&["create", path.to_str().unwrap()]);
    assert_eq!(arrived.body, "{\"payload\": {\"kernel\": \"/k\"}, \"unknown\": 1}\n");
    let error = vmm.perform(&["create", "/nowhere.json"], false).unwrap_err().to_string();
    assert!(
        error.contains("/nowhere.json: No such file or directory") && error.contains("name a"),
        "{error}"
    );
}

#[test]
fn programs_get_the_json_that_ch_remote_prints() {
    let info = fixture::info();
    let counters = json!({"gpu0": {"entries": 7}});
    let vmm = Vmm::new(&[
        ("GET /api/v1/vm.info", 200, info.clone()),
        ("GET /api/v1/vm.counters", 200, counters.clone()),
        ("GET /api/v1/vmm.ping", 200, fixture::ping(7)),
        ("PUT /api/v1/vm.add-device", 200, json!({"id": "_vfio3", "bdf": "0000:04:00.0"})),
    ]);
    for (words, value) in
        [(["info"].as_slice(), info), (&["counters"], counters), (&["ping"], fixture::ping(7))]
    {
        assert_eq!(vmm.perform(words, false).unwrap(), format!("{value}\n"));
        let json: Vec<&str> = words.iter().copied().chain(["--json"]).collect();
        assert_eq!(vmm.perform(&json, true).unwrap(), format!("{value}\n"));
    }
    let added = vmm.perform(&["add-device", "path=/d"], false).unwrap();
    assert_eq!(added, "{\"bdf\":\"0000:04:00.0\",\"id\":\"_vfio3\"}\n");
    assert_eq!(vmm.perform(&["boot"], false).unwrap(), "");
}

#[test]
fn people_get_text() {
    let vmm = Vmm::new(&[
        ("GET /api/v1/vm.info", 200, fixture::info()),
        ("GET /api/v1/vm.counters", 200, json!({"gpu0": {"entries": 7}})),
        ("GET /api/v1/vmm.ping", 200, fixture::ping(7)),
        ("PUT /api/v1/vm.add-device", 200, json!({"id": "_vfio3", "bdf": "0000:04:00.0"})),
        ("PUT /api/v1/vm.power-policy", 200, json!({"power": "off", "wake": "notify", "hold_off": 50})),
    ]);
    let info = "state    Running\nkernel   /boot/vmlinuz-6.12\ncmdline  console=ttyS0\nvCPUs    2\n\
                memory   1024 MiB\nserial   Pty /dev/pts/3\ndevice   gpu0 /sys/bus/pci/devices/0000:01:00.0\n";
    assert_eq!(vmm.perform(&["info"], true).unwrap(), info);
    let counters = "ID    COUNTER  VALUE\ngpu0  entries  7\n";
    assert_eq!(vmm.perform(&["counters"], true).unwrap(), counters);
    assert_eq!(vmm.perform(&["ping"], true).unwrap(), "version v0.1.0, process 7, features kvm\n");
    assert_eq!(vmm.perform(&["add-device", "path=/d"], true).unwrap(), "_vfio3 at 0000:04:00.0\n");
    let policy = vmm.perform(&["power-policy", "gpu0", "power=off"], false).unwrap();
    assert_eq!(policy, "gpu0  power=off,wake=notify,hold_off=50\n");
}

#[test]
fn the_power_of_all_devices_is_a_table() {
    let vmm = Vmm::new(&[("GET /api/v1/vm.power", 200, fixture::power())]);
    let expected = "\
ID      HOST          GUEST         STATE  SINCE       POWER   LOW POWER  ENTRIES  WAKES  FAILURES
gpu0    0000:01:00.0  0000:01:00.0  off    1 min 30 s  D3cold  90.0 %     7        3      -
_vfio1  0000:02:00.0  0000:02:00.0  on     1 h 1 min   D0      0.0 %      -        -      -
nvme    0000:03:00.0  0000:03:00.0  lost   5.0 s       -       0.0 %      -        -      latched: no-answer 2x
";
    assert_eq!(vmm.perform(&["power"], false).unwrap(), expected);
    let none = Vmm::new(&[("GET /api/v1/vm.power", 200, json!({"state": "Created"}))]);
    assert_eq!(none.perform(&["power"], false).unwrap(), "The VM (Created) has no assigned device.\n");
}

#[test]
fn metrics_are_printed_as_they_are() {
    let text = "# TYPE a counter\na_total 1\n# EOF\n";
    let scratch = Scratch::new();
    let peer = Peer::serve(&scratch.path("s"), |_, _| {
        let text = "# TYPE a counter\na_total 1\n# EOF\n";
        let head = format!(
            "HTTP/1.1 200 \r\nContent-Type: application/openmetrics-text\r\nContent-Length: {}",
            text.len()
        );
        Answer::Bytes(format!("{head}\r\n\r\n{text}").into_bytes())
    });
    let printed = perform(&args(&["--api-socket", peer.socket.to_str().unwrap(), "metrics"]), true).unwrap();
    assert_eq!(printed, text);
}

#[test]
fn mistakes_are_found_before_anything_is_sent() {
    let vmm = Vmm::new(&[]);
    for (words, expected) in [
        (["add-disk", "pth=/d"].as_slice(), "add-disk has no key 'pth'; it takes path, readonly,"),
        (&["add-disk", "path=/d,image_type=iso"], "'iso' is no value for image_type; it takes raw, qcow2,"),
        (&["add-fs", "tag=t"], "add-fs: 'socket' is missing; give socket=VALUE"),
        (&["add-net", "mtu=70000"], "'70000' is no value for mtu; it takes an integer from 0 to 65535"),
        (&["add-net", "fd=[999999]"], "fd=999999 cannot be passed on"),
        (&["add-device", "path=/d,power=never"], "auto, d3hot or off"),
        (&["power-policy", "gpu0", "pwr=off"], "power-policy has no key 'pwr'; it takes power, wake,"),
        (&["resize"], "resize: nothing is to be changed"),
    ] {
        let error = vmm.perform(words, false).unwrap_err().to_string();
        assert!(error.contains(expected), "{words:?}: {error}");
    }
    assert!(vmm.peer.arrived.try_recv().is_err());
    assert!(matches!(perform(&args(&["ping"]), false), Err(CtlError::NoSocket)));
}

#[test]
fn the_socket_may_be_named_before_or_after_the_command_and_as_the_vmm_has_it() {
    for words in [
        ["--api-socket", "/s", "ping"].as_slice(),
        &["ping", "--api-socket", "/s"],
        &["--api-socket", "path=/s", "ping"],
    ] {
        assert_eq!(args(words).socket(), Some("/s".into()));
    }
}

#[test]
fn an_error_of_the_vmm_is_an_error_of_the_command() {
    let chain = json!(["Error from API", "The device could not be added", "no such device"]);
    let vmm = Vmm::new(&[("PUT /api/v1/vm.add-device", 500, chain)]);
    let error = vmm.perform(&["add-device", "path=/d"], false).unwrap_err().to_string();
    let expected = "vm.add-device: Error from API: The device could not be added: no such device";
    assert!(error.ends_with(expected), "{error}");
}

#[test]
fn a_reply_that_makes_no_sense_says_how_to_see_it() {
    let vmm = Vmm::new(&[("GET /api/v1/vm.power", 200, json!([1]))]);
    let error = vmm.perform(&["power"], false).unwrap_err().to_string();
    assert!(error.contains("vm.power is not understood") && error.contains("--json"), "{error}");
    assert_eq!(vmm.perform(&["power", "--json"], false).unwrap(), "[1]\n");
}

#[test]
fn a_vmm_that_hangs_is_waited_for_as_long_as_was_said() {
    let scratch = Scratch::new();
    let peer = Peer::serve(&scratch.path("s"), |_, _| Answer::Silence);
    let begin = std::time::Instant::now();
    let words = ["--api-socket", peer.socket.to_str().unwrap(), "boot", "--timeout", "1"];
    let error = perform(&args(&words), false).unwrap_err().to_string();
    assert!(
        error.contains("no reply to vm.boot within 1 s") && error.contains("--timeout SECONDS"),
        "{error}"
    );
    assert!(begin.elapsed() < Duration::from_secs(8), "{:?}", begin.elapsed());
}
