//! System calls that fail under a running transfer: the agent goes on, and everything arrives, unchanged and in clear nowhere.
//!
//! 1. both agents are traced, and every so-and-so-manieth call of one kind fails with one error
//! 2. bytes that repeat nowhere go both ways over one connection, and are compared
//! 3. the trace shows how many calls failed: without any the case has shown nothing
//!
//! Needs strace. May touch: two processes' system calls, for seconds. Source: strace(1).

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Shutdown};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::Case;
use crate::crash::agent;
use crate::lab::{Lab, wait};
use crate::load::{CLIENT, SERVER};

/// The cases of this file.
pub const CASES: &[Case] =
    &[Case::new("promise_7_transfers_complete_though_system_calls_fail", transfers).sealed().seconds(300)];

/// What fails, and how. Where a socket is read, also the launcher's channel is; `read` and `writev` are `tenc0`'s.
const FAULTS: [(&str, &[&str]); 5] = [
    (
        "sendmsg",
        &[
            "EIO",
            "EINVAL",
            "EMSGSIZE",
            "EOPNOTSUPP",
            "ENOBUFS",
            "ENOMEM",
            "EAGAIN",
            "EINTR",
            "EPERM",
            "ENETUNREACH",
            "EHOSTUNREACH",
            "ECONNREFUSED",
        ],
    ),
    ("recvmsg", &["EAGAIN", "EINTR", "ENOBUFS", "ENOMEM", "ECONNREFUSED", "EMSGSIZE"]),
    ("read", &["EAGAIN", "EINTR", "EIO", "EINVAL", "ENOMEM"]),
    ("writev", &["EAGAIN", "EINTR", "EIO", "EINVAL", "ENOBUFS", "ENOMEM"]),
    ("epoll_wait", &["EINTR"]),
];
/// The first call that fails, and every how manieth after it.
const WHEN: &str = "3+29";
/// Bytes in each direction.
const BYTES: usize = 4 << 20;
const PORT: u16 = 9_610;
const LIMIT: Duration = Duration::from_secs(30);

fn transfers(lab: &Lab) {
    let server = lab.pod(SERVER);
    let mut family = server.addresses().into_iter().cycle();
    for (call, errors) in FAULTS {
        for error in errors {
            let before = [CLIENT, SERVER].map(|pod| agent(lab, pod));
            let traces = [CLIENT, SERVER].map(|pod| Trace::start(lab, pod, call, error));
            let took = transfer(lab, family.next().expect("a cycle"));
            let failed = traces.map(Trace::end);
            crate::say(&format!("{call} {error}: {failed:?} calls failed, {} ms", took.as_millis()));
            assert!(failed.iter().all(|failed| *failed > 0), "{call} {error}: {failed:?} calls failed");
            // An agent whose channel broke is replaced, and rightly so.
            if call != "recvmsg" {
                let after = [CLIENT, SERVER].map(|pod| agent(lab, pod));
                assert_eq!(before, after, "{call} {error}: an agent was replaced");
            }
        }
    }
}

/// Sends both ways over one connection and compares what comes; tells how long it took.
fn transfer(lab: &Lab, to: IpAddr) -> Duration {
    let listener = lab.pod(SERVER).listen((to, PORT).into());
    let begun = Instant::now();
    let client = lab.pod(CLIENT).connect((to, PORT), LIMIT).expect("connect");
    let (server, _) = listener.accept().expect("accept");
    server.set_read_timeout(Some(LIMIT)).expect("time-out");
    server.set_write_timeout(Some(LIMIT)).expect("time-out");
    thread::scope(|scope| {
        for (mut from, mut to, seed) in [(&client, &server, 1), (&server, &client, 2)] {
            scope.spawn(move || {
                from.write_all(&bytes(seed)).expect("send");
                from.shutdown(Shutdown::Write).expect("end");
            });
            scope.spawn(move || {
                let mut got = Vec::with_capacity(BYTES);
                to.read_to_end(&mut got).expect("receive");
                assert!(got == bytes(seed), "{} bytes came, not those that were sent", got.len());
            });
        }
    });
    begun.elapsed()
}

/// Words that repeat nowhere.
fn bytes(seed: u64) -> Vec<u8> {
    let words = (0..BYTES as u64 / 8).map(|n| (n << 8 | seed).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    words.flat_map(u64::to_le_bytes).collect()
}

/// A traced agent.
struct Trace {
    strace: Child,
    written: std::path::PathBuf,
}

impl Trace {
    fn start(lab: &Lab, pod: &str, call: &str, error: &str) -> Self {
        let pid = agent(lab, pod);
        let written = lab.run_dir().join(format!("strace-{pod}"));
        let strace = Command::new("strace")
            .args(["-f", "-qq", "-p", &pid.to_string(), "-e", &format!("trace={call}")])
            .args(["-e", &format!("inject={call}:error={error}:when={WHEN}"), "-o"])
            .arg(&written)
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("strace");
        let end = Instant::now() + LIMIT;
        while !is_traced(pid) {
            assert!(Instant::now() < end, "strace does not trace {pid}");
            thread::sleep(Duration::from_millis(2));
        }
        Self { strace, written }
    }

    /// Lets the agent go; tells how many of its calls failed.
    fn end(mut self) -> usize {
        let pid = Pid::from_raw(self.strace.id().try_into().expect("a process"));
        kill(pid, Signal::SIGINT).expect("end strace");
        assert!(wait(&mut self.strace, LIMIT).is_some(), "strace goes on");
        let text = fs::read_to_string(&self.written).expect("strace's output");
        text.matches("(INJECTED)").count()
    }
}

/// All threads of it.
fn is_traced(pid: Pid) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).expect("the agent").flatten();
    let mut statuses = threads.filter_map(|thread| fs::read_to_string(thread.path().join("status")).ok());
    statuses.all(|status| !status.contains("TracerPid:\t0\n"))
}
