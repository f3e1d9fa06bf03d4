//! What comes from the network: copies in one train, datagrams of every size, keys that the directory changes; and who may
//! say what, case by case.

use super::*;
use crate::proto::BUFFER_LEN;
use crate::proto::inbound::Verdict;
use crate::proto::nat::Tuple;
use crate::wire::icmp::{IcmpError, icmp_error};
use crate::wire::packet::Packet;

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
    let few = lengths.flat_map(|length| (0..=5).map(move |kind| (length, kind)));
    // Every type byte, around the lengths of messages.
    let around = [0, 1, 16, 31, 32, 33, 63, 64, 65, 91, 92, 93, 147, 148, 149, 1_392, 65_507];
    let all = around.into_iter().flat_map(|length| (0..=255).map(move |kind| (length, kind)));
    for (length, kind) in few.chain(all) {
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

#[test]
fn promise_10_what_one_peer_has_held_leaves_room_for_the_next_ones() {
    let mut network = Network::project();
    let unknown = "10.96.0.81";
    for node in [0, 2] {
        network.tell(node, vec![vip(unknown, &[SERVER[0]])]);
    }
    for n in 0..200 {
        network.capture(0, &udp((CLIENT[0], 4000 + n), (unknown, 80), b"flood"));
    }
    assert_eq!(network.dropped(1, DropReason::QueueFull), 200 - 64);
    network.capture(2, &udp((THIRD[0], 4000), (unknown, 80), b"waits"));
    network.tell(1, vec![vip(unknown, &[SERVER[0]])]);
    let got = network.inbox(1);
    assert_eq!(got.len(), 65);
    assert_eq!(read(&got[64]).2, b"waits");
}

/// What the agent of `node` decides about a packet that `peer` sealed.
fn admit(network: &mut Network, node: usize, peer: &str, packet: &[u8]) -> Result<Vec<u8>, DropReason> {
    let mut bytes = packet.to_vec();
    let parsed = Packet::parse(&bytes).unwrap();
    match network.nodes[node].engine.admit(ip(peer), &mut bytes, &parsed, network.now)? {
        Verdict::Inject => Ok(bytes),
        Verdict::Hold(reason) => Err(reason),
    }
}

/// A packet of a protocol without ports.
fn gre(source: &str, destination: &str, payload: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    builder(ip(source), ip(destination)).write(&mut packet, IpNumber(47), payload).unwrap();
    packet
}

/// The error that the owner of `source` answers `quoted` with; the source of it is the last argument.
fn unreachable(quoted: &[u8], source: &str) -> Vec<u8> {
    let mut error = Vec::new();
    assert!(icmp_error(IcmpError::PortUnreachable, quoted, &mut error));
    let IpAddr::V4(source) = ip(source) else { panic!("IPv4 alone") };
    error[12..16].copy_from_slice(&source.octets());
    error[10..12].fill(0);
    let sum = !crate::wire::checksum::sum(&error[..20]);
    error[10..12].copy_from_slice(&sum.to_be_bytes());
    error
}

#[test]
fn promise_4_a_peer_speaks_for_its_own_address_and_to_ours_alone() {
    let network = &mut Network::project();
    let foreign = "10.1.9.9";
    let vip_source = |source| udp((source, 4000), (VIP[0], 80), b"");
    let own = |source| udp((source, 1), (SERVER[0], 1), b"");
    let bare = |source, destination| gre(source, destination, &[0; 40]);
    assert!(admit(network, 1, CLIENT[0], &own(CLIENT[0])).is_ok());
    assert!(admit(network, 1, CLIENT[0], &vip_source(CLIENT[0])).is_ok());
    assert!(admit(network, 1, CLIENT[0], &bare(CLIENT[0], SERVER[0])).is_ok());
    for source in [THIRD[0], VIP[0], SERVER[0], foreign, "127.0.0.1", "0.0.0.0", "224.0.0.1", "169.254.1.1"] {
        for packet in [own(source), vip_source(source), bare(source, SERVER[0]), bare(source, VIP[0])] {
            assert_eq!(admit(network, 1, CLIENT[0], &packet), Err(DropReason::NotOwner), "{source}");
        }
    }
    for destination in ["127.0.0.1", "0.0.0.0", "224.0.0.1", "169.254.1.1", "255.255.255.255"] {
        for packet in [udp((CLIENT[0], 1), (destination, 80), b""), bare(CLIENT[0], destination)] {
            assert_eq!(admit(network, 1, CLIENT[0], &packet), Err(DropReason::NotForUs), "{destination}");
        }
    }
    for destination in [THIRD[0], VIP[0], foreign] {
        assert_eq!(admit(network, 1, CLIENT[0], &bare(CLIENT[0], destination)), Err(DropReason::NotForUs));
    }
    // Where we are no endpoint, as far as we know.
    for destination in [(VIP[0], 81), (THIRD[0], 80), (foreign, 80)] {
        let packet = udp((CLIENT[0], 1), destination, b"");
        assert_eq!(admit(network, 1, CLIENT[0], &packet), Err(DropReason::ServiceUnknown));
    }
    assert_eq!(admit(network, 1, foreign, &own(foreign)), Err(DropReason::HeldTooLong), "no route, no entry");
}

#[test]
fn promise_4_a_later_fragment_follows_the_first_one_of_the_same_peer_alone() {
    let network = &mut Network::project();
    let [first, later] = fragments(&udp((CLIENT[0], 4000), (VIP[0], 80), &[0x55; 2000]), 1);
    assert_eq!(admit(network, 1, CLIENT[0], &later), Err(DropReason::FragmentUnmatched));
    let to_pod = |bytes: Vec<u8>| bytes[16..20] == [10, 1, 2, 2];
    assert!(admit(network, 1, CLIENT[0], &first).is_ok_and(to_pod));
    assert_eq!(admit(network, 1, THIRD[0], &first), Err(DropReason::NotOwner));
    assert_eq!(admit(network, 1, THIRD[0], &later), Err(DropReason::NotOwner));
    assert!(admit(network, 1, CLIENT[0], &later).is_ok_and(to_pod));
    // Without ports there is nothing to follow.
    let later = |source, destination| fragments(&gre(source, destination, &[0; 2000]), 2)[1].clone();
    assert!(admit(network, 1, CLIENT[0], &later(CLIENT[0], SERVER[0])).is_ok());
    assert_eq!(admit(network, 1, CLIENT[0], &later(THIRD[0], SERVER[0])), Err(DropReason::NotOwner));
    assert_eq!(admit(network, 1, CLIENT[0], &later(CLIENT[0], THIRD[0])), Err(DropReason::NotForUs));
}

#[test]
fn promise_4_fragments_of_two_peers_that_answer_as_one_vip_are_not_put_together() {
    let network = &mut Network::project();
    network.tell(0, vec![vip(VIP[0], &[SERVER[0], THIRD[0]])]);
    let mut flow_to = |peer: &str| {
        (4000..4100).find(|port| {
            network.capture(0, &udp((CLIENT[0], *port), (VIP[0], 80), b""));
            let (local, remote) = ((ip(CLIENT[0]), *port), (ip(VIP[0]), 80));
            let flow = network.nodes[0].engine.flows.get(&Tuple { protocol: 17, local, remote });
            flow.unwrap().peer == ip(peer)
        })
    };
    let [of_server, of_third] = [SERVER[0], THIRD[0]].map(|peer| flow_to(peer).unwrap());
    let answer = |port, id| fragments(&udp((VIP[0], 80), (CLIENT[0], port), &[0x55; 2000]), id);
    let ([first, later], [other, last]) = (answer(of_server, 1), answer(of_third, 1));
    assert!(admit(network, 0, SERVER[0], &first).is_ok());
    assert_eq!(admit(network, 0, THIRD[0], &last), Err(DropReason::NotOwner));
    assert_eq!(admit(network, 0, THIRD[0], &other), Err(DropReason::NotOwner));
    // The datagram is whole: the number is free.
    assert!(admit(network, 0, SERVER[0], &later).is_ok());
    assert!(admit(network, 0, THIRD[0], &other).is_ok());
    assert!(admit(network, 0, THIRD[0], &last).is_ok());
    // It is free, too, when the pod's stack has given the datagram up; not before, whatever else the peer sends.
    assert!(admit(network, 0, SERVER[0], &first).is_ok());
    network.advance(Duration::from_millis(1));
    for id in 2..100 {
        let [first, _] = fragments(&udp((SERVER[0], 80), (CLIENT[0], 4000), &[0x55; 2000]), id);
        assert!(admit(network, 0, SERVER[0], &first).is_ok());
    }
    assert_eq!(admit(network, 0, THIRD[0], &other), Err(DropReason::NotOwner));
    network.advance(Duration::from_secs(62));
    assert!(admit(network, 0, THIRD[0], &other).is_ok());
    assert!(admit(network, 0, THIRD[0], &last).is_ok());
    // What the pod's stack will not take begins nothing, and an error has no fragments.
    for part in [&first, &later] {
        let mut damaged = part.clone();
        damaged[10] ^= 1;
        assert_eq!(admit(network, 0, SERVER[0], &damaged), Err(DropReason::Malformed));
    }
    let asked = udp((CLIENT[0], of_server), (VIP[0], 80), &[0; 1400]);
    let mut error = unreachable(&asked, VIP[0]);
    assert!(admit(network, 0, SERVER[0], &error).is_ok());
    error[6] |= 0x20;
    error[10..12].fill(0);
    let sum = !crate::wire::checksum::sum(&error[..20]);
    error[10..12].copy_from_slice(&sum.to_be_bytes());
    assert_eq!(admit(network, 0, SERVER[0], &error), Err(DropReason::NotOwner));
}

#[test]
fn a_peer_that_sends_first_fragments_alone_does_not_stop_the_others() {
    let network = &mut Network::project();
    let of_third = fragments(&udp((THIRD[0], 4000), (SERVER[0], 8080), &[0x55; 2000]), 1);
    assert!(admit(network, 1, THIRD[0], &of_third[0]).is_ok());
    network.advance(Duration::from_millis(1));
    for id in 0..300 {
        let [first, _] = fragments(&udp((CLIENT[0], 4000), (SERVER[0], 8080), &[0x55; 2000]), id);
        assert!(admit(network, 1, CLIENT[0], &first).is_ok());
    }
    assert!(admit(network, 1, THIRD[0], &of_third[1]).is_ok());
}

#[test]
fn ipv6_fragments_are_of_one_datagram_whatever_header_follows() {
    let network = &mut Network::project();
    let whole = udp((CLIENT[1], 4000), (VIP[1], 80), &[0x55; 2000]);
    // Destination options, then UDP: only the first fragment shows that it is UDP.
    let body = [&[17, 0, 1, 4, 0, 0, 0, 0], &whole[40..]].concat();
    let fragment = |offset: usize, part: &[u8]| {
        let mut head = whole[..40].to_vec();
        head[4..6].copy_from_slice(&u16::try_from(8 + part.len()).unwrap().to_be_bytes());
        head[6] = 44;
        let place = u16::try_from(offset).unwrap() | u16::from(offset == 0);
        [&head, &[60, 0][..], &place.to_be_bytes(), &[0, 0, 0, 7], part].concat()
    };
    assert!(admit(network, 1, CLIENT[1], &fragment(0, &body[..1200])).is_ok());
    let later = admit(network, 1, CLIENT[1], &fragment(1200, &body[1200..])).unwrap();
    assert_eq!(later[24..40], ip_bytes(SERVER[1]));
}

fn ip_bytes(text: &str) -> Vec<u8> {
    match ip(text) {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// Both fragments of a datagram from the client to the VIP, sealed, not yet delivered.
fn sealed_fragments(network: &mut Network, id: u16) -> [Vec<u8>; 2] {
    fragments(&udp((CLIENT[0], 4000), (VIP[0], 80), &[0x55; 2000]), id).map(|part| {
        network.hand_over(0, VnetHeader::PLAIN, &part);
        network.nodes[0].engine.poll_transmit().unwrap().bytes.to_vec()
    })
}

#[test]
fn a_fragment_that_overtook_its_first_one_waits_for_it() {
    let mut network = Network::project();
    network.capture(0, &udp((CLIENT[0], 4000), (VIP[0], 80), b"session"));
    network.inbox(1);
    let whole = udp((CLIENT[0], 4000), (SERVER[0], 8080), &[0x55; 2000]);
    let deliver = |network: &mut Network, datagram: &[u8]| {
        network.deliver(0, at(SERVER[0], PORT), datagram, datagram.len());
        network.inbox(1)
    };
    let [first, later] = sealed_fragments(&mut network, 1);
    assert!(deliver(&mut network, &later).is_empty());
    let got = deliver(&mut network, &first);
    assert_eq!([&got[0][20..], &got[1][20..]].concat(), whole[20..]);
    // Another one's first fragment is not it, and time ends.
    let [_, later] = sealed_fragments(&mut network, 2);
    assert!(deliver(&mut network, &later).is_empty());
    let [first, _] = sealed_fragments(&mut network, 3);
    assert_eq!(deliver(&mut network, &first).len(), 1);
    network.advance(Duration::from_millis(1_100));
    assert!(network.inbox(1).is_empty());
    assert_eq!(network.dropped(1, DropReason::FragmentUnmatched), 1);
}

#[test]
fn fragments_wait_for_a_service_together_in_any_order() {
    for overtaken in [false, true] {
        let mut network = Network::new(&[CLIENT, SERVER]);
        network.tell(0, everything());
        network.tell(1, vec![workload(ip(CLIENT[0]))]);
        network.capture(0, &udp((CLIENT[0], 1), (SERVER[0], 1), b"session"));
        network.inbox(1);
        let mut sealed = sealed_fragments(&mut network, 1);
        if overtaken {
            sealed.reverse();
        }
        for datagram in sealed {
            network.deliver(0, at(SERVER[0], PORT), &datagram, datagram.len());
        }
        assert!(network.inbox(1).is_empty());
        network.tell(1, everything());
        let whole = udp((CLIENT[0], 4000), (SERVER[0], 8080), &[0x55; 2000]);
        let got = network.inbox(1);
        assert_eq!([&got[0][20..], &got[1][20..]].concat(), whole[20..], "overtaken: {overtaken}");
    }
}

#[test]
fn promise_4_an_icmp_error_is_judged_by_the_packet_that_it_quotes() {
    let network = &mut Network::project();
    network
        .capture(0, &udp((CLIENT[0], 4000), (VIP[0], 80), b"client flow of node 0, server flow of node 1"));
    network.capture(0, &udp((CLIENT[0], 4001), (SERVER[0], 8080), b"direct flow of both"));
    network.capture(1, &udp((SERVER[0], 8080), (CLIENT[0], 4000), b"answer"));
    // What node 0 sent to the VIP: from the server or in the VIP's name, sealed by the server alone.
    let asked = udp((CLIENT[0], 4000), (VIP[0], 80), b"");
    assert!(admit(network, 0, SERVER[0], &unreachable(&asked, SERVER[0])).is_ok());
    assert!(admit(network, 0, SERVER[0], &unreachable(&asked, VIP[0])).is_ok());
    assert_eq!(admit(network, 0, SERVER[0], &unreachable(&asked, THIRD[0])), Err(DropReason::NotOwner));
    for source in [THIRD[0], VIP[0], SERVER[0]] {
        assert_eq!(admit(network, 0, THIRD[0], &unreachable(&asked, source)), Err(DropReason::NotOwner));
    }
    // What node 1 answered in the VIP's name goes back to its own address, and quotes what the pod sent.
    let answered = udp((VIP[0], 80), (CLIENT[0], 4000), b"");
    let error = admit(network, 1, CLIENT[0], &unreachable(&answered, CLIENT[0])).unwrap();
    assert_eq!((&error[16..20], &error[40..44]), (&[10, 1, 2, 2][..], &[10, 1, 2, 2][..]));
    assert_eq!(error[48..52], [8080u16.to_be_bytes(), 4000u16.to_be_bytes()].concat());
    assert_eq!(admit(network, 1, THIRD[0], &unreachable(&answered, CLIENT[0])), Err(DropReason::NotOwner));
    // Sent without NAT: to a peer, which alone may complain.
    let direct = udp((CLIENT[0], 4001), (SERVER[0], 8080), b"");
    assert!(admit(network, 0, SERVER[0], &unreachable(&direct, SERVER[0])).is_ok());
    assert_eq!(admit(network, 0, THIRD[0], &unreachable(&direct, SERVER[0])), Err(DropReason::NotOwner));
    let bare = gre(CLIENT[0], SERVER[0], &[0; 40]);
    assert!(admit(network, 0, SERVER[0], &unreachable(&bare, SERVER[0])).is_ok());
    assert_eq!(admit(network, 0, THIRD[0], &unreachable(&bare, THIRD[0])), Err(DropReason::NotOwner));
    // Never sent by us, or not said to us.
    let never = udp((THIRD[0], 1), (SERVER[0], 8080), b"");
    assert_eq!(admit(network, 0, SERVER[0], &unreachable(&never, SERVER[0])), Err(DropReason::NotForUs));
    let mut aside = unreachable(&never, SERVER[0]);
    aside[16..20].copy_from_slice(&[10, 1, 1, 1]);
    assert_eq!(admit(network, 0, SERVER[0], &aside), Err(DropReason::NotForUs));
    let mut aside = unreachable(&direct, SERVER[0]);
    aside[16..20].copy_from_slice(&[10, 1, 3, 3]);
    assert_eq!(admit(network, 0, SERVER[0], &aside), Err(DropReason::NotForUs));
}

#[test]
fn promise_1_a_late_packet_of_a_vip_that_was_released_is_not_injected() {
    let network = &mut Network::project();
    let question = udp((CLIENT[0], 4000), (VIP[0], 80), b"question");
    network.capture(0, &question);
    network.capture(0, &syn((CLIENT[0], 4001), (VIP[0], 80)));
    let answer = udp((VIP[0], 80), (CLIENT[0], 4000), b"late");
    let late = [answer, data((VIP[0], 80), (CLIENT[0], 4001), b"late"), unreachable(&question, VIP[0])];
    network.tell(0, vec![Change::RemoveVip(ip(VIP[0]))]);
    let mut waited = 0;
    while network.nodes[0].engine.is_protected(ip(VIP[0])) {
        assert!(
            late.iter().all(|packet| admit(network, 0, SERVER[0], packet).is_ok()),
            "the guard is closed"
        );
        network.advance(Duration::from_secs(10));
        waited += 10;
        assert!(waited <= 1_000, "never released");
    }
    for packet in &late {
        assert_eq!(admit(network, 0, SERVER[0], packet), Err(DropReason::SourceReleased));
    }
    // Its own address is a peer's: the peer gate says whether that is routed.
    assert!(admit(network, 0, SERVER[0], &udp((SERVER[0], 1), (CLIENT[0], 1), b"")).is_ok());
    // And the pod's way to itself.
    network.tell(0, vec![vip(VIP[0], &[CLIENT[0]])]);
    let hairpin = udp((CLIENT[0], 4002), (VIP[0], 80), b"to itself");
    network.capture(0, &hairpin);
    assert_eq!(network.inbox(0).len(), 1);
    network.tell(0, vec![Change::RemoveVip(ip(VIP[0]))]);
    while network.nodes[0].engine.is_protected(ip(VIP[0])) {
        network.capture(0, &hairpin);
        network.advance(Duration::from_secs(10));
    }
    network.inbox(0);
    network.capture(0, &hairpin);
    assert!(network.inbox(0).is_empty());
    assert_eq!(network.dropped(0, DropReason::SourceReleased), 1);
}
