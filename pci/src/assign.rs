//! What firmware does before the guest starts: gives every BAR an address and every root port its bus number and windows (PCI Firmware 3.3,
//! section 3; PCI-to-PCI Bridge 1.2, section 3.2.5).

use std::collections::BTreeMap;

use crate::bar::{BarKind, BarRegisters};
use crate::bdf::{Bdf, DevFn};
use crate::bus::RootBus;
use crate::function::{BarIndex, PciFunction, ROM_BAR};
use crate::regs;

/// The granularity of a bridge's memory windows.
const MEMORY_STEP: u64 = 1 << 20;
/// The granularity of a bridge's I/O window.
const IO_STEP: u64 = 1 << 12;

/// A range of addresses for BARs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Aperture {
    /// First address.
    pub start: u64,
    /// Bytes; zero: there is none.
    pub size: u64,
}

impl Aperture {
    /// Last address. Meaningless for an empty one.
    pub const fn last(&self) -> u64 {
        self.start.saturating_add(self.size.saturating_sub(1))
    }
}

/// The ranges that the machine gives to a PCI segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Apertures {
    /// The segment.
    pub segment: u16,
    /// Memory below 4 GiB.
    pub mmio32: Aperture,
    /// Memory above 4 GiB.
    pub mmio64: Aperture,
    /// I/O ports.
    pub io: Aperture,
}

/// What one function needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FunctionNeeds {
    /// Its place on its bus.
    pub devfn: DevFn,
    /// Number, kind and size of each BAR.
    pub bars: Vec<(BarIndex, BarKind, u64)>,
}

impl FunctionNeeds {
    /// What a function with these registers needs.
    pub fn of(devfn: DevFn, bars: &BarRegisters) -> Self {
        Self { devfn, bars: bars.iter().map(|bar| (bar.index, bar.kind, bar.size)).collect() }
    }
}

/// A root port and what stands below it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortNeeds {
    /// The port's place on bus 0.
    pub devfn: DevFn,
    /// The functions below.
    pub functions: Vec<FunctionNeeds>,
}

/// A BAR's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AssignedBar {
    /// The function, with the bus number given to it.
    pub function: Bdf,
    /// Which BAR.
    pub bar: BarIndex,
    /// What it decodes.
    pub kind: BarKind,
    /// Bytes.
    pub size: u64,
    /// Its address, a multiple of `size`.
    pub address: u64,
}

/// A root port's numbers and windows; a window that is `None` is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AssignedPort {
    /// The port's place on bus 0.
    pub devfn: DevFn,
    /// Secondary bus number, which is the subordinate one too.
    pub bus: u8,
    /// I/O window.
    pub io: Option<Aperture>,
    /// Memory window: 32-bit and non-prefetchable BARs.
    pub memory: Option<Aperture>,
    /// Prefetchable window: prefetchable 64-bit BARs.
    pub prefetchable: Option<Aperture>,
}

/// The whole plan. I/O BARs for which no ports were left are not in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Assignment {
    /// Every root port.
    pub ports: Vec<AssignedPort>,
    /// Every BAR that got an address.
    pub bars: Vec<AssignedBar>,
}

/// BARs that the machine has no room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AssignError {
    /// An aperture is full.
    #[error(
        "BAR {bar} of {function} ({size:#x} bytes) does not fit in the {aperture} for PCI devices ({available:#x} bytes in all); assign fewer devices{hint}"
    )]
    Full {
        /// The function, as the guest would number it.
        function: Bdf,
        /// The largest of its BARs that do not fit.
        bar: BarIndex,
        /// That BAR's size.
        size: u64,
        /// Which aperture.
        aperture: &'static str,
        /// That aperture's size.
        available: u64,
        /// What else helps.
        hint: &'static str,
    },
    /// More ports than bus numbers.
    #[error("{0} root ports are more than the 255 buses there are numbers for; assign fewer devices")]
    Buses(usize),
}

/// The space a BAR comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Space {
    Io,
    Memory,
    Prefetchable,
}

