//! What the strict guard has to know of the world outside the project: elements of the sets that the launcher fills.
//!
//! The launcher collects these from the directory, the command line and its own node ([`Facts`]); the agent adds the
//! addresses of the project itself. A [`Facts`] is plain data and touches nothing.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::IpNet;

use super::DeviceName;
use crate::proto::directory::Protocol;
use crate::proto::ranges::Ranges;

/// Most nodes that one guard knows by address; 68 bytes of kernel memory each.
const NODES_MAX: usize = 32_768;

/// Most ports of resolvers' endpoints that one guard knows: some clusters run one on each node. Those that are left out are
/// asked about like any address, but not counted as DNS.
const RESOLVER_ENDPOINTS_MAX: usize = 2_048;

/// Facts about addresses that no agent decides.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Addresses of the cluster's nodes: probes come from them, and pods may speak to them.
    pub nodes: BTreeSet<IpAddr>,
    /// `--node-cidr`: further nodes, for example the addresses of their tunnels.
    pub node_ranges: Ranges,
    /// Link-local addresses of the node on a device of the pod.
    pub gateways: BTreeSet<(DeviceName, Ipv6Addr)>,
    /// nodePorts and hostPorts of the own project: at every node address they lead back into the project.
    pub node_ports: BTreeSet<(Protocol, u16)>,
    /// externalIPs of the own project, and load balancers at a node's address: address, protocol and port.
    pub externals: BTreeSet<(IpAddr, Protocol, u16)>,
    /// The directed broadcast address of each subnet of the pod.
    pub broadcasts: BTreeSet<Ipv4Addr>,
    /// Where the Services that are the pod's resolvers lead: address, protocol and port of each endpoint, in other projects.
    /// A load balancer at socket level sends the pod's queries there, past the agent.
    pub resolver_endpoints: BTreeSet<(IpAddr, Protocol, u16)>,
}

impl Facts {
    /// The nodes that fit the guard's set.
    pub(super) fn known_nodes(&self) -> impl Iterator<Item = &IpAddr> {
        self.nodes.iter().take(NODES_MAX)
    }

    /// The endpoints of resolvers that fit the guard's set.
    pub(super) fn known_resolver_endpoints(&self) -> impl Iterator<Item = &(IpAddr, Protocol, u16)> + Clone {
        self.resolver_endpoints.iter().take(RESOLVER_ENDPOINTS_MAX)
    }
}

/// `--exempt CIDR[:PORT]`: what the operator vouches for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Exemption {
    /// The addresses.
    pub net: IpNet,
    /// One port of UDP, TCP and SCTP; none: everything.
    pub port: Option<u16>,
}

/// Not an exemption.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a CIDR or CIDR:PORT (IPv6: [CIDR]:PORT), for example 10.5.0.0/16 or 10.5.0.7/32:443")]
pub struct NotAnExemption;

impl FromStr for Exemption {
    type Err = NotAnExemption;

    fn from_str(text: &str) -> Result<Self, NotAnExemption> {
        let (net, port) = match text.strip_prefix('[') {
            Some(rest) => {
                let (net, rest) = rest.split_once(']').ok_or(NotAnExemption)?;
                (
                    net,
                    rest.strip_prefix(':')
                        .map(Some)
                        .or(rest.is_empty().then_some(None))
                        .ok_or(NotAnExemption)?,
                )
            }
            // A lone IPv6 network has colons of its own.
            None if text.matches(':').count() > 1 => (text, None),
            None => text.split_once(':').map_or((text, None), |(net, port)| (net, Some(port))),
        };
        let port = port.map(|port| port.parse::<u16>().ok().filter(|port| *port > 0).ok_or(NotAnExemption));
        let net: IpNet = net.parse().map_err(|_| NotAnExemption)?;
        Ok(Self { net: net.trunc(), port: port.transpose()? })
    }
}

impl fmt::Display for Exemption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.port, self.net) {
            (None, net) => write!(f, "{net}"),
            (Some(port), IpNet::V4(net)) => write!(f, "{net}:{port}"),
            (Some(port), IpNet::V6(net)) => write!(f, "[{net}]:{port}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exemptions_are_read_as_they_are_shown_and_others_are_refused() {
        for text in ["10.5.0.0/16", "10.5.0.7/32:443", "fd00:5::/64", "[fd00:5::/64]:53"] {
            assert_eq!(text.parse::<Exemption>().unwrap().to_string(), text);
        }
        assert_eq!("[fd00:5::1/64]".parse::<Exemption>().unwrap().to_string(), "fd00:5::/64");
        for text in
            ["", "10.5.0.0", "10.5.0.0/33", "10.5.0.0/16:0", "10.5.0.0/16:x", "[fd00::/64", "[fd00::/64]53"]
        {
            assert_eq!(text.parse::<Exemption>(), Err(NotAnExemption), "{text}");
        }
    }
}
