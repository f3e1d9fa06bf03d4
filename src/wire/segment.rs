//! A captured burst becomes packets, one after the other, in its own buffer: only headers are copied.
//!
//! The headers of each packet go where the payload of the packet before it ended, so every packet must be done with
//! before the next is made. Payload is summed then; headers are summed once per burst and adjusted per packet.
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

/// One packet or super-packet that is being cut.
pub struct Cut<'a> {
    bytes: &'a mut [u8],
    /// `None`: one packet, not to be cut.
    template: Option<Template>,
    /// Payload bytes of each packet but the last.
    size: usize,
    count: usize,
    /// The next packet.
    index: usize,
}

impl<'a> Cut<'a> {
    /// Begins to cut `bytes`, whose addresses are already the final ones. Of one packet that is not to be cut, a partial
    /// checksum is completed. `None`: the offload state contradicts the packet.
    pub fn new(bytes: &'a mut [u8], packet: &Packet, vnet: &VnetHeader) -> Option<Self> {
        let bytes = bytes.get_mut(..packet.len)?;
        let (size, kind) = match (vnet.gso, packet.protocol, packet.version) {
            (Gso::None, ..) => return Self::single(bytes, vnet),
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
            return Self::single(bytes, vnet);
        }
        let count = payload.len().div_ceil(size);
        if count > MAX_SEGMENTS {
            return None;
        }
        let template = Template::new(bytes, packet, header_len, kind)?;
        Some(Self { bytes, template: Some(template), size, count, index: 0 })
    }

    fn single(bytes: &'a mut [u8], vnet: &VnetHeader) -> Option<Self> {
        if let Some((start, offset)) = vnet.partial_checksum {
            complete_partial(bytes, usize::from(start), usize::from(offset))?;
        }
        Some(Self { bytes, template: None, size: 0, count: 1, index: 0 })
    }

    /// Number of packets, at least 1.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count
    }

    /// Length of every packet but the last, and of the last, in bytes. Equal where there is one.
    #[must_use]
    pub fn lengths(&self) -> (usize, usize) {
        let whole = self.bytes.len();
        match &self.template {
            None => (whole, whole),
            Some(template) => (template.header_len + self.size, whole - self.size * (self.count - 1)),
        }
    }

    /// Makes the next packet, on top of those before it. `None` after the last.
    pub fn next_packet(&mut self) -> Option<&[u8]> {
        let index = self.index;
        if index == self.count {
            return None;
        }
        self.index += 1;
        let Some(template) = &self.template else { return Some(self.bytes) };
        let start = index * self.size;
        let header_len = template.header_len;
        if let Some(before) = start.checked_sub(self.size) {
            self.bytes.copy_within(before..before + header_len, start);
        }
        let end = (start + header_len + self.size).min(self.bytes.len());
        let packet = self.bytes.get_mut(start..end)?;
        template.patch(packet, index, self.size, index + 1 == self.count)?;
        Some(packet)
    }
}

/// Packets that [`Cut`] makes of one packet or super-packet, where it makes any: 1 without looking at an ordinary one.
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

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Tcp,
    Udp,
}

/// The headers of a super-packet, summed without the fields that differ between segments.
struct Template {
    header_len: usize,
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

impl Template {
    fn new(bytes: &[u8], packet: &Packet, header_len: usize, kind: Kind) -> Option<Self> {
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
            header_len,
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

    /// Makes `segment` (headers of the burst or of another segment, and payload) the `index`th of its burst.
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
        let payload = sum(transport.get(self.header_len - self.transport..)?);
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
