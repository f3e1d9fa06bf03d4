//! The guard's text, looked at as text: what a reload keeps, and that no rule lets pass by accident.

use std::collections::BTreeSet;

use super::*;
use crate::launcher::pod::guard::{Exemption, Facts, State};
use crate::proto::directory::Protocol;

const MODES: [Mode; 3] = [Mode::Strict, Mode::Permissive, Mode::Audit];
const STATES: [State; 3] = [State::Filling, State::Closed, State::Open];

fn skeleton(mode: Mode, state: State) -> Skeleton {
    let device = |name: &str| DeviceName::try_from(name).unwrap();
    let facts = Facts {
        nodes: ["10.1.1.1", "192.168.77.1", "fd77::1"].map(|a| a.parse().unwrap()).into(),
        node_ranges: ["172.16.0.0/24".parse().unwrap()].into_iter().collect(),
        gateways: [(device("eth0"), "fe80::1".parse().unwrap())].into(),
        node_ports: [(Protocol::Tcp, 30_080)].into(),
        externals: [("192.0.2.80".parse().unwrap(), Protocol::Tcp, 80)].into(),
        broadcasts: ["10.1.1.255".parse().unwrap()].into(),
        resolver_endpoints: [
            ("10.1.9.9".parse().unwrap(), Protocol::Udp, 5353),
            ("fd00:10::99".parse().unwrap(), Protocol::Tcp, 53),
        ]
        .into(),
    };
    Skeleton {
        state,
        resolvers: ["10.96.0.10", "fd96::10", "169.254.20.10"].map(|r| r.parse().unwrap()).to_vec(),
        dns_ports: 61_000..=62_023,
        ranges: ["10.1.0.0/16", "fd00:10::/32"].map(|net| net.parse().unwrap()).into_iter().collect(),
        exempt: vec!["10.1.5.0/24".parse().unwrap(), "[fd00:10:5::/64]:443".parse::<Exemption>().unwrap()],
        facts,
        ..Skeleton::closed(mode, 51_820, vec![device("eth0"), device("net1")])
    }
}

fn texts() -> impl Iterator<Item = String> {
    MODES.into_iter().flat_map(|mode| STATES.map(|state| ruleset(&skeleton(mode, state), true)))
}

fn strict() -> String {
    ruleset(&skeleton(Mode::Strict, State::Open), true)
}

/// The rules of a chain, of the last table that has some in it.
fn chain(text: &str, name: &str) -> Vec<String> {
    let Some((_, rest)) = text.rsplit_once(&format!("    chain {name} {{\n")) else {
        assert!(text.contains(&format!("    chain {name} {{ }}")), "{name}");
        return Vec::new();
    };
    let rules = rest.split_once("\n    }").unwrap().0.lines().map(str::trim);
    rules.filter(|rule| !rule.starts_with('#')).map(str::to_owned).collect()
}

fn declared(text: &str, word: &str) -> BTreeSet<String> {
    let names = text.lines().filter_map(|line| line.strip_prefix(&format!("    {word} "))?.split(' ').next());
    names.map(str::to_owned).collect()
}

#[test]
fn every_drop_has_a_named_counter() {
    for text in texts() {
        for line in text.lines().filter(|line| line.ends_with(" drop")) {
            assert!(line.contains("counter name "), "{line}");
        }
    }
}

#[test]
fn a_reload_deletes_nothing_and_flushes_only_the_launchers_own_sets() {
    for text in texts() {
        assert!(!text.contains("delete") && !text.contains("destroy"));
        for line in text.lines().filter(|line| line.starts_with("flush set ")) {
            let set = line.rsplit(' ').next().unwrap();
            for agents in ["protected", "peers", "former", "released", "asked", "seen", "fresh", "answering"]
            {
                assert!(!set.starts_with(agents), "{line}");
            }
        }
    }
}

#[test]
fn every_mode_and_state_declares_the_same_sets_counters_and_chains() {
    for word in ["set", "counter", "chain"] {
        let expected = declared(&strict(), word);
        for text in texts() {
            assert_eq!(declared(&text, word), expected, "{word}");
        }
    }
}

