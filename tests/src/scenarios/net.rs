//! Network devices: the guest's own driver on the one side, a tap of the host on the other.

use std::time::Duration;

use serde_json::Value;

use super::steps::{IDLE, WAKE, guest_is_content};
use super::{scenario, with_old_kernels};
use crate::error::{Error, Result, ensure};
use crate::guest::{Guest, VmSpec};
use crate::host::Host;
use crate::rpc::wait_for;
use crate::runner::{Case, Scenario};

/// The API socket and the events of these VMs.
const SOCKET: &str = "/run/net.sock";
const EVENTS: &str = "/run/net.events";
/// Addresses of host and guest.
const HOST: &str = "10.7.0.1";
const GUEST: &str = "10.7.0.2";
const MAC: &str = "02:11:22:33:44:55";
/// How long a file may take over the emulated network.
const TRANSFER: Duration = Duration::from_secs(120);

pub fn table() -> Vec<Scenario> {
    let mut all = with_old_kernels(scenario("a_guest_and_its_host_reach_each_other_over_a_tap", both_ways));
    all.extend([
        scenario("a_tap_with_several_queues_and_a_large_mtu_outlives_a_reboot_of_the_guest", queues_and_mtu),
        scenario("a_network_device_is_added_with_open_files_and_removed_again", hotplug),
        scenario("a_rate_limit_of_a_network_device_holds", rate_limit),
        scenario("a_tap_that_is_removed_cuts_the_guests_link_and_no_more", tap_removed),
        scenario("the_hosts_kernel_moves_the_packets_where_it_may", vhost),
        scenario("a_tap_that_cannot_be_had_is_refused_with_its_name_and_a_remedy", refused),
    ]);
    all
}

fn spec(case: &Case<'_>, net: &str) -> VmSpec {
    let mut spec = VmSpec::new(case.guest);
    spec.modules = vec!["virtio_pci", "virtio_net"];
    let net = if net.is_empty() { String::new() } else { format!("--net {net}") };
    spec.options(&format!("{net} --api-socket {SOCKET} --event-monitor path={EVENTS}"))
}

/// The host's side of a tap that the VMM creates.
fn tap(keys: &str) -> String {
    format!("tap=tap0,ip={HOST},mask=255.255.255.0,mac={MAC}{keys}")
}

fn start<'a>(case: &Case<'a>, spec: &VmSpec) -> Result<Guest<'a>> {
    case.host.sh(&format!("modprobe tun; rm -f {SOCKET}* {EVENTS}; ip link del tap0 2>/dev/null; true"))?;
    case.host.start_vm(spec)
}

fn ctl(host: &Host, words: &str) -> Result<String> {
    host.sh(&format!("dormouse ctl --api-socket {SOCKET} --json {words}"))
}

/// Gives the guest's interface its address and waits until the host answers.
fn set_up(guest: &Guest<'_>) -> Result<()> {
    guest.sh(&format!("ip link set eth0 up; ip addr add {GUEST}/24 dev eth0"))?;
    wait_for("the host answers", IDLE, || {
        let ping = guest.run(&format!("ping -c 1 -W 2 {HOST}"))?;
        Ok(if ping.status == 0 { Ok(()) } else { Err(ping.text) })
    })
}

/// Pings both ways, with packets of this many bytes.
fn pings(host: &Host, guest: &Guest<'_>, size: usize) -> Result<()> {
    guest.sh(&format!("ping -c 3 -i 0.2 -W 5 -s {size} {HOST}"))?;
    host.sh(&format!("ping -c 3 -i 0.2 -W 5 -s {size} {GUEST}")).map(drop)
}

/// Sends a file of this many MiB each way and compares what arrives.
fn transfers(host: &Host, guest: &Guest<'_>, mib: usize) -> Result<()> {
    host.sh(&format!("mkdir -p /run/www; dd if=/dev/urandom of=/run/www/f bs=1M count={mib} 2>/dev/null; httpd -p {HOST}:80 -h /run/www"))?;
    let get = |address: &str| format!("wget -q -O /tmp/f http://{address}/f && sha256sum </tmp/f");
    let arrived = guest.sh_for(&get(HOST), TRANSFER);
    let sent = host.sh("killall httpd; sha256sum </run/www/f; rm -r /run/www")?;
    ensure(arrived? == sent, || "a file from the host arrived otherwise in the guest".to_owned())?;
    // Back again, from where it has arrived.
    guest.sh("cd /tmp && httpd -p 80 -h /tmp")?;
    let back = host.run_for(&get(GUEST), TRANSFER)?;
    guest.sh("killall httpd; rm -f /tmp/f")?;
    host.sh("rm -f /tmp/f")?;
    ensure(back.text == sent, || format!("a file from the guest arrived otherwise: {}", back.text))
}

