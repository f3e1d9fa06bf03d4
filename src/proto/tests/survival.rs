//! Agents that end: without notice (the journal), and for a planned upgrade (the handover).

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::super::handover::ImportError;
use super::super::journal::{FlowRecord, Record, Restored};
use super::super::nat::{Direction, Flows, Kind, Tuple};
use super::super::{balance, inbound};
use super::*;

/// What the state file would hold.
#[derive(Default)]
pub(super) struct Journal {
    flows: BTreeMap<u32, FlowRecord>,
    peers: BTreeMap<u32, IpAddr>,
    stamp: Option<Duration>,
    writes: usize,
}

impl Journal {
    pub(super) fn drain(&mut self, engine: &mut Engine) {
        while let Some(record) = engine.poll_record() {
            self.writes += 1;
            match record {
                Record::Flow { slot, flow: Some(flow) } => drop(self.flows.insert(slot, flow)),
                Record::Flow { slot, flow: None } => drop(self.flows.remove(&slot)),
                Record::Peer { slot, address: Some(address) } => drop(self.peers.insert(slot, address)),
                Record::Peer { slot, address: None } => drop(self.peers.remove(&slot)),
                Record::Stamp(stamp) => {
                    assert!(self.stamp.is_none_or(|last| last < stamp));
                    self.stamp = Some(stamp);
                }
            }
        }
    }

    pub(super) fn restored(&self) -> Restored {
        Restored {
            flows: self.flows.iter().map(|(slot, flow)| (*slot, *flow)).collect(),
            peers: self.peers.iter().map(|(slot, address)| (*slot, *address)).collect(),
            stamp: self.stamp,
            ..Restored::default()
        }
    }
}

/// A successor's seed for indices and keys is its own; that for endpoint choice is its predecessor's.
pub(super) fn successor(node: &Node, number: u8) -> Engine {
    let mut new = engine(200 + number, &node.own, Mode::Strict);
    new.balance_seed = node.engine.balance_seed;
    new
}

pub(super) fn bring_up(engine: &mut Engine, now: Now) {
    engine.handle_directory(everything(), now);
    while let Some(batch) = engine.poll_batch() {
        engine.handle_applied(batch.id, true, now);
    }
}

impl Network {
    /// Kills the agent of `node` after its journal was written, and starts another one.
    pub(super) fn crash(&mut self, node: usize, journal: &mut Journal) {
        journal.drain(&mut self.nodes[node].engine);
        let mut new = successor(&self.nodes[node], u8::try_from(node).unwrap());
        new.restore(&journal.restored(), self.now);
        self.nodes[node].engine = new;
    }

    pub(super) fn upgrade(&mut self, node: usize, generation: u8) -> Vec<u8> {
        let mut new = successor(&self.nodes[node], generation);
        bring_up(&mut new, self.now);
        let old = std::mem::replace(&mut self.nodes[node].engine, new);
        let bytes = old.export(self.now);
        self.nodes[node].engine.import(&bytes, self.now).unwrap();
        bytes.to_vec()
    }

    /// Carries one datagram, if one is under way.
    fn carry_one(&mut self) {
        for node in 0..self.nodes.len() {
            let Some(sent) = self.nodes[node].engine.poll_transmit() else { continue };
            let (to, bytes, segment) = (sent.to, sent.bytes.to_vec(), sent.segment);
            self.wire.extend(bytes.chunks(segment).map(<[u8]>::to_vec));
            self.deliver(node, to, &bytes, segment);
            return;
        }
    }

    /// Every (receiver index, counter) pair on the wire, and whether each was used once.
    fn each_pair_is_used_once(&self) -> bool {
        let data = self.wire.iter().filter(|datagram| datagram[0] == 4);
        let pairs: Vec<&[u8]> = data.map(|datagram| &datagram[4..16]).collect();
        pairs.iter().collect::<BTreeSet<_>>().len() == pairs.len() && !pairs.is_empty()
    }
}

