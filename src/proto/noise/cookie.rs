//! Cookies: a sender shows that it receives at the address and port it writes from, before it is worth a Diffie-Hellman.
//!
//! 1. [`CookieSecret::reply`]: a responder under load answers a handshake message with a cookie. The cookie is a MAC over
//!    the sender's address and port, so nothing is stored about it; it is sealed under the responder's public key, bound
//!    to MAC1 of that message
//! 2. [`Cookies::take`]: the sender opens the reply to a message of its own and keeps the cookie
//! 3. [`Cookies::complete_initiation`], [`Cookies::complete_response`]: each later handshake message to that peer bears MAC2,
//!    keyed by the cookie
//! 4. [`CookieSecret::is_proven`]: the responder makes the same cookie again and checks MAC2
//!
//! The functions below stand in that order. A reply makes nobody send: the next retry, which comes soon, bears MAC2. It
//! counts once, so that a replayed one does not make an old cookie young. A successor starts without secret and cookies:
//! a MAC2 that it cannot check is none, and costs its sender one retry.
//! Source: WireGuard paper sections 5.3, 5.4.4 and 5.4.7.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use blake2::digest::FixedOutput;
use blake2::{Blake2s256, Digest};
use chacha20poly1305::aead::{AeadInOut, KeyInit};
use chacha20poly1305::{Tag, XChaCha20Poly1305, XNonce};
use rand::Rng;
use rand_chacha::ChaCha20Rng;
use zeroize::Zeroizing;

use super::PublicKey;
use super::constants::{
    COOKIE_LEN, COOKIE_LIFE, COOKIE_SECRET_LIFE, INITIATION_LEN, LABEL_COOKIE, MACS_LEN, RESPONSE_LEN,
    TYPE_COOKIE,
};
use super::handshake::{index_at, mac};
use super::index::ReceiverIndex;
use crate::proto::drop::DropReason;

/// Bytes of MAC1, of MAC2, of a cookie and of its tag.
const MAC_LEN: usize = 16;
/// Where the nonce of a reply ends and the sealed cookie begins.
const SEALED: usize = COOKIE_LEN - 2 * MAC_LEN;

/// What cookies are made of; for all addresses and static keys of ours together.
#[derive(Default)]
pub(super) struct CookieSecret(Option<(Zeroizing<[u8; 32]>, Instant)>);

impl CookieSecret {
    /// The answer to a handshake message from `from`.
    pub(super) fn reply(
        &mut self,
        key: &CookieKey,
        from: SocketAddr,
        message: &[u8],
        rng: &mut ChaCha20Rng,
        now: Instant,
    ) -> [u8; COOKIE_LEN] {
        if self.current(now).is_none() {
            let mut secret = Zeroizing::new([0; 32]);
            rng.fill_bytes(&mut secret[..]);
            self.0 = Some((secret, now));
        }
        let secret = self.current(now).expect("made when there was none");
        let mut nonce = [0; 24];
        rng.fill_bytes(&mut nonce);
        key.seal(&Cookie::of(secret, from), message, nonce)
    }

    /// Whether MAC2 of a handshake message shows that its sender got our cookie at `from`.
    pub(super) fn is_proven(&self, from: SocketAddr, message: &[u8], now: Instant) -> bool {
        // Who has no cookie writes zeros, which are not worth two MACs more: most of a flood is of this kind.
        let bears_one = !message.ends_with(&[0; MAC_LEN]);
        bears_one && self.current(now).is_some_and(|secret| Cookie::of(secret, from).matches(message))
    }

    fn current(&self, now: Instant) -> Option<&[u8; 32]> {
        let (secret, made) = self.0.as_ref()?;
        is_younger(*made, COOKIE_SECRET_LIFE, now).then_some(&**secret)
    }
}

/// The key that cookies of one static public key are sealed with. Everybody who knows the public key has it.
pub(super) struct CookieKey([u8; 32]);

impl CookieKey {
    pub(super) fn new(public: &PublicKey) -> Self {
        Self(Blake2s256::new().chain_update(LABEL_COOKIE).chain_update(public.0).finalize().into())
    }

    fn cipher(&self) -> XChaCha20Poly1305 {
        XChaCha20Poly1305::new(&self.0.into())
    }

    /// The cookie reply to `message`.
    pub(super) fn seal(&self, cookie: &Cookie, message: &[u8], nonce: [u8; 24]) -> [u8; COOKIE_LEN] {
        let mut reply = [0; COOKIE_LEN];
        reply[..4].copy_from_slice(&TYPE_COOKIE.to_le_bytes());
        reply[4..8].copy_from_slice(&index_at(message, 4).to_wire());
        reply[8..SEALED].copy_from_slice(&nonce);
        let (sealed, tag) = reply[SEALED..].split_at_mut(MAC_LEN);
        sealed.copy_from_slice(&cookie.0[..]);
        let made = self.cipher().encrypt_inout_detached(&XNonce::from(nonce), mac1(message), sealed.into());
        tag.copy_from_slice(&made.expect("16 bytes are no more than the cipher takes"));
        reply
    }

