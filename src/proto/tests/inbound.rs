//! What comes from the network: copies in one train, datagrams of every size, keys that the directory changes.

use super::*;
use crate::proto::BUFFER_LEN;

/// Client and third pod with a session, and a datagram that the third pod sealed, not yet delivered.
fn sealed_by_third(network: &mut Network, text: &[u8]) -> Vec<u8> {
    network.capture(0, &udp((CLIENT[0], 1), (THIRD[0], 1), b"session"));
    network.hand_over(2, VnetHeader::PLAIN, &udp((THIRD[0], 1), (CLIENT[0], 1), text));
    let datagram = network.nodes[2].engine.poll_transmit().unwrap().bytes.to_vec();
    network.inbox(0);
    datagram
}

fn with_psk(address: &str, psk: u8) -> Change {
    let keys = PeerKeys { public: secret(ip(address)).public(), psk: PresharedKey([psk; 32]) };
    Change::SetWorkload(Workload { address: ip(address), keys, accept: None })
}

#[test]
fn promise_4_of_copies_in_one_train_one_is_injected() {
    let mut network = Network::project();
    let datagram = sealed_by_third(&mut network, b"once");
    network.deliver(2, at(CLIENT[0], PORT), &datagram.repeat(3), datagram.len());
    let got = network.inbox(0);
    assert_eq!(got.len(), 1);
    assert_eq!(read(&got[0]).2, b"once");
    assert_eq!(network.dropped(0, DropReason::Replay), 2);
}

#[test]
fn datagrams_of_every_type_and_size_leave_the_receiver_alive() {
    let mut network = Network::project();
    let sealed = sealed_by_third(&mut network, b"still here");
    let opened = network.nodes[0].engine.counters().opened;
    let lengths = (0..300).chain([1_392, 1_500, 9_000, 65_506, 65_507, 65_535, BUFFER_LEN, BUFFER_LEN + 1]);
    for (length, kind) in lengths.flat_map(|length| (0..=5).chain([255]).map(move |kind| (length, kind))) {
        let engine = &mut network.nodes[0].engine;
        let buffer = engine.receive_buffer();
        buffer.fill(0xa5);
        // A data message names a session that there is.
        buffer[..4].copy_from_slice(&[kind, 0, 0, 0]);
        buffer[4..8].copy_from_slice(&sealed[4..8]);
        engine.handle_datagrams(at(THIRD[0], PORT), length, length, network.now);
        network.run();
    }
    // And what cannot be a train.
    for segment in [0, 1, usize::MAX] {
        network.nodes[0].engine.handle_datagrams(at(THIRD[0], PORT), 2_000, segment, network.now);
    }
    assert!(network.inbox(0).is_empty());
    assert_eq!(network.nodes[0].engine.counters().opened, opened);
    network.deliver(2, at(CLIENT[0], PORT), &sealed, sealed.len());
    assert_eq!(read(&network.inbox(0)[0]).2, b"still here");
}

#[test]
fn a_changed_preshared_key_ends_the_session_made_with_the_old_one() {
    let mut network = Network::project();
    let sealed = sealed_by_third(&mut network, b"sealed under the old key");
    network.tell(0, vec![with_psk(THIRD[0], 1)]);
    network.deliver(2, at(CLIENT[0], PORT), &sealed, sealed.len());
    network.capture(0, &udp((CLIENT[0], 1), (THIRD[0], 1), b"needs the new key"));
    assert!(network.inbox(0).is_empty() && network.inbox(2).len() == 1, "only what made the session");
    network.tell(2, vec![with_psk(CLIENT[0], 1)]);
    network.advance(Duration::from_secs(2));
    assert_eq!(read(&network.inbox(2)[0]).2, b"needs the new key");
    network.capture(2, &udp((THIRD[0], 1), (CLIENT[0], 1), b"under the new key"));
    assert_eq!(read(&network.inbox(0)[0]).2, b"under the new key");
}

#[test]
fn promise_4_a_key_named_for_two_workloads_lets_neither_speak_for_the_other() {
    let other = "10.1.9.9";
    let keys = PeerKeys { public: secret(ip(THIRD[0])).public(), psk: PresharedKey([9; 32]) };
    let other_too = Change::SetWorkload(Workload { address: ip(other), keys, accept: None });
    let [first, last] = [vec![other_too.clone()], vec![Change::RemoveWorkload(ip(THIRD[0])), other_too]];
    for changes in [first, last] {
        let mut network = Network::project();
        network.tell(0, changes);
        network.tell(0, vec![workload(ip(THIRD[0]))]);
        network.capture(0, &udp((CLIENT[0], 1), (THIRD[0], 1), b"session"));
        network.nodes[2].engine.own.push(ip(other));
        network.capture(2, &udp((other, 1), (CLIENT[0], 1), b"forged"));
        assert!(network.inbox(0).is_empty());
        assert_eq!(network.dropped(0, DropReason::NotOwner), 1);
    }
}
