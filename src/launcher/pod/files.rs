//! The runtime files of one pod, under `/run/tencrypt`: what lets launchers come and go while the pod stays protected.
//!
//! | file | what |
//! |---|---|
//! | `COOKIE.lock` | held by the one launcher of the pod; says which namespace it is |
//! | `COOKIE.sock` | the agent listens there for the next launcher |
//! | `COOKIE.state` | flows, live peers and counters; the agent writes it, its successor reads it |
//! | `COOKIE.status` | the launcher listens there for `tencrypt status` |
//!
//! 1. [`Runtime::take`] locks, or says that somebody else has the pod
//! 2. [`Runtime::listener`] and [`Runtime::publish`]: a new agent's listener takes the name only when it is to be found
//! 3. [`Runtime::remove`] after a clean stop; [`sweep`] removes what is left of namespaces that are gone
//!
//! The cookie is the kernel's number of the network namespace: unlike an inode it is not used again until the next boot.
//! May touch: `/run/tencrypt`. Source: flock(2), SO_NETNS_COOKIE in socket(7).

use std::fs::{DirBuilder, File, Permissions, TryLockError};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use super::agent;
use super::holders::is_gone;
use crate::agent::presence::remove_files;
use crate::control::{self, ChannelError, LauncherChannel};

/// Runtime files of the launcher.
pub const RUN_DIR: &str = "/run/tencrypt";
/// A path and two numbers.
const LOCK_MAX: u64 = 8_192;

/// Why the runtime files could not be had.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// Another launcher protects this namespace.
    #[error("the pod is already protected: another tencrypt holds {}", path.display())]
    Taken {
        /// The lock file.
        path: PathBuf,
    },
    /// The file system refused.
    #[error("cannot use {}", path.display())]
    Refused {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The agent's listener.
    #[error("cannot reach the agent")]
    Channel(#[from] ChannelError),
}

/// Which namespace a set of files belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Device and inode of the namespace.
    pub identity: (u64, u64),
    /// Where it is found.
    pub path: PathBuf,
}

impl Owner {
    fn to_text(&self) -> String {
        format!("{} {} {}\n", self.identity.0, self.identity.1, self.path.display())
    }

    fn parse(text: &str) -> Option<Self> {
        let mut words = text.trim_end_matches('\n').splitn(3, ' ');
        let identity = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        Some(Self { identity, path: words.next()?.into() })
    }
}

/// The files of one pod; its lock is held.
#[derive(Debug)]
pub struct Runtime {
    /// Keeps the lock.
    _lock: File,
    /// The folder, and the cookie in hexadecimal.
    stem: PathBuf,
}

impl Runtime {
    /// Takes the pod with this cookie, in the folder `dir`, which is made if it is not there.
    ///
    /// # Errors
    /// [`RuntimeError::Taken`]; [`RuntimeError::Refused`].
    pub fn take(dir: &Path, cookie: u64, owner: &Owner) -> Result<Self, RuntimeError> {
        let stem = dir.join(format!("{cookie:016x}"));
        let path = stem.with_extension("lock");
        let refused = |source| RuntimeError::Refused { path: path.clone(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(refused)?;
        let Some(mut lock) = lock(&path).map_err(refused)? else { return Err(RuntimeError::Taken { path }) };
        let written = lock.set_len(0).and_then(|()| lock.write_all(owner.to_text().as_bytes()));
        written.map_err(refused)?;
        Ok(Self { _lock: lock, stem })
    }

    /// What the files are called, up to their endings.
    #[must_use]
    pub fn stem(&self) -> &Path {
        &self.stem
    }

    /// Connects to the agent that an earlier launcher left, if one lives.
    ///
    /// # Errors
    /// [`RuntimeError::Channel`].
    pub fn connect(&self) -> Result<Option<LauncherChannel>, RuntimeError> {
        Ok(control::connect(&self.file("sock"))?)
    }

    /// A listener for a new agent and our connection to it. Later launchers find it after [`Self::publish`].
    ///
    /// # Errors
    /// [`RuntimeError::Refused`], [`RuntimeError::Channel`].
    pub fn listener(&self) -> Result<(OwnedFd, LauncherChannel), RuntimeError> {
        let path = self.file("next");
        remove(&path).map_err(|source| RuntimeError::Refused { path: path.clone(), source })?;
        let listener = control::listen(&path)?;
        let channel = control::connect(&path)?.ok_or(ChannelError::Closed)?;
        Ok((listener, channel))
    }

    /// From now on the newest listener is the one that is found.
    ///
    /// # Errors
    /// [`RuntimeError::Refused`].
    pub fn publish(&self) -> Result<(), RuntimeError> {
        let path = self.file("next");
        std::fs::rename(&path, self.file("sock")).map_err(|source| RuntimeError::Refused { path, source })
    }

    /// The state file, made if it is not there.
    ///
    /// # Errors
    /// [`RuntimeError::Refused`].
    pub fn state(&self) -> Result<File, RuntimeError> {
        let path = self.file("state");
        open(&path).map_err(|source| RuntimeError::Refused { path, source })
    }

    /// A non-blocking listener for those who ask how the pod is; the one of an earlier launcher loses its name.
    ///
    /// # Errors
    /// [`RuntimeError::Refused`].
    pub fn status_listener(&self) -> Result<UnixListener, RuntimeError> {
        let path = self.file("status");
        let listen = || {
            remove(&path)?;
            let listener = UnixListener::bind(&path)?;
            std::fs::set_permissions(&path, Permissions::from_mode(0o600))?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        };
        listen().map_err(|source| RuntimeError::Refused { path: path.clone(), source })
    }

    /// Deletes the files; the lock lasts as long as this object. To be called once the agent has ended.
    pub fn remove(&self) {
        remove_files(&self.stem);
    }

    fn file(&self, ending: &str) -> PathBuf {
        self.stem.with_extension(ending)
    }
}

/// Removes the files of namespaces that are gone, which no launcher holds, and ends agents that are left there. Must be
/// called inside a tokio runtime.
pub fn sweep(dir: &Path) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.extension().is_none_or(|ending| ending != "lock") {
            continue;
        }
        // Judged before it is locked: the lock of a pod that is there is never in the way of its launcher.
        let owner = open(&path).ok().and_then(|lock| read_owner(&lock));
        let Some(owner) = owner.filter(|owner| is_gone(&owner.path, owner.identity)) else { continue };
        let Ok(Some(_held)) = lock(&path) else { continue };
        let is_left = match control::connect(&path.with_extension("sock")) {
            Ok(None) => true,
            // It cannot see for itself that nobody is left but it.
            Ok(Some(channel)) => agent::end_orphan(&channel, owner.identity),
            Err(_) => false,
        };
        if is_left {
            remove_files(&path.with_extension(""));
        }
    }
}

