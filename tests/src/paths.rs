//! Where things are: the workspace, cargo's target directory, the test bed's cache.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Result, file_error};

/// The directory of the workspace's `Cargo.toml`.
pub fn workspace() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).to_path_buf()
}

/// Cargo's target directory.
pub fn target() -> PathBuf {
    match env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => workspace().join(dir),
        None => workspace().join("target"),
    }
}

/// The cache: kernels, images, logs. Created on first use; safe to delete.
pub fn cache() -> Result<PathBuf> {
    let dir = target().join("testbed-cache");
    fs::create_dir_all(&dir).map_err(file_error("create", &dir))?;
    Ok(dir)
}

/// A fresh directory for one emulated host: sockets, drive files, logs. Short, since socket paths are limited to 107
/// bytes.
pub fn run_dir() -> Result<PathBuf> {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let dir = env::temp_dir().join(format!("dormouse-bed-{}-{number}", std::process::id()));
    fs::create_dir_all(&dir).map_err(file_error("create", &dir))?;
    Ok(dir)
}
