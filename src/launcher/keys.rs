//! The project key, and everything that is derived from it.
//!
//! 1. [`ProjectKey::read`] takes the key file apart (32 bytes in base64, alone or after `use`; a second one after `accept`)
//! 2. [`ProjectKey::static_secret`] gives an agent its own private key
//! 3. [`ProjectKey::workload`] gives it, per peer, a public key and a pre-shared key
//!
//! Rotation: the new key becomes `accept` on every node, then `use` with the old one as `accept`, then the old one goes.
//! Whoever initiates does so with the key in use alone; whoever answers knows both, each with its own keys of every peer.
//!
//! The project key itself never leaves the launcher, and lies on a page that is never swapped. Everything here is zeroised
//! when dropped; nothing of it has a `Debug` that shows bytes. May touch: the key file and `/dev/random`.
//!
//! Derivation: HKDF-SHA256 (RFC 5869), empty salt, 32 bytes out, and
//! `info = LABEL 00 suite 00 key domain 00 address...`, where an address is its family byte (4 or 6) and its bytes.
//! Known answers from an independent implementation: `tests/vectors/kdf.json`.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::net::IpAddr;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hkdf::Hkdf;
use sha2::Sha256;
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use crate::exit::{Exit, ExitCode};
use crate::proto::directory::Workload;
use crate::proto::noise::{PeerKeys, PresharedKey, StaticSecret, Suite};
use crate::sys::memory::SecretPage;

/// Length of a project key and of every key derived from it, in bytes.
const KEY_LEN: usize = 32;
/// Base64 of [`KEY_LEN`] bytes, padding included.
const KEY_TEXT_LEN: usize = 44;
/// A line of `use BASE64` is about 50 bytes; anything much longer is another file.
const KEY_FILE_MAX: u64 = 1024;
/// A project is a Kubernetes namespace, whose name is an RFC 1123 label.
const PROJECT_NAME_MAX: usize = 63;

const LABEL_PSK: &str = "tencrypt v1 psk";
const LABEL_STATIC: &str = "tencrypt v1 static";

