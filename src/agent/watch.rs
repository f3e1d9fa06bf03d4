//! Tampering: what somebody else did to the agent's kernel objects in the pod's namespace, and that somebody did.
//!
//! 1. two netlink sockets hear of every change of links, addresses, routes, rules and nft tables
//! 2. changes of our own are left out where the kernel says who asked; the others make a check due, soon but not often
//! 3. the driver orders the check; `agent::applier` compares, repairs, and says which [`Tampering`] it found and how much
//!    work that was: the next check waits so long that checks take a tenth of a core at most
//!
//! Nothing is learned from an event but that there was one: the check reads the kernel's real state, so a lost event
//! (ENOBUFS) is an event like another, and a periodic check finds what none told.
//!
//! Source: rtnetlink(7), netlink(7), linux/netfilter/nfnetlink.h.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use netlink_sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use netlink_sys::{Socket, SocketAddr};

/// Between the first event and the check: what belongs together comes together.
const SETTLE: Duration = Duration::from_millis(10);
/// Least time between two checks, whatever is heard.
const BETWEEN: Duration = Duration::from_millis(100);
/// A check that took so much of a core's time is followed by a pause of so many times as much.
const PAUSE: u32 = 10;
/// Most time between two checks, but for that pause.
const PERIOD: Duration = Duration::from_secs(10);
/// An agent that is awake does the next check so much early: at rest the launcher's heartbeat wakes it for both.
const EARLY: Duration = Duration::from_millis(1_500);
/// Log lines about one kind of tampering at once, and between two of them later.
const TOLD_AT_ONCE: u32 = 20;
const TOLD_EVERY: Duration = Duration::from_secs(6);
/// Events taken from one socket per turn: packets go on under a flood of them.
const TURN: usize = 64;
/// What is read of an event: both headers, of netlink and of the link.
const HEADERS: usize = 32;
/// Events that fit the kernel's buffer before some are lost.
const RECEIVE_BUFFER: usize = 1 << 20;

/// RTNLGRP_LINK, IPV4_IFADDR, IPV4_ROUTE, IPV4_RULE, IPV6_IFADDR, IPV6_ROUTE, IPV6_RULE.
const ROUTE_GROUPS: [u32; 7] = [1, 5, 7, 8, 9, 11, 19];
/// NFNLGRP_NFTABLES.
const NFTABLES_GROUPS: [u32; 1] = [7];

/// One kind of tampering; the word of logs, status and metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tampering {
    /// `tenc0` was deleted.
    TunDeleted,
    /// `tenc0` is in another namespace.
    TunMoved,
    /// `tenc0` bears another name.
    TunRenamed,
    /// `tenc0` was set down.
    TunDown,
    /// `tenc0` has another MTU.
    TunMtu,
    /// `tenc0` has another queue length.
    TunQueue,
    /// Somebody put an address on `tenc0`; it stays.
    TunAddress,
    /// Another device took the name `tenc0`, or ours cannot be made again.
    TunForeign,
    /// A rule of ours is missing.
    RuleMissing,
    /// A rule of somebody else comes before ours; it stays.
    RuleForeign,
    /// The route of a protected address, or of T53, is missing.
    RouteMissing,
    /// A route of ours leads elsewhere.
    RouteChanged,
    /// A route in our tables that is none of ours; it stays.
    RouteForeign,
    /// The `unreachable` twin of a route is missing.
    TwinMissing,
    /// A table of the guard is missing.
    GuardTable,
    /// The rules of the guard are not those that the launcher loaded.
    GuardRules,
    /// A device came at whose egress there is no guard yet.
    GuardDevice,
    /// A chain in the guard's tables that is none of ours; it stays.
    GuardForeign,
    /// The sets of the guard do not hold what is protected.
    GuardElement,
    /// Packets for a protected address do not go into `tenc0`, though rules and routes of ours stand: another comes first.
    RouteBypassed,
    /// The pod's own routes no longer lead sealed datagrams out of its device.
    UnderlayLost,
    /// An address of the pod is gone.
    OwnAddressGone,
    /// The pod has an address more; it is not adopted.
    AddressAdded,
    /// The MTU of the pod's device changed; the routes follow.
    LinkMtu,
    /// The pod's device is down.
    LinkDown,
    /// The check itself, or a repair, was refused by the kernel.
    Unrepaired,
}

