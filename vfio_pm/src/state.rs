//! The power state of one function as a pure function: `state × event -> (state, effects)`.
//!
//! A state has two halves: what the guest wants, and where hardware is. Guest requests change the first half at once and hardware
//! follows; whatever the worker is doing when the guest changes its mind is finished first and then undone, so no request is
//! lost and no two operations overlap. Guest semantics are those of ACPI 6.5, section 7.2 (`_ON`, `_OFF`) and PCI-PM 1.2,
//! section 5 (D0, D3hot); hardware's are those of VFIO's low-power features (`include/uapi/linux/vfio.h`).

/// What the guest wants of the function's power.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Want {
    /// Power on, D0.
    On,
    /// Power on, D3hot by PMCSR.
    D3hot,
    /// Power off by `_OFF`.
    Off,
}

/// Where hardware is, or what the worker is doing to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Hardware {
    /// On, in D0.
    D0,
    /// The worker is writing D3hot.
    ToD3hot,
    /// In D3hot by PMCSR.
    D3hot,
    /// The worker is writing D0.
    ToD0,
    /// The worker is entering low power.
    Entering,
    /// In low power: the host suspends it as deep as it can.
    LowPower,
    /// The host has resumed it, which ended low power.
    Woken,
    /// The worker is ending low power and checking that the device answers.
    Exiting,
    /// Not put in low power, be it that the host refused or that it may not be: on, though the guest has it off.
    Held,
    /// In D3hot though the guest has it off: it may go no deeper.
    Shallow,
    /// It did not come back.
    Lost,
    /// The worker is resetting a device that did not come back.
    Resetting,
}

impl Hardware {
    /// Whether the worker has an operation under way; only that operation's end changes the hardware half.
    pub fn is_busy(self) -> bool {
        matches!(self, Self::ToD3hot | Self::ToD0 | Self::Entering | Self::Exiting | Self::Resetting)
    }

    /// Whether the device has power and is not about to lose it.
    fn is_powered(self) -> bool {
        matches!(self, Self::D0 | Self::ToD3hot | Self::D3hot | Self::ToD0)
    }
}

/// The whole state of one function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PowerState {
    /// What the guest wants.
    pub want: Want,
    /// Where hardware is.
    pub hardware: Hardware,
}

/// What happens to a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PowerEvent {
    /// `_OFF`.
    Off,
    /// `_ON`.
    On,
    /// The guest wrote D3hot to PMCSR.
    Parked,
    /// The guest wrote D0 to PMCSR.
    Unparked,
    /// The hold-off after `_OFF` is over.
    HoldOffElapsed,
    /// The function has been in the guest's D3hot for long enough to put hardware there.
    ParkElapsed,
    /// A wake that nobody asked for has been waited out.
    ReentryDue,
    /// The worker has entered low power.
    Entered,
    /// The host refused low power.
    EntryRefused,
    /// The wakeup eventfd of the current entry has fired.
    Woke,
    /// The worker has ended low power and the device answers.
    Exited,
    /// Low power could not be ended or the device does not answer; it stays as it is.
    ExitFailed,
    /// The same, and the device is to be reset.
    ExitFailedReset,
    /// The device answers after a reset.
    ResetAnswered,
    /// It does not.
    ResetFailed,
    /// The hold-off is over, and the function may not be put in low power.
    EntryDenied,
    /// The hold-off is over, and the function may go to D3hot only.
    EntryShallow,
    /// What kept the function from low power may be gone: count the hold-off again.
    Reconsider,
    /// The function may not be as deep as it is: bring it back, for hardware only.
    Restrain,
    /// Somebody wants a lost device to be reset.
    Recover,
    /// The device has gone while it was in D0.
    Gone,
    /// The worker has written D3hot (or failed to, which makes no difference: the way back is the same).
    D3hotSet,
    /// The worker has written D0 and the device answers.
    D0Set,
    /// The worker could not bring the device to D0.
    D0Failed,
    /// The guest reboots: everything on.
    Reset,
}

/// What the worker is to do to hardware.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Enter low power; ends with `Entered` or `EntryRefused`.
    Enter,
    /// End low power and check the device; ends with `Exited` or `ExitFailed`.
    Exit,
    /// Write D3hot; ends with `D3hotSet`.
    SetD3hot,
    /// Write D0; ends with `D0Set` or `D0Failed`.
    SetD0,
    /// Reset the device and check that it answers; ends with `ResetAnswered` or `ResetFailed`.
    Reset,
}

