//! Cookies: what they prove, what a reply may change, and handshakes under load on either side.

use blake2::Blake2sMac;
use blake2::digest::consts::U16;
use blake2::digest::{FixedOutput, KeyInit, Mac};
use proptest::prelude::*;
use rand::SeedableRng;

use super::super::constants::COOKIE_LIFE;
use super::super::cookie::{Cookie, CookieKey, CookieSecret, Cookies};
use super::super::*;
use super::floods::load;
use super::hostile::remac;
use super::pair::*;

/// A message with a valid MAC1 for side B, and nothing else that is true.
fn message(n: u8) -> [u8; INITIATION_LEN] {
    let mut message = [n; INITIATION_LEN];
    message[..4].copy_from_slice(&[1, 0, 0, 0]);
    remac(&mut message, &side_secret(B).public());
    message[INITIATION_LEN - 16..].fill(0);
    message
}

/// A secret, and the cookie that a sender at `from` got from it.
fn proven(from: SocketAddr, now: Instant) -> (CookieSecret, Cookies) {
    let (mut secret, mut cookies) = (CookieSecret::default(), Cookies::default());
    let public = side_secret(B).public();
    let mut sent = message(1);
    cookies.complete_initiation(&mut sent, public, now);
    let mut rng = ChaCha20Rng::seed_from_u64(3);
    let reply = secret.reply(&CookieKey::new(&public), from, &sent, &mut rng, now);
    cookies.take(&reply, now).unwrap();
    (secret, cookies)
}

fn bears_mac2(message: &[u8]) -> bool {
    message[message.len() - 16..] != [0; 16]
}

/// The messages of one type that a side sent, oldest first.
fn sent(pair: &Pair, by: usize, kind: u8) -> Vec<&[u8]> {
    pair.log.iter().filter(|d| d.to == 1 - by && d.bytes[0] == kind).map(|d| &d.bytes[..]).collect()
}

#[test]
fn promise_6_a_cookie_is_bound_to_address_and_port() {
    let now = epoch().instant;
    for own in ["10.0.0.1:51820", "[fd00::1]:51820"] {
        let own: SocketAddr = own.parse().unwrap();
        let (secret, mut cookies) = proven(own, now);
        let mut message = message(2);
        cookies.complete_initiation(&mut message, side_secret(B).public(), now);
        assert!(secret.is_proven(own, &message, now));
        let others =
            ["10.0.0.2:51820", "10.0.0.1:51821", "10.0.0.1:108", "[fd00::2]:51820", "[fd00::1]:51821"];
        for other in others {
            assert!(!secret.is_proven(other.parse().unwrap(), &message, now), "{own} as {other}");
        }
    }
}

#[test]
fn promise_6_a_cookie_ends_with_its_secret() {
    let (start, from) = (epoch().instant, address(A));
    let (mut secret, mut cookies) = proven(from, start);
    let mut message = message(2);
    cookies.complete_initiation(&mut message, side_secret(B).public(), start);
    assert!(secret.is_proven(from, &message, start + secs(120) - ms(1)));
    assert!(!secret.is_proven(from, &message, start + secs(120)));
    let mut rng = ChaCha20Rng::seed_from_u64(4);
    let later = start + secs(121);
    let key = CookieKey::new(&side_secret(B).public());
    let reply = secret.reply(&key, from, &message, &mut rng, later);
    assert!(!secret.is_proven(from, &message, later), "the next secret is another one");
    cookies.take(&reply, later).unwrap();
    cookies.complete_initiation(&mut message, side_secret(B).public(), later);
    assert!(secret.is_proven(from, &message, later));
}

#[test]
fn responder_that_gave_no_cookie_takes_no_mac2() {
    let (_, mut cookies) = proven(address(A), epoch().instant);
    let mut message = message(2);
    cookies.complete_initiation(&mut message, side_secret(B).public(), epoch().instant);
    assert!(!CookieSecret::default().is_proven(address(A), &message, epoch().instant));
}

