//! The entropy device (VIRTIO 1.2, section 5.4): one queue of buffers that are filled from a source on the host.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::MemoryView;
use super::chain::Chain;
use super::device::{Activation, Active, DeviceError, DeviceType, F_RINGS, VirtioDevice};
use super::queue::{ActiveQueue, Served};
use super::worker::{Event, Handler, Watch, Worker};

const QUEUE_SIZE: u16 = 256;
/// The most that one request gets: a driver that wants more asks again.
const REQUEST_MAX: usize = 64 << 10;

/// The source cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("--rng src={}: {source}; name a file that gives random bytes without end, such as /dev/urandom", path.display())]
pub struct RngError {
    path: PathBuf,
    source: io::Error,
}

/// The device.
#[derive(Debug)]
pub struct Rng {
    name: String,
    source: Arc<File>,
}

impl Rng {
    /// A device called `name` over the file at `path`.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn new(name: &str, path: &Path) -> Result<Self, RngError> {
        // A source that runs dry answers later, not never: nobody may be kept waiting in a read.
        let source = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(|source| RngError { path: path.into(), source })?;
        Ok(Self { name: name.to_owned(), source: Arc::new(source) })
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> DeviceType {
        DeviceType::RNG
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        F_RINGS
    }

    fn activate(&self, mut activation: Activation) -> Result<Box<dyn Active>, DeviceError> {
        let queue = activation.take_queue(0)?;
        let handler = Filler { queue, source: Arc::clone(&self.source), bytes: vec![0; REQUEST_MAX] };
        Ok(Box::new(Worker::start(&self.name, Box::new(handler), activation.interrupt)?))
    }
}

struct Filler {
    queue: ActiveQueue,
    source: Arc<File>,
    bytes: Vec<u8>,
}

impl Handler for Filler {
    fn doorbells(&self) -> Vec<(u16, Arc<EventFd>)> {
        vec![(self.queue.index(), Arc::clone(self.queue.kick()))]
    }

    fn event(&mut self, _event: Event, _watch: &Watch) -> Result<(), DeviceError> {
        let Self { queue, source, bytes } = self;
        queue.serve(|view, chain| fill(source, bytes, view, chain)).map(|_| ())
    }
}

fn fill(mut source: &File, bytes: &mut [u8], view: &MemoryView, chain: Chain) -> Result<Served, DeviceError> {
    let wanted = usize::try_from(chain.writable_len()).unwrap_or(usize::MAX).min(bytes.len());
    let count = match source.read(&mut bytes[..wanted]) {
        Ok(count) => count,
        // Nothing now: the driver gets nothing and may ask again.
        Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => 0,
        Err(source) => return Err(DeviceError::Host { what: "reading random bytes".into(), source }),
    };
    let mut writer = chain.writer(view);
    writer.write_all(&bytes[..count]).map_err(DeviceError::host("giving random bytes to the guest"))?;
    let written = writer.written();
    Ok(Served::Done(chain, written))
}
