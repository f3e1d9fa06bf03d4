//! Pods that vanish: agent and launcher end within a second, and nothing of them is left.
//!
//! 1. a pod beside the lab's own is made and protected
//! 2. its namespace goes at a random [`Moment`]; so does its link
//! 3. within [`LIMIT`] no process is in the namespace and no launcher of it is there; its runtime files are gone
//! 4. after all cycles this process has as many descriptors, the host as many mounts and namespaces as before
//!
//! Several pods vanish at a time. Another lab on the same host shows in the number of namespaces, not in the rest.
//! May touch: namespaces, links and files named after the lab.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::Case;
use crate::lab::{Agents, Lab, Launched, PROJECT, run};
use crate::lifecycle::StopAtEnd;
use crate::packets::CANARY;
use crate::pod;
use crate::services::{copy_directory, replace};
use crate::tamper::Rng;

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case::new(
        "promise_13_a_namespace_that_disappears_ends_agent_and_launcher_and_leaves_nothing",
        vanished_namespaces,
    )
    .agents(Agents::Off)
    .seconds(3_600)
    .looks_itself(),
    Case::new("promise_13_the_end_of_the_pods_device_is_the_end_of_the_pod", vanished_device)
        .agents(Agents::Off)
        .looks_itself(),
];

/// How long the processes may go on.
const LIMIT: Duration = Duration::from_secs(1);
/// A loaded machine takes its own time to show the state. The long form runs on a machine of its own.
fn grace() -> Duration {
    Duration::from_millis(if crate::long() { 500 } else { 4_000 })
}
/// The kernel frees namespaces by and by.
const SETTLE: Duration = Duration::from_secs(20);
/// Pods that come and go beside each other.
const SLOTS: usize = 3;
/// Namespaces that other labs on this host may have made meanwhile.
const OTHERS: usize = 60;

/// When a namespace goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Moment {
    BeforeReady,
    InTraffic,
    InUpgrade,
    WithoutLauncher,
}

const MOMENTS: [Moment; 4] =
    [Moment::BeforeReady, Moment::InTraffic, Moment::InUpgrade, Moment::WithoutLauncher];

fn ip(commands: &str) {
    let ran = run(
        Command::new("bash").args(["-c", &format!("ip -batch - <<'END'\n{commands}\nEND\n")]),
        Duration::from_secs(10),
    );
    assert!(ran.code == 0, "ip -batch: {commands}: {}", ran.err);
}

/// A pod that is made to vanish.
struct Vanishing<'l> {
    lab: &'l Lab,
    netns: String,
    node: String,
    link: String,
    identity: u64,
    cookie: u64,
}

impl<'l> Vanishing<'l> {
    fn up(lab: &'l Lab, slot: usize) -> Self {
        let (netns, node) = (format!("{}-gone{slot}", lab.name()), format!("{}-node2", lab.name()));
        let link = format!("p-gone{slot}");
        ip(&format!("netns add {netns}"));
        let ran = run(
            Command::new("ip")
                .args(["-n", &node, "link", "add", &link, "mtu", "1450", "type", "veth"])
                .args(["peer", "name", "eth0", "mtu", "1450", "netns", &netns]),
            Duration::from_secs(10),
        );
        assert!(ran.code == 0, "{}", ran.err);
        let address = address(slot);
        for (netns, commands) in [
            (&node, format!("link set {link} up")),
            (
                &netns,
                format!(
                    "addr add {address}/32 dev eth0\nlink set lo up\nlink set eth0 up\n\
                     route add 169.254.1.1 dev eth0 scope link\nroute add default via 169.254.1.1 dev eth0"
                ),
            ),
        ] {
            let ran = run(
                Command::new("bash")
                    .args(["-c", &format!("ip -n {netns} -batch - <<'END'\n{commands}\nEND")]),
                Duration::from_secs(10),
            );
            assert!(ran.code == 0, "{commands}: {}", ran.err);
        }
        let path = Path::new("/run/netns").join(&netns);
        let identity = fs::metadata(&path).expect("the namespace").ino();
        let cookie = pod::enter(&path, || {
            let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("a socket");
            tencrypt::sys::netns::cookie(socket).expect("SO_NETNS_COOKIE")
        });
        Self { lab, netns, node, link, identity, cookie }
    }

