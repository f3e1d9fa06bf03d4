//! What a pod of another project may try against protected pods of its own bridge, with every capability in its namespace.
//!
//! 1. it writes frames of every shape to its own device: plaintext in a peer's name, datagrams in a peer's name, probes
//!    of addresses that a protected pod has inside
//! 2. control: against pods without agents the same frames are delivered and answered, or a true one among them is
//! 3. with agents, while the project's traffic runs: they arrive at the pod's device, reach no application, are answered by
//!    nobody, and are counted
//!
//! May touch: sockets in the pods and on the node's side of their links. `replays` and `bridge` go on.

use std::collections::{BTreeMap, BTreeSet};
use std::mem::MaybeUninit;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use blake2::digest::FixedOutput as _;
use blake2::digest::consts::U16;
use blake2::{Blake2s256, Blake2sMac, Digest as _};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rand::SeedableRng as _;
use rand_chacha::ChaCha20Rng;

use tencrypt::launcher::keys::ProjectKey;
use tencrypt::proto::Now;
use tencrypt::proto::noise::{
    Identity, Options, PeerConfig, PeerKeys, PresharedKey, PublicKey, StaticSecret, Suite, Transport,
};

use crate::Case;
use crate::dns;
use crate::hostile::bytes;
use crate::lab::{Agents, Lab, PROJECT, RESOLVER, TUNNEL_PORT, echo_vips, web_vips};
use crate::load::{self, Canary};
use crate::packets::{self, CANARY};
use crate::pod::{Pod, Sniffer};
use crate::status;

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case::new("control_spoofed_plaintext_is_delivered_and_answered_without_agents", spoofed_in_clear)
        .agents(Agents::Off)
        .looks_itself(),
    Case::new("promise_9_plaintext_in_a_peers_name_is_neither_delivered_nor_answered", spoofed)
        .every_rp_filter()
        .looks_itself(),
    Case::new("promise_9_another_projects_own_plaintext_is_answered_as_ever", own_plaintext),
    Case::new("promise_6_forged_datagrams_are_counted_and_answered_by_nobody", forged)
        .looks_itself()
        .seconds(90),
    Case::new("promise_9_what_a_pod_has_inside_does_not_answer_its_neighbours", probed).looks_itself(),
    Case::new("promise_8_forged_answers_of_the_resolver_are_ignored", forged_answers).looks_itself(),
];

/// The pod of another project.
pub const ATTACKER: &str = "bank-client";
/// The pod that is attacked; a backend of every Service.
pub const VICTIM: &str = "shop-web1";
/// The peer on the same bridge in whose name it is attacked.
pub const PEER: &str = "shop-client";
/// Such a peer on the other node.
pub const FAR_PEER: &str = "shop-web2";

/// An application of the victim that never answers.
const APP: u16 = 9_600;
/// The echo server of every backend.
const ECHO: u16 = 7_007;
/// The web server of every backend.
const WEB: u16 = 8_080;
/// Nobody listens here.
const CLOSED: u16 = 9_612;
/// A port of the attacker's.
const FROM: u16 = 9_611;
const PROTOCOL: u8 = 253;
/// The ports of the agent's queries in a pod whose applications have the kernel's own choice.
const QUERY_PORTS: RangeInclusive<u16> = 61_000..=65_534;
/// How long nothing must happen.
pub const QUIET: Duration = Duration::from_millis(300);

/// The attacker's device, and whom it sends to.
pub struct Attack<'l> {
    pub attacker: &'l Pod,
    pub victim: &'l Pod,
    device: Sniffer,
    macs: ([u8; 6], [u8; 6]),
}

impl<'l> Attack<'l> {
    /// On `victim`, which is on the attacker's bridge. What the attacker says in its own name is another project's traffic.
    pub fn on(lab: &'l Lab, victim: &str) -> Self {
        lab.declare_hosts(lab.pod(ATTACKER).addresses());
        let (attacker, victim) = (lab.pod(ATTACKER), lab.pod(victim));
        Self { attacker, victim, device: attacker.sniff(), macs: (attacker.mac(), victim.mac()) }
    }

