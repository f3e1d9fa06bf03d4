//! The `file` source: folders of ordinary manifests, watched.
//!
//! 1. [`Manifests::open`] watches the folders, then reads them; [`Manifests::objects`] is all they hold, of all projects
//! 2. [`Manifests::follow`] picks one workload's view; [`FileSource::whole`] is all of it, [`FileSource::outside`] what the
//!    objects say about everybody else
//! 3. [`FileSource::next`] waits for a folder to change and gives the changes since
//!
//! Everything that changes within one burst is told at once. A burst ends after 5 ms of silence, after 20 ms at the
//! latest; where files are deleted, 100 ms after the last one (see `folder.rs`). A source that became empty removes nothing: that is a mistake far more often than a project without pods.
//!
//! Of an object that two folders have, the later folder's counts.
//!
//! May touch: the folders, read-only (see `folder.rs`). Reading and parsing block the calling task.

use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep_until};
use tracing::{debug, warn};

pub use super::folder::SourceError;
use super::folder::{Folder, Problem, Scan};
use super::{Entries, Objects, Outside};
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

/// Folders that were read once and are watched.
pub struct Manifests {
    folders: Vec<Folder>,
    objects: Objects,
}

impl Manifests {
    /// Watches each folder, then reads it.
    ///
    /// # Errors
    ///
    /// If one of `dirs` is not a folder that can be read and watched, or a manifest in it is malformed: later, its last good
    /// content would stay; now there is none.
    pub fn open(dirs: &[PathBuf]) -> Result<Self, SourceError> {
        let mut folders = Vec::with_capacity(dirs.len());
        for dir in dirs {
            let (folder, scan) = Folder::open(dir, std::time::Instant::now())?;
            report(&scan);
            folders.push(folder);
        }
        let objects = objects(&folders);
        Ok(Self { folders, objects })
    }

    /// All objects of the folders when they were opened, of all projects.
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
        // One descriptor that is readable when any folder's is.
        let any = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        for folder in &self.folders {
            any.add(folder.inotify(), EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
        }
        let mut source = FileSource {
            readable: async_fd::readable(any.0)?,
            folders: self.folders,
            key,
            own,
            entries: Entries::default(),
            outside: Outside::default(),
            empty: false,
            burst: None,
            // At once: a file may have been touched while it was read.
            scan_at: Instant::now(),
        };
        source.advance(&self.objects);
        Ok(source)
    }
}

/// What has changed.
#[derive(Debug, Default)]
pub struct News {
    /// Of the project: to be applied together, in their order.
    pub changes: Vec<Change>,
    /// [`FileSource::outside`] is not what it was.
    pub outside: bool,
}

impl News {
    fn is_empty(&self) -> bool {
        self.changes.is_empty() && !self.outside
    }
}

/// One workload's view of watched folders.
pub struct FileSource {
    /// Readable while one of the folders' inotify descriptors is.
    readable: AsyncFd<OwnedFd>,
    folders: Vec<Folder>,
    key: ProjectKey,
    own: Vec<IpAddr>,
    entries: Entries,
    outside: Outside,
    /// The folders name nothing of the project: reported, and not followed.
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

    /// What the objects say about addresses that are not the project's.
    #[must_use]
    pub fn outside(&self) -> &Outside {
        &self.outside
    }

    /// Another project key: it counts for what is told from now on.
    pub fn set_key(&mut self, key: ProjectKey) {
        self.key = key;
    }

    /// Waits until the directory changes.
    ///
    /// # Cancel safety
    ///
    /// A call that is dropped before it returns loses nothing.
    pub async fn next(&mut self) -> News {
        loop {
            tokio::select! {
                biased;
                () = sleep_until(self.scan_at) => {
                    let news = self.scan();
                    if !news.is_empty() {
                        return news;
                    }
                }
                ready = self.readable.readable() => match ready {
                    Ok(mut guard) => {
                        guard.clear_ready();
                        let now = std::time::Instant::now();
                        let touched = self.folders.iter_mut().filter_map(|f| f.drain(now).then_some(())).count();
                        if touched > 0 {
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

    fn scan(&mut self) -> News {
        self.burst = None;
        let now = std::time::Instant::now();
        let (mut changed, mut pause, mut again) = (false, RESCAN, None);
        for folder in &mut self.folders {
            let scan = folder.scan(now);
            report(&scan);
            changed |= scan.changed;
            again = again.into_iter().chain(scan.again).min();
            if folder.is_away() {
                pause = RESCAN_AWAY;
            }
        }
        self.scan_at = Instant::now() + pause;
        if let Some(again) = again {
            self.scan_at = self.scan_at.min(Instant::from_std(again));
        }
        if changed { self.advance(&objects(&self.folders)) } else { News::default() }
    }

    fn advance(&mut self, objects: &Objects) -> News {
        let empty = !objects.names_project(self.key.project());
        if empty && self.entries != Entries::default() {
            if !self.empty {
                warn!("the directory names nothing of the project any more: what is known stays");
            }
            self.empty = true;
            return News::default();
        }
        self.empty = false;
        let next = Entries::of(objects, self.key.project(), &self.own);
        let changes = self.entries.changes_to(&next, |peer| self.workload(peer));
        let outside = Outside::of(objects, self.key.project(), &self.own, &next);
        let outside = std::mem::replace(&mut self.outside, outside) != self.outside;
        self.entries = next;
        debug!(changes = changes.len(), outside, "directory changed");
        News { changes, outside }
    }

    fn workload(&self, peer: IpAddr) -> Workload {
        let own = self.own.iter().find(|own| own.is_ipv4() == peer.is_ipv4());
        self.key.workload(*own.expect("entries are of our own families"), peer)
    }
}

fn objects(folders: &[Folder]) -> Objects {
    let mut all = Objects::default();
    folders.iter().for_each(|folder| all.extend(folder.objects()));
    all
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
