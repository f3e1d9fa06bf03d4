//! Keeps exactly one agent in the pod: adopts it, watches it, replaces it, upgrades it.
//!
//! 1. [`Supervisor::start`] takes over the agent that an earlier launcher left, or starts one
//! 2. [`Supervisor::run`] hands on changes of the directory and asks for a sign of life every second
//! 3. an agent that ended, or is frozen and was killed for it, is replaced: its successor goes on with `tenc0` and the sockets
//!    that we hold, oldest packets first, and with the flows of the state file
//! 4. [`Supervisor::upgrade`]: the running agent hands flows, sessions and counters to its successor
//!
//! The guard is opened by an agent's own word alone: it has applied the directory that this launcher told it ([`Ready`]).
//! What the guard meets and the directory does not name the agent asks about; what was answered is corrected when it changes.
//!
//! A replaced agent has ended before its successor reads: no counter of a key is ever used twice. An agent that fails again
//! and again is started with growing pauses; the pod stays closed meanwhile. May touch: what [`super::agent`] may.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use tokio::net::UnixStream;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};
use tracing::{debug, info, warn};

use super::Plan;
use super::agent::{Adopted, Agent, AgentError, Ended, Event, Stop, end_stray_agents, told};
use super::dns_helper::{self, DnsHelper};
use super::files::Runtime;
use super::guard::{self, Door, Loaded, Ready};
use crate::control::{ASKED_MAX, Carried, FromAgent, ToAgent};
use crate::exit::{Exit, Failure};
use crate::fault::HASTE;
use crate::launcher::program::Program;
use crate::launcher::rate::Rate;
use crate::launcher::serve::StatusServer;
use crate::launcher::signals::{Order, Signals};
use crate::proto::mtu::tun_mtu;
use crate::proto::routing::Class;

/// From the agent's start to its `Ready`; thousands of routes take less than a second.
const READY_LIMIT: Duration = Duration::from_millis(10_000 / HASTE);
/// How often the namespace's name is looked up: nothing tells when it goes.
const GONE_CHECK: Duration = Duration::from_millis(200);
/// Signs of life that may be missing before an agent counts as frozen.
const MISSED_MAX: u32 = 2;
/// How often an agent is asked for one: an idle agent wakes for little else, less than once a second.
const HEARTBEAT: Duration = Duration::from_millis(1_500 / HASTE);
/// An agent may take this long to hand over: it waits for DNS answers on their way.
const HAND_OVER_LIMIT: Duration = Duration::from_millis(5_000 / HASTE);
/// Pause before an agent that ended soon after its start is started again; doubled each time.
const PAUSE: Duration = Duration::from_millis(50);
/// The longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// An agent that lived this long did not fail at its start.
const SETTLED: Duration = Duration::from_secs(5);

/// How often an agent can make us load the guard: this often at once, then once per interval.
const LOADS: u32 = 20;
const LOAD_EVERY: Duration = Duration::from_millis(100);

/// Addresses whose class an agent was told, and is told again when it changes.
const ANSWERED_MAX: usize = 8_192;

/// Messages that may wait for the agent when it asks something.
const ANSWERS_MAX: usize = 4_096;

/// Why supervision ended.
pub(in crate::launcher) enum End {
    /// By a signal that asks for everything to be removed.
    Ordered,
    /// By a signal that asks the launcher alone to go.
    Left,
    /// The namespace's name, path or process is gone.
    NamespaceGone,
    /// The agent cannot be ended or understood.
    Broken(anyhow::Error),
}

/// The agent of one pod and what it needs.
pub(in crate::launcher) struct Supervisor<'a> {
    pub(in crate::launcher) plan: &'a mut Plan,
    runtime: &'a Runtime,
    log_filter: &'a str,
    helper: Option<DnsHelper>,
    agent: Option<Agent>,
    /// What is still to be sent to the agent.
    queue: VecDeque<ToAgent>,
    /// `tenc0` and the sockets of an agent that ended.
    spare: Vec<OwnedFd>,
    /// The agent has to be ready by then; none: it is.
    ready_by: Option<Instant>,
    started: Instant,
    pause: Duration,
    /// When the next agent is started; none: one runs.
    start_at: Option<Instant>,
    /// Signs of life that are missing.
    missed: u32,
    /// The pod's device was deleted.
    link_gone: bool,
    /// The last agent ended before it was ready: the next one runs the launcher's own file, not the one on the disk.
    own_program: bool,
    /// Log lines that the agent causes.
    told: Rate,
    loads: Rate,
    /// When the guard is loaded again; none: the agent does not miss it.
    load_at: Option<Instant>,
    pub(in crate::launcher) door: Door,
    /// The skeleton that the agent was told of and has not filled yet.
    filling: Option<u64>,
    /// The newest whole directory that the agent was told.
    whole: u64,
    answered: BTreeMap<IpAddr, Class>,
    status: StatusServer,
}

