//! Batches, lives of addresses, peers and admissions, without an engine.

use proptest::prelude::*;

use super::*;

fn at(start: Instant, seconds: u64) -> Now {
    Now { instant: start + Duration::from_secs(seconds), wall: Duration::from_secs(1_700_000_000 + seconds) }
}

fn address(n: u32) -> IpAddr {
    IpAddr::from(std::net::Ipv4Addr::from_bits(0x0a60_0000 + n))
}

#[test]
fn the_kernel_side_hears_of_what_a_predecessor_learned_meanwhile_and_of_nothing_twice() {
    let (mut routing, now) = (Routing::new(false), at(crate::proto::test_start(), 0));
    routing.adopt(&[address(1)], now);
    routing.import(vec![address(1), address(2)], now);
    assert_eq!(routing.poll_batch().unwrap().changes, [RouteChange::Prohibit(address(2))]);
    assert!(routing.poll_batch().is_none());
    assert!(routing.is_protected(address(1)) && routing.is_protected(address(2)));
}

#[test]
fn an_address_is_active_only_after_its_batch_is_applied() {
    let (mut routing, now) = (Routing::new(false), at(crate::proto::test_start(), 0));
    routing.add_from_directory(address(1));
    assert!(routing.is_protected(address(1)) && !routing.is_active(address(1)));
    let batch = routing.poll_batch().unwrap();
    assert_eq!(batch.changes, [RouteChange::Protect(address(1))]);
    assert!(!routing.is_active(address(1)) && !routing.is_settled());
    routing.handle_applied(batch.id, true, now);
    assert!(routing.is_active(address(1)) && routing.is_settled());
}

#[test]
fn a_failed_batch_is_asked_for_again_and_stays_inactive_until_then() {
    let start = crate::proto::test_start();
    let mut routing = Routing::new(false);
    routing.add_from_directory(address(1));
    let first = routing.poll_batch().unwrap();
    routing.handle_applied(first.id, false, at(start, 0));
    routing.add_from_directory(address(2));
    let second = routing.poll_batch().unwrap();
    routing.handle_applied(second.id, true, at(start, 0));
    assert!(!routing.is_active(address(1)) && routing.is_active(address(2)));
    routing.handle_timeout(at(start, 1));
    let third = routing.poll_batch().unwrap();
    assert_eq!(third.changes, [RouteChange::Protect(address(1))]);
    routing.handle_applied(third.id, true, at(start, 1));
    assert!(routing.is_active(address(1)));
}

#[test]
fn large_updates_go_out_in_batches_and_each_address_waits_for_its_own() {
    let mut routing = Routing::new(false);
    for n in 0..1200 {
        routing.add_from_directory(address(n));
    }
    let first = routing.poll_batch().unwrap();
    routing.handle_applied(first.id, true, at(crate::proto::test_start(), 0));
    assert!(routing.is_active(address(0)) && !routing.is_active(address(1199)));
    let mut rest = 0;
    while let Some(batch) = routing.poll_batch() {
        rest += batch.changes.len();
        routing.handle_applied(batch.id, true, at(crate::proto::test_start(), 0));
    }
    assert_eq!(first.changes.len() + rest, 1200);
    assert!((0..1200).all(|n| routing.is_active(address(n))));
}

/// A table with this one address, named and in place.
fn named(address: IpAddr) -> Routing {
    let mut routing = Routing::new(false);
    routing.add_from_directory(address);
    apply(&mut routing, at(crate::proto::test_start(), 0));
    routing
}

/// Applies every batch; returns the changes.
fn apply(routing: &mut Routing, now: Now) -> Vec<RouteChange> {
    let mut all = Vec::new();
    while let Some(batch) = routing.poll_batch() {
        routing.handle_applied(batch.id, true, now);
        all.extend(batch.changes);
    }
    all
}

