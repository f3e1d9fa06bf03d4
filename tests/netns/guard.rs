//! The guard alone, without an agent: its modes and states, loaded over one another in place.

use std::collections::BTreeMap;
use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::os::fd::OwnedFd;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ipnet::IpNet;

use tencrypt::agent::netlink::MARK;
use tencrypt::control::FromAgent;
use tencrypt::launcher::pod::guard::{self, Door, Loaded, OrderedStop, Ready, Reason, Skeleton, WouldDrop};
use tencrypt::proto::ladder::Mode;

use crate::Case;
use crate::hostile::bytes;
use crate::lab::{Agents, Lab, Launched, RANGES, RESOLVER, TUNNEL_PORT};
use crate::lifecycle::{StopAtEnd, keep_trying};
use crate::packets::{self, CANARY};
use crate::pod::Pod;
use crate::services::copy_directory;

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case::new("promise_2_modes_of_the_guard_replace_each_other_in_place", modes)
        .agents(Agents::Off)
        .looks_itself(),
    Case::new("promise_2_a_closed_gate_passes_only_what_the_agent_needs", gate)
        .agents(Agents::Off)
        .looks_itself(),
    Case::new("promise_2_nothing_slips_through_while_the_gate_opens", opening)
        .agents(Agents::Off)
        .looks_itself(),
    Case::new("promise_1_an_unclassified_address_gets_nothing_through_two_hundred_reloads", reloads)
        .agents(Agents::Off)
        .looks_itself(),
    Case::new("promise_1_guard_first_closes_the_pod_before_its_first_instruction", guard_first)
        .agents(Agents::Off)
        .seconds(900),
    Case::new("promise_1_the_guard_is_loaded_over_whatever_has_its_name", foreign_tables)
        .agents(Agents::Off)
        .looks_itself(),
];

/// An application that speaks from its first instruction on, while the directory is still missing, until it is protected.
fn guard_first(lab: &Lab) {
    let key = lab.key_file(crate::lab::PROJECT);
    let directory = copy_directory(lab, "guard-first");
    let away = directory.with_extension("away");
    let _server = Launched::pod(lab, "shop-web2", &lab.directory(crate::lab::PROJECT), &key);
    let client = lab.pod("shop-client");
    for round in 0..if crate::long() { 200u64 } else { 4 } {
        std::fs::rename(&directory, &away).expect("the directory goes");
        let mut args = Launched::args(lab, "shop-client", &directory, &key);
        args.push("--guard-first".to_owned());
        let mut launched = Launched::start(lab, &args.iter().map(String::as_str).collect::<Vec<_>>());
        let end = Instant::now() + Duration::from_secs(5);
        while !launched.printed().contains("guarded ") {
            assert!(Instant::now() < end, "not guarded:\n{}", launched.printed());
            thread::sleep(Duration::from_millis(1));
        }
        let (stop, tries) = (AtomicBool::new(false), AtomicU64::new(0));
        thread::scope(|scope| {
            let _stop = StopAtEnd(&stop);
            scope.spawn(|| keep_trying(lab, true, &stop, &tries));
            // At random, and the same in every run.
            thread::sleep(Duration::from_millis(bytes(round, 1)[0].into()));
            assert!(
                client.http_get((crate::lab::external()[0], 80), Duration::from_millis(200)).is_err(),
                "the pod speaks to the outside before it is protected"
            );
            lab.assert_no_leak();
            std::fs::rename(&away, &directory).expect("the directory comes");
            launched.wait_ready();
            let (status, _) = client
                .http_get((lab.pod("shop-web2").v4, 8080), Duration::from_secs(5))
                .expect("traffic through the tunnel");
            assert_eq!(status, 200);
            client.http_get((crate::lab::external()[0], 80), Duration::from_secs(5)).expect("the outside");
        });
        lab.assert_no_leak();
        assert_eq!(launched.stop(), Some(0), "{}", launched.printed());
    }
}

/// A port nobody in the lab serves.
const PORT: u16 = 7117;
const QUIET: Duration = Duration::from_millis(300);

