//! Bytes that nobody well-behaved would send: nothing panics, whatever they are.

use proptest::prelude::*;

use super::*;
use crate::wire::checksum::{complete_partial, sum, transport_checksum_ok};
use crate::wire::coalesce::Coalescer;
use crate::wire::icmp::{IcmpError, icmp_error};
use crate::wire::rewrite::{Rewrite, apply, apply_embedded};
use crate::wire::segment::Cut;
use crate::wire::tcp_reset::tcp_reset;

/// Valid packets of many kinds, to be damaged.
fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for version in BOTH {
        for shape in SHAPES {
            let mut error = Vec::new();
            assert!(icmp_error(IcmpError::TooBig(1_360), &udp(ip(version, shape), &payload(90)), &mut error));
            seeds.extend([
                tcp(ip(version, shape), tcp_header(5), &payload(200)),
                udp(ip(version, shape), &payload(90)),
                sctp(ip(version, shape), &payload(90)),
                udp_lite(ip(version, shape), 8, &payload(90)),
                echo(ip(version, shape), 4, &payload(90)),
                error,
            ]);
        }
        seeds.push(udp(fragment_headers(version, 0, true), &payload(64)));
        seeds.push(raw(fragment_headers(version, 64, true), protocol::UDP, &payload(64)));
    }
    seeds
}

/// A seed with some bytes overwritten, cut off somewhere; or nothing but noise.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let damage = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6);
    let damaged = (prop::sample::select(seeds()), damage, any::<prop::sample::Index>(), any::<bool>())
        .prop_map(|(mut bytes, damage, cut, whole)| {
            for (at, value) in damage {
                // Headers are where it hurts.
                let at = at.index(bytes.len().min(96));
                bytes[at] = value;
            }
            if !whole {
                bytes.truncate(cut.index(bytes.len()));
            }
            bytes
        });
    let noise =
        (prop::collection::vec(any::<u8>(), 0..200), prop::sample::select(vec![0x45, 0x4f, 0x60, 0x6f, 0]))
            .prop_map(|(mut bytes, first)| {
                if let Some(byte) = bytes.first_mut() {
                    *byte = first;
                }
                bytes
            });
    prop_oneof![3 => damaged, 1 => noise]
}

fn touch(bytes: &[u8], packet: &Packet, vnet: &VnetHeader) {
    let _ = (packet.ports(bytes), packet.tcp_flags(bytes), packet.tcp_header_len(bytes));
    let _ = (packet.icmp_type_code(bytes), packet.is_icmp_error(bytes));
    let _ = (transport_checksum_ok(bytes, packet), sum(bytes));
    if let Some(quote) = packet.embedded(bytes).and_then(|range| bytes.get(range)) {
        let _ = Packet::parse_embedded(quote).map(|embedded| embedded.ports(quote));
    }
    for version in BOTH {
        let side = Some((source(version), Some(0xffff)));
        let rewrite = Rewrite { source: side, destination: side };
        for partial in [false, true] {
            let mut copy = bytes.to_vec();
            apply(&mut copy, packet, &rewrite, partial);
            apply_embedded(&mut copy, packet, &rewrite, partial);
            assert_eq!(copy.len(), bytes.len());
        }
    }
    let mut copy = bytes.to_vec();
    if let Some(mut cut) = Cut::new(&mut copy, packet, vnet) {
        let ((each, last), count) = (cut.lengths(), cut.count());
        for index in 1..=count {
            assert_eq!(cut.next_packet().unwrap().len(), if index == count { last } else { each });
        }
        assert_eq!(cut.next_packet(), None);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_024))]

    #[test]
    fn nothing_panics_on_damaged_packets(bytes in bytes(), other in bytes(), vnet: [u8; 10], start: u16, offset: u16) {
        let vnet = VnetHeader::parse(&vnet).unwrap_or(VnetHeader { partial_checksum: Some((start, offset)), ..VnetHeader::PLAIN });
        for parsed in [Packet::parse(&bytes), Packet::parse_embedded(&bytes)].into_iter().flatten() {
            prop_assert!(parsed.transport <= parsed.len && parsed.len <= bytes.len());
            touch(&bytes, &parsed, &vnet);
            touch(&other, &parsed, &vnet); // even with bytes it was not parsed from
            for gso in [Gso::Tcp4(100), Gso::Tcp6(100), Gso::Udp(100)] {
                let at = if matches!(gso, Gso::Udp(_)) { 6 } else { 16 };
                let start = u16::try_from(parsed.transport).unwrap();
                touch(&bytes, &parsed, &VnetHeader { gso, partial_checksum: Some((start, at)), ..vnet });
            }
        }
        let mut out = Vec::new();
        let _ = icmp_error(IcmpError::AdminProhibited, &bytes, &mut out) || tcp_reset(&bytes, &mut out);
        let _ = complete_partial(&mut bytes.clone(), start.into(), offset.into());
        let _ = Packet::parse(&out);
    }

    #[test]
    fn coalescer_gives_back_every_damaged_packet_untouched_or_merged(all in prop::collection::vec(bytes(), 0..8)) {
        let mut buffer = all.concat();
        let mut coalescer = Coalescer::new();
        let mut start = 0;
        for bytes in &all {
            coalescer.push(&buffer, start..start + bytes.len());
            start += bytes.len();
        }
        coalescer.push(&buffer, start..start + 1);
        coalescer.finish(&mut buffer);
        let parts: usize = coalescer.trains().map(|train| train.parts.len()).sum();
        prop_assert_eq!(parts, all.len());
    }
}
