//! The rtnetlink socket: batches of requests, and dumps. Blocking, one owner, strictly in order.
//!
//! A batch is one `send`: only its last message asks for an acknowledgement, errors come unasked. That is what makes a
//! thousand routes take milliseconds.
//!
//! Source: RFC 3549, Documentation/userspace-api/netlink/intro.rst.

use std::fmt;
use std::io;
use std::net::IpAddr;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::errno::Errno;

use crate::wire::netlink::messages;

/// Messages per send: were each of them refused, the refusals (768 bytes each, as the kernel counts) still fit a default
/// receive buffer.
const BATCH_MESSAGES: usize = 128;
/// Tries of a dump that the kernel says was inconsistent.
const DUMP_ATTEMPTS: usize = 8;

/// What a request is about, for error messages: `Display` shows no address, `Debug` does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Object {
    /// A device.
    Link(String),
    /// The route to one address, in table T.
    Route(IpAddr),
    /// A default route.
    Default {
        /// Routing table.
        table: u32,
        /// IPv6, else IPv4.
        ipv6: bool,
    },
    /// A routing rule.
    Rule {
        /// Its priority.
        priority: u32,
        /// IPv6, else IPv4.
        ipv6: bool,
    },
    /// An address of a device.
    Address(IpAddr),
    /// All objects of a kind.
    All(&'static str),
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = |ipv6: &bool| if *ipv6 { "IPv6" } else { "IPv4" };
        match self {
            Self::Link(name) => write!(f, "link {name}"),
            Self::Route(_) => f.write_str("route of a protected address"),
            Self::Default { table, ipv6 } => write!(f, "{} default route of table {table}", family(ipv6)),
            Self::Rule { priority, ipv6 } => write!(f, "{} rule {priority}", family(ipv6)),
            Self::Address(_) => f.write_str("address of a device"),
            Self::All(kind) => f.write_str(kind),
        }
    }
}

