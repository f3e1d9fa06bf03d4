//! Planned upgrade: the engine of a running agent becomes bytes, and those become part of its successor's engine.
//!
//! 1. the successor is brought up and has applied the directory, but reads no packet yet
//! 2. the old agent stops reading; [`Engine::export`] consumes its engine, so nothing is sealed there any more
//! 3. [`Engine::import`] puts flows, sessions, waiting packets and counts into the successor, which reads on
//!
//! Sessions go on with their next counter and their replay window: no (key, counter) pair is used twice, no packet is
//! opened twice, and peers notice nothing. Handshakes under way begin anew; DNS queries under way are not handed over
//! ([`Engine::is_dns_idle`]). The bytes hold transport keys: they are wiped when dropped, and belong into a sealed memfd.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::account::{Counters, packets_of};
use super::drop::DropReason;
use super::fragment::FragmentKey;
use super::inbound::{HELD_LIFE, HeldPacket, INBOUND};
use super::journal::{self, FlowRecord};
use super::outbound::Route;
use super::peers::PeerHandover;
use super::{Engine, Now, OWNED, Origin, Owned};
use crate::wire::packet::Packet;
use crate::wire::rewrite::Rewrite;
use crate::wire::vnet::VnetHeader;

const MAGIC: &[u8; 7] = b"tencrho";
/// Raised whenever [`State`] or what it holds changes.
const VERSION: u8 = 5;
/// Far above what bounded tables and queues can come to.
const MAX_LEN: usize = 256 << 20;
/// More words than there are.
const MAX_COUNTS: usize = 256;
const PREFIX: usize = MAGIC.len() + 1;

/// Why a former agent's state was not taken over; the engine is as it was.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImportError {
    /// The bytes are not an exported engine.
    #[error("not the state of an agent")]
    Foreign,
    /// Another version of this program wrote them.
    #[error("state of version {0}, not {VERSION}")]
    Version(u8),
    /// They are cut off, damaged or too long.
    #[error("damaged state of an agent")]
    Damaged,
}

/// Source and destination of a [`Rewrite`].
type Exchange = (Option<(IpAddr, Option<u16>)>, Option<(IpAddr, Option<u16>)>);
/// Which fragments, how long they are remembered, the peer they go to or come from (none: a hairpin), and the change.
type Fragment = (FragmentKey, Duration, Option<IpAddr>, Exchange);

#[derive(Serialize, Deserialize)]
struct State {
    /// Wall clock at the export: how long ago that was, for the successor.
    wall: Duration,
    stamp: Option<Duration>,
    counts: Vec<(String, u64)>,
    flows: Vec<(u32, FlowRecord, Duration)>,
    fragments: Vec<Fragment>,
    live: Vec<(u32, IpAddr)>,
    /// What DNS alone knows.
    dns: Vec<IpAddr>,
    peers: Vec<PeerHandover>,
    /// Handshake messages and keepalives that were not sent yet.
    messages: Vec<(SocketAddr, Vec<u8>)>,
    /// Sealed packets that were not sent yet.
    trains: Vec<(SocketAddr, Vec<u8>, usize)>,
    /// Packets that were not injected yet: from where, what they count as, vnet header, bytes.
    injects: Vec<(Origin, u64, [u8; 10], Vec<u8>)>,
    /// Captured packets that wait for the directory.
    unrouted: Vec<(Duration, Vec<u8>)>,
    /// Opened packets that wait for the directory, a route or their first fragment.
    inbound: Vec<(Duration, IpAddr, Vec<u8>)>,
}

impl Engine {
    /// Everything a successor needs to go on without losing a packet. What `poll_record` and `poll_forward` have left is
    /// not among it: the one is told again by the successor, the other has to be polled before.
    #[must_use]
    pub fn export(mut self, now: Now) -> Zeroizing<Vec<u8>> {
        let mut injects = Vec::new();
        while let Some(inject) = self.poll_inject() {
            let packet = inject.parts.iter().flat_map(|part| &inject.buffer[part.clone()]).copied().collect();
            injects.push((inject.origin, inject.packets, inject.vnet.encode(), packet));
        }
        let (mut messages, mut trains) = (Vec::new(), Vec::new());
        while let Some(transmit) = self.poll_transmit() {
            match (transmit.packets, transmit.bytes.first()) {
                (true, _) => trains.push((transmit.to, transmit.bytes.to_vec(), transmit.segment)),
                // An initiation whose answer nobody waits for would only delay the next one.
                (false, Some(1)) => {}
                (false, _) => messages.push((transmit.to, transmit.bytes.to_vec())),
            }
        }
        let left = |until: std::time::Instant| until.saturating_duration_since(now.instant);
        let fragments = self.sent_fragments.iter().chain(self.received_fragments.iter());
        let fragments = fragments.filter_map(|(key, route, until)| {
            let (peer, change) = match route {
                Route::Peer(peer, change) => (Some(peer), change),
                Route::Hairpin(change) => (None, change),
                Route::Unknown => return None,
            };
            Some((key, left(until), peer, (change.source, change.destination)))
        });
        let unrouted = self.held.take_unrouted().into_iter();
        let inbound = std::mem::take(&mut self.held.inbound).into_iter();
        let inbound = inbound.map(|held| (left(held.until), held.peer, held.bytes));
        let state = State {
            wall: now.wall,
            stamp: self.peers.transport.last_stamp(),
            counts: journal::counts(&self.counters),
            flows: self.flows.export(now).collect(),
            fragments: fragments.collect(),
            unrouted: unrouted.map(|(until, burst)| (left(until), burst)).collect(),
            inbound: inbound.collect(),
            messages,
            trains,
            injects,
            live: self.peers.live(),
            dns: self.routing.export(),
            peers: self.peers.export(now),
        };
        encode(&state)
    }

