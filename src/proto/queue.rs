//! What the pod has sent and the engine has not looked at yet: read from `tenc0` at once, and taken out flow by flow.
//!
//! 1. the driver reads the next burst into [`CaptureQueue::room`]
//! 2. [`CaptureQueue::push`] puts it behind the others of its flow; of too much, the oldest of the longest flow is dropped
//! 3. [`CaptureQueue::take`] gives the flows their turns, a super-packet each; one that had nothing waiting comes first
//!
//! `tenc0` never tells its senders to stop, and its queue is one for all: without this, a packet waits behind everything
//! that the windows of five connections hold. Only the first fragment of a datagram has ports: fragments share a place that
//! depends on their addresses. Two flows may share a place; the order within a flow is kept.
//!
//! Sans-IO; chunks are allocated when they are needed first and kept; no allocation per packet.
//! Source: RFC 8290 (deficit round robin, new flows first, the fattest flow pays), without its CoDel: what waits is bounded.

use std::collections::VecDeque;
use std::hash::BuildHasher as _;
use std::ops::Range;

use foldhash::fast::FixedState;

use super::BUFFER_LEN;
use crate::wire::packet::Packet;
use crate::wire::segment;
use crate::wire::vnet::{VNET_HEADER_LEN, VnetHeader};

/// Bytes that may wait. Less makes connections lose what a larger window would have carried (1 MiB: a tenth of their speed);
/// more is memory, and nobody's gain: what is quiet does not wait behind it.
const LIMIT: usize = 3 << 20;
/// Bytes of a chunk: a burst is read where one of the largest size has room, so it holds three of them, or four.
const CHUNK: usize = 4 * BUFFER_LEN;
/// Chunks at one time. More than [`LIMIT`] fills: the end of one stays unused, and it is free again only after its last burst.
const CHUNKS: usize = 18;
/// Places of flows.
const PLACES: usize = 256;
/// Bytes that a flow may send at its turn.
const QUANTUM: usize = 1 << 16;
/// A longer burst is one of a flow that wants throughput, even where none of its others waited.
const QUIET: usize = 2_048;

/// One burst that waits: vnet header and packet.
#[derive(Clone, Debug)]
struct Burst {
    chunk: usize,
    range: Range<usize>,
    packets: u64,
}

#[derive(Debug)]
struct Chunk {
    bytes: Vec<u8>,
    end: usize,
    /// Bursts in it that are not done with.
    bursts: usize,
}

/// The bursts of the flows of one place.
#[derive(Debug, Default)]
struct Place {
    bursts: VecDeque<Burst>,
    bytes: usize,
    credit: usize,
    /// It stands in a line.
    listed: bool,
}

/// Bursts in the order of their flows' turns.
pub(super) struct CaptureQueue {
    chunks: Vec<Chunk>,
    /// Where the next burst is read into.
    filling: usize,
    places: Vec<Place>,
    /// Places that had nothing waiting, then those that go on.
    lines: [VecDeque<usize>; 2],
    bytes: usize,
    packets: u64,
    hasher: FixedState,
    taken: Option<Burst>,
    /// The taken one is a quiet flow's, and went ahead of others.
    overtook: bool,
}

impl CaptureQueue {
    /// An empty queue. `seed` makes it unknown which flows share a place.
    pub(super) fn new(seed: u64) -> Self {
        Self {
            chunks: Vec::new(),
            filling: 0,
            places: std::iter::repeat_with(Place::default).take(PLACES).collect(),
            lines: [VecDeque::new(), VecDeque::new()],
            bytes: 0,
            packets: 0,
            hasher: FixedState::with_seed(seed),
            taken: None,
            overtook: false,
        }
    }

