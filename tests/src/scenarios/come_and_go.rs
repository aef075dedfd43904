//! The machine's own devices that come to a running guest by the API, are used against their real peers, and go again; and the orders that come at
//! the wrong time or twice.

use std::time::Duration;

use serde_json::{Value, json};

use super::api::{Answer, call, shut_down};
use super::everything::{API, EVENTS, NETS, PLACE, Peers, SOCKET, ctl, use_disk, use_net, use_vsock};
use super::on;
use super::steps::guest_is_content;
use super::vhost_user::{self, files};
use crate::error::{Error, Result, ensure};
use crate::guest::{self, Guest, VmSpec};
use crate::host::{Host, sysfs};
use crate::rpc::wait_for;
use crate::runner::{Case, Scenario};
use crate::spec::{Device, HostSpec, Slot};

/// For what takes long in an emulated machine.
const LONG: Duration = Duration::from_secs(120);
/// How often each device comes.
const TIMES: usize = 3;

pub fn table() -> Vec<Scenario> {
    let host = || HostSpec::new(&[Slot::new(Device::Gpu)]).debian();
    vec![
        on(host(), "every_device_that_can_comes_and_goes_and_leaves_nothing_behind", several_times),
        on(host(), "devices_come_and_go_before_the_boot_while_paused_and_twice_as_they_should", at_odd_times),
    ]
}

fn modules(vm: &mut VmSpec) {
    vm.modules.extend([
        "virtio_pci",
        "virtio_rng",
        "virtiofs",
        "virtio_blk",
        "virtio_net",
        "vmw_vsock_virtio_transport",
    ]);
}

/// Adds a device; where the guest has it.
fn add(host: &Host, words: &str) -> Result<String> {
    let reply = ctl(host, words)?;
    let json: Value = serde_json::from_str(&reply).map_err(|e| Error::Check(format!("{reply}: {e}")))?;
    ensure(json["id"] == "new", || format!("added as {reply}"))?;
    json["bdf"].as_str().map(str::to_owned).ok_or_else(|| Error::Check(format!("no bdf in {reply}")))
}

/// Removes it and waits for the event that says that it is free.
fn remove(host: &Host, guest: &Guest<'_>, place: &str) -> Result<()> {
    let count = || -> Result<usize> {
        let text = host.sh(&format!("grep -c device-removed {EVENTS} || true"))?;
        Ok(text.trim().parse().unwrap_or(0))
    };
    let before = count()?;
    ctl(host, "remove-device new")?;
    wait_for("the device is removed", LONG, || {
        let now = count()?;
        Ok(if now > before { Ok(()) } else { Err("no event yet".to_owned()) })
    })?;
    let info = ctl(host, "info")?;
    ensure(!info.contains("\"new\""), || format!("still in vm.info: {info}"))?;
    let there = guest.probe(&format!("test -e {}", sysfs(place, "vendor")))?;
    ensure(there.status != 0, || format!("the guest still has {place}"))
}

/// Descriptors by what they are, threads by name, and mappings but for the heap's own, of the VMM.
fn footprint(host: &Host) -> Result<String> {
    host.sh(
        "cd /proc/$(cat /run/vmm.pid); (cd fd; for f in *; do readlink $f; done | sed 's/:\\[.*//' | sort | uniq -c); \
         cat task/*/comm | sort | uniq -c; echo $(wc -l <maps) mappings",
    )
}

fn use_fs(host: &Host, guest: &Guest<'_>, tag: &str) -> Result<()> {
    wait_for("the guest mounts the directory", LONG, || {
        let output = guest.probe(&format!("mkdir -p /mnt; mount -t virtiofs {tag} /mnt"))?;
        Ok(if output.status == 0 { Ok(()) } else { Err(output.text) })
    })?;
    files(host, guest, "/mnt")?;
    guest.sh("umount /mnt").map(drop)
}

fn several_times(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let mut peers = Peers::start(host)?;
    let mut vm = VmSpec::new(case.guest)
        .memory("512M,shared=on")
        .options(&format!("--api-socket {API} --event-monitor path={EVENTS}"));
    modules(&mut vm);
    let guest = host.start_vm(&vm)?;
    let mut before = String::new();
    for round in 0..TIMES {
        for (words, disk) in [
            (format!("add-disk path={PLACE}/raw,image_type=raw,id=new"), true),
            (format!("add-disk path={PLACE}/qcow2,image_type=qcow2,id=new"), true),
            (format!("add-disk vhost_user=on,socket={},id=new", vhost_user::DISK), true),
            (format!("add-fs tag=share,socket={},id=new", vhost_user::FS), false),
            (
                format!(
                    "add-generic-vhost-user device_type=26,socket={},queue_sizes=[256,256],id=new",
                    vhost_user::FS
                ),
                false,
            ),
        ] {
            let place = add(host, &words)?;
            if disk {
                use_disk(&guest, "vda")?;
            } else {
                use_fs(host, &guest, if words.starts_with("add-fs") { "share" } else { "generic" })?;
            }
            remove(host, &guest, &place)?;
            // Debian's virtiofsd and storage daemon serve one VMM and end.
            peers.again()?;
        }
        for ((tap, here, there, mac), keys) in NETS.into_iter().zip(["", ",vhost=on"]) {
            let place =
                add(host, &format!("add-net tap={tap},ip={here},mask=255.255.255.0,mac={mac}{keys},id=new"))?;
            use_net(host, &guest, here, there, mac)?;
            remove(host, &guest, &place)?;
            // It is free as soon as the event says so.
            let left = host.run(&format!("ip link show {tap}"))?;
            ensure(left.status != 0, || format!("{tap} is still there: {}", left.text))?;
        }
        let place = add(host, &format!("add-vsock cid=9,socket={SOCKET},id=new"))?;
        use_vsock(host, &guest)?;
        guest.sh("killall guest_tool; rm /run/echo")?;
        remove(host, &guest, &place)?;
        let now = footprint(host)?;
        // What is made once and kept is there after the first round.
        if round == 0 {
            before = now;
        } else {
            ensure(before == now, || format!("after the first round: {before}; after round {round}: {now}"))?;
        }
    }
    guest_is_content(&guest)?;
    guest.power_off()?;
    drop(peers);
    Ok(())
}

