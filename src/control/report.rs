//! What an agent says about itself when it is asked: few messages, however large the project is.
//!
//! First the flows, [`REPORTED_FLOWS_MAX`] to a message, then the [`Report`], which ends the answer.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::proto::account::{Counters, Waiting};
use crate::proto::ladder::Standing;
use crate::proto::nat::Tuple;

/// Most peers that a report names; the rest are counted.
pub const REPORTED_PEERS_MAX: usize = 512;

/// Most VIPs that a report names; the rest are counted.
pub const REPORTED_VIPS_MAX: usize = 256;

/// Most flows of one message, of one kind: of the agent's table, and of those that stay in clear.
pub const REPORTED_FLOWS_MAX: usize = 512;

/// Most words with a count in one list: several times as many as there are reasons to drop a packet.
const WORDS_MAX: usize = 128;

/// Longest such word, in bytes.
const WORD_MAX: usize = 64;

/// Most lines on what stands in the way of protection.
const STANDING_MAX: usize = 64;

/// Longest of them, in bytes.
const LINE_MAX: usize = 256;

/// Counters and tables of one agent at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The directory that was committed last; none before the first.
    pub generation: Option<u64>,
    /// What came in, and what became of it.
    pub totals: Totals,
    /// Packets dropped, by reason; reasons that did not occur are left out.
    pub drops: Vec<(String, u64)>,
    /// Flows in the table.
    pub flows: u64,
    /// Flows that stay in clear.
    pub clear: u64,
    /// Addresses within the ranges that the launcher vouched for.
    pub released: u64,
    /// At most [`REPORTED_PEERS_MAX`] peers, those with a session first, in the order of their addresses.
    pub peers: Vec<PeerReport>,
    /// Peers of the directory.
    pub peers_total: u64,
    /// Those of them with a session.
    pub peers_established: u64,
    /// At most [`REPORTED_VIPS_MAX`] VIPs below strict mode, and whether each is captured.
    pub vips: Vec<(IpAddr, bool)>,
    /// VIPs of the directory, below strict mode.
    pub vips_total: u64,
    /// Foreign changes of what the agent made, by kind.
    pub tampering: Vec<(String, u64)>,
    /// Foreign changes that could not be undone: as long as there is one, the pod does not count as protected.
    pub standing: Vec<String>,
}

/// What came in, and what became of it: every packet is in exactly one place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Totals {
    /// Packets of the pod: each is one of `sealed`, `hairpinned`, `dnsForwarded`, `dnsSegments`, `outboundDropped` and
    /// `outboundWaiting`.
    pub captured: u64,
    /// Packets sealed for a peer.
    pub sealed: u64,
    /// Packets handed back to the pod, which reached itself through a VIP.
    pub hairpinned: u64,
    /// DNS queries over UDP, forwarded.
    pub dns_forwarded: u64,
    /// Segments of DNS over TCP.
    pub dns_segments: u64,
    /// Packets of the pod that were dropped.
    pub outbound_dropped: u64,
    /// Packets of the pod that wait.
    pub outbound_waiting: u64,
    /// Datagrams from the network: each is one of `control`, `opened`, `inboundDropped` and `inboundWaiting`.
    pub received: u64,
    /// Handshakes and keepalives.
    pub control: u64,
    /// Packets opened for the pod.
    pub opened: u64,
    /// Datagrams from the network that were dropped.
    pub inbound_dropped: u64,
    /// Datagrams from the network that wait.
    pub inbound_waiting: u64,
    /// What resolvers and the agent say to the pod: each is one of `answered`, `answersDropped` and `answersWaiting`.
    pub answers: u64,
    /// Answers handed to the pod.
    pub answered: u64,
    /// Answers that were dropped.
    pub answers_dropped: u64,
    /// Answers that wait.
    pub answers_waiting: u64,
    /// TCP connections to resolvers.
    pub dns_connections: u64,
    /// Flows that did not keep their path when their address was captured or passed.
    pub unpinned: u64,
}

impl Totals {
    pub(crate) fn new(counters: &Counters, waiting: Waiting) -> Self {
        Self {
            captured: counters.captured,
            sealed: counters.sealed,
            hairpinned: counters.hairpinned,
            dns_forwarded: counters.dns_forwarded,
            dns_segments: counters.dns_segments,
            outbound_dropped: counters.outbound_drops.total(),
            outbound_waiting: waiting.outbound,
            received: counters.received,
            control: counters.control,
            opened: counters.opened,
            inbound_dropped: counters.inbound_drops.total(),
            inbound_waiting: waiting.inbound,
            answers: counters.answers,
            answered: counters.answered,
            answers_dropped: counters.answer_drops.total(),
            answers_waiting: waiting.answers,
            dns_connections: counters.dns_connections,
            unpinned: counters.unpinned,
        }
    }
}

/// One peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerReport {
    /// Its address.
    pub address: IpAddr,
    /// There is a session.
    pub established: bool,
    /// Its place on the ladder; none in strict mode.
    pub rung: Option<Rung>,
}

