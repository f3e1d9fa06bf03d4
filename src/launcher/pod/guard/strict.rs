//! The strict guard: rules that say what may leave and enter the pod. Everything else is dropped with a counted reason.
//!
//! Out (postrouting, every device but `lo` and `tenc0`), in the order of judgement:
//!
//! 1. what bears the agent's mark: sealed datagrams to a peer, DNS to a resolver; nothing else
//! 2. neighbour discovery and MLD
//! 3. a protected address: only ICMP errors that quote a sealed datagram
//! 4. addresses with a rule of their own (`special`): resolvers and their endpoints, nodes, externalIPs, directed broadcasts
//! 5. by scope: an address within the ranges only if it is vouched for; link scope, groups and broadcast not at all;
//!    everything else passes
//!
//! In (prerouting, before defragmentation): the same partition by source. From `tenc0` only protected sources and resolvers
//! enter, so that the pod's stack cannot be made to answer a stranger in clear.
//!
//! A load balancer at socket level (Cilium's) replaces a resolver's address by that of an endpoint before the kernel looks for
//! a route, so the agent sees no query. Endpoints of the pod's resolvers are outside of the project: their ports for DNS
//! pass, and are counted (`dns_uncaptured`), so that status says `dns not captured (socket LB)`.
//!
//! A device's egress hook sees the frames of packet sockets, which no other hook sees. Tables cannot share sets: postrouting
//! marks what it accepted with the bit [`JUDGED`]; egress looks for the address in its own `protected` set first, then
//! believes the bit and takes it off. A frame without the bit passes only to addresses outside of every range.
//!
//! While a transaction replaces rules, a packet under way runs the old rules on the new generation of elements. Therefore
//! sets are kept and refilled in place, there are no maps, and no rule accepts because a look-up missed.
//!
//! Source: nft(8).

use std::net::IpAddr;

use ipnet::IpNet;

use super::Skeleton;
use super::ruleset::{Family, JUDGED};
use crate::agent::guard::LOG_GROUP;
use crate::agent::netlink::MARK;

/// Mark and bit of an agent's packet between postrouting and egress.
const MARKED: u32 = MARK | JUDGED;

/// Everything in the inet table that strict mode adds to the chains of every mode.
pub(super) fn inet(skeleton: &Skeleton) -> String {
    let mut text = common(skeleton);
    for family in Family::ALL {
        text += &protected(skeleton, family);
        text += &outbound(skeleton, family);
        text += &scope_out(skeleton, family);
        text += &range_out(skeleton, family);
        text += &inbound(skeleton, family);
        text += &scope_in(skeleton, family);
        text += &range_in(skeleton, family);
    }
    text + &states()
}

/// Chains that do not depend on the family.
fn common(skeleton: &Skeleton) -> String {
    let [link_scope, broadcast] = match skeleton.allow_link_scope {
        true => ["link_scope_allowed goto pass"; 2],
        false => ["link_scope drop", "broadcast drop"],
    };
    format!(
        "
    chain ip_options {{
        ip option lsrr exists counter name source_route drop
        ip option ssrr exists counter name source_route drop
    }}
    chain link_scope {{
        counter name {link_scope}
    }}
    chain to_all {{
        counter name {broadcast}
    }}
    # Towards a node: everything but the ports that lead back into the project.
    chain node_out {{
        meta l4proto . th dport @node_ports counter name nodeport_to_self drop{dhcp4}{dhcp6}
        goto pass
    }}
    # From tenc0. ICMP errors of a resolver: port 53 is closed there.
    chain from_tunnel {{
        ip saddr @protected4 accept
        ip6 saddr @protected6 accept
        ip saddr @resolvers4 udp sport 53 accept
        ip saddr @resolvers4 tcp sport 53 accept
        ip saddr @resolvers4 icmp type destination-unreachable accept
        ip6 saddr @resolvers6 udp sport 53 accept
        ip6 saddr @resolvers6 tcp sport 53 accept
        ip6 saddr @resolvers6 icmpv6 type destination-unreachable accept
        counter name tun_source drop
    }}",
        dhcp4 = dhcp_out(skeleton, Family::V4),
        dhcp6 = dhcp_out(skeleton, Family::V6),
    )
}

