//! Ordered stops under traffic: no packet in clear before the guard is deleted.
//!
//! 1. shop-client and shop-web2 speak to each other: UDP each millisecond and TCP, both families, both directions; shop-client
//!    tries everything else that an application can
//! 2. the launcher of one of them gets SIGTERM
//! 3. a packet socket at the node's end of the pod's link has the kernel's time stamp of every frame that left or entered
//! 4. [`Deletion`] is when the guard's tables went, on the same clock: a frame in clear before it is a leak
//! 5. the positive control: frames in clear after it
//!
//! May touch: the launchers that it starts, sockets in the pods and on the nodes. Source: packet(7), socket(7)
//! (SO_TIMESTAMPNS), linux/netfilter/nf_tables.h, `nf_tables_commit` of the kernel.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_NETFILTER;

use crate::Case;
use crate::lab::{Agents, Lab, Launched, PROJECT, PROTECTED, TUNNEL_PORT, echo_vips, web_vips};
use crate::lifecycle::{StopAtEnd, keep_trying};
use crate::load::{CLIENT, SERVER};
use crate::packets::{CANARY, Seen, seen};
use crate::pod::{Pod, Sniffer};

/// The cases of this file.
pub const CASES: &[Case] =
    &[Case::new("promise_1_an_ordered_stop_lets_nothing_out_before_the_guard_is_deleted", stopped_in_order)
        .agents(Agents::Off)
        .looks_itself()
        .seconds(900)];

const UDP_PORT: u16 = 9_600;
const TCP_PORT: u16 = 9_601;
/// A round whose deletion is not known as exactly as this is made once more.
const EXACT: Duration = Duration::from_millis(5);
/// `nf_tables_commit` empties the chains before it raises the generation.
const COMMIT: Duration = Duration::from_millis(1);
/// Until the pods hear each other, until the launcher ends, until frames in clear are seen.
const LIMIT: Duration = Duration::from_secs(15);

fn stopped_in_order(lab: &Lab) {
    let (key, directory) = (lab.key_file(PROJECT), lab.directory(PROJECT));
    let start = |pod: &str| Launched::pod(lab, pod, &directory, &key);
    let pods = [(CLIENT, "node1"), (SERVER, "node2")];
    let mut launched = pods.map(|(pod, _)| start(pod));
    let wanted = if crate::long() { 100 } else { 3 };
    let (mut exact, mut in_doubt, mut after) = (Vec::new(), 0, 0);
    for round in 0..10 * wanted {
        let which = round % pods.len();
        let (pod, node) = pods[which];
        let (deletion, clear) = stop_under_traffic(lab, pod, node, &mut launched[which]);
        let too_early: Vec<_> = clear.iter().filter(|(at, _)| *at + COMMIT < deletion.not_before).collect();
        assert!(
            too_early.is_empty(),
            "round {round}, {pod}: {} in clear before the guard was deleted, the first {:?} before: {:?}",
            too_early.len(),
            deletion.not_before - too_early[0].0,
            too_early[0].1
        );
        after += clear.iter().filter(|(at, _)| *at > deletion.told).count();
        let width = deletion.told - deletion.not_before;
        if width <= EXACT {
            in_doubt += clear.iter().filter(|(at, _)| *at <= deletion.told).count();
            exact.push(width);
        }
        if exact.len() == wanted {
            exact.sort();
            crate::say(&format!(
                "{wanted} stops (and {} less exact): the deletion is known to median {:?}, longest {:?}; in clear: 0 before, \
                 {in_doubt} then, {after} after it",
                round + 1 - wanted,
                exact[wanted / 2],
                exact[wanted - 1]
            ));
            return;
        }
        launched[which] = start(pod);
    }
    panic!("only of {} of {wanted} deletions the time is known to {EXACT:?}", exact.len());
}

