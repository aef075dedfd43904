//! What an opened function consists of: its BARs, its interrupts, its capabilities; read once, before boot.
//!
//! Follows PCI Local Bus 3.0 section 6.2.5 (base address registers).

use pci::Bdf;
use pci::bar::{BarError, BarKind, BarRegisters};
use pci::cap::msi::{MsiCapability, MsiLayout, MsiLayoutError};
use pci::cap::msix::{self, MsixCapability, MsixLayout, MsixLayoutError};
use pci::function::{BarIndex, ROM_BAR};

use super::bar::Bar;
use super::config::{CONFIG_SIZE, CapabilityError, ConfigShadow};
use super::open::{Handle, Region};

/// Header type in the low seven bits of byte 0x0e; 0 is an endpoint.
const HEADER_TYPE: usize = 0x0e;

/// A function that cannot be assigned because of what its registers say.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// Configuration space cannot be read.
    #[error(
        "device {bdf}: its configuration space cannot be read: {source}; the device is gone or stuck: try \
         'echo 1 > /sys/bus/pci/devices/{bdf}/reset', or remove and rescan it"
    )]
    Config {
        /// Host address.
        bdf: Bdf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// Not an endpoint.
    #[error("device {bdf} is a bridge (header type {kind}); assign the endpoints below it instead")]
    Bridge {
        /// Host address.
        bdf: Bdf,
        /// Header type.
        kind: u8,
    },
    /// A capability list that cannot be followed.
    #[error(transparent)]
    Capability(#[from] CapabilityError),
    /// A BAR that no register can describe.
    #[error(
        "device {bdf}: {source}; the device is broken or half asleep: reset it with \
         'echo 1 > /sys/bus/pci/devices/{bdf}/reset' and try again"
    )]
    Bar {
        /// Host address.
        bdf: Bdf,
        /// What is wrong with it.
        source: BarError,
    },
    /// MSI registers that contradict themselves.
    #[error(
        "device {bdf}: {source}; the device is broken or half asleep: reset it with \
         'echo 1 > /sys/bus/pci/devices/{bdf}/reset' and try again"
    )]
    Msi {
        /// Host address.
        bdf: Bdf,
        /// What is wrong with them.
        source: MsiLayoutError,
    },
    /// MSI-X registers that contradict themselves.
    #[error(
        "device {bdf}: {source}; the device is broken or half asleep: reset it with \
         'echo 1 > /sys/bus/pci/devices/{bdf}/reset' and try again"
    )]
    Msix {
        /// Host address.
        bdf: Bdf,
        /// What is wrong with them.
        source: MsixLayoutError,
    },
}

/// The parts of a function, ready to be put together.
#[derive(Debug)]
pub struct FunctionLayout {
    /// Configuration space as it was read.
    pub shadow: ConfigShadow,
    /// BAR registers, all at 0.
    pub registers: BarRegisters,
    /// The BARs and the ROM behind them.
    pub bars: Vec<Bar>,
    /// MSI registers and where they lie.
    pub msi: Option<(u16, MsiCapability)>,
    /// MSI-X registers and where they lie.
    pub msix: Option<(u16, MsixCapability)>,
}

impl FunctionLayout {
    /// Reads them from the device and maps its BARs. `direct` says which BARs the guest may reach without a trap.
    pub fn read(
        handle: &Handle,
        multi_function: bool,
        direct: impl Fn(BarIndex) -> bool,
    ) -> Result<Self, LayoutError> {
        let bdf = handle.bdf();
        let shadow = ConfigShadow::new(bdf, read_config(handle)?, multi_function)?;
        let mut header = [0; 1];
        shadow.raw(HEADER_TYPE, &mut header);
        let kind = header[0] & 0x7f;
        if kind != 0 {
            return Err(LayoutError::Bridge { bdf, kind });
        }
        let capabilities = shadow.capabilities();
        let msi = capabilities
            .msi
            .map(|at| {
                let layout = MsiLayout::parse(shadow.raw_u16(at + 2))?;
                Ok((at, MsiCapability::new(layout)?))
            })
            .transpose()
            .map_err(|source| LayoutError::Msi { bdf, source })?;
        let msix = capabilities
            .msix
            .map(|at| {
                let mut bytes = [0; msix::LEN as usize];
                shadow.raw(usize::from(at), &mut bytes);
                Ok((at, MsixCapability::new(MsixLayout::parse(&bytes)?)?))
            })
            .transpose()
            .map_err(|source| LayoutError::Msix { bdf, source })?;

        let mut registers = BarRegisters::new();
        let mut bars = Vec::new();
        for (index, kind, region) in bar_kinds(handle, &shadow) {
            registers.add(index, kind, region.size).map_err(|source| LayoutError::Bar { bdf, source })?;
            let trapped = table_in(msix.as_ref(), index);
            let mut bar = if kind.is_memory() && kind != BarKind::Rom && direct(index) {
                Bar::new(handle, index, region, &trapped)
            } else {
                Bar { index, region, areas: Vec::new() }
            };
            bar.areas.shrink_to_fit();
            bars.push(bar);
        }
        Ok(Self { shadow, registers, bars, msi, msix })
    }
}

/// The whole space; what a conventional function does not have reads zero (no extended capabilities).
fn read_config(handle: &Handle) -> Result<Box<[u8; CONFIG_SIZE]>, LayoutError> {
    let mut bytes = Box::new([0; CONFIG_SIZE]);
    let size = usize::try_from(handle.config_size()).unwrap_or(CONFIG_SIZE).min(CONFIG_SIZE);
    handle
        .config_read(0, &mut bytes[..size])
        .map_err(|source| LayoutError::Config { bdf: handle.bdf(), source })?;
    Ok(bytes)
}

/// The BARs that exist, with the kernel's description of each.
fn bar_kinds(handle: &Handle, shadow: &ConfigShadow) -> Vec<(BarIndex, BarKind, Region)> {
    let mut found = Vec::new();
    let mut index: BarIndex = 0;
    while index < 6 {
        let register = shadow.raw_u32(0x10 + 4 * u16::from(index));
        let kind = if register & 1 != 0 {
            BarKind::Io
        } else {
            let prefetchable = register & 8 != 0;
            if register & 6 == 4 { BarKind::Mem64 { prefetchable } } else { BarKind::Mem32 { prefetchable } }
        };
        let region = handle.region(u32::from(index));
        if region.size > 0 {
            found.push((index, kind, region));
        }
        index += if matches!(kind, BarKind::Mem64 { .. }) { 2 } else { 1 };
    }
    let mut rom = handle.region(u32::from(ROM_BAR));
    if rom.size > 0 && rom.readable {
        rom.size = rom.size.next_power_of_two().max(2048);
        found.push((ROM_BAR, BarKind::Rom, rom));
    }
    found
}

/// Where the MSI-X table lies in BAR `index`, as `(offset, size)`.
fn table_in(msix: Option<&(u16, MsixCapability)>, index: BarIndex) -> Vec<(u64, u64)> {
    msix.map(|(_, capability)| capability.layout())
        .filter(|layout| layout.table_bar == index)
        .map(|layout| (layout.table().start, layout.table().end - layout.table().start))
        .into_iter()
        .collect()
}