impl<'a> Supervisor<'a> {
    pub(in crate::launcher) fn new(
        plan: &'a mut Plan,
        runtime: &'a Runtime,
        log_filter: &'a str,
        door: Door,
    ) -> Self {
        Self {
            plan,
            runtime,
            log_filter,
            helper: None,
            agent: None,
            queue: VecDeque::new(),
            spare: Vec::new(),
            ready_by: None,
            started: Instant::now(),
            pause: Duration::ZERO,
            start_at: None,
            missed: 0,
            link_gone: false,
            own_program: false,
            told: told(),
            loads: Rate::new(LOADS, LOAD_EVERY),
            load_at: None,
            door,
            filling: None,
            whole: 0,
            answered: BTreeMap::new(),
            status: StatusServer::default(),
        }
    }

    /// Ends when an agent protects the pod and the guard is open. To be awaited to its end.
    ///
    /// # Errors
    /// It could not be started, or did not become ready.
    pub(in crate::launcher) async fn start(&mut self) -> Result<(), Failure> {
        // A first bring-up that died left the pod open. It is closed before anything that can take its time: a frozen agent is
        // waited for.
        if self.door.found_any() && !self.door.is_open() {
            self.load(Door::prepare).map_err(Failure::kernel)?;
        }
        if let Some(channel) = self.runtime.connect().map_err(Failure::kernel)? {
            let identity = self.plan.netns.identity();
            if let Some((agent, adopted)) = Agent::adopt(channel, identity).await.map_err(Failure::kernel)? {
                self.end_strays(Some(agent.id())).await?;
                match self.take_over(agent, adopted).await {
                    Ok(()) => return Ok(()),
                    Err(error) => {
                        warn!(
                            error = format!("{error:#}"),
                            "the agent of an earlier launcher cannot be taken over and is replaced"
                        );
                        self.replace().await.map_err(Failure::kernel)?;
                    }
                }
            }
        }
        self.end_strays(None).await?;
        self.load(Door::prepare).map_err(Failure::kernel)?;
        self.spawn().await.map_err(Failure::kernel)?;
        let ready = self.wait_until_ready().await?;
        self.ready_by = None;
        self.open(&ready).map_err(Failure::kernel)
    }

    /// Ends agents that an earlier launcher left beside the one that continues.
    async fn end_strays(&self, kept: Option<i32>) -> Result<(), Failure> {
        if !self.door.found_any() {
            return Ok(());
        }
        end_stray_agents(self.plan.netns.identity(), kept).await.map_err(Failure::kernel)
    }

    /// Continues with the agent of an earlier launcher. The guard stays as it is until the agent has applied our directory.
    async fn take_over(&mut self, agent: Agent, adopted: Adopted) -> anyhow::Result<()> {
        info!(pid = agent.id(), "the agent of an earlier launcher continues");
        self.agent = Some(agent);
        self.started = Instant::now();
        if !self.door.is_open() {
            self.load(Door::prepare)?;
        }
        let same = adopted.fingerprint == self.plan.init.fingerprint()
            && Program::open().executable().is_ok_and(|next| next == adopted.executable);
        if !same {
            info!("it is of another build, or was told something else: it hands over to a new one");
            match self.upgrade().await {
                Ok(()) => return Ok(()),
                Err(error) => warn!(error = format!("{error:#}"), "it could not be replaced in order"),
            }
            anyhow::ensure!(self.agent.is_some(), "it ended while it handed over");
        }
        self.tell_everything();
        let ready = self.wait_until_ready().await.map_err(|failure| failure.error)?;
        self.open(&ready)?;
        Ok(())
    }

