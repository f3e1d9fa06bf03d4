//! Running a program inside another network namespace.
#![expect(unsafe_code, reason = "code between fork and exec")]

use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sched::{CloneFlags, setns};

/// Makes `command` run in the network namespace `netns`; all its other namespaces stay the caller's.
pub fn in_network_namespace(command: &mut Command, netns: OwnedFd) -> &mut Command {
    // SAFETY: between fork and exec only the async-signal-safe setns is called, on a descriptor that the closure owns;
    // the conversion of its error number allocates nothing.
    unsafe { command.pre_exec(move || Ok(setns(&netns, CloneFlags::CLONE_NEWNET)?)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_network_namespace_starts_no_program() {
        let not_a_namespace = std::fs::File::open("/").unwrap();
        let mut command = Command::new("true");
        assert!(in_network_namespace(&mut command, not_a_namespace.into()).status().is_err());
    }
}
