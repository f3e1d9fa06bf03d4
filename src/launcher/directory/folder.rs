//! A folder of manifests: which files count, what each of them said when it was last good, what changed since.
//!
//! 1. inotify events only say *when* to look, and which files are being written at this moment
//! 2. [`Folder::scan`] sets the watch again if the path leads to another folder by now
//! 3. it lists the folder, reads the files that are new or changed, and parses them
//! 4. files touched while they were read are left for the next scan, so half a manifest is never taken
//! 5. what is good replaces what the file said before; what is malformed is reported, and the old content stays
//!
//! Files count if they are named `*.yaml`, `*.yml` or `*.json`, do not start with a dot, and are regular files, also
//! behind a symbolic link (a ConfigMap mount is made of them). Later names win over earlier ones. A folder that
//! vanished or was emptied removes nothing; while files are being deleted nobody knows yet whether any will be left, so
//! nothing is taken until that is over. After its return, files that are still missing count until none came for a second.
//!
//! Blocking. May touch: the folder, read-only. Source: inotify(7).

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};

use super::Objects;
use super::manifest::{self, MANIFEST_MAX, Syntax};
use crate::exit::{Exit, ExitCode};

/// Files beyond this many are reported and left out: one file per object of a very large project.
const FILES_MAX: usize = 10_000;
/// A file whose writer neither writes nor closes it for this long is read as it is: `truncate(2)` tells of no close.
const WRITER_MAX: Duration = Duration::from_secs(5);
/// Files that were touched while they were read are read again after this time.
const RETRY: Duration = Duration::from_millis(5);
/// Deletions are over when none came for this long: `rm` is faster, also on a busy machine.
const DELETING: Duration = Duration::from_millis(100);
/// What is deleted for longer than this is deleted file by file.
const DELETING_MAX: Duration = Duration::from_secs(5);
/// How long after its last new file a folder that came back counts as filled again.
const REFILL: Duration = Duration::from_secs(1);

