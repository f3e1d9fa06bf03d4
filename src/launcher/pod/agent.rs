//! One agent process, from spawn or adoption to its end.
//!
//! 1. `Agent::spawn` starts a program (`program`) with two descriptors and nothing else: no secret in argv, an
//!    environment of one variable (the log filter), standard input and output on /dev/null
//! 2. [`Agent::adopt`] takes over the one that an earlier launcher left; one that does not answer is killed
//! 3. [`Agent::initialise`] hands over keys and configuration; [`Agent::next`] sends what is queued and takes what comes
//! 4. what came with `Ready` (`tenc0`, the UDP sockets) is held, so that the agent's death frees no device and no port, and
//!    packets queue for its successor
//! 5. [`Agent::stop`] orders the end and waits for it; [`Agent::kill`] does not ask
//!
//! A process is known by its pidfd, whoever started it: a signal never reaches another one. An agent outlives its launcher:
//! nothing here ties its life to ours. May touch: the process, the channel.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{FileType, fcntl_get_seals, fstat, makedev};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType, sockopt};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::unix::AsyncFd;
use tokio::time::timeout;
use tracing::{debug, warn};

use crate::control::{
    ChannelError, Executable, FromAgent, Init, LauncherChannel, Received, ToAgent, VERSION, close_beside,
};
use crate::fault::HASTE;
use crate::launcher::program::Program;
use crate::launcher::rate::Rate;
use crate::sys::{async_fd, exec};
use crate::telemetry::LOG_VARIABLE;

/// How often a send is tried again while the agent's queue is full: the agent reads within one turn of its loop.
const RETRY: Duration = Duration::from_millis(2);

/// How long after the end of its channel the end of an agent is waited for: the kernel closes descriptors while it exits.
const END_LIMIT: Duration = Duration::from_secs(1);

/// How long an agent may take to remove what it made. A pod with thousands of routes needs a fraction of it.
const STOP_LIMIT: Duration = Duration::from_millis(5_000 / HASTE);

/// How long an agent that runs already may take to answer: it reads within one turn of its loop, but for the second that a
/// directory of ten thousand workloads takes it under load.
const ADOPT_LIMIT: Duration = Duration::from_millis(3_000 / HASTE);

/// Major and minor number of /dev/net/tun, everywhere (Documentation/admin-guide/devices.txt).
const TUN: (u32, u32) = (10, 200);

/// Variables that test builds hand on, so that faults can be injected into the agent.
#[cfg(feature = "fault-injection")]
const FAULT_VARIABLE: &str = "TENCRYPT_FAULT";

/// Why there is no agent, or none any more.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The process could not be started.
    #[error("cannot start the agent")]
    Spawn(#[source] io::Error),
    /// The channel could not be polled.
    #[error("cannot watch the channel to the agent")]
    Channel(#[source] io::Error),
    /// Sending failed, or what was received is no message.
    #[error("channel to the agent")]
    Message(#[from] ChannelError),
    /// The agent closed the channel and lives on.
    #[error("the agent closed its channel")]
    Closed,
    /// The process could not be signalled or waited for.
    #[error("cannot end the agent")]
    Wait(#[source] io::Error),
    /// The process at the other end of the socket is no agent of this namespace.
    #[error("process {0} listens for launchers, but is no agent of this pod: end it, or remove its socket")]
    Foreign(i32),
}

/// How an agent ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Exit code, or 128 and the signal's number; none for an agent that another launcher had started.
    pub code: Option<i32>,
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.code {
            Some(code) if code > 128 => write!(f, "by signal {}", code - 128),
            Some(code) => write!(f, "with exit code {code}"),
            None => f.write_str("by itself"),
        }
    }
}

/// What an agent did.
#[derive(Debug)]
pub enum Event {
    /// It said something.
    Message(FromAgent, Vec<OwnedFd>),
    /// It ended, and was reaped.
    Ended(Ended),
}

/// How an ordered stop went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The agent removed everything it had made.
    Clean,
    /// The agent ended, or had to be killed, without saying so: its objects may be there still.
    Unclean,
}

/// What an agent that was adopted is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Adopted {
    /// [`Init::fingerprint`] of what it was told.
    pub fingerprint: [u8; 32],
    /// The file that its program is.
    pub executable: Executable,
}

/// A running agent.
#[derive(Debug)]
pub struct Agent {
    process: Process,
    channel: LauncherChannel,
    /// A duplicate of the channel's descriptor, for readiness only.
    readable: AsyncFd<OwnedFd>,
    /// `tenc0` and the UDP sockets, since the agent was ready.
    held: Vec<OwnedFd>,
}

