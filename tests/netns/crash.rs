//! Processes that die, freeze and are replaced under an application that must not notice.
//!
//! 1. `load` works through the tunnel
//! 2. a round does something to the agent or the launcher of shop-client or shop-web2, in turn
//! 3. the successor is the new process named tencrypt-agent in the pod's namespace; from its start (or from SIGCONT) on, the
//!    first datagram may take [`limit`] in 99 of 100 rounds
//! 4. after each round every TCP connection goes on with the server it had, and no reset was seen
//!
//! May touch: the agents and launchers of the lab, its pids folder, its key file.

use std::fs;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::Case;
use crate::cgroup::NoMemory;
use crate::lab::{Agents, BACKENDS, Lab, PROJECT};
use crate::load::{CLIENT, Canary, Load, SERVER, Size, under_load, under_load_of_pods};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case::new("control_crash_load_without_agents_trips_the_leak_detector", load_trips)
        .agents(Agents::Off)
        .looks_itself(),
    Case::new("crash_a_killed_agent_is_replaced_and_connections_live_on", agent_killed)
        .sealed()
        .seconds(1_800),
    Case::new("crash_an_aborted_agent_is_replaced_and_connections_live_on", agent_aborted)
        .sealed()
        .seconds(1_800),
    Case::new("crash_an_agent_without_memory_is_replaced_and_connections_live_on", out_of_memory)
        .sealed()
        .seconds(1_800),
    Case::new("crash_an_agent_frozen_for_a_moment_goes_on", agent_paused).sealed(),
    Case::new("crash_a_frozen_agent_is_replaced_and_connections_live_on", agent_frozen)
        .sealed()
        .seconds(3_600),
    Case::new("crash_a_new_launcher_adopts_the_agent_of_a_killed_one", launcher_killed)
        .sealed()
        .seconds(1_800),
    Case::new("crash_a_new_launcher_goes_on_after_both_were_killed", both_killed).sealed().seconds(1_800),
    Case::new("crash_an_upgrade_loses_and_repeats_no_packet", upgraded).sealed().seconds(600),
    Case::new("crash_a_launcher_that_leaves_is_followed_by_another", launcher_leaves).sealed().seconds(300),
    Case::new("crash_a_key_rotation_loses_no_packet", key_rotated).sealed().seconds(1_200),
];

/// How long a successor may take to be there.
const SUCCESSOR_LIMIT: Duration = Duration::from_secs(15);
/// An agent that lived this long is replaced without a pause.
const SETTLED: Duration = Duration::from_secs(5);

/// From the successor's start to the first datagram. The long form runs on a machine of its own; the short one has too few
/// rounds for percents, and the machine may hold one up.
fn limit() -> Duration {
    Duration::from_millis(if crate::long() { 500 } else { 2_500 })
}

fn rounds(short: usize, long: usize) -> usize {
    if crate::long() { long } else { short }
}

/// Whose processes a round is about.
fn victim(round: usize) -> &'static str {
    if round.is_multiple_of(2) { CLIENT } else { SERVER }
}

fn load_trips(lab: &Lab) {
    let canary = under_load_of_pods(lab, |_| thread::sleep(Duration::from_millis(500)));
    let leaked = lab.leaks().leaked;
    assert!(leaked >= canary.sent, "{leaked} packets in clear were seen, of more than {}", canary.sent);
}

fn agent_killed(lab: &Lab) {
    agent_dies(lab, Signal::SIGKILL, rounds(3, 100));
}

fn agent_aborted(lab: &Lab) {
    agent_dies(lab, Signal::SIGABRT, rounds(2, 100));
}

fn agent_dies(lab: &Lab, signal: Signal, rounds: usize) {
    let mut times = Times::default();
    let canary = under_load(lab, Size::SMALL, |load| {
        for round in 0..rounds {
            settle();
            let pod = victim(round);
            let old = agent(lab, pod);
            kill(old, signal).expect("kill");
            times.back.push(back(lab, load, pod, old));
            times.goes_on(load);
        }
    });
    report(signal.as_str(), &mut times, &canary);
}

