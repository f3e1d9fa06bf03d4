//! Promise 12 under everything at once: random walks over three engines, a network that loses, repeats, damages and
//! reorders, and a kernel that refuses. After every step the test's own count of what went in and came out is compared with
//! the engines' counters, and their sums have to hold exactly.

use std::cell::RefCell;

use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{RngAlgorithm, TestError, TestRng, TestRunner};

use super::super::account::{Counters, Waiting};
use super::super::dns::Forward;
use super::super::{Captured, Origin, journal};
use super::dns::{answer, query};
use super::survival::{Journal, bring_up, successor};
use super::*;
use crate::wire::icmp::{IcmpError, icmp_error};

const PODS: [[&str; 2]; 3] = [CLIENT, SERVER, THIRD];
/// In the service range, and named by DNS alone.
const DNS_ONLY: &str = "10.96.0.99";

#[derive(Clone, Debug)]
enum Step {
    /// The pod sends; some of it is cut off or damaged on the way.
    Send {
        node: usize,
        what: Sent,
        to: usize,
        port: u16,
        cut: Option<Index>,
        flip: Option<(Index, u8)>,
    },
    /// The pod's stack answers the last packet it got with an ICMP error.
    SendError {
        node: usize,
    },
    /// The kernel has a packet that it cannot describe.
    Unread {
        node: usize,
    },
    Deliver(Index),
    Lose(Index),
    Repeat(Index),
    Damage(Index, Index),
    /// A datagram of anybody's making.
    Noise {
        node: usize,
        kind: u8,
        len: usize,
        segment: usize,
    },
    Wait(u64),
    Tell {
        node: usize,
        what: usize,
    },
    Apply {
        node: usize,
        ok: bool,
    },
    /// The kernel refuses what comes next in either direction.
    Refuse {
        node: usize,
    },
    Resolve {
        node: usize,
        what: usize,
    },
    Message {
        node: usize,
        what: usize,
    },
    Helper {
        node: usize,
        what: usize,
    },
    /// A planned upgrade, in the middle of a burst.
    Upgrade {
        node: usize,
    },
    /// An agent that ends without notice, and its successor.
    Crash {
        node: usize,
    },
}

