//! Random tampering inside the pod's namespace, under traffic: each alone, and two at once.
//!
//! 1. `draw` takes a round's tampering from its seed
//! 2. it is done in one go, while the load's connections run and datagrams go to every protected address
//! 3. what was to be repaired has to be as before within [`LIMIT`], what stays has to be reported by then; nothing leaks
//! 4. what stays is taken back: all is as before again, and every connection goes on
//!
//! Two at once may take both the guard and the way into `tenc0`: plaintext then leaves until the agent has put one back, and
//! never after [`LIMIT`]. Frames of packet sockets have only the guard in their way; [`frames`] measures for how long it is
//! away.
//!
//! `TENC_SEED=SEED[:ROUND]` has the rounds of another run again, from that round on.
//! May touch: the namespace of shop-client, files of the lab's folder.

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::Value;

use crate::Case;
use crate::lab::{Agents, Lab, Ran, external, run, tencrypt};
use crate::lifecycle::StopAtEnd;
use crate::load::{CLIENT, Load, Size, under_load};
use crate::packets::{self, CANARY};
use crate::snapshot::Snapshot;

mod draw;

pub use draw::Rng;
use draw::{Expect, Takes, Tampering, World, draw};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case::new("promise_1_random_tampering_leaks_nothing_and_is_repaired_or_reported_within_a_second", alone)
        .seconds(3_600),
    Case::new("promise_1_two_tamperings_at_once_are_closed_and_reported_within_a_second", pairs)
        .looks_itself()
        .seconds(3_600),
    Case::new("control_guard_and_rules_taken_at_once_trip_the_leak_detector_until_repaired", both_barriers)
        .looks_itself()
        .seconds(120),
    Case::new("promise_2_frames_of_packet_sockets_pass_only_until_the_guard_is_back", frames)
        .looks_itself()
        .seconds(120),
];

/// How long a repair or a report may take.
const LIMIT: Duration = Duration::from_secs(1);
/// A loaded machine takes its own time to show the state. The long form runs on a machine of its own.
fn grace() -> Duration {
    Duration::from_millis(if crate::long() { 500 } else { 2_000 })
}
/// How long what was taken back may take to be as before: IPv6 looks for a router first.
const UNDONE_LIMIT: Duration = Duration::from_secs(5);
/// By then the agent has put right what it could.
const SETTLE: Duration = Duration::from_millis(300);
/// The seed of the short form.
const SEED: u64 = 20;

fn rounds(short: usize, long: usize) -> usize {
    if crate::long() { long } else { short }
}

/// The seed, and the first round.
fn seed() -> (u64, usize) {
    match std::env::var("TENC_SEED") {
        Ok(text) => {
            let (seed, round) = text.split_once(':').unwrap_or((&text, "0"));
            let number = |text: &str| text.parse().unwrap_or_else(|e| panic!("TENC_SEED={text}: {e}"));
            (number(seed), usize::try_from(number(round)).expect("a round"))
        }
        Err(_) if crate::long() => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
            (u64::from(now.subsec_micros()), 0)
        }
        Err(_) => (SEED, 0),
    }
}

/// Each round has its own: any of them can be had again alone.
fn rng(seed: u64, round: usize) -> Rng {
    Rng(seed.wrapping_mul(1 << 20).wrapping_add(u64::try_from(round).expect("fits")))
}

/// The pod that is tampered with, as it was.
struct Scene<'l> {
    lab: &'l Lab,
    load: &'l Load,
    world: &'l World,
    before: Snapshot,
    times: Vec<(&'static str, Duration, Duration)>,
}

impl<'l> Scene<'l> {
    fn new(lab: &'l Lab, load: &'l Load, world: &'l World) -> Self {
        let before = Snapshot::of(&lab.pod(CLIENT).netns);
        Self { lab, load, world, before, times: Vec::new() }
    }

    /// What is not as before. A device that was made again has another number.
    fn differences(&self) -> Vec<String> {
        self.load.assert_no_reset();
        let now = Snapshot::of(&self.lab.pod(CLIENT).netns);
        let lines = self.before.difference(&now);
        lines.into_iter().filter(|line| !line.contains(": tenc0:")).collect()
    }

