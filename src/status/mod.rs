//! `tencrypt status`: how a pod is, as its launcher tells it.
//!
//! 1. the launcher listens at `/run/tencrypt/COOKIE.status` (`server`); whoever connects gets one JSON document, [`PodStatus`],
//!    and the end of the stream
//! 2. the command finds the pods by their lock files and asks each launcher (`command`)
//!
//! The document of a pod, `kind` `PodStatus`; for several pods they are the `items` of a `PodStatusList`:
//!
//! | field | what |
//! |---|---|
//! | `apiVersion`, `kind` | `tencrypt.io/v1alpha1`, `PodStatus` |
//! | `name` | the namespace, as the launcher was told it |
//! | `project` | the project whose traffic is protected; null without a launcher |
//! | `addresses` | the pod's own addresses |
//! | `mode` | `strict`, `permissive` or `audit`; null without a launcher |
//! | `state` | `protected`: an agent is ready and the guard is open; `unprotected`: the same, and something of `standing` is in the agent's way; `closed`: no ready agent answers, or the guard is not open, so that nothing of the project passes. If no launcher answers, the pod is shown as `closed` because its state is unknown |
//! | `reason` | why the state is not `protected`; else absent |
//! | `degraded` | what is missing although the pod is protected. `dns not captured (socket LB)`: the pod's programs ask endpoints of their resolver, past the agent, because a load balancer at socket level rewrites the resolver's address; names are then protected as far as the directory knows their addresses |
//! | `launcher.pid` | the launcher's process; `launcher` is null where none answers |
//! | `agent.pid` | the agent's process; `agent` is null while there is none |
//! | `agent.replaced` | agents that ended unasked, or were killed because they were frozen, since the launcher started |
//! | `agent.lastEnd` | how the last of them ended; null: none did |
//! | `generation` | number of the directory's state that the agent works by; null without an agent |
//! | `counters.captured` | packets of the pod: each is one of `.sealed` (for a peer), `.hairpinned` (back to the pod, through a VIP), `.dnsForwarded` (a query), `.dnsSegments` (of DNS over TCP), `.outboundDropped`, `.outboundWaiting` |
//! | `counters.received` | datagrams from the network: each is one of `.control` (handshakes, keepalives), `.opened` (for the pod), `.inboundDropped`, `.inboundWaiting` |
//! | `counters.answers` | what resolvers and the agent say to the pod: each is one of `.answered`, `.answersDropped`, `.answersWaiting` |
//! | `counters.dnsConnections` | connections to resolvers |
//! | `counters.unpinned` | flows that did not keep their path when their address was captured or passed |
//! | `counters.drops` | packets dropped by the agent, by reason; reasons that did not occur are absent. `queue_overflow` and `receive_overflow` are the kernel's: no room in `tenc0`, in a tunnel socket |
//! | `guardState` | `open`: every packet is judged; `closed`: nothing passes but what the agent needs; `filling`: before the pod is protected for the first time, everything passes but what is protected so far; null without a launcher |
//! | `judgedBy` | `ranges`: an address within the cluster's ranges passes only if something vouches for it; `learned`: without ranges, or with `--unclassified pass`, an address that neither the directory nor DNS named passes; null without a launcher. It counts in strict mode |
//! | `unclassified` | `drop` or `pass`: what `--unclassified` says about an address within the ranges that nothing vouches for; null without a launcher |
//! | `allowLinkScope`, `allowDhcp` | whether the launcher was given these flags; null without a launcher |
//! | `released` | addresses within the ranges that something vouches for and that the pod spoke to lately; null without an answer of the agent |
//! | `guard` | packets counted by the guard's named counters, which [`COUNTERS`](crate::launcher::pod::guard::COUNTERS) documents; null where they cannot be read |
//! | `tampering` | foreign changes of what protects the pod, by kind |
//! | `standing` | those that could not be undone |
//! | `peers.total`, `.established` | peers of the directory, and those of them with a session |
//! | `peers.items` | at most 512 of them, those with a session first: `address`, `established`, and below strict mode: `standing` on the ladder (`able`, `unable`, `probing`), whether it is `captured` (an able peer is not while it stands behind a VIP that is passed), `sinceSeconds`: for how long it has been able, or has not been |
//! | `vips.total` | VIPs of the directory; `vips` is null in strict mode, where all are captured |
//! | `vips.items` | at most 256 of them: `address`, `standing` (`captured`, `passed`) |
//! | `flows` | flows in the agent's table |
//! | `flowStates.items` | at most 2,048 flows as the pod sees them, those with the latest packets first: `state`, `protocol` (number), `local`, `localPort`, `remote`, `remotePort` (null: shows no ports), `peer` (workload behind it, if known), `idleSeconds` (null: its socket is open) |
//! | `flowStates.leftOut` | flows that are not named |
//! | `wouldDrop.items` | what strict mode would drop, of the last ten minutes, at most 4,096, newest first: `reason`, `family`, `protocol`, `source`, `sourcePort`, `destination`, `destinationPort`, `packets`, `idleSeconds`, and the `standing` of its remote address, if known. `wouldDrop` is null in strict mode, and where it cannot be read |
//! | `wouldDrop.leftOut` | records that are not named |
//!
//! A flow is `protected`; `passed`: the platform carries it in clear; `clear`: it began in clear and stays there, though its
//! address is captured by now; `blocked`: its peer does not answer, and nothing of it leaves.
//!
//! A reason is the counter that strict mode would count it with. What passes between the pod and an `able` peer that is not
//! `captured` is none of it, though it is in clear: strict mode would seal it.
//!
//! `counters`, `released`, `peers`, `vips`, `flows` and `flowStates` are null where no agent answered. Counters live as long as the pod is protected, whoever
//! is its agent; `agent.replaced` lives as long as the launcher.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

