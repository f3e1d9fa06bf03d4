//! What an agent is told about its project. The launcher parses manifests and sends these; the engine applies them.
//!
//! A directory is a set of entries; a [`Change`] sets or removes one entry. Changes between two generations are
//! applied together, so the engine never sees half an update.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::noise::{PresharedKey, PublicKey};

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
    /// Its static public key.
    pub public: PublicKey,
    /// The key shared by that address and our address of the same family.
    pub psk: PresharedKey,
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
}
