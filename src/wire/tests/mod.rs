//! Tests of the byte layer, against packets built by etherparse and a naive checksum.

use std::net::IpAddr;

use etherparse::{
    IpFragOffset, IpHeaders, IpNumber, Ipv4Extensions, Ipv4Header, Ipv4Options, Ipv6Extensions,
    Ipv6FragmentHeader, Ipv6Header, Ipv6RawExtHeader, PacketBuilder, TcpHeader,
};

use super::packet::{Packet, Version, protocol};
use super::vnet::{Gso, VnetHeader};
use super::{read16, write16};

mod answers;
mod checksum;
mod coalesce;
mod hostile;
mod packet;
mod rewrite;
mod segment;

/// Whether the IP header carries options (IPv4) or extension headers (IPv6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    Plain,
    Extended,
}

const BOTH: [Version; 2] = [Version::V4, Version::V6];
const SHAPES: [Shape; 2] = [Shape::Plain, Shape::Extended];

const SOURCE_PORT: u16 = 40_001;
const DESTINATION_PORT: u16 = 8_080;

fn source(version: Version) -> IpAddr {
    match version {
        Version::V4 => "10.1.2.3".parse().unwrap(),
        Version::V6 => "fd00:1::3".parse().unwrap(),
    }
}

fn destination(version: Version) -> IpAddr {
    match version {
        Version::V4 => "10.96.7.9".parse().unwrap(),
        Version::V6 => "fd00:96::7:9".parse().unwrap(),
    }
}

fn ipv4() -> Ipv4Header {
    let mut header = Ipv4Header::new(0, 61, IpNumber::TCP, [10, 1, 2, 3], [10, 96, 7, 9]).unwrap();
    header.identification = 0xfffe;
    header.dont_fragment = false;
    header
}

fn ipv6() -> Ipv6Header {
    let octets = |address| match address {
        IpAddr::V6(address) => address.octets(),
        IpAddr::V4(_) => unreachable!(),
    };
    Ipv6Header {
        flow_label: 0xa_bcde.try_into().unwrap(),
        hop_limit: 61,
        source: octets(source(Version::V6)),
        destination: octets(destination(Version::V6)),
        ..Ipv6Header::default()
    }
}

