//! The client against a server that answers the bytes of the contract.

use std::io::{Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;

use super::peer::{Answer, Peer, Scratch, reply};
use super::*;

const PATIENCE: Option<Duration> = Some(Duration::from_secs(10));

/// A server that always answers this, and a client of it.
fn answering(answer: impl Fn() -> Answer + Clone + Send + 'static) -> (Scratch, Peer, Client) {
    let scratch = Scratch::new();
    let peer = Peer::serve(&scratch.path("api.sock"), move |_, _| answer());
    let client = Client::new(&peer.socket, PATIENCE);
    (scratch, peer, client)
}

fn bytes(text: &str) -> impl Fn() -> Answer + Clone + Send + 'static {
    let bytes = text.as_bytes().to_vec();
    move || Answer::Bytes(bytes.clone())
}

#[test]
fn a_body_is_as_long_as_its_content_length_though_the_connection_stays_open() {
    let body = r#"{"build_version":"v0.1.0","pid":7}"#;
    let (_scratch, peer, client) = answering(move || Answer::Bytes(reply(200, body)));
    let reply = client.send(&Request::api_get("vmm.ping"), &[]).unwrap();
    assert_eq!((reply.status, reply.text().as_ref()), (200, body));
    let arrived = peer.next();
    assert_eq!(arrived.line, "GET /api/v1/vmm.ping");
    assert!(!arrived.head.contains("Content-Length") && arrived.head.contains("Host: localhost"));
}

#[test]
fn a_204_has_no_body_and_a_200_may_have_an_empty_one() {
    for status in [200, 204] {
        let (_scratch, peer, client) = answering(move || Answer::Bytes(reply(status, "")));
        let reply = client.send(&Request::api_put("vm.boot", None), &[]).unwrap();
        assert_eq!((reply.status, reply.body.len()), (status, 0));
        let arrived = peer.next();
        assert_eq!((arrived.line.as_str(), arrived.body.as_str()), ("PUT /api/v1/vm.boot", ""));
    }
}

#[test]
fn a_reply_may_come_in_pieces_after_a_provisional_one_and_with_other_letters_in_its_fields() {
    let text = "HTTP/1.1 100 \r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n[\"a\"";
    let scratch = Scratch::new();
    let listener = UnixListener::bind(scratch.path("s")).unwrap();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        for byte in text.bytes() {
            stream.write_all(&[byte]).unwrap();
            std::thread::sleep(Duration::from_micros(200));
        }
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
    });
    let reply = Client::new(scratch.path("s"), PATIENCE).send(&Request::get("/metrics"), &[]).unwrap();
    assert_eq!(reply.text(), "[\"a\"");
    server.join().unwrap();
}

#[test]
fn a_body_without_a_length_reaches_to_the_end_of_the_connection() {
    let (_scratch, _peer, client) =
        answering(|| Answer::Last(b"HTTP/1.1 200 \r\nContent-Type: text/plain\r\n\r\na 1\n# EOF\n".to_vec()));
    assert_eq!(client.send(&Request::get("/metrics"), &[]).unwrap().text(), "a 1\n# EOF\n");
}

#[test]
fn the_error_chain_is_said_outermost_first_on_one_line() {
    let body = r#"["Error from API","The VM could not boot","VM config is missing"]"#;
    let (_scratch, _peer, client) = answering(move || Answer::Bytes(reply(500, body)));
    let error = client.send(&Request::api_put("vm.boot", None), &[]).unwrap_err();
    let text = error.to_string();
    assert!(text.ends_with("vm.boot: Error from API: The VM could not boot: VM config is missing"), "{text}");
    assert!(text.contains("api.sock") && !text.contains('\n'), "{text}");
    assert!(matches!(error, ClientError::Api { status: 500, chain, .. } if chain.len() == 3));
}

