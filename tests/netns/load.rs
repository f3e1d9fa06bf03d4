//! What a pod's application does while processes die around it.
//!
//! 1. silent TCP connections from shop-client to shop-web2 wait for their next question, one for each round and the others
//!    until the end
//! 2. servers in three pods push numbered records over TCP connections that shop-client made to one VIP: a missing or a
//!    strange number, another server, a reset and an end are all faults
//! 3. iperf3 in shop-client sends to shop-web2
//! 4. shop-client sends shop-web2 a numbered datagram each millisecond; each arrival is noted with its time
//! 5. every TCP reset that a stack of these pods sends or gets is counted there; outside the pods the leak detector has it
//!
//! May touch: sockets in the pods, a table of its own in the pods' nft, one Service in the project's directory.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::lab::{Lab, PROJECT, PROTECTED, pool_vips};
use crate::pod::{self, Pod};
use crate::services::Service;

/// The pod whose application this is.
pub const CLIENT: &str = "shop-client";
/// The pod that hears the datagrams and has the other end of the idle connection.
pub const SERVER: &str = "shop-web2";

const PUSH_PORT: u16 = 9_500;
const IDLE_PORT: u16 = 9_501;
const CANARY_PORT: u16 = 9_502;
/// A port that nobody listens on.
const CLOSED_PORT: u16 = 9_503;
/// The pods that push.
const PUSHERS: [&str; 3] = ["shop-web1", "shop-web2", "shop-client2"];
/// Most connections that are made until each of them pushes over one.
const PULLING_MAX: usize = 200;
/// What is pushed at a time.
const RECORD: usize = 1_024;
const PUSH_EVERY: Duration = Duration::from_millis(4);
/// The lab's iperf3 server, by its Service.
const IPERF_VIP: Ipv4Addr = Ipv4Addr::new(10, 96, 1, 3);
const IPERF_ARGS: &str = "-p 5201 -b 50M -t 86400 -i 0.2 -f k --forceflush --connect-timeout 3000";
/// The table that counts resets.
const RESETS: &str = "table inet lab-resets {
  counter resets { }
  chain in { type filter hook input priority 0; tcp flags & rst == rst counter name resets; }
  chain out { type filter hook output priority 0; tcp flags & rst == rst counter name resets; }
}";
/// A kernel that was cut off for ten seconds waits as long again before it repeats a segment.
const TCP_PATIENCE: Duration = Duration::from_secs(25);

/// How much of it there is.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Connections that are silent until the end.
    pub silent: usize,
    /// Connections that are pushed over; more, where a server would have none.
    pub busy: usize,
}

impl Size {
    /// What most cases run under.
    pub const SMALL: Self = Self { silent: 1, busy: 6 };
}

/// The application while it runs.
pub struct Load {
    stop: AtomicBool,
    sent: AtomicU64,
    arrivals: Mutex<Vec<(u64, Instant)>>,
    pushed: Vec<AtomicU64>,
    faults: Mutex<Vec<String>>,
    asked: Mutex<TcpStream>,
    /// Both ends of each.
    silent: Vec<(TcpStream, TcpStream)>,
    iperf: Mutex<Iperf>,
    /// None: without agents, what earlier connections left is answered with resets.
    resets: Option<Resets>,
}

/// What became of the datagrams.
#[derive(Debug)]
pub struct Canary {
    /// How many were sent.
    pub sent: u64,
    /// How many of them never arrived.
    pub lost: u64,
    /// How many arrived once more.
    pub twice: u64,
    /// Each gap: the first number that never arrived, and how many in a row.
    pub gaps: Vec<(u64, u64)>,
}

impl Load {
    /// The first datagram that arrived at `from` or later, waited for until `limit` after it.
    pub fn arrival_since(&self, from: Instant, limit: Duration) -> Option<Duration> {
        while from.elapsed() < limit {
            let arrivals = lock(&self.arrivals);
            let first = arrivals.partition_point(|(_, at)| *at < from);
            if let Some((_, at)) = arrivals.get(first) {
                return Some(at.duration_since(from));
            }
            drop(arrivals);
            thread::sleep(Duration::from_millis(1));
        }
        None
    }

    /// The longest time without a datagram between `from` and the last one.
    pub fn longest_silence(&self, from: Instant) -> Duration {
        let arrivals = lock(&self.arrivals);
        let first = arrivals.partition_point(|(_, at)| *at < from);
        let times = arrivals.iter().skip(first.saturating_sub(1)).map(|(_, at)| *at);
        times.clone().zip(times.skip(1)).map(|(a, b)| b.duration_since(a)).max().unwrap_or_default()
    }

