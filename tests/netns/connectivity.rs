//! What is not the project's business works for a protected pod as it does for one without agent, with and without ranges.
//!
//! 1. each check is one thing that pods of real clusters do with what is outside their project
//! 2. the checks run without agents (the lab itself is sound), with them, and with the cluster's ranges
//!
//! May touch: routes of the nodes and of the fabric, given back.

use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use crate::Case;
use crate::dns;
use crate::lab::{Agents, Lab, RANGES, RESOLVER, external, ledger_vips, web_vips};
use crate::packets;
use crate::pod::{Pod, Sniffer};
use crate::ways::BOTH;

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case::new("control_everything_works_without_agents", everything)
        .agents(Agents::Off)
        .looks_itself()
        .seconds(90),
    Case::new("promise_9_dns_the_outside_other_tenants_probes_and_metadata_work_as_ever", everything)
        .every_rp_filter()
        .seconds(90),
    Case::new(
        "promise_9_with_ranges_dns_the_outside_other_tenants_probes_and_metadata_work_as_ever",
        everything,
    )
    .agents(Agents::On(RANGES))
    .every_rp_filter()
    .seconds(90),
];

type Check = (&'static str, fn(&Lab) -> Result<(), String>);

const CHECKS: &[Check] = &[
    ("DNS over UDP and TCP, both families", names),
    ("the outside over TCP, both families", outside),
    ("another tenant by name, VIP and pod address", other_tenant),
    ("another tenant's connections to the pods", from_other_tenant),
    ("probes from every address of the nodes", probes),
    ("ping and traceroute to the outside", ping),
    ("path MTU discovery to the outside", path_mtu),
    ("IPv6 router advertisements", advertisements),
    ("the metadata server", metadata),
];

fn everything(lab: &Lab) {
    // Routers with an address in the cluster's ranges send errors; a resolver that the pods' resolv.conf does not name is asked
    // without the agent.
    lab.declare(["10.1.99.1/icmp", "fd00:10:1:99::1/icmp", "fd00:10:96::a/udp/53", "fd00:10:96::a/tcp/53"]);
    let failed: Vec<_> = CHECKS
        .iter()
        .filter_map(|(name, check)| check(lab).err().map(|error| format!("{name}: {error}")))
        .collect();
    assert!(failed.is_empty(), "does not work:\n{}", failed.join("\n"));
}

/// An error that names what failed.
fn want(is_so: bool, what: impl FnOnce() -> String) -> Result<(), String> {
    if is_so { Ok(()) } else { Err(what()) }
}

/// A GET that must be answered by `hello from WHO`.
fn get(pod: &Pod, to: SocketAddr, who: &str) -> Result<(), String> {
    let got = pod.http_get(to, Duration::from_secs(3)).map_err(|e| format!("{} to {to}: {e}", pod.name))?;
    want(got.1.starts_with(&format!("hello from {who}")), || format!("{} to {to}: {got:?}", pod.name))
}

/// The same with curl, which asks for names.
fn curl(lab: &Lab, pod: &str, args: &str, who: &str) -> Result<(), String> {
    let ran = lab.exec(pod, &format!("curl -gsS --fail --max-time 3 {args}"), Duration::from_secs(5));
    want(ran.out.starts_with(&format!("hello from {who}")), || format!("{pod}: curl {args}: {}", ran.err))
}

fn names(lab: &Lab) -> Result<(), String> {
    let resolvers: [IpAddr; 2] = [RESOLVER.into(), "fd00:10:96::a".parse().expect("an address")];
    for pod in BOTH {
        for resolver in resolvers {
            for name in ["www.example.test", "ledger.bank.svc.cluster.local", "web.shop.svc.cluster.local"] {
                let (pod, to) = (lab.pod(pod), SocketAddr::from((resolver, 53)));
                let question = dns::bytes(name, 1, 0, None);
                let ask = || dns::ask_udp(pod, to, &question, Duration::from_secs(1));
                // resolv.conf names the first alone: to another address within the ranges the first datagram is lost.
                let again = || {
                    thread::sleep(Duration::from_millis(100));
                    ask().filter(|_| resolver.is_ipv6())
                };
                let udp = ask().or_else(again);
                let tcp = dns::ask_tcp(pod, to, &question, Duration::from_secs(2));
                want(udp.is_some() && udp == tcp, || {
                    format!("{}: {name} at {to}: {udp:?} {tcp:?}", pod.name)
                })?;
            }
        }
    }
    Ok(())
}

fn outside(lab: &Lab) -> Result<(), String> {
    for pod in BOTH {
        for to in external() {
            get(lab.pod(pod), (to, 80).into(), "ext")?;
        }
        curl(lab, pod, "http://www.example.test/", "ext")?;
        curl(lab, pod, "-6 http://ext/", "ext")?;
    }
    Ok(())
}

fn other_tenant(lab: &Lab) -> Result<(), String> {
    for pod in BOTH {
        for url in ["-4 http://ledger.bank/", "-6 http://ledger.bank.svc.cluster.local/"] {
            let begun = Instant::now();
            curl(lab, pod, url, "bank-server")?;
            // By name nothing is lost: no retransmission, which would take a second.
            want(begun.elapsed() < Duration::from_millis(900), || {
                format!("{pod}: {url} took {:?}", begun.elapsed())
            })?;
        }
        for to in ledger_vips() {
            get(lab.pod(pod), to, "bank-server")?;
        }
        for to in lab.pod("bank-server").addresses() {
            get(lab.pod(pod), (to, 8_080).into(), "bank-server")?;
        }
    }
    Ok(())
}

fn from_other_tenant(lab: &Lab) -> Result<(), String> {
    for backend in ["shop-web1", "shop-web2"] {
        for to in lab.pod(backend).addresses() {
            let begun = Instant::now();
            get(lab.pod("bank-client"), (to, 8_080).into(), backend)?;
            want(begun.elapsed() < Duration::from_millis(900), || {
                format!("to {to} took {:?}", begun.elapsed())
            })?;
        }
    }
    for to in web_vips() {
        get(lab.pod("bank-client"), to, "shop-web")?;
    }
    Ok(())
}

/// As a kubelet's: from the bridge's address, the nodes' own ones, the tunnel device's, the gateway's link-local one.
fn probes(lab: &Lab) -> Result<(), String> {
    let from = |node: &str, source: &str, to: &str| {
        curl(lab, node, &format!("--interface '{source}' http://{to}:8080/"), "shop-web")
    };
    for (node, source, to) in [
        ("node1", "10.1.1.1", "10.1.1.12"),
        ("node1", "192.168.77.1", "10.1.1.12"),
        ("node1", "10.1.1.0", "10.1.1.12"),
        ("node1", "fd00:10:1:1::1", "[fd00:10:1:1::12]"),
        ("node1", "fd77::1", "[fd00:10:1:1::12]"),
        ("node2", "192.168.77.2", "10.1.2.12"),
        ("node2", "10.1.2.0", "10.1.2.12"),
        ("node2", "fd77::2", "[fd00:10:1:2::12]"),
        ("node1", "10.1.1.0", "10.1.2.12"),
        ("node2", "10.1.2.0", "10.1.1.12"),
    ] {
        from(node, source, to)?;
    }
    // From the pod's gateway, which has but a link-local address on this link.
    let to: SocketAddr = "[fd00:10:1:2::12]:8080".parse().expect("an address");
    let connected = crate::pod::enter(&lab.netns("node2"), || {
        let socket = socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::STREAM, None)?;
        socket.bind_device(Some(b"p-shop-web2"))?;
        let index = nix::net::if_::if_nametoindex("p-shop-web2")?;
        socket
            .bind(&std::net::SocketAddrV6::new("fe80::1".parse().expect("an address"), 0, 0, index).into())?;
        socket.connect_timeout(&to.into(), Duration::from_secs(2))
    });
    connected.map_err(|e| format!("from fe80::1: {e}"))
}

