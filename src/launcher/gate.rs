//! `--guard-first`: the pod is closed before its first instruction, and opened when it is protected.
//!
//! 1. [`Closed::close`] loads the guard with its gate closed: nothing leaves the pod, whatever is known of the project. Where
//!    an agent of an earlier launcher lives, the pod is protected already and stays open
//! 2. `guarded …` on standard output: the application may be started
//! 3. [`Closed::wait`]: the pod's device, the directory and its Pod may all still be missing; they are waited for, closed
//! 4. the launch goes on as ever; the gate is opened after the agent is ready, in place
//!
//! What fails from here on leaves the pod closed. SIGTERM opens it: that is an order.

use std::io::{self, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use anyhow::Context as _;
use tracing::{info, warn};

use super::guard::{self, Gate, Skeleton};
use super::plan::Plan;
use super::pod::network::PodNetwork;
use super::pod::{PodError, PodNetns, Target};
use super::process::{Agent, Stop};
use super::runtime::Runtime;
use super::{Failure, Signals, clear, take_runtime};
use crate::cli;

/// How often what is missing is looked for.
const LOOK: Duration = Duration::from_millis(200);

/// A pod that says nothing until it is protected.
pub(super) struct Closed {
    netns: PodNetns,
    netns_fd: OwnedFd,
    pub(super) runtime: Runtime,
    /// An agent lives: nothing was closed.
    protected: bool,
}

impl Closed {
    /// Closes the pod.
    ///
    /// # Errors
    /// There is no such namespace, another launcher has it, or nft refused.
    pub(super) fn close(arguments: &cli::Launch) -> Result<Self, Failure> {
        let target: Target = arguments.netns.parse().map_err(Failure::coded(PodError::exit_code))?;
        let netns = PodNetns::open(target).map_err(Failure::coded(PodError::exit_code))?;
        let netns_fd = netns.as_fd().try_clone_to_owned().context("descriptor").map_err(Failure::kernel)?;
        let runtime = take_runtime(&netns)?;
        let protected = runtime.connect().map_err(Failure::kernel)?.is_some();
        if !protected {
            // Without a device the hooks of the stack are all there is to close.
            let network = PodNetwork::inspect(&netns, arguments.port).ok();
            let device = network.and_then(|network| network.interface.as_str().try_into().ok());
            let skeleton = Skeleton {
                mode: arguments.mode.into(),
                gate: Gate::Closed,
                device,
                tunnel_port: arguments.port,
                resolvers: Vec::new(),
                dns_ports: 1..=1,
            };
            guard::load(&netns_fd, &skeleton).map_err(Failure::kernel)?;
        }
        let closed = Self { netns, netns_fd, runtime, protected };
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
    pub(super) async fn wait(
        &self,
        arguments: &cli::Launch,
        signals: &mut Signals,
    ) -> Result<Option<Plan>, Failure> {
        let mut said = String::new();
        loop {
            match Plan::make(arguments) {
                // The name may be another namespace's by now.
                Ok(plan) if plan.netns.identity() != self.netns.identity() => {}
                Ok(mut plan) => {
                    if self.protected {
                        plan.skeleton.gate = Gate::Open;
                    }
                    return Ok(Some(plan));
                }
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
    async fn open(&self) -> Result<(), Failure> {
        let mut stopped = Stop::Unclean;
        if let Some(channel) = self.runtime.connect().map_err(Failure::kernel)?
            && let Some((agent, _)) =
                Agent::adopt(channel, self.netns.identity()).await.map_err(Failure::kernel)?
        {
            stopped = agent.stop().await.map_err(Failure::kernel)?;
        }
        clear(&self.netns, &self.netns_fd, &self.runtime, stopped)
    }
}
