//! Whether the pod's namespace is still there: the launcher's business, and the agent's while it has no launcher.
//!
//! Our own descriptors keep the namespace alive, so nothing inside it would tell. It counts as gone when its name or path
//! leads elsewhere, or when its process has ended. May touch: that path, read-only; the runtime files, to remove them.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::control::Place;

/// Endings of a pod's runtime files; the lock goes last.
const ENDINGS: [&str; 5] = ["next", "sock", "state", "status", "lock"];

/// Where the namespace was, and how to see that it is gone.
#[derive(Debug)]
pub struct Presence {
    place: Place,
    /// Readable once the process has ended.
    process: Option<OwnedFd>,
}

impl Presence {
    /// Of the namespace at `place`, or of `process`.
    #[must_use]
    pub fn new(place: Place, process: Option<OwnedFd>) -> Self {
        Self { place, process }
    }

    /// Whether the namespace is gone. A path that cannot be read for want of a privilege is not gone.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.process.as_ref().is_some_and(has_ended)
            || self.place.path.as_ref().is_some_and(|path| leads_elsewhere(path, self.place.identity))
    }

    /// Deletes the pod's runtime files.
    pub fn remove_files(&self) {
        remove_files(&self.place.runtime);
    }
}

/// Whether `path` is no longer the file with this device and inode.
#[must_use]
pub fn leads_elsewhere(path: &Path, identity: (u64, u64)) -> bool {
    match std::fs::metadata(path) {
        Ok(found) => (found.dev(), found.ino()) != identity,
        Err(error) => error.kind() != io::ErrorKind::PermissionDenied,
    }
}

/// Whether the process of a pidfd has ended.
#[must_use]
pub fn has_ended(process: impl AsFd) -> bool {
    let mut fds = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

/// Deletes the runtime files whose names begin with `stem`.
pub fn remove_files(stem: &Path) {
    for ending in ENDINGS {
        // A file that stays behind locks nobody out, and is swept later.
        let _ = std::fs::remove_file(stem.with_extension(ending));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_is_gone_when_its_path_leads_elsewhere_or_its_process_ended() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("name");
        std::fs::write(&path, "").unwrap();
        let found = std::fs::metadata(&path).unwrap();
        let runtime = dir.path().join("7");
        let place = Place { path: Some(path.clone()), identity: (found.dev(), found.ino()), runtime };
        let presence = Presence::new(place.clone(), None);
        assert!(!presence.is_gone());
        let other = Presence::new(Place { identity: (found.dev(), 1), ..place.clone() }, None);
        assert!(other.is_gone());
        std::fs::remove_file(&path).unwrap();
        assert!(presence.is_gone());

        let mut child =
            std::process::Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
        let pid = rustix::process::Pid::from_raw(child.id().cast_signed()).unwrap();
        let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
        let presence = Presence::new(Place { path: None, ..place }, Some(pidfd));
        assert!(!presence.is_gone());
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(presence.is_gone());
    }
}
