//! Updates of the directory while packets go on.

use std::collections::BTreeSet;
use std::ops::Bound;

use proptest::prelude::*;

use super::super::journal::Restored;
use super::super::update::SLICE;
use super::dns::query;
use super::*;

const ENDPOINTS: u32 = 10_000;
/// With a VIP for every tenth.
const ENTRIES: usize = 11_000;
const ALL: (Bound<IpAddr>, Bound<IpAddr>) = (Bound::Unbounded, Bound::Unbounded);

fn pod(n: u32) -> IpAddr {
    IpAddr::V4(std::net::Ipv4Addr::from_bits(0x0a02_0000 + n))
}

/// Workloads with as many addresses, and a VIP for every tenth.
fn many() -> Vec<Change> {
    let keys = || PeerKeys { public: secret(ip(THIRD[0])).public(), psk: PresharedKey([9; 32]) };
    let workloads =
        (0..ENDPOINTS).map(|n| Change::SetWorkload(Workload { address: pod(n), keys: keys(), accept: None }));
    let vips = (0..ENDPOINTS / 10).map(|n| vip(&pod(1 << 15 | n).to_string(), &[&pod(n).to_string()]));
    workloads.chain(vips).collect()
}

impl Network {
    /// Every workload and VIP that the node knows.
    fn known(&self, node: usize) -> BTreeSet<IpAddr> {
        let directory = &self.nodes[node].engine.directory;
        directory.workloads(ALL).chain(directory.vips(ALL)).collect()
    }

    /// The client's next packet arrives, with nothing but packets done for it.
    fn canary(&mut self, number: u32) {
        let payload = number.to_be_bytes();
        self.hand_over(0, VnetHeader::PLAIN, &udp((CLIENT[0], 4000), (VIP[0], 80), &payload));
        self.carry(false);
        let got: Vec<_> = self.inbox(1).iter().map(|packet| read(packet).2).collect();
        assert_eq!(got, [payload], "the packet waits");
    }

    /// Lets the client apply what is under way, with a packet between each two steps; returns the most that one step did,
    /// and how many steps there were.
    fn update_under_packets(&mut self) -> (usize, u32) {
        let (mut most, mut steps) = (0, 0);
        while self.nodes[0].engine.is_committing() {
            self.canary(steps);
            let before = self.known(0);
            assert!(self.nodes[0].engine.poll_timeout().is_some_and(|due| due <= self.now.instant));
            self.nodes[0].engine.handle_timeout(self.now);
            let after = self.known(0);
            most = most.max(before.symmetric_difference(&after).count());
            steps += 1;
        }
        (most, steps)
    }
}

#[test]
fn an_update_of_10000_endpoints_lets_a_packet_pass_after_each_bounded_step() {
    let mut network = Network::project();
    network.canary(0);
    network.nodes[0].engine.handle_directory(many(), network.now);
    let (most, steps) = network.update_under_packets();
    assert_eq!(network.known(0).len(), ENTRIES + 8 - 2);
    assert!(most <= SLICE, "{most} entries in one step");
    assert!(steps as usize >= ENTRIES / SLICE, "{steps} steps: nothing was in between");
    network.run();

    // And back: found out, removed, and the flow table looked through.
    network.nodes[0].engine.handle_whole_directory(everything(), network.now);
    let (most, steps) = network.update_under_packets();
    assert_eq!(network.known(0).len(), 8 - 2);
    assert!(most <= SLICE, "{most} entries in one step");
    assert!(steps as usize >= ENTRIES / SLICE, "{steps} steps: nothing was in between");
}

#[test]
fn an_update_reaches_the_kernel_in_full_batches_and_is_settled_with_the_last() {
    let mut network = Network::new(&[CLIENT]);
    let engine = &mut network.nodes[0].engine;
    engine.handle_directory(many(), network.now);
    let mut batches = Vec::new();
    loop {
        let committing = engine.is_committing();
        while let Some(batch) = engine.poll_batch() {
            assert!(!engine.is_settled());
            engine.handle_applied(batch.id, true, network.now);
            batches.push((committing, batch.changes.len()));
        }
        if !committing {
            break;
        }
        assert!(!engine.is_settled(), "half an update is none");
        engine.handle_timeout(network.now);
    }
    assert!(engine.is_settled());
    assert!(batches.iter().all(|(committing, len)| *len == 512 || !committing), "{batches:?}");
    // Each workload is protected and connected, each VIP protected.
    assert_eq!(batches.iter().map(|(_, len)| *len).sum::<usize>(), ENTRIES + ENDPOINTS as usize);
}

