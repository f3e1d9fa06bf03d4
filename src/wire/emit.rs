//! The IP header and the checksum of packets that the agent itself makes.

use std::net::IpAddr;

use super::checksum::{add, never_zero, pseudo_header, sum};
use super::packet::{Version, protocol};
use super::write16;

/// TTL and hop limit of our own packets.
const HOP_LIMIT: u8 = 64;
const DONT_FRAGMENT: u8 = 0x40;

/// A packet under construction at the end of a buffer: the IP header stands, the transport header is to follow.
pub(super) struct Draft {
    start: usize,
    transport: usize,
    version: Version,
    protocol: u8,
}

impl Draft {
    /// Appends the IP header of a packet with `len` bytes after it. `None`, and `out` as before, where the
    /// families differ or the packet would be too long.
    pub(super) fn begin(
        (source, destination): (IpAddr, IpAddr),
        protocol: u8,
        traffic_class: u8,
        len: usize,
        out: &mut Vec<u8>,
    ) -> Option<Self> {
        let start = out.len();
        let version = match (source, destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let [l0, l1] = u16::try_from(len + 20).ok()?.to_be_bytes();
                out.reserve(len + 20);
                // Identification 0: an atomic datagram has no use for it (RFC 6864).
                out.extend([0x45, traffic_class, l0, l1, 0, 0, DONT_FRAGMENT, 0, HOP_LIMIT, protocol, 0, 0]);
                out.extend(source.octets());
                out.extend(destination.octets());
                let header = out.get_mut(start..)?;
                write16(header, 10, !sum(header))?;
                Version::V4
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let [l0, l1] = u16::try_from(len).ok()?.to_be_bytes();
                out.reserve(len + 40);
                out.extend([
                    0x60 | (traffic_class >> 4),
                    traffic_class << 4,
                    0,
                    0,
                    l0,
                    l1,
                    protocol,
                    HOP_LIMIT,
                ]);
                out.extend(source.octets());
                out.extend(destination.octets());
                Version::V6
            }
            _ => return None,
        };
        Some(Self { start, transport: out.len(), version, protocol })
    }

    /// Stores the transport checksum `at` bytes into the transport header, whose field must hold zero.
    pub(super) fn finish(self, at: usize, out: &mut [u8]) -> Option<()> {
        let packet = out.get_mut(self.start..)?;
        let (ip, transport) = packet.split_at_mut_checked(self.transport - self.start)?;
        let pseudo = match self.protocol {
            protocol::ICMP => 0,
            protocol => pseudo_header(ip.get(self.version.addresses())?, protocol, transport.len()),
        };
        let field = !add(pseudo, sum(transport));
        write16(transport, at, if self.protocol == protocol::UDP { never_zero(field) } else { field })
    }
}
