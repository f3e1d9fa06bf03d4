//! The Noise framework: published answers for our primitives, and the whole handshake against `snow` with its own.

use proptest::prelude::*;
use serde::Deserialize;
use snow::{Builder, HandshakeState};
use zeroize::Zeroizing;

use super::super::constants::{INITIATION_LEN, PROLOGUE, RESPONSE_LEN};
use super::super::handshake::{Mac1Key, SessionKeys, Tai64n, index_at};
use super::super::index::ReceiverIndex;
use super::super::resolver::Resolver;
use super::super::*;

#[derive(Deserialize)]
struct Published {
    vectors: Vec<Vector>,
}

/// One handshake as its publisher wrote it down, all bytes in hexadecimal.
#[derive(Deserialize)]
struct Vector {
    protocol_name: String,
    init_prologue: String,
    init_psks: [String; 1],
    init_static: String,
    init_ephemeral: String,
    init_remote_static: String,
    resp_prologue: String,
    resp_psks: [String; 1],
    resp_static: String,
    resp_ephemeral: String,
    handshake_hash: String,
    messages: Vec<Message>,
}

#[derive(Deserialize)]
struct Message {
    payload: String,
    ciphertext: String,
}

fn bytes(hex: &str) -> Vec<u8> {
    assert!(hex.len().is_multiple_of(2));
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
}

fn key(hex: &str) -> [u8; 32] {
    bytes(hex).try_into().unwrap()
}

const SUITES: [Suite; 2] = [Suite::ChaCha20Poly1305, Suite::Aes256Gcm];

#[test]
fn published_ikpsk2_handshakes_come_out_of_our_primitives() {
    let published: Published =
        serde_json::from_str(include_str!("../../../../tests/vectors/noise_ikpsk2.json")).unwrap();
    for suite in SUITES {
        let named = |vector: &&Vector| vector.protocol_name == suite.noise_name();
        let vector = published.vectors.iter().find(named).expect("one vector per suite");
        reproduce(suite, vector);
    }
}

fn reproduce(suite: Suite, vector: &Vector) {
    let [init_static, resp_static, remote] =
        [&vector.init_static, &vector.resp_static, &vector.init_remote_static].map(|hex| key(hex));
    let [init_psk, resp_psk] = [&vector.init_psks[0], &vector.resp_psks[0]].map(|hex| key(hex));
    let [init_prologue, resp_prologue] = [&vector.init_prologue, &vector.resp_prologue].map(|hex| bytes(hex));
    let builder = |ephemeral: &str| {
        let resolver = Resolver { ephemeral: Zeroizing::new(key(ephemeral)), suite };
        Builder::with_resolver(suite.noise_name().parse().unwrap(), Box::new(resolver))
    };
    let mut initiator = builder(&vector.init_ephemeral)
        .prologue(&init_prologue)
        .and_then(|builder| builder.psk(2, &init_psk))
        .and_then(|builder| builder.local_private_key(&init_static))
        .and_then(|builder| builder.remote_public_key(&remote))
        .and_then(Builder::build_initiator)
        .unwrap();
    let mut responder = builder(&vector.resp_ephemeral)
        .prologue(&resp_prologue)
        .and_then(|builder| builder.psk(2, &resp_psk))
        .and_then(|builder| builder.local_private_key(&resp_static))
        .and_then(Builder::build_responder)
        .unwrap();

    let (handshake, transport) = vector.messages.split_at(2);
    pass(&mut initiator, &mut responder, &handshake[0]);
    pass(&mut responder, &mut initiator, &handshake[1]);
    assert_eq!(initiator.get_handshake_hash(), bytes(&vector.handshake_hash));
    assert_eq!(responder.get_handshake_hash(), bytes(&vector.handshake_hash));

    // What follows is sealed by our own cipher under the split keys, in turn, each direction with its own counter.
    let (from_initiator, from_responder) = initiator.dangerously_get_raw_split();
    assert_eq!((from_initiator, from_responder), responder.dangerously_get_raw_split());
    let ciphers = [suite.cipher(&from_initiator), suite.cipher(&from_responder)];
    assert_eq!(transport.len(), 4);
    for (n, message) in transport.iter().enumerate() {
        let mut text = bytes(&message.payload);
        let tag = ciphers[n % 2].seal(n as u64 / 2, &[], &mut text).ok().unwrap();
        assert_eq!([&text[..], &tag].concat(), bytes(&message.ciphertext), "{suite:?}, message {n}");
    }
}

fn pass(from: &mut HandshakeState, to: &mut HandshakeState, message: &Message) {
    let (payload, ciphertext) = (bytes(&message.payload), bytes(&message.ciphertext));
    let mut sent = vec![0; ciphertext.len()];
    assert_eq!(from.write_message(&payload, &mut sent).unwrap(), ciphertext.len());
    assert_eq!(sent, ciphertext);
    let mut read = vec![0; payload.len()];
    assert_eq!(to.read_message(&sent, &mut read).unwrap(), payload.len());
    assert_eq!(read, payload);
}

/// Everything random that a handshake is made of.
#[derive(Clone, Debug)]
struct Draw {
    suite: Suite,
    initiator: [u8; 32],
    responder: [u8; 32],
    ephemerals: [[u8; 32]; 2],
    psk: [u8; 32],
    stamp: [u8; 12],
    indices: [[u8; 4]; 2],
}

