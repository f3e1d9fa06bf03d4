//! Addresses within the ranges that no object of the project names: the launcher is asked who they belong to.
//!
//! 1. the guard drops a packet to an unknown address, or sees a packet from one ([`Engine::handle_asked`]); or a DNS answer
//!    names one (`proto::dns`, which holds the answer meanwhile, for 50 ms at most)
//! 2. [`Engine::poll_ask`]: the driver puts the addresses to the launcher
//! 3. [`Engine::handle_classified`]: an address of another owner is admitted, any other address stays closed. The launcher
//!    may send corrections later
//! 4. an admitted address is renewed every five minutes, because the guard forgets it after ten, and is asked about again
//!    by each new launcher; it is refused when the launcher no longer vouches for it, when the directory or DNS names it,
//!    or when the table is full and it is the address asked for longest ago
//!
//! Without ranges no address is asked about. Below strict neither, because the guard only counts there. Without a launcher
//! no new address is admitted, admitted addresses are still renewed, and a DNS answer does not wait.
//!
//! Former addresses are asked about, too, each about every half minute: a platform gives a pod's address to the next pod,
//! which may belong to somebody else. A former address whose new owner is vouched for is released and admitted.
//!
//! Everything is bounded: `IN_FLIGHT` asks at a time, at most half of them for admitted and former addresses; one ask
//! a second for each address; `ADMITTED` addresses. An ask that was not answered within a second is forgotten: the guard
//! asks again.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::ranges::Ranges;
use super::routing::{BatchId, Class, Routing};
use super::{Engine, Now};

/// Asks in flight; also the most that one message to the launcher holds.
const IN_FLIGHT: usize = 128;
/// Those of them that are for admitted and for former addresses.
const BACKGROUND: usize = IN_FLIGHT / 2;
/// Addresses that were asked about within the last second.
const RECENT: usize = 1024;
/// An address is asked about once in this time, and an ask without an answer is forgotten after it.
const ASK_LIFE: Duration = Duration::from_secs(1);
/// Addresses admitted at a time; the guard's set holds as many.
const ADMITTED: usize = 4096;
/// An admitted address is renewed this often; the guard's element lives twice as long.
const RENEWAL: Duration = Duration::from_secs(300);
/// A part of the former addresses is asked about this often,
const FORMERS_INTERVAL: Duration = Duration::from_secs(5);
/// and each address in one of so many turns.
const FORMERS_TURNS: usize = 6;

/// Addresses that are admitted, or about to be.
#[derive(Debug, Default)]
pub(super) struct Admissions {
    by_address: BTreeMap<IpAddr, Admission>,
    by_asked: BTreeSet<(Instant, IpAddr)>,
    by_renewal: BTreeSet<(Instant, IpAddr)>,
}

#[derive(Debug)]
struct Admission {
    /// When it was asked for last.
    asked: Instant,
    /// When it is renewed next.
    renew: Instant,
    /// The batch that brings its element.
    batch: BatchId,
}

impl Admissions {
    pub(super) fn contains(&self, address: IpAddr) -> bool {
        self.by_address.contains_key(&address)
    }

    pub(super) fn len(&self) -> usize {
        self.by_address.len()
    }

    pub(super) fn batch(&self, address: IpAddr) -> Option<BatchId> {
        self.by_address.get(&address).map(|admission| admission.batch)
    }

    pub(super) fn set_batch(&mut self, address: IpAddr, batch: BatchId) {
        self.by_address.get_mut(&address).into_iter().for_each(|admission| admission.batch = batch);
    }

    pub(super) fn is_full(&self) -> bool {
        self.by_address.len() >= ADMITTED
    }

    /// Removes the address asked for longest ago, if there is no room for `address`, and returns it.
    pub(super) fn make_room(&mut self, address: IpAddr) -> Option<IpAddr> {
        if !self.is_full() || self.contains(address) {
            return None;
        }
        let (_, oldest) = *self.by_asked.first()?;
        self.remove(oldest);
        Some(oldest)
    }

    /// Admits `address` with `batch`. One that a former agent left (`batch` is in place) is renewed at once.
    pub(super) fn insert(&mut self, address: IpAddr, batch: BatchId, now: Instant) {
        self.remove(address);
        let renew = if batch == BatchId::default() { now } else { now + RENEWAL };
        self.by_asked.insert((now, address));
        self.by_renewal.insert((renew, address));
        self.by_address.insert(address, Admission { asked: now, renew, batch });
    }

