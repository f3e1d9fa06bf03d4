//! Namespace tests: real kernel objects, real programs, and a leak detector on every pod's link.
//!
//! 1. each case names the agents it wants and the values of rp_filter it runs with
//! 2. cases of one rp_filter value share a lab (`lab`), one after the other; a failure ends the lab
//! 3. the detector knows no address of the project: what passes a protected pod's link is a leak unless it is sealed, neighbour
//!    discovery, the agent's DNS, or of an outside destination that the lab or the case declares
//! 4. it is set to zero before a case; after a case with agents it must still read zero
//! 5. a case that outlives its limit fails, and its lab is taken down under it
//!
//! Needs root; without it every case is reported as ignored with the reason, and fails where CI=true.
//! TENC_LONG=1 runs the long forms. TENC_SEED has the random rounds of another run again. TENCRYPT is the binary under test, TENCRYPT_FAULT_BIN the test build.

#![expect(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "the lists are the core's, this is a test"
)]
#![expect(unreachable_pub, reason = "every module here is part of one test program")]

mod attackers;
mod audit;
mod bridge;
mod cgroup;
mod connectivity;
mod crash;
mod directory;
mod dns;
mod escape;
mod faults;
mod floods;
mod former;
mod frames;
mod guard;
mod host;
mod hostile;
mod lab;
mod ladder;
mod lifecycle;
mod link_scope;
mod load;
mod marked;
mod matrix;
mod names;
mod nodeports;
mod packets;
mod pod;
mod project_dns;
mod ranges;
mod reach;
mod replays;
mod resolvers;
mod services;
mod snapshot;
mod sockets;
mod status;
mod stopping;
mod takeover;
mod tamper;
mod untouched;
mod vanish;
mod watch;
mod ways;

use std::any::Any;
use std::io::Write as _;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use libtest_mimic::{Arguments, Completion, Failed, Trial};

use lab::{Agents, Lab, RANGES, Sweeper};

/// What a case expects of the leak detector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// Nothing in clear, and something sealed.
    Sealed,
    /// Nothing in clear.
    NoLeak,
    /// The case looks itself.
    Own,
}

/// One promise to hold.
pub struct Case {
    name: &'static str,
    agents: Agents,
    expect: Expect,
    /// Once more with the cluster's ranges.
    with_ranges: bool,
    rp_filters: &'static [u8],
    limit: Duration,
    run: fn(&Lab),
}

impl Case {
    /// A case with the four protected pods, at rp_filter 1 only, 60 s at most.
    pub const fn new(name: &'static str, run: fn(&Lab)) -> Self {
        let limit = Duration::from_secs(60);
        Self {
            name,
            agents: Agents::On(""),
            expect: Expect::NoLeak,
            with_ranges: false,
            rp_filters: &[1],
            limit,
            run,
        }
    }

    /// Also at rp_filter 0 and 2.
    pub const fn every_rp_filter(self) -> Self {
        Self { rp_filters: &[0, 1, 2], ..self }
    }

    /// Something must have gone through the tunnel.
    pub const fn sealed(self) -> Self {
        Self { expect: Expect::Sealed, ..self }
    }

    /// The case reads the leak detector itself.
    pub const fn looks_itself(self) -> Self {
        Self { expect: Expect::Own, ..self }
    }

    /// Once more with agents that know the cluster's ranges.
    pub const fn and_with_ranges(self) -> Self {
        Self { with_ranges: true, ..self }
    }

    /// With other agents.
    pub const fn agents(self, agents: Agents) -> Self {
        Self { agents, ..self }
    }

    /// With another limit.
    pub const fn seconds(self, seconds: u64) -> Self {
        Self { limit: Duration::from_secs(seconds), ..self }
    }
}

/// The lab that the next case may go on with.
static CURRENT: Mutex<Option<Arc<Lab>>> = Mutex::new(None);

/// Whether the long forms were asked for.
pub fn long() -> bool {
    std::env::var_os("TENC_LONG").is_some_and(|v| v == "1")
}

/// A line for whoever watches the run.
pub fn say(line: &str) {
    // Nobody may be listening any more.
    let _ = writeln!(std::io::stderr(), "{line}");
}

