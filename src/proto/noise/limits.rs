//! What handshake messages may cost us: when we are under load, and how much each source may then ask for.
//!
//! 1. [`Limits::note`] counts each message that would cost a Diffie-Hellman; more than [`LOAD`] allows is load, until a
//!    second has passed without
//! 2. under load, a message that does not prove its source is dropped, and [`Limits::take_reply`] says whether a cookie
//!    answers it: a cookie reply costs a system call, about what ten dropped messages cost together
//! 3. one that proves it is consumed as long as [`Limits::take_handshake`] allows its source
//!
//! What proves nothing takes replies, and nothing else, from the name that it bears. An address of the directory shares
//! nothing with strangers, whatever they forge or own: a flood from all the world keeps no peer from its cookie, nor from
//! being answered. Only one that bears the very address of a peer takes that peer's replies; whoever can forge a neighbour's
//! address on its link can cut it off without us.
//!
//! Memory: one entry of 56 bytes per peer, and four tables of [`TABLE`] strangers, about 0.7 MB, only under load. A full
//! table forgets those who were longest idle: a stranger then has a full bucket again, and shuts nobody out. Nothing of
//! it is for a successor, which finds out by itself whether it is under load.
//! Source: WireGuard paper section 5.3.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

use foldhash::quality::FixedState;

/// Handshake messages in normal operation. An unauthenticated one costs 0.1 ms, so a quarter of a thousand each second is
/// 3 % of a core at most; what is allowed at once is more than 200 agents send that start together.
const LOAD: Rate = Rate { burst: 512, every: Duration::from_nanos(3_906_250) };
/// How long load lasts after the last message that was too many.
const LOAD_LASTS: Duration = Duration::from_secs(1);
/// Handshakes of a source that proved itself: DESIGN's 20/s, 5 at once. A peer sends four in its first second.
const HANDSHAKES: Rate = Rate { burst: 5, every: Duration::from_millis(50) };
/// Cookie replies to one peer: each of its first retries could lose one, and so could our own responses to it.
const REPLIES_PER_PEER: Rate = Rate { burst: 5, every: Duration::from_millis(200) };
/// Cookie replies to one stranger: the first, and one for the first lost. A thousand that never use theirs get 500/s, and
/// leave three quarters of [`STRANGER_REPLIES`] to others.
const REPLIES_PER_STRANGER: Rate = Rate { burst: 2, every: Duration::from_secs(2) };
/// Cookie replies to all peers together, and to all strangers together: what a thousand sources ask for at once. At about
/// 10 us each both are at most 4 % of a core, however fast the flood is.
const PEER_REPLIES: Rate = Rate { burst: 2_000, every: Duration::from_micros(500) };
const STRANGER_REPLIES: Rate = PEER_REPLIES;
/// Strangers in each half of a table.
const TABLE: usize = 2_048;
/// How long a stranger is remembered at least, unless [`TABLE`] others come: its buckets are full again by then.
const TABLE_TIME: Duration = Duration::from_secs(4);

/// How much a bucket holds, and how long one token takes to come back.
struct Rate {
    burst: u32,
    every: Duration,
}

/// A token bucket: the moment at which it is full again, if it is not.
#[derive(Clone, Copy, Default)]
struct Bucket(Option<Instant>);

impl Bucket {
    /// When it is full again once a token is taken; `None` where there is none.
    fn after(self, rate: &Rate, now: Instant) -> Option<Instant> {
        let full = self.0.map_or(now, |full| full.max(now)) + rate.every;
        (full.saturating_duration_since(now) <= rate.every * rate.burst).then_some(full)
    }

    fn has(self, rate: &Rate, now: Instant) -> bool {
        self.after(rate, now).is_some()
    }

    fn take(&mut self, rate: &Rate, now: Instant) -> bool {
        let after = self.after(rate, now);
        self.0 = after.or(self.0);
        after.is_some()
    }
}

/// The limits of one transport.
pub(super) struct Limits {
    gauge: Bucket,
    loaded_until: Option<Instant>,
    peers: HashMap<IpAddr, PeerBuckets, FixedState>,
    peer_replies: Bucket,
    stranger_replies: Bucket,
    /// By exact address: whoever forges one can forge another.
    replies: Strangers,
    /// By the network that belongs to one owner.
    handshakes: Strangers,
}

#[derive(Default)]
struct PeerBuckets {
    replies: Bucket,
    handshakes: Bucket,
}