#[test]
fn promise_7_a_server_that_speaks_first_through_a_vip_still_does_after_its_agent_was_killed() {
    for family in 0..2 {
        let mut network = Network::project();
        let mut journal = Journal::default();
        network.capture(0, &syn((CLIENT[family], 4000), (VIP[family], 80)));
        assert_eq!(network.inbox(1).len(), 1);
        network.crash(1, &mut journal);
        network.capture(1, &data((SERVER[family], 8080), (CLIENT[family], 4000), b"pushed"));
        assert!(network.inbox(1).is_empty(), "no reset while the directory is on its way");
        network.tell(1, everything());
        network.advance(Duration::from_millis(300));
        let got = network.inbox(0);
        assert_eq!(read(&got[0]), (at(VIP[family], 80), at(CLIENT[family], 4000), b"pushed".to_vec()));
        network.capture(0, &data((CLIENT[family], 4000), (VIP[family], 80), b"back"));
        assert_eq!(read(&network.inbox(1)[0]).1, at(SERVER[family], 8080));
    }
}

#[test]
fn promise_7_a_client_keeps_its_endpoint_after_its_agent_was_killed() {
    let mut network = Network::project();
    let mut journal = Journal::default();
    network.tell(0, vec![vip(VIP[0], &[SERVER[0], THIRD[0]])]);
    let mut chosen = BTreeMap::new();
    for port in 1000..1040 {
        network.tell(1, vec![vip(VIP[0], &[SERVER[0]])]);
        network.tell(2, vec![vip(VIP[0], &[THIRD[0]])]);
        network.capture(0, &udp((CLIENT[0], port), (VIP[0], 80), b"x"));
        chosen.insert(port, if network.inbox(1).is_empty() { 2 } else { 1 });
        network.inbox(2);
    }
    network.crash(0, &mut journal);
    let flows = network.nodes[0].engine.flows.len();
    // The peers are unknown for a while: no flow is lost by that.
    network.advance(Duration::from_secs(5));
    assert_eq!((network.nodes[0].engine.flows.len(), flows), (40, 40));
    network.tell(0, everything());
    // Neither endpoint is ready any more: what is pinned stays pinned.
    network.tell(0, vec![vip(VIP[0], &[])]);
    network.advance(Duration::from_secs(1));
    for (port, node) in &chosen {
        network.capture(0, &udp((CLIENT[0], *port), (VIP[0], 80), b"y"));
        assert_eq!(network.inbox(*node).len(), 1, "port {port}");
    }
    assert!(chosen.values().collect::<BTreeSet<_>>().len() == 2);
}

#[test]
fn promise_7_a_lost_entry_is_computed_equal_with_the_same_seed() {
    let mut network = Network::project();
    let endpoints = [SERVER[0], THIRD[0], "10.1.4.4", "10.1.5.5"];
    network.tell(0, vec![vip(VIP[0], &endpoints)]);
    let before = &network.nodes[0].engine;
    let mut after = successor(&network.nodes[0], 0);
    after.handle_directory(vec![vip(VIP[0], &endpoints)], network.now);
    for port in 1..500 {
        let tuple = Tuple { protocol: 6, local: (ip(CLIENT[0]), port), remote: (ip(VIP[0]), 80) };
        let [one, two] = [before, &after].map(|engine| {
            let vip = engine.directory.vip(ip(VIP[0])).unwrap();
            balance::choose(&engine.balance_seed, vip, &vip.ports[0], &tuple, |_| true).copied()
        });
        assert!(one == two && one.is_some());
    }
}

#[test]
fn promise_7_a_live_peer_is_met_again_as_soon_as_the_directory_names_it_without_traffic() {
    let mut network = Network::project();
    let mut journal = Journal::default();
    network.capture(0, &udp((CLIENT[0], 4000), (SERVER[0], 8080), b"opens"));
    network.inbox(1);
    journal.drain(&mut network.nodes[0].engine);
    assert_eq!(journal.peers.values().copied().collect::<Vec<_>>(), [ip(SERVER[0])]);
    network.crash(0, &mut journal);
    network.wire.clear();
    network.advance(Duration::from_secs(1));
    assert!(network.wire.is_empty(), "nobody is named yet");
    network.tell(0, everything());
    assert_eq!(network.wire[0][0], 1, "an initiation, at once");
    // The other side's next packet arrives without any from here.
    network.advance(Duration::from_millis(50));
    network.capture(1, &udp((SERVER[0], 8080), (CLIENT[0], 4000), b"server speaks"));
    assert_eq!(read(&network.inbox(0)[0]).2, b"server speaks");
    let initiations = network.wire.iter().filter(|datagram| datagram[0] == 1).count();
    assert_eq!(initiations, 1, "only the peer that was live");
}

