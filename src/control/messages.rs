//! What launcher and agent tell each other, and the limits that every message keeps to.
//!
//! [`ToAgent`] and [`FromAgent`] are the two directions; [`chunks`] cuts a directory of any size into messages.

use std::net::IpAddr;
use std::path::PathBuf;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use zeroize::ZeroizeOnDrop;

use super::{FlowReport, REPORTED_FLOWS_MAX, Report};
use crate::proto::directory::{Change, Vip};
use crate::proto::ladder::Mode;
use crate::proto::noise::{StaticSecret, Suite};
use crate::proto::ranges::Ranges;
use crate::proto::routing::Class;

/// Encoded changes in one [`ToAgent::Changes`], in bytes, where they are small: the agent reads a message between packets.
/// A VIP may have as much as [`super::MESSAGE_MAX`].
const CHUNK: usize = 16 * 1024;

/// Most endpoints of one VIP that are sent, over all its ports: at most 22 bytes each, so that a VIP fits one message.
pub const VIP_ENDPOINTS_MAX: usize = 2_048;

/// Most ports of one VIP that are sent; they and the endpoints fit one message together.
pub const VIP_PORTS_MAX: usize = 1_024;

/// Most own addresses of a workload: Kubernetes gives one per family; a few more cost nothing.
const ADDRESSES_MAX: usize = 16;

/// Most descriptors with `Init`: state file, `tenc0`, a socket per address, a process, the DNS helper's three.
const CARRIED_MAX: usize = 3 + ADDRESSES_MAX + 3;

/// Most resolvers: glibc reads three lines, musl too; a dual-stack list doubles them.
pub(super) const RESOLVERS_MAX: usize = 16;

/// Most networks of the ranges.
const RANGES_MAX: usize = 64;

/// Most addresses that one message asks or tells about.
pub const ASKED_MAX: usize = 128;

/// Longest reason of a failure, in bytes.
pub(super) const REASON_MAX: usize = 4_096;

/// How packets from peers are handed to the pod's stack.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Inject {
    /// TUN where the kernel allows it.
    #[default]
    Auto,
    /// Written to `tenc0`, as super-packets.
    Tun,
    /// Through raw sockets on `lo`.
    Raw,
}

/// One address of the protected workload and the private key that belongs to it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct OwnAddress {
    /// The pod's address.
    pub address: IpAddr,
    /// Its derived static key.
    pub secret: StaticSecret,
    /// The one that it answers with, too, during a rotation of the project key.
    pub accept: Option<StaticSecret>,
}

/// The seed of the engine's random numbers; ephemeral keys come from it, so it is a secret.
#[derive(Clone, ZeroizeOnDrop, Serialize, Deserialize)]
pub struct Seed(pub [u8; 32]);

impl std::fmt::Debug for Seed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Seed(..)")
    }
}

/// Which file a program is: device, inode, size, time of change in nanoseconds. Another build is another file.
pub type Executable = [u64; 4];

/// What a descriptor that comes with `Init` is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Carried {
    /// The state file: flows, live peers, counters.
    State,
    /// `tenc0`, kept by the launcher for an agent that is no more.
    Tun,
    /// That agent's UDP sockets, in the order of the own addresses.
    Socket,
    /// The process whose namespace it is.
    Process,
    /// The DNS helper's TUN.
    HelperTun,
    /// Its listeners, one per family.
    HelperListener,
}

/// Where the namespace is found, so that an agent without a launcher sees that it is gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Its name under `/run/netns` or its path; none for the namespace of a process.
    pub path: Option<PathBuf>,
    /// Device and inode of the namespace.
    pub identity: (u64, u64),
    /// What the runtime files are called, up to their endings.
    pub runtime: PathBuf,
}