fn draw() -> impl Strategy<Value = Draw> {
    let suite = prop::sample::select(&SUITES[..]);
    let keys = any::<([u8; 32], [u8; 32], [[u8; 32]; 2], [u8; 32])>();
    (suite, keys, any::<[u8; 12]>(), any::<[[u8; 4]; 2]>()).prop_map(
        |(suite, (initiator, responder, ephemerals, psk), stamp, indices)| Draw {
            suite,
            initiator,
            responder,
            ephemerals,
            psk,
            stamp,
            indices,
        },
    )
}

/// What `snow` makes of a draw by itself: the Noise part of both messages, its transport keys, its hash.
struct Reference {
    initiator: HandshakeState,
    responder: HandshakeState,
    initiation: [u8; 108],
    response: [u8; 48],
}

impl Reference {
    fn state<'a>(draw: &'a Draw, secret: &'a [u8; 32], ephemeral: &'a [u8; 32]) -> Builder<'a> {
        Builder::new(draw.suite.noise_name().parse().unwrap())
            .prologue(PROLOGUE)
            .and_then(|builder| builder.psk(2, &draw.psk))
            .and_then(|builder| builder.local_private_key(secret))
            .unwrap()
            .fixed_ephemeral_key_for_testing_only(ephemeral)
    }

    fn run(draw: &Draw) -> Self {
        let remote = StaticSecret(draw.responder).public().0;
        let mut initiator = Self::state(draw, &draw.initiator, &draw.ephemerals[0])
            .remote_public_key(&remote)
            .and_then(Builder::build_initiator)
            .unwrap();
        let mut responder =
            Self::state(draw, &draw.responder, &draw.ephemerals[1]).build_responder().unwrap();
        let (mut initiation, mut response, mut stamp) = ([0; 108], [0; 48], [0; 12]);
        assert_eq!(initiator.write_message(&draw.stamp, &mut initiation).unwrap(), 108);
        assert_eq!(responder.read_message(&initiation, &mut stamp).unwrap(), 12);
        assert_eq!(responder.write_message(&[], &mut response).unwrap(), 48);
        assert_eq!(initiator.read_message(&response, &mut []).unwrap(), 0);
        Self { initiator, responder, initiation, response }
    }

    fn assert_split(&mut self, ours: &SessionKeys, initiates: bool) {
        let state = if initiates { &mut self.responder } else { &mut self.initiator };
        let (from_initiator, from_responder) = state.dangerously_get_raw_split();
        let (sealing, opening) =
            if initiates { (from_initiator, from_responder) } else { (from_responder, from_initiator) };
        assert_eq!((*ours.sealing, *ours.opening), (sealing, opening));
    }
}

/// `snow`'s message as WireGuard frames it for `receiver`.
fn framed<const N: usize>(kind: u8, indices: &[[u8; 4]], noise: &[u8], receiver: &PublicKey) -> [u8; N] {
    let mut message = [0; N];
    message[0] = kind;
    let head = 4 + 4 * indices.len();
    message[4..head].copy_from_slice(indices.as_flattened());
    message[head..N - 32].copy_from_slice(noise);
    super::hostile::remac(&mut message, receiver);
    message
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    /// Same inputs, same bytes: all that the handshake hash covers is equal, and so is the hash.
    #[test]
    fn handshake_equals_snows_own_in_both_roles(draw in draw()) {
        let mut reference = Reference::run(&draw);
        prop_assert_eq!(reference.initiator.get_handshake_hash(), reference.responder.get_handshake_hash());
        let Draw { suite, initiator, responder, ephemerals, psk, stamp, indices } = draw;
        let [initiator, responder] = [initiator, responder].map(StaticSecret);
        let (our_public, their_public) = (initiator.public(), responder.public());
        let psk = PresharedKey(psk);
        let stamp = Tai64n(stamp);
        let [first, second] = indices.map(ReceiverIndex::from_wire);

        // We initiate, snow responds.
        let (mut waiting, initiation) = Local::new(initiator.clone(), suite)
            .initiate(&their_public, &Mac1Key::new(&their_public), &psk, first, stamp, Zeroizing::new(ephemerals[0]))
            .unwrap();
        prop_assert_eq!(
            initiation,
            framed::<INITIATION_LEN>(1, &indices[..1], &reference.initiation, &their_public)
        );
        let response =
            framed::<RESPONSE_LEN>(2, &[indices[1], indices[0]], &reference.response, &our_public);
        prop_assert!(Local::new(initiator, suite).verify(&response));
        let keys = waiting.finish(&response).unwrap();
        prop_assert_eq!(keys.remote, second);
        reference.assert_split(&keys, true);

        // snow initiates, we respond.
        let local = Local::new(responder, suite);
        prop_assert!(local.verify(&initiation));
        let consumed = local.consume(&initiation, Zeroizing::new(ephemerals[1])).unwrap();
        prop_assert_eq!((consumed.public, consumed.stamp), (our_public, stamp));
        let (keys, ours) = consumed.respond(&Mac1Key::new(&our_public), &psk, second).unwrap();
        prop_assert_eq!(ours, response);
        prop_assert_eq!(keys.remote, index_at(&initiation, 4));
        reference.assert_split(&keys, false);
    }
}
