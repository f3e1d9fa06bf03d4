//! The ladder in simulation, and what becomes of flows that are older than a decision about their address.

use std::collections::BTreeMap;
use std::time::Duration;

use super::super::directory::Change;
use super::super::drop::DropReason;
use super::super::ladder::{Mode, Standing};
use super::super::nat::Tuple;
use super::super::routing::RouteChange;
use super::*;

/// Three pods below strict; the third one has no agent at first. The IPv4 VIP stands before the third alone.
fn half_migrated() -> Network {
    let mut network = Network::with_mode(&[CLIENT, SERVER, THIRD], Mode::Permissive);
    network.nodes[2].absent = true;
    let mut changes = everything();
    changes.push(vip(VIP[0], &[THIRD[0]]));
    for node in 0..2 {
        network.tell(node, changes.clone());
    }
    network.advance(Duration::from_millis(500));
    network
}

/// The third pod gets its agent.
fn migrate(network: &mut Network) {
    network.nodes[2].absent = false;
    let mut changes = everything();
    changes.push(vip(VIP[0], &[THIRD[0]]));
    network.tell(2, changes);
}

impl Network {
    fn is_captured(&self, node: usize, address: &str) -> bool {
        self.nodes[node].engine.routing.is_captured(ip(address))
    }

    /// What the ladder changed in the kernel since it was asked last.
    fn changes(&mut self, node: usize) -> Vec<RouteChange> {
        std::mem::take(&mut self.nodes[node].applied).into_iter().flat_map(|batch| batch.changes).collect()
    }
}

#[test]
fn an_able_peer_is_captured_and_one_that_does_not_answer_is_passed() {
    let network = half_migrated();
    assert!(network.is_captured(0, SERVER[0]) && network.is_captured(1, CLIENT[0]));
    assert!(!network.is_captured(0, THIRD[0]));
    assert!(network.nodes[0].engine.routing.is_passed(ip(THIRD[0])));
    let standings: BTreeMap<_, _> = network.nodes[0].engine.ladder().collect();
    assert_eq!(standings[&ip(SERVER[0])], Standing::Able);
    assert_eq!(standings[&ip(THIRD[0])], Standing::Probing);
    assert_eq!(standings[&ip(VIP[0])], Standing::Passed);
    assert_eq!(standings[&ip(VIP[1])], Standing::Captured);
}

#[test]
fn a_vip_is_captured_only_while_all_its_ready_endpoints_are_able() {
    let mut network = half_migrated();
    assert!(!network.is_captured(0, VIP[0]) && network.is_captured(0, VIP[1]));
    migrate(&mut network);
    network.advance(Duration::from_millis(500));
    assert!(network.is_captured(0, VIP[0]) && network.is_captured(1, VIP[0]));
    network.tell(0, vec![vip(VIP[0], &[SERVER[0], THIRD[0]])]);
    assert!(network.is_captured(0, VIP[0]));
    // An endpoint that is not ready does not count, and one without a workload is never able.
    let Change::SetVip(mut changed) = vip(VIP[0], &[SERVER[0], "10.9.9.9"]) else { panic!() };
    network.tell(0, vec![Change::SetVip(changed.clone())]);
    assert!(!network.is_captured(0, VIP[0]));
    for port in &mut changed.ports {
        port.endpoints[1].ready = false;
    }
    network.tell(0, vec![Change::SetVip(changed)]);
    assert!(network.is_captured(0, VIP[0]));
    network.tell(0, vec![vip(VIP[0], &[])]);
    assert!(!network.is_captured(0, VIP[0]), "nobody would answer");
    network.tell(0, vec![vip(VIP[0], &[CLIENT[0]])]);
    assert!(network.is_captured(0, VIP[0]), "our own address counts as able");
}

/// Its clients come in clear and are answered so, from and to the pods' own addresses.
#[test]
fn who_stands_behind_a_passed_vip_is_passed_too_and_so_is_every_vip_it_stands_behind() {
    let mut network = half_migrated();
    let other = "10.96.0.81";
    let changes = vec![vip(VIP[0], &[SERVER[0], THIRD[0]]), vip(other, &[SERVER[0]])];
    (0..2).for_each(|node| network.tell(node, changes.clone()));
    for address in [VIP[0], other, SERVER[0]] {
        assert!(!network.is_captured(0, address), "{address}");
    }
    assert!(!network.is_captured(1, CLIENT[0]), "we stand behind it ourselves");
    migrate(&mut network);
    (0..3).for_each(|node| network.tell(node, changes.clone()));
    network.advance(Duration::from_millis(500));
    for address in [VIP[0], other, SERVER[0]] {
        assert!(network.is_captured(0, address), "{address}");
    }
    assert!(network.is_captured(1, CLIENT[0]));
}

