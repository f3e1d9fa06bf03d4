//! The event loop: the one thread that owns the engine. Reads descriptors into it, writes out what it polls; no decisions.
//!
//! 1. wait until a descriptor is readable, or the engine's next timer
//! 2. hand over what arrived, a bounded amount per descriptor and turn; of what the pod sent the engine then deals with a
//!    bounded amount, so that both directions get their turns
//! 3. let the engine do one step of what is due: timers, and an update of the directory that is under way
//! 4. poll the engine until nothing is left: batches to the control thread, queries, datagrams, packets for the pod
//!
//! Batches go first, so that an answer or packet that waits for a route waits as short as possible. Nothing else waits for
//! more than a turn: while a step is left the loop does not sleep, and the launcher's next message is read when its last
//! commit is applied.
//!
//! `tenc0` and the tunnel's sockets are read only when the directory's routes are in place, and by a parked successor only
//! when its predecessor has ended: until then packets queue in the kernel.

use std::collections::BTreeMap;
use std::io::{self, IoSlice};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use tracing::{debug, info, warn};

use super::applier::{Applied, Applier, Checked, Done};
use super::control::{self, AgentChannel, ChannelError, Executable, FromAgent, Received, ToAgent, VERSION};
use super::dns::{Answer, Queries, Streams, listener};
use super::handover;
use super::neighbour::ArpResponder;
use super::presence::Presence;
use super::raw_socket::RawInjector;
use super::report;
use super::spin::Spin;
use super::state::StateFile;
use super::tun::Tun;
use super::udp::TunnelSocket;
use super::watch::{TamperCounts, Watch};
use crate::proto::dns::{QueryId, StreamId};
use crate::proto::{Captured, Engine, Now, Origin};
use crate::sys::sched;
use crate::wire::coalesce::MAX_SEGMENTS;
use crate::wire::vnet::VNET_HEADER_LEN;

/// Bursts taken from one descriptor before the others get their turn.
const TURN: usize = 64;
/// Bytes, too, in each direction: a quarter of a millisecond's work of the slower suite.
const TURN_BYTES: usize = 160 << 10;
/// A turn that moved more than this is one of a load: the wait after it is not spent awake.
const LOAD: usize = 16 << 10;
/// How long the loop runs before others that wait for its processor do: about a turn. The kernel's own 3 ms, at each of the
/// agents on a path, are what a packet waits for on a busy node.
const SLICE: Duration = Duration::from_micros(300);
/// DNS connections taken per turn: each opens another one.
const ACCEPTED: usize = 8;
/// A datagram or packet that the kernel has no room for waits this long before it is dropped.
const ROOM_WAIT_MS: u8 = 10;
/// How often an agent without a launcher looks whether its namespace is still there.
const PRESENCE_CHECK: Duration = Duration::from_millis(500);
/// How long a hand-over waits for DNS answers that are on their way; nearly all come within milliseconds.
const DNS_QUIET: Duration = Duration::from_secs(2);
/// Events per wait.
const EVENTS: usize = 32;
/// IoSlices per injected packet: the vnet header and every part of a train.
const PARTS: usize = 1 + MAX_SEGMENTS;
/// For sockets that are read and written until nothing moves.
const EDGES: EpollFlags =
    EpollFlags::EPOLLIN.union(EpollFlags::EPOLLOUT).union(EpollFlags::EPOLLRDHUP).union(EpollFlags::EPOLLET);

/// What the loop needs; made by the agent's bring-up.
pub(super) struct Kernel {
    pub(super) state: StateFile,
    pub(super) tun: Arc<Tun>,
    /// By own address.
    pub(super) sockets: Vec<(IpAddr, TunnelSocket)>,
    pub(super) raw: Option<RawInjector>,
    pub(super) applier: Applier,
    pub(super) watch: Watch,
    pub(super) helper: Option<(OwnedFd, Vec<OwnedFd>)>,
    pub(super) arp: Option<ArpResponder>,
    pub(super) queries: Queries,
    pub(super) spin: Spin,
}

/// Who the agent is to launchers, and what it was told.
pub(super) struct Session {
    /// None: the launcher is gone.
    pub(super) channel: Option<AgentChannel>,
    pub(super) listener: OwnedFd,
    pub(super) presence: Presence,
    pub(super) fingerprint: [u8; 32],
    pub(super) executable: Executable,
    /// A predecessor still reads.
    pub(super) parked: bool,
}

