//! The pod's own sockets, by their 5-tuples: listed, and destroyed, over NETLINK_SOCK_DIAG.
//!
//! 1. a dump per protocol and family gives every socket with a remote end; a listener has none
//! 2. an IPv6 socket that speaks IPv4 is listed under its IPv4 addresses, which are what its packets bear
//! 3. a socket is destroyed by the very identity that the kernel gave for it, cookie included: never its successor
//!
//! Needs CAP_NET_ADMIN, and CONFIG_INET_DIAG_DESTROY to destroy ([`Error::Unsupported`] without).
//!
//! Source: sock_diag(7), linux/inet_diag.h, net/ipv4/tcp_states.h.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR};
use netlink_sys::{Socket as NetlinkSocket, SocketAddr, protocols::NETLINK_SOCK_DIAG};
use nix::errno::Errno;

use crate::proto::nat::Tuple;
use crate::wire::netlink::messages;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;

const TCP: u8 = 6;
const UDP: u8 = 17;
const FAMILY4: u8 = 2;
const FAMILY6: u8 = 10;

const ESTABLISHED: u8 = 1;
const TIME_WAIT: u8 = 6;
/// Established to closing and SYN received (bit 12 too: its requests), without close and listen.
const CONNECTED: u32 = 0x1fff & !(1 | 1 << 7 | 1 << 10);

/// nlmsghdr and inet_diag_req_v2.
const REQUEST_LEN: u32 = 16 + 56;
/// inet_diag_sockid.
const IDENTITY_LEN: usize = 48;

/// Why the pod's sockets cannot be listed or destroyed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel was built without CONFIG_INET_DIAG_DESTROY.
    #[error("this kernel cannot destroy sockets (CONFIG_INET_DIAG_DESTROY)")]
    Unsupported,
    /// The kernel said no.
    #[error("cannot {operation} the pod's sockets")]
    Refused {
        /// What was being done.
        operation: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The netlink socket itself failed.
    #[error("sock_diag socket failed")]
    Socket(#[source] io::Error),
}

/// A socket of the pod with a remote end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Socket {
    /// What its packets bear; never IPv4-mapped.
    pub tuple: Tuple,
    family: u8,
    state: u8,
    identity: [u8; IDENTITY_LEN],
}

impl Socket {
    /// Whether an application still holds it: it only waits for stray segments otherwise.
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.state != TIME_WAIT
    }

    /// Whether it is a TCP connection.
    #[must_use]
    pub fn is_tcp(&self) -> bool {
        self.tuple.protocol == TCP
    }
}

/// The handle to the sockets of one network namespace.
#[derive(Debug)]
pub struct Sockets {
    socket: NetlinkSocket,
    sequence: u32,
}

impl Sockets {
    /// Opens the handle in the calling thread's network namespace.
    ///
    /// # Errors
    /// [`Error::Socket`].
    pub fn open() -> Result<Self, Error> {
        let mut socket = NetlinkSocket::new(NETLINK_SOCK_DIAG).map_err(Error::Socket)?;
        socket.bind_auto().map_err(Error::Socket)?;
        socket.connect(&SocketAddr::new(0, 0)).map_err(Error::Socket)?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Every TCP socket with a remote end, in whatever state, and every connected UDP socket.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn list(&mut self) -> Result<Vec<Socket>, Error> {
        let mut found = Vec::new();
        for (protocol, states) in [(TCP, CONNECTED), (UDP, 1 << ESTABLISHED)] {
            for family in [FAMILY4, FAMILY6] {
                let identity = [0; IDENTITY_LEN];
                self.send(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, (family, protocol), states, &identity)?;
                match self.receive(|bytes| found.extend(parse(bytes, protocol)))? {
                    // A family or protocol that the kernel does not have has no sockets.
                    0 | libc::ENOENT | libc::EAFNOSUPPORT | libc::EOPNOTSUPP => {}
                    code => return Err(refused("list", code)),
                }
            }
        }
        Ok(found)
    }

    /// Ends a connection at once: the application sees ECONNABORTED, the other side a RST. False: it had ended by itself.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn destroy(&mut self, socket: &Socket) -> Result<bool, Error> {
        let kind = (socket.family, socket.tuple.protocol);
        self.send(SOCK_DESTROY, NLM_F_ACK, kind, u32::MAX, &socket.identity)?;
        match self.receive(|_| ())? {
            0 => Ok(true),
            libc::ENOENT | libc::ESTALE => Ok(false),
            libc::EOPNOTSUPP => Err(Error::Unsupported),
            code => Err(refused("destroy", code)),
        }
    }

    fn send(
        &mut self,
        kind: u16,
        flags: u16,
        of: (u8, u8),
        states: u32,
        identity: &[u8; IDENTITY_LEN],
    ) -> Result<(), Error> {
        self.sequence = self.sequence.wrapping_add(1);
        let bytes = request(self.sequence, kind, flags, of, states, identity);
        self.socket.send(&bytes, 0).map(drop).map_err(Error::Socket)
    }

