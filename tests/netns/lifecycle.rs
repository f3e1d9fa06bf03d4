//! Keys that change under load, and processes that die.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use socket2::SockAddr;

use crate::Case;
use crate::lab::{Agents, Lab, echo_vips, web_vips};
use crate::packets::{self, CANARY};
use crate::pod;

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case::new("promise_5_a_rekey_loses_no_packet", rekey_loses_nothing)
        .agents(Agents::On("--rekey-after 2"))
        .sealed()
        .seconds(120),
    Case::new("promise_7_tcp_lives_through_rekeys", tcp_through_rekeys)
        .agents(Agents::On("--rekey-after 2"))
        .sealed()
        .seconds(120),
    Case::new("promise_1_killing_agent_and_launcher_together_leaks_nothing", both_killed)
        .every_rp_filter()
        .seconds(90),
    Case::new("promise_1_killing_the_agent_alone_leaks_nothing", agent_killed).seconds(90),
    Case::new("promise_11_an_agent_keeps_two_capabilities_and_is_confined", confined),
];

/// The port of the receiver that numbers are sent to.
const NUMBERS: u16 = 9_400;

/// Numbered datagrams in both directions of both families, over several rekeys; each must arrive once.
fn rekey_loses_nothing(lab: &Lab) {
    let seconds = if crate::long() { 32 } else { 8 };
    let per_second = 2_000;
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let mut streams = Vec::new();
        for (from, to) in [("shop-client", "shop-web2"), ("shop-client2", "shop-web1")] {
            for address in lab.pod(to).addresses() {
                let receiver = lab.pod(to).udp((address, NUMBERS));
                pod::enlarge(&receiver);
                receiver.set_read_timeout(Some(Duration::from_millis(200))).expect("time-out");
                let sender = lab.pod(from).udp_for(address);
                sender.connect((address, NUMBERS)).expect("connect");
                let done = &done;
                let heard = scope.spawn(move || {
                    let mut numbers = HashSet::new();
                    let mut twice = 0u64;
                    let mut buffer = [0; 2_048];
                    loop {
                        match receiver.recv(&mut buffer) {
                            Ok(n) if n >= 8 => {
                                let number = u64::from_be_bytes(buffer[..8].try_into().expect("eight bytes"));
                                twice += u64::from(!numbers.insert(number));
                            }
                            Ok(_) => {}
                            Err(_) if done.load(Ordering::Acquire) => return (numbers, twice),
                            Err(_) => {}
                        }
                    }
                });
                let sent = scope.spawn(move || {
                    let started = Instant::now();
                    let mut number = 0u64;
                    let payload = [0; 512];
                    while started.elapsed() < Duration::from_secs(seconds) {
                        let due = u64::try_from(started.elapsed().as_micros()).expect("fits")
                            * (per_second / 4)
                            / 1_000_000;
                        // Not all at once after a pause: that would be more than `tenc0` queues.
                        for _ in 0..due.saturating_sub(number).min(16) {
                            let datagram = [&number.to_be_bytes()[..], &payload].concat();
                            sender.send(&datagram).expect("send");
                            number += 1;
                        }
                        thread::sleep(Duration::from_millis(1));
                    }
                    number
                });
                streams.push((from, address, sent, heard));
            }
        }
        let mut results = Vec::new();
        for (from, address, sent, heard) in streams {
            results.push((from, address, sent.join().expect("the sender"), heard));
        }
        thread::sleep(Duration::from_millis(300));
        done.store(true, Ordering::Release);
        for (from, address, sent, heard) in results {
            let (numbers, twice) = heard.join().expect("the receiver");
            let missing: Vec<_> = (0..sent).filter(|n| !numbers.contains(n)).collect();
            assert!(
                missing.is_empty() && twice == 0,
                "{from} to {address}: {} of {sent} lost (first {:?}), {twice} twice",
                missing.len(),
                &missing[..missing.len().min(5)]
            );
        }
    });
}

fn tcp_through_rekeys(lab: &Lab) {
    let seconds = if crate::long() { 30 } else { 7 };
    let command = format!("iperf3 -c iperf -p 5201 -t {seconds} --connect-timeout 3000 -J");
    let ran = lab.exec("shop-client", &command, Duration::from_secs(seconds + 15));
    let report: serde_json::Value = serde_json::from_str(&ran.out).unwrap_or_default();
    assert!(ran.code == 0, "iperf3: exit {} {}{}", ran.code, ran.err, report["error"]);
    let stalled =
        report["intervals"].as_array().expect("intervals").iter().filter(|i| i["sum"]["bytes"] == 0).count();
    assert_eq!(stalled, 0, "a second without a byte");
}

