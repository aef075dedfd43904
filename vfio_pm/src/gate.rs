//! What the power domain asks of a function: to shut the guest out while hardware may be asleep, and to let it in again.

use std::fmt::Debug;

use pci::Bdf;

/// The guest's way to one function's hardware.
///
/// The domain holds none of its locks over these calls except the member's own gate lock, which no call into the domain from
/// a function takes. So an implementation may lock what it needs, and may call [`crate::PowerDomain::parked`] while it holds
/// that; it must hold no lock that `open` or `set_hardware_d3hot` takes while it waits in [`crate::PowerDomain::unparked`].
/// For one function `open`, `close` and `lost` never overlap each other; `settle`, `set_hardware_d3hot`, `reset_hardware` and `latch_pme` never overlap
/// each other, but may overlap the first three.
///
/// The domain owns its functions: keep a `Weak<PowerDomain>` in the implementation, not an `Arc`.
pub trait FunctionGate: Debug + Send + Sync {
    /// The function's address on the host, for logs.
    fn bdf(&self) -> Bdf;

    /// Shuts the guest out. When it returns no access of the guest can reach VFIO: BAR memory slots are gone, config space is
    /// answered from a shadow, interrupt unmasking is quiet. Called from vCPU threads on `_OFF` and from the worker; quick.
    fn close(&self);

    /// Hardware answers again: lets the guest in. BARs are decoded where COMMAND.MEM and D0 say so, with slots at once or when the
    /// guest first touches one, and the virtual PMCSR says D0. Also undoes [`lost`](Self::lost). Called from vCPU threads when `_ON` comes before the device was put in low power and
    /// from the worker; quick. Does nothing when the gate is open and the function in D0.
    fn open(&self);

    /// After the end of low power: writes PMCSR = D0 through VFIO and checks that the device answers, which it does not when
    /// it reads all ones. `false`: the device is gone. Worker thread; may block while the host resumes the device.
    fn settle(&self) -> bool;

    /// Writes D3hot (`true`) or D0 (`false`) to the hardware's PMCSR through VFIO. `false` when the write failed or, for D0, the device
    /// does not answer. D3hot is refused (`false`, hardware untouched) when the virtual PMCSR says D0 or BAR slots are up: a
    /// late call must not pull hardware from under the guest. Worker thread; may block.
    fn set_hardware_d3hot(&self, on: bool) -> bool;

    /// Whether the device answers. Only while hardware is in D0: otherwise it wakes it. Worker thread.
    fn answers(&self) -> bool;

    /// Resets hardware through VFIO, which leaves configuration space as it was, and checks that the device answers. Only while
    /// the gate is closed. Worker thread; may block for as long as a reset takes.
    fn reset_hardware(&self) -> bool;

    /// Sets PME_Status in the virtual PM capability, as the device would have; returns whether the guest has set PME_En.
    fn latch_pme(&self) -> bool;

    /// The device is gone, or takes longer to come back than the guest waits: answer all ones until `open`.
    fn lost(&self);
}
