//! launcher.

pub mod directory;
pub mod dns_helper;
pub mod guard;
pub mod keys;
pub mod pod;
