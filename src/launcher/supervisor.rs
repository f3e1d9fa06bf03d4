//! One agent process, from spawn to its end.
//!
//! 1. [`Agent::spawn`] starts our own executable with three descriptors and nothing else: no secret in argv, an environment
//!    of one variable (the log filter), standard input and output on /dev/null
//! 2. [`Agent::initialise`] hands over keys and configuration; [`Agent::next`] sends what is queued and takes what comes
//! 3. what came with `Ready` (`tenc0`, the UDP sockets) is held for the agent's life, so that its death frees no device and
//!    no port
//! 4. [`Agent::stop`] orders the end and waits for it; [`Agent::kill`] does not ask
//!
//! An agent outlives its launcher: nothing here ties its life to ours. May touch: the child process, the channel.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::io::{FdFlags, fcntl_setfd};
use tokio::io::unix::AsyncFd;
use tokio::process::{Child, Command};
use tokio::time::timeout;
use tracing::{debug, warn};

use crate::agent::control::{self, ChannelError, FromAgent, Init, LauncherChannel, Received, ToAgent};
use crate::sys::async_fd;
use crate::telemetry::LOG_VARIABLE;

/// How often a send is tried again while the agent's queue is full: the agent reads within one turn of its loop.
const RETRY: Duration = Duration::from_millis(2);

/// How long after the end of its channel the end of an agent is waited for: the kernel closes descriptors while it exits.
const END_LIMIT: Duration = Duration::from_secs(1);

/// How long an agent may take to remove what it made. A pod with thousands of routes needs a fraction of it.
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// Variables that test builds hand on, so that faults can be injected into the agent.
#[cfg(feature = "fault-injection")]
const FAULT_VARIABLE: &str = "TENCRYPT_FAULT";

