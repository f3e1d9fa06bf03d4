//! Services of the project by the nodes' addresses: nodePorts, hostPorts, externalIPs, a load balancer's ingress address.
//!
//! The node rewrites them to a workload of the project, so a workload that uses one would speak to another in clear.

use std::net::SocketAddr;
use std::time::Duration;

use crate::Case;
use crate::lab::{Agents, Lab};
use crate::pod::Pod;
use crate::ways::{self, BOTH, Way, odd};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case::new("control_node_ports_and_external_addresses_lead_to_workloads_without_agents", in_clear)
        .agents(Agents::Off)
        .looks_itself(),
    Case::new("promise_1_own_node_ports_host_ports_external_addresses_and_balancers_are_refused", |lab| {
        ways::closed(lab, WAYS);
        refused(lab);
    })
    .every_rp_filter()
    .and_with_ranges(),
    Case::new("promise_9_the_outside_reaches_node_ports_as_ever", from_outside),
];

/// Where shop/portal is reached, TCP, by a node's address or one that the nodes rewrite.
const TCP: &[&str] = &[
    // nodePorts, of both nodes.
    "192.168.77.1:30080",
    "192.168.77.2:30080",
    "10.1.1.1:30080",
    "[fd77::1]:30080",
    "[fd77::2]:30080",
    // hostPorts of shop-web1.
    "192.168.77.1:18080",
    "[fd77::1]:18080",
    // externalIPs.
    "198.51.100.7:80",
    "[2001:db8:198::7]:80",
    // The load balancer's ingress address.
    "192.168.77.2:80",
    "[fd77::2]:80",
];

/// The same for UDP.
const UDP: &[(&str, u16)] = &[
    ("192.168.77.1", 30_007),
    ("192.168.77.2", 30_007),
    ("fd77::1", 30_007),
    ("fd77::2", 30_007),
    ("192.168.77.1", 17_007),
    ("fd77::1", 17_007),
    ("198.51.100.7", 7),
    ("2001:db8:198::7", 7),
    ("192.168.77.2", 7),
    ("fd77::2", 7),
];

const WAYS: &[Way] = &[
    ("datagrams to node ports", BOTH, |lab, pod| datagrams(lab, pod, "--unprivileged")),
    ("datagrams to node ports on the device", BOTH, |lab, pod| {
        datagrams(lab, pod, "--unprivileged --device eth0")
    }),
    ("connections to node ports", BOTH, |_, pod| {
        addresses().for_each(|to| drop(pod.http_get(to, Duration::from_millis(200))));
        Ok(())
    }),
];

fn addresses() -> impl Iterator<Item = SocketAddr> {
    TCP.iter().map(|text| text.parse().expect("an address"))
}

fn datagrams(lab: &Lab, pod: &Pod, options: &str) -> Result<(), String> {
    for (address, port) in UDP {
        // One that is refused is no reason to leave out the others.
        let _ = odd(lab, pod, options, &["udp", "big"], &[(*address).to_owned()], *port);
    }
    Ok(())
}

/// A whole exchange over each of them.
fn in_clear(lab: &Lab) {
    for pod in BOTH {
        for to in addresses() {
            let (_, body) = lab
                .pod(pod)
                .http_get(to, Duration::from_secs(2))
                .unwrap_or_else(|e| panic!("{pod} to {to}: {e}"));
            assert!(body.starts_with("hello from shop-web"), "{pod} to {to}: {body}");
        }
    }
    assert!(ways::seen(lab, WAYS) > 0, "no canary reached another pod: the sniffers see nothing");
}

fn refused(lab: &Lab) {
    for pod in BOTH {
        for to in addresses() {
            let got = lab.pod(pod).http_get(to, Duration::from_millis(300));
            // A balancer's ingress address may be captured as a Service's.
            let sealed = got.is_ok() && lab.leaks().leaked == 0;
            assert!(got.is_err() || sealed, "{pod} reached {to} in clear");
        }
    }
}

/// What enters through a node is clear from there to the pod.
fn from_outside(lab: &Lab) {
    for to in
        addresses().filter(|to| to.to_string().contains("192.168.77") || to.to_string().contains("fd77"))
    {
        let ran =
            lab.exec("ext", &format!("curl -gsS --fail --max-time 3 http://{to}/"), Duration::from_secs(5));
        assert!(ran.out.starts_with("hello from shop-web"), "the outside to {to}: {}", ran.err);
    }
    let ran =
        lab.exec("node2", "curl -sS --fail --max-time 3 http://192.168.77.1:30080/", Duration::from_secs(5));
    assert!(ran.out.starts_with("hello from shop-web"), "{}", ran.err);
}
