//! Running scenarios: grouped by the host they need, a few hosts at a time, with a verdict for each.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::artifacts::Artifacts;
use crate::debian;
use crate::error::{Error, Result, ensure};
use crate::host::Host;
use crate::rpc::wait_for;
use crate::spec::{HostSpec, Kernel};

/// Lines of the timelines that a failure prints.
const SHOWN: usize = 100;
/// Lines in the host's kernel log that no scenario may cause.
const TROUBLE: &str = "BUG:|Oops|WARNING: CPU|general protection|DMAR:.*fault|soft lockup|blocked for more";

/// One scenario: the host it needs and what it does there.
#[derive(Clone)]
pub struct Scenario {
    /// Unique; a sentence in words joined by `_`.
    pub name: String,
    /// The host.
    pub host: HostSpec,
    /// The guest's kernel.
    pub guest: Kernel,
    /// What it does; the verdict is its result.
    pub run: fn(&Case<'_>) -> Result<()>,
    /// Whether `--short` leaves it out.
    pub long: bool,
}

impl fmt::Debug for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scenario").field("name", &self.name).finish_non_exhaustive()
    }
}

/// What a scenario is given.
#[derive(Debug)]
pub struct Case<'a> {
    /// The booted host. Nothing runs on it.
    pub host: &'a Host,
    /// The guest kernel to use.
    pub guest: Kernel,
    /// Time on the host's timeline when the scenario began.
    pub began: Duration,
    /// Length of a scenario that takes as long as one likes, in minutes.
    pub minutes: u32,
}

/// Counts of a test run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Tests that held.
    pub passed: usize,
    /// Tests that did not.
    pub failed: usize,
    /// Tests that were not run.
    pub skipped: usize,
}

impl Tally {
    /// Adds another count.
    pub fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }

    /// Adds one test.
    pub fn count(&mut self, held: bool) {
        if held { self.passed += 1 } else { self.failed += 1 }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

/// Runs `scenarios` on up to `jobs` hosts at a time. `minutes` is for those that take as long as one likes.
pub fn run(scenarios: &[Scenario], artifacts: &Artifacts, jobs: usize, minutes: u32) -> Tally {
    let plan = Mutex::new(Plan::new(scenarios));
    let tally = Mutex::new(Tally::default());
    thread::scope(|scope| {
        for _ in 0..jobs.max(1) {
            scope.spawn(|| {
                let mut host = None;
                let mut group = None;
                loop {
                    let next = plan.lock().unwrap_or_else(PoisonError::into_inner).next(group);
                    let Some((from, scenario, guests)) = next else { return };
                    if group.replace(from) != Some(from) {
                        host = None;
                    }
                    let held = try_scenario(scenario, artifacts, &guests, &mut host, minutes);
                    tally.lock().unwrap_or_else(PoisonError::into_inner).count(held);
                }
            });
        }
    });
    tally.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// What is left to run, by the host it needs.
struct Plan<'a> {
    groups: Vec<Group<'a>>,
}

/// Scenarios that can share a host.
struct Group<'a> {
    left: VecDeque<&'a Scenario>,
    /// Kernels of their guests: the host carries them all.
    guests: Vec<Kernel>,
    /// Whether some worker has a host for it.
    begun: bool,
}

impl<'a> Plan<'a> {
    fn new(scenarios: &'a [Scenario]) -> Self {
        let mut groups: BTreeMap<&HostSpec, VecDeque<&Scenario>> = BTreeMap::new();
        for scenario in scenarios {
            groups.entry(&scenario.host).or_default().push_back(scenario);
        }
        let groups = groups.into_iter().map(|(host, left)| {
            let mut guests: BTreeSet<Kernel> = left.iter().map(|scenario| scenario.guest).collect();
            // Scenarios name that one where the kernel is no matter, and what is on Debian's disks is for it.
            if host.debian || guests.contains(&Kernel::Generic6_1) || guests.contains(&Kernel::Cloud6_1) {
                guests.insert(debian::KERNEL);
            }
            Group { left, guests: guests.into_iter().collect(), begun: false }
        });
        Self { groups: groups.collect() }
    }

    /// The next scenario for a worker whose host is of group `current`: of the same group if one is left, then of the
    /// longest group that nobody has begun, and at last of whichever is longest.
    fn next(&mut self, current: Option<usize>) -> Option<(usize, &'a Scenario, Vec<Kernel>)> {
        let longest = |begun: bool| {
            let groups = self.groups.iter().enumerate();
            let fit = groups.filter(|(_, group)| group.begun == begun && !group.left.is_empty());
            fit.max_by_key(|(_, group)| group.left.len()).map(|(number, _)| number)
        };
        let own =
            current.filter(|number| self.groups.get(*number).is_some_and(|group| !group.left.is_empty()));
        let number = own.or_else(|| longest(false)).or_else(|| longest(true))?;
        let group = self.groups.get_mut(number)?;
        group.begun = true;
        Some((number, group.left.pop_front()?, group.guests.clone()))
    }
}

