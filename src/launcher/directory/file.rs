//! The `file` source: a folder of ordinary manifests, watched.
//!
//! 1. [`Manifests::open`] watches the folder, then reads it; [`Manifests::objects`] is all it holds, of all projects
//! 2. [`Manifests::follow`] picks one workload's view; [`FileSource::whole`] is all of it
//! 3. [`FileSource::next`] waits for the folder to change and gives the changes since
//!
//! Everything that changes within one burst is told at once. A burst ends after 5 ms of silence, after 20 ms at the
//! latest; where files are deleted, 100 ms after the last one (see `folder.rs`). A source that became empty removes nothing: that is a mistake far more often than a project without pods.
//!
//! May touch: the folder, read-only (see `folder.rs`). Reading and parsing block the calling task.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep_until};
use tracing::{debug, warn};

pub use super::folder::SourceError;
use super::folder::{Folder, Problem, Scan};
use super::{Entries, Objects};
use crate::launcher::keys::ProjectKey;
use crate::proto::directory::{Change, Workload};
use crate::sys::async_fd;

/// A burst ends after this long without an event: `kubectl get > file` writes in pieces closer than that.
const QUIET: Duration = Duration::from_millis(5);
/// A burst that does not end is cut here, so that a change is seen well within 50 ms.
const BURST_MAX: Duration = Duration::from_millis(20);
/// For file systems that send no events, and links whose targets change in place.
const RESCAN: Duration = Duration::from_secs(5);
/// While the folder is away nothing sends events, so its return is looked for: one failing stat.
const RESCAN_AWAY: Duration = Duration::from_millis(20);

/// A folder that was read once and is watched.
pub struct Manifests {
    folder: Folder,
    objects: Objects,
}

impl Manifests {
    /// Watches the folder, then reads it.
    ///
    /// # Errors
    ///
    /// If `dir` is not a folder that can be read and watched, or a manifest in it is malformed: later, its last good
    /// content would stay; now there is none.
    pub fn open(dir: &Path) -> Result<Self, SourceError> {
        let (folder, scan) = Folder::open(dir, std::time::Instant::now())?;
        report(&scan);
        let objects = folder.objects();
        Ok(Self { folder, objects })
    }

    /// All objects of the folder when it was opened, of all projects.
    #[must_use]
    pub fn objects(&self) -> &Objects {
        &self.objects
    }

    /// The source for the workload with the addresses `own` in the project of `key`. Must be called inside a tokio runtime.
    ///
    /// # Errors
    ///
    /// If the runtime cannot watch the descriptor.
    pub fn follow(self, key: ProjectKey, own: Vec<IpAddr>) -> io::Result<FileSource> {
        let descriptor = self.folder.inotify().as_fd().try_clone_to_owned()?;
        let mut source = FileSource {
            readable: async_fd::readable(descriptor)?,
            folder: self.folder,
            key,
            own,
            entries: Entries::default(),
            empty: false,
            burst: None,
            // At once: a file may have been touched while it was read.
            scan_at: Instant::now(),
        };
        source.advance(&self.objects);
        Ok(source)
    }
}

/// One workload's view of a watched folder.
pub struct FileSource {
    /// A duplicate of the folder's inotify descriptor; never read from.
    readable: AsyncFd<OwnedFd>,
    folder: Folder,
    key: ProjectKey,
    own: Vec<IpAddr>,
    entries: Entries,
    /// The folder names nothing of the project: reported, and not followed.
    empty: bool,
    /// When the first event since the last scan came.
    burst: Option<Instant>,
    scan_at: Instant,
}

impl FileSource {
    /// Everything that is known, as changes from nothing.
    #[must_use]
    pub fn whole(&self) -> Vec<Change> {
        Entries::default().changes_to(&self.entries, |peer| self.workload(peer))
    }

    /// Another project key: it counts for what is told from now on.
    pub fn set_key(&mut self, key: ProjectKey) {
        self.key = key;
    }

    /// Waits until the directory changes; the changes are to be applied together, in their order.
    ///
    /// # Cancel safety
    ///
    /// A call that is dropped before it returns loses nothing.
    pub async fn next(&mut self) -> Vec<Change> {
        loop {
            tokio::select! {
                biased;
                () = sleep_until(self.scan_at) => {
                    let changes = self.scan();
                    if !changes.is_empty() {
                        return changes;
                    }
                }
                ready = self.readable.readable() => match ready {
                    Ok(mut guard) => {
                        guard.clear_ready();
                        if self.folder.drain(std::time::Instant::now()) {
                            self.wake();
                        }
                    }
                    // The runtime is shutting down: nobody waits for an answer any more.
                    Err(_) => std::future::pending().await,
                },
            }
        }
    }

    fn wake(&mut self) {
        let now = Instant::now();
        let burst = *self.burst.get_or_insert(now);
        self.scan_at = (now + QUIET).min(burst + BURST_MAX);
    }

    fn scan(&mut self) -> Vec<Change> {
        let scan = self.folder.scan(std::time::Instant::now());
        report(&scan);
        self.burst = None;
        let pause = if self.folder.is_away() { RESCAN_AWAY } else { RESCAN };
        self.scan_at = Instant::now() + pause;
        if let Some(again) = scan.again {
            self.scan_at = self.scan_at.min(Instant::from_std(again));
        }
        if scan.changed { self.advance(&self.folder.objects()) } else { Vec::new() }
    }

    fn advance(&mut self, objects: &Objects) -> Vec<Change> {
        let empty = !objects.names_project(self.key.project());
        if empty && self.entries != Entries::default() {
            if !self.empty {
                warn!("the directory names nothing of the project any more: what is known stays");
            }
            self.empty = true;
            return Vec::new();
        }
        self.empty = false;
        let next = Entries::of(objects, self.key.project(), &self.own);
        let changes = self.entries.changes_to(&next, |peer| self.workload(peer));
        self.entries = next;
        debug!(changes = changes.len(), "directory changed");
        changes
    }

    fn workload(&self, peer: IpAddr) -> Workload {
        let own = self.own.iter().find(|own| own.is_ipv4() == peer.is_ipv4());
        self.key.workload(*own.expect("entries are of our own families"), peer)
    }
}

fn report(scan: &Scan) {
    for problem in &scan.problems {
        match problem {
            Problem::Vanished { reason } => {
                warn!(%reason, "the directory is away: what is known stays");
            }
            Problem::Empty => warn!("the directory holds no manifest: what is known stays"),
            Problem::TooManyFiles => warn!("the directory holds too many files: the last ones are left out"),
            Problem::Unwatched { reason } => {
                warn!(%reason, "the directory cannot be watched: changes are seen late");
            }
            Problem::Malformed { file, reason, detail } => {
                warn!(file = %file.display(), %reason, "manifest not taken: its last good content stays");
                debug!(file = %file.display(), %detail, "manifest not taken");
            }
        }
    }
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
