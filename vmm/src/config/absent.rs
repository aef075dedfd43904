//! Settings of Cloud Hypervisor whose function Dormouse does not have: kept as they were given, so that `vm.info` shows what a client
//! has asked for, and refused by name when the machine is to start.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::ConfigError;

/// Declares the fields with their names in error messages.
macro_rules! absent {
    ($($field:ident => $setting:literal),* $(,)?) => {
        /// Settings of a machine that are not there yet. Absent, null, empty and `false` are the same: nobody asks for it.
        #[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        pub struct AbsentSettings {
            $(
                #[doc = $setting]
                #[serde(default, skip_serializing_if = "is_unused")]
                pub $field: Value,
            )*
        }

        impl AbsentSettings {
            /// Refuses the first one that is asked for.
            pub fn validate(&self) -> Result<(), ConfigError> {
                $(
                    if !is_unused(&self.$field) {
                        return Err(ConfigError::NotYet { setting: $setting });
                    }
                )*
                Ok(())
            }
        }
    };
}

absent! {
    user_devices => "user_devices (--user-device)",
    vdpa => "vdpa (--vdpa)",
    iommu => "iommu (a device with iommu=on)",
    rtc => "rtc (--rtc)",
    tpm => "tpm (--tpm)",
    gdb => "gdb (--gdb)",
    ivshmem => "ivshmem (--ivshmem)",
    pvmemcontrol => "pvmemcontrol (--pvmemcontrol)",
    landlock_enable => "landlock_enable (--landlock)",
    landlock_rules => "landlock_rules (--landlock-rules)",
}

fn is_unused(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_asks_for_is_accepted_and_not_shown() {
        let text = r#"{"rtc": null, "vdpa": [], "tpm": null, "unheard_of": {"a": 1}}"#;
        let settings: AbsentSettings = serde_json::from_str(text).unwrap();
        assert!(settings.validate().is_ok());
        assert_eq!(serde_json::to_string(&settings).unwrap(), "{}");
    }

    #[test]
    fn what_somebody_asks_for_is_shown_and_refused_by_name() {
        let text = r#"{"vdpa":[{"path":"/p"}]}"#;
        let settings: AbsentSettings = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_string(&settings).unwrap(), text);
        assert!(
            settings.validate().unwrap_err().to_string().starts_with("vdpa (--vdpa) is not in Dormouse yet")
        );
    }
}
