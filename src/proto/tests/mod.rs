//! Simulation of whole engines: a fake clock, a network that is a queue, and a kernel that applies batches when told.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use etherparse::{IpNumber, NetSlice, PacketBuilder, SlicedPacket, TransportSlice};

use super::directory::{Change, Protocol, ServiceEndpoint, ServicePort, Vip, Workload};
use super::dns::StreamId;
use super::drop::DropReason;
use super::ladder::Mode;
use super::noise::{Identity, Options, PeerKeys, PresharedKey, StaticSecret};
use super::peers::Transmit;
use super::ranges::Ranges;
use super::routing::{Batch, RouteChange};
use super::{Config, Engine, Now, test_start};
use crate::wire::vnet::{Gso, VNET_HEADER_LEN, VnetHeader};

mod accounting;
mod dns;
mod flood;
mod flows;
mod inbound;
mod ladder;
mod outside;
mod peers;
mod resolvers;
mod survival;
mod update;

const PORT: u16 = 51820;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// Client, server and a third pod; a VIP per family on port 80 -> 8080.
const CLIENT: [&str; 2] = ["10.1.1.1", "fd00::1:1"];
const SERVER: [&str; 2] = ["10.1.2.2", "fd00::2:2"];
const THIRD: [&str; 2] = ["10.1.3.3", "fd00::3:3"];
const VIP: [&str; 2] = ["10.96.0.80", "fd00:96::80"];
const RESOLVER: &str = "10.96.0.10";
/// A cache on the node, as NodeLocal DNSCache has it.
const NODE_CACHE: &str = "169.254.20.10";

fn secret(address: IpAddr) -> StaticSecret {
    let mut key = [7; 32];
    match address {
        IpAddr::V4(v4) => key[8..12].copy_from_slice(&v4.octets()),
        IpAddr::V6(v6) => key[8..24].copy_from_slice(&v6.octets()),
    }
    StaticSecret(key)
}

fn workload(address: IpAddr) -> Change {
    let keys = PeerKeys { public: secret(address).public(), psk: PresharedKey([9; 32]) };
    Change::SetWorkload(Workload { address, keys, accept: None })
}

fn vip(address: &str, endpoints: &[&str]) -> Change {
    let port = |protocol| ServicePort {
        protocol,
        port: 80,
        endpoints: endpoints
            .iter()
            .map(|e| ServiceEndpoint { address: ip(e), port: 8080, ready: true })
            .collect(),
    };
    let ports = vec![port(Protocol::Tcp), port(Protocol::Udp)];
    Change::SetVip(Vip { address: ip(address), ports, client_ip_affinity: false })
}

fn engine(seed: u8, own: &[IpAddr], mode: Mode) -> Engine {
    Engine::new(config(seed, own, mode))
}

fn config(seed: u8, own: &[IpAddr], mode: Mode) -> Config {
    Config {
        identities: own.iter().map(|a| Identity { address: *a, secret: secret(*a) }).collect(),
        port: PORT,
        resolvers: vec![ip(RESOLVER), ip(NODE_CACHE)],
        zone: Some("shop.svc.cluster.local.".parse().unwrap()),
        link_mtu: 1450,
        seed: [seed; 32],
        balance_seed: [seed; 16],
        options: Options::default(),
        coalesce: true,
        coalesce_udp: true,
        mode,
        ranges: Ranges::default(),
        dns_gate: true,
    }
}

struct Node {
    engine: Engine,
    own: Vec<IpAddr>,
    inbox: Vec<(VnetHeader, Vec<u8>)>,
    batches: Vec<Batch>,
    applied: Vec<Batch>,
    /// The guard's set: sealed datagrams and handshake messages may go there.
    peers: BTreeSet<IpAddr>,
    applies: bool,
    /// No agent: nobody reads the tunnel's port.
    absent: bool,
    /// Initiations that nobody read.
    unread: usize,
}

struct Network {
    nodes: Vec<Node>,
    now: Now,
    /// Every datagram that crossed the network.
    wire: Vec<Vec<u8>>,
}

impl Network {
    fn new(pods: &[[&str; 2]]) -> Self {
        Self::with_mode(pods, Mode::Strict)
    }

