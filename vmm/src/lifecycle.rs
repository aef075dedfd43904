//! The life of the VM on the main thread: what operators order and what the guest does, one after the other.
//!
//! There is a configuration or none; from a configuration there is a machine or none; a machine runs or is paused. Names, orders that
//! are refused, and events are Cloud Hypervisor's. A guest that switches itself off ends the VMM, unless it was told to stay.

mod memory;
mod plugging;
mod snapshot;

use std::sync::Arc;
use std::time::Instant;

use devices::rtc::Battery;
use devices::serial::Backend;
use kvm_ioctls::Kvm;
use log::{LevelFilter, info, warn};
use rustix::event::{PollFd, PollFlags, poll};
use vfio_pm::PolicyChange;

use crate::cli::ControlOptions;
use crate::config::{ConsoleMode, DeviceConfig, PayloadConfig, VmConfig};
use crate::control::StopReason;
use crate::emulated::{Shared, Unit, make_units};
use crate::event_loop::{Outcome, Signals};
use crate::events::Events;
use crate::machine::{Lifetime, Machine, MachineError};
use crate::multicall::Program;
use crate::orders::{Completion, Order, Orders, Resize};
use crate::running::Running;
use crate::snapshot::{MachineState, Saved};
use crate::status::{MachineView, Status, VmState};
use crate::vm_error::VmError;

/// The VM: at most one.
#[derive(Debug)]
struct Vm {
    config: VmConfig,
    machine: Option<(Running, Lifetime)>,
    paused: bool,
    /// Power policies that were changed since the VM booted.
    changed: Vec<Changed>,
}

/// A device whose power policy was changed while the VM ran. It boots again as it was, so that its guest has the same power resources
/// as before, and is changed then: built with `power=off` it could never be allowed to sleep again.
#[derive(Debug)]
struct Changed {
    as_booted: DeviceConfig,
    change: PolicyChange,
}

/// The main thread's own.
#[derive(Debug)]
pub struct Lifecycle {
    kvm: Arc<Kvm>,
    signals: Arc<Signals>,
    orders: Arc<Orders>,
    status: Arc<Status>,
    events: Events,
    /// Whether the VMM stays when the guest has switched itself off.
    stays: bool,
    /// Whether devices can come and go.
    hotplug: bool,
    vm: Option<Vm>,
}

/// Whether to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flow {
    Go,
    End,
}

impl Lifecycle {
    /// Without a VM yet.
    pub fn new(
        kvm: Kvm,
        signals: Signals,
        orders: Arc<Orders>,
        status: Arc<Status>,
        events: Events,
        options: &ControlOptions,
    ) -> Self {
        Self {
            kvm: Arc::new(kvm),
            signals: Arc::new(signals),
            orders,
            status,
            events,
            stays: options.no_shutdown,
            hotplug: options.api_socket.is_some(),
            vm: None,
        }
    }

    /// Creates and boots a VM: what the command line asks for.
    pub fn create_and_boot(&mut self, config: VmConfig) -> Result<(), VmError> {
        self.create(config)?;
        self.boot()
    }

    /// Runs until the VMM is to end.
    pub fn run(mut self) -> Result<(), VmError> {
        let result = self.serve();
        self.orders.close();
        self.delete();
        self.events.tell("vmm", "shutdown");
        result
    }

    fn serve(&mut self) -> Result<(), VmError> {
        loop {
            while let Some((order, waiter)) = self.orders.take() {
                if matches!(order, Order::End) {
                    // Answered once nothing is left that could be in a client's way.
                    self.end_machine();
                    waiter.answer(Ok(Completion::Plain));
                    return Ok(());
                }
                waiter.answer(self.carry_out(order));
            }
            let outcome = match self.vm.as_mut().and_then(|vm| vm.machine.as_mut()) {
                Some((running, _)) => running.wait()?,
                None => match self.wait_for_orders() {
                    Some(signal) => {
                        info!("signal {signal}: the VMM ends");
                        return Ok(());
                    }
                    None => Outcome::Orders,
                },
            };
            match outcome {
                Outcome::Stop(reason) => {
                    if self.stopped(reason)? == Flow::End {
                        return Ok(());
                    }
                }
                Outcome::Orders => {}
                Outcome::Releases => {
                    self.devices_released();
                    self.processors_answered();
                }
            }
        }
    }

