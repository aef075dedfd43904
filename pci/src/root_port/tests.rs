//! Tests of the root port.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::cap::vectors::fake::FakeAllocator;
use crate::interrupt::MsiMessage;
use crate::testing::Recorder;

fn port() -> (RootPort, Arc<FakeAllocator>) {
    let allocator = FakeAllocator::new();
    let devfn = DevFn::new(1, 0).unwrap();
    (RootPort::new(devfn, 1, LinkSpeed::Gen1, allocator.clone()).unwrap(), allocator)
}

fn dword(port: &RootPort, offset: u16) -> u32 {
    let mut data = [0x55; 4];
    port.config_read(offset, &mut data);
    u32::from_le_bytes(data)
}

/// Where the guest finds a capability.
fn find(port: &RootPort, id: u8) -> u16 {
    let mut at = u16::from(dword(port, 0x34).to_le_bytes()[0]);
    while at != 0 {
        let [found, next, ..] = dword(port, at).to_le_bytes();
        if found == id {
            return at;
        }
        at = u16::from(next);
    }
    panic!("no capability {id:#x}");
}

/// Enables MSI and PME interrupts and numbers the bus, as a guest's port driver does.
fn set_up(port: &RootPort) {
    let (msi, pcie) = (find(port, regs::CAP_MSI), find(port, regs::CAP_PCIE));
    port.config_write(0x18, &[0, 1, 1, 0]);
    port.config_write(msi + 4, &0xfee0_1000u32.to_le_bytes());
    port.config_write(msi + 12, &[0x31, 0]);
    port.config_write(msi + 2, &[1, 0]);
    port.config_write(pcie + 0x1c, &[8, 0]);
}

fn function(number: u8) -> DevFn {
    DevFn::new(0, number).unwrap()
}

#[test]
fn the_guest_finds_every_capability_of_a_root_port() {
    let (port, _) = port();
    assert_eq!(dword(&port, 0), 0x000c_1b36);
    assert_eq!(dword(&port, 8), 0x0604_0000);
    assert_eq!(dword(&port, 0x0c) >> 16 & 0xff, 1);
    assert_eq!(dword(&port, find(&port, regs::CAP_PM)) >> 16, 0xc803, "PME from D0, D3hot and D3cold");
    assert_eq!(dword(&port, find(&port, regs::CAP_PCIE)) >> 16, 0x0042);
    assert_eq!(dword(&port, find(&port, regs::CAP_MSI)) >> 16, 0x0080);
    assert_eq!(dword(&port, find(&port, regs::CAP_SUBSYSTEM) + 4), 0x1100_1af4);
    assert_eq!(dword(&port, 0x3c) >> 8 & 0xff, 0, "no INTx");
    assert_eq!(dword(&port, 0x100), 0, "no extended capabilities");
}

#[test]
fn a_pme_interrupts_the_guest_with_the_requester_on_the_secondary_bus() {
    let (port, allocator) = port();
    set_up(&port);
    assert!(port.pme(function(1)));
    let vector = allocator.vector(0);
    assert_eq!(vector.message(), Some(MsiMessage { address: 0xfee0_1000, data: 0x31 }));
    assert_eq!(vector.signals(), 1);
    assert_eq!(dword(&port, find(&port, regs::CAP_PCIE) + 0x20), 0x1_0101);
}

#[test]
fn a_second_pme_waits_for_the_guest_to_clear_the_first() {
    let (port, allocator) = port();
    set_up(&port);
    let status = find(&port, regs::CAP_PCIE) + 0x20;
    assert!(port.pme(function(0)) && port.pme(function(1)));
    assert_eq!(allocator.vector(0).signals(), 1);
    assert_eq!(dword(&port, status), 0x3_0100);
    port.config_write(status, &0x1_0000u32.to_le_bytes());
    assert_eq!(dword(&port, status), 0x1_0101);
    assert_eq!(allocator.vector(0).signals(), 1);
    port.config_write(status, &0x1_0000u32.to_le_bytes());
    assert_eq!(dword(&port, status) & 0x3_0000, 0);
    assert_eq!(allocator.vector(0).signals(), 0);
}