#[test]
fn promise_4_a_successors_initiations_are_newer_even_when_the_clock_went_back() {
    let mut network = Network::project();
    let mut journal = Journal::default();
    network.capture(0, &udp((CLIENT[0], 4000), (SERVER[0], 8080), b"opens"));
    network.inbox(1);
    network.crash(0, &mut journal);
    network.now.wall -= Duration::from_secs(300);
    network.advance(Duration::from_millis(50));
    network.tell(0, everything());
    network.capture(0, &udp((CLIENT[0], 4000), (SERVER[0], 8080), b"again"));
    assert_eq!(network.inbox(1).len(), 1);
    assert_eq!(network.dropped(1, DropReason::HandshakeReplay), 0);
}

#[test]
fn a_steady_flow_writes_nothing_and_an_ended_one_leaves_nothing() {
    let mut network = Network::project();
    let mut journal = Journal::default();
    for n in 0..200u8 {
        network.capture(0, &udp((CLIENT[0], 4000), (VIP[0], 80), &[n]));
        network.capture(1, &udp((SERVER[0], 8080), (CLIENT[0], 4000), &[n]));
        journal.drain(&mut network.nodes[0].engine);
    }
    // Stamp, peer, the flow's first packet in each direction.
    assert!(journal.writes <= 5, "{} writes", journal.writes);
    assert_eq!(journal.flows.len(), 1);
    network.advance(Duration::from_secs(400));
    journal.drain(&mut network.nodes[0].engine);
    assert!(journal.flows.is_empty() && journal.peers.is_empty());
}

#[test]
fn a_peer_that_nobody_meets_again_is_not_live_for_ever() {
    let mut network = Network::project();
    let mut journal = Journal::default();
    network.capture(0, &udp((CLIENT[0], 4000), (SERVER[0], 8080), b"opens"));
    network.crash(0, &mut journal);
    network.nodes.truncate(1);
    network.tell(0, everything());
    network.advance(Duration::from_secs(85));
    journal.drain(&mut network.nodes[0].engine);
    assert_eq!(journal.peers.len(), 1, "still being tried");
    network.advance(Duration::from_secs(10));
    journal.drain(&mut network.nodes[0].engine);
    assert!(journal.peers.is_empty());
}

#[test]
fn promise_4_no_key_and_counter_pair_is_used_twice_across_a_handover() {
    let mut network = Network::project();
    let (mut asked, mut answered) = (0, 0);
    for n in 0..600u32 {
        let payload = n.to_be_bytes();
        network.capture(0, &udp((CLIENT[0], 4000), (VIP[0], 80), &payload));
        network.capture(1, &udp((SERVER[0], 8080), (CLIENT[0], 4000), &payload));
        for packet in network.inbox(1) {
            assert_eq!(read(&packet).2, asked_bytes(&mut asked));
        }
        for packet in network.inbox(0) {
            let (from, _, payload) = read(&packet);
            assert_eq!((from, payload), (at(VIP[0], 80), asked_bytes(&mut answered)));
        }
        if n % 50 == 25 {
            network.upgrade(usize::from(n % 100 == 25), u8::try_from(n / 50).unwrap());
        }
        network.advance(Duration::from_millis(700));
    }
    assert_eq!((asked, answered), (600, 600), "nothing lost, nothing twice, in order");
    assert!(network.each_pair_is_used_once());
    let initiations = network.wire.iter().filter(|datagram| datagram[0] == 1).count();
    assert!((4..=6).contains(&initiations), "{initiations}: rekeys by age, none for an upgrade");
    // Counts go on.
    assert_eq!(network.nodes[0].engine.counters().opened, 600);
}

fn asked_bytes(next: &mut u32) -> Vec<u8> {
    *next += 1;
    (*next - 1).to_be_bytes().to_vec()
}

