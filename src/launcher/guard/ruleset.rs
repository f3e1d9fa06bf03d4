//! The guard's text: what a [`Skeleton`] becomes for `nft -f`.
//!
//! 1. every mode and gate declares the same sets, counters and regular chains, so one replaces another in place
//! 2. the hooks differ: closed, they refuse all but what the agent itself needs; open, they judge what is protected
//! 3. what an open gate refuses ends in [`Reason::refuse`] and nowhere else: dropped and counted in strict mode, counted,
//!    recorded and accepted below. So what permissive and audit mode record is what strict mode drops
//! 4. a packet of the stack that was recorded is not judged a second time at the device's egress: it bears a bit of the mark
//!    from the one hook to the other, and loses it there. Strict mode would have dropped it at the first
//!
//! Cost for a packet that is nobody's business: one set look-up at each hook, and two where its port is 53.
//!
//! Source: nft(8).

use std::fmt::Write as _;
use std::net::IpAddr;

use super::{DeviceName, Gate, Skeleton};
use crate::agent::guard::{SET4, SET6, TABLE};
use crate::agent::netlink::MARK;
use crate::agent::tun;
use crate::proto::ladder::Mode;

/// Flows that one set of records holds, and how long after their last packet. A set costs 16 bytes per flow that it may
/// hold, in every mode: packet sockets and resolvers have few flows, and so have protocols without ports.
const RECORDS_SIZE: u32 = 16_384;
const FEW_RECORDS_SIZE: u32 = 2_048;
pub(super) const RECORDS_TIMEOUT_S: u64 = 600;

/// A bit of the mark that no part of [`MARK`] is.
const RECORDED: u32 = 0x0100_0000;
const _: () = assert!(MARK & RECORDED == 0, "the agent's own datagrams bear no such bit");

/// Protocols whose header begins with two ports.
const WITH_PORTS: &str = "{ tcp, udp, sctp, dccp, udplite }";

/// Neighbour discovery, which routers do not forward.
const NEIGHBOURS: &str = "icmpv6 type 133-137 ip6 hoplimit 255 accept";

/// Why strict mode does not let a packet pass that leaves or enters by an open gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// It left the stack in clear, for a protected address.
    Outbound,
    /// It left a packet socket in clear, for a protected address.
    Egress,
    /// It came in clear, from a protected address.
    Inbound,
    /// It left for port 53 of a resolver, and was not the agent's.
    Dns,
}

impl Reason {
    /// Every reason.
    pub const ALL: [Self; 4] = [Self::Outbound, Self::Egress, Self::Inbound, Self::Dns];

    /// The word used in status and docs: the counter of what strict mode drops for it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Outbound => "outbound_postrouting",
            Self::Egress => "outbound_egress",
            Self::Inbound => "inbound",
            Self::Dns => "dns_escaped",
        }
    }

    /// What its counter, its chain and its sets below strict mode are called, up to their beginnings and endings.
    const fn name(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Egress => "egress",
            Self::Inbound => "inbound",
            Self::Dns => "dns",
        }
    }

    /// The reason that a set of records stands for.
    pub(super) fn of_set(set: &str) -> Option<Self> {
        let name = set.strip_prefix("would_drop_")?.strip_suffix("_portless").unwrap_or(set);
        let name = name.strip_prefix("would_drop_").unwrap_or(name);
        Self::ALL
            .into_iter()
            .find(|reason| [4, 6].iter().any(|family| name == format!("{}{family}", reason.name())))
    }

    /// The one way to refuse a packet at an open gate: the end of a rule.
    fn refuse(self, mode: Mode) -> String {
        match mode {
            Mode::Strict => format!("counter name {} drop", self.as_str()),
            Mode::Permissive | Mode::Audit => {
                format!("counter name would_drop_{0} goto record_{0}", self.name())
            }
        }
    }

    /// What [`Self::refuse`] refers to: counters, sets, and the chain that notes the flow and accepts. `note` is a rule in
    /// front of it. A later fragment is noted without ports, as is everything while the set is full.
    fn declared(self, note: &str) -> String {
        let (name, dropped) = (self.name(), self.as_str());
        let size = match self {
            Self::Outbound | Self::Inbound => RECORDS_SIZE,
            Self::Egress | Self::Dns => FEW_RECORDS_SIZE,
        };
        let mut text = format!("\n    counter {dropped} {{ }}\n    counter would_drop_{name} {{ }}");
        for (suffix, ports, size) in
            [("", " . inet_service . inet_service", size), ("_portless", "", FEW_RECORDS_SIZE)]
        {
            for (family, address) in [(4, "ipv4_addr"), (6, "ipv6_addr")] {
                write!(
                    text,
                    "\n    set would_drop_{name}{family}{suffix} {{ type {address} . {address} . inet_proto{ports}; \
                     flags dynamic,timeout; size {size}; timeout {RECORDS_TIMEOUT_S}s; counter; }}"
                )
                .expect("a string");
            }
        }
        write!(
            text,
            "
    chain record_{name} {{{note}
        # A later fragment shows no ports, though nft would read some.
        ip frag-off & 0x1fff != 0 update @would_drop_{name}4_portless {{ ip saddr . ip daddr . meta l4proto }} accept
        frag frag-off != 0 update @would_drop_{name}6_portless {{ ip6 saddr . ip6 daddr . meta l4proto }} accept
        meta l4proto {WITH_PORTS} update @would_drop_{name}4 {{ ip saddr . ip daddr . meta l4proto . th sport . th dport }} accept
        meta l4proto {WITH_PORTS} update @would_drop_{name}6 {{ ip6 saddr . ip6 daddr . meta l4proto . th sport . th dport }} accept
        update @would_drop_{name}4_portless {{ ip saddr . ip daddr . meta l4proto }} accept
        update @would_drop_{name}6_portless {{ ip6 saddr . ip6 daddr . meta l4proto }} accept
        accept
    }}"
        )
        .expect("a string");
        text
    }
}

