//! Devices and their addresses.
//!
//! Source: rtnetlink(7), linux/if_link.h.

use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use nix::errno::Errno;

use super::request::Request;
use super::{Error, Netlink, Object, family, host_len};
use crate::proto::mtu::{MAX_SEGMENTS, MAX_TRAIN};
use crate::proto::noise::record_len;

/// Largest super-packet, so that one read of `tenc0` is one send with UDP_SEGMENT.
const GSO_MAX_SIZE: u32 = 61_000;
/// Packets that wait for the agent.
pub(crate) const TX_QUEUE_LEN: u32 = 500;

/// A device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Interface index.
    pub index: u32,
    /// Interface name.
    pub name: String,
    /// MTU in bytes.
    pub mtu: u32,
    /// Ethernet address, where it has one.
    pub mac: Option<[u8; 6]>,
    /// Administratively up.
    pub up: bool,
    /// The loopback device.
    pub loopback: bool,
    /// A TUN or TAP device.
    pub tun: bool,
    /// Length of its transmit queue, in packets.
    pub queue: u32,
}

/// An address of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkAddress {
    /// The device's index.
    pub index: u32,
    /// The address.
    pub address: IpAddr,
    /// Length of its prefix in bits.
    pub prefix_len: u8,
}

impl Netlink {
    /// Looks a device up by its name.
    ///
    /// # Errors
    /// [`Error::Refused`] with ENODEV when there is none.
    pub fn link(&mut self, name: &str) -> Result<Link, Error> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        self.find_link(message, name)
    }

    /// Looks up the device that has `own` among its addresses.
    ///
    /// # Errors
    /// [`Error::Refused`] with EADDRNOTAVAIL when none has it.
    pub fn link_of(&mut self, own: IpAddr) -> Result<Link, Error> {
        let found =
            self.addresses()?.into_iter().find(|a| a.address == own).ok_or_else(|| Error::Refused {
                operation: "find",
                object: Object::Address(own),
                source: Errno::EADDRNOTAVAIL.into(),
            })?;
        let mut message = LinkMessage::default();
        message.header.index = found.index;
        self.find_link(message, &format!("number {}", found.index))
    }

    /// All addresses of all devices of the namespace.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn addresses(&mut self) -> Result<Vec<LinkAddress>, Error> {
        let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        let found = self.transport.dump(&request, "addresses")?;
        Ok(found.into_iter().filter_map(read_address).collect())
    }

    /// Prepares a TUN device and brings it up: no link-local address of its own, `mtu`, and super-packets of a size that
    /// fits one send.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn set_up_tun(&mut self, name: &str, mtu: u32) -> Result<(), Error> {
        let index = self.link(name)?.index;
        let set = |attributes, flags, tolerated| {
            let mut message = LinkMessage::default();
            message.header.index = index;
            message.header.flags = flags;
            message.header.change_mask = flags;
            message.attributes = attributes;
            Request {
                message: RouteNetlinkMessage::SetLink(message),
                flags: 0,
                operation: "set up",
                object: Object::Link(name.to_owned()),
                tolerated,
            }
        };
        let no_address = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
        self.transport.batch(vec![
            // A kernel or namespace without IPv6 has nothing to switch off.
            set(
                vec![LinkAttribute::AfSpecUnspec(vec![no_address])],
                LinkFlags::empty(),
                &[Errno::EAFNOSUPPORT, Errno::EOPNOTSUPP],
            ),
            set(
                vec![
                    LinkAttribute::Mtu(mtu),
                    LinkAttribute::TxQueueLen(TX_QUEUE_LEN),
                    LinkAttribute::GsoMaxSize(GSO_MAX_SIZE),
                    LinkAttribute::GsoMaxSegs(max_segments(mtu)),
                ],
                LinkFlags::empty(),
                &[],
            ),
            set(Vec::new(), LinkFlags::Up, &[]),
        ])
    }

    /// Brings a device up.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn set_link_up(&mut self, name: &str) -> Result<(), Error> {
        let mut message = LinkMessage::default();
        message.header.index = self.link(name)?.index;
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        self.transport.batch(vec![Request {
            message: RouteNetlinkMessage::SetLink(message),
            flags: 0,
            operation: "bring up",
            object: Object::Link(name.to_owned()),
            tolerated: &[],
        }])
    }

    /// Removes the TUN device `name`; one that is not there is fine, one of another kind is somebody else's and stays.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn delete_tun(&mut self, name: &str) -> Result<(), Error> {
        match self.link(name) {
            Ok(link) if link.tun => {}
            Ok(_) => return Ok(()),
            Err(Error::Refused { source, .. }) if source.raw_os_error() == Some(libc::ENODEV) => {
                return Ok(());
            }
            Err(error) => return Err(error),
        }
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        self.transport.batch(vec![Request {
            message: RouteNetlinkMessage::DelLink(message),
            flags: 0,
            operation: "delete",
            object: Object::Link(name.to_owned()),
            tolerated: &[Errno::ENODEV],
        }])
    }

    /// Adds `address` as a host address (/32 or /128, without duplicate address detection) to the device `name`.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn add_host_address(&mut self, name: &str, address: IpAddr) -> Result<(), Error> {
        let mut message = AddressMessage::default();
        message.header.index = self.link(name)?.index;
        message.header.family = family(address.is_ipv6());
        message.header.prefix_len = host_len(address.is_ipv6());
        message.header.flags = AddressHeaderFlags::Nodad;
        message.attributes = vec![AddressAttribute::Local(address), AddressAttribute::Address(address)];
        self.transport.batch(vec![Request {
            message: RouteNetlinkMessage::NewAddress(message),
            flags: NLM_F_CREATE | NLM_F_REPLACE,
            operation: "add",
            object: Object::Address(address),
            tolerated: &[],
        }])
    }

    fn find_link(&mut self, message: LinkMessage, name: &str) -> Result<Link, Error> {
        self.get_link(message, name).map(read_link)
    }

    fn get_link(&mut self, message: LinkMessage, name: &str) -> Result<LinkMessage, Error> {
        let answer = self.transport.one(Request {
            message: RouteNetlinkMessage::GetLink(message),
            flags: 0,
            operation: "find",
            object: Object::Link(name.to_owned()),
            tolerated: &[],
        })?;
        match answer {
            RouteNetlinkMessage::NewLink(message) => Ok(message),
            _ => Err(Error::Unexpected("something that is no link")),
        }
    }
}

