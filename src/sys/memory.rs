//! Memory of the process as a whole: what is free is given back to the system, and secrets stay out of the swap.
//!
//! A page that is locked is never written to a swap device. Without the right to lock one (RLIMIT_MEMLOCK) secrets are kept
//! all the same: `note_unlocked` says so once. Core dumps are forbidden elsewhere (`main`); the pages here would be left
//! out of one.
//!
//! Source: malloc_trim(3), mlock(2), madvise(2).
#![expect(unsafe_code, reason = "functions of the C library that nix and rustix have no safe call for")]

use std::fmt;
use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Once;

use tracing::warn;
use zeroize::Zeroize as _;

/// Gives back what is free inside the allocator's arenas: glibc by itself returns only what lies at their end.
pub fn give_back() {
    // SAFETY: the function takes the allocator's own locks and touches nothing that is in use.
    #[cfg(target_env = "gnu")]
    let _ = unsafe { libc::malloc_trim(0) };
}

/// `N` bytes for secrets, on a page of their own that is locked into memory, is part of no core dump and of no child
/// process, and is erased when dropped.
pub struct SecretPage<const N: usize> {
    bytes: NonNull<[u8; N]>,
}

// SAFETY: the page has one owner, as a Box has, and the bytes have no interior mutability.
unsafe impl<const N: usize> Send for SecretPage<N> {}
// SAFETY: as above; a shared reference only reads.
unsafe impl<const N: usize> Sync for SecretPage<N> {}

impl<const N: usize> SecretPage<N> {
    /// A page of zeros.
    ///
    /// # Errors
    /// There is no memory.
    pub fn new() -> io::Result<Self> {
        const { assert!(N > 0, "a page that holds nothing") };
        let (protection, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory that is in use.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), N, protection, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let bytes = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("a mapping at address 0"))?;
        let page = Self { bytes };
        page.protect();
        Ok(page)
    }

    fn protect(&self) {
        let start = self.bytes.as_ptr().cast();
        for advice in [libc::MADV_DONTDUMP, libc::MADV_DONTFORK] {
            // SAFETY: the range is the mapping that this object owns. Neither advice changes its content; a child process,
            // which does not have it, has no use for it before it becomes another program.
            // A kernel that knows the advice not leaves the page as it was.
            let _ = unsafe { libc::madvise(start, N, advice) };
        }
        // SAFETY: the range is the mapping that this object owns; locking changes no content.
        if unsafe { libc::mlock(start, N) } != 0 {
            note_unlocked(&io::Error::last_os_error());
        }
    }
}

impl<const N: usize> Deref for SecretPage<N> {
    type Target = [u8; N];

    fn deref(&self) -> &[u8; N] {
        // SAFETY: the mapping is at least N bytes long, readable, aligned to a page, initialised (with zeros by the kernel),
        // and lives as long as this object; nothing else refers to it.
        unsafe { self.bytes.as_ref() }
    }
}

impl<const N: usize> DerefMut for SecretPage<N> {
    fn deref_mut(&mut self) -> &mut [u8; N] {
        // SAFETY: as in `deref`; it is writable, and `self` is borrowed exclusively.
        unsafe { self.bytes.as_mut() }
    }
}

impl<const N: usize> Drop for SecretPage<N> {
    fn drop(&mut self) {
        self.zeroize();
        // SAFETY: the range is the mapping that this object owns, and nothing refers to it after its drop.
        let _ = unsafe { libc::munmap(self.bytes.as_ptr().cast(), N) };
    }
}

impl<const N: usize> fmt::Debug for SecretPage<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretPage(..)")
    }
}

/// Locks the pages where these bytes lie, for as long as they are mapped: what else lies there is locked with them. For
/// the few secrets that stay where they are for the life of the process.
pub fn lock_in_place(bytes: &[u8]) {
    // SAFETY: locking changes no content and needs no alignment; the range is borrowed for the length of the call.
    if unsafe { libc::mlock(bytes.as_ptr().cast(), bytes.len()) } != 0 {
        note_unlocked(&io::Error::last_os_error());
    }
}

/// Says, once in the life of the process, that secrets may be swapped.
fn note_unlocked(error: &io::Error) {
    static SAID: Once = Once::new();
    SAID.call_once(|| {
        warn!(%error, "keys cannot be locked into memory (RLIMIT_MEMLOCK): they may be written to a swap device");
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The flags of the mapping that `address` lies in.
    fn flags(address: usize) -> String {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut found = false;
        for line in maps.lines() {
            if let Some((from, to)) = line.split_whitespace().next().and_then(|range| range.split_once('-'))
                && let (Ok(from), Ok(to)) = (usize::from_str_radix(from, 16), usize::from_str_radix(to, 16))
            {
                found = (from..to).contains(&address);
            }
            if let Some(flags) = line.strip_prefix("VmFlags:").filter(|_| found) {
                return flags.to_owned();
            }
        }
        panic!("no mapping at {address:x}");
    }

    fn has(flags: &str, flag: &str) -> bool {
        flags.split_whitespace().any(|word| word == flag)
    }

    #[test]
    fn promise_11_a_secret_page_is_locked_and_in_no_dump_and_no_child() {
        let mut page = SecretPage::<64>::new().unwrap();
        assert_eq!(*page, [0; 64]);
        page[..3].copy_from_slice(b"abc");
        assert_eq!(page[..4], *b"abc\0");
        assert_eq!(format!("{page:?}"), "SecretPage(..)");
        let flags = flags(page.as_ptr().addr());
        // Each page needs a share of RLIMIT_MEMLOCK, which the test's shell may have set to nothing.
        let may_lock =
            nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_MEMLOCK).unwrap().0 > 0;
        assert_eq!(has(&flags, "lo"), may_lock, "{flags}");
        assert!(has(&flags, "dd") && has(&flags, "dc"), "{flags}");
        // A program is started all the same.
        assert!(std::process::Command::new("/bin/true").status().unwrap().success());
    }

    #[test]
    fn promise_11_bytes_are_locked_where_they_are() {
        let bytes = vec![7_u8; 32];
        lock_in_place(&bytes);
        lock_in_place(&[]);
        let may_lock =
            nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_MEMLOCK).unwrap().0 > 0;
        assert_eq!(has(&flags(bytes.as_ptr().addr()), "lo"), may_lock);
    }
}
