//! A pod of Kata Containers from the start of its VMM to its end: every call of the Go driver (`virtcontainers/clh.go`), in its order and with what its
//! generated client writes, with the real virtiofsd and the agent's port served in the guest.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::on;
use super::steps::{IDLE, bdf, guest_is_content, nic_to_sleep, pass_traffic};
use crate::error::{Error, Result, ensure};
use crate::guest::{API, Guest, VmSpec};
use crate::host::{Host, sysfs};
use crate::rpc::wait_for;
use crate::runner::{Case, Scenario};
use crate::spec::{Device, HostSpec};

/// The only slot: a NIC.
const NIC: usize = 0;
/// What the runtime makes beside the VM.
const POD: &str = "/run/pod";
/// The port on which Kata's agent listens.
const AGENT: u32 = 1024;
/// How long Kata waits for a hot-plug, tenfold: for the first device all memory is made and pinned, which an emulated processor is slow at.
const HOTPLUG: Duration = Duration::from_secs(50);
/// For what takes long in an emulated machine.
const LONG: Duration = Duration::from_secs(120);

pub fn table() -> Vec<Scenario> {
    vec![on(
        HostSpec::devices(&[Device::E1000e]).debian(),
        "a_pod_of_kata_boots_reaches_its_agent_shares_files_grows_and_ends",
        pod,
    )]
}

/// One call as the Go client makes it; the body of the answer.
fn call(host: &Host, name: &str, body: Option<&Value>, status: u16) -> Result<Value> {
    let method = if body.is_none() && name.ends_with("info") { "GET" } else { "PUT" };
    let body = body.map(|body| format!(" '{body}'")).unwrap_or_default();
    let output = host.run_for(&format!("api_client call {API} {method} {name}{body}"), LONG)?;
    let (answer, body) = output.text.split_once(' ').unwrap_or((&output.text, ""));
    ensure(output.status == 0 && answer == status.to_string(), || format!("{name}: {}", output.text))?;
    Ok(serde_json::from_str(body).unwrap_or_default())
}

/// A hot-plug. The driver takes no address but a function 0 on bus 0 of segment 0.
fn plug(host: &Host, name: &str, body: &Value) -> Result<(String, String)> {
    let begin = Instant::now();
    let answer = call(host, name, Some(body), 200)?;
    ensure(begin.elapsed() < HOTPLUG, || format!("{name} took {:?}", begin.elapsed()))?;
    let (Some(id), Some(bdf)) = (answer["id"].as_str(), answer["bdf"].as_str()) else {
        return Err(Error::Check(format!("{name}: {answer}")));
    };
    let device = bdf.strip_prefix("0000:00:").and_then(|rest| rest.strip_suffix(".0"));
    ensure(device.is_some_and(|device| device.len() == 2), || format!("{name}: Kata refuses {bdf}"))?;
    Ok((id.to_owned(), bdf.to_owned()))
}

/// What the driver writes into the configuration. The serial port is what it has with `enable_debug`.
fn config(vm: &VmSpec) -> Value {
    let payload = vm.config()["payload"].clone();
    json!({
        "payload": payload,
        "cpus": {
            "boot_vcpus": 1, "max_vcpus": 2, "kvm_hyperv": false,
            "topology": {"threads_per_core": 1, "cores_per_die": 2, "dies_per_package": 1, "packages": 1},
        },
        "memory": {
            "size": 512 << 20, "shared": true, "hugepages": false, "mergeable": false, "prefault": false, "thp": true,
            "hotplug_method": "Acpi", "hotplug_size": 1_u64 << 30,
        },
        "platform": {"num_pci_segments": 2, "iommu_segments": null, "serial_number": null, "uuid": null, "tdx": false},
        "rng": {"src": "/dev/urandom", "iommu": false},
        "serial": {"mode": "Tty", "iommu": false},
        "console": {"mode": "Off", "iommu": false},
        "disks": [{
            "path": format!("{POD}/image"), "readonly": true, "direct": false, "iommu": false, "num_queues": 1,
            "queue_size": 128, "vhost_user": false, "image_type": "Raw",
        }],
        "fs": [{
            "tag": "kataShared", "socket": format!("{POD}/virtiofsd.sock"), "num_queues": 1, "queue_size": 1024, "pci_segment": 1,
        }],
        "vsock": {"cid": 3, "socket": format!("{POD}/clh.sock"), "iommu": false},
        "iommu": false, "watchdog": false, "pvpanic": false, "landlock_enable": false,
    })
}

/// What the agent's end says to a client of the hybrid socket.
fn agent(host: &Host) -> Result<()> {
    let command = format!("(echo CONNECT {AGENT}; echo check) | socat -t 20 - UNIX-CONNECT:{POD}/clh.sock");
    let text = host.run_for(&command, LONG)?.text;
    ensure(text.starts_with("OK ") && text.trim_end().ends_with("check"), || {
        format!("the agent says {text:?}")
    })
}

/// A file of the shared directory passes both ways.
fn share(host: &Host, guest: &Guest<'_>) -> Result<()> {
    host.sh(&format!("head -c 2000000 /dev/urandom >{POD}/shared/down"))?;
    let there = guest.sh_for("sha256sum </mnt/down && cp /mnt/down /mnt/up", LONG)?;
    let here = host.sh(&format!("sha256sum <{POD}/shared/up"))?;
    ensure(there == here, || format!("the guest has {there}, the host {here}"))
}

