//! Making a session: who may send when, retries, silence, crossing, time stamps, unknown peers.

use proptest::prelude::*;
use rand::SeedableRng;
use rand_chacha::ChaCha20Rng;

use super::super::*;
use super::pair::*;

#[test]
fn data_flows_both_ways_after_one_round_trip() {
    let mut pair = Pair::new(&Options::default());
    pair.send(A, b"ping");
    pair.run(ms(30));
    assert_eq!(pair.sides[B].received, [b"ping"]);
    pair.send(B, b"pong");
    pair.run(ms(10));
    assert_eq!(pair.sides[A].received, [b"pong"]);
    assert_eq!((pair.sides[A].sent_at(1).len(), pair.sides[B].sent_at(2).len()), (1, 1));
}

#[test]
fn same_seed_gives_the_same_messages() {
    let now = epoch();
    let messages = |seed| {
        let identity = Identity { address: address(A).ip(), secret: side_secret(A) };
        let rng = ChaCha20Rng::seed_from_u64(seed);
        let mut transport = Transport::new(vec![identity], Options::default(), rng);
        let peer = transport.add_peer(config(B), now);
        transport.begin(peer, now);
        transport.handle_timeout(Now { instant: now.instant + ms(250), wall: now.wall + ms(250) });
        std::iter::from_fn(|| transport.poll_transmit()).collect::<Vec<_>>()
    };
    let first = messages(1);
    assert_eq!(first.len(), 2);
    assert_ne!(first[0].1[4..40], first[1].1[4..40], "a retry has its own index and ephemeral key");
    assert_eq!(first, messages(1), "no randomness but the generator's");
    assert_ne!(first, messages(2));
}

#[test]
fn responder_sends_nothing_before_the_initiators_first_message() {
    let mut pair = Pair::new(&Options::default());
    pair.begin(A);
    pair.run(ms(25));
    assert!(pair.can_send(A) && !pair.can_send(B));
    assert!(pair.seal(B, b"early").is_none());
    pair.run(ms(10));
    assert!(pair.can_send(B));
    let (id, side) = (pair.sides[B].peer, &pair.sides[B]);
    assert_eq!(side.events, [Event::Established(id)]);
}

#[test]
fn initiator_confirms_at_once_when_it_has_no_data() {
    let mut pair = Pair::new(&Options::default());
    pair.begin(A);
    pair.run(ms(30));
    assert_eq!(pair.sides[B].keepalives, 1);
    assert_eq!(pair.sides[A].sent_at(4), [ms(20)]);
}

#[test]
fn staged_data_takes_the_place_of_the_confirming_keepalive() {
    let mut pair = Pair::new(&Options::default());
    pair.send(A, b"first");
    pair.run(secs(5));
    assert_eq!((pair.sides[B].keepalives, pair.sides[B].received.len()), (0, 1));
}

#[test]
fn response_counts_once() {
    let mut pair = Pair::established(&Options::default());
    let response = pair.log.iter().find(|d| d.bytes[0] == 2).unwrap().bytes.clone();
    assert_eq!(pair.deliver(A, &response), Err(DropReason::IndexUnknown));
    let id = pair.sides[A].peer;
    assert_eq!(pair.sides[A].count(Event::Established(id)), 1);
    pair.send(A, b"still the same session");
    pair.run(ms(20));
    assert_eq!(pair.sides[B].received.len(), 1);
}

#[test]
fn lost_initiation_is_repeated_after_a_quarter_second_then_at_growing_distance() {
    let mut pair = Pair::new(&Options::default());
    pair.cut = [true, true];
    pair.begin(A);
    pair.run(secs(200));
    let sent = pair.sides[A].sent_at(1);
    assert_eq!(sent[..6], [ms(0), ms(250), ms(500), ms(1000), ms(2000), ms(5000)]);
    for pair in sent[5..].windows(2) {
        let distance = pair[1] - pair[0];
        assert!((secs(5)..=ms(5333)).contains(&distance), "{distance:?}");
    }
    assert!(sent.windows(3).skip(5).any(|three| three[2] - three[1] != three[1] - three[0]), "no jitter");
    let last = *sent.last().unwrap();
    assert!((secs(84)..secs(90)).contains(&last), "{last:?}");
    assert_eq!(pair.sides[A].transport.shared.indices.len(), 0);
    assert_eq!(pair.sides[A].transport.poll_timeout(), None);
}

