//! Timers as data: what may fall due for a peer, and when.
//!
//! Each peer has one table. The transport keeps, for all peers together, one ordered set of wake-ups that is never
//! later than the earliest entry of any table: moving a timer back, which traffic does all the time, leaves it alone.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::index::PeerId;

/// What can fall due. Earlier variants run first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Timer {
    /// A session reached its hard limit: its keys are erased.
    Expire,
    /// Nothing authentic came back since data was sent: a new session is made.
    NoReply,
    /// The attempt to make a session ends.
    GiveUp,
    /// The initiation was not answered: another one is sent.
    Retry,
    /// Nobody answered since a session was wanted: it is reported.
    Silent,
    /// Data came, or a session has to be confirmed, and nothing was sent since: an empty message is sent.
    Keepalive,
}

impl Timer {
    const ALL: [Self; 6] =
        [Self::Expire, Self::NoReply, Self::GiveUp, Self::Retry, Self::Silent, Self::Keepalive];
}

/// When each timer of one peer falls due.
#[derive(Default)]
pub(super) struct Timers([Option<Instant>; Timer::ALL.len()]);

impl Timers {
    pub(super) fn set(&mut self, timer: Timer, at: Instant) {
        self.0[timer as usize] = Some(at);
    }

    pub(super) fn set_if_unset(&mut self, timer: Timer, at: Instant) {
        self.0[timer as usize].get_or_insert(at);
    }

    pub(super) fn clear(&mut self, timer: Timer) {
        self.0[timer as usize] = None;
    }

    /// How long until `timer` falls due, if it is set.
    pub(super) fn remaining(&self, timer: Timer, now: Instant) -> Option<Duration> {
        self.0[timer as usize].map(|at| at.saturating_duration_since(now))
    }

    pub(super) fn is_set(&self, timer: Timer) -> bool {
        self.0[timer as usize].is_some()
    }

    /// Clears and returns one timer that is due.
    pub(super) fn take_due(&mut self, now: Instant) -> Option<Timer> {
        let due = Timer::ALL.into_iter().find(|timer| self.0[*timer as usize].is_some_and(|at| at <= now))?;
        self.clear(due);
        Some(due)
    }

    pub(super) fn earliest(&self) -> Option<Instant> {
        self.0.iter().flatten().min().copied()
    }
}

/// Wake-ups of all peers, at most one each.
#[derive(Default)]
pub(super) struct Schedule(BTreeSet<(Instant, PeerId)>);

impl Schedule {
    /// Makes sure that `peer` is woken at `earliest` or before. `wake` is the peer's entry.
    pub(super) fn ensure(&mut self, peer: PeerId, wake: &mut Option<Instant>, earliest: Option<Instant>) {
        let Some(earliest) = earliest else { return };
        if wake.is_some_and(|wake| wake <= earliest) {
            return;
        }
        self.cancel(peer, wake);
        self.0.insert((earliest, peer));
        *wake = Some(earliest);
    }

    pub(super) fn cancel(&mut self, peer: PeerId, wake: &mut Option<Instant>) {
        if let Some(old) = wake.take() {
            self.0.remove(&(old, peer));
        }
    }

    /// Removes and returns a peer whose wake-up is due; the caller forgets the peer's entry.
    pub(super) fn take_due(&mut self, now: Instant) -> Option<PeerId> {
        let first = self.0.first().copied().filter(|(at, _)| *at <= now)?;
        self.0.remove(&first);
        Some(first.1)
    }

    pub(super) fn earliest(&self) -> Option<Instant> {
        self.0.first().map(|(at, _)| *at)
    }
}
