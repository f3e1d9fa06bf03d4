//! Launchers that come, are stopped and die in the middle of something: one agent at most is left, or nothing at all.
//!
//! May touch: the launchers and agents of the lab.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};

use crate::Case;
use crate::crash::{agent, agents_in, end_launcher, launcher, relaunch, renew};
use crate::lab::{Agents, Lab, Launched, PROJECT};
use crate::load::{CLIENT, Size, under_load};
use crate::services::copy_directory;

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case::new("a_launcher_stopped_while_it_takes_over_removes_the_agent_too", stopped_while_adopting)
        .agents(Agents::Off)
        .looks_itself(),
    Case::new("a_gate_stopped_while_it_waits_removes_the_agent_too", gate_stopped)
        .agents(Agents::Off)
        .looks_itself(),
    Case::new("an_agent_whose_launcher_dies_during_a_hand_over_goes_on", hand_over_broken_off).sealed(),
    Case::new("launchers_that_start_together_are_not_in_each_others_way", started_together)
        .agents(Agents::Off)
        .looks_itself(),
];

/// Longer than any step that a stop waits for.
const LIMIT: Duration = Duration::from_secs(10);

fn arguments(lab: &Lab, pod: &str, directory: &Path) -> Vec<String> {
    Launched::args(lab, pod, directory, &lab.key_file(PROJECT))
}

fn start(lab: &Lab, arguments: &[String]) -> Launched {
    Launched::start(lab, &arguments.iter().map(String::as_str).collect::<Vec<_>>())
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < end, "{what}: not within {LIMIT:?}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// An agent that has lost its launcher.
fn orphan(lab: &Lab, directory: &Path) {
    let mut first = Launched::pod(lab, CLIENT, directory, &lab.key_file(PROJECT));
    first.signal(Signal::SIGKILL);
    assert!(first.ended(LIMIT).is_some());
    agent(lab, CLIENT);
}

fn assert_nothing_left(lab: &Lab, said: &str) {
    assert!(agents_in(lab, CLIENT).is_empty(), "an agent is left:\n{said}");
    let left = lab.differences();
    assert!(left.is_empty(), "left behind:\n{}\n{said}", left.join("\n"));
}

fn stopped_while_adopting(lab: &Lab) {
    let directory = lab.directory(PROJECT);
    for (frozen, after) in [(false, 1), (false, 10), (false, 40), (true, 20), (true, 500), (true, 3_020)] {
        orphan(lab, &directory);
        if frozen {
            kill(agent(lab, CLIENT), Signal::SIGSTOP).expect("stop");
        }
        let mut second = start(lab, &arguments(lab, CLIENT, &directory));
        // It has the signals in hand from before it locks the pod.
        until("a second launcher", || second.has_handler(Signal::SIGTERM));
        thread::sleep(Duration::from_millis(after));
        second.signal(Signal::SIGTERM);
        assert_eq!(second.ended(LIMIT), Some(0), "frozen {frozen}, after {after} ms: {}", second.printed());
        assert_nothing_left(lab, &second.printed());
    }
}

fn gate_stopped(lab: &Lab) {
    let directory = copy_directory(lab, "gate-stopped");
    let away = directory.with_extension("away");
    orphan(lab, &directory);
    fs::rename(&directory, &away).expect("the directory goes");
    let mut gate = start(lab, &[arguments(lab, CLIENT, &directory), vec!["--guard-first".into()]].concat());
    until("the gate", || gate.printed().contains("guarded "));
    agent(lab, CLIENT);
    gate.signal(Signal::SIGTERM);
    assert_eq!(gate.ended(LIMIT), Some(0), "{}", gate.printed());
    assert_nothing_left(lab, &gate.printed());
    fs::remove_dir_all(&away).expect("the copy");
}

fn hand_over_broken_off(lab: &Lab) {
    let canary = under_load(lab, Size::SMALL, |load| {
        for after in [0, 100, 400] {
            let old = agent(lab, CLIENT);
            // It does not get to reading the order before its launcher is dead.
            kill(old, Signal::SIGSTOP).expect("stop");
            kill(launcher(lab, CLIENT), Signal::SIGHUP).expect("SIGHUP");
            until("a successor", || agents_in(lab, CLIENT).len() == 2);
            thread::sleep(Duration::from_millis(after));
            end_launcher(lab, CLIENT, Signal::SIGKILL);
            kill(old, Signal::SIGCONT).expect("continue");
            until("the successor's end", || agents_in(lab, CLIENT) == [old]);
            load.assert_connections_go_on();
            relaunch(lab, CLIENT);
            assert_eq!(agent(lab, CLIENT), old, "the next launcher did not find the agent that goes on");
            load.assert_connections_go_on();
        }
    });
    assert_eq!(canary.twice, 0, "a datagram arrived twice");
    // An agent that the last launcher has started says what it does where the next case looks.
    renew(lab, &[CLIENT]);
}

fn started_together(lab: &Lab) {
    let pods = [CLIENT, "shop-client2", "shop-web1", "shop-web2"];
    for _ in 0..if crate::long() { 50 } else { 3 } {
        let mut launched: Vec<_> =
            pods.iter().map(|pod| start(lab, &arguments(lab, pod, &lab.directory(PROJECT)))).collect();
        launched.iter().for_each(Launched::wait_ready);
        for launched in &mut launched {
            assert_eq!(launched.stop(), Some(0), "{}", launched.printed());
        }
    }
}
