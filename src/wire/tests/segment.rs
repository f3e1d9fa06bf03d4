//! Cut packets against those of a sender without offloads.

use proptest::prelude::*;

use super::*;
use crate::wire::segment::Cut;

/// The packets that a burst is cut into.
fn run(bytes: &[u8], vnet: &VnetHeader) -> Option<Vec<Vec<u8>>> {
    let packet = Packet::parse(bytes).unwrap();
    let mut bytes = bytes.to_vec();
    let mut cut = Cut::new(&mut bytes, &packet, vnet)?;
    let packets: Vec<Vec<u8>> = std::iter::from_fn(|| cut.next_packet().map(<[u8]>::to_vec)).collect();
    assert_eq!(packets.len(), cut.count());
    Some(packets)
}

fn with_id(headers: IpHeaders, index: usize) -> IpHeaders {
    match headers {
        IpHeaders::Ipv4(mut header, extensions) => {
            header.identification = header.identification.wrapping_add(u16::try_from(index).unwrap());
            IpHeaders::Ipv4(header, extensions)
        }
        other => other,
    }
}

/// What a sender without offloads would have sent.
fn reference(version: Version, shape: Shape, header: &TcpHeader, data: &[u8], size: usize) -> Vec<Vec<u8>> {
    let count = data.len().div_ceil(size);
    data.chunks(size)
        .enumerate()
        .map(|(i, chunk)| {
            let mut header = header.clone();
            header.sequence_number = header.sequence_number.wrapping_add(u32::try_from(i * size).unwrap());
            header.fin &= i + 1 == count;
            header.psh &= i + 1 == count;
            header.cwr &= i == 0;
            tcp(with_id(ip(version, shape), i), header, chunk)
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn tcp_segments_equal_those_of_a_sender_without_offloads(
        v6: bool, extended: bool, flags in 0..8_u8, options in 0..11_usize,
        sequence in prop_oneof![any::<u32>(), u32::MAX - 5_000..=u32::MAX],
        data in prop::collection::vec(any::<u8>(), 1..9_000), size in 50..1_500_u16,
    ) {
        let version = if v6 { Version::V6 } else { Version::V4 };
        let shape = if extended { Shape::Extended } else { Shape::Plain };
        let mut header = tcp_header(sequence);
        (header.fin, header.psh, header.cwr) = (flags & 1 != 0, flags & 2 != 0, flags & 4 != 0);
        header.set_options_raw(&vec![1; options * 4]).unwrap();
        let mut bytes = tcp(ip(version, shape), header.clone(), &data);
        let vnet = make_partial(&mut bytes, Some(size));
        let vnet = VnetHeader { ecn: header.cwr, ..vnet };
        bytes.extend([0xee; 5]); // what follows the packet is not part of it
        prop_assert_eq!(run(&bytes, &vnet).unwrap(), reference(version, shape, &header, &data, size.into()));
    }

    #[test]
    fn datagrams_equal_those_of_a_sender_without_offloads(
        v6: bool, data in prop::collection::vec(any::<u8>(), 1..9_000), size in 20..1_500_u16,
    ) {
        let version = if v6 { Version::V6 } else { Version::V4 };
        let mut bytes = udp(ip(version, Shape::Plain), &data);
        let vnet = make_partial(&mut bytes, Some(size));
        let expected: Vec<_> = data.chunks(size.into()).enumerate()
            .map(|(i, chunk)| udp(with_id(ip(version, Shape::Plain), i), chunk)).collect();
        prop_assert_eq!(run(&bytes, &vnet).unwrap(), expected);
    }
}

#[test]
fn all_packets_but_the_last_are_equally_long() {
    let mut bytes = tcp(ip(Version::V4, Shape::Plain), tcp_header(1), &payload(3 * 1_380 + 7));
    let vnet = make_partial(&mut bytes, Some(1_380));
    let headers = bytes.len() - (3 * 1_380 + 7);
    let packet = Packet::parse(&bytes).unwrap();
    let cut = Cut::new(&mut bytes, &packet, &vnet).unwrap();
    assert_eq!((cut.lengths(), cut.count()), ((headers + 1_380, headers + 7), 4));
}

#[test]
fn ordinary_packet_is_left_untouched() {
    for version in BOTH {
        let mut bytes = tcp(ip(version, Shape::Extended), tcp_header(1), &payload(777));
        let damaged = bytes.len() - 1;
        bytes[damaged] ^= 1; // a wrong checksum stays wrong
        assert_eq!(run(&bytes, &VnetHeader::PLAIN).unwrap(), vec![bytes]);
    }
}

#[test]
fn partial_checksum_of_one_packet_is_completed() {
    for version in BOTH {
        for whole in
            [tcp(ip(version, Shape::Extended), tcp_header(1), b"odd"), udp(ip(version, Shape::Plain), b"")]
        {
            let mut bytes = whole.clone();
            let vnet = make_partial(&mut bytes, None);
            assert_eq!(run(&bytes, &vnet).unwrap(), vec![whole.clone()]);
            let vnet = make_partial(&mut bytes, Some(1_380));
            assert_eq!(run(&bytes, &vnet).unwrap(), vec![whole], "a super-packet of one segment");
        }
    }
}

#[test]
fn datagram_whose_checksum_comes_to_zero_carries_all_ones() {
    for version in BOTH {
        let probe = udp(ip(version, Shape::Plain), &[0, 0]);
        let transport = Packet::parse(&probe).unwrap().transport;
        let magic = read16(&probe, transport + 6).unwrap().to_be_bytes();
        let mut bytes = udp(ip(version, Shape::Plain), &[magic, magic].concat());
        let vnet = make_partial(&mut bytes, Some(2));
        for segment in run(&bytes, &vnet).unwrap() {
            assert_eq!(read16(&segment, transport + 6), Some(0xffff));
            assert!(naive_ok(&segment));
        }
    }
}

#[test]
fn wrong_partial_state_stays_wrong() {
    for version in BOTH {
        let mut bytes = tcp(ip(version, Shape::Plain), tcp_header(1), &payload(3_000));
        let vnet = make_partial(&mut bytes, Some(1_000));
        let at = Packet::parse(&bytes).unwrap().transport + 16;
        bytes[at] ^= 0x10;
        assert!(run(&bytes, &vnet).unwrap().iter().all(|segment| !naive_ok(segment)));
    }
}

#[test]
fn header_length_hint_is_not_trusted() {
    let mut bytes = tcp(ip(Version::V4, Shape::Plain), tcp_header(1), &payload(3_000));
    let vnet = VnetHeader { header_len: 1_500, ..make_partial(&mut bytes, Some(1_000)) };
    let expected = reference(Version::V4, Shape::Plain, &tcp_header(1), &payload(3_000), 1_000);
    assert_eq!(run(&bytes, &vnet).unwrap(), expected);
}

#[test]
fn offload_state_that_contradicts_the_packet_is_refused() {
    let mut segment = tcp(ip(Version::V4, Shape::Plain), tcp_header(1), &payload(3_000));
    let vnet = make_partial(&mut segment, Some(1_000));
    let mut datagram = udp(ip(Version::V6, Shape::Plain), &payload(3_000));
    let datagram_vnet = make_partial(&mut datagram, Some(1_000));
    let refused = [
        (&segment, VnetHeader { gso: Gso::Tcp6(1_000), ..vnet }, "other family"),
        (&segment, VnetHeader { gso: Gso::Udp(1_000), ..vnet }, "other protocol"),
        (&segment, VnetHeader { gso: Gso::Tcp4(0), ..vnet }, "segments of nothing"),
        (&segment, VnetHeader { gso: Gso::Tcp4(5), ..vnet }, "600 segments"),
        (&segment, VnetHeader { partial_checksum: None, ..vnet }, "complete checksum"),
        (&segment, VnetHeader { partial_checksum: Some((20, 6)), ..vnet }, "field elsewhere"),
        (&segment, VnetHeader { partial_checksum: Some((24, 16)), ..vnet }, "start elsewhere"),
        (
            &segment,
            VnetHeader { gso: Gso::None, partial_checksum: Some((3_039, 0)), ..vnet },
            "field cut off",
        ),
        (&datagram, VnetHeader { gso: Gso::Tcp6(1_000), ..datagram_vnet }, "datagram as TCP"),
    ];
    for (bytes, vnet, why) in refused {
        assert_eq!(run(bytes, &vnet), None, "{why}");
    }
    let bad_offset = {
        let mut bytes = segment.clone();
        bytes[32] = 0x40;
        bytes
    };
    assert_eq!(run(&bad_offset, &vnet), None, "TCP header below 20 bytes");
    assert_eq!(run(&segment, &VnetHeader { gso: Gso::Tcp4(6), ..vnet }).unwrap().len(), 500);
}

#[test]
fn fragment_is_never_cut() {
    for version in BOTH {
        let mut bytes = tcp(fragment_headers(version, 0, true), tcp_header(1), &payload(3_000));
        let vnet = make_partial(&mut bytes, Some(1_000));
        assert_eq!(run(&bytes, &vnet), None);
    }
}