impl Space {
    /// Below a port, a 64-bit BAR that is not prefetchable must lie below 4 GiB, for want of another window.
    const fn below_port(kind: BarKind) -> Self {
        match kind {
            BarKind::Io => Self::Io,
            BarKind::Mem64 { prefetchable: true } => Self::Prefetchable,
            BarKind::Mem32 { .. } | BarKind::Mem64 { .. } | BarKind::Rom => Self::Memory,
        }
    }

    const fn on_bus_0(kind: BarKind) -> Self {
        match kind {
            BarKind::Io => Self::Io,
            BarKind::Mem64 { .. } => Self::Prefetchable,
            BarKind::Mem32 { .. } | BarKind::Rom => Self::Memory,
        }
    }

    const fn step(self) -> u64 {
        match self {
            Self::Io => IO_STEP,
            Self::Memory | Self::Prefetchable => MEMORY_STEP,
        }
    }
}

/// BARs that stay together: those of one port in one space, or a single one on bus 0.
struct Block {
    port: Option<DevFn>,
    /// Largest first, so that every offset is a multiple of its BAR's size.
    bars: Vec<AssignedBar>,
    size: u64,
    align: u64,
}

impl Block {
    /// `step`: what the bridge's window must be a multiple of, 1 on bus 0. `None` if there is nothing to place, or the sizes overflow.
    fn new(port: Option<DevFn>, mut bars: Vec<AssignedBar>, step: u64) -> Option<Self> {
        bars.sort_by_key(|bar| std::cmp::Reverse(bar.size));
        let largest = bars.first()?.size;
        let sum = bars.iter().try_fold(0u64, |sum, bar| sum.checked_add(bar.size));
        let size = sum.and_then(|sum| sum.checked_next_multiple_of(step)).unwrap_or(u64::MAX);
        Some(Self { port, bars, size, align: largest.max(step) })
    }
}

/// Plans for the functions on bus 0 itself and for the ports with theirs. Ports are numbered from bus 1 in the order given.
pub fn assign(
    on_bus_0: &[FunctionNeeds],
    ports: &[PortNeeds],
    apertures: &Apertures,
) -> Result<Assignment, AssignError> {
    let mut blocks: BTreeMap<Space, Vec<Block>> = BTreeMap::new();
    for function in on_bus_0 {
        for bar in bars_of(apertures.segment, 0, function) {
            blocks.entry(Space::on_bus_0(bar.kind)).or_default().extend(Block::new(None, vec![bar], 1));
        }
    }
    let mut plan = Assignment::default();
    for (index, port) in ports.iter().enumerate() {
        let bus = u8::try_from(index + 1).map_err(|_| AssignError::Buses(ports.len()))?;
        plan.ports.push(AssignedPort { devfn: port.devfn, bus, io: None, memory: None, prefetchable: None });
        for space in [Space::Io, Space::Memory, Space::Prefetchable] {
            let bars = port.functions.iter().flat_map(|function| bars_of(apertures.segment, bus, function));
            let bars = bars.filter(|bar| Space::below_port(bar.kind) == space).collect();
            blocks.entry(space).or_default().extend(Block::new(Some(port.devfn), bars, space.step()));
        }
    }
    for (space, blocks) in blocks {
        place(&mut plan, space, blocks, apertures)?;
    }
    plan.bars.sort_by_key(|bar| (bar.function, bar.bar));
    Ok(plan)
}

fn bars_of(segment: u16, bus: u8, function: &FunctionNeeds) -> impl Iterator<Item = AssignedBar> + '_ {
    let bdf = Bdf { segment, bus, devfn: function.devfn };
    let bar = move |&(bar, kind, size)| AssignedBar { function: bdf, bar, kind, size, address: 0 };
    function.bars.iter().map(bar)
}

