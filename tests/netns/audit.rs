//! Permissive and audit mode on a lab where some pods have agents and some have none: what is listed, what goes on.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use socket2::{Domain, Socket, Type};

use crate::Case;
use crate::lab::{Agents, Lab, TUNNEL_PORT, echo_vips, web_vips};
use crate::ladder::{ask, launch, until, web};
use crate::lifecycle::StopAtEnd;
use crate::packets::{self, CANARY};
use crate::status::document;

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case::new("audit_lists_exactly_the_flows_that_strict_drops", audit_and_strict)
        .agents(Agents::Off)
        .every_rp_filter()
        .looks_itself()
        .seconds(120),
    Case::new("permissive_migrates_a_project_pod_by_pod_and_shows_every_flow", pod_by_pod)
        .agents(Agents::Off)
        .looks_itself()
        .seconds(120),
];

/// Pods with agents in the mixed lab. The other pods of the project, the backends of its Services among them, have none.
const WITH_AGENT: [&str; 2] = ["shop-client", "shop-client2"];
/// IP protocol for experiments (RFC 3692).
const EXPERIMENT: u8 = 253;
const TCP: u8 = 6;
const UDP: u8 = 17;
/// How long a packet may take; a handshake is a part of it.
const ARRIVAL: Duration = Duration::from_millis(1_500);

/// How a flow speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A connection, a byte to and fro.
    Tcp,
    /// A datagram.
    Udp,
    /// A datagram in pieces.
    Large,
    /// A datagram to the tunnel's port, not from it.
    TunnelPort,
    /// A datagram by a packet socket.
    Frame,
    /// A packet of a protocol without ports.
    Raw,
    /// An echo request.
    Ping,
    /// A request to the Service `web`.
    WebVip,
    /// A datagram to the Service `echo`, and back.
    EchoVip,
}

use Kind::{EchoVip, Frame, Large, Ping, Raw, TunnelPort, Udp, WebVip};

/// Who speaks to whom how. Flows that show no ports have a pair of pods each: a record of theirs fits one flow.
const FLOWS: &[(&str, &str, &[Kind])] = &[
    // Both ends can seal.
    ("shop-client", "shop-client2", &[Kind::Tcp, Udp, Large, Raw, Ping]),
    // From an agent to nobody's.
    ("shop-client", "shop-web1", &[Kind::Tcp, Udp, Large, TunnelPort, Frame, Raw, Ping]),
    ("shop-client2", "shop-web1", &[Kind::Tcp, Udp]),
    ("shop-client", "shop-web2", &[WebVip, EchoVip]),
    // The other way.
    ("shop-lone", "shop-client", &[Kind::Tcp, Udp, Large, Raw, Ping]),
    ("shop-web2", "shop-client2", &[Kind::Tcp, Udp, Ping]),
    // Nobody's business.
    ("shop-client", "bank-client", &[Kind::Tcp, Udp, Large, Frame, Raw, Ping]),
    ("bank-server", "shop-client", &[Kind::Tcp, Udp, Ping]),
    ("shop-lone", "shop-web1", &[Kind::Tcp, Udp, Ping]),
];