/// What an agent must know before it touches anything.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Init {
    /// What the message's descriptors are, in their order.
    pub carried: Vec<Carried>,
    /// Successor of a living agent: everything is made ready, but no packet is read before [`ToAgent::Resume`].
    pub parked: bool,
    /// Where the namespace is.
    pub place: Place,
    /// The workload's own addresses, at least one.
    pub addresses: Vec<OwnAddress>,
    /// UDP port of the tunnel, in the whole key domain.
    pub port: u16,
    /// MTU of the pod's real link, in bytes.
    pub link_mtu: u32,
    /// DNS zone of the project, for example `shop.svc.cluster.local`; without one, nothing is learned from DNS.
    pub zone: Option<String>,
    /// The cluster's pod and service ranges; empty: an address that nobody names passes.
    pub ranges: Ranges,
    /// Resolvers of the pod's resolv.conf.
    pub resolvers: Vec<IpAddr>,
    /// First and last source port of upstream DNS sockets.
    pub dns_ports: (u16, u16),
    /// Those ports are among the applications': the agent keeps them bound.
    pub hold_dns_ports: bool,
    /// How packets from peers are handed to the pod's stack.
    pub inject: Inject,
    /// The rung of the ladder.
    pub mode: Mode,
    /// Digest of the guard's skeleton.
    pub skeleton: u64,
    /// The AEAD of the project.
    pub suite: Suite,
    /// How long the loop waits awake for the next packet, in microseconds; 0: not at all.
    pub spin_us: u8,
    /// Seed of the engine's random numbers.
    pub seed: Seed,
    /// Rekey after this many seconds instead of the protocol's 120; tests only.
    pub rekey_after_s: Option<u64>,
}

/// Version of the messages. [`ToAgent::Hello`] and [`FromAgent::Hello`] are encoded alike in every version; a launcher
/// that meets another version replaces the agent.
pub const VERSION: u32 = 3;

/// From the launcher to the agent.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToAgent {
    /// Asks an agent that runs already which version it speaks.
    Hello {
        /// The launcher's.
        version: u32,
    },
    /// First message to a new agent. Descriptors: as [`Init::carried`] says.
    Init(Box<Init>),
    /// A launcher takes over an agent that runs already: it is answered with [`FromAgent::Ready`], and the next commit is a
    /// whole directory.
    Adopt,
    /// A part of the changes that lead to the next generation.
    Changes(Vec<Change>),
    /// All changes since the last commit now count. The agent's next message is read when they are applied. A whole directory
    /// is answered with [`FromAgent::Committed`] when everything of it is in place.
    Commit {
        /// Number of this state of the directory, increasing.
        generation: u64,
        /// The changes are the whole directory: what they do not name is removed.
        whole: bool,
    },
    /// Answered with [`FromAgent::Pong`]: the loop turns.
    Ping,
    /// Another agent takes over: read no more, answer [`FromAgent::HandedOver`], exit. Nothing is removed.
    HandOver,
    /// To a parked agent: its predecessor has ended. Descriptor: what that one handed over; none: it gave nothing.
    Resume,
    /// Answers [`FromAgent::WhoIs`]; later, unasked, what has changed since. At most [`ASKED_MAX`].
    Classified(Vec<(IpAddr, Class)>),
    /// The launcher is about to load the guard's skeleton: that its rules change is not tampering.
    GuardLoading,
    /// The launcher has loaded the guard's skeleton again, or another one; answered with [`FromAgent::GuardFilled`].
    GuardLoaded {
        /// Its digest.
        skeleton: u64,
    },
    /// Tear everything down, answer [`FromAgent::Stopped`], exit.
    Stop,
    /// Answered with [`FromAgent::Flows`] and [`FromAgent::Report`].
    Report,
}

