//! Where vCPU threads run on the host: the host processors of each (sched_setaffinity(2)), and with whom it may share a core (Linux
//! `Documentation/admin-guide/hw-vuln/core-scheduling.rst`).

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, Once, PoisonError};

use log::{info, warn};
use rustix::io::Errno;
use rustix::thread::{
    CoreSchedulingScope, CpuSet, Pid, create_core_scheduling_cookie, gettid, pull_core_scheduling_cookie,
    sched_getaffinity, sched_setaffinity,
};

use crate::config::{CoreScheduling, CpusConfig};
use crate::remedy::remedy;

/// A vCPU that cannot run, or not where it is to.
#[derive(Debug, thiserror::Error)]
pub enum PlacementError {
    /// No thread.
    #[error("cannot create the threads of the vCPUs: {source}; {}", remedy(source))]
    Thread {
        /// What the kernel said.
        source: io::Error,
    },
    /// The host's processors cannot be had.
    #[error(
        "--cpus affinity: vCPU {vcpu} cannot run on host processors {hosts:?}: {source}; \
         /sys/devices/system/cpu/online lists those there are, and the VMM's cpuset may allow fewer"
    )]
    Affinity {
        /// The vCPU.
        vcpu: u16,
        /// The host's processors.
        hosts: Vec<usize>,
        /// What the kernel said.
        source: io::Error,
    },
}

impl PlacementError {
    /// No thread.
    pub fn thread(source: io::Error) -> Self {
        Self::Thread { source }
    }
}

/// Where the vCPUs of a machine run.
#[derive(Clone, Debug)]
pub struct Placement {
    affinity: BTreeMap<u16, Vec<usize>>,
    cores: Cores,
}

impl Placement {
    /// As the configuration says, which has been validated.
    pub fn new(config: &CpusConfig) -> Self {
        let places = config.affinity.iter().flatten();
        let affinity = places
            .filter_map(|place| Some((u16::try_from(place.vcpu).ok()?, place.host_cpus.clone())))
            .collect();
        let cores = match config.core_scheduling {
            CoreScheduling::Off => Cores::Any,
            CoreScheduling::Vcpu => Cores::Own,
            CoreScheduling::Vm => Cores::Shared(Arc::default()),
        };
        Self { affinity, cores }
    }

    /// With whom the vCPUs may share a core.
    pub fn cores(&self) -> Cores {
        self.cores.clone()
    }

    /// Has `spawn` make the thread of a vCPU where it is to run.
    ///
    /// # Errors
    /// See [`PlacementError`].
    pub fn spawn<T>(&self, vcpu: u16, spawn: impl FnOnce() -> io::Result<T>) -> Result<T, PlacementError> {
        let Some(hosts) = self.affinity.get(&vcpu) else {
            return spawn().map_err(PlacementError::thread);
        };
        let refused =
            |source: Errno| PlacementError::Affinity { vcpu, hosts: hosts.clone(), source: source.into() };
        // A thread begins where the one that makes it may run. So what is wrong is known before there is a thread.
        let before = sched_getaffinity(None).map_err(refused)?;
        let mut wanted = CpuSet::new();
        hosts.iter().filter(|host| **host < CpuSet::MAX_CPU).for_each(|host| wanted.set(*host));
        let result = sched_setaffinity(None, &wanted).and_then(|()| sched_getaffinity(None));
        let result = match result {
            // The kernel leaves out those that are not there.
            Ok(now) if now == wanted => spawn().map_err(PlacementError::thread),
            Ok(_) => Err(refused(Errno::INVAL)),
            Err(e) => Err(refused(e)),
        };
        if let Err(e) = sched_setaffinity(None, &before) {
            warn!("the main thread stays on the host processors of vCPU {vcpu}: {e}");
        }
        result
    }
}

/// With whom vCPUs may share a core of the host, which has several threads where it has simultaneous multithreading.
#[derive(Clone, Debug)]
pub enum Cores {
    /// With anybody.
    Any,
    /// With nobody.
    Own,
    /// With vCPUs of this machine; one of them, whose tag the others take over. In the end that is the first, which never goes.
    Shared(Arc<Mutex<Option<Pid>>>),
}

