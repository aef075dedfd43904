//! `cargo testbed shell`: the emulated host's prompt on this terminal.

use std::path::PathBuf;

use crate::artifacts::{self, Profile};
use crate::error::Result;
use crate::image;
use crate::kernel;
use crate::paths;
use crate::qemu::{Boot, Qemu};
use crate::spec::{Device, HostSpec, Kernel};

/// Boots the host and hands over the terminal until QEMU ends.
pub fn run(vmm: Option<PathBuf>) -> Result<bool> {
    let artifacts = artifacts::build(Profile::Testbed, vmm)?;
    let spec = HostSpec::devices(&[Device::Gpu, Device::E1000e, Device::Igb, Device::Nvme]);
    let dir = paths::run_dir()?;
    let initramfs = dir.join("host.cpio");
    image::build_host(&artifacts, spec.kernel, &[Kernel::Cloud6_12, Kernel::Generic6_12], &initramfs)?;
    let boot = Boot {
        spec: &spec,
        kernel: &kernel::obtain(spec.kernel)?.vmlinuz,
        initramfs: &initramfs,
        cmdline: "bed.mode=shell",
        dir: &dir,
        terminal: true,
    };
    let code = Qemu::start(&boot)?.wait();
    let _ = std::fs::remove_dir_all(&dir);
    Ok(code? == 0)
}
