//! The launcher and its host: the program that it starts, the privileges that it keeps, and when it takes a namespace for
//! gone.
//!
//! 1. SIGHUP replaces the agent by one of the file that bears the launcher's path now
//! 2. a launcher has the listed capabilities and no others, no new privileges and a seccomp filter
//! 3. a pod that was named by a process is protected as long as a process or a name leads to its namespace
//!
//! May touch: namespaces, links, processes and files of the lab.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tencrypt::launcher::privileges;

use crate::Case;
use crate::crash::{agent, agents_in};
use crate::lab::{Agents, BACKENDS, Lab, Launched, PROJECT, run, tencrypt};
use crate::load::CLIENT;
use crate::services::{copy_directory, replace};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case::new("promise_7_sighup_starts_the_program_that_is_on_the_disk_now", sighup_starts_the_new_file)
        .agents(Agents::Off)
        .looks_itself(),
    Case::new("promise_11_a_launcher_keeps_the_listed_capabilities_and_is_confined", confined),
    Case::new("promise_11_files_of_another_user_are_read_with_the_capabilities_that_are_left", other_user)
        .agents(Agents::Off)
        .looks_itself(),
    Case::new("promise_1_a_pod_outlives_the_process_that_named_it", process_ends)
        .agents(Agents::Off)
        .looks_itself(),
    Case::new("promise_1_a_process_that_leaves_its_namespace_is_not_the_end_of_the_pod", process_moves)
        .agents(Agents::Off)
        .looks_itself(),
    Case::new("promise_1_without_a_launcher_a_pod_outlives_the_process_that_named_it", agent_alone)
        .agents(Agents::Off)
        .looks_itself(),
];

/// Longer than any step takes.
const LIMIT: Duration = Duration::from_secs(15);
/// Longer than a launcher waits between two looks at the holders of a namespace.
const LOOKED: Duration = Duration::from_millis(4_500);

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < end, "{what}: not within {LIMIT:?}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn inode(path: impl AsRef<Path>) -> (u64, u64) {
    let found = fs::metadata(path).expect("a file");
    (found.dev(), found.ino())
}

fn program_of(pid: Pid) -> (u64, u64) {
    inode(format!("/proc/{pid}/exe"))
}

fn sighup_starts_the_new_file(lab: &Lab) {
    let (path, next) = (lab.run_dir().join("tencrypt-now"), lab.run_dir().join("tencrypt-next"));
    let install = || {
        fs::copy(tencrypt(), &next).expect("a copy");
        fs::rename(&next, &path).expect("it takes the name");
        inode(&path)
    };
    let servers =
        BACKENDS.map(|pod| Launched::pod(lab, pod, &lab.directory(PROJECT), &lab.key_file(PROJECT)));
    let first = install();
    let arguments = Launched::args(lab, CLIENT, &lab.directory(PROJECT), &lab.key_file(PROJECT));
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let mut launched = Launched::start_program(lab, &path, &arguments);
    launched.wait_ready();
    let old = agent(lab, CLIENT);
    assert_eq!((program_of(launched.pid()), program_of(old)), (first, first));

    let second = install();
    launched.signal(Signal::SIGHUP);
    until("the agent of the new program", || {
        agents_in(lab, CLIENT).first().is_some_and(|pid| *pid != old) && agents_in(lab, CLIENT).len() == 1
    });
    let new = agent(lab, CLIENT);
    assert_eq!((program_of(launched.pid()), program_of(new)), (first, second));
    lab.curl(CLIENT, "http://web/");

    // The next launcher runs the new program and takes the agent over as it is.
    launched.signal(Signal::SIGQUIT);
    assert_eq!(launched.ended(LIMIT), Some(0), "{}", launched.printed());
    let mut launched = Launched::start_program(lab, &path, &arguments);
    launched.wait_ready();
    assert_eq!(agent(lab, CLIENT), new, "replaced for no reason: {}", launched.printed());

    // Killed, it is followed by one of the file that is there then; with no file, by one of the launcher's own.
    let third = install();
    kill(new, Signal::SIGKILL).expect("kill");
    until("an agent of the third file", || {
        agents_in(lab, CLIENT).iter().any(|pid| program_of(*pid) == third)
    });
    until("it is ready", || launched.printed().contains("protects the pod again"));
    fs::remove_file(&path).expect("the file goes");
    let old = agent(lab, CLIENT);
    launched.signal(Signal::SIGHUP);
    until("an agent of the launcher's own file", || {
        agents_in(lab, CLIENT).first().is_some_and(|pid| *pid != old && program_of(*pid) == second)
    });
    assert!(launched.printed().contains("leads to no program"), "{}", launched.printed());
    lab.curl(CLIENT, "http://web/");
    assert_eq!(launched.stop(), Some(0), "{}", launched.printed());
    drop(servers);
    let left = lab.differences();
    assert!(left.is_empty(), "left behind:\n{}", left.join("\n"));
}

