//! Keys of options that the VMM's own configuration has no type for, and the JSON that Cloud Hypervisor's API has for them.
//!
//! One table for each command. What is not given is left out of the JSON, so defaults are the VMM's. Descriptors are taken out: the API gets them
//! with the request, in the order in which it looks for them.

use std::os::fd::OwnedFd;

use serde_json::{Map, Value, json};

use crate::client::own;
use crate::config::OptionError;
use crate::config::option_parser::{ByteSized, IntegerList, Key, OptionValue, Options, Toggle, Tuples};

use super::CtlError;

use Kind::{
    Affinity, Bytes, Descriptor, Descriptors, DeviceDescriptors, InterfaceDescriptors, Numbers, Switch, Text,
    U8, U16, U32, U64, Word, Zones,
};

/// The form of a value.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Text,
    Switch,
    U8,
    U16,
    U32,
    U64,
    Bytes,
    Numbers,
    /// What it can be, for messages; each word, and the name of the variant in JSON.
    Word(&'static str, &'static [(&'static str, &'static str)]),
    /// `[queue@[cpus]]`
    Affinity,
    /// `[id@node]`
    Zones,
    /// A descriptor; JSON has nothing of it.
    Descriptor,
    /// `[a,b]`, likewise.
    Descriptors,
    /// `[id@[fds]]`
    InterfaceDescriptors,
    /// `[id@fd]`
    DeviceDescriptors,
}

/// One key.
#[derive(Clone, Copy, Debug)]
struct Field {
    key: &'static str,
    /// Its place in JSON; dots lead into objects.
    json: &'static str,
    kind: Kind,
    required: bool,
}

const fn field(key: &'static str, kind: Kind) -> Field {
    Field { key, json: key, kind, required: false }
}

const fn required(key: &'static str, kind: Kind) -> Field {
    Field { key, json: key, kind, required: true }
}

const fn renamed(key: &'static str, json: &'static str, kind: Kind) -> Field {
    Field { key, json, kind, required: false }
}

const ID: Field = field("id", Text);
const SEGMENT: Field = field("pci_segment", U16);
const SLOT: Field = field("pci_device_id", U8);
const IOMMU: Field = field("iommu", Switch);
const MEMORY_MODE: Field =
    field("memory_mode", Word("precopy or postcopy", &[("precopy", "Precopy"), ("postcopy", "Postcopy")]));

/// What an option takes: its name in messages, the key of a value without one, and its keys.
#[derive(Debug)]
pub struct Schema {
    name: &'static str,
    bare: Option<&'static str>,
    fields: &'static [Field],
}

/// `add-disk`
pub const DISK: Schema = Schema {
    name: "add-disk",
    bare: None,
    fields: &[
        field("path", Text),
        field("readonly", Switch),
        field("direct", Switch),
        IOMMU,
        field("num_queues", U64),
        field("queue_size", U16),
        field("vhost_user", Switch),
        renamed("socket", "vhost_socket", Text),
        renamed("bw_size", "rate_limiter_config.bandwidth.size", U64),
        renamed("bw_one_time_burst", "rate_limiter_config.bandwidth.one_time_burst", U64),
        renamed("bw_refill_time", "rate_limiter_config.bandwidth.refill_time", U64),
        renamed("ops_size", "rate_limiter_config.ops.size", U64),
        renamed("ops_one_time_burst", "rate_limiter_config.ops.one_time_burst", U64),
        renamed("ops_refill_time", "rate_limiter_config.ops.refill_time", U64),
        field("rate_limit_group", Text),
        field("queue_affinity", Affinity),
        field("serial", Text),
        field("backing_files", Switch),
        field("sparse", Switch),
        field(
            "image_type",
            Word(
                "raw, qcow2, vhd, vhdx or vmdk",
                &[
                    ("raw", "Raw"),
                    ("qcow2", "Qcow2"),
                    ("vhd", "FixedVhd"),
                    ("vhdx", "Vhdx"),
                    ("vmdk", "FlatVmdk"),
                ],
            ),
        ),
        field(
            "lock_granularity",
            Word("byte-range or full", &[("byte-range", "ByteRange"), ("full", "Full")]),
        ),
        ID,
        SEGMENT,
        SLOT,
        renamed("_disable_io_uring", "disable_io_uring", Switch),
        renamed("_disable_aio", "disable_aio", Switch),
    ],
};

