//! Which addresses are protected, and whether the kernel already knows it: the state behind both gates.
//!
//! 1. the directory or a DNS answer wants an address protected
//! 2. the change joins the next batch; `poll_batch` hands it to the control thread, which sets guard element, then route
//! 3. `handle_applied` reports the batch; batches finish in order, so one number says what is in place
//!
//! An address is protected, prohibited or, below strict, passed: named, but carried by the platform. Passing is a change
//! like the others, so an answer that names a passed address waits for its batch, too.
//!
//! The life of a protected address:
//!
//! | state | ends | then |
//! |---|---|---|
//! | named by the directory | the directory removes it | former |
//! | learned: known from DNS alone | after its TTL, at least 60 s, at most 10 min | former |
//! | former: `prohibit` | after 10 min, or as soon as the launcher vouches for a new owner | retiring; released |
//! | retiring: `Retire` was asked for | no socket of the pod names it; a socket does | forgotten; former for another minute |
//!
//! An address that comes back is named or learned again. A former address that the directory calls exempt waits for only
//! 30 s and is then released, even if sockets name it. A passed address is released at once: its packets were never sealed.
//!
//! Addresses from DNS have two limits, because one hostile answer could otherwise make many addresses unreachable: an
//! answer teaches at most 64 addresses (`proto::dns`), and the table holds at most 4,096 addresses from DNS, former ones
//! included. If the table is full the answer is refused, and no older address is removed: packets to a removed address would
//! leave in clear, and that is worse than a name that does not resolve. The directory's addresses do not count, so names of
//! workloads and Services resolve while the table is full.
//!
//! Beside the routes two of the guard's sets are kept here, in the same batches: the peers that sealed datagrams may go to
//! (`Connect`, `Disconnect`), and addresses of other owners (`Admit`, `Refuse`; `proto::outside` decides who). No address is
//! in the table and admitted at once: protected beats admitted.
//!
//! Whoever waits for an address asks `is_active`. A batch that failed is asked for again after a second; until then
//! whoever waits goes on waiting: closed.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::ops::Bound;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::Now;
use super::nat::Tuple;
use super::outside::Admissions;

#[cfg(test)]
mod tests;

/// A batch that failed is tried again after this long.
const RETRY: Duration = Duration::from_secs(1);
/// A former address stays unreachable this long: programs still send to its last owner, and the next owner is unknown.
const PROHIBITED: Duration = Duration::from_secs(600);
/// It stays unreachable this much longer each time a socket of the pod still names it.
const STILL_NAMED: Duration = Duration::from_secs(60);
/// A former address that the directory calls exempt stays unreachable this long, so that its old flows end.
const EXEMPT: Duration = Duration::from_secs(30);
/// Least life of an address that only DNS knows.
const DNS_LIFE: Duration = Duration::from_secs(60);
/// Longest life that a DNS answer can give.
pub(super) const LONGEST_LIFE: Duration = Duration::from_secs(600);
/// Addresses known from DNS alone, now or before they became former ones; more are refused (the answer is not released).
const DNS_ADDRESSES: usize = 4096;
/// Addresses per batch: keeps one netlink transaction short.
pub(super) const BATCH: usize = 512;
/// Entries looked at, and addresses asked for again, per call: well below a millisecond.
const STEP: usize = 512;
/// The batch of an entry whose change failed: greater than `applied` until the change is asked for again.
const NOT_IN_PLACE: BatchId = BatchId(u64::MAX);

/// Number of a batch; batches are applied in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct BatchId(pub u64);

/// One change of the kernel's state for an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouteChange {
    /// Guard element, then the route into `tenc0`.
    Protect(IpAddr),
    /// Guard element, then a `throw` route: the platform carries it, the guard counts it.
    Pass(IpAddr),
    /// Connections end, the route becomes `prohibit`; the guard element stays, and the guard counts the address as a former one.
    Prohibit(IpAddr),
    /// Route, then guard element, are removed.
    Release(IpAddr),
    /// As [`Self::Release`], unless a socket of the pod names the address: then nothing changes, and it is reported.
    Retire(IpAddr),
    /// Sealed datagrams may go to the address. After [`Self::Protect`] or [`Self::Pass`].
    Connect(IpAddr),
    /// They may not any more.
    Disconnect(IpAddr),
    /// The address is vouched for as none of the project's: for ten minutes the guard lets it pass. Again: renewed.
    Admit(IpAddr),
    /// It is not vouched for any more.
    Refuse(IpAddr),
}