fn put(host: &Host, name: &str, body: &Value) -> Result<Answer> {
    call(host, guest::API, "PUT", name, Some(body))
}

/// A call and the status that it must have, with a word of the answer's.
fn expect(host: &Host, name: &str, body: Value, status: u16, word: &str) -> Result<()> {
    let answer = put(host, name, &body)?;
    ensure(answer.status == status && answer.body.to_string().contains(word), || {
        format!("{name} {body}: {answer:?}, and not {status} with {word:?}")
    })
}

fn at_odd_times(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let peers = Peers::start(host)?;
    host.sh(&format!("truncate -s 16M {PLACE}/a {PLACE}/b {PLACE}/c"))?;
    let mut vm = VmSpec::new(case.guest).options(&format!("--event-monitor path={EVENTS}")).by_api();
    modules(&mut vm);
    let guest = Guest::launch(host, &vm)?;
    host.sh(&format!(
        "for n in $(seq 100); do [ ! -S {} ] || exit 0; usleep 20000; done; exit 1",
        guest::API
    ))?;
    let disk =
        |name: &str, id: &str| json!({"path": format!("{PLACE}/{name}"), "image_type": "Raw", "id": id});
    let id = |id: &str| json!({ "id": id });
    // There is no VM yet.
    expect(host, "vm.add-disk", disk("a", "a"), 404, "")?;
    expect(host, "vm.remove-device", id("a"), 404, "")?;
    expect(host, "vm.create", vm.config(), 204, "")?;
    // Before the boot.
    expect(host, "vm.add-disk", disk("a", "a"), 204, "")?;
    expect(host, "vm.add-disk", disk("b", "b"), 204, "")?;
    expect(host, "vm.add-vsock", json!({"cid": 9, "socket": SOCKET, "id": "s"}), 204, "")?;
    let twice = put(host, "vm.add-disk", &disk("c", "a"))?;
    ensure(twice.status >= 400, || format!("an id twice: {twice:?}"))?;
    expect(host, "vm.remove-device", id("a"), 204, "")?;
    expect(host, "vm.remove-device", id("a"), 404, "a")?;
    let mark = guest.mark();
    let answer = call(host, guest::API, "PUT", "vm.boot", None)?;
    ensure(answer.status == 204, || format!("vm.boot: {answer:?}"))?;
    guest.wait_ready(mark)?;
    use_disk(&guest, "vda")?;
    use_vsock(host, &guest)?;
    let locks = host.run(&format!("ls -l /proc/$(cat /run/vmm.pid)/fd | grep -c {PLACE}/a"))?;
    ensure(locks.text.trim() == "0", || "a disk that was removed before the boot is open".to_owned())?;
    // An id, an image and a socket that are taken.
    for (name, body, word) in [
        ("vm.add-disk", disk("c", "b"), "b"),
        ("vm.add-disk", disk("b", "other"), "in use by another disk"),
        ("vm.add-vsock", json!({"cid": 10, "socket": "/run/other", "id": "t"}), ""),
        ("vm.add-net", json!({"tap": "every0", "id": "s"}), "s"),
    ] {
        let answer = put(host, name, &body)?;
        ensure(answer.status >= 400 && answer.body.to_string().contains(word), || {
            format!("{name} {body}: {answer:?}")
        })?;
    }
    // What is the machine's own stays.
    for own in ["__rng", "__serial", "nobody"] {
        let answer = put(host, "vm.remove-device", &id(own))?;
        ensure(answer.status >= 400, || format!("remove {own}: {answer:?}"))?;
    }
    // While it is paused: one comes, one is asked to go, and both happen when it goes on.
    let answer = call(host, guest::API, "PUT", "vm.pause", None)?;
    ensure(answer.status == 204, || format!("vm.pause: {answer:?}"))?;
    expect(host, "vm.add-disk", disk("c", "c"), 200, "\"bdf\":\"0000:00:")?;
    expect(host, "vm.remove-device", id("b"), 204, "")?;
    expect(host, "vm.remove-device", id("b"), 204, "")?;
    let answer = call(host, guest::API, "PUT", "vm.resume", None)?;
    ensure(answer.status == 204, || format!("vm.resume: {answer:?}"))?;
    wait_for("the one that was asked is gone", LONG, || {
        let text = host.sh(&format!("grep -A6 device-removed {EVENTS} | grep -c '\"b\"' || true"))?;
        Ok(if text.trim() == "1" { Ok(()) } else { Err(text) })
    })?;
    expect(host, "vm.remove-device", id("b"), 404, "b")?;
    use_disk(&guest, "vdb")?;
    // The same image under the same name again, at once, and it is there after a reboot of the guest.
    expect(host, "vm.add-disk", disk("b", "b"), 200, "bdf")?;
    use_disk(&guest, "vda")?;
    let mark = guest.mark();
    let answer = call(host, guest::API, "PUT", "vm.reboot", None)?;
    ensure(answer.status == 204, || format!("vm.reboot: {answer:?}"))?;
    guest.wait_ready(mark)?;
    use_disk(&guest, "vda")?;
    use_disk(&guest, "vdb")?;
    use_vsock(host, &guest)?;
    guest_is_content(&guest)?;
    shut_down(&guest, host)?;
    drop(peers);
    Ok(())
}