impl Agent {
    /// Starts `program` as an agent that will enter `netns` and listen at `listener`, to which `channel` is connected. Must
    /// be called inside a tokio runtime.
    ///
    /// # Errors
    /// [`AgentError::Spawn`], [`AgentError::Channel`].
    pub(super) fn spawn(
        program: &Program,
        netns: BorrowedFd<'_>,
        (listener, channel): (OwnedFd, LauncherChannel),
        log_filter: &str,
    ) -> Result<Self, AgentError> {
        let start = |program: &Program| {
            let (netns, listener) = (netns.try_clone_to_owned()?, listener.try_clone()?);
            command(program, netns, listener, log_filter).spawn()
        };
        let readable = readiness(&channel)?;
        let child = match start(program) {
            Err(error) if !program.is_own() => {
                warn!(%error, "the program at the launcher's path cannot be started: the agent runs the launcher's own file");
                start(&Program::own())
            }
            started => started,
        };
        let child = child.map_err(AgentError::Spawn)?;
        Ok(Self { process: Process::of_child(child)?, channel, readable, held: Vec::new() })
    }

    /// Takes over the agent at the other end of `channel`, which is in the namespace `identity` (device and inode). `None`:
    /// it did not answer as it should, was killed, and what it held is lost.
    ///
    /// # Errors
    /// [`AgentError::Foreign`], [`AgentError::Wait`], [`AgentError::Channel`].
    pub async fn adopt(
        channel: LauncherChannel,
        identity: (u64, u64),
    ) -> Result<Option<(Self, Adopted)>, AgentError> {
        let Some(process) = Process::of_peer(&channel, identity)? else { return Ok(None) };
        let readable = readiness(&channel)?;
        let mut agent = Self { process, channel, readable, held: Vec::new() };
        let reason = match timeout(ADOPT_LIMIT, agent.ask_to_adopt()).await {
            Ok(Ok(adopted)) => return Ok(Some((agent, adopted))),
            Ok(Err(error)) => describe(&error),
            Err(_) => "no answer".to_owned(),
        };
        warn!(
            pid = agent.id(),
            reason, "the agent of an earlier launcher cannot be taken over and is replaced"
        );
        agent.kill().await?;
        Ok(None)
    }

    async fn ask_to_adopt(&mut self) -> Result<Adopted, AgentError> {
        let mut queue = VecDeque::from([ToAgent::Hello { version: VERSION }, ToAgent::Adopt]);
        loop {
            match self.next(&mut queue).await? {
                Event::Message(FromAgent::Ready { fingerprint, executable, .. }, _) => {
                    return Ok(Adopted { fingerprint, executable });
                }
                Event::Message(FromAgent::Hello { version }, _) if version != VERSION => {
                    return Err(AgentError::Message(ChannelError::Invalid("version")));
                }
                Event::Message(..) => {}
                Event::Ended(_) => return Err(AgentError::Closed),
            }
        }
    }

    /// Process id.
    #[must_use]
    pub fn id(&self) -> i32 {
        self.process.pid.as_raw_nonzero().get()
    }

