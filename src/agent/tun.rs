//! `tenc0`: the device through which the pod's captured packets come and opened packets go.
//!
//! Single-queue, so that a second attach is refused instead of being handed plaintext, and persistent, so that packets queue
//! up while no agent reads. Every packet is preceded by a virtio-net header ([`crate::wire::vnet`]).
//!
//! Source: Documentation/networking/tuntap.rst.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;

use crate::sys::tun;

/// Name of the device in every pod.
pub const NAME: &str = "tenc0";

/// Why a TUN device could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A live agent reads from it.
    #[error("another agent holds {0}")]
    Busy(&'static str),
    /// The capability is missing.
    #[error("creating {0} needs CAP_NET_ADMIN: run as root")]
    Permission(&'static str),
    /// Another program made a device of that name.
    #[error("a device {0} of another kind exists in this namespace")]
    Foreign(&'static str),
    /// No TUN driver.
    #[error("/dev/net/tun is missing: load the kernel module tun")]
    NoDriver,
    /// Anything else.
    #[error("cannot open {name}")]
    Open {
        /// The device.
        name: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl Error {
    /// What the kernel's refusal of the device `name` means.
    pub(crate) fn of(name: &'static str, error: io::Error) -> Self {
        match Errno::from_raw(error.raw_os_error().unwrap_or(0)) {
            Errno::EBUSY => Self::Busy(name),
            Errno::EPERM => Self::Permission(name),
            Errno::EINVAL => Self::Foreign(name),
            Errno::ENOENT | Errno::ENODEV | Errno::ENXIO => Self::NoDriver,
            _ => Self::Open { name, source: error },
        }
    }
}

/// The descriptor of `tenc0`.
#[derive(Debug)]
pub struct Tun {
    fd: OwnedFd,
    offloads: u32,
}

impl Tun {
    /// Creates `tenc0` in the calling thread's network namespace, or attaches to the one a former agent left.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn open() -> Result<Self, Error> {
        let device = tun::open(NAME).map_err(|error| Error::of(NAME, error))?;
        tun::set_persistent(&device.fd, true).map_err(|source| Error::Open { name: NAME, source })?;
        Ok(Self { fd: device.fd, offloads: device.offloads })
    }

    /// Goes on with a former agent's descriptor; what is queued in it is read first.
    ///
    /// # Errors
    /// `EBADFD`: the device was deleted.
    pub fn inherit(fd: OwnedFd) -> io::Result<Self> {
        let device = tun::inherit(fd)?;
        Ok(Self { fd: device.fd, offloads: device.offloads })
    }

    /// The `TUN_F_*` bits the kernel granted: 0 means that every packet comes whole and with its checksum complete.
    #[must_use]
    pub fn offloads(&self) -> u32 {
        self.offloads
    }

    /// Whether the device still exists, be it in another namespace.
    pub(crate) fn is_attached(&self) -> bool {
        tun::is_attached(&self.fd)
    }

    /// The device goes with its last descriptor.
    pub(crate) fn let_go(&self) {
        // A device that was deleted has nothing to let go.
        let _ = tun::set_persistent(&self.fd, false);
    }

    /// Reads one header and the packet or super-packet behind it; `buffer` should hold 10 + 65,535 bytes.
    ///
    /// # Errors
    /// `WouldBlock` when the queue is empty, `EBADFD` when the device was deleted, `EIO` while it is down.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(nix::unistd::read(&self.fd, buffer)?)
    }

    /// Hands the pod's stack one header and packet, gathered from `parts`.
    ///
    /// # Errors
    /// `EINVAL` for a header the kernel does not understand, `EIO` while the device is down, `EBADFD` when it was deleted.
    pub fn write_vectored(&self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        Ok(nix::sys::uio::writev(&self.fd, parts)?)
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
