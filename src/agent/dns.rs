//! The agent's side of DNS: one upstream socket per UDP query, and the TCP connections of the helper namespace.
//!
//! UDP: `forward` opens a marked, connected socket from a random port, sends, and waits for the driver to say that it is
//! readable. A resolver of the project is asked from a socket like any of the pod's, which the engine is told of: its packets
//! come back through `tenc0` and are sealed. TCP: the pod's segments for port 53 end in the helper namespace, whose listener is accepted here; the pod's
//! bytes go to the resolver as they come, the resolver's messages go to the engine one by one and come back released.
//! No decisions: what is an answer, and when it may go on, the engine says. Bounded; everything non-blocking.
//!
//! Source: RFC 1035 §4.2.2 (two-byte length), RFC 7766 §6 (connection handling).

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rand::Rng;
use rand_chacha::ChaCha20Rng;
use socket2::Type;

use super::udp::{dns_socket, dns_stream, plain_socket};
use crate::proto::Engine;
use crate::proto::dns::{Forward, QueryId, StreamId};
use crate::proto::nat::Tuple;
use crate::wire::packet::protocol;

/// TCP connections at one time.
const MAX_STREAMS: usize = 64;
/// A connection without a byte in either direction is closed.
const STREAM_IDLE: Duration = Duration::from_secs(30);
/// Bytes of queries that wait for a slow resolver, per connection.
const MAX_QUERY_BYTES: usize = 128 * 1024;
/// Bytes of answers that wait for a slow application, per connection; one message always fits.
const MAX_ANSWER_BYTES: usize = 256 * 1024;
/// Messages of one connection that wait for their routes.
const MAX_HELD: usize = 32;
/// Largest DNS message, and its length field.
const MESSAGE_MAX: usize = 65_535;

/// Sockets towards resolvers, one per query in flight.
pub(super) struct Queries {
    sockets: BTreeMap<QueryId, Upstream>,
    ports: RangeInclusive<u16>,
    /// Sockets that keep `ports` from the applications, where they would get them otherwise.
    held: Vec<OwnedFd>,
    rng: ChaCha20Rng,
}

/// A query's socket.
struct Upstream {
    socket: UdpSocket,
    /// Its port of LO-HI, if it has one.
    port: Option<u16>,
    /// What the engine knows it by, if it is to be sealed.
    sealed: Option<Tuple>,
}

/// What one read of a query's socket gave.
pub(super) enum Answer {
    /// A datagram from the resolver.
    Message(Vec<u8>),
    /// Nothing more for now.
    Nothing,
    /// Nobody listens there.
    Refused,
}

impl Queries {
    pub(super) fn new(ports: RangeInclusive<u16>, held: Vec<OwnedFd>, rng: ChaCha20Rng) -> Self {
        Self { sockets: BTreeMap::new(), ports, held, rng }
    }

    /// Sends a query from a socket of its own and returns the socket for the driver to watch. `open` tells the engine of a
    /// socket whose packets are to be sealed, and says whether it may be.
    ///
    /// # Errors
    /// No port is free, the kernel has no route, or there are too many sockets.
    pub(super) fn forward(
        &mut self,
        forward: &Forward,
        open: impl FnOnce(Tuple) -> bool,
    ) -> anyhow::Result<BorrowedFd<'_>> {
        let upstream = if forward.sealed {
            let socket = UdpSocket::from(plain_socket(forward.upstream, Type::DGRAM)?);
            let tuple = tuple_of(protocol::UDP, socket.local_addr()?, forward.upstream);
            anyhow::ensure!(open(tuple), "too many sockets towards resolvers of the project");
            Upstream { socket, port: None, sealed: Some(tuple) }
        } else {
            self.marked(forward.upstream)?
        };
        // Kept before anything can fail: it is closed by its query from here on.
        let Upstream { socket, .. } = self.sockets.entry(forward.query).or_insert(upstream);
        socket.send(&forward.bytes)?;
        Ok((*socket).as_fd())
    }

    /// A marked socket from a random port of LO-HI.
    fn marked(&mut self, resolver: SocketAddr) -> anyhow::Result<Upstream> {
        let (rng, lo) = (&mut self.rng, u32::from(*self.ports.start()));
        let used: BTreeSet<u32> = self.sockets.values().filter_map(|u| u.port).map(u32::from).collect();
        anyhow::ensure!(used.len() < self.ports.len() / 2, "too many queries for the ports there are");
        // Two sockets of one port and resolver would get each other's answers.
        let mut pick = |n| loop {
            let offset = rng.next_u32() % n;
            if !used.contains(&(lo + offset)) {
                break offset;
            }
        };
        let fd = dns_socket(resolver, self.ports.clone(), !self.held.is_empty(), &mut pick)?;
        let socket = UdpSocket::from(fd);
        let port = Some(socket.local_addr()?.port());
        Ok(Upstream { socket, port, sealed: None })
    }

    pub(super) fn read(&mut self, query: QueryId) -> Answer {
        let Some(Upstream { socket, sealed, .. }) = self.sockets.get(&query) else { return Answer::Nothing };
        let mut message = vec![0; MESSAGE_MAX];
        match socket.recv(&mut message) {
            Ok(len) => {
                message.truncate(len);
                Answer::Message(message)
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Answer::Refused,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Answer::Nothing,
            // Said by the engine itself, which cannot reach the resolver: the application need not wait.
            Err(_) if sealed.is_some() => Answer::Refused,
            Err(_) => Answer::Nothing,
        }
    }

    /// Closes the socket, and returns what the engine knows it by.
    pub(super) fn close(&mut self, query: QueryId) -> Option<Tuple> {
        self.sockets.remove(&query)?.sealed
    }
}

