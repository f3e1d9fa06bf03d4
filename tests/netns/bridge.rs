//! A pod of another project that claims its neighbours' addresses on their bridge: ARP replies, neighbour advertisements.
//!
//! 1. the claims go on all the time, so that what others say is overridden; that they are believed is always checked
//! 2. control: without agents the attacker reads what its neighbours say, and its answers are taken for the true ones
//! 3. with agents it gets sealed datagrams alone; it may withhold them or pass them on, which any wire may
//!
//! May touch: sockets in the pods, neighbour caches by what is sent there.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::Case;
use crate::attackers::{ATTACKER, Attack, PEER, PlainBridge, VICTIM, assert_none_out, is_discovery};
use crate::dns;
use crate::lab::{Agents, Lab, RESOLVER, TUNNEL_PORT};
use crate::lifecycle::StopAtEnd;
use crate::packets::{self, CANARY};
use crate::pod::{Pod, Sniffer};
use crate::status;

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case::new("control_a_claimed_address_shows_and_takes_plaintext_without_agents", claimed_in_clear)
        .agents(Agents::Off)
        .looks_itself(),
    Case::new("promise_9_a_claimed_address_shows_sealed_datagrams_alone_and_is_not_believed", claimed)
        .every_rp_filter()
        .looks_itself(),
    Case::new("promise_4_a_withheld_datagram_counts_once_unchanged_and_from_its_sender", withheld)
        .looks_itself(),
    Case::new("control_a_poisoned_answer_leads_to_the_attacker_without_agents", poisoned_in_clear)
        .agents(Agents::Off)
        .looks_itself(),
    Case::new("promise_9_an_address_from_a_poisoned_answer_gets_no_plaintext", poisoned).looks_itself(),
];

const ECHO: u16 = 7_007;
const WEB: u16 = 8_080;
const FORGED: &[u8] = b"in the peer's name";
/// The bridge's own address: the pods' gateway.
const GATEWAY: [&str; 2] = ["10.1.1.1", "fd00:10:1:1::1"];

/// Runs `f` while the attacker tells `pod` that it has the address `claimed`; it is believed when `f` begins.
fn while_claiming<T>(lab: &Lab, claims: &[(&Pod, IpAddr)], f: impl FnOnce() -> T) -> T {
    let attacker = lab.pod(ATTACKER);
    let (mac, device) = (attacker.mac(), attacker.sniff());
    let frame = |(to, claimed): &(&Pod, IpAddr)| match claimed {
        IpAddr::V4(claimed) => packets::arp_reply(*claimed, mac, to.v4, to.mac()),
        IpAddr::V6(claimed) => packets::frame(mac, to.mac(), &packets::advertisement(*claimed, mac, to.v6)),
    };
    let frames: Vec<_> = claims.iter().map(frame).collect();
    // A true answer shuts the next claim out for a second: the attacker is to have better luck than that.
    let locktime = |pod: &Pod, ticks: &str| {
        let file = format!("/proc/sys/net/ipv4/neigh/{}/locktime", pod.device);
        pod.enter(|| std::fs::write(&file, ticks)).expect("locktime");
    };
    claims.iter().for_each(|(pod, _)| locktime(pod, "0"));
    let stop = AtomicBool::new(false);
    let outcome = thread::scope(|scope| {
        let _stop = StopAtEnd(&stop);
        scope.spawn(|| {
            while !stop.load(Ordering::Acquire) {
                frames.iter().for_each(|frame| device.send(frame));
                thread::sleep(Duration::from_millis(10));
            }
        });
        for (pod, claimed) in claims {
            await_believed(pod, *claimed, mac);
        }
        let outcome = f();
        for (pod, claimed) in claims {
            await_believed(pod, *claimed, mac);
        }
        outcome
    });
    claims.iter().for_each(|(pod, _)| locktime(pod, "100"));
    lab.flush_neighbours();
    outcome
}

