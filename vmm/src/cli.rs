//! The command line: options as Cloud Hypervisor spells them, and what the user asked for by them.
//!
//! Options of Cloud Hypervisor that Dormouse does not have yet are known by name, so that they are refused as
//! such and not as a typing error.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{ArgAction, ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use log::LevelFilter;
use pci::Bdf;
use thiserror::Error;

use crate::config::{
    BalloonConfig, ConsoleConfig, CpusConfig, DebugConsoleConfig, DeviceConfig, DiskConfig, Endpoint,
    FsConfig, GenericVhostUserConfig, MemoryConfig, MemoryZoneConfig, NetConfig, NumaConfig, OptionError,
    PayloadConfig, PciSegmentConfig, PlatformConfig, PmemConfig, RateLimitGroupConfig, RestoreConfig,
    RngConfig, VirtioConsoleConfig, VmConfig, VsockConfig,
};
use crate::ctl::CtlArgs;
use crate::doctor::DoctorOptions;
use crate::logger::{FormatError, LogFormat};
use crate::manual;
use crate::multicall::{self, Program};
use crate::top::TopArgs;

#[cfg(test)]
mod tests;

/// Options of Cloud Hypervisor that are refused, with or without values.
const NOT_YET: &[&str] = &[
    "dbus-object-path",
    "dbus-service-name",
    "dbus-system-bus",
    "fw-cfg-config",
    "gdb",
    "host-data",
    "igvm",
    "ivshmem",
    "landlock",
    "landlock-rules",
    "pvmemcontrol",
    "rtc",
    "tpm",
    "user-device",
    "vdpa",
];

/// Boots a virtual machine whose assigned devices really sleep.
#[derive(Debug, Parser)]
#[command(
    name = "dormouse",
    version = concat!("v", env!("CARGO_PKG_VERSION")),
    arg_required_else_help = true,
    args_conflicts_with_subcommands = true
)]
struct Cli {
    #[command(flatten)]
    run: Run,
    #[command(subcommand)]
    command: Option<Command>,
}

/// The same VMM under Cloud Hypervisor's name: without the commands, which are none of Cloud Hypervisor's.
#[derive(Debug, Parser)]
#[command(
    name = "cloud-hypervisor",
    version = multicall::VERSION_LINES,
    arg_required_else_help = true
)]
struct CloudHypervisor {
    #[command(flatten)]
    run: Run,
}

/// The client under the name of Cloud Hypervisor's.
#[derive(Debug, Parser)]
#[command(name = "ch-remote", version = multicall::VERSION, arg_required_else_help = true)]
struct ChRemote {
    #[command(flatten)]
    ctl: CtlArgs,
}