#[test]
fn every_chain_is_one_that_the_agent_knows() {
    for text in texts() {
        let (inet, netdev) = text.split_once("add table netdev").unwrap();
        assert_eq!(declared(inet, "chain"), CHAINS.iter().map(|name| (*name).to_owned()).collect());
        let mut known: BTreeSet<String> = NETDEV_CHAINS.iter().map(|name| (*name).to_owned()).collect();
        known.extend(["egress_eth0".to_owned(), "egress_net1".to_owned()]);
        assert_eq!(declared(netdev, "chain"), known);
    }
}

#[test]
fn no_rule_looks_into_an_anonymous_map_and_no_drop_hangs_on_an_anonymous_set() {
    for text in MODES.map(|mode| ruleset(&skeleton(mode, State::Open), true)) {
        assert!(!text.contains("vmap"));
    }
    // A miss in the set of a rule that accepts drops; one in the set of a rule that drops would let pass.
    for line in strict().lines().filter(|line| line.ends_with(" drop")) {
        assert!(!line.contains("{ "), "{line}");
    }
}

#[test]
fn every_regular_chain_of_strict_mode_ends_in_a_verdict() {
    let returns = ["ip_options", "control_out6", "control_in6", "resolver_in"];
    let text = strict();
    let names: BTreeSet<&str> = CHAINS.iter().chain(NETDEV_CHAINS).copied().collect();
    for name in names.into_iter().filter(|name| !name.starts_with("record_") && !returns.contains(name)) {
        let rules = chain(&text, name);
        // Empty: a chain of the other modes.
        let Some(last) = rules.last() else { continue };
        let verdict = last.ends_with(" drop")
            || last == "accept"
            || last.ends_with(" accept")
            || last.contains("goto ");
        assert!(verdict, "{name}: {last}");
    }
}

#[test]
fn what_leaves_in_clear_in_strict_mode_passes_through_the_one_chain_that_marks_it() {
    let text = strict();
    let (inet, _) = text.split_once("add table netdev").unwrap();
    let inward = ["in", "closed_in", "filling_in", "from_tunnel", "prerouting", "resolver_in", "postrouting"];
    let mut name = "";
    for line in inet.lines() {
        if let Some(chain) = line.strip_prefix("    chain ") {
            name = chain.trim_end_matches(" {").trim_end_matches(" { }");
        }
        let is_inward = inward.contains(&name)
            || ["in4", "in6", "_in4", "_in6"].iter().any(|ending| name.ends_with(ending))
            || name.starts_with("record_");
        if line.trim().ends_with("accept") && !is_inward {
            assert_eq!(name, "pass", "{name}: {line}");
        }
    }
    let loose: Vec<_> =
        chain(&text, "postrouting").into_iter().filter(|rule| rule.ends_with("accept")).collect();
    assert_eq!(loose, ["oifname \"lo\" accept", "oifname \"tenc0\" accept"]);
}

#[test]
fn a_hook_of_strict_mode_drops_by_policy_and_ends_in_its_state() {
    for (state, word) in [(State::Filling, "filling"), (State::Closed, "closed"), (State::Open, "open")] {
        let text = ruleset(&skeleton(Mode::Strict, state), true);
        for (hook, direction) in
            [("postrouting", "out"), ("prerouting", "in"), ("egress_eth0", "frame"), ("egress_net1", "frame")]
        {
            let rules = chain(&text, hook);
            assert!(rules[0].contains("policy drop;"), "{hook}");
            assert_eq!(rules.last().unwrap(), &format!("goto {word}_{direction}"), "{hook}");
        }
    }
}

#[test]
fn the_closed_state_is_the_same_in_every_mode() {
    let closed = |mode| {
        let text = ruleset(&skeleton(mode, State::Closed), true);
        let names =
            ["closed_out", "closed_in", "closed_frame", "closed_tunnel4", "agents4", "agents6", "tunnel"];
        names.map(|name| chain(&text, name))
    };
    let strict = closed(Mode::Strict);
    for rules in &strict {
        assert!(rules.last().unwrap().ends_with(" drop"), "{rules:?}");
    }
    assert_eq!(strict, closed(Mode::Permissive));
    assert_eq!(strict, closed(Mode::Audit));
}