    /// Sleeps until there are orders or a signal, which it returns.
    fn wait_for_orders(&self) -> Option<i32> {
        loop {
            if let Some(signal) = self.signals.pending() {
                return Some(signal);
            }
            if self.orders.are_waiting() {
                return None;
            }
            let mut watched = vec![PollFd::new(self.orders.event(), PollFlags::IN)];
            watched.extend(self.signals.descriptors().map(|pipe| PollFd::new(pipe, PollFlags::IN)));
            // Interrupted is as good as ready: everything is looked at again.
            let _ = poll(&mut watched, None);
        }
    }

    /// The machine has stopped by itself or by a signal.
    fn stopped(&mut self, reason: StopReason) -> Result<Flow, VmError> {
        match reason {
            StopReason::Reset if self.signals.pending().is_some() => Ok(Flow::End),
            StopReason::Reset => {
                info!("the guest resets");
                self.restart()?;
                Ok(Flow::Go)
            }
            StopReason::Fault(cause) => Err(MachineError::Fault(cause).into()),
            StopReason::PowerOff if self.stays => {
                info!("the guest has switched itself off");
                self.end_machine();
                Ok(Flow::Go)
            }
            StopReason::PowerOff | StopReason::Signal(_) => {
                info!("the machine has stopped: {reason:?}");
                Ok(Flow::End)
            }
        }
    }

    fn carry_out(&mut self, order: Order) -> Result<Completion, VmError> {
        match order {
            Order::Create(config) => self.create(*config)?,
            Order::Boot => self.boot()?,
            Order::Delete => self.delete(),
            Order::Shutdown => {
                self.running()?;
                self.end_machine();
            }
            Order::Reboot => {
                self.running().map_err(|_| VmError::NotCreated)?;
                self.restart()?;
            }
            Order::Pause => self.pause()?,
            Order::Resume => self.resume()?,
            Order::PowerButton => self.running()?.press_power_button(),
            Order::Nmi => self.running()?.nmi(),
            Order::Resize(resize) => self.resize(resize)?,
            Order::ResizeZone(id, wanted) => self.resize_memory(memory::Resized::Zone(&id), wanted)?,
            Order::AddDevice(device) => return self.add_device(*device),
            Order::AddEmulated(addition) => return self.add_emulated(addition),
            Order::ResizeDisk { id, size } => self.resize_disk(&id, size)?,
            Order::Snapshot(url) => self.snapshot(&url)?,
            Order::Restore(restore) => self.restore(&restore)?,
            Order::RemoveDevice(id) => self.remove_device(&id)?,
            Order::PowerPolicy(id, change) => return self.change_policy(id, &change),
            Order::End => {}
        }
        Ok(Completion::Plain)
    }

    /// Shows the API the configuration that there is now.
    fn show_config(&self) {
        self.status.set_config(self.vm.as_ref().map(|vm| &vm.config));
    }

    fn vm(&mut self) -> Result<&mut Vm, VmError> {
        self.vm.as_mut().ok_or(VmError::NotCreated)
    }

    fn running(&mut self) -> Result<&mut Running, VmError> {
        let machine = self.vm.as_mut().and_then(|vm| vm.machine.as_mut());
        machine.map(|(running, _)| running).ok_or(VmError::NotRunning)
    }

    fn create(&mut self, mut config: VmConfig) -> Result<(), VmError> {
        if self.vm.is_some() {
            return Err(VmError::AlreadyCreated);
        }
        config.payload.iter_mut().for_each(PayloadConfig::drop_unused);
        self.vm = Some(Vm { config, machine: None, paused: false, changed: Vec::new() });
        self.show_config();
        Ok(())
    }

    fn boot(&mut self) -> Result<(), VmError> {
        self.events.tell("vm", "booting");
        let vm = self.vm.as_mut().ok_or(VmError::MissingConfig)?;
        if vm.machine.is_some() {
            return if vm.paused { self.resume() } else { Err(VmError::Already { state: "running" }) };
        }
        vm.config.validate()?;
        let config = vm.config.clone();
        let (config, lifetime) = self.prepare(config, None)?;
        let running = self.start(&config, &lifetime, None)?;
        let vm = self.vm()?;
        vm.config = config;
        vm.machine = Some((running, lifetime));
        vm.paused = false;
        vm.changed.clear();
        self.events.tell("vm", "booted");
        Ok(())
    }

