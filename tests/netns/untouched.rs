//! What is not the project's stays as it was: other projects, the outside, probes, sysctls, and what was there before.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use crate::Case;
use crate::lab::{Agents, Lab, external, ledger_vips};
use crate::packets::{self, Syn};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case::new("promise_9_other_projects_and_the_outside_see_the_same_syn_as_without_agents", same_syn)
        .agents(Agents::Off)
        .looks_itself()
        .every_rp_filter(),
    Case::new("promise_9_probes_of_the_node_are_answered_in_clear", node_probe).every_rp_filter(),
    Case::new("promise_9_names_outside_the_project_are_reached_as_before", outside_names).every_rp_filter(),
    Case::new("promise_13_no_sysctl_differs_while_protected", sysctls_stay).every_rp_filter(),
    Case::new("promise_13_stopping_gives_back_addresses_routes_rules_nft_links_and_sysctls", tear_down)
        .every_rp_filter(),
    Case::new("promise_13_protecting_again_after_a_stop_works", protect_again).sealed(),
    Case::new("promise_13_foreign_nft_routes_and_rules_survive_start_and_stop", foreign_objects)
        .agents(Agents::Off),
];

fn elsewhere(lab: &Lab) -> Vec<SocketAddr> {
    let bank = lab.pod("bank-server").addresses().map(|ip| (ip, 8080).into());
    let outside = external().map(|ip| (ip, 80).into());
    bank.into_iter().chain(ledger_vips()).chain(outside).collect()
}

/// The SYN of one connection from the pod, as it leaves the pod's device.
fn syn_of(lab: &Lab, pod: &str, to: SocketAddr) -> Syn {
    let pod = lab.pod(pod);
    let sniffer = pod.sniff();
    let (status, _) =
        pod.http_get(to, Duration::from_secs(5)).unwrap_or_else(|e| panic!("{} to {to}: {e}", pod.name));
    assert_eq!(status, 200, "{} to {to}", pod.name);
    let from: IpAddr = pod.address(to.ip());
    let seen = sniffer.wait(Duration::from_secs(2), |frame| packets::syn(frame, from, to.port()));
    seen.unwrap_or_else(|| panic!("no SYN from {} to {to} on its device", pod.name))
}

fn same_syn(lab: &Lab) {
    let pods = ["shop-client", "shop-client2"];
    let all = || -> Vec<_> {
        let pairs = pods.iter().flat_map(|pod| elsewhere(lab).into_iter().map(move |to| (*pod, to)));
        pairs.map(|(pod, to)| (pod, to, syn_of(lab, pod, to))).collect()
    };
    let without = all();
    lab.ensure(Agents::On(""));
    // The directory's and the resolver's names are looked up first, so that learning has happened.
    lab.curl("shop-client", "http://web/");
    assert_eq!(without, all(), "left: without agents, right: with");
}

fn node_probe(lab: &Lab) {
    for (node, pod) in
        [("node1", "shop-web1"), ("node2", "shop-web2"), ("node1", "shop-web2"), ("node2", "shop-web1")]
    {
        for to in lab.pod(pod).addresses() {
            let before = lab.leaks().tunnel;
            let url = SocketAddr::from((to, 8080));
            let ran = lab.exec(
                node,
                &format!("curl -sS --fail --max-time 3 'http://{url}/'"),
                Duration::from_secs(5),
            );
            assert!(ran.out.starts_with("hello from"), "{node} to {url}: {}{}", ran.out, ran.err);
            assert_eq!(lab.leaks().tunnel, before, "a probe of the node went through the tunnel");
        }
    }
    let ran = lab.try_curl("bank-client", "http://10.1.1.12:8080/");
    assert!(ran.out.starts_with("hello from"), "another project no longer reaches the pod: {}", ran.err);
}

fn outside_names(lab: &Lab) {
    for pod in ["shop-client", "shop-client2"] {
        for url in [
            "http://ext/",
            "-6 http://ext/",
            "http://www.example.test/",
            "http://ledger.bank/",
            "-6 http://ledger.bank.svc.cluster.local/",
        ] {
            let before = lab.leaks().tunnel;
            let body = lab.curl(pod, url);
            assert!(
                body.starts_with("hello from ext") || body.starts_with("hello from bank-server"),
                "{url}: {body}"
            );
            assert_eq!(lab.leaks().tunnel, before, "{url} went through the tunnel");
        }
    }
}

fn sysctls_stay(lab: &Lab) {
    lab.curl("shop-client", "http://web/");
    let found = lab.sysctl_differences();
    assert!(found.is_empty(), "sysctls differ while protected:\n{}", found.join("\n"));
}

fn tear_down(lab: &Lab) {
    for pod in ["shop-client", "shop-client2"] {
        lab.curl(pod, "http://web/");
        lab.curl(pod, "-6 http://web-headless:8080/");
    }
    lab.ensure(Agents::Off);
    let found = lab.differences();
    assert!(found.is_empty(), "left behind after a stop:\n{}", found.join("\n"));
}

fn protect_again(lab: &Lab) {
    for _ in 0..2 {
        lab.ensure(Agents::Off);
        lab.ensure(Agents::On(""));
        lab.curl("shop-client", "http://web/");
    }
}

/// Objects that others put into the pod's namespace before us, also with our numbers nearby.
fn foreign_objects(lab: &Lab) {
    let make = "nft add table inet other && nft add chain inet other c '{ type filter hook input priority 0; }' && \
                nft add rule inet other c tcp dport 9 counter && ip rule add from 192.0.2.7 lookup 77 && \
                ip route add 192.0.2.0/24 via $(ip -4 route show default | awk '{print $3}') dev eth0 onlink table 77 && \
                ip -6 rule add from 2001:db8::7 lookup 77 && ip -6 route add 2001:db8:77::/64 dev lo table 77";
    let unmake = "nft delete table inet other; ip rule del from 192.0.2.7 lookup 77; ip route flush table 77; \
                  ip -6 rule del from 2001:db8::7 lookup 77; ip -6 route flush table 77";
    let ran = lab.exec("shop-client", make, Duration::from_secs(5));
    assert!(ran.code == 0, "could not make the foreign objects: {}", ran.err);
    let pod = lab.pod("shop-client").netns.clone();
    let before = crate::snapshot::Snapshot::of(&pod);
    lab.ensure(Agents::On(""));
    lab.curl("shop-client", "http://web/");
    lab.ensure(Agents::Off);
    let left = before.difference(&crate::snapshot::Snapshot::of(&pod));
    lab.exec("shop-client", unmake, Duration::from_secs(5));
    assert!(left.is_empty(), "foreign objects changed:\n{}", left.join("\n"));
}
