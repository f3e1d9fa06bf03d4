//! The core, sans-IO: time, randomness and bytes come in as arguments; `handle_*` in, `poll_*` out.
//!
//! [`Engine`] has one owner, the driver's thread. The driver reads into the engine's own buffers
//! ([`Engine::capture_buffer`], [`Engine::receive_buffer`]), says what arrived, and then polls until nothing is left:
//! datagrams for peers, packets for the pod, queries for resolvers, batches for the control thread.
//!
//! What the pod sends waits in `queue`, flow by flow, until [`Engine::poll_captured`] deals with the next burst.
//!
//! In path order: [`dns`], [`outbound`], [`inbound`]; what they share: [`routing`] (both gates), [`directory`] (who is
//! who), [`update`] (how that changes), [`ranges`] and [`outside`] (who is not ours), [`peers`] (sessions), [`nat`] (flows),
//! `fragment`, [`balance`] (endpoint choice), [`mtu`], [`mod@drop`] and [`account`] (every way to end, and how often).
//!
//! Whatever is not a packet is done in bounded steps: [`Engine::handle_timeout`] does one, and [`Engine::poll_timeout`]
//! stays due until nothing is left. So no packet waits for more than a step.
//!
//! What outlives the engine: [`journal`] (it ended without notice), [`handover`] (a planned upgrade).
#![forbid(unsafe_code)]
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use std::collections::{BTreeSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::time::{Duration, Instant};

use hickory_proto::rr::Name;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha20Rng;
use serde::{Deserialize, Serialize};

use crate::wire::coalesce::Coalescer;
use crate::wire::icmp::{self, IcmpError};
use crate::wire::udp::udp_packet;
use crate::wire::vnet::VnetHeader;

pub mod account;
pub mod balance;
pub mod directory;
pub mod dns;
pub mod drop;
mod fragment;
pub mod handover;
mod holders;
pub mod inbound;
pub mod journal;
pub mod ladder;
pub mod mtu;
pub mod nat;
pub mod noise;
pub mod outbound;
pub mod outside;
pub mod peers;
mod queue;
pub mod ranges;
pub mod routing;
#[cfg(test)]
mod tests;
pub mod update;

use account::{Counters, Waiting};
use directory::Directory;
use dns::{Dns, Forward, Known, QueryId, StreamId};
use drop::DropReason;
use fragment::FragmentTable;
use inbound::Held;
use journal::{Record, Restored};
use ladder::{Ladder, Mode, Standing};
use nat::Flows;
use noise::{Identity, Transport};
use outside::Asks;
use peers::{Peers, Transmit, Transmits};
use queue::CaptureQueue;
use ranges::Ranges;
use routing::{Batch, BatchId, Routing};
use update::Update;

/// Largest packet the kernel hands over or takes: vnet header and 64 KiB.
pub const BUFFER_LEN: usize = 10 + 65_536;
/// Flows are swept so often while there are any: what is idle is not to be woken more than once a second in all.
const SWEEP_INTERVAL: Duration = Duration::from_secs(16);

/// The two clocks the protocol reads, taken once per wake-up by the driver.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    /// Monotonic time, for every timer.
    pub instant: Instant,
    /// Wall-clock time since the Unix epoch, for handshake time stamps only.
    pub wall: Duration,
}

/// What an engine is made from.
pub struct Config {
    /// Own addresses with their static keys; at most one per family is used as source. The first of a family initiates.
    pub identities: Vec<Identity>,
    /// Tunnel port of the key domain.
    pub port: u16,
    /// Resolvers whose port 53 is captured.
    pub resolvers: Vec<IpAddr>,
    /// The project's zone; none: nothing is learned from DNS.
    pub zone: Option<Name>,
    /// MTU of the pod's link, in bytes.
    pub link_mtu: u32,
    /// Randomness: indices, ids, jitter, hash keys. Never used twice.
    pub seed: [u8; 32],
    /// Endpoint choice; a successor gets the same one, so that it chooses the same endpoints.
    pub balance_seed: [u8; 16],
    /// The protocol's times and limits.
    pub options: noise::Options,
    /// Merge received packets into super-packets (needs a TUN that takes them).
    pub coalesce: bool,
    /// Merge datagrams too (Linux 6.2 and later take such trains).
    pub coalesce_udp: bool,
    /// The rung of the ladder.
    pub mode: Mode,
    /// Address ranges of the cluster's pods and Services. Unknown addresses within them are asked about. Empty: packets to every
    /// address that no object names are left to the platform.
    pub ranges: Ranges,
    /// False only in the test build that shows what the DNS gate is for.
    pub dns_gate: bool,
}

