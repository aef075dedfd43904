//! The serial port: a 16550 UART at the eight ports of COM1, on `vm-superio`'s model.
//!
//! Registers follow the PC16550D data sheet as far as `vm-superio` does. Accesses are one byte wide; wider ones read all ones
//! and are dropped. Input is read from the host only as far as the receive FIFO has room, and not before the guest listens:
//! a driver's start-up sequence throws the contents of the FIFO away, so a script piped into the VMM would lose its start.

pub(crate) mod backend;
pub mod debug_console;
mod output;
mod stream;
pub mod terminal;
#[cfg(test)]
mod tests;
pub(crate) mod watch;

use std::fmt;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::{EventOps, EventSet, EventSubscriber, Events};
use serde::{Deserialize, Serialize};
use vm_device::DevicePio;
use vm_device::bus::{PioAddress, PioAddressOffset};
use vm_superio::Trigger;
use vm_superio::serial::SerialEvents;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub use backend::{Backend, BackendError, SerialMode};
use backend::{INPUT, LISTENER, OUTPUT, Received, WINDOW};
pub use terminal::restore;

/// How many ports a 16550 has.
pub const PORTS: u16 = 8;

/// Token of the eventfd that says that there may be room for input again.
const RESUME: u32 = 0;

const RBR_THR: u8 = 0;
const IER: u8 = 1;
const IIR: u8 = 2;
const LCR: u8 = 3;
const MCR: u8 = 4;
const LSR: u8 = 5;
const IER_RECEIVED_DATA: u8 = 1 << 0;
const IIR_NONE: u8 = 1 << 0;
const IIR_CAUSE: u8 = 0x0f;
const IIR_RECEIVED_DATA: u8 = 1 << 2;
const LSR_DATA_READY: u8 = 1 << 0;
const LCR_DIVISOR_LATCH: u8 = 1 << 7;
const MCR_LOOPBACK: u8 = 1 << 4;

/// So many reads of the line status without a byte sent in between mean that the guest polls for input.
const POLLS_OF_A_LISTENER: u8 = 64;

/// A serial port could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot make an eventfd for the serial port; raise the limit on open files (ulimit -n)")]
pub struct SerialError(#[from] io::Error);

/// The interrupt line.
struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// What stops and resumes the flow of input.
struct Flow {
    /// Input waits for the guest; resume when the FIFO is empty.
    waiting: AtomicBool,
    resume: EventFd,
}

impl Flow {
    fn resume(&self) {
        if self.waiting.swap(false, Ordering::SeqCst) {
            // It can only fail when it is signalled already.
            let _ = self.resume.write(1);
        }
    }
}

impl SerialEvents for Flow {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        self.resume();
    }
}

/// The wire from the UART to the backend.
struct Wire(Arc<Backend>);

impl Write for Wire {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.send(bytes);
        Ok(bytes.len())
    }

    // The output decides by itself when to write.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

type Uart = vm_superio::Serial<Interrupt, Arc<Flow>, Wire>;

/// Whether the received-data interrupt is enabled. Behind the divisor latch its register cannot be seen.
fn wants_input(uart: &mut Uart) -> bool {
    uart.read(LCR) & LCR_DIVISOR_LATCH == 0 && uart.read(IER) & IER_RECEIVED_DATA != 0
}

/// A 16550 on the port bus, and the subscriber that feeds it from its [`Backend`].
pub struct Serial {
    uart: Mutex<Uart>,
    backend: Arc<Backend>,
    flow: Arc<Flow>,
    /// The guest has shown that it wants input.
    listening: AtomicBool,
    /// Reads of the line status since the last byte sent.
    polls: AtomicU8,
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serial").field("backend", &self.backend).finish_non_exhaustive()
    }
}

/// What is saved of it: the registers, what the guest has not read yet, and whether it reads at all.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    received: Vec<u8>,
    listening: bool,
}

impl Serial {
    /// A port in its power-on state. `interrupt` is signalled for each interrupt (edge); it should be an irqfd.
    ///
    /// # Errors
    /// No eventfd could be made.
    pub fn new(interrupt: EventFd, backend: Arc<Backend>) -> Result<Self, SerialError> {
        let flow = Arc::new(Flow { waiting: AtomicBool::new(false), resume: EventFd::new(EFD_NONBLOCK)? });
        let uart = Uart::with_events(Interrupt(interrupt), Arc::clone(&flow), Wire(Arc::clone(&backend)));
        Ok(Self {
            uart: Mutex::new(uart),
            backend,
            flow,
            listening: AtomicBool::new(false),
            polls: AtomicU8::new(0),
        })
    }

    /// What must go on elsewhere as it is here.
    pub fn save(&self) -> SerialState {
        let state = self.uart().state();
        SerialState {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            received: state.in_buffer,
            listening: self.listening.load(Ordering::SeqCst),
        }
    }

