//! Which addresses are protected, and whether the kernel already knows it: the state behind both gates.
//!
//! 1. the directory or a DNS answer wants an address protected
//! 2. the change joins the next batch; `poll_batch` hands it to the control thread, which sets guard element, then route
//! 3. `handle_applied` reports the batch; batches finish in order, so one number says what is in place
//!
//! An address is protected, prohibited or, below strict, passed: named, but carried by the platform. Passing is a change
//! like the others, so an answer that names a passed address waits for its batch, too.
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

/// A batch that failed is tried again after this long.
const RETRY: Duration = Duration::from_secs(1);
/// An address that left the directory stays unreachable this long, so that stale flows fail instead of leaking.
const PROHIBITED: Duration = Duration::from_secs(30);
/// Least life of an address that only DNS knows.
const DNS_LIFE: Duration = Duration::from_secs(60);
/// Longest life that a DNS answer can give.
pub(super) const LONGEST_LIFE: Duration = Duration::from_secs(86_400);
/// Addresses known from DNS alone; more are refused (the answer is not released).
const DNS_ADDRESSES: usize = 4096;
/// Addresses per batch: keeps one netlink transaction short.
pub(super) const BATCH: usize = 512;
/// Entries looked at, and addresses asked for again, per call: well below a millisecond.
const STEP: usize = 512;

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