    /// Sends an IP packet, whatever its addresses, to the victim's device.
    pub fn send(&self, packet: &[u8]) {
        self.device.send(&packets::frame(self.macs.0, self.macs.1, packet));
    }

    /// Whether the frame is one of the attacker's.
    pub fn made(&self, frame: &[u8]) -> bool {
        frame.get(6..12) == Some(&self.macs.0[..])
    }
}

/// What the leak detector counted on its way out of the project's pods: the attacker's own frames come in.
pub fn assert_none_out(lab: &Lab) {
    let leaks = lab.leaks();
    let out = leaks.count(|pod, _, direction, _| pod.starts_with("shop-") && direction == "out");
    assert!(out == 0, "{out} packets in clear: {:?}", leaks.rows);
}

/// A bridge whose frames nobody redirects on their way: those for a Service would go to one of its pods.
pub struct PlainBridge<'l>(&'l Lab);

impl<'l> PlainBridge<'l> {
    /// Until it is dropped.
    pub fn new(lab: &'l Lab) -> Self {
        set_bridge_hooks(lab, '0');
        Self(lab)
    }
}

impl Drop for PlainBridge<'_> {
    fn drop(&mut self) {
        set_bridge_hooks(self.0, '1');
    }
}

fn set_bridge_hooks(lab: &Lab, to: char) {
    let command = format!("for f in /proc/sys/net/bridge/bridge-nf-call-ip*tables; do echo {to} >$f; done");
    let ran = lab.exec("node1", &command, Duration::from_secs(5));
    assert!(ran.code == 0, "{command}: {}", ran.err);
}

pub fn assert_unharmed(canary: &Canary) {
    assert!(canary.lost == 0 && canary.twice == 0, "the project's traffic was harmed: {canary:?}");
}

