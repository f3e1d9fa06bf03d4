//! The enforcement ladder: who is able to be spoken to through the tunnel, and what is captured because of it.
//!
//! In strict mode there is no [`Ladder`]: everything of the project is captured, always. Else, per peer and per VIP,
//! never per packet:
//!
//! 1. the directory names a peer: it is probed (3 handshakes, 1 s apart; again every 60 s, able or not)
//! 2. a completed handshake, whoever began it, makes it able; silence makes it unable until one completes again, or until
//!    data of it is opened
//! 3. a VIP is captured while it has ready endpoints and all of them are able, a peer's address while the peer is able. But
//!    whoever stands behind a VIP that is passed meets its clients in clear, from their own addresses, and answers them so:
//!    it is passed as well, and so is every other VIP that it stands behind
//! 4. `poll_decision` gives what changed to `proto::routing`; what is not captured is carried by the platform
//!
//! An able peer is asked again 60 s after its last handshake: two ends that cannot reach each other any more both find out,
//! also the one that has nothing to send and would refuse what the other one sends in clear. One handshake shows both
//! ends that they are able, so a pair has one a minute. Our own address counts as able.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::Now;
use super::directory::Vip;

/// Handshakes of one probe.
const TRIES: u8 = 3;
/// Between two of them, and from the last one until the peer counts as silent.
const TRY_INTERVAL: Duration = Duration::from_secs(1);
/// From the end of a probe, or from falling silent, to the next probe.
const PROBE_INTERVAL: Duration = Duration::from_secs(60);
/// Between the starts of two probes: a project of a thousand pods is asked within five seconds, not at once.
const PACE: Duration = Duration::from_millis(5);

/// How strictly the project's traffic is kept to the tunnel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Everything of the project is sealed or dropped.
    #[default]
    Strict,
    /// Sealed where both ends are able, else carried by the platform and counted.
    Permissive,
    /// As permissive, with a record of each flow that strict would drop.
    Audit,
}

/// What is to be done with the handshake of a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// Send an initiation.
    Try(IpAddr),
    /// Nobody answered: forget the initiation.
    Forget(IpAddr),
}

/// How a peer or a VIP stands, for status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Standing {
    /// A peer that completed a handshake: captured.
    Able,
    /// A peer that did not answer: passed.
    Unable,
    /// A peer that is being asked: passed.
    Probing,
    /// A VIP all of whose ready endpoints are able.
    Captured,
    /// A VIP with an unable endpoint, or without any ready one.
    Passed,
}

#[derive(Debug)]
struct Peer {
    able: bool,
    /// Since when it is, or is not.
    since: Instant,
    /// Handshakes of the running probe so far.
    tries: u8,
    /// When the next one is due.
    due: Option<Instant>,
    /// Whether it is captured; none: nobody decided yet.
    decided: Option<bool>,
}

impl Peer {
    /// Whether that is news.
    fn set_able(&mut self, able: bool, now: Now) -> bool {
        let news = self.able != able;
        if news {
            (self.able, self.since) = (able, now.instant);
        }
        news
    }
}

#[derive(Debug, Default)]
struct Service {
    ready: BTreeSet<IpAddr>,
    decided: Option<bool>,
}

/// The state in permissive and audit mode.
#[derive(Debug)]
pub struct Ladder {
    own: Vec<IpAddr>,
    peers: BTreeMap<IpAddr, Peer>,
    vips: BTreeMap<IpAddr, Service>,
    due: BTreeSet<(Instant, IpAddr)>,
    /// Before this no other probe starts.
    next_start: Option<Instant>,
    probes: VecDeque<Probe>,
    /// Something changed that decisions depend on.
    stale: bool,
    decisions: VecDeque<(IpAddr, bool)>,
}

impl Ladder {
    /// None in strict mode.
    #[must_use]
    pub fn new(mode: Mode, own: Vec<IpAddr>) -> Option<Self> {
        let ladder = Self {
            own,
            peers: BTreeMap::new(),
            vips: BTreeMap::new(),
            stale: false,
            due: BTreeSet::new(),
            next_start: None,
            probes: VecDeque::new(),
            decisions: VecDeque::new(),
        };
        match mode {
            Mode::Strict => None,
            Mode::Permissive | Mode::Audit => Some(ladder),
        }
    }

    /// The directory names a peer. One that is known already stands as it stood: new keys prove themselves by use.
    pub fn set_peer(&mut self, address: IpAddr, now: Now) {
        if self.peers.contains_key(&address) {
            return;
        }
        let peer = Peer { able: false, since: now.instant, tries: 0, due: None, decided: None };
        self.peers.insert(address, peer);
        let start = self.next_start.map_or(now.instant, |at| at.max(now.instant));
        self.next_start = Some(start + PACE);
        self.schedule(address, Some(start));
        self.stale = true;
    }

    /// The directory no longer names the peer.
    pub fn remove_peer(&mut self, address: IpAddr) {
        self.schedule(address, None);
        self.stale |= self.peers.remove(&address).is_some();
    }

    /// The directory names or changes a VIP.
    pub fn set_vip(&mut self, vip: &Vip) {
        let endpoints = vip.ports.iter().flat_map(|port| &port.endpoints);
        let ready: BTreeSet<_> = endpoints.filter(|e| e.ready).map(|e| e.address).collect();
        self.vips.entry(vip.address).or_default().ready = ready;
        self.stale = true;
    }

    /// The directory no longer names the VIP.
    pub fn remove_vip(&mut self, address: IpAddr) {
        self.stale |= self.vips.remove(&address).is_some();
    }