#[derive(Debug)]
struct Entry {
    directory: bool,
    dns_until: Option<Instant>,
    prohibited_until: Option<Instant>,
    passed: bool,
    batch: BatchId,
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
    /// New addresses are passed until somebody decides otherwise.
    passes: bool,
    from_dns: usize,
    pending: VecDeque<RouteChange>,
    resets: Vec<Tuple>,
    in_flight: BTreeMap<BatchId, Vec<RouteChange>>,
    retry: Option<(Instant, BTreeSet<IpAddr>)>,
    /// No life in `entries` ends before this.
    deadline: Option<Instant>,
    /// A life may have ended: `entries` are walked.
    walk: Option<Walk>,
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
        entry.directory = true;
        if entry.dns_until.take().is_some() {
            self.from_dns -= 1;
        }
    }

    /// A former agent protected `addresses`, and nobody named them yet: they stay as they are, closed, as if the directory
    /// had just removed them.
    pub fn adopt(&mut self, addresses: &[IpAddr], now: Now) {
        // What DNS alone knew must not go in clear before its time.
        let until = now.instant + PROHIBITED.max(DNS_LIFE);
        addresses.iter().for_each(|address| self.adopt_until(*address, until));
    }

    fn adopt_until(&mut self, address: IpAddr, until: Instant) {
        let adopted = || Entry {
            directory: false,
            dns_until: None,
            prohibited_until: Some(until),
            passed: false,
            batch: BatchId::default(),
        };
        let entry = self.entries.entry(address).or_insert_with(adopted);
        if let Some(prohibited_until) = &mut entry.prohibited_until {
            *prohibited_until = until.max(*prohibited_until);
        }
        self.note_deadline(until);
    }

    /// What is known from DNS alone, and how long each address still lives.
    pub(super) fn export(&self, now: Now) -> Vec<(IpAddr, Duration)> {
        let left = |(address, entry): (&IpAddr, &Entry)| {
            let until = entry.dns_until.filter(|_| !entry.directory && !entry.passed)?;
            Some((*address, until.saturating_duration_since(now.instant)))
        };
        self.entries.iter().filter_map(left).collect()
    }

    /// A former agent gave [`Self::export`] at `then`: nobody named these addresses yet, and they stay closed as long as
    /// they would have lived.
    pub(super) fn import(&mut self, known: Vec<(IpAddr, Duration)>, then: Instant) {
        for (address, left) in known.into_iter().take(DNS_ADDRESSES) {
            // Learned after we looked what there is: the control thread, which keeps the guard's sets, has to hear of it.
            if !self.entries.contains_key(&address) {
                self.pending.push_back(RouteChange::Prohibit(address));
            }
            self.adopt_until(address, then + left.min(LONGEST_LIFE));
        }
    }

    /// The directory says that `address` is none of the project's: what DNS said of it ends now.
    pub fn exempt(&mut self, address: IpAddr, now: Now) {
        if let Some(entry) =
            self.entries.get_mut(&address).filter(|e| !e.directory && e.prohibited_until.is_none())
        {
            entry.dns_until = Some(now.instant);
            self.note_deadline(now.instant);
        }
    }

    /// A DNS answer names `address` with `ttl`.
    ///
    /// # Errors
    /// [`TooMany`] where the table of DNS-known addresses is full.
    pub fn add_from_dns(&mut self, address: IpAddr, ttl: Duration, now: Now) -> Result<(), TooMany> {
        let until = now.instant + ttl.max(DNS_LIFE);
        let known = self.entries.get(&address);
        if known.is_none_or(|e| !e.directory && e.dns_until.is_none()) {
            if self.from_dns >= DNS_ADDRESSES {
                return Err(TooMany);
            }
            self.from_dns += 1;
        }
        let entry = self.enter(address);
        if !entry.directory {
            entry.dns_until = Some(entry.dns_until.map_or(until, |old| old.max(until)));
            self.note_deadline(until);
        }
        Ok(())
    }

    fn enter(&mut self, address: IpAddr) -> &mut Entry {
        let (batch, passed) = (self.batch(), self.passes);
        let pending = &mut self.pending;
        let entry = self.entries.entry(address).or_insert_with(|| {
            pending.push_back(RouteChange::named(address, passed));
            Entry { directory: false, dns_until: None, prohibited_until: None, passed, batch }
        });
        if entry.prohibited_until.take().is_some() {
            entry.passed = passed;
            pending.push_back(RouteChange::named(address, passed));
            entry.batch = batch;
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
        let Some(entry) = self.entries.get_mut(&address).filter(|e| e.directory && e.passed == captured)
        else {
            return;
        };
        entry.passed = !captured;
        entry.batch = batch;
        self.pending.push_back(RouteChange::named(address, !captured));
    }

    /// These connections of the pod end with the next batch.
    pub fn reset(&mut self, connections: impl IntoIterator<Item = Tuple>) {
        self.resets.extend(connections);
    }

    /// The directory no longer names `address`: unreachable for a while, then released. What the platform carried is
    /// released at once: nothing of it was sealed.
    pub fn remove_from_directory(&mut self, address: IpAddr, now: Now) {
        let batch = self.batch();
        let Some(entry) = self.entries.get_mut(&address).filter(|e| e.directory) else { return };
        entry.directory = false;
        entry.batch = batch;
        if entry.passed {
            entry.dns_until = Some(now.instant);
            self.from_dns += 1;
            self.note_deadline(now.instant);
            return;
        }
        entry.prohibited_until = Some(now.instant + PROHIBITED);
        self.pending.push_back(RouteChange::Prohibit(address));
        self.note_deadline(now.instant + PROHIBITED);
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
        self.entries.get(&address).is_some_and(|e| e.prohibited_until.is_none() && e.batch <= self.applied)
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

    /// The next batch for the control thread.
    pub fn poll_batch(&mut self) -> Option<Batch> {
        if self.pending.is_empty() && self.resets.is_empty() {
            return None;
        }
        let resets = std::mem::take(&mut self.resets);
        // What does not fit waits for the following batches, as [`Self::batch`] said.
        let changes: Vec<_> = self.pending.drain(..self.pending.len().min(BATCH)).collect();
        let id = self.next;
        self.next = BatchId(id.0 + 1);
        self.in_flight.insert(id, changes.clone());
        Some(Batch { id, changes, resets })
    }

    /// The control thread finished a batch, or could not.
    pub fn handle_applied(&mut self, id: BatchId, ok: bool, now: Now) {
        let Some(changes) = self.in_flight.remove(&id) else { return };
        if !ok {
            let (_, addresses) = self.retry.get_or_insert((now.instant + RETRY, BTreeSet::new()));
            for change in changes {
                // Not in place: out of reach of `applied` until it is asked for again.
                if let Some(entry) = self.entries.get_mut(&change.address()) {
                    entry.batch = BatchId(u64::MAX);
                }
                addresses.insert(change.address());
            }
        }
        self.applied = self.applied.max(id);
    }

    /// Retries, and ends the life of addresses that nobody names any more; a bounded number per call.
    pub fn handle_timeout(&mut self, now: Now) {
        if self.retry.as_ref().is_some_and(|(at, _)| *at <= now.instant) {
            self.try_again();
        }
        if self.deadline.is_some_and(|at| at <= now.instant) {
            self.end_lives(now);
        }
    }

    fn try_again(&mut self) {
        for _ in 0..STEP {
            let Some((_, addresses)) = &mut self.retry else { return };
            let Some(address) = addresses.pop_first() else {
                self.retry = None;
                return;
            };
            let batch = self.batch();
            self.pending.push_back(match self.entries.get_mut(&address) {
                None => RouteChange::Release(address),
                Some(entry) => {
                    entry.batch = batch;
                    if entry.prohibited_until.is_some() {
                        RouteChange::Prohibit(address)
                    } else {
                        RouteChange::named(address, entry.passed)
                    }
                }
            });
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
            if entry.directory {
                continue;
            }
            match entry.prohibited_until.max(entry.dns_until).filter(|at| *at > now.instant) {
                Some(at) => walk.deadline = Some(walk.deadline.map_or(at, |old| old.min(at))),
                None => over.push(*address),
            }
        }
        for address in over {
            let ended = self.entries.remove(&address);
            self.from_dns -= usize::from(ended.is_some_and(|entry| entry.dns_until.is_some()));
            self.pending.push_back(RouteChange::Release(address));
        }
        if seen == STEP {
            self.walk = Some(walk);
        } else {
            self.deadline = walk.deadline;
        }
    }

    /// When `handle_timeout` has work.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.retry.iter().map(|(at, _)| *at).chain(self.deadline).min()
    }
}