#[test]
fn promise_2_a_service_that_moves_to_new_pods_serves_and_stays_protected_throughout_the_update() {
    for whole in [false, true] {
        let filler: Vec<_> = many().into_iter().step_by(8).collect();
        let (old, new) = filler.split_at(filler.len() / 2);
        let mut network = Network::project();
        network.tell(2, vec![vip(VIP[0], &[SERVER[0], THIRD[0]])]);
        let first = [workload(ip(SERVER[0])), vip(VIP[0], &[SERVER[0]])].into_iter().chain(old.to_vec());
        network.nodes[0].engine.handle_whole_directory(first.collect(), network.now);
        network.run();
        let before = network.known(0);

        // The service moves from one pod to another one, among a thousand other changes.
        let gone = old.iter().map(|change| match change {
            Change::SetWorkload(workload) => Change::RemoveWorkload(workload.address),
            Change::SetVip(vip) => Change::RemoveVip(vip.address),
            _ => panic!("{change:?}"),
        });
        let mut changes: Vec<_> = if whole { Vec::new() } else { gone.collect() };
        if !whole {
            changes.push(Change::RemoveWorkload(ip(SERVER[0])));
        }
        changes.extend([vip(VIP[0], &[THIRD[0]]), workload(ip(THIRD[0]))]);
        changes.extend(new.to_vec());
        network.nodes[0].engine.handle_changes(changes);
        network.nodes[0].engine.commit(whole, network.now);

        let (mut port, mut by_old, mut by_new) = (10_000, 0, 0);
        loop {
            network.hand_over(0, VnetHeader::PLAIN, &syn((CLIENT[0], port), (VIP[0], 80)));
            network.carry(false);
            let served = [network.inbox(1).len(), network.inbox(2).len()];
            assert_eq!(served[0] + served[1], 1, "a new connection is served at once, by one pod");
            assert!(network.inbox(0).is_empty(), "nothing is refused");
            (by_old, by_new, port) = (by_old + served[0], by_new + served[1], port + 1);
            let engine = &mut network.nodes[0].engine;
            // What leaves stays closed for its ten minutes, too.
            assert!(before.iter().all(|address| engine.is_protected(*address)));
            if !engine.is_committing() {
                break;
            }
            engine.handle_timeout(network.now);
        }
        assert!(by_old > 0 && by_new > 0, "both sides of the move were seen");
        network.run();
        let after: BTreeSet<_> = network.known(0);
        let named = [THIRD[0], VIP[0]].map(ip).into_iter().chain(new.iter().map(|change| match change {
            Change::SetWorkload(workload) => workload.address,
            Change::SetVip(vip) => vip.address,
            _ => panic!("{change:?}"),
        }));
        assert_eq!(after, named.collect());
    }
}

#[test]
fn connections_to_pods_that_left_in_a_large_update_are_reset() {
    let mut network = Network::project();
    for port in 0..2_000 {
        network.hand_over(0, VnetHeader::PLAIN, &syn((CLIENT[0], 10_000 + port), (VIP[0], 80)));
        network.carry(false);
    }
    network.nodes[0].applied.clear();
    let mut changes = many();
    changes.push(Change::RemoveWorkload(ip(SERVER[0])));
    network.tell(0, changes);
    let resets: BTreeSet<_> =
        network.nodes[0].applied.iter().flat_map(|batch| batch.resets.clone()).collect();
    assert_eq!(resets.len(), 2_000);
}

#[test]
fn below_strict_half_an_update_decides_nothing() {
    let mut network = Network::with_mode(&[CLIENT, SERVER], Mode::Permissive);
    for node in 0..2 {
        network.tell(node, vec![workload(ip(CLIENT[0])), workload(ip(SERVER[0])), vip(VIP[0], &[SERVER[0]])]);
    }
    network.advance(Duration::from_secs(1));
    assert!(network.nodes[0].engine.routing.is_captured(ip(VIP[0])));
    // The VIP gets an endpoint that nobody has asked yet, in an update whose end takes a while.
    let mut changes = many();
    changes.push(vip(VIP[0], &[SERVER[0], &pod(1).to_string()]));
    network.nodes[0].engine.handle_directory(changes, network.now);
    let mut steps = 0;
    while network.nodes[0].engine.is_committing() {
        assert!(!network.nodes[0].engine.routing.is_passed(ip(VIP[0])), "decided in the middle");
        network.nodes[0].engine.handle_timeout(network.now);
        steps += 1;
    }
    assert!(steps > 1 && network.nodes[0].engine.routing.is_passed(ip(VIP[0])));
}

