//! The framing that Cloud Hypervisor's clients depend on, byte by byte, over a real socket.

use std::os::fd::AsFd;

use crate::api::Access;
use crate::api::testing::{Client, Server};

fn connected() -> (Server, Client) {
    let server = Server::start(Access::Full);
    let client = server.client();
    (server, client)
}

const PING: &str = "GET /api/v1/vmm.ping HTTP/1.1\r\nHost: localhost\r\n\r\n";
const NO_ROUTE: &str = "HTTP/1.1 404 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n\
    Content-Type: application/json\r\nContent-Length: 13\r\n\r\n[\"Not Found\"]";
const DONE: &str = "HTTP/1.1 204 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n\r\n";

#[test]
fn a_reply_with_a_body_is_byte_for_byte_what_clients_know() {
    let (_server, mut client) = connected();
    let answer = client.call("GET /api/v1/none");
    assert_eq!(format!("{}{}", answer.head, answer.body), NO_ROUTE);
}

#[test]
fn a_204_has_neither_type_nor_length_and_another_empty_reply_says_length_0() {
    let (_server, mut client) = connected();
    assert_eq!(client.call("PUT /api/v1/vm.pause").head, DONE);
    assert_eq!(
        client.call("PUT /api/v1/vmm.shutdown").head,
        "HTTP/1.1 200 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\nContent-Length: 0\r\n\r\n"
    );
    let answer = client.call("DELETE /api/v1/vm.delete");
    assert_eq!(
        answer.head,
        "HTTP/1.1 400 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\nContent-Length: 0\r\n\r\n"
    );
}

#[test]
fn the_status_line_has_no_reason_phrase_whatever_the_status() {
    let (_server, mut client) = connected();
    for (request, status) in [
        ("GET /api/v1/vmm.ping", "200"),
        ("PUT /api/v1/vm.resume", "204"),
        ("PUT /api/v1/vmm.ping", "400"),
        ("GET /api/v1/vm.info", "404"),
        ("GET /api/v1/vm.counters", "500"),
        ("GET /metrics", "200"),
    ] {
        let head = client.call(request).head;
        assert!(head.starts_with(&format!("HTTP/1.1 {status} \r\n")), "{request}: {head}");
        assert!(head.contains("\r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n"), "{head}");
    }
}

#[test]
fn a_connection_is_kept_whatever_the_client_says_of_it() {
    let (_server, mut client) = connected();
    for _ in 0..3 {
        client.send("GET /api/v1/vmm.ping HTTP/1.1\r\nConnection: close\r\n\r\n");
        assert_eq!(client.answer().status, 200);
        client.send("GET /api/v1/none HTTP/1.0\r\n\r\n");
        let answer = client.answer();
        assert_eq!(format!("{}{}", answer.head, answer.body), NO_ROUTE, "HTTP/1.0 is answered as 1.1");
    }
}

#[test]
fn pipelined_requests_are_answered_in_their_order() {
    let (server, mut client) = connected();
    let pause = "PUT /api/v1/vm.pause HTTP/1.1\r\nContent-Length: 0\r\n\r\n";
    let create = "PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}";
    client.send([PING, create, "GET /api/v1/none HTTP/1.1\r\n\r\n", pause, PING].concat());
    let statuses: Vec<u16> = (0..5).map(|_| client.answer().status).collect();
    assert_eq!(statuses, [200, 204, 404, 204, 200]);
    assert!(client.is_quiet());
    assert_eq!(server.taken().len(), 2);
}

#[test]
fn a_request_may_arrive_byte_by_byte() {
    let (_server, mut client) = connected();
    for byte in b"PUT /api/v1/vm.create HTTP/1.1\r\ncontent-LENGTH: 2\r\n\r\n{}" {
        client.send([*byte]);
    }
    assert_eq!(client.answer().head, DONE);
}

#[test]
fn an_absolute_target_is_its_path() {
    let (_server, mut client) = connected();
    assert_eq!(client.call("GET http://localhost/api/v1/vmm.ping").status, 200);
    assert_eq!(client.call("GET http://localhost").status, 404);
    assert_eq!(client.call("GET http://localhost/").status, 404);
}