#[derive(Debug, Args)]
struct Run {
    /// Kernel to boot: a bzImage, or an ELF file with a PVH entry point.
    #[arg(long, value_name = "PATH")]
    kernel: Option<PathBuf>,
    /// Firmware to boot instead of a kernel: an ELF file with a PVH entry point, such as CLOUDHV.fd
    #[arg(long, value_name = "PATH")]
    firmware: Option<PathBuf>,
    /// Initial RAM file system for the kernel.
    #[arg(long, value_name = "PATH")]
    initramfs: Option<PathBuf>,
    /// Command line of the kernel.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    cmdline: Option<String>,
    /// Processors: boot=1,max=BOOT,topology=THREADS:CORES:DIES:PACKAGES,affinity=[VCPU@[HOST..]..],
    /// core_scheduling=vm|vcpu|off,max_phys_bits=46,nested=on,features=[..],kvm_hyperv=off
    #[arg(long, value_name = "KEYS")]
    cpus: Option<String>,
    /// Memory: size=512M,shared=off,hugepages=off,hugepage_size=,hotplug_size=,hotplugged_size=,prefault=off,reserve=off,thp=on,
    /// mergeable=off
    #[arg(long, value_name = "KEYS")]
    memory: Option<String>,
    /// Memory zone: id=NAME,size=512M,file=PATH,shared=off,hugepages=off,hugepage_size=,host_numa_node=,hotplug_size=,hotplugged_size=,
    /// prefault=off,reserve=off,mergeable=off; with --memory size=0. Takes several values, and can be repeated.
    #[arg(long, value_name = "KEYS", num_args = 1.., action = ArgAction::Append)]
    memory_zone: Vec<String>,
    /// Node of the guest: guest_numa_id=N,cpus=[..],distances=[..],memory_zones=[..],device_id=NAME,pci_segments=[..].
    /// Takes several values, and can be repeated.
    #[arg(long, value_name = "KEYS", num_args = 1.., action = ArgAction::Append)]
    numa: Vec<String>,
    /// Share of a PCI segment in the addresses for BARs: pci_segment=N,mmio32_aperture_weight=1,mmio64_aperture_weight=1.
    /// Takes several values, and can be repeated.
    #[arg(long, value_name = "KEYS", num_args = 1.., action = ArgAction::Append)]
    pci_segment: Vec<String>,
    /// Machine: num_pci_segments=1,iommufd=off,system_serial_number=,system_uuid=,oem_strings=[..] and other SMBIOS strings
    #[arg(long, value_name = "KEYS")]
    platform: Option<String>,
    /// Serial port: off, null, pty, tty, file=PATH or socket=PATH
    #[arg(long, value_name = "MODE", default_value = "null")]
    serial: String,
    /// Paravirtual console: off, null, pty, tty, file=PATH or socket=PATH, and pci_device_id=N
    #[arg(long, value_name = "MODE", default_value = "off")]
    console: String,
    /// Debug console, a port for text: off, null, pty, tty or file=PATH, and iobase=0xe9
    #[arg(long, value_name = "MODE", default_value = "off")]
    debug_console: String,
    /// A device by which the guest's kernel says that it has panicked; it becomes an event
    #[arg(long)]
    pvpanic: bool,
    /// Disk: path=FILE,readonly=off,direct=off,image_type=raw|qcow2,num_queues=1,queue_size=128,serial=,id=,rate_limit_group=,
    /// bw_size=,bw_refill_time=MS,ops_size=,ops_refill_time=MS,backing_files=off,sparse=on,lock_granularity=byte-range|full
    /// and more. Takes several values, and can be repeated.
    #[arg(long, value_name = "KEYS", num_args = 1.., action = ArgAction::Append)]
    disk: Vec<String>,
    /// Rate limit that several disks share: id=,bw_size=,bw_refill_time=MS,ops_size=,ops_refill_time=MS and bursts.
    /// Takes several values, and can be repeated.
    #[arg(long, value_name = "KEYS", num_args = 1.., action = ArgAction::Append)]
    rate_limit_group: Vec<String>,
    /// Network device: tap=NAME or fd=[N,..],mac=,ip=,mask=,host_mac=,mtu=,num_queues=2,queue_size=256,offload_tso=on,
    /// offload_ufo=on,offload_csum=on,bw_size=,bw_refill_time=MS,ops_size=,ops_refill_time=MS,vhost=off|on|auto,id=.
    /// Takes several values, and can be repeated.
    #[arg(long, value_name = "KEYS", num_args = 1.., action = ArgAction::Append)]
    net: Vec<String>,
    /// Source of the guest's random numbers: src=/dev/urandom
    #[arg(long, value_name = "KEYS")]
    rng: Option<String>,
    /// Shared file system: tag=NAME,socket=PATH,num_queues=1,queue_size=1024,id=. Takes several values, and can be repeated.
    #[arg(long, value_name = "KEYS", num_args = 1.., action = ArgAction::Append)]
    fs: Vec<String>,
    /// vhost-user device of any type: device_type=N,socket=PATH,queue_sizes=[N,..],id=. Takes several values, and can be repeated.
    #[arg(long, value_name = "KEYS", num_args = 1.., action = ArgAction::Append)]
    generic_vhost_user: Vec<String>,
    /// Persistent memory: file=PATH,size=,discard_writes=off,id=. Takes several values, and can be repeated.
    #[arg(long, value_name = "KEYS", num_args = 1.., action = ArgAction::Append)]
    pmem: Vec<String>,
    /// Memory balloon: size=0,deflate_on_oom=off,free_page_reporting=off
    #[arg(long, value_name = "KEYS")]
    balloon: Option<String>,
    /// Watchdog: resets a guest that has given it signs of life and falls silent
    #[arg(long)]
    watchdog: bool,
    /// Sockets between guest and host: cid=3,socket=PATH of the Unix socket to make
    #[arg(long, value_name = "KEYS")]
    vsock: Option<String>,
    /// Assigned device: path=/sys/bus/pci/devices/BDF,id=,power=auto|d3hot|off,wake=notify|ignore|host-only,
    /// hold_off=MS,toggle_rate=N,toggle_burst=N,wake_storm=N,on_timeout=MS,on_lost=reset|keep.
    /// Takes several values, and can be repeated.
    #[arg(long, value_name = "KEYS", num_args = 1.., action = ArgAction::Append)]
    device: Vec<String>,
    /// Write the log to this file instead of standard error.
    #[arg(long, value_name = "PATH")]
    log_file: Option<PathBuf>,
    /// Form of a log line: text with {boottime}, {wallclock}, {pid}, {tid}, {thread}, {level}, {location}, {msg}
    #[arg(long, value_name = "TEXT")]
    log_format: Option<String>,
    /// Serve the REST API on a Unix socket: path=PATH, or fd=N for one that listens already
    #[arg(long, value_name = "path=PATH|fd=N")]
    api_socket: Option<String>,
    /// Serve only GET /metrics on a Unix socket
    #[arg(long, value_name = "path=PATH|fd=N")]
    metrics_socket: Option<String>,
    /// Tell what happens, as JSON: path=PATH of a file or pipe, or fd=N
    #[arg(long, value_name = "path=PATH|fd=N")]
    event_monitor: Option<String>,
    /// Go on from a snapshot: source_url=file:///DIRECTORY,resume=off,prefault=off,memory_restore_mode=copy|ondemand,
    /// net_fds=[ID@[FD..]..],zone_updates=[..]
    #[arg(long, value_name = "KEYS")]
    restore: Option<String>,
    /// Stay when the guest has switched itself off, and wait for orders
    #[arg(long)]
    no_shutdown: bool,
    /// Log more: -v, -vv, -vvv.
    #[arg(short = 'v', action = ArgAction::Count)]
    verbosity: u8,
    /// System call filter: there is none yet, whatever is asked for.
    #[arg(long, value_name = "MODE", value_enum, hide = true)]
    seccomp: Option<Seccomp>,
}

