//! The flow table: one entry per flow of the pod, keyed by the 5-tuple that the pod's own stack sees.
//!
//! - a *direct* flow between two pods is carried as it is;
//! - a *client* flow goes to a VIP and is pinned to the endpoint chosen for it; its packets keep the VIP;
//! - a *server* flow came for a VIP (or its source port had to change): packets are rewritten to our own address and
//!   target port on the way in, and back on the way out;
//! - a *hairpin* is a pod that reaches itself through a VIP: two entries, one for each side of the pod.
//!
//! All inbound flows, direct ones too, stand in this one table, so two flows that would become equal after DNAT are
//! seen: the later gets another source port. Nothing is allocated per packet; the table is capped.
//!
//! An entry lives long only after our own pod acknowledged something in it: what a peer sends, alone, keeps nothing. Each
//! peer has a share of the table (`holders`):
//!
//! - while less than half of the table is used, every flow gets an entry
//! - then a peer that has its share, or more, gets the next entry in the place of one of its own
//! - in a full table a peer with less than its share gets the place of an entry of the peer that has the most
//!
//! Slots that changed are noted for the journal: a flow that begins or ends, a direction or TCP flag seen first.
//! Source: RFC 4787 and RFC 5382 (time-outs), RFC 6146 §3.5.2.2 (TCP states of a translator, simplified).

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use foldhash::quality::FixedState;
use serde::{Deserialize, Serialize};

use super::Now;
use super::drop::DropReason;
use super::holders::Holders;
use super::journal::FlowRecord;
use crate::wire::packet::{TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN, protocol};

/// Most flows per agent; about 128 bytes each.
pub const MAX_FLOWS: usize = 65_536;
/// Slots looked at per call: were all of them over, the journal would be written for less than half a millisecond.
const STEP: usize = 256;
/// Entries looked at to make room for another one.
const EVICT: usize = 64;
/// Entries beyond which each peer is held to its share.
const HALF: usize = MAX_FLOWS / 2;
/// Source ports tried for a flow that would become equal to another.
const PORTS_TRIED: u16 = 512;

const UDP_UNREPLIED: Duration = Duration::from_secs(60);
const UDP_STREAM: Duration = Duration::from_secs(180);
const TCP_UNREPLIED: Duration = Duration::from_secs(120);
/// Both sides have sent, but our pod has acknowledged nothing since its SYN: a connection made ahead of its use, or by a
/// flood. The least that RFC 5382 gives a connection, and longer than the two hours between keepalives.
const TCP_SHAKEN: Duration = Duration::from_secs(2 * 3600 + 4 * 60);
/// Two idle hours are common; a day is the cap.
const TCP_OPEN: Duration = Duration::from_secs(24 * 3600);
const TCP_CLOSED: Duration = Duration::from_secs(60);
const TCP_RESET: Duration = Duration::from_secs(10);
/// The longest life, in a table that fills up, of an idle entry of a peer that has more than its share.
const CROWDED: Duration = Duration::from_secs(20);

/// A flow as the pod's stack sees it. Ports are 0 for protocols without.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Tuple {
    /// IP protocol number.
    pub protocol: u8,
    /// The pod's side.
    pub local: (IpAddr, u16),
    /// The other side.
    pub remote: (IpAddr, u16),
}

/// What is done to a flow's packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// Nothing: both sides use pod addresses.
    Direct,
    /// To a VIP; `Flow::peer` is the pinned endpoint.
    Client,
    /// Came for `service` from the peer's port `client_port`; the pod sees its own address and `Tuple::remote`.
    Server {
        /// Address and port the client used.
        service: (IpAddr, u16),
        /// The client's source port on the wire.
        client_port: u16,
    },
    /// Outgoing side of a hairpin: to our own `target` port, with the VIP and `alias` as source.
    HairpinOut {
        /// Our own target port.
        target: u16,
        /// Source port the server side sees.
        alias: u16,
    },
    /// Answering side of a hairpin: back to our own `client_port`, with VIP and `service_port` as source.
    HairpinBack {
        /// The Service's port.
        service_port: u16,
        /// The port the client side used.
        client_port: u16,
    },
}

/// One entry.
#[derive(Clone, Copy, Debug)]
pub struct Flow {
    /// The key.
    pub tuple: Tuple,
    /// The workload that owns the other side.
    pub peer: IpAddr,
    /// What is done to its packets.
    pub kind: Kind,
    last_seen: Instant,
    seen: u8,
    /// Differs from what the journal was told last.
    changed: bool,
}

