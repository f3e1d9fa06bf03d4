//! The RST that answers a segment from the pod when there is nobody to connect to.
//!
//! Source: RFC 9293 §3.5.2 (reset generation, group 1).

use super::emit::Draft;
use super::icmp::answerable;
use super::packet::{Packet, TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN, protocol};
use super::read32;

/// Appends the RST that answers the TCP segment `quoted` to `out`.
///
/// `false`, and `out` as before: not a whole TCP segment from one host to one host, or itself a RST.
#[must_use]
pub fn tcp_reset(quoted: &[u8], out: &mut Vec<u8>) -> bool {
    append(quoted, out).is_some()
}

fn append(quoted: &[u8], out: &mut Vec<u8>) -> Option<()> {
    let packet = Packet::parse(quoted)?;
    let header_len = packet.tcp_header_len(quoted)?;
    let flags = packet.tcp_flags(quoted)?;
    if packet.fragment.is_some() || !answerable(&packet) || flags & TCP_RST != 0 {
        return None;
    }
    let (source, destination) = packet.ports(quoted)?;
    let segment = packet.transport_header(quoted)?;
    let (sequence, acknowledgement, answer) = if flags & TCP_ACK != 0 {
        (read32(segment, 8)?, 0, TCP_RST)
    } else {
        let control = u32::from(flags & TCP_SYN != 0) + u32::from(flags & TCP_FIN != 0);
        let occupied = u32::try_from(segment.len() - header_len).ok()? + control;
        (0, read32(segment, 4)?.wrapping_add(occupied), TCP_RST | TCP_ACK)
    };
    let draft = Draft::begin((packet.destination, packet.source), protocol::TCP, 0, 20, out)?;
    out.extend([destination, source].into_iter().flat_map(u16::to_be_bytes));
    out.extend([sequence, acknowledgement].into_iter().flat_map(u32::to_be_bytes));
    out.extend([0x50, answer, 0, 0, 0, 0, 0, 0]);
    draft.finish(16, out)
}
