//! One launcher per namespace: a lock file under `/run/tencrypt`, held by launcher and agent together.
//!
//! 1. [`Lock::take`] makes the file of the namespace's inode and locks it, or says that somebody else has it
//! 2. the agent inherits the descriptor: the lock lasts until both have ended, however they end
//! 3. [`Lock::remove`] deletes the file after a clean stop
//!
//! Without it, a second launcher would replace the guard of a protected pod and, failing on `tenc0`, remove it.
//! May touch: `/run/tencrypt`. Source: flock(2).

use std::fs::{DirBuilder, File, TryLockError};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Runtime files of the launcher.
pub const RUN_DIR: &str = "/run/tencrypt";

/// Why the lock could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another launcher protects this namespace, or its agent still lives.
    #[error("the pod is already protected: another tencrypt, or an agent it left, holds {}", path.display())]
    Taken {
        /// The lock file.
        path: PathBuf,
    },
    /// The file system refused.
    #[error("cannot lock {}", path.display())]
    Refused {
        /// The lock file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The lock of one namespace.
#[derive(Debug)]
pub struct Lock {
    file: File,
    path: PathBuf,
}

impl AsFd for Lock {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Lock {
    /// Takes the lock of the namespace with this inode, in the folder `dir`, which is made if it is not there.
    ///
    /// # Errors
    /// [`LockError::Taken`]; [`LockError::Refused`].
    pub fn take(dir: &Path, inode: u64) -> Result<Self, LockError> {
        let path = dir.join(format!("netns-{inode}.lock"));
        let refused = |source| LockError::Refused { path: path.clone(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(refused)?;
        loop {
            let file = File::options()
                .create(true)
                .truncate(false)
                .write(true)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
                .open(&path)
                .map_err(refused)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Err(LockError::Taken { path }),
                Err(TryLockError::Error(source)) => return Err(refused(source)),
            }
            // The holder before us may have deleted the file between our two calls: then nobody else would find it.
            if file.metadata().map_err(refused)?.nlink() > 0 {
                return Ok(Self { file, path });
            }
        }
    }

    /// Deletes the file and gives up the lock. To be called once the agent has ended.
    pub fn remove(self) {
        // A file that stays behind is empty and locks nobody out.
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_launcher_is_refused_while_any_descriptor_of_the_first_lives() {
        let dir = tempfile::tempdir().unwrap();
        let lock = Lock::take(dir.path(), 7).unwrap();
        assert!(matches!(Lock::take(dir.path(), 7), Err(LockError::Taken { .. })));
        let other = Lock::take(dir.path(), 8).unwrap();
        let inherited = lock.as_fd().try_clone_to_owned().unwrap();
        drop((lock, other));
        assert!(matches!(Lock::take(dir.path(), 7), Err(LockError::Taken { .. })));
        drop(inherited);
        Lock::take(dir.path(), 7).unwrap().remove();
        assert!(Lock::take(dir.path(), 7).is_ok());
        assert!(!dir.path().join("netns-9.lock").exists());
    }
}
