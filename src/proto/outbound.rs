//! Outbound path: a packet from the pod becomes sealed datagrams for the peer's agent.
//!
//! 1. `agent::tun` hands over a burst from `tenc0`: one packet, or a super-packet that is cut below; it waits for the turn of
//!    its flow (`proto::queue`)
//! 2. DNS to a captured resolver goes to `proto::dns`; to a resolver of the project it comes back, as what the agent's own
//!    sockets send
//! 3. the flow table (or, for a new flow to a VIP, the balancer) names the peer
//! 4. answers to flows that came through a VIP get the VIP back as their source
//! 5. the burst is cut, and each packet sealed into a record by the peer's session, or staged while there is none
//! 6. `poll_transmit` gives the datagrams to `agent::udp`
//!
//! The functions below stand in that order. Sans-IO; no allocation per packet of a known flow.
//! Source: WireGuard paper §5.4.6 (transport data); RFC 792, RFC 4443 (errors), RFC 5508 (NAT of ICMP errors).

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use super::account::packets_of;
use super::drop::DropReason;
use super::mtu;
use super::nat::{Direction, Kind, Tuple};
use super::{Captured, Engine, Now, Origin, Owned, balance, is_unicast, push_answer};
use crate::wire::icmp::IcmpError;
use crate::wire::packet::{Packet, TCP_ACK, TCP_SYN, protocol};
use crate::wire::rewrite::{self, Rewrite};
use crate::wire::segment::Cut;
use crate::wire::tcp_reset::tcp_reset;
use crate::wire::vnet::{Gso, VNET_HEADER_LEN, VnetHeader};

const DNS_PORT: u16 = 53;
/// How long a quiet flow counts after its last packet.
const QUIET_LIFE: Duration = Duration::from_millis(100);
const UDP_HEADER: usize = 8;
/// Sockets of the agent towards resolvers of the project: every query and every connection that may be under way.
const UPSTREAMS: usize = 1024;

/// Where a captured packet goes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Route {
    /// Sealed, to this peer.
    Peer(IpAddr, Rewrite),
    /// Back into the pod: it reaches itself through a VIP.
    Hairpin(Rewrite),
    /// Nobody knows the destination yet.
    Unknown,
}

impl Route {
    pub(super) fn peer(&self) -> Option<IpAddr> {
        if let Self::Peer(peer, _) = self { Some(*peer) } else { None }
    }
}

impl Engine {
    /// Where the driver reads the next burst of `tenc0` into, vnet header first; `None` while too much waits.
    pub fn capture_buffer(&mut self) -> Option<&mut [u8]> {
        self.queue.room()
    }

    /// A burst of `len` bytes stands in the capture buffer: it waits for its turn.
    pub fn handle_captured(&mut self, len: usize) {
        self.counters.captured += self.queue.push(len);
        while let Some(packets) = self.queue.shed() {
            self.counters.outbound_drops.add(DropReason::Congested, packets);
        }
    }

