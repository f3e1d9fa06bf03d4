//! What a taken-over agent could do with what it holds: sockets that bear the agent's mark, and the other end of `tenc0`.
//!
//! 1. marked sockets speak to peers, to other tenants and to the outside: only datagrams of the tunnel to a peer and queries to the
//!    resolver may leave
//! 2. packets in strangers' names come out of `tenc0`: the pod's kernel must not answer them in clear
//!
//! The mark is set by this test, which is root; the descriptor of `tenc0` is copied out of the agent. The agent itself is not touched.

use std::net::{Ipv4Addr, SocketAddr};
use std::thread;
use std::time::Duration;

use socket2::{SockAddr, SockRef};
use tencrypt::agent::netlink::MARK;

use crate::Case;
use crate::crash::agent;
use crate::lab::{Agents, Lab, RESOLVER, TUNNEL_PORT, external};
use crate::packets::{self, CANARY};
use crate::pod::Pod;
use crate::ways::{self, BOTH, Way, all_texts};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case::new("control_marked_packets_are_seen_without_agents", |lab| {
        assert!(ways::seen(lab, WAYS) > 0, "no canary reached another pod: the sniffers see nothing");
    })
    .agents(Agents::Off)
    .looks_itself(),
    Case::new("promise_1_a_marked_socket_reaches_peers_tunnel_ports_and_the_resolver_alone", |lab| {
        ways::closed(lab, WAYS);
    })
    .every_rp_filter()
    .and_with_ranges(),
    Case::new("control_a_canary_in_what_looks_sealed_is_found_without_agents", |lab| {
        assert!(looks_sealed(lab) > 0)
    })
    .agents(Agents::Off)
    .looks_itself(),
    Case::new("promise_1_sealed_datagrams_carry_no_canary", sealed_bytes).sealed(),
    Case::new("promise_1_what_comes_out_of_tenc0_in_a_strangers_name_is_not_answered_in_clear", strangers)
        .every_rp_filter()
        .and_with_ranges(),
];

const OTHER: &str = "bank-client";

const WAYS: &[Way] = &[
    ("marked datagrams and connections to the project", BOTH, |lab, pod| {
        marked(lab, pod, &["udp", "tcp", "big", "zero", "fastopen"], &all_texts(lab), 9)
    }),
    ("marked datagrams to port 53 of a peer", BOTH, |lab, pod| {
        marked(lab, pod, &["udp", "tcp"], &all_texts(lab), 53)
    }),
    ("marked datagrams to another tenant", BOTH, |lab, pod| {
        let to = lab.pod("bank-server").addresses().map(|a| a.to_string());
        marked(lab, pod, &["udp", "tcp"], &to, 9)
    }),
    ("marked connections to the outside", BOTH, |lab, pod| {
        let to = external().map(|a| a.to_string());
        marked(lab, pod, &["udp", "tcp"], &to, 8_443)
    }),
    ("a marked query from a port of the applications", BOTH, |_, pod| {
        let socket = pod.udp((Ipv4Addr::UNSPECIFIED, 40_053));
        SockRef::from(&socket).set_mark(MARK).map_err(|e| e.to_string())?;
        let _ = socket.send_to(CANARY, (RESOLVER, 53));
        Ok(())
    }),
    ("marked datagrams between the tunnel's ports that are no messages", BOTH, |lab, pod| {
        // A type word, but not the length of the type; no type word.
        for length in [40, 147, 149, 1_200] {
            for word in [1, 2, 3, 5, 0x54] {
                raw(pod, lab.pod("shop-web1").v4, TUNNEL_PORT, TUNNEL_PORT, word, length)?;
            }
        }
        Ok(())
    }),
    ("marked messages of the tunnel to whoever is no peer", BOTH, |lab, pod| {
        for to in [lab.pod(OTHER).v4, Ipv4Addr::new(203, 0, 113, 10), Ipv4Addr::new(10, 96, 1, 2)] {
            raw(pod, to, TUNNEL_PORT, TUNNEL_PORT, 4, 200)?;
        }
        Ok(())
    }),
    ("marked messages of the tunnel from or to another port", BOTH, |lab, pod| {
        let to = lab.pod("shop-web1").v4;
        raw(pod, to, TUNNEL_PORT, 7_007, 4, 200)?;
        raw(pod, to, 7_007, TUNNEL_PORT, 4, 200)
    }),
];

fn marked(lab: &Lab, pod: &Pod, how: &[&str], to: &[String], port: u16) -> Result<(), String> {
    ways::odd(lab, pod, &format!("--mark {MARK:#x}"), how, to, port)
}

/// A marked datagram of a raw socket: its payload is a type word and then canaries.
fn raw(pod: &Pod, to: Ipv4Addr, from_port: u16, port: u16, word: u8, length: usize) -> Result<(), String> {
    let socket = pod.raw_with_header();
    socket.set_mark(MARK).map_err(|e| e.to_string())?;
    let payload = [&[word, 0, 0, 0][..], &CANARY.repeat(80)].concat();
    let packet = packets::udp(pod.v4.into(), to.into(), from_port, port, &payload[..length]);
    // Refused by a guard is no error.
    let _ = socket.send_to(&packet, &SockAddr::from(SocketAddr::from((to, 0))));
    Ok(())
}

/// Canaries that the detector finds in one datagram of the tunnel's shape, when it looks into those too.
fn looks_sealed(lab: &Lab) -> u64 {
    lab.with_deep_look(|| {
        raw(lab.pod("shop-client"), lab.pod("shop-web1").v4, TUNNEL_PORT, TUNNEL_PORT, 4, 200)
            .expect("a raw socket");
        thread::sleep(Duration::from_millis(40));
        lab.leaks().count(|_, _, direction, class| (direction, class) == ("out", "canary"))
    })
}

/// Of single datagrams and of trains, whose first segment alone the guard looks at.
fn sealed_bytes(lab: &Lab) {
    lab.with_deep_look(|| {
        for pod in BOTH {
            let ways = ["udp", "big", "segments", "cork", "tcp", "fastopen"];
            ways::odd(lab, lab.pod(pod), "--unprivileged", &ways, &all_texts(lab), 7_007).expect("sent");
            lab.curl(pod, "http://web/canary");
            lab.curl(pod, "-6 http://web/canary");
        }
        thread::sleep(Duration::from_millis(40));
        lab.assert_no_leak();
    });
}

fn strangers(lab: &Lab) {
    for name in BOTH {
        let pod = lab.pod(name);
        let pid = agent(lab, name);
        // Another tenant's pod, somebody outside, an address in the cluster's ranges; none of them is a declared destination of ICMP.
        let strangers =
            ["10.1.1.21", "192.0.2.9", "10.1.2.200", "fd00:10:1:1::21", "2001:db8:9::9", "fd00:10:1:2::200"];
        for own in pod.addresses() {
            let from = strangers.iter().filter(|s| s.contains(':') == own.is_ipv6());
            let from = from.copied().collect::<Vec<_>>().join(" ");
            let ran = ways::run_script(lab, pod, "taken.py", &format!("{pid} {own} {from}"));
            assert!(ran.code == 0 && ran.out.lines().count() == 12, "{}{}", ran.out, ran.err);
        }
        thread::sleep(Duration::from_millis(200));
        lab.assert_no_leak();
    }
    lab.curl("shop-client", "http://web/");
}
