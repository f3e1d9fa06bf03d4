//! The directory: which addresses are workloads, VIPs and exemptions of one project.
//!
//! 1. a source ([`mod@file`]; later the Kubernetes API) keeps the [`Objects`] it has seen
//! 2. [`Entries::of`] applies the rules to them: a pure function of all objects
//! 3. [`Entries::changes_to`] is the difference that the agent is told
//!
//! Rules. A workload is a Pod of the project that is not hostNetwork and whose phase is Pending or Running, with all
//! its addresses; no slice makes one. A VIP is a ClusterIP or a load-balancer ingress address of a Service of the
//! project; its endpoints are those addresses of its slices (of its own family, ports matched by name) that a
//! workload confirms. An endpoint is external only on positive evidence: no Pod is referred to, or a hostNetwork one;
//! a Service with external endpoints alone is exempt. A Service with any, or of type ExternalName, may lead DNS out of the
//! project; no other name of the project's zone may. Anything unclear stays protected and unreachable.
//!
//! Where two rules meet one address: node, workload, VIP, external endpoint, in this order. Nodes come first because
//! a captured node address would cut off its kubelet; workloads and VIPs come before external endpoints because
//! the other way round would let plaintext out. An address that a slice says belongs to a Pod of the project which is not
//! listed (yet) is a VIP without ports, too. Workloads of a family that our Pod has no address of cannot be peers:
//! they are VIPs without ports, so that the guard closes the way to them.
//!
//! Touches nothing. Source: Kubernetes API reference, Service and EndpointSlice.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::proto::directory::{Change, Protocol, ServiceEndpoint, ServicePort, Vip, Workload};
use crate::proto::is_unicast;

pub mod file;
mod folder;
pub mod manifest;
mod outside;

pub use outside::Outside;

#[cfg(test)]
mod tests;

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

/// The directory of one project as one of its workloads sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entries {
    /// Workloads, without our own addresses.
    pub workloads: BTreeSet<IpAddr>,
    /// VIPs by address.
    pub vips: BTreeMap<IpAddr, Vip>,
    /// Addresses that are never learned.
    pub exempts: BTreeSet<IpAddr>,
    /// Names of Services that lead out of the project.
    pub externals: BTreeSet<String>,
}

impl Entries {
    /// Applies the rules to `objects`, for the workload of `project` whose addresses are `own`.
    #[must_use]
    pub fn of(objects: &Objects, project: &str, own: &[IpAddr]) -> Self {
        let view = View::new(objects, project, own);
        let mut vips = BTreeMap::<IpAddr, VipBuilder>::new();
        let mut external = BTreeSet::new();
        let mut externals = BTreeSet::new();
        for (id, service) in objects.services.iter().filter(|(id, _)| id.namespace == project) {
            let leads_out = view.add_service(&id.name, service, &mut vips, &mut external);
            if leads_out || service.is_external_name {
                externals.insert(id.name.to_ascii_lowercase());
            }
        }
        let mut vips: BTreeMap<_, _> =
            vips.into_iter().map(|(address, vip)| (address, vip.finish(address))).collect();
        let unconfirmed = view.unconfirmed(project);
        let of_ours = |address: &IpAddr| own.iter().any(|own| own.is_ipv4() == address.is_ipv4());
        let (mut workloads, foreign): (BTreeSet<_>, BTreeSet<_>) =
            view.workloads.into_iter().partition(of_ours);
        for address in foreign.into_iter().chain(unconfirmed) {
            vips.entry(address).or_insert(Vip { address, ports: Vec::new(), client_ip_affinity: false });
        }
        let mut exempts = view.nodes;
        exempts.extend(external.into_iter().filter(|a| !workloads.contains(a) && !vips.contains_key(a)));
        exempts.retain(|address| is_unicast(*address));
        for address in own {
            workloads.remove(address);
            exempts.remove(address);
        }
        Self { workloads, vips, exempts, externals }
    }

    /// The changes that turn `self` into `next`, and no more: removals before settings, so that an address may change
    /// its kind, and workloads before the VIPs that name them. `workload` makes a workload of an address.
    #[must_use]
    pub fn changes_to(&self, next: &Self, workload: impl Fn(IpAddr) -> Workload) -> Vec<Change> {
        let mut changes = Vec::new();
        let gone = self.vips.keys().filter(|a| !next.vips.contains_key(a));
        changes.extend(gone.map(|a| Change::RemoveVip(*a)));
        changes.extend(self.workloads.difference(&next.workloads).map(|a| Change::RemoveWorkload(*a)));
        changes.extend(self.exempts.difference(&next.exempts).map(|a| Change::RemoveExempt(*a)));
        changes.extend(self.externals.difference(&next.externals).cloned().map(Change::RemoveExternal));
        changes.extend(next.externals.difference(&self.externals).cloned().map(Change::SetExternal));
        changes.extend(next.exempts.difference(&self.exempts).map(|a| Change::SetExempt(*a)));
        changes.extend(next.workloads.difference(&self.workloads).map(|a| Change::SetWorkload(workload(*a))));
        let set = next.vips.iter().filter(|(a, vip)| self.vips.get(a) != Some(vip));
        changes.extend(set.map(|(_, vip)| Change::SetVip(vip.clone())));
        changes
    }
}

