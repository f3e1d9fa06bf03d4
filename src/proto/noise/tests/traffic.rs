//! Data under a session: padding, keepalives, the no-reply rule, replay, outer source.

use super::super::*;
use super::pair::*;

#[test]
fn receiver_without_data_sends_one_keepalive_after_ten_seconds() {
    let mut pair = Pair::established(&Options::default());
    pair.send(A, b"one way");
    let at = pair.elapsed();
    pair.run(secs(60));
    assert_eq!(pair.sides[B].sent_at(4), [at + ms(10) + secs(10)]);
    assert_eq!(pair.sides[A].keepalives, 1);
    assert_eq!(pair.sides[A].sent_at(4).len(), 2, "a keepalive is not answered");
}

#[test]
fn data_takes_the_place_of_the_keepalive() {
    let mut pair = Pair::established(&Options::default());
    pair.send(A, b"question");
    pair.run(secs(9));
    pair.send(B, b"answer");
    pair.run(secs(9));
    assert_eq!(pair.sides[B].sent_at(4).len(), 1);
}

#[test]
fn idle_session_sends_nothing() {
    let mut pair = Pair::established(&Options::default());
    let before = pair.sides.each_ref().map(|side| side.sent.len());
    pair.run(secs(600));
    assert_eq!(pair.sides.each_ref().map(|side| side.sent.len()), before);
}

#[test]
fn sender_that_hears_nothing_for_15_seconds_makes_a_new_session() {
    let mut pair = Pair::established(&Options::default());
    pair.cut[B] = true;
    pair.send(A, b"into the void");
    let at = pair.elapsed();
    pair.run(secs(16));
    assert_eq!(pair.sides[A].sent_at(1)[1], at + secs(15));
    assert!(pair.can_send(A), "the old session lives on");
}

#[test]
fn anything_authentic_stops_the_no_reply_timer() {
    let mut pair = Pair::established(&Options::default());
    for _ in 0..20 {
        pair.send(A, b"one way");
        pair.run(secs(4));
    }
    assert_eq!(pair.sides[A].sent_at(1).len(), 1);
    assert!(pair.sides[A].keepalives >= 5);
}

#[test]
fn copy_of_a_data_message_is_dropped() {
    let mut pair = Pair::established(&Options::default());
    let record = pair.seal(A, b"once").unwrap();
    assert!(matches!(pair.deliver(B, &record), Ok(Received::Packet { .. })));
    assert_eq!(pair.deliver(B, &record), Err(DropReason::Replay));
    let keepalive = pair.log.iter().find(|d| d.bytes[0] == 4).unwrap().bytes.clone();
    assert_eq!(pair.deliver(B, &keepalive), Err(DropReason::Replay));
}

#[test]
fn message_exactly_8191_behind_is_opened_and_8192_behind_is_not() {
    let mut pair = Pair::established(&Options::default());
    let records: Vec<_> = (0..8193).map(|_| pair.seal(A, b"x").unwrap()).collect();
    pair.deliver(B, &records[8192]).unwrap();
    assert_eq!(pair.deliver(B, &records[0]), Err(DropReason::Replay));
    pair.deliver(B, &records[1]).unwrap();
    for record in records[2..8192].iter().rev() {
        pair.deliver(B, record).unwrap();
    }
    assert_eq!(pair.sides[B].received.len(), 8192);
}

#[test]
fn forged_counter_does_not_move_the_window() {
    let mut pair = Pair::established(&Options::default());
    let first = pair.seal(A, b"first").unwrap();
    let mut forged = pair.seal(A, b"second").unwrap();
    let second = forged.clone();
    forged[8..16].copy_from_slice(&1_000_000u64.to_le_bytes());
    assert_eq!(pair.deliver(B, &forged), Err(DropReason::BadTag));
    let mut flipped = second.clone();
    *flipped.last_mut().unwrap() ^= 1;
    assert_eq!(pair.deliver(B, &flipped), Err(DropReason::BadTag));
    pair.deliver(B, &second).unwrap();
    pair.deliver(B, &first).unwrap();
}

#[test]
fn record_is_header_ciphertext_tag_with_little_endian_fields() {
    let mut pair = Pair::established(&Options::default());
    let record = pair.seal(A, &[7; 40]).unwrap();
    assert_eq!(record.len(), HEADER_LEN + 48 + TAG_LEN);
    assert_eq!(record[..4], [4, 0, 0, 0]);
    assert_eq!(record[8..16], 1u64.to_le_bytes());
}

#[test]
fn record_of_another_length_is_refused_and_takes_no_counter() {
    let mut pair = Pair::established(&Options::default());
    let (id, now) = (pair.sides[A].peer, pair.now);
    let mut sealer = pair.sides[A].transport.seal(id, now).unwrap();
    for length in (0..100).filter(|length| *length != 48) {
        assert_eq!(sealer.seal(b"x", &mut vec![0; length]), Err(DropReason::Malformed));
    }
    let mut record = [0; 48];
    sealer.seal(b"x", &mut record).unwrap();
    assert_eq!(record[8..16], 1u64.to_le_bytes());
}

