//! The guard's text: what a [`Skeleton`] becomes for `nft -f`.
//!
//! 1. every mode and gate declares the same sets, counters and regular chains, so one replaces another in place
//! 2. the hooks differ: closed, they refuse all but what the agent itself needs; open, they judge what is protected
//! 3. what is refused ends in [`Refusal`]: dropped and counted, or in permissive and audit mode counted, recorded, accepted
//!
//! Cost for a packet that is nobody's business: one set look-up at each hook, and two where its port is 53.
//!
//! Source: nft(8).

use std::fmt::Write as _;
use std::net::IpAddr;

use super::{Gate, Skeleton};
use crate::agent::guard::{SET4, SET6, TABLE};
use crate::agent::netlink::MARK;
use crate::agent::tun;
use crate::proto::ladder::Mode;

/// Sets of what strict mode would drop: source, destination, protocol and, where the protocol has them, ports.
pub(super) const RECORDS: [&str; 4] =
    ["would_drop4", "would_drop6", "would_drop4_portless", "would_drop6_portless"];

/// Flows that one set of records holds, and how long after their last packet.
const RECORDS_SIZE: u32 = 65_535;
const RECORDS_TIMEOUT: &str = "10m";

/// Protocols whose header begins with two ports.
const WITH_PORTS: &str = "{ tcp, udp, sctp, dccp, udplite }";

/// Neighbour discovery, which routers do not forward.
const NEIGHBOURS: &str = "icmpv6 type 133-137 ip6 hoplimit 255 accept";

/// What becomes of a packet that strict mode does not let pass, at one hook.
#[derive(Clone, Copy)]
enum Refusal {
    Drop,
    Record,
}

impl Refusal {
    fn verdict(self, dropped: &str, recorded: &str) -> String {
        match self {
            Self::Drop => format!("counter name {dropped} drop"),
            Self::Record => format!("counter name {recorded} goto record"),
        }
    }
}

/// The skeleton as text for `nft -f`; `egress` adds the table at the device's egress, if there is a device.
///
/// `flush table` removes rules and keeps chains, sets, elements and counters, so the text can be loaded again at any time,
/// also for another mode or gate.
#[must_use]
pub fn ruleset(skeleton: &Skeleton, egress: bool) -> String {
    let mut text = inet(skeleton);
    if let Some(device) = skeleton.device.as_ref().filter(|_| egress) {
        text += &netdev(skeleton, &device.to_string());
    }
    text
}

fn inet(skeleton: &Skeleton) -> String {
    let refusal = match skeleton.mode {
        Mode::Strict => Refusal::Drop,
        Mode::Permissive | Mode::Audit => Refusal::Record,
    };
    let tun = tun::NAME;
    let refuse = refusal.verdict("inbound", "would_drop_inbound");
    let (postrouting, prerouting) = match skeleton.gate {
        Gate::Open => (
            judge_outbound(),
            format!("\n        ip saddr @{SET4} goto inbound\n        ip6 saddr @{SET6} goto inbound"),
        ),
        Gate::Closed => (goto("closed_outbound"), goto("closed_inbound")),
    };
    format!(
        "add table inet {TABLE}
flush table inet {TABLE}
table inet {TABLE} {{{sets}{records}
    counter outbound_postrouting {{ }}
    counter inbound {{ }}
    counter would_drop_outbound {{ }}
    counter would_drop_inbound {{ }}
    counter would_drop_dns {{ }}
{record}{outbound}

    # Everything that comes from a protected address.
    chain inbound {{
        # A datagram of the tunnel is never a fragment.
        ip frag-off & 0x3fff != 0 {refuse}
        exthdr frag exists {refuse}
        meta l4proto udp udp sport {port} udp dport {port} accept
{control}
        {refuse}
    }}
{closed_inbound}
    chain postrouting {{
        type filter hook postrouting priority 300; policy accept;
        oifname \"lo\" accept
        oifname \"{tun}\" accept{postrouting}
    }}

    chain prerouting {{
        type filter hook prerouting priority -450; policy accept;
        iifname \"lo\" accept
        iifname \"{tun}\" accept{prerouting}
    }}
}}
",
        sets = sets(),
        records = records(),
        record = record(),
        outbound = outbound(
            skeleton,
            &refusal.verdict("outbound_postrouting", "would_drop_outbound"),
            &refusal.verdict("dns_escaped", "would_drop_dns"),
        ),
        port = skeleton.tunnel_port,
        control = control(skeleton.tunnel_port),
        closed_inbound = closed_inbound(skeleton),
    )
}

