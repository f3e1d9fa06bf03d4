//! WireGuard's handshake and transport, byte for byte; sans-IO.
//!
//! A [`Transport`] holds our static keys and our peers. Bytes go in by [`Transport::handle`] and
//! [`Transport::seal`], time by [`Transport::handle_timeout`]; messages and events come out of the `poll_*` functions.
//!
//! | file | what |
//! |---|---|
//! | `constants` | the numbers |
//! | `handshake`, `resolver` | initiation, response, MAC1; the primitives under them |
//! | `suite` | what differs between AEADs; the seam to the library |
//! | `cookie`, `limits` | what handshake messages may cost us: proof of the sender's address, a limit for each source |
//! | `session`, `replay` | sealing and opening; previous, current and next session |
//! | `peer`, `timers` | when a session is made, renewed, erased |
//! | `kept` | initiations of keys that the directory does not know yet |
//! | `handover` | what a successor goes on with |
//! | `index`, `shared` | names of peers and sessions; what all peers share |
//!
//! Decisions beside the paper: early retries are closer together (`constants`). When the first initiations of two
//! attempts cross, both sides keep the one of the greater address. During a key rotation a peer has two keys: it is
//! answered with either, and asked with the one in use. Keys are erased when a session reaches its hard limit or is
//! replaced, which is earlier than three times 180 s. Time stamps rise over all peers together, and those of the far
//! future are refused. A peer is heard from its own address only, unless roaming is on. An address of the directory has
//! limits of its own, so that nobody else can use them up (`limits`).
//! Source: WireGuard paper, sections 5 and 6.

mod constants;
mod cookie;
mod handover;
mod handshake;
mod index;
mod kept;
mod keys;
mod limits;
mod peer;
mod replay;
mod resolver;
mod session;
mod shared;
mod suite;
#[cfg(test)]
mod tests;
mod timers;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::time::{Duration, Instant};

use rand::Rng;
use rand_chacha::ChaCha20Rng;

pub use constants::{HEADER_LEN, TAG_LEN, record_len};
pub use handover::PeerState;
pub use index::PeerId;
pub use keys::{PeerKeys, PresharedKey, PublicKey, StaticSecret};
pub use suite::Suite;

use constants::{
    COOKIE_LEN, INITIATION_LEN, KEEPALIVE_TIMEOUT, REJECT_AFTER_TIME, REKEY_AFTER_TIME, REKEY_ATTEMPT_TIME,
    REKEY_TIMEOUT, RESPONSE_LEN, SILENT_AFTER, TYPE_COOKIE, TYPE_DATA, TYPE_INITIATION, TYPE_RESPONSE,
};
use cookie::CookieSecret;
use handshake::{Local, index_at};
use index::{ReceiverIndex, Slab};
use kept::Kept;
use limits::Limits;
use peer::Peer;
use session::Session;
use shared::{OwnKey, Shared};

use super::Now;
use super::drop::DropReason;

/// One of our own addresses and its static key. The first identity of a family initiates; all of it respond.
pub struct Identity {
    /// The address.
    pub address: IpAddr,
    /// Its static private key.
    pub secret: StaticSecret,
}

/// A peer: an address, and the keys that prove it.
pub struct PeerConfig {
    /// The peer's own address.
    pub address: IpAddr,
    /// Its tunnel port.
    pub port: u16,
    /// Its keys. Handshakes begin with these alone.
    pub keys: PeerKeys,
    /// Those of a second project key, which its handshakes are answered with, too.
    pub accept: Option<PeerKeys>,
}

impl PeerConfig {
    /// The static keys that the peer may be met with.
    pub(super) fn publics(&self) -> impl Iterator<Item = PublicKey> {
        [&self.keys].into_iter().chain(&self.accept).map(|keys| keys.public)
    }
}

/// The suite and its limits. The default is the specification's; tests and benchmarks shorten `rekey_after`.
#[derive(Clone, Debug)]
pub struct Options {
    /// The AEAD.
    pub suite: Suite,
    /// Age at which the initiator of a session makes a new one when it sends.
    pub rekey_after: Duration,
    /// Age at which a session neither seals nor opens; its keys are erased.
    pub reject_after: Duration,
    /// Messages sealed after which either side makes a new session.
    pub rekey_after_messages: u64,
    /// Messages after which a session neither seals nor opens.
    pub reject_after_messages: u64,
    /// How long a session is tried for.
    pub attempt_time: Duration,
    /// How long after data came something is sent.
    pub keepalive: Duration,
    /// How long after [`Transport::begin`] an unanswering peer is reported.
    pub silent_after: Duration,
    /// Follow a peer to the address its newest authentic message came from.
    pub roaming: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self::of(Suite::default())
    }
}

