//! The DNS gate: answers wait for their routes, and packets for what only DNS knows.

use super::*;

pub(super) fn query(name: &str) -> Vec<u8> {
    let mut out = vec![0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        out.push(u8::try_from(label.len()).unwrap());
        out.extend(label.bytes());
    }
    out.extend([0, 0, 1, 0, 1]);
    out
}

pub(super) fn answer(forwarded: &[u8], address: [u8; 4]) -> Vec<u8> {
    let mut out = forwarded.to_vec();
    out[2] |= 0x80;
    out[7] = 1;
    out.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 5, 0, 4]);
    out.extend(address);
    out
}

#[test]
fn dns_answer_is_held_until_its_route_exists_and_is_released_byte_for_byte() {
    let mut network = Network::project();
    network.nodes[0].applies = false;
    let asked = query("new.shop.svc.cluster.local");
    network.capture(0, &udp((CLIENT[0], 5353), (RESOLVER, 53), &asked));
    let forward = network.nodes[0].engine.poll_forward().unwrap();
    assert_eq!(forward.upstream, at(RESOLVER, 53));
    assert_eq!(forward.bytes[2..], asked[2..]);
    let reply = answer(&forward.bytes, [10, 96, 0, 99]);
    let mut forged = reply.clone();
    forged[0] ^= 1;
    let now = network.now;
    network.nodes[0].engine.handle_dns_answer(forward.query, forged, now);
    network.nodes[0].engine.handle_dns_answer(forward.query, reply.clone(), now);
    network.run();
    assert!(network.inbox(0).is_empty(), "released before its route");
    assert_eq!(network.nodes[0].batches.len(), 1);
    network.nodes[0].applies = true;
    network.run();
    let got = network.inbox(0);
    let (source, destination, mut bytes) = read(&got[0]);
    assert_eq!((source, destination), (at(RESOLVER, 53), at(CLIENT[0], 5353)));
    bytes[..2].copy_from_slice(&reply[..2]);
    assert_eq!(bytes, reply);
    assert_eq!(read(&got[0]).2[..2], [0xab, 0xcd]);
    assert_eq!(network.dropped(0, DropReason::DnsMalformed), 1);
}

#[test]
fn a_dns_connection_whose_answer_never_gets_its_route_is_closed() {
    let mut network = Network::project();
    network.nodes[0].applies = false;
    let [waits, other] = [StreamId(7), StreamId(8)];
    let now = network.now;
    let engine = &mut network.nodes[0].engine;
    assert!(engine.handle_stream_answer(
        waits,
        answer(&query("new.shop.svc.cluster.local"), [10, 96, 0, 99]),
        now
    ));
    assert!(engine.handle_stream_answer(other, answer(&query("example.com"), [192, 0, 2, 1]), now));
    assert_eq!(engine.poll_stream().map(|(stream, _)| stream), Some(other));
    network.advance(Duration::from_millis(4900));
    assert_eq!(network.nodes[0].engine.poll_broken_stream(), None);
    network.advance(Duration::from_millis(200));
    let engine = &mut network.nodes[0].engine;
    assert_eq!(engine.poll_broken_stream(), Some(waits));
    assert_eq!(engine.poll_broken_stream(), None);
    assert!(engine.poll_stream().is_none());
    assert_eq!(network.dropped(0, DropReason::DnsTimeout), 1);
}

#[test]
fn a_packet_to_an_address_that_only_dns_knows_waits_for_the_directory() {
    let mut network = Network::project();
    network.capture(0, &udp((CLIENT[0], 4000), ("10.96.0.99", 80), b"waiting"));
    network.advance(Duration::from_millis(500));
    for node in 0..2 {
        network.tell(node, vec![vip("10.96.0.99", &[SERVER[0]])]);
    }
    assert_eq!(read(&network.inbox(1)[0]).1, at(SERVER[0], 8080));
    network.capture(0, &udp((CLIENT[0], 4000), ("10.96.0.98", 80), b"in vain"));
    network.advance(Duration::from_millis(1100));
    let errors = network.inbox(0);
    assert_eq!(errors[0][20..22], [3, 13], "ICMP admin-prohibited");
    assert_eq!(network.dropped(0, DropReason::UnknownDestination), 1);
}

