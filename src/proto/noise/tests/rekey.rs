//! Renewing and ending sessions: by time, by count, without loss; erasure at the hard limit.

use proptest::prelude::*;

use super::super::*;
use super::pair::*;

fn quick() -> Options {
    Options { rekey_after: secs(2), ..Options::default() }
}

/// Sends a numbered packet every `gap` from each of `senders`; returns how many each sent.
fn stream(pair: &mut Pair, senders: &[usize], time: Duration, gap: Duration) -> u32 {
    let end = pair.now.instant + time;
    let mut n = 0u32;
    while pair.now.instant < end {
        senders.iter().for_each(|side| pair.send(*side, &n.to_be_bytes()));
        n += 1;
        pair.run(gap);
    }
    pair.run(secs(1));
    n
}

/// Which of the first `n` numbers did not arrive exactly once.
fn lost_or_doubled(side: &Side, n: u32) -> Vec<u32> {
    let mut seen = vec![0; n as usize];
    for packet in &side.received {
        seen[u32::from_be_bytes(packet[..].try_into().unwrap()) as usize] += 1;
    }
    (0..n).filter(|number| seen[*number as usize] != 1).collect()
}

#[test]
fn initiator_renews_the_session_after_120_seconds_of_sending() {
    let mut pair = Pair::established(&Options::default());
    stream(&mut pair, &[A], secs(250), secs(1));
    let initiations = pair.sides[A].sent_at(1);
    assert_eq!(initiations.len(), 3, "{initiations:?}");
    for distance in initiations.windows(2).map(|pair| pair[1] - pair[0]) {
        assert!((secs(120)..secs(122)).contains(&distance), "{distance:?}");
    }
    assert_eq!(pair.sides[B].sent_at(1).len(), 0, "the responder does not");
    assert!(pair.sides[A].drops.is_empty() && pair.sides[B].drops.is_empty());
}

#[test]
fn initiator_that_only_receives_renews_the_session_after_165_seconds() {
    let options = Options { keepalive: secs(1000), ..Options::default() };
    let mut pair = Pair::established(&options);
    stream(&mut pair, &[B], secs(175), secs(1));
    let initiations = pair.sides[A].sent_at(1);
    assert_eq!(initiations.len(), 2);
    assert!((secs(165)..secs(167)).contains(&initiations[1]), "{initiations:?}");
    assert_eq!(pair.sides[A].received.len(), 175);
}

#[test]
fn rekey_loses_no_packet() {
    for (senders, latency, reorder) in [
        (&[A][..], 10, 0),
        (&[B][..], 10, 0),
        (&[A, B][..], 40, 0),
        (&[A, B][..], 40, 30),
        (&[A, B][..], 300, 0),
    ] {
        let mut pair = Pair::established(&quick());
        pair.link.latency = ms(latency);
        pair.link.reorder = ms(reorder);
        let n = stream(&mut pair, senders, secs(42), ms(5));
        let rekeys = pair.sides[A].sent_at(1).len() - 1;
        assert!(rekeys >= 15, "{rekeys} rekeys");
        for side in senders {
            assert_eq!(lost_or_doubled(&pair.sides[1 - side], n), [0_u32; 0]);
        }
        assert_eq!(pair.sides[B].sent_at(1).len(), 0, "the responder never had to ask");
    }
}

#[test]
fn at_every_step_of_a_rekey_each_side_opens_what_the_other_seals() {
    let mut pair = Pair::established(&quick());
    let exchange = |pair: &mut Pair| {
        for side in [A, B] {
            let record = pair.seal(side, b"heard").unwrap();
            pair.deliver(1 - side, &record).unwrap();
        }
    };
    pair.run(secs(3));
    exchange(&mut pair);
    let initiation = pair.intercept();
    pair.deliver(B, &initiation.bytes).unwrap();
    // The response is under way: B must hear the new keys from the moment on that A could have them.
    let response = pair.intercept();
    assert_eq!((initiation.bytes[0], response.bytes[0]), (1, 2));
    exchange(&mut pair);
    pair.deliver(A, &response.bytes).unwrap();
    let old = pair.seal(B, b"sealed before B knows").unwrap();
    exchange(&mut pair);
    pair.deliver(A, &old).unwrap();
    exchange(&mut pair);
    assert!(pair.sides.iter().all(|side| side.drops.is_empty()));
}

