//! Fragments: only the first one of a datagram has ports, the later ones follow it.
//!
//! A datagram is known from its first fragment to its last one, if they come in order; else until Linux gives it up.
//! Sans-IO. Source: RFC 791 §3.2, RFC 8200 §4.5 (what identifies a datagram).

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::Now;
use super::outbound::Route;
use crate::wire::packet::Packet;

/// Datagrams that are known at one time.
const DATAGRAMS: usize = 256;
/// Datagrams of one source from one peer: one bad sender cannot stop the others. Linux gives an IPv4 datagram up, too, when
/// so many fragments of its source came since its last one (`ipfrag_max_dist`).
const SHARE: usize = 64;
/// Linux reassembles for 60 s; IPv4 for 30 s.
const LIFE: Duration = Duration::from_secs(61);

/// Source, destination, protocol (IPv4 only), identification.
pub(super) type FragmentKey = (IpAddr, IpAddr, u8, u32);

#[derive(Debug)]
struct Datagram {
    until: Instant,
    route: Route,
    /// Bytes that came in order.
    seen: usize,
}

/// Where datagrams of one direction go. Those whose time is over make room for others, and count for nothing.
#[derive(Debug)]
pub(super) struct FragmentTable {
    datagrams: BTreeMap<FragmentKey, Datagram>,
}

impl FragmentTable {
    pub(super) fn new() -> Self {
        Self { datagrams: BTreeMap::new() }
    }

    /// `packet` is a first fragment, and goes by `route`. Of too many datagrams the oldest is forgotten: one of the same
    /// source and peer, where those have their share.
    pub(super) fn insert(&mut self, packet: &Packet, route: Route, now: Now) {
        let Some(key) = key(packet) else { return };
        self.datagrams.remove(&key);
        let is_alike = |(other, datagram): &(&FragmentKey, &Datagram)| {
            other.0 == key.0 && datagram.route.peer() == route.peer()
        };
        let has_share = self.datagrams.iter().filter(is_alike).count() >= SHARE;
        if has_share || self.datagrams.len() >= DATAGRAMS {
            let candidates = self.datagrams.iter().filter(|entry| !has_share || is_alike(entry));
            let oldest = candidates.min_by_key(|(_, datagram)| datagram.until).map(|(key, _)| *key);
            oldest.and_then(|key| self.datagrams.remove(&key));
        }
        let seen = packet.len - packet.transport;
        self.datagrams.insert(key, Datagram { until: now.instant + LIFE, route, seen });
    }

    /// The way of the datagram that `packet` is a fragment of.
    pub(super) fn get(&self, packet: &Packet, now: Now) -> Option<Route> {
        let datagram = self.datagrams.get(&key(packet)?)?;
        (datagram.until > now.instant).then_some(datagram.route)
    }

    /// `packet`, a later fragment, went by that way.
    pub(super) fn follow(&mut self, packet: &Packet) {
        let (Some(key), Some(fragment)) = (key(packet), packet.fragment) else { return };
        let Some(datagram) = self.datagrams.get_mut(&key) else { return };
        if datagram.seen == usize::from(fragment.offset) {
            datagram.seen += packet.len - packet.transport;
            if !fragment.more {
                self.datagrams.remove(&key);
            }
        }
    }

    /// Every datagram, its way and the end of its time, for a successor.
    pub(super) fn iter(&self) -> impl Iterator<Item = (FragmentKey, Route, Instant)> {
        self.datagrams.iter().map(|(key, datagram)| (*key, datagram.route, datagram.until))
    }

    /// Puts back what a former agent remembered for `remaining` from `then` on.
    pub(super) fn restore(&mut self, key: FragmentKey, then: Instant, remaining: Duration, route: Route) {
        if self.datagrams.len() < DATAGRAMS {
            let until = then + remaining.min(LIFE);
            self.datagrams.insert(key, Datagram { until, route, seen: 0 });
        }
    }
}

/// What the fragments of a datagram have in common; none where `packet` is whole.
pub(super) fn key(packet: &Packet) -> Option<FragmentKey> {
    let protocol = if packet.source.is_ipv4() { packet.protocol } else { 0 };
    packet.fragment.map(|f| (packet.source, packet.destination, protocol, f.id))
}
