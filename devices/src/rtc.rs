//! The CMOS real-time clock of the PC: an MC146818 at ports 0x70 and 0x71, with 128 bytes that a battery keeps.
//!
//! It shows the host's clock in UTC, shifted by what the guest has set. Linux's `rtc-cmos` finds the century at 0x32 if the
//! FADT says so, and alarms up to a day ahead. The host's timer is armed only while an enabled interrupt is to come, so an
//! idle guest costs no wake-up. It follows `CLOCK_REALTIME`, also when somebody sets that clock and across a host suspend.

mod calendar;
mod registers;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use event_manager::{EventOps, EventSet, EventSubscriber, Events};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use vm_device::DevicePio;
use vm_device::bus::{PioAddress, PioAddressOffset};
use vmm_sys_util::eventfd::EventFd;

use registers::Registers;
pub use registers::{Battery, RtcState};

/// How many ports there are: the index register and, behind it, the data register.
pub const PORTS: u16 = 2;

const INDEX: PioAddressOffset = 0;
const DATA: PioAddressOffset = 1;

/// The clock could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot make a timer for the real-time clock; raise the limit on open files (ulimit -n)")]
pub struct RtcError(#[from] io::Error);

#[derive(Debug)]
struct State {
    registers: Registers,
    /// What the timer is armed for, in nanoseconds of the host's clock.
    armed: Option<i128>,
}

/// The clock on the port bus, and the subscriber that raises its interrupts.
pub struct Rtc {
    state: Mutex<State>,
    timer: OwnedFd,
    interrupt: EventFd,
    /// Told of every alarm that the guest has enabled.
    alarm: Box<dyn Fn() + Send + Sync>,
}

impl fmt::Debug for Rtc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rtc").field("state", &self.state).finish_non_exhaustive()
    }
}

impl Rtc {
    /// A clock with what `battery` has kept; `Battery::default()` for a new one that shows the host's time. `interrupt` is
    /// signalled whenever the interrupt line goes up; it should be the irqfd of IRQ 8.
    ///
    /// # Errors
    /// No timer could be made.
    pub fn new(interrupt: EventFd, battery: Battery) -> Result<Self, RtcError> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Realtime, flags).map_err(io::Error::from)?;
        let state = State { registers: Registers::new(battery, now()), armed: None };
        Ok(Self { state: Mutex::new(state), timer, interrupt, alarm: Box::new(|| {}) })
    }

    /// Has `alarm` called as well, from any thread, whenever an alarm that the guest has enabled goes off: the chipset's own
    /// view of the clock, such as the fixed RTC event of ACPI.
    #[must_use]
    pub fn on_alarm(mut self, alarm: impl Fn() + Send + Sync + 'static) -> Self {
        self.alarm = Box::new(alarm);
        self
    }

    /// What the battery keeps, for the clock of the machine after a guest reboot.
    pub fn battery(&self) -> Battery {
        self.state().registers.battery()
    }

    /// What must go on elsewhere as it is here.
    pub fn save(&self) -> RtcState {
        self.state().registers.save()
    }

    /// Goes on as saved; whether that could be. An alarm that was due meanwhile goes off now.
    pub fn restore(&self, saved: &RtcState) -> bool {
        let Some(registers) = Registers::restored(saved) else { return false };
        if registers.asserted() {
            // It can only fail when the interrupt is pending already.
            let _ = self.interrupt.write(1);
        }
        self.state().registers = registers;
        self.access(Registers::catch_up);
        true
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs an access, then makes the interrupt and the timer agree with the registers.
    fn access<T>(&self, run: impl FnOnce(&mut Registers, i128) -> T) -> T {
        let mut state = self.state();
        let (was_asserted, was_alarm) = (state.registers.asserted(), state.registers.alarm());
        let now = now();
        let result = run(&mut state.registers, now);
        if state.registers.asserted() && !was_asserted {
            // It can only fail when the interrupt is pending already.
            let _ = self.interrupt.write(1);
        }
        self.arm(&mut state);
        let alarm = state.registers.alarm() && !was_alarm;
        drop(state);
        if alarm {
            (self.alarm)();
        }
        result
    }

    fn arm(&self, state: &mut State) {
        let deadline = state.registers.deadline();
        if deadline == state.armed {
            return;
        }
        // Zero disarms; a time before 1970 is past, as is the first nanosecond after.
        let expiry = deadline.map_or(0, |time| time.max(1));
        let second = i64::try_from(expiry / 1_000_000_000).unwrap_or(i64::MAX);
        let nanosecond = i64::try_from(expiry % 1_000_000_000).unwrap_or(0);
        let timer = Itimerspec {
            it_interval: Timespec { tv_sec: 0, tv_nsec: 0 },
            it_value: Timespec { tv_sec: second, tv_nsec: nanosecond },
        };
        let flags = TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET;
        match timerfd_settime(&self.timer, flags, &timer) {
            Ok(_) => state.armed = deadline,
            Err(error) => {
                log::warn!("real-time clock: the timer cannot be armed, an alarm will be late: {error}")
            }
        }
    }

    #[cfg(test)]
    fn armed(&self) -> bool {
        self.state().armed.is_some()
    }
}

/// The host's clock in nanoseconds since 1970.
fn now() -> i128 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i128::try_from(since.as_nanos()).unwrap_or(i128::MAX)
}

impl DevicePio for Rtc {
    fn pio_read(&self, _base: PioAddress, offset: PioAddressOffset, data: &mut [u8]) {
        match (offset, &mut *data) {
            (DATA, [value]) => *value = self.access(Registers::read),
            // The index register cannot be read.
            (_, data) => data.fill(0xff),
        }
    }

    fn pio_write(&self, _base: PioAddress, offset: PioAddressOffset, data: &[u8]) {
        match (offset, data) {
            (INDEX, &[value]) => self.state().registers.select(value),
            (DATA, &[value]) => self.access(|registers, now| registers.write(value, now)),
            _ => {}
        }
    }
}

impl EventSubscriber for Rtc {
    fn process(&self, _events: Events, _ops: &mut EventOps<'_>) {
        let mut expirations = [0; 8];
        // It fails when the host's clock was set (the timer is then armed anew) or when it was armed again meanwhile.
        let _ = rustix::io::read(&self.timer, &mut expirations);
        self.state().armed = None;
        self.access(Registers::catch_up);
    }

    fn init(&self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::new_raw(self.timer.as_raw_fd(), EventSet::IN)) {
            log::error!("real-time clock: no alarms, because the event loop refuses: {error}");
        }
    }
}