/// How far a guard is to be open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Gate {
    Open,
    Closed,
}

/// The guard of one pod; removed at the end, also of a test that fails.
struct Guarded<'l> {
    pod: &'l Pod,
    netns: OwnedFd,
}

impl<'l> Guarded<'l> {
    fn new(lab: &'l Lab, pod: &str) -> Self {
        let pod = lab.pod(pod);
        Self { pod, netns: File::open(&pod.netns).expect("a namespace").into() }
    }

    fn skeleton(&self, mode: Mode) -> Skeleton {
        let device = self.pod.device.as_str().try_into().expect("a name");
        let mut skeleton = Skeleton::closed(mode, TUNNEL_PORT, vec![device]);
        (skeleton.resolvers, skeleton.dns_ports) = (vec![RESOLVER.into()], 61000..=61999);
        skeleton
    }

    fn door(&self) -> Door {
        Door::at(self.netns.try_clone().expect("a descriptor")).expect("nft lists")
    }

    fn load(&self, mode: Mode, gate: Gate) {
        self.load_skeleton(self.skeleton(mode), gate);
    }

    fn load_skeleton(&self, mut skeleton: Skeleton, gate: Gate) {
        let mut door = self.door();
        let ready = FromAgent::Ready { generation: 1, fingerprint: [0; 32], executable: [0; 4] };
        let loaded = match gate {
            Gate::Open => door.open(&mut skeleton, &Ready::of(&ready, 1, 0).expect("it is")),
            Gate::Closed => door.close(&mut skeleton),
        };
        assert_eq!(loaded.expect("nft takes it"), Loaded::Full);
    }

    /// Sealed datagrams may go there.
    fn connect(&self, addresses: [IpAddr; 2]) {
        for (set, address) in ["peers4", "peers6"].iter().zip(addresses) {
            self.nft(&format!("add element inet tencrypt {set} {{ {address} }}"));
        }
    }

    fn protect(&self, addresses: [IpAddr; 2]) {
        for family in ["inet", "netdev"] {
            for (set, address) in ["protected4", "protected6"].iter().zip(addresses) {
                self.nft(&format!("add element {family} tencrypt {set} {{ {address} }}"));
            }
        }
    }

    fn nft(&self, command: &str) {
        let ran = self.pod.enter(|| Command::new("nft").arg(command).output().expect("nft"));
        assert!(ran.status.success(), "{command}: {}", String::from_utf8_lossy(&ran.stderr));
    }

    /// Packets of the counters that are not zero.
    fn counted(&self) -> BTreeMap<String, u64> {
        let counters = guard::counters(&self.netns).expect("counters");
        counters.into_iter().filter(|(_, c)| c.packets > 0).map(|(name, c)| (name, c.packets)).collect()
    }

    fn records(&self) -> Vec<Row> {
        let row = |r: WouldDrop| (r.reason, r.source, r.destination, r.protocol, r.ports, r.packets);
        guard::would_drops(&self.netns).expect("records").into_iter().map(row).collect()
    }

    /// The records that were not there before.
    fn fresh(&self, before: &[Row]) -> Vec<Row> {
        self.records().into_iter().filter(|row| !before.contains(row)).collect()
    }
}

impl Drop for Guarded<'_> {
    fn drop(&mut self) {
        let removed = self.door().remove(&OrderedStop::by_the_operator());
        if !thread::panicking() {
            removed.expect("the guard goes");
        }
    }
}

