//! Operations on two transports and the wire between them, decoded from bytes.
//!
//! 1. an operation is two bytes: what, and to which side, datagram, byte or time
//! 2. a datagram on the wire is delivered, dropped, copied or changed on its way; time goes on; either side sends, asks,
//!    restarts, hands over to a successor, or loses and regains its peer
//! 3. always: a changed datagram is refused and moves nothing that can be seen; a packet is opened at most once and was sent;
//!    no (receiver index, counter) comes twice
//! 4. at the end the network heals: within 20 s a packet of each side arrives, whatever came before

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use tencrypt::proto::Now;
use tencrypt::proto::noise::{Event, Options, Received, Suite};

use super::transport::{Side, address, config, remac, start};

/// Datagrams on the wire, at most; the oldest is lost then.
const WIRE: usize = 32;
/// Operations of one input.
const OPERATIONS: usize = 96;

struct World {
    sides: [Side; 2],
    options: Options,
    now: Now,
    /// To which side, and what.
    wire: VecDeque<(usize, Vec<u8>)>,
    /// Numbers of the packets that each side sent or staged.
    sent: [BTreeSet<u128>; 2],
    /// Those that wait for a session.
    staged: [VecDeque<u128>; 2],
    opened: [BTreeSet<u128>; 2],
    nonces: [BTreeSet<[u8; 12]>; 2],
    number: u128,
    seed: u64,
}

/// Runs the operations, then heals the network.
pub fn handshake(bytes: &[u8]) {
    let Some((first, operations)) = bytes.split_first() else { return };
    let suite = if first & 1 == 0 { Suite::ChaCha20Poly1305 } else { Suite::Aes256Gcm };
    let options = Options {
        rekey_after_messages: 40,
        reject_after_messages: 60,
        // Retries cost key agreements, which are what an input's time goes into.
        attempt_time: Duration::from_secs(6),
        ..Options::of(suite)
    };
    let now = start();
    let mut world = World {
        sides: [0, 1].map(|side| Side::new(side, side as u64, &options, now)),
        options,
        now,
        wire: VecDeque::new(),
        sent: Default::default(),
        staged: Default::default(),
        opened: Default::default(),
        nonces: Default::default(),
        number: 0,
        seed: 2,
    };
    for operation in operations.chunks_exact(2).take(OPERATIONS) {
        world.operate(operation[0], operation[1]);
    }
    world.heal();
}

impl World {
    fn operate(&mut self, what: u8, which: u8) {
        let side = usize::from(which & 1);
        let nth = usize::from(which >> 1) % self.wire.len().max(1);
        match what % 16 {
            0..=3 => {
                if let Some((to, mut bytes)) = self.wire.remove(nth) {
                    self.deliver(to, &mut bytes);
                }
            }
            4 => drop(self.wire.remove(nth)),
            5 => {
                if let Some((to, mut bytes)) = self.wire.get(nth).cloned() {
                    self.deliver(to, &mut bytes);
                }
            }
            6 => self.change(nth, usize::from(what >> 4) * 19 + usize::from(which), false),
            7 => self.change(nth, usize::from(what >> 4) * 19 + usize::from(which), true),
            8 | 9 => self.send(side),
            10 => {
                let times = [1, 19, 250, 1_000, 5_000, 11_000, 61_000, 121_000];
                self.pass(Duration::from_millis(times[usize::from(which >> 5)]));
            }
            11 => {
                let Side { transport, peer } = &mut self.sides[side];
                match which >> 1 & 3 {
                    0 | 1 => transport.begin(*peer, self.now),
                    2 => transport.probe(*peer, self.now),
                    _ => transport.forget_probe(*peer),
                }
            }
            12 => self.restart(side),
            13 => self.hand_over(side),
            14 => {
                let Side { transport, peer } = &mut self.sides[side];
                transport.remove_peer(*peer);
                *peer = transport.add_peer(config(1 - side), self.now);
            }
            _ => {
                let length = [0, 1, 31, 32, 64, 92, 148, 200][usize::from(which >> 5)];
                let mut garbage = vec![what; length];
                garbage
                    .iter_mut()
                    .take(4)
                    .zip([1 + (which >> 1) % 5, 0, 0, 0])
                    .for_each(|(to, byte)| *to = byte);
                self.refuse(side, garbage);
            }
        }
        self.flush();
    }

    /// A genuine datagram; whether it is still welcome is the transport's business.
    fn deliver(&mut self, to: usize, bytes: &mut [u8]) {
        let received = self.sides[to].transport.handle(address(1 - to), bytes, self.now);
        if let Ok(Received::Packet { peer, payload }) = received {
            assert_eq!(peer, self.sides[to].peer);
            let number = u128::from_be_bytes(bytes[payload].try_into().expect("16 bytes were sealed"));
            assert!(self.sent[1 - to].contains(&number), "packet {number} was never sent");
            assert!(self.opened[to].insert(number), "packet {number} was opened twice");
        }
        self.flush();
    }

