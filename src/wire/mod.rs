//! Bytes: zero-copy views, parse and emit, checksums. No policy.
//!
//! In the order of a packet's path: [`vnet`] (what the TUN device says about a burst), [`packet`] (where its
//! headers are), [`rewrite`] (NAT), [`segment`] (burst -> records to seal), [`coalesce`] (opened packets ->
//! super-packets to inject). [`checksum`] and [`crc32c`] serve them all; [`icmp`], [`tcp_reset`] and [`udp`]
//! build the few packets that the agent itself says to its pod; [`netlink`] splits what the kernel says to the agent.
//!
//! Nothing here panics on any bytes, and nothing allocates beyond the caller's reusable buffers.
#![forbid(unsafe_code)]
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

pub mod checksum;
pub mod coalesce;
pub mod crc32c;
pub mod dns;
mod emit;
pub mod icmp;
pub mod netlink;
pub mod packet;
pub mod rewrite;
pub mod segment;
pub mod tcp_reset;
pub mod udp;
pub mod vnet;

#[cfg(test)]
mod tests;

/// The big-endian 16-bit word at `at`.
fn read16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|b| u16::from_be_bytes(*b))
}

/// The big-endian 32-bit word at `at`.
fn read32(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|b| u32::from_be_bytes(*b))
}

/// Stores `value` at `at`, big-endian; `None` (and nothing stored) where it does not fit.
fn write16(bytes: &mut [u8], at: usize, value: u16) -> Option<()> {
    *bytes.get_mut(at..)?.first_chunk_mut()? = value.to_be_bytes();
    Some(())
}

/// Stores `value` at `at`, big-endian; `None` (and nothing stored) where it does not fit.
fn write32(bytes: &mut [u8], at: usize, value: u32) -> Option<()> {
    *bytes.get_mut(at..)?.first_chunk_mut()? = value.to_be_bytes();
    Some(())
}
