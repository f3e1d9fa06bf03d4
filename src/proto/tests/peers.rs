//! Handshakes and the guard: nothing is sent to a peer before the guard lets it out (`Network::carry` asserts it always).

use super::super::journal::Restored;
use super::*;

impl Network {
    /// Handshake messages and sealed datagrams that the node wants to send now, by their first byte.
    fn sends(&mut self, node: usize) -> Vec<u8> {
        let engine = &mut self.nodes[node].engine;
        let mut kinds = Vec::new();
        while let Some(sent) = engine.poll_transmit() {
            kinds.push(sent.bytes[0]);
        }
        kinds
    }
}

fn first_packet(network: &mut Network) {
    network.hand_over(0, VnetHeader::PLAIN, &udp((CLIENT[0], 4000), (SERVER[0], 8080), b"first"));
}

#[test]
fn a_kept_initiation_is_answered_as_soon_as_the_peer_is_connected_and_not_before() {
    let mut network = Network::new(&[CLIENT, SERVER]);
    network.tell(0, everything());
    first_packet(&mut network);
    network.run();
    // The server does not know the client yet. It learns of it, and the kernel is slow.
    network.nodes[1].applies = false;
    network.nodes[1].engine.handle_directory(everything(), network.now);
    assert!(network.sends(1).is_empty(), "the guard would refuse it");
    let batches: Vec<_> = std::iter::from_fn(|| network.nodes[1].engine.poll_batch()).collect();
    assert!(network.sends(1).is_empty());
    for batch in batches {
        network.nodes[1].engine.handle_applied(batch.id, true, network.now);
        network.nodes[1].note_peers(&batch);
    }
    let now = network.now;
    network.nodes[1].applies = true;
    network.run();
    assert_eq!(read(&network.inbox(1)[0]).2, b"first");
    assert_eq!(network.now.instant, now.instant, "no retry was needed");
}

#[test]
fn an_initiation_to_a_peer_waits_until_it_is_connected_also_where_its_address_was_a_vips() {
    let mut network = Network::new(&[CLIENT, SERVER]);
    network.tell(1, everything());
    // A VIP has the address first: it is captured already when the workload comes.
    network.tell(0, vec![vip(SERVER[0], &[])]);
    assert!(network.nodes[0].peers.is_empty());
    network.nodes[0].applies = false;
    network.nodes[0].engine.handle_directory(everything(), network.now);
    first_packet(&mut network);
    network.run();
    assert!(network.wire.is_empty() && network.nodes[0].engine.waiting().outbound == 1);
    network.nodes[0].applies = true;
    network.run();
    assert_eq!(read(&network.inbox(1)[0]).2, b"first");
    let count = |change: RouteChange| {
        network.nodes[0].applied.iter().flat_map(|batch| &batch.changes).filter(|c| **c == change).count()
    };
    assert_eq!(
        (count(RouteChange::Protect(ip(SERVER[0]))), count(RouteChange::Connect(ip(SERVER[0])))),
        (1, 1)
    );
}

#[test]
fn a_workload_that_is_still_a_vip_is_disconnected_and_stays_protected() {
    let mut network = Network::project();
    network.tell(0, vec![vip(SERVER[0], &[THIRD[0]])]);
    network.nodes[0].applied.clear();
    network.tell(0, vec![Change::RemoveWorkload(ip(SERVER[0]))]);
    let changes: Vec<_> = network.nodes[0].applied.iter().flat_map(|batch| batch.changes.clone()).collect();
    assert_eq!(changes, [RouteChange::Disconnect(ip(SERVER[0]))]);
    assert!(network.nodes[0].engine.routing.is_captured(ip(SERVER[0])));
    network.nodes[0].applied.clear();
    network.tell(0, vec![Change::RemoveVip(ip(SERVER[0]))]);
    let changes: Vec<_> = network.nodes[0].applied.iter().flat_map(|batch| batch.changes.clone()).collect();
    assert_eq!(changes, [RouteChange::Prohibit(ip(SERVER[0]))]);
}

#[test]
fn changed_keys_of_a_connected_peer_need_no_word_of_the_guard() {
    let mut network = Network::project();
    network.nodes[0].applies = false;
    let keys = PeerKeys { public: secret(ip(SERVER[0])).public(), psk: PresharedKey([1; 32]) };
    network.tell(0, vec![Change::SetWorkload(Workload { address: ip(SERVER[0]), keys, accept: None })]);
    first_packet(&mut network);
    assert_eq!(network.sends(0), [1]);
    assert!(network.nodes[0].batches.is_empty());
}

#[test]
fn promise_7_peers_that_a_former_agent_left_connected_are_met_without_waiting_for_the_guard() {
    for adopted in [true, false] {
        let mut network = Network::new(&[CLIENT]);
        let (engine, now) = (&mut network.nodes[0].engine, network.now);
        engine.restore(&Restored { peers: vec![(0, ip(SERVER[0]))], ..Default::default() }, now);
        if adopted {
            engine.adopt_peers(&[ip(SERVER[0]), ip("10.1.9.9")], now);
        }
        engine.handle_directory(everything(), now);
        engine.handle_timeout(now);
        let batches: Vec<_> = std::iter::from_fn(|| engine.poll_batch()).collect();
        assert_eq!(network.sends(0), [1].repeat(usize::from(adopted)));
        // The one that nobody names is a peer no more.
        let changes: Vec<_> = batches.iter().flat_map(|batch| &batch.changes).collect();
        assert_eq!(changes.contains(&&RouteChange::Disconnect(ip("10.1.9.9"))), adopted);
        let engine = &mut network.nodes[0].engine;
        batches.iter().for_each(|batch| engine.handle_applied(batch.id, true, now));
        engine.handle_timeout(now);
        assert_eq!(network.sends(0), [1].repeat(usize::from(!adopted)));
    }
}

#[test]
fn where_the_kernel_refuses_the_connection_the_handshake_waits_for_the_retry() {
    let mut network = Network::new(&[CLIENT]);
    let (engine, now) = (&mut network.nodes[0].engine, network.now);
    engine.handle_directory(everything(), now);
    first_packet(&mut network);
    let engine = &mut network.nodes[0].engine;
    while let Some(batch) = engine.poll_batch() {
        engine.handle_applied(batch.id, false, now);
    }
    assert!(network.sends(0).is_empty());
    network.nodes[0].applies = false;
    network.advance(Duration::from_millis(900));
    assert!(network.sends(0).is_empty());
    network.advance(Duration::from_millis(200));
    for batch in std::mem::take(&mut network.nodes[0].batches) {
        network.nodes[0].engine.handle_applied(batch.id, true, network.now);
    }
    assert_eq!(network.sends(0), [1, 1], "the newest two of its initiations");
}