fn believed(pod: &Pod, claimed: IpAddr, mac: [u8; 6]) -> bool {
    let out = pod.enter(|| {
        Command::new("ip").args(["neigh", "show", "to", &claimed.to_string()]).output().expect("ip neigh")
    });
    let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
    String::from_utf8_lossy(&out.stdout).contains(&mac)
}

/// A claim is heard once there is an entry.
fn await_believed(pod: &Pod, claimed: IpAddr, mac: [u8; 6]) {
    let end = Instant::now() + Duration::from_secs(8);
    let socket = pod.udp_on_device(claimed);
    while !believed(pod, claimed, mac) {
        assert!(Instant::now() < end, "{} does not believe the claim of {claimed}", pod.name);
        // Makes the entry where the guard lets it; else the tunnel does.
        let _ = socket.send_to(&[], (claimed, 9));
        thread::sleep(Duration::from_millis(50));
    }
}

/// The frames of IP packets that the attacker got and that are not its own.
fn overheard(attack: &Attack, tap: &Sniffer) -> Vec<Vec<u8>> {
    let own = attack.attacker.addresses();
    let foreign = |frame: &Vec<u8>| {
        let to_others = packets::seen(frame).is_some_and(|seen| !own.contains(&seen.to));
        to_others && !attack.made(frame) && !is_discovery(frame)
    };
    tap.drain().into_iter().filter(foreign).collect()
}

/// What the attacker learned and achieved as somebody else.
#[derive(Debug, Default)]
struct Loot {
    readable: usize,
    sealed: usize,
    in_clear: usize,
    /// Its answers in the claimed name that an application took.
    believed: usize,
}

/// The peer asks the victim, whose address the attacker has claimed, and vice versa; the attacker answers.
fn loot(lab: &Lab, like: IpAddr) -> Loot {
    let (client, server) = (lab.pod(PEER), lab.pod(VICTIM));
    let (from, to) = (client.address(like), server.address(like));
    // To the client in the server's name.
    let attack = Attack::on(lab, PEER);
    while_claiming(lab, &[(client, to), (server, from)], || {
        let tap = attack.attacker.sniff();
        let socket = client.udp_for(to);
        socket.connect((to, ECHO)).expect("connect");
        socket.set_read_timeout(Some(Duration::from_millis(20))).expect("time-out");
        let port = socket.local_addr().expect("an address").port();
        let mut loot = Loot::default();
        for _ in 0..30 {
            // An ICMP error may show here: nothing comes back from the attacker.
            let _ = socket.send(CANARY);
            attack.send(&packets::udp(to, from, ECHO, port, FORGED));
            let mut buffer = [0; 64];
            loot.believed += usize::from(socket.recv(&mut buffer).is_ok_and(|n| buffer[..n] == *FORGED));
        }
        let _ = client.connect((to, WEB), Duration::from_millis(300));
        for frame in overheard(&attack, &tap) {
            loot.readable += usize::from(packets::has_canary(&frame));
            match packets::sealed(&frame) {
                Some(_) => loot.sealed += 1,
                None => loot.in_clear += 1,
            }
        }
        loot
    })
}

fn claimed_in_clear(lab: &Lab) {
    for like in lab.pod(PEER).addresses() {
        let loot = loot(lab, like);
        assert!(loot.readable > 0 && loot.believed > 0, "{like}: {loot:?}");
    }
}

fn claimed(lab: &Lab) {
    for like in lab.pod(PEER).addresses() {
        // A session, and neighbours that know each other.
        greet(lab, like);
        let loot = loot(lab, like);
        assert!(loot.sealed > 0, "the attacker got nothing at all: {loot:?}");
        assert_eq!((loot.readable, loot.in_clear, loot.believed), (0, 0, 0), "{like}: {loot:?}");
        greet(lab, like);
    }
    assert_none_out(lab);
}

fn greet(lab: &Lab, like: IpAddr) {
    let to = lab.pod(VICTIM).address(like);
    let (status, _) =
        lab.pod(PEER).http_get((to, WEB), Duration::from_secs(10)).unwrap_or_else(|e| panic!("{to}: {e}"));
    assert_eq!(status, 200);
}

