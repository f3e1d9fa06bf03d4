//! Injection through raw sockets, for kernels or devices that refuse a write to `tenc0`.
//!
//! 1. the caller passes one complete packet whose destination is an address of this pod
//! 2. a partial checksum is completed here: a raw socket has no offloads
//! 3. the packet leaves by `lo`, where the guard does not look, and arrives with the route of its way out still attached:
//!    neither the reverse-path check nor the martian check is made, so any source and any rp_filter will do
//!
//! The socket bears no mark: with `tcp_fwmark_accept` an accepted connection would inherit it and leave outside the tunnel.
//!
//! Source: raw(7), ipv6(7).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{MsgFlags, SockaddrIn, SockaddrIn6, sendto};
use socket2::{Domain, Protocol, Socket, Type};

/// Send buffer: a burst of super-packets' worth of segments.
const SEND_BUFFER: usize = 4 << 20;

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
        let to = destination(packet).ok_or_else(malformed)?;
        if let Some((start, offset)) = partial {
            complete_checksum(packet, start.into(), offset.into()).ok_or_else(malformed)?;
        }
        // Port 0: for a raw IPv6 socket any other would have to be its protocol.
        match (to, &self.v6) {
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

fn destination(packet: &[u8]) -> Option<IpAddr> {
    match packet.first()? >> 4 {
        4 => Some(Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(16..20)?).ok()?).into()),
        6 => Some(Ipv6Addr::from(<[u8; 16]>::try_from(packet.get(24..40)?).ok()?).into()),
        _ => None,
    }
}

/// Adds up everything from `start` on, the pseudo-header's sum that stands in the checksum field included, and stores the result.
fn complete_checksum(packet: &mut [u8], start: usize, offset: usize) -> Option<()> {
    let field = start.checked_add(offset)?;
    packet.get(field..field.checked_add(2)?)?;
    let mut words = packet.get(start..)?.chunks_exact(2);
    let mut sum: u64 = words.by_ref().map(|w| u64::from(u16::from_be_bytes([w[0], w[1]]))).sum();
    if let [last] = words.remainder() {
        sum += u64::from(*last) << 8;
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let folded = !u16::try_from(sum).expect("folded to 16 bits");
    // For UDP a sum of zero would mean that there is none; for TCP both spellings are right.
    let stored = if folded == 0 { 0xffff } else { folded };
    packet[field..field + 2].copy_from_slice(&stored.to_be_bytes());
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partial_checksum_is_completed() {
        // RFC 1071 section 3: the words 0001 f203 f4f5 f6f7 add up to ddf2.
        let mut packet = [0x45, 0, 0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7, 0, 0];
        complete_checksum(&mut packet, 2, 8).unwrap();
        assert_eq!(packet[10..], (!0xddf2_u16).to_be_bytes());
    }

    #[test]
    fn a_sum_of_zero_is_stored_as_all_ones() {
        let mut packet = [0xff, 0xff, 0, 0];
        complete_checksum(&mut packet, 0, 2).unwrap();
        assert_eq!(packet[2..], [0xff, 0xff]);
    }

    #[test]
    fn offsets_outside_the_packet_are_refused() {
        for (start, offset) in [(3, 0), (0, 3), (9, 0), (usize::MAX, 1)] {
            assert_eq!(complete_checksum(&mut [0; 4], start, offset), None);
        }
        assert_eq!(destination(&[]), None);
        assert_eq!(destination(&[0x60; 39]), None);
    }
}