#[derive(Clone, Copy, Debug)]
enum Sent {
    Udp(usize),
    Tcp {
        opens: bool,
    },
    Other(u8),
    Fragment {
        first: bool,
    },
    /// Payload and segment size; a super-packet where the first is longer.
    Super {
        tcp: bool,
        len: usize,
        size: u16,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let node = || 0..3usize;
    let index = any::<Index>;
    let sent = prop_oneof![
        4 => (0..1600usize).prop_map(Sent::Udp),
        4 => any::<bool>().prop_map(|opens| Sent::Tcp { opens }),
        1 => prop::sample::select(vec![1u8, 47, 58, 132]).prop_map(Sent::Other),
        2 => any::<bool>().prop_map(|first| Sent::Fragment { first }),
        4 => (any::<bool>(), 1..20_000usize, 1..1400u16).prop_map(|(tcp, len, size)| {
            // Now and then more than can be cut.
            Sent::Super { tcp, len, size: size.max(if len % 7 == 0 { 1 } else { 300 }) }
        }),
    ];
    let send = (
        node(),
        sent,
        0..12usize,
        prop_oneof![Just(80u16), Just(53), 1000..1004u16],
        prop::option::weighted(0.05, index()),
        prop::option::weighted(0.1, (index(), 1..=255u8)),
    );
    let send =
        send.prop_map(|(node, what, to, port, cut, flip)| Step::Send { node, what, to, port, cut, flip });
    let noise = (node(), 0..6u8, 0..400usize, 0..200usize);
    prop_oneof![
        24 => send,
        2 => node().prop_map(|node| Step::SendError { node }),
        1 => node().prop_map(|node| Step::Unread { node }),
        40 => index().prop_map(Step::Deliver),
        3 => index().prop_map(Step::Lose),
        3 => index().prop_map(Step::Repeat),
        3 => (index(), index()).prop_map(|(at, byte)| Step::Damage(at, byte)),
        2 => noise.prop_map(|(node, kind, len, segment)| Step::Noise { node, kind, len, segment }),
        6 => prop::sample::select(vec![1u64, 60, 400, 1100, 3100, 12_500, 200_000]).prop_map(Step::Wait),
        4 => (node(), 0..9usize).prop_map(|(node, what)| Step::Tell { node, what }),
        8 => (node(), prop::bool::weighted(0.8)).prop_map(|(node, ok)| Step::Apply { node, ok }),
        2 => node().prop_map(|node| Step::Refuse { node }),
        4 => (node(), 0..5usize).prop_map(|(node, what)| Step::Resolve { node, what }),
        2 => (node(), 0..3usize).prop_map(|(node, what)| Step::Message { node, what }),
        2 => (node(), 0..4usize).prop_map(|(node, what)| Step::Helper { node, what }),
        1 => node().prop_map(|node| Step::Upgrade { node }),
        1 => node().prop_map(|node| Step::Crash { node }),
    ]
}

fn walk() -> impl Strategy<Value = (bool, Vec<Step>)> {
    (prop::bool::weighted(0.2), prop::collection::vec(step(), 1..120))
}

/// What went into one engine and came out of it, as its driver sees it.
#[derive(Debug, Default, PartialEq, Eq)]
struct Seen {
    captured: u64,
    sealed: u64,
    hairpinned: u64,
    forwarded: u64,
    segments: u64,
    received: u64,
    opened: u64,
    answers: u64,
    answered: u64,
    refused: u64,
    /// Left in agents that crashed.
    lost: u64,
}

struct World {
    network: Network,
    permissive: bool,
    seen: [Seen; 3],
    journals: [Journal; 3],
    refuses: [bool; 3],
    forwards: [Vec<Forward>; 3],
    last: [Vec<u8>; 3],
    /// From, to, bytes, segment.
    flight: Vec<(usize, SocketAddr, Vec<u8>, usize)>,
    sent: Vec<(usize, SocketAddr, Vec<u8>, usize)>,
    agents: u8,
}

impl World {
    fn new(permissive: bool) -> Self {
        let mode = if permissive { Mode::Permissive } else { Mode::Strict };
        let mut world = Self {
            network: Network::with_mode(&PODS, mode),
            permissive,
            seen: Default::default(),
            journals: Default::default(),
            refuses: [false; 3],
            forwards: Default::default(),
            last: Default::default(),
            flight: Vec::new(),
            sent: Vec::new(),
            agents: 0,
        };
        for node in 0..3 {
            bring_up(&mut world.network.nodes[node].engine, world.network.now);
        }
        world
    }

    fn engine(&mut self, node: usize) -> &mut Engine {
        &mut self.network.nodes[node].engine
    }