/// Every thread of a launcher.
fn confined(lab: &Lab) {
    let launcher = lab.agent_pids(CLIENT)[0];
    let kept = format!("{:016x}", privileges::kept_bits());
    for thread in fs::read_dir(format!("/proc/{launcher}/task")).expect("threads").flatten() {
        let status = fs::read_to_string(thread.path().join("status")).expect("status");
        let is = |field: &str, wanted: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(field));
            assert_eq!(line.map(str::trim), Some(wanted), "{field} of {:?}", thread.path());
        };
        for set in ["CapEff:", "CapPrm:", "CapBnd:"] {
            is(set, &kept);
        }
        for set in ["CapInh:", "CapAmb:"] {
            is(set, "0000000000000000");
        }
        is("NoNewPrivs:", "1");
        is("Seccomp:", "2");
    }
    let maps = fs::read_to_string(format!("/proc/{launcher}/smaps")).expect("smaps");
    let locked =
        maps.lines().filter(|line| line.starts_with("VmFlags:") && line.split(' ').any(|w| w == "lo"));
    assert!(locked.count() > 0, "no page is locked");
}

/// A directory that only its owner, who is not root, may enter. A key file must be root's, but may lie there.
fn other_user(lab: &Lab) {
    const USER: u32 = 12_345;
    let directory = copy_directory(lab, "other-user");
    let key = directory.parent().expect("a folder").join("other-user.keys");
    fs::create_dir_all(&key).expect("a folder");
    fs::copy(lab.key_file(PROJECT), key.join("key")).expect("a copy");
    fs::set_permissions(key.join("key"), fs::Permissions::from_mode(0o600)).expect("mode");
    for folder in [&directory, &key] {
        for entry in fs::read_dir(folder).expect("a folder").flatten().filter(|e| e.file_name() != "key") {
            fs::set_permissions(entry.path(), fs::Permissions::from_mode(0o600)).expect("mode");
            std::os::unix::fs::chown(entry.path(), Some(USER), Some(USER)).expect("owner");
        }
        fs::set_permissions(folder, fs::Permissions::from_mode(0o700)).expect("mode");
        std::os::unix::fs::chown(folder, Some(USER), Some(USER)).expect("owner");
    }
    let mut launched = Launched::pod(lab, CLIENT, &directory, &key.join("key"));
    assert_eq!(launched.stop(), Some(0), "{}", launched.printed());
    fs::remove_dir_all(&directory).expect("the copy");
    fs::remove_dir_all(&key).expect("the copy");
}

/// A pod whose namespace has no name, and the processes that live there.
struct Nameless<'l> {
    lab: &'l Lab,
    /// Lives in the namespace until its input ends; the pod is named after it.
    first: Child,
    identity: (u64, u64),
    directory: PathBuf,
    resolv: PathBuf,
}

