//! Primitives for the handshake, handed to `snow`: X25519 that refuses low-order points, BLAKE2s, and the suite's cipher.
//!
//! The ephemeral secret is drawn from the core's generator by the caller, so that the handshake reads no randomness of
//! its own. Secrets held here are wiped when dropped.
//! Source: Noise specification revision 34, sections 4 and 12; RFC 7748 section 6.1 (all-zero shared secret).

use blake2::{Blake2s256, Digest};
use snow::params::{CipherChoice, DHChoice, HashChoice};
use snow::resolvers::CryptoResolver;
use snow::types::{Cipher, Dh, Hash, Random};
use zeroize::Zeroizing;

use super::constants::TAG_LEN;
use super::suite::{Aead, Suite};

/// Primitives of one handshake.
pub(super) struct Resolver {
    /// The bytes that become the ephemeral secret.
    pub(super) ephemeral: Zeroizing<[u8; 32]>,
    pub(super) suite: Suite,
}

impl CryptoResolver for Resolver {
    fn resolve_rng(&self) -> Option<Box<dyn Random>> {
        Some(Box::new(Once(Some(self.ephemeral.clone()))))
    }

    fn resolve_dh(&self, choice: &DHChoice) -> Option<Box<dyn Dh>> {
        matches!(choice, DHChoice::Curve25519).then(|| Box::new(X25519::default()) as Box<dyn Dh>)
    }

    fn resolve_hash(&self, choice: &HashChoice) -> Option<Box<dyn Hash>> {
        matches!(choice, HashChoice::Blake2s).then(|| Box::new(Blake2s::default()) as Box<dyn Hash>)
    }

    fn resolve_cipher(&self, choice: &CipherChoice) -> Option<Box<dyn Cipher>> {
        let ours = match self.suite {
            Suite::ChaCha20Poly1305 => CipherChoice::ChaChaPoly,
            Suite::Aes256Gcm => CipherChoice::AESGCM,
        };
        (*choice == ours)
            .then(|| Box::new(HandshakeCipher { suite: self.suite, key: None }) as Box<dyn Cipher>)
    }
}

/// Gives its bytes once; a handshake makes one ephemeral key.
struct Once(Option<Zeroizing<[u8; 32]>>);

impl Random for Once {
    fn try_fill_bytes(&mut self, dest: &mut [u8]) -> Result<(), snow::Error> {
        let bytes = self.0.take().filter(|bytes| bytes.len() == dest.len()).ok_or(snow::Error::Rng)?;
        dest.copy_from_slice(&bytes[..]);
        Ok(())
    }
}

struct X25519 {
    secret: Zeroizing<[u8; 32]>,
    public: [u8; 32],
}

impl Default for X25519 {
    fn default() -> Self {
        Self { secret: Zeroizing::new([0; 32]), public: [0; 32] }
    }
}

impl Dh for X25519 {
    fn name(&self) -> &'static str {
        "25519"
    }

    fn pub_len(&self) -> usize {
        32
    }

    fn priv_len(&self) -> usize {
        32
    }

    fn set(&mut self, privkey: &[u8]) {
        self.secret.copy_from_slice(privkey);
        let secret = x25519_dalek::StaticSecret::from(*self.secret);
        self.public = x25519_dalek::PublicKey::from(&secret).to_bytes();
    }

    fn generate(&mut self, rng: &mut dyn Random) -> Result<(), snow::Error> {
        let mut bytes = Zeroizing::new([0; 32]);
        rng.try_fill_bytes(&mut bytes[..])?;
        self.set(&bytes[..]);
        Ok(())
    }

    fn pubkey(&self) -> &[u8] {
        &self.public
    }

    fn privkey(&self) -> &[u8] {
        &self.secret[..]
    }

    fn dh(&self, pubkey: &[u8], out: &mut [u8]) -> Result<(), snow::Error> {
        let theirs: [u8; 32] = pubkey.get(..32).and_then(|p| p.try_into().ok()).ok_or(snow::Error::Dh)?;
        let secret = x25519_dalek::StaticSecret::from(*self.secret);
        let shared = secret.diffie_hellman(&x25519_dalek::PublicKey::from(theirs));
        if !shared.was_contributory() {
            return Err(snow::Error::Dh);
        }
        out.get_mut(..32).ok_or(snow::Error::Dh)?.copy_from_slice(shared.as_bytes());
        Ok(())
    }
}

#[derive(Default)]
struct Blake2s(Blake2s256);

impl Hash for Blake2s {
    fn name(&self) -> &'static str {
        "BLAKE2s"
    }

    fn block_len(&self) -> usize {
        64
    }

    fn hash_len(&self) -> usize {
        32
    }

    fn reset(&mut self) {
        self.0 = Blake2s256::new();
    }

    fn input(&mut self, data: &[u8]) {
        self.0.update(data);
    }

    fn result(&mut self, out: &mut [u8]) {
        out[..32].copy_from_slice(&std::mem::take(&mut self.0).finalize());
    }
}

struct HandshakeCipher {
    suite: Suite,
    key: Option<Aead>,
}

impl HandshakeCipher {
    fn key(&self) -> &Aead {
        self.key.as_ref().expect("snow sets a key before it uses a cipher")
    }
}

impl Cipher for HandshakeCipher {
    fn name(&self) -> &'static str {
        match self.suite {
            Suite::ChaCha20Poly1305 => "ChaChaPoly",
            Suite::Aes256Gcm => "AESGCM",
        }
    }

    fn set(&mut self, key: &[u8; 32]) {
        self.key = Some(self.suite.cipher(key));
    }

    fn encrypt(&self, nonce: u64, authtext: &[u8], plaintext: &[u8], out: &mut [u8]) -> usize {
        let (text, rest) = out.split_at_mut(plaintext.len());
        text.copy_from_slice(plaintext);
        let sealed = self.key().seal(nonce, authtext, text).ok();
        let tag = sealed.expect("handshake fields are far below the cipher's length limit");
        rest[..TAG_LEN].copy_from_slice(&tag);
        plaintext.len() + TAG_LEN
    }

    fn decrypt(
        &self,
        nonce: u64,
        authtext: &[u8],
        ciphertext: &[u8],
        out: &mut [u8],
    ) -> Result<usize, snow::Error> {
        let length = ciphertext.len().checked_sub(TAG_LEN).ok_or(snow::Error::Decrypt)?;
        let (text, tag) = ciphertext.split_at(length);
        let out = out.get_mut(..length).ok_or(snow::Error::Decrypt)?;
        let opened = self.key().open_into(nonce, authtext, (text, tag), out);
        opened.map(|()| length).map_err(|_| snow::Error::Decrypt)
    }
}
