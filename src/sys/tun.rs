//! TUN devices: the ioctls of `/dev/net/tun`.
//!
//! [`open`] creates or attaches one device in the calling thread's network namespace; everything else about the device
//! (MTU, up, addresses) is netlink's business.
//!
//! Source: linux/if_tun.h, Documentation/networking/tuntap.rst.
#![expect(unsafe_code, reason = "ioctls on /dev/net/tun")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::{ioctl_read_bad, ioctl_write_int_bad, ioctl_write_ptr_bad};

use crate::wire::vnet::VNET_HEADER_LEN;

ioctl_write_ptr_bad!(
    /// Names the device and creates or attaches it.
    tun_set_iff, libc::TUNSETIFF, libc::ifreq
);
ioctl_read_bad!(
    /// Says which device is attached.
    tun_get_iff, libc::TUNGETIFF, libc::ifreq
);
ioctl_write_int_bad!(
    /// Makes the device outlive its descriptors, or not.
    tun_set_persist, libc::TUNSETPERSIST
);
ioctl_write_int_bad!(
    /// Says which super-packets and partial checksums the reader understands.
    tun_set_offload, libc::TUNSETOFFLOAD
);
ioctl_write_ptr_bad!(
    /// Sets the length of the header before each packet.
    tun_set_vnet_hdr_sz, libc::TUNSETVNETHDRSZ, libc::c_int
);
ioctl_write_ptr_bad!(
    /// Makes the header little endian whatever the machine is.
    tun_set_vnet_le, libc::TUNSETVNETLE, libc::c_int
);

/// What the reader of a device accepts, from most to least; older kernels refuse the first with EINVAL (USO came with 6.2).
const OFFLOADS: [u32; 4] = [
    libc::TUN_F_CSUM
        | libc::TUN_F_TSO4
        | libc::TUN_F_TSO6
        | libc::TUN_F_TSO_ECN
        | libc::TUN_F_USO4
        | libc::TUN_F_USO6,
    libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN,
    libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6,
    0,
];

/// An open device and the offloads the kernel granted.
#[derive(Debug)]
pub struct Device {
    /// Non-blocking, close-on-exec.
    pub fd: OwnedFd,
    /// `TUN_F_*` bits in force.
    pub offloads: u32,
}

/// Creates, or attaches to, the single-queue TUN device `name` with virtio-net headers.
///
/// # Errors
/// `EBUSY`: another descriptor is attached. `EINVAL`: a device of that name is of another kind. `EPERM`: needs CAP_NET_ADMIN.
pub fn open(name: &str) -> io::Result<Device> {
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")?;
    let request = named_request(name)?;
    // SAFETY: the descriptor is open and `request` is an initialised ifreq with a NUL-terminated name.
    unsafe { tun_set_iff(file.as_raw_fd(), &raw const request) }?;
    let length = i32::try_from(VNET_HEADER_LEN).expect("ten fits in an int");
    // SAFETY: the descriptor is open and the argument points to an int that outlives the call.
    unsafe { tun_set_vnet_hdr_sz(file.as_raw_fd(), &raw const length) }?;
    let yes: libc::c_int = 1;
    // SAFETY: the descriptor is open and the argument points to an int that outlives the call.
    unsafe { tun_set_vnet_le(file.as_raw_fd(), &raw const yes) }?;
    let offloads = set_offloads(&file)?;
    Ok(Device { fd: file.into(), offloads })
}

/// Goes on with the descriptor of a device that a former agent opened.
///
/// # Errors
/// `EBADFD`: the device was deleted.
pub fn inherit(fd: OwnedFd) -> io::Result<Device> {
    let file = File::from(fd);
    let offloads = set_offloads(&file)?;
    Ok(Device { fd: file.into(), offloads })
}

/// Decides whether the device outlives its last descriptor.
///
/// # Errors
/// The kernel's, which happens only on a descriptor that is no attached TUN.
pub fn set_persistent(fd: impl AsFd, persistent: bool) -> io::Result<()> {
    // SAFETY: the descriptor is open for the length of the borrow; the argument is passed by value.
    unsafe { tun_set_persist(fd.as_fd().as_raw_fd(), persistent.into()) }?;
    Ok(())
}

/// Whether `fd` still has a device, in whatever namespace; not after it was deleted.
pub fn is_attached(fd: impl AsFd) -> bool {
    let ifr_ifru = libc::__c_anonymous_ifr_ifru { ifru_flags: 0 };
    let mut answer = libc::ifreq { ifr_name: [0; libc::IFNAMSIZ], ifr_ifru };
    // SAFETY: the descriptor is open for the length of the borrow; the kernel fills the ifreq, which outlives the call.
    unsafe { tun_get_iff(fd.as_fd().as_raw_fd(), &raw mut answer) }.is_ok()
}

fn set_offloads(file: &File) -> io::Result<u32> {
    let mut refused = io::ErrorKind::InvalidInput.into();
    for offloads in OFFLOADS {
        let bits = i32::try_from(offloads).expect("seven bits");
        // SAFETY: the descriptor is open; the argument is passed by value.
        match unsafe { tun_set_offload(file.as_raw_fd(), bits) } {
            Ok(_) => return Ok(offloads),
            Err(nix::Error::EINVAL) => refused = nix::Error::EINVAL.into(),
            Err(error) => return Err(error.into()),
        }
    }
    Err(refused)
}

fn named_request(name: &str) -> io::Result<libc::ifreq> {
    if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.contains(['/', '%', ' ', '\0']) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a device name"));
    }
    let mut ifr_name = [0; libc::IFNAMSIZ];
    for (to, from) in ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    let flags = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let ifr_ifru =
        libc::__c_anonymous_ifr_ifru { ifru_flags: i16::try_from(flags).expect("IFF bits below 0x8000") };
    Ok(libc::ifreq { ifr_name, ifr_ifru })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_is_none_is_refused() {
        for name in ["", "a/b", "tenc%d", "a b", "sixteen-letters!"] {
            assert_eq!(named_request(name).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{name}");
        }
    }

    #[test]
    fn a_name_is_terminated() {
        let request = named_request("tenc0").unwrap();
        let bytes = request.ifr_name.map(|c| c.to_ne_bytes()[0]);
        assert_eq!(&bytes[..6], b"tenc0\0");
    }
}
