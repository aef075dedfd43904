//! Tests of the assignment.

use std::sync::{Arc, Mutex};

use super::*;
use crate::bus::RootBusBuilder;
use crate::cap::pcie::LinkSpeed;
use crate::cap::vectors::fake::FakeAllocator;
use crate::root_port::RootPort;
use crate::testing::Recorder;

const MEM32: BarKind = BarKind::Mem32 { prefetchable: false };
const MEM64: BarKind = BarKind::Mem64 { prefetchable: false };
const PREF64: BarKind = BarKind::Mem64 { prefetchable: true };

const APERTURES: Apertures = Apertures {
    segment: 0,
    mmio32: Aperture { start: 0xc010_0000, size: 0x1ff0_0000 },
    mmio64: Aperture { start: 0x40_0000_0000, size: 0x40_0000_0000 },
    io: Aperture { start: 0xc000, size: 0x4000 },
};

fn at(device: u8, function: u8) -> DevFn {
    DevFn::new(device, function).unwrap()
}

fn one(device: u8, bars: &[(BarIndex, BarKind, u64)]) -> PortNeeds {
    PortNeeds {
        devfn: at(device, 0),
        functions: vec![FunctionNeeds { devfn: at(0, 0), bars: bars.to_vec() }],
    }
}

/// A large GPU with its audio function, a NIC with everything, and an empty port.
fn sample() -> Vec<PortNeeds> {
    let mut gpu =
        one(1, &[(0, MEM32, 16 << 20), (1, PREF64, 32 << 30), (3, PREF64, 32 << 20), (5, BarKind::Io, 128)]);
    gpu.functions.push(FunctionNeeds { devfn: at(0, 1), bars: vec![(0, MEM32, 16 << 10)] });
    let nic = one(
        2,
        &[(0, MEM32, 128 << 10), (1, MEM64, 1 << 20), (3, BarKind::Io, 32), (6, BarKind::Rom, 256 << 10)],
    );
    vec![gpu, nic, PortNeeds { devfn: at(3, 0), functions: vec![] }]
}

/// What every assignment must keep, whatever the needs.
fn check(plan: &Assignment) {
    for bar in &plan.bars {
        assert_eq!(bar.address % bar.size, 0, "{bar:?} is not aligned");
        let aperture = match bar.kind {
            BarKind::Io => APERTURES.io,
            PREF64 => APERTURES.mmio64,
            _ => APERTURES.mmio32,
        };
        assert!(bar.address >= aperture.start && bar.address + (bar.size - 1) <= aperture.last(), "{bar:?}");
        let port = plan.ports.iter().find(|port| port.bus == bar.function.bus).unwrap();
        let window = match bar.kind {
            BarKind::Io => port.io,
            PREF64 => port.prefetchable,
            _ => port.memory,
        };
        let window = window.unwrap();
        assert!(bar.address >= window.start && bar.address + (bar.size - 1) <= window.last(), "{bar:?}");
    }
    let disjoint = |mut ranges: Vec<(u64, u64)>| {
        ranges.sort_unstable();
        assert!(ranges.windows(2).all(|pair| pair[0].1 < pair[1].0), "{ranges:x?}");
    };
    let memory = |bar: &&AssignedBar| bar.kind.is_memory();
    disjoint(
        plan.bars.iter().filter(memory).map(|bar| (bar.address, bar.address + (bar.size - 1))).collect(),
    );
    let span = |window: Aperture| (window.start, window.last());
    let windows = plan.ports.iter().flat_map(|port| [port.memory, port.prefetchable]);
    disjoint(windows.flatten().map(span).collect());
    disjoint(plan.ports.iter().filter_map(|port| port.io).map(span).collect());
    for port in &plan.ports {
        for (window, step) in [(port.io, 0x1000), (port.memory, 1 << 20), (port.prefetchable, 1 << 20)] {
            assert!(
                window.is_none_or(|window| window.start % step == 0
                    && window.size % step == 0
                    && window.size > 0)
            );
        }
    }
}

#[test]
fn every_bar_gets_an_aligned_address_inside_its_ports_window() {
    let plan = assign(&[], &sample(), &APERTURES).unwrap();
    check(&plan);
    assert_eq!(plan.bars.len(), 9);
    let gpu = plan.ports[0];
    assert_eq!(gpu.prefetchable, Some(Aperture { start: 0x40_0000_0000, size: (32 << 30) + (32 << 20) }));
    assert_eq!(gpu.memory, Some(Aperture { start: 0xc100_0000, size: 17 << 20 }));
    let empty = AssignedPort { devfn: at(3, 0), bus: 3, io: None, memory: None, prefetchable: None };
    assert_eq!(plan.ports[2], empty);
}

#[test]
fn functions_on_bus_0_need_no_window() {
    let function = FunctionNeeds {
        devfn: at(4, 0),
        bars: vec![(0, MEM64, 16 << 10), (2, MEM32, 4 << 10), (4, BarKind::Io, 64)],
    };
    let plan = assign(&[function], &sample(), &APERTURES).unwrap();
    let mut of: Vec<_> = plan.bars.iter().filter(|bar| bar.function.bus == 0).collect();
    of.sort_by_key(|bar| bar.bar);
    assert!(APERTURES.mmio64.start <= of[0].address && of[0].address <= APERTURES.mmio64.last());
    assert!(APERTURES.mmio32.start <= of[1].address && of[1].address <= APERTURES.mmio32.last());
    assert!(of.iter().all(|bar| bar.address % bar.size == 0));
    let below =
        Assignment { bars: plan.bars.iter().filter(|bar| bar.function.bus != 0).copied().collect(), ..plan };
    check(&below);
}

