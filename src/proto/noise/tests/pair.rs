//! The simulated wire: two transports, a clock, and a link with an MTU, latency, loss, reordering and duplication.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha20Rng;

use super::super::constants::PADDING;
use super::super::index::ReceiverIndex;
use super::super::session::Session;
use super::super::*;
use crate::proto::test_start;

pub(super) const A: usize = 0;
pub(super) const B: usize = 1;
pub(super) const PORT: u16 = 51820;

pub(super) const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

pub(super) const fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// The start of the simulation.
pub(super) fn epoch() -> Now {
    Now { instant: test_start(), wall: secs(1_700_000_000) }
}

pub(super) fn secret(n: u8) -> StaticSecret {
    StaticSecret([n; 32])
}

pub(super) fn psk() -> PresharedKey {
    PresharedKey([0x5a; 32])
}

pub(super) fn address(side: usize) -> SocketAddr {
    SocketAddr::new(["10.0.0.1", "10.0.0.2"][side].parse().unwrap(), PORT)
}

pub(super) fn config(side: usize) -> PeerConfig {
    let keys = PeerKeys { public: side_secret(side).public(), psk: psk() };
    PeerConfig { address: address(side).ip(), port: PORT, keys, accept: None }
}

pub(super) fn side_secret(side: usize) -> StaticSecret {
    secret(11 * (u8::try_from(side).unwrap() + 1))
}

pub(super) fn transport(side: usize, options: &Options) -> Transport {
    let identity = Identity { address: address(side).ip(), secret: side_secret(side) };
    Transport::new(vec![identity], options.clone(), ChaCha20Rng::seed_from_u64(side as u64))
}

/// The side whose initiation wins when two cross.
pub(super) fn winner() -> usize {
    if address(A).ip() > address(B).ip() { A } else { B }
}

#[derive(Clone, Copy)]
pub(super) struct Link {
    /// Bytes of the longest packet that passes, outer headers included; nobody is told of longer ones.
    pub(super) mtu: usize,
    pub(super) latency: Duration,
    /// Extra latency, at random, up to this.
    pub(super) reorder: Duration,
    pub(super) loss_percent: u32,
    pub(super) duplicate_percent: u32,
}

impl Link {
    pub(super) const GOOD: Self =
        Self { mtu: 65_535, latency: ms(10), reorder: ms(0), loss_percent: 0, duplicate_percent: 0 };
}

/// Outer IPv4 and UDP header.
const OUTER: usize = 28;

pub(super) struct Side {
    pub(super) transport: Transport,
    pub(super) peer: PeerId,
    pub(super) staged: VecDeque<Vec<u8>>,
    pub(super) received: Vec<Vec<u8>>,
    pub(super) keepalives: usize,
    pub(super) events: Vec<Event>,
    pub(super) drops: Vec<DropReason>,
    /// When this side sent a message of each type, by first byte.
    pub(super) sent: Vec<(u8, Duration)>,
}

impl Side {
    pub(super) fn count(&self, event: Event) -> usize {
        self.events.iter().filter(|seen| **seen == event).count()
    }

    pub(super) fn sent_at(&self, kind: u8) -> Vec<Duration> {
        self.sent.iter().filter(|(k, _)| *k == kind).map(|(_, at)| *at).collect()
    }
}

pub(super) struct Datagram {
    pub(super) to: usize,
    pub(super) from: SocketAddr,
    pub(super) bytes: Vec<u8>,
}

pub(super) struct Pair {
    pub(super) sides: [Side; 2],
    pub(super) now: Now,
    pub(super) start: Now,
    /// How far each side's wall clock is behind.
    pub(super) behind: [Duration; 2],
    pub(super) link: Link,
    /// Datagrams to each side are lost while set.
    pub(super) cut: [bool; 2],
    /// Everything that was delivered or lost.
    pub(super) log: Vec<Datagram>,
    /// Key and counter of every data message sealed by either side.
    nonces: BTreeSet<([u8; 32], [u8; 8])>,
    /// What each side sent to anybody but the other.
    pub(super) strays: [Vec<(SocketAddr, Vec<u8>)>; 2],
    wire: BTreeMap<(Instant, u64), Datagram>,
    serial: u64,
    rng: ChaCha20Rng,
}

