//! Which files are a firmware for this machine, and what to say of those that are not.
//!
//! A firmware is loaded and entered as a PVH kernel is (Xen's `docs/misc/pvh.pandoc`): it finds the ACPI tables and the memory map
//! through the start info, has no command line and no modules, and takes its kernel from a disk. That is what is built for
//! Cloud Hypervisor (CLOUDHV.fd of EDK II, Rust Hypervisor Firmware). Flash images of PCs expect a chipset that is not there.

use super::{ImageFile, LoadError, bzimage, pvh};

/// First bytes of a firmware volume are zero; its signature follows them (PI 1.8, volume 3, section 3.2.1).
const VOLUME_SIGNATURE: &[u8] = b"_FVH";
const VOLUME_SIGNATURE_AT: u64 = 40;

/// Refuses what cannot be a firmware; `magic` are its first four bytes. What passes may still be a wrong ELF file.
pub(super) fn check(image: &ImageFile, magic: [u8; 4]) -> Result<(), LoadError> {
    if magic == pvh::ELF_MAGIC {
        return Ok(());
    }
    let mut signature = [0; VOLUME_SIGNATURE.len()];
    if image.len() >= VOLUME_SIGNATURE_AT + signature.len() as u64 {
        image.read_at(&mut signature, VOLUME_SIGNATURE_AT)?;
    }
    let found = if matches!(bzimage::Header::read(image), Ok(Some(_))) {
        "it is a Linux kernel; boot it with --kernel (payload.kernel)"
    } else if signature == VOLUME_SIGNATURE {
        "it is a flash image for a PC, as QEMU takes it"
    } else {
        "it is no ELF file"
    };
    Err(LoadError::NotFirmware { path: image.path.clone(), found })
}