    /// Whatever became of the guard while there was no agent to see it.
    async fn start_again(&mut self) -> anyhow::Result<()> {
        self.load(Door::refresh)?;
        self.spawn().await
    }

    /// The agent is to know the whole directory.
    fn tell_everything(&mut self) {
        self.queue = self.plan.whole();
        self.whole = self.plan.generation();
    }

    /// Loads the guard through one of the ways of the door, for the devices that the pod has now.
    fn load(
        &mut self,
        way: impl FnOnce(&mut Door, &mut guard::Skeleton) -> Result<Loaded, guard::Error>,
    ) -> Result<(), guard::Error> {
        self.plan.look_around();
        if let Some(agent) = &self.agent {
            // One that cannot be told now takes the change for tampering, and says so.
            let _ = agent.send(&ToAgent::GuardLoading, &[]);
        }
        if let Loaded::WithoutEgress(reason) = way(&mut self.door, &mut self.plan.skeleton)? {
            warn!(reason, "no guard at the devices' egress: frames of packet sockets are not guarded");
        }
        Ok(())
    }

    /// Opens the guard; the agent takes its rules for the right ones.
    fn open(&mut self, ready: &Ready) -> Result<(), guard::Error> {
        self.load(|door, skeleton| door.open(skeleton, ready))?;
        self.tell_loaded();
        Ok(())
    }

    /// The agent is to fill the sets of the skeleton that was loaded last.
    fn tell_loaded(&mut self) {
        let skeleton = self.plan.skeleton.digest();
        self.filling = Some(skeleton);
        self.queue.push_back(ToAgent::GuardLoaded { skeleton });
    }

    /// Waits for the agent's word that the whole directory is in place; answers its questions meanwhile.
    async fn wait_until_ready(&mut self) -> Result<Ready, Failure> {
        let Self { agent, queue, plan, answered, whole, .. } = self;
        let agent = agent.as_mut().expect("there is one to wait for");
        await_ready(agent, queue, *whole, |asked| answer(plan, answered, asked)).await
    }

    /// Starts an agent and sends it everything but what makes it read: its `Ready` is still to come.
    async fn spawn(&mut self) -> anyhow::Result<()> {
        let agent = self.new_agent(false).await?;
        debug!(pid = agent.id(), "agent started");
        self.tell_everything();
        (self.filling, self.answered) = (None, BTreeMap::new());
        self.agent = Some(agent);
        self.started = Instant::now();
        self.ready_by = Some(self.started + READY_LIMIT);
        self.start_at = None;
        self.missed = 0;
        Ok(())
    }

