//! Between fork and exec: the namespace that a program runs in, and the descriptors that it inherits.
#![expect(unsafe_code, reason = "code between fork and exec")]

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sched::{CloneFlags, setns};
use rustix::io::{FdFlags, fcntl_setfd};

/// Makes `command` run in the network namespace `netns`; all its other namespaces stay the caller's.
pub fn in_network_namespace(command: &mut Command, netns: OwnedFd) -> &mut Command {
    // SAFETY: between fork and exec only the async-signal-safe setns is called, on a descriptor that the closure owns;
    // the conversion of its error number allocates nothing.
    unsafe { command.pre_exec(move || Ok(setns(&netns, CloneFlags::CLONE_NEWNET)?)) }
}

/// Makes `command` inherit `descriptors` under their present numbers. They stay close-on-exec in this process, so that a
/// program that another thread starts at the same time does not inherit them. They are closed here with `command`.
pub fn inherit(command: &mut Command, descriptors: Vec<OwnedFd>) -> &mut Command {
    let clear = move || {
        let mut open = descriptors.iter();
        open.try_for_each(|fd| fcntl_setfd(fd, FdFlags::empty()).map_err(io::Error::from))
    };
    // SAFETY: between fork and exec only the async-signal-safe fcntl is called, on descriptors that the closure owns; the
    // conversion of its error number allocates nothing.
    unsafe { command.pre_exec(clear) }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd as _;

    use super::*;

    #[test]
    fn a_child_inherits_what_is_named_and_a_program_started_meanwhile_does_not() {
        let file = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let (given, kept) = (file(), file());
        let numbers = [given.as_raw_fd(), kept.as_raw_fd()];
        let has = |command: &mut Command, number: i32| {
            let test = format!("test -e /proc/self/fd/{number}");
            command.args(["-c", &test]).status().unwrap().success()
        };
        let mut command = Command::new("sh");
        inherit(&mut command, vec![given]);
        assert!(has(&mut command, numbers[0]));
        assert!(!has(&mut Command::new("sh"), numbers[0]), "the parent's descriptor is close-on-exec");
        let mut command = Command::new("sh");
        inherit(&mut command, vec![file()]);
        assert!(!has(&mut command, numbers[1]));
    }

    #[test]
    fn what_is_no_network_namespace_starts_no_program() {
        let not_a_namespace = std::fs::File::open("/").unwrap();
        let mut command = Command::new("true");
        assert!(in_network_namespace(&mut command, not_a_namespace.into()).status().is_err());
    }
}
