//! Where the headers of one IP packet are, and the few fields that flows are made of.
//!
//! [`Packet::parse`] checks lengths once; the accessors then read from the same bytes and answer `None` instead
//! of panicking where they are given others. Nothing is copied but addresses.
//! Source: RFC 791, RFC 8200 §4 (extension headers), RFC 4443, RFC 1858 (tiny first fragments).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Range;

use super::read16;

/// IANA protocol numbers that are treated specially.
pub mod protocol {
    /// ICMP for IPv4.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// DCCP.
    pub const DCCP: u8 = 33;
    /// ICMP for IPv6.
    pub const ICMPV6: u8 = 58;
    /// SCTP.
    pub const SCTP: u8 = 132;
    /// UDP-Lite.
    pub const UDP_LITE: u8 = 136;

    /// Whether the transport header begins with source and destination port.
    #[must_use]
    pub const fn has_ports(protocol: u8) -> bool {
        matches!(protocol, TCP | UDP | DCCP | SCTP | UDP_LITE)
    }
}

/// FIN of the TCP flags byte.
pub const TCP_FIN: u8 = 0x01;
/// SYN of the TCP flags byte.
pub const TCP_SYN: u8 = 0x02;
/// RST of the TCP flags byte.
pub const TCP_RST: u8 = 0x04;
/// PSH of the TCP flags byte.
pub const TCP_PSH: u8 = 0x08;
/// ACK of the TCP flags byte.
pub const TCP_ACK: u8 = 0x10;
/// CWR of the TCP flags byte.
pub const TCP_CWR: u8 = 0x80;

const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;
/// Longest chain of extension headers that is followed; real chains have one or two.
const MAX_EXTENSION_HEADERS: usize = 8;
/// Octets of the quoted packet's transport header that every ICMP error carries (RFC 792).
const QUOTED_TRANSPORT: usize = 8;

/// IP version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Version {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Version {
    /// Where the source and, right after it, the destination address stand in the IP header.
    #[must_use]
    pub const fn addresses(self) -> Range<usize> {
        match self {
            Self::V4 => 12..20,
            Self::V6 => 8..40,
        }
    }
}

/// Place of a fragment in its datagram. Atomic IPv6 fragments (RFC 6946) count as whole packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// Identification; 16 bits in IPv4.
    pub id: u32,
    /// Offset of its first byte, in bytes.
    pub offset: u16,
    /// More fragments follow.
    pub more: bool,
}

/// The parsed headers of one IP packet (or super-packet).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// IP version.
    pub version: Version,
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// Final transport protocol, after the IPv6 extension headers.
    pub protocol: u8,
    /// Offset of the transport header (of a later fragment: of its data) in bytes.
    pub transport: usize,
    /// Length of the whole IP packet in bytes; the buffer may be longer.
    pub len: usize,
    /// Set on fragments.
    pub fragment: Option<Fragment>,
    /// TTL or hop limit.
    pub hop_limit: u8,
}

