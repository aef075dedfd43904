//! What endpoints answer to right and wrong requests, and that neither slow nor busy nor broken clients harm the VMM.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use serde_json::json;

use super::Access;
use super::routes;
use super::testing::{Client, Server};

/// Clients that the server takes at a time.
const CLIENTS: usize = 10;

fn connected() -> (Server, Client) {
    let server = Server::start(Access::Full);
    let client = server.client();
    (server, client)
}

#[test]
fn ping_says_who_is_there() {
    let (_server, mut client) = connected();
    let ping = client.call("GET /api/v1/vmm.ping").json();
    assert_eq!(ping["version"], "54.0.0");
    assert_eq!(ping["pid"], std::process::id());
    assert!(
        ping["build_version"].as_str().unwrap().starts_with("v54.0.0-"),
        "clients read the number before the dash"
    );
    assert_eq!(ping["features"], json!(["kvm"]));
}

#[test]
fn an_endpoint_has_one_method() {
    let (server, mut client) = connected();
    for (method, path) in routes::all() {
        let known = READS.iter().any(|name| path.ends_with(name)) || path == "/metrics";
        assert_eq!(method == "get", known, "{path}");
        let other = if method == "get" { "PUT" } else { "GET" };
        let answer = client.call(&format!("{other} {path}"));
        assert_eq!((answer.status, answer.body.as_str()), (400, "[\"Bad Request\"]"), "{path}");
    }
    assert!(server.taken().is_empty());
}

const READS: [&str; 4] = ["vmm.ping", "vm.info", "vm.counters", "vm.power"];
const PLAIN: [&str; 9] = [
    "vmm.shutdown",
    "vm.boot",
    "vm.delete",
    "vm.shutdown",
    "vm.reboot",
    "vm.pause",
    "vm.resume",
    "vm.power-button",
    "vm.nmi",
];
const BODIES: [&str; 8] = [
    "vm.add-net",
    "vm.create",
    "vm.resize",
    "vm.add-device",
    "vm.remove-device",
    "vm.power-policy",
    "vm.power-wake",
    "vm.power-reset",
];

#[test]
fn endpoints_without_a_body_refuse_one_and_endpoints_with_one_need_it() {
    let (server, mut client) = connected();
    for name in PLAIN {
        let answer = client.put(name, "{}");
        assert_eq!((answer.status, answer.body.as_str()), (400, "[\"Bad Request\"]"), "{name}");
    }
    for name in BODIES {
        let answer = client.call(&format!("PUT /api/v1/{name}"));
        assert_eq!(answer.status, 400, "{name}");
        assert_eq!(answer.json()[0], "Error from API", "{name}");
    }
    assert!(server.taken().is_empty());
}

