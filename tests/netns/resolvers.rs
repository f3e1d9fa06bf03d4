//! Resolvers of every kind, and what is said in a resolver's or a Service's name when it is not its own.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::Case;
use crate::attackers::{Attack, PlainBridge, VICTIM};
use crate::dns;
use crate::lab::{Agents, Lab, Launched, PROJECT, RESOLVER, pool_vips};
use crate::lifecycle::StopAtEnd;
use crate::load;
use crate::packets::{self, CANARY};
use crate::services::{Service, copy_directory, replace};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case::new("promise_8_node_local_dnscache_answers_as_without_an_agent", node_local).agents(Agents::Off),
    Case::new("promise_1_a_resolver_that_is_a_workload_is_asked_through_the_tunnel", |lab| {
        project_resolver(lab, false)
    })
    .agents(Agents::Off),
    Case::new("promise_1_a_resolver_that_is_a_service_of_the_project_is_asked_through_the_tunnel", |lab| {
        project_resolver(lab, true);
    })
    .agents(Agents::Off),
    Case::new("promise_8_answers_forged_to_an_applications_own_port_are_dropped", forged_to_application)
        .agents(Agents::Off)
        .every_rp_filter()
        .looks_itself(),
    Case::new("promise_1_late_ends_after_a_service_is_gone_are_not_answered_in_clear", late_ends)
        .agents(Agents::Off)
        .looks_itself()
        .seconds(90),
];

const NODE_LOCAL: [u8; 4] = [169, 254, 20, 10];
/// Longer than a former address was prohibited on the first version.
const LATE: Duration = Duration::from_secs(40);
const NAMES: [&str; 3] = ["web.shop.svc.cluster.local", "ledger.bank.svc.cluster.local", "www.example.test"];

/// `tencrypt launch` for a pod with these resolvers in its resolv.conf.
fn with_resolvers(
    lab: &Lab,
    pod: &str,
    name: &str,
    directory: &std::path::Path,
    resolvers: &[IpAddr],
) -> Launched {
    let conf = lab.run_dir().join(format!("{name}.conf"));
    let lines: String = resolvers.iter().map(|resolver| format!("nameserver {resolver}\n")).collect();
    replace(&conf, &(lines + "search shop.svc.cluster.local svc.cluster.local cluster.local\n"));
    let mut args = Launched::args(lab, pod, directory, &lab.key_file(PROJECT));
    args.extend(["--resolv-conf".to_owned(), conf.display().to_string()]);
    let launched = Launched::start(lab, &args.iter().map(String::as_str).collect::<Vec<_>>());
    launched.wait_ready();
    launched
}

fn node_local(lab: &Lab) {
    let (pod, server) = (lab.pod("shop-client"), SocketAddr::from((NODE_LOCAL, 53)));
    let ask = |limit| {
        let questions = NAMES.iter().flat_map(|name| [1, 28].map(|kind| dns::bytes(name, kind, 0, None)));
        let both = |q: Vec<u8>| [dns::ask_udp(pod, server, &q, limit), dns::ask_tcp(pod, server, &q, limit)];
        questions.map(both).collect::<Vec<_>>()
    };
    let expected = ask(Duration::from_secs(2));
    assert!(expected.iter().flatten().all(Option::is_some), "control: without an agent it answers");
    let _client = with_resolvers(lab, "shop-client", "node-local", &lab.directory(PROJECT), &[server.ip()]);
    lab.reset_leaks();
    assert_eq!(ask(Duration::from_millis(500)), expected, "left: with an agent, right: without");
}

/// What a DNS server of a workload says: one A record for whatever is asked, for `fresh` one that the directory does not know.
fn say(question: &[u8]) -> Vec<u8> {
    let IpAddr::V4(fresh) = pool_vips(9_106)[0] else { panic!("an IPv4 address") };
    let is_fresh = question.windows(5).any(|part| part == b"fresh");
    dns::answer(question, if is_fresh { fresh.octets() } else { [10, 96, 1, 1] })
}