    /// Sends the first message and its descriptors; the agent's queue is empty then, so there is nothing to wait for.
    ///
    /// # Errors
    /// [`AgentError::Message`], [`AgentError::Closed`].
    pub fn initialise(&self, init: Init, descriptors: &[BorrowedFd<'_>]) -> Result<(), AgentError> {
        self.send(&ToAgent::Init(Box::new(init)), descriptors)
    }

    /// Sends a message ahead of what is queued.
    ///
    /// # Errors
    /// [`AgentError::Message`]; [`AgentError::Closed`] also where the agent's queue is full.
    pub fn send(&self, message: &ToAgent, descriptors: &[BorrowedFd<'_>]) -> Result<(), AgentError> {
        match self.channel.try_send(message, descriptors) {
            Ok(true) => Ok(()),
            Ok(false) | Err(ChannelError::Closed) => Err(AgentError::Closed),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for what the agent does next, and sends the messages of `queue` meanwhile, in order. `tenc0` and the sockets
    /// are held as they come.
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
                    Received::Message(message, descriptors) => return self.take(message, descriptors),
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

    /// A successor goes on with what comes here: anything else than it should be is refused.
    fn take(&mut self, message: FromAgent, mut descriptors: Vec<OwnedFd>) -> Result<Event, AgentError> {
        let fits = match (&message, &descriptors[..]) {
            (FromAgent::Ready { .. }, [tun, sockets @ ..]) => {
                self.held.is_empty() && is_tun(tun) && sockets.iter().all(is_datagram_socket)
            }
            (FromAgent::TunReplaced, [tun]) => is_tun(tun),
            (FromAgent::HandedOver, [state]) => fcntl_get_seals(state).is_ok(),
            (FromAgent::Ready { .. } | FromAgent::TunReplaced | FromAgent::HandedOver, _) => false,
            _ => true,
        };
        if !fits {
            close_beside(descriptors);
            return Err(AgentError::Message(ChannelError::Invalid("descriptors")));
        }
        match message {
            FromAgent::Ready { .. } => self.held = std::mem::take(&mut descriptors),
            FromAgent::TunReplaced => {
                if let (Some(old), Some(new)) = (self.held.first_mut(), descriptors.pop()) {
                    *old = new;
                }
            }
            _ => {}
        }
        Ok(Event::Message(message, descriptors))
    }

    /// The agent closed its channel: an agent does that by ending.
    async fn end(&mut self) -> Result<Event, AgentError> {
        match timeout(END_LIMIT, self.process.ended()).await {
            Ok(ended) => ended.map(Event::Ended),
            Err(_) => Err(AgentError::Closed),
        }
    }

    /// `tenc0` and the UDP sockets, for a successor; none before the agent was ready.
    #[must_use]
    pub fn held(&self) -> &[OwnedFd] {
        &self.held
    }

    /// Takes them out.
    #[must_use]
    pub fn into_held(self) -> Vec<OwnedFd> {
        self.held
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
        let mut told = told();
        let mut queue = VecDeque::from([ToAgent::Stop]);
        let mut stopped = false;
        loop {
            match self.next(&mut queue).await? {
                Event::Message(FromAgent::Stopped, _) => stopped = true,
                Event::Message(FromAgent::Failed { reason, .. }, _) if told.take(Instant::now()) => {
                    warn!(reason, "the agent failed while it stopped")
                }
                Event::Message(..) => {}
                Event::Ended(ended) => {
                    debug!(%ended, "the agent ended");
                    return Ok(stopped && ended.code.is_none_or(|code| code == 0));
                }
            }
        }
    }

    /// Waits for the end of an agent that was told to end.
    ///
    /// # Errors
    /// [`AgentError::Wait`].
    pub async fn wait(&mut self) -> Result<Ended, AgentError> {
        self.process.ended().await
    }

    /// Kills the agent, if it has not ended, and waits for its end.
    ///
    /// # Errors
    /// [`AgentError::Wait`].
    pub async fn kill(&mut self) -> Result<(), AgentError> {
        self.process.signal(Signal::KILL)?;
        self.process.ended().await.map(drop)
    }
}

/// What starts an agent that inherits two descriptors.
fn command(program: &Program, netns: OwnedFd, listener: OwnedFd, log_filter: &str) -> Command {
    let mut command = Command::new(program.path());
    command
        .arg0("tencrypt")
        .arg("agent")
        .args(["--netns-fd", &netns.as_raw_fd().to_string()])
        .args(["--listener-fd", &listener.as_raw_fd().to_string()])
        .env_clear()
        .env(LOG_VARIABLE, log_filter)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::inherit());
    exec::inherit(&mut command, vec![netns, listener]);
    #[cfg(feature = "fault-injection")]
    if let Some(faults) = std::env::var_os(FAULT_VARIABLE) {
        command.env(FAULT_VARIABLE, faults);
    }
    command
}

/// Kills the agent at the other end of `channel`, which has neither a launcher nor a pod any more. Whether it is one, and
/// was killed.
pub(super) fn end_orphan(channel: &LauncherChannel, identity: (u64, u64)) -> bool {
    match Process::of_peer(channel, identity) {
        Ok(Some(agent)) => agent.signal(Signal::KILL).is_ok(),
        Ok(None) => true,
        Err(_) => false,
    }
}

/// Kills the agents of a namespace that no path leads to any more, but for `kept`: they were frozen while their launcher
/// died, or while they were to take over, and would keep the tunnel's port. Processes of the pod are none, whatever they call
/// themselves: they are of another user or in another PID namespace.
///
/// # Errors
/// One cannot be killed.
pub(super) async fn end_stray_agents(identity: (u64, u64), kept: Option<i32>) -> Result<(), AgentError> {
    for entry in std::fs::read_dir("/proc").map_err(AgentError::Wait)?.flatten() {
        let number = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok());
        let Some(pid) = number.filter(|number| kept != Some(*number)).and_then(Pid::from_raw) else {
            continue;
        };
        if !is_ours(&entry.path()) {
            continue;
        }
        // An agent of another pod is foreign here.
        let Ok(Some(mut stray)) = Process::of_agent(pid, identity) else { continue };
        warn!(pid = pid.as_raw_nonzero().get(), "an agent that no launcher can speak to any more is killed");
        stray.signal(Signal::KILL)?;
        // One that does not end still has its port, and the launch says so.
        if let Ok(ended) = timeout(END_LIMIT, stray.ended()).await {
            ended?;
        }
    }
    Ok(())
}

/// Whether a process is called as agents are, of our user and in our own PID namespace.
fn is_ours(process: &Path) -> bool {
    let is_named =
        std::fs::read_to_string(process.join("comm")).is_ok_and(|name| name.trim_end() == "tencrypt-agent");
    let numbers = |path: &Path| std::fs::metadata(path).map(|found| (found.dev(), found.ino())).ok();
    let own = numbers(Path::new("/proc/self/ns/pid"));
    is_named
        && std::fs::metadata(process).is_ok_and(|found| found.uid() == rustix::process::geteuid().as_raw())
        && own.is_some()
        && numbers(&process.join("ns/pid")) == own
}

/// A process by its pidfd.
#[derive(Debug)]
struct Process {
    pid: Pid,
    /// Readable once the process has ended.
    pidfd: AsyncFd<OwnedFd>,
    /// For those that we have to reap.
    child: Option<Child>,
}

impl Process {
    fn of_child(mut child: Child) -> Result<Self, AgentError> {
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).expect("a process id");
        // Not reaped before we do it: the number is the child's.
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(io::Error::from);
        match pidfd.and_then(async_fd::readable) {
            Ok(pidfd) => Ok(Self { pid, pidfd, child: Some(child) }),
            Err(error) => {
                child.kill().and_then(|()| child.wait()).map_err(AgentError::Wait)?;
                Err(AgentError::Spawn(error))
            }
        }
    }

    /// The process that listens at the other end; `None`: it has ended.
    fn of_peer(channel: &LauncherChannel, identity: (u64, u64)) -> Result<Option<Self>, AgentError> {
        Self::of_agent(channel.peer()?.pid, identity)
    }

    /// The agent of that number; `None`: it has ended.
    fn of_agent(pid: Pid, identity: (u64, u64)) -> Result<Option<Self>, AgentError> {
        let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            Err(Errno::SRCH) => return Ok(None),
            Err(errno) => return Err(AgentError::Channel(errno.into())),
        };
        // The number may have been given to somebody else before we opened it, and nobody else is in the pod's namespace
        // under our own executable's name.
        let number = pid.as_raw_nonzero().get();
        let namespace = std::fs::metadata(format!("/proc/{number}/ns/net"));
        let name = std::fs::read_to_string(format!("/proc/{number}/comm")).unwrap_or_default();
        match namespace {
            Ok(found) if (found.dev(), found.ino()) == identity && name.trim_end() == "tencrypt-agent" => {
                let pidfd = async_fd::readable(pidfd).map_err(AgentError::Channel)?;
                Ok(Some(Self { pid, pidfd, child: None }))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            _ => Err(AgentError::Foreign(number)),
        }
    }

    fn signal(&self, signal: Signal) -> Result<(), AgentError> {
        match pidfd_send_signal(self.pidfd.get_ref(), signal) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(errno) => Err(AgentError::Wait(errno.into())),
        }
    }

