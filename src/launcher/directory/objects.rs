//! The objects of a cluster, as far as the directory needs them.
//!
//! Source: Kubernetes API reference, Pod, Service, EndpointSlice and Node.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::proto::directory::Protocol;

/// What names a namespaced object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Id {
    /// The namespace, which is the project.
    pub namespace: String,
    /// The name inside the namespace.
    pub name: String,
}

/// What the directory needs of a `v1/Pod`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    /// It shares its node's network: its addresses are the node's.
    pub host_network: bool,
    /// Its phase is Pending or Running: its addresses are its own.
    pub live: bool,
    /// status.podIPs.
    pub addresses: Vec<IpAddr>,
    /// status.hostIPs.
    pub host_addresses: Vec<IpAddr>,
    /// Ports of the node that lead to its containers.
    pub host_ports: Vec<(Protocol, u16)>,
}

impl Pod {
    /// Whether the addresses belong to this pod alone, now.
    #[must_use]
    pub fn is_workload(&self) -> bool {
        self.live && !self.host_network
    }
}

/// What the directory needs of a `v1/Service`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Service {
    /// spec.clusterIPs; none if it is headless or an ExternalName.
    pub cluster_addresses: Vec<IpAddr>,
    /// status.loadBalancer.ingress, where the address is delivered to the nodes as it is.
    pub ingress_addresses: Vec<IpAddr>,
    /// The same with ipMode Proxy: a load balancer of its own.
    pub proxied_addresses: Vec<IpAddr>,
    /// spec.externalIPs.
    pub external_addresses: Vec<IpAddr>,
    /// Ports of every node that lead to it.
    pub node_ports: Vec<(Protocol, u16)>,
    /// spec.ports.
    pub ports: Vec<NamedPort>,
    /// spec.sessionAffinity is ClientIP.
    pub client_ip_affinity: bool,
    /// spec.type is ExternalName: another name for something elsewhere.
    pub is_external_name: bool,
}

/// A port of a Service (the one clients use) or of a slice (the one pods listen on); the name joins the two.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedPort {
    /// Empty where the only port has no name.
    pub name: String,
    /// Its protocol.
    pub protocol: Protocol,
    /// Its number.
    pub number: u16,
}

/// What the directory needs of a `discovery.k8s.io/v1 EndpointSlice` of family IPv4 or IPv6.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// The Service of the same namespace that it belongs to.
    pub service: String,
    /// Ports of every endpoint.
    pub ports: Vec<NamedPort>,
    /// Endpoints.
    pub endpoints: Vec<SliceEndpoint>,
}

/// One endpoint of a slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SliceEndpoint {
    /// Its addresses, of the slice's family.
    pub addresses: Vec<IpAddr>,
    /// Ready for new connections.
    pub ready: bool,
    /// The Pod that targetRef names.
    pub pod: Option<Id>,
}

/// Everything a source has seen, of all projects.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Objects {
    /// Pods.
    pub pods: BTreeMap<Id, Pod>,
    /// Services.
    pub services: BTreeMap<Id, Service>,
    /// Endpoint slices.
    pub slices: BTreeMap<Id, Slice>,
    /// Node addresses, by the node's name.
    pub nodes: BTreeMap<String, Vec<IpAddr>>,
}

impl Objects {
    /// Adds the objects of `other`; an object that both have is taken from `other`.
    pub fn extend(&mut self, other: Self) {
        self.pods.extend(other.pods);
        self.services.extend(other.services);
        self.slices.extend(other.slices);
        self.nodes.extend(other.nodes);
    }

    /// Whether any pod, Service or slice is of `project`.
    #[must_use]
    pub fn names_project(&self, project: &str) -> bool {
        let mut ids = self.pods.keys().chain(self.services.keys()).chain(self.slices.keys());
        ids.any(|id| id.namespace == project)
    }

    /// The pods, of any project, that have one of `addresses` for themselves.
    pub fn workloads_at<'a>(&'a self, addresses: &'a [IpAddr]) -> impl Iterator<Item = (&'a Id, &'a Pod)> {
        self.pods
            .iter()
            .filter(|(_, pod)| pod.is_workload() && pod.addresses.iter().any(|a| addresses.contains(a)))
    }
}
