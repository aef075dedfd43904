//! Configuration space under random accesses in every power state: the PM capability by itself against a second model that
//! only knows the specification (PCI-PM 1.2, section 3.2), a root port that has it among others, and the shadow of an
//! assigned function whose bytes, capability lists too, are as a hostile device has them.

#![no_main]

use arbitrary::Arbitrary;
use devices::vfio::config::{CONFIG_SIZE, ConfigShadow};
use devices::vfio::doorbell::Doorbells;
use libfuzzer_sys::fuzz_target;
use pci::cap::msi::{MsiCapability, MsiLayout};
use pci::cap::msix::{self, MsixCapability, MsixLayout};
use pci::cap::pcie::LinkSpeed;
use pci::cap::pm::{DState, PmCapability, PmeSupport};
use pci::cap::vectors::fake::FakeAllocator;
use pci::pme::PmeSink;
use pci::root_port::RootPort;
use pci::{Bdf, DevFn, PciFunction};

/// Extended capabilities that no guest may find (docs/compatibility.md): ARI, ATS, SR-IOV, PRI, resizable BARs, PASID.
const HIDDEN: [u16; 7] = [0x000e, 0x000f, 0x0010, 0x0013, 0x0015, 0x001b, 0x0024];

#[derive(Arbitrary, Debug)]
enum Input {
    Pm {
        support: u8,
        no_soft_reset: bool,
        #[arbitrary(with = fuzz::steps::<Step, 200>)]
        steps: Vec<Step>,
    },
    Port {
        #[arbitrary(with = fuzz::steps::<Step, 200>)]
        steps: Vec<Step>,
    },
    Shadow {
        space: Space,
        multi_function: bool,
        #[arbitrary(with = fuzz::steps::<(u16, u64), 200>)]
        accesses: Vec<(u16, u64)>,
    },
}

#[derive(Arbitrary, Debug)]
enum Step {
    /// To the PM capability: `offset` from its start, any number of bytes.
    Write {
        offset: u8,
        data: Vec<u8>,
    },
    /// To PMCSR.
    Pmcsr {
        value: u16,
    },
    /// To all of a port's configuration space.
    Config {
        offset: u16,
        width: u8,
        value: u32,
    },
    Wake {
        devfn: u8,
    },
    Power {
        on: bool,
    },
}

/// The bytes of a function: two lists as they should be, and then what a broken device makes of them.
#[derive(Arbitrary, Debug)]
struct Space {
    virtio: bool,
    counts: (u8, u8),
    capabilities: [(u8, [u8; 10]); 5],
    extended: [u16; 6],
    broken: Vec<(u16, u8)>,
}

impl Space {
    fn bytes(&self) -> Box<[u8; CONFIG_SIZE]> {
        const IDS: [u8; 6] = [0x01, 0x05, 0x09, 0x10, 0x11, 0x12];
        let mut space = Box::new([0; CONFIG_SIZE]);
        space[..2].copy_from_slice(&if self.virtio { [0xf4, 0x1a] } else { [0x86, 0x80] });
        space[0x06] = 0x10;
        let mut link = 0x34;
        for (at, (id, body)) in
            (0x40..0xf4).step_by(16).zip(&self.capabilities[..usize::from(self.counts.0 % 6)])
        {
            space[link] = at as u8;
            space[at] = IDS[usize::from(*id) % IDS.len()];
            space[at + 2..at + 12].copy_from_slice(body);
            link = at + 1;
        }
        let extended = &self.extended[..usize::from(self.counts.1 % 7)];
        for (number, (at, id)) in (0x100..).step_by(64).zip(extended).enumerate() {
            // Half of them are of the kind that is to be hidden.
            let hidden = HIDDEN[usize::from(id >> 8) % HIDDEN.len()];
            let id = if id & 1 == 0 { hidden } else { id >> 1 };
            let last = number + 1 == extended.len();
            let next = if last { 0 } else { at as u32 + 64 };
            let header = u32::from(id) | (1 << 16) | (next << 20);
            space[at..at + 4].copy_from_slice(&header.to_le_bytes());
        }
        for &(at, byte) in &self.broken {
            space[usize::from(at) % CONFIG_SIZE] = byte;
        }
        space
    }
}

