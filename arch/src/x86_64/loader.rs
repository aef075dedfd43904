//! Loads what the guest boots from: a Linux bzImage entered in 64-bit mode, or an ELF file with a PVH entry
//! point, which may be a kernel or a firmware; an initramfs; the command line; and the description of the machine
//! that each protocol wants.
//!
//! Follows Linux' `Documentation/arch/x86/boot.rst` (protocol 2.12, "64-bit boot protocol") and Xen's
//! `docs/misc/pvh.pandoc` with `start_info.h`.
//!
//! The structures come from the `linux-loader` crate. Reading does not: its loaders tell neither a truncated
//! file from a small guest nor one architecture from another, and leave the `.bss` of an ELF file alone.
//!
//! Images are read from the file straight into guest memory. What the file claims is checked against its
//! length and against the memory map before anything is read, so that a wrong file is refused by name.
//! Loading a second time, for a guest reboot, writes the same bytes again.

use std::fmt;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::layout::{self, AddressRange, MemoryMap};

mod bzimage;
mod firmware;
mod pvh;
#[cfg(test)]
mod tests;

/// What a file is to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The kernel.
    Kernel,
    /// The firmware that is to find a kernel by itself.
    Firmware,
    /// The initial RAM file system.
    Initramfs,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kernel => "kernel",
            Self::Firmware => "firmware",
            Self::Initramfs => "initramfs",
        })
    }
}

/// Why the guest cannot be loaded. Every message names the file.
#[derive(Debug, Error)]
pub enum LoadError {
    /// The file cannot be opened.
    #[error("cannot open the {role} {}; check the path and its permissions", path.display())]
    Open {
        /// What the file was to be.
        role: Role,
        /// The file.
        path: PathBuf,
        /// The operating system's answer.
        #[source]
        source: io::Error,
    },
    /// A directory, a pipe, a device.
    #[error("the {role} {} is not a regular file; give the path of an image", path.display())]
    NotAFile {
        /// What the file was to be.
        role: Role,
        /// The file.
        path: PathBuf,
    },
    /// A file of length 0.
    #[error("the {role} {} is empty; give the path of a whole image", path.display())]
    Empty {
        /// What the file was to be.
        role: Role,
        /// The file.
        path: PathBuf,
    },
    /// Reading failed, or the file is being changed.
    #[error("cannot read the {role} {}; check the disk, and that nobody changes the file", path.display())]
    Read {
        /// What the file is.
        role: Role,
        /// The file.
        path: PathBuf,
        /// The operating system's answer.
        #[source]
        source: io::Error,
    },
    /// Neither of the formats that can be booted.
    #[error(
        "{} is not a kernel: it is neither a Linux bzImage nor an ELF file; give a vmlinuz, or a vmlinux with a PVH entry",
        path.display()
    )]
    NotAKernel {
        /// The file.
        path: PathBuf,
    },
    /// A firmware that is none for this machine.
    #[error(
        "the firmware {} cannot be booted: {found}; give an ELF file with a PVH entry point, such as CLOUDHV.fd or \
         hypervisor-fw",
        path.display()
    )]
    NotFirmware {
        /// The file.
        path: PathBuf,
        /// What it is instead and, where there is one, the remedy.
        found: &'static str,
    },
    /// One of the formats that can be booted, but not in a way that can.
    #[error("the {role} {} cannot be booted: {reason}", path.display())]
    Unsupported {
        /// What the file was to be.
        role: Role,
        /// The file.
        path: PathBuf,
        /// What it lacks and, where there is one, the remedy.
        reason: &'static str,
    },
    /// The file is shorter than its own headers say.
    #[error(
        "the {role} {} is truncated: it has {len} bytes, and its headers call for {needed}; copy it again",
        path.display()
    )]
    Truncated {
        /// What the file was to be.
        role: Role,
        /// The file.
        path: PathBuf,
        /// Length of the file in bytes.
        len: u64,
        /// Length that its headers call for.
        needed: u64,
    },
    /// The kernel or firmware, with the memory it needs to start, is outside the guest's RAM.
    #[error(
        "the {role} {} does not fit: it needs memory from {start:#x} to {end:#x}, and the guest's RAM there \
         ends at {limit:#x}; give the guest more memory",
        path.display()
    )]
    KernelTooLarge {
        /// What the file was to be.
        role: Role,
        /// The file.
        path: PathBuf,
        /// First address that it needs.
        start: u64,
        /// First address that it does not need.
        end: u64,
        /// End of the RAM that it could use.
        limit: u64,
    },
    /// An ELF segment lies where the loader keeps its own structures, or where there is no RAM.
    #[error(
        "the {role} {} wants to be loaded at {address:#x}, where the guest has no free RAM; give it more memory, or \
         use another build of it",
        path.display()
    )]
    Placement {
        /// What the file was to be.
        role: Role,
        /// The file.
        path: PathBuf,
        /// Where the segment starts.
        address: u64,
    },
    /// No room between the kernel and the end of low RAM.
    #[error(
        "the initramfs {} does not fit: it has {len} bytes, and there are {room} bytes between the kernel and \
         the end of the memory it can be in ({limit:#x}); give the guest more memory",
        path.display()
    )]
    InitramfsTooLarge {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        len: u64,
        /// The free bytes.
        room: u64,
        /// End of the memory that this kernel can find an initramfs in.
        limit: u64,
    },
    /// The command line is longer than the kernel accepts.
    #[error("the kernel command line has {len} bytes, and this kernel accepts at most {max}; shorten it")]
    CommandLineTooLong {
        /// Its length in bytes.
        len: usize,
        /// The kernel's limit, without the terminator.
        max: u64,
    },
    /// The command line has a NUL in it.
    #[error("the kernel command line contains a NUL byte; remove it")]
    CommandLineNul,
    /// Guest memory is smaller than the memory map says.
    #[error(
        "cannot write the boot parameters at guest address {address:#x}: there is no memory; this is a defect, \
         please report it"
    )]
    Memory {
        /// The address.
        address: u64,
    },
}