#[test]
fn promise_4_a_packet_opened_before_a_handover_is_refused_after_it() {
    let mut network = Network::project();
    for n in 0..20 {
        network.capture(0, &udp((CLIENT[0], 4000), (SERVER[0], 8080), &[n]));
    }
    assert!(!network.inbox(1).is_empty());
    let sealed: Vec<Vec<u8>> = network.wire.iter().filter(|d| d[0] == 4 && d.len() > 32).cloned().collect();
    assert_eq!(sealed.len(), 20);
    network.upgrade(1, 1);
    for datagram in &sealed {
        network.deliver(0, at(SERVER[0], PORT), datagram, datagram.len());
    }
    assert!(network.inbox(1).is_empty());
    assert_eq!(network.dropped(1, DropReason::Replay), 20);
}

#[test]
fn promise_7_packets_that_wait_go_along_in_a_handover() {
    let mut network = Network::project();
    // Staged: the peer is away. Held: nobody knows the destination yet, and no service of that name.
    let server = network.nodes.remove(1);
    network.capture(0, &udp((CLIENT[0], 4000), (SERVER[0], 8080), b"staged"));
    network.capture(0, &udp((CLIENT[0], 4001), ("10.96.0.81", 80), b"unrouted"));
    network.advance(Duration::from_millis(100));
    network.upgrade(0, 1);
    network.nodes.insert(1, server);
    network.tell(1, vec![vip("10.96.0.81", &[SERVER[0]])]);
    network.tell(0, vec![vip("10.96.0.81", &[SERVER[0]])]);
    network.advance(Duration::from_millis(500));
    let got: BTreeSet<_> = network.inbox(1).iter().map(|packet| read(packet).2).collect();
    assert_eq!(got, BTreeSet::from([b"staged".to_vec(), b"unrouted".to_vec()]));
    // Opened, and waiting for the directory at the server.
    network.tell(0, vec![vip("10.96.0.82", &[SERVER[0]])]);
    network.capture(0, &udp((CLIENT[0], 4002), ("10.96.0.82", 80), b"inbound"));
    assert!(network.inbox(1).is_empty());
    network.upgrade(1, 2);
    network.tell(1, vec![vip("10.96.0.82", &[SERVER[0]])]);
    assert_eq!(read(&network.inbox(1)[0]).2, b"inbound");
}

#[test]
fn promise_7_a_datagram_in_fragments_goes_along_in_a_handover() {
    let mut network = Network::project();
    let [first, later] = fragments(&udp((CLIENT[0], 4000), (VIP[0], 80), &[0x55; 2000]), 1);
    network.capture(0, &first);
    network.upgrade(0, 1);
    network.upgrade(1, 2);
    network.capture(0, &later);
    let got = network.inbox(1);
    let whole = udp((CLIENT[0], 4000), (SERVER[0], 8080), &[0x55; 2000]);
    assert_eq!([&got[0][20..], &got[1][20..]].concat(), whole[20..]);
}

#[test]
fn promise_7_what_was_sealed_or_opened_but_not_polled_goes_along_in_a_handover() {
    let mut network = Network::project();
    network.capture(0, &udp((CLIENT[0], 4000), (SERVER[0], 8080), b"opens"));
    network.inbox(1);
    let now = network.now;
    let packet = udp((CLIENT[0], 4000), (SERVER[0], 8080), b"sealed, not sent");
    network.hand_over(0, VnetHeader::PLAIN, &packet);
    network.upgrade(0, 1);
    network.run();
    assert_eq!(read(&network.inbox(1)[0]).2, b"sealed, not sent");

    let first = udp((CLIENT[0], 4000), (SERVER[0], 8080), b"opened, not injected");
    network.hand_over(0, VnetHeader::PLAIN, &first);
    let sealed = network.nodes[0].engine.poll_transmit().unwrap().bytes.to_vec();
    let server = &mut network.nodes[1].engine;
    server.receive_buffer()[..sealed.len()].copy_from_slice(&sealed);
    server.handle_datagrams(at(CLIENT[0], PORT), sealed.len(), sealed.len(), now);
    network.upgrade(1, 2);
    network.run();
    assert_eq!(read(&network.inbox(1)[0]).2, b"opened, not injected");
}

