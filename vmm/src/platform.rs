//! The devices of the platform itself, at places that are the same in every machine: serial port, clocks, power management registers, the event device.

use std::sync::Arc;

use arch::layout;
use devices::event_device::{EventDevice, EventState};
use devices::i8042::{I8042, PORTS as I8042_PORTS};
use devices::pm_timer::{PORTS as PM_TIMER_PORTS, PmTimer};
use devices::pm1::{PORTS as PM1_PORTS, Pm1Device, Pm1State};
use devices::reset::{MachineControl, ResetRegister};
use devices::rtc::{PORTS as RTC_PORTS, Rtc, RtcState};
use devices::serial::debug_console::{DebugConsole, PORTS as DEBUG_CONSOLE_PORTS};
use devices::serial::{PORTS as SERIAL_PORTS, Serial, SerialState};
use serde::{Deserialize, Serialize};

use crate::buses::Buses;
use crate::config::VmConfig;
use crate::control::Control;
use crate::event_loop::Subscriber;
use crate::irq::{Gsi, IrqRouter};
use crate::machine::{Lifetime, MachineError, resources};
use crate::snapshot::SnapshotError;

/// The devices.
#[derive(Debug)]
pub struct Platform {
    serial: Option<Arc<Serial>>,
    pm_timer: Arc<PmTimer>,
    pm1: Arc<Pm1Device>,
    /// The clock.
    pub rtc: Arc<Rtc>,
    /// Where the guest hears of events.
    pub event_device: Arc<EventDevice>,
}

/// What is saved of them.
#[derive(Debug, Serialize, Deserialize)]
pub struct PlatformState {
    serial: Option<SerialState>,
    pm_timer: u64,
    pm1: Pm1State,
    rtc: RtcState,
    event_device: EventState,
}

impl Platform {
    /// Makes them and puts them on the buses. Those that wait for something are added to `subscribers`.
    pub fn new(
        config: &VmConfig,
        lifetime: &Lifetime,
        router: &IrqRouter,
        control: &Arc<Control>,
        buses: &mut Buses,
        subscribers: &mut Vec<Subscriber>,
    ) -> Result<Self, MachineError> {
        let as_control = || Arc::clone(control) as Arc<dyn MachineControl>;
        let line = |gsi: u32| {
            router.edge_line(Gsi(gsi)).map_err(resources("the interrupt line of a platform device"))
        };
        let mut serial = None;
        if let Some(backend) = &lifetime.console {
            let port = Arc::new(Serial::new(line(layout::SERIAL_GSI)?, Arc::clone(backend))?);
            buses.pio("serial port", layout::SERIAL_PORT, SERIAL_PORTS, Arc::clone(&port) as _)?;
            subscribers.push(Arc::clone(&port) as _);
            serial = Some(port);
        }
        if let Some(backend) = &lifetime.debug_console {
            let console = Arc::new(DebugConsole::new(Arc::clone(backend)));
            let port = config.debug_console.port();
            buses.pio("debug console", port, DEBUG_CONSOLE_PORTS, Arc::clone(&console) as _)?;
            subscribers.push(console);
        }
        let pm_timer = Arc::new(PmTimer::new());
        buses.pio("PM timer", layout::PM_TIMER_PORT, PM_TIMER_PORTS, Arc::clone(&pm_timer) as _)?;
        let pm1 = Arc::new(Pm1Device::new(line(layout::SCI_GSI)?, as_control()));
        let alarm = Arc::clone(&pm1);
        let rtc = Rtc::new(line(layout::RTC_GSI)?, lifetime.battery.clone())?;
        let rtc = Arc::new(rtc.on_alarm(move || alarm.clock_alarm()));
        buses.pio("real-time clock", layout::CMOS_PORT, RTC_PORTS, Arc::clone(&rtc) as _)?;
        subscribers.push(Arc::clone(&rtc) as _);
        buses.pio("PM1 registers", layout::PM1_EVENT_PORT, PM1_PORTS, Arc::clone(&pm1) as _)?;
        let i8042 = Arc::new(I8042::new(as_control()));
        buses.pio("keyboard controller", layout::I8042_PORT, I8042_PORTS, i8042)?;
        let (at, register) = (layout::RESET_REGISTER, Arc::new(ResetRegister::new(as_control())));
        buses.mmio("reset register", at.start.0, at.len, register)?;
        let releases = Arc::clone(control) as _;
        let event_device = EventDevice::new(line(layout::EVENT_DEVICE_GSI)?, releases);
        let event_device = Arc::new(event_device.with_segments(config.segment_count()));
        let at = layout::EVENT_DEVICE;
        buses.mmio("event device", at.start.0, at.len, Arc::clone(&event_device) as _)?;
        Ok(Self { serial, pm_timer, pm1, rtc, event_device })
    }

    /// What must go on elsewhere as it is here.
    pub fn save(&self) -> PlatformState {
        PlatformState {
            serial: self.serial.as_ref().map(|serial| serial.save()),
            pm_timer: self.pm_timer.save(),
            pm1: self.pm1.save(),
            rtc: self.rtc.save(),
            event_device: self.event_device.save(),
        }
    }

    /// Goes on as saved.
    pub fn restore(&self, saved: &PlatformState) -> Result<(), SnapshotError> {
        let failed = |what, why: String| SnapshotError::Device { id: what, why };
        if let (Some(serial), Some(saved)) = (&self.serial, &saved.serial) {
            serial.restore(saved).map_err(|e| failed("the serial port".to_owned(), e.to_string()))?;
        }
        self.pm_timer.restore(saved.pm_timer);
        self.pm1.restore(&saved.pm1);
        if !self.rtc.restore(&saved.rtc) {
            return Err(failed("the real-time clock".to_owned(), "its memory has another size".to_owned()));
        }
        self.event_device.restore(&saved.event_device);
        Ok(())
    }
}
