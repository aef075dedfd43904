//! Watts, where the host measures any: hwmon sensors of a device or of what is above it, and RAPL for the platform.
//!
//! Linux, Documentation/hwmon/sysfs-interface.rst (`powerN_input`, `powerN_average` in microwatts, `energyN_input` in microjoules) and
//! Documentation/power/powercap/powercap.rst. A counter of energy gives watts from its second reading on.
//!
//! Reading a sensor can wake the device that it is part of. So what the host has suspended is not read.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// What a device draws.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// Watts.
    pub watts: f64,
    /// Measured above the device, so it is that of everything below that port.
    pub shared: bool,
}

/// Reads sensors; remembers counters.
#[derive(Clone, Debug)]
pub struct Meter {
    sysfs: PathBuf,
    last: HashMap<PathBuf, (Instant, u64)>,
}

impl Default for Meter {
    fn default() -> Self {
        Self::new("/sys")
    }
}

impl Meter {
    /// Sensors below `sysfs`.
    pub fn new(sysfs: impl Into<PathBuf>) -> Self {
        Self { sysfs: sysfs.into(), last: HashMap::new() }
    }

    /// What the device at this host address draws, as near to it as is measured.
    pub fn device(&mut self, bdf: &str, now: Instant) -> Option<Draw> {
        let link = self.sysfs.join("bus/pci/devices").join(bdf);
        let device = fs::canonicalize(link).ok()?;
        // Up to and without the host bridge, whose name is no address.
        let levels = device.ancestors().take_while(|level| is_function(level));
        for (height, level) in levels.enumerate() {
            if is_suspended(level) {
                continue;
            }
            if let Some(watts) = self.sensors(&level.join("hwmon"), now) {
                return Some(Draw { watts, shared: height > 0 });
            }
        }
        None
    }

    /// What the platform draws: its own counter if there is one, otherwise the sum of the processor packages.
    pub fn platform(&mut self, now: Instant) -> Option<f64> {
        let zones = children(&self.sysfs.join("class/powercap"), |name| {
            // "intel-rapl:0" is a zone, "intel-rapl:0:1" a part of it; AMD's have the same names.
            name.strip_prefix("intel-rapl:").is_some_and(|number| !number.contains(':'))
        });
        let (mut whole, mut packages) = (None, None);
        for zone in zones {
            let name = read(&zone.join("name")).unwrap_or_default();
            let range = number(&zone.join("max_energy_range_uj"));
            let Some(watts) = self.counter(&zone.join("energy_uj"), range, now) else { continue };
            if name == "psys" {
                whole = Some(watts);
            } else if name.starts_with("package") {
                packages = Some(packages.unwrap_or(0.0) + watts);
            }
        }
        whole.or(packages)
    }

    /// Whether a counter has been read that gives watts at its next reading.
    pub fn is_waiting(&self) -> bool {
        !self.last.is_empty()
    }

    /// The first sensor of power in a device's hwmon directories, or else the first counter of energy.
    fn sensors(&mut self, hwmon: &Path, now: Instant) -> Option<f64> {
        let all = children(hwmon, |name| name.starts_with("hwmon"));
        let files = |prefix: &'static str, suffix: &'static str| {
            all.iter().flat_map(move |directory| {
                children(directory, move |name| name.starts_with(prefix) && name.ends_with(suffix))
            })
        };
        let powers = files("power", "_input").chain(files("power", "_average"));
        if let Some(microwatts) = powers.filter_map(|file| number(&file)).next() {
            return Some(micro(microwatts));
        }
        let counters: Vec<PathBuf> = files("energy", "_input").collect();
        counters.iter().find_map(|file| self.counter(file, None, now))
    }

    /// Watts since the last reading of a counter of microjoules, which starts again after `range`.
    fn counter(&mut self, file: &Path, range: Option<u64>, now: Instant) -> Option<f64> {
        let value = number(file)?;
        let (before, last) = self.last.insert(file.to_owned(), (now, value))?;
        let seconds = now.saturating_duration_since(before).as_secs_f64();
        let used = match value.checked_sub(last) {
            Some(used) => used,
            None => range?.checked_sub(last)?.checked_add(value)?,
        };
        (seconds > 0.0).then(|| micro(used) / seconds)
    }
}

#[expect(clippy::cast_precision_loss, reason = "a measured value of a few digits")]
fn micro(value: u64) -> f64 {
    value as f64 / 1e6
}

/// Whether a directory of sysfs is that of a PCI function.
fn is_function(level: &Path) -> bool {
    let name = level.file_name().and_then(|name| name.to_str());
    name.is_some_and(|name| name.parse::<pci::Bdf>().is_ok())
}

fn is_suspended(device: &Path) -> bool {
    read(&device.join("power/runtime_status")).is_some_and(|status| status.starts_with("suspend"))
}

fn read(file: &Path) -> Option<String> {
    fs::read_to_string(file).ok().map(|text| text.trim().to_owned())
}

fn number(file: &Path) -> Option<u64> {
    read(file)?.parse().ok()
}

