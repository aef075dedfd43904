//! Cloud Hypervisor's watchdog (device type 35, which VIRTIO 1.2 reserves and does not describe): from the first sign of life on, the guest must give one
//! at least every twenty seconds, or the machine is reset.
//!
//! A sign of life is a chain with a byte for the device to write. The timer runs only from one sign to the next, and fires only
//! when there was none.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use log::warn;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::device::{Activation, Active, DeviceError, DeviceType, F_RINGS, Saved, VirtioDevice};
use super::queue::{ActiveQueue, Served};
use super::worker::{Event, Handler, Watch, Worker};
use crate::reset::MachineControl;

const QUEUE_SIZE: u16 = 8;
/// How long the guest may be silent.
const PATIENCE: Duration = Duration::from_secs(20);
/// What the driver is told of a sign of life.
const SEEN: u8 = 1;

/// The machine that a device is in at the moment: devices outlive machines.
#[derive(Default)]
pub struct CurrentMachine(Mutex<Option<Weak<dyn MachineControl>>>);

impl std::fmt::Debug for CurrentMachine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CurrentMachine")
    }
}

impl CurrentMachine {
    /// It is this one now.
    pub fn set(&self, machine: Weak<dyn MachineControl>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(machine);
    }

    fn get(&self) -> Option<Arc<dyn MachineControl>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).as_ref()?.upgrade()
    }
}

/// The device.
#[derive(Debug)]
pub struct Watchdog {
    name: String,
    machine: Arc<CurrentMachine>,
    patience: Duration,
    /// There was a sign of life since the driver became ready.
    watching: Arc<AtomicBool>,
    /// The next activation is no new beginning.
    restored: AtomicBool,
}

impl Watchdog {
    /// A watchdog that resets `machine`.
    pub fn new(name: &str, machine: Arc<CurrentMachine>) -> Self {
        Self {
            name: name.to_owned(),
            machine,
            patience: PATIENCE,
            watching: Arc::default(),
            restored: AtomicBool::new(false),
        }
    }
}

impl VirtioDevice for Watchdog {
    fn device_type(&self) -> DeviceType {
        DeviceType::WATCHDOG
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        F_RINGS
    }

    fn activate(&self, mut activation: Activation) -> Result<Box<dyn Active>, DeviceError> {
        let queue = activation.take_queue(0)?;
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)
            .map_err(|e| DeviceError::host("a timer")(e.into()))?;
        if !self.restored.swap(false, Ordering::SeqCst) {
            self.watching.store(false, Ordering::SeqCst);
        }
        let handler = Guard {
            name: self.name.clone(),
            queue,
            timer,
            machine: Arc::clone(&self.machine),
            patience: self.patience,
            watching: Arc::clone(&self.watching),
        };
        Ok(Box::new(Worker::start(&self.name, Box::new(handler), activation.interrupt)?))
    }

    fn save(&self) -> Result<Saved, String> {
        Ok(self.watching.load(Ordering::SeqCst).into())
    }

    fn restore(&self, saved: &Saved) -> Result<(), String> {
        self.watching.store(saved.as_bool().unwrap_or(false), Ordering::SeqCst);
        self.restored.store(true, Ordering::SeqCst);
        Ok(())
    }
}

struct Guard {
    name: String,
    queue: ActiveQueue,
    timer: std::os::fd::OwnedFd,
    machine: Arc<CurrentMachine>,
    patience: Duration,
    watching: Arc<AtomicBool>,
}

impl Guard {
    /// Fires after `time`, or never.
    fn set_timer(&self, time: Duration) -> Result<(), DeviceError> {
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let seconds = i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
        let value = Timespec { tv_sec: seconds, tv_nsec: time.subsec_nanos().into() };
        let spec = Itimerspec { it_interval: zero, it_value: value };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &spec)
            .map(drop)
            .map_err(|e| DeviceError::host("setting the timer")(e.into()))
    }
}

impl Handler for Guard {
    fn doorbells(&self) -> Vec<(u16, Arc<EventFd>)> {
        vec![(self.queue.index(), Arc::clone(self.queue.kick()))]
    }

    fn start(&mut self, watch: &Watch) -> Result<(), DeviceError> {
        watch.add(&self.timer, EventSet::IN, 0).map_err(DeviceError::host("watching the timer"))
    }

    fn event(&mut self, event: Event, _watch: &Watch) -> Result<(), DeviceError> {
        match event {
            Event::Kick(_) => {
                let watching = &self.watching;
                self.queue.serve::<DeviceError>(|view, chain| {
                    watching.store(true, Ordering::SeqCst);
                    let mut writer = chain.writer(view);
                    // A chain without a byte to write is a sign of life all the same.
                    let _ = writer.write(&[SEEN]).map_err(DeviceError::host("answering a sign of life"))?;
                    let written = writer.written();
                    Ok(Served::Done(chain, written))
                })?;
                // Also after a pause, in which the guest could give none.
                if self.watching.load(Ordering::SeqCst) { self.set_timer(self.patience) } else { Ok(()) }
            }
            Event::Ready(..) => {
                let _ = rustix::io::read(&self.timer, &mut [0; 8]);
                warn!("device {}: the guest gives no sign of life; the machine is reset", self.name);
                if let Some(machine) = self.machine.get() {
                    machine.reset();
                }
                Ok(())
            }
        }
    }

    fn quiesce(&mut self) {
        if let Err(e) = self.set_timer(Duration::ZERO) {
            warn!("device {}: {e}", self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;
    use std::thread::sleep;

    use super::super::testing::{DriverQueue, Interrupts, activation, forms, memory};
    use super::*;

    #[derive(Default)]
    struct Resets(AtomicU32);

    impl MachineControl for Resets {
        fn power_off(&self) {}

        fn reset(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn a_guest_that_falls_silent_after_a_sign_of_life_is_reset_but_not_while_it_is_paused() {
        let (memory, interrupts) = (memory(), Arc::new(Interrupts::default()));
        let resets = Arc::new(Resets::default());
        let machine = Arc::new(CurrentMachine::default());
        machine.set(Arc::downgrade(&resets) as _);
        let patience = Duration::from_millis(300);
        let watchdog = Watchdog { patience, ..Watchdog::new("__watchdog", machine) };
        let mut queues = [DriverQueue::new(&memory, 0x10_0000, 8, forms()[3])];
        let active = watchdog.activate(activation(&memory, F_RINGS, &queues, &interrupts)).unwrap();
        let count = || resets.0.load(Ordering::SeqCst);
        sleep(patience * 2);
        assert_eq!(count(), 0, "nobody has said that there is a guest that lives");
        for _ in 0..5 {
            queues[0].add(&[(0x20_0000, 1, true)]);
            queues[0].ring();
            assert!(matches!(queues[0].wait_used(), Some((_, 1))));
            sleep(patience / 3);
        }
        active.pause();
        sleep(patience * 2);
        assert_eq!(count(), 0);
        active.resume();
        sleep(patience * 3);
        assert_eq!(count(), 1, "once");
    }
}
