//! The guard's text: what a [`Skeleton`] becomes for `nft -f`.
//!
//! 1. every mode and state declares the same sets, counters and regular chains, so one replaces another in place; what a
//!    mode does not use is empty
//! 2. chains that all modes share: the agent's own packets, and the closed state
//! 3. strict mode adds the chains of `strict`, permissive and audit mode those of `counting`
//! 4. the elements that the launcher knows replace those of its sets, in the same transaction
//!
//! Source: nft(8).

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::IpAddr;

use super::{DeviceName, Reason, Skeleton, counting, strict};
use crate::agent::guard::{CHAINS, EGRESS_CHAIN, NETDEV_CHAINS, TABLE};
use crate::agent::netlink::MARK;
use crate::agent::tun;
use crate::proto::directory::Protocol;
use crate::proto::ladder::Mode;

/// A bit of the mark that no part of [`MARK`] is: a packet bears it from postrouting to the device's egress, where it is
/// taken off.
pub(super) const JUDGED: u32 = 0x0100_0000;
const _: () = assert!(MARK & JUDGED == 0, "the agent's own datagrams bear no such bit");

/// Named counters of strict mode, in both tables. Those of [`Reason`] come beside them. `tencrypt status` shows all of them
/// under `guard`; the word is the same in logs.
///
/// | counter | what it counts |
/// |---|---|
/// | `outbound_postrouting` | dropped: plaintext of the pod's programs to a protected address |
/// | `outbound_egress` | dropped: plaintext of a packet socket to a protected address |
/// | `inbound` | dropped: plaintext from a protected address |
/// | `former` | dropped: a packet to an address that belonged to the project at most ten minutes ago, or that DNS alone named |
/// | `unclassified` | dropped: a packet to an address within the ranges that nothing vouches for |
/// | `nodeport_to_self` | dropped: a packet to a nodePort, hostPort or externalIP of the own project |
/// | `link_scope` | dropped: a packet to or from a link-local, loopback or multicast address |
/// | `broadcast` | dropped: a packet to a broadcast address or to 0.0.0.0/8 |
/// | `source_route` | dropped: a packet with an IPv4 source route or an IPv6 routing header |
/// | `dhcp` | dropped: a packet to or from a DHCP server, without `--allow-dhcp` |
/// | `dns_escaped` | dropped: a DNS query to a resolver that did not go through the agent |
/// | `dns_forged` | dropped: a packet from a resolver's port 53 to a port that the agent does not ask from |
/// | `marked_other` | dropped: a packet with the agent's mark that is neither a sealed datagram to a peer nor DNS to a resolver |
/// | `tun_source` | dropped: a packet out of `tenc0` whose source is neither a protected address nor a resolver |
/// | `raw` | dropped: a packet socket's packet to an address within the ranges, at link scope, or to a group |
/// | `frame` | dropped: a frame that is not IPv4, IPv6 or ARP, or whose type is not the one that the kernel was told |
/// | `no_ip` | dropped: a packet of the kernel that is neither IPv4 nor IPv6 |
/// | `not_protected` | dropped: any packet while the guard is closed |
/// | `asks` | not a drop: how often the agent was told of an unknown address within the ranges |
/// | `dns_uncaptured` | not a drop: packets to endpoints of the pod's resolvers, which the agent does not see |
/// | `link_scope_allowed` | not a drop: packets that `--allow-link-scope` let pass |
///
/// Below strict mode `would_drop_outbound`, `would_drop_egress`, `would_drop_inbound` and `would_drop_dns` count packets that
/// passed.
pub const COUNTERS: [&str; 17] = [
    "not_protected",
    "marked_other",
    "dns_forged",
    "former",
    "link_scope",
    "broadcast",
    "source_route",
    "dhcp",
    "nodeport_to_self",
    "unclassified",
    "asks",
    "tun_source",
    "no_ip",
    "frame",
    "raw",
    DNS_UNCAPTURED,
    LINK_SCOPE_ALLOWED,
];

/// Packets to endpoints of the pod's resolvers: something below the agent rewrites the resolver's address.
pub const DNS_UNCAPTURED: &str = "dns_uncaptured";

/// What `--allow-link-scope` lets pass.
const LINK_SCOPE_ALLOWED: &str = "link_scope_allowed";

