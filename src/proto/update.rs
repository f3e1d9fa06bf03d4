//! An update of the directory, applied in slices: packets are served between two of them, however many endpoints it names.
//!
//! 1. [`Engine::handle_changes`] notes changes; of two about one entry the later one counts
//! 2. [`Engine::commit`] begins to apply them, a bounded amount of work; `poll_timeout` is due until all is done
//! 3. each [`Engine::handle_timeout`] does as much again
//! 4. with the last one the directory counts as known ([`Engine::is_committing`] ends): packets that wait for it get
//!    another chance, the ladder decides
//!
//! Every prefix is safe, because of the order: what a whole directory leaves out is found before anything changes;
//! exemptions end, workloads come, VIPs that name them come, exemptions begin, VIPs go, workloads go. So no VIP names a
//! workload that is not there yet, a VIP leaves an endpoint before that goes, and an address that is protected before and
//! after is so in between. Last, connections through a VIP to a workload that is gone are reset.
//!
//! The kernel is told in full batches meanwhile, so that slices cost it no transactions of their own.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::Bound;
use std::time::Instant;

use super::directory::{Change, Directory, Effect, Vip, Workload};
use super::drop::DropReason;
use super::{Engine, Now};

/// Work per call, in units of one small change, which takes about two microseconds.
pub(super) const SLICE: usize = 128;
/// Entries of the directory that are compared in one step, and what that costs.
const COMPARED: (usize, usize) = (64, 4);
/// A step over the flow table.
const FLOWS: usize = 4;
/// Endpoints of a VIP that cost as much as a change.
const ENDPOINTS: usize = 8;
/// A handshake that a new workload waited for with its initiation.
const HANDSHAKE: usize = SLICE / 2;

/// Changes of one kind of entry that wait.
#[derive(Debug)]
struct Waiting<T> {
    set: BTreeMap<IpAddr, T>,
    removed: BTreeSet<IpAddr>,
}

impl<T> Waiting<T> {
    const NONE: Self = Self { set: BTreeMap::new(), removed: BTreeSet::new() };

    fn set(&mut self, address: IpAddr, entry: T) {
        self.removed.remove(&address);
        self.set.insert(address, entry);
    }

    fn remove(&mut self, address: IpAddr) {
        self.set.remove(&address);
        self.removed.insert(address);
    }

    /// What of `known` is not named is removed. Returns the last one looked at, if there may be more.
    fn compare(&mut self, known: impl Iterator<Item = IpAddr>) -> Option<IpAddr> {
        let (mut seen, mut last) = (0, None);
        for address in known.take(COMPARED.0) {
            seen += 1;
            last = Some(address);
            if !self.set.contains_key(&address) {
                self.removed.insert(address);
            }
        }
        last.filter(|_| seen == COMPARED.0)
    }
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Workload,
    Vip,
    Exempt,
}

/// What is being done. Each has where it goes on.
#[derive(Clone, Copy, Debug)]
enum Stage {
    /// A whole directory: what it does not name is found, behind this address.
    Compare(Kind, Option<IpAddr>),
    Apply,
    /// Connections to what is gone are found, from this slot of the flow table on.
    Reset(usize),
}

/// Changes that wait for their commit, or are being applied.
#[derive(Debug)]
pub(super) struct Update {
    workloads: Waiting<Workload>,
    vips: Waiting<Vip>,
    exempt: Waiting<()>,
    /// Services that lead out of the project, by name, and whether they still do. Few.
    external: BTreeMap<String, bool>,
    /// Workloads that this update removed.
    gone: BTreeSet<IpAddr>,
    /// None: nothing is committed.
    stage: Option<Stage>,
    since: Option<Instant>,
}

impl Update {
    pub(super) const NONE: Self = Self {
        workloads: Waiting::NONE,
        vips: Waiting::NONE,
        exempt: Waiting::NONE,
        external: BTreeMap::new(),
        gone: BTreeSet::new(),
        stage: None,
        since: None,
    };

    fn note(&mut self, change: Change) {
        match change {
            Change::SetWorkload(workload) => self.workloads.set(workload.address, workload),
            Change::RemoveWorkload(address) => self.workloads.remove(address),
            Change::SetVip(vip) => self.vips.set(vip.address, vip),
            Change::RemoveVip(address) => self.vips.remove(address),
            Change::SetExempt(address) => self.exempt.set(address, ()),
            Change::RemoveExempt(address) => self.exempt.remove(address),
            Change::SetExternal(name) => drop(self.external.insert(name, true)),
            Change::RemoveExternal(name) => drop(self.external.insert(name, false)),
        }
    }

    /// The next change; the order is the module's promise.
    fn next(&mut self) -> Option<Change> {
        let Self { workloads, vips, exempt, external, .. } = self;
        let named = |(name, leads_out)| {
            if leads_out { Change::SetExternal(name) } else { Change::RemoveExternal(name) }
        };
        None.or_else(|| exempt.removed.pop_first().map(Change::RemoveExempt))
            .or_else(|| workloads.set.pop_first().map(|(_, workload)| Change::SetWorkload(workload)))
            .or_else(|| vips.set.pop_first().map(|(_, vip)| Change::SetVip(vip)))
            .or_else(|| exempt.set.pop_first().map(|(address, ())| Change::SetExempt(address)))
            .or_else(|| external.pop_first().map(named))
            .or_else(|| vips.removed.pop_first().map(Change::RemoveVip))
            .or_else(|| workloads.removed.pop_first().map(Change::RemoveWorkload))
    }