#[test]
fn promise_1_a_removed_address_is_prohibited_for_10_minutes_then_retired() {
    let start = crate::proto::test_start();
    let mut routing = named(address(1));
    routing.remove_from_directory(address(1), false, at(start, 0));
    assert_eq!(apply(&mut routing, at(start, 0)), [RouteChange::Prohibit(address(1))]);
    routing.handle_timeout(at(start, 599));
    assert!(routing.is_protected(address(1)) && routing.poll_batch().is_none());
    assert!(routing.is_former(address(1)) && !routing.is_active(address(1)));
    routing.handle_timeout(at(start, 600));
    let batch = routing.poll_batch().unwrap();
    assert_eq!(batch.changes, [RouteChange::Retire(address(1))]);
    assert!(routing.is_protected(address(1)), "until the kernel has it");
    routing.handle_applied(batch.id, true, at(start, 600));
    assert!(!routing.is_protected(address(1)) && !routing.is_former(address(1)));
    assert_eq!((routing.retired(), routing.poll_forgotten()), (1, Some(address(1))));
    assert_eq!(routing.poll_timeout(), None);
}

#[test]
fn promise_1_a_former_address_that_a_socket_names_stays_prohibited_a_minute_at_a_time() {
    let start = crate::proto::test_start();
    let mut routing = named(address(1));
    routing.remove_from_directory(address(1), false, at(start, 0));
    apply(&mut routing, at(start, 0));
    for seconds in [600, 660, 720] {
        routing.handle_timeout(at(start, seconds - 1));
        assert!(routing.poll_batch().is_none());
        routing.handle_timeout(at(start, seconds));
        let batch = routing.poll_batch().unwrap();
        assert_eq!(batch.changes, [RouteChange::Retire(address(1))], "after {seconds} s");
        routing.handle_named(&[address(1)], at(start, seconds));
        routing.handle_applied(batch.id, true, at(start, seconds));
        assert!(routing.is_former(address(1)));
    }
    routing.handle_timeout(at(start, 780));
    apply(&mut routing, at(start, 780));
    assert!(!routing.is_protected(address(1)) && routing.retired() == 1);
    // A report about an address that went to a new owner meanwhile changes nothing.
    routing.handle_named(&[address(1)], at(start, 780));
    assert!(!routing.is_protected(address(1)));
}

#[test]
fn a_former_address_that_comes_back_is_protected_as_before_also_while_it_is_being_retired() {
    let start = crate::proto::test_start();
    for seconds in [1, 600] {
        let mut routing = named(address(1));
        routing.remove_from_directory(address(1), false, at(start, 0));
        apply(&mut routing, at(start, 0));
        routing.handle_timeout(at(start, seconds));
        let retiring = routing.poll_batch();
        assert_eq!(retiring.is_some(), seconds == 600);
        routing.add_from_directory(address(1));
        retiring.into_iter().for_each(|batch| drop(routing.handle_applied(batch.id, true, at(start, 600))));
        assert_eq!(apply(&mut routing, at(start, 600)), [RouteChange::Protect(address(1))]);
        assert!(routing.is_active(address(1)) && !routing.is_former(address(1)));
        routing.handle_timeout(at(start, 5_000));
        assert!(routing.poll_batch().is_none());
    }
}

#[test]
fn a_retirement_that_fails_is_asked_for_again() {
    let start = crate::proto::test_start();
    let mut routing = named(address(1));
    routing.remove_from_directory(address(1), false, at(start, 0));
    apply(&mut routing, at(start, 0));
    routing.handle_timeout(at(start, 600));
    let batch = routing.poll_batch().unwrap();
    routing.handle_applied(batch.id, false, at(start, 600));
    routing.handle_timeout(at(start, 601));
    assert!(routing.is_protected(address(1)));
    assert_eq!(apply(&mut routing, at(start, 601)), [RouteChange::Retire(address(1))]);
    assert!(!routing.is_protected(address(1)));
}

#[test]
fn a_service_that_begins_to_lead_out_is_released_after_half_a_minute() {
    let start = crate::proto::test_start();
    let mut routing = named(address(1));
    routing.remove_from_directory(address(1), true, at(start, 0));
    assert_eq!(apply(&mut routing, at(start, 0)), [RouteChange::Prohibit(address(1))]);
    routing.handle_timeout(at(start, 29));
    assert!(routing.poll_batch().is_none());
    routing.handle_timeout(at(start, 30));
    assert_eq!(apply(&mut routing, at(start, 30)), [RouteChange::Release(address(1))]);
    // The same for a former address of which the directory says so later.
    routing.adopt(&[address(2)], at(start, 30));
    routing.exempt(address(2), at(start, 31));
    routing.handle_timeout(at(start, 60));
    assert!(routing.poll_batch().is_none());
    routing.handle_timeout(at(start, 61));
    assert_eq!(apply(&mut routing, at(start, 61)), [RouteChange::Release(address(2))]);
}

