//! What the objects say about addresses that are not the project's: who vouches for them, and which of a node's ports lead
//! back into the project.
//!
//! An address is vouched for only by positive evidence: the cluster assigned it to a Pod, Service or load balancer of another
//! namespace, or it is an external endpoint of the own project. EndpointSlices and externalIPs of other namespaces vouch for
//! nothing: a tenant writes them. An address of the project is never vouched for, whoever else names it.
//!
//! A pod's resolver is usually a Service of another namespace. A load balancer at socket level replaces its address by that
//! of an endpoint, so that the agent sees no query: [`Outside::resolver_endpoints`] names these endpoints, and the guard
//! counts what is sent to them.
//!
//! Touches nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::{Entries, Id, NamedPort, Objects, Service, Slice};
use crate::proto::directory::Protocol;
use crate::proto::is_unicast;
use crate::proto::routing::Class;

/// Port of DNS.
const DNS_PORT: u16 = 53;

/// An address with one port of it.
type AddressPort = (IpAddr, Protocol, u16);

/// The world outside one project, as the objects show it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outside {
    /// Addresses of the project.
    own: BTreeSet<IpAddr>,
    /// Addresses of Pods, Services and load balancers of other namespaces, and external endpoints of the project.
    others: BTreeSet<IpAddr>,
    /// Addresses of nodes: of Node objects, and every Pod's status.hostIPs.
    pub nodes: BTreeSet<IpAddr>,
    /// nodePorts and hostPorts of the project.
    pub node_ports: BTreeSet<(Protocol, u16)>,
    /// externalIPs of the project, and load balancers at a node's address.
    pub externals: BTreeSet<AddressPort>,
    /// The endpoints of other namespaces' Services with port 53, by the Service's address.
    dns: BTreeMap<IpAddr, BTreeSet<AddressPort>>,
}

impl Outside {
    /// Reads `objects` for a workload of `project` with the addresses `own`, whose directory is `entries`.
    #[must_use]
    pub fn of(objects: &Objects, project: &str, own: &[IpAddr], entries: &Entries) -> Self {
        let mut outside = Self::default();
        outside.own.extend(own);
        outside.own.extend(&entries.workloads);
        outside.own.extend(entries.vips.keys());
        outside.nodes.extend(objects.nodes.values().flatten());
        outside.nodes.extend(objects.pods.values().flat_map(|pod| &pod.host_addresses));
        outside.nodes.retain(|address| is_unicast(*address) && !own.contains(address));
        let nodes = &outside.nodes;
        outside.others.extend(entries.exempts.iter().filter(|address| !nodes.contains(address)));
        for (id, pod) in &objects.pods {
            if id.namespace != project {
                outside.others.extend(pod.addresses.iter().filter(|_| pod.is_workload()));
            } else {
                outside.node_ports.extend(pod.host_ports.iter().filter(|_| pod.live));
            }
        }
        for (id, service) in &objects.services {
            let ingress = service.ingress_addresses.iter().chain(&service.proxied_addresses);
            if id.namespace != project {
                outside.others.extend(service.cluster_addresses.iter().chain(ingress));
                let endpoints = dns_endpoints(objects, id, service);
                for address in service.cluster_addresses.iter().filter(|_| !endpoints.is_empty()) {
                    outside.dns.entry(*address).or_default().extend(&endpoints);
                }
                continue;
            }
            outside.node_ports.extend(&service.node_ports);
            let at_nodes = ingress.filter(|address| outside.nodes.contains(*address));
            for address in service.external_addresses.iter().chain(at_nodes) {
                outside
                    .externals
                    .extend(service.ports.iter().map(|port| (*address, port.protocol, port.number)));
            }
        }
        outside.others.retain(|address| is_unicast(*address));
        outside
    }

    /// Where these resolvers lead, as far as they are Services of other namespaces.
    #[must_use]
    pub fn resolver_endpoints(&self, resolvers: &[IpAddr]) -> BTreeSet<AddressPort> {
        let of_resolvers = resolvers.iter().filter_map(|resolver| self.dns.get(resolver)).flatten();
        of_resolvers.filter(|(address, ..)| !self.own.contains(address)).copied().collect()
    }

    /// Whose `address` is.
    #[must_use]
    pub fn class(&self, address: IpAddr) -> Class {
        if self.own.contains(&address) {
            Class::Own
        } else if self.others.contains(&address) || self.nodes.contains(&address) {
            Class::Outside
        } else {
            Class::Unknown
        }
    }
}

/// The endpoints that port 53 of a Service leads to. Ports of a Service and of its slices are joined by name and protocol.
fn dns_endpoints(objects: &Objects, id: &Id, service: &Service) -> BTreeSet<AddressPort> {
    let ports: Vec<_> = service.ports.iter().filter(|port| port.number == DNS_PORT).collect();
    let mut found = BTreeSet::new();
    if ports.is_empty() {
        return found;
    }
    let is_of = |slice: &(&Id, &Slice)| slice.0.namespace == id.namespace && slice.1.service == id.name;
    for (_, slice) in objects.slices.iter().filter(is_of) {
        let joined = |target: &&NamedPort| {
            ports.iter().any(|port| port.name == target.name && port.protocol == target.protocol)
        };
        for target in slice.ports.iter().filter(joined) {
            let addresses = slice.endpoints.iter().flat_map(|endpoint| &endpoint.addresses);
            let addresses = addresses.filter(|address| is_unicast(**address));
            found.extend(addresses.map(|address| (*address, target.protocol, target.number)));
        }
    }
    found
}