    fn with_mode(pods: &[[&str; 2]], mode: Mode) -> Self {
        let now = Now { instant: test_start(), wall: Duration::from_secs(1_700_000_000) };
        let nodes = pods.iter().enumerate().map(|(n, addresses)| {
            let own: Vec<IpAddr> = addresses.iter().map(|a| ip(a)).collect();
            let engine = engine(u8::try_from(n).unwrap(), &own, mode);
            Node {
                engine,
                own,
                inbox: Vec::new(),
                batches: Vec::new(),
                applied: Vec::new(),
                peers: BTreeSet::new(),
                applies: true,
                absent: false,
                unread: 0,
            }
        });
        Self { nodes: nodes.collect(), now, wire: Vec::new() }
    }

    /// Client, server and third pod that know each other and the VIPs.
    fn project() -> Self {
        let mut network = Self::new(&[CLIENT, SERVER, THIRD]);
        for node in 0..3 {
            network.tell(node, everything());
        }
        network
    }

    fn tell(&mut self, node: usize, changes: Vec<Change>) {
        self.nodes[node].engine.handle_directory(changes, self.now);
        self.run();
    }

    fn capture(&mut self, node: usize, packet: &[u8]) {
        self.capture_burst(node, VnetHeader::PLAIN, packet);
    }

    fn capture_burst(&mut self, node: usize, vnet: VnetHeader, packet: &[u8]) {
        self.hand_over(node, vnet, packet);
        self.run();
    }

    fn hand_over(&mut self, node: usize, vnet: VnetHeader, packet: &[u8]) {
        let engine = &mut self.nodes[node].engine;
        let len = VNET_HEADER_LEN + packet.len();
        let buffer = engine.capture_buffer().unwrap();
        buffer[..VNET_HEADER_LEN].copy_from_slice(&vnet.encode());
        buffer[VNET_HEADER_LEN..len].copy_from_slice(packet);
        engine.handle_captured(len);
        engine.poll_captured(self.now).unwrap();
    }

    fn advance(&mut self, duration: Duration) {
        let end = self.now.instant + duration;
        while self.now.instant < end {
            let step = Duration::from_millis(50).min(end - self.now.instant);
            self.now = Now { instant: self.now.instant + step, wall: self.now.wall + step };
            for node in &mut self.nodes {
                node.engine.handle_timeout(self.now);
            }
            self.run();
        }
    }

    /// Does everything that is due, and carries everything that is under way.
    fn run(&mut self) {
        self.carry(true);
    }

    /// Carries everything that is under way. `steps`: also does everything that is due.
    fn carry(&mut self, steps: bool) {
        loop {
            let mut moved = false;
            for n in 0..self.nodes.len() {
                let node = &mut self.nodes[n];
                node.collect();
                if steps && node.engine.poll_timeout().is_some_and(|at| at <= self.now.instant) {
                    node.engine.handle_timeout(self.now);
                    moved = true;
                }
                while let Some(batch) = node.engine.poll_batch() {
                    node.batches.push(batch);
                }
                if node.applies {
                    for batch in std::mem::take(&mut node.batches) {
                        node.engine.handle_applied(batch.id, true, self.now);
                        node.note_peers(&batch);
                        node.applied.push(batch);
                        moved = true;
                    }
                }
                let mut sent = Vec::new();
                while let Some(t) = node.engine.poll_transmit() {
                    // The guard would answer EPERM, and the datagram would be lost.
                    assert!(node.peers.contains(&t.to.ip()), "sent to {} before it is connected", t.to);
                    check_transmit(&t);
                    sent.push((t.to, t.bytes.to_vec(), t.segment));
                }
                if self.nodes[n].absent {
                    sent.clear();
                }
                for (to, bytes, segment) in sent {
                    moved = true;
                    self.wire.extend(bytes.chunks(segment).map(<[u8]>::to_vec));
                    self.deliver(n, to, &bytes, segment);
                }
            }
            if !moved {
                break;
            }
        }
        self.nodes.iter_mut().for_each(Node::collect);
    }