fn ping(lab: &Lab) -> Result<(), String> {
    for pod in BOTH {
        for to in external() {
            let ran = lab.exec(pod, &format!("ping -c 1 -W 2 {to}"), Duration::from_secs(5));
            want(ran.code == 0, || format!("{pod}: ping {to}: {}{}", ran.out, ran.err))?;
            let hops = (1..=2)
                .map(|n| lab.exec(pod, &format!("ping -c 1 -W 2 -t {n} {to}"), Duration::from_secs(5)));
            for (n, ran) in hops.enumerate() {
                want(ran.out.contains("Time to live exceeded") || ran.out.contains("Time exceeded"), || {
                    format!("{pod}: hop {} to {to} is silent: {}", n + 1, ran.out)
                })?;
            }
        }
    }
    Ok(())
}

/// A router behind the nodes whose own address is in the pods' range.
struct Narrow<'l>(&'l Lab);

impl<'l> Narrow<'l> {
    fn new(lab: &'l Lab) -> Self {
        let make = "ip addr add 10.1.99.1/32 dev lo && ip -6 addr add fd00:10:1:99::1/128 dev lo && ip link set ext mtu 1300 && \
                    for n in 1 2; do ip route replace 192.168.77.$n/32 dev br0 src 10.1.99.1 && \
                    ip -6 route replace fd77::$n/128 dev br0 src fd00:10:1:99::1; done";
        let ran = lab.exec("fabric", make, Duration::from_secs(5));
        assert!(ran.code == 0, "{}", ran.err);
        Self(lab)
    }
}

