//! Tests of the channel: both directions over real socket pairs, and garbage.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;

use proptest::prelude::*;
use rustix::io::{FdFlags, fcntl_getfd};

use super::messages::{REASON_MAX, RESOLVERS_MAX};
use super::*;
use crate::proto::directory::{Change, Protocol, ServiceEndpoint, ServicePort, Vip, Workload};
use crate::proto::ladder::Mode;
use crate::proto::noise::{PeerKeys, PresharedKey, PublicKey, StaticSecret, Suite};

fn init() -> Init {
    Init {
        carried: vec![Carried::HelperTun, Carried::HelperListener],
        parked: false,
        place: Place {
            path: Some("/run/netns/pod".into()),
            identity: (4, 4_026_531_840),
            runtime: "/run/tencrypt/0000000000000007".into(),
        },
        addresses: vec![OwnAddress {
            address: [10, 1, 0, 5].into(),
            secret: StaticSecret([7; 32]),
            accept: None,
        }],
        port: 51820,
        link_mtu: 1450,
        ranges: ["10.1.0.0/16".parse().unwrap()].into_iter().collect(),
        zone: Some("shop.svc.cluster.local".into()),
        resolvers: vec![[10, 96, 0, 10].into()],
        dns_ports: (20_000, 20_255),
        hold_dns_ports: false,
        inject: Inject::Auto,
        mode: Mode::Strict,
        skeleton: 0,
        suite: Suite::default(),
        spin_us: 0,
        seed: Seed([9; 32]),
        rekey_after_s: None,
    }
}

fn ends() -> (LauncherChannel, AgentChannel) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("agent.sock");
    let listener = listen(&path).unwrap();
    let launcher = connect(&path).unwrap().expect("somebody listens");
    (launcher, accept(&listener).unwrap().expect("our own connection"))
}

fn message<M: std::fmt::Debug>(received: Received<M>) -> (M, Vec<OwnedFd>) {
    match received {
        Received::Message(message, fds) => (message, fds),
        Received::Closed => panic!("closed"),
    }
}

/// Sends bytes as they are, with descriptors as they are.
fn send_raw(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(KERNEL_DESCRIPTORS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    }
    rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).unwrap();
}

fn workload(n: u32) -> Change {
    Change::SetWorkload(Workload {
        address: std::net::Ipv4Addr::from(0x0a00_0000 + n).into(),
        keys: PeerKeys { public: PublicKey([1; 32]), psk: PresharedKey([2; 32]) },
        accept: None,
    })
}

#[test]
fn init_arrives_whole_with_its_descriptors_close_on_exec() {
    let (launcher, agent) = ends();
    let file = File::open("/dev/null").unwrap();
    launcher.send(&ToAgent::Init(Box::new(init())), &[file.as_fd(), file.as_fd()]).unwrap();
    let (message, fds) = message(agent.recv().unwrap());
    let ToAgent::Init(got) = message else { panic!("{message:?}") };
    assert_eq!(got.addresses[0].secret.0, [7; 32]);
    assert_eq!(got.seed.0, [9; 32]);
    assert_eq!((got.port, got.dns_ports), (51820, (20_000, 20_255)));
    assert_eq!(fds.len(), 2);
    for fd in &fds {
        assert!(fcntl_getfd(fd).unwrap().contains(FdFlags::CLOEXEC));
    }
}

#[test]
fn a_launcher_finds_an_agent_only_while_it_listens_and_sees_who_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("agent.sock");
    assert!(connect(&path).unwrap().is_none());
    let listener = listen(&path).unwrap();
    claim(&listener).unwrap();
    let launcher = connect(&path).unwrap().unwrap();
    assert_eq!(launcher.peer().unwrap().pid, rustix::process::getpid());
    assert!(accept(&listener).unwrap().is_some() && accept(&listener).unwrap().is_none());
    drop(listener);
    assert!(connect(&path).unwrap().is_none());
}

#[test]
fn the_fingerprint_changes_with_what_an_agent_is_told_and_with_nothing_else() {
    let first = init();
    let other =
        Init { seed: Seed([1; 32]), link_mtu: 1_400, parked: true, carried: Vec::new(), ..first.clone() };
    assert_eq!(first.fingerprint(), other.fingerprint());
    let key = OwnAddress { secret: StaticSecret([8; 32]), ..first.addresses[0].clone() };
    for other in [
        Init { port: 7, ..first.clone() },
        Init { addresses: vec![key], ..first.clone() },
        Init { resolvers: Vec::new(), ..first.clone() },
        Init { inject: Inject::Raw, ..first.clone() },
        Init { mode: Mode::Audit, ..first.clone() },
        Init { suite: Suite::Aes256Gcm, ..first.clone() },
        Init { spin_us: 30, ..first.clone() },
    ] {
        assert_ne!(first.fingerprint(), other.fingerprint());
    }
}

