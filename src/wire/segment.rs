//! A captured burst becomes records, each ready to be sealed in place.
//!
//! `headroom | one complete IP packet | zeros up to a multiple of 16 | tailroom`, record after record, all but the
//! last of equal length, so that one send with segmentation offload carries them. The payload is copied once and
//! summed while it is hot; headers are summed once per burst and adjusted per segment.
//!
//! Checksums start from the partial state that the kernel left in the field, not from the addresses: a wrong
//! pseudo-header stays wrong, and a routing header's final destination stays in it.
//! Source: RFC 9293 §3.8.2, linux/virtio_net.h, the kernel's segmentation-offloads document.

use super::checksum::{add, complete_partial, length_sum, never_zero, subtract, sum};
use super::packet::{Packet, TCP_CWR, TCP_FIN, TCP_PSH, Version, protocol};
use super::vnet::{Gso, VnetHeader};
use super::{read16, read32, write16, write32};

/// Most segments of one burst. The device is told 64; the rest is room for kernels that ignore it.
const MAX_SEGMENTS: usize = 512;
/// Plaintext is padded to this (WireGuard paper §5.4.6).
const PADDING: usize = 16;

/// The records that one burst became.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Split {
    /// Length of every record but the last, in bytes, headroom and tailroom included.
    pub record_len: usize,
    /// Length of the last record; equal to `record_len` where there is one.
    pub last_len: usize,
    /// Number of records, at least 1.
    pub count: usize,
}

/// Appends the records of one packet or super-packet to `out`; its addresses are already the final ones.
///
/// `headroom` and `tailroom` bytes are left before and after each padded packet; their content is unspecified
/// (zero, and to be overwritten). `None`, and `out` as before: the offload state contradicts the packet.
pub fn split(
    bytes: &[u8],
    packet: &Packet,
    vnet: &VnetHeader,
    headroom: usize,
    tailroom: usize,
    out: &mut Vec<u8>,
) -> Option<Split> {
    let bytes = bytes.get(..packet.len)?;
    let room = Room { headroom, tailroom };
    let (size, kind) = match (vnet.gso, packet.protocol, packet.version) {
        (Gso::None, ..) => return single(bytes, vnet, room, out),
        (Gso::Tcp4(size), protocol::TCP, Version::V4) | (Gso::Tcp6(size), protocol::TCP, Version::V6) => {
            (usize::from(size), Kind::Tcp)
        }
        (Gso::Udp(size), protocol::UDP, _) => (usize::from(size), Kind::Udp),
        _ => return None,
    };
    let (transport_len, checksum_at) = match kind {
        Kind::Tcp => (packet.tcp_header_len(bytes)?, 16),
        Kind::Udp => (8, 6),
    };
    let start = usize::from(vnet.partial_checksum.filter(|(_, at)| *at == checksum_at)?.0);
    if packet.fragment.is_some() || start != packet.transport || size == 0 {
        return None;
    }
    let header_len = packet.transport + transport_len;
    let payload = bytes.get(header_len..)?;
    if payload.len() <= size {
        return single(bytes, vnet, room, out);
    }
    let count = payload.len().div_ceil(size);
    if count > MAX_SEGMENTS {
        return None;
    }
    let template = Template::new(bytes, packet, header_len, kind)?;
    let record_len = room.record_len(header_len + size);
    out.reserve(record_len * count);
    let restore = out.len();
    let mut last_len = 0;
    for (index, chunk) in payload.chunks(size).enumerate() {
        last_len = room.record_len(header_len + chunk.len());
        let record = out.len();
        out.resize(record + headroom, 0);
        out.extend_from_slice(template.header);
        out.extend_from_slice(chunk);
        let segment = out.get_mut(record + headroom..)?;
        if template.patch(segment, index, size, index + 1 == count).is_none() {
            out.truncate(restore);
            return None;
        }
        out.resize(record + last_len, 0);
    }
    Some(Split { record_len, last_len, count })
}

/// Packets that [`split`] makes of one packet or super-packet, where it makes any: 1 without looking at an ordinary one.
pub fn count(bytes: &[u8], vnet: &VnetHeader, packet: impl FnOnce() -> Option<Packet>) -> Option<usize> {
    let size = match vnet.gso {
        Gso::None => return Some(1),
        Gso::Tcp4(size) | Gso::Tcp6(size) | Gso::Udp(size) => usize::from(size),
    };
    let packet = packet()?;
    let transport_len = match vnet.gso {
        Gso::Udp(_) => 8,
        _ => packet.tcp_header_len(bytes.get(..packet.len)?)?,
    };
    let payload = packet.len.checked_sub(packet.transport + transport_len)?;
    Some(payload.div_ceil(size.max(1)).max(1))
}

