//! The console device (VIRTIO 1.2, section 5.3) with one port, whose other end is a [`Backend`] as a serial port's is.
//!
//! Input stays with the host until the driver has buffers for it. Output that the other end does not take is kept up to a limit and then dropped, as a
//! serial port's is: a driver that waits for its buffers to come back must not wait for somebody to open a terminal.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::MemoryView;
use super::chain::Chain;
use super::device::{Activation, Active, DeviceError, DeviceType, F_RINGS, Interrupt, VirtioDevice};
use super::queue::{ActiveQueue, Served};
use super::worker::{Event, Handler, Watch, Worker};
use crate::serial::Backend;
use crate::serial::backend::{INPUT, LISTENER, OUTPUT, Received, WINDOW};

/// VIRTIO_CONSOLE_F_SIZE: the configuration has the size of the terminal.
const F_SIZE: u64 = 1 << 0;

const QUEUE_SIZE: u16 = 256;
const RX: u16 = 0;
const TX: u16 = 1;
/// Bytes that are moved at once.
const PIECE: usize = 4096;
/// The most that is taken of one chain: a chain can name the same memory many times, and nobody prints so much at once.
const CHAIN_BYTES_MAX: usize = 1 << 20;
/// Token of what says that the terminal has another size; below are the backend's own.
const RESIZED: u32 = 16;

/// The size that the driver was told last.
#[derive(Debug, Default)]
struct Size(AtomicU32);

impl Size {
    /// As the configuration has it: columns, then rows.
    fn bytes(&self) -> [u8; 4] {
        self.0.load(Ordering::Relaxed).to_le_bytes()
    }

    /// Looks at the terminal; whether the size is another than before.
    fn update(&self, backend: &Backend) -> bool {
        let Some((columns, rows)) = backend.window() else { return false };
        let size = u32::from(columns) | u32::from(rows) << 16;
        self.0.swap(size, Ordering::Relaxed) != size
    }
}

/// The device.
#[derive(Debug)]
pub struct Console {
    name: String,
    backend: Arc<Backend>,
    size: Arc<Size>,
    resized: Option<Arc<UnixStream>>,
}

impl Console {
    /// A console called `name` whose other end is `backend`. `resized` becomes readable when the terminal there may have another size.
    pub fn new(name: &str, backend: Arc<Backend>, resized: Option<UnixStream>) -> Self {
        let size = Arc::new(Size::default());
        size.update(&backend);
        Self { name: name.to_owned(), backend, size, resized: resized.map(Arc::new) }
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> DeviceType {
        DeviceType::CONSOLE
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }

    fn features(&self) -> u64 {
        F_RINGS | if self.backend.window().is_some() { F_SIZE } else { 0 }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // One port; what is behind it is of features that are not offered.
        let config = [&self.size.bytes()[..], &1_u32.to_le_bytes()].concat();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (place, byte) in data.iter_mut().zip(config.iter().skip(start)) {
            *place = *byte;
        }
    }

    fn activate(&self, mut activation: Activation) -> Result<Box<dyn Active>, DeviceError> {
        let port = Port {
            rx: activation.take_queue(RX)?,
            tx: activation.take_queue(TX)?,
            backend: Arc::clone(&self.backend),
            size: Arc::clone(&self.size),
            resized: self.resized.clone(),
            interrupt: Arc::clone(&activation.interrupt),
            bytes: vec![0; PIECE],
        };
        Ok(Box::new(Worker::start(&self.name, Box::new(port), activation.interrupt)?))
    }

    fn terminal(&self) -> Option<PathBuf> {
        self.backend.pty_path().map(Into::into)
    }
}

struct Port {
    rx: ActiveQueue,
    tx: ActiveQueue,
    backend: Arc<Backend>,
    size: Arc<Size>,
    resized: Option<Arc<UnixStream>>,
    interrupt: Arc<dyn Interrupt>,
    bytes: Vec<u8>,
}

impl Handler for Port {
    fn doorbells(&self) -> Vec<(u16, Arc<EventFd>)> {
        [&self.rx, &self.tx].map(|queue| (queue.index(), Arc::clone(queue.kick()))).into()
    }

    fn start(&mut self, watch: &Watch) -> Result<(), DeviceError> {
        self.backend.watch(&mut { watch });
        if let Some(resized) = &self.resized {
            let watched = watch.add(&**resized, EventSet::IN, RESIZED);
            watched.map_err(DeviceError::host("watching the size of the terminal"))?;
        }
        self.look_at_size();
        Ok(())
    }

    fn event(&mut self, event: Event, watch: &Watch) -> Result<(), DeviceError> {
        match event {
            Event::Kick(TX) => self.transmit()?,
            Event::Kick(_) => self.receive(watch)?,
            Event::Ready(OUTPUT, _) => self.backend.output().drain(),
            Event::Ready(WINDOW, _) => self.backend.output().close_window(),
            Event::Ready(INPUT, _) => self.receive(watch)?,
            Event::Ready(LISTENER, _) => {
                self.backend.accept(&mut { watch });
                self.receive(watch)?;
            }
            Event::Ready(_, _) => {
                if let Some(mut resized) = self.resized.as_deref() {
                    let _ = resized.read(&mut [0; 64]);
                }
                self.look_at_size();
            }
        }
        Ok(())
    }

    fn quiesce(&mut self) {
        self.backend.flush();
    }
}

impl Port {
    fn look_at_size(&self) {
        if self.size.update(&self.backend) {
            self.interrupt.config();
        }
    }

    /// Gives output of the driver to the other end.
    fn transmit(&mut self) -> Result<(), DeviceError> {
        let Self { tx, backend, bytes, .. } = self;
        tx.serve(|view, chain| {
            print(backend, bytes, view, &chain)?;
            Ok::<_, DeviceError>(Served::Done(chain, 0))
        })
        .map(|_| ())
    }

    /// Gives input to the driver, as far as it has buffers.
    fn receive(&mut self, watch: &Watch) -> Result<(), DeviceError> {
        // A pseudoterminal does not say that its size has changed; whoever types has it in the right size.
        self.look_at_size();
        let Self { rx, backend, bytes, .. } = self;
        rx.serve(|view, chain| {
            let room = usize::try_from(chain.writable_len()).unwrap_or(usize::MAX).min(bytes.len());
            if room == 0 {
                return Ok(Served::Done(chain, 0));
            }
            match backend.receive(&mut bytes[..room]) {
                Received::Bytes(count) => {
                    let mut writer = chain.writer(view);
                    let input = bytes.get(..count).unwrap_or_default();
                    writer.write_all(input).map_err(DeviceError::host("giving input to the guest"))?;
                    let written = writer.written();
                    Ok(Served::Done(chain, written))
                }
                Received::Nothing => Ok(Served::NotNow(chain)),
                Received::Closed => {
                    backend.hang_up(&mut { watch });
                    Ok(Served::NotNow(chain))
                }
            }
        })
        .map(|_| ())
    }
}

fn print(backend: &Backend, bytes: &mut [u8], view: &MemoryView, chain: &Chain) -> Result<(), DeviceError> {
    let mut reader = chain.reader(view).take(CHAIN_BYTES_MAX as u64);
    loop {
        let count = reader.read(bytes).map_err(DeviceError::host("reading output of the guest"))?;
        if count == 0 {
            return Ok(());
        }
        backend.send(bytes.get(..count).unwrap_or_default());
    }
}

#[cfg(test)]
mod tests;
