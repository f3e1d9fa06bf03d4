//! Compares the rules and routes that the kernel has with those that should stand there, and puts back what differs.
//!
//! The comparison is pure ([`rule_diff`], [`route_diff`]); [`Netlink::check_rules`] and [`Netlink::check_routes`] dump,
//! compare and put. What others made in another place is told, never deleted.

use std::collections::BTreeMap;
use std::net::IpAddr;

use netlink_packet_route::AddressFamily;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::LinkMessage;
use netlink_packet_route::route::{
    RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use nix::errno::Errno;

use super::links::{Link, read_link};
use super::request::{Object, Request};
use super::rules::{self, Capture, PROTECTED, Rule};
use super::{Destination, Error, METRIC, Netlink, T, T53, TWIN_METRIC};
use super::{add_rule, destination, family, flush_requests, host_len, put, route};
use crate::agent::watch::Tampering;

/// The kernel's own table.
const TABLE_LOCAL: u32 = 255;

/// What should stand in table T for one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// A route into `tenc0`.
    Protect {
        /// Preferred source.
        own: IpAddr,
        /// Largest packet.
        mtu: u32,
    },
    /// A `prohibit` route.
    Prohibit,
    /// A `throw` route and no twin: the platform carries it.
    Pass,
    /// The twin; our address of that family is gone, and nothing can be sent from it.
    Twin,
    /// Whatever a former agent left; if that is gone, a `prohibit` route.
    Any,
}

/// What a comparison found and what has to be put.
#[derive(Debug, Default)]
struct Diff {
    put: Vec<Request>,
    repaired: Vec<Tampering>,
    standing: Vec<Tampering>,
}

/// What a check found: mended, and beyond mending.
pub(crate) type Found = (Vec<Tampering>, Vec<Tampering>);

impl Netlink {
    /// All devices of the namespace.
    ///
    /// # Errors
    /// See [`Error`].
    pub(crate) fn links(&mut self) -> Result<Vec<Link>, Error> {
        let found = self.transport.dump(&RouteNetlinkMessage::GetLink(LinkMessage::default()), "links")?;
        let links = found.into_iter().filter_map(|message| match message {
            RouteNetlinkMessage::NewLink(message) => Some(read_link(message)),
            _ => None,
        });
        Ok(links.collect())
    }

    /// Removes the device `index`, which is ours under another name.
    ///
    /// # Errors
    /// See [`Error`].
    pub(crate) fn delete_link(&mut self, index: u32) -> Result<(), Error> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        self.transport.batch(vec![Request {
            message: RouteNetlinkMessage::DelLink(message),
            flags: 0,
            operation: "delete",
            object: Object::Link(format!("number {index}")),
            tolerated: &[Errno::ENODEV],
        }])
    }

    /// Puts back rules that are missing, exceptions first.
    ///
    /// # Errors
    /// See [`Error`].
    pub(crate) fn check_rules(&mut self, capture: &Capture) -> Result<Found, Error> {
        let mut dumped = Vec::new();
        for ipv6 in [false, true] {
            let mut message = RuleMessage::default();
            message.header.family = family(ipv6);
            let found = self.transport.dump(&RouteNetlinkMessage::GetRule(message), "rules")?;
            dumped.extend(found.into_iter().filter_map(|message| match message {
                RouteNetlinkMessage::NewRule(rule) => Some(rule),
                _ => None,
            }));
        }
        let diff = rule_diff(capture, &dumped);
        self.transport.batch(diff.put)?;
        Ok((diff.repaired, diff.standing))
    }

    /// Puts back routes of T and T53 that are missing or changed. `index` is `tenc0`'s; `own` our addresses, of which
    /// `present` are there now.
    ///
    /// # Errors
    /// See [`Error`].
    pub(crate) fn check_routes(
        &mut self,
        index: u32,
        own: &[IpAddr],
        present: &[IpAddr],
        wanted: &BTreeMap<IpAddr, Wanted>,
    ) -> Result<Found, Error> {
        let mut dumped = Vec::new();
        for table in [T, T53] {
            for ipv6 in [false, true] {
                let mut message = RouteMessage::default();
                message.header.address_family = family(ipv6);
                message.attributes.push(RouteAttribute::Table(table));
                let found = self.transport.dump(&RouteNetlinkMessage::GetRoute(message), "routes")?;
                dumped.extend(found.into_iter().filter_map(|message| match message {
                    RouteNetlinkMessage::NewRoute(route)
                        if route.attributes.contains(&RouteAttribute::Table(table)) =>
                    {
                        Some(route)
                    }
                    _ => None,
                }));
            }
        }
        let mut diff = route_diff(index, own, present, wanted, &dumped);
        let ipv6 = |request: &Request| matches!(&request.message, RouteNetlinkMessage::NewRoute(r) if r.header.address_family == AddressFamily::Inet6);
        if diff.put.iter().any(ipv6) {
            diff.put.extend(flush_requests());
        }
        self.transport.batch(diff.put)?;
        Ok((diff.repaired, diff.standing))
    }
}

