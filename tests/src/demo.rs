//! `cargo testbed demo`: the main job as a story. A guest with an assigned GPU and NIC lets both go idle; the host cuts
//! their power; the host's own access to the NIC wakes the guest; both work again.

use std::path::PathBuf;
use std::time::Duration;

use crate::artifacts::{self, Profile};
use crate::error::{Result, ensure};
use crate::guest::VmSpec;
use crate::host::{Host, sysfs};
use crate::rpc::wait_for;
use crate::scenarios::steps::{FIRST, IDLE, SECOND, WAKE, bind, interface, pass_traffic, unbind};
use crate::spec::{Device, HostSpec, Kernel, address};
use crate::timeline::{Entry, Lane};

const GPU: usize = 0;
const NIC: usize = 1;
/// How long both devices are left without power, for all to see.
const DARK: Duration = Duration::from_secs(2);
const WIDTH: usize = 44;

/// Tells the story; the summary comes last.
pub fn run(vmm: Option<PathBuf>) -> Result<bool> {
    let artifacts = artifacts::build(Profile::Testbed, vmm)?;
    println!("Dormouse on an emulated host: {}.", artifacts::version(&artifacts)?);
    println!(
        "Booting the host: QEMU, an IOMMU, a GPU and a NIC in slots whose power the firmware can cut.\n"
    );
    let host =
        Host::boot(&HostSpec::devices(&[Device::Gpu, Device::E1000e]), &artifacts, &[Kernel::Generic6_12])?;
    println!("{:>7}  {:WIDTH$} {:WIDTH$} GUEST", "seconds", "HOST", "FIRMWARE and VMM");
    host.timeline.watch(|entry| {
        if let Some(line) = line_of(entry) {
            println!("{line}");
        }
    });
    let result = story(&host);
    if let Err(error) = &result {
        let _ = host.save_log("demo");
        println!("\nThe story breaks off: {error}\n\n{}", host.timeline.columns(Duration::ZERO, 60));
    }
    result.map(|()| true)
}

fn story(host: &Host) -> Result<()> {
    let tell = |lane, text: String| host.timeline.record(lane, format!("[{text}]"));
    let version = host.sh("uname -r")?;
    tell(Lane::Host, format!("Linux {version} is up"));
    let (gpu, nic) = (address(GPU, 0), address(NIC, 0));
    let vm = VmSpec::new(Kernel::Generic6_12).device(host, &gpu).device(host, &nic).cpus(2).memory("1G");
    tell(Lane::Host, format!("dormouse starts with {gpu} and {nic}"));
    let guest = host.start_vm(&vm)?;
    let booted = host.timeline.now();
    tell(Lane::Guest, format!("Linux {} is up", guest.sh("uname -r")?));
    guest.sh("timeout 20 guest_tool drm")?;
    tell(Lane::Guest, "virtio_gpu bound, /dev/dri/card0 draws".to_owned());
    let name = interface(&guest, SECOND)?;
    host.set_link(NIC, true)?;
    pass_traffic(&guest, SECOND)?;
    tell(Lane::Guest, format!("e1000e bound, {name} passes traffic"));

    host.set_link(NIC, false)?;
    guest.sh(&format!("echo auto >{}", sysfs(SECOND, "power/control")))?;
    tell(Lane::Guest, format!("{name} has no link: idle"));
    tell(Lane::Guest, "GPU driver unbound: idle".to_owned());
    let idle = host.timeline.now();
    unbind(&guest, FIRST)?;
    host.wait_power_state(&gpu, "D3cold", IDLE)?;
    let gpu_off = host.timeline.now() - idle;
    host.wait_power_state(&nic, "D3cold", IDLE)?;
    let asleep = host.timeline.now();
    tell(Lane::Host, "both devices are without power".to_owned());
    host.stays_in(&gpu, "D3cold", DARK)?;

    let awake = || -> Result<u64> {
        let text = guest.probe(&format!("cat {}", sysfs(SECOND, "power/runtime_active_time")))?.text;
        Ok(text.trim().parse().unwrap_or_default())
    };
    let before = awake()?;
    tell(Lane::Host, format!("somebody reads the config space of {nic}"));
    let poked = host.timeline.now();
    host.poke(&nic)?;
    wait_for("the guest's driver wakes", WAKE, || {
        Ok(if awake()? > before { Ok(()) } else { Err("asleep".to_owned()) })
    })?;
    let woken = host.timeline.now() - poked;
    tell(Lane::Guest, "e1000e woken, by PME".to_owned());

    host.set_link(NIC, true)?;
    pass_traffic(&guest, SECOND)?;
    tell(Lane::Guest, format!("{name} passes traffic again"));
    let rebind = host.timeline.now();
    bind(&guest, FIRST)?;
    guest.sh("timeout 20 guest_tool drm")?;
    let drawn = host.timeline.now() - rebind;
    tell(Lane::Guest, "GPU driver bound, /dev/dri/card0 draws again".to_owned());
    let end = host.timeline.now();
    guest.power_off()?;
    tell(Lane::Host, "the VM is off, the devices are free".to_owned());

    println!("\nSummary, {:.0} s of guest time:", (end - booted).as_secs_f64());
    for (slot, name) in [(GPU, "GPU"), (NIC, "NIC")] {
        let (on, off, cuts) = shares(host, slot, booted, end);
        println!(
            "  {name}: power on {:.1} s, off {:.1} s; cut {cuts} times, by the firmware's own log",
            on.as_secs_f64(),
            off.as_secs_f64()
        );
        ensure(cuts > 0, || format!("the firmware never cut the power of the {name}"))?;
    }
    let ms = |time: Duration| time.as_secs_f64() * 1000.0;
    println!("  GPU driver unbound to D3cold: {:.0} ms", ms(gpu_off));
    println!("  GPU driver bound to first answer of the GPU: {:.0} ms", ms(drawn));
    println!("  host's access to the guest's driver awake: {:.0} ms", ms(woken));
    println!("  both devices dark together: {:.1} s", (poked - asleep).as_secs_f64());
    println!("Times are those of an emulated machine, some ten times slower than a real one.");
    Ok(())
}

/// Time on, time off, and the number of cuts of a slot between two moments.
fn shares(host: &Host, slot: usize, from: Duration, to: Duration) -> (Duration, Duration, usize) {
    let (mut on, mut off, mut cuts) = (Duration::ZERO, Duration::ZERO, 0);
    let (mut powered, mut since) = (true, from);
    for event in host.power_events(from).into_iter().filter(|event| event.slot == slot && event.at <= to) {
        *(if powered { &mut on } else { &mut off }) += event.at.saturating_sub(since);
        cuts += usize::from(powered && !event.on);
        (powered, since) = (event.on, event.at);
    }
    *(if powered { &mut on } else { &mut off }) += to.saturating_sub(since);
    (on, off, cuts)
}

/// The line of an entry that belongs to the story; commands and consoles do not.
fn line_of(entry: &Entry) -> Option<String> {
    let at = format!("{:>7.2}", entry.at.as_secs_f64());
    let told = || entry.text.strip_prefix('[')?.strip_suffix(']').map(str::to_owned);
    match entry.lane {
        Lane::Host => Some(format!("{at}  {}", told()?)),
        Lane::Guest => Some(format!("{at}  {:WIDTH$} {:WIDTH$} {}", "", "", told()?)),
        Lane::Power => Some(format!("{at}  {:WIDTH$} firmware: {}", "", entry.text)),
        Lane::Vmm => {
            let (_, message) = entry.text.split_once("-- ")?;
            message.starts_with("power ").then(|| format!("{at}  {:WIDTH$} {message}", ""))
        }
    }
}