#[test]
fn a_peer_is_connected_after_its_address_is_protected_and_disconnected_before_it_is_prohibited() {
    let now = at(crate::proto::test_start(), 0);
    let mut routing = Routing::new(false);
    for n in 1..=2 {
        routing.add_from_directory(address(n));
        assert!(!routing.connect(address(n)));
    }
    let batch = routing.poll_batch().unwrap();
    // Runs of one kind: each is one transaction.
    let [one, two] = [1, 2].map(address);
    let protected = [RouteChange::Protect(one), RouteChange::Protect(two)];
    assert_eq!(
        batch.changes,
        [&protected[..], &[RouteChange::Connect(one), RouteChange::Connect(two)]].concat()
    );
    assert!(!routing.is_connected(one));
    assert_eq!(routing.handle_applied(batch.id, true, now), [one, two]);
    assert!(routing.is_connected(one) && routing.connect(one), "with new keys: still connected");
    assert!(routing.poll_batch().is_none());
    for n in 1..=2 {
        routing.disconnect(address(n));
        routing.remove_from_directory(address(n), false, now);
    }
    let prohibited = [RouteChange::Prohibit(one), RouteChange::Prohibit(two)];
    let disconnected = [RouteChange::Disconnect(one), RouteChange::Disconnect(two)];
    assert_eq!(apply(&mut routing, now), [disconnected, prohibited].concat());
    assert!(!routing.is_connected(one));
}

#[test]
fn changes_of_one_address_keep_their_order_within_a_batch() {
    let now = at(crate::proto::test_start(), 0);
    let mut routing = Routing::new(false);
    routing.add_from_directory(address(1));
    routing.connect(address(1));
    routing.disconnect(address(1));
    routing.remove_from_directory(address(1), false, now);
    routing.add_from_directory(address(2));
    routing.add_from_directory(address(1));
    routing.connect(address(1));
    let changes = apply(&mut routing, now);
    let of = |n| changes.iter().copied().filter(move |change| change.address() == address(n));
    let all = [
        RouteChange::Protect(address(1)),
        RouteChange::Connect(address(1)),
        RouteChange::Disconnect(address(1)),
        RouteChange::Prohibit(address(1)),
        RouteChange::Protect(address(1)),
        RouteChange::Connect(address(1)),
    ];
    assert_eq!(of(1).collect::<Vec<_>>(), all);
    assert_eq!(of(2).count(), 1);
}

#[test]
fn a_connection_that_failed_is_asked_for_again_and_the_peer_is_not_connected_until_then() {
    let start = crate::proto::test_start();
    let mut routing = named(address(1));
    routing.connect(address(1));
    let batch = routing.poll_batch().unwrap();
    assert!(routing.handle_applied(batch.id, false, at(start, 0)).is_empty());
    routing.add_from_directory(address(2));
    apply(&mut routing, at(start, 0));
    assert!(!routing.is_connected(address(1)) && routing.is_active(address(1)), "the route is in place");
    routing.handle_timeout(at(start, 1));
    let batch = routing.poll_batch().unwrap();
    assert_eq!(batch.changes, [RouteChange::Connect(address(1))]);
    assert_eq!(routing.handle_applied(batch.id, true, at(start, 1)), [address(1)]);
    assert!(routing.is_connected(address(1)));
}

#[test]
fn peers_that_a_former_agent_left_are_connected_at_once_and_those_that_nobody_names_end() {
    let now = at(crate::proto::test_start(), 0);
    let mut routing = Routing::new(false);
    assert!(!routing.adopt_peer(address(1)) && !routing.adopt_peer(address(2)));
    routing.add_from_directory(address(1));
    assert!(routing.connect(address(1)));
    routing.disconnect_adopted();
    let mut changes = apply(&mut routing, now);
    changes.sort_by_key(RouteChange::rank);
    let [one, two] = [1, 2].map(address);
    let expected = [RouteChange::Disconnect(two), RouteChange::Protect(one), RouteChange::Connect(one)];
    assert_eq!(changes, expected);
    // Or the directory was faster.
    routing.add_from_directory(two);
    assert!(!routing.connect(two) && routing.adopt_peer(two));
}