#[test]
fn wanting_a_session_again_extends_the_attempt_and_sends_nothing_extra() {
    let mut pair = Pair::new(&Options::default());
    pair.cut = [true, true];
    pair.begin(A);
    pair.run(secs(60));
    let before = pair.sides[A].sent.len();
    (0..100).for_each(|_| pair.begin(A));
    assert_eq!(pair.sides[A].sent.len(), before);
    pair.run(secs(200));
    let last = *pair.sides[A].sent_at(1).last().unwrap();
    assert!((secs(144)..secs(150)).contains(&last), "{last:?}");
}

#[test]
fn peer_is_reported_silent_three_seconds_after_a_session_was_wanted() {
    let mut pair = Pair::new(&Options::default());
    let silent = Event::Silent(pair.sides[A].peer);
    pair.cut = [true, true];
    pair.begin(A);
    pair.run(ms(2999));
    assert_eq!(pair.sides[A].count(silent), 0);
    pair.run(ms(1));
    assert_eq!(pair.sides[A].count(silent), 1);
    pair.run(secs(20));
    assert_eq!(pair.sides[A].count(silent), 1, "once per want");
    pair.begin(A);
    pair.run(secs(3));
    assert_eq!(pair.sides[A].count(silent), 2);
}

#[test]
fn silent_peer_is_reached_as_soon_as_it_is_back() {
    let mut pair = Pair::new(&Options::default());
    pair.cut = [true, true];
    pair.begin(A);
    pair.run(secs(30));
    pair.cut = [false, false];
    pair.send(B, b"hello");
    pair.run(ms(100));
    assert_eq!(pair.sides[A].received, [b"hello"]);
    assert!(pair.can_send(A));
}

#[test]
fn crossed_initiations_end_in_one_session() {
    let mut pair = Pair::new(&Options::default());
    pair.send(A, b"from a");
    pair.send(B, b"from b");
    pair.run(ms(200));
    assert_eq!(pair.sides[A].received, [b"from b"]);
    assert_eq!(pair.sides[B].received, [b"from a"]);
    let responses = [A, B].map(|side| pair.sides[side].sent_at(2).len());
    assert_eq!((responses[winner()], responses[1 - winner()]), (0, 1));
    pair.run(secs(1));
    let initiations = pair.sides[A].sent_at(1).len() + pair.sides[B].sent_at(1).len();
    assert_eq!(initiations, 2, "nobody retries");
    for side in [A, B] {
        assert_eq!(pair.sides[side].transport.shared.indices.len(), 1);
    }
}

#[test]
fn initiation_is_answered_when_our_own_was_lost() {
    let mut pair = Pair::new(&Options::default());
    let (winner, loser) = (winner(), 1 - winner());
    pair.cut[loser] = true;
    pair.begin(winner);
    pair.run(ms(240));
    pair.cut[loser] = false;
    pair.send(loser, b"hello");
    pair.run(ms(300));
    assert_eq!(pair.sides[winner].received, [b"hello"]);
}

#[test]
fn crossed_initiations_end_in_a_session_where_only_one_can_be_answered() {
    let mut pair = Pair::new(&Options::default());
    let (winner, loser) = (winner(), 1 - winner());
    // There the winner's time stamps are of the far future.
    pair.behind[loser] = secs(601);
    pair.send(winner, b"from the winner");
    pair.send(loser, b"from the loser");
    pair.run(ms(300));
    assert!(pair.sides[loser].drops.contains(&DropReason::ClockSkew));
    assert_eq!(pair.sides[loser].received, [b"from the winner"]);
    assert_eq!(pair.sides[winner].received, [b"from the loser"]);
}