/// Who an address within the ranges belongs to, as far as the launcher knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Class {
    /// This project: the directory names it, or will.
    Own,
    /// Vouched for as none of the project's: another project, a node, the API server, an exemption.
    Outside,
    /// No object names it.
    Unknown,
}

/// Changes that are applied together, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// To be given back to `handle_applied`.
    pub id: BatchId,
    /// The changes.
    pub changes: Vec<RouteChange>,
    /// Connections of the pod that end first: those through a VIP to a peer that is gone.
    pub resets: Vec<Tuple>,
}

/// Too many addresses are known from DNS alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooMany;

/// Why an address is in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The directory names it.
    Named,
    /// DNS alone names it, until then.
    Learned(Instant),
    /// Neither names it any more: it is prohibited until then.
    Former(Instant),
    /// Its time is over, and its batch gives it back, unless a socket of the pod names it.
    Retiring,
}

#[derive(Debug)]
struct Entry {
    state: State,
    /// One of [`DNS_ADDRESSES`].
    from_dns: bool,
    /// The directory calls this former address exempt: it is released, not retired.
    exempt: bool,
    passed: bool,
    batch: BatchId,
    /// A peer, whose element comes with this batch.
    peer: Option<BatchId>,
}

impl Entry {
    fn new(state: State, passed: bool, batch: BatchId) -> Self {
        Self { state, from_dns: false, exempt: false, passed, batch, peer: None }
    }

    fn is_former(&self) -> bool {
        matches!(self.state, State::Former(_) | State::Retiring)
    }
}

/// The part of the kernel's state that a change is about. If a change fails, its part is asked for again in the form that is
/// wanted then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Route,
    Peer,
    Admission,
}

/// A look at every entry, a few per call.
#[derive(Debug, Default)]
struct Walk {
    /// The last entry looked at.
    after: Option<IpAddr>,
    /// The deadline that the walk has found so far.
    deadline: Option<Instant>,
}

/// Every address that is, or is about to be, protected.
#[derive(Debug, Default)]
pub struct Routing {
    entries: BTreeMap<IpAddr, Entry>,
    /// Those of them that neither the directory nor DNS names any more.
    formers: BTreeSet<IpAddr>,
    /// Addresses of other owners.
    admissions: Admissions,
    /// Peers whose element a former agent left, and which the directory has not named yet.
    adopted_peers: BTreeSet<IpAddr>,
    /// New addresses are passed until somebody decides otherwise.
    passes: bool,
    from_dns: usize,
    pending: VecDeque<RouteChange>,
    resets: Vec<Tuple>,
    in_flight: BTreeMap<BatchId, Vec<RouteChange>>,
    retry: Option<(Instant, BTreeSet<(IpAddr, Part)>)>,
    /// No life in `entries` ends before this.
    deadline: Option<Instant>,
    /// A life may have ended: `entries` are walked.
    walk: Option<Walk>,
    /// Addresses that left the table.
    forgotten: Vec<IpAddr>,
    retired: u64,
    next: BatchId,
    applied: BatchId,
}

impl Routing {
    /// An empty table; nothing is protected. `passes`: addresses are passed until [`Self::decide`] says otherwise.
    #[must_use]
    pub fn new(passes: bool) -> Self {
        Self { passes, next: BatchId(1), ..Self::default() }
    }

    /// The directory names `address`: it is protected until the directory removes it.
    pub fn add_from_directory(&mut self, address: IpAddr) {
        let entry = self.enter(address);
        entry.state = State::Named;
        entry.exempt = false;
        if std::mem::take(&mut entry.from_dns) {
            self.from_dns -= 1;
        }
    }