#[test]
fn an_unable_peer_is_asked_three_times_a_second_apart_and_again_after_60_seconds() {
    let mut network = half_migrated();
    network.advance(Duration::from_secs(4));
    network.nodes[2].unread = 0;
    network.advance(Duration::from_secs(50));
    assert_eq!(network.nodes[2].unread, 0);
    network.advance(Duration::from_secs(12));
    // Client and server, both families.
    assert_eq!(network.nodes[2].unread, 3 * 4);
    let standings: BTreeMap<_, _> = network.nodes[0].engine.ladder().collect();
    assert_eq!(standings[&ip(THIRD[0])], Standing::Unable);
    migrate(&mut network);
    network.advance(Duration::from_secs(1));
    assert!(network.is_captured(0, THIRD[0]), "its own probe made it able");
}

#[test]
fn packets_decide_nothing_and_a_peer_that_falls_silent_is_passed_until_a_probe_succeeds() {
    let mut network = half_migrated();
    network.changes(0);
    for port in 4000..4100 {
        network.capture(0, &udp((CLIENT[0], port), (SERVER[0], 8080), b"CANARY"));
    }
    assert_eq!(network.inbox(1).len(), 100);
    assert_eq!(network.changes(0), []);
    network.nodes[1].absent = true;
    for _ in 0..30 {
        network.capture(0, &udp((CLIENT[0], 4000), (SERVER[0], 8080), b"CANARY"));
        network.advance(Duration::from_secs(1));
    }
    let passed: Vec<_> = [SERVER[0], VIP[1]].map(ip).into_iter().collect();
    let changes = network.changes(0);
    assert!(changes.contains(&RouteChange::Pass(passed[0])) && !network.is_captured(0, SERVER[0]));
    assert!(!changes.contains(&RouteChange::Pass(passed[1])), "the other family is able");
    network.nodes[1].absent = false;
    network.advance(Duration::from_secs(65));
    assert!(network.is_captured(0, SERVER[0]));
    assert!(!network.says(b"CANARY"));
}

#[test]
fn a_sealed_flow_stays_sealed_while_its_peer_is_passed_and_its_data_shows_that_the_peer_is_able() {
    let mut network = half_migrated();
    network.capture(0, &udp((CLIENT[0], 4000), (SERVER[0], 8080), b"CANARY question"));
    network.inbox(1);
    let now = network.now;
    let ladder = network.nodes[1].engine.ladder.as_mut().unwrap();
    ladder.handle_silent(ip(CLIENT[0]), now);
    network.nodes[1].engine.settle(now);
    network.run();
    assert!(!network.is_captured(1, CLIENT[0]));
    // Pinned by the control thread, so it is captured still.
    network.capture(1, &udp((SERVER[0], 8080), (CLIENT[0], 4000), b"CANARY answer"));
    assert_eq!(read(&network.inbox(0)[0]).2, b"CANARY answer");
    assert!(!network.is_captured(1, CLIENT[0]));
    network.nodes[1].applies = false;
    network.capture(0, &udp((CLIENT[0], 4000), (SERVER[0], 8080), b"CANARY known"));
    assert_eq!(network.inbox(1).len(), 1, "a known flow does not wait for the route");
    network.capture(0, &udp((CLIENT[0], 4001), (SERVER[0], 8080), b"CANARY new"));
    assert!(network.inbox(1).is_empty(), "a new one does");
    network.nodes[1].applies = true;
    network.run();
    assert!(network.is_captured(1, CLIENT[0]));
    assert_eq!(read(&network.inbox(1)[0]).2, b"CANARY new");
    assert!(!network.says(b"CANARY"));
}

