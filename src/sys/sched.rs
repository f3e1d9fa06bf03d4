//! The time slice of a thread (`sched_setattr`), which neither nix nor rustix can set.
//!
//! Source: sched_setattr(2), Documentation/scheduler/sched-eevdf.rst (a runtime is a request for a slice since Linux 6.12).
#![expect(unsafe_code, reason = "libc has no wrapper of the call")]

use std::io;
use std::time::Duration;

use rustix::process::getpriority_process;

/// `SCHED_FLAG_KEEP_POLICY` of linux/sched.h.
const KEEP_POLICY: u64 = 0x08;

/// `struct sched_attr` in its first version.
#[repr(C)]
#[derive(Default)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

/// Asks for a slice of the calling thread, 0.1 to 100 ms: how long it runs before another that waits does. Its share of the
/// processor stays what it is. Kernels before 6.12 take no notice.
///
/// # Errors
/// The kernel's.
pub fn set_slice(slice: Duration) -> io::Result<()> {
    let attributes = SchedAttr {
        size: u32::try_from(size_of::<SchedAttr>()).expect("48 bytes"),
        // Where an operator chose a real-time policy, the kernel refuses the rest of this.
        flags: KEEP_POLICY,
        // What the call would otherwise change.
        nice: getpriority_process(None)?,
        runtime: u64::try_from(slice.as_nanos()).unwrap_or(u64::MAX),
        ..SchedAttr::default()
    };
    // SAFETY: the pointer leads to a `sched_attr` that bears its own size and outlives the call, which only reads it.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_can_be_asked_for_and_changes_no_priority() {
        let before = getpriority_process(None).unwrap();
        set_slice(Duration::from_micros(300)).unwrap();
        assert_eq!(getpriority_process(None).unwrap(), before);
    }
}