    /// Feeds every object that answers the last request into `each`; the error code that ended it, 0 for none.
    fn receive(&mut self, mut each: impl FnMut(&[u8])) -> Result<i32, Error> {
        loop {
            let (bytes, _) = self.socket.recv_from_full().map_err(Error::Socket)?;
            for message in messages(&bytes) {
                match message.kind {
                    _ if message.sequence != self.sequence => {}
                    NLMSG_DONE => return Ok(0),
                    NLMSG_ERROR => return Ok(message.error().map_or(libc::EPROTO, i32::saturating_neg)),
                    _ => each(message.payload()),
                }
            }
        }
    }
}

fn refused(operation: &'static str, code: i32) -> Error {
    Error::Refused { operation, source: Errno::from_raw(code).into() }
}

fn request(
    sequence: u32,
    kind: u16,
    flags: u16,
    (family, protocol): (u8, u8),
    states: u32,
    identity: &[u8; IDENTITY_LEN],
) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(REQUEST_LEN.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    bytes.extend([0; 4]);
    bytes.extend([family, protocol, 0, 0]);
    bytes.extend(states.to_ne_bytes());
    bytes.extend(identity);
    bytes
}

/// Reads an inet_diag_msg; `None` where it is too short, or the socket has no remote end.
fn parse(bytes: &[u8], protocol: u8) -> Option<Socket> {
    let (&[family, state, ..], rest) = bytes.split_first_chunk::<4>()?;
    let identity: &[u8; IDENTITY_LEN] = rest.first_chunk()?;
    let port = |at: usize| Some(u16::from_be_bytes(*identity.get(at..)?.first_chunk()?));
    let address = |at: usize| {
        let bytes = identity.get(at..)?;
        match family {
            FAMILY4 => Some(IpAddr::from(Ipv4Addr::from(*bytes.first_chunk::<4>()?))),
            FAMILY6 => Some(IpAddr::from(Ipv6Addr::from(*bytes.first_chunk::<16>()?)).to_canonical()),
            _ => None,
        }
    };
    let tuple = Tuple { protocol, local: (address(4)?, port(0)?), remote: (address(20)?, port(2)?) };
    let remote = !tuple.remote.0.is_unspecified() && tuple.remote.1 != 0;
    remote.then_some(Socket { tuple, family, state, identity: *identity })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(family: u8, local: (IpAddr, u16), remote: (IpAddr, u16)) -> Vec<u8> {
        let mut bytes = vec![family, ESTABLISHED, 0, 0];
        bytes.extend(local.1.to_be_bytes());
        bytes.extend(remote.1.to_be_bytes());
        for (address, _) in [local, remote] {
            let mut field = match address {
                IpAddr::V4(a) => a.octets().to_vec(),
                IpAddr::V6(a) => a.octets().to_vec(),
            };
            field.resize(16, 0);
            bytes.extend(field);
        }
        bytes.extend([0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]);
        bytes.resize(72, 0);
        bytes
    }

    fn at(address: &str, port: u16) -> (IpAddr, u16) {
        (address.parse().unwrap(), port)
    }

    #[test]
    fn a_request_is_a_header_and_56_bytes_that_name_the_socket_as_the_kernel_did() {
        let listed = parse(&answer(FAMILY4, at("10.0.0.2", 4000), at("10.0.0.3", 80)), TCP).unwrap();
        let bytes = request(7, SOCK_DESTROY, NLM_F_ACK, (FAMILY4, TCP), u32::MAX, &listed.identity);
        assert_eq!(bytes.len(), 72);
        assert_eq!(bytes[..4], 72u32.to_ne_bytes());
        assert_eq!(bytes[16..24], [2, 6, 0, 0, 255, 255, 255, 255]);
        assert_eq!(bytes[24..32], [0x0f, 0xa0, 0, 80, 10, 0, 0, 2]);
        assert_eq!(bytes[64..], [1, 2, 3, 4, 5, 6, 7, 8], "the cookie");
    }

    #[test]
    fn a_mapped_address_is_the_ipv4_address_that_its_packets_bear() {
        let listed = answer(FAMILY6, at("::ffff:10.0.0.2", 4000), at("::ffff:10.0.0.3", 80));
        let socket = parse(&listed, TCP).unwrap();
        let wanted = Tuple { protocol: TCP, local: at("10.0.0.2", 4000), remote: at("10.0.0.3", 80) };
        assert_eq!((socket.tuple, socket.family), (wanted, FAMILY6));
    }

    #[test]
    fn sockets_without_a_remote_end_and_short_answers_are_left_out() {
        let whole = answer(FAMILY6, at("fd00::2", 4000), at("fd00::3", 80));
        assert!(parse(&whole, UDP).is_some());
        assert!((0..52).all(|len| parse(&whole[..len], UDP).is_none()));
        assert_eq!(parse(&answer(FAMILY6, at("::", 80), at("::", 0)), TCP), None);
        assert_eq!(parse(&answer(1, at("fd00::2", 4000), at("fd00::3", 80)), TCP), None);
    }
}