/// One packet that is not to be cut; a partial checksum is completed.
fn single(bytes: &[u8], vnet: &VnetHeader, room: Room, out: &mut Vec<u8>) -> Option<Split> {
    let len = room.record_len(bytes.len());
    let record = out.len();
    out.reserve(len);
    out.resize(record + room.headroom, 0);
    out.extend_from_slice(bytes);
    if let Some((start, offset)) = vnet.partial_checksum {
        let packet = out.get_mut(record + room.headroom..)?;
        if complete_partial(packet, usize::from(start), usize::from(offset)).is_none() {
            out.truncate(record);
            return None;
        }
    }
    out.resize(record + len, 0);
    Some(Split { record_len: len, last_len: len, count: 1 })
}

/// Bytes around each padded packet.
#[derive(Clone, Copy)]
struct Room {
    headroom: usize,
    tailroom: usize,
}

impl Room {
    fn record_len(self, packet: usize) -> usize {
        self.headroom + packet.next_multiple_of(PADDING) + self.tailroom
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Tcp,
    Udp,
}

/// The headers of a super-packet, summed without the fields that differ between segments.
struct Template<'a> {
    header: &'a [u8],
    kind: Kind,
    version: Version,
    transport: usize,
    /// What the IPv4 header checksum stands for, without length and identification.
    ip_sum: u16,
    /// IPv4 identification of the first segment.
    id: u16,
    /// Partial pseudo-header and transport header, without length, sequence number and flags.
    transport_sum: u16,
    sequence: u32,
    /// TCP data offset and flags.
    flags: u16,
}

impl<'a> Template<'a> {
    fn new(bytes: &'a [u8], packet: &Packet, header_len: usize, kind: Kind) -> Option<Self> {
        let header = bytes.get(..header_len)?;
        let (ip, transport) = header.split_at_checked(packet.transport)?;
        let (ip_sum, id) = match packet.version {
            Version::V4 => {
                let id = read16(ip, 4)?;
                (subtract(!read16(ip, 10)?, add(read16(ip, 2)?, id)), id)
            }
            Version::V6 => (0, 0),
        };
        let pseudo_len = length_sum(bytes.len() - packet.transport);
        let (variable, sequence, flags) = match kind {
            Kind::Tcp => {
                let (sequence, flags) = (read32(transport, 4)?, read16(transport, 12)?);
                (add(sum32(sequence), flags), sequence, flags)
            }
            Kind::Udp => (read16(transport, 4)?, 0, 0),
        };
        Some(Self {
            header,
            kind,
            version: packet.version,
            transport: packet.transport,
            ip_sum,
            id,
            transport_sum: subtract(subtract(sum(transport), pseudo_len), variable),
            sequence,
            flags,
        })
    }

    /// Makes `segment` (a copy of the headers, and payload) the `index`th of its burst.
    fn patch(&self, segment: &mut [u8], index: usize, size: usize, last: bool) -> Option<()> {
        let len = u16::try_from(segment.len()).ok()?;
        match self.version {
            Version::V4 => {
                let id = self.id.wrapping_add(u16::try_from(index).ok()?);
                write16(segment, 2, len)?;
                write16(segment, 4, id)?;
                write16(segment, 10, !add(add(self.ip_sum, len), id))?;
            }
            Version::V6 => write16(segment, 4, len.checked_sub(40)?)?,
        }
        let transport = segment.get_mut(self.transport..)?;
        let transport_len = u16::try_from(transport.len()).ok()?;
        let payload = sum(transport.get(self.header.len() - self.transport..)?);
        let base = add(add(self.transport_sum, transport_len), payload);
        match self.kind {
            Kind::Tcp => {
                let sequence = self.sequence.wrapping_add(u32::try_from(index * size).ok()?);
                let first = if index == 0 { 0 } else { TCP_CWR };
                let cleared = if last { first } else { first | TCP_FIN | TCP_PSH };
                let flags = self.flags & !u16::from(cleared);
                write32(transport, 4, sequence)?;
                write16(transport, 12, flags)?;
                write16(transport, 16, !add(add(base, sum32(sequence)), flags))
            }
            Kind::Udp => {
                write16(transport, 4, transport_len)?;
                write16(transport, 6, never_zero(!add(base, transport_len)))
            }
        }
    }
}

/// Sum of the two halves of a 32-bit word.
fn sum32(word: u32) -> u16 {
    let [a, b, c, d] = word.to_be_bytes();
    add(u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]))
}
