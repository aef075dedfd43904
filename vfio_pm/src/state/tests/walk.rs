//! Random walks of the state machine against a small model of what the kernel does with VFIO's low-power features
//! (`drivers/vfio/pci/vfio_pci_core.c`): entry is refused while engaged; a wake from suspend ends an entry with wakeup and
//! signals its eventfd; exit ends any entry and signals too; any access wakes; a device may come back dead, and says so to nobody.

use super::*;

/// A small xorshift generator: reproducible, no dependency.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        // The low bits of successive numbers hang together.
        (self.0 >> 33) % limit
    }

    fn one_in(&mut self, odds: u64) -> bool {
        self.below(odds) == 0
    }
}

/// The kernel's half and the device.
#[derive(Debug, Default)]
struct Kernel {
    /// The user has entered low power and not left it (`pm_runtime_engaged`).
    engaged: bool,
    /// The eventfd of the entry, by its generation.
    eventfd: Option<u64>,
    suspended: bool,
    /// PowerState as the user wrote it.
    d3hot: bool,
    dead: bool,
    /// Generations whose eventfd is readable.
    signalled: Vec<u64>,
}

impl Kernel {
    /// Any resume: an entry with wakeup is over.
    fn resume(&mut self) {
        if std::mem::take(&mut self.suspended)
            && let Some(generation) = self.eventfd.take()
        {
            self.signalled.push(generation);
            self.engaged = false;
        }
    }

    fn enter(&mut self, generation: u64) -> bool {
        self.resume();
        if self.engaged {
            return false;
        }
        (self.engaged, self.eventfd) = (true, Some(generation));
        true
    }

    fn exit(&mut self) {
        self.resume();
        self.engaged = false;
        self.signalled.extend(self.eventfd.take());
    }

    /// Suspension follows an entry some time later, and forces D0 first.
    fn idle(&mut self) {
        if self.engaged {
            (self.suspended, self.d3hot) = (true, false);
        }
    }

    /// Configuration space is read: whether the device answers.
    fn answers(&mut self) -> bool {
        self.resume();
        !self.dead
    }
}

/// The domain's half, in miniature: one operation at a time, one timer, one eventfd.
#[derive(Debug)]
struct Walk {
    state: PowerState,
    kernel: Kernel,
    operation: Option<Operation>,
    timer: Option<PowerEvent>,
    generation: u64,
    gate_open: bool,
    reset_tried: bool,
    visited: HashSet<Phase>,
}

impl Walk {
    fn new() -> Self {
        Self {
            state: PowerState::ON,
            kernel: Kernel::default(),
            operation: None,
            timer: None,
            generation: 0,
            gate_open: true,
            reset_tried: false,
            visited: HashSet::new(),
        }
    }

    fn apply(&mut self, event: PowerEvent) {
        let (next, effects) = self.state.next(event);
        if let Some(operation) = effects.operation {
            assert!(self.operation.is_none(), "two operations at once: {self:?} {event:?}");
            self.operation = Some(operation);
        }
        self.timer = match effects.timer {
            TimerChange::Keep => self.timer,
            TimerChange::Disarm => None,
            TimerChange::HoldOff => Some(PowerEvent::HoldOffElapsed),
            TimerChange::Park => Some(PowerEvent::ParkElapsed),
        };
        if effects.woken {
            self.timer = Some(PowerEvent::ReentryDue);
        }
        self.state = next;
        // The gate closes before anything else happens and opens when it may.
        if !next.gate_open() {
            self.gate_open = false;
        } else if next.gate_may_open() {
            self.gate_open = true;
        }
        self.visited.insert(next.phase());
        self.check(event);
    }

    fn check(&self, event: PowerEvent) {
        let kernel = &self.kernel;
        let at_rest = self.operation.is_none();
        assert!(
            !(self.gate_open && kernel.suspended),
            "the guest reaches a sleeping device: {self:?} {event:?}"
        );
        assert!(!(self.gate_open && kernel.engaged), "BARs are dead under an open gate: {self:?} {event:?}");
        if at_rest && self.state.hardware == Hardware::D0 && self.state.want != Want::Off {
            assert!(!kernel.d3hot && !kernel.engaged, "D0 that is none: {self:?} {event:?}");
        }
        if at_rest && self.state.hardware == Hardware::Woken {
            assert!(!kernel.engaged, "{self:?} {event:?}");
        }
        assert_eq!(self.state.hardware.is_busy(), !at_rest, "{self:?} {event:?}");
    }