#[test]
fn a_query_string_is_part_of_the_path_and_so_is_a_slash_at_the_end() {
    let (_server, mut client) = connected();
    for target in ["/api/v1/vmm.ping?a=b", "/api/v1/vmm.ping?", "/api/v1/vmm.ping/", "/api/v1/", "/", "*"] {
        let answer = client.call(&format!("GET {target}"));
        assert_eq!((answer.status, answer.body.as_str()), (404, "[\"Not Found\"]"), "{target}");
    }
}

#[test]
fn a_client_that_expects_it_is_told_to_continue_before_its_body() {
    let (server, mut client) = connected();
    client.send("PUT /api/v1/vm.create HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n");
    let interim = client.answer();
    assert_eq!(
        interim.head,
        "HTTP/1.1 100 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n\r\n"
    );
    assert!(server.taken().is_empty(), "nothing is done without the body");
    client.send("{}");
    assert_eq!(client.answer().head, DONE);
}

#[test]
fn an_expectation_without_a_body_is_answered_at_once() {
    let (_server, mut client) = connected();
    client.send("PUT /api/v1/vm.pause HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(client.answer().head, DONE);
}

#[test]
fn an_empty_chunked_upload_is_no_body() {
    // What `curl -T -` and older libvirt send for a PUT without a body.
    let (server, mut client) = connected();
    client.send("PUT /api/v1/vm.boot HTTP/1.1\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n");
    assert_eq!(client.answer().status, 100);
    client.send("0\r\n\r\n");
    assert_eq!(client.answer().head, DONE);
    client.send("PUT /api/v1/vm.boot HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n");
    assert_eq!(client.answer().head, DONE);
    assert_eq!(server.taken(), ["Boot", "Boot"]);
}

#[test]
fn a_chunked_body_is_put_together() {
    let (_server, mut client) = connected();
    let head = "PUT /api/v1/vm.create HTTP/1.1\r\nTransfer-Encoding: Chunked\r\n\r\n";
    client.send(format!(
        "{head}a;name=\"value\"\r\n{{\"cpus\":{{\"\r\n1c\r\nboot_vcpus\":3,\"max_vcpus\":3}}\r\n1\r\n}}\r\n0\r\nTrailer: x\r\n\r\n"
    ));
    assert_eq!(client.answer().head, DONE);
    let info = client.call("GET /api/v1/vm.info").json();
    assert_eq!(info["config"]["cpus"]["boot_vcpus"], 3);
}

#[test]
fn a_chunked_body_that_cannot_be_read_is_refused_and_the_connection_ended() {
    let endless = format!("{}\r\n", "0".repeat(2000));
    let trailers = format!("0\r\n{}", "a: b\r\n".repeat(100));
    let long_trailer = format!("0\r\n{}", "a".repeat(4000));
    for wrong in [
        "x\r\n",
        "-1\r\n",
        "2\r\n{}x\r\n",
        "ffffffffffffffff\r\n",
        "500000\r\n",
        &endless,
        &trailers,
        &long_trailer,
    ] {
        let (server, mut client) = connected();
        client.send("PUT /api/v1/vm.create HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n");
        client.send(wrong);
        let answer = client.answer();
        assert_eq!(answer.status, 400, "{wrong:?}");
        assert!(answer.json()["error"].is_string(), "{wrong:?}: {}", answer.body);
        assert!(client.closed() && server.taken().is_empty(), "{wrong:?}");
    }
}

#[test]
fn a_length_of_0_is_no_body() {
    let (server, mut client) = connected();
    assert_eq!(client.put("vm.pause", "").head, DONE);
    assert_eq!(server.taken(), ["Pause"]);
    assert_eq!(client.put("vm.create", "").status, 400);
}

#[test]
fn methods_that_no_endpoint_has_are_refused_before_the_endpoint_is_looked_at() {
    let (server, mut client) = connected();
    for method in ["POST", "HEAD", "OPTIONS", "get", "BREW"] {
        let answer = client.call(&format!("{method} /api/v1/vm.boot"));
        assert_eq!(answer.status, 400, "{method}");
        assert!(answer.json()["error"].is_string(), "{method}: an object, unlike errors of the API");
    }
    for method in ["PATCH", "DELETE"] {
        let answer = client.call(&format!("{method} /api/v1/vm.boot"));
        assert_eq!((answer.status, answer.body.as_str()), (400, ""), "{method}");
    }
    assert!(server.taken().is_empty());
}

#[test]
fn the_body_of_a_refused_method_is_not_taken_for_a_request() {
    let (server, mut client) = connected();
    let inside = "PUT /api/v1/vm.boot HTTP/1.1\r\n\r\n";
    client
        .send(format!("POST /api/v1/vm.create HTTP/1.1\r\nContent-Length: {}\r\n\r\n{inside}", inside.len()));
    assert_eq!(client.answer().status, 400);
    assert_eq!(client.call("GET /api/v1/vmm.ping").status, 200);
    assert!(server.taken().is_empty());
}

#[test]
fn lines_may_be_1024_bytes_long_and_no_longer() {
    let request = |length: usize| {
        let frame = "GET / HTTP/1.1".len();
        format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(length - frame))
    };
    let header =
        |length: usize| format!("GET / HTTP/1.1\r\nname: {}\r\n\r\n", "a".repeat(length - "name: ".len()));
    for make in [&request as &dyn Fn(usize) -> String, &header] {
        let (_server, mut client) = connected();
        client.send(make(1024));
        assert_eq!(client.answer().status, 404);
        client.send(make(1025));
        let answer = client.answer();
        assert_eq!(answer.status, 400);
        assert!(answer.json()["error"].as_str().unwrap().contains("1024"), "{}", answer.body);
        assert!(client.closed());
    }
}

