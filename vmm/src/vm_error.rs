//! Why an operator's wish is not carried out, and which HTTP status that is in Cloud Hypervisor's API.

use vfio_pm::ControlError;

use crate::config::ConfigError;
use crate::machine::MachineError;
use crate::processors::ResizeError;
use crate::snapshot::SnapshotError;

/// An order that is not carried out.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// No configuration, for what shows or changes one.
    #[error("VM is not created")]
    NotCreated,
    /// There is one already.
    #[error("VM is already created")]
    AlreadyCreated,
    /// No configuration to start from.
    #[error("VM config is missing")]
    MissingConfig,
    /// No machine.
    #[error("VM is not running")]
    NotRunning,
    /// Nothing to do in this state.
    #[error("the VM is {state} already")]
    Already {
        /// [`VmState`](crate::status::VmState) in small letters.
        state: &'static str,
    },
    /// The configuration makes no sense or asks for what is not there.
    #[error("the configuration cannot be used")]
    Config(#[from] ConfigError),
    /// The machine cannot be built or run.
    #[error("the machine cannot be built or run")]
    Machine(#[from] MachineError),
    /// A snapshot that cannot be written or used.
    #[error("the snapshot cannot be used")]
    Snapshot(#[from] SnapshotError),
    /// No device of that name.
    #[error("there is no device {id:?}; vm.info lists those there are")]
    UnknownDevice {
        /// The name asked for.
        id: String,
    },
    /// A second one of a device that a machine has once.
    #[error("Too many virtio-vsock devices")]
    TooManyVsocks,
    /// A power policy or action that is not possible.
    #[error("the device's power cannot be handled so")]
    Power(#[from] ControlError),
    /// A number out of reach.
    #[error("{what} cannot be changed to {wanted}: {why}")]
    Resize {
        /// What was to be changed.
        what: &'static str,
        /// To what.
        wanted: u64,
        /// Why not, and what to do.
        why: String,
    },
    /// A number of vCPUs that the machine cannot have, or not now.
    #[error("the number of vCPUs stays as it is")]
    Vcpus(#[from] ResizeError),
    /// A disk that cannot have another size.
    #[error(transparent)]
    ResizeDisk(#[from] devices::virtio::block::ResizeError),
    /// What Cloud Hypervisor has and Dormouse does not.
    #[error("{what} is not in Dormouse yet; see docs/compatibility.md")]
    NotYet {
        /// What it is.
        what: &'static str,
    },
    /// The process is about to end.
    #[error("the VMM is ending")]
    Ending,
}

impl VmError {
    /// The HTTP status.
    pub fn status(&self) -> u16 {
        match self {
            Self::NotCreated | Self::MissingConfig | Self::UnknownDevice { .. } => 404,
            Self::Config(ConfigError::SameId { .. } | ConfigError::SameDevice { .. }) => 409,
            // As for everything else that cannot be resized: there is nothing wrong with the configuration.
            Self::Config(ConfigError::NoBalloon) => 500,
            Self::Config(_) | Self::Power(_) => 400,
            Self::Vcpus(ResizeError::Pending { .. }) => 429,
            _ => 500,
        }
    }

    /// What is left for somebody who ordered nothing but a machine on the command line: the cause alone.
    pub fn into_cause(self) -> Box<dyn std::error::Error> {
        match self {
            Self::Config(cause) => cause.into(),
            Self::Snapshot(cause) => cause.into(),
            Self::Machine(cause) => cause.into(),
            other => other.into(),
        }
    }

    /// The messages of the error and its causes, outermost first. What an error says of its cause itself is said once.
    pub fn chain(&self) -> Vec<String> {
        let mut messages = vec![self.to_string()];
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            let text = cause.to_string();
            if messages.last().is_none_or(|last| !last.contains(&text)) {
                messages.push(text);
            }
            source = cause.source();
        }
        messages
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_tells_what_is_missing_from_what_is_wrong() {
        assert_eq!(VmError::NotCreated.status(), 404);
        assert_eq!(VmError::NotRunning.status(), 500);
        assert_eq!(VmError::from(ConfigError::NoKernel).status(), 400);
        assert_eq!(VmError::from(ConfigError::SameId { id: "a".to_owned() }).status(), 409);
    }

    #[test]
    fn the_chain_goes_from_the_outside_in_and_repeats_nothing() {
        let error = VmError::from(MachineError::from(ConfigError::NoKernel));
        let chain = error.chain();
        assert_eq!(chain.len(), 2, "{chain:?}");
        assert!(chain[0].contains("machine") && chain[1].contains("--kernel"), "{chain:?}");
    }
}