impl Packet {
    /// Parses an IP packet that stands at the start of `bytes`; what follows it (padding) is ignored.
    ///
    /// `None`: not IP, lengths that contradict each other or the buffer, a chain of extension headers that is
    /// cut off or too long, or a transport header whose fixed part is cut off.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let packet = Self::parse_ip(bytes, false)?;
        let later = packet.fragment.is_some_and(|f| f.offset > 0);
        (later || packet.len - packet.transport >= packet.fixed_header()).then_some(packet)
    }

    /// Parses the packet that an ICMP error quotes. The quote may be cut off anywhere after the IP header and
    /// the first 8 bytes of transport header; `len` is then what is there, not what the header says.
    #[must_use]
    pub fn parse_embedded(bytes: &[u8]) -> Option<Self> {
        let packet = Self::parse_ip(bytes, true)?;
        (packet.len - packet.transport >= QUOTED_TRANSPORT).then_some(packet)
    }

    fn parse_ip(bytes: &[u8], quoted: bool) -> Option<Self> {
        match bytes.first()? >> 4 {
            4 => Self::parse_v4(bytes, quoted),
            6 => Self::parse_v6(bytes, quoted),
            _ => None,
        }
    }

    fn parse_v4(bytes: &[u8], quoted: bool) -> Option<Self> {
        let header = bytes.first_chunk::<IPV4_HEADER>()?;
        let transport = usize::from(header[0] & 0xf) * 4;
        let len = held_length(usize::from(u16::from_be_bytes([header[2], header[3]])), bytes.len(), quoted)?;
        if transport < IPV4_HEADER || len < transport {
            return None;
        }
        let place = u16::from_be_bytes([header[6], header[7]]);
        let (offset, more) = ((place & 0x1fff) << 3, place & 0x2000 != 0);
        let id = u32::from(u16::from_be_bytes([header[4], header[5]]));
        Some(Self {
            version: Version::V4,
            source: Ipv4Addr::new(header[12], header[13], header[14], header[15]).into(),
            destination: Ipv4Addr::new(header[16], header[17], header[18], header[19]).into(),
            protocol: header[9],
            transport,
            len,
            fragment: (more || offset > 0).then_some(Fragment { id, offset, more }),
            hop_limit: header[8],
        })
    }

    fn parse_v6(bytes: &[u8], quoted: bool) -> Option<Self> {
        let header = bytes.first_chunk::<IPV6_HEADER>()?;
        let payload = usize::from(u16::from_be_bytes([header[4], header[5]]));
        let len = held_length(IPV6_HEADER + payload, bytes.len(), quoted)?;
        let chain = ExtensionHeaders::walk(bytes.get(..len)?, header[6])?;
        let source: [u8; 16] = *bytes.get(8..)?.first_chunk()?;
        let destination: [u8; 16] = *bytes.get(24..)?.first_chunk()?;
        Some(Self {
            version: Version::V6,
            source: Ipv6Addr::from(source).into(),
            destination: Ipv6Addr::from(destination).into(),
            protocol: chain.protocol,
            transport: chain.end,
            len,
            fragment: chain.fragment,
            hop_limit: header[7],
        })
    }

    /// Shortest transport header of this protocol, as far as it is known.
    fn fixed_header(&self) -> usize {
        match (self.protocol, self.version) {
            (protocol::TCP, _) => 20,
            (protocol::SCTP | protocol::DCCP, _) => 12,
            (protocol::UDP | protocol::UDP_LITE, _) => 8,
            (protocol::ICMP, Version::V4) | (protocol::ICMPV6, Version::V6) => 8,
            _ => 0,
        }
    }

    /// True of every fragment but the first: it starts with data, not with a transport header.
    #[must_use]
    pub fn is_later_fragment(&self) -> bool {
        self.fragment.is_some_and(|f| f.offset > 0)
    }

    /// True of the fragment that starts with the transport header.
    #[must_use]
    pub fn is_first_fragment(&self) -> bool {
        self.fragment.is_some_and(|f| f.offset == 0)
    }

    /// Source and destination port of TCP, UDP, UDP-Lite, SCTP and DCCP; `None` for later fragments.
    #[must_use]
    pub fn ports(&self, bytes: &[u8]) -> Option<(u16, u16)> {
        let transport = self.transport_header(bytes)?;
        let known = matches!(
            self.protocol,
            protocol::TCP | protocol::UDP | protocol::UDP_LITE | protocol::SCTP | protocol::DCCP
        );
        if !known {
            return None;
        }
        Some((read16(transport, 0)?, read16(transport, 2)?))
    }

    /// The flags byte of a TCP header (CWR, ECE, URG, ACK, PSH, RST, SYN, FIN from the top).
    #[must_use]
    pub fn tcp_flags(&self, bytes: &[u8]) -> Option<u8> {
        (self.protocol == protocol::TCP).then(|| self.transport_header(bytes)?.get(13).copied())?
    }

    /// Length of the TCP header with its options; `None` where it does not fit the packet.
    #[must_use]
    pub fn tcp_header_len(&self, bytes: &[u8]) -> Option<usize> {
        if self.protocol != protocol::TCP {
            return None;
        }
        let transport = self.transport_header(bytes)?;
        let len = usize::from(transport.get(12)? >> 4) * 4;
        (len >= 20 && len <= transport.len()).then_some(len)
    }

    /// Type and code of an ICMP or ICMPv6 message.
    #[must_use]
    pub fn icmp_type_code(&self, bytes: &[u8]) -> Option<(u8, u8)> {
        if !self.is_icmp() {
            return None;
        }
        match self.transport_header(bytes)? {
            [kind, code, ..] => Some((*kind, *code)),
            _ => None,
        }
    }

    /// True of ICMP messages that quote the packet which caused them.
    #[must_use]
    pub fn is_icmp_error(&self, bytes: &[u8]) -> bool {
        self.icmp_type_code(bytes).is_some_and(|(kind, _)| match self.version {
            Version::V4 => matches!(kind, 3 | 4 | 5 | 11 | 12),
            Version::V6 => kind < 128,
        })
    }

    /// Where the quoted packet stands in an ICMP error; for [`Packet::parse_embedded`].
    #[must_use]
    pub fn embedded(&self, bytes: &[u8]) -> Option<Range<usize>> {
        let start = self.transport + 8;
        (self.is_icmp_error(bytes) && start <= self.len && self.len <= bytes.len()).then_some(start..self.len)
    }

    fn is_icmp(&self) -> bool {
        matches!(
            (self.protocol, self.version),
            (protocol::ICMP, Version::V4) | (protocol::ICMPV6, Version::V6)
        )
    }

    /// Transport header and payload; `None` for later fragments.
    pub(super) fn transport_header<'a>(&self, bytes: &'a [u8]) -> Option<&'a [u8]> {
        if self.is_later_fragment() { None } else { bytes.get(self.transport..self.len) }
    }

    /// Where the transport checksum stands behind the transport header's start, for protocols whose checksum
    /// covers the pseudo-header.
    pub(super) fn pseudo_checksum_offset(&self) -> Option<usize> {
        match (self.protocol, self.version) {
            (protocol::TCP, _) => Some(16),
            (protocol::UDP | protocol::UDP_LITE | protocol::DCCP, _) => Some(6),
            (protocol::ICMPV6, Version::V6) => Some(2),
            _ => None,
        }
    }
}

