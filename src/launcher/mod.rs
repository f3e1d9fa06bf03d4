//! The launcher: plain async on the host; no packet passes here, and no project key leaves it.
//!
//! `tencrypt launch`, in order:
//!
//! 1. privileges, then everything that only reads: namespace, interface, directory, project, resolv.conf, key (`Plan`)
//! 2. the namespace's lock, the guard's skeleton, the DNS helper (`bring_up`)
//! 3. the agent: `Init`, the directory, then its `Ready`
//! 4. `protected …` on standard output
//! 5. changes of the directory go to the agent, until a signal, the agent's end, or the namespace's (`supervise`)
//! 6. on a signal: the agent removes what it made, and the guard goes last (`take_down`)
//!
//! A bring-up that fails, or is interrupted, is undone in reverse. An agent that ends by itself leaves the pod closed:
//! guard, routes and `tenc0` stay. May touch: what its modules may.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, anyhow};
use rustix::thread::{CapabilitySet, capabilities};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{MissedTickBehavior, interval, timeout};
use tracing::{debug, info, warn};

use crate::agent;
use crate::agent::control::{FromAgent, ToAgent};
use crate::cli::{self, Exit};
use crate::proto::mtu::tun_mtu;

pub mod directory;
pub mod dns_helper;
pub mod guard;
pub mod keys;
pub mod lock;
mod plan;
pub mod pod;
pub mod supervisor;

use dns_helper::DnsHelper;
use guard::{Loaded, Skeleton};
use lock::{Lock, LockError};
use plan::Plan;
use supervisor::{Agent, Event, Stop};

/// From the agent's start to its `Ready`; thousands of routes take less than a second.
const READY_LIMIT: Duration = Duration::from_secs(10);
/// How often the namespace's name is looked up: nothing tells when it goes.
const GONE_CHECK: Duration = Duration::from_millis(200);

/// Why a sub-command ends badly, and with which exit code.
#[derive(Debug)]
pub struct Failure {
    /// The exit code.
    pub exit: Exit,
    /// The reason, for a person.
    pub error: anyhow::Error,
}

impl Failure {
    /// A failure with this exit code.
    pub fn new(exit: Exit, error: impl Into<anyhow::Error>) -> Self {
        Self { exit, error: error.into() }
    }

    /// Usage or configuration.
    pub fn usage(error: impl Into<anyhow::Error>) -> Self {
        Self::new(Exit::Usage, error)
    }

    /// The kernel or a privilege refused.
    pub fn kernel(error: impl Into<anyhow::Error>) -> Self {
        Self::new(Exit::Kernel, error)
    }

    /// Something ended that should not have.
    pub fn failed(error: impl Into<anyhow::Error>) -> Self {
        Self::new(Exit::Failed, error)
    }

    /// For errors that know their exit code.
    fn coded<E: Into<anyhow::Error>>(exit_code: impl FnOnce(&E) -> u8) -> impl FnOnce(E) -> Self {
        |error| Self::new(Exit::from_code(exit_code(&error)), error)
    }
}

/// Protects one pod, in the foreground, until a signal or the end of its namespace.
///
/// # Errors
/// Bring-up failed and was undone, the agent ended by itself, or the clean-up is not complete.
pub fn launch(arguments: &cli::Launch, log_filter: &str) -> Result<Exit, Failure> {
    check_privileges()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")
        .map_err(Failure::kernel)?;
    runtime.block_on(protect(arguments, log_filter))
}

/// Without these nothing would work; said early and once.
fn check_privileges() -> Result<(), Failure> {
    let needed =
        CapabilitySet::NET_ADMIN | CapabilitySet::NET_RAW | CapabilitySet::SYS_ADMIN | CapabilitySet::SETPCAP;
    let effective =
        capabilities(None).context("cannot read the capabilities").map_err(Failure::kernel)?.effective;
    if effective.contains(needed) {
        return Ok(());
    }
    Err(Failure::kernel(anyhow!(
        "needs CAP_NET_ADMIN, CAP_NET_RAW, CAP_SYS_ADMIN and CAP_SETPCAP: run as root"
    )))
}

