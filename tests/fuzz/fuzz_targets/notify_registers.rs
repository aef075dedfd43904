//! The power notification device under random accesses, over two real power domains whose functions refuse, fail, wake and
//! vanish at random while an operator changes their policies. After each step every STATUS register says what the guest's
//! requests make of it, the guest reaches no function that it has off, and hardware has taken no call that it must not get
//! in its state (see [`vfio_pm::fake`]). In the end, with hardware that works again, every function goes off and comes back.
//!
//! Follows the register map of [`acpi::notify_abi`] and ACPI 6.5, section 7.2.

#![no_main]

use std::sync::Arc;
use std::time::Duration;

use acpi::notify_abi::ResourceIndex;
use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vfio_pm::fake::{EntryFailure, FakeFunction, Script, Slot, eventually};
use vfio_pm::{
    FunctionGate, LostPolicy, NotifyDevice, Phase, PolicyChange, PowerChoice, PowerDomain, Rate, WakePolicy,
};
use vm_device::DeviceMmio;
use vm_device::bus::MmioAddress;

const BASE: MmioAddress = MmioAddress(0xfed1_0000);
const ON: u32 = 1;
const BUSY: u32 = 2;
const LOST: u32 = 4;

#[derive(Arbitrary, Debug)]
struct Input {
    slots: [Shape; 2],
    #[arbitrary(with = fuzz::steps::<Step, 60>)]
    steps: Vec<Step>,
}

/// What a slot is made of.
#[derive(Arbitrary, Debug)]
struct Shape {
    functions: u8,
    port: Option<u8>,
    /// The first function always has one.
    resources: (u8, [Option<u8>; 2]),
    hold_off: u8,
    impatient: bool,
    needs_driver: bool,
    silent_entry: bool,
    burst: Option<u8>,
    latched: bool,
}

