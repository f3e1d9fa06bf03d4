//! The guard below strict: deny lists that count and record, and accept. What permissive and audit mode record is what strict
//! mode would drop towards protected addresses and resolvers.
//!
//! A packet of the stack that was recorded is not judged a second time at the device's egress: it bears the bit [`JUDGED`]
//! from the one hook to the other, and loses it there.
//!
//! Source: nft(8).

use std::fmt::Write as _;

use super::Skeleton;
use super::ruleset::{Family, JUDGED};
use crate::agent::netlink::MARK;

/// Flows that one set of records holds, and how long after their last packet. A set costs 16 bytes per flow that it may
/// hold, in every mode: packet sockets and resolvers have few flows, and so have protocols without ports.
const RECORDS_SIZE: u32 = 16_384;
const FEW_RECORDS_SIZE: u32 = 2_048;
pub(super) const RECORDS_TIMEOUT_S: u64 = 600;

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

    /// The one way to refuse a packet: the end of a rule.
    fn refuse(self) -> String {
        format!("counter name would_drop_{0} goto record_{0}", self.name())
    }

    /// What [`Self::refuse`] refers to, declared in every mode: counters, sets, and the chain that notes the flow and accepts.
    pub(super) fn declared(self) -> String {
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
        write!(text, "\n    chain record_{name} {{ }}").expect("a string");
        text
    }

    /// The chain that notes a flow. `note` is a rule in front of it. A later fragment is noted without ports, as is
    /// everything while the set is full.
    fn record(self, note: &str) -> String {
        let name = self.name();
        format!(
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
    }
}

/// Everything in the inet table that these modes add to the chains of every mode.
pub(super) fn inet(skeleton: &Skeleton) -> String {
    let devices = skeleton.devices.iter();
    let note: String = devices
        .map(|device| format!("\n        oifname \"{device}\" meta mark set meta mark or {JUDGED:#x}"))
        .collect();
    let refuse = Reason::Inbound.refuse();
    format!(
        "{outbound}{records}
    # Everything that comes from a protected address.
    chain inbound {{
        # A datagram of the tunnel is never a fragment.
        ip frag-off & 0x3fff != 0 {refuse}
        exthdr frag exists {refuse}
        meta l4proto udp udp sport {port} udp dport {port} accept{control}
        {refuse}
    }}
    chain open_out {{{judge}
        accept
    }}
    chain open_in {{
        ip saddr @protected4 goto inbound
        ip6 saddr @protected6 goto inbound
        accept
    }}
    chain filling_out {{{judge}
        accept
    }}
    chain filling_in {{
        accept
    }}",
        outbound = outbound(skeleton, Reason::Outbound),
        records = Reason::Outbound.record(&note) + &Reason::Inbound.record("") + &Reason::Dns.record(&note),
        port = skeleton.tunnel_port,
        control = control(skeleton.tunnel_port),
        judge = judge_outbound(),
    )
}

/// Everything in the netdev table that these modes add.
pub(super) fn netdev(skeleton: &Skeleton) -> String {
    format!(
        "{outbound}{records}
    chain open_frame {{
        meta mark and {JUDGED:#x} != 0 meta mark set meta mark and {kept:#x} accept{judge}
        accept
    }}
    chain filling_frame {{
        goto open_frame
    }}",
        outbound = outbound(skeleton, Reason::Egress),
        records = Reason::Egress.record("") + &Reason::Dns.record(""),
        kept = !JUDGED,
        judge = judge_outbound(),
    )
}

/// What passes in both directions besides the tunnel.
fn control(port: u16) -> String {
    let quotes = Family::ALL.map(|family| format!("\n        {} accept", family.quote(port)));
    format!("\n        {NEIGHBOURS}{}", quotes.concat())
}

/// The chains of what leaves, alike in both tables but for the reason to refuse it.
fn outbound(skeleton: &Skeleton, reason: Reason) -> String {
    let (refuse, refuse_dns) = (reason.refuse(), Reason::Dns.refuse());
    let Skeleton { tunnel_port: port, dns_ports, .. } = skeleton;
    let (lo, hi) = (dns_ports.start(), dns_ports.end());
    format!(
        "
    # Everything that leaves for a protected address.
    chain outbound {{
        # Datagrams of the tunnel: marked by the agent, of one of the protocol's four message types.
        meta mark {MARK:#x} meta l4proto udp udp sport {port} @th,64,32 {{ 0x01000000, 0x02000000, 0x03000000, 0x04000000 }} accept{control}
        {refuse}
    }}
    # Everything that leaves for port 53 of a resolver.
    chain resolver {{
        meta mark {MARK:#x} th sport {lo}-{hi} accept
        {refuse_dns}
    }}
    # Everything that leaves for port 53.
    chain dns {{
        ip daddr @resolvers4 goto resolver
        ip6 daddr @resolvers6 goto resolver
    }}",
        control = control(*port),
    )
}

fn judge_outbound() -> String {
    "
        ip daddr @protected4 goto outbound
        ip6 daddr @protected6 goto outbound
        udp dport 53 jump dns
        tcp dport 53 jump dns"
        .to_owned()
}
