//! A function for tests that writes down what reaches it.

use std::fmt;
use std::sync::{Arc, Mutex};

use crate::bdf::DevFn;
use crate::function::{BarIndex, PciBridge, PciFunction};

type Hook = Box<dyn FnMut() + Send>;

/// Reads as zero everywhere, and keeps a log of every access.
#[derive(Default)]
pub(crate) struct Recorder {
    log: Mutex<Vec<String>>,
    bar_write_hook: Mutex<Option<Hook>>,
}

impl Recorder {
    pub(crate) fn new() -> Arc<Self> {
        Arc::default()
    }

    /// What happened since the last call.
    pub(crate) fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.log.lock().unwrap())
    }

    pub(crate) fn on_bar_write(&self, hook: impl FnMut() + Send + 'static) {
        *self.bar_write_hook.lock().unwrap() = Some(Box::new(hook));
    }

    fn note(&self, what: String) {
        self.log.lock().unwrap().push(what);
    }
}

impl fmt::Debug for Recorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Recorder")
    }
}

impl PciFunction for Recorder {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0);
        self.note(format!("config read {offset:x} {}", data.len()));
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        self.note(format!("config write {offset:x} {data:x?}"));
    }

    fn bar_read(&self, bar: BarIndex, offset: u64, data: &mut [u8]) {
        data.fill(0);
        self.note(format!("bar {bar} read {offset:x} {}", data.len()));
    }

    fn bar_write(&self, bar: BarIndex, offset: u64, data: &[u8]) {
        self.note(format!("bar {bar} write {offset:x} {data:?}"));
        if let Some(hook) = self.bar_write_hook.lock().unwrap().as_mut() {
            hook();
        }
    }
}

/// A bridge with one function below it and bus numbers set by the test.
#[derive(Debug)]
pub(crate) struct FakeBridge {
    range: Mutex<(u8, u8)>,
    child: (DevFn, Arc<Recorder>),
}

impl FakeBridge {
    pub(crate) fn new(devfn: DevFn, child: Arc<Recorder>) -> Arc<Self> {
        Arc::new(Self { range: Mutex::new((0, 0)), child: (devfn, child) })
    }

    pub(crate) fn set_bus_range(&self, secondary: u8, subordinate: u8) {
        *self.range.lock().unwrap() = (secondary, subordinate);
    }
}

impl PciFunction for FakeBridge {
    fn config_read(&self, _offset: u16, data: &mut [u8]) {
        data.fill(0);
    }

    fn config_write(&self, _offset: u16, _data: &[u8]) {}

    fn bar_read(&self, _bar: BarIndex, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn bar_write(&self, _bar: BarIndex, _offset: u64, _data: &[u8]) {}
}

impl PciBridge for FakeBridge {
    fn bus_range(&self) -> (u8, u8) {
        *self.range.lock().unwrap()
    }

    fn child(&self, devfn: DevFn) -> Option<Arc<dyn PciFunction>> {
        (devfn == self.child.0).then(|| Arc::clone(&self.child.1) as Arc<dyn PciFunction>)
    }
}