/// The table at the device's egress: it sees frames of packet sockets too. What permissive and audit mode let pass was
/// recorded before, once per packet.
fn netdev(skeleton: &Skeleton, device: &str) -> String {
    let rules = match (skeleton.gate, skeleton.mode) {
        // Whatever is not ARP, tagged frames and unknown protocols included.
        (Gate::Closed, _) => format!("\n        meta protocol arp accept{}", goto("closed_outbound")),
        (Gate::Open, Mode::Strict) => judge_outbound(),
        (Gate::Open, Mode::Permissive | Mode::Audit) => String::new(),
    };
    format!(
        "
add table netdev {TABLE}
flush table netdev {TABLE}
table netdev {TABLE} {{{sets}
    counter outbound_egress {{ }}
{outbound}

    chain egress {{
        type filter hook egress device \"{device}\" priority 0; policy accept;{rules}
    }}
}}
",
        sets = sets(),
        outbound = outbound(skeleton, "counter name outbound_egress drop", "counter name dns_escaped drop"),
    )
}

/// What both tables declare.
fn sets() -> String {
    format!(
        "
    set {SET4} {{ type ipv4_addr; }}
    set {SET6} {{ type ipv6_addr; }}
    counter dns_escaped {{ }}
    counter not_protected {{ }}"
    )
}

/// The sets of records.
fn records() -> String {
    let ports = " . inet_service . inet_service";
    let types = [("ipv4_addr", ports), ("ipv6_addr", ports), ("ipv4_addr", ""), ("ipv6_addr", "")];
    RECORDS.iter().zip(types).fold(String::new(), |mut text, (name, (address, ports))| {
        write!(
            text,
            "\n    set {name} {{ type {address} . {address} . inet_proto{ports}; flags dynamic,timeout; \
             size {RECORDS_SIZE}; timeout {RECORDS_TIMEOUT}; }}"
        )
        .expect("a string");
        text
    })
}

/// Notes the flow and accepts. A later fragment shows no ports, so it is noted without, as is everything while the set is full.
fn record() -> String {
    let [ports4, ports6, portless4, portless6] = RECORDS;
    format!(
        "
    # Everything that strict mode would drop, once per packet.
    chain record {{
        meta l4proto {WITH_PORTS} update @{ports4} {{ ip saddr . ip daddr . meta l4proto . th sport . th dport }} accept
        meta l4proto {WITH_PORTS} update @{ports6} {{ ip6 saddr . ip6 daddr . meta l4proto . th sport . th dport }} accept
        update @{portless4} {{ ip saddr . ip daddr . meta l4proto }} accept
        update @{portless6} {{ ip6 saddr . ip6 daddr . meta l4proto }} accept
        accept
    }}
"
    )
}

/// What passes in both directions besides the tunnel.
fn control(port: u16) -> String {
    format!(
        "        # Neighbour discovery.
        {NEIGHBOURS}
        # ICMP errors that quote a datagram of the tunnel, which came from and went to its port: without IPv4 options, as they are sent.
        icmp type {{ destination-unreachable, time-exceeded, parameter-problem }} @th,64,8 0x45 @th,136,8 17 @th,224,16 {port} @th,240,16 {port} accept
        icmpv6 type {{ destination-unreachable, packet-too-big, time-exceeded, parameter-problem }} @th,112,8 17 @th,384,16 {port} @th,400,16 {port} accept"
    )
}

