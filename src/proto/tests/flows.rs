//! A flow table that one peer tries to fill: the others' connections begin, live on, and outlive the agent.

use super::survival::Journal;
use super::*;
use crate::proto::inbound::Verdict;
use crate::proto::nat::MAX_FLOWS;
use crate::wire::packet::Packet;

type Segment = fn((&str, u16), (&str, u16)) -> Vec<u8>;

/// What the third pod sends to the server from each port, to the VIP and to the pod itself; `answer`: what the server's
/// stack says to the first of it.
fn flood(network: &mut Network, ports: std::ops::Range<u16>, packets: &[Segment], answer: Option<Segment>) {
    for port in ports {
        for (target, local) in [((VIP[0], 80), 8080), ((SERVER[0], 9090), 9090)] {
            let mut answer = answer;
            for packet in packets {
                let mut bytes = packet((THIRD[0], port), target);
                let parsed = Packet::parse(&bytes).unwrap();
                let engine = &mut network.nodes[1].engine;
                // As if the session had just opened it.
                let verdict = engine.admit(ip(THIRD[0]), &mut bytes, &parsed, network.now);
                assert_eq!(verdict, Ok(Verdict::Inject));
                if let Some(answer) = answer.take() {
                    let segment = answer((SERVER[0], local), (THIRD[0], port));
                    network.hand_over(1, VnetHeader::PLAIN, &segment);
                    while network.nodes[1].engine.poll_transmit().is_some() {}
                }
            }
        }
    }
}

/// A Service that the client serves.
const OTHER_VIP: &str = "10.96.0.81";

/// Connects the client's `port` to the Service.
fn connect(network: &mut Network, port: u16) {
    network.capture(0, &syn((CLIENT[0], port), (VIP[0], 80)));
    assert_eq!(network.inbox(1).len(), 1, "SYN of port {port}");
    network.capture(1, &syn_ack((SERVER[0], 8080), (CLIENT[0], port)));
    assert_eq!(read(&network.inbox(0)[0]).0, at(VIP[0], 80));
    network.capture(0, &data((CLIENT[0], port), (VIP[0], 80), b"question"));
    assert_eq!(network.inbox(1).len(), 1);
    is_answered(network, port);
}

/// The server speaks first: without its entry the answer would not bear the VIP.
fn is_answered(network: &mut Network, port: u16) {
    network.capture(1, &data((SERVER[0], 8080), (CLIENT[0], port), b"answer"));
    let got = network.inbox(0);
    assert_eq!(read(&got[0]), (at(VIP[0], 80), at(CLIENT[0], port), b"answer".to_vec()), "port {port}");
}

#[test]
fn promise_10_one_peer_that_fills_the_flow_table_shuts_nobody_out_and_ends_no_connection() {
    // 131,070 tuples of SYN+ACK; and as many of a handshake to which our pod's kernel gave a SYN cookie.
    let blind = |from: (&str, u16), to: (&str, u16)| data(from, to, b"");
    let floods: [(&[Segment], Option<Segment>); 2] = [(&[syn_ack], None), (&[syn, blind], Some(syn_ack))];
    for (packets, answer) in floods {
        let mut network = Network::project();
        let mut ports = 2000..;
        let mut connected = Vec::new();
        let mut next = |network: &mut Network| {
            let port = ports.next().unwrap();
            connect(network, port);
            connected.push(port);
        };
        network.capture(2, &udp((THIRD[0], 1), (SERVER[0], 1), b"session"));
        network.inbox(1);
        next(&mut network);
        for start in (1..=u16::MAX).step_by(1000) {
            flood(&mut network, start..start.saturating_add(1000), packets, answer);
            next(&mut network);
        }
        next(&mut network);
        let mut journal = Journal::default();
        network.crash(1, &mut journal);
        network.tell(1, everything());
        network.advance(Duration::from_secs(1));
        next(&mut network);
        flood(&mut network, 1..u16::MAX, packets, answer);
        next(&mut network);
        network.upgrade(1, 1);
        next(&mut network);
        connected.iter().for_each(|port| is_answered(&mut network, *port));
        // The pod's own connections need room, too.
        network.tell(1, vec![vip(OTHER_VIP, &[CLIENT[0]])]);
        network.tell(0, vec![vip(OTHER_VIP, &[CLIENT[0]])]);
        for port in 2000..2100 {
            network.capture(1, &syn((SERVER[0], port), (OTHER_VIP, 80)));
            assert_eq!(network.inbox(0).len(), 1, "SYN of the pod's port {port}");
        }
        assert_eq!(network.dropped(1, DropReason::FlowTableFull), 0);
        // What our pod never said a word to is gone soon; the rest is held to its share.
        network.advance(Duration::from_secs(150));
        let left = network.nodes[1].engine.flow_count() - connected.len();
        assert!(if answer.is_none() { left == 0 } else { left <= MAX_FLOWS / 2 }, "{left}");
    }
}
