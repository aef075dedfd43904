//! How vCPUs are grouped into cores, dies and packages, and the APIC IDs that follow from it.
//!
//! Follows the Intel SDM volume 3 section 9.9 (identifying topological relationships): each level has its own
//! field of the APIC ID, as wide as its largest index needs, so that shifts tell the levels apart.

use thiserror::Error;

/// Numbers of each thing in the thing above it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    threads_per_core: u16,
    cores_per_die: u16,
    dies_per_package: u16,
    packages: u16,
}

/// Why a topology is not possible.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum TopologyError {
    /// A level with nothing in it.
    #[error("a topology needs at least one of each: threads, cores, dies and packages")]
    Zero,
    /// Not the number of vCPUs.
    #[error("the topology has {product} vCPUs, and the machine is to have {vcpus}; make the two equal")]
    Count {
        /// Product of the four numbers.
        product: u64,
        /// vCPUs of the machine.
        vcpus: u16,
    },
    /// APIC IDs past what the interrupt controller can name.
    #[error(
        "the last vCPU would have APIC ID {last}, and the interrupt controller reaches {APIC_ID_MAX}; give the guest \
         fewer vCPUs, or make the numbers in the topology powers of two"
    )]
    ApicIds {
        /// The largest APIC ID.
        last: u32,
    },
}

/// Largest APIC ID that an interrupt can be sent to: KVM's IOAPIC keeps eight bits of a destination (Linux
/// `arch/x86/kvm/ioapic.h`), also of a guest that uses wider ones, and 255 is the broadcast.
pub const APIC_ID_MAX: u8 = 254;

impl Topology {
    /// One package of one die with `vcpus` cores of one thread.
    ///
    /// # Errors
    /// As [`Topology::new`].
    pub fn flat(vcpus: u16) -> Result<Self, TopologyError> {
        Self::new(1, vcpus, 1, 1, vcpus)
    }

    /// The topology of a machine with `vcpus` vCPUs.
    ///
    /// # Errors
    /// See [`TopologyError`].
    pub fn new(
        threads_per_core: u16,
        cores_per_die: u16,
        dies_per_package: u16,
        packages: u16,
        vcpus: u16,
    ) -> Result<Self, TopologyError> {
        let levels = [threads_per_core, cores_per_die, dies_per_package, packages];
        if levels.contains(&0) {
            return Err(TopologyError::Zero);
        }
        let product = levels.iter().map(|&level| u64::from(level)).fold(1, u64::saturating_mul);
        if product != u64::from(vcpus) {
            return Err(TopologyError::Count { product, vcpus });
        }
        let topology = Self { threads_per_core, cores_per_die, dies_per_package, packages };
        // There are fewer than 2^16 vCPUs, so shifts of all levels together stay below 32 bits.
        let last = topology.apic_id(vcpus - 1);
        if last > u32::from(APIC_ID_MAX) {
            return Err(TopologyError::ApicIds { last });
        }
        Ok(topology)
    }

    /// vCPUs in the whole machine.
    pub fn vcpus(&self) -> u32 {
        self.threads_per_package() * u32::from(self.packages)
    }

    /// The APIC ID of a vCPU, which is also the number that KVM knows it by. Rises with `vcpu`.
    pub fn apic_id(&self, vcpu: u16) -> u32 {
        let vcpu = u32::from(vcpu);
        let (core, thread) = div_rem(vcpu, self.threads_per_core);
        let (die, core) = div_rem(core, self.cores_per_die);
        let (package, die) = div_rem(die, self.dies_per_package);
        package << self.package_shift() | die << self.die_shift() | core << self.core_shift() | thread
    }

    /// Threads of one core.
    pub(super) fn threads_per_core(&self) -> u32 {
        self.threads_per_core.into()
    }

    /// Cores of one package.
    pub(super) fn cores_per_package(&self) -> u32 {
        u32::from(self.cores_per_die) * u32::from(self.dies_per_package)
    }

    /// Threads of one die.
    pub(super) fn threads_per_die(&self) -> u32 {
        self.threads_per_core() * u32::from(self.cores_per_die)
    }

    /// Threads of one package.
    pub(super) fn threads_per_package(&self) -> u32 {
        self.threads_per_core() * self.cores_per_package()
    }

    /// Dies of one package.
    pub(super) fn dies_per_package(&self) -> u32 {
        self.dies_per_package.into()
    }

    /// APIC ID bits to the right of the core's.
    pub(super) fn core_shift(&self) -> u32 {
        width(self.threads_per_core)
    }

    /// APIC ID bits to the right of the die's.
    pub(super) fn die_shift(&self) -> u32 {
        self.core_shift() + width(self.cores_per_die)
    }

    /// APIC ID bits to the right of the package's.
    pub(super) fn package_shift(&self) -> u32 {
        self.die_shift() + width(self.dies_per_package)
    }
}

fn div_rem(value: u32, by: u16) -> (u32, u32) {
    let by = u32::from(by);
    (value / by, value % by)
}

/// Bits that an index below `count` needs.
fn width(count: u16) -> u32 {
    u32::from(count).next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flat_machine_counts_its_apic_ids() {
        let topology = Topology::flat(255).unwrap();
        assert_eq!((0..255).map(|v| topology.apic_id(v)).collect::<Vec<_>>(), (0..255).collect::<Vec<_>>());
        assert_eq!(topology.package_shift(), 8);
    }

    #[test]
    fn each_level_has_its_own_bits() {
        // Two threads, three cores, two packages: 1 + 2 + 0 bits below the package's.
        let topology = Topology::new(2, 3, 1, 2, 12).unwrap();
        let ids: Vec<_> = (0..12).map(|v| topology.apic_id(v)).collect();
        assert_eq!(ids, [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]);
        assert_eq!((topology.core_shift(), topology.die_shift(), topology.package_shift()), (1, 3, 3));
    }

    #[test]
    fn impossible_topologies_are_refused() {
        assert_eq!(Topology::new(2, 0, 1, 1, 2), Err(TopologyError::Zero));
        assert_eq!(Topology::new(2, 2, 1, 1, 3), Err(TopologyError::Count { product: 4, vcpus: 3 }));
    }

    #[test]
    fn a_vcpu_that_no_interrupt_could_reach_is_refused() {
        assert_eq!(Topology::flat(256), Err(TopologyError::ApicIds { last: 255 }));
        assert!(Topology::new(2, 127, 1, 1, 254).is_ok());
        // Three threads take two bits, so the IDs have holes.
        assert_eq!(
            Topology::new(3, 64, 1, 1, 192),
            Ok(Topology { threads_per_core: 3, cores_per_die: 64, dies_per_package: 1, packages: 1 })
        );
        assert_eq!(Topology::new(3, 65, 1, 1, 195), Err(TopologyError::ApicIds { last: 258 }));
        assert_eq!(Topology::new(3, 3, 3, 1025, 27675), Err(TopologyError::ApicIds { last: 65578 }));
    }
}
