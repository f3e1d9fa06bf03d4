//! Readiness of a descriptor of our own in the tokio runtime.
//!
//! tokio's constructor is unsafe because a foreign type could close or exchange its descriptor; an [`OwnedFd`] cannot.
//! Source: tokio, `AsyncFd::register_with_interest`.
#![expect(unsafe_code, reason = "tokio has no safe constructor that is not deprecated")]

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Registers `fd` for reading. Must be called inside a tokio runtime.
///
/// # Errors
///
/// If the descriptor cannot be polled, or the runtime is at its limit.
pub fn readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the AsyncFd owns the OwnedFd, which keeps one descriptor open for its whole life, gives the same number
    // at every as_raw_fd, and is given away as a shared reference only.
    unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.map_err(Into::into)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[tokio::test]
    async fn a_pipe_becomes_readable_when_written_to() {
        let (reader, mut writer) = io::pipe().unwrap();
        let reader = readable(reader.into()).unwrap();
        writer.write_all(b"x").unwrap();
        reader.readable().await.unwrap().clear_ready();
    }
}
