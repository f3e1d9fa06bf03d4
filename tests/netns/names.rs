//! Names: answers byte for byte as without an agent, none before its route, and a directory that is late.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::Case;
use crate::dns::{self, Question};
use crate::lab::{Agents, Lab, Launched, PROJECT, PROTECTED, RESOLVER, pool_vips};
use crate::load;
use crate::packets::{self, CANARY};
use crate::services::{Service, copy_directory};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case::new("promise_8_answers_equal_the_servers_byte_for_byte", answers_are_equal).every_rp_filter(),
    Case::new("promise_8_parallel_questions_of_one_socket_get_their_own_answers", parallel_questions),
    Case::new("promise_8_any_resolver_address_of_the_pod_goes_on_working_over_tcp_many_times", many_over_tcp),
    Case::new("promise_3_no_answer_comes_before_its_route", gate_holds)
        .agents(Agents::Fault("netlink-delay-ms=50"))
        .seconds(900),
    Case::new("control_answers_without_the_gate_leak", gate_off_trips)
        .agents(Agents::Fault("netlink-delay-ms=50,no-dns-gate"))
        .looks_itself()
        .seconds(120),
    Case::new("promise_1_a_service_made_while_running_is_sealed_from_its_first_packet", new_service)
        .every_rp_filter()
        .sealed(),
    Case::new("promise_7_connections_wait_for_a_directory_that_is_two_seconds_late", late_directory)
        .agents(Agents::Off)
        .looks_itself()
        .seconds(90),
];

const A: u16 = 1;
const PTR: u16 = 12;
const TXT: u16 = 16;
const AAAA: u16 = 28;
const SRV: u16 = 33;

/// What is asked, and whether UDP alone must bring the whole answer.
fn questions() -> Vec<Question> {
    let mut all = vec![
        Question::new("web.shop.svc.cluster.local", A),
        Question::new("web.shop.svc.cluster.local", AAAA),
        Question::new("wEb.SHOP.svc.cluster.LOCAL", A),
        Question::new("web.shop.svc.cluster.local", A).edns(1232),
        Question::new("web-headless.shop.svc.cluster.local", A),
        Question::new("web-headless.shop.svc.cluster.local", AAAA),
        Question::new("10-1-1-12.web-headless.shop.svc.cluster.local", A),
        Question::new("_http._tcp.web.shop.svc.cluster.local", SRV),
        Question::new("_http._tcp.web-headless.shop.svc.cluster.local", SRV).edns(1232),
        Question::new("1.1.96.10.in-addr.arpa", PTR),
        Question::new("1.0.1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.6.9.0.0.0.1.0.0.0.0.d.f.ip6.arpa", PTR),
        Question::new("note.shop.svc.cluster.local", TXT),
        Question::new("strange.shop.svc.cluster.local", 65_280),
        Question::new("big.shop.svc.cluster.local", TXT),
        Question::new("big.shop.svc.cluster.local", TXT).edns(4096),
        Question::new("ext.shop.svc.cluster.local", A),
        Question::new("ext.shop.svc.cluster.local", AAAA),
        Question::new("www.example.test", A),
        Question::new("ledger.bank.svc.cluster.local", A),
        Question::new("nothing.shop.svc.cluster.local", A),
        Question::new("nothing.example.org", A),
        Question::new("web.shop.svc.cluster.local", 255),
    ];
    all.extend([2, 4, 5].map(|opcode| Question::new("shop.svc.cluster.local", 6).opcode(opcode)));
    all
}

/// The pod without agent hears what the server says; the protected pods must hear the same.
fn answers_are_equal(lab: &Lab) {
    let server = SocketAddr::from((RESOLVER, 53));
    let direct = lab.pod("shop-lone");
    let mut compared = 0;
    for question in questions() {
        let bytes = question.bytes();
        for (transport, ask) in [
            ("UDP", dns::ask_udp as fn(&_, _, &[u8], _) -> Option<Vec<u8>>),
            ("TCP", dns::ask_tcp as fn(&_, _, &[u8], _) -> Option<Vec<u8>>),
        ] {
            // What is no query is not always answered.
            let patience = Duration::from_millis(if question.opcode == 0 { 5_000 } else { 500 });
            let Some(expected) = ask(direct, server, &bytes, patience) else {
                assert!(question.opcode != 0, "the server does not answer {question:?} over {transport}");
                continue;
            };
            for pod in ["shop-client", "shop-client2"] {
                let got = ask(lab.pod(pod), server, &bytes, Duration::from_secs(2));
                let got = got.unwrap_or_else(|| panic!("{pod}: no answer to {question:?} over {transport}"));
                // The server shuffles SRV records of one weight: asking it again shows the other orders.
                let mut tries = if question.kind == SRV { 300 } else { 0 };
                let mut direct_answer = expected.clone();
                while direct_answer != got && tries > 0 {
                    tries -= 1;
                    direct_answer = ask(direct, server, &bytes, Duration::from_secs(1)).unwrap_or_default();
                }
                assert_eq!(got, direct_answer, "{pod}: {question:?} over {transport}");
                compared += 1;
            }
            if question.name.starts_with("big") && (transport == "TCP" || question.edns.is_some()) {
                assert!(expected.len() > 3_000 && !dns::truncated(&expected), "the large answer is whole");
            }
        }
    }
    assert!(compared >= 80, "only {compared} answers compared");
}