impl Tampering {
    /// The word for it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::TunDeleted => "tun_deleted",
            Self::TunMoved => "tun_moved",
            Self::TunRenamed => "tun_renamed",
            Self::TunDown => "tun_down",
            Self::TunMtu => "tun_mtu",
            Self::TunQueue => "tun_queue",
            Self::TunAddress => "tun_address",
            Self::TunForeign => "tun_foreign",
            Self::RuleMissing => "rule_missing",
            Self::RuleForeign => "rule_foreign",
            Self::RouteMissing => "route_missing",
            Self::RouteChanged => "route_changed",
            Self::RouteForeign => "route_foreign",
            Self::TwinMissing => "twin_missing",
            Self::GuardTable => "guard_table",
            Self::GuardRules => "guard_rules",
            Self::GuardDevice => "guard_device",
            Self::GuardForeign => "guard_foreign",
            Self::GuardElement => "guard_element",
            Self::RouteBypassed => "route_bypassed",
            Self::UnderlayLost => "underlay_lost",
            Self::OwnAddressGone => "own_address_gone",
            Self::AddressAdded => "address_added",
            Self::LinkMtu => "link_mtu",
            Self::LinkDown => "link_down",
            Self::Unrepaired => "unrepaired",
        }
    }

    /// Whether the launcher has to load the guard's skeleton again.
    #[must_use]
    pub const fn needs_reload(self) -> bool {
        matches!(self, Self::GuardTable | Self::GuardRules)
    }
}

/// How often each kind was noticed and repaired, and what stands now.
#[derive(Clone, Debug, Default)]
pub struct TamperCounts {
    /// By kind: noticed, repaired.
    pub counts: BTreeMap<Tampering, (u64, u64)>,
    /// What could not be repaired and is still so.
    pub standing: Vec<Tampering>,
    /// By kind, repaired or standing: when as many log lines as at first may be written again.
    told: BTreeMap<(Tampering, bool), Instant>,
}

impl TamperCounts {
    /// Takes the outcome of a check; returns what stands now and did not before. What stands is counted once.
    pub fn record(&mut self, repaired: &[Tampering], standing: &[Tampering]) -> Vec<Tampering> {
        for kind in repaired {
            let (noticed, mended) = self.counts.entry(*kind).or_default();
            *noticed += u64::from(!self.standing.contains(kind));
            *mended += 1;
        }
        let new: Vec<_> = standing.iter().copied().filter(|kind| !self.standing.contains(kind)).collect();
        for kind in &new {
            self.counts.entry(*kind).or_default().0 += 1;
        }
        self.standing = standing.to_vec();
        new
    }

    /// Whether a log line about it is written: [`TOLD_AT_ONCE`], then one every [`TOLD_EVERY`], however often the pod does it
    /// again. Counts have them all.
    pub(super) fn is_told(&mut self, kind: Tampering, stands: bool, now: Instant) -> bool {
        let told = self.told.entry((kind, stands)).or_insert(now);
        let after = (*told).max(now) + TOLD_EVERY;
        let is_told = after.saturating_duration_since(now) <= TOLD_EVERY * TOLD_AT_ONCE;
        if is_told {
            *told = after;
        }
        is_told
    }
}

/// The sockets, and when the next check is due.
#[derive(Debug)]
pub(super) struct Watch {
    routes: Socket,
    nftables: Socket,
    /// Port numbers of our own sockets.
    own_ports: [u32; 2],
    schedule: Schedule,
}

