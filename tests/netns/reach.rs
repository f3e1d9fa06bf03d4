//! The project's own traffic: every way to name a peer, every kind of packet, sealed and answered.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use socket2::SockAddr;
use tencrypt::agent::raw_socket::RawInjector;

use crate::Case;
use crate::lab::{Agents, BACKENDS, Lab, echo_vips, web_vips};
use crate::packets::{self, CANARY};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case::new("promise_1_no_plaintext_by_name_vip_headless_pod_ip_and_ipv6", by_every_name)
        .every_rp_filter()
        .sealed(),
    Case::new("promise_1_raw_injection_serves_every_name", by_every_name)
        .agents(Agents::On("--inject raw"))
        .every_rp_filter()
        .sealed(),
    Case::new("promise_1_tun_injection_serves_every_name", by_every_name)
        .agents(Agents::On("--inject tun"))
        .sealed(),
    Case::new("promise_1_first_packets_survive_cold_neighbour_caches", cold_neighbours)
        .every_rp_filter()
        .sealed(),
    Case::new("promise_7_udp_alone_keeps_the_tunnel_alive", udp_alone)
        .every_rp_filter()
        .sealed()
        .seconds(200),
    Case::new("promise_1_udp_datagrams_small_and_fragmented_come_back", udp_echo).every_rp_filter().sealed(),
    Case::new("promise_1_raw_injection_carries_datagrams_and_fragments", udp_echo)
        .agents(Agents::On("--inject raw"))
        .every_rp_filter()
        .sealed(),
    Case::new("raw_injection_keeps_the_fragments_of_datagram_zero_together", datagram_zero),
    Case::new("promise_1_icmp_echo_between_pods_is_sealed", icmp_echo).every_rp_filter().sealed(),
    Case::new("promise_1_an_unknown_ip_protocol_is_sealed", other_protocol).every_rp_filter().sealed(),
    Case::new("promise_1_raw_injection_carries_any_ip_protocol", other_protocol)
        .agents(Agents::On("--inject raw"))
        .sealed(),
    Case::new("promise_1_a_hundred_megabytes_arrive_unchanged", big_file)
        .every_rp_filter()
        .sealed()
        .seconds(90),
    Case::new("promise_1_raw_injection_carries_a_hundred_megabytes", big_file)
        .agents(Agents::On("--inject raw"))
        .sealed()
        .seconds(120),
    Case::new("promise_1_three_hundred_connections_spread_over_both_backends", spread)
        .every_rp_filter()
        .sealed(),
    Case::new("promise_1_a_backend_reaches_the_service_it_serves", hairpin).sealed(),
    Case::new("promise_1_replies_of_two_services_with_one_target_do_not_mix", one_target_two_names).sealed(),
    Case::new("promise_1_aes256gcm_carries_a_hundred_megabytes", big_file)
        .agents(Agents::On("--cipher aes256gcm"))
        .sealed()
        .seconds(90),
    Case::new("promise_1_iperf_runs_over_tcp_and_udp", iperf).sealed().seconds(90),
];

/// Every URL that leads to the web pods.
const URLS: &[&str] = &[
    "http://web/",
    "http://web.shop/",
    "http://web.shop.svc.cluster.local/",
    "http://web.shop.svc.cluster.local./",
    "http://WEB.Shop.SVC.cluster.local/",
    "http://10.96.1.1/",
    "http://web-headless:8080/",
    "http://10.1.1.12:8080/",
    "http://10.1.2.12:8080/",
    "-4 http://web/",
    "-6 http://web/",
    "'http://[fd00:10:96::101]/'",
    "-6 http://web-headless:8080/",
    "'http://[fd00:10:1:1::12]:8080/'",
    "'http://[fd00:10:1:2::12]:8080/'",
];

fn by_every_name(lab: &Lab) {
    for pod in ["shop-client", "shop-client2"] {
        for url in URLS {
            let before = lab.leaks().tunnel;
            let body = lab.curl(pod, url);
            assert!(body.starts_with("hello from shop-web"), "{url} from {pod}: {body:?}");
            assert!(lab.leaks().tunnel > before, "{url} from {pod} was answered outside the tunnel");
        }
    }
}

fn cold_neighbours(lab: &Lab) {
    for round in 0..3 {
        for pod in ["shop-client", "shop-client2"] {
            for to in [web_vips()[0], web_vips()[1]] {
                lab.flush_neighbours();
                let started = Instant::now();
                let (status, _) = lab
                    .pod(pod)
                    .http_get(to, Duration::from_secs(5))
                    .unwrap_or_else(|e| panic!("{pod} to {to}, round {round}: {e}"));
                assert_eq!(status, 200);
                assert!(
                    started.elapsed() < Duration::from_secs(3),
                    "{pod} to {to} took {:?}",
                    started.elapsed()
                );
            }
        }
    }
}

