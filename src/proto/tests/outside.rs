//! Addresses within the ranges that nobody of the project has: asked about, admitted, refused; and the DNS gate that waits.

use super::super::dns::QueryId;
use super::super::routing::Class;
use super::dns::{answer, query};
use super::*;

const OTHER: &str = "10.1.9.9";
const PATIENCE: Duration = Duration::from_millis(50);

/// A client that knows the ranges, and a launcher.
fn network() -> Network {
    let mut network = Network::new(&[CLIENT]);
    let own = network.nodes[0].own.clone();
    let ranges =
        ["10.1.0.0/16", "10.96.0.0/16", "fd00::/16"].iter().map(|net| net.parse().unwrap()).collect();
    network.nodes[0].engine = Engine::new(Config { ranges, ..config(9, &own, Mode::Strict) });
    network.nodes[0].engine.handle_launcher(true, network.now);
    network.tell(0, everything());
    network.orders();
    network
}

impl Network {
    fn orders(&mut self) -> Vec<RouteChange> {
        self.run();
        std::mem::take(&mut self.nodes[0].applied).into_iter().flat_map(|batch| batch.changes).collect()
    }

    fn asked(&mut self, addresses: &[&str]) {
        let addresses: Vec<_> = addresses.iter().map(|address| ip(address)).collect();
        self.nodes[0].engine.handle_asked(&addresses, self.now);
    }

    /// Everything that the launcher is asked now.
    fn asks(&mut self) -> Vec<IpAddr> {
        std::iter::from_fn(|| self.nodes[0].engine.poll_ask()).flatten().collect()
    }

    fn classify(&mut self, address: &str, class: Class) {
        self.nodes[0].engine.handle_classified(vec![(ip(address), class)], self.now);
    }

    fn launcher(&mut self, connected: bool) {
        self.nodes[0].engine.handle_launcher(connected, self.now);
    }

    /// The resolver answers a question about `name` with `address`; whose query it was.
    fn resolve(&mut self, name: &str, address: &str) -> QueryId {
        self.capture(0, &udp((CLIENT[0], 5353), (RESOLVER, 53), &query(name)));
        let forward = self.nodes[0].engine.poll_forward().unwrap();
        let IpAddr::V4(v4) = ip(address) else { panic!("{address}") };
        let (reply, now) = (answer(&forward.bytes, v4.octets()), self.now);
        self.nodes[0].engine.handle_dns_answer(forward.query, reply, now);
        self.run();
        forward.query
    }

    fn is_released(&mut self) -> bool {
        self.run();
        !self.inbox(0).is_empty()
    }
}

#[test]
fn an_unknown_address_is_asked_about_and_admitted_only_where_the_launcher_vouches_for_it() {
    for class in [Class::Outside, Class::Unknown, Class::Own] {
        let mut network = network();
        network.asked(&[OTHER]);
        assert_eq!(network.asks(), [ip(OTHER)]);
        assert!(network.orders().is_empty());
        network.classify(OTHER, class);
        let admitted = [RouteChange::Admit(ip(OTHER))];
        assert_eq!(network.orders(), if class == Class::Outside { &admitted[..] } else { &[] });
    }
}

#[test]
fn nothing_is_asked_about_known_addresses_or_outside_the_ranges_or_without_ranges() {
    let mut network = network();
    network.asked(&[SERVER[0], VIP[1], CLIENT[0], "192.0.2.1", "fc00::1"]);
    assert!(network.asks().is_empty());
    let ranges: Ranges = std::iter::once("10.1.0.0/16".parse().unwrap()).collect();
    for (ranges, mode) in [(Ranges::default(), Mode::Strict), (ranges, Mode::Permissive)] {
        network.nodes[0].engine = Engine::new(Config { ranges, ..config(9, &[ip(CLIENT[0])], mode) });
        network.launcher(true);
        network.asked(&[OTHER]);
        network.resolve("www.bank.test", OTHER);
        assert!(network.is_released() && network.asks().is_empty());
        network.classify(OTHER, Class::Outside);
        assert!(network.orders().is_empty());
    }
}

#[test]
fn an_address_is_asked_about_once_a_second_and_an_ask_without_an_answer_is_forgotten() {
    let mut network = network();
    for _ in 0..3 {
        network.asked(&[OTHER]);
        assert_eq!(network.asks(), [ip(OTHER)]);
        network.advance(Duration::from_millis(500));
        network.asked(&[OTHER]);
        assert!(network.asks().is_empty());
        network.advance(Duration::from_millis(500));
    }
    assert!(network.nodes[0].engine.poll_timeout().is_none(), "nothing is left of it");
    // An answer does not shorten that.
    network.asked(&[OTHER]);
    network.classify(OTHER, Class::Unknown);
    network.asks();
    network.asked(&[OTHER]);
    assert!(network.asks().is_empty());
}

