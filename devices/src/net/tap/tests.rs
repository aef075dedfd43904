//! Tests with real taps, in a network namespace of their own; they need root and `/dev/net/tun`, and are skipped by name without.

use std::io::{ErrorKind, Write};
use std::process::Command;

use super::*;

/// Runs the test named `name` again, in a network namespace of its own. `true` in there.
fn in_namespace(name: &str) -> bool {
    const INSIDE: &str = "DORMOUSE_TEST_NAMESPACE";
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let usable = rustix::process::geteuid().is_root() && File::open(TUN).is_ok();
    if !usable {
        eprintln!("SKIPPED {name}: it needs root and {TUN}");
        return false;
    }
    let output = Command::new("unshare")
        .args(["--net", "--"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", &format!("net::tap::tests::{name}"), "--nocapture"])
        .env(INSIDE, "1")
        .output()
        .unwrap();
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
    false
}

fn ip(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split_whitespace()).output().unwrap();
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn named(name: &str) -> TapRequest {
    TapRequest { name: Some(name.to_owned()), pairs: 1, ..TapRequest::default() }
}

#[test]
fn a_tap_is_created_with_everything_that_was_asked_for() {
    if !in_namespace("a_tap_is_created_with_everything_that_was_asked_for") {
        return;
    }
    let request = TapRequest {
        ip: Some("10.1.2.3".parse().unwrap()),
        mask: Some("255.255.255.0".parse().unwrap()),
        mac: Some([2, 0, 0, 0, 0, 7]),
        mtu: Some(4000),
        ..named("dm0")
    };
    let tap = Tap::open(&request).unwrap();
    assert_eq!((tap.name(), tap.mac(), tap.mtu()), ("dm0", [2, 0, 0, 0, 0, 7], Some(4000)));
    let link = ip("-d addr show dm0");
    for part in ["10.1.2.3/24", "link/ether 02:00:00:00:00:07", "mtu 4000", ",UP", "vnet_hdr on"] {
        assert!(link.contains(part), "{part}: {link}");
    }
    assert!(matches!(Tap::open(&named("dm0")), Err(TapError::Attach { .. })), "it is in use");
    drop(tap);
    assert!(!ip("link").contains("dm0"), "it goes with the last file");
}

#[test]
fn a_tap_without_a_name_gets_one_and_ipv6_addresses_are_set_too() {
    if !in_namespace("a_tap_without_a_name_gets_one_and_ipv6_addresses_are_set_too") {
        return;
    }
    let address = |text: &str| Some(text.parse().unwrap());
    let request = TapRequest {
        name: None,
        pairs: 1,
        ip: address("fd00::5"),
        mask: address("ffff:ffff:ffff:ffff::"),
        ..TapRequest::default()
    };
    let (first, second) =
        (Tap::open(&request).unwrap(), Tap::open(&TapRequest { ip: None, ..request }).unwrap());
    assert_eq!((first.name(), second.name()), ("vmtap0", "vmtap1"));
    assert!(ip("-6 addr show vmtap0").contains("fd00::5/64"));
}

#[test]
fn a_tap_that_is_there_keeps_its_addresses_and_is_opened_as_it_was_created() {
    if !in_namespace("a_tap_that_is_there_keeps_its_addresses_and_is_opened_as_it_was_created") {
        return;
    }
    ip("tuntap add single mode tap");
    ip("addr add 10.0.0.1/24 dev single");
    ip("tuntap add several mode tap multi_queue");
    ip("tuntap add other mode tun");
    let request = TapRequest { ip: Some("10.9.9.9".parse().unwrap()), ..named("single") };
    drop(Tap::open(&request).unwrap());
    let addresses = ip("addr show single");
    assert!(addresses.contains("10.0.0.1/24") && !addresses.contains("10.9.9.9"), "{addresses}");

    let error = Tap::open(&TapRequest { pairs: 2, ..named("single") }).unwrap_err();
    assert!(matches!(error, TapError::SingleQueue { pairs: 2, .. }), "{error}");
    assert!(error.to_string().contains("multi_queue"), "{error}");
    let in_use = Tap::open(&named("single")).unwrap();
    let error = Tap::open(&TapRequest { pairs: 2, ..named("single") }).unwrap_err();
    assert!(
        matches!(error, TapError::SingleQueue { .. }),
        "in use, and the wrong kind all the same: {error}"
    );
    let error = Tap::open(&named("single")).unwrap_err().to_string();
    assert!(error.contains("single") && error.contains("another process uses"), "{error}");
    drop(in_use);
    for name in ["other", "lo"] {
        let error = Tap::open(&named(name)).unwrap_err();
        assert!(matches!(error, TapError::NoTap { .. }), "{name}: {error}");
    }
    assert_eq!(Tap::open(&named("several")).unwrap().files().len(), 1);
    assert_eq!(Tap::open(&TapRequest { pairs: 3, ..named("several") }).unwrap().files().len(), 3);
}

#[test]
fn a_tap_inherits_a_link_address_only_if_it_was_created_without_one() {
    if !in_namespace("a_tap_inherits_a_link_address_only_if_it_was_created_without_one") {
        return;
    }
    let old = Tap::open(&named("dm5")).unwrap();
    let known = old.fleeting_mac().unwrap();
    assert_eq!(known, old.mac());
    drop(old);
    let new = Tap::open(&named("dm5")).unwrap();
    assert_ne!(new.fleeting_mac(), Some(known), "the kernel chooses another one each time");
    new.inherit_mac(known).unwrap();
    assert_eq!(new.fleeting_mac(), Some(known), "it can be handed on once more");
    let text = known.map(|byte| format!("{byte:02x}")).join(":");
    let link = ip("link show dm5");
    assert!(link.contains(&format!("link/ether {text}")) && link.contains(",UP"), "{link}");

    let own = [2, 0, 0, 0, 0, 9];
    let given = Tap::open(&TapRequest { mac: Some(own), ..named("dm6") }).unwrap();
    ip("tuntap add dm7 mode tap");
    let there = Tap::open(&named("dm7")).unwrap();
    for tap in [given, there] {
        assert_eq!(tap.fleeting_mac(), None);
        tap.inherit_mac(known).unwrap();
        assert!(!ip(&format!("link show {}", tap.name())).contains(&text));
    }
    new.inherit_mac([1, 0, 0, 0, 0, 1]).unwrap_err();
}

#[test]
fn packets_have_headers_and_the_host_uses_only_the_queues_that_it_may() {
    if !in_namespace("packets_have_headers_and_the_host_uses_only_the_queues_that_it_may") {
        return;
    }
    let tap = Tap::open(&TapRequest {
        pairs: 2,
        ip: Some("10.1.0.1".parse().unwrap()),
        mask: Some("255.255.255.0".parse().unwrap()),
        ..named("dm1")
    })
    .unwrap();
    let mut packet = [0; 2000];
    let mut read = |queue: usize| (&*tap.files()[queue]).read(&mut packet).map(|len| packet[..len].to_vec());
    let drain = |read: &mut dyn FnMut(usize) -> io::Result<Vec<u8>>| {
        while read(0).is_ok() || read(1).is_ok() {}
    };
    let send = || {
        let socket = std::net::UdpSocket::bind("10.1.0.1:0").unwrap();
        socket.set_broadcast(true).unwrap();
        socket.send_to(&[7; 100], "10.1.0.255:9").unwrap();
    };
    std::thread::sleep(std::time::Duration::from_millis(300));
    drain(&mut read);
    for _ in 0..20 {
        send();
    }
    let mut count = 0;
    while let Ok(bytes) = read(0) {
        count += usize::from(bytes.len() == HEADER_LEN + 14 + 20 + 8 + 100);
    }
    assert_eq!(count, 20, "with one pair in use the first queue gets all");
    assert!(read(1).is_err());
    tap.use_pairs(2).unwrap();
    assert_eq!(read(1).unwrap_err().kind(), ErrorKind::WouldBlock);
    // Written: a header without anything to finish, and a frame that the host drops.
    let frame = [[0; HEADER_LEN].to_vec(), vec![0xff; 60]].concat();
    assert_eq!((&*tap.files()[1]).write(&frame).unwrap(), frame.len());
    tap.set_offloads(Offloads::all()).unwrap();
    ip("link del dm1");
    assert!((&*tap.files()[0]).write(&frame).is_err());
    assert!(tap.set_offloads(Offloads::all()).is_err());
}

#[test]
fn descriptors_that_are_handed_over_are_checked() {
    if !in_namespace("descriptors_that_are_handed_over_are_checked") {
        return;
    }
    let owner = Tap::open(&TapRequest { pairs: 2, mtu: Some(1400), ..named("dm2") }).unwrap();
    let handed: Vec<Arc<OwnedFd>> =
        owner.files().iter().map(|file| Arc::new(file.as_fd().try_clone_to_owned().unwrap())).collect();
    let request = TapRequest {
        descriptors: handed.clone(),
        pairs: 2,
        mac: Some([2, 1, 1, 1, 1, 1]),
        ..TapRequest::default()
    };
    let tap = Tap::open(&request).unwrap();
    assert_eq!(
        (tap.name(), tap.mtu(), tap.mac(), tap.files().len()),
        ("dm2", Some(1400), [2, 1, 1, 1, 1, 1], 2)
    );
    drop(tap);

    let null = Arc::new(OwnedFd::from(File::open("/dev/null").unwrap()));
    let unattached = Arc::new(OwnedFd::from(File::open(TUN).unwrap()));
    for wrong in [null, unattached] {
        let request = TapRequest { descriptors: vec![wrong], pairs: 1, ..TapRequest::default() };
        let error = Tap::open(&request).unwrap_err();
        assert!(matches!(error, TapError::Descriptor { number: 0, .. }), "{error}");
    }
    let plain = File::options().read(true).write(true).open(TUN).unwrap();
    set_attachment(&plain, "dm3", libc::IFF_TAP | libc::IFF_NO_PI).unwrap();
    let plain = Arc::new(OwnedFd::from(plain));
    let error =
        Tap::open(&TapRequest { descriptors: vec![plain], pairs: 1, ..TapRequest::default() }).unwrap_err();
    assert!(matches!(error, TapError::Flags { .. }), "{error}");
    let other = Tap::open(&named("dm4")).unwrap();
    let other = Arc::new(other.files()[0].as_fd().try_clone_to_owned().unwrap());
    let mixed =
        TapRequest { descriptors: vec![Arc::clone(&handed[0]), other], pairs: 2, ..TapRequest::default() };
    assert!(matches!(Tap::open(&mixed), Err(TapError::Different { .. })));
}

#[test]
fn names_that_no_interface_can_have_are_refused() {
    for name in ["", "a b", "a/b", "a:b", "sixteen-letters-"] {
        let error = Tap::open(&named(name)).unwrap_err();
        assert!(matches!(error, TapError::Name { .. }), "{name}");
    }
}

#[test]
fn errors_name_the_tap_the_cause_and_the_remedy() {
    let attach = |errno| {
        let source = io::Error::from_raw_os_error(errno);
        TapError::Attach { name: "tap7".to_owned(), source }.to_string()
    };
    for (errno, remedy) in [
        (libc::EPERM, "CAP_NET_ADMIN"),
        (libc::EBUSY, "another process"),
        (libc::EINVAL, "ip -d link show tap7"),
    ] {
        assert!(attach(errno).contains("tap7") && attach(errno).contains(remedy), "{}", attach(errno));
    }
    let driver = |errno| TapError::Driver { source: io::Error::from_raw_os_error(errno) }.to_string();
    assert!(driver(libc::ENODEV).contains("modprobe tun"));
    assert!(driver(libc::EACCES).contains("fd="));
}