fn ip(version: Version, shape: Shape) -> IpHeaders {
    match version {
        Version::V4 => {
            let mut header = ipv4();
            if shape == Shape::Extended {
                header.options = Ipv4Options::try_from(&[1, 1, 1, 1, 1, 1, 1, 0][..]).unwrap();
            }
            IpHeaders::Ipv4(header, Ipv4Extensions::default())
        }
        Version::V6 => {
            let mut extensions = Ipv6Extensions::default();
            if shape == Shape::Extended {
                let padding =
                    Ipv6RawExtHeader::new_raw(IpNumber::TCP, &[1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
                extensions.hop_by_hop_options = Some(padding.clone().unwrap());
                extensions.destination_options = Some(padding.unwrap());
            }
            IpHeaders::Ipv6(ipv6(), extensions)
        }
    }
}

/// A fragment with these fields; the payload is what its first fragment starts with.
fn fragment_headers(version: Version, offset: u16, more: bool) -> IpHeaders {
    let fragment_offset = IpFragOffset::try_new(offset / 8).unwrap();
    match version {
        Version::V4 => {
            let mut header = ipv4();
            header.fragment_offset = fragment_offset;
            header.more_fragments = more;
            IpHeaders::Ipv4(header, Ipv4Extensions::default())
        }
        Version::V6 => {
            let header = Ipv6FragmentHeader::new(IpNumber::TCP, fragment_offset, more, 0x1234_5678);
            let extensions = Ipv6Extensions { fragment: Some(header), ..Ipv6Extensions::default() };
            IpHeaders::Ipv6(ipv6(), extensions)
        }
    }
}

fn tcp_header(sequence: u32) -> TcpHeader {
    let mut header = TcpHeader::new(SOURCE_PORT, DESTINATION_PORT, sequence, 512);
    header.ack = true;
    header.acknowledgment_number = 0x0102_0304;
    header
}

fn tcp(ip: IpHeaders, header: TcpHeader, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    PacketBuilder::ip(ip).tcp_header(header).write(&mut out, payload).unwrap();
    out
}

fn udp(ip: IpHeaders, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    PacketBuilder::ip(ip).udp(SOURCE_PORT, DESTINATION_PORT).write(&mut out, payload).unwrap();
    out
}

fn echo(ip: IpHeaders, id: u16, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    match ip {
        IpHeaders::Ipv4(..) => {
            PacketBuilder::ip(ip).icmpv4_echo_request(id, 7).write(&mut out, payload).unwrap()
        }
        IpHeaders::Ipv6(..) => {
            PacketBuilder::ip(ip).icmpv6_echo_request(id, 7).write(&mut out, payload).unwrap()
        }
    }
    out
}

/// Any transport protocol, its header being the start of `payload`.
fn raw(ip: IpHeaders, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    PacketBuilder::ip(ip).write(&mut out, IpNumber(protocol), payload).unwrap();
    out
}

fn sctp(ip: IpHeaders, chunk: &[u8]) -> Vec<u8> {
    let mut packet = [SOURCE_PORT, DESTINATION_PORT, 0xdead, 0xbeef, 0, 0].map(u16::to_be_bytes).concat();
    packet.extend_from_slice(chunk);
    let crc = super::crc32c::crc32c(&packet);
    packet[8..12].copy_from_slice(&crc.to_le_bytes());
    raw(ip, protocol::SCTP, &packet)
}

fn udp_lite(ip: IpHeaders, coverage: u16, payload: &[u8]) -> Vec<u8> {
    let mut packet = [SOURCE_PORT, DESTINATION_PORT, coverage, 0].map(u16::to_be_bytes).concat();
    packet.extend_from_slice(payload);
    let covered = if coverage == 0 { packet.len() } else { usize::from(coverage) };
    let mut out = raw(ip, protocol::UDP_LITE, &packet);
    let parsed = Packet::parse(&out).unwrap();
    let pseudo = naive_pseudo(&out, &parsed);
    let sum = naive_sum(&[pseudo, out[parsed.transport..parsed.transport + covered].to_vec()].concat());
    write16(&mut out, parsed.transport + 6, !sum).unwrap();
    out
}

/// RFC 1071, word by word.
fn naive_sum(bytes: &[u8]) -> u16 {
    let mut total: u32 = 0;
    for pair in bytes.chunks(2) {
        total += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
        total = (total & 0xffff) + (total >> 16);
    }
    u16::try_from(total).unwrap()
}

/// The pseudo-header's bytes, in the layout of IPv6 for both families: it has the same sum.
fn naive_pseudo(bytes: &[u8], packet: &Packet) -> Vec<u8> {
    let len = u32::try_from(packet.len - packet.transport).unwrap().to_be_bytes();
    let addresses = &bytes[packet.version.addresses()];
    [addresses, &len, &[0, 0, 0, packet.protocol]].concat()
}

/// Whether IP header and TCP, UDP or ICMPv6 checksum are right.
fn naive_ok(bytes: &[u8]) -> bool {
    let packet = Packet::parse(bytes).unwrap();
    let ip_header = &bytes[..usize::from(bytes[0] & 0xf) * 4];
    let ip = packet.version == Version::V6 || naive_sum(ip_header) == 0xffff;
    let covered = [naive_pseudo(bytes, &packet), bytes[packet.transport..packet.len].to_vec()].concat();
    ip && naive_sum(&covered) == 0xffff
}

/// Turns a complete transport checksum into the partial state that the kernel would hand over.
fn make_partial(bytes: &mut [u8], gso: Option<u16>) -> VnetHeader {
    let packet = Packet::parse(bytes).unwrap();
    let (at, header) = match packet.protocol {
        protocol::TCP => (16, packet.tcp_header_len(bytes).unwrap()),
        _ => (6, 8),
    };
    let sum = naive_sum(&naive_pseudo(bytes, &packet));
    write16(bytes, packet.transport + at, sum).unwrap();
    let gso = match (gso, packet.protocol, packet.version) {
        (None, ..) => Gso::None,
        (Some(size), protocol::UDP, _) => Gso::Udp(size),
        (Some(size), _, Version::V4) => Gso::Tcp4(size),
        (Some(size), _, Version::V6) => Gso::Tcp6(size),
    };
    let header_len = if gso == Gso::None { 0 } else { u16::try_from(packet.transport + header).unwrap() };
    let partial_checksum = Some((u16::try_from(packet.transport).unwrap(), u16::try_from(at).unwrap()));
    VnetHeader { gso, header_len, partial_checksum, ecn: false }
}

/// A payload without short periods.
fn payload(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i.wrapping_mul(31) ^ (i >> 7)).to_le_bytes()[0]).collect()
}