    fn deliver(&mut self, from: usize, to: SocketAddr, bytes: &[u8], segment: usize) {
        let own = |node: &Node| node.own.iter().copied().find(|a| a.is_ipv4() == to.is_ipv4()).unwrap();
        let source = SocketAddr::new(own(&self.nodes[from]), PORT);
        let Some(node) = self.nodes.iter_mut().find(|node| node.own.contains(&to.ip())) else { return };
        if node.absent {
            node.unread += usize::from(bytes.first() == Some(&1));
            return;
        }
        node.engine.receive_buffer()[..bytes.len()].copy_from_slice(bytes);
        node.engine.handle_datagrams(source, bytes.len(), segment, self.now);
        node.collect();
    }

    fn inbox(&mut self, node: usize) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.nodes[node].inbox).into_iter().map(|(_, packet)| packet).collect()
    }

    fn dropped(&self, node: usize, reason: DropReason) -> u64 {
        self.nodes[node].engine.counters().dropped(reason)
    }

    fn says(&self, bytes: &[u8]) -> bool {
        self.wire.iter().any(|datagram| datagram.windows(bytes.len()).any(|w| w == bytes))
    }
}

impl Node {
    fn note_peers(&mut self, batch: &Batch) {
        for change in &batch.changes {
            match change {
                RouteChange::Connect(address) => drop(self.peers.insert(*address)),
                RouteChange::Disconnect(address) => drop(self.peers.remove(address)),
                _ => {}
            }
        }
    }

    fn collect(&mut self) {
        while let Some(packet) = self.engine.poll_inject() {
            let bytes = packet.parts.iter().flat_map(|range| packet.buffer[range.clone()].to_vec()).collect();
            self.inbox.push((packet.vnet, bytes));
        }
    }
}

/// The guard reads the type word of a train's first segment, and asks for the exact length of what is not data: initiation,
/// response, cookie. So each of those is a datagram of its own, and a train is of data alone.
fn check_transmit(transmit: &Transmit<'_>) {
    let Transmit { bytes, segment, packets, .. } = transmit;
    let kinds = bytes
        .chunks(*segment)
        .map(|datagram| (datagram[..4] == [datagram[0], 0, 0, 0]).then_some(datagram[0]));
    let kinds: Vec<_> = kinds.collect();
    match (*packets, kinds[..].first().copied().flatten()) {
        (false, Some(kind @ 1..=3)) => {
            let length = [148, 92, 64][usize::from(kind) - 1];
            assert_eq!((bytes.len(), *segment), (length, length), "message of type {kind}");
        }
        (false, Some(4)) => assert_eq!((bytes.len(), *segment), (32, 32), "keepalive"),
        (true, Some(4)) => assert!(kinds.iter().all(|kind| *kind == Some(4)), "{kinds:?}"),
        _ => panic!("{kinds:?} of {} bytes", bytes.len()),
    }
}

fn everything() -> Vec<Change> {
    let mut changes: Vec<_> = [CLIENT, SERVER, THIRD].concat().iter().map(|a| workload(ip(a))).collect();
    changes.extend((0..2).map(|family| vip(VIP[family], &[SERVER[family]])));
    changes
}

fn builder(source: IpAddr, destination: IpAddr) -> etherparse::PacketBuilderStep<etherparse::IpHeaders> {
    match (source, destination) {
        (IpAddr::V4(s), IpAddr::V4(d)) => PacketBuilder::ipv4(s.octets(), d.octets(), 64),
        (IpAddr::V6(s), IpAddr::V6(d)) => PacketBuilder::ipv6(s.octets(), d.octets(), 64),
        _ => panic!("families differ"),
    }
}

fn udp(source: (&str, u16), destination: (&str, u16), payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let built = builder(ip(source.0), ip(destination.0)).udp(source.1, destination.1);
    built.write(&mut out, payload).unwrap();
    out
}

fn syn(source: (&str, u16), destination: (&str, u16)) -> Vec<u8> {
    let mut out = Vec::new();
    let built = builder(ip(source.0), ip(destination.0)).tcp(source.1, destination.1, 1000, 64_000).syn();
    built.write(&mut out, &[]).unwrap();
    out
}

