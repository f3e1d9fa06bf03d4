//! Peers: from a workload's address to its session, and the packets that wait for one.
//!
//! A packet for a peer without a session is staged (128 per peer, 3 s each) while the handshake runs. What the time
//! catches up with is answered with an ICMP error by the engine: an application learns at once that nobody is there.
//! A handshake message for a peer that the guard does not know yet (`RouteChange::Connect`) waits for it: the guard would
//! refuse it, and the next retry comes a quarter of a second later.
//! Peers with a session are noted for the journal; those of a former agent get a handshake as soon as they are named.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::time::{Duration, Instant};

use foldhash::quality::FixedState;
use serde::{Deserialize, Serialize};

use super::Now;
use super::account::Counters;
use super::directory::Workload;
use super::drop::DropReason;
use super::journal::LivePeers;
use super::ladder::{Ladder, Probe};
use super::mtu::{MAX_SEGMENTS, MAX_TRAIN};
use super::noise::{
    Event, HEADER_LEN, PeerConfig, PeerId, PeerState, Sealer, TAG_LEN, Transport, record_len,
};
use crate::wire::segment::Cut;

/// Packets staged per peer.
const STAGED: usize = 128;
/// Packets staged for all peers together: an application that calls everybody at once costs at most 6 MiB (with an MTU of 1,500).
const STAGED_TOTAL: usize = 4096;
/// Handshake messages that wait until a peer is connected: a response and an initiation. Older ones are of no use.
const MESSAGES: usize = 2;
/// Peers whose packets are given up per call: each may have 128.
const STEP: usize = 2;
/// How long a packet waits for a session.
const STAGED_LIFE: Duration = Duration::from_secs(3);

/// Datagrams ready to be sent, in one arena that is reused.
#[derive(Debug, Default)]
pub struct Transmits {
    /// Never shortened; what lies beyond `end` is left of former sends.
    arena: Vec<u8>,
    end: usize,
    queue: VecDeque<(SocketAddr, Range<usize>, usize)>,
}

/// One send: datagrams of `segment` bytes each, the last one may be shorter.
#[derive(Debug)]
pub struct Transmit<'a> {
    /// The peer.
    pub to: SocketAddr,
    /// All datagrams, one behind the other.
    pub bytes: &'a [u8],
    /// Length of each datagram but the last.
    pub segment: usize,
    /// Sealed packets, counted as such; false: a handshake message.
    pub packets: bool,
}

impl Transmits {
    /// Room for `len` more bytes. Everything before is free again once all was polled.
    fn room(&mut self, len: usize) -> Range<usize> {
        if self.queue.is_empty() {
            self.end = 0;
        }
        let range = self.end..self.end + len;
        if self.arena.len() < range.end {
            self.arena.resize(range.end, 0);
        }
        range
    }

    /// Has `seal` fill the records of a burst, one after the other, and queues them.
    ///
    /// An error means that none is sent. Some may have taken counters: those are not used again.
    fn seal(
        &mut self,
        sealer: &mut Sealer<'_>,
        split: Split,
        mut seal: impl FnMut(&mut Sealer<'_>, &mut [u8]) -> Result<(), DropReason>,
    ) -> Result<(), DropReason> {
        let range = self.room(split.len());
        let mut records = self.arena[range.clone()].chunks_mut(split.record_len);
        records.try_for_each(|record| seal(sealer, record))?;
        self.end = range.end;
        self.push(sealer.endpoint(), range, split.record_len);
        Ok(())
    }

    /// Queues records; those that may share a send with the ones before them do.
    fn push(&mut self, to: SocketAddr, range: Range<usize>, segment: usize) {
        if let Some((last_to, last, size)) = self.queue.back_mut() {
            let joined = range.end - last.start;
            // A shorter record ends a train, so all before it must be full, and of the new ones at most the last is short.
            let fits = *last_to == to
                && last.end == range.start
                && last.len() % *size == 0
                && (segment == *size || (range.len() <= *size && range.len() == segment))
                && joined <= MAX_TRAIN
                && joined.div_ceil(*size) <= MAX_SEGMENTS;
            if fits {
                last.end = range.end;
                return;
            }
        }
        self.queue.push_back((to, range, segment));
    }

    /// Bytes that wait to be sent.
    pub fn waiting(&self) -> usize {
        if self.queue.is_empty() { 0 } else { self.end }
    }

    /// Queues what a former agent had no time to send.
    pub(super) fn send_on(&mut self, to: SocketAddr, records: &[u8], segment: usize) {
        if records.is_empty() || segment == 0 || records.len() > 2 * MAX_TRAIN {
            return;
        }
        let range = self.room(records.len());
        self.arena[range.clone()].copy_from_slice(records);
        self.end = range.end;
        self.queue.push_back((to, range, segment));
    }

    /// The next send.
    pub fn poll(&mut self) -> Option<Transmit<'_>> {
        let (to, range, segment) = self.queue.pop_front()?;
        Some(Transmit { to, bytes: &self.arena[range], segment, packets: true })
    }
}