/// The project's objects, indexed for the rules.
struct View<'a> {
    own: &'a [IpAddr],
    /// Addresses of the project's workloads, ours among them.
    workloads: BTreeSet<IpAddr>,
    nodes: BTreeSet<IpAddr>,
    host_network: BTreeSet<&'a Id>,
    slices: BTreeMap<&'a str, Vec<&'a Slice>>,
}

impl<'a> View<'a> {
    fn new(objects: &'a Objects, project: &str, own: &'a [IpAddr]) -> Self {
        let pods: Vec<_> = objects.pods.iter().filter(|(id, _)| id.namespace == project).collect();
        let mut nodes: BTreeSet<IpAddr> = objects.nodes.values().flatten().copied().collect();
        nodes.extend(pods.iter().flat_map(|(_, pod)| &pod.host_addresses));
        let workloads = pods
            .iter()
            .filter(|(_, pod)| pod.is_workload())
            .flat_map(|(_, pod)| &pod.addresses)
            .copied()
            .filter(|address| is_unicast(*address) && !nodes.contains(address))
            .collect();
        let host_network = pods.iter().filter(|(_, pod)| pod.host_network).map(|(id, _)| *id).collect();
        let mut slices = BTreeMap::<_, Vec<_>>::new();
        for (id, slice) in &objects.slices {
            if id.namespace == project {
                slices.entry(slice.service.as_str()).or_default().push(slice);
            }
        }
        Self { own, workloads, nodes, host_network, slices }
    }

    /// Addresses that a slice gives to a Pod of the project which is not listed: the slice may come before the Pod.
    fn unconfirmed(&self, project: &str) -> BTreeSet<IpAddr> {
        let endpoints = self.slices.values().flatten().flat_map(|slice| &slice.endpoints);
        let of_project = |endpoint: &&SliceEndpoint| {
            endpoint.pod.as_ref().is_some_and(|id| id.namespace == project && !self.host_network.contains(id))
        };
        let addresses = endpoints.filter(of_project).flat_map(|endpoint| &endpoint.addresses).copied();
        addresses.filter(|address| is_unicast(*address) && !self.is_someone(*address)).collect()
    }

    /// Returns whether one of its endpoints is external.
    fn add_service(
        &self,
        name: &str,
        service: &Service,
        vips: &mut BTreeMap<IpAddr, VipBuilder>,
        external: &mut BTreeSet<IpAddr>,
    ) -> bool {
        let slices = self.slices.get(name).map_or(&[][..], Vec::as_slice);
        let (mut others, mut externals) = (0, 0);
        for endpoint in slices.iter().flat_map(|slice| &slice.endpoints) {
            for address in &endpoint.addresses {
                if self.is_external(endpoint, *address) {
                    external.insert(*address);
                    externals += 1;
                } else {
                    others += 1;
                }
            }
        }
        let addresses = service
            .cluster_addresses
            .iter()
            .chain(&service.ingress_addresses)
            .filter(|a| is_unicast(**a) && !self.is_someone(**a));
        if externals > 0 && others == 0 {
            external.extend(addresses);
            return true;
        }
        for address in addresses {
            let vip = vips.entry(*address).or_default();
            vip.client_ip_affinity |= service.client_ip_affinity;
            for port in &service.ports {
                let endpoints = vip.ports.entry((port.protocol, port.number)).or_default();
                for slice in slices {
                    self.add_endpoints(slice, port, *address, endpoints);
                }
            }
        }
        externals > 0
    }

    /// Adds the endpoints of `slice` for the Service's port `port`, of the family of `vip`.
    fn add_endpoints(
        &self,
        slice: &Slice,
        port: &NamedPort,
        vip: IpAddr,
        endpoints: &mut BTreeMap<(IpAddr, u16), bool>,
    ) {
        let targets = slice.ports.iter().filter(|p| p.name == port.name && p.protocol == port.protocol);
        for target in targets {
            for endpoint in &slice.endpoints {
                for address in &endpoint.addresses {
                    if address.is_ipv4() == vip.is_ipv4() && self.workloads.contains(address) {
                        // Two slices may hold one endpoint while it moves between them: one ready is enough.
                        *endpoints.entry((*address, target.number)).or_default() |= endpoint.ready;
                    }
                }
            }
        }
    }

    /// Only positive evidence counts: a Pod that we have not seen, or that ended, is unknown, not external.
    fn is_external(&self, endpoint: &SliceEndpoint, address: IpAddr) -> bool {
        !self.workloads.contains(&address)
            && endpoint.pod.as_ref().is_none_or(|id| self.host_network.contains(id))
    }

    /// An address that a better founded rule has taken already.
    fn is_someone(&self, address: IpAddr) -> bool {
        self.nodes.contains(&address) || self.workloads.contains(&address) || self.own.contains(&address)
    }
}

/// A VIP under construction: several Services may share a load-balancer address.
#[derive(Default)]
struct VipBuilder {
    client_ip_affinity: bool,
    ports: BTreeMap<(Protocol, u16), BTreeMap<(IpAddr, u16), bool>>,
}

impl VipBuilder {
    fn finish(self, address: IpAddr) -> Vip {
        let ports = self.ports.into_iter().map(|((protocol, port), endpoints)| ServicePort {
            protocol,
            port,
            endpoints: endpoints
                .into_iter()
                .map(|((address, port), ready)| ServiceEndpoint { address, port, ready })
                .collect(),
        });
        Vip { address, ports: ports.collect(), client_ip_affinity: self.client_ip_affinity }
    }
}
