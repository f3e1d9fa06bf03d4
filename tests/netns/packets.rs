//! Packets and frames of every shape that a test sends by hand, and what a sniffer's frame contains.
//!
//! May touch: nothing, bytes only. Built and read with etherparse.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TcpOptionElement, TransportSlice};

/// The bytes that every plaintext of these tests carries, so that a capture can be searched for them.
pub const CANARY: &[u8] = b"TENCRYPT-TEST-CANARY";

/// An IP packet with a UDP datagram inside.
pub fn udp(from: IpAddr, to: IpAddr, source_port: u16, port: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let builder = match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => PacketBuilder::ipv4(from.octets(), to.octets(), 64),
        (IpAddr::V6(from), IpAddr::V6(to)) => PacketBuilder::ipv6(from.octets(), to.octets(), 64),
        _ => panic!("addresses of two families"),
    };
    builder.udp(source_port, port).write(&mut bytes, payload).expect("a packet in memory");
    bytes
}

/// An Ethernet frame around an IP packet.
pub fn frame(from: [u8; 6], to: [u8; 6], packet: &[u8]) -> Vec<u8> {
    let ether_type: [u8; 2] = if packet[0] >> 4 == 4 { [0x08, 0x00] } else { [0x86, 0xdd] };
    [&to[..], &from[..], &ether_type[..], packet].concat()
}

/// What matters of one frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Source address.
    pub from: IpAddr,
    /// Destination address.
    pub to: IpAddr,
    /// IP protocol of the payload.
    pub protocol: u8,
    /// Source and destination port, where there are any.
    pub ports: Option<(u16, u16)>,
}

/// The addresses, protocol and ports of an IP frame; nothing for other frames.
pub fn seen(frame: &[u8]) -> Option<Seen> {
    let sliced = SlicedPacket::from_ethernet(frame).ok()?;
    let ports = match &sliced.transport {
        Some(TransportSlice::Udp(u)) => Some((u.source_port(), u.destination_port())),
        Some(TransportSlice::Tcp(t)) => Some((t.source_port(), t.destination_port())),
        _ => None,
    };
    match sliced.net? {
        NetSlice::Ipv4(ip) => Some(Seen {
            from: Ipv4Addr::from(ip.header().source()).into(),
            to: Ipv4Addr::from(ip.header().destination()).into(),
            protocol: ip.header().protocol().0,
            ports,
        }),
        NetSlice::Ipv6(ip) => Some(Seen {
            from: Ipv6Addr::from(ip.header().source()).into(),
            to: Ipv6Addr::from(ip.header().destination()).into(),
            protocol: ip.payload().ip_number.0,
            ports,
        }),
        NetSlice::Arp(_) => None,
    }
}

/// Whether the bytes contain the canary.
pub fn has_canary(frame: &[u8]) -> bool {
    frame.windows(CANARY.len()).any(|w| w == CANARY)
}

/// What a TCP SYN shows of the host and path that made it. Identification, ports and time stamps are left out:
/// they differ from one connection to the next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Syn {
    /// TTL or hop limit.
    pub ttl: u8,
    /// The DSCP and ECN bits.
    pub tos: u8,
    /// The don't-fragment bit; always set for IPv6.
    pub dont_fragment: bool,
    /// The window field.
    pub window: u16,
    /// The options in order, time stamp values blanked.
    pub options: Vec<String>,
}

/// The SYN (without ACK) from `from` to `port`, if the frame is one.
pub fn syn(frame: &[u8], from: IpAddr, port: u16) -> Option<Syn> {
    let what = seen(frame)?;
    let sliced = SlicedPacket::from_ethernet(frame).ok()?;
    let Some(TransportSlice::Tcp(tcp)) = sliced.transport else { return None };
    if !tcp.syn() || tcp.ack() || what.from != from || tcp.destination_port() != port {
        return None;
    }
    let (ttl, tos, dont_fragment) = match sliced.net? {
        NetSlice::Ipv4(ip) => {
            let h = ip.header();
            (h.ttl(), h.dcp().value() << 2 | h.ecn().value(), h.dont_fragment())
        }
        NetSlice::Ipv6(ip) => (ip.header().hop_limit(), ip.header().traffic_class(), true),
        NetSlice::Arp(_) => return None,
    };
    let options = tcp
        .options_iterator()
        .map(|option| match option {
            Ok(TcpOptionElement::Timestamp(..)) => "Timestamp".to_owned(),
            other => format!("{other:?}"),
        })
        .collect();
    Some(Syn { ttl, tos, dont_fragment, window: tcp.window_size(), options })
}