/// `add-net`
pub const NET: Schema = Schema {
    name: "add-net",
    bare: None,
    fields: &[
        field("tap", Text),
        field("ip", Text),
        field("mask", Text),
        field("mac", Text),
        field("host_mac", Text),
        field("mtu", U16),
        field("fd", Descriptors),
        IOMMU,
        field("num_queues", U64),
        field("queue_size", U16),
        field("vhost_user", Switch),
        renamed("socket", "vhost_socket", Text),
        field("vhost_mode", Word("client or server", &[("client", "Client"), ("server", "Server")])),
        renamed("bw_size", "rate_limiter_config.bandwidth.size", U64),
        renamed("bw_one_time_burst", "rate_limiter_config.bandwidth.one_time_burst", U64),
        renamed("bw_refill_time", "rate_limiter_config.bandwidth.refill_time", U64),
        renamed("ops_size", "rate_limiter_config.ops.size", U64),
        renamed("ops_one_time_burst", "rate_limiter_config.ops.one_time_burst", U64),
        renamed("ops_refill_time", "rate_limiter_config.ops.refill_time", U64),
        field("offload_tso", Switch),
        field("offload_ufo", Switch),
        field("offload_csum", Switch),
        field("vhost", Word("on, off or auto", &[("on", "On"), ("off", "Off"), ("auto", "Auto")])),
        ID,
        SEGMENT,
        SLOT,
    ],
};

/// `add-fs`
pub const FS: Schema = Schema {
    name: "add-fs",
    bare: None,
    fields: &[
        required("tag", Text),
        required("socket", Text),
        field("num_queues", U64),
        field("queue_size", U16),
        ID,
        SEGMENT,
        SLOT,
    ],
};

/// `add-generic-vhost-user`
pub const GENERIC_VHOST_USER: Schema = Schema {
    name: "add-generic-vhost-user",
    bare: None,
    fields: &[
        field("device_type", U32),
        renamed("virtio_id", "device_type", U32),
        required("socket", Text),
        required("queue_sizes", Numbers),
        ID,
        SEGMENT,
        SLOT,
    ],
};

/// `add-pmem`
pub const PMEM: Schema = Schema {
    name: "add-pmem",
    bare: None,
    fields: &[
        required("file", Text),
        field("size", Bytes),
        field("discard_writes", Switch),
        IOMMU,
        ID,
        SEGMENT,
        SLOT,
    ],
};

/// `add-user-device`
pub const USER_DEVICE: Schema =
    Schema { name: "add-user-device", bare: None, fields: &[required("socket", Text), ID, SEGMENT, SLOT] };

/// `add-vdpa`
pub const VDPA: Schema = Schema {
    name: "add-vdpa",
    bare: None,
    fields: &[required("path", Text), field("num_queues", U64), IOMMU, ID, SEGMENT, SLOT],
};

/// `add-vsock`
pub const VSOCK: Schema = Schema {
    name: "add-vsock",
    bare: None,
    fields: &[required("cid", U32), required("socket", Text), IOMMU, ID, SEGMENT, SLOT],
};

/// `restore`
pub const RESTORE: Schema = Schema {
    name: "restore",
    bare: None,
    fields: &[
        required("source_url", Text),
        field("prefault", Switch),
        field("memory_restore_mode", Word("copy or ondemand", &[("copy", "Copy"), ("ondemand", "OnDemand")])),
        field("net_fds", InterfaceDescriptors),
        field("vfio_fds", DeviceDescriptors),
        field("iommufd_fd", Descriptor),
        field("resume", Switch),
        field("zone_updates", Zones),
    ],
};

/// `receive-migration`
pub const RECEIVE: Schema = Schema {
    name: "receive-migration",
    bare: Some("receiver_url"),
    fields: &[
        required("receiver_url", Text),
        field("tls_dir", Text),
        MEMORY_MODE,
        field("vfio_fds", DeviceDescriptors),
        field("iommufd_fd", Descriptor),
        field("zone_updates", Zones),
    ],
};

/// `send-migration`
pub const SEND: Schema = Schema {
    name: "send-migration",
    bare: Some("destination_url"),
    fields: &[
        required("destination_url", Text),
        field("local", Switch),
        field("preserve_source", Switch),
        field("downtime_ms", U64),
        field("timeout_s", U64),
        field("timeout_strategy", Word("cancel or ignore", &[("cancel", "Cancel"), ("ignore", "Ignore")])),
        field("connections", U32),
        field("tls_dir", Text),
        MEMORY_MODE,
    ],
};

/// A descriptor's number.
struct Fd(i32);

impl OptionValue for Fd {
    const EXPECTED: &'static str = "the number of an open file descriptor";

    fn parse(text: &str) -> Option<Self> {
        i32::try_from(u32::parse(text)?).ok().map(Self)
    }
}

/// Descriptors' numbers.
struct Fds(Vec<Fd>);