/// What became of a captured packet that the engine does not keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Captured {
    /// Taken care of.
    Done,
    /// DNS over TCP: the driver passes [`Engine::captured`] on to the helper namespace, as it is.
    DnsStream,
}

/// Where a packet for the pod came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Origin {
    /// A peer sealed it.
    Peer,
    /// The pod itself, through a VIP.
    Pod,
    /// The agent: an answer of a resolver, an ICMP error, a reset.
    Agent,
}

/// A packet for the pod's stack: the vnet header, then all parts one behind the other.
#[derive(Debug)]
pub struct Inject<'a> {
    /// Offload state.
    pub vnet: VnetHeader,
    /// Where the parts lie.
    pub buffer: &'a [u8],
    /// Parts of the packet, in order.
    pub parts: &'a [Range<usize>],
    /// Who it came from.
    pub origin: Origin,
    /// What it counts as.
    pub packets: u64,
}

/// A packet for the pod's stack that lies in no train.
struct Owned {
    origin: Origin,
    packets: u64,
    vnet: VnetHeader,
    bytes: Vec<u8>,
}

/// One agent's decisions.
pub struct Engine {
    own: Vec<IpAddr>,
    port: u16,
    link_mtu: u32,
    balance_seed: [u8; 16],
    rng: ChaCha20Rng,
    queue: CaptureQueue,
    /// Until when a quiet flow beside others is taken to go on.
    quiet_until: Option<Instant>,
    receive: Vec<u8>,
    dns: Dns,
    directory: Directory,
    update: Update,
    /// Before the first directory nobody can say whose restored flow has lost its peer.
    knows_directory: bool,
    routing: Routing,
    asks: Asks,
    /// None in strict mode.
    ladder: Option<Ladder>,
    /// Protected addresses to which older connections may still exist, because the kernel could not destroy them.
    older_flows: BTreeSet<IpAddr>,
    peers: Peers,
    flows: Flows,
    sent_fragments: FragmentTable,
    received_fragments: FragmentTable,
    held: Held,
    transmits: Transmits,
    control: Option<(SocketAddr, Vec<u8>)>,
    coalescer: Coalescer,
    coalesce: bool,
    next_train: usize,
    owned: VecDeque<Owned>,
    owned_now: (Vec<u8>, Range<usize>),
    forwards: VecDeque<Forward>,
    /// Sockets of the agent towards resolvers of the project.
    upstreams: BTreeSet<nat::Tuple>,
    next_sweep: Option<Instant>,
    counters: Counters,
}

