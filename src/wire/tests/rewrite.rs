//! NAT there and back, and what must stay wrong or absent.

use proptest::prelude::*;

use super::*;
use crate::wire::checksum::{complete_partial, transport_checksum_ok};
use crate::wire::icmp::{IcmpError, icmp_error};
use crate::wire::rewrite::{Rewrite, apply, apply_embedded};

fn other(version: Version) -> IpAddr {
    match version {
        Version::V4 => "172.30.255.254".parse().unwrap(),
        Version::V6 => "2001:db8:ffff::fffe".parse().unwrap(),
    }
}

fn rewrite(bytes: &mut [u8], rewrite: &Rewrite, partial: bool) {
    let packet = Packet::parse(bytes).unwrap();
    apply(bytes, &packet, rewrite, partial);
}

fn to(address: IpAddr, port: u16) -> Rewrite {
    Rewrite { source: None, destination: Some((address, Some(port))) }
}

fn from(address: IpAddr, port: u16) -> Rewrite {
    Rewrite { source: Some((address, Some(port))), destination: None }
}

/// One packet of every protocol whose checksum NAT has to keep.
fn packets(version: Version, shape: Shape, data: &[u8]) -> Vec<Vec<u8>> {
    vec![
        tcp(ip(version, shape), tcp_header(9), data),
        udp(ip(version, shape), data),
        udp_lite(ip(version, shape), 8, data),
        sctp(ip(version, shape), data),
        echo(ip(version, shape), 5, data),
    ]
}

fn address(version: Version) -> impl Strategy<Value = IpAddr> {
    any::<[u8; 16]>().prop_map(move |octets| match version {
        Version::V4 => IpAddr::from([octets[0], octets[1], octets[2], octets[3]]),
        Version::V6 => IpAddr::from(octets),
    })
}

fn version_and_addresses() -> impl Strategy<Value = (Version, IpAddr, IpAddr)> {
    any::<bool>().prop_flat_map(|v6| {
        let version = if v6 { Version::V6 } else { Version::V4 };
        (Just(version), address(version), address(version))
    })
}

proptest! {
    #[test]
    fn rewriting_there_and_back_gives_the_same_bytes(
        (version, s, d) in version_and_addresses(), ports: (u16, u16), extended: bool,
        data in prop::collection::vec(any::<u8>(), 0..80),
    ) {
        let shape = if extended { Shape::Extended } else { Shape::Plain };
        let there = Rewrite { source: Some((s, Some(ports.0))), destination: Some((d, Some(ports.1))) };
        let back = Rewrite {
            source: Some((source(version), Some(SOURCE_PORT))),
            destination: Some((destination(version), Some(DESTINATION_PORT))),
        };
        for original in packets(version, shape, &data) {
            let mut bytes = original.clone();
            rewrite(&mut bytes, &there, false);
            let packet = Packet::parse(&bytes).unwrap();
            prop_assert_eq!((packet.source, packet.destination), (s, d));
            prop_assert!(packet.ports(&bytes).is_none_or(|p| p == ports));
            prop_assert!(transport_checksum_ok(&bytes, &packet), "{:?}", packet);
            if version == Version::V4 {
                prop_assert_eq!(naive_sum(&bytes[..packet.transport]), 0xffff);
            }
            rewrite(&mut bytes, &back, false);
            prop_assert_eq!(&bytes, &original);
        }
    }

    #[test]
    fn wrong_checksum_stays_wrong(
        (version, s, d) in version_and_addresses(), ports: (u16, u16), damage in 1..=u8::MAX, at: prop::sample::Index,
        data in prop::collection::vec(any::<u8>(), 1..80),
    ) {
        let there = Rewrite { source: Some((s, Some(ports.0))), destination: Some((d, Some(ports.1))) };
        for mut bytes in packets(version, Shape::Plain, &data) {
            let packet = Packet::parse(&bytes).unwrap();
            if packet.protocol == protocol::UDP_LITE {
                continue; // most of its data is not covered
            }
            let at = packet.transport + 8 + at.index(bytes.len() - packet.transport - 8);
            bytes[at] ^= damage;
            prop_assume!(!transport_checksum_ok(&bytes, &packet));
            rewrite(&mut bytes, &there, false);
            let packet = Packet::parse(&bytes).unwrap();
            prop_assert!(!transport_checksum_ok(&bytes, &packet), "{:?}", packet);
        }
    }

    #[test]
    fn partial_checksum_follows_the_addresses((version, s, d) in version_and_addresses(), ports: (u16, u16)) {
        let there = Rewrite { source: Some((s, Some(ports.0))), destination: Some((d, Some(ports.1))) };
        for mut bytes in [tcp(ip(version, Shape::Extended), tcp_header(9), b"abc"), udp(ip(version, Shape::Plain), b"abc")] {
            let (start, offset) = make_partial(&mut bytes, None).partial_checksum.unwrap();
            rewrite(&mut bytes, &there, true);
            complete_partial(&mut bytes, start.into(), offset.into()).unwrap();
            prop_assert!(naive_ok(&bytes));
        }
    }

    #[test]
    fn quoted_packet_is_rewritten_and_the_error_stays_right(
        (version, s, d) in version_and_addresses(), ports: (u16, u16), extended: bool, damaged: bool, n in 0..1_200_usize,
    ) {
        let shape = if extended { Shape::Extended } else { Shape::Plain };
        for quoted in packets(version, shape, &payload(n)) {
            let mut error = Vec::new();
            prop_assert!(icmp_error(IcmpError::HostUnreachable, &quoted, &mut error));
            if damaged {
                *error.last_mut().unwrap() ^= 0x40;
            }
            let packet = Packet::parse(&error).unwrap();
            let there = Rewrite { source: Some((s, Some(ports.0))), destination: Some((d, Some(ports.1))) };
            apply_embedded(&mut error, &packet, &there, false);
            prop_assert_eq!(transport_checksum_ok(&error, &packet), !damaged);
            let quote = &error[packet.embedded(&error).unwrap()];
            let embedded = Packet::parse_embedded(quote).unwrap();
            prop_assert_eq!((embedded.source, embedded.destination), (s, d));
            prop_assert!(embedded.ports(quote).is_none_or(|p| p == ports));
            let quoted_whole = Packet::parse(&quoted).unwrap().len == quote.len();
            if quoted_whole && !damaged && embedded.protocol != protocol::SCTP {
                prop_assert!(transport_checksum_ok(quote, &embedded), "{:?}", embedded);
            }
        }
    }
}

