//! UDP sockets of the agent: the tunnel's, one per family, and the marked ones towards the resolver (with their TCP kin).
//!
//! - [`TunnelSocket`] is bound to OWN:TUNNEL_PORT and to no wildcard: a datagram for another address of the pod is none of
//!   ours, and the source of what we send needs no route look-up. It sends trains of equal datagrams with UDP_SEGMENT and
//!   receives them with UDP_GRO.
//! - [`dns_socket`] and [`dns_stream`] draw a random port of LO-HI, which routing rule 98 and the guard know them by.
//! - [`plain_socket`] has neither mark nor such a port: what it sends to a resolver of the project is captured and sealed.
//!
//! Source: udp(7), ip(7), socket(7).

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, IoSlice};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use socket2::{Domain, Protocol, Socket, Type};

use super::netlink::MARK;
use crate::proto::mtu::{MAX_SEGMENTS, MAX_TRAIN};
use crate::sys::udp as sys;
pub use crate::sys::udp::Received;

/// Buffers of the tunnel socket: 15 ms of full datagrams at 1 Gbit/s, as the kernel counts them (about twice their length).
/// What waits here waits in one line: twice as much would let a quiet flow wait twice as long.
const TUNNEL_BUFFER: i32 = 4 << 20;
/// Destinations remembered as unable to take trains; beyond it, the failing send is simply tried each time.
const MAX_PLAIN: usize = 4096;
/// Sends to such a destination before a train is tried again: routes and devices change.
const PLAIN_SENDS: u32 = 1_000;
/// Ports of LO-HI tried before giving up.
const PORT_ATTEMPTS: usize = 64;