    /// Opens what is behind the devices of a machine, and gives all of them names. `saved`: what it goes on from.
    fn prepare(
        &self,
        mut config: VmConfig,
        saved: Option<&MachineState>,
    ) -> Result<(VmConfig, Lifetime), VmError> {
        config.name_devices();
        let console = Backend::open(&config.serial.serial_mode()).map_err(MachineError::from)?;
        if let Some(path) = console.as_ref().and_then(|console| console.pty_path()) {
            announce(&format!("the serial port is at {}", path.display()));
            if config.serial.mode == ConsoleMode::Pty {
                config.serial.file = Some(path.to_owned());
            }
        }
        let shared = Shared::default();
        let debug_console =
            Backend::open_output(&config.debug_console.output()).map_err(MachineError::DebugConsole)?;
        if let Some(path) = debug_console.as_ref().and_then(|console| console.pty_path()) {
            announce(&format!("the debug console is at {}", path.display()));
            config.debug_console.file = Some(path.to_owned());
        }
        let mut units = make_units(&config, &[], &shared).map_err(MachineError::from)?;
        if let Some(saved) = saved {
            // Where the guest knows them, whatever has come and gone before.
            units.iter_mut().for_each(|unit| unit.place = saved.place_of(&unit.id).or(unit.place));
        }
        if let Some(path) = units.iter().find_map(Unit::terminal) {
            announce(&format!("the console is at {}", path.display()));
            config.console.target.file = Some(path);
        }
        let lifetime = Lifetime {
            kvm: Arc::clone(&self.kvm),
            signals: Arc::clone(&self.signals),
            orders: Arc::clone(&self.orders),
            events: self.events.clone(),
            console,
            debug_console,
            battery: Battery::default(),
            latched: Vec::new(),
            units,
            shared,
            // Who has saved it had the API, and its guest has the tables for that.
            hotplug: self.hotplug || saved.is_some(),
        };
        Ok((config, lifetime))
    }

    /// Builds a machine and starts it, for all to see. One that goes on from a snapshot stays paused.
    fn start(
        &self,
        config: &VmConfig,
        lifetime: &Lifetime,
        saved: Option<&Saved>,
    ) -> Result<Running, VmError> {
        let started = Instant::now();
        let machine = Machine::build(config, lifetime, saved)?;
        let view = MachineView::new(&machine);
        let running = Running::start(machine, saved.map(|saved| saved.machine.clock))?;
        self.status.set_config(Some(config));
        self.status.set_machine(Some(view));
        info!("the machine has been built and started in {:.1} ms", started.elapsed().as_secs_f64() * 1e3);
        Ok(running)
    }

    /// A new machine in the place of the running one: a reset.
    fn restart(&mut self) -> Result<(), VmError> {
        self.events.tell("vm", "rebooting");
        let vm = self.vm.as_mut().ok_or(VmError::NotCreated)?;
        let (running, mut lifetime) = vm.machine.take().ok_or(VmError::NotRunning)?;
        vm.paused = false;
        self.status.set_restarting();
        running.end(&mut lifetime);
        let mut config = vm.config.clone();
        for device in config.devices.iter_mut().flatten() {
            let changed = vm.changed.iter().find(|changed| changed.as_booted.id == device.id);
            if let Some(changed) = changed {
                device.clone_from(&changed.as_booted);
            }
        }
        // Without a machine after all, the VM is one that has been created and no more.
        let running = self.start(&config, &lifetime, None).inspect_err(|_| self.status.set_machine(None))?;
        let vm = self.vm()?;
        for Changed { as_booted, change } in &vm.changed {
            let id = as_booted.id.as_deref().unwrap_or_default();
            if let Some(Err(e)) = running.change_policy(id, change) {
                warn!("{id}: its power policy is again that of the VM's boot: {e}");
            }
        }
        vm.machine = Some((running, lifetime));
        self.show_config();
        self.events.tell("vm", "rebooted");
        Ok(())
    }

