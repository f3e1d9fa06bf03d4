//! What fills the document: the launcher's own knowledge, the agent's answer, the guard's counters and records.
//!
//! 1. the guard's records are what strict mode would drop, but for what strict mode would have sealed; the newest
//!    [`RECORDS_MAX`] are named, the rest counted
//! 2. the agent knows its table and the flows that stay in clear; what the guard recorded besides is carried by the platform
//! 3. a flow that is known twice counts as what it was last; one that stays in clear is that, however new its record is
//!
//! A record is one direction, a flow both: it is named from the pod's side.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::control::{FlowReport, FlowState, Report};
use crate::launcher::pod::guard::{self, Reason, WouldDrop as Record};
use crate::proto::ladder::{Mode, Standing};
use crate::proto::nat::Tuple;
use crate::status::{
    Counters, Flow, FlowStates, Peer, Peers, PodStatus, State, VipStatus, Vips, WouldDrop, WouldDrops,
};

/// Most records that a document names.
const RECORDS_MAX: usize = 4_096;
/// Most flows that a document names.
const FLOWS_MAX: usize = 2_048;
/// `degraded`: programs of the pod speak to endpoints of their resolver.
const DNS_NOT_CAPTURED: &str = "dns not captured (socket LB)";

/// How the guard is, and what the launcher was told about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of the command line")]
pub(super) struct Rules {
    pub(super) state: &'static str,
    pub(super) has_ranges: bool,
    pub(super) drops_unclassified: bool,
    pub(super) allow_link_scope: bool,
    pub(super) allow_dhcp: bool,
}

/// A whole answer of an agent.
#[derive(Clone, Debug, Default)]
pub(super) struct Answered {
    pub(super) report: Report,
    /// Of its table, and those that stay in clear.
    pub(super) flows: Vec<FlowReport>,
}

impl PodStatus {
    /// Takes over what a ready agent said, and the guard's records, where there may be any and they could be read.
    pub(super) fn set_report(&mut self, answer: Answered, records: Option<&[Record]>) {
        let Answered { report, flows: reported } = answer;
        self.flow_states =
            Some(flow_states(&reported, &report, records.unwrap_or_default(), &self.addresses));
        let Report {
            generation,
            totals,
            clear: _,
            released,
            vips,
            vips_total,
            drops,
            flows,
            peers,
            peers_total,
            peers_established,
            tampering,
            standing,
        } = report;
        let (state, reason) = match standing.first() {
            None => (State::Protected, None),
            Some(first) => (State::Unprotected, Some(first.clone())),
        };
        self.state = state;
        self.reason = reason;
        self.generation = generation;
        self.counters = Some(Counters { totals, drops: drops.into_iter().collect() });
        self.tampering = tampering.into_iter().collect();
        self.standing = standing;
        let items = peers
            .into_iter()
            .map(|peer| Peer {
                address: peer.address,
                established: peer.established,
                standing: peer.rung.map(|rung| rung.standing),
                captured: peer.rung.map(|rung| rung.captured),
                since_seconds: peer.rung.map(|rung| rung.since_s),
            })
            .collect();
        self.vips = (self.mode != Some(Mode::Strict)).then(|| Vips {
            total: vips_total,
            items: vips
                .into_iter()
                .map(|(address, captured)| VipStatus {
                    address,
                    standing: if captured { Standing::Captured } else { Standing::Passed },
                })
                .collect(),
        });
        self.peers = Some(Peers { total: peers_total, established: peers_established, items });
        self.flows = Some(flows);
        self.released = Some(released);
    }

    /// Takes over the guard's counters.
    pub(super) fn set_guard(&mut self, counters: BTreeMap<String, u64>) {
        if counters.get(guard::DNS_UNCAPTURED).is_some_and(|packets| *packets > 0) {
            self.degraded.push(DNS_NOT_CAPTURED.to_owned());
        }
        self.guard = Some(counters);
    }