/// What becomes of the function's timer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum TimerChange {
    /// As it was.
    #[default]
    Keep,
    /// None.
    Disarm,
    /// Count the hold-off.
    HoldOff,
    /// Count the time in the guest's D3hot.
    Park,
}

/// What a transition asks to be done. The gate is not among them: it follows [`PowerState::gate_open`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Effects {
    /// The worker's next operation.
    pub operation: Option<Operation>,
    /// The timer.
    pub timer: TimerChange,
    /// Hardware is back from D3hot: open the gate though it was not closed, for the BAR slots.
    pub reopen: bool,
    /// The host has woken the function: tell the guest or put it back.
    pub woken: bool,
    /// The device is gone: tell the gate.
    pub lost: bool,
}

/// A state's name for people: logs and counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// On for guest and hardware.
    On,
    /// Hardware in D3hot.
    D3hot,
    /// Off for the guest, hardware still on until the hold-off is over.
    HoldOff,
    /// On its way to low power.
    Entering,
    /// Low power.
    Off,
    /// Off for the guest, woken by the host.
    Awake,
    /// On its way back.
    Exiting,
    /// Off for the guest, hardware on because the host refused or because it may not sleep.
    Held,
    /// Gone.
    Lost,
    /// Gone, and being reset.
    Resetting,
}

impl Phase {
    /// All phases, in the order of their discriminants.
    pub const ALL: [Self; 10] = [
        Self::On,
        Self::D3hot,
        Self::HoldOff,
        Self::Entering,
        Self::Off,
        Self::Awake,
        Self::Exiting,
        Self::Held,
        Self::Lost,
        Self::Resetting,
    ];

    /// A short lower-case name.
    pub fn name(self) -> &'static str {
        match self {
            Self::On => "on",
            Self::D3hot => "d3hot",
            Self::HoldOff => "hold-off",
            Self::Entering => "entering",
            Self::Off => "off",
            Self::Awake => "awake",
            Self::Exiting => "exiting",
            Self::Held => "held",
            Self::Lost => "lost",
            Self::Resetting => "resetting",
        }
    }
}

impl PowerState {
    /// How every function starts.
    pub const ON: Self = Self { want: Want::On, hardware: Hardware::D0 };

    /// Whether the guest may reach hardware. Never true while hardware may be suspended.
    pub fn gate_open(self) -> bool {
        self.want != Want::Off && self.hardware.is_powered()
    }

    /// Whether a gate that is closed may open: opening puts the guest in D0, so hardware has to be there. A gate that is open already
    /// stays so in D3hot, where the function itself has its BAR slots down.
    pub fn gate_may_open(self) -> bool {
        self.gate_open() && self.hardware == Hardware::D0
    }

    /// Whether `_ON` has been asked for and is not carried out yet.
    pub fn is_coming_back(self) -> bool {
        self.want != Want::Off && !self.hardware.is_powered() && self.hardware != Hardware::Lost
    }

    /// The state's name for people.
    pub fn phase(self) -> Phase {
        match (self.hardware, self.want) {
            (Hardware::Entering, _) => Phase::Entering,
            (Hardware::LowPower, _) => Phase::Off,
            (Hardware::Woken, _) => Phase::Awake,
            (Hardware::Exiting, _) => Phase::Exiting,
            (Hardware::Held, _) => Phase::Held,
            (Hardware::Shallow, _) => Phase::D3hot,
            (Hardware::Lost, _) => Phase::Lost,
            (Hardware::Resetting, _) => Phase::Resetting,
            (_, Want::Off) => Phase::HoldOff,
            (Hardware::ToD3hot | Hardware::D3hot, _) => Phase::D3hot,
            (Hardware::D0 | Hardware::ToD0, _) => Phase::On,
        }
    }

