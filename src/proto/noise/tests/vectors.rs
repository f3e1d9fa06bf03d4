//! Known answers: a whole handshake and the first messages under it, byte for byte, and the cipher against another
//! implementation.
//!
//! The vectors come from `tests/vectors/handshake.py`, a separate program on Python's `hashlib`, `hmac` and the
//! `cryptography` package (whose ChaCha20 block function gives XChaCha20's key): static secrets 0x11 and 0x22, ephemeral secrets 0x33 and 0x44, pre-shared key 0x55 (32 times
//! each), sender indices 0x01020304 and 0x0a0b0c0d, time 1700000000.123456789 s after the Unix epoch;
//! cookie secret 0x66 (32 times), nonce 0x77 (24 times), sender's port 51820.

use aes_gcm::Aes256Gcm;
use chacha20poly1305::ChaCha20Poly1305;
use chacha20poly1305::aead::{AeadInOut, KeyInit};
use proptest::prelude::*;
use zeroize::Zeroizing;

use super::super::cookie::{Cookie, CookieKey, Cookies};
use super::super::handshake::{Mac1Key, SessionKeys, Tai64n};
use super::super::index::ReceiverIndex;
use super::super::session::Role;
use super::super::*;
use super::pair::*;

/// Initiation, response, data, keepalive.
const CHACHA20POLY1305: [&str; 4] = [
    "01000000040302017b0d47d93427f8311160781c7c733fd89f88970aef490d8aa0ee19a4cb8a1b1481e498317da959fb\
     a46669572516a5e6c021bfa620bb6c56ca0082e1feae14988c2c64d024c617734a263f76a008df04d0f94bad8ee75ec8\
     e699a440b4a50daa11f4b49e4391d702b229aa3b568b8ed0e3ceebefd4b11f97517007a6000000000000000000000000\
     00000000",
    "020000000d0c0b0a04030201ff2ee45601ec1b67310c7790404585ae697331eee1c1f8cf2419731c1fff3e6bda81a927\
     fedf673417b5274250355a3fe12577315a06f95b40d38b9e8256169300000000000000000000000000000000",
    "040000000d0c0b0a00000000000000007f3932ea7a4881eddf24722904314426b3e981a151e1de827b282aaebf0ec193",
    "040000000403020100000000000000004546b4bebf67c6c95055c71188ff8c4e",
];
const AES256GCM: [&str; 4] = [
    "01000000040302017b0d47d93427f8311160781c7c733fd89f88970aef490d8aa0ee19a4cb8a1b146ebed51196766a5e\
     c7cb069c700ada5771507f9a29698025a407e244c4cb0313d2ca7adc0e0ab69c8d39a67888a0ca7d8c7cd28b5078539d\
     42d58bcf836341987c4fe2dd2e7703c5c2b11f1b40b9e35940bad3bd32be75adc65fc140000000000000000000000000\
     00000000",
    "020000000d0c0b0a04030201ff2ee45601ec1b67310c7790404585ae697331eee1c1f8cf2419731c1fff3e6b1009e75f\
     11702f749273112b54569c5d0179ca76d505a0bcd5ce90ed86dbd6c900000000000000000000000000000000",
    "040000000d0c0b0a00000000000000005cf7681ef75cdd3675b1da90e6c74f6db6cb6b9deb684fedadb6651061101aa5",
    "040000000403020100000000000000001bb0e0158596fd60e1dcbb66f5666cb3",
];

/// Sender, cookie reply to the first initiation above, and MAC2 of that initiation with the cookie.
const COOKIES: [[&str; 3]; 2] = [
    [
        "10.0.0.1:51820",
        "0300000004030201777777777777777777777777777777777777777777777777029e126a0d0f79261012332de34c7d52\
         b1793649a4c5adc39ec666f2628dc019",
        "8bd04fa3d7cd1021ab7dc61661cb4e3a",
    ],
    [
        "[fd00::1]:51820",
        "03000000040302017777777777777777777777777777777777777777777777779a7932b086799a59beb4fa8e05ebc310\
         d8f668f8e176a7d0526c9ad976fde68c",
        "fce727fe8006dd3484036cc9ad544174",
    ],
];

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn session(keys: &SessionKeys, suite: Suite, role: Role) -> Session {
    let (local, public) = (ReceiverIndex::from_wire([0; 4]), secret(0x22).public());
    Session::new(keys, suite, local, role, public, u64::MAX, epoch().instant)
}

#[test]
fn handshake_and_first_messages_equal_the_known_answer_in_both_suites() {
    known_answer(Suite::ChaCha20Poly1305, CHACHA20POLY1305);
    known_answer(Suite::Aes256Gcm, AES256GCM);
}