    /// The worker carries out what it was told to.
    fn operate(&mut self, random: &mut Random) {
        let Some(operation) = self.operation.take() else { return };
        let event = match operation {
            Operation::Enter => {
                self.generation += 1;
                let entered = self.kernel.enter(self.generation) || {
                    self.kernel.exit();
                    self.generation += 1;
                    self.kernel.enter(self.generation)
                };
                assert!(entered, "refused though it was ended: {self:?}");
                if random.one_in(10) {
                    // The host may believe in an entry that it has refused to the user, who could not end it.
                    if random.one_in(2) {
                        self.kernel.exit();
                    }
                    PowerEvent::EntryRefused
                } else {
                    PowerEvent::Entered
                }
            }
            Operation::Exit => {
                self.kernel.exit();
                self.generation += 1;
                if self.kernel.answers() {
                    self.kernel.d3hot = false;
                    self.reset_tried = false;
                    PowerEvent::Exited
                } else if std::mem::replace(&mut self.reset_tried, true) {
                    PowerEvent::ExitFailed
                } else {
                    PowerEvent::ExitFailedReset
                }
            }
            Operation::Reset => {
                self.kernel.exit();
                self.generation += 1;
                self.kernel.d3hot = false;
                self.kernel.dead &= random.one_in(2);
                if self.kernel.answers() { PowerEvent::ResetAnswered } else { PowerEvent::ResetFailed }
            }
            Operation::SetD3hot => {
                assert!(!self.kernel.engaged, "PMCSR written in low power: {self:?}");
                self.kernel.d3hot = true;
                PowerEvent::D3hotSet
            }
            Operation::SetD0 => {
                assert!(!self.kernel.engaged, "PMCSR written in low power: {self:?}");
                if self.kernel.answers() {
                    self.kernel.d3hot = false;
                    PowerEvent::D0Set
                } else {
                    PowerEvent::D0Failed
                }
            }
        };
        self.apply(event);
    }

    /// The eventfds: only the present generation's counts.
    fn listen(&mut self) {
        let present = self.generation;
        if std::mem::take(&mut self.kernel.signalled).contains(&present) {
            self.apply(PowerEvent::Woke);
        }
    }

    fn step(&mut self, random: &mut Random) {
        match random.below(16) {
            0 | 1 => self.apply(PowerEvent::Off),
            2 | 3 => self.apply(PowerEvent::On),
            // The guest reaches PMCSR in earnest only through an open gate.
            4 if self.gate_open => self.apply(PowerEvent::Parked),
            5 => self.apply(PowerEvent::Unparked),
            6 => self.apply(PowerEvent::Reset),
            7 | 8 => {
                if let Some(event) = self.timer.take() {
                    let event = match (event, random.below(8)) {
                        (PowerEvent::HoldOffElapsed | PowerEvent::ReentryDue, 0) => PowerEvent::EntryDenied,
                        (PowerEvent::HoldOffElapsed | PowerEvent::ReentryDue, 1) => PowerEvent::EntryShallow,
                        _ => event,
                    };
                    self.apply(event);
                }
            }
            9 => self.apply(PowerEvent::Reconsider),
            10 if random.one_in(4) => self.apply(PowerEvent::Restrain),
            11 if random.one_in(4) => self.apply(PowerEvent::Recover),
            12 => {
                self.kernel.idle();
                self.kernel.resume();
            }
            13 => self.kernel.idle(),
            14 => self.listen(),
            15 if random.one_in(4) => self.kernel.dead |= self.kernel.suspended,
            _ => self.operate(random),
        }
    }

    fn settle(&mut self, random: &mut Random) {
        for _ in 0..8 {
            self.operate(random);
        }
        assert!(self.operation.is_none(), "it never comes to rest: {self:?}");
    }
}

#[test]
fn random_walks_never_let_the_guest_reach_a_sleeping_device_and_end_in_d0_or_lost() {
    let mut visited: HashSet<Phase> = HashSet::new();
    for seed in 1..=40_u64 {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let mut walk = Walk::new();
        for _ in 0..5000 {
            walk.step(&mut random);
        }
        visited.extend(&walk.visited);
        walk.settle(&mut random);
        walk.apply(PowerEvent::Reset);
        walk.settle(&mut random);
        assert!(walk.gate_open || walk.state.hardware == Hardware::Lost, "seed {seed}: {walk:?}");
        walk.kernel.dead = false;
        walk.apply(PowerEvent::Reset);
        walk.settle(&mut random);
        assert!(walk.gate_open && !walk.kernel.engaged && !walk.kernel.d3hot, "seed {seed}: {walk:?}");
        assert_eq!(walk.state, PowerState::ON, "seed {seed}");
    }
    assert_eq!(visited.len(), Phase::ALL.len(), "seen {visited:?} only");
}