/// PMC and PMCSR as section 3.2 has them.
struct Model {
    pmc: u16,
    no_soft_reset: bool,
    d3hot: bool,
    powered: bool,
    enable: bool,
    status: bool,
}

impl Model {
    fn new(pmc: u16, no_soft_reset: bool) -> Self {
        Self { pmc, no_soft_reset, d3hot: false, powered: true, enable: false, status: false }
    }

    /// What stands behind the capability's header.
    fn bytes(&self) -> [u8; 6] {
        let [low, high] = self.pmc.to_le_bytes();
        let state = if self.d3hot { 3 } else { 0 } | u8::from(self.no_soft_reset) << 3;
        [low, high, state, u8::from(self.enable) | u8::from(self.status) << 7, 0, 0]
    }

    fn has_pme(&self) -> bool {
        self.pmc & 0xf800 != 0
    }

    fn write(&mut self, offset: usize, data: &[u8]) {
        for (at, byte) in (offset..).zip(data) {
            match (at, byte & 3) {
                (4, 0) if self.powered => self.d3hot = false,
                (4, 3) if self.powered => self.d3hot = true,
                (5, _) if self.has_pme() => {
                    self.enable = byte & 1 != 0;
                    self.status &= byte & 0x80 == 0;
                }
                _ => {}
            }
        }
    }

    fn wake(&mut self) -> bool {
        let bit = match (self.powered, self.d3hot) {
            (false, _) => 15,
            (true, true) => 14,
            (true, false) => 11,
        };
        let supported = self.pmc >> bit & 1 != 0;
        self.status |= supported;
        supported && self.enable
    }

    fn power(&mut self, on: bool) {
        if on {
            self.d3hot = false;
            if !self.powered && self.pmc >> 15 == 0 {
                (self.enable, self.status) = (false, false);
            }
        }
        self.powered = on;
    }
}

fn pm(support: u8, no_soft_reset: bool, steps: &[Step]) {
    let support = PmeSupport::from_bits_truncate(u16::from(support) << 8);
    let mut real = PmCapability::new(support, no_soft_reset);
    let mut model = Model::new(support.bits() | 3, no_soft_reset);
    for step in steps {
        let (was_d3hot, was_enabled, had_status) = (model.d3hot, model.enable, model.status);
        let change = match step {
            Step::Write { offset, data } => {
                model.write((*offset).into(), data);
                real.write((*offset).into(), data)
            }
            Step::Pmcsr { value } => {
                model.write(4, &value.to_le_bytes());
                real.write(4, &value.to_le_bytes())
            }
            Step::Config { offset, width, value } => {
                let (offset, data) = (offset % 16, &value.to_le_bytes()[..usize::from(width % 5)]);
                model.write(offset.into(), data);
                real.write(offset, data)
            }
            Step::Wake { .. } => {
                assert_eq!(real.latch_pme(), model.wake());
                continue;
            }
            Step::Power { on } => {
                model.power(*on);
                if *on {
                    real.power_on()
                } else {
                    real.power_off()
                }
                continue;
            }
        };
        let state = |d3hot| if d3hot { DState::D3Hot } else { DState::D0 };
        let moved = (was_d3hot != model.d3hot).then_some((state(was_d3hot), state(model.d3hot)));
        assert_eq!(change.state, moved, "{step:?}");
        assert_eq!(change.pme_enabled, (was_enabled != model.enable).then_some(model.enable), "{step:?}");
        assert_eq!(change.pme_acknowledged, had_status && !model.status, "{step:?}");
        assert_eq!((real.is_powered(), real.state()), (model.powered, state(model.d3hot)));
        let mut read = [0x55; 12];
        real.read(0, &mut read);
        assert_eq!(read[..2], [0x55; 2], "the header is the list's");
        assert_eq!(read[2..8], model.bytes(), "{step:?}");
        assert_eq!(read[8..], [0x55; 4], "what follows is another's");
    }
}

fn dword(function: &dyn PciFunction, offset: u16) -> u32 {
    let mut data = [0; 4];
    function.config_read(offset, &mut data);
    u32::from_le_bytes(data)
}