    /// A handshake with the peer is complete, or data of it was opened.
    pub fn handle_able(&mut self, address: IpAddr, now: Now) {
        let Some(peer) = self.peers.get_mut(&address) else { return };
        peer.tries = 0;
        let news = peer.set_able(true, now);
        self.schedule(address, Some(now.instant + PROBE_INTERVAL));
        self.stale |= news;
    }

    /// The peer did not answer a handshake.
    pub fn handle_silent(&mut self, address: IpAddr, now: Now) {
        let Some(peer) = self.peers.get_mut(&address).filter(|peer| peer.able) else { return };
        peer.tries = 0;
        peer.set_able(false, now);
        self.schedule(address, Some(now.instant + PROBE_INTERVAL));
        self.stale = true;
    }

    /// Goes on with the probes that are due.
    pub fn handle_timeout(&mut self, now: Now) {
        while let Some(&(at, address)) = self.due.first()
            && at <= now.instant
        {
            let Some(peer) = self.peers.get_mut(&address) else {
                self.due.pop_first();
                continue;
            };
            if peer.tries < TRIES {
                peer.tries += 1;
                self.probes.push_back(Probe::Try(address));
                self.schedule(address, Some(now.instant + TRY_INTERVAL));
                continue;
            }
            peer.tries = 0;
            let news = peer.set_able(false, now);
            self.probes.push_back(Probe::Forget(address));
            self.schedule(address, Some(now.instant + PROBE_INTERVAL));
            self.stale |= news;
        }
    }

    fn schedule(&mut self, address: IpAddr, due: Option<Instant>) {
        let Some(peer) = self.peers.get_mut(&address) else { return };
        if let Some(old) = std::mem::replace(&mut peer.due, due) {
            self.due.remove(&(old, address));
        }
        self.due.extend(due.map(|at| (at, address)));
    }

    /// Decides about every address together. A VIP is captured while it has ready endpoints, all of them able, and none of
    /// them behind a VIP that is passed; a peer while it is able and behind no such VIP. Nothing is captured while we are
    /// behind one ourselves: its clients come in clear, from the addresses of peers.
    fn decide(&mut self) {
        if !std::mem::take(&mut self.stale) {
            return;
        }
        let able = |e: &IpAddr| self.own.contains(e) || self.peers.get(e).is_some_and(|peer| peer.able);
        let ready = self.vips.iter().filter(|(_, vip)| !vip.ready.is_empty() && vip.ready.iter().all(able));
        let mut captured: BTreeSet<IpAddr> = ready.map(|(address, _)| *address).collect();
        let mut in_clear = BTreeSet::new();
        loop {
            let passed = self.vips.iter().filter(|(address, _)| !captured.contains(address));
            in_clear.extend(passed.flat_map(|(_, vip)| &vip.ready).copied());
            let before = captured.len();
            captured.retain(|address| self.vips[address].ready.is_disjoint(&in_clear));
            if captured.len() == before {
                break;
            }
        }
        let none = self.own.iter().any(|own| in_clear.contains(own));
        let is_able = |address: &IpAddr, peer: &Peer| !none && peer.able && !in_clear.contains(address);
        // An address may be both, and then both have to agree.
        for (address, vip) in &mut self.vips {
            let peer = self.peers.get(address);
            let now = !none && captured.contains(address) && peer.is_none_or(|peer| is_able(address, peer));
            if vip.decided.replace(now) != Some(now) {
                self.decisions.push_back((*address, now));
            }
        }
        for (address, peer) in &mut self.peers {
            let now =
                is_able(address, peer) && (captured.contains(address) || !self.vips.contains_key(address));
            if peer.decided.replace(now) != Some(now) {
                self.decisions.push_back((*address, now));
            }
        }
    }

    /// The next handshake to begin or to forget.
    pub fn poll_probe(&mut self) -> Option<Probe> {
        self.probes.pop_front()
    }

    /// The next address that was decided about, and whether it is captured. May say again what it said before.
    pub fn poll_decision(&mut self) -> Option<(IpAddr, bool)> {
        self.decide();
        self.decisions.pop_front()
    }

    /// When `handle_timeout` has work.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.due.first().map(|(at, _)| *at)
    }

    /// How every peer, then every VIP stands.
    pub fn standings(&self) -> impl Iterator<Item = (IpAddr, Standing)> + '_ {
        let peers = self.peers.iter().map(|(address, peer)| {
            let standing = match peer {
                Peer { able: true, .. } => Standing::Able,
                Peer { tries: 0, .. } => Standing::Unable,
                Peer { .. } => Standing::Probing,
            };
            (*address, standing)
        });
        let vips = self.vips.iter().map(|(address, vip)| match vip.decided {
            Some(true) => (*address, Standing::Captured),
            Some(false) | None => (*address, Standing::Passed),
        });
        peers.chain(vips)
    }

    /// Whether the address is captured: an able peer is not while a VIP that it stands behind is passed.
    #[must_use]
    pub fn captures(&self, address: &IpAddr) -> bool {
        let decided = match self.vips.get(address) {
            Some(vip) => vip.decided,
            None => self.peers.get(address).and_then(|peer| peer.decided),
        };
        decided == Some(true)
    }

    /// How long a peer has been able, or has not been.
    #[must_use]
    pub fn lasts(&self, address: IpAddr, now: Now) -> Option<Duration> {
        Some(now.instant.saturating_duration_since(self.peers.get(&address)?.since))
    }
}

impl Standing {
    /// The word used in status and docs.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Able => "able",
            Self::Unable => "unable",
            Self::Probing => "probing",
            Self::Captured => "captured",
            Self::Passed => "passed",
        }
    }
}
