//! Ways around a tunnel, tried with every privilege a pod can have in its own namespace.
//!
//! Each attempt is tried twice: without agents it must be seen by the leak detector (the positive control),
//! with agents nothing may be seen. Whether the call fails, is sealed or is dropped is the agent's choice.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::Duration;

use socket2::SockAddr;

use crate::Case;
use crate::dns;
use crate::lab::{Agents, BACKENDS, Lab, RESOLVER, TUNNEL_PORT, echo_vips, web_vips};
use crate::packets::{self, CANARY};
use crate::pod::Pod;
use crate::reach::ips;

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case::new("control_every_leak_class_trips_without_agents", every_class_trips)
        .agents(Agents::Off)
        .looks_itself()
        .every_rp_filter(),
    Case::new("control_every_escape_is_seen_without_agents", escapes_are_seen)
        .agents(Agents::Off)
        .looks_itself(),
    Case::new("promise_1_no_escape_leaves_in_clear", escapes_are_closed)
        .every_rp_filter()
        .seconds(90)
        .and_with_ranges(),
    Case::new("promise_2_packet_sockets_meet_the_device_guard", device_guard)
        .every_rp_filter()
        .and_with_ranges(),
    Case::new("promise_2_ipv6_bound_to_the_device_meets_the_postrouting_guard", postrouting_guard)
        .every_rp_filter(),
    Case::new("promise_2_plaintext_from_a_workload_without_agent_is_refused_and_counted", plaintext_refused)
        .looks_itself()
        .every_rp_filter(),
    Case::new("promise_2_a_peer_without_agent_is_never_spoken_to_in_clear", silent_peer),
    Case::new("promise_2_dns_does_not_leave_by_the_device", dns_by_device).agents(Agents::On("")),
    Case::new("promise_9_vip_and_inner_sources_are_refused_on_the_device", forged_sources).looks_itself(),
];

/// One way to try it: from a pod, to every address of a peer and of a Service.
type Attempt = fn(&Lab, &Pod);

const ATTEMPTS: &[(&str, Attempt)] = &[
    ("curl --interface eth0", curl_interface),
    ("UDP bound to the device", udp_bound),
    ("IP_UNICAST_IF", udp_unicast_if),
    ("raw socket with a header of its own", raw_header),
    ("raw socket of another protocol, bound to the device", raw_bound),
    ("AF_PACKET frame", packet_frame),
    ("AF_PACKET fragments", packet_fragment),
    ("AF_PACKET frame from the tunnel port", packet_tunnel_port),
    ("fragmented datagram bound to the device", fragments_bound),
    ("route of the pod's own", own_route),
];

/// Every address of the project that a pod might talk to.
fn targets(lab: &Lab) -> Vec<IpAddr> {
    let peers = BACKENDS.iter().flat_map(|pod| lab.pod(pod).addresses());
    peers.chain(ips(echo_vips())).chain(ips(web_vips())).collect()
}

fn curl_interface(lab: &Lab, pod: &Pod) {
    for url in [
        "http://10.96.1.1/",
        "http://10.1.1.12:8080/",
        "'http://[fd00:10:1:2::12]:8080/'",
        "'http://[fd00:10:96::101]/'",
    ] {
        // An exit code of its own is fine: refused, unreachable, timed out.
        lab.exec(
            &pod.name,
            &format!("curl -sS -o /dev/null --interface eth0 --max-time 1 {url}"),
            Duration::from_secs(5),
        );
    }
}

/// Sends, and accepts that the system refuses.
fn send(socket: &std::net::UdpSocket, payload: &[u8], to: IpAddr) {
    let sent = socket.send_to(payload, (to, 7007));
    if let Err(e) = sent {
        assert_ne!(e.kind(), ErrorKind::InvalidInput, "{to}: {e}");
    }
}

fn udp_bound(lab: &Lab, pod: &Pod) {
    for to in targets(lab) {
        send(&pod.udp_on_device(to), CANARY, to);
    }
}

fn fragments_bound(lab: &Lab, pod: &Pod) {
    for to in targets(lab) {
        send(&pod.udp_on_device(to), &CANARY.repeat(200), to);
    }
}

fn udp_unicast_if(lab: &Lab, pod: &Pod) {
    let socket = pod.udp_unicast_if();
    for to in targets(lab).into_iter().filter(IpAddr::is_ipv4) {
        send(&socket, CANARY, to);
    }
}

fn raw_header(lab: &Lab, pod: &Pod) {
    let socket = pod.raw_with_header();
    socket.bind_device(Some(pod.device.as_bytes())).expect("SO_BINDTODEVICE");
    let unbound = pod.raw_with_header();
    for to in targets(lab).into_iter().filter(IpAddr::is_ipv4) {
        for port in [7007, TUNNEL_PORT] {
            let packet = packets::udp(pod.v4.into(), to, port, port, CANARY);
            for socket in [&socket, &unbound] {
                // EPERM and EHOSTUNREACH are as good as a drop.
                let _ = socket.send_to(&packet, &SockAddr::from(SocketAddr::from((to, 0))));
            }
        }
    }
}

