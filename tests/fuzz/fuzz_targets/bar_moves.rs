//! BARs and bus numbers programmed at random through ECAM and mechanism #1, below two root ports and on bus 0: every
//! configuration cycle goes where the bus numbers say, every register reads what its size and kind allow, every access to
//! memory or ports reaches the one BAR that is decoded there or nobody, and no two BARs of a window overlap.
//!
//! Follows PCI Local Bus 3.0, section 6.2.5, and PCI-to-PCI Bridge 1.2, section 3.1.1.

#![no_main]

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use pci::assign::{Aperture, Apertures, FunctionNeeds, PortNeeds, assign};
use pci::bar::{Bar, BarKind, BarRegisters};
use pci::bus::{RootBus, RootBusBuilder};
use pci::cap::pcie::LinkSpeed;
use pci::cap::vectors::fake::FakeAllocator;
use pci::config::{ConfigSpace, Identity};
use pci::ecam::{Cam, Ecam};
use pci::function::{BarIndex, ROM_BAR};
use pci::root_port::RootPort;
use pci::window::{BarWindow, Placement};
use pci::{DevFn, PciFunction};
use vm_device::bus::{MmioAddress, PioAddress};
use vm_device::{DeviceMmio, DevicePio};

const MMIO32: Aperture = Aperture { start: 0x8000_0000, size: 0x1000_0000 };
const MMIO64: Aperture = Aperture { start: 1 << 36, size: 1 << 36 };
const IO: Aperture = Aperture { start: 0xc000, size: 0x4000 };
/// The functions: one on bus 0, two below the first port, one below the second.
const PLACES: [(Option<usize>, u8); 4] = [(None, 0x28), (Some(0), 0), (Some(0), 1), (Some(1), 0)];
const PORTS: [u8; 2] = [0x08, 0x10];
const COMMAND: u16 = 4;

#[derive(Arbitrary, Debug)]
struct Input {
    bars: [[(u8, u8); 7]; 4],
    planned: bool,
    #[arbitrary(with = fuzz::steps::<Step, 100>)]
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    /// A configuration write of any kind.
    Write {
        bus: u8,
        devfn: u8,
        register: u16,
        width: u8,
        value: u64,
        by_ports: bool,
    },
    /// To a BAR register that exists if the bus numbers still say so.
    Bar {
        function: u8,
        dword: u8,
        width: u8,
        byte: u8,
        value: u32,
    },
    /// A BAR to a place in a window where it may be.
    Move {
        function: u8,
        bar: u8,
        slot: u16,
    },
    /// The command register.
    Command {
        function: u8,
        value: u8,
    },
    /// A port's bus numbers.
    Numbers {
        port: u8,
        secondary: u8,
        subordinate: u8,
    },
    /// Near a BAR's start or end.
    Near {
        function: u8,
        bar: u8,
        end: bool,
        distance: i8,
        width: u8,
        write: bool,
    },
    /// Anywhere.
    Anywhere {
        window: u8,
        address: u64,
        width: u8,
        write: bool,
    },
    Reset {
        function: u8,
    },
}

