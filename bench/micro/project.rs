//! A project to measure with: addresses, keys, packets, and engines that know each other.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use etherparse::PacketBuilder;
use tencrypt::proto::directory::{Change, Protocol, ServiceEndpoint, ServicePort, Vip, Workload};
use tencrypt::proto::ladder::Mode;
use tencrypt::proto::noise::{Identity, Options, PeerKeys, PresharedKey, StaticSecret, Suite};
use tencrypt::proto::ranges::Ranges;
use tencrypt::proto::{Config, Engine, Now};
use tencrypt::wire::vnet::{VNET_HEADER_LEN, VnetHeader};

pub(crate) const PORT: u16 = 51820;
pub(crate) const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 1, 1, 1);
pub(crate) const SERVER: Ipv4Addr = Ipv4Addr::new(10, 1, 2, 2);
/// Port 80 of it leads to the server's 8080.
pub(crate) const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 80);
pub(crate) const RESOLVER: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);

/// A fake clock that the real one started.
pub(crate) fn start() -> Now {
    Now { instant: Instant::now(), wall: Duration::from_secs(1_700_000_000) }
}

pub(crate) fn later(now: Now, by: Duration) -> Now {
    Now { instant: now.instant + by, wall: now.wall + by }
}

pub(crate) fn secret(address: Ipv4Addr) -> StaticSecret {
    let mut key = [7; 32];
    key[8..12].copy_from_slice(&address.octets());
    StaticSecret(key)
}

pub(crate) fn keys(address: Ipv4Addr) -> PeerKeys {
    PeerKeys { public: secret(address).public(), psk: PresharedKey([9; 32]) }
}

pub(crate) fn vip(address: Ipv4Addr, endpoint: Ipv4Addr) -> Change {
    let endpoints = vec![ServiceEndpoint { address: endpoint.into(), port: 8080, ready: true }];
    let port = |protocol| ServicePort { protocol, port: 80, endpoints: endpoints.clone() };
    let ports = vec![port(Protocol::Tcp), port(Protocol::Udp)];
    Change::SetVip(Vip { address: address.into(), ports, client_ip_affinity: false })
}

/// Client, server, and the service.
pub(crate) fn directory() -> Vec<Change> {
    let workload =
        |address: Ipv4Addr| Workload { address: address.into(), keys: keys(address), accept: None };
    vec![Change::SetWorkload(workload(CLIENT)), Change::SetWorkload(workload(SERVER)), vip(SERVICE, SERVER)]
}

/// The address of one of many pods.
pub(crate) fn pod(n: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(0x0a02_0000 + n)
}

/// `count` workloads, and a VIP for every tenth. The keys are all one: the table does not care.
pub(crate) fn many(count: u32) -> Vec<Change> {
    let keys = keys(SERVER);
    let workload = |n| Workload { address: pod(n).into(), keys: keys.clone(), accept: None };
    let workloads = (0..count).map(|n| Change::SetWorkload(workload(n)));
    workloads.chain((0..count / 10).map(|n| vip(pod(1 << 20 | n), pod(n)))).collect()
}

pub(crate) fn engine(own: Ipv4Addr, suite: Suite, mode: Mode) -> Engine {
    let [.., last] = own.octets();
    Engine::new(Config {
        identities: vec![Identity { address: own.into(), secret: secret(own) }],
        port: PORT,
        resolvers: vec![RESOLVER.into()],
        zone: Some("shop.svc.cluster.local.".parse().expect("a name")),
        link_mtu: 1500,
        seed: [last; 32],
        balance_seed: [1; 16],
        options: options(suite),
        coalesce: true,
        coalesce_udp: true,
        mode,
        ranges: Ranges::default(),
        dns_gate: true,
    })
}

/// Sessions that last as long as a benchmark does.
pub(crate) fn options(suite: Suite) -> Options {
    Options { rekey_after_messages: u64::MAX / 4, reject_after_messages: u64::MAX / 2, ..Options::of(suite) }
}

/// Does everything that is due, and applies every batch.
pub(crate) fn settle(engine: &mut Engine, now: Now) {
    loop {
        let due = engine.poll_timeout().is_some_and(|at| at <= now.instant);
        if due {
            engine.handle_timeout(now);
        }
        let batch = engine.poll_batch();
        if let Some(batch) = &batch {
            engine.handle_applied(batch.id, true, now);
        }
        if !due && batch.is_none() {
            return;
        }
    }
}

/// Puts a packet into the engine as `tenc0` would.
pub(crate) fn capture(engine: &mut Engine, vnet: &VnetHeader, packet: &[u8], now: Now) {
    let len = VNET_HEADER_LEN + packet.len();
    let buffer = engine.capture_buffer().expect("nothing waits");
    buffer[..VNET_HEADER_LEN].copy_from_slice(&vnet.encode());
    buffer[VNET_HEADER_LEN..len].copy_from_slice(packet);
    engine.handle_captured(len);
    engine.poll_captured(now);
}

/// Client and server with a session.
pub(crate) struct Pair {
    pub(crate) client: Engine,
    pub(crate) server: Engine,
    pub(crate) now: Now,
}

impl Pair {
    pub(crate) fn new(suite: Suite) -> Self {
        let now = start();
        let [client, server] = [CLIENT, SERVER].map(|own| {
            let mut engine = engine(own, suite, Mode::Strict);
            engine.handle_directory(directory(), now);
            settle(&mut engine, now);
            engine
        });
        let mut pair = Self { client, server, now };
        capture(&mut pair.client, &VnetHeader::PLAIN, &udp((CLIENT, 9), (SERVER, 9), b"first"), now);
        let mut arrived = 0;
        for _ in 0..4 {
            arrived += pair.carry();
            carry(&mut pair.server, SERVER, &mut pair.client, now);
        }
        assert_eq!(arrived, 1, "there is no session");
        pair
    }

    /// Carries what the client sends; returns how many packets the server's pod gets.
    pub(crate) fn carry(&mut self) -> usize {
        carry(&mut self.client, CLIENT, &mut self.server, self.now)
    }
}

fn carry(from: &mut Engine, source: Ipv4Addr, to: &mut Engine, now: Now) -> usize {
    let mut packets = 0;
    let source = SocketAddr::new(source.into(), PORT);
    while let Some(sent) = from.poll_transmit() {
        let len = sent.bytes.len();
        to.receive_buffer()[..len].copy_from_slice(sent.bytes);
        to.handle_datagrams(source, len, sent.segment, now);
        while let Some(inject) = to.poll_inject() {
            packets += inject.parts.len();
            std::hint::black_box(inject);
        }
    }
    packets
}

pub(crate) fn udp(source: (Ipv4Addr, u16), destination: (Ipv4Addr, u16), payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let built =
        PacketBuilder::ipv4(source.0.octets(), destination.0.octets(), 64).udp(source.1, destination.1);
    built.write(&mut out, payload).expect("memory is the only limit");
    out
}

pub(crate) fn tcp(
    source: (Ipv4Addr, u16),
    destination: (Ipv4Addr, u16),
    syn: bool,
    payload: &[u8],
) -> Vec<u8> {
    let mut out = Vec::new();
    let built = PacketBuilder::ipv4(source.0.octets(), destination.0.octets(), 64);
    let built = built.tcp(source.1, destination.1, 1000, 64_000);
    let built = if syn { built.syn() } else { built.ack(1) };
    built.write(&mut out, payload).expect("memory is the only limit");
    out
}