impl Limits {
    /// `seed` is random: no sender chooses what collides.
    pub(super) fn new(seed: u64) -> Self {
        let state = FixedState::with_seed(seed);
        Self {
            gauge: Bucket::default(),
            loaded_until: None,
            peers: HashMap::with_hasher(state.clone()),
            peer_replies: Bucket::default(),
            stranger_replies: Bucket::default(),
            replies: Strangers::new(state.clone()),
            handshakes: Strangers::new(state),
        }
    }

    /// The directory names this address: it is no stranger.
    pub(super) fn add_peer(&mut self, address: IpAddr) {
        self.peers.entry(address).or_default();
    }

    /// It does not any more.
    pub(super) fn remove_peer(&mut self, address: IpAddr) {
        self.peers.remove(&address);
    }

    /// A message came that costs a Diffie-Hellman.
    pub(super) fn note(&mut self, now: Instant) {
        if !self.gauge.take(&LOAD, now) {
            self.loaded_until = Some(now + LOAD_LASTS);
        }
    }

    /// Whether sources have to prove themselves.
    pub(super) fn is_loaded(&mut self, now: Instant) -> bool {
        if self.loaded_until.take_if(|until| *until <= now).is_some() {
            self.replies.clear();
            self.handshakes.clear();
        }
        self.loaded_until.is_some()
    }

    /// Whether `source`, which proves itself, may have a message consumed now.
    pub(super) fn take_handshake(&mut self, source: IpAddr, now: Instant) -> bool {
        match self.peers.get_mut(&source) {
            Some(peer) => peer.handshakes.take(&HANDSHAKES, now),
            None => {
                let owner = network(source);
                let mut bucket = self.handshakes.of(&owner, now);
                let taken = bucket.take(&HANDSHAKES, now);
                self.handshakes.set(owner, bucket, now);
                taken
            }
        }
    }

    /// Whether a message in the name of `source`, which does not prove it, is answered with a cookie.
    pub(super) fn take_reply(&mut self, source: IpAddr, now: Instant) -> bool {
        // The shared bucket gives only where the source's own does, and the other way round.
        if let Some(peer) = self.peers.get_mut(&source) {
            return peer.replies.has(&REPLIES_PER_PEER, now)
                && self.peer_replies.take(&PEER_REPLIES, now)
                && peer.replies.take(&REPLIES_PER_PEER, now);
        }
        let mut bucket = self.replies.of(&source, now);
        let taken = bucket.has(&REPLIES_PER_STRANGER, now)
            && self.stranger_replies.take(&STRANGER_REPLIES, now)
            && bucket.take(&REPLIES_PER_STRANGER, now);
        if taken {
            self.replies.set(source, bucket, now);
        }
        taken
    }

    /// Strangers remembered.
    #[cfg(test)]
    pub(super) fn strangers(&self) -> usize {
        self.replies.len() + self.handshakes.len()
    }
}

/// What one owner has: an IPv4 address, 64 bits of an IPv6 one.
fn network(source: IpAddr) -> IpAddr {
    match source {
        IpAddr::V4(_) => source,
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
    }
}

/// Buckets of strangers, in two generations: when the younger one is full, or old, the older one is forgotten.
struct Strangers {
    young: HashMap<IpAddr, Bucket, FixedState>,
    old: HashMap<IpAddr, Bucket, FixedState>,
    since: Option<Instant>,
}

impl Strangers {
    fn new(state: FixedState) -> Self {
        Self { young: HashMap::with_hasher(state.clone()), old: HashMap::with_hasher(state), since: None }
    }

    fn of(&mut self, source: &IpAddr, now: Instant) -> Bucket {
        if now.saturating_duration_since(*self.since.get_or_insert(now)) >= TABLE_TIME {
            self.turn(now);
        }
        self.young.get(source).or_else(|| self.old.get(source)).copied().unwrap_or_default()
    }

    fn set(&mut self, source: IpAddr, bucket: Bucket, now: Instant) {
        if self.young.len() >= TABLE && !self.young.contains_key(&source) {
            self.turn(now);
        }
        self.young.insert(source, bucket);
    }

    fn turn(&mut self, now: Instant) {
        std::mem::swap(&mut self.young, &mut self.old);
        self.young.clear();
        self.since = Some(now);
    }

    fn clear(&mut self) {
        *self = Self::new(self.young.hasher().clone());
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.young.len() + self.old.len()
    }
}
