//! What launchers say to the agent, and what it tells them: one message after the other, a commit at a time.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::time::Duration;

use anyhow::Context as _;
use nix::sys::epoll::EpollFlags;
use tracing::{debug, info, warn};

use super::sources::Source;
use super::{Driver, End};
use crate::agent::presence::Presence;
use crate::agent::{handover, report};
use crate::control::{self, AgentChannel, ChannelError, Executable, FromAgent, Received, ToAgent, VERSION};
use crate::proto::Now;

/// How long a hand-over waits for DNS answers that are on their way; nearly all come within milliseconds.
const DNS_QUIET: Duration = Duration::from_secs(2);

/// How long the launcher may take from announcing that it loads the guard until it has done so.
const GUARD_LOAD: Duration = Duration::from_secs(2);

/// Who the agent is to launchers, and what it was told.
pub(in crate::agent) struct Session {
    /// None: the launcher is gone.
    pub(in crate::agent) channel: Option<AgentChannel>,
    pub(in crate::agent) listener: OwnedFd,
    pub(in crate::agent) presence: Presence,
    pub(in crate::agent) fingerprint: [u8; 32],
    pub(in crate::agent) executable: Executable,
    /// A predecessor still reads.
    pub(in crate::agent) parked: bool,
    /// There are no ranges: an address that nobody names is the platform's.
    pub(in crate::agent) learned: bool,
}

impl Session {
    /// Says something to the launcher, if there is one. A launcher that does not read is no reason to wait.
    pub(in crate::agent) fn tell(&self, message: &FromAgent, descriptors: &[BorrowedFd<'_>]) {
        let Some(channel) = &self.channel else { return };
        match channel.try_send(message, descriptors) {
            Ok(true) | Err(ChannelError::Closed) => {}
            Ok(false) => warn!("the launcher does not read: a message is lost"),
            Err(error) => warn!(%error, "cannot speak to the launcher"),
        }
    }
}

impl Driver {
    pub(super) fn accept_launcher(&mut self, token: u64, now: Now) -> anyhow::Result<()> {
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
        self.engine.handle_launcher(true, now);
        Ok(())
    }

    /// One message per turn, and what stands behind an order to hand over: each may be 16 KiB of changes.
    pub(super) fn read_channel(&mut self, token: u64, now: Now) -> anyhow::Result<Option<End>> {
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
                self.confirming = if whole { Some(generation) } else { self.confirming };
                self.engine.commit(whole, now);
                self.note_committed();
            }
            ToAgent::Classified(classes) => self.engine.handle_classified(classes, now),
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
            ToAgent::GuardLoading => self.guard_loading_until = Some(now.instant + GUARD_LOAD),
            ToAgent::GuardLoaded { skeleton } => self.kernel.applier.guard_loaded(skeleton),
            ToAgent::Stop => return Ok(Some(End::Stop)),
        }
        Ok(None)
    }

    /// The directory is of the generation that was committed when all of that is applied.
    pub(super) fn note_committed(&mut self) {
        if !self.engine.is_committing() {
            self.generation = self.committing.take().or(self.generation);
        }
    }

    /// The directory's routes are in place: packets are read from here on, and the launcher is told.
    pub(super) fn report_ready(&mut self) -> anyhow::Result<()> {
        // Once ready, always: a change that the kernel refuses is tried again, and keeps no launcher waiting.
        let is_asking = !self.spoken_to.is_empty() || self.engine.has_asks();
        let ready = self.ready || self.engine.is_settled() && !is_asking;
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

    /// A whole directory is in place: the launcher may open the guard.
    pub(super) fn report_committed(&mut self) {
        let in_place = self.announced && !self.engine.is_committing() && self.engine.is_settled();
        if let Some(generation) = self.confirming.filter(|_| in_place && !self.engine.has_asks()) {
            self.confirming = None;
            self.session.tell(&FromAgent::Committed { generation }, &[]);
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
        self.engine.handle_launcher(false, now);
        (self.hand_over_by, self.confirming) = (None, None);
        if self.session.parked {
            return Ok(Some(End::Abandoned));
        }
        warn!("launcher is gone: the directory is not updated any more");
        self.look_at = Some(now.instant);
        let launchers = self.session.listener.as_fd();
        self.sources.add(Source::Launchers, launchers, EpollFlags::EPOLLIN).context("wait for a launcher")?;
        Ok(None)
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
}
