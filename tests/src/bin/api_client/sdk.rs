//! The crate `cloud-hypervisor-client`, generated from Cloud Hypervisor's OpenAPI document and carried by hyper: whatever it cannot
//! read in an answer is an error here.
//!
//! Steps are names of calls; `create=FILE`, `add-device=PATH,ID`, `remove-device=ID` and `resize=VCPUS` take a value. Each prints one line.

use std::time::Duration;

use cloud_hypervisor_client::apis::{DefaultApi, Error};
use cloud_hypervisor_client::models::{DeviceConfig, VmConfig, VmRemoveDevice, VmResize};
use cloud_hypervisor_client::{SocketBasedApiClient, socket_based_api_client};

use crate::Outcome;

/// Kata's limit for creating and booting.
const PATIENCE: Duration = Duration::from_secs(30);

pub fn run(socket: &str, steps: &[&str]) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| e.to_string())?;
    runtime.block_on(async {
        let client = socket_based_api_client(socket);
        for step in steps {
            let call = tokio::time::timeout(PATIENCE, take(&client, step));
            let line = call.await.map_err(|_| format!("{step}: no answer"))??;
            println!("{step}: {line}");
        }
        Ok(())
    })
}

async fn take(client: &SocketBasedApiClient, step: &str) -> Result<String, String> {
    let (name, value) = step.split_once('=').unwrap_or((step, ""));
    let result = match name {
        "ping" => client.vmm_ping_get().await.map(|ping| format!("{} {:?}", ping.version, ping.features)),
        "create" => {
            let text = std::fs::read_to_string(value).map_err(|e| format!("{value}: {e}"))?;
            let config: VmConfig = serde_json::from_str(&text).map_err(|e| format!("{value}: {e}"))?;
            done(client.create_vm(config).await)
        }
        "info" => client.vm_info_get().await.map(|info| {
            let tree = info.device_tree.unwrap_or_default();
            let mut devices: Vec<String> = tree
                .into_iter()
                .map(|(id, node)| format!("{id} {}", node.pci_bdf.unwrap_or_default()))
                .collect();
            devices.sort();
            format!("{:?} [{}]", info.state, devices.join(", "))
        }),
        "counters" => client.vm_counters_get().await.map(|counters| {
            let mut names: Vec<String> =
                counters.into_iter().map(|(id, counters)| format!("{id} {}", counters.len())).collect();
            names.sort();
            names.join(", ")
        }),
        "boot" => done(client.boot_vm().await),
        "pause" => done(client.pause_vm().await),
        "resume" => done(client.resume_vm().await),
        "reboot" => done(client.reboot_vm().await),
        "shutdown" => done(client.shutdown_vm().await),
        "delete" => done(client.delete_vm().await),
        "power-button" => done(client.power_button_vm().await),
        "nmi" => done(client.vmm_nmi_put().await),
        "shutdown-vmm" => done(client.shutdown_vmm().await),
        "resize" => {
            let vcpus = value.parse().map_err(|e| format!("{step}: {e}"))?;
            let resize = VmResize { desired_vcpus: Some(vcpus), ..VmResize::new() };
            done(client.vm_resize_put(resize).await)
        }
        "add-device" => {
            let (path, id) = value.split_once(',').ok_or("add-device=PATH,ID")?;
            let device = DeviceConfig { id: Some(id.to_owned()), ..DeviceConfig::new(path.to_owned()) };
            match client.vm_add_device_put(device).await {
                Ok(place) => Ok(format!("{} {}", place.id, place.bdf)),
                // Before boot the answer is 204, for which the crate has no words.
                Err(Error::Serde(_)) => Ok("done".to_owned()),
                Err(e) => Err(e),
            }
        }
        "remove-device" => {
            done(client.vm_remove_device_put(VmRemoveDevice { id: Some(value.to_owned()) }).await)
        }
        _ => return Err(format!("{step} is no step")),
    };
    match result {
        Ok(line) => Ok(line),
        Err(Error::Api(refusal)) => Ok(format!("{} {}", refusal.code.as_u16(), refusal.body)),
        Err(e) => Err(format!("{step}: {e}")),
    }
}

fn done(result: Result<(), Error>) -> Result<String, Error> {
    result.map(|()| "done".to_owned())
}
