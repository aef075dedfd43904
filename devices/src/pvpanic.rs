//! The panic device: a PCI function with one register, to which the guest's kernel writes that it has panicked (QEMU's
//! `docs/specs/pvpanic.rst`, the PCI form). Linux' driver is `pvpanic-pci`.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use log::{debug, warn};
use pci::assign::FunctionNeeds;
use pci::bar::{Bar, BarError, BarKind, BarRegisters};
use pci::config::{ConfigSpace, Identity};
use pci::function::BarIndex;
use pci::window::{BarWindow, Placement};
use pci::{DevFn, PciFunction, regs};

use crate::emulated::{EmulatedFunction, Header, Saved};

const BAR: BarIndex = 0;
/// The smallest that memory can have; the register is its first byte.
const BAR_SIZE: u64 = 16;
const REGISTER: u64 = 0;

const IDENTITY: Identity =
    Identity { vendor: 0x1b36, device: 0x0011, revision: 1, class: 0x08_8000, subsystem: (0x1af4, 0x1100) };

/// The guest's kernel has panicked.
const PANICKED: u8 = 1 << 0;
/// It has, and goes on in a kernel that was loaded for that case and writes a dump.
const CRASH_LOADED: u8 = 1 << 1;

/// A kernel panics once. Whoever writes more often gets no more than so many events and lines in the log.
const EVENTS_MAX: u32 = 16;

/// What the guest says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Panic {
    /// Its kernel has panicked.
    Panicked,
    /// Its kernel has panicked, and another one will write a dump.
    CrashLoaded,
    /// Something that this device has not offered.
    Unknown,
}

impl fmt::Display for Panic {
    /// As Cloud Hypervisor's event has it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Panicked => "panic",
            Self::CrashLoaded => "crash_loaded",
            Self::Unknown => "unknown_event",
        })
    }
}

impl From<u8> for Panic {
    fn from(value: u8) -> Self {
        match value {
            PANICKED => Self::Panicked,
            CRASH_LOADED => Self::CrashLoaded,
            _ => Self::Unknown,
        }
    }
}

/// Who is told.
pub trait PanicSink: fmt::Debug + Send + Sync {
    /// The guest has panicked. Called from a vCPU thread; must not wait.
    fn panicked(&self, panic: Panic);
}

/// The device.
#[derive(Debug)]
pub struct PvPanic {
    name: String,
    devfn: DevFn,
    window: Arc<BarWindow>,
    sink: Arc<dyn PanicSink>,
    told: AtomicU32,
    this: Weak<Self>,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: ConfigSpace,
    bars: BarRegisters,
    placement: Option<(Bar, Placement)>,
}

