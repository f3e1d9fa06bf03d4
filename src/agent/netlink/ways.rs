//! Where a packet would go now, as the kernel answers: what rules and tables of others make of ours shows here.
//!
//! Source: rtnetlink(7), RTM_GETROUTE.

use std::net::IpAddr;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::route::{RouteAttribute, RouteMessage, RouteType};

use super::request::Request;
use super::{Error, Netlink, Object, family, host_len};

impl Netlink {
    /// The device that a packet for `to` leaves by, from a socket with `mark`, if it has one; none: it does not leave.
    ///
    /// # Errors
    /// See [`Error`].
    pub(crate) fn way(&mut self, to: IpAddr, mark: Option<u32>) -> Result<Option<u32>, Error> {
        let mut message = RouteMessage::default();
        message.header.address_family = family(to.is_ipv6());
        message.header.destination_prefix_length = host_len(to.is_ipv6());
        message.attributes.push(RouteAttribute::Destination(to.into()));
        message.attributes.extend(mark.map(RouteAttribute::Mark));
        let answer = self.transport.one(Request {
            message: RouteNetlinkMessage::GetRoute(message),
            flags: 0,
            operation: "look up",
            object: Object::Route(to),
            tolerated: &[],
        });
        match answer {
            Ok(RouteNetlinkMessage::NewRoute(route)) if route.header.kind == RouteType::Unicast => {
                Ok(route.attributes.iter().find_map(|attribute| match attribute {
                    RouteAttribute::Oif(index) => Some(*index),
                    _ => None,
                }))
            }
            // A route that refuses is told as the error that a packet would get.
            Ok(_) | Err(Error::Refused { .. } | Error::Permission { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }
}