struct Stream {
    client: TcpStream,
    upstream: TcpStream,
    /// What the engine knows `upstream` by, if it is to be sealed.
    sealed: Option<Tuple>,
    /// From the application, for the resolver.
    queries: VecDeque<u8>,
    /// From the resolver, not yet a whole message.
    partial: Vec<u8>,
    /// Released, for the application.
    answers: VecDeque<u8>,
    /// Messages the engine holds.
    held: usize,
    client_done: bool,
    upstream_done: bool,
    shut: bool,
    idle_at: Instant,
}

/// Connections of the pod to its resolvers.
pub(super) struct Streams {
    streams: BTreeMap<StreamId, Stream>,
    next: u64,
    /// Sockets that the engine has to be told to forget.
    closed: Vec<Tuple>,
}

impl Streams {
    pub(super) fn new() -> Self {
        Self { streams: BTreeMap::new(), next: 0, closed: Vec::new() }
    }

    /// Whether no connection is open.
    pub(super) fn is_empty(&self) -> bool {
        self.streams.is_empty()
    }

    /// Takes a connection from a listener of the helper namespace and opens the one to the resolver it was meant for; whether
    /// that one is sealed, the engine says.
    ///
    /// # Errors
    /// Too many connections, or no way to the resolver: the application sees its connection closed.
    pub(super) fn accept(
        &mut self,
        client: TcpStream,
        queries: &mut Queries,
        engine: &mut Engine,
    ) -> anyhow::Result<(StreamId, [BorrowedFd<'_>; 2])> {
        anyhow::ensure!(self.streams.len() < MAX_STREAMS, "{MAX_STREAMS} DNS connections are open already");
        let resolver = SocketAddr::new(client.local_addr()?.ip().to_canonical(), 53);
        client.set_nonblocking(true)?;
        client.set_nodelay(true)?;
        let (upstream, sealed) = if engine.is_sealed(resolver.ip()) {
            let upstream = TcpStream::from(plain_socket(resolver, Type::STREAM)?);
            let tuple = tuple_of(protocol::TCP, upstream.local_addr()?, resolver);
            anyhow::ensure!(engine.open_upstream(tuple), "too many sockets towards resolvers of the project");
            (upstream, Some(tuple))
        } else {
            let rng = &mut queries.rng;
            (dns_stream(resolver, queries.ports.clone(), &mut |n| rng.next_u32() % n)?.into(), None)
        };
        let id = StreamId(self.next);
        self.next += 1;
        let stream = self.streams.entry(id).or_insert(Stream {
            client,
            upstream,
            sealed,
            queries: VecDeque::new(),
            partial: Vec::new(),
            answers: VecDeque::new(),
            held: 0,
            client_done: false,
            upstream_done: false,
            shut: false,
            idle_at: Instant::now() + STREAM_IDLE,
        });
        Ok((id, [stream.client.as_fd(), stream.upstream.as_fd()]))
    }

    /// Moves what can be moved; whole messages of the resolver go to `message`, which says whether the connection may live.
    pub(super) fn pump(&mut self, id: StreamId, mut message: impl FnMut(Vec<u8>) -> bool) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if stream.pump(&mut message).is_err() || stream.is_over() {
            self.close(id);
        }
    }