/// What can be wrong with a project key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file could not be opened or read.
    #[error("cannot read the project key file {}", path.display())]
    Read {
        /// The key file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A directory, a device, a FIFO.
    #[error("the project key {} is not a regular file", path.display())]
    NotAFile {
        /// The key file.
        path: PathBuf,
    },
    /// Others could read or replace the key.
    #[error("the project key file {} has mode {mode:04o}: run `chmod 600` on it, group and others must have no access", path.display())]
    Accessible {
        /// The key file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Somebody else owns the file, hence can read and replace the key.
    #[error("the project key file {} belongs to uid {uid}: it must belong to root or to the user who runs tencrypt", path.display())]
    Owner {
        /// The key file.
        path: PathBuf,
        /// Its owner.
        uid: u32,
    },
    /// Longer than any key file.
    #[error("the project key file {} is longer than {KEY_FILE_MAX} bytes", path.display())]
    TooLong {
        /// The key file.
        path: PathBuf,
    },
    /// The text is no project key. The reason never quotes the text.
    #[error("the project key file {} is malformed: {reason}", path.display())]
    Malformed {
        /// The key file.
        path: PathBuf,
        /// What is wrong.
        reason: &'static str,
    },
    /// Not the name of a project.
    #[error("`{name}` is not the name of a project: 1 to 63 letters, digits and inner hyphens")]
    ProjectName {
        /// The name given.
        name: String,
    },
    /// The kernel gave no randomness.
    #[error("cannot read random bytes from /dev/random")]
    Random(#[source] io::Error),
    /// The kernel gave no page.
    #[error("no memory for the project key")]
    Memory(#[source] io::Error),
}

impl ExitCode for KeyError {
    fn exit(&self) -> Exit {
        match self {
            Self::Read { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => Exit::Kernel,
            Self::Random(_) | Self::Memory(_) => Exit::Kernel,
            _ => Exit::Usage,
        }
    }
}

/// The bytes of a project key.
type Key = [u8; KEY_LEN];

/// The key of one project, and the one that is accepted beside it during a rotation, bound to the project's name and
/// cipher.
pub struct ProjectKey {
    /// The key in use, and the one that is accepted.
    keys: SecretPage<{ 2 * KEY_LEN }>,
    accepts: bool,
    project: String,
    suite: Suite,
}

impl fmt::Debug for ProjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProjectKey")
            .field("project", &self.project)
            .field("suite", &self.suite)
            .finish_non_exhaustive()
    }
}

impl ProjectKey {
    /// Reads the key file of `project`.
    ///
    /// # Errors
    ///
    /// If the file cannot be read, is accessible to anyone but its owner, or holds no key.
    pub fn read(path: &Path, project: &str, suite: Suite) -> Result<Self, KeyError> {
        let text = read_private_file(path)?;
        Self::parse(&text, project, suite).map_err(|error| match error {
            Parse::Malformed(reason) => KeyError::Malformed { path: path.to_owned(), reason },
            Parse::ProjectName => KeyError::ProjectName { name: project.to_owned() },
            Parse::Memory(source) => KeyError::Memory(source),
        })
    }

    fn parse(text: &[u8], project: &str, suite: Suite) -> Result<Self, Parse> {
        let project = project.to_ascii_lowercase();
        if !is_label(&project) {
            return Err(Parse::ProjectName);
        }
        let text = str::from_utf8(text).map_err(|_| Parse::Malformed("it is not text"))?;
        let (mut used, mut accepted) = (None, None);
        for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
            let (slot, encoded) = match line.split_once([' ', '\t']) {
                None => (&mut used, line),
                Some(("use", rest)) => (&mut used, rest.trim_start()),
                Some(("accept", rest)) => (&mut accepted, rest.trim_start()),
                Some(_) => {
                    return Err(Parse::Malformed("a line is neither `use BASE64` nor `accept BASE64`"));
                }
            };
            if slot.replace(decode(encoded)?).is_some() {
                return Err(Parse::Malformed("two keys of one kind: at most one is in use and one accepted"));
            }
        }
        let used = used.ok_or(Parse::Malformed("it holds no key to use: make one with `tencrypt keygen`"))?;
        if accepted.as_ref().is_some_and(|key: &Zeroizing<Key>| key.ct_eq(&used[..]).into()) {
            return Err(Parse::Malformed("the key to accept is the one in use"));
        }
        let mut keys = SecretPage::new().map_err(Parse::Memory)?;
        let (first, second) = keys.split_at_mut(KEY_LEN);
        first.copy_from_slice(&used[..]);
        if let Some(accepted) = &accepted {
            second.copy_from_slice(&accepted[..]);
        }
        Ok(Self { keys, accepts: accepted.is_some(), project, suite })
    }

    fn used(&self) -> &[u8] {
        &self.keys[..KEY_LEN]
    }

    fn accepted(&self) -> Option<&[u8]> {
        self.accepts.then(|| &self.keys[KEY_LEN..])
    }

    /// The project, in lower case: the key domain.
    #[must_use]
    pub fn project(&self) -> &str {
        &self.project
    }

    /// The private key of the workload at `address`, clamped.
    #[must_use]
    pub fn static_secret(&self, address: IpAddr) -> StaticSecret {
        self.static_secret_of(self.used(), address)
    }

    /// The one that it answers with, too, during a rotation.
    #[must_use]
    pub fn accepted_secret(&self, address: IpAddr) -> Option<StaticSecret> {
        self.accepted().map(|key| self.static_secret_of(key, address))
    }

    fn static_secret_of(&self, key: &[u8], address: IpAddr) -> StaticSecret {
        let mut secret = StaticSecret(self.derive(key, LABEL_STATIC, &[address]));
        secret.0[0] &= 0b1111_1000;
        secret.0[31] &= 0b0111_1111;
        secret.0[31] |= 0b0100_0000;
        secret
    }

    /// What two workloads share: a peer's public key, and the key that only the two know. The order of the addresses does
    /// not matter to the latter.
    fn peer_keys(&self, key: &[u8], own: IpAddr, peer: IpAddr) -> PeerKeys {
        // Ord of IpAddr is by family, then by bytes: the same order as that of the encodings.
        let psk = PresharedKey(self.derive(key, LABEL_PSK, &[own.min(peer), own.max(peer)]));
        PeerKeys { public: self.static_secret_of(key, peer).public(), psk }
    }

    /// What the agent at `own` may know about `peer`.
    #[must_use]
    pub fn workload(&self, own: IpAddr, peer: IpAddr) -> Workload {
        let keys = |key| self.peer_keys(key, own, peer);
        Workload { address: peer, keys: keys(self.used()), accept: self.accepted().map(keys) }
    }

    fn derive(&self, key: &[u8], label: &str, addresses: &[IpAddr]) -> [u8; KEY_LEN] {
        let mut info = Vec::with_capacity(160);
        for word in [label, self.suite.as_str(), &self.project] {
            info.extend_from_slice(word.as_bytes());
            info.push(0);
        }
        for address in addresses {
            match address {
                IpAddr::V4(v4) => {
                    info.push(4);
                    info.extend_from_slice(&v4.octets());
                }
                IpAddr::V6(v6) => {
                    info.push(6);
                    info.extend_from_slice(&v6.octets());
                }
            }
        }
        let mut out = [0; KEY_LEN];
        Hkdf::<Sha256>::new(None, key)
            .expand(&info, &mut out)
            .expect("32 bytes are one block of HKDF-SHA256");
        out
    }
}

/// A new project key, as the line that a key file holds (without the line's end).
///
/// # Errors
///
/// If the kernel gives no randomness.
pub fn keygen() -> Result<Zeroizing<String>, KeyError> {
    let mut key = Zeroizing::new([0; KEY_LEN]);
    // Unlike /dev/urandom this waits until the kernel's generator is seeded, and never again after that.
    File::open("/dev/random")
        .and_then(|mut random| random.read_exact(&mut key[..]))
        .map_err(KeyError::Random)?;
    Ok(Zeroizing::new(STANDARD.encode(&key[..])))
}

/// Whether `name` can be a namespace: an RFC 1123 label in lower case.
#[must_use]
pub fn is_label(name: &str) -> bool {
    (1..=PROJECT_NAME_MAX).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-')
}

/// Why a text is no key; the caller adds the path.
#[derive(Debug)]
enum Parse {
    Malformed(&'static str),
    ProjectName,
    Memory(io::Error),
}

fn read_private_file(path: &Path) -> Result<Zeroizing<Vec<u8>>, KeyError> {
    let failed = |source| KeyError::Read { path: path.to_owned(), source };
    // O_NONBLOCK: a FIFO in place of the file must not block the start.
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC | libc::O_NOCTTY)
        .open(path)
        .map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(KeyError::NotAFile { path: path.to_owned() });
    }
    let mode = metadata.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(KeyError::Accessible { path: path.to_owned(), mode });
    }
    let uid = metadata.uid();
    if uid != 0 && uid != nix::unistd::geteuid().as_raw() {
        return Err(KeyError::Owner { path: path.to_owned(), uid });
    }
    // Room for the cap and one byte: read_to_end never reallocates, so no copy of the key stays on the heap.
    let mut text = Zeroizing::new(Vec::with_capacity(2 * 1024));
    file.take(KEY_FILE_MAX + 1).read_to_end(&mut text).map_err(failed)?;
    if u64::try_from(text.len()).is_ok_and(|len| len > KEY_FILE_MAX) {
        return Err(KeyError::TooLong { path: path.to_owned() });
    }
    Ok(text)
}

