//! The control thread: puts the engine's route batches into the kernel, in order, while packets go on.
//!
//! One thread, blocking netlink sockets, one order at a time: a batch ([`Kernel::apply`]: for an address to be protected
//! first its guard element, then its route; to be released the other way round), or a check ([`Kernel::check`]: compares
//! the kernel with what was applied, repairs, says what it found). What becomes of connections in
//! being: flows.rs. The driver is woken through an eventfd when one is done.
//!
//! A check, in the order in which things depend on each other: guard, links, `tenc0`, addresses, rules, routes; and then where
//! packets really go.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nix::sys::eventfd::{EfdFlags, EventFd};
use rustix::time::{ClockId, clock_gettime};
use tracing::debug;

use super::flows::{self, Ended, Flows};
use super::guard::{Guard, Kind, Wanted as WantedSets};
use super::netlink::{Capture, Link, MARK, Netlink, ProtectedRoute, TX_QUEUE_LEN, Wanted};
use super::tun::{self, Tun};
use super::watch::Tampering;
use crate::proto::ladder::Mode;
use crate::proto::mtu::{inner_mtu, tun_mtu};
use crate::proto::routing::{Batch, BatchId, RouteChange};
use crate::sys::memory;

/// Below this MTU a device has no IPv6. Source: RFC 8200 §5.
const IPV6_MIN_MTU: u32 = 1_280;
/// Addresses whose ways are asked for in one check, in turn.
const WAYS: usize = 512;

/// What the thread is to do.
enum Order {
    Apply(Batch),
    Check,
    GuardLoaded(u64),
    ReadAsked,
}

/// What the thread has done.
pub(super) enum Done {
    /// A batch.
    Applied(Applied),
    /// A check.
    Checked(Checked),
    /// A look at the addresses that the guard's rules met and nobody named.
    Asked(Vec<IpAddr>),
}

/// A finished batch, or why it could not be.
pub(super) struct Applied {
    pub(super) id: BatchId,
    pub(super) outcome: anyhow::Result<()>,
    /// Flows that ended or moved with it, in either case.
    pub(super) ended: Ended,
    /// Addresses that were to be retired, and that a socket of the pod still names.
    pub(super) named: Vec<IpAddr>,
}

/// What a check found.
#[derive(Debug, Default)]
pub(super) struct Checked {
    /// The launcher had just loaded this skeleton of the guard; whether its sets are filled.
    pub(super) filled: Option<(u64, bool)>,
    /// How much of a core's time it took.
    pub(super) cost: Duration,
    /// Put right.
    pub(super) repaired: Vec<Tampering>,
    /// Beyond the agent's power, or not its to change.
    pub(super) standing: Vec<Tampering>,
    /// `tenc0` had to be made again: the driver reads this one from now on.
    pub(super) new_tun: Option<Arc<Tun>>,
    /// The pod's link has this MTU now.
    pub(super) link_mtu: Option<u32>,
    /// The pod's device is gone from this namespace, and with it the namespace's use.
    pub(super) pod_link_gone: bool,
}