/// Whether a counter of strict mode counts packets that were dropped.
#[must_use]
pub fn counts_drops(counter: &str) -> bool {
    !["asks", DNS_UNCAPTURED, LINK_SCOPE_ALLOWED].contains(&counter)
}

/// Both families have the same rules but for these words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    V4,
    V6,
}

impl Family {
    pub(super) const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The header's name, the ending of sets and chains, and the header's field that names what it carries.
    pub(super) const fn words(self) -> (&'static str, u8, &'static str) {
        match self {
            Self::V4 => ("ip", 4, "protocol"),
            Self::V6 => ("ip6", 6, "nexthdr"),
        }
    }

    pub(super) const fn icmp(self) -> &'static str {
        match self {
            Self::V4 => "icmp",
            Self::V6 => "icmpv6",
        }
    }

    /// Types of ICMP errors, for a list in braces.
    pub(super) const fn errors(self) -> &'static str {
        match self {
            Self::V4 => "destination-unreachable, time-exceeded, parameter-problem",
            Self::V6 => "destination-unreachable, packet-too-big, time-exceeded, parameter-problem",
        }
    }

    /// Matches an ICMP error that quotes a datagram of the tunnel, which came from and went to its port: without IPv4
    /// options, as it is sent.
    pub(super) fn quote(self, port: u16) -> String {
        let (icmp, errors) = (self.icmp(), self.errors());
        let quoted = match self {
            Self::V4 => format!("@th,64,8 0x45 @th,136,8 17 @th,224,16 {port} @th,240,16 {port}"),
            Self::V6 => format!("@th,112,8 17 @th,384,16 {port} @th,400,16 {port}"),
        };
        format!("{icmp} type {{ {errors} }} {quoted}")
    }

    /// Ports of DHCP's client and server.
    pub(super) const fn dhcp_ports(self) -> (u16, u16) {
        match self {
            Self::V4 => (68, 67),
            Self::V6 => (546, 547),
        }
    }

    pub(super) const fn has(self, address: &IpAddr) -> bool {
        address.is_ipv4() == matches!(self, Self::V4)
    }
}

/// The skeleton as text for `nft -f`; `egress` adds the table at the devices' egress, if there is a device.
///
/// `flush table` removes rules and keeps chains, sets, elements and counters, so the text can be loaded again at any time,
/// also for another mode or state.
#[must_use]
pub fn ruleset(skeleton: &Skeleton, egress: bool) -> String {
    let mut text = inet(skeleton);
    if egress && !skeleton.devices.is_empty() {
        text += &netdev(skeleton);
    }
    text
}