/// Tables of our names that the guard cannot simply be loaded over.
fn foreign_tables(lab: &Lab) {
    for there in [
        "add table inet tencrypt { flags dormant; }; add table netdev tencrypt { flags dormant; }",
        "add table inet tencrypt; add set inet tencrypt protected4 { type ipv6_addr; }",
        "add table inet tencrypt; add chain inet tencrypt postrouting { type filter hook input priority 7; }",
    ] {
        let guarded = Guarded::new(lab, "shop-client");
        guarded.nft(there);
        guarded.load(Mode::Strict, Gate::Open);
        guarded.protect(lab.pod("shop-web1").addresses());
        let (from, to) = (guarded.pod.udp_for(lab.pod("shop-web1").v4.into()), lab.pod("shop-web1"));
        let to = to.udp((to.v4, PORT));
        assert_eq!(arrived(&from, &to, 3), 0, "over `{there}` nothing is guarded");
    }
    // What it holds stays, also where only a removal helps.
    let guarded = Guarded::new(lab, "shop-client");
    guarded.load(Mode::Strict, Gate::Open);
    guarded.protect(lab.pod("shop-web1").addresses());
    guarded.nft("add table inet tencrypt { flags dormant; }");
    guarded.load(Mode::Strict, Gate::Open);
    let to = lab.pod("shop-web1");
    for address in to.addresses() {
        let (from, to) = (guarded.pod.udp_for(address), to.udp((address, PORT)));
        assert_eq!(arrived(&from, &to, 3), 0, "{address} is not protected any more");
    }
}

/// How many of `n` datagrams arrive.
fn arrived(from: &UdpSocket, to: &UdpSocket, n: usize) -> usize {
    let address = to.local_addr().expect("an address");
    for _ in 0..n {
        // EPERM is how a drop at postrouting looks.
        let _ = from.send_to(CANARY, address);
    }
    to.set_read_timeout(Some(QUIET)).expect("time-out");
    (0..n).take_while(|_| to.recv(&mut [0; 2048]).is_ok()).count()
}

/// A record: reason, source, destination, protocol, ports, packets.
type Row = (Reason, IpAddr, IpAddr, u8, Option<(u16, u16)>, u64);

fn flow(reason: Reason, from: &UdpSocket, to: &UdpSocket, packets: u64) -> Row {
    let (from, to) = (from.local_addr().expect("an address"), to.local_addr().expect("an address"));
    (reason, from.ip(), to.ip(), 17, Some((from.port(), to.port())), packets)
}