pub use self::flows::{Flow, FlowStates, WouldDrop, WouldDrops};
use crate::control::{FlowReport, Report, Totals};
use crate::launcher::pod::guard;
use crate::proto::ladder::{Mode, Standing};

pub(crate) mod flows;

/// Version of the document.
pub(crate) const API_VERSION: &str = "tencrypt.io/v1alpha1";
/// Longest document that is read, in bytes: one with every peer, flow, record and counter is a half of it.
pub(crate) const DOCUMENT_MAX: u64 = 4 << 20;

/// `degraded`: programs of the pod speak to endpoints of their resolver.
const DNS_NOT_CAPTURED: &str = "dns not captured (socket LB)";

/// How the guard is, and what the launcher was told about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of the command line")]
pub(crate) struct Rules {
    pub(crate) state: &'static str,
    pub(crate) has_ranges: bool,
    pub(crate) drops_unclassified: bool,
    pub(crate) allow_link_scope: bool,
    pub(crate) allow_dhcp: bool,
}

/// A whole answer of an agent.
#[derive(Clone, Debug, Default)]
pub(crate) struct Answered {
    pub(crate) report: Report,
    /// Of its table, and those that stay in clear.
    pub(crate) flows: Vec<FlowReport>,
}

/// Whether a pod is protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// An agent is ready.
    Protected,
    /// An agent is ready, but something foreign is in its way.
    Unprotected,
    /// No ready agent answers: what is protected is blocked.
    Closed,
}

impl State {
    /// The word of document and table.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Protected => "protected",
            Self::Unprotected => "unprotected",
            Self::Closed => "closed",
        }
    }
}

/// How a pod is; the fields are those of the module's table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(missing_docs, reason = "the module documents the fields one by one")]
pub struct PodStatus {
    pub api_version: String,
    pub kind: String,
    pub name: String,
    pub project: Option<String>,
    pub addresses: Vec<IpAddr>,
    pub mode: Option<Mode>,
    pub state: State,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    #[serde(default)]
    pub degraded: Vec<String>,
    pub launcher: Option<LauncherStatus>,
    pub agent: Option<AgentStatus>,
    pub generation: Option<u64>,
    pub counters: Option<Counters>,
    #[serde(default)]
    pub guard_state: Option<String>,
    #[serde(default)]
    pub judged_by: Option<String>,
    #[serde(default)]
    pub unclassified: Option<String>,
    #[serde(default)]
    pub allow_link_scope: Option<bool>,
    #[serde(default)]
    pub allow_dhcp: Option<bool>,
    #[serde(default)]
    pub released: Option<u64>,
    pub guard: Option<BTreeMap<String, u64>>,
    pub tampering: BTreeMap<String, u64>,
    pub standing: Vec<String>,
    pub peers: Option<Peers>,
    pub vips: Option<Vips>,
    pub flows: Option<u64>,
    pub flow_states: Option<FlowStates>,
    pub would_drop: Option<WouldDrops>,
}

/// The launcher.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(missing_docs, reason = "the module documents the fields one by one")]
pub struct LauncherStatus {
    pub pid: u32,
}

/// The agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(missing_docs, reason = "the module documents the fields one by one")]
pub struct AgentStatus {
    pub pid: i32,
    pub replaced: u64,
    pub last_end: Option<String>,
}

/// What became of packets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(missing_docs, reason = "the module documents the fields one by one")]
pub struct Counters {
    #[serde(flatten)]
    pub totals: Totals,
    pub drops: BTreeMap<String, u64>,
}

/// The peers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(missing_docs, reason = "the module documents the fields one by one")]
pub struct Peers {
    pub total: u64,
    pub established: u64,
    pub items: Vec<Peer>,
}

/// One peer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(missing_docs, reason = "the module documents the fields one by one")]
pub struct Peer {
    pub address: IpAddr,
    pub established: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub standing: Option<Standing>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub captured: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since_seconds: Option<u64>,
}

/// The VIPs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(missing_docs, reason = "the module documents the fields one by one")]
pub struct Vips {
    pub total: u64,
    pub items: Vec<VipStatus>,
}

/// One VIP.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(missing_docs, reason = "the module documents the fields one by one")]
pub struct VipStatus {
    pub address: IpAddr,
    pub standing: Standing,
}