    async fn new_agent(&mut self, parked: bool) -> anyhow::Result<Agent> {
        if self.helper.is_none() && !self.plan.resolvers.is_empty() {
            let mtu = tun_mtu(self.plan.network.mtu, &self.plan.addresses);
            self.helper = Some(dns_helper::open(&self.plan.resolvers, mtu)?);
        }
        let state = self.runtime.state()?;
        let mut carried: Vec<(Carried, BorrowedFd<'_>)> = vec![(Carried::State, state.as_fd())];
        carried.extend(self.plan.netns.process().map(|fd| (Carried::Process, fd)));
        let inherited = self.agent.as_ref().map_or(&self.spare[..], Agent::held);
        let kinds = [Carried::Tun].into_iter().chain(std::iter::repeat(Carried::Socket));
        carried.extend(kinds.zip(inherited.iter().map(AsFd::as_fd)));
        if let Some(DnsHelper { tun, listeners }) = &self.helper {
            carried.push((Carried::HelperTun, tun.as_fd()));
            carried.extend(listeners.iter().map(|fd| (Carried::HelperListener, fd.as_fd())));
        }
        let (kinds, descriptors): (Vec<_>, Vec<_>) = carried.into_iter().unzip();
        let init = self.plan.init_for(kinds, parked, self.runtime.stem())?;
        let program = if self.own_program && !parked { Program::own() } else { Program::open() };
        let netns = self.plan.netns.as_fd();
        let mut agent = Agent::spawn(&program, netns, self.runtime.listener()?, self.log_filter)?;
        // Before it does anything that has to be found again. One that is never told what to do ends by itself.
        let published = if parked { Ok(()) } else { self.runtime.publish() };
        let told =
            published.map_err(anyhow::Error::from).and_then(|()| Ok(agent.initialise(init, &descriptors)?));
        if let Err(error) = told {
            agent.kill().await?;
            return Err(error);
        }
        Ok(agent)
    }

    /// Watches the agent and hands it what changes, until the end.
    pub(in crate::launcher) async fn run(&mut self, signals: &mut Signals) -> End {
        self.status.open(self.runtime);
        let mut gone = interval(GONE_CHECK);
        let mut heartbeat = interval(HEARTBEAT);
        for timer in [&mut gone, &mut heartbeat] {
            timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
        }
        loop {
            let due = [self.ready_by, self.start_at, self.load_at].into_iter().flatten().min();
            let due_at = due.unwrap_or_else(|| Instant::now() + HEARTBEAT);
            tokio::select! {
                biased;
                signal = signals.next() => match signal {
                    Order::Stop => return End::Ordered,
                    Order::Leave => return End::Left,
                    Order::Renew => {
                        self.renew();
                        if let Err(error) = self.upgrade().await {
                            warn!(error = format!("{error:#}"), "the agent could not be replaced in order");
                        }
                    }
                },
                _ = gone.tick() => {
                    if self.plan.netns.is_gone() {
                        return End::NamespaceGone;
                    }
                }
                event = next(&mut self.agent, &mut self.queue) => {
                    if let Err(error) = self.handle(event).await {
                        return End::Broken(error);
                    }
                    if self.link_gone {
                        return End::NamespaceGone;
                    }
                }
                _ = heartbeat.tick() => {
                    if let Err(error) = self.beat().await {
                        return End::Broken(error.into());
                    }
                }
                () = sleep_until(due_at), if due.is_some() => {
                    if let Err(error) = self.due().await {
                        return End::Broken(error.into());
                    }
                }
                // While the agent does not keep up, changes gather in the directory and come as one.
                news = self.plan.source.next(), if self.queue.is_empty() => {
                    if !news.changes.is_empty() {
                        let messages = self.plan.commit(news.changes, false);
                        if self.agent.is_some() {
                            self.queue = messages;
                        }
                    }
                    if news.outside {
                        self.look_outside();
                    }
                }
                changed = self.plan.host.next(), if self.queue.is_empty() => match changed {
                    Ok(()) => self.look_outside(),
                    Err(error) => {
                        warn!(error = super::agent::describe(&error), "the addresses of this node cannot be followed");
                        tokio::time::sleep(PAUSE).await;
                    }
                },
                question = self.status.next() => self.answer(question),
            }
        }
    }

    async fn handle(&mut self, event: Result<Event, AgentError>) -> anyhow::Result<()> {
        match event {
            Ok(Event::Message(message, _)) => self.heard(message),
            Ok(Event::Ended(ended)) => self.lost(ended),
            // Broken, whatever it is: not to be listened to any more.
            Err(error) => {
                if self.may_tell() {
                    warn!(error = super::agent::describe(&error), "the agent is killed and replaced");
                }
                self.replace().await.context("kill the agent")?;
            }
        }
        Ok(())
    }

    fn heard(&mut self, message: FromAgent) {
        self.missed = 0;
        let ready = Ready::of(&message, self.whole, self.plan.skeleton.digest());
        match message {
            FromAgent::Ready { generation, .. } => {
                info!(
                    generation,
                    pid = self.agent.as_ref().map(Agent::id),
                    "the agent protects the pod again"
                );
                self.ready_by = None;
                self.open_if_closed(ready.as_ref());
            }
            FromAgent::GuardFilled { skeleton, filled, .. } => {
                self.filling = self.filling.filter(|wanted| *wanted != skeleton);
                if filled {
                    self.open_if_closed(ready.as_ref());
                } else {
                    self.close();
                }
            }
            FromAgent::Failed { reason, .. } => {
                if self.may_tell() {
                    warn!(reason, "the agent failed: the pod stays closed");
                }
            }
            // It did not read yet that the guard is there again.
            FromAgent::GuardLost | FromAgent::GuardDevice if self.filling.is_some() => {}
            FromAgent::GuardLost => self.close(),
            FromAgent::GuardDevice => self.refresh(),
            // One that asks and does not read gets no answer: it asks again.
            FromAgent::WhoIs(addresses) if self.queue.len() < ANSWERS_MAX => {
                let classes = answer(self.plan, &mut self.answered, addresses);
                self.queue.push_back(ToAgent::Classified(classes));
            }
            FromAgent::WhoIs(_) => {}
            FromAgent::LinkGone => self.link_gone = true,
            FromAgent::Flows(flows) => self.status.heard_flows(flows),
            FromAgent::Report(report) => self.status.heard(*report),
            FromAgent::Hello { .. }
            | FromAgent::Pong
            | FromAgent::Committed { .. }
            | FromAgent::TunReplaced
            | FromAgent::HandedOver
            | FromAgent::Stopped => {}
        }
    }

    /// The guard is open as soon as an agent is ready, whatever closed it.
    fn open_if_closed(&mut self, ready: Option<&Ready>) {
        let Some(ready) = ready.filter(|_| !self.door.is_open()) else { return };
        if let Err(error) = self.open(ready)
            && self.may_tell()
        {
            warn!(error = super::agent::describe(&error), "the guard cannot be opened: the pod stays closed");
        }
    }

    /// What is outside of the project has changed, or this node: guard and agent are told.
    fn look_outside(&mut self) {
        if self.plan.look_around() {
            self.refresh();
        }
        let plan = &*self.plan;
        let mut corrected = Vec::new();
        for (address, class) in &mut self.answered {
            let now = plan.class(*address);
            if now != *class {
                *class = now;
                corrected.push((*address, now));
            }
        }
        if self.agent.is_some() {
            let chunks = corrected.chunks(ASKED_MAX);
            self.queue.extend(chunks.map(|chunk| ToAgent::Classified(chunk.to_vec())));
        }
    }

    /// Somebody asks how the pod is: the answer waits for what a ready agent says, the loop does not.
    fn answer(&mut self, question: UnixStream) {
        let asked = self.ask_for_report();
        self.status.answer(question, self.plan, self.agent.as_ref().map(Agent::id), asked);
    }

    /// Asks the agent how it is. Otherwise says why it was not asked: the pod counts as closed then.
    fn ask_for_report(&self) -> Result<(), &'static str> {
        let ready = self.agent.as_ref().filter(|_| self.ready_by.is_none());
        let agent = ready.ok_or("the agent is not ready")?;
        if !self.door.is_open() {
            return Err("the guard is closed");
        }
        agent.send(&ToAgent::Report, &[]).map_err(|_| "the agent cannot be asked")
    }