/// The chains of what leaves, alike in both tables but for what refusing means.
fn outbound(skeleton: &Skeleton, refuse: &str, refuse_dns: &str) -> String {
    let Skeleton { tunnel_port: port, dns_ports, .. } = skeleton;
    let (lo, hi) = (dns_ports.start(), dns_ports.end());
    let resolver = resolvers(skeleton, |family, set| format!("\n        {family} daddr {set} goto resolver"));
    let own_query = resolvers(skeleton, |family, set| {
        format!(
            "\n        meta mark {MARK:#x} {family} daddr {set} meta l4proto {{ tcp, udp }} th dport 53 th sport {lo}-{hi} accept"
        )
    });
    // Marked by the agent, of one of the protocol's four message types.
    let tunnel = format!(
        "meta mark {MARK:#x} meta l4proto udp udp sport {port} @th,64,32 {{ 0x01000000, 0x02000000, 0x03000000, 0x04000000 }} accept"
    );
    format!(
        "
    # Everything that leaves for a protected address.
    chain outbound {{
        # Datagrams of the tunnel.
        {tunnel}
{control}
        {refuse}
    }}

    # Everything that leaves for port 53 of a resolver.
    chain resolver {{
        meta mark {MARK:#x} th sport {lo}-{hi} accept
        {refuse_dns}
    }}

    # Everything that leaves for port 53.
    chain dns {{{resolver}
    }}

    # Everything that leaves while the gate is closed.
    chain closed_outbound {{
        {tunnel}{own_query}
        {NEIGHBOURS}
        counter name not_protected drop
    }}",
        control = control(*port),
    )
}

fn closed_inbound(skeleton: &Skeleton) -> String {
    let Skeleton { tunnel_port: port, dns_ports, .. } = skeleton;
    let (lo, hi) = (dns_ports.start(), dns_ports.end());
    let answer = resolvers(skeleton, |family, set| {
        format!(
            "\n        {family} saddr {set} meta l4proto {{ tcp, udp }} th sport 53 th dport {lo}-{hi} accept"
        )
    });
    format!(
        "
    # Everything that comes in while the gate is closed.
    chain closed_inbound {{
        # The first fragment would look like a datagram of the tunnel.
        ip frag-off & 0x3fff != 0 counter name not_protected drop
        exthdr frag exists counter name not_protected drop
        meta l4proto udp udp sport {port} udp dport {port} accept{answer}
        {NEIGHBOURS}
        counter name not_protected drop
    }}
"
    )
}

/// The rules of a hook that lets pass what is nobody's business.
fn judge_outbound() -> String {
    format!(
        "
        ip daddr @{SET4} goto outbound
        ip6 daddr @{SET6} goto outbound
        udp dport 53 goto dns
        tcp dport 53 goto dns"
    )
}

fn goto(chain: &str) -> String {
    format!("\n        goto {chain}")
}

/// One rule for all resolvers of a family; none for a family without.
fn resolvers(skeleton: &Skeleton, rule: impl Fn(&str, &str) -> String) -> String {
    let of = |v4: bool| -> Vec<_> {
        skeleton.resolvers.iter().filter(|r| r.is_ipv4() == v4).map(IpAddr::to_string).collect()
    };
    [("ip", of(true)), ("ip6", of(false))]
        .iter()
        .filter(|(_, addresses)| !addresses.is_empty())
        .map(|(family, addresses)| rule(family, &format!("{{ {} }}", addresses.join(", "))))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [(Mode, Gate); 6] = [
        (Mode::Strict, Gate::Open),
        (Mode::Permissive, Gate::Open),
        (Mode::Audit, Gate::Open),
        (Mode::Strict, Gate::Closed),
        (Mode::Permissive, Gate::Closed),
        (Mode::Audit, Gate::Closed),
    ];

    fn skeleton(mode: Mode, gate: Gate) -> Skeleton {
        Skeleton {
            mode,
            gate,
            device: Some("eth0".try_into().unwrap()),
            tunnel_port: 51820,
            resolvers: ["10.96.0.10", "fd96::10", "10.96.0.11"].map(|r| r.parse().unwrap()).to_vec(),
            dns_ports: 61000..=62023,
        }
    }

    fn texts() -> impl Iterator<Item = String> {
        ALL.into_iter().map(|(mode, gate)| ruleset(&skeleton(mode, gate), true))
    }

    /// The lines of a chain, of the first table that has it.
    fn chain<'t>(text: &'t str, name: &str) -> &'t str {
        let (_, rest) = text.split_once(&format!("    chain {name} {{")).unwrap();
        rest.split_once("\n    }").unwrap().0
    }

    #[test]
    fn every_drop_has_a_named_counter() {
        for text in texts() {
            for line in text.lines().filter(|line| line.ends_with("drop")) {
                assert!(line.contains("counter name "), "{line}");
            }
        }
    }

    #[test]
    fn a_reload_never_deletes_a_table_or_a_set() {
        for text in texts() {
            assert!(!text.contains("delete") && !text.contains("destroy") && !text.contains("flush set"));
        }
    }

    #[test]
    fn every_mode_and_gate_declares_the_same_sets_counters_and_chains() {
        let declared = |text: String| -> Vec<String> {
            let words = ["table ", "    set ", "    counter ", "    chain "];
            let first = |line: &&str| words.iter().any(|word| line.starts_with(word)) && line.contains('{');
            text.lines().filter(first).map(str::to_owned).collect()
        };
        let expected = declared(ruleset(&skeleton(Mode::Strict, Gate::Open), true));
        for text in texts() {
            assert_eq!(declared(text), expected);
        }
    }

    #[test]
    fn every_resolver_is_guarded_in_both_tables_by_one_rule_per_family() {
        let text = ruleset(&skeleton(Mode::Strict, Gate::Open), true);
        for rule in
            ["ip daddr { 10.96.0.10, 10.96.0.11 } goto resolver", "ip6 daddr { fd96::10 } goto resolver"]
        {
            assert_eq!(text.matches(rule).count(), 2, "{rule}");
        }
    }

    #[test]
    fn without_resolvers_no_rule_names_an_empty_set() {
        for (mode, gate) in ALL {
            let text = ruleset(&Skeleton { resolvers: Vec::new(), ..skeleton(mode, gate) }, true);
            assert!(!text.contains("{  }"), "{text}");
        }
    }

    #[test]
    fn without_egress_or_device_there_is_one_table() {
        for (mode, gate) in ALL {
            let skeleton = skeleton(mode, gate);
            assert!(!ruleset(&skeleton, false).contains("netdev"));
            assert!(!ruleset(&Skeleton { device: None, ..skeleton }, true).contains("netdev"));
        }
    }

    #[test]
    fn permissive_and_audit_record_what_strict_drops_and_drop_nothing() {
        let strict = ruleset(&skeleton(Mode::Strict, Gate::Open), false);
        for mode in [Mode::Permissive, Mode::Audit] {
            let text = ruleset(&skeleton(mode, Gate::Open), false);
            for (name, dropped, recorded) in [
                ("outbound", "outbound_postrouting", "would_drop_outbound"),
                ("inbound", "inbound", "would_drop_inbound"),
                ("resolver", "dns_escaped", "would_drop_dns"),
            ] {
                let from = format!("counter name {dropped} drop");
                let to = format!("counter name {recorded} goto record");
                assert_eq!(chain(&strict, name).replace(&from, &to), chain(&text, name));
                assert!(!chain(&text, name).contains("drop\n") && chain(&text, name).contains(&to));
            }
        }
    }

    #[test]
    fn the_device_egress_accepts_what_was_recorded_before_it() {
        for mode in [Mode::Permissive, Mode::Audit] {
            let text = ruleset(&skeleton(mode, Gate::Open), true);
            assert!(!chain(&text, "egress").contains("goto"), "{text}");
        }
    }

    #[test]
    fn a_closed_gate_sends_everything_to_the_closed_chains_in_every_mode() {
        for (mode, gate) in ALL.into_iter().filter(|(_, gate)| *gate == Gate::Closed) {
            let text = ruleset(&skeleton(mode, gate), true);
            for (hook, last) in [
                ("postrouting", "goto closed_outbound"),
                ("prerouting", "goto closed_inbound"),
                ("egress", "goto closed_outbound"),
            ] {
                assert!(chain(&text, hook).ends_with(last), "{text}");
            }
            for closed in ["closed_outbound", "closed_inbound"] {
                assert!(chain(&text, closed).ends_with("counter name not_protected drop"), "{text}");
            }
        }
    }
}
