//! The socket device (VIRTIO 1.2, section 5.10): stream sockets between programs of the guest and Unix sockets of the host, as Firecracker has them.
//!
//! A program on the host connects to the device's socket, writes `CONNECT <port>\n`, reads `OK <port>\n`, and is connected to the guest. A program in the guest
//! that connects to port N of the host (CID 2) reaches whoever listens on the device's path with `_N` behind it.
//!
//! Connections end when the driver resets the device. The listening socket stays as long as the device: who comes meanwhile waits in it.

mod connection;
mod greeting;
mod listener;
mod muxer;
mod packet;
#[cfg(test)]
mod tests;

use std::io::{Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::eventfd::EventFd;

use super::MemoryView;
use super::chain::Chain;
use super::device::{Activation, Active, DeviceError, DeviceType, F_RINGS, Saved, VirtioDevice};
use super::queue::{ActiveQueue, Served};
use super::worker::{Event, Handler, Watch, Worker};
use listener::HostSocket;
pub use listener::VsockError;
use muxer::Muxer;
use packet::{HEADER_LEN, Header};

const QUEUE_SIZE: u16 = 256;
const RX: u16 = 0;
const TX: u16 = 1;
const EVENTS: u16 = 2;
/// The most data in one packet to the guest, and the most that is read from it at once.
const PACKET_MAX: usize = 64 << 10;
/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET.
const TRANSPORT_RESET: u32 = 0;

/// The device.
#[derive(Debug)]
pub struct Vsock {
    name: String,
    cid: u64,
    socket: Arc<HostSocket>,
    /// The guest's connections are of another machine, which it has to be told.
    restored: Arc<AtomicBool>,
}

impl Vsock {
    /// A device called `name` for the guest with the number `cid`, with its socket at `path`.
    ///
    /// # Errors
    /// The socket cannot be had.
    pub fn new(name: &str, cid: u32, path: &Path) -> Result<Self, VsockError> {
        Ok(Self {
            name: name.to_owned(),
            cid: cid.into(),
            socket: Arc::new(HostSocket::bind(path)?),
            restored: Arc::new(AtomicBool::new(false)),
        })
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> DeviceType {
        DeviceType::VSOCK
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 3]
    }

    fn features(&self) -> u64 {
        F_RINGS
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.cid.to_le_bytes();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (place, byte) in data.iter_mut().zip(config.iter().skip(start)) {
            *place = *byte;
        }
    }

    fn activate(&self, mut activation: Activation) -> Result<Box<dyn Active>, DeviceError> {
        let muxer = Muxer::new(self.cid, Arc::clone(&self.socket)).map_err(DeviceError::host("a timer"))?;
        let proxy = Proxy {
            rx: activation.take_queue(RX)?,
            tx: activation.take_queue(TX)?,
            events: activation.take_queue(EVENTS)?,
            restored: Arc::clone(&self.restored),
            muxer,
            buffer: vec![0; PACKET_MAX],
            blocked: false,
        };
        Ok(Box::new(Worker::start(&self.name, Box::new(proxy), activation.interrupt)?))
    }

    fn restore(&self, _saved: &Saved) -> Result<(), String> {
        self.restored.store(true, Ordering::SeqCst);
        Ok(())
    }
}

struct Proxy {
    rx: ActiveQueue,
    tx: ActiveQueue,
    events: ActiveQueue,
    restored: Arc<AtomicBool>,
    muxer: Muxer,
    buffer: Vec<u8>,
    /// Packets of the guest wait until it takes refusals.
    blocked: bool,
}

impl Handler for Proxy {
    fn doorbells(&self) -> Vec<(u16, Arc<EventFd>)> {
        [&self.rx, &self.tx, &self.events].map(|queue| (queue.index(), Arc::clone(queue.kick()))).into()
    }

    fn start(&mut self, watch: &Watch) -> Result<(), DeviceError> {
        self.muxer.start(watch)
    }

    fn event(&mut self, event: Event, watch: &Watch) -> Result<(), DeviceError> {
        match event {
            Event::Kick(TX) => self.take(watch)?,
            Event::Kick(EVENTS) => self.tell_of_reset()?,
            Event::Kick(_) if !self.muxer.has_ready() => self.rx.look(&self.rx.view())?,
            Event::Kick(_) => {}
            Event::Ready(token, events) => self.muxer.event(token, events, watch),
        }
        self.give(watch)?;
        if self.blocked && self.muxer.has_room() {
            self.tx.ring_own_doorbell();
        }
        Ok(())
    }
}

impl Proxy {
    /// Takes packets from the guest.
    fn take(&mut self, watch: &Watch) -> Result<(), DeviceError> {
        let Self { tx, muxer, buffer, .. } = self;
        let all = tx.serve(|view, chain| {
            if !muxer.has_room() {
                return Ok(Served::NotNow(chain));
            }
            take_packet(muxer, buffer, view, &chain, watch)?;
            Ok::<_, DeviceError>(Served::Done(chain, 0))
        })?;
        self.blocked = !all;
        Ok(())
    }

    /// Gives packets to the guest, as far as it has buffers for them.
    fn give(&mut self, watch: &Watch) -> Result<(), DeviceError> {
        if !self.muxer.has_ready() {
            return Ok(());
        }
        let Self { rx, muxer, buffer, .. } = self;
        let view = rx.view();
        let mut left = u32::from(rx.layout().size) * 2;
        'all: loop {
            rx.disable_notification(&view)?;
            while muxer.has_ready() {
                if left == 0 {
                    rx.ring_own_doorbell();
                    break 'all;
                }
                let Some(chain) = rx.pop(&view)? else { break };
                left -= 1;
                let room = usize::try_from(chain.writable_len()).unwrap_or(0).saturating_sub(HEADER_LEN);
                if room == 0 {
                    // Not even one byte of data fits.
                    rx.push(&view, chain, 0)?;
                    continue;
                }
                let limit = room.min(buffer.len());
                let Some((header, len)) = muxer.next(&mut buffer[..limit], watch) else {
                    rx.undo_pop(chain);
                    break 'all;
                };
                let mut writer = chain.writer(&view);
                let data = buffer.get(..len).unwrap_or_default();
                writer
                    .write_all(&header.to_bytes())
                    .and_then(|()| writer.write_all(data))
                    .map_err(DeviceError::host("writing a packet to the guest"))?;
                let written = writer.written();
                rx.push(&view, chain, written)?;
            }
            if !muxer.has_ready() || !rx.enable_notification(&view)? {
                break;
            }
        }
        rx.notify(&view)?;
        Ok(())
    }

    /// Tells a guest that goes on in another machine that its connections are gone.
    fn tell_of_reset(&mut self) -> Result<(), DeviceError> {
        let view = self.events.view();
        if !self.restored.load(Ordering::SeqCst) {
            return Ok(self.events.look(&view)?);
        }
        let Some(chain) = self.events.pop(&view)? else { return Ok(()) };
        let mut writer = chain.writer(&view);
        if let Err(e) = writer.write_all(&TRANSPORT_RESET.to_le_bytes()) {
            log::debug!("vsock: the guest cannot be told that its connections are gone: {e}");
        }
        let written = writer.written();
        self.events.push(&view, chain, written)?;
        self.events.notify(&view)?;
        self.restored.store(false, Ordering::SeqCst);
        Ok(())
    }
}

/// One packet from the guest. One that is not whole is dropped: there is nobody to complain to.
fn take_packet(
    muxer: &mut Muxer,
    buffer: &mut [u8],
    view: &MemoryView,
    chain: &Chain,
    watch: &Watch,
) -> Result<(), DeviceError> {
    let mut reader = chain.reader(view);
    let mut bytes = [0; HEADER_LEN];
    let data_len = chain.readable_len().checked_sub(u32::try_from(HEADER_LEN).unwrap_or(u32::MAX));
    let Some(data_len) = data_len else { return Ok(()) };
    reader.read_exact(&mut bytes).map_err(DeviceError::host("reading a packet of the guest"))?;
    let header = Header::from_bytes(&bytes);
    if header.len > data_len {
        return Ok(());
    }
    let read = |each: &mut dyn FnMut(&[u8])| {
        let mut left = usize::try_from(header.len).unwrap_or(0);
        while left > 0 {
            let limit = left.min(buffer.len());
            let piece = &mut buffer[..limit];
            reader.read_exact(piece).map_err(DeviceError::host("reading data of the guest"))?;
            each(piece);
            left -= limit;
        }
        Ok(())
    };
    muxer.take(&header, read, watch)
}