    /// A message was released for the application.
    pub(super) fn answer(&mut self, id: StreamId, message: &[u8]) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        stream.held = stream.held.saturating_sub(1);
        if let Ok(len) = u16::try_from(message.len()) {
            stream.answers.extend(len.to_be_bytes());
            stream.answers.extend(message);
        }
        if stream.flush().is_err() || stream.is_over() {
            self.close(id);
        }
    }

    /// Closes a connection: the application asks again at once instead of waiting.
    pub(super) fn close(&mut self, id: StreamId) {
        self.closed.extend(self.streams.remove(&id).and_then(|stream| stream.sealed));
    }

    /// The next socket whose packets are not to be sealed any more.
    pub(super) fn poll_closed(&mut self) -> Option<Tuple> {
        self.closed.pop()
    }

    pub(super) fn contains(&self, id: StreamId) -> bool {
        self.streams.contains_key(&id)
    }

    /// Closes connections that were idle too long.
    pub(super) fn handle_timeout(&mut self, now: Instant) {
        let closed = &mut self.closed;
        self.streams.retain(|_, stream| {
            let stays = stream.idle_at > now;
            closed.extend(stream.sealed.filter(|_| !stays));
            stays
        });
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.streams.values().map(|stream| stream.idle_at).min()
    }
}

impl Stream {
    /// Reads and writes until nothing moves: the driver hears of a socket only when its state changes.
    fn pump(&mut self, message: &mut impl FnMut(Vec<u8>) -> bool) -> io::Result<()> {
        self.idle_at = Instant::now() + STREAM_IDLE;
        let mut moved = true;
        while moved {
            moved = self.read_client()? | self.read_upstream(message)?;
            self.flush()?;
        }
        Ok(())
    }

    fn read_client(&mut self) -> io::Result<bool> {
        let mut chunk = [0; 16 * 1024];
        if self.client_done || self.queries.len() >= MAX_QUERY_BYTES {
            return Ok(false);
        }
        let Some(len) = read(&mut self.client, &mut chunk)? else { return Ok(false) };
        self.client_done = len == 0;
        self.queries.extend(&chunk[..len]);
        Ok(true)
    }

    fn read_upstream(&mut self, message: &mut impl FnMut(Vec<u8>) -> bool) -> io::Result<bool> {
        let mut chunk = [0; 16 * 1024];
        if self.upstream_done || self.answers.len() >= MAX_ANSWER_BYTES || self.held >= MAX_HELD {
            return Ok(false);
        }
        let Some(len) = read(&mut self.upstream, &mut chunk)? else { return Ok(false) };
        self.upstream_done = len == 0;
        self.partial.extend_from_slice(&chunk[..len]);
        while let Some(whole) = take_message(&mut self.partial) {
            if !message(whole) {
                return Err(io::ErrorKind::InvalidData.into());
            }
            self.held += 1;
        }
        Ok(true)
    }

    fn flush(&mut self) -> io::Result<()> {
        write(&mut self.upstream, &mut self.queries)?;
        write(&mut self.client, &mut self.answers)?;
        if self.client_done && self.queries.is_empty() && !self.shut {
            self.shut = true;
            // The resolver learns that no more queries come; its answers are still awaited.
            self.upstream.shutdown(std::net::Shutdown::Write)?;
        }
        Ok(())
    }

    fn is_over(&self) -> bool {
        self.upstream_done && self.held == 0 && self.answers.is_empty()
    }
}

fn tuple_of(protocol: u8, local: SocketAddr, resolver: SocketAddr) -> Tuple {
    let (local, remote) = ((local.ip(), local.port()), (resolver.ip(), resolver.port()));
    Tuple { protocol, local, remote }
}

/// Takes the first whole message out of a stream of them.
fn take_message(bytes: &mut Vec<u8>) -> Option<Vec<u8>> {
    let len = usize::from(u16::from_be_bytes(*bytes.first_chunk()?));
    let message = bytes.get(2..2 + len)?.to_vec();
    bytes.drain(..2 + len);
    Some(message)
}

fn read(mut from: impl io::Read, chunk: &mut [u8]) -> io::Result<Option<usize>> {
    match from.read(chunk) {
        Ok(len) => Ok(Some(len)),
        // Not yet connected, or nothing there.
        Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::NotConnected) => Ok(None),
        Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(None),
        Err(e) => Err(e),
    }
}

fn write(mut to: impl io::Write, bytes: &mut VecDeque<u8>) -> io::Result<()> {
    while !bytes.is_empty() {
        match to.write(bytes.as_slices().0) {
            Ok(len) => drop(bytes.drain(..len)),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::NotConnected) => break,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// The listener of the helper namespace, as std sees it.
pub(super) fn listener(fd: OwnedFd) -> io::Result<std::net::TcpListener> {
    let listener = std::net::TcpListener::from(fd);
    listener.set_nonblocking(true)?;
    Ok(listener)
}
