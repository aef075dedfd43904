//! The assigned NVMe drive: data written before a power cycle is read after it.

use std::time::Duration;

use super::steps::{FIRST, IDLE, bdf, bind, guest_is_content, unbind, vm, wait_for_drive};
use super::{NVME, scenario, with_old_kernels};
use crate::error::{Result, ensure};
use crate::runner::{Case, Scenario};

/// How much is written and compared: 16 MiB, DMA in both directions.
const MEGABYTES: u32 = 16;

pub fn table() -> Vec<Scenario> {
    with_old_kernels(scenario("nvme_keeps_its_bytes_over_power_cycles", keeps_bytes))
}

fn keeps_bytes(case: &Case<'_>) -> Result<()> {
    let (host, guest) = (case.host, case.host.start_vm(&vm(case, &[NVME]).cpus(2).memory("1G"))?);
    wait_for_drive(&guest)?;
    let disk = "/dev/nvme0n1";
    guest.sh_for(
        &format!("dd if=/dev/urandom of=/run/data bs=1M count={MEGABYTES} && dd if=/run/data of={disk} bs=1M conv=fsync"),
        Duration::from_secs(120),
    )?;
    let sum = |file: &str| {
        guest.sh_for(
            &format!("dd if={file} bs=1M count={MEGABYTES} 2>/dev/null | sha256sum"),
            Duration::from_secs(120),
        )
    };
    let written = sum("/run/data")?;
    for _ in 0..3 {
        let since = host.timeline.now();
        unbind(&guest, FIRST)?;
        host.wait_power_state(&bdf(NVME), "D3cold", IDLE)?;
        ensure(host.power_count(NVME, false, since) > 0, || "the firmware cut no power".to_owned())?;
        bind(&guest, FIRST)?;
        wait_for_drive(&guest)?;
        let read = sum(disk)?;
        ensure(read == written, || format!("wrote {written}, read {read} after the power cycle"))?;
    }
    guest_is_content(&guest)?;
    guest.power_off()
}