/// When the guard's tables went, and what passed the pod's link in clear before and after, each with its time.
fn stop_under_traffic(
    lab: &Lab,
    pod: &str,
    node: &str,
    launched: &mut Launched,
) -> (Deletion, Vec<(Duration, Seen)>) {
    let link = Sniffer::on(&lab.netns(node), &format!("p-{pod}"));
    link.stamp();
    lab.reset_leaks();
    let project = project(lab);
    let mut clear = Vec::new();
    let mut read = || {
        for (at, frame) in link.drain_stamped() {
            clear.extend(in_clear(&frame, &project).map(|seen| (at, seen)));
        }
        clear.clone()
    };
    let watch = DeletionWatch::open(lab.pod(pod));
    let (stop, tries, heard) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let deletion = thread::scope(|scope| {
        let _stop = StopAtEnd(&stop);
        scope.spawn(|| talk(lab, &stop, &heard));
        scope.spawn(|| keep_trying(lab, true, &stop, &tries));
        await_that("the pods do not hear each other", || heard.load(Ordering::Acquire) > 100);
        let waiting = scope.spawn(|| watch.wait());
        assert_eq!(launched.stop(), Some(0), "{}", launched.printed());
        let deletion = waiting.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        await_that("nothing is in clear after the stop", || read().iter().any(|(at, _)| *at > deletion.told));
        deletion
    });
    // A frame to the pod is counted by the detector a moment before the packet socket gets it.
    let counted = lab.leaks().count(|at, _, _, _| at == pod);
    await_that("the detector counts more frames in clear than were captured", || {
        read().len() as u64 >= counted
    });
    (deletion, read())
}

