//! Huge pages of 1 GiB as a guest's memory, also under an assigned drive: they are taken, they come back, and a lack of them is refused. Those of 2 MiB
//! are in `memory.rs`.

use super::bad_input::{As, refuse};
use super::on;
use super::steps::{guest_is_content, vm, wait_for_drive};
use crate::error::{Error, Result, ensure};
use crate::host::Host;
use crate::runner::{Case, Scenario};
use crate::spec::{Device, HostSpec};

const KERNEL: &str = "--kernel /guest/6.12/vmlinuz --serial null --console off";
/// What the host says of its pages of 1 GiB.
const PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-1048576kB";

pub fn table() -> Vec<Scenario> {
    let host = HostSpec::devices(&[Device::Nvme]).gigantic_pages(2);
    vec![on(host, "pages_of_1_gib_are_a_guests_memory_and_an_assigned_drive_reaches_them", gigantic)]
}

fn free(host: &Host) -> Result<u64> {
    let text =
        host.sh(&format!("echo $(($(cat {PAGES}/free_hugepages) - $(cat {PAGES}/resv_hugepages)))"))?;
    text.trim().parse().map_err(|e| Error::Check(format!("{text}: {e}")))
}

fn gigantic(case: &Case<'_>) -> Result<()> {
    let host = case.host;
    let before = free(host)?;
    ensure(before == 2, || format!("the host has {before} pages of 1 GiB free"))?;
    for (keys, pages) in [("1G", 1), ("1G,shared=on", 1), ("2G,prefault=on", 2)] {
        let memory = format!("{keys},hugepages=on,hugepage_size=1G");
        let guest = host.start_vm(&vm(case, &[0]).memory(&memory))?;
        wait_for_drive(&guest)?;
        let taken = before - free(host)?;
        ensure(taken == pages, || format!("{memory}: {taken} pages are taken"))?;
        let size = host.sh("grep KernelPageSize /proc/$(cat /run/vmm.pid)/smaps | sort | uniq -c")?;
        ensure(size.contains("1048576 kB"), || format!("{memory}: pages are of {size}"))?;
        guest.sh("dd if=/dev/urandom of=/dev/nvme0n1 bs=1M count=16 conv=fsync 2>/dev/null; echo 3 >/proc/sys/vm/drop_caches")?;
        guest_is_content(&guest)?;
        guest.power_off()?;
        ensure(free(host)? == before, || "pages have not come back".to_owned())?;
    }
    let size = |keys: &str| format!("{KERNEL} --memory size={keys},hugepages=on,hugepage_size=1G");
    for (keys, words) in [
        ("3G", &["mem0", "3 huge pages of 1048576 KiB", "2 are free", "nr_hugepages"][..]),
        ("1536M", &["1073741824"]),
    ] {
        refuse(host, As::Root, &size(keys), words)?;
    }
    ensure(free(host)? == before, || "pages are lost after errors".to_owned())
}