fn main() -> std::process::ExitCode {
    let mut args = Arguments::from_args();
    args.test_threads = Some(1);
    let mut cases: Vec<(u8, Agents, &'static Case)> = Vec::new();
    for group in [
        untouched::CASES,
        escape::CASES,
        link_scope::CASES,
        frames::CASES,
        sockets::CASES,
        nodeports::CASES,
        former::CASES,
        resolvers::CASES,
        marked::CASES,
        ranges::CASES,
        connectivity::CASES,
        guard::CASES,
        reach::CASES,
        names::CASES,
        project_dns::CASES,
        hostile::CASES,
        attackers::CASES,
        replays::CASES,
        bridge::CASES,
        floods::CASES,
        ladder::CASES,
        audit::CASES,
        lifecycle::CASES,
        stopping::CASES,
        crash::CASES,
        faults::CASES,
        takeover::CASES,
        matrix::CASES,
        directory::CASES,
        watch::CASES,
        vanish::CASES,
        tamper::CASES,
        status::CASES,
        host::CASES,
    ] {
        for case in group {
            let ranges = case.with_ranges.then_some(Agents::On(RANGES));
            for agents in [Some(case.agents), ranges].into_iter().flatten() {
                cases.extend(case.rp_filters.iter().map(|rp| (*rp, agents, case)));
            }
        }
    }
    // The strictest value first; within a lab, agents change as seldom as they can.
    let rank = |rp: u8| if rp == 1 { 0 } else { rp + 1 };
    cases.sort_by_key(|(rp, agents, _)| (rank(*rp), *agents));
    let trials = cases
        .into_iter()
        .map(|(rp, agents, case)| {
            let ranges = if agents == case.agents { "" } else { "_with_ranges" };
            let name = format!("rp_filter_{rp}::{}{ranges}", case.name);
            Trial::ignorable_test(name, move || trial(rp, agents, case))
        })
        .collect();
    let sweeper = (!args.list && is_root()).then(Sweeper::start);
    let conclusion = libtest_mimic::run(&args, trials);
    drop(take_current());
    drop(sweeper);
    conclusion.exit_code()
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

fn take_current() -> Option<Arc<Lab>> {
    CURRENT.lock().unwrap_or_else(PoisonError::into_inner).take()
}

/// Ignored with the reason; a failure where everything must run.
fn cannot(reason: &str) -> Result<Completion, Failed> {
    if std::env::var_os("CI").is_some_and(|v| v == "true") {
        return Err(format!("CI=true, and {reason}").into());
    }
    Ok(Completion::ignored_with(reason))
}

fn trial(rp: u8, agents: Agents, case: &'static Case) -> Result<Completion, Failed> {
    if !is_root() {
        return cannot("it needs root for network namespaces");
    }
    if matches!(agents, Agents::Fault(_)) && lab::faulty_tencrypt().is_none() {
        return cannot("TENCRYPT_FAULT_BIN names no test build");
    }
    let lab = match take_current().filter(|lab| lab.rp_filter() == rp) {
        Some(lab) => lab,
        None => within(Duration::from_secs(90), move || Arc::new(Lab::up(rp)))?,
    };
    let shared = Arc::clone(&lab);
    let outcome = within(case.limit + Duration::from_secs(60), move || {
        shared.ensure(agents);
        shared.undeclare();
        shared.reset_leaks();
        (case.run)(&shared);
        if case.expect != Expect::Own {
            shared.assert_no_leak();
        }
        if case.expect == Expect::Sealed {
            shared.assert_sealed();
        }
    });
    match outcome {
        Ok(()) => {
            *CURRENT.lock().unwrap_or_else(PoisonError::into_inner) = Some(lab);
            Ok(Completion::Completed)
        }
        Err(failed) => {
            let logs = lab.logs();
            lab.down();
            Err(format!("{}\n{logs}", failed.message().unwrap_or("failed")).into())
        }
    }
}

/// Runs `f` on a thread of its own; a panic or the end of the time is a failure.
fn within<T: Send + 'static>(limit: Duration, f: impl FnOnce() -> T + Send + 'static) -> Result<T, Failed> {
    let (send, receive) = mpsc::channel();
    let worker = thread::spawn(move || {
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f));
        // The receiver is gone when the time is over.
        let _ = send.send(outcome);
    });
    let outcome = receive.recv_timeout(limit).map_err(|_| format!("not done within {limit:?}"))?;
    worker.join().map_err(|panic| message(&*panic))?;
    outcome.map_err(|panic| message(&*panic).into())
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()))
        .unwrap_or_else(|| "panicked".to_owned())
}