#[test]
fn promise_1_an_address_of_the_table_is_never_admitted_and_one_that_comes_in_is_refused() {
    let now = at(crate::proto::test_start(), 0);
    let [one, two] = [1, 2].map(address);
    let mut routing = named(one);
    routing.admit(one, now);
    routing.adopt_admission(one, now);
    assert_eq!(apply(&mut routing, now), [RouteChange::Refuse(one)], "what a former agent left of it");
    routing.admit(two, now);
    assert!(routing.is_admission_pending(two));
    assert_eq!(apply(&mut routing, now), [RouteChange::Admit(two)]);
    assert!(!routing.is_admission_pending(two) && routing.admissions().contains(two));
    routing.add_from_directory(two);
    assert_eq!(apply(&mut routing, now), [RouteChange::Protect(two), RouteChange::Refuse(two)]);
    routing.admit(address(3), now);
    routing.adopt(&[address(3)], now);
    let changes = apply(&mut routing, now);
    assert_eq!(
        changes,
        [RouteChange::Admit(address(3)), RouteChange::Refuse(address(3))].into_iter().collect::<Vec<_>>()
    );
}

#[test]
fn a_full_list_of_admitted_addresses_refuses_the_one_asked_for_longest_ago() {
    let start = crate::proto::test_start();
    let mut routing = Routing::new(false);
    for n in 0..4096 {
        routing.admit(address(n), at(start, u64::from(n) / 100));
    }
    routing.touch_admission(address(0), at(start, 50));
    apply(&mut routing, at(start, 50));
    routing.admit(address(5000), at(start, 51));
    assert_eq!(
        apply(&mut routing, at(start, 51)),
        [RouteChange::Refuse(address(1)), RouteChange::Admit(address(5000))]
    );
    routing.adopt_admission(address(6000), at(start, 51));
    assert_eq!(apply(&mut routing, at(start, 51)), [RouteChange::Refuse(address(6000))]);
}

#[test]
fn admitted_addresses_are_renewed_every_five_minutes_a_bounded_number_at_a_time() {
    let start = crate::proto::test_start();
    let mut routing = Routing::new(false);
    (0..2000).for_each(|n| routing.admit(address(n), at(start, 0)));
    apply(&mut routing, at(start, 0));
    for round in 1..=3 {
        let seconds = 300 * round;
        assert_eq!(routing.poll_timeout(), Some(start + Duration::from_secs(seconds)));
        let mut renewed = BTreeSet::new();
        while routing.poll_timeout().is_some_and(|due| due <= at(start, seconds).instant) {
            routing.handle_timeout(at(start, seconds));
            let changes = apply(&mut routing, at(start, seconds));
            assert!(changes.len() <= STEP && changes.iter().all(|c| matches!(c, RouteChange::Admit(_))));
            renewed.extend(changes.iter().map(RouteChange::address));
        }
        assert_eq!(renewed.len(), 2000);
    }
    // What a former agent left may be about to end.
    routing.adopt_admission(address(9000), at(start, 901));
    assert_eq!(routing.poll_timeout(), Some(at(start, 901).instant));
}

#[test]
fn an_admission_or_refusal_that_failed_is_asked_for_again_as_it_is_wanted_then() {
    let start = crate::proto::test_start();
    let mut routing = Routing::new(false);
    (1..=3).for_each(|n| routing.admit(address(n), at(start, 0)));
    let batch = routing.poll_batch().unwrap();
    routing.handle_applied(batch.id, false, at(start, 0));
    routing.refuse(address(2));
    routing.add_from_directory(address(3));
    apply(&mut routing, at(start, 0));
    assert!(routing.is_admission_pending(address(1)));
    routing.handle_timeout(at(start, 1));
    assert_eq!(
        apply(&mut routing, at(start, 1)),
        [2, 3]
            .map(|n| RouteChange::Refuse(address(n)))
            .into_iter()
            .chain([RouteChange::Admit(address(1))])
            .collect::<Vec<_>>()
    );
    assert!(!routing.is_admission_pending(address(1)));
}

