//! ICMP errors, resets and datagrams that the agent itself makes.

use std::net::SocketAddr;

use super::*;
use crate::wire::checksum::transport_checksum_ok;
use crate::wire::icmp::{IcmpError, icmp_error};
use crate::wire::tcp_reset::tcp_reset;
use crate::wire::udp::udp_packet;

const KINDS: [IcmpError; 4] = [
    IcmpError::AdminProhibited,
    IcmpError::HostUnreachable,
    IcmpError::PortUnreachable,
    IcmpError::TooBig(1_360),
];

fn answer(kind: IcmpError, quoted: &[u8]) -> Option<Vec<u8>> {
    let mut out = vec![9];
    let answered = icmp_error(kind, quoted, &mut out);
    assert_eq!(out[0], 9, "appended");
    assert_eq!(answered, out.len() > 1);
    answered.then(|| out.split_off(1))
}

fn reset(quoted: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    tcp_reset(quoted, &mut out).then_some(out)
}

fn well_formed(bytes: &[u8]) -> Packet {
    let packet = Packet::parse(bytes).unwrap();
    assert_eq!(packet.len, bytes.len());
    assert!(transport_checksum_ok(bytes, &packet));
    assert!(packet.version == Version::V6 || naive_sum(&bytes[..packet.transport]) == 0xffff);
    etherparse::SlicedPacket::from_ip(bytes).unwrap();
    packet
}

#[test]
fn error_has_its_number_and_comes_from_the_quoted_destination() {
    let numbers = [[(3, 13), (3, 1), (3, 3), (3, 4)], [(1, 1), (1, 3), (1, 4), (2, 0)]];
    for (version, numbers) in BOTH.into_iter().zip(numbers) {
        for (kind, number) in KINDS.into_iter().zip(numbers) {
            let quoted = udp(ip(version, Shape::Extended), b"data");
            let error = answer(kind, &quoted).unwrap();
            let packet = well_formed(&error);
            assert_eq!((packet.source, packet.destination), (destination(version), source(version)));
            assert_eq!(packet.icmp_type_code(&error), Some(number));
            assert!(packet.is_icmp_error(&error));
            assert_eq!(&error[packet.embedded(&error).unwrap()], quoted);
            let word = error[packet.transport + 4..packet.transport + 8].to_vec();
            let mtu = if matches!(kind, IcmpError::TooBig(_)) { 1_360_u32 } else { 0 };
            assert_eq!(word, mtu.to_be_bytes());
        }
    }
}

#[test]
fn error_quotes_no_more_than_its_family_allows() {
    for (version, longest) in BOTH.into_iter().zip([576, 1_280]) {
        let quoted = tcp(ip(version, Shape::Plain), tcp_header(1), &payload(60_000));
        assert_eq!(answer(IcmpError::TooBig(1_360), &quoted).unwrap().len(), longest);
    }
}

#[test]
fn padding_after_the_packet_is_not_quoted() {
    let mut quoted = udp(ip(Version::V4, Shape::Plain), b"data");
    let len = quoted.len();
    quoted.extend([0; 12]);
    assert_eq!(answer(IcmpError::PortUnreachable, &quoted).unwrap().len(), 28 + len);
}

#[test]
fn error_is_never_answered_with_an_error() {
    for version in BOTH {
        let error = answer(IcmpError::HostUnreachable, &udp(ip(version, Shape::Plain), b"data")).unwrap();
        assert_eq!(answer(IcmpError::HostUnreachable, &error), None);
        assert!(answer(IcmpError::HostUnreachable, &echo(ip(version, Shape::Plain), 1, b"ping")).is_some());
    }
    let redirect = raw(ip(Version::V6, Shape::Plain), protocol::ICMPV6, &[137; 40]);
    assert_eq!(answer(IcmpError::HostUnreachable, &redirect), None);
}

#[test]
fn later_fragments_are_never_answered() {
    for version in BOTH {
        let first = udp(fragment_headers(version, 0, true), &payload(64));
        assert!(answer(IcmpError::HostUnreachable, &first).is_some());
        let later = raw(fragment_headers(version, 72, false), protocol::UDP, &payload(64));
        assert_eq!(answer(IcmpError::HostUnreachable, &later), None);
    }
}

