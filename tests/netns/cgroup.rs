//! A memory limit that nothing fits: whoever is moved there ends at its next allocation, by the kernel's OOM killer.
//!
//! May touch: one control group of its own, removed again. Source: cgroups(7), the kernel's cgroup-v1/memory.rst and cgroup-v2.rst.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::unistd::Pid;

/// The control group; removed when dropped.
pub struct NoMemory {
    path: PathBuf,
    kills: &'static str,
}

impl NoMemory {
    /// Makes it, in version 1 or 2 of the interface, whichever has the memory controller.
    ///
    /// # Panics
    /// Neither has.
    pub fn new() -> Self {
        let root = Path::new("/sys/fs/cgroup");
        let (parent, limit, kills) = if root.join("memory/cgroup.procs").exists() {
            (root.join("memory"), "memory.limit_in_bytes", "memory.oom_control")
        } else {
            // Where it is enabled already, nothing changes.
            let _ = fs::write(root.join("cgroup.subtree_control"), "+memory");
            (root.to_owned(), "memory.max", "memory.events")
        };
        let path = parent.join(format!("tencrypt-test-{}", std::process::id()));
        fs::create_dir(&path).unwrap_or_else(|e| panic!("make the control group {}: {e}", path.display()));
        let made = Self { path, kills };
        let limited = fs::write(made.path.join(limit), "0");
        assert!(limited.is_ok(), "the memory controller of {}: {limited:?}", made.path.display());
        made
    }

    /// Moves a process there.
    pub fn take(&self, pid: Pid) {
        fs::write(self.path.join("cgroup.procs"), pid.to_string()).expect("move a process");
    }

    /// How many processes the kernel killed there.
    pub fn kills(&self) -> u64 {
        let text = fs::read_to_string(self.path.join(self.kills)).expect("the kernel's count");
        let count = text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.parse().ok());
        count.unwrap_or_else(|| panic!("no count of kills: {text}"))
    }
}

impl Drop for NoMemory {
    fn drop(&mut self) {
        // Busy until the last of its processes was waited for.
        let end = Instant::now() + Duration::from_secs(5);
        while fs::remove_dir(&self.path).is_err() && self.path.exists() && Instant::now() < end {
            thread::sleep(Duration::from_millis(10));
        }
    }
}
