//! NAT: exchanges addresses and ports in place and keeps every checksum as right, or as wrong, as it was.
//!
//! 1. addresses, and the IPv4 header checksum by the difference
//! 2. ports, where this packet holds them
//! 3. the transport checksum by both differences; SCTP's CRC by its own
//!
//! Checksums are only ever updated, never recomputed, so a damaged packet arrives as damaged as it was sent.
//! Source: RFC 1624, RFC 768, RFC 9260 (SCTP), RFC 5508 (ICMP errors through NAT).

use std::net::IpAddr;

use super::packet::{Packet, Version, protocol};
use super::{checksum, crc32c, read16, write16};

/// What to exchange. An address of the other family than the packet's leaves that side untouched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rewrite {
    /// New source address, and port where the protocol has ports.
    pub source: Option<(IpAddr, Option<u16>)>,
    /// New destination address, and port where the protocol has ports.
    pub destination: Option<(IpAddr, Option<u16>)>,
}

impl Rewrite {
    /// Everything stays as it is.
    pub const NONE: Self = Self { source: None, destination: None };

    /// Whether nothing is to be exchanged.
    #[must_use]
    pub const fn is_none(&self) -> bool {
        self.source.is_none() && self.destination.is_none()
    }
}

/// Exchanges addresses and ports of `packet`, which was parsed from `bytes`.
///
/// `partial`: the transport checksum field holds the un-complemented sum of the pseudo-header only (NEEDS_CSUM
/// with its start at this packet's transport header). The first fragment of an SCTP packet gets a wrong CRC if
/// its ports change: the length that the CRC depends on is unknown.
pub fn apply(bytes: &mut [u8], packet: &Packet, rewrite: &Rewrite, partial: bool) {
    if rewrite.is_none() {
        return;
    }
    let Some(bytes) = bytes.get_mut(..packet.len) else { return };
    let before = sctp_ports(bytes, packet);
    exchange(bytes, packet, rewrite, partial);
    if let Some((before, after)) = before.zip(sctp_ports(bytes, packet)) {
        let difference = std::array::from_fn(|i| before[i] ^ after[i]);
        update_crc(bytes, packet, difference);
    }
}

/// Exchanges addresses and ports of the packet that the ICMP error `packet` quotes, and updates the error's own
/// checksum. Whether source or destination is to be exchanged in the quote is the caller's business.
///
/// `partial`: as in [`apply`], of the error's own checksum.
pub fn apply_embedded(bytes: &mut [u8], packet: &Packet, rewrite: &Rewrite, partial: bool) {
    let Some(quote) = packet.embedded(bytes).and_then(|range| bytes.get_mut(range)) else { return };
    let Some(embedded) = Packet::parse_embedded(quote) else { return };
    // Everything an exchange can touch; it starts at an even offset of the ICMP message.
    let touched = embedded.len.min(embedded.transport + 20);
    let before = checksum::sum(quote.get(..touched).unwrap_or_default());
    exchange(quote, &embedded, rewrite, false);
    let after = checksum::sum(quote.get(..touched).unwrap_or_default());
    if before != after && !partial {
        let at = packet.transport + 2;
        if let Some(field) = read16(bytes, at) {
            let _ = write16(bytes, at, checksum::update(field, checksum::subtract(after, before)));
        }
    }
}

/// Addresses, ports and Internet checksums; what is cut off in a quote is skipped.
fn exchange(bytes: &mut [u8], packet: &Packet, rewrite: &Rewrite, partial: bool) {
    let (source, destination) = match packet.version {
        Version::V4 => (12, 16),
        Version::V6 => (8, 24),
    };
    let has_ports = packet.ports(bytes).is_some();
    let mut addresses = 0;
    let mut ports = 0;
    let sides = [(rewrite.source, source, 0), (rewrite.destination, destination, 2)];
    for (side, address_at, port_at) in sides {
        let Some((address, port)) = side else { continue };
        let change = match (packet.version, address) {
            (Version::V4, IpAddr::V4(address)) => replace(bytes, address_at, &address.octets()),
            (Version::V6, IpAddr::V6(address)) => replace(bytes, address_at, &address.octets()),
            _ => continue,
        };
        addresses = checksum::add(addresses, change);
        if let Some(port) = port.filter(|_| has_ports) {
            let change = replace(bytes, packet.transport + port_at, &port.to_be_bytes());
            ports = checksum::add(ports, change);
        }
    }
    if packet.version == Version::V4 && addresses != 0 {
        update_field(bytes, 10, |field| checksum::update(field, addresses));
    }
    let Some(offset) = packet.pseudo_checksum_offset().filter(|_| !packet.is_later_fragment()) else {
        return;
    };
    let change = checksum::add(addresses, ports);
    update_field(bytes, packet.transport + offset, |field| match packet.protocol {
        _ if partial => checksum::add(field, addresses),
        protocol::UDP | protocol::UDP_LITE if field == 0 || change == 0 => field,
        protocol::UDP | protocol::UDP_LITE => checksum::update_udp(field, change),
        _ => checksum::update(field, change),
    });
}

/// Stores `new` at `at`; the change of the sum, 0 if nothing changed. `at` is even relative to the covered data.
fn replace(bytes: &mut [u8], at: usize, new: &[u8]) -> u16 {
    let Some(field) = bytes.get_mut(at..).and_then(|b| b.get_mut(..new.len())) else { return 0 };
    if field == new {
        return 0;
    }
    let change = checksum::subtract(checksum::sum(new), checksum::sum(field));
    field.copy_from_slice(new);
    change
}

fn update_field(bytes: &mut [u8], at: usize, new: impl FnOnce(u16) -> u16) {
    if let Some(field) = read16(bytes, at) {
        let _ = write16(bytes, at, new(field));
    }
}

/// The four bytes of an unfragmented SCTP packet's ports.
fn sctp_ports(bytes: &[u8], packet: &Packet) -> Option<[u8; 4]> {
    if packet.protocol != protocol::SCTP || packet.fragment.is_some() {
        return None;
    }
    packet.transport_header(bytes)?.first_chunk().copied()
}

fn update_crc(bytes: &mut [u8], packet: &Packet, difference: [u8; 4]) {
    if difference == [0; 4] {
        return;
    }
    let Some(segment) = bytes.get_mut(packet.transport..packet.len) else { return };
    let change = crc32c::change(difference, segment.len().saturating_sub(4));
    if let Some(field) = segment.get_mut(crc32c::SCTP_FIELD..).and_then(<[u8]>::first_chunk_mut) {
        *field = (u32::from_le_bytes(*field) ^ change).to_le_bytes();
    }
}