    /// A former agent protected `addresses`, and nobody named them yet: they stay as they are, closed, as if the directory
    /// had just removed them.
    pub fn adopt(&mut self, addresses: &[IpAddr], now: Now) {
        let until = now.instant + PROHIBITED;
        addresses.iter().for_each(|address| self.adopt_until(*address, until));
    }

    fn adopt_until(&mut self, address: IpAddr, until: Instant) {
        let adopted = || Entry::new(State::Former(until), false, BatchId::default());
        let entry = self.entries.entry(address).or_insert_with(adopted);
        if !entry.is_former() {
            return;
        }
        entry.state = State::Former(until);
        self.formers.insert(address);
        self.refuse(address);
        self.note_deadline(until);
    }

    /// What is known from DNS alone.
    pub(super) fn export(&self) -> Vec<IpAddr> {
        let learned = |entry: &Entry| matches!(entry.state, State::Learned(_)) && !entry.passed;
        self.entries.iter().filter(|(_, entry)| learned(entry)).map(|(address, _)| *address).collect()
    }

    /// A former agent gave [`Self::export`]: nobody named these addresses yet, and they are former ones.
    pub(super) fn import(&mut self, known: Vec<IpAddr>, now: Now) {
        for address in known.into_iter().take(DNS_ADDRESSES) {
            // Learned after we looked what there is: the control thread, which keeps the guard's sets, has to hear of it.
            if !self.entries.contains_key(&address) {
                self.pending.push_back(RouteChange::Prohibit(address));
            }
            self.adopt_until(address, now.instant + PROHIBITED);
        }
    }

    /// The directory says that `address` is none of the project's: what DNS said of it ends now, and a former address does
    /// not wait for a new owner.
    pub fn exempt(&mut self, address: IpAddr, now: Now) {
        let Some(entry) = self.entries.get_mut(&address) else { return };
        match entry.state {
            State::Named | State::Retiring => {}
            State::Learned(_) => self.release(address),
            State::Former(until) => {
                let until = until.min(now.instant + EXEMPT);
                (entry.state, entry.exempt) = (State::Former(until), true);
                self.note_deadline(until);
            }
        }
    }

    /// A DNS answer names `address` with `ttl`.
    ///
    /// # Errors
    /// [`TooMany`] where the table of DNS-known addresses is full.
    pub fn add_from_dns(&mut self, address: IpAddr, ttl: Duration, now: Now) -> Result<(), TooMany> {
        let mut until = now.instant + ttl.clamp(DNS_LIFE, LONGEST_LIFE);
        let known = self.entries.get(&address);
        match known.map(|entry| entry.state) {
            Some(State::Named) => return Ok(()),
            Some(State::Learned(old)) => until = until.max(old),
            Some(State::Former(_) | State::Retiring) | None => {}
        }
        if known.is_none_or(|entry| !entry.from_dns) {
            if self.from_dns >= DNS_ADDRESSES {
                return Err(TooMany);
            }
            self.from_dns += 1;
        }
        let entry = self.enter(address);
        (entry.state, entry.from_dns, entry.exempt) = (State::Learned(until), true, false);
        self.note_deadline(until);
        Ok(())
    }

    /// Protects or passes an address that was not named until now. The caller sets its state.
    fn enter(&mut self, address: IpAddr) -> &mut Entry {
        let (batch, passed) = (self.batch(), self.passes);
        let is_named = self.is_named(address);
        if !is_named {
            self.pending.push_back(RouteChange::named(address, passed));
            self.formers.remove(&address);
            self.refuse(address);
        }
        let entry = self.entries.entry(address).or_insert_with(|| Entry::new(State::Named, passed, batch));
        if !is_named {
            (entry.passed, entry.batch) = (passed, batch);
        }
        entry
    }

    /// The batch that the next change goes with.
    fn batch(&self) -> BatchId {
        BatchId(self.next.0 + (self.pending.len() / BATCH) as u64)
    }

    /// The ladder says whether an address of the directory is captured or passed.
    pub fn decide(&mut self, address: IpAddr, captured: bool) {
        let batch = self.batch();
        let is_changed = |e: &&mut Entry| e.state == State::Named && e.passed == captured;
        let Some(entry) = self.entries.get_mut(&address).filter(is_changed) else { return };
        entry.passed = !captured;
        entry.batch = batch;
        self.pending.push_back(RouteChange::named(address, !captured));
    }