/// System call filters of Cloud Hypervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Seccomp {
    True,
    False,
    Log,
    Errno,
}

// Deferred: a machine that starts does not pay for the options of commands that are not given.
#[derive(Debug, Subcommand)]
#[command(defer = true)]
enum Command {
    /// Give a host device, with its whole IOMMU group, to vfio-pci, so that a guest can have it.
    Bind {
        /// PCI address on the host, such as 0000:01:00.0.
        bdf: Bdf,
        /// Take it away even if the host has mounted a file system of it.
        #[arg(long)]
        force: bool,
    },
    /// Give a host device, with its whole IOMMU group, back to its own driver.
    Unbind {
        /// PCI address on the host, such as 0000:01:00.0.
        bdf: Bdf,
    },
    /// Say what keeps a host device from losing its power, without waking it. Without BDF: a table of all devices.
    ///
    /// The exit status is 0 if all is well, 2 if there are warnings, 3 if something keeps the device from D3cold or from a guest, and
    /// 1 if the doctor itself failed. Without BDF it is that of the device that is best off.
    Doctor {
        /// PCI address on the host, such as 0000:01:00.0.
        bdf: Option<Bdf>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
        /// Really try it: bind the device to vfio-pci if need be, put it to sleep, bring it back, and leave it as it was.
        #[arg(long, requires = "bdf")]
        verify: bool,
    },
    /// Tell a running VMM what to do, over its API socket.
    Ctl(CtlArgs),
    /// Watch the assigned devices of all running VMs.
    Top(TopArgs),
    /// Print a script that completes this command line in a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Print this program's manual page, or write those of all commands to a directory.
    Man {
        /// The directory, such as /usr/local/share/man/man1.
        #[arg(value_hint = clap::ValueHint::DirPath)]
        directory: Option<PathBuf>,
    },
}

