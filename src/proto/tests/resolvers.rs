//! Resolvers that are not plain addresses of the cluster: a Service or Pod of the project, and a cache on the node.

use super::dns::{answer, query};
use super::*;
use crate::proto::Captured;
use crate::proto::inbound::Verdict;
use crate::proto::nat::Tuple;
use crate::wire::packet::Packet;

/// The resolver is a Service of the project, which the server pod serves.
fn dns_service() -> Change {
    let port = |protocol| ServicePort {
        protocol,
        port: 53,
        endpoints: vec![ServiceEndpoint { address: ip(SERVER[0]), port: 5353, ready: true }],
    };
    let ports = vec![port(Protocol::Tcp), port(Protocol::Udp)];
    Change::SetVip(Vip { address: ip(RESOLVER), ports, client_ip_affinity: false })
}

fn project() -> Network {
    let mut network = Network::project();
    for node in 0..3 {
        network.tell(node, vec![dns_service()]);
    }
    network
}

fn upstream(protocol: u8, port: u16) -> Tuple {
    Tuple { protocol, local: (ip(CLIENT[0]), port), remote: (ip(RESOLVER), 53) }
}

/// What the client's agent makes of a packet of its pod.
fn outcome(network: &mut Network, packet: &[u8]) -> Captured {
    let engine = &mut network.nodes[0].engine;
    let len = VNET_HEADER_LEN + packet.len();
    let buffer = engine.capture_buffer().unwrap();
    buffer[..VNET_HEADER_LEN].copy_from_slice(&VnetHeader::PLAIN.encode());
    buffer[VNET_HEADER_LEN..len].copy_from_slice(packet);
    engine.handle_captured(len);
    let outcome = engine.poll_captured(network.now).unwrap();
    network.run();
    outcome
}

/// What the client's agent makes of a packet that the server sealed.
fn admitted(network: &mut Network, packet: &[u8]) -> Result<Verdict, DropReason> {
    let mut bytes = packet.to_vec();
    let parsed = Packet::parse(&bytes).unwrap();
    network.nodes[0].engine.admit(ip(SERVER[0]), &mut bytes, &parsed, network.now)
}

#[test]
fn promise_3_an_answer_of_a_resolver_of_the_project_travels_sealed_and_is_held_until_its_route_exists() {
    let mut network = project();
    let asked = query("new.shop.svc.cluster.local");
    network.capture(0, &udp((CLIENT[0], 5000), (RESOLVER, 53), &asked));
    let forward = network.nodes[0].engine.poll_forward().unwrap();
    assert!(forward.sealed);
    let socket = upstream(17, 40_000);
    assert!(network.nodes[0].engine.open_upstream(socket));
    let wire = udp((CLIENT[0], 40_000), (RESOLVER, 53), &forward.bytes);
    assert_eq!(outcome(&mut network, &wire), Captured::Done);
    assert!(network.nodes[0].engine.poll_forward().is_none(), "captured a second time");
    let (from, to, got) = read(&network.inbox(1)[0]);
    assert_eq!((from, to), (at(CLIENT[0], 40_000), at(SERVER[0], 5353)));
    network.nodes[0].applies = false;
    let reply = answer(&got, [10, 96, 0, 99]);
    network.capture(1, &udp((SERVER[0], 5353), (CLIENT[0], 40_000), &reply));
    let (from, to, got) = read(&network.inbox(0)[0]);
    assert_eq!((from, to), (at(RESOLVER, 53), at(CLIENT[0], 40_000)));
    let now = network.now;
    network.nodes[0].engine.handle_dns_answer(forward.query, got, now);
    network.nodes[0].engine.close_upstream(&socket);
    network.run();
    assert!(network.inbox(0).is_empty(), "released before its route");
    network.nodes[0].applies = true;
    network.run();
    let (from, to, got) = read(&network.inbox(0)[0]);
    assert_eq!((from, to), (at(RESOLVER, 53), at(CLIENT[0], 5000)));
    assert_eq!(got[2..], reply[2..]);
    assert!(!network.says(&asked[12..]), "the query left in clear");
    let node = &network.nodes[0].engine;
    assert!(node.counters().is_balanced(node.waiting()));
}

