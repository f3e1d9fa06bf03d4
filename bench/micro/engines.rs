//! Two engines back to back, a flow through a VIP: capture, flow table, seal; open, replay window, injection rule, DNAT,
//! coalescing. What the kernel does is not in it, nor are the two copies into the engines' buffers of a real agent.

use criterion::{BenchmarkId, Criterion, Throughput};
use tencrypt::proto::noise::Suite;
use tencrypt::wire::checksum::pseudo_header;
use tencrypt::wire::vnet::{Gso, VnetHeader};

use crate::project::{CLIENT, Pair, SERVICE, capture, tcp, udp};

/// Packets that share a send.
const BURST: usize = 32;
const SEGMENT: usize = 1_380;
const SEGMENTS: usize = 43;

pub(crate) fn benches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("engines");
    for suite in [Suite::ChaCha20Poly1305, Suite::Aes256Gcm] {
        for size in [64, 1_400] {
            let mut pair = Pair::new(suite);
            let packet = udp((CLIENT, 4_000), (SERVICE, 80), &vec![0; size - 28]);
            group.throughput(Throughput::Elements(BURST as u64));
            group.bench_function(BenchmarkId::new(format!("{size}B packets"), suite.as_str()), |b| {
                b.iter(|| {
                    for _ in 0..BURST {
                        capture(&mut pair.client, &VnetHeader::PLAIN, &packet, pair.now);
                    }
                    assert_eq!(pair.carry(), BURST);
                });
            });
        }
        let mut pair = Pair::new(suite);
        let first = tcp((CLIENT, 4_000), (SERVICE, 80), true, &[]);
        capture(&mut pair.client, &VnetHeader::PLAIN, &first, pair.now);
        assert_eq!(pair.carry(), 1);
        let mut packet = tcp((CLIENT, 4_000), (SERVICE, 80), false, &vec![0; SEGMENT * SEGMENTS]);
        let tcp_len = u16::try_from(packet.len() - 20).expect("an IPv4 packet");
        // What the kernel leaves in the field of a partial checksum.
        let partial = pseudo_header(&packet[12..20], 6, usize::from(tcp_len));
        packet[36..38].copy_from_slice(&partial.to_be_bytes());
        let vnet = VnetHeader {
            gso: Gso::Tcp4(u16::try_from(SEGMENT).expect("a segment")),
            header_len: 40,
            partial_checksum: Some((20, 16)),
            ecn: false,
        };
        group.throughput(Throughput::Bytes((SEGMENT * SEGMENTS) as u64));
        group.bench_function(BenchmarkId::new("61KB super-packet", suite.as_str()), |b| {
            b.iter(|| {
                capture(&mut pair.client, &vnet, &packet, pair.now);
                assert_eq!(pair.carry(), SEGMENTS);
            });
        });
    }
    group.finish();
}