#[test]
fn io_bars_that_do_not_fit_stay_without_an_address() {
    let ports: Vec<_> =
        (1..=6).map(|device| one(device, &[(0, BarKind::Io, 32), (1, MEM32, 4096)])).collect();
    let plan = assign(&[], &ports, &APERTURES).unwrap();
    check(&plan);
    assert_eq!(plan.ports.iter().filter(|port| port.io.is_some()).count(), 4);
    assert_eq!(plan.bars.iter().filter(|bar| bar.kind == BarKind::Io).count(), 4);
    let none = Apertures { io: Aperture { start: 0, size: 0 }, ..APERTURES };
    assert!(assign(&[], &ports, &none).unwrap().ports.iter().all(|port| port.io.is_none()));
}

#[test]
fn a_memory_bar_that_does_not_fit_is_named_with_its_size() {
    let error =
        assign(&[], &[one(1, &[(1, PREF64, 16 << 20)]), one(2, &[(2, PREF64, 512 << 30)])], &APERTURES);
    let text = error.unwrap_err().to_string();
    assert!(text.contains("BAR 2 of 0000:02:00.0 (0x8000000000 bytes)"), "{text}");
    let error = assign(&[], &[one(1, &[(0, MEM32, 1 << 30)])], &APERTURES).unwrap_err();
    assert!(matches!(error, AssignError::Full { bar: 0, size: 0x4000_0000, .. }), "{error}");
    let huge = [(0, PREF64, 1 << 63), (2, PREF64, 1 << 63)];
    assert!(assign(&[], &[one(1, &huge)], &APERTURES).is_err(), "sizes that overflow");
}

#[test]
fn more_ports_than_bus_numbers_are_refused() {
    let ports = vec![PortNeeds { devfn: at(1, 0), functions: vec![] }; 256];
    assert_eq!(assign(&[], &ports, &APERTURES), Err(AssignError::Buses(256)));
    assert!(assign(&[], &ports[..255], &APERTURES).is_ok());
}

#[test]
fn a_window_is_filled_by_large_blocks_first() {
    let sizes = [1 << 20, 64 << 20, 2 << 20, 128 << 20, 256 << 20];
    let ports: Vec<_> = (1..).zip(sizes).map(|(device, size)| one(device, &[(0, MEM32, size)])).collect();
    let tight = Apertures { mmio32: Aperture { start: 0xd000_0000, size: 451 << 20 }, ..APERTURES };
    let plan = assign(&[], &ports, &tight).unwrap();
    assert_eq!(plan.bars.iter().map(|bar| bar.size).sum::<u64>(), 451 << 20);
}

/// A function with real BARs.
#[derive(Debug, Default)]
struct Endpoint(Mutex<BarRegisters>);

impl PciFunction for Endpoint {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0);
        self.0.lock().unwrap().read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        self.0.lock().unwrap().write(offset, data);
    }

    fn bar_read(&self, _bar: BarIndex, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn bar_write(&self, _bar: BarIndex, _offset: u64, _data: &[u8]) {}
}

#[test]
fn the_plan_arrives_in_the_registers() {
    let endpoint = Arc::new(Endpoint::default());
    for (index, kind, size) in
        [(0, MEM32, 0x2_0000), (2, PREF64, 8 << 30), (4, BarKind::Io, 32), (6, BarKind::Rom, 0x1_0000)]
    {
        endpoint.0.lock().unwrap().add(index, kind, size).unwrap();
    }
    let needs = FunctionNeeds::of(at(0, 0), &endpoint.0.lock().unwrap());
    let port = |device| {
        Arc::new(RootPort::new(at(device, 0), device, LinkSpeed::Gen2, FakeAllocator::new()).unwrap())
    };
    let (full, empty) = (port(1), port(2));
    full.set_children(vec![(at(0, 0), endpoint.clone())]).unwrap();
    let mut builder = RootBusBuilder::new();
    builder.add_function(at(0, 0), Recorder::new()).unwrap();
    builder.add_bridge(at(1, 0), full.clone()).unwrap();
    builder.add_bridge(at(2, 0), empty.clone()).unwrap();
    let bus = builder.build();
    let ports = [
        PortNeeds { devfn: at(1, 0), functions: vec![needs] },
        PortNeeds { devfn: at(2, 0), functions: vec![] },
        PortNeeds { devfn: at(9, 0), functions: vec![] },
    ];
    let plan = assign(&[], &ports, &APERTURES).unwrap();
    plan.program(&bus);
    check(&plan);
    for bar in &plan.bars {
        assert_eq!(endpoint.0.lock().unwrap().get(bar.bar).unwrap().base, bar.address);
    }
    let registers = |port: &RootPort| {
        [0x18, 0x1c, 0x20, 0x24, 0x28, 0x2c].map(|offset| {
            let mut data = [0; 4];
            port.config_read(offset, &mut data);
            u32::from_le_bytes(data)
        })
    };
    assert_eq!(registers(&full), [0x0001_0100, 0xc0c0, 0xc010_c010, 0xfff1_0001, 0x40, 0x41]);
    assert_eq!(registers(&empty), [0x0002_0200, 0x00f0, 0x0000_fff0, 0x0001_fff1, 0, 0]);
}