impl Watch {
    /// Joins the groups in the calling thread's namespace; before privileges are dropped. `own_ports`: the netlink ports
    /// of the sockets that the agent changes things with.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn open(own_ports: [u32; 2], now: Instant) -> io::Result<Self> {
        Ok(Self {
            routes: listen(NETLINK_ROUTE, &ROUTE_GROUPS)?,
            nftables: listen(NETLINK_NETFILTER, &NFTABLES_GROUPS)?,
            own_ports,
            schedule: Schedule::new(now),
        })
    }

    /// What is to be waited for.
    pub(super) fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        [self.routes.as_fd(), self.nftables.as_fd()]
    }

    /// Takes what was heard, a bounded number of events.
    pub(super) fn drain(&mut self, now: Instant) {
        for socket in [&self.routes, &self.nftables] {
            for _ in 0..TURN {
                let mut bytes = Vec::with_capacity(HEADERS);
                match socket.recv(&mut bytes, libc::MSG_TRUNC) {
                    Ok(_) if is_foreign(&bytes, self.own_ports) => self.schedule.note(now),
                    Ok(_) => {}
                    Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => self.schedule.note(now),
                    Err(_) => break,
                }
            }
        }
    }

    /// Something else says that a check is needed: `tenc0` does not answer.
    pub(super) fn note(&mut self, now: Instant) {
        self.schedule.note(now);
    }

    /// A check was done, and took so much of a core's time.
    pub(super) fn note_cost(&mut self, cost: Duration, now: Instant) {
        self.schedule.note_cost(cost, now);
    }

    /// When the next check is due.
    pub(super) fn poll_timeout(&self) -> Instant {
        self.schedule.poll_timeout()
    }

    /// Whether a check is due; it is then taken to be ordered.
    pub(super) fn take_due(&mut self, now: Instant) -> bool {
        self.schedule.take(now)
    }
}

/// When checks are due.
#[derive(Debug)]
struct Schedule {
    last: Instant,
    due: Instant,
    /// The pause after the checks that were done.
    rest_until: Instant,
}

impl Schedule {
    fn new(now: Instant) -> Self {
        Self { last: now, due: now + PERIOD, rest_until: now }
    }

    fn note(&mut self, now: Instant) {
        self.due = self.due.min((now + SETTLE).max(self.last + BETWEEN));
    }

    fn note_cost(&mut self, cost: Duration, now: Instant) {
        self.rest_until = self.rest_until.max(now) + cost * PAUSE;
    }

    fn poll_timeout(&self) -> Instant {
        self.due.max(self.rest_until)
    }

    fn take(&mut self, now: Instant) -> bool {
        let early = if self.due == self.last + PERIOD { EARLY } else { Duration::ZERO };
        if now + early < self.due || now < self.rest_until {
            return false;
        }
        (self.last, self.due) = (now, now + PERIOD);
        true
    }
}

fn listen(protocol: isize, groups: &[u32]) -> io::Result<Socket> {
    let mut socket = Socket::new(protocol)?;
    // Bound first: only then is a full buffer told as ENOBUFS.
    socket.bind(&SocketAddr::new(0, 0))?;
    socket.set_non_blocking(true)?;
    // The system's default serves, less well.
    let _ = nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBufForce, &RECEIVE_BUFFER);
    for group in groups {
        socket.add_membership(*group)?;
    }
    Ok(socket)
}