/// Where BARs are decoded, and what was placed there according to this target.
#[derive(Debug)]
struct Space {
    windows: [BarWindow; 3],
    placed: Mutex<Vec<Record>>,
    accesses: Mutex<Vec<Access>>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Record {
    window: usize,
    start: u64,
    last: u64,
    function: usize,
    bar: BarIndex,
}

/// What has reached a function.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Access {
    Config { function: usize, register: u16 },
    Bar { function: usize, bar: BarIndex, offset: u64 },
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Space {
    fn window_of(&self, bar: &Bar) -> usize {
        match bar.kind {
            BarKind::Io => 2,
            _ if bar.base >= MMIO64.start => 1,
            _ => 0,
        }
    }

    fn place(&self, function: usize, bar: &Bar, weak: Weak<dyn PciFunction>) -> Option<(Record, Placement)> {
        let window = self.window_of(bar);
        let aperture = [MMIO32, MMIO64, IO][window];
        let last = bar.base.checked_add(bar.size - 1);
        let mut placed = lock(&self.placed);
        let free = last.is_some_and(|last| {
            bar.base >= aperture.start
                && last <= aperture.last()
                && placed.iter().all(|p| p.window != window || p.start > last || p.last < bar.base)
        });
        let result = self.windows[window].place(bar.base, bar.size, weak, bar.index);
        assert_eq!(result.is_ok(), free, "{bar:x?} of function {function}: {result:?}, {placed:x?}");
        let record = Record { window, start: bar.base, last: last?, function, bar: bar.index };
        result.ok().map(|placement| {
            placed.push(record);
            (record, placement)
        })
    }

    fn remove(&self, record: Record) {
        lock(&self.placed).retain(|other| *other != record);
    }
}

/// A function with BARs and nothing behind them. It decodes as an assigned function does, whose own way to do so cannot be had
/// without a device.
#[derive(Debug)]
struct Endpoint {
    number: usize,
    this: Weak<Self>,
    space: Arc<Space>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    config: ConfigSpace,
    registers: BarRegisters,
    placed: Vec<(Bar, Record, Placement)>,
}

impl Endpoint {
    fn new(number: usize, registers: BarRegisters, space: &Arc<Space>) -> Arc<Self> {
        let device = 0x1000 + number as u16;
        let identity =
            Identity { vendor: 0x1af4, device, revision: 1, class: 0x02_0000, subsystem: (0x1af4, 0x1100) };
        let config = ConfigSpace::endpoint(&identity);
        Arc::new_cyclic(|this| Self {
            number,
            this: this.clone(),
            space: Arc::clone(space),
            state: Mutex::new(State { config, registers, placed: Vec::new() }),
        })
    }

    fn apply(&self, state: &mut State) {
        let mut command = [0; 2];
        state.config.read(COMMAND, &mut command);
        let wanted: Vec<Bar> = state.registers.decoded(u16::from_le_bytes(command)).collect();
        state.placed.retain(|(bar, record, _)| {
            let stays = wanted.contains(bar);
            if !stays {
                self.space.remove(*record);
            }
            stays
        });
        for bar in wanted {
            if !state.placed.iter().any(|(placed, ..)| *placed == bar) {
                let weak: Weak<dyn PciFunction> = Weak::<Self>::clone(&self.this);
                if let Some((record, placement)) = self.space.place(self.number, &bar, weak) {
                    state.placed.push((bar, record, placement));
                }
            }
        }
    }

    fn reset(&self) {
        let mut state = lock(&self.state);
        state.registers.reset();
        state.config.write(COMMAND, &[0, 0]);
        self.apply(&mut state);
    }
}

impl PciFunction for Endpoint {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        lock(&self.space.accesses).push(Access::Config { function: self.number, register: offset });
        let state = lock(&self.state);
        state.config.read(offset, data);
        state.registers.read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        lock(&self.space.accesses).push(Access::Config { function: self.number, register: offset });
        let mut state = lock(&self.state);
        if BarRegisters::covers(offset) {
            let before = state.registers.clone();
            let changed = state.registers.write(offset, data);
            let read = |registers: &BarRegisters| {
                let mut bytes = [0; 0x24];
                registers.read(0x10, &mut bytes);
                bytes
            };
            assert_eq!(changed, read(&before) != read(&state.registers), "{offset:#x} {data:x?}");
        } else {
            state.config.write(offset, data);
        }
        self.apply(&mut state);
    }

    fn bar_read(&self, bar: BarIndex, offset: u64, data: &mut [u8]) {
        data.fill(0xa5);
        lock(&self.space.accesses).push(Access::Bar { function: self.number, bar, offset });
    }

    fn bar_write(&self, bar: BarIndex, offset: u64, _data: &[u8]) {
        lock(&self.space.accesses).push(Access::Bar { function: self.number, bar, offset });
    }
}

/// One function's BAR registers as section 6.2.5.1 has them: `(flags, mask)` of each, and what was written.
#[derive(Clone, Debug, Default)]
struct RegisterModel {
    kinds: [(u32, u32); 7],
    value: [u32; 7],
}

