//! What a pod's application does while processes die around it.
//!
//! 1. an idle TCP connection from shop-client to shop-web2 waits for its next question
//! 2. servers in both web pods push numbers over TCP connections that shop-client made: a missing or a strange number, a
//!    reset and an end are all faults
//! 3. shop-client sends shop-web2 a numbered datagram each millisecond; each arrival is noted with its time
//!
//! May touch: sockets in the pods, one Service in the project's directory.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::lab::{BACKENDS, Lab, PROJECT, PROTECTED, pool_vips};
use crate::services::Service;

/// The pod whose application this is.
pub const CLIENT: &str = "shop-client";
/// The pod that hears the datagrams and has the other end of the idle connection.
pub const SERVER: &str = "shop-web2";

const PUSH_PORT: u16 = 9_500;
const IDLE_PORT: u16 = 9_501;
const CANARY_PORT: u16 = 9_502;
/// Connections per address that is pushed from: enough that each backend most likely has one.
const PUSHERS: usize = 2;
/// A kernel that was cut off for ten seconds waits as long again before it repeats a segment.
const TCP_PATIENCE: Duration = Duration::from_secs(25);

/// The application while it runs.
pub struct Load {
    stop: AtomicBool,
    sent: AtomicU64,
    arrivals: Mutex<Vec<(u64, Instant)>>,
    pushed: Vec<AtomicU64>,
    faults: Mutex<Vec<String>>,
    idle: Mutex<TcpStream>,
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
    /// The first of those that never arrived.
    pub first_lost: Option<u64>,
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

    /// Panics unless every TCP connection is whole and goes on now.
    pub fn assert_connections_go_on(&self) {
        let before: Vec<_> = self.pushed.iter().map(|n| n.load(Ordering::Acquire)).collect();
        let asked = self.ask();
        assert!(asked.is_ok(), "the idle connection: {asked:?}");
        let end = Instant::now() + TCP_PATIENCE;
        while self.pushed.iter().zip(&before).any(|(now, before)| now.load(Ordering::Acquire) <= *before) {
            self.assert_whole();
            assert!(
                Instant::now() < end,
                "a pushing connection stands still: {before:?}, now {:?}",
                self.pushed
            );
            thread::sleep(Duration::from_millis(2));
        }
        self.assert_whole();
    }

    fn assert_whole(&self) {
        let faults = lock(&self.faults);
        assert!(faults.is_empty(), "pushing connections: {faults:?}");
    }

