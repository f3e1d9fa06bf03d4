//! Micro-benchmarks of the core, one thread, no kernel: `cargo bench --bench micro [-- FILTER]`.
//!
//! | file | what |
//! |---|---|
//! | `crypto` | a session: seal and open, per suite and size |
//! | `tables` | flow lookup in a full table, NAT, what a DNS answer teaches |
//! | `engines` | two engines back to back: packets per second of everything between `tenc0` and the tunnel's socket |
//! | `floods` | one initiation of a flood: a cookie asked for, or a Diffie-Hellman |
//! | `control` | work that is not a packet: for how long one step of it keeps a packet waiting |
//!
//! `control/longest step/*` are the promise that no such step takes a millisecond: each sample is the longest step of a run.

mod control;
mod crypto;
mod engines;
mod floods;
mod project;
mod tables;

use criterion::{criterion_group, criterion_main};

criterion_group!(
    micro,
    crypto::benches,
    tables::benches,
    engines::benches,
    floods::benches,
    control::benches
);
criterion_main!(micro);