#[test]
fn a_sealed_flow_of_a_peer_that_is_able_and_passed_keeps_its_fragments() {
    let mut network = half_migrated();
    network.capture(0, &udp((CLIENT[0], 4000), (SERVER[0], 8080), b"known"));
    network.inbox(1);
    let behind = vec![vip(VIP[0], &[SERVER[0], THIRD[0]])];
    (0..2).for_each(|node| network.tell(node, behind.clone()));
    for id in 1..3 {
        for part in fragments(&udp((CLIENT[0], 4000), (SERVER[0], 8080), &[0x55; 2000]), id) {
            network.capture(0, &part);
        }
        assert_eq!(network.inbox(1).len(), 2);
        assert!(!network.is_captured(1, CLIENT[0]));
    }
}

#[test]
fn strict_captures_everything_at_once_and_probes_nobody() {
    let mut network = Network::new(&[CLIENT]);
    network.tell(0, everything());
    for address in [SERVER[0], THIRD[1], VIP[0]] {
        assert!(network.is_captured(0, address));
    }
    network.advance(Duration::from_secs(130));
    assert!(network.wire.is_empty() && network.nodes[0].engine.ladder().next().is_none());
    let is_strict =
        |change: &RouteChange| matches!(change, RouteChange::Protect(_) | RouteChange::Connect(_));
    assert!(network.changes(0).iter().all(is_strict));
}

#[test]
fn connections_through_a_vip_to_a_peer_that_leaves_are_reset_by_name() {
    let mut network = Network::project();
    network.capture(0, &syn((CLIENT[0], 4000), (VIP[0], 80)));
    network.capture(0, &syn((CLIENT[0], 4001), (THIRD[0], 80)));
    network.nodes[0].applied.clear();
    network.tell(0, vec![Change::RemoveWorkload(ip(SERVER[0]))]);
    let resets: Vec<_> = network.nodes[0].applied.iter().flat_map(|batch| batch.resets.clone()).collect();
    let lost = Tuple { protocol: 6, local: (ip(CLIENT[0]), 4000), remote: (ip(VIP[0]), 80) };
    assert_eq!(resets, [lost]);
    network.nodes[0].engine.count_destroyed(0, 1);
    assert_eq!(network.dropped(0, DropReason::PeerGone), 1);
}

#[test]
fn where_older_connections_cannot_be_destroyed_their_next_segment_is_refused() {
    let mut network = Network::project();
    network.nodes[0].engine.refuse_older_flows([ip(SERVER[0])]);
    let segment = |port| {
        let mut out = Vec::new();
        let built = builder(ip(CLIENT[0]), ip(SERVER[0])).tcp(port, 80, 1000, 64_000).ack(1);
        built.write(&mut out, b"CANARY").unwrap();
        out
    };
    network.capture(0, &segment(4000));
    let answer = network.inbox(0).remove(0);
    let parsed = crate::wire::packet::Packet::parse(&answer).unwrap();
    assert_eq!(parsed.tcp_flags(&answer), Some(crate::wire::packet::TCP_RST));
    assert_eq!(network.dropped(0, DropReason::Preexisting), 1);
    assert!(network.inbox(1).is_empty());
    network.capture(0, &syn((CLIENT[0], 4000), (SERVER[0], 80)));
    network.capture(0, &segment(4000));
    assert_eq!(network.inbox(1).len(), 2, "a new connection is none of them");
}

#[test]
fn what_is_noted_about_older_connections_ends_with_the_protection_of_their_address() {
    let mut network = Network::project();
    let noted = |network: &Network| network.nodes[0].engine.older_flows.len();
    network.nodes[0].engine.refuse_older_flows([SERVER[0], THIRD[0], "10.9.9.9"].map(ip));
    assert_eq!(noted(&network), 2, "nothing about an address that is not protected");
    network.tell(0, vec![Change::RemoveWorkload(ip(SERVER[0]))]);
    network.advance(Duration::from_secs(599));
    assert_eq!(noted(&network), 2);
    network.advance(Duration::from_secs(2));
    assert_eq!(noted(&network), 1);
}

#[test]
fn both_ends_find_out_that_they_cannot_reach_each_other_even_the_one_with_nothing_to_send() {
    let mut network = half_migrated();
    network.nodes[0].absent = true;
    network.advance(Duration::from_secs(70));
    assert!(!network.is_captured(1, CLIENT[0]) && !network.is_captured(0, SERVER[0]));
    network.nodes[0].absent = false;
    network.advance(Duration::from_secs(70));
    assert!(network.is_captured(1, CLIENT[0]) && network.is_captured(0, SERVER[0]));
}