    /// The state after `event`, and what to do. Events that mean nothing in a state leave it alone.
    #[must_use]
    pub fn next(self, event: PowerEvent) -> (Self, Effects) {
        match event {
            PowerEvent::Off => self.off(),
            PowerEvent::On => self.on(),
            PowerEvent::Parked => self.parked(),
            PowerEvent::Unparked => self.unparked(),
            PowerEvent::Reset if self.want == Want::D3hot && self.hardware != Hardware::Lost => {
                self.unparked()
            }
            PowerEvent::Reset => self.on(),
            PowerEvent::HoldOffElapsed | PowerEvent::ParkElapsed | PowerEvent::ReentryDue => {
                self.elapsed(event)
            }
            PowerEvent::EntryDenied
            | PowerEvent::EntryShallow
            | PowerEvent::Reconsider
            | PowerEvent::Restrain => self.ruled(event),
            PowerEvent::Recover if self.hardware == Hardware::Lost => self.start(Operation::Reset),
            PowerEvent::Recover => (self, Effects::default()),
            PowerEvent::Gone if self.hardware == Hardware::D0 => self.lost(),
            PowerEvent::Gone => (self, Effects::default()),
            PowerEvent::Woke if self.hardware == Hardware::LowPower => {
                (self.with(Hardware::Woken), Effects { woken: true, ..Effects::default() })
            }
            PowerEvent::Woke => (self, Effects::default()),
            PowerEvent::Entered
            | PowerEvent::EntryRefused
            | PowerEvent::Exited
            | PowerEvent::ExitFailed
            | PowerEvent::ExitFailedReset
            | PowerEvent::ResetAnswered
            | PowerEvent::ResetFailed
            | PowerEvent::D3hotSet
            | PowerEvent::D0Set
            | PowerEvent::D0Failed => self.finished(event),
        }
    }

    fn with(self, hardware: Hardware) -> Self {
        Self { hardware, ..self }
    }

    fn start(self, operation: Operation) -> (Self, Effects) {
        let hardware = match operation {
            Operation::Enter => Hardware::Entering,
            Operation::Exit => Hardware::Exiting,
            Operation::SetD3hot => Hardware::ToD3hot,
            Operation::SetD0 => Hardware::ToD0,
            Operation::Reset => Hardware::Resetting,
        };
        let effects =
            Effects { operation: Some(operation), timer: TimerChange::Disarm, ..Effects::default() };
        (self.with(hardware), effects)
    }

    fn arm(self, timer: TimerChange) -> (Self, Effects) {
        (self, Effects { timer, ..Effects::default() })
    }

    fn lost(self) -> (Self, Effects) {
        let effects = Effects { lost: true, timer: TimerChange::Disarm, ..Effects::default() };
        (self.with(Hardware::Lost), effects)
    }

    fn off(self) -> (Self, Effects) {
        if self.want == Want::Off {
            return (self, Effects::default());
        }
        let off = Self { want: Want::Off, ..self };
        match off.hardware {
            Hardware::D0 | Hardware::D3hot => off.arm(TimerChange::HoldOff),
            _ => off.arm(TimerChange::Disarm),
        }
    }

    fn on(self) -> (Self, Effects) {
        let on = Self { want: if self.want == Want::Off { Want::On } else { self.want }, ..self };
        match (self.want, self.hardware) {
            // Hardware in D3hot needs PMCSR = D0 before the guest may come in: the way back from low power does that too.
            (_, Hardware::Lost)
            | (
                Want::Off,
                Hardware::D3hot | Hardware::LowPower | Hardware::Woken | Hardware::Held | Hardware::Shallow,
            ) => Self { want: Want::On, ..on }.start(Operation::Exit),
            (Want::Off, Hardware::D0) => on.arm(TimerChange::Disarm),
            _ => (on, Effects::default()),
        }
    }

    fn parked(self) -> (Self, Effects) {
        let parked = Self { want: Want::D3hot, ..self };
        match (self.want, self.hardware) {
            (Want::On, Hardware::D0) => parked.arm(TimerChange::Park),
            (Want::On, Hardware::ToD0 | Hardware::ToD3hot | Hardware::D3hot) => (parked, Effects::default()),
            _ => (self, Effects::default()),
        }
    }

    fn unparked(self) -> (Self, Effects) {
        if self.want != Want::D3hot {
            return (self, Effects::default());
        }
        let on = Self { want: Want::On, ..self };
        match self.hardware {
            Hardware::D0 => on.arm(TimerChange::Disarm),
            Hardware::D3hot => on.start(Operation::SetD0),
            _ => (on, Effects::default()),
        }
    }