    pub(super) fn remove(&mut self, address: IpAddr) -> bool {
        let Some(Admission { asked, renew, .. }) = self.by_address.remove(&address) else { return false };
        self.by_asked.remove(&(asked, address));
        self.by_renewal.remove(&(renew, address));
        true
    }

    pub(super) fn touch(&mut self, address: IpAddr, now: Instant) {
        let Some(admission) = self.by_address.get_mut(&address) else { return };
        self.by_asked.remove(&(std::mem::replace(&mut admission.asked, now), address));
        self.by_asked.insert((now, address));
    }

    /// An address whose renewal is due.
    pub(super) fn renew(&mut self, now: Instant) -> Option<IpAddr> {
        let address = self.by_renewal.first().filter(|(at, _)| *at <= now)?.1;
        self.by_renewal.pop_first();
        if let Some(admission) = self.by_address.get_mut(&address) {
            admission.renew = now + RENEWAL;
        }
        self.by_renewal.insert((now + RENEWAL, address));
        Some(address)
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.by_renewal.first().map(|(at, _)| *at)
    }
}

/// What the launcher is asked.
#[derive(Debug, Default)]
pub(super) struct Asks {
    ranges: Ranges,
    /// A launcher is connected.
    connected: bool,
    /// Addresses that were asked about within the last second, and whether the answer is still to come.
    recent: BTreeMap<IpAddr, bool>,
    /// The same in the order of time.
    order: VecDeque<(Instant, IpAddr)>,
    in_flight: usize,
    /// Not polled yet.
    unsent: VecDeque<IpAddr>,
    /// Admitted addresses that this launcher was not asked about yet.
    again: VecDeque<IpAddr>,
    /// When the next former addresses are asked about.
    formers_at: Option<Instant>,
    /// The former address that was asked about last.
    former: Option<IpAddr>,
}

impl Asks {
    pub(super) fn new(ranges: Ranges) -> Self {
        Self { ranges, ..Self::default() }
    }

    /// Whether the address is within the ranges: only then it is asked about.
    pub(super) fn concerns(&self, address: IpAddr) -> bool {
        self.ranges.contains(address)
    }

    /// Whether an answer about the address is on its way.
    pub(super) fn is_asking(&self, address: IpAddr) -> bool {
        self.connected && self.recent.get(&address) == Some(&true)
    }

    /// Asks about an address within the ranges, unless that was done within the last second, or there is no room.
    pub(super) fn ask(&mut self, address: IpAddr, now: Now) {
        let has_room = self.in_flight < IN_FLIGHT && self.recent.len() < RECENT;
        if !has_room || !self.concerns(address) || self.recent.contains_key(&address) {
            return;
        }
        self.recent.insert(address, true);
        self.order.push_back((now.instant, address));
        self.in_flight += 1;
        self.unsent.push_back(address);
    }

    fn answer(&mut self, address: IpAddr) {
        if let Some(waits) = self.recent.get_mut(&address) {
            self.in_flight -= usize::from(std::mem::take(waits));
        }
    }

    fn handle_launcher(&mut self, connected: bool, routing: &Routing) {
        self.connected = connected;
        if connected {
            // The previous launcher's answers will not come.
            let waits = |(_, address): &&(Instant, IpAddr)| self.recent.get(address) == Some(&true);
            self.unsent = self.order.iter().filter(waits).map(|(_, address)| *address).collect();
            self.again = routing.admissions().by_address.keys().copied().collect();
        } else {
            self.formers_at = None;
        }
    }

    fn poll(&mut self) -> Option<Vec<IpAddr>> {
        if !self.connected || self.unsent.is_empty() {
            return None;
        }
        Some(self.unsent.drain(..self.unsent.len().min(IN_FLIGHT)).collect())
    }

    fn handle_timeout(&mut self, routing: &Routing, now: Now) {
        while let Some((_, address)) = self.order.pop_front_if(|(at, _)| *at + ASK_LIFE <= now.instant) {
            if self.recent.remove(&address) == Some(true) {
                self.in_flight -= 1;
                self.unsent.retain(|unsent| *unsent != address);
                if routing.admissions().contains(address) {
                    self.again.push_back(address);
                }
            }
        }
        if self.formers_at.is_some_and(|at| at <= now.instant) {
            self.formers_at = None;
            self.ask_about_formers(routing, now);
        }
        self.ask_again(routing, now);
    }