fn parallel_questions(lab: &Lab) {
    let socket = lab.pod("shop-client").udp_for(RESOLVER.into());
    let names =
        ["web.shop.svc.cluster.local", "echo.shop.svc.cluster.local", "nothing.shop.svc.cluster.local"];
    let mut waiting = Vec::new();
    for id in 0..300u16 {
        let kind = if id.is_multiple_of(2) { A } else { AAAA };
        let mut question = dns::bytes(names[usize::from(id) % names.len()], kind, 0, None);
        question[..2].copy_from_slice(&id.to_be_bytes());
        socket.send_to(&question, (RESOLVER, 53)).expect("send");
        waiting.push(question);
        if waiting.len() == 30 {
            while !waiting.is_empty() {
                let mut answer = [0; 2_048];
                let (n, from) = socket.recv_from(&mut answer).expect("an answer to each question");
                assert_eq!(from, SocketAddr::from((RESOLVER, 53)));
                let mine =
                    waiting.iter().position(|q| q[..2] == answer[..2]).expect("an id that is waited for");
                let question = waiting.swap_remove(mine);
                assert_eq!(
                    answer[12..question.len().min(n)],
                    question[12..],
                    "the answer is to another question"
                );
            }
        }
    }
}

fn many_over_tcp(lab: &Lab) {
    let server = SocketAddr::from((RESOLVER, 53));
    let question = Question::new("big.shop.svc.cluster.local", TXT).bytes();
    for round in 0..60 {
        let answer = dns::ask_tcp(lab.pod("shop-client"), server, &question, Duration::from_secs(2));
        let answer = answer.unwrap_or_else(|| panic!("no answer over TCP in round {round}"));
        assert!(answer.len() > 3_000, "a short answer in round {round}");
    }
}

fn new_service(lab: &Lab) {
    let vips = pool_vips(9_000);
    let service = Service::write(
        lab,
        &lab.directory(PROJECT),
        "fresh",
        vips,
        (80, 8080),
        "TCP",
        &["shop-web1", "shop-web2"],
    );
    // The nodes would carry it in clear from the first moment; the agents know it a moment later.
    for (pod, vip) in PROTECTED.iter().flat_map(|pod| vips.map(|vip| (pod, vip))) {
        load::await_route(lab, pod, vip);
    }
    for pod in ["shop-client", "shop-client2"] {
        for vip in vips {
            let got = lab.pod(pod).http_get((vip, 80), Duration::from_secs(3));
            assert_eq!(got.unwrap_or_else(|e| panic!("{pod} to {vip}: {e}")).0, 200);
        }
    }
    drop(service);
}

/// One cycle: a new name that the DNS server knows now and the directory 100 ms later. The answer's address is
/// spoken to at once. Gives the number of datagrams and SYNs that left in clear.
fn cycle(lab: &Lab, number: u16, connect: bool) -> Result<(), String> {
    let vips = pool_vips(number);
    let name = format!("gate-{number}.shop.svc.cluster.local");
    let hosts = lab.run_dir().join("dns/hosts.d").join(format!("gate-{number}"));
    fs::write(&hosts, format!("{} {name}\n{} {name}\n", vips[0], vips[1])).expect("a hosts file");
    let client = lab.pod("shop-client");
    let kind = if number.is_multiple_of(2) { A } else { AAAA };
    let vip = vips[usize::from(number % 2)];
    let question = dns::bytes(&name, kind, 0, None);
    let socket = client.udp_for(vip);
    let directory = lab.directory(PROJECT);
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(100));
            let backends = ["shop-web1", "shop-web2"];
            Service::write(lab, &directory, &format!("gate-{number}"), vips, (80, 8080), "TCP", &backends)
                .keep();
        });
        let end = Instant::now() + Duration::from_secs(3);
        // The server reads its folder when inotify tells it; until then the name does not exist.
        while Instant::now() < end {
            let answer = dns::ask_udp(client, (RESOLVER, 53).into(), &question, Duration::from_secs(1));
            if answer.is_some_and(|a| dns::answers(&a) > 0) {
                // Refused at once is as good as held or sealed: the sniffer decides.
                let _ = socket.send_to(CANARY, (vip, 9));
                // A packet waits a second for the directory, then the application hears that it is prohibited;
                // on a busy machine the manifest may come later than that, and a second try must do.
                let get = || client.http_get((vip, 80), Duration::from_secs(4));
                let connected = connect.then(|| get().or_else(|_| get()));
                return match connected {
                    Some(Err(e)) => Err(format!("cycle {number}: {vip} was not reached: {e}")),
                    _ => Ok(()),
                };
            }
            thread::sleep(Duration::from_millis(2));
        }
        Err(format!("cycle {number}: the name was never answered"))
    })
}