/// One flow of one family, and its ports: each has a source port of its own.
#[derive(Clone, Debug)]
struct Flow {
    name: String,
    kind: Kind,
    from: (&'static str, SocketAddr),
    to: (&'static str, SocketAddr),
}

fn flows(lab: &Lab, first_port: u16) -> Vec<Flow> {
    let mut flows = Vec::new();
    for (from, to, kinds) in FLOWS {
        for (family, (source, target)) in
            lab.pod(from).addresses().into_iter().zip(lab.pod(to).addresses()).enumerate()
        {
            for &kind in *kinds {
                let port = first_port + u16::try_from(flows.len()).expect("few flows");
                let target = match kind {
                    WebVip => web_vips()[family],
                    EchoVip => echo_vips()[family],
                    TunnelPort => (target, TUNNEL_PORT).into(),
                    Raw | Ping => (target, 0).into(),
                    Kind::Tcp | Udp | Large | Frame => (target, 10_000 + port).into(),
                };
                let name = format!("{kind:?} {from} {source} -> {to} {}", target.ip());
                flows.push(Flow { name, kind, from: (from, (source, port).into()), to: (to, target) });
            }
        }
    }
    flows
}

impl Flow {
    fn protocol(&self) -> u8 {
        match (self.kind, self.to.1.is_ipv4()) {
            (Kind::Tcp | WebVip, _) => TCP,
            (Udp | Large | TunnelPort | Frame | EchoVip, _) => UDP,
            (Raw, _) => EXPERIMENT,
            (Ping, true) => 1,
            (Ping, false) => 58,
        }
    }

    /// Whether a record is one direction of this flow.
    fn is_told_by(&self, record: &Value) -> bool {
        let end = |address: &str, port: &str| {
            let address: IpAddr = record[address].as_str().and_then(|a| a.parse().ok()).expect("an address");
            (address, record[port].as_u64())
        };
        let ends = [end("source", "sourcePort"), end("destination", "destinationPort")];
        let shows = |own: SocketAddr, (address, port): (IpAddr, Option<u64>)| {
            let port_fits = match (self.kind, port) {
                (Raw | Ping, port) => port.is_none(),
                (Large, None) => true,
                (_, port) => port == Some(own.port().into()),
            };
            own.ip() == address && port_fits
        };
        let is = |from, to| shows(self.from.1, from) && shows(self.to.1, to);
        record["protocol"] == self.protocol() && (is(ends[0], ends[1]) || is(ends[1], ends[0]))
    }

    /// Whether it works, as the receiver sees it.
    fn works(&self, lab: &Lab) -> bool {
        let (from, to) = (lab.pod(self.from.0), lab.pod(self.to.0));
        let (source, target) = (self.from.1, self.to.1);
        match self.kind {
            Udp | Large | TunnelPort => {
                let (receiver, sender) = (to.udp(target), from.udp(source));
                let payload = vec![7; if self.kind == Large { 4_000 } else { 100 }];
                receiver.set_read_timeout(Some(ARRIVAL)).expect("time-out");
                // EPERM is how a drop at postrouting looks.
                let _ = sender.send_to(&payload, target);
                receive(|buffer| receiver.recv(buffer), payload.len())
            }
            EchoVip => {
                let sender = from.udp(source);
                sender.set_read_timeout(Some(ARRIVAL)).expect("time-out");
                let _ = sender.send_to(CANARY, target);
                receive(|buffer| sender.recv(buffer), CANARY.len())
            }
            Frame => {
                let receiver = to.udp(target);
                receiver.set_read_timeout(Some(ARRIVAL)).expect("time-out");
                let packet = packets::udp(source.ip(), target.ip(), source.port(), target.port(), CANARY);
                let _ = from.send_frame(&packets::frame(from.mac(), to.mac(), &packet));
                receive(|buffer| receiver.recv(buffer), CANARY.len())
            }
            Raw => {
                let receiver = to.raw(target.ip(), EXPERIMENT.into());
                receiver.set_read_timeout(Some(ARRIVAL)).expect("time-out");
                let _ = from.raw(source.ip(), EXPERIMENT.into()).send_to(CANARY, &target.into());
                let header = if target.is_ipv4() { 20 } else { 0 };
                receive(|buffer| (&receiver).read(buffer), header + CANARY.len())
            }
            Ping => {
                let command = format!("ping -c 1 -W 2 {}", target.ip());
                lab.exec(&from.name, &command, Duration::from_secs(10)).code == 0
            }
            Kind::Tcp => {
                let listener = to.listen(target);
                let done = AtomicBool::new(false);
                thread::scope(|scope| {
                    scope.spawn(|| {
                        listener.set_nonblocking(true).expect("a listener");
                        let end = Instant::now() + 2 * ARRIVAL;
                        while !done.load(Ordering::Relaxed) && Instant::now() < end {
                            let Ok((mut stream, _)) = listener.accept() else {
                                thread::sleep(Duration::from_millis(2));
                                continue;
                            };
                            stream.set_nonblocking(false).expect("a stream");
                            stream.set_read_timeout(Some(ARRIVAL)).expect("time-out");
                            let mut byte = [0];
                            let _ = stream.read_exact(&mut byte).and_then(|()| stream.write_all(&byte));
                            return;
                        }
                    });
                    let works = self.connect(lab).and_then(|mut stream| {
                        stream.write_all(b"x")?;
                        stream.read_exact(&mut [0])
                    });
                    done.store(true, Ordering::Relaxed);
                    works.is_ok()
                })
            }
            WebVip => self.connect(lab).and_then(|mut stream| ask(&mut stream)).is_ok(),
        }
    }

    fn connect(&self, lab: &Lab) -> std::io::Result<TcpStream> {
        let (source, target) = (self.from.1, self.to.1);
        let socket =
            lab.pod(self.from.0).enter(|| Socket::new(Domain::for_address(source), Type::STREAM, None))?;
        socket.bind(&source.into())?;
        socket.connect_timeout(&target.into(), ARRIVAL)?;
        socket.set_read_timeout(Some(ARRIVAL))?;
        Ok(socket.into())
    }
}

fn receive(recv: impl FnOnce(&mut [u8]) -> std::io::Result<usize>, wanted: usize) -> bool {
    recv(&mut [0; 5_000]).is_ok_and(|n| n == wanted)
}

/// Runs all flows at once: the names of those that do not work.
fn run(lab: &Lab, flows: &[Flow]) -> BTreeSet<String> {
    thread::scope(|scope| {
        let running: Vec<_> = flows.iter().map(|flow| (flow, scope.spawn(|| flow.works(lab)))).collect();
        let failed = |(flow, works): (&Flow, thread::ScopedJoinHandle<'_, bool>)| {
            (!works.join().expect("a flow")).then(|| flow.name.clone())
        };
        running.into_iter().filter_map(failed).collect()
    })
}

/// How a peer or VIP stands, as the status of `pod` says.
fn standing(lab: &Lab, pod: &str, of: IpAddr) -> Option<(String, bool)> {
    let (json, _) = document(lab, pod);
    let items = |list: &str| json[list]["items"].as_array().cloned().unwrap_or_default();
    let item = items("peers").into_iter().chain(items("vips")).find(|i| i["address"] == of.to_string())?;
    let standing = item["standing"].as_str()?.to_owned();
    let captured = item["captured"] == true || standing == "captured";
    Some((standing, captured))
}

/// Waits until both agents of the mixed lab know who can seal and who cannot.
fn settled(lab: &Lab) {
    until("the agents know each other and who has none", || {
        WITH_AGENT.iter().all(|pod| {
            ["shop-client", "shop-client2", "shop-web1", "shop-web2", "shop-lone"].iter().all(|peer| {
                let wanted = if WITH_AGENT.contains(peer) { "able" } else { "unable" };
                peer == pod
                    || lab.pod(peer).addresses().into_iter().all(|address| {
                        standing(lab, pod, address).is_some_and(|(standing, _)| standing == wanted)
                    })
            })
        })
    });
}

fn audit_and_strict(lab: &Lab) {
    lab.end_connections();
    let launched = WITH_AGENT.map(|pod| launch(lab, pod, "audit"));
    settled(lab);
    let audited = flows(lab, 20_000);
    assert_eq!(run(lab, &audited), BTreeSet::new(), "audit mode lets everything pass");
    let mut listed = BTreeSet::new();
    for pod in WITH_AGENT {
        let (json, code) = document(lab, pod);
        assert_eq!((&json["mode"], &json["wouldDrop"]["leftOut"], code), (&"audit".into(), &0.into(), 0));
        for record in json["wouldDrop"]["items"].as_array().expect("records") {
            let flows: Vec<_> = audited.iter().filter(|flow| flow.is_told_by(record)).collect();
            let [flow] = flows[..] else { panic!("{pod}: a record of {} flows: {record:#}", flows.len()) };
            listed.insert(flow.name.clone());
        }
    }
    drop(launched);

    let _launched = WITH_AGENT.map(|pod| launch(lab, pod, "strict"));
    lab.declare_hosts(["bank-client", "bank-server"].iter().flat_map(|pod| lab.pod(pod).addresses()));
    lab.reset_leaks();
    let dropped = run(lab, &flows(lab, 21_000));
    assert_eq!(listed, dropped, "left: listed by audit; right: dropped by strict");
    let leaks = lab.leaks();
    let left = leaks.count(|pod, _, direction, _| WITH_AGENT.contains(&pod) && direction == "out");
    assert_eq!(left, 0, "strict lets nothing out in clear: {:?}", leaks.rows);
    assert!(leaks.leaked > 0, "positive control: who has no agent speaks in clear");
    // Neither nothing nor everything: all flows to and from who has no agent.
    let expected = audited.iter().filter(|flow| {
        let ends = [flow.from.0, flow.to.0];
        let bare = |pod: &&str| pod.starts_with("shop-") && !WITH_AGENT.contains(pod);
        ends.iter().any(bare) && ends.iter().any(|pod| WITH_AGENT.contains(pod))
    });
    assert_eq!(dropped, expected.map(|flow| flow.name.clone()).collect());
    assert!(!dropped.is_empty() && dropped.len() < audited.len());
}

/// Connections that speak until they are told to stop.
struct Running<'s> {
    speakers: Vec<thread::ScopedJoinHandle<'s, Result<u64, String>>>,
    /// Both ends, as the pod sees them.
    ends: Vec<(SocketAddr, SocketAddr)>,
}

impl<'s> Running<'s> {
    /// Opens connections of `pod` and keeps them talking.
    fn open(
        scope: &'s thread::Scope<'s, '_>,
        lab: &Lab,
        pod: &str,
        to: &[SocketAddr],
        stop: &'s AtomicBool,
    ) -> Self {
        let mut running = Self { speakers: Vec::new(), ends: Vec::new() };
        for to in to {
            let mut stream = lab.pod(pod).connect(*to, Duration::from_secs(5)).expect("connect");
            ask(&mut stream).expect("an answer");
            running.ends.push((stream.local_addr().expect("an address"), *to));
            running.speakers.push(scope.spawn(move || {
                let mut answers = 0;
                while !stop.load(Ordering::Relaxed) {
                    ask(&mut stream).map_err(|e| format!("{stream:?} after {answers} answers: {e}"))?;
                    answers += 1;
                    thread::sleep(Duration::from_millis(10));
                }
                Ok(answers)
            }));
        }
        running
    }