fn syn_ack(source: (&str, u16), destination: (&str, u16)) -> Vec<u8> {
    let mut out = Vec::new();
    let built = builder(ip(source.0), ip(destination.0)).tcp(source.1, destination.1, 1000, 64_000);
    built.syn().ack(1001).write(&mut out, &[]).unwrap();
    out
}

/// A segment with ACK set.
fn data(source: (&str, u16), destination: (&str, u16), payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let built = builder(ip(source.0), ip(destination.0)).tcp(source.1, destination.1, 1001, 64_000).ack(1);
    built.write(&mut out, payload).unwrap();
    out
}

/// Both fragments, cut at 1,200 bytes, of an IPv4 packet that has no options.
fn fragments(whole: &[u8], id: u16) -> [Vec<u8>; 2] {
    [(0, 20 + 1200), (1200, whole.len())].map(|(offset, end): (usize, usize)| {
        let mut part = whole[..20].to_vec();
        part.extend(&whole[20 + offset..end]);
        let length = u16::try_from(part.len()).unwrap();
        part[2..4].copy_from_slice(&length.to_be_bytes());
        part[4..6].copy_from_slice(&id.to_be_bytes());
        let field = u16::try_from(offset / 8).unwrap() | if offset == 0 { 0x2000 } else { 0 };
        part[6..8].copy_from_slice(&field.to_be_bytes());
        part[10..12].fill(0);
        let sum = !crate::wire::checksum::sum(&part[..20]);
        part[10..12].copy_from_slice(&sum.to_be_bytes());
        part
    })
}

/// Source, destination and payload; panics where a checksum is wrong.
fn read(packet: &[u8]) -> (SocketAddr, SocketAddr, Vec<u8>) {
    let sliced = SlicedPacket::from_ip(packet).unwrap();
    let (source, destination): (IpAddr, IpAddr) = match sliced.net.as_ref().unwrap() {
        NetSlice::Ipv4(v4) => {
            assert_eq!(v4.header().to_header().calc_header_checksum(), v4.header().header_checksum());
            (v4.header().source_addr().into(), v4.header().destination_addr().into())
        }
        NetSlice::Ipv6(v6) => (v6.header().source_addr().into(), v6.header().destination_addr().into()),
        NetSlice::Arp(_) => panic!("ARP"),
    };
    let parsed = crate::wire::packet::Packet::parse(packet).unwrap();
    assert!(crate::wire::checksum::transport_checksum_ok(packet, &parsed), "transport checksum");
    match sliced.transport.unwrap() {
        TransportSlice::Udp(u) => (
            SocketAddr::new(source, u.source_port()),
            SocketAddr::new(destination, u.destination_port()),
            u.payload().to_vec(),
        ),
        TransportSlice::Tcp(t) => (
            SocketAddr::new(source, t.source_port()),
            SocketAddr::new(destination, t.destination_port()),
            t.payload().to_vec(),
        ),
        _ => {
            (SocketAddr::new(source, 0), SocketAddr::new(destination, 0), packet[parsed.transport..].to_vec())
        }
    }
}

fn at(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip(address), port)
}

#[test]
fn a_packet_to_a_vip_travels_sealed_is_dnatted_and_its_reply_bears_the_vip() {
    for family in 0..2 {
        let mut network = Network::project();
        network.capture(0, &udp((CLIENT[family], 4000), (VIP[family], 80), b"CANARY question"));
        let got = network.inbox(1);
        assert_eq!(got.len(), 1);
        assert_eq!(
            read(&got[0]),
            (at(CLIENT[family], 4000), at(SERVER[family], 8080), b"CANARY question".to_vec())
        );
        network.capture(1, &udp((SERVER[family], 8080), (CLIENT[family], 4000), b"CANARY answer"));
        let got = network.inbox(0);
        assert_eq!(read(&got[0]), (at(VIP[family], 80), at(CLIENT[family], 4000), b"CANARY answer".to_vec()));
        assert!(!network.says(b"CANARY"), "plaintext on the wire");
        let sealed: u64 = network.nodes.iter().map(|n| n.engine.counters().sealed).sum();
        let opened: u64 = network.nodes.iter().map(|n| n.engine.counters().opened).sum();
        assert_eq!((sealed, opened), (2, 2));
    }
}

