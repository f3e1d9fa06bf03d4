//! Seal and open of a session, per suite and size. The train is a super-packet of 43 segments.

use std::hint::black_box;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput};
use rand::SeedableRng as _;
use rand_chacha::ChaCha20Rng;
use tencrypt::proto::Now;
use tencrypt::proto::noise::{Identity, PeerConfig, PeerId, Received, Suite, Transport, record_len};

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

    /// Seals `packet` into each record.
    fn seal(&mut self, packet: &[u8], records: &mut [u8]) {
        let mut sealer = self.client.seal(self.to_server, self.now).expect("a session");
        for record in records.chunks_mut(record_len(packet.len())) {
            sealer.seal(packet, record).expect("counters are left");
        }
    }
}

fn at_client() -> SocketAddr {
    SocketAddr::new(CLIENT.into(), PORT)
}

pub(crate) fn benches(criterion: &mut Criterion) {
    for (name, packet, count) in SIZES {
        let len = record_len(packet);
        let payload = vec![7; packet];
        let mut group = criterion.benchmark_group(format!("seal/{name}"));
        group.throughput(Throughput::Bytes((packet * count) as u64));
        for suite in SUITES {
            let mut pair = Pair::new(suite);
            let mut records = vec![0; len * count];
            group.bench_function(BenchmarkId::from_parameter(suite.as_str()), |b| {
                b.iter(|| pair.seal(&payload, black_box(&mut records)));
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
                        pair.seal(&payload, &mut sealed);
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
