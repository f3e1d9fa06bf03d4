//! Headers of every shape are found, and contradictions refused.

use super::*;
use crate::wire::packet::Fragment;

#[test]
fn headers_of_every_shape_are_found() {
    for version in BOTH {
        for (shape, extra) in
            [(Shape::Plain, 0), (Shape::Extended, if version == Version::V4 { 8 } else { 32 })]
        {
            let transport = if version == Version::V4 { 20 } else { 40 } + extra;
            let cases = [
                (protocol::TCP, tcp(ip(version, shape), tcp_header(1), b"hello")),
                (protocol::UDP, udp(ip(version, shape), b"hello")),
                (protocol::SCTP, sctp(ip(version, shape), b"hello")),
                (protocol::UDP_LITE, udp_lite(ip(version, shape), 0, b"hello")),
            ];
            for (protocol, mut bytes) in cases {
                let len = bytes.len();
                bytes.extend([0; 11]); // padding of a record
                let packet = Packet::parse(&bytes).unwrap();
                let expected = Packet {
                    version,
                    source: source(version),
                    destination: destination(version),
                    protocol,
                    transport,
                    len,
                    fragment: None,
                    hop_limit: 61,
                };
                assert_eq!(packet, expected);
                assert_eq!(packet.ports(&bytes), Some((SOURCE_PORT, DESTINATION_PORT)));
                assert_eq!(packet.icmp_type_code(&bytes), None);
                assert_eq!(packet.embedded(&bytes), None);
            }
        }
    }
}

#[test]
fn every_truncation_is_refused() {
    for version in BOTH {
        for shape in SHAPES {
            let bytes = tcp(ip(version, shape), tcp_header(1), b"hello");
            for len in 0..bytes.len() {
                assert_eq!(Packet::parse(&bytes[..len]), None, "{len} bytes");
            }
        }
    }
}

#[test]
fn transport_headers_that_are_cut_off_are_refused() {
    for version in BOTH {
        let icmp = if version == Version::V4 { protocol::ICMP } else { protocol::ICMPV6 };
        let shortest =
            [(protocol::TCP, 20), (protocol::UDP, 8), (protocol::SCTP, 12), (protocol::DCCP, 12), (icmp, 8)];
        for (protocol, fixed) in shortest {
            assert!(Packet::parse(&raw(ip(version, Shape::Plain), protocol, &payload(fixed))).is_some());
            assert_eq!(Packet::parse(&raw(ip(version, Shape::Plain), protocol, &payload(fixed - 1))), None);
            let tiny = raw(fragment_headers(version, 0, true), protocol, &payload(fixed - 1));
            assert_eq!(Packet::parse(&tiny), None, "a tiny first fragment hides ports or flags");
            let later = raw(fragment_headers(version, 24, false), protocol, &payload(1));
            assert!(Packet::parse(&later).is_some());
        }
        assert!(
            Packet::parse(&raw(ip(version, Shape::Plain), 50, &[])).is_some(),
            "any other protocol may be empty"
        );
    }
}

#[test]
fn fragments_have_ports_in_the_first_only() {
    for version in BOTH {
        let id = if version == Version::V4 { 0xfffe } else { 0x1234_5678 };
        let first = udp(fragment_headers(version, 0, true), &payload(64));
        let packet = Packet::parse(&first).unwrap();
        assert_eq!(packet.fragment, Some(Fragment { id, offset: 0, more: true }));
        assert_eq!(packet.ports(&first), Some((SOURCE_PORT, DESTINATION_PORT)));
        for more in [true, false] {
            let later = raw(fragment_headers(version, 72, more), protocol::UDP, &payload(64));
            let packet = Packet::parse(&later).unwrap();
            assert_eq!(packet.fragment, Some(Fragment { id, offset: 72, more }));
            assert_eq!((packet.ports(&later), packet.protocol), (None, protocol::UDP));
            assert!(packet.is_later_fragment());
        }
    }
}

#[test]
fn last_possible_fragment_offset_is_kept() {
    for version in BOTH {
        let bytes = raw(fragment_headers(version, 0xfff8, false), protocol::UDP, &payload(7));
        assert_eq!(Packet::parse(&bytes).unwrap().fragment.unwrap().offset, 0xfff8);
    }
}

