//! Two transports over a simulated wire, with a clock that only the tests move.

mod cookies;
mod floods;
mod handshake;
mod hostile;
mod model;
mod noise_framework;
mod pair;
mod rekey;
mod storm;
mod traffic;
mod vectors;
mod wycheproof;
