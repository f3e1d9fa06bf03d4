//! Two transports, and the two targets that need no more than an established session.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use blake2::digest::consts::U16;
use blake2::digest::{FixedOutput, KeyInit, Mac};
use blake2::{Blake2s256, Blake2sMac, Digest};
use rand::SeedableRng;
use rand_chacha::ChaCha20Rng;
use tencrypt::proto::Now;
use tencrypt::proto::drop::DropReason;
use tencrypt::proto::noise::{
    Identity, Options, PeerConfig, PeerId, PeerKeys, PresharedKey, PublicKey, Received, StaticSecret,
    Transport, record_len,
};

/// Bytes of a cookie reply.
const COOKIE_LEN: usize = 64;
/// Counters behind the greatest one that a session accepts.
const WINDOW: usize = 8192;

/// Inputs that two living sides meet.
const LIFE: usize = 2_048;

/// One end of the tunnel.
pub(crate) struct Side {
    pub(crate) transport: Transport,
    pub(crate) peer: PeerId,
}

/// The moment that every run starts at.
pub(crate) fn start() -> Now {
    static START: OnceLock<Instant> = OnceLock::new();
    Now { instant: *START.get_or_init(Instant::now), wall: Duration::from_secs(1_700_000_000) }
}

pub(crate) fn address(side: usize) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, [1, 2][side]], 51820))
}

fn secret(side: usize) -> StaticSecret {
    StaticSecret([[11; 32], [22; 32]][side])
}

fn public(side: usize) -> PublicKey {
    static PUBLIC: OnceLock<[PublicKey; 2]> = OnceLock::new();
    PUBLIC.get_or_init(|| [0, 1].map(|side| secret(side).public()))[side]
}

pub(crate) fn config(side: usize) -> PeerConfig {
    let keys = PeerKeys { public: public(side), psk: PresharedKey([0x5a; 32]) };
    PeerConfig { address: address(side).ip(), port: address(side).port(), keys, accept: None }
}

impl Side {
    pub(crate) fn new(side: usize, seed: u64, options: &Options, now: Now) -> Self {
        let identity = Identity { address: address(side).ip(), secret: secret(side) };
        let mut transport = Transport::new(vec![identity], options.clone(), ChaCha20Rng::seed_from_u64(seed));
        let peer = transport.add_peer(config(1 - side), now);
        Self { transport, peer }
    }

    /// A sealed record, where there is a session.
    pub(crate) fn seal(&mut self, payload: &[u8; 16], now: Now) -> Option<Vec<u8>> {
        let mut record = vec![0; record_len(payload.len())];
        self.transport.seal(self.peer, now)?.seal(payload, &mut record).ok()?;
        Some(record)
    }

    /// Everything that can be seen from outside and that unauthenticated bytes must not move.
    pub(crate) fn visible(&self) -> (Option<Instant>, usize, Option<Duration>, bool) {
        let transport = &self.transport;
        let has_session = transport.has_session(self.peer);
        (transport.poll_timeout(), transport.waiting(), transport.last_stamp(), has_session)
    }
}

/// Two sides with a session that both may seal on.
fn established() -> [Side; 2] {
    let now = start();
    let mut sides = [0, 1].map(|side| Side::new(side, side as u64, &Options::default(), now));
    sides[0].transport.begin(sides[0].peer, now);
    for (from, to) in [(0, 1), (1, 0), (0, 1)] {
        sides[from].transport.handle_timeout(now);
        let (_, mut message) = sides[from].transport.poll_transmit().expect("the next message");
        sides[to].transport.handle(address(from), &mut message, now).expect("a genuine message");
    }
    for side in &mut sides {
        while side.transport.poll_event().is_some() {}
    }
    sides
}

/// Sides whose session can be set back to its beginning, which costs less than another handshake.
struct Reset {
    sides: [Side; 2],
    exported: [Vec<u8>; 2],
}

impl Reset {
    fn new() -> Self {
        let mut sides = established();
        let exported = sides.each_mut().map(|side| {
            let state = side.transport.export(side.peer, start()).expect("the peer is there");
            postcard::to_allocvec(&state).expect("plain data")
        });
        let fresh = [0, 1].map(|side| Side::new(side, side as u64, &Options::default(), start()));
        Self { sides: fresh, exported }
    }

    fn again(&mut self) -> &mut [Side; 2] {
        let now = start();
        for (n, side) in self.sides.iter_mut().enumerate() {
            side.transport.remove_peer(side.peer);
            side.peer = side.transport.add_peer(config(1 - n), now);
            let state = postcard::from_bytes(&self.exported[n]).expect("plain data");
            assert!(side.transport.import(side.peer, state, now.instant, now));
        }
        &mut self.sides
    }
}

/// Gives a handshake message to `side` a valid MAC1, as anybody can who knows its public key.
pub(crate) fn remac(message: &mut [u8], side: usize) {
    let Some(covered) = message.len().checked_sub(32) else { return };
    let key: [u8; 32] =
        Blake2s256::new().chain_update(b"mac1----").chain_update(public(side).0).finalize().into();
    let mac = <Blake2sMac<U16> as KeyInit>::new_from_slice(&key).expect("a BLAKE2s key");
    let mac = Mac::chain_update(mac, &message[..covered]).finalize_fixed();
    message[covered..covered + 16].copy_from_slice(&mac);
}