/// An open file that the guest is loaded from.
#[derive(Debug)]
pub struct ImageFile {
    file: File,
    path: PathBuf,
    role: Role,
    len: u64,
}

impl ImageFile {
    /// Opens `path` for reading.
    ///
    /// # Errors
    /// [`LoadError::Open`], and those of [`ImageFile::from_file`].
    pub fn open(role: Role, path: &Path) -> Result<Self, LoadError> {
        let file = File::open(path).map_err(|source| LoadError::Open { role, path: path.into(), source })?;
        Self::from_file(role, file, path)
    }

    /// Takes a file that is already open; `path` is what messages call it.
    ///
    /// # Errors
    /// [`LoadError::Read`], [`LoadError::NotAFile`] or [`LoadError::Empty`].
    pub fn from_file(role: Role, file: File, path: &Path) -> Result<Self, LoadError> {
        let path = path.to_path_buf();
        let metadata = match file.metadata() {
            Ok(metadata) => metadata,
            Err(source) => return Err(LoadError::Read { role, path, source }),
        };
        if !metadata.is_file() {
            return Err(LoadError::NotAFile { role, path });
        }
        if metadata.len() == 0 {
            return Err(LoadError::Empty { role, path });
        }
        Ok(Self { file, path, role, len: metadata.len() })
    }

    /// Length in bytes when it was opened.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Always false: an empty file is refused on opening.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn read_error(&self, source: io::Error) -> LoadError {
        LoadError::Read { role: self.role, path: self.path.clone(), source }
    }

    /// Reads a part of the file. The caller has checked that the file is long enough.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), LoadError> {
        self.file.read_exact_at(buffer, offset).map_err(|source| self.read_error(source))
    }

    /// Reads `len` bytes at `offset` into guest memory at `address`.
    fn read_into<M: GuestMemoryBackend>(
        &self,
        memory: &M,
        offset: u64,
        address: GuestAddress,
        len: u64,
    ) -> Result<(), LoadError> {
        let mut file = &self.file;
        file.seek(SeekFrom::Start(offset)).map_err(|source| self.read_error(source))?;
        let len = usize::try_from(len).map_err(|_| LoadError::Memory { address: address.0 })?;
        memory
            .read_exact_volatile_from(address, &mut file, len)
            .map_err(|error| self.read_error(io::Error::other(error)))
    }
}

/// Everything that a guest is booted from.
#[derive(Debug)]
pub struct BootImages {
    /// The kernel, or the firmware in its place.
    pub kernel: ImageFile,
    /// The initial RAM file system, if there is one.
    pub initramfs: Option<ImageFile>,
    /// The kernel command line.
    pub command_line: String,
}

/// How and where the first vCPU enters the loaded kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryPoint {
    /// Linux 64-bit boot protocol: long mode, identity page tables, `rsi` holds the zero page.
    Linux64 {
        /// First instruction.
        address: GuestAddress,
    },
    /// PVH: 32-bit protected mode without paging, `ebx` holds the start info.
    Pvh {
        /// First instruction.
        address: GuestAddress,
    },
}