/// The records that one burst becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Split {
    /// Bytes of every record but the last.
    record_len: usize,
    /// Bytes of the last record; `record_len` where there is one.
    last_len: usize,
    /// At least 1.
    count: usize,
}

impl Split {
    fn of(cut: &Cut<'_>) -> Self {
        let (each, last) = cut.lengths();
        Self { record_len: record_len(each), last_len: record_len(last), count: cut.count() }
    }

    /// Bytes of all records.
    fn len(&self) -> usize {
        self.record_len * (self.count - 1) + self.last_len
    }
}

/// A burst that waits for a session: padded packets, each where its record would have it.
struct Staged {
    until: Instant,
    records: Vec<u8>,
    split: Split,
}

impl Staged {
    fn of(mut cut: Cut<'_>, until: Instant) -> Option<Self> {
        let split = Split::of(&cut);
        let mut records = vec![0; split.len()];
        for record in records.chunks_mut(split.record_len) {
            let packet = cut.next_packet()?;
            record[HEADER_LEN..HEADER_LEN + packet.len()].copy_from_slice(packet);
        }
        Some(Self { until, records, split })
    }

    fn packets(&self) -> impl Iterator<Item = &[u8]> {
        self.records.chunks(self.split.record_len).map(|record| &record[HEADER_LEN..record.len() - TAG_LEN])
    }
}

/// A peer with its sessions and its staged packets, for a successor.
#[derive(Serialize, Deserialize)]
pub(super) struct PeerHandover {
    address: IpAddr,
    transport: PeerState,
    staged: Vec<StagedHandover>,
}

#[derive(Serialize, Deserialize)]
struct StagedHandover {
    remaining: Duration,
    records: Vec<u8>,
    record_len: usize,
    last_len: usize,
    count: usize,
}

/// No record is shorter.
const KEEPALIVE: usize = record_len(0);

impl StagedHandover {
    /// `None` where the lengths contradict one another.
    fn import(self, then: Instant) -> Option<Staged> {
        let Self { remaining, records, record_len, last_len, count } = self;
        let whole = count.checked_sub(1)?.checked_mul(record_len)?.checked_add(last_len)?;
        let fits =
            whole == records.len() && count <= STAGED && KEEPALIVE <= last_len && last_len <= record_len;
        let split = Split { record_len, last_len, count };
        fits.then(|| Staged { until: then + remaining.min(STAGED_LIFE), records, split })
    }
}

struct Peer {
    address: IpAddr,
    staged: VecDeque<Staged>,
    packets: usize,
    /// The guard lets datagrams to it out.
    connected: bool,
    /// Once it does, a handshake begins without waiting for traffic.
    begins: bool,
    /// Handshake messages for it until then.
    messages: VecDeque<(SocketAddr, Vec<u8>)>,
}

impl Peer {
    fn new(address: IpAddr, connected: bool) -> Self {
        let (staged, messages) = (VecDeque::new(), VecDeque::new());
        Self { address, staged, packets: 0, connected, begins: false, messages }
    }
}

/// Every peer of the directory.
pub struct Peers {
    /// Sessions and handshakes.
    pub transport: Transport,
    port: u16,
    by_address: HashMap<IpAddr, PeerId, FixedState>,
    by_id: HashMap<PeerId, Peer, FixedState>,
    /// Peers that a handshake begins with, without waiting for traffic; since when.
    to_begin: VecDeque<(Instant, PeerId)>,
    /// Peers with staged packets.
    waiting: BTreeMap<PeerId, Instant>,
    staged: usize,
    live: LivePeers,
}