    fn take(&mut self, step: Step) {
        let now = self.network.now;
        match step {
            Step::Send { node, what, to, port, cut, flip } => {
                let (vnet, packet, packets) = self.make(node, what, to, port);
                let mut burst = [&vnet.encode()[..], &packet].concat();
                cut.into_iter().for_each(|at| burst.truncate(at.index(burst.len())));
                if let Some((at, bits)) = flip.filter(|_| !burst.is_empty()) {
                    let at = at.index(burst.len());
                    burst[at] ^= bits;
                }
                let whole = cut.is_none() && flip.is_none();
                self.capture(node, &burst, whole.then_some(packets));
            }
            Step::SendError { node } => {
                let mut packet = vec![0; VNET_HEADER_LEN];
                if icmp_error(IcmpError::PortUnreachable, &self.last[node], &mut packet) {
                    self.capture(node, &packet, Some(1));
                }
            }
            Step::Unread { node } => {
                self.engine(node).count_unread();
                self.seen[node].captured += 1;
                self.seen[node].refused += 1;
            }
            Step::Deliver(at) if !self.flight.is_empty() => {
                let datagrams = self.flight.swap_remove(at.index(self.flight.len()));
                self.deliver(datagrams);
            }
            Step::Lose(at) if !self.flight.is_empty() => {
                self.flight.swap_remove(at.index(self.flight.len()));
            }
            Step::Repeat(at) if !self.sent.is_empty() => {
                let datagrams = self.sent[at.index(self.sent.len())].clone();
                self.deliver(datagrams);
            }
            Step::Damage(at, byte) if !self.flight.is_empty() => {
                let at = at.index(self.flight.len());
                let bytes = &mut self.flight[at].2;
                let byte = byte.index(bytes.len());
                bytes[byte] ^= 0x10;
            }
            Step::Deliver(_) | Step::Lose(_) | Step::Repeat(_) | Step::Damage(..) => {}
            Step::Noise { node, kind, len, segment } => {
                let mut bytes = vec![0; len];
                bytes.iter_mut().take(1).for_each(|first| *first = kind);
                self.receive(node, (node + 1) % 3, &bytes, segment);
            }
            Step::Wait(milliseconds) => self.wait(Duration::from_millis(milliseconds)),
            Step::Tell { node, what } => {
                let peer = ip(PODS[(node + 1) % 3][what % 2]);
                let changed = Workload {
                    address: peer,
                    keys: PeerKeys { public: secret(peer).public(), psk: PresharedKey([9; 32]) },
                    accept: None,
                };
                let change = match what {
                    0 | 1 => vec![Change::RemoveWorkload(peer)],
                    2 => vec![Change::SetWorkload(changed)],
                    3 => vec![vip(VIP[0], &[])],
                    4 => vec![vip(VIP[0], &[CLIENT[0], SERVER[0], THIRD[0]])],
                    5 => vec![Change::RemoveVip(ip(VIP[0]))],
                    6 => vec![vip(DNS_ONLY, &[SERVER[0]])],
                    _ => everything(),
                };
                // The driver reads no update while one is being applied.
                while self.engine(node).is_committing() {
                    self.engine(node).handle_timeout(now);
                }
                self.engine(node).handle_directory(change, now);
            }
            Step::Apply { node, ok } => {
                for batch in std::mem::take(&mut self.network.nodes[node].batches) {
                    self.engine(node).handle_applied(batch.id, ok, now);
                }
            }
            Step::Refuse { node } => self.refuses[node] = true,
            Step::Resolve { node, what } => self.resolve(node, what),
            Step::Message { node, what } => {
                let asked = query(["example.com", "new.shop.svc.cluster.local"][what % 2]);
                let mut message = answer(&asked, [10, 96, 0, 99]);
                message.truncate(message.len() - if what == 2 { 0 } else { what });
                let released = self.engine(node).handle_stream_answer(StreamId(1), message, now);
                assert_eq!(released, what != 1, "what cannot be parsed is not released");
                self.seen[node].answers += 1;
            }
            Step::Helper { node, what } => self.hear_helper(node, what),
            Step::Upgrade { node } if !self.permissive => {
                self.agents = self.agents.wrapping_add(1) % 50;
                let own = PODS[node][0];
                for (port, to) in [(4000, PODS[(node + 1) % 3][0]), (4001, VIP[0]), (4002, "10.9.9.9")] {
                    let packet = [&[0; VNET_HEADER_LEN], &udp((own, port), (to, 80), b"late")[..]].concat();
                    self.capture(node, &packet, Some(1));
                }
                let mut new = successor(&self.network.nodes[node], self.agents);
                bring_up(&mut new, now);
                // What has to be polled before; the rest goes with it.
                self.poll_forwards(node);
                // DNS answers that wait for a route stay behind.
                self.seen[node].lost += self.engine(node).waiting().answers;
                let old = std::mem::replace(self.engine(node), new);
                let bytes = old.export(now);
                self.engine(node).import(&bytes, now).unwrap();
                self.network.nodes[node].batches.clear();
            }
            Step::Crash { node } if !self.permissive => {
                self.agents = self.agents.wrapping_add(1) % 50;
                self.drain(node);
                let Waiting { outbound, inbound, answers } = self.engine(node).waiting();
                let mut new = successor(&self.network.nodes[node], self.agents);
                let mut restored = self.journals[node].restored();
                for (word, n) in journal::counts(self.engine(node).counters()) {
                    journal::add_count(&mut restored.counters, &word, n);
                }
                new.restore(&restored, now);
                *self.engine(node) = new;
                self.seen[node].lost += outbound + inbound + answers;
                self.network.nodes[node].batches.clear();
            }
            Step::Upgrade { .. } | Step::Crash { .. } => {}
        }
        for node in 0..3 {
            self.drain(node);
            self.check(node);
        }
    }