/// From the agent to the launcher.
#[derive(Debug, Serialize, Deserialize)]
pub enum FromAgent {
    /// Which version the agent speaks.
    Hello {
        /// Its version.
        version: u32,
    },
    /// Everything is in place for this generation. Descriptors: `tenc0`, then the UDP sockets.
    Ready {
        /// The generation that was committed when the agent became ready.
        generation: u64,
        /// [`Init::fingerprint`] of what the agent was told.
        fingerprint: [u8; 32],
        /// Which file the agent's program is.
        executable: Executable,
    },
    /// The loop turns.
    Pong,
    /// `tenc0` was made again. Descriptor: the new one; the old one is to be closed.
    TunReplaced,
    /// The pod's device is gone from the namespace, and so is the pod: the agent ends.
    LinkGone,
    /// The whole directory of this generation is in place.
    Committed {
        /// Its number.
        generation: u64,
    },
    /// Whose are these addresses, which the directory does not name? At most [`ASKED_MAX`].
    WhoIs(Vec<IpAddr>),
    /// The guard's skeleton is not what it was: it is to be loaded again.
    GuardLost,
    /// A device came at whose egress there is no guard.
    GuardDevice,
    /// The answer to [`ToAgent::GuardLoaded`].
    GuardFilled {
        /// Number of the directory that is applied.
        generation: u64,
        /// The skeleton's digest.
        skeleton: u64,
        /// Its sets hold what they are to hold; else it has to be loaded again.
        filled: bool,
    },
    /// The agent has read its last packet. Descriptor: a sealed memfd with its sessions and flows.
    HandedOver,
    /// Bring-up failed; what was made has been removed again.
    Failed {
        /// Exit code for the launcher: 2 usage or configuration, 3 the kernel or a privilege refused.
        exit_code: u8,
        /// What failed, for a person.
        reason: String,
    },
    /// Everything the agent made is gone.
    Stopped,
    /// Counters and peers, as asked for: the last message of the answer.
    Report(Box<Report>),
    /// Flows, as asked for: some messages before the report.
    Flows(Vec<FlowReport>),
}

/// What the channel asks of a message type; implemented by the two directions only.
pub trait Message: std::fmt::Debug + Serialize + DeserializeOwned {
    /// Descriptors that a message of this variant may carry at most.
    fn descriptors_max(&self) -> usize;

    /// Checks limits that the encoding does not express.
    ///
    /// # Errors
    /// The first limit that is broken.
    fn validate(&self) -> Result<(), &'static str>;
}

impl Message for ToAgent {
    fn descriptors_max(&self) -> usize {
        match self {
            Self::Init(init) => init.carried.len(),
            Self::Resume => 1,
            Self::Hello { .. }
            | Self::Adopt
            | Self::Changes(_)
            | Self::Commit { .. }
            | Self::Ping
            | Self::Report
            | Self::HandOver
            | Self::Classified(_)
            | Self::GuardLoading
            | Self::GuardLoaded { .. }
            | Self::Stop => 0,
        }
    }

    fn validate(&self) -> Result<(), &'static str> {
        match self {
            Self::Init(init) => init.validate(),
            Self::Classified(classes) if classes.len() > ASKED_MAX => Err("count of classes"),
            _ => Ok(()),
        }
    }
}

impl Init {
    /// A digest of everything that makes one agent different from another of the same pod: two launchers that would say
    /// the same have the same one. Randomness, descriptors and sizes that follow the link do not count.
    #[must_use]
    pub fn fingerprint(&self) -> [u8; 32] {
        let public = |own: &OwnAddress| {
            (own.address, own.secret.public(), own.accept.as_ref().map(StaticSecret::public))
        };
        let keys: Vec<_> = self.addresses.iter().map(public).collect();
        let network =
            (self.port, &self.zone, &self.ranges, &self.resolvers, self.dns_ports, self.hold_dns_ports);
        let said = (keys, network, self.inject, self.mode, self.suite, self.spin_us, self.rekey_after_s);
        let encoded = postcard::to_stdvec(&said).expect("memory is the only limit");
        Sha256::digest(encoded).into()
    }

    fn validate(&self) -> Result<(), &'static str> {
        if self.carried.len() > CARRIED_MAX {
            return Err("count of descriptors");
        }
        if self.addresses.is_empty() || self.addresses.len() > ADDRESSES_MAX {
            return Err("count of own addresses");
        }
        if self.port == 0 {
            return Err("tunnel port 0");
        }
        // IPv4 needs 576 octets of reassembly; 65,535 is the largest IP packet.
        if !(576..=65_535).contains(&self.link_mtu) {
            return Err("link MTU");
        }
        if let Some(zone) = &self.zone
            && (zone.is_empty() || zone.len() > 253 || !zone.bytes().all(|b| b.is_ascii_graphic()))
        {
            return Err("zone");
        }
        if self.ranges.iter().count() > RANGES_MAX {
            return Err("count of ranges");
        }
        if self.resolvers.len() > RESOLVERS_MAX {
            return Err("count of resolvers");
        }
        if self.dns_ports.0 == 0 || self.dns_ports.0 > self.dns_ports.1 {
            return Err("range of DNS ports");
        }
        if self.rekey_after_s.is_some_and(|s| !(1..=120).contains(&s)) {
            return Err("rekey interval");
        }
        Ok(())
    }
}