    /// Goes on where the agent that exported `bytes` stopped. To be called once, after the directory was applied and before
    /// any packet; not together with [`Self::restore`]. What belongs to a peer that the directory does not name, or names
    /// with another key, is left out.
    ///
    /// # Errors
    /// The bytes cannot be read. Nothing changed then: [`Self::restore`] is what is left.
    pub fn import(&mut self, bytes: &[u8], now: Now) -> Result<(), ImportError> {
        let state = decode(bytes)?;
        // The export's moment on this clock. A wall clock that went back makes it now.
        let gap = now.wall.saturating_sub(state.wall);
        let then = now.instant.checked_sub(gap).unwrap_or(now.instant);
        state.stamp.into_iter().for_each(|stamp| self.peers.transport.raise_stamp(stamp));
        let mut counts = Counters::default();
        state
            .counts
            .iter()
            .take(MAX_COUNTS)
            .for_each(|(word, packets)| journal::add_count(&mut counts, word, *packets));
        for (word, packets) in journal::counts(&counts) {
            journal::add_count(&mut self.counters, &word, packets);
        }
        let own = &self.own;
        let flows = state.flows.into_iter().filter(|(_, flow, _)| own.contains(&flow.tuple.local.0));
        let flows = flows.map(|(slot, flow, idle)| (slot, flow, then.checked_sub(idle).unwrap_or(then)));
        self.flows.restore(flows);
        self.flows.note_all();
        for (key, remaining, peer, (source, destination)) in state.fragments {
            let change = Rewrite { source, destination };
            let route = peer.map_or(Route::Hairpin(change), |peer| Route::Peer(peer, change));
            let sent = self.own.contains(&key.0);
            let table = if sent { &mut self.sent_fragments } else { &mut self.received_fragments };
            table.restore(key, then, remaining, route);
        }
        for (to, message) in state.messages {
            self.peers.transport.send_on(to, message);
        }
        for (to, records, segment) in state.trains {
            self.transmits.send_on(to, &records, segment);
        }
        self.routing.import(state.dns, now);
        self.peers.restore(&state.live);
        self.peers.note_all();
        self.peers.import(state.peers, &mut self.transmits, then, now, &mut self.counters);
        for (origin, packets, vnet, bytes) in state.injects.into_iter().take(OWNED) {
            if let Some(vnet) = VnetHeader::parse(&vnet) {
                self.owned.push_back(Owned { origin, packets, vnet, bytes });
            }
        }
        for (remaining, peer, mut bytes) in state.inbound.into_iter().take(INBOUND) {
            let Some(packet) = Packet::parse(&bytes) else { continue };
            bytes.truncate(packet.len);
            let until = then + remaining.min(HELD_LIFE);
            // What it waits for is said again below.
            let reason = DropReason::HeldTooLong;
            self.held.inbound.push_back(HeldPacket { until, peer, bytes, reason });
        }
        for (remaining, burst) in state.unrouted {
            if let Err(reason) = self.held.hold_unrouted(then + remaining.min(HELD_LIFE), &burst) {
                self.counters.outbound_drops.add(reason, packets_of(&burst));
            }
        }
        self.retry_unrouted(now);
        self.retry_held(now);
        self.settle(now);
        // DNS answers that were waited for too long stayed behind.
        self.counters.balance(self.waiting());
        Ok(())
    }
}

fn encode(state: &State) -> Zeroizing<Vec<u8>> {
    // Measured first: a buffer that grows leaves copies of keys behind.
    let measured = postcard::serialize_with_flavor(state, postcard::ser_flavors::Size::default());
    let len = measured.expect("plain data can be measured");
    let mut bytes = Zeroizing::new(vec![0; PREFIX + len]);
    bytes[..MAGIC.len()].copy_from_slice(MAGIC);
    bytes[MAGIC.len()] = VERSION;
    postcard::to_slice(state, &mut bytes[PREFIX..]).expect("the length was measured");
    bytes
}

fn decode(bytes: &[u8]) -> Result<State, ImportError> {
    if bytes.len() > MAX_LEN {
        return Err(ImportError::Damaged);
    }
    let rest = bytes.strip_prefix(MAGIC).ok_or(ImportError::Foreign)?;
    let (version, rest) = rest.split_first().ok_or(ImportError::Damaged)?;
    if *version != VERSION {
        return Err(ImportError::Version(*version));
    }
    match postcard::take_from_bytes(rest) {
        Ok((state, [])) => Ok(state),
        _ => Err(ImportError::Damaged),
    }
}