#[test]
fn promise_10_at_most_128_asks_are_in_flight() {
    let mut network = network();
    let all: Vec<IpAddr> = (0..200).map(|n| IpAddr::from([10, 1, 7, n])).collect();
    let now = network.now;
    network.nodes[0].engine.handle_asked(&all, now);
    let first = network.nodes[0].engine.poll_ask().unwrap();
    assert_eq!(first, all[..128]);
    assert!(network.nodes[0].engine.poll_ask().is_none());
    let answers = first[..10].iter().map(|address| (*address, Class::Unknown)).collect();
    network.nodes[0].engine.handle_classified(answers, now);
    network.nodes[0].engine.handle_asked(&all, now);
    assert_eq!(network.asks(), all[128..138]);
    // The guard asks on and on: what is forgotten within a second stays bounded, too.
    for n in 0..=255u8 {
        let more: Vec<IpAddr> = (0..100).map(|m| IpAddr::from([10, 96, n, m])).collect();
        network.nodes[0].engine.handle_asked(&more, now);
        let answers = network.asks().into_iter().map(|address| (address, Class::Unknown)).collect();
        network.nodes[0].engine.handle_classified(answers, now);
    }
    network.nodes[0].engine.handle_asked(&[ip(OTHER)], now);
    assert!(network.asks().is_empty());
    network.advance(Duration::from_secs(1));
    network.asked(&[OTHER]);
    assert_eq!(network.asks(), [ip(OTHER)]);
}

#[test]
fn the_launcher_may_correct_itself_unasked() {
    let mut network = network();
    network.classify(OTHER, Class::Outside);
    assert_eq!(network.orders(), [RouteChange::Admit(ip(OTHER))]);
    network.classify(OTHER, Class::Outside);
    assert!(network.orders().is_empty());
    for class in [Class::Unknown, Class::Own] {
        network.classify(OTHER, class);
        assert_eq!(network.orders(), [RouteChange::Refuse(ip(OTHER))]);
        network.classify(OTHER, Class::Outside);
        network.orders();
    }
}

#[test]
fn promise_1_a_peer_or_vip_is_never_admitted_and_an_admitted_address_that_is_named_is_refused() {
    let mut network = network();
    for address in [SERVER[0], VIP[0], CLIENT[0]] {
        network.classify(address, Class::Outside);
    }
    assert!(network.orders().is_empty());
    network.classify(OTHER, Class::Outside);
    network.orders();
    network.tell(0, vec![workload(ip(OTHER))]);
    let changes = [RouteChange::Protect, RouteChange::Refuse, RouteChange::Connect].map(|to| to(ip(OTHER)));
    assert_eq!(network.orders(), changes);
}

#[test]
fn an_admitted_address_that_the_guard_asks_about_again_is_renewed() {
    let mut network = network();
    network.classify(OTHER, Class::Outside);
    network.asked(&[OTHER]);
    assert!(network.asks().is_empty(), "it is on its way");
    network.orders();
    network.asked(&[OTHER]);
    assert_eq!(network.orders(), [RouteChange::Admit(ip(OTHER))]);
    assert_eq!(network.asks(), [ip(OTHER)]);
}

#[test]
fn a_new_launcher_is_asked_about_everything_that_is_admitted_64_at_a_time_until_it_answered() {
    let mut network = network();
    let now = network.now;
    let all: Vec<IpAddr> = (0..=255).map(|n| IpAddr::from([10, 1, 7, n])).collect();
    let outside = |addresses: &[IpAddr]| addresses.iter().map(|a| (*a, Class::Outside)).collect::<Vec<_>>();
    network.nodes[0].engine.handle_classified(outside(&all), now);
    assert_eq!(network.orders().len(), 256);
    network.launcher(false);
    network.asked(&[OTHER]);
    assert!(network.asks().is_empty(), "nobody is there");
    network.launcher(true);
    assert_eq!(network.asks()[0], ip(OTHER), "the guard's own asks go first");
    let mut asked = BTreeSet::new();
    // It does not answer the first ones.
    network.advance(Duration::from_millis(1_050));
    for _ in 0..10 {
        let asks = network.asks();
        assert!(asks.len() <= 64);
        asked.extend(&asks);
        let now = network.now;
        network.nodes[0].engine.handle_classified(outside(&asks), now);
    }
    assert_eq!(asked, all.iter().copied().collect());
    assert!(network.orders().is_empty(), "all of them stay");
    network.launcher(true);
    network.advance(Duration::from_secs(2));
    network.asks();
    network.classify("10.1.7.3", Class::Unknown);
    assert_eq!(network.orders(), [RouteChange::Refuse(ip("10.1.7.3"))]);
}

