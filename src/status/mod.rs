//! The document that tells how a pod is: the types, and nothing that fills them.
//!
//! 1. the launcher listens at `/run/tencrypt/COOKIE.status` ([`crate::launcher`]); whoever connects gets one JSON document,
//!    [`PodStatus`], and the end of the stream
//! 2. `tencrypt status` finds the pods by their lock files and asks each launcher ([`crate::cli`])
//!
//! [`COUNTERS`](crate::launcher::pod::guard::COUNTERS) documents the words of `guard`.

use std::collections::BTreeMap;
use std::net::IpAddr;

use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde::{Deserialize, Serialize};

use crate::control::{FlowState, Totals};
use crate::proto::ladder::{Mode, Standing};

/// Version of the document.
pub(crate) const API_VERSION: &str = "tencrypt.io/v1alpha1";
/// Longest document that is read, in bytes: one with every peer, flow, record and counter is a half of it.
pub(crate) const DOCUMENT_MAX: u64 = 4 << 20;

/// Whether a pod is protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// An agent is ready and the guard is open.
    Protected,
    /// An agent is ready and the guard is open, but something of `standing` is in the agent's way.
    Unprotected,
    /// No ready agent answers, or the guard is not open, so that nothing of the project passes. If no launcher answers,
    /// the pod is shown as closed because its state is unknown.
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

/// How a pod is. Counters live as long as the pod is protected, whichever agent serves it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PodStatus {
    /// `tencrypt.io/v1alpha1`.
    pub api_version: String,
    /// `PodStatus`.
    pub kind: String,
    /// The namespace, as the launcher was told it.
    pub name: String,
    /// The project whose traffic is protected; null without a launcher.
    pub project: Option<String>,
    /// The pod's own addresses.
    pub addresses: Vec<IpAddr>,
    /// How strictly the project's traffic is kept to the tunnel; null without a launcher.
    pub mode: Option<Mode>,
    /// Whether the pod is protected.
    pub state: State,
    /// Why the state is not `protected`; else absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What is missing although the pod is protected. `dns not captured (socket LB)`: the pod's programs ask endpoints
    /// of their resolver, past the agent, because a load balancer at socket level rewrites the resolver's address;
    /// names are then protected as far as the directory knows their addresses.
    #[serde(default)]
    pub degraded: Vec<String>,
    /// The launcher; null where none answers.
    pub launcher: Option<LauncherStatus>,
    /// The agent; null while there is none.
    pub agent: Option<AgentStatus>,
    /// Number of the directory's state that the agent works by; null without an agent.
    pub generation: Option<u64>,
    /// What became of packets; null where no agent answered.
    pub counters: Option<Counters>,
    /// `open`: every packet is judged; `closed`: nothing passes but what the agent needs; `filling`: before the pod is
    /// protected for the first time, everything passes but what is protected so far; null without a launcher.
    #[serde(default)]
    pub guard_state: Option<String>,
    /// `ranges`: an address within the cluster's ranges passes only if something vouches for it; `learned`: without
    /// ranges, or with `--unclassified pass`, an address that neither the directory nor DNS named passes; null without
    /// a launcher. It counts in strict mode.
    #[serde(default)]
    pub judged_by: Option<String>,
    /// `drop` or `pass`: what `--unclassified` says about an address within the ranges that nothing vouches for; null
    /// without a launcher.
    #[serde(default)]
    pub unclassified: Option<String>,
    /// Whether the launcher was given `--allow-link-scope`; null without a launcher.
    #[serde(default)]
    pub allow_link_scope: Option<bool>,
    /// Whether the launcher was given `--allow-dhcp`; null without a launcher.
    #[serde(default)]
    pub allow_dhcp: Option<bool>,
    /// Addresses within the ranges that something vouches for and that the pod spoke to lately; null without an answer
    /// of the agent.
    #[serde(default)]
    pub released: Option<u64>,
    /// Packets counted by the guard's named counters; null where they cannot be read.
    pub guard: Option<BTreeMap<String, u64>>,
    /// Foreign changes of what protects the pod, by kind.
    pub tampering: BTreeMap<String, u64>,
    /// Foreign changes that could not be undone.
    pub standing: Vec<String>,
    /// The peers; null where no agent answered.
    pub peers: Option<Peers>,
    /// The VIPs; null where no agent answered, and in strict mode, where all are captured.
    pub vips: Option<Vips>,
    /// Flows in the agent's table; null where no agent answered.
    pub flows: Option<u64>,
    /// What becomes of each flow; null where no agent answered.
    pub flow_states: Option<FlowStates>,
    /// What strict mode would drop; null in strict mode, and where it cannot be read.
    pub would_drop: Option<WouldDrops>,
}