#[test]
fn every_ip_protocol_reaches_a_pod_by_its_own_address_unchanged() {
    let mut network = Network::project();
    for protocol in [47, 50, 132, 253] {
        let mut packet = Vec::new();
        let built = builder(ip(CLIENT[0]), ip(SERVER[0]));
        built.write(&mut packet, IpNumber(protocol), &[0; 40]).unwrap();
        network.capture(0, &packet);
        assert_eq!(network.inbox(1), [packet]);
    }
}

#[test]
fn first_packet_of_a_peer_is_injected_only_after_its_own_address_is_routed() {
    let mut network = Network::new(&[CLIENT, SERVER]);
    network.tell(0, everything());
    network.nodes[1].applies = false;
    network.tell(1, everything());
    network.capture(0, &udp((CLIENT[0], 4000), (SERVER[0], 8080), b"early"));
    assert!(network.inbox(1).is_empty());
    network.nodes[1].applies = true;
    network.run();
    assert_eq!(read(&network.inbox(1)[0]).2, b"early");
}

#[test]
fn a_large_burst_arrives_as_the_same_stream_with_complete_checksums() {
    let mut network = Network::project();
    network.capture(0, &syn((CLIENT[0], 4000), (SERVER[0], 8080)));
    network.inbox(1);
    let payload: Vec<u8> = (0..40_000u32).map(|i| u8::try_from(i % 251).unwrap()).collect();
    let mut packet = Vec::new();
    let built = builder(ip(CLIENT[0]), ip(SERVER[0])).tcp(4000, 8080, 1001, 64_000).ack(1).psh();
    built.write(&mut packet, &payload).unwrap();
    // What the kernel leaves in the field of a partial checksum: the sum over the pseudo header.
    let tcp_len = u16::try_from(packet.len() - 20).unwrap();
    let partial = crate::wire::checksum::pseudo_header(&packet[12..20], 6, usize::from(tcp_len));
    packet[36..38].copy_from_slice(&partial.to_be_bytes());
    let vnet =
        VnetHeader { gso: Gso::Tcp4(1336), header_len: 40, partial_checksum: Some((20, 16)), ecn: false };
    network.capture_burst(0, vnet, &packet);
    let trains = std::mem::take(&mut network.nodes[1].inbox);
    assert!(trains.len() <= 2, "{} trains", trains.len());
    let got: Vec<u8> = trains.iter().flat_map(|(_, packet)| packet[40..].to_vec()).collect();
    assert!(got == payload);
    assert!(trains.iter().all(|(vnet, _)| vnet.partial_checksum.is_some()));
}

#[test]
fn a_server_whose_directory_is_behind_holds_then_serves() {
    let mut network = Network::new(&[CLIENT, SERVER]);
    network.tell(0, everything());
    network.capture(0, &syn((CLIENT[0], 4000), (VIP[0], 80)));
    network.advance(Duration::from_secs(2));
    assert!(network.inbox(1).is_empty());
    network.tell(1, everything());
    assert_eq!(network.inbox(1).len(), 1, "kept initiation and staged packet");
    assert_eq!(network.dropped(0, DropReason::PeerSilent), 0);
}

#[test]
fn a_silent_peer_is_reported_to_the_application_after_three_seconds() {
    let mut network = Network::new(&[CLIENT]);
    network.tell(0, everything());
    network.capture(0, &syn((CLIENT[0], 4000), (SERVER[0], 8080)));
    network.advance(Duration::from_millis(2900));
    assert!(network.inbox(0).is_empty());
    network.advance(Duration::from_millis(200));
    let error = &network.inbox(0)[0];
    assert_eq!((error[20], error[21]), (3, 13));
    assert_eq!(error[12..16], [10, 1, 2, 2], "the error's source is the destination it is about");
    assert_eq!(network.dropped(0, DropReason::PeerSilent), 1);
}