/// Why a folder cannot be a source.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// It does not exist, is no folder, or cannot be read.
    #[error("cannot read the directory {}: it must be a folder of manifests", dir.display())]
    Open {
        /// The path given.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file that cannot be taken, when nothing is known yet that could stand in for it: what it names would go in clear.
    #[error("cannot start from {}: {reason}", path.display())]
    Incomplete {
        /// The file, or the folder.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// inotify refused.
    #[error("cannot watch the directory {}: see the limits in /proc/sys/fs/inotify", dir.display())]
    Watch {
        /// The path given.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl ExitCode for SourceError {
    fn exit(&self) -> Exit {
        match self {
            Self::Open { source, .. } if source.kind() != io::ErrorKind::PermissionDenied => Exit::Usage,
            Self::Incomplete { .. } => Exit::Usage,
            Self::Open { .. } | Self::Watch { .. } => Exit::Kernel,
        }
    }
}

/// Something about the folder that somebody should know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Problem {
    /// The folder is not there; what is known stays.
    Vanished { reason: String },
    /// The folder holds no manifest; what is known stays.
    Empty,
    /// More than [`FILES_MAX`] files.
    TooManyFiles,
    /// The folder cannot be watched: changes are seen at the next periodic scan.
    Unwatched { reason: String },
    /// A file is malformed or unreadable; its last good content stays. The detail has the file's own names and values.
    Malformed { file: PathBuf, reason: String, detail: String },
}

/// What one scan found.
#[derive(Debug, Default)]
pub(super) struct Scan {
    /// The objects are not what they were.
    pub(super) changed: bool,
    /// Problems that were not reported before.
    pub(super) problems: Vec<Problem>,
    /// Look again at this time, even if nothing happens.
    pub(super) again: Option<Instant>,
}

pub(super) struct Folder {
    dir: PathBuf,
    inotify: Inotify,
    /// The watch, and (device, inode) of the folder that it is on.
    watch: Option<(WatchDescriptor, (u64, u64))>,
    events: Events,
    files: BTreeMap<OsString, Manifest>,
    /// The last problem of the folder itself, so that it is reported once.
    problem: Option<Problem>,
    /// Until when files missing from a folder that came back still count.
    refill_until: Option<Instant>,
}

/// One file, as far as it was understood.
#[derive(Default)]
struct Manifest {
    /// Of the content last looked at.
    fingerprint: Option<Fingerprint>,
    /// Of the last good content.
    objects: Objects,
    /// Hash of the problem and the content reported last.
    reported: Option<u64>,
}

/// Changes whenever the content does, but for writes within one tick of the file system's clock, of which inotify tells.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Fingerprint([i64; 4], [u64; 3]);

impl Fingerprint {
    fn of(m: &Metadata) -> Self {
        Self([m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec()], [m.dev(), m.ino(), m.size()])
    }
}

/// What inotify told since the last scan.
#[derive(Default)]
struct Events {
    /// Written and not closed yet, with the time of the last write.
    writing: BTreeMap<OsString, Instant>,
    /// To be read again whatever its fingerprint.
    touched: BTreeSet<OsString>,
    /// When the first and the last of the manifests deleted since then were.
    deleted: Option<(Instant, Instant)>,
    /// Events were lost: everything is to be read again.
    lost: bool,
    /// The watch is dead.
    unwatched: bool,
}

impl Events {
    fn add(&mut self, event: InotifyEvent, now: Instant) {
        type F = AddWatchFlags;
        if event.mask.intersects(F::IN_Q_OVERFLOW) {
            self.lost = true;
            self.writing.clear();
        }
        if event.mask.intersects(F::IN_IGNORED | F::IN_DELETE_SELF | F::IN_MOVE_SELF | F::IN_UNMOUNT) {
            self.unwatched = true;
        }
        let Some(name) = event.name else { return };
        if event.mask.intersects(F::IN_DELETE | F::IN_MOVED_FROM) && syntax(&name).is_some() {
            let (first, _) = self.deleted.unwrap_or((now, now));
            self.deleted = Some((first, now));
        }
        if event.mask.intersects(F::IN_MODIFY) {
            self.writing.insert(name.clone(), now);
        } else {
            self.writing.remove(&name);
        }
        self.touched.insert(name);
    }

    /// Until when deletions may go on, if they do.
    fn deleting_until(&mut self, now: Instant) -> Option<Instant> {
        let until = |(first, last): (Instant, Instant)| (last + DELETING).min(first + DELETING_MAX);
        self.deleted = self.deleted.filter(|deleted| now < until(*deleted));
        self.deleted.map(until)
    }
}

impl Folder {
    /// Watches `dir`, then reads it for the first time.
    pub(super) fn open(dir: &Path, now: Instant) -> Result<(Self, Scan), SourceError> {
        let refused = |source| SourceError::Open { dir: dir.to_owned(), source };
        if !std::fs::metadata(dir).map_err(refused)?.is_dir() {
            return Err(refused(io::Error::from(io::ErrorKind::NotADirectory)));
        }
        let watch_refused = |errno: Errno| SourceError::Watch { dir: dir.to_owned(), source: errno.into() };
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).map_err(watch_refused)?;
        let mut folder = Self {
            dir: dir.to_owned(),
            inotify,
            watch: None,
            events: Events::default(),
            files: BTreeMap::new(),
            problem: None,
            refill_until: None,
        };
        let scan = folder.scan(now);
        // What a running source only reports stops one that is about to start.
        let incomplete = |path: &Path, reason: &str| SourceError::Incomplete {
            path: path.to_owned(),
            reason: reason.to_owned(),
        };
        match scan.problems.first() {
            None | Some(Problem::Empty) => Ok((folder, scan)),
            Some(Problem::Unwatched { reason }) => {
                Err(SourceError::Watch { dir: dir.to_owned(), source: io::Error::other(reason.clone()) })
            }
            Some(Problem::Vanished { reason }) => Err(refused(io::Error::other(reason.clone()))),
            Some(Problem::TooManyFiles) => {
                Err(incomplete(dir, &format!("more than {FILES_MAX} manifests in one folder")))
            }
            Some(Problem::Malformed { file, reason, .. }) => Err(incomplete(file, reason)),
        }
    }

    pub(super) fn inotify(&self) -> &Inotify {
        &self.inotify
    }

    /// Whether the folder was away when it was last looked at.
    pub(super) fn is_away(&self) -> bool {
        matches!(self.problem, Some(Problem::Vanished { .. }))
    }

    /// Every object of every file.
    pub(super) fn objects(&self) -> Objects {
        let mut all = Objects::default();
        for manifest in self.files.values() {
            all.extend(manifest.objects.clone());
        }
        all
    }

    /// Takes the events that have come; whether there were any.
    pub(super) fn drain(&mut self, now: Instant) -> bool {
        let mut any = false;
        loop {
            match self.inotify.read_events() {
                Ok(events) => {
                    any |= !events.is_empty();
                    let current = self.watch.map(|(watch, _)| watch);
                    for event in events {
                        let overflow = event.mask.intersects(AddWatchFlags::IN_Q_OVERFLOW);
                        if overflow || Some(event.wd) == current {
                            self.events.add(event, now);
                        }
                    }
                }
                Err(Errno::EINTR) => {}
                // EAGAIN: no more. Nothing else can be expected of a good descriptor, and the periodic scan goes on.
                Err(_) => return any,
            }
        }
    }

    /// Brings the objects up to date.
    pub(super) fn scan(&mut self, now: Instant) -> Scan {
        let mut scan = Scan::default();
        self.drain(now);
        self.events.writing.retain(|_, last| now < *last + WRITER_MAX);
        let folder_problem = self.rewatch().err();
        let names = match self.list() {
            Ok(names) => names,
            Err(error) => {
                self.report_folder(Some(Problem::Vanished { reason: error.to_string() }), &mut scan);
                return scan;
            }
        };
        if names.is_empty() {
            self.report_folder(Some(Problem::Empty), &mut scan);
            return scan;
        }
        if matches!(self.problem, Some(Problem::Vanished { .. } | Problem::Empty)) {
            self.refill_until = Some(now + REFILL);
        }
        if let Some(until) = self.events.deleting_until(now) {
            scan.again = Some(until);
            return scan;
        }
        let too_many = (names.len() > FILES_MAX).then_some(Problem::TooManyFiles);
        self.report_folder(folder_problem.or(too_many), &mut scan);

        let names: BTreeSet<OsString> = names.into_iter().take(FILES_MAX).collect();
        let readings = self.read_changed(&names);
        self.drain(now);
        if self.refill_until.is_some() && !readings.is_empty() {
            self.refill_until = Some(now + REFILL);
        }
        for (name, reading) in readings {
            if !self.events.touched.contains(&name) {
                self.take(name, reading, &mut scan);
            }
        }
        self.remove_missing(&names, now, &mut scan);
        if !self.events.touched.is_empty() {
            scan.again = Some(now + RETRY);
        }
        scan
    }

    /// Puts the watch on the folder that the path leads to now. The watch comes before the reading.
    fn rewatch(&mut self) -> Result<(), Problem> {
        type F = AddWatchFlags;
        let identity = std::fs::metadata(&self.dir).map(|m| (m.dev(), m.ino())).ok();
        match self.watch {
            Some((_, watched)) if Some(watched) == identity && !self.events.unwatched => return Ok(()),
            Some((watch, _)) => {
                // Fails if the kernel removed it together with the folder.
                let _ = self.inotify.rm_watch(watch);
                self.watch = None;
            }
            None => {}
        }
        self.events = Events { lost: true, ..Events::default() };
        let Some(identity) = identity else { return Ok(()) };
        let mask = F::IN_ONLYDIR
            | F::IN_CREATE
            | F::IN_MODIFY
            | F::IN_CLOSE_WRITE
            | F::IN_MOVE
            | F::IN_DELETE
            | F::IN_DELETE_SELF
            | F::IN_MOVE_SELF;
        match self.inotify.add_watch(&self.dir, mask) {
            Ok(watch) => {
                self.watch = Some((watch, identity));
                Ok(())
            }
            // Gone again: the listing says so.
            Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(()),
            Err(errno) => Err(Problem::Unwatched { reason: errno.desc().to_owned() }),
        }
    }

    /// The names that count, sorted.
    fn list(&self) -> io::Result<BTreeSet<OsString>> {
        let mut names = BTreeSet::new();
        for entry in std::fs::read_dir(&self.dir)? {
            let name = entry?.file_name();
            // Follows links. What cannot be looked at is read, and reported, if it was a manifest before.
            if syntax(&name).is_some()
                && std::fs::metadata(self.dir.join(&name))
                    .map_or(self.files.contains_key(&name), |m| m.is_file())
            {
                names.insert(name);
            }
        }
        Ok(names)
    }

    /// Reads the files that may have changed. A file that somebody is writing is left alone until it is closed.
    fn read_changed(&mut self, names: &BTreeSet<OsString>) -> Vec<(OsString, Reading)> {
        let touched = std::mem::take(&mut self.events.touched);
        let lost = std::mem::take(&mut self.events.lost);
        let mut readings = Vec::new();
        for name in names.iter().filter(|name| !self.events.writing.contains_key(*name)) {
            let known = self.files.get(name).and_then(|manifest| manifest.fingerprint);
            let known = known.filter(|_| !lost && !touched.contains(name));
            if let Some(reading) = Reading::of(&self.dir.join(name), known) {
                readings.push((name.clone(), reading));
            }
        }
        readings
    }

    fn take(&mut self, name: OsString, reading: Reading, scan: &mut Scan) {
        let file = self.dir.join(&name);
        let syntax = syntax(&name).expect("only manifests are listed");
        let manifest = self.files.entry(name).or_default();
        manifest.fingerprint = reading.fingerprint;
        let parsed =
            reading.content.as_ref().map_err(|reason| (reason.clone(), String::new())).and_then(|content| {
                manifest::parse(content, syntax).map_err(|error| (error.to_string(), format!("{error:?}")))
            });
        match parsed {
            Ok(objects) => {
                scan.changed |= manifest.objects != objects;
                manifest.objects = objects;
                manifest.reported = None;
            }
            Err((reason, detail)) => {
                let mut hasher = DefaultHasher::new();
                (&reason, &reading.content).hash(&mut hasher);
                let problem = Some(hasher.finish());
                if manifest.reported != problem {
                    manifest.reported = problem;
                    scan.problems.push(Problem::Malformed { file, reason, detail });
                }
            }
        }
    }

    fn remove_missing(&mut self, names: &BTreeSet<OsString>, now: Instant, scan: &mut Scan) {
        self.refill_until = self.refill_until.filter(|until| now < *until);
        // Deletions that began after the listing are looked at when they are over.
        scan.again = self.refill_until.or(self.events.deleting_until(now));
        if scan.again.is_none() {
            self.files.retain(|name, manifest| {
                let stays = names.contains(name);
                scan.changed |= !stays && manifest.objects != Objects::default();
                stays
            });
        }
    }

    fn report_folder(&mut self, problem: Option<Problem>, scan: &mut Scan) {
        if self.problem != problem {
            self.problem.clone_from(&problem);
            scan.problems.extend(problem);
        }
    }
}