/// The length to work with: what the header says, or for a quote at most what is there.
fn held_length(stated: usize, available: usize, quoted: bool) -> Option<usize> {
    if stated <= available {
        Some(stated)
    } else if quoted {
        Some(available)
    } else {
        None
    }
}

/// End of a chain of IPv6 extension headers.
struct ExtensionHeaders {
    protocol: u8,
    end: usize,
    fragment: Option<Fragment>,
}

impl ExtensionHeaders {
    /// Follows the chain in `packet`, the whole IPv6 packet, whose first next-header value is `next`.
    fn walk(packet: &[u8], next: u8) -> Option<Self> {
        let mut chain = Self { protocol: next, end: IPV6_HEADER, fragment: None };
        for _ in 0..=MAX_EXTENSION_HEADERS {
            let rest = packet.get(chain.end..)?;
            let len = match chain.protocol {
                // Hop-by-hop, routing, destination options: units of 8 beyond the first 8.
                0 | 43 | 60 => 8 + 8 * usize::from(*rest.get(1)?),
                // Authentication header: units of 4, minus 2.
                51 => 8 + 4 * usize::from(*rest.get(1)?),
                44 => 8,
                _ => return Some(chain),
            };
            let header = rest.get(..len)?;
            if chain.protocol == 44 {
                let place = read16(header, 2)?;
                let (offset, more) = (place & 0xfff8, place & 1 != 0);
                if offset > 0 || more {
                    let id = super::read32(header, 4)?;
                    chain.fragment = Some(Fragment { id, offset, more });
                }
            }
            chain.protocol = *header.first()?;
            chain.end += len;
            if chain.fragment.is_some_and(|f| f.offset > 0) {
                return Some(chain);
            }
        }
        None
    }
}