/// How often a scenario is tried: QEMU breaks a guest's memory now and then (docs/testing.md). Every failure is printed in
/// full, the first marked `AGAIN`.
const ATTEMPTS: usize = 2;

/// Runs one scenario on `host`, booting it first if there is none. A failure costs the host; the next scenario gets a fresh one.
fn try_scenario(
    scenario: &Scenario,
    artifacts: &Artifacts,
    guests: &[Kernel],
    current: &mut Option<Host>,
    minutes: u32,
) -> bool {
    (1..=ATTEMPTS).any(|attempt| {
        let verdict = if attempt < ATTEMPTS { "AGAIN" } else { "FAIL" };
        let host = match current.take() {
            Some(host) => host,
            None => match Host::boot(&scenario.host, artifacts, guests) {
                Ok(host) => host,
                Err(error) => {
                    println!("{verdict} {}: the host did not boot: {error}", scenario.name);
                    return false;
                }
            },
        };
        let held = attempt_once(scenario, &host, verdict, minutes);
        if held {
            *current = Some(host);
        }
        held
    })
}

/// Runs one scenario on `host` and prints its verdict; `verdict` is what a failure is called.
fn attempt_once(scenario: &Scenario, host: &Host, verdict: &str, minutes: u32) -> bool {
    let begin = Instant::now();
    let case = Case { host, guest: scenario.guest, began: host.timeline.now(), minutes };
    let outcome = catch_unwind(AssertUnwindSafe(|| (scenario.run)(&case)))
        .unwrap_or_else(|_| Err(Error::Check("the scenario itself panicked".to_owned())))
        .and_then(|()| healthy(host));
    let took = begin.elapsed().as_secs_f64();
    match outcome {
        Ok(()) => println!("PASS {} ({took:.1} s)", scenario.name),
        Err(ref error) => report(verdict, scenario, host, case.began, error, took),
    }
    outcome.is_ok()
}

fn report(verdict: &str, scenario: &Scenario, host: &Host, began: Duration, error: &Error, took: f64) {
    // What the kernels have to say about it goes on the timelines first.
    let _ = host.run_for("dmesg | tail -n 12", Duration::from_secs(5));
    let saved = host.save_log(&scenario.name);
    let log = saved.map_or_else(|e| e.to_string(), |path| path.display().to_string());
    println!(
        "{verdict} {} ({took:.1} s): {error}\n  host: {}\n  guest: Linux {}\n  all of it: {log}\n{}",
        scenario.name,
        host.spec.describe(),
        scenario.guest,
        host.timeline.columns(began, SHOWN)
    );
}

/// What must hold on the host after every scenario, whatever it did.
fn healthy(host: &Host) -> Result<()> {
    wait_for("no VMM is left", Duration::from_secs(10), || {
        let left = host.run("pidof dormouse")?.text;
        Ok(if left.is_empty() { Ok(()) } else { Err(left) })
    })?;
    let trouble = host.run(&format!("dmesg | grep -E '{TROUBLE}'"))?.text;
    ensure(trouble.is_empty(), || format!("the host's kernel complains: {trouble}"))?;
    for bdf in host.spec.addresses() {
        let id = host.poke(&bdf)?;
        ensure(id.len() == 8 && id != "ffffffff", || format!("host: {bdf} does not answer: {id}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scenario(name: &str, cpus: u32) -> Scenario {
        Scenario {
            name: name.to_owned(),
            host: HostSpec::new(&[]).cpus(cpus),
            guest: Kernel::Cloud6_12,
            run: |_| Ok(()),
            long: false,
        }
    }

    #[test]
    fn each_scenario_is_given_out_once_and_a_second_worker_helps_with_a_long_group() {
        let all = [scenario("a", 1), scenario("b", 1), scenario("c", 1), scenario("d", 2)];
        let mut plan = Plan::new(&all);
        let mut take = |group| plan.next(group).map(|(number, scenario, _)| (number, scenario.name.clone()));
        assert_eq!(take(None), Some((0, "a".to_owned())), "the longest group first");
        assert_eq!(take(None), Some((1, "d".to_owned())), "then one that nobody has begun");
        assert_eq!(take(Some(0)), Some((0, "b".to_owned())), "a worker stays with its host");
        assert_eq!(take(Some(1)), Some((0, "c".to_owned())), "and helps when its own group is done");
        assert_eq!(take(Some(0)), None);
    }
}
