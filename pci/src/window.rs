//! A window of guest addresses that the VMM gave to PCI, and the BARs that are decoded in it now.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};

use vm_device::bus::{MmioAddress, MmioAddressOffset, PioAddress, PioAddressOffset};
use vm_device::{DeviceMmio, DevicePio};

use crate::function::{BarIndex, PciFunction};

/// Why a BAR cannot be decoded where the guest put it. The guest's doing: let the BAR answer nowhere and go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlaceError {
    /// Not inside the window, so it could lie over RAM or another device.
    #[error("{size:#x} bytes at {start:#x} do not lie in the window {window_start:#x} to {window_last:#x}")]
    Outside {
        /// First address asked for.
        start: u64,
        /// Bytes asked for.
        size: u64,
        /// First address of the window.
        window_start: u64,
        /// Last address of the window.
        window_last: u64,
    },
    /// Another BAR is there.
    #[error("{size:#x} bytes at {start:#x} overlap a BAR that is decoded at {other:#x}")]
    Overlap {
        /// First address asked for.
        start: u64,
        /// Bytes asked for.
        size: u64,
        /// First address of the other BAR.
        other: u64,
    },
}

struct Placed {
    last: u64,
    function: Weak<dyn PciFunction>,
    bar: BarIndex,
}

type Map = RwLock<BTreeMap<u64, Placed>>;

/// One window, whole: it sits on the VMM's bus as a single device and finds the function itself.
///
/// What hits no BAR, or runs over a BAR's end, reads all ones and is dropped. The window's lock is never held while a
/// function is called, so a function may place and remove its BARs from any of its methods. For the same reason an access may still
/// arrive at a BAR while it is being moved; the function decides by its own state.
pub struct BarWindow {
    start: u64,
    last: u64,
    map: Arc<Map>,
}

impl BarWindow {
    /// A window of `size` bytes from `start`. `None` if it is empty or passes the end of the address space.
    pub fn new(start: u64, size: u64) -> Option<Self> {
        let last = start.checked_add(size.checked_sub(1)?)?;
        Some(Self { start, last, map: Arc::default() })
    }

    /// First address.
    pub const fn start(&self) -> u64 {
        self.start
    }

    /// Last address.
    pub const fn last(&self) -> u64 {
        self.last
    }

    /// Decodes `size` bytes from `start` to a function's BAR, until the returned [`Placement`] is dropped.
    pub fn place(
        &self,
        start: u64,
        size: u64,
        function: Weak<dyn PciFunction>,
        bar: BarIndex,
    ) -> Result<Placement, PlaceError> {
        let last = size.checked_sub(1).and_then(|size| start.checked_add(size));
        let inside = last.filter(|&last| start >= self.start && last <= self.last);
        let (window_start, window_last) = (self.start, self.last);
        let last = inside.ok_or(PlaceError::Outside { start, size, window_start, window_last })?;
        let mut map = write(&self.map);
        let below = map.range(..=last).next_back();
        if let Some((&other, _)) = below.filter(|(_, placed)| placed.last >= start) {
            return Err(PlaceError::Overlap { start, size, other });
        }
        map.insert(start, Placed { last, function, bar });
        Ok(Placement { map: Arc::clone(&self.map), start, size })
    }

    /// Reads at an absolute guest address.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((function, bar, offset)) => function.bar_read(bar, offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes at an absolute guest address.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((function, bar, offset)) = self.find(address, data.len()) {
            function.bar_write(bar, offset, data);
        }
    }

    fn find(&self, address: u64, len: usize) -> Option<(Arc<dyn PciFunction>, BarIndex, u64)> {
        let last = address.checked_add(u64::try_from(len).ok()?.checked_sub(1)?)?;
        let (function, bar, start) = {
            let map = read(&self.map);
            let (&start, placed) =
                map.range(..=address).next_back().filter(|(_, placed)| last <= placed.last)?;
            (Weak::clone(&placed.function), placed.bar, start)
        };
        Some((function.upgrade()?, bar, address - start))
    }
}

