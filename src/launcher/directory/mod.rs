//! The directory: which addresses are workloads, VIPs and exemptions of one project.
//!
//! 1. a source ([`mod@file`]; later the Kubernetes API) keeps the [`Objects`] it has seen
//! 2. [`Entries::of`] applies the rules to them: a pure function of all objects
//! 3. [`Entries::changes_to`] is the difference that the agent is told
//!
//! Touches nothing but what [`mod@file`] says.

mod entries;
pub mod file;
mod folder;
pub mod manifest;
mod objects;
mod outside;

pub use entries::Entries;
pub use objects::{Id, NamedPort, Objects, Pod, Service, Slice, SliceEndpoint};
pub use outside::Outside;

#[cfg(test)]
mod tests;