#[test]
fn what_dns_alone_knew_stays_closed_for_its_whole_life_after_an_upgrade() {
    let known = ["10.96.0.98", "10.96.0.99"].map(ip);
    let mut network = Network::project();
    for (ttl, last) in [(5u32, 98), (500, 99)] {
        network.capture(0, &udp((CLIENT[0], 5353), (RESOLVER, 53), &query("new.shop.svc.cluster.local")));
        let forward = network.nodes[0].engine.poll_forward().unwrap();
        let mut reply = answer(&forward.bytes, [10, 96, 0, last]);
        let at = reply.len() - 10;
        reply[at..at + 4].copy_from_slice(&ttl.to_be_bytes());
        let now = network.now;
        network.nodes[0].engine.handle_dns_answer(forward.query, reply, now);
        network.run();
    }
    network.advance(Duration::from_secs(10));
    network.upgrade(0, 1);
    let closed = |network: &Network| known.map(|address| network.nodes[0].engine.is_protected(address));
    network.advance(Duration::from_secs(599));
    assert_eq!(closed(&network), [true, true]);
    network.advance(Duration::from_secs(2));
    assert_eq!(closed(&network), [false, false]);
}

#[test]
fn promise_1_an_address_that_dns_alone_knew_stays_closed_for_10_minutes_after_its_life() {
    let mut network = Network::project();
    network.capture(0, &udp((CLIENT[0], 5353), (RESOLVER, 53), &query("new.shop.svc.cluster.local")));
    let forward = network.nodes[0].engine.poll_forward().unwrap();
    let (reply, now) = (answer(&forward.bytes, [10, 96, 0, 99]), network.now);
    network.nodes[0].engine.handle_dns_answer(forward.query, reply, now);
    network.run();
    let changes = |network: &mut Network| {
        std::mem::take(&mut network.nodes[0].applied).into_iter().flat_map(|batch| batch.changes).collect()
    };
    let mut all: Vec<_> = changes(&mut network);
    assert_eq!(all.pop(), Some(RouteChange::Protect(ip("10.96.0.99"))));
    network.advance(Duration::from_secs(61));
    assert_eq!(changes(&mut network), [RouteChange::Prohibit(ip("10.96.0.99"))]);
    // What is under way to it is answered.
    network.capture(0, &udp((CLIENT[0], 4000), ("10.96.0.99", 80), b"in vain"));
    network.advance(Duration::from_millis(1100));
    assert_eq!(network.inbox(0).pop().unwrap()[20..22], [3, 13], "ICMP admin-prohibited");
    network.advance(Duration::from_secs(597));
    assert!(changes(&mut network).is_empty() && network.nodes[0].engine.retired() == 0);
    network.advance(Duration::from_secs(2));
    assert_eq!(changes(&mut network), [RouteChange::Retire(ip("10.96.0.99"))]);
    assert_eq!(network.nodes[0].engine.retired(), 1);
}

#[test]
fn promise_10_an_answer_that_teaches_more_than_64_addresses_is_refused_and_teaches_none() {
    let many = |forwarded: &[u8], count: u8| {
        let mut out = forwarded.to_vec();
        (out[2], out[7]) = (out[2] | 0x80, count);
        for n in 0..count {
            out.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 5, 0, 4, 10, 2, 0, n]);
        }
        out
    };
    let mut network = Network::project();
    let ask = |network: &mut Network, count: u8| {
        network.capture(0, &udp((CLIENT[0], 5353), (RESOLVER, 53), &query("all.shop.svc.cluster.local")));
        let forward = network.nodes[0].engine.poll_forward().unwrap();
        let (reply, now) = (many(&forward.bytes, count), network.now);
        network.nodes[0].engine.handle_dns_answer(forward.query, reply, now);
        network.run();
        let known = (0..count).filter(|n| network.nodes[0].engine.is_protected(IpAddr::from([10, 2, 0, *n])));
        known.count()
    };
    assert_eq!(ask(&mut network, 65), 0);
    assert_eq!(network.dropped(0, DropReason::DnsOverload), 1);
    assert!(network.inbox(0).is_empty());
    assert_eq!(ask(&mut network, 64), 64);
    assert_eq!(network.inbox(0).len(), 1);
    // Those of the directory do not count: a large headless Service.
    network.tell(0, (0..=200).map(|n| workload(IpAddr::from([10, 2, 0, n]))).collect());
    assert_eq!(ask(&mut network, 200), 200);
    assert_eq!((network.inbox(0).len(), network.dropped(0, DropReason::DnsOverload)), (1, 1));
}