impl Options {
    /// The limits of a suite.
    #[must_use]
    pub fn of(suite: Suite) -> Self {
        Self {
            suite,
            rekey_after: REKEY_AFTER_TIME,
            reject_after: REJECT_AFTER_TIME,
            rekey_after_messages: suite.rekey_after_messages(),
            reject_after_messages: suite.reject_after_messages(),
            attempt_time: REKEY_ATTEMPT_TIME,
            keepalive: KEEPALIVE_TIMEOUT,
            silent_after: SILENT_AFTER,
            roaming: false,
        }
    }

    /// Age at which the initiator of a session makes a new one when it receives: 165 s to 120 s of `rekey_after`.
    fn rekey_on_receiving_after(&self) -> Duration {
        self.rekey_after * 11 / 8
    }

    /// Sent data that nothing authentic has followed for this long means that the peer lost the session.
    fn no_reply_after(&self) -> Duration {
        self.keepalive + REKEY_TIMEOUT
    }
}

/// What a datagram was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Received {
    /// A handshake message; what follows from it is in `poll_transmit` and `poll_event`.
    Handshake,
    /// An empty message of this peer.
    Keepalive(PeerId),
    /// A packet.
    Packet {
        /// Who sealed it.
        peer: PeerId,
        /// The plaintext inside the datagram, with its padding.
        payload: Range<usize>,
    },
}

/// What the engine should know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A session can seal: staged packets can go. Also after each rekey.
    Established(PeerId),
    /// Nobody answered since a session was wanted. Comes again for each later [`Transport::begin`] without an answer.
    Silent(PeerId),
    /// There is no session any more, or the attempt to make the first one ended.
    Expired(PeerId),
}

/// The session of one peer, for sealing a burst.
pub struct Sealer<'a> {
    session: &'a mut Session,
    endpoint: SocketAddr,
}

impl Sealer<'_> {
    /// Seals `packet`, padded with zeros, into `record`, which has its [`record_len`]. Takes one counter.
    ///
    /// # Errors
    /// [`DropReason::SessionExpired`] when the last counter is used up, [`DropReason::Malformed`] when the record has
    /// another length. The record must not be sent then.
    pub fn seal(&mut self, packet: &[u8], record: &mut [u8]) -> Result<(), DropReason> {
        self.session.seal(packet, record)
    }

    /// Where the records go.
    #[must_use]
    pub fn endpoint(&self) -> SocketAddr {
        self.endpoint
    }
}

/// Our end of the tunnels to all peers.
pub struct Transport {
    shared: Shared,
    peers: Slab<Peer>,
    /// By family (is it IPv4) and static key.
    by_static: BTreeMap<(bool, PublicKey), PeerId>,
    kept: Kept,
    limits: Limits,
    cookies: CookieSecret,
}

impl Transport {
    /// A transport without peers. `rng` is seeded by the caller from the system's source; it is the only randomness.
    #[must_use]
    pub fn new(identities: Vec<Identity>, options: Options, mut rng: ChaCha20Rng) -> Self {
        let limits = Limits::new(rng.next_u64());
        let own = |identity: Identity| OwnKey {
            address: identity.address.to_canonical(),
            keys: Local::new(identity.secret, options.suite),
        };
        Self {
            shared: Shared::new(identities.into_iter().map(own).collect(), options, rng),
            peers: Slab::new(),
            by_static: BTreeMap::new(),
            kept: Kept::default(),
            limits,
            cookies: CookieSecret::default(),
        }
    }

    /// The bytes of our own static keys: they stay where they are as long as the transport lives.
    pub fn static_secrets(&self) -> impl Iterator<Item = &[u8]> {
        self.shared.locals.iter().map(|own| own.keys.secret())
    }

    /// Adds a peer, and answers its kept initiation if there is one. A changed key is a new peer: remove the old one.
    pub fn add_peer(&mut self, mut config: PeerConfig, now: Now) -> PeerId {
        config.address = config.address.to_canonical();
        let endpoint = SocketAddr::new(config.address, config.port);
        let local = self.shared.locals.iter().position(|own| own.address.is_ipv4() == endpoint.is_ipv4());
        let publics: Vec<_> = config.publics().collect();
        self.limits.add_peer(config.address);
        let id = self.peers.insert_with(|id| Peer::new(id, config, local));
        for public in publics {
            self.by_static.insert((endpoint.is_ipv4(), public), id);
            if let Some((from, message)) = self.kept.take(&public, endpoint, now.instant) {
                // It was valid, and paid for, when it was kept; if it is not any more, the peer's next one will be.
                let own = self.verify(from, &message);
                let _: Result<Received, DropReason> =
                    own.and_then(|own| self.consume(own, from, &message, now));
            }
        }
        id
    }