#[test]
fn a_peer_that_speaks_for_another_address_or_an_unpinned_vip_is_refused() {
    let mut network = Network::project();
    network.capture(2, &udp((THIRD[0], 1), (CLIENT[0], 1), b"hello"));
    network.inbox(0);
    // The third pod's agent is made to believe that it owns these sources.
    for forged in [SERVER[0], VIP[0], CLIENT[0], "127.0.0.1", "224.0.0.1"] {
        network.nodes[2].engine.own.push(ip(forged));
        network.capture(2, &udp((forged, 80), (CLIENT[0], 4000), b"forged"));
        assert!(network.inbox(0).is_empty(), "{forged}");
    }
    assert_eq!(network.dropped(0, DropReason::NotOwner), 5);
    // Nor may it answer in a flow that is pinned to the server.
    network.capture(0, &udp((CLIENT[0], 4000), (VIP[0], 80), b"question"));
    network.capture(2, &udp((VIP[0], 80), (CLIENT[0], 4000), b"forged"));
    assert!(network.inbox(0).is_empty());
    assert_eq!(network.dropped(0, DropReason::NotOwner), 6);
}

#[test]
fn a_wrong_project_key_opens_nothing() {
    let mut network = Network::new(&[CLIENT, SERVER]);
    network.tell(0, everything());
    let wrong = |a: &str| {
        Change::SetWorkload(Workload {
            address: ip(a),
            keys: PeerKeys { public: secret(ip(a)).public(), psk: PresharedKey([1; 32]) },
            accept: None,
        })
    };
    network.tell(1, vec![wrong(CLIENT[0])]);
    network.capture(0, &udp((CLIENT[0], 1), (SERVER[0], 1), b"x"));
    network.advance(Duration::from_secs(4));
    assert!(network.inbox(1).is_empty());
    assert_eq!(network.nodes[1].engine.counters().opened, 0);
    assert_eq!(network.dropped(0, DropReason::PeerSilent), 1);
}

#[test]
fn a_service_without_endpoints_answers_at_once_with_a_reset_or_an_error() {
    let mut network = Network::project();
    network.tell(0, vec![vip("10.96.0.81", &[])]);
    network.capture(0, &syn((CLIENT[0], 4000), ("10.96.0.81", 80)));
    let reset = network.inbox(0);
    assert_eq!(read(&reset[0]).0, at("10.96.0.81", 80));
    assert_eq!(reset[0][33] & 0x04, 0x04, "RST");
    network.capture(0, &udp((CLIENT[0], 4000), ("10.96.0.81", 80), b""));
    assert_eq!(network.inbox(0)[0][20..22], [3, 3]);
    network.capture(0, &syn((CLIENT[0], 4000), (VIP[0], 81)));
    assert_eq!(network.inbox(0).len(), 1);
    assert_eq!(network.dropped(0, DropReason::NoEndpoint), 2);
    assert_eq!(network.dropped(0, DropReason::ServiceUnknown), 1);
}

#[test]
fn a_pod_reaches_itself_through_a_vip() {
    for family in 0..2 {
        let mut network = Network::project();
        network.capture(1, &udp((SERVER[family], 4000), (VIP[family], 80), b"me?"));
        let got = network.inbox(1);
        assert_eq!(read(&got[0]), (at(VIP[family], 4000), at(SERVER[family], 8080), b"me?".to_vec()));
        network.capture(1, &udp((SERVER[family], 8080), (VIP[family], 4000), b"me."));
        let got = network.inbox(1);
        assert_eq!(read(&got[0]), (at(VIP[family], 80), at(SERVER[family], 4000), b"me.".to_vec()));
        assert!(network.wire.is_empty());
    }
}

