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
//!
//! What the engine polls goes out in `output`; `launcher` is what launchers say; `sources` are the descriptors.

mod launcher;
mod output;
mod sources;

use std::collections::BTreeMap;
use std::io::{self, IoSlice};
use std::net::{IpAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use nix::sys::epoll::{EpollEvent, EpollFlags, EpollTimeout};
use tracing::{debug, warn};

pub(super) use launcher::Session;
use sources::{Source, Sources};

use super::applier::{Applied, Applier, Checked, Done};
use super::dns::{Answer, Queries, Streams, listener};
use super::guard::Asks;
use super::neighbour::ArpResponder;
use super::raw_socket::RawInjector;
use super::spin::Spin;
use super::state::StateFile;
use super::tun::Tun;
use super::udp::TunnelSocket;
use super::watch::{TamperCounts, Tampering, Watch};
use crate::control::{ASKED_MAX, FromAgent};
use crate::proto::dns::{QueryId, StreamId};
use crate::proto::{Captured, Engine, Now, Origin};

/// Bursts taken from one descriptor before the others get their turn.
const TURN: usize = 64;
/// Bytes, too, in each direction: two super-packets, so that what a quiet flow sends waits for no more than their work.
const TURN_BYTES: usize = 80 << 10;
/// A turn that moved more than this is one of a load: the wait after it is not spent awake.
const LOAD: usize = 16 << 10;
/// DNS connections taken per turn: each opens another one.
const ACCEPTED: usize = 8;
/// How often an agent without a launcher looks whether its namespace is still there.
const PRESENCE_CHECK: Duration = Duration::from_millis(500);
/// Between two requests to guard the devices of the pod.
const HOOKS_AGAIN: Duration = Duration::from_secs(1);
/// Events per wait.
const EVENTS: usize = 32;
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
    pub(super) asks: Option<Asks>,
    /// Addresses that sockets of the pod named at the start.
    pub(super) spoken_to: Vec<IpAddr>,
    pub(super) helper: Option<(OwnedFd, Vec<OwnedFd>)>,
    pub(super) arp: Option<ArpResponder>,
    pub(super) queries: Queries,
    pub(super) spin: Spin,
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
    /// A whole directory whose place the launcher waits for.
    confirming: Option<u64>,
    /// Addresses that sockets of the pod named at the start, and that the launcher is still to be asked about.
    spoken_to: Vec<IpAddr>,
    /// Former addresses whose time was over, as far as that was told.
    retired: u64,
    /// A check was ordered and is not done.
    checking: bool,
    /// When the launcher was last asked to guard devices that came.
    hooks_asked_at: Option<Instant>,
    /// The launcher loads the guard: until then its rules may be others than were known.
    guard_loading_until: Option<Instant>,
    /// A look at the addresses that the guard met was ordered and is not done.
    reading_asked: bool,
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
        let spoken_to = std::mem::take(&mut kernel.spoken_to);
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
            confirming: None,
            spoken_to,
            retired: 0,
            hooks_asked_at: None,
            guard_loading_until: None,
            checking: false,
            reading_asked: false,
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
        if let Some(asks) = &self.kernel.asks {
            self.sources.add(Source::Asks, asks.as_fd(), EpollFlags::EPOLLIN)?;
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
        self.listen_for_asks();
        Ok(())
    }

    /// Hears of unknown addresses from here on. Tried again with every check.
    fn listen_for_asks(&mut self) {
        if let Some(Err(error)) = self.kernel.asks.as_mut().map(Asks::listen) {
            warn!(%error, "cannot hear of addresses that the guard drops: they are not asked about");
        }
    }

    /// Runs until the launcher says stop.
    ///
    /// # Errors
    /// A descriptor that the agent cannot do without failed: everything stays closed.
    pub(super) fn run(&mut self) -> anyhow::Result<End> {
        let mut events = [EpollEvent::empty(); EVENTS];
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
                self.listen_for_asks();
            }
            self.ask_about_sockets(now);
            self.drain()?;
            self.report_ready()?;
            self.report_committed();
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
            Source::Asks => self.hear_asks(),
            Source::Socket(index) => self.read_socket(index, now)?,
            Source::Launchers => self.accept_launcher(token, now)?,
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
            match self.streams.accept(client, &mut self.kernel.queries, &mut self.engine) {
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
        if let Some(socket) = self.kernel.queries.close(query) {
            self.engine.close_upstream(&socket);
        }
    }

    /// Asks about what the pod's programs speak to already, as many addresses at a time as the launcher is asked: they lose
    /// nothing when the guard opens.
    fn ask_about_sockets(&mut self, now: Now) {
        if !self.spoken_to.is_empty() && !self.engine.has_asks() {
            let rest = self.spoken_to.split_off(self.spoken_to.len().min(ASKED_MAX));
            let asked = std::mem::replace(&mut self.spoken_to, rest);
            self.engine.handle_asked(&asked, now);
        }
    }

    /// Without ranges an address whose time is over is the platform's again: said once each time.
    fn tell_retired(&mut self) {
        let retired = self.engine.retired();
        if retired > self.retired && self.session.learned {
            warn!(
                addresses = retired - self.retired,
                "former addresses of the project are spoken to in clear again"
            );
        }
        self.retired = retired;
    }

    /// The guard met addresses that nobody named: they are read, once for all events that have come.
    fn hear_asks(&mut self) {
        let heard = self.kernel.asks.as_ref().is_some_and(Asks::drain);
        if heard && !std::mem::replace(&mut self.reading_asked, true) {
            self.kernel.applier.read_asked();
        }
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
                Done::Asked(addresses) => {
                    self.reading_asked = false;
                    self.engine.handle_asked(&addresses, now);
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
            self.engine.handle_named(&applied.named, now);
            self.engine.handle_applied(applied.id, ok, now);
            self.tell_retired();
        }
        None
    }

    fn handle_checked(&mut self, mut checked: Checked, now: Now) {
        self.checking = false;
        if checked.filled.is_some() {
            self.guard_loading_until = None;
        } else if self.guard_loading_until.is_some_and(|until| now.instant < until) {
            checked.standing.retain(|kind| !kind.needs_reload());
        }
        self.kernel.watch.note_cost(checked.cost, now.instant);
        if let Some(mtu) = checked.link_mtu {
            self.engine.set_link_mtu(mtu);
        }
        for kind in &checked.repaired {
            if self.tampering.is_told(*kind, false, now.instant) {
                warn!(kind = kind.as_str(), "tampering repaired");
            }
        }
        for kind in self.tampering.record(&checked.repaired, &checked.standing) {
            if self.tampering.is_told(kind, true, now.instant) {
                warn!(kind = kind.as_str(), "tampering that stays");
            }
        }
        // Asked for at every check until it helps. The checks keep the pace: a load makes the next one due.
        match checked.filled {
            Some((skeleton, filled)) => {
                let generation = self.generation.unwrap_or(0);
                self.session.tell(&FromAgent::GuardFilled { generation, skeleton, filled }, &[]);
            }
            None if checked.standing.iter().any(|kind| kind.needs_reload()) => {
                self.session.tell(&FromAgent::GuardLost, &[]);
            }
            None if checked.standing.contains(&Tampering::GuardDevice) => self.ask_for_hooks(now.instant),
            None => {}
        }
        if let Some(tun) = checked.new_tun {
            self.replace_tun(tun, now.instant);
        }
    }

    /// Not with every check: the pod may have more devices than the guard takes.
    fn ask_for_hooks(&mut self, now: Instant) {
        if self.hooks_asked_at.is_none_or(|at| at + HOOKS_AGAIN <= now) {
            self.hooks_asked_at = Some(now);
            self.session.tell(&FromAgent::GuardDevice, &[]);
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

    fn is_dns_idle(&self) -> bool {
        self.engine.is_dns_idle() && self.query_tokens.is_empty() && self.streams.is_empty()
    }

    /// Ends the control thread, closes every descriptor but those towards launchers.
    pub(super) fn dismantle(mut self) -> (Session, Engine) {
        self.kernel.state.write_counters(self.engine.counters());
        self.kernel.applier.finish();
        (self.session, self.engine)
    }
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