    /// Takes over how the guard is, and what the launcher was told about it.
    pub(super) fn set_rules(&mut self, rules: &Rules) {
        self.guard_state = Some(rules.state.to_owned());
        self.judged_by = Some(if rules.has_ranges { "ranges" } else { "learned" }.to_owned());
        self.unclassified = Some(if rules.drops_unclassified { "drop" } else { "pass" }.to_owned());
        self.allow_link_scope = Some(rules.allow_link_scope);
        self.allow_dhcp = Some(rules.allow_dhcp);
    }

    /// Takes over the guard's records, after the report, if there is one.
    pub(super) fn set_records(&mut self, records: &[Record]) {
        let peers = self.peers.iter().flat_map(|peers| &peers.items);
        let peers = peers.filter_map(|peer| Some((peer.address, peer.standing?)));
        let vips = self.vips.iter().flat_map(|vips| &vips.items).map(|vip| (vip.address, vip.standing));
        let standings = peers.chain(vips).collect();
        let items = self.peers.iter().flat_map(|peers| &peers.items);
        let passed =
            items.filter(|peer| peer.standing == Some(Standing::Able) && peer.captured == Some(false));
        let passed = passed.map(|peer| peer.address).collect();
        self.would_drop = Some(would_drops(records, &standings, &passed, &self.addresses));
    }
}

