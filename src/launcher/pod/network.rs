//! What the pod's network looks like before anything of ours is in it.
//!
//! 1. the interface is the device of the default route; without one, the only device besides `lo` that is up
//! 2. its name, MTU and global addresses are read over netlink, on a thread inside the namespace
//! 3. the source ports of upstream DNS sockets are chosen outside the ports that the pod's applications are given
//!
//! May touch: one netlink socket and two files under `/proc/sys/net`, which follow the namespace of the reading thread.
//! Source: rtnetlink(7); Documentation/networking/ip-sysctl.rst, `ip_local_port_range`.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::ops::RangeInclusive;

use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::route::{RouteAttribute, RouteHeader, RouteMessage, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::netns::{PodError, PodNetns};
use crate::agent::netlink::{self, Netlink};
use crate::agent::tun;
use crate::exit::{Exit, ExitCode};
use crate::proto::is_unicast;

/// Fewer ports than this are too few to hide a query in.
const DNS_PORTS_MIN: usize = 1024;
/// More ports than this add nothing, but take source ports from applications that choose their own.
const DNS_PORTS_MAX: u16 = 8192;
/// How many ports the agent keeps bound where the applications have nearly all.
const DNS_PORTS_BOUND: u16 = 256;
/// Ports below are for servers.
const UNPRIVILEGED: u16 = 1024;

/// Why a pod's network cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The namespace cannot be entered.
    #[error(transparent)]
    Netns(#[from] PodError),
    /// The kernel does not tell.
    #[error("cannot read the pod's network")]
    Netlink(#[from] netlink::Error),
    /// A sysctl cannot be read.
    #[error("cannot read {path}")]
    Sysctl {
        /// The file.
        path: &'static str,
        /// Why.
        source: io::Error,
    },
    /// No device to protect.
    #[error("the pod has no network: no default route, and no device besides lo is up")]
    NoInterface,
    /// Several devices, and nothing tells which is the pod's.
    #[error("the pod has no default route and several devices ({}): give it a default route", names.join(", ").escape_debug())]
    SeveralInterfaces {
        /// Their names.
        names: Vec<String>,
    },
    /// Nothing to be reached at.
    #[error("the pod's device {} has no global address", interface.escape_debug())]
    NoAddress {
        /// The device.
        interface: String,
    },
}

impl ExitCode for NetworkError {
    fn exit(&self) -> Exit {
        match self {
            Self::Netns(error) => error.exit(),
            Self::Netlink(_) | Self::Sysctl { .. } => Exit::Kernel,
            Self::NoInterface | Self::SeveralInterfaces { .. } | Self::NoAddress { .. } => Exit::Usage,
        }
    }
}

/// Source ports of the agent's upstream DNS sockets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DnsPorts {
    /// LO to HI.
    pub range: RangeInclusive<u16>,
    /// The range lies within the applications' ports: the agent has to keep all of them bound.
    pub keep_bound: bool,
}

/// The pod's interface and what it carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodNetwork {
    /// Name of the device.
    pub interface: String,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Its global unicast addresses, in the kernel's order, IPv4 first.
    pub addresses: Vec<IpAddr>,
    /// Where upstream DNS sockets draw their ports.
    pub dns_ports: DnsPorts,
}

