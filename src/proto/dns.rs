//! DNS path: a query from the pod is forwarded as it is, its answer is held until what it names is protected.
//!
//! 1. `handle_query`: the query's bytes, under a random id, for the very resolver that the application asked
//! 2. `handle_answer`: only the answer to that question counts; a copy is parsed
//! 3. addresses inside the project's zone go to `proto::routing`; the answer is held
//! 4. other addresses of the answer that are within the ranges and unknown are asked about (`proto::outside`). The answer
//!    waits for that for at most 50 ms; then it is released, and the guard still drops packets to the address
//! 5. `released_udp`: once each address of step 3 has its guard element and its route, the answer goes out, byte for byte
//!
//! What an answer may do is limited, because answers can be forged. Where the ranges are known, a name of the zone never
//! leads out of them, unless the directory names the address, or says that the Service leads out of the project. An answer
//! teaches at most 64 addresses that the directory does not name; an answer with more is refused. So a forged answer makes
//! at most 64 addresses unreachable, and `proto::routing` bounds their total number and for how long.
//!
//! Over TCP the bytes pass through the agent's own streams; messages are held in the same list and keep their order.
//! Sans-IO. Source: RFC 1035 §4.2, RFC 5452 (matching answers).

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use hickory_proto::rr::Name;
use rand::Rng;

use super::Now;
use super::directory::Directory;
use super::drop::DropReason;
use super::outside::Asks;
use super::ranges::Ranges;
use super::routing::Routing;
use crate::wire::dns;

/// UDP queries in flight.
const MAX_QUERIES: usize = 512;
/// Answers waiting for routes.
const MAX_HELD: usize = 512;
/// An application has asked again long before.
const QUERY_LIFE: Duration = Duration::from_secs(12);
/// A route that takes longer is not coming.
const HELD_LIFE: Duration = Duration::from_secs(5);
/// How long an answer waits to hear who an address belongs to.
const ASK_PATIENCE: Duration = Duration::from_millis(50);
/// Addresses that one answer teaches beside those of the directory.
const LEARNED_AT_ONCE: usize = 64;
/// Queries, and answers, that are given up per call: each may cost the driver a socket.
const EXPIRED: usize = 32;

/// A forwarded UDP query.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QueryId(u64);

/// One TCP connection of the pod to a resolver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(pub u64);

/// A query for the upstream, to be sent from a socket of its own.
#[derive(Debug)]
pub struct Forward {
    /// To be given back with the answer.
    pub query: QueryId,
    /// The resolver that the application asked.
    pub upstream: SocketAddr,
    /// The query under its new id.
    pub bytes: Vec<u8>,
    /// The resolver is one of the project's: the query is sent as any packet of the pod, so that it is captured and sealed.
    pub sealed: bool,
}

/// Where a released answer goes.
#[derive(Clone, Copy)]
enum Asker {
    Udp { client: SocketAddr, resolver: SocketAddr },
    Stream(StreamId),
}

struct Pending {
    client: SocketAddr,
    resolver: SocketAddr,
    original_id: u16,
    bytes: Vec<u8>,
    deadline: Instant,
}

struct Held {
    asker: Asker,
    bytes: Vec<u8>,
    /// Addresses that are to be protected.
    waits_for: Vec<IpAddr>,
    /// Addresses that are asked about, until `asked_until`.
    asks: Vec<IpAddr>,
    asked_until: Instant,
    deadline: Instant,
}

/// What an answer is judged by.
pub(super) struct Known<'a> {
    pub(super) directory: &'a Directory,
    pub(super) routing: &'a mut Routing,
    pub(super) asks: &'a mut Asks,
}

/// The state of the DNS path.
pub struct Dns {
    zone: Option<Name>,
    ranges: Ranges,
    resolvers: Vec<IpAddr>,
    own: Vec<IpAddr>,
    gate: bool,
    pending: BTreeMap<QueryId, Pending>,
    next: u64,
    held: VecDeque<Held>,
    /// A held answer over UDP, or one over TCP, may be ready.
    may_release: (bool, bool),
    expired: Vec<QueryId>,
    broken: Vec<StreamId>,
}

impl Dns {
    /// `gate` is true but in the test build that proves what the gate is for.
    #[must_use]
    pub fn new(
        zone: Option<Name>,
        ranges: Ranges,
        resolvers: Vec<IpAddr>,
        own: Vec<IpAddr>,
        gate: bool,
    ) -> Self {
        Self {
            zone,
            ranges,
            resolvers,
            own,
            gate,
            pending: BTreeMap::new(),
            next: 0,
            held: VecDeque::new(),
            may_release: (false, false),
            expired: Vec::new(),
            broken: Vec::new(),
        }
    }