#[test]
fn a_protected_address_is_looked_up_before_every_rule_that_accepts() {
    let text = strict();
    for (name, first) in [
        ("out4", "ip daddr @protected4 goto protected_out4"),
        ("out6", "ip6 daddr @protected6 goto protected_out6"),
        ("judged", "ip daddr @protected4 goto protected4"),
    ] {
        let rules = chain(&text, name);
        let at = rules.iter().position(|rule| rule == first).unwrap_or_else(|| panic!("{name}: {rules:?}"));
        for rule in &rules[..at] {
            assert!(rule.ends_with(" drop") || rule.contains(" jump "), "{name}: {rule}");
        }
    }
}

#[test]
fn without_ranges_nothing_is_asked_about_and_with_them_each_family_is() {
    let goes = |text: &str| (text.contains("goto range_out4\n"), text.contains("goto range_out6\n"));
    assert_eq!(goes(&strict()), (true, true));
    let learned =
        Skeleton { ranges: crate::proto::ranges::Ranges::default(), ..skeleton(Mode::Strict, State::Open) };
    assert_eq!(goes(&ruleset(&learned, true)), (false, false));
}

#[test]
fn elements_replace_those_that_were_there() {
    let text = strict();
    for line in [
        "flush set inet tencrypt nodes4\nadd element inet tencrypt nodes4 { 10.1.1.1, 192.168.77.1 }",
        "flush set inet tencrypt externals4\nadd element inet tencrypt externals4 { 192.0.2.80 . 6 . 80 }",
        "flush set inet tencrypt externals6\nflush set",
        "add element inet tencrypt gateways6 { \"eth0\" . fe80::1 }",
        "add element inet tencrypt broadcasts4 { 10.1.1.255 }",
        "add element inet tencrypt node_ports { 6 . 30080 }",
        "add element inet tencrypt special4 { 10.1.1.1, 10.1.1.255, 10.1.9.9, 10.96.0.10, 169.254.20.10, 192.0.2.80, 192.168.77.1 }",
        "add element inet tencrypt resolver_endpoints4 { 10.1.9.9 . 17 . 5353 }",
        "add element inet tencrypt resolver_endpoints6 { fd00:10::99 . 6 . 53 }",
        "add element netdev tencrypt resolvers4 { 10.96.0.10, 169.254.20.10 }",
    ] {
        assert!(text.contains(line), "{line}\n{text}");
    }
}

#[test]
fn many_nodes_are_added_a_bounded_number_to_a_line() {
    let mut skeleton = skeleton(Mode::Strict, State::Open);
    skeleton.facts.nodes =
        (0..2_500_u32).map(|n| std::net::Ipv4Addr::from_bits(0x0a01_0000 + n).into()).collect();
    let text = ruleset(&skeleton, true);
    assert_eq!(text.matches("add element inet tencrypt nodes4 {").count(), 3);
}

#[test]
fn exemptions_pass_in_both_directions_by_net_and_by_port() {
    let text = strict();
    assert!(chain(&text, "range_out4").contains(&"ip daddr 10.1.5.0/24 goto pass".to_owned()));
    assert!(chain(&text, "range_in4").contains(&"ip saddr 10.1.5.0/24 accept".to_owned()));
    assert!(
        chain(&text, "range_out6").contains(&"ip6 daddr fd00:10:5::/64 tcp dport 443 goto pass".to_owned())
    );
    assert!(chain(&text, "range_in6").contains(&"ip6 saddr fd00:10:5::/64 udp sport 443 accept".to_owned()));
}

#[test]
fn link_scope_and_dhcp_pass_only_where_the_operator_says_so() {
    let text = strict();
    assert!(
        text.contains("counter name link_scope drop") && text.contains("udp dport 67 counter name dhcp drop")
    );
    let allowed =
        Skeleton { allow_link_scope: true, allow_dhcp: true, ..skeleton(Mode::Strict, State::Open) };
    let text = ruleset(&allowed, true);
    assert!(!text.contains("counter name link_scope drop") && !text.contains("counter name dhcp drop"));
    assert!(chain(&text, "link_scope").contains(&"counter name link_scope_allowed goto pass".to_owned()));
}

#[test]
fn queries_to_endpoints_of_the_resolvers_pass_whole_and_are_counted_beside_the_fast_path() {
    let text = strict();
    let rule = |family: u8, daddr: &str| {
        let rule = format!("{daddr} . meta l4proto . th dport @resolver_endpoints{family}");
        format!("{rule} counter name dns_uncaptured goto pass")
    };
    let v4 = rule(4, "ip frag-off & 0x1fff == 0 ip daddr");
    assert!(chain(&text, "special_out4").contains(&v4));
    assert!(chain(&text, "special_out6").contains(&rule(6, "ip6 daddr")));
    assert_eq!(text.matches("counter name dns_uncaptured").count(), 2);
    for mode in [Mode::Permissive, Mode::Audit] {
        assert!(!ruleset(&skeleton(mode, State::Open), true).contains("counter name dns_uncaptured"));
    }
}

