//! The journal: what has to outlive an agent that ends without notice, as small records of fixed size.
//!
//! 1. flows, live peers and the transport note what changed; packets of a steady flow change nothing
//! 2. `Engine::poll_record` gives the changes out; the driver writes them before it sends or injects what caused them
//! 3. a successor reads what was written and is told by `Engine::restore` before it reads its first packet
//!
//! Without its flow entry a server's answer would leave without the VIP as its source, and a client's next packet could
//! go to another endpoint: either ends the connection. Sessions are not written: keys never touch a file, and a live peer
//! is met with a new handshake instead.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::account::Counters;
use super::drop::DropReason;
use super::is_unicast;
use super::nat::{Kind, SEEN_ALL, Tuple};

/// Bytes of an encoded [`FlowRecord`].
pub const FLOW_RECORD_LEN: usize = 76;
/// Live peers that are remembered; the others are met again by their traffic.
pub const MAX_LIVE_PEERS: usize = 4096;

/// A flow without its times.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowRecord {
    /// The key.
    pub tuple: Tuple,
    /// The workload that owns the other side.
    pub peer: IpAddr,
    /// What is done to its packets.
    pub kind: Kind,
    /// Directions and TCP flags seen, as bits.
    pub seen: u8,
}

/// What changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record {
    /// The slot of the flow table holds this now.
    Flow {
        /// Less than [`super::nat::MAX_FLOWS`].
        slot: u32,
        /// The flow, if there is one.
        flow: Option<FlowRecord>,
    },
    /// The slot of the list of live peers holds this now.
    Peer {
        /// Less than [`MAX_LIVE_PEERS`].
        slot: u32,
        /// The peer, if there is one.
        address: Option<IpAddr>,
    },
    /// The greatest handshake time stamp sent, since the Unix epoch.
    Stamp(Duration),
}

/// What a former agent left.
#[derive(Clone, Debug, Default)]
pub struct Restored {
    /// Slot and flow. Of two that contradict one another the earlier counts: newest first.
    pub flows: Vec<(u32, FlowRecord)>,
    /// Slot and address of each live peer.
    pub peers: Vec<(u32, IpAddr)>,
    /// The greatest handshake time stamp sent.
    pub stamp: Option<Duration>,
    /// The former agent's counts.
    pub counters: Counters,
    /// For [`super::Config::balance_seed`].
    pub balance_seed: [u8; 16],
    /// Slots that could not be read.
    pub skipped: u64,
}

impl FlowRecord {
    /// The record as bytes of a fixed layout.
    #[must_use]
    pub fn encode(&self) -> [u8; FLOW_RECORD_LEN] {
        let mut out = [0; FLOW_RECORD_LEN];
        out[0] = self.tuple.protocol;
        out[1] = family(self.peer);
        out[2..18].copy_from_slice(&address_bytes(self.tuple.local.0));
        out[18..20].copy_from_slice(&self.tuple.local.1.to_be_bytes());
        out[20..36].copy_from_slice(&address_bytes(self.tuple.remote.0));
        out[36..38].copy_from_slice(&self.tuple.remote.1.to_be_bytes());
        out[38..54].copy_from_slice(&address_bytes(self.peer));
        let (kind, service, ports) = match self.kind {
            Kind::Direct => (0, None, (0, 0)),
            Kind::Client => (1, None, (0, 0)),
            Kind::Server { service, client_port } => (2, Some(service.0), (service.1, client_port)),
            Kind::HairpinOut { target, alias } => (3, None, (target, alias)),
            Kind::HairpinBack { service_port, client_port } => (4, None, (service_port, client_port)),
        };
        out[54] = kind;
        out[55..71].copy_from_slice(&service.map_or([0; 16], address_bytes));
        out[71..73].copy_from_slice(&ports.0.to_be_bytes());
        out[73..75].copy_from_slice(&ports.1.to_be_bytes());
        out[75] = self.seen;
        out
    }

    /// The record in `bytes`; `None` where no flow of this program can look like it.
    #[must_use]
    pub fn decode(bytes: &[u8; FLOW_RECORD_LEN]) -> Option<Self> {
        let address = |at: usize| decode_address(bytes[1], bytes[at..].first_chunk()?);
        let port = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        let kind = match bytes[54] {
            0 => Kind::Direct,
            1 => Kind::Client,
            2 => Kind::Server { service: (address(55)?, port(71)), client_port: port(73) },
            3 => Kind::HairpinOut { target: port(71), alias: port(73) },
            4 => Kind::HairpinBack { service_port: port(71), client_port: port(73) },
            _ => return None,
        };
        let tuple =
            Tuple { protocol: bytes[0], local: (address(2)?, port(18)), remote: (address(20)?, port(36)) };
        Some(Self { tuple, peer: address(38)?, kind, seen: bytes[75] }).filter(Self::is_valid)
    }