/// A peer's place on the ladder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rung {
    /// How it stands.
    pub standing: Standing,
    /// Whether its address is captured.
    pub captured: bool,
    /// For how long it has been able, or has not been, in seconds.
    pub since_s: u64,
}

/// One flow, as the pod sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowReport {
    /// Protocol, addresses, ports.
    pub tuple: Tuple,
    /// The workload on the other side, where it is known.
    pub peer: Option<IpAddr>,
    /// What becomes of its packets.
    pub state: FlowState,
    /// Since its last packet, in seconds; none: its socket is open.
    pub idle_s: Option<u64>,
}

/// What becomes of a flow's packets.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum FlowState {
    /// Sealed and opened.
    Protected,
    /// Carried by the platform in clear.
    Passed,
    /// In clear though its address is captured by now: it keeps the path that it began on.
    Clear,
    /// Dropped: its peer does not answer.
    Blocked,
}

impl FlowState {
    /// The word used in status and docs.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Protected => "protected",
            Self::Passed => "passed",
            Self::Clear => "clear",
            Self::Blocked => "blocked",
        }
    }
}

impl Report {
    /// Checks the limits; within them, a report fits one message.
    pub(super) fn validate(&self) -> Result<(), &'static str> {
        let is_word = |word: &str| {
            (1..=WORD_MAX).contains(&word.len())
                && word.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
        };
        for counts in [&self.drops, &self.tampering] {
            if counts.len() > WORDS_MAX || !counts.iter().all(|(word, _)| is_word(word)) {
                return Err("counted words");
            }
        }
        if self.peers.len() > REPORTED_PEERS_MAX {
            return Err("count of peers");
        }
        if self.vips.len() > REPORTED_VIPS_MAX {
            return Err("count of VIPs");
        }
        // They reach a terminal: no escape sequences.
        let is_line = |line: &String| line.len() <= LINE_MAX && !line.chars().any(char::is_control);
        if self.standing.len() > STANDING_MAX || !self.standing.iter().all(is_line) {
            return Err("what stands");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use super::*;
    use crate::control::{FromAgent, MESSAGE_MAX, Message as _};

    #[test]
    fn the_longest_report_fits_one_message_and_a_longer_one_is_refused() {
        let words = vec![("w".repeat(WORD_MAX), u64::MAX); WORDS_MAX];
        let rung = Some(Rung { standing: Standing::Passed, captured: true, since_s: u64::MAX });
        let address = Ipv6Addr::from(u128::MAX).into();
        let peer = PeerReport { address, established: true, rung };
        let full = Report {
            generation: Some(u64::MAX),
            drops: words.clone(),
            tampering: words,
            peers: vec![peer; REPORTED_PEERS_MAX],
            vips: vec![(address, true); REPORTED_VIPS_MAX],
            standing: vec!["x".repeat(LINE_MAX); STANDING_MAX],
            totals: Totals {
                captured: u64::MAX,
                sealed: u64::MAX,
                hairpinned: u64::MAX,
                dns_forwarded: u64::MAX,
                dns_segments: u64::MAX,
                outbound_dropped: u64::MAX,
                outbound_waiting: u64::MAX,
                received: u64::MAX,
                control: u64::MAX,
                opened: u64::MAX,
                inbound_dropped: u64::MAX,
                inbound_waiting: u64::MAX,
                answers: u64::MAX,
                answered: u64::MAX,
                answers_dropped: u64::MAX,
                answers_waiting: u64::MAX,
                dns_connections: u64::MAX,
                unpinned: u64::MAX,
            },
            flows: u64::MAX,
            clear: u64::MAX,
            released: u64::MAX,
            peers_total: u64::MAX,
            peers_established: u64::MAX,
            vips_total: u64::MAX,
        };
        let message = FromAgent::Report(Box::new(full.clone()));
        message.validate().unwrap();
        assert!(postcard::to_stdvec(&message).unwrap().len() < MESSAGE_MAX);
        let side = (address, u16::MAX);
        let tuple = Tuple { protocol: 255, local: side, remote: side };
        let flow =
            FlowReport { tuple, peer: Some(address), state: FlowState::Blocked, idle_s: Some(u64::MAX) };
        let flows = |n| FromAgent::Flows(vec![flow; n]);
        flows(REPORTED_FLOWS_MAX).validate().unwrap();
        assert!(postcard::to_stdvec(&flows(REPORTED_FLOWS_MAX)).unwrap().len() < MESSAGE_MAX);
        assert!(flows(REPORTED_FLOWS_MAX + 1).validate().is_err());

        let mut peers = full.clone();
        peers.peers.push(peer);
        let mut vips = full.clone();
        vips.vips.push((address, true));
        let mut words = full.clone();
        words.drops.push(("one_more".to_owned(), 1));
        let hostile = |word: &str| Report { drops: vec![(word.to_owned(), 1)], ..Report::default() };
        let line = Report { standing: vec!["\u{1b}[2J".to_owned()], ..Report::default() };
        for wrong in [peers, vips, words, hostile(""), hostile("a b"), hostile("\u{1b}"), line] {
            assert!(FromAgent::Report(Box::new(wrong)).validate().is_err());
        }
    }
}
