//! One pod's network namespace: found, checked, entered, looked at.
//!
//! 1. [`Target`] is what the operator wrote: a name under `/run/netns`, a path, or `pid:N`
//! 2. [`PodNetns::open`] opens it and refuses what is no network namespace, and the host's own
//! 3. [`PodNetns::run`] runs a function inside it
//!
//! May touch: namespace descriptors, `/proc`, `/run/netns`, `/etc/netns`; changes nothing.
//! Source: namespaces(7), ioctl_ns(2), pidfd_open(2), ip-netns(8).

use std::fmt;
use std::fs::{File, Metadata};
use std::io;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Mutex, Once, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tracing::warn;

use super::files::Owner;
use super::holders;
use crate::agent::presence::{has_ended, leads_elsewhere};
use crate::exit::{Exit, ExitCode};
use crate::sys::netns::{self, is_network_namespace};

/// Where `ip netns` keeps its names.
const NETNS_DIR: &str = "/run/netns";
/// How often the holders of a namespace are looked for whose name is gone or whose process has ended: all processes are
/// looked at.
const LOOK: Duration = Duration::from_secs(2);
/// Ancestors looked at when PID 1's namespace cannot be read; deeper process trees do not occur.
const ANCESTORS_MAX: usize = 64;

/// Why a namespace is not, or no longer, usable.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    /// `--netns` is no name, path or pid.
    #[error(
        "`{text}` names no network namespace: use NAME (as in `ip netns list`), a PATH that contains `/`, or pid:N"
    )]
    Target {
        /// The text given.
        text: String,
    },
    /// The namespace could not be opened.
    #[error("cannot open the network namespace {target}{}", hint(source))]
    Open {
        /// The namespace.
        target: Target,
        /// Why.
        source: io::Error,
    },
    /// There is something else at the path.
    #[error("{target} is not a network namespace")]
    NotNetns {
        /// The namespace.
        target: Target,
    },
    /// The namespace is the host's or the launcher's own.
    #[error("{target} is the network namespace of {whose}: refused, name a pod's own network namespace")]
    HostNetns {
        /// The namespace.
        target: Target,
        /// PID 1, this process, or one of its ancestors.
        whose: &'static str,
    },
    /// The process ended, or moved to another namespace, while its namespace was opened.
    #[error("{target} went away while it was opened: start again")]
    Moved {
        /// The namespace.
        target: Target,
    },
    /// A thread could not enter the namespace.
    #[error("cannot enter the network namespace {target}: needs CAP_SYS_ADMIN, run as root")]
    Enter {
        /// The namespace.
        target: Target,
        /// Why.
        source: io::Error,
    },
    /// The kernel gives namespaces no numbers.
    #[error("the kernel does not tell namespaces apart (SO_NETNS_COOKIE): needs Linux 5.14")]
    Cookie(#[source] io::Error),
    /// A thread could not be started.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    /// No Pod of the directory has the pod's address.
    #[error(
        "no Pod of the directory has the address {}: name the project with --project, or add the Pod's manifest",
        list(addresses)
    )]
    NoPod {
        /// The pod's addresses.
        addresses: Vec<IpAddr>,
    },
    /// Several Pods of the directory have the pod's address.
    #[error(
        "several Pods of the directory have the address {}: name the project with --project",
        list(addresses)
    )]
    SeveralPods {
        /// The pod's addresses.
        addresses: Vec<IpAddr>,
    },
}

impl ExitCode for PodError {
    fn exit(&self) -> Exit {
        match self {
            Self::Open { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => Exit::Kernel,
            Self::Enter { .. } | Self::Thread(_) | Self::Cookie(_) => Exit::Kernel,
            _ => Exit::Usage,
        }
    }
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => ": it does not exist",
        io::ErrorKind::PermissionDenied => ": needs CAP_SYS_PTRACE or CAP_DAC_READ_SEARCH, run as root",
        _ => "",
    }
}

fn list(addresses: &[IpAddr]) -> String {
    addresses.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(" or ")
}

/// What `--netns` names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A name under `/run/netns`.
    Name(String),
    /// A path.
    Path(PathBuf),
    /// The namespace of a process.
    Pid(Pid),
}

impl FromStr for Target {
    type Err = PodError;

    fn from_str(text: &str) -> Result<Self, PodError> {
        let refused = || PodError::Target { text: text.to_owned() };
        if let Some(pid) = text.strip_prefix("pid:") {
            let pid = pid.parse().ok().filter(|pid| *pid > 0).and_then(Pid::from_raw);
            return pid.map(Self::Pid).ok_or_else(refused);
        }
        if text.contains('\0') {
            return Err(refused());
        }
        if !text.contains('/') {
            let name = !matches!(text, "" | "." | "..");
            return name.then(|| Self::Name(text.to_owned())).ok_or_else(refused);
        }
        // A path into the folder of names is that name, so that its resolv.conf is found.
        let path = Path::new(text);
        let parent =
            path.parent().filter(|p| [NETNS_DIR, "/var/run/netns"].iter().any(|d| *p == Path::new(d)));
        match (parent, path.file_name().and_then(|name| name.to_str())) {
            (Some(_), Some(name)) => Ok(Self::Name(name.to_owned())),
            _ => Ok(Self::Path(path.to_owned())),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Path(path) => path.display().fmt(f),
            Self::Pid(pid) => write!(f, "pid:{}", pid.as_raw_nonzero()),
        }
    }
}