#[test]
fn promise_7_a_handover_at_any_point_of_a_handshake_loses_no_packet() {
    for steps in 0..6 {
        for upgraded in [&[0][..], &[1], &[0, 1]] {
            let mut network = Network::project();
            let packet = udp((CLIENT[0], 4000), (SERVER[0], 8080), b"first");
            network.hand_over(0, VnetHeader::PLAIN, &packet);
            for _ in 0..steps {
                network.carry_one();
            }
            for node in upgraded {
                network.upgrade(*node, 10 + u8::try_from(*node).unwrap());
            }
            network.run();
            network.advance(Duration::from_secs(1));
            let got = network.inbox(1);
            assert_eq!(got.len(), 1, "{upgraded:?} after {steps} datagrams");
            assert_eq!(read(&got[0]).2, b"first");
            network.capture(1, &udp((SERVER[0], 8080), (CLIENT[0], 4000), b"second"));
            assert_eq!(read(&network.inbox(0)[0]).2, b"second");
            assert!(network.each_pair_is_used_once());
        }
    }
}

#[test]
fn promise_7_both_sides_killed_at_once_meet_again() {
    let mut network = Network::project();
    let mut journals = [Journal::default(), Journal::default()];
    network.capture(0, &syn((CLIENT[0], 4000), (VIP[0], 80)));
    network.inbox(1);
    for (node, journal) in journals.iter_mut().enumerate() {
        network.crash(node, journal);
    }
    for node in 0..2 {
        network.nodes[node].engine.handle_directory(everything(), network.now);
    }
    network.run();
    network.advance(Duration::from_millis(300));
    network.capture(1, &data((SERVER[0], 8080), (CLIENT[0], 4000), b"pushed"));
    assert_eq!(read(&network.inbox(0)[0]).0, at(VIP[0], 80));
}

#[test]
fn the_journal_of_a_successor_is_its_predecessors() {
    let mut network = Network::project();
    let mut journal = Journal::default();
    network.capture(0, &udp((CLIENT[0], 4000), (THIRD[0], 8080), b"opens"));
    network.capture(0, &udp((CLIENT[0], 4000), (VIP[0], 80), b"opens"));
    journal.drain(&mut network.nodes[0].engine);
    network.upgrade(0, 1);
    let mut again = Journal::default();
    again.drain(&mut network.nodes[0].engine);
    assert_eq!((journal.flows.len(), journal.peers.len()), (2, 2));
    assert!(again.flows == journal.flows && again.peers == journal.peers);
}

#[test]
fn a_session_is_as_old_after_a_handover_as_before() {
    let mut network = Network::project();
    network.capture(0, &udp((CLIENT[0], 4000), (SERVER[0], 8080), b"opens"));
    network.inbox(1);
    network.advance(Duration::from_secs(170));
    let mut new = successor(&network.nodes[0], 1);
    bring_up(&mut new, network.now);
    let old = std::mem::replace(&mut network.nodes[0].engine, new);
    let bytes = old.export(network.now);
    // The session's hard limit passes on the way.
    network.now.instant += Duration::from_secs(15);
    network.now.wall += Duration::from_secs(15);
    network.nodes[0].engine.import(&bytes, network.now).unwrap();
    network.wire.clear();
    network.capture(0, &udp((CLIENT[0], 4000), (SERVER[0], 8080), b"later"));
    assert_eq!(network.wire[0][0], 1, "a new handshake");
}

