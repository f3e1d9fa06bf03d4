//! Work that is not a packet. The driver serves packets between two steps: what counts is the longest one, in CPU time.
//!
//! A step is one call that does work, and polling what came of it. The kernel's part (writing the journal, netlink) is not in
//! it, but for the launcher's messages, which are read from a socket.

use std::hint::black_box;
use std::net::Ipv4Addr;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion};
use rustix::time::{ClockId, clock_gettime};
use tencrypt::control::{AgentChannel, LauncherChannel, REPORTED_PEERS_MAX, Received, ToAgent, chunks};
use tencrypt::proto::directory::Change;
use tencrypt::proto::journal::Restored;
use tencrypt::proto::ladder::Mode;
use tencrypt::proto::nat::MAX_FLOWS;
use tencrypt::proto::noise::Suite;
use tencrypt::proto::{Engine, Now};
use tencrypt::wire::vnet::VnetHeader;

use crate::project::{
    CLIENT, Pair, SERVER, SERVICE, capture, directory, engine, keys, later, many, pod, settle, start, tcp,
};

const ENDPOINTS: u32 = 10_000;
/// Removed at once where that takes long.
const REMOVED: u32 = 1_000;

/// The longest step of an update, and the whole of it: a step for each message of changes, then for the commit.
fn update(engine: &mut Engine, now: Now, changes: Vec<Change>, whole: bool) -> (Duration, Duration) {
    let (mut longest, mut taken) = (Duration::ZERO, Duration::ZERO);
    for message in chunks(changes) {
        let ToAgent::Changes(changes) = message else { unreachable!("changes become changes") };
        let begun = cpu();
        engine.handle_changes(changes);
        let step = cpu() - begun;
        (longest, taken) = (longest.max(step), taken + step);
    }
    let (step, rest) = steps(engine, now, |engine| engine.commit(whole, now));
    (longest.max(step), taken + rest)
}

/// The longest step of a run that `first` begins, and the whole of it.
fn steps(engine: &mut Engine, now: Now, first: impl FnOnce(&mut Engine)) -> (Duration, Duration) {
    let (mut longest, mut whole) = (Duration::ZERO, Duration::ZERO);
    let mut first = Some(first);
    while first.is_some() || engine.poll_timeout().is_some_and(|at| at <= now.instant) {
        let begun = cpu();
        match first.take() {
            Some(first) => first(engine),
            None => engine.handle_timeout(now),
        }
        poll(engine);
        let step = cpu() - begun;
        (longest, whole) = (longest.max(step), whole + step);
    }
    (longest, whole)
}

/// CPU time of this thread: what other processes do meanwhile is no step of ours.
fn cpu() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    now.try_into().expect("time since the thread began")
}

/// Takes out what the driver would; batches are left unapplied.
fn poll(engine: &mut Engine) {
    while let Some(record) = engine.poll_record() {
        black_box(record);
    }
    while let Some(batch) = engine.poll_batch() {
        black_box(batch);
    }
    while let Some(sent) = engine.poll_transmit() {
        black_box(sent);
    }
    while let Some(inject) = engine.poll_inject() {
        black_box(inject);
    }
}

fn client(mode: Mode) -> Engine {
    engine(CLIENT, Suite::ChaCha20Poly1305, mode)
}

/// An engine that knows so many endpoints.
fn knowing(count: u32, mode: Mode, now: Now) -> Engine {
    let mut engine = client(mode);
    engine.handle_directory(many(count), now);
    settle(&mut engine, now);
    engine
}

/// A client with as many connections through the service, which it knows among many others, as one peer gets entries for.
fn busy(count: u32) -> (Engine, Now) {
    let Pair { mut client, now, .. } = Pair::new(Suite::ChaCha20Poly1305);
    for n in 0..MAX_FLOWS / 2 {
        let port = u16::try_from(1_024 + n).expect("a port");
        let syn = tcp((CLIENT, port), (SERVICE, 80), true, &[]);
        capture(&mut client, &VnetHeader::PLAIN, &syn, now);
        poll(&mut client);
    }
    client.handle_directory(many(count), now);
    settle(&mut client, now);
    (client, now)
}

fn removed(count: u32) -> Vec<Change> {
    (0..count).map(|n| Change::RemoveWorkload(pod(n).into())).collect()
}

