//! This node, as far as a pod's guard has to know it: the addresses of the launcher's own network namespace.
//!
//! 1. [`Host::open`] reads all addresses, and hears of changes
//! 2. [`Host::next`] waits until they are others
//! 3. [`Host::gateways`] finds the link-local addresses that the pod sees of this node: those of the other end of its link
//!    and of the bridge that this end is a port of. They are never learned from what somebody announces on the link
//!
//! May touch: two netlink sockets. Source: rtnetlink(7).

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::{AsFd as _, OwnedFd};

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use rustix::net::RecvFlags;
use tokio::io::unix::AsyncFd;

use super::pod::guard::DeviceName;
use super::pod::surroundings::Device;
use crate::agent::netlink::{self, LinkAddress, Netlink};
use crate::proto::is_unicast;
use crate::sys::async_fd;

/// RTNLGRP_LINK, RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV6_IFADDR.
const GROUPS: [u32; 3] = [1, 5, 9];

/// Why the node's addresses are not known.
#[derive(Debug, thiserror::Error)]
pub(super) enum HostError {
    /// The kernel does not tell.
    #[error("cannot read the addresses of this node")]
    Read(#[from] netlink::Error),
    /// The kernel does not tell of changes.
    #[error("cannot watch the addresses of this node")]
    Watch(#[source] io::Error),
}

/// The addresses of this host.
#[derive(Debug)]
pub(super) struct Host {
    events: AsyncFd<OwnedFd>,
    addresses: BTreeSet<IpAddr>,
    links: Vec<HostLink>,
    all: Vec<LinkAddress>,
}

/// A device of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
struct HostLink {
    index: u32,
    /// The index of its other end, in the namespace of that.
    peer: Option<u32>,
    /// The bridge that it is a port of.
    bridge: Option<u32>,
}

impl Host {
    /// Reads the addresses of the calling thread's network namespace. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// See [`HostError`].
    pub(super) fn open() -> Result<Self, HostError> {
        let watch = || -> io::Result<AsyncFd<OwnedFd>> {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind(&SocketAddr::new(0, 0))?;
            socket.set_non_blocking(true)?;
            for group in GROUPS {
                socket.add_membership(group)?;
            }
            // netlink-sys has no way to give its descriptor away.
            async_fd::readable(socket.as_fd().try_clone_to_owned()?)
        };
        let events = watch().map_err(HostError::Watch)?;
        let mut host = Self { events, addresses: BTreeSet::new(), links: Vec::new(), all: Vec::new() };
        host.read()?;
        Ok(host)
    }

    /// Global addresses of this host.
    #[must_use]
    pub(super) fn addresses(&self) -> &BTreeSet<IpAddr> {
        &self.addresses
    }

    /// Waits until the addresses have changed.
    ///
    /// # Errors
    /// See [`HostError`]; what was known stays.
    ///
    /// # Cancel safety
    /// A call that is dropped before it returns loses nothing.
    pub(super) async fn next(&mut self) -> Result<(), HostError> {
        loop {
            let mut ready = self.events.readable().await.map_err(HostError::Watch)?;
            drain(ready.get_inner());
            ready.clear_ready();
            let before = (self.addresses.clone(), self.links.clone(), self.all.clone());
            self.read()?;
            if before != (self.addresses.clone(), self.links.clone(), self.all.clone()) {
                return Ok(());
            }
        }
    }

    fn read(&mut self) -> Result<(), HostError> {
        let mut netlink = Netlink::open()?;
        let links = netlink.dump(&RouteNetlinkMessage::GetLink(LinkMessage::default()), "links")?;
        self.links = links.into_iter().filter_map(read_link).collect();
        self.all = netlink.addresses()?;
        self.addresses = self.all.iter().map(|found| found.address).filter(|a| is_unicast(*a)).collect();
        Ok(())
    }

    /// Link-local addresses of this node on each of the pod's devices.
    #[must_use]
    pub(super) fn gateways(&self, devices: &[Device]) -> BTreeSet<(DeviceName, Ipv6Addr)> {
        let mut found = BTreeSet::new();
        for device in devices {
            let Some(end) = self.other_end(device) else { continue };
            let at = [Some(end.index), end.bridge];
            for address in self.all.iter().filter(|address| at.contains(&Some(address.index))) {
                if let IpAddr::V6(v6) = address.address
                    && v6.is_unicast_link_local()
                {
                    found.insert((device.name.clone(), v6));
                }
            }
        }
        found
    }

    /// The other end of a pod's link: both name each other.
    fn other_end(&self, device: &Device) -> Option<&HostLink> {
        let peer = device.peer?;
        self.links.iter().find(|link| link.index == peer && link.peer == Some(device.index))
    }
}

/// Takes the events that have come. Which they are does not matter: everything is read again.
fn drain(events: &OwnedFd) {
    let mut bytes = [0; 64];
    while rustix::net::recv(events, &mut bytes, RecvFlags::DONTWAIT | RecvFlags::TRUNC).is_ok() {}
}

fn read_link(message: RouteNetlinkMessage) -> Option<HostLink> {
    let RouteNetlinkMessage::NewLink(message) = message else { return None };
    let mut link = HostLink { index: message.header.index, peer: None, bridge: None };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::Link(index) => link.peer = Some(index),
            LinkAttribute::Controller(index) => link.bridge = Some(index),
            _ => {}
        }
    }
    Some(link)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_other_end_of_a_link_and_its_bridge_give_the_gateways_and_others_do_not() {
        let mut host = Host::open().unwrap();
        let link = |index, peer, bridge| HostLink { index, peer, bridge };
        host.links = vec![link(7, Some(2), Some(9)), link(8, Some(3), None), link(9, None, None)];
        let address =
            |index, text: &str| LinkAddress { index, address: text.parse().unwrap(), prefix_len: 64 };
        host.all =
            vec![address(7, "fe80::7"), address(8, "fe80::8"), address(9, "fe80::9"), address(9, "fd00::9")];
        let device = |index, peer| Device { index, name: "eth0".try_into().unwrap(), peer };
        let found = |devices: &[Device]| -> Vec<String> {
            host.gateways(devices).into_iter().map(|(_, address)| address.to_string()).collect()
        };
        assert_eq!(found(&[device(2, Some(7))]), ["fe80::7", "fe80::9"]);
        assert!(found(&[device(4, Some(7))]).is_empty(), "an index of another namespace's device");
        assert!(found(&[device(2, None)]).is_empty());
    }
}
