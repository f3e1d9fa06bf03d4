//! `sendmsg` with UDP_SEGMENT and `recvmsg` with UDP_GRO, without an allocation per call.
//!
//! nix allocates its control buffer on each send; here it lies on the stack.
//!
//! Source: udp(7), linux/udp.h, cmsg(3).
#![expect(unsafe_code, reason = "msghdr and cmsg are built of raw pointers")]

use std::io::{self, IoSlice};
use std::mem::{size_of, zeroed};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd};
use std::ptr;

/// Room for one control message with a four-byte value, aligned as `cmsghdr` must be.
#[repr(C, align(8))]
struct Control([u8; 32]);

/// Sends `parts`, which together are one datagram or, with `segment`, a train of datagrams of that size (the last may be shorter).
///
/// # Errors
/// The kernel's, untranslated.
pub fn send(fd: impl AsFd, to: SocketAddr, parts: &[IoSlice<'_>], segment: Option<u16>) -> io::Result<usize> {
    let (mut address, address_len) = encode(to);
    let mut control = Control([0; 32]);
    // SAFETY: all-zero bytes are a valid msghdr: null pointers and zero lengths.
    let mut message: libc::msghdr = unsafe { zeroed() };
    message.msg_name = (&raw mut address).cast();
    message.msg_namelen = address_len;
    message.msg_iov = parts.as_ptr().cast_mut().cast();
    message.msg_iovlen = parts.len();
    if let Some(segment) = segment {
        message.msg_control = control.0.as_mut_ptr().cast();
        message.msg_controllen = cmsg_space(size_of::<u16>());
        put_segment(&message, segment);
    }
    // SAFETY: the descriptor is open; every pointer of `message` leads to memory of the length beside it that outlives the
    // call (IoSlice has the layout of iovec), and sendmsg only reads it.
    let sent = unsafe { libc::sendmsg(fd.as_fd().as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// What one call of [`recv`] brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// Bytes in the buffer.
    pub len: usize,
    /// Who sent them.
    pub from: SocketAddr,
    /// Size of each datagram in the buffer but the last, which may be shorter; `len` where there is one datagram.
    pub segment: usize,
    /// The buffer was too small; the rest is lost.
    pub truncated: bool,
}

/// Receives one datagram, or a train of equal datagrams from one sender where UDP_GRO is on.
///
/// # Errors
/// `WouldBlock` when nothing is queued; else the kernel's.
pub fn recv(fd: impl AsFd, buffer: &mut [u8]) -> io::Result<Received> {
    // SAFETY: all-zero bytes are a valid sockaddr_storage.
    let mut address: libc::sockaddr_storage = unsafe { zeroed() };
    let mut control = Control([0; 32]);
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: all-zero bytes are a valid msghdr: null pointers and zero lengths.
    let mut message: libc::msghdr = unsafe { zeroed() };
    message.msg_name = (&raw mut address).cast();
    message.msg_namelen = u32::try_from(size_of::<libc::sockaddr_storage>()).expect("128 bytes");
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = control.0.len();
    // SAFETY: the descriptor is open; every pointer of `message` leads to writable memory of the length beside it.
    let got = unsafe { libc::recvmsg(fd.as_fd().as_raw_fd(), &raw mut message, 0) };
    let len = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
    let from = decode(&address).ok_or_else(|| io::Error::other("sender of an unknown family"))?;
    let segment = gro_segment(&message).filter(|size| *size > 0).unwrap_or(len);
    Ok(Received { len, from, segment, truncated: message.msg_flags & libc::MSG_TRUNC != 0 })
}

/// Turns on UDP_GRO.
///
/// # Errors
/// `ENOPROTOOPT` before Linux 5.0.
pub fn enable_gro(fd: impl AsFd) -> io::Result<()> {
    set_int(fd, libc::SOL_UDP, libc::UDP_GRO, 1)
}

/// Sets DF on every datagram and ignores what ICMP says about the path MTU.
///
/// # Errors
/// The kernel's.
pub fn set_mtu_probe(fd: impl AsFd, ipv6: bool) -> io::Result<()> {
    if ipv6 {
        set_int(fd, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_PROBE)
    } else {
        set_int(fd, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_PROBE)
    }
}

/// Asks for socket buffers of `bytes` each: past the system's limit where CAP_NET_ADMIN allows it, up to it elsewhere.
///
/// # Errors
/// The kernel's.
pub fn set_buffers(fd: impl AsFd, bytes: i32) -> io::Result<()> {
    for (force, plain) in [(libc::SO_RCVBUFFORCE, libc::SO_RCVBUF), (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF)] {
        if set_int(&fd, libc::SOL_SOCKET, force, bytes).is_err() {
            set_int(&fd, libc::SOL_SOCKET, plain, bytes)?;
        }
    }
    Ok(())
}

/// Datagrams that the socket's receive buffer had no room for, since it was made (SO_MEMINFO, `SK_MEMINFO_DROPS`).
///
/// # Errors
/// The kernel's; `InvalidData` before Linux 4.16, which does not count them here.
pub fn dropped(fd: impl AsFd) -> io::Result<u32> {
    /// `SK_MEMINFO_DROPS` of linux/sock_diag.h, and the number of values up to it.
    const DROPS: usize = 8;
    let mut values = [0u32; DROPS + 1];
    let mut length = u32::try_from(size_of_val(&values)).expect("36 bytes");
    // SAFETY: the descriptor is open, the pointers lead to writable memory of the length given and to that length.
    let result = unsafe {
        libc::getsockopt(
            fd.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MEMINFO,
            values.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    if usize::try_from(length).is_ok_and(|length| length < size_of_val(&values)) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(values[DROPS])
}

fn set_int(fd: impl AsFd, level: i32, name: i32, value: i32) -> io::Result<()> {
    let length = u32::try_from(size_of::<libc::c_int>()).expect("four bytes");
    // SAFETY: the descriptor is open, and the pointer leads to an int of the length given.
    let result =
        unsafe { libc::setsockopt(fd.as_fd().as_raw_fd(), level, name, (&raw const value).cast(), length) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn cmsg_space(value_len: usize) -> usize {
    let value_len = u32::try_from(value_len).expect("a few bytes");
    // SAFETY: CMSG_SPACE is arithmetic on its argument.
    let space = unsafe { libc::CMSG_SPACE(value_len) };
    usize::try_from(space).expect("a few bytes")
}

/// Writes the one control message of `message`, whose control buffer has room for it.
fn put_segment(message: &libc::msghdr, segment: u16) {
    // SAFETY: `message` has a control buffer longer than a header.
    let header = unsafe { libc::CMSG_FIRSTHDR(message) };
    // SAFETY: CMSG_LEN is arithmetic on its argument.
    let length = unsafe { libc::CMSG_LEN(2) };
    let filled = libc::cmsghdr {
        cmsg_len: usize::try_from(length).expect("a few bytes"),
        cmsg_level: libc::SOL_UDP,
        cmsg_type: libc::UDP_SEGMENT,
    };
    // SAFETY: the first header lies in the control buffer, which is aligned for it.
    unsafe { ptr::write(header, filled) };
    // SAFETY: the header was just written; its value follows inside the buffer.
    let value = unsafe { libc::CMSG_DATA(header) };
    // SAFETY: the buffer has room for two bytes of value; the write is unaligned.
    unsafe { ptr::write_unaligned(value.cast(), segment) };
}

/// The UDP_GRO control message of a received `message`.
fn gro_segment(message: &libc::msghdr) -> Option<usize> {
    // SAFETY: the kernel set msg_controllen to what it wrote into the buffer.
    let header = unsafe { libc::CMSG_FIRSTHDR(message) };
    if header.is_null() {
        return None;
    }
    // SAFETY: not null, so a whole header lies in the control buffer, which is aligned for it.
    let found = unsafe { ptr::read(header) };
    // SAFETY: CMSG_LEN is arithmetic on its argument.
    let wanted = unsafe { libc::CMSG_LEN(4) };
    if (found.cmsg_level, found.cmsg_type) != (libc::SOL_UDP, libc::UDP_GRO)
        || found.cmsg_len < usize::try_from(wanted).expect("a few bytes")
    {
        return None;
    }
    // SAFETY: the header is valid, so its value's address can be computed.
    let value = unsafe { libc::CMSG_DATA(header) };
    // SAFETY: cmsg_len says that four bytes of value are there; the read is unaligned.
    let size: libc::c_int = unsafe { ptr::read_unaligned(value.cast()) };
    usize::try_from(size).ok()
}

/// A socket address of either family, as the kernel takes it.
#[repr(C)]
union Address {
    v4: libc::sockaddr_in,
    v6: libc::sockaddr_in6,
}

fn encode(address: SocketAddr) -> (Address, u32) {
    match address {
        SocketAddr::V4(v4) => {
            let raw = libc::sockaddr_in {
                sin_family: u16::try_from(libc::AF_INET).expect("a small constant"),
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(v4.ip().octets()) },
                sin_zero: [0; 8],
            };
            (Address { v4: raw }, u32::try_from(size_of::<libc::sockaddr_in>()).expect("16 bytes"))
        }
        SocketAddr::V6(v6) => {
            let raw = libc::sockaddr_in6 {
                sin6_family: u16::try_from(libc::AF_INET6).expect("a small constant"),
                sin6_port: v6.port().to_be(),
                sin6_flowinfo: 0,
                sin6_addr: libc::in6_addr { s6_addr: v6.ip().octets() },
                sin6_scope_id: v6.scope_id(),
            };
            (Address { v6: raw }, u32::try_from(size_of::<libc::sockaddr_in6>()).expect("28 bytes"))
        }
    }
}

fn decode(storage: &libc::sockaddr_storage) -> Option<SocketAddr> {
    match i32::from(storage.ss_family) {
        libc::AF_INET => {
            // SAFETY: the family says that the kernel wrote a sockaddr_in, which sockaddr_storage is large and aligned enough for.
            let raw = unsafe { ptr::read(ptr::from_ref(storage).cast::<libc::sockaddr_in>()) };
            let ip = Ipv4Addr::from(raw.sin_addr.s_addr.to_ne_bytes());
            Some(SocketAddrV4::new(ip, u16::from_be(raw.sin_port)).into())
        }
        libc::AF_INET6 => {
            // SAFETY: the family says that the kernel wrote a sockaddr_in6, which sockaddr_storage is large and aligned enough for.
            let raw = unsafe { ptr::read(ptr::from_ref(storage).cast::<libc::sockaddr_in6>()) };
            let ip = Ipv6Addr::from(raw.sin6_addr.s6_addr);
            Some(SocketAddrV6::new(ip, u16::from_be(raw.sin6_port), 0, raw.sin6_scope_id).into())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    fn segments_arrive_whole(at: &str) {
        let (a, b) = (UdpSocket::bind(at).unwrap(), UdpSocket::bind(at).unwrap());
        enable_gro(&b).unwrap();
        let bytes: Vec<u8> = (0..250).collect();
        let parts = [IoSlice::new(&bytes[..30]), IoSlice::new(&bytes[30..])];
        assert_eq!(send(&a, b.local_addr().unwrap(), &parts, Some(100)).unwrap(), 250);
        let (mut all, mut buffer) = (Vec::new(), [0; 2000]);
        while all.len() < 250 {
            let got = recv(&b, &mut buffer).unwrap();
            assert_eq!(got.from, a.local_addr().unwrap());
            assert!(got.segment == 100 || got.segment == got.len, "{got:?}");
            assert!(!got.truncated);
            all.extend_from_slice(&buffer[..got.len]);
        }
        assert_eq!(all, bytes);
    }

    #[test]
    fn a_train_of_segments_arrives_whole_over_ipv4() {
        segments_arrive_whole("127.0.0.1:0");
    }

    #[test]
    fn a_train_of_segments_arrives_whole_over_ipv6() {
        segments_arrive_whole("[::1]:0");
    }

    #[test]
    fn datagrams_that_found_no_room_are_counted_and_others_are_not() {
        let (a, b) = (UdpSocket::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
        let to = b.local_addr().unwrap();
        set_int(&b, libc::SOL_SOCKET, libc::SO_RCVBUF, 4_096).unwrap();
        a.send_to(&[7; 100], to).unwrap();
        assert_eq!(dropped(&b).unwrap(), 0);
        for _ in 1..200 {
            a.send_to(&[7; 100], to).unwrap();
        }
        b.set_nonblocking(true).unwrap();
        let mut received = 0;
        while recv(&b, &mut [0; 200]).is_ok() {
            received += 1;
        }
        assert_eq!(received + dropped(&b).unwrap(), 200);
        assert!(received < 200, "the buffer was no limit");
    }

    #[test]
    fn a_datagram_longer_than_the_buffer_is_reported() {
        let (a, b) = (UdpSocket::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
        send(&a, b.local_addr().unwrap(), &[IoSlice::new(&[7; 100])], None).unwrap();
        let got = recv(&b, &mut [0; 10]).unwrap();
        assert!(got.truncated);
        assert_eq!(got.len, 10);
    }
}
