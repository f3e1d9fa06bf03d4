//! Inbound path: a datagram from a peer becomes a packet for the pod.
//!
//! 1. `agent::udp` hands over a train of equal datagrams from one sender
//! 2. the session authenticates and opens each in place; the replay window is checked
//! 3. the inner source must be the peer's own address, or a VIP of a flow pinned to that peer; and our pod's kernel must
//!    still send its answers to that source into `tenc0`, or nowhere
//! 4. the peer gate: nothing is injected before the peer's own address is routed and guarded
//! 5. packets for a VIP that we serve are rewritten to our own address and target port
//! 6. what was opened is merged into super-packets; `poll_inject` gives them to `agent::tun`
//!
//! The functions below stand in that order. Sans-IO; no allocation per packet of a known flow.
//! Source: WireGuard paper §5.4.6, §5.1 (cryptokey routing); RFC 5508 (NAT of ICMP errors).

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::time::{Duration, Instant};

use super::account::packets_of;
use super::drop::DropReason;
use super::fragment::key;
use super::nat::{Direction, Kind, Tuple};
use super::noise::Received;
use super::outbound::Route;
use super::{Engine, Now, Origin, Owned, is_unicast};
use crate::wire::checksum;
use crate::wire::icmp::IcmpError;
use crate::wire::packet::{Packet, Version, protocol};
use crate::wire::rewrite::{self, Rewrite};
use crate::wire::vnet::{VNET_HEADER_LEN, VnetHeader};

/// How long a packet waits for the directory, for a route, or for its first fragment.
pub(super) const HELD_LIFE: Duration = Duration::from_secs(1);
/// Captured packets held for the directory.
const UNROUTED: usize = 128;
/// Opened packets held for the directory, the peer gate or their first fragment. A peer may have as many as it leaves free:
/// 64 alone, and the next one finds room.
pub(super) const INBOUND: usize = 128;

/// What is decided about an opened packet.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Inject,
    Hold(DropReason),
}

impl Engine {
    /// Where the driver receives the next train of datagrams into.
    pub fn receive_buffer(&mut self) -> &mut [u8] {
        &mut self.receive
    }

    /// `len` bytes from `from` stand in the receive buffer: datagrams of `segment` bytes each, the last may be shorter.
    /// What earlier trains gave must have been polled.
    pub fn handle_datagrams(&mut self, from: SocketAddr, len: usize, segment: usize, now: Now) {
        let mut buffer = std::mem::take(&mut self.receive);
        self.coalescer.clear();
        self.next_train = 0;
        let len = len.min(buffer.len());
        let mut start = 0;
        while start < len {
            let end = len.min(start + segment.max(1));
            self.counters.received += 1;
            if let Err(reason) = self.receive_one(from, &mut buffer, start..end, now) {
                self.counters.inbound_drops.add(reason, 1);
            }
            start = end;
        }
        if len == 0 {
            self.counters.received += 1;
            self.counters.inbound_drops.add(DropReason::NotWireguard, 1);
        }
        self.coalescer.finish(&mut buffer);
        self.receive = buffer;
        self.settle(now);
    }

    fn receive_one(
        &mut self,
        from: SocketAddr,
        buffer: &mut [u8],
        datagram: Range<usize>,
        now: Now,
    ) -> Result<(), DropReason> {
        let (peer, payload) = match self.peers.transport.handle(from, &mut buffer[datagram.clone()], now)? {
            Received::Handshake | Received::Keepalive(_) => {
                self.counters.control += 1;
                return Ok(());
            }
            Received::Packet { peer, payload } => (peer, payload),
        };
        let peer = self.peers.address(peer).ok_or(DropReason::PeerGone)?;
        let range = datagram.start + payload.start..datagram.start + payload.end;
        let packet = Packet::parse(&buffer[range.clone()]).ok_or(DropReason::Malformed)?;
        let range = range.start..range.start + packet.len;
        match self.admit(peer, &mut buffer[range.clone()], &packet, now)? {
            Verdict::Inject if self.coalesce => self.coalescer.push(buffer, range),
            Verdict::Inject => self.push_opened(buffer[range].to_vec()),
            Verdict::Hold(reason) => return self.held.hold_inbound(now, peer, &buffer[range], reason),
        }
        self.counters.opened += 1;
        if packet.is_first_fragment() && self.held.has_fragment_of(peer, &packet) {
            self.retry_held(now);
        }
        Ok(())
    }