#[test]
fn thousands_of_lives_that_end_together_end_a_bounded_number_at_a_time() {
    let start = crate::proto::test_start();
    let mut routing = Routing::new(false);
    let count = 10_000;
    (0..count).for_each(|n| routing.add_from_directory(address(2 * n)));
    (0..count).for_each(|n| routing.remove_from_directory(address(2 * n), false, at(start, 0)));
    apply(&mut routing, at(start, 0));
    let mut retired = 0;
    while routing.poll_timeout().is_some_and(|due| due <= at(start, 600).instant) {
        routing.handle_timeout(at(start, 600));
        let step = apply(&mut routing, at(start, 600)).len();
        assert!(step <= STEP, "{step} at once");
        // Behind the walk, with an end of its own.
        if retired == 0 {
            routing.add_from_dns(address(1), Duration::from_secs(100), at(start, 600)).unwrap();
            apply(&mut routing, at(start, 600));
        }
        retired += step;
    }
    assert_eq!((retired, routing.retired()), (10_000, 10_000));
    assert!(routing.is_protected(address(1)));
    assert_eq!(routing.poll_timeout(), Some(start + Duration::from_secs(700)));
}

#[test]
fn a_refused_update_is_asked_for_again_a_bounded_number_at_a_time() {
    let start = crate::proto::test_start();
    let mut routing = Routing::new(false);
    (0..5_000).for_each(|n| routing.add_from_directory(address(n)));
    while let Some(batch) = routing.poll_batch() {
        routing.handle_applied(batch.id, false, at(start, 0));
    }
    let mut asked = BTreeSet::new();
    while routing.poll_timeout().is_some_and(|due| due <= at(start, 1).instant) {
        routing.handle_timeout(at(start, 1));
        let batches: Vec<_> = std::iter::from_fn(|| routing.poll_batch()).collect();
        assert!(batches.iter().map(|b| b.changes.len()).sum::<usize>() <= STEP);
        for batch in batches {
            asked.extend(batch.changes.iter().map(RouteChange::address));
            routing.handle_applied(batch.id, true, at(start, 1));
        }
    }
    assert_eq!(asked.len(), 5_000);
    assert!(routing.is_settled() && (0..5_000).all(|n| routing.is_active(address(n))));
}

#[test]
fn what_a_former_agent_protected_stays_closed_until_it_is_named_or_its_time_is_over() {
    let start = crate::proto::test_start();
    let mut routing = Routing::new(false);
    routing.adopt(&[address(1), address(2)], at(start, 0));
    assert!(routing.poll_batch().is_none() && !routing.is_active(address(1)));
    routing.add_from_directory(address(1));
    assert_eq!(routing.poll_batch().unwrap().changes, [RouteChange::Protect(address(1))]);
    routing.handle_timeout(at(start, 599));
    assert!(routing.poll_batch().is_none());
    routing.handle_timeout(at(start, 600));
    assert_eq!(routing.poll_batch().unwrap().changes, [RouteChange::Retire(address(2))]);
    assert!(routing.is_protected(address(1)));
}

#[test]
fn an_address_that_becomes_exempt_is_released_at_once() {
    let start = crate::proto::test_start();
    let mut routing = Routing::new(false);
    routing.add_from_dns(address(1), Duration::from_secs(3600), at(start, 0)).unwrap();
    routing.poll_batch().unwrap();
    routing.exempt(address(1), at(start, 1));
    routing.handle_timeout(at(start, 1));
    assert_eq!(routing.poll_batch().unwrap().changes, [RouteChange::Release(address(1))]);
}

#[test]
fn an_address_from_dns_lives_its_ttl_but_60_seconds_to_10_minutes_and_is_a_former_one_then() {
    let start = crate::proto::test_start();
    for (ttl, life) in [(0, 60), (5, 60), (100, 100), (86_400, 600)] {
        let mut routing = Routing::new(false);
        for n in 1..=2 {
            routing.add_from_dns(address(n), Duration::from_secs(ttl), at(start, 0)).unwrap();
        }
        routing.add_from_directory(address(2));
        apply(&mut routing, at(start, 0));
        routing.handle_timeout(at(start, life - 1));
        assert!(routing.poll_batch().is_none() && routing.is_active(address(1)));
        assert_eq!(routing.poll_timeout(), Some(start + Duration::from_secs(life)));
        routing.handle_timeout(at(start, life));
        assert_eq!(apply(&mut routing, at(start, life)), [RouteChange::Prohibit(address(1))]);
        assert!(!routing.is_active(address(1)) && routing.is_former(address(1)));
        routing.handle_timeout(at(start, life + 599));
        assert!(routing.is_protected(address(1)) && routing.poll_batch().is_none());
        routing.handle_timeout(at(start, life + 600));
        assert_eq!(apply(&mut routing, at(start, life + 600)), [RouteChange::Retire(address(1))]);
        assert!(!routing.is_protected(address(1)) && routing.is_active(address(2)));
        assert_eq!(routing.from_dns, 0);
    }
}

