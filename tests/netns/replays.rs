//! A pod of another project that captured what passed its bridge, and sends it again.
//!
//! 1. numbers go from one pod to the other; whatever of it the victim's link carried is kept, on the node's side of it
//! 2. all of it is sent again, unchanged, under the attacker's address and under that of another peer
//! 3. control: without agents every copy is one more message for the application
//! 4. with agents every number arrives once, and the copies are counted
//!
//! May touch: sockets in the pods and on the node's side of their links.

use std::collections::BTreeMap;
use std::net::{IpAddr, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use crate::Case;
use crate::attackers::{
    ATTACKER, Attack, FAR_PEER, PEER, QUIET, VICTIM, assert_none_out, assert_unharmed, grown, receiver_index,
    sender_index,
};
use crate::lab::{Agents, Lab, TUNNEL_PORT};
use crate::load;
use crate::packets::{self, CANARY};
use crate::pod::{self, Sniffer};
use crate::status;

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case::new("control_replayed_plaintext_is_delivered_again_without_agents", replayed_in_clear)
        .agents(Agents::Off)
        .looks_itself(),
    Case::new("promise_4_replayed_captures_are_delivered_once", replayed).looks_itself(),
    Case::new("promise_4_replayed_handshakes_are_answered_once", replayed_handshakes)
        .agents(Agents::On("--rekey-after 2"))
        .looks_itself(),
];

/// Numbered messages of one stream.
const NUMBERS: u64 = 200;
const NUMBERS_PORT: u16 = 9_620;

/// How often each number arrived.
fn heard(receiver: &UdpSocket, counts: &mut BTreeMap<u64, u64>) {
    let mut buffer = [0; 128];
    while let Ok(n) = receiver.recv(&mut buffer) {
        let number = buffer[..n].first_chunk().expect("a number");
        *counts.entry(u64::from_be_bytes(*number)).or_default() += 1;
    }
}

/// Ports and payload of a datagram.
type Captured = ((u16, u16), Vec<u8>);

/// The numbers are sent: how often each arrived, what passed the bridge, and how many datagrams of that are of the stream.
fn stream(
    sender: &UdpSocket,
    receiver: &UdpSocket,
    tap: &Sniffer,
    (from, to): (IpAddr, IpAddr),
) -> (BTreeMap<u64, u64>, Vec<Captured>, u64) {
    let mut counts = BTreeMap::new();
    for number in 0..NUMBERS {
        sender.send(&[&number.to_be_bytes()[..], CANARY].concat()).expect("send");
        thread::sleep(Duration::from_millis(1));
    }
    heard(receiver, &mut counts);
    assert_eq!(counts.len(), usize::try_from(NUMBERS).expect("a few"), "the stream itself: {counts:?}");
    let captured: Vec<_> = tap
        .drain()
        .into_iter()
        .filter_map(|frame| {
            let seen = packets::seen(&frame).filter(|seen| (seen.from, seen.to) == (from, to))?;
            Some((seen.ports?, packets::udp_payload(&frame)?.to_vec()))
        })
        .collect();
    // Most are of the stream; what the sender's kernel merged is longer.
    let mut lengths = BTreeMap::<_, u64>::new();
    captured.iter().for_each(|(_, payload)| *lengths.entry(payload.len()).or_default() += 1);
    (counts, captured, lengths.into_values().max().unwrap_or(0))
}

/// The peer sends numbers, the attacker whatever passed the bridge meanwhile, again, as `sources`; how often each number
/// arrived, and how many datagrams of the stream were replayed.
fn replay(lab: &Lab, attack: &Attack, from: IpAddr, sources: &[IpAddr]) -> (BTreeMap<u64, u64>, u64) {
    let to = attack.victim.address(from);
    let receiver = attack.victim.udp((to, NUMBERS_PORT));
    receiver.set_read_timeout(Some(QUIET)).expect("time-out");
    pod::enlarge(&receiver);
    let sender = lab.pod(PEER).udp_for(to);
    sender.connect((to, NUMBERS_PORT)).expect("connect");
    let tap = Sniffer::on(&lab.netns("node1"), &format!("p-{VICTIM}"));
    let (mut counts, captured, stream) = (0..3)
        .map(|_| stream(&sender, &receiver, &tap, (from, to)))
        // After a pause of the machine most of it may be merged: then once more.
        .find(|(_, _, stream)| *stream > NUMBERS / 2)
        .expect("most datagrams of the stream as they were sent");
    for source in sources {
        for (ports, payload) in captured.iter().filter(|(_, payload)| payload.len() < 1_400) {
            attack.send(&packets::udp(*source, to, ports.0, ports.1, payload));
        }
    }
    heard(&receiver, &mut counts);
    (counts, stream)
}