    /// The injection rule, the peer gate, and DNAT.
    pub(super) fn admit(
        &mut self,
        peer: IpAddr,
        bytes: &mut [u8],
        packet: &Packet,
        now: Now,
    ) -> Result<Verdict, DropReason> {
        let (source, destination) = (packet.source, packet.destination);
        if !is_unicast(source) || self.own.contains(&source) {
            return Err(DropReason::NotOwner);
        }
        if !is_unicast(destination) {
            return Err(DropReason::NotForUs);
        }
        if !self.routing.is_captured(peer) && !self.is_passed_flow(peer, bytes, packet, now) {
            return Ok(Verdict::Hold(DropReason::HeldTooLong));
        }
        // What the pod's stack will not take neither begins a datagram nor ends it.
        if packet.fragment.is_some() && !has_valid_header(bytes, packet) {
            return Err(DropReason::Malformed);
        }
        if packet.is_later_fragment() {
            return self.admit_later_fragment(peer, bytes, packet, now);
        }
        // Two peers that answer as one VIP cannot have their bytes put together.
        if self.received_fragments.get(packet, now).is_some_and(|route| route.peer() != Some(peer)) {
            return Err(DropReason::NotOwner);
        }
        if let Some((source_port, destination_port)) = packet.ports(bytes) {
            let wire = Tuple {
                protocol: packet.protocol,
                local: (destination, destination_port),
                remote: (source, source_port),
            };
            let flags = packet.tcp_flags(bytes).unwrap_or(0);
            // A resolver of the project speaks to the agent's sockets: an application gets its answers from the DNS gate.
            if self.is_dns(&wire) && !self.is_upstream(&wire, flags) {
                return Err(DropReason::DnsMalformed);
            }
            let change = if self.own.contains(&destination) {
                self.admit_to_own(peer, &wire, flags, now)?
            } else {
                match self.admit_to_vip(peer, &wire, flags, now)? {
                    Some(change) => change,
                    None => return Ok(Verdict::Hold(DropReason::ServiceUnknown)),
                }
            };
            if packet.fragment.is_some() {
                self.received_fragments.insert(packet, Route::Peer(peer, change), now);
            }
            rewrite::apply(bytes, packet, &change, false);
            return Ok(Verdict::Inject);
        }
        if packet.is_icmp_error(bytes) {
            return self.admit_error(peer, bytes, packet);
        }
        if source != peer {
            return Err(DropReason::NotOwner);
        }
        if !self.own.contains(&destination) {
            return Err(DropReason::NotForUs);
        }
        Ok(Verdict::Inject)
    }

    /// A flow in being keeps its path, sealed, while its peer is passed. Anything else that such a peer seals shows that it
    /// is able, and waits for its route.
    fn is_passed_flow(&mut self, peer: IpAddr, bytes: &[u8], packet: &Packet, now: Now) -> bool {
        let Some(ladder) = &mut self.ladder else { return false };
        if !self.routing.is_passed(peer) || !self.routing.is_active(peer) {
            return false;
        }
        let known = packet.ports(bytes).is_some_and(|(source, destination)| {
            let (local, remote) = ((packet.destination, destination), (packet.source, source));
            let wire = Tuple { protocol: packet.protocol, local, remote };
            self.flows.get_by_wire(&wire).is_some() || self.flows.get(&wire).is_some()
        });
        ladder.handle_able(peer, now);
        let follows = || self.received_fragments.get(packet, now).is_some_and(|r| r.peer() == Some(peer));
        known || packet.is_later_fragment() && follows()
    }

    /// To our own address: from the peer itself, or the answer of the endpoint that we chose.
    fn admit_to_own(
        &mut self,
        peer: IpAddr,
        wire: &Tuple,
        flags: u8,
        now: Now,
    ) -> Result<Rewrite, DropReason> {
        if wire.remote.0 != peer {
            let flow = self.flows.get(wire).filter(|flow| flow.peer == peer && flow.kind == Kind::Client);
            flow.ok_or(DropReason::NotOwner)?.touch(Direction::Inbound, flags, now);
            self.check_source(wire.remote.0)?;
            return Ok(Rewrite::NONE);
        }
        if let Some(flow) = self.flows.get_by_wire(wire) {
            flow.touch(Direction::Inbound, flags, now);
            return Ok(change_of(&flow.tuple, wire));
        }
        match self.flows.get(wire) {
            Some(flow) if flow.kind == Kind::Direct => {
                flow.touch(Direction::Inbound, flags, now);
                Ok(Rewrite::NONE)
            }
            // A flow that came through a VIP already looks like this one to the pod.
            Some(_) => {
                let flow = self.flows.insert_server(*wire, wire.local, peer, now)?;
                flow.touch(Direction::Inbound, flags, now);
                Ok(change_of(&flow.tuple, wire))
            }
            None => {
                // A full table is no reason to stop what needs no entry to be carried.
                if let Ok(flow) = self.flows.insert(*wire, peer, Kind::Direct, now) {
                    flow.touch(Direction::Inbound, flags, now);
                }
                Ok(Rewrite::NONE)
            }
        }
    }