fn await_that(otherwise: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !is_so() {
        assert!(Instant::now() < end, "{otherwise}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Both pods to each other, each millisecond, until `stop`; counts in `heard` when every stream of datagrams arrives.
fn talk(lab: &Lab, stop: &AtomicBool, heard: &AtomicU64) {
    let mut datagrams = Vec::new();
    let mut streams = Vec::new();
    for (from, to) in [(CLIENT, SERVER), (SERVER, CLIENT)].map(|(a, b)| (lab.pod(a), lab.pod(b))) {
        for address in to.addresses() {
            datagrams.push(datagrams_between(from, to, address));
            let listener = to.listen((address, TCP_PORT).into());
            let ours = from.connect((address, TCP_PORT), LIMIT).expect("a connection through the tunnel");
            let theirs = listener.accept().expect("its other end").0;
            streams.extend([ours, theirs]);
        }
    }
    for stream in &streams {
        stream.set_nonblocking(true).expect("non-blocking");
    }
    let mut arrived = vec![0; datagrams.len()];
    while !stop.load(Ordering::Acquire) {
        // Refused or lost, all the same.
        for (n, (from, to)) in datagrams.iter().enumerate() {
            let _ = from.send(CANARY);
            while to.recv(&mut [0; 64]).is_ok() {
                arrived[n] += 1;
            }
        }
        streams.iter_mut().for_each(speak);
        heard.store(arrived.iter().copied().min().expect("streams"), Ordering::Release);
        thread::sleep(Duration::from_millis(1));
    }
}

fn datagrams_between(from: &Pod, to: &Pod, address: IpAddr) -> (UdpSocket, UdpSocket) {
    let receiver = to.udp((address, UDP_PORT));
    receiver.set_nonblocking(true).expect("non-blocking");
    let sender = from.udp_for(address);
    sender.connect((address, UDP_PORT)).expect("connect");
    (sender, receiver)
}

fn speak(stream: &mut TcpStream) {
    let _ = stream.write(CANARY);
    let _ = stream.read(&mut [0; 4_096]);
}

/// Every address that only ever appears sealed.
fn project(lab: &Lab) -> BTreeSet<IpAddr> {
    let vips = web_vips().into_iter().chain(echo_vips()).map(|vip| vip.ip());
    PROTECTED.iter().flat_map(|pod| lab.pod(pod).addresses()).chain(vips).collect()
}

/// What a frame shows, if that should have been sealed: between addresses of the project, but no datagram of the tunnel, no
/// ICMP error that quotes one, no neighbour discovery.
fn in_clear(frame: &[u8], project: &BTreeSet<IpAddr>) -> Option<Seen> {
    let seen = seen(frame).filter(|seen| project.contains(&seen.from) && project.contains(&seen.to))?;
    let header = if seen.from.is_ipv4() { 20 } else { 40 };
    let icmp = 14 + header;
    let quoted_ports = frame.get(icmp + 8 + header..icmp + 8 + header + 4);
    let quotes = quoted_ports == Some(&[TUNNEL_PORT.to_be_bytes(), TUNNEL_PORT.to_be_bytes()].concat());
    let rightly = match seen.protocol {
        1 => quotes,
        58 => quotes || (133..=137).contains(&frame[icmp]),
        _ => seen.protocol == 17 && seen.ports == Some((TUNNEL_PORT, TUNNEL_PORT)),
    };
    (!rightly).then_some(seen)
}

/// The time at which the guard's tables went, from both sides, since 1970.
#[derive(Clone, Copy, Debug)]
struct Deletion {
    /// Then the generation of rules before it was still in force.
    not_before: Duration,
    /// Then the kernel had told of it.
    told: Duration,
}

/// Waits for the deletion of the guard's tables, and asks for the generation of rules all the time.
struct DeletionWatch {
    events: Socket,
    queries: Socket,
}

const SUBSYSTEM: u16 = 10 << 8;
const DEL_TABLE: u16 = SUBSYSTEM | 2;
const NEW_GENERATION: u16 = SUBSYSTEM | 15;
const GET_GENERATION: u16 = SUBSYSTEM | 16;
/// NFNLGRP_NFTABLES.
const GROUP: u32 = 7;

impl DeletionWatch {
    fn open(pod: &Pod) -> Self {
        let socket = || {
            let mut socket = Socket::new(NETLINK_NETFILTER).expect("nfnetlink");
            socket.bind_auto().expect("bind");
            socket
        };
        let (events, queries) = pod.enter(|| (socket(), socket()));
        events.set_rx_buf_sz(1 << 20).expect("receive buffer");
        events.add_membership(GROUP).expect("NFNLGRP_NFTABLES");
        events.set_non_blocking(true).expect("non-blocking");
        Self { events, queries }
    }

    fn wait(&self) -> Deletion {
        let end = Instant::now() + LIMIT;
        // Each generation, and when it was last seen in force.
        let mut in_force: Vec<(u16, Duration)> = Vec::new();
        loop {
            let asked = now();
            let generation = self.generation();
            match in_force.last_mut().filter(|(last, _)| *last == generation) {
                Some((_, at)) => *at = asked,
                None => in_force.push((generation, asked)),
            }
            if let Some(deletion) = self.deleted() {
                let told = now();
                let earlier = |generation: u16| (1..0x8000).contains(&deletion.wrapping_sub(generation));
                let before = in_force.iter().rev().find(|(generation, _)| earlier(*generation));
                return Deletion { not_before: before.expect("it began before").1, told };
            }
            assert!(Instant::now() < end, "the guard is not deleted");
            thread::sleep(Duration::from_micros(20));
        }
    }

    /// The low half of the number of the rules in force.
    fn generation(&self) -> u16 {
        let mut request = Vec::new();
        request.extend(20u32.to_ne_bytes());
        request.extend(GET_GENERATION.to_ne_bytes());
        request.extend(1u16.to_ne_bytes());
        // Sequence number and port, then family, version and resource.
        request.extend([0; 12]);
        self.queries.send(&request, 0).expect("ask for the generation");
        let (answer, _) = self.queries.recv_from_full().expect("the generation");
        let (kind, body) = messages(&answer).next().expect("an answer");
        assert_eq!(kind, NEW_GENERATION);
        // The first attribute is the number.
        u16::from_be_bytes([body[10], body[11]])
    }

    /// The generation that the guard's tables were deleted with, if that was told.
    fn deleted(&self) -> Option<u16> {
        loop {
            let (told, _) = match self.events.recv_from_full() {
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return None,
                told => told.expect("events of nft tables"),
            };
            let named = |body: &[u8]| body.windows(9).any(|bytes| bytes == b"tencrypt\0");
            let found = messages(&told).find(|(kind, body)| *kind == DEL_TABLE && named(body));
            if let Some((_, body)) = found {
                return Some(u16::from_be_bytes([body[2], body[3]]));
            }
        }
    }
}

/// Kind and content of each netlink message.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?);
        let length = usize::try_from(length).expect("fits");
        let message = bytes.get(..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([message[4], message[5]]), message.get(16..)?))
    })
}

/// The clock of the frames' time stamps.
fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock past 1970")
}