/// A DHCP client's requests: runtimes let any program bind its port.
fn dhcp_out(skeleton: &Skeleton, family: Family) -> String {
    let (client, server) = family.dhcp_ports();
    if skeleton.allow_dhcp {
        format!("\n        udp sport {client} udp dport {server} goto pass")
    } else {
        format!("\n        udp dport {server} counter name dhcp drop")
    }
}

/// What may pass in clear between the pod and a protected address.
fn protected(skeleton: &Skeleton, family: Family) -> String {
    let (ip, n, l4) = family.words();
    let (port, quote) = (skeleton.tunnel_port, family.quote(skeleton.tunnel_port));
    let fragment = match family {
        // A datagram of the tunnel is never a fragment.
        Family::V4 => "\n        ip frag-off & 0x3fff != 0 counter name inbound drop",
        Family::V6 => "",
    };
    format!(
        "
    chain protected_out{n} {{
        {quote} goto pass
        {ip} daddr @former{n} counter name former drop
        counter name outbound_postrouting drop
    }}
    chain protected_in{n} {{{fragment}
        {ip} {l4} udp udp sport {port} udp dport {port} accept
        {quote} accept
        counter name inbound drop
    }}"
    )
}

fn outbound(skeleton: &Skeleton, family: Family) -> String {
    let (ip, n, _) = family.words();
    let dhcp = dhcp_out(skeleton, family);
    let (options, broadcasts, whole) = match family {
        Family::V4 => (
            "
        @nh,0,8 != 0x45 jump ip_options",
            "
        ip daddr @broadcasts4 goto to_all",
            "ip frag-off & 0x1fff == 0 ",
        ),
        Family::V6 => (
            "
        exthdr rt exists counter name source_route drop
        meta l4proto icmpv6 jump control_out6",
            "",
            "",
        ),
    };
    format!(
        "
    chain out{n} {{{options}
        {ip} daddr @protected{n} goto protected_out{n}
        {ip} daddr @special{n} goto special_out{n}{dhcp}
        goto scope_out{n}
    }}
    chain special_out{n} {{
        {ip} daddr @resolvers{n} udp dport 53 counter name dns_escaped drop
        {ip} daddr @resolvers{n} tcp dport 53 counter name dns_escaped drop
        {whole}{ip} daddr . meta l4proto . th dport @resolver_endpoints{n} counter name dns_uncaptured goto pass
        {ip} daddr . meta l4proto . th dport @externals{n} counter name nodeport_to_self drop
        {ip} daddr @nodes{n} goto node_out{broadcasts}{dhcp}
        goto scope_out{n}
    }}"
    )
}