fn inet(skeleton: &Skeleton) -> String {
    let tun = tun::NAME;
    let (out, inward) = (skeleton.state.chain("out"), skeleton.state.chain("in"));
    let (policy, from_tunnel) = match skeleton.mode {
        Mode::Strict => ("drop", "goto from_tunnel"),
        Mode::Permissive | Mode::Audit => ("accept", "accept"),
    };
    let rules = match skeleton.mode {
        Mode::Strict => strict::inet(skeleton),
        Mode::Permissive | Mode::Audit => counting::inet(skeleton),
    };
    format!(
        "add table inet {TABLE}
flush table inet {TABLE}
table inet {TABLE} {{{sets}{counters}
    # Below strict: what strict mode would drop, once per packet.{records}{chains}
    chain pass {{
        meta mark set meta mark or {JUDGED:#x} accept
    }}{agents}{control}{closed}{rules}
    chain postrouting {{
        type filter hook postrouting priority 300; policy {policy};
        oifname \"lo\" accept
        oifname \"{tun}\" accept
        goto {out}
    }}
    chain prerouting {{
        type filter hook prerouting priority -450; policy {policy};
        iifname \"lo\" accept
        iifname \"{tun}\" {from_tunnel}
        goto {inward}
    }}
}}
{elements}",
        sets = sets(&INET_SETS),
        counters = counters(),
        records = [Reason::Outbound, Reason::Inbound, Reason::Dns].map(Reason::declared).concat(),
        chains = chains(CHAINS),
        agents = agents(skeleton),
        control = control(),
        closed = closed(skeleton.tunnel_port),
        elements = elements("inet", &Elements::of(skeleton).all),
    )
}

/// The table at the devices' egress: it sees frames of packet sockets too.
fn netdev(skeleton: &Skeleton) -> String {
    let rules = match skeleton.mode {
        Mode::Strict => strict::netdev(skeleton),
        Mode::Permissive | Mode::Audit => counting::netdev(skeleton),
    };
    let policy = if skeleton.mode == Mode::Strict { "drop" } else { "accept" };
    let frame = skeleton.state.chain("frame");
    let mut hooks = String::new();
    for device in &skeleton.devices {
        let _ = write!(
            hooks,
            "
    chain {chain} {{
        type filter hook egress device \"{device}\" priority 0; policy {policy};
        goto {frame}
    }}",
            chain = egress_chain(device),
        );
    }
    format!(
        "
add table netdev {TABLE}
flush table netdev {TABLE}
table netdev {TABLE} {{{sets}{counters}
    # Below strict: what strict mode would drop of packet sockets' frames.{records}{chains}{closed}{rules}{hooks}
}}
{elements}",
        sets = sets(&NETDEV_SETS),
        counters = counters(),
        records = [Reason::Egress, Reason::Dns].map(Reason::declared).concat(),
        chains = chains(NETDEV_CHAINS),
        closed = closed_frames(skeleton),
        elements = elements("netdev", &Elements::of(skeleton).netdev()),
    )
}

/// The name of the base chain at a device's egress.
pub(super) fn egress_chain(device: &DeviceName) -> String {
    EGRESS_CHAIN.to_owned() + &crate::agent::guard::chain_suffix(&device.to_string())
}

/// Name without the family, type, and what follows it.
type Declared = (&'static str, &'static str, &'static str);

/// `protected`, `peers`, `former` and `released` are the agent's, the dynamic ones the rules' own, the others the launcher's.
const INET_SETS: [Declared; 14] = [
    ("protected", "ADDRESS", ""),
    ("peers", "ADDRESS", ""),
    ("former", "ADDRESS", ""),
    // 4,096 for the agent, and room for those that take the place of others in one batch.
    ("released", "ADDRESS", "flags timeout; timeout 10m; size 4608;"),
    ("resolvers", "ADDRESS", ""),
    ("nodes", "ADDRESS", ""),
    ("externals", "ADDRESS . inet_proto . inet_service", ""),
    ("resolver_endpoints", "ADDRESS . inet_proto . inet_service", ""),
    // Destinations with a rule of their own: one look-up for all kinds.
    ("special", "ADDRESS", ""),
    ("asked", "ADDRESS", "flags dynamic,timeout; timeout 1s; size 128;"),
    ("seen", "ADDRESS", "flags dynamic,timeout; timeout 10m; size 1024;"),
    ("fresh", "ADDRESS", "flags dynamic,timeout; timeout 2s; size 128;"),
    (
        "answering",
        "ADDRESS . inet_proto . inet_service . inet_service",
        "flags dynamic,timeout; timeout 2s; size 1024;",
    ),
    ("gateways", "ifname . ADDRESS", ""),
];
const NETDEV_SETS: [Declared; 2] = [("protected", "ADDRESS", ""), ("resolvers", "ADDRESS", "")];

fn sets(declared: &[Declared]) -> String {
    let mut text = String::new();
    for (name, kind, rest) in declared {
        for (n, address) in [(4, "ipv4_addr"), (6, "ipv6_addr")] {
            let kind = kind.replace("ADDRESS", address);
            let _ = write!(text, "\n    set {name}{n} {{ type {kind}; {rest} }}");
        }
    }
    if declared.len() == INET_SETS.len() {
        text += "\n    set node_ports { type inet_proto . inet_service; }\n    set broadcasts4 { type ipv4_addr; }";
    }
    text
}

fn counters() -> String {
    COUNTERS.map(|name| format!("\n    counter {name} {{ }}")).concat()
}

/// Declared before there are rules in them: a mode leaves those of others empty.
fn chains(names: &[&str]) -> String {
    let hooks = ["postrouting", "prerouting"];
    let regular = names.iter().filter(|name| !hooks.contains(name) && !name.starts_with("record_"));
    regular.map(|name| format!("\n    chain {name} {{ }}")).collect()
}

/// What bears the agent's mark: without options, extension headers and fragments. Anything else that bears it is dropped.
fn agents(skeleton: &Skeleton) -> String {
    let Skeleton { tunnel_port: port, dns_ports, .. } = skeleton;
    let (lo, hi) = (dns_ports.start(), dns_ports.end());
    let mut text = "
    chain agents {
        meta nfproto ipv4 goto agents4
        meta nfproto ipv6 goto agents6
        counter name marked_other drop
    }
    # Type 4 may be a train of segments: the word of the first is all that is seen.
    chain tunnel {
        @th,64,32 0x04000000 udp length >= 40 goto pass
        @th,64,32 0x01000000 udp length 156 goto pass
        @th,64,32 0x02000000 udp length 100 goto pass
        @th,64,32 0x03000000 udp length 72 goto pass
        counter name marked_other drop
    }"
    .to_owned();
    for family in Family::ALL {
        let (ip, n, l4) = family.words();
        let plain = match family {
            Family::V4 => {
                "
        @nh,0,8 != 0x45 counter name marked_other drop
        ip frag-off & 0x3fff != 0 counter name marked_other drop"
            }
            Family::V6 => "",
        };
        let _ = write!(
            text,
            "
    chain agents{n} {{{plain}
        {ip} daddr @peers{n} {ip} {l4} udp udp sport {port} udp dport {port} goto tunnel
        # A resolver that belongs to the project is asked through the tunnel.
        {ip} daddr @protected{n} counter name marked_other drop
        {ip} daddr @resolvers{n} {ip} {l4} udp udp sport {lo}-{hi} udp dport 53 goto pass
        {ip} daddr @resolvers{n} {ip} {l4} tcp tcp sport {lo}-{hi} tcp dport 53 goto pass
        counter name marked_other drop
    }}"
        );
    }
    // A forged answer for the application's own port. Later fragments of an answer pass: without their first they are
    // nothing, and in those of IPv4 nft would take payload for ports.
    let _ = write!(
        text,
        "
    chain resolver_in {{
        ip frag-off & 0x1fff != 0 accept
        frag frag-off != 0 accept
        th sport 53 th dport {lo}-{hi} accept
        th sport 53 counter name dns_forged drop
    }}"
    );
    text
}

/// Neighbour discovery, which routers do not forward, and MLD.
fn control() -> String {
    "
    chain control_out6 {
        icmpv6 type 133-137 ip6 hoplimit 255 goto pass
        icmpv6 type 130-132 ip6 hoplimit 1 goto pass
        icmpv6 type 143 ip6 hoplimit 1 goto pass
    }
    chain control_in6 {
        icmpv6 type 133-137 ip6 hoplimit 255 accept
        icmpv6 type 130-132 ip6 hoplimit 1 accept
        icmpv6 type 143 ip6 hoplimit 1 accept
    }"
    .to_owned()
}

/// The closed state: nothing passes but what the agent needs to protect the pod.
fn closed(port: u16) -> String {
    let from_peers = Family::ALL.map(Family::words).map(|(ip, n, l4)| {
        format!(
            "
        {ip} saddr @resolvers{n} jump resolver_in
        {ip} saddr @peers{n} {ip} {l4} udp udp sport {port} udp dport {port} accept"
        )
    });
    format!(
        "
    chain closed_out {{
        meta mark {MARK:#x} goto agents
        meta l4proto icmpv6 jump control_out6
        counter name not_protected drop
    }}
    chain closed_in {{
        meta l4proto icmpv6 jump control_in6
        # The first fragment would look like a datagram of the tunnel.
        ip frag-off & 0x3fff != 0 counter name not_protected drop{from_peers}
        counter name not_protected drop
    }}",
        from_peers = from_peers.concat(),
    )
}

/// The closed state at egress: of what bears the bit, marked packets and neighbour discovery alone were let out.
fn closed_frames(skeleton: &Skeleton) -> String {
    let marked = MARK | JUDGED;
    format!(
        "
    chain arp_frame {{
        meta length 42-60 accept
        counter name frame drop
    }}
    chain closed_frame {{
        ether type arp meta protocol arp goto arp_frame
        ip daddr @protected4 goto closed_tunnel4
        ip6 daddr @protected6 goto closed_tunnel6
        meta mark {marked:#x} meta mark set {MARK:#x} accept
        icmpv6 type 133-137 ip6 hoplimit 255 meta mark set meta mark & {unjudged:#x} accept
        icmpv6 type 130-132 ip6 hoplimit 1 meta mark set meta mark & {unjudged:#x} accept
        icmpv6 type 143 ip6 hoplimit 1 meta mark set meta mark & {unjudged:#x} accept
        counter name not_protected drop
    }}
    chain closed_tunnel4 {{{tunnel4}
        counter name not_protected drop
    }}
    chain closed_tunnel6 {{{tunnel6}
        icmpv6 type 133-137 ip6 hoplimit 255 meta mark set meta mark & {unjudged:#x} accept
        counter name not_protected drop
    }}",
        unjudged = !JUDGED,
        tunnel4 = strict::tunnel_frames(skeleton.tunnel_port, Family::V4),
        tunnel6 = strict::tunnel_frames(skeleton.tunnel_port, Family::V6),
    )
}

/// What the launcher's sets hold, by the set's name without its family.
struct Elements {
    all: Vec<(String, BTreeSet<String>)>,
}

impl Elements {
    fn of(skeleton: &Skeleton) -> Self {
        let facts = &skeleton.facts;
        let mut all = Vec::new();
        for family in Family::ALL {
            let (_, n, _) = family.words();
            let addresses = |found: &mut dyn Iterator<Item = IpAddr>| -> BTreeSet<String> {
                found.filter(|address| family.has(address)).map(|address| address.to_string()).collect()
            };
            let resolvers = addresses(&mut skeleton.resolvers.iter().copied());
            let nodes = addresses(&mut facts.known_nodes().copied());
            let externals = facts.externals.iter().filter(|(address, ..)| family.has(address));
            let gateways: BTreeSet<String> = match family {
                Family::V4 => BTreeSet::new(),
                Family::V6 => {
                    facts.gateways.iter().map(|(device, a)| format!("\"{device}\" . {a}")).collect()
                }
            };
            let broadcasts: BTreeSet<String> = match family {
                Family::V4 => facts.broadcasts.iter().map(ToString::to_string).collect(),
                Family::V6 => BTreeSet::new(),
            };
            let endpoints = facts.known_resolver_endpoints().filter(|(address, ..)| family.has(address));
            let with_ports = externals.clone().chain(endpoints.clone()).map(|(a, ..)| a.to_string());
            let special = resolvers.iter().chain(&nodes).chain(&broadcasts).cloned().chain(with_ports);
            all.push((format!("special{n}"), special.collect()));
            let port = |(address, protocol, port): &(IpAddr, Protocol, u16)| {
                format!("{address} . {} . {port}", *protocol as u8)
            };
            all.push((format!("externals{n}"), externals.map(port).collect()));
            all.push((format!("resolver_endpoints{n}"), endpoints.map(port).collect()));
            all.push((format!("resolvers{n}"), resolvers));
            all.push((format!("nodes{n}"), nodes));
            all.push((format!("gateways{n}"), gateways));
            if family == Family::V4 {
                all.push(("broadcasts4".to_owned(), broadcasts));
            }
        }
        let ports = facts.node_ports.iter().map(|(protocol, port)| format!("{} . {port}", *protocol as u8));
        all.push(("node_ports".to_owned(), ports.collect()));
        Self { all }
    }

    fn netdev(self) -> Vec<(String, BTreeSet<String>)> {
        self.all.into_iter().filter(|(set, _)| set.starts_with("resolvers")).collect()
    }
}

/// Replaces what these sets hold.
fn elements(table: &str, sets: &[(String, BTreeSet<String>)]) -> String {
    /// Elements per line: nft reads a line at a time.
    const LINE: usize = 1_000;
    let mut text = String::new();
    for (set, elements) in sets {
        let _ = writeln!(text, "flush set {table} {TABLE} {set}");
        let elements: Vec<&str> = elements.iter().map(String::as_str).collect();
        for line in elements.chunks(LINE) {
            let _ = writeln!(text, "add element {table} {TABLE} {set} {{ {} }}", line.join(", "));
        }
    }
    text
}

#[cfg(test)]
#[path = "ruleset_tests.rs"]
mod tests;