fn place(
    plan: &mut Assignment,
    space: Space,
    mut blocks: Vec<Block>,
    apertures: &Apertures,
) -> Result<(), AssignError> {
    let (aperture, name, hint) = match space {
        Space::Io => (apertures.io, "I/O ports", ""),
        Space::Memory => (apertures.mmio32, "memory below 4 GiB", ""),
        Space::Prefetchable => {
            (apertures.mmio64, "memory above 4 GiB", ", or use a processor with more physical address bits")
        }
    };
    blocks.sort_by_key(|block| std::cmp::Reverse((block.align, block.size)));
    let mut next = aperture.start;
    for block in blocks {
        let start = next.checked_next_multiple_of(block.align);
        let end = start.and_then(|start| start.checked_add(block.size));
        let fits = end.is_some_and(|end| end - aperture.start <= aperture.size);
        let (Some(start), Some(end), true) = (start, end, fits) else {
            if space == Space::Io {
                // PCI Express functions must work without their I/O BARs (PCI Express Base 6.0, section 1.3.2.2).
                continue;
            }
            let AssignedBar { function, bar, size, .. } = block.bars[0];
            return Err(AssignError::Full {
                function,
                bar,
                size,
                aperture: name,
                available: aperture.size,
                hint,
            });
        };
        next = end;
        let mut address = start;
        for bar in block.bars {
            plan.bars.push(AssignedBar { address, ..bar });
            address += bar.size;
        }
        let window = Aperture { start, size: block.size };
        if let Some(port) = plan.ports.iter_mut().find(|port| Some(port.devfn) == block.port) {
            match space {
                Space::Io => port.io = Some(window),
                Space::Memory => port.memory = Some(window),
                Space::Prefetchable => port.prefetchable = Some(window),
            }
        }
    }
    Ok(())
}

impl Assignment {
    /// Writes the plan into the registers of the functions, through configuration cycles. Decoding stays off: it is for the guest to turn on.
    ///
    /// Functions that are not on the bus are passed over.
    pub fn program(&self, bus: &RootBus) {
        for port in &self.ports {
            if let Some(function) = bus.find(0, port.devfn) {
                port.program(&*function);
            }
        }
        for bar in &self.bars {
            if let Some(function) = bus.find(bar.function.bus, bar.function.devfn) {
                bar.program(&*function);
            }
        }
    }
}

impl AssignedBar {
    fn program(&self, function: &dyn PciFunction) {
        let at = if self.bar == ROM_BAR { regs::ROM_ADDRESS } else { regs::BAR0 + usize::from(self.bar) * 4 };
        let [a, b, c, d, high @ ..] = self.address.to_le_bytes();
        put(function, at, &[a, b, c, d]);
        if matches!(self.kind, BarKind::Mem64 { .. }) {
            put(function, at + 4, &high);
        }
    }
}

impl AssignedPort {
    fn program(&self, port: &dyn PciFunction) {
        put(port, regs::PRIMARY_BUS, &[0]);
        put(port, regs::SECONDARY_BUS, &[self.bus]);
        put(port, regs::SUBORDINATE_BUS, &[self.bus]);
        // A closed window has its base above its limit.
        let (base, last) = self.io.map_or((0xf000, 0), |window| (window.start, window.last()));
        put(port, regs::IO_BASE, &[byte(base, 1)]);
        put(port, regs::IO_LIMIT, &[byte(last, 1)]);
        let (base, last) = self.memory.map_or((0xfff0_0000, 0), |window| (window.start, window.last()));
        put(port, regs::MEMORY_BASE, &[byte(base, 2), byte(base, 3)]);
        put(port, regs::MEMORY_LIMIT, &[byte(last, 2), byte(last, 3)]);
        let (base, last) = self.prefetchable.map_or((0xfff0_0000, 0), |window| (window.start, window.last()));
        put(port, regs::PREFETCHABLE_BASE, &[byte(base, 2), byte(base, 3)]);
        put(port, regs::PREFETCHABLE_LIMIT, &[byte(last, 2), byte(last, 3)]);
        put(port, regs::PREFETCHABLE_BASE_UPPER, &base.to_le_bytes()[4..]);
        put(port, regs::PREFETCHABLE_LIMIT_UPPER, &last.to_le_bytes()[4..]);
    }
}

/// One byte of an address. What of it lies below a register's granularity, the register does not take.
fn byte(address: u64, index: usize) -> u8 {
    address.to_le_bytes()[index]
}

fn put(function: &dyn PciFunction, at: usize, data: &[u8]) {
    if let Ok(at) = u16::try_from(at) {
        function.config_write(at, data);
    }
}

#[cfg(test)]
mod tests;
