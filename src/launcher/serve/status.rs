//! The launcher's side: questions are taken in the supervisor's loop and answered beside it, so that none holds it up.
//!
//! 1. [`StatusServer::next`] takes a connection of our own user, as long as fewer than [`ASKING_MAX`] are being answered
//! 2. the supervisor asks its agent and hands over what it knows itself: [`StatusServer::answer`]
//! 3. [`StatusServer::heard`]: the agent's report goes to all who wait for one; [`StatusServer::lost`]: there will be none
//! 4. a task of its own reads the guard's counters and records, waits for the report, [`LIMIT`] at most, and writes the document
//!
//! May touch: connections, and the guard's counters and records, read-only.

use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

use super::collect::{Answered, Rules};
use crate::control::{FlowReport, REPORTED_FLOWS_MAX, Report};
use crate::launcher::pod::Plan;
use crate::launcher::pod::agent::{Ended, describe};
use crate::launcher::pod::files::Runtime;
use crate::launcher::pod::guard;
use crate::proto::ladder::Mode;
use crate::status::{AgentStatus, LauncherStatus, PodStatus};

/// How long the agent, the guard and the one who asks may take, each.
const LIMIT: Duration = Duration::from_secs(2);
/// Questions that are being answered at once; further ones wait in the kernel.
const ASKING_MAX: usize = 8;
/// Flows that are kept of one answer; an agent says no more.
const FLOWS_MAX: usize = 2 * REPORTED_FLOWS_MAX;
/// Pause after a connection could not be taken, for want of descriptors for example.
const PAUSE: Duration = Duration::from_millis(200);

/// Answers questions about one pod.
#[derive(Debug, Default)]
pub(in crate::launcher) struct StatusServer {
    /// None: it could not be had, and nobody is answered.
    listener: Option<UnixListener>,
    tasks: JoinSet<()>,
    /// Those that wait for the agent's report.
    waiting: Vec<oneshot::Sender<Answered>>,
    /// Flows that came before the report that they belong to.
    flows: Vec<FlowReport>,
    replaced: u64,
    last_end: Option<String>,
}

impl StatusServer {
    /// Listens. A pod whose launcher cannot be asked is protected all the same. Must be called inside a tokio runtime.
    pub(in crate::launcher) fn open(&mut self, runtime: &Runtime) {
        let listener = runtime.status_listener().map_err(|error| describe(&error));
        match listener.and_then(|l| UnixListener::from_std(l).map_err(|error| error.to_string())) {
            Ok(listener) => self.listener = Some(listener),
            Err(error) => warn!(error, "`tencrypt status` cannot ask this launcher"),
        }
    }

    /// The next one who asks.
    ///
    /// # Cancel safety
    /// A call that is dropped before it returns has taken no connection.
    pub(in crate::launcher) async fn next(&mut self) -> UnixStream {
        loop {
            while self.tasks.try_join_next().is_some() {}
            if self.tasks.len() >= ASKING_MAX {
                self.tasks.join_next().await;
                continue;
            }
            let Some(listener) = &self.listener else { return std::future::pending().await };
            match listener.accept().await {
                Ok((stream, _)) if is_ours(&stream) => return stream,
                Ok(_) => debug!("a question of another user is refused"),
                Err(error) => {
                    debug!(%error, "cannot take a question");
                    sleep(PAUSE).await;
                }
            }
        }
    }

    /// Answers with what the launcher knows, and with the agent's report if it was `asked` for one; else that says why not.
    pub(in crate::launcher) fn answer(
        &mut self,
        stream: UnixStream,
        plan: &Plan,
        agent: Option<i32>,
        asked: Result<(), &'static str>,
    ) {
        let report = asked.is_ok().then(|| {
            let (sender, receiver) = oneshot::channel();
            self.waiting.retain(|sender| !sender.is_closed());
            self.waiting.push(sender);
            receiver
        });
        let netns = match plan.netns_fd.try_clone() {
            Ok(netns) => netns,
            Err(error) => return debug!(%error, "a question is not answered"),
        };
        let mut status = self.known(plan.netns.name(), &plan.project, &plan.addresses, agent);
        if let (Err(reason), Some(_)) = (asked, agent) {
            status.reason = Some(reason.to_owned());
        }
        status.mode = Some(plan.skeleton.mode);
        status.set_rules(&Rules {
            state: plan.skeleton.state(),
            has_ranges: !plan.skeleton.ranges.is_empty(),
            drops_unclassified: plan.drops_unclassified(),
            allow_link_scope: plan.skeleton.allow_link_scope,
            allow_dhcp: plan.skeleton.allow_dhcp,
        });
        self.tasks.spawn(write(stream, status, netns, report));
    }

    fn known(&self, name: String, project: &str, addresses: &[IpAddr], agent: Option<i32>) -> PodStatus {
        let reason = match (agent, &self.last_end) {
            (Some(_), _) => "the agent is not ready".to_owned(),
            (None, Some(end)) => format!("the agent ended {end}, a new one is started"),
            (None, None) => "there is no agent".to_owned(),
        };
        let (replaced, last_end) = (self.replaced, self.last_end.clone());
        PodStatus {
            project: Some(project.to_owned()),
            addresses: addresses.to_vec(),
            launcher: Some(LauncherStatus { pid: std::process::id() }),
            agent: agent.map(|pid| AgentStatus { pid, replaced, last_end }),
            ..PodStatus::closed(name, &reason)
        }
    }

