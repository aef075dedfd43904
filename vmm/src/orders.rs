//! What operators want done, on its way from the API's threads to the main thread, which alone changes machines.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};

use log::error;
use rustix::event::{EventfdFlags, eventfd};
use vfio_pm::PolicyChange;

use crate::config::{DeviceConfig, RestoreConfig, VmConfig};
use crate::vm_error::VmError;

/// One thing to do. Cloud Hypervisor's names, where it has the same.
#[derive(Debug)]
pub enum Order {
    /// Keep this configuration.
    Create(Box<VmConfig>),
    /// Start the machine, or go on with a paused one.
    Boot,
    /// Forget the configuration; ends the machine first.
    Delete,
    /// End the machine and keep the configuration.
    Shutdown,
    /// End the machine and start it again.
    Reboot,
    /// Take the vCPUs out of the guest.
    Pause,
    /// Put them back.
    Resume,
    /// Press the power button.
    PowerButton,
    /// Send a non-maskable interrupt.
    Nmi,
    /// Change numbers of what a machine has.
    Resize(Resize),
    /// Change the size of a memory zone, in bytes.
    ResizeZone(String, u64),
    /// Add an assigned device.
    AddDevice(Box<DeviceConfig>),
    /// Add one of the machine's own devices.
    AddEmulated(Addition),
    /// Change the size of a disk.
    ResizeDisk {
        /// Its name.
        id: String,
        /// Bytes.
        size: u64,
    },
    /// Write the paused machine to this directory, an URL.
    Snapshot(String),
    /// Go on from such a directory.
    Restore(Box<RestoreConfig>),
    /// Take a device out again.
    RemoveDevice(String),
    /// Change how a device's power is handled.
    PowerPolicy(String, PolicyChange),
    /// End the VMM.
    End,
}

/// A device that is to be added, as what makes it part of a configuration.
pub struct Addition(pub Box<dyn FnOnce(&mut VmConfig) + Send>);

impl fmt::Debug for Addition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Addition")
    }
}

/// New numbers; what is absent stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resize {
    /// vCPUs.
    pub vcpus: Option<u32>,
    /// RAM in bytes.
    pub ram: Option<u64>,
    /// Size of the balloon in bytes.
    pub balloon: Option<u64>,
}

/// What came of an order.
#[derive(Debug, PartialEq, Eq)]
pub enum Completion {
    /// It is done, or has begun where it takes the guest to end it.
    Plain,
    /// A device has been put there.
    Device {
        /// Its name.
        id: String,
        /// Where the guest finds it.
        bdf: String,
    },
    /// The policy in force.
    Policy(PolicyChange),
}

/// Where the answer goes. An order that is dropped unanswered answers that the VMM is ending.
#[derive(Debug)]
pub struct Waiter(SyncSender<Result<Completion, VmError>>);

impl Waiter {
    /// Tells who has asked.
    pub fn answer(self, result: Result<Completion, VmError>) {
        // Who does not wait any more does not want to know.
        let _ = self.0.send(result);
    }
}

/// The queue. Orders are carried out one by one, in the order of their arrival.
#[derive(Debug)]
pub struct Orders {
    queue: Mutex<Option<VecDeque<(Order, Waiter)>>>,
    event: OwnedFd,
}

impl Orders {
    /// An empty queue.
    pub fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { queue: Mutex::new(Some(VecDeque::new())), event })
    }

    /// Readable while there are orders.
    pub fn event(&self) -> &OwnedFd {
        &self.event
    }

    /// Queues an order and waits until it has been carried out.
    pub fn place(&self, order: Order) -> Result<Completion, VmError> {
        let (sender, receiver): (_, Receiver<_>) = sync_channel(1);
        {
            let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
            queue.as_mut().ok_or(VmError::Ending)?.push_back((order, Waiter(sender)));
            // Under the lock, as is its reading: the descriptor is readable while there are orders, and only then. Readable without any, it
            // would keep the main loop from sleeping.
            if let Err(e) = rustix::io::write(&self.event, &1_u64.to_ne_bytes()) {
                error!("the main loop cannot be woken: {e}");
            }
        }
        receiver.recv().unwrap_or(Err(VmError::Ending))
    }

    /// Whether there are orders.
    pub fn are_waiting(&self) -> bool {
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.as_ref().is_some_and(|queue| !queue.is_empty())
    }

    /// The next one.
    pub fn take(&self) -> Option<(Order, Waiter)> {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let queue = queue.as_mut()?;
        let order = queue.pop_front();
        if queue.is_empty() {
            // Nothing to read is as good: it is the queue that counts.
            let _ = rustix::io::read(&self.event, &mut [0; 8]);
        }
        order
    }

    /// Refuses all that wait and all that come: nobody will carry them out.
    pub fn close(&self) {
        drop(self.queue.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use super::*;

    #[test]
    fn orders_are_taken_one_by_one_and_answered() {
        let orders = Arc::new(Orders::new().unwrap());
        let placing = Arc::clone(&orders);
        let client = thread::spawn(move || placing.place(Order::Boot));
        while !orders.are_waiting() {
            thread::yield_now();
        }
        let (order, waiter) = orders.take().unwrap();
        assert!(matches!(order, Order::Boot));
        assert!(
            !orders.are_waiting() && rustix::io::read(orders.event(), &mut [0; 8]).is_err(),
            "nothing is left to be woken for"
        );
        waiter.answer(Ok(Completion::Plain));
        assert_eq!(client.join().unwrap().unwrap(), Completion::Plain);
    }

    #[test]
    fn who_waits_when_the_vmm_ends_is_told_and_who_comes_later_too() {
        let orders = Arc::new(Orders::new().unwrap());
        let placing = Arc::clone(&orders);
        let client = thread::spawn(move || placing.place(Order::Boot));
        while !orders.are_waiting() {
            thread::yield_now();
        }
        orders.close();
        assert!(matches!(client.join().unwrap(), Err(VmError::Ending)));
        assert!(matches!(orders.place(Order::Pause), Err(VmError::Ending)));
    }
}
