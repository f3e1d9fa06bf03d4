//! What anybody can send: nothing is answered, nothing moves, nothing panics.

use blake2::digest::{FixedOutput, KeyInit, Mac};
use blake2::{Blake2s256, Blake2sMac, Digest};
use proptest::prelude::*;

use super::super::*;
use super::pair::*;

/// Gives a changed handshake message a valid MAC1, as anybody can who knows the receiver's public key.
pub(super) fn remac(message: &mut [u8], receiver: &PublicKey) {
    let key: [u8; 32] =
        Blake2s256::new().chain_update(b"mac1----").chain_update(receiver.0).finalize().into();
    let end = message.len() - 32;
    let mut mac = <Blake2sMac<blake2::digest::consts::U16> as KeyInit>::new_from_slice(&key).unwrap();
    Mac::update(&mut mac, &message[..end]);
    message[end..end + 16].copy_from_slice(&mac.finalize_fixed());
}

/// Points of small order and the encodings of zero: the shared secret with any key is all-zero.
const LOW_ORDER: [[u8; 32]; 4] = {
    let mut one = [0; 32];
    one[0] = 1;
    let mut minus_one = [0xff; 32];
    minus_one[0] = 0xec;
    minus_one[31] = 0x7f;
    let eight = [
        0xe0, 0xeb, 0x7a, 0x7c, 0x3b, 0x41, 0xb8, 0xae, 0x16, 0x56, 0xe3, 0xfa, 0xf1, 0x9f, 0xc4, 0x6a, 0xda,
        0x09, 0x8d, 0xeb, 0x9c, 0x32, 0xb1, 0xfd, 0x86, 0x62, 0x05, 0x16, 0x5f, 0x49, 0xb8, 0x00,
    ];
    [[0; 32], one, minus_one, eight]
};

#[test]
fn wrong_mac1_is_met_with_silence() {
    let mut pair = Pair::new(&Options::default());
    pair.begin(A);
    let initiation = pair.intercept().bytes;
    for at in [5, 20, 60, 110, 116, 131] {
        let mut broken = initiation.clone();
        broken[at] ^= 1;
        assert_eq!(pair.deliver(B, &broken), Err(DropReason::BadMac1));
    }
    assert!(pair.is_wire_empty());
    assert_eq!(pair.deliver(B, &initiation), Ok(Received::Handshake), "nothing was remembered");
}

#[test]
fn initiation_with_a_valid_mac1_that_does_not_decrypt_is_met_with_silence() {
    let mut pair = Pair::new(&Options::default());
    pair.begin(A);
    let initiation = pair.intercept().bytes;
    for at in [10, 45, 90, 115] {
        let mut broken = initiation.clone();
        broken[at] ^= 1;
        remac(&mut broken, &side_secret(B).public());
        assert_eq!(pair.deliver(B, &broken), Err(DropReason::HandshakeInvalid));
    }
    assert!(pair.is_wire_empty());
    assert_eq!(pair.deliver(B, &initiation), Ok(Received::Handshake));
}

#[test]
fn forged_responses_leave_the_pending_handshake_alive() {
    let mut pair = Pair::new(&Options::default());
    pair.send(A, b"patient");
    let initiation = pair.intercept().bytes;
    pair.deliver(B, &initiation).unwrap();
    let response = pair.intercept().bytes;
    for at in (12..60).chain(12..60) {
        let mut broken = response.clone();
        broken[at] ^= 0x10;
        remac(&mut broken, &side_secret(A).public());
        assert_eq!(pair.deliver(A, &broken), Err(DropReason::HandshakeInvalid));
    }
    assert!(!pair.can_send(A));
    pair.deliver(A, &response).unwrap();
    pair.run(ms(50));
    assert_eq!(pair.sides[B].received, [b"patient"]);
}

#[test]
fn response_to_an_unknown_or_a_session_index_is_dropped() {
    let mut pair = Pair::established(&Options::default());
    let mut response = pair.log.iter().find(|d| d.bytes[0] == 2).unwrap().bytes.clone();
    let session = response[8..12].to_vec();
    for index in [session, vec![1, 2, 3, 4]] {
        response[8..12].copy_from_slice(&index);
        remac(&mut response, &side_secret(A).public());
        assert_eq!(pair.deliver(A, &response), Err(DropReason::IndexUnknown));
    }
}

