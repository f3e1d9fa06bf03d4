//! What a pod's guard has to know of the pod's devices: their names, their subnets' broadcast addresses, their other ends.
//!
//! Read anew before each load: devices come and go. May touch: one netlink socket, on a thread inside the namespace.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

use ipnet::Ipv4Net;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use tracing::warn;

use super::netns::PodNetns;
use super::network::NetworkError;
use crate::agent::netlink::{LinkAddress, Netlink};
use crate::agent::tun;
use crate::launcher::pod::guard::DeviceName;

/// Most devices whose egress is guarded.
const DEVICES_MAX: usize = 64;

/// A device of the pod, neither `lo` nor `tenc0`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Interface index.
    pub index: u32,
    /// Interface name.
    pub name: DeviceName,
    /// Index of its other end, in the namespace of that.
    pub peer: Option<u32>,
}

/// The pod's devices and subnets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Surroundings {
    /// In the order of their indices.
    pub devices: Vec<Device>,
    /// The directed broadcast address of each subnet.
    pub broadcasts: BTreeSet<Ipv4Addr>,
}

impl Surroundings {
    /// Looks at the namespace.
    ///
    /// # Errors
    /// If it cannot be entered or read.
    pub fn inspect(netns: &PodNetns) -> Result<Self, NetworkError> {
        netns.run(|| {
            let mut netlink = Netlink::open()?;
            let links = netlink.dump(&RouteNetlinkMessage::GetLink(LinkMessage::default()), "links")?;
            let mut devices: Vec<_> = links.into_iter().filter_map(read_device).collect();
            devices.sort_by_key(|device| device.index);
            devices.truncate(DEVICES_MAX);
            let broadcasts = netlink.addresses()?.into_iter().filter_map(broadcast).collect();
            Ok(Self { devices, broadcasts })
        })?
    }

    /// Names of the devices.
    #[must_use]
    pub fn names(&self) -> Vec<DeviceName> {
        self.devices.iter().map(|device| device.name.clone()).collect()
    }
}

fn read_device(message: RouteNetlinkMessage) -> Option<Device> {
    let RouteNetlinkMessage::NewLink(message) = message else { return None };
    if message.header.flags.contains(LinkFlags::Loopback) {
        return None;
    }
    let (mut name, mut peer) = (None, None);
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(text) => name = Some(text),
            LinkAttribute::Link(index) => peer = Some(index),
            _ => {}
        }
    }
    let name = name.filter(|name| name != tun::NAME)?;
    match DeviceName::try_from(name.as_str()) {
        Ok(name) => Some(Device { index: message.header.index, name, peer }),
        Err(error) => {
            warn!(%error, "frames of packet sockets on this device are not guarded");
            None
        }
    }
}

fn broadcast(found: LinkAddress) -> Option<Ipv4Addr> {
    let IpAddr::V4(address) = found.address else { return None };
    let net = Ipv4Net::new(address, found.prefix_len).ok()?;
    (found.prefix_len < 31 && !address.is_loopback()).then(|| net.broadcast())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_subnets_with_more_than_two_addresses_have_a_broadcast_address() {
        let of = |text: &str, prefix_len| {
            broadcast(LinkAddress { index: 2, address: text.parse().unwrap(), prefix_len })
        };
        assert_eq!(of("10.1.1.11", 24), Some(Ipv4Addr::new(10, 1, 1, 255)));
        for (address, prefix_len) in [("10.1.2.11", 32), ("10.1.2.10", 31), ("127.0.0.1", 8), ("fd00::1", 64)]
        {
            assert_eq!(of(address, prefix_len), None);
        }
    }
}
