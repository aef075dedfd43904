//! The test bed: an emulated host with an IOMMU, PCIe slots and power resources, real kernels on it, and scenarios that
//! judge the VMM from the host's sysfs, the firmware's power log and the guest's console. See docs/testing.md.
//!
//! The parts, from the bottom: [`packages`], [`kernel`], [`cpio`], [`image`] and [`artifacts`] make what is booted;
//! [`spec`], [`firmware`] and [`qemu`] make the machine; [`wire`], [`rpc`] and [`timeline`] talk to it; [`host`],
//! [`slot`] and [`guest`] are what scenarios use; [`runner`] runs [`scenarios`], [`checks`] the workspace's own tests,
//! [`fuzz`] the fuzz targets, and [`promtool`] judges metrics.

mod artifacts;
mod bench;
mod checks;
mod cli;
mod command;
mod cpio;
mod debian;
mod demo;
mod error;
#[cfg(test)]
mod examples;
mod firmware;
mod fuzz;
mod guest;
mod host;
mod image;
mod kernel;
mod packages;
mod paths;
mod payload;
mod promtool;
mod qemu;
mod rootfs;
mod rpc;
mod runner;
mod scenarios;
mod shell;
mod slot;
mod spec;
mod timeline;
mod trace;
mod uefi;
mod wakes;
mod wire;

use std::process::ExitCode;

use clap::Parser;

use artifacts::Profile;
use cli::{Cli, Command, Test};
use error::Result;
use runner::Tally;
use spec::Kernel;

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Demo(vmm) => prepare().and_then(|()| demo::run(vmm.vmm)),
        Command::Test(options) => prepare().and_then(|()| test(options)),
        Command::Shell(vmm) => prepare().and_then(|()| shell::run(vmm.vmm)),
        Command::Bench(options) => {
            prepare().and_then(|()| bench::run(options.name.as_deref(), options.vmm.vmm))
        }
        Command::Fuzz(options) => fuzz::command(&options),
        Command::Prepare => prepare().and_then(|()| fuzz::tools()).map(|_| true),
        Command::List => {
            let own = checks::names().chain(promtool::names()).map(str::to_owned).chain(fuzz::names());
            for name in own.chain(scenarios::all().into_iter().map(|s| s.name)) {
                println!("{name}");
            }
            Ok(true)
        }
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("testbed: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Everything that comes from outside: programs and kernels. One test bed at a time prepares.
fn prepare() -> Result<()> {
    let path = paths::cache()?.join("lock");
    let lock = std::fs::File::create(&path).map_err(error::file_error("create", &path))?;
    lock.lock().map_err(error::file_error("lock", &path))?;
    packages::ensure()?;
    for kernel in Kernel::ALL {
        kernel::obtain(kernel)?;
    }
    rootfs::obtain().map(drop)
}

fn test(options: Test) -> Result<bool> {
    let filter = options.name.as_deref().unwrap_or_default();
    let wanted = |name: &str| {
        filter.split(',').any(|part| if options.exact { name == part } else { name.contains(part) })
    };
    let chosen: Vec<_> = scenarios::all()
        .into_iter()
        .filter(|scenario| wanted(&scenario.name) || filter == "scenario")
        .filter_map(|scenario| match options.old_kernel {
            None => Some(scenario),
            Some(_) if scenario.name.contains("_with_linux_6_1_") => None,
            Some(place) => Some(scenarios::with_old_kernel(scenario, place)),
        })
        .collect();
    let (left_out, chosen): (Vec<_>, Vec<_>) =
        chosen.into_iter().partition(|scenario| options.short && scenario.long);
    let mut tally = Tally { skipped: left_out.len(), ..Tally::default() };
    left_out.iter().for_each(|scenario| println!("SKIP {}: left out by --short", scenario.name));
    let fuzzed: Vec<_> = fuzz::names().filter(|name| wanted(name)).collect();
    let checks_chosen = checks::names().chain(promtool::names()).filter(|name| wanted(name)).count();
    if chosen.is_empty() && fuzzed.is_empty() && checks_chosen == 0 {
        return Err(error::Error::Check(format!(
            "no test has {filter:?} in its name; see `cargo testbed list`"
        )));
    }
    tally.add(checks::run(wanted));
    if !fuzzed.is_empty() {
        tally.add(fuzz::test(&fuzzed, options.jobs));
    }
    tally.add(promtool::run(wanted));
    if !chosen.is_empty() {
        let artifacts = artifacts::build(Profile::Testbed, options.vmm.vmm)?;
        println!("under test: {}", artifacts::version(&artifacts)?);
        tally.add(runner::run(&chosen, &artifacts, options.jobs, options.minutes));
    }
    println!("{tally}");
    Ok(tally.failed == 0)
}
