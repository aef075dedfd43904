//! `GET /metrics`: what a monitoring system wants to know, as OpenMetrics text (OpenMetrics 1.0), written by `prometheus-client`, the Prometheus
//! project's own library. Made when asked for, from what [`vm.power`](super::power) shows too; no device is touched.
//!
//! [`text`] is for a client that wants the older text format. The names are kept stable: docs/metrics has rules and a dashboard for them.

#[cfg(test)]
mod tests;
mod text;

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};
use serde_json::Value;
use vfio_pm::sysfs::SYSFS;
use vfio_pm::{Histogram, Snapshot};

use super::Api;
use super::power::host_power;
use crate::status::VmState;

/// Labels of one sample.
type Labels = Vec<(&'static str, String)>;

/// One of a device's histograms.
type HistogramOf = fn(&Snapshot) -> &Histogram;

/// One device at the moment of the scrape.
#[derive(Debug)]
struct Device {
    labels: Labels,
    power: Snapshot,
    host: Value,
}

/// Everything that a scrape shows.
#[derive(Debug)]
struct Scrape {
    uptime: f64,
    state: Option<VmState>,
    devices: Vec<Device>,
}

/// Counters of [`Snapshot::counts`] with what they mean.
const COUNTS: &[(&str, &str, &str)] = &[
    ("off_requests", "off_requests", "_OFF evaluated by the guest that changed something"),
    ("on_requests", "on_requests", "_ON evaluated by the guest that changed something"),
    ("entries", "low_power_entries", "Times low power was entered"),
    ("entry_failures", "low_power_entry_failures", "Times the host refused low power"),
    ("exits", "low_power_exits", "Times low power was ended with the device answering"),
    ("losses", "losses", "Times the device did not come back"),
    ("recoveries", "recoveries", "Times a reset brought it back"),
    ("wakes", "host_wakes", "Wakes by the host"),
    ("notifications", "wake_notifications", "Wakes told to the guest through the event device"),
    ("native_pmes", "native_pmes", "Wakes told to the guest through the root port"),
    ("reentries", "reentries", "Times low power was entered again after a wake nobody asked for"),
    ("hold_offs_cancelled", "hold_offs_cancelled", "Times the guest changed its mind within the hold-off"),
    ("storm_hold_offs", "storm_hold_offs", "Hold-offs made longer by a wake storm"),
];

/// The figures in the older text format.
pub fn plain(api: &Api) -> Vec<u8> {
    text::from_open_metrics(&open_metrics(api)).into_bytes()
}

/// The figures as OpenMetrics.
pub fn open_metrics(api: &Api) -> String {
    let mut devices = Vec::new();
    let state = api.status.look(|_, state, machine| {
        for device in machine.iter().flat_map(|machine| &machine.devices) {
            devices.extend(device.power().map(|power| (device.id.clone(), power)));
        }
        state
    });
    let devices = devices.into_iter().map(|(id, power)| Device {
        labels: vec![("id", id), ("bdf", power.bdf.clone())],
        host: host_power(Path::new(SYSFS), &power.bdf),
        power,
    });
    let scrape = Scrape { uptime: api.start.elapsed().as_secs_f64(), state, devices: devices.collect() };
    scrape.text()
}

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let to = &mut encoder;
        let version: Labels = vec![("version", env!("CARGO_PKG_VERSION").to_owned())];
        to.encode_descriptor("build", "The VMM", None, MetricType::Info)?.encode_info(&version)?;
        to.encode_descriptor(
            "uptime",
            "Time since the VMM started",
            Some(&Unit::Seconds),
            MetricType::Gauge,
        )?
        .encode_gauge(&self.uptime)?;
        let states =
            [("created", VmState::Created), ("running", VmState::Running), ("paused", VmState::Paused)];
        let samples =
            states.map(|(name, state)| (vec![("state", name.to_owned())], self.state == Some(state)));
        gauges(to, "vm_state", "Whether the VM is in this state; in none before it is created", samples)?;
        self.encode_states(to)?;
        for (key, name, help) in COUNTS {
            let name = format!("device_power_{name}");
            let samples = self
                .devices
                .iter()
                .filter_map(|device| Some((device.labels.clone(), *device.power.counts.get(key)?)));
            counters(to, &name, help, samples)?;
        }
        let transitions = self.devices.iter().map(|device| (device.labels.clone(), device.power.transitions));
        counters(to, "device_power_transitions", "Changes of power state", transitions)?;
        let wakes = self.by_kind("cause", |power| &power.wakes);
        counters(to, "device_power_wakes", "Times the device left low power, by cause", wakes)?;
        let failures = self.by_kind("failure", |power| &power.failures);
        counters(to, "device_power_failures", "What went wrong", failures)?;
        let denials = self.by_kind("reason", |power| &power.denials);
        counters(to, "device_power_denials", "Times the guest's _OFF did not lead to low power", denials)?;
        let latencies: [(&str, &str, HistogramOf); 4] = [
            ("entry", "How long the host took to grant low power", |power| &power.entry_latency),
            ("exit", "How long the host took to end low power and the device to answer", |power| {
                &power.exit_latency
            }),
            ("ready", "From _ON until the guest was let in", |power| &power.ready_latency),
            ("wake", "From the host's wake until the guest was interrupted", |power| &power.wake_latency),
        ];
        for (name, help, of) in latencies {
            let samples = self.devices.iter().map(|device| (device.labels.clone(), of(&device.power)));
            histograms(to, &format!("device_power_{name}_latency"), help, samples)?;
        }
        self.encode_host(to)
    }
}