    fn launch(&self, directory: &Path, resolv: &Path) -> Launched {
        let name = self.netns.rsplit('-').next().expect("a name");
        let mut args = Launched::args(self.lab, name, directory, &self.lab.key_file(PROJECT));
        args.extend(["--resolv-conf".to_owned(), resolv.display().to_string()]);
        Launched::start(self.lab, &args.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// What of it is there still.
    fn left(&self) -> Vec<String> {
        let mut left: Vec<_> = self.inside().iter().map(|pid| format!("process {pid}")).collect();
        let files = fs::read_dir("/run/tencrypt").into_iter().flatten().flatten();
        let names = files.map(|entry| entry.file_name().to_string_lossy().into_owned());
        let stem = format!("{}.", self.cookie);
        left.extend(names.filter(|name| name.starts_with(&stem)).map(|name| format!("file {name}")));
        left
    }

    /// The processes in the namespace.
    fn inside(&self) -> Vec<Pid> {
        let entries = fs::read_dir("/proc").expect("/proc").flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        // A dead process has no namespace any more.
        let is_inside =
            |pid: &i32| fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|ns| ns.ino() == self.identity);
        pids.filter(is_inside).map(Pid::from_raw).collect()
    }

    fn go(&self) {
        ip(&format!("netns del {}", self.netns));
        // The other end went with the namespace, if nothing keeps it.
        let _ = run(Command::new("ip").args(["-n", &self.node, "link", "del", &self.link]), LIMIT);
    }
}

impl Drop for Vanishing<'_> {
    fn drop(&mut self) {
        // Also after a failure nothing of it stays.
        if thread::panicking() {
            for pid in self.inside() {
                let _ = kill(pid, Signal::SIGKILL);
            }
            let _ = run(Command::new("ip").args(["netns", "del", &self.netns]), LIMIT);
            let _ = run(Command::new("ip").args(["-n", &self.node, "link", "del", &self.link]), LIMIT);
        }
    }
}

fn address(slot: usize) -> String {
    format!("10.1.2.{}", 90 + slot)
}

/// One pod from its beginning to its end: how long the processes went on after it.
fn cycle(
    lab: &Lab,
    slot: usize,
    moment: Moment,
    wait: Duration,
    directory: &Path,
    resolv: &Path,
) -> Duration {
    let pod = Vanishing::up(lab, slot);
    let mut launched = pod.launch(directory, resolv);
    let over = AtomicBool::new(false);
    if moment != Moment::BeforeReady {
        launched.wait_ready();
    }
    let started = thread::scope(|scope| {
        let _stop = StopAtEnd(&over);
        match moment {
            Moment::BeforeReady => {}
            Moment::InTraffic => {
                let path = Path::new("/run/netns").join(&pod.netns);
                let socket = pod::enter(&path, || std::net::UdpSocket::bind("0.0.0.0:0").expect("a socket"));
                let (over, to) = (&over, lab.pod("shop-web2").v4);
                scope.spawn(move || {
                    while !over.load(Ordering::Acquire) {
                        // Lost, all the same: the agent has work.
                        let _ = socket.send_to(CANARY, (to, 7_007));
                        thread::sleep(Duration::from_micros(200));
                    }
                });
            }
            Moment::InUpgrade => kill(launched.pid(), Signal::SIGHUP).expect("SIGHUP"),
            Moment::WithoutLauncher => kill(launched.pid(), Signal::SIGKILL).expect("SIGKILL"),
        }
        thread::sleep(wait);
        pod.go();
        Instant::now()
    });
    let code = launched.ended(LIMIT + grace());
    let code = code.unwrap_or_else(|| panic!("{moment:?}: the launcher goes on:\n{}", launched.printed()));
    let expected = match moment {
        // What it was about to do failed.
        Moment::BeforeReady => (0..=3).contains(&code),
        Moment::WithoutLauncher => code == 128 + 9,
        Moment::InTraffic | Moment::InUpgrade => code == 0,
    };
    assert!(expected, "{moment:?}: the launcher's end was {code}:\n{}", launched.printed());
    assert!(!launched.printed().contains("panicked"), "{}", launched.printed());
    loop {
        let left = pod.left();
        let taken = started.elapsed();
        if left.is_empty() {
            return taken;
        }
        assert!(
            taken < LIMIT + grace(),
            "{moment:?}: left after {taken:?}: {left:?}\n{}",
            launched.printed()
        );
        thread::sleep(Duration::from_millis(2));
    }
}

/// What may not grow.
#[derive(Clone, Copy, Debug)]
struct Footprint {
    descriptors: usize,
    mounts: usize,
    namespaces: usize,
}

