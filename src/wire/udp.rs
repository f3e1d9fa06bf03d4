//! Builds a UDP/IP packet, for DNS answers that are written to `tenc0`.

use std::net::SocketAddr;

use super::emit::Draft;
use super::packet::protocol;

/// Appends one whole UDP datagram to `out`. `false`, and `out` as before, where the families differ or the
/// payload does not fit one IP packet (65,507 bytes in IPv4, 65,527 in IPv6).
///
/// There is no limit by MTU: the packet is delivered locally.
#[must_use]
pub fn udp_packet(source: SocketAddr, destination: SocketAddr, payload: &[u8], out: &mut Vec<u8>) -> bool {
    append(source, destination, payload, out).is_some()
}

fn append(source: SocketAddr, destination: SocketAddr, payload: &[u8], out: &mut Vec<u8>) -> Option<()> {
    let len = u16::try_from(payload.len() + 8).ok()?;
    let draft = Draft::begin((source.ip(), destination.ip()), protocol::UDP, 0, usize::from(len), out)?;
    let words = [source.port(), destination.port(), len, 0];
    out.extend(words.into_iter().flat_map(u16::to_be_bytes));
    out.extend_from_slice(payload);
    draft.finish(6, out)
}