    /// A part of the agent's answer has come.
    pub(in crate::launcher) fn heard_flows(&mut self, flows: Vec<FlowReport>) {
        if self.flows.len() < FLOWS_MAX {
            self.flows.extend(flows);
        }
    }

    /// The agent's report has come, and with it the end of its answer.
    pub(in crate::launcher) fn heard(&mut self, report: Report) {
        let answered = Answered { report, flows: std::mem::take(&mut self.flows) };
        for sender in self.waiting.drain(..) {
            // One that has waited too long is answered already.
            let _ = sender.send(answered.clone());
        }
    }

    /// The agent has ended, unasked; what it was asked for does not come any more.
    pub(in crate::launcher) fn lost(&mut self, ended: Ended) {
        self.waiting.clear();
        self.flows.clear();
        self.replaced += 1;
        self.last_end = Some(ended.to_string());
    }
}

/// The folder is root's alone; this is the second lock on the same door.
fn is_ours(stream: &UnixStream) -> bool {
    stream.peer_cred().is_ok_and(|peer| peer.uid() == rustix::process::geteuid().as_raw())
}

async fn write(
    mut stream: UnixStream,
    mut status: PodStatus,
    netns: OwnedFd,
    report: Option<oneshot::Receiver<Answered>>,
) {
    let reported = async {
        match report {
            Some(report) => Some(timeout(LIMIT, report).await.ok().and_then(Result::ok)),
            None => None,
        }
    };
    // In strict mode there are none but those of a former mode.
    let records = async {
        match status.mode {
            None | Some(Mode::Strict) => None,
            Some(Mode::Permissive | Mode::Audit) => {
                Some(timeout(LIMIT, guard::would_drops_beside(&netns)).await)
            }
        }
    };
    let (reported, guard, records) =
        tokio::join!(reported, timeout(LIMIT, guard::counters_beside(&netns)), records);
    let records = match records {
        Some(Ok(Ok(records))) => Some(records),
        Some(Ok(Err(error))) => {
            warn!(error = describe(&error), "the guard's records cannot be read");
            None
        }
        Some(Err(_)) | None => None,
    };
    match reported {
        Some(Some(answered)) => status.set_report(answered, records.as_deref()),
        Some(None) => status.reason = Some("the agent does not answer".to_owned()),
        None => {}
    }
    if let Some(records) = records {
        status.set_records(&records);
    }
    match guard {
        Ok(Ok(counters)) => {
            status.set_guard(counters.into_iter().map(|(name, n)| (name, n.packets)).collect());
        }
        Ok(Err(error)) => warn!(error = describe(&error), "the guard's counters cannot be read"),
        Err(_) => {}
    }
    let document = status.to_json() + "\n";
    match timeout(LIMIT, stream.write_all(document.as_bytes())).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!(%error, "an answer was not read"),
        Err(_) => debug!("an answer was not read in time"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launcher::serve::collect::tests::answered;
    use crate::status::State;

    /// What the task writes, for a namespace whose guard nobody can read.
    async fn written(server: &StatusServer, report: Option<oneshot::Receiver<Answered>>) -> PodStatus {
        use tokio::io::AsyncReadExt as _;
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let status = server.known("pod".to_owned(), "shop", &[], Some(8));
        let no_namespace = std::fs::File::open("/").unwrap();
        let mut text = String::new();
        let task = write(ours, status, no_namespace.into(), report);
        let (_, read) = tokio::join!(task, theirs.read_to_string(&mut text));
        read.unwrap();
        serde_json::from_str(&text).unwrap()
    }

    #[tokio::test]
    async fn an_agent_that_answers_is_reported_and_one_that_does_not_is_closed() {
        let mut server = StatusServer::default();
        let ask = |server: &mut StatusServer| {
            let (sender, receiver) = oneshot::channel();
            server.waiting.push(sender);
            receiver
        };
        let (first, second) = (ask(&mut server), ask(&mut server));
        let Answered { report, flows } = answered();
        server.heard_flows(flows);
        server.heard(report);
        for asked in [first, second] {
            let status = written(&server, Some(asked)).await;
            assert_eq!((status.state, status.reason), (State::Protected, None));
            assert_eq!(status.counters.unwrap().totals.sealed, 10);
            assert_eq!(status.flow_states.unwrap().items.len(), 1);
        }
        assert!(server.flows.is_empty(), "flows of one answer are not those of the next");

        let third = ask(&mut server);
        server.lost(Ended { code: Some(137) });
        let status = written(&server, Some(third)).await;
        assert_eq!(status.state, State::Closed);
        assert_eq!(status.reason.as_deref(), Some("the agent does not answer"));
        let agent = status.agent.unwrap();
        assert_eq!((agent.replaced, agent.last_end.as_deref()), (1, Some("by signal 9")));

        let frozen = ask(&mut server);
        assert_eq!(written(&server, Some(frozen)).await.state, State::Closed);
        assert!(server.waiting[0].is_closed(), "it is waited for no more");
        assert_eq!(written(&server, None).await.reason.as_deref(), Some("the agent is not ready"));
    }
}