impl Session {
    /// Says something to the launcher, if there is one. A launcher that does not read is no reason to wait.
    pub(super) fn tell(&self, message: &FromAgent, descriptors: &[BorrowedFd<'_>]) {
        let Some(channel) = &self.channel else { return };
        match channel.try_send(message, descriptors) {
            Ok(true) | Err(ChannelError::Closed) => {}
            Ok(false) => warn!("the launcher does not read: a message is lost"),
            Err(error) => warn!(%error, "cannot speak to the launcher"),
        }
    }
}

/// Who a ready descriptor belongs to.
#[derive(Clone, Copy, Debug)]
enum Source {
    Tun,
    Socket(usize),
    Launchers,
    Channel,
    Applier,
    Helper,
    Listener(usize),
    Arp,
    Watch,
    Query(QueryId),
    Stream(StreamId),
}

/// The loop's state.
pub(super) struct Driver {
    engine: Engine,
    kernel: Kernel,
    session: Session,
    listeners: Vec<TcpListener>,
    streams: Streams,
    sources: Sources,
    query_tokens: BTreeMap<QueryId, u64>,
    /// The directory that is applied.
    generation: Option<u64>,
    /// The one that is being applied.
    committing: Option<u64>,
    /// The directory's routes are in place.
    ready: bool,
    /// The launcher knows it.
    announced: bool,
    /// Packets are read.
    reading: bool,
    /// Without a launcher: when to look whether the namespace is still there.
    look_at: Option<Instant>,
    /// The launcher ordered to hand over: until when DNS answers are waited for.
    hand_over_by: Option<Instant>,
    /// None after `tenc0` was lost, until there is a new one.
    tun_token: Option<u64>,
    /// A check was ordered and is not done.
    checking: bool,
    tampering: TamperCounts,
    /// Bytes read in this turn.
    moved: usize,
}

/// Why the loop ended.
pub(super) enum End {
    /// The launcher said so.
    Stop,
    /// Before it was ready, the kernel refused what it needs.
    Failed(anyhow::Error),
    /// Nobody is left to protect.
    NamespaceGone,
    /// A successor goes on with what the engine exports.
    HandOver,
    /// Parked, and the launcher that would have said when to go on is gone.
    Abandoned,
}

impl Driver {
    /// Takes over everything; nothing is read before [`Self::run`].
    ///
    /// # Errors
    /// epoll(7) is not to be had.
    pub(super) fn new(engine: Engine, mut kernel: Kernel, session: Session) -> anyhow::Result<Self> {
        let mut listeners = Vec::new();
        if let Some((_, fds)) = &mut kernel.helper {
            for fd in fds.drain(..) {
                listeners.push(listener(fd).context("listener of the DNS helper")?);
            }
        }
        let mut driver = Self {
            engine,
            kernel,
            session,
            listeners,
            streams: Streams::new(),
            sources: Sources::new().context("epoll")?,
            query_tokens: BTreeMap::new(),
            generation: None,
            committing: None,
            ready: false,
            announced: false,
            reading: false,
            look_at: None,
            hand_over_by: None,
            tun_token: None,
            checking: false,
            tampering: TamperCounts::default(),
            moved: 0,
        };
        driver.watch_control().context("watch the agent's descriptors")?;
        Ok(driver)
    }

    /// Everything but what packets and DNS come through.
    fn watch_control(&mut self) -> nix::Result<()> {
        if let Some(channel) = &self.session.channel {
            self.sources.add(Source::Channel, channel.as_fd(), EpollFlags::EPOLLIN)?;
        }
        self.sources.add(Source::Applier, self.kernel.applier.as_fd(), EpollFlags::EPOLLIN)?;
        if let Some(arp) = &self.kernel.arp {
            self.sources.add(Source::Arp, arp.as_fd(), EpollFlags::EPOLLIN)?;
        }
        for fd in self.kernel.watch.descriptors() {
            self.sources.add(Source::Watch, fd, EpollFlags::EPOLLIN)?;
        }
        Ok(())
    }

