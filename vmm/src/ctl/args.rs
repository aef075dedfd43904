//! The commands of `dormouse ctl`: names and arguments are those of `ch-remote`; the last five are Dormouse's own.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::config::option_parser::{ByteSized, OptionValue};

/// Tell a running VMM what to do, over its API socket.
///
/// The commands are those of ch-remote, and five for the power of devices.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
pub struct CtlArgs {
    /// API socket of the VMM, as given to it by --api-socket.
    // The name within clap is not that of the VMM's own option, whose value this would become, as a global one.
    #[arg(id = "ctl_api_socket", long = "api-socket", value_name = "PATH", global = true, value_hint = clap::ValueHint::FilePath)]
    pub api_socket: Option<PathBuf>,
    /// Print the VMM's JSON as it is.
    #[arg(id = "ctl_json", long = "json", global = true)]
    pub json: bool,
    /// How long to wait for the reply; 0 is for ever. [default: 10 for commands that only read, 0 for others]
    #[arg(id = "ctl_timeout", long = "timeout", value_name = "SECONDS", global = true)]
    pub timeout: Option<u64>,
    /// What to do.
    #[command(subcommand)]
    pub command: CtlCommand,
}

impl CtlArgs {
    /// The socket; it may be written as the VMM's own option, `path=...`.
    pub fn socket(&self) -> Option<PathBuf> {
        let socket = self.api_socket.as_ref()?;
        Some(
            socket
                .to_str()
                .and_then(|text| text.strip_prefix("path="))
                .map_or_else(|| socket.clone(), Into::into),
        )
    }
}

