//! Links, routes and rules of the pod, over one blocking rtnetlink socket.
//!
//! Nothing of ours stands in the pod's main table: the rules (rules.rs) send DNS into table T53 and everything else through table T,
//! which holds one route per protected address. Both fail closed: next to each route stands an `unreachable` twin of the
//! worst metric, which takes over when `tenc0` goes.
//!
//! Bring-up: [`Netlink::set_up_tun`], [`Netlink::install_rules`], then [`Netlink::protect`] as addresses are learned.
//! Tear-down: [`Netlink::tear_down`], then [`Netlink::delete_tun`]. All calls are idempotent: left-overs of an agent that
//! died are taken over. Everything of ours bears the routing protocol number [`PROTOCOL`]; nothing without it is removed.
//!
//! Runs in the pod's network namespace; the socket belongs to the namespace of the thread that opened it.
//!
//! Source: rtnetlink(7), ip-rule(8), ip-route(8).

mod check;
mod links;
mod pins;
mod request;
mod rules;
mod ways;

use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteScope,
    RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::errno::Errno;

pub(crate) use self::check::Wanted;
pub(crate) use self::links::TX_QUEUE_LEN;
pub use self::links::{Link, LinkAddress};
pub use self::request::{Error, Object};
use self::request::{Request, Transport};
use self::rules::Rule;
pub use self::rules::{Capture, DNS, MARKED, PINNED, PROTECTED, REST, TUNNEL, UPSTREAM};
use super::tun::NAME;

/// Mark of the agent's own sockets.
pub const MARK: u32 = 0x7e9c_0001;
/// Table T: one route per protected address.
pub const T: u32 = 32_409;
/// Table T53: where DNS to the resolver goes.
pub const T53: u32 = 32_410;
/// Routing protocol number ("te") that tells our routes and rules from others'; none in rt_protos of iproute2 has it.
pub const PROTOCOL: u8 = 0x7e;

/// Metric of a route that works; explicit, because 0 means 1024 to IPv6.
const METRIC: u32 = 1;
/// Metric of its twin: the worst there is.
const TWIN_METRIC: u32 = u32::MAX;
/// A rule that matches nothing of interest: added and deleted to make IPv6 sockets look up their route again.
const FLUSH_PRIORITY: u32 = 108;
/// The route of one protected address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProtectedRoute {
    /// The protected address.
    pub to: IpAddr,
    /// Our own address of that family: the preferred source.
    pub own: IpAddr,
    /// Largest packet that still fits the path when sealed.
    pub mtu: u32,
}

/// The handle to the kernel's links, routes and rules.
#[derive(Debug)]
pub struct Netlink {
    transport: Transport,
}

impl Netlink {
    /// Opens the socket in the calling thread's network namespace.
    ///
    /// # Errors
    /// [`Error::Socket`].
    pub fn open() -> Result<Self, Error> {
        Ok(Self { transport: Transport::open()? })
    }

    /// The port number that the kernel tells others our changes by.
    #[must_use]
    pub fn port(&self) -> u32 {
        self.transport.port()
    }

    /// Everything that `request` asks for, of which `kind` is the name.
    ///
    /// # Errors
    /// See [`Error`].
    pub(crate) fn dump(
        &mut self,
        request: &RouteNetlinkMessage,
        kind: &'static str,
    ) -> Result<Vec<RouteNetlinkMessage>, Error> {
        self.transport.dump(request, kind)
    }