#[test]
fn below_strict_a_named_address_is_passed_until_it_is_decided_and_either_waits_for_its_batch() {
    let (mut routing, now) = (Routing::new(true), at(crate::proto::test_start(), 0));
    routing.add_from_directory(address(1));
    assert!(!routing.is_active(address(1)));
    let batch = routing.poll_batch().unwrap();
    assert_eq!(batch.changes, [RouteChange::Pass(address(1))]);
    routing.handle_applied(batch.id, true, now);
    assert!(routing.is_active(address(1)) && !routing.is_captured(address(1)));
    routing.decide(address(1), false);
    assert!(routing.poll_batch().is_none(), "nothing changed");
    routing.decide(address(1), true);
    assert!(!routing.is_active(address(1)));
    let batch = routing.poll_batch().unwrap();
    assert_eq!(batch.changes, [RouteChange::Protect(address(1))]);
    routing.handle_applied(batch.id, true, now);
    assert!(routing.is_captured(address(1)));
}

#[test]
fn a_passed_address_that_leaves_the_directory_is_released_at_once() {
    let (mut routing, now) = (Routing::new(true), at(crate::proto::test_start(), 0));
    routing.add_from_directory(address(1));
    routing.poll_batch().unwrap();
    routing.remove_from_directory(address(1), false, now);
    routing.handle_timeout(now);
    assert_eq!(routing.poll_batch().unwrap().changes, [RouteChange::Release(address(1))]);
    assert!(!routing.is_protected(address(1)) && routing.from_dns == 0);
}

#[test]
fn addresses_known_from_dns_are_bounded() {
    let mut routing = Routing::new(false);
    let now = at(crate::proto::test_start(), 0);
    for n in 0..u32::try_from(DNS_ADDRESSES).unwrap() {
        routing.add_from_dns(address(n), Duration::ZERO, now).unwrap();
    }
    assert_eq!(routing.add_from_dns(address(99_999), Duration::ZERO, now), Err(TooMany));
    assert_eq!(routing.add_from_dns(address(7), Duration::ZERO, now), Ok(()));
    // The directory's names resolve all the same.
    routing.add_from_directory(address(99_998));
    assert_eq!(routing.add_from_dns(address(99_998), Duration::ZERO, now), Ok(()));
    // Those that are former ones now count until they are retired.
    apply(&mut routing, now);
    let start = now.instant;
    for (seconds, expected) in [(61, Err(TooMany)), (661, Ok(()))] {
        for _ in 0..20 {
            routing.handle_timeout(at(start, seconds));
            apply(&mut routing, at(start, seconds));
        }
        let outcome = routing.add_from_dns(address(99_999), Duration::ZERO, at(start, seconds));
        assert_eq!(outcome, expected, "after {seconds} s");
    }
    assert_eq!(routing.from_dns, 1);
}

/// What the control thread and the guard would hold.
#[derive(Debug, Default)]
struct Kernel {
    protected: BTreeSet<IpAddr>,
    peers: BTreeSet<IpAddr>,
    released: BTreeSet<IpAddr>,
    /// Sockets of the pod name these.
    named: BTreeSet<IpAddr>,
    /// Kept because of that, and not reported yet.
    kept: Vec<IpAddr>,
}

impl Kernel {
    fn apply(&mut self, change: RouteChange) {
        let Self { protected, peers, released, named, kept } = self;
        match change {
            RouteChange::Retire(a) if named.contains(&a) && protected.contains(&a) => {
                kept.push(a);
                false
            }
            RouteChange::Protect(a) | RouteChange::Pass(a) | RouteChange::Prohibit(a) => protected.insert(a),
            RouteChange::Release(a) | RouteChange::Retire(a) => protected.remove(&a),
            RouteChange::Connect(a) => peers.insert(a),
            RouteChange::Disconnect(a) => peers.remove(&a),
            RouteChange::Admit(a) => released.insert(a),
            RouteChange::Refuse(a) => released.remove(&a),
        };
    }