/// Whether an event was caused by another than us. All messages of one datagram have one cause.
fn is_foreign(event: &[u8], own_ports: [u32; 2]) -> bool {
    let port = event.get(12..16).and_then(|bytes| bytes.first_chunk());
    port.is_none_or(|port| !own_ports.contains(&u32::from_ne_bytes(*port)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(port: u32) -> Vec<u8> {
        let mut bytes = vec![0; HEADERS];
        bytes[12..16].copy_from_slice(&port.to_ne_bytes());
        bytes
    }

    #[test]
    fn what_we_did_ourselves_is_no_tampering() {
        assert!(!is_foreign(&event(7), [7, 8]));
        assert!(is_foreign(&event(0), [7, 8]));
        assert!(is_foreign(&event(9), [7, 8]));
        assert!(is_foreign(&[], [7, 8]));
    }

    #[test]
    fn a_check_comes_soon_after_an_event_and_a_flood_of_events_makes_one_per_100_ms() {
        let start = Instant::now();
        let ms = Duration::from_millis;
        let mut schedule = Schedule::new(start);
        let mut checks = Vec::new();
        for t in 1_000..2_000 {
            let now = start + ms(t);
            schedule.note(now);
            if schedule.take(now) {
                checks.push(t);
            }
        }
        assert!(checks[0] <= 1_020, "{checks:?}");
        assert!(checks.len() <= 10 && checks.windows(2).all(|pair| pair[1] - pair[0] >= 100), "{checks:?}");
    }

    #[test]
    fn without_any_event_a_check_comes_every_five_seconds() {
        let start = Instant::now();
        let mut schedule = Schedule::new(start);
        assert!(!schedule.take(start + PERIOD - EARLY - SETTLE));
        assert!(schedule.take(start + PERIOD - EARLY));
        assert!(!schedule.take(start + PERIOD + BETWEEN));
    }

    #[test]
    fn promise_10_checks_take_a_tenth_of_a_core_at_most_however_much_there_is_to_look_at() {
        let (start, ms) = (Instant::now(), Duration::from_millis);
        let cost = ms(300);
        let mut schedule = Schedule::new(start);
        let (mut now, mut checks) = (start, Vec::new());
        while now < start + ms(60_000) {
            schedule.note(now);
            if schedule.take(now) {
                checks.push(now);
                now += cost;
                schedule.note_cost(cost, now);
                // The launcher loads the guard, and that is checked, too, now and then.
                if checks.len().is_multiple_of(4) {
                    now += cost;
                    schedule.note_cost(cost, now);
                }
            }
            now += ms(1);
        }
        let pauses: Vec<_> = checks.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(pauses.iter().all(|pause| *pause >= cost * 11), "{pauses:?}");
        assert!(checks.len() >= 12, "{checks:?}");
    }

    #[test]
    fn a_check_that_took_long_puts_off_the_periodic_one_too_and_the_wait_ends_when_it_is_due() {
        let start = Instant::now();
        let mut schedule = Schedule::new(start);
        schedule.note_cost(PERIOD, start);
        assert!(!schedule.take(start + PERIOD));
        assert_eq!(schedule.poll_timeout(), start + PERIOD * PAUSE);
        assert!(schedule.take(schedule.poll_timeout()));
        assert_eq!(schedule.poll_timeout(), start + PERIOD * (PAUSE + 1));
    }

    #[test]
    fn promise_10_a_pod_that_tampers_without_end_fills_no_log() {
        let (mut counts, start) = (TamperCounts::default(), Instant::now());
        let lines = |counts: &mut TamperCounts, stands| {
            let moments = (0..1_300).map(|n| start + Duration::from_millis(100 * n));
            moments.filter(|now| counts.is_told(Tampering::RouteMissing, stands, *now)).count()
        };
        let (at_once, later) = (20, 129 / 6);
        assert_eq!((lines(&mut counts, false), lines(&mut counts, true)), (at_once + later, at_once + later));
        assert!(counts.is_told(Tampering::RuleMissing, false, start));
        let rested = start + Duration::from_secs(130 + 120);
        assert_eq!((0..30).filter(|_| counts.is_told(Tampering::RouteMissing, true, rested)).count(), 20);
    }

    #[test]
    fn what_stands_is_counted_once_until_it_goes_away() {
        let mut counts = TamperCounts::default();
        assert_eq!(counts.record(&[], &[Tampering::RuleForeign]), [Tampering::RuleForeign]);
        assert!(counts.record(&[], &[Tampering::RuleForeign]).is_empty());
        assert!(counts.record(&[Tampering::RouteMissing], &[]).is_empty());
        assert_eq!(counts.record(&[], &[Tampering::RuleForeign]), [Tampering::RuleForeign]);
        assert_eq!(counts.counts[&Tampering::RuleForeign], (2, 0));
        assert_eq!(counts.counts[&Tampering::RouteMissing], (1, 1));
    }
}