const SEEN_OUT: u8 = 1;
const SEEN_IN: u8 = 2;
const FIN_OUT: u8 = 4;
const FIN_IN: u8 = 8;
const RESET: u8 = 16;
/// Nothing came after a SYN but its answer, which promises nothing: it may be a SYN cookie.
const HALF_OPEN: u8 = 32;
/// Our pod acknowledged something by a segment that is neither a SYN nor a reset: it has the connection.
const ACKED_OUT: u8 = 64;
/// Every bit of [`FlowRecord::seen`].
pub(super) const SEEN_ALL: u8 = SEEN_OUT | SEEN_IN | FIN_OUT | FIN_IN | RESET | HALF_OPEN | ACKED_OUT;

/// Which way a packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the pod.
    Outbound,
    /// To the pod.
    Inbound,
}

impl Flow {
    /// Notes a packet and, for TCP, its flags. A SYN alone opens a new connection on the same ports.
    pub fn touch(&mut self, direction: Direction, tcp_flags: u8, now: Now) {
        self.last_seen = now.instant;
        let before = self.seen;
        if tcp_flags & (TCP_SYN | TCP_ACK) == TCP_SYN {
            self.seen = HALF_OPEN;
        } else if tcp_flags & (TCP_SYN | TCP_RST) == 0 {
            self.seen &= !HALF_OPEN;
            if direction == Direction::Outbound && tcp_flags & TCP_ACK != 0 {
                self.seen |= ACKED_OUT;
            }
        }
        let (seen, fin) = match direction {
            Direction::Outbound => (SEEN_OUT, FIN_OUT),
            Direction::Inbound => (SEEN_IN, FIN_IN),
        };
        self.seen |= seen;
        if tcp_flags & TCP_FIN != 0 {
            self.seen |= fin;
        }
        if tcp_flags & TCP_RST != 0 {
            self.seen |= RESET;
        }
        self.changed |= self.seen != before;
    }

    fn new(tuple: Tuple, peer: IpAddr, kind: Kind, now: Now) -> Self {
        Self { tuple, peer, kind, last_seen: now.instant, seen: 0, changed: true }
    }

    fn record(&self) -> FlowRecord {
        FlowRecord { tuple: self.tuple, peer: self.peer, kind: self.kind, seen: self.seen }
    }

    /// What the network sees of a server flow.
    fn wire(&self) -> Option<Tuple> {
        let Kind::Server { service, client_port } = self.kind else { return None };
        let remote = (self.tuple.remote.0, client_port);
        Some(Tuple { protocol: self.tuple.protocol, local: service, remote })
    }

    fn is_hairpin(&self) -> bool {
        matches!(self.kind, Kind::HairpinOut { .. } | Kind::HairpinBack { .. })
    }

    /// Of a hairpin: what the pod sees of its other side.
    fn other_side(&self) -> Option<Tuple> {
        let Tuple { protocol, local, remote } = self.tuple;
        let (local_port, remote_port) = match self.kind {
            Kind::HairpinOut { target, alias } => (target, alias),
            Kind::HairpinBack { service_port, client_port } => (client_port, service_port),
            Kind::Direct | Kind::Client | Kind::Server { .. } => return None,
        };
        Some(Tuple { protocol, local: (local.0, local_port), remote: (remote.0, remote_port) })
    }

    /// Whether packets were seen in both directions.
    pub(super) fn is_replied(&self) -> bool {
        // Both sides of a hairpin are the pod: its packets only ever come from there.
        self.is_hairpin() || self.seen & (SEEN_OUT | SEEN_IN) == SEEN_OUT | SEEN_IN
    }

    /// Whether both sides have sent and, of TCP, the handshake seems to be over. Whether our pod agrees is not known.
    fn is_shaken(&self) -> bool {
        self.is_replied() && (self.is_hairpin() || self.seen & HALF_OPEN == 0)
    }

    /// Whether both sides speak: of TCP, whether our pod has the connection.
    fn is_open(&self) -> bool {
        let is_tcp = self.tuple.protocol == protocol::TCP;
        self.is_shaken() && (!is_tcp || self.is_hairpin() || self.seen & ACKED_OUT != 0)
    }

    /// Whether little is lost with it: nobody answered, our pod took no part, or both sides are done.
    fn is_idle(&self) -> bool {
        !self.is_open() || self.seen & RESET != 0 || self.seen & (FIN_OUT | FIN_IN) == FIN_OUT | FIN_IN
    }

    /// Whether it is known again by its next packet: nothing is rewritten, or its peer and ports are chosen as before.
    fn is_remade(&self) -> bool {
        match self.kind {
            Kind::Direct => true,
            Kind::Client | Kind::Server { .. } => self.tuple.protocol != protocol::TCP,
            // The other half would stay.
            Kind::HairpinOut { .. } | Kind::HairpinBack { .. } => false,
        }
    }