    /// The state of every connection, as the status of `pod` shows it; none: it does not.
    fn states(&self, lab: &Lab, pod: &str) -> Vec<Option<String>> {
        let (json, _) = document(lab, pod);
        assert_eq!(json["flowStates"]["leftOut"], 0);
        let items = json["flowStates"]["items"].as_array().cloned().unwrap_or_default();
        let end = |item: &Value, address: &str, port: &str| {
            let address: IpAddr = item[address].as_str()?.parse().ok()?;
            Some(SocketAddr::new(address, u16::try_from(item[port].as_u64()?).ok()?))
        };
        let find = |(local, remote): &(SocketAddr, SocketAddr)| {
            let is = |item: &&Value| {
                item["protocol"] == TCP
                    && end(item, "local", "localPort") == Some(*local)
                    && end(item, "remote", "remotePort") == Some(*remote)
            };
            Some(items.iter().find(is)?["state"].as_str()?.to_owned())
        };
        self.ends.iter().map(find).collect()
    }

    fn are(&self, lab: &Lab, pod: &str, state: &str) {
        let states = self.states(lab, pod);
        let all = states.iter().all(|found| found.as_deref() == Some(state));
        assert!(
            all,
            "not all flows of {pod} are {state}: {:?}",
            self.ends.iter().zip(&states).collect::<Vec<_>>()
        );
    }