    /// From here on packets are read: what waited in the kernel first.
    fn start_reading(&mut self) -> anyhow::Result<()> {
        let token = self.sources.add(Source::Tun, self.kernel.tun.as_fd(), EpollFlags::EPOLLIN);
        self.tun_token = Some(token.context("watch tenc0")?);
        let mut all: Vec<(Source, BorrowedFd<'_>)> = Vec::new();
        all.extend(self.kernel.sockets.iter().enumerate().map(|(i, s)| (Source::Socket(i), s.1.as_fd())));
        all.extend(self.kernel.helper.iter().map(|(tun, _)| (Source::Helper, tun.as_fd())));
        all.extend(self.listeners.iter().enumerate().map(|(i, l)| (Source::Listener(i), l.as_fd())));
        for (source, fd) in all {
            self.sources.add(source, fd, EpollFlags::EPOLLIN).context("watch the packets' descriptors")?;
        }
        self.reading = true;
        Ok(())
    }

    /// Runs until the launcher says stop.
    ///
    /// # Errors
    /// A descriptor that the agent cannot do without failed: everything stays closed.
    pub(super) fn run(&mut self) -> anyhow::Result<End> {
        let mut events = [EpollEvent::empty(); EVENTS];
        if let Err(error) = sched::set_slice(SLICE) {
            debug!(%error, "the kernel's own time slice stays");
        }
        let mut now = clocks();
        loop {
            let count = match self.wait(&mut events, now) {
                Ok(count) => count,
                Err(nix::Error::EINTR) => 0,
                Err(error) => return Err(error).context("wait for events"),
            };
            now = clocks();
            for event in &events[..count] {
                let Some(source) = self.sources.get(event.data()) else { continue };
                if let Some(end) = self.handle(source, event.data(), now)? {
                    return self.finish(end, now);
                }
                self.drain()?;
            }
            self.handle_captured(TURN_BYTES, now)?;
            if self.engine.poll_timeout().is_some_and(|at| at <= now.instant) {
                self.engine.handle_timeout(now);
                self.note_committed();
            }
            self.streams.handle_timeout(now.instant);
            if !self.checking && self.ready && !self.session.parked && self.kernel.watch.take_due(now.instant)
            {
                self.checking = true;
                self.kernel.applier.check();
            }
            self.drain()?;
            self.report_ready()?;
            if let Some(end) = self.end_if_due(now.instant) {
                return self.finish(end, now);
            }
        }
    }

    /// Waits for events or the next timer: awake for a moment where that has paid lately, then asleep.
    /// `now`: when the turn began.
    fn wait(&mut self, events: &mut [EpollEvent], now: Now) -> nix::Result<usize> {
        let epoll = &self.sources.epoll;
        if std::mem::take(&mut self.moved) > LOAD {
            self.kernel.spin.forget();
        }
        if self.engine.has_captured() {
            // Who was woken by what this turn sent goes first. That costs a sixth of the throughput: only where one gains.
            if self.engine.has_quiet_flow(now) {
                std::thread::yield_now();
            }
            return epoll.wait(events, EpollTimeout::ZERO);
        }
        let timeout = self.timeout();
        if !self.kernel.spin.is_on() {
            return epoll.wait(events, timeout);
        }
        let begun = Instant::now();
        if let Some(limit) = self.kernel.spin.limit() {
            while begun.elapsed() < limit {
                let count = epoll.wait(events, EpollTimeout::ZERO)?;
                if count > 0 {
                    self.kernel.spin.note(begun.elapsed());
                    return Ok(count);
                }
                std::hint::spin_loop();
            }
        }
        let count = epoll.wait(events, timeout)?;
        self.kernel.spin.note(begun.elapsed());
        Ok(count)
    }

    /// What was read already goes its way first.
    fn finish(&mut self, end: End, now: Now) -> anyhow::Result<End> {
        if matches!(end, End::Stop | End::HandOver) {
            self.handle_captured(usize::MAX, now)?;
            self.drain()?;
        }
        Ok(end)
    }

    fn end_if_due(&mut self, now: Instant) -> Option<End> {
        if self.look_at.is_some_and(|at| at <= now) {
            self.look_at = Some(now + PRESENCE_CHECK);
            self.kernel.state.write_counters(self.engine.counters());
            if self.session.presence.is_gone() {
                return Some(End::NamespaceGone);
            }
        }
        self.hand_over_by.is_some_and(|by| by <= now || self.is_dns_idle()).then_some(End::HandOver)
    }

    fn timeout(&self) -> EpollTimeout {
        let checks = !self.checking && self.ready && !self.session.parked;
        let check = checks.then(|| self.kernel.watch.poll_timeout());
        let own =
            [self.engine.poll_timeout(), self.streams.poll_timeout(), check, self.look_at, self.hand_over_by];
        let due = own.into_iter().flatten().min();
        let Some(due) = due else { return EpollTimeout::NONE };
        // Rounded up: waking before a timer is due would only find nothing to do.
        let wait = due.saturating_duration_since(Instant::now()) + Duration::from_micros(999);
        EpollTimeout::try_from(wait).unwrap_or(EpollTimeout::MAX)
    }

    fn handle(&mut self, source: Source, token: u64, now: Now) -> anyhow::Result<Option<End>> {
        match source {
            Source::Tun => self.read_tun(now),
            Source::Watch => self.kernel.watch.drain(now.instant),
            Source::Socket(index) => self.read_socket(index, now)?,
            Source::Launchers => self.accept_launcher(token)?,
            // One commit after the other.
            Source::Channel if self.engine.is_committing() => {}
            Source::Channel => return self.read_channel(token, now),
            Source::Applier => return Ok(self.read_applied(now)),
            Source::Helper => self.read_helper(),
            Source::Listener(index) => self.accept(index),
            Source::Arp => {
                if let Some(arp) = &self.kernel.arp {
                    let engine = &self.engine;
                    if let Err(error) = arp.answer(|address| engine.is_protected(address.into())) {
                        debug!(%error, "cannot answer ARP");
                    }
                }
            }
            Source::Query(query) => self.read_query(query, now),
            Source::Stream(stream) => self.pump(stream, now),
        }
        Ok(None)
    }

    /// Faster than it is dealt with: what the kernel's queue holds, the engine cannot put in order.
    fn read_tun(&mut self, now: Now) {
        for _ in 0..TURN {
            let Some(buffer) = self.engine.capture_buffer() else { return };
            match self.kernel.tun.read(buffer) {
                Ok(len) => {
                    self.moved += len;
                    self.engine.handle_captured(len);
                }
                Err(error) if is_transient(&error) => break,
                Err(error) if error.raw_os_error() == Some(libc::EBADFD) => {
                    self.lose_tun(now.instant);
                    break;
                }
                // One packet that the kernel cannot describe; it is consumed.
                Err(error) => {
                    debug!(%error, "packet not read");
                    self.engine.count_unread();
                }
            }
        }
    }

    /// Deals with about so many bytes of what was captured.
    fn handle_captured(&mut self, bytes: usize, now: Now) -> anyhow::Result<()> {
        let mut left = bytes;
        while left > 0 {
            let Some(outcome) = self.engine.poll_captured(now) else { break };
            if outcome == Captured::DnsStream {
                self.pass_to_helper();
            }
            left = left.saturating_sub(self.engine.captured().len());
            // Small packets for one peer share a send.
            if self.engine.has_full_train() {
                self.drain()?;
            }
        }
        Ok(())
    }

    fn read_socket(&mut self, index: usize, now: Now) -> anyhow::Result<()> {
        let mut left = TURN_BYTES;
        while left > 0 {
            match self.kernel.sockets[index].1.recv(self.engine.receive_buffer()) {
                Ok(received) => {
                    self.moved += received.len;
                    left = left.saturating_sub(received.len.max(TURN_BYTES / TURN));
                    self.engine.handle_datagrams(received.from, received.len, received.segment, now);
                    self.drain()?;
                }
                Err(error) if is_transient(&error) => break,
                // An ICMP error about something we sent; the next read goes on.
                Err(error) => debug!(%error, "tunnel socket"),
            }
        }
        Ok(())
    }

    /// The pod's TCP segments for port 53 end in the helper namespace.
    fn pass_to_helper(&mut self) {
        let captured = self.engine.captured();
        let helper = self.kernel.helper.as_ref();
        if helper.is_none_or(|(helper, _)| nix::unistd::write(helper, captured).is_err()) {
            self.engine.count_unpassed();
        }
    }

    /// And what the helper's stack answers goes to the pod, as it is.
    fn read_helper(&mut self) {
        for _ in 0..TURN {
            let Some((helper, _)) = &self.kernel.helper else { return };
            let Some(buffer) = self.engine.capture_buffer() else { return };
            let Ok(len) = nix::unistd::read(helper, buffer) else { return };
            let Some((burst, packets)) = self.engine.handle_helper(len) else { continue };
            if self.kernel.tun.write_vectored(&[IoSlice::new(burst)]).is_err() {
                self.engine.count_uninjected(Origin::Agent, packets);
            }
        }
    }

    fn accept(&mut self, index: usize) {
        for _ in 0..ACCEPTED {
            let Ok((client, _)) = self.listeners[index].accept() else { return };
            match self.streams.accept(client, &mut self.kernel.queries) {
                Ok((stream, fds)) => {
                    for fd in fds {
                        if let Err(error) = self.sources.add(Source::Stream(stream), fd, EDGES) {
                            warn!(%error, "cannot watch a DNS connection");
                        }
                    }
                    self.engine.count_stream();
                }
                Err(error) => debug!(%error, "DNS connection refused"),
            }
        }
    }

    fn pump(&mut self, stream: StreamId, now: Now) {
        let engine = &mut self.engine;
        self.streams.pump(stream, |message| engine.handle_stream_answer(stream, message, now));
        self.forget_closed_streams();
    }

    fn forget_closed_streams(&mut self) {
        let streams = &self.streams;
        let is_closed = |source: &Source| matches!(source, Source::Stream(id) if !streams.contains(*id));
        self.sources.by_token.retain(|_, source| !is_closed(source));
    }

    fn read_query(&mut self, query: QueryId, now: Now) {
        for _ in 0..TURN {
            match self.kernel.queries.read(query) {
                Answer::Message(message) => self.engine.handle_dns_answer(query, message, now),
                Answer::Refused => self.engine.handle_dns_refused(query),
                Answer::Nothing => return,
            }
            if !self.engine.is_dns_pending(query) {
                return self.close_query(query);
            }
        }
    }

    fn close_query(&mut self, query: QueryId) {
        if let Some(token) = self.query_tokens.remove(&query) {
            self.sources.remove(token);
        }
        self.kernel.queries.close(query);
    }

    fn read_applied(&mut self, now: Now) -> Option<End> {
        while let Some(done) = self.kernel.applier.poll() {
            let applied: Applied = match done {
                Done::Applied(applied) => applied,
                Done::Checked(checked) if checked.pod_link_gone => {
                    self.session.tell(&FromAgent::LinkGone, &[]);
                    return Some(End::NamespaceGone);
                }
                Done::Checked(checked) => {
                    self.handle_checked(checked, now);
                    continue;
                }
            };
            let ok = applied.outcome.is_ok();
            self.engine.count_destroyed(applied.ended.preexisting, applied.ended.gone);
            self.engine.count_unpinned(applied.ended.unpinned);
            self.engine.refuse_older_flows(applied.ended.undestroyed);
            if let Err(error) = applied.outcome {
                if !self.ready {
                    return Some(End::Failed(error.context("protect the project's addresses")));
                }
                warn!(error = format!("{error:#}"), "route change refused, trying again");
            }
            self.engine.handle_applied(applied.id, ok, now);
        }
        None
    }

    fn handle_checked(&mut self, checked: Checked, now: Now) {
        self.checking = false;
        if let Some(mtu) = checked.link_mtu {
            self.engine.set_link_mtu(mtu);
        }
        for kind in &checked.repaired {
            warn!(kind = kind.as_str(), "tampering repaired");
        }
        for kind in self.tampering.record(&checked.repaired, &checked.standing) {
            warn!(kind = kind.as_str(), "tampering that stays");
        }
        // Asked for at every check until it helps. The checks keep the pace: a load makes the next one due.
        if !checked.after_load && checked.standing.iter().any(|kind| kind.needs_reload()) {
            self.session.tell(&FromAgent::GuardLost, &[]);
        }
        if let Some(tun) = checked.new_tun {
            self.replace_tun(tun, now.instant);
        }
    }

    /// The descriptor is dead: it is not asked again; the check makes a new device.
    fn lose_tun(&mut self, now: Instant) {
        if let Some(token) = self.tun_token.take() {
            // A descriptor that cannot be forgotten is closed when it is replaced.
            let _ = self.sources.epoll.delete(&self.kernel.tun);
            self.sources.remove(token);
        }
        self.kernel.watch.note(now);
    }

    /// Reads and writes another `tenc0` from now on.
    fn replace_tun(&mut self, tun: Arc<Tun>, now: Instant) {
        self.lose_tun(now);
        self.kernel.tun = tun;
        match self.sources.add(Source::Tun, self.kernel.tun.as_fd(), EpollFlags::EPOLLIN) {
            Ok(token) => self.tun_token = Some(token),
            // Nothing is read any more: closed.
            Err(error) => warn!(%error, "cannot watch the new tenc0"),
        }
        // The launcher's duplicate of the old descriptor keeps the old device alive until it has this one.
        self.session.tell(&FromAgent::TunReplaced, &[self.kernel.tun.as_fd()]);
    }

    /// One message per turn, and what stands behind an order to hand over: each may be 16 KiB of changes.
    fn read_channel(&mut self, token: u64, now: Now) -> anyhow::Result<Option<End>> {
        loop {
            let Some(channel) = &self.session.channel else { return Ok(None) };
            match channel.try_recv() {
                Ok(Some(Received::Message(message, descriptors))) => {
                    // Nothing is handed over to a launcher that has died meanwhile: its end may stand behind the order.
                    let reads_on = matches!(message, ToAgent::HandOver);
                    let end = self.obey(message, descriptors, now)?;
                    if !reads_on || end.is_some() {
                        return Ok(end);
                    }
                }
                Ok(Some(Received::Closed)) => return self.lose_launcher(token, now),
                Ok(None) => return Ok(None),
                // Something that it relies on may be lost, and it is told so: a launcher replaces an agent that hangs up.
                Err(error) => {
                    warn!(%error, "message of the launcher refused: the agent hangs up");
                    return self.lose_launcher(token, now);
                }
            }
        }
    }

    fn obey(
        &mut self,
        message: ToAgent,
        mut descriptors: Vec<OwnedFd>,
        now: Now,
    ) -> anyhow::Result<Option<End>> {
        match message {
            ToAgent::Hello { .. } => self.session.tell(&FromAgent::Hello { version: VERSION }, &[]),
            ToAgent::Adopt => {
                info!("another launcher takes over");
                self.announced = false;
            }
            ToAgent::Init(_) => warn!("second Init ignored"),
            ToAgent::Changes(changes) => self.engine.handle_changes(changes),
            ToAgent::Commit { generation, whole } => {
                debug!(generation, whole, "directory changes");
                self.committing = Some(generation);
                self.engine.commit(whole, now);
                self.note_committed();
            }
            ToAgent::Ping => {
                self.kernel.state.write_counters(self.engine.counters());
                self.session.tell(&FromAgent::Pong, &[]);
            }
            ToAgent::Report => {
                let sockets = self.kernel.sockets.iter().map(|(_, socket)| socket);
                for message in report::make(&self.engine, self.generation, sockets, &self.tampering, now) {
                    self.session.tell(&message, &[]);
                }
            }
            ToAgent::HandOver => self.hand_over_by = Some(now.instant + DNS_QUIET),
            ToAgent::Resume => self.resume(descriptors.pop(), now)?,
            ToAgent::GuardLoaded { skeleton } => self.kernel.applier.guard_loaded(skeleton),
            ToAgent::Stop => return Ok(Some(End::Stop)),
        }
        Ok(None)
    }

    /// The directory is of the generation that was committed when all of that is applied.
    fn note_committed(&mut self) {
        if !self.engine.is_committing() {
            self.generation = self.committing.take().or(self.generation);
        }
    }

    /// The launcher died. What is protected stays protected, and another launcher may come.
    fn lose_launcher(&mut self, token: u64, now: Now) -> anyhow::Result<Option<End>> {
        if let Some(channel) = self.session.channel.take() {
            self.sources.epoll.delete(&channel).context("forget the channel")?;
        }
        self.sources.remove(token);
        // Half a directory counts for nothing, and nobody would make a successor go on.
        self.engine.forget_changes();
        self.hand_over_by = None;
        if self.session.parked {
            return Ok(Some(End::Abandoned));
        }
        warn!("launcher is gone: the directory is not updated any more");
        self.look_at = Some(now.instant);
        let launchers = self.session.listener.as_fd();
        self.sources.add(Source::Launchers, launchers, EpollFlags::EPOLLIN).context("wait for a launcher")?;
        Ok(None)
    }

    fn accept_launcher(&mut self, token: u64) -> anyhow::Result<()> {
        let channel = match control::accept(&self.session.listener) {
            Ok(Some(channel)) => channel,
            Ok(None) => return Ok(()),
            Err(error) => {
                warn!(%error, "a launcher could not connect");
                return Ok(());
            }
        };
        self.sources
            .add(Source::Channel, channel.as_fd(), EpollFlags::EPOLLIN)
            .context("watch the channel")?;
        self.sources.epoll.delete(&self.session.listener).context("close the door")?;
        self.sources.remove(token);
        self.session.channel = Some(channel);
        self.look_at = None;
        Ok(())
    }

    fn is_dns_idle(&self) -> bool {
        self.engine.is_dns_idle() && self.query_tokens.is_empty() && self.streams.is_empty()
    }

    /// The predecessor has ended: what it handed over, or else what it wrote down, is gone on with.
    fn resume(&mut self, state: Option<OwnedFd>, now: Now) -> anyhow::Result<()> {
        if !std::mem::take(&mut self.session.parked) {
            warn!("Resume without a predecessor ignored");
            return Ok(());
        }
        let state = state.context("nothing was handed over").and_then(|fd| Ok(handover::open(fd)?));
        if let Err(error) = state.and_then(|bytes| Ok(self.engine.import(&bytes, now)?)) {
            warn!(error = format!("{error:#}"), "sessions are made anew");
            self.engine.restore(&self.kernel.state.reread(), now);
            self.engine.handle_directory(Vec::new(), now);
        }
        self.start_reading()
    }

    /// Hands out everything the engine has. What a successor has to know is written before anything else happens.
    fn drain(&mut self) -> anyhow::Result<()> {
        if !self.session.parked {
            while let Some(record) = self.engine.poll_record() {
                self.kernel.state.write(record);
            }
        }
        while let Some(batch) = self.engine.poll_batch() {
            self.kernel.applier.submit(batch);
        }
        while let Some(forward) = self.engine.poll_forward() {
            let query = forward.query;
            match self.kernel.queries.forward(forward) {
                Ok(fd) => {
                    let source = Source::Query(query);
                    let token = self.sources.add(source, fd, EpollFlags::EPOLLIN).context("watch a query")?;
                    self.query_tokens.insert(query, token);
                }
                Err(error) => {
                    debug!(error = format!("{error:#}"), "cannot forward a query");
                    self.engine.count_unforwarded();
                    self.engine.handle_dns_refused(query);
                }
            }
        }
        while let Some(query) = self.engine.poll_expired_query() {
            self.close_query(query);
        }
        while let Some(stream) = self.engine.poll_broken_stream() {
            self.streams.close(stream);
            self.forget_closed_streams();
        }
        while let Some((stream, message)) = self.engine.poll_stream() {
            self.streams.answer(stream, &message);
            // Room was made: the resolver's next messages may be read.
            self.pump(stream, clocks());
        }
        // Until then the sockets are the predecessor's.
        if !self.session.parked {
            self.transmit();
        }
        self.inject()
    }

    fn transmit(&mut self) {
        let mut refused = 0;
        while let Some(transmit) = self.engine.poll_transmit() {
            let socket =
                self.kernel.sockets.iter_mut().find(|(own, _)| own.is_ipv4() == transmit.to.is_ipv4());
            let lost = match socket {
                Some((_, socket)) => send_all(socket, transmit.to, transmit.bytes, transmit.segment),
                None => transmit.bytes.len().div_ceil(transmit.segment.max(1)) as u64,
            };
            refused += if transmit.packets { lost } else { 0 };
        }
        if refused > 0 {
            self.engine.count_unsent(refused);
        }
    }

    fn inject(&mut self) -> anyhow::Result<()> {
        while let Some(packet) = self.engine.poll_inject() {
            let (origin, packets) = (packet.origin, packet.packets);
            let taken = match &self.kernel.raw {
                None => {
                    let header = packet.vnet.encode();
                    let mut parts = [IoSlice::new(&[]); PARTS];
                    match parts.get_mut(..=packet.parts.len()) {
                        Some(parts) => {
                            parts[0] = IoSlice::new(&header[..VNET_HEADER_LEN]);
                            for (slot, range) in parts[1..].iter_mut().zip(packet.parts) {
                                *slot = IoSlice::new(&packet.buffer[range.clone()]);
                            }
                            write_all(&self.kernel.tun, parts)
                        }
                        // Refused rather than cut.
                        None => Err(io::ErrorKind::InvalidInput.into()),
                    }
                }
                Some(raw) => {
                    let mut whole: Vec<u8> = Vec::new();
                    packet
                        .parts
                        .iter()
                        .for_each(|range| whole.extend_from_slice(&packet.buffer[range.clone()]));
                    raw.inject(&mut whole, packet.vnet.partial_checksum)
                }
            };
            match taken {
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(libc::EBADFD) => {
                    self.engine.count_uninjected(origin, packets);
                    self.kernel.watch.note(Instant::now());
                }
                Err(error) => {
                    debug!(%error, "packet not injected");
                    self.engine.count_uninjected(origin, packets);
                }
            }
        }
        Ok(())
    }

    /// The directory's routes are in place: packets are read from here on, and the launcher is told.
    fn report_ready(&mut self) -> anyhow::Result<()> {
        // Once ready, always: a change that the kernel refuses is tried again, and keeps no launcher waiting.
        let ready = self.ready || self.engine.is_settled();
        let Some(generation) = self.generation.filter(|_| !self.announced && ready) else { return Ok(()) };
        if !std::mem::replace(&mut self.ready, true) {
            info!(generation, "protected");
        }
        if !self.reading && !self.session.parked {
            self.start_reading()?;
        }
        let mut kept = vec![self.kernel.tun.as_fd()];
        kept.extend(self.kernel.sockets.iter().map(|(_, socket)| socket.as_fd()));
        let Session { fingerprint, executable, .. } = self.session;
        self.session.tell(&FromAgent::Ready { generation, fingerprint, executable }, &kept);
        self.announced = true;
        Ok(())
    }

    /// Ends the control thread, closes every descriptor but those towards launchers.
    pub(super) fn dismantle(mut self) -> (Session, Engine) {
        self.kernel.state.write_counters(self.engine.counters());
        self.kernel.applier.finish();
        (self.session, self.engine)
    }
}

/// Every descriptor that is waited for, by the token its events bear.
struct Sources {
    epoll: Epoll,
    by_token: BTreeMap<u64, Source>,
    next: u64,
}

impl Sources {
    fn new() -> nix::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        Ok(Self { epoll, by_token: BTreeMap::new(), next: 0 })
    }