    /// Removes a peer and erases its keys.
    pub fn remove_peer(&mut self, peer: PeerId) {
        let Some(mut removed) = self.peers.remove(peer) else { return };
        removed.indices().for_each(|index| self.shared.indices.remove(index));
        self.shared.schedule.cancel(peer, &mut removed.wake);
        self.limits.remove_peer(removed.config.address);
        for public in removed.config.publics() {
            let key = (removed.config.address.is_ipv4(), public);
            if self.by_static.get(&key) == Some(&peer) {
                self.by_static.remove(&key);
            }
        }
    }

    /// Wants a session with `peer`: initiates, unless there is one or a handshake is under way.
    pub fn begin(&mut self, peer: PeerId, now: Now) {
        if let Some(peer) = self.peers.get_mut(peer) {
            peer.begin(&mut self.shared, now);
        }
    }

    /// Sends one initiation to `peer` to learn whether it answers, without retries and without wanting to send.
    pub fn probe(&mut self, peer: PeerId, now: Now) {
        if let Some(peer) = self.peers.get_mut(peer) {
            peer.probe(&mut self.shared, now);
        }
    }

    /// The last [`Self::probe`] was not answered, and its answer is not waited for any more.
    pub fn forget_probe(&mut self, peer: PeerId) {
        if let Some(peer) = self.peers.get_mut(peer) {
            peer.forget_probe(&mut self.shared);
        }
    }

    /// Whether there is a session with `peer`, were it only one that the peer has yet to confirm.
    #[must_use]
    pub fn has_session(&self, peer: PeerId) -> bool {
        self.peers.get(peer).is_some_and(Peer::has_session)
    }

