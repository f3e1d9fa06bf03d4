//! Least privilege: what the agent keeps once its sockets are open, so that who takes it over has little more than the pod.
//!
//! 1. capabilities: CAP_NET_ADMIN for routes, the guard's sets and marked sockets; CAP_NET_RAW for ARP and raw sockets.
//!    Everything else goes, from the bounding set too
//! 2. files: /proc is read, /dev/net/tun opened for a new `tenc0`, the pod's runtime files are removed. No other file is
//!    opened or changed, root's own included; and no process outside is traced or, from Linux 6.12 on, signalled (Landlock)
//! 3. system calls: no program or process is started, no other process touched, no namespace, mount, module, mode, owner or
//!    attribute changed, and no socket made but of the families in use: none of unix, so other agents are out of reach
//!    (seccomp)
//!
//! All of it before the second thread is made, and for good. What is forbidden in 3 fails with EPERM; the rest passes, so
//! that a C library that uses another call for the same thing still works.
//!
//! Source: capabilities(7), landlock(7), seccomp(2).

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context as _;
use landlock::{
    ABI, Access as _, AccessFs, PathBeneath, PathFd, Ruleset, RulesetAttr as _, RulesetCreatedAttr as _,
    RulesetStatus, Scope,
};
use libc::c_long;
use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set, remove_capability_from_bounding_set,
    set_capabilities,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};
use tracing::warn;

const KEPT: CapabilitySet = CapabilitySet::NET_ADMIN.union(CapabilitySet::NET_RAW);

/// The newest rules of Landlock that are asked for; an older kernel applies those it has.
const LANDLOCK: ABI = ABI::V6;

/// Programs and processes; other processes; namespaces and mounts; what Landlock leaves open of files; the kernel itself, and
/// its wider surfaces.
const FORBIDDEN: [c_long; 61] = [
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_kcmp,
    libc::SYS_kill,
    libc::SYS_tkill,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_tgsigqueueinfo,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_send_signal,
    libc::SYS_unshare,
    libc::SYS_setns,
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
    libc::SYS_truncate,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    SYS_FCHMODAT2,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_utimensat,
    libc::SYS_setxattr,
    libc::SYS_lsetxattr,
    libc::SYS_fsetxattr,
    libc::SYS_removexattr,
    libc::SYS_lremovexattr,
    libc::SYS_fremovexattr,
    libc::SYS_socketpair,
    libc::SYS_setpriority,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_reboot,
    libc::SYS_acct,
    libc::SYS_quotactl,
];

/// The same number everywhere; libc does not have it for every system.
const SYS_FCHMODAT2: c_long = 452;

/// What is only there, or only named by libc, on this architecture.
#[cfg(target_arch = "x86_64")]
const FORBIDDEN_HERE: [c_long; 11] = [
    libc::SYS_fork,
    libc::SYS_vfork,
    libc::SYS_chmod,
    libc::SYS_chown,
    libc::SYS_lchown,
    libc::SYS_utime,
    libc::SYS_utimes,
    libc::SYS_futimesat,
    libc::SYS_kexec_file_load,
    libc::SYS_iopl,
    libc::SYS_ioperm,
];
#[cfg(not(target_arch = "x86_64"))]
const FORBIDDEN_HERE: [c_long; 0] = [];

/// x86_64 again, by other numbers (x32), where the kernel has it: nothing of it is used. The filter cannot tell it apart.
const X32: c_long = 0x4000_0000;
/// The calls that have another number there, not only that bit.
const X32_CALLS: std::ops::Range<c_long> = 512..548;

/// Families of the sockets that the agent makes.
const FAMILIES: [libc::c_int; 4] = [libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK, libc::AF_PACKET];

/// Gives up everything that the agent does not need any more, for the calling thread and those that it makes. `runtime` is
/// the folder of the runtime files.
///
/// # Errors
/// The kernel refused. A kernel without Landlock is no error: it is warned of.
pub(super) fn confine(runtime: &Path) -> anyhow::Result<()> {
    drop_all_but_network().context("give up capabilities")?;
    if !restrict_files(runtime).context("give up the file system")? {
        warn!("this kernel has no Landlock: an agent that is taken over can open root's files");
    }
    restrict_system_calls().context("give up system calls")
}

fn drop_all_but_network() -> Result<(), Errno> {
    for bit in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        if KEPT.contains(capability) {
            continue;
        }
        match remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // The kernel knows no capability of this number, so none above it.
            Err(Errno::INVAL) => break,
            Err(error) => return Err(error),
        }
    }
    clear_ambient_capability_set()?;
    set_capabilities(
        None,
        CapabilitySets { effective: KEPT, permitted: KEPT, inheritable: CapabilitySet::empty() },
    )
}