fn raw_bound(lab: &Lab, pod: &Pod) {
    for to in targets(lab) {
        let socket = pod.raw(to, 253);
        socket.bind_device(Some(pod.device.as_bytes())).expect("SO_BINDTODEVICE");
        let _ = socket.send_to(CANARY, &SockAddr::from(SocketAddr::from((to, 0))));
    }
}

/// One frame of plaintext per target; nobody needs to answer to the broadcast address.
fn packet_frame(lab: &Lab, pod: &Pod) {
    for to in targets(lab) {
        let packet = packets::udp(pod.address(to), to, 7007, 7007, CANARY);
        let _ = pod.send_frame(&packets::frame(pod.mac(), [0xff; 6], &packet));
    }
}

fn packet_tunnel_port(lab: &Lab, pod: &Pod) {
    for to in targets(lab) {
        // Looks like a tunnel datagram at the ports, not at the type word.
        let packet = packets::udp(pod.address(to), to, TUNNEL_PORT, TUNNEL_PORT, CANARY);
        let _ = pod.send_frame(&packets::frame(pod.mac(), [0xff; 6], &packet));
    }
}

/// A later fragment has no ports by which to judge it.
fn packet_fragment(lab: &Lab, pod: &Pod) {
    for to in targets(lab).into_iter().filter(IpAddr::is_ipv4) {
        let mut packet = packets::udp(pod.v4.into(), to, TUNNEL_PORT, TUNNEL_PORT, CANARY);
        packet[6..8].copy_from_slice(&64u16.to_be_bytes());
        packet[10..12].fill(0);
        let sum = packets::header_checksum(&packet[..20]);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        let _ = pod.send_frame(&packets::frame(pod.mac(), [0xff; 6], &packet));
    }
}

/// A more specific route in the pod's main table does not beat the agent's.
fn own_route(lab: &Lab, pod: &Pod) {
    let routes = "ip route replace 10.1.2.12/32 via $(ip -4 route show default | awk '{print $3}') dev eth0 onlink; \
                  ip route replace 10.96.1.2/32 via $(ip -4 route show default | awk '{print $3}') dev eth0 onlink";
    lab.exec(&pod.name, routes, Duration::from_secs(5));
    for to in ["10.1.2.12", "10.96.1.2"] {
        let to: IpAddr = to.parse().expect("an address");
        send(&pod.udp_for(to), CANARY, to);
    }
    lab.exec(&pod.name, "ip route del 10.1.2.12/32; ip route del 10.96.1.2/32", Duration::from_secs(5));
}

fn every_class_trips(lab: &Lab) {
    let ran = lab.script(&["control"], &[], Duration::from_secs(30));
    assert!(ran.code == 0, "leak counters stayed silent:\n{}{}", ran.out, ran.err);
}

fn escapes_are_seen(lab: &Lab) {
    for (name, attempt) in ATTEMPTS {
        for pod in ["shop-client", "shop-client2"] {
            lab.reset_leaks();
            attempt(lab, lab.pod(pod));
            thread::sleep(Duration::from_millis(20));
            let leaks = lab.leaks();
            let out = leaks.count(|p, _, direction, _| p == pod && direction == "out");
            assert!(out > 0, "{name} from {pod} was not seen without agents: {:?}", leaks.rows);
        }
    }
}

fn escapes_are_closed(lab: &Lab) {
    for (name, attempt) in ATTEMPTS {
        for pod in ["shop-client", "shop-client2"] {
            attempt(lab, lab.pod(pod));
            thread::sleep(Duration::from_millis(20));
            let leaks = lab.leaks();
            assert!(
                leaks.leaked == 0,
                "{name} from {pod}: {} packets in clear, {:?}",
                leaks.leaked,
                leaks.rows
            );
        }
    }
    lab.curl("shop-client", "http://web/");
}

/// By how much each counter of one table family grew in a pod while `f` ran.
fn grown(lab: &Lab, pod: &str, family: &str, f: impl FnOnce()) -> BTreeMap<String, u64> {
    let before = lab.guard_counters(pod);
    f();
    thread::sleep(Duration::from_millis(50));
    let mut after = lab.guard_counters(pod);
    after.retain(|name, packets| {
        *packets -= before.get(name).copied().unwrap_or(0);
        *packets > 0 && name.starts_with(family)
    });
    after
}

/// By how much the drop counters of one table family grew in a pod while `f` ran.
fn dropped(lab: &Lab, pod: &str, family: &str, f: impl FnOnce()) -> u64 {
    grown(lab, pod, family, f).values().sum()
}