#[test]
fn what_a_probe_asks_is_not_asked_again_at_once() {
    let mut pair = Pair::new(&Options::default());
    let Side { transport, peer, .. } = &mut pair.sides[A];
    transport.probe(*peer, pair.now);
    pair.run(ms(5));
    pair.send(A, b"hello");
    pair.run(ms(100));
    assert_eq!(pair.sides[B].received, [b"hello"]);
    assert_eq!(pair.sides[A].sent_at(1).len(), 1);
    // Lost, it is asked again by the retry.
    let mut pair = Pair::new(&Options::default());
    let Side { transport, peer, .. } = &mut pair.sides[A];
    transport.probe(*peer, pair.now);
    pair.cut[B] = true;
    pair.send(A, b"hello");
    pair.run(ms(100));
    pair.cut[B] = false;
    pair.run(ms(200));
    assert_eq!(pair.sides[B].received, [b"hello"]);
}

#[test]
fn responder_whose_session_is_not_confirmed_initiates_itself() {
    let mut pair = Pair::new(&Options::default());
    pair.begin(A);
    pair.run(ms(15));
    pair.cut[B] = true;
    pair.send(B, b"waits");
    pair.run(ms(100));
    assert_eq!(pair.sides[B].sent_at(1).len(), 0);
    pair.cut[B] = false;
    pair.run(ms(300));
    assert_eq!(pair.sides[B].sent_at(1).len(), 1);
    assert_eq!(pair.sides[A].received, [b"waits"]);
}

#[test]
fn replayed_initiation_is_refused() {
    let mut pair = Pair::established(&Options::default());
    let initiation = pair.log.iter().find(|d| d.bytes[0] == 1).unwrap().bytes.clone();
    pair.run(secs(1));
    assert_eq!(pair.deliver(B, &initiation), Err(DropReason::HandshakeReplay));
    assert!(pair.is_wire_empty());
}

#[test]
fn clock_that_went_back_still_gives_later_time_stamps() {
    let mut pair = Pair::new(&Options::default());
    pair.cut[A] = true;
    pair.begin(A);
    pair.run(ms(100));
    pair.now.wall -= secs(300);
    pair.run(ms(200));
    assert_eq!(pair.sides[A].sent_at(1).len(), 2);
    assert_eq!((pair.sides[B].drops.len(), pair.sides[B].sent_at(2).len()), (0, 2));
}

#[test]
fn time_stamp_of_the_far_future_is_refused_and_locks_nobody_out() {
    let mut pair = Pair::new(&Options::default());
    let mut fast = transport(A, &Options::default());
    let peer = fast.add_peer(config(B), pair.now);
    let mut future = pair.now;
    future.wall += secs(601);
    fast.begin(peer, future);
    let (_, message) = fast.poll_transmit().unwrap();
    assert_eq!(pair.deliver(B, &message), Err(DropReason::ClockSkew));
    pair.send(A, b"right time");
    pair.run(ms(100));
    assert_eq!(pair.sides[B].received, [b"right time"]);
}

#[test]
fn time_stamp_of_the_near_future_is_accepted() {
    for ahead in [1, 599, 600] {
        let mut pair = Pair::new(&Options::default());
        let mut fast = transport(A, &Options::default());
        let peer = fast.add_peer(config(B), pair.now);
        let mut future = pair.now;
        future.wall += secs(ahead);
        fast.begin(peer, future);
        let (_, message) = fast.poll_transmit().unwrap();
        assert_eq!(pair.deliver(B, &message), Ok(Received::Handshake), "{ahead} s");
    }
}

