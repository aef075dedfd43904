//! The command line of the test bed.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::scenarios::Place;

/// Boots Dormouse on an emulated host and judges what it does. Needs Debian, and root for the first run.
#[derive(Debug, Parser)]
#[command(name = "cargo testbed", bin_name = "cargo testbed")]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show, live and in under a minute, an assigned GPU and NIC that lose power and wake.
    Demo(Vmm),
    /// Run the tests: the workspace's own, then every scenario.
    Test(Test),
    /// Open a shell on the emulated host, with the VMM and guest images in it.
    Shell(Vmm),
    /// Measure boot, start, overhead and the latency of power and of wakes.
    Bench(Bench),
    /// Feed random input to the parts of the VMM that a guest or a device can reach, for a bounded time.
    Fuzz(Fuzz),
    /// Install packages, download kernels and build the images, and no more.
    Prepare,
    /// List the tests.
    List,
}

/// Which VMM to run.
#[derive(Debug, Args)]
pub struct Vmm {
    /// Run this program instead of building the VMM of this workspace.
    #[arg(long, value_name = "PATH")]
    pub vmm: Option<PathBuf>,
}

/// What to fuzz.
#[derive(Debug, Args)]
pub struct Fuzz {
    /// Only this target: one of those that `cargo testbed list` names behind `fuzz:`.
    pub target: Option<String>,
    /// How long each target runs.
    #[arg(long, default_value_t = 20, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub seconds: u32,
    /// Run the target once, on the input in this file: what an earlier run has found.
    #[arg(long, value_name = "FILE", requires = "target", conflicts_with = "seconds")]
    pub input: Option<PathBuf>,
}

/// What to measure.
#[derive(Debug, Args)]
pub struct Bench {
    /// Only these figures: `size`, `start`, `api`, `overhead`, `devices`, `power`, `wake`, `boot`, `net`, `disk` or `login`.
    pub name: Option<String>,
    /// Which VMM.
    #[command(flatten)]
    pub vmm: Vmm,
}

/// How to test.
#[derive(Debug, Args)]
pub struct Test {
    /// Only tests with this in their name, or one of these (with commas between); `scenario` for all that need the
    /// emulated host.
    pub name: Option<String>,
    /// Emulated hosts at a time.
    #[arg(long, default_value_t = 2, value_name = "N")]
    pub jobs: usize,
    /// Length of the scenarios with a hostile guest, and with Debian at work, in minutes.
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1440))]
    pub minutes: u32,
    /// Leave out the scenarios that take longest, or repeat others with another kernel: for CI. They count as skipped.
    #[arg(long)]
    pub short: bool,
    /// Run the chosen scenarios with Linux 6.1 in the guest or in the host. The name chooses among those that are not of themselves about an old kernel.
    #[arg(long, value_enum, value_name = "PLACE", conflicts_with = "short")]
    pub old_kernel: Option<Place>,
    /// Run tests whose name is exactly as given.
    #[arg(long)]
    pub exact: bool,
    /// Which VMM.
    #[command(flatten)]
    pub vmm: Vmm,
}