    /// A datagram with one bit changed; `mac`: by somebody who can make a MAC1.
    fn change(&mut self, nth: usize, at: usize, mac: bool) {
        let Some((to, mut bytes)) = self.wire.get(nth).cloned() else { return };
        // MAC2 of a handshake message is not looked at without load, MAC1 is made anew.
        let covered = if bytes[0] == 4 { bytes.len() } else { bytes.len() - 32 };
        bytes[at % covered] ^= 1 << (at % 8);
        if mac && bytes[0] != 4 {
            remac(&mut bytes, to);
        }
        // Anybody may write another sender index: it names nothing until the session is confirmed.
        let unauthenticated = mac && matches!(bytes[0], 1 | 2) && (4..8).contains(&(at % covered));
        if !unauthenticated {
            self.refuse(to, bytes);
        }
    }

    fn refuse(&mut self, to: usize, mut bytes: Vec<u8>) {
        let side = &mut self.sides[to];
        let before = side.visible();
        side.transport.handle(address(1 - to), &mut bytes, self.now).expect_err("nobody made it");
        assert_eq!(side.visible(), before);
        assert_eq!(side.transport.poll_event(), None);
    }

    fn send(&mut self, side: usize) {
        self.number += 1;
        self.sent[side].insert(self.number);
        self.staged[side].push_back(self.number);
        self.seal_staged(side);
        if !self.staged[side].is_empty() {
            let Side { transport, peer } = &mut self.sides[side];
            transport.begin(*peer, self.now);
        }
    }

    fn seal_staged(&mut self, side: usize) {
        while let Some(number) = self.staged[side].front() {
            let Some(record) = self.sides[side].seal(&number.to_be_bytes(), self.now) else { return };
            self.staged[side].pop_front();
            self.put(side, record);
        }
    }

    fn put(&mut self, side: usize, bytes: Vec<u8>) {
        if bytes[0] == 4 {
            let nonce = bytes[4..16].try_into().expect("a header");
            assert!(self.nonces[side].insert(nonce), "a counter was used twice");
        }
        if self.wire.len() == WIRE {
            self.wire.pop_front();
        }
        self.wire.push_back((1 - side, bytes));
    }

    fn flush(&mut self) {
        for side in [0, 1] {
            while let Some(event) = self.sides[side].transport.poll_event() {
                match event {
                    Event::Established(_) => self.seal_staged(side),
                    Event::Silent(_) => self.staged[side].clear(),
                    Event::Expired(_) => {}
                }
            }
            while let Some((to, bytes)) = self.sides[side].transport.poll_transmit() {
                assert_eq!(to, address(1 - side));
                self.put(side, bytes);
            }
        }
    }

    /// Time goes on; every timer that falls due runs at its moment, nothing is delivered.
    fn pass(&mut self, time: Duration) {
        let end = self.now.instant + time;
        loop {
            let timers = self.sides.iter().filter_map(|side| side.transport.poll_timeout());
            let Some(next) = timers.min().filter(|next| *next <= end) else { break };
            self.move_to(next.max(self.now.instant));
            for side in &mut self.sides {
                side.transport.handle_timeout(self.now);
            }
            self.flush();
        }
        self.move_to(end);
    }

    fn move_to(&mut self, instant: std::time::Instant) {
        self.now.wall += instant - self.now.instant;
        self.now.instant = instant;
    }

    /// A new agent that knows the greatest stamp alone, as after a crash.
    fn restart(&mut self, side: usize) {
        let stamp = self.sides[side].transport.last_stamp();
        self.seed += 1;
        self.sides[side] = Side::new(side, self.seed, &self.options, self.now);
        stamp.into_iter().for_each(|stamp| self.sides[side].transport.raise_stamp(stamp));
    }

    fn hand_over(&mut self, side: usize) {
        let peer = self.sides[side].peer;
        let state = self.sides[side].transport.export(peer, self.now).expect("the peer is there");
        self.restart(side);
        let Side { transport, peer } = &mut self.sides[side];
        transport.import(*peer, state, self.now.instant, self.now);
    }

    /// From here on everything arrives, in 10 ms. Old datagrams are lost.
    fn heal(&mut self) {
        self.wire.clear();
        self.staged = Default::default();
        let last = self.number;
        // A session that only one side still has is found out after 15 s.
        for _ in 0..20 {
            self.send(0);
            self.send(1);
            self.flush();
            for _ in 0..100 {
                self.pass(Duration::from_millis(10));
                for _ in 0..self.wire.len() {
                    let (to, mut bytes) = self.wire.pop_front().expect("counted");
                    self.deliver(to, &mut bytes);
                }
                if self.opened.iter().all(|opened| opened.last().is_some_and(|newest| *newest > last)) {
                    return;
                }
            }
        }
        panic!("after 20 s of a good network something does not arrive: {:?}", self.opened);
    }
}