fn modes(lab: &Lab) {
    let guarded = Guarded::new(lab, "shop-client");
    let (peer, stranger) = (lab.pod("shop-web1"), lab.pod("bank-server"));
    guarded.load(Mode::Strict, Gate::Open);
    let listing = guard::listing(&guarded.netns).expect("a listing");
    assert!(listing.contains("table inet tencrypt") && listing.contains("table netdev tencrypt"));
    guarded.protect(peer.addresses());
    let ours = guarded.pod.addresses().map(|address| guarded.pod.udp((address, 0)));
    let theirs = peer.addresses().map(|address| peer.udp((address, PORT)));
    let others = stranger.addresses().map(|address| stranger.udp((address, PORT)));
    let stranger_is_reached = || {
        for (from, to) in ours.iter().zip(&others) {
            assert_eq!((arrived(from, to, 1), arrived(to, from, 1)), (1, 1), "nobody's business");
        }
    };

    for (from, to) in ours.iter().zip(&theirs) {
        assert_eq!((arrived(from, to, 3), arrived(to, from, 2)), (0, 0));
    }
    stranger_is_reached();
    let counted = |name: &str| guarded.counted().get(name).copied().unwrap_or(0);
    assert_eq!((counted("outbound_postrouting"), counted("inbound")), (6, 4));
    assert_eq!(guarded.records(), []);

    for (n, mode) in [Mode::Audit, Mode::Permissive].into_iter().enumerate() {
        let n = u64::try_from(n).expect("small") + 1;
        guarded.load(mode, Gate::Open);
        let mut expected = Vec::new();
        for (from, to) in ours.iter().zip(&theirs) {
            assert_eq!((arrived(from, to, 3), arrived(to, from, 2)), (3, 2), "{mode:?}");
            expected.push(flow(Reason::Outbound, from, to, 3 * n));
            expected.push(flow(Reason::Inbound, to, from, 2 * n));
        }
        stranger_is_reached();
        expected.sort_unstable();
        assert_eq!(guarded.records(), expected, "{mode:?}: each flow and packet once, and no other");
        assert_eq!((counted("would_drop_outbound"), counted("would_drop_inbound")), (6 * n, 4 * n));
        assert_eq!((counted("outbound_postrouting"), counted("inbound")), (6, 4), "counters survive");
    }

    // Without ports: an echo request out, its reply in.
    let ping = format!("ping -c 2 -i 0.2 -W 1 {}", peer.v4);
    assert_eq!(lab.exec("shop-client", &ping, Duration::from_secs(5)).code, 0);
    let portless: Vec<_> = guarded.records().into_iter().filter(|row| row.4.is_none()).collect();
    let (own, peers) = (IpAddr::from(guarded.pod.v4), IpAddr::from(peer.v4));
    let echo = [(Reason::Outbound, own, peers, 1, None, 2), (Reason::Inbound, peers, own, 1, None, 2)];
    assert_eq!(portless, echo);
    // A query of the pod's own to the resolver.
    let query = guarded.pod.udp((guarded.pod.v4, 0));
    query.send_to(CANARY, (RESOLVER, 53)).expect("permissive lets it pass");
    assert_eq!((counted("would_drop_dns"), counted("dns_escaped")), (1, 0));
    let port = query.local_addr().expect("an address").port();
    assert!(guarded.records().contains(&(Reason::Dns, own, RESOLVER.into(), 17, Some((port, 53)), 1)));
    frames_and_fragments(lab, &guarded, &ours, &theirs);

    guarded.load(Mode::Strict, Gate::Open);
    assert_eq!(guard::listing(&guarded.netns).expect("a listing"), listing);
    for (from, to) in ours.iter().zip(&theirs) {
        assert_eq!((arrived(from, to, 1), arrived(to, from, 1)), (0, 0), "elements survive");
    }
    assert!(query.send_to(CANARY, (RESOLVER, 53)).is_err());
    assert_eq!(counted("dns_escaped"), 1);
    let before = guarded.records();
    send_frames(&guarded, &ours, &theirs);
    assert_eq!(counted("outbound_egress"), 2, "strict drops them where they were recorded");
    assert_eq!(guarded.fresh(&before), []);
}

/// A frame of a packet socket from each of ours to each of theirs.
fn send_frames(guarded: &Guarded<'_>, ours: &[UdpSocket; 2], theirs: &[UdpSocket; 2]) {
    for (from, to) in ours.iter().zip(theirs) {
        let (from, to) = (from.local_addr().expect("an address"), to.local_addr().expect("an address"));
        let packet = packets::udp(from.ip(), to.ip(), 7_007, to.port(), CANARY);
        let _ = guarded.pod.send_frame(&packets::frame(guarded.pod.mac(), [0xff; 6], &packet));
    }
}

/// Below strict mode: what meets the device only is recorded there, and what was recorded before is not recorded again.
fn frames_and_fragments(lab: &Lab, guarded: &Guarded<'_>, ours: &[UdpSocket; 2], theirs: &[UdpSocket; 2]) {
    let at_egress = || lab.guard_counters(&guarded.pod.name)["netdev would_drop_egress"];
    assert_eq!(at_egress(), 0, "a packet of the stack is recorded once");
    let before = guarded.records();
    send_frames(guarded, ours, theirs);
    let frames = ours.iter().zip(theirs).map(|(from, to)| {
        let (from, to) = (from.local_addr().expect("an address"), to.local_addr().expect("an address"));
        (Reason::Egress, from.ip(), to.ip(), 17, Some((7_007, to.port())), 1)
    });
    assert_eq!(guarded.fresh(&before), frames.collect::<Vec<_>>());
    for to in theirs {
        assert_eq!(to.recv(&mut [0; 2048]).expect("the frame passes"), CANARY.len());
    }
    assert_eq!(at_egress(), 2);

    // One datagram leaves the stack whole and the device in pieces; the answer comes in pieces, of which the first shows ports.
    let before = guarded.records();
    let mut pieces = Vec::new();
    for (from, to) in ours.iter().zip(theirs) {
        let (our, their) = (from.local_addr().expect("an address"), to.local_addr().expect("an address"));
        for (from, to) in [(from, to), (to, from)] {
            from.send_to(&[7; 4_000], to.local_addr().expect("an address")).expect("send");
            to.set_read_timeout(Some(Duration::from_secs(2))).expect("time-out");
            assert_eq!(to.recv(&mut [0; 5_000]).expect("a whole datagram"), 4_000);
        }
        // Six and four came before.
        pieces.push((Reason::Outbound, our.ip(), their.ip(), 17, Some((our.port(), their.port())), 7));
        pieces.push((Reason::Inbound, their.ip(), our.ip(), 17, Some((their.port(), our.port())), 5));
        pieces.push((Reason::Inbound, their.ip(), our.ip(), 17, None, 2));
    }
    pieces.sort_unstable();
    assert_eq!(guarded.fresh(&before), pieces);
    assert_eq!(at_egress(), 2);
}