    /// Does the whole of every batch, or a part of it and then fails.
    fn run(&mut self, routing: &mut Routing, fails_at: Option<usize>, now: Now) {
        while let Some(batch) = routing.poll_batch() {
            let done = fails_at.map_or(batch.changes.len(), |at| at % (batch.changes.len() + 1));
            batch.changes[..done].iter().for_each(|change| self.apply(*change));
            routing.handle_named(&std::mem::take(&mut self.kept), now);
            routing.handle_applied(batch.id, fails_at.is_none(), now);
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Name(bool),
    Remove(bool),
    Learn,
    Exempt,
    Socket(bool),
    Admit,
    Refuse,
    GiveUp,
    Wait(u64),
    Apply(Option<usize>),
}

fn op() -> impl Strategy<Value = (u32, Op)> {
    let op = prop_oneof![
        4 => any::<bool>().prop_map(Op::Name),
        4 => any::<bool>().prop_map(Op::Remove),
        2 => Just(Op::Learn),
        1 => Just(Op::Exempt),
        1 => any::<bool>().prop_map(Op::Socket),
        4 => Just(Op::Admit),
        2 => Just(Op::Refuse),
        2 => Just(Op::GiveUp),
        4 => prop::sample::select(vec![1u64, 31, 61, 301, 601]).prop_map(Op::Wait),
        6 => prop::option::weighted(0.4, 0..40usize).prop_map(Op::Apply),
    ];
    (0..6u32, op)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn promise_1_whatever_fails_half_way_the_kernel_ends_with_what_is_wanted_and_never_has_less_than_is_claimed(
        passes in prop::bool::weighted(0.2), adopted in 0..6u32, ops in prop::collection::vec(op(), 0..80)
    ) {
        let (mut routing, mut kernel, mut seconds) = (Routing::new(passes), Kernel::default(), 0);
        let start = crate::proto::test_start();
        // What a previous agent left.
        kernel.protected = (0..adopted).map(address).collect();
        routing.adopt(&(0..adopted).map(address).collect::<Vec<_>>(), at(start, 0));
        for (n, op) in ops {
            let (a, now) = (address(n), at(start, seconds));
            match op {
                Op::Name(peer) => {
                    routing.add_from_directory(a);
                    if peer {
                        routing.connect(a);
                    }
                }
                Op::Remove(exempt) => {
                    routing.disconnect(a);
                    routing.remove_from_directory(a, exempt, now);
                }
                Op::Learn => routing.add_from_dns(a, Duration::ZERO, now).unwrap(),
                Op::Exempt => routing.exempt(a, now),
                Op::Socket(true) => drop(kernel.named.insert(a)),
                Op::Socket(false) => drop(kernel.named.remove(&a)),
                Op::Admit => routing.admit(a, now),
                Op::Refuse => routing.refuse(a),
                Op::GiveUp => routing.give_up_former(a),
                Op::Wait(more) => {
                    seconds += more;
                    routing.handle_timeout(at(start, seconds));
                }
                Op::Apply(fails_at) => kernel.run(&mut routing, fails_at, now),
            }
            for (a, entry) in &routing.entries {
                prop_assert!(!routing.is_active(*a) || kernel.protected.contains(a), "{a} claimed active");
                prop_assert!(!routing.is_connected(*a) || kernel.peers.contains(a), "{a} claimed connected");
                prop_assert!(!routing.admissions.contains(*a), "{a} is both");
                prop_assert_eq!(entry.is_former(), routing.formers.contains(a));
            }
            prop_assert_eq!(routing.from_dns, routing.entries.values().filter(|e| e.from_dns).count());
        }
        // Long enough for every retry, too short for what is renewed or ends then.
        for _ in 0..3 {
            kernel.run(&mut routing, None, at(start, seconds));
            seconds += 1;
            routing.handle_timeout(at(start, seconds));
        }
        kernel.run(&mut routing, None, at(start, seconds));
        prop_assert!(routing.is_settled());
        prop_assert!(kernel.protected.iter().eq(routing.entries.keys()));
        let is_peer = |(a, entry): (&IpAddr, &Entry)| entry.peer.is_some().then_some(*a);
        prop_assert_eq!(kernel.peers, routing.entries.iter().filter_map(is_peer).collect());
        prop_assert_eq!(kernel.released.len(), (0..6).filter(|n| routing.admissions.contains(address(*n))).count());
        prop_assert!(kernel.released.is_disjoint(&kernel.protected));
        for a in routing.entries.keys() {
            prop_assert!(routing.is_active(*a) || routing.is_former(*a));
        }
    }
}