    fn elapsed(self, event: PowerEvent) -> (Self, Effects) {
        match (event, self.want, self.hardware) {
            (
                PowerEvent::HoldOffElapsed,
                Want::Off,
                Hardware::D0 | Hardware::D3hot | Hardware::Held | Hardware::Shallow,
            )
            | (PowerEvent::ReentryDue, Want::Off, Hardware::Woken) => self.start(Operation::Enter),
            (PowerEvent::ParkElapsed, Want::D3hot, Hardware::D0) => self.start(Operation::SetD3hot),
            _ => (self, Effects::default()),
        }
    }

    /// What the policy has to say.
    fn ruled(self, event: PowerEvent) -> (Self, Effects) {
        match (event, self.want, self.hardware) {
            (PowerEvent::EntryDenied, Want::Off, Hardware::D0 | Hardware::D3hot | Hardware::Woken) => {
                self.with(Hardware::Held).arm(TimerChange::Disarm)
            }
            (PowerEvent::EntryShallow, Want::Off, Hardware::D0 | Hardware::Woken) => {
                self.start(Operation::SetD3hot)
            }
            // An entry that was refused may have left the host in the belief that there is one.
            (PowerEvent::EntryShallow, Want::Off, Hardware::Held) => self.start(Operation::Exit),
            (PowerEvent::EntryShallow, Want::Off, Hardware::D3hot) => {
                self.with(Hardware::Shallow).arm(TimerChange::Disarm)
            }
            (PowerEvent::Reconsider, Want::Off, Hardware::Held | Hardware::Shallow) => {
                self.arm(TimerChange::HoldOff)
            }
            (PowerEvent::Reconsider, Want::D3hot, Hardware::D0) => self.arm(TimerChange::Park),
            (PowerEvent::Restrain, Want::Off, Hardware::LowPower | Hardware::Shallow) => {
                self.start(Operation::Exit)
            }
            (PowerEvent::Restrain, Want::D3hot, Hardware::D3hot) => self.start(Operation::SetD0),
            _ => (self, Effects::default()),
        }
    }

    /// An operation of the worker has ended: note where hardware is, then go on to what the guest wants by now.
    fn finished(self, event: PowerEvent) -> (Self, Effects) {
        match (self.hardware, event) {
            (Hardware::Entering, PowerEvent::Entered) => self.after_entry(Hardware::LowPower),
            (Hardware::Entering, PowerEvent::EntryRefused) => self.after_entry(Hardware::Held),
            (Hardware::Exiting, PowerEvent::ExitFailed) | (Hardware::Resetting, PowerEvent::ResetFailed) => {
                self.lost()
            }
            (Hardware::Exiting, PowerEvent::ExitFailedReset) => self.start(Operation::Reset),
            (Hardware::Exiting, PowerEvent::Exited) | (Hardware::Resetting, PowerEvent::ResetAnswered) => {
                self.with(Hardware::D0).after_return(false)
            }
            (Hardware::ToD0, PowerEvent::D0Set) => self.with(Hardware::D0).after_return(true),
            // The longer way back, which also tells a dead device from a busy one. It closes the gate, and ends in D0 for the guest too.
            (Hardware::ToD0, PowerEvent::D0Failed) => {
                let want = if self.want == Want::Off { Want::Off } else { Want::On };
                Self { want, ..self }.start(Operation::Exit)
            }
            (Hardware::ToD3hot, PowerEvent::D3hotSet) => {
                let parked = self.with(Hardware::D3hot);
                match self.want {
                    Want::On => parked.start(Operation::SetD0),
                    Want::D3hot => (parked, Effects::default()),
                    Want::Off => parked.arm(TimerChange::HoldOff),
                }
            }
            _ => (self, Effects::default()),
        }
    }

    fn after_entry(self, reached: Hardware) -> (Self, Effects) {
        let state = self.with(reached);
        if self.want == Want::Off { (state, Effects::default()) } else { state.start(Operation::Exit) }
    }

    fn after_return(self, from_d3hot: bool) -> (Self, Effects) {
        match self.want {
            Want::On => (self, Effects { reopen: from_d3hot, ..Effects::default() }),
            Want::D3hot => self.arm(TimerChange::Park),
            Want::Off => self.arm(TimerChange::HoldOff),
        }
    }
}

#[cfg(test)]
mod tests;