    /// Whether a log line that the agent caused is written.
    fn may_tell(&mut self) -> bool {
        self.told.take(Instant::now().into_std())
    }

    /// The guard's rules are not what they were: the pod is closed, and opened when the agent has filled the sets again.
    fn close(&mut self) {
        self.load_now_or_later(Door::close);
    }

    /// The same rules for other devices or facts.
    fn refresh(&mut self) {
        self.load_now_or_later(Door::refresh);
    }

    /// Loads the guard now, or as soon as the rate allows: then closed, whatever was asked for.
    fn load_now_or_later(
        &mut self,
        way: impl FnOnce(&mut Door, &mut guard::Skeleton) -> Result<Loaded, guard::Error>,
    ) {
        let now = Instant::now();
        if !self.loads.take(now.into_std()) {
            self.load_at = Some(self.loads.next(now.into_std()).into());
            return;
        }
        self.load_at = None;
        match self.load(way) {
            Ok(()) => self.tell_loaded(),
            // The agent asks again.
            Err(error) if self.may_tell() => {
                warn!(error = super::agent::describe(&error), "the guard cannot be loaded again");
            }
            Err(_) => {}
        }
    }

    /// Asks for a sign of life; an agent that gave none for a while is replaced.
    async fn beat(&mut self) -> Result<(), AgentError> {
        let Some(agent) = self.agent.as_ref().filter(|_| self.ready_by.is_none()) else { return Ok(()) };
        if self.missed >= MISSED_MAX {
            warn!(pid = agent.id(), "the agent is frozen: it is killed and replaced");
            return self.replace().await;
        }
        // Taken back when it answers.
        self.missed += 1;
        if let Err(error) = agent.send(&ToAgent::Ping, &[]) {
            // The sign stays missing; an agent that has ended is seen as that.
            debug!(error = super::agent::describe(&error), "the agent could not be asked for a sign of life");
        }
        Ok(())
    }