impl fmt::Debug for BarWindow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BarWindow({:#x} to {:#x}, {} placed)", self.start, self.last, read(&self.map).len())
    }
}

impl DeviceMmio for BarWindow {
    fn mmio_read(&self, base: MmioAddress, offset: MmioAddressOffset, data: &mut [u8]) {
        match base.0.checked_add(offset) {
            Some(address) => self.read(address, data),
            None => data.fill(0xff),
        }
    }

    fn mmio_write(&self, base: MmioAddress, offset: MmioAddressOffset, data: &[u8]) {
        if let Some(address) = base.0.checked_add(offset) {
            self.write(address, data);
        }
    }
}

impl DevicePio for BarWindow {
    fn pio_read(&self, base: PioAddress, offset: PioAddressOffset, data: &mut [u8]) {
        self.read(u64::from(base.0) + u64::from(offset), data);
    }

    fn pio_write(&self, base: PioAddress, offset: PioAddressOffset, data: &[u8]) {
        self.write(u64::from(base.0) + u64::from(offset), data);
    }
}

/// A BAR decoded in a window. Dropping it ends that.
#[must_use = "dropping a placement ends it"]
pub struct Placement {
    map: Arc<Map>,
    start: u64,
    size: u64,
}

impl Placement {
    /// First address.
    pub const fn start(&self) -> u64 {
        self.start
    }

    /// Bytes.
    pub const fn size(&self) -> u64 {
        self.size
    }
}

impl fmt::Debug for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Placement({:#x} bytes at {:#x})", self.size, self.start)
    }
}

impl Drop for Placement {
    fn drop(&mut self) {
        write(&self.map).remove(&self.start);
    }
}

// The map is whole between any two statements that can panic, so a poisoned lock is as good as another.
fn read(map: &Map) -> RwLockReadGuard<'_, BTreeMap<u64, Placed>> {
    map.read().unwrap_or_else(PoisonError::into_inner)
}