impl Peers {
    /// No peers yet. `port` is the key domain's tunnel port.
    #[must_use]
    pub fn new(transport: Transport, port: u16, seed: u64) -> Self {
        let state = FixedState::with_seed(seed);
        Self {
            transport,
            port,
            by_address: HashMap::with_hasher(state.clone()),
            by_id: HashMap::with_hasher(state),
            to_begin: VecDeque::new(),
            waiting: BTreeMap::new(),
            staged: 0,
            live: LivePeers::default(),
        }
    }

    /// A former agent had sessions with these peers, each in its slot of the list.
    pub(super) fn restore(&mut self, live: &[(u32, IpAddr)]) {
        live.iter().for_each(|(slot, address)| self.live.restore(*slot, *address));
    }

    /// Begins handshakes with those of them that the directory has named already.
    pub(super) fn begin_restored(&mut self, live: &[(u32, IpAddr)], now: Now) {
        for (_, address) in live {
            if let Some(&id) = self.by_address.get(address)
                && self.live.take_wanted(*address)
            {
                self.begin(id, now);
            }
        }
    }

    /// A handshake begins as soon as the peer is connected.
    fn begin(&mut self, id: PeerId, now: Now) {
        let Some(peer) = self.by_id.get_mut(&id) else { return };
        peer.begins = !peer.connected;
        if peer.connected {
            self.to_begin.push_back((now.instant, id));
        }
    }

    /// The guard lets datagrams to this peer out: what waited for that goes.
    pub(super) fn connect(&mut self, address: IpAddr, now: Now) {
        let Some(&id) = self.by_address.get(&address) else { return };
        let Some(peer) = self.by_id.get_mut(&id) else { return };
        peer.connected = true;
        for (to, message) in std::mem::take(&mut peer.messages) {
            self.transport.send_on(to, message);
        }
        if std::mem::take(&mut peer.begins) {
            self.to_begin.push_back((now.instant, id));
        }
    }

    /// The next handshake message or keepalive, and where to.
    pub(super) fn poll_message(&mut self) -> Option<(SocketAddr, Vec<u8>)> {
        while let Some((to, message)) = self.transport.poll_transmit() {
            let id = self.by_address.get(&to.ip());
            match id.and_then(|id| self.by_id.get_mut(id)).filter(|peer| !peer.connected) {
                None => return Some((to, message)),
                Some(peer) => {
                    if peer.messages.len() >= MESSAGES {
                        peer.messages.pop_front();
                    }
                    peer.messages.push_back((to, message));
                }
            }
        }
        None
    }

    /// Runs the timers of a session, and begins a handshake that waits: one per call.
    pub(super) fn handle_timeout(&mut self, now: Now) {
        self.transport.handle_timeout(now);
        if let Some((_, id)) = self.to_begin.pop_front() {
            self.transport.begin(id, now);
        }
    }

    /// The list of live peers, with the slot of each.
    pub(super) fn live(&self) -> Vec<(u32, IpAddr)> {
        self.live.iter().collect()
    }

    /// The journal has to be told of every live peer again.
    pub(super) fn note_all(&mut self) {
        self.live.note_all();
    }

    /// The next slot of the list of live peers that changed.
    pub(super) fn poll_live(&mut self) -> Option<(u32, Option<IpAddr>)> {
        self.live.poll()
    }

    /// Takes every session and every staged packet out, for a successor.
    pub(super) fn export(&mut self, now: Now) -> Vec<PeerHandover> {
        let Self { transport, by_id, .. } = self;
        let staged = |old: Staged| StagedHandover {
            remaining: old.until.saturating_duration_since(now.instant),
            record_len: old.split.record_len,
            last_len: old.split.last_len,
            count: old.split.count,
            records: old.records,
        };
        let peers = by_id.iter_mut().filter_map(|(id, peer)| {
            let transport = transport.export(*id, now)?;
            Some(PeerHandover {
                address: peer.address,
                transport,
                staged: std::mem::take(&mut peer.staged).into_iter().map(staged).collect(),
            })
        });
        peers.collect()
    }