fn counters(host: &Host, id: &str) -> Result<Value> {
    let text = ctl(host, "counters")?;
    let all: Value = serde_json::from_str(&text).map_err(|e| Error::Check(format!("{text}: {e}")))?;
    Ok(all[id].clone())
}

/// How often threads of the VMM other than vCPUs were scheduled in `seconds`.
fn wake_ups(host: &Host, seconds: u32) -> Result<u32> {
    let count = "for t in /proc/$(pidof dormouse)/task/*; do read n <$t/comm; case $n in *vcpu*) ;; \
                 *) sed -n 's/^voluntary_ctxt_switches:[^0-9]*//p' $t/status ;; esac; done | awk '{s += $1} END {print s + 0}'";
    let text = host.sh(&format!("a=$({count}); sleep {seconds}; b=$({count}); echo $((b - a))"))?;
    text.trim().parse().map_err(|_| Error::Check(format!("no number: {text}")))
}

fn both_ways(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let guest = start(case, &spec(case, &tap("")))?;
    set_up(&guest)?;
    let mac = guest.sh("cat /sys/class/net/eth0/address")?;
    ensure(mac == MAC, || format!("the guest's address is {mac}"))?;
    for size in [56, 1472, 8000] {
        pings(host, &guest, size)?;
    }
    transfers(host, &guest, 8)?;
    let counted = counters(host, "_net0")?;
    for (name, least) in
        [("rx_bytes", 8 << 20), ("tx_bytes", 8 << 20), ("rx_frames", 100), ("tx_frames", 100)]
    {
        ensure(counted[name].as_u64().is_some_and(|value| value > least), || format!("{name}: {counted}"))?;
    }
    // With large segments in both directions it takes far fewer frames than packets of 1500 bytes.
    ensure(counted["rx_frames"].as_u64().is_some_and(|frames| frames < 4000), || {
        format!("the host's segments were cut before they came: {counted}")
    })?;
    // Neighbours are asked for now and then; before and after, nothing moves.
    guest.sh("ip link set eth0 down")?;
    host.sh("ip link set tap0 down; sleep 2")?;
    let woken = wake_ups(host, 4)?;
    ensure(woken == 0, || format!("an idle device: the VMM was woken {woken} times in 4 s"))?;
    guest_is_content(&guest)?;
    guest.power_off()?;
    let left = host.run("ip link show tap0")?;
    ensure(left.status != 0, || format!("the tap is still there: {}", left.text))
}

fn queues_and_mtu(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let guest = start(case, &spec(case, &tap(",num_queues=4,mtu=9000")).cpus(2))?;
    set_up(&guest)?;
    let index = host.sh("cat /sys/class/net/tap0/ifindex /sys/class/net/tap0/mtu | tr '\\n' ' '")?;
    ensure(index.trim().ends_with(" 9000"), || format!("index and MTU of the tap: {index}"))?;
    guest.wait_file("/sys/class/net/eth0/mtu", "9000", WAKE)?;
    let check = || -> Result<()> {
        let queues = guest.sh("ls /sys/class/net/eth0/queues | tr '\\n' ' '")?;
        ensure(queues.contains("rx-1") && queues.contains("tx-1"), || format!("the guest has {queues}"))?;
        let threads = host.sh("cat /proc/$(pidof dormouse)/task/*/comm | tr '\\n' ' '")?;
        for name in ["_net0_qp0", "_net0_qp1", "_net0_ctrl"] {
            ensure(threads.contains(name), || format!("no {name} in {threads}"))?;
        }
        pings(host, &guest, 8900)?;
        transfers(host, &guest, 4)
    };
    check()?;
    let mark = guest.mark();
    ctl(host, "reboot")?;
    guest.wait_ready(mark)?;
    set_up(&guest)?;
    check()?;
    let after = host.sh("cat /sys/class/net/tap0/ifindex /sys/class/net/tap0/mtu | tr '\\n' ' '")?;
    ensure(index == after, || format!("the tap was made anew: {index} and then {after}"))?;
    // Paused, nothing moves; then all goes on.
    ctl(host, "pause")?;
    let lost = host.run(&format!("ping -c 1 -W 2 {GUEST}"))?;
    ensure(lost.status != 0, || "a paused guest answers".to_owned())?;
    ctl(host, "resume")?;
    pings(host, &guest, 100)?;
    guest_is_content(&guest)?;
    guest.power_off()
}

