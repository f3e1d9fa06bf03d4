//! Key material as types: `Debug` shows nothing of secrets, and they are zeroised on drop.

use std::fmt;

use serde::{Deserialize, Serialize};
use zeroize::ZeroizeOnDrop;

/// A Curve25519 public key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PublicKey(pub [u8; 32]);

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({:02x}{:02x}{:02x}{:02x}..)", self.0[0], self.0[1], self.0[2], self.0[3])
    }
}

/// A Curve25519 private key, clamped.
#[derive(Clone, ZeroizeOnDrop, Serialize, Deserialize)]
pub struct StaticSecret(pub [u8; 32]);

impl StaticSecret {
    /// The public half.
    #[must_use]
    pub fn public(&self) -> PublicKey {
        let secret = x25519_dalek::StaticSecret::from(self.0);
        PublicKey(*x25519_dalek::PublicKey::from(&secret).as_bytes())
    }
}

impl fmt::Debug for StaticSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StaticSecret(..)")
    }
}

/// The symmetric key that two workloads share.
#[derive(Clone, ZeroizeOnDrop, Serialize, Deserialize)]
pub struct PresharedKey(pub [u8; 32]);

/// What one project key makes of a peer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerKeys {
    /// Its static public key.
    pub public: PublicKey,
    /// The key shared by its address and our address of the same family.
    pub psk: PresharedKey,
}

impl PartialEq for PresharedKey {
    fn eq(&self, other: &Self) -> bool {
        subtle::ConstantTimeEq::ct_eq(&self.0[..], &other.0[..]).into()
    }
}

impl Eq for PresharedKey {}

impl fmt::Debug for PresharedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PresharedKey(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_print_nothing_of_themselves() {
        let (secret, psk) = (StaticSecret([0xab; 32]), PresharedKey([0xab; 32]));
        let public = PublicKey([0xcd; 32]);
        assert_eq!(format!("{secret:?} {psk:?}"), "StaticSecret(..) PresharedKey(..)");
        let printed = format!("{:?}", PeerKeys { public, psk });
        assert_eq!(printed, "PeerKeys { public: PublicKey(cdcdcdcd..), psk: PresharedKey(..) }");
    }
}