/// UDP only, so that no TCP acknowledgement confirms a neighbour. The short form empties the caches as it goes.
fn udp_alone(lab: &Lab) {
    let (seconds, long) = if crate::long() { (125, true) } else { (6, false) };
    let pairs: Vec<_> = ["shop-client", "shop-client2"]
        .into_iter()
        .flat_map(|pod| echo_vips().map(|to| (pod, to)))
        .map(|(pod, to)| (pod, to, lab.pod(pod).udp_for(to.ip())))
        .collect();
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut number = 0u32;
    let mut flushed = Instant::now();
    while Instant::now() < end {
        if !long && flushed.elapsed() > Duration::from_secs(1) {
            lab.flush_neighbours();
            flushed = Instant::now();
        }
        for (pod, to, socket) in &pairs {
            number += 1;
            let sent = number.to_be_bytes();
            socket.send_to(&sent, to).expect("send");
            let mut buffer = [0; 64];
            let answer = socket.recv_from(&mut buffer);
            let (n, from) = answer.unwrap_or_else(|e| panic!("datagram {number}, {pod} to {to}: {e}"));
            assert_eq!((&buffer[..n], from), (&sent[..], *to), "{pod} to {to}");
        }
        thread::sleep(Duration::from_millis(50));
    }
    lab.curl("shop-client", "http://web/");
}

fn udp_echo(lab: &Lab) {
    for pod in ["shop-client", "shop-client2"] {
        for to in echo_vips().into_iter().chain(backend_addresses(lab, 7007)) {
            for size in [0, 1, 31, 1_200, 1_372, 1_400, 3_000, 8_900, 20_000] {
                // A new socket each time: a new flow, so that both backends get fragments.
                let socket = lab.pod(pod).udp_for(to.ip());
                let sent: Vec<u8> = CANARY.iter().copied().cycle().take(size).collect();
                socket.send_to(&sent, to).unwrap_or_else(|e| panic!("{size} bytes from {pod} to {to}: {e}"));
                let mut buffer = vec![0; 65_535];
                let answer = socket.recv_from(&mut buffer);
                let (n, from) = answer.unwrap_or_else(|e| panic!("{size} bytes from {pod} to {to}: {e}"));
                assert!(
                    from == to && buffer[..n] == sent,
                    "{size} bytes from {pod} to {to}: {n} bytes from {from}"
                );
            }
        }
    }
}

/// An IPv4 datagram whose identification is zero, as one in 65,536 is: to a raw socket that means "choose one".
fn datagram_zero(lab: &Lab) {
    let (from, pod) = (lab.pod("shop-client").v4, lab.pod("shop-web1"));
    let receiver = pod.udp((pod.v4, 9_300));
    let injector = pod.enter(RawInjector::open).expect("raw sockets");
    let sent: Vec<u8> = CANARY.iter().copied().cycle().take(1_800).collect();
    let packet = packets::udp(from.into(), pod.v4.into(), 4_000, 9_300, &sent);
    for mut part in packets::fragments(&packet, 1_200) {
        part[4..6].fill(0);
        injector.inject(&mut part, None).expect("injected");
    }
    let mut buffer = [0; 2_000];
    let (n, source) = receiver.recv_from(&mut buffer).expect("both fragments, put together");
    assert!(source == SocketAddr::from((from, 4_000)) && buffer[..n] == sent, "{n} bytes from {source}");
}

/// The backends' own addresses.
fn backend_addresses(lab: &Lab, port: u16) -> Vec<SocketAddr> {
    BACKENDS.iter().flat_map(|pod| lab.pod(pod).addresses()).map(|ip| (ip, port).into()).collect()
}

fn icmp_echo(lab: &Lab) {
    for pod in ["shop-client", "shop-client2"] {
        for to in backend_addresses(lab, 0) {
            let v4 = to.is_ipv4();
            let socket = lab.pod(pod).raw(to.ip(), if v4 { 1 } else { 58 });
            socket.set_read_timeout(Some(Duration::from_secs(2))).expect("time-out");
            for size in [CANARY.len(), 2_000] {
                let payload: Vec<u8> = CANARY.iter().copied().cycle().take(size).collect();
                let mut request = vec![if v4 { 8 } else { 128 }, 0, 0, 0, 0x7e, 0x9c, 0, 1];
                request.extend(&payload);
                if v4 {
                    let sum = checksum(&request);
                    request[2..4].copy_from_slice(&sum.to_be_bytes());
                }
                socket.send_to(&request, &SockAddr::from(to)).expect("send");
                let wanted = |packet: &[u8]| {
                    let message = if v4 { packet.get(20..).unwrap_or_default() } else { packet };
                    message.first() == Some(&if v4 { 0 } else { 129 }) && message.ends_with(&payload)
                };
                receive(&socket, wanted)
                    .unwrap_or_else(|| panic!("no echo of {size} bytes from {to} to {pod}"));
            }
        }
    }
}

fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 =
        bytes.chunks(2).map(|c| u32::from(c[0]) << 8 | u32::from(*c.get(1).unwrap_or(&0))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).expect("folded")
}