    /// Whether the flow table could have made it: what the injection rule relies on holds.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        let Self { tuple: Tuple { local, remote, .. }, peer, kind, seen } = *self;
        let belongs = |address: IpAddr| is_unicast(address) && address.is_ipv4() == peer.is_ipv4();
        let pinned = match kind {
            Kind::Direct => peer == remote.0,
            Kind::Client => true,
            Kind::Server { service, .. } => peer == remote.0 && belongs(service.0),
            Kind::HairpinOut { .. } | Kind::HairpinBack { .. } => peer == local.0,
        };
        pinned && [local.0, remote.0, peer].into_iter().all(belongs) && seen & !SEEN_ALL == 0
    }
}

/// 4 or 6.
#[must_use]
pub fn family(address: IpAddr) -> u8 {
    if address.is_ipv4() { 4 } else { 6 }
}

/// An address in 16 bytes; those that IPv4 does not need are zero.
#[must_use]
pub fn address_bytes(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => {
            let mut out = [0; 16];
            out[..4].copy_from_slice(&v4.octets());
            out
        }
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// The counterpart of [`family`] and [`address_bytes`].
#[must_use]
pub fn decode_address(family: u8, bytes: &[u8; 16]) -> Option<IpAddr> {
    match family {
        4 => {
            let (address, rest) = bytes.split_first_chunk::<4>()?;
            rest.iter().all(|byte| *byte == 0).then(|| Ipv4Addr::from(*address).into())
        }
        6 => Some(Ipv6Addr::from(*bytes).into()),
        _ => None,
    }
}

/// Every count by its word: counts keep their meaning where a later version has other reasons, or another order.
#[must_use]
pub fn counts(counters: &Counters) -> Vec<(String, u64)> {
    let mut counters = counters.clone();
    let mut counts = counters.totals_mut().map(|(word, total)| (word.to_owned(), *total)).to_vec();
    for (prefix, drops) in counters.drops_mut() {
        counts.extend(drops.iter().map(|(reason, n)| (format!("{prefix}{}", reason.as_str()), n)));
    }
    counts
}

/// Adds what [`counts`] gave; words that this version does not know are left out.
pub fn add_count(counters: &mut Counters, word: &str, n: u64) {
    // Far above what can be counted, and far below an overflow.
    let n = n.min(1 << 50);
    if let Some((_, total)) = counters.totals_mut().into_iter().find(|(name, _)| *name == word) {
        *total += n;
        return;
    }
    for (prefix, drops) in counters.drops_mut() {
        let reason = word.strip_prefix(prefix);
        let reason = DropReason::ALL.into_iter().find(|known| reason == Some(known.as_str()));
        reason.into_iter().for_each(|reason| drops.add(reason, n));
    }
}

/// Peers with a session, each in a slot of its own.
#[derive(Debug, Default)]
pub(super) struct LivePeers {
    slots: Vec<Option<IpAddr>>,
    by_address: BTreeMap<IpAddr, usize>,
    /// Left by a former agent and not named by the directory yet.
    wanted: BTreeSet<IpAddr>,
    changed: BTreeSet<usize>,
}

impl LivePeers {
    /// `address` has a session.
    pub(super) fn insert(&mut self, address: IpAddr) {
        if self.by_address.contains_key(&address) {
            return;
        }
        if self.by_address.len() >= MAX_LIVE_PEERS {
            // One that the directory may never name again makes room.
            let Some(unnamed) = self.wanted.pop_first() else { return };
            self.remove(unnamed);
        }
        let slot = self.slots.iter().position(Option::is_none).unwrap_or(self.slots.len());
        self.put(slot, address);
        self.changed.insert(slot);
    }

    fn put(&mut self, slot: usize, address: IpAddr) {
        if self.slots.len() <= slot {
            self.slots.resize(slot + 1, None);
        }
        self.slots[slot] = Some(address);
        self.by_address.insert(address, slot);
    }

    /// `address` has no session any more.
    pub(super) fn remove(&mut self, address: IpAddr) {
        self.wanted.remove(&address);
        if let Some(slot) = self.by_address.remove(&address) {
            self.slots[slot] = None;
            self.changed.insert(slot);
        }
    }

    /// A former agent had a session with `address`.
    pub(super) fn restore(&mut self, slot: u32, address: IpAddr) {
        let slot = slot as usize;
        if slot >= MAX_LIVE_PEERS {
            return;
        }
        let taken = self.slots.get(slot).is_some_and(Option::is_some);
        if taken || self.by_address.contains_key(&address) || !is_unicast(address) {
            self.changed.insert(slot);
            return;
        }
        self.put(slot, address);
        self.wanted.insert(address);
    }

    /// Whether a session with `address`, which the directory just named, is to be made without waiting for traffic.
    pub(super) fn take_wanted(&mut self, address: IpAddr) -> bool {
        self.wanted.remove(&address)
    }

    /// Every live peer with its slot.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, IpAddr)> {
        (0..).zip(&self.slots).filter_map(|(slot, address)| Some((slot, (*address)?)))
    }

    /// The journal has to be told of all of them again.
    pub(super) fn note_all(&mut self) {
        self.changed.extend(self.by_address.values());
    }

    pub(super) fn poll(&mut self) -> Option<(u32, Option<IpAddr>)> {
        let slot = self.changed.pop_first()?;
        let address = self.slots.get(slot).copied().flatten();
        Some((u32::try_from(slot).expect("MAX_LIVE_PEERS fits u32"), address))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn records() -> Vec<FlowRecord> {
        let kinds = |vip, peer, local| {
            [
                (Kind::Direct, peer, peer),
                (Kind::Client, vip, peer),
                (Kind::Server { service: (vip, 80), client_port: 4000 }, peer, peer),
                (Kind::HairpinOut { target: 8080, alias: 9 }, vip, local),
                (Kind::HairpinBack { service_port: 80, client_port: 7 }, vip, local),
            ]
            .map(|(kind, remote, peer)| FlowRecord {
                tuple: Tuple { protocol: 6, local: (local, 8080), remote: (remote, 4001) },
                peer,
                kind,
                seen: 3,
            })
        };
        let mut all = kinds(ip("10.96.0.1"), ip("10.1.1.2"), ip("10.1.1.1")).to_vec();
        all.extend(kinds(ip("fd00:96::1"), ip("fd00::2"), ip("fd00::1")));
        all
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        for record in records() {
            assert_eq!(FlowRecord::decode(&record.encode()), Some(record));
        }
    }

    #[test]
    fn a_record_that_no_flow_can_have_is_refused() {
        let [good, server] = [records()[0], records()[2]];
        let mut bad = [good; 5];
        bad[0].peer = ip("10.1.1.9");
        bad[1].tuple.local.0 = ip("127.0.0.1");
        bad[2].tuple.local.0 = ip("fd00::1");
        bad[3].seen = 0x80;
        bad[4] =
            FlowRecord { kind: Kind::Server { service: (ip("224.0.0.1"), 1), client_port: 1 }, ..server };
        for record in bad {
            assert_eq!(FlowRecord::decode(&record.encode()), None, "{record:?}");
        }
    }

    #[test]
    fn a_full_list_of_live_peers_gives_up_those_that_nobody_named() {
        let address = |n: usize| IpAddr::V4(Ipv4Addr::from_bits(0x0a00_0001 + u32::try_from(n).unwrap()));
        let mut live = LivePeers::default();
        live.restore(5, address(0));
        (1..MAX_LIVE_PEERS).for_each(|n| live.insert(address(n)));
        while live.poll().is_some() {}
        live.insert(address(MAX_LIVE_PEERS));
        assert_eq!(live.poll(), Some((5, Some(address(MAX_LIVE_PEERS)))));
        live.insert(address(MAX_LIVE_PEERS + 1));
        assert_eq!((live.poll(), live.take_wanted(address(0))), (None, false));
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_or_read_as_they_would_be_written(
            bytes in prop::array::uniform32(any::<u8>()), at in 0..10usize, from in 0..FLOW_RECORD_LEN
        ) {
            let mut record = records()[at].encode();
            record.iter_mut().skip(from).zip(bytes).for_each(|(old, new)| *old = new);
            if let Some(read) = FlowRecord::decode(&record) {
                prop_assert_eq!(FlowRecord::decode(&read.encode()), Some(read));
            }
        }
    }
}