#[test]
fn promise_4_sessions_share_no_key_whatever_their_pair_or_direction() {
    let mut pair = Pair::new(&Options::default());
    let mut keys = std::collections::BTreeSet::new();
    for _ in 0..3 {
        pair.begin(A);
        pair.run(secs(1));
        let now = pair.now;
        let [a, b] = pair.sides.each_mut().map(|side| {
            let session = side.transport.export(side.peer, now).unwrap().current.unwrap();
            (*session.sealing.0, *session.opening.0)
        });
        assert_eq!((a.0, a.1), (b.1, b.0));
        keys.extend([a.0, a.1]);
    }
    assert_eq!(keys.len(), 6);
}

#[test]
fn rekey_whose_messages_are_lost_loses_no_packet() {
    let mut pair = Pair::established(&quick());
    for lost in 0..6 {
        pair.run(secs(2));
        let before = pair.sides.each_ref().map(|side| side.received.len());
        // The data that asks for the rekey arrives; of the handshake's three messages one is lost.
        pair.send(A, b"asks");
        for nth in 0..3 {
            let next = pair.intercept();
            if nth != lost % 3 || next.bytes.len() > 148 {
                pair.deliver(next.to, &next.bytes).unwrap();
            }
            pair.send(A, b"a");
            pair.send(B, b"b");
        }
        pair.run(secs(1));
        let after = pair.sides.each_ref().map(|side| side.received.len());
        assert!(after[A] - before[A] >= 3 && after[B] - before[B] >= 3, "{before:?} {after:?}");
        assert!(pair.sides.iter().all(|side| side.drops.is_empty()), "{:?}", pair.sides[A].drops);
    }
}

#[test]
fn initiators_of_both_sides_that_renew_at_once_converge() {
    let options = Options { rekey_after_messages: 50, ..Options::default() };
    let mut pair = Pair::established(&options);
    let n = stream(&mut pair, &[A, B], secs(20), ms(5));
    for side in [A, B] {
        let indices = pair.sides[side].transport.shared.indices.len();
        assert!(indices <= 3, "{indices}");
        let side = &pair.sides[side];
        assert_eq!(lost_or_doubled(side, n), [0_u32; 0], "{:?}", side.drops);
    }
    let handshakes = pair.sides[A].sent_at(1).len() + pair.sides[B].sent_at(1).len();
    assert!((60..200).contains(&handshakes), "{handshakes}");
}

#[test]
fn session_neither_seals_nor_opens_after_180_seconds() {
    let mut pair = Pair::established(&Options::default());
    let created = pair.start.instant + ms(20);
    pair.cut = [true, true];
    pair.advance_to(created + secs(180) - ms(1));
    let late = pair.seal(A, b"just in time").expect("a second left");
    let later = pair.seal(A, b"just in time").expect("a second left");
    pair.deliver(B, &late).unwrap_err();
    pair.advance_to(pair.now.instant + ms(1));
    assert!(pair.seal(A, b"too late").is_none());
    assert_eq!(pair.deliver(B, &later), Err(DropReason::SessionExpired));
}

#[test]
fn keys_are_erased_at_the_hard_limit() {
    let mut pair = Pair::established(&Options::default());
    pair.run(secs(181));
    for side in &mut pair.sides {
        assert_eq!(side.transport.shared.indices.len(), 0);
        assert_eq!(side.transport.peers.get_mut(side.peer).unwrap().keypairs.iter().count(), 0);
        assert_eq!(side.count(Event::Expired(side.peer)), 1);
        assert_eq!(side.transport.poll_timeout(), None, "an idle peer costs no wake-up");
    }
    pair.send(B, b"again");
    pair.run(ms(100));
    assert_eq!(pair.sides[A].received, [b"again"]);
}