fn known_answer(suite: Suite, expected: [&str; 4]) {
    let (initiator, responder) = (Local::new(secret(0x11), suite), Local::new(secret(0x22), suite));
    let [initiator_public, responder_public] = [secret(0x11).public(), secret(0x22).public()];
    let psk = PresharedKey([0x55; 32]);
    let index = |n: u32| ReceiverIndex::from_wire(n.to_le_bytes());
    let stamp = Tai64n::from_unix(Duration::new(1_700_000_000, 123_456_789));

    let (mut waiting, initiation) = initiator
        .initiate(
            &responder_public,
            &Mac1Key::new(&responder_public),
            &psk,
            index(0x0102_0304),
            stamp,
            Zeroizing::new([0x33; 32]),
        )
        .unwrap();
    assert_eq!(hex(&initiation), expected[0]);

    assert!(responder.verify(&initiation) && !initiator.verify(&initiation));
    let consumed = responder.consume(&initiation, Zeroizing::new([0x44; 32])).unwrap();
    assert_eq!((consumed.public, consumed.stamp), (initiator_public, stamp));
    let (responder_keys, response) =
        consumed.respond(&Mac1Key::new(&initiator_public), &psk, index(0x0a0b_0c0d)).unwrap();
    assert_eq!(hex(&response), expected[1]);

    assert!(initiator.verify(&response));
    let initiator_keys = waiting.finish(&response).unwrap();
    let mut data = [0xff; 48];
    session(&initiator_keys, suite, Role::Initiator).seal(b"sixteen bytes ok", &mut data).unwrap();
    assert_eq!(hex(&data), expected[2]);
    let mut keepalive = [0xff; 32];
    let mut answering = session(&responder_keys, suite, Role::Responder);
    answering.seal(&[], &mut keepalive).unwrap();
    assert_eq!(hex(&keepalive), expected[3]);
    let opened = answering.open(&mut data).unwrap();
    assert_eq!((opened.counter, &data[opened.payload]), (0, &b"sixteen bytes ok"[..]));
}

#[test]
fn cookie_reply_and_mac2_equal_the_known_answer() {
    let text = CHACHA20POLY1305[0];
    let bytes = (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap());
    let initiation: [u8; INITIATION_LEN] = bytes.collect::<Vec<_>>().try_into().unwrap();
    let responder = secret(0x22).public();
    for [from, reply, mac2] in COOKIES {
        let cookie = Cookie::of(&[0x66; 32], from.parse().unwrap());
        let sealed = CookieKey::new(&responder).seal(&cookie, &initiation, [0x77; 24]);
        assert_eq!(hex(&sealed), reply);

        let (mut cookies, mut message) = (Cookies::default(), initiation);
        cookies.complete_initiation(&mut message, responder, epoch().instant);
        assert_eq!(message, initiation, "there is no cookie yet");
        cookies.take(&sealed, epoch().instant).unwrap();
        cookies.complete_initiation(&mut message, responder, epoch().instant);
        assert_eq!((&message[..132], hex(&message[132..])), (&initiation[..132], mac2.to_owned()));
    }
}

#[test]
fn time_stamp_is_tai64n() {
    assert!(Tai64n::from_unix(secs(1)) > Tai64n::from_unix(Duration::new(0, 999_999_999)));
    assert!(Tai64n::from_unix(Duration::new(5, 2)) > Tai64n::from_unix(Duration::new(5, 1)));
    assert!(Tai64n::from_unix(Duration::MAX) > Tai64n::from_unix(secs(1 << 40)));
}

/// Encrypts in place with another implementation, and returns the tag.
fn reference(suite: Suite, key: [u8; 32], counter: u64, text: &mut [u8]) -> [u8; 16] {
    let mut nonce = [0; 12];
    let tag = match suite {
        Suite::ChaCha20Poly1305 => {
            nonce[4..].copy_from_slice(&counter.to_le_bytes());
            ChaCha20Poly1305::new(&key.into()).encrypt_inout_detached(&nonce.into(), &[], text.into())
        }
        Suite::Aes256Gcm => {
            nonce[4..].copy_from_slice(&counter.to_be_bytes());
            Aes256Gcm::new(&key.into()).encrypt_inout_detached(&nonce.into(), &[], text.into())
        }
    };
    tag.unwrap().into()
}

proptest! {
    #[test]
    fn data_messages_equal_another_implementation(
        suite in prop_oneof![Just(Suite::ChaCha20Poly1305), Just(Suite::Aes256Gcm)],
        key in any::<[u8; 32]>(),
        counter in 0u64..u64::MAX,
        packet in prop::collection::vec(any::<u8>(), 0..1_600),
    ) {
        let keys = SessionKeys {
            sealing: Zeroizing::new(key),
            opening: Zeroizing::new(key),
            remote: ReceiverIndex::from_wire([1, 2, 3, 4]),
        };
        let mut session = session(&keys, suite, Role::Initiator);
        session.set_counter(counter);
        let mut plain = packet.clone();
        plain.resize(packet.len().next_multiple_of(16), 0);
        let mut record = vec![0xff; HEADER_LEN + plain.len() + TAG_LEN];
        session.seal(&packet, &mut record).unwrap();

        let mut expected = plain.clone();
        let tag = reference(suite, key, counter, &mut expected);
        prop_assert_eq!(&record[..4], &[4, 0, 0, 0]);
        prop_assert_eq!(&record[4..8], &[1, 2, 3, 4]);
        prop_assert_eq!(&record[8..16], &counter.to_le_bytes());
        prop_assert_eq!(&record[16..], &[&expected[..], &tag[..]].concat());

        let opened = session.open(&mut record).unwrap();
        prop_assert_eq!(opened.counter, counter);
        prop_assert_eq!(&record[opened.payload], &plain[..]);
    }
}