proptest! {
    #[test]
    fn mac2_covers_the_whole_message_and_mac1(at in 0usize..INITIATION_LEN, bit in 0u8..8) {
        let now = epoch().instant;
        let (secret, mut cookies) = proven(address(A), now);
        let mut message = message(2);
        cookies.complete_initiation(&mut message, side_secret(B).public(), now);
        message[at] ^= 1 << bit;
        prop_assert!(!secret.is_proven(address(A), &message, now));
    }

    #[test]
    fn mac2_equals_another_construction(secret in any::<[u8; 32]>(), v4 in any::<[u8; 4]>(), port in any::<u16>()) {
        let public = side_secret(B).public();
        let from = SocketAddr::from((v4, port));
        let mac = |key: &[u8], data: &[u8]| -> [u8; 16] {
            let mac = <Blake2sMac<U16> as KeyInit>::new_from_slice(key).unwrap();
            mac.chain_update(data).finalize_fixed().into()
        };
        let (mut cookies, mut message) = (Cookies::default(), message(2));
        cookies.complete_initiation(&mut message, public, epoch().instant);
        let reply = CookieKey::new(&public).seal(&Cookie::of(&secret, from), &message, [9; 24]);
        cookies.take(&reply, epoch().instant).unwrap();
        cookies.complete_initiation(&mut message, public, epoch().instant);
        let cookie = mac(&secret, &[&v4[..], &port.to_be_bytes()].concat());
        prop_assert_eq!(&message[132..], &mac(&cookie, &message[..132]));
    }
}

/// B is under load and asked A for a cookie; the reply is taken off the wire.
fn asked() -> (Pair, Vec<u8>) {
    let mut pair = Pair::new(&Options::default());
    load(&mut pair, B);
    pair.begin(A);
    let initiation = pair.intercept().bytes;
    assert_eq!(pair.deliver(B, &initiation), Err(DropReason::CookieMissing));
    let reply = pair.intercept().bytes;
    assert_eq!(reply.len(), COOKIE_LEN);
    assert!(reply.len() < initiation.len(), "nobody gets more than was sent in its name");
    (pair, reply)
}

#[test]
fn cookie_reply_sends_nothing_and_the_next_retry_bears_mac2() {
    let (mut pair, reply) = asked();
    let before = pair.sides[A].transport.poll_timeout();
    assert_eq!(pair.deliver(A, &reply), Ok(Received::Handshake));
    assert!(pair.is_wire_empty());
    assert_eq!(pair.sides[A].transport.poll_timeout(), before);
    pair.run(ms(400));
    let initiations = sent(&pair, A, 1);
    assert_eq!(pair.sides[A].sent_at(1), [ms(0), ms(250)]);
    assert!(bears_mac2(initiations[0]));
    assert!(pair.can_send(A) && pair.can_send(B));
}

#[test]
fn promise_6_forged_cookie_replies_change_nothing() {
    let (mut pair, reply) = asked();
    for at in 8..COOKIE_LEN {
        let mut forged = reply.clone();
        forged[at] ^= 1;
        assert_eq!(pair.deliver(A, &forged), Err(DropReason::HandshakeInvalid));
    }
    let mut other = reply.clone();
    other[4] ^= 1;
    assert_eq!(pair.deliver(A, &other), Err(DropReason::IndexUnknown));
    let elsewhere = SocketAddr::new(address(B).ip(), PORT + 1);
    assert_eq!(pair.deliver_from(A, elsewhere, &reply), Err(DropReason::OuterSource));
    assert_eq!(pair.deliver(A, &reply), Ok(Received::Handshake), "the true one still counts");
}

