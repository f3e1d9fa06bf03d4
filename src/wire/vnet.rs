//! The virtio-net header that precedes each packet on a TUN device with `IFF_VNET_HDR`.
//!
//! Source: linux/virtio_net.h, `struct virtio_net_hdr` (10 bytes, native = little endian after TUNSETVNETLE).

/// Length of the header on the device, in bytes.
pub const VNET_HEADER_LEN: usize = 10;

const FLAG_NEEDS_CSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

/// How a super-packet is to be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gso {
    /// One ordinary packet.
    None,
    /// TCP over IPv4; segments carry this many payload bytes.
    Tcp4(u16),
    /// TCP over IPv6; segments carry this many payload bytes.
    Tcp6(u16),
    /// UDP, either family; datagrams carry this many payload bytes.
    Udp(u16),
}

/// Offload state of one packet or super-packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VnetHeader {
    /// How to cut it.
    pub gso: Gso,
    /// Length of all headers (IP and transport) in bytes; 0 where `gso` is `None`. A hint only: the kernel
    /// stores the length of the buffer's linear part, which may be more, so readers parse the headers.
    pub header_len: u16,
    /// Where the partial checksum starts and where it is stored, as (start, offset from start); `None`: complete.
    pub partial_checksum: Option<(u16, u16)>,
    /// TCP with CWR set on the first segment only (VIRTIO_NET_HDR_GSO_ECN).
    pub ecn: bool,
}

impl VnetHeader {
    /// One ordinary packet with a complete checksum.
    pub const PLAIN: Self = Self { gso: Gso::None, header_len: 0, partial_checksum: None, ecn: false };

    /// Reads the header from the start of what the device returned.
    ///
    /// `None`: cut off, a segment size of 0, or a kind of segmentation that we never offer (UFO among them).
    /// DATA_VALID is ignored: it says nothing about what to do.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let &[flags, kind, h0, h1, g0, g1, s0, s1, o0, o1] = bytes.first_chunk::<VNET_HEADER_LEN>()?;
        let size = u16::from_le_bytes([g0, g1]);
        let ecn = kind & GSO_ECN != 0;
        let gso = match kind & !GSO_ECN {
            GSO_NONE if !ecn => Gso::None,
            GSO_TCPV4 if size > 0 => Gso::Tcp4(size),
            GSO_TCPV6 if size > 0 => Gso::Tcp6(size),
            GSO_UDP_L4 if size > 0 && !ecn => Gso::Udp(size),
            _ => return None,
        };
        let header_len = if gso == Gso::None { 0 } else { u16::from_le_bytes([h0, h1]) };
        let partial_checksum = (flags & FLAG_NEEDS_CSUM != 0)
            .then(|| (u16::from_le_bytes([s0, s1]), u16::from_le_bytes([o0, o1])));
        Some(Self { gso, header_len, partial_checksum, ecn })
    }

    /// The header as the device expects it before a packet.
    #[must_use]
    pub fn encode(&self) -> [u8; VNET_HEADER_LEN] {
        let (kind, size) = match self.gso {
            Gso::None => (GSO_NONE, 0),
            Gso::Tcp4(size) => (GSO_TCPV4, size),
            Gso::Tcp6(size) => (GSO_TCPV6, size),
            Gso::Udp(size) => (GSO_UDP_L4, size),
        };
        let kind = if self.ecn { kind | GSO_ECN } else { kind };
        let flags = if self.partial_checksum.is_some() { FLAG_NEEDS_CSUM } else { 0 };
        let (start, offset) = self.partial_checksum.unwrap_or((0, 0));
        let [h0, h1] = self.header_len.to_le_bytes();
        let [g0, g1] = size.to_le_bytes();
        let [s0, s1] = start.to_le_bytes();
        let [o0, o1] = offset.to_le_bytes();
        [flags, kind, h0, h1, g0, g1, s0, s1, o0, o1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_header_we_write_reads_back_equal() {
        let gsos = [Gso::None, Gso::Tcp4(1_380), Gso::Tcp6(1), Gso::Udp(u16::MAX)];
        for gso in gsos {
            for partial_checksum in [None, Some((40, 16)), Some((0x1234, 0x5678))] {
                let header_len = if gso == Gso::None { 0 } else { 52 };
                let ecn = matches!(gso, Gso::Tcp4(_));
                let header = VnetHeader { gso, header_len, partial_checksum, ecn };
                assert_eq!(VnetHeader::parse(&header.encode()), Some(header));
            }
        }
        assert_eq!(VnetHeader::PLAIN.encode(), [0; 10]);
    }

    #[test]
    fn fields_are_little_endian() {
        let bytes = [1, 0x81, 0x36, 0, 0x64, 5, 0x22, 0, 0x10, 0, 0xff];
        let expected = VnetHeader {
            gso: Gso::Tcp4(0x564),
            header_len: 0x36,
            partial_checksum: Some((0x22, 0x10)),
            ecn: true,
        };
        assert_eq!(VnetHeader::parse(&bytes), Some(expected));
    }

    #[test]
    fn kinds_that_we_do_not_offer_are_refused() {
        let header = |kind, size| VnetHeader::parse(&[0, kind, 40, 0, size, 0, 0, 0, 0, 0]);
        assert_eq!(header(3, 100), None, "UFO");
        assert_eq!(header(2, 100), None);
        assert_eq!(header(0x80, 0), None, "ECN without TCP");
        assert_eq!(header(0x85, 100), None, "ECN with UDP");
        assert_eq!(header(1, 0), None, "segments of nothing");
        assert_eq!(VnetHeader::parse(&[0; 9]), None);
        assert_eq!(VnetHeader::parse(&[2, 0, 9, 9, 9, 9, 9, 9, 9, 9]), Some(VnetHeader::PLAIN), "DATA_VALID");
    }
}
