//! ICMP errors that the agent answers a captured packet with.
//!
//! The source is the quoted packet's destination (an error from elsewhere fails `rp_filter=1`), the destination is
//! its source. Source: RFC 792, RFC 1122 §3.2.2, RFC 1812 §4.3.2 (length, precedence), RFC 1191, RFC 4443 §2.4.

use std::net::IpAddr;

use super::emit::Draft;
use super::packet::{Packet, Version, protocol};

/// An IPv4 error is at most this long (RFC 1812 §4.3.2.3).
const LONGEST_V4: usize = 576;
/// An IPv6 error is at most this long, the minimum MTU (RFC 4443 §2.4 c).
const LONGEST_V6: usize = 1_280;
/// Internetwork control (RFC 1812 §4.3.2.5).
const PRECEDENCE: u8 = 0xc0;
/// ICMPv6 redirect: not an error by its number, but never answered either.
const REDIRECT_V6: u8 = 137;

/// What the sender is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IcmpError {
    /// Communication administratively prohibited.
    AdminProhibited,
    /// Host (IPv6: address) unreachable.
    HostUnreachable,
    /// Port unreachable.
    PortUnreachable,
    /// The packet does not fit; the largest that does, in bytes.
    TooBig(u16),
}

impl IcmpError {
    /// Type, code and the second word of the message.
    fn message(self, version: Version) -> (u8, u8, u32) {
        match (version, self) {
            (Version::V4, Self::AdminProhibited) => (3, 13, 0),
            (Version::V4, Self::HostUnreachable) => (3, 1, 0),
            (Version::V4, Self::PortUnreachable) => (3, 3, 0),
            (Version::V4, Self::TooBig(mtu)) => (3, 4, u32::from(mtu)),
            (Version::V6, Self::AdminProhibited) => (1, 1, 0),
            (Version::V6, Self::HostUnreachable) => (1, 3, 0),
            (Version::V6, Self::PortUnreachable) => (1, 4, 0),
            (Version::V6, Self::TooBig(mtu)) => (2, 0, u32::from(mtu)),
        }
    }
}

/// Appends the error that answers `quoted` to `out`.
///
/// `false`, and `out` as before, for what must not be answered: malformed packets, ICMP errors and redirects,
/// later fragments, and packets whose source or destination is not one host's address.
#[must_use]
pub fn icmp_error(kind: IcmpError, quoted: &[u8], out: &mut Vec<u8>) -> bool {
    append(kind, quoted, out).is_some()
}

fn append(kind: IcmpError, quoted: &[u8], out: &mut Vec<u8>) -> Option<()> {
    let packet = Packet::parse(quoted)?;
    let redirect = packet.version == Version::V6
        && packet.icmp_type_code(quoted).is_some_and(|(kind, _)| kind == REDIRECT_V6);
    if !answerable(&packet) || packet.is_icmp_error(quoted) || redirect {
        return None;
    }
    let (protocol, longest) = match packet.version {
        Version::V4 => (protocol::ICMP, LONGEST_V4 - 20 - 8),
        Version::V6 => (protocol::ICMPV6, LONGEST_V6 - 40 - 8),
    };
    let quote = quoted.get(..packet.len.min(longest))?;
    let addresses = (packet.destination, packet.source);
    let draft = Draft::begin(addresses, protocol, PRECEDENCE, quote.len() + 8, out)?;
    let (kind, code, word) = kind.message(packet.version);
    out.extend([kind, code, 0, 0]);
    out.extend(word.to_be_bytes());
    out.extend_from_slice(quote);
    draft.finish(2, out)
}

/// Whether a packet may be answered at all: one host to one host, and not a later fragment.
pub(super) fn answerable(packet: &Packet) -> bool {
    !packet.is_later_fragment() && is_one_host(packet.source) && is_one_host(packet.destination)
}

fn is_one_host(address: IpAddr) -> bool {
    match address {
        // Class E and the limited broadcast address lie above multicast.
        IpAddr::V4(v4) => v4.octets()[0] < 224 && !v4.is_unspecified(),
        IpAddr::V6(v6) => !v6.is_multicast() && !v6.is_unspecified(),
    }
}