#[test]
fn a_head_that_does_not_end_is_given_up() {
    let line = format!("{}: x\r\n", "a".repeat(1000));
    for (what, piece) in
        [("one line", "a"), ("lines", &line), ("empty lines", "\r\n"), ("short lines", "a: b\r\n")]
    {
        let (_server, mut client) = connected();
        if what != "empty lines" {
            client.send("GET / HTTP/1.1\r\n");
        }
        // More than any limit; the server stops reading before it is all sent.
        let much = piece.repeat((1 << 20) / piece.len());
        let _ = std::io::Write::write_all(&mut client.stream, much.as_bytes());
        let answer = client.answer();
        assert_eq!(answer.status, 400, "{what}");
        assert!(client.closed(), "{what}");
    }
}

#[test]
fn what_is_no_http_is_refused_and_the_connection_ended() {
    for wrong in [
        "\0\0\0\0\r\n\r\n",
        "GET\r\n\r\n",
        "GET / HTTP/9.9\r\n\r\n",
        "GET / HTTP/1.1\r\nno colon\r\n\r\n",
        "GET / HTTP/1.1\r\nname: \u{1}\r\n\r\n",
        "PUT / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        "PUT / HTTP/1.1\r\nContent-Length: 1x\r\n\r\n",
        "PUT / HTTP/1.1\r\nContent-Length:\r\n\r\n",
        "PUT / HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        "PUT / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        "PUT / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        "PUT / HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n",
    ] {
        let (_server, mut client) = connected();
        client.send(wrong);
        let answer = client.answer();
        assert_eq!(answer.status, 400, "{wrong:?}");
        assert!(answer.json()["error"].is_string(), "{wrong:?}: {}", answer.body);
        assert!(client.closed(), "{wrong:?}");
    }
}

