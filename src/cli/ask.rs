//! Which pods there are, and what their launchers say.
//!
//! 1. every `COOKIE.lock` under `/run/tencrypt` is a pod; files of a namespace that is gone count for nothing
//! 2. the launcher at `COOKIE.status` is asked; where none answers, the pod is shown as closed
//!
//! May touch: the runtime files, read-only, and the launchers' sockets.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::agent::presence::leads_elsewhere;
use crate::launcher::pod::files::{Owner, read_owner};
use crate::launcher::pod::holders::is_held;
use crate::launcher::pod::netns::Target;
use crate::status::{DOCUMENT_MAX, PodStatus};

/// A launcher answers within two seconds; one that replaces its agent in order may take longer.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// A pod that has a launcher or an agent, or had.
#[derive(Debug)]
pub(super) struct Pod {
    pub(super) owner: Owner,
    /// The runtime files, up to their endings.
    stem: PathBuf,
}

/// The pods with runtime files in `dir`, by name.
pub(super) fn pods(dir: &Path) -> io::Result<Vec<Pod>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        // Nothing was launched since the last boot.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut pods = Vec::new();
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.extension().is_none_or(|ending| ending != "lock") {
            continue;
        }
        let owner = match File::open(&path) {
            Ok(file) => read_owner(&file),
            // Removed in between.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        // A file that says nothing is being made; one of a namespace that is gone is swept by the next launcher.
        if let Some(owner) = owner.filter(is_there) {
            pods.push(Pod { owner, stem: path.with_extension("") });
        }
    }
    pods.sort_by(|a, b| a.owner.path.cmp(&b.owner.path));
    Ok(pods)
}

/// Whether the namespace is there, as far as this user can see.
fn is_there(owner: &Owner) -> bool {
    !leads_elsewhere(&owner.path, owner.identity) || is_held(owner.identity).unwrap_or(false)
}

impl Pod {
    /// As the operator would name it.
    fn name(&self) -> String {
        let path = self.owner.path.display().to_string();
        let pid = path.strip_prefix("/proc/").and_then(|rest| rest.strip_suffix("/ns/net"));
        match pid.filter(|pid| pid.parse::<u32>().is_ok()) {
            Some(pid) => format!("pid:{pid}"),
            None => path.parse::<Target>().map_or(path, |target| target.to_string()),
        }
    }
}

/// What is known of a pod: the document, and its text as it came.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: PodStatus,
    pub(super) text: String,
}

impl Answer {
    pub(super) fn of(pod: &Pod) -> Self {
        let reason = match ask(&pod.stem.with_extension("status")) {
            Ok(Some(text)) => match serde_json::from_str(&text) {
                Ok(status) => return Self { status, text: text.trim_end().to_owned() },
                Err(_) => "the launcher's answer is no status",
            },
            Ok(None) => "no launcher",
            Err(_) => "the launcher does not answer",
        };
        Self::from(PodStatus::closed(pod.name(), reason))
    }
}

impl From<PodStatus> for Answer {
    fn from(status: PodStatus) -> Self {
        let text = status.to_json();
        Self { status, text }
    }
}

/// Asks the launcher that listens at `path`; `None`: there is none.
fn ask(path: &Path) -> io::Result<Option<String>> {
    let stream = match UnixStream::connect(path) {
        Ok(stream) => stream,
        Err(error) if [io::ErrorKind::NotFound, io::ErrorKind::ConnectionRefused].contains(&error.kind()) => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    stream.set_read_timeout(Some(ANSWER_LIMIT))?;
    let mut text = String::new();
    match stream.take(DOCUMENT_MAX).read_to_string(&mut text) {
        // Closed before it said anything: it has just ended.
        Ok(0) => Ok(None),
        Ok(_) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::fs::MetadataExt as _;
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::launcher::serve::collect::tests::protected;
    use crate::status::State;

    #[test]
    fn pods_are_found_by_their_locks_and_those_that_are_gone_are_not() {
        let dir = tempfile::tempdir().unwrap();
        assert!(pods(&dir.path().join("none")).unwrap().is_empty());
        let found = fs::metadata("/proc/self/ns/net").unwrap();
        let lock = |cookie: &str, inode: u64, path: &str| {
            let text = format!("{} {inode} {path}\n", found.dev());
            fs::write(dir.path().join(cookie).with_extension("lock"), text).unwrap();
        };
        lock("01", found.ino(), "/proc/self/ns/net");
        lock("02", 1, "/proc/self/ns/net");
        fs::write(dir.path().join("03.lock"), "").unwrap();
        fs::write(dir.path().join("04.state"), "").unwrap();
        let pods = pods(dir.path()).unwrap();
        assert_eq!(pods.len(), 1, "{pods:?}");
        assert_eq!(pods[0].stem, dir.path().join("01"));
    }

    #[test]
    fn a_pod_is_named_as_its_operator_named_it() {
        for (path, name) in
            [("/run/netns/web", "web"), ("/proc/77/ns/net", "pid:77"), ("/some/where", "/some/where")]
        {
            let pod = Pod { owner: Owner { identity: (0, 0), path: path.into() }, stem: PathBuf::new() };
            assert_eq!(pod.name(), name);
        }
    }

    #[test]
    fn where_no_launcher_answers_the_pod_is_closed() {
        let dir = tempfile::tempdir().unwrap();
        let owner = Owner { identity: (0, 0), path: "/run/netns/web".into() };
        let pod = Pod { owner, stem: dir.path().join("01") };
        let reason = |pod: &Pod| {
            let status = Answer::of(pod).status;
            assert_eq!((status.state, status.name.as_str()), (State::Closed, "web"));
            status.reason.unwrap()
        };
        assert_eq!(reason(&pod), "no launcher");
        let listener = UnixListener::bind(dir.path().join("01.status")).unwrap();
        for (said, wanted) in [("", "no launcher"), ("nonsense", "the launcher's answer is no status")] {
            std::thread::scope(|scope| {
                scope.spawn(|| listener.accept().unwrap().0.write_all(said.as_bytes()).unwrap());
                assert_eq!(reason(&pod), wanted);
            });
        }
        let text = protected("web").to_json();
        std::thread::scope(|scope| {
            scope.spawn(|| listener.accept().unwrap().0.write_all(text.as_bytes()).unwrap());
            assert_eq!(Answer::of(&pod).status, protected("web"));
        });
        drop(listener);
        assert_eq!(reason(&pod), "no launcher");
    }
}
