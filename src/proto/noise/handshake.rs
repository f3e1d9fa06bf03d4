//! Handshake messages: an initiation asks for a session, a response gives one. No peers, no timers: bytes and keys.
//!
//! 1. [`Local::initiate`] builds an initiation and waits as [`Initiator`]
//! 2. [`Local::verify`] checks MAC1 of either message: the only step that anybody can make us do; `cookie` writes and
//!    checks MAC2
//! 3. [`Local::consume`] opens an initiation: who, when
//! 4. [`Consumed::respond`] builds the response and the responder's keys
//! 5. [`Initiator::finish`] opens the response and gives the initiator's keys
//!
//! The functions below stand in that order. `snow` wipes neither its chaining key nor its copy of the pre-shared key when
//! a handshake is dropped; all other secrets of a handshake are wiped.
//! Source: WireGuard paper sections 5.4.2 to 5.4.4; Noise specification (IKpsk2).

use std::time::Duration;

use blake2::digest::consts::U16;
use blake2::digest::{FixedOutput, KeyInit, Mac};
use blake2::{Blake2s256, Blake2sMac, Digest};
use snow::{Builder, HandshakeState};
use zeroize::Zeroizing;

use super::constants::{
    CLOCK_SKEW, INITIATION_LEN, LABEL_MAC1, MACS_LEN, PROLOGUE, RESPONSE_LEN, TYPE_INITIATION, TYPE_RESPONSE,
};
use super::cookie::CookieKey;
use super::index::ReceiverIndex;
use super::resolver::Resolver;
use super::{PresharedKey, PublicKey, StaticSecret, Suite};
use crate::proto::Now;
use crate::proto::drop::DropReason;

/// Where the pre-shared key is mixed in.
const PSK_POSITION: u8 = 2;

/// Random bytes that become an ephemeral secret.
pub(super) type Ephemeral = Zeroizing<[u8; 32]>;

/// A handshake time stamp; later stamps compare greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Tai64n(pub(super) [u8; 12]);

impl Tai64n {
    /// The stamp of a time since the Unix epoch.
    pub(super) fn from_unix(wall: Duration) -> Self {
        // The label of 1970-01-01 00:00:10 TAI is 2^62 + 10; leap seconds since are not counted.
        let seconds = (0x4000_0000_0000_000a_u64).saturating_add(wall.as_secs());
        let mut stamp = [0; 12];
        stamp[..8].copy_from_slice(&seconds.to_be_bytes());
        stamp[8..].copy_from_slice(&wall.subsec_nanos().to_be_bytes());
        Self(stamp)
    }

    /// Whether it is further in the future than clocks may differ.
    pub(super) fn is_skewed(self, now: Now) -> bool {
        self > Self::from_unix(now.wall + CLOCK_SKEW)
    }

    /// The time from an earlier stamp to this one.
    pub(super) fn since(self, earlier: Self) -> Duration {
        self.as_duration().saturating_sub(earlier.as_duration())
    }

    /// Since some moment that is the same for all.
    fn as_duration(self) -> Duration {
        let [seconds @ .., a, b, c, d] = self.0;
        let nanoseconds = u64::from(u32::from_be_bytes([a, b, c, d]));
        Duration::from_secs(u64::from_be_bytes(seconds)).saturating_add(Duration::from_nanos(nanoseconds))
    }
}

/// The key of MAC1 towards one public key.
pub(super) struct Mac1Key([u8; 32]);

impl Mac1Key {
    pub(super) fn new(public: &PublicKey) -> Self {
        Self(Blake2s256::new().chain_update(LABEL_MAC1).chain_update(public.0).finalize().into())
    }

    fn append<const N: usize>(&self, message: &mut [u8; N]) {
        let (covered, macs) = message.split_at_mut(N - MACS_LEN);
        macs[..16].copy_from_slice(&mac(&self.0, covered).finalize_fixed());
    }

    fn matches(&self, message: &[u8]) -> bool {
        message
            .split_at_checked(message.len().wrapping_sub(MACS_LEN))
            .is_some_and(|(covered, macs)| mac(&self.0, covered).verify_slice(&macs[..16]).is_ok())
    }
}

/// The keyed hash of MAC1, MAC2 and cookies. `key` is 16 or 32 bytes.
pub(super) fn mac(key: &[u8], message: &[u8]) -> Blake2sMac<U16> {
    let mac = <Blake2sMac<U16> as KeyInit>::new_from_slice(key).expect("at most 32 bytes are a BLAKE2s key");
    Mac::chain_update(mac, message)
}

/// Keys of a finished handshake, from this side's view.
pub(super) struct SessionKeys {
    pub(super) sealing: Zeroizing<[u8; 32]>,
    pub(super) opening: Zeroizing<[u8; 32]>,
    /// What the peer wants to see as receiver.
    pub(super) remote: ReceiverIndex,
}

/// One of our own static keys.
pub(super) struct Local {
    secret: StaticSecret,
    mac1: Mac1Key,
    /// Seals the cookies of those who know this key by its public half.
    pub(super) cookie: CookieKey,
    suite: Suite,
}

/// An initiation that was sent and not answered yet.
pub(super) struct Initiator(HandshakeState);

/// An initiation that was received and opened.
pub(super) struct Consumed {
    state: HandshakeState,
    remote: ReceiverIndex,
    /// Static key of the sender, proven.
    pub(super) public: PublicKey,
    /// Time stamp of the sender, proven.
    pub(super) stamp: Tai64n,
}