/// The records, newest first. `standings`: how each peer and VIP stands on the ladder; `passed`: the peers that can seal
/// and are not captured all the same. Strict mode would capture them: only frames of packet sockets would be dropped.
fn would_drops(
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
fn flow_states(reported: &[FlowReport], report: &Report, records: &[Record], own: &[IpAddr]) -> FlowStates {
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
pub(crate) mod tests {
    use serde_json::Value;

    use super::*;
    use crate::control::{PeerReport, Rung, Totals};
    use crate::status::{AgentStatus, LauncherStatus};

    const OWN: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 1, 1, 11));
    const PEER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 1, 1, 12));

    const RULES: Rules = Rules {
        state: "open",
        has_ranges: true,
        drops_unclassified: true,
        allow_link_scope: false,
        allow_dhcp: true,
    };

    pub(in crate::launcher::serve) fn answered() -> Answered {
        let tuple = Tuple { protocol: 6, local: (OWN, 4_000), remote: (PEER, 80) };
        let flow = FlowReport { tuple, peer: Some(PEER), state: FlowState::Protected, idle_s: Some(1) };
        Answered { report: report(), flows: vec![flow] }
    }

    fn record() -> Record {
        Record {
            reason: Reason::Egress,
            source: OWN,
            destination: PEER,
            protocol: 17,
            ports: Some((5, 53)),
            packets: 7,
            idle_s: 3,
        }
    }

    fn report() -> Report {
        Report {
            generation: Some(4),
            totals: Totals { sealed: 10, opened: 20, dns_forwarded: 3, unpinned: 2, ..Totals::default() },
            drops: vec![("bad_tag".to_owned(), 2), ("queue_overflow".to_owned(), 5)],
            flows: 6,
            clear: 0,
            released: 3,
            peers: vec![PeerReport {
                address: PEER,
                established: true,
                rung: Some(Rung { standing: Standing::Able, captured: true, since_s: 60 }),
            }],
            vips: vec![([10, 96, 1, 1].into(), false)],
            vips_total: 1,
            peers_total: 700,
            peers_established: 1,
            tampering: Vec::new(),
            standing: Vec::new(),
        }
    }

    pub(crate) fn protected(name: &str) -> PodStatus {
        let mut status = PodStatus {
            project: Some("shop".to_owned()),
            addresses: vec![OWN],
            mode: Some(Mode::Audit),
            launcher: Some(LauncherStatus { pid: 7 }),
            agent: Some(AgentStatus { pid: 8, replaced: 1, last_end: Some("by signal 9".to_owned()) }),
            ..PodStatus::closed(name.to_owned(), "not asked yet")
        };
        status.set_guard([("inbound".to_owned(), 0), ("dns_uncaptured".to_owned(), 9)].into());
        status.set_rules(&RULES);
        status.set_report(answered(), Some(&[record()]));
        status.set_records(&[record()]);
        status
    }

    #[test]
    fn a_document_reads_back_as_what_was_written() {
        for status in [protected("pod"), PodStatus::closed("pod".to_owned(), "no launcher")] {
            assert_eq!(serde_json::from_str::<PodStatus>(&status.to_json()).unwrap(), status);
        }
    }

    #[test]
    fn the_document_has_the_documented_fields() {
        let json: Value = serde_json::from_str(&protected("pod").to_json()).unwrap();
        assert_eq!(json["apiVersion"], "tencrypt.io/v1alpha1");
        assert_eq!(json["kind"], "PodStatus");
        assert_eq!(json["state"], "protected");
        assert_eq!((&json["guardState"], &json["judgedBy"]), (&"open".into(), &"ranges".into()));
        assert_eq!((&json["unclassified"], &json["released"]), (&"drop".into(), &3.into()));
        assert_eq!((&json["allowLinkScope"], &json["allowDhcp"]), (&false.into(), &true.into()));
        assert_eq!(json["degraded"][0], "dns not captured (socket LB)");
        assert_eq!(json["guard"]["dns_uncaptured"], 9);
        assert_eq!(json["agent"]["lastEnd"], "by signal 9");
        assert_eq!(json["counters"]["dnsForwarded"], 3);
        assert_eq!(json["counters"]["drops"]["queue_overflow"], 5);
        assert_eq!(json["counters"]["unpinned"], 2);
        let peer = &json["peers"]["items"][0];
        assert_eq!((&peer["address"], &peer["standing"]), (&"10.1.1.12".into(), &"able".into()));
        assert_eq!(json["vips"]["items"][0]["standing"], "passed");
        assert_eq!(json["mode"], "audit");
        assert_eq!(json["flowStates"]["items"][0]["state"], "protected");
        assert_eq!(json["flowStates"]["items"][1]["state"], "passed");
        assert_eq!(json["flowStates"]["leftOut"], 5);
        let would = &json["wouldDrop"]["items"][0];
        assert_eq!((&would["reason"], &would["standing"]), (&"outbound_egress".into(), &"able".into()));
    }

    #[test]
    fn the_schema_names_every_field_of_a_document_and_describes_it() {
        let root: Value = serde_json::from_str(&crate::status::schema()).unwrap();
        let one = serde_json::to_value(protected("pod")).unwrap();
        let list = serde_json::json!({ "apiVersion": "", "kind": "PodStatusList", "items": [one] });
        assert_named(&root, &root["$defs"]["PodStatus"], &one);
        assert_named(&root, &root["$defs"]["PodStatusList"], &list);
        let shapes: Vec<_> = root["$defs"].as_object().unwrap().values().collect();
        let fields = shapes.iter().filter_map(|shape| shape["properties"].as_object()).flatten();
        assert!(fields.clone().count() > 70);
        for (field, told) in fields {
            assert!(told["description"].as_str().is_some_and(|text| text.ends_with('.')), "{field}: {told}");
        }
    }

    /// Each key of `value`, and of what is in it, is one that `schema` names.
    fn assert_named(root: &Value, schema: &Value, value: &Value) {
        let shape = schema["anyOf"].as_array().map_or(schema, |one_of| &one_of[0]);
        let name = shape["$ref"].as_str().and_then(|path| path.strip_prefix("#/$defs/"));
        let shape = name.map_or(shape, |name| &root["$defs"][name]);
        for (key, value) in value.as_object().into_iter().flatten() {
            let named = shape["properties"].get(key).or(shape.get("additionalProperties"));
            assert_named(root, named.unwrap_or_else(|| panic!("{key}: {shape}")), value);
        }
        for item in value.as_array().into_iter().flatten() {
            assert_named(root, &shape["items"], item);
        }
    }

    #[test]
    fn a_status_says_how_unknown_addresses_are_judged_and_what_was_allowed() {
        let mut status = PodStatus::closed("pod".to_owned(), "not asked yet");
        assert_eq!((&status.guard_state, &status.judged_by, status.allow_dhcp), (&None, &None, None));
        status.set_rules(&Rules { state: "closed", has_ranges: false, drops_unclassified: false, ..RULES });
        let word = |word: &Option<String>| word.clone().unwrap();
        assert_eq!(word(&status.guard_state), "closed");
        assert_eq!((word(&status.judged_by), word(&status.unclassified)), ("learned".into(), "pass".into()));
        status.set_guard([("dns_uncaptured".to_owned(), 0)].into());
        assert!(status.degraded.is_empty(), "no packet went past the agent");
    }

    #[test]
    fn what_stands_in_the_way_makes_a_pod_unprotected() {
        let mut status = protected("pod");
        let standing = vec!["a foreign rule".to_owned()];
        status.set_report(Answered { report: Report { standing, ..report() }, flows: Vec::new() }, None);
        assert_eq!((status.state, status.reason.as_deref()), (State::Unprotected, Some("a foreign rule")));
    }

    fn peer(n: u8) -> IpAddr {
        [10, 1, 2, n].into()
    }

    fn recorded(reason: Reason, source: (IpAddr, u16), destination: (IpAddr, u16), idle_s: u64) -> Record {
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
        let tuple = Tuple { protocol: 6, local: (OWN, local), remote };
        FlowReport { tuple, peer: None, state, idle_s }
    }

    #[test]
    fn both_directions_of_a_passed_flow_are_one_flow_from_the_pods_side() {
        let (here, there) = ((OWN, 4_000), (peer(2), 80));
        let records = [recorded(Reason::Outbound, here, there, 7), recorded(Reason::Inbound, there, here, 5)];
        let states = flow_states(&[], &Report::default(), &records, &[OWN]);
        assert_eq!(states.left_out, 0);
        let [flow] = &states.items[..] else { panic!("{states:?}") };
        assert_eq!((flow.local, flow.local_port, flow.remote), (OWN, Some(4_000), peer(2)));
        assert_eq!((flow.state, flow.idle_seconds), (FlowState::Passed, Some(5)));
        let standings = [(peer(2), Standing::Unable)].into();
        let would = would_drops(&records, &standings, &BTreeSet::new(), &[OWN]);
        let told: Vec<_> = would.items.iter().map(|item| (item.reason.as_str(), item.standing)).collect();
        let unable = Some(Standing::Unable);
        assert_eq!(told, [("inbound", unable), ("outbound_postrouting", unable)], "newest first");
    }

    #[test]
    fn what_strict_mode_would_seal_is_none_that_it_would_drop() {
        let (here, there, other) = ((OWN, 4_000), (peer(2), 80), (peer(3), 80));
        let records = [
            recorded(Reason::Outbound, here, there, 1),
            recorded(Reason::Inbound, there, here, 2),
            recorded(Reason::Egress, here, there, 3),
            recorded(Reason::Outbound, here, other, 4),
        ];
        let would = would_drops(&records, &BTreeMap::new(), &[peer(2)].into(), &[OWN]);
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
            recorded(Reason::Outbound, (OWN, 1), to(1), 40),
            recorded(Reason::Outbound, (OWN, 2), to(2), 3),
            recorded(Reason::Outbound, (OWN, 3), to(3), 0),
        ];
        let report = Report { flows: 103, clear: 1, ..Report::default() };
        let states = flow_states(&reported, &report, &records, &[OWN]);
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
            .map(|n| recorded(Reason::Outbound, (OWN, n), (peer(1), 80), u64::from(n)))
            .collect();
        let would = would_drops(&records, &BTreeMap::new(), &BTreeSet::new(), &[OWN]);
        assert_eq!((would.items.len(), would.left_out), (RECORDS_MAX, 10));
        assert_eq!(would.items.last().unwrap().idle_seconds, RECORDS_MAX as u64 - 1);
        let states = flow_states(&[], &Report::default(), &records, &[OWN]);
        assert_eq!(
            (states.items.len(), states.left_out),
            (FLOWS_MAX, records.len() as u64 - FLOWS_MAX as u64)
        );
        assert_eq!(states.items[0].idle_seconds, Some(0));
    }
}