/// Runs cycles while a sniffer on the client's device counts what leaves for their addresses.
fn cycles(lab: &Lab, numbers: std::ops::Range<u16>, connect_every: u16) -> (usize, Vec<String>) {
    let sniffer = lab.pod("shop-client").sniff();
    let done = AtomicBool::new(false);
    let addresses: Vec<IpAddr> = numbers.clone().flat_map(pool_vips).collect();
    thread::scope(|scope| {
        let counter = scope.spawn(|| {
            let mut clear = 0;
            loop {
                let last = done.load(Ordering::Acquire);
                let frames = sniffer.drain();
                clear += frames
                    .iter()
                    .filter_map(|f| packets::seen(f))
                    .filter(|s| addresses.contains(&s.to))
                    .count();
                if last {
                    return clear;
                }
                thread::sleep(Duration::from_millis(20));
            }
        });
        let errors = numbers.filter_map(|n| cycle(lab, n, n % connect_every == 0).err()).collect();
        thread::sleep(Duration::from_millis(100));
        done.store(true, Ordering::Release);
        (counter.join().expect("the counter"), errors)
    })
}

fn remove_cycles(lab: &Lab, numbers: std::ops::Range<u16>) {
    for number in numbers {
        // What a cycle did not get to write is not there.
        let _ = fs::remove_file(lab.directory(PROJECT).join(format!("zz-gate-{number}.yaml")));
        let _ = fs::remove_file(lab.run_dir().join("dns/hosts.d").join(format!("gate-{number}")));
    }
}

fn gate_holds(lab: &Lab) {
    let count = if crate::long() { 2_000 } else { 40 };
    let (clear, errors) = cycles(lab, 0..count, 8);
    remove_cycles(lab, 0..count);
    assert!(clear == 0, "{clear} packets left in clear between answer and route");
    assert!(errors.is_empty(), "{} of {count} cycles failed: {}", errors.len(), errors.join("; "));
}

fn gate_off_trips(lab: &Lab) {
    let (clear, _) = cycles(lab, 2_000..2_010, 100);
    remove_cycles(lab, 2_000..2_010);
    assert!(clear > 0, "without the gate nothing left in clear: the test above proves nothing");
}

/// The server's agent learns of a Service two seconds after the client's.
fn late_directory(lab: &Lab) {
    let (ahead, behind) = (copy_directory(lab, "ahead"), copy_directory(lab, "behind"));
    let key = lab.key_file(PROJECT);
    let mut agents = vec![Launched::pod(lab, "shop-client", &ahead, &key)];
    agents.extend(["shop-web1", "shop-web2"].map(|pod| Launched::pod(lab, pod, &behind, &key)));
    // Sessions exist before; what is late is the Service alone.
    for to in ["shop-web1", "shop-web2"] {
        let got = lab.pod("shop-client").http_get((lab.pod(to).v4, 8080), Duration::from_secs(5));
        assert!(got.is_ok(), "{to}: {got:?}");
    }
    lab.reset_leaks();
    let vips = pool_vips(9_001);
    let backends = ["shop-web1", "shop-web2"];
    Service::write(lab, &ahead, "late", vips, (80, 8080), "TCP", &backends).keep();
    // The clock starts when the client's agent knows it: its packets are sealed from then on.
    thread::sleep(Duration::from_millis(300));
    let started = Instant::now();
    let failures: Vec<String> = thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(1_700));
            Service::write(lab, &behind, "late", vips, (80, 8080), "TCP", &backends).keep();
        });
        let client = lab.pod("shop-client");
        let connections: Vec<_> = (0..200usize)
            .map(|n| scope.spawn(move || client.http_get((vips[n % 2], 80), Duration::from_secs(8))))
            .collect();
        connections
            .into_iter()
            .filter_map(|c| c.join().expect("no panic").err())
            .map(|e| e.to_string())
            .collect()
    });
    let took = started.elapsed();
    let leaks = lab.leaks();
    for agent in &mut agents {
        assert_eq!(agent.stop(), Some(0), "a launcher did not stop in order: {}", agent.printed());
    }
    assert!(leaks.leaked == 0 && leaks.tunnel > 0, "{leaks:?}");
    assert!(failures.is_empty(), "{} of 200 connections failed: {failures:?}", failures.len());
    // A SYN that was lost comes again after one, three and seven seconds.
    assert!(took < Duration::from_millis(6_500), "200 connections took {took:?}");
}
