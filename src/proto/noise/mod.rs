//! WireGuard's handshake and transport, byte for byte.

mod keys;

pub use keys::{PresharedKey, PublicKey, StaticSecret};
