//! Bytes: zero-copy views, parse and emit, checksums. No policy.
#![forbid(unsafe_code)]
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

pub mod dns;
pub mod vnet;