/// The skeleton as text for `nft -f`; `egress` adds the table at the device's egress, if there is a device.
///
/// `flush table` removes rules and keeps chains, sets, elements and counters, so the text can be loaded again at any time,
/// also for another mode or gate.
#[must_use]
pub fn ruleset(skeleton: &Skeleton, egress: bool) -> String {
    let device = skeleton.device.as_ref().filter(|_| egress).map(DeviceName::to_string);
    let mut text = inet(skeleton, device.as_deref());
    if let Some(device) = device {
        text += &netdev(skeleton, &device);
    }
    text
}

/// `egress`: the device at whose egress there is a table too.
fn inet(skeleton: &Skeleton, egress: Option<&str>) -> String {
    let tun = tun::NAME;
    let refuse = Reason::Inbound.refuse(skeleton.mode);
    let (postrouting, prerouting) = match skeleton.gate {
        Gate::Open => (
            judge_outbound(),
            format!("\n        ip saddr @{SET4} goto inbound\n        ip6 saddr @{SET6} goto inbound"),
        ),
        Gate::Closed => (goto("closed_outbound"), goto("closed_inbound")),
    };
    let note = egress.map_or_else(String::new, |device| {
        format!("\n        oifname \"{device}\" meta mark set meta mark or {RECORDED:#x}")
    });
    format!(
        "add table inet {TABLE}
flush table inet {TABLE}
table inet {TABLE} {{{sets}
    # Below strict: what strict mode would drop, once per packet.{records}
{outbound}

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
        records =
            Reason::Outbound.declared(&note) + &Reason::Inbound.declared("") + &Reason::Dns.declared(&note),
        outbound = outbound(skeleton, Reason::Outbound),
        port = skeleton.tunnel_port,
        control = control(skeleton.tunnel_port),
        closed_inbound = closed_inbound(skeleton),
    )
}

/// The table at the device's egress: it sees frames of packet sockets too.
fn netdev(skeleton: &Skeleton, device: &str) -> String {
    let rules = match (skeleton.gate, skeleton.mode) {
        // Whatever is not ARP, tagged frames and unknown protocols included.
        (Gate::Closed, _) => format!("\n        meta protocol arp accept{}", goto("closed_outbound")),
        (Gate::Open, Mode::Strict) => judge_outbound(),
        (Gate::Open, Mode::Permissive | Mode::Audit) => {
            let kept = !RECORDED;
            format!(
                "\n        meta mark and {RECORDED:#x} != 0 meta mark set meta mark and {kept:#x} accept{}",
                judge_outbound()
            )
        }
    };
    format!(
        "
add table netdev {TABLE}
flush table netdev {TABLE}
table netdev {TABLE} {{{sets}
    # Below strict: what strict mode would drop of packet sockets' frames.{records}
{outbound}

    chain egress {{
        type filter hook egress device \"{device}\" priority 0; policy accept;{rules}
    }}
}}
",
        sets = sets(),
        records = Reason::Egress.declared("") + &Reason::Dns.declared(""),
        outbound = outbound(skeleton, Reason::Egress),
    )
}

/// What both tables declare.
fn sets() -> String {
    format!(
        "
    set {SET4} {{ type ipv4_addr; }}
    set {SET6} {{ type ipv6_addr; }}
    counter not_protected {{ }}"
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

/// The chains of what leaves, alike in both tables but for the reason to refuse it.
fn outbound(skeleton: &Skeleton, reason: Reason) -> String {
    let (refuse, refuse_dns) = (reason.refuse(skeleton.mode), Reason::Dns.refuse(skeleton.mode));
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
    fn every_chain_is_one_that_the_agent_knows() {
        for text in texts() {
            let chains = text.lines().filter_map(|line| line.strip_prefix("    chain ")?.strip_suffix(" {"));
            let chains: std::collections::BTreeSet<_> = chains.collect();
            assert_eq!(chains, crate::agent::guard::CHAINS.into());
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
    fn permissive_and_audit_record_wherever_strict_drops_and_differ_in_nothing_else() {
        let rules = |text: String| text.lines().map(str::to_owned).collect::<Vec<_>>();
        let strict = rules(ruleset(&skeleton(Mode::Strict, Gate::Open), true));
        let drops = |line: &&String| line.ends_with(" drop") && !line.contains("not_protected");
        // Three of inbound, one each of outbound and of the resolvers in both tables.
        assert_eq!(strict.iter().filter(drops).count(), 3 + 2 + 2);
        for mode in [Mode::Permissive, Mode::Audit] {
            let mut below = rules(ruleset(&skeleton(mode, Gate::Open), true));
            let marked = |line: &String| line.contains("meta mark and 0x1000000 != 0 ");
            assert_eq!(
                below.iter().filter(|line| marked(line)).count(),
                1,
                "only what was recorded is not judged again"
            );
            below.retain(|line| !marked(line));
            assert_eq!(strict.len(), below.len());
            for (strict, below) in strict.iter().zip(&below) {
                let recorded = Reason::ALL.iter().fold(strict.clone(), |line, reason| {
                    line.replace(&reason.refuse(Mode::Strict), &reason.refuse(mode))
                });
                assert_eq!(*below, recorded);
                assert!(!drops(&below), "{below}");
                assert_eq!(drops(&strict), below.contains(" goto record_"), "{strict}: {below}");
            }
        }
    }

    #[test]
    fn every_reason_is_recorded_by_rules_that_accept_all() {
        for text in texts() {
            for reason in Reason::ALL {
                let tables = text.matches(&format!("chain record_{} {{", reason.name())).count();
                assert_eq!(tables, if reason == Reason::Dns { 2 } else { 1 });
                let chain = chain(&text, &format!("record_{}", reason.name()));
                assert!(chain.ends_with("\n        accept"), "{chain}");
                for set in text.lines().filter_map(|l| l.strip_prefix("    set ")?.split(' ').next()) {
                    let belongs = set.starts_with(&format!("would_drop_{}", reason.name()));
                    assert_eq!(Reason::of_set(set) == Some(reason), belongs, "{set}");
                    assert!(!belongs || chain.contains(&format!("update @{set} ")), "{set}");
                }
            }
        }
    }

    #[test]
    fn a_packet_bears_the_bit_only_on_its_way_to_an_egress_that_takes_it_away() {
        let below = skeleton(Mode::Audit, Gate::Open);
        let set = "oifname \"eth0\" meta mark set meta mark or 0x1000000";
        assert_eq!(ruleset(&below, true).matches(set).count(), 2);
        assert!(!ruleset(&below, false).contains("meta mark set"));
        assert!(!ruleset(&Skeleton { device: None, ..below }, true).contains("meta mark set"));
        let strict = ruleset(&skeleton(Mode::Strict, Gate::Open), true);
        assert!(!strict.contains("goto record_"), "no chain that sets it is reached");
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
