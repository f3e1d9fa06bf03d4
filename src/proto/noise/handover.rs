//! What a successor needs to go on with our sessions: plain data, wiped when dropped.
//!
//! Handshakes under way are not among it; they begin anew. Nor are cookies and limits (`cookie`, `limits`). Times are ages
//! and remaining times as of one moment, which the successor places on its own clock.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use zeroize::ZeroizeOnDrop;

use super::PublicKey;

/// Longer than any timer of a peer.
const LONGEST: Duration = Duration::from_secs(3600);

/// A transport key. When what holds it moves, the key stays where it is.
#[derive(Clone, ZeroizeOnDrop, Serialize, Deserialize)]
pub(super) struct TransportKey(pub(super) Box<[u8; 32]>);

/// One session.
#[derive(Serialize, Deserialize)]
pub(super) struct SessionState {
    pub(super) local: [u8; 4],
    pub(super) remote: [u8; 4],
    /// The peer's static key that it was made with.
    pub(super) public: PublicKey,
    pub(super) is_initiator: bool,
    pub(super) age: Duration,
    pub(super) sealing: TransportKey,
    pub(super) opening: TransportKey,
    pub(super) next_counter: u64,
    pub(super) replay: WindowState,
}

/// One replay window.
#[derive(Serialize, Deserialize)]
pub(super) struct WindowState {
    pub(super) next: u64,
    pub(super) ring: Vec<u64>,
}

/// Everything about one peer that its successor cannot know.
#[derive(Serialize, Deserialize)]
pub struct PeerState {
    pub(super) public: PublicKey,
    pub(super) endpoint: SocketAddr,
    pub(super) previous: Option<SessionState>,
    pub(super) current: Option<SessionState>,
    pub(super) next: Option<SessionState>,
    pub(super) superseded: bool,
    pub(super) greatest_stamp: Option<[u8; 12]>,
    pub(super) since_consumed: Option<Duration>,
    /// A session was being tried for.
    pub(super) attempts: bool,
    pub(super) keepalive: Option<Duration>,
    pub(super) another_keepalive: bool,
    pub(super) no_reply: Option<Duration>,
    pub(super) silent: Option<Duration>,
}

/// The moment of `age` before `then`; `None` before the clock began.
pub(super) fn before(then: Instant, age: Duration) -> Option<Instant> {
    then.checked_sub(age)
}

/// The moment of `remaining` after `then`; at most [`LONGEST`].
pub(super) fn after(then: Instant, remaining: Duration) -> Instant {
    then + remaining.min(LONGEST)
}