    /// These connections of the pod end with the next batch.
    pub fn reset(&mut self, connections: impl IntoIterator<Item = Tuple>) {
        self.resets.extend(connections);
    }

    /// The directory no longer names `address`: unreachable for a while, then released. `exempt`: it says instead that the
    /// address leads out of the project. What the platform carried is released at once.
    pub fn remove_from_directory(&mut self, address: IpAddr, exempt: bool, now: Now) {
        let is_named = |e: &&mut Entry| e.state == State::Named;
        let Some(entry) = self.entries.get_mut(&address).filter(is_named) else { return };
        if entry.passed {
            return self.release(address);
        }
        entry.exempt = exempt;
        self.prohibit(address, now.instant + if exempt { EXEMPT } else { PROHIBITED });
    }

    /// Makes a former address of one that was named.
    fn prohibit(&mut self, address: IpAddr, until: Instant) {
        let batch = self.batch();
        if let Some(entry) = self.entries.get_mut(&address) {
            (entry.state, entry.batch) = (State::Former(until), batch);
        }
        self.formers.insert(address);
        self.pending.push_back(RouteChange::Prohibit(address));
        self.note_deadline(until);
    }

    fn release(&mut self, address: IpAddr) {
        self.pending.push_back(RouteChange::Release(address));
        self.forget(address);
    }

    fn forget(&mut self, address: IpAddr) {
        let Some(ended) = self.entries.remove(&address) else { return };
        self.from_dns -= usize::from(ended.from_dns);
        self.formers.remove(&address);
        self.forgotten.push(address);
    }

    /// The next address that left the table.
    pub(super) fn poll_forgotten(&mut self) -> Option<IpAddr> {
        self.forgotten.pop()
    }

    /// Sockets of the pod still name these addresses, which were to be retired: they stay prohibited a while longer. Addresses
    /// that were named, or given to a new owner, meanwhile stay as they are.
    pub(super) fn handle_named(&mut self, addresses: &[IpAddr], now: Now) {
        let until = now.instant + STILL_NAMED;
        for address in addresses {
            let entry = self.entries.get_mut(address).filter(|entry| entry.state == State::Retiring);
            entry.into_iter().for_each(|entry| entry.state = State::Former(until));
        }
        self.note_deadline(until);
    }

    /// A workload has this address: sealed datagrams may go to it. The address has to be named. Returns whether the guard lets
    /// them out already.
    pub fn connect(&mut self, address: IpAddr) -> bool {
        let batch = self.batch();
        let adopted = self.adopted_peers.remove(&address);
        let Some(entry) = self.entries.get_mut(&address) else { return false };
        if entry.peer.is_none() {
            entry.peer = Some(if adopted { BatchId::default() } else { batch });
            self.pending.push_back(RouteChange::Connect(address));
        }
        self.is_connected(address)
    }

    /// No workload has this address any more.
    pub fn disconnect(&mut self, address: IpAddr) {
        let entry = self.entries.get_mut(&address);
        if entry.is_some_and(|entry| entry.peer.take().is_some()) {
            self.pending.push_back(RouteChange::Disconnect(address));
        }
    }

    /// A previous agent connected this peer, so its element exists. Returns whether it is connected now: the directory names
    /// it.
    pub(super) fn adopt_peer(&mut self, address: IpAddr) -> bool {
        match self.entries.get_mut(&address).and_then(|entry| entry.peer.as_mut()) {
            Some(batch) => *batch = BatchId::default(),
            None => drop(self.adopted_peers.insert(address)),
        }
        self.is_connected(address)
    }

    /// The directory is known. Peers of a previous agent that it does not name are disconnected.
    pub(super) fn disconnect_adopted(&mut self) {
        self.pending.extend(std::mem::take(&mut self.adopted_peers).into_iter().map(RouteChange::Disconnect));
    }

    /// Whether sealed datagrams may go to the address.
    #[must_use]
    pub fn is_connected(&self, address: IpAddr) -> bool {
        let peer = self.entries.get(&address).and_then(|entry| entry.peer);
        peer.is_some_and(|batch| batch <= self.applied)
    }