impl Local {
    pub(super) fn new(secret: StaticSecret, suite: Suite) -> Self {
        let public = secret.public();
        Self { secret, mac1: Mac1Key::new(&public), cookie: CookieKey::new(&public), suite }
    }

    /// The bytes of the private half.
    pub(super) fn secret(&self) -> &[u8] {
        &self.secret.0
    }

    /// Builds an initiation to `remote`.
    ///
    /// # Errors
    /// [`DropReason::HandshakeInvalid`] when `remote` is a low-order point.
    pub(super) fn initiate(
        &self,
        remote: &PublicKey,
        remote_mac1: &Mac1Key,
        psk: &PresharedKey,
        index: ReceiverIndex,
        stamp: Tai64n,
        ephemeral: Ephemeral,
    ) -> Result<(Initiator, [u8; INITIATION_LEN]), DropReason> {
        let mut state = self
            .builder(ephemeral)
            .and_then(|builder| builder.remote_public_key(&remote.0))
            .and_then(|builder| builder.psk(PSK_POSITION, &psk.0))
            .and_then(Builder::build_initiator)
            .map_err(invalid)?;
        let mut message = [0; INITIATION_LEN];
        message[..4].copy_from_slice(&TYPE_INITIATION.to_le_bytes());
        message[4..8].copy_from_slice(&index.to_wire());
        state.write_message(&stamp.0, &mut message[8..INITIATION_LEN - MACS_LEN]).map_err(invalid)?;
        remote_mac1.append(&mut message);
        Ok((Initiator(state), message))
    }

    /// Whether MAC1 of a handshake message was made by someone who knows this public key.
    pub(super) fn verify(&self, message: &[u8]) -> bool {
        self.mac1.matches(message)
    }

    /// Opens an initiation. Changes nothing but the returned state.
    ///
    /// # Errors
    /// [`DropReason::HandshakeInvalid`] when it does not decrypt under this key.
    pub(super) fn consume(
        &self,
        message: &[u8; INITIATION_LEN],
        ephemeral: Ephemeral,
    ) -> Result<Consumed, DropReason> {
        let mut state = self.builder(ephemeral).and_then(Builder::build_responder).map_err(invalid)?;
        let mut stamp = [0; 12];
        let length =
            state.read_message(&message[8..INITIATION_LEN - MACS_LEN], &mut stamp).map_err(invalid)?;
        let public = state.get_remote_static().and_then(|public| public.try_into().ok());
        let (12, Some(public)) = (length, public) else { return Err(DropReason::HandshakeInvalid) };
        Ok(Consumed { state, remote: index_at(message, 4), public: PublicKey(public), stamp: Tai64n(stamp) })
    }

    fn builder(&self, ephemeral: Ephemeral) -> Result<Builder<'_>, snow::Error> {
        Builder::with_resolver(
            self.suite.noise_name().parse()?,
            Box::new(Resolver { ephemeral, suite: self.suite }),
        )
        .prologue(PROLOGUE)?
        .local_private_key(&self.secret.0)
    }
}

impl Consumed {
    /// Builds the response.
    ///
    /// # Errors
    /// [`DropReason::HandshakeInvalid`] when the initiator's ephemeral key is a low-order point.
    pub(super) fn respond(
        mut self,
        remote_mac1: &Mac1Key,
        psk: &PresharedKey,
        index: ReceiverIndex,
    ) -> Result<(SessionKeys, [u8; RESPONSE_LEN]), DropReason> {
        self.state.set_psk(usize::from(PSK_POSITION), &psk.0).map_err(invalid)?;
        let mut message = [0; RESPONSE_LEN];
        message[..4].copy_from_slice(&TYPE_RESPONSE.to_le_bytes());
        message[4..8].copy_from_slice(&index.to_wire());
        message[8..12].copy_from_slice(&self.remote.to_wire());
        self.state.write_message(&[], &mut message[12..RESPONSE_LEN - MACS_LEN]).map_err(invalid)?;
        remote_mac1.append(&mut message);
        let (initiator, responder) = split(&mut self.state);
        Ok((SessionKeys { sealing: responder, opening: initiator, remote: self.remote }, message))
    }
}

impl Initiator {
    /// Opens the response. A message that does not decrypt leaves the initiation as it was; the caller drops it
    /// after success, so that no response counts twice.
    ///
    /// # Errors
    /// [`DropReason::HandshakeInvalid`] when it does not decrypt.
    pub(super) fn finish(&mut self, message: &[u8; RESPONSE_LEN]) -> Result<SessionKeys, DropReason> {
        self.0.read_message(&message[12..RESPONSE_LEN - MACS_LEN], &mut []).map_err(invalid)?;
        let (initiator, responder) = split(&mut self.0);
        Ok(SessionKeys { sealing: initiator, opening: responder, remote: index_at(message, 4) })
    }
}

/// The four bytes at `at` as an index.
pub(super) fn index_at(message: &[u8], at: usize) -> ReceiverIndex {
    ReceiverIndex::from_wire(message[at..at + 4].try_into().expect("four bytes"))
}

fn split(state: &mut HandshakeState) -> (Zeroizing<[u8; 32]>, Zeroizing<[u8; 32]>) {
    let (initiator, responder) = state.dangerously_get_raw_split();
    (Zeroizing::new(initiator), Zeroizing::new(responder))
}

fn invalid(_: snow::Error) -> DropReason {
    DropReason::HandshakeInvalid
}