impl PvPanic {
    /// A device at `devfn` whose BAR is decoded in `window`, memory below 4 GiB.
    ///
    /// # Errors
    /// The BAR cannot be: a mistake of the code.
    pub fn new(
        name: &str,
        devfn: DevFn,
        window: Arc<BarWindow>,
        sink: Arc<dyn PanicSink>,
    ) -> Result<Arc<Self>, BarError> {
        let mut bars = BarRegisters::new();
        bars.add(BAR, BarKind::Mem32 { prefetchable: false }, BAR_SIZE)?;
        let config = ConfigSpace::endpoint(&IDENTITY);
        Ok(Arc::new_cyclic(|this| Self {
            name: name.to_owned(),
            devfn,
            window,
            sink,
            told: AtomicU32::new(0),
            this: Weak::clone(this),
            inner: Mutex::new(Inner { config, bars, placement: None }),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Brings what is decoded in step with the registers.
    fn decode(&self, inner: &mut Inner) {
        let command = inner.config.registers().u16(regs::COMMAND);
        let wanted = inner.bars.decoded(command).next();
        if inner.placement.as_ref().map(|(bar, _)| *bar) == wanted {
            return;
        }
        inner.placement = None;
        let Some(bar) = wanted else { return };
        let function: Weak<dyn PciFunction> = Weak::clone(&self.this) as _;
        match self.window.place(bar.base, bar.size, function, BAR) {
            Ok(placement) => inner.placement = Some((bar, placement)),
            Err(e) => debug!("device {}: its BAR is not decoded: {e}", self.name),
        }
    }
}

impl PciFunction for PvPanic {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        let inner = self.lock();
        inner.config.read(offset, data);
        if BarRegisters::covers(offset) {
            inner.bars.read(offset, data);
        }
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let mut inner = self.lock();
        if BarRegisters::covers(offset) {
            inner.bars.write(offset, data);
        } else {
            inner.config.write(offset, data);
        }
        self.decode(&mut inner);
    }

    /// What the device takes, by which a driver knows what to write.
    fn bar_read(&self, _bar: BarIndex, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (REGISTER, Some(first)) = (offset, data.first_mut()) {
            *first = PANICKED | CRASH_LOADED;
        }
    }

    fn bar_write(&self, _bar: BarIndex, offset: u64, data: &[u8]) {
        let (REGISTER, Some(&value)) = (offset, data.first()) else { return };
        let told = self.told.load(Ordering::Relaxed);
        if told >= EVENTS_MAX {
            return;
        }
        // Two vCPUs at once may be told of once more than that; nobody minds.
        self.told.store(told.saturating_add(1), Ordering::Relaxed);
        let panic = Panic::from(value);
        warn!("device {}: the guest's kernel has panicked ({panic})", self.name);
        self.sink.panicked(panic);
    }
}

impl EmulatedFunction for PvPanic {
    fn name(&self) -> &str {
        &self.name
    }

    fn devfn(&self) -> DevFn {
        self.devfn
    }

    fn needs(&self) -> FunctionNeeds {
        FunctionNeeds::of(self.devfn, &self.lock().bars)
    }

    fn bars(&self) -> Vec<Bar> {
        self.lock().bars.iter().collect()
    }

    fn save(&self) -> Result<Saved, String> {
        let inner = self.lock();
        serde_json::to_value(Header::save(&inner.config, &inner.bars)).map_err(|e| e.to_string())
    }

    fn restore(&self, saved: &Saved) -> Result<(), String> {
        let header: Header = serde_json::from_value(saved.clone()).map_err(|e| e.to_string())?;
        let mut inner = self.lock();
        let Inner { config, bars, .. } = &mut *inner;
        header.restore(config, bars);
        self.decode(&mut inner);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: u64 = 0xc000_0000;

    #[derive(Debug, Default)]
    struct Told(Mutex<Vec<String>>);

    impl PanicSink for Told {
        fn panicked(&self, panic: Panic) {
            self.0.lock().unwrap().push(panic.to_string());
        }
    }

    fn device() -> (Arc<PvPanic>, Arc<BarWindow>, Arc<Told>) {
        let window = Arc::new(BarWindow::new(WINDOW, 0x1000_0000).unwrap());
        let told = Arc::new(Told::default());
        let devfn = DevFn::new(3, 0).unwrap();
        let device = PvPanic::new("__pvpanic", devfn, Arc::clone(&window), told.clone()).unwrap();
        (device, window, told)
    }

    /// As firmware does: an address, then the command register.
    fn switch_on(device: &PvPanic) {
        device.config_write(0x10, &(0xc001_0000_u32).to_le_bytes());
        device.config_write(4, &[2, 0]);
    }

    #[test]
    fn it_is_the_device_that_linux_knows_and_needs_16_bytes() {
        let (device, ..) = device();
        let mut data = [0; 12];
        device.config_read(0, &mut data);
        assert_eq!((&data[..4], &data[9..]), (&[0x36, 0x1b, 0x11, 0][..], &[0, 0x80, 0x08][..]));
        device.config_write(0x10, &[0xff; 4]);
        let mut size = [0; 4];
        device.config_read(0x10, &mut size);
        assert_eq!(u32::from_le_bytes(size), 0xffff_fff0);
        assert_eq!(device.needs().bars, [(0, BarKind::Mem32 { prefetchable: false }, 16)]);
    }

    #[test]
    fn a_write_to_the_register_is_told_by_its_name_and_nothing_else_is() {
        let (device, window, told) = device();
        window.write(0xc001_0000, &[1]);
        assert!(told.0.lock().unwrap().is_empty(), "not decoded yet");
        switch_on(&device);
        let mut data = [0];
        window.read(0xc001_0000, &mut data);
        assert_eq!(data, [3]);
        window.read(0xc001_0001, &mut data);
        assert_eq!(data, [0]);
        for (offset, value) in [(0, 1), (0, 2), (0, 0xff), (1, 1), (15, 1)] {
            window.write(0xc001_0000 + offset, &[value]);
        }
        assert_eq!(*told.0.lock().unwrap(), ["panic", "crash_loaded", "unknown_event"]);
        device.config_write(4, &[0, 0]);
        window.write(0xc001_0000, &[1]);
        assert_eq!(told.0.lock().unwrap().len(), 3, "memory space is off");
    }

    #[test]
    fn a_guest_that_never_stops_panicking_is_told_of_a_few_times() {
        let (device, window, told) = device();
        switch_on(&device);
        (0..10_000).for_each(|_| window.write(0xc001_0000, &[1]));
        assert_eq!(told.0.lock().unwrap().len(), 16);
    }
}