#[test]
fn the_same_source_port_to_a_vip_and_to_the_pod_stays_two_flows() {
    let mut network = Network::project();
    network.capture(0, &udp((CLIENT[0], 4000), (SERVER[0], 8080), b"direct"));
    network.capture(0, &udp((CLIENT[0], 4000), (VIP[0], 80), b"by vip"));
    let got = network.inbox(1);
    let (direct, by_vip) = (read(&got[0]), read(&got[1]));
    assert_ne!(direct.0, by_vip.0);
    network.capture(1, &udp((SERVER[0], 8080), (CLIENT[0], by_vip.0.port()), b"to vip flow"));
    network.capture(1, &udp((SERVER[0], 8080), (CLIENT[0], direct.0.port()), b"to direct flow"));
    let got = network.inbox(0);
    assert_eq!(read(&got[0]), (at(VIP[0], 80), at(CLIENT[0], 4000), b"to vip flow".to_vec()));
    assert_eq!(read(&got[1]), (at(SERVER[0], 8080), at(CLIENT[0], 4000), b"to direct flow".to_vec()));
    // And the other way round.
    network.capture(0, &udp((CLIENT[0], 5000), (VIP[0], 80), b"by vip"));
    network.capture(0, &udp((CLIENT[0], 5000), (SERVER[0], 8080), b"direct"));
    let got = network.inbox(1);
    assert_ne!(read(&got[0]).0, read(&got[1]).0);
}

#[test]
fn without_offloads_each_packet_is_injected_by_itself() {
    let mut network = Network::project();
    network.nodes[1].engine.coalesce = false;
    network.capture(0, &udp((CLIENT[0], 4000), (SERVER[0], 8080), b"opens the session"));
    let packets = [1, 2, 3].map(|n| udp((CLIENT[0], 4000), (SERVER[0], 8080), &[n; 500]));
    packets.iter().for_each(|packet| network.hand_over(0, VnetHeader::PLAIN, packet));
    network.run();
    let got = std::mem::take(&mut network.nodes[1].inbox);
    assert!(got.iter().all(|(vnet, _)| *vnet == VnetHeader::PLAIN));
    assert_eq!(got[1..].iter().map(|(_, packet)| packet.clone()).collect::<Vec<_>>(), packets);
}

#[test]
fn icmp_errors_come_back_with_the_addresses_their_receiver_used() {
    for family in 0..2 {
        let mut network = Network::project();
        network.capture(0, &udp((CLIENT[family], 4000), (VIP[family], 80), b"is anybody there"));
        let delivered = network.inbox(1).remove(0);
        let mut error = Vec::new();
        assert!(crate::wire::icmp::icmp_error(
            crate::wire::icmp::IcmpError::PortUnreachable,
            &delivered,
            &mut error
        ));
        network.capture(1, &error);
        let got = network.inbox(0);
        let parsed = crate::wire::packet::Packet::parse(&got[0]).unwrap();
        assert!(crate::wire::checksum::transport_checksum_ok(&got[0], &parsed));
        let quoted = parsed.embedded(&got[0]).unwrap();
        let inner = crate::wire::packet::Packet::parse_embedded(&got[0][quoted.clone()]).unwrap();
        assert_eq!((inner.source, inner.destination), (ip(CLIENT[family]), ip(VIP[family])));
        assert_eq!(inner.ports(&got[0][quoted]), Some((4000, 80)));
    }
}

#[test]
fn fragments_follow_their_first_fragment_through_nat() {
    let mut network = Network::project();
    let [first, later] = fragments(&udp((CLIENT[0], 4000), (VIP[0], 80), &[0x55; 2000]), 0x1234);
    network.capture(0, &later);
    assert_eq!(network.dropped(0, DropReason::FragmentUnmatched), 1);
    network.capture(0, &first);
    network.capture(0, &later);
    let got = network.inbox(1);
    assert_eq!(got.len(), 2);
    for part in &got {
        assert_eq!(part[16..20], [10, 1, 2, 2], "both go to the pod");
    }
    let mut datagram = udp((CLIENT[0], 4000), (SERVER[0], 8080), &[0x55; 2000]);
    assert_eq!([&got[0][20..], &got[1][20..]].concat(), datagram.split_off(20));
}