    async fn due(&mut self) -> Result<(), AgentError> {
        let now = Instant::now();
        if self.load_at.is_some_and(|at| at <= now) {
            self.close();
        }
        if self.ready_by.is_some_and(|at| at <= now) {
            warn!("the agent was not ready within {READY_LIMIT:?}: it is killed and replaced");
            self.replace().await?;
        }
        if self.start_at.is_some_and(|at| at <= now)
            && let Err(error) = self.start_again().await
        {
            warn!(error = format!("{error:#}"), "cannot start an agent: the pod stays closed");
            self.start_later();
        }
        Ok(())
    }

    async fn replace(&mut self) -> Result<(), AgentError> {
        if let Some(agent) = &mut self.agent {
            agent.kill().await?;
            self.lost(Ended { code: Some(128 + 9) });
        }
        Ok(())
    }

    /// The agent has ended; a successor is started, soon.
    fn lost(&mut self, ended: Ended) {
        let Some(agent) = self.agent.take() else { return };
        self.status.lost(ended);
        if self.may_tell() {
            warn!(pid = agent.id(), %ended, "the agent ended: the pod is closed until a new one is ready");
        }
        // Perhaps another version: one of our own file understands us.
        self.own_program = self.ready_by.is_some() && !self.own_program;
        let held = agent.into_held();
        if !held.is_empty() {
            self.spare = held;
        }
        self.queue.clear();
        self.ready_by = None;
        // A new agent's guard is loaded before it starts.
        self.load_at = None;
        if self.started.elapsed() >= SETTLED {
            self.pause = Duration::ZERO;
        }
        self.start_later();
    }

    fn start_later(&mut self) {
        self.start_at = Some(Instant::now() + self.pause);
        self.pause = (self.pause * 2).clamp(PAUSE, PAUSE_MAX);
    }

    /// Reads key file and resolv.conf again.
    fn renew(&mut self) {
        if let Err(failure) = self.plan.renew() {
            warn!(error = format!("{:#}", failure.error), "what was known before stays");
        }
        // Resolvers may have changed: their addresses stand in the helper namespace.
        self.helper = None;
    }

    /// Replaces the agent in order: no packet is lost.
    ///
    /// # Errors
    /// The successor did not become ready: the old one goes on.
    pub(in crate::launcher) async fn upgrade(&mut self) -> anyhow::Result<()> {
        if self.agent.is_none() || self.ready_by.is_some() {
            bail!("there is no agent that could hand over");
        }
        // What was read again may have changed it; the old agent knows what it is to look like if it continues.
        self.load(Door::refresh)?;
        self.tell_loaded();
        let mut successor = self.new_agent(true).await?;
        let mut queue = self.plan.whole();
        let whole = self.plan.generation();
        let (plan, answered) = (&*self.plan, &mut self.answered);
        let ready =
            await_ready(&mut successor, &mut queue, whole, |asked| answer(plan, answered, asked)).await;
        let ready = match ready {
            Ok(ready) => ready,
            Err(failure) => {
                successor.kill().await?;
                return Err(failure.error.context("the successor was not ready: the old agent continues"));
            }
        };
        let mut old = self.agent.take().expect("looked at before");
        match self.switch(&mut old, &mut successor).await {
            Ok(()) => {
                info!(pid = successor.id(), from = old.id(), "the agent was replaced");
                self.agent = Some(successor);
                (self.queue, self.whole) = (queue, whole);
                self.started = Instant::now();
                self.missed = 0;
                self.filling = None;
                // Its word was about the kernel's sets, which it fills from now on.
                self.open(&ready)?;
                Ok(())
            }
            Err(error) => {
                self.agent = Some(old);
                successor.kill().await?;
                self.replace().await?;
                Err(error)
            }
        }
    }

    /// The old agent hands over and ends, the successor goes on. Two must not read: the old one has ended before.
    async fn switch(&mut self, old: &mut Agent, successor: &mut Agent) -> anyhow::Result<()> {
        let state = match timeout(HAND_OVER_LIMIT, hand_over(old)).await {
            Ok(Ok(state)) => Some(state),
            Ok(Err(error)) => {
                warn!(error = format!("{error:#}"), "nothing was handed over: sessions are made anew");
                None
            }
            Err(_) => {
                warn!("the agent did not hand over in time and is killed: sessions are made anew");
                None
            }
        };
        old.kill().await?;
        // Until now a later launcher has to find the old one.
        self.runtime.publish()?;
        let descriptors: Vec<_> = state.iter().map(AsFd::as_fd).collect();
        successor.send(&ToAgent::Resume, &descriptors)?;
        Ok(())
    }

