//! Writing an initramfs: the "newc" archive of the kernel's `Documentation/driver-api/early-userspace/buffer-format.rst`.
//!
//! Made here, and not by the `cpio` program, so that device nodes and owners need no privileges and archives can be
//! joined end to end.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::error::{Result, file_error};

const DIRECTORY: u32 = 0o040_755;
const EXECUTABLE: u32 = 0o100_755;
const SYMLINK: u32 = 0o120_777;
const CHARACTER: u32 = 0o020_600;

/// An archive in the making.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    inode: u32,
    directories: BTreeSet<String>,
}

impl Archive {
    /// An empty archive.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a directory, with its parents.
    pub fn directory(&mut self, path: &str) {
        if self.directories.insert(path.to_owned()) {
            self.parents(path);
            self.entry(path, DIRECTORY, (0, 0), &[]);
        }
    }

    /// Adds an executable file, with its parents.
    pub fn file(&mut self, path: &str, content: &[u8]) {
        self.parents(path);
        self.entry(path, EXECUTABLE, (0, 0), content);
    }

    /// Adds a copy of the file `source` of this machine.
    pub fn copy(&mut self, path: &str, source: &Path) -> Result<()> {
        let content = fs::read(source).map_err(file_error("read", source))?;
        self.file(path, &content);
        Ok(())
    }

    /// Adds a symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) {
        self.entry(path, SYMLINK, (0, 0), target.as_bytes());
    }

    /// Adds a character device node.
    pub fn character(&mut self, path: &str, major: u32, minor: u32) {
        self.entry(path, CHARACTER, (major, minor), &[]);
    }

    /// The finished archive, padded so that another may follow.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        while !self.bytes.len().is_multiple_of(512) {
            self.bytes.push(0);
        }
        self.bytes
    }

    fn parents(&mut self, path: &str) {
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.directory(parent);
        }
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.inode += 1;
        let size = u32::try_from(content.len()).unwrap_or(u32::MAX);
        let name = u32::try_from(path.len() + 1).unwrap_or(u32::MAX);
        let fields = [self.inode, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name, 0]
            .map(|f| format!("{f:08x}"));
        self.bytes.extend_from_slice(b"070701");
        self.bytes.extend_from_slice(fields.concat().as_bytes());
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(content);
        self.align();
    }

    fn align(&mut self) {
        while !self.bytes.len().is_multiple_of(4) {
            self.bytes.push(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_lists_as_the_cpio_program_reads_it() {
        use std::io::Write as _;
        use std::process::{Command, Stdio};
        let mut archive = Archive::new();
        archive.directory("dev");
        archive.character("dev/console", 5, 1);
        archive.file("init", b"#!/bin/sh\n");
        archive.symlink("sh", "init");
        let bytes = archive.finish();
        let mut child = Command::new("cpio")
            .args(["--list", "--quiet"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the cpio program is absent: apt-get install cpio");
        child.stdin.take().unwrap().write_all(&bytes).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "dev\ndev/console\ninit\nsh\n");
    }
}
