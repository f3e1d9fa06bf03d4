//! AF_PACKET sockets: whole frames of one protocol on one device.
//!
//! Source: packet(7), Documentation/networking/filter.rst.
#![expect(unsafe_code, reason = "link-layer addresses of sockets")]

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use socket2::{Domain, SockFilter, Socket, Type};

/// Opens a non-blocking socket for the frames of `ether_type` on the device `index` that `filter` accepts.
///
/// The socket is made without a protocol and gets its filter before it is bound, so no other frame is ever queued.
///
/// # Errors
/// `EPERM`: needs CAP_NET_RAW. `ENODEV`: no such device.
pub fn open(index: u32, ether_type: u16, filter: &[SockFilter]) -> io::Result<OwnedFd> {
    let socket = Socket::new(Domain::PACKET, Type::RAW, None)?;
    socket.set_nonblocking(true)?;
    socket.attach_filter(filter)?;
    let address = libc::sockaddr_ll {
        sll_family: u16::try_from(libc::AF_PACKET).expect("a small constant"),
        sll_protocol: ether_type.to_be(),
        sll_ifindex: i32::try_from(index).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let length = u32::try_from(size_of::<libc::sockaddr_ll>()).expect("twenty bytes");
    // SAFETY: the descriptor is open, and the pointer leads to an initialised sockaddr_ll of the length given.
    let result = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(socket.into()) }
}

/// The hardware address of the Ethernet device that `socket` is bound to, as it is now.
///
/// # Errors
/// The kernel's; `InvalidData` for a device of another kind.
pub fn hardware_address(socket: impl AsFd) -> io::Result<[u8; 6]> {
    let mut address = libc::sockaddr_ll {
        sll_family: 0,
        sll_protocol: 0,
        sll_ifindex: 0,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    // The kernel leaves out what of the address is not used, so nix's LinkAddr does not take it.
    let mut length = u32::try_from(size_of::<libc::sockaddr_ll>()).expect("twenty bytes");
    let fd = socket.as_fd();
    // SAFETY: the descriptor is open for the length of the call; both pointers lead to initialised values that outlive it, and
    // the kernel writes at most `length` bytes, of which any are a valid sockaddr_ll.
    let result = unsafe { libc::getsockname(fd.as_raw_fd(), (&raw mut address).cast(), &raw mut length) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    if usize::from(address.sll_halen) != 6 {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(*address.sll_addr.first_chunk().expect("eight bytes"))
}
