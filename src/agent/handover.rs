//! What an agent leaves to its successor: one sealed memfd, in which keys never touch a file system.
//!
//! 1. the driver exports its engine, which can seal nothing any more
//! 2. [`seal`] puts the bytes into memory that nobody can change or cut any more, and the launcher passes it on unread
//! 3. [`open`] takes nothing else: what could still change is refused
//!
//! May touch: memory. Source: memfd_create(2), F_ADD_SEALS in fcntl(2).

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, memfd_create};
use zeroize::Zeroizing;

/// Largest hand-over: a full flow table, sessions with 10,000 peers and everything that waits is less than half of it.
const SIZE_MAX: u64 = 64 << 20;
const SEALS: SealFlags =
    SealFlags::SEAL.union(SealFlags::SHRINK).union(SealFlags::GROW).union(SealFlags::WRITE);

/// Puts `bytes` into a sealed memfd.
///
/// # Errors
/// No memory, or no descriptors.
pub(super) fn seal(bytes: &[u8]) -> io::Result<OwnedFd> {
    let fd =
        memfd_create("tencrypt", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::NOEXEC_SEAL)
            // Before Linux 6.3 the last flag is not known.
            .or_else(|_| memfd_create("tencrypt", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING))?;
    let mut file = File::from(fd);
    file.write_all(bytes)?;
    fcntl_add_seals(&file, SEALS)?;
    Ok(file.into())
}

/// Reads what [`seal`] made.
///
/// # Errors
/// It is no sealed memfd, or too large.
pub(super) fn open(fd: OwnedFd) -> io::Result<Zeroizing<Vec<u8>>> {
    if !fcntl_get_seals(&fd)?.contains(SEALS) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "what was handed over is not sealed"));
    }
    let file = File::from(fd);
    let size = file.metadata()?.len();
    if size > SIZE_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "what was handed over is too large"));
    }
    // The buffer never grows: a reallocation would leave a copy of the keys behind.
    let mut bytes = Zeroizing::new(vec![0; usize::try_from(size).expect("below 64 MiB")]);
    // The descriptor came with the offset of its writer.
    rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(0))?;
    (&file).read_exact(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_sealed_is_read_and_cannot_be_changed() {
        let fd = seal(b"keys").unwrap();
        let mut other = File::from(fd.try_clone().unwrap());
        assert!(other.write_all(b"x").is_err() && other.set_len(0).is_err());
        assert_eq!(open(fd).unwrap()[..], b"keys"[..]);
        assert!(open(seal(b"").unwrap()).unwrap().is_empty());
    }

    #[test]
    fn what_could_still_change_is_refused() {
        let open_memory = memfd_create("test", MemfdFlags::ALLOW_SEALING).unwrap();
        assert!(open(open_memory).is_err());
        assert!(open(tempfile::tempfile().unwrap().into()).is_err());
    }
}