/// Which rules are missing, and whether somebody else's come before ours.
fn rule_diff(capture: &Capture, dumped: &[RuleMessage]) -> Diff {
    let (exceptions, captures) = rules::wanted(capture);
    let parsed: Vec<_> = dumped.iter().filter(|rule| Rule::is_ours(rule)).filter_map(Rule::parse).collect();
    let missing = exceptions.iter().chain(&captures).filter(|wanted| !parsed.contains(wanted));
    let mut diff = Diff { put: missing.map(add_rule).collect(), ..Diff::default() };
    if !diff.put.is_empty() {
        diff.repaired.push(Tampering::RuleMissing);
    }
    let known = |message: &RuleMessage| {
        let rule = Some(message).filter(|message| Rule::is_ours(message)).and_then(Rule::parse);
        rule.is_some_and(|rule| {
            rule.pin().is_some() || exceptions.iter().chain(&captures).any(|w| *w == rule)
        })
    };
    // The kernel's own: the local table before everything.
    let local = |message: &RuleMessage| {
        let table = message.attributes.iter().find_map(|a| match a {
            RuleAttribute::Table(table) => Some(*table),
            _ => None,
        });
        message.header.action == RuleAction::ToTable
            && table.unwrap_or(message.header.table.into()) == TABLE_LOCAL
    };
    let priority = |rule: &RuleMessage| {
        rule.attributes.iter().find_map(|a| match a {
            RuleAttribute::Priority(priority) => Some(*priority),
            _ => None,
        })
    };
    let before = |rule: &RuleMessage| match priority(rule).unwrap_or(0) {
        0 => !local(rule),
        priority => priority <= PROTECTED && !known(rule),
    };
    if dumped.iter().any(before) {
        diff.standing.push(Tampering::RuleForeign);
    }
    diff
}

/// The routes that are there, and what becomes of them.
struct Comparison<'a> {
    found: BTreeMap<Place, Vec<&'a RouteMessage>>,
    diff: Diff,
}

impl Comparison<'_> {
    /// Wants `message` at its place, as it is.
    fn want(&mut self, message: RouteMessage, object: Object, missing: Tampering) {
        let at = self.found.remove(&place(&message)).unwrap_or_default();
        if at.len() > 1 {
            self.diff.standing.push(Tampering::RouteForeign);
        }
        match at.first() {
            Some(there) if facts(there) == facts(&message) => {}
            Some(_) => {
                self.diff.put.push(put(message, object));
                self.diff.repaired.push(Tampering::RouteChanged);
            }
            None => {
                self.diff.put.push(put(message, object));
                self.diff.repaired.push(missing);
            }
        }
    }
}

/// Where a route stands: table, IPv6, destination and prefix length, metric.
type Place = (u32, bool, Option<IpAddr>, u8, u32);

