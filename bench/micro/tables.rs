//! What is looked up or changed for a packet, apart from the cipher.

use std::hint::black_box;

use criterion::{Criterion, Throughput};
use hickory_proto::rr::Name;
use tencrypt::proto::nat::{Direction, Flows, Kind, MAX_FLOWS, Tuple};
use tencrypt::wire::dns;
use tencrypt::wire::packet::Packet;
use tencrypt::wire::rewrite::{self, Rewrite};

use crate::project::{CLIENT, SERVER, SERVICE, pod, start, tcp};

/// A step through the table that meets every flow and no neighbours.
const STRIDE: usize = 40_503;

fn tuple(n: usize) -> Tuple {
    let port = |n: usize| u16::try_from(n).expect("a port");
    Tuple {
        protocol: 6,
        local: (CLIENT.into(), port(1_024 + n % 32_768)),
        remote: (SERVICE.into(), port(80 + n / 32_768)),
    }
}

pub(crate) fn benches(criterion: &mut Criterion) {
    let now = start();
    let mut group = criterion.benchmark_group("flows");
    for count in [1_000, MAX_FLOWS] {
        let mut flows = Flows::new(1);
        for n in 0..count {
            // As many peers as it takes for their shares to fill the table.
            let peer = std::net::Ipv4Addr::from_bits(SERVER.to_bits() + u32::try_from(n % 128).expect("few"));
            flows.insert(tuple(n), peer.into(), Kind::Client, now).expect("there is room");
        }
        let tuples: Vec<_> = (0..count).map(tuple).collect();
        let mut at = 0;
        group.throughput(Throughput::Elements(1));
        group.bench_function(format!("lookup/{count}"), |b| {
            b.iter(|| {
                at = (at + STRIDE) % count;
                let flow = flows.get(black_box(&tuples[at])).expect("it is there");
                flow.touch(Direction::Outbound, 0x10, now);
            });
        });
    }
    group.finish();

    let mut group = criterion.benchmark_group("nat");
    let there = Rewrite { source: None, destination: Some((SERVER.into(), Some(8_080))) };
    let back = Rewrite { destination: Some((SERVICE.into(), Some(80))), ..there };
    let mut bytes = tcp((CLIENT, 40_000), (SERVICE, 80), false, &[0; 1_380]);
    let packet = Packet::parse(&bytes).expect("a packet");
    group.throughput(Throughput::Elements(2));
    for (name, partial) in [("whole checksum", false), ("partial checksum", true)] {
        group.bench_function(format!("rewrite there and back/{name}"), |b| {
            b.iter(|| {
                rewrite::apply(black_box(&mut bytes), &packet, &there, partial);
                rewrite::apply(black_box(&mut bytes), &packet, &back, partial);
            });
        });
    }
    group.finish();

    let mut group = criterion.benchmark_group("dns");
    let zone: Name = "shop.svc.cluster.local.".parse().expect("a name");
    group.throughput(Throughput::Elements(1));
    for addresses in [1, 100] {
        let answer = answer("db.shop.svc.cluster.local", addresses);
        group.bench_function(format!("learn/{addresses} addresses"), |b| {
            b.iter(|| {
                let lesson = dns::lesson(black_box(&answer), Some(&zone)).expect("an answer");
                assert_eq!(lesson.addresses.len(), usize::from(addresses));
            });
        });
    }
    group.finish();
}

/// An answer with so many A records of the name asked for.
fn answer(name: &str, addresses: u16) -> Vec<u8> {
    let mut out = vec![0xab, 0xcd, 0x81, 0x80, 0, 1];
    out.extend(addresses.to_be_bytes());
    out.extend([0, 0, 0, 0]);
    for label in name.split('.') {
        out.push(u8::try_from(label.len()).expect("a label"));
        out.extend(label.bytes());
    }
    out.extend([0, 0, 1, 0, 1]);
    for n in 0..u32::from(addresses) {
        out.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 5, 0, 4]);
        out.extend(pod(n).octets());
    }
    out
}