    /// A packet of the pod, and what it counts as.
    fn make(&self, node: usize, what: Sent, to: usize, port: u16) -> (VnetHeader, Vec<u8>, u64) {
        let family = to % 2;
        let own = if port == 1003 && to == 0 { "10.7.7.7" } else { PODS[node][family] };
        let destinations = match family {
            0 => [PODS[(node + 1) % 3][0], PODS[(node + 2) % 3][0], VIP[0], RESOLVER, "10.9.9.9", DNS_ONLY],
            _ => [PODS[(node + 1) % 3][1], PODS[(node + 2) % 3][1], VIP[1], "fd00:9::9", "ff02::1", VIP[1]],
        };
        let remote = (destinations[to / 2], port);
        // From the tunnel's own port, now and then; and from the server's, so that flows go both ways.
        let local = (
            own,
            if port == 1002 {
                PORT
            } else if to < 4 {
                8080
            } else {
                4000 + port % 8
            },
        );
        let mut packet = Vec::new();
        let step = builder(ip(own), ip(remote.0));
        match what {
            Sent::Udp(len) if port == 53 && len % 4 != 0 => {
                let name = ["example.com", "new.shop.svc.cluster.local"][len % 2];
                packet = udp(local, remote, &query(name));
            }
            Sent::Udp(len) => packet = udp(local, remote, &vec![0x55; len]),
            Sent::Tcp { opens: true } => packet = syn(local, remote),
            Sent::Tcp { opens: false } => {
                step.tcp(local.1, remote.1, 7, 64_000).ack(1).write(&mut packet, b"data").unwrap();
            }
            Sent::Other(protocol) => step.write(&mut packet, IpNumber(protocol), &[0; 40]).unwrap(),
            Sent::Fragment { first } => {
                packet = udp(local, remote, &[0; 64]);
                if family == 0 {
                    let word: u16 = if first { 0x2000 } else { 9 };
                    packet[6..8].copy_from_slice(&word.to_be_bytes());
                }
            }
            Sent::Super { tcp, len, size } => return super_packet(local, remote, tcp, len, size),
        }
        (VnetHeader::PLAIN, packet, 1)
    }

    fn capture(&mut self, node: usize, burst: &[u8], packets: Option<u64>) {
        let now = self.network.now;
        let refuses = self.refuses[node];
        let engine = &mut self.network.nodes[node].engine;
        let (before, length) = (engine.counters().captured, burst.len());
        engine.capture_buffer().unwrap()[..length].copy_from_slice(burst);
        engine.handle_captured(length);
        let outcome = engine.poll_captured(now).unwrap();
        let counted = engine.counters().captured - before;
        // Nobody but the engine can say what a damaged super-packet counts as.
        assert!(
            counted >= 1 && packets.is_none_or(|packets| packets == counted),
            "{packets:?}, not {counted}"
        );
        self.seen[node].captured += counted;
        if outcome == Captured::DnsStream {
            if refuses {
                engine.count_unpassed();
                self.seen[node].refused += counted;
            } else {
                self.seen[node].segments += counted;
            }
        }
    }

    fn deliver(&mut self, (from, to, bytes, segment): (usize, SocketAddr, Vec<u8>, usize)) {
        let Some(node) = PODS.iter().position(|pod| pod.iter().any(|own| ip(own) == to.ip())) else { return };
        let family = usize::from(to.is_ipv6());
        let now = self.network.now;
        let source = at(PODS[from][family], PORT);
        let engine = self.engine(node);
        engine.receive_buffer()[..bytes.len()].copy_from_slice(&bytes);
        engine.handle_datagrams(source, bytes.len(), segment, now);
        self.seen[node].received += bytes.len().div_ceil(segment) as u64;
    }

    fn receive(&mut self, node: usize, from: usize, bytes: &[u8], segment: usize) {
        let now = self.network.now;
        let engine = self.engine(node);
        engine.receive_buffer()[..bytes.len()].copy_from_slice(bytes);
        engine.handle_datagrams(at(PODS[from][0], PORT), bytes.len(), segment, now);
        self.seen[node].received += bytes.len().div_ceil(segment.max(1)).max(1) as u64;
    }

    fn resolve(&mut self, node: usize, what: usize) {
        let now = self.network.now;
        if what == 4 {
            // To a query that nobody asked.
            let Some(forward) = self.forwards[node].first() else { return };
            let (query, message) = (forward.query, vec![0; 40]);
            self.engine(node).handle_dns_answer(query, message, now);
            self.seen[node].answers += 1;
            return;
        }
        let Some(forward) = self.forwards[node].pop() else { return };
        if what == 3 {
            self.engine(node).handle_dns_refused(forward.query);
            return;
        }
        let mut message = answer(&forward.bytes, [10, 96, 0, 99]);
        message.truncate(message.len() - usize::from(what == 1));
        self.engine(node).handle_dns_answer(forward.query, message, now);
        self.seen[node].answers += 1;
    }