    /// Panics unless every TCP connection is whole and all that are not silent go on now: how long the last one took.
    pub fn assert_connections_go_on(&self) -> Duration {
        let since = Instant::now();
        let before: Vec<_> = self.pushed.iter().map(|n| n.load(Ordering::Acquire)).collect();
        let intervals = lock(&self.iperf).intervals();
        let asked = self.ask();
        assert!(asked.is_ok(), "the idle connection: {asked:?}");
        loop {
            self.assert_whole();
            let still = self.pushed.iter().zip(&before).any(|(now, b)| now.load(Ordering::Acquire) <= *b);
            // The first interval that ends may have had its bytes before.
            if !still && lock(&self.iperf).intervals() > intervals + 1 {
                return since.elapsed();
            }
            assert!(
                since.elapsed() < TCP_PATIENCE,
                "a connection stands still: {before:?}, now {:?}; iperf3:\n{}",
                self.pushed,
                lock(&self.iperf).last()
            );
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// No connection ended or had a fault, and nobody said a reset.
    fn assert_whole(&self) {
        let faults = lock(&self.faults);
        assert!(faults.is_empty(), "pushing connections: {faults:?}");
        lock(&self.iperf).assert_runs();
    }

    /// Panics if a reset was seen in a pod, or a silent connection is not as it was.
    pub fn assert_no_reset(&self) {
        let resets = self.resets.as_ref().map(Resets::count).unwrap_or_default();
        assert!(resets.values().all(|n| *n == 0), "TCP resets in the pods: {resets:?}");
        for (n, (client, server)) in self.silent.iter().enumerate() {
            for end in [client, server] {
                end.set_nonblocking(true).expect("non-blocking");
                let peeked = end.peek(&mut [0]);
                assert!(
                    peeked.as_ref().is_err_and(|e| e.kind() == ErrorKind::WouldBlock),
                    "silent connection {n}: {peeked:?}"
                );
            }
        }
    }

    /// Each silent connection says something, in both directions.
    fn ask_silent(&self) {
        for (n, (client, server)) in self.silent.iter().enumerate() {
            for (mut from, mut to) in [(client, server), (server, client)] {
                to.set_nonblocking(false).expect("blocking");
                to.set_read_timeout(Some(TCP_PATIENCE)).expect("time-out");
                let mut heard = [0; 5];
                let said = from.write_all(b"awake").and_then(|()| to.read_exact(&mut heard));
                assert!(said.is_ok() && heard == *b"awake", "silent connection {n}: {said:?}");
            }
        }
    }

    /// One question over the connection that is silent between rounds.
    fn ask(&self) -> std::io::Result<()> {
        let mut stream = lock(&self.asked);
        let mut answer = [0; 5];
        stream.write_all(b"alive")?;
        stream.read_exact(&mut answer)?;
        if answer == *b"alive" { Ok(()) } else { Err(ErrorKind::InvalidData.into()) }
    }

    fn fault(&self, text: String) {
        lock(&self.faults).push(text);
    }

    fn over(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// The server's side of a pushing connection: records that open with the server's number and their own.
    fn push(&self, server: usize, mut stream: TcpStream) {
        stream.set_nonblocking(false).expect("blocking");
        stream.set_nodelay(true).expect("TCP_NODELAY");
        let mut record = [0; RECORD];
        record[0] = u8::try_from(server).expect("few servers");
        let mut number = 0u64;
        while !self.over() {
            record[1..9].copy_from_slice(&number.to_be_bytes());
            if let Err(error) = stream.write_all(&record) {
                return self.fault(format!("{}'s side: {error}", PUSHERS[server]));
            }
            number += 1;
            thread::sleep(PUSH_EVERY);
        }
    }

    /// The client's side of a pushing connection.
    fn pull(&self, which: usize, server: usize, mut stream: TcpStream) {
        stream.set_read_timeout(Some(Duration::from_millis(100))).expect("time-out");
        let (mut pending, mut buffer) = (Vec::new(), [0; 4 * RECORD]);
        let mut number = 0u64;
        while !self.over() {
            match stream.read(&mut buffer) {
                Ok(0) if self.over() => return,
                Ok(0) => return self.fault(format!("connection {which} ended after number {number}")),
                Ok(n) => pending.extend_from_slice(&buffer[..n]),
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(error) => {
                    return self.fault(format!("connection {which} after number {number}: {error}"));
                }
            }
            let whole = pending.len() - pending.len() % RECORD;
            for record in pending.drain(..whole).collect::<Vec<_>>().chunks_exact(RECORD) {
                let got = u64::from_be_bytes(record[1..9].try_into().expect("eight bytes"));
                if usize::from(record[0]) != server || got != number {
                    let text = format!("{got} of server {} instead of {number} of {server}", record[0]);
                    return self.fault(format!("connection {which}: {text}"));
                }
                number += 1;
            }
            self.pushed[which].store(number, Ordering::Release);
        }
    }

    fn send_canaries(&self, socket: &UdpSocket) {
        while !self.over() {
            let number = self.sent.load(Ordering::Acquire);
            // Refused is lost.
            let _ = socket.send(&number.to_be_bytes());
            self.sent.store(number + 1, Ordering::Release);
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn hear_canaries(&self, socket: &UdpSocket) {
        let mut buffer = [0; 64];
        loop {
            match socket.recv(&mut buffer) {
                Ok(8) => {
                    let number = u64::from_be_bytes(buffer[..8].try_into().expect("eight bytes"));
                    lock(&self.arrivals).push((number, Instant::now()));
                }
                Ok(_) => {}
                // A time-out of its own: what was on its way when sending stopped has arrived.
                Err(_) if self.over() => return,
                Err(_) => {}
            }
        }
    }

    fn canary(&self) -> Canary {
        let (mut numbers, mut twice) = (BTreeSet::new(), 0);
        for (number, _) in lock(&self.arrivals).iter() {
            twice += u64::from(!numbers.insert(*number));
        }
        let sent = self.sent.load(Ordering::Acquire);
        let mut gaps: Vec<(u64, u64)> = Vec::new();
        for lost in (0..sent).filter(|n| !numbers.contains(n)) {
            match gaps.last_mut().filter(|(first, count)| first + count == lost) {
                Some((_, count)) => *count += 1,
                None => gaps.push((lost, 1)),
            }
        }
        Canary { sent, lost: gaps.iter().map(|(_, count)| count).sum(), twice, gaps }
    }
}

/// Ends the threads also when the case panics: a scope waits for them.
struct StopAtEnd<'a>(&'a Load);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.stop.store(true, Ordering::Release);
    }
}

/// Runs `f` while the application works through a Service with three backends. Each connection was whole at the end.
pub fn under_load(lab: &Lab, size: Size, f: impl FnOnce(&Load)) -> Canary {
    static NUMBER: AtomicU16 = AtomicU16::new(9_500);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let vips = pool_vips(number);
    let name = format!("push-{number}");
    let ports = (PUSH_PORT, PUSH_PORT);
    let service = Service::write(lab, &lab.directory(PROJECT), &name, vips, ports, "TCP", &PUSHERS);
    for pod in PROTECTED {
        vips.iter().for_each(|vip| await_route(lab, pod, *vip));
    }
    let canary = under_load_from(lab, size, &vips.map(|vip| (vip, PUSH_PORT).into()), true, f);
    // The last segments of closed connections still want the Service.
    thread::sleep(Duration::from_millis(300));
    drop(service);
    canary
}

/// As [`under_load`], with the numbers pushed by the servers' own addresses.
pub fn under_load_of_pods(lab: &Lab, f: impl FnOnce(&Load)) -> Canary {
    let pushers: Vec<_> = PUSHERS.iter().flat_map(|p| lab.pod(p).addresses()).collect();
    let pushers: Vec<_> = pushers.iter().map(|ip| (*ip, PUSH_PORT).into()).collect();
    under_load_from(lab, Size::SMALL, &pushers, false, f)
}

fn under_load_from(
    lab: &Lab,
    size: Size,
    pushers: &[SocketAddr],
    sealed: bool,
    f: impl FnOnce(&Load),
) -> Canary {
    allow_descriptors(2 * size.silent + 1_000);
    let (client, server) = (lab.pod(CLIENT), lab.pod(SERVER));
    let to = SocketAddr::from((server.v4, IDLE_PORT));
    let idle_listener = server.listen(to);
    let (asked, asked_server) = connection(client, to, &idle_listener);
    let silent = (0..size.silent).map(|_| connection(client, to, &idle_listener)).collect();
    let receiver = server.udp((server.v4, CANARY_PORT));
    pod::enlarge(&receiver);
    receiver.set_read_timeout(Some(Duration::from_millis(300))).expect("time-out");
    let sender = client.udp_for(server.v4.into());
    sender.connect((server.v4, CANARY_PORT)).expect("connect");
    let connections = pushing_connections(lab, pushers, size.busy);
    let resets = sealed.then(|| Resets::new(lab));
    resets.iter().for_each(|resets| resets.assert_they_count(client, server));
    let load = Load {
        stop: AtomicBool::new(false),
        sent: AtomicU64::new(0),
        arrivals: Mutex::new(Vec::new()),
        pushed: connections.iter().map(|_| AtomicU64::new(0)).collect(),
        faults: Mutex::new(Vec::new()),
        asked: Mutex::new(asked),
        silent,
        iperf: Mutex::new(Iperf::start(lab)),
        resets,
    };
    thread::scope(|scope| {
        let stop = StopAtEnd(&load);
        let load = &load;
        scope.spawn(move || echo(load, asked_server));
        for (which, (server, ours, theirs)) in connections.into_iter().enumerate() {
            scope.spawn(move || load.pull(which, server, ours));
            scope.spawn(move || load.push(server, theirs));
        }
        scope.spawn(|| load.hear_canaries(&receiver));
        scope.spawn(|| load.send_canaries(&sender));
        let begun = load.arrival_since(Instant::now(), Duration::from_secs(5));
        assert!(begun.is_some(), "no datagram arrives at all");
        load.assert_connections_go_on();
        f(load);
        load.assert_connections_go_on();
        load.assert_no_reset();
        load.ask_silent();
        load.assert_no_reset();
        drop(stop);
    });
    load.assert_whole();
    load.canary()
}

/// A connection and its other end.
fn connection(client: &Pod, to: SocketAddr, listener: &TcpListener) -> (TcpStream, TcpStream) {
    let ours = client.connect(to, TCP_PATIENCE).unwrap_or_else(|e| panic!("{to}: {e}"));
    let theirs = listener.accept().unwrap_or_else(|e| panic!("{to}: {e}")).0;
    (ours, theirs)
}

/// `count` connections in turn to each of `to`, more until each server has one: server, the client's end, the server's end.
fn pushing_connections(lab: &Lab, to: &[SocketAddr], count: usize) -> Vec<(usize, TcpStream, TcpStream)> {
    let listeners = PUSHERS.map(|pod| lab.pod(pod).listen("[::]:9500".parse().expect("an address")));
    for listener in &listeners {
        assert_eq!(listener.local_addr().expect("an address").port(), PUSH_PORT);
        listener.set_nonblocking(true).expect("non-blocking");
    }
    let mut made: Vec<(usize, TcpStream, TcpStream)> = Vec::new();
    let complete = |made: &[(usize, TcpStream, TcpStream)]| {
        made.len() >= count && (0..PUSHERS.len()).all(|server| made.iter().any(|(s, ..)| *s == server))
    };
    for to in to.iter().cycle().take(PULLING_MAX) {
        let ours =
            lab.pod(CLIENT).connect(*to, Duration::from_secs(5)).unwrap_or_else(|e| panic!("{to}: {e}"));
        let end = Instant::now() + Duration::from_secs(5);
        let (server, theirs) = loop {
            assert!(Instant::now() < end, "a connection to {to} reached no server");
            let mut accepted =
                listeners.iter().enumerate().filter_map(|(n, l)| Some((n, l.accept().ok()?.0)));
            if let Some(accepted) = accepted.next() {
                break accepted;
            }
        };
        made.push((server, ours, theirs));
        if complete(&made) {
            return made;
        }
    }
    panic!("of {PULLING_MAX} connections none reached some server: {to:?}");
}

/// Lets this process have so many descriptors.
fn allow_descriptors(count: usize) {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("RLIMIT_NOFILE");
    let wanted = soft.max(u64::try_from(count).expect("fits"));
    setrlimit(Resource::RLIMIT_NOFILE, wanted, hard.max(wanted)).expect("RLIMIT_NOFILE");
}

/// An iperf3 client that runs until it is dropped.
struct Iperf {
    child: Child,
    output: PathBuf,
}

impl Iperf {
    fn start(lab: &Lab) -> Self {
        let output = lab.run_dir().join("iperf-load.log");
        let file = fs::File::create(&output).expect("a log file");
        let netns = format!("{}-{CLIENT}", lab.name());
        let child = Command::new("ip")
            .args(["netns", "exec", &netns, "iperf3", "-c", &IPERF_VIP.to_string()])
            .args(IPERF_ARGS.split_whitespace())
            .stdin(Stdio::null())
            .stdout(file.try_clone().expect("a second descriptor"))
            .stderr(file)
            .spawn()
            .expect("start iperf3");
        Self { child, output }
    }

    fn printed(&self) -> String {
        fs::read_to_string(&self.output).unwrap_or_default()
    }

    /// The last lines of it.
    fn last(&self) -> String {
        let printed = self.printed();
        let lines: Vec<_> = printed.lines().collect();
        lines[lines.len().saturating_sub(10)..].join("\n")
    }

    /// How many intervals ended that had bytes.
    fn intervals(&self) -> usize {
        let moved = |line: &&str| line.contains("bits/sec") && !line.contains(" 0.00 Bytes");
        self.printed().lines().filter(moved).count()
    }

    fn assert_runs(&mut self) {
        let ended = self.child.try_wait().expect("wait for iperf3");
        assert!(ended.is_none(), "iperf3 ended with {ended:?}:\n{}", self.last());
    }
}

impl Drop for Iperf {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Counts TCP resets in the pods of the load, sent and received.
struct Resets {
    pods: Vec<Pod>,
}

impl Resets {
    fn new(lab: &Lab) -> Self {
        let mut resets = Self { pods: Vec::new() };
        for pod in PROTECTED.map(|name| lab.pod(name)) {
            resets.pods.push(pod.clone());
            nft(pod, RESETS);
        }
        resets
    }

    /// The positive control: a refused connection counts at both ends. Afterwards all are zero.
    fn assert_they_count(&self, client: &Pod, server: &Pod) {
        let refused = client.connect((server.v4, CLOSED_PORT), Duration::from_secs(5));
        assert!(refused.as_ref().is_err_and(|e| e.kind() == ErrorKind::ConnectionRefused), "{refused:?}");
        let counted = self.count();
        assert!(counted[&client.name] > 0 && counted[&server.name] > 0, "no reset is counted: {counted:?}");
        self.pods.iter().for_each(|pod| _ = nft(pod, "reset counters table inet lab-resets"));
    }

    fn count(&self) -> BTreeMap<String, u64> {
        let packets = |pod: &Pod| {
            let is_there = || Command::new("nft").arg("list table inet lab-resets").output();
            // Flushed with everything else, by a test that does such things: it begins anew.
            if !pod.enter(is_there).is_ok_and(|ran| ran.status.success()) {
                nft(pod, RESETS);
            }
            let text = nft(pod, "list counters table inet lab-resets");
            let mut words = text.split_whitespace().skip_while(|word| *word != "packets");
            words.nth(1).and_then(|n| n.parse().ok()).unwrap_or_else(|| panic!("no counter: {text}"))
        };
        self.pods.iter().map(|pod| (pod.name.clone(), packets(pod))).collect()
    }
}

impl Drop for Resets {
    fn drop(&mut self) {
        for pod in &self.pods {
            // The lab may be gone already.
            pod.enter(|| _ = Command::new("nft").arg("delete table inet lab-resets").output());
        }
    }
}

fn nft(pod: &Pod, command: &str) -> String {
    let ran = pod.enter(|| Command::new("nft").arg(command).output().expect("nft"));
    assert!(ran.status.success(), "{}: {command}: {}", pod.name, String::from_utf8_lossy(&ran.stderr));
    String::from_utf8_lossy(&ran.stdout).into_owned()
}

/// The server's side of the idle connection.
fn echo(load: &Load, mut stream: TcpStream) {
    stream.set_read_timeout(Some(Duration::from_millis(100))).expect("time-out");
    let mut buffer = [0; 64];
    while !load.over() {
        match stream.read(&mut buffer) {
            Ok(0) => return,
            // The client's side tells what goes wrong.
            Ok(n) => drop(stream.write_all(&buffer[..n])),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(_) => return,
        }
    }
}

/// Waits until a pod's way to `vip` is the tunnel: earlier packets would go in clear, and rightly.
pub fn await_route(lab: &Lab, pod: &str, vip: IpAddr) {
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        let text = route_to(lab, pod, vip);
        if text.contains("dev tenc0") {
            return;
        }
        assert!(Instant::now() < end, "{pod} has no route to {vip} through the tunnel: {text}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// What `ip route get` says in a pod, errors too.
pub fn route_to(lab: &Lab, pod: &str, vip: IpAddr) -> String {
    lab.pod(pod).enter(|| {
        let out = Command::new("ip").args(["route", "get", &vip.to_string()]).output().expect("ip route get");
        String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned()
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