#[test]
fn a_peer_that_left_the_directory_is_refused_and_its_address_stays_closed() {
    let mut network = Network::project();
    network.capture(0, &udp((CLIENT[0], 4000), (SERVER[0], 8080), b"x"));
    network.inbox(1);
    network.tell(0, vec![Change::RemoveWorkload(ip(SERVER[0]))]);
    network.capture(0, &udp((CLIENT[0], 4000), (SERVER[0], 8080), b"x"));
    network.capture(1, &udp((SERVER[0], 8080), (CLIENT[0], 4000), b"x"));
    network.advance(Duration::from_secs(2));
    assert!(network.inbox(1).is_empty());
    assert!(network.nodes[0].engine.is_protected(ip(SERVER[0])));
}

#[test]
fn our_own_tunnel_packets_and_link_scope_packets_are_never_sealed() {
    let mut network = Network::project();
    network.capture(0, &udp((CLIENT[0], PORT), (SERVER[0], PORT), b"loop"));
    network.capture(0, &udp((CLIENT[0], 1), ("224.0.0.251", 5353), b"mdns"));
    network.capture(0, &udp(("10.9.9.9", 1), (SERVER[0], 1), b"spoofed"));
    network.capture(0, &[0x45, 0]);
    assert!(network.wire.is_empty());
    let reasons = [DropReason::Loop, DropReason::LinkScope, DropReason::NotOwner, DropReason::Malformed];
    assert_eq!(reasons.map(|reason| network.dropped(0, reason)), [1; 4]);
}

#[test]
fn two_hundred_flows_spread_over_two_backends_and_keep_their_choice() {
    let mut network = Network::project();
    let both = vec![vip(VIP[0], &[SERVER[0], THIRD[0]])];
    (0..3).for_each(|node| network.tell(node, both.clone()));
    let mut served = BTreeMap::new();
    for round in 0..2 {
        for port in 1000..1200 {
            network.capture(0, &udp((CLIENT[0], port), (VIP[0], 80), b"x"));
            for node in 1..3 {
                for packet in network.inbox(node) {
                    assert_eq!(read(&packet).0, at(CLIENT[0], port));
                    let before = served.insert(port, node);
                    assert!(round == 0 || before == Some(node));
                }
            }
        }
    }
    let first = served.values().filter(|node| **node == 1).count();
    assert!((70..=130).contains(&first), "{first} of 200");
}

#[test]
fn a_packet_too_big_for_the_tunnel_is_answered_with_the_size_that_fits() {
    let mut network = Network::project();
    network.capture(0, &udp((CLIENT[0], 1), (SERVER[0], 1), &[0; 1400]));
    let error = &network.inbox(0)[0];
    assert_eq!((error[20], error[21]), (3, 4));
    assert_eq!(u16::from_be_bytes([error[26], error[27]]), 1376);
    assert_eq!(network.dropped(0, DropReason::TooBig), 1);
}

#[test]
fn small_packets_for_one_peer_share_a_send_and_arrive_in_order() {
    let mut network = Network::project();
    network.capture(0, &udp((CLIENT[0], 4000), (SERVER[0], 8080), b"opens the session"));
    network.inbox(1);
    for n in 0..80u8 {
        // The 70th is shorter: it ends its train.
        let packet = udp((CLIENT[0], 4000), (SERVER[0], 8080), &vec![n; if n == 70 { 20 } else { 500 }]);
        network.hand_over(0, VnetHeader::PLAIN, &packet);
    }
    let engine = &mut network.nodes[0].engine;
    let mut sends = Vec::new();
    while let Some(t) = engine.poll_transmit() {
        sends.push((t.to, t.bytes.to_vec(), t.segment));
    }
    let counts: Vec<usize> = sends.iter().map(|(_, bytes, segment)| bytes.len().div_ceil(*segment)).collect();
    assert_eq!(counts, [64, 7, 9]);
    for (to, bytes, segment) in sends {
        network.deliver(0, to, &bytes, segment);
    }
    let got: Vec<u8> = std::mem::take(&mut network.nodes[1].inbox)
        .iter()
        .flat_map(|(vnet, packet)| {
            let size = if let Gso::Udp(size) = vnet.gso { usize::from(size) } else { packet.len() - 28 };
            packet[28..].chunks(size).map(|datagram| datagram[0]).collect::<Vec<_>>()
        })
        .collect();
    assert_eq!(got, (0..80).collect::<Vec<u8>>());
}
