//! One mapping of guest RAM: anonymous memory, a file in memory, huge pages, or a file of the user's; then its node (mbind(2)) and what
//! the kernel may do with its pages (madvise(2)).

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arch::layout::AddressRange;
use rustix::fs::MemfdFlags;
use rustix::mm::Advice;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{FileOffset, GuestRegionMmap, MmapRegion, VolatileMemory};

use super::Content;
use super::prefault::{self, PrefaultError};
use super::zones::Zone;
use crate::config::MemoryZoneConfig;
use crate::remedy::remedy;

/// Where the kernel lists its pools of huge pages.
const POOLS: &str = "/sys/kernel/mm/hugepages";

/// Memory that the host does not give.
#[derive(Debug, thiserror::Error)]
pub enum BackingError {
    /// `mmap` refused.
    #[error(
        "memory zone {zone}: cannot map {size} bytes of guest memory: {source}; lower --memory size= or free memory on the host"
    )]
    Map {
        /// The zone.
        zone: String,
        /// Bytes asked for.
        size: u64,
        /// What the kernel said.
        source: MmapRegionError,
    },
    /// There are not enough huge pages.
    #[error(
        "memory zone {zone}: {pages} huge pages of {} KiB are needed and {free} are free: {source}; reserve more with \
         'echo N > {POOLS}/hugepages-{}kB/nr_hugepages', or give the guest less",
        page >> 10, page >> 10
    )]
    HugePages {
        /// The zone.
        zone: String,
        /// Size of a page.
        page: u64,
        /// How many are needed.
        pages: u64,
        /// How many nobody has or has claimed.
        free: u64,
        /// What the kernel said.
        source: MmapRegionError,
    },
    /// Huge pages of a size that the host does not have.
    #[error("memory zone {zone}: the host has no huge pages of {page} bytes; it has {known}")]
    HugePageSize {
        /// The zone.
        zone: String,
        /// The size.
        page: u64,
        /// Those it has.
        known: String,
    },
    /// The zone ends in the middle of a huge page.
    #[error(
        "memory zone {zone}: its {size} bytes at {start:#x} are no whole number of huge pages of {page} bytes; round the sizes of this \
         zone and of those before it to huge pages"
    )]
    HugePageCut {
        /// The zone.
        zone: String,
        /// Where the piece starts.
        start: u64,
        /// Its size.
        size: u64,
        /// Size of a page.
        page: u64,
    },
    /// The file behind shared memory could not be made.
    #[error("memory zone {zone}: cannot create the file behind shared memory: {source}; {}", remedy(source))]
    Memfd {
        /// The zone.
        zone: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The user's file cannot be opened.
    #[error("memory zone {zone}: cannot open file={}: {source}; create it with 'truncate -s SIZE FILE', readable and writable", path.display())]
    File {
        /// The zone.
        zone: String,
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A directory in place of a file.
    #[error("memory zone {zone}: file={} is a directory; name a file in it", path.display())]
    Directory {
        /// The zone.
        zone: String,
        /// The directory.
        path: PathBuf,
    },
    /// The user's file ends too early: the guest would run into its end.
    #[error("memory zone {zone}: file={} has {has} bytes and {needs} are needed; enlarge it with 'truncate -s {needs} {}'", path.display(), path.display())]
    FileTooShort {
        /// The zone.
        zone: String,
        /// The file.
        path: PathBuf,
        /// Its length.
        has: u64,
        /// What it should be at least.
        needs: u64,
    },
    /// The host has no such node, or does not let us choose.
    #[error(
        "memory zone {zone}: cannot take memory from host_numa_node={node}: {source}; 'ls /sys/devices/system/node' lists the host's nodes"
    )]
    Node {
        /// The zone.
        zone: String,
        /// The node.
        node: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// Not all of it can be had now.
    #[error("memory zone {zone}: cannot allocate all of its memory (prefault=on): {source}")]
    Prefault {
        /// The zone.
        zone: String,
        /// What the kernel said.
        source: PrefaultError,
    },
}

/// Maps `range` of a zone, which is `offset` bytes into it. Private memory begins as `content` has it; other memory is to be filled.
pub fn map(
    zone: &Zone,
    range: AddressRange,
    offset: u64,
    content: Option<&Content>,
) -> Result<GuestRegionMmap, BackingError> {
    map_as(zone, range, offset, content, false)
}