#[test]
fn initiations_of_a_peer_are_consumed_at_most_every_20_ms() {
    let mut pair = Pair::new(&Options::default());
    let fresh = |pair: &Pair| {
        let mut transport = transport(A, &Options::default());
        let peer = transport.add_peer(config(B), pair.now);
        transport.begin(peer, pair.now);
        transport.poll_transmit().unwrap().1
    };
    let message = fresh(&pair);
    assert_eq!(pair.deliver(B, &message), Ok(Received::Handshake));
    pair.advance_to(pair.now.instant + ms(19));
    let message = fresh(&pair);
    assert_eq!(pair.deliver(B, &message), Err(DropReason::HandshakeFlood));
    pair.advance_to(pair.now.instant + ms(1));
    assert_eq!(pair.deliver(B, &message), Ok(Received::Handshake), "a refused stamp was not stored");
}

#[test]
fn of_initiations_that_are_read_together_the_newest_gives_the_session() {
    let mut pair = Pair::new(&Options::default());
    let latency = std::mem::replace(&mut pair.link.latency, secs(60));
    pair.send(A, b"waits");
    pair.run(ms(1100));
    pair.link.latency = latency;
    let unread = [(); 4].map(|()| pair.intercept().bytes);
    assert!(pair.is_wire_empty());
    for message in unread {
        assert_eq!(pair.deliver(B, &message), Ok(Received::Handshake));
    }
    pair.run(ms(50));
    assert_eq!(pair.sides[B].received, [b"waits"]);
}

#[test]
fn stamp_that_a_former_agent_made_by_a_wrong_clock_is_not_held_to() {
    let mut pair = Pair::new(&Options::default());
    pair.sides[A].transport.raise_stamp(Duration::MAX);
    pair.send(A, b"right time");
    pair.run(secs(5));
    assert_eq!(pair.sides[B].received, [b"right time"]);
}

#[test]
fn other_preshared_key_gives_no_session() {
    let mut pair = Pair::new(&Options::default());
    pair.sides[B].transport.remove_peer(pair.sides[B].peer);
    let other = PeerConfig { keys: PeerKeys { psk: PresharedKey([1; 32]), ..config(A).keys }, ..config(A) };
    pair.sides[B].peer = pair.sides[B].transport.add_peer(other, pair.now);
    pair.send(A, b"secret");
    pair.run(secs(10));
    assert!(!pair.can_send(A) && !pair.can_send(B));
    assert!(pair.sides[A].drops.iter().all(|reason| *reason == DropReason::HandshakeInvalid));
    assert_eq!(pair.sides[A].sent_at(4).len(), 0);
}

#[test]
fn initiation_of_an_unknown_key_is_answered_once_the_directory_names_it() {
    let mut pair = Pair::new(&Options::default());
    pair.sides[B].transport.remove_peer(pair.sides[B].peer);
    pair.send(A, b"early bird");
    pair.run(ms(700));
    assert_eq!(pair.sides[B].drops, [DropReason::PeerUnknown; 3]);
    pair.sides[B].peer = pair.sides[B].transport.add_peer(config(A), pair.now);
    let (to, response) = pair.sides[B].transport.poll_transmit().expect("an answer");
    assert_eq!(to, address(A));
    pair.deliver(A, &response).unwrap();
    pair.run(ms(50));
    assert_eq!(pair.sides[B].received, [b"early bird"], "the newest initiation was answered");
}

#[test]
fn kept_initiation_is_worthless_after_five_seconds() {
    let mut pair = Pair::new(&Options::default());
    pair.sides[B].transport.remove_peer(pair.sides[B].peer);
    pair.begin(A);
    pair.run(ms(100));
    pair.cut[B] = true;
    pair.run(secs(5));
    pair.sides[B].peer = pair.sides[B].transport.add_peer(config(A), pair.now);
    assert_eq!(pair.sides[B].transport.poll_transmit(), None);
}