#[test]
fn promise_3_a_resolver_of_the_project_reaches_no_application_past_the_dns_gate() {
    let mut network = project();
    let socket = upstream(17, 40_000);
    assert!(network.nodes[0].engine.open_upstream(socket));
    network.capture(0, &udp((CLIENT[0], 40_000), (RESOLVER, 53), &query("a.b")));
    let reply = |port| udp((RESOLVER, 53), (CLIENT[0], port), b"answer");
    assert_eq!(admitted(&mut network, &reply(40_000)), Ok(Verdict::Inject));
    // Unasked, to an application's port; and to the socket's, once it is an application's.
    assert_eq!(admitted(&mut network, &reply(5000)), Err(DropReason::DnsMalformed));
    network.nodes[0].engine.close_upstream(&socket);
    assert_eq!(admitted(&mut network, &reply(40_000)), Err(DropReason::DnsMalformed));
    network.capture(0, &udp((CLIENT[0], 40_000), (RESOLVER, 53), &query("a.b")));
    assert!(network.nodes[0].engine.poll_forward().is_some_and(|forward| forward.sealed));
    // A resolver that is a Pod could speak for itself.
    network.tell(0, vec![Change::RemoveVip(ip(RESOLVER)), workload(ip(RESOLVER))]);
    let mut bytes = reply(5000);
    let parsed = Packet::parse(&bytes).unwrap();
    let verdict = network.nodes[0].engine.admit(ip(RESOLVER), &mut bytes, &parsed, network.now);
    assert_eq!(verdict, Err(DropReason::DnsMalformed));
}

#[test]
fn dns_over_tcp_to_a_resolver_of_the_project_ends_at_the_agent_and_goes_on_sealed() {
    let mut network = project();
    let resolver = (RESOLVER, 53);
    assert!(network.nodes[0].engine.is_sealed(ip(RESOLVER)));
    assert_eq!(outcome(&mut network, &syn((CLIENT[0], 5000), resolver)), Captured::DnsStream);
    let socket = upstream(6, 40_000);
    assert!(network.nodes[0].engine.open_upstream(socket));
    assert_eq!(outcome(&mut network, &syn((CLIENT[0], 40_000), resolver)), Captured::Done);
    network.capture(1, &syn_ack((SERVER[0], 5353), (CLIENT[0], 40_000)));
    assert_eq!(read(&network.inbox(0)[0]).0, at(RESOLVER, 53));
    assert_eq!(outcome(&mut network, &data((CLIENT[0], 40_000), resolver, b"query")), Captured::Done);
    assert_eq!(network.inbox(1).len(), 2);
    // Its last words find their way when the socket is closed; another connection of that port does not.
    network.nodes[0].engine.close_upstream(&socket);
    assert_eq!(outcome(&mut network, &data((CLIENT[0], 40_000), resolver, b"end")), Captured::Done);
    network.capture(1, &data((SERVER[0], 5353), (CLIENT[0], 40_000), b"end"));
    assert_eq!((network.inbox(1).len(), network.inbox(0).len()), (1, 1));
    assert_eq!(outcome(&mut network, &syn((CLIENT[0], 40_000), resolver)), Captured::DnsStream);
    assert_eq!(outcome(&mut network, &data((CLIENT[0], 40_000), resolver, b"query")), Captured::DnsStream);
    let late = data((RESOLVER, 53), (CLIENT[0], 40_000), b"late");
    assert_eq!(admitted(&mut network, &late), Err(DropReason::DnsMalformed));
    assert!(network.inbox(1).is_empty());
}

#[test]
fn a_resolver_outside_the_project_or_passed_below_strict_is_asked_in_clear() {
    for (mode, change) in [(Mode::Strict, None), (Mode::Permissive, Some(dns_service()))] {
        let mut network = Network::with_mode(&[CLIENT, SERVER], mode);
        network.tell(0, everything().into_iter().chain(change).collect());
        network.capture(0, &udp((CLIENT[0], 5000), (RESOLVER, 53), &query("a.b")));
        let forward = network.nodes[0].engine.poll_forward().unwrap();
        assert!(!forward.sealed && !network.nodes[0].engine.is_sealed(ip(RESOLVER)));
    }
}