#[test]
fn only_one_host_is_answered_in_the_name_of_one_host() {
    let many = ["224.0.0.1", "255.255.255.255", "240.0.0.1", "0.0.0.0", "ff02::1", "::"];
    for address in many.map(|a| a.parse::<IpAddr>().unwrap()) {
        let version = if address.is_ipv4() { Version::V4 } else { Version::V6 };
        let pairs = [(address, destination(version)), (source(version), address)];
        for (source, destination) in pairs {
            let mut quoted = Vec::new();
            assert!(udp_packet((source, 1).into(), (destination, 2).into(), b"x", &mut quoted));
            assert_eq!(answer(IcmpError::HostUnreachable, &quoted), None, "{source} to {destination}");
        }
    }
}

#[test]
fn malformed_packet_is_not_answered() {
    let quoted = udp(ip(Version::V4, Shape::Plain), b"data");
    assert_eq!(answer(IcmpError::HostUnreachable, &quoted[..quoted.len() - 1]), None);
    assert_eq!(answer(IcmpError::HostUnreachable, &[]), None);
    assert_eq!(reset(&quoted), None, "no TCP");
    assert_eq!(reset(&[]), None);
}

#[test]
fn reset_of_a_segment_without_ack_acknowledges_all_it_occupies() {
    for version in BOTH {
        for (syn, fin, data, occupied) in
            [(true, false, 0, 1), (true, false, 5, 6), (false, true, 5, 6), (false, false, 0, 0)]
        {
            let mut header = tcp_header(u32::MAX);
            (header.ack, header.syn, header.fin) = (false, syn, fin);
            header.set_options_raw(&[1; 8]).unwrap();
            let rst = reset(&tcp(ip(version, Shape::Extended), header, &payload(data))).unwrap();
            let packet = well_formed(&rst);
            assert_eq!((packet.source, packet.destination), (destination(version), source(version)));
            assert_eq!(packet.ports(&rst), Some((DESTINATION_PORT, SOURCE_PORT)));
            let segment = etherparse::TcpSlice::from_slice(&rst[packet.transport..]).unwrap();
            assert!(segment.rst() && segment.ack() && !segment.syn() && !segment.fin());
            assert_eq!(segment.sequence_number(), 0);
            assert_eq!(segment.acknowledgment_number(), u32::MAX.wrapping_add(occupied));
        }
    }
}

#[test]
fn reset_of_a_segment_with_ack_stands_where_the_ack_points() {
    for version in BOTH {
        let rst = reset(&tcp(ip(version, Shape::Plain), tcp_header(7), b"data")).unwrap();
        let packet = well_formed(&rst);
        let segment = etherparse::TcpSlice::from_slice(&rst[packet.transport..]).unwrap();
        assert!(segment.rst() && !segment.ack());
        assert_eq!((segment.sequence_number(), segment.acknowledgment_number()), (0x0102_0304, 0));
        assert_eq!(segment.window_size(), 0);
    }
}

#[test]
fn reset_is_never_answered_with_a_reset() {
    for version in BOTH {
        let mut header = tcp_header(7);
        header.rst = true;
        assert_eq!(reset(&tcp(ip(version, Shape::Plain), header, b"")), None);
        let fragment = tcp(fragment_headers(version, 0, true), tcp_header(7), &payload(64));
        assert_eq!(reset(&fragment), None);
    }
}

#[test]
fn datagrams_of_every_length_are_built() {
    for (version, longest) in BOTH.into_iter().zip([65_507, 65_527]) {
        let from: SocketAddr = (source(version), 53).into();
        let to: SocketAddr = (destination(version), 40_000).into();
        for len in [0, 1, 2, 511, 1_472, 4_096, longest] {
            let mut out = vec![1, 2, 3];
            assert!(udp_packet(from, to, &payload(len), &mut out));
            let packet = well_formed(&out[3..]);
            assert_eq!((packet.source, packet.destination), (source(version), destination(version)));
            assert_eq!(packet.ports(&out[3..]), Some((53, 40_000)));
            assert_eq!(out[3 + packet.transport + 8..], payload(len));
        }
        let mut out = vec![1, 2, 3];
        assert!(!udp_packet(from, to, &payload(longest + 1), &mut out));
        assert_eq!(out, [1, 2, 3]);
    }
}

#[test]
fn datagram_between_families_is_refused() {
    let mut out = Vec::new();
    let v4: SocketAddr = (source(Version::V4), 53).into();
    let v6: SocketAddr = (source(Version::V6), 53).into();
    assert!(!udp_packet(v4, v6, b"x", &mut out));
    assert!(!udp_packet(v6, v4, b"x", &mut out));
    assert!(out.is_empty());
}