/// Maps a range of which the guest will plug parts: nothing of it is set aside now.
pub fn map_sparse(zone: &Zone, range: AddressRange, offset: u64) -> Result<GuestRegionMmap, BackingError> {
    let config = MemoryZoneConfig { prefault: false, reserve: false, ..zone.config.clone() };
    map_as(&Zone { config, ..zone.clone() }, range, offset, None, true)
}

fn map_as(
    zone: &Zone,
    range: AddressRange,
    offset: u64,
    content: Option<&Content>,
    sparse: bool,
) -> Result<GuestRegionMmap, BackingError> {
    let config = &zone.config;
    let name = || config.id.clone();
    let size = range.len;
    let huge = config.hugepages.then(|| huge_page_size(zone)).transpose()?;
    if let Some(page) = huge.filter(|page| !size.is_multiple_of(*page)) {
        return Err(BackingError::HugePageCut { zone: name(), start: range.start.0, size, page });
    }
    let mut flags = if config.shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
    // Of huge pages there are as many as there are: those of this guest are set aside now. It would be killed by the one that it does
    // not get later.
    if sparse || (!config.reserve && huge.is_none()) {
        flags |= libc::MAP_NORESERVE;
    }
    let map_error = |source| match huge {
        Some(page) => {
            BackingError::HugePages { zone: name(), page, pages: size / page, free: unclaimed(page), source }
        }
        None => BackingError::Map { zone: name(), size, source },
    };
    let length = usize::try_from(size).map_err(|_| map_error(MmapRegionError::InvalidPointer))?;
    let mut builder = MmapRegionBuilder::new(length).with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
    if let Some(path) = &config.file {
        builder = builder.with_file_offset(FileOffset::new(open(zone, path, offset + size)?, offset));
    } else if config.shared {
        builder = builder.with_file_offset(FileOffset::new(memory_file(zone, size, huge)?, 0));
    } else if let Some((content, offset)) =
        content.filter(|_| zone.is_private()).and_then(|content| Some((content, content.offset_of(range)?)))
    {
        builder = builder.with_file_offset(FileOffset::from_arc(Arc::clone(&content.file), offset));
    } else {
        flags |= libc::MAP_ANONYMOUS;
        if let Some(page) = huge {
            flags |= libc::MAP_HUGETLB | huge_page_bits(page) << libc::MAP_HUGE_SHIFT;
        }
    }
    let region = builder.with_mmap_flags(flags).build().map_err(map_error)?;
    if let Some(node) = config.host_numa_node {
        bind(&region, node).map_err(|source| BackingError::Node { zone: name(), node, source })?;
    }
    if huge.is_none() {
        if range.start.0 == 0 && content.is_none() {
            // The first 2 MiB hold boot structures of a few pages. A huge page there would be cleared in whole before the guest's
            // first instruction, which takes longer than all the rest of the start. One small page keeps it away; advice for
            // these 2 MiB alone would split the mapping for good.
            advise(&region, Advice::LinuxNoHugepage);
            if let Ok(first) = region.get_ref::<u8>(0) {
                first.store(0);
            }
        }
        advise(&region, if zone.thp { Advice::LinuxHugepage } else { Advice::LinuxNoHugepage });
    }
    if config.mergeable {
        advise(&region, Advice::LinuxMergeable);
    }
    if config.prefault {
        prefault::populate(&region, huge.unwrap_or(0))
            .map_err(|source| BackingError::Prefault { zone: name(), source })?;
    }
    GuestRegionMmap::new(region, range.start).ok_or_else(|| map_error(MmapRegionError::InvalidPointer))
}

/// The size of the zone's pages.
pub fn page_size(zone: &Zone) -> Result<u64, BackingError> {
    if zone.config.hugepages { huge_page_size(zone) } else { Ok(4096) }
}