impl RegisterModel {
    fn write(&mut self, register: u16, data: &[u8]) {
        for (at, byte) in (register..).zip(data) {
            let number = match at {
                0x10..0x28 => (at - 0x10) / 4,
                0x30..0x34 => 6,
                _ => continue,
            };
            let shift = u32::from(at % 4) * 8;
            let value = &mut self.value[usize::from(number)];
            *value = *value & !(0xff << shift) | u32::from(*byte) << shift;
        }
    }

    fn read(&self, number: usize) -> u32 {
        let (flags, mask) = self.kinds[number];
        self.value[number] & mask | flags
    }
}

struct Machine {
    bus: Arc<RootBus>,
    ecam: Ecam,
    cam: Cam,
    ports: Vec<Arc<RootPort>>,
    endpoints: Vec<Arc<Endpoint>>,
    models: Vec<RegisterModel>,
    space: Arc<Space>,
}

fn bar_kind(kind: u8, index: u8, size: u8) -> Option<(BarKind, u64)> {
    let kind = match kind % 8 {
        _ if index == ROM_BAR && kind.is_multiple_of(2) => BarKind::Rom,
        0 => BarKind::Io,
        1 | 2 => BarKind::Mem32 { prefetchable: kind & 8 != 0 },
        3 | 4 => BarKind::Mem64 { prefetchable: kind & 8 != 0 },
        _ => return None,
    };
    Some((kind, 1 << (size % 64)))
}

impl Machine {
    fn new(bars: &[[(u8, u8); 7]; 4]) -> Self {
        let window = |aperture: Aperture| match BarWindow::new(aperture.start, aperture.size) {
            Some(window) => window,
            None => panic!("{aperture:?} is possible"),
        };
        let space = Arc::new(Space {
            windows: [MMIO32, MMIO64, IO].map(window),
            placed: Mutex::default(),
            accesses: Mutex::default(),
        });
        let mut endpoints = Vec::new();
        let mut models = Vec::new();
        for (number, bars) in bars.iter().enumerate() {
            let (mut registers, mut model) = (BarRegisters::new(), RegisterModel::default());
            for (index, (kind, size)) in (0..).zip(bars) {
                let Some((kind, size)) = bar_kind(*kind, index, *size) else { continue };
                if registers.add(index, kind, size).is_err() {
                    continue;
                }
                let slot = usize::from(index);
                let mask = !(size - 1);
                model.kinds[slot] = match kind {
                    BarKind::Io => (1, mask as u32),
                    BarKind::Rom => (0, mask as u32 | 1),
                    BarKind::Mem32 { prefetchable } => (u32::from(prefetchable) << 3, mask as u32),
                    BarKind::Mem64 { prefetchable } => (u32::from(prefetchable) << 3 | 4, mask as u32),
                };
                if matches!(kind, BarKind::Mem64 { .. }) {
                    model.kinds[slot + 1] = (0, (mask >> 32) as u32);
                }
            }
            endpoints.push(Endpoint::new(number, registers, &space));
            models.push(model);
        }
        let mut builder = RootBusBuilder::new();
        let mut ports = Vec::new();
        for (number, devfn) in PORTS.into_iter().enumerate() {
            let devfn = DevFn::from_bits(devfn);
            let Ok(port) = RootPort::new(devfn, number as u8, LinkSpeed::Gen2, FakeAllocator::new()) else {
                panic!("port {devfn} is possible")
            };
            let below = PLACES.iter().zip(&endpoints).filter(|((on, _), _)| *on == Some(number));
            let below =
                below.map(|((_, at), e)| (DevFn::from_bits(*at), Arc::clone(e) as Arc<dyn PciFunction>));
            assert_eq!(port.set_children(below.collect()), Ok(()));
            let port = Arc::new(port);
            assert!(builder.add_bridge(devfn, Arc::clone(&port) as _).is_ok());
            ports.push(port);
        }
        assert!(builder.add_function(DevFn::from_bits(PLACES[0].1), Arc::clone(&endpoints[0]) as _).is_ok());
        let bus = Arc::new(builder.build());
        let (ecam, cam) = (Ecam::new(Arc::clone(&bus)), Cam::new(Arc::clone(&bus)));
        Self { bus, ecam, cam, ports, endpoints, models, space }
    }

