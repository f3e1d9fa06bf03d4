//! Passed addresses, and flows that keep their path when an address is captured or passed.
//!
//! A passed address has a `throw` route in table T: the look-up goes on with the pod's own rules. A pinned flow has a rule of
//! its own before all others: into `tenc0` while its address is passed, past our tables while its address is captured.

use std::net::IpAddr;

use netlink_packet_route::route::RouteType;

use super::request::{Error, Object};
use super::rules::Rule;
use super::{
    Destination, METRIC, Netlink, T, TWIN_METRIC, add_rule, delete_form, delete_route, delete_rule,
    destination, put, route,
};
use crate::proto::nat::Tuple;

impl Netlink {
    /// Leaves packets to `addresses` to the pod's own routes from now on.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn pass(&mut self, addresses: &[IpAddr]) -> Result<(), Error> {
        let requests = addresses.iter().flat_map(|to| {
            let host = Destination::Host(*to);
            let throw = put(route(RouteType::Throw, host, METRIC), Object::Route(*to));
            [throw, delete_route(delete_form(host, TWIN_METRIC))]
        });
        self.change_routes(requests.collect(), addresses.iter().any(IpAddr::is_ipv6))
    }

    /// The addresses that table T passes, left by a former agent or put there by this one.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn passed(&mut self) -> Result<Vec<IpAddr>, Error> {
        let routes = self.routes(T)?;
        Ok(routes.iter().filter(|r| r.header.kind == RouteType::Throw).filter_map(destination).collect())
    }

    /// The flows that are pinned, and whether sealed.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn pins(&mut self) -> Result<Vec<(Tuple, bool)>, Error> {
        Ok(self.our_rules()?.iter().filter_map(|message| Rule::parse(message)?.pin()).collect())
    }

    /// Keeps flows as they are: sealed, or in clear. Those that are neither TCP nor UDP are left out.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn pin(&mut self, flows: impl IntoIterator<Item = (Tuple, bool)>) -> Result<(), Error> {
        let rules = flows.into_iter().filter_map(|(tuple, sealed)| Rule::pinned(&tuple, sealed));
        self.transport.batch(rules.map(|rule| add_rule(&rule)).collect())
    }

    /// Lets flows go again; those that are not pinned are fine.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn unpin(&mut self, flows: impl IntoIterator<Item = (Tuple, bool)>) -> Result<(), Error> {
        let rules = flows.into_iter().filter_map(|(tuple, sealed)| Rule::pinned(&tuple, sealed));
        self.transport.batch(rules.map(|rule| delete_rule(rule.message())).collect())
    }
}