    /// The launcher vouches that the address is not the project's. Nothing happens if it is in the table.
    pub(super) fn admit(&mut self, address: IpAddr, now: Now) {
        if self.entries.contains_key(&address) {
            return;
        }
        self.pending.extend(self.admissions.make_room(address).map(RouteChange::Refuse));
        let batch = self.batch();
        self.admissions.insert(address, batch, now.instant);
        self.pending.push_back(RouteChange::Admit(address));
    }

    /// The launcher does not vouch for it, or not any more.
    pub(super) fn refuse(&mut self, address: IpAddr) {
        if self.admissions.remove(address) {
            self.pending.push_back(RouteChange::Refuse(address));
        }
    }

    /// A previous agent admitted the address, so its element exists. It is removed if the address is in the table.
    pub(super) fn adopt_admission(&mut self, address: IpAddr, now: Now) {
        if self.entries.contains_key(&address) || self.admissions.is_full() {
            self.pending.push_back(RouteChange::Refuse(address));
        } else {
            self.admissions.insert(address, BatchId::default(), now.instant);
        }
    }

    /// The launcher vouches for a new owner of a former address.
    pub(super) fn give_up_former(&mut self, address: IpAddr) {
        if self.is_former(address) {
            self.release(address);
        }
    }

    /// Who is admitted.
    pub(super) fn admissions(&self) -> &Admissions {
        &self.admissions
    }

    /// An admitted address is wanted again.
    pub(super) fn touch_admission(&mut self, address: IpAddr, now: Now) {
        self.admissions.touch(address, now.instant);
    }

    /// Whether the address is admitted, and the guard does not know it yet.
    pub(super) fn is_admission_pending(&self, address: IpAddr) -> bool {
        self.admissions.batch(address).is_some_and(|batch| batch > self.applied)
    }

    fn note_deadline(&mut self, at: Instant) {
        let walked = self.walk.as_mut().map(|walk| &mut walk.deadline);
        for deadline in [Some(&mut self.deadline), walked].into_iter().flatten() {
            *deadline = Some(deadline.map_or(at, |old| old.min(at)));
        }
    }

    /// Whether the kernel has the address's guard element and route, or the decision to pass it.
    #[must_use]
    pub fn is_active(&self, address: IpAddr) -> bool {
        self.entries.get(&address).is_some_and(|e| !e.is_former() && e.batch <= self.applied)
    }

    /// Whether the kernel has the address's guard element and its route into `tenc0`.
    #[must_use]
    pub fn is_captured(&self, address: IpAddr) -> bool {
        self.is_active(address) && !self.is_passed(address)
    }

    /// Whether the address is passed, or about to be.
    #[must_use]
    pub fn is_passed(&self, address: IpAddr) -> bool {
        self.entries.get(&address).is_some_and(|e| e.passed)
    }

    /// Whether the address is protected or about to be.
    #[must_use]
    pub fn is_protected(&self, address: IpAddr) -> bool {
        self.entries.contains_key(&address)
    }

    /// Whether the directory or DNS names the address.
    #[must_use]
    pub fn is_named(&self, address: IpAddr) -> bool {
        self.entries.get(&address).is_some_and(|e| !e.is_former())
    }

    /// Whether the address is protected, and neither the directory nor DNS names it any more.
    #[must_use]
    pub fn is_former(&self, address: IpAddr) -> bool {
        self.formers.contains(&address)
    }

    /// Former addresses behind `after`, in order.
    pub(super) fn formers(&self, after: Option<IpAddr>) -> impl Iterator<Item = IpAddr> {
        let behind = (after.map_or(Bound::Unbounded, Bound::Excluded), Bound::Unbounded);
        self.formers.range(behind).copied()
    }

    /// How many former addresses there are.
    pub(super) fn former_count(&self) -> usize {
        self.formers.len()
    }

    /// How many former addresses were given back because their time was over, so far.
    #[must_use]
    pub fn retired(&self) -> u64 {
        self.retired
    }