/// Which routes are missing or changed, and whether there are others.
fn route_diff(
    index: u32,
    own: &[IpAddr],
    present: &[IpAddr],
    wanted: &BTreeMap<IpAddr, Wanted>,
    dumped: &[RouteMessage],
) -> Diff {
    let mut kernel = Comparison { found: BTreeMap::new(), diff: Diff::default() };
    for message in dumped {
        kernel.found.entry(place(message)).or_default().push(message);
    }
    for own in own {
        let ipv6 = own.is_ipv6();
        let to = Destination::Default { table: T53, ipv6 };
        let object = || Object::Default { table: T53, ipv6 };
        kernel.want(route(RouteType::Unreachable, to, TWIN_METRIC), object(), Tampering::TwinMissing);
        if !present.contains(own) {
            continue;
        }
        let mut default = route(RouteType::Unicast, to, METRIC);
        default.attributes.extend([RouteAttribute::Oif(index), RouteAttribute::PrefSource((*own).into())]);
        kernel.want(default, object(), Tampering::RouteMissing);
    }
    for (to, wanted) in wanted {
        let destination = Destination::Host(*to);
        let twin = route(RouteType::Unreachable, destination, TWIN_METRIC);
        let message = match wanted {
            Wanted::Any => {
                let prohibit = route(RouteType::Prohibit, destination, METRIC);
                // Whatever it was, what is not there any more refuses.
                if !kernel.found.contains_key(&place(&prohibit)) {
                    kernel
                        .diff
                        .put
                        .extend([put(twin, Object::Route(*to)), put(prohibit, Object::Route(*to))]);
                    kernel.diff.repaired.push(Tampering::RouteMissing);
                }
                continue;
            }
            Wanted::Twin => {
                kernel.want(twin, Object::Route(*to), Tampering::TwinMissing);
                continue;
            }
            Wanted::Pass => {
                kernel.want(
                    route(RouteType::Throw, destination, METRIC),
                    Object::Route(*to),
                    Tampering::RouteMissing,
                );
                continue;
            }
            Wanted::Prohibit => route(RouteType::Prohibit, destination, METRIC),
            Wanted::Protect { own, mtu } => {
                let mut message = route(RouteType::Unicast, destination, METRIC);
                message.attributes.extend([
                    RouteAttribute::Oif(index),
                    RouteAttribute::PrefSource((*own).into()),
                    RouteAttribute::Metrics(vec![RouteMetric::Mtu(*mtu)]),
                ]);
                message
            }
        };
        kernel.want(twin, Object::Route(*to), Tampering::TwinMissing);
        kernel.want(message, Object::Route(*to), Tampering::RouteMissing);
    }
    let Comparison { found, mut diff } = kernel;
    let half = |place: &Place| {
        place.0 == T53 && place.2.is_none() && !present.iter().any(|own| own.is_ipv6() == place.1)
    };
    let adopted = |place: &Place| {
        place.2.is_some_and(|to| {
            place.3 == host_len(place.1) && matches!(wanted.get(&to), Some(Wanted::Any | Wanted::Twin))
        })
    };
    if found.keys().any(|place| !adopted(place) && !half(place)) {
        diff.standing.push(Tampering::RouteForeign);
    }
    diff
}

fn place(message: &RouteMessage) -> Place {
    let (mut table, mut metric) = (u32::from(message.header.table), 0);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Priority(number) => metric = *number,
            _ => {}
        }
    }
    let RouteHeader { address_family, destination_prefix_length, .. } = message.header;
    (table, address_family == AddressFamily::Inet6, destination(message), destination_prefix_length, metric)
}

/// Kind, protocol, device, preferred source and MTU, as far as they say where packets go.
type Facts = (RouteType, RouteProtocol, Option<u32>, Option<IpAddr>, Option<u32>);