impl Footprint {
    fn of(lab: &Lab) -> Self {
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
        // Those of other labs come and go.
        let counts = |line: &&str| !line.contains("/netns/") || line.contains(&format!("/{}-", lab.name()));
        let slabs = fs::read_to_string("/proc/slabinfo").unwrap_or_default();
        let namespaces =
            slabs.lines().find_map(|line| line.strip_prefix("net_namespace ")?.split_whitespace().next());
        Self {
            descriptors: fs::read_dir("/proc/self/fd").expect("descriptors").count(),
            mounts: mounts.lines().filter(counts).count(),
            namespaces: namespaces.and_then(|count| count.parse().ok()).unwrap_or_default(),
        }
    }

    fn has_grown_from(self, before: Self) -> bool {
        self.descriptors > before.descriptors
            || self.mounts > before.mounts
            || self.namespaces > before.namespaces + OTHERS
    }
}

fn vanished_namespaces(lab: &Lab) {
    let cycles = if crate::long() { 1_000 } else { 12 };
    let (directory, resolv) = prepare(lab);
    let before = Footprint::of(lab);
    let times = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for slot in 0..SLOTS {
            let (times, directory, resolv) = (&times, &directory, &resolv);
            scope.spawn(move || {
                let mut rng = Rng(u64::try_from(slot).expect("small"));
                for n in (slot..cycles).step_by(SLOTS) {
                    let moment = MOMENTS[n % MOMENTS.len()];
                    let longest = if moment == Moment::BeforeReady { 200 } else { 60 };
                    let wait = Duration::from_millis(rng.below(longest).try_into().expect("small"));
                    let taken = cycle(lab, slot, moment, wait, directory, resolv);
                    times.lock().expect("no other panicked").push((moment, taken));
                }
            });
        }
    });
    let mut times = times.into_inner().expect("no thread panicked");
    times.sort_by_key(|(moment, taken)| (*moment, *taken));
    for of in times.chunk_by(|a, b| a.0 == b.0) {
        let at = |percent: usize| of[(of.len() * percent).div_ceil(100).clamp(1, of.len()) - 1].1;
        crate::say(&format!(
            "vanished {:?}: {} cycles, ended after median {:?}, p99 {:?}, longest {:?}",
            of[0].0,
            of.len(),
            at(50),
            at(99),
            at(100)
        ));
        assert!(at(50) < LIMIT, "{:?}: {of:?}", of[0].0);
    }
    let end = Instant::now() + SETTLE;
    let mut after = Footprint::of(lab);
    while after.has_grown_from(before) && Instant::now() < end {
        thread::sleep(Duration::from_millis(200));
        after = Footprint::of(lab);
    }
    crate::say(&format!("{cycles} cycles: before {before:?}, after {after:?}"));
    assert!(!after.has_grown_from(before), "{cycles} cycles: {before:?}, then {after:?}");
    let listed = run(Command::new("ip").args(["-n", &format!("{}-node2", lab.name()), "link"]), LIMIT);
    assert!(!listed.out.contains("p-gone"), "links are left:\n{}", listed.out);
}

/// A directory that knows the pods, and their resolv.conf.
fn prepare(lab: &Lab) -> (std::path::PathBuf, std::path::PathBuf) {
    let directory = copy_directory(lab, "gone");
    for slot in 0..SLOTS {
        let address = address(slot);
        replace(
            &directory.join(format!("pod-gone{slot}.yaml")),
            &format!(
                "apiVersion: v1\nkind: Pod\nmetadata: {{name: gone{slot}, namespace: shop}}\n\
                 spec: {{nodeName: node2, containers: []}}\n\
                 status: {{phase: Running, podIP: {address}, podIPs: [{{ip: {address}}}]}}\n"
            ),
        );
    }
    let resolv = lab.run_dir().join("gone.conf");
    fs::write(&resolv, "nameserver 10.96.0.10\nsearch shop.svc.cluster.local\n").expect("a resolv.conf");
    (directory, resolv)
}

fn vanished_device(lab: &Lab) {
    let (directory, resolv) = prepare(lab);
    let pod = Vanishing::up(lab, 0);
    let mut launched = pod.launch(&directory, &resolv);
    launched.wait_ready();
    let started = Instant::now();
    let deleted = run(Command::new("ip").args(["-n", &pod.netns, "link", "del", "eth0"]), LIMIT);
    assert!(deleted.code == 0, "{}", deleted.err);
    let code = launched.ended(LIMIT + grace());
    assert_eq!(code, Some(0), "{}", launched.printed());
    while !pod.left().is_empty() {
        assert!(started.elapsed() < LIMIT + grace(), "left: {:?}", pod.left());
        thread::sleep(Duration::from_millis(2));
    }
    ip(&format!("netns del {}", pod.netns));
}
