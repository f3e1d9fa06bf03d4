//! Random operations on both sides and on the wire, against a model of who may speak to whom.
//!
//! The model knows two things of each side: whether its directory names the peer, and which project keys it uses and
//! accepts. From them alone it says whether a packet may arrive; the transports must agree, whatever was lost, repeated,
//! restarted, handed over or rotated before. Packets are as long as [`mtu::inner_mtu`] lets them be, and those must pass.
//! That no key seals two messages with one counter is asserted by the [`Pair`].

use proptest::prelude::*;
use rand::SeedableRng;

use super::super::constants::RETIRED_LIFE;
use super::super::*;
use super::pair::*;
use crate::proto::mtu;

/// Seconds within which a permitted packet gets through a good network, if it is sent once a second: 15 s until a session
/// that only one side still has is given up, one late retry, a second for the handshake.
const PATIENCE: u32 = 22;

/// Of the links; the first is the least that IPv6 has.
const MTUS: [u32; 5] = [1_280, 1_281, 1_450, 1_500, 9_000];

/// A rotation's steps: the key in use first, then the accepted one.
const STEPS: [&[u8]; 5] = [&[1], &[1, 2], &[2, 1], &[2], &[2, 3]];

#[derive(Clone, Debug)]
enum Op {
    /// A packet of so many bytes, or of the most that the link lets through.
    Send(usize, usize),
    Tick(u64),
    /// Of the datagrams under way: one is lost, one comes twice, one is overtaken.
    Drop(usize),
    Duplicate(usize, u64),
    Reorder(usize, u64),
    Network {
        mtu: u32,
        loss_percent: u32,
        duplicate_percent: u32,
        latency: u64,
        reorder: u64,
    },
    Cut(usize, bool),
    /// Asks for a new session whatever there is.
    Rekey(usize),
    /// A new agent that knows nothing but the greatest stamp.
    Restart(usize),
    /// The next step of a key rotation, by a successor that takes the sessions over; at the last step: another successor.
    Rotate(usize),
    /// The directory gains or loses the other side.
    Name(usize, bool),
    /// A good network for a while: what may arrive arrives.
    Settle,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (0..2usize, 4..1_500usize).prop_map(|(side, size)| Op::Send(side, size)),
        1 => any::<usize>().prop_map(Op::Drop),
        1 => (any::<usize>(), 0..5_000u64).prop_map(|(n, later)| Op::Duplicate(n, later)),
        1 => (any::<usize>(), 0..5_000u64).prop_map(|(n, later)| Op::Reorder(n, later)),
        4 => prop_oneof![0..300u64, 0..20_000u64, Just(61_000), Just(181_000)].prop_map(Op::Tick),
        2 => network(),
        1 => (0..2usize, any::<bool>()).prop_map(|(side, cut)| Op::Cut(side, cut)),
        2 => (0..2usize).prop_map(Op::Rekey),
        1 => (0..2usize).prop_map(Op::Restart),
        2 => (0..2usize).prop_map(Op::Rotate),
        2 => (0..2usize, prop::bool::weighted(0.6)).prop_map(|(side, named)| Op::Name(side, named)),
        2 => Just(Op::Settle),
    ]
}

fn network() -> impl Strategy<Value = Op> {
    let ranges = (prop::sample::select(&MTUS[..]), 0..60u32, 0..40u32, 0..400u64, 0..200u64);
    ranges.prop_map(|(mtu, loss_percent, duplicate_percent, latency, reorder)| Op::Network {
        mtu,
        loss_percent,
        duplicate_percent,
        latency,
        reorder,
    })
}

/// What the model knows of a side.
struct Known {
    named: bool,
    step: usize,
    /// When it took its last step.
    rotated: Option<Instant>,
}

struct World {
    pair: Pair,
    options: Options,
    known: [Known; 2],
    /// Packets received so far, all judged.
    judged: [usize; 2],
    judged_at: Instant,
    number: u32,
    seed: u64,
}

