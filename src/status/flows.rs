//! Flows in the document: what strict mode would drop, and what becomes of each flow.
//!
//! 1. the guard's records are what strict mode would drop, but for what strict mode would have sealed; the newest
//!    [`RECORDS_MAX`] are named, the rest counted
//! 2. the agent knows its table and the flows that stay in clear; what the guard recorded besides is carried by the platform
//! 3. a flow that is known twice counts as what it was last; one that stays in clear is that, however new its record is
//!
//! A record is one direction, a flow both: it is named from the pod's side.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::control::{FlowReport, FlowState, Report};
use crate::launcher::pod::guard::{Reason, WouldDrop as Record};
use crate::proto::ladder::Standing;
use crate::proto::nat::Tuple;

/// Most records that a document names.
const RECORDS_MAX: usize = 4_096;
/// Most flows that a document names.
const FLOWS_MAX: usize = 2_048;

/// What strict mode would drop.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(missing_docs, reason = "the module above documents the fields one by one")]
pub struct WouldDrops {
    pub left_out: u64,
    pub items: Vec<WouldDrop>,
}

/// One direction of a flow that strict mode would drop.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(missing_docs, reason = "the module above documents the fields one by one")]
pub struct WouldDrop {
    pub reason: String,
    pub family: String,
    pub protocol: u8,
    pub source: IpAddr,
    pub source_port: Option<u16>,
    pub destination: IpAddr,
    pub destination_port: Option<u16>,
    pub packets: u64,
    pub idle_seconds: u64,
    pub standing: Option<Standing>,
}

/// What becomes of flows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(missing_docs, reason = "the module above documents the fields one by one")]
pub struct FlowStates {
    pub left_out: u64,
    pub items: Vec<Flow>,
}

/// One flow, as the pod sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(missing_docs, reason = "the module above documents the fields one by one")]
pub struct Flow {
    pub state: FlowState,
    pub protocol: u8,
    pub local: IpAddr,
    pub local_port: Option<u16>,
    pub remote: IpAddr,
    pub remote_port: Option<u16>,
    pub peer: Option<IpAddr>,
    pub idle_seconds: Option<u64>,
}

/// The records, newest first. `standings`: how each peer and VIP stands on the ladder; `passed`: the peers that can seal
/// and are not captured all the same. Strict mode would capture them: only frames of packet sockets would be dropped.
pub(super) fn would_drops(
    records: &[Record],
    standings: &BTreeMap<IpAddr, Standing>,
    passed: &BTreeSet<IpAddr>,
    own: &[IpAddr],
) -> WouldDrops {
    let sealed =
        |record: &Record| record.reason != Reason::Egress && passed.contains(&tuple(record, own).remote.0);
    let mut newest: Vec<_> = records.iter().filter(|record| !sealed(record)).collect();
    newest.sort_by_key(|record| record.idle_s);
    let left_out = newest.len().saturating_sub(RECORDS_MAX) as u64;
    let item = |record: &Record| WouldDrop {
        reason: record.reason.as_str().to_owned(),
        family: if record.source.is_ipv4() { "ipv4" } else { "ipv6" }.to_owned(),
        protocol: record.protocol,
        source: record.source,
        source_port: record.ports.map(|(from, _)| from),
        destination: record.destination,
        destination_port: record.ports.map(|(_, to)| to),
        packets: record.packets,
        idle_seconds: record.idle_s,
        standing: standings.get(&tuple(record, own).remote.0).copied(),
    };
    WouldDrops { left_out, items: newest.into_iter().take(RECORDS_MAX).map(item).collect() }
}

/// Every flow that is known, those with the latest packets first.
pub(super) fn flow_states(
    reported: &[FlowReport],
    report: &Report,
    records: &[Record],
    own: &[IpAddr],
) -> FlowStates {
    let mut known = BTreeMap::<Tuple, FlowReport>::new();
    let passed = records.iter().map(|record| FlowReport {
        tuple: tuple(record, own),
        peer: None,
        state: FlowState::Passed,
        idle_s: Some(record.idle_s),
    });
    // `None` comes before every number: a flow that stays in clear has an open socket.
    for flow in reported.iter().copied().chain(passed) {
        let entry = known.entry(flow.tuple).or_insert(flow);
        if flow.idle_s < entry.idle_s {
            *entry = flow;
        }
    }
    let mut flows: Vec<_> = known.into_values().collect();
    flows.sort_by_key(|flow| flow.idle_s);
    let unreported = report.flows.saturating_add(report.clear).saturating_sub(reported.len() as u64);
    let left_out = unreported + flows.len().saturating_sub(FLOWS_MAX) as u64;
    let port = |tuple: &Tuple, port: u16| (tuple.local.1 != 0 || tuple.remote.1 != 0).then_some(port);
    let item = |flow: FlowReport| Flow {
        state: flow.state,
        protocol: flow.tuple.protocol,
        local: flow.tuple.local.0,
        local_port: port(&flow.tuple, flow.tuple.local.1),
        remote: flow.tuple.remote.0,
        remote_port: port(&flow.tuple, flow.tuple.remote.1),
        peer: flow.peer,
        idle_seconds: flow.idle_s,
    };
    FlowStates { left_out, items: flows.into_iter().take(FLOWS_MAX).map(item).collect() }
}

