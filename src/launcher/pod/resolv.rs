//! The pod's resolv.conf: which resolvers to capture, and which zone is the project's.
//!
//! 1. the file is found: `--resolv-conf`, `/etc/netns/NAME/resolv.conf`, or `/etc/resolv.conf` below a process's root
//! 2. it is looked up without following anything out of the pod's root, opened if it is a file, and read within a cap
//! 3. it is parsed, and compared with the project that root-owned sources name
//!
//! The pod may write this file: it never chooses the project, and a contradiction is refused.
//! May touch: that file, read-only. Source: resolv.conf(5), ip-netns(8), openat2(2).

use std::fs::File;
use std::io::{self, Read};
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use hickory_proto::rr::Name;
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, openat, openat2};

use super::netns::{PodNetns, Target};
use crate::exit::{Exit, ExitCode};

/// A resolv.conf is a few lines; glibc itself reads no more than 256 characters of search list in old versions.
const RESOLV_CONF_MAX: u64 = 64 * 1024;
/// glibc takes 3 nameservers, musl 3, Go all: more than 8 are nobody's configuration.
const RESOLVERS_MAX: usize = 8;
/// A domain name as text (RFC 1035: 255 bytes with its lengths).
const NAME_MAX: usize = 253;

/// Why there is no usable resolv.conf.
#[derive(Debug, thiserror::Error)]
pub enum ResolvError {
    /// The file cannot be read.
    #[error("cannot read the pod's resolv.conf {}: put it there, or name one with --resolv-conf", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A namespace that is only a path has no place for a resolv.conf.
    #[error("nothing says where the resolv.conf of {target} is: name it with --resolv-conf")]
    Unknown {
        /// The namespace.
        target: Target,
    },
    /// A directory, a device, a FIFO.
    #[error("the pod's resolv.conf {} is not a regular file", path.display())]
    NotAFile {
        /// The file.
        path: PathBuf,
    },
    /// Longer than any resolv.conf.
    #[error("the pod's resolv.conf {} is longer than {RESOLV_CONF_MAX} bytes", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
    },
    /// Nobody to ask.
    #[error("the pod's resolv.conf {} names no resolver", path.display())]
    NoResolver {
        /// The file.
        path: PathBuf,
    },
    /// The search list is of another project.
    #[error("project_mismatch: the resolv.conf {} is of project `{}`, not `{project}`", path.display(), found.escape_debug())]
    ProjectMismatch {
        /// The file.
        path: PathBuf,
        /// The project that the search list names.
        found: String,
        /// The project that the operator or the directory names.
        project: String,
    },
}

impl ExitCode for ResolvError {
    fn exit(&self) -> Exit {
        match self {
            Self::Read { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => Exit::Kernel,
            _ => Exit::Usage,
        }
    }
}

/// What the agent needs of a resolv.conf.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ResolvConf {
    /// Resolvers that a route can capture, in their order, without repetitions.
    pub resolvers: Vec<IpAddr>,
    /// Resolvers on loopback: no route can capture them, what they answer is not learned.
    pub loopback: Vec<IpAddr>,
    /// How many resolvers were left out: no unicast address, IPv6 link-local, or beyond the eighth.
    pub ignored: usize,
    /// The search list in lower case, without final dots.
    pub search: Vec<String>,
    /// `<project>.svc.<cluster domain>`; `None` if the search list does not tell.
    pub zone: Option<String>,
}

impl ResolvConf {
    /// Reads the resolv.conf of a pod of `project`, or the file that replaces it.
    ///
    /// # Errors
    ///
    /// If there is none, it names no resolver, or it is of another project.
    pub fn read(netns: &PodNetns, replacement: Option<&Path>, project: &str) -> Result<Self, ResolvError> {
        let (path, fd) = match (replacement, netns.target()) {
            (Some(path), _) => (path.to_owned(), open(path)),
            (None, Target::Name(name)) => {
                let path = Path::new("/etc/netns").join(name).join("resolv.conf");
                let fd = open(&path);
                (path, fd)
            }
            (None, Target::Pid(pid)) => {
                let root = PathBuf::from(format!("/proc/{}/root", pid.as_raw_nonzero()));
                let fd = open_of_process(&root, netns);
                (root.join("etc/resolv.conf"), fd)
            }
            (None, target @ Target::Path(_)) => {
                return Err(ResolvError::Unknown { target: target.clone() });
            }
        };
        let fd = fd.map_err(|source| ResolvError::Read { path: path.clone(), source })?;
        let text = read(fd, &path)?;
        Self::parse(&text).check(&path, project)
    }

    fn parse(text: &[u8]) -> Self {
        let mut conf = Self::default();
        let text = String::from_utf8_lossy(text);
        for line in text.lines() {
            // A comment is a line that begins with another word.
            let mut words = line.split([' ', '\t']).filter(|word| !word.is_empty());
            match words.next() {
                Some("nameserver") => conf.add_resolver(words.next().unwrap_or_default()),
                // The last of `search` and `domain` counts.
                Some("search") => {
                    conf.search = words.map(normalised).filter(|name| !name.is_empty()).collect()
                }
                Some("domain") => conf.search = words.take(1).map(normalised).collect(),
                _ => {}
            }
        }
        conf
    }