#[test]
fn low_order_ephemeral_keys_are_refused() {
    let mut pair = Pair::new(&Options::default());
    pair.begin(A);
    let initiation = pair.intercept().bytes;
    pair.deliver(B, &initiation).unwrap();
    let response = pair.intercept().bytes;
    for point in LOW_ORDER {
        let mut broken = initiation.clone();
        broken[8..40].copy_from_slice(&point);
        remac(&mut broken, &side_secret(B).public());
        assert_eq!(pair.deliver(B, &broken), Err(DropReason::HandshakeInvalid));
        let mut broken = response.clone();
        broken[12..44].copy_from_slice(&point);
        remac(&mut broken, &side_secret(A).public());
        assert_eq!(pair.deliver(A, &broken), Err(DropReason::HandshakeInvalid));
    }
}

#[test]
fn peer_with_a_low_order_static_key_is_silent_and_sent_nothing() {
    for point in LOW_ORDER {
        let now = epoch();
        let mut transport = transport(A, &Options::default());
        let peer = transport.add_peer(
            PeerConfig { keys: PeerKeys { public: PublicKey(point), psk: psk() }, ..config(B) },
            now,
        );
        transport.begin(peer, now);
        assert_eq!(transport.poll_transmit(), None);
        let later = Now { instant: now.instant + secs(3), wall: now.wall };
        transport.handle_timeout(later);
        assert_eq!(transport.poll_event(), Some(Event::Silent(peer)));
        assert_eq!(transport.shared.indices.len(), 0);
    }
}

#[test]
fn only_the_four_message_types_at_their_lengths_are_read() {
    let mut pair = Pair::established(&Options::default());
    for kind in 0..=6u32 {
        for length in 0..200 {
            let mut datagram = vec![0; length];
            let word = kind.to_le_bytes();
            datagram.iter_mut().zip(word).for_each(|(to, from)| *to = from);
            let expected = match (kind, length) {
                (1, 148) | (2, 92) => DropReason::BadMac1,
                (3, 64) | (4, 32..) => DropReason::IndexUnknown,
                _ => DropReason::NotWireguard,
            };
            assert_eq!(pair.deliver(B, &datagram), Err(expected), "type {kind}, {length} bytes");
        }
    }
    let mut reserved = pair.seal(A, b"reserved bytes are zero").unwrap();
    reserved[2] = 1;
    assert_eq!(pair.deliver(B, &reserved), Err(DropReason::NotWireguard));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn hostile_datagrams_change_nothing(
        kind in 0u8..6,
        body in prop::collection::vec(any::<u8>(), 0..400),
        index in any::<bool>(),
        mac in any::<bool>(),
        fit in any::<bool>(),
    ) {
        let mut pair = Pair::established(&Options::default());
        let real = pair.seal(A, b"real").unwrap();
        let mut datagram = vec![kind, 0, 0, 0];
        datagram.extend(body);
        if fit {
            let length = match kind { 1 => 148, 2 => 92, 3 => 64, _ => datagram.len() };
            datagram.resize(length, 0xa5);
        }
        if index && datagram.len() >= 8 {
            datagram[4..8].copy_from_slice(&real[4..8]);
        }
        if mac && datagram.len() >= 36 {
            remac(&mut datagram, &side_secret(B).public());
        }
        let before = pair.sides[B].transport.poll_timeout();
        prop_assert!(pair.deliver(B, &datagram).is_err());
        prop_assert!(pair.is_wire_empty());
        prop_assert_eq!(pair.sides[B].transport.poll_timeout(), before);
        prop_assert_eq!(pair.sides[B].transport.shared.indices.len(), 1);
        prop_assert!(pair.deliver(B, &real).is_ok());
    }

    #[test]
    fn truncated_messages_are_dropped(cut in 0usize..200, which in 0usize..3) {
        let mut pair = Pair::established(&Options::default());
        let message = pair.log[which].bytes.clone();
        prop_assume!(cut < message.len());
        let to = pair.log[which].to;
        prop_assert!(pair.deliver(to, &message[..cut]).is_err());
    }
}