/// What is in a directory and has such a name, sorted.
fn children(directory: &Path, wanted: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut found: Vec<PathBuf> =
        entries.filter(|path| path.file_name().and_then(|name| name.to_str()).is_some_and(&wanted)).collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::time::Duration;

    use super::*;
    use crate::client::peer::Scratch;

    const PORT: &str = "devices/pci0000:00/0000:00:01.0";
    const DEVICE: &str = "devices/pci0000:00/0000:00:01.0/0000:01:00.0";
    const BDF: &str = "0000:01:00.0";

    /// A host with one device below a port, both awake, and no sensor.
    fn host() -> (Scratch, Meter) {
        let scratch = Scratch::new();
        scratch.write(&format!("{PORT}/power/runtime_status"), "active\n");
        scratch.write(&format!("{DEVICE}/power/runtime_status"), "active\n");
        scratch.write("bus/pci/devices/.keep", "");
        let link = scratch.path(&format!("bus/pci/devices/{BDF}"));
        symlink(scratch.path(DEVICE), link).unwrap();
        let meter = Meter::new(scratch.path(""));
        (scratch, meter)
    }

    #[test]
    fn nothing_is_shown_where_nothing_is_measured() {
        let (_scratch, mut meter) = host();
        let now = Instant::now();
        assert_eq!((meter.device(BDF, now), meter.platform(now)), (None, None));
        assert_eq!(meter.device("0000:09:00.0", now), None);
        assert!(!meter.is_waiting());
    }

    #[test]
    fn a_devices_own_sensor_comes_before_that_of_its_port() {
        let (scratch, mut meter) = host();
        let now = Instant::now();
        scratch.write(&format!("{PORT}/hwmon/hwmon0/power1_average"), "25000000\n");
        assert_eq!(meter.device(BDF, now), Some(Draw { watts: 25.0, shared: true }));
        scratch.write(&format!("{DEVICE}/hwmon/hwmon1/power1_input"), "12500000\n");
        assert_eq!(meter.device(BDF, now), Some(Draw { watts: 12.5, shared: false }));
    }

    #[test]
    fn a_suspended_device_is_not_read() {
        let (scratch, mut meter) = host();
        scratch.write(&format!("{DEVICE}/hwmon/hwmon1/power1_input"), "12500000\n");
        scratch.write(&format!("{DEVICE}/power/runtime_status"), "suspended\n");
        assert_eq!(meter.device(BDF, Instant::now()), None);
        scratch.write(&format!("{PORT}/hwmon/hwmon0/power1_input"), "3000000\n");
        assert_eq!(meter.device(BDF, Instant::now()), Some(Draw { watts: 3.0, shared: true }));
        scratch.write(&format!("{PORT}/power/runtime_status"), "suspended\n");
        assert_eq!(meter.device(BDF, Instant::now()), None);
    }

    #[test]
    fn a_counter_of_energy_gives_watts_from_two_readings() {
        let (scratch, mut meter) = host();
        let file = format!("{DEVICE}/hwmon/hwmon1/energy1_input");
        let (first, second) = (Instant::now(), Instant::now() + Duration::from_secs(2));
        scratch.write(&file, "1000000\n");
        assert_eq!(meter.device(BDF, first), None);
        assert!(meter.is_waiting());
        scratch.write(&file, "9000000\n");
        let draw = meter.device(BDF, second).unwrap();
        assert!((draw.watts - 4.0).abs() < 0.01 && !draw.shared, "{draw:?}");
    }

    #[test]
    fn the_platform_is_the_sum_of_its_packages_or_its_own_counter_also_when_that_starts_again() {
        let (scratch, mut meter) = host();
        let zone = |name: &str, label: &str, energy: u64| {
            scratch.write(&format!("class/powercap/{name}/name"), label);
            scratch.write(&format!("class/powercap/{name}/max_energy_range_uj"), "100000000\n");
            scratch.write(&format!("class/powercap/{name}/energy_uj"), &energy.to_string());
        };
        let (first, second) = (Instant::now(), Instant::now() + Duration::from_secs(1));
        zone("intel-rapl:0", "package-0\n", 99_000_000);
        zone("intel-rapl:0:0", "core\n", 0);
        zone("intel-rapl:1", "package-1\n", 0);
        zone("intel-rapl-mmio:0", "package-0\n", 0);
        assert_eq!(meter.platform(first), None);
        zone("intel-rapl:0", "package-0\n", 9_000_000);
        zone("intel-rapl:0:0", "core\n", 50_000_000);
        zone("intel-rapl:1", "package-1\n", 5_000_000);
        zone("intel-rapl-mmio:0", "package-0\n", 50_000_000);
        let watts = meter.platform(second).unwrap();
        assert!((watts - 15.0).abs() < 0.01, "{watts}");

        zone("intel-rapl:2", "psys\n", 0);
        meter.platform(second);
        zone("intel-rapl:2", "psys\n", 60_000_000);
        let watts = meter.platform(second + Duration::from_secs(1)).unwrap();
        assert!((watts - 60.0).abs() < 0.01, "{watts}");
    }
}