/// The size of the zone's huge pages, which the host has.
fn huge_page_size(zone: &Zone) -> Result<u64, BackingError> {
    let page = zone.config.hugepage_size.or_else(default_huge_page_size).unwrap_or(2 << 20);
    let pool = Path::new(POOLS).join(format!("hugepages-{}kB", page >> 10));
    if pool.exists() {
        return Ok(page);
    }
    let pools = std::fs::read_dir(POOLS).into_iter().flatten().filter_map(Result::ok);
    let known: Vec<String> = pools
        .filter_map(|pool| Some(pool.file_name().to_str()?.strip_prefix("hugepages-")?.to_owned()))
        .collect();
    let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
    Err(BackingError::HugePageSize { zone: zone.config.id.clone(), page, known })
}

fn default_huge_page_size() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("Hugepagesize:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? << 10)
}

/// Huge pages that nobody has or has claimed, for an error message.
fn unclaimed(page: u64) -> u64 {
    let read = |file: &str| {
        let path = Path::new(POOLS).join(format!("hugepages-{}kB", page >> 10)).join(file);
        std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok()
    };
    read("free_hugepages").unwrap_or(0).saturating_sub(read("resv_hugepages").unwrap_or(0))
}

/// How the kernel is told the size of huge pages: its logarithm.
fn huge_page_bits(page: u64) -> i32 {
    i32::try_from(page.trailing_zeros()).unwrap_or(0)
}

fn open(zone: &Zone, path: &Path, needs: u64) -> Result<File, BackingError> {
    let (name, path) = (|| zone.config.id.clone(), path.to_owned());
    if path.is_dir() {
        return Err(BackingError::Directory { zone: name(), path });
    }
    let file = OpenOptions::new().read(true).write(true).open(&path);
    let with_length = file.and_then(|file| file.metadata().map(|metadata| (file, metadata)));
    let (file, metadata) =
        with_length.map_err(|source| BackingError::File { zone: name(), path: path.clone(), source })?;
    // A device has no length to look at.
    if metadata.is_file() && metadata.len() < needs {
        return Err(BackingError::FileTooShort { zone: name(), path, has: metadata.len(), needs });
    }
    Ok(file)
}

/// A file without a name, in memory.
fn memory_file(zone: &Zone, size: u64, huge: Option<u64>) -> Result<File, BackingError> {
    let mut flags = MemfdFlags::CLOEXEC;
    if let Some(page) = huge {
        let bits = u32::try_from(huge_page_bits(page)).unwrap_or(0);
        flags |= MemfdFlags::HUGETLB | MemfdFlags::from_bits_retain(bits << libc::MFD_HUGE_SHIFT);
    }
    let made = rustix::fs::memfd_create("dormouse-ram", flags).map(File::from).map_err(io::Error::from);
    made.and_then(|file| file.set_len(size).map(|()| file))
        .map_err(|source| BackingError::Memfd { zone: zone.config.id.clone(), source })
}

/// Says how the kernel may back the region.
#[allow(unsafe_code)] // madvise takes an address.
fn advise(region: &MmapRegion, advice: Advice) {
    // SAFETY: the range is the mapping just made; the advice changes how it is backed, not what it holds.
    if let Err(e) = unsafe { rustix::mm::madvise(region.as_ptr().cast(), region.size(), advice) } {
        match advice {
            Advice::LinuxMergeable => {
                log::warn!("guest memory is not merged: {e}; the host's kernel has no KSM")
            }
            _ => log::debug!("guest memory is backed by pages as the host likes: {e}"),
        }
    }
}

/// Has the kernel take the region's pages from one of its nodes and no other.
#[allow(unsafe_code)] // mbind takes addresses, and no crate in use wraps it.
fn bind(region: &MmapRegion, node: u32) -> io::Result<()> {
    const WORDS: usize = 16;
    /// Fail where a page is elsewhere and cannot be moved; move those that can (Linux `include/uapi/linux/mempolicy.h`).
    const STRICT_AND_MOVE: libc::c_int = 1 << 0 | 1 << 1;
    let mut mask = [0_u64; WORDS];
    let word = usize::try_from(node / 64).ok().and_then(|word| mask.get_mut(word));
    *word.ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))? |= 1 << (node % 64);
    // The kernel counts one bit less than it is told.
    let bits = WORDS * 64 + 1;
    // SAFETY: the range is the mapping just made, and the mask has as many bits as are said; the call changes where pages come from, not
    // what they hold.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            region.as_ptr(),
            region.size(),
            libc::MPOL_BIND,
            mask.as_ptr(),
            bits,
            STRICT_AND_MOVE,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
