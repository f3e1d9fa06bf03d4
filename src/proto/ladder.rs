//! The enforcement ladder: who is able to be spoken to through the tunnel, and what is captured because of it.
//!
//! In strict mode there is no [`Ladder`]: everything of the project is captured, always. Else, per peer and per VIP,
//! never per packet:
//!
//! 1. the directory names a peer: it is probed (3 handshakes, 1 s apart; again every 60 s, able or not)
//! 2. a completed handshake, whoever began it, makes it able; silence makes it unable until one completes again, or until
//!    data of it is opened
//! 3. a peer's address is captured while the peer is able; a VIP while it has ready endpoints and all of them are able
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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    /// Handshakes of the running probe so far.
    tries: u8,
    /// When the next one is due.
    due: Option<Instant>,
}

#[derive(Debug, Default)]
struct Service {
    ready: BTreeSet<IpAddr>,
    captured: bool,
}

/// The state in permissive and audit mode.
#[derive(Debug)]
pub struct Ladder {
    own: Vec<IpAddr>,
    peers: BTreeMap<IpAddr, Peer>,
    vips: BTreeMap<IpAddr, Service>,
    /// (endpoint, VIP).
    uses: BTreeSet<(IpAddr, IpAddr)>,
    due: BTreeSet<(Instant, IpAddr)>,
    /// Before this no other probe starts.
    next_start: Option<Instant>,
    probes: VecDeque<Probe>,
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
            uses: BTreeSet::new(),
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
        self.peers.insert(address, Peer { able: false, tries: 0, due: None });
        let start = self.next_start.map_or(now.instant, |at| at.max(now.instant));
        self.next_start = Some(start + PACE);
        self.schedule(address, Some(start));
        self.reconsider(address);
    }

    /// The directory no longer names the peer.
    pub fn remove_peer(&mut self, address: IpAddr) {
        self.schedule(address, None);
        if self.peers.remove(&address).is_some() {
            self.reconsider(address);
        }
    }

    /// The directory names or changes a VIP.
    pub fn set_vip(&mut self, vip: &Vip) {
        let endpoints = vip.ports.iter().flat_map(|port| &port.endpoints);
        let ready: BTreeSet<_> = endpoints.filter(|e| e.ready).map(|e| e.address).collect();
        let service = self.vips.entry(vip.address).or_default();
        let former = std::mem::replace(&mut service.ready, ready);
        for endpoint in former {
            self.uses.remove(&(endpoint, vip.address));
        }
        self.uses.extend(service.ready.iter().map(|endpoint| (*endpoint, vip.address)));
        self.reconsider_vip(vip.address);
    }

    /// The directory no longer names the VIP.
    pub fn remove_vip(&mut self, address: IpAddr) {
        let Some(service) = self.vips.remove(&address) else { return };
        for endpoint in service.ready {
            self.uses.remove(&(endpoint, address));
        }
        self.decide(address);
    }

    /// A handshake with the peer is complete, or data of it was opened.
    pub fn handle_able(&mut self, address: IpAddr, now: Now) {
        let Some(peer) = self.peers.get_mut(&address) else { return };
        peer.tries = 0;
        let news = !std::mem::replace(&mut peer.able, true);
        self.schedule(address, Some(now.instant + PROBE_INTERVAL));
        if news {
            self.reconsider(address);
        }
    }

    /// The peer did not answer a handshake.
    pub fn handle_silent(&mut self, address: IpAddr, now: Now) {
        let Some(peer) = self.peers.get_mut(&address).filter(|peer| peer.able) else { return };
        (peer.able, peer.tries) = (false, 0);
        self.schedule(address, Some(now.instant + PROBE_INTERVAL));
        self.reconsider(address);
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
            let news = std::mem::take(&mut peer.able);
            self.probes.push_back(Probe::Forget(address));
            self.schedule(address, Some(now.instant + PROBE_INTERVAL));
            if news {
                self.reconsider(address);
            }
        }
    }

    fn schedule(&mut self, address: IpAddr, due: Option<Instant>) {
        let Some(peer) = self.peers.get_mut(&address) else { return };
        if let Some(old) = std::mem::replace(&mut peer.due, due) {
            self.due.remove(&(old, address));
        }
        self.due.extend(due.map(|at| (at, address)));
    }

    /// The peer's own address, then every VIP that it stands behind.
    fn reconsider(&mut self, peer: IpAddr) {
        self.decide(peer);
        let behind = self.uses.range((peer, FIRST)..).take_while(|(endpoint, _)| *endpoint == peer);
        let vips: Vec<_> = behind.map(|(_, vip)| *vip).collect();
        vips.into_iter().for_each(|vip| self.reconsider_vip(vip));
    }

    fn reconsider_vip(&mut self, address: IpAddr) {
        let Some(service) = self.vips.get(&address) else { return };
        let able = |e: &IpAddr| self.own.contains(e) || self.peers.get(e).is_some_and(|peer| peer.able);
        let captured = !service.ready.is_empty() && service.ready.iter().all(able);
        if let Some(service) = self.vips.get_mut(&address) {
            service.captured = captured;
        }
        self.decide(address);
    }

    fn decide(&mut self, address: IpAddr) {
        self.decisions.push_back((address, self.is_captured(address)));
    }

    /// Whether an address of the directory is captured.
    #[must_use]
    pub fn is_captured(&self, address: IpAddr) -> bool {
        let (peer, vip) = (self.peers.get(&address), self.vips.get(&address));
        (peer.is_some() || vip.is_some())
            && peer.is_none_or(|peer| peer.able)
            && vip.is_none_or(|vip| vip.captured)
    }

    /// The next handshake to begin or to forget.
    pub fn poll_probe(&mut self) -> Option<Probe> {
        self.probes.pop_front()
    }

    /// The next address that was decided about, and whether it is captured. May say again what it said before.
    pub fn poll_decision(&mut self) -> Option<(IpAddr, bool)> {
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
        let standing = |vip: &Service| if vip.captured { Standing::Captured } else { Standing::Passed };
        peers.chain(self.vips.iter().map(move |(address, vip)| (*address, standing(vip))))
    }
}

/// Sorts before every other address.
const FIRST: IpAddr = IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED);

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
