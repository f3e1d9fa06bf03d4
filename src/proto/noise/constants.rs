//! Numbers of the protocol, under two headings: what the specification fixes, and what this implementation chose.
//!
//! Source: WireGuard paper section 5.4 (messages), section 6.1 (timers).

use std::time::Duration;

// Specification.

/// Mixed into the handshake hash before the first message.
pub(super) const PROLOGUE: &[u8] = b"WireGuard v1 zx2c4 Jason@zx2c4.com";
/// Hashed with a public key, gives the key of MAC1.
pub(super) const LABEL_MAC1: &[u8] = b"mac1----";
/// Hashed with a public key, gives the key that cookies are sealed with.
pub(super) const LABEL_COOKIE: &[u8] = b"cookie--";

/// First word of a handshake initiation, little-endian.
pub(super) const TYPE_INITIATION: u32 = 1;
/// First word of a handshake response.
pub(super) const TYPE_RESPONSE: u32 = 2;
/// First word of a cookie reply.
pub(super) const TYPE_COOKIE: u32 = 3;
/// First word of a transport data message.
pub(super) const TYPE_DATA: u32 = 4;

/// Bytes of a handshake initiation.
pub(super) const INITIATION_LEN: usize = 148;
/// Bytes of a handshake response.
pub(super) const RESPONSE_LEN: usize = 92;
/// Bytes of a cookie reply.
pub(super) const COOKIE_LEN: usize = 64;
/// Bytes of MAC1 and MAC2, which end both handshake messages.
pub(super) const MACS_LEN: usize = 32;
/// Bytes before the ciphertext of a transport data message: type, receiver index, counter.
pub const HEADER_LEN: usize = 16;
/// Bytes of an authentication tag.
pub const TAG_LEN: usize = 16;
/// Plaintext is padded with zeros to a multiple of this many bytes.
pub(super) const PADDING: usize = 16;

/// Bytes of the transport data message that carries a packet of `packet` bytes.
#[must_use]
pub const fn record_len(packet: usize) -> usize {
    HEADER_LEN + packet.next_multiple_of(PADDING) + TAG_LEN
}

/// The initiator of a session makes a new one when it sends on one this old.
pub(super) const REKEY_AFTER_TIME: Duration = Duration::from_secs(120);
/// A session this old neither seals nor opens.
pub(super) const REJECT_AFTER_TIME: Duration = Duration::from_secs(180);
/// An attempt to make a session ends after this time.
pub(super) const REKEY_ATTEMPT_TIME: Duration = Duration::from_secs(90);
/// Distance of late handshake retries, before jitter.
pub(super) const REKEY_TIMEOUT: Duration = Duration::from_secs(5);
/// Upper end of the jitter on late handshake retries.
pub(super) const REKEY_JITTER: Duration = Duration::from_millis(333);
/// A receiver that has nothing to send says so after this time.
pub(super) const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Messages under one key after which either side makes a new session.
pub(super) const REKEY_AFTER_MESSAGES: u64 = 1 << 60;
/// Messages under one key after which it neither seals nor opens.
pub(super) const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);
/// A responder makes cookies of one secret for this long.
pub(super) const COOKIE_SECRET_LIFE: Duration = Duration::from_secs(120);
/// A cookie is worth sending for this long.
pub(super) const COOKIE_LIFE: Duration = Duration::from_secs(120);
/// A peer's initiations closer together than this are not consumed.
pub(super) const INITIATION_INTERVAL: Duration = Duration::from_millis(20);

// Implementation.

/// Counters behind the greatest one that are still accepted. A 128-segment burst may be reordered 64 bursts deep.
pub(super) const REPLAY_WINDOW: u64 = 8192;
/// First retries of an initiation, counted from the first: a pod's peer is milliseconds away, and a lost or unanswered
/// first message should not cost an application five seconds.
pub(super) const EARLY_RETRIES: [Duration; 5] = [
    Duration::from_millis(250),
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(5),
];
/// Two initiations that were sent within this time of one another have crossed; also the time that the responder of a
/// fresh session waits for its confirmation before it initiates itself. Equal to the first retry.
pub(super) const CROSSING: Duration = EARLY_RETRIES[0];
/// A peer that has not answered for this long is reported.
pub(super) const SILENT_AFTER: Duration = Duration::from_secs(3);
/// Handshake time stamps further in the future are refused: storing one would lock the peer out until then.
pub(super) const CLOCK_SKEW: Duration = Duration::from_secs(600);
/// Initiations of unknown static keys that are kept for the directory to catch up.
pub(super) const KEPT_INITIATIONS: usize = 16;
/// How long a kept initiation is worth answering: the initiator's fifth retry replaces it.
pub(super) const KEPT_TIME: Duration = Duration::from_secs(5);
/// How long a session outlives its project key: the peer seals with it until it has the new one, which takes a round trip,
/// or a retry.
pub(super) const RETIRED_LIFE: Duration = Duration::from_secs(5);