/// Why there is no agent, or none any more.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The process could not be started.
    #[error("cannot start the agent")]
    Spawn(#[source] io::Error),
    /// The channel could not be made or polled.
    #[error("cannot make the channel to the agent")]
    Channel(#[source] io::Error),
    /// Sending failed, or what was received is no message.
    #[error("channel to the agent")]
    Message(#[from] ChannelError),
    /// The agent closed the channel.
    #[error("the agent closed its channel")]
    Closed,
    /// The end of the process could not be waited for.
    #[error("cannot wait for the agent's end")]
    Wait(#[source] io::Error),
}

/// What an agent did.
#[derive(Debug)]
pub enum Event {
    /// It said something.
    Message(FromAgent),
    /// It ended, and was reaped.
    Ended(ExitStatus),
}

/// How an ordered stop went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The agent removed everything it had made.
    Clean,
    /// The agent ended, or had to be killed, without saying so: its objects may be there still.
    Unclean,
}

/// A running agent.
#[derive(Debug)]
pub struct Agent {
    child: Child,
    channel: LauncherChannel,
    /// A duplicate of the channel's descriptor, for readiness only.
    readable: AsyncFd<OwnedFd>,
    /// What the agent handed over when it was ready.
    held: Vec<OwnedFd>,
}

impl Agent {
    /// Starts an agent that will enter `netns` and keep `lock` for its life. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// [`AgentError::Spawn`], [`AgentError::Channel`].
    pub fn spawn(netns: BorrowedFd<'_>, lock: BorrowedFd<'_>, log_filter: &str) -> Result<Self, AgentError> {
        let (channel, theirs) = control::pair()?;
        let duplicate = channel.as_fd().try_clone_to_owned().map_err(AgentError::Channel)?;
        let readable = async_fd::readable(duplicate).map_err(AgentError::Channel)?;
        let netns = netns.try_clone_to_owned().map_err(AgentError::Spawn)?;
        let lock = lock.try_clone_to_owned().map_err(AgentError::Spawn)?;
        let mut command = Command::new("/proc/self/exe");
        command
            .arg0("tencrypt")
            .arg("agent")
            .args(["--netns-fd", &netns.as_raw_fd().to_string()])
            .args(["--channel-fd", &theirs.as_raw_fd().to_string()])
            .args(["--lock-fd", &lock.as_raw_fd().to_string()])
            .env_clear()
            .env(LOG_VARIABLE, log_filter)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::inherit())
            .kill_on_drop(false);
        #[cfg(feature = "fault-injection")]
        if let Some(faults) = std::env::var_os(FAULT_VARIABLE) {
            command.env(FAULT_VARIABLE, faults);
        }
        // These alone survive exec, and are closed here as soon as the agent has them: no other program is started in
        // between, for the launcher starts programs from one thread only.
        for descriptor in [&netns, &theirs, &lock] {
            fcntl_setfd(descriptor, FdFlags::empty()).map_err(|e| AgentError::Spawn(e.into()))?;
        }
        let child = command.spawn().map_err(AgentError::Spawn)?;
        Ok(Self { child, channel, readable, held: Vec::new() })
    }

    /// Process id, while it is not reaped.
    #[must_use]
    pub fn id(&self) -> Option<u32> {
        self.child.id()
    }

    /// Sends the first message and its descriptors; the agent's queue is empty then, so there is nothing to wait for.
    ///
    /// # Errors
    /// [`AgentError::Message`], [`AgentError::Closed`].
    pub fn initialise(&self, init: Init, descriptors: &[BorrowedFd<'_>]) -> Result<(), AgentError> {
        match self.channel.try_send(&ToAgent::Init(Box::new(init)), descriptors) {
            Ok(true) => Ok(()),
            Ok(false) | Err(ChannelError::Closed) => Err(AgentError::Closed),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for what the agent does next, and sends the messages of `queue` meanwhile, in order. Descriptors that come with
    /// `Ready` are held.
    ///
    /// # Errors
    /// [`AgentError::Message`] for anything that is no message: the agent is broken and not to be listened to any more.
    ///
    /// # Cancel safety
    /// A call that is dropped before it returns loses no message: what was sent is out of the queue, the rest is in it.
    pub async fn next(&mut self, queue: &mut VecDeque<ToAgent>) -> Result<Event, AgentError> {
        loop {
            tokio::select! {
                biased;
                received = receive(&self.channel, &self.readable) => match received? {
                    Received::Message(message, descriptors) => {
                        if matches!(message, FromAgent::Ready { .. }) {
                            self.held = descriptors;
                        }
                        return Ok(Event::Message(message));
                    }
                    Received::Closed => return self.end().await,
                },
                sent = flush(&self.channel, queue) => match sent {
                    Ok(()) => {}
                    // Its last words may still be unread.
                    Err(ChannelError::Closed) => queue.clear(),
                    Err(error) => return Err(error.into()),
                },
            }
        }
    }

    /// The agent closed its channel: an agent does that by ending.
    async fn end(&mut self) -> Result<Event, AgentError> {
        match timeout(END_LIMIT, self.child.wait()).await {
            Ok(status) => status.map(Event::Ended).map_err(AgentError::Wait),
            Err(_) => Err(AgentError::Closed),
        }
    }

    /// Descriptors held on behalf of the agent.
    #[must_use]
    pub fn held(&self) -> usize {
        self.held.len()
    }

    /// Orders the agent to remove everything and end; kills it if that takes longer than five seconds.
    ///
    /// # Errors
    /// [`AgentError::Wait`] if the process cannot be killed or reaped.
    pub async fn stop(mut self) -> Result<Stop, AgentError> {
        match timeout(STOP_LIMIT, self.stop_in_order()).await {
            Ok(Ok(true)) => return Ok(Stop::Clean),
            Ok(Ok(false)) => {}
            Ok(Err(error)) => warn!(error = describe(&error), "the agent did not stop in order"),
            Err(_) => warn!(limit = ?STOP_LIMIT, "the agent did not stop in time and is killed"),
        }
        self.kill().await?;
        Ok(Stop::Unclean)
    }

    /// Whether the agent said that it had stopped, and then ended well.
    async fn stop_in_order(&mut self) -> Result<bool, AgentError> {
        let mut queue = VecDeque::from([ToAgent::Stop]);
        let mut stopped = false;
        loop {
            match self.next(&mut queue).await? {
                Event::Message(FromAgent::Stopped) => stopped = true,
                Event::Message(FromAgent::Failed { reason, .. }) => {
                    warn!(reason, "the agent failed while it stopped")
                }
                Event::Message(FromAgent::Ready { .. }) => {}
                Event::Ended(status) => {
                    if !status.success() {
                        debug!(%status, "the agent ended badly");
                    }
                    return Ok(stopped && status.success());
                }
            }
        }
    }

    /// Kills the agent, if it has not ended, and reaps it.
    ///
    /// # Errors
    /// [`AgentError::Wait`].
    pub async fn kill(mut self) -> Result<(), AgentError> {
        if self.child.id().is_none() {
            return Ok(());
        }
        // The child is not reaped before this call waits for it, so the signal cannot reach another process.
        self.child.kill().await.map_err(AgentError::Wait)
    }
}

/// Receives one message; cancelled, it has received none.
async fn receive(
    channel: &LauncherChannel,
    readable: &AsyncFd<OwnedFd>,
) -> Result<Received<FromAgent>, AgentError> {
    loop {
        let mut guard = readable.readable().await.map_err(AgentError::Channel)?;
        match channel.try_recv()? {
            Some(received) => return Ok(received),
            None => guard.clear_ready(),
        }
    }
}

/// Sends what is queued; never returns if that is nothing. Cancelled, it leaves in the queue what was not sent.
async fn flush(channel: &LauncherChannel, queue: &mut VecDeque<ToAgent>) -> Result<(), ChannelError> {
    if queue.is_empty() {
        return std::future::pending().await;
    }
    while let Some(message) = queue.front() {
        if channel.try_send(message, &[])? {
            queue.pop_front();
        } else {
            tokio::time::sleep(RETRY).await;
        }
    }
    Ok(())
}

/// An error with its causes, on one line.
fn describe(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