/// SIGTERM and SIGINT.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        let (terminate, interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        Ok(Self { terminate, interrupt })
    }

    /// Cancel safe.
    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

async fn protect(arguments: &cli::Launch, log_filter: &str) -> Result<Exit, Failure> {
    // From here on a signal is an orderly stop, also during bring-up.
    let mut signals = Signals::new().context("cannot handle signals").map_err(Failure::kernel)?;
    let mut plan = Plan::make(arguments)?;
    let mut made = Made::new(&plan)?;
    let up = tokio::select! {
        biased;
        () = signals.next() => None,
        up = bring_up(&mut plan, &mut made, log_filter) => Some(up),
    };
    match up {
        Some(Ok(())) => made.guard = true,
        Some(Err(failure)) => {
            if let Err(left) = take_down(&plan, made).await {
                warn!(
                    error = format!("{:#}", left.error),
                    "the pod stays closed: not everything could be removed"
                );
            }
            return Err(failure);
        }
        None => {
            info!("stopped before the pod was protected");
            return take_down(&plan, made).await;
        }
    }
    plan.announce();
    match supervise(&mut plan, &mut made, &mut signals).await {
        End::Ordered => take_down(&plan, made).await,
        End::NamespaceGone => {
            info!(netns = plan.netns.name(), "the namespace is gone");
            if let Some(agent) = made.agent.take() {
                agent.kill().await.map_err(Failure::kernel)?;
            }
            made.lock.remove();
            Ok(Exit::Good)
        }
        End::Broken(error) => {
            if let Some(agent) = made.agent.take() {
                agent.kill().await.map_err(Failure::kernel)?;
            }
            let netns = plan.netns.name();
            Err(Failure::failed(error.context(format!(
                "{netns} stays closed, what is protected is blocked until tencrypt is launched again"
            ))))
        }
    }
}

/// What exists because of this launcher, in the order it is made.
struct Made {
    lock: Lock,
    /// The guard is ours to remove.
    guard: bool,
    agent: Option<Agent>,
}

impl Made {
    fn new(plan: &Plan) -> Result<Self, Failure> {
        let lock = Lock::take(Path::new(lock::RUN_DIR), plan.netns.inode()).map_err(|error| match error {
            LockError::Taken { .. } => Failure::usage(error),
            LockError::Refused { .. } => Failure::kernel(error),
        })?;
        Ok(Self { lock, guard: false, agent: None })
    }
}

/// Guard, DNS helper, agent; ends when the agent is ready.
///
/// # Cancel safety
/// What was made is in `made`.
async fn bring_up(plan: &mut Plan, made: &mut Made, log_filter: &str) -> Result<(), Failure> {
    let init = plan.init.take().expect("bring-up happens once");
    let skeleton = Skeleton {
        device: plan.network.interface.as_str().try_into().map_err(Failure::usage)?,
        tunnel_port: init.port,
        resolvers: plan.resolvers.clone(),
        dns_ports: plan.network.dns_ports.range.clone(),
    };
    // A guard that is there already closes the pod since an earlier launcher died: a bring-up that fails must not open
    // it. Set before the load: one that fails half way is removed too.
    made.guard = !guard::is_loaded(&plan.netns_fd).map_err(Failure::kernel)?;
    match guard::load(&plan.netns_fd, &skeleton).map_err(Failure::kernel)? {
        Loaded::Full => {}
        Loaded::WithoutEgress(reason) => {
            warn!(reason, "no guard at the device's egress: frames of packet sockets are not guarded");
        }
    }
    let helper = match &plan.resolvers[..] {
        [] => None,
        resolvers => Some(
            dns_helper::open(resolvers, tun_mtu(plan.network.mtu, &plan.addresses))
                .map_err(Failure::kernel)?,
        ),
    };
    let agent = Agent::spawn(plan.netns.as_fd(), made.lock.as_fd(), log_filter).map_err(Failure::kernel)?;
    let agent = made.agent.insert(agent);
    debug!(pid = agent.id(), "agent started");
    let descriptors =
        helper.iter().flat_map(|DnsHelper { tun, listeners }| [tun].into_iter().chain(listeners));
    let descriptors: Vec<_> = descriptors.map(AsFd::as_fd).collect();
    agent.initialise(init, &descriptors).map_err(Failure::failed)?;
    wait_until_ready(agent, &mut plan.queue).await
}