/// The flow that a record is one direction of.
fn tuple(record: &Record, own: &[IpAddr]) -> Tuple {
    let (from, to) = record.ports.unwrap_or_default();
    let (source, destination) = ((record.source, from), (record.destination, to));
    let outbound = own.contains(&record.source) || !own.contains(&record.destination);
    let (local, remote) = if outbound { (source, destination) } else { (destination, source) };
    Tuple { protocol: record.protocol, local, remote }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launcher::pod::guard::Reason;

    const OWN: [IpAddr; 1] = [IpAddr::V4(std::net::Ipv4Addr::new(10, 1, 1, 11))];

    fn peer(n: u8) -> IpAddr {
        [10, 1, 2, n].into()
    }

    fn record(reason: Reason, source: (IpAddr, u16), destination: (IpAddr, u16), idle_s: u64) -> Record {
        let ports = Some((source.1, destination.1));
        Record {
            reason,
            source: source.0,
            destination: destination.0,
            protocol: 6,
            ports,
            packets: 9,
            idle_s,
        }
    }

    fn flow(local: u16, remote: (IpAddr, u16), state: FlowState, idle_s: Option<u64>) -> FlowReport {
        let tuple = Tuple { protocol: 6, local: (OWN[0], local), remote };
        FlowReport { tuple, peer: None, state, idle_s }
    }

    #[test]
    fn both_directions_of_a_passed_flow_are_one_flow_from_the_pods_side() {
        let (here, there) = ((OWN[0], 4_000), (peer(2), 80));
        let records = [record(Reason::Outbound, here, there, 7), record(Reason::Inbound, there, here, 5)];
        let states = flow_states(&[], &Report::default(), &records, &OWN);
        assert_eq!(states.left_out, 0);
        let [flow] = &states.items[..] else { panic!("{states:?}") };
        assert_eq!((flow.local, flow.local_port, flow.remote), (OWN[0], Some(4_000), peer(2)));
        assert_eq!((flow.state, flow.idle_seconds), (FlowState::Passed, Some(5)));
        let standings = [(peer(2), Standing::Unable)].into();
        let would = would_drops(&records, &standings, &BTreeSet::new(), &OWN);
        let told: Vec<_> = would.items.iter().map(|item| (item.reason.as_str(), item.standing)).collect();
        let unable = Some(Standing::Unable);
        assert_eq!(told, [("inbound", unable), ("outbound_postrouting", unable)], "newest first");
    }

    #[test]
    fn what_strict_mode_would_seal_is_none_that_it_would_drop() {
        let (here, there, other) = ((OWN[0], 4_000), (peer(2), 80), (peer(3), 80));
        let records = [
            record(Reason::Outbound, here, there, 1),
            record(Reason::Inbound, there, here, 2),
            record(Reason::Egress, here, there, 3),
            record(Reason::Outbound, here, other, 4),
        ];
        let would = would_drops(&records, &BTreeMap::new(), &[peer(2)].into(), &OWN);
        let told: Vec<_> = would.items.iter().map(|item| item.idle_seconds).collect();
        assert_eq!(told, [3, 4], "a packet socket is no way into the tunnel");
    }

    #[test]
    fn a_flow_is_what_it_was_last_and_one_that_stays_in_clear_is_that() {
        let to = |n| (peer(n), 80);
        let reported = [
            flow(1, to(1), FlowState::Protected, Some(0)),
            flow(2, to(2), FlowState::Protected, Some(30)),
            flow(3, to(3), FlowState::Clear, None),
            flow(4, to(4), FlowState::Blocked, Some(2)),
        ];
        let records = [
            record(Reason::Outbound, (OWN[0], 1), to(1), 40),
            record(Reason::Outbound, (OWN[0], 2), to(2), 3),
            record(Reason::Outbound, (OWN[0], 3), to(3), 0),
        ];
        let report = Report { flows: 103, clear: 1, ..Report::default() };
        let states = flow_states(&reported, &report, &records, &OWN);
        assert_eq!(states.left_out, 100);
        let told: Vec<_> = states.items.iter().map(|flow| (flow.local_port.unwrap(), flow.state)).collect();
        let wanted = [
            (3, FlowState::Clear),
            (1, FlowState::Protected),
            (4, FlowState::Blocked),
            (2, FlowState::Passed),
        ];
        assert_eq!(told, wanted, "newest first");
    }

    #[test]
    fn what_does_not_fit_is_counted_and_is_the_oldest() {
        let records: Vec<_> = (0..u16::try_from(RECORDS_MAX).unwrap() + 10)
            .map(|n| record(Reason::Outbound, (OWN[0], n), (peer(1), 80), u64::from(n)))
            .collect();
        let would = would_drops(&records, &BTreeMap::new(), &BTreeSet::new(), &OWN);
        assert_eq!((would.items.len(), would.left_out), (RECORDS_MAX, 10));
        assert_eq!(would.items.last().unwrap().idle_seconds, RECORDS_MAX as u64 - 1);
        let states = flow_states(&[], &Report::default(), &records, &OWN);
        assert_eq!(
            (states.items.len(), states.left_out),
            (FLOWS_MAX, records.len() as u64 - FLOWS_MAX as u64)
        );
        assert_eq!(states.items[0].idle_seconds, Some(0));
    }
}