    /// One question over the idle connection.
    fn ask(&self) -> std::io::Result<()> {
        let mut stream = lock(&self.idle);
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

    /// The server's side of a pushing connection.
    fn push(&self, mut stream: TcpStream) {
        stream.set_nonblocking(false).expect("blocking");
        stream.set_nodelay(true).expect("TCP_NODELAY");
        let mut number = 0u64;
        while !self.over() {
            if let Err(error) = stream.write_all(&number.to_be_bytes()) {
                return self.fault(format!("the server's side: {error}"));
            }
            number += 1;
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// The client's side of a pushing connection.
    fn pull(&self, which: usize, mut stream: TcpStream) {
        stream.set_read_timeout(Some(Duration::from_millis(100))).expect("time-out");
        let (mut pending, mut buffer) = (Vec::new(), [0; 4_096]);
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
            let whole = pending.len() - pending.len() % 8;
            for bytes in pending.drain(..whole).collect::<Vec<_>>().chunks_exact(8) {
                let got = u64::from_be_bytes(bytes.try_into().expect("eight bytes"));
                if got != number {
                    return self.fault(format!("connection {which}: {got} instead of {number}"));
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
        let lost = (0..sent).filter(|n| !numbers.contains(n));
        Canary { sent, lost: lost.clone().count() as u64, twice, first_lost: lost.min() }
    }
}

/// Ends the threads also when the case panics: a scope waits for them.
struct StopAtEnd<'a>(&'a Load);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.stop.store(true, Ordering::Release);
    }
}

/// Runs `f` while the application works through a Service with two backends. Each connection was whole at the end.
pub fn under_load(lab: &Lab, f: impl FnOnce(&Load)) -> Canary {
    static NUMBER: AtomicU16 = AtomicU16::new(9_500);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let vips = pool_vips(number);
    let name = format!("push-{number}");
    let ports = (PUSH_PORT, PUSH_PORT);
    let service = Service::write(lab, &lab.directory(PROJECT), &name, vips, ports, "TCP", &BACKENDS);
    for pod in PROTECTED {
        vips.iter().for_each(|vip| await_route(lab, pod, *vip));
    }
    let canary = under_load_from(lab, &vips.map(|vip| (vip, PUSH_PORT).into()), f);
    // The last segments of closed connections still want the Service.
    thread::sleep(Duration::from_millis(300));
    drop(service);
    canary
}

/// As [`under_load`], past every Service: the numbers are pushed by both backends' own addresses.
pub fn under_load_of_pods(lab: &Lab, f: impl FnOnce(&Load)) -> Canary {
    let pushers: Vec<_> = BACKENDS.iter().flat_map(|p| lab.pod(p).addresses()).collect();
    under_load_from(lab, &pushers.iter().map(|ip| (*ip, PUSH_PORT).into()).collect::<Vec<_>>(), f)
}

fn under_load_from(lab: &Lab, pushers: &[SocketAddr], f: impl FnOnce(&Load)) -> Canary {
    let (client, server) = (lab.pod(CLIENT), lab.pod(SERVER));
    let listeners = BACKENDS.map(|pod| lab.pod(pod).listen("[::]:9500".parse().expect("an address")));
    assert!(listeners.iter().all(|l| l.local_addr().is_ok_and(|a| a.port() == PUSH_PORT)));
    let to = SocketAddr::from((server.v4, IDLE_PORT));
    let idle_listener = server.listen(to);
    let idle = client.connect(to, TCP_PATIENCE).expect("the idle connection");
    let (idle_server, _) = idle_listener.accept().expect("the idle connection");
    let receiver = server.udp((server.v4, CANARY_PORT));
    socket2::SockRef::from(&receiver).set_recv_buffer_size(8 << 20).expect("receive buffer");
    receiver.set_read_timeout(Some(Duration::from_millis(300))).expect("time-out");
    let sender = client.udp_for(server.v4.into());
    sender.connect((server.v4, CANARY_PORT)).expect("connect");
    let pulling: Vec<_> = pushers
        .iter()
        .flat_map(|to| std::iter::repeat_n(*to, PUSHERS))
        .map(|to| client.connect(to, Duration::from_secs(5)).unwrap_or_else(|e| panic!("{to}: {e}")))
        .collect();
    let pushing = accept(&listeners, pulling.len());
    let load = Load {
        stop: AtomicBool::new(false),
        sent: AtomicU64::new(0),
        arrivals: Mutex::new(Vec::new()),
        pushed: pulling.iter().map(|_| AtomicU64::new(0)).collect(),
        faults: Mutex::new(Vec::new()),
        idle: Mutex::new(idle),
    };
    thread::scope(|scope| {
        let stop = StopAtEnd(&load);
        let load = &load;
        scope.spawn(move || echo(load, idle_server));
        for (which, stream) in pulling.into_iter().enumerate() {
            scope.spawn(move || load.pull(which, stream));
        }
        for stream in pushing {
            scope.spawn(move || load.push(stream));
        }
        scope.spawn(|| load.hear_canaries(&receiver));
        scope.spawn(|| load.send_canaries(&sender));
        let begun = load.arrival_since(Instant::now(), Duration::from_secs(5));
        assert!(begun.is_some(), "no datagram arrives at all");
        load.assert_connections_go_on();
        f(load);
        load.assert_connections_go_on();
        drop(stop);
    });
    load.assert_whole();
    load.canary()
}

/// Both listeners' connections, in no order.
fn accept(listeners: &[TcpListener], count: usize) -> Vec<TcpStream> {
    let end = Instant::now() + Duration::from_secs(5);
    let mut streams = Vec::new();
    for listener in listeners {
        listener.set_nonblocking(true).expect("non-blocking");
    }
    while streams.len() < count {
        assert!(Instant::now() < end, "{} of {count} connections reached a server", streams.len());
        for listener in listeners {
            streams.extend(listener.accept().ok().map(|(stream, _)| stream));
        }
    }
    streams
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