    fn bash(&self, commands: &str) -> Ran {
        self.lab
            .pod(CLIENT)
            .enter(|| run(Command::new("bash").args(["-c", commands]), Duration::from_secs(5)))
    }

    /// The pod's state in `tencrypt status`, and why.
    fn status(&self) -> (String, String) {
        let name = format!("{}-{CLIENT}", self.lab.name());
        let ran =
            run(Command::new(tencrypt()).args(["status", &name, "-o", "json"]), Duration::from_secs(15));
        let json: Value =
            serde_json::from_str(&ran.out).unwrap_or_else(|e| panic!("{e}: {}{}", ran.out, ran.err));
        (
            json["state"].as_str().unwrap_or_default().to_owned(),
            format!("{} {}", json["reason"], json["standing"]),
        )
    }

    fn is_protected(&self) -> bool {
        self.status().0 == "protected"
    }

    /// Waits for `done`, which says what is missing; how long that took since `since`.
    fn wait(
        &self,
        since: Instant,
        limit: Duration,
        what: &str,
        mut done: impl FnMut() -> Option<String>,
    ) -> Duration {
        loop {
            let asked = since.elapsed();
            let Some(missing) = done() else { return since.elapsed() };
            assert!(asked < limit, "{what}, after {asked:?}:\n{missing}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// None: all is as before.
    fn as_before(&self) -> Option<String> {
        let left = self.differences();
        if !left.is_empty() {
            return Some(left.join("\n"));
        }
        let (state, why) = self.status();
        (state != "protected").then(|| format!("{state}: {why}"))
    }

    fn undo(&self, tamperings: &[&Tampering]) {
        let started = Instant::now();
        for tampering in tamperings.iter().rev().filter(|t| !t.undo.is_empty()) {
            self.bash(&tampering.undo);
        }
        self.wait(started, UNDONE_LIMIT, "taken back, and not as before", || self.as_before());
    }

    /// One tampering, alone.
    fn alone(&mut self, tampering: &Tampering) {
        let started = Instant::now();
        let ran = self.bash(&format!("set -e; {}", tampering.apply));
        assert!(ran.code == 0, "{}", ran.err);
        let taken = match tampering.expect {
            Expect::Repaired => self.wait(started, LIMIT + grace(), "not repaired", || self.as_before()),
            Expect::Reported => {
                let protected = || self.is_protected().then(|| "it counts as protected".to_owned());
                let taken = self.wait(started, LIMIT + grace(), "not reported", protected);
                // And goes on to be: what was put right is no answer.
                thread::sleep(SETTLE);
                assert_eq!(protected(), None);
                taken
            }
            Expect::Harmless => {
                let arrived = self.load.arrival_since(Instant::now(), LIMIT + grace());
                assert!(arrived.is_some(), "traffic stands still");
                self.load.assert_connections_go_on();
                let (state, why) = self.status();
                assert_eq!(state, "protected", "{why}");
                Duration::ZERO
            }
        };
        if tampering.expect == Expect::Repaired {
            let back = self.load.arrival_since(started + taken, LIMIT).expect("traffic stands still");
            let silence = self.load.longest_silence(started);
            self.times.push((tampering.kind, taken, silence.max(back)));
        } else {
            self.lab.assert_no_leak();
            self.undo(&[tampering]);
            if tampering.expect == Expect::Reported {
                self.times.push((tampering.kind, taken, Duration::ZERO));
            }
        }
        self.load.assert_connections_go_on();
        self.lab.assert_no_leak();
    }

    /// Two at once. Plaintext that left before it was closed is counted.
    fn pair(&mut self, pair: &[Tampering; 2]) -> u64 {
        let started = Instant::now();
        // Where one is in the way of the other, the other is what is left.
        self.bash(&format!("{{ {}; }} & {{ {}; }} & wait", pair[0].apply, pair[1].apply));
        let taken = self.wait(started, LIMIT + grace(), "neither repaired nor reported", || {
            if self.is_protected() { self.as_before_but(pair) } else { None }
        });
        let leaked = self.lab.leaks().leaked;
        let both = |takes| pair.iter().any(|tampering| tampering.takes == takes);
        if !(both(Takes::Guard) && both(Takes::Way)) {
            assert_eq!(leaked, 0, "packets in clear: {:?}", self.lab.leaks().rows);
        }
        thread::sleep((LIMIT + grace()).saturating_sub(started.elapsed()));
        self.lab.reset_leaks();
        thread::sleep(Duration::from_millis(200));
        self.lab.assert_no_leak();
        self.undo(&[&pair[0], &pair[1]]);
        self.load.assert_connections_go_on();
        self.lab.assert_no_leak();
        self.times.push(("pair", taken, Duration::ZERO));
        leaked
    }

    /// As before, but for what is harmless and stays.
    fn as_before_but(&self, pair: &[Tampering; 2]) -> Option<String> {
        if pair.iter().any(|tampering| tampering.expect == Expect::Harmless) {
            let arrived = self.load.arrival_since(Instant::now(), Duration::from_millis(300));
            return arrived.is_none().then(|| "protected, and traffic stands still".to_owned());
        }
        self.as_before()
    }

    fn report(&self, what: &str) {
        for (name, of) in [("repaired or reported", 0), ("longest silence of the canary", 1)] {
            let mut times: Vec<_> = self
                .times
                .iter()
                .map(|(kind, taken, silence)| (if of == 0 { *taken } else { *silence }, *kind))
                .collect();
            times.sort();
            let at = |percent: usize| times[(times.len() * percent).div_ceil(100).clamp(1, times.len()) - 1];
            if !times.is_empty() {
                crate::say(&format!(
                    "{what}: {} rounds, {name}: median {:?}, p99 {:?}, longest {:?}",
                    times.len(),
                    at(50).0,
                    at(99),
                    at(100)
                ));
            }
        }
    }
}

/// Says which round it was when it fails.
struct Round<'a> {
    seed: u64,
    round: usize,
    tamperings: &'a [&'a Tampering],
}

impl Drop for Round<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            let Self { seed, round, tamperings } = self;
            crate::say(&format!("TENC_SEED={seed}:{round} has this round again: {tamperings:#?}"));
        }
    }
}