    fn hear_helper(&mut self, node: usize, what: usize) {
        let own = PODS[node][0];
        let (vnet, packet, packets) = match what {
            0 => (VnetHeader::PLAIN, syn((RESOLVER, 53), (own, 4000)), 1),
            1 => super_packet((RESOLVER, 53), (own, 4000), true, 5000, 1000),
            2 => (VnetHeader::PLAIN, syn((RESOLVER, 53), ("10.9.9.9", 4000)), 1),
            _ => (VnetHeader::PLAIN, udp((own, 53), (own, 4000), b"x"), 1),
        };
        let burst = [&vnet.encode()[..], &packet].concat();
        let refuses = self.refuses[node];
        let engine = self.engine(node);
        engine.capture_buffer().unwrap()[..burst.len()].copy_from_slice(&burst);
        let taken = engine.handle_helper(burst.len()).map(|(passed, packets)| {
            assert_eq!(passed, burst);
            packets
        });
        assert_eq!(taken, (what < 2).then_some(packets));
        if let (true, Some(packets)) = (refuses, taken) {
            engine.count_uninjected(Origin::Agent, packets);
        }
        let seen = &mut self.seen[node];
        seen.answers += packets;
        if let Some(packets) = taken {
            *(if refuses { &mut seen.refused } else { &mut seen.answered }) += packets;
        }
    }

    fn wait(&mut self, duration: Duration) {
        let now = &mut self.network.now;
        *now = Now { instant: now.instant + duration, wall: now.wall + duration };
        let now = *now;
        self.network.nodes.iter_mut().for_each(|node| node.engine.handle_timeout(now));
    }

    fn poll_forwards(&mut self, node: usize) {
        while let Some(forward) = self.network.nodes[node].engine.poll_forward() {
            if self.refuses[node] {
                self.network.nodes[node].engine.count_unforwarded();
                self.seen[node].refused += 1;
            } else {
                self.seen[node].forwarded += 1;
                self.forwards[node].push(forward);
            }
        }
    }

    /// What the driver does after every event.
    fn drain(&mut self, node: usize) {
        self.journals[node].drain(&mut self.network.nodes[node].engine);
        self.poll_forwards(node);
        let Node { engine, batches, .. } = &mut self.network.nodes[node];
        let seen = &mut self.seen[node];
        let mut refuses = std::mem::take(&mut self.refuses[node]);
        batches.extend(std::iter::from_fn(|| engine.poll_batch()));
        while engine.poll_expired_query().is_some() || engine.poll_broken_stream().is_some() {}
        seen.answered += std::iter::from_fn(|| engine.poll_stream()).count() as u64;
        while let Some(sent) = engine.poll_transmit() {
            let (mut bytes, segment, packets) = (sent.bytes.to_vec(), sent.segment, sent.packets);
            let to = sent.to;
            if std::mem::take(&mut refuses) {
                // The kernel took the first half of the train.
                let all = bytes.len().div_ceil(segment);
                bytes.truncate(all / 2 * segment);
                let unsent = (all - all / 2) as u64;
                if packets {
                    engine.count_unsent(unsent);
                    seen.refused += unsent;
                }
            }
            seen.sealed += if packets { bytes.len().div_ceil(segment) as u64 } else { 0 };
            if !bytes.is_empty() {
                self.sent.push((node, to, bytes.clone(), segment));
                self.flight.push((node, to, bytes, segment));
            }
        }
        let mut refused = refuses;
        while let Some(inject) = engine.poll_inject() {
            let (origin, packets) = (inject.origin, inject.packets);
            let bytes: Vec<u8> =
                inject.parts.iter().flat_map(|p| inject.buffer[p.clone()].to_vec()).collect();
            if origin == Origin::Peer {
                assert_eq!(packets, inject.parts.len() as u64);
            }
            let from_resolver = bytes.first().is_some_and(|b| b >> 4 == 4) && bytes[9] == 17;
            // An answer of a resolver was counted when it came.
            seen.answers += u64::from(origin == Origin::Agent && !from_resolver);
            if std::mem::take(&mut refused) {
                engine.count_uninjected(origin, packets);
                seen.refused += packets;
                continue;
            }
            match origin {
                Origin::Peer => seen.opened += packets,
                Origin::Pod => seen.hairpinned += packets,
                Origin::Agent => seen.answered += packets,
            }
            self.last[node] = bytes;
        }
    }

