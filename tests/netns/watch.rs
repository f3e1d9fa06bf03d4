//! Tampering inside the pod's namespace: put right within a second, closed meanwhile, or reported and closed.
//!
//! Each kind alone, with a client that keeps trying what an application can; the namespace's state before is the state to
//! come back. Frames of packet sockets are left out: only the guard stands in their way, and here it is taken away, too.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::Case;
use crate::lab::{Lab, web_vips};
use crate::lifecycle::{StopAtEnd, keep_trying};
use crate::snapshot::Snapshot;

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case::new("promise_1_tampering_is_repaired_within_a_second_and_leaks_nothing", repaired).seconds(150),
    Case::new("promise_13_what_others_add_stays_is_reported_and_closed", foreign).seconds(60),
];

/// What is done to the client's namespace, and the word that the agent's log has for it.
const TAMPERINGS: &[(&str, &str)] = &[
    ("ip link set tenc0 down", "tun_down"),
    ("ip link set tenc0 mtu 1300", "tun_mtu"),
    ("ip link set tenc0 txqueuelen 10", "tun_queue"),
    ("ip link del tenc0", "tun_deleted"),
    ("ip link set tenc0 down && ip link set tenc0 name other0", "tun_renamed"),
    ("ip rule del pref 105", "rule_missing"),
    ("ip -6 rule del pref 99", "rule_missing"),
    ("ip rule del pref 101 && ip rule del pref 100", "rule_missing"),
    ("ip route del 10.96.1.1 table 32409 metric 1", "route_missing"),
    ("ip -6 route flush table 32409", "route_missing"),
    ("ip route flush table 32410", "route_missing"),
    ("ip route del unreachable 10.96.1.1 table 32409", "twin_missing"),
    ("ip route replace 10.96.1.1 table 32409 metric 1 dev eth0", "route_changed"),
    ("nft flush ruleset", "guard_table"),
    ("nft delete table netdev tencrypt", "guard_table"),
    ("nft delete element inet tencrypt protected4 { 10.96.1.1 }", "guard_element"),
    ("nft flush chain inet tencrypt out4", "guard_rules"),
    ("nft insert rule inet tencrypt postrouting accept", "guard_rules"),
];

/// How long a repair may take.
const LIMIT: Duration = Duration::from_secs(1);
/// A loaded machine takes its own time to show the state. The long form runs on a machine of its own.
fn grace() -> Duration {
    Duration::from_millis(if crate::long() { 500 } else { 2_000 })
}

fn log(lab: &Lab) -> String {
    std::fs::read_to_string(lab.run_dir().join("log/launch-shop-client.err")).unwrap_or_default()
}

fn repaired(lab: &Lab) {
    lab.curl("shop-client", "http://web/");
    lab.curl("shop-client", "-6 http://web/");
    let pod = lab.pod("shop-client");
    let (stop, tries) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        let _stop = StopAtEnd(&stop);
        scope.spawn(|| keep_trying(lab, false, &stop, &tries));
        for (command, word) in TAMPERINGS {
            let before = Snapshot::of(&pod.netns);
            let heard = log(lab).matches(word).count();
            let started = Instant::now();
            let ran = lab.exec("shop-client", command, Duration::from_secs(5));
            assert!(ran.code == 0, "{command}: {}", ran.err);
            loop {
                let taken = started.elapsed();
                // A device that was made again has another number.
                let left: Vec<_> = before.difference(&Snapshot::of(&pod.netns));
                let left: Vec<_> = left.into_iter().filter(|line| !line.contains(": tenc0:")).collect();
                if left.is_empty() && log(lab).matches(word).count() > heard {
                    break;
                }
                assert!(taken < LIMIT + grace(), "{command}: {word} after {taken:?}:\n{}", left.join("\n"));
                thread::sleep(Duration::from_millis(20));
            }
            for to in web_vips() {
                let (status, _) = pod.http_get(to, Duration::from_secs(5)).expect("traffic goes on");
                assert_eq!(status, 200, "after {command}: {to}");
            }
            lab.assert_no_leak();
        }
    });
    assert!(tries.load(Ordering::Relaxed) > 3, "the client hardly tried");
}

/// A rule of somebody else that comes before ours: the guard closes what it would lead away, and nobody deletes it.
fn foreign(lab: &Lab) {
    let pod = lab.pod("shop-client");
    lab.curl("shop-client", "http://web/");
    let ran = lab.exec("shop-client", "ip rule add pref 50 lookup main", Duration::from_secs(5));
    assert!(ran.code == 0, "{}", ran.err);
    let end = Instant::now() + LIMIT + grace();
    while !log(lab).contains("rule_foreign") {
        assert!(Instant::now() < end, "not reported");
        thread::sleep(Duration::from_millis(10));
    }
    for to in web_vips().into_iter().filter(std::net::SocketAddr::is_ipv4) {
        assert!(pod.connect(to, Duration::from_millis(500)).is_err(), "{to} was reached past the tunnel");
    }
    lab.assert_no_leak();
    let rules = lab.exec("shop-client", "ip rule", Duration::from_secs(5)).out;
    assert!(rules.lines().any(|rule| rule.starts_with("50:")), "a foreign rule was deleted:\n{rules}");
    let ran = lab.exec("shop-client", "ip rule del pref 50", Duration::from_secs(5));
    assert!(ran.code == 0, "{}", ran.err);
    lab.curl("shop-client", "http://10.96.1.1/");
}