/// Why the kernel's routing tables are not as asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The capability is missing.
    #[error("{operation} {object} needs CAP_NET_ADMIN: run as root")]
    Permission {
        /// What was being done.
        operation: &'static str,
        /// To what.
        object: Object,
    },
    /// The kernel said no.
    #[error("cannot {operation} {object}")]
    Refused {
        /// What was being done.
        operation: &'static str,
        /// To what.
        object: Object,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The netlink socket itself failed.
    #[error("rtnetlink socket failed")]
    Socket(#[source] io::Error),
    /// An answer that makes no sense.
    #[error("rtnetlink answered {0}")]
    Unexpected(&'static str),
}

/// One message of a batch.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) message: RouteNetlinkMessage,
    /// NLM_F_CREATE, NLM_F_REPLACE, NLM_F_EXCL; REQUEST is implied.
    pub(super) flags: u16,
    pub(super) operation: &'static str,
    pub(super) object: Object,
    /// The refusal that means that there was nothing to do.
    pub(super) tolerated: &'static [Errno],
}

/// The socket.
#[derive(Debug)]
pub(super) struct Transport {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Transport {
    pub(super) fn open() -> Result<Self, Error> {
        let mut socket = Socket::new(NETLINK_ROUTE).map_err(Error::Socket)?;
        socket.bind_auto().map_err(Error::Socket)?;
        socket.connect(&SocketAddr::new(0, 0)).map_err(Error::Socket)?;
        // Errors without a copy of the request; kernels that lack either option answer the same, only longer.
        let _ = socket.set_cap_ack(true);
        // Dumps of one table instead of all; what an old kernel sends in addition is filtered out by the caller.
        let _ = socket.set_netlink_get_strict_chk(true);
        Ok(Self { socket, sequence: 0, buffer: Vec::new() })
    }

    pub(super) fn port(&self) -> u32 {
        let mut address = SocketAddr::new(0, 0);
        // A port of 0 is nobody's: our own changes then count as another's, which costs a check.
        let _ = self.socket.get_address(&mut address);
        address.port_number()
    }

    /// Sends all `requests` in order and waits until the kernel has done them.
    ///
    /// # Errors
    /// The first refusal that its request does not tolerate. The requests after it in the same send were tried all the same.
    pub(super) fn batch(&mut self, requests: Vec<Request>) -> Result<(), Error> {
        let mut pending = requests.into_iter().peekable();
        while pending.peek().is_some() {
            let mut labels = Vec::new();
            let first = self.sequence.wrapping_add(1);
            let mut bytes = std::mem::take(&mut self.buffer);
            bytes.clear();
            while let Some(request) = pending.next() {
                labels.push((request.operation, request.object, request.tolerated));
                let more = pending.peek().is_some() && labels.len() < BATCH_MESSAGES;
                let flags = NLM_F_REQUEST | request.flags | if more { 0 } else { NLM_F_ACK };
                self.append(&mut bytes, request.message, flags);
                if !more {
                    break;
                }
            }
            let sent = self.socket.send(&bytes, 0).map_err(Error::Socket);
            self.buffer = bytes;
            sent?;
            self.acknowledged(first, &labels)?;
        }
        Ok(())
    }

    /// Sends `request` and returns the one object it asks for.
    pub(super) fn one(&mut self, request: Request) -> Result<RouteNetlinkMessage, Error> {
        let (operation, object) = (request.operation, request.object);
        self.send(request.message, NLM_F_REQUEST)?;
        let mut found = None;
        self.receive(|payload| match payload {
            NetlinkPayload::InnerMessage(message) => {
                found = Some(message);
                Ok(true)
            }
            NetlinkPayload::Error(e) => Err(refused(operation, object.clone(), e.to_io())),
            _ => Ok(false),
        })?;
        found.ok_or(Error::Unexpected("nothing"))
    }

    /// Sends `message` as a dump request and collects what it yields; a table or family that does not exist yields nothing.
    pub(super) fn dump(
        &mut self,
        message: &RouteNetlinkMessage,
        kind: &'static str,
    ) -> Result<Vec<RouteNetlinkMessage>, Error> {
        for _ in 0..DUMP_ATTEMPTS {
            self.send(message.clone(), NLM_F_REQUEST | NLM_F_DUMP)?;
            let mut found = Vec::new();
            let consistent = self.receive(|payload| match payload {
                NetlinkPayload::InnerMessage(message) => {
                    found.push(message);
                    Ok(false)
                }
                NetlinkPayload::Done(_) => Ok(true),
                NetlinkPayload::Error(e)
                    if matches!(-e.raw_code(), libc::ENOENT | libc::EAFNOSUPPORT | libc::EOPNOTSUPP) =>
                {
                    Ok(true)
                }
                NetlinkPayload::Error(e) => Err(refused("list", Object::All(kind), e.to_io())),
                _ => Ok(false),
            })?;
            if consistent {
                return Ok(found);
            }
        }
        Err(Error::Unexpected("inconsistent dumps only"))
    }

    fn append(&mut self, bytes: &mut Vec<u8>, message: RouteNetlinkMessage, flags: u16) {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut packet = NetlinkMessage::new(header, NetlinkPayload::from(message));
        packet.finalize();
        let start = bytes.len();
        // Messages stand on four-byte boundaries.
        bytes.resize(start + packet.buffer_len().next_multiple_of(4), 0);
        packet.serialize(&mut bytes[start..]);
    }

    fn send(&mut self, message: RouteNetlinkMessage, flags: u16) -> Result<(), Error> {
        let mut bytes = Vec::new();
        self.append(&mut bytes, message, flags);
        self.socket.send(&bytes, 0).map(drop).map_err(Error::Socket)
    }

    /// Reads until the acknowledgement of the last message; keeps the first refusal.
    fn acknowledged(
        &mut self,
        first: u32,
        labels: &[(&'static str, Object, &'static [Errno])],
    ) -> Result<(), Error> {
        let mut failure = None;
        loop {
            let (bytes, _) = self.socket.recv_from_full().map_err(Error::Socket)?;
            for message in messages(&bytes) {
                let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(message.bytes)
                    .map_err(|_| Error::Unexpected("a malformed message"))?;
                let (header, payload) = message.into_parts();
                let index = usize::try_from(header.sequence_number.wrapping_sub(first)).unwrap_or(usize::MAX);
                // An answer to an earlier batch that failed half-way is none of this one's.
                let (Some((operation, object, tolerated)), NetlinkPayload::Error(e)) =
                    (labels.get(index), payload)
                else {
                    continue;
                };
                let code = e.raw_code();
                if code != 0 && !tolerated.contains(&Errno::from_raw(-code)) && failure.is_none() {
                    failure = Some(refused(operation, object.clone(), e.to_io()));
                }
                if index + 1 == labels.len() {
                    return failure.map_or(Ok(()), Err);
                }
            }
        }
    }

    /// Feeds every answer to the last message sent into `each` until it returns true; false if a dump was interrupted.
    fn receive(
        &mut self,
        mut each: impl FnMut(NetlinkPayload<RouteNetlinkMessage>) -> Result<bool, Error>,
    ) -> Result<bool, Error> {
        const DUMP_INTERRUPTED: u16 = 0x10;
        let mut consistent = true;
        loop {
            let (bytes, _) = self.socket.recv_from_full().map_err(Error::Socket)?;
            for message in messages(&bytes) {
                // Objects of others may have attributes that the parser cannot read; ours have none.
                let Ok(message) = NetlinkMessage::deserialize(message.bytes) else { continue };
                let (header, payload) = message.into_parts();
                if header.sequence_number != self.sequence {
                    continue;
                }
                consistent &= header.flags & DUMP_INTERRUPTED == 0;
                if each(payload)? {
                    return Ok(consistent);
                }
            }
        }
    }
}

fn refused(operation: &'static str, object: Object, source: io::Error) -> Error {
    match source.kind() {
        io::ErrorKind::PermissionDenied => Error::Permission { operation, object },
        _ => Error::Refused { operation, object, source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_operation_and_object_but_no_address() {
        let object = Object::Rule { priority: 105, ipv6: true };
        let error = refused("add", object, io::Error::from_raw_os_error(libc::EINVAL));
        assert_eq!(error.to_string(), "cannot add IPv6 rule 105");
        let address = IpAddr::from([10, 0, 0, 1]);
        for object in [Object::Route(address), Object::Address(address)] {
            let error = refused("add", object, io::Error::from_raw_os_error(libc::EINVAL));
            assert!(!error.to_string().contains("10.0.0.1"), "{error}");
        }
        let error = refused("add", Object::Link("tenc0".into()), io::Error::from_raw_os_error(libc::EPERM));
        assert_eq!(error.to_string(), "add link tenc0 needs CAP_NET_ADMIN: run as root");
    }
}