/// What the user asked for.
#[derive(Debug)]
pub enum Action {
    /// Print this on standard output and exit with success.
    Print(String),
    /// Bind a device to vfio-pci.
    Bind {
        /// Its address.
        bdf: Bdf,
        /// Even if the host still uses it.
        force: bool,
    },
    /// Give a device back to its own driver.
    Unbind(Bdf),
    /// Examine a device, or all.
    Doctor(DoctorOptions),
    /// Talk to a running VMM.
    Ctl(Box<CtlArgs>),
    /// Watch the devices of running VMs.
    Top(TopArgs),
    /// Write manual pages to this directory.
    Man(PathBuf),
    /// Run a VMM. The configuration has not been validated.
    Run {
        /// The machine to start with, if any.
        config: Option<Box<VmConfig>>,
        /// How it is watched and driven.
        options: ControlOptions,
        /// Where and how much to log.
        log: LogOptions,
    },
}

/// How a VMM is watched and driven.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ControlOptions {
    /// Where the REST API is served.
    pub api_socket: Option<Endpoint>,
    /// Where metrics alone are served.
    pub metrics_socket: Option<Endpoint>,
    /// Where events go.
    pub event_monitor: Option<Endpoint>,
    /// The snapshot from which a VM goes on.
    pub restore: Option<RestoreConfig>,
    /// Whether the VMM stays when the guest has switched itself off.
    pub no_shutdown: bool,
    /// Whether a filter of system calls was asked for, which is not there.
    pub wants_filter: bool,
}

/// Where and how much to log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogOptions {
    /// The file; standard error if absent.
    pub file: Option<PathBuf>,
    /// The least important level that is written.
    pub level: LevelFilter,
    /// Another form of line.
    pub format: Option<LogFormat>,
}

