//! Accounting: every packet ends in exactly one counter (promise 12).
//!
//! Three sums hold at every moment, exactly; what still waits for a session, a route or the directory is [`Waiting`]:
//!
//! | what came in | what became of it |
//! |---|---|
//! | `captured`: packets of the pod | `sealed`, `hairpinned`, `dns_forwarded`, `dns_segments`, `outbound_drops`, waiting |
//! | `received`: datagrams from the network | `control`, `opened`, `inbound_drops`, waiting |
//! | `answers`: DNS messages from resolvers, packets of the DNS helper, ICMP errors and resets of the agent's own | `answered`, `answer_drops`, waiting |
//!
//! The unit of the first is the IP packet as its receiver gets it: a super-packet counts as the packets that it is cut
//! into, also where it is dropped whole. A train of datagrams counts as its datagrams. A packet counts when its end is
//! decided; where the kernel then refuses it, it moves from that counter to `kernel_refused`. A DNS query ends when it is
//! forwarded, its answer is another packet. Handshake messages and keepalives that the agent sends are no packets of the pod.
//!
//! What never was a packet has counters outside the sums: connections, queries without an answer, flows.
//! Packets that the kernel had no room for were never read; `agent::report` adds them.

use super::drop::DropReason;
use super::{Engine, Origin};
use crate::wire::packet::Packet;
use crate::wire::segment;
use crate::wire::vnet::{VNET_HEADER_LEN, VnetHeader};

/// Counts per reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drops([u64; DropReason::ALL.len()]);

impl Default for Drops {
    fn default() -> Self {
        Self([0; DropReason::ALL.len()])
    }
}

impl Drops {
    /// Counts `n` more for `reason`.
    pub fn add(&mut self, reason: DropReason, n: u64) {
        self.0[reason as usize] += n;
    }

    /// The count of one reason.
    #[must_use]
    pub fn of(&self, reason: DropReason) -> u64 {
        self.0[reason as usize]
    }

    /// Every reason with a non-zero count.
    pub fn iter(&self) -> impl Iterator<Item = (DropReason, u64)> + '_ {
        DropReason::ALL.into_iter().map(|reason| (reason, self.of(reason))).filter(|(_, n)| *n > 0)
    }

    /// All reasons together.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }
}

/// One count per way a packet can end; the module says which of them add up to what.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Packets of the pod, read from `tenc0`.
    pub captured: u64,
    /// Packets sealed and handed to the network.
    pub sealed: u64,
    /// Packets handed back to the pod, which reached itself through a VIP.
    pub hairpinned: u64,
    /// DNS queries over UDP, forwarded.
    pub dns_forwarded: u64,
    /// Segments of DNS over TCP, passed to the helper namespace.
    pub dns_segments: u64,
    /// Packets of the pod that were dropped.
    pub outbound_drops: Drops,
    /// Datagrams read from the tunnel's sockets.
    pub received: u64,
    /// Handshake messages and keepalives among them.
    pub control: u64,
    /// Packets opened and handed to the pod's stack.
    pub opened: u64,
    /// Datagrams, and packets in them, that were dropped.
    pub inbound_drops: Drops,
    /// DNS messages that came from resolvers, packets that came from the helper, ICMP errors and resets that were made.
    pub answers: u64,
    /// Those of them that were handed to the pod.
    pub answered: u64,
    /// Those of them that were dropped.
    pub answer_drops: Drops,
    /// TCP connections to resolvers that were taken.
    pub dns_connections: u64,
    /// Flows that did not keep their path when their address was captured or passed: more than there are pins.
    pub unpinned: u64,
    /// What was no packet: connections that were destroyed, queries that nobody answered.
    pub other_drops: Drops,
}

/// Packets of each sum that have not ended yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waiting {
    /// For their turn, for a session, or for the directory to place them.
    pub outbound: u64,
    /// For the directory, for their peer's route, or for their first fragment.
    pub inbound: u64,
    /// For the routes of what they name.
    pub answers: u64,
}

