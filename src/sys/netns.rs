//! What kind of namespace a descriptor is.
//!
//! Source: `ioctl_ns(2)`.
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

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn only_network_namespaces_are_network_namespaces() {
        assert!(is_network_namespace(File::open("/proc/self/ns/net").unwrap()).unwrap());
        assert!(!is_network_namespace(File::open("/proc/self/ns/uts").unwrap()).unwrap());
        assert!(!is_network_namespace(File::open("/proc/self/status").unwrap()).unwrap());
        assert!(!is_network_namespace(File::open("/dev/null").unwrap()).unwrap());
    }
}