#[test]
fn message_from_another_outer_source_is_dropped_and_does_not_shut_out_the_original() {
    let mut pair = Pair::established(&Options::default());
    let record = pair.seal(A, b"mine").unwrap();
    for from in ["10.0.0.9:51820", "10.0.0.1:51821", "[fd00::1]:51820"] {
        assert_eq!(pair.deliver_from(B, from.parse().unwrap(), &record), Err(DropReason::OuterSource));
    }
    pair.deliver_from(B, "[::ffff:10.0.0.1]:51820".parse().unwrap(), &record).unwrap();
}

#[test]
fn handshake_from_another_outer_source_is_dropped_and_moves_nothing() {
    let elsewhere = "10.0.0.9:51820".parse().unwrap();
    let mut pair = Pair::new(&Options::default());
    pair.send(A, b"hello");
    let initiation = pair.intercept();
    assert_eq!(pair.deliver_from(B, elsewhere, &initiation.bytes), Err(DropReason::OuterSource));
    pair.deliver(B, &initiation.bytes).unwrap();
    let response = pair.intercept();
    assert_eq!(pair.deliver_from(A, elsewhere, &response.bytes), Err(DropReason::OuterSource));
    pair.deliver(A, &response.bytes).unwrap();
    pair.run(ms(50));
    assert_eq!(pair.sides[B].received, [b"hello"]);
}

#[test]
fn roaming_peer_is_followed_by_authentic_messages_only() {
    let elsewhere = "192.0.2.7:4000".parse().unwrap();
    let attacker = "192.0.2.66:666".parse().unwrap();
    let mut pair = Pair::established(&Options { roaming: true, ..Options::default() });
    let first = pair.seal(A, b"moved").unwrap();
    pair.deliver_from(B, elsewhere, &first).unwrap();
    pair.deliver_from(B, attacker, &first).unwrap_err();
    let mut forged = pair.seal(A, b"forged").unwrap();
    forged[20] ^= 1;
    pair.deliver_from(B, attacker, &forged).unwrap_err();
    let (id, now) = (pair.sides[B].peer, pair.now);
    assert_eq!(pair.sides[B].transport.seal(id, now).unwrap().endpoint(), elsewhere);
}

#[test]
fn roaming_peer_is_not_followed_by_a_handshake_that_may_be_a_copy() {
    let elsewhere = "192.0.2.7:4000".parse().unwrap();
    let mut pair = Pair::new(&Options { roaming: true, ..Options::default() });
    let (ids, now) = (pair.sides.each_ref().map(|side| side.peer), pair.now);
    pair.begin(A);
    let mut initiation = pair.intercept().bytes;
    let b = &mut pair.sides[B].transport;
    assert_eq!(b.handle(elsewhere, &mut initiation, now), Ok(Received::Handshake));
    let (to, mut response) = b.poll_transmit().unwrap();
    assert_eq!(to, elsewhere, "who really moved needs the answer");
    b.probe(ids[B], now);
    assert_eq!(b.poll_transmit().unwrap().0, address(A));
    let a = &mut pair.sides[A].transport;
    assert_eq!(a.handle(elsewhere, &mut response, now), Ok(Received::Handshake));
    assert_eq!(a.seal(ids[A], now).unwrap().endpoint(), address(B));
    let first = pair.seal(A, b"first").unwrap();
    pair.deliver_from(B, elsewhere, &first).unwrap();
    assert_eq!(pair.sides[B].transport.seal(ids[B], now).unwrap().endpoint(), elsewhere);
}

#[test]
fn message_sent_back_to_its_sender_is_not_opened() {
    let mut pair = Pair::established(&Options::default());
    let from_b = pair.seal(B, b"from b").unwrap();
    let mut reflected = pair.seal(A, b"from a").unwrap();
    assert_eq!(pair.deliver(A, &reflected), Err(DropReason::IndexUnknown));
    reflected[4..8].copy_from_slice(&from_b[4..8]);
    assert_eq!(pair.deliver(A, &reflected), Err(DropReason::BadTag));
    pair.deliver(A, &from_b).unwrap();
}

/// Puts a successor in the place of B, which has the sessions and timers of its predecessor.
fn hand_over(pair: &mut Pair) {
    let now = pair.now;
    let Side { transport: former, peer, .. } = &mut pair.sides[B];
    let state = former.export(*peer, now).unwrap();
    *former = transport(B, &Options::default());
    *peer = former.add_peer(config(A), now);
    assert!(former.import(*peer, state, now.instant, now));
}

#[test]
fn successor_sends_the_keepalive_when_its_predecessor_would_have() {
    let mut pair = Pair::established(&Options::default());
    pair.send(A, b"data");
    pair.run(secs(4));
    hand_over(&mut pair);
    pair.run(secs(5));
    assert_eq!(pair.sides[A].keepalives, 0);
    pair.run(secs(2));
    assert_eq!(pair.sides[A].keepalives, 1);
}

#[test]
fn successor_makes_the_new_session_when_its_predecessor_would_have() {
    let mut pair = Pair::established(&Options::default());
    pair.cut = [true, true];
    pair.send(B, b"unheard");
    pair.run(secs(4));
    hand_over(&mut pair);
    pair.run(secs(10));
    assert_eq!(pair.sides[B].sent_at(1).len(), 0);
    pair.run(secs(2));
    assert!(!pair.sides[B].sent_at(1).is_empty());
}
