//! Whether the pod's namespace is still there, as far as an agent without a launcher can tell.
//!
//! Our own descriptors keep the namespace alive, so nothing inside it would tell. It counts as gone when its name or path
//! leads elsewhere and it has no other name. An agent is not allowed to look at other processes: where the operator named a
//! process and that has ended, others may still live in the namespace, so the agent goes on. It ends with the pod's device
//! (`applier`), or when a launcher says so: launchers look at the processes, too (`launcher::pod`).
//!
//! May touch: that path, read-only, and the list of mounts; the runtime files, to remove them. Source: proc(5).

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Once;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::fs::{major, minor};
use tracing::info;

use crate::control::Place;

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

    /// Whether the namespace is gone for certain.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        let identity = self.place.identity;
        if let Some(path) = &self.place.path {
            return leads_elsewhere(path, identity) && is_named(identity).is_ok_and(|named| !named);
        }
        if self.process.as_ref().is_some_and(has_ended) {
            static SAID: Once = Once::new();
            SAID.call_once(|| {
                info!("the process whose namespace this is has ended: others may live there, so it stays protected");
            });
        }
        false
    }

    /// Deletes the pod's runtime files.
    pub fn remove_files(&self) {
        remove_files(&self.place.runtime);
    }
}

/// Whether `path` is certainly not, or no longer, the file with this device and inode. One that cannot be looked at is not
/// known to be elsewhere.
#[must_use]
pub fn leads_elsewhere(path: &Path, identity: (u64, u64)) -> bool {
    match std::fs::metadata(path) {
        Ok(found) => (found.dev(), found.ino()) != identity,
        Err(error) => matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory),
    }
}

/// Whether the namespace with this device and inode has a name: is mounted somewhere that we can see.
///
/// # Errors
/// The list of mounts cannot be read.
pub fn is_named(identity: (u64, u64)) -> io::Result<bool> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    Ok(mounts.lines().any(|line| is_mount_of(line, identity)))
}

/// Third and fourth word of a line: device, and what of it is mounted.
fn is_mount_of(line: &str, (device, inode): (u64, u64)) -> bool {
    let mut words = line.split(' ').skip(2);
    words.next() == Some(&format!("{}:{}", major(device), minor(device)))
        && words.next() == Some(&format!("net:[{inode}]"))
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

    fn place(path: &Path) -> Place {
        let found = std::fs::metadata(path).unwrap();
        let identity = (found.dev(), found.ino());
        Place { path: Some(path.to_owned()), identity, runtime: path.with_extension("7") }
    }

    #[test]
    fn a_namespace_is_gone_when_its_path_leads_elsewhere_or_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("name");
        std::fs::write(&path, "").unwrap();
        let place = place(&path);
        let presence = Presence::new(place.clone(), None);
        assert!(!presence.is_gone());
        assert!(Presence::new(Place { identity: (place.identity.0, 1), ..place }, None).is_gone());
        std::fs::remove_file(&path).unwrap();
        assert!(presence.is_gone());
    }

    #[test]
    fn a_path_that_cannot_be_looked_at_is_not_gone() {
        let dir = tempfile::tempdir().unwrap();
        let [one, other] = ["one", "other"].map(|name| dir.path().join(name));
        for (link, to) in [(&one, &other), (&other, &one)] {
            std::os::unix::fs::symlink(to, link).unwrap();
        }
        // ELOOP: stat(2) fails, and says nothing about the namespace.
        assert!(std::fs::metadata(&one).is_err() && !leads_elsewhere(&one, (1, 1)));
        std::fs::write(dir.path().join("file"), "").unwrap();
        assert!(leads_elsewhere(&dir.path().join("file/inside"), (1, 1)));
        assert!(leads_elsewhere(&dir.path().join("nothing"), (1, 1)));
    }

    #[test]
    fn a_process_that_ended_is_not_the_end_of_its_namespace() {
        let mut child =
            std::process::Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
        let pid = rustix::process::Pid::from_raw(child.id().cast_signed()).unwrap();
        let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
        assert!(!has_ended(&pidfd));
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(has_ended(&pidfd));
        let place = Place { path: None, ..place(Path::new("/proc/self/ns/net")) };
        assert!(!Presence::new(place, Some(pidfd)).is_gone());
    }

    #[test]
    fn a_mount_of_a_namespace_is_told_from_others() {
        let line = "412 29 0:4 net:[4026532285] /run/netns/web rw shared:5 - nsfs nsfs rw";
        let device = rustix::fs::makedev(0, 4);
        assert!(is_mount_of(line, (device, 4_026_532_285)));
        assert!(!is_mount_of(line, (device, 402_653_228)));
        assert!(!is_mount_of(line, (rustix::fs::makedev(0, 5), 4_026_532_285)));
        assert!(!is_mount_of("", (device, 4_026_532_285)));
    }
}
