//! The core, sans-IO: time, randomness and bytes come in as arguments.
#![forbid(unsafe_code)]
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use std::time::{Duration, Instant};

pub mod directory;
pub mod drop;
pub mod noise;

/// The two clocks the protocol reads, taken once per wake-up by the driver.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    /// Monotonic time, for every timer.
    pub instant: Instant,
    /// Wall-clock time since the Unix epoch, for handshake time stamps only.
    pub wall: Duration,
}