/// Why a socket could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The tunnel's port is taken.
    #[error(
        "UDP {address} is in use by {owner}: choose another port for the key domain with --port, or stop it"
    )]
    InUse {
        /// Address and port wanted.
        address: SocketAddr,
        /// Process id and name, or what is known instead.
        owner: String,
    },
    /// The address is not one of this namespace.
    #[error("{0} is no address of this pod")]
    NotOurs(IpAddr),
    /// The mark could not be set.
    #[error("marking a socket needs CAP_NET_ADMIN: run as root")]
    Mark(#[source] io::Error),
    /// No port of LO-HI was free.
    #[error("no free port in {lo}-{hi} towards {resolver}")]
    NoPort {
        /// Resolver to be asked.
        resolver: SocketAddr,
        /// Lowest port tried.
        lo: u16,
        /// Highest port tried.
        hi: u16,
    },
    /// Anything else.
    #[error("cannot {operation} the socket for {address}")]
    Socket {
        /// What was being done.
        operation: &'static str,
        /// Own address of a tunnel socket, the resolver's of another.
        address: SocketAddr,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// A send that stopped half-way.
#[derive(Debug, thiserror::Error)]
#[error("sent {sent} bytes")]
pub struct SendError {
    /// Bytes the kernel took, a whole number of datagrams.
    pub sent: usize,
    /// Why the rest was not taken: `WouldBlock` (wait for writability and go on), EPERM (the guard), EMSGSIZE (too big for
    /// the path), ...
    pub source: io::Error,
}

/// The tunnel's socket of one family.
#[derive(Debug)]
pub struct TunnelSocket {
    fd: OwnedFd,
    /// Destinations whose device or route refused a train, and how many sends to go without.
    plain: BTreeMap<IpAddr, u32>,
}

impl TunnelSocket {
    /// Opens the socket: bound to `own`, marked, DF set, non-blocking, with large buffers and UDP_GRO where the kernel has it.
    ///
    /// # Errors
    /// See [`Error`]; [`Error::InUse`] names the owner of the port.
    pub fn open(own: SocketAddr) -> Result<Self, Error> {
        let fail = |operation| move |source| Error::Socket { operation, address: own, source };
        let socket =
            Socket::new(Domain::for_address(own), Type::DGRAM, Some(Protocol::UDP)).map_err(fail("make"))?;
        socket.set_mark(MARK).map_err(Error::Mark)?;
        if own.is_ipv6() {
            socket.set_only_v6(true).map_err(fail("restrict to IPv6"))?;
        }
        sys::set_mtu_probe(&socket, own.is_ipv6()).map_err(fail("set DF on"))?;
        sys::set_buffers(&socket, TUNNEL_BUFFER).map_err(fail("enlarge the buffers of"))?;
        socket.set_nonblocking(true).map_err(fail("unblock"))?;
        // Without it datagrams come one by one.
        let _ = sys::enable_gro(&socket);
        socket.bind(&own.into()).map_err(|source| match errno(&source) {
            Errno::EADDRINUSE => Error::InUse { address: own, owner: owner_of_port(own) },
            Errno::EADDRNOTAVAIL => Error::NotOurs(own.ip()),
            _ => fail("bind")(source),
        })?;
        Ok(Self { fd: socket.into(), plain: BTreeMap::new() })
    }

    /// Goes on with a former agent's socket.
    #[must_use]
    pub fn inherit(fd: OwnedFd) -> Self {
        Self { fd, plain: BTreeMap::new() }
    }

    /// Sends `bytes` to `to`: one datagram or, with `segment`, as many of that size as it takes (the last may be shorter).
    ///
    /// A train the kernel refuses is sent again one by one, and so are the next to that address.
    ///
    /// # Errors
    /// [`SendError`] says how much was taken before the failure.
    pub fn send(&mut self, to: SocketAddr, bytes: &[u8], segment: Option<u16>) -> Result<(), SendError> {
        let size = segment.map_or(bytes.len(), usize::from).max(1);
        if bytes.len() <= size {
            return self.send_once(to, bytes, None).map_err(|source| SendError { sent: 0, source });
        }
        let train = match self.plain.get_mut(&to.ip()) {
            Some(0) | None => size * (MAX_TRAIN / size).clamp(1, MAX_SEGMENTS),
            Some(left) => {
                *left -= 1;
                size
            }
        };
        let mut sent = 0;
        for chunk in bytes.chunks(train) {
            sent += self.send_train(to, chunk, size).map_err(|e| SendError { sent: sent + e.sent, ..e })?;
        }
        Ok(())
    }

    /// Receives one datagram or a train of equal ones; `buffer` should hold 65,535 bytes.
    ///
    /// # Errors
    /// `WouldBlock` when nothing is queued.
    pub fn recv(&self, buffer: &mut [u8]) -> io::Result<Received> {
        sys::recv(&self.fd, buffer)
    }

    /// Datagrams, or trains of them, that found the socket's buffer full, since it was made; wraps around.
    ///
    /// # Errors
    /// The kernel's.
    pub fn dropped(&self) -> io::Result<u32> {
        sys::dropped(&self.fd)
    }

    fn send_train(&mut self, to: SocketAddr, chunk: &[u8], size: usize) -> Result<usize, SendError> {
        let mut lasting = false;
        if chunk.len() > size {
            let segment = u16::try_from(size).expect("a segment size came as u16");
            match self.send_once(to, chunk, Some(segment)) {
                Ok(()) => {
                    self.plain.remove(&to.ip());
                    return Ok(chunk.len());
                }
                Err(error) => match errno(&error) {
                    // The device computes no UDP checksums, or the route takes no trains.
                    Errno::EIO | Errno::EINVAL | Errno::EOPNOTSUPP | Errno::EMSGSIZE => lasting = true,
                    // No memory for a train just now.
                    Errno::ENOBUFS | Errno::ENOMEM => {}
                    _ => return Err(SendError { sent: 0, source: error }),
                },
            }
        }
        let mut sent = 0;
        for datagram in chunk.chunks(size) {
            self.send_once(to, datagram, None).map_err(|source| SendError { sent, source })?;
            sent += datagram.len();
        }
        // Remembered only now: datagrams too big for the path are refused either way, and say nothing about trains.
        if lasting && (self.plain.len() < MAX_PLAIN || self.plain.contains_key(&to.ip())) {
            self.plain.insert(to.ip(), PLAIN_SENDS);
        }
        Ok(sent)
    }

    fn send_once(&self, to: SocketAddr, bytes: &[u8], segment: Option<u16>) -> io::Result<()> {
        sys::send(&self.fd, to, &[IoSlice::new(bytes)], segment).map(drop)
    }
}

impl AsFd for TunnelSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Opens a marked, connected, non-blocking UDP socket to `resolver`, from a random port of `ports`.
///
/// `pick(n)` returns a random number below `n`; where [`hold_ports`] keeps them, `held` is true and `pick` names no port
/// twice at a time. What came in between binding and connecting is thrown away: it may be anybody's.
///
/// # Errors
/// [`Error::NoPort`] when the ports tried are all in use.
pub fn dns_socket(
    resolver: SocketAddr,
    ports: RangeInclusive<u16>,
    held: bool,
    pick: &mut dyn FnMut(u32) -> u32,
) -> Result<OwnedFd, Error> {
    let fail = |operation| move |source| Error::Socket { operation, address: resolver, source };
    let socket = bound_in_range(resolver, (Type::DGRAM, Protocol::UDP), ports, held, pick)?;
    socket.connect(&resolver.into()).map_err(fail("connect"))?;
    let fd = OwnedFd::from(socket);
    while sys::recv(&fd, &mut [0]).is_ok() {}
    Ok(fd)
}

/// Starts a marked, non-blocking TCP connection to `resolver`, from a random port of `ports`.
///
/// The connection is up when the descriptor becomes writable and SO_ERROR is 0.
///
/// # Errors
/// [`Error::NoPort`] when the ports tried are all in use.
pub fn dns_stream(
    resolver: SocketAddr,
    ports: RangeInclusive<u16>,
    pick: &mut dyn FnMut(u32) -> u32,
) -> Result<OwnedFd, Error> {
    for _ in 0..PORT_ATTEMPTS {
        // A port of a connection in TIME_WAIT may be used towards another resolver.
        let socket = bound_in_range(resolver, (Type::STREAM, Protocol::TCP), ports.clone(), true, pick)?;
        match socket.connect(&resolver.into()) {
            Ok(()) => return Ok(socket.into()),
            Err(error) => match errno(&error) {
                Errno::EINPROGRESS => return Ok(socket.into()),
                // The port may be bound again after a connection ended, but not to the same resolver yet.
                Errno::EADDRNOTAVAIL | Errno::EADDRINUSE => {}
                _ => return Err(Error::Socket { operation: "connect", address: resolver, source: error }),
            },
        }
    }
    Err(Error::NoPort { resolver, lo: *ports.start(), hi: *ports.end() })
}

/// Opens a non-blocking socket like any of the pod's, not marked and from a port that the kernel chooses, and connects it to
/// `resolver`; a TCP connection (`Type::STREAM`) is only begun. Its packets go into `tenc0`, as an application's do.
///
/// # Errors
/// See [`Error`].
pub fn plain_socket(resolver: SocketAddr, kind: Type) -> Result<OwnedFd, Error> {
    let fail = |operation| move |source| Error::Socket { operation, address: resolver, source };
    let socket = Socket::new(Domain::for_address(resolver), kind, None).map_err(fail("make"))?;
    socket.set_nonblocking(true).map_err(fail("unblock"))?;
    match socket.connect(&resolver.into()) {
        Ok(()) => Ok(socket.into()),
        Err(error) if errno(&error) == Errno::EINPROGRESS => Ok(socket.into()),
        Err(error) => Err(fail("connect")(error)),
    }
}

fn bound_in_range(
    resolver: SocketAddr,
    (kind, protocol): (Type, Protocol),
    ports: RangeInclusive<u16>,
    reuse: bool,
    pick: &mut dyn FnMut(u32) -> u32,
) -> Result<Socket, Error> {
    let fail = |operation| move |source| Error::Socket { operation, address: resolver, source };
    let socket = Socket::new(Domain::for_address(resolver), kind, Some(protocol)).map_err(fail("make"))?;
    socket.set_mark(MARK).map_err(Error::Mark)?;
    socket.set_nonblocking(true).map_err(fail("unblock"))?;
    socket.set_reuse_address(reuse).map_err(fail("prepare"))?;
    let any: IpAddr =
        if resolver.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let (lo, hi) = (*ports.start(), *ports.end());
    let count = u32::from(hi.saturating_sub(lo)) + 1;
    for _ in 0..PORT_ATTEMPTS {
        let offset = u16::try_from(pick(count) % count).expect("at most the width of the range");
        let port = lo.saturating_add(offset);
        match socket.bind(&SocketAddr::new(any, port).into()) {
            Ok(()) => return Ok(socket),
            Err(error) if errno(&error) == Errno::EADDRINUSE => {}
            Err(error) => return Err(fail("bind")(error)),
        }
    }
    Err(Error::NoPort { resolver, lo, hi })
}

/// Binds `ports` for UDP and TCP, so that the kernel gives none of them to an application that asks for any port. One that
/// an application has already is left to it.
///
/// # Errors
/// Too few descriptors.
pub fn hold_ports(ports: RangeInclusive<u16>, ipv6: bool) -> Result<Vec<OwnedFd>, Error> {
    let any: IpAddr = if ipv6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    let mut held = Vec::new();
    for port in ports {
        for (kind, protocol) in [(Type::DGRAM, Protocol::UDP), (Type::STREAM, Protocol::TCP)] {
            let address = SocketAddr::new(any, port);
            let fail = |operation| move |source| Error::Socket { operation, address, source };
            let socket =
                Socket::new(Domain::for_address(address), kind, Some(protocol)).map_err(fail("make"))?;
            socket.set_reuse_address(true).map_err(fail("prepare"))?;
            if ipv6 {
                socket.set_only_v6(true).map_err(fail("restrict to IPv6"))?;
            }
            match socket.bind(&address.into()) {
                Ok(()) => held.push(socket.into()),
                Err(error) if errno(&error) == Errno::EADDRINUSE => {}
                Err(error) => return Err(fail("bind")(error)),
            }
        }
    }
    Ok(held)
}

/// Who has the UDP port of `address` in the calling thread's network namespace, as far as /proc tells.
fn owner_of_port(address: SocketAddr) -> String {
    let table = if address.is_ipv4() { "udp" } else { "udp6" };
    // An IPv6 socket that is not IPv6-only holds the port for IPv4 as well.
    [table, "udp6"]
        .into_iter()
        .filter_map(|name| fs::read_to_string(format!("/proc/thread-self/net/{name}")).ok())
        .find_map(|text| text.lines().find_map(|line| inode_of_port(line, address.port())))
        .and_then(process_of_inode)
        .unwrap_or_else(|| "a process that /proc does not show".to_owned())
}

/// The socket's inode, where `line` of /proc/net/udp is about `port`.
fn inode_of_port(line: &str, port: u16) -> Option<u64> {
    let mut fields = line.split_whitespace();
    let (_, local_port) = fields.nth(1)?.rsplit_once(':')?;
    if u16::from_str_radix(local_port, 16).ok()? != port {
        return None;
    }
    // Remote address, state, queues, timer, retransmits, uid and timeout stand between.
    fields.nth(7)?.parse().ok()
}

fn process_of_inode(inode: u64) -> Option<String> {
    let wanted = format!("socket:[{inode}]");
    let holds = |pid: &str| {
        fs::read_dir(format!("/proc/{pid}/fd"))
            .into_iter()
            .flatten()
            .flatten()
            .any(|entry| fs::read_link(entry.path()).is_ok_and(|to| to.as_os_str() == wanted.as_str()))
    };
    let pid = fs::read_dir("/proc")
        .ok()?
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.bytes().all(|b| b.is_ascii_digit()))
        .find(|pid| holds(pid))?;
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    Some(format!("process {pid} ({})", name.trim_end()))
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_owner_of_a_taken_port_is_named() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let owner = owner_of_port(socket.local_addr().unwrap());
        assert!(owner.starts_with(&format!("process {}", std::process::id())), "{owner}");
    }

    #[test]
    fn lines_of_other_ports_and_headings_are_skipped() {
        let line =
            " 2206: 00000000:14E9 00000000:0000 07 00000000:00000000 00:00000000 00000000  0   0 17 2 0000 0";
        assert_eq!(inode_of_port(line, 5353), Some(17));
        assert_eq!(inode_of_port(line, 53), None);
        assert_eq!(inode_of_port("  sl  local_address rem_address   st tx_queue", 53), None);
        assert_eq!(inode_of_port("", 53), None);
    }
}