    /// Goes on as saved. An interrupt that the guest has not answered is given once more.
    ///
    /// # Errors
    /// No descriptor is left, or the registers cannot have been a serial port's.
    pub fn restore(&self, saved: &SerialState) -> io::Result<()> {
        let mut uart = self.uart();
        let interrupt = Interrupt(uart.interrupt_evt().0.try_clone()?);
        let [baud_divisor_low, baud_divisor_high] = saved.divisor;
        let state = vm_superio::SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: saved.interrupt_enable,
            interrupt_identification: saved.interrupt_identification,
            line_control: saved.line_control,
            line_status: saved.line_status,
            modem_control: saved.modem_control,
            modem_status: saved.modem_status,
            scratch: saved.scratch,
            in_buffer: saved.received.clone(),
        };
        let wire = Wire(Arc::clone(&self.backend));
        *uart = Uart::from_state(&state, interrupt, Arc::clone(&self.flow), wire)
            .map_err(|e| io::Error::other(format!("{e:?}")))?;
        drop(uart);
        self.listening.store(saved.listening, Ordering::SeqCst);
        Ok(())
    }

    /// Reads a register. The model takes the received-data interrupt back at the first byte read; a 16550 keeps it up while
    /// there is more. A driver that reads so many bytes at most and then asks for the cause must not be told that there is
    /// none, since no further edge would call it again.
    fn read(&self, offset: u8) -> u8 {
        let mut uart = self.uart();
        let value = uart.read(offset);
        let more = offset == IIR
            && value & IIR_NONE != 0
            && uart.read(LSR) & LSR_DATA_READY != 0
            && wants_input(&mut uart);
        if more { value & !IIR_CAUSE | IIR_RECEIVED_DATA } else { value }
    }

    fn uart(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many bytes the guest can take now. When none, the flow is resumed once it can.
    fn room(&self) -> usize {
        let mut uart = self.uart();
        // In loopback the receiver is disconnected from the line.
        let room = if uart.read(MCR) & MCR_LOOPBACK != 0 { 0 } else { uart.fifo_capacity() };
        if room == 0 || !self.listening.load(Ordering::SeqCst) {
            // Under the UART's lock, so that the guest cannot empty the FIFO between the look and the note.
            self.flow.waiting.store(true, Ordering::SeqCst);
            return 0;
        }
        room
    }

    /// Moves input from the backend to the guest until either has no more of it.
    fn pump(&self, ops: &mut EventOps<'_>) {
        let mut buffer = [0; 64];
        loop {
            let room = self.room().min(buffer.len());
            if room == 0 {
                return;
            }
            match self.backend.receive(&mut buffer[..room]) {
                Received::Nothing => return,
                Received::Closed => {
                    self.backend.hang_up(ops);
                    return;
                }
                Received::Bytes(count) => {
                    // The guest may have filled the FIFO itself meanwhile, through loopback.
                    let taken = self.uart().enqueue_raw_bytes(&buffer[..count]).unwrap_or(0);
                    self.backend.unread(&buffer[taken..count]);
                }
            }
        }
    }

    fn listen(&self) {
        if !self.listening.swap(true, Ordering::SeqCst) {
            self.flow.resume();
        }
    }
}

impl DevicePio for Serial {
    fn pio_read(&self, _base: PioAddress, offset: PioAddressOffset, data: &mut [u8]) {
        let ([value], Ok(offset @ 0..8)) = (&mut *data, u8::try_from(offset)) else {
            data.fill(0xff);
            return;
        };
        *value = self.read(offset);
        if offset == LSR && !self.listening.load(Ordering::Relaxed) {
            let polls = self.polls.load(Ordering::Relaxed).saturating_add(1);
            self.polls.store(polls, Ordering::Relaxed);
            if polls >= POLLS_OF_A_LISTENER {
                self.listen();
            }
        }
    }

    fn pio_write(&self, _base: PioAddress, offset: PioAddressOffset, data: &[u8]) {
        let (&[value], Ok(offset @ 0..8)) = (data, u8::try_from(offset)) else { return };
        let listens = {
            let mut uart = self.uart();
            // It can only fail to raise an interrupt that is raised already.
            let _ = uart.write(offset, value);
            offset == IER && wants_input(&mut uart)
        };
        match offset {
            RBR_THR => self.polls.store(0, Ordering::Relaxed),
            IER if listens => self.listen(),
            MCR if value & MCR_LOOPBACK == 0 => self.flow.resume(),
            _ => {}
        }
    }
}

impl EventSubscriber for Serial {
    fn process(&self, events: Events, ops: &mut EventOps<'_>) {
        match events.data() {
            RESUME => {
                let _ = self.flow.resume.read();
                self.pump(ops);
            }
            INPUT => self.pump(ops),
            OUTPUT => self.backend.output().drain(),
            WINDOW => self.backend.output().close_window(),
            LISTENER => {
                self.backend.accept(ops);
                self.pump(ops);
            }
            token => log::error!("serial port: event with unknown token {token}"),
        }
    }

    fn init(&self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::with_data(&self.flow.resume, RESUME, EventSet::IN)) {
            log::error!("serial port: no input, because the event loop refuses: {error}");
        }
        self.backend.watch(ops);
        self.pump(ops);
    }
}

impl Drop for Serial {
    fn drop(&mut self) {
        self.backend.flush();
    }
}