#[test]
fn what_a_former_agent_admitted_stays_is_renewed_at_once_and_asked_about() {
    let mut network = network();
    let now = network.now;
    network.launcher(false);
    network.nodes[0].engine.adopt_released(&[ip(OTHER), ip(SERVER[0]), ip("192.0.2.1")], now);
    let mut changes = network.orders();
    changes.sort_by_key(RouteChange::address);
    let refused = [ip(SERVER[0]), ip("192.0.2.1")].map(RouteChange::Refuse);
    assert_eq!(changes, [&refused[..1], &[RouteChange::Admit(ip(OTHER))], &refused[1..]].concat());
    assert!(network.asks().is_empty());
    network.advance(Duration::from_secs(300));
    assert_eq!(network.orders(), [RouteChange::Admit(ip(OTHER))], "also without a launcher");
    network.launcher(true);
    assert_eq!(network.asks(), [ip(OTHER)]);
}

#[test]
fn a_former_address_is_asked_about_and_goes_to_its_new_owner_as_soon_as_the_launcher_vouches_for_it() {
    let mut network = network();
    network.tell(0, vec![Change::RemoveWorkload(ip(SERVER[0])), Change::RemoveWorkload(ip(THIRD[0]))]);
    let (mut asked, mut last) = (BTreeMap::<IpAddr, u32>::new(), Vec::new());
    for _ in 0..24 {
        network.advance(Duration::from_secs(5));
        last = network.asks();
        last.iter().for_each(|address| *asked.entry(*address).or_default() += 1);
        last.iter().for_each(|address| network.classify(&address.to_string(), Class::Unknown));
    }
    assert!(asked.keys().copied().eq([SERVER[0], THIRD[0]].map(ip)), "{asked:?}");
    assert!(asked.values().all(|times| (4..=24).contains(times)), "{asked:?}");
    assert!(!last.is_empty());
    network.orders();
    network.classify(SERVER[0], Class::Outside);
    let given = [RouteChange::Release(ip(SERVER[0])), RouteChange::Admit(ip(SERVER[0]))];
    assert_eq!(network.orders(), given);
    // It comes back as a peer.
    network.tell(0, vec![workload(ip(SERVER[0]))]);
    assert_eq!(
        network.orders()[..2],
        [RouteChange::Protect(ip(SERVER[0])), RouteChange::Refuse(ip(SERVER[0]))]
    );
}

#[test]
fn promise_1_what_a_former_agent_protected_is_given_to_nobody_before_the_directory_is_known() {
    let mut network = network();
    let (own, now) = (network.nodes[0].own.clone(), network.now);
    let ranges = std::iter::once("10.1.0.0/16".parse().unwrap()).collect();
    network.nodes[0].engine = Engine::new(Config { ranges, ..config(8, &own, Mode::Strict) });
    network.nodes[0].engine.adopt(&[ip(SERVER[0]), ip(OTHER)], now);
    network.launcher(true);
    for address in [SERVER[0], OTHER] {
        network.classify(address, Class::Outside);
    }
    assert!(network.orders().is_empty());
    network.tell(0, everything());
    network.orders();
    for address in [SERVER[0], OTHER] {
        network.classify(address, Class::Outside);
    }
    assert_eq!(network.orders(), [RouteChange::Release(ip(OTHER)), RouteChange::Admit(ip(OTHER))]);
}

#[test]
fn an_answer_that_names_an_unknown_address_is_released_once_the_guard_lets_it_pass() {
    let mut network = network();
    network.nodes[0].applies = false;
    network.resolve("www.bank.test", OTHER);
    assert!(!network.is_released());
    assert_eq!(network.asks(), [ip(OTHER)]);
    network.classify(OTHER, Class::Outside);
    assert!(!network.is_released(), "the guard does not know it yet");
    network.nodes[0].applies = true;
    assert!(network.is_released());
    // From now on at once.
    network.resolve("www.bank.test", OTHER);
    assert!(network.is_released() && network.asks().is_empty());
}

#[test]
fn an_answer_that_names_an_unknown_address_is_released_as_soon_as_the_launcher_does_not_know_it_either() {
    for class in [Class::Unknown, Class::Own] {
        let mut network = network();
        network.resolve("www.bank.test", OTHER);
        assert!(!network.is_released());
        network.classify(OTHER, class);
        assert!(network.is_released() && network.orders().is_empty());
        network.resolve("www.bank.test", OTHER);
        assert!(network.is_released(), "it is not asked about again within the second");
    }
}

#[test]
fn promise_8_an_answer_waits_at_most_50_ms_where_nobody_says_who_an_address_belongs_to() {
    let mut network = network();
    network.resolve("www.bank.test", OTHER);
    network.now.instant += PATIENCE - Duration::from_millis(1);
    assert!(!network.is_released());
    network.now.instant += Duration::from_millis(1);
    assert!(network.is_released(), "poll_timeout led to it");
    assert!(network.orders().is_empty(), "the guard stays closed");
    // With a guard that is slow the same holds.
    network.now.instant += Duration::from_secs(1);
    network.resolve("www.bank.test", OTHER);
    network.nodes[0].applies = false;
    network.classify(OTHER, Class::Outside);
    assert!(!network.is_released());
    network.now.instant += PATIENCE;
    assert!(network.is_released());
}