    /// What firmware does: a plan for all BARs, and its soundness.
    fn plan(&mut self) {
        let needs = |number: usize| {
            let registers = &lock(&self.endpoints[number].state).registers;
            FunctionNeeds::of(DevFn::from_bits(PLACES[number].1), registers)
        };
        let ports = PORTS.into_iter().enumerate().map(|(port, devfn)| {
            let below = (0..PLACES.len()).filter(|number| PLACES[*number].0 == Some(port));
            PortNeeds { devfn: DevFn::from_bits(devfn), functions: below.map(needs).collect() }
        });
        let apertures = Apertures { segment: 0, mmio32: MMIO32, mmio64: MMIO64, io: IO };
        let Ok(plan) = assign(&[needs(0)], &ports.collect::<Vec<_>>(), &apertures) else { return };
        let inside = |outer: Aperture, start: u64, size: u64| {
            start >= outer.start && start + (size - 1) <= outer.last()
        };
        for (number, bar) in plan.bars.iter().enumerate() {
            assert!(bar.address.is_multiple_of(bar.size), "{bar:x?}");
            let space = match bar.kind {
                BarKind::Io => IO,
                _ if bar.address >= MMIO64.start => MMIO64,
                _ => MMIO32,
            };
            assert!(inside(space, bar.address, bar.size), "{bar:x?}");
            if let Some(port) = plan.ports.iter().find(|port| port.bus == bar.function.bus) {
                let windows = [port.io, port.memory, port.prefetchable];
                let holds = windows.iter().flatten().filter(|w| inside(**w, bar.address, bar.size)).count();
                assert_eq!(holds, 1, "{bar:x?} below {port:x?}");
            }
            for other in &plan.bars[..number] {
                let apart = bar.address > other.address + (other.size - 1)
                    || other.address > bar.address + (bar.size - 1);
                let ports = (bar.kind == BarKind::Io) != (other.kind == BarKind::Io);
                assert!(apart || ports, "{bar:x?} over {other:x?}");
            }
        }
        plan.program(&self.bus);
        for bar in &plan.bars {
            let number = PLACES.iter().position(|(port, devfn)| {
                port.map_or(0, |port| port as u8 + 1) == bar.function.bus
                    && *devfn == bar.function.devfn.bits()
            });
            let Some(number) = number else { panic!("{bar:x?} is nobody's") };
            let slot = usize::from(bar.bar);
            self.models[number].value[slot] = bar.address as u32;
            if matches!(bar.kind, BarKind::Mem64 { .. }) {
                self.models[number].value[slot + 1] = (bar.address >> 32) as u32;
            }
        }
    }

    fn bus_numbers(&self, port: usize) -> (u8, u8) {
        let mut numbers = [0; 2];
        self.ports[port].config_read(0x19, &mut numbers);
        (numbers[0], numbers[1])
    }

    /// Which endpoint a configuration cycle is for, by the rules of bridges.
    fn target(&self, bus: u8, devfn: u8) -> Option<usize> {
        let port = if bus == 0 {
            None
        } else {
            let takes = |port: &usize| {
                let (secondary, subordinate) = self.bus_numbers(*port);
                secondary != 0 && secondary <= bus && bus <= subordinate
            };
            let port = (0..PORTS.len()).find(takes)?;
            if self.bus_numbers(port).0 != bus {
                return None;
            }
            Some(port)
        };
        PLACES.iter().position(|place| *place == (port, devfn))
    }

    /// Where an endpoint answers now, if anywhere.
    fn place_of(&self, number: usize) -> Option<(u8, u8)> {
        let (port, devfn) = PLACES[number];
        let bus = port.map_or(0, |port| self.bus_numbers(port).0);
        (self.target(bus, devfn) == Some(number)).then_some((bus, devfn))
    }