/// A kernel that has been read into guest memory but not yet been told about the machine.
struct LoadedKernel {
    protocol: Protocol,
    /// First address behind the memory that the kernel uses before it has read the memory map.
    end: u64,
    /// First address behind the memory that an initramfs can be in.
    initramfs_limit: u64,
    /// Longest command line it accepts, in bytes, without the terminator.
    command_line_max: u64,
}

enum Protocol {
    Linux64(Box<bzimage::Header>),
    Pvh { entry: GuestAddress },
}

/// Loads `images` into `memory`, laid out as `map`, and writes the boot parameters that point at them, at
/// the map and at the RSDP.
///
/// # Errors
/// See [`LoadError`]. Guest memory may have been written in part.
pub fn load<M: GuestMemoryBackend>(
    memory: &M,
    map: &MemoryMap,
    images: &BootImages,
    rsdp: GuestAddress,
) -> Result<EntryPoint, LoadError> {
    let kernel = load_kernel(memory, map, &images.kernel)?;
    write_command_line(memory, &images.command_line, kernel.command_line_max)?;
    let initramfs = match &images.initramfs {
        Some(image) => Some(load_initramfs(memory, map, image, &kernel)?),
        None => None,
    };
    match kernel.protocol {
        Protocol::Linux64(header) => bzimage::write_zero_page(memory, map, *header, initramfs, rsdp),
        Protocol::Pvh { entry } => pvh::write_start_info(memory, map, entry, initramfs, rsdp),
    }
}

fn load_kernel<M: GuestMemoryBackend>(
    memory: &M,
    map: &MemoryMap,
    image: &ImageFile,
) -> Result<LoadedKernel, LoadError> {
    let mut magic = [0; 4];
    if image.len() >= 4 {
        image.read_at(&mut magic, 0)?;
    }
    if image.role == Role::Firmware {
        firmware::check(image, magic)?;
    }
    if magic == pvh::ELF_MAGIC {
        return pvh::load_elf(memory, map, image);
    }
    if let Some(header) = bzimage::Header::read(image)? {
        return bzimage::load_bzimage(memory, map, image, header);
    }
    Err(LoadError::NotAKernel { path: image.path.clone() })
}

fn write_command_line<M: GuestMemoryBackend>(memory: &M, line: &str, max: u64) -> Result<(), LoadError> {
    let max = max.min(layout::COMMAND_LINE_MAX - 1);
    if u64::try_from(line.len()).is_ok_and(|len| len > max) {
        return Err(LoadError::CommandLineTooLong { len: line.len(), max });
    }
    if line.contains('\0') {
        return Err(LoadError::CommandLineNul);
    }
    let mut bytes = Vec::with_capacity(line.len() + 1);
    bytes.extend_from_slice(line.as_bytes());
    bytes.push(0);
    write_guest(memory, &bytes, layout::COMMAND_LINE)
}

/// Puts the initramfs as high as possible, out of the way of a kernel that decompresses itself.
fn load_initramfs<M: GuestMemoryBackend>(
    memory: &M,
    map: &MemoryMap,
    image: &ImageFile,
    kernel: &LoadedKernel,
) -> Result<AddressRange, LoadError> {
    const PAGE_MASK: u64 = !0xfff;
    let limit = kernel.initramfs_limit.min(map.low_ram_end().0);
    let floor = kernel.end.saturating_add(!PAGE_MASK) & PAGE_MASK;
    let start = limit.checked_sub(image.len()).map(|start| start & PAGE_MASK).filter(|&start| start >= floor);
    let Some(start) = start else {
        return Err(LoadError::InitramfsTooLarge {
            path: image.path.clone(),
            len: image.len(),
            room: limit.saturating_sub(floor),
            limit,
        });
    };
    let range = AddressRange::new(GuestAddress(start), image.len());
    image.read_into(memory, 0, range.start, range.len)?;
    Ok(range)
}

fn write_guest<M: GuestMemoryBackend>(
    memory: &M,
    bytes: &[u8],
    address: GuestAddress,
) -> Result<(), LoadError> {
    memory.write_slice(bytes, address).map_err(|_| LoadError::Memory { address: address.0 })
}

/// Clears a range, for the part of a segment that the file does not hold.
fn zero_guest<M: GuestMemoryBackend>(memory: &M, range: AddressRange) -> Result<(), LoadError> {
    const ZEROS: [u8; 4096] = [0; 4096];
    let (mut address, end) = (range.start.0, range.end().0);
    while address < end {
        let len = usize::try_from(end - address).map_or(ZEROS.len(), |left| left.min(ZEROS.len()));
        write_guest(memory, &ZEROS[..len], GuestAddress(address))?;
        address += len as u64;
    }
    Ok(())
}