    /// A VIP may have been released since its flow began. To a packet that came late the pod's kernel answers by itself, and
    /// in clear, if the route into `tenc0` and the guard's element are gone. (A peer's own address: the peer gate.)
    pub(super) fn check_source(&self, address: IpAddr) -> Result<(), DropReason> {
        if self.routing.is_protected(address) { Ok(()) } else { Err(DropReason::SourceReleased) }
    }

    /// To a VIP: only from the peer itself, and only where we are an endpoint. `None`: the directory does not know it.
    fn admit_to_vip(
        &mut self,
        peer: IpAddr,
        wire: &Tuple,
        flags: u8,
        now: Now,
    ) -> Result<Option<Rewrite>, DropReason> {
        if wire.remote.0 != peer {
            return Err(DropReason::NotOwner);
        }
        if let Some(flow) = self.flows.get_by_wire(wire) {
            flow.touch(Direction::Inbound, flags, now);
            return Ok(Some(change_of(&flow.tuple, wire)));
        }
        let (vip, port) = wire.local;
        let Some(target) = self.directory.target(vip, wire.protocol, port, now) else { return Ok(None) };
        let flow = self.flows.insert_server(*wire, target, peer, now)?;
        flow.touch(Direction::Inbound, flags, now);
        Ok(Some(change_of(&flow.tuple, wire)))
    }

    fn admit_later_fragment(
        &mut self,
        peer: IpAddr,
        bytes: &mut [u8],
        packet: &Packet,
        now: Now,
    ) -> Result<Verdict, DropReason> {
        match self.received_fragments.get(packet, now) {
            Some(Route::Peer(owner, change)) if owner == peer => {
                self.received_fragments.follow(packet);
                rewrite::apply(bytes, packet, &change, false);
                Ok(Verdict::Inject)
            }
            Some(_) => Err(DropReason::NotOwner),
            // Overtaken, or held: the first one may still come.
            None if protocol::has_ports(packet.protocol) => Ok(Verdict::Hold(DropReason::FragmentUnmatched)),
            None if packet.source != peer => Err(DropReason::NotOwner),
            None if !self.own.contains(&packet.destination) => Err(DropReason::NotForUs),
            None => Ok(Verdict::Inject),
        }
    }

    /// An ICMP error is judged by what it quotes: a packet that we sent to that peer.
    fn admit_error(
        &mut self,
        peer: IpAddr,
        bytes: &mut [u8],
        packet: &Packet,
    ) -> Result<Verdict, DropReason> {
        let quoted = packet.embedded(bytes).ok_or(DropReason::Malformed)?;
        let inner = Packet::parse_embedded(&bytes[quoted.clone()]).ok_or(DropReason::Malformed)?;
        if packet.source != peer && (packet.source != inner.destination || packet.fragment.is_some()) {
            return Err(DropReason::NotOwner);
        }
        if packet.source != peer {
            self.check_source(packet.source)?;
        }
        let ports = inner.ports(&bytes[quoted]);
        let wire = ports.map(|(source, destination)| Tuple {
            protocol: inner.protocol,
            local: (inner.source, source),
            remote: (inner.destination, destination),
        });
        if let Some(flow) = wire.and_then(|wire| self.flows.get_by_wire(&wire)) {
            if flow.peer != peer {
                return Err(DropReason::NotOwner);
            }
            let (local, remote) = (flow.tuple.local, flow.tuple.remote);
            let change = Rewrite {
                source: Some((local.0, Some(local.1))),
                destination: Some((remote.0, Some(remote.1))),
            };
            rewrite::apply_embedded(bytes, packet, &change, false);
            if packet.destination != local.0 {
                let outer = Rewrite { source: None, destination: Some((local.0, None)) };
                rewrite::apply(bytes, packet, &outer, false);
            }
            return Ok(Verdict::Inject);
        }
        if !self.own.contains(&inner.source) || !self.own.contains(&packet.destination) {
            return Err(DropReason::NotForUs);
        }
        let ours = wire.and_then(|wire| self.flows.get(&wire)).is_some_and(|flow| flow.peer == peer);
        if ours || inner.destination == peer { Ok(Verdict::Inject) } else { Err(DropReason::NotOwner) }
    }

