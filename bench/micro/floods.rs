//! What one initiation of a flood costs: a valid MAC1, and nothing else that is true.

use std::hint::black_box;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use blake2::digest::consts::U16;
use blake2::digest::{FixedOutput, KeyInit, Mac};
use blake2::{Blake2s256, Blake2sMac, Digest};
use criterion::Criterion;
use rand::SeedableRng as _;
use rand_chacha::ChaCha20Rng;
use tencrypt::proto::Now;
use tencrypt::proto::drop::DropReason;
use tencrypt::proto::noise::{Identity, Suite, Transport};

use crate::project::{PORT, SERVER, later, options, secret, start};

/// More than are consumed before the transport is under load.
const LOAD: u32 = 600;
/// Between two messages of the flood that is answered: no more than all strangers get replies.
const ANSWERED: Duration = Duration::from_micros(500);

fn noise() -> [u8; 148] {
    let mut message = [0; 148];
    message[0] = 1;
    message[8..40].fill(9);
    let key = Blake2s256::new().chain_update(b"mac1----").chain_update(secret(SERVER).public().0).finalize();
    let mac = <Blake2sMac<U16> as KeyInit>::new_from_slice(&key).expect("32 bytes are a key");
    let mac1 = Mac::chain_update(mac, &message[..116]).finalize_fixed();
    message[116..132].copy_from_slice(&mac1);
    message
}

/// Somebody whose message costs one bucket of their own.
fn stranger(n: u32) -> SocketAddr {
    SocketAddr::new(Ipv4Addr::from_bits(0xac10_0000 | n & 0xf_ffff).into(), PORT)
}

struct Flooded {
    transport: Transport,
    message: [u8; 148],
    now: Now,
    n: u32,
}

impl Flooded {
    fn new() -> Self {
        let identity = Identity { address: SERVER.into(), secret: secret(SERVER) };
        let options = options(Suite::default());
        let transport = Transport::new(vec![identity], options, ChaCha20Rng::from_seed([3; 32]));
        Self { transport, message: noise(), now: start(), n: 0 }
    }

    fn messages(&mut self, count: u32, apart: Duration) {
        for _ in 0..count {
            self.message(apart);
        }
    }

    /// One message from a source of its own, `apart` after the last one; what became of it, and whether it was answered.
    fn message(&mut self, apart: Duration) -> (DropReason, bool) {
        self.n += 1;
        self.now = later(self.now, apart);
        let outcome = self.transport.handle(stranger(self.n), black_box(&mut self.message), self.now);
        (outcome.expect_err("it does not decrypt"), self.transport.poll_transmit().is_some())
    }
}

pub(crate) fn benches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("flooded initiation");
    let mut flooded = Flooded::new();
    group.bench_function("not under load: one Diffie-Hellman", |b| {
        b.iter(|| assert_eq!(flooded.message(Duration::from_secs(1)), (DropReason::HandshakeInvalid, false)));
    });
    let mut flooded = Flooded::new();
    flooded.messages(LOAD, ANSWERED);
    group.bench_function("under load: a cookie reply", |b| {
        b.iter(|| assert_eq!(flooded.message(ANSWERED), (DropReason::CookieMissing, true)));
    });
    let mut flooded = Flooded::new();
    flooded.messages(10 * LOAD, Duration::ZERO);
    group.bench_function("under load: no reply", |b| {
        b.iter(|| assert_eq!(flooded.message(Duration::ZERO), (DropReason::CookieMissing, false)));
    });
    group.finish();
}
