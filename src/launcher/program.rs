//! The program that agents are started from: the file that bears the launcher's own name *now*.
//!
//! 1. [`remember`] notes at the start of the launcher the path that it was started by
//! 2. [`Program::open`] opens the file at that path again for every agent: after an upgrade it is another file than the one
//!    that the launcher runs
//! 3. a path that leads to no program (removed, or not executable) is warned of, and the agent runs the launcher's own file
//!
//! The file that was looked at is the file that is started, whatever becomes of the path in between. May touch: that path
//! and `/proc/self/exe`, read-only. Source: proc(5), execve(2).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rustix::fs::{Access, Mode, OFlags, access, open};
use tracing::warn;

use crate::agent::executable_of;
use crate::control::Executable;

/// The file that this process runs, also after another one took its name.
const OWN: &str = "/proc/self/exe";
/// What the kernel appends to the path of a file that has lost its name.
const DELETED: &[u8] = b" (deleted)";

static PATH: OnceLock<Option<PathBuf>> = OnceLock::new();

/// Notes the path that this process was started by. To be called at its start.
pub(super) fn remember() {
    let _ = path();
}

/// None: /proc does not tell.
fn path() -> Option<&'static Path> {
    PATH.get_or_init(|| std::env::current_exe().ok().map(without_mark)).as_deref()
}

/// A file that lost its name before we looked: another one may bear the name by now.
fn without_mark(path: PathBuf) -> PathBuf {
    if path.exists() {
        return path;
    }
    match path.as_os_str().as_bytes().strip_suffix(DELETED) {
        Some(name) => PathBuf::from(std::ffi::OsString::from_vec(name.to_vec())),
        None => path,
    }
}

/// A program that can be started.
#[derive(Debug)]
pub(super) struct Program {
    /// None: our own file.
    file: Option<File>,
}

impl Program {
    /// Opens the program that an agent is to run now.
    pub(super) fn open() -> Self {
        let Some(path) = path() else { return Self::own() };
        match open_at(path) {
            Ok(file) => Self { file: Some(file) },
            Err(error) => {
                warn!(
                    program = %path.display(),
                    %error,
                    "the launcher's path leads to no program: agents run the file that the launcher runs"
                );
                Self::own()
            }
        }
    }

    /// The file that the launcher runs.
    pub(super) const fn own() -> Self {
        Self { file: None }
    }

    /// Whether it is the file that the launcher runs because its path leads to none.
    pub(super) const fn is_own(&self) -> bool {
        self.file.is_none()
    }

    /// The path to start it by, valid in a child process, too, while this object lives.
    pub(super) fn path(&self) -> PathBuf {
        self.file
            .as_ref()
            .map_or_else(|| OWN.into(), |file| format!("/proc/self/fd/{}", file.as_raw_fd()).into())
    }

    /// Which file it is: what an agent that runs it says of itself.
    ///
    /// # Errors
    /// /proc is not there.
    pub(super) fn executable(&self) -> anyhow::Result<Executable> {
        executable_of(&self.path())
    }
}

fn open_at(path: &Path) -> io::Result<File> {
    let file = File::from(open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?);
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    access(format!("/proc/self/fd/{}", file.as_raw_fd()), Access::EXEC_OK)?;
    Ok(file)
}

/// Whether this process may start the file that it runs.
///
/// # Errors
/// With the capabilities that are left it may not.
pub(super) fn check_own() -> io::Result<()> {
    Ok(access(OWN, Access::EXEC_OK)?)
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt as _;
    use std::os::unix::process::CommandExt as _;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn the_file_that_took_the_name_is_opened_and_started() {
        let dir = tempfile::tempdir().unwrap();
        let (path, next) = (dir.path().join("program"), dir.path().join("next"));
        std::fs::copy("/bin/sh", &path).unwrap();
        let old = Program { file: Some(open_at(&path).unwrap()) };
        std::fs::copy("/bin/sh", &next).unwrap();
        std::fs::rename(&next, &path).unwrap();
        let new = Program { file: Some(open_at(&path).unwrap()) };
        assert_ne!(old.executable().unwrap(), new.executable().unwrap());
        assert_eq!(new.executable().unwrap(), executable_of(&path).unwrap());
        for program in [old, new] {
            let mut command = Command::new(program.path());
            command.arg0("sh").args(["-c", "read line"]).stdin(Stdio::piped());
            let mut child = command.spawn().unwrap();
            let running = executable_of(Path::new(&format!("/proc/{}/exe", child.id())));
            assert_eq!(running.unwrap(), program.executable().unwrap());
            drop(child.stdin.take());
            child.wait().unwrap();
        }
    }

    #[test]
    fn what_is_no_program_is_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("program");
        assert_eq!(open_at(&path).unwrap_err().kind(), io::ErrorKind::NotFound);
        std::fs::write(&path, "").unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        assert_eq!(open_at(&path).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        assert!(open_at(dir.path()).is_err());
    }

    #[test]
    fn a_path_that_was_marked_as_deleted_is_the_path_without_the_mark() {
        let dir = tempfile::tempdir().unwrap();
        let marked = dir.path().join("program (deleted)");
        assert_eq!(without_mark(marked.clone()), dir.path().join("program"));
        std::fs::write(&marked, "").unwrap();
        assert_eq!(without_mark(marked.clone()), marked, "a file that is really called so");
    }

    #[test]
    fn our_own_file_is_the_one_that_the_agent_would_tell_of() {
        assert!(Program::own().is_own() && check_own().is_ok());
        assert_eq!(Program::own().executable().unwrap(), crate::agent::executable().unwrap());
        assert_eq!(Program::open().executable().unwrap(), crate::agent::executable().unwrap());
    }
}
