//! The routing rules of one pod: which traffic looks into our tables, and which never does.
//!
//! ```text
//!  97: from OWN to ADDRESS ipproto tcp|udp sport P dport Q goto 109 or lookup T53     a flow that keeps its path
//!  98: to RESOLVER ipproto udp|tcp sport LO-HI dport 53   goto 109   the agent's sockets towards the resolver
//!  99: ipproto udp sport TUNNEL_PORT                      goto 109   datagrams of the tunnel
//! 100: fwmark MARK                                        goto 109   the agent's own marked sockets
//! 101: to RESOLVER ipproto udp|tcp dport 53               lookup T53
//! 105:                                                    lookup T
//! 109: nop
//! ```
//!
//! 98 and 99 exist for the reverse look-up of rp_filter, which sees ports (swapped) but no mark. It sees addresses swapped,
//! too, so 97 holds for both directions of its flow. The rules 97 come and go with their flows (pins.rs).
//!
//! Source: net/core/fib_rules.c; ip-rule(8).

use std::net::IpAddr;
use std::ops::RangeInclusive;

use netlink_packet_route::AddressFamily;
use netlink_packet_route::IpProtocol;
use netlink_packet_route::route::RouteProtocol;
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage, RulePortRange};

use super::{MARK, PROTOCOL, T, T53};
use crate::proto::nat::Tuple;
use crate::wire::packet::protocol;

/// Priority of the rules for flows that keep their path.
pub const PINNED: u32 = 97;
/// Priority of the rule for the agent's sockets towards the resolver.
pub const UPSTREAM: u32 = 98;
/// Priority of the rule for datagrams of the tunnel.
pub const TUNNEL: u32 = 99;
/// Priority of the rule for marked sockets.
pub const MARKED: u32 = 100;
/// Priority of the rule that captures DNS.
pub const DNS: u32 = 101;
/// Priority of the rule that captures protected destinations.
pub const PROTECTED: u32 = 105;
/// Priority of the rule that the exceptions jump to; what follows are the pod's own rules.
pub const REST: u32 = 109;

const DNS_PORT: RangeInclusive<u16> = 53..=53;

/// What the rules of a pod depend on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capture {
    /// The pod's own addresses; a family without one gets no rules.
    pub own: Vec<IpAddr>,
    /// Resolvers whose port 53 is captured.
    pub resolvers: Vec<IpAddr>,
    /// LO-HI: the ports of the agent's own sockets towards the resolvers.
    pub dns_ports: RangeInclusive<u16>,
    /// UDP port of the tunnel, ours and every peer's.
    pub tunnel_port: u16,
}

/// One rule, as far as it concerns us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) priority: u32,
    pub(super) ipv6: bool,
    from: Option<IpAddr>,
    to: Option<IpAddr>,
    protocol: Option<IpProtocol>,
    source_ports: Option<RangeInclusive<u16>>,
    destination_ports: Option<RangeInclusive<u16>>,
    mark: Option<u32>,
    verdict: Verdict,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Goto(u32),
    Lookup(u32),
    Nop,
}

/// The rules to be in place before the tables' routes, and those after, of both families: exceptions come before what they except from.
pub(super) fn wanted(capture: &Capture) -> (Vec<Rule>, Vec<Rule>) {
    let (mut exceptions, mut captures) = (Vec::new(), Vec::new());
    for ipv6 in [false, true] {
        if !capture.own.iter().any(|own| own.is_ipv6() == ipv6) {
            continue;
        }
        let rule = |priority, verdict| Rule {
            priority,
            ipv6,
            from: None,
            to: None,
            protocol: None,
            source_ports: None,
            destination_ports: None,
            mark: None,
            verdict,
        };
        let exception = |priority| rule(priority, Verdict::Goto(REST));
        let port = capture.tunnel_port;
        exceptions.push(rule(REST, Verdict::Nop));
        exceptions.push(Rule {
            protocol: Some(IpProtocol::Udp),
            source_ports: Some(port..=port),
            ..exception(TUNNEL)
        });
        let resolvers = || {
            let own_family = capture.resolvers.iter().filter(move |r| r.is_ipv6() == ipv6);
            own_family.flat_map(|to| [IpProtocol::Udp, IpProtocol::Tcp].map(|protocol| (*to, protocol)))
        };
        exceptions.extend(resolvers().map(|(to, protocol)| Rule {
            to: Some(to),
            protocol: Some(protocol),
            source_ports: Some(capture.dns_ports.clone()),
            destination_ports: Some(DNS_PORT),
            ..exception(UPSTREAM)
        }));
        exceptions.push(Rule { mark: Some(MARK), ..exception(MARKED) });
        captures.push(rule(PROTECTED, Verdict::Lookup(T)));
        captures.extend(resolvers().map(|(to, protocol)| Rule {
            to: Some(to),
            protocol: Some(protocol),
            destination_ports: Some(DNS_PORT),
            ..rule(DNS, Verdict::Lookup(T53))
        }));
    }
    (exceptions, captures)
}