#[test]
fn promise_7_sessions_outlive_each_step_of_a_key_rotation() {
    let keys = |n: u8| PeerKeys { public: StaticSecret([n; 32]).public(), psk: PresharedKey([n; 32]) };
    let old = PeerKeys { public: secret(ip(SERVER[0])).public(), psk: PresharedKey([9; 32]) };
    for (used, accepted) in [(old.clone(), keys(77)), (keys(77), old)] {
        let mut network = Network::project();
        network.capture(0, &udp((CLIENT[0], 4000), (SERVER[0], 8080), b"opens"));
        let mut new = successor(&network.nodes[0], 1);
        bring_up(&mut new, network.now);
        let changed = Workload { address: ip(SERVER[0]), keys: used, accept: Some(accepted) };
        new.handle_directory(vec![Change::SetWorkload(changed)], network.now);
        let old = std::mem::replace(&mut network.nodes[0].engine, new);
        network.nodes[0].engine.import(&old.export(network.now), network.now).unwrap();
        network.wire.clear();
        network.capture(0, &udp((CLIENT[0], 4000), (SERVER[0], 8080), b"under the session that was"));
        assert_eq!(network.wire[0][0], 4, "data, at once");
    }
}

#[test]
fn a_peer_with_another_key_gets_none_of_the_sessions() {
    let mut network = Network::project();
    network.capture(0, &udp((CLIENT[0], 4000), (SERVER[0], 8080), b"opens"));
    let mut new = successor(&network.nodes[0], 1);
    bring_up(&mut new, network.now);
    let other = StaticSecret([77; 32]).public();
    let keys = PeerKeys { public: other, psk: PresharedKey([9; 32]) };
    let changed = Workload { address: ip(SERVER[0]), keys, accept: None };
    new.handle_directory(vec![Change::SetWorkload(changed)], network.now);
    let old = std::mem::replace(&mut network.nodes[0].engine, new);
    network.nodes[0].engine.import(&old.export(network.now), network.now).unwrap();
    network.wire.clear();
    network.capture(0, &udp((CLIENT[0], 4000), (SERVER[0], 8080), b"not under the old key"));
    assert_eq!(network.wire[0][0], 1, "a new handshake");
}

#[test]
fn state_of_another_version_or_program_is_refused_and_changes_nothing() {
    let mut network = Network::project();
    network.capture(0, &udp((CLIENT[0], 4000), (SERVER[0], 8080), b"opens"));
    let good = network.upgrade(0, 1);
    let mut engine = successor(&network.nodes[0], 2);
    let mut version = good.clone();
    version[7] += 1;
    assert_eq!(engine.import(&version, network.now), Err(ImportError::Version(version[7])));
    assert_eq!(engine.import(&good[1..], network.now), Err(ImportError::Foreign));
    assert_eq!(engine.import(&good[..good.len() - 1], network.now), Err(ImportError::Damaged));
    let longer: Vec<u8> = good.iter().copied().chain([0]).collect();
    assert_eq!(engine.import(&longer, network.now), Err(ImportError::Damaged));
    assert!(engine.flows.is_empty() && engine.counters().sealed == 0);
}

