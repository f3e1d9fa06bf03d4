//! Sums, updates and verification, against a naive reference and at the ends of the number range.

use proptest::prelude::*;

use super::*;
use crate::wire::checksum::{
    add, complete_partial, pseudo_header, subtract, sum, transport_checksum_ok, update, update_udp,
};

proptest! {
    #[test]
    fn fast_sum_equals_the_naive_one(bytes in prop::collection::vec(any::<u8>(), 0..3_000), skip in 0..9_usize) {
        let bytes = bytes.get(skip..).unwrap_or_default();
        prop_assert_eq!(sum(bytes), naive_sum(bytes));
    }

    #[test]
    fn incremental_update_equals_recomputing(mut words in prop::collection::vec(any::<u16>(), 1..40), new: u16, at: prop::sample::Index) {
        let at = at.index(words.len());
        words.push(1); // never all zero, as no packet is
        let before = !naive_sum(&words.iter().flat_map(|w| w.to_be_bytes()).collect::<Vec<_>>());
        let change = subtract(new, words[at]);
        words[at] = new;
        let after = !naive_sum(&words.iter().flat_map(|w| w.to_be_bytes()).collect::<Vec<_>>());
        prop_assert_eq!(update(before, change), after);
    }
}

#[test]
fn sum_folds_every_carry_of_a_super_packet() {
    for len in [0, 1, 2, 3, 4, 31, 32, 33, 63, 64, 65, 65_535, 65_536] {
        for byte in [0, 1, 0x80, 0xff] {
            let bytes = vec![byte; len];
            assert_eq!(sum(&bytes), naive_sum(&bytes), "{len} bytes of {byte:#x}");
        }
    }
}

/// RFC 1624 §4: the example that equation 2 of RFC 1141 gets wrong.
#[test]
fn update_is_right_where_the_result_is_zero() {
    assert_eq!(update(0xdd2f, subtract(0x3285, 0x5555)), 0x0000);
    assert_eq!(update_udp(0xdd2f, subtract(0x3285, 0x5555)), 0xffff);
    assert_eq!(add(0xffff, 0), 0xffff);
    assert_eq!(add(0xffff, 0xffff), 0xffff);
    assert_eq!(add(0, 0), 0);
}

#[test]
fn pseudo_header_of_both_families_equals_the_naive_one() {
    for version in BOTH {
        let bytes = tcp(ip(version, Shape::Plain), tcp_header(1), &payload(61_000));
        let packet = Packet::parse(&bytes).unwrap();
        let fast = pseudo_header(&bytes[version.addresses()], packet.protocol, packet.len - packet.transport);
        assert_eq!(fast, naive_sum(&naive_pseudo(&bytes, &packet)));
    }
    assert_eq!(pseudo_header(&[0; 32], 0, 0x0001_0002), 3, "lengths above 16 bits count whole");
}

#[test]
fn checksum_of_every_protocol_is_verified() {
    for version in BOTH {
        for shape in SHAPES {
            let make = |n: usize| {
                let mut dccp =
                    [SOURCE_PORT, DESTINATION_PORT, 0x0400, 0, 0, 0, 0, 0].map(u16::to_be_bytes).concat();
                dccp.extend(payload(n));
                let mut dccp = raw(ip(version, shape), protocol::DCCP, &dccp);
                let parsed = Packet::parse(&dccp).unwrap();
                let covered = [naive_pseudo(&dccp, &parsed), dccp[parsed.transport..].to_vec()].concat();
                write16(&mut dccp, parsed.transport + 6, !naive_sum(&covered)).unwrap();
                [
                    tcp(ip(version, shape), tcp_header(9), &payload(n)),
                    udp(ip(version, shape), &payload(n)),
                    echo(ip(version, shape), 5, &payload(n)),
                    sctp(ip(version, shape), &payload(n)),
                    udp_lite(ip(version, shape), 0, &payload(n)),
                    dccp,
                ]
            };
            for n in [0, 1, 2, 3, 777, 1_400] {
                for mut bytes in make(n) {
                    let packet = Packet::parse(&bytes).unwrap();
                    assert!(transport_checksum_ok(&bytes, &packet), "{packet:?}");
                    for at in [packet.transport, packet.transport + 2, bytes.len() - 1] {
                        bytes[at] ^= 4;
                        assert!(!transport_checksum_ok(&bytes, &packet), "byte {at} of {packet:?}");
                        bytes[at] ^= 4;
                    }
                }
            }
        }
    }
}

#[test]
fn udp_lite_covers_what_it_says() {
    for version in BOTH {
        let mut bytes = udp_lite(ip(version, Shape::Plain), 12, &payload(100));
        let packet = Packet::parse(&bytes).unwrap();
        assert!(transport_checksum_ok(&bytes, &packet));
        *bytes.last_mut().unwrap() ^= 1;
        assert!(transport_checksum_ok(&bytes, &packet), "not covered");
        bytes[packet.transport + 11] ^= 1;
        assert!(!transport_checksum_ok(&bytes, &packet), "covered");
        for coverage in [7, 109] {
            write16(&mut bytes, packet.transport + 4, coverage).unwrap();
            assert!(!transport_checksum_ok(&bytes, &packet), "coverage {coverage}");
        }
    }
}

#[test]
fn udp_without_checksum_is_right_in_ipv4_only() {
    for version in BOTH {
        let mut bytes = udp(ip(version, Shape::Plain), b"x");
        let packet = Packet::parse(&bytes).unwrap();
        write16(&mut bytes, packet.transport + 6, 0).unwrap();
        assert_eq!(transport_checksum_ok(&bytes, &packet), version == Version::V4);
    }
}

#[test]
fn fragments_are_never_confirmed() {
    for version in BOTH {
        let bytes = udp(fragment_headers(version, 0, true), &payload(64));
        let packet = Packet::parse(&bytes).unwrap();
        assert!(packet.fragment.is_some());
        assert!(!transport_checksum_ok(&bytes, &packet));
    }
}

#[test]
fn partial_checksum_is_completed_to_what_the_sender_would_have_computed() {
    for version in BOTH {
        for n in [0, 1, 2, 1_399] {
            let whole = [
                tcp(ip(version, Shape::Extended), tcp_header(9), &payload(n)),
                udp(ip(version, Shape::Plain), &payload(n)),
            ];
            for expected in whole {
                let mut bytes = expected.clone();
                let (start, offset) = make_partial(&mut bytes, None).partial_checksum.unwrap();
                complete_partial(&mut bytes, start.into(), offset.into()).unwrap();
                assert_eq!(bytes, expected);
            }
        }
    }
}

#[test]
fn completed_checksum_of_zero_becomes_all_ones() {
    let mut bytes = udp(ip(Version::V4, Shape::Plain), &[0, 0]);
    let transport = Packet::parse(&bytes).unwrap().transport;
    // The payload that makes the sum 0xffff is the checksum that an empty one would have had.
    let field = read16(&bytes, transport + 6).unwrap();
    write16(&mut bytes, transport + 8, field).unwrap();
    make_partial(&mut bytes, None);
    complete_partial(&mut bytes, transport, 6).unwrap();
    assert_eq!(read16(&bytes, transport + 6), Some(0xffff));
    assert!(naive_ok(&bytes));
}

#[test]
fn partial_checksum_outside_the_packet_changes_nothing() {
    let mut bytes = payload(30);
    for (start, offset) in [(31, 0), (30, 0), (0, 29), (20, 9), (usize::MAX, 0), (0, usize::MAX)] {
        assert_eq!(complete_partial(&mut bytes, start, offset), None);
    }
    assert_eq!(bytes, payload(30));
}