fn now() -> Now {
    Now { instant: Instant::now(), wall: SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970") }
}

pub fn grown(before: &BTreeMap<String, u64>, after: &BTreeMap<String, u64>, name: &str) -> u64 {
    after.get(name).copied().unwrap_or(0) - before.get(name).copied().unwrap_or(0)
}

// ---- plaintext in a peer's name

/// Plaintext of every shape.
fn volley(from: IpAddr, to: IpAddr) -> Vec<Vec<u8>> {
    let udp = |source, port| packets::udp(from, to, source, port, &CANARY.repeat(4));
    let mut packets = vec![
        udp(FROM, APP),
        udp(TUNNEL_PORT, APP),
        udp(FROM, ECHO),
        udp(FROM, TUNNEL_PORT),
        udp(TUNNEL_PORT, TUNNEL_PORT),
        packets::tcp_syn(from, to, FROM, WEB),
        packets::tcp_syn(from, to, FROM, CLOSED),
        packets::echo_request(from, to, CANARY),
        packets::other(from, to, PROTOCOL, CANARY),
    ];
    packets.extend(packets::fragments(&udp(FROM, APP), 32));
    // The first one looks like a datagram of the tunnel.
    let sealed = packets::udp(from, to, TUNNEL_PORT, TUNNEL_PORT, &[&[4, 0, 0, 0][..], &[0; 60]].concat());
    packets.extend(packets::fragments(&sealed, 16));
    packets
}

/// What became of a volley.
#[derive(Debug, Default)]
struct Came {
    /// Frames seen at the victim's device; of them, those between the tunnel's ports.
    arrived: usize,
    between_tunnels: usize,
    /// Messages that an application got.
    delivered: usize,
    /// Protocol and source port of whatever the victim said to the supposed sender in clear.
    answers: BTreeSet<(u8, Option<u16>)>,
}

fn fire(attack: &Attack, from: IpAddr) -> Came {
    let to = attack.victim.address(from);
    let app = attack.victim.udp((to, APP));
    let raw = attack.victim.raw(to, PROTOCOL.into());
    let tap = attack.victim.sniff();
    volley(from, to).iter().for_each(|packet| attack.send(packet));
    thread::sleep(QUIET);
    let mut came = Came::default();
    for frame in tap.drain() {
        let Some(seen) = packets::seen(&frame) else { continue };
        if attack.made(&frame) && (seen.from, seen.to) == (from, to) {
            came.arrived += 1;
            came.between_tunnels += usize::from(seen.ports == Some((TUNNEL_PORT, TUNNEL_PORT)));
        } else if (seen.from, seen.to) == (to, from)
            && packets::sealed(&frame).is_none()
            && !is_discovery(&frame)
        {
            came.answers.insert((seen.protocol, seen.ports.map(|(source, _)| source)));
        }
    }
    app.set_nonblocking(true).expect("non-blocking");
    raw.set_nonblocking(true).expect("non-blocking");
    while app.recv(&mut [0; 512]).is_ok() {
        came.delivered += 1;
    }
    while raw.recv(&mut [MaybeUninit::uninit(); 512]).is_ok() {
        came.delivered += 1;
    }
    came
}

/// Neighbour discovery, which is nobody's secret.
pub fn is_discovery(frame: &[u8]) -> bool {
    frame.get(20) == Some(&58) && frame.get(54).is_some_and(|kind| (133..=137).contains(kind))
}

/// Everybody in whose name it is tried: a peer beside the attacker, one far away, a Service.
fn names(lab: &Lab) -> Vec<IpAddr> {
    let peers = [PEER, FAR_PEER].into_iter().flat_map(|pod| lab.pod(pod).addresses());
    peers.chain(web_vips().map(|vip| vip.ip())).collect()
}

fn spoofed_in_clear(lab: &Lab) {
    let attack = Attack::on(lab, VICTIM);
    for from in names(lab) {
        let came = fire(&attack, from);
        assert_eq!(came.delivered, 4, "as {from}: {came:?}");
        let icmp = if from.is_ipv4() { 1 } else { 58 };
        for answer in [(17, Some(ECHO)), (6, Some(WEB)), (6, Some(CLOSED)), (icmp, None)] {
            assert!(came.answers.contains(&answer), "as {from}: no answer {answer:?} in {came:?}");
        }
    }
}

fn spoofed(lab: &Lab) {
    let attack = Attack::on(lab, VICTIM);
    let canary = load::under_load(lab, load::Size::SMALL, |_| {
        for from in names(lab) {
            let drops = status::drops(lab, VICTIM);
            let refused = lab.guard_counters(VICTIM);
            let came = fire(&attack, from);
            let refused = grown(&refused, &lab.guard_counters(VICTIM), "inet inbound");
            let dropped = grown(&drops, &status::drops(lab, VICTIM), "not_wireguard");
            assert!(came.arrived >= volley(from, from).len(), "as {from}: {came:?}");
            assert!(came.delivered == 0 && came.answers.is_empty(), "as {from}: {came:?}");
            // The guard has no say between the tunnel's ports: there the agent has.
            assert!(came.between_tunnels > 0);
            assert_eq!(dropped, u64::try_from(came.between_tunnels).expect("a few"), "as {from}: {came:?}");
            let outside = u64::try_from(came.arrived - came.between_tunnels).expect("a few");
            assert_eq!(refused, outside, "as {from}: {came:?}");
        }
    });
    assert_unharmed(&canary);
    assert_none_out(lab);
}

/// What is not from a workload of the project is not the guard's business: the pod is its server as it ever was.
fn own_plaintext(lab: &Lab) {
    let attack = Attack::on(lab, VICTIM);
    let refused = lab.guard_counters(VICTIM);
    for from in attack.attacker.addresses() {
        let came = fire(&attack, from);
        assert_eq!(came.delivered, 4, "{came:?}");
        for answer in [(17, Some(ECHO)), (6, Some(WEB))] {
            assert!(came.answers.contains(&answer), "no answer {answer:?} in {came:?}");
        }
        // But the tunnel says nothing, not even that its port is there.
        assert!(!came.answers.contains(&(17, Some(TUNNEL_PORT))), "{came:?}");
    }
    assert_eq!(refused, lab.guard_counters(VICTIM));
}

// ---- datagrams in a peer's name

/// A message to the tunnel, and the reason for which it is to be dropped.
struct Forgery {
    reason: &'static str,
    message: Vec<u8>,
}

/// The receiver index that an answer to a forgery would bear.
const FORGED_INDEX: [u8; 4] = [0xa7, 0x7a, 0x5e, 0xed];

/// Appends MAC1, which everybody can make who knows the receiver's public key, and an empty MAC2.
fn with_mac1(mut message: Vec<u8>, receiver: &PublicKey) -> Vec<u8> {
    let key = Blake2s256::new().chain_update(b"mac1----").chain_update(receiver.0).finalize();
    let mac = <Blake2sMac<U16> as blake2::digest::KeyInit>::new_from_slice(&key).expect("a key's length");
    let mac1 = blake2::digest::Mac::chain_update(mac, &message).finalize_fixed();
    message.extend(mac1);
    message.extend([0; 16]);
    message
}

fn message(kind: u8, index: [u8; 4], rest: &[u8]) -> Vec<u8> {
    [&[kind, 0, 0, 0][..], &index, rest].concat()
}

/// A true initiation by whoever has the identity.
fn initiation(identity: Identity, to: IpAddr, keys: PeerKeys, seed: u64) -> Vec<u8> {
    let mut transport = Transport::new(vec![identity], Options::default(), ChaCha20Rng::seed_from_u64(seed));
    let peer = transport.add_peer(PeerConfig { address: to, port: TUNNEL_PORT, keys, accept: None }, now());
    transport.begin(peer, now());
    transport.poll_transmit().expect("an initiation").1
}

/// Forgeries of every kind. `index` is one that the victim gave the peer: it is in clear in every datagram.
fn forgeries(key: &ProjectKey, from: IpAddr, to: IpAddr, index: [u8; 4]) -> Vec<Forgery> {
    let receiver = key.static_secret(to).public();
    let mut all = Vec::new();
    let mut add = |reason, message| all.push(Forgery { reason, message });
    for (n, length) in [0, 1, 3, 4, 15, 31, 63, 91, 147, 149, 1_200].into_iter().enumerate() {
        let seed = u64::try_from(n).expect("a few");
        for kind in [0, 1, 2, 3, 4, 5, 255] {
            let mut noise = bytes(seed, length);
            noise.iter_mut().zip([kind, 0, 0, 0]).for_each(|(byte, word)| *byte = word);
            // From 32 bytes on it is a data message for some index.
            add(if kind == 4 && length >= 32 { "index_unknown" } else { "not_wireguard" }, noise);
        }
        // For the right index: cut off, or sealed with another key, and with counters that are to come.
        let counter = (u64::MAX >> (1 + 4 * seed)).to_le_bytes();
        let length = length.max(16);
        add("bad_tag", message(4, index, &[&counter[..], &bytes(seed, length)].concat()));
        add("not_wireguard", message(4, index, &[&counter[..], &bytes(seed, 15)].concat()));
        // Handshake messages: no MAC1, a good MAC1 around noise, a cookie.
        add("bad_mac1", message(1, FORGED_INDEX, &bytes(seed, 140)));
        add("bad_mac1", message(2, FORGED_INDEX, &bytes(seed, 84)));
        add("handshake_invalid", with_mac1(message(1, FORGED_INDEX, &bytes(seed, 108)), &receiver));
        add("index_unknown", with_mac1(message(2, FORGED_INDEX, &bytes(seed, 52)), &receiver));
        add("index_unknown", message(3, index, &bytes(seed, 56)));
        // A whole initiation of somebody who knows every public key, but has a private key of its own.
        let secret = StaticSecret(bytes(seed, 32).try_into().expect("32 bytes"));
        let keys = PeerKeys { public: receiver, psk: PresharedKey([0; 32]) };
        add("peer_unknown", initiation(Identity { address: from, secret }, to, keys, seed));
    }
    all
}

/// The index that the sender of a message of ours would be answered under.
pub fn sender_index(message: &[u8]) -> [u8; 4] {
    message[4..8].try_into().expect("four bytes")
}

/// The receiver index of a message that the victim sent.
pub fn receiver_index(frame: &[u8]) -> Option<[u8; 4]> {
    let at = if packets::sealed(frame)? == 2 { 8 } else { 4 };
    packets::udp_payload(frame)?.get(at..at + 4)?.try_into().ok()
}

/// The receiver index of the datagrams from one of the victim's peers.
fn index_in_use(tap: &Sniffer, from: IpAddr, to: IpAddr) -> [u8; 4] {
    let found = tap.wait(Duration::from_secs(5), |frame| {
        let seen = packets::seen(frame)?;
        let is_data = packets::sealed(frame) == Some(4) && (seen.from, seen.to) == (from, to);
        is_data.then(|| receiver_index(frame)).flatten()
    });
    found.unwrap_or_else(|| panic!("no datagram from {from} to {to}"))
}

pub fn project_key(lab: &Lab) -> ProjectKey {
    ProjectKey::read(&lab.key_file(PROJECT), PROJECT, Suite::default()).expect("the project's key")
}

fn forged(lab: &Lab) {
    let (attack, key) = (Attack::on(lab, VICTIM), project_key(lab));
    let canary = load::under_load(lab, load::Size::SMALL, |load| {
        for from in lab.pod(PEER).addresses() {
            let to = attack.victim.address(from);
            let tap = attack.victim.sniff();
            let echo = lab.pod(PEER).udp_for(to);
            echo.connect((to, ECHO)).expect("connect");
            echo.send(CANARY).expect("send");
            let index = index_in_use(&tap, from, to);
            let forgeries = forgeries(&key, from, to, index);
            let own = attack.attacker.address(from);
            let (drops, refused) = (status::drops(lab, VICTIM), lab.guard_counters(VICTIM));
            let heard = [(from, TUNNEL_PORT), (own, TUNNEL_PORT), (own, 4_444)];
            for (source, port) in heard.into_iter().chain([(from, 4_444)]) {
                for Forgery { message, .. } in &forgeries {
                    attack.send(&packets::udp(source, to, port, TUNNEL_PORT, message));
                }
            }
            // The session goes on.
            echo.recv(&mut [0; 64]).expect("the first echo");
            echo.send(CANARY).expect("send");
            echo.recv(&mut [0; 64]).expect("an echo after the forgeries");
            thread::sleep(QUIET);
            let frames = tap.drain();
            let dropped = status::drops(lab, VICTIM);
            let mut expected = BTreeMap::<&str, u64>::new();
            forgeries.iter().for_each(|f| *expected.entry(f.reason).or_default() += 3);
            for (reason, n) in expected {
                assert_eq!(grown(&drops, &dropped, reason), n, "{reason}, to {to}: {drops:?} {dropped:?}");
            }
            let refused = grown(&refused, &lab.guard_counters(VICTIM), "inet inbound");
            assert_eq!(
                refused,
                u64::try_from(forgeries.len()).expect("a few"),
                "from another port of {from}"
            );
            let mut indices: BTreeSet<_> = forgeries
                .iter()
                .filter(|f| f.reason == "peer_unknown")
                .map(|f| sender_index(&f.message))
                .collect();
            indices.insert(FORGED_INDEX);
            assert_silent(&attack, &frames, own, &indices);
            load.assert_connections_go_on();
        }
        answers_the_true_one(lab, &attack, &key);
    });
    assert_unharmed(&canary);
    assert_none_out(lab);
}

/// The victim said nothing to the attacker, nor to any peer about a forgery; and it still speaks to its peers.
fn assert_silent(attack: &Attack, frames: &[Vec<u8>], own: IpAddr, indices: &BTreeSet<[u8; 4]>) {
    let mut sealed = 0;
    for frame in frames.iter().filter(|frame| !attack.made(frame)) {
        let Some(seen) = packets::seen(frame) else { continue };
        if seen.from != attack.victim.address(seen.from) || is_discovery(frame) {
            continue;
        }
        assert!(seen.to != own, "the victim answered the attacker: {seen:?}");
        if let Some(index) = receiver_index(frame) {
            sealed += 1;
            assert!(!indices.contains(&index), "the victim answered a forgery: {seen:?}");
        }
    }
    assert!(sealed > 0, "the victim says nothing at all any more");
}

/// The control: in the name of a peer that is silent, with the project's key, the victim does answer.
fn answers_the_true_one(lab: &Lab, attack: &Attack, key: &ProjectKey) {
    for from in lab.pod("shop-lone").addresses() {
        let to = attack.victim.address(from);
        let keys = key.workload(from, to).keys;
        let identity = Identity { address: from, secret: key.static_secret(from) };
        let message = initiation(identity, to, keys, 99);
        let tap = attack.victim.sniff();
        attack.send(&packets::udp(from, to, TUNNEL_PORT, TUNNEL_PORT, &message));
        let answered = tap.wait(Duration::from_secs(5), |frame| {
            (packets::sealed(frame) == Some(2) && receiver_index(frame) == Some(sender_index(&message)))
                .then_some(())
        });
        assert!(answered.is_some(), "a true initiation of {from} was not answered");
    }
}

// ---- what a pod has inside

/// Addresses that lead somewhere inside the victim, or through it.
fn inner(lab: &Lab, own: IpAddr) -> Vec<IpAddr> {
    let loopback = ["127.0.0.1", "::1"].map(|text| text.parse().expect("an address"));
    let peers = [PEER, FAR_PEER, "shop-lone"].into_iter().flat_map(|pod| lab.pod(pod).addresses());
    let services = web_vips().into_iter().chain(echo_vips()).map(|vip| vip.ip());
    let resolvers = [RESOLVER.into(), "fd00:10:96::a".parse().expect("an address")];
    let all = peers.chain(services).chain(resolvers).chain(loopback);
    all.filter(|address| address.is_ipv4() == own.is_ipv4()).collect()
}

fn probes(from: IpAddr, to: IpAddr) -> Vec<Vec<u8>> {
    let question = dns::bytes("web.shop.svc.cluster.local", 1, 0, None);
    let mut packets = vec![
        packets::echo_request(from, to, CANARY),
        packets::udp(from, to, FROM, 53, &question),
        packets::udp(from, to, FROM, 7, CANARY),
        packets::udp(from, to, FROM, ECHO, CANARY),
    ];
    packets.extend([53, 80, WEB].map(|port| packets::tcp_syn(from, to, FROM, port)));
    packets
}

/// What left the victim in answer to `packets`, or was led through it: its own words to `from`, and words of `from`.
fn provoked(attack: &Attack, from: IpAddr, packets: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let tap = attack.victim.sniff();
    // Not more at once than a device's queue takes.
    for some in packets.chunks(64) {
        some.iter().for_each(|packet| attack.send(packet));
        thread::sleep(Duration::from_millis(1));
    }
    thread::sleep(QUIET);
    let frames = tap.drain();
    let arrived = frames.iter().filter(|frame| attack.made(frame)).count();
    assert!(arrived >= packets.len(), "{arrived} of {} packets arrived", packets.len());
    let of_interest = |frame: &Vec<u8>| {
        let concerns = packets::seen(frame).is_some_and(|seen| seen.from == from || seen.to == from);
        concerns && !attack.made(frame) && !is_discovery(frame)
    };
    frames.into_iter().filter(of_interest).collect()
}

fn probed(lab: &Lab) {
    let _bridge = PlainBridge::new(lab);
    let attack = Attack::on(lab, VICTIM);
    for from in attack.attacker.addresses() {
        let to = attack.victim.address(from);
        let answers = provoked(&attack, from, &probes(from, to));
        assert!(answers.iter().any(|f| packets::is_syn_ack(f)), "the control got no answer");
        for to in inner(lab, from) {
            let answers = provoked(&attack, from, &probes(from, to));
            let answers: Vec<_> = answers.iter().filter_map(|f| packets::seen(f)).collect();
            assert!(answers.is_empty(), "{to} answered through {VICTIM}: {answers:?}");
        }
        // The ports of the agent's own queries accept nobody: a kernel that says "closed" is all there is.
        let syns: Vec<_> = QUERY_PORTS.map(|port| packets::tcp_syn(from, to, FROM, port)).collect();
        let datagrams: Vec<_> = QUERY_PORTS.map(|port| packets::udp(from, to, FROM, port, CANARY)).collect();
        for frame in provoked(&attack, from, &[syns, datagrams].concat()) {
            let seen = packets::seen(&frame).expect("an IP packet");
            assert!(
                !packets::is_syn_ack(&frame) && seen.protocol != 17,
                "a port of the agent answered: {seen:?}"
            );
        }
    }
    assert_none_out(lab);
}

/// A node that does not take the attacker's datagrams for the beginning of a flow, which would lead the queries astray.
struct Untracked<'l>(&'l Lab);