#[test]
fn a_thousand_peers_of_a_former_agent_are_met_a_few_at_a_time() {
    let mut network = Network::new(&[CLIENT]);
    let engine = &mut network.nodes[0].engine;
    let peers = (0..1_000).map(|n| (n, pod(n))).collect();
    engine.restore(&Restored { peers, ..Default::default() }, network.now);
    engine.adopt_peers(&(0..1_000).map(pod).collect::<Vec<_>>(), network.now);
    engine.handle_directory(many(), network.now);
    let (mut most, mut all) = (0, 0);
    loop {
        let mut sent = 0;
        while engine.poll_transmit().is_some() {
            sent += 1;
        }
        (most, all) = (most.max(sent), all + sent);
        if engine.poll_timeout().is_none_or(|due| due > network.now.instant) {
            break;
        }
        engine.handle_timeout(network.now);
    }
    assert_eq!(all, 1_000);
    assert!(most <= 2, "{most} handshakes in one step");
}

#[test]
fn queries_that_nobody_answers_are_given_up_a_few_at_a_time() {
    let mut network = Network::project();
    for n in 0..512u16 {
        let mut question = query("db.shop.svc.cluster.local");
        question[..2].copy_from_slice(&n.to_be_bytes());
        network.hand_over(0, VnetHeader::PLAIN, &udp((CLIENT[0], 1_024 + n), (RESOLVER, 53), &question));
    }
    network.now.instant += Duration::from_secs(12);
    let engine = &mut network.nodes[0].engine;
    let mut given_up = 0;
    while engine.poll_timeout().is_some_and(|due| due <= network.now.instant) {
        engine.handle_timeout(network.now);
        let step = std::iter::from_fn(|| engine.poll_expired_query()).count();
        assert!(step <= 32, "{step} sockets at once");
        given_up += step;
    }
    assert_eq!(given_up, 512);
}

/// One change of a small directory: which entry, and what becomes of it.
fn change() -> impl Strategy<Value = Change> {
    (0..300u32, 0..8).prop_map(|(n, what)| match what {
        0 => workload(pod(n)),
        1 => Change::RemoveWorkload(pod(n)),
        2 => vip(&pod(n).to_string(), &[&pod(n + 1).to_string()]),
        3 => Change::RemoveVip(pod(n)),
        4 => Change::SetExempt(pod(n)),
        5 => Change::SetExternal(n.to_string()),
        6 => Change::RemoveExternal(n.to_string()),
        _ => Change::RemoveExempt(pod(n)),
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// The reference: each change by itself, one after the other.
    #[test]
    fn an_update_in_slices_ends_where_its_changes_one_by_one_would(
        commits in prop::collection::vec((prop::collection::vec(change(), 0..700), any::<bool>()), 1..4)
    ) {
        let mut network = Network::new(&[CLIENT]);
        let (mut workloads, mut vips, mut exempt) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        let mut external = BTreeSet::new();
        for (changes, whole) in commits {
            if whole {
                (workloads, vips, exempt, external) = Default::default();
            }
            for change in &changes {
                match change {
                    Change::SetWorkload(workload) => workloads.insert(workload.address),
                    Change::RemoveWorkload(address) => workloads.remove(address),
                    Change::SetVip(vip) => vips.insert(vip.address),
                    Change::RemoveVip(address) => vips.remove(address),
                    Change::SetExempt(address) => exempt.insert(*address),
                    Change::RemoveExempt(address) => exempt.remove(address),
                    Change::SetExternal(name) => external.insert(name.clone()),
                    Change::RemoveExternal(name) => external.remove(name),
                };
            }
            let before = network.known(0);
            let engine = &mut network.nodes[0].engine;
            engine.handle_changes(changes);
            engine.commit(whole, network.now);
            while engine.is_committing() {
                prop_assert!(before.iter().all(|address| engine.is_protected(*address)), "opened in between");
                engine.handle_timeout(network.now);
            }
            network.run();
            let engine = &network.nodes[0].engine;
            prop_assert_eq!(engine.directory.workloads(ALL).collect::<BTreeSet<_>>(), workloads.clone());
            prop_assert_eq!(engine.directory.vips(ALL).collect::<BTreeSet<_>>(), vips.clone());
            prop_assert_eq!(engine.directory.exempt(ALL).collect::<BTreeSet<_>>(), exempt.clone());
            prop_assert_eq!(engine.directory.externals().cloned().collect::<BTreeSet<_>>(), external.clone());
            let peers: BTreeSet<_> = engine.peers(usize::MAX).2.into_iter().map(|(address, _)| address).collect();
            prop_assert_eq!(peers, workloads.clone());
            prop_assert!(workloads.union(&vips).all(|address| engine.routing.is_active(*address)));
        }
    }
}