fn virtiofsd(host: &Host) -> Result<()> {
    host.sh(&format!(
        "rm -rf {POD}; mkdir -p {POD}/shared; truncate -s 16M {POD}/image {POD}/volume; modprobe tun; \
         (virtiofsd --socket-path={POD}/virtiofsd.sock --shared-dir={POD}/shared --sandbox=none & echo $! >{POD}/pid) \
         </dev/null >{POD}/log 2>&1"
    ))?;
    wait_for("virtiofsd listens", LONG, || {
        let listens = host.probe(&format!("test -S {POD}/virtiofsd.sock"))?.status == 0;
        Ok(if listens { Ok(()) } else { Err(host.probe(&format!("cat {POD}/log"))?.text) })
    })
}

fn removed(host: &Host, guest: &Guest<'_>, id: &str, function: &str) -> Result<()> {
    call(host, "vm.remove-device", Some(&json!({ "id": id })), 204)?;
    wait_for("the device is gone", IDLE, || {
        let info = call(host, "vm.info", None, 200)?;
        Ok(if info["device_tree"][id].is_null() { Ok(()) } else { Err(info.to_string()) })
    })?;
    let there = guest.run(&format!("test -e {}", sysfs(function, "vendor")))?;
    ensure(there.status != 0, || format!("the guest still has {function}"))
}

fn pod(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    virtiofsd(host)?;
    let mut vm = VmSpec::new(case.guest).by_api();
    vm.modules =
        vec!["virtio_pci", "virtio_blk", "virtio_net", "virtiofs", "vmw_vsock_virtio_transport", "e1000e"];
    let guest = Guest::launch(host, &vm)?;
    host.sh(&format!("echo '{}' >{POD}/config", config(&vm)))?;
    // Pings, vm.create, vm.info, vm.add-net with the tap's descriptors, vm.boot, vm.info: within ten seconds.
    let mark = guest.mark();
    let output = host.run_for(&format!("api_client kata {API} {POD}/config tap_pod"), LONG)?;
    println!("  {}", output.text);
    ensure(output.status == 0, || output.text.clone())?;
    guest.wait_ready(mark)?;

    guest.sh(&format!("guest_tool vsock echo {AGENT} >/tmp/agent 2>&1 &"))?;
    guest.wait_file("/tmp/agent", "listening", IDLE)?;
    agent(host)?;
    guest.sh("mkdir -p /mnt && mount -t virtiofs kataShared /mnt")?;
    let way = guest.sh("readlink -f /sys/bus/virtio/drivers/virtiofs/virtio*")?;
    ensure(way.contains("/pci0001:00/"), || format!("the file system is not in segment 1: {way}"))?;
    share(host, &guest)?;

    // A container's volume, and a device.
    let volume = json!({
        "path": format!("{POD}/volume"), "readonly": false, "direct": false, "iommu": false, "num_queues": 1, "queue_size": 1024,
        "vhost_user": false, "image_type": "Raw", "rate_limiter_config": null,
    });
    let (disk, disk_at) = plug(host, "vm.add-disk", &volume)?;
    guest.wait_file(&sysfs(&disk_at, "vendor"), "0x1af4", IDLE)?;
    guest.sh("dd if=/dev/urandom of=/dev/vdb bs=1M count=4 conv=fsync 2>/dev/null")?;
    let (nic, nic_at) =
        plug(host, "vm.add-device", &json!({ "path": sysfs(&bdf(NIC), ""), "iommu": false }))?;
    host.set_link(NIC, true)?;
    pass_traffic(&guest, &nic_at)?;
    nic_to_sleep(host, &guest, NIC, &nic_at)?;
    host.stays_in(&bdf(NIC), "D3cold", Duration::from_secs(1))?;

    // It grows while the device sleeps.
    call(host, "vm.resize", Some(&json!({ "desired_ram": 768 << 20 })), 204)?;
    call(host, "vm.resize", Some(&json!({ "desired_vcpus": 2 })), 204)?;
    guest.wait_file("/sys/devices/system/cpu/present", "0-1", IDLE)?;
    let total = "awk '/MemTotal/ {print ($2 > 600000)}' /proc/meminfo";
    guest.sh("for m in /sys/devices/system/memory/memory*; do [ $(cat $m/state) = online ] || echo online >$m/state; done")?;
    let grown = guest.sh(total)?;
    ensure(grown.trim() == "1", || guest.sh("cat /proc/meminfo").unwrap_or_default())?;
    let info = call(host, "vm.info", None, 200)?;
    let platform = &info["config"]["platform"]["num_pci_segments"];
    ensure(info["state"] == "Running" && info["memory_actual_size"] == 768 << 20 && *platform == 2, || {
        format!("vm.info: {info}")
    })?;
    ensure(info["config"]["fs"][0]["pci_segment"] == 1, || format!("vm.info: {info}"))?;
    host.stays_in(&bdf(NIC), "D3cold", Duration::from_secs(1))?;

    call(host, "vm.pause", None, 204)?;
    call(host, "vm.resume", None, 204)?;
    share(host, &guest)?;
    agent(host)?;
    removed(host, &guest, &nic, &nic_at)?;
    removed(host, &guest, &disk, &disk_at)?;
    guest_is_content(&guest)?;

    // Its end: a ping, vmm.shutdown, and three seconds for the process.
    let pid = host.sh("pidof dormouse")?;
    call(host, "vmm.shutdown", None, 200)?;
    host.sh(&format!("for n in $(seq 150); do [ -d /proc/{pid} ] || exit 0; usleep 20000; done; exit 1"))?;
    let status = guest.wait_exit()?;
    ensure(status == 0, || format!("the VMM ended with status {status}"))?;
    host.sh(&format!("kill $(cat {POD}/pid) 2>/dev/null; rm -rf {POD}")).map(drop)
}