fn hotplug(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let guest = start(case, &spec(case, ""))?;
    let gone = |count: usize| -> Result<()> {
        wait_for("the device is removed", IDLE, || {
            let text = host.sh(&format!("grep -c device-removed {EVENTS} || true"))?;
            Ok(if text.trim() == count.to_string() { Ok(()) } else { Err(text) })
        })?;
        let there = guest.run("test -e /sys/class/net/eth0")?;
        ensure(there.status != 0, || "the guest still has the interface".to_owned())
    };
    for round in 1..=2 {
        let body = format!(r#"{{"id":"net_7","mac":"{MAC}","num_queues":2,"queue_size":256}}"#);
        let answer = host.sh(&format!("api_client net {SOCKET} tap0 1 '{body}'"))?;
        ensure(answer.contains(r#""id":"net_7""#) && answer.contains(r#""bdf":"0000:00:0"#), || {
            answer.clone()
        })?;
        host.sh(&format!("ip addr add {HOST}/24 dev tap0; ip link set tap0 up"))?;
        guest.wait_file("/sys/class/net/eth0/address", MAC, IDLE)?;
        set_up(&guest)?;
        transfers(host, &guest, 2)?;
        let twice = host.run(&format!("dormouse ctl --api-socket {SOCKET} add-net id=net_7,tap=tap1"))?;
        ensure(twice.status != 0 && twice.text.contains("net_7"), || format!("{twice:?}"))?;
        ctl(host, "remove-device net_7")?;
        gone(round)?;
        let left = host.run("ip link show tap0")?;
        ensure(left.status != 0, || "the tap is still held".to_owned())?;
    }
    // By name this time; and what it is called is Cloud Hypervisor's.
    let answer = ctl(host, &format!("add-net {}", tap("")))?;
    ensure(answer.contains("_net"), || answer.clone())?;
    guest.wait_file("/sys/class/net/eth0/address", MAC, IDLE)?;
    set_up(&guest)?;
    pings(host, &guest, 1000)?;
    guest_is_content(&guest)?;
    guest.power_off()
}

fn rate_limit(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    // A megabyte a second, and none in advance but what the bucket holds.
    let guest = start(case, &spec(case, &tap(",bw_size=100000,bw_refill_time=100")))?;
    set_up(&guest)?;
    let timed = |host: &Host| -> Result<f64> {
        host.sh(&format!("mkdir -p /run/www; dd if=/dev/zero of=/run/www/f bs=1000000 count=4 2>/dev/null; httpd -p {HOST}:80 -h /run/www"))?;
        let begin = host.sh("cut -d' ' -f1 /proc/uptime")?;
        guest.sh_for(&format!("wget -q -O /dev/null http://{HOST}/f"), TRANSFER)?;
        let end = host.sh("cut -d' ' -f1 /proc/uptime; killall httpd; rm -r /run/www")?;
        let number = |text: &str| text.lines().next().and_then(|line| line.trim().parse::<f64>().ok());
        number(&end)
            .zip(number(&begin))
            .map(|(end, begin)| end - begin)
            .ok_or_else(|| Error::Check(end.clone()))
    };
    let limited = timed(host)?;
    ensure((3.5..60.0).contains(&limited), || format!("4 MB at 1 MB/s took {limited} s"))?;
    guest.power_off()?;
    // Two packets a second: of forty, few get an answer while ping waits for it.
    let guest = start(case, &spec(case, &tap(",ops_size=2,ops_refill_time=1000")))?;
    set_up(&guest)?;
    let answered =
        host.sh(&format!("ping -c 40 -i 0.05 -W 1 {GUEST} | grep -o '[0-9]* packets received'; true"))?;
    let count: u32 = answered.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0);
    ensure((1..30).contains(&count), || format!("at 2 packets a second: {answered}"))?;
    let woken = {
        guest.sh("ip link set eth0 down")?;
        // What waits for the limit is to be over.
        host.run_for("ip link set tap0 down; sleep 20", TRANSFER)?;
        wake_ups(host, 3)?
    };
    ensure(woken == 0, || format!("a limit that holds nothing back woke the VMM {woken} times"))?;
    guest.power_off()
}