impl Engine {
    /// An engine that knows its own addresses and nothing else.
    #[must_use]
    pub fn new(config: Config) -> Self {
        let mut rng = ChaCha20Rng::from_seed(config.seed);
        let mut own: Vec<IpAddr> = Vec::new();
        for identity in &config.identities {
            if !own.contains(&identity.address) {
                own.push(identity.address);
            }
        }
        let is_strict = config.mode == Mode::Strict;
        let asked = if is_strict { config.ranges.clone() } else { Ranges::default() };
        let (flow_seed, peer_seed, queue_seed) = (rng.next_u64(), rng.next_u64(), rng.next_u64());
        let mut coalescer = Coalescer::new();
        coalescer.merge_udp(config.coalesce_udp);
        let transport = Transport::new(config.identities, config.options, ChaCha20Rng::from_rng(&mut rng));
        Self {
            port: config.port,
            link_mtu: config.link_mtu,
            balance_seed: config.balance_seed,
            queue: CaptureQueue::new(queue_seed),
            quiet_until: None,
            receive: vec![0; BUFFER_LEN],
            dns: Dns::new(config.zone, config.ranges, config.resolvers, own.clone(), config.dns_gate),
            directory: Directory::new(own.clone()),
            update: Update::NONE,
            knows_directory: false,
            routing: Routing::new(!is_strict),
            asks: Asks::new(asked),
            ladder: Ladder::new(config.mode, own.clone()),
            older_flows: BTreeSet::new(),
            peers: Peers::new(transport, config.port, peer_seed),
            flows: Flows::new(flow_seed),
            sent_fragments: FragmentTable::new(),
            received_fragments: FragmentTable::new(),
            held: Held::new(),
            transmits: Transmits::default(),
            control: None,
            coalescer,
            coalesce: config.coalesce,
            next_train: 0,
            owned: VecDeque::new(),
            owned_now: (Vec::new(), 0..0),
            forwards: VecDeque::new(),
            upstreams: BTreeSet::new(),
            next_sweep: None,
            counters: Counters::default(),
            own,
            rng,
        }
    }

    /// The bytes of our own static keys: they stay where they are as long as the engine lives, also when it is moved.
    pub fn static_secrets(&self) -> impl Iterator<Item = &[u8]> {
        self.peers.transport.static_secrets()
    }

    /// A former agent left these addresses protected.
    pub fn adopt(&mut self, addresses: &[IpAddr], now: Now) {
        self.routing.adopt(addresses, now);
    }

    /// A former agent left these peers connected: their handshakes need not wait for the guard.
    pub fn adopt_peers(&mut self, addresses: &[IpAddr], now: Now) {
        for address in addresses {
            if self.routing.adopt_peer(*address) {
                self.peers.connect(*address, now);
            }
        }
    }

    /// These addresses were to be retired, and the control thread kept them as they were, because sockets of the pod name them.
    /// To be called before [`Self::handle_applied`] for that batch, which forgets the addresses otherwise.
    pub fn handle_named(&mut self, addresses: &[IpAddr], now: Now) {
        self.routing.handle_named(addresses, now);
    }

    /// How many former addresses were retired so far. Without ranges the guard lets packets to them pass in clear from then on,
    /// and the driver warns of it.
    #[must_use]
    pub fn retired(&self) -> u64 {
        self.routing.retired()
    }

    /// A former agent ended without notice and left this in the journal. To be called before any directory and any packet.
    /// Packets of restored flows are held until the first directory says who their peers are.
    pub fn restore(&mut self, restored: &Restored, now: Now) {
        restored.stamp.into_iter().for_each(|stamp| self.peers.transport.raise_stamp(stamp));
        self.peers.restore(&restored.peers);
        self.peers.begin_restored(&restored.peers, now);
        let flows = restored.flows.iter().filter(|(_, flow)| self.own.contains(&flow.tuple.local.0));
        self.flows.restore(flows.map(|(slot, flow)| (*slot, *flow, now.instant)));
        let mut counters = restored.counters.clone();
        counters.balance(Waiting::default());
        for (word, packets) in journal::counts(&counters) {
            journal::add_count(&mut self.counters, &word, packets);
        }
        self.settle(now);
    }

    /// The next change that has to be written before anything is sent or injected.
    pub fn poll_record(&mut self) -> Option<Record> {
        if let Some(stamp) = self.peers.transport.poll_stamp() {
            return Some(Record::Stamp(stamp));
        }
        if let Some((slot, address)) = self.peers.poll_live() {
            return Some(Record::Peer { slot, address });
        }
        self.flows.poll_changed().map(|(slot, flow)| Record::Flow { slot, flow })
    }

    /// Whether no DNS query and no answer is under way: the quiet moment for [`Self::export`].
    #[must_use]
    pub fn is_dns_idle(&self) -> bool {
        self.dns.is_idle()
    }

