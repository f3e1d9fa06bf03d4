//! Floods of handshake messages with a valid MAC1: what they cost, whom they cannot shut out, how much is remembered.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;
use rand::SeedableRng;

use super::super::cookie::Cookies;
use super::super::limits::Limits;
use super::super::*;
use super::hostile::remac;
use super::pair::*;

/// Messages each second of a flood.
const RATE: u64 = 20_000;

/// Puts a side under load for the next second.
pub(super) fn load(pair: &mut Pair, side: usize) {
    let limits = &mut pair.sides[side].transport.limits;
    while !limits.is_loaded(pair.now.instant) {
        limits.note(pair.now.instant);
    }
    (0..=512).for_each(|_| limits.note(pair.now.instant));
}

/// An initiation with a valid MAC1 for side B that does not decrypt.
fn noise(n: u64) -> [u8; INITIATION_LEN] {
    let mut message = [0; INITIATION_LEN];
    message[..4].copy_from_slice(&[1, 0, 0, 0]);
    message[4..12].copy_from_slice(&n.to_le_bytes());
    message[12..40].fill(9);
    remac(&mut message, &side_secret(B).public());
    message
}

fn stranger(n: u32) -> SocketAddr {
    SocketAddr::new(Ipv4Addr::from_bits(0xac10_0000 + n).into(), 4_000)
}

#[test]
fn promise_6_nothing_but_macs_is_computed_for_a_message_without_a_cookie_under_load() {
    let mut pair = Pair::new(&Options::default());
    load(&mut pair, B);
    pair.begin(A);
    let initiation = pair.intercept().bytes;
    assert_eq!(pair.deliver(B, &initiation), Err(DropReason::CookieMissing));
    // Whether it decrypts is not looked at.
    assert_eq!(pair.deliver_from(B, stranger(1), &noise(1)), Err(DropReason::CookieMissing));
    assert_eq!(pair.sides[B].transport.shared.indices.len(), 0);
    assert_eq!(pair.sides[B].transport.poll_timeout(), None);
    assert_eq!(pair.strays[B].len(), 1);
    // And nothing was remembered: the same message is answered when the load is over.
    pair.advance_to(pair.now.instant + ms(1_001));
    assert_eq!(pair.deliver(B, &initiation), Ok(Received::Handshake));
}

#[test]
fn promise_6_what_has_no_valid_mac1_is_met_with_silence_under_load_too() {
    let mut pair = Pair::new(&Options::default());
    pair.begin(A);
    let initiation = pair.intercept().bytes;
    load(&mut pair, B);
    for at in [0, 5, 20, 110, 116, 131] {
        let mut broken = initiation.clone();
        broken[at] ^= 0x40;
        assert!(pair.deliver(B, &broken).is_err());
    }
    assert!(pair.is_wire_empty() && pair.strays[B].is_empty());
}

#[test]
fn promise_6_a_response_that_nobody_waits_for_is_met_with_silence_under_load_too() {
    let mut pair = Pair::established(&Options::default());
    load(&mut pair, A);
    let mut response = pair.log.iter().find(|d| d.bytes[0] == 2).unwrap().bytes.clone();
    assert_eq!(pair.deliver(A, &response), Err(DropReason::IndexUnknown));
    response[8] ^= 1;
    remac(&mut response, &side_secret(A).public());
    assert_eq!(pair.deliver(A, &response), Err(DropReason::IndexUnknown));
    assert!(pair.is_wire_empty());
}

#[test]
fn promise_6_a_forged_response_without_a_cookie_leaves_the_pending_handshake_alive() {
    let mut pair = Pair::new(&Options::default());
    pair.begin(A);
    let initiation = pair.intercept().bytes;
    pair.deliver(B, &initiation).unwrap();
    let response = pair.intercept().bytes;
    load(&mut pair, A);
    let mut forged = response.clone();
    forged[20] ^= 1;
    remac(&mut forged, &side_secret(A).public());
    assert_eq!(pair.deliver(A, &forged), Err(DropReason::CookieMissing));
    assert_eq!(pair.deliver_from(A, stranger(1), &response), Err(DropReason::OuterSource));
    pair.advance_to(pair.now.instant + ms(1_001));
    assert_eq!(pair.deliver(A, &response), Ok(Received::Handshake));
}