fn serve(udp: &UdpSocket, tcp: &TcpListener, stop: &AtomicBool) {
    udp.set_nonblocking(true).expect("non-blocking");
    tcp.set_nonblocking(true).expect("non-blocking");
    while !stop.load(Ordering::Acquire) {
        let mut question = [0; 512];
        if let Ok((n, from)) = udp.recv_from(&mut question) {
            let _ = udp.send_to(&say(&question[..n]), from);
        }
        if let Ok((mut stream, _)) = tcp.accept() {
            let mut length = [0; 2];
            stream.set_nonblocking(false).expect("blocking");
            stream.set_read_timeout(Some(Duration::from_secs(1))).expect("time-out");
            if stream.read_exact(&mut length).is_ok() {
                let mut question = vec![0; u16::from_be_bytes(length).into()];
                if stream.read_exact(&mut question).is_ok() {
                    let answer = say(&question);
                    let length = u16::try_from(answer.len()).expect("a small answer").to_be_bytes();
                    let _ = stream.write_all(&[&length[..], &answer].concat());
                }
            }
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// shop-web1 serves names, at its own address or behind a Service; the first questions come as soon as the pod is protected.
fn project_resolver(lab: &Lab, service: bool) {
    let directory = copy_directory(lab, if service { "resolver-service" } else { "resolver-pod" });
    let (server, vips) = (lab.pod("shop-web1"), pool_vips(9_103));
    // Both protocols; the second Service stands for the second port of the first.
    let _services = service.then(|| {
        [("names", vips, "UDP"), ("names-tcp", pool_vips(9_104), "TCP")].map(|(name, vips, protocol)| {
            Service::write(lab, &directory, name, vips, (53, 53), protocol, &["shop-web1"])
        })
    });
    let resolver = if service { vips[0] } else { server.v4.into() };
    let (udp, tcp) = (server.udp((server.v4, 53)), server.listen((server.v4, 53).into()));
    let _server = Launched::pod(lab, "shop-web1", &directory, &lab.key_file(PROJECT));
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let _stop = StopAtEnd(&stop);
        scope.spawn(|| serve(&udp, &tcp, &stop));
        let name = if service { "service" } else { "pod" };
        let mut client = with_resolvers(lab, "shop-client", name, &directory, &[resolver]);
        lab.reset_leaks();
        let (pod, to) = (lab.pod("shop-client"), SocketAddr::from((resolver, 53)));
        let mut answered = 0;
        for (n, name) in NAMES.iter().cycle().take(12).enumerate() {
            let question = dns::bytes(name, 1, 0, None);
            answered += u32::from(dns::ask_udp(pod, to, &question, Duration::from_secs(1)).is_some());
            // A Service of UDP alone refuses TCP; what leaves is looked at all the same.
            let tcp =
                dns::ask_tcp(pod, to, &question, Duration::from_millis(if n < 3 { 1_000 } else { 100 }));
            answered += u32::from(tcp.is_some() || service);
        }
        // What it names is captured before the application hears of it.
        let fresh = dns::bytes("fresh.shop.svc.cluster.local", 1, 0, None);
        if dns::ask_udp(pod, to, &fresh, Duration::from_secs(1)).is_some() {
            let fresh = pool_vips(9_106)[0];
            let _ = pod.udp_for(fresh).send_to(CANARY, (fresh, 7));
            drop(pod.connect((fresh, 80), Duration::from_millis(200)));
        }
        lab.assert_no_leak();
        lab.assert_sealed();
        assert!(answered > 20, "{answered} of 24 questions were answered");
        assert_eq!(client.stop(), Some(0), "{}", client.printed());
    });
}

/// `RESOLVER:53 -> OWN:port` of an application: beside the agent it would be neither held nor judged.
fn forged_to_application(lab: &Lab) {
    let _bridge = PlainBridge::new(lab);
    let attack = Attack::on(lab, VICTIM);
    let resolvers: [IpAddr; 2] = [RESOLVER.into(), "fd00:10:96::a".parse().expect("an address")];
    let _agent = with_resolvers(lab, VICTIM, "forged", &lab.directory(PROJECT), &resolvers);
    for resolver in resolvers {
        let own = attack.victim.address(resolver);
        let socket = attack.victim.udp((own, 0));
        socket.set_read_timeout(Some(Duration::from_millis(300))).expect("time-out");
        let port = socket.local_addr().expect("an address").port();
        let (question, tap) = (dns::bytes("web.shop.svc.cluster.local", 1, 0, None), attack.victim.sniff());
        let forgery = packets::udp(resolver, own, 53, port, &dns::answer(&question, [203, 0, 113, 66]));
        let large = packets::udp(resolver, own, 53, port, &CANARY.repeat(80));
        attack.send(&forgery);
        packets::fragments(&large, 800).iter().for_each(|part| attack.send(part));
        assert!(
            socket.recv(&mut [0; 4_096]).is_err(),
            "a forged answer of {resolver} came to the application"
        );
        assert!(
            tap.drain().iter().any(|frame| attack.made(frame)),
            "control: the forgery came to the device"
        );
        // A connection's segments neither.
        let listener = attack.victim.listen((own, 0).into());
        let port = listener.local_addr().expect("an address").port();
        attack.send(&packets::tcp_syn(resolver, own, 53, port));
        let answer = tap.wait(Duration::from_millis(300), |frame| {
            let seen = packets::seen(frame)?;
            (seen.to == resolver && seen.ports == Some((port, 53))).then_some(())
        });
        assert!(answer.is_none(), "the pod answered a forged SYN of {resolver}");
    }
}

/// Connections to a Service whose manifests go away, and whose servers close them afterwards, many at once.
fn late_ends(lab: &Lab) {
    const PORT: u16 = 9_630;
    let count = if crate::long() { 3_000 } else { 500 };
    let directory = copy_directory(lab, "late-ends");
    let vips = pool_vips(9_105);
    let service = Service::write(lab, &directory, "late-ends", vips, (80, PORT), "TCP", &["shop-web1"]);
    // The server's agent goes on knowing it.
    let server_directory = copy_directory(lab, "late-ends-server");
    let _kept = Service::write(lab, &server_directory, "late-ends", vips, (80, PORT), "TCP", &["shop-web1"]);
    let (key, server, client) = (lab.key_file(PROJECT), lab.pod("shop-web1"), lab.pod("shop-client"));
    let _server = Launched::pod(lab, "shop-web1", &server_directory, &key);
    let _client = Launched::pod(lab, "shop-client", &directory, &key);
    vips.iter().for_each(|vip| load::await_route(lab, "shop-client", *vip));
    let listener = server.listen((std::net::Ipv6Addr::UNSPECIFIED, PORT).into());
    lab.reset_leaks();
    let mut pairs = Vec::new();
    for n in 0..count {
        let stream = client.connect((vips[n % 2], 80), Duration::from_secs(3)).expect("a connection");
        pairs.push((stream, listener.accept().expect("its other end").0));
    }
    drop(service);
    let (clients, mut servers): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
    // Some clients end before they hear of it, some later; so do the servers, whose kernels repeat their ends for minutes.
    let mut clients = clients;
    clients.truncate(count / 2);
    let begun = Instant::now();
    while begun.elapsed() < LATE {
        let late = begun.elapsed() > LATE - Duration::from_secs(8);
        let some = if late { servers.len().min(count / 10) } else { servers.len().min(count / 200) };
        for mut server in servers.drain(..some) {
            let _ = server.write_all(CANARY);
        }
        lab.assert_no_leak();
        thread::sleep(Duration::from_millis(500));
    }
    lab.assert_sealed();
    // From here on the agents are stopped, and what the kernels still repeat is in clear.
    lab.assert_no_leak();
}
