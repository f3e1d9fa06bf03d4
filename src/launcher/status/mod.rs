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
//! | `state` | `protected`: an agent is ready; `unprotected`: it is, and something of `standing` is in its way; `closed`: no ready agent answers, what is protected is blocked. Without a launcher too, though an agent may go on: nobody vouches for it |
//! | `reason` | why the state is not `protected`; else absent |
//! | `launcher.pid` | the launcher's process; `launcher` is null where none answers |
//! | `agent.pid` | the agent's process; `agent` is null while there is none |
//! | `agent.replaced` | agents that ended unasked, or were killed because they were frozen, since the launcher started |
//! | `agent.lastEnd` | how the last of them ended; null: none did |
//! | `generation` | number of the directory's state that the agent works by; null without an agent |
//! | `counters.sealed`, `.opened` | packets sealed for peers, opened from peers |
//! | `counters.dnsForwarded` | DNS queries forwarded |
//! | `counters.drops` | packets dropped by the agent, by reason; reasons that did not occur are absent. `queue_overflow` and `receive_overflow` are the kernel's: no room in `tenc0`, in a tunnel socket |
//! | `guard` | packets counted by the guard's named counters; null where they cannot be read |
//! | `tampering` | foreign changes of what protects the pod, by kind |
//! | `standing` | those that could not be undone |
//! | `peers.total`, `.established` | peers of the directory, and those of them with a session |
//! | `peers.items` | at most 512 of them, those with a session first: `address`, `established` |
//! | `flows` | flows in the agent's table |
//!
//! `counters`, `peers` and `flows` are null where no agent answered. Counters live as long as the pod is protected, whoever
//! is its agent; `agent.replaced` lives as long as the launcher.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::agent::control::Report;

mod command;
mod server;

pub use command::status;
pub(super) use server::StatusServer;

/// Version of the document.
const API_VERSION: &str = "tencrypt.io/v1alpha1";
/// Longest document that is read, in bytes: one with every peer and counter is a tenth of it.
const DOCUMENT_MAX: u64 = 1 << 20;

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
    pub state: State,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    pub launcher: Option<LauncherStatus>,
    pub agent: Option<AgentStatus>,
    pub generation: Option<u64>,
    pub counters: Option<Counters>,
    pub guard: Option<BTreeMap<String, u64>>,
    pub tampering: BTreeMap<String, u64>,
    pub standing: Vec<String>,
    pub peers: Option<Peers>,
    pub flows: Option<u64>,
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
    pub sealed: u64,
    pub opened: u64,
    pub dns_forwarded: u64,
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
            state: State::Closed,
            reason: Some(reason.to_owned()),
            launcher: None,
            agent: None,
            generation: None,
            counters: None,
            guard: None,
            tampering: BTreeMap::new(),
            standing: Vec::new(),
            peers: None,
            flows: None,
        }
    }

    /// Takes over what a ready agent said.
    fn set_report(&mut self, report: Report) {
        let Report {
            generation,
            sealed,
            opened,
            dns_forwarded,
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
        self.counters = Some(Counters { sealed, opened, dns_forwarded, drops: drops.into_iter().collect() });
        self.tampering = tampering.into_iter().collect();
        self.standing = standing;
        let items = peers
            .into_iter()
            .map(|peer| Peer { address: peer.address, established: peer.established })
            .collect();
        self.peers = Some(Peers { total: peers_total, established: peers_established, items });
        self.flows = Some(flows);
    }

    /// The document, for people too.
    fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("strings and numbers")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::control::PeerReport;

    pub(super) fn report() -> Report {
        Report {
            generation: Some(4),
            sealed: 10,
            opened: 20,
            dns_forwarded: 3,
            drops: vec![("bad_tag".to_owned(), 2), ("queue_overflow".to_owned(), 5)],
            flows: 6,
            peers: vec![PeerReport { address: [10, 1, 1, 12].into(), established: true }],
            peers_total: 700,
            peers_established: 1,
            tampering: Vec::new(),
            standing: Vec::new(),
        }
    }

    pub(super) fn protected(name: &str) -> PodStatus {
        let mut status = PodStatus {
            project: Some("shop".to_owned()),
            addresses: vec![[10, 1, 1, 11].into()],
            launcher: Some(LauncherStatus { pid: 7 }),
            agent: Some(AgentStatus { pid: 8, replaced: 1, last_end: Some("by signal 9".to_owned()) }),
            guard: Some([("inbound".to_owned(), 0)].into()),
            ..PodStatus::closed(name.to_owned(), "not asked yet")
        };
        status.set_report(report());
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
        assert_eq!(json["agent"]["lastEnd"], "by signal 9");
        assert_eq!(json["counters"]["dnsForwarded"], 3);
        assert_eq!(json["counters"]["drops"]["queue_overflow"], 5);
        assert_eq!(json["peers"]["items"][0]["address"], "10.1.1.12");
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
    fn what_stands_in_the_way_makes_a_pod_unprotected() {
        let mut status = protected("pod");
        let standing = vec!["a foreign rule".to_owned()];
        status.set_report(Report { standing, ..report() });
        assert_eq!((status.state, status.reason.as_deref()), (State::Unprotected, Some("a foreign rule")));
    }
}