#[test]
fn an_empty_queue_a_message_and_the_end_are_told_apart() {
    let (launcher, agent) = ends();
    assert!(launcher.try_recv().unwrap().is_none());
    agent.send(&FromAgent::Stopped, &[]).unwrap();
    drop(agent);
    assert!(matches!(launcher.try_recv().unwrap(), Some(Received::Message(FromAgent::Stopped, _))));
    assert!(matches!(launcher.try_recv().unwrap(), Some(Received::Closed)));
    assert!(matches!(launcher.recv().unwrap(), Received::Closed));
    assert!(matches!(launcher.send(&ToAgent::Stop, &[]), Err(ChannelError::Closed)));
}

#[test]
fn last_words_are_received_even_if_the_other_end_left_messages_unread() {
    let (launcher, agent) = ends();
    launcher.send(&ToAgent::Stop, &[]).unwrap();
    agent.send(&FromAgent::failed(3, "port in use"), &[]).unwrap();
    drop(agent);
    assert!(matches!(message(launcher.recv().unwrap()).0, FromAgent::Failed { exit_code: 3, .. }));
    assert!(matches!(launcher.recv().unwrap(), Received::Closed));
    assert!(matches!(launcher.send(&ToAgent::Stop, &[]), Err(ChannelError::Closed)));
}

#[test]
fn a_full_queue_is_reported_and_nothing_is_lost() {
    let (launcher, agent) = ends();
    let mut sent = 0;
    while launcher.try_send(&ToAgent::Commit { generation: sent, whole: false }, &[]).unwrap() {
        sent += 1;
    }
    assert!(sent > 0);
    for expected in 0..sent {
        let (message, _) = message(agent.recv().unwrap());
        assert!(matches!(message, ToAgent::Commit { generation, .. } if generation == expected));
    }
    assert!(agent.try_recv().unwrap().is_none());
}

#[test]
fn descriptors_of_a_refused_message_are_refused_and_closed() {
    let (launcher, agent) = ends();
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let stopped = encode(&FromAgent::Stopped, 0).unwrap();
    send_raw(&agent, &stopped, &[theirs.as_fd()]);
    drop(theirs);
    assert!(matches!(launcher.recv(), Err(ChannelError::Descriptors(1))));
    // Only if every copy of the other end is closed does reading end.
    ours.set_read_timeout(Some(std::time::Duration::from_secs(10))).unwrap();
    let mut byte = [0];
    assert_eq!((&ours).read(&mut byte).unwrap(), 0);
    assert!(matches!(agent.send(&FromAgent::Stopped, &[ours.as_fd()]), Err(ChannelError::Descriptors(1))));
}

#[test]
fn as_many_descriptors_as_the_kernel_carries_are_counted_not_cut() {
    let (launcher, agent) = ends();
    let file = File::open("/dev/null").unwrap();
    let ready =
        encode(&FromAgent::Ready { generation: 1, fingerprint: [0; 32], executable: [0; 4] }, 0).unwrap();
    send_raw(&agent, &ready, &vec![file.as_fd(); KERNEL_DESCRIPTORS_MAX]);
    assert!(matches!(launcher.recv(), Err(ChannelError::Descriptors(KERNEL_DESCRIPTORS_MAX))));
}

#[test]
fn a_longer_packet_is_truncated_and_the_next_one_still_arrives() {
    let (launcher, agent) = ends();
    send_raw(&agent, &vec![0; MESSAGE_MAX + 1], &[]);
    send_raw(&agent, &vec![0; MESSAGE_MAX + 4_000], &[]);
    agent.send(&FromAgent::Stopped, &[]).unwrap();
    assert!(matches!(launcher.recv(), Err(ChannelError::Truncated)));
    assert!(matches!(launcher.recv(), Err(ChannelError::Truncated)));
    assert!(matches!(launcher.recv().unwrap(), Received::Message(FromAgent::Stopped, _)));
}

#[test]
fn bytes_after_a_message_are_refused() {
    let mut bytes = encode(&FromAgent::Stopped, 0).unwrap().to_vec();
    bytes.push(0);
    assert!(matches!(decode::<FromAgent>(&bytes), Err(ChannelError::Undecodable)));
}

#[test]
fn every_limit_of_init_holds_in_both_directions() {
    type Break = fn(&mut Init);
    let breaks: [(&str, Break); 8] = [
        ("no address", |i| i.addresses.clear()),
        ("port 0", |i| i.port = 0),
        ("small mtu", |i| i.link_mtu = 575),
        ("empty zone", |i| i.zone = Some(String::new())),
        ("zone with space", |i| i.zone = Some("a b".into())),
        ("many resolvers", |i| i.resolvers = vec![[1, 1, 1, 1].into(); RESOLVERS_MAX + 1]),
        ("range backwards", |i| i.dns_ports = (2, 1)),
        ("rekey 0", |i| i.rekey_after_s = Some(0)),
    ];
    for (name, break_it) in breaks {
        let mut broken = init();
        break_it(&mut broken);
        let message = ToAgent::Init(Box::new(broken));
        assert!(matches!(encode(&message, 0), Err(ChannelError::Invalid(_))), "{name}");
        let bytes = postcard::to_stdvec(&message).unwrap();
        assert!(matches!(decode::<ToAgent>(&bytes), Err(ChannelError::Invalid(_))), "{name}");
    }
    assert!(encode(&ToAgent::Init(Box::new(init())), 0).is_ok());
}

