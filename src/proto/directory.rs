//! What an agent is told about its project. The launcher parses manifests and sends these; the engine applies them.
//!
//! A directory is a set of entries; a [`Change`] sets or removes one entry. Changes between two generations are
//! applied in an order whose every prefix is safe: [`super::update`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::Bound;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::Now;
use super::noise::PeerKeys;

/// IP protocol of a Service port, as its IANA number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[repr(u8)]
pub enum Protocol {
    /// TCP.
    Tcp = 6,
    /// UDP.
    Udp = 17,
    /// SCTP.
    Sctp = 132,
}

/// One workload endpoint behind a Service port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ServiceEndpoint {
    /// Pod address, of the VIP's family.
    pub address: IpAddr,
    /// Target port on that pod.
    pub port: u16,
    /// New flows go only to ready endpoints; a server accepts flows for unready ones too.
    pub ready: bool,
}

/// One port of a VIP.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ServicePort {
    /// Protocol of `port`.
    pub protocol: Protocol,
    /// The port that clients use with the VIP.
    pub port: u16,
    /// Workload endpoints, sorted.
    pub endpoints: Vec<ServiceEndpoint>,
}

/// A Service address and everything behind it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vip {
    /// ClusterIP or load-balancer ingress address.
    pub address: IpAddr,
    /// Ports, sorted.
    pub ports: Vec<ServicePort>,
    /// `sessionAffinity: ClientIP`: the choice of endpoint depends on the client's address alone.
    pub client_ip_affinity: bool,
}

/// A workload of the key domain, one per address; in the derived key mode a peer *is* an address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workload {
    /// The pod's address.
    pub address: IpAddr,
    /// Of the project key in use.
    pub keys: PeerKeys,
    /// Of the project key that is accepted beside it during a rotation.
    pub accept: Option<PeerKeys>,
}

/// Sets or removes one entry of the directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Change {
    /// Adds or replaces a workload.
    SetWorkload(Workload),
    /// Removes the workload with this address.
    RemoveWorkload(IpAddr),
    /// Adds or replaces a VIP with all its ports.
    SetVip(Vip),
    /// Removes the VIP.
    RemoveVip(IpAddr),
    /// An address that is never learned or protected, whatever DNS says: nodes, the API server, external endpoints, Exempt VIPs.
    SetExempt(IpAddr),
    /// The address is no longer exempt.
    RemoveExempt(IpAddr),
    /// A Service by its name, in lower case, that leads out of the project: its endpoints are elsewhere, or it is another name
    /// for something elsewhere.
    SetExternal(String),
    /// The Service does so no longer.
    RemoveExternal(String),
}

/// A server accepts a VIP and port this long after the last slice that listed it is gone.
const SERVED_AFTER_REMOVAL: Duration = Duration::from_secs(60);

/// A part of the addresses.
pub(super) type Range = (Bound<IpAddr>, Bound<IpAddr>);

/// The engine's copy of the directory.
#[derive(Debug, Default)]
pub struct Directory {
    own: Vec<IpAddr>,
    workloads: BTreeMap<IpAddr, Workload>,
    vips: BTreeMap<IpAddr, Vip>,
    exempt: BTreeSet<IpAddr>,
    /// Names of Services that lead out of the project.
    external: BTreeSet<String>,
    /// (VIP, protocol, port) for which we are an endpoint: our address and target port, and until when if it was removed.
    served: BTreeMap<(IpAddr, u8, u16), Served>,
}

#[derive(Debug)]
struct Served {
    target: (IpAddr, u16),
    until: Option<Instant>,
}

/// What a change did, for routing and peers.
#[derive(Debug, PartialEq, Eq)]
pub enum Effect {
    /// A workload appeared, or its keys changed.
    WorkloadSet(Workload),
    /// A workload is gone.
    WorkloadRemoved(IpAddr),
    /// A VIP appeared or changed.
    VipSet(IpAddr),
    /// A VIP is gone.
    VipRemoved(IpAddr),
    /// An address is none of the project's.
    Exempt(IpAddr),
    /// Nothing that concerns anybody else.
    None,
}

impl Directory {
    /// An empty directory of the pod with the addresses `own`.
    #[must_use]
    pub fn new(own: Vec<IpAddr>) -> Self {
        Self { own, ..Self::default() }
    }