#[test]
fn at_most_three_sessions_and_one_handshake_exist() {
    let mut pair = Pair::established(&quick());
    for _ in 0..40 {
        stream(&mut pair, &[A, B], secs(1), ms(50));
        for side in &pair.sides {
            assert!(side.transport.shared.indices.len() <= 4);
        }
    }
}

#[test]
fn counter_is_used_up_at_the_message_limit_and_never_used_twice() {
    let options = Options { rekey_after_messages: 1000, reject_after_messages: 40, ..Options::default() };
    let mut pair = Pair::new(&options);
    pair.begin(A);
    pair.run(ms(100));
    let (id, now) = (pair.sides[A].peer, pair.now);
    let mut sealer = pair.sides[A].transport.seal(id, now).unwrap();
    let counters: Vec<u64> = std::iter::from_fn(|| {
        let mut record = [0; 48];
        sealer.seal(&[7; 16], &mut record).ok()?;
        Some(u64::from_le_bytes(record[8..16].try_into().unwrap()))
    })
    .collect();
    assert_eq!(counters, (1..40).collect::<Vec<_>>(), "0 was the confirming keepalive");
    assert_eq!(sealer.seal(&[7; 16], &mut [0; 48]), Err(DropReason::SessionExpired));
    assert!(pair.sides[A].transport.seal(id, now).is_none());
    pair.send(A, b"needs a new session");
    pair.run(ms(100));
    assert_eq!(pair.sides[B].received, [b"needs a new session"]);
}

#[test]
fn last_counters_of_the_specification_are_neither_sealed_nor_opened() {
    const LIMIT: u64 = u64::MAX - (1 << 13);
    let mut pair = Pair::established(&Options::default());
    let side = &mut pair.sides[A];
    side.transport
        .peers
        .get_mut(side.peer)
        .unwrap()
        .keypairs
        .current
        .as_mut()
        .unwrap()
        .set_counter(LIMIT - 1);
    let last = pair.seal(A, b"last").unwrap();
    pair.deliver(B, &last).unwrap();
    assert!(pair.seal(A, b"one more").is_none());
    let mut beyond = last;
    beyond[8..16].copy_from_slice(&LIMIT.to_le_bytes());
    assert_eq!(pair.deliver(B, &beyond), Err(DropReason::SessionExpired));
    assert!(!pair.sides[A].sent_at(1).is_empty());
}

#[test]
fn message_of_the_replaced_session_is_opened_until_its_hard_limit() {
    let mut pair = Pair::established(&Options::default());
    let early = [A, B].map(|side| pair.seal(side, b"sealed before").unwrap());
    let late = [A, B].map(|side| pair.seal(side, b"sealed before").unwrap());
    stream(&mut pair, &[A, B], secs(130), secs(1));
    assert_eq!(pair.sides[A].sent_at(1).len(), 2);
    for side in [A, B] {
        pair.deliver(1 - side, &early[side]).unwrap();
    }
    pair.advance_to(pair.start.instant + secs(180) + ms(20));
    for side in [A, B] {
        assert_eq!(pair.deliver(1 - side, &late[side]), Err(DropReason::SessionExpired));
    }
}