fn key(side: usize, n: u8) -> StaticSecret {
    secret(100 + 10 * u8::try_from(side).unwrap() + n)
}

impl World {
    fn new(suite: Suite) -> Self {
        let options = Options { rekey_after: secs(20), ..Options::of(suite) };
        let known = [A, B].map(|_| Known { named: true, step: 0, rotated: None });
        let pair = Pair::new(&options);
        let mut world =
            Self { pair, options, known, judged: [0; 2], judged_at: epoch().instant, number: 0, seed: 2 };
        [A, B].into_iter().for_each(|side| world.replace(side));
        world
    }

    /// Whether each side opens what a handshake begun by the other gives. Where only one does, which an orderly rotation
    /// never comes to, nothing is promised.
    fn must_meet(&self) -> bool {
        let [a, b] = self.known.each_ref().map(|known| STEPS[known.step]);
        self.known.iter().all(|known| known.named) && a.contains(&b[0]) && b.contains(&a[0])
    }

    /// Whether a packet from `from` may arrive at all: the receiver names it, and the two share a key.
    fn may_arrive(&self, from: usize, to: usize) -> bool {
        let shared = STEPS[self.known[from].step].iter().any(|n| STEPS[self.known[to].step].contains(n));
        // A session outlives its key for a moment.
        let lately = self.known[to].rotated.is_some_and(|at| self.judged_at - at < RETIRED_LIFE);
        self.known[to].named && (shared || lately)
    }

    fn operate(&mut self, op: Op) {
        match op {
            Op::Send(side, size) => self.send(side, size),
            Op::Drop(n) => self.pair.lose(n),
            Op::Duplicate(n, later) => self.pair.repeat(n, ms(later)),
            Op::Reorder(n, later) => self.pair.delay(n, ms(later)),
            Op::Tick(time) => self.pair.run(ms(time)),
            Op::Network { mtu, loss_percent, duplicate_percent, latency, reorder } => {
                let (mtu, latency, reorder) = (mtu as usize, ms(latency), ms(reorder));
                self.pair.link = Link { mtu, latency, reorder, loss_percent, duplicate_percent };
            }
            Op::Cut(side, cut) => self.pair.cut[side] = cut,
            Op::Rekey(side) => {
                let Side { transport, peer, .. } = &mut self.pair.sides[side];
                transport.probe(*peer, self.pair.now);
            }
            Op::Restart(side) => self.replace(side),
            Op::Rotate(side) => self.rotate(side),
            Op::Name(side, named) => self.name(side, named),
            Op::Settle => self.settle(),
        }
        self.judge();
    }

    /// The longest packet that the pod may send; two of its bytes are the harness's.
    fn longest(&self) -> usize {
        let link = u32::try_from(self.pair.link.mtu).unwrap();
        mtu::inner_mtu(link, address(A).ip()) as usize - 2
    }

    fn send(&mut self, side: usize, size: usize) {
        self.number += 1;
        let mut packet = self.number.to_be_bytes().to_vec();
        packet.resize(size.min(self.longest()), 0x5a);
        self.pair.send(side, &packet);
    }

    /// A transport of the side's step, without sessions.
    fn replace(&mut self, side: usize) {
        self.seed += 1;
        let own = STEPS[self.known[side].step].iter();
        let identities = own.map(|n| Identity { address: address(side).ip(), secret: key(side, *n) });
        let rng = ChaCha20Rng::seed_from_u64(self.seed);
        let mut transport = Transport::new(identities.collect(), self.options.clone(), rng);
        let former = &mut self.pair.sides[side];
        former.transport.last_stamp().into_iter().for_each(|stamp| transport.raise_stamp(stamp));
        former.transport = transport;
        former.staged.clear();
        if self.known[side].named {
            self.add(side);
        }
    }

    fn add(&mut self, side: usize) {
        let known = |n: &u8| PeerKeys { public: key(1 - side, *n).public(), psk: PresharedKey([*n; 32]) };
        let mut keys = STEPS[self.known[side].step].iter().map(known);
        let config = PeerConfig { keys: keys.next().unwrap(), accept: keys.next(), ..config(1 - side) };
        let Side { transport, peer, .. } = &mut self.pair.sides[side];
        *peer = transport.add_peer(config, self.pair.now);
    }