impl Target {
    /// The file that is, or leads to, the namespace.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        match self {
            Self::Name(name) => Path::new(NETNS_DIR).join(name),
            Self::Path(path) => path.clone(),
            Self::Pid(pid) => PathBuf::from(format!("/proc/{}/ns/net", pid.as_raw_nonzero())),
        }
    }
}

/// What tells one namespace from another while either lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
}

impl Identity {
    fn of(metadata: &Metadata) -> Self {
        Self { device: metadata.dev(), inode: metadata.ino() }
    }

    fn at(path: &Path) -> io::Result<Self> {
        std::fs::metadata(path).map(|metadata| Self::of(&metadata))
    }
}

/// An open network namespace that is neither the host's nor our own.
#[derive(Debug)]
pub struct PodNetns {
    target: Target,
    fd: File,
    identity: Identity,
    /// For `pid:N`: readable once the process has ended.
    pidfd: Option<OwnedFd>,
    /// When its holders were looked for last.
    looked: Mutex<Option<Instant>>,
}

impl AsFd for PodNetns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl PodNetns {
    /// Opens and checks a namespace.
    ///
    /// # Errors
    ///
    /// If it cannot be opened, is no network namespace, or is the host's or our own.
    pub fn open(target: Target) -> Result<Self, PodError> {
        let failed = |source| PodError::Open { target: target.clone(), source };
        let pidfd = match &target {
            Target::Pid(pid) => {
                Some(pidfd_open(*pid, PidfdFlags::empty()).map_err(|errno| failed(process_error(errno)))?)
            }
            Target::Name(_) | Target::Path(_) => None,
        };
        // O_NONBLOCK: the path may lead to a FIFO.
        let fd = File::options()
            .read(true)
            .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(target.path())
            .map_err(failed)?;
        if !is_network_namespace(&fd).map_err(|errno| failed(errno.into()))? {
            return Err(PodError::NotNetns { target });
        }
        let identity = Identity::of(&fd.metadata().map_err(failed)?);
        if let Some(whose) = host(identity) {
            return Err(PodError::HostNetns { target, whose });
        }
        // Of a process: the number may have been given to another one between the two openings.
        if pidfd.as_ref().is_some_and(has_ended)
            || leads_elsewhere(&target.path(), (identity.device, identity.inode))
        {
            return Err(PodError::Moved { target });
        }
        Ok(Self { target, fd, identity, pidfd, looked: Mutex::new(None) })
    }

    /// As the operator named it.
    #[must_use]
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// A word for messages and status.
    #[must_use]
    pub fn name(&self) -> String {
        self.target.to_string()
    }

    /// Device and inode of the namespace.
    #[must_use]
    pub fn identity(&self) -> (u64, u64) {
        (self.identity.device, self.identity.inode)
    }

    /// The path that leads to the namespace as long as it is there; none for the namespace of a process, which
    /// [`Self::process`] tells of.
    #[must_use]
    pub fn path(&self) -> Option<PathBuf> {
        self.pidfd.is_none().then(|| self.target.path())
    }

    /// The pidfd of the process whose namespace it is.
    #[must_use]
    pub fn process(&self) -> Option<BorrowedFd<'_>> {
        self.pidfd.as_ref().map(AsFd::as_fd)
    }

    /// What the runtime files of the namespace say about it.
    #[must_use]
    pub fn owner(&self) -> Owner {
        Owner { identity: self.identity(), path: self.target.path() }
    }

    /// The kernel's number of the namespace, which is not used again before the next boot.
    ///
    /// # Errors
    ///
    /// If the namespace cannot be entered, or the kernel is older than 5.14.
    pub fn cookie(&self) -> Result<u64, PodError> {
        self.run(|| UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).and_then(netns::cookie))?
            .map_err(PodError::Cookie)
    }

    /// Whether neither a name nor a process leads to the namespace any more. While the process of `pid:N` lives it may come
    /// back from another namespace, and a namespace about which nothing can be said is not gone. Our own descriptor keeps it
    /// alive, so nothing inside would tell.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        let is_there = match &self.pidfd {
            Some(process) => !has_ended(process),
            None => !leads_elsewhere(&self.target.path(), self.identity()),
        };
        if is_there || !self.may_look() {
            return false;
        }
        match holders::is_held(self.identity()) {
            Ok(held) => !held,
            Err(error) => {
                static SAID: Once = Once::new();
                SAID.call_once(|| {
                    warn!(%error, "cannot tell whether the namespace is gone: it stays protected");
                });
                false
            }
        }
    }

    /// Whether the last look was long enough ago; the next one is then taken to be made.
    fn may_look(&self) -> bool {
        let mut looked = self.looked.lock().unwrap_or_else(PoisonError::into_inner);
        let may = looked.is_none_or(|at| at.elapsed() >= LOOK);
        if may {
            *looked = Some(Instant::now());
        }
        may
    }

    /// Runs `f` on a thread of its own inside the namespace. The calling thread never enters it.
    ///
    /// # Errors
    ///
    /// If the thread cannot be started or cannot enter.
    ///
    /// # Panics
    ///
    /// If `f` does.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T, PodError> {
        let inside = || {
            setns(&self.fd, CloneFlags::CLONE_NEWNET)
                .map_err(|errno| PodError::Enter { target: self.target.clone(), source: errno.into() })?;
            Ok(f())
        };
        thread::scope(|scope| {
            let thread = thread::Builder::new()
                .name("netns".to_owned())
                .spawn_scoped(scope, inside)
                .map_err(PodError::Thread)?;
            thread.join().unwrap_or_else(|panic| resume_unwind(panic))
        })
    }
}