    /// Waits for the end.
    ///
    /// # Cancel safety
    /// A call that is dropped before it returns has changed nothing.
    async fn ended(&mut self) -> Result<Ended, AgentError> {
        use std::os::unix::process::ExitStatusExt as _;
        let _ = self.pidfd.readable().await.map_err(AgentError::Wait)?;
        let Some(child) = &mut self.child else { return Ok(Ended { code: None }) };
        let status = child.wait().map_err(AgentError::Wait)?;
        Ok(Ended { code: status.code().or_else(|| Some(128 + status.signal()?)) })
    }
}

/// Whether it is of /dev/net/tun, be its device there still or not.
fn is_tun(fd: &OwnedFd) -> bool {
    fstat(fd).is_ok_and(|found| {
        FileType::from_raw_mode(found.st_mode) == FileType::CharacterDevice
            && found.st_rdev == makedev(TUN.0, TUN.1)
    })
}

fn is_datagram_socket(fd: &OwnedFd) -> bool {
    let is_internet = |domain| [AddressFamily::INET, AddressFamily::INET6].contains(&domain);
    sockopt::socket_domain(fd).is_ok_and(is_internet)
        && sockopt::socket_type(fd).is_ok_and(|kind| kind == SocketType::DGRAM)
}

/// A duplicate of the channel's descriptor that tells when something is to be received.
fn readiness(channel: &LauncherChannel) -> Result<AsyncFd<OwnedFd>, AgentError> {
    let duplicate = channel.as_fd().try_clone_to_owned().map_err(AgentError::Channel)?;
    async_fd::readable(duplicate).map_err(AgentError::Channel)
}

