//! Whether `--cpus` makes sense: how many processors there are and can be, how they are grouped, and where they run.

use std::collections::HashSet;

use arch::topology::{APIC_ID_MAX, Topology};
use rustix::thread::CpuSet;
use thiserror::Error;

use super::{ConfigError, CpusConfig};

/// One for each APIC ID that an interrupt can be sent to.
const MAX_VCPUS: u16 = APIC_ID_MAX as u16 + 1;

/// What is wrong with the processors.
#[derive(Debug, Error)]
pub enum CpusError {
    /// More than there can be.
    #[error(
        "--cpus max={max}: a machine has at most {MAX_VCPUS} vCPUs, as many as KVM's IOAPIC can send interrupts to"
    )]
    Max {
        /// vCPUs asked for.
        max: u32,
    },
    /// More at boot than there can be.
    #[error("--cpus max={max} is less than boot={boot}; raise max, or boot with fewer")]
    MaxBelowBoot {
        /// vCPUs that there can be.
        max: u32,
        /// vCPUs at boot.
        boot: u32,
    },
    /// A place for a vCPU that there cannot be.
    #[error("--cpus affinity: there is no vCPU {vcpu}; the machine has at most {max} (max={max}), from 0 on")]
    AffinityVcpu {
        /// The vCPU.
        vcpu: u32,
        /// vCPUs that there can be.
        max: u32,
    },
    /// Two places for one vCPU.
    #[error("--cpus affinity: vCPU {vcpu} is given twice; put all its host processors into one list")]
    AffinityTwice {
        /// The vCPU.
        vcpu: u32,
    },
    /// No place for a vCPU.
    #[error("--cpus affinity: vCPU {vcpu} has no host processor to run on; name one, such as {vcpu}@[0]")]
    AffinityNowhere {
        /// The vCPU.
        vcpu: u32,
    },
    /// A host processor that Linux has no number for.
    #[error(
        "--cpus affinity: vCPU {vcpu} cannot run on host processor {host}; see /sys/devices/system/cpu/online for those there are"
    )]
    AffinityHost {
        /// The vCPU.
        vcpu: u32,
        /// The host's processor.
        host: usize,
    },
}

impl CpusConfig {
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        if !(36..=52).contains(&self.max_phys_bits) {
            return Err(ConfigError::PhysBits { bits: self.max_phys_bits });
        }
        self.vcpus()?;
        self.arch_topology()?;
        Ok(self.validate_affinity()?)
    }

    fn validate_affinity(&self) -> Result<(), CpusError> {
        let mut seen = HashSet::new();
        for place in self.affinity.iter().flatten() {
            let vcpu = place.vcpu;
            if vcpu >= self.max_vcpus {
                return Err(CpusError::AffinityVcpu { vcpu, max: self.max_vcpus });
            }
            if !seen.insert(vcpu) {
                return Err(CpusError::AffinityTwice { vcpu });
            }
            if place.host_cpus.is_empty() {
                return Err(CpusError::AffinityNowhere { vcpu });
            }
            if let Some(&host) = place.host_cpus.iter().find(|host| **host >= CpuSet::MAX_CPU) {
                return Err(CpusError::AffinityHost { vcpu, host });
            }
        }
        Ok(())
    }

    /// The number of vCPUs at boot.
    ///
    /// # Errors
    /// [`ConfigError::CpuCount`], or [`CpusError`] if there cannot be so many.
    pub fn vcpus(&self) -> Result<u16, ConfigError> {
        let (boot, max) = (self.boot_vcpus, self.max_vcpus);
        let count = u16::try_from(boot)
            .ok()
            .filter(|count| (1..=MAX_VCPUS).contains(count))
            .ok_or(ConfigError::CpuCount { boot })?;
        if max < boot {
            return Err(CpusError::MaxBelowBoot { max, boot }.into());
        }
        Ok(count)
    }

    /// The number of vCPUs that there can be.
    ///
    /// # Errors
    /// [`CpusError::Max`].
    pub fn most_vcpus(&self) -> Result<u16, ConfigError> {
        let max = self.max_vcpus;
        let count = u16::try_from(max).ok().filter(|count| *count <= MAX_VCPUS);
        Ok(count.ok_or(CpusError::Max { max })?)
    }

    /// How the vCPUs that there can be are grouped.
    ///
    /// # Errors
    /// [`CpusError::Max`] or [`ConfigError::Topology`].
    pub fn arch_topology(&self) -> Result<Topology, ConfigError> {
        let vcpus = self.most_vcpus()?;
        let topology = match self.topology {
            None => Topology::flat(vcpus),
            Some(t) => {
                Topology::new(t.threads_per_core, t.cores_per_die, t.dies_per_package, t.packages, vcpus)
            }
        };
        topology.map_err(ConfigError::Topology)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str) -> Result<(), String> {
        let config = CpusConfig::parse(text).map_err(|e| e.to_string())?;
        config.validate().map_err(|e| e.to_string())
    }

    #[test]
    fn processors_that_come_later_are_grouped_and_counted_with_those_at_boot() {
        for good in [
            "boot=1,max=4",
            "boot=1,max=4,topology=1:4:1:1",
            "boot=3,max=8,topology=2:2:1:2",
            "boot=255,max=255",
            "boot=2,max=4,affinity=[0@[0-3],3@[1]]",
            "boot=2,kvm_hyperv=on,features=[amx],core_scheduling=vcpu,nested=off,profile=host",
            "boot=2,core_scheduling=off",
        ] {
            assert_eq!(check(good), Ok(()), "{good}");
        }
        assert_eq!(CpusConfig::parse("boot=2,max=6").unwrap().arch_topology().unwrap().vcpus(), 6);
    }

    #[test]
    fn processors_that_make_no_sense_are_refused_with_the_setting_and_a_remedy() {
        for (bad, parts) in [
            ("boot=4,max=2", ["max=2 is less than boot=4", "raise max"]),
            ("boot=1,max=256", ["max=256", "at most 255"]),
            ("boot=0,max=0", ["boot=0", "1 to 255"]),
            ("boot=2,max=4,topology=1:2:1:1", ["topology", "4"]),
            ("boot=1,max=2,affinity=[2@[0]]", ["affinity: there is no vCPU 2", "max=2"]),
            ("boot=1,affinity=[0@[0],0@[1]]", ["affinity: vCPU 0 is given twice", "one list"]),
            ("boot=1,affinity=[0@[]]", ["affinity: vCPU 0 has no host processor", "0@[0]"]),
            ("boot=1,affinity=[0@[1024]]", ["host processor 1024", "/sys/devices/system/cpu/online"]),
        ] {
            let message = check(bad).expect_err(bad);
            assert!(parts.iter().all(|part| message.contains(part)), "{bad}: {message}");
        }
    }
}