    fn add_resolver(&mut self, text: &str) {
        let address: Option<IpAddr> = text.parse().ok().filter(|address: &IpAddr| match address {
            // 169.254.20.10 is where a node-local DNS cache usually is.
            IpAddr::V4(v4) => !v4.is_unspecified() && !v4.is_multicast() && !v4.is_broadcast(),
            IpAddr::V6(v6) => !v6.is_unspecified() && !v6.is_multicast() && !v6.is_unicast_link_local(),
        });
        let Some(address) = address else {
            self.ignored += 1;
            return;
        };
        let list = if address.is_loopback() { &mut self.loopback } else { &mut self.resolvers };
        if list.contains(&address) {
            return;
        }
        if list.len() < RESOLVERS_MAX { list.push(address) } else { self.ignored += 1 }
    }

    /// Finds the zone, and refuses the search list of another project.
    fn check(mut self, path: &Path, project: &str) -> Result<Self, ResolvError> {
        if self.resolvers.is_empty() && self.loopback.is_empty() {
            return Err(ResolvError::NoResolver { path: path.to_owned() });
        }
        let zone = self.search.iter().find_map(|entry| project_zone(entry).map(|found| (entry, found)));
        if let Some((entry, found)) = zone {
            if found != project {
                return Err(ResolvError::ProjectMismatch {
                    path: path.to_owned(),
                    found: found.to_owned(),
                    project: project.to_owned(),
                });
            }
            self.zone = Some(entry.clone());
        }
        Ok(self)
    }
}

/// The project of a search entry that is a domain name of the form `<project>.svc.<cluster domain>`.
fn project_zone(entry: &str) -> Option<&str> {
    let is_name = entry.len() <= NAME_MAX && entry.bytes().all(|b| b.is_ascii_graphic());
    Name::from_ascii(entry).ok().filter(|_| is_name)?;
    let (project, rest) = entry.split_once('.')?;
    let domain = rest.strip_prefix("svc.")?;
    (!project.is_empty() && !domain.is_empty()).then_some(project)
}

fn normalised(name: &str) -> String {
    name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase()
}

fn open(path: &Path) -> io::Result<OwnedFd> {
    // O_NONBLOCK: a FIFO in the file's place must not block the start.
    let flags = libc::O_NONBLOCK | libc::O_CLOEXEC | libc::O_NOCTTY;
    Ok(File::options().read(true).custom_flags(flags).open(path)?.into())
}

/// Opens `etc/resolv.conf` as the process sees it whose root is `root`.
fn open_of_process(root: &Path, netns: &PodNetns) -> io::Result<OwnedFd> {
    let root = openat(CWD, root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    if netns.is_gone() {
        return Err(io::Error::other("the process ended"));
    }
    open_below(root)
}

/// Opens `etc/resolv.conf` below `root`. Its links, absolute ones too, end there.
fn open_below(root: impl AsFd) -> io::Result<OwnedFd> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let found = openat2(root, "etc/resolv.conf", OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)?;
    // To open a device is to use it already, and the pod chooses what lies there.
    if !FileType::from_raw_mode(fstat(&found)?.st_mode).is_file() {
        return Ok(found);
    }
    open(Path::new(&format!("/proc/self/fd/{}", found.as_raw_fd())))
}