    /// A configuration cycle, and that it reaches whom it is for and nobody else.
    fn config_write(&mut self, (bus, devfn): (u8, u8), register: u16, data: &[u8], by_ports: bool) {
        let natural = matches!(data.len(), 1 | 2 | 4 | 8) && usize::from(register).is_multiple_of(data.len());
        let served =
            natural && register < if by_ports { 0x100 } else { 0x1000 } && !(by_ports && data.len() == 8);
        let target = self.target(bus, devfn).filter(|_| served);
        let is_port = bus == 0 && PORTS.contains(&devfn);
        lock(&self.space.accesses).clear();
        let mut read = vec![0x5a; data.len()];
        if by_ports {
            let address = 1 << 31 | u32::from(bus) << 16 | u32::from(devfn) << 8 | u32::from(register & 0xfc);
            self.cam.pio_write(PioAddress(0), 0, &address.to_le_bytes());
            if register < 0x100 {
                self.cam.pio_write(PioAddress(0), 4 + (register & 3), data);
                self.cam.pio_read(PioAddress(0), 4 + (register & 3), &mut read);
            } else {
                read.fill(0xff);
            }
        } else {
            let offset = u64::from(bus) << 20 | u64::from(devfn) << 12 | u64::from(register & 0xfff);
            let beyond = if register < 0x1000 { 0 } else { pci::ecam::ECAM_LEN };
            self.ecam.mmio_write(MmioAddress(0), offset + beyond, data);
            self.ecam.mmio_read(MmioAddress(0), offset + beyond, &mut read);
        }
        let reached = std::mem::take(&mut *lock(&self.space.accesses));
        for access in &reached {
            let Access::Config { function, register: at } = access else { panic!("{access:?}") };
            assert_eq!(Some(*function), target, "{bus:02x}:{devfn:02x} reaches another function");
            assert!((register..register + data.len() as u16).contains(at), "{at:#x} for {register:#x}");
        }
        match target {
            Some(number) => {
                assert_eq!(reached.len(), 2 * data.len().div_ceil(4));
                self.models[number].write(register, data);
            }
            None if !(is_port && served) => assert!(read.iter().all(|byte| *byte == 0xff), "nobody is there"),
            None => {}
        }
    }

    /// Every BAR register reads as its model does.
    fn check_registers(&self) {
        for (number, (endpoint, model)) in self.endpoints.iter().zip(&self.models).enumerate() {
            for (slot, at) in [0x10, 0x14, 0x18, 0x1c, 0x20, 0x24, 0x30].into_iter().enumerate() {
                let mut data = [0; 4];
                endpoint.config_read(at, &mut data);
                assert_eq!(u32::from_le_bytes(data), model.read(slot), "function {number}, register {at:#x}");
            }
            let mut data = [0; 4];
            endpoint.config_read(0, &mut data);
            assert_eq!(data[..3], [0xf4, 0x1a, number as u8], "the identity is read-only");
        }
    }

    /// Everything that is decoded lies where the registers say, and command and ROM enable allow it.
    fn check_decoded(&self) {
        for record in lock(&self.space.placed).iter() {
            let model = &self.models[record.function];
            let slot = usize::from(record.bar);
            let low = model.read(slot);
            let mut command = [0; 1];
            self.endpoints[record.function].config_read(COMMAND, &mut command);
            let (is_io, is_rom) = (low & 1 != 0 && record.bar < ROM_BAR, record.bar == ROM_BAR);
            let base = match (is_io, is_rom, low & 4 != 0) {
                (true, ..) => u64::from(low & !3),
                (_, true, _) => u64::from(low & !0x7ff),
                (_, _, true) => u64::from(low & !15) | u64::from(model.read(slot + 1)) << 32,
                _ => u64::from(low & !15),
            };
            assert_eq!(record.start, base, "{record:x?}");
            assert!(command[0] & if is_io { 1 } else { 2 } != 0, "{record:x?} without decode");
            assert!(!is_rom || low & 1 != 0, "the ROM is not enabled");
        }
    }