    /// Waits for `flags` of `fd`; a closed descriptor leaves by itself, its token by [`Self::remove`].
    fn add(&mut self, source: Source, fd: BorrowedFd<'_>, flags: EpollFlags) -> nix::Result<u64> {
        let token = self.next;
        self.next += 1;
        self.epoll.add(fd, EpollEvent::new(flags, token))?;
        self.by_token.insert(token, source);
        Ok(token)
    }

    fn remove(&mut self, token: u64) {
        self.by_token.remove(&token);
    }

    fn get(&self, token: u64) -> Option<Source> {
        self.by_token.get(&token).copied()
    }
}

/// Sends a train; returns how many datagrams the kernel refused.
fn send_all(socket: &mut TunnelSocket, to: SocketAddr, mut bytes: &[u8], segment: usize) -> u64 {
    let size = u16::try_from(segment).ok();
    loop {
        let error = match socket.send(to, bytes, size) {
            Ok(()) => return 0,
            Err(error) => error,
        };
        bytes = &bytes[error.sent.min(bytes.len())..];
        if error.source.kind() != io::ErrorKind::WouldBlock || !has_room(socket.as_fd()) {
            debug!(error = %error.source, %to, "datagrams not sent");
            return bytes.len().div_ceil(segment.max(1)) as u64;
        }
    }
}

fn write_all(tun: &Tun, parts: &[IoSlice<'_>]) -> io::Result<()> {
    loop {
        match tun.write_vectored(parts) {
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && has_room(tun.as_fd()) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Waits a moment for the kernel to take more.
fn has_room(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::POLLOUT)];
    poll(&mut fds, PollTimeout::from(ROOM_WAIT_MS)).is_ok_and(|ready| ready > 0)
}

fn is_transient(error: &io::Error) -> bool {
    // EIO: the device is down for a moment; what the pod sends meanwhile is refused by the kernel.
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
        || error.raw_os_error() == Some(libc::EIO)
}

pub(super) fn clocks() -> Now {
    let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Now { instant: Instant::now(), wall }
}