#[test]
fn a_body_of_4_mib_is_read_and_a_longer_one_refused_without_an_end_to_the_connection() {
    const LIMIT: usize = 4 << 20;
    let (server, mut client) = connected();
    let body = |length: usize| format!("{{\"x\":\"{}\"}}", "y".repeat(length - 8));
    assert_eq!(client.put("vm.create", &body(LIMIT)).head, DONE);
    let answer = client.put("vm.create", &body(LIMIT + 1));
    assert_eq!(answer.status, 400);
    let error = answer.json()["error"].as_str().unwrap().to_owned();
    assert!(
        error.starts_with("Request payload with size 4194305 is larger than the limit of 4194304"),
        "{error}"
    );
    assert_eq!(client.call("GET /api/v1/vmm.ping").status, 200);
    assert_eq!(server.taken().len(), 1);
    // One that asks first is told before it sends.
    client.send(
        "PUT /api/v1/vm.create HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 99999999999\r\n\r\n",
    );
    assert_eq!(client.answer().status, 400);
    assert_eq!(client.call("GET /api/v1/vmm.ping").status, 200);
}

#[test]
fn a_client_that_breaks_off_in_the_middle_leaves_nothing_behind() {
    let request = "PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}";
    let server = Server::start(Access::Full);
    for length in 0..request.len() {
        let mut client = server.admitted();
        client.send(&request[..length]);
        drop(client);
    }
    let mut whole = server.admitted();
    assert_eq!(whole.call("GET /api/v1/vmm.ping").status, 200);
    assert!(server.taken().is_empty());
    assert_eq!(whole.call("GET /api/v1/vm.info").status, 404);
}

#[test]
fn half_a_request_before_the_clients_end_of_sending_is_no_request() {
    let (server, mut client) = connected();
    client.send("PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 20\r\n\r\n{}");
    client.stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert!(client.closed());
    assert!(server.taken().is_empty());
}

#[test]
fn descriptors_for_an_endpoint_that_takes_none_are_refused_and_closed() {
    let (server, mut client) = connected();
    let (reader, writer) = std::io::pipe().unwrap();
    client.send_with(b"PUT /api/v1/vm.pause HTTP/1.1\r\n\r\n", &[writer.as_fd()]);
    let answer = client.answer();
    assert_eq!(answer.status, 400);
    assert!(answer.json()[0].as_str().unwrap().contains("1 file descriptors"), "{}", answer.body);
    drop(writer);
    // The server's copy was the last: the pipe is at its end.
    assert_eq!(std::io::Read::read(&mut &reader, &mut [0]).unwrap(), 0);
    assert!(server.taken().is_empty());
    assert_eq!(client.call("GET /api/v1/vmm.ping").status, 200);
}

#[test]
fn descriptors_belong_to_the_request_whose_bytes_they_came_with() {
    let (_server, mut client) = connected();
    let (_reader, writer) = std::io::pipe().unwrap();
    client.send("PUT /api/v1/vm.add-net HTTP/1.1\r\nContent-Length: 2\r\n\r\n");
    client.send_with(b"{}", &[writer.as_fd()]);
    assert_eq!(client.answer().status, 204, "taken with the request");
    assert_eq!(client.call("PUT /api/v1/vm.pause").status, 204, "none is left for the next one");
}

#[test]
fn more_descriptors_than_one_request_can_have_end_the_connection() {
    let (_server, mut client) = connected();
    let (_reader, writer) = std::io::pipe().unwrap();
    let many = vec![writer.as_fd(); 200];
    client.send_with(b"PUT /api/v1/vm.pause", &many);
    client.send_with(b" HTTP/1.1\r\n\r\n", &many);
    let answer = client.answer();
    assert_eq!(answer.status, 400);
    assert_eq!(answer.json()["error"], "Too many file descriptors.");
    assert!(client.closed());
}

#[test]
fn headers_that_nobody_here_needs_are_ignored() {
    let (_server, mut client) = connected();
    client.send(
        "PUT /api/v1/vm.create HTTP/1.1\r\nHost: \r\nContent-Type: image/png\r\nAccept: text/html\r\n\
         X-Odd:\r\nAccept-Encoding: br\r\nContent-Length: 2\r\n\r\n{}",
    );
    assert_eq!(client.answer().head, DONE);
}