fn snapshot(function: &dyn PciFunction) -> Vec<u32> {
    // The extended part of a port is empty: a look at its first registers is enough.
    (0..0x108).step_by(4).map(|offset| dword(function, offset)).collect()
}

fn port(steps: &[Step]) {
    const PM_ID: u32 = 1;
    const PCIE_ID: u32 = 0x10;
    let port = RootPort::new(DevFn::from_bits(8), 1, LinkSpeed::Gen2, FakeAllocator::new());
    let Ok(port) = port else { panic!("{port:?}") };
    let first = snapshot(&port);
    let find = |id: u32| {
        let mut at = dword(&port, 0x34) as u16 & 0xff;
        while dword(&port, at) & 0xff != id {
            at = (dword(&port, at) >> 8 & 0xff) as u16;
            assert_ne!(at, 0, "a root port has capability {id:#x}");
        }
        at
    };
    let (at, root_control) = (find(PM_ID), find(PCIE_ID) + 0x1c);
    let mut model = Model::new((first[usize::from(at / 4)] >> 16) as u16, true);
    for step in steps {
        let before = snapshot(&port);
        let (start, data) = match step {
            Step::Write { offset, data } => (at + u16::from(offset % 8), data.clone()),
            Step::Pmcsr { value } => (at + 4, value.to_le_bytes().to_vec()),
            Step::Config { offset, width, value } => {
                let len = 1 << (width % 3);
                (offset % 4096 / len * len, value.to_le_bytes()[..len.into()].to_vec())
            }
            Step::Wake { devfn } => {
                // The port is the intake of PMEs, not their source.
                port.pme(DevFn::from_bits(*devfn));
                continue;
            }
            Step::Power { on } => {
                model.power(*on);
                if *on {
                    port.power_on()
                } else {
                    port.power_off()
                }
                assert_eq!(
                    dword(&port, at + 4),
                    u32::from_le_bytes([model.bytes()[2], model.bytes()[3], 0, 0])
                );
                continue;
            }
        };
        // As mechanism #1 and ECAM cut them: within one dword.
        let len = data.len().min(usize::from(4 - start % 4));
        if len == 0 || len == 3 {
            continue;
        }
        let data = &data[..len];
        if (at..at + 8).contains(&start) {
            model.write((start - at).into(), data);
        }
        port.config_write(start, data);
        let after = snapshot(&port);
        for (number, (was, is)) in before.iter().zip(&after).enumerate() {
            // Root Status shows the next message once the interrupt is on again.
            let next_pme = start & !3 == root_control && number == usize::from(root_control / 4) + 1;
            let own = number == usize::from(start / 4);
            assert!(was == is || own || next_pme, "{start:#x} changed {:#x}", number * 4);
        }
        // Identity, class, header type, the list and its headers.
        for (number, mask) in [(0, u32::MAX), (2, u32::MAX), (3, 0x00ff_0000), (13, u32::MAX)] {
            assert_eq!((after[number] ^ first[number]) & mask, 0, "register {:#x}", number * 4);
        }
        assert_eq!(after[1] & 0x0010_0000, 0x0010_0000, "there is a capability list");
        let mut at_capability = after[13] & 0xff;
        while at_capability != 0 {
            let number = (at_capability / 4) as usize;
            assert_eq!((after[number] ^ first[number]) & 0xffff, 0, "the header at {at_capability:#x}");
            at_capability = after[number] >> 8 & 0xff;
        }
        let [pmc @ .., d0, d1] = after[usize::from(at / 4)].to_le_bytes();
        let pmcsr = after[usize::from(at / 4) + 1].to_le_bytes();
        assert_eq!(pmc[0], 1);
        assert_eq!([d0, d1, pmcsr[0], pmcsr[1], pmcsr[2], pmcsr[3]], model.bytes(), "{step:?}");
        let dword_at = start & !3;
        if let Some(whole) = after.get(usize::from(dword_at / 4)) {
            for (offset, byte) in (dword_at..).zip(whole.to_le_bytes()) {
                let mut one = [0];
                port.config_read(offset, &mut one);
                assert_eq!(one[0], byte, "byte {offset:#x} by itself");
            }
        }
    }
}