/// One command.
#[derive(Clone, Debug, PartialEq, Eq, Subcommand)]
pub enum CtlCommand {
    /// Assign a host device: the keys of --device, such as path=/sys/bus/pci/devices/BDF,id=gpu0.
    AddDevice {
        /// Keys and values.
        #[arg(value_name = "KEYS")]
        device_config: String,
    },
    /// Add a disk: path=FILE,readonly=off,image_type=raw,id=...
    AddDisk {
        /// Keys and values of Cloud Hypervisor's --disk.
        #[arg(value_name = "KEYS")]
        disk_config: String,
    },
    /// Add a shared file system: tag=NAME,socket=PATH,...
    AddFs {
        /// Keys and values of Cloud Hypervisor's --fs.
        #[arg(value_name = "KEYS")]
        fs_config: String,
    },
    /// Add a vhost-user device of any type: device_type=N,socket=PATH,queue_sizes=[N,..],...
    AddGenericVhostUser {
        /// Keys and values of Cloud Hypervisor's --generic-vhost-user.
        #[arg(value_name = "KEYS")]
        generic_vhost_user_config: String,
    },
    /// Add a network interface: tap=NAME,mac=ADDRESS,... or fd=[N,..],...
    AddNet {
        /// Keys and values of Cloud Hypervisor's --net.
        #[arg(value_name = "KEYS")]
        net_config: String,
    },
    /// Add persistent memory: file=PATH,size=SIZE,...
    AddPmem {
        /// Keys and values of Cloud Hypervisor's --pmem.
        #[arg(value_name = "KEYS")]
        pmem_config: String,
    },
    /// Add a vfio-user device: socket=PATH,...
    AddUserDevice {
        /// Keys and values of Cloud Hypervisor's --user-device.
        #[arg(value_name = "KEYS")]
        device_config: String,
    },
    /// Add a vDPA device: path=/dev/vhost-vdpa-N,...
    AddVdpa {
        /// Keys and values of Cloud Hypervisor's --vdpa.
        #[arg(value_name = "KEYS")]
        vdpa_config: String,
    },
    /// Add a vsock device: cid=N,socket=PATH,...
    AddVsock {
        /// Keys and values of Cloud Hypervisor's --vsock.
        #[arg(value_name = "KEYS")]
        vsock_config: String,
    },
    /// Boot the VM that has been created.
    Boot,
    /// Write the guest's memory to a file.
    Coredump {
        /// Where to, such as file:///tmp/core.
        #[arg(value_name = "URL")]
        coredump_config: String,
    },
    /// Print the counters of all devices.
    Counters,
    /// Create a VM from a JSON configuration.
    Create {
        /// File with the configuration; - is standard input.
        #[arg(default_value = "-")]
        path: PathBuf,
    },
    /// Delete the VM.
    Delete,
    /// Print the VM's configuration and state.
    Info,
    /// Send the guest a non-maskable interrupt.
    Nmi,
    /// Stop the vCPUs.
    Pause,
    /// Ask whether the VMM is there, and its version.
    Ping,
    /// Press the guest's power button.
    PowerButton,
    /// Restart the guest.
    Reboot,
    /// Wait for a VM that another VMM sends: URL, or receiver_url=URL,...
    ReceiveMigration {
        /// Where it is awaited.
        #[arg(value_name = "URL|KEYS")]
        receive_migration_config: String,
    },
    /// Take a device away from the guest.
    RemoveDevice {
        /// Its id.
        id: String,
    },
    /// Change the number of vCPUs, the memory or the balloon.
    Resize {
        /// vCPUs.
        #[arg(long, value_name = "N")]
        cpus: Option<u32>,
        /// Memory: bytes, or with K, M or G.
        #[arg(long, value_name = "SIZE", value_parser = bytes)]
        memory: Option<u64>,
        /// Balloon: bytes, or with K, M or G.
        #[arg(long, value_name = "SIZE", value_parser = bytes)]
        balloon: Option<u64>,
    },
    /// Change the size of a disk.
    ResizeDisk {
        /// Its id.
        #[arg(long, value_name = "ID")]
        disk: String,
        /// Bytes, or with K, M or G.
        #[arg(long, value_name = "SIZE", value_parser = bytes)]
        size: u64,
    },
    /// Change the size of a memory zone.
    ResizeZone {
        /// Its id.
        #[arg(long, value_name = "ID")]
        id: String,
        /// Bytes, or with K, M or G.
        #[arg(long, value_name = "SIZE", value_parser = bytes)]
        size: u64,
    },
    /// Restore a VM from a snapshot: source_url=URL,resume=on,...
    Restore {
        /// Keys and values of Cloud Hypervisor's --restore.
        #[arg(value_name = "KEYS")]
        restore_config: String,
    },
    /// Let the vCPUs go on.
    Resume,
    /// Send the VM to another VMM: URL, or destination_url=URL,...
    SendMigration {
        /// Where to.
        #[arg(value_name = "URL|KEYS")]
        send_migration_config: String,
    },
    /// Switch the VM off; the VMM stays.
    Shutdown,
    /// End the VMM.
    ShutdownVmm,
    /// Write a snapshot of a paused VM.
    Snapshot {
        /// Where to, such as file:///var/lib/snapshot.
        #[arg(value_name = "URL")]
        snapshot_config: String,
    },
    /// Print the power of all assigned devices; touches none.
    Power,
    /// Change how the power of a device is handled, and print the whole policy.
    PowerPolicy {
        /// The device's id.
        id: String,
        /// power=auto|d3hot|off,wake=notify|ignore|host-only,hold_off=MS,... as in --device. None: only print.
        #[arg(value_name = "KEYS")]
        policy: Option<String>,
    },
    /// Bring a sleeping device back, as if the host had woken it.
    PowerWake {
        /// The device's id.
        id: String,
    },
    /// Reset a lost device, so that it may come back.
    PowerReset {
        /// The device's id.
        id: String,
        /// Let its slot sleep again after a device of it did not come back.
        #[arg(long)]
        clear_latch: bool,
    },
    /// Print all figures in the OpenMetrics format.
    Metrics {
        /// In Prometheus's older text format, which node_exporter reads from files.
        #[arg(long)]
        plain: bool,
    },
}

impl CtlCommand {
    /// Whether `ch-remote` does not have it.
    pub fn is_own(&self) -> bool {
        matches!(
            self,
            Self::Power
                | Self::PowerPolicy { .. }
                | Self::PowerWake { .. }
                | Self::PowerReset { .. }
                | Self::Metrics { .. }
        )
    }
}

fn bytes(text: &str) -> Result<u64, String> {
    ByteSized::parse(text).map(|size| size.0).ok_or_else(|| format!("it takes {}", ByteSized::EXPECTED))
}