    /// Where the next burst goes; `None` while too much waits.
    pub(super) fn room(&mut self) -> Option<&mut [u8]> {
        let has_room = |chunk: &Chunk| CHUNK - chunk.end >= BUFFER_LEN;
        if !self.chunks.get(self.filling).is_some_and(has_room) {
            // The lowest one: what is seldom needed stays untouched.
            match self.chunks.iter().position(has_room) {
                Some(free) => self.filling = free,
                None if self.chunks.len() < CHUNKS => {
                    self.filling = self.chunks.len();
                    self.chunks.push(Chunk { bytes: vec![0; CHUNK], end: 0, bursts: 0 });
                }
                None => return None,
            }
        }
        let chunk = &mut self.chunks[self.filling];
        chunk.bytes.get_mut(chunk.end..chunk.end + BUFFER_LEN)
    }

    /// The first `len` bytes in [`Self::room`].
    pub(super) fn peek(&self, len: usize) -> &[u8] {
        let chunk = self.chunks.get(self.filling);
        chunk.and_then(|chunk| chunk.bytes.get(chunk.end..chunk.end + len)).unwrap_or_default()
    }

    /// A burst of `len` bytes stands in [`Self::room`]. Returns the packets that it counts as.
    pub(super) fn push(&mut self, len: usize) -> u64 {
        let Some(chunk) = self.chunks.get_mut(self.filling) else { return 0 };
        let range = chunk.end..(chunk.end + len).min(CHUNK);
        let (key, packets) = describe(&chunk.bytes[range.clone()]);
        chunk.end = range.end;
        chunk.bursts += 1;
        #[expect(clippy::cast_possible_truncation, reason = "a place is all that is wanted")]
        let at = self.hasher.hash_one(key) as usize % PLACES;
        let place = &mut self.places[at];
        place.bytes += range.len();
        place.bursts.push_back(Burst { chunk: self.filling, range, packets });
        if !std::mem::replace(&mut place.listed, true) {
            place.credit = QUANTUM;
            self.lines[0].push_back(at);
        }
        self.bytes += len;
        self.packets += packets;
        packets
    }

    /// Drops the oldest burst of the flow that has most waiting, if too much waits in all. Returns its packets.
    pub(super) fn shed(&mut self) -> Option<u64> {
        if self.bytes <= LIMIT {
            return None;
        }
        let fattest = (0..PLACES).max_by_key(|at| self.places[*at].bytes)?;
        let burst = self.pop(fattest)?;
        self.release(&burst);
        Some(burst.packets)
    }

    /// Takes the next burst. Its bytes are [`Self::taken`] until the next call.
    pub(super) fn take(&mut self) -> Option<u64> {
        if let Some(done) = self.taken.take() {
            self.release(&done);
        }
        loop {
            let line = usize::from(self.lines[0].is_empty());
            let at = *self.lines[line].front()?;
            let place = &mut self.places[at];
            if place.credit == 0 || place.bursts.is_empty() {
                self.lines[line].pop_front();
                // A new flow that emptied waits for its turn once: it cannot come first again and again.
                if place.bursts.is_empty() && line == 1 {
                    place.listed = false;
                } else {
                    place.credit += if place.credit == 0 { QUANTUM } else { 0 };
                    self.lines[1].push_back(at);
                }
                continue;
            }
            let burst = self.pop(at)?;
            let place = &mut self.places[at];
            place.credit = place.credit.saturating_sub(burst.range.len());
            let packets = burst.packets;
            self.overtook = line == 0 && burst.range.len() <= QUIET && self.bytes > 0;
            self.taken = Some(burst);
            return Some(packets);
        }
    }

    /// The burst that was taken last.
    pub(super) fn taken(&self) -> &[u8] {
        let bytes = self.taken.as_ref().map(|burst| &self.chunks[burst.chunk].bytes[burst.range.clone()]);
        bytes.unwrap_or_default()
    }

    /// Whether that was a short burst of a flow that had nothing waiting, and others wait.
    pub(super) fn has_overtaken(&self) -> bool {
        self.overtook
    }

