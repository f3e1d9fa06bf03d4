//! What `tencrypt status` says is so: counters, agents that were replaced, pods that nobody protects.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use serde_json::Value;

use crate::Case;
use crate::dns::{self, Question};
use crate::lab::{Agents, Lab, PROJECT, PROTECTED, RANGES, Ran, run, tencrypt};
use crate::lifecycle;
use crate::pod;

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case::new("status_counts_every_packet_of_a_protected_pod", counts_every_packet).sealed(),
    Case::new("status_tells_of_agents_that_were_replaced_and_of_pods_that_are_closed", tells_of_ends)
        .seconds(90),
    Case::new("status_says_how_the_guard_judges_and_that_dns_goes_past_the_agent", tells_of_the_guard)
        .agents(Agents::On(RANGES)),
];

/// The Pod behind the cluster's resolver.
const RESOLVER_ENDPOINT: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(10, 1, 1, 53)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0x10, 0x1, 0x1, 0, 0, 0, 0x53)),
];

/// The port of the receiver of the burst.
const BURST_PORT: u16 = 9_500;
/// Datagrams of the burst: they fit the receiver's buffer together.
const BURST: u64 = 400;
/// More datagrams than `tenc0` queues.
const OVERFLOW: u64 = 3_000;

fn status(args: &[&str]) -> Ran {
    run(Command::new(tencrypt()).arg("status").args(args), Duration::from_secs(15))
}

fn name(lab: &Lab, pod: &str) -> String {
    format!("{}-{pod}", lab.name())
}

/// The document of a pod, and the exit code it came with.
pub fn document(lab: &Lab, pod: &str) -> (Value, i32) {
    let ran = status(&[&name(lab, pod), "-o", "json"]);
    let json = serde_json::from_str(&ran.out);
    (
        json.unwrap_or_else(|e| panic!("status of {pod}: {e}: exit {} {}{}", ran.code, ran.out, ran.err)),
        ran.code,
    )
}

fn protected(lab: &Lab, pod: &str) -> Value {
    let (json, code) = document(lab, pod);
    assert_eq!((&json["state"], code), (&"protected".into(), 0), "{pod}: {json:#}");
    json
}

/// Packets that the agent of a protected pod dropped, by reason.
pub fn drops(lab: &Lab, pod: &str) -> BTreeMap<String, u64> {
    let json = protected(lab, pod);
    let drops = json["counters"]["drops"].as_object().expect("an agent's counters");
    drops.iter().map(|(reason, n)| (reason.clone(), n.as_u64().expect("a count"))).collect()
}

fn count(json: &Value, name: &str) -> u64 {
    json["counters"][name].as_u64().unwrap_or_else(|| panic!("no count {name} in {json:#}"))
}

/// What came in, and all that can have become of it.
const SUMS: [(&str, &[&str]); 3] = [
    (
        "captured",
        &["sealed", "hairpinned", "dnsForwarded", "dnsSegments", "outboundDropped", "outboundWaiting"],
    ),
    ("received", &["control", "opened", "inboundDropped", "inboundWaiting"]),
    ("answers", &["answered", "answersDropped", "answersWaiting"]),
];

fn counts_every_packet(lab: &Lab) {
    let (client, server) = ("shop-client", "shop-web2");
    let to = lab.pod(server).v4.into();
    let receiver = lab.pod(server).udp((to, BURST_PORT));
    pod::enlarge(&receiver);
    let sender = lab.pod(client).udp_for(to);
    let mut buffer = [0; 200];
    sender.send_to(&[0; 100], (to, BURST_PORT)).expect("send");
    receiver.recv(&mut buffer).expect("the first one waits for its session, and arrives");

    let before = [client, server].map(|pod| protected(lab, pod));
    for _ in 0..BURST {
        sender.send_to(&[0; 100], (to, BURST_PORT)).expect("send");
    }
    for _ in 0..BURST {
        receiver.recv(&mut buffer).expect("every datagram arrives");
    }
    let after = [client, server].map(|pod| protected(lab, pod));
    let risen = |pod: usize, name: &str| count(&after[pod], name) - count(&before[pod], name);
    // What else the pods say to each other is a handful of packets.
    for (pod, counter) in [(0, "sealed"), (1, "opened")] {
        let risen = risen(pod, counter);
        assert!((BURST..BURST + 100).contains(&risen), "{counter} rose by {risen} of {BURST}");
    }
    for json in &after {
        for (came, ended) in SUMS {
            let sum = ended.iter().map(|name| count(json, name)).sum::<u64>();
            assert_eq!(count(json, came), sum, "promise 12: {came} is not {ended:?} in {json:#}");
        }
    }
    let json = &after[0];
    assert_eq!((&json["kind"], &json["project"]), (&"PodStatus".into(), &PROJECT.into()));
    assert_eq!(json["name"], name(lab, client).as_str());
    let pids = lab.agent_pids(client);
    let wanted = |n: usize| Value::from(pids[n].as_raw());
    assert_eq!((&json["launcher"]["pid"], &json["agent"]["pid"]), (&wanted(0), &wanted(1)));
    assert!(json["guard"]["outbound_postrouting"].is_u64(), "{json:#}");
    let peers = json["peers"]["items"].as_array().expect("peers");
    let is_peer = |peer: &Value| peer["address"] == to.to_string().as_str() && peer["established"] == true;
    assert!(peers.iter().any(is_peer), "{json:#}");

    // The exit code also counts pods of other labs.
    let all = status(&[]);
    for pod in PROTECTED {
        let line = all.out.lines().find(|line| line.starts_with(&format!("{} ", name(lab, pod))));
        let words: Vec<_> = line.unwrap_or_default().split_whitespace().collect();
        assert_eq!(words.get(1..3), Some(&[PROJECT, "protected"][..]), "{}{}", all.out, all.err);
    }
    let one = status(&[&lab.pod(client).netns.display().to_string()]);
    assert_eq!(one.code, 0, "{}{}", one.out, one.err);
    let of_flow = |line: &str| {
        let words: Vec<_> = line.split_whitespace().collect();
        words.starts_with(&["protected", "udp"]) && words.contains(&format!("{to}:{BURST_PORT}").as_str())
    };
    assert!(one.out.lines().any(of_flow), "{}", one.out);
    let nobody = status(&[&name(lab, "bank-client")]);
    assert_eq!(nobody.code, 2, "{}{}", nobody.out, nobody.err);
    assert!(nobody.err.contains("nothing protects"), "{}", nobody.err);
}