/// Sets no_new_privs too. Whether the kernel can.
fn restrict_files(runtime: &Path) -> anyhow::Result<bool> {
    let mut rules = Ruleset::default()
        .handle_access(AccessFs::from_all(LANDLOCK))?
        .scope(Scope::from_all(LANDLOCK))?
        .create()?;
    let tun = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev;
    for (path, access) in [
        (Path::new("/proc"), AccessFs::ReadFile.into()),
        (Path::new("/dev/net/tun"), tun),
        (runtime, AccessFs::RemoveFile.into()),
    ] {
        rules = rules.add_rule(PathBeneath::new(PathFd::new(path)?, access))?;
    }
    Ok(rules.restrict_self()?.ruleset != RulesetStatus::NotEnforced)
}

fn restrict_system_calls() -> anyhow::Result<()> {
    let when =
        |argument, operator, value| SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value);
    let no_thread = when(0, SeccompCmpOp::MaskedEq(libc::CLONE_THREAD as u64), 0)?;
    let another_process = when(0, SeccompCmpOp::Ne, u64::from(std::process::id()))?;
    let another_family =
        FAMILIES.into_iter().map(|family| when(0, SeccompCmpOp::Ne, u64::from(family.unsigned_abs())));
    let mut rules: BTreeMap<c_long, Vec<SeccompRule>> =
        FORBIDDEN.into_iter().chain(FORBIDDEN_HERE).map(|call| (call, Vec::new())).collect();
    rules.insert(libc::SYS_clone, vec![SeccompRule::new(vec![no_thread])?]);
    // What abort(3) of glibc sends itself passes; that of musl ends the process in another way.
    rules.insert(libc::SYS_tgkill, vec![SeccompRule::new(vec![another_process])?]);
    rules.insert(libc::SYS_prlimit64, vec![SeccompRule::new(vec![when(0, SeccompCmpOp::Ne, 0)?])?]);
    rules.insert(libc::SYS_socket, vec![SeccompRule::new(another_family.collect::<Result<_, _>>()?)?]);
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
    use super::*;
    use std::fs::File;
    use std::io::ErrorKind::PermissionDenied;
    use std::net::UdpSocket;
    use std::os::unix::fs::PermissionsExt as _;
    use std::os::unix::net::UnixDatagram;
    use std::process::Command;

    #[test]
    fn promise_11_nothing_but_the_network_capabilities_is_left() {
        let left = std::thread::spawn(|| drop_all_but_network().map(|()| rustix::thread::capabilities(None)));
        match left.join().expect("the thread ends") {
            // Without privilege there is nothing to give up, and the kernel says so.
            Err(error) => assert_eq!(error, Errno::PERM),
            Ok(sets) => {
                let sets = sets.expect("capabilities of this thread");
                assert_eq!((sets.effective, sets.permitted), (KEPT, KEPT));
            }
        }
    }

    #[test]
    fn promise_11_an_agent_opens_no_file_of_root_starts_nothing_and_reaches_no_other_process() {
        let dir = tempfile::tempdir().unwrap();
        let [runtime, secret] = ["7.sock", "secret"].map(|name| dir.path().join(name));
        let folder = tempfile::tempdir_in(dir.path()).unwrap();
        let inside = folder.path().join("7.state");
        for file in [&runtime, &secret, &inside] {
            std::fs::write(file, "").unwrap();
        }
        let path = folder.path().to_owned();
        let confined = std::thread::spawn(move || {
            let open = File::create(&secret).unwrap();
            let has_landlock = restrict_files(&path).unwrap();
            restrict_system_calls().unwrap();
            let denied = |error: std::io::Error| assert_eq!(error.kind(), PermissionDenied, "{error}");
            if has_landlock {
                for file in [&secret, Path::new("/etc/passwd"), &inside] {
                    denied(File::open(file).unwrap_err());
                    denied(File::options().write(true).open(file).unwrap_err());
                }
                denied(std::fs::write(path.join("new"), "").unwrap_err());
                denied(std::fs::remove_file(&secret).unwrap_err());
                std::thread::spawn(move || denied(File::open("/etc/passwd").unwrap_err())).join().unwrap();
            }
            let mode = std::fs::Permissions::from_mode(0o777);
            denied(std::fs::set_permissions(&secret, mode.clone()).unwrap_err());
            denied(open.set_permissions(mode).unwrap_err());
            denied(nix::unistd::truncate(&secret, 0).unwrap_err().into());
            denied(UnixDatagram::pair().unwrap_err());
            denied(Command::new("/bin/true").spawn().unwrap_err());
            denied(UnixDatagram::unbound().unwrap_err());
            let parent = rustix::process::getppid().unwrap();
            denied(rustix::process::test_kill_process(parent).unwrap_err().into());
            denied(
                rustix::process::pidfd_open(parent, rustix::process::PidfdFlags::empty()).unwrap_err().into(),
            );
            // And what it needs.
            std::fs::remove_file(&inside).unwrap();
            assert!(!std::fs::read_to_string("/proc/thread-self/net/dev").unwrap().is_empty());
            if Path::new("/dev/net/tun").exists() {
                File::options().read(true).write(true).open("/dev/net/tun").unwrap();
            }
            UdpSocket::bind("127.0.0.1:0").unwrap();
            open.set_len(1).unwrap();
        });
        confined.join().unwrap();
    }
}