impl Pair {
    pub(super) fn new(options: &Options) -> Self {
        let now = epoch();
        let side = |side: usize| {
            let mut transport = transport(side, options);
            let peer = transport.add_peer(config(1 - side), now);
            Side {
                transport,
                peer,
                staged: VecDeque::new(),
                received: Vec::new(),
                keepalives: 0,
                events: Vec::new(),
                drops: Vec::new(),
                sent: Vec::new(),
            }
        };
        Self {
            sides: [side(A), side(B)],
            now,
            start: now,
            behind: [Duration::ZERO; 2],
            link: Link::GOOD,
            cut: [false; 2],
            log: Vec::new(),
            nonces: BTreeSet::new(),
            strays: [Vec::new(), Vec::new()],
            wire: BTreeMap::new(),
            serial: 0,
            rng: ChaCha20Rng::seed_from_u64(7),
        }
    }

    /// Two sides with a session that A initiated and B may send on, too.
    pub(super) fn established(options: &Options) -> Self {
        let mut pair = Self::new(options);
        pair.begin(A);
        pair.run(ms(100));
        assert!(pair.can_send(A) && pair.can_send(B));
        pair
    }

    pub(super) fn elapsed(&self) -> Duration {
        self.now.instant - self.start.instant
    }

    pub(super) fn can_send(&mut self, side: usize) -> bool {
        let Side { transport, peer, .. } = &mut self.sides[side];
        let peer = transport.peers.get_mut(*peer).unwrap();
        peer.is_sendable(&transport.shared, self.now)
    }

    /// What a side's clocks say.
    fn clock(&self, side: usize) -> Now {
        Now { wall: self.now.wall - self.behind[side], ..self.now }
    }

    pub(super) fn begin(&mut self, side: usize) {
        let (peer, now) = (self.sides[side].peer, self.clock(side));
        self.sides[side].transport.begin(peer, now);
        self.flush(side);
    }

    /// Sends a packet the way the engine does: seals it, or stages it and wants a session.
    pub(super) fn send(&mut self, side: usize, packet: &[u8]) {
        match self.seal(side, packet) {
            Some(record) => self.put(side, record),
            None => {
                self.sides[side].staged.push_back(packet.to_vec());
                self.begin(side);
            }
        }
        self.flush(side);
    }

    pub(super) fn seal(&mut self, side: usize, packet: &[u8]) -> Option<Vec<u8>> {
        let now = self.now;
        let Side { transport, peer, .. } = &mut self.sides[side];
        let mut sealer = transport.seal(*peer, now)?;
        let text = [&u16::try_from(packet.len()).unwrap().to_be_bytes()[..], packet].concat();
        let mut record = vec![0; record_len(text.len())];
        sealer.seal(&text, &mut record).ok()?;
        self.note_nonce(side, &record);
        Some(record)
    }

    /// A side made this data message.
    fn note_nonce(&mut self, side: usize, record: &[u8]) {
        let Side { transport, peer, .. } = &self.sides[side];
        let sessions = transport.peers.get(*peer).into_iter().flat_map(|peer| peer.keypairs.iter());
        let index = ReceiverIndex::from_wire(record[4..8].try_into().unwrap());
        let mut keys = sessions.map(Session::sealing_key);
        let (_, key) = keys.find(|(remote, _)| *remote == index).expect("the session that sealed it");
        let nonce = (key, record[8..16].try_into().unwrap());
        assert!(self.nonces.insert(nonce), "a key sealed two messages with one counter");
    }

    /// Hands a datagram to a side at once, as if from the other side.
    pub(super) fn deliver(&mut self, to: usize, bytes: &[u8]) -> Result<Received, DropReason> {
        self.deliver_from(to, address(1 - to), bytes)
    }

    pub(super) fn deliver_from(
        &mut self,
        to: usize,
        from: SocketAddr,
        bytes: &[u8],
    ) -> Result<Received, DropReason> {
        let mut bytes = bytes.to_vec();
        let now = self.clock(to);
        let result = self.sides[to].transport.handle(from, &mut bytes, now);
        let side = &mut self.sides[to];
        match &result {
            Ok(Received::Handshake) => {}
            Ok(Received::Keepalive(peer)) => {
                assert_eq!(*peer, side.peer);
                side.keepalives += 1;
            }
            Ok(Received::Packet { peer, payload }) => {
                assert_eq!(*peer, side.peer);
                let payload = &bytes[payload.clone()];
                assert_eq!(payload.len() % PADDING, 0);
                let (length, packet) = payload.split_first_chunk().unwrap();
                side.received.push(packet[..usize::from(u16::from_be_bytes(*length))].to_vec());
            }
            Err(reason) => side.drops.push(*reason),
        }
        self.flush(to);
        result
    }