fn read(fd: OwnedFd, path: &Path) -> Result<Vec<u8>, ResolvError> {
    let failed = |source| ResolvError::Read { path: path.to_owned(), source };
    let file = File::from(fd);
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(ResolvError::NotAFile { path: path.to_owned() });
    }
    let mut text = Vec::new();
    file.take(RESOLV_CONF_MAX + 1).read_to_end(&mut text).map_err(failed)?;
    if u64::try_from(text.len()).is_ok_and(|len| len > RESOLV_CONF_MAX) {
        return Err(ResolvError::TooLong { path: path.to_owned() });
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::fcntl_getfl;

    fn conf(text: &str) -> Result<ResolvConf, ResolvError> {
        ResolvConf::parse(text.as_bytes()).check(Path::new("resolv.conf"), "shop")
    }

    fn ips(texts: &[&str]) -> Vec<IpAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn what_the_kubelet_writes_gives_resolvers_and_zone() {
        let conf = conf(
            "# generated\nsearch shop.svc.Cluster.local. svc.cluster.local cluster.local\n\
             nameserver 10.96.0.10\nnameserver fd00:96::a\noptions ndots:5\n",
        )
        .unwrap();
        assert_eq!(conf.resolvers, ips(&["10.96.0.10", "fd00:96::a"]));
        assert_eq!(conf.zone.as_deref(), Some("shop.svc.cluster.local"));
        assert_eq!(conf.search, ["shop.svc.cluster.local", "svc.cluster.local", "cluster.local"]);
        assert!(conf.loopback.is_empty() && conf.ignored == 0);
    }

    #[test]
    fn custom_cluster_domains_give_the_zone() {
        let conf = conf("nameserver 10.0.0.1\nsearch example.com shop.svc.k8s.acme.corp svc.k8s.acme.corp\n")
            .unwrap();
        assert_eq!(conf.zone.as_deref(), Some("shop.svc.k8s.acme.corp"));
    }

    #[test]
    fn the_search_list_of_another_project_is_refused() {
        for search in ["bank.svc.cluster.local", "example.com bank.svc.x", "bank.svc.x shop.svc.x"] {
            let error = conf(&format!("nameserver 10.0.0.1\nsearch {search}\n")).unwrap_err();
            assert!(error.to_string().starts_with("project_mismatch"), "{error}");
            assert_eq!(error.exit(), Exit::Usage);
        }
        assert!(
            conf("nameserver 10.0.0.1\nsearch shop.svc.x bank.svc.x").is_ok(),
            "a dnsConfig may add others"
        );
    }

    #[test]
    fn a_search_list_without_a_project_gives_no_zone() {
        let no_names = [
            format!("search shop.svc.{}", "x".repeat(64)),
            format!("search shop.svc{}", ".xyz".repeat(62)),
            "search shop.svc.\u{e9} \u{1b}]0;bank.svc.x".to_owned(),
        ];
        let others = ["", "search example.com svc.cluster.local", "search shop.svc. .svc.x svc.x", "search"];
        for search in others.map(str::to_owned).iter().chain(&no_names) {
            assert_eq!(conf(&format!("nameserver 10.0.0.1\n{search}\n")).unwrap().zone, None, "{search}");
        }
    }

    #[test]
    fn the_last_of_search_and_domain_counts() {
        let text = "nameserver 10.0.0.1\nsearch bank.svc.x\ndomain shop.svc.x ignored";
        assert_eq!(conf(text).unwrap().search, ["shop.svc.x"]);
    }

    #[test]
    fn loopback_resolvers_are_told_apart() {
        let conf = conf("nameserver 127.0.0.11\nnameserver ::1\nnameserver 169.254.20.10\n").unwrap();
        assert_eq!(conf.loopback, ips(&["127.0.0.11", "::1"]));
        assert_eq!(conf.resolvers, ips(&["169.254.20.10"]));
    }

    #[test]
    fn odd_resolvers_are_left_out_and_said_to_be() {
        let mut text =
            String::from("nameserver\nnameserver dns.example\nnameserver fe80::1%eth0\nnameserver 0.0.0.0\n");
        for n in [1, 1, 2, 3, 4, 5, 6, 7, 8, 9] {
            text += &format!("nameserver\t10.0.0.{n} # remark\n");
        }
        let conf = conf(&text).unwrap();
        assert_eq!(conf.resolvers.len(), RESOLVERS_MAX);
        assert_eq!(conf.ignored, 5);
    }

    #[test]
    fn a_file_without_a_resolver_is_refused() {
        for text in ["", "search shop.svc.x", "#nameserver 10.0.0.1", "nameserver fe80::1"] {
            assert!(matches!(conf(text), Err(ResolvError::NoResolver { .. })), "{text}");
        }
        assert!(ResolvConf::parse(&[0xff; 300]).resolvers.is_empty());
    }

    #[test]
    fn promise_9_what_a_pod_puts_in_the_files_place_is_not_opened_unless_it_is_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("etc/resolv.conf");
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let is_path_only = |fd: &OwnedFd| fcntl_getfl(fd).unwrap().contains(OFlags::PATH);
        let found = open_below(File::open(dir.path()).unwrap()).unwrap();
        assert!(is_path_only(&found) && matches!(read(found, &path), Err(ResolvError::NotAFile { .. })));
        std::fs::remove_file(&path).unwrap();
        std::fs::write(dir.path().join("etc/real"), "nameserver 10.0.0.1").unwrap();
        std::os::unix::fs::symlink("/etc/real", &path).unwrap();
        let found = open_below(File::open(dir.path()).unwrap()).unwrap();
        assert!(!is_path_only(&found));
        assert_eq!(read(found, &path).unwrap(), b"nameserver 10.0.0.1");
    }

    #[test]
    fn only_short_regular_files_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(matches!(read(open(&path).unwrap(), &path), Err(ResolvError::NotAFile { .. })));
        assert!(matches!(read(open(dir.path()).unwrap(), dir.path()), Err(ResolvError::NotAFile { .. })));
        let path = dir.path().join("long");
        std::fs::write(&path, "#".repeat(65_537)).unwrap();
        assert!(matches!(read(open(&path).unwrap(), &path), Err(ResolvError::TooLong { .. })));
        std::fs::write(&path, "#".repeat(65_536)).unwrap();
        assert!(read(open(&path).unwrap(), &path).is_ok());
    }
}