impl<'l> Untracked<'l> {
    fn new(lab: &'l Lab) -> Self {
        let chain = "nft add table ip attack; nft 'add chain ip attack raw { type filter hook prerouting priority -300; }'; \
                     nft add rule ip attack raw ip saddr 10.96.0.10 notrack";
        let ran = lab.exec("node1", chain, Duration::from_secs(5));
        assert!(ran.code == 0, "{}", ran.err);
        Self(lab)
    }
}

impl Drop for Untracked<'_> {
    fn drop(&mut self) {
        self.0.exec("node1", "nft delete table ip attack", Duration::from_secs(5));
    }
}

/// The attacker answers in the resolver's name, on every port that the agent may ask from, while names are looked up.
fn forged_answers(lab: &Lab) {
    let _node = Untracked::new(lab);
    let attack = Attack::on(lab, VICTIM);
    let question = dns::bytes("web.shop.svc.cluster.local", 1, 0, None);
    let ask = || dns::ask_udp(attack.victim, (RESOLVER, 53).into(), &question, Duration::from_secs(5));
    let truth = ask().expect("an answer");
    // The id is the application's; the agent's own is another.
    let forgery = dns::answer(&question, [203, 0, 113, 66]);
    let flood: Vec<_> = QUERY_PORTS
        .map(|port| packets::udp(RESOLVER.into(), attack.victim.v4.into(), 53, port, &forgery))
        .collect();
    let before = status::drops(lab, VICTIM);
    thread::scope(|scope| {
        // While the resolver is silent, forgeries have all the time they need.
        let frozen = Frozen::new(lab);
        let asking = scope.spawn(ask);
        let end = Instant::now() + Duration::from_secs(3);
        while grown(&before, &status::drops(lab, VICTIM), "dns_malformed") == 0 {
            assert!(Instant::now() < end, "no forgery met the query");
            flood.iter().for_each(|packet| attack.send(packet));
        }
        drop(frozen);
        let answer = asking.join().expect("the asker");
        assert_eq!(answer.as_ref(), Some(&truth), "a forged answer, or none");
    });
}

/// The resolver does not answer until this is dropped.
struct Frozen(Pid);

impl Frozen {
    fn new(lab: &Lab) -> Self {
        let resolver = lab.recorded_pid("dns").expect("the lab's resolver");
        kill(resolver, Signal::SIGSTOP).expect("freeze the resolver");
        Self(resolver)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        // It may be gone with its lab.
        let _ = kill(self.0, Signal::SIGCONT);
    }
}