    /// Adds a default route of the main table through the device `name`.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn add_default_route(&mut self, name: &str, ipv6: bool) -> Result<(), Error> {
        let index = self.link(name)?.index;
        let main = u32::from(RouteHeader::RT_TABLE_MAIN);
        let mut message = route(RouteType::Unicast, Destination::Default { table: main, ipv6 }, METRIC);
        message.attributes.push(RouteAttribute::Oif(index));
        self.transport.batch(vec![put(message, Object::Default { table: main, ipv6 })])
    }

    /// Installs the rules and the default routes of T53, each exception before what it excepts from, and removes rules of
    /// ours that a former agent left and that are not wanted any more.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn install_rules(&mut self, capture: &Capture) -> Result<(), Error> {
        let index = self.link(NAME)?.index;
        let (exceptions, captures) = rules::wanted(capture);
        let mut requests: Vec<_> = exceptions.iter().map(add_rule).collect();
        for own in &capture.own {
            let ipv6 = own.is_ipv6();
            let to = Destination::Default { table: T53, ipv6 };
            let object = || Object::Default { table: T53, ipv6 };
            requests.push(put(route(RouteType::Unreachable, to, TWIN_METRIC), object()));
            let mut default = route(RouteType::Unicast, to, METRIC);
            default
                .attributes
                .extend([RouteAttribute::Oif(index), RouteAttribute::PrefSource((*own).into())]);
            requests.push(put(default, object()));
        }
        requests.extend(captures.iter().map(add_rule));
        let stale = self.our_rules()?.into_iter().filter(|message| {
            let rule = Rule::parse(message);
            rule.as_ref().is_none_or(|rule| rule.pin().is_none())
                && !exceptions.iter().chain(&captures).any(|wanted| rule.as_ref() == Some(wanted))
        });
        requests.extend(stale.map(delete_rule));
        self.transport.batch(requests)
    }

    /// Routes addresses into `tenc0`, each with its `unreachable` twin, and makes sockets notice.
    ///
    /// # Errors
    /// See [`Error`]; ENODEV when `tenc0` is gone.
    pub fn protect(&mut self, routes: &[ProtectedRoute]) -> Result<(), Error> {
        let index = self.link(NAME)?.index;
        let mut requests = Vec::with_capacity(routes.len() * 2 + 2);
        for ProtectedRoute { to, own, mtu } in routes {
            let destination = Destination::Host(*to);
            requests.push(put(route(RouteType::Unreachable, destination, TWIN_METRIC), Object::Route(*to)));
            let mut message = route(RouteType::Unicast, destination, METRIC);
            message.attributes.extend([
                RouteAttribute::Oif(index),
                RouteAttribute::PrefSource((*own).into()),
                RouteAttribute::Metrics(vec![RouteMetric::Mtu(*mtu)]),
            ]);
            requests.push(put(message, Object::Route(*to)));
        }
        self.change_routes(requests, routes.iter().any(|r| r.to.is_ipv6()))
    }

    /// Answers packets to `addresses` with ICMP "administratively prohibited" from now on.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn prohibit(&mut self, addresses: &[IpAddr]) -> Result<(), Error> {
        let requests = addresses.iter().flat_map(|to| {
            let destination = Destination::Host(*to);
            let twin = route(RouteType::Unreachable, destination, TWIN_METRIC);
            let message = route(RouteType::Prohibit, destination, METRIC);
            [put(twin, Object::Route(*to)), put(message, Object::Route(*to))]
        });
        self.change_routes(requests.collect(), addresses.iter().any(IpAddr::is_ipv6))
    }

    /// Removes the routes of `addresses`; those that have none are fine.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn unprotect(&mut self, addresses: &[IpAddr]) -> Result<(), Error> {
        let requests = addresses.iter().flat_map(|to| {
            [METRIC, TWIN_METRIC].map(|metric| delete_route(delete_form(Destination::Host(*to), metric)))
        });
        self.change_routes(requests.collect(), addresses.iter().any(IpAddr::is_ipv6))
    }

    /// The addresses that table T has a route for, left by a former agent or put there by this one; sorted.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn protected(&mut self) -> Result<Vec<IpAddr>, Error> {
        let mut found: Vec<_> = self.routes(T)?.iter().filter_map(destination).collect();
        found.sort_unstable();
        found.dedup();
        Ok(found)
    }

    /// Removes every rule of ours and every route of T and T53, in the reverse order of bring-up.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn tear_down(&mut self) -> Result<(), Error> {
        let (mut captures, mut exceptions): (Vec<_>, Vec<_>) = self
            .our_rules()?
            .into_iter()
            .partition(|message| Rule::parse(message).is_some_and(|rule| rule.captures()));
        let priority = |message: &RuleMessage| {
            message.attributes.iter().find_map(|a| match a {
                RuleAttribute::Priority(priority) => Some(*priority),
                _ => None,
            })
        };
        // The target of the jumps goes last.
        captures.sort_by_key(priority);
        exceptions.sort_by_key(priority);
        let mut requests: Vec<_> = captures.into_iter().map(delete_rule).collect();
        for table in [T53, T] {
            requests.extend(self.routes(table)?.into_iter().map(delete_route));
        }
        requests.extend(exceptions.into_iter().map(delete_rule));
        self.transport.batch(requests)
    }

    fn change_routes(&mut self, mut requests: Vec<Request>, ipv6: bool) -> Result<(), Error> {
        if ipv6 {
            requests.extend(flush_requests());
        }
        self.transport.batch(requests)
    }

    fn our_rules(&mut self) -> Result<Vec<RuleMessage>, Error> {
        let mut ours = Vec::new();
        for ipv6 in [false, true] {
            let mut message = RuleMessage::default();
            message.header.family = family(ipv6);
            for found in self.transport.dump(&RouteNetlinkMessage::GetRule(message), "rules")? {
                if let RouteNetlinkMessage::NewRule(rule) = found
                    && Rule::is_ours(&rule)
                {
                    ours.push(rule);
                }
            }
        }
        Ok(ours)
    }

    /// Our routes of `table`, both families.
    fn routes(&mut self, table: u32) -> Result<Vec<RouteMessage>, Error> {
        let mut ours = Vec::new();
        for ipv6 in [false, true] {
            let mut message = RouteMessage::default();
            message.header.address_family = family(ipv6);
            message.attributes.push(RouteAttribute::Table(table));
            for found in self.transport.dump(&RouteNetlinkMessage::GetRoute(message), "routes")? {
                if let RouteNetlinkMessage::NewRoute(route) = found
                    && u8::from(route.header.protocol) == PROTOCOL
                    && route.attributes.contains(&RouteAttribute::Table(table))
                {
                    ours.push(route);
                }
            }
        }
        Ok(ours)
    }
}