#[test]
fn promise_6_a_replayed_cookie_reply_changes_nothing() {
    let (mut pair, reply) = asked();
    pair.deliver(A, &reply).unwrap();
    assert_eq!(pair.deliver(A, &reply), Err(DropReason::IndexUnknown));
    // Neither one of an earlier initiation, nor one of a handshake that is over.
    pair.run(ms(240));
    load(&mut pair, B);
    pair.run(ms(20));
    assert_eq!(pair.deliver(A, &reply), Err(DropReason::IndexUnknown));
    pair.run(ms(200));
    assert!(pair.can_send(A) && pair.can_send(B));
    assert_eq!(pair.deliver(A, &reply), Err(DropReason::IndexUnknown));
}

#[test]
fn cookie_reply_to_an_answered_initiation_is_dropped() {
    let mut pair = Pair::new(&Options::default());
    pair.begin(A);
    let initiation = pair.intercept().bytes;
    pair.deliver(B, &initiation).unwrap();
    load(&mut pair, B);
    pair.deliver(B, &initiation).unwrap_err();
    let (response, reply) = (pair.intercept().bytes, pair.intercept().bytes);
    assert_eq!((response[0], reply[0]), (2, 3));
    pair.deliver(A, &response).unwrap();
    assert_eq!(pair.deliver(A, &reply), Err(DropReason::IndexUnknown));
    pair.run(ms(50));
    assert!(pair.can_send(B));
}

#[test]
fn cookie_reply_answers_the_message_whose_index_it_bears_once() {
    let (now, public) = (epoch().instant, side_secret(B).public());
    let (mut cookies, mut initiation) = (Cookies::default(), message(1));
    let mut response = [2; RESPONSE_LEN];
    remac(&mut response, &public);
    cookies.complete_initiation(&mut initiation, public, now);
    cookies.complete_response(&mut response, public, now);
    let cookie = || Cookie::of(&[7; 32], address(A));
    let [to_response, to_initiation, to_none] = [&response[..], &initiation[..], &message(3)[..]]
        .map(|message| CookieKey::new(&public).seal(&cookie(), message, [9; 24]));
    for reply in [to_response, to_initiation] {
        assert_eq!((cookies.expects(&reply), cookies.take(&reply, now)), (Ok(()), Ok(())));
        let again = (cookies.expects(&reply), cookies.take(&reply, now));
        assert_eq!(again, (Err(DropReason::IndexUnknown), Err(DropReason::IndexUnknown)));
    }
    assert_eq!(cookies.expects(&to_none), Err(DropReason::IndexUnknown));
}

#[test]
fn promise_6_no_cookie_reply_moves_an_endpoint_even_when_peers_roam() {
    let mut pair = Pair::new(&Options { roaming: true, ..Options::default() });
    load(&mut pair, B);
    pair.begin(A);
    let initiation = pair.intercept().bytes;
    pair.deliver(B, &initiation).unwrap_err();
    let reply = pair.intercept().bytes;
    pair.deliver_from(A, "192.0.2.1:9".parse().unwrap(), &reply).unwrap();
    pair.run(ms(300));
    assert!(pair.strays[A].is_empty() && pair.can_send(B));
}

#[test]
fn cookie_is_used_for_two_minutes() {
    let (mut pair, reply) = asked();
    pair.cut = [true; 2];
    pair.deliver(A, &reply).unwrap();
    for _ in 0..13 {
        pair.run(secs(10));
        pair.begin(A);
    }
    let initiations: Vec<_> = sent(&pair, A, 1).into_iter().map(bears_mac2).collect();
    let at = pair.sides[A].sent_at(1);
    assert!(at.len() > 20 && *at.last().unwrap() > COOKIE_LIFE);
    // The first one was taken off the wire.
    for (at, bears) in at[1..].iter().zip(initiations) {
        assert_eq!(bears, *at < COOKIE_LIFE, "at {at:?}");
    }
}

