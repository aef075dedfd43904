//! Whether a device has a PCI power management capability, and PME from D3cold, without waking it (PCI Bus Power Management Interface
//! 1.2, section 3.2).
//!
//! No attribute of sysfs says it. The kernel's log and what the kernel derived from the capability do in most cases; configuration
//! space is read only of a device that is awake anyway and that no VM has. What remains unknown is reported as unknown.

use pci::Bdf;

use super::finding::Reading;
use super::host::Host;

/// Capability ID of power management.
const CAP_ID_PM: u8 = 0x01;
/// Status register: bit 4 says that there is a list of capabilities.
const STATUS: usize = 0x06;
const STATUS_CAP_LIST: u8 = 1 << 4;
/// Where that list begins.
const CAP_POINTER: usize = 0x34;
/// Power management capabilities register: PME from D3cold.
const PMC_PME_D3COLD: u16 = 1 << 15;

/// What is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Evidence {
    /// Whether there is a capability; none when that cannot be known while the device sleeps.
    pub capability: Option<bool>,
    /// Whether it can signal PME from D3cold; none when that is not known.
    pub pme_from_d3cold: Option<bool>,
    /// How that is known.
    pub read: Vec<Reading>,
}

/// Gathers the evidence. `may_look` allows a look into configuration space where it wakes nobody.
pub fn evidence(host: &Host, bdf: Bdf, may_look: bool) -> Evidence {
    if let Some(states) = host.logged_pme(bdf) {
        let cold = states.split_whitespace().any(|state| state == "D3cold");
        let reading = Reading::new(host.log_path(), Some(format!("{bdf}: PME# supported from {states}")));
        return Evidence { capability: Some(true), pme_from_d3cold: Some(cold), read: vec![reading] };
    }
    if may_look && let Some(config) = host.config_if_awake(bdf) {
        let pmc = capability(&config);
        let said = match pmc {
            Some(pmc) => format!("capability 01, PMC {pmc:04x}"),
            None => "no capability 01".to_owned(),
        };
        return Evidence {
            capability: Some(pmc.is_some()),
            pme_from_d3cold: Some(pmc.is_some_and(|pmc| pmc & PMC_PME_D3COLD != 0)),
            read: vec![Reading::new(host.attribute(bdf, "config"), Some(said))],
        };
    }
    // The kernel sets this attribute when it has found the capability, and only then offers the reset method `pm`.
    let allowed = host.device(bdf, "d3cold_allowed");
    let reset = host.device(bdf, "reset_method");
    let by_reset =
        reset.value.as_deref().is_some_and(|methods| methods.split_whitespace().any(|m| m == "pm"));
    if by_reset {
        return Evidence { capability: Some(true), pme_from_d3cold: None, read: vec![reset] };
    }
    let known = allowed.is("1");
    let status = (!known).then(|| host.device(bdf, "power/runtime_status"));
    Evidence {
        capability: known.then_some(true),
        pme_from_d3cold: None,
        read: std::iter::once(allowed).chain(status).collect(),
    }
}

/// The power management capabilities register, if configuration space has the capability.
pub fn capability(config: &[u8]) -> Option<u16> {
    if config.get(STATUS)? & STATUS_CAP_LIST == 0 {
        return None;
    }
    let mut at = usize::from(config.get(CAP_POINTER)? & !3);
    // As many as fit, against a list that bites its tail.
    for _ in 0..48 {
        if at < 0x40 {
            return None;
        }
        if *config.get(at)? == CAP_ID_PM {
            return Some(u16::from_le_bytes([*config.get(at + 2)?, *config.get(at + 3)?]));
        }
        at = usize::from(config.get(at + 1)? & !3);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::capability;

    #[test]
    fn the_capability_is_found_behind_others_and_a_circle_ends() {
        let mut config = vec![0; 256];
        assert_eq!(capability(&config), None);
        (config[6], config[0x34]) = (0x10, 0x50);
        (config[0x50], config[0x51]) = (0x05, 0x60);
        (config[0x60], config[0x62], config[0x63]) = (0x01, 0x03, 0xc8);
        assert_eq!(capability(&config), Some(0xc803));
        (config[0x60], config[0x61]) = (0x10, 0x50);
        assert_eq!(capability(&config), None);
        assert_eq!(capability(&[0xff; 256]), None);
        assert_eq!(capability(&[]), None);
    }
}