impl OptionValue for Fds {
    const EXPECTED: &'static str = "a list of open file descriptors such as [3,4]";

    fn parse(text: &str) -> Option<Self> {
        let fds = IntegerList::parse(text)?.0;
        fds.into_iter().map(|fd| Some(Fd(fd.try_into().ok()?))).collect::<Option<_>>().map(Self)
    }
}

impl Schema {
    /// The JSON for `text`, and the descriptors that go with it.
    pub fn convert(&self, text: &str) -> Result<(Value, Vec<OwnedFd>), CtlError> {
        let text = match self.bare {
            Some(key) if !text.contains('=') => format!("{key}={text}"),
            _ => text.to_owned(),
        };
        let keys: Vec<Key> = self.fields.iter().map(|field| Key::Value(field.key)).collect();
        let options = Options::parse(self.name, &text, &keys)?;
        let (mut object, mut fds) = (Map::new(), Vec::new());
        for field in self.fields {
            if !options.has(field.key) {
                if field.required {
                    return Err(CtlError::MissingKey { option: self.name, key: field.key });
                }
                continue;
            }
            if let Some(value) = self.value(&options, field, &mut fds)? {
                place(&mut object, field.json, value);
            }
        }
        Ok((Value::Object(object), fds))
    }

    /// The value of a key that was given; `None` for what is only a descriptor.
    fn value(
        &self,
        options: &Options,
        field: &Field,
        fds: &mut Vec<OwnedFd>,
    ) -> Result<Option<Value>, CtlError> {
        let key = field.key;
        Ok(match field.kind {
            Text => options.get::<String>(key)?.map(Value::from),
            Switch => options.get::<Toggle>(key)?.map(|toggle| toggle.0.into()),
            Bytes => options.get::<ByteSized>(key)?.map(|size| size.0.into()),
            Numbers => options.get::<IntegerList>(key)?.map(|list| list.0.into()),
            U8 => options.get::<u8>(key)?.map(Value::from),
            U16 => options.get::<u16>(key)?.map(Value::from),
            U32 => options.get::<u32>(key)?.map(Value::from),
            U64 => options.get::<u64>(key)?.map(Value::from),
            Word(expected, words) => {
                let value = options.get::<String>(key)?.unwrap_or_default();
                let found = words.iter().find(|(word, _)| word.eq_ignore_ascii_case(&value));
                let Some((_, name)) = found else {
                    return Err(OptionError::InvalidValue { option: self.name, key, value, expected }.into());
                };
                Some((*name).into())
            }
            Affinity => options.get::<Tuples<u16, IntegerList>>(key)?.map(|pairs| {
                let pairs = pairs.0.into_iter();
                pairs.map(|(queue, cpus)| json!({"queue_index": queue, "host_cpus": cpus.0})).collect()
            }),
            Zones => options.get::<Tuples<String, u32>>(key)?.map(|pairs| {
                let pairs = pairs.0.into_iter();
                pairs.map(|(id, node)| json!({"id": id, "host_numa_node": node})).collect()
            }),
            Descriptor => {
                fds.extend(options.get::<Fd>(key)?.map(|fd| own(fd.0)).transpose()?);
                None
            }
            Descriptors => {
                for fd in options.get::<Fds>(key)?.map(|fds| fds.0).unwrap_or_default() {
                    fds.push(own(fd.0)?);
                }
                None
            }
            InterfaceDescriptors => {
                let mut list = Vec::new();
                for (id, numbers) in pairs(options.get::<Tuples<String, Fds>>(key)?) {
                    list.push(json!({"id": id, "num_fds": numbers.0.len()}));
                    for fd in numbers.0 {
                        fds.push(own(fd.0)?);
                    }
                }
                Some(list.into())
            }
            DeviceDescriptors => {
                let mut list = Vec::new();
                for (id, fd) in pairs(options.get::<Tuples<String, Fd>>(key)?) {
                    list.push(json!({"id": id}));
                    fds.push(own(fd.0)?);
                }
                Some(list.into())
            }
        })
    }
}

fn pairs<A, B>(tuples: Option<Tuples<A, B>>) -> Vec<(A, B)> {
    tuples.map(|tuples| tuples.0).unwrap_or_default()
}

/// Puts `value` where `path` leads, through objects that are made on the way.
fn place(object: &mut Map<String, Value>, path: &str, value: Value) {
    match path.split_once('.') {
        None => drop(object.insert(path.to_owned(), value)),
        Some((name, rest)) => {
            let inner = object.entry(name).or_insert_with(|| json!({}));
            if let Value::Object(inner) = inner {
                place(inner, rest, value);
            }
        }
    }
}