    /// Whether DNS to this address is captured.
    #[must_use]
    pub fn is_resolver(&self, address: IpAddr) -> bool {
        self.resolvers.contains(&address)
    }

    /// Whether no query waits for its answer, and no answer for its route.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.pending.is_empty() && self.held.is_empty()
    }

    /// Forwards a query that the pod sent over UDP.
    ///
    /// # Errors
    /// `DnsMalformed` for less than a header or a response, `DnsOverload` where too many are in flight.
    pub fn handle_query(
        &mut self,
        client: SocketAddr,
        resolver: SocketAddr,
        query: &[u8],
        rng: &mut impl Rng,
        now: Now,
    ) -> Result<Forward, DropReason> {
        if query.len() < dns::HEADER_LEN || dns::is_response(query) {
            return Err(DropReason::DnsMalformed);
        }
        if self.pending.len() >= MAX_QUERIES {
            return Err(DropReason::DnsOverload);
        }
        let original_id = dns::id(query).ok_or(DropReason::DnsMalformed)?;
        let mut bytes = query.to_vec();
        let mut id = [0; 2];
        rng.fill_bytes(&mut id);
        dns::set_id(&mut bytes, u16::from_be_bytes(id));
        let query = QueryId(self.next);
        self.next += 1;
        let deadline = now.instant + QUERY_LIFE;
        self.pending.insert(query, Pending { client, resolver, original_id, bytes: bytes.clone(), deadline });
        Ok(Forward { query, upstream: resolver, bytes, sealed: false })
    }

    /// An answer came on the socket of `query`.
    ///
    /// # Errors
    /// `DnsMalformed` where it is not the answer to the query (a forgery, or late): go on listening. `DnsUnparsed`,
    /// `DnsContradicted` and `DnsOverload` where it is, but may not be released: the socket is done with.
    pub(super) fn handle_answer(
        &mut self,
        query: QueryId,
        mut answer: Vec<u8>,
        known: Known<'_>,
        now: Now,
    ) -> Result<(), DropReason> {
        let pending = self.pending.get(&query).ok_or(DropReason::DnsMalformed)?;
        if dns::id(&answer) != dns::id(&pending.bytes) || !dns::answers(&answer, &pending.bytes) {
            return Err(DropReason::DnsMalformed);
        }
        let asker = Asker::Udp { client: pending.client, resolver: pending.resolver };
        dns::set_id(&mut answer, pending.original_id);
        self.pending.remove(&query);
        self.hold(asker, answer, known, now)
    }

    /// Answers that wait for their routes.
    #[must_use]
    pub fn held(&self) -> u64 {
        self.held.len() as u64
    }

    /// Whether `query` still waits for its answer.
    #[must_use]
    pub fn is_pending(&self, query: QueryId) -> bool {
        self.pending.contains_key(&query)
    }

    /// The upstream refused the query (ICMP port unreachable). Returns who asked, and the query as it was asked.
    pub fn handle_refused(&mut self, query: QueryId) -> Option<(SocketAddr, SocketAddr, Vec<u8>)> {
        let mut pending = self.pending.remove(&query)?;
        dns::set_id(&mut pending.bytes, pending.original_id);
        Some((pending.client, pending.resolver, pending.bytes))
    }

    /// A message came from the upstream of a TCP connection.
    ///
    /// # Errors
    /// `DnsUnparsed`, `DnsContradicted`, `DnsOverload`: it may not be released; the connection has to be closed.
    pub(super) fn handle_stream_answer(
        &mut self,
        stream: StreamId,
        answer: Vec<u8>,
        known: Known<'_>,
        now: Now,
    ) -> Result<(), DropReason> {
        self.hold(Asker::Stream(stream), answer, known, now)
    }

    fn hold(&mut self, asker: Asker, bytes: Vec<u8>, known: Known<'_>, now: Now) -> Result<(), DropReason> {
        let zone = self.zone.as_ref();
        let lesson = match dns::lesson(&bytes, zone) {
            Ok(lesson) => lesson,
            Err(unparsed) if unparsed.in_zone => return Err(DropReason::DnsUnparsed),
            Err(_) => dns::Lesson::default(),
        };
        zone.map_or(Ok(()), |zone| self.judge(&lesson, zone, known.directory))?;
        let waits_for = self.learn(&lesson, known.directory, known.routing, now)?;
        if self.held.len() >= MAX_HELD {
            return Err(DropReason::DnsOverload);
        }
        let asks = self.ask(&lesson, known, now);
        let (deadline, asked_until) = (now.instant + HELD_LIFE, now.instant + ASK_PATIENCE);
        self.held.push_back(Held { asker, bytes, waits_for, asks, asked_until, deadline });
        self.recheck();
        Ok(())
    }

    /// Whoever forges answers could lead an application out of the project, where nothing is sealed: only a Service that the
    /// directory knows to be elsewhere may lead there.
    fn judge(&self, lesson: &dns::Lesson, zone: &Name, directory: &Directory) -> Result<(), DropReason> {
        let leads_out = |owner: &Name| {
            let inside = usize::from(owner.num_labels()).checked_sub(usize::from(zone.num_labels()) + 1);
            let service =
                inside.and_then(|at| owner.iter().nth(at)).and_then(|label| str::from_utf8(label).ok());
            service.is_some_and(|service| directory.is_external(service))
        };
        let stays = |address: IpAddr| {
            self.own.contains(&address)
                || (self.is_learnable(address, directory) && self.is_within(address, directory))
        };
        let addresses = lesson.owned.iter().all(|(owner, address)| stays(*address) || leads_out(owner));
        let names = lesson
            .targets
            .iter()
            .all(|(owner, target)| leads_out(owner) || (zone.zone_of(target) && !leads_out(target)));
        // Resolvers in applications differ in what they take for the answer: whatever stands there counts.
        let loose = lesson.loose.iter().all(|address| stays(*address));
        if addresses && names && loose { Ok(()) } else { Err(DropReason::DnsContradicted) }
    }

    fn learn(
        &self,
        lesson: &dns::Lesson,
        directory: &Directory,
        routing: &mut Routing,
        now: Now,
    ) -> Result<Vec<IpAddr>, DropReason> {
        let learned = lesson.addresses.iter().filter(|(address, _)| {
            self.is_learnable(**address, directory) && self.is_within(**address, directory)
        });
        let learned: Vec<_> = learned.map(|(address, ttl)| (*address, *ttl)).collect();
        let new = learned.iter().filter(|(address, _)| !is_named(*address, directory)).count();
        if new > LEARNED_AT_ONCE {
            return Err(DropReason::DnsOverload);
        }
        for (address, ttl) in &learned {
            let ttl = Duration::from_secs(u64::from(*ttl));
            routing.add_from_dns(*address, ttl, now).map_err(|_| DropReason::DnsOverload)?;
        }
        Ok(learned.into_iter().map(|(address, _)| address).collect())
    }

    /// Asks about unknown addresses. Returns those that the answer has to wait for.
    fn ask(&self, lesson: &dns::Lesson, known: Known<'_>, now: Now) -> Vec<IpAddr> {
        let Known { routing, asks, .. } = known;
        let all: BTreeSet<IpAddr> = lesson.outside.iter().chain(lesson.addresses.keys()).copied().collect();
        let mut waits_for = Vec::new();
        for address in all {
            if !asks.concerns(address) || self.own.contains(&address) || routing.is_named(address) {
                continue;
            }
            if routing.admissions().contains(address) {
                routing.touch_admission(address, now);
            } else {
                asks.ask(address, now);
            }
            if !is_cleared(address, routing, asks) {
                waits_for.push(address);
            }
        }
        waits_for
    }

    /// Never learned: what cannot be a workload or VIP of the project, whatever DNS says.
    fn is_learnable(&self, address: IpAddr, directory: &Directory) -> bool {
        super::is_unicast(address)
            && !self.own.contains(&address)
            && !directory.is_exempt(address)
            && (is_named(address, directory) || !self.is_resolver(address))
    }

    /// Whether the address can be the project's: it is within the ranges, as far as these are known, or named.
    fn is_within(&self, address: IpAddr, directory: &Directory) -> bool {
        self.ranges.is_empty() || self.ranges.contains(address) || is_named(address, directory)
    }

    /// A batch was applied: what is held may be ready.
    pub fn recheck(&mut self) {
        self.may_release = (true, true);
    }

    /// The next answer over UDP whose addresses are all protected.
    pub(super) fn released_udp(
        &mut self,
        routing: &Routing,
        asks: &Asks,
    ) -> Option<(SocketAddr, SocketAddr, Vec<u8>)> {
        if !self.may_release.0 {
            return None;
        }
        let ready =
            |held: &Held| matches!(held.asker, Asker::Udp { .. }) && self.is_ready(held, routing, asks);
        let at = self.held.iter().position(ready);
        self.may_release.0 = at.is_some();
        let at = at?;
        let held = self.held.remove(at)?;
        let Asker::Udp { client, resolver } = held.asker else { return None };
        Some((client, resolver, held.bytes))
    }

    /// The next answer over TCP whose addresses are all protected; those of one connection keep their order.
    pub(super) fn released_stream(&mut self, routing: &Routing, asks: &Asks) -> Option<(StreamId, Vec<u8>)> {
        if !self.may_release.1 {
            return None;
        }
        let mut blocked = Vec::new();
        let at = self.held.iter().position(|held| {
            let Asker::Stream(stream) = held.asker else { return false };
            let ready = !blocked.contains(&stream) && self.is_ready(held, routing, asks);
            if !ready {
                blocked.push(stream);
            }
            ready
        });
        self.may_release.1 = at.is_some();
        let at = at?;
        let held = self.held.remove(at)?;
        let Asker::Stream(stream) = held.asker else { return None };
        Some((stream, held.bytes))
    }

    fn is_ready(&self, held: &Held, routing: &Routing, asks: &Asks) -> bool {
        let is_protected = |address: &IpAddr| routing.is_active(*address);
        !self.gate
            || held.waits_for.iter().all(is_protected)
                && held.asks.iter().all(|address| is_cleared(*address, routing, asks))
    }

    /// Forgets queries and held answers whose time is over, a bounded number per call; returns how many of each. Both stand in
    /// the order of time.
    pub fn handle_timeout(&mut self, routing: &Routing, now: Now) -> (u64, u64) {
        let (mut queries, mut answers) = (0, 0);
        self.stop_asking(routing, now);
        for _ in 0..EXPIRED {
            let Some(query) = self.pending.first_entry().filter(|query| query.get().deadline <= now.instant)
            else {
                break;
            };
            self.expired.push(query.remove_entry().0);
            queries += 1;
        }
        for _ in 0..EXPIRED {
            let Some(held) = self.held.pop_front_if(|held| held.deadline <= now.instant) else { break };
            if let Asker::Stream(stream) = held.asker {
                self.broken.push(stream);
            }
            answers += 1;
        }
        (queries, answers)
    }

    /// Ends the wait for asks after [`ASK_PATIENCE`]. An address that became protected meanwhile is waited for as usual.
    fn stop_asking(&mut self, routing: &Routing, now: Now) {
        for held in &mut self.held {
            if !held.asks.is_empty() && held.asked_until <= now.instant {
                let asked = std::mem::take(&mut held.asks);
                held.waits_for.extend(asked.into_iter().filter(|address| routing.is_named(*address)));
                self.may_release = (true, true);
            }
        }
    }

    /// The next query whose socket is to be closed because nobody answered it.
    pub fn poll_expired(&mut self) -> Option<QueryId> {
        self.expired.pop()
    }

    /// The next TCP connection that is to be closed because one of its answers was forgotten.
    pub fn poll_broken(&mut self) -> Option<StreamId> {
        self.broken.pop()
    }

    /// When `handle_timeout` has work.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        // Both grow in order of time.
        let query = self.pending.first_key_value().map(|(_, pending)| pending.deadline);
        let held = self.held.front().map(|held| held.deadline);
        let asked = self.held.iter().find(|held| !held.asks.is_empty()).map(|held| held.asked_until);
        query.into_iter().chain(held).chain(asked).min()
    }
}