fn shadow(space: &Space, multi_function: bool, accesses: &[(u16, u64)]) {
    let bytes = space.bytes();
    let bdf = Bdf { segment: 0, bus: 1, devfn: DevFn::from_bits(0) };
    let Ok(mut shadow) = ConfigShadow::new(bdf, bytes.clone(), multi_function) else { return };
    let seen = |shadow: &ConfigShadow, offset: usize, len: usize| {
        let mut data = vec![0xff; len];
        shadow.raw(offset, &mut data);
        shadow.patch(offset, &mut data);
        data
    };
    let guest = seen(&shadow, 0, CONFIG_SIZE);
    assert_eq!(guest[..4], bytes[..4], "the identity is the device's");
    assert_eq!(guest[0x0e] >> 7 == 1, multi_function);
    walk_extended(&guest);
    let found = shadow.capabilities();
    for (at, id, len) in
        [(found.pm, 1, 8), (found.msi, 5, 12), (found.msix, 0x11, 12), (found.pcie, 0x10, 12)]
    {
        let Some(at) = at.map(usize::from) else { continue };
        assert!(at >= 0x40 && at + len <= 256, "capability {id:#x} at {at:#x}");
        assert_eq!(guest[at], id);
    }
    if let Some(at) = found.pcie {
        assert_ne!(guest[usize::from(at) + 2] >> 4, 9, "an integrated endpoint stands behind no root port");
    }
    if let Some(layout) = found.msi.and_then(|at| MsiLayout::parse(shadow.raw_u16(at + 2)).ok()) {
        assert!(MsiCapability::new(layout).is_ok());
    }
    if let Some(at) = found.msix {
        let mut capability = [0; msix::LEN as usize];
        shadow.raw(at.into(), &mut capability);
        if let Ok(layout) = MsixLayout::parse(&capability) {
            assert!(MsixCapability::new(layout).is_ok());
        }
    }
    let mut doorbells = Doorbells::of(&shadow);
    for &(offset, value) in accesses {
        let (offset, data) = (usize::from(offset), value.to_le_bytes());
        let len = 1 << (value % 4);
        let before = seen(&shadow, 0, CONFIG_SIZE);
        shadow.note(offset, &data[..len]);
        let after = seen(&shadow, 0, CONFIG_SIZE);
        for (at, (was, is)) in before.iter().zip(&after).enumerate() {
            assert!(was == is || (offset..offset + len).contains(&at), "{offset:#x} changed {at:#x}");
        }
        for (at, byte) in after.iter().enumerate().skip(offset).take(len) {
            assert_eq!(seen(&shadow, at, 1), [*byte], "byte {at:#x} by itself");
        }
        assert_eq!(after[0x0e] >> 7 == 1, multi_function, "whatever the device says later");
        if let Some(doorbells) = &mut doorbells {
            doorbells.missed((value >> 8) as u8 % 8, value, &data[..len.min(4)]);
        }
    }
    assert!(
        doorbells.is_none_or(|mut doorbells| doorbells.take().len() <= 256),
        "memory that a guest makes grow"
    );
}

/// The list as a guest follows it.
fn walk_extended(guest: &[u8]) {
    let mut next = 0x100;
    for _ in 0..CONFIG_SIZE / 4 {
        let header = u32::from_le_bytes([guest[next], guest[next + 1], guest[next + 2], guest[next + 3]]);
        let id = (header & 0xffff) as u16;
        assert!(!HIDDEN.contains(&id), "the guest finds extended capability {id:#x} at {next:#x}");
        next = (header >> 20) as usize & !3;
        if next == 0 || header == u32::MAX {
            return;
        }
    }
    panic!("a list without an end");
}

fuzz_target!(|input: Input| {
    match &input {
        Input::Pm { support, no_soft_reset, steps } => {
            pm(*support, *no_soft_reset, steps);
        }
        Input::Port { steps } => port(steps),
        Input::Shadow { space, multi_function, accesses } => shadow(space, *multi_function, accesses),
    }
});