fn tap_removed(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    for keys in ["", ",vhost=on"] {
        host.sh("modprobe vhost_net")?;
        let guest = start(case, &spec(case, &tap(keys)))?;
        set_up(&guest)?;
        guest.wait_file("/sys/class/net/eth0/carrier", "1", WAKE)?;
        host.sh("ip link del tap0")?;
        // The kernel does not tell the VMM of it where it moves the packets itself.
        if keys.is_empty() {
            guest.wait_file("/sys/class/net/eth0/carrier", "0", WAKE)?;
        }
        // What is sent goes nowhere, and nobody turns round and round for it.
        let ping = guest.run(&format!("ping -c 2 -W 1 {HOST}"))?;
        ensure(ping.status != 0, || "somebody answers".to_owned())?;
        host.sh("sleep 1")?;
        let woken = wake_ups(host, 3)?;
        ensure(woken <= 3, || format!("the VMM was woken {woken} times in 3 s"))?;
        ctl(host, "ping")?;
        let mark = guest.mark();
        ctl(host, "reboot")?;
        guest.wait_ready(mark)?;
        guest.sh("ip link set eth0 up; test $(cat /sys/class/net/eth0/carrier) = 0")?;
        guest_is_content(&guest)?;
        guest.power_off()?;
    }
    Ok(())
}

fn vhost(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    host.sh("modprobe vhost_net; test -c /dev/vhost-net")?;
    let guest = start(case, &spec(case, &tap(",vhost=on,num_queues=4")).cpus(2))?;
    set_up(&guest)?;
    let kernel =
        host.sh("ps | grep -c '[v]host-' || true; cat /proc/$(pidof dormouse)/task/*/comm | tr '\\n' ' '")?;
    ensure(!kernel.contains("_net0_qp") && kernel.contains("_net0_ctrl"), || {
        format!("who moves the packets: {kernel}")
    })?;
    for size in [56, 1472, 8000] {
        pings(host, &guest, size)?;
    }
    transfers(host, &guest, 8)?;
    let counted = counters(host, "_net0")?;
    ensure(counted["rx_bytes"].as_u64().is_some_and(|bytes| bytes > 8 << 20), || format!("{counted}"))?;
    ctl(host, "pause")?;
    ctl(host, "resume")?;
    pings(host, &guest, 100)?;
    let mark = guest.mark();
    ctl(host, "reboot")?;
    guest.wait_ready(mark)?;
    set_up(&guest)?;
    transfers(host, &guest, 2)?;
    guest_is_content(&guest)?;
    guest.power_off()?;
    // Where the host has it not, "auto" does without, and "on" says what to do.
    host.sh("mv /dev/vhost-net /dev/vhost-net.off")?;
    let without = (|| -> Result<()> {
        let guest = start(case, &spec(case, &tap(",vhost=auto")))?;
        set_up(&guest)?;
        pings(host, &guest, 1000)?;
        let log = guest.log()?;
        ensure(log.contains("the VMM moves the packets itself"), || format!("the log says: {log}"))?;
        guest.power_off()?;
        let spec = spec(case, &tap(",vhost=on"));
        let failed = host.run(&format!("{} </dev/null", spec.command()))?;
        ensure(failed.status == 1 && failed.text.contains("modprobe vhost_net"), || format!("{failed:?}"))
    })();
    host.sh("mv /dev/vhost-net.off /dev/vhost-net")?;
    without
}

fn refused(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    host.sh("modprobe tun; ip link del tap0 2>/dev/null; tunctl -t tap0 && tunctl -t tap1")?;
    let expect = |who: &str, net: &str, parts: &[&str]| -> Result<()> {
        let command = spec(case, net).command();
        let output = host.run(&format!("{who} {command} </dev/null"))?;
        host.sh(&format!("rm -f {SOCKET}* {EVENTS}"))?;
        let good = output.status == 1 && parts.iter().all(|part| output.text.contains(part));
        ensure(good, || format!("{net}: {output:?}"))
    };
    expect("", "tap=tap0,num_queues=4", &["num_queues=4", "vCPUs (1)"])?;
    expect("", "tap=lo", &["_net0", "lo", "no tap"])?;
    expect("", "fd=[99]", &["_net0", "fd=99"])?;
    expect("", "tap=tap0 tap=tap0", &["_net1", "tap0", "another process"])?;
    host.sh("tunctl -d tap0; tunctl -d tap1")?;
    host.sh("mv /dev/net/tun /dev/net/tun.off")?;
    let result = expect("", "tap=tap0", &["/dev/net/tun", "modprobe tun"]);
    host.sh("mv /dev/net/tun.off /dev/net/tun")?;
    result
}
