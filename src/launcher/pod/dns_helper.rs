//! The nameless helper namespace that ends DNS over TCP.
//!
//! A TCP query of the pod arrives on `tenc0` as bare segments. The agent copies them, verbatim, to a TUN in a namespace that
//! has no name, no link to anything and no process; the resolver's address stands there on `lo`, and a plain listener on
//! port 53 turns the segments into a byte stream. Answers take the same way back. Nothing of it is visible in the pod.
//!
//! 1. a fresh thread leaves the launcher's network namespace for a new, empty one and ends there
//! 2. the TUN gets the same header layout and offloads as `tenc0`, so that packets are copied without being touched
//! 3. `lo` and the TUN come up, the resolvers' addresses go to `lo`, everything else leads through the TUN
//! 4. descriptors of the TUN and the listeners are handed back: they alone keep the namespace alive
//!
//! Source: network_namespaces(7), unshare(2).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::thread;

use nix::sched::{CloneFlags, unshare};
use socket2::{Domain, Protocol, Socket, Type};

use crate::agent;
use crate::agent::netlink::{self, Netlink};
use crate::sys::tun;

/// Name of the TUN inside the helper namespace.
const DEVICE: &str = "dns0";
/// Port of DNS.
const PORT: u16 = 53;
/// Connections that wait for the agent to accept them.
const BACKLOG: i32 = 64;

/// Why there is no helper namespace.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The namespace was refused.
    #[error("cannot make a network namespace: needs CAP_SYS_ADMIN, run as root")]
    Namespace(#[source] io::Error),
    /// The TUN was refused.
    #[error("no TUN device in the DNS helper namespace")]
    Tun(#[source] agent::tun::Error),
    /// Links, addresses or routes were refused.
    #[error("cannot configure the DNS helper namespace")]
    Netlink(#[from] netlink::Error),
    /// A listener was refused.
    #[error("cannot listen on {address} in the DNS helper namespace")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// The descriptors that are the helper namespace.
#[derive(Debug)]
pub struct DnsHelper {
    /// The TUN, laid out as `tenc0`.
    pub tun: OwnedFd,
    /// Non-blocking TCP listeners on port 53; the local address of an accepted connection is the resolver asked.
    pub listeners: Vec<OwnedFd>,
}

/// Makes a helper namespace in which every address of `resolvers` is local; `mtu` is that of `tenc0`.
///
/// # Errors
/// See [`Error`].
pub fn open(resolvers: &[IpAddr], mtu: u32) -> Result<DnsHelper, Error> {
    thread::scope(|scope| {
        scope
            .spawn(|| in_new_namespace(resolvers, mtu))
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn in_new_namespace(resolvers: &[IpAddr], mtu: u32) -> Result<DnsHelper, Error> {
    unshare(CloneFlags::CLONE_NEWNET).map_err(|error| Error::Namespace(error.into()))?;
    let device = tun::open(DEVICE).map_err(|error| Error::Tun(agent::tun::Error::of(DEVICE, error)))?;
    let mut netlink = Netlink::open()?;
    netlink.set_link_up("lo")?;
    netlink.set_up_tun(DEVICE, mtu)?;
    for resolver in resolvers {
        netlink.add_host_address("lo", *resolver)?;
    }
    let mut listeners = Vec::new();
    for ipv6 in [false, true] {
        if !resolvers.iter().any(|r| r.is_ipv6() == ipv6) {
            continue;
        }
        netlink.add_default_route(DEVICE, ipv6)?;
        let any: IpAddr = if ipv6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
        let address = SocketAddr::new(any, PORT);
        listeners.push(listen(address).map_err(|source| Error::Listen { address, source })?);
    }
    Ok(DnsHelper { tun: device.fd, listeners })
}

fn listen(address: SocketAddr) -> io::Result<OwnedFd> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}