    /// Whether captured packets wait for their turn.
    #[must_use]
    pub fn has_captured(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Whether lately a quiet flow's packet went ahead of others that waited: somebody gains from short turns.
    #[must_use]
    pub fn has_quiet_flow(&self, now: Now) -> bool {
        self.quiet_until.is_some_and(|until| now.instant < until)
    }

    /// Deals with the next burst.
    pub fn poll_captured(&mut self, now: Now) -> Option<Captured> {
        let packets = self.queue.take()?;
        if self.queue.has_overtaken() {
            self.quiet_until = Some(now.instant + QUIET_LIFE);
        }
        let (mut chunk, range) = self.queue.lend()?;
        let outcome = self.capture_burst(&mut chunk[range], packets, None, now);
        self.queue.give_back(chunk);
        self.settle(now);
        match outcome {
            Ok(Captured::Done) => {}
            Ok(Captured::DnsStream) => self.counters.dns_segments += packets,
            Err(reason) => self.counters.outbound_drops.add(reason, packets),
        }
        Some(outcome.unwrap_or(Captured::Done))
    }

    /// The burst that was dealt with last, for passing it on.
    #[must_use]
    pub fn captured(&self) -> &[u8] {
        self.queue.taken()
    }

    /// The `len` bytes in the capture buffer came from the helper namespace. What a resolver's TCP would say to this pod
    /// is to be passed on, and counts as that many packets; `None`: dropped.
    pub fn handle_helper(&mut self, len: usize) -> Option<(&[u8], u64)> {
        let burst = self.queue.peek(len);
        let packets = packets_of(burst);
        let checked = self.check_helper(burst);
        self.counters.answers += packets;
        match checked {
            Ok(()) => {
                self.counters.answered += packets;
                Some((self.queue.peek(len), packets))
            }
            Err(reason) => {
                self.counters.answer_drops.add(reason, packets);
                None
            }
        }
    }

    fn check_helper(&self, burst: &[u8]) -> Result<(), DropReason> {
        let bytes = burst.get(VNET_HEADER_LEN..).ok_or(DropReason::Malformed)?;
        let packet = Packet::parse(bytes).ok_or(DropReason::Malformed)?;
        // A resolver may have an address of link scope.
        let from_resolver = packet.protocol == protocol::TCP
            && packet.ports(bytes).is_some_and(|(source, _)| source == DNS_PORT)
            && self.dns.is_resolver(packet.source);
        if !from_resolver {
            return Err(DropReason::NotOwner);
        }
        if self.own.contains(&packet.destination) { Ok(()) } else { Err(DropReason::NotForUs) }
    }

    /// `packets` is what the burst counts as; `deadline` is set where it was held before.
    fn capture_burst(
        &mut self,
        burst: &mut [u8],
        packets: u64,
        deadline: Option<Instant>,
        now: Now,
    ) -> Result<Captured, DropReason> {
        let vnet = VnetHeader::parse(burst).ok_or(DropReason::Malformed)?;
        let bytes = burst.get_mut(VNET_HEADER_LEN..).ok_or(DropReason::Malformed)?;
        let packet = Packet::parse(bytes).ok_or(DropReason::Malformed)?;
        let bytes = &mut bytes[..packet.len];
        // Before every rule about scope: a node-local DNS cache has a link-local address.
        let query = self.dns_tuple(bytes, &packet);
        if query.is_none() && !is_unicast(packet.destination) {
            return Err(DropReason::LinkScope);
        }
        if !self.own.contains(&packet.source) {
            return Err(DropReason::NotOwner);
        }
        if let Some(tuple) = query
            && !self.is_upstream(&tuple, packet.tcp_flags(bytes).unwrap_or(0))
        {
            if packet.protocol == protocol::TCP {
                return Ok(Captured::DnsStream);
            }
            // Several queries in one send with UDP_SEGMENT.
            if vnet.gso != Gso::None {
                return Err(DropReason::DnsMalformed);
            }
            self.capture_query(bytes, &packet, tuple.local.1, now)?;
            return Ok(Captured::Done);
        }
        if packet.protocol == protocol::UDP
            && packet.ports(bytes).is_some_and(|(source, _)| source == self.port)
        {
            return Err(DropReason::Loop);
        }
        match self.route(bytes, &packet, now) {
            Ok(Route::Peer(peer, change)) => self.seal_burst(peer, &change, bytes, &packet, vnet, now)?,
            Ok(Route::Hairpin(change)) => {
                self.check_source(packet.destination)?;
                rewrite::apply(bytes, &packet, &change, vnet.partial_checksum.is_some());
                self.counters.hairpinned += packets;
                self.owned.push_back(Owned { origin: Origin::Pod, packets, vnet, bytes: bytes.to_vec() });
            }
            Ok(Route::Unknown) => {
                let deadline = deadline.unwrap_or(now.instant + super::inbound::HELD_LIFE);
                self.held.hold_unrouted(deadline, burst)?;
            }
            Err(reason) => {
                self.refuse(bytes, reason);
                return Err(reason);
            }
        }
        Ok(Captured::Done)
    }

    /// Both ends of a packet to port 53 of a captured resolver.
    fn dns_tuple(&self, bytes: &[u8], packet: &Packet) -> Option<Tuple> {
        let (source, destination) = packet.ports(bytes)?;
        let tuple = Tuple {
            protocol: packet.protocol,
            local: (packet.source, source),
            remote: (packet.destination, destination),
        };
        self.is_dns(&tuple).then_some(tuple)
    }

    /// Whether this is DNS with a captured resolver.
    pub(super) fn is_dns(&self, tuple: &Tuple) -> bool {
        tuple.remote.1 == DNS_PORT
            && matches!(tuple.protocol, protocol::TCP | protocol::UDP)
            && self.dns.is_resolver(tuple.remote.0)
    }

    /// Whether this DNS is between a socket of the agent and a resolver of the project, not an application's. A connection
    /// says its last words after its socket is closed: its flow is known by then, but a SYN needs the socket.
    pub(super) fn is_upstream(&mut self, tuple: &Tuple, flags: u8) -> bool {
        if self.upstreams.contains(tuple) {
            return true;
        }
        let opens = flags & (TCP_SYN | TCP_ACK) == TCP_SYN;
        if tuple.protocol != protocol::TCP || opens {
            self.flows.forget(tuple);
            return false;
        }
        self.flows.get(tuple).is_some()
    }

    /// Whether DNS to this resolver is to be sealed: exactly where the guard lets none of it leave in clear. It has to be
    /// sent from a socket that is neither marked nor bound to a port of the agent's range, see [`Self::open_upstream`].
    #[must_use]
    pub fn is_sealed(&self, resolver: IpAddr) -> bool {
        self.routing.is_protected(resolver) && !self.routing.is_passed(resolver)
    }

    /// The agent's own socket sends DNS to a resolver of the project: what comes from it is sealed, not captured again. `false`:
    /// there are too many.
    pub fn open_upstream(&mut self, socket: Tuple) -> bool {
        self.upstreams.len() < UPSTREAMS && self.upstreams.insert(socket)
    }

    /// The socket is closed. An application may get its port: what is still sent to it must not go past the DNS gate.
    pub fn close_upstream(&mut self, socket: &Tuple) {
        self.upstreams.remove(socket);
        if socket.protocol == protocol::UDP {
            self.flows.forget(socket);
        }
    }

    fn capture_query(
        &mut self,
        bytes: &[u8],
        packet: &Packet,
        source: u16,
        now: Now,
    ) -> Result<(), DropReason> {
        if packet.fragment.is_some() {
            return Err(DropReason::DnsMalformed);
        }
        let client = SocketAddr::new(packet.source, source);
        let resolver = SocketAddr::new(packet.destination, DNS_PORT);
        let query = bytes.get(packet.transport + 8..).ok_or(DropReason::DnsMalformed)?;
        let mut forward = self.dns.handle_query(client, resolver, query, &mut self.rng, now)?;
        forward.sealed = self.is_sealed(packet.destination);
        self.counters.dns_forwarded += 1;
        self.forwards.push_back(forward);
        Ok(())
    }

    /// Names the peer of a packet, and what is rewritten.
    fn route(&mut self, bytes: &mut [u8], packet: &Packet, now: Now) -> Result<Route, DropReason> {
        let direct = || Route::Peer(packet.destination, Rewrite::NONE);
        if packet.is_later_fragment() {
            return match self.sent_fragments.get(packet, now) {
                Some(route) => {
                    self.sent_fragments.follow(packet);
                    Ok(route)
                }
                None if protocol::has_ports(packet.protocol) => Err(DropReason::FragmentUnmatched),
                None if self.peers.contains(packet.destination) => Ok(direct()),
                None => Ok(Route::Unknown),
            };
        }
        if let Some((source, destination)) = packet.ports(bytes) {
            let tuple = Tuple {
                protocol: packet.protocol,
                local: (packet.source, source),
                remote: (packet.destination, destination),
            };
            let flags = packet.tcp_flags(bytes).unwrap_or(0);
            let route = self.route_flow(&tuple, flags, now)?;
            if packet.fragment.is_some() {
                self.sent_fragments.insert(packet, route, now);
            }
            return Ok(route);
        }
        if packet.is_icmp_error(bytes) {
            return self.route_error(bytes, packet);
        }
        if self.peers.contains(packet.destination) {
            Ok(direct())
        } else if self.directory.vip(packet.destination).is_some() {
            Err(DropReason::ServiceUnknown)
        } else {
            Ok(Route::Unknown)
        }
    }

    fn route_flow(&mut self, tuple: &Tuple, flags: u8, now: Now) -> Result<Route, DropReason> {
        let opens = flags & (TCP_SYN | TCP_ACK) == TCP_SYN;
        if let Some(flow) = self.flows.get(tuple) {
            let stale = !self.peers.contains(flow.peer) && !self.own.contains(&flow.peer);
            if !stale {
                flow.touch(Direction::Outbound, flags, now);
                return Ok(route_of(flow.kind, flow.peer, tuple));
            }
            if !self.knows_directory {
                return Ok(Route::Unknown);
            }
            if tuple.protocol == protocol::TCP && !opens {
                return Err(DropReason::PeerGone);
            }
            self.flows.forget(tuple);
        }
        self.open_flow(tuple, flags, now)
    }

    fn open_flow(&mut self, tuple: &Tuple, flags: u8, now: Now) -> Result<Route, DropReason> {
        let (destination, port) = tuple.remote;
        let opens = flags & (TCP_SYN | TCP_ACK) == TCP_SYN;
        if tuple.protocol == protocol::TCP && !opens && self.older_flows.contains(&destination) {
            return Err(DropReason::Preexisting);
        }
        if self.peers.contains(destination) {
            // A full table is no reason to stop what needs no entry to be carried.
            if let Ok(flow) = self.flows.insert(*tuple, destination, Kind::Direct, now) {
                flow.touch(Direction::Outbound, flags, now);
            }
            return Ok(Route::Peer(destination, Rewrite::NONE));
        }
        let Some(vip) = self.directory.vip(destination) else { return Ok(Route::Unknown) };
        let service = vip.ports.iter().find(|p| p.port == port && p.protocol as u8 == tuple.protocol);
        let service = service.ok_or(DropReason::ServiceUnknown)?;
        let usable = |e: &super::directory::ServiceEndpoint| {
            self.peers.contains(e.address) || e.address == tuple.local.0
        };
        let endpoint = *balance::choose(&self.balance_seed, vip, service, tuple, usable)
            .ok_or(DropReason::NoEndpoint)?;
        let flow = if endpoint.address == tuple.local.0 {
            self.flows.insert_hairpin(*tuple, (endpoint.address, endpoint.port), now)?
        } else {
            self.flows.insert(*tuple, endpoint.address, Kind::Client, now)?
        };
        flow.touch(Direction::Outbound, flags, now);
        Ok(route_of(flow.kind, flow.peer, tuple))
    }

    /// An ICMP error that the pod's stack sends about a packet that was injected: judged by what it quotes.
    fn route_error(&mut self, bytes: &mut [u8], packet: &Packet) -> Result<Route, DropReason> {
        let quoted = packet.embedded(bytes).ok_or(DropReason::Malformed)?;
        let inner = Packet::parse_embedded(&bytes[quoted.clone()]).ok_or(DropReason::Malformed)?;
        let flow = inner.ports(&bytes[quoted]).and_then(|(source, destination)| {
            let (local, remote) = ((inner.destination, destination), (inner.source, source));
            self.flows
                .get(&Tuple { protocol: inner.protocol, local, remote })
                .map(|flow| (flow.kind, flow.peer))
        });
        match flow {
            Some((Kind::Server { service, client_port }, peer)) => {
                let change = Rewrite {
                    source: Some((inner.source, Some(client_port))),
                    destination: Some((service.0, Some(service.1))),
                };
                rewrite::apply_embedded(bytes, packet, &change, false);
                Ok(Route::Peer(peer, Rewrite::NONE))
            }
            Some((Kind::Client | Kind::Direct, peer)) => Ok(Route::Peer(peer, Rewrite::NONE)),
            None if self.peers.contains(packet.destination) => {
                Ok(Route::Peer(packet.destination, Rewrite::NONE))
            }
            Some(_) | None => Err(DropReason::UnknownDestination),
        }
    }

    fn seal_burst(
        &mut self,
        peer: IpAddr,
        change: &Rewrite,
        bytes: &mut [u8],
        packet: &Packet,
        vnet: VnetHeader,
        now: Now,
    ) -> Result<(), DropReason> {
        let limit = mtu::inner_mtu(self.link_mtu, peer);
        let largest = match vnet.gso {
            Gso::None => packet.len,
            // Not the header length of the vnet header: that is a hint, and may cover payload.
            Gso::Tcp4(size) | Gso::Tcp6(size) | Gso::Udp(size) => {
                packet.transport + packet.tcp_header_len(bytes).unwrap_or(UDP_HEADER) + usize::from(size)
            }
        };
        if largest > limit as usize {
            self.answer_with(IcmpError::TooBig(u16::try_from(limit).unwrap_or(u16::MAX)), bytes);
            return Err(DropReason::TooBig);
        }
        let mut packet = *packet;
        if !change.is_none() {
            rewrite::apply(bytes, &packet, change, vnet.partial_checksum.is_some());
            packet = Packet::parse(bytes).ok_or(DropReason::Malformed)?;
        }
        let cut = Cut::new(bytes, &packet, &vnet).ok_or(DropReason::Malformed)?;
        self.peers.send(peer, &mut self.transmits, cut, now, &mut self.counters);
        Ok(())
    }

    /// Tells the application at once what would otherwise be a time-out.
    fn refuse(&mut self, bytes: &[u8], reason: DropReason) {
        use DropReason::{NoEndpoint, PeerGone, Preexisting, ServiceUnknown};
        if !matches!(reason, NoEndpoint | ServiceUnknown | PeerGone | Preexisting) {
            return;
        }
        let mut reset = Vec::new();
        if tcp_reset(bytes, &mut reset) {
            self.counters.answers += 1;
            push_answer(&mut self.owned, &mut self.counters, reset);
        } else {
            self.answer_with(IcmpError::PortUnreachable, bytes);
        }
    }

    /// The directory changed: packets that nobody could place get another chance.
    pub(super) fn retry_unrouted(&mut self, now: Now) {
        for (deadline, mut burst) in self.held.take_unrouted() {
            let packets = packets_of(&burst);
            match self.capture_burst(&mut burst, packets, Some(deadline), now) {
                Ok(Captured::Done) => {}
                // The agent's own connection to a resolver of the project was closed meanwhile.
                Ok(Captured::DnsStream) => {
                    self.counters.outbound_drops.add(DropReason::UnknownDestination, packets);
                }
                Err(reason) => self.counters.outbound_drops.add(reason, packets),
            }
        }
    }
}

/// What a known flow does to a packet of the pod.
fn route_of(kind: Kind, peer: IpAddr, tuple: &Tuple) -> Route {
    match kind {
        Kind::Direct | Kind::Client => Route::Peer(peer, Rewrite::NONE),
        Kind::Server { service: (address, port), client_port } => Route::Peer(
            peer,
            Rewrite {
                source: Some((address, Some(port))),
                destination: Some((tuple.remote.0, Some(client_port))),
            },
        ),
        Kind::HairpinOut { target, alias } => Route::Hairpin(Rewrite {
            source: Some((tuple.remote.0, Some(alias))),
            destination: Some((tuple.local.0, Some(target))),
        }),
        Kind::HairpinBack { service_port, client_port } => Route::Hairpin(Rewrite {
            source: Some((tuple.remote.0, Some(service_port))),
            destination: Some((tuple.local.0, Some(client_port))),
        }),
    }
}