fn write(map: &Map) -> RwLockWriteGuard<'_, BTreeMap<u64, Placed>> {
    map.write().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Recorder;

    fn window() -> BarWindow {
        BarWindow::new(0x1000, 0x9000).unwrap()
    }

    fn weak(function: &Arc<Recorder>) -> Weak<dyn PciFunction> {
        Arc::downgrade(&(Arc::clone(function) as Arc<dyn PciFunction>))
    }

    fn byte(window: &BarWindow, address: u64) -> u8 {
        let mut data = [0x55];
        window.mmio_read(MmioAddress(window.start()), address.wrapping_sub(window.start()), &mut data);
        data[0]
    }

    #[test]
    fn accesses_reach_the_bar_that_is_placed_there_and_nothing_else_answers() {
        let (window, function) = (window(), Recorder::new());
        let placement = window.place(0x2000, 0x1000, weak(&function), 2).unwrap();
        assert_eq!((placement.start(), placement.size()), (0x2000, 0x1000));
        window.mmio_write(MmioAddress(0x1000), 0x1ffc, &[1, 2, 3, 4]);
        assert_eq!(function.take(), ["bar 2 write ffc [1, 2, 3, 4]"]);
        assert_eq!(byte(&window, 0x2010), 0);
        assert_eq!(function.take(), ["bar 2 read 10 1"]);
        for nowhere in [0x1fff, 0x3000, 0x1000, 0x9fff, u64::MAX] {
            assert_eq!(byte(&window, nowhere), 0xff);
        }
        assert_eq!(function.take(), [""; 0]);
    }

    #[test]
    fn accesses_over_an_end_of_a_bar_read_all_ones_and_are_dropped() {
        let (window, function) = (window(), Recorder::new());
        let _low = window.place(0x2000, 0x1000, weak(&function), 0).unwrap();
        let _high = window.place(0x3000, 0x1000, weak(&function), 1).unwrap();
        for address in [0x1ffc, 0x2ffc, 0x3ffc, u64::MAX - 2] {
            let mut data = [0; 8];
            window.read(address, &mut data);
            assert_eq!(data, [0xff; 8]);
            window.write(address, &data);
        }
        window.read(0x2000, &mut []);
        assert_eq!(function.take(), [""; 0]);
    }

    #[test]
    fn a_bar_outside_the_window_is_refused() {
        let (window, function) = (window(), Recorder::new());
        for (start, size) in [
            (0, 0x1000),
            (0xfff, 2),
            (0x9fff, 2),
            (0xa000, 0x1000),
            (0, u64::MAX),
            (0x2000, 0),
            (u64::MAX, 2),
            (0x1000, 0x9001),
        ] {
            let error = window.place(start, size, weak(&function), 0).unwrap_err();
            assert!(matches!(error, PlaceError::Outside { .. }), "{start:#x} {size:#x}");
        }
        assert!(window.place(0x1000, 0x9000, weak(&function), 0).is_ok());
    }

    #[test]
    fn an_overlapping_bar_is_refused_until_the_other_is_gone() {
        let (window, function) = (window(), Recorder::new());
        let placement = window.place(0x3000, 0x1000, weak(&function), 0).unwrap();
        for (start, size) in
            [(0x3000, 0x1000), (0x2000, 0x8000), (0x3800, 0x10), (0x2ff0, 0x20), (0x3ff0, 0x20)]
        {
            let error = window.place(start, size, weak(&function), 1).unwrap_err();
            assert_eq!(error, PlaceError::Overlap { start, size, other: 0x3000 });
        }
        let _neighbours = [
            window.place(0x2000, 0x1000, weak(&function), 2),
            window.place(0x4000, 0x1000, weak(&function), 3),
        ]
        .map(Result::unwrap);
        drop(placement);
        assert_eq!(byte(&window, 0x3000), 0xff);
        assert!(window.place(0x3000, 0x1000, weak(&function), 1).is_ok());
    }

    #[test]
    fn a_function_that_is_gone_answers_nothing() {
        let (window, function) = (window(), Recorder::new());
        let _placement = window.place(0x3000, 0x1000, weak(&function), 0).unwrap();
        drop(function);
        assert_eq!(byte(&window, 0x3000), 0xff);
    }

    #[test]
    fn ports_are_routed_the_same_way() {
        let (window, function) = (BarWindow::new(0xc000, 0x4000).unwrap(), Recorder::new());
        let _placement = window.place(0xffe0, 0x20, weak(&function), 4).unwrap();
        window.pio_write(PioAddress(0xc000), 0x3ffc, &[7, 0, 0, 0]);
        assert_eq!(function.take(), ["bar 4 write 1c [7, 0, 0, 0]"]);
        let mut data = [0; 4];
        window.pio_read(PioAddress(0xc000), 0x3ffe, &mut data);
        assert_eq!(data, [0xff; 4]);
    }

    #[test]
    fn a_function_may_move_its_bar_from_within_an_access() {
        let window = Arc::new(window());
        let function = Recorder::new();
        let placement = window.place(0x3000, 0x1000, weak(&function), 0).unwrap();
        let (inner, again) = (Arc::clone(&window), weak(&function));
        let mut placement = Some(placement);
        function.on_bar_write(move || {
            drop(placement.take());
            placement = inner.place(0x5000, 0x1000, Weak::clone(&again), 0).ok();
            assert!(placement.is_some());
        });
        window.write(0x3000, &[0]);
        assert_eq!(byte(&window, 0x3000), 0xff);
        assert_eq!(byte(&window, 0x5000), 0);
    }

    #[test]
    fn an_empty_or_endless_window_is_refused() {
        assert!(BarWindow::new(0, 0).is_none());
        assert!(BarWindow::new(u64::MAX, 2).is_none());
        assert_eq!(BarWindow::new(u64::MAX, 1).unwrap().last(), u64::MAX);
    }
}