/// Receives one message; cancelled, it has received none. Everything else that waits gets its turn first: an agent that
/// never stops talking holds up neither signals nor time limits.
async fn receive(
    channel: &LauncherChannel,
    readable: &AsyncFd<OwnedFd>,
) -> Result<Received<FromAgent>, AgentError> {
    tokio::task::yield_now().await;
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

/// How many log lines an agent can make its launcher write: 20 at once, then ten a minute.
pub(super) const fn told() -> Rate {
    Rate::new(20, Duration::from_secs(6))
}

/// An error with its causes, on one line.
pub(crate) fn describe(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::net::{TcpListener, UdpSocket};

    use rustix::net::{SendFlags, SocketFlags, send, socketpair};

    use super::*;
    use crate::control::AgentChannel;

    /// An agent that does nothing, and its end of the channel, at which the test speaks.
    fn agent() -> (Agent, AgentChannel) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        let child = Command::new("sleep").arg("60").spawn().unwrap();
        let channel = LauncherChannel::new(ours).unwrap();
        let readable = readiness(&channel).unwrap();
        let agent = Agent { process: Process::of_child(child).unwrap(), channel, readable, held: Vec::new() };
        (agent, AgentChannel::new(theirs).unwrap())
    }

    fn ready() -> FromAgent {
        FromAgent::Ready { generation: 1, fingerprint: [0; 32], executable: [0; 4] }
    }

    #[tokio::test]
    async fn promise_10_an_agent_that_never_stops_talking_stops_no_time_limit() {
        let (mut agent, channel) = agent();
        let start = Instant::now();
        let pong = postcard::to_stdvec(&FromAgent::Pong).unwrap();
        let talker = std::thread::spawn(move || {
            // Faster than anybody listens.
            while start.elapsed() < Duration::from_secs(5)
                && !matches!(send(channel.as_fd(), &pong, SendFlags::NOSIGNAL), Err(Errno::PIPE))
            {
            }
        });
        let mut heard = 0;
        let listening = async {
            loop {
                agent.next(&mut VecDeque::new()).await.unwrap();
                heard += 1;
            }
        };
        assert!(timeout(Duration::from_millis(200), listening).await.is_err());
        assert!(heard > 0 && start.elapsed() < Duration::from_secs(3), "{heard} in {:?}", start.elapsed());
        agent.kill().await.unwrap();
        drop(agent);
        talker.join().unwrap();
    }

    #[tokio::test]
    async fn promise_9_a_successor_inherits_nothing_from_an_agent_but_tun_and_datagram_sockets() {
        let null = || OwnedFd::from(File::open("/dev/null").unwrap());
        let tcp = || OwnedFd::from(TcpListener::bind("127.0.0.1:0").unwrap());
        let udp = || OwnedFd::from(UdpSocket::bind("127.0.0.1:0").unwrap());
        for (message, descriptors) in [
            (ready(), vec![]),
            (ready(), vec![null(), udp()]),
            (ready(), vec![udp(), udp()]),
            (FromAgent::TunReplaced, vec![]),
            (FromAgent::TunReplaced, vec![tcp()]),
            (FromAgent::HandedOver, vec![]),
            (FromAgent::HandedOver, vec![null()]),
        ] {
            let (mut agent, channel) = agent();
            channel.send(&message, &descriptors.iter().map(AsFd::as_fd).collect::<Vec<_>>()).unwrap();
            let refused = agent.next(&mut VecDeque::new()).await;
            assert!(
                matches!(refused, Err(AgentError::Message(ChannelError::Invalid("descriptors")))),
                "{message:?}: {refused:?}"
            );
            assert!(agent.held().is_empty());
            agent.kill().await.unwrap();
        }
        // As it should be, once.
        let Ok(tun) = File::options().read(true).write(true).open("/dev/net/tun") else { return };
        let (mut agent, channel) = agent();
        let (tun, socket) = (OwnedFd::from(tun), udp());
        for _ in 0..2 {
            channel.send(&ready(), &[tun.as_fd(), socket.as_fd()]).unwrap();
        }
        let event = agent.next(&mut VecDeque::new()).await.unwrap();
        assert!(matches!(event, Event::Message(FromAgent::Ready { .. }, _)) && agent.held().len() == 2);
        assert!(agent.next(&mut VecDeque::new()).await.is_err());
        agent.kill().await.unwrap();
    }
}