/// Reads packets of a raw socket until one is wanted, two seconds at most.
fn receive(socket: &socket2::Socket, wanted: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
    use std::io::Read as _;
    let mut reader = socket;
    let mut buffer = vec![0; 65_535];
    let end = Instant::now() + Duration::from_secs(2);
    while Instant::now() < end {
        let n = reader.read(&mut buffer).ok()?;
        if wanted(&buffer[..n]) {
            return Some(buffer[..n].to_vec());
        }
    }
    None
}

fn other_protocol(lab: &Lab) {
    for (from, to) in
        [("shop-client", "shop-web1"), ("shop-client", "shop-web2"), ("shop-client2", "shop-web2")]
    {
        for address in lab.pod(to).addresses() {
            for protocol in [253, 132] {
                let receiver = lab.pod(to).raw(address, protocol);
                receiver.set_read_timeout(Some(Duration::from_secs(2))).expect("time-out");
                let sender = lab.pod(from).raw(address, protocol);
                sender.send_to(CANARY, &SockAddr::from(SocketAddr::from((address, 0)))).expect("send");
                let got = receive(&receiver, |packet| packet.ends_with(CANARY));
                assert!(got.is_some(), "protocol {protocol} from {from} did not reach {address} of {to}");
            }
        }
    }
}

fn big_file(lab: &Lab) {
    let expected =
        std::fs::read_to_string(lab.run_dir().join("www/big.sha256")).expect("the large file's sum");
    for (pod, url) in [("shop-client", "-4 http://web/big"), ("shop-client2", "-6 http://web/big")] {
        let command = format!("curl -sS --fail --max-time 40 {url} | sha256sum");
        let ran = lab.exec(pod, &command, Duration::from_secs(45));
        assert_eq!(ran.out.split_whitespace().next(), Some(expected.trim()), "{url} from {pod}: {}", ran.err);
    }
}

fn spread(lab: &Lab) {
    for to in web_vips() {
        let mut hits = BTreeMap::<String, u32>::new();
        for _ in 0..300 {
            let (status, body) =
                lab.pod("shop-client").http_get(to, Duration::from_secs(5)).expect("an answer");
            assert_eq!(status, 200);
            *hits.entry(body.trim().to_owned()).or_default() += 1;
        }
        assert_eq!(hits.len(), 2, "backends of {to}: {hits:?}");
        assert!(hits.values().all(|n| (105..=195).contains(n)), "spread of {to}: {hits:?}");
    }
}

/// A backend asks the Service that it serves itself; either backend may answer, also itself.
fn hairpin(lab: &Lab) {
    for pod in BACKENDS {
        for to in web_vips() {
            let mut answered = BTreeMap::<String, u32>::new();
            for n in 0..60 {
                // A fair choice of two is hardly ever the same one sixty times.
                if n >= 12 && answered.len() == 2 {
                    break;
                }
                let got = lab.pod(pod).http_get(to, Duration::from_secs(5));
                let (_, body) = got.unwrap_or_else(|e| panic!("{pod} to {to}, after {answered:?}: {e}"));
                *answered.entry(body.trim().to_owned()).or_default() += 1;
            }
            assert!(answered.len() == 2, "{pod} to {to} should have met both backends: {answered:?}");
        }
    }
}

/// One client port to the VIP and to the endpoint behind it: two flows that DNAT makes equal.
fn one_target_two_names(lab: &Lab) {
    let client = lab.pod("shop-client");
    for (vip, like) in echo_vips().into_iter().zip([0, 1]) {
        let socket = client.udp_for(vip.ip());
        let direct: Vec<SocketAddr> =
            BACKENDS.iter().map(|pod| (lab.pod(pod).addresses()[like], 7007).into()).collect();
        for round in 0..20u8 {
            for to in direct.iter().chain([&vip]) {
                let sent = [CANARY, &[round]].concat();
                socket.send_to(&sent, to).expect("send");
                let mut buffer = [0; 128];
                let (n, from) = socket.recv_from(&mut buffer).unwrap_or_else(|e| panic!("from {to}: {e}"));
                assert_eq!((&buffer[..n], from), (&sent[..], *to));
            }
        }
    }
}

fn iperf(lab: &Lab) {
    for args in ["-4", "-6", "-4 -R", "-6 -u -b 20M -l 1200", "-4 -u -b 20M -l 1200 -R"] {
        let command = format!("iperf3 -c iperf -p 5201 -t 2 --connect-timeout 3000 -J {args}");
        let ran = lab.exec("shop-client", &command, Duration::from_secs(15));
        let report: serde_json::Value = serde_json::from_str(&ran.out).unwrap_or_default();
        let end = &report["end"];
        let bytes = ["sum_received", "sum"].iter().find_map(|sum| end[sum]["bytes"].as_u64()).unwrap_or(0);
        assert!(
            ran.code == 0 && bytes > 1_000_000,
            "iperf3 {args}: exit {} {bytes} bytes, {}{}",
            ran.code,
            ran.err,
            report["error"]
        );
    }
}

/// An address of each family, for those who need `IpAddr` values of a VIP.
pub fn ips(addresses: [SocketAddr; 2]) -> [IpAddr; 2] {
    addresses.map(|a| a.ip())
}
