//! What kind of namespace a descriptor is, and the number that the kernel gave it.
//!
//! Source: `ioctl_ns(2)`, `socket(7)`.
#![expect(unsafe_code, reason = "nix and rustix have no safe call for this request")]

use std::os::fd::{AsFd, AsRawFd};

use nix::sched::CloneFlags;
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};

mod request {
    // _IO(0xb7, 0x3) of linux/nsfs.h.
    nix::ioctl_none!(ns_get_nstype, 0xb7, 0x3);
}

/// Whether `fd` is a network namespace.
///
/// # Errors
///
/// If the kernel does not answer.
pub fn is_network_namespace(fd: impl AsFd) -> nix::Result<bool> {
    // The request number means something else to other files, so only namespaces are asked.
    if fstatfs(&fd)?.filesystem_type() != NSFS_MAGIC {
        return Ok(false);
    }
    // SAFETY: the descriptor is open for the length of the call, and NS_GET_NSTYPE neither takes nor fills memory.
    let kind = unsafe { request::ns_get_nstype(fd.as_fd().as_raw_fd()) }?;
    Ok(kind == CloneFlags::CLONE_NEWNET.bits())
}

/// The kernel's number of the network namespace that `socket` belongs to: not used again before the next boot.
///
/// # Errors
///
/// ENOPROTOOPT before Linux 5.14.
pub fn cookie(socket: impl AsFd) -> std::io::Result<u64> {
    let mut cookie = 0_u64;
    let mut length = libc::socklen_t::try_from(size_of_val(&cookie)).expect("eight");
    // SAFETY: the descriptor is open for the length of the call; both pointers lead to objects that outlive it, and the
    // kernel writes at most `length` bytes, the size of `cookie`, in which every pattern of bits is valid.
    let got = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if got == 0 { Ok(cookie) } else { Err(std::io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn sockets_of_one_namespace_have_one_cookie() {
        let socket = || std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let first = cookie(socket()).unwrap();
        assert!(first != 0 && first == cookie(socket()).unwrap());
        assert!(cookie(File::open("/dev/null").unwrap()).is_err());
    }

    #[test]
    fn only_network_namespaces_are_network_namespaces() {
        assert!(is_network_namespace(File::open("/proc/self/ns/net").unwrap()).unwrap());
        assert!(!is_network_namespace(File::open("/proc/self/ns/uts").unwrap()).unwrap());
        assert!(!is_network_namespace(File::open("/proc/self/status").unwrap()).unwrap());
        assert!(!is_network_namespace(File::open("/dev/null").unwrap()).unwrap());
    }
}