// ---- what the attacker holds in its hands

const NUMBERS: u64 = 50;
const NUMBERS_PORT: u16 = 9_621;

fn withheld(lab: &Lab) {
    for like in lab.pod(PEER).addresses() {
        greet(lab, like);
        let attack = Attack::on(lab, VICTIM);
        let (client, server) = (lab.pod(PEER), lab.pod(VICTIM));
        let (from, to) = (client.address(like), server.address(like));
        let receiver = server.udp((to, NUMBERS_PORT));
        receiver.set_read_timeout(Some(Duration::from_millis(300))).expect("time-out");
        let sender = client.udp_for(to);
        let hold = || {
            let tap = attack.attacker.sniff();
            for number in 0..NUMBERS {
                sender.send_to(&number.to_be_bytes(), (to, NUMBERS_PORT)).expect("send");
                thread::sleep(Duration::from_millis(2));
            }
            overheard(&attack, &tap)
        };
        let frames = while_claiming(lab, &[(client, to)], hold);
        let padded = (8 + if like.is_ipv4() { 28usize } else { 48 }).next_multiple_of(16);
        // One datagram each: what the sender's kernel merged is longer.
        let datagrams: Vec<_> = frames
            .iter()
            .filter(|frame| packets::sealed(frame) == Some(4))
            .filter_map(|frame| {
                packets::udp_payload(frame).filter(|payload| payload.len() == 16 + padded + 16)
            })
            .collect();
        assert!(datagrams.len() > 10, "only {} datagrams were withheld", datagrams.len());
        let n = u64::try_from(datagrams.len()).expect("a few");
        assert_eq!(heard(&receiver), BTreeMap::new(), "they were not withheld");

        let before = status::drops(lab, VICTIM);
        let grown = |reason: &str| {
            let count = |drops: &BTreeMap<String, u64>| drops.get(reason).copied().unwrap_or(0);
            count(&status::drops(lab, VICTIM)) - count(&before)
        };
        let send = |source: IpAddr, change: Option<usize>| {
            for datagram in &datagrams {
                let mut message = datagram.to_vec();
                if let Some(at) = change {
                    message[at] ^= 1;
                }
                attack.send(&packets::udp(source, to, TUNNEL_PORT, TUNNEL_PORT, &message));
            }
            heard(&receiver)
        };
        // Under the attacker's own address: nobody moves there.
        assert_eq!(send(attack.attacker.address(like), None), BTreeMap::new());
        assert_eq!(grown("outer_source"), n);
        // Changed: in the ciphertext, in the tag.
        for at in [20, 16 + padded + 3] {
            assert_eq!(send(from, Some(at)), BTreeMap::new());
        }
        assert_eq!(grown("bad_tag"), 2 * n);
        // Unchanged they count, as good as ever, once.
        let delivered = send(from, None);
        assert_eq!(u64::try_from(delivered.len()).expect("a few"), n, "{delivered:?}");
        assert!(delivered.values().all(|times| *times == 1), "{delivered:?}");
        assert_eq!(send(from, None), BTreeMap::new());
        assert_eq!(grown("replay"), n);
        greet(lab, like);
    }
    assert_none_out(lab);
}

/// How often each number arrived.
fn heard(receiver: &UdpSocket) -> BTreeMap<u64, u64> {
    let (mut counts, mut buffer) = (BTreeMap::new(), [0; 64]);
    while let Ok(n) = receiver.recv(&mut buffer) {
        let number = buffer[..n].first_chunk().expect("a number");
        *counts.entry(u64::from_be_bytes(*number)).or_default() += 1;
    }
    counts
}

// ---- the way to the resolver