#[derive(Arbitrary, Debug)]
enum Step {
    Read {
        offset: u16,
    },
    Write {
        offset: u64,
        width: u8,
        value: u64,
    },
    /// A request to a resource that a slot has.
    Request {
        slot: bool,
        which: u8,
        value: Request,
    },
    /// `_OFF`, time to get somewhere, perhaps a wake that the guest looks for, `_ON`.
    Trip {
        slot: bool,
        which: u8,
        tenths: u8,
        wake: bool,
    },
    /// A request to any.
    Stray {
        index: u8,
        value: u32,
    },
    Pmcsr {
        slot: bool,
        function: u8,
        d3hot: bool,
    },
    PmeEnable {
        slot: bool,
        function: u8,
        enabled: bool,
    },
    PortPme {
        slot: bool,
        refused: bool,
    },
    HostWake {
        slot: bool,
        function: u8,
    },
    HostSays {
        slot: bool,
        function: u8,
        error: bool,
    },
    Script {
        slot: bool,
        function: u8,
        script: Failures,
    },
    Policy {
        slot: bool,
        function: u8,
        policy: Change,
    },
    ClearLatch {
        slot: bool,
    },
    Recover {
        slot: bool,
        function: u8,
    },
    Pause {
        slot: bool,
        paused: bool,
    },
    Look {
        slot: bool,
    },
    Wait {
        tenths: u8,
    },
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Request {
    Off,
    On,
    Other(u32),
}

#[derive(Arbitrary, Debug)]
struct Failures {
    entry: Option<u8>,
    exit: Option<bool>,
    answers: Option<bool>,
    reset: Option<bool>,
    silent: bool,
    slow: bool,
}

#[derive(Arbitrary, Debug)]
struct Change {
    power: Option<u8>,
    wake: Option<u8>,
    hold_off: Option<u8>,
    toggle_rate: Option<u32>,
    toggle_burst: Option<u32>,
    wake_storm: Option<u32>,
    on_timeout: Option<u16>,
    keep: Option<bool>,
}

/// What the guest has asked of a function.
#[derive(Clone, Copy, Debug, Default)]
struct Wanted {
    off: bool,
    by_port: bool,
}

/// One slot, with what the guest's requests should have made of it.
struct Bed {
    slot: Slot,
    resources: Vec<Option<ResourceIndex>>,
    port: Option<ResourceIndex>,
    wanted: Vec<Wanted>,
    port_off: bool,
    /// Functions that the guest may have been told of: it has asked for PMEs, or its driver must always know.
    may_tell: Vec<bool>,
    /// A device that does not answer may be taken from the guest at any time.
    may_vanish: bool,
}

#[derive(Clone, Copy, Debug)]
enum Owner {
    Port(usize),
    Function(usize, usize),
}

struct Machine {
    beds: Vec<Bed>,
    device: NotifyDevice,
}

impl Bed {
    fn new(shape: &Shape) -> Self {
        let count = shape.functions % 3 + 1;
        let mut taken = Vec::new();
        // In one domain every index is there once; two domains may claim the same.
        let mut index = |wish: Option<u8>| {
            let index = wish.filter(|wish| !taken.contains(wish))?;
            taken.push(index);
            Some(ResourceIndex(index))
        };
        let (first, others) = shape.resources;
        let wishes = [Some(first), others[0], others[1]];
        let resources: Vec<_> = wishes.into_iter().take(count.into()).map(&mut index).collect();
        let port = index(shape.port);
        let slot = Slot::with(count, |spec| {
            spec.port_resource = port;
            for (member, resource) in spec.members.iter_mut().zip(&resources) {
                member.resource = *resource;
                let policy = &mut member.policy;
                policy.hold_off = Duration::from_micros(u64::from(shape.hold_off % 4) * 300);
                policy.needs_driver = shape.needs_driver;
                if shape.silent_entry {
                    policy.wake = WakePolicy::HostOnly;
                }
                if shape.impatient {
                    policy.on_timeout = Duration::from_millis(1);
                }
                if let Some(burst) = shape.burst {
                    policy.toggles = Rate { per_minute: 60_000, burst: u32::from(burst).max(1) };
                }
            }
            let timing = &mut spec.timing;
            timing.park = Duration::from_micros(500);
            timing.park_without_resource = Duration::from_micros(200);
            timing.unpark_wait = Duration::from_millis(2);
            timing.confirm = Duration::from_micros(500);
            timing.reentry_first = Duration::from_micros(300);
            timing.reentry_max = Duration::from_millis(1);
            timing.storm_first = Duration::from_micros(300);
            timing.storm_max = Duration::from_millis(1);
            timing.retries = [1, 1].map(Duration::from_millis).into();
            spec.latched_by = shape.latched.then(|| spec.members[0].gate.bdf());
        });
        let functions = usize::from(count);
        Self {
            slot,
            resources,
            port,
            wanted: vec![Wanted::default(); functions],
            port_off: false,
            may_tell: vec![shape.needs_driver; functions],
            may_vanish: false,
        }
    }

    fn domain(&self) -> &PowerDomain {
        &self.slot.domain
    }

    fn function(&self, number: u8) -> (usize, &FakeFunction) {
        let number = usize::from(number) % self.slot.functions.len();
        (number, &self.slot.functions[number])
    }

    fn request_function(&mut self, number: usize, on: bool) {
        let wanted = &mut self.wanted[number];
        *wanted = Wanted { off: !on, by_port: false };
    }

    fn request_port(&mut self, on: bool) {
        self.port_off = !on;
        for (wanted, resource) in self.wanted.iter_mut().zip(&self.resources) {
            let offered = resource.is_some();
            if on && wanted.by_port {
                *wanted = Wanted::default();
            } else if !on && offered && !wanted.off {
                *wanted = Wanted { off: true, by_port: true };
            }
        }
    }
}

impl Machine {
    fn new(shapes: &[Shape]) -> Self {
        let beds: Vec<_> = shapes.iter().map(Bed::new).collect();
        let device = NotifyDevice::new(beds.iter().map(|bed| Arc::clone(&bed.slot.domain)).collect());
        Self { beds, device }
    }

