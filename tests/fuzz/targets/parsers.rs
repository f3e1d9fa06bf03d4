//! Targets without a transport: the launcher-agent channel, DNS, packets.

use hickory_proto::rr::Name;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socketpair};
use tencrypt::control::{Channel, FromAgent, MESSAGE_MAX, Message, Received, ToAgent};
use tencrypt::wire::packet::Packet;
use tencrypt::wire::{dns, icmp};

/// One packet of the channel, to either end: decoded to the last byte, or refused. What was decoded can be sent, and arrives
/// as the same message.
pub fn control_channel(bytes: &[u8]) {
    let Some((direction, packet)) = bytes.split_first() else { return };
    if packet.len() > MESSAGE_MAX + 1 {
        return;
    }
    if direction & 1 == 0 {
        receive::<FromAgent, ToAgent>(packet);
    } else {
        receive::<ToAgent, FromAgent>(packet);
    }
}

fn pair() -> [std::os::fd::OwnedFd; 2] {
    let ends = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
    ends.expect("two descriptors").into()
}

fn receive<Out: Message, In: Message + std::fmt::Debug>(packet: &[u8]) {
    let [ours, theirs] = pair();
    let sent = send(&theirs, packet, SendFlags::DONTWAIT).expect("room for one packet");
    assert_eq!(sent, packet.len());
    let channel: Channel<Out, In> = Channel::new(ours).expect("the right kind of socket");
    let message = match channel.try_recv() {
        Ok(Some(Received::Message(message, descriptors))) => {
            assert!(descriptors.is_empty());
            message
        }
        Ok(Some(Received::Closed)) => return assert!(packet.is_empty()),
        Ok(None) => panic!("a packet was sent"),
        Err(_) => return,
    };
    let [near, far] = pair();
    let (near, far): (Channel<In, Out>, Channel<Out, In>) =
        (Channel::new(near).expect("a socket"), Channel::new(far).expect("a socket"));
    assert!(near.try_send(&message, &[]).expect("what was received keeps to the limits"));
    let Ok(Some(Received::Message(again, _))) = far.try_recv() else { panic!("{message:?} did not arrive") };
    assert_eq!(format!("{again:?}"), format!("{message:?}"));
}

/// The first two bytes are the length of the query.
pub fn dns_answer(bytes: &[u8]) {
    let Some((length, rest)) = bytes.split_first_chunk() else { return };
    let (query, answer) = rest.split_at(rest.len().min(u16::from_le_bytes(*length).into()));
    let zone = Name::from_ascii("shop.svc.cluster.local.").expect("a name");
    let _ = (dns::id(answer), dns::is_response(answer), dns::answers(answer, query));
    let _ = (dns::lesson(answer, Some(&zone)).is_ok(), dns::lesson(query, Some(&zone)).is_ok());
    let mut copy = answer.to_vec();
    dns::set_id(&mut copy, 0x1234);
    assert_eq!(copy.len(), answer.len());
}

/// What a peer may seal.
pub fn inner_packet(bytes: &[u8]) {
    if let Some(packet) = Packet::parse(bytes) {
        assert!(packet.transport <= packet.len && packet.len <= bytes.len());
        let _ = (packet.ports(bytes), packet.tcp_flags(bytes), packet.tcp_header_len(bytes));
        let _ = (packet.icmp_type_code(bytes), packet.is_icmp_error(bytes), packet.is_later_fragment());
        if let Some(quoted) = packet.embedded(bytes) {
            let quoted = &bytes[quoted];
            let _ = Packet::parse_embedded(quoted).map(|inner| inner.ports(quoted));
        }
    }
    let mut out = Vec::new();
    if icmp::icmp_error(icmp::IcmpError::AdminProhibited, bytes, &mut out) {
        assert!(Packet::parse(&out).is_some_and(|error| error.is_icmp_error(&out)));
    }
}
