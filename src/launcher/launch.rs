//! `tencrypt launch`: one pod, in the foreground. In order:
//!
//! 1. privileges: those that are not needed are given up; then everything that only reads: namespace, interface, directory,
//!    project, resolv.conf, key, and the addresses of this node ([`Plan`])
//! 2. the pod's runtime files: a second launcher is refused. With `--guard-first` both come after the pod was closed
//!    ([`gate`](super::pod::gate))
//! 3. the guard's skeleton, then the agent ([`Supervisor`]): the one that runs already, or a new one
//! 4. `protected …` on standard output
//! 5. changes of the directory go to the agent, an agent that ended is replaced, until a signal or the namespace's end
//! 6. SIGTERM: the agent removes what it made, and the guard goes last ([`take_down`]); SIGQUIT: only the launcher ends
//!
//! A bring-up that fails is undone in reverse, and leaves the pod as closed as it was found. While there is no agent the
//! project is closed: guard, routes and `tenc0` stay. `tencrypt clear` removes them.

use std::os::fd::AsFd as _;
use std::path::Path;
use std::pin::pin;

use anyhow::Context as _;
use tracing::{info, warn};

use super::confined_runtime;
use super::pod::Plan;
use super::pod::files::{self, RUN_DIR};
use super::pod::gate::{self, Closed};
use super::pod::guard::{Door, OrderedStop};
use super::pod::netns::{PodNetns, Target};
use super::pod::supervisor::{End, Supervisor};
use super::pod::teardown::{take_down, take_runtime};
use super::signals::Signals;
use crate::cli;
use crate::exit::{Exit, Failure};

/// Protects one pod, in the foreground, until a signal or the end of its namespace.
///
/// # Errors
/// Bring-up failed and was undone, the agent ended by itself, or the clean-up is not complete.
pub fn launch(arguments: &cli::Launch, log_filter: &str) -> Result<Exit, Failure> {
    confined_runtime()?.block_on(protect(arguments, log_filter))
}

async fn protect(arguments: &cli::Launch, log_filter: &str) -> Result<Exit, Failure> {
    // From here on a signal is an orderly stop, also during bring-up.
    let mut signals = Signals::new().context("cannot handle signals").map_err(Failure::kernel)?;
    files::sweep(Path::new(RUN_DIR));
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

/// Removes everything from one pod that no launcher holds.
///
/// # Errors
/// There is no such pod, a launcher has it, or not everything could be removed.
pub fn clear_by_order(arguments: &cli::Clear) -> Result<Exit, Failure> {
    confined_runtime()?.block_on(async {
        let target: Target = arguments.netns.parse()?;
        let netns = PodNetns::open(target)?;
        let files = take_runtime(&netns)?;
        let netns_fd = netns.as_fd().try_clone_to_owned().context("descriptor").map_err(Failure::kernel)?;
        let mut door = Door::at(netns_fd).map_err(Failure::kernel)?;
        gate::clear_pod(&netns, &files, &mut door, &OrderedStop::by_the_operator()).await?;
        info!(netns = netns.name(), "removed: the pod is not protected");
        Ok(Exit::Good)
    })
}
