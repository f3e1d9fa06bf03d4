//! Sessions: the keys of one finished handshake, and the up to three sessions of a peer.
//!
//! - seal: take a counter, write the header, encrypt behind it
//! - open: limits, replay check, decrypt in place; `accept` then marks the counter
//! - `next` was offered to the peer and waits for its first message; `current` seals; `previous` still opens what was
//!   under way when `current` replaced it
//!
//! Sans-IO; no allocation per packet.
//! Source: WireGuard paper sections 5.4.6 (transport data), 6.2 (limits), 6.3 (key rotation).

use std::ops::Range;
use std::time::{Duration, Instant};

use super::PublicKey;
use super::constants::{HEADER_LEN, TYPE_DATA, record_len};
use super::handover::{SessionState, TransportKey, before};
use super::handshake::{SessionKeys, index_at};
use super::index::ReceiverIndex;
use super::replay::ReplayWindow;
use super::suite::{Aead, Suite};
use crate::proto::drop::DropReason;

/// Which side asked for a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Initiator,
    Responder,
}

/// Keys, counters and replay window of one handshake. The keys are wiped when it is dropped.
pub(super) struct Session {
    pub(super) local: ReceiverIndex,
    pub(super) role: Role,
    pub(super) created: Instant,
    /// The peer's static key in that handshake.
    public: PublicKey,
    remote: ReceiverIndex,
    sealing: Aead,
    opening: Aead,
    /// The same two keys, for a successor.
    raw: [TransportKey; 2],
    next_counter: u64,
    reject_after_messages: u64,
    replay: ReplayWindow,
}

/// A data message that was authentic and fresh.
pub(super) struct Opened {
    pub(super) counter: u64,
    /// Plaintext with its padding, inside the datagram.
    pub(super) payload: Range<usize>,
}

impl Session {
    pub(super) fn new(
        keys: &SessionKeys,
        suite: Suite,
        local: ReceiverIndex,
        role: Role,
        public: PublicKey,
        reject_after_messages: u64,
        now: Instant,
    ) -> Self {
        Self {
            local,
            role,
            created: now,
            public,
            remote: keys.remote,
            sealing: suite.cipher(&keys.sealing),
            opening: suite.cipher(&keys.opening),
            raw: [&keys.sealing, &keys.opening].map(|key| TransportKey(Box::new(**key))),
            next_counter: 0,
            reject_after_messages,
            replay: ReplayWindow::new(),
        }
    }

    /// What a successor goes on with; the caller drops the session, which wipes its keys where they are.
    pub(super) fn export(&self, now: Instant) -> SessionState {
        let [sealing, opening] = self.raw.clone();
        SessionState {
            local: self.local.to_wire(),
            remote: self.remote.to_wire(),
            public: self.public,
            is_initiator: self.role == Role::Initiator,
            age: self.age(now),
            sealing,
            opening,
            next_counter: self.next_counter,
            replay: self.replay.export(),
        }
    }

    /// The session that was exported at `then`; `None` where it cannot be one.
    pub(super) fn import(
        state: SessionState,
        suite: Suite,
        reject_after_messages: u64,
        then: Instant,
    ) -> Option<Self> {
        let SessionState { sealing, opening, .. } = state;
        Some(Self {
            local: ReceiverIndex::from_wire(state.local),
            role: if state.is_initiator { Role::Initiator } else { Role::Responder },
            created: before(then, state.age)?,
            public: state.public,
            remote: ReceiverIndex::from_wire(state.remote),
            sealing: suite.cipher(&sealing.0),
            opening: suite.cipher(&opening.0),
            raw: [sealing, opening],
            next_counter: state.next_counter,
            reject_after_messages,
            replay: ReplayWindow::import(&state.replay)?,
        })
    }

    /// Leaves it at most `life`: it is old enough for that from now on.
    pub(super) fn end_within(&mut self, life: Duration, reject_after: Duration, now: Instant) {
        let created = now.checked_sub(reject_after.saturating_sub(life)).unwrap_or(self.created);
        self.created = self.created.min(created);
    }