impl Drop for Narrow<'_> {
    fn drop(&mut self) {
        let unmake = "for n in 1 2; do ip route del 192.168.77.$n/32; ip -6 route del fd77::$n/128; done; \
                      ip addr del 10.1.99.1/32 dev lo; ip -6 addr del fd00:10:1:99::1/128 dev lo; ip link set ext mtu 1500";
        self.0.exec("fabric", unmake, Duration::from_secs(5));
        for pod in BOTH {
            self.0.exec(pod, "ip route flush cache; ip -6 route flush cache", Duration::from_secs(5));
        }
    }
}

fn path_mtu(lab: &Lab) -> Result<(), String> {
    let _narrow = Narrow::new(lab);
    for pod in BOTH {
        for to in external() {
            // Larger than the path takes, and never fragmented on the way.
            let command = format!("ping -c 2 -i 0.3 -W 2 -M do -s 1350 {to}");
            let ran = lab.exec(pod, &command, Duration::from_secs(8));
            let told = ["mtu=1300", "mtu = 1300", "mtu: 1300"]
                .iter()
                .any(|text| ran.out.contains(text) || ran.err.contains(text));
            want(told, || format!("{pod}: {command}: {}{}", ran.out, ran.err))?;
        }
    }
    Ok(())
}

/// A prefix for the pod to make an address of, which it does not keep.
fn advertisements(lab: &Lab) -> Result<(), String> {
    for (pod, node) in [("shop-client", "node1"), ("shop-client2", "node2")] {
        let link = Sniffer::on(&lab.netns(node), &format!("p-{pod}"));
        let prefix = "2001:db8:77::".parse().expect("a prefix");
        link.send(&packets::router_advertisement([2, 0, 0, 0, 0, 0x77], prefix));
        let made = || {
            let ran = lab.exec(pod, "ip -6 -o addr show dev eth0 dynamic", Duration::from_secs(5));
            ran.out.contains("2001:db8:77:")
        };
        let end = Instant::now() + Duration::from_secs(2);
        while !made() && Instant::now() < end {
            thread::sleep(Duration::from_millis(50));
        }
        let heard = made();
        let forget = "ip -6 addr flush dev eth0 dynamic; ip -6 route flush proto kernel 2001:db8:77::/64; ip -6 route flush proto ra";
        lab.exec(pod, forget, Duration::from_secs(5));
        want(heard, || format!("{pod} does not hear the router"))?;
    }
    Ok(())
}

fn metadata(lab: &Lab) -> Result<(), String> {
    for pod in BOTH {
        get(lab.pod(pod), ([169, 254, 169, 254], 80).into(), "metadata")?;
    }
    Ok(())
}
