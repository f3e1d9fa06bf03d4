//! Injection through raw sockets, for kernels or devices that refuse a write to `tenc0`.
//!
//! 1. the caller passes one complete packet whose destination is an address of this pod
//! 2. a partial checksum is completed here: a raw socket has no offloads
//! 3. the packet leaves by `lo`, where the guard does not look, and arrives with the route of its way out still attached:
//!    neither the reverse-path check nor the martian check is made, so any source and any rp_filter will do
//!
//! IPv4: the kernel gives whatever has the identification 0 one of its own, each fragment of a datagram another; so fragments
//! of datagram 0 are injected as another one's.
//!
//! The socket bears no mark: with `tcp_fwmark_accept` an accepted connection would inherit it and leave outside the tunnel.
//!
//! Source: raw(7), ipv6(7).

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{MsgFlags, SockaddrIn, SockaddrIn6, sendto};
use socket2::{Domain, Protocol, Socket, Type};

use crate::wire::checksum::complete_partial;
use crate::wire::packet::{Fragment, Packet, Version};

/// Send buffer: a burst of super-packets' worth of segments.
const SEND_BUFFER: usize = 4 << 20;

/// Identification of datagrams whose own is 0; those that were sent just before and after are far from it.
const INSTEAD_OF_ZERO: u16 = 0x8000;

/// One raw socket per family.
#[derive(Debug)]
pub struct RawInjector {
    v4: OwnedFd,
    /// Absent where the kernel has no IPv6.
    v6: Option<OwnedFd>,
}

impl RawInjector {
    /// Opens the sockets.
    ///
    /// # Errors
    /// `EPERM`: needs CAP_NET_RAW.
    pub fn open() -> io::Result<Self> {
        let v6 = match raw(Domain::IPV6) {
            Ok(fd) => Some(fd),
            Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => None,
            Err(error) => return Err(error),
        };
        Ok(Self { v4: raw(Domain::IPV4)?, v6 })
    }

    /// Injects `packet`, an IP packet with all its headers; `partial` = (start, offset from start) of a checksum to complete.
    ///
    /// # Errors
    /// `InvalidInput` when the packet or `partial` is malformed; else the kernel's, `WouldBlock` among them.
    pub fn inject(&self, packet: &mut [u8], partial: Option<(u16, u16)>) -> io::Result<()> {
        let malformed = || io::Error::from(io::ErrorKind::InvalidInput);
        let parsed = Packet::parse(packet).ok_or_else(malformed)?;
        let packet = &mut packet[..parsed.len];
        if let Some((start, offset)) = partial {
            complete_partial(packet, start.into(), offset.into()).ok_or_else(malformed)?;
        }
        if matches!((parsed.version, parsed.fragment), (Version::V4, Some(Fragment { id: 0, .. }))) {
            // The kernel computes the header's checksum.
            packet[4..6].copy_from_slice(&INSTEAD_OF_ZERO.to_be_bytes());
        }
        // Port 0: for a raw IPv6 socket any other would have to be its protocol.
        match (parsed.destination, &self.v6) {
            (IpAddr::V4(to), _) => {
                let to = SockaddrIn::from(std::net::SocketAddrV4::new(to, 0));
                sendto(self.v4.as_raw_fd(), packet, &to, MsgFlags::MSG_DONTWAIT)?;
            }
            (IpAddr::V6(to), Some(fd)) => {
                let to = SockaddrIn6::from(std::net::SocketAddrV6::new(to, 0, 0, 0));
                sendto(fd.as_raw_fd(), packet, &to, MsgFlags::MSG_DONTWAIT)?;
            }
            (IpAddr::V6(_), None) => return Err(io::ErrorKind::Unsupported.into()),
        }
        Ok(())
    }
}

fn raw(domain: Domain) -> io::Result<OwnedFd> {
    let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)))?;
    socket.set_nonblocking(true)?;
    // A raw socket of this protocol never receives, so its receive queue needs no care.
    socket.set_send_buffer_size(SEND_BUFFER)?;
    Ok(socket.into())
}