impl Message for FromAgent {
    fn descriptors_max(&self) -> usize {
        match self {
            // tenc0 and one UDP socket per own address.
            Self::Ready { .. } => 1 + ADDRESSES_MAX,
            Self::TunReplaced | Self::HandedOver => 1,
            Self::Hello { .. }
            | Self::Pong
            | Self::LinkGone
            | Self::Report(_)
            | Self::Flows(_)
            | Self::Committed { .. }
            | Self::WhoIs(_)
            | Self::GuardLost
            | Self::GuardDevice
            | Self::GuardFilled { .. }
            | Self::Failed { .. }
            | Self::Stopped => 0,
        }
    }

    fn validate(&self) -> Result<(), &'static str> {
        match self {
            Self::Failed { exit_code, reason } => {
                if !(2..=3).contains(exit_code) {
                    return Err("exit code");
                }
                // The reason reaches a terminal: no escape sequences.
                if reason.len() > REASON_MAX || reason.chars().any(|c| c.is_control() && c != '\n') {
                    return Err("reason");
                }
                Ok(())
            }
            Self::WhoIs(addresses) if addresses.is_empty() || addresses.len() > ASKED_MAX => {
                Err("count of addresses")
            }
            Self::Report(report) => report.validate(),
            Self::Flows(flows) if flows.len() > REPORTED_FLOWS_MAX => Err("count of flows"),
            _ => Ok(()),
        }
    }
}

impl FromAgent {
    /// A failure whose reason keeps to the channel's limits.
    #[must_use]
    pub fn failed(exit_code: u8, reason: &str) -> Self {
        let mut clean = String::new();
        for c in reason.chars().map(|c| if c.is_control() && c != '\n' { ' ' } else { c }) {
            if clean.len() + c.len_utf8() > REASON_MAX {
                break;
            }
            clean.push(c);
        }
        Self::Failed { exit_code, reason: clean }
    }
}

/// Cuts changes into messages that fit, in order. A VIP with more ports or endpoints than [`VIP_PORTS_MAX`] and
/// [`VIP_ENDPOINTS_MAX`] is cut to those: ready endpoints first, then in order, so that every agent keeps the same ones.
#[must_use]
pub fn chunks(changes: Vec<Change>) -> Vec<ToAgent> {
    let mut messages = Vec::new();
    let mut chunk = Vec::new();
    let mut room = CHUNK;
    for mut change in changes {
        if let Change::SetVip(vip) = &mut change {
            cut_vip(vip);
        }
        let size = encoded_len(&change);
        if size > room && !chunk.is_empty() {
            messages.push(ToAgent::Changes(std::mem::take(&mut chunk)));
            room = CHUNK;
        }
        room = room.saturating_sub(size);
        chunk.push(change);
    }
    if !chunk.is_empty() {
        messages.push(ToAgent::Changes(chunk));
    }
    messages
}

fn encoded_len(change: &Change) -> usize {
    let counter = postcard::ser_flavors::Size::default();
    postcard::serialize_with_flavor(change, counter).unwrap_or(CHUNK)
}

/// Keeps a VIP within one message; see [`chunks`].
fn cut_vip(vip: &mut Vip) {
    vip.ports.truncate(VIP_PORTS_MAX);
    let total: usize = vip.ports.iter().map(|port| port.endpoints.len()).sum();
    if total <= VIP_ENDPOINTS_MAX {
        return;
    }
    tracing::warn!(
        endpoints = total,
        kept = VIP_ENDPOINTS_MAX,
        "service has more endpoints than one agent is told"
    );
    let share = VIP_ENDPOINTS_MAX / vip.ports.len().max(1);
    for port in &mut vip.ports {
        // Stable: within ready and unready the sorted order stays.
        port.endpoints.sort_by_key(|endpoint| !endpoint.ready);
        port.endpoints.truncate(share);
        port.endpoints.sort();
    }
}