/// A memory limit that the next allocation meets: the kernel's OOM killer ends the agent.
fn out_of_memory(lab: &Lab) {
    let no_memory = NoMemory::new();
    let mut times = Times::default();
    let canary = under_load(lab, Size::SMALL, |load| {
        for round in 0..rounds(2, 100) {
            settle();
            let pod = victim(round);
            let (old, kills) = (agent(lab, pod), no_memory.kills());
            no_memory.take(old);
            times.back.push(back(lab, load, pod, old));
            assert_eq!(no_memory.kills(), kills + 1, "{pod}: the agent ended, but not for want of memory");
            times.goes_on(load);
        }
    });
    report("memory limit", &mut times, &canary);
}

/// Too short to count as dead: the same agent goes on.
fn agent_paused(lab: &Lab) {
    let mut times = Times::default();
    let canary = under_load(lab, Size::SMALL, |load| {
        for round in 0..rounds(2, 20) {
            let pod = victim(round);
            let old = agent(lab, pod);
            kill(old, Signal::SIGSTOP).expect("stop");
            thread::sleep(Duration::from_millis(1_000));
            let continued = Instant::now();
            kill(old, Signal::SIGCONT).expect("continue");
            times.back.push(arrival(load, continued));
            times.goes_on(load);
            assert_eq!(agent(lab, pod), old, "{pod}: an agent that was slow for a second was replaced");
        }
    });
    report("SIGSTOP for one second", &mut times, &canary);
}

fn agent_frozen(lab: &Lab) {
    let frozen = Duration::from_secs(if crate::long() { 10 } else { 5 });
    let mut times = Times::default();
    let canary = under_load(lab, Size::SMALL, |load| {
        for round in 0..rounds(1, 100) {
            let pod = victim(round);
            let old = agent(lab, pod);
            let stopped = Instant::now();
            kill(old, Signal::SIGSTOP).expect("stop");
            times.back.push(back(lab, load, pod, old));
            thread::sleep(frozen.saturating_sub(stopped.elapsed()));
            // It was killed meanwhile and is nobody's any more.
            assert!(kill(old, Signal::SIGCONT).is_err(), "{pod}: the frozen agent is still there");
            times.goes_on(load);
        }
    });
    report("SIGSTOP", &mut times, &canary);
}

fn launcher_killed(lab: &Lab) {
    let canary = under_load(lab, Size::SMALL, |load| {
        for round in 0..rounds(2, 50) {
            let pod = victim(round);
            let old = agent(lab, pod);
            end_launcher(lab, pod, Signal::SIGKILL);
            thread::sleep(Duration::from_millis(300));
            relaunch(lab, pod);
            load.assert_connections_go_on();
            load.assert_no_reset();
            assert_eq!(agent(lab, pod), old, "{pod}: the new launcher did not adopt the agent");
        }
    });
    assert_lost(&canary, 0);
}