#[test]
fn without_a_launcher_an_answer_does_not_wait_and_one_that_waits_is_released_when_it_goes() {
    let mut network = network();
    network.resolve("www.bank.test", OTHER);
    assert!(!network.is_released());
    network.launcher(false);
    assert!(network.is_released());
    network.resolve("www.bank.test", "10.1.9.8");
    assert!(network.is_released());
}

#[test]
fn promise_3_an_address_that_becomes_protected_while_it_is_asked_about_is_waited_for_as_usual() {
    let mut network = network();
    network.nodes[0].applies = false;
    network.resolve("www.bank.test", OTHER);
    network.tell(0, vec![workload(ip(OTHER))]);
    network.classify(OTHER, Class::Own);
    assert!(!network.is_released());
    network.advance(4 * PATIENCE);
    assert!(!network.is_released(), "50 ms are for asks alone");
    network.nodes[0].applies = true;
    assert!(network.is_released());
}

#[test]
fn addresses_that_are_known_or_lie_elsewhere_delay_no_answer() {
    let mut network = network();
    for address in [SERVER[0], VIP[0], CLIENT[0], "192.0.2.1", "127.0.0.1"] {
        network.resolve("www.bank.test", address);
        assert!(network.is_released(), "{address}");
    }
    assert!(network.asks().is_empty());
}

#[test]
fn an_answer_over_tcp_waits_for_its_ask_and_keeps_its_place() {
    let mut network = network();
    let (stream, now) = (StreamId(7), network.now);
    let engine = &mut network.nodes[0].engine;
    assert!(engine.handle_stream_answer(stream, answer(&query("www.bank.test"), [10, 1, 9, 9]), now));
    assert!(engine.handle_stream_answer(stream, answer(&query("example.test"), [192, 0, 2, 1]), now));
    assert!(engine.poll_stream().is_none());
    assert_eq!(engine.poll_ask(), Some(vec![ip(OTHER)]));
    engine.handle_classified(vec![(ip(OTHER), Class::Unknown)], now);
    assert_eq!(std::iter::from_fn(|| engine.poll_stream()).count(), 2);
}

#[test]
fn without_a_zone_unknown_addresses_are_asked_about_all_the_same() {
    let mut network = network();
    let own = network.nodes[0].own.clone();
    let ranges = std::iter::once("10.1.0.0/16".parse().unwrap()).collect();
    let config = Config { ranges, zone: None, ..config(8, &own, Mode::Strict) };
    network.nodes[0].engine = Engine::new(config);
    network.launcher(true);
    network.resolve("web.shop.svc.cluster.local", OTHER);
    assert!(!network.is_released());
    network.classify(OTHER, Class::Unknown);
    assert!(network.is_released());
}

#[test]
fn promise_1_where_the_ranges_are_known_a_name_of_the_project_never_leads_out_of_them() {
    let mut network = network();
    let (web, legacy) = ("web.shop.svc.cluster.local", "legacy.shop.svc.cluster.local");
    // A load balancer's address is the project's where the directory says so.
    let changes = vec![Change::SetExternal("legacy".into()), vip("203.0.113.80", &[SERVER[0]])];
    network.tell(0, changes);
    for (name, address, expected) in [
        (web, "203.0.113.1", false),
        (web, "203.0.113.80", true),
        (web, "10.96.0.99", true),
        (legacy, "203.0.113.1", true),
        ("www.bank.test", "203.0.113.1", true),
    ] {
        network.resolve(name, address);
        assert_eq!(network.is_released(), expected, "{name} at {address}");
        let learned = expected && address.starts_with("10.") || address.ends_with(".80");
        assert_eq!(network.nodes[0].engine.is_protected(ip(address)), learned, "{name} at {address}");
    }
    assert_eq!(network.dropped(0, DropReason::DnsContradicted), 1);
}

#[test]
fn an_answer_that_names_a_former_address_asks_who_has_it_now() {
    let mut network = network();
    network.tell(0, vec![Change::RemoveWorkload(ip(SERVER[0]))]);
    network.orders();
    network.resolve("www.bank.test", SERVER[0]);
    assert!(!network.is_released());
    assert_eq!(network.asks(), [ip(SERVER[0])]);
    network.classify(SERVER[0], Class::Outside);
    assert!(network.is_released());
    assert_eq!(network.orders(), [RouteChange::Release(ip(SERVER[0])), RouteChange::Admit(ip(SERVER[0]))]);
}