fn is_named(address: IpAddr, directory: &Directory) -> bool {
    directory.is_workload(address) || directory.vip(address).is_some()
}

/// Whether an answer need not wait for this address, which was asked about: the guard knows it, or no answer about it is due.
fn is_cleared(address: IpAddr, routing: &Routing, asks: &Asks) -> bool {
    if routing.is_named(address) {
        return routing.is_active(address);
    }
    !asks.is_asking(address) && !routing.is_admission_pending(address)
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng as _;
    use rand_chacha::ChaCha20Rng;

    use super::*;

    /// NodeLocal DNSCache.
    #[test]
    fn a_resolver_at_link_scope_is_asked_and_its_answers_are_released() {
        let now = Now { instant: crate::proto::test_start(), wall: Duration::from_secs(1_700_000_000) };
        let resolver: SocketAddr = "169.254.20.10:53".parse().unwrap();
        let client: SocketAddr = "10.1.1.1:5353".parse().unwrap();
        let own = vec![client.ip()];
        let zone = "shop.svc.cluster.local.".parse().ok();
        let mut dns = Dns::new(zone, Ranges::default(), vec![resolver.ip()], own.clone(), true);
        assert!(dns.is_resolver(resolver.ip()));
        let mut query = vec![0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, b'a', 0, 0, 1, 0, 1];
        let mut rng = ChaCha20Rng::from_seed([1; 32]);
        let forward = dns.handle_query(client, resolver, &query, &mut rng, now).unwrap();
        assert_eq!(forward.upstream, resolver);
        let mut answer = forward.bytes.clone();
        answer[2] |= 0x80;
        let (directory, mut routing) = (Directory::new(own), Routing::new(false));
        let mut asks = Asks::default();
        let known = Known { directory: &directory, routing: &mut routing, asks: &mut asks };
        dns.handle_answer(forward.query, answer, known, now).unwrap();
        query[2] |= 0x80;
        assert_eq!(dns.released_udp(&routing, &asks), Some((client, resolver, query)));
    }
}
