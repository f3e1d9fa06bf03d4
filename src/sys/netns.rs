//! What kind of namespace a descriptor is, and the name of a network namespace that is never used again.
//!
//! Source: `ioctl_ns(2)`; SO_NETNS_COOKIE of asm-generic/socket.h (Linux 5.14).
#![expect(unsafe_code, reason = "nix and rustix have no safe call for these requests")]

use std::io;
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

/// The cookie of the network namespace that `socket` was made in: unique until the next boot, unlike an inode number.
///
/// # Errors
///
/// Not a socket, or a kernel before 5.14.
pub fn cookie(socket: impl AsFd) -> io::Result<u64> {
    let mut cookie = 0_u64;
    let mut len: libc::socklen_t = 8;
    // SAFETY: the descriptor is open for the length of the call; the value is 8 bytes long, `len` says so, and both
    // outlive the call. The kernel writes at most `len` bytes, and any 8 bytes are a valid u64.
    let failed = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    };
    match (failed, len) {
        (0, 8) => Ok(cookie),
        (0, _) => Err(io::Error::other("a cookie of another length")),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::net::UdpSocket;

    use super::*;

    #[test]
    fn sockets_of_one_namespace_have_one_cookie_and_a_file_has_none() {
        let [one, two] = [(); 2].map(|()| UdpSocket::bind("127.0.0.1:0").unwrap());
        let found = cookie(&one).unwrap();
        assert!(found != 0 && cookie(&two).unwrap() == found);
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