/// Runs `f` while the application works and a datagram of it goes to every protected address each millisecond or two.
fn under_fire(lab: &Lab, f: impl FnOnce(&mut Scene<'_>)) {
    // What the agents learned from the DNS of earlier cases would come to its end meanwhile, and not be as before.
    lab.ensure(Agents::Off);
    lab.ensure(Agents::On(""));
    let world = World::of(lab);
    let canary = under_load(lab, Size::SMALL, |load| {
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let _stop = StopAtEnd(&stop);
            scope.spawn(|| probe(lab, &world, &stop));
            f(&mut Scene::new(lab, load, &world));
        });
    });
    assert_eq!(canary.twice, 0, "a datagram arrived twice");
}

fn probe(lab: &Lab, world: &World, stop: &AtomicBool) {
    let pod = lab.pod(CLIENT);
    let sockets = pod.addresses().map(|own| pod.udp_for(own));
    while !stop.load(Ordering::Acquire) {
        for to in world.protected() {
            // Refused or lost, all the same: what counts is that nothing leaves in clear.
            let _ = sockets[usize::from(to.is_ipv6())].send_to(CANARY, (*to, 7_007));
        }
        thread::sleep(Duration::from_millis(2));
    }
}

fn alone(lab: &Lab) {
    let (seed, first) = seed();
    under_fire(lab, |scene| {
        for round in first..first + rounds(12, 500) {
            let tampering = draw(&mut rng(seed, round), scene.world);
            let _round = Round { seed, round, tamperings: &[&tampering] };
            scene.alone(&tampering);
        }
        scene.report(&format!("tampering, TENC_SEED={seed}"));
    });
}

