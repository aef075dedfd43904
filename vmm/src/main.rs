//! Dormouse: a virtual machine monitor in which assigned devices really sleep.
//!
//! This file reads the command line, runs what was asked for, and turns the outcome into one line on standard error
//! and an exit status: 0 when the guest switched itself off or the VMM was asked to end, 1 otherwise. The doctor's says how bad it is.

mod assigned;
mod cli;
mod client;
mod config;
mod control;
mod ctl;
mod doctor;
mod event_loop;
mod firmware;
mod hypervisor;
mod irq;
mod logger;
mod machine;
mod manual;
mod memory;
mod memslot;
mod output;
mod remedy;
mod table;
mod top;
mod vcpu;

use std::error::Error;
use std::fs::File;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use devices::serial::{self, Backend};
use devices::vfio::bind::Binder;
use log::{LevelFilter, info};

use crate::cli::Action;
use crate::config::VmConfig;
use crate::control::StopReason;
use crate::event_loop::Signals;
use crate::machine::{Lifetime, Machine};
use crate::remedy::remedy;

fn main() -> ExitCode {
    let start = Instant::now();
    let result = run(start);
    serial::restore();
    match result {
        Ok(status) => status,
        Err(error) => {
            eprintln!("dormouse: error: {}", chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn run(start: Instant) -> Result<ExitCode, Box<dyn Error>> {
    match cli::parse(std::env::args_os())? {
        Action::Print(text) => output::print(&text)?,
        Action::Bind { bdf, force } => println!("{}", Binder::default().force(force).bind(bdf)?),
        Action::Unbind(bdf) => println!("{}", Binder::default().unbind(bdf)?),
        Action::Doctor(options) => {
            logger::init(None, LevelFilter::Warn, start)?;
            return Ok(ExitCode::from(doctor::run(options)?));
        }
        Action::Ctl(args) => ctl::run(&args)?,
        Action::Top(args) => top::run(&args)?,
        Action::Man(directory) => manual::pages(cli::shown(), &directory)?,
        Action::Run { config, log } => {
            let file = log.file.as_deref().map(open_log).transpose()?;
            logger::init(file, log.level, start)?;
            run_machine(&config)?;
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

/// Runs the machine, again after each reset of the guest.
fn run_machine(config: &VmConfig) -> Result<(), Box<dyn Error>> {
    config.validate()?;
    if let Err(e) = rustix::thread::set_name(logger::MAIN_THREAD) {
        log::debug!("the main thread keeps its name: {e}");
    }
    raise_descriptor_limit();
    let kvm = hypervisor::open()?;
    let signals =
        Signals::install().map_err(|e| format!("signals cannot be handled: {e}; {}", remedy(&e)))?;
    let console = Backend::open(&config.serial.serial_mode())?;
    if let Some(path) = console.as_ref().and_then(|console| console.pty_path()) {
        announce(&format!("the serial port is at {}", path.display()));
    }
    let mut lifetime = Lifetime::new(kvm, signals, console.as_ref().map(Arc::clone));
    let result = loop {
        match Machine::build(config, &lifetime).and_then(|machine| machine.run(&mut lifetime)) {
            Ok(StopReason::Reset) if lifetime.is_told_to_end() => break Ok(()),
            Ok(StopReason::Reset) => info!("the guest resets"),
            Ok(reason) => {
                info!("the machine has stopped: {reason:?}");
                break Ok(());
            }
            Err(e) => break Err(e),
        }
    };
    if let Some(console) = console {
        console.flush();
    }
    Ok(result?)
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

/// Tells the user, in the log if that shows it and otherwise on standard error.
fn announce(text: &str) {
    if log::max_level() >= LevelFilter::Info {
        info!("{text}");
    } else {
        eprintln!("dormouse: {text}");
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
