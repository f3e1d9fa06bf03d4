//! Least privilege: what a launcher keeps from its start on, so that a fault of it reaches less of the host.
//!
//! 1. `check`: the capabilities of [`KEPT`] are there; those that are missing are named
//! 2. `confine` gives up all others, from the bounding set too: programs that the launcher starts (nft, the agent) have
//!    no more than it has
//! 3. no new privileges: a set-user-ID program that is started gains nothing
//! 4. system calls: no process is traced or read, nothing is mounted, no kernel, module, clock, key ring or swap is
//!    touched, and no namespace made or entered but those of networks (seccomp). They fail with EPERM; the rest passes
//!
//! All of it before the second thread is made, and for good. The agent starts under the same limits and draws its own,
//! narrower ones.
//!
//! Source: capabilities(7), seccomp(2).

use std::collections::BTreeMap;

use anyhow::{Context as _, anyhow};
use libc::c_long;
use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, remove_capability_from_bounding_set, set_capabilities,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

use super::program;
use crate::exit::Failure;

/// One capability that a launcher keeps.
#[derive(Clone, Copy, Debug)]
pub struct Capability {
    /// The kernel's number of it, as a set.
    set: CapabilitySet,
    /// Its name, as in capabilities(7).
    pub name: &'static str,
    /// What the launcher, or a program that it starts, needs it for.
    pub reason: &'static str,
}

/// The capabilities of a launcher: this list is the only one. Without any of them the step that it names fails.
pub const KEPT: [Capability; 7] = [
    Capability {
        set: CapabilitySet::SYS_ADMIN,
        name: "CAP_SYS_ADMIN",
        reason: "enter the pod's network namespace, and make the DNS helper's",
    },
    Capability {
        set: CapabilitySet::SYS_PTRACE,
        name: "CAP_SYS_PTRACE",
        reason: "look at namespaces and root folders of processes of other users, and at agents, which are not dumpable",
    },
    Capability {
        set: CapabilitySet::NET_ADMIN,
        name: "CAP_NET_ADMIN",
        reason: "load the guard; the agent's routes, sets and marked sockets",
    },
    Capability {
        set: CapabilitySet::NET_RAW,
        name: "CAP_NET_RAW",
        reason: "the agent's ARP socket and raw sockets",
    },
    Capability {
        set: CapabilitySet::NET_BIND_SERVICE,
        name: "CAP_NET_BIND_SERVICE",
        reason: "listen on port 53 in the DNS helper's namespace",
    },
    Capability {
        set: CapabilitySet::SETPCAP,
        name: "CAP_SETPCAP",
        reason: "take capabilities out of the bounding set, here and in the agent",
    },
    Capability {
        set: CapabilitySet::DAC_READ_SEARCH,
        name: "CAP_DAC_READ_SEARCH",
        reason: "read key file, directory and resolv.conf in folders of another user",
    },
];

/// [`KEPT`] as one set.
fn kept() -> CapabilitySet {
    KEPT.iter().fold(CapabilitySet::empty(), |set, capability| set | capability.set)
}

/// [`KEPT`] as /proc/PID/status shows a set.
#[must_use]
pub fn kept_bits() -> u64 {
    kept().bits()
}

/// Without these nothing would work; said early and once.
///
/// # Errors
/// Some are missing.
pub(super) fn check() -> Result<(), Failure> {
    let sets = capabilities(None).context("cannot read the capabilities").map_err(Failure::kernel)?;
    let missing = missing(sets.effective);
    if missing.is_empty() {
        return Ok(());
    }
    Err(Failure::kernel(anyhow!("needs {}: run as root", missing.join(", "))))
}

fn missing(effective: CapabilitySet) -> Vec<&'static str> {
    KEPT.iter().filter(|kept| !effective.contains(kept.set)).map(|kept| kept.name).collect()
}

/// Gives up everything that a launcher does not need, for the calling thread and those that it makes.
///
/// # Errors
/// The kernel refused, or with what is left the agent's program could not be started.
pub(super) fn confine() -> Result<(), Failure> {
    drop_all_but_kept().context("cannot give up capabilities").map_err(Failure::kernel)?;
    nix::sys::prctl::set_no_new_privs().context("cannot give up new privileges").map_err(Failure::kernel)?;
    restrict_system_calls().context("cannot give up system calls").map_err(Failure::kernel)?;
    program::check_own()
        .context("root may not execute this program, its owner alone may: run `chmod a+x` on it")
        .map_err(Failure::kernel)
}

fn drop_all_but_kept() -> Result<(), Errno> {
    let kept = kept();
    for bit in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        if kept.contains(capability) {
            continue;
        }
        match remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // The kernel knows no capability of this number, so none above it.
            Err(Errno::INVAL) => break,
            Err(error) => return Err(error),
        }
    }
    // What is taken out of the inheritable set leaves the ambient one with it. Those that stay are there for programs
    // that a launcher starts whose user is not root.
    let inheritable = capabilities(None)?.inheritable & kept;
    set_capabilities(None, CapabilitySets { effective: kept, permitted: kept, inheritable })
}

/// Other processes; mounts and roots; the kernel itself and its wider surfaces; the clock; the host's name.
const FORBIDDEN: [c_long; 48] = [
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_kcmp,
    libc::SYS_pidfd_getfd,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_mount_setattr,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_open_by_handle_at,
    libc::SYS_mknodat,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_fanotify_init,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_quotactl,
    SYS_QUOTACTL_FD,
    libc::SYS_syslog,
    libc::SYS_vhangup,
    libc::SYS_personality,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
];

/// The same number everywhere; libc does not have it for every system.
const SYS_QUOTACTL_FD: c_long = 443;