/// Where a route leads to.
#[derive(Clone, Copy, Debug)]
enum Destination {
    Host(IpAddr),
    Default { table: u32, ipv6: bool },
}

fn route(kind: RouteType, to: Destination, metric: u32) -> RouteMessage {
    let mut message = RouteMessage::default();
    let (table, ipv6) = match to {
        Destination::Host(address) => {
            message.attributes.push(RouteAttribute::Destination(address.into()));
            message.header.destination_prefix_length = host_len(address.is_ipv6());
            (T, address.is_ipv6())
        }
        Destination::Default { table, ipv6 } => (table, ipv6),
    };
    message.header.address_family = family(ipv6);
    message.header.protocol = RouteProtocol::Other(PROTOCOL);
    message.header.kind = kind;
    message.header.scope = match kind {
        RouteType::Unicast if !ipv6 => RouteScope::Link,
        _ => RouteScope::Universe,
    };
    message.attributes.extend([RouteAttribute::Table(table), RouteAttribute::Priority(metric)]);
    message
}

/// The form of a route that deletes whatever stands at that place, of any type and scope.
fn delete_form(to: Destination, metric: u32) -> RouteMessage {
    let mut message = route(RouteType::Unspec, to, metric);
    message.header.scope = RouteScope::NoWhere;
    message
}

fn put(message: RouteMessage, object: Object) -> Request {
    Request {
        message: RouteNetlinkMessage::NewRoute(message),
        flags: NLM_F_CREATE | NLM_F_REPLACE,
        operation: "add",
        object,
        tolerated: &[],
    }
}

