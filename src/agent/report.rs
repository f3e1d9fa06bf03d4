//! What the agent says when it is asked how it is: the engine's counters, and on top of them what only the kernel counts.
//!
//! A packet that the kernel had no room for never reached the engine: `tenc0` counts those of the pod, the tunnel's sockets
//! those of the peers. Both are read when somebody asks. May touch: one rtnetlink socket, read-only.

use tracing::debug;

use super::control::{PeerReport, REPORTED_PEERS_MAX, Report};
use super::netlink::Netlink;
use super::tun;
use super::udp::TunnelSocket;
use super::watch::TamperCounts;
use crate::proto::Engine;

/// Packets of the pod that `tenc0` had no room for.
const QUEUE_OVERFLOW: &str = "queue_overflow";
/// Datagrams, or trains of them, that a tunnel socket had no room for.
const RECEIVE_OVERFLOW: &str = "receive_overflow";

/// The agent at this moment.
pub(super) fn make<'a>(
    engine: &Engine,
    generation: Option<u64>,
    sockets: impl Iterator<Item = &'a TunnelSocket>,
    tampering: &TamperCounts,
) -> Report {
    let counters = engine.counters();
    let mut drops: Vec<_> = counters.drops().map(|(reason, n)| (reason.as_str().to_owned(), n)).collect();
    let of_kernel = [(QUEUE_OVERFLOW, queue_overflow()), (RECEIVE_OVERFLOW, receive_overflow(sockets))];
    drops.extend(of_kernel.into_iter().filter(|(_, n)| *n > 0).map(|(word, n)| (word.to_owned(), n)));
    let peers = engine.peers();
    Report {
        generation,
        sealed: counters.sealed,
        opened: counters.opened,
        dns_forwarded: counters.dns_forwarded + counters.dns_connections,
        drops,
        flows: engine.flow_count() as u64,
        peers_total: peers.len() as u64,
        peers_established: peers.iter().filter(|(_, established)| *established).count() as u64,
        peers: peers
            .into_iter()
            .take(REPORTED_PEERS_MAX)
            .map(|(address, established)| PeerReport { address, established })
            .collect(),
        tampering: tampering.counts.iter().map(|(kind, (n, _))| (kind.as_str().to_owned(), *n)).collect(),
        standing: tampering.standing.iter().map(|kind| kind.as_str().to_owned()).collect(),
    }
}

fn queue_overflow() -> u64 {
    let read = Netlink::open().and_then(|mut netlink| netlink.tx_dropped(tun::NAME));
    read.unwrap_or_else(|error| {
        debug!(%error, "cannot read the device's counters");
        0
    })
}

fn receive_overflow<'a>(sockets: impl Iterator<Item = &'a TunnelSocket>) -> u64 {
    sockets
        .map(|socket| {
            socket.dropped().map(u64::from).unwrap_or_else(|error| {
                debug!(%error, "cannot read a socket's counters");
                0
            })
        })
        .sum()
}
