//! The launcher: plain async on the host; no packet passes here, and no project key leaves it.
//!
//! `tencrypt launch`, in order:
//!
//! 1. privileges: those that are not needed are given up (`privileges`); then everything that only reads: namespace, interface,
//!    directory, project, resolv.conf, key (`Plan`), and the addresses of this node (`node`)
//! 2. the pod's runtime files (`runtime`): a second launcher is refused. With `--guard-first` both come after the pod was
//!    closed (`gate`)
//! 3. the guard's skeleton, then the agent (`supervisor`): the one that runs already, or a new one
//! 4. `protected …` on standard output
//! 5. changes of the directory go to the agent, an agent that ended is replaced, until a signal or the namespace's end
//! 6. SIGTERM: the agent removes what it made, and the guard goes last (`take_down`); SIGQUIT: only the launcher ends
//!
//! A bring-up that fails is undone in reverse, and leaves the pod as closed as it was found (`guard::door`). While there is no
//! agent the project is closed: guard, routes and `tenc0` stay. `tencrypt clear` removes them. `tencrypt status` asks the running
//! launchers (`status`). May touch: what its modules may.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::pin::pin;

use anyhow::{Context, anyhow};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::{debug, info, warn};

use crate::agent;
use crate::cli::{self, Exit};

pub mod directory;
pub mod dns_helper;
mod gate;
pub mod guard;
pub mod keys;
mod node;
mod plan;
pub mod pod;
pub mod privileges;
pub mod process;
mod program;
mod rate;
pub mod runtime;
pub mod status;
mod supervisor;

use gate::Closed;
use guard::{Door, OrderedStop};
use plan::Plan;
use pod::{PodError, PodNetns, Target};
use process::Stop;
use runtime::{RUN_DIR, Runtime, RuntimeError};
use supervisor::{End, Supervisor};

/// Why a sub-command ends badly, and with which exit code.
#[derive(Debug)]
pub struct Failure {
    /// The exit code.
    pub exit: Exit,
    /// The reason, for a person.
    pub error: anyhow::Error,
}

impl Failure {
    /// A failure with this exit code.
    pub fn new(exit: Exit, error: impl Into<anyhow::Error>) -> Self {
        Self { exit, error: error.into() }
    }

    /// Usage or configuration.
    pub fn usage(error: impl Into<anyhow::Error>) -> Self {
        Self::new(Exit::Usage, error)
    }

    /// The kernel or a privilege refused.
    pub fn kernel(error: impl Into<anyhow::Error>) -> Self {
        Self::new(Exit::Kernel, error)
    }

    /// Something ended that should not have.
    pub fn failed(error: impl Into<anyhow::Error>) -> Self {
        Self::new(Exit::Failed, error)
    }

    /// For errors that know their exit code.
    fn coded<E: Into<anyhow::Error>>(exit_code: impl FnOnce(&E) -> u8) -> impl FnOnce(E) -> Self {
        |error| Self::new(Exit::from_code(exit_code(&error)), error)
    }
}

/// Protects one pod, in the foreground, until a signal or the end of its namespace.
///
/// # Errors
/// Bring-up failed and was undone, the agent ended by itself, or the clean-up is not complete.
pub fn launch(arguments: &cli::Launch, log_filter: &str) -> Result<Exit, Failure> {
    confined_runtime()?.block_on(protect(arguments, log_filter))
}

/// Gives up what a launcher does not need, and then starts its runtime.
fn confined_runtime() -> Result<tokio::runtime::Runtime, Failure> {
    program::remember();
    // Before there is a second thread.
    privileges::check()?;
    privileges::confine()?;
    let built = tokio::runtime::Builder::new_current_thread().enable_all().build();
    built.context("cannot start the runtime").map_err(Failure::kernel)
}

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    /// SIGTERM, SIGINT: remove everything.
    Stop,
    /// SIGQUIT: the launcher alone ends, the pod stays protected.
    Leave,
    /// SIGHUP: read key file and resolv.conf again, and replace the agent by one of the program that is on the disk now.
    Renew,
}

/// The signals that a launcher obeys.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    quit: Signal,
    hangup: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            quit: signal(SignalKind::quit())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// Cancel safe.
    async fn next(&mut self) -> Order {
        tokio::select! {
            _ = self.terminate.recv() => Order::Stop,
            _ = self.interrupt.recv() => Order::Stop,
            _ = self.quit.recv() => Order::Leave,
            _ = self.hangup.recv() => Order::Renew,
        }
    }

    /// Waits for an order to stop: nothing else is obeyed before the pod is protected.
    async fn stop(&mut self) {
        while self.next().await != Order::Stop {}
    }
}