    fn life(&self) -> Duration {
        match (self.tuple.protocol, self.is_open()) {
            (6, _) if self.seen & RESET != 0 => TCP_RESET,
            // Nothing is rewritten in a direct flow, so a late packet finds its way without an entry too.
            (6, _) if self.seen & (FIN_OUT | FIN_IN) == FIN_OUT | FIN_IN => {
                if self.kind == Kind::Direct {
                    TCP_RESET
                } else {
                    TCP_CLOSED
                }
            }
            (6, true) => TCP_OPEN,
            (6, false) if self.is_shaken() => TCP_SHAKEN,
            (6, false) => TCP_UNREPLIED,
            (_, false) => UDP_UNREPLIED,
            (_, true) => UDP_STREAM,
        }
    }
}

/// The table.
#[derive(Debug)]
pub struct Flows {
    slots: Vec<Option<Flow>>,
    free: Vec<u32>,
    by_tuple: HashMap<Tuple, u32, FixedState>,
    /// Server flows by what is on the wire: local = (VIP, port), remote = the client's own address and port.
    by_wire: HashMap<Tuple, u32, FixedState>,
    holders: Holders,
    cursor: usize,
    /// Slots that the running sweep has looked at.
    swept: usize,
    /// The slot handed out last: whether its flow changed is seen at the next access.
    lent: Option<u32>,
    /// Slots that the journal has to be told of, each once, and whether a slot is among them.
    changes: Vec<u32>,
    is_noted: Vec<bool>,
}