    /// Who answers for an index: the first slot that claims it.
    fn owner(&self, index: u8) -> Option<Owner> {
        let index = Some(ResourceIndex(index));
        self.beds.iter().enumerate().find_map(|(slot, bed)| {
            match bed.resources.iter().position(|resource| *resource == index) {
                Some(function) => Some(Owner::Function(slot, function)),
                None => (bed.port == index).then_some(Owner::Port(slot)),
            }
        })
    }

    fn read(&self, offset: u64) -> u32 {
        let mut data = [0x5a; 4];
        self.device.mmio_read(BASE, offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn status(&self, index: u8) -> u32 {
        self.read(0x104 + 8 * u64::from(index))
    }

    /// A write of any kind, booked if it is a request.
    fn write(&mut self, offset: u64, data: &[u8]) {
        self.device.mmio_write(BASE, offset, data);
        let Ok(value) = <[u8; 4]>::try_from(data).map(u32::from_le_bytes) else { return };
        if !(0x100..0x900).contains(&offset) || !offset.is_multiple_of(8) || value > 1 {
            return;
        }
        let index = ((offset - 0x100) / 8) as u8;
        let on = value == 1;
        match self.owner(index) {
            Some(Owner::Function(slot, function)) => self.beds[slot].request_function(function, on),
            Some(Owner::Port(slot)) => self.beds[slot].request_port(on),
            None => {}
        }
    }

    /// A read of any kind.
    fn check_read(&self, offset: u64, width: usize) {
        let mut data = vec![0x5a; width];
        self.device.mmio_read(BASE, offset, &mut data);
        let Ok(value) = <[u8; 4]>::try_from(&data[..]).map(u32::from_le_bytes) else {
            assert!(data.iter().all(|byte| *byte == 0xff), "{width} bytes at {offset:#x}");
            return;
        };
        match offset {
            0 => assert_eq!(data, *b"DMPM"),
            4 => assert_eq!(value, 1),
            0x10..0x30 if offset.is_multiple_of(4) => self.check_wakes((offset - 0x10) / 4, value),
            0x100..0x900 if offset.is_multiple_of(8) => assert_eq!(value, 0),
            0x100..0x900 if offset.is_multiple_of(4) => {
                let index = ((offset - 0x104) / 8) as u8;
                assert!(self.owner(index).is_some() || value == 0);
            }
            _ => assert_eq!(value, u32::MAX, "nothing is at {offset:#x}"),
        }
    }

    /// Only functions that are off and asked for it are announced.
    fn check_wakes(&self, word: u64, bits: u32) {
        for bit in (0..32).filter(|bit| bits >> bit & 1 != 0) {
            let index = word as u8 * 32 + bit;
            let Some(Owner::Function(slot, function)) = self.owner(index) else {
                panic!("WAKE bit of resource {index}, which is no function's")
            };
            let bed = &self.beds[slot];
            assert!(bed.wanted[function].off, "WAKE of resource {index}, which is on");
            assert!(bed.may_tell[function], "WAKE of resource {index}, which did not ask");
            assert!(bed.slot.wake.count() > 0, "WAKE of resource {index} without an interrupt");
        }
    }

    fn check(&self) {
        for index in 0..=u8::MAX {
            match self.owner(index) {
                Some(Owner::Function(slot, function)) => self.check_function(index, slot, function),
                Some(Owner::Port(slot)) => {
                    let status = self.status(index);
                    let expected = if self.beds[slot].port_off { 0 } else { ON };
                    assert_eq!(status & !BUSY, expected, "port, resource {index}");
                    assert!(status & ON != 0 || status == 0, "port, resource {index}: {status}");
                }
                None => {}
            }
        }
        for bed in &self.beds {
            for (function, wanted) in bed.slot.functions.iter().zip(&bed.wanted) {
                assert!(!(wanted.off && function.gate_is_open()), "{}: off and open", function.bdf());
            }
            bed.slot.assert_sound();
        }
    }

    fn check_function(&self, index: u8, slot: usize, function: usize) {
        let bed = &self.beds[slot];
        let status = self.status(index);
        if bed.wanted[function].off {
            assert_eq!(status & !LOST, 0, "resource {index} is off");
        } else {
            assert!(matches!(status, ON | BUSY | LOST), "resource {index} is on: {status}");
            let open = bed.may_vanish || bed.slot.functions[function].gate_is_open();
            assert!(status != ON || open, "resource {index} is ready and closed");
        }
        if status & LOST != 0 && bed.wanted[function].off {
            eventually("STATUS and the state agree on a lost device", || {
                (self.status(index) & LOST != 0) == (bed.domain().report()[function].phase == Phase::Lost)
            });
        }
    }

    fn bed(&mut self, slot: bool) -> &mut Bed {
        &mut self.beds[usize::from(slot)]
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Read { offset } => {
                // Cheap, and only few of them mean anything: all that begin in one dword.
                for offset in (u64::from(offset % 0x1100) & !3..).take(4) {
                    (0..=8).for_each(|width| self.check_read(offset, width));
                }
            }
            Step::Write { offset, width, value } => {
                self.write(*offset, &value.to_le_bytes()[..usize::from(width % 9)]);
                self.check_read(*offset, usize::from(width % 9));
            }
            Step::Request { slot, which, value } => {
                let bed = self.bed(*slot);
                let all: Vec<_> = bed.resources.iter().flatten().chain(&bed.port).collect();
                let Some(index) = all.get(usize::from(*which) % all.len().max(1)) else { return };
                let offset = 0x100 + 8 * u64::from(index.0);
                let value = match value {
                    Request::Off => 0u32,
                    Request::On => 1,
                    Request::Other(value) => *value,
                };
                self.write(offset, &value.to_le_bytes());
            }
            Step::Trip { slot, which, tenths, wake } => {
                let bed = self.bed(*slot);
                let all: Vec<_> = bed.resources.iter().flatten().chain(&bed.port).collect();
                let offset = 0x100 + 8 * u64::from(all[usize::from(*which) % all.len()].0);
                self.write(offset, &[0; 4]);
                self.check();
                let some_time = Duration::from_micros(u64::from(tenths % 30) * 100);
                std::thread::sleep(some_time);
                if *wake {
                    for function in &self.bed(*slot).slot.functions {
                        function.host_wake();
                    }
                    std::thread::sleep(some_time);
                    (0x10..0x30).step_by(4).for_each(|offset| self.check_read(offset, 4));
                }
                self.write(offset, &[1, 0, 0, 0]);
            }
            Step::Stray { index, value } => self.write(0x100 + 8 * u64::from(*index), &value.to_le_bytes()),
            Step::Pmcsr { slot, function, d3hot } => {
                let bed = self.bed(*slot);
                let (_, function) = bed.function(*function);
                if *d3hot {
                    function.guest_writes_d3hot(bed.domain());
                } else {
                    function.guest_writes_d0(bed.domain());
                }
            }
            Step::PmeEnable { slot, function, enabled } => {
                let bed = self.bed(*slot);
                let (number, function) = bed.function(*function);
                function.set_pme_enabled(*enabled);
                bed.may_tell[number] |= *enabled;
            }
            Step::PortPme { slot, refused } => self.bed(*slot).slot.pme.refuse(*refused),
            Step::HostWake { slot, function } => {
                self.bed(*slot).function(*function).1.host_wake();
            }
            Step::HostSays { slot, function, error } => {
                let (_, function) = self.bed(*slot).function(*function);
                if *error { function.bus_error() } else { function.host_wants_it_back() }
            }
            Step::Script { slot, function, script } => {
                let bed = self.bed(*slot);
                bed.may_vanish |= script.silent;
                bed.function(*function).1.script(|to| fail(to, script));
            }
            Step::Policy { slot, function, policy } => {
                let bed = self.bed(*slot);
                // A value out of range, or a function that was not offered, is refused: the policy stays.
                let _ = bed.domain().change_policy(bed.function(*function).1.bdf(), &change(policy));
            }
            Step::ClearLatch { slot } => drop(self.bed(*slot).domain().clear_latch()),
            Step::Recover { slot, function } => {
                let bed = self.bed(*slot);
                // Refused unless the device is lost.
                let _ = bed.domain().recover(bed.function(*function).1.bdf());
            }
            Step::Pause { slot, paused } => {
                let domain = self.bed(*slot).domain();
                if *paused { domain.pause() } else { domain.resume() }
            }
            Step::Look { slot } => drop(self.bed(*slot).domain().snapshots()),
            Step::Wait { tenths } => std::thread::sleep(Duration::from_micros(u64::from(tenths % 30) * 100)),
        }
    }

    /// Hardware works and nobody interferes any more: everything has to work again.
    fn end_well(&mut self) {
        for bed in &mut self.beds {
            let domain = bed.domain();
            domain.resume();
            for function in &bed.slot.functions {
                function.script(|script| *script = Script::default());
                let well = PolicyChange {
                    power: Some(PowerChoice::Auto),
                    hold_off: Some(0),
                    toggle_rate: Some(0),
                    on_timeout: Some(10_000),
                    ..PolicyChange::default()
                };
                let _ = domain.change_policy(function.bdf(), &well);
            }
            // What the last failure has begun may end badly once more.
            eventually("every function comes back", || domain.reset(Duration::from_millis(200)));
            domain.clear_latch();
            bed.wanted.fill(Wanted::default());
            bed.port_off = false;
        }
        self.check();
        for index in 0..=u8::MAX {
            let Some(Owner::Function(slot, number)) = self.owner(index) else { continue };
            assert_eq!(self.status(index), ON, "resource {index}");
            self.write(0x100 + 8 * u64::from(index), &[0; 4]);
            eventually("it enters low power", || self.beds[slot].slot.functions[number].is_engaged());
            self.check();
            self.write(0x100 + 8 * u64::from(index), &[1, 0, 0, 0]);
            eventually("it is back", || self.status(index) == ON);
            self.check();
        }
    }
}

fn fail(script: &mut Script, failures: &Failures) {
    let entries = [
        None,
        Some(EntryFailure::Engaged),
        Some(EntryFailure::Unsupported),
        Some(EntryFailure::Io),
        Some(EntryFailure::Descriptor),
    ];
    script.entries.extend(failures.entry.map(|pick| entries[usize::from(pick) % entries.len()]));
    script.exits.extend(failures.exit);
    script.answers.extend(failures.answers);
    script.resets.extend(failures.reset);
    script.silent = failures.silent;
    script.delay = Duration::from_millis(if failures.slow { 2 } else { 0 });
}

fn change(change: &Change) -> PolicyChange {
    let powers = [PowerChoice::Auto, PowerChoice::D3hot, PowerChoice::Off];
    let wakes = [WakePolicy::Notify, WakePolicy::Ignore, WakePolicy::HostOnly];
    PolicyChange {
        power: change.power.map(|pick| powers[usize::from(pick) % powers.len()]),
        wake: change.wake.map(|pick| wakes[usize::from(pick) % wakes.len()]),
        hold_off: change.hold_off.map(|ms| u32::from(ms % 3)),
        toggle_rate: change.toggle_rate,
        toggle_burst: change.toggle_burst,
        wake_storm: change.wake_storm,
        on_timeout: change.on_timeout.map(u32::from),
        on_lost: change.keep.map(|keep| if keep { LostPolicy::Keep } else { LostPolicy::Reset }),
    }
}

fuzz_target!(|input: Input| {
    let mut machine = Machine::new(&input.slots);
    machine.check();
    for step in &input.steps {
        machine.step(step);
        machine.check();
    }
    machine.end_well();
});