/// What was read of one file.
struct Reading {
    fingerprint: Option<Fingerprint>,
    content: Result<Vec<u8>, String>,
}

impl Reading {
    /// `None` if the file still has the `known` fingerprint, or is gone.
    fn of(path: &Path, known: Option<Fingerprint>) -> Option<Self> {
        let mut fingerprint = None;
        match Self::read(path, known, &mut fingerprint) {
            Ok(content) => content.map(|content| Self { fingerprint, content: Ok(content) }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => Some(Self { fingerprint, content: Err(error.to_string()) }),
        }
    }

    fn read(
        path: &Path,
        known: Option<Fingerprint>,
        fingerprint: &mut Option<Fingerprint>,
    ) -> io::Result<Option<Vec<u8>>> {
        // O_NONBLOCK: somebody may put a FIFO in the file's place after it was listed.
        let file = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC | libc::O_NOCTTY)
            .open(path)?;
        let metadata = file.metadata()?;
        *fingerprint = Some(Fingerprint::of(&metadata));
        if known == *fingerprint {
            return Ok(None);
        }
        if !metadata.is_file() {
            return Err(io::Error::other("not a regular file"));
        }
        let mut content = Vec::new();
        file.take(MANIFEST_MAX + 1).read_to_end(&mut content)?;
        if u64::try_from(content.len()).is_ok_and(|len| len > MANIFEST_MAX) {
            return Err(io::Error::other(format!("longer than {} MiB", MANIFEST_MAX >> 20)));
        }
        Ok(Some(content))
    }
}

/// The syntax that a file's name promises; `None` if it is no manifest.
fn syntax(name: &OsStr) -> Option<Syntax> {
    if name.as_encoded_bytes().starts_with(b".") {
        return None;
    }
    match Path::new(name).extension()?.to_str()? {
        "yaml" | "yml" => Some(Syntax::Yaml),
        "json" => Some(Syntax::Json),
        _ => None,
    }
}
