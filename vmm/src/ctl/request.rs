//! Commands as requests: the call, its JSON, and the descriptors that go with it.

use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::Path;

use serde_json::{Value, json};

use super::args::CtlCommand;
use super::devices::{self, Schema};
use super::{CtlError, power};
use crate::client::{Request, own};
use crate::config::DeviceConfig;

/// What goes to the VMM for `command`.
pub fn request(command: &CtlCommand) -> Result<(Request, Vec<OwnedFd>), CtlError> {
    use CtlCommand as C;
    let plain = |call: &str| Ok((Request::api_put(call, None), Vec::new()));
    let with = |call: &str, body: &Value| Ok((Request::api_put(call, Some(body.to_string())), Vec::new()));
    let reads = |call: &str| Ok((Request::api_get(call), Vec::new()));
    match command {
        C::AddDevice { device_config } => add_device(device_config),
        C::AddDisk { disk_config } => convert("vm.add-disk", &devices::DISK, disk_config),
        C::AddFs { fs_config } => convert("vm.add-fs", &devices::FS, fs_config),
        C::AddGenericVhostUser { generic_vhost_user_config: config } => {
            convert("vm.add-generic-vhost-user", &devices::GENERIC_VHOST_USER, config)
        }
        C::AddNet { net_config } => convert("vm.add-net", &devices::NET, net_config),
        C::AddPmem { pmem_config } => convert("vm.add-pmem", &devices::PMEM, pmem_config),
        C::AddUserDevice { device_config } => {
            convert("vm.add-user-device", &devices::USER_DEVICE, device_config)
        }
        C::AddVdpa { vdpa_config } => convert("vm.add-vdpa", &devices::VDPA, vdpa_config),
        C::AddVsock { vsock_config } => convert("vm.add-vsock", &devices::VSOCK, vsock_config),
        C::Boot => plain("vm.boot"),
        C::Coredump { coredump_config } => with("vm.coredump", &json!({"destination_url": coredump_config})),
        C::Counters => reads("vm.counters"),
        C::Create { path } => create(path),
        C::Delete => plain("vm.delete"),
        C::Info => reads("vm.info"),
        C::Nmi => plain("vm.nmi"),
        C::Pause => plain("vm.pause"),
        C::Ping => reads("vmm.ping"),
        C::PowerButton => plain("vm.power-button"),
        C::Reboot => plain("vm.reboot"),
        C::ReceiveMigration { receive_migration_config: config } => {
            convert("vm.receive-migration", &devices::RECEIVE, config)
        }
        C::RemoveDevice { id } => with("vm.remove-device", &json!({"id": id})),
        C::Resize { cpus: None, memory: None, balloon: None } => Err(CtlError::Nothing(
            "resize: nothing is to be changed; give --cpus N, --memory SIZE or --balloon SIZE",
        )),
        C::Resize { cpus, memory, balloon } => with(
            "vm.resize",
            &without_nulls(json!({"desired_vcpus": cpus, "desired_ram": memory, "desired_balloon": balloon})),
        ),
        C::ResizeDisk { disk, size } => with("vm.resize-disk", &json!({"id": disk, "desired_size": size})),
        C::ResizeZone { id, size } => with("vm.resize-zone", &json!({"id": id, "desired_ram": size})),
        C::Restore { restore_config } => convert("vm.restore", &devices::RESTORE, restore_config),
        C::Resume => plain("vm.resume"),
        C::SendMigration { send_migration_config: config } => {
            convert("vm.send-migration", &devices::SEND, config)
        }
        C::Shutdown => plain("vm.shutdown"),
        C::ShutdownVmm => plain("vmm.shutdown"),
        C::Snapshot { snapshot_config } => with("vm.snapshot", &json!({"destination_url": snapshot_config})),
        C::Power => reads("vm.power"),
        C::PowerPolicy { id, policy } => {
            let change = policy.as_deref().map(power::policy_change).transpose()?.unwrap_or_default();
            let mut body = serde_json::to_value(change)?;
            body["id"] = id.as_str().into();
            with("vm.power-policy", &body)
        }
        C::PowerWake { id } => with("vm.power-wake", &json!({"id": id})),
        C::PowerReset { id, clear_latch } => with(
            "vm.power-reset",
            &without_nulls(json!({"id": id, "clear_latch": clear_latch.then_some(true)})),
        ),
        C::Metrics { plain } => {
            let request = Request::get("/metrics");
            Ok((if *plain { request.accepting("text/plain") } else { request }, Vec::new()))
        }
    }
}

/// What is absent is left out: Cloud Hypervisor's own clients do the same.
fn without_nulls(mut value: Value) -> Value {
    if let Value::Object(object) = &mut value {
        object.retain(|_, value| !value.is_null());
    }
    value
}

fn convert(call: &str, schema: &Schema, text: &str) -> Result<(Request, Vec<OwnedFd>), CtlError> {
    let (body, fds) = schema.convert(text)?;
    Ok((Request::api_put(call, Some(body.to_string())), fds))
}

/// The same types as the VMM's own `--device`. A descriptor goes beside the JSON, which has nothing of it.
fn add_device(text: &str) -> Result<(Request, Vec<OwnedFd>), CtlError> {
    let mut config = DeviceConfig::parse(text)?;
    let fds = config.fd.take().map(own).transpose()?.into_iter().collect();
    Ok((Request::api_put("vm.add-device", Some(serde_json::to_string(&config)?)), fds))
}

/// The configuration goes to the VMM as it is: that knows what it takes.
fn create(path: &Path) -> Result<(Request, Vec<OwnedFd>), CtlError> {
    let read = || {
        if path == Path::new("-") {
            let mut text = String::new();
            io::stdin().lock().read_to_string(&mut text).map(|_| text)
        } else {
            std::fs::read_to_string(path)
        }
    };
    let text = read().map_err(|cause| {
        let from = if path == Path::new("-") { "standard input".into() } else { path.display().to_string() };
        CtlError::Configuration { from, cause }
    })?;
    Ok((Request::api_put("vm.create", Some(text)), Vec::new()))
}
