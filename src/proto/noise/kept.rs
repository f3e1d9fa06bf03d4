//! Initiations of static keys that the directory does not know yet: the newest of each is kept for a while, so that a
//! new workload which is faster than the directory is answered as soon as the directory names it.

use std::net::SocketAddr;
use std::time::Instant;

use super::PublicKey;
use super::constants::{INITIATION_LEN, KEPT_INITIATIONS, KEPT_TIME};
use super::handshake::Tai64n;

/// At most [`KEPT_INITIATIONS`] messages, oldest first.
#[derive(Default)]
pub(super) struct Kept(Vec<Entry>);

struct Entry {
    public: PublicKey,
    stamp: Tai64n,
    from: SocketAddr,
    at: Instant,
    message: [u8; INITIATION_LEN],
}

impl Kept {
    /// Keeps an initiation that `public` made at `stamp`, unless a newer one of that key is here.
    pub(super) fn keep(
        &mut self,
        public: PublicKey,
        stamp: Tai64n,
        from: SocketAddr,
        message: &[u8; INITIATION_LEN],
        now: Instant,
    ) {
        self.expire(now);
        if let Some(older) = self.0.iter().position(|entry| is_same(entry, &public, from)) {
            if self.0[older].stamp >= stamp {
                return;
            }
            self.0.remove(older);
        }
        if self.0.len() == KEPT_INITIATIONS {
            self.0.remove(0);
        }
        self.0.push(Entry { public, stamp, from, at: now, message: *message });
    }

    /// Takes the initiation of `public` that came over the family of `own`.
    pub(super) fn take(
        &mut self,
        public: &PublicKey,
        own: SocketAddr,
        now: Instant,
    ) -> Option<(SocketAddr, [u8; INITIATION_LEN])> {
        self.expire(now);
        let at = self.0.iter().position(|entry| is_same(entry, public, own))?;
        let entry = self.0.remove(at);
        Some((entry.from, entry.message))
    }

    fn expire(&mut self, now: Instant) {
        self.0.retain(|entry| now.saturating_duration_since(entry.at) < KEPT_TIME);
    }
}

fn is_same(entry: &Entry, public: &PublicKey, address: SocketAddr) -> bool {
    entry.public == *public && entry.from.is_ipv4() == address.is_ipv4()
}