impl Flows {
    /// An empty table whose hash is keyed by `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let state = FixedState::with_seed(seed);
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            by_tuple: HashMap::with_hasher(state.clone()),
            by_wire: HashMap::with_hasher(state.clone()),
            holders: Holders::new(state),
            cursor: 0,
            swept: 0,
            lent: None,
            changes: Vec::new(),
            is_noted: Vec::new(),
        }
    }

    /// Flows in the table.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_tuple.len()
    }

    /// Whether the table is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_tuple.is_empty()
    }

    /// The flow that the pod sees as `tuple`.
    pub fn get(&mut self, tuple: &Tuple) -> Option<&mut Flow> {
        let slot = *self.by_tuple.get(tuple)?;
        self.lend(slot)
    }

    /// The server flow that the network sees as `wire` (local = VIP and port, remote = client).
    pub fn get_by_wire(&mut self, wire: &Tuple) -> Option<&mut Flow> {
        let slot = *self.by_wire.get(wire)?;
        self.lend(slot)
    }

    fn lend(&mut self, slot: u32) -> Option<&mut Flow> {
        self.note_lent();
        self.lent = Some(slot);
        self.slots[slot as usize].as_mut()
    }

    fn note_lent(&mut self) {
        let Some(slot) = self.lent.take() else { return };
        if self.slots[slot as usize].as_mut().is_some_and(|flow| std::mem::take(&mut flow.changed)) {
            self.note(slot);
        }
    }

    fn note(&mut self, slot: u32) {
        if let Some(noted) = self.is_noted.get_mut(slot as usize)
            && !std::mem::replace(noted, true)
        {
            self.changes.push(slot);
        }
    }

    /// The next slot whose content is not what it was when this was called last.
    pub fn poll_changed(&mut self) -> Option<(u32, Option<FlowRecord>)> {
        self.note_lent();
        let slot = self.changes.pop()?;
        self.is_noted[slot as usize] = false;
        Some((slot, self.slots[slot as usize].as_ref().map(Flow::record)))
    }

    /// Every flow with its slot and the time since its last packet.
    pub(super) fn export(&self, now: Now) -> impl Iterator<Item = (u32, FlowRecord, Duration)> {
        let idle = move |flow: &Flow| now.instant.saturating_duration_since(flow.last_seen);
        (0..).zip(&self.slots).filter_map(move |(slot, flow)| {
            let flow = flow.as_ref()?;
            Some((slot, flow.record(), idle(flow)))
        })
    }

    /// At most `most` flows, those with the latest packets first, and the time since those.
    #[must_use]
    pub fn latest(&self, most: usize, now: Now) -> Vec<(&Flow, Duration)> {
        let idle = |flow: &Flow| now.instant.saturating_duration_since(flow.last_seen);
        let mut flows: Vec<_> = self.slots.iter().flatten().map(|flow| (flow, idle(flow))).collect();
        let order = |(flow, idle): &(&Flow, Duration)| (*idle, flow.tuple);
        if let Some(last) = most.checked_sub(1).filter(|last| *last < flows.len()) {
            flows.select_nth_unstable_by_key(last, order);
        }
        flows.truncate(most);
        flows.sort_unstable_by_key(order);
        flows
    }

    /// Puts flows of a former agent back into the slots they had, last seen at the times given. What cannot be, and what
    /// contradicts an earlier one, is left out.
    pub(super) fn restore(&mut self, flows: impl IntoIterator<Item = (u32, FlowRecord, Instant)>) {
        for (slot, record, last_seen) in flows {
            if slot as usize >= MAX_FLOWS {
                continue;
            }
            if self.slots.len() <= slot as usize {
                self.slots.resize(slot as usize + 1, None);
                self.is_noted.resize(slot as usize + 1, false);
            }
            let FlowRecord { tuple, peer, kind, seen } = record;
            let flow = Flow { tuple, peer, kind, last_seen, seen, changed: false };
            let wire = flow.wire();
            let contradicts = self.slots[slot as usize].is_some()
                || self.by_tuple.contains_key(&tuple)
                || wire.is_some_and(|wire| self.by_wire.contains_key(&wire));
            if contradicts || !record.is_valid() {
                self.note(slot);
                continue;
            }
            self.by_tuple.insert(tuple, slot);
            wire.into_iter().for_each(|wire| {
                self.by_wire.insert(wire, slot);
            });
            self.holders.insert(peer, slot);
            self.slots[slot as usize] = Some(flow);
        }
        let free = (0..).zip(&self.slots).filter(|(_, flow)| flow.is_none());
        self.free = free.map(|(slot, _)| slot).collect();
    }

    /// The journal has to be told of every flow again.
    pub(super) fn note_all(&mut self) {
        for slot in (0..)
            .zip(&self.slots)
            .filter(|(_, flow)| flow.is_some())
            .map(|(slot, _)| slot)
            .collect::<Vec<_>>()
        {
            self.note(slot);
        }
    }

    /// Adds a flow that does not change ports: direct or client.
    ///
    /// # Errors
    /// `FlowTableFull`.
    pub fn insert(
        &mut self,
        tuple: Tuple,
        peer: IpAddr,
        kind: Kind,
        now: Now,
    ) -> Result<&mut Flow, DropReason> {
        self.put(Flow::new(tuple, peer, kind, now))
    }

    /// Adds an inbound flow that the network sees as `wire` and the pod shall see at its own `target`. Keeps the
    /// client's port if that is free, else takes another one.
    ///
    /// # Errors
    /// `FlowTableFull`, also where every port is taken.
    pub fn insert_server(
        &mut self,
        wire: Tuple,
        target: (IpAddr, u16),
        peer: IpAddr,
        now: Now,
    ) -> Result<&mut Flow, DropReason> {
        let tuple = self
            .free_tuple(Tuple { protocol: wire.protocol, local: target, remote: wire.remote })
            .ok_or(DropReason::FlowTableFull)?;
        let kind = Kind::Server { service: wire.local, client_port: wire.remote.1 };
        self.put(Flow::new(tuple, peer, kind, now))
    }

    /// Adds both entries of a hairpin: `out` as the client side of the pod sees it, `target` = our own address and port.
    ///
    /// # Errors
    /// `FlowTableFull`.
    pub fn insert_hairpin(
        &mut self,
        out: Tuple,
        target: (IpAddr, u16),
        now: Now,
    ) -> Result<&mut Flow, DropReason> {
        let (vip, service_port) = out.remote;
        let back = self
            .free_tuple(Tuple { protocol: out.protocol, local: target, remote: (vip, out.local.1) })
            .ok_or(DropReason::FlowTableFull)?;
        let kind = Kind::HairpinBack { service_port, client_port: out.local.1 };
        self.put(Flow::new(back, target.0, kind, now))?;
        let kind = Kind::HairpinOut { target: target.1, alias: back.remote.1 };
        self.put(Flow::new(out, target.0, kind, now))
    }

    fn free_tuple(&self, wanted: Tuple) -> Option<Tuple> {
        if !self.by_tuple.contains_key(&wanted) {
            return Some(wanted);
        }
        let start = wanted.remote.1;
        (1..=PORTS_TRIED)
            .map(|step| Tuple { remote: (wanted.remote.0, start.wrapping_add(step).max(1024)), ..wanted })
            .find(|tuple| !self.by_tuple.contains_key(tuple))
    }

    fn put(&mut self, flow: Flow) -> Result<&mut Flow, DropReason> {
        if let Some(&old) = self.by_tuple.get(&flow.tuple) {
            self.remove(old);
        }
        let slot = self.room_for(&flow).ok_or(DropReason::FlowTableFull)?;
        self.by_tuple.insert(flow.tuple, slot);
        if let Some(wire) = flow.wire() {
            self.by_wire.insert(wire, slot);
        }
        self.holders.insert(flow.peer, slot);
        self.note_lent();
        self.lent = Some(slot);
        Ok(self.slots[slot as usize].insert(flow))
    }

    /// A free slot for `flow`, as far as its peer's share goes; or that of an entry that ends for it.
    fn room_for(&mut self, flow: &Flow) -> Option<u32> {
        // A direct flow is carried without an entry, too.
        let is_needed = flow.kind != Kind::Direct;
        let share = self.holders.share();
        if self.len() >= HALF && self.holders.count(flow.peer) >= share {
            return self.evict(flow.peer, is_needed);
        }
        if let Some(slot) = self.free.pop() {
            return Some(slot);
        }
        if self.slots.len() < MAX_FLOWS {
            self.slots.push(None);
            self.is_noted.push(false);
            return u32::try_from(self.slots.len() - 1).ok();
        }
        let largest = self.holders.largest()?;
        // Where many peers share the table, and none has too much, no open flow ends while there is an idle one nearby.
        if self.holders.count(largest) <= share
            && let Some(slot) = self.evict_idle()
        {
            return Some(slot);
        }
        self.evict(largest, is_needed)
    }

    /// Makes room among the oldest entries of `peer`, a bounded number: the first one that is idle, else, for a flow that
    /// needs an entry, the one longest unseen; those that are made again by their next packet go first.
    fn evict(&mut self, peer: IpAddr, is_needed: bool) -> Option<u32> {
        let mut last: Option<((bool, Instant), u32)> = None;
        for _ in 0..EVICT.min(self.holders.count(peer)) {
            let slot = self.holders.rotate(peer)?;
            let Some(flow) = &self.slots[slot as usize] else { continue };
            let candidate = ((!flow.is_remade(), flow.last_seen), slot);
            if flow.is_idle() {
                last = Some(candidate);
                break;
            }
            if is_needed && last.is_none_or(|last| candidate < last) {
                last = Some(candidate);
            }
        }
        let (_, slot) = last?;
        // Half a hairpin is of no use.
        let other_side = self.slots[slot as usize].as_ref().and_then(Flow::other_side);
        self.remove(slot);
        other_side.into_iter().for_each(|tuple| self.forget(&tuple));
        self.free.pop()
    }

    /// Makes room at the first idle entry of a bounded number of all.
    fn evict_idle(&mut self) -> Option<u32> {
        for _ in 0..EVICT {
            self.cursor = (self.cursor + 1) % self.slots.len();
            if self.slots[self.cursor].as_ref().is_some_and(Flow::is_idle) {
                self.remove(u32::try_from(self.cursor).expect("MAX_FLOWS fits u32"));
                return self.free.pop();
            }
        }
        None
    }

    fn remove(&mut self, slot: u32) {
        let Some(flow) = self.slots[slot as usize].take() else { return };
        self.by_tuple.remove(&flow.tuple);
        if let Some(wire) = flow.wire() {
            self.by_wire.remove(&wire);
        }
        self.holders.remove(flow.peer, slot);
        self.free.push(slot);
        self.note(slot);
    }

    /// Forgets the flow that the pod sees as `tuple`.
    pub fn forget(&mut self, tuple: &Tuple) {
        if let Some(&slot) = self.by_tuple.get(tuple) {
            self.remove(slot);
        }
    }

    /// The TCP connections to VIPs, in slots from `from` on, whose peer is one of `gone`; looks at [`STEP`] slots. Also
    /// where to go on; `None`: that were all.
    pub(super) fn pinned_to<'a>(
        &'a self,
        gone: &'a BTreeSet<IpAddr>,
        from: usize,
    ) -> (impl Iterator<Item = Tuple> + 'a, Option<usize>) {
        let end = self.slots.len().min(from + STEP);
        let pinned = |flow: &&Flow| {
            flow.kind == Kind::Client && flow.tuple.protocol == protocol::TCP && gone.contains(&flow.peer)
        };
        let slots = self.slots.get(from..end).unwrap_or_default();
        let next = (end < self.slots.len()).then_some(end);
        (slots.iter().flatten().filter(pinned).map(|flow| flow.tuple), next)
    }

    /// Drops flows whose life is over; looks at a bounded number of slots per call. Returns whether the sweep is over.
    pub fn sweep(&mut self, now: Now) -> bool {
        let whole = self.slots.len();
        let step = (whole - self.swept.min(whole)).min(STEP);
        let share = self.holders.share();
        for _ in 0..step {
            self.cursor = (self.cursor + 1) % self.slots.len();
            let Some(flow) = &self.slots[self.cursor] else { continue };
            let is_crowded = self.len() >= HALF && flow.is_idle() && self.holders.count(flow.peer) > share;
            let life = if is_crowded { flow.life().min(CROWDED) } else { flow.life() };
            if flow.last_seen + life <= now.instant {
                self.remove(u32::try_from(self.cursor).expect("MAX_FLOWS fits u32"));
            }
        }
        self.swept += step;
        let is_over = self.swept >= whole;
        if is_over {
            self.swept = 0;
        }
        is_over
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::test_start;

    const OWN: (IpAddr, u16) = (IpAddr::V4(std::net::Ipv4Addr::new(10, 1, 1, 1)), 8080);
    const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 1, 1, 2));
    const VIP: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 96, 0, 1));

    fn now(seconds: u64) -> Now {
        Now { instant: test_start() + Duration::from_secs(seconds), wall: Duration::from_secs(seconds) }
    }

    fn wire(service: (IpAddr, u16), port: u16) -> Tuple {
        Tuple { protocol: 6, local: service, remote: (CLIENT, port) }
    }

    #[test]
    fn two_flows_that_would_become_equal_after_dnat_get_different_source_ports() {
        let mut flows = Flows::new(1);
        let direct = Tuple { protocol: 6, local: OWN, remote: (CLIENT, 4000) };
        flows.insert(direct, CLIENT, Kind::Direct, now(0)).unwrap();
        let first = flows.insert_server(wire((VIP, 80), 4000), OWN, CLIENT, now(0)).unwrap().tuple;
        let second = flows.insert_server(wire((VIP, 81), 4000), OWN, CLIENT, now(0)).unwrap().tuple;
        assert_eq!(flows.len(), 3);
        assert!(first.remote.1 != 4000 && second.remote.1 != 4000 && first != second);
        assert_eq!(flows.get_by_wire(&wire((VIP, 81), 4000)).unwrap().tuple, second);
        let Kind::Server { service, client_port } = flows.get(&first).unwrap().kind else { panic!() };
        assert_eq!((service, client_port), ((VIP, 80), 4000));
    }

    /// The `n`th tuple, to a VIP.
    fn tuple_of(n: usize) -> Tuple {
        let (local, remote) = (u16::try_from(n % 60_000).unwrap(), u16::try_from(n / 60_000).unwrap());
        Tuple { protocol: 6, local: (OWN.0, local), remote: (VIP, remote) }
    }

    fn peer(n: usize) -> IpAddr {
        IpAddr::V4((0x0a03_0000 + u32::try_from(n).unwrap()).into())
    }

    /// Adds the `n`th flow, of a connection that both sides use.
    fn open(flows: &mut Flows, n: usize, peer: IpAddr, at: Now) -> Tuple {
        let flow = flows.insert(tuple_of(n), peer, Kind::Client, at).unwrap();
        flow.touch(Direction::Outbound, TCP_ACK, at);
        flow.touch(Direction::Inbound, TCP_ACK, at);
        flow.tuple
    }

    #[test]
    fn promise_10_one_peer_gets_half_of_the_table_and_then_room_among_its_own_entries() {
        let mut flows = Flows::new(1);
        let others: Vec<_> = (0..100).map(|n| open(&mut flows, n, peer(1), now(0))).collect();
        for n in 100..2 * MAX_FLOWS {
            open(&mut flows, n, CLIENT, now(1));
        }
        assert_eq!(flows.len(), HALF, "half a table for all, then a third for each of two");
        assert!(others.iter().all(|tuple| flows.get(tuple).is_some()));
        for n in 0..10_000 {
            open(&mut flows, 2 * MAX_FLOWS + n, peer(2 + n % 100), now(2));
        }
        assert_eq!(flows.len(), HALF + 10_000, "each of the next peers found a free place");
        assert!(others.iter().all(|tuple| flows.get(tuple).is_some()));
    }

    #[test]
    fn promise_10_a_full_table_has_room_for_a_peer_that_has_less_than_the_others() {
        let mut flows = Flows::new(1);
        // More than 63 peers: the least share of each fills the table.
        for n in 0..MAX_FLOWS {
            open(&mut flows, n, peer(n % 128), now(n as u64 / 1000));
        }
        assert_eq!(flows.len(), MAX_FLOWS);
        for n in 0..500 {
            open(&mut flows, MAX_FLOWS + n, CLIENT, now(70));
        }
        let counts: Vec<_> = (0..128).map(|n| flows.holders.count(peer(n))).collect();
        assert!(counts.iter().all(|count| (500..=512).contains(count)), "{counts:?}");
        assert_eq!((flows.len(), flows.holders.count(CLIENT)), (MAX_FLOWS, 500));
        // An idle one ends first, whoever has it.
        let idle = flows.insert(tuple_of(99_999), peer(7), Kind::Client, now(71)).unwrap().tuple;
        for n in 0..MAX_FLOWS / EVICT {
            open(&mut flows, 80_000 + n, CLIENT, now(72));
            if flows.get(&idle).is_none() {
                return;
            }
        }
        panic!("the idle flow is still there");
    }

    #[test]
    fn a_sweep_looks_at_a_bounded_number_of_flows_per_call_and_leaves_nothing_behind() {
        let mut flows = Flows::new(1);
        for n in 0..MAX_FLOWS {
            open(&mut flows, n, peer(n % 128), now(0));
        }
        let mut calls = 1;
        while !flows.sweep(now(24 * 3600)) {
            calls += 1;
        }
        assert_eq!(calls, MAX_FLOWS / STEP);
        assert!(flows.is_empty() && flows.by_wire.is_empty() && flows.holders.largest().is_none());
    }

    fn sweep(flows: &mut Flows, now: Now) {
        while !flows.sweep(now) {}
    }

    #[test]
    fn promise_10_what_a_peer_sends_keeps_no_flow_that_our_pod_never_acknowledged() {
        use Direction::{Inbound, Outbound};
        const BOTH: u8 = TCP_SYN | TCP_ACK;
        const HOUR: u64 = 3600;
        let cases: [(&[(Direction, u8)], u64); 9] = [
            (&[(Inbound, TCP_SYN)], 120),
            (&[(Inbound, BOTH)], 120),
            (&[(Inbound, TCP_ACK), (Inbound, TCP_ACK)], 120),
            (&[(Inbound, BOTH), (Outbound, TCP_RST), (Inbound, TCP_ACK)], 10),
            (&[(Inbound, TCP_ACK), (Outbound, TCP_RST | TCP_ACK)], 10),
            (&[(Inbound, TCP_SYN), (Outbound, BOTH)], 120),
            (&[(Inbound, TCP_SYN), (Outbound, BOTH), (Inbound, TCP_ACK)], 2 * HOUR + 240),
            (&[(Inbound, TCP_SYN), (Outbound, BOTH), (Inbound, TCP_ACK), (Outbound, TCP_ACK)], 24 * HOUR),
            (&[(Outbound, TCP_SYN), (Inbound, BOTH), (Outbound, TCP_ACK)], 24 * HOUR),
        ];
        for (packets, life) in cases {
            let mut flows = Flows::new(1);
            let flow = flows.insert_server(wire((VIP, 80), 4000), OWN, CLIENT, now(0)).unwrap();
            let tuple = flow.tuple;
            packets.iter().for_each(|(way, flags)| flow.touch(*way, *flags, now(0)));
            sweep(&mut flows, now(life - 1));
            assert!(flows.get(&tuple).is_some(), "{packets:?} before {life} s");
            // A successor knows nothing of the time before it, and gives no longer life either.
            let records: Vec<_> =
                flows.export(now(life)).map(|(slot, flow, _)| (slot, flow, now(life).instant)).collect();
            let mut restored = Flows::new(2);
            restored.restore(records);
            sweep(&mut restored, now(2 * life - 1));
            assert!(restored.get(&tuple).is_some(), "{packets:?} restored");
            for (flows, end) in [(&mut flows, life), (&mut restored, 2 * life)] {
                sweep(flows, now(end));
                assert!(flows.is_empty(), "{packets:?} after {end} s");
            }
        }
    }

    #[test]
    fn promise_10_unanswered_flows_of_a_peer_with_too_many_end_early_in_a_table_that_fills_up() {
        let mut flows = Flows::new(1);
        for n in 0..HALF {
            flows.insert(tuple_of(n), CLIENT, Kind::Client, now(0)).unwrap();
        }
        // Its share is a third now.
        for n in 0..100 {
            flows.insert(tuple_of(HALF + n), peer(1), Kind::Client, now(0)).unwrap();
        }
        sweep(&mut flows, now(19));
        assert_eq!(flows.len(), HALF + 100);
        sweep(&mut flows, now(21));
        assert_eq!(flows.holders.count(peer(1)), 100);
        assert!(flows.len() < HALF, "{}", flows.len());
    }

    #[test]
    fn promise_10_restored_entries_count_for_their_peers() {
        let mut flows = Flows::new(1);
        for n in 0..HALF {
            open(&mut flows, n, if n < 100 { peer(1) } else { CLIENT }, now(0));
        }
        let mut restored = Flows::new(2);
        restored.restore(flows.export(now(0)).map(|(slot, flow, _)| (slot, flow, now(0).instant)));
        for n in 0..1000 {
            open(&mut restored, HALF + n, CLIENT, now(1));
        }
        assert_eq!((restored.len(), restored.holders.count(peer(1))), (HALF, 100));
        assert!((0..100).all(|n| restored.get(&tuple_of(n)).is_some()));
    }

    #[test]
    fn a_hairpin_that_makes_room_ends_on_both_sides() {
        let mut flows = Flows::new(1);
        for n in 0..HALF {
            let out = tuple_of(n);
            let target = (OWN.0, 60_000 + u16::try_from(n % 1000).unwrap());
            flows.insert_hairpin(out, target, now(n as u64 / 100)).unwrap();
        }
        let tuples: Vec<_> = flows.slots.iter().flatten().map(|flow| flow.other_side().unwrap()).collect();
        let halves = tuples.iter().filter(|tuple| flows.get(tuple).is_none()).count();
        assert_eq!((flows.len() / 2 * 2, halves), (flows.len(), 0));
        assert!(flows.len() >= HALF && flows.len() <= HALF + 2);
    }

    #[test]
    fn promise_10_no_flood_of_answered_datagrams_or_syns_shuts_out_flows_that_need_an_entry() {
        let ack = [(Direction::Inbound, TCP_SYN), (Direction::Outbound, TCP_SYN | TCP_ACK)];
        let datagrams = [(Direction::Inbound, 0), (Direction::Outbound, 0)];
        for (protocol, kind, packets) in
            [(17, Kind::Client, datagrams), (6, Kind::Client, ack), (6, Kind::Direct, datagrams)]
        {
            let mut flows = Flows::new(1);
            let tuple = |n: usize| Tuple {
                protocol,
                local: OWN,
                remote: (IpAddr::V4((0x0a02_0000 + u32::try_from(n).unwrap()).into()), 53),
            };
            for n in 0..MAX_FLOWS {
                let flow = flows.insert(tuple(n), CLIENT, kind, now(n as u64 / 1000)).unwrap();
                packets.iter().for_each(|(way, flags)| flow.touch(*way, *flags, now(n as u64 / 1000)));
            }
            let connection = flows.insert_server(wire((VIP, 80), 4000), OWN, CLIENT, now(70)).unwrap();
            packets.iter().for_each(|(way, _)| connection.touch(*way, TCP_ACK, now(70)));
            for n in 0..MAX_FLOWS / 8 {
                flows.insert(tuple(MAX_FLOWS + n), CLIENT, Kind::Client, now(71)).unwrap();
            }
            assert_eq!(flows.len(), HALF);
            assert!(flows.get_by_wire(&wire((VIP, 80), 4000)).is_some(), "an open connection stays");
        }
    }

    #[test]
    fn a_direct_flow_is_carried_without_an_entry_rather_than_in_the_place_of_another() {
        let mut flows = Flows::new(1);
        let tuple = |n: usize| Tuple {
            protocol: 17,
            local: OWN,
            remote: (IpAddr::V4((0x0a02_0000 + u32::try_from(n).unwrap()).into()), 53),
        };
        for n in 0..MAX_FLOWS {
            let flow = flows.insert(tuple(n), CLIENT, Kind::Client, now(0)).unwrap();
            for way in [Direction::Outbound, Direction::Inbound] {
                flow.touch(way, 0, now(0));
            }
        }
        let refused = flows.insert(tuple(MAX_FLOWS), CLIENT, Kind::Direct, now(1)).unwrap_err();
        assert_eq!(refused, DropReason::FlowTableFull);
    }

    #[test]
    fn a_half_closed_connection_lives_and_a_closed_one_ends() {
        let mut flows = Flows::new(1);
        let flow = flows.insert_server(wire((VIP, 80), 4000), OWN, CLIENT, now(0)).unwrap();
        let tuple = flow.tuple;
        flow.touch(Direction::Inbound, TCP_FIN, now(1));
        flow.touch(Direction::Outbound, TCP_ACK, now(1));
        flows.sweep(now(20_000));
        flows.get(&tuple).unwrap().touch(Direction::Outbound, TCP_FIN, now(20_000));
        flows.sweep(now(20_061));
        assert!(flows.get(&tuple).is_none() && flows.get_by_wire(&wire((VIP, 80), 4000)).is_none());
    }

    #[test]
    fn a_port_used_again_starts_a_new_life() {
        let mut flows = Flows::new(1);
        let flow = flows.insert_server(wire((VIP, 80), 4000), OWN, CLIENT, now(0)).unwrap();
        let tuple = flow.tuple;
        flow.touch(Direction::Inbound, TCP_RST, now(1));
        flow.touch(Direction::Inbound, TCP_SYN, now(2));
        flow.touch(Direction::Outbound, TCP_SYN | TCP_ACK, now(2));
        flows.sweep(now(60));
        flows.get(&tuple).unwrap().touch(Direction::Inbound, TCP_ACK, now(60));
        flows.sweep(now(3600));
        assert!(flows.get(&tuple).is_some());
    }

    #[test]
    fn an_idle_hairpin_lives_as_long_as_any_open_connection() {
        let mut flows = Flows::new(1);
        let out = Tuple { protocol: 6, local: (OWN.0, 4000), remote: (VIP, 80) };
        flows.insert_hairpin(out, OWN, now(0)).unwrap().touch(Direction::Outbound, TCP_SYN, now(0));
        flows.sweep(now(7200));
        assert_eq!(flows.len(), 2);
    }
}
