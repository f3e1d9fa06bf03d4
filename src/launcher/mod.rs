//! launcher.

pub mod directory;
pub mod keys;