    /// The pod's link has another MTU now: what is longer than fits it sealed is answered "too big" from now on.
    pub fn set_link_mtu(&mut self, link_mtu: u32) {
        self.link_mtu = link_mtu;
    }

    /// The control thread finished a batch.
    pub fn handle_applied(&mut self, batch: BatchId, ok: bool, now: Now) {
        for address in self.routing.handle_applied(batch, ok, now) {
            self.peers.connect(address, now);
        }
        self.dns.recheck();
        self.retry_held(now);
        self.settle(now);
    }

    /// The kernel cannot destroy the connections to these newly protected addresses: their first segment is refused, as long
    /// as the addresses are protected.
    pub fn refuse_older_flows(&mut self, addresses: impl IntoIterator<Item = IpAddr>) {
        let routing = &self.routing;
        self.older_flows.extend(addresses.into_iter().filter(|address| routing.is_protected(*address)));
    }

    /// The ladder's state; none in strict mode, where everything is captured.
    #[must_use]
    pub fn rungs(&self) -> Option<&Ladder> {
        self.ladder.as_ref()
    }

    /// How every peer and VIP stands on the ladder; nothing in strict mode, where all are captured.
    pub fn ladder(&self) -> impl Iterator<Item = (IpAddr, Standing)> + '_ {
        self.ladder.iter().flat_map(Ladder::standings)
    }

    /// An answer, or what claims to be one, came on the socket of `query`.
    pub fn handle_dns_answer(&mut self, query: QueryId, answer: Vec<u8>, now: Now) {
        let Self { directory, routing, asks, .. } = self;
        let taken = self.dns.handle_answer(query, answer, Known { directory, routing, asks }, now);
        self.count_answer(taken);
        self.settle(now);
    }

    /// Whether the socket of `query` is still needed.
    #[must_use]
    pub fn is_dns_pending(&self, query: QueryId) -> bool {
        self.dns.is_pending(query)
    }

    /// The resolver has no listener: the application is told so.
    pub fn handle_dns_refused(&mut self, query: QueryId) {
        let Some((client, resolver, bytes)) = self.dns.handle_refused(query) else { return };
        let mut quoted = Vec::new();
        if udp_packet(client, resolver, &bytes, &mut quoted) {
            self.answer_with(IcmpError::PortUnreachable, &quoted);
        }
    }

    /// A message came from the resolver on a TCP connection. `false`: the connection has to be closed.
    pub fn handle_stream_answer(&mut self, stream: StreamId, answer: Vec<u8>, now: Now) -> bool {
        let Self { directory, routing, asks, .. } = self;
        let taken = self.dns.handle_stream_answer(stream, answer, Known { directory, routing, asks }, now);
        let ok = taken.is_ok();
        self.count_answer(taken);
        ok
    }

    /// Does what is due, a bounded amount of it: what is left stays due, and packets come first.
    pub fn handle_timeout(&mut self, now: Now) {
        self.apply_slice(now);
        self.peers.handle_timeout(now);
        let (owned, counters) = (&mut self.owned, &mut self.counters);
        self.peers.expire(now, |packet| {
            counters.outbound_drops.add(DropReason::PeerSilent, 1);
            push_icmp(owned, counters, IcmpError::AdminProhibited, packet);
        });
        self.routing.handle_timeout(now);
        self.handle_asks(now);
        if let Some(ladder) = &mut self.ladder {
            ladder.handle_timeout(now);
        }
        let (queries, answers) = self.dns.handle_timeout(&self.routing, now);
        self.counters.other_drops.add(DropReason::DnsTimeout, queries);
        self.counters.answer_drops.add(DropReason::DnsTimeout, answers);
        self.expire_held(now);
        if self.next_sweep.is_some_and(|at| at <= now.instant) && self.flows.sweep(now) {
            self.next_sweep = None;
        }
        self.settle(now);
    }

    /// When `handle_timeout` has work.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        [
            self.peers.poll_timeout(),
            self.routing.poll_timeout(),
            self.poll_asks_timeout(),
            self.ladder.as_ref().and_then(Ladder::poll_timeout),
            self.dns.poll_timeout(),
            self.held.poll_timeout(),
            self.next_sweep,
            self.update.poll_timeout(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// After any input: what became possible is done.
    fn settle(&mut self, now: Now) {
        self.peers.flush(&mut self.transmits, self.ladder.as_mut(), now, &mut self.counters);
        if let Some(ladder) = &mut self.ladder {
            while let Some(probe) = ladder.poll_probe() {
                self.peers.probe(probe, now);
            }
            // About a whole directory, never about half an update.
            while !self.update.is_under_way()
                && let Some((address, captured)) = ladder.poll_decision()
            {
                self.routing.decide(address, captured);
            }
        }
        while let Some(forgotten) = self.routing.poll_forgotten() {
            self.older_flows.remove(&forgotten);
        }
        self.asks.plan(&self.routing, now);
        if self.next_sweep.is_none() && !self.flows.is_empty() {
            self.next_sweep = Some(now.instant + SWEEP_INTERVAL);
        }
    }

    /// Whether a whole train waits to be sent: before that, more packets of the pod may join it.
    #[must_use]
    pub fn has_full_train(&self) -> bool {
        self.transmits.waiting() >= mtu::MAX_TRAIN / 2
    }

    /// The next datagrams for a peer.
    pub fn poll_transmit(&mut self) -> Option<Transmit<'_>> {
        if let Some(message) = self.peers.poll_message() {
            let (to, bytes) = self.control.insert(message);
            return Some(Transmit { to: *to, segment: bytes.len(), bytes, packets: false });
        }
        self.transmits.poll()
    }

    /// The next packet for the pod's stack.
    pub fn poll_inject(&mut self) -> Option<Inject<'_>> {
        if let Some(train) = self.coalescer.trains().nth(self.next_train) {
            self.next_train += 1;
            let packets = train.parts.len() as u64;
            let (vnet, parts) = (train.vnet, train.parts);
            return Some(Inject { vnet, buffer: &self.receive, parts, origin: Origin::Peer, packets });
        }
        while let Some((client, resolver, answer)) = self.dns.released_udp(&self.routing, &self.asks) {
            let mut packet = Vec::new();
            if udp_packet(resolver, client, &answer, &mut packet) {
                push_answer(&mut self.owned, &mut self.counters, packet);
            } else {
                self.counters.answer_drops.add(DropReason::TooBig, 1);
            }
        }
        let Owned { origin, packets, vnet, bytes } = self.owned.pop_front()?;
        let whole = 0..bytes.len();
        self.owned_now = (bytes, whole);
        let parts = std::slice::from_ref(&self.owned_now.1);
        Some(Inject { vnet, buffer: &self.owned_now.0, parts, origin, packets })
    }

    /// The next DNS message for a TCP connection of the pod.
    pub fn poll_stream(&mut self) -> Option<(StreamId, Vec<u8>)> {
        let released = self.dns.released_stream(&self.routing, &self.asks)?;
        self.counters.answered += 1;
        Some(released)
    }

    /// The next query for a resolver.
    pub fn poll_forward(&mut self) -> Option<Forward> {
        self.forwards.pop_front()
    }

    /// The next query whose socket is to be closed unanswered.
    pub fn poll_expired_query(&mut self) -> Option<QueryId> {
        self.dns.poll_expired()
    }

    /// The next TCP connection that is to be closed because one of its answers will not come.
    pub fn poll_broken_stream(&mut self) -> Option<StreamId> {
        self.dns.poll_broken()
    }

    /// The next changes for the control thread.
    pub fn poll_batch(&mut self) -> Option<Batch> {
        if self.update.is_under_way() && !self.routing.has_full_batch() {
            return None;
        }
        self.routing.poll_batch()
    }

    /// Whether everything that is to be protected is, the whole of the last commit included.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        !self.update.is_under_way() && self.routing.is_settled()
    }

    /// Whether the address is protected, or about to be.
    #[must_use]
    pub fn is_protected(&self, address: IpAddr) -> bool {
        self.routing.is_protected(address)
    }

    /// How many peers there are, and with how many of them there is a session; and at most `most` of them by name, those
    /// with a session first, in the order of their addresses.
    #[must_use]
    pub fn peers(&self, most: usize) -> (usize, usize, Vec<(IpAddr, bool)>) {
        let mut peers: Vec<_> = self.peers.iter().collect();
        let (total, established) =
            (peers.len(), peers.iter().filter(|(_, established)| *established).count());
        let key = |(address, established): &(IpAddr, bool)| (!established, *address);
        // Ten thousand are not put in order for the first few hundred.
        if most < total {
            peers.select_nth_unstable_by_key(most, key);
            peers.truncate(most);
        }
        peers.sort_unstable_by_key(key);
        (total, established, peers)
    }

    /// Addresses within the ranges that the launcher vouched for.
    #[must_use]
    pub fn released_count(&self) -> usize {
        self.routing.admissions().len()
    }

    /// Flows in the table.
    #[must_use]
    pub fn flow_count(&self) -> usize {
        self.flows.len()
    }

    /// At most `most` flows, those with the latest packets first.
    #[must_use]
    pub fn latest_flows(&self, most: usize, now: Now) -> Vec<FlowView> {
        let view = |(flow, idle): (&nat::Flow, Duration)| {
            let blocked = !self.own.contains(&flow.peer) && self.peers.blocks(flow.peer, flow.is_replied());
            FlowView { tuple: flow.tuple, peer: flow.peer, blocked, idle }
        };
        self.flows.latest(most, now).into_iter().map(view).collect()
    }

    fn count_answer(&mut self, taken: Result<(), DropReason>) {
        self.counters.answers += 1;
        if let Err(reason) = taken {
            self.counters.answer_drops.add(reason, 1);
        }
    }

    fn answer_with(&mut self, error: IcmpError, quoted: &[u8]) {
        push_icmp(&mut self.owned, &mut self.counters, error, quoted);
    }
}