#[test]
fn udp_without_checksum_stays_without() {
    for version in BOTH {
        let mut bytes = udp(ip(version, Shape::Plain), b"data");
        let at = Packet::parse(&bytes).unwrap().transport + 6;
        write16(&mut bytes, at, 0).unwrap();
        rewrite(&mut bytes, &to(other(version), 53), false);
        assert_eq!(read16(&bytes, at), Some(0));
    }
}

#[test]
fn every_port_keeps_the_checksum_right() {
    for version in BOTH {
        for mut bytes in
            [tcp(ip(version, Shape::Plain), tcp_header(1), b""), udp(ip(version, Shape::Plain), b"")]
        {
            let packet = Packet::parse(&bytes).unwrap();
            let at = packet.transport + packet.pseudo_checksum_offset().unwrap();
            let mut ends = 0;
            for port in 0..=u16::MAX {
                rewrite(&mut bytes, &from(source(version), port), false);
                assert!(transport_checksum_ok(&bytes, &packet), "port {port}");
                let field = read16(&bytes, at).unwrap();
                assert!(packet.protocol == protocol::TCP || field != 0, "zero would mean none");
                ends += usize::from(field == 0 || field == 0xffff);
            }
            assert!(ends > 0, "the walk met 0x0000 or 0xffff");
        }
    }
}

#[test]
fn fragments_change_ports_in_the_first_only() {
    for version in BOTH {
        let mut first = udp(fragment_headers(version, 0, true), &payload(64));
        let mut later = raw(fragment_headers(version, 72, false), protocol::UDP, &payload(64));
        rewrite(&mut first, &to(other(version), 53), false);
        rewrite(&mut later, &to(other(version), 53), false);
        let packet = Packet::parse(&first).unwrap();
        assert_eq!(packet.ports(&first), Some((SOURCE_PORT, 53)));
        // etherparse summed the fragment as if it were the whole datagram: the update keeps exactly that.
        assert!(naive_ok(&first));
        let packet = Packet::parse(&later).unwrap();
        assert_eq!(packet.destination, other(version));
        assert_eq!(later[packet.transport..], payload(64), "data is not mistaken for ports");
    }
}

#[test]
fn address_of_the_other_family_is_ignored() {
    for (version, wrong) in [(Version::V4, Version::V6), (Version::V6, Version::V4)] {
        let original = udp(ip(version, Shape::Plain), b"data");
        let mut bytes = original.clone();
        rewrite(&mut bytes, &to(other(wrong), 53), false);
        assert_eq!(bytes, original);
    }
}

#[test]
fn bytes_after_the_packet_are_not_touched() {
    let mut bytes = sctp(ip(Version::V4, Shape::Plain), b"chunk");
    bytes.extend([0x77; 11]);
    rewrite(&mut bytes, &to(other(Version::V4), 1), false);
    assert!(bytes.ends_with(&[0x77; 11]));
    assert!(transport_checksum_ok(&bytes, &Packet::parse(&bytes).unwrap()));
}

#[test]
fn quote_cut_off_after_the_ports_is_rewritten() {
    let quoted = tcp(ip(Version::V4, Shape::Plain), tcp_header(1), b"data");
    let mut message = vec![3, 1, 0, 0, 0, 0, 0, 0];
    message.extend(&quoted[..28]);
    let sum = !naive_sum(&message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut error = raw(ip(Version::V4, Shape::Plain), protocol::ICMP, &message);
    let packet = Packet::parse(&error).unwrap();
    apply_embedded(&mut error, &packet, &to(other(Version::V4), 53), false);
    assert!(transport_checksum_ok(&error, &packet));
    let quote = &error[packet.embedded(&error).unwrap()];
    let embedded = Packet::parse_embedded(quote).unwrap();
    assert_eq!((embedded.destination, embedded.ports(quote)), (other(Version::V4), Some((SOURCE_PORT, 53))));
    assert_eq!(naive_sum(&quote[..20]), 0xffff);
}

#[test]
fn a_rewrite_of_nothing_changes_no_byte() {
    for version in BOTH {
        let whole = tcp(ip(version, Shape::Extended), tcp_header(1), &payload(100));
        let packet = Packet::parse(&whole).unwrap();
        let mut bytes = whole.clone();
        apply(&mut bytes, &packet, &Rewrite::NONE, false);
        assert_eq!(bytes, whole);
    }
}