/// What is only there, or only named by libc, on this architecture.
#[cfg(target_arch = "x86_64")]
const FORBIDDEN_HERE: [c_long; 6] = [
    libc::SYS_kexec_file_load,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_modify_ldt,
    libc::SYS_mknod,
    libc::SYS_uselib,
];
#[cfg(not(target_arch = "x86_64"))]
const FORBIDDEN_HERE: [c_long; 0] = [];

/// x86_64 again, by other numbers (x32), where the kernel has it: nothing of it is used. The filter cannot tell it apart.
const X32: c_long = 0x4000_0000;
/// The calls that have another number there, not only that bit.
const X32_CALLS: std::ops::Range<c_long> = 512..548;

/// Kinds of namespaces that clone(2) could make a process in; none is made that way.
const NAMESPACES: [libc::c_int; 7] = [
    libc::CLONE_NEWNS,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWCGROUP,
    libc::CLONE_NEWNET,
];

fn restrict_system_calls() -> anyhow::Result<()> {
    let when =
        |argument, operator, value| SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value);
    let mut rules: BTreeMap<c_long, Vec<SeccompRule>> =
        FORBIDDEN.into_iter().chain(FORBIDDEN_HERE).map(|call| (call, Vec::new())).collect();
    let network = u64::from(libc::CLONE_NEWNET.cast_unsigned());
    for (call, argument) in [(libc::SYS_setns, 1), (libc::SYS_unshare, 0)] {
        rules.insert(call, vec![SeccompRule::new(vec![when(argument, SeccompCmpOp::Ne, network)?])?]);
    }
    let makes = NAMESPACES.map(|kind| {
        let bit = u64::from(kind.cast_unsigned());
        SeccompRule::new(vec![when(0, SeccompCmpOp::MaskedEq(bit), bit)?])
    });
    rules.insert(libc::SYS_clone, makes.into_iter().collect::<Result<_, _>>()?);
    if cfg!(target_arch = "x86_64") {
        let calls: Vec<_> = rules.keys().copied().chain(X32_CALLS).collect();
        rules.extend(calls.into_iter().map(|call| (call | X32, Vec::new())));
    }
    forbid(rules, Errno::PERM)?;
    // Its flags are out of a filter's reach; without it, C libraries fall back to clone(2).
    forbid(BTreeMap::from([(libc::SYS_clone3, Vec::new())]), Errno::NOSYS)
}

fn forbid(rules: BTreeMap<c_long, Vec<SeccompRule>>, errno: Errno) -> anyhow::Result<()> {
    let refusal = SeccompAction::Errno(errno.raw_os_error().unsigned_abs());
    let filter =
        SeccompFilter::new(rules, SeccompAction::Allow, refusal, std::env::consts::ARCH.try_into()?)?;
    Ok(seccompiler::apply_filter(&BpfProgram::try_from(filter)?)?)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::process::Command;

    use nix::errno::Errno as NixErrno;
    use nix::sched::{CloneFlags, setns, unshare};

    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        let all = kept();
        assert!(missing(all).is_empty());
        assert_eq!(
            missing(all - CapabilitySet::NET_RAW - CapabilitySet::SETPCAP),
            ["CAP_NET_RAW", "CAP_SETPCAP"]
        );
        assert_eq!(missing(CapabilitySet::empty()).len(), KEPT.len());
        assert!(KEPT.iter().all(|kept| kept.set.bits().is_power_of_two() && !kept.reason.is_empty()));
        assert_eq!(all.bits().count_ones() as usize, KEPT.len());
    }

    #[test]
    fn promise_11_nothing_but_the_listed_capabilities_is_left() {
        let left = std::thread::spawn(|| drop_all_but_kept().map(|()| capabilities(None)));
        match left.join().expect("the thread ends") {
            // Without privilege there is nothing to give up, and the kernel says so.
            Err(error) => assert_eq!(error, Errno::PERM),
            Ok(sets) => {
                let sets = sets.expect("capabilities of this thread");
                assert_eq!((sets.effective, sets.permitted), (kept(), kept()));
                assert!(kept().contains(sets.inheritable));
            }
        }
    }

    #[test]
    fn promise_11_a_launcher_starts_programs_and_enters_network_namespaces_and_little_else() {
        let confined = std::thread::spawn(|| {
            nix::sys::prctl::set_no_new_privs().unwrap();
            restrict_system_calls().unwrap();
            let refused = |outcome: nix::Result<()>| assert_eq!(outcome, Err(NixErrno::EPERM));
            refused(nix::unistd::chroot("/"));
            refused(unshare(CloneFlags::CLONE_NEWUTS));
            refused(unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS));
            refused(setns(File::open("/proc/self/ns/uts").unwrap(), CloneFlags::empty()));
            // A program that is started is under the same limits.
            for refused in
                ["unshare -m true", "mount -t tmpfs none /tmp", "chroot / true", "mknod /tmp/never c 1 3"]
            {
                assert!(!Command::new("sh").args(["-c", refused]).status().unwrap().success(), "{refused}");
            }
            refused(
                rustix::process::pidfd_open(rustix::process::getpid(), rustix::process::PidfdFlags::empty())
                    .and_then(|process| {
                        rustix::process::pidfd_getfd(process, 0, rustix::process::PidfdGetfdFlags::empty())
                    })
                    .map(drop)
                    .map_err(|error| NixErrno::from_raw(error.raw_os_error())),
            );
            // And what it needs.
            assert!(Command::new("/bin/true").status().unwrap().success());
            std::thread::spawn(|| ()).join().unwrap();
            if nix::unistd::geteuid().is_root() {
                let own = File::open("/proc/thread-self/ns/net").unwrap();
                unshare(CloneFlags::CLONE_NEWNET).unwrap();
                setns(own, CloneFlags::CLONE_NEWNET).unwrap();
            }
        });
        confined.join().unwrap();
    }
}