    /// Whether everything wanted so far is in place.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.pending.is_empty() && self.resets.is_empty() && self.in_flight.is_empty() && self.retry.is_none()
    }

    /// Whether a batch is full: more changes would not join it.
    #[must_use]
    pub fn has_full_batch(&self) -> bool {
        self.pending.len() >= BATCH
    }

    /// The next batch for the control thread. Changes of one address keep their order; for different ones, those of one kind
    /// stand together, because the control thread needs one transaction for each run of a kind.
    pub fn poll_batch(&mut self) -> Option<Batch> {
        if self.pending.is_empty() && self.resets.is_empty() {
            return None;
        }
        let resets = std::mem::take(&mut self.resets);
        // What does not fit waits for the following batches, as [`Self::batch`] said.
        let changes = grouped(self.pending.drain(..self.pending.len().min(BATCH)));
        let id = self.next;
        self.next = BatchId(id.0 + 1);
        self.in_flight.insert(id, changes.clone());
        Some(Batch { id, changes, resets })
    }

    /// The control thread finished a batch, or could not. Returns the peers that are connected with it.
    pub fn handle_applied(&mut self, id: BatchId, ok: bool, now: Now) -> Vec<IpAddr> {
        let Some(changes) = self.in_flight.remove(&id) else { return Vec::new() };
        self.applied = self.applied.max(id);
        if ok {
            return self.conclude(id, &changes);
        }
        let (_, parts) = self.retry.get_or_insert((now.instant + RETRY, BTreeSet::new()));
        for change in changes {
            let (address, part) = (change.address(), change.part());
            parts.insert((address, part));
            let entry = self.entries.get_mut(&address);
            match part {
                Part::Route => entry.into_iter().for_each(|entry| entry.batch = NOT_IN_PLACE),
                Part::Peer => entry
                    .and_then(|entry| entry.peer.as_mut())
                    .into_iter()
                    .for_each(|batch| *batch = NOT_IN_PLACE),
                Part::Admission => self.admissions.set_batch(address, NOT_IN_PLACE),
            }
        }
        Vec::new()
    }

    fn conclude(&mut self, id: BatchId, changes: &[RouteChange]) -> Vec<IpAddr> {
        let mut connected = Vec::new();
        for change in changes {
            let address = change.address();
            match change {
                RouteChange::Connect(_) => connected.push(address),
                RouteChange::Retire(_) => {
                    let entry = self.entries.get(&address);
                    if entry.is_some_and(|e| e.state == State::Retiring && e.batch == id) {
                        self.retired += 1;
                        self.forget(address);
                    }
                }
                _ => {}
            }
        }
        connected.retain(|address| self.is_connected(*address));
        connected
    }

    /// Retries, renews, and ends the life of addresses that nobody names any more; a bounded number per call.
    pub fn handle_timeout(&mut self, now: Now) {
        if self.retry.as_ref().is_some_and(|(at, _)| *at <= now.instant) {
            self.try_again();
        }
        if self.deadline.is_some_and(|at| at <= now.instant) {
            self.end_lives(now);
        }
        for _ in 0..STEP {
            let Some(address) = self.admissions.renew(now.instant) else { break };
            self.pending.push_back(RouteChange::Admit(address));
        }
    }

    fn try_again(&mut self) {
        for _ in 0..STEP {
            let Some((_, parts)) = &mut self.retry else { return };
            let Some((address, part)) = parts.pop_first() else {
                self.retry = None;
                return;
            };
            let change = self.wanted(address, part);
            self.pending.push_back(change);
        }
    }

    /// The change that makes a part of the kernel's state for `address` what it should be; it goes with the next batch.
    fn wanted(&mut self, address: IpAddr, part: Part) -> RouteChange {
        let batch = self.batch();
        let entry = self.entries.get_mut(&address);
        match part {
            Part::Route => {
                let Some(entry) = entry else { return RouteChange::Release(address) };
                entry.batch = batch;
                match entry.state {
                    State::Named | State::Learned(_) => RouteChange::named(address, entry.passed),
                    State::Former(_) => RouteChange::Prohibit(address),
                    State::Retiring => RouteChange::Retire(address),
                }
            }
            Part::Peer => match entry.and_then(|entry| entry.peer.as_mut()) {
                Some(peer) => {
                    *peer = batch;
                    RouteChange::Connect(address)
                }
                None => RouteChange::Disconnect(address),
            },
            Part::Admission if self.admissions.contains(address) => {
                self.admissions.set_batch(address, batch);
                RouteChange::Admit(address)
            }
            Part::Admission => RouteChange::Refuse(address),
        }
    }

    /// Goes on with the walk, or begins one; the deadline stays due until it is over.
    fn end_lives(&mut self, now: Now) {
        let mut walk = self.walk.take().unwrap_or_default();
        let start = walk.after.map_or(Bound::Unbounded, Bound::Excluded);
        let mut seen = 0;
        let mut over = Vec::new();
        for (address, entry) in self.entries.range((start, Bound::Unbounded)).take(STEP) {
            seen += 1;
            walk.after = Some(*address);
            match entry.state {
                State::Learned(until) | State::Former(until) if until > now.instant => {
                    walk.deadline = Some(walk.deadline.map_or(until, |old| old.min(until)));
                }
                State::Learned(_) | State::Former(_) => over.push(*address),
                State::Named | State::Retiring => {}
            }
        }
        self.walk = Some(walk);
        over.into_iter().for_each(|address| self.end_life(address, now));
        if seen < STEP {
            self.deadline = self.walk.take().and_then(|walk| walk.deadline);
        }
    }

    fn end_life(&mut self, address: IpAddr, now: Now) {
        let batch = self.batch();
        let Some(entry) = self.entries.get_mut(&address) else { return };
        match entry.state {
            _ if entry.passed || entry.exempt => self.release(address),
            State::Learned(_) => self.prohibit(address, now.instant + PROHIBITED),
            _ => {
                (entry.state, entry.batch) = (State::Retiring, batch);
                self.pending.push_back(RouteChange::Retire(address));
            }
        }
    }

    /// When `handle_timeout` has work.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        let retry = self.retry.iter().map(|(at, _)| *at);
        retry.chain(self.deadline).chain(self.admissions.poll_timeout()).min()
    }
}