thread_local! {
    /// They live on from input to input: nothing that a stranger sends may change what the next one meets, but that too
    /// many handshake messages are load. So there are new ones at times, which are without.
    static LIVING: RefCell<([Side; 2], usize)> = RefCell::new((established(), 0));
    static RESET: RefCell<Reset> = RefCell::new(Reset::new());
}

/// The first byte says what an insider of the network would add: where it seems to come from, a valid MAC1, the receiver
/// index of the session in being. The rest is the datagram.
pub fn message_parser(bytes: &[u8]) {
    LIVING.with_borrow_mut(|(sides, inputs)| {
        *inputs += 1;
        if *inputs == LIFE {
            (*sides, *inputs) = (established(), 0);
        }
        parse(sides, bytes);
    });
}

fn parse([near, far]: &mut [Side; 2], bytes: &[u8]) {
    let Some((how, datagram)) = bytes.split_first() else { return };
    let now = start();
    let record = far.seal(b"still to be read", now).expect("a session");
    let mut datagram = datagram.to_vec();
    if how & 1 != 0 && datagram.len() >= 8 {
        datagram[4..8].copy_from_slice(&record[4..8]);
    }
    if how & 2 != 0 && datagram.len() >= 12 {
        datagram[8..12].copy_from_slice(&record[4..8]);
    }
    let mut with_mac = datagram.clone();
    remac(&mut with_mac, 0);
    if how & 4 != 0 {
        datagram.clone_from(&with_mac);
    }
    let may_be_answered = datagram == with_mac;
    let mut from = address(1);
    match how >> 4 & 3 {
        0 | 1 => {}
        2 => from.set_port(9),
        _ => from = SocketAddr::from(([0xfd00, 0, 0, 0, 0, 0, 0, 7], 51820)),
    }
    let before = near.visible();
    let refused = near.transport.handle(from, &mut datagram, now).expect_err("nobody sealed it");
    // Under load a cookie answers what has a valid MAC1; anything else is met with silence.
    if let Some((to, reply)) = near.transport.poll_transmit() {
        assert!(may_be_answered && refused == DropReason::CookieMissing, "{refused:?}");
        assert_eq!((to, &reply[..4], reply.len()), (from, &[3, 0, 0, 0][..], COOKIE_LEN));
    }
    assert_eq!((near.transport.poll_transmit(), near.transport.poll_event()), (None, None));
    assert_eq!(near.visible(), before);
    let opened = near.transport.handle(address(1), &mut record.clone(), now);
    assert!(matches!(opened, Ok(Received::Packet { .. })), "{opened:?}");
}

/// Operations of four bytes each on the records of one session, against a set of the counters that were accepted.
pub fn session_open(bytes: &[u8]) {
    RESET.with_borrow_mut(|reset| open(reset.again(), bytes));
}

fn open([near, far]: &mut [Side; 2], bytes: &[u8]) {
    let now = start();
    let mut records = Vec::new();
    let mut sealed = |records: &mut Vec<Vec<u8>>, count: usize| {
        for _ in 0..count {
            let number = (records.len() as u128).to_be_bytes();
            records.push(far.seal(&number, now).expect("a session"));
        }
    };
    sealed(&mut records, 16);
    let mut accepted = BTreeSet::new();
    for operation in bytes.chunks_exact(4).take(64) {
        let [kind, low, high, value] = [0, 1, 2, 3].map(|at| operation[at]);
        if kind == 0 {
            let more = (usize::from(value) * 64).min(12_000_usize.saturating_sub(records.len()));
            sealed(&mut records, more);
            continue;
        }
        // Counted from the newest, so that the end of the window is as near as the beginning.
        let back = usize::from(u16::from_le_bytes([low, high & 0x3f])) % records.len();
        let number = records.len() - 1 - back;
        let mut record = records[number].clone();
        let at = usize::from(value) % record.len();
        let genuine = match kind % 8 {
            1..=3 => true,
            4 => {
                record[at] ^= 1 << (high >> 6);
                false
            }
            5 => {
                record.truncate(at);
                false
            }
            6 => {
                record.push(value);
                false
            }
            _ => {
                let other = usize::from(value) % records.len();
                record[8..16].copy_from_slice(&records[other][8..16]);
                other == number
            }
        };
        let greatest = accepted.last().copied();
        let fresh = !accepted.contains(&number)
            && greatest.is_none_or(|greatest| number > greatest || greatest - number < WINDOW);
        let result = near.transport.handle(address(1), &mut record, now);
        match result {
            Ok(Received::Packet { payload, .. }) => {
                assert!(genuine && fresh, "record {number} was opened");
                assert_eq!(record[payload], (number as u128).to_be_bytes());
                accepted.insert(number);
            }
            Ok(other) => panic!("a record of 16 bytes is no {other:?}"),
            Err(reason) => {
                assert!(!genuine || !fresh, "record {number} was refused: {reason:?}");
                assert!(!genuine || reason == DropReason::Replay, "{reason:?}");
            }
        }
    }
}