    /// Orders the agent to remove everything.
    ///
    /// # Errors
    /// It could not be ended.
    pub(in crate::launcher) async fn stop(&mut self) -> Result<Stop, AgentError> {
        self.spare.clear();
        match self.agent.take() {
            Some(agent) => agent.stop().await,
            None => Ok(Stop::Unclean),
        }
    }

    /// Ends the agent without a word.
    ///
    /// # Errors
    /// It could not be ended.
    pub(in crate::launcher) async fn kill(&mut self) -> Result<(), AgentError> {
        match &mut self.agent {
            Some(agent) => agent.kill().await,
            None => Ok(()),
        }
    }
}

/// What the agent does next; never, while there is none.
async fn next(agent: &mut Option<Agent>, queue: &mut VecDeque<ToAgent>) -> Result<Event, AgentError> {
    match agent {
        Some(agent) => agent.next(queue).await,
        None => std::future::pending().await,
    }
}

/// Waits for an agent's word that it has applied the whole directory of this generation, and answers its questions.
async fn await_ready(
    agent: &mut Agent,
    queue: &mut VecDeque<ToAgent>,
    generation: u64,
    mut classify: impl FnMut(Vec<IpAddr>) -> Vec<(IpAddr, Class)>,
) -> Result<Ready, Failure> {
    let ready = async {
        loop {
            match agent.next(queue).await.map_err(Failure::failed)? {
                Event::Message(FromAgent::Failed { exit_code, reason }, _) => {
                    return Err(Failure::new(Exit::from_code(exit_code), anyhow!(reason)));
                }
                Event::Message(FromAgent::Stopped, _) => {
                    return Err(Failure::failed(anyhow!("the agent stopped without an order")));
                }
                Event::Message(FromAgent::WhoIs(addresses), _) if queue.len() < ANSWERS_MAX => {
                    queue.push_back(ToAgent::Classified(classify(addresses)));
                }
                Event::Message(message @ (FromAgent::Ready { .. } | FromAgent::Committed { .. }), _) => {
                    if let Some(ready) = Ready::of(&message, generation, 0) {
                        debug!(generation, descriptors = agent.held().len(), "agent ready");
                        return Ok(ready);
                    }
                }
                Event::Message(..) => {}
                Event::Ended(ended) => {
                    let code = ended.code.and_then(|code| u8::try_from(code).ok());
                    let exit = code.map_or(Exit::Failed, Exit::from_code);
                    let exit = if exit == Exit::Good { Exit::Failed } else { exit };
                    return Err(Failure::new(exit, anyhow!("the agent ended before it was ready ({ended})")));
                }
            }
        }
    };
    timeout(READY_LIMIT, ready).await.unwrap_or_else(|_| {
        Err(Failure::failed(anyhow!(
            "the agent was not ready within {READY_LIMIT:?}: run with -v for the agent's log"
        )))
    })
}

/// Whose these addresses are; remembered, so that the agent is told when that changes.
fn answer(plan: &Plan, answered: &mut BTreeMap<IpAddr, Class>, asked: Vec<IpAddr>) -> Vec<(IpAddr, Class)> {
    let classes: Vec<_> = asked.into_iter().map(|address| (address, plan.class(address))).collect();
    for (address, class) in &classes {
        // An address that is forgotten is closed ten minutes later at the latest, and asked about again.
        if answered.len() >= ANSWERED_MAX && !answered.contains_key(address) {
            answered.pop_first();
        }
        answered.insert(*address, *class);
    }
    classes
}

/// Orders the agent to hand over, and waits for its end: what it handed over.
async fn hand_over(old: &mut Agent) -> anyhow::Result<OwnedFd> {
    let mut queue = VecDeque::from([ToAgent::HandOver]);
    let mut state = None;
    loop {
        match old.next(&mut queue).await? {
            Event::Message(FromAgent::HandedOver, mut descriptors) => state = descriptors.pop(),
            Event::Message(..) => {}
            Event::Ended(ended) => return state.with_context(|| format!("the agent ended {ended}")),
        }
    }
}