    pub(super) fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.created)
    }

    /// Messages sealed so far.
    pub(super) fn sealed(&self) -> u64 {
        self.next_counter
    }

    /// Whether a counter is left to seal with.
    pub(super) fn has_counters(&self) -> bool {
        self.next_counter < self.reject_after_messages
    }

    /// Seals `text` into `record`, which has its [`record_len`].
    pub(super) fn seal(&mut self, text: &[u8], record: &mut [u8]) -> Result<(), DropReason> {
        if record.len() != record_len(text.len()) {
            return Err(DropReason::Malformed);
        }
        let Some((header, body)) = record.split_first_chunk_mut::<HEADER_LEN>() else {
            return Err(DropReason::Malformed);
        };
        if !self.has_counters() {
            return Err(DropReason::SessionExpired);
        }
        // Taken before it is used: whatever happens below, it is never used again.
        let counter = self.next_counter;
        self.next_counter += 1;
        header[..4].copy_from_slice(&TYPE_DATA.to_le_bytes());
        header[4..8].copy_from_slice(&self.remote.to_wire());
        header[8..].copy_from_slice(&counter.to_le_bytes());
        self.sealing.seal_into(counter, text, body).map_err(|_| DropReason::TooBig)
    }

    /// Authenticates and decrypts. The caller decides whether the counter counts as seen ([`Self::accept`]).
    pub(super) fn open(&self, datagram: &mut [u8]) -> Result<Opened, DropReason> {
        let counter = u64::from_le_bytes(datagram[8..HEADER_LEN].try_into().expect("eight bytes"));
        if counter >= self.reject_after_messages {
            return Err(DropReason::SessionExpired);
        }
        if !self.replay.is_fresh(counter) {
            return Err(DropReason::Replay);
        }
        let opened = self.opening.open(counter, &[], &mut datagram[HEADER_LEN..]);
        let length = opened.map_err(|_| DropReason::BadTag)?;
        Ok(Opened { counter, payload: HEADER_LEN..HEADER_LEN + length })
    }

    pub(super) fn accept(&mut self, counter: u64) {
        self.replay.accept(counter);
    }

    /// What the peer knows the session by, and the key that it is sealed with.
    #[cfg(test)]
    pub(super) fn sealing_key(&self) -> (ReceiverIndex, [u8; 32]) {
        (self.remote, *self.raw[0].0)
    }

    #[cfg(test)]
    pub(super) fn set_counter(&mut self, counter: u64) {
        self.next_counter = counter;
    }
}

/// The receiver index of a data message.
pub(super) fn receiver(datagram: &[u8]) -> ReceiverIndex {
    index_at(datagram, 4)
}

/// The sessions of a peer.
#[derive(Default)]
pub(super) struct Keypairs {
    pub(super) previous: Option<Box<Session>>,
    pub(super) current: Option<Box<Session>>,
    pub(super) next: Option<Box<Session>>,
    /// `current` is newer than `next`, which therefore opens but never becomes current.
    pub(super) superseded: bool,
}

impl Keypairs {
    /// The initiator knows that the peer has the keys: the session seals at once. Returns the session that fell out.
    ///
    /// A session that the peer asked for meanwhile stays: the peer seals on it until it hears from the new one.
    pub(super) fn install_current(&mut self, session: Session) -> Option<Box<Session>> {
        self.superseded = true;
        let current = self.current.replace(Box::new(session));
        std::mem::replace(&mut self.previous, current)
    }

    /// The responder waits for the peer's first message. Returns the session that fell out.
    ///
    /// A superseded one stays: the peer may seal on it until it has the response.
    pub(super) fn install_next(&mut self, session: Session) -> Option<Box<Session>> {
        let next = self.next.replace(Box::new(session));
        if std::mem::take(&mut self.superseded) && next.is_some() {
            return std::mem::replace(&mut self.previous, next);
        }
        next
    }

    /// Whether the peer's first message on this session makes it the current one.
    pub(super) fn is_confirmed_by(&self, index: ReceiverIndex) -> bool {
        !self.superseded && self.next.as_ref().is_some_and(|session| session.local == index)
    }

    /// The peer's first message came: `next` seals from now on. Returns the session that fell out.
    pub(super) fn confirm_next(&mut self) -> Option<Box<Session>> {
        let next = self.next.take()?;
        let current = self.current.replace(next);
        std::mem::replace(&mut self.previous, current)
    }

    /// A session that waits for the peer's first message.
    pub(super) fn awaited(&self) -> Option<&Session> {
        self.next.as_deref().filter(|_| !self.superseded)
    }

    pub(super) fn find(&mut self, index: ReceiverIndex) -> Option<&mut Box<Session>> {
        // The order of likelihood.
        [&mut self.current, &mut self.previous, &mut self.next]
            .into_iter()
            .flatten()
            .find(|session| session.local == index)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Session> {
        [&self.previous, &self.current, &self.next].into_iter().flatten().map(Box::as_ref)
    }

    /// Takes every session that is at least `limit` old.
    pub(super) fn take_expired(&mut self, limit: Duration, now: Instant) -> [Option<Box<Session>>; 3] {
        [&mut self.previous, &mut self.current, &mut self.next]
            .map(|slot| slot.take_if(|session| session.age(now) >= limit))
    }
}