#[test]
fn initiations_of_sixteen_unknown_keys_are_kept() {
    let now = epoch();
    let mut server = transport(B, &Options::default());
    let client = |n: u8| PeerConfig {
        address: [10, 0, 1, n].into(),
        port: PORT,
        keys: PeerKeys { public: secret(100 + n).public(), psk: psk() },
        accept: None,
    };
    for n in 0..17 {
        let identity = Identity { address: client(n).address, secret: secret(100 + n) };
        let rng = ChaCha20Rng::seed_from_u64(n.into());
        let mut transport = Transport::new(vec![identity], Options::default(), rng);
        let peer = transport.add_peer(config(B), now);
        transport.begin(peer, now);
        let (_, mut message) = transport.poll_transmit().unwrap();
        let from = SocketAddr::new(client(n).address, PORT);
        assert_eq!(server.handle(from, &mut message, now), Err(DropReason::PeerUnknown));
    }
    for n in 0..17 {
        server.add_peer(client(n), now);
        assert_eq!(server.poll_transmit().is_some(), n > 0, "{n}: the oldest made room");
    }
}

#[test]
fn every_identity_of_a_family_responds_and_the_first_initiates() {
    let now = epoch();
    let identity = |n| Identity { address: address(B).ip(), secret: secret(n) };
    let rng = ChaCha20Rng::seed_from_u64(9);
    let mut server = Transport::new(vec![identity(50), identity(51)], Options::default(), rng);
    let at_server = server.add_peer(config(A), now);
    for (n, wait) in [(51, 0), (50, 1)] {
        let now = Now { instant: now.instant + secs(wait), wall: now.wall + secs(wait) };
        let mut client = transport(A, &Options::default());
        let peer = client.add_peer(
            PeerConfig { keys: PeerKeys { public: secret(n).public(), psk: psk() }, ..config(B) },
            now,
        );
        client.begin(peer, now);
        let (_, mut message) = client.poll_transmit().unwrap();
        assert_eq!(server.handle(address(A), &mut message, now), Ok(Received::Handshake));
        let (_, mut response) = server.poll_transmit().unwrap();
        assert_eq!(client.handle(address(B), &mut response, now), Ok(Received::Handshake));
    }
    let later = Now { instant: now.instant + secs(9), wall: now.wall + secs(9) };
    server.begin(at_server, later);
    let (_, message) = server.poll_transmit().unwrap();
    let mut client = transport(A, &Options::default());
    client.add_peer(
        PeerConfig { keys: PeerKeys { public: secret(50).public(), psk: psk() }, ..config(B) },
        later,
    );
    assert_eq!(client.handle(address(B), &mut message.clone(), later), Ok(Received::Handshake));
}

#[test]
fn both_families_have_sessions_of_their_own_under_one_static_key() {
    let now = epoch();
    let six = |n: u16| IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, n]);
    let make = |side: usize, n: u16| {
        let identities =
            [address(side).ip(), six(n)].map(|address| Identity { address, secret: side_secret(side) });
        Transport::new(identities.into(), Options::default(), ChaCha20Rng::seed_from_u64(side as u64))
    };
    let (mut a, mut b) = (make(A, 1), make(B, 2));
    let a4 = b.add_peer(config(A), now);
    let a6 = b.add_peer(PeerConfig { address: six(1), ..config(A) }, now);
    for (peer, from) in
        [(config(B), address(A)), (PeerConfig { address: six(2), ..config(B) }, (six(1), PORT).into())]
    {
        let id = a.add_peer(peer, now);
        a.begin(id, now);
        let (to, mut message) = a.poll_transmit().unwrap();
        assert_eq!(b.handle(from, &mut message, now), Ok(Received::Handshake));
        let (_, mut response) = b.poll_transmit().unwrap();
        assert_eq!(a.handle(to, &mut response, now), Ok(Received::Handshake));
        a.handle_timeout(now);
        let (_, mut keepalive) = a.poll_transmit().unwrap();
        let expected = if from.is_ipv4() { a4 } else { a6 };
        assert_eq!(b.handle(from, &mut keepalive, now), Ok(Received::Keepalive(expected)));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn handshake_survives_loss_reordering_and_duplication(
        loss_percent in 0u32..45,
        duplicate_percent in 0u32..30,
        latency in 0u64..400,
        reorder in 0u64..100,
        b_starts_after in 0u64..600,
    ) {
        let mut pair = Pair::new(&Options::default());
        let (latency, reorder) = (ms(latency), ms(reorder));
        pair.link = Link { latency, reorder, loss_percent, duplicate_percent, ..Link::GOOD };
        pair.begin(A);
        pair.run(ms(b_starts_after));
        pair.begin(B);
        pair.run(secs(80));
        pair.link.loss_percent = 0;
        pair.run(secs(8));
        pair.send(A, b"from a");
        pair.send(B, b"from b");
        pair.run(secs(2));
        prop_assert_eq!(&pair.sides[B].received, &[b"from a"]);
        prop_assert_eq!(&pair.sides[A].received, &[b"from b"]);
    }
}

