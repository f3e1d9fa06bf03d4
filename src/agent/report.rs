//! What the agent says when it is asked how it is: the engine's counters, and on top of them what only the kernel counts.
//!
//! A packet that the kernel had no room for never reached the engine: `tenc0` counts those of the pod, the tunnel's sockets
//! those of the peers. Flows that stay in clear have a rule each, and the engine does not know them. All are read when
//! somebody asks. May touch: /proc/thread-self/net/dev, which unlike rtnetlink takes no lock that other namespaces hold; below
//! strict mode one rtnetlink socket, read-only.
//!
//! The packet thread does this: it walks the flow table once and names the latest flows only.

use std::collections::BTreeMap;
use std::net::IpAddr;

use tracing::debug;

use super::netlink::Netlink;
use super::tun;
use super::udp::TunnelSocket;
use super::watch::TamperCounts;
use crate::control::{
    FlowReport, FlowState, FromAgent, PeerReport, REPORTED_FLOWS_MAX, REPORTED_PEERS_MAX, REPORTED_VIPS_MAX,
    Report, Rung, Totals,
};
use crate::proto::ladder::Standing;
use crate::proto::nat::Tuple;
use crate::proto::{Engine, FlowView, Now};

/// Counters of the namespace's devices.
const DEVICES: &str = "/proc/thread-self/net/dev";
/// Packets of the pod that `tenc0` had no room for.
const QUEUE_OVERFLOW: &str = "queue_overflow";
/// Datagrams, or trains of them, that a tunnel socket had no room for.
const RECEIVE_OVERFLOW: &str = "receive_overflow";

/// The agent at this moment, as the messages of one answer.
pub(super) fn make<'a>(
    engine: &Engine,
    generation: Option<u64>,
    sockets: impl Iterator<Item = &'a TunnelSocket>,
    tampering: &TamperCounts,
    now: Now,
) -> Vec<FromAgent> {
    let counters = engine.counters();
    let mut drops: Vec<_> = counters.drops().map(|(reason, n)| (reason.as_str().to_owned(), n)).collect();
    let of_kernel = [(QUEUE_OVERFLOW, queue_overflow()), (RECEIVE_OVERFLOW, receive_overflow(sockets))];
    drops.extend(of_kernel.into_iter().filter(|(_, n)| *n > 0).map(|(word, n)| (word.to_owned(), n)));
    let (peers_total, peers_established, peers) = engine.peers(REPORTED_PEERS_MAX);
    let ladder = engine.rungs();
    let standings: BTreeMap<_, _> = engine.ladder().collect();
    let vips: Vec<_> = engine.ladder().filter_map(vip).collect();
    let clear = if ladder.is_some() { clear() } else { Vec::new() };
    let report = Report {
        generation,
        totals: Totals::new(counters, engine.waiting()),
        drops,
        flows: engine.flow_count() as u64,
        clear: clear.len() as u64,
        released: engine.released_count() as u64,
        peers_total: peers_total as u64,
        peers_established: peers_established as u64,
        peers: peers
            .into_iter()
            .map(|(address, established)| {
                let rung = ladder.zip(standings.get(&address)).and_then(|(ladder, standing)| {
                    let (captured, lasts) = (ladder.captures(&address), ladder.lasts(address, now)?);
                    Some(Rung { standing: *standing, captured, since_s: lasts.as_secs() })
                });
                PeerReport { address, established, rung }
            })
            .collect(),
        vips_total: vips.len() as u64,
        vips: vips.into_iter().take(REPORTED_VIPS_MAX).collect(),
        tampering: tampering.counts.iter().map(|(kind, (n, _))| (kind.as_str().to_owned(), *n)).collect(),
        standing: tampering.standing.iter().map(|kind| kind.as_str().to_owned()).collect(),
    };
    let in_table = engine.latest_flows(REPORTED_FLOWS_MAX, now).into_iter().map(flow).collect();
    let in_clear = clear.into_iter().take(REPORTED_FLOWS_MAX).map(clear_flow).collect();
    vec![FromAgent::Flows(in_table), FromAgent::Flows(in_clear), FromAgent::Report(Box::new(report))]
}

fn vip((address, standing): (IpAddr, Standing)) -> Option<(IpAddr, bool)> {
    match standing {
        Standing::Captured => Some((address, true)),
        Standing::Passed => Some((address, false)),
        Standing::Able | Standing::Unable | Standing::Probing => None,
    }
}

fn flow(view: FlowView) -> FlowReport {
    let FlowView { tuple, peer, blocked, idle } = view;
    let state = if blocked { FlowState::Blocked } else { FlowState::Protected };
    FlowReport { tuple, peer: Some(peer), state, idle_s: Some(idle.as_secs()) }
}

fn clear_flow(tuple: Tuple) -> FlowReport {
    FlowReport { tuple, peer: None, state: FlowState::Clear, idle_s: None }
}

/// Flows that keep their path past `tenc0`.
fn clear() -> Vec<Tuple> {
    let read = Netlink::open().and_then(|mut netlink| netlink.pins());
    let pins = read.unwrap_or_else(|error| {
        debug!(%error, "cannot read the rules of flows that stay in clear");
        Vec::new()
    });
    pins.into_iter().filter(|(_, sealed)| !sealed).map(|(tuple, _)| tuple).collect()
}

fn queue_overflow() -> u64 {
    let read = std::fs::read_to_string(DEVICES).map(|text| transmit_drops(&text, tun::NAME));
    read.unwrap_or_else(|error| {
        debug!(%error, "cannot read the device's counters");
        None
    })
    .unwrap_or(0)
}

/// Packets that a device had no room for on the way out: the twelfth number of its line.
fn transmit_drops(devices: &str, name: &str) -> Option<u64> {
    let mut lines = devices.lines().filter_map(|line| line.split_once(':'));
    let (_, numbers) = lines.find(|(device, _)| device.trim() == name)?;
    numbers.split_ascii_whitespace().nth(11)?.parse().ok()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_devices_drops_are_those_of_its_own_line() {
        let text = "Inter-|   Receive                                                |  Transmit\n \
                    face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed\n\
                    lo: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n\
                    tenc0:123 2 3 4 5 6 7 8 9 10 11 77 13 14 15 16\n";
        assert_eq!(transmit_drops(text, "tenc0"), Some(77));
        assert_eq!(transmit_drops(text, "tenc"), None);
    }

    #[test]
    fn the_kernels_own_text_is_read() {
        assert!(transmit_drops(&std::fs::read_to_string(DEVICES).unwrap(), "lo").is_some());
    }
}
