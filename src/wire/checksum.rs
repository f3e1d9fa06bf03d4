//! The Internet checksum: sums, pseudo-headers, incremental updates, completion of partial checksums.
//!
//! All sums are folded 16-bit ones'-complement sums in network order, *not* complemented; a checksum field is the
//! complement of a sum. A sum over anything but zeros is never 0x0000, so equal data gives equal fields.
//! Source: RFC 1071, RFC 1624 (equation 3), RFC 768 (zero means none), RFC 3828 and RFC 4340 (coverage).

use super::packet::{Packet, Version, protocol};
use super::{crc32c, read16, write16};

/// Ones'-complement sum of `bytes` as big-endian 16-bit words; an odd last byte is padded with zero.
///
/// 32-bit words are added into 64-bit lanes without carries to propagate, which the compiler vectorises.
#[must_use]
pub fn sum(bytes: &[u8]) -> u16 {
    const LANES: usize = 4;
    let (blocks, rest) = bytes.as_chunks::<{ 4 * LANES }>();
    let mut lanes = [0_u64; LANES];
    for block in blocks {
        let (words, _) = block.as_chunks::<4>();
        for (lane, word) in lanes.iter_mut().zip(words) {
            *lane += u64::from(u32::from_ne_bytes(*word));
        }
    }
    let (words, tail) = rest.as_chunks::<4>();
    let mut total: u64 = lanes.iter().sum();
    for word in words {
        total += u64::from(u32::from_ne_bytes(*word));
    }
    let mut last = [0; 4];
    for (to, from) in last.iter_mut().zip(tail) {
        *to = *from;
    }
    total += u64::from(u32::from_ne_bytes(last));
    // The sum is the same in either byte order but for the order of its own bytes (RFC 1071 §2B).
    u16::from_be_bytes(fold(total).to_ne_bytes())
}

#[expect(clippy::cast_possible_truncation, reason = "folded to 16 bits above")]
fn fold(total: u64) -> u16 {
    let total = (total >> 32) + (total & 0xffff_ffff);
    let total = (total >> 32) + (total & 0xffff_ffff);
    let total = (total >> 16) + (total & 0xffff);
    let total = (total >> 16) + (total & 0xffff);
    ((total >> 16) + (total & 0xffff)) as u16
}

/// Ones'-complement addition.
#[must_use]
pub const fn add(a: u16, b: u16) -> u16 {
    let (sum, carry) = a.overflowing_add(b);
    sum + carry as u16
}

/// Ones'-complement subtraction.
#[must_use]
pub const fn subtract(a: u16, b: u16) -> u16 {
    add(a, !b)
}

/// Sum of the pseudo-header. `addresses`: source and destination as they stand in the IP header;
/// `len`: of transport header and payload, in bytes.
#[must_use]
pub fn pseudo_header(addresses: &[u8], protocol: u8, len: usize) -> u16 {
    add(add(sum(addresses), u16::from(protocol)), length_sum(len))
}

/// A length as the sum of its two 16-bit halves.
#[expect(
    clippy::cast_possible_truncation,
    reason = "packets are shorter than 4 GiB; the fold keeps all 32 bits"
)]
pub(super) const fn length_sum(len: usize) -> u16 {
    add((len >> 16) as u16, len as u16)
}

/// The checksum field after covered data changed by `change` (sum of the new minus sum of the old).
#[must_use]
pub const fn update(field: u16, change: u16) -> u16 {
    !add(!field, change)
}

/// As [`update`] for UDP, where a computed 0x0000 is sent as 0xffff. The caller leaves a field of 0 alone.
#[must_use]
pub const fn update_udp(field: u16, change: u16) -> u16 {
    never_zero(update(field, change))
}

/// 0xffff instead of 0x0000, which is the same number and does not mean "none".
pub(super) const fn never_zero(field: u16) -> u16 {
    if field == 0 { 0xffff } else { field }
}

/// Completes a partial checksum: the field at `start + offset` holds the pseudo-header's sum, the checksum
/// covers everything from `start` on. `None`, and nothing changed, where the field lies outside.
pub fn complete_partial(bytes: &mut [u8], start: usize, offset: usize) -> Option<()> {
    let covered = bytes.get_mut(start..)?;
    let field = !sum(covered);
    write16(covered, offset, never_zero(field))
}

/// True where the transport checksum is right, or the protocol has none that we know.
///
/// A fragment's checksum covers the other fragments, so it is never confirmed. A UDP checksum of zero is
/// right in IPv4 and wrong in IPv6.
#[must_use]
pub fn transport_checksum_ok(bytes: &[u8], packet: &Packet) -> bool {
    if packet.fragment.is_some() {
        return false;
    }
    let Some(segment) = packet.transport_header(bytes) else { return false };
    match (packet.protocol, packet.version) {
        (protocol::TCP, _) | (protocol::ICMPV6, Version::V6) => {
            covered_ok(bytes, packet, segment, segment.len())
        }
        (protocol::UDP, _) => {
            let (Some(len), Some(field)) = (read16(segment, 4), read16(segment, 6)) else { return false };
            let Some(datagram) = segment.get(..usize::from(len)).filter(|d| d.len() >= 8) else {
                return false;
            };
            if field == 0 {
                return packet.version == Version::V4;
            }
            covered_ok(bytes, packet, datagram, datagram.len())
        }
        (protocol::UDP_LITE, _) => match (read16(segment, 4).map(usize::from), read16(segment, 6)) {
            (_, Some(0)) | (Some(1..8), _) => false,
            (Some(0), _) => covered_ok(bytes, packet, segment, segment.len()),
            (Some(n), _) => segment.get(..n).is_some_and(|c| covered_ok(bytes, packet, c, segment.len())),
            (None, _) => false,
        },
        (protocol::DCCP, _) => {
            let &[_, _, _, _, words, coverage, ..] = segment else { return false };
            let data = match coverage & 0xf {
                0 => segment.len(),
                n => usize::from(words) * 4 + (usize::from(n) - 1) * 4,
            };
            segment.get(..data).is_some_and(|c| covered_ok(bytes, packet, c, segment.len()))
        }
        (protocol::ICMP, Version::V4) => sum(segment) == 0xffff,
        (protocol::SCTP, _) => crc32c::sctp(segment).is_some_and(|(stored, computed)| stored == computed),
        _ => true,
    }
}

/// Whether pseudo-header and `covered` bytes, checksum field included, add up to the ones'-complement zero.
fn covered_ok(bytes: &[u8], packet: &Packet, covered: &[u8], len: usize) -> bool {
    let Some(addresses) = bytes.get(packet.version.addresses()) else { return false };
    add(pseudo_header(addresses, packet.protocol, len), sum(covered)) == 0xffff
}