/// An exported engine with something in every list.
fn exported() -> (Network, Vec<u8>) {
    let mut network = Network::project();
    network.capture(0, &udp((CLIENT[0], 4000), (VIP[0], 80), b"opens"));
    network.capture(0, &syn((CLIENT[1], 4000), (SERVER[1], 8080)));
    network.nodes.truncate(1);
    network.capture(0, &udp((CLIENT[0], 4000), (THIRD[0], 8080), b"staged"));
    network.capture(0, &udp((CLIENT[0], 4001), ("10.96.0.81", 80), b"unrouted"));
    let bytes = network.upgrade(0, 1);
    (network, bytes)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn promise_7_damaged_bytes_of_an_agent_never_panic(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let (mut network, mut bytes) = exported();
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let mut new = successor(&network.nodes[0], 9);
        bring_up(&mut new, network.now);
        // Either answer is fine; what was taken has to be usable.
        let _ = new.import(&bytes, network.now);
        network.nodes[0].engine = new;
        network.run();
        network.capture(0, &udp((CLIENT[0], 4000), (VIP[0], 80), b"more"));
        network.advance(inbound::HELD_LIFE * 4);
    }

    #[test]
    fn promise_7_the_journal_holds_the_flow_table_as_it_is(
        steps in prop::collection::vec((0..6u8, 0..12u16, 0..6u8, any::<bool>()), 1..200),
    ) {
        let mut now = Now { instant: test_start(), wall: Duration::ZERO };
        let mut flows = Flows::new(1);
        let mut journal = BTreeMap::new();
        let mut drain = |flows: &mut Flows| {
            while let Some((slot, flow)) = flows.poll_changed() {
                match flow {
                    Some(flow) => drop(journal.insert(slot, flow)),
                    None => drop(journal.remove(&slot)),
                }
            }
            journal.clone()
        };
        let (own, peer, vip) = ((ip(SERVER[0]), 8080), ip(CLIENT[0]), ip(VIP[0]));
        for (step, port, flags, drains) in steps {
            let direct = Tuple { protocol: 6, local: own, remote: (peer, port) };
            let wire = Tuple { protocol: 6, local: (vip, 80), remote: (peer, port) };
            let out = Tuple { protocol: 6, local: (own.0, port), remote: (vip, 80) };
            match step {
                0 => drop(flows.insert(direct, peer, Kind::Direct, now)),
                1 if flows.get_by_wire(&wire).is_none() => drop(flows.insert_server(wire, own, peer, now)),
                2 => drop(flows.insert_hairpin(out, own, now)),
                3 => flows.forget(&direct),
                4 => {
                    now.instant += Duration::from_secs(40);
                    flows.sweep(now);
                }
                _ => {
                    let flow = if drains { flows.get_by_wire(&wire) } else { flows.get(&direct) };
                    let direction = if port % 2 == 0 { Direction::Inbound } else { Direction::Outbound };
                    flow.into_iter().for_each(|flow| flow.touch(direction, flags, now));
                }
            }
            if drains {
                drain(&mut flows);
            }
        }
        let written = drain(&mut flows);
        let held: BTreeMap<u32, FlowRecord> = flows.export(now).map(|(slot, flow, _)| (slot, flow)).collect();
        prop_assert_eq!(&written, &held);
        let mut successor = Flows::new(2);
        successor.restore(written.iter().map(|(slot, flow)| (*slot, *flow, now.instant)));
        let again: BTreeMap<u32, FlowRecord> = successor.export(now).map(|(slot, flow, _)| (slot, flow)).collect();
        prop_assert_eq!(&again, &held);
        prop_assert_eq!(successor.poll_changed(), None);
        for flow in held.values() {
            prop_assert_eq!(successor.get(&flow.tuple).map(|found| found.kind), Some(flow.kind));
            if let Kind::Server { service, client_port } = flow.kind {
                let wire = Tuple { protocol: 6, local: service, remote: (peer, client_port) };
                prop_assert_eq!(successor.get_by_wire(&wire).map(|found| found.tuple), Some(flow.tuple));
            }
        }
    }

    #[test]
    fn promise_7_what_a_journal_may_hold_after_damage_never_panics(
        slots in prop::collection::vec((0..3usize, any::<u32>(), 0..70_000u32), 0..40),
        stamp in any::<Option<(u64, u32)>>(),
    ) {
        let mut network = Network::project();
        let mut journal = Journal::default();
        network.capture(0, &udp((CLIENT[0], 4000), (VIP[0], 80), b"x"));
        network.capture(0, &udp((CLIENT[0], 4001), (SERVER[0], 80), b"x"));
        network.capture(0, &udp((CLIENT[1], 4001), (SERVER[1], 80), b"x"));
        journal.drain(&mut network.nodes[0].engine);
        let mut restored = journal.restored();
        let flows: Vec<_> = restored.flows.iter().map(|(_, flow)| *flow).collect();
        for (which, far, near) in slots {
            restored.flows.push((near, flows[which]));
            restored.flows.push((far, flows[which]));
            restored.peers.push((near, ip([SERVER[0], "0.0.0.0", "fd00::7"][which])));
            restored.peers.push((far, ip(THIRD[0])));
        }
        restored.stamp = stamp.map(|(s, n)| Duration::new(s, n % 1_000_000_000));
        let mut new = successor(&network.nodes[0], 9);
        new.restore(&restored, network.now);
        prop_assert_eq!(new.flows.len(), 3);
        network.nodes[0].engine = new;
        journal.drain(&mut network.nodes[0].engine);
        network.tell(0, everything());
        network.advance(Duration::from_secs(1));
        journal.drain(&mut network.nodes[0].engine);
    }
}