#[test]
fn sockets_towards_resolvers_of_the_project_are_bounded() {
    let mut network = project();
    let engine = &mut network.nodes[0].engine;
    let opened = (1..=2000).filter(|port| engine.open_upstream(upstream(17, *port))).count();
    assert_eq!(opened, 1024);
    engine.close_upstream(&upstream(17, 1));
    assert!(engine.open_upstream(upstream(17, 2000)));
}

#[test]
fn a_resolver_with_a_link_local_address_is_captured_and_answers_and_nothing_else_of_its_scope_passes() {
    let mut network = Network::project();
    network.capture(0, &udp((CLIENT[0], 5000), (NODE_CACHE, 53), &query("new.shop.svc.cluster.local")));
    let forward = network.nodes[0].engine.poll_forward().unwrap();
    assert_eq!((forward.upstream, forward.sealed), (at(NODE_CACHE, 53), false));
    let reply = answer(&forward.bytes, [10, 96, 0, 99]);
    let now = network.now;
    network.nodes[0].engine.handle_dns_answer(forward.query, reply, now);
    network.run();
    let (from, to, _) = read(&network.inbox(0)[0]);
    assert_eq!((from, to), (at(NODE_CACHE, 53), at(CLIENT[0], 5000)));
    assert_eq!(outcome(&mut network, &syn((CLIENT[0], 5000), (NODE_CACHE, 53))), Captured::DnsStream);
    let mut helper = |packet: &[u8]| {
        let engine = &mut network.nodes[0].engine;
        let len = VNET_HEADER_LEN + packet.len();
        let buffer = engine.capture_buffer().unwrap();
        buffer[..VNET_HEADER_LEN].copy_from_slice(&VnetHeader::PLAIN.encode());
        buffer[VNET_HEADER_LEN..len].copy_from_slice(packet);
        engine.handle_helper(len).is_some()
    };
    assert!(helper(&syn_ack((NODE_CACHE, 53), (CLIENT[0], 5000))));
    assert!(!helper(&syn_ack(("169.254.20.11", 53), (CLIENT[0], 5000))));
    assert!(!helper(&syn_ack((NODE_CACHE, 53), ("169.254.20.11", 5000))));
    assert_eq!(network.dropped(0, DropReason::LinkScope), 0);
    for target in [(NODE_CACHE, 80), ("169.254.20.11", 53), ("169.254.169.254", 80)] {
        network.capture(0, &udp((CLIENT[0], 5000), target, b"x"));
    }
    assert_eq!(network.dropped(0, DropReason::LinkScope), 3);
}

#[test]
fn a_pod_that_is_its_own_resolver_through_a_service_gets_its_answers() {
    let mut network = project();
    let Change::SetVip(mut vip) = dns_service() else { panic!("a VIP") };
    vip.ports.iter_mut().for_each(|port| port.endpoints[0].address = ip(CLIENT[0]));
    network.tell(0, vec![Change::SetVip(vip)]);
    network.capture(0, &udp((CLIENT[0], 5000), (RESOLVER, 53), &query("a.b")));
    let forward = network.nodes[0].engine.poll_forward().unwrap();
    assert!(forward.sealed && network.nodes[0].engine.open_upstream(upstream(17, 40_000)));
    network.capture(0, &udp((CLIENT[0], 40_000), (RESOLVER, 53), &forward.bytes));
    let (from, to, got) = read(&network.inbox(0)[0]);
    assert_eq!((from.ip(), to), (ip(RESOLVER), at(CLIENT[0], 5353)));
    network.capture(0, &udp((CLIENT[0], 5353), (RESOLVER, from.port()), &answer(&got, [192, 0, 2, 1])));
    let (from, to, got) = read(&network.inbox(0)[0]);
    assert_eq!((from, to), (at(RESOLVER, 53), at(CLIENT[0], 40_000)));
    let now = network.now;
    network.nodes[0].engine.handle_dns_answer(forward.query, got, now);
    network.run();
    assert_eq!(read(&network.inbox(0)[0]).1, at(CLIENT[0], 5000));
}