impl Rule {
    /// The rule that keeps a flow of TCP or UDP sealed, or in clear; `None` for other protocols.
    pub(super) fn pinned(tuple: &Tuple, sealed: bool) -> Option<Self> {
        Some(Self {
            priority: PINNED,
            ipv6: tuple.remote.0.is_ipv6(),
            from: Some(tuple.local.0),
            to: Some(tuple.remote.0),
            protocol: Some(match tuple.protocol {
                protocol::TCP => IpProtocol::Tcp,
                protocol::UDP => IpProtocol::Udp,
                _ => return None,
            }),
            source_ports: Some(tuple.local.1..=tuple.local.1),
            destination_ports: Some(tuple.remote.1..=tuple.remote.1),
            mark: None,
            verdict: if sealed { Verdict::Lookup(T53) } else { Verdict::Goto(REST) },
        })
    }

    /// The flow that this rule pins, and whether sealed.
    pub(super) fn pin(&self) -> Option<(Tuple, bool)> {
        let protocol = match self.protocol? {
            IpProtocol::Tcp => protocol::TCP,
            IpProtocol::Udp => protocol::UDP,
            _ => return None,
        };
        let local = (self.from?, *self.source_ports.as_ref()?.start());
        let remote = (self.to?, *self.destination_ports.as_ref()?.start());
        let sealed = matches!(self.verdict, Verdict::Lookup(_));
        (self.priority == PINNED).then_some((Tuple { protocol, local, remote }, sealed))
    }

    /// Whether packets go into `tenc0` because of it.
    pub(super) fn captures(&self) -> bool {
        matches!(self.verdict, Verdict::Lookup(_))
    }

    pub(super) fn message(&self) -> RuleMessage {
        let mut message = RuleMessage::default();
        message.header.family = if self.ipv6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
        let attributes = &mut message.attributes;
        attributes.push(RuleAttribute::Priority(self.priority));
        attributes.push(RuleAttribute::Protocol(RouteProtocol::Other(PROTOCOL)));
        message.header.action = match self.verdict {
            Verdict::Goto(target) => {
                attributes.push(RuleAttribute::Goto(target));
                RuleAction::Goto
            }
            Verdict::Lookup(table) => {
                attributes.push(RuleAttribute::Table(table));
                RuleAction::ToTable
            }
            Verdict::Nop => RuleAction::Nop,
        };
        if let Some(from) = self.from {
            message.header.src_len = if from.is_ipv6() { 128 } else { 32 };
            attributes.push(RuleAttribute::Source(from));
        }
        if let Some(to) = self.to {
            message.header.dst_len = if to.is_ipv6() { 128 } else { 32 };
            attributes.push(RuleAttribute::Destination(to));
        }
        let range = |ports: &RangeInclusive<u16>| RulePortRange { start: *ports.start(), end: *ports.end() };
        attributes.extend(self.protocol.map(RuleAttribute::IpProtocol));
        attributes.extend(self.source_ports.as_ref().map(range).map(RuleAttribute::SourcePortRange));
        attributes
            .extend(self.destination_ports.as_ref().map(range).map(RuleAttribute::DestinationPortRange));
        if let Some(mark) = self.mark {
            attributes.extend([RuleAttribute::FwMark(mark), RuleAttribute::FwMask(u32::MAX)]);
        }
        message
    }

    /// Whether `message` is a rule of ours: made by us, among our priorities.
    pub(super) fn is_ours(message: &RuleMessage) -> bool {
        let has = |wanted: &dyn Fn(&RuleAttribute) -> bool| message.attributes.iter().any(wanted);
        has(&|a| matches!(a, RuleAttribute::Protocol(p) if u8::from(*p) == PROTOCOL))
            && has(&|a| matches!(a, RuleAttribute::Priority(p) if (PINNED..=REST).contains(p)))
    }