/// A process that is not there is a namespace that does not exist.
fn process_error(errno: rustix::io::Errno) -> io::Error {
    if errno == rustix::io::Errno::SRCH { io::ErrorKind::NotFound.into() } else { errno.into() }
}

/// Whose namespace `identity` is, if it must not be a pod's.
fn host(identity: Identity) -> Option<&'static str> {
    let is =
        |process: &str| Identity::at(Path::new(&format!("/proc/{process}/ns/net"))).map(|i| i == identity);
    // The thread's own: a test may have unshared one of several.
    if is("self").unwrap_or(false) || is("thread-self").unwrap_or(false) {
        return Some("this process");
    }
    match is("1") {
        Ok(same) => same.then_some("PID 1, the host"),
        Err(_) => {
            // Once: what is not there yet is looked for again and again.
            static SAID: Once = Once::new();
            SAID.call_once(|| {
                warn!(
                    "host_netns_unverified: the network namespace of PID 1 cannot be read, ancestors are compared"
                );
            });
            ancestors().any(|pid| is(&pid).unwrap_or(false)).then_some("an ancestor of this process")
        }
    }
}

/// The parent of this process, its parent, and so on, as far as they can be read.
fn ancestors() -> impl Iterator<Item = String> {
    let parent = |process: &str| {
        let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
        let pid = status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().to_owned();
        (pid != "0").then_some(pid)
    };
    std::iter::successors(parent("self"), move |pid| parent(pid)).take(ANCESTORS_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(text: &str) -> Option<Target> {
        text.parse().ok()
    }

    #[test]
    fn a_target_is_a_name_a_path_or_a_pid() {
        assert_eq!(target("web"), Some(Target::Name("web".into())));
        assert_eq!(target("/run/netns/web"), Some(Target::Name("web".into())));
        assert_eq!(target("/var/run/netns/cni-1"), Some(Target::Name("cni-1".into())));
        assert_eq!(target("/proc/7/ns/net"), Some(Target::Path("/proc/7/ns/net".into())));
        assert_eq!(target("./net"), Some(Target::Path("./net".into())));
        assert_eq!(target("pid:7"), Some(Target::Pid(Pid::from_raw(7).unwrap())));
        for bad in ["", ".", "..", "pid:", "pid:0", "pid:-1", "pid:x", "pid:99999999999", "a\0b"] {
            assert_eq!(target(bad), None, "{bad:?}");
        }
        for text in ["web", "/proc/7/ns/net", "pid:7"] {
            assert_eq!(target(text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn our_own_namespace_is_refused() {
        for text in ["/proc/self/ns/net".to_owned(), format!("pid:{}", std::process::id())] {
            let error = PodNetns::open(text.parse().unwrap()).unwrap_err();
            assert!(matches!(error, PodError::HostNetns { .. }), "{error}");
            assert_eq!(error.exit(), Exit::Usage);
        }
    }

    #[test]
    fn what_is_no_network_namespace_is_refused() {
        for text in ["/proc/self/ns/uts", "/proc/self/status", "/dev/null"] {
            let error = PodNetns::open(text.parse().unwrap()).unwrap_err();
            assert!(matches!(error, PodError::NotNetns { .. }), "{error}");
        }
    }

    #[test]
    fn what_does_not_exist_is_said_to() {
        for text in ["no-such-namespace", "/nowhere/net", "pid:2147483647"] {
            let error = PodNetns::open(text.parse().unwrap()).unwrap_err();
            assert!(error.to_string().contains("does not exist"), "{error}");
            assert_eq!(error.exit(), Exit::Usage);
        }
    }

    #[test]
    fn ancestors_end_at_the_first_process() {
        let pids: Vec<String> = ancestors().collect();
        assert_eq!(pids.first(), Some(&std::os::unix::process::parent_id().to_string()));
        assert!(pids.len() < ANCESTORS_MAX);
    }
}