/// Which namespace a lock file says it is of; `None`: it says none, or not yet.
#[must_use]
pub fn read_owner(lock: &File) -> Option<Owner> {
    let mut text = String::new();
    lock.take(LOCK_MAX).read_to_string(&mut text).ok()?;
    Owner::parse(&text)
}

fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Opens the file at `path`, which is made if it is not there.
fn open(path: &Path) -> io::Result<File> {
    File::options()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
}

/// Opens and locks the file at `path`; `None`: somebody else has it.
fn lock(path: &Path) -> io::Result<Option<File>> {
    loop {
        let file = open(path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(error)) => return Err(error),
        }
        // The holder before us may have deleted the file between our two calls: then nobody else would find it.
        if file.metadata()?.nlink() > 0 {
            return Ok(Some(file));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(path: &Path) -> Owner {
        let found = std::fs::metadata(path).unwrap();
        Owner { identity: (found.dev(), found.ino()), path: path.to_owned() }
    }

    #[test]
    fn a_second_launcher_is_refused_until_the_first_has_ended_however_it_ends() {
        let dir = tempfile::tempdir().unwrap();
        let owner = owner(Path::new("/proc/self/ns/net"));
        let first = Runtime::take(dir.path(), 7, &owner).unwrap();
        assert!(matches!(Runtime::take(dir.path(), 7, &owner), Err(RuntimeError::Taken { .. })));
        let other = Runtime::take(dir.path(), 8, &owner).unwrap();
        drop((first, other));
        Runtime::take(dir.path(), 7, &owner).unwrap().remove();
        assert!(Runtime::take(dir.path(), 7, &owner).is_ok());
        assert!(!dir.path().join("0000000000000009.lock").exists());
    }

    #[test]
    fn a_living_agent_is_found_under_the_published_name_only() {
        let dir = tempfile::tempdir().unwrap();
        let runtime = Runtime::take(dir.path(), 7, &owner(Path::new("/"))).unwrap();
        assert!(runtime.connect().unwrap().is_none());
        let (listener, _channel) = runtime.listener().unwrap();
        assert!(runtime.connect().unwrap().is_none());
        runtime.publish().unwrap();
        assert!(runtime.connect().unwrap().is_some());
        drop(listener);
        assert!(runtime.connect().unwrap().is_none(), "a name that nobody listens at");
    }

    #[test]
    fn the_listener_for_questions_is_roots_alone_and_replaces_an_earlier_one() {
        let dir = tempfile::tempdir().unwrap();
        let runtime = Runtime::take(dir.path(), 7, &owner(Path::new("/"))).unwrap();
        let path = runtime.stem().with_extension("status");
        drop(runtime.status_listener().unwrap());
        let _second = runtime.status_listener().unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        std::os::unix::net::UnixStream::connect(&path).unwrap();
        runtime.remove();
        assert!(!path.exists());
    }

    #[test]
    fn files_of_a_namespace_that_is_gone_are_swept_and_others_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let names = tempfile::tempdir().unwrap();
        let gone = names.path().join("gone");
        std::fs::write(&gone, "").unwrap();
        drop(Runtime::take(dir.path(), 1, &owner(&gone)).unwrap().state().unwrap());
        drop(Runtime::take(dir.path(), 2, &owner(names.path())).unwrap());
        let held = Runtime::take(dir.path(), 3, &owner(&gone)).unwrap();
        let identity = owner(&gone).identity;
        std::fs::remove_file(&gone).unwrap();
        // Without privilege the processes of others cannot be looked at, and nothing is swept.
        let stays = !is_gone(&gone, identity);
        sweep(dir.path());
        let left =
            |cookie: u64, ending| dir.path().join(format!("{cookie:016x}")).with_extension(ending).exists();
        assert_eq!((left(1, "lock"), left(1, "state")), (stays, stays));
        assert!(left(2, "lock") && left(3, "lock"));
        drop(held);
        sweep(dir.path());
        assert_eq!(left(3, "lock"), stays);
        assert!(!stays || !nix::unistd::geteuid().is_root());
    }
}