async fn protect(arguments: &cli::Launch, log_filter: &str) -> Result<Exit, Failure> {
    // From here on a signal is an orderly stop, also during bring-up.
    let mut signals = Signals::new().context("cannot handle signals").map_err(Failure::kernel)?;
    runtime::sweep(Path::new(RUN_DIR));
    let (mut plan, runtime, door) = if arguments.guard_first {
        let mut closed = Closed::close(arguments)?;
        match closed.wait(arguments, &mut signals).await? {
            Some(plan) => (plan, closed.runtime, closed.door),
            None => return Ok(Exit::Good),
        }
    } else {
        let plan = Plan::make(arguments)?;
        let runtime = take_runtime(&plan.netns)?;
        let netns_fd = plan.netns_fd.try_clone().context("descriptor").map_err(Failure::kernel)?;
        let door = Door::at(netns_fd).map_err(Failure::kernel)?;
        (plan, runtime, door)
    };
    let mut supervisor = Supervisor::new(&mut plan, &runtime, log_filter, door);
    let (up, stopped) = {
        let mut up = pin!(supervisor.start());
        tokio::select! {
            biased;
            // Not broken off: an agent that is being taken over or handed over would be lost, and live on. All of its steps
            // have limits.
            () = signals.stop() => (up.await, true),
            up = &mut up => (up, false),
        }
    };
    if stopped {
        info!("stopped before the pod was protected");
        return take_down(supervisor, &runtime, Some(OrderedStop::by_the_operator())).await;
    }
    if let Err(failure) = up {
        if let Err(left) = take_down(supervisor, &runtime, None).await {
            warn!(
                error = format!("{:#}", left.error),
                "the pod stays closed: not everything could be removed"
            );
        }
        return Err(failure);
    }
    supervisor.plan.announce();
    match supervisor.run(&mut signals).await {
        End::Ordered => take_down(supervisor, &runtime, Some(OrderedStop::by_the_operator())).await,
        End::Left => {
            info!(netns = supervisor.plan.netns.name(), "the launcher ends, the agent goes on");
            Ok(Exit::Good)
        }
        End::NamespaceGone => {
            info!(netns = supervisor.plan.netns.name(), "the namespace is gone");
            supervisor.kill().await.map_err(Failure::kernel)?;
            runtime.remove();
            Ok(Exit::Good)
        }
        End::Broken(error) => {
            let netns = supervisor.plan.netns.name();
            Err(Failure::failed(error.context(format!(
                "{netns} stays closed, what is protected is blocked until tencrypt is launched again"
            ))))
        }
    }
}

fn take_runtime(netns: &PodNetns) -> Result<Runtime, Failure> {
    let cookie = netns.cookie().map_err(Failure::coded(PodError::exit_code))?;
    Runtime::take(Path::new(RUN_DIR), cookie, &netns.owner()).map_err(|error| match error {
        RuntimeError::Taken { .. } => Failure::usage(error),
        _ => Failure::kernel(error),
    })
}

/// Removes everything in reverse; the guard last, and only if nothing else is left. Without an order the guard is left as
/// closed as it was found.
async fn take_down(
    mut supervisor: Supervisor<'_>,
    runtime: &Runtime,
    order: Option<OrderedStop>,
) -> Result<Exit, Failure> {
    let stopped = supervisor.stop().await.map_err(Failure::kernel)?;
    let Supervisor { plan, mut door, .. } = supervisor;
    match order {
        Some(order) => clear(&plan.netns, runtime, stopped, &mut door, &order)?,
        None => {
            sweep(&plan.netns, stopped)?;
            door.undo().map_err(Failure::kernel)?;
        }
    }
    info!(netns = plan.netns.name(), "removed");
    Ok(Exit::Good)
}

/// What an agent that has ended left, then the guard, then the files.
fn clear(
    netns: &PodNetns,
    runtime: &Runtime,
    stopped: Stop,
    door: &mut Door,
    order: &OrderedStop,
) -> Result<(), Failure> {
    sweep(netns, stopped)?;
    report_guard(door.netns());
    door.remove(order).map_err(Failure::kernel)?;
    runtime.remove();
    Ok(())
}

/// Removes what an agent that has ended left behind.
fn sweep(netns: &PodNetns, stopped: Stop) -> Result<(), Failure> {
    if stopped == Stop::Unclean {
        let swept = netns.run(agent::remove_everything).unwrap_or_else(|error| Err(error.into()));
        swept.context("cannot remove what the agent left").map_err(Failure::kernel)?;
    }
    Ok(())
}

/// Removes everything from one pod that no launcher holds.
///
/// # Errors
/// There is no such pod, a launcher has it, or not everything could be removed.
pub fn clear_by_order(arguments: &cli::Clear) -> Result<Exit, Failure> {
    confined_runtime()?.block_on(async {
        let target: Target = arguments.netns.parse().map_err(Failure::coded(PodError::exit_code))?;
        let netns = PodNetns::open(target).map_err(Failure::coded(PodError::exit_code))?;
        let files = take_runtime(&netns)?;
        let netns_fd = netns.as_fd().try_clone_to_owned().context("descriptor").map_err(Failure::kernel)?;
        let mut door = Door::at(netns_fd).map_err(Failure::kernel)?;
        gate::clear_pod(&netns, &files, &mut door, &OrderedStop::by_the_operator()).await?;
        info!(netns = netns.name(), "removed: the pod is not protected");
        Ok(Exit::Good)
    })
}

/// What the guard refused, or would have refused in strict mode, goes with its tables: it is said before.
fn report_guard(netns_fd: &OwnedFd) {
    match guard::counters(netns_fd) {
        Ok(counters) => {
            for (counter, count) in counters.iter().filter(|(_, count)| count.packets > 0) {
                let packets = count.packets;
                if !guard::counts_drops(counter) {
                    info!(counter, packets, "counted by the guard");
                } else if counter.starts_with("would_drop_") {
                    info!(counter, packets, "let pass by the guard, dropped in strict mode");
                } else {
                    info!(counter, packets, "dropped by the guard");
                }
            }
        }
        Err(error) => debug!(error = format!("{:#}", anyhow!(error)), "cannot read the guard's counters"),
    }
}