/// How several pods are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PodStatusList {
    /// `tencrypt.io/v1alpha1`.
    pub api_version: String,
    /// `PodStatusList`.
    pub kind: String,
    /// The pods, by name.
    pub items: Vec<PodStatus>,
}

/// What `tencrypt status --output json` prints: one document for a name, a list otherwise.
#[derive(JsonSchema)]
#[schemars(title = "tencrypt status --output json")]
#[serde(untagged)]
#[expect(dead_code, reason = "the schema is made from it")]
enum Printed {
    One(Box<PodStatus>),
    List(PodStatusList),
}

/// The JSON schema of the documents that `tencrypt status` prints.
#[must_use]
pub fn schema() -> String {
    let schema =
        SchemaSettings::draft2020_12().for_serialize().into_generator().into_root_schema_for::<Printed>();
    serde_json::to_string_pretty(&schema).expect("strings and numbers")
}

/// The launcher.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LauncherStatus {
    /// The launcher's process.
    pub pid: u32,
}

/// The agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AgentStatus {
    /// The agent's process.
    pub pid: i32,
    /// Agents that ended unasked, or were killed because they were frozen, since the launcher started.
    pub replaced: u64,
    /// How the last of them ended; null: none did.
    pub last_end: Option<String>,
}

/// What became of packets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Counters {
    /// What came in, and what became of it.
    #[serde(flatten)]
    pub totals: Totals,
    /// Packets dropped by the agent, by reason; reasons that did not occur are absent. `queue_overflow` and
    /// `receive_overflow` are the kernel's: no room in `tenc0`, in a tunnel socket.
    pub drops: BTreeMap<String, u64>,
}

/// The peers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Peers {
    /// Peers of the directory.
    pub total: u64,
    /// Those of them with a session.
    pub established: u64,
    /// At most 512 of them, those with a session first.
    pub items: Vec<Peer>,
}

/// One peer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Peer {
    /// Its address.
    pub address: IpAddr,
    /// Whether there is a session.
    pub established: bool,
    /// How it stands on the ladder (`able`, `unable` or `probing`); absent in strict mode.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub standing: Option<Standing>,
    /// Whether its address is captured: an able peer is not while it stands behind a VIP that is passed. Absent in
    /// strict mode.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub captured: Option<bool>,
    /// For how long it has been able, or has not been; absent in strict mode.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since_seconds: Option<u64>,
}

/// The VIPs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Vips {
    /// VIPs of the directory.
    pub total: u64,
    /// At most 256 of them.
    pub items: Vec<VipStatus>,
}

/// One VIP.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VipStatus {
    /// Its address.
    pub address: IpAddr,
    /// `captured` or `passed`.
    pub standing: Standing,
}

/// What becomes of flows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FlowStates {
    /// Flows that are not named.
    pub left_out: u64,
    /// At most 2,048 flows, those with the latest packets first.
    pub items: Vec<Flow>,
}

/// One flow, as the pod sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Flow {
    /// What becomes of its packets.
    pub state: FlowState,
    /// Number of its protocol.
    pub protocol: u8,
    /// The pod's address.
    pub local: IpAddr,
    /// The pod's port; null: the protocol shows no ports.
    pub local_port: Option<u16>,
    /// The address that the pod speaks to.
    pub remote: IpAddr,
    /// The port that the pod speaks to; null: the protocol shows no ports.
    pub remote_port: Option<u16>,
    /// The workload behind the remote address; null: it is not known.
    pub peer: Option<IpAddr>,
    /// Since its last packet; null: its socket is open.
    pub idle_seconds: Option<u64>,
}

/// What strict mode would drop, of the last ten minutes. What passes between the pod and an `able` peer that is not
/// `captured` is not listed, though it is in clear: strict mode would seal it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct WouldDrops {
    /// Records that are not named.
    pub left_out: u64,
    /// At most 4,096 records, newest first.
    pub items: Vec<WouldDrop>,
}

/// One direction of a flow that strict mode would drop.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct WouldDrop {
    /// The counter that strict mode would count it with.
    pub reason: String,
    /// `ipv4` or `ipv6`.
    pub family: String,
    /// Number of its protocol.
    pub protocol: u8,
    /// Where it comes from.
    pub source: IpAddr,
    /// The port that it comes from; null: the protocol shows no ports.
    pub source_port: Option<u16>,
    /// Where it goes.
    pub destination: IpAddr,
    /// The port that it goes to; null: the protocol shows no ports.
    pub destination_port: Option<u16>,
    /// Packets of it.
    pub packets: u64,
    /// Since its last packet.
    pub idle_seconds: u64,
    /// How its remote address stands; null: it is not known.
    pub standing: Option<Standing>,
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

    /// The document, for people too.
    pub(crate) fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("strings and numbers")
    }
}