#[test]
fn bodies_of_the_wrong_form_are_refused_with_a_reason_and_nothing_is_done() {
    let (server, mut client) = connected();
    let deep = format!("{}{}", "[".repeat(5000), "]".repeat(5000));
    let deep_inside = format!("{{\"disks\":{deep}}}");
    for name in BODIES {
        for body in [
            "{",
            "[]",
            "1",
            "\"x\"",
            "null",
            "\u{7f}",
            "{\"id\":1}",
            "{\"id\":{}}",
            &deep,
            &deep_inside,
            "{}{}",
            "{} x",
        ] {
            let answer = client.put(name, body);
            // A resize of nothing is one that can be done, and of an empty array too.
            if name == "vm.resize" && (body == "[]" || body.starts_with("{\"id\"")) {
                continue;
            }
            if name == "vm.create" && body.starts_with("{\"id\"") {
                continue;
            }
            assert_eq!(answer.status, 400, "{name} {body:.40}: {}", answer.body);
            let messages = answer.json();
            assert!(messages.as_array().unwrap().len() > 2, "{name} {body:.40}: {messages}");
            assert!(messages.as_array().unwrap().iter().all(serde_json::Value::is_string), "{messages}");
        }
    }
    for body in [
        r#"{"cpus":{"boot_vcpus":-1,"max_vcpus":1}}"#,
        r#"{"cpus":{"boot_vcpus":1.5,"max_vcpus":1}}"#,
        r#"{"cpus":{"boot_vcpus":4294967296,"max_vcpus":1}}"#,
        r#"{"memory":{"size":"512M"}}"#,
        r#"{"memory":{"size":99999999999999999999999}}"#,
        r#"{"serial":{"mode":"tty"}}"#,
        r#"{"devices":{"path":"/sys"}}"#,
        r#"{"payload":[]}"#,
    ] {
        let answer = client.put("vm.create", body);
        assert_eq!(answer.status, 400, "{body}: {}", answer.body);
    }
    let invalid = b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 4\r\n\r\n{\"\xff\"";
    client.send(invalid);
    assert_eq!(client.answer().status, 400);
    assert!(server.taken().iter().all(|order| order.starts_with("Resize") || order.starts_with("Create")));
}

#[test]
fn null_is_the_same_as_absent_and_unknown_fields_are_ignored() {
    let (_server, mut client) = connected();
    assert_eq!(client.put("vm.create", "{}").status, 204);
    let plain = client.call("GET /api/v1/vm.info").json();
    let body = json!({
        "cpus": null, "memory": null, "payload": null, "devices": null, "platform": null, "disks": null,
        "serial": null, "console": null, "rng": null, "tdx": false, "poll_queue": true, "unheard_of": {"a": [1]},
    });
    assert_eq!(client.put("vm.create", &body.to_string()).status, 204);
    assert_eq!(client.call("GET /api/v1/vm.info").json(), plain);
    let body = json!({
        "cpus": {"boot_vcpus": 1, "max_vcpus": 1, "affinity": null, "new": 1},
        "memory": {"size": 536_870_912, "hotplug_size": null, "zones": null},
        "serial": {"mode": "Null", "iommu": false, "file": null},
        "platform": null,
    });
    assert_eq!(client.put("vm.create", &body.to_string()).status, 204);
    assert_eq!(client.call("GET /api/v1/vm.info").json(), plain);
    assert_eq!(client.put("vm.resize", r#"{"desired_vcpus":null,"other":1}"#).status, 204);
}

#[test]
fn the_configuration_reads_back_with_what_kata_and_libvirt_look_for() {
    let (_server, mut client) = connected();
    let body = json!({
        "payload": {"kernel": "/k", "cmdline": "console=ttyS0", "initramfs": "/i"},
        "cpus": {"boot_vcpus": 2, "max_vcpus": 4, "topology": {"threads_per_core": 1, "cores_per_die": 4, "dies_per_package": 1, "packages": 1}},
        "memory": {"size": 2_147_483_648_u64, "shared": true, "hotplug_size": 1_073_741_824_u64, "hotplug_method": "Acpi"},
        "platform": {"num_pci_segments": 2, "iommu_segments": [0], "serial_number": null, "uuid": null},
        "serial": {"mode": "Tty", "iommu": false}, "console": {"mode": "Off", "iommu": false},
        "rng": {"src": "/dev/urandom", "iommu": false},
        "devices": [{"path": "/sys/bus/pci/devices/0000:01:00.0/", "iommu": false, "id": "gpu"}],
        "net": [{"ip": "192.168.249.1", "mask": "255.255.255.0", "mac": "02:00:00:00:00:01"}],
    });
    assert_eq!(client.put("vm.create", &body.to_string()).status, 204);
    let info = client.call("GET /api/v1/vm.info").json();
    assert_eq!(info["state"], "Created");
    assert_eq!(info["memory_actual_size"], 2_147_483_648_u64);
    assert!(info.get("device_tree").is_none(), "there is no machine yet");
    let config = &info["config"];
    assert_eq!((&config["serial"]["mode"], &config["console"]["mode"]), (&json!("Tty"), &json!("Off")));
    assert_eq!((&config["cpus"]["boot_vcpus"], &config["cpus"]["max_vcpus"]), (&json!(2), &json!(4)));
    assert_eq!(config["cpus"]["max_phys_bits"], 46);
    assert_eq!(config["rng"]["src"], "/dev/urandom");
    assert_eq!(config["payload"], body["payload"]);
    assert_eq!(config["devices"][0]["path"], "/sys/bus/pci/devices/0000:01:00.0/");
    for key in ["ip", "mask", "mac"] {
        assert_eq!(config["net"][0][key], body["net"][0][key]);
    }
    assert!(config["net"][0].get("fds").is_none());
    assert_eq!(config["platform"]["num_pci_segments"], 2);
    assert!(config["devices"][0].get("iommu").is_none(), "false is omitted");
    assert_eq!(config["devices"][0]["pci_segment"], 0, "and this is always shown");
}

#[test]
fn a_network_device_gets_its_link_address_at_once_and_the_files_that_came_with_it() {
    let (_server, mut client) = connected();
    assert_eq!(client.put("vm.create", "{}").status, 204);
    let (_reader, writer) = std::io::pipe().unwrap();
    // As Kata Containers and libvirt do it: everything in one message.
    let body = r#"{"id":"net_0","num_queues":4,"queue_size":256,"fds":null,"vhost_mode":"Client"}"#;
    let request = format!("PUT /api/v1/vm.add-net HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    client.send_with(request.as_bytes(), &[writer.as_fd(), writer.as_fd()]);
    assert_eq!(client.answer().status, 204);
    let net = &client.call("GET /api/v1/vm.info").json()["config"]["net"][0];
    assert_eq!((&net["id"], &net["fds"]), (&json!("net_0"), &json!([-1, -1])));
    assert_eq!(net["mac"].as_str().unwrap().len(), 17, "{net}");
    assert!(net.get("ip").is_none() && net.get("mask").is_none(), "there is no default address");
}

#[test]
fn errors_are_arrays_of_messages_from_the_outside_in() {
    let (_server, mut client) = connected();
    let answer = client.call("GET /api/v1/vm.info");
    let expected = json!(["Error from API", "The VM info is not available", "VM is not created"]);
    assert_eq!((answer.status, answer.json()), (404, expected));
    let answer = client.call("GET /api/v1/vm.counters");
    assert_eq!((answer.status, &answer.json()[2]), (500, &json!("VM is not running")));
    let answer = client.put("vm.add-vdpa", r#"{"path":"/x"}"#);
    let message = answer.json()[2].as_str().unwrap().to_owned();
    assert_eq!(answer.status, 500);
    assert!(message.contains("vDPA is not in Dormouse yet; see docs/compatibility.md"), "{message}");
    for name in ["vm.power-wake", "vm.power-reset"] {
        assert_eq!(client.put(name, r#"{"id":"none"}"#).status, 404, "{name}");
    }
}

#[test]
fn a_policy_needs_a_device_and_knows_its_fields() {
    let (server, mut client) = connected();
    for wrong in [r#"{"power":"off"}"#, r#"{"id":"a","power":"sometimes"}"#, r#"{"id":"a","pwoer":"off"}"#] {
        assert_eq!(client.put("vm.power-policy", wrong).status, 400, "{wrong}");
    }
    assert!(server.taken().is_empty());
    assert_eq!(client.put("vm.power-policy", r#"{"id":"a","power":"off"}"#).status, 204);
    assert_eq!(server.taken().len(), 1);
}

#[test]
fn the_status_socket_changes_nothing_and_the_metrics_socket_shows_only_metrics() {
    let server = Server::start(Access::ReadOnly);
    let mut client = server.client();
    for name in PLAIN {
        let answer = client.call(&format!("PUT /api/v1/{name}"));
        assert_eq!(answer.status, 403, "{name}");
        assert!(answer.json()[0].as_str().unwrap().contains("--api-socket"));
    }
    for name in BODIES {
        assert_eq!(client.put(name, "{}").status, 403, "{name}");
    }
    for (request, status) in [("vmm.ping", 200), ("vm.info", 404), ("vm.power", 404), ("vm.counters", 500)] {
        assert_eq!(client.call(&format!("GET /api/v1/{request}")).status, status);
    }
    assert_eq!(client.call("GET /metrics").status, 200);
    assert!(server.taken().is_empty());

    let server = Server::start(Access::Metrics);
    let mut client = server.client();
    assert_eq!(client.call("GET /metrics").status, 200);
    for request in
        ["GET /api/v1/vmm.ping", "GET /api/v1/vm.info", "PUT /api/v1/vm.pause", "PUT /api/v1/vmm.shutdown"]
    {
        assert_eq!(client.call(request).status, 404, "{request}");
    }
    assert!(server.taken().is_empty());
}

#[test]
fn metrics_are_openmetrics_with_an_end() {
    let (_server, mut client) = connected();
    let answer = client.call("GET /metrics");
    assert!(
        answer.head.contains("Content-Type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n")
    );
    assert!(answer.body.ends_with("# EOF\n"), "{}", answer.body);
    assert!(answer.body.contains("dormouse_build_info{"), "{}", answer.body);
    assert!(answer.body.contains("# UNIT dormouse_uptime_seconds seconds"), "{}", answer.body);
}

#[test]
fn the_eleventh_client_is_turned_away_and_the_others_are_served() {
    let server = Server::start(Access::Full);
    let mut clients: Vec<Client> = (0..CLIENTS).map(|_| server.client()).collect();
    for client in &mut clients {
        assert_eq!(client.call("GET /api/v1/vmm.ping").status, 200);
    }
    let mut eleventh = server.client();
    let answer = eleventh.answer();
    assert!(answer.head.starts_with("HTTP/1.1 503\r\n"), "{}", answer.head);
    assert!(answer.head.contains("Connection: close\r\n"), "{}", answer.head);
    assert_eq!(answer.json()["error"], "Too many open connections");
    assert!(eleventh.closed());
    for client in &mut clients {
        assert_eq!(client.call("GET /api/v1/vmm.ping").status, 200);
    }
    drop(clients);
    server.admitted();
}

#[test]
fn nine_slow_clients_do_not_hold_up_the_tenth() {
    let server = Server::start(Access::Full);
    let mut slow: Vec<Client> = (1..CLIENTS).map(|_| server.client()).collect();
    let request = "PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}";
    for (number, client) in slow.iter_mut().enumerate() {
        // Each stops somewhere else: in the request line, in a header, in the body.
        client.send(&request[..(number + 1) * 5]);
    }
    let mut quick = server.client();
    for _ in 0..200 {
        let begin = Instant::now();
        assert_eq!(quick.call("GET /api/v1/vmm.ping").status, 200);
        assert!(begin.elapsed() < Duration::from_secs(1), "a ping took {:?}", begin.elapsed());
    }
    for (number, client) in slow.iter_mut().enumerate() {
        client.send(&request[(number + 1) * 5..]);
        assert_eq!(client.answer().status, 204);
    }
}

#[test]
fn a_client_that_does_not_read_its_answers_holds_up_nobody_else() {
    let server = Server::start(Access::Full);
    let mut greedy = server.client();
    greedy.stream.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
    let requests = "GET /metrics HTTP/1.1\r\n\r\n".repeat(100_000);
    let sent = std::io::Write::write_all(&mut greedy.stream, requests.as_bytes());
    assert!(sent.is_err(), "the server has stopped reading what it cannot answer");
    let mut other = server.client();
    assert_eq!(other.call("GET /api/v1/vmm.ping").status, 200);
}

/// Runs a test that measures memory in a process of its own, where no other test allocates.
fn alone(name: &str, test: fn()) {
    const ALONE: &str = "DORMOUSE_TEST_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return test();
    }
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "--nocapture", &format!("api::tests::{name}")]).env(ALONE, "1");
    let output = command.output().unwrap();
    let text =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

#[test]
fn a_hundred_thousand_requests_in_a_row_take_no_memory() {
    alone("a_hundred_thousand_requests_in_a_row_take_no_memory", hundred_thousand);
}

fn hundred_thousand() {
    const ROUNDS: usize = 100_000;
    let (server, mut client) = connected();
    assert_eq!(client.put("vm.create", "{}").status, 204);
    let mixed = [
        "GET /api/v1/vmm.ping HTTP/1.1\r\n\r\n",
        "GET /api/v1/vm.info HTTP/1.1\r\n\r\n",
        "GET /api/v1/vm.counters HTTP/1.1\r\n\r\n",
        "PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 9\r\n\r\n{\"cpus\":1",
        "POST /api/v1/vm.create HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}",
    ];
    let expected = [200, 200, 500, 400, 400];
    let mut run = |rounds: usize| {
        for round in 0..rounds {
            let turn = round % mixed.len();
            client.send(mixed[turn]);
            assert_eq!(client.answer().status, expected[turn]);
        }
    };
    run(1000);
    let before = resident();
    run(ROUNDS);
    let grown = resident().saturating_sub(before);
    assert!(grown < 2 << 20, "{grown} bytes more than before");
    assert_eq!(server.taken().len(), 1, "and nothing was done");
}

#[test]
fn ten_clients_with_large_bodies_leave_no_memory_behind() {
    alone("ten_clients_with_large_bodies_leave_no_memory_behind", large_bodies);
}

fn large_bodies() {
    crate::heap::keep_little();
    let server = Server::start(Access::Full);
    let body = format!("{{\"a\":[{}0]}}", "0,".repeat(1 << 20));
    let before = resident();
    for _ in 0..3 {
        let clients = (0..CLIENTS).map(|_| {
            let (mut client, body) = (server.client(), body.clone());
            std::thread::spawn(move || {
                let status = client.put("vm.resize-zone", &body).status;
                assert!(status == 500 || status == 503, "{status}");
            })
        });
        for client in clients.collect::<Vec<_>>() {
            client.join().unwrap();
        }
    }
    let deadline = Instant::now() + Duration::from_secs(10);
    while resident().saturating_sub(before) > 8 << 20 {
        assert!(Instant::now() < deadline, "{} bytes more than before", resident() - before);
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Resident memory of this process that is not of files, in bytes.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<usize>().unwrap() << 10
}