#[test]
fn load_begins_with_more_than_a_restart_of_200_agents_and_ends_a_second_after() {
    let mut limits = Limits::new(1);
    let start = epoch().instant;
    (0..512).for_each(|_| limits.note(start));
    assert!(!limits.is_loaded(start));
    limits.note(start);
    assert!(limits.is_loaded(start) && limits.is_loaded(start + ms(999)));
    assert!(!limits.is_loaded(start + ms(1_000)));
    // 250 each second are never load, 260 are in the end.
    for (rate, loaded) in [(250, false), (260, true)] {
        let mut limits = Limits::new(1);
        let mut ever = false;
        for n in 0..rate * 200 {
            let now = start + secs(1) * n / rate;
            limits.note(now);
            ever |= limits.is_loaded(now);
        }
        assert_eq!(ever, loaded, "{rate} each second");
    }
}

#[test]
fn responses_that_we_asked_for_are_no_load() {
    let mut pair = Pair::new(&Options::default());
    for _ in 0..600 {
        pair.begin(A);
        let initiation = pair.intercept().bytes;
        pair.advance_to(pair.now.instant + ms(21));
        let now = pair.now;
        let response = {
            let transport = &mut pair.sides[B].transport;
            transport.limits = Limits::new(1);
            transport.handle(address(A), &mut initiation.clone(), now).unwrap();
            transport.poll_transmit().unwrap().1
        };
        let Side { transport, peer, .. } = &mut pair.sides[A];
        transport.handle(address(B), &mut response.clone(), now).unwrap();
        transport.remove_peer(*peer);
        *peer = transport.add_peer(config(B), now);
    }
    // One less, and what follows would show nothing.
    (0..512).for_each(|_| pair.sides[A].transport.limits.note(pair.now.instant));
    assert!(!pair.sides[A].transport.limits.is_loaded(pair.now.instant));
}

/// How many of `tries` at one moment are allowed.
fn allowed(limits: &mut Limits, source: &str, now: Instant, tries: usize) -> usize {
    let source = source.parse().unwrap();
    (0..tries).filter(|_| limits.take_handshake(source, now)).count()
}

#[test]
fn promise_6_each_source_has_its_own_limit_of_20_handshakes_each_second() {
    let mut limits = Limits::new(1);
    let start = epoch().instant;
    limits.add_peer("10.0.0.1".parse().unwrap());
    for source in ["10.0.0.1", "172.16.0.1", "172.16.0.2", "2001:db8:0:1::1"] {
        assert_eq!(allowed(&mut limits, source, start, 100), 5, "{source}");
        let later = (1..=100).map(|n| allowed(&mut limits, source, start + ms(10 * n), 4));
        assert_eq!(later.sum::<usize>(), 20, "{source}");
        assert_eq!(allowed(&mut limits, source, start + secs(60), 100), 5, "{source}");
    }
}

#[test]
fn promise_6_whoever_owns_an_ipv6_network_is_one_source_and_a_peer_in_it_is_another() {
    let mut limits = Limits::new(1);
    let start = epoch().instant;
    limits.add_peer("2001:db8:0:1::77".parse().unwrap());
    let hosts = (0..100).map(|n| format!("2001:db8:0:1:{n:x}::{n:x}"));
    assert_eq!(hosts.map(|host| allowed(&mut limits, &host, start, 5)).sum::<usize>(), 5);
    assert_eq!(allowed(&mut limits, "2001:db8:0:2::1", start, 100), 5);
    assert_eq!(allowed(&mut limits, "2001:db8:0:1::77", start, 4), 4);
    limits.remove_peer("2001:db8:0:1::77".parse().unwrap());
    assert_eq!(allowed(&mut limits, "2001:db8:0:1::77", start, 1), 0, "the fifth is no longer its own");
}

#[test]
fn promise_6_cookie_replies_are_bounded_per_source_and_in_total() {
    let mut limits = Limits::new(1);
    let start = epoch().instant;
    let peer = "10.0.0.1".parse().unwrap();
    limits.add_peer(peer);
    let count =
        |limits: &mut Limits, source: IpAddr, now| (0..50).filter(|_| limits.take_reply(source, now)).count();
    assert_eq!(count(&mut limits, stranger(0).ip(), start), 2);
    assert_eq!(count(&mut limits, peer, start), 5);
    let all: usize = (1..20_000).map(|n| count(&mut limits, stranger(n).ip(), start)).sum();
    assert_eq!(all, 2_000 - 2);
    assert_eq!(count(&mut limits, peer, start + ms(200)), 1, "strangers do not use up what peers have");
}