    /// Ends the machine, if there is one, and keeps the configuration.
    fn end_machine(&mut self) {
        let Some((running, mut lifetime)) = self.vm.as_mut().and_then(|vm| vm.machine.take()) else { return };
        self.status.set_machine(None);
        running.end(&mut lifetime);
        for console in [lifetime.console, lifetime.debug_console].into_iter().flatten() {
            console.flush();
        }
        self.events.tell("vm", "shutdown");
    }

    fn delete(&mut self) {
        self.end_machine();
        if self.vm.take().is_some() {
            self.status.set_config(None);
            self.events.tell("vm", "deleted");
        }
    }

    fn pause(&mut self) -> Result<(), VmError> {
        self.events.tell("vm", "pausing");
        if self.vm.as_ref().is_some_and(|vm| vm.machine.is_some() && vm.paused) {
            return Err(VmError::Already { state: "paused" });
        }
        self.running()?.pause();
        self.vm()?.paused = true;
        self.status.set_state(VmState::Paused);
        self.events.tell("vm", "paused");
        Ok(())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        self.events.tell("vm", "resuming");
        if self.vm.as_ref().is_some_and(|vm| vm.machine.is_some() && !vm.paused) {
            return Err(VmError::Already { state: "running" });
        }
        self.running()?.resume();
        self.vm()?.paused = false;
        self.status.set_state(VmState::Running);
        self.events.tell("vm", "resumed");
        Ok(())
    }

    fn resize(&mut self, resize: Resize) -> Result<(), VmError> {
        self.events.tell("vm", "resizing");
        let vm = self.vm()?;
        // Before anything is changed: an order is carried out whole or not at all.
        let balloon = resize.balloon.map(|size| vm.config.with_balloon_of(size)).transpose()?;
        if vm.machine.is_none() {
            // Only the configuration changes; it is looked at when the machine starts.
            let cpus = &mut vm.config.cpus;
            cpus.boot_vcpus = resize.vcpus.unwrap_or(cpus.boot_vcpus);
            cpus.max_vcpus = cpus.max_vcpus.max(cpus.boot_vcpus);
        } else if let Some(wanted) = resize.vcpus {
            self.resize_vcpus(wanted)?;
        }
        if let Some(wanted) = resize.ram {
            self.resize_memory(memory::Resized::Whole, wanted)?;
        }
        if let (Some(balloon), Some(size)) = (balloon, resize.balloon) {
            let vm = self.vm()?;
            if let Some((_, lifetime)) = &vm.machine {
                resize_unit(&lifetime.units, "__balloon", size)?;
            }
            vm.config.balloon = Some(balloon);
        }
        self.show_config();
        self.events.tell("vm", "resized");
        Ok(())
    }

    /// From here on this is the number, also after a reboot of the guest, though it may still have to let go of some.
    fn resize_vcpus(&mut self, wanted: u32) -> Result<(), VmError> {
        // Those that it has let go of can come again.
        self.processors_answered();
        self.running()?.resize_vcpus(wanted)?;
        self.vm()?.config.cpus.boot_vcpus = wanted;
        self.show_config();
        Ok(())
    }

    /// The guest has let go of processors, or does not.
    fn processors_answered(&mut self) {
        let Some(vm) = &mut self.vm else { return };
        let Some((running, _)) = &mut vm.machine else { return };
        if let Some(count) = running.take_processor_answers()
            && count != vm.config.cpus.boot_vcpus
        {
            vm.config.cpus.boot_vcpus = count;
            self.show_config();
        }
    }
}

/// Gives one of the machine's own devices another size.
fn resize_unit(units: &[Unit], id: &str, size: u64) -> Result<(), VmError> {
    let unit = units.iter().find(|unit| unit.id == id);
    let unit = unit.ok_or_else(|| VmError::UnknownDevice { id: id.to_owned() })?;
    unit.resize(size).map_err(|why| VmError::Resize {
        what: "the size of a device",
        wanted: size,
        why: format!("{id}: {why}"),
    })
}

/// Tells the user, in the log if that shows it and otherwise on standard error.
pub fn announce(text: &str) {
    if log::max_level() >= LevelFilter::Info {
        info!("{text}");
    } else {
        eprintln!("{}: {text}", Program::current().name());
    }
}