    /// Asks about admitted addresses, as many as there is room for.
    fn ask_again(&mut self, routing: &Routing, now: Now) {
        for _ in 0..BACKGROUND {
            if !self.connected || self.in_flight >= BACKGROUND {
                return;
            }
            let Some(address) = self.again.pop_front() else { return };
            if routing.admissions().contains(address) {
                self.ask(address, now);
            }
        }
    }

    fn ask_about_formers(&mut self, routing: &Routing, now: Now) {
        let share = routing.former_count().div_ceil(FORMERS_TURNS);
        for _ in 0..share.min(BACKGROUND.saturating_sub(self.in_flight)) {
            let next = routing.formers(self.former).next().or_else(|| routing.formers(None).next());
            self.former = next;
            next.into_iter().for_each(|address| self.ask(address, now));
        }
    }

    /// Plans the next turn of the former addresses.
    pub(super) fn plan(&mut self, routing: &Routing, now: Now) {
        let wanted = self.connected && !self.ranges.is_empty() && routing.former_count() > 0;
        if wanted && self.formers_at.is_none() {
            self.formers_at = Some(now.instant + FORMERS_INTERVAL);
        }
    }

    fn poll_timeout(&self) -> Option<Instant> {
        let forget = self.order.front().map(|(at, _)| *at + ASK_LIFE);
        forget.into_iter().chain(self.formers_at).min()
    }
}

impl Engine {
    /// The guard does not know these addresses, and dropped packets to them or saw packets from them. At bring-up also the
    /// addresses that sockets of the pod name.
    pub fn handle_asked(&mut self, addresses: &[IpAddr], now: Now) {
        for address in addresses.iter().copied().filter(|address| !self.own.contains(address)) {
            if self.routing.is_named(address) || self.routing.is_admission_pending(address) {
                continue;
            }
            if self.routing.admissions().contains(address) {
                // The guard has lost it.
                self.routing.admit(address, now);
            }
            self.asks.ask(address, now);
        }
        self.settle(now);
    }

    /// Addresses to put to the launcher: who do they belong to? At most 128.
    pub fn poll_ask(&mut self) -> Option<Vec<IpAddr>> {
        self.asks.poll()
    }

    /// Whether an answer of the launcher is waited for.
    #[must_use]
    pub fn has_asks(&self) -> bool {
        self.asks.connected && self.asks.in_flight > 0
    }

    /// The launcher says who addresses belong to: the answer to an ask, or a correction.
    pub fn handle_classified(&mut self, classified: Vec<(IpAddr, Class)>, now: Now) {
        for (address, class) in classified {
            self.asks.answer(address);
            match class {
                Class::Outside => self.admit_outside(address, now),
                Class::Own | Class::Unknown => self.routing.refuse(address),
            }
        }
        self.asks.ask_again(&self.routing, now);
        self.dns.recheck();
        self.settle(now);
    }

    fn admit_outside(&mut self, address: IpAddr, now: Now) {
        // Before the first directory a former address may be a peer that is about to be named.
        if self.own.contains(&address) || (self.routing.is_former(address) && !self.knows_directory) {
            return;
        }
        self.routing.give_up_former(address);
        if self.asks.concerns(address) && !self.routing.admissions().contains(address) {
            self.routing.admit(address, now);
        }
    }

    /// A launcher is connected, or not any more. To be called at the start, too. A new launcher is asked about every admitted
    /// address.
    pub fn handle_launcher(&mut self, connected: bool, now: Now) {
        self.asks.handle_launcher(connected, &self.routing);
        self.asks.ask_again(&self.routing, now);
        self.dns.recheck();
        self.settle(now);
    }

    /// A previous agent left these addresses admitted. They stay admitted until the launcher says otherwise. To be called
    /// before [`Self::handle_launcher`].
    pub fn adopt_released(&mut self, addresses: &[IpAddr], now: Now) {
        for address in addresses.iter().copied() {
            self.routing.adopt_admission(address, now);
            if self.own.contains(&address) || !self.asks.concerns(address) {
                self.routing.refuse(address);
            }
        }
    }

    /// Forgets asks that were not answered, and asks about former and admitted addresses when it is time.
    pub(super) fn handle_asks(&mut self, now: Now) {
        self.asks.handle_timeout(&self.routing, now);
    }

    pub(super) fn poll_asks_timeout(&self) -> Option<Instant> {
        self.asks.poll_timeout()
    }
}