#[test]
fn promise_10_tables_of_strangers_are_bounded_and_emptied_after_the_load() {
    let mut limits = Limits::new(1);
    let start = epoch().instant;
    let peer = "10.0.0.1".parse().unwrap();
    limits.add_peer(peer);
    (0..=512).for_each(|_| limits.note(start));
    for n in 0..100_000_u32 {
        let now = start + Duration::from_micros(9 * u64::from(n));
        let source = Ipv6Addr::from_bits(u128::from(n) << 64 | 1).into();
        assert!(limits.take_handshake(source, now), "a newcomer with a cookie is never shut out");
        limits.take_reply(source, now);
        assert!(limits.strangers() <= 4 * 2_048);
    }
    assert!(limits.take_handshake(peer, start + ms(900)));
    assert!(limits.strangers() > 4_096);
    assert!(!limits.is_loaded(start + ms(1_000)));
    assert_eq!(limits.strangers(), 0);
}

#[test]
fn stranger_that_comes_again_is_remembered_while_others_come() {
    let mut limits = Limits::new(1);
    let start = epoch().instant;
    let (mut got, busy) = (0, "172.16.0.1".parse().unwrap());
    for n in 0..10_000 {
        // Ten seconds: the table turns twice by time, and more often by number.
        let now = start + ms(u64::from(n));
        got += usize::from(limits.take_handshake(busy, now));
        limits.take_handshake(stranger(1_000 + n).ip(), now);
    }
    assert_eq!(got, 5 + 199);
}

/// A newcomer's transport, which B has as a peer or not.
struct Newcomer {
    transport: Transport,
    peer: PeerId,
    at: SocketAddr,
    began: Option<Instant>,
    answered: Option<Duration>,
}

impl Newcomer {
    fn new(n: u8, pair: &mut Pair, options: &Options) -> Self {
        let at = SocketAddr::new(Ipv4Addr::new(10, 0, 1, n).into(), PORT);
        let own = secret(100 + n);
        let keys = PeerKeys { public: own.public(), psk: psk() };
        let config_of = PeerConfig { address: at.ip(), port: PORT, keys, accept: None };
        pair.sides[B].transport.add_peer(config_of, pair.now);
        let identity = Identity { address: at.ip(), secret: own };
        let rng = ChaCha20Rng::seed_from_u64(n.into());
        let mut transport = Transport::new(vec![identity], options.clone(), rng);
        let peer = transport.add_peer(config(B), pair.now);
        Self { transport, peer, at, began: None, answered: None }
    }

    fn step(&mut self, pair: &mut Pair) {
        self.began.get_or_insert_with(|| {
            self.transport.begin(self.peer, pair.now);
            pair.now.instant
        });
        self.transport.handle_timeout(pair.now);
        while let Some((_, mut message)) = self.transport.poll_transmit() {
            let _ = pair.sides[B].transport.handle(self.at, &mut message, pair.now);
        }
    }

    fn take(&mut self, mut message: Vec<u8>, now: Now) {
        self.transport.handle(address(B), &mut message, now).unwrap();
        if message[0] == 2 {
            self.answered = self.began.map(|began| now.instant - began);
        }
    }
}

/// What became of a flood.
struct Flooded {
    pair: Pair,
    /// Cookie replies to those who flood.
    replies: usize,
}

impl Flooded {
    fn dropped(&self, reason: DropReason) -> usize {
        self.pair.sides[B].drops.iter().filter(|seen| **seen == reason).count()
    }
}