    /// Lends the chunk that the taken burst lies in, and where; [`Self::give_back`] ends that.
    pub(super) fn lend(&mut self) -> Option<(Vec<u8>, Range<usize>)> {
        let burst = self.taken.as_ref()?;
        Some((std::mem::take(&mut self.chunks[burst.chunk].bytes), burst.range.clone()))
    }

    pub(super) fn give_back(&mut self, bytes: Vec<u8>) {
        if let Some(burst) = &self.taken {
            self.chunks[burst.chunk].bytes = bytes;
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Packets that wait.
    pub(super) fn packets(&self) -> u64 {
        self.packets
    }

    fn pop(&mut self, at: usize) -> Option<Burst> {
        let place = &mut self.places[at];
        let burst = place.bursts.pop_front()?;
        place.bytes -= burst.range.len();
        self.bytes -= burst.range.len();
        self.packets -= burst.packets;
        Some(burst)
    }

    fn release(&mut self, burst: &Burst) {
        let chunk = &mut self.chunks[burst.chunk];
        chunk.bursts -= 1;
        if chunk.bursts == 0 {
            chunk.end = 0;
        }
    }
}

/// What the flow of a burst is known by, and the packets that the burst counts as.
fn describe(burst: &[u8]) -> (impl std::hash::Hash, u64) {
    let bytes = burst.get(VNET_HEADER_LEN..).unwrap_or_default();
    let packet = Packet::parse(bytes);
    let count = VnetHeader::parse(burst).and_then(|vnet| segment::count(bytes, &vnet, || packet));
    let key = packet.map(|packet| {
        let ports = packet.fragment.is_none().then(|| (packet.protocol, packet.ports(bytes)));
        (packet.source, packet.destination, ports)
    });
    (key, count.map_or(1, |count| count as u64))
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use proptest::prelude::*;

    use super::*;
    use crate::wire::udp::udp_packet;

    const POD: [u8; 4] = [10, 1, 1, 11];

    /// A datagram of the flow with this source port; its payload begins with its number.
    fn burst(flow: u16, number: u32, size: usize) -> Vec<u8> {
        let mut payload = vec![0; size.max(4)];
        payload[..4].copy_from_slice(&number.to_le_bytes());
        let peer: IpAddr = [10, 1, 2, 12].into();
        let mut packet = Vec::new();
        assert!(udp_packet((IpAddr::from(POD), flow).into(), (peer, 80).into(), &payload, &mut packet));
        [&VnetHeader::PLAIN.encode()[..], &packet].concat()
    }

    fn push(queue: &mut CaptureQueue, burst: &[u8]) -> bool {
        let Some(room) = queue.room() else { return false };
        room[..burst.len()].copy_from_slice(burst);
        queue.push(burst.len()) == 1
    }

    /// Flow and number of the burst that was taken last.
    fn read(burst: &[u8]) -> (u16, u32) {
        let packet = &burst[VNET_HEADER_LEN..];
        let number = u32::from_le_bytes(packet[28..32].try_into().unwrap());
        (u16::from_be_bytes([packet[20], packet[21]]), number)
    }

    fn take_all(queue: &mut CaptureQueue) -> Vec<(u16, u32)> {
        std::iter::from_fn(|| queue.take().map(|_| read(queue.taken()))).collect()
    }

    #[test]
    fn a_packet_of_a_quiet_flow_does_not_wait_behind_those_of_a_busy_one() {
        let mut queue = CaptureQueue::new(1);
        for n in 0..12 {
            assert!(push(&mut queue, &burst(1, n, 60_000)));
        }
        assert!(queue.take().is_some(), "the busy flow has had its first turn");
        assert!(push(&mut queue, &burst(2, 7, 64)));
        let order = take_all(&mut queue);
        let at = order.iter().position(|taken| *taken == (2, 7)).unwrap();
        assert!(at <= 1, "after {at} super-packets of the other flow");
        assert_eq!(order.len(), 12);
    }

    #[test]
    fn only_a_short_burst_that_went_ahead_of_others_overtakes() {
        let mut queue = CaptureQueue::new(1);
        assert!(push(&mut queue, &burst(2, 0, 64)));
        assert!(queue.take().is_some() && !queue.has_overtaken(), "nothing else waits");
        for n in 0..4 {
            assert!(push(&mut queue, &burst(1, n, 60_000)));
        }
        assert!(queue.take().is_some() && !queue.has_overtaken(), "it is long");
        assert!(push(&mut queue, &burst(3, 0, 64)));
        let overtakes =
            std::iter::from_fn(|| queue.take().map(|_| (read(queue.taken()).0, queue.has_overtaken())));
        let overtakes: Vec<_> = overtakes.collect();
        assert_eq!(overtakes.iter().filter(|(_, overtook)| *overtook).collect::<Vec<_>>(), [&(3, true)]);
    }

    #[test]
    fn busy_flows_take_turns_whatever_they_have_waiting() {
        let mut queue = CaptureQueue::new(2);
        for n in 0..9 {
            assert!(push(&mut queue, &burst(1, n, 60_000)));
        }
        for n in 0..3 {
            assert!(push(&mut queue, &burst(2, n, 60_000)));
        }
        let order: Vec<_> = take_all(&mut queue).into_iter().map(|(flow, _)| flow).collect();
        let last = order.iter().rposition(|flow| *flow == 2).unwrap();
        assert!(last <= 6, "{order:?}");
    }

    #[test]
    fn of_too_much_the_oldest_of_the_longest_flow_is_dropped() {
        let mut queue = CaptureQueue::new(3);
        assert!(push(&mut queue, &burst(2, 0, 64)));
        let mut dropped = 0;
        for n in 0..80 {
            assert!(push(&mut queue, &burst(1, n, 60_000)));
            while let Some(packets) = queue.shed() {
                dropped += packets;
            }
            assert!(queue.bytes <= LIMIT);
        }
        let order = take_all(&mut queue);
        assert!(order.contains(&(2, 0)));
        let busy: Vec<_> = order.into_iter().filter(|(flow, _)| *flow == 1).map(|(_, n)| n).collect();
        let first = u32::try_from(dropped).unwrap();
        assert!(dropped > 0);
        assert_eq!(busy, (first..80).collect::<Vec<_>>(), "the newest are left");
    }

    #[test]
    fn memory_is_bounded_and_comes_back() {
        let mut queue = CaptureQueue::new(4);
        for round in 0..3 {
            let mut pushed = 0;
            while push(&mut queue, &burst(1, pushed, 60_000)) {
                pushed += 1;
            }
            assert_eq!(queue.chunks.len(), CHUNKS);
            assert!(pushed as usize * 60_000 > LIMIT, "round {round}");
            assert_eq!(take_all(&mut queue).len(), pushed as usize);
            assert_eq!((queue.take(), queue.packets(), queue.is_empty()), (None, 0, true));
        }
    }

    proptest! {
        #[test]
        fn every_burst_is_taken_once_and_each_flow_in_order(
            steps in prop::collection::vec((0u16..6, prop_oneof![4usize..2_000, 50_000usize..60_000], 0usize..3), 1..300)
        ) {
            let mut queue = CaptureQueue::new(5);
            let (mut came, mut left) = (Vec::new(), Vec::new());
            for (n, (flow, size, takes)) in steps.into_iter().enumerate() {
                let n = u32::try_from(n).unwrap();
                if push(&mut queue, &burst(flow, n, size)) {
                    came.push((flow, n));
                }
                for _ in 0..takes {
                    left.extend(queue.take().map(|_| read(queue.taken())));
                }
            }
            left.extend(take_all(&mut queue));
            for flow in 0..6 {
                let of = |all: &[(u16, u32)]| all.iter().copied().filter(|(f, _)| *f == flow).collect::<Vec<_>>();
                prop_assert_eq!(of(&came), of(&left));
            }
        }
    }
}
