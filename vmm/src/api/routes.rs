//! The endpoints of `/api/v1`, their bodies and their answers.
//!
//! `PUT` for everything that changes something, `GET` for what reads; unknown fields of bodies are ignored and null is the same as absent.

use std::os::fd::OwnedFd;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use vfio_pm::PolicyChange;

use super::http::{Content, Method, Reply, Request};
use super::{Access, Api, info, metrics, power};
use crate::config::{
    Descriptors, DeviceConfig, DiskConfig, FsConfig, GenericVhostUserConfig, NetConfig, PmemConfig,
    RestoreConfig, VmConfig, VsockConfig, from_json,
};
use crate::orders::{Addition, Completion, Order, Resize};
use crate::vm_error::VmError;

/// Where all endpoints but `/metrics` are.
const PREFIX: &str = "/api/v1/";

/// What an endpoint does.
#[derive(Clone, Copy)]
enum Endpoint {
    /// GET: answered from memory.
    Read(fn(&Api) -> Result<Value, VmError>),
    /// PUT without a body.
    Plain(fn() -> Order),
    /// PUT with a body.
    Body(fn(&Api, &[u8]) -> Result<Answer, Failure>),
    /// PUT with a body, and open files beside it.
    BodyAndFiles(WithFiles),
    /// PUT of something that is not there yet.
    Absent(&'static str),
}

/// What takes a body, and open files that came with it.
type WithFiles = fn(&Api, &[u8], Vec<OwnedFd>) -> Result<Answer, Failure>;

/// What is in a reply.
enum Answer {
    Nothing,
    Json(Value),
}

/// Why there is none.
enum Failure {
    /// A body that cannot be read.
    Body(String),
    Vm(VmError),
}

impl From<VmError> for Failure {
    fn from(error: VmError) -> Self {
        Self::Vm(error)
    }
}

/// All endpoints: name, what went wrong if it fails, what it does.
const ENDPOINTS: &[(&str, &str, Endpoint)] = &[
    ("vmm.ping", "The VMM does not answer", Endpoint::Read(info::ping)),
    ("vmm.shutdown", "The VMM could not shut down", Endpoint::Plain(|| Order::End)),
    ("vm.info", "The VM info is not available", Endpoint::Read(info::info)),
    ("vm.counters", "The VM counters are not available", Endpoint::Read(info::counters)),
    ("vm.power", "The power of the VM's devices is not available", Endpoint::Read(power::power)),
    ("vm.create", "The VM could not be created", Endpoint::Body(create)),
    ("vm.boot", "The VM could not boot", Endpoint::Plain(|| Order::Boot)),
    ("vm.delete", "The VM could not be deleted", Endpoint::Plain(|| Order::Delete)),
    ("vm.shutdown", "The VM could not be shut down", Endpoint::Plain(|| Order::Shutdown)),
    ("vm.reboot", "The VM could not reboot", Endpoint::Plain(|| Order::Reboot)),
    ("vm.pause", "The VM could not be paused", Endpoint::Plain(|| Order::Pause)),
    ("vm.resume", "The VM could not resume", Endpoint::Plain(|| Order::Resume)),
    ("vm.power-button", "The power button could not be pressed", Endpoint::Plain(|| Order::PowerButton)),
    ("vm.nmi", "The NMI could not be sent", Endpoint::Plain(|| Order::Nmi)),
    ("vm.resize", "The VM could not be resized", Endpoint::Body(resize)),
    ("vm.add-device", "The device could not be added to the VM", Endpoint::Body(add_device)),
    ("vm.remove-device", "The device could not be removed from the VM", Endpoint::Body(remove_device)),
    ("vm.power-policy", "The power policy could not be changed", Endpoint::Body(power_policy)),
    ("vm.power-wake", "The device could not be woken", Endpoint::Body(power_wake)),
    ("vm.power-reset", "The device could not be recovered", Endpoint::Body(power_reset)),
    ("vm.add-user-device", "The device could not be added to the VM", Endpoint::Absent("a vfio-user device")),
    ("vm.add-disk", "The disk could not be added to the VM", Endpoint::Body(add_disk)),
    ("vm.add-fs", "The file system could not be added to the VM", Endpoint::Body(add_fs)),
    (
        "vm.add-generic-vhost-user",
        "The device could not be added to the VM",
        Endpoint::Body(add_generic_vhost_user),
    ),
    ("vm.add-net", "The network device could not be added to the VM", Endpoint::BodyAndFiles(add_net)),
    ("vm.add-pmem", "The pmem device could not be added to the VM", Endpoint::Body(add_pmem)),
    ("vm.add-vdpa", "The vDPA device could not be added to the VM", Endpoint::Absent("vDPA")),
    ("vm.add-vsock", "The vsock device could not be added to the VM", Endpoint::Body(add_vsock)),
    ("vm.resize-disk", "The disk could not be resized", Endpoint::Body(resize_disk)),
    ("vm.resize-zone", "The memory zone could not be resized", Endpoint::Body(resize_zone)),
    ("vm.snapshot", "The VM could not be snapshotted", Endpoint::Body(snapshot)),
    ("vm.restore", "The VM could not be restored", Endpoint::BodyAndFiles(restore)),
    ("vm.coredump", "The VM could not be dumped", Endpoint::Absent("core dumps")),
    ("vm.receive-migration", "The VM could not be received", Endpoint::Absent("live migration")),
    ("vm.send-migration", "The VM could not be sent", Endpoint::Absent("live migration")),
];

/// Method and path of everything that is served.
#[cfg(test)]
pub fn all() -> impl Iterator<Item = (&'static str, String)> {
    let endpoints = ENDPOINTS.iter().map(|(name, _, endpoint)| {
        (if matches!(endpoint, Endpoint::Read(_)) { "get" } else { "put" }, format!("{PREFIX}{name}"))
    });
    endpoints.chain([("get", "/metrics".to_owned())])
}

/// Answers a request.
pub fn answer(request: Request, api: &Api, access: Access) -> Reply {
    if request.path == "/metrics" {
        return match request.method {
            Method::Get if request.wants_plain_text => {
                Reply { status: 200, body: Some((Content::PlainText, metrics::plain(api))) }
            }
            Method::Get => {
                let text = metrics::open_metrics(api).into_bytes();
                Reply { status: 200, body: Some((Content::OpenMetrics, text)) }
            }
            _ => bad_request(),
        };
    }
    let name = request.path.strip_prefix(PREFIX).filter(|_| access != Access::Metrics).unwrap_or_default();
    let Some((_, what, endpoint)) = ENDPOINTS.iter().find(|(known, ..)| *known == name) else {
        return error(404, vec!["Not Found".to_owned()]);
    };
    if !request.descriptors.is_empty() && !matches!(endpoint, Endpoint::Absent(_) | Endpoint::BodyAndFiles(_))
    {
        let count = request.descriptors.len();
        return error(
            400,
            vec![format!("{count} file descriptors came with the request, and {name} takes none")],
        );
    }
    let body = request.body.as_deref();
    if request.method == Method::Unserved {
        return Reply::empty(400);
    }
    let result = match (endpoint, request.method, body) {
        (Endpoint::Read(read), Method::Get, _) => read(api).map(Answer::Json).map_err(Failure::Vm),
        (Endpoint::Read(_), ..) | (_, Method::Get, _) => return bad_request(),
        _ if access == Access::ReadOnly => {
            let why = "this socket only shows the VM; give the VMM an --api-socket to change it";
            return error(403, vec![why.to_owned()]);
        }
        (Endpoint::Plain(_), _, Some(_)) => return bad_request(),
        (Endpoint::Plain(order), ..) => place(api, order()),
        (Endpoint::Body(_) | Endpoint::BodyAndFiles(_), _, None) => {
            Err(Failure::Body("the request has no body".to_owned()))
        }
        (Endpoint::Body(act), _, Some(body)) => act(api, body),
        (Endpoint::BodyAndFiles(act), _, Some(body)) => act(api, body, request.descriptors),
        (Endpoint::Absent(what), ..) => Err(Failure::Vm(VmError::NotYet { what })),
    };
    match result {
        Ok(Answer::Json(value)) => json(200, &value),
        // The one endpoint that has always answered so.
        Ok(Answer::Nothing) if name == "vmm.shutdown" => Reply::empty(200),
        Ok(Answer::Nothing) => Reply::empty(204),
        Err(Failure::Body(why)) => error(400, vec!["Error from API".to_owned(), (*what).to_owned(), why]),
        Err(Failure::Vm(e)) => {
            let mut chain = vec!["Error from API".to_owned(), (*what).to_owned()];
            chain.extend(e.chain());
            error(e.status(), chain)
        }
    }
}

fn json(status: u16, value: &impl Serialize) -> Reply {
    let body = serde_json::to_vec(value).unwrap_or_default();
    Reply { status, body: Some((Content::Json, body)) }
}

/// Errors are arrays of messages, outermost first.
fn error(status: u16, chain: Vec<String>) -> Reply {
    json(status, &chain)
}

fn bad_request() -> Reply {
    error(400, vec!["Bad Request".to_owned()])
}

fn place(api: &Api, order: Order) -> Result<Answer, Failure> {
    Ok(match api.orders.place(order)? {
        Completion::Plain => Answer::Nothing,
        Completion::Device { id, bdf } => Answer::Json(serde_json::json!({ "id": id, "bdf": bdf })),
        Completion::Policy(policy) => Answer::Json(serde_json::to_value(policy).unwrap_or_default()),
    })
}

/// A body in its typed form; null fields are left out first, since clients write them for what they do not mean.
fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Failure> {
    from_json(body).map_err(|e| Failure::Body(format!("the body cannot be used: {e}")))
}

fn create(api: &Api, body: &[u8]) -> Result<Answer, Failure> {
    place(api, Order::Create(Box::new(parse::<VmConfig>(body)?)))
}

#[derive(Deserialize)]
struct ResizeBody {
    desired_vcpus: Option<u32>,
    desired_ram: Option<u64>,
    desired_balloon: Option<u64>,
}

fn resize(api: &Api, body: &[u8]) -> Result<Answer, Failure> {
    let ResizeBody { desired_vcpus, desired_ram, desired_balloon } = parse(body)?;
    let resize = Resize { vcpus: desired_vcpus, ram: desired_ram, balloon: desired_balloon };
    place(api, Order::Resize(resize))
}

#[derive(Deserialize)]
struct ResizeZoneBody {
    id: String,
    desired_ram: u64,
}

fn resize_zone(api: &Api, body: &[u8]) -> Result<Answer, Failure> {
    let ResizeZoneBody { id, desired_ram } = parse(body)?;
    place(api, Order::ResizeZone(id, desired_ram))
}

fn add_device(api: &Api, body: &[u8]) -> Result<Answer, Failure> {
    place(api, Order::AddDevice(Box::new(parse::<DeviceConfig>(body)?)))
}

/// Adds a device of the machine's own: `insert` makes it part of the configuration.
fn add_emulated(api: &Api, insert: impl FnOnce(&mut VmConfig) + Send + 'static) -> Result<Answer, Failure> {
    place(api, Order::AddEmulated(Addition(Box::new(insert))))
}

fn add_disk(api: &Api, body: &[u8]) -> Result<Answer, Failure> {
    let disk = parse::<DiskConfig>(body)?;
    add_emulated(api, move |config| config.disks.get_or_insert_default().push(disk))
}

#[derive(Deserialize)]
struct ResizeDiskBody {
    id: String,
    desired_size: u64,
}

fn resize_disk(api: &Api, body: &[u8]) -> Result<Answer, Failure> {
    let ResizeDiskBody { id, desired_size } = parse(body)?;
    place(api, Order::ResizeDisk { id, size: desired_size })
}

fn add_fs(api: &Api, body: &[u8]) -> Result<Answer, Failure> {
    let fs = parse::<FsConfig>(body)?;
    add_emulated(api, move |config| config.fs.get_or_insert_default().push(fs))
}

fn add_generic_vhost_user(api: &Api, body: &[u8]) -> Result<Answer, Failure> {
    let device = parse::<GenericVhostUserConfig>(body)?;
    add_emulated(api, move |config| config.generic_vhost_user.get_or_insert_default().push(device))
}

fn add_net(api: &Api, body: &[u8], files: Vec<OwnedFd>) -> Result<Answer, Failure> {
    let mut net = parse::<NetConfig>(body)?;
    if !files.is_empty() {
        net.fds = Some(Descriptors::of_files(files));
    }
    add_emulated(api, move |config| config.net.get_or_insert_default().push(net))
}

fn add_pmem(api: &Api, body: &[u8]) -> Result<Answer, Failure> {
    let pmem = parse::<PmemConfig>(body)?;
    add_emulated(api, move |config| config.pmem.get_or_insert_default().push(pmem))
}

fn add_vsock(api: &Api, body: &[u8]) -> Result<Answer, Failure> {
    let vsock = parse::<VsockConfig>(body)?;
    // The second is not inserted, which is an error.
    add_emulated(api, move |config| {
        config.vsock.get_or_insert(vsock);
    })
}

#[derive(Deserialize)]
struct SnapshotBody {
    destination_url: String,
}

fn snapshot(api: &Api, body: &[u8]) -> Result<Answer, Failure> {
    let SnapshotBody { destination_url } = parse(body)?;
    place(api, Order::Snapshot(destination_url))
}

fn restore(api: &Api, body: &[u8], files: Vec<OwnedFd>) -> Result<Answer, Failure> {
    let mut config = parse::<RestoreConfig>(body)?;
    config.take_files(files).map_err(|e| Failure::Body(e.to_string()))?;
    place(api, Order::Restore(Box::new(config)))
}

#[derive(Deserialize)]
struct DeviceName {
    id: String,
}

fn remove_device(api: &Api, body: &[u8]) -> Result<Answer, Failure> {
    let DeviceName { id } = parse(body)?;
    place(api, Order::RemoveDevice(id))
}

fn power_policy(api: &Api, body: &[u8]) -> Result<Answer, Failure> {
    let mut fields: serde_json::Map<String, Value> = parse(body)?;
    let id = match fields.remove("id") {
        Some(Value::String(id)) => id,
        _ => return Err(Failure::Body("the body needs the device's name: \"id\": \"...\"".to_owned())),
    };
    // Of a policy every field is meant, so one that is not known is a mistake.
    let change: PolicyChange = serde_json::from_value(Value::Object(fields))
        .map_err(|e| Failure::Body(format!("the body cannot be used: {e}")))?;
    place(api, Order::PowerPolicy(id, change))
}

fn power_wake(api: &Api, body: &[u8]) -> Result<Answer, Failure> {
    let DeviceName { id } = parse(body)?;
    let result = api.status.wake(&id).ok_or(VmError::UnknownDevice { id })?;
    result.map(|_| Answer::Nothing).map_err(|e| Failure::Vm(e.into()))
}

#[derive(Deserialize)]
struct ResetBody {
    id: String,
    #[serde(default)]
    clear_latch: bool,
}

fn power_reset(api: &Api, body: &[u8]) -> Result<Answer, Failure> {
    let ResetBody { id, clear_latch } = parse(body)?;
    let result = api.status.recover(&id, clear_latch).ok_or(VmError::UnknownDevice { id })?;
    result.map(|()| Answer::Nothing).map_err(|e| Failure::Vm(e.into()))
}