/// A client that does not give up: TCP, UDP and raw packets, to Services and to pods; and, with `frames`, past its own stack.
pub fn keep_trying(lab: &Lab, frames: bool, stop: &AtomicBool, tries: &AtomicU64) {
    let pod = lab.pod("shop-client");
    let raw = pod.raw(pod.v4.into(), 253);
    let raw6 = pod.raw(pod.v6.into(), 253);
    let udp = [pod.udp_for(pod.v4.into()), pod.udp_for(pod.v6.into())];
    let peers: Vec<IpAddr> = ["shop-web1", "shop-web2"].iter().flat_map(|p| lab.pod(p).addresses()).collect();
    let services: Vec<SocketAddr> = web_vips().into_iter().chain(echo_vips()).collect();
    while !stop.load(Ordering::Acquire) {
        for to in peers.iter().copied().chain(services.iter().map(SocketAddr::ip)) {
            let raw = if to.is_ipv4() { &raw } else { &raw6 };
            // Refused or lost, all the same: what counts is that nothing leaves in clear.
            let _ = raw.send_to(CANARY, &SockAddr::from(SocketAddr::from((to, 0))));
            let _ = udp[usize::from(to.is_ipv6())].send_to(CANARY, (to, 7007));
            if frames {
                let packet = packets::udp(pod.address(to), to, 7007, 7007, CANARY);
                let _ = pod.send_frame(&packets::frame(pod.mac(), [0xff; 6], &packet));
            }
        }
        for to in web_vips() {
            let _ = pod.connect(to, Duration::from_millis(30));
        }
        tries.fetch_add(1, Ordering::Relaxed);
    }
}

/// Stops the client also when the test panics: a scope waits for its threads.
pub struct StopAtEnd<'a>(pub &'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Kills what `victims` picks of every client and server while the client keeps trying.
fn killed(lab: &Lab, victims: impl Fn(&str) -> Vec<nix::unistd::Pid>) {
    lab.curl("shop-client", "http://web/");
    lab.curl("shop-client", "-6 http://web/");
    let (stop, tries) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        let _stop = StopAtEnd(&stop);
        scope.spawn(|| keep_trying(lab, true, &stop, &tries));
        thread::sleep(Duration::from_millis(500));
        for pod in ["shop-client", "shop-web1"] {
            let pids = victims(pod);
            assert!(!pids.is_empty(), "no process to kill for {pod}");
            for pid in pids {
                kill(pid, Signal::SIGKILL).expect("kill");
            }
            thread::sleep(Duration::from_millis(1_500));
        }
        thread::sleep(Duration::from_secs(2));
    });
    assert!(tries.load(Ordering::Relaxed) > 3, "the client hardly tried");
    lab.assert_no_leak();
}

fn both_killed(lab: &Lab) {
    killed(lab, |pod| lab.agent_pids(pod));
    recover(lab);
}

fn agent_killed(lab: &Lab) {
    killed(lab, |pod| lab.agent_pids(pod).into_iter().rev().take(1).collect());
    recover(lab);
}

/// After a crash a new launcher takes the pod over, and a stop in order leaves nothing behind.
pub fn recover(lab: &Lab) {
    // The launchers that are left end with an error of their own: they lost their agents.
    let ran = lab.script(&["unprotect"], &[], Duration::from_secs(30));
    crate::say(&format!("after the kill, unprotect: exit {}", ran.code));
    lab.agents_are(Agents::Off);
    lab.assert_no_leak();
    lab.ensure(Agents::On(""));
    lab.curl("shop-client", "http://web/");
    lab.assert_no_leak();
    lab.ensure(Agents::Off);
    let left = lab.differences();
    assert!(left.is_empty(), "left behind after a crash, a new start and a stop:\n{}", left.join("\n"));
}

/// Every thread of an agent, not the first alone.
fn confined(lab: &Lab) {
    let agent = lab.agent_pids("shop-client")[1];
    let threads: Vec<_> =
        std::fs::read_dir(format!("/proc/{agent}/task")).expect("threads").flatten().collect();
    assert!(threads.len() > 1);
    for thread in threads {
        let status = std::fs::read_to_string(thread.path().join("status")).expect("status");
        let is = |field: &str, wanted: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(field));
            assert_eq!(line.map(str::trim), Some(wanted), "{field} of {:?}", thread.path());
        };
        // CAP_NET_ADMIN is 12, CAP_NET_RAW 13.
        for set in ["CapEff:", "CapPrm:", "CapBnd:"] {
            is(set, &format!("{:016x}", 1 << 12 | 1 << 13));
        }
        is("CapInh:", &format!("{:016x}", 0));
        is("NoNewPrivs:", "1");
        is("Seccomp:", "2");
    }
}