    /// An access to memory or ports.
    fn access(&self, window: usize, address: u64, len: usize, write: bool) {
        lock(&self.space.accesses).clear();
        let last = (len as u64).checked_sub(1).and_then(|more| address.checked_add(more));
        let placed = lock(&self.space.placed).clone();
        let hit = placed.iter().find(|record| {
            record.window == window && record.start <= address && last.is_some_and(|last| last <= record.last)
        });
        let aperture = [MMIO32, MMIO64, IO][window];
        let mut data = vec![0x11; len];
        let window = &self.space.windows[window];
        let offset = address.wrapping_sub(aperture.start);
        if write {
            window.mmio_write(MmioAddress(aperture.start), offset, &data);
        } else {
            window.mmio_read(MmioAddress(aperture.start), offset, &mut data);
        }
        let reached = std::mem::take(&mut *lock(&self.space.accesses));
        match hit {
            Some(record) => {
                let offset = address - record.start;
                assert_eq!(reached, [Access::Bar { function: record.function, bar: record.bar, offset }]);
            }
            None => {
                assert_eq!(reached, [], "nobody is at {address:#x}");
                assert!(write || data.iter().all(|byte| *byte == 0xff));
            }
        }
    }

    fn step(&mut self, step: &Step) {
        let function = |number: u8| usize::from(number) % PLACES.len();
        match *step {
            Step::Write { bus, devfn, register, width, value, by_ports } => {
                let data = &value.to_le_bytes()[..usize::from(width % 9)];
                self.config_write((bus, devfn), register % 0x1100, data, by_ports);
            }
            Step::Bar { function: number, dword, width, byte, value } => {
                let Some(place) = self.place_of(function(number)) else { return };
                let len = 1 << (width % 3);
                let register = [0x10, 0x14, 0x18, 0x1c, 0x20, 0x24, 0x30][usize::from(dword % 7)];
                let register = register + u16::from(byte % 4) / len * len;
                self.config_write(place, register, &value.to_le_bytes()[..len.into()], byte & 4 != 0);
            }
            Step::Move { function: number, bar, slot } => {
                let number = function(number);
                let Some(place) = self.place_of(number) else { return };
                let found = lock(&self.endpoints[number].state).registers.get(bar % 7);
                let Some(Bar { kind, size, index, .. }) = found else { return };
                let aperture = match kind {
                    BarKind::Io => IO,
                    BarKind::Mem64 { .. } if slot & 1 != 0 => MMIO64,
                    _ => MMIO32,
                };
                // One place before the window and one behind it too.
                let places = (aperture.size / size).max(1) + 2;
                let base = (aperture.start / size * size).wrapping_sub(size);
                let address = base.wrapping_add((u64::from(slot / 2) % places).wrapping_mul(size));
                let rom = index == ROM_BAR;
                let register = if rom { 0x30 } else { 0x10 + 4 * u16::from(index) };
                let low = (address as u32 | u32::from(rom)).to_le_bytes();
                self.config_write(place, register, &low, slot & 2 != 0);
                if matches!(kind, BarKind::Mem64 { .. }) {
                    self.config_write(place, register + 4, &((address >> 32) as u32).to_le_bytes(), false);
                }
            }
            Step::Command { function: number, value } => {
                let Some(place) = self.place_of(function(number)) else { return };
                self.config_write(place, COMMAND, &[value], false);
            }
            Step::Numbers { port, secondary, subordinate } => {
                let devfn = PORTS[usize::from(port) % PORTS.len()];
                self.config_write((0, devfn), 0x19, &[secondary % 8], false);
                self.config_write((0, devfn), 0x1a, &[subordinate % 8], false);
            }
            Step::Near { function: number, bar, end, distance, width, write } => {
                let bar = lock(&self.endpoints[function(number)].state).registers.get(bar % 7);
                let Some(bar) = bar else { return };
                let edge = if end { bar.base.wrapping_add(bar.size) } else { bar.base };
                let address = edge.wrapping_add_signed(i64::from(distance));
                self.access(self.space.window_of(&bar), address, usize::from(width % 9), write);
            }
            Step::Anywhere { window, address, width, write } => {
                self.access(usize::from(window % 3), address, usize::from(width % 9), write);
            }
            Step::Reset { function: number } => {
                let number = function(number);
                self.endpoints[number].reset();
                self.models[number].value = [0; 7];
            }
        }
    }
}

fuzz_target!(|input: Input| {
    let mut machine = Machine::new(&input.bars);
    if input.planned {
        machine.plan();
    }
    for step in &input.steps {
        machine.step(step);
        machine.check_registers();
        machine.check_decoded();
    }
});