#[test]
fn atomic_fragment_is_a_whole_packet() {
    let bytes = udp(fragment_headers(Version::V6, 0, false), b"whole");
    let packet = Packet::parse(&bytes).unwrap();
    assert_eq!((packet.fragment, packet.transport), (None, 48));
}

#[test]
fn chain_of_extension_headers_is_bounded() {
    let chain = |n: usize| {
        let mut headers = Vec::new();
        for i in 0..n {
            headers.extend([if i + 1 == n { protocol::UDP } else { 60 }, 0, 1, 4, 0, 0, 0, 0]);
        }
        headers.extend(payload(8));
        raw(ip(Version::V6, Shape::Plain), 60, &headers)
    };
    assert_eq!(Packet::parse(&chain(8)).unwrap().transport, 40 + 64);
    assert_eq!(Packet::parse(&chain(9)), None);
}

#[test]
fn extension_headers_that_lie_about_their_length_are_refused() {
    let starting_with = |kind, headers: &[u8]| {
        let mut bytes = raw(ip(Version::V6, Shape::Plain), 253, headers);
        bytes[6] = kind;
        Packet::parse(&bytes).map(|packet| packet.transport)
    };
    for kind in [0, 43, 51, 60] {
        assert_eq!(starting_with(kind, &[253, 0, 0, 0, 0, 0, 0, 0]), Some(48));
        assert_eq!(starting_with(kind, &[253, 1, 0, 0, 0, 0, 0, 0]), None);
        assert_eq!(starting_with(kind, &[253]), None);
    }
    assert_eq!(starting_with(51, &[253, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]), Some(52));
    assert_eq!(starting_with(44, &[253, 0, 0, 0]), None);
}

#[test]
fn ipv4_headers_that_contradict_themselves_are_refused() {
    let good = udp(ip(Version::V4, Shape::Plain), b"1234");
    let with = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        Packet::parse(&bytes)
    };
    assert!(with(1, 0).is_some());
    assert_eq!(with(0, 0x44), None, "header length below 20");
    assert_eq!(with(0, 0x4f), None, "header length beyond the packet");
    assert_eq!(with(0, 0x55), None, "version 5");
    assert_eq!(with(3, 19), None, "total length below the header's");
    assert_eq!(with(3, 33), None, "total length beyond the buffer");
}

#[test]
fn tcp_flags_and_header_length_are_read() {
    for version in BOTH {
        let mut header = tcp_header(1);
        header.syn = true;
        header.set_options_raw(&[2, 4, 5, 0xb4]).unwrap();
        let mut bytes = tcp(ip(version, Shape::Extended), header, b"");
        let packet = Packet::parse(&bytes).unwrap();
        assert_eq!(packet.tcp_flags(&bytes), Some(0x12));
        assert_eq!(packet.tcp_header_len(&bytes), Some(24));
        for offset in [0x40, 0x70] {
            bytes[packet.transport + 12] = offset;
            assert_eq!(packet.tcp_header_len(&bytes), None, "below 20, or beyond the packet");
        }
    }
}

#[test]
fn icmp_of_each_family_is_read() {
    for version in BOTH {
        let bytes = echo(ip(version, Shape::Extended), 0xbeef, b"ping");
        let packet = Packet::parse(&bytes).unwrap();
        assert_eq!(
            packet.icmp_type_code(&bytes),
            Some(if version == Version::V4 { (8, 0) } else { (128, 0) })
        );
        assert!(!packet.is_icmp_error(&bytes));
        assert_eq!(packet.ports(&bytes), None);
    }
    let crossed = raw(ip(Version::V6, Shape::Plain), protocol::ICMP, &[3; 16]);
    assert!(!Packet::parse(&crossed).unwrap().is_icmp_error(&crossed), "ICMP for IPv4 inside IPv6 is opaque");
}

#[test]
fn quoted_packet_may_be_cut_off_after_eight_bytes_of_transport() {
    for version in BOTH {
        let whole = tcp(ip(version, Shape::Extended), tcp_header(0x0a0b_0c0d), &payload(900));
        let transport = Packet::parse(&whole).unwrap().transport;
        for len in transport + 8..whole.len() {
            let packet = Packet::parse_embedded(&whole[..len]).unwrap();
            assert_eq!((packet.len, packet.ports(&whole)), (len, Some((SOURCE_PORT, DESTINATION_PORT))));
        }
        for len in 0..transport + 8 {
            assert_eq!(Packet::parse_embedded(&whole[..len]), None);
        }
    }
}