impl<'l> Nameless<'l> {
    fn up(lab: &'l Lab) -> Self {
        let script = "ip link set lo up; echo ready; while read -r line; do eval \"$line\"; echo done; done";
        let mut first = Command::new("unshare")
            .args(["-n", "bash", "-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()
            .expect("unshare");
        let pid = first.id();
        let mut ready = String::new();
        BufReader::new(first.stdout.as_mut().expect("piped")).read_line(&mut ready).expect("a line");
        assert_eq!(ready, "ready\n");
        let node = format!("{}-node2", lab.name());
        for command in [
            format!(
                "ip -n {node} link add p-nameless mtu 1450 type veth peer name eth0 mtu 1450 netns {pid}"
            ),
            format!("ip -n {node} link set p-nameless up"),
            format!(
                "nsenter -t {pid} -n sh -ec 'ip addr add 10.1.2.89/32 dev eth0; ip link set eth0 up; \
                 ip route add 169.254.1.1 dev eth0 scope link; ip route add default via 169.254.1.1 dev eth0'"
            ),
        ] {
            let ran = run(Command::new("sh").args(["-c", &command]), LIMIT);
            assert!(ran.code == 0, "{command}: {}", ran.err);
        }
        let directory = copy_directory(lab, "nameless");
        replace(
            &directory.join("pod-nameless.yaml"),
            "apiVersion: v1\nkind: Pod\nmetadata: {name: nameless, namespace: shop}\n\
             spec: {nodeName: node2, containers: []}\n\
             status: {phase: Running, podIP: 10.1.2.89, podIPs: [{ip: 10.1.2.89}]}\n",
        );
        let resolv = lab.run_dir().join("nameless.conf");
        fs::write(&resolv, "nameserver 10.96.0.10\nsearch shop.svc.cluster.local\n").expect("a resolv.conf");
        Self { lab, first, identity: inode(format!("/proc/{pid}/ns/net")), directory, resolv }
    }

    fn launch(&self) -> Launched {
        let words = [
            "--netns".to_owned(),
            format!("pid:{}", self.first.id()),
            "--project".to_owned(),
            PROJECT.to_owned(),
            "--project-key-file".to_owned(),
            self.lab.key_file(PROJECT).display().to_string(),
            "--directory".to_owned(),
            self.directory.display().to_string(),
            "--resolv-conf".to_owned(),
            self.resolv.display().to_string(),
        ];
        let launched = Launched::start(self.lab, &words.iter().map(String::as_str).collect::<Vec<_>>());
        launched.wait_ready();
        launched
    }

    /// Another process that lives in the namespace; nobody's child but init's, or a shell's that is nobody's.
    fn second(&self) -> Child {
        let mut second = Command::new("nsenter")
            .args(["-t", &self.first.id().to_string(), "-n", "sh", "-c", "echo ready; read line"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("nsenter");
        let mut ready = String::new();
        BufReader::new(second.stdout.as_mut().expect("piped")).read_line(&mut ready).expect("a line");
        assert_eq!(ready, "ready\n");
        second
    }

    /// Lets the first process do something.
    fn order(&mut self, command: &str) {
        let stdin = self.first.stdin.as_mut().expect("piped");
        writeln!(stdin, "{command}").expect("an order");
        let mut done = String::new();
        BufReader::new(self.first.stdout.as_mut().expect("piped")).read_line(&mut done).expect("a line");
    }

    fn end_first(&mut self) {
        drop(self.first.stdin.take());
        self.first.wait().expect("its end");
    }

    /// The agents in the namespace.
    fn agents(&self) -> Vec<Pid> {
        let pids = fs::read_dir("/proc").expect("/proc").flatten();
        let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let is_agent = |pid: &i32| {
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "tencrypt-agent")
                && fs::metadata(format!("/proc/{pid}/ns/net"))
                    .is_ok_and(|found| (found.dev(), found.ino()) == self.identity)
        };
        pids.filter(is_agent).map(Pid::from_raw).collect()
    }

    /// For longer than the launcher waits between two looks, an agent is there.
    fn assert_stays_protected(&self, launched: &mut Launched) {
        let end = Instant::now() + LOOKED;
        while Instant::now() < end {
            let ended = launched.ended(Duration::from_millis(100));
            assert_eq!(ended, None, "the launcher ended:\n{}", launched.printed());
            assert_eq!(self.agents().len(), 1, "{}", launched.printed());
        }
    }
}

impl Drop for Nameless<'_> {
    fn drop(&mut self) {
        // Also after a failure nothing of it stays.
        let _ = self.first.kill();
        let _ = self.first.wait();
        for pid in self.agents() {
            let _ = kill(pid, Signal::SIGKILL);
        }
        let node = format!("{}-node2", self.lab.name());
        let _ = run(Command::new("ip").args(["-n", &node, "link", "del", "p-nameless"]), LIMIT);
        let _ = fs::remove_dir_all(&self.directory);
    }
}

fn end(mut process: Child) {
    drop(process.stdin.take());
    process.wait().expect("its end");
}

fn process_ends(lab: &Lab) {
    let mut pod = Nameless::up(lab);
    let mut launched = pod.launch();
    let second = pod.second();
    pod.end_first();
    pod.assert_stays_protected(&mut launched);
    // A name alone holds it, too.
    let name = format!("{}-nameless", lab.name());
    let path = Path::new("/run/netns").join(&name);
    fs::write(&path, "").expect("a file");
    let ran = run(
        Command::new("mount").args(["--bind", &format!("/proc/{}/ns/net", second.id())]).arg(&path),
        LIMIT,
    );
    assert!(ran.code == 0, "{}", ran.err);
    end(second);
    pod.assert_stays_protected(&mut launched);
    let ran = run(Command::new("ip").args(["netns", "del", &name]), LIMIT);
    assert!(ran.code == 0, "{}", ran.err);
    assert_eq!(launched.ended(LIMIT), Some(0), "{}", launched.printed());
    assert!(pod.agents().is_empty(), "{}", launched.printed());
}

fn process_moves(lab: &Lab) {
    let mut pod = Nameless::up(lab);
    let mut launched = pod.launch();
    // It is not in the namespace any more, and nobody else is.
    pod.order("exec 9</proc/self/ns/net");
    let first = pod.first.id();
    assert_eq!(inode(format!("/proc/{first}/ns/net")), pod.identity);
    pod.order("exec unshare -n bash -c 'echo moved; while read -r line; do eval \"$line\"; echo done; done'");
    until("the move", || inode(format!("/proc/{first}/ns/net")) != pod.identity);
    pod.assert_stays_protected(&mut launched);
    // Back again, as if nothing had been.
    pod.order("exec nsenter --net=/proc/self/fd/9 sh -c 'echo back; read -r line'");
    until("the return", || inode(format!("/proc/{first}/ns/net")) == pod.identity);
    pod.assert_stays_protected(&mut launched);
    pod.end_first();
    assert_eq!(launched.ended(LIMIT), Some(0), "{}", launched.printed());
    assert!(pod.agents().is_empty(), "{}", launched.printed());
}

fn agent_alone(lab: &Lab) {
    let mut pod = Nameless::up(lab);
    let mut launched = pod.launch();
    let second = pod.second();
    launched.signal(Signal::SIGKILL);
    assert!(launched.ended(LIMIT).is_some());
    pod.end_first();
    thread::sleep(Duration::from_secs(2));
    let [alone] = pod.agents()[..] else { panic!("no agent: {}", launched.printed()) };
    end(second);
    thread::sleep(Duration::from_secs(1));
    assert_eq!(pod.agents(), [alone], "{}", launched.printed());
    // It cannot see that it is alone; the next launcher, of any pod, can.
    let other = Launched::pod(lab, CLIENT, &lab.directory(PROJECT), &lab.key_file(PROJECT));
    until("the agent's end", || pod.agents().is_empty());
    drop(other);
}