#[test]
fn a_pme_interrupts_although_the_port_sleeps_and_its_registers_answer() {
    let (port, allocator) = port();
    set_up(&port);
    port.config_write(find(&port, regs::CAP_PM) + 4, &[3, 1]);
    assert_eq!(port.power_state(), DState::D3Hot);
    port.power_off();
    assert_eq!(dword(&port, 0), 0x000c_1b36);
    assert!(port.pme(function(0)));
    assert_eq!(allocator.vector(0).signals(), 1);
    assert_eq!(dword(&port, find(&port, regs::CAP_PCIE) + 0x20), 0x1_0100);
    port.power_on();
    assert_eq!(port.power_state(), DState::D0);
    assert_eq!(port.bus_range(), (1, 1));
    assert_eq!(dword(&port, find(&port, regs::CAP_PM) + 4), 0x0108, "PME_En is kept");
}

#[test]
fn a_guest_that_does_not_take_pme_interrupts_is_reported() {
    let (port, _) = port();
    assert!(!port.pme(function(0)));
    let (msi, pcie) = (find(&port, regs::CAP_MSI), find(&port, regs::CAP_PCIE));
    port.config_write(pcie + 0x20, &0x1_0000u32.to_le_bytes());
    set_up(&port);
    assert!(port.pme(function(0)));
    port.config_write(msi + 2, &[0, 0]);
    assert!(!port.pme(function(0)), "MSI is off and there is no INTx");
    port.config_write(msi + 2, &[1, 0]);
    port.config_write(pcie + 0x20, &0x1_0000u32.to_le_bytes());
    port.config_write(pcie + 0x1c, &[0, 0]);
    assert!(!port.pme(function(0)));
}

#[test]
fn functions_below_are_found_on_the_secondary_bus_only_where_they_are() {
    let (port, _) = port();
    let below = Recorder::new();
    port.set_children(vec![(function(0), below.clone()), (function(3), below.clone())]).unwrap();
    port.config_write(0x19, &[5]);
    port.config_write(0x1a, &[7]);
    assert_eq!(port.bus_range(), (5, 7));
    port.child(function(3)).unwrap().config_read(0, &mut [0; 4]);
    assert_eq!(below.take(), ["config read 0 4"]);
    assert!(port.child(function(1)).is_none());
    assert_eq!(port.set_children(vec![]), Err(ChildrenError::AlreadySet));
}

#[test]
fn functions_that_cannot_stand_below_a_port_are_refused() {
    let (port, _) = port();
    let below = || Recorder::new() as Arc<dyn PciFunction>;
    let elsewhere = DevFn::new(1, 0).unwrap();
    assert_eq!(
        port.set_children(vec![(function(0), below()), (elsewhere, below())]),
        Err(ChildrenError::Device(elsewhere))
    );
    assert_eq!(
        port.set_children(vec![(function(0), below()), (function(0), below())]),
        Err(ChildrenError::Taken(function(0)))
    );
    assert_eq!(port.set_children(vec![(function(1), below())]), Err(ChildrenError::NoFunctionZero));
    assert_eq!(port.set_children(vec![(function(1), below()), (function(0), below())]), Ok(()));
}

#[test]
fn a_secondary_bus_reset_is_reported_once_when_it_begins() {
    let (port, _) = port();
    let port = Arc::new(port);
    let resets = Arc::new(AtomicUsize::new(0));
    let (inner, counter) = (Arc::downgrade(&port), Arc::clone(&resets));
    let hook: SecondaryResetHook = Box::new(move || {
        assert_eq!(inner.upgrade().unwrap().bus_range(), (0, 0), "the port's lock is free");
        counter.fetch_add(1, Ordering::Relaxed);
    });
    assert!(port.on_secondary_reset(hook));
    assert!(!port.on_secondary_reset(Box::new(|| {})));
    for byte in [0x40, 0x40, 0x42, 0x02, 0x00] {
        port.config_write(0x3e, &[byte, 0]);
    }
    assert_eq!(resets.load(Ordering::Relaxed), 1);
    port.config_write(0x3c, &[0xff; 4]);
    assert_eq!(resets.load(Ordering::Relaxed), 2);
    assert_eq!(dword(&port, 0x3c), 0x007f_00ff);
}

#[test]
fn no_access_of_any_kind_upsets_the_port() {
    let (port, _) = port();
    for offset in 0..=4096u16 {
        for len in 0..=9 {
            port.config_write(offset, &vec![0xff; len]);
            port.config_read(offset, &mut vec![0; len]);
        }
    }
    assert_eq!(dword(&port, 0), 0x000c_1b36);
    let mut data = [0; 4];
    port.bar_read(0, 0, &mut data);
    port.bar_write(6, u64::MAX, &data);
    assert_eq!(data, [0xff; 4]);
}