fn both_killed(lab: &Lab) {
    let mut times = Times::default();
    let canary = under_load(lab, Size::SMALL, |load| {
        for round in 0..rounds(2, 50) {
            let pod = victim(round);
            let old = agent(lab, pod);
            let launcher = launcher(lab, pod);
            for pid in [launcher, old] {
                kill(pid, Signal::SIGKILL).expect("kill");
            }
            await_end(lab, pod, launcher);
            // Closed until somebody comes.
            thread::sleep(Duration::from_millis(300));
            assert!(agents_in(lab, pod).is_empty(), "{pod}: an agent that nobody started");
            thread::scope(|scope| {
                let came_back = scope.spawn(|| back(lab, load, pod, old));
                relaunch(lab, pod);
                times.back.push(came_back.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            });
            times.goes_on(load);
        }
    });
    report("SIGKILL of both", &mut times, &canary);
}

/// What is in use while agents are replaced in order.
fn in_use() -> Size {
    if crate::long() { Size { silent: 1_000, busy: 20 } } else { Size { silent: 100, busy: 6 } }
}

fn upgraded(lab: &Lab) {
    let canary = under_load(lab, in_use(), |load| {
        for round in 0..rounds(5, 20) {
            renew(lab, &[victim(round)]);
            load.assert_connections_go_on();
            load.assert_no_reset();
            thread::sleep(Duration::from_millis(200));
        }
    });
    assert_lost(&canary, 0);
}

fn launcher_leaves(lab: &Lab) {
    let canary = under_load(lab, Size::SMALL, |load| {
        for round in 0..rounds(2, 20) {
            let pod = victim(round);
            let old = agent(lab, pod);
            end_launcher(lab, pod, Signal::SIGQUIT);
            relaunch(lab, pod);
            load.assert_connections_go_on();
            load.assert_no_reset();
            assert_eq!(agent(lab, pod), old, "{pod}: the new launcher did not adopt the agent");
        }
    });
    assert_lost(&canary, 0);
}

fn key_rotated(lab: &Lab) {
    let mut times = Vec::new();
    let canary = under_load(lab, in_use(), |load| {
        for _ in 0..rounds(1, 20) {
            rotate(lab, load, &mut times);
        }
    });
    crate::say(&format!("all connections after {times:?}"));
    // 20 busy connections fill what may wait for a session: a datagram behind them may go.
    assert_lost(&canary, if crate::long() { canary.sent / 10_000 } else { 0 });
    shake_hands_anew(lab, "shop-client2");
    shake_hands_anew(lab, CLIENT);
}

/// The new key is accepted everywhere, then used everywhere, then the old one goes.
fn rotate(lab: &Lab, load: &Load, times: &mut Vec<Duration>) {
    let file = lab.key_file(PROJECT);
    let text = fs::read_to_string(&file).expect("the key file");
    let old = text.trim().trim_start_matches("use ");
    let mut bytes = [0; 32];
    fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes)).expect("random bytes");
    let new = STANDARD.encode(bytes);
    let steps =
        [format!("use {old}\naccept {new}\n"), format!("use {new}\naccept {old}\n"), format!("use {new}\n")];
    for text in steps {
        // In place: the file keeps its owner and its mode.
        fs::write(&file, text).expect("the key file");
        renew(lab, &[CLIENT, "shop-web1"]);
        // Between the halves, and with no session to go on with.
        if crate::long() {
            // Else its pauses grow, and with them those of the connections through it.
            thread::sleep(SETTLED);
        }
        shake_hands_anew(lab, "shop-client2");
        renew(lab, &["shop-client2", SERVER]);
        times.push(load.assert_connections_go_on());
        load.assert_no_reset();
    }
}

/// Kills an agent, sessions and all, and has the pod speak to both backends.
fn shake_hands_anew(lab: &Lab, pod: &str) {
    let old = agent(lab, pod);
    kill(old, Signal::SIGKILL).expect("kill");
    await_successor(lab, pod, old);
    for to in BACKENDS {
        let got = lab.pod(pod).http_get((lab.pod(to).v4, 8080), Duration::from_secs(10));
        assert!(got.is_ok(), "{pod} to {to}: {got:?}");
    }
}