fn gate(lab: &Lab) {
    let guarded = Guarded::new(lab, "shop-client");
    let stranger = lab.pod("bank-server");
    let ours = guarded.pod.addresses().map(|address| guarded.pod.udp((address, 0)));
    let others = stranger.addresses().map(|address| stranger.udp((address, PORT)));
    // Nothing is known yet.
    guarded.load_skeleton(Skeleton::closed(Mode::Strict, TUNNEL_PORT, Vec::new()), Gate::Closed);
    assert!(!guard::listing(&guarded.netns).expect("a listing").contains("netdev"));
    for mode in [Mode::Strict, Mode::Audit] {
        let before = guarded.counted().get("not_protected").copied().unwrap_or(0);
        for (from, to) in ours.iter().zip(&others) {
            assert_eq!((arrived(from, to, 1), arrived(to, from, 1)), (0, 0));
        }
        // The system's own multicast may add to it.
        assert!(guarded.counted()["not_protected"] >= before + 4);
        guarded.load(mode, Gate::Closed);
    }

    // Frames of packet sockets meet the device.
    let at_device = || lab.guard_counters("shop-client")["netdev not_protected"];
    let packet = packets::udp(guarded.pod.v4.into(), stranger.v4.into(), 7, PORT, CANARY);
    let before = at_device();
    let _ = guarded.pod.send_frame(&packets::frame(guarded.pod.mac(), [0xff; 6], &packet));
    assert_eq!(at_device(), before + 1);

    // The agent's datagrams pass both ways, on neighbours that have to be found first.
    lab.flush_neighbours();
    let peer = lab.pod("shop-web1");
    guarded.connect(peer.addresses());
    for (own, address) in guarded.pod.addresses().into_iter().zip(peer.addresses()) {
        let agent = guarded.pod.udp((own, TUNNEL_PORT));
        let theirs = peer.udp((address, TUNNEL_PORT));
        let mut initiation = [0; 148];
        initiation[0] = 1;
        let _ = agent.send_to(&initiation, (address, TUNNEL_PORT));
        theirs.set_read_timeout(Some(QUIET)).expect("time-out");
        assert!(theirs.recv(&mut [0; 256]).is_err(), "without the mark it is not the agent's");
        socket2::SockRef::from(&agent).set_mark(MARK).expect("SO_MARK");
        assert!(agent.send_to(CANARY, (address, TUNNEL_PORT)).is_err(), "no type of the protocol");
        agent.send_to(&initiation, (address, TUNNEL_PORT)).expect("the agent's");
        theirs.set_read_timeout(Some(Duration::from_secs(2))).expect("time-out");
        assert_eq!(theirs.recv(&mut [0; 256]).expect("the initiation"), 148);
        theirs.send_to(&initiation, (own, TUNNEL_PORT)).expect("an answer");
        assert_eq!(agent.recv(&mut [0; 256]).expect("the answer"), 148);
    }

    // So do its queries, and the answers.
    let mut query = b"\0\x07\x01\0\0\x01\0\0\0\0\0\0".to_vec();
    query.extend(b"\x0akubernetes\x07default\x03svc\x07cluster\x05local\0\0\x01\0\x01");
    for (port, passes) in [(61000, true), (60999, false)] {
        let resolver = guarded.pod.udp((guarded.pod.v4, port));
        socket2::SockRef::from(&resolver).set_mark(MARK).expect("SO_MARK");
        let answer = resolver.send_to(&query, (RESOLVER, 53)).and_then(|_| resolver.recv(&mut [0; 512]));
        assert_eq!(answer.is_ok(), passes, "{port}: {answer:?}");
    }

    guarded.load(Mode::Strict, Gate::Open);
    for (from, to) in ours.iter().zip(&others) {
        assert_eq!((arrived(from, to, 1), arrived(to, from, 1)), (1, 1), "open");
    }
}

