//! One peer: its sessions, its handshake under way, its timers.
//!
//! - wanting a session: `begin` (the engine has something to send), `seal` (the session grows old), `receive` (the same,
//!   seen from the receiving side), the no-reply timer. All start an [`Attempt`]: an initiation, retries, an end
//! - getting one: `answer` (we respond; the peer's first message confirms) or `finish` (the peer responded)
//! - losing one: the hard limit
//! - handing all of them to a successor: `export`, `import`
//!
//! Nothing here changes before the message that causes it is authenticated.
//! Source: WireGuard paper sections 6.1 to 6.5.

use std::net::SocketAddr;
use std::time::Instant;

use super::constants::{
    COOKIE_LEN, CROSSING, EARLY_RETRIES, INITIATION_INTERVAL, REKEY_JITTER, REKEY_TIMEOUT, RESPONSE_LEN,
    RETIRED_LIFE, record_len,
};
use super::cookie::Cookies;
use super::handover::{PeerState, SessionState, after, before};
use super::handshake::{Consumed, Initiator, Mac1Key, SessionKeys, Tai64n};
use super::index::{PeerId, ReceiverIndex};
use super::session::{Keypairs, Role, Session};
use super::shared::Shared;
use super::timers::{Timer, Timers};
use super::{Event, Options, PeerConfig, PeerKeys, PublicKey, Received, Sealer};
use crate::proto::Now;
use crate::proto::drop::DropReason;

/// Everything the transport knows about a peer.
pub(super) struct Peer {
    id: PeerId,
    pub(super) config: PeerConfig,
    /// Of the key in use.
    mac1: Mac1Key,
    /// Which of our static keys it is spoken to with; none if we have no address of its family.
    local: Option<usize>,
    /// Where to send. The peer's own address; with roaming, where the newest fresh data message came from.
    pub(super) endpoint: SocketAddr,
    pub(super) keypairs: Keypairs,
    initiation: Option<Box<Initiation>>,
    attempt: Option<Attempt>,
    cookies: Cookies,
    timers: Timers,
    /// The peer's entry in the schedule.
    pub(super) wake: Option<Instant>,
    /// Greatest time stamp of an initiation consumed.
    greatest_stamp: Option<Tai64n>,
    last_consumed: Option<Instant>,
    /// Data came while a keepalive was due already.
    another_keepalive: bool,
}

/// The newest initiation that was sent; only its response counts.
struct Initiation {
    state: Initiator,
    index: ReceiverIndex,
    sent: Instant,
}

/// Trying to make a session: from the first initiation to a session or the end.
struct Attempt {
    started: Instant,
    retries: usize,
}

impl Peer {
    pub(super) fn new(id: PeerId, config: PeerConfig, local: Option<usize>) -> Self {
        let endpoint = SocketAddr::new(config.address, config.port);
        let mac1 = Mac1Key::new(&config.keys.public);
        Self {
            id,
            config,
            mac1,
            local,
            endpoint,
            keypairs: Keypairs::default(),
            initiation: None,
            attempt: None,
            cookies: Cookies::default(),
            timers: Timers::default(),
            wake: None,
            greatest_stamp: None,
            last_consumed: None,
            another_keepalive: false,
        }
    }

    /// What a successor goes on with. Nothing can be sealed here any more.
    pub(super) fn export(&mut self, now: Now) -> PeerState {
        let now = now.instant;
        let Keypairs { previous, current, next, superseded } = std::mem::take(&mut self.keypairs);
        let state = |session: Option<Box<Session>>| session.map(|session| session.export(now));
        PeerState {
            public: self.config.keys.public,
            endpoint: self.endpoint,
            previous: state(previous),
            current: state(current),
            next: state(next),
            superseded,
            greatest_stamp: self.greatest_stamp.map(|stamp| stamp.0),
            since_consumed: self.last_consumed.map(|last| now.saturating_duration_since(last)),
            attempts: self.attempt.is_some(),
            keepalive: self.timers.remaining(Timer::Keepalive, now),
            another_keepalive: self.another_keepalive,
            no_reply: self.timers.remaining(Timer::NoReply, now),
            silent: self.timers.remaining(Timer::Silent, now),
        }
    }