fn pairs(lab: &Lab) {
    let (seed, first) = seed();
    under_fire(lab, |scene| {
        let mut leaked = Vec::new();
        for round in first..first + rounds(4, 200) {
            let mut rng = rng(!seed, round);
            let pair = [draw(&mut rng, scene.world), draw(&mut rng, scene.world)];
            let _round = Round { seed, round, tamperings: &[&pair[0], &pair[1]] };
            leaked.push(scene.pair(&pair));
        }
        scene.report(&format!("pairs, TENC_SEED={seed}"));
        leaked.retain(|packets| *packets > 0);
        crate::say(&format!(
            "pairs that took guard and way: packets in clear before it was closed: {leaked:?}"
        ));
    });
}

/// The guard and the rules at once: what the detector is there to see. The agent may be fast enough to put the one right
/// before the other goes.
fn both_barriers(lab: &Lab) {
    let taken = |takes, apply: &str| Tampering {
        kind: "both",
        apply: apply.to_owned(),
        undo: String::new(),
        expect: Expect::Repaired,
        takes,
    };
    let pair = [
        taken(Takes::Guard, "nft flush ruleset"),
        taken(Takes::Way, "ip rule del pref 105; ip -6 rule del pref 105"),
    ];
    under_fire(lab, |scene| {
        let _round = Round { seed: 0, round: 0, tamperings: &[&pair[0], &pair[1]] };
        let mut leaked = Vec::new();
        while leaked.len() < 10 && (crate::long() || leaked.iter().all(|packets| *packets == 0)) {
            leaked.push(scene.pair(&pair));
        }
        crate::say(&format!("guard and rules at once: {leaked:?} packets in clear before it was closed"));
        let seen = leaked.iter().filter(|packets| **packets > 0).count();
        assert!(seen >= if crate::long() { leaked.len() } else { 1 }, "the detector saw nothing: {leaked:?}");
    });
}

/// Frames are sent as fast as they go: the first and the last that the kernel took show how long nothing stood in their way.
fn frames(lab: &Lab) {
    let pod = lab.pod(CLIENT);
    let to = lab.pod("shop-web1").v4.into();
    let frame = packets::frame(pod.mac(), [0xff; 6], &packets::udp(pod.v4.into(), to, 7_007, 7_007, CANARY));
    // To the gateway, which no bridge floods.
    let free = packets::frame(
        pod.mac(),
        [2, 0, 0, 1, 1, 1],
        &packets::udp(pod.v4.into(), external()[0], 7_007, 7_007, CANARY),
    );
    lab.declare([format!("{}/udp/7007", external()[0])]);
    let socket = pod.frames();
    assert!(socket.send(&free).is_ok(), "control: a frame to nobody of ours passes");
    let mut windows = Vec::new();
    for _ in 0..rounds(3, 50) {
        assert!(socket.send(&frame).is_err(), "the guard lets a frame pass");
        lab.assert_no_leak();
        let over = AtomicBool::new(false);
        let (taken, sent) = thread::scope(|scope| {
            let _stop = StopAtEnd(&over);
            let sending = scope.spawn(|| {
                let (mut taken, mut sent) = (Vec::new(), 0u64);
                while !over.load(Ordering::Acquire) {
                    if socket.send(&frame).is_ok() {
                        taken.push(Instant::now());
                        sent += 1;
                    }
                    thread::sleep(Duration::from_micros(100));
                }
                (taken, sent)
            });
            let ran =
                pod.enter(|| run(Command::new("nft").args(["flush", "ruleset"]), Duration::from_secs(5)));
            assert_eq!(ran.code, 0, "{}", ran.err);
            thread::sleep(2 * LIMIT + grace());
            over.store(true, Ordering::Release);
            sending.join().expect("the sender")
        });
        let window = taken.last().expect("control: without a guard a frame passes").duration_since(taken[0]);
        let most = if crate::long() { LIMIT } else { LIMIT + grace() };
        assert!(window < most, "frames passed for {window:?}");
        let seen = lab.leaks().count(|pod, _, direction, _| (pod, direction) == (CLIENT, "out"));
        assert_eq!(seen, sent, "the detector counts what the kernel took");
        lab.reset_leaks();
        windows.push(window);
    }
    windows.sort();
    crate::say(&format!(
        "nft flush ruleset, {} rounds: frames of packet sockets pass for median {:?}, longest {:?}",
        windows.len(),
        windows[windows.len() / 2],
        windows[windows.len() - 1]
    ));
}