impl PodStatus {
    /// A pod about which nothing is known but that it is closed, and why.
    #[must_use]
    pub fn closed(name: String, reason: &str) -> Self {
        Self {
            api_version: API_VERSION.to_owned(),
            kind: "PodStatus".to_owned(),
            name,
            project: None,
            addresses: Vec::new(),
            mode: None,
            state: State::Closed,
            reason: Some(reason.to_owned()),
            degraded: Vec::new(),
            launcher: None,
            agent: None,
            generation: None,
            counters: None,
            guard_state: None,
            judged_by: None,
            unclassified: None,
            allow_link_scope: None,
            allow_dhcp: None,
            released: None,
            guard: None,
            tampering: BTreeMap::new(),
            standing: Vec::new(),
            peers: None,
            vips: None,
            flows: None,
            flow_states: None,
            would_drop: None,
        }
    }

    /// Takes over what a ready agent said, and the guard's records, where there may be any and they could be read.
    pub(crate) fn set_report(&mut self, answer: Answered, records: Option<&[guard::WouldDrop]>) {
        let Answered { report, flows: reported } = answer;
        self.flow_states =
            Some(flows::flow_states(&reported, &report, records.unwrap_or_default(), &self.addresses));
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
    pub(crate) fn set_guard(&mut self, counters: BTreeMap<String, u64>) {
        if counters.get(guard::DNS_UNCAPTURED).is_some_and(|packets| *packets > 0) {
            self.degraded.push(DNS_NOT_CAPTURED.to_owned());
        }
        self.guard = Some(counters);
    }

    /// Takes over how the guard is, and what the launcher was told about it.
    pub(crate) fn set_rules(&mut self, rules: &Rules) {
        self.guard_state = Some(rules.state.to_owned());
        self.judged_by = Some(if rules.has_ranges { "ranges" } else { "learned" }.to_owned());
        self.unclassified = Some(if rules.drops_unclassified { "drop" } else { "pass" }.to_owned());
        self.allow_link_scope = Some(rules.allow_link_scope);
        self.allow_dhcp = Some(rules.allow_dhcp);
    }

    /// Takes over the guard's records, after the report, if there is one.
    pub(crate) fn set_records(&mut self, records: &[guard::WouldDrop]) {
        let peers = self.peers.iter().flat_map(|peers| &peers.items);
        let peers = peers.filter_map(|peer| Some((peer.address, peer.standing?)));
        let vips = self.vips.iter().flat_map(|vips| &vips.items).map(|vip| (vip.address, vip.standing));
        let standings = peers.chain(vips).collect();
        let items = self.peers.iter().flat_map(|peers| &peers.items);
        let passed =
            items.filter(|peer| peer.standing == Some(Standing::Able) && peer.captured == Some(false));
        let passed = passed.map(|peer| peer.address).collect();
        self.would_drop = Some(flows::would_drops(records, &standings, &passed, &self.addresses));
    }

    /// The document, for people too.
    pub(crate) fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("strings and numbers")
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::control::{FlowState, PeerReport, Rung};
    use crate::proto::nat::Tuple;

    const OWN: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 1, 1, 11));
    const PEER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 1, 1, 12));

    const RULES: Rules = Rules {
        state: "open",
        has_ranges: true,
        drops_unclassified: true,
        allow_link_scope: false,
        allow_dhcp: true,
    };

    pub(crate) fn answered() -> Answered {
        let tuple = Tuple { protocol: 6, local: (OWN, 4_000), remote: (PEER, 80) };
        let flow = FlowReport { tuple, peer: Some(PEER), state: FlowState::Protected, idle_s: Some(1) };
        Answered { report: report(), flows: vec![flow] }
    }

    pub(crate) fn record() -> guard::WouldDrop {
        guard::WouldDrop {
            reason: guard::Reason::Egress,
            source: OWN,
            destination: PEER,
            protocol: 17,
            ports: Some((5, 53)),
            packets: 7,
            idle_s: 3,
        }
    }

    pub(crate) fn report() -> Report {
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
        let json: serde_json::Value = serde_json::from_str(&protected("pod").to_json()).unwrap();
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
        for (list, item) in [
            ("peers", peer),
            ("vips", &json["vips"]["items"][0]),
            ("flowStates", &json["flowStates"]["items"][0]),
            ("wouldDrop", would),
        ] {
            let line = format!("//! | `{list}.items`");
            let line = include_str!("mod.rs").lines().find(|told| told.starts_with(&line)).unwrap();
            for field in item.as_object().unwrap().keys() {
                assert!(line.contains(&format!("`{field}`")), "{list}: {field} is not documented");
            }
        }
        let documented = include_str!("mod.rs");
        for (field, value) in json.as_object().unwrap() {
            let inner = value.as_object().filter(|_| !["guard", "tampering"].contains(&field.as_str()));
            let names = inner.map_or_else(
                || vec![format!("`{field}`")],
                |inner| {
                    let tails = inner.keys().map(|key| format!(".{key}`"));
                    tails.collect()
                },
            );
            for name in names {
                let told = |line: &str| line.starts_with("//! |") && line.contains(&name);
                assert!(documented.lines().any(told), "{field}: {name} is not documented");
            }
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
}