impl PodNetwork {
    /// Looks at the namespace. The tunnel's port is kept out of the DNS ports.
    ///
    /// # Errors
    ///
    /// If the namespace cannot be entered or read, or has no interface or address to protect.
    pub fn inspect(netns: &PodNetns, tunnel_port: u16) -> Result<Self, NetworkError> {
        netns.run(|| {
            let interface = Dump::read()?.interface()?;
            let dns_ports = dns_ports(&local_ports()?, tunnel_port);
            let Interface { name, mtu, addresses } = interface;
            Ok(Self { interface: name, mtu, addresses, dns_ports })
        })?
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Interface {
    name: String,
    mtu: u32,
    addresses: Vec<IpAddr>,
}

/// A default route: its metric and its device.
type DefaultRoute = (u32, u32);

/// What the kernel says about the namespace.
#[derive(Default)]
struct Dump {
    /// Devices that are up and neither loopback nor ours, by index; with their addresses.
    devices: BTreeMap<u32, Interface>,
    defaults4: Vec<DefaultRoute>,
    defaults6: Vec<DefaultRoute>,
}

impl Dump {
    fn read() -> Result<Self, NetworkError> {
        let mut netlink = Netlink::open()?;
        let mut dump = Self::default();
        let links = RouteNetlinkMessage::GetLink(LinkMessage::default());
        for message in netlink.dump(&links, "links")? {
            if let RouteNetlinkMessage::NewLink(link) = message {
                dump.add_link(&link);
            }
        }
        let addresses = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        for message in netlink.dump(&addresses, "addresses")? {
            if let RouteNetlinkMessage::NewAddress(address) = message {
                dump.add_address(&address);
            }
        }
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut request = RouteMessage::default();
            request.header.address_family = family;
            for message in netlink.dump(&RouteNetlinkMessage::GetRoute(request), "routes")? {
                if let RouteNetlinkMessage::NewRoute(route) = message {
                    dump.add_route(&route);
                }
            }
        }
        Ok(dump)
    }

    fn add_link(&mut self, link: &LinkMessage) {
        let flags = link.header.flags;
        if !flags.contains(LinkFlags::Up) || flags.contains(LinkFlags::Loopback) {
            return;
        }
        let mut device = Interface::default();
        for attribute in &link.attributes {
            match attribute {
                LinkAttribute::IfName(name) => device.name.clone_from(name),
                LinkAttribute::Mtu(mtu) => device.mtu = *mtu,
                _ => {}
            }
        }
        // A predecessor that crashed may have left ours.
        if device.name != tun::NAME {
            self.devices.insert(link.header.index, device);
        }
    }

    fn add_address(&mut self, message: &AddressMessage) {
        let (mut local, mut address, mut unusable) = (None, None, false);
        for attribute in &message.attributes {
            match attribute {
                // On a point-to-point link the local address is ours and the other one the far end's.
                AddressAttribute::Local(ip) => local = Some(*ip),
                AddressAttribute::Address(ip) => address = Some(*ip),
                AddressAttribute::Flags(flags) => unusable = flags.contains(AddressFlags::Dadfailed),
                _ => {}
            }
        }
        let global = matches!(message.header.scope, AddressScope::Universe | AddressScope::Site);
        if let (Some(device), Some(ip)) = (self.devices.get_mut(&message.header.index), local.or(address))
            && global
            && !unusable
            && is_unicast(ip)
            && !device.addresses.contains(&ip)
        {
            device.addresses.push(ip);
        }
    }

    fn add_route(&mut self, route: &RouteMessage) {
        let header = &route.header;
        if header.destination_prefix_length != 0 || header.kind != RouteType::Unicast {
            return;
        }
        let (mut table, mut metric, mut device) = (u32::from(header.table), 0, None);
        for attribute in &route.attributes {
            match attribute {
                RouteAttribute::Table(t) => table = *t,
                RouteAttribute::Priority(priority) => metric = *priority,
                RouteAttribute::Oif(index) => device = Some(*index),
                RouteAttribute::MultiPath(hops) => device = hops.first().map(|hop| hop.interface_index),
                _ => {}
            }
        }
        if let Some(device) = device.filter(|_| table == u32::from(RouteHeader::RT_TABLE_MAIN)) {
            let defaults = if header.address_family == AddressFamily::Inet {
                &mut self.defaults4
            } else {
                &mut self.defaults6
            };
            defaults.push((metric, device));
        }
    }

    fn interface(mut self) -> Result<Interface, NetworkError> {
        // IPv4's default route decides where both families have one: the platform gives pods one device.
        self.defaults4.sort();
        self.defaults6.sort();
        let by_route =
            self.defaults4.iter().chain(&self.defaults6).find(|(_, i)| self.devices.contains_key(i));
        let index = match (by_route, self.devices.len()) {
            (Some((_, index)), _) => *index,
            (None, 0) => return Err(NetworkError::NoInterface),
            (None, 1) => *self.devices.keys().next().expect("there is one device"),
            (None, _) => {
                let names = self.devices.into_values().map(|device| device.name).collect();
                return Err(NetworkError::SeveralInterfaces { names });
            }
        };
        let mut device = self.devices.remove(&index).expect("the index is that of a known device");
        device.addresses.sort_by_key(IpAddr::is_ipv6);
        if device.addresses.is_empty() {
            return Err(NetworkError::NoAddress { interface: device.name });
        }
        Ok(device)
    }
}

/// The ports that the kernel gives to applications in the calling thread's namespace; both families share them.
fn local_ports() -> Result<RangeInclusive<u16>, NetworkError> {
    let path = "/proc/sys/net/ipv4/ip_local_port_range";
    let failed = |source| NetworkError::Sysctl { path, source };
    let text = std::fs::read_to_string(path).map_err(failed)?;
    let mut ports = text.split_whitespace().map(str::parse);
    match (ports.next(), ports.next()) {
        (Some(Ok(low)), Some(Ok(high))) => Ok(low..=high),
        _ => Err(failed(io::ErrorKind::InvalidData.into())),
    }
}

/// Highest port that a range in a routing rule may end with: the kernel refuses 65,535.
const PORT_MAX: u16 = 65_534;

/// LO to HI: above the applications' ports, else below them, else 256 of theirs.
fn dns_ports(local: &RangeInclusive<u16>, tunnel_port: u16) -> DnsPorts {
    let above = local.end().checked_add(1).map(|low| low..=PORT_MAX).filter(|range| !range.is_empty());
    let below =
        local.start().checked_sub(1).filter(|high| *high >= UNPRIVILEGED).map(|high| UNPRIVILEGED..=high);
    let free = [above, below].into_iter().flatten().map(|range| without(&range, tunnel_port));
    match free.into_iter().find(|range| range.len() >= DNS_PORTS_MIN) {
        Some(range) => DnsPorts { range: last(&range, DNS_PORTS_MAX), keep_bound: false },
        None => {
            let top = last(&(0..=PORT_MAX), DNS_PORTS_BOUND);
            let below = last(&(0..=*top.start() - 1), DNS_PORTS_BOUND);
            DnsPorts { range: if top.contains(&tunnel_port) { below } else { top }, keep_bound: true }
        }
    }
}

/// The larger part of `range` on either side of `port`.
fn without(range: &RangeInclusive<u16>, port: u16) -> RangeInclusive<u16> {
    if !range.contains(&port) {
        return range.clone();
    }
    let lower = port.checked_sub(1).map(|high| *range.start()..=high);
    let upper = port.checked_add(1).map(|low| low..=*range.end());
    [upper, lower].into_iter().flatten().max_by_key(ExactSizeIterator::len).unwrap_or_else(|| range.clone())
}

/// The last `count` ports of `range`: the first ones are where servers are.
fn last(range: &RangeInclusive<u16>, count: u16) -> RangeInclusive<u16> {
    let low = range.end().saturating_sub(count - 1);
    low.max(*range.start())..=*range.end()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ports(local: RangeInclusive<u16>, tunnel_port: u16) -> DnsPorts {
        dns_ports(&local, tunnel_port)
    }

    fn device(index: u32, name: &str, addresses: &[&str]) -> (u32, Interface) {
        let addresses = addresses.iter().map(|a| a.parse().unwrap()).collect();
        (index, Interface { name: name.to_owned(), mtu: 1450, addresses })
    }

    #[test]
    fn dns_ports_lie_outside_the_applications_ports() {
        let free = |range| DnsPorts { range, keep_bound: false };
        assert_eq!(ports(32_768..=60_999, 51_820), free(61_000..=65_534));
        assert_eq!(ports(1_024..=40_000, 51_820), free(51_821 + 5_522..=65_534));
        assert_eq!(ports(32_768..=65_535, 51_820), free(24_576..=32_767));
        assert_eq!(ports(32_768..=65_000, 51_820), free(24_576..=32_767));
        assert_eq!(ports(2_048..=65_535, 51_820), free(1_024..=2_047));
    }

    #[test]
    fn dns_ports_never_contain_the_tunnels() {
        assert_eq!(ports(32_768..=60_999, 61_000).range, 61_001..=65_534);
        assert_eq!(ports(32_768..=60_999, 65_535).range, 61_000..=65_534);
        assert_eq!(ports(32_768..=60_999, 63_000).range, 63_001..=65_534);
        assert_eq!(ports(1_024..=65_535, 65_535).range, 65_279..=65_534);
        for local in [1_024..=65_535, 32_768..=60_999, 2_000..=65_535, 1..=65_535, 0..=0] {
            for tunnel_port in (0..=u16::MAX).step_by(97).chain([1_023, 1_024, 65_279, 65_280, 65_535]) {
                let DnsPorts { range, keep_bound } = ports(local.clone(), tunnel_port);
                assert!(!range.contains(&tunnel_port) && *range.start() >= UNPRIVILEGED);
                assert!(if keep_bound { range.len() == 256 } else { range.len() >= 1_024 });
                assert!(keep_bound || !local.clone().any(|port| range.contains(&port)));
            }
        }
    }

    #[test]
    fn too_few_free_ports_are_replaced_by_bound_ones() {
        let bound = |range| DnsPorts { range, keep_bound: true };
        assert_eq!(ports(1_024..=65_535, 51_820), bound(65_279..=65_534));
        assert_eq!(ports(2_000..=65_000, 51_820), bound(65_279..=65_534));
    }

    #[test]
    fn the_interface_is_the_default_routes_device() {
        let dump = |defaults4: &[DefaultRoute], defaults6: &[DefaultRoute]| Dump {
            devices: [device(2, "net1", &["10.9.0.1"]), device(3, "eth0", &["fd00::1", "10.0.0.1"])].into(),
            defaults4: defaults4.to_vec(),
            defaults6: defaults6.to_vec(),
        };
        for (v4, v6) in [
            (&[(100, 2), (0, 3)][..], &[][..]),
            (&[], &[(1024, 3)]),
            (&[(0, 3)], &[(0, 2)]),
            (&[(0, 7), (50, 3)], &[]),
        ] {
            let interface = dump(v4, v6).interface().unwrap();
            assert_eq!(interface.name, "eth0");
            let expected: Vec<IpAddr> = ["10.0.0.1", "fd00::1"].map(|a| a.parse().unwrap()).into();
            assert_eq!(interface.addresses, expected);
        }
        let error = dump(&[], &[]).interface().unwrap_err();
        assert!(error.to_string().contains("net1, eth0"), "{error}");
    }

    #[test]
    fn without_a_default_route_the_only_device_is_taken() {
        let dump = |devices: Vec<_>| Dump { devices: devices.into_iter().collect(), ..Dump::default() };
        assert_eq!(dump(vec![device(2, "eth0", &["10.0.0.1"])]).interface().unwrap().name, "eth0");
        assert!(matches!(dump(vec![]).interface(), Err(NetworkError::NoInterface)));
        assert!(matches!(
            dump(vec![device(2, "eth0", &[])]).interface(),
            Err(NetworkError::NoAddress { .. })
        ));
    }

    #[test]
    fn our_own_network_can_be_read() {
        // Whatever it is: every message parses.
        let dump = Dump::read().unwrap();
        assert!(dump.devices.values().all(|device| device.name != "lo" && device.mtu > 0));
        assert!(!local_ports().unwrap().is_empty());
    }
}