    fn rotate(&mut self, side: usize) {
        let now = self.pair.now;
        let Side { transport, peer, .. } = &mut self.pair.sides[side];
        let state = if self.known[side].named { transport.export(*peer, now) } else { None };
        self.known[side].step = (self.known[side].step + 1).min(STEPS.len() - 1);
        self.known[side].rotated = Some(now.instant);
        self.replace(side);
        let Side { transport, peer, .. } = &mut self.pair.sides[side];
        if let Some(state) = state {
            transport.import(*peer, state, now.instant, now);
        }
        // What is still under way was sent under the old rules.
        self.pair.clear_wire();
    }

    fn name(&mut self, side: usize, named: bool) {
        if self.known[side].named == named {
            return;
        }
        self.known[side].named = named;
        if named {
            self.add(side);
        } else {
            let Side { transport, peer, staged, .. } = &mut self.pair.sides[side];
            transport.remove_peer(*peer);
            staged.clear();
        }
    }

    /// Both sides send once a second through a good network, as much as it carries; where the two must meet, each hears the
    /// other.
    fn settle(&mut self) {
        self.pair.link = Link { mtu: self.pair.link.mtu, ..Link::GOOD };
        self.pair.cut = [false; 2];
        let first = self.number + 1;
        for second in 0..PATIENCE {
            [A, B].into_iter().for_each(|side| self.send(side, usize::MAX));
            self.pair.run(secs(1));
            self.judge();
            let have_heard = [A, B].into_iter().all(|side| self.numbers(side).any(|number| number >= first));
            if have_heard || (second > 2 && !self.must_meet()) {
                return;
            }
        }
        panic!("a permitted packet did not arrive within {PATIENCE} s");
    }

    fn numbers(&self, side: usize) -> impl Iterator<Item = u32> {
        let received = self.pair.sides[side].received.iter();
        received.map(|packet| u32::from_be_bytes(*packet.first_chunk().unwrap()))
    }

    /// What arrived since the last call was permitted, and arrived once.
    fn judge(&mut self) {
        for side in [A, B] {
            let mut seen = std::collections::BTreeSet::new();
            assert!(self.numbers(side).all(|number| seen.insert(number)), "a packet arrived twice");
            let arrived = seen.len() > self.judged[side];
            assert!(!arrived || self.may_arrive(1 - side, side), "a forbidden packet arrived at {side}");
            self.judged[side] = seen.len();
        }
        self.judged_at = self.pair.now.instant;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn permitted_packet_gets_through_and_a_forbidden_one_never(
        suite in prop::sample::select(&[Suite::ChaCha20Poly1305, Suite::Aes256Gcm][..]),
        ops in prop::collection::vec(op(), 1..40),
    ) {
        let mut world = World::new(suite);
        ops.into_iter().for_each(|op| world.operate(op));
        world.settle();
    }
}

#[test]
fn session_of_a_retired_project_key_ends_with_it() {
    let mut world = World::new(Suite::default());
    let old = [Op::Rotate(B), Op::Send(A, 4), Op::Tick(100), Op::Rotate(B)];
    old.into_iter().for_each(|op| world.operate(op));
    assert!(world.pair.can_send(B), "the key is still accepted");
    world.operate(Op::Rotate(B));
    assert!(!world.pair.can_send(B), "nothing is sealed under the retired key");
    world.operate(Op::Send(A, 4));
    world.operate(Op::Tick(100));
    assert_eq!(world.pair.sides[B].received.len(), 2, "what is under way is opened");
    world.operate(Op::Tick(5_000));
    world.operate(Op::Send(A, 4));
    world.operate(Op::Tick(100));
    assert_eq!(world.pair.sides[B].received.len(), 2, "and ends soon");
    world.operate(Op::Settle);
    assert_eq!(world.pair.sides[A].received.len(), 0);
}