/// An answer that makes the question's name stand for `target`, and gives that the address.
fn alias(forwarded: &[u8], target: &str, address: [u8; 4]) -> Vec<u8> {
    let name = query(target);
    let name = &name[12..name.len() - 4];
    let mut out = forwarded.to_vec();
    out[2] |= 0x80;
    out[7] = 2;
    out.extend([0xc0, 12, 0, 5, 0, 1, 0, 0, 0, 5, 0, u8::try_from(name.len()).unwrap()]);
    out.extend(name);
    out.extend(name);
    out.extend([0, 1, 0, 1, 0, 0, 0, 5, 0, 4]);
    out.extend(address);
    out
}

#[test]
fn a_name_of_the_project_leads_out_of_it_only_where_the_directory_does() {
    const NODE: [u8; 4] = [192, 168, 0, 1];
    const OUTSIDE: [u8; 4] = [203, 0, 113, 1];
    let mut network = Network::project();
    let now = network.now;
    let changes = vec![Change::SetExempt(IpAddr::from(NODE)), Change::SetExternal("legacy".into())];
    network.nodes[0].engine.handle_directory(changes, now);
    network.run();
    let told = |network: &mut Network, name: &str, reply: &dyn Fn(&[u8]) -> Vec<u8>| {
        network.capture(0, &udp((CLIENT[0], 5353), (RESOLVER, 53), &query(name)));
        let forward = network.nodes[0].engine.poll_forward().unwrap();
        let reply = reply(&forward.bytes);
        let now = network.now;
        network.nodes[0].engine.handle_dns_answer(forward.query, reply, now);
        network.run();
        !network.inbox(0).is_empty()
    };
    let resolver = [10, 96, 0, 10];
    for (name, address, expected) in [
        ("web.shop.svc.cluster.local", NODE, false),
        ("WEB.Shop.svc.cluster.local", NODE, false),
        ("a.web.shop.svc.cluster.local", resolver, false),
        ("nobody-knows.shop.svc.cluster.local", [169, 254, 1, 1], false),
        ("shop.svc.cluster.local", NODE, false),
        ("web.shop.svc.cluster.local", [10, 96, 0, 99], true),
        ("Legacy.shop.svc.cluster.local", NODE, true),
        ("a.legacy.shop.svc.cluster.local", NODE, true),
        ("web.bank.svc.cluster.local", NODE, true),
        ("example.com", NODE, true),
    ] {
        let got = told(&mut network, name, &|asked| answer(asked, address));
        assert_eq!(got, expected, "{name} at {address:?}");
    }
    for (name, target, address, expected) in [
        ("web.shop.svc.cluster.local", "example.com", OUTSIDE, false),
        ("web.shop.svc.cluster.local", "b.shop.svc.cluster.local", NODE, false),
        ("example.com", "web.shop.svc.cluster.local", NODE, false),
        ("web.shop.svc.cluster.local", "legacy.shop.svc.cluster.local", NODE, false),
        ("legacy.shop.svc.cluster.local", "example.com", OUTSIDE, true),
        ("web.shop.svc.cluster.local", "b.shop.svc.cluster.local", [10, 96, 0, 99], true),
    ] {
        let got = told(&mut network, name, &|asked| alias(asked, target, address));
        assert_eq!(got, expected, "{name} as {target} at {address:?}");
    }
    // Records that lead nowhere, which careless readers follow all the same.
    for (class, kind) in [(1, 1), (3, 1), (1, 0x0101)] {
        let stray = |asked: &[u8]| {
            let mut out = asked.to_vec();
            out[2] |= 0x80;
            out[7] = 1;
            out.extend([4, b'e', b'v', b'i', b'l', 0]);
            out.extend(u16::to_be_bytes(kind));
            out.extend([0, class, 0, 0, 0, 5, 0, 4]);
            out.extend(NODE);
            out
        };
        assert!(!told(&mut network, "web.shop.svc.cluster.local", &stray), "class {class}, type {kind}");
        assert!(told(&mut network, "example.com", &stray));
    }
    assert_eq!(network.dropped(0, DropReason::DnsContradicted), 12);
    network.nodes[0].engine.handle_whole_directory(Vec::new(), now);
    network.run();
    assert!(!told(&mut network, "legacy.shop.svc.cluster.local", &|asked| answer(asked, [127, 0, 0, 1])));
}
