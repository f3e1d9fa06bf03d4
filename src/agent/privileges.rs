//! Least privilege: what the agent keeps once its sockets are open.
//!
//! CAP_NET_ADMIN for routes, the guard's sets and marked sockets; CAP_NET_RAW for ARP and raw sockets. Everything else
//! goes, from the bounding set too, before the second thread is made.
//!
//! Source: capabilities(7).

use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set, remove_capability_from_bounding_set,
    set_capabilities,
};

const KEPT: CapabilitySet = CapabilitySet::NET_ADMIN.union(CapabilitySet::NET_RAW);

/// Gives up every other capability of the calling thread, for good.
///
/// # Errors
/// EPERM where the process may not change its bounding set.
pub(super) fn drop_all_but_network() -> Result<(), Errno> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_but_the_network_capabilities_is_left() {
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
}