    /// The session to seal a burst of data with, if there is one. Starts a handshake when it is time to rekey.
    pub fn seal(&mut self, peer: PeerId, now: Now) -> Option<Sealer<'_>> {
        self.peers.get_mut(peer)?.seal(&mut self.shared, now)
    }

    /// Every handshake stamp from now on is later than `floor`, which a former agent sent.
    pub fn raise_stamp(&mut self, floor: Duration) {
        self.shared.raise_stamp(floor);
    }

    /// The greatest handshake stamp sent or restored, since the Unix epoch.
    #[must_use]
    pub fn last_stamp(&self) -> Option<Duration> {
        self.shared.last_stamp()
    }

    /// The greatest handshake stamp, if a message that bears a new one was made since the last call.
    pub fn poll_stamp(&mut self) -> Option<Duration> {
        self.shared.poll_stamp()
    }

    /// Takes the sessions of `peer` out, for a successor: nothing is sealed for it here any more.
    pub fn export(&mut self, peer: PeerId, now: Now) -> Option<PeerState> {
        Some(self.peers.get_mut(peer)?.export(now))
    }

    /// Goes on with the sessions that a former agent exported at the moment `then`. Returns whether one still lives.
    pub fn import(&mut self, peer: PeerId, state: PeerState, then: Instant, now: Now) -> bool {
        let Some(peer) = self.peers.get_mut(peer) else { return false };
        peer.import(state, then, &mut self.shared, now);
        peer.has_session()
    }

    /// Puts a message that a former agent had no time to send behind what is to be sent.
    pub fn send_on(&mut self, to: SocketAddr, message: Vec<u8>) {
        self.shared.transmits.push_back((to, message));
    }

    /// Takes one datagram from the network and opens it in place.
    ///
    /// # Errors
    /// Why it was dropped. Nothing is sent then, and nothing changed, but that the initiation of a static key that no peer
    /// has ([`DropReason::PeerUnknown`]) is kept for [`Self::add_peer`], that messages with a valid MAC1 count against the
    /// limits, and that a cookie may answer one of those under load ([`DropReason::CookieMissing`]).
    pub fn handle(
        &mut self,
        from: SocketAddr,
        datagram: &mut [u8],
        now: Now,
    ) -> Result<Received, DropReason> {
        let from = SocketAddr::new(from.ip().to_canonical(), from.port());
        let Some(kind) = datagram.first_chunk().map(|word| u32::from_le_bytes(*word)) else {
            return Err(DropReason::NotWireguard);
        };
        match (kind, datagram.len()) {
            (TYPE_DATA, length) if length >= record_len(0) => {
                let index = session::receiver(datagram);
                let id = self.owner(index)?;
                let peer = self.peers.get_mut(id).ok_or(DropReason::IndexUnknown)?;
                peer.receive(index, from, datagram, &mut self.shared, now)
            }
            (TYPE_INITIATION, INITIATION_LEN) => {
                let message: &[u8; INITIATION_LEN] = datagram.first_chunk().expect("length was matched");
                self.handle_initiation(from, message, now)
            }
            (TYPE_RESPONSE, RESPONSE_LEN) => {
                let message: &[u8; RESPONSE_LEN] = datagram.first_chunk().expect("length was matched");
                self.handle_response(from, message, now)
            }
            (TYPE_COOKIE, COOKIE_LEN) => {
                let message: &[u8; COOKIE_LEN] = datagram.first_chunk().expect("length was matched");
                let id = self.owner(index_at(message, 4))?;
                let peer = self.peers.get_mut(id).ok_or(DropReason::IndexUnknown)?;
                peer.take_cookie(from, message, &self.shared, now)?;
                Ok(Received::Handshake)
            }
            _ => Err(DropReason::NotWireguard),
        }
    }

    fn handle_initiation(
        &mut self,
        from: SocketAddr,
        message: &[u8; INITIATION_LEN],
        now: Now,
    ) -> Result<Received, DropReason> {
        let local = self.verify(from, message)?;
        self.limits.note(now.instant);
        self.admit(local, from, message, now)?;
        self.consume(local, from, message, now)
    }

    fn consume(
        &mut self,
        local: usize,
        from: SocketAddr,
        message: &[u8; INITIATION_LEN],
        now: Now,
    ) -> Result<Received, DropReason> {
        let ephemeral = self.shared.ephemeral();
        let consumed = self.shared.locals[local].keys.consume(message, ephemeral)?;
        let known = self.by_static.get(&(from.is_ipv4(), consumed.public));
        let Some(peer) = known.and_then(|id| self.peers.get_mut(*id)) else {
            if consumed.stamp.is_skewed(now) {
                return Err(DropReason::ClockSkew);
            }
            self.kept.keep(consumed.public, consumed.stamp, from, message, now.instant);
            return Err(DropReason::PeerUnknown);
        };
        peer.answer(consumed, from, &mut self.shared, now)?;
        Ok(Received::Handshake)
    }

    fn handle_response(
        &mut self,
        from: SocketAddr,
        message: &[u8; RESPONSE_LEN],
        now: Now,
    ) -> Result<Received, DropReason> {
        let local = self.verify(from, message)?;
        let index = index_at(message, 8);
        let id = self.owner(index)?;
        self.peers.get(id).ok_or(DropReason::IndexUnknown)?.expects(index, from, &self.shared)?;
        self.admit(local, from, message, now)?;
        let peer = self.peers.get_mut(id).ok_or(DropReason::IndexUnknown)?;
        // The answer that we asked for is no load; what merely looks like it is.
        peer.finish(index, message, &mut self.shared, now).inspect_err(|_| self.limits.note(now.instant))?;
        Ok(Received::Handshake)
    }

    fn owner(&self, index: ReceiverIndex) -> Result<PeerId, DropReason> {
        self.shared.indices.owner(index).ok_or(DropReason::IndexUnknown)
    }

    /// Under load, lets through what proves its source by MAC2, as much as that source may send. The rest is dropped before
    /// anything else is computed; a cookie answers some of it.
    fn admit(&mut self, local: usize, from: SocketAddr, message: &[u8], now: Now) -> Result<(), DropReason> {
        if !self.limits.is_loaded(now.instant) {
            return Ok(());
        }
        if self.cookies.is_proven(from, message, now.instant) {
            let may = self.limits.take_handshake(from.ip(), now.instant);
            return may.then_some(()).ok_or(DropReason::SourceLimit);
        }
        if self.limits.take_reply(from.ip(), now.instant) {
            let Shared { locals, rng, transmits, .. } = &mut self.shared;
            let reply = self.cookies.reply(&locals[local].keys.cookie, from, message, rng, now.instant);
            transmits.push_back((from, reply.to_vec()));
        }
        Err(DropReason::CookieMissing)
    }

    /// Which of our keys a handshake message is for.
    fn verify(&self, from: SocketAddr, message: &[u8]) -> Result<usize, DropReason> {
        let is_for = |own: &OwnKey| own.address.is_ipv4() == from.is_ipv4() && own.keys.verify(message);
        self.shared.locals.iter().position(is_for).ok_or(DropReason::BadMac1)
    }

    /// Runs the timers that are due, of one peer per call: they may make a handshake message, which takes a fifth of a
    /// millisecond.
    pub fn handle_timeout(&mut self, now: Now) {
        let Some(id) = self.shared.schedule.take_due(now.instant) else { return };
        let peer = self.peers.get_mut(id).expect("a removed peer has no wake-up");
        peer.wake = None;
        peer.handle_timeout(&mut self.shared, now);
    }

    /// When [`Self::handle_timeout`] wants to be called next. May be earlier than necessary.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.shared.schedule.earliest()
    }

    /// Handshake messages and keepalives that wait to be sent.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.shared.transmits.len()
    }

    /// The next handshake message or keepalive to send, and where to.
    pub fn poll_transmit(&mut self) -> Option<(SocketAddr, Vec<u8>)> {
        self.shared.transmits.pop_front()
    }

    /// The next event.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.shared.events.pop_front()
    }
}
