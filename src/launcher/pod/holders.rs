//! Who keeps a network namespace alive besides us: names, and processes.
//!
//! Our own descriptors keep it alive, too, so nothing inside it would tell. A namespace has a name as long as it is mounted
//! somewhere (`ip netns` mounts it under `/run/netns`), and processes are looked at one by one; agents, and programs that
//! we started, do not count. If only a thread is inside, and its process is elsewhere, that counts as well.
//!
//! May touch: `/proc`, read-only. Source: namespaces(7), proc(5).

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use crate::agent::presence::{is_named, leads_elsewhere};

/// The name of an agent's process.
const AGENT: &str = "tencrypt-agent";

/// Whether neither `path`, nor another name, nor a process leads to the namespace with this device and inode. One about
/// which that cannot be said is not gone.
#[must_use]
pub fn is_gone(path: &Path, identity: (u64, u64)) -> bool {
    leads_elsewhere(path, identity) && is_held(identity).is_ok_and(|held| !held)
}

/// Whether a name or a process leads to the namespace with this device and inode.
///
/// # Errors
/// None was found, and not everything could be looked at.
pub fn is_held(identity: (u64, u64)) -> io::Result<bool> {
    if is_named(identity)? {
        return Ok(true);
    }
    let mut others = Vec::new();
    let mut unseen = None;
    for process in numbers(Path::new("/proc"))? {
        if process == std::process::id() || is_ours(process) {
            continue;
        }
        match is_inside(&format!("/proc/{process}/ns/net"), identity) {
            Ok(true) => return Ok(true),
            Ok(false) => others.push(process),
            // Some hosts hide it; it is in the host's namespace.
            Err(_) if process == 1 => {}
            Err(error) => unseen = Some(error),
        }
    }
    // Most processes have no thread in another namespace: they are looked at only before the last word.
    for process in others {
        let tasks = format!("/proc/{process}/task");
        // A process that has ended meanwhile has no threads.
        for thread in numbers(Path::new(&tasks)).unwrap_or_default() {
            match is_inside(&format!("{tasks}/{thread}/ns/net"), identity) {
                Ok(true) => return Ok(true),
                Ok(false) => {}
                Err(error) => unseen = Some(error),
            }
        }
    }
    unseen.map_or(Ok(false), Err)
}

/// The entries of a folder of /proc that are numbers.
fn numbers(folder: &Path) -> io::Result<Vec<u32>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(folder)? {
        numbers.extend(entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()));
    }
    Ok(numbers)
}

/// Whether `link`, of a process or thread, leads to the namespace. One that has ended is in none.
fn is_inside(link: &str, identity: (u64, u64)) -> io::Result<bool> {
    let look = || match fs::metadata(link) {
        Ok(found) => Ok((found.dev(), found.ino()) == identity),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(false),
        Err(error) => Err(error),
    };
    // The kernel refuses (EACCES) to look at one that ends just now; the second time it is not there.
    look().or_else(|_| look())
}

/// Whether it is an agent, or a program that this launcher started inside the pod. An agent stays in our mount namespace: a
/// process of the pod that calls itself so does not hide.
fn is_ours(process: u32) -> bool {
    let read = |file: &str| fs::read_to_string(format!("/proc/{process}/{file}")).unwrap_or_default();
    let stat = read("stat");
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    if after_name.split_whitespace().nth(1) == Some(&std::process::id().to_string()) {
        return true;
    }
    let mounts =
        |process: &str| fs::metadata(format!("/proc/{process}/ns/mnt")).map(|found| found.ino()).ok();
    read("comm").trim_end() == AGENT && mounts(&process.to_string()) == mounts("self")
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{BufRead as _, BufReader};
    use std::process::{Command, Stdio};
    use std::thread;

    use nix::sched::{CloneFlags, unshare};

    use super::*;

    fn identity(link: &str) -> (u64, u64) {
        let found = fs::metadata(link).unwrap();
        (found.dev(), found.ino())
    }

    #[test]
    fn our_own_namespace_is_held_and_one_that_was_never_there_is_not() {
        // The test's parent is in the same one.
        let own = identity("/proc/self/ns/net");
        assert!(is_held(own).unwrap());
        assert!(!is_gone(Path::new("/nowhere"), own));
        // Without privilege the processes of others cannot be looked at, and nothing can be said.
        let held = is_held((own.0, 1));
        assert!(held.is_ok_and(|held| !held) || !nix::unistd::geteuid().is_root());
    }

    #[test]
    fn a_namespace_that_only_our_descriptor_and_our_children_keep_alive_is_not_held() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let (descriptor, found, mut child) = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
            (File::open("/proc/thread-self/ns/net").unwrap(), identity("/proc/thread-self/ns/net"), child)
        })
        .join()
        .unwrap();
        // A child that has not become another program yet is inside all the same.
        assert!(is_inside(&format!("/proc/{}/ns/net", child.id()), found).unwrap());
        assert!(!is_held(found).unwrap());
        assert!(is_gone(Path::new("/nowhere"), found));
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(!is_inside(&format!("/proc/{}/ns/net", child.id()), found).unwrap());
        drop(descriptor);
    }

    #[test]
    fn a_process_of_somebody_else_inside_holds_a_namespace() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        // The shell is our child, the one inside is the shell's.
        let mut shell = Command::new("sh")
            .args(["-c", "unshare -n sh -c 'echo $$; read line'; true"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut inside = String::new();
        BufReader::new(shell.stdout.take().unwrap()).read_line(&mut inside).unwrap();
        let found = identity(&format!("/proc/{}/ns/net", inside.trim()));
        assert!(is_held(found).unwrap());
        drop(shell.stdin.take());
        shell.wait().unwrap();
        assert!(!is_held(found).unwrap());
    }
}