    /// Names of Services that lead out of the project.
    pub(super) fn externals(&self) -> impl Iterator<Item = &String> {
        self.external.iter()
    }

    /// Workloads within `range`, in order.
    pub(super) fn workloads(&self, range: Range) -> impl Iterator<Item = IpAddr> {
        self.workloads.range(range).map(|(address, _)| *address)
    }

    /// VIPs within `range`, in order.
    pub(super) fn vips(&self, range: Range) -> impl Iterator<Item = IpAddr> {
        self.vips.range(range).map(|(address, _)| *address)
    }

    /// Exempt addresses within `range`, in order.
    pub(super) fn exempt(&self, range: Range) -> impl Iterator<Item = IpAddr> {
        self.exempt.range(range).copied()
    }

    /// Applies one change.
    pub fn apply(&mut self, change: Change, now: Now) -> Effect {
        match change {
            Change::SetWorkload(workload) => {
                if self.own.contains(&workload.address)
                    || self.workloads.get(&workload.address) == Some(&workload)
                {
                    return Effect::None;
                }
                self.workloads.insert(workload.address, workload.clone());
                Effect::WorkloadSet(workload)
            }
            Change::RemoveWorkload(address) => match self.workloads.remove(&address) {
                Some(_) => Effect::WorkloadRemoved(address),
                None => Effect::None,
            },
            Change::SetVip(vip) => {
                let address = vip.address;
                self.serve(&vip, now);
                self.vips.insert(address, vip);
                Effect::VipSet(address)
            }
            Change::RemoveVip(address) => {
                self.retire(address, now);
                match self.vips.remove(&address) {
                    Some(_) => Effect::VipRemoved(address),
                    None => Effect::None,
                }
            }
            Change::SetExempt(address) => {
                self.exempt.insert(address);
                Effect::Exempt(address)
            }
            Change::RemoveExempt(address) => {
                self.exempt.remove(&address);
                Effect::None
            }
            Change::SetExternal(name) => {
                self.external.insert(name);
                Effect::None
            }
            Change::RemoveExternal(name) => {
                self.external.remove(&name);
                Effect::None
            }
        }
    }

    fn serve(&mut self, vip: &Vip, now: Now) {
        self.retire(vip.address, now);
        for port in &vip.ports {
            if let Some(endpoint) = port.endpoints.iter().find(|e| self.own.contains(&e.address)) {
                let served = Served { target: (endpoint.address, endpoint.port), until: None };
                self.served.insert((vip.address, port.protocol as u8, port.port), served);
            }
        }
    }

    /// Forgets what was served long ago.
    pub(super) fn forget_served(&mut self, now: Now) {
        self.served.retain(|_, served| served.until.is_none_or(|until| until > now.instant));
    }

    fn retire(&mut self, vip: IpAddr, now: Now) {
        for (_, served) in self.served.range_mut((vip, 0, 0)..=(vip, u8::MAX, u16::MAX)) {
            served.until.get_or_insert(now.instant + SERVED_AFTER_REMOVAL);
        }
    }

    /// Our own address and target port for a VIP and port that we are an endpoint of.
    #[must_use]
    pub fn target(&self, vip: IpAddr, protocol: u8, port: u16, now: Now) -> Option<(IpAddr, u16)> {
        let served = self.served.get(&(vip, protocol, port))?;
        served.until.is_none_or(|until| until > now.instant).then_some(served.target)
    }

    /// The VIP with this address.
    #[must_use]
    pub fn vip(&self, address: IpAddr) -> Option<&Vip> {
        self.vips.get(&address)
    }

    /// Whether a peer has this address.
    #[must_use]
    pub fn is_workload(&self, address: IpAddr) -> bool {
        self.workloads.contains_key(&address)
    }

    /// Whether the Service of this name, in lower case, leads out of the project.
    #[must_use]
    pub fn is_external(&self, service: &str) -> bool {
        self.external.contains(service)
    }

    /// Whether the address is never learned, whatever DNS says.
    #[must_use]
    pub fn is_exempt(&self, address: IpAddr) -> bool {
        self.exempt.contains(&address)
    }
}