/// A flow, for status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowView {
    /// As the pod's stack sees it.
    pub tuple: nat::Tuple,
    /// The workload on the other side.
    pub peer: IpAddr,
    /// Its packets cannot be sealed: nobody answers.
    pub blocked: bool,
    /// Time since its last packet.
    pub idle: Duration,
}

/// Most crafted packets waiting for the pod; a flood of errors is cut off there.
const OWNED: usize = 1024;

fn push_icmp(owned: &mut VecDeque<Owned>, counters: &mut Counters, error: IcmpError, quoted: &[u8]) {
    let mut packet = Vec::new();
    if owned.len() < OWNED && icmp::icmp_error(error, quoted, &mut packet) {
        counters.answers += 1;
        push_answer(owned, counters, packet);
    }
}

/// One of [`Counters::answers`] goes to the pod.
fn push_answer(owned: &mut VecDeque<Owned>, counters: &mut Counters, bytes: Vec<u8>) {
    counters.answered += 1;
    owned.push_back(Owned { origin: Origin::Agent, packets: 1, vnet: VnetHeader::PLAIN, bytes });
}

/// Whether an address can belong to a workload or a VIP at all.
#[must_use]
pub fn is_unicast(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            !(v4.is_unspecified()
                || v4.is_loopback()
                || v4.is_link_local()
                || v4.is_multicast()
                || v4.is_broadcast()
                || v4.octets()[0] == 0
                || v4.octets()[0] >= 240)
        }
        IpAddr::V6(v6) => {
            !(v6.is_unspecified()
                || v6.is_loopback()
                || v6.is_unicast_link_local()
                || v6.is_multicast()
                || v6.to_ipv4_mapped().is_some())
        }
    }
}

/// A start for the fake clocks of tests.
#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "an Instant can be made in no other way; tests only add to it")]
pub(crate) fn test_start() -> Instant {
    static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    *START.get_or_init(Instant::now)
}
