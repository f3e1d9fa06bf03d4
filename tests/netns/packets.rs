//! Packets and frames of every shape that a test sends by hand, and what a sniffer's frame contains.
//!
//! May touch: nothing, bytes only. Built and read with etherparse.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use etherparse::{
    IpHeaders, IpNumber, NetSlice, PacketBuilder, PacketBuilderStep, SlicedPacket, TcpOptionElement,
    TransportSlice,
};

use crate::lab::TUNNEL_PORT;

/// The bytes that every plaintext of these tests carries, so that a capture can be searched for them.
pub const CANARY: &[u8] = b"TENCRYPT-TEST-CANARY";

/// An IP packet with a UDP datagram inside.
pub fn udp(from: IpAddr, to: IpAddr, source_port: u16, port: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let builder = ip(from, to, 64).udp(source_port, port);
    builder.write(&mut bytes, payload).expect("a packet in memory");
    bytes
}

/// An IP packet with a TCP SYN inside.
pub fn tcp_syn(from: IpAddr, to: IpAddr, source_port: u16, port: u16) -> Vec<u8> {
    let mut bytes = Vec::new();
    ip(from, to, 64)
        .tcp(source_port, port, 7, 64_000)
        .syn()
        .write(&mut bytes, &[])
        .expect("a packet in memory");
    bytes
}

/// An ICMP echo request of either family.
pub fn echo_request(from: IpAddr, to: IpAddr, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let builder = ip(from, to, 64);
    let written = if from.is_ipv4() {
        builder.icmpv4_echo_request(1, 1).write(&mut bytes, payload)
    } else {
        builder.icmpv6_echo_request(1, 1).write(&mut bytes, payload)
    };
    written.expect("a packet in memory");
    bytes
}

/// An IP packet of another protocol.
pub fn other(from: IpAddr, to: IpAddr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    ip(from, to, 64).write(&mut bytes, IpNumber(protocol), payload).expect("a packet in memory");
    bytes
}

/// An unsolicited neighbour advertisement to `to`: `claimed` has the hardware address `mac`, and had it confirmed.
pub fn advertisement(claimed: Ipv6Addr, mac: [u8; 6], to: Ipv6Addr) -> Vec<u8> {
    const SOLICITED_AND_OVERRIDE: u8 = 0x60;
    let mut bytes = Vec::new();
    let body = [&claimed.octets()[..], &[2, 1], &mac].concat();
    let builder = ip(claimed.into(), to.into(), 255).icmpv6_raw(136, 0, [SOLICITED_AND_OVERRIDE, 0, 0, 0]);
    builder.write(&mut bytes, &body).expect("a packet in memory");
    bytes
}

/// A router advertisement as a frame to all nodes of the link: no default route, and a prefix for addresses, for ten minutes.
pub fn router_advertisement(mac: [u8; 6], prefix: Ipv6Addr) -> Vec<u8> {
    const ON_LINK_AND_AUTONOMOUS: u8 = 0xc0;
    let (from, to) =
        (Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0x77), Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1));
    let lifetime = 600u32.to_be_bytes();
    let option =
        [&[3, 4, 64, ON_LINK_AND_AUTONOMOUS][..], &lifetime, &lifetime, &[0; 4], &prefix.octets()].concat();
    let mut bytes = Vec::new();
    let builder = ip(from.into(), to.into(), 255).icmpv6_raw(134, 0, [64, 0, 0, 0]);
    builder.write(&mut bytes, &[&[0; 8][..], &option].concat()).expect("a packet in memory");
    frame(mac, [0x33, 0x33, 0, 0, 0, 1], &bytes)
}

/// An ARP reply as a frame to `to_mac`: `claimed` has the hardware address `mac`.
pub fn arp_reply(claimed: Ipv4Addr, mac: [u8; 6], to: Ipv4Addr, to_mac: [u8; 6]) -> Vec<u8> {
    let head = [0x08, 0x06, 0, 1, 0x08, 0x00, 6, 4, 0, 2];
    [&to_mac[..], &mac, &head, &mac, &claimed.octets(), &to_mac, &to.octets()].concat()
}

/// The packet as two fragments, cut `at` bytes (a multiple of eight) behind its IP header.
pub fn fragments(packet: &[u8], at: u16) -> [Vec<u8>; 2] {
    assert!(at.is_multiple_of(8));
    let is_v4 = packet[0] >> 4 == 4;
    let (head, body) = packet.split_at(if is_v4 { 20 } else { 40 });
    let (first, second) = body.split_at(at.into());
    let fragment = |part: &[u8], offset: u16, more: bool| {
        let (mut head, offset) = (head.to_vec(), offset / 8);
        if is_v4 {
            let length = u16::try_from(20 + part.len()).expect("a small packet");
            head[2..4].copy_from_slice(&length.to_be_bytes());
            head[4..6].copy_from_slice(&[0x77, 0x77]);
            head[6..8].copy_from_slice(&(offset | u16::from(more) << 13).to_be_bytes());
            head[10..12].fill(0);
            let sum = header_checksum(&head);
            head[10..12].copy_from_slice(&sum.to_be_bytes());
        } else {
            let length = u16::try_from(8 + part.len()).expect("a small packet");
            head[4..6].copy_from_slice(&length.to_be_bytes());
            let [high, low] = (offset << 3 | u16::from(more)).to_be_bytes();
            let next = std::mem::replace(&mut head[6], 44);
            head.extend([next, 0, high, low, 0x77, 0x77, 0x77, 0x77]);
        }
        [&head[..], part].concat()
    };
    [fragment(first, 0, true), fragment(second, at, false)]
}

fn ip(from: IpAddr, to: IpAddr, hops: u8) -> PacketBuilderStep<IpHeaders> {
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => PacketBuilder::ipv4(from.octets(), to.octets(), hops),
        (IpAddr::V6(from), IpAddr::V6(to)) => PacketBuilder::ipv6(from.octets(), to.octets(), hops),
        _ => panic!("addresses of two families"),
    }
}

/// The checksum of an IPv4 header whose own checksum is zero.
pub fn header_checksum(header: &[u8]) -> u16 {
    let sum: u32 = header.chunks(2).map(|c| u32::from(u16::from_be_bytes([c[0], c[1]]))).sum();
    !u16::try_from((sum & 0xffff) + (sum >> 16)).expect("a small header")
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

/// What the UDP datagram of a frame carries.
pub fn udp_payload(frame: &[u8]) -> Option<&[u8]> {
    match SlicedPacket::from_ethernet(frame).ok()?.transport? {
        TransportSlice::Udp(udp) => Some(udp.payload()),
        _ => None,
    }
}

/// The type of the tunnel's message that the frame carries, if it carries one.
pub fn sealed(frame: &[u8]) -> Option<u8> {
    let between_tunnels = seen(frame)?.ports == Some((TUNNEL_PORT, TUNNEL_PORT));
    match udp_payload(frame)?.first_chunk()? {
        [kind @ 1..=4, 0, 0, 0] if between_tunnels => Some(*kind),
        _ => None,
    }
}

/// Whether the bytes contain the canary.
pub fn has_canary(frame: &[u8]) -> bool {
    frame.windows(CANARY.len()).any(|w| w == CANARY)
}

/// Whether the frame accepts a TCP connection.
pub fn is_syn_ack(frame: &[u8]) -> bool {
    let transport = SlicedPacket::from_ethernet(frame).ok().and_then(|sliced| sliced.transport);
    matches!(transport, Some(TransportSlice::Tcp(tcp)) if tcp.syn() && tcp.ack())
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
