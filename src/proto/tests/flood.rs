//! What is too much: a flood of handshake messages as the whole engine sees it, and packets for peers that do not answer.

use blake2::digest::consts::U16;
use blake2::digest::{FixedOutput, KeyInit, Mac};
use blake2::{Blake2s256, Blake2sMac, Digest};

use super::*;

const INITIATION: usize = 148;
/// Messages of a train, and trains.
const FLOOD: (usize, usize) = (40, 50);

/// A train of initiations to the server with a valid MAC1, which do not decrypt.
fn train() -> Vec<u8> {
    let public = secret(ip(SERVER[0])).public();
    let key: [u8; 32] = Blake2s256::new().chain_update(b"mac1----").chain_update(public.0).finalize().into();
    let one = |n: usize| {
        let mut message = [1, 0, 0, 0].to_vec();
        message.resize(INITIATION, u8::try_from(n).unwrap() + 1);
        message[1..4].fill(0);
        let mac = <Blake2sMac<U16> as KeyInit>::new_from_slice(&key).unwrap();
        let mac1 = Mac::chain_update(mac, &message[..116]).finalize_fixed();
        message[116..132].copy_from_slice(&mac1);
        message
    };
    (0..FLOOD.0).flat_map(one).collect()
}

#[test]
fn promise_12_every_message_of_a_flood_is_in_exactly_one_counter_and_cookie_replies_are_no_packets() {
    let mut network = Network::project();
    let (train, now) = (train(), network.now);
    let mut replies = 0;
    for _ in 0..FLOOD.1 {
        let engine = &mut network.nodes[1].engine;
        engine.receive_buffer()[..train.len()].copy_from_slice(&train);
        engine.handle_datagrams(at("192.0.2.1", 9), train.len(), INITIATION, now);
        assert!(engine.counters().is_balanced(engine.waiting()));
        while let Some(transmit) = engine.poll_transmit() {
            assert_eq!((transmit.packets, transmit.bytes[0]), (false, 3));
            check_transmit(&transmit);
            replies += 1;
        }
    }
    let counters = network.nodes[1].engine.counters();
    let flood = (FLOOD.0 * FLOOD.1) as u64;
    let came = (counters.dropped(DropReason::HandshakeInvalid), counters.dropped(DropReason::CookieMissing));
    assert_eq!((came, counters.received), ((512, flood - 512), flood));
    assert_eq!((replies, counters.control, counters.sealed), (2, 0, 0));

    // A peer pays one more round trip.
    network.capture(0, &udp((CLIENT[0], 4000), (SERVER[0], 8080), b"through"));
    assert!(network.inbox(1).is_empty());
    network.advance(Duration::from_millis(300));
    assert_eq!(read(&network.inbox(1)[0]).2, b"through");
    for node in &network.nodes {
        assert!(node.engine.counters().is_balanced(node.engine.waiting()));
    }
}

#[test]
fn promise_10_of_packets_for_a_peer_that_does_not_answer_the_first_128_wait() {
    let mut network = Network::project();
    network.nodes[1].absent = true;
    // Of a flow each: they are not merged.
    let packet = |n: u16| udp((CLIENT[0], 4000 + n), (SERVER[0], 8080), &n.to_be_bytes());
    (0..200).for_each(|n| network.capture(0, &packet(n)));
    assert_eq!(network.nodes[0].engine.waiting().outbound, 128);
    assert_eq!(network.dropped(0, DropReason::QueueFull), 72);
    // Another peer has room.
    network.capture(0, &udp((CLIENT[0], 4000), (THIRD[0], 8080), b"through"));
    assert_eq!(read(&network.inbox(2)[0]).2, b"through");
    network.nodes[1].absent = false;
    network.advance(Duration::from_secs(2));
    let got: Vec<_> = network.inbox(1).iter().map(|packet| read(packet).2).collect();
    assert_eq!(got, (0..128u16).map(|n| n.to_be_bytes().to_vec()).collect::<Vec<_>>());
}

#[test]
fn handshake_messages_leave_alone_and_at_their_exact_lengths_whatever_data_leaves_with_them() {
    let mut network = Network::project();
    let mut kinds = BTreeSet::new();
    let packet = |n: u16, to| udp((CLIENT[0], 4000 + n), (to, 8080), &[0; 32]);
    let now = network.now;
    for round in 0..3 {
        // Data for one peer, handshakes with two, in one turn.
        (0..20).for_each(|n| network.hand_over(0, VnetHeader::PLAIN, &packet(n, SERVER[0])));
        (0..20).for_each(|n| network.hand_over(0, VnetHeader::PLAIN, &packet(n, THIRD[0])));
        let train = train();
        for engine in network.nodes[..2].iter_mut().map(|node| &mut node.engine) {
            engine.receive_buffer()[..train.len()].copy_from_slice(&train);
            engine.handle_datagrams(at("192.0.2.1", 9), train.len(), INITIATION, now);
        }
        for node in &mut network.nodes {
            let mut left = Vec::new();
            while let Some(transmit) = node.engine.poll_transmit() {
                check_transmit(&transmit);
                kinds.insert(transmit.bytes[0]);
                left.push((transmit.to, transmit.bytes.to_vec(), transmit.segment));
            }
        }
        network.advance(Duration::from_secs(if round == 1 { 130 } else { 1 }));
    }
    assert!(kinds.contains(&1) && kinds.contains(&4), "{kinds:?}");
}