/// The counters that packets end in, by the rules' own words.
fn counters_of_rules(text: &str) -> BTreeSet<(String, bool)> {
    let rules = text.lines().filter_map(|line| Some((line, line.split_once("counter name ")?.1)));
    rules.map(|(line, rest)| (rest.split(' ').next().unwrap().to_owned(), line.ends_with(" drop"))).collect()
}

#[test]
fn every_counter_is_used_is_a_drop_or_not_as_it_says_and_is_documented_here_and_in_the_readme() {
    let allowed =
        Skeleton { allow_link_scope: true, allow_dhcp: true, ..skeleton(Mode::Strict, State::Open) };
    let texts = [strict(), ruleset(&allowed, true), ruleset(&skeleton(Mode::Strict, State::Closed), true)];
    let used: BTreeSet<_> = texts.iter().flat_map(|text| counters_of_rules(text)).collect();
    for (counter, drops) in &used {
        assert_eq!(counts_drops(counter), *drops, "{counter}");
    }
    let used: BTreeSet<_> = used.into_iter().map(|(counter, _)| counter).collect();
    let all = COUNTERS.iter().copied().chain(Reason::ALL.map(Reason::as_str));
    let all: BTreeSet<_> = all.map(str::to_owned).collect();
    assert_eq!(used, all);
    let readme = include_str!("../../../../README.md");
    let rows = |text: &str, start: &str| -> String {
        text.lines().filter(|line| line.starts_with(start)).collect::<Vec<_>>().join("\n")
    };
    let (here, there) = (rows(include_str!("ruleset.rs"), "/// | `"), rows(readme, "| `"));
    for counter in all {
        assert!(here.contains(&format!("| `{counter}` |")), "{counter} is not documented");
        assert!(there.contains(&format!("`{counter}`")), "{counter} is not in the README");
    }
}

#[test]
fn permissive_and_audit_record_wherever_they_refuse_and_drop_nothing_when_open() {
    for mode in [Mode::Permissive, Mode::Audit] {
        let text = ruleset(&skeleton(mode, State::Open), true);
        for name in [
            "open_out",
            "open_in",
            "open_frame",
            "filling_out",
            "filling_in",
            "outbound",
            "inbound",
            "dns",
            "resolver",
        ] {
            assert!(!chain(&text, name).iter().any(|rule| rule.ends_with(" drop")), "{name}");
        }
        assert_eq!(text.matches("goto record_").count(), 3 + 2 + 2);
    }
    assert!(!strict().contains("goto record_"));
}

#[test]
fn every_reason_is_recorded_by_rules_that_accept_all() {
    let text = ruleset(&skeleton(Mode::Audit, State::Open), true);
    for reason in Reason::ALL {
        let name = match reason {
            Reason::Outbound => "record_outbound",
            Reason::Egress => "record_egress",
            Reason::Inbound => "record_inbound",
            Reason::Dns => "record_dns",
        };
        assert_eq!(chain(&text, name).last().unwrap(), "accept", "{name}");
    }
    for set in text.lines().filter_map(|line| line.strip_prefix("    set ")?.split(' ').next()) {
        assert_eq!(Reason::of_set(set).is_some(), set.starts_with("would_drop_"), "{set}");
    }
}

#[test]
fn without_egress_or_devices_there_is_one_table() {
    for mode in MODES {
        let skeleton = skeleton(mode, State::Open);
        assert!(!ruleset(&skeleton, false).contains("netdev"));
        assert!(!ruleset(&Skeleton { devices: Vec::new(), ..skeleton }, true).contains("netdev"));
    }
}

#[test]
fn without_elements_no_rule_and_no_set_is_malformed() {
    for mode in MODES {
        let empty = Skeleton::closed(mode, 51_820, vec![DeviceName::try_from("eth0").unwrap()]);
        let text = ruleset(&empty, true);
        assert!(!text.contains("{  }"), "{text}");
    }
}
