//! What all peers of a transport share: our keys, limits, randomness, indices, and what goes out.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha20Rng;
use zeroize::Zeroizing;

use super::constants::CLOCK_SKEW;
use super::handshake::{Ephemeral, Local, Tai64n};
use super::index::IndexTable;
use super::session::Session;
use super::timers::Schedule;
use super::{Event, Options};
use crate::proto::Now;

/// One of our addresses and the static key that speaks for it.
pub(super) struct OwnKey {
    pub(super) address: IpAddr,
    pub(super) keys: Local,
}

/// State that is not a peer's own.
pub(super) struct Shared {
    pub(super) options: Options,
    pub(super) locals: Vec<OwnKey>,
    pub(super) rng: ChaCha20Rng,
    pub(super) indices: IndexTable,
    pub(super) schedule: Schedule,
    pub(super) transmits: VecDeque<(SocketAddr, Vec<u8>)>,
    pub(super) events: VecDeque<Event>,
    last_stamp: Option<Duration>,
    /// `last_stamp` rose since it was polled last.
    stamp_rose: bool,
}

impl Shared {
    pub(super) fn new(locals: Vec<OwnKey>, options: Options, mut rng: ChaCha20Rng) -> Self {
        let indices = IndexTable::new(&mut rng);
        Self {
            options,
            locals,
            rng,
            indices,
            schedule: Schedule::default(),
            transmits: VecDeque::new(),
            events: VecDeque::new(),
            last_stamp: None,
            stamp_rose: false,
        }
    }

    /// Bytes for an ephemeral secret. The generator's key is replaced at once, so that later knowledge of its state
    /// does not give past ephemeral secrets away.
    pub(super) fn ephemeral(&mut self) -> Ephemeral {
        let mut bytes = Zeroizing::new([0; 32]);
        self.rng.fill_bytes(&mut bytes[..]);
        self.rng = ChaCha20Rng::from_rng(&mut self.rng);
        bytes
    }

    /// The time stamp for an initiation: later than every one before, also when the wall clock went back. Where it went back
    /// so far that it was wrong before or is wrong now, nobody knows which: the one or the other stamp, at random.
    pub(super) fn stamp(&mut self, now: Now) -> Tai64n {
        let later =
            self.last_stamp.map_or(Duration::ZERO, |last| last.saturating_add(Duration::from_nanos(1)));
        let stamp = later.max(now.wall);
        if stamp > now.wall + CLOCK_SKEW && self.rng.next_u32().is_multiple_of(2) {
            return Tai64n::from_unix(now.wall);
        }
        self.last_stamp = Some(stamp);
        self.stamp_rose = true;
        Tai64n::from_unix(stamp)
    }

    /// A former agent has sent `floor`: stamps from now on are later.
    pub(super) fn raise_stamp(&mut self, floor: Duration) {
        self.last_stamp = self.last_stamp.max(Some(floor));
    }

    pub(super) fn last_stamp(&self) -> Option<Duration> {
        self.last_stamp
    }

    /// The greatest stamp given out, if it rose since the last call.
    pub(super) fn poll_stamp(&mut self) -> Option<Duration> {
        std::mem::take(&mut self.stamp_rose).then_some(self.last_stamp).flatten()
    }

    /// Up to `most`, at random.
    pub(super) fn jitter(&mut self, most: Duration) -> Duration {
        most * (self.rng.next_u32() >> 16) / (1 << 16)
    }

    /// Forgets a session and wipes its keys.
    pub(super) fn retire(&mut self, session: Option<Box<Session>>) {
        if let Some(session) = session {
            self.indices.remove(session.local);
        }
    }
}