impl Scrape {
    fn text(self) -> String {
        let mut registry = Registry::with_prefix("dormouse");
        registry.register_collector(Box::new(Arc::new(self)));
        let mut text = String::new();
        // A string takes everything.
        let _ = encode(&mut text, &registry);
        text
    }

    fn by_kind<'a>(
        &'a self,
        label: &'static str,
        of: impl Fn(&'a Snapshot) -> &'a std::collections::BTreeMap<&'static str, u64> + 'a,
    ) -> impl Iterator<Item = (Labels, u64)> + 'a {
        self.devices.iter().flat_map(move |device| {
            of(&device.power).iter().map(move |(kind, value)| (with(&device.labels, label, kind), *value))
        })
    }

    fn encode_states(&self, to: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let states = self.devices.iter().flat_map(|device| {
            let present = device.power.state;
            let states = device.power.time_in_ms.keys();
            states.map(move |state| (with(&device.labels, "state", state), *state == present))
        });
        gauges(to, "device_power_state", "Whether the device is in this power state", states)?;
        let times = self.by_kind("state", |power| &power.time_in_ms);
        let mut family = to.encode_descriptor(
            "device_power_state_time",
            "Time spent in each power state",
            Some(&Unit::Seconds),
            MetricType::Counter,
        )?;
        for (labels, millis) in times {
            family.encode_family(&labels)?.encode_counter::<Labels, f64, f64>(&seconds(millis), None)?;
        }
        let latched = self.devices.iter();
        let latched = latched.map(|device| (device.labels.clone(), device.power.latched_by.is_some()));
        gauges(
            to,
            "device_power_latched",
            "Whether the slot is kept from low power, because a device did not come back",
            latched,
        )?;
        let offered = self.devices.iter().map(|device| (device.labels.clone(), device.power.offered));
        gauges(to, "device_power_offered", "Whether the guest has a power resource for the device", offered)
    }

    fn encode_host(&self, to: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let cold = self.devices.iter().filter_map(|device| {
            Some((device.labels.clone(), device.host.get("power_state")?.as_str()? == "D3cold"))
        });
        gauges(
            to,
            "device_host_d3cold",
            "Whether the host's kernel says that the device is in D3cold",
            cold,
        )?;
        let mut family = to.encode_descriptor(
            "device_host_suspended",
            "Time that the host's kernel has had the device suspended",
            Some(&Unit::Seconds),
            MetricType::Counter,
        )?;
        for device in &self.devices {
            if let Some(millis) = device.host.get("runtime_suspended_ms").and_then(Value::as_u64) {
                let value = seconds(millis);
                family.encode_family(&device.labels)?.encode_counter::<Labels, f64, f64>(&value, None)?;
            }
        }
        Ok(())
    }
}

fn with(labels: &Labels, name: &'static str, value: &str) -> Labels {
    let mut labels = labels.clone();
    labels.push((name, value.to_owned()));
    labels
}

#[expect(clippy::cast_precision_loss, reason = "285 000 years are exact to a millisecond")]
fn seconds(millis: u64) -> f64 {
    millis as f64 / 1e3
}

fn gauges(
    to: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    samples: impl IntoIterator<Item = (Labels, bool)>,
) -> fmt::Result {
    let mut family = to.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (labels, value) in samples {
        family.encode_family(&labels)?.encode_gauge(&i64::from(value))?;
    }
    Ok(())
}

fn counters(
    to: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    samples: impl IntoIterator<Item = (Labels, u64)>,
) -> fmt::Result {
    let mut family = to.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (labels, value) in samples {
        family.encode_family(&labels)?.encode_counter::<Labels, u64, f64>(&value, None)?;
    }
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "a latency of centuries need not be exact")]
fn histograms<'a>(
    to: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    samples: impl IntoIterator<Item = (Labels, &'a Histogram)>,
) -> fmt::Result {
    let mut family = to.encode_descriptor(name, help, Some(&Unit::Seconds), MetricType::Histogram)?;
    for (labels, histogram) in samples {
        // Bucket i ends at 2^i microseconds, the last one nowhere.
        let last = histogram.buckets.len().saturating_sub(1);
        let buckets: Vec<(f64, u64)> = (0_i32..)
            .zip(&histogram.buckets)
            .enumerate()
            .map(|(number, (power, count))| {
                (if number == last { f64::MAX } else { 2_f64.powi(power) / 1e6 }, *count)
            })
            .collect();
        let sum = histogram.total_us as f64 / 1e6;
        family.encode_family(&labels)?.encode_histogram::<Labels>(sum, histogram.count, &buckets, None)?;
    }
    Ok(())
}