    /// One step of the comparison with what is known.
    fn compare(&mut self, kind: Kind, after: Option<IpAddr>, directory: &Directory) -> Stage {
        let behind = (after.map_or(Bound::Unbounded, Bound::Excluded), Bound::Unbounded);
        let (more, following) = match kind {
            Kind::Workload => (self.workloads.compare(directory.workloads(behind)), Some(Kind::Vip)),
            Kind::Vip => (self.vips.compare(directory.vips(behind)), Some(Kind::Exempt)),
            Kind::Exempt => (self.exempt.compare(directory.exempt(behind)), None),
        };
        match (more, following) {
            (Some(_), _) => Stage::Compare(kind, more),
            (None, Some(following)) => Stage::Compare(following, None),
            (None, None) => Stage::Apply,
        }
    }

    pub(super) fn is_under_way(&self) -> bool {
        self.stage.is_some()
    }

    /// Due while there is something to do.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.since
    }
}

impl Engine {
    /// A part of the changes that lead to the next state of the directory; nothing happens before [`Self::commit`]. Not to
    /// be called while [`Self::is_committing`].
    pub fn handle_changes(&mut self, changes: Vec<Change>) {
        debug_assert!(!self.is_committing(), "an update is applied alone");
        changes.into_iter().for_each(|change| self.update.note(change));
    }

    /// All changes noted so far count. `whole`: they are the whole directory, for an engine that may know another one; what
    /// they do not name is removed. A small update is done at once.
    pub fn commit(&mut self, whole: bool, now: Now) {
        if whole {
            for name in self.directory.externals() {
                self.update.external.entry(name.clone()).or_insert(false);
            }
        }
        let first = if whole { Stage::Compare(Kind::Workload, None) } else { Stage::Apply };
        self.update.stage = Some(first);
        self.update.since = Some(now.instant);
        self.apply_slice(now);
        self.settle(now);
    }

    /// Whoever sent changes is gone before the commit: they count for nothing.
    pub fn forget_changes(&mut self) {
        if !self.is_committing() {
            self.update = Update::NONE;
        }
    }

    /// Whether a commit is not applied completely yet.
    #[must_use]
    pub fn is_committing(&self) -> bool {
        self.update.is_under_way()
    }

    /// Changes and their commit in one.
    pub fn handle_directory(&mut self, changes: Vec<Change>, now: Now) {
        self.handle_changes(changes);
        self.commit(false, now);
    }

    /// A whole directory and its commit in one.
    pub fn handle_whole_directory(&mut self, whole: Vec<Change>, now: Now) {
        self.handle_changes(whole);
        self.commit(true, now);
    }

    /// Goes on with the update that is under way.
    pub(super) fn apply_slice(&mut self, now: Now) {
        let mut room = SLICE;
        while let Some(stage) = self.update.stage
            && room > 0
        {
            let (cost, next) = match stage {
                Stage::Compare(kind, after) => {
                    (COMPARED.1, Some(self.update.compare(kind, after, &self.directory)))
                }
                Stage::Apply => match self.update.next() {
                    Some(change) => (self.apply(change, now), Some(Stage::Apply)),
                    None if self.update.gone.is_empty() => (0, None),
                    None => (0, Some(Stage::Reset(0))),
                },
                Stage::Reset(slot) => {
                    let (pinned, next) = self.flows.pinned_to(&self.update.gone, slot);
                    self.routing.reset(pinned);
                    (FLOWS, next.map(Stage::Reset))
                }
            };
            room = room.saturating_sub(cost);
            self.update.stage = next;
            if next.is_none() {
                self.conclude_update(now);
            }
        }
    }

    /// Applies one change; returns what it cost.
    fn apply(&mut self, change: Change, now: Now) -> usize {
        let messages = self.peers.transport.waiting();
        let mut cost = 1;
        match self.directory.apply(change, now) {
            Effect::WorkloadSet(workload) => {
                self.routing.add_from_directory(workload.address);
                if let Some(ladder) = &mut self.ladder {
                    ladder.set_peer(workload.address, now);
                }
                let connected = self.routing.connect(workload.address);
                let staged = self.peers.set(workload, connected, now);
                self.counters.outbound_drops.add(DropReason::PeerGone, staged as u64);
            }
            Effect::WorkloadRemoved(address) => {
                if let Some(ladder) = &mut self.ladder {
                    ladder.remove_peer(address);
                }
                self.update.gone.insert(address);
                let staged = self.peers.remove(address);
                self.counters.outbound_drops.add(DropReason::PeerGone, staged as u64);
                self.routing.disconnect(address);
                if self.directory.vip(address).is_none() {
                    let exempt = self.directory.is_exempt(address);
                    self.routing.remove_from_directory(address, exempt, now);
                }
            }
            Effect::VipSet(address) => {
                self.routing.add_from_directory(address);
                if let Some(vip) = self.directory.vip(address) {
                    cost += vip.ports.iter().map(|port| port.endpoints.len()).sum::<usize>() / ENDPOINTS;
                    if let Some(ladder) = &mut self.ladder {
                        ladder.set_vip(vip);
                    }
                }
            }
            Effect::VipRemoved(address) => {
                if let Some(ladder) = &mut self.ladder {
                    ladder.remove_vip(address);
                }
                if !self.directory.is_workload(address) {
                    let exempt = self.directory.is_exempt(address);
                    self.routing.remove_from_directory(address, exempt, now);
                }
            }
            Effect::Exempt(address) => self.routing.exempt(address, now),
            Effect::None => {}
        }
        cost + HANDSHAKE * self.peers.transport.waiting().saturating_sub(messages)
    }

    fn conclude_update(&mut self, now: Now) {
        self.update = Update::NONE;
        self.knows_directory = true;
        self.routing.disconnect_adopted();
        self.directory.forget_served(now);
        self.retry_unrouted(now);
        self.retry_held(now);
    }
}
