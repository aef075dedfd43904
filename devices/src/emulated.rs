//! PCI functions that are all the machine's own: what the machine asks of them beyond answering the bus.

use pci::assign::FunctionNeeds;
use pci::bar::{Bar, BarRegisters};
use pci::config::ConfigSpace;
use pci::{DevFn, PciFunction, regs};
use serde::{Deserialize, Serialize};

/// What is saved of a function, in a form that is its own.
pub type Saved = serde_json::Value;

/// A function without hardware behind it.
pub trait EmulatedFunction: PciFunction {
    /// What the operator calls it.
    fn name(&self) -> &str;

    /// Its place on its bus.
    fn devfn(&self) -> DevFn;

    /// What its BARs need.
    fn needs(&self) -> FunctionNeeds;

    /// Its BARs as the guest has placed them.
    fn bars(&self) -> Vec<Bar>;

    /// Quiesces it: until [`Self::resume`] it does nothing of its own accord.
    fn pause(&self) {}

    /// Undoes [`Self::pause`].
    fn resume(&self) {}

    /// Stops it for good, and returns when it has stopped.
    fn shutdown(&self) {}

    /// The guest has more memory than before, or less.
    fn memory_changed(&self) {}

    /// Bytes of memory that the guest has given up to it.
    fn withheld_memory(&self) -> u64 {
        0
    }

    /// What must go on elsewhere as it is here. Called while it is paused.
    ///
    /// # Errors
    /// It cannot be saved, and why.
    fn save(&self) -> Result<Saved, String>;

    /// Goes on as saved; called before the guest runs. It is paused then, until [`Self::resume`].
    ///
    /// # Errors
    /// That cannot be, and why.
    fn restore(&self, saved: &Saved) -> Result<(), String>;

    /// What it has counted.
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

/// What a guest can write of a function's header: saved by reading it, and restored by writing it as the guest would.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    command: u16,
    cache_line_size: u8,
    interrupt_line: u8,
    /// Base address registers and, last, that of the expansion ROM.
    bars: Vec<u32>,
}

impl Header {
    /// Where the base address registers are.
    const BARS: [usize; 7] = [0x10, 0x14, 0x18, 0x1c, 0x20, 0x24, regs::ROM_ADDRESS];

    /// Reads it.
    pub fn save(config: &ConfigSpace, bars: &BarRegisters) -> Self {
        let registers = config.registers();
        let bar = |offset: usize| {
            let mut value = [0; 4];
            bars.read(u16::try_from(offset).unwrap_or(0), &mut value);
            u32::from_le_bytes(value)
        };
        Self {
            command: registers.u16(regs::COMMAND),
            cache_line_size: registers.u8(regs::CACHE_LINE_SIZE),
            interrupt_line: registers.u8(regs::INTERRUPT_LINE),
            bars: Self::BARS.map(bar).into(),
        }
    }

    /// Writes it.
    pub fn restore(&self, config: &mut ConfigSpace, bars: &mut BarRegisters) {
        let mut write = |offset: usize, bytes: &[u8]| config.write(u16::try_from(offset).unwrap_or(0), bytes);
        write(regs::CACHE_LINE_SIZE, &[self.cache_line_size]);
        write(regs::INTERRUPT_LINE, &[self.interrupt_line]);
        write(regs::COMMAND, &self.command.to_le_bytes());
        for (offset, value) in Self::BARS.into_iter().zip(&self.bars) {
            bars.write(u16::try_from(offset).unwrap_or(0), &value.to_le_bytes());
        }
    }
}
