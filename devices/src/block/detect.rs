//! What a file looks like, by the magic numbers of image formats.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};

/// Kinds of images, of which Dormouse reads two.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ImageType {
    /// VMware's, in one flat file.
    FlatVmdk,
    /// Microsoft's older one, of fixed size.
    FixedVhd,
    /// QEMU's.
    Qcow2,
    /// Bytes as they are.
    Raw,
    /// Microsoft's newer one.
    Vhdx,
    /// Nobody has said.
    #[default]
    Unknown,
}

impl ImageType {
    /// As the command line has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::FlatVmdk => "vmdk",
            Self::FixedVhd => "vhd",
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
            Self::Vhdx => "vhdx",
            Self::Unknown => "unknown",
        }
    }
}

/// What a file of `size` bytes looks like: raw, if like nothing else.
pub fn detect(file: &File, size: u64) -> io::Result<ImageType> {
    let mut head = [0; 32];
    let count = read_at_most(file, &mut head, 0)?;
    let starts = |magic: &[u8]| head.get(..count).is_some_and(|head| head.starts_with(magic));
    if starts(b"QFI\xfb") {
        return Ok(ImageType::Qcow2);
    }
    if starts(b"vhdxfile") {
        return Ok(ImageType::Vhdx);
    }
    if starts(b"KDMV") || starts(b"# Disk DescriptorFile") {
        return Ok(ImageType::FlatVmdk);
    }
    // Its footer; an image that grows has a copy in front.
    let mut foot = [0; 8];
    let end = size.saturating_sub(512);
    if starts(b"conectix") || (read_at_most(file, &mut foot, end)? == 8 && &foot == b"conectix") {
        return Ok(ImageType::FixedVhd);
    }
    Ok(ImageType::Raw)
}

fn read_at_most(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, offset.saturating_add(done as u64)) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}