/// Both sides of a rotation, one step after the other on each: `use` and `accept` of the two project keys.
#[test]
fn promise_7_a_key_rotation_meets_every_combination_of_its_steps() {
    let key = |side: usize, n: u8| secret(100 + 10 * u8::try_from(side).unwrap() + n);
    let keys = |side: usize, n: u8| PeerKeys { public: key(side, n).public(), psk: PresharedKey([n; 32]) };
    // Old alone, new accepted, swapped, new alone.
    let steps: [&[u8]; 4] = [&[1], &[1, 2], &[2, 1], &[2]];
    for (a, b) in [(0, 0), (1, 0), (0, 1), (1, 1), (2, 1), (1, 2), (2, 2), (3, 2), (2, 3), (3, 3)] {
        let side = |side: usize, step: usize| {
            let identities =
                steps[step].iter().map(|n| Identity { address: address(side).ip(), secret: key(side, *n) });
            let rng = ChaCha20Rng::seed_from_u64(side as u64);
            let mut transport = Transport::new(identities.collect(), Options::default(), rng);
            let mut known = steps[step].iter().map(|n| keys(1 - side, *n));
            let config = PeerConfig {
                address: address(1 - side).ip(),
                port: PORT,
                keys: known.next().unwrap(),
                accept: known.next(),
            };
            (transport.add_peer(config, epoch()), transport)
        };
        for first in [A, B] {
            let ((at_a, mut alice), (at_b, mut bob)) = (side(A, a), side(B, b));
            let now = epoch();
            let (asks, answers) = if first == A { (&mut alice, &mut bob) } else { (&mut bob, &mut alice) };
            let peer = if first == A { at_a } else { at_b };
            asks.begin(peer, now);
            let (_, mut initiation) = asks.poll_transmit().unwrap();
            assert_eq!(
                answers.handle(address(first), &mut initiation, now),
                Ok(Received::Handshake),
                "{a} {b}"
            );
            let (_, mut response) = answers.poll_transmit().unwrap();
            assert_eq!(
                asks.handle(address(1 - first), &mut response, now),
                Ok(Received::Handshake),
                "{a} {b}"
            );
            assert!(asks.seal(peer, now).is_some(), "{a} {b}");
        }
    }
    // Without the step between, the two ends do not meet: that is what the step is for.
    let alone = |side: usize, n: u8| {
        let identity = Identity { address: address(side).ip(), secret: key(side, n) };
        let mut transport =
            Transport::new(vec![identity], Options::default(), ChaCha20Rng::seed_from_u64(side as u64));
        let config =
            PeerConfig { address: address(1 - side).ip(), port: PORT, keys: keys(1 - side, n), accept: None };
        (transport.add_peer(config, epoch()), transport)
    };
    let ((peer, mut alice), (_, mut bob)) = (alone(A, 1), alone(B, 2));
    alice.begin(peer, epoch());
    let (_, mut initiation) = alice.poll_transmit().unwrap();
    assert_eq!(bob.handle(address(A), &mut initiation, epoch()), Err(DropReason::BadMac1));
}
