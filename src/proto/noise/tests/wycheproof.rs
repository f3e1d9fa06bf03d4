//! Wycheproof's vectors against the seams that the data path, the handshake and the cookies use.
//!
//! Our [`Aead`] makes nonces from counters: vectors whose nonce begins with four zero bytes go through `seal`, `open` and
//! `open_into` as they are, all others through the same call into the library with the nonce given. Other sizes of key,
//! nonce, tag or point cannot be expressed, and are counted.
//! Source: crate `wycheproof` (Apache-2.0), which packs the vectors of project Wycheproof.

use chacha20poly1305::XChaCha20Poly1305;
use chacha20poly1305::aead::{AeadInOut, KeyInit};
use snow::params::DHChoice;
use snow::resolvers::CryptoResolver;
use wycheproof::{TestResult, aead, xdh};
use zeroize::Zeroizing;

use super::super::constants::TAG_LEN;
use super::super::resolver::Resolver;
use super::super::suite::{Aead, Suite};

/// How many vectors went which way.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tally {
    /// Through our own functions, with the counter that the nonce is.
    by_counter: usize,
    /// Through the library call under them.
    by_nonce: usize,
    /// Of those two, forgeries: refused.
    forged: usize,
    /// Of a size that our types do not have.
    other_size: usize,
}

/// The counter that `suite` turns into `nonce`.
fn counter_of(suite: Suite, nonce: &[u8; 12]) -> Option<u64> {
    let counter = nonce.strip_prefix(&[0; 4])?.try_into().ok()?;
    Some(match suite {
        Suite::ChaCha20Poly1305 => u64::from_le_bytes(counter),
        Suite::Aes256Gcm => u64::from_be_bytes(counter),
    })
}

fn run(suite: Suite, name: aead::TestName) -> Tally {
    let mut tally = Tally::default();
    let set = aead::TestSet::load(name).unwrap();
    for test in set.test_groups.iter().flat_map(|group| &group.tests) {
        let id = test.tc_id;
        let (Ok(key), Ok(nonce), Ok(tag)) =
            (test.key[..].try_into(), test.nonce[..].try_into(), <[u8; TAG_LEN]>::try_from(&test.tag[..]))
        else {
            tally.other_size += 1;
            continue;
        };
        let cipher = suite.cipher(key);
        let genuine = test.result == TestResult::Valid;
        tally.forged += usize::from(!genuine);
        let mut text = test.pt.to_vec();
        let mut sealed = [&test.ct[..], &tag].concat();
        let (made, opened) = match counter_of(suite, nonce) {
            Some(counter) => {
                tally.by_counter += 1;
                gathers(&cipher, counter, test, &tag, genuine);
                (cipher.seal(counter, &test.aad, &mut text), cipher.open(counter, &test.aad, &mut sealed))
            }
            None => {
                tally.by_nonce += 1;
                (
                    cipher.seal_under(*nonce, &test.aad, &mut text),
                    cipher.open_under(*nonce, &test.aad, &mut sealed),
                )
            }
        };
        let made = made.ok().expect("far below the length limit");
        let opened = opened.ok().map(|length| &sealed[..length]);
        if genuine {
            assert_eq!((&text[..], made), (&test.ct[..], tag), "{suite:?} {id}");
            assert_eq!(opened, Some(&test.pt[..]), "{suite:?} {id}");
        } else {
            assert_eq!(opened, None, "{suite:?} {id}: {}", test.comment);
        }
    }
    tally
}

/// The handshake's way of opening, from one buffer into another.
fn gathers(cipher: &Aead, counter: u64, test: &aead::Test, tag: &[u8], genuine: bool) {
    let mut out = vec![0; test.ct.len()];
    let opened = cipher.open_into(counter, &test.aad, (&test.ct, tag), &mut out).is_ok();
    assert_eq!(opened, genuine, "{}", test.tc_id);
    assert!(!genuine || out == test.pt[..], "{}", test.tc_id);
}

#[test]
fn chacha20_poly1305_equals_wycheproof() {
    let tally = run(Suite::ChaCha20Poly1305, aead::TestName::ChaCha20Poly1305);
    assert_eq!(tally, Tally { by_counter: 10, by_nonce: 306, forged: 60, other_size: 9 });
}

#[test]
fn aes_256_gcm_equals_wycheproof() {
    let tally = run(Suite::Aes256Gcm, aead::TestName::AesGcm);
    assert_eq!(tally, Tally { by_counter: 1, by_nonce: 65, forged: 27, other_size: 250 });
}

/// Cookies are sealed by the crate itself: its 24-byte nonce is what the cookie reply carries.
#[test]
fn xchacha20_poly1305_equals_wycheproof() {
    let mut tally = Tally::default();
    let set = aead::TestSet::load(aead::TestName::XChaCha20Poly1305).unwrap();
    for test in set.test_groups.iter().flat_map(|group| &group.tests) {
        let (Ok(key), Ok(nonce), Ok(tag)) = (
            <[u8; 32]>::try_from(&test.key[..]),
            <[u8; 24]>::try_from(&test.nonce[..]),
            <[u8; TAG_LEN]>::try_from(&test.tag[..]),
        ) else {
            tally.other_size += 1;
            continue;
        };
        tally.by_nonce += 1;
        let cipher = XChaCha20Poly1305::new(&key.into());
        let mut opened = test.ct.to_vec();
        let result = cipher.decrypt_inout_detached(
            &nonce.into(),
            &test.aad,
            opened.as_mut_slice().into(),
            &tag.into(),
        );
        if test.result == TestResult::Valid {
            assert!(result.is_ok() && opened == test.pt[..], "{}", test.tc_id);
            let mut text = test.pt.to_vec();
            let made =
                cipher.encrypt_inout_detached(&nonce.into(), &test.aad, text.as_mut_slice().into()).unwrap();
            assert_eq!((&text[..], &made[..]), (&test.ct[..], &tag[..]), "{}", test.tc_id);
        } else {
            tally.forged += 1;
            assert!(result.is_err(), "{}: {}", test.tc_id, test.comment);
        }
    }
    assert_eq!(tally, Tally { by_counter: 0, by_nonce: 306, forged: 60, other_size: 9 });
}

/// Vectors whose shared secret is all-zero are refused, whatever the vector allows; all others agree.
#[test]
fn x25519_equals_wycheproof_and_refuses_low_order_points() {
    let resolver = Resolver { ephemeral: Zeroizing::new([0; 32]), suite: Suite::default() };
    let (mut agreed, mut refused, mut other_size) = (0, 0, 0);
    let set = xdh::TestSet::load(xdh::TestName::X25519).unwrap();
    for test in set.test_groups.iter().flat_map(|group| &group.tests) {
        if test.public_key.len() != 32 || test.private_key.len() != 32 {
            other_size += 1;
            continue;
        }
        let mut ours = resolver.resolve_dh(&DHChoice::Curve25519).unwrap();
        ours.set(&test.private_key);
        let mut shared = [0xff; 32];
        let result = ours.dh(&test.public_key, &mut shared);
        if test.shared_secret.iter().all(|byte| *byte == 0) {
            refused += 1;
            assert!(result.is_err(), "{}: {}", test.tc_id, test.comment);
            assert_eq!(shared, [0xff; 32], "nothing is given out: {}", test.tc_id);
        } else {
            agreed += 1;
            assert_ne!(test.result, TestResult::Invalid, "{}", test.tc_id);
            assert!(result.is_ok() && shared == test.shared_secret[..], "{}: {}", test.tc_id, test.comment);
        }
    }
    assert_eq!((agreed, refused, other_size), (487, 31, 0));
}