impl Counters {
    /// What was dropped for `reason` so far, all sums together.
    #[must_use]
    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.all_drops().iter().map(|drops| drops.of(reason)).sum()
    }

    /// Every reason with a non-zero count, all sums together.
    pub fn drops(&self) -> impl Iterator<Item = (DropReason, u64)> + '_ {
        DropReason::ALL.into_iter().map(|reason| (reason, self.dropped(reason))).filter(|(_, n)| *n > 0)
    }

    fn all_drops(&self) -> [&Drops; 4] {
        [&self.outbound_drops, &self.inbound_drops, &self.answer_drops, &self.other_drops]
    }

    /// Whether every packet is in exactly one place.
    #[must_use]
    pub fn is_balanced(&self, waiting: Waiting) -> bool {
        let Waiting { outbound, inbound, answers } = waiting;
        self.captured == self.outbound_ended() + outbound
            && self.received == self.inbound_ended() + inbound
            && self.answers == self.answers_ended() + answers
    }

    /// Makes the sums right where an agent ended between two packets, or an earlier version counted less: what is
    /// missing is lost with that agent, what is too much came in.
    pub(super) fn balance(&mut self, waiting: Waiting) {
        let lost = |came: u64, ended: u64| came.saturating_sub(ended);
        let outbound = self.outbound_ended() + waiting.outbound;
        self.outbound_drops.add(DropReason::AgentEnded, lost(self.captured, outbound));
        self.captured = self.captured.max(outbound);
        let inbound = self.inbound_ended() + waiting.inbound;
        self.inbound_drops.add(DropReason::AgentEnded, lost(self.received, inbound));
        self.received = self.received.max(inbound);
        let answers = self.answers_ended() + waiting.answers;
        self.answer_drops.add(DropReason::AgentEnded, lost(self.answers, answers));
        self.answers = self.answers.max(answers);
    }

    /// Every total by its word, in which the journal keeps it.
    pub(super) fn totals_mut(&mut self) -> [(&'static str, &mut u64); 12] {
        [
            ("captured", &mut self.captured),
            ("sealed", &mut self.sealed),
            ("hairpinned", &mut self.hairpinned),
            ("dns_forwarded", &mut self.dns_forwarded),
            ("dns_segments", &mut self.dns_segments),
            ("received", &mut self.received),
            ("control", &mut self.control),
            ("opened", &mut self.opened),
            ("answers", &mut self.answers),
            ("answered", &mut self.answered),
            ("dns_connections", &mut self.dns_connections),
            ("unpinned", &mut self.unpinned),
        ]
    }

    /// Every kind of drops, by what precedes the reason in the journal.
    pub(super) fn drops_mut(&mut self) -> [(&'static str, &mut Drops); 4] {
        [
            ("out.", &mut self.outbound_drops),
            ("in.", &mut self.inbound_drops),
            ("ans.", &mut self.answer_drops),
            ("", &mut self.other_drops),
        ]
    }

    fn outbound_ended(&self) -> u64 {
        self.sealed + self.hairpinned + self.dns_forwarded + self.dns_segments + self.outbound_drops.total()
    }

    fn inbound_ended(&self) -> u64 {
        self.control + self.opened + self.inbound_drops.total()
    }

    fn answers_ended(&self) -> u64 {
        self.answered + self.answer_drops.total()
    }
}

/// Packets that a burst counts as, vnet header first: what it would be cut into, 1 where it cannot be cut.
pub(super) fn packets_of(burst: &[u8]) -> u64 {
    let count = VnetHeader::parse(burst).and_then(|vnet| {
        let bytes = burst.get(VNET_HEADER_LEN..)?;
        segment::count(bytes, &vnet, || Packet::parse(bytes))
    });
    count.map_or(1, |count| count as u64)
}

impl Engine {
    /// Every way packets ended so far.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Packets that have not ended yet.
    #[must_use]
    pub fn waiting(&self) -> Waiting {
        Waiting {
            outbound: self.queue.packets() + self.peers.staged() + self.held.unrouted_packets(),
            inbound: self.held.inbound.len() as u64,
            answers: self.dns.held(),
        }
    }

    /// `tenc0` had a packet that the kernel could not describe; it is consumed.
    pub fn count_unread(&mut self) {
        self.counters.captured += 1;
        self.counters.outbound_drops.add(DropReason::KernelRefused, 1);
    }

    /// The kernel refused sealed packets.
    pub fn count_unsent(&mut self, packets: u64) {
        refused(&mut self.counters.sealed, &mut self.counters.outbound_drops, packets);
    }

    /// The kernel refused a packet for the pod.
    pub fn count_uninjected(&mut self, origin: Origin, packets: u64) {
        let counters = &mut self.counters;
        match origin {
            Origin::Peer => refused(&mut counters.opened, &mut counters.inbound_drops, packets),
            Origin::Pod => refused(&mut counters.hairpinned, &mut counters.outbound_drops, packets),
            Origin::Agent => refused(&mut counters.answered, &mut counters.answer_drops, packets),
        }
    }

    /// The helper namespace refused the DNS segments that were dealt with last.
    pub fn count_unpassed(&mut self) {
        let packets = packets_of(self.captured());
        refused(&mut self.counters.dns_segments, &mut self.counters.outbound_drops, packets);
    }

    /// The kernel refused a query.
    pub fn count_unforwarded(&mut self) {
        refused(&mut self.counters.dns_forwarded, &mut self.counters.outbound_drops, 1);
    }

    /// A TCP connection to a resolver was taken.
    pub fn count_stream(&mut self) {
        self.counters.dns_connections += 1;
    }

    /// The control thread destroyed connections: older than the protection of their address, or to a peer that is gone.
    pub fn count_destroyed(&mut self, preexisting: u64, gone: u64) {
        self.counters.other_drops.add(DropReason::Preexisting, preexisting);
        self.counters.other_drops.add(DropReason::PeerGone, gone);
    }

    /// The control thread had no pin for these flows: they moved.
    pub fn count_unpinned(&mut self, flows: u64) {
        self.counters.unpinned += flows;
    }
}

/// Moves packets from where they were counted to the kernel's refusals.
fn refused(counted: &mut u64, drops: &mut Drops, packets: u64) {
    let packets = packets.min(*counted);
    *counted -= packets;
    drops.add(DropReason::KernelRefused, packets);
}