    /// Advances the clock, delivering and firing timers in order.
    pub(super) fn run(&mut self, time: Duration) {
        let end = self.now.instant + time;
        loop {
            let wire = self.wire.keys().next().map(|(at, _)| *at);
            let timers = self.sides.iter().filter_map(|side| side.transport.poll_timeout());
            let Some(next) = timers.chain(wire).min().filter(|next| *next <= end) else { break };
            self.advance_to(next.max(self.now.instant));
            while let Some(entry) = self.wire.first_entry().filter(|entry| entry.key().0 <= self.now.instant)
            {
                let datagram = entry.remove();
                if !self.cut[datagram.to] {
                    let _ = self.deliver_from(datagram.to, datagram.from, &datagram.bytes);
                }
                self.log.push(datagram);
            }
            for side in [A, B] {
                let now = self.clock(side);
                self.sides[side].transport.handle_timeout(now);
                self.flush(side);
            }
        }
        self.advance_to(end);
    }

    /// The oldest undelivered datagram, taken off the wire.
    pub(super) fn intercept(&mut self) -> Datagram {
        self.wire.pop_first().expect("something is on the wire").1
    }

    pub(super) fn is_wire_empty(&self) -> bool {
        self.wire.is_empty()
    }

    /// Loses one of the datagrams that are under way.
    pub(super) fn lose(&mut self, n: usize) {
        if let Some(at) = self.under_way(n) {
            self.wire.remove(&at);
        }
    }

    /// One of the datagrams that are under way arrives a second time, so much later.
    pub(super) fn repeat(&mut self, n: usize, later: Duration) {
        let Some(at) = self.under_way(n) else { return };
        let Datagram { to, from, bytes } = &self.wire[&at];
        let copy = Datagram { to: *to, from: *from, bytes: bytes.clone() };
        self.serial += 1;
        self.wire.insert((at.0 + later, self.serial), copy);
    }

    /// One of the datagrams that are under way is overtaken by others.
    pub(super) fn delay(&mut self, n: usize, later: Duration) {
        let Some(at) = self.under_way(n) else { return };
        let datagram = self.wire.remove(&at).unwrap();
        self.wire.insert((at.0 + later, at.1), datagram);
    }

    fn under_way(&self, n: usize) -> Option<(Instant, u64)> {
        self.wire.keys().nth(n % self.wire.len().max(1)).copied()
    }

    /// Loses everything that is under way.
    pub(super) fn clear_wire(&mut self) {
        self.wire.clear();
    }

    /// Moves the clock without running anything.
    pub(super) fn advance_to(&mut self, instant: Instant) {
        self.now.wall += instant - self.now.instant;
        self.now.instant = instant;
    }

    fn flush(&mut self, side: usize) {
        while let Some(event) = self.sides[side].transport.poll_event() {
            self.sides[side].events.push(event);
            match event {
                Event::Established(_) => {
                    for packet in std::mem::take(&mut self.sides[side].staged) {
                        let record = self.seal(side, &packet).expect("a session was established");
                        self.put(side, record);
                    }
                }
                Event::Silent(_) => self.sides[side].staged.clear(),
                Event::Expired(_) => {}
            }
        }
        while let Some((to, bytes)) = self.sides[side].transport.poll_transmit() {
            if bytes[0] == 4 {
                self.note_nonce(side, &bytes);
            }
            if to == address(1 - side) {
                self.put(side, bytes);
            } else {
                self.strays[side].push((to, bytes));
            }
        }
    }

    pub(super) fn put(&mut self, side: usize, bytes: Vec<u8>) {
        let elapsed = self.elapsed();
        self.sides[side].sent.push((bytes[0], elapsed));
        if bytes.len() + OUTER > self.link.mtu || self.chance(self.link.loss_percent) {
            return;
        }
        for _ in 0..=u32::from(self.chance(self.link.duplicate_percent)) {
            let extra = self.link.reorder * (self.rng.next_u32() >> 16) / (1 << 16);
            let at = self.now.instant + self.link.latency + extra;
            self.serial += 1;
            let datagram = Datagram { to: 1 - side, from: address(side), bytes: bytes.clone() };
            self.wire.insert((at, self.serial), datagram);
        }
    }

    fn chance(&mut self, percent: u32) -> bool {
        percent > 0 && self.rng.next_u32() % 100 < percent
    }
}
