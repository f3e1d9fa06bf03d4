//! Tencrypt: transparent, authenticated encryption of the traffic between a project's own pods.
//!
//! Two sides of one boundary: [`agent`] touches the kernel and decides nothing, [`proto`] decides everything
//! and touches nothing. [`launcher`] runs on the host and is the only part that knows a project key.

pub mod agent;
pub mod cli;
pub mod fault;
pub mod launcher;
pub mod proto;
pub mod sys;
pub mod telemetry;
pub mod wire;
