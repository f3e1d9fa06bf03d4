//! The launcher: plain async on the host; no packet passes here, and no project key leaves it.
//!
//! | room | what it holds |
//! |---|---|
//! | `launch` | `tencrypt launch`: one pod, in the foreground |
//! | [`pod`] | everything of one pod: its namespace, its files, its guard, its agent, and the supervisor that keeps them |
//! | [`directory`] | what the cluster says: objects, and one workload's view of them |
//! | `serve` | the answers to `tencrypt status` |
//! | [`keys`], `host`, [`privileges`], `program`, `signals` | project keys, this node's addresses, what a launcher may do, the file that agents run, the operator's signals |
//!
//! May touch: what its modules may.

use anyhow::Context as _;

use crate::exit::Failure;

pub mod directory;
mod host;
pub mod keys;
mod launch;
pub mod pod;
pub mod privileges;
mod program;
mod rate;
pub(crate) mod serve;
mod signals;

pub use launch::{clear_by_order, launch};

/// Gives up what a launcher does not need, and then starts its runtime.
fn confined_runtime() -> Result<tokio::runtime::Runtime, Failure> {
    program::remember();
    // Before there is a second thread.
    privileges::check()?;
    privileges::confine()?;
    let built = tokio::runtime::Builder::new_current_thread().enable_all().build();
    built.context("cannot start the runtime").map_err(Failure::kernel)
}