/// The driver's handle on the thread.
pub(super) struct Applier {
    orders: Option<Sender<Order>>,
    done: Receiver<Done>,
    event: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

/// What routes, rules and `tenc0` depend on.
pub(super) struct Facts {
    /// Own addresses, and what the rules capture.
    pub(super) capture: Capture,
    /// MTU of the pod's link.
    pub(super) link_mtu: u32,
    /// The driver reads the same one.
    pub(super) tun: Arc<Tun>,
    /// Addresses that a former agent left routes for.
    pub(super) stale: Vec<IpAddr>,
    /// Addresses that it left in the guard's set of peers.
    pub(super) peers: Vec<IpAddr>,
}

impl Applier {
    /// Starts the thread in the calling thread's namespace, with `tenc0` and the rules in place. Also gives the addresses that
    /// sockets of the pod name now.
    ///
    /// # Errors
    /// No eventfd, no thread, or the kernel does not show its devices, or what a former agent left.
    pub(super) fn start(
        guard: Guard,
        mut netlink: Netlink,
        facts: Facts,
        mode: Mode,
    ) -> anyhow::Result<(Self, Vec<IpAddr>)> {
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).context("eventfd")?;
        let event = Arc::new(event);
        let (orders, inbox) = channel::<Order>();
        let (outbox, done) = channel();
        let wake = Arc::clone(&event);
        let tun_index = netlink.link(tun::NAME)?.index;
        let addresses = netlink.addresses()?;
        let own = &facts.capture.own;
        let pod_index = addresses.iter().find(|a| own.contains(&a.address)).map(|a| a.index);
        let mut flows = Flows::open(&mut netlink, mode).context("look at the pod's connections")?;
        let spoken_to = flows.spoken_to();
        let mut kernel = Kernel {
            guard,
            netlink,
            tun_index,
            pod_index,
            known: addresses.into_iter().map(|a| (a.index, a.address)).collect(),
            held: facts.stale.iter().map(|to| (*to, Held::Adopted)).collect(),
            peers: facts.peers.iter().copied().filter(|to| facts.stale.contains(to)).collect(),
            facts,
            named: Vec::new(),
            flows,
            sweep_at: Instant::now(),
            reached: BTreeSet::new(),
            asked: None,
        };
        let thread = std::thread::Builder::new().name("applier".into()).spawn(move || {
            loop {
                let done = match kernel.next(&inbox) {
                    Ok(Order::Apply(batch)) => {
                        let outcome = kernel.apply(&batch);
                        let (ended, named) = (kernel.flows.ended(), std::mem::take(&mut kernel.named));
                        Done::Applied(Applied { id: batch.id, outcome, ended, named })
                    }
                    Ok(Order::Check) => {
                        let checked = kernel.check();
                        // Every route and element was read: megabytes, and not again for a while.
                        memory::give_back();
                        Done::Checked(checked)
                    }
                    Ok(Order::GuardLoaded(skeleton)) => Done::Checked(kernel.guard_loaded(skeleton)),
                    Ok(Order::ReadAsked) => Done::Asked(kernel.read_asked()),
                    Err(RecvTimeoutError::Timeout) => {
                        kernel.sweep_at = Instant::now() + flows::SWEEP;
                        kernel.flows.sweep(&mut kernel.netlink);
                        continue;
                    }
                    Err(RecvTimeoutError::Disconnected) => return,
                };
                if outbox.send(done).is_err() || wake.write(1).is_err() {
                    return;
                }
            }
        });
        let thread = Some(thread.context("start the control thread")?);
        Ok((Self { orders: Some(orders), done, event, thread }, spoken_to))
    }

    /// Hands over a batch.
    pub(super) fn submit(&self, batch: Batch) {
        // A batch lost is never applied: closed.
        self.order(Order::Apply(batch));
    }

    /// Orders a check; its outcome comes as [`Done::Checked`].
    pub(super) fn check(&self) {
        self.order(Order::Check);
    }

    /// Orders a look at the addresses that the guard's rules met; they come as [`Done::Asked`].
    pub(super) fn read_asked(&self) {
        self.order(Order::ReadAsked);
    }

    /// The launcher loaded the guard's skeleton again: its sets are filled. Another skeleton's rules are taken for the right ones.
    pub(super) fn guard_loaded(&self, skeleton: u64) {
        self.order(Order::GuardLoaded(skeleton));
    }

    fn order(&self, order: Order) {
        if let Some(orders) = &self.orders {
            // The thread ends only after this sender.
            let _ = orders.send(order);
        }
    }

    /// What was finished next.
    pub(super) fn poll(&self) -> Option<Done> {
        let _ = self.event.read();
        self.done.try_recv().ok()
    }