/// Waits until the pod is protected by another agent than `old`: its status.
fn replaced(lab: &Lab, pod: &str, old: &Value) -> Value {
    let end = Instant::now() + Duration::from_secs(15);
    loop {
        let (json, code) = document(lab, pod);
        if code == 0 && json["agent"]["pid"] != *old {
            return json;
        }
        assert!(Instant::now() < end, "no new agent: {json:#}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn tells_of_ends(lab: &Lab) {
    let pod = "shop-client";
    let agent = || *lab.agent_pids(pod).get(1).expect("an agent");
    let first = protected(lab, pod);
    kill(agent(), Signal::SIGKILL).expect("kill");
    let second = replaced(lab, pod, &first["agent"]["pid"]);
    let times = |json: &Value| json["agent"]["replaced"].as_u64().expect("a count");
    assert_eq!(times(&second), times(&first) + 1);
    assert_eq!(second["agent"]["lastEnd"], "by signal 9");

    // A frozen agent holds up nobody who asks; what overflows meanwhile is counted.
    kill(agent(), Signal::SIGSTOP).expect("stop");
    let to = (lab.pod("shop-web2").v4.into(), BURST_PORT);
    let sender = lab.pod(pod).udp_for(to.0);
    for _ in 0..OVERFLOW {
        // Refused or dropped, all the same.
        let _ = sender.send_to(&[0; 100], to);
    }
    let asked = Instant::now();
    let (frozen, code) = document(lab, pod);
    assert_eq!((&frozen["state"], code), (&"closed".into(), 1), "{frozen:#}");
    assert!(asked.elapsed() < Duration::from_secs(4), "answered after {:?}", asked.elapsed());
    let third = replaced(lab, pod, &second["agent"]["pid"]);
    assert_eq!(times(&third), times(&second) + 1);
    assert!(third["counters"]["drops"]["queue_overflow"].as_u64() > Some(0), "{third:#}");

    for pid in lab.agent_pids(pod) {
        kill(pid, Signal::SIGKILL).expect("kill");
    }
    let end = Instant::now() + Duration::from_secs(5);
    let (closed, code) = loop {
        let (json, code) = document(lab, pod);
        if json["launcher"].is_null() || Instant::now() > end {
            break (json, code);
        }
    };
    assert_eq!((&closed["state"], &closed["reason"]), (&"closed".into(), &"no launcher".into()));
    assert_eq!(code, 1);
    assert_eq!(status(&[]).code, 1);
    lifecycle::recover(lab);
}

/// A load balancer at socket level leaves the endpoint's address in the packet: so does a program that asks it by itself.
fn tells_of_the_guard(lab: &Lab) {
    let pod = "shop-client";
    let guard = |json: &Value, counter: &str| json["guard"][counter].as_u64().expect("a counter");
    let before = protected(lab, pod);
    for (field, wanted) in [("guardState", "open"), ("judgedBy", "ranges"), ("unclassified", "drop")] {
        assert_eq!(before[field], wanted, "{before:#}");
    }
    assert_eq!((&before["allowLinkScope"], &before["allowDhcp"]), (&false.into(), &false.into()));
    lab.declare(RESOLVER_ENDPOINT.iter().flat_map(|a| ["udp", "tcp"].map(|l4| format!("{a}/{l4}/53"))));
    let question = Question::new("web.shop.svc.cluster.local", 1).bytes();
    for server in RESOLVER_ENDPOINT.map(|address| SocketAddr::new(address, 53)) {
        let (asking, limit) = (lab.pod(pod), Duration::from_secs(2));
        assert!(dns::ask_udp(asking, server, &question, limit).is_some(), "{server} over UDP");
        assert!(dns::ask_tcp(asking, server, &question, limit).is_some(), "{server} over TCP");
    }
    let after = protected(lab, pod);
    let risen = guard(&after, "dns_uncaptured") - guard(&before, "dns_uncaptured");
    assert!(risen >= 4, "{risen} packets were counted");
    assert_eq!(guard(&after, "unclassified"), guard(&before, "unclassified"), "nobody had to be asked");
    assert_eq!(after["degraded"], serde_json::json!(["dns not captured (socket LB)"]));
    let table = status(&[&name(lab, pod)]);
    assert!(table.out.lines().any(|line| line == "dns not captured (socket LB)"), "{}", table.out);
    // An address that another tenant's objects vouch for is counted as released.
    lab.curl(pod, "http://ledger.bank/");
    assert!(protected(lab, pod)["released"].as_u64() > Some(0));
}