/// As whom it is replayed: unchanged, as the attacker, as another peer.
fn replaying(lab: &Lab, from: IpAddr) -> [IpAddr; 3] {
    [from, lab.pod(ATTACKER).address(from), lab.pod(FAR_PEER).address(from)]
}

fn replayed_in_clear(lab: &Lab) {
    let attack = Attack::on(lab, VICTIM);
    for from in lab.pod(PEER).addresses() {
        let (counts, stream) = replay(lab, &attack, from, &replaying(lab, from));
        assert_eq!(counts.values().sum::<u64>(), NUMBERS + 3 * stream, "as {from}: {counts:?}");
    }
}

fn replayed(lab: &Lab) {
    let attack = Attack::on(lab, VICTIM);
    let canary = load::under_load(lab, load::Size::SMALL, |_| {
        for from in lab.pod(PEER).addresses() {
            let before = status::drops(lab, VICTIM);
            let (counts, stream) = replay(lab, &attack, from, &replaying(lab, from));
            assert!(counts.values().all(|n| *n == 1), "a message arrived twice: {counts:?}");
            let after = status::drops(lab, VICTIM);
            let counted = grown(&before, &after, "replay");
            assert!(counted >= 3 * stream, "{counted} of {} replays were counted: {after:?}", 3 * stream);
        }
    });
    assert_unharmed(&canary);
    assert_none_out(lab);
}

/// With a rekey every two seconds, the attacker sends every handshake message again, as everybody and to everybody.
fn replayed_handshakes(lab: &Lab) {
    let attack = Attack::on(lab, VICTIM);
    let tap = attack.victim.sniff();
    let canary = load::under_load(lab, load::Size::SMALL, |_| {
        let (mut asked, mut answered) = (BTreeMap::<[u8; 4], u64>::new(), BTreeMap::<[u8; 4], u64>::new());
        let mut replays = 0;
        let before = status::drops(lab, VICTIM);
        let end = Instant::now() + Duration::from_secs(7);
        while Instant::now() < end {
            for frame in tap.drain().into_iter().filter(|frame| !attack.made(frame)) {
                let (Some(kind @ (1 | 2)), Some(seen)) = (packets::sealed(&frame), packets::seen(&frame))
                else {
                    continue;
                };
                let message = packets::udp_payload(&frame).expect("a datagram").to_vec();
                let to = attack.victim.address(seen.from);
                match (kind, seen.from == to) {
                    (1, false) => *asked.entry(sender_index(&message)).or_default() += 1,
                    (2, true) => {
                        *answered.entry(receiver_index(&frame).expect("an index")).or_default() += 1;
                    }
                    _ => {}
                }
                // To the victim whatever it is: also its own messages come back.
                let other = if seen.from == to { seen.to } else { seen.from };
                for source in [other, attack.attacker.address(to), lab.pod(FAR_PEER).address(to)] {
                    attack.send(&packets::udp(source, to, TUNNEL_PORT, TUNNEL_PORT, &message));
                    replays += 1;
                }
            }
            thread::sleep(Duration::from_millis(5));
        }
        assert!(!asked.is_empty() && !answered.is_empty(), "no handshakes: {asked:?} {answered:?}");
        for (index, times) in &answered {
            assert!(*times == 1, "an initiation was answered {times} times");
            assert!(asked.contains_key(index), "answered, and nobody asked");
        }
        thread::sleep(QUIET);
        let after = status::drops(lab, VICTIM);
        let reasons = ["handshake_replay", "outer_source", "index_unknown", "bad_mac1", "handshake_flood"];
        let counted: u64 = reasons.iter().map(|reason| grown(&before, &after, reason)).sum();
        assert!(grown(&before, &after, "handshake_replay") > 0, "{after:?}");
        assert!(counted >= replays, "{counted} of {replays} replays were counted: {after:?}");
    });
    assert_unharmed(&canary);
    assert_none_out(lab);
}