    /// Waits for what was handed over, and ends the thread.
    pub(super) fn finish(mut self) {
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl AsFd for Applier {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// What was applied last to an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Held {
    Protect,
    Prohibit,
    /// Carried by the platform.
    Pass,
    /// By a former agent, who knows what.
    Adopted,
}

struct Kernel {
    guard: Guard,
    netlink: Netlink,
    facts: Facts,
    held: BTreeMap<IpAddr, Held>,
    /// Those of them that sealed datagrams may go to.
    peers: BTreeSet<IpAddr>,
    /// Addresses of this batch that a socket of the pod still names.
    named: Vec<IpAddr>,
    tun_index: u32,
    pod_index: Option<u32>,
    /// Addresses of the namespace that were there when the agent came, by device.
    known: BTreeSet<(u32, IpAddr)>,
    flows: Flows,
    /// When the pins are looked at next.
    sweep_at: Instant,
    /// Protected addresses that sealed datagrams found a way to.
    reached: BTreeSet<IpAddr>,
    /// Whose way was asked for last.
    asked: Option<IpAddr>,
}

impl Kernel {
    /// Waits for a batch; a time-out means that pins are to be swept.
    fn next(&self, inbox: &Receiver<Order>) -> Result<Order, RecvTimeoutError> {
        if self.flows.has_pins() {
            // Orders do not put it off.
            inbox.recv_timeout(self.sweep_at.saturating_duration_since(Instant::now()))
        } else {
            inbox.recv().map_err(|_| RecvTimeoutError::Disconnected)
        }
    }

    fn apply(&mut self, batch: &Batch) -> anyhow::Result<()> {
        crate::fault::delay_netlink();
        self.flows.prepare(&mut self.netlink, batch)?;
        for run in batch.changes.chunk_by(|a, b| std::mem::discriminant(a) == std::mem::discriminant(b)) {
            let addresses: Vec<IpAddr> = run.iter().map(RouteChange::address).collect();
            // What is wanted is noted first: a change that fails half-way is completed by the next check.
            match run[0] {
                RouteChange::Protect(_) => {
                    self.held.extend(addresses.iter().map(|to| (*to, Held::Protect)));
                    self.guard.protect(&addresses)?;
                    let routes: Vec<_> = addresses.iter().filter_map(|to| self.route(*to)).collect();
                    self.netlink.protect(&routes)?;
                }
                RouteChange::Pass(_) => {
                    self.held.extend(addresses.iter().map(|to| (*to, Held::Pass)));
                    self.guard.protect(&addresses)?;
                    self.netlink.pass(&self.routed(&addresses))?;
                }
                RouteChange::Prohibit(_) => {
                    self.held.extend(addresses.iter().map(|to| (*to, Held::Prohibit)));
                    self.guard.prohibit(&addresses)?;
                    self.netlink.prohibit(&self.routed(&addresses))?;
                }
                RouteChange::Release(_) => self.release(&addresses)?,
                RouteChange::Retire(_) => {
                    let (named, over) = self.flows.split_named(addresses);
                    self.named.extend(named);
                    self.release(&over)?;
                }
                RouteChange::Connect(_) => {
                    self.peers.extend(&addresses);
                    self.guard.add(Kind::Peers, &addresses)?;
                }
                RouteChange::Disconnect(_) => {
                    self.peers.retain(|to| !addresses.contains(to));
                    self.guard.remove(Kind::Peers, &addresses)?;
                }
                RouteChange::Admit(_) => self.guard.admit(&addresses)?,
                RouteChange::Refuse(_) => self.guard.remove(Kind::Released, &addresses)?,
            }
        }
        self.flows.conclude(batch, &self.named);
        Ok(())
    }

    fn release(&mut self, addresses: &[IpAddr]) -> anyhow::Result<()> {
        self.netlink.unprotect(&self.routed(addresses))?;
        self.guard.release(addresses)?;
        self.held.retain(|to, _| !addresses.contains(to));
        self.peers.retain(|to| !addresses.contains(to));
        Ok(())
    }

    /// The addresses that have routes.
    fn routed(&self, addresses: &[IpAddr]) -> Vec<IpAddr> {
        addresses.iter().copied().filter(|to| self.route(*to).is_some()).collect()
    }

    /// None: an address of a family that we do not have; its guard element alone keeps it closed.
    fn route(&self, to: IpAddr) -> Option<ProtectedRoute> {
        let own = *self.facts.capture.own.iter().find(|own| own.is_ipv4() == to.is_ipv4())?;
        Some(ProtectedRoute { to, own, mtu: inner_mtu(self.facts.link_mtu, to) })
    }

    /// Compares everything, repairs what can be repaired. What the kernel refuses stands.
    fn check(&mut self) -> Checked {
        let mut checked = Checked::default();
        let begun = own_time();
        let steps: [fn(&mut Self, &mut Checked) -> anyhow::Result<()>; 6] = [
            Self::check_guard,
            Self::check_links,
            Self::check_addresses,
            Self::check_rules,
            Self::check_routes,
            Self::check_ways,
        ];
        for step in steps {
            if let Err(error) = step(self, &mut checked) {
                debug!(error = format!("{error:#}"), "not repaired");
                checked.standing.push(Tampering::Unrepaired);
            }
        }
        for found in [&mut checked.repaired, &mut checked.standing] {
            found.sort_unstable();
            found.dedup();
        }
        checked.cost = own_time().saturating_sub(begun);
        checked
    }

    fn check_guard(&mut self, checked: &mut Checked) -> anyhow::Result<()> {
        self.check_hooks(checked)?;
        let wanted = self.wanted_sets();
        match self.guard.check(&wanted)? {
            None => {}
            Some(Tampering::GuardElement) => {
                self.refill()?;
                checked.repaired.push(Tampering::GuardElement);
            }
            // The skeleton is the launcher's to load; the sets that are left are kept right.
            Some(other) => {
                checked.standing.push(other);
                if other == Tampering::GuardRules && !self.guard.holds(&wanted)? {
                    self.refill()?;
                    checked.repaired.push(Tampering::GuardElement);
                }
            }
        }
        Ok(())
    }

    /// A device whose egress is not guarded: the launcher adds its hook.
    fn check_hooks(&mut self, checked: &mut Checked) -> anyhow::Result<()> {
        let links = self.netlink.links()?;
        let guarded =
            |link: &Link| link.loopback || link.index == self.tun_index || self.guard.has_hook(&link.name);
        if !links.iter().all(guarded) {
            checked.standing.push(Tampering::GuardDevice);
        }
        Ok(())
    }

    fn wanted_sets(&self) -> WantedSets {
        let former = self.held.iter().filter(|(_, held)| **held == Held::Prohibit);
        WantedSets {
            protected: self.held.keys().copied().collect(),
            peers: self.peers.clone(),
            former: former.map(|(to, _)| *to).collect(),
        }
    }

    fn refill(&mut self) -> anyhow::Result<()> {
        Ok(self.guard.refill(&self.wanted_sets())?)
    }

    fn guard_loaded(&mut self, skeleton: u64) -> Checked {
        let loaded = self.guard.accept(skeleton).map_err(Into::into).and_then(|()| self.refill());
        if let Err(error) = &loaded {
            debug!(error = format!("{error:#}"), "guard not filled");
        }
        Checked { filled: Some((skeleton, loaded.is_ok())), ..self.check() }
    }

    /// Addresses that the rules met on the way out and in, of the last seconds.
    fn read_asked(&mut self) -> Vec<IpAddr> {
        let mut asked = BTreeSet::new();
        for kind in [Kind::Asked, Kind::Fresh] {
            match self.guard.list(kind) {
                Ok(addresses) => asked.extend(addresses),
                // The rules tell again, as long as somebody sends.
                Err(error) => debug!(%error, "addresses that the guard met cannot be read"),
            }
        }
        asked.into_iter().collect()
    }

    fn check_links(&mut self, checked: &mut Checked) -> anyhow::Result<()> {
        let links = self.netlink.links()?;
        match self.pod_index.map(|index| links.iter().find(|link| link.index == index)) {
            None => {}
            Some(None) => checked.pod_link_gone = true,
            Some(Some(link)) => {
                if !link.up {
                    checked.standing.push(Tampering::LinkDown);
                }
                if link.mtu != self.facts.link_mtu {
                    self.facts.link_mtu = link.mtu;
                    checked.link_mtu = Some(link.mtu);
                    checked.repaired.push(Tampering::LinkMtu);
                    self.set_up_tun_and_routes(&links)?;
                }
            }
        }
        let ours = links.iter().find(|link| link.index == self.tun_index && link.tun);
        let mtu = tun_mtu(self.facts.link_mtu, &self.facts.capture.own);
        // With such an MTU it lost IPv6, which would come back with an address of its own: it is made again.
        let lost_ipv6 = |link: &Link| link.mtu < IPV6_MIN_MTU && mtu >= IPV6_MIN_MTU;
        match ours {
            Some(link) if link.name == tun::NAME && self.facts.tun.is_attached() && !lost_ipv6(link) => {
                if checked.link_mtu.is_some() {
                    return Ok(());
                }
                let wrong = [
                    (!link.up, Tampering::TunDown),
                    (link.mtu != mtu, Tampering::TunMtu),
                    (link.queue != TX_QUEUE_LEN, Tampering::TunQueue),
                ];
                let wrong: Vec<_> = wrong.into_iter().filter_map(|(is, kind)| is.then_some(kind)).collect();
                if !wrong.is_empty() {
                    self.netlink.set_up_tun(tun::NAME, mtu)?;
                    checked.repaired.extend(wrong);
                }
            }
            other => {
                let kind = match other {
                    Some(link) if link.name != tun::NAME => Tampering::TunRenamed,
                    Some(link) if self.facts.tun.is_attached() && lost_ipv6(link) => Tampering::TunMtu,
                    _ if self.facts.tun.is_attached() => Tampering::TunMoved,
                    _ => Tampering::TunDeleted,
                };
                self.replace_tun(other, mtu, kind, checked)?;
            }
        }
        Ok(())
    }

    /// Makes `tenc0` again. What becomes of the old one: `left` is it, where it is still here.
    fn replace_tun(
        &mut self,
        left: Option<&Link>,
        mtu: u32,
        kind: Tampering,
        checked: &mut Checked,
    ) -> anyhow::Result<()> {
        // The old device goes with its last descriptor, wherever it is.
        self.facts.tun.let_go();
        if let Some(link) = left {
            self.netlink.delete_link(link.index)?;
        }
        let tun = match Tun::open() {
            Ok(tun) => Arc::new(tun),
            Err(tun::Error::Foreign(_) | tun::Error::Busy(_)) => {
                checked.standing.extend([kind, Tampering::TunForeign]);
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        };
        self.netlink.set_up_tun(tun::NAME, mtu)?;
        self.tun_index = self.netlink.link(tun::NAME)?.index;
        self.facts.tun = Arc::clone(&tun);
        checked.new_tun = Some(tun);
        checked.repaired.push(kind);
        Ok(())
    }

    /// A new MTU: downwards the routes first, so that nothing too long is made; the device's own limit follows.
    fn set_up_tun_and_routes(&mut self, links: &[Link]) -> anyhow::Result<()> {
        if !links.iter().any(|link| link.index == self.tun_index && link.name == tun::NAME) {
            return Ok(());
        }
        let protected = self.held.iter().filter(|(_, held)| **held == Held::Protect);
        let routes: Vec<_> = protected.filter_map(|(to, _)| self.route(*to)).collect();
        self.netlink.protect(&routes)?;
        self.netlink.set_up_tun(tun::NAME, tun_mtu(self.facts.link_mtu, &self.facts.capture.own))?;
        Ok(())
    }

    /// Addresses are never adopted, added or removed by the agent.
    fn check_addresses(&mut self, checked: &mut Checked) -> anyhow::Result<()> {
        let found = self.netlink.addresses()?;
        if self.facts.capture.own.iter().any(|own| !found.iter().any(|a| a.address == *own)) {
            checked.standing.push(Tampering::OwnAddressGone);
        }
        if found.iter().any(|a| a.index == self.tun_index) {
            checked.standing.push(Tampering::TunAddress);
        }
        let added = found.iter().any(|a| {
            Some(a.index) == self.pod_index
                && !self.known.contains(&(a.index, a.address))
                && !self.facts.capture.own.contains(&a.address)
        });
        if added {
            checked.standing.push(Tampering::AddressAdded);
        }
        Ok(())
    }

    fn check_rules(&mut self, checked: &mut Checked) -> anyhow::Result<()> {
        let (repaired, standing) = self.netlink.check_rules(&self.facts.capture)?;
        checked.repaired.extend(repaired);
        checked.standing.extend(standing);
        Ok(())
    }

    fn check_routes(&mut self, checked: &mut Checked) -> anyhow::Result<()> {
        // Without its device no route can be put; the twins keep it closed.
        if checked.standing.contains(&Tampering::TunForeign) {
            return Ok(());
        }
        let own = self.present()?;
        let wanted = self.held.iter().filter_map(|(to, held)| {
            let route = self.route(*to)?;
            Some((
                *to,
                match held {
                    // A source that is not ours now cannot be preferred: the route comes back with the address.
                    Held::Protect if !own.contains(&route.own) => Wanted::Twin,
                    Held::Protect => Wanted::Protect { own: route.own, mtu: route.mtu },
                    Held::Prohibit => Wanted::Prohibit,
                    Held::Pass => Wanted::Pass,
                    Held::Adopted => Wanted::Any,
                },
            ))
        });
        let wanted: BTreeMap<_, _> = wanted.collect();
        let all = &self.facts.capture.own;
        let (repaired, standing) = self.netlink.check_routes(self.tun_index, all, &own, &wanted)?;
        checked.repaired.extend(repaired);
        checked.standing.extend(standing);
        Ok(())
    }

    /// Our addresses that the namespace has now.
    fn present(&mut self) -> anyhow::Result<Vec<IpAddr>> {
        let found = self.netlink.addresses()?;
        let own = self.facts.capture.own.iter().copied();
        Ok(own.filter(|own| found.iter().any(|a| a.address == *own)).collect())
    }

    /// Asks the kernel for the way to protected addresses: from an application into `tenc0`, and from our own sockets out of the
    /// pod's device, if it ever was so (to a VIP there need not be any).
    fn check_ways(&mut self, checked: &mut Checked) -> anyhow::Result<()> {
        if checked.standing.contains(&Tampering::TunForeign) {
            return Ok(());
        }
        let own = self.present()?;
        let protected = self.held.iter().filter(|(to, held)| {
            **held == Held::Protect && self.route(**to).is_some_and(|route| own.contains(&route.own))
        });
        let all: Vec<IpAddr> = protected.map(|(to, _)| *to).collect();
        self.reached.retain(|to| self.held.contains_key(to));
        let after = all.partition_point(|to| Some(*to) <= self.asked);
        let asked = all[after..].iter().chain(&all[..after]).take(WAYS);
        for to in asked {
            if self.netlink.way(*to, None)? != Some(self.tun_index) {
                checked.standing.push(Tampering::RouteBypassed);
            }
            if self.pod_index.is_some() && self.netlink.way(*to, Some(MARK))? == self.pod_index {
                self.reached.insert(*to);
            } else if self.reached.contains(to) {
                checked.standing.push(Tampering::UnderlayLost);
            }
            self.asked = Some(*to);
        }
        Ok(())
    }
}

/// How long this thread has run so far: a machine with other work does not make a check longer.
fn own_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}
