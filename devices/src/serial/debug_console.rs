//! The debug console: a port that takes a byte of text at a time, as Bochs and QEMU have it (`-debugcon`). Firmware and test programs
//! write to it before they know of any serial port.
//!
//! There is no input. A read gives the port's customary value, by which firmware finds out that somebody listens.

use std::sync::Arc;

use event_manager::{EventOps, EventSubscriber, Events};
use vm_device::DevicePio;
use vm_device::bus::{PioAddress, PioAddressOffset};

use super::backend::{Backend, INPUT, LISTENER, OUTPUT, Received, WINDOW};

/// How many ports it takes.
pub const PORTS: u16 = 1;

/// What the port reads as, wherever it is.
const PRESENT: u8 = 0xe9;

/// The console on the port bus, and the subscriber that writes its output out.
#[derive(Debug)]
pub struct DebugConsole {
    backend: Arc<Backend>,
}

impl DebugConsole {
    /// A console in front of `backend`.
    pub fn new(backend: Arc<Backend>) -> Self {
        Self { backend }
    }

    /// What somebody types at the other end of a pseudoterminal has nowhere to go.
    fn drop_input(&self, ops: &mut EventOps<'_>) {
        let mut buffer = [0; 256];
        loop {
            match self.backend.receive(&mut buffer) {
                Received::Bytes(_) => {}
                Received::Nothing => return,
                Received::Closed => return self.backend.hang_up(ops),
            }
        }
    }
}

impl DevicePio for DebugConsole {
    fn pio_read(&self, _base: PioAddress, _offset: PioAddressOffset, data: &mut [u8]) {
        match &mut *data {
            [value] => *value = PRESENT,
            data => data.fill(0xff),
        }
    }

    fn pio_write(&self, _base: PioAddress, _offset: PioAddressOffset, data: &[u8]) {
        let mut output = self.backend.output();
        for byte in data {
            output.push(*byte);
        }
    }
}

impl EventSubscriber for DebugConsole {
    fn process(&self, events: Events, ops: &mut EventOps<'_>) {
        match events.data() {
            INPUT => self.drop_input(ops),
            OUTPUT => self.backend.output().drain(),
            WINDOW => self.backend.output().close_window(),
            LISTENER => self.backend.accept(ops),
            token => log::error!("debug console: event with unknown token {token}"),
        }
    }

    fn init(&self, ops: &mut EventOps<'_>) {
        self.backend.watch(ops);
        self.drop_input(ops);
    }
}

impl Drop for DebugConsole {
    fn drop(&mut self) {
        self.backend.flush();
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn what_is_written_to_the_port_comes_out_in_order_and_a_read_tells_that_it_is_there() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let backend = Backend::from_descriptors(None, Some(writer.into())).unwrap();
        let console = DebugConsole::new(backend);
        for byte in b"hello" {
            console.pio_write(PioAddress(0xe9), 0, &[*byte]);
        }
        console.pio_write(PioAddress(0xe9), 0, b", string instructions\n");
        drop(console);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello, string instructions\n");
        let console = DebugConsole::new(Backend::from_descriptors(None, None).unwrap());
        let mut data = [0];
        console.pio_read(PioAddress(0xe9), 0, &mut data);
        assert_eq!(data, [0xe9]);
        let mut data = [0; 4];
        console.pio_read(PioAddress(0xe9), 0, &mut data);
        assert_eq!(data, [0xff; 4]);
    }
}
