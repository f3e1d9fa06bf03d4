//! The allocator's free memory, given back to the system.
#![cfg_attr(target_env = "gnu", expect(unsafe_code, reason = "a function of the C library"))]

/// Gives back what is free inside the allocator's arenas: glibc by itself returns only what lies at their end.
pub fn give_back() {
    // SAFETY: the function takes the allocator's own locks and touches nothing that is in use.
    #[cfg(target_env = "gnu")]
    let _ = unsafe { libc::malloc_trim(0) };
}