#[test]
fn handshake_with_a_responder_under_load_takes_one_more_round_trip() {
    let mut pair = Pair::new(&Options::default());
    load(&mut pair, B);
    pair.send(A, b"first");
    pair.run(ms(300));
    assert_eq!(pair.sides[B].received, [b"first"]);
    assert_eq!((pair.sides[A].sent_at(1).len(), pair.sides[B].sent_at(3).len()), (2, 1));
    assert_eq!(pair.sides[B].sent_at(2), [ms(260)]);
    assert_eq!(pair.sides[B].drops, [DropReason::CookieMissing]);
}

#[test]
fn handshake_with_an_initiator_under_load_takes_one_more_round_trip() {
    let mut pair = Pair::new(&Options::default());
    load(&mut pair, A);
    pair.send(A, b"first");
    pair.run(ms(300));
    assert_eq!(pair.sides[B].received, [b"first"]);
    assert_eq!((pair.sides[A].sent_at(3).len(), pair.sides[B].sent_at(2).len()), (1, 2));
    let responses: Vec<_> = sent(&pair, B, 2).into_iter().map(bears_mac2).collect();
    assert_eq!(responses, [false, true]);
}

#[test]
fn handshake_between_two_under_load_takes_two_more_round_trips() {
    let mut pair = Pair::new(&Options::default());
    load(&mut pair, A);
    load(&mut pair, B);
    pair.send(A, b"first");
    pair.run(ms(600));
    assert_eq!(pair.sides[B].received, [b"first"]);
    assert_eq!(pair.sides[A].sent_at(1).len(), 3);
}

#[test]
fn each_of_our_keys_seals_its_own_cookie_replies() {
    let (old, new) = (secret(0x31), secret(0x32));
    let now = epoch();
    let own = |secret: &StaticSecret| Identity { address: address(B).ip(), secret: secret.clone() };
    let mut responder =
        Transport::new(vec![own(&new), own(&old)], Options::default(), ChaCha20Rng::seed_from_u64(5));
    (0..=512).for_each(|_| responder.limits.note(now.instant));
    for secret in [old, new] {
        let mut asking = transport(A, &Options::default());
        let keys = PeerKeys { public: secret.public(), psk: psk() };
        let id = asking.add_peer(PeerConfig { keys, ..config(B) }, now);
        asking.begin(id, now);
        let (_, mut initiation) = asking.poll_transmit().unwrap();
        assert_eq!(responder.handle(address(A), &mut initiation, now), Err(DropReason::CookieMissing));
        let (to, mut reply) = responder.poll_transmit().unwrap();
        assert_eq!((to, asking.handle(address(B), &mut reply, now)), (address(A), Ok(Received::Handshake)));
    }
}

#[test]
fn response_to_the_accepted_key_can_be_answered_with_a_cookie() {
    // B begins with a key that A only accepts, and is under load when A's response comes.
    let (used, accepted) = (secret(0x41), secret(0x42));
    let now = epoch();
    let keys = |secret: &StaticSecret| PeerKeys { public: secret.public(), psk: psk() };
    let mut answering = transport(A, &Options::default());
    answering.add_peer(PeerConfig { keys: keys(&used), accept: Some(keys(&accepted)), ..config(B) }, now);
    let identity = Identity { address: address(B).ip(), secret: accepted };
    let mut asking = Transport::new(vec![identity], Options::default(), ChaCha20Rng::seed_from_u64(6));
    let id = asking.add_peer(config(A), now);
    asking.begin(id, now);
    (0..=512).for_each(|_| asking.limits.note(now.instant));
    let (_, mut initiation) = asking.poll_transmit().unwrap();
    answering.handle(address(B), &mut initiation, now).unwrap();
    let (_, mut response) = answering.poll_transmit().unwrap();
    assert_eq!(asking.handle(address(A), &mut response, now), Err(DropReason::CookieMissing));
    let (_, mut reply) = asking.poll_transmit().unwrap();
    assert_eq!(answering.handle(address(B), &mut reply, now), Ok(Received::Handshake));
}