/// By destination. Comparisons, for up to some eight ranges faster than a set of intervals.
fn scope_out(skeleton: &Skeleton, family: Family) -> String {
    let (ip, n, _) = family.words();
    let nodes =
        rules(skeleton.facts.node_ranges.iter(), family, |net| format!("{ip} daddr {net} goto node_out"));
    let ranges = rules(skeleton.ranges.iter(), family, |net| format!("{ip} daddr {net} goto range_out{n}"));
    let scopes = match family {
        Family::V4 => {
            "
        ip daddr >= 224.0.0.0 goto group_out4
        ip daddr 0.0.0.0/8 goto to_all
        ip daddr 127.0.0.0/8 goto link_scope
        goto pass
    }
    chain group_out4 {
        ip daddr >= 240.0.0.0 goto to_all
        ip protocol igmp ip ttl 1 goto pass
        goto link_scope
    }"
        }
        Family::V6 => {
            "
        ip6 daddr ::/96 goto link_scope
        ip6 daddr ::ffff:0.0.0.0/96 goto link_scope
        ip6 daddr fe80::/10 goto link_out6
        ip6 daddr ff00::/8 goto link_scope
        goto pass
    }
    chain link_out6 {
        oifname . ip6 daddr @gateways6 goto node_out
        goto link_scope
    }"
        }
    };
    format!(
        "
    chain scope_out{n} {{{nodes}{ranges}{scopes}"
    )
}

/// An address within the ranges that no rule names: passes if it is vouched for, or answers a flow of its own. Else it is
/// dropped, and the agent is told once per address and second; which address it is, the agent reads from the set.
fn range_out(skeleton: &Skeleton, family: Family) -> String {
    let (ip, n, _) = family.words();
    let exempt = exempt(skeleton, family, "d", "goto pass");
    let errors = family.errors();
    let icmp = family.icmp();
    format!(
        "
    chain range_out{n} {{
        {ip} daddr @released{n} goto pass{exempt}
        {ip} daddr . meta l4proto . th dport . th sport @answering{n} goto pass
        {icmp} type {{ echo-reply, {errors} }} {ip} daddr @fresh{n} goto pass
        {ip} daddr @asked{n} counter name unclassified drop
        add @asked{n} {{ {ip} daddr }} counter name asks {log}
        counter name unclassified drop
    }}",
        log = log(),
    )
}

/// `queue-threshold 1`: the event comes at once. No payload: it names nobody.
fn log() -> String {
    format!("log group {LOG_GROUP} snaplen 0 queue-threshold 1")
}

/// Exemptions: of `s`ources or `d`estinations.
fn exempt(skeleton: &Skeleton, family: Family, side: &str, verdict: &str) -> String {
    let (ip, ..) = family.words();
    let of_family = skeleton.exempt.iter().filter(|exemption| family.is_of(exemption.net));
    of_family
        .map(|exemption| {
            let net = exemption.net;
            match exemption.port {
                None => format!("\n        {ip} {side}addr {net} {verdict}"),
                Some(port) => ["tcp", "udp", "sctp"]
                    .iter()
                    .map(|l4| format!("\n        {ip} {side}addr {net} {l4} {side}port {port} {verdict}"))
                    .collect(),
            }
        })
        .collect()
}

fn inbound(skeleton: &Skeleton, family: Family) -> String {
    let (ip, n, _) = family.words();
    let (client, server) = family.dhcp_ports();
    let dhcp = if skeleton.allow_dhcp {
        format!("\n        udp sport {server} udp dport {client} accept")
    } else {
        format!("\n        udp sport {server} udp dport {client} counter name dhcp drop")
    };
    let (control, groups) = match family {
        Family::V4 => (
            "
        @nh,0,8 != 0x45 jump ip_options
        ip protocol igmp ip ttl 1 accept",
            "
        ip daddr >= 240.0.0.0 goto to_all
        ip daddr >= 224.0.0.0 goto link_scope
        ip daddr @broadcasts4 goto to_all",
        ),
        Family::V6 => (
            "
        exthdr rt exists counter name source_route drop
        meta l4proto icmpv6 jump control_in6",
            "
        ip6 daddr ff00::/8 goto link_scope",
        ),
    };
    format!(
        "
    chain in{n} {{{control}
        {ip} saddr @protected{n} goto protected_in{n}
        {ip} saddr @resolvers{n} jump resolver_in{dhcp}{groups}
        goto scope_in{n}
    }}"
    )
}

/// By source.
fn scope_in(skeleton: &Skeleton, family: Family) -> String {
    let (ip, n, _) = family.words();
    let nodes = rules(skeleton.facts.node_ranges.iter(), family, |net| format!("{ip} saddr {net} accept"));
    let ranges = rules(skeleton.ranges.iter(), family, |net| format!("{ip} saddr {net} goto range_in{n}"));
    let errors = family.errors();
    let scopes = match family {
        Family::V4 => "
        ip saddr >= 224.0.0.0 goto to_all
        ip saddr 0.0.0.0/8 goto to_all
        ip saddr 127.0.0.0/8 goto link_scope
        accept
    }"
        .to_owned(),
        Family::V6 => format!(
            "
        ip6 saddr ::/96 goto link_scope
        ip6 saddr ::ffff:0.0.0.0/96 goto link_scope
        ip6 saddr fe80::/10 goto link_in6
        ip6 saddr ff00::/8 goto link_scope
        accept
    }}
    chain link_in6 {{
        iifname . ip6 saddr @gateways6 accept
        icmpv6 type {{ {errors} }} accept
        goto link_scope
    }}"
        ),
    };
    format!(
        "
    chain scope_in{n} {{{nodes}{ranges}{scopes}"
    )
}

/// A source within the ranges. One that no object is known to name passes and is asked about; for two seconds its flows may
/// be answered, once in ten minutes. `add` never prolongs an element, so spoofed packets renew nothing.
fn range_in(skeleton: &Skeleton, family: Family) -> String {
    let (ip, n, _) = family.words();
    let exempt = exempt(skeleton, family, "s", "accept");
    let (icmp, errors) = (family.icmp(), family.errors());
    format!(
        "
    chain range_in{n} {{
        {ip} saddr @nodes{n} accept
        {ip} saddr @released{n} accept{exempt}
        {ip} saddr @resolvers{n} accept
        # The answer to a query that a load balancer at socket level sent there.
        {ip} saddr . meta l4proto . th sport @resolver_endpoints{n} accept
        # An error is not answered: no event, no window.
        {icmp} type {{ {errors} }} accept
        {ip} saddr @fresh{n} goto flow_in{n}
        {ip} saddr @seen{n} accept
        add @seen{n} {{ {ip} saddr }} add @fresh{n} {{ {ip} saddr }} counter name asks {log} goto flow_in{n}
        accept
    }}
    chain flow_in{n} {{
        tcp sport 0-65535 add @answering{n} {{ {ip} saddr . meta l4proto . th sport . th dport }} accept
        udp sport 0-65535 add @answering{n} {{ {ip} saddr . meta l4proto . th sport . th dport }} accept
        sctp sport 0-65535 add @answering{n} {{ {ip} saddr . meta l4proto . th sport . th dport }} accept
        accept
    }}",
        log = log(),
    )
}

/// The last step of both hooks, by state; `closed` is common to all modes.
fn states() -> String {
    format!(
        "
    chain open_out {{
        meta mark {MARK:#x} goto agents
        meta nfproto ipv4 goto out4
        meta nfproto ipv6 goto out6
        counter name no_ip drop
    }}
    chain open_in {{
        meta nfproto ipv4 goto in4
        meta nfproto ipv6 goto in6
        counter name no_ip drop
    }}
    chain filling_out {{
        meta mark {MARK:#x} goto agents
        ip daddr @protected4 goto protected_out4
        ip6 daddr @protected6 goto protected_out6
        goto pass
    }}
    chain filling_in {{
        ip saddr @protected4 goto protected_in4
        ip6 saddr @protected6 goto protected_in6
        accept
    }}"
    )
}

/// Everything in the netdev table that strict mode adds.
pub(super) fn netdev(skeleton: &Skeleton) -> String {
    let mut text = String::new();
    for family in Family::ALL {
        text += &frames(skeleton, family);
    }
    let states = format!(
        "
    # The stack's packets were judged before; whether their address is protected by now is asked once more.
    chain judged {{
        ip daddr @protected4 goto protected4
        ip6 daddr @protected6 goto protected6
        meta mark set meta mark & {unjudged:#x} accept
    }}
    # The frame's own type beside the kernel's label, which a packet socket chooses.
    chain open_frame {{
        meta mark & {JUDGED:#x} != 0 goto judged
        ether type ip meta protocol ip goto raw4
        ether type ip6 meta protocol ip6 goto raw6
        ether type arp meta protocol arp goto arp_frame
        counter name frame drop
    }}
    chain filling_frame {{
        ip daddr @protected4 goto protected4
        ip6 daddr @protected6 goto protected6
        meta mark set meta mark & {unjudged:#x} accept
    }}",
        unjudged = !JUDGED,
    );
    text + &states
}

/// Frames of packet sockets.
fn frames(skeleton: &Skeleton, family: Family) -> String {
    let (ip, n, _) = family.words();
    let ranges =
        rules(skeleton.ranges.iter(), family, |net| format!("{ip} daddr {net} counter name raw drop"));
    let dhcp = match family {
        Family::V4 if skeleton.allow_dhcp => "\n        udp sport 68 udp dport 67 accept",
        _ => "",
    };
    let (options, control, scopes) = match family {
        Family::V4 => (
            "\n        @nh,0,8 != 0x45 counter name raw drop",
            "",
            "
        ip daddr >= 224.0.0.0 counter name raw drop
        ip daddr 0.0.0.0/8 counter name raw drop
        ip daddr 127.0.0.0/8 counter name raw drop",
        ),
        Family::V6 => (
            "\n        exthdr rt exists counter name raw drop",
            "
        icmpv6 type 133-137 ip6 hoplimit 255 accept
        icmpv6 type 130-132 ip6 hoplimit 1 accept
        icmpv6 type 143 ip6 hoplimit 1 accept",
            "
        ip6 daddr ::/96 counter name raw drop
        ip6 daddr ::ffff:0.0.0.0/96 counter name raw drop
        ip6 daddr fe80::/10 counter name raw drop
        ip6 daddr ff00::/8 counter name raw drop",
        ),
    };
    format!(
        "
    # Within the ranges, at link scope and to groups packet sockets send nothing; it is not even asked about.
    chain raw{n} {{{options}
        {ip} daddr @protected{n} goto protected{n}{dhcp}{control}
        ether daddr & 01:00:00:00:00:00 != 00:00:00:00:00:00 counter name raw drop
        {ip} daddr @resolvers{n} udp dport 53 counter name dns_escaped drop
        {ip} daddr @resolvers{n} tcp dport 53 counter name dns_escaped drop{ranges}{scopes}
        accept
    }}
    # Sealed, neighbour discovery, or an ICMP error that quotes a sealed datagram.
    chain protected{n} {{{tunnel}{neighbours}
        {quote} accept
        counter name outbound_egress drop
    }}",
        tunnel = tunnel_frames(skeleton.tunnel_port, family),
        neighbours = match family {
            Family::V4 => "",
            Family::V6 => "\n        icmpv6 type 133-137 ip6 hoplimit 255 accept",
        },
        quote = family.quote(skeleton.tunnel_port),
    )
}

/// Sealed datagrams at egress: one rule for each type word.
pub(super) fn tunnel_frames(port: u16, family: Family) -> String {
    let plain = match family {
        Family::V4 => "@nh,0,8 0x45 ip frag-off & 0x3fff == 0 ip protocol udp",
        Family::V6 => "ip6 nexthdr udp",
    };
    ["0x04000000", "0x01000000", "0x02000000", "0x03000000"]
        .map(|word| {
            format!(
                "\n        meta mark {MARKED:#x} {plain} udp sport {port} udp dport {port} @th,64,32 {word} meta mark set {MARK:#x} accept"
            )
        })
        .concat()
}

/// A rule for each network of a family.
fn rules(nets: impl Iterator<Item = IpNet>, family: Family, rule: impl Fn(IpNet) -> String) -> String {
    nets.filter(|net| family.is_of(*net)).map(|net| format!("\n        {}", rule(net))).collect()
}

impl Family {
    pub(super) fn is_of(self, net: IpNet) -> bool {
        matches!((self, net.addr()), (Self::V4, IpAddr::V4(_)) | (Self::V6, IpAddr::V6(_)))
    }
}