    fn check(&self, node: usize) {
        let engine = &self.network.nodes[node].engine;
        let (counters, waiting) = (engine.counters(), engine.waiting());
        let counted = Seen {
            captured: counters.captured,
            sealed: counters.sealed,
            hairpinned: counters.hairpinned,
            forwarded: counters.dns_forwarded,
            segments: counters.dns_segments,
            received: counters.received,
            opened: counters.opened,
            answers: counters.answers,
            answered: counters.answered,
            refused: counters.dropped(DropReason::KernelRefused),
            lost: counters.dropped(DropReason::AgentEnded),
        };
        assert_eq!(counted, self.seen[node], "node {node}");
        assert!(counters.is_balanced(waiting), "node {node}: {waiting:?} {counters:?}");
    }

    /// Everything that waits has an end.
    fn finish(mut self) -> Vec<Counters> {
        for _ in 0..3 {
            self.wait(Duration::from_secs(300));
            (0..3).for_each(|node| self.drain(node));
        }
        for node in 0..3 {
            self.check(node);
            assert_eq!(self.network.nodes[node].engine.waiting(), Waiting::default());
        }
        self.network.nodes.iter().map(|node| node.engine.counters().clone()).collect()
    }
}

/// A super-packet with a partial checksum, and the packets that it is cut into: none can be where that is too many.
fn super_packet(
    local: (&str, u16),
    remote: (&str, u16),
    tcp: bool,
    len: usize,
    size: u16,
) -> (VnetHeader, Vec<u8>, u64) {
    let payload = vec![0x66; len];
    let mut packet = Vec::new();
    let step = builder(ip(local.0), ip(remote.0));
    if tcp {
        step.tcp(local.1, remote.1, 1001, 64_000).ack(1).psh().write(&mut packet, &payload).unwrap();
    } else {
        step.udp(local.1, remote.1).write(&mut packet, &payload).unwrap();
    }
    let v4 = ip(local.0).is_ipv4();
    let (header, addresses) = if v4 { (20, 12..20) } else { (40, 8..40) };
    let (protocol, at, gso) = match (tcp, v4) {
        (true, true) => (6, 16, Gso::Tcp4(size)),
        (true, false) => (6, 16, Gso::Tcp6(size)),
        (false, _) => (17, 6, Gso::Udp(size)),
    };
    let partial = crate::wire::checksum::pseudo_header(&packet[addresses], protocol, packet.len() - header);
    packet[header + at..header + at + 2].copy_from_slice(&partial.to_be_bytes());
    let start = u16::try_from(header).unwrap();
    let partial_checksum = Some((start, u16::try_from(at).unwrap()));
    let header_len = start + if tcp { 20 } else { 8 };
    let packets = len.div_ceil(usize::from(size)) as u64;
    (VnetHeader { gso, header_len, partial_checksum, ecn: false }, packet, packets)
}

fn run((permissive, steps): (bool, Vec<Step>)) -> Vec<Counters> {
    let mut world = World::new(permissive);
    steps.into_iter().for_each(|step| world.take(step));
    world.finish()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, max_shrink_iters: 4096, ..ProptestConfig::default() })]

    #[test]
    fn promise_12_every_packet_is_in_exactly_one_counter_whatever_happens(walk in walk()) {
        run(walk);
    }
}

/// What the property is worth: its walks end packets in every way, and for nearly every reason.
#[test]
fn the_walks_reach_every_total_and_most_reasons() {
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(
        ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() },
        rng,
    );
    let all = RefCell::new(Counters::default());
    let outcome: Result<(), TestError<_>> = runner.run(&walk(), |walk| {
        for counters in run(walk) {
            for (word, n) in journal::counts(&counters) {
                journal::add_count(&mut all.borrow_mut(), &word, n);
            }
        }
        Ok(())
    });
    outcome.unwrap();
    let mut all = all.into_inner();
    for (word, total) in all.totals_mut() {
        assert!(*total > 0 || ["dns_connections", "unpinned"].contains(&word), "no {word}");
    }
    let reached: Vec<_> = all.drops().map(|(reason, _)| reason.as_str()).collect();
    assert!(reached.len() >= 22, "{reached:?}");
}