async fn wait_until_ready(agent: &mut Agent, queue: &mut VecDeque<ToAgent>) -> Result<(), Failure> {
    let event = timeout(READY_LIMIT, agent.next(queue)).await;
    let event = event.map_err(|_| {
        Failure::failed(anyhow!(
            "the agent was not ready within {READY_LIMIT:?}: run with -v for the agent's log"
        ))
    })?;
    match event.map_err(Failure::failed)? {
        Event::Message(FromAgent::Ready { generation }) => {
            debug!(generation, descriptors = agent.held(), "agent ready");
            Ok(())
        }
        Event::Message(FromAgent::Failed { exit_code, reason }) => {
            Err(Failure::new(Exit::from_code(exit_code), anyhow!(reason)))
        }
        Event::Message(FromAgent::Stopped) => {
            Err(Failure::failed(anyhow!("the agent stopped without an order")))
        }
        Event::Ended(status) => {
            let exit =
                status.code().and_then(|code| u8::try_from(code).ok()).map_or(Exit::Failed, Exit::from_code);
            let exit = if exit == Exit::Good { Exit::Failed } else { exit };
            Err(Failure::new(exit, anyhow!("the agent ended before it was ready ({status})")))
        }
    }
}

/// Why supervision ended.
enum End {
    /// By a signal.
    Ordered,
    /// The namespace's name, path or process is gone.
    NamespaceGone,
    /// The agent ended or cannot be understood.
    Broken(anyhow::Error),
}

/// Hands changes of the directory to the agent, until the end.
async fn supervise(plan: &mut Plan, made: &mut Made, signals: &mut Signals) -> End {
    let agent = made.agent.as_mut().expect("the agent is ready");
    let mut gone = interval(GONE_CHECK);
    gone.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            () = signals.next() => return End::Ordered,
            _ = gone.tick() => {
                if plan.netns.is_gone() {
                    return End::NamespaceGone;
                }
            }
            event = agent.next(&mut plan.queue) => match event {
                Ok(Event::Message(FromAgent::Ready { generation })) => debug!(generation, "agent ready"),
                Ok(Event::Message(FromAgent::Failed { reason, .. })) => {
                    return End::Broken(anyhow!("the agent failed: {reason}"));
                }
                Ok(Event::Message(FromAgent::Stopped)) => {
                    return End::Broken(anyhow!("the agent stopped without an order"));
                }
                Ok(Event::Ended(status)) => return End::Broken(anyhow!("the agent ended ({status})")),
                Err(error) => return End::Broken(error.into()),
            },
            // While the agent does not keep up, changes gather in the directory and come as one.
            changes = plan.source.next(), if plan.queue.is_empty() => plan.commit(changes),
        }
    }
}

/// Removes everything in reverse; the guard last, and only if nothing else is left.
async fn take_down(plan: &Plan, mut made: Made) -> Result<Exit, Failure> {
    if let Some(agent) = made.agent.take()
        && agent.stop().await.map_err(Failure::kernel)? == Stop::Unclean
    {
        let swept = plan.netns.run(agent::remove_everything).unwrap_or_else(|error| Err(error.into()));
        swept.context("cannot remove what the agent left").map_err(Failure::kernel)?;
    }
    if made.guard {
        report_guard(plan);
        guard::remove(&plan.netns_fd).map_err(Failure::kernel)?;
    }
    made.lock.remove();
    info!(netns = plan.netns.name(), "removed");
    Ok(Exit::Good)
}

/// What the guard refused goes with its tables: it is said before.
fn report_guard(plan: &Plan) {
    match guard::counters(&plan.netns_fd) {
        Ok(counters) => {
            for (counter, count) in counters.iter().filter(|(_, count)| count.packets > 0) {
                info!(counter, packets = count.packets, "dropped by the guard");
            }
        }
        Err(error) => debug!(error = format!("{:#}", anyhow!(error)), "cannot read the guard's counters"),
    }
}