    fn finish(self) {
        for speaker in self.speakers {
            let answers = speaker.join().expect("a speaker");
            assert!(
                answers.as_ref().is_ok_and(|n| *n > 10),
                "a connection broke, or did not speak: {answers:?}"
            );
        }
    }
}

fn pod_by_pod(lab: &Lab) {
    let clients = ["shop-client", "shop-client2"];
    let targets: Vec<_> =
        web(lab, "shop-web1").into_iter().chain(web(lab, "shop-web2")).chain(web_vips()).collect();
    let stop = AtomicBool::new(false);
    let captured = |pod: &str, wanted: bool| {
        let all = || {
            targets
                .iter()
                .all(|to| standing(lab, pod, to.ip()).is_some_and(|(_, captured)| captured == wanted))
        };
        until("the targets are captured, or passed, together", all);
    };
    thread::scope(|scope| {
        let _stop = StopAtEnd(&stop);
        let open = |pod: &str| Running::open(scope, lab, pod, &targets, &stop);
        let [bare, bare2] = clients.map(open);
        // A client alone can seal nothing, and neither can it with one of two backends.
        let mut launched = vec![launch(lab, clients[0], "permissive")];
        let mut older = vec![bare];
        for backend in ["shop-web1", "shop-web2"] {
            captured(clients[0], false);
            older.push(open(clients[0]));
            older.iter().for_each(|running| running.are(lab, clients[0], "passed"));
            launched.push(launch(lab, backend, "permissive"));
        }
        captured(clients[0], true);
        let newer = open(clients[0]);
        newer.are(lab, clients[0], "protected");
        older.iter().for_each(|running| running.are(lab, clients[0], "clear"));
        // The last pod.
        launched.push(launch(lab, clients[1], "permissive"));
        captured(clients[1], true);
        let last = open(clients[1]);
        last.are(lab, clients[1], "protected");
        bare2.are(lab, clients[1], "clear");
        // Whoever has moved in speaks no clear word on a new connection.
        lab.reset_leaks();
        thread::sleep(Duration::from_millis(200));
        assert!(lab.leaks().leaked > 0, "positive control: older connections go on in clear");
        stop.store(true, Ordering::Relaxed);
        older.into_iter().chain([bare2]).chain([newer, last]).for_each(Running::finish);
        lab.reset_leaks();
        let again: Vec<_> = clients
            .iter()
            .flat_map(|pod| targets.iter().map(move |to| (pod, to)))
            .map(|(pod, to)| lab.pod(pod).connect(*to, Duration::from_secs(5)).and_then(|mut s| ask(&mut s)))
            .collect();
        assert!(again.iter().all(Result::is_ok), "{again:?}");
        lab.assert_no_leak();
        lab.assert_sealed();
        drop(launched);
    });
}