    /// Goes on with what a former agent exported at `then`; what the directory does not name is left out.
    pub(super) fn import(
        &mut self,
        peers: Vec<PeerHandover>,
        transmits: &mut Transmits,
        then: Instant,
        now: Now,
        counters: &mut Counters,
    ) {
        for PeerHandover { address, transport, staged } in peers {
            let Some(&id) = self.by_address.get(&address) else {
                let packets = staged.iter().map(|old| old.count.min(STAGED) as u64).sum();
                counters.outbound_drops.add(DropReason::PeerGone, packets);
                continue;
            };
            let wanted = self.live.take_wanted(address);
            if self.transport.import(id, transport, then, now) {
                self.live.insert(address);
            } else if wanted {
                self.begin(id, now);
            }
            for old in staged.into_iter().filter_map(|old| old.import(then)) {
                self.send_staged(id, old, transmits, now, counters);
            }
        }
    }

    /// Adds a workload, or replaces its keys; returns how many staged packets went with the old ones. `connected`: the guard
    /// lets datagrams to it out already.
    pub fn set(&mut self, workload: Workload, connected: bool, now: Now) -> usize {
        let wanted = self.live.take_wanted(workload.address);
        let staged = self.remove(workload.address);
        let Workload { address, keys, accept } = workload;
        let id = self.transport.add_peer(PeerConfig { address, port: self.port, keys, accept }, now);
        self.by_address.insert(address, id);
        self.by_id.insert(id, Peer::new(address, connected));
        if wanted {
            self.begin(id, now);
        }
        staged
    }

    /// Forgets a workload, its sessions and its staged packets; returns how many packets those were.
    pub fn remove(&mut self, address: IpAddr) -> usize {
        let Some(id) = self.by_address.remove(&address) else { return 0 };
        self.live.remove(address);
        self.transport.remove_peer(id);
        self.waiting.remove(&id);
        let dropped = self.by_id.remove(&id).map_or(0, |peer| peer.packets);
        self.staged -= dropped;
        dropped
    }

    /// Packets that wait for a session.
    #[must_use]
    pub fn staged(&self) -> u64 {
        self.staged as u64
    }