impl Cores {
    /// Tags the calling thread, that of a vCPU.
    pub fn enter(&self, vcpu: u16) {
        let own = || create_core_scheduling_cookie(gettid(), CoreSchedulingScope::Thread);
        let result = match self {
            Self::Any => Ok(()),
            Self::Own => own(),
            Self::Shared(leader) => {
                let mut leader = leader.lock().unwrap_or_else(PoisonError::into_inner);
                let result = match *leader {
                    None => own(),
                    Some(leader) => pull_core_scheduling_cookie(leader, CoreSchedulingScope::Thread),
                };
                if result.is_ok() && (leader.is_none() || vcpu == 0) {
                    *leader = Some(gettid());
                }
                result
            }
        };
        if let Err(e) = result {
            not_tagged(e);
        }
    }
}

/// Says it once for all vCPUs and machines of this process.
fn not_tagged(error: Errno) {
    static SAID: Once = Once::new();
    SAID.call_once(|| match error {
        Errno::NODEV => info!("core scheduling: cores of this host have one thread each, so none is shared"),
        Errno::INVAL => {
            info!("core scheduling: this host's kernel has none (CONFIG_SCHED_CORE); vCPUs may share a core with others");
        }
        e => info!("core scheduling: {e}; vCPUs may share a core with others"),
    });
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn placement(text: &str) -> Placement {
        Placement::new(&CpusConfig::parse(text).unwrap())
    }

    fn allowed() -> Vec<usize> {
        let set = sched_getaffinity(None).unwrap();
        (0..CpuSet::MAX_CPU).filter(|host| set.is_set(*host)).collect()
    }

    #[test]
    fn a_thread_runs_where_it_is_to_and_who_makes_it_where_it_was() {
        let before = allowed();
        let last = *before.last().unwrap();
        let placement = placement(&format!("boot=2,affinity=[1@[{last}]]"));
        let of = |vcpu| placement.spawn(vcpu, || Ok(thread::spawn(allowed))).unwrap().join().unwrap();
        assert_eq!((of(0), of(1)), (before.clone(), vec![last]));
        assert_eq!(allowed(), before);
    }

    #[test]
    fn host_processors_that_are_not_there_are_an_error_and_no_thread() {
        let before = allowed();
        let first = before[0];
        for text in ["boot=1,affinity=[0@[1023]]", &format!("boot=1,affinity=[0@[{first},1023]]")] {
            let result = placement(text).spawn(0, || -> io::Result<()> { panic!("a thread was made") });
            let message = result.unwrap_err().to_string();
            assert!(message.contains("vCPU 0") && message.contains("1023"), "{message}");
            assert_eq!(allowed(), before);
        }
    }

    #[test]
    fn vcpus_of_a_machine_take_over_the_tag_of_the_first_where_the_kernel_has_tags() {
        let cookie = || rustix::thread::core_scheduling_cookie(gettid(), CoreSchedulingScope::Thread);
        let cores = placement("boot=3").cores();
        let tags: Vec<_> = thread::scope(|scope| {
            let handles: Vec<_> = (0..3)
                .rev()
                .map(|vcpu| {
                    let cores = cores.clone();
                    // One after the other, and alive: a tag is taken over from a thread.
                    let (tell, told) = std::sync::mpsc::channel();
                    let handle = scope.spawn(move || {
                        cores.enter(vcpu);
                        tell.send(cookie()).unwrap();
                        thread::park();
                    });
                    (told.recv().unwrap(), handle)
                })
                .collect();
            handles.iter().for_each(|(_, handle)| handle.thread().unpark());
            handles.into_iter().map(|(tag, _)| tag).collect()
        });
        let Cores::Shared(leader) = &cores else { panic!("{cores:?}") };
        if tags[0].as_ref().is_ok_and(|tag| *tag != 0) {
            assert!(tags.iter().all(|tag| *tag == tags[0]), "{tags:?}");
            assert!(leader.lock().unwrap().is_some());
        } else {
            // Nothing to take over, and nobody to take it over from.
            assert!(leader.lock().unwrap().is_none(), "{tags:?}");
        }
    }
}