fn opening(lab: &Lab) {
    let guarded = Guarded::new(lab, "shop-client");
    let peer = lab.pod("shop-web1");
    guarded.load(Mode::Strict, Gate::Closed);
    guarded.protect(peer.addresses());
    let theirs = peer.addresses().map(|address| peer.udp((address, PORT)));
    let ours = guarded.pod.addresses().map(|address| guarded.pod.udp((address, 0)));
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let flood = scope.spawn(|| {
            let mut sent = 0_u64;
            while !done.load(Ordering::Relaxed) {
                for (from, to) in ours.iter().zip(&theirs) {
                    let _ = from.send_to(CANARY, to.local_addr().expect("an address"));
                    sent += 1;
                }
            }
            sent
        });
        for _ in 0..20 {
            guarded.load(Mode::Strict, Gate::Open);
            guarded.load(Mode::Strict, Gate::Closed);
        }
        done.store(true, Ordering::Relaxed);
        let sent = flood.join().expect("the flood ends");
        let counted = guarded.counted();
        // The system's own multicast may add to it.
        assert!(counted["outbound_postrouting"] + counted["not_protected"] >= sent, "{counted:?}");
    });
    for to in &theirs {
        to.set_read_timeout(Some(QUIET)).expect("time-out");
        assert!(to.recv(&mut [0; 2048]).is_err(), "a datagram slipped through");
    }
}

/// An address within the ranges that nothing vouches for, while rules, facts, devices and states are loaded over one another.
fn reloads(lab: &Lab) {
    let guarded = Guarded::new(lab, "shop-client");
    let peer = lab.pod("shop-web1");
    let with_ranges = |n: u32| {
        let mut skeleton = guarded.skeleton(Mode::Strict);
        skeleton.ranges = RANGES.split_whitespace().filter_map(|word| word.parse::<IpNet>().ok()).collect();
        match n % 5 {
            0 => skeleton.facts.nodes = (0..n).map(|n| Ipv4Addr::from_bits(0x0a01_0900 + n).into()).collect(),
            1 => skeleton.exempt = vec!["10.5.0.0/16".parse().expect("an exemption")],
            2 => skeleton.resolvers.clear(),
            3 => skeleton.devices.clear(),
            _ => {}
        }
        skeleton
    };
    guarded.load_skeleton(with_ranges(4), Gate::Open);
    let theirs = peer.addresses().map(|address| peer.udp((address, PORT)));
    let ours = guarded.pod.addresses().map(|address| guarded.pod.udp((address, 0)));
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let _done = StopAtEnd(&done);
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                for (from, to) in ours.iter().zip(&theirs) {
                    let _ = from.send_to(CANARY, to.local_addr().expect("an address"));
                }
            }
        });
        for n in 0..200 {
            guarded.load_skeleton(with_ranges(n), if n % 7 == 6 { Gate::Closed } else { Gate::Open });
        }
    });
    for to in &theirs {
        to.set_read_timeout(Some(QUIET)).expect("time-out");
        assert!(to.recv(&mut [0; 2048]).is_err(), "a datagram slipped through");
    }
    assert!(guarded.counted()["unclassified"] > 1_000, "{:?}", guarded.counted());
}