    /// Goes on where a former agent stopped at `then`, unless that knew the peer by a key that the directory does not name.
    pub(super) fn import(&mut self, mut state: PeerState, then: Instant, shared: &mut Shared, now: Now) {
        if !self.config.publics().any(|public| public == state.public) {
            return;
        }
        if shared.options.roaming {
            self.endpoint = state.endpoint;
        }
        self.greatest_stamp = self.greatest_stamp.max(state.greatest_stamp.map(Tai64n));
        self.last_consumed = state.since_consumed.and_then(|age| before(then, age)).or(self.last_consumed);
        let mut retired = false;
        // What this agent has made itself meanwhile is newer.
        if !self.has_session() {
            let suite = shared.options.suite;
            let config = &self.config;
            // A session of a project key that was retired meanwhile opens what the peer still seals with it, and seals nothing.
            let is_retired =
                |session: &SessionState| !config.publics().any(|public| public == session.public);
            retired = [&state.previous, &state.current, &state.next].into_iter().flatten().any(is_retired);
            if state.current.as_ref().is_some_and(is_retired) {
                state.previous = state.current.take();
            }
            state.superseded |= state.next.as_ref().is_some_and(is_retired);
            let mut session = |state: Option<SessionState>| {
                let state = state?;
                let is_retired = is_retired(&state);
                let mut session = Session::import(state, suite, shared.options.reject_after_messages, then)?;
                if is_retired {
                    session.end_within(RETIRED_LIFE, shared.options.reject_after, now.instant);
                }
                let lives = session.age(now.instant) < shared.options.reject_after;
                (lives && shared.indices.adopt(session.local, self.id)).then(|| Box::new(session))
            };
            self.keypairs = Keypairs {
                previous: session(state.previous),
                current: session(state.current),
                next: session(state.next),
                superseded: state.superseded,
            };
            self.another_keepalive = state.another_keepalive;
        }
        if self.has_session() {
            self.plan_expiry(shared);
            let timers = [(Timer::Keepalive, state.keepalive), (Timer::NoReply, state.no_reply)];
            for (timer, remaining) in timers {
                remaining.into_iter().for_each(|remaining| self.timers.set(timer, after(then, remaining)));
            }
        }
        if retired && self.has_session() {
            self.start_attempt(shared, now);
        }
        if state.attempts {
            self.start_attempt(shared, now);
            if let Some(remaining) = state.silent {
                self.timers.set_if_unset(Timer::Silent, after(then, remaining));
            }
        }
        self.reschedule(shared);
    }

    /// Whether there is a session, were it only one that the peer has yet to confirm.
    pub(super) fn has_session(&self) -> bool {
        self.keypairs.iter().next().is_some()
    }

    /// Every receiver index in use.
    pub(super) fn indices(&self) -> impl Iterator<Item = ReceiverIndex> {
        let handshake = self.initiation.as_ref().map(|initiation| initiation.index);
        self.keypairs.iter().map(|session| session.local).chain(handshake)
    }

    /// Whether a session can seal now.
    pub(super) fn is_sendable(&self, shared: &Shared, now: Now) -> bool {
        self.keypairs
            .current
            .as_ref()
            .is_some_and(|s| s.has_counters() && s.age(now.instant) < shared.options.reject_after)
    }

    /// The engine wants a session.
    pub(super) fn begin(&mut self, shared: &mut Shared, now: Now) {
        if self.local.is_none() || self.is_sendable(shared, now) {
            return;
        }
        self.start_attempt(shared, now);
        self.timers.set(Timer::GiveUp, now.instant + shared.options.attempt_time);
        self.timers.set_if_unset(Timer::Silent, now.instant + shared.options.silent_after);
        self.reschedule(shared);
    }

    /// Asks once whether the peer is there, whatever sessions there are; an attempt under way asks by itself.
    pub(super) fn probe(&mut self, shared: &mut Shared, now: Now) {
        if self.attempt.is_none() {
            self.send_initiation(shared, now);
        }
    }

    /// Forgets what [`Self::probe`] sent.
    pub(super) fn forget_probe(&mut self, shared: &mut Shared) {
        if self.attempt.is_none()
            && let Some(initiation) = self.initiation.take()
        {
            shared.indices.remove(initiation.index);
        }
    }

