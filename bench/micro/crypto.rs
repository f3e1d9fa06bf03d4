//! Seal and open of a session, per suite and size. The train is a super-packet of 43 segments.

use std::hint::black_box;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput};
use rand::SeedableRng as _;
use rand_chacha::ChaCha20Rng;
use tencrypt::proto::Now;
use tencrypt::proto::noise::{
    HEADER_LEN, Identity, PADDING, PeerConfig, PeerId, Received, Suite, TAG_LEN, Transport,
};

use crate::project::{CLIENT, PORT, SERVER, keys, options, secret, start};

/// Name, bytes of each packet, packets.
const SIZES: [(&str, usize, usize); 3] = [("64B", 64, 1), ("1420B", 1_420, 1), ("61KB train", 1_420, 43)];
const SUITES: [Suite; 2] = [Suite::ChaCha20Poly1305, Suite::Aes256Gcm];
/// Records sealed before so many are opened.
const ROUND: u64 = 1_024;

struct Pair {
    client: Transport,
    server: Transport,
    to_server: PeerId,
    now: Now,
}

impl Pair {
    fn new(suite: Suite) -> Self {
        let now = start();
        let make = |own: Ipv4Addr, peer: Ipv4Addr, seed| {
            let identity = Identity { address: own.into(), secret: secret(own) };
            let mut transport =
                Transport::new(vec![identity], options(suite), ChaCha20Rng::from_seed([seed; 32]));
            let config = PeerConfig { address: peer.into(), port: PORT, keys: keys(peer), accept: None };
            let id = transport.add_peer(config, now);
            (transport, id)
        };
        let (mut client, to_server) = make(CLIENT, SERVER, 1);
        let (mut server, _) = make(SERVER, CLIENT, 2);
        client.begin(to_server, now);
        let (_, mut initiation) = client.poll_transmit().expect("an initiation");
        server.handle(at_client(), &mut initiation, now).expect("a valid initiation");
        let (_, mut response) = server.poll_transmit().expect("a response");
        client.handle(SocketAddr::new(SERVER.into(), PORT), &mut response, now).expect("a valid response");
        Self { client, server, to_server, now }
    }

    fn seal(&mut self, records: &mut [u8], len: usize) {
        let mut sealer = self.client.seal(self.to_server, self.now).expect("a session");
        for record in records.chunks_mut(len) {
            sealer.seal(record).expect("counters are left");
        }
    }
}

fn at_client() -> SocketAddr {
    SocketAddr::new(CLIENT.into(), PORT)
}

fn record_len(packet: usize) -> usize {
    HEADER_LEN + packet.next_multiple_of(PADDING) + TAG_LEN
}

pub(crate) fn benches(criterion: &mut Criterion) {
    for (name, packet, count) in SIZES {
        let len = record_len(packet);
        let mut group = criterion.benchmark_group(format!("seal/{name}"));
        group.throughput(Throughput::Bytes((packet * count) as u64));
        for suite in SUITES {
            let mut pair = Pair::new(suite);
            let mut records = vec![0; len * count];
            group.bench_function(BenchmarkId::from_parameter(suite.as_str()), |b| {
                b.iter(|| pair.seal(black_box(&mut records), len));
            });
        }
        group.finish();

        let mut group = criterion.benchmark_group(format!("open/{name}"));
        group.throughput(Throughput::Bytes((packet * count) as u64));
        for suite in SUITES {
            let mut pair = Pair::new(suite);
            group.bench_function(BenchmarkId::from_parameter(suite.as_str()), |b| {
                b.iter_custom(|iterations| {
                    let mut time = Duration::ZERO;
                    let mut left = iterations;
                    while left > 0 {
                        let round = left.min(ROUND.div_ceil(count as u64));
                        left -= round;
                        // Each record opens once: the replay window is part of it.
                        let mut sealed =
                            vec![0; len * count * usize::try_from(round).expect("a small number")];
                        pair.seal(&mut sealed, len);
                        let begun = Instant::now();
                        for record in sealed.chunks_mut(len) {
                            let opened = pair.server.handle(at_client(), record, pair.now);
                            assert!(matches!(black_box(opened), Ok(Received::Packet { .. })));
                        }
                        time += begun.elapsed();
                    }
                    time
                });
            });
        }
        group.finish();
    }
}
