//! Suites, and the seam to the library that encrypts: everything that differs between them is here.
//!
//! `chacha20poly1305` is WireGuard's own. `aes256gcm` is the same protocol with AES-256-GCM in handshake and transport, another
//! Noise name, a big-endian counter in the nonce, and limits that GCM needs.
//! Source: Noise specification revision 34, sections 12.3 and 12.4; NIST SP 800-38D, section 8.3.

use aws_lc_rs::aead::{AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use serde::{Deserialize, Serialize};

use super::constants::{PADDING, REJECT_AFTER_MESSAGES, REKEY_AFTER_MESSAGES, TAG_LEN};

/// Which AEAD the handshake and the transport use: a property of the project, set by the operator, never negotiated. Derived
/// keys are bound to it, so that two suites never share a key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Suite {
    /// WireGuard's own ChaCha20-Poly1305.
    #[default]
    ChaCha20Poly1305,
    /// The same protocol with AES-256-GCM.
    Aes256Gcm,
}

/// Messages under one AES-256-GCM key after which either side makes a new session.
const GCM_REKEY_AFTER_MESSAGES: u64 = 1 << 24;
/// Messages under one AES-256-GCM key after which it neither seals nor opens.
const GCM_REJECT_AFTER_MESSAGES: u64 = 1 << 25;

impl Suite {
    /// The word on the command line and in the derivation.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ChaCha20Poly1305 => "chacha20poly1305",
            Self::Aes256Gcm => "aes256gcm",
        }
    }

    /// Noise protocol name; its hash starts the chaining key.
    pub(super) const fn noise_name(self) -> &'static str {
        match self {
            Self::ChaCha20Poly1305 => "Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s",
            Self::Aes256Gcm => "Noise_IKpsk2_25519_AESGCM_BLAKE2s",
        }
    }

    pub(super) const fn rekey_after_messages(self) -> u64 {
        match self {
            Self::ChaCha20Poly1305 => REKEY_AFTER_MESSAGES,
            Self::Aes256Gcm => GCM_REKEY_AFTER_MESSAGES,
        }
    }

    pub(super) const fn reject_after_messages(self) -> u64 {
        match self {
            Self::ChaCha20Poly1305 => REJECT_AFTER_MESSAGES,
            Self::Aes256Gcm => GCM_REJECT_AFTER_MESSAGES,
        }
    }

    /// The cipher under `key`. Its copy of the key is wiped when it is dropped.
    pub(super) fn cipher(self, key: &[u8; 32]) -> Aead {
        let algorithm = match self {
            Self::ChaCha20Poly1305 => &CHACHA20_POLY1305,
            Self::Aes256Gcm => &AES_256_GCM,
        };
        let key = UnboundKey::new(algorithm, key).expect("the key has the cipher's length");
        Aead { suite: self, key: LessSafeKey::new(key) }
    }
}

/// A message was too long, or is not authentic.
pub(super) struct Refused;

/// One key, ready to seal or open.
pub(super) struct Aead {
    suite: Suite,
    key: LessSafeKey,
}

impl Aead {
    /// Encrypts `text` in place and returns its tag. A counter must never come twice under one key.
    pub(super) fn seal(
        &self,
        counter: u64,
        associated: &[u8],
        text: &mut [u8],
    ) -> Result<[u8; TAG_LEN], Refused> {
        self.seal_with(self.nonce(counter), associated, text)
    }

    /// Encrypts `text` into `out`, followed by zeros, less than [`PADDING`], that leave just the room of the tag.
    pub(super) fn seal_into(&self, counter: u64, text: &[u8], out: &mut [u8]) -> Result<(), Refused> {
        let (sealed, rest) = out.split_at_mut_checked(text.len()).ok_or(Refused)?;
        let padding = rest.len().checked_sub(TAG_LEN).ok_or(Refused)?;
        let zeros = [0; PADDING - 1].get(..padding).ok_or(Refused)?;
        let nonce = self.nonce(counter);
        let done = self.key.seal_out_of_place_scatter(nonce, Aad::empty(), text, sealed, zeros, rest);
        done.map_err(|_| Refused)
    }

    /// Authenticates and decrypts `sealed`, a ciphertext and its tag, in place: the length of the plaintext.
    pub(super) fn open(&self, counter: u64, associated: &[u8], sealed: &mut [u8]) -> Result<usize, Refused> {
        self.open_with(self.nonce(counter), associated, sealed)
    }

    /// The same, from one buffer into another of the plaintext's length.
    pub(super) fn open_into(
        &self,
        counter: u64,
        associated: &[u8],
        (text, tag): (&[u8], &[u8]),
        out: &mut [u8],
    ) -> Result<(), Refused> {
        let opened =
            self.key.open_separate_gather(self.nonce(counter), Aad::from(associated), text, tag, out);
        opened.map_err(|_| Refused)
    }

    /// Four zero bytes and the counter.
    fn nonce(&self, counter: u64) -> Nonce {
        let counter = match self.suite {
            Suite::ChaCha20Poly1305 => counter.to_le_bytes(),
            Suite::Aes256Gcm => counter.to_be_bytes(),
        };
        let mut nonce = [0; NONCE_LEN];
        nonce[4..].copy_from_slice(&counter);
        Nonce::assume_unique_for_key(nonce)
    }

    fn seal_with(&self, nonce: Nonce, associated: &[u8], text: &mut [u8]) -> Result<[u8; TAG_LEN], Refused> {
        let tag = self.key.seal_in_place_separate_tag(nonce, Aad::from(associated), text);
        tag.map_err(|_| Refused)?.as_ref().try_into().map_err(|_| Refused)
    }

    fn open_with(&self, nonce: Nonce, associated: &[u8], sealed: &mut [u8]) -> Result<usize, Refused> {
        let text = self.key.open_in_place(nonce, Aad::from(associated), sealed);
        text.map(|text| text.len()).map_err(|_| Refused)
    }
}

/// Nonces that no counter gives, for published vectors.
#[cfg(test)]
impl Aead {
    pub(super) fn seal_under(
        &self,
        nonce: [u8; NONCE_LEN],
        associated: &[u8],
        text: &mut [u8],
    ) -> Result<[u8; TAG_LEN], Refused> {
        self.seal_with(Nonce::assume_unique_for_key(nonce), associated, text)
    }

    pub(super) fn open_under(
        &self,
        nonce: [u8; NONCE_LEN],
        associated: &[u8],
        sealed: &mut [u8],
    ) -> Result<usize, Refused> {
        self.open_with(Nonce::assume_unique_for_key(nonce), associated, sealed)
    }
}
