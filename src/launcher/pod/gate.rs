//! `--guard-first`: the pod is closed before its first instruction, and opened when it is protected.
//!
//! 1. [`Closed::close`] loads the guard closed: nothing leaves the pod, whatever is known of the project. A guard that an
//!    earlier launcher opened, and whose agent lives, stays open: the pod is protected
//! 2. `guarded …` on standard output: the application may be started
//! 3. [`Closed::wait`]: the pod's device, the directory and its Pod may all still be missing; they are waited for, closed
//! 4. the launch continues as without the flag; the guard is opened when the agent is ready
//!
//! If a later step fails the pod stays closed. SIGTERM removes the guard, because the operator asked for it.

use std::io::{self, Write as _};
use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::Context as _;
use tracing::{info, warn};

use super::Plan;
use super::agent::{Agent, Stop, end_stray_agents};
use super::files::Runtime;
use super::guard::{Door, OrderedStop, Skeleton};
use super::netns::{PodNetns, Target};
use super::surroundings::Surroundings;
use super::teardown::{clear, take_runtime};
use crate::cli;
use crate::exit::Failure;
use crate::launcher::signals::Signals;

/// How often what is missing is looked for.
const LOOK: Duration = Duration::from_millis(200);

/// A pod that says nothing until it is protected.
pub(in crate::launcher) struct Closed {
    netns: PodNetns,
    pub(in crate::launcher) runtime: Runtime,
    pub(in crate::launcher) door: Door,
}

impl Closed {
    /// Closes the pod.
    ///
    /// # Errors
    /// There is no such namespace, another launcher has it, or nft refused.
    pub(in crate::launcher) fn close(arguments: &cli::Launch) -> Result<Self, Failure> {
        let target: Target = arguments.netns.parse()?;
        let netns = PodNetns::open(target)?;
        let netns_fd = netns.as_fd().try_clone_to_owned().context("descriptor").map_err(Failure::kernel)?;
        let runtime = take_runtime(&netns)?;
        let mut door = Door::at(netns_fd).map_err(Failure::kernel)?;
        let protected = door.is_open() && runtime.connect().map_err(Failure::kernel)?.is_some();
        if !protected {
            // Without devices the hooks of the stack are all there is to close.
            let devices = Surroundings::inspect(&netns).unwrap_or_default().names();
            let mut skeleton = Skeleton::closed(arguments.mode.into(), arguments.port, devices);
            door.close_first(&mut skeleton).map_err(Failure::kernel)?;
        }
        let closed = Self { netns, runtime, door };
        let mut stdout = io::stdout();
        let line = format!("guarded {}\n", closed.netns.name());
        if let Err(error) = stdout.write_all(line.as_bytes()).and_then(|()| stdout.flush()) {
            warn!(%error, "cannot print that the pod is guarded");
        }
        Ok(closed)
    }

    /// Waits until everything is known that protecting the pod needs. `None`: the launch was stopped, or the namespace is
    /// gone; nothing is left.
    ///
    /// # Errors
    /// Not everything could be removed.
    pub(in crate::launcher) async fn wait(
        &mut self,
        arguments: &cli::Launch,
        signals: &mut Signals,
    ) -> Result<Option<Plan>, Failure> {
        let mut said = String::new();
        loop {
            match Plan::make(arguments) {
                // The name may be another namespace's by now.
                Ok(plan) if plan.netns.identity() != self.netns.identity() => {}
                Ok(plan) => return Ok(Some(plan)),
                Err(failure) => {
                    let reason = format!("{:#}", failure.error);
                    if reason != said {
                        warn!(reason, "the pod stays closed until it can be protected");
                        said = reason;
                    }
                }
            }
            tokio::select! {
                biased;
                () = signals.stop() => {
                    info!("stopped before the pod was protected");
                    self.open().await?;
                    return Ok(None);
                }
                () = tokio::time::sleep(LOOK) => {}
            }
            if self.netns.is_gone() {
                info!("the namespace is gone");
                break;
            }
        }
        self.runtime.remove();
        Ok(None)
    }

    /// Removes everything, first the agent of an earlier launcher.
    async fn open(&mut self) -> Result<(), Failure> {
        clear_pod(&self.netns, &self.runtime, &mut self.door, &OrderedStop::by_the_operator()).await
    }
}

/// Removes the agent of an earlier launcher, what agents left, and the guard.
///
/// # Errors
/// Not everything could be removed.
pub(in crate::launcher) async fn clear_pod(
    netns: &PodNetns,
    runtime: &Runtime,
    door: &mut Door,
    order: &OrderedStop,
) -> Result<(), Failure> {
    let mut stopped = Stop::Unclean;
    if let Some(channel) = runtime.connect().map_err(Failure::kernel)?
        && let Some((agent, _)) = Agent::adopt(channel, netns.identity()).await.map_err(Failure::kernel)?
    {
        stopped = agent.stop().await.map_err(Failure::kernel)?;
    }
    end_stray_agents(netns.identity(), None).await.map_err(Failure::kernel)?;
    clear(netns, runtime, stopped, door, order)
}