impl RouteChange {
    fn named(address: IpAddr, passed: bool) -> Self {
        if passed { Self::Pass(address) } else { Self::Protect(address) }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn at(start: Instant, seconds: u64) -> Now {
        Now {
            instant: start + Duration::from_secs(seconds),
            wall: Duration::from_secs(1_700_000_000 + seconds),
        }
    }

    fn address(n: u32) -> IpAddr {
        IpAddr::from(std::net::Ipv4Addr::from_bits(0x0a60_0000 + n))
    }

    #[test]
    fn the_kernel_side_hears_of_what_a_predecessor_learned_meanwhile_and_of_nothing_twice() {
        let (mut routing, now) = (Routing::new(false), at(crate::proto::test_start(), 0));
        routing.adopt(&[address(1)], now);
        let left = Duration::from_secs(5);
        routing.import(vec![(address(1), left), (address(2), left)], now.instant);
        assert_eq!(routing.poll_batch().unwrap().changes, [RouteChange::Prohibit(address(2))]);
        assert!(routing.poll_batch().is_none());
        assert!(routing.is_protected(address(1)) && routing.is_protected(address(2)));
    }

    #[test]
    fn an_address_is_active_only_after_its_batch_is_applied() {
        let (mut routing, now) = (Routing::new(false), at(crate::proto::test_start(), 0));
        routing.add_from_directory(address(1));
        assert!(routing.is_protected(address(1)) && !routing.is_active(address(1)));
        let batch = routing.poll_batch().unwrap();
        assert_eq!(batch.changes, [RouteChange::Protect(address(1))]);
        assert!(!routing.is_active(address(1)) && !routing.is_settled());
        routing.handle_applied(batch.id, true, now);
        assert!(routing.is_active(address(1)) && routing.is_settled());
    }

    #[test]
    fn a_failed_batch_is_asked_for_again_and_stays_inactive_until_then() {
        let start = crate::proto::test_start();
        let mut routing = Routing::new(false);
        routing.add_from_directory(address(1));
        let first = routing.poll_batch().unwrap();
        routing.handle_applied(first.id, false, at(start, 0));
        routing.add_from_directory(address(2));
        let second = routing.poll_batch().unwrap();
        routing.handle_applied(second.id, true, at(start, 0));
        assert!(!routing.is_active(address(1)) && routing.is_active(address(2)));
        routing.handle_timeout(at(start, 1));
        let third = routing.poll_batch().unwrap();
        assert_eq!(third.changes, [RouteChange::Protect(address(1))]);
        routing.handle_applied(third.id, true, at(start, 1));
        assert!(routing.is_active(address(1)));
    }

    #[test]
    fn large_updates_go_out_in_batches_and_each_address_waits_for_its_own() {
        let mut routing = Routing::new(false);
        for n in 0..1200 {
            routing.add_from_directory(address(n));
        }
        let first = routing.poll_batch().unwrap();
        routing.handle_applied(first.id, true, at(crate::proto::test_start(), 0));
        assert!(routing.is_active(address(0)) && !routing.is_active(address(1199)));
        let mut rest = 0;
        while let Some(batch) = routing.poll_batch() {
            rest += batch.changes.len();
            routing.handle_applied(batch.id, true, at(crate::proto::test_start(), 0));
        }
        assert_eq!(first.changes.len() + rest, 1200);
        assert!((0..1200).all(|n| routing.is_active(address(n))));
    }

    #[test]
    fn a_removed_address_is_prohibited_for_30_seconds_then_released() {
        let start = crate::proto::test_start();
        let mut routing = Routing::new(false);
        routing.add_from_directory(address(1));
        routing.poll_batch().unwrap();
        routing.remove_from_directory(address(1), at(start, 0));
        assert_eq!(routing.poll_batch().unwrap().changes, [RouteChange::Prohibit(address(1))]);
        routing.handle_timeout(at(start, 29));
        assert!(routing.is_protected(address(1)) && routing.poll_batch().is_none());
        routing.handle_timeout(at(start, 30));
        assert_eq!(routing.poll_batch().unwrap().changes, [RouteChange::Release(address(1))]);
        assert!(!routing.is_protected(address(1)));
    }

    #[test]
    fn thousands_of_lives_that_end_together_end_a_bounded_number_at_a_time() {
        let start = crate::proto::test_start();
        let mut routing = Routing::new(false);
        let count = 10_000;
        (0..count).for_each(|n| routing.add_from_directory(address(2 * n)));
        (0..count).for_each(|n| routing.remove_from_directory(address(2 * n), at(start, 0)));
        while routing.poll_batch().is_some() {}
        let mut released = 0;
        while routing.poll_timeout().is_some_and(|due| due <= at(start, 30).instant) {
            routing.handle_timeout(at(start, 30));
            let step: usize = std::iter::from_fn(|| routing.poll_batch()).map(|b| b.changes.len()).sum();
            assert!(step <= STEP, "{step} at once");
            // Behind the walk, with an end of its own.
            if released == 0 {
                routing.add_from_dns(address(1), Duration::from_secs(100), at(start, 30)).unwrap();
                routing.poll_batch().unwrap();
            }
            released += step;
        }
        assert_eq!(released, 10_000);
        assert!(routing.is_protected(address(1)));
        assert_eq!(routing.poll_timeout(), Some(start + Duration::from_secs(130)));
    }

    #[test]
    fn a_refused_update_is_asked_for_again_a_bounded_number_at_a_time() {
        let start = crate::proto::test_start();
        let mut routing = Routing::new(false);
        (0..5_000).for_each(|n| routing.add_from_directory(address(n)));
        while let Some(batch) = routing.poll_batch() {
            routing.handle_applied(batch.id, false, at(start, 0));
        }
        let mut asked = BTreeSet::new();
        while routing.poll_timeout().is_some_and(|due| due <= at(start, 1).instant) {
            routing.handle_timeout(at(start, 1));
            let batches: Vec<_> = std::iter::from_fn(|| routing.poll_batch()).collect();
            assert!(batches.iter().map(|b| b.changes.len()).sum::<usize>() <= STEP);
            for batch in batches {
                asked.extend(batch.changes.iter().map(RouteChange::address));
                routing.handle_applied(batch.id, true, at(start, 1));
            }
        }
        assert_eq!(asked.len(), 5_000);
        assert!(routing.is_settled() && (0..5_000).all(|n| routing.is_active(address(n))));
    }

    #[test]
    fn what_a_former_agent_protected_stays_closed_until_it_is_named_or_its_time_is_over() {
        let start = crate::proto::test_start();
        let mut routing = Routing::new(false);
        routing.adopt(&[address(1), address(2)], at(start, 0));
        assert!(routing.poll_batch().is_none() && !routing.is_active(address(1)));
        routing.add_from_directory(address(1));
        assert_eq!(routing.poll_batch().unwrap().changes, [RouteChange::Protect(address(1))]);
        routing.handle_timeout(at(start, 59));
        assert!(routing.poll_batch().is_none());
        routing.handle_timeout(at(start, 60));
        assert_eq!(routing.poll_batch().unwrap().changes, [RouteChange::Release(address(2))]);
        assert!(routing.is_protected(address(1)));
    }

    #[test]
    fn an_address_that_becomes_exempt_is_released_at_once() {
        let start = crate::proto::test_start();
        let mut routing = Routing::new(false);
        routing.add_from_dns(address(1), Duration::from_secs(3600), at(start, 0)).unwrap();
        routing.poll_batch().unwrap();
        routing.exempt(address(1), at(start, 1));
        routing.handle_timeout(at(start, 1));
        assert_eq!(routing.poll_batch().unwrap().changes, [RouteChange::Release(address(1))]);
    }

    #[test]
    fn an_address_from_dns_lives_its_ttl_but_at_least_60_seconds_and_directory_keeps_it() {
        let start = crate::proto::test_start();
        let mut routing = Routing::new(false);
        routing.add_from_dns(address(1), Duration::from_secs(5), at(start, 0)).unwrap();
        routing.add_from_dns(address(2), Duration::from_secs(5), at(start, 0)).unwrap();
        routing.add_from_directory(address(2));
        routing.poll_batch().unwrap();
        routing.handle_timeout(at(start, 59));
        assert!(routing.is_protected(address(1)));
        assert_eq!(routing.poll_timeout(), Some(start + Duration::from_secs(60)));
        routing.handle_timeout(at(start, 60));
        assert!(!routing.is_protected(address(1)) && routing.is_protected(address(2)));
    }

    #[test]
    fn below_strict_a_named_address_is_passed_until_it_is_decided_and_either_waits_for_its_batch() {
        let (mut routing, now) = (Routing::new(true), at(crate::proto::test_start(), 0));
        routing.add_from_directory(address(1));
        assert!(!routing.is_active(address(1)));
        let batch = routing.poll_batch().unwrap();
        assert_eq!(batch.changes, [RouteChange::Pass(address(1))]);
        routing.handle_applied(batch.id, true, now);
        assert!(routing.is_active(address(1)) && !routing.is_captured(address(1)));
        routing.decide(address(1), false);
        assert!(routing.poll_batch().is_none(), "nothing changed");
        routing.decide(address(1), true);
        assert!(!routing.is_active(address(1)));
        let batch = routing.poll_batch().unwrap();
        assert_eq!(batch.changes, [RouteChange::Protect(address(1))]);
        routing.handle_applied(batch.id, true, now);
        assert!(routing.is_captured(address(1)));
    }

    #[test]
    fn a_passed_address_that_leaves_the_directory_is_released_at_once() {
        let (mut routing, now) = (Routing::new(true), at(crate::proto::test_start(), 0));
        routing.add_from_directory(address(1));
        routing.poll_batch().unwrap();
        routing.remove_from_directory(address(1), now);
        routing.handle_timeout(now);
        assert_eq!(routing.poll_batch().unwrap().changes, [RouteChange::Release(address(1))]);
        assert!(!routing.is_protected(address(1)) && routing.from_dns == 0);
    }

    #[test]
    fn addresses_known_from_dns_are_bounded() {
        let mut routing = Routing::new(false);
        let now = at(crate::proto::test_start(), 0);
        for n in 0..u32::try_from(DNS_ADDRESSES).unwrap() {
            routing.add_from_dns(address(n), Duration::ZERO, now).unwrap();
        }
        assert_eq!(routing.add_from_dns(address(99_999), Duration::ZERO, now), Err(TooMany));
        assert_eq!(routing.add_from_dns(address(7), Duration::ZERO, now), Ok(()));
    }
}