    /// A route or the directory changed, or a first fragment came: opened packets that waited get another chance.
    pub(super) fn retry_held(&mut self, now: Now) {
        let mut again = true;
        while std::mem::take(&mut again) {
            for mut held in self.held.take_inbound() {
                let Some(packet) = Packet::parse(&held.bytes) else {
                    self.counters.inbound_drops.add(DropReason::Malformed, 1);
                    continue;
                };
                match self.admit(held.peer, &mut held.bytes, &packet, now) {
                    Ok(Verdict::Inject) => {
                        // Its later ones may stand before it.
                        again |= packet.is_first_fragment();
                        self.counters.opened += 1;
                        self.push_opened(held.bytes);
                    }
                    Ok(Verdict::Hold(reason)) => {
                        self.held.inbound.push_back(HeldPacket { reason, ..held });
                    }
                    Err(reason) => self.counters.inbound_drops.add(reason, 1),
                }
            }
        }
    }

    fn push_opened(&mut self, bytes: Vec<u8>) {
        self.owned.push_back(Owned { origin: Origin::Peer, packets: 1, vnet: VnetHeader::PLAIN, bytes });
    }

    /// Held packets whose time is over.
    pub(super) fn expire_held(&mut self, now: Now) {
        while let Some(held) = self.held.inbound.pop_front_if(|held| held.until <= now.instant) {
            self.counters.inbound_drops.add(held.reason, 1);
        }
        while let Some((_, burst)) = self.held.unrouted.pop_front_if(|(until, _)| *until <= now.instant) {
            self.counters.outbound_drops.add(DropReason::UnknownDestination, packets_of(&burst));
            self.answer_with(IcmpError::AdminProhibited, &burst[VNET_HEADER_LEN..]);
        }
    }
}

/// Whether the header's checksum is right, where it has one.
fn has_valid_header(bytes: &[u8], packet: &Packet) -> bool {
    packet.version == Version::V6 || checksum::sum(&bytes[..packet.transport]) == 0xffff
}

/// From what is on the wire to what the pod sees.
fn change_of(tuple: &Tuple, wire: &Tuple) -> Rewrite {
    Rewrite {
        source: (tuple.remote != wire.remote).then_some((tuple.remote.0, Some(tuple.remote.1))),
        destination: (tuple.local != wire.local).then_some((tuple.local.0, Some(tuple.local.1))),
    }
}

pub(super) struct HeldPacket {
    pub(super) until: Instant,
    pub(super) peer: IpAddr,
    pub(super) bytes: Vec<u8>,
    pub(super) reason: DropReason,
}

/// Packets that wait: captured ones for the directory, opened ones for what [`INBOUND`] says.
pub(super) struct Held {
    unrouted: VecDeque<(Instant, Vec<u8>)>,
    pub(super) inbound: VecDeque<HeldPacket>,
}

impl Held {
    pub(super) fn new() -> Self {
        Self { unrouted: VecDeque::new(), inbound: VecDeque::new() }
    }

    pub(super) fn hold_unrouted(&mut self, until: Instant, burst: &[u8]) -> Result<(), DropReason> {
        if self.unrouted.len() >= UNROUTED {
            return Err(DropReason::QueueFull);
        }
        self.unrouted.push_back((until, burst.to_vec()));
        Ok(())
    }

    fn hold_inbound(
        &mut self,
        now: Now,
        peer: IpAddr,
        bytes: &[u8],
        reason: DropReason,
    ) -> Result<(), DropReason> {
        let of_peer = self.inbound.iter().filter(|held| held.peer == peer).count();
        let share = INBOUND.saturating_sub(self.inbound.len());
        // Fragments whose first one is lost leave room for what waits for something that will come.
        if of_peer >= if reason == DropReason::FragmentUnmatched { share * 3 / 4 } else { share } {
            return Err(DropReason::QueueFull);
        }
        let until = now.instant + HELD_LIFE;
        self.inbound.push_back(HeldPacket { until, peer, bytes: bytes.to_vec(), reason });
        Ok(())
    }

    pub(super) fn unrouted_packets(&self) -> u64 {
        self.unrouted.iter().map(|(_, burst)| packets_of(burst)).sum()
    }

    pub(super) fn take_unrouted(&mut self) -> VecDeque<(Instant, Vec<u8>)> {
        std::mem::take(&mut self.unrouted)
    }

    /// Whether a fragment of the datagram that `first` begins waits for it.
    fn has_fragment_of(&self, peer: IpAddr, first: &Packet) -> bool {
        let follows = |held: &HeldPacket| Packet::parse(&held.bytes).is_some_and(|p| key(&p) == key(first));
        self.inbound.iter().any(|held| held.peer == peer && follows(held))
    }

    fn take_inbound(&mut self) -> VecDeque<HeldPacket> {
        std::mem::take(&mut self.inbound)
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        let unrouted = self.unrouted.front().map(|(until, _)| *until);
        unrouted.into_iter().chain(self.inbound.front().map(|held| held.until)).min()
    }
}