/// Changes in rounds: in each round those of one kind stand together, and no address goes back to an earlier kind.
fn grouped(changes: impl Iterator<Item = RouteChange>) -> Vec<RouteChange> {
    let mut rounds: BTreeMap<IpAddr, (usize, u8)> = BTreeMap::new();
    let keyed = changes.map(|change| {
        let (round, last) = rounds.entry(change.address()).or_default();
        *round += usize::from(change.rank() < *last);
        *last = change.rank();
        ((*round, *last), change)
    });
    let mut keyed: Vec<_> = keyed.collect();
    keyed.sort_by_key(|(key, _)| *key);
    keyed.into_iter().map(|(_, change)| change).collect()
}

impl RouteChange {
    fn named(address: IpAddr, passed: bool) -> Self {
        if passed { Self::Pass(address) } else { Self::Protect(address) }
    }

    fn part(&self) -> Part {
        match self {
            Self::Protect(_) | Self::Pass(_) | Self::Prohibit(_) | Self::Release(_) | Self::Retire(_) => {
                Part::Route
            }
            Self::Connect(_) | Self::Disconnect(_) => Part::Peer,
            Self::Admit(_) | Self::Refuse(_) => Part::Admission,
        }
    }

    /// Its place in a round: the usual order of one address's changes; what closes comes before what opens.
    fn rank(&self) -> u8 {
        match self {
            Self::Disconnect(_) => 0,
            Self::Prohibit(_) => 1,
            Self::Protect(_) => 2,
            Self::Pass(_) => 3,
            Self::Refuse(_) => 4,
            Self::Release(_) => 5,
            Self::Retire(_) => 6,
            Self::Connect(_) => 7,
            Self::Admit(_) => 8,
        }
    }

    /// The address it is about.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        match *self {
            Self::Protect(a)
            | Self::Pass(a)
            | Self::Prohibit(a)
            | Self::Release(a)
            | Self::Retire(a)
            | Self::Connect(a)
            | Self::Disconnect(a)
            | Self::Admit(a)
            | Self::Refuse(a) => a,
        }
    }
}