/// One kind of work: makes an engine ready, runs, says what it took.
type Run = fn() -> (Duration, Duration);

const RUNS: [(&str, Run); 9] = [
    ("directory of 10000, from nothing", || {
        let now = start();
        let changes = many(ENDPOINTS);
        update(&mut client(Mode::Strict), now, changes, false)
    }),
    ("directory of 10000, whole again", || {
        let now = start();
        let mut engine = knowing(ENDPOINTS, Mode::Strict, now);
        let changes = many(ENDPOINTS);
        update(&mut engine, now, changes, true)
    }),
    ("directory of 10000, nothing left", || {
        let now = start();
        let mut engine = knowing(ENDPOINTS, Mode::Strict, now);
        update(&mut engine, now, directory(), true)
    }),
    ("1000 workloads leave 65536 flows", || {
        let (mut engine, now) = busy(REMOVED);
        update(&mut engine, now, removed(REMOVED), false)
    }),
    ("10000 addresses are released", || {
        let now = start();
        let mut engine = knowing(ENDPOINTS, Mode::Strict, now);
        engine.handle_whole_directory(directory(), now);
        settle(&mut engine, now);
        let now = later(now, Duration::from_secs(601));
        steps(&mut engine, now, |engine| engine.handle_timeout(now))
    }),
    ("65536 flows are over", || {
        let (mut engine, now) = busy(0);
        let now = later(now, Duration::from_secs(121));
        steps(&mut engine, now, |engine| engine.handle_timeout(now))
    }),
    ("4096 peers are met again", || {
        let now = start();
        let mut engine = client(Mode::Strict);
        engine.restore(
            &Restored { peers: (0..4_096).map(|n| (n, pod(n).into())).collect(), ..Restored::default() },
            now,
        );
        let peers: Vec<_> = (0..4_096).map(|n| pod(n).into()).collect();
        engine.adopt_peers(&peers, now);
        let changes = many(4_096);
        update(&mut engine, now, changes, false)
    }),
    ("status with 10000 peers", || {
        let engine = knowing(ENDPOINTS, Mode::Strict, start());
        let begun = cpu();
        black_box(engine.peers(REPORTED_PEERS_MAX));
        let took = cpu() - begun;
        (took, took)
    }),
    ("permissive, one of 10000 peers is new", || {
        let now = start();
        let mut engine = knowing(ENDPOINTS, Mode::Permissive, now);
        let new = Change::SetWorkload(tencrypt::proto::directory::Workload {
            address: Ipv4Addr::new(10, 99, 0, 1).into(),
            keys: keys(SERVER),
            accept: None,
        });
        update(&mut engine, now, vec![new], false)
    }),
];

pub(crate) fn benches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("control");
    group.sample_size(10).warm_up_time(Duration::from_millis(1)).measurement_time(Duration::from_millis(100));
    for (name, run) in RUNS {
        for (what, of) in [("longest step", true), ("whole", false)] {
            group.bench_function(BenchmarkId::new(what, name), |b| {
                b.iter_custom(|iterations| {
                    let runs = (0..iterations).map(|_| run());
                    runs.map(|(longest, whole)| if of { longest } else { whole }).sum()
                });
            });
        }
    }
    let (launcher, agent) = channel();
    let messages = chunks(many(ENDPOINTS));
    group.bench_function(BenchmarkId::new("longest step", "one message of changes"), |b| {
        b.iter_custom(|iterations| {
            let mut time = Duration::ZERO;
            for _ in 0..iterations {
                let mut longest = Duration::ZERO;
                let mut engine = client(Mode::Strict);
                for message in &messages {
                    launcher.send(message, &[]).expect("the agent reads");
                    let begun = cpu();
                    let Ok(Some(Received::Message(ToAgent::Changes(changes), _))) = agent.try_recv() else {
                        panic!("it was sent");
                    };
                    engine.handle_changes(changes);
                    longest = longest.max(cpu() - begun);
                }
                time += longest;
            }
            time
        });
    });
    group.finish();
}

fn channel() -> (LauncherChannel, AgentChannel) {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    let (one, other) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .expect("a pair of sockets");
    (LauncherChannel::new(one).expect("a socket"), AgentChannel::new(other).expect("a socket"))
}