/// Three seconds of a flood against B, which has a session with A, from sources that are silent and from some that use the
/// cookies they get. Newcomers begin after each 300 ms of the first second; A goes on sending, across rekeys.
fn flood(silent: u32, answering: u32) -> Flooded {
    let options = Options { rekey_after: secs(1), ..Options::default() };
    let mut pair = Pair::new(&options);
    let mut newcomers: Vec<_> = (0..4).map(|n| Newcomer::new(n, &mut pair, &options)).collect();
    pair.begin(A);
    pair.run(ms(100));
    let silent: Vec<_> = (0..silent).map(stranger).collect();
    let mut cookies: BTreeMap<_, _> =
        (0..answering).map(|n| (stranger(100_000 + n), Cookies::default())).collect();
    let answering: Vec<_> = cookies.keys().copied().collect();
    let public = side_secret(B).public();
    let (mut n, mut most, mut replies) = (0, 0, 0);
    for step in 0..3_000_u64 {
        for _ in 0..RATE / 1_000 {
            n += 1;
            let mut message = noise(n);
            let at = usize::try_from(n).unwrap();
            let from = match at % 2 {
                0 if !answering.is_empty() => answering[at / 2 % answering.len()],
                _ if silent.is_empty() => answering[at / 2 % answering.len()],
                _ => silent[at % silent.len()],
            };
            if let Some(cookies) = cookies.get_mut(&from) {
                cookies.complete_initiation(&mut message, public, pair.now.instant);
            }
            assert!(pair.deliver_from(B, from, &message).is_err());
        }
        for (n, newcomer) in newcomers.iter_mut().enumerate() {
            if step >= 300 * n as u64 {
                newcomer.step(&mut pair);
            }
        }
        for (to, message) in std::mem::take(&mut pair.strays[B]) {
            if let Some(newcomer) = newcomers.iter_mut().find(|newcomer| newcomer.at == to) {
                newcomer.take(message, pair.now);
                continue;
            }
            replies += 1;
            if let Some(cookies) = cookies.get_mut(&to) {
                let _ = cookies.take(message[..].try_into().unwrap(), pair.now.instant);
            }
        }
        if step % 10 == 0 {
            pair.send(A, &step.to_le_bytes());
        }
        pair.run(ms(1));
        most = most.max(pair.sides[B].transport.limits.strangers());
    }
    pair.run(ms(100));
    assert_eq!(pair.sides[B].received.len(), 300, "the session goes on");
    assert!(pair.sides[A].count(Event::Established(pair.sides[A].peer)) >= 3, "and is renewed");
    for newcomer in newcomers {
        let took = newcomer.answered.expect("an answer");
        assert!(took < secs(2), "{} waited {took:?}", newcomer.at);
    }
    assert!(most <= 4 * 2_048);
    Flooded { pair, replies }
}

#[test]
fn promise_10_a_flood_from_1000_silent_sources_keeps_out_neither_peers_nor_newcomers() {
    let flooded = flood(1_000, 0);
    // Only what came before the load was noticed cost a Diffie-Hellman.
    assert!(flooded.dropped(DropReason::HandshakeInvalid) <= 520);
    assert!(flooded.dropped(DropReason::CookieMissing) > 59_000);
    assert!(flooded.replies <= 1_000 * 4, "{} cookie replies", flooded.replies);
}

#[test]
fn promise_10_a_flood_from_50_sources_with_cookies_keeps_out_neither_peers_nor_newcomers() {
    let flooded = flood(0, 50);
    let consumed = flooded.dropped(DropReason::HandshakeInvalid);
    assert!(consumed <= 520 + 50 * (5 + 20 * 3), "{consumed} were consumed");
    assert!(consumed > 50 * 20 * 2, "the sources did prove themselves");
    assert!(flooded.dropped(DropReason::SourceLimit) > 40_000);
}

#[test]
fn promise_10_a_flood_from_both_kinds_keeps_out_neither_peers_nor_newcomers() {
    flood(1_000, 50);
}

#[test]
fn promise_10_a_flood_from_all_the_world_keeps_out_neither_peers_nor_newcomers() {
    let flooded = flood(60_000, 0);
    assert!(flooded.replies <= 2_000 * 4, "{} cookie replies", flooded.replies);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    #[test]
    fn promise_6_hostile_handshake_messages_under_load_change_nothing(
        body in prop::collection::vec(any::<u8>(), 148),
        is_response in any::<bool>(),
        as_peer in any::<bool>(),
        index in any::<bool>(),
    ) {
        let mut pair = Pair::established(&Options::default());
        load(&mut pair, B);
        let real = pair.seal(A, b"real").unwrap();
        let mut message = body;
        message[..4].copy_from_slice(&[1 + u8::from(is_response), 0, 0, 0]);
        message.truncate(if is_response { 92 } else { 148 });
        if index {
            message[8..12].copy_from_slice(&real[4..8]);
        }
        remac(&mut message, &side_secret(B).public());
        let before = pair.sides[B].transport.poll_timeout();
        let from = if as_peer { address(A) } else { stranger(1) };
        let reason = if is_response { DropReason::IndexUnknown } else { DropReason::CookieMissing };
        prop_assert_eq!(pair.deliver_from(B, from, &message), Err(reason));
        prop_assert_eq!(pair.sides[B].transport.poll_timeout(), before);
        prop_assert_eq!(pair.sides[B].transport.shared.indices.len(), 1);
        prop_assert!(pair.deliver(B, &real).is_ok());
    }
}