    /// The session to seal with, and the decision whether it is time for the next one.
    pub(super) fn seal<'a>(&'a mut self, shared: &mut Shared, now: Now) -> Option<Sealer<'a>> {
        if !self.is_sendable(shared, now) {
            return None;
        }
        self.rekey_on_sending(shared, now);
        self.another_keepalive = false;
        self.timers.clear(Timer::Keepalive);
        self.timers.set_if_unset(Timer::NoReply, now.instant + shared.options.no_reply_after());
        self.reschedule(shared);
        let session = self.keypairs.current.as_deref_mut()?;
        Some(Sealer { session, endpoint: self.endpoint })
    }

    /// A transport data message.
    pub(super) fn receive(
        &mut self,
        index: ReceiverIndex,
        from: SocketAddr,
        datagram: &mut [u8],
        shared: &mut Shared,
        now: Now,
    ) -> Result<Received, DropReason> {
        let session = self.keypairs.find(index).ok_or(DropReason::IndexUnknown)?;
        if session.age(now.instant) >= shared.options.reject_after {
            return Err(DropReason::SessionExpired);
        }
        let opened = session.open(datagram)?;
        // Before the counter counts as seen: a copy sent from elsewhere must not shut out the original.
        if from != self.endpoint {
            if !shared.options.roaming {
                return Err(DropReason::OuterSource);
            }
            self.endpoint = from;
        }
        session.accept(opened.counter);
        self.timers.clear(Timer::NoReply);
        if self.keypairs.is_confirmed_by(index) {
            let fallen = self.keypairs.confirm_next();
            shared.retire(fallen);
            self.established(shared);
        }
        self.rekey_on_receiving(index, shared, now);
        if opened.payload.is_empty() {
            return Ok(Received::Keepalive(self.id));
        }
        if self.timers.is_set(Timer::Keepalive) {
            self.another_keepalive = true;
        } else {
            self.timers.set(Timer::Keepalive, now.instant + shared.options.keepalive);
            self.reschedule(shared);
        }
        Ok(Received::Packet { peer: self.id, payload: opened.payload })
    }

    /// An initiation of this peer: it is answered, and the session waits for the peer's first message.
    pub(super) fn answer(
        &mut self,
        consumed: Consumed,
        from: SocketAddr,
        shared: &mut Shared,
        now: Now,
    ) -> Result<(), DropReason> {
        self.is_heard_from(from, shared)?;
        if consumed.stamp.is_skewed(now) {
            return Err(DropReason::ClockSkew);
        }
        // One of the far future was right by our own clock, which has gone back since.
        let greatest = self.greatest_stamp.filter(|greatest| !greatest.is_skewed(now));
        if greatest.is_some_and(|greatest| consumed.stamp <= greatest) {
            return Err(DropReason::HandshakeReplay);
        }
        // Initiations that we read late come together though they were sent apart, and only the newest is waited for. What a
        // peer gains by lying about it, `limits` bounds.
        let sent_apart = greatest.is_none_or(|last| consumed.stamp.since(last) >= INITIATION_INTERVAL);
        if !sent_apart && self.last_consumed.is_some_and(|last| since(last, now) < INITIATION_INTERVAL) {
            return Err(DropReason::HandshakeFlood);
        }
        self.greatest_stamp = Some(consumed.stamp);
        self.last_consumed = Some(now.instant);
        self.timers.clear(Timer::NoReply);
        // Two initiations crossed: both sides prefer the one of the greater address. Only an attempt's first, and only where
        // ours goes to where the peer is: it may be that ours cannot be answered.
        let crossed = from == self.endpoint
            && self.is_asking(now)
            && self.attempt.as_ref().is_none_or(|attempt| attempt.retries == 0);
        let own = self.local.map(|local| shared.locals[local].address);
        if crossed && own > Some(self.config.address) {
            return Ok(());
        }
        // During a rotation the peer may already, or still, ask with the other key.
        let PeerConfig { keys, accept, .. } = &self.config;
        let asked_with = [keys].into_iter().chain(accept).find(|keys| keys.public == consumed.public);
        let &PeerKeys { public, ref psk } = asked_with.ok_or(DropReason::PeerUnknown)?;
        let index = shared.indices.insert(self.id, &mut shared.rng);
        let (keys, mut message) = consumed
            .respond(&Mac1Key::new(&public), psk, index)
            .inspect_err(|_| shared.indices.remove(index))?;
        self.cookies.complete_response(&mut message, public, now.instant);
        let session = self.session(&keys, index, Role::Responder, public, shared, now);
        let fallen = self.keypairs.install_next(session);
        shared.retire(fallen);
        self.plan_expiry(shared);
        // The endpoint stays: whoever was faster with a copy of the initiation could lead us away. The first message of the
        // session moves it.
        shared.transmits.push_back((from, message.to_vec()));
        self.reschedule(shared);
        Ok(())
    }

    /// Whether a response is what an initiation of ours waits for: the questions that cost nothing.
    pub(super) fn expects(
        &self,
        index: ReceiverIndex,
        from: SocketAddr,
        shared: &Shared,
    ) -> Result<(), DropReason> {
        self.initiation.as_ref().filter(|mine| mine.index == index).ok_or(DropReason::IndexUnknown)?;
        self.is_heard_from(from, shared)
    }

    fn is_heard_from(&self, from: SocketAddr, shared: &Shared) -> Result<(), DropReason> {
        if from == self.endpoint || shared.options.roaming { Ok(()) } else { Err(DropReason::OuterSource) }
    }

    /// A cookie reply for this peer. Nothing is sent for it, and the peer's endpoint stays.
    pub(super) fn take_cookie(
        &mut self,
        from: SocketAddr,
        message: &[u8; COOKIE_LEN],
        shared: &Shared,
        now: Now,
    ) -> Result<(), DropReason> {
        self.cookies.expects(message)?;
        self.is_heard_from(from, shared)?;
        self.cookies.take(message, now.instant)
    }

    /// A response that [`Self::expects`] let through: the session seals at once, and something is sent so that the peer may seal, too.
    pub(super) fn finish(
        &mut self,
        index: ReceiverIndex,
        message: &[u8; RESPONSE_LEN],
        shared: &mut Shared,
        now: Now,
    ) -> Result<(), DropReason> {
        let initiation = self.initiation.as_mut().ok_or(DropReason::IndexUnknown)?;
        let keys = initiation.state.finish(message)?;
        // From here on the session owns the index, and the initiation is gone: the response cannot count twice.
        self.initiation = None;
        let session = self.session(&keys, index, Role::Initiator, self.config.keys.public, shared, now);
        let fallen = self.keypairs.install_current(session);
        shared.retire(fallen);
        self.established(shared);
        self.timers.clear(Timer::NoReply);
        // Data that the engine seals before it runs the timers takes the place of this keepalive.
        self.timers.set(Timer::Keepalive, now.instant);
        self.reschedule(shared);
        Ok(())
    }

    /// Runs the timers that are due.
    pub(super) fn handle_timeout(&mut self, shared: &mut Shared, now: Now) {
        while let Some(timer) = self.timers.take_due(now.instant) {
            match timer {
                Timer::Expire => self.expire(shared, now),
                Timer::NoReply => {
                    self.start_attempt(shared, now);
                    self.timers.set_if_unset(Timer::Silent, now.instant + shared.options.silent_after);
                }
                Timer::GiveUp => self.give_up(shared),
                Timer::Retry => self.retry(shared, now),
                Timer::Silent => shared.events.push_back(Event::Silent(self.id)),
                Timer::Keepalive => self.send_keepalive(shared, now),
            }
        }
        self.reschedule(shared);
    }

    fn start_attempt(&mut self, shared: &mut Shared, now: Now) {
        if self.attempt.is_some() || self.local.is_none() {
            return;
        }
        self.attempt = Some(Attempt { started: now.instant, retries: 0 });
        // What a probe asked a moment ago is about to be answered.
        let asked = self.initiation.as_ref().map(|mine| mine.sent).filter(|_| self.is_asking(now));
        self.timers.set(Timer::Retry, asked.unwrap_or(now.instant) + EARLY_RETRIES[0]);
        self.timers.set(Timer::GiveUp, now.instant + shared.options.attempt_time);
        // A session that the peer asked for a moment ago is about to be confirmed; if it is not, the retry asks.
        let awaited = self.keypairs.awaited().is_some_and(|session| session.age(now.instant) < CROSSING);
        if !awaited && asked.is_none() {
            self.send_initiation(shared, now);
        }
    }

    /// Whether an initiation was sent so lately that its response is about to come.
    fn is_asking(&self, now: Now) -> bool {
        self.initiation.as_ref().is_some_and(|mine| since(mine.sent, now) < CROSSING)
    }

    fn retry(&mut self, shared: &mut Shared, now: Now) {
        let Some(attempt) = self.attempt.as_mut() else { return };
        attempt.retries += 1;
        let next = match EARLY_RETRIES.get(attempt.retries) {
            // A driver that slept over several retries sends one.
            Some(offset) => (attempt.started + *offset).max(now.instant + CROSSING),
            None => now.instant + REKEY_TIMEOUT + shared.jitter(REKEY_JITTER),
        };
        self.timers.set(Timer::Retry, next);
        self.send_initiation(shared, now);
    }

    fn give_up(&mut self, shared: &mut Shared) {
        self.end_attempt(shared);
        if self.timers.is_set(Timer::Silent) {
            self.timers.clear(Timer::Silent);
            shared.events.push_back(Event::Silent(self.id));
        }
        if !self.has_session() {
            shared.events.push_back(Event::Expired(self.id));
        }
    }

    fn end_attempt(&mut self, shared: &mut Shared) {
        self.attempt = None;
        if let Some(initiation) = self.initiation.take() {
            shared.indices.remove(initiation.index);
        }
        self.timers.clear(Timer::Retry);
        self.timers.clear(Timer::GiveUp);
    }

    fn send_initiation(&mut self, shared: &mut Shared, now: Now) {
        let Some(local) = self.local else { return };
        if let Some(replaced) = self.initiation.take() {
            shared.indices.remove(replaced.index);
        }
        let index = shared.indices.insert(self.id, &mut shared.rng);
        let stamp = shared.stamp(now);
        let ephemeral = shared.ephemeral();
        let local = &shared.locals[local].keys;
        let PeerKeys { public, psk } = &self.config.keys;
        match local.initiate(public, &self.mac1, psk, index, stamp, ephemeral) {
            Ok((state, mut message)) => {
                self.cookies.complete_initiation(&mut message, *public, now.instant);
                self.initiation = Some(Box::new(Initiation { state, index, sent: now.instant }));
                shared.transmits.push_back((self.endpoint, message.to_vec()));
            }
            // The peer's key is a low-order point: it stays silent, and is reported as such.
            Err(_) => shared.indices.remove(index),
        }
    }

    fn session(
        &self,
        keys: &SessionKeys,
        index: ReceiverIndex,
        role: Role,
        public: PublicKey,
        shared: &Shared,
        now: Now,
    ) -> Session {
        let Options { suite, reject_after_messages, .. } = shared.options;
        Session::new(keys, suite, index, role, public, reject_after_messages, now.instant)
    }

    fn established(&mut self, shared: &mut Shared) {
        self.end_attempt(shared);
        self.cookies.settle();
        self.timers.clear(Timer::Silent);
        self.plan_expiry(shared);
        shared.events.push_back(Event::Established(self.id));
    }

    fn plan_expiry(&mut self, shared: &Shared) {
        match self.keypairs.iter().map(|session| session.created + shared.options.reject_after).min() {
            Some(at) => self.timers.set(Timer::Expire, at),
            None => self.timers.clear(Timer::Expire),
        }
    }

    fn expire(&mut self, shared: &mut Shared, now: Now) {
        for session in self.keypairs.take_expired(shared.options.reject_after, now.instant) {
            shared.retire(session);
        }
        self.plan_expiry(shared);
        if !self.has_session() {
            self.timers.clear(Timer::Keepalive);
            self.timers.clear(Timer::NoReply);
            shared.events.push_back(Event::Expired(self.id));
        }
    }

    fn rekey_on_sending(&mut self, shared: &mut Shared, now: Now) {
        let Some(session) = &self.keypairs.current else { return };
        let old = session.role == Role::Initiator && session.age(now.instant) >= shared.options.rekey_after;
        if old || session.sealed() >= shared.options.rekey_after_messages {
            self.start_attempt(shared, now);
        }
    }

    fn rekey_on_receiving(&mut self, index: ReceiverIndex, shared: &mut Shared, now: Now) {
        let Some(session) = self.keypairs.current.as_ref().filter(|session| session.local == index) else {
            return;
        };
        if session.role == Role::Initiator
            && session.age(now.instant) >= shared.options.rekey_on_receiving_after()
        {
            self.start_attempt(shared, now);
            self.reschedule(shared);
        }
    }

    fn send_keepalive(&mut self, shared: &mut Shared, now: Now) {
        if !self.is_sendable(shared, now) {
            return;
        }
        self.rekey_on_sending(shared, now);
        let Some(session) = self.keypairs.current.as_mut() else { return };
        let mut record = vec![0; record_len(0)];
        if session.seal(&[], &mut record).is_ok() {
            shared.transmits.push_back((self.endpoint, record));
        }
        if std::mem::take(&mut self.another_keepalive) {
            self.timers.set(Timer::Keepalive, now.instant + shared.options.keepalive);
        }
    }

    fn reschedule(&mut self, shared: &mut Shared) {
        shared.schedule.ensure(self.id, &mut self.wake, self.timers.earliest());
    }
}

fn since(then: Instant, now: Now) -> std::time::Duration {
    now.instant.saturating_duration_since(then)
}
