//! Descriptors that a parent process left open across exec: those meant for us, and those that are not.
#![expect(unsafe_code, reason = "inherited descriptors are plain numbers")]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// Takes over an inherited descriptor and makes it close-on-exec.
///
/// An inherited descriptor is one that is open without the close-on-exec flag: nothing in this program opens
/// descriptors that way (std, nix and rustix set the flag), so no other owner can exist, and a second call is refused.
///
/// # Errors
/// The number is standard input, output or error, is not open, or was not inherited.
pub fn take_inherited(number: RawFd) -> io::Result<OwnedFd> {
    if number <= libc::STDERR_FILENO {
        return Err(io::Error::other("a standard stream is no inherited descriptor"));
    }
    // SAFETY: F_GETFD reads the flags of a descriptor number; a number that is not open gives EBADF.
    let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
    if flags == -1 {
        return Err(io::Error::last_os_error());
    }
    if flags & libc::FD_CLOEXEC != 0 {
        return Err(io::Error::other("the descriptor was opened by this process"));
    }
    // SAFETY: F_SETFD changes the flags of the open descriptor found above and nothing else.
    if unsafe { libc::fcntl(number, libc::F_SETFD, flags | libc::FD_CLOEXEC) } == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open (F_GETFD) and has no other owner: it lacked the close-on-exec flag, which every
    // descriptor opened by this program has.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Makes every descriptor above standard error close-on-exec: what a shell or a service manager left open is not for the
/// programs that this process starts. Kernels before 5.11 cannot, and nothing depends on it.
pub fn keep_to_ourselves() {
    const FIRST: libc::c_uint = 3;
    let flags = libc::CLOSE_RANGE_CLOEXEC.cast_signed();
    // SAFETY: with this flag the call closes nothing; it sets a flag of open descriptors and touches no memory.
    let _ = unsafe { libc::close_range(FIRST, libc::c_uint::MAX, flags) };
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsRawFd, IntoRawFd};

    use super::*;

    #[test]
    fn only_a_descriptor_left_open_across_exec_is_taken_and_only_once() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(take_inherited(file.as_raw_fd()).is_err());
        rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::empty()).unwrap();
        let number = file.into_raw_fd();
        let taken = take_inherited(number).unwrap();
        assert_eq!(taken.as_raw_fd(), number);
        assert!(take_inherited(number).is_err());
        assert!(take_inherited(0).is_err());
        assert!(take_inherited(1_000_000).is_err());
    }
}