    /// Reads a rule of ours back; `None` for a rule that no version of [`wanted`] or [`Self::pinned`] makes.
    pub(super) fn parse(message: &RuleMessage) -> Option<Self> {
        let mut rule = Self {
            priority: 0,
            ipv6: message.header.family == AddressFamily::Inet6,
            from: None,
            to: None,
            protocol: None,
            source_ports: None,
            destination_ports: None,
            mark: None,
            verdict: Verdict::Nop,
        };
        let (mut target, mut table) = (None, u32::from(message.header.table));
        for attribute in &message.attributes {
            match attribute {
                RuleAttribute::Priority(priority) => rule.priority = *priority,
                RuleAttribute::Source(from) => rule.from = Some(*from),
                RuleAttribute::Destination(to) => rule.to = Some(*to),
                RuleAttribute::IpProtocol(protocol) => rule.protocol = Some(*protocol),
                RuleAttribute::SourcePortRange(r) => rule.source_ports = Some(r.start..=r.end),
                RuleAttribute::DestinationPortRange(r) => rule.destination_ports = Some(r.start..=r.end),
                RuleAttribute::FwMark(mark) if *mark != 0 => rule.mark = Some(*mark),
                RuleAttribute::Goto(to) => target = Some(*to),
                RuleAttribute::Table(number) => table = *number,
                RuleAttribute::Iifname(_) | RuleAttribute::Oifname(_) => return None,
                _ => {}
            }
        }
        rule.verdict = match message.header.action {
            RuleAction::Goto => Verdict::Goto(target?),
            RuleAction::ToTable => Verdict::Lookup(table),
            RuleAction::Nop => Verdict::Nop,
            _ => return None,
        };
        Some(rule)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capture() -> Capture {
        Capture {
            own: vec!["10.0.0.2".parse().unwrap(), "fd00::2".parse().unwrap()],
            resolvers: vec!["10.96.0.10".parse().unwrap(), "fd96::10".parse().unwrap()],
            dns_ports: 61000..=62023,
            tunnel_port: 51820,
        }
    }

    #[test]
    fn every_rule_is_read_back_as_it_was_written() {
        let (exceptions, captures) = wanted(&capture());
        for rule in exceptions.into_iter().chain(captures) {
            assert!(Rule::is_ours(&rule.message()));
            assert_eq!(Rule::parse(&rule.message()), Some(rule));
        }
    }

    #[test]
    fn a_pin_is_read_back_as_the_flow_that_it_keeps() {
        for (local, remote) in [("10.0.0.2", "10.0.0.3"), ("fd00::2", "fd00::3")] {
            let (local, remote) = ((local.parse().unwrap(), 4000), (remote.parse().unwrap(), 80));
            for (protocol, sealed) in [(protocol::TCP, true), (protocol::UDP, false)] {
                let tuple = Tuple { protocol, local, remote };
                let message = Rule::pinned(&tuple, sealed).unwrap().message();
                assert!(Rule::is_ours(&message));
                assert_eq!(Rule::parse(&message).unwrap().pin(), Some((tuple, sealed)));
            }
            assert_eq!(Rule::pinned(&Tuple { protocol: protocol::ICMP, local, remote }, true), None);
        }
        assert!(wanted(&capture()).0.iter().all(|rule| rule.pin().is_none() && rule.priority > PINNED));
    }

    #[test]
    fn exceptions_come_before_what_they_except_from_and_after_their_target() {
        let (exceptions, captures) = wanted(&capture());
        let numbers =
            |rules: &[Rule]| rules.iter().filter(|r| !r.ipv6).map(|r| r.priority).collect::<Vec<_>>();
        assert_eq!(numbers(&exceptions), [REST, TUNNEL, UPSTREAM, UPSTREAM, MARKED]);
        assert_eq!(numbers(&captures), [PROTECTED, DNS, DNS]);
        for except in [UPSTREAM, TUNNEL, MARKED] {
            assert!(except < DNS && DNS < PROTECTED && PROTECTED < REST);
        }
    }

    #[test]
    fn a_family_without_an_own_address_gets_no_rules() {
        let (exceptions, captures) = wanted(&Capture { own: vec!["10.0.0.2".parse().unwrap()], ..capture() });
        assert!(exceptions.iter().chain(&captures).all(|rule| !rule.ipv6));
    }

    #[test]
    fn rules_of_others_are_not_ours() {
        let mut message = RuleMessage::default();
        message.attributes.push(RuleAttribute::Priority(DNS));
        assert!(!Rule::is_ours(&message));
        message.attributes.push(RuleAttribute::Protocol(RouteProtocol::Static));
        assert!(!Rule::is_ours(&message));
    }
}