    /// The cookie of a reply to the message with this MAC1.
    fn open(&self, reply: &[u8; COOKIE_LEN], mac1: &[u8; MAC_LEN]) -> Result<Cookie, DropReason> {
        let part =
            |from: usize| -> [u8; MAC_LEN] { reply[from..from + MAC_LEN].try_into().expect("16 bytes") };
        let nonce: [u8; 24] = reply[8..SEALED].try_into().expect("24 bytes");
        let (mut cookie, tag) = (Zeroizing::new(part(SEALED)), Tag::from(part(SEALED + MAC_LEN)));
        self.cipher()
            .decrypt_inout_detached(&XNonce::from(nonce), mac1, (&mut cookie[..]).into(), &tag)
            .map_err(|_| DropReason::HandshakeInvalid)?;
        Ok(Cookie(cookie))
    }
}

/// Proof of an address and port.
pub(super) struct Cookie(Zeroizing<[u8; MAC_LEN]>);

impl Cookie {
    /// The cookie of an address and port.
    pub(super) fn of(secret: &[u8; 32], from: SocketAddr) -> Self {
        let (mut bytes, len) = ([0; 18], if from.is_ipv4() { 4 } else { 16 });
        match from.ip() {
            IpAddr::V4(address) => bytes[..len].copy_from_slice(&address.octets()),
            IpAddr::V6(address) => bytes[..len].copy_from_slice(&address.octets()),
        }
        bytes[len..len + 2].copy_from_slice(&from.port().to_be_bytes());
        Self(Zeroizing::new(mac(secret, &bytes[..len + 2]).finalize_fixed().into()))
    }

    /// Writes MAC2 of a handshake message, which bears MAC1 already.
    fn append(&self, message: &mut [u8]) {
        let (covered, mac2) = message.split_at_mut(message.len() - MAC_LEN);
        mac2.copy_from_slice(&mac(&self.0[..], covered).finalize_fixed());
    }

    fn matches(&self, message: &[u8]) -> bool {
        let (covered, mac2) = message.split_at(message.len() - MAC_LEN);
        blake2::digest::Mac::verify_slice(mac(&self.0[..], covered), mac2).is_ok()
    }
}

/// Our side towards one peer: the messages that it may answer with a cookie, and the cookie that it gave.
#[derive(Default)]
pub(super) struct Cookies {
    initiation: Option<Sent>,
    response: Option<Sent>,
    cookie: Option<(Cookie, Instant)>,
}

/// A handshake message in flight.
struct Sent {
    index: ReceiverIndex,
    /// Whom it is for: a peer may have two keys.
    to: PublicKey,
    mac1: [u8; MAC_LEN],
}

impl Sent {
    fn new(message: &[u8], to: PublicKey) -> Self {
        Self { index: index_at(message, 4), to, mac1: *mac1(message) }
    }

    fn is_answered_by(&self, reply: &[u8; COOKIE_LEN]) -> bool {
        self.index == index_at(reply, 4)
    }
}

impl Cookies {
    /// Completes an initiation to `to`, the newest one in flight from now on.
    pub(super) fn complete_initiation(
        &mut self,
        message: &mut [u8; INITIATION_LEN],
        to: PublicKey,
        now: Instant,
    ) {
        self.initiation = Some(Sent::new(message, to));
        self.append(message, now);
    }

    /// Completes a response to `to`, the newest one in flight from now on.
    pub(super) fn complete_response(
        &mut self,
        message: &mut [u8; RESPONSE_LEN],
        to: PublicKey,
        now: Instant,
    ) {
        self.response = Some(Sent::new(message, to));
        self.append(message, now);
    }

    fn append(&mut self, message: &mut [u8], now: Instant) {
        self.cookie.take_if(|(_, taken)| !is_younger(*taken, COOKIE_LIFE, now));
        if let Some((cookie, _)) = &self.cookie {
            cookie.append(message);
        }
    }

    /// A session stands: no message is in flight any more.
    pub(super) fn settle(&mut self) {
        (self.initiation, self.response) = (None, None);
    }

    /// Whether a reply is to a message in flight that was not answered with a cookie yet.
    ///
    /// # Errors
    /// [`DropReason::IndexUnknown`] when it is not.
    pub(super) fn expects(&self, reply: &[u8; COOKIE_LEN]) -> Result<(), DropReason> {
        let mut in_flight = [&self.initiation, &self.response].into_iter().flatten();
        in_flight.find(|sent| sent.is_answered_by(reply)).map(drop).ok_or(DropReason::IndexUnknown)
    }

    /// Takes the cookie out of a reply that [`Self::expects`] let through.
    ///
    /// # Errors
    /// [`DropReason::HandshakeInvalid`] when it is not authentic under that message's MAC1. Nothing changes then.
    pub(super) fn take(&mut self, reply: &[u8; COOKIE_LEN], now: Instant) -> Result<(), DropReason> {
        for slot in [&mut self.initiation, &mut self.response] {
            if let Some(sent) = slot.as_ref().filter(|sent| sent.is_answered_by(reply)) {
                let cookie = CookieKey::new(&sent.to).open(reply, &sent.mac1)?;
                (*slot, self.cookie) = (None, Some((cookie, now)));
                return Ok(());
            }
        }
        Err(DropReason::IndexUnknown)
    }
}

/// MAC1 of a handshake message.
fn mac1(message: &[u8]) -> &[u8; MAC_LEN] {
    message[message.len() - MACS_LEN..].first_chunk().expect("both messages end with two MACs")
}

fn is_younger(since: Instant, limit: Duration, now: Instant) -> bool {
    now.saturating_duration_since(since) < limit
}