pub(super) fn read_link(message: LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        mtu: 0,
        mac: None,
        up: message.header.flags.contains(LinkFlags::Up),
        loopback: message.header.flags.contains(LinkFlags::Loopback),
        tun: false,
        queue: 0,
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::TxQueueLen(queue) => link.queue = queue,
            LinkAttribute::Address(bytes) => link.mac = bytes.try_into().ok(),
            LinkAttribute::LinkInfo(infos) => link.tun = infos.contains(&LinkInfo::Kind(InfoKind::Tun)),
            _ => {}
        }
    }
    link
}

fn read_address(message: RouteNetlinkMessage) -> Option<LinkAddress> {
    let RouteNetlinkMessage::NewAddress(message) = message else { return None };
    // On a point-to-point device ADDRESS is the far end; LOCAL is absent for IPv6.
    let local = message.attributes.iter().find_map(|a| match a {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    let far = message.attributes.iter().find_map(|a| match a {
        AddressAttribute::Address(address) => Some(*address),
        _ => None,
    });
    Some(LinkAddress {
        index: message.header.index,
        address: local.or(far)?,
        prefix_len: message.header.prefix_len,
    })
}

/// Most segments of a super-packet: sealed, they still fit one train.
fn max_segments(mtu: u32) -> u32 {
    let records = usize::try_from(mtu).map_or(1, |mtu| MAX_TRAIN / record_len(mtu));
    u32::try_from(records.clamp(1, MAX_SEGMENTS)).expect("at most 64")
}