    /// Whether the directory has a peer with this address.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        self.by_address.contains_key(&address)
    }

    /// Begins or forgets the handshake that shows whether a peer is able.
    pub fn probe(&mut self, probe: Probe, now: Now) {
        let (Probe::Try(address) | Probe::Forget(address)) = probe;
        let Some(&id) = self.by_address.get(&address) else { return };
        match probe {
            Probe::Try(_) => self.transport.probe(id, now),
            Probe::Forget(_) => self.transport.forget_probe(id),
        }
    }

    /// Every peer in no order, and whether there is a session with it.
    pub(super) fn iter(&self) -> impl Iterator<Item = (IpAddr, bool)> {
        self.by_address.iter().map(|(address, id)| (*address, self.transport.has_session(*id)))
    }

    /// Whether packets to a peer wait in vain: there is no session with it, and either some wait, or it never answered
    /// (`replied`). One that was idle for long has no session either.
    pub(super) fn blocks(&self, address: IpAddr, replied: bool) -> bool {
        let Some(id) = self.by_address.get(&address) else { return true };
        !self.transport.has_session(*id) && (!replied || self.waiting.contains_key(id))
    }

    /// The address that `id` owns.
    #[must_use]
    pub fn address(&self, id: PeerId) -> Option<IpAddr> {
        self.by_id.get(&id).map(|peer| peer.address)
    }

    /// Seals a burst for `to` and queues it; without a session it is staged, and a handshake begins.
    pub fn send(
        &mut self,
        to: IpAddr,
        transmits: &mut Transmits,
        mut cut: Cut<'_>,
        now: Now,
        counters: &mut Counters,
    ) {
        let Some(&id) = self.by_address.get(&to) else {
            counters.outbound_drops.add(DropReason::PeerGone, cut.count() as u64);
            return;
        };
        let Some(mut sealer) = self.transport.seal(id, now) else {
            let until = now.instant + STAGED_LIFE;
            return self.stage(id, cut.count(), || Staged::of(cut, until), now, counters);
        };
        let split = Split::of(&cut);
        let sealed = transmits.seal(&mut sealer, split, |sealer, record| {
            sealer.seal(cut.next_packet().ok_or(DropReason::Malformed)?, record)
        });
        count(sealed, split, counters);
    }

    /// The same for a burst that was staged.
    fn send_staged(
        &mut self,
        id: PeerId,
        staged: Staged,
        transmits: &mut Transmits,
        now: Now,
        counters: &mut Counters,
    ) {
        let split = staged.split;
        let Some(mut sealer) = self.transport.seal(id, now) else {
            return self.stage(id, split.count, || Some(staged), now, counters);
        };
        let mut packets = staged.packets();
        let sealed = transmits.seal(&mut sealer, split, |sealer, record| {
            sealer.seal(packets.next().ok_or(DropReason::Malformed)?, record)
        });
        count(sealed, split, counters);
    }

    /// Keeps a burst of so many packets until there is a session, if there is room for it; a handshake begins.
    fn stage(
        &mut self,
        id: PeerId,
        packets: usize,
        staged: impl FnOnce() -> Option<Staged>,
        now: Now,
        counters: &mut Counters,
    ) {
        self.transport.begin(id, now);
        let peer = self.by_id.get_mut(&id).expect("every id in by_address is in by_id");
        if peer.packets + packets > STAGED || self.staged + packets > STAGED_TOTAL {
            counters.outbound_drops.add(DropReason::QueueFull, packets as u64);
            return;
        }
        let Some(staged) = staged() else {
            counters.outbound_drops.add(DropReason::Malformed, packets as u64);
            return;
        };
        peer.packets += packets;
        self.staged += packets;
        self.waiting.entry(id).or_insert(staged.until);
        peer.staged.push_back(staged);
    }

    /// Sends what was staged for peers whose session became ready. `ladder` is told who answered and who did not.
    pub fn flush(
        &mut self,
        transmits: &mut Transmits,
        mut ladder: Option<&mut Ladder>,
        now: Now,
        counters: &mut Counters,
    ) {
        while let Some(event) = self.transport.poll_event() {
            let id = match event {
                Event::Established(id) => id,
                Event::Silent(id) => {
                    if let (Some(ladder), Some(address)) = (ladder.as_deref_mut(), self.address(id)) {
                        ladder.handle_silent(address, now);
                    }
                    continue;
                }
                Event::Expired(id) => {
                    if let Some(address) = self.address(id) {
                        self.live.remove(address);
                    }
                    continue;
                }
            };
            let Some(peer) = self.by_id.get_mut(&id) else { continue };
            self.live.insert(peer.address);
            if let Some(ladder) = ladder.as_deref_mut() {
                ladder.handle_able(peer.address, now);
            }
            let staged = std::mem::take(&mut peer.staged);
            self.staged -= std::mem::take(&mut peer.packets);
            self.waiting.remove(&id);
            for staged in staged {
                self.send_staged(id, staged, transmits, now, counters);
            }
        }
    }

    /// Takes out the packets that waited too long, as plain IP packets, and hands each to `expired`; those of a bounded
    /// number of peers per call.
    pub fn expire(&mut self, now: Now, mut expired: impl FnMut(&[u8])) {
        let due = self.waiting.iter().filter(|(_, at)| **at <= now.instant);
        let due: Vec<PeerId> = due.map(|(id, _)| *id).take(STEP).collect();
        for id in due {
            let Some(peer) = self.by_id.get_mut(&id) else { continue };
            while let Some(old) = peer.staged.pop_front_if(|staged| staged.until <= now.instant) {
                peer.packets -= old.split.count;
                self.staged -= old.split.count;
                old.packets().for_each(&mut expired);
            }
            match peer.staged.front() {
                Some(next) => self.waiting.insert(id, next.until),
                None => self.waiting.remove(&id),
            };
        }
    }

    /// When `expire` or the transport has work.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        let begin = self.to_begin.front().map(|(since, _)| *since);
        self.waiting.values().copied().chain(self.transport.poll_timeout()).chain(begin).min()
    }
}

/// Counts a burst that was sealed, or not.
fn count(sealed: Result<(), DropReason>, split: Split, counters: &mut Counters) {
    match sealed {
        Ok(()) => counters.sealed += split.count as u64,
        Err(reason) => counters.outbound_drops.add(reason, split.count as u64),
    }
}
