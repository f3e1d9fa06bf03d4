//! One workload's view of the objects: the rules.
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

use super::{Id, NamedPort, Objects, Service, Slice, SliceEndpoint};
use crate::proto::directory::{Change, Protocol, ServiceEndpoint, ServicePort, Vip, Workload};
use crate::proto::is_unicast;

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