/// With the gateway's address the attacker gets every query, and answers with `poison`. Returns what the application was
/// told, and whether a word to that address came to the attacker in clear.
fn poison(lab: &Lab, name: &str, poison: [u8; 4]) -> (Option<Vec<u8>>, bool) {
    let _bridge = PlainBridge::new(lab);
    let client = lab.pod(PEER);
    let attack = Attack::on(lab, PEER);
    let gateway: IpAddr = GATEWAY[0].parse().expect("an address");
    let question = dns::bytes(name, 1, 0, None);
    let listener = attack.attacker.listen((attack.attacker.v4, WEB).into());
    listener.set_nonblocking(true).expect("non-blocking");
    // An entry for the gateway.
    let _ = client.connect((crate::lab::external()[0], 80), Duration::from_secs(2));
    while_claiming(lab, &[(client, gateway)], || {
        let (tap, stop) = (attack.attacker.sniff(), AtomicBool::new(false));
        let told = thread::scope(|scope| {
            let _stop = StopAtEnd(&stop);
            scope.spawn(|| {
                while !stop.load(Ordering::Acquire) {
                    answer_queries(&attack, &tap, poison);
                    thread::sleep(Duration::from_millis(2));
                }
            });
            dns::ask_udp(client, (RESOLVER, 53).into(), &question, Duration::from_secs(3))
        });
        tap.drain();
        let to = SocketAddr::from((poison, WEB));
        let connected = client.connect(to, Duration::from_millis(500)).is_ok();
        let socket = client.udp_for(to.ip());
        let _ = socket.send_to(CANARY, to);
        thread::sleep(Duration::from_millis(100));
        let words = tap.drain().into_iter().filter(|frame| !attack.made(frame)).any(|frame| {
            packets::seen(&frame)
                .is_some_and(|seen| seen.to == to.ip() && seen.from == IpAddr::from(client.v4))
        });
        (told, connected || words)
    })
}

/// Answers every query that came, in the resolver's name.
fn answer_queries(attack: &Attack, tap: &Sniffer, poison: [u8; 4]) {
    for frame in tap.drain() {
        let Some(seen) = packets::seen(&frame).filter(|seen| seen.to == IpAddr::from(RESOLVER)) else {
            continue;
        };
        if let (Some((port, 53)), Some(query)) = (seen.ports, packets::udp_payload(&frame)) {
            attack.send(&packets::udp(seen.to, seen.from, 53, port, &dns::answer(query, poison)));
        }
    }
}

/// Addresses that are never protected: a node's and the resolver's. No name of the project leads there.
const LEADING_OUT: [[u8; 4]; 2] = [[192, 168, 77, 1], [10, 96, 0, 10]];

/// The attacker's own address, and one of the outside.
const POISONS: [[u8; 4]; 2] = [[10, 1, 1, 21], [203, 0, 113, 10]];

fn poisoned_in_clear(lab: &Lab) {
    for address in POISONS {
        let (told, clear) = poison(lab, "web.shop.svc.cluster.local", address);
        let told = told.expect("an answer");
        assert!(told.ends_with(&address), "the true answer was faster: {told:?}");
        assert!(clear, "nothing was said to {address:?}");
    }
}

fn poisoned(lab: &Lab) {
    // Nobody of the project; the test speaks to them itself, and to the gateway.
    let led = LEADING_OUT.map(|[a, b, c, d]| format!("{a}.{b}.{c}.{d}"));
    lab.declare(led.iter().flat_map(|to| ["tcp", "udp"].map(|protocol| format!("{to}/{protocol}"))));
    lab.declare([format!("{}/udp/9", GATEWAY[0])]);
    for address in POISONS {
        let (told, clear) = poison(lab, "web.shop.svc.cluster.local", address);
        // Not to be told is fine too.
        assert!(told.is_none_or(|told| told.ends_with(&address)), "the true answer was faster");
        assert!(!clear, "after an answer with {address:?} something was said to it in clear");
    }
    for address in LEADING_OUT {
        let (told, _) = poison(lab, "web.shop.svc.cluster.local", address);
        assert!(told.is_none(), "the application was led to {address:?}");
    }
    greet(lab, lab.pod(PEER).v4.into());
    assert_none_out(lab);
}