/// What is wrong with the command line: one line for standard error.
#[derive(Debug, Error)]
pub enum CliError {
    /// Unknown options, missing values, values of the wrong form.
    #[error("{0}; --help lists the options")]
    Usage(String),
    /// A value whose own grammar is not kept.
    #[error(transparent)]
    Option(#[from] OptionError),
    /// An option of Cloud Hypervisor that is not there yet.
    #[error("--{0} is not in Dormouse yet; leave it out, or see docs/compatibility.md")]
    NotYet(String),
    /// A form of log lines that cannot be used.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The manual page.
    #[error(transparent)]
    Manual(#[from] manual::ManualError),
}

/// Reads the command line, the program's name first, as that of `program`.
///
/// # Errors
/// See [`CliError`].
pub fn parse<I>(program: Program, arguments: I) -> Result<Action, CliError>
where
    I: IntoIterator,
    I::Item: Into<OsString> + Clone,
{
    let command = match program {
        Program::Dormouse => with_refused(Cli::command()),
        Program::CloudHypervisor => with_refused(CloudHypervisor::command()),
        Program::ChRemote => ChRemote::command(),
    };
    let matches = match command.try_get_matches_from(arguments) {
        Ok(matches) => matches,
        Err(error) => return usage(&error),
    };
    match program {
        Program::Dormouse => own(&matches),
        Program::CloudHypervisor => {
            refuse(&matches)?;
            match CloudHypervisor::from_arg_matches(&matches) {
                Ok(CloudHypervisor { run }) => run.action(),
                Err(error) => usage(&error),
            }
        }
        Program::ChRemote => match ChRemote::from_arg_matches(&matches) {
            // What it prints is for programs, even at a terminal.
            Ok(ChRemote { ctl }) => Ok(Action::Ctl(Box::new(CtlArgs { json: true, ..ctl }))),
            Err(error) => usage(&error),
        },
    }
}

/// Refuses the options that are not there yet.
fn refuse(matches: &ArgMatches) -> Result<(), CliError> {
    match NOT_YET.iter().find(|name| matches.try_contains_id(name).unwrap_or(false)) {
        Some(name) => Err(CliError::NotYet((*name).to_owned())),
        None => Ok(()),
    }
}

fn own(matches: &ArgMatches) -> Result<Action, CliError> {
    refuse(matches)?;
    let cli = match Cli::from_arg_matches(matches) {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    match cli.command {
        Some(Command::Bind { bdf, force }) => Ok(Action::Bind { bdf, force }),
        Some(Command::Unbind { bdf }) => Ok(Action::Unbind(bdf)),
        Some(Command::Doctor { bdf, json, verify }) => {
            Ok(Action::Doctor(DoctorOptions { bdf, json, verify }))
        }
        Some(Command::Ctl(args)) => Ok(Action::Ctl(Box::new(args))),
        Some(Command::Top(args)) => Ok(Action::Top(args)),
        Some(Command::Completions { shell }) => Ok(Action::Print(manual::completions(shell, shown()))),
        Some(Command::Man { directory: Some(directory) }) => Ok(Action::Man(directory)),
        Some(Command::Man { directory: None }) => Ok(Action::Print(manual::page(shown())?)),
        None => cli.run.action(),
    }
}

/// The command as users see it.
pub fn shown() -> clap::Command {
    Cli::command()
}

/// The command with the options that are only known to be refused.
fn with_refused(command: clap::Command) -> clap::Command {
    NOT_YET.iter().fold(command, |command, &name| {
        let argument = clap::Arg::new(name)
            .long(name)
            .hide(true)
            .num_args(0..)
            .action(ArgAction::Append)
            .value_name("KEYS");
        command.arg(argument)
    })
}

/// The values of an option that can be given several times.
fn some<T>(
    values: &[String],
    parse: impl Fn(&str) -> Result<T, OptionError>,
) -> Result<Option<Vec<T>>, OptionError> {
    let all: Vec<T> = values.iter().map(|text| parse(text)).collect::<Result<_, _>>()?;
    Ok((!all.is_empty()).then_some(all))
}

/// Help and version are answers; everything else is made one line.
fn usage(error: &clap::Error) -> Result<Action, CliError> {
    let text = error.render().to_string();
    match error.kind() {
        ErrorKind::DisplayHelp
        | ErrorKind::DisplayVersion
        | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => Ok(Action::Print(text)),
        _ => {
            let lines: Vec<_> =
                text.lines().take_while(|line| !line.trim().is_empty()).map(str::trim).collect();
            let line = lines.join(" ");
            Err(CliError::Usage(line.strip_prefix("error: ").unwrap_or(&line).to_owned()))
        }
    }
}

impl Run {
    fn action(self) -> Result<Action, CliError> {
        let options = ControlOptions {
            api_socket: Endpoint::parse_option("--api-socket", self.api_socket.as_deref())?,
            metrics_socket: Endpoint::parse_option("--metrics-socket", self.metrics_socket.as_deref())?,
            event_monitor: Endpoint::parse_option("--event-monitor", self.event_monitor.as_deref())?,
            restore: self.restore.as_deref().map(RestoreConfig::parse).transpose()?,
            no_shutdown: self.no_shutdown,
            wants_filter: self.seccomp.is_some_and(|seccomp| seccomp != Seccomp::False),
        };
        let level = match self.verbosity {
            0 => LevelFilter::Warn,
            1 => LevelFilter::Info,
            2 => LevelFilter::Debug,
            _ => LevelFilter::Trace,
        };
        let format = self.log_format.as_deref().map(str::parse).transpose()?;
        let log = LogOptions { file: self.log_file.clone(), level, format };
        if options.restore.is_some() {
            let boots = [("--kernel", self.kernel.is_some()), ("--firmware", self.firmware.is_some())];
            let boots = boots.iter().find(|(_, given)| *given).map(|(option, _)| *option);
            return match boots.or(self.machine_option()) {
                Some(option) => Err(CliError::Usage(format!(
                    "--restore brings its machine with it, and {option} describes another: leave one of them out"
                ))),
                None => Ok(Action::Run { config: None, options, log }),
            };
        }
        // Without anything to boot the machine comes through the API, all of it.
        if options.api_socket.is_some() && self.kernel.is_none() && self.firmware.is_none() {
            if let Some(option) = self.machine_option() {
                return Err(CliError::Usage(format!(
                    "{option} describes a machine, and there is nothing to boot: add --kernel PATH or --firmware PATH, or describe the whole machine through the API"
                )));
            }
            return Ok(Action::Run { config: None, options, log });
        }
        let devices: Vec<_> =
            self.device.iter().map(|text| DeviceConfig::parse(text)).collect::<Result<_, _>>()?;
        let zones: Vec<_> =
            self.memory_zone.iter().map(|text| MemoryZoneConfig::parse(text)).collect::<Result<_, _>>()?;
        let nodes: Vec<_> = self.numa.iter().map(|text| NumaConfig::parse(text)).collect::<Result<_, _>>()?;
        let mut memory =
            self.memory.as_deref().map_or_else(|| Ok(MemoryConfig::default()), MemoryConfig::parse)?;
        memory.zones = (!zones.is_empty()).then_some(zones);
        let config = VmConfig {
            cpus: self.cpus.as_deref().map_or_else(|| Ok(CpusConfig::default()), CpusConfig::parse)?,
            memory,
            numa: (!nodes.is_empty()).then_some(nodes),
            payload: Some(PayloadConfig {
                firmware: self.firmware,
                kernel: self.kernel,
                cmdline: self.cmdline,
                initramfs: self.initramfs,
            }),
            serial: ConsoleConfig::parse("--serial", &self.serial)?,
            console: VirtioConsoleConfig::parse(&self.console)?,
            debug_console: DebugConsoleConfig::parse(&self.debug_console)?,
            pvpanic: self.pvpanic,
            rng: self.rng.as_deref().map_or_else(|| Ok(RngConfig::default()), RngConfig::parse)?,
            balloon: self.balloon.as_deref().map(BalloonConfig::parse).transpose()?,
            watchdog: self.watchdog,
            rate_limit_groups: some(&self.rate_limit_group, RateLimitGroupConfig::parse)?,
            disks: some(&self.disk, DiskConfig::parse)?,
            fs: some(&self.fs, FsConfig::parse)?,
            generic_vhost_user: some(&self.generic_vhost_user, GenericVhostUserConfig::parse)?,
            net: some(&self.net, NetConfig::parse)?,
            pmem: some(&self.pmem, PmemConfig::parse)?,
            vsock: self.vsock.as_deref().map(VsockConfig::parse).transpose()?,
            devices: (!devices.is_empty()).then_some(devices),
            platform: self.platform.as_deref().map(PlatformConfig::parse).transpose()?,
            pci_segments: some(&self.pci_segment, PciSegmentConfig::parse)?,
            ..VmConfig::default()
        };
        Ok(Action::Run { config: Some(Box::new(config)), options, log })
    }

    /// An option that describes a machine, if one is given.
    fn machine_option(&self) -> Option<&'static str> {
        let given = [
            ("--initramfs", self.initramfs.is_some()),
            ("--cmdline", self.cmdline.is_some()),
            ("--cpus", self.cpus.is_some()),
            ("--memory", self.memory.is_some()),
            ("--memory-zone", !self.memory_zone.is_empty()),
            ("--numa", !self.numa.is_empty()),
            ("--platform", self.platform.is_some()),
            ("--pci-segment", !self.pci_segment.is_empty()),
            ("--rng", self.rng.is_some()),
            ("--net", !self.net.is_empty()),
            ("--fs", !self.fs.is_empty()),
            ("--generic-vhost-user", !self.generic_vhost_user.is_empty()),
            ("--pmem", !self.pmem.is_empty()),
            ("--balloon", self.balloon.is_some()),
            ("--watchdog", self.watchdog),
            ("--disk", !self.disk.is_empty()),
            ("--rate-limit-group", !self.rate_limit_group.is_empty()),
            ("--vsock", self.vsock.is_some()),
            ("--device", !self.device.is_empty()),
            ("--debug-console", self.debug_console != "off"),
            ("--pvpanic", self.pvpanic),
        ];
        given.iter().find(|(_, given)| *given).map(|(option, _)| *option)
    }
}
