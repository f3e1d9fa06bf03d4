//! Tencrypt: transparent, authenticated encryption of the traffic between a project's own pods.
//!
//! Two sides of one boundary: [`agent`] touches the kernel and decides nothing, [`proto`] decides everything and touches
//! nothing. [`launcher`] runs on the host and is the only part that knows a project key.
//!
//! # A DNS query
//! application -> the resolver it chose (port 53 is routed into `tenc0`) -> `agent::driver` -> [`proto::dns`] (forward)
//! -> `agent::dns`: that same resolver, from a marked socket (one of the project: through `tenc0`, sealed) -> [`proto::dns`] (a copy is read with [`wire::dns`], the
//! answer is held) -> [`proto::routing`] -> `agent::applier`: [`agent::guard`], then [`agent::netlink`] -> [`proto::dns`]
//! (released) -> written to `tenc0` -> application, byte for byte.
//!
//! # A packet
//! application -> route -> [`agent::tun`] -> [`proto::outbound`] ([`proto::nat`]: the flow; [`proto::balance`]: the
//! endpoint; [`proto::peers`]: the session) -> [`proto::noise`] (seal) -> [`agent::udp`] => network => [`agent::udp`] ->
//! [`proto::noise`] (open, replay) -> [`proto::inbound`] (owner of the inner source, peer gate, DNAT) -> [`agent::tun`] or
//! [`agent::raw_socket`] -> application. The answer goes the same way back; the server's agent restores the VIP as its
//! source before sealing.
//!
//! # Promises
//! Numbered as in the design; tests name the number they hold.
//!
//! 1. No plaintext between two workloads of a project leaves a pod: the guard says what may pass ([`launcher::pod::guard`]), and
//!    within the cluster's ranges only addresses that something vouches for do ([`proto::outside`],
//!    [`launcher::directory`]). The project's own addresses are routed into `tenc0` ([`proto::routing`]).
//! 2. Fail closed: what is missing drops with a reason, never passes ([`mod@proto::drop`]). Only a ready agent opens the guard
//!    ([`launcher::pod::guard::Door`]).
//! 3. Two gates: a DNS answer waits for its routes, a peer's first packet for the peer's own ([`proto::routing`]).
//! 4. Authentic: the injection rule of [`proto::inbound`]; the replay window of [`proto::noise`].
//! 5. Fresh keys, and no packet lost in a rekey ([`proto::noise`]).
//! 6. Silent to whoever has no valid MAC1 ([`proto::noise`]).
//! 7. Connections survive their agents ([`proto::journal`] and [`agent::state`] a crash, [`proto::handover`] an upgrade).
//! 8. DNS is unchanged ([`proto::dns`]).
//! 9. Tenants are apart: others read, forge and redirect nothing, and reach the pod as before ([`launcher::pod::guard`],
//!    [`proto::inbound`]).
//! 10. Bounded: tables have stated sizes, and one peer cannot take all of the room ([`proto::nat`], [`proto::noise`]).
//! 11. Least privilege (`agent::privileges`, [`launcher::privileges`], [`launcher::keys`]).
//! 12. Everything is counted ([`proto::account::Counters`]).
//! 13. Clean: a stop removes what the agent made, and only that ([`agent`], [`launcher`]).

pub mod cli;
pub mod exit;
pub mod status;
pub mod telemetry;

pub mod launcher;

pub mod agent;

pub mod control;

pub mod proto;

pub mod wire;

pub mod fault;
pub mod sys;