#[test]
fn errors_without_the_apis_form_are_said_too() {
    for (status, body, expected) in [
        (400, "", "vm.x: refused with status 400; this VMM does not take such a request"),
        (404, r#"["Not Found"]"#, "vm.x: Not Found; this VMM has no such call"),
        (404, r#"["VM is not created"]"#, "vm.x: VM is not created"),
        (429, r#"["Too Many Requests"]"#, "vm.x: Too Many Requests; try again in a moment"),
        (500, "no\nJSON", "vm.x: no JSON"),
    ] {
        let (_scratch, _peer, client) = answering(move || Answer::Bytes(reply(status, body)));
        let text = client.send(&Request::api_put("vm.x", None), &[]).unwrap_err().to_string();
        assert!(text.contains(expected), "{text}");
    }
}

#[test]
fn what_is_no_reply_is_refused_with_its_cause() {
    for (text, expected) in [
        ("220 mail.example ESMTP\r\n", "it is no HTTP"),
        ("HTTP/1.1 200 \r\nTransfer-Encoding: chunked\r\n\r\n4\r\nabcd\r\n0\r\n\r\n", "Transfer-Encoding"),
        ("HTTP/1.1 200 \r\nContent-Length: -1\r\n\r\n", "Content-Length is '-1'"),
        ("HTTP/1.1 200 \r\nContent-Length: 99999999999\r\n\r\n", "Content-Length is '99999999999'"),
    ] {
        let (_scratch, _peer, client) = answering(bytes(text));
        let error = client.get("vm.info").unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("is this the socket of a VMM?"), "{error}");
    }
}

#[test]
fn a_reply_that_is_cut_off_is_an_error() {
    for text in ["", "HTTP/1.1 20", "HTTP/1.1 200 \r\nContent-Length: 5\r\n\r\nabc"] {
        let (_scratch, _peer, client) = answering(move || Answer::Last(text.as_bytes().to_vec()));
        let error = client.get("vm.info").unwrap_err();
        assert!(matches!(error, ClientError::Closed { .. }), "{error}");
    }
}

#[test]
fn a_vmm_that_says_nothing_or_too_little_costs_no_more_than_the_timeout() {
    let (_scratch, _peer, client) = answering(|| Answer::Silence);
    let client = Client::new(client.socket(), Some(Duration::from_millis(200)));
    let begin = Instant::now();
    let error = client.get("vm.power").unwrap_err().to_string();
    assert!(error.contains("no reply to vm.power within 0.2 s"), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());

    // Bytes that trickle in do not make it longer.
    let scratch = Scratch::new();
    let listener = UnixListener::bind(scratch.path("s")).unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        while stream.write_all(b"HTTP/1.1 100 \r\n\r\n").is_ok() {
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    let begin = Instant::now();
    let client = Client::new(scratch.path("s"), Some(Duration::from_millis(300)));
    assert!(matches!(client.get("/"), Err(ClientError::TimedOut { .. })));
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
}

#[test]
fn a_full_queue_of_connections_costs_no_more_than_the_timeout() {
    let scratch = Scratch::new();
    let listener = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    rustix::net::bind(&listener, &SocketAddrUnix::new(scratch.path("s")).unwrap()).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let client = Client::new(scratch.path("s"), Some(Duration::from_millis(100)));
    let mut waiting = Vec::new();
    for _ in 0..3 {
        let deadline = Deadline(Some(Instant::now() + Duration::from_millis(100)));
        waiting.push(client.connect(deadline));
    }
    assert!(waiting.iter().any(Result::is_err), "the queue took them all");
    assert!(matches!(client.get("/"), Err(ClientError::TimedOut { .. })));
}

#[test]
fn a_missing_a_stale_and_a_foreign_socket_are_told_apart_with_what_to_do() {
    let scratch = Scratch::new();
    let error = |name: &str| {
        let client = Client::new(scratch.path(name), PATIENCE);
        let error = client.get("vmm.ping").unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
        error
    };
    let missing = error("missing");
    assert!(missing.contains("there is no such socket; start the VMM with --api-socket"), "{missing}");
    drop(UnixListener::bind(scratch.path("stale")).unwrap());
    assert!(error("stale").contains("the VMM has ended; remove this socket"));
    scratch.write("plain", "");
    assert!(error("plain").contains("nobody listens"));
    let long = error(&"x".repeat(200));
    assert!(long.contains("at most 107 bytes"), "{long}");
}

#[test]
fn descriptors_go_with_the_whole_request_in_one_message() {
    let (scratch, peer, client) = answering(|| Answer::Bytes(reply(204, "")));
    scratch.write("first", "1");
    scratch.write("second", "2");
    let files = ["first", "second"].map(|name| std::fs::File::open(scratch.path(name)).unwrap());
    let fds: Vec<OwnedFd> = files.iter().map(|file| own(file.as_raw_fd()).unwrap()).collect();
    client.send(&Request::api_put("vm.add-net", Some("{}".to_owned())), &fds).unwrap();
    let arrived = peer.next();
    assert_eq!(arrived.first.0, arrived.first.1, "more than one message");
    let texts = arrived.fds.into_iter().map(|fd| {
        let mut file = std::fs::File::from(fd);
        file.rewind().unwrap();
        std::io::read_to_string(file).unwrap()
    });
    assert_eq!(texts.collect::<Vec<_>>(), ["1", "2"]);
}

#[test]
fn a_body_that_fills_the_socket_arrives_whole_and_its_descriptor_once() {
    let (_scratch, peer, client) = answering(|| Answer::Bytes(reply(204, "")));
    let body = format!("\"{}\"", "x".repeat(3 << 20));
    let fds = [own(0).unwrap()];
    client.send(&Request::api_put("vm.create", Some(body.clone())), &fds).unwrap();
    let arrived = peer.next();
    assert_eq!((arrived.body.len(), arrived.fds.len()), (body.len(), 1));
}

#[test]
fn a_number_without_an_open_file_is_named_with_the_remedy() {
    let error = own(999_999).unwrap_err().to_string();
    assert!(error.contains("fd=999999") && error.contains("leave it open"), "{error}");
}

#[test]
fn more_descriptors_than_the_kernel_takes_are_refused() {
    let (_scratch, _peer, client) = answering(|| Answer::Bytes(reply(204, "")));
    let fds: Vec<OwnedFd> = (0..254).map(|_| own(0).unwrap()).collect();
    let error = client.send(&Request::api_put("vm.add-net", None), &fds).unwrap_err().to_string();
    assert!(error.contains("253 at most"), "{error}");
}

#[test]
fn an_answer_before_the_whole_request_was_taken_is_heard() {
    let scratch = Scratch::new();
    let listener = UnixListener::bind(scratch.path("s")).unwrap();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut some = [0; 10];
        stream.read_exact(&mut some).unwrap();
        stream.write_all(&reply(400, r#"["too long"]"#)).unwrap();
        stream.shutdown(std::net::Shutdown::Read).unwrap();
        std::thread::sleep(Duration::from_millis(300));
    });
    let body = "x".repeat(8 << 20);
    let client = Client::new(scratch.path("s"), PATIENCE);
    let error = client.send(&Request::api_put("vm.create", Some(body)), &[]).unwrap_err().to_string();
    assert!(error.contains("vm.create: too long"), "{error}");
    server.join().unwrap();
}