#[test]
fn an_agent_cannot_write_control_characters_to_the_operators_terminal() {
    let hostile = FromAgent::Failed { exit_code: 3, reason: "\u{1b}[2Jgone".into() };
    let bytes = postcard::to_stdvec(&hostile).unwrap();
    assert!(matches!(decode::<FromAgent>(&bytes), Err(ChannelError::Invalid("reason"))));
    let FromAgent::Failed { reason, .. } = FromAgent::failed(3, &format!("\u{1b}{}", "ä".repeat(REASON_MAX)))
    else {
        panic!()
    };
    assert!(reason.starts_with(" ä") && reason.len() <= REASON_MAX);
    assert!(encode(&FromAgent::failed(3, "tenc0: busy"), 0).is_ok());
}

#[test]
fn secrets_do_not_appear_in_debug_output() {
    let text = format!("{:?}", ToAgent::Init(Box::new(init())));
    assert!(text.contains("StaticSecret(..)") && text.contains("Seed(..)"), "{text}");
}

#[test]
fn a_large_directory_is_cut_into_small_messages_in_order() {
    let messages = chunks((0..5_000).map(workload).collect());
    assert!(messages.len() > 1);
    let mut next = 0;
    for message in &messages {
        let bytes = encode(message, 0).unwrap();
        assert!(bytes.len() <= 17 * 1024, "the agent reads one between packets");
        let ToAgent::Changes(list) = decode::<ToAgent>(&bytes).unwrap() else { panic!() };
        for change in list {
            assert_eq!(change, workload(next));
            next += 1;
        }
    }
    assert_eq!(next, 5_000);
    assert!(chunks(Vec::new()).is_empty());
}

#[test]
fn the_largest_service_fits_one_message_and_keeps_ready_endpoints() {
    let endpoint = |n: u16| ServiceEndpoint {
        address: std::net::Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, n).into(),
        port: 65_535,
        ready: n >= 3_000,
    };
    let port = |n: u16, endpoints: Vec<_>| ServicePort { protocol: Protocol::Tcp, port: n, endpoints };
    let vip =
        |ports| Change::SetVip(Vip { address: [10, 96, 0, 1].into(), ports, client_ip_affinity: false });

    let messages = chunks(vec![workload(0), vip(vec![port(80, (0..4_000).map(endpoint).collect())])]);
    let [_, ToAgent::Changes(list)] = &messages[..] else { panic!("{}", messages.len()) };
    let [Change::SetVip(got)] = &list[..] else { panic!() };
    assert!(encode(&messages[1], 0).is_ok());
    assert_eq!(got.ports[0].endpoints.len(), VIP_ENDPOINTS_MAX);
    assert_eq!(got.ports[0].endpoints.iter().filter(|e| e.ready).count(), 1_000);
    assert!(got.ports[0].endpoints.is_sorted());

    let many = (1..=2_000).map(|n| port(n, vec![endpoint(n), endpoint(n + 1)])).collect();
    for message in chunks(vec![vip(many)]) {
        assert!(encode(&message, 0).is_ok());
    }
}

#[test]
fn an_ordinary_stream_socket_is_no_channel() {
    let (stream, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    assert!(stream.as_raw_fd() > 2);
    assert!(matches!(AgentChannel::new(stream.into()), Err(ChannelError::WrongSocket)));
    assert!(matches!(
        AgentChannel::new(File::open("/dev/null").unwrap().into()),
        Err(ChannelError::WrongSocket)
    ));
}

proptest! {
    #[test]
    fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..2_000)) {
        let _ = decode::<FromAgent>(&bytes);
        let _ = decode::<ToAgent>(&bytes);
    }

    #[test]
    fn a_damaged_message_never_panics(
        at in any::<prop::sample::Index>(), value in any::<u8>(), cut in any::<prop::sample::Index>(),
    ) {
        for message in [ToAgent::Init(Box::new(init())), ToAgent::Changes(vec![workload(1), workload(2)])] {
            let mut bytes = encode(&message, 0).unwrap().to_vec();
            let index = at.index(bytes.len());
            bytes[index] = value;
            bytes.truncate(cut.index(bytes.len()) + 1);
            let _ = decode::<ToAgent>(&bytes);
        }
    }

    #[test]
    fn lying_lengths_do_not_allocate(length in prop::collection::vec(128u8..=255, 1..10)) {
        // Variant, then a huge varint count with nothing behind it.
        for variant in 0u8..4 {
            let mut bytes = vec![variant];
            bytes.extend(&length);
            bytes.push(1);
            prop_assert!(decode::<FromAgent>(&bytes).is_err() || variant == 0 || variant == 2);
            let _ = decode::<ToAgent>(&bytes);
        }
    }
}
