//! The agent: lives in one pod's network namespace, touches its kernel objects, decides nothing.

use std::os::fd::OwnedFd;

pub mod control;
pub mod guard;
pub mod neighbour;
pub mod netlink;
pub mod raw_socket;
pub mod tun;
pub mod udp;

/// How an agent ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitKind {
    /// Ordered to stop; everything it made is gone.
    Stopped,
    /// Bring-up failed and was reported over the channel, with this exit code.
    Failed(u8),
}

/// Runs the agent in the namespace the process is in.
///
/// # Errors
/// What made it end without an order.
pub fn run(channel: OwnedFd) -> anyhow::Result<ExitKind> {
    let channel = control::AgentChannel::new(channel)?;
    channel.send(&control::FromAgent::failed(3, "the agent has no data path"), &[])?;
    Ok(ExitKind::Failed(3))
}