fn facts(message: &RouteMessage) -> Facts {
    let (mut device, mut source, mut mtu) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => device = Some(*index),
            RouteAttribute::PrefSource(address) => source = super::address(address),
            RouteAttribute::Metrics(metrics) => {
                mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    match message.header.kind {
        RouteType::Unicast => (RouteType::Unicast, message.header.protocol, device, source, mtu),
        // IPv6 shows lo as the device of a route that refuses.
        kind => (kind, message.header.protocol, None, None, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capture() -> Capture {
        Capture {
            own: vec!["10.0.0.2".parse().unwrap(), "fd00::2".parse().unwrap()],
            resolvers: vec!["10.96.0.10".parse().unwrap()],
            dns_ports: 61000..=62023,
            tunnel_port: 51820,
        }
    }

    fn rules() -> Vec<RuleMessage> {
        let (exceptions, captures) = rules::wanted(&capture());
        exceptions.iter().chain(&captures).map(Rule::message).collect()
    }

    fn own() -> Vec<IpAddr> {
        capture().own
    }

    fn wanted() -> BTreeMap<IpAddr, Wanted> {
        BTreeMap::from([
            ("10.0.0.3".parse().unwrap(), Wanted::Protect { own: own()[0], mtu: 1376 }),
            ("fd00::3".parse().unwrap(), Wanted::Protect { own: own()[1], mtu: 1360 }),
            ("10.0.0.4".parse().unwrap(), Wanted::Prohibit),
        ])
    }

    /// What an empty kernel would be given is what a whole one has.
    fn routes() -> Vec<RouteMessage> {
        let put = route_diff(5, &own(), &own(), &wanted(), &[]).put.into_iter();
        put.filter_map(|request| match request.message {
            RouteNetlinkMessage::NewRoute(route) => Some(route),
            _ => None,
        })
        .collect()
    }

    #[test]
    fn promise_13_untouched_rules_and_routes_are_left_alone() {
        let diff = rule_diff(&capture(), &rules());
        assert!(diff.put.is_empty() && diff.repaired.is_empty() && diff.standing.is_empty());
        let diff = route_diff(5, &own(), &own(), &wanted(), &routes());
        assert!(diff.put.is_empty() && diff.repaired.is_empty() && diff.standing.is_empty());
    }

    #[test]
    fn promise_1_each_rule_that_is_deleted_is_put_back_alone() {
        for gone in 0..rules().len() {
            let mut rules = rules();
            rules.remove(gone);
            let diff = rule_diff(&capture(), &rules);
            assert_eq!(diff.put.len(), 1);
            assert_eq!(diff.repaired, [Tampering::RuleMissing]);
        }
    }

    #[test]
    fn promise_1_each_route_that_is_deleted_is_put_back_alone() {
        for gone in 0..routes().len() {
            let mut routes = routes();
            let was = routes.remove(gone);
            let diff = route_diff(5, &own(), &own(), &wanted(), &routes);
            assert_eq!(diff.put.len(), 1);
            let twin = place(&was).4 == TWIN_METRIC;
            assert_eq!(diff.repaired, [if twin { Tampering::TwinMissing } else { Tampering::RouteMissing }]);
        }
    }

    #[test]
    fn promise_1_a_route_that_leads_elsewhere_is_put_right() {
        for (index, changed) in routes().iter().enumerate().filter(|(_, r)| facts(r).0 == RouteType::Unicast)
        {
            let mut other = changed.clone();
            other.attributes.retain(|a| !matches!(a, RouteAttribute::Oif(_)));
            other.attributes.push(RouteAttribute::Oif(9));
            let mut routes = routes();
            routes[index] = other;
            let diff = route_diff(5, &own(), &own(), &wanted(), &routes);
            assert_eq!((diff.put.len(), diff.repaired), (1, vec![Tampering::RouteChanged]));
        }
    }

    #[test]
    fn promise_13_rules_and_routes_of_others_are_told_and_stay() {
        let mut rules = rules();
        let mut foreign = RuleMessage::default();
        foreign.attributes.push(RuleAttribute::Priority(50));
        rules.push(foreign.clone());
        let diff = rule_diff(&capture(), &rules);
        assert!(diff.put.is_empty());
        assert_eq!(diff.standing, [Tampering::RuleForeign]);
        let standing = |rule: &RuleMessage| rule_diff(&capture(), std::slice::from_ref(rule)).standing;
        foreign.attributes[0] = RuleAttribute::Priority(32_766);
        assert!(standing(&foreign).is_empty());
        // Beside the kernel's own rule 0, and with our tag.
        foreign.attributes[0] = RuleAttribute::Priority(0);
        foreign.header.action = RuleAction::ToTable;
        foreign.attributes.push(RuleAttribute::Table(TABLE_LOCAL));
        assert!(standing(&foreign).is_empty());
        foreign.attributes[1] = RuleAttribute::Table(u32::from(RouteHeader::RT_TABLE_MAIN));
        assert_eq!(standing(&foreign), [Tampering::RuleForeign]);
        foreign.attributes[0] = RuleAttribute::Priority(PROTECTED);
        foreign.attributes.push(RuleAttribute::Protocol(RouteProtocol::Other(super::super::PROTOCOL)));
        assert_eq!(standing(&foreign), [Tampering::RuleForeign]);

        let mut routes = routes();
        routes.push(route(RouteType::Unicast, Destination::Host("10.0.0.3".parse().unwrap()), 0));
        let diff = route_diff(5, &own(), &own(), &wanted(), &routes);
        assert!(diff.put.is_empty());
        assert_eq!(diff.standing, [Tampering::RouteForeign]);
    }

    #[test]
    fn what_a_former_agent_left_is_neither_changed_nor_called_foreign() {
        let mut wanted = wanted();
        let old: IpAddr = "10.0.0.9".parse().unwrap();
        let mut routes = routes();
        routes.push(route(RouteType::Unicast, Destination::Host(old), METRIC));
        wanted.insert(old, Wanted::Any);
        let diff = route_diff(5, &own(), &own(), &wanted, &routes);
        assert!(diff.put.is_empty() && diff.standing.is_empty());
    }
}