fn decode(encoded: &str) -> Result<Zeroizing<[u8; KEY_LEN]>, Parse> {
    if encoded.len() != KEY_TEXT_LEN {
        return Err(Parse::Malformed("a key is 44 characters of base64, which encode 32 bytes"));
    }
    // The decoder may write a whole last group: 33 bytes.
    let mut bytes = Zeroizing::new([0; KEY_LEN + 1]);
    match STANDARD.decode_slice(encoded, &mut bytes[..]) {
        Ok(KEY_LEN) => {}
        Ok(_) => return Err(Parse::Malformed("a key does not encode 32 bytes")),
        Err(_) => return Err(Parse::Malformed("a key is not base64")),
    }
    let mut key = Zeroizing::new([0; KEY_LEN]);
    key.copy_from_slice(&bytes[..KEY_LEN]);
    if *key == [0; KEY_LEN] {
        return Err(Parse::Malformed("a key of zeros protects nothing: make one with `tencrypt keygen`"));
    }
    Ok(key)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const ONE: &str = "7sVMhcypGO4/e5e0B8nCNEIgm41m39h7/yRFqRaAy/8=";
    const TWO: &str = "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=";

    fn parse(text: &str) -> Result<ProjectKey, Parse> {
        ProjectKey::parse(text.as_bytes(), "shop", Suite::default())
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }

    #[derive(serde::Deserialize)]
    struct Vectors {
        project_key: String,
        #[serde(rename = "static")]
        statics: Vec<StaticVector>,
        psk: Vec<PskVector>,
    }

    #[derive(serde::Deserialize)]
    struct StaticVector {
        project: String,
        suite: String,
        address: IpAddr,
        secret: String,
        public: String,
    }

    #[derive(serde::Deserialize)]
    struct PskVector {
        project: String,
        suite: String,
        own: IpAddr,
        peer: IpAddr,
        psk: String,
    }

    #[test]
    fn derivation_matches_the_independent_vectors_of_both_families_and_suites() {
        let vectors: Vectors = serde_json::from_str(include_str!("../../tests/vectors/kdf.json")).unwrap();
        let key = |project: &str, suite: &str| {
            let suites = [Suite::ChaCha20Poly1305, Suite::Aes256Gcm];
            let suite = suites.into_iter().find(|s| s.as_str() == suite).unwrap();
            ProjectKey::parse(vectors.project_key.as_bytes(), project, suite).unwrap()
        };
        for v in &vectors.statics {
            let secret = key(&v.project, &v.suite).static_secret(v.address);
            assert_eq!(hex(&secret.0), v.secret, "{} {} {}", v.project, v.suite, v.address);
            assert_eq!(hex(&secret.public().0), v.public);
        }
        for v in &vectors.psk {
            let workload = key(&v.project, &v.suite).workload(v.own, v.peer);
            assert_eq!(hex(&workload.keys.psk.0), v.psk, "{} {} {} {}", v.project, v.suite, v.own, v.peer);
            assert_eq!(workload.address, v.peer);
        }
        for v6 in [false, true] {
            assert!(vectors.statics.iter().any(|v| v.address.is_ipv6() == v6));
            assert!(vectors.psk.iter().any(|v| v.own.is_ipv6() == v6));
        }
    }

    #[test]
    fn two_ends_agree_and_nobody_else_does() {
        let key = parse(ONE).unwrap();
        let [a, b, c] = ["10.0.0.1", "10.0.0.2", "10.0.0.3"].map(|ip| ip.parse::<IpAddr>().unwrap());
        assert!(key.workload(a, b).keys.psk == key.workload(b, a).keys.psk);
        assert!(key.workload(a, b).keys.psk != key.workload(a, c).keys.psk);
        assert_eq!(key.workload(a, b).keys.public, key.static_secret(b).public());
        let other = ProjectKey::parse(ONE.as_bytes(), "bank", Suite::default()).unwrap();
        assert!(key.workload(a, b).keys.psk != other.workload(a, b).keys.psk);
        assert_ne!(key.static_secret(a).0, other.static_secret(a).0);
    }

    #[test]
    fn the_project_name_is_taken_in_lower_case() {
        let address = "10.0.0.1".parse().unwrap();
        let upper = ProjectKey::parse(ONE.as_bytes(), "SHOP", Suite::default()).unwrap();
        assert_eq!(upper.static_secret(address).0, parse(ONE).unwrap().static_secret(address).0);
        assert_eq!(upper.project(), "shop");
        for name in ["", "-shop", "shop-", "a.b", "sh\0op", &"x".repeat(64)] {
            assert!(matches!(
                ProjectKey::parse(ONE.as_bytes(), name, Suite::default()),
                Err(Parse::ProjectName)
            ));
        }
    }

    #[test]
    fn a_lone_key_is_the_key_in_use() {
        let address = "10.0.0.1".parse().unwrap();
        let lone = parse(&format!("{ONE}\n")).unwrap();
        let named = parse(&format!("use {ONE}\r\n\n")).unwrap();
        assert_eq!(lone.static_secret(address).0, named.static_secret(address).0);
    }

    #[test]
    fn a_key_to_accept_answers_beside_the_one_in_use() {
        let [a, b] = ["10.0.0.1", "10.0.0.2"].map(|ip| ip.parse::<IpAddr>().unwrap());
        let (old, new) = (parse(ONE).unwrap(), parse(TWO).unwrap());
        for text in [format!("use {ONE}\naccept {TWO}\n"), format!("accept\t{TWO}\n{ONE}")] {
            let both = parse(&text).unwrap();
            assert_eq!(both.static_secret(a).0, old.static_secret(a).0);
            assert_eq!(both.accepted_secret(a).unwrap().0, new.static_secret(a).0);
            let workload = both.workload(a, b);
            assert!(workload.keys == old.workload(a, b).keys);
            assert!(workload.accept.unwrap() == new.workload(a, b).keys);
        }
        assert!(old.accepted_secret(a).is_none() && old.workload(a, b).accept.is_none());
    }

    #[test]
    fn anything_else_is_malformed() {
        let zeros = format!("{}=", "A".repeat(43));
        for text in [
            "",
            "\n\n",
            "use",
            "short",
            &format!("{ONE}\n{TWO}"),
            &format!("use {ONE}\nuse {TWO}"),
            &format!("keep {ONE}"),
            &format!("use {ONE} {TWO}"),
            &ONE.replace('=', "A"),
            &ONE.replace('/', "_"),
            &zeros,
        ] {
            assert!(matches!(parse(text), Err(Parse::Malformed(_))), "{text:?}");
        }
        assert!(matches!(
            ProjectKey::parse(&[0xff, 0xfe], "shop", Suite::default()),
            Err(Parse::Malformed(_))
        ));
    }

    #[test]
    fn keygen_gives_a_fresh_key_that_parses() {
        let (a, b) = (keygen().unwrap(), keygen().unwrap());
        assert_ne!(*a, *b);
        parse(&a).unwrap();
        assert_eq!(a.len(), KEY_TEXT_LEN);
    }

    #[test]
    fn a_key_file_that_others_can_open_is_refused() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        writeln!(file, "{ONE}").unwrap();
        for (mode, good) in [(0o600, true), (0o400, true), (0o640, false), (0o604, false), (0o620, false)] {
            file.as_file().set_permissions(std::fs::Permissions::from_mode(mode)).unwrap();
            match ProjectKey::read(file.path(), "shop", Suite::default()) {
                Ok(_) => assert!(good, "{mode:o}"),
                Err(error) => {
                    assert!(!good && matches!(error, KeyError::Accessible { .. }), "{mode:o}: {error}");
                    assert_eq!(error.exit(), Exit::Usage);
                }
            }
        }
    }

    #[test]
    fn a_key_file_is_a_short_regular_file() {
        let dir = tempfile::tempdir().unwrap();
        let read = |path: &Path| ProjectKey::read(path, "shop", Suite::default()).unwrap_err();
        assert!(matches!(read(dir.path()), KeyError::NotAFile { .. }));
        assert!(matches!(read(&dir.path().join("none")), KeyError::Read { .. }));
        let long = dir.path().join("long");
        std::fs::write(&long, "\n".repeat(1025)).unwrap();
        std::fs::set_permissions(&long, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert!(matches!(read(&long), KeyError::TooLong { .. }));
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRUSR).unwrap();
        assert!(matches!(read(&fifo), KeyError::NotAFile { .. }));
    }

    #[test]
    fn errors_and_debug_never_show_the_key() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        write!(file, "keep {ONE}").unwrap();
        let error = ProjectKey::read(file.path(), "shop", Suite::default()).unwrap_err();
        assert!(!format!("{error} {error:?} {:?}", parse(ONE)).contains(&ONE[..8]));
    }
}