fn delete_route(message: RouteMessage) -> Request {
    let object = destination(&message).map_or(Object::All("default routes"), Object::Route);
    Request {
        message: RouteNetlinkMessage::DelRoute(message),
        flags: 0,
        operation: "delete",
        object,
        tolerated: &[Errno::ESRCH, Errno::ENOENT],
    }
}

fn add_rule(rule: &Rule) -> Request {
    Request {
        message: RouteNetlinkMessage::NewRule(rule.message()),
        flags: NLM_F_CREATE | NLM_F_EXCL,
        operation: "add",
        object: Object::Rule { priority: rule.priority, ipv6: rule.ipv6 },
        tolerated: &[Errno::EEXIST],
    }
}

fn delete_rule(message: RuleMessage) -> Request {
    let priority = message.attributes.iter().find_map(|a| match a {
        RuleAttribute::Priority(priority) => Some(*priority),
        _ => None,
    });
    let object = Object::Rule {
        priority: priority.unwrap_or_default(),
        ipv6: message.header.family == AddressFamily::Inet6,
    };
    Request {
        message: RouteNetlinkMessage::DelRule(message),
        flags: 0,
        operation: "delete",
        object,
        tolerated: &[Errno::ENOENT],
    }
}

/// Makes connected IPv6 sockets look up their route again: without it they keep a cached one after a route is added.
/// IPv4 does so by itself.
fn flush_requests() -> Vec<Request> {
    let mut message = RuleMessage::default();
    message.header.family = AddressFamily::Inet6;
    message.header.action = RuleAction::Nop;
    message.attributes = vec![
        RuleAttribute::Priority(FLUSH_PRIORITY),
        RuleAttribute::Protocol(RouteProtocol::Other(PROTOCOL)),
    ];
    let request = |message, flags, tolerated| Request {
        message,
        flags,
        operation: "flush",
        object: Object::All("IPv6 route caches"),
        tolerated,
    };
    vec![
        request(
            RouteNetlinkMessage::NewRule(message.clone()),
            NLM_F_CREATE | NLM_F_EXCL,
            &[Errno::EEXIST, Errno::EAFNOSUPPORT],
        ),
        request(RouteNetlinkMessage::DelRule(message), 0, &[Errno::ENOENT, Errno::EAFNOSUPPORT]),
    ]
}

fn destination(message: &RouteMessage) -> Option<IpAddr> {
    message.attributes.iter().find_map(|a| match a {
        RouteAttribute::Destination(to) => address(to),
        _ => None,
    })
}

fn address(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(to) => Some(IpAddr::from(*to)),
        RouteAddress::Inet6(to) => Some(IpAddr::from(*to)),
        _ => None,
    }
}

fn family(ipv6: bool) -> AddressFamily {
    if ipv6 { AddressFamily::Inet6 } else { AddressFamily::Inet }
}

fn host_len(ipv6: bool) -> u8 {
    if ipv6 { 128 } else { 32 }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    #[test]
    fn a_route_and_its_twin_differ_in_type_and_metric_only() {
        let to = Destination::Host(Ipv4Addr::new(10, 0, 0, 3).into());
        let (works, twin) =
            (route(RouteType::Unicast, to, METRIC), route(RouteType::Unreachable, to, TWIN_METRIC));
        assert!(twin.attributes.contains(&RouteAttribute::Priority(u32::MAX)));
        assert_eq!(works.header.destination_prefix_length, 32);
        assert_eq!(destination(&works), destination(&twin));
    }

    #[test]
    fn routes_of_hosts_lie_in_table_t_and_bear_our_protocol() {
        let message = route(RouteType::Unicast, Destination::Host(Ipv6Addr::LOCALHOST.into()), METRIC);
        assert!(message.attributes.contains(&RouteAttribute::Table(T)));
        assert_eq!(u8::from(message.header.protocol), PROTOCOL);
        assert_eq!(message.header.destination_prefix_length, 128);
    }
}
