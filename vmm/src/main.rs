//! Dormouse: a virtual machine monitor in which assigned devices really sleep.
//!
//! This file reads the command line, runs what was asked for, and turns the outcome into one line on standard error
//! and an exit status: 0 when the guest switched itself off or the VMM was asked to end, 1 otherwise. The doctor's says how bad it is.
//! [`multicall`] has its other names.

mod api;
mod assigned;
mod buses;
mod cli;
mod client;
mod config;
mod console;
mod control;
mod ctl;
mod disks;
mod doctor;
mod emulated;
mod event_loop;
mod events;
mod firmware;
mod heap;
mod hotplug;
mod hypervisor;
mod ioevents;
mod irq;
mod lifecycle;
mod logger;
mod machine;
mod manual;
mod memory;
mod memslot;
mod multicall;
mod nets;
mod orders;
mod output;
mod panic_events;
mod pci_segments;
mod places;
mod platform;
mod power_events;
mod processors;
mod remedy;
mod running;
mod snapshot;
mod sockets;
mod status;
mod table;
mod top;
mod vcpu;
mod vhost_user;
mod virtio_events;
mod vm_error;

use std::error::Error;
use std::fs::File;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use devices::serial;
use devices::vfio::bind::Binder;
use log::LevelFilter;

use crate::api::{Access, Api};
use crate::cli::{Action, ControlOptions};
use crate::config::VmConfig;
use crate::event_loop::Signals;
use crate::events::{Events, Monitor};
use crate::lifecycle::Lifecycle;
use crate::multicall::Program;
use crate::orders::Orders;
use crate::remedy::remedy;
use crate::sockets::{Listener, open_output};
use crate::status::Status;
use crate::vm_error::VmError;

fn main() -> ExitCode {
    let start = Instant::now();
    let program = Program::of(std::env::args_os().next().as_deref());
    program.announce();
    let result = run(program, start);
    serial::restore();
    match result {
        Ok(status) => status,
        Err(error) => {
            eprint!("{}", program.failure(&chain(error.as_ref())));
            ExitCode::FAILURE
        }
    }
}

fn run(program: Program, start: Instant) -> Result<ExitCode, Box<dyn Error>> {
    match cli::parse(program, std::env::args_os())? {
        Action::Print(text) => output::print(&text)?,
        Action::Bind { bdf, force } => println!("{}", Binder::default().force(force).bind(bdf)?),
        Action::Unbind(bdf) => println!("{}", Binder::default().unbind(bdf)?),
        Action::Doctor(options) => {
            logger::init(None, LevelFilter::Warn, None, start)?;
            return Ok(ExitCode::from(doctor::run(options)?));
        }
        Action::Ctl(args) => ctl::run(&args)?,
        Action::Top(args) => top::run(&args)?,
        Action::Man(directory) => manual::pages(cli::shown(), &directory)?,
        Action::Run { config, options, log } => {
            let file = log.file.as_deref().map(open_log).transpose()?;
            logger::init(file, log.level, log.format, start)?;
            if options.wants_filter {
                log::warn!("--seccomp: there is no filter of system calls yet; the VMM runs without one");
            }
            run_vmm(config, &options, start)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn open_log(path: &std::path::Path) -> Result<File, String> {
    File::options().create(true).append(true).open(path).map_err(|e| {
        format!(
            "--log-file {}: cannot be opened: {e}; check the directory and its permissions",
            path.display()
        )
    })
}

/// Runs a VMM until it is to end: with the machine of the command line, and with those that come through the API.
fn run_vmm(
    config: Option<Box<VmConfig>>,
    options: &ControlOptions,
    start: Instant,
) -> Result<(), Box<dyn Error>> {
    if let Some(config) = &config {
        config.validate()?;
    }
    if let Some(restore) = &options.restore {
        restore.validate()?;
    }
    heap::keep_little();
    if let Err(e) = rustix::thread::set_name(logger::MAIN_THREAD) {
        log::debug!("the main thread keeps its name: {e}");
    }
    raise_descriptor_limit();
    // Before the API can be reached: who starts us opens the other end of the pipe only then.
    let monitor = match &options.event_monitor {
        Some(endpoint) => {
            let file = open_output("--event-monitor", endpoint)?;
            Some(Monitor::start(file, start).map_err(|e| format!("--event-monitor: {e}; {}", remedy(&e)))?)
        }
        None => None,
    };
    let events = monitor.as_ref().map_or_else(|| Events::nowhere(start), |monitor| monitor.events().clone());
    events.tell("vmm", "starting");
    // These before the threads of the API, which are not to get the signals nor see another file mode mask.
    let kvm = hypervisor::open()?;
    let signals =
        Signals::install().map_err(|e| format!("signals cannot be handled: {e}; {}", remedy(&e)))?;
    let orders =
        Arc::new(Orders::new().map_err(|e| format!("no descriptor for orders: {e}; {}", remedy(&e)))?);
    let status = Arc::new(Status::default());
    let api = Arc::new(Api::new(Arc::clone(&status), Arc::clone(&orders), start));
    let _sockets = listen(options, &api)?;
    let mut lifecycle = Lifecycle::new(kvm, signals, orders, status, events, options);
    if let Some(config) = config {
        lifecycle.create_and_boot(*config).map_err(VmError::into_cause)?;
    }
    if let Some(restore) = &options.restore {
        lifecycle.restore(restore).map_err(VmError::into_cause)?;
        if options.api_socket.is_none() && !restore.resume {
            log::warn!(
                "--restore: the VM stays paused, and without an --api-socket nobody can resume it; add resume=on"
            );
        }
    }
    let result = lifecycle.run();
    api.send_last_answers();
    result.map_err(VmError::into_cause)
}

/// Opens the sockets that the options name, and the one that shows this VMM to those who look for VMMs. They go with what is returned.
fn listen(options: &ControlOptions, api: &Arc<Api>) -> Result<Vec<Listener>, Box<dyn Error>> {
    let mut listeners = Vec::new();
    let named = [
        ("--api-socket", &options.api_socket, Access::Full),
        ("--metrics-socket", &options.metrics_socket, Access::Metrics),
    ];
    for (option, endpoint, access) in named {
        if let Some(endpoint) = endpoint {
            listeners.push((Listener::open(option, endpoint)?, access));
        }
    }
    match Listener::status() {
        Ok(listener) => listeners.push((listener, Access::ReadOnly)),
        Err(e) => log::debug!("no status socket: {e}; `dormouse top` will not find this VM"),
    }
    let mut kept = Vec::new();
    for (listener, access) in listeners {
        let no_thread = |e| format!("the API has no thread: {e}; {}", remedy(&e));
        api::serve(listener.accepting().map_err(no_thread)?, Arc::clone(api), access).map_err(no_thread)?;
        kept.push(listener);
    }
    Ok(kept)
}

/// Every interrupt vector of an assigned device takes a descriptor; the usual soft limit is soon reached.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(e) = setrlimit(Resource::Nofile, limit) {
        log::debug!("the limit on open files stays as it is: {e}");
    }
}

/// An error and its causes on one line, each said once.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text.replace('\n', " ")
}
