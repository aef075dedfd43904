//! The programs under test and their helpers, built by cargo for this run.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::command::{capture_text, show};
use crate::error::{Error, Result};
use crate::paths;

/// Paths of the built programs.
#[derive(Debug, Clone)]
pub struct Artifacts {
    /// The VMM.
    pub dormouse: PathBuf,
    /// Puts a device to sleep with bare VFIO calls.
    pub vfio_probe: PathBuf,
    /// Drives the VMM's REST API.
    pub api_client: PathBuf,
    /// Runs in the guest: reads and writes BARs, opens the GPU.
    pub guest_tool: PathBuf,
}

/// Which optimisation the VMM is built with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// Quick to build.
    Testbed,
    /// What users get.
    Release,
}

/// Builds everything. A VMM named by `vmm` is taken as it is.
pub fn build(profile: Profile, vmm: Option<PathBuf>) -> Result<Artifacts> {
    let mut words = vec!["--profile", "testbed", "--package", "testbed"];
    words.extend(["--bin", "vfio_probe", "--bin", "guest_tool", "--bin", "api_client"]);
    cargo(&words)?;
    let helpers = paths::target().join("testbed");
    let dormouse = match (vmm, profile) {
        (Some(path), _) => path,
        (None, Profile::Testbed) => {
            cargo(&["--profile", "testbed", "--package", "vmm", "--bin", "dormouse"])?;
            helpers.join("dormouse")
        }
        (None, Profile::Release) => {
            cargo(&["--release", "--package", "vmm", "--bin", "dormouse"])?;
            paths::target().join("release/dormouse")
        }
    };
    if !dormouse.is_file() {
        return Err(Error::Missing {
            what: dormouse.display().to_string(),
            how: "cargo build --package vmm".to_owned(),
        });
    }
    Ok(Artifacts {
        dormouse,
        vfio_probe: helpers.join("vfio_probe"),
        api_client: helpers.join("api_client"),
        guest_tool: helpers.join("guest_tool"),
    })
}

/// Runs `cargo build` with its messages on the terminal.
fn cargo(words: &[&str]) -> Result<()> {
    let mut command = Command::new(std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned()));
    command.current_dir(paths::workspace()).args(["build", "--quiet"]).args(words).stdin(Stdio::null());
    let status = command.status().map_err(|source| Error::Command {
        command: show(&command),
        status: "not started".to_owned(),
        output: source.to_string(),
    })?;
    if status.success() {
        return Ok(());
    }
    Err(Error::Command {
        command: show(&command),
        status: status.to_string(),
        output: "see the compiler's messages above".to_owned(),
    })
}

/// The shared libraries `program` needs, with the dynamic loader, by their absolute paths.
pub fn libraries(program: &std::path::Path) -> Result<Vec<PathBuf>> {
    let output = crate::command::output(Command::new("ldd").arg(program))?;
    if !output.status.success() {
        return Ok(Vec::new()); // statically linked
    }
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text
        .lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')).map(PathBuf::from))
        .collect())
}

/// What the VMM says to `--version`, to show which one is under test.
pub fn version(artifacts: &Artifacts) -> Result<String> {
    let text = capture_text(Command::new(&artifacts.dormouse).arg("--version"))?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}