/// Has the agents of `pods` replaced in order, all at once, and waits for the end of the old ones.
pub fn renew(lab: &Lab, pods: &[&str]) {
    let old: Vec<_> = pods.iter().map(|pod| agent(lab, pod)).collect();
    for pod in pods {
        kill(launcher(lab, pod), Signal::SIGHUP).expect("SIGHUP");
    }
    let end = Instant::now() + SUCCESSOR_LIMIT;
    for (pod, old) in pods.iter().zip(old) {
        while !matches!(agents_in(lab, pod)[..], [new] if new != old) {
            assert!(Instant::now() < end, "{pod}: agent {old} was not replaced: {:?}", agents_in(lab, pod));
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Waits for the successor of `old`, and tells how long after its start a datagram arrived.
fn back(lab: &Lab, load: &Load, pod: &str, old: Pid) -> Duration {
    await_successor(lab, pod, old);
    arrival(load, Instant::now())
}

fn await_successor(lab: &Lab, pod: &str, old: Pid) {
    let end = Instant::now() + SUCCESSOR_LIMIT;
    while !agents_in(lab, pod).iter().any(|pid| *pid != old) {
        assert!(Instant::now() < end, "{pod}: agent {old} has no successor");
        thread::sleep(Duration::from_millis(1));
    }
}

fn arrival(load: &Load, since: Instant) -> Duration {
    load.arrival_since(since, Duration::from_secs(10)).expect("no datagram arrives any more")
}

/// Ends the launcher alone.
pub fn end_launcher(lab: &Lab, pod: &str, signal: Signal) {
    let launcher = launcher(lab, pod);
    kill(launcher, signal).expect("kill");
    await_end(lab, pod, launcher);
}

/// The shell around a launcher writes its exit status down: until then another one would be taken for it.
fn await_end(lab: &Lab, pod: &str, launcher: Pid) {
    let status = lab.run_dir().join("log").join(format!("launch-{pod}.rc"));
    let end = Instant::now() + Duration::from_secs(5);
    while fs::read_to_string(&status).unwrap_or_default().trim().is_empty() {
        assert!(Instant::now() < end, "{pod}: launcher {launcher} does not end");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Another launcher, as the lab starts it.
pub fn relaunch(lab: &Lab, pod: &str) {
    let ran = lab.script(&["protect", pod], &[], Duration::from_secs(30));
    assert!(ran.code == 0, "{pod}: no launcher after the last one:\n{}{}", ran.out, ran.err);
}

/// The launcher of a pod.
pub fn launcher(lab: &Lab, pod: &str) -> Pid {
    *lab.agent_pids(pod).first().unwrap_or_else(|| panic!("no launcher of {pod}"))
}

/// The one agent of a pod.
pub fn agent(lab: &Lab, pod: &str) -> Pid {
    let all = agents_in(lab, pod);
    assert!(all.len() == 1, "{pod} has not one agent: {all:?}");
    all[0]
}

/// The living agents in a pod's namespace, whoever started them.
pub fn agents_in(lab: &Lab, pod: &str) -> Vec<Pid> {
    let inode = fs::metadata(&lab.pod(pod).netns).expect("the namespace").ino();
    let entries = fs::read_dir("/proc").expect("/proc").flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim_end() == "tencrypt-agent")
            // A dead process has no namespace any more.
            && fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|ns| ns.ino() == inode)
    })
    .map(Pid::from_raw)
    .collect()
}

/// An agent killed again and again is started with growing pauses, which the long form does not want to measure.
fn settle() {
    thread::sleep(if crate::long() {
        SETTLED / 2 + Duration::from_millis(100)
    } else {
        Duration::from_millis(300)
    });
}

/// At most so many datagrams are lost, and none comes twice.
fn assert_lost(canary: &Canary, most: u64) {
    let Canary { sent, lost, twice, gaps } = canary;
    crate::say(&format!("in order: {sent} datagrams sent, {lost} lost, {twice} twice"));
    assert!(*lost <= most && *twice == 0, "{lost} of {sent} lost (from, count: {gaps:?}), {twice} twice");
}

/// What the rounds took.
#[derive(Default)]
struct Times {
    /// From the successor's start to the first datagram.
    back: Vec<Duration>,
    /// From then until every TCP connection went on: the kernel's patience, most of it.
    tcp: Vec<Duration>,
}

impl Times {
    /// Waits until every TCP connection goes on.
    fn goes_on(&mut self, load: &Load) {
        self.tcp.push(load.assert_connections_go_on());
        load.assert_no_reset();
    }
}

fn report(what: &str, times: &mut Times, canary: &Canary) {
    let Times { back, tcp } = times;
    back.sort();
    tcp.sort();
    let at = |times: &[Duration], percent: usize| {
        times[(times.len() * percent).div_ceil(100).clamp(1, times.len()) - 1]
    };
    let Canary { sent, lost, twice, .. } = canary;
    let percents = |times: &[Duration]| [50, 99, 100].map(|percent| at(times, percent));
    crate::say(&format!(
        "{what}: {} rounds; median, p99, longest: first datagram after {:?}, all connections after {:?}; {lost} of {sent} lost",
        back.len(),
        percents(back),
        percents(tcp)
    ));
    let p99 = at(back, 99);
    assert!(p99 <= limit(), "{what}: the first datagram took {p99:?}: {back:?}");
    assert_eq!(*twice, 0, "a datagram arrived twice");
}
