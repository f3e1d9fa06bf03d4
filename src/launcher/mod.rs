//! launcher.

pub mod dns_helper;
pub mod guard;