#[test]
fn two_sessions_that_overtook_each_other_lose_nothing_and_end_in_one() {
    let mut pair = Pair::new(&Options::default());
    let (winner, loser) = (winner(), 1 - winner());
    pair.begin(winner);
    let slow = pair.intercept().bytes;
    pair.advance_to(pair.now.instant + ms(240));
    pair.begin(loser);
    let quick = pair.intercept().bytes;
    pair.advance_to(pair.now.instant + ms(10));
    pair.deliver(winner, &quick).unwrap();
    let to_loser = pair.intercept().bytes;
    pair.deliver(loser, &slow).unwrap();
    let to_winner = pair.intercept().bytes;
    pair.deliver(winner, &to_winner).unwrap();
    pair.deliver(loser, &to_loser).unwrap();
    assert!(pair.can_send(A) && pair.can_send(B));
    let n = stream(&mut pair, &[A, B], secs(400), ms(4));
    for side in &pair.sides {
        assert_eq!(lost_or_doubled(side, n), [0_u32; 0], "{:?}", side.drops);
    }
    let roles = [A, B].map(|side| {
        let Side { transport, peer, .. } = &mut pair.sides[side];
        transport.peers.get_mut(*peer).unwrap().keypairs.current.as_ref().unwrap().role
    });
    assert_ne!(roles[A], roles[B], "one session, one initiator");
}

#[test]
fn promise_5_a_clock_set_back_an_hour_rightly_or_wrongly_loses_no_packet() {
    for set_back in [&[A][..], &[B], &[A, B]] {
        let mut pair = Pair::new(&Options::default());
        // Crossed, so that each has seen a stamp of the other.
        pair.begin(A);
        pair.begin(B);
        pair.run(ms(200));
        set_back.iter().for_each(|side| pair.behind[*side] = secs(3600));
        let n = stream(&mut pair, &[A, B], secs(400), ms(500));
        for side in &pair.sides {
            assert_eq!(lost_or_doubled(side, n), [0_u32; 0], "{set_back:?}: {:?}", side.drops);
        }
    }
}

#[test]
fn restarted_peer_that_initiates_is_heard_at_once() {
    let mut pair = Pair::established(&Options::default());
    pair.run(secs(1));
    let mut fresh = transport(B, &Options::default());
    pair.sides[B].peer = fresh.add_peer(config(A), pair.now);
    pair.sides[B].transport = fresh;
    pair.send(B, b"back again");
    pair.run(ms(50));
    pair.send(A, b"welcome");
    pair.run(ms(50));
    assert_eq!(pair.sides[A].received, [b"back again"]);
    assert_eq!(pair.sides[B].received, [b"welcome"]);
}

#[test]
fn removed_peer_leaves_nothing_behind() {
    let mut pair = Pair::established(&Options::default());
    let late = pair.seal(B, b"late").unwrap();
    let (id, now) = (pair.sides[A].peer, pair.now);
    let transport = &mut pair.sides[A].transport;
    transport.begin(id, now);
    transport.remove_peer(id);
    assert_eq!(transport.shared.indices.len(), 0);
    assert_eq!(transport.poll_timeout(), None);
    transport.remove_peer(id);
    transport.begin(id, now);
    assert!(transport.seal(id, now).is_none());
    assert_eq!(pair.deliver(A, &late), Err(DropReason::IndexUnknown));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn what_the_wire_delivers_is_opened_through_every_rekey(
        loss_percent in 0u32..20,
        latency in 0u64..120,
        gap in 20u64..200,
    ) {
        let mut pair = Pair::established(&quick());
        pair.link.latency = ms(latency);
        pair.link.loss_percent = loss_percent;
        stream(&mut pair, &[A, B], secs(30), ms(gap));
        for side in [A, B] {
            prop_assert!(pair.sides[side].drops.iter().all(|reason| *reason == DropReason::IndexUnknown));
            let delivered = pair.log.iter().filter(|d| d.to == side && d.bytes[0] == 4).count();
            let opened = pair.sides[side].received.len() + pair.sides[side].keepalives;
            prop_assert_eq!(delivered, opened);
        }
    }
}

#[test]
fn each_suite_has_its_message_limits() {
    let limits = |suite| {
        let Options { rekey_after_messages, reject_after_messages, .. } = Options::of(suite);
        (rekey_after_messages, reject_after_messages)
    };
    assert_eq!(limits(Suite::ChaCha20Poly1305), (1 << 60, u64::MAX - (1 << 13)));
    assert_eq!(limits(Suite::Aes256Gcm), (1 << 24, 1 << 25));
}
