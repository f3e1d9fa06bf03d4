//! The end of a pod's protection: everything is removed in the reverse of its order.
//!
//! 1. the agent removes its routes, rules and `tenc0`, or they are removed in its place
//! 2. the guard is the last to go, and only on an operator's order; without one the pod is left as closed as it was found
//! 3. the runtime files

use std::os::fd::OwnedFd;
use std::path::Path;

use anyhow::{Context as _, anyhow};
use tracing::{debug, info};

use super::agent::Stop;
use super::files::{RUN_DIR, Runtime, RuntimeError};
use super::guard::{self, Door, OrderedStop};
use super::netns::PodNetns;
use super::supervisor::Supervisor;
use crate::agent;
use crate::exit::{Exit, Failure};

pub(in crate::launcher) fn take_runtime(netns: &PodNetns) -> Result<Runtime, Failure> {
    let cookie = netns.cookie()?;
    Runtime::take(Path::new(RUN_DIR), cookie, &netns.owner()).map_err(|error| match error {
        RuntimeError::Taken { .. } => Failure::usage(error),
        _ => Failure::kernel(error),
    })
}

/// Removes everything in reverse; the guard last, and only if nothing else is left. Without an order the guard is left as
/// closed as it was found.
pub(in crate::launcher) async fn take_down(
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
pub(in crate::launcher) fn clear(
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