fn device_guard(lab: &Lab) {
    for name in ["shop-client", "shop-client2"] {
        let pod = lab.pod(name);
        let frames = u64::try_from(targets(lab).len()).expect("a few");
        let counted = dropped(lab, name, "netdev", || packet_frame(lab, pod));
        assert!(counted >= frames, "{name}: the netdev guard counted {counted} of {frames} frames");
    }
}

fn postrouting_guard(lab: &Lab) {
    for name in ["shop-client", "shop-client2"] {
        let pod = lab.pod(name);
        let targets: Vec<_> = targets(lab).into_iter().filter(IpAddr::is_ipv6).collect();
        let counted = dropped(lab, name, "inet", || {
            for to in &targets {
                send(&pod.udp_on_device(*to), CANARY, *to);
            }
        });
        let sent = u64::try_from(targets.len()).expect("a few");
        assert!(counted >= sent, "{name}: the postrouting guard counted {counted} of {sent} packets");
    }
}

/// The lone pod has no agent: what it says is in clear on its own link, and must get no answer.
fn plaintext_refused(lab: &Lab) {
    let lone = lab.pod("shop-lone");
    for backend in BACKENDS {
        for to in lab.pod(backend).addresses() {
            let counted = dropped(lab, backend, "inet", || {
                let got = lone.http_get((to, 8080), Duration::from_secs(2));
                assert!(got.is_err(), "{backend} answered plaintext of a workload: {got:?}");
            });
            assert!(counted > 0, "{backend} did not count the refused plaintext to {to}");
            let counted = dropped(lab, backend, "inet", || {
                let socket = lone.udp_for(to);
                socket.set_read_timeout(Some(Duration::from_millis(300))).expect("time-out");
                for size in [20, 3_000] {
                    socket.send_to(&CANARY.repeat(size / 20), (to, 7007)).expect("send");
                    let mut buffer = [0; 4_000];
                    assert!(socket.recv(&mut buffer).is_err(), "{backend} echoed plaintext of a workload");
                }
            });
            assert!(counted >= 2, "{backend} counted {counted} of the refused datagrams to {to}");
        }
    }
    let leaks = lab.leaks();
    let answers = leaks.count(|pod, _, direction, _| pod != "shop-lone" && direction == "out");
    assert!(answers == 0, "answers in clear: {:?}", leaks.rows);
}

fn silent_peer(lab: &Lab) {
    let lone = lab.pod("shop-lone").clone();
    let _listener = lone.listen((lone.v4, 9_000).into());
    for to in lone.addresses() {
        let got = lab.pod("shop-client").connect((to, 9_000), Duration::from_secs(5));
        assert!(got.is_err(), "connected to {to}, which has no agent");
        let socket = lab.pod("shop-client").udp_for(to);
        for _ in 0..5 {
            // An ICMP error may come back and show at the next send.
            let _ = socket.send_to(CANARY, (to, 9_000));
            thread::sleep(Duration::from_millis(100));
        }
    }
}

fn dns_by_device(lab: &Lab) {
    let pod = lab.pod("shop-client");
    let sniffer = pod.sniff();
    let socket = pod.udp_on_device(RESOLVER.into());
    socket.set_read_timeout(Some(Duration::from_millis(500))).expect("time-out");
    let question = dns::bytes("web.TENCRYPT-TEST-CANARY.example", 1, 0, None);
    // Refusing the call is as good as dropping the packet.
    let _ = socket.send_to(&question, (RESOLVER, 53));
    let mut buffer = [0; 512];
    assert!(socket.recv(&mut buffer).is_err(), "a query bound to the device was answered");
    let escaped = sniffer.drain().iter().filter(|f| packets::has_canary(f)).count();
    assert_eq!(escaped, 0, "a query bound to the device left");
}

/// What a neighbour could send: packets with a VIP or a peer as source, straight at the pod's device.
fn forged_sources(lab: &Lab) {
    let victim = lab.pod("shop-web1");
    let bystander = lab.pod("bank-client");
    let sources = ips(echo_vips()).into_iter().chain(lab.pod("shop-web2").addresses());
    for from in sources {
        let to = victim.address(from);
        let socket = victim.udp((to, 9_001));
        socket.set_read_timeout(Some(Duration::from_millis(300))).expect("time-out");
        let counted = dropped(lab, "shop-web1", "inet", || {
            let packet = packets::udp(from, to, 7, 9_001, CANARY);
            bystander
                .send_frame(&packets::frame(bystander.mac(), victim.mac(), &packet))
                .expect("send a frame");
            let mut buffer = [0; 64];
            assert!(socket.recv(&mut buffer).is_err(), "a datagram from {from} came in clear");
        });
        assert!(counted > 0, "the forged datagram from {from} was not counted");
    }
}
