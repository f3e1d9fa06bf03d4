//! The kill matrix: processes that die or stop at a message of the channel between launcher and agent, and what is launched after.
//!
//! 1. eight pods of one project on a bridge of their own; each sends a canary to the others all the time, and every link is heard
//! 2. a case is drawn: who ({launcher, agent, both}) gets what (SIGKILL, SIGSTOP) at which message, during bring-up, adoption,
//!    upgrade or stop, with or without `--guard-first`
//! 3. then comes a relaunch, or first one that fails: tunnel port taken, key file wrong, directory empty
//! 4. from a pod's first `guarded` or `protected` on, until an ordered stop has ended with exit code 0, no canary leaves it in
//!    clear. Where a launch finds tables of an earlier one, none leaves it from that launch's first second on
//! 5. a launch that nothing hinders protects within five seconds
//!
//! `TENC_SEED=SEED` draws the cases of another run again. May touch: namespaces, folders and processes that it made itself.

use std::fs::{self, File};
use std::net::{Ipv4Addr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::Case;
use crate::lab::{Agents, Lab, TUNNEL_PORT, exit_code, faulty_tencrypt, run, wait};
use crate::packets::{self, CANARY};
use crate::pod::{Sniffer, enter};
use crate::tamper::Rng;

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case::new("promise_1_guard_first_after_a_launcher_died_half_way_opens_nothing", half_way)
        .agents(Agents::Fault(""))
        .looks_itself()
        .seconds(120),
    Case::new("promise_2_a_failed_relaunch_leaves_a_closed_pod_closed", failed_relaunch)
        .agents(Agents::Fault(""))
        .looks_itself()
        .seconds(120),
    Case::new("promise_13_clear_removes_everything_from_a_pod_whose_launch_keeps_failing", cleared)
        .agents(Agents::Fault(""))
        .looks_itself()
        .seconds(120),
    Case::new("promise_1_kill_matrix_lets_nothing_out_in_clear", matrix)
        .agents(Agents::Fault(""))
        .looks_itself()
        .seconds(4_200),
];

const PODS: u8 = 8;
const PORT: u16 = 9_700;
/// A launch that nothing hinders protects by then.
const PROTECTED_LIMIT: Duration = Duration::from_secs(5);
/// The sniffers have read by then what passed before.
const HEARD: Duration = Duration::from_millis(40);

fn now_ns() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    u64::try_from(now.as_nanos()).expect("before 2554")
}

/// What is known of the frames that leave one pod.
struct Watch {
    /// From this time on a canary in clear is a leak, in nanoseconds since 1970; the largest number: nothing is promised.
    since: AtomicU64,
    leaks: AtomicU64,
    /// All canaries in clear.
    clear: AtomicU64,
}

impl Watch {
    fn new() -> Self {
        Self { since: AtomicU64::new(u64::MAX), leaks: AtomicU64::new(0), clear: AtomicU64::new(0) }
    }

    /// Promises from then on, unless it does already.
    fn promise(&self, at: u64) {
        self.since.fetch_min(at, Ordering::SeqCst);
    }

    fn is_promised(&self) -> bool {
        self.since.load(Ordering::SeqCst) <= now_ns()
    }

    /// An ordered stop has ended.
    fn release(&self) {
        self.since.store(u64::MAX, Ordering::SeqCst);
        thread::sleep(HEARD);
        self.leaks.store(0, Ordering::SeqCst);
    }

    fn leaks(&self) -> u64 {
        thread::sleep(HEARD);
        self.leaks.load(Ordering::SeqCst)
    }
}

/// One pod.
struct Cell {
    netns: String,
    watch: Arc<Watch>,
    /// Its logs and the file of its fault.
    folder: PathBuf,
}

/// Namespaces on a bridge, and the threads that send and listen there. Removed when dropped.
struct Cluster {
    name: String,
    folder: PathBuf,
    cells: Vec<Cell>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

fn address(pod: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 78, 0, pod)
}

fn bash(script: &str) {
    let ran = run(Command::new("bash").args(["-euc", script]), Duration::from_secs(30));
    assert!(ran.code == 0, "{script}: {}{}", ran.out, ran.err);
}

impl Cluster {
    fn up(pods: u8) -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let name = format!("mx{}n{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let folder = std::env::temp_dir().join(&name);
        let mut cluster = Self { name, folder, cells: Vec::new(), stop: Arc::default(), threads: Vec::new() };
        cluster.make_files(pods);
        bash(&format!(
            "ip netns add {0}-br; ip -n {0}-br link add br0 type bridge; ip -n {0}-br addr add {1}/24 dev br0;
             ip -n {0}-br link set br0 up",
            cluster.name,
            address(254)
        ));
        for pod in 1..=pods {
            cluster.add(pod);
        }
        for pod in 1..=pods {
            cluster.start_threads(pod, pods);
        }
        cluster
    }

    fn make_files(&self, pods: u8) {
        fs::create_dir_all(self.folder.join("shop")).expect("a folder");
        fs::create_dir_all(self.folder.join("empty")).expect("a folder");
        for pod in 1..=pods {
            let (at, name) = (address(pod), format!("cell-{pod}"));
            let text = format!(
                "apiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n  namespace: shop\n  uid: {name}\nspec:\n  nodeName: node1\n\
                 status:\n  phase: Running\n  podIP: {at}\n  podIPs:\n  - ip: {at}\n"
            );
            fs::write(self.folder.join("shop").join(format!("{name}.yaml")), text).expect("a manifest");
        }
        let (good, bad) = (self.folder.join("good.key"), self.folder.join("bad.key"));
        bash(&format!(
            "umask 077; head -c 32 /dev/urandom | base64 >{}; echo wrong >{}",
            good.display(),
            bad.display()
        ));
    }

    fn add(&mut self, pod: u8) {
        let (name, at, bridge) = (&self.name, address(pod), address(254));
        let netns = format!("{name}-p{pod}");
        bash(&format!(
            "ip netns add {netns}; ip link add eth0 netns {netns} type veth peer name v{pod} netns {name}-br;
             ip -n {netns} link set lo up; ip -n {netns} addr add {at}/24 dev eth0; ip -n {netns} link set eth0 up;
             ip -n {name}-br link set v{pod} master br0 up; ip -n {netns} route add default via {bridge};
             mkdir -p /etc/netns/{netns}
             printf 'nameserver {bridge}\\nsearch shop.svc.cluster.local\\n' >/etc/netns/{netns}/resolv.conf"
        ));
        let folder = self.folder.join(&netns);
        fs::create_dir_all(&folder).expect("a folder");
        self.cells.push(Cell { netns, watch: Arc::new(Watch::new()), folder });
    }

    fn start_threads(&mut self, pod: u8, pods: u8) {
        let cell = &self.cells[usize::from(pod) - 1];
        let socket = enter(&Path::new("/run/netns").join(&cell.netns), || {
            UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT)).expect("bind")
        });
        socket.set_nonblocking(true).expect("no waiting");
        let stop = Arc::clone(&self.stop);
        self.threads.push(thread::spawn(move || send(&socket, pod, pods, &stop)));
        let bridge = Path::new("/run/netns").join(format!("{}-br", self.name));
        let sniffer = Sniffer::on(&bridge, &format!("v{pod}"));
        sniffer.stamp();
        let (stop, watch) = (Arc::clone(&self.stop), Arc::clone(&cell.watch));
        self.threads.push(thread::spawn(move || listen(&sniffer, pod, &watch, &stop)));
    }
}

/// A canary to each other pod in turn.
fn send(socket: &UdpSocket, pod: u8, pods: u8, stop: &AtomicBool) {
    let others = (1..=pods).filter(|other| *other != pod).collect::<Vec<_>>();
    let mut buffer = [0; 256];
    for to in others.iter().cycle() {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        // What the guard refuses is an error here.
        let _ = socket.send_to(CANARY, (address(*to), PORT));
        while socket.recv(&mut buffer).is_ok() {}
        thread::sleep(Duration::from_millis(2));
    }
}

fn listen(sniffer: &Sniffer, pod: u8, watch: &Watch, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        for (at, frame) in sniffer.drain_stamped() {
            let is_ours =
                packets::seen(&frame).is_some_and(|seen| seen.from == std::net::IpAddr::from(address(pod)));
            if is_ours && packets::has_canary(&frame) {
                watch.clear.fetch_add(1, Ordering::SeqCst);
                let at = u64::try_from(at.as_nanos()).expect("before 2554");
                if at >= watch.since.load(Ordering::SeqCst) {
                    watch.leaks.fetch_add(1, Ordering::SeqCst);
                }
            }
        }
        thread::sleep(Duration::from_millis(5));
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        for cell in &self.cells {
            cell.end_agents();
        }
        for thread in self.threads.drain(..) {
            // Its panic is not this one's.
            let _ = thread.join();
        }
        for namespace in self.cells.iter().map(|cell| cell.netns.clone()).chain([format!("{}-br", self.name)])
        {
            let _ = run(Command::new("ip").args(["netns", "del", &namespace]), Duration::from_secs(10));
            let _ = fs::remove_dir_all(Path::new("/etc/netns").join(&namespace));
        }
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// A `tencrypt launch`; killed when dropped.
struct Launcher {
    child: Child,
    output: PathBuf,
}

impl Launcher {
    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).expect("a pid"))
    }

    fn signal(&self, signal: Signal) {
        // A child that was not waited for keeps its number.
        let _ = kill(self.pid(), signal);
    }

    fn printed(&self) -> String {
        fs::read_to_string(&self.output).unwrap_or_default()
    }

    fn says(&self, word: &str) -> bool {
        self.printed().lines().any(|line| line.starts_with(word))
    }

    fn ended(&mut self, limit: Duration) -> Option<i32> {
        wait(&mut self.child, limit).map(exit_code)
    }
}

impl Drop for Launcher {
    fn drop(&mut self) {
        self.signal(Signal::SIGKILL);
        let _ = self.child.wait();
    }
}

/// What a launch is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hindrance {
    Nothing,
    PortTaken,
    WrongKey,
    EmptyDirectory,
}

/// How a launch is made.
#[derive(Clone, Copy, Debug)]
struct How {
    guard_first: bool,
    ranges: bool,
}

impl Cell {
    fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.netns)
    }

    fn launch(&self, cluster: &Cluster, how: How, hindrance: Hindrance, fault: &str) -> Launcher {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let output = self.folder.join(format!("{}.log", NUMBER.fetch_add(1, Ordering::Relaxed)));
        let file = File::create(&output).expect("a log file");
        let key = if hindrance == Hindrance::WrongKey { "bad.key" } else { "good.key" };
        let directory = if hindrance == Hindrance::EmptyDirectory { "empty" } else { "shop" };
        let mut command = Command::new(faulty_tencrypt().expect("checked by the runner"));
        command.args(["launch", "--netns", &self.netns, "--project", "shop", "--project-key-file"]);
        command.arg(cluster.folder.join(key)).arg("--directory").arg(cluster.folder.join(directory));
        if how.guard_first {
            command.arg("--guard-first");
        }
        if how.ranges {
            command.args(["--pod-cidr", "10.78.0.0/24", "--service-cidr", "10.97.0.0/16"]);
        }
        let child = command
            .env("TENCRYPT_FAULT", fault)
            .stdin(Stdio::null())
            .stdout(file.try_clone().expect("a second descriptor"))
            .stderr(file)
            .spawn()
            .expect("start tencrypt launch");
        Launcher { child, output }
    }

    fn agents(&self) -> Vec<Pid> {
        let ran = run(Command::new("ip").args(["netns", "pids", &self.netns]), Duration::from_secs(5));
        let pids = ran.out.split_whitespace().filter_map(|pid| pid.parse().ok());
        let is_agent = |pid: &i32| {
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "tencrypt-agent")
        };
        pids.filter(is_agent).map(Pid::from_raw).collect()
    }

    /// Also those that stopped before they entered the namespace: their fault names this pod's folder.
    fn end_agents(&self) {
        let folder = self.folder.display().to_string();
        let is_faulty = |pid: &i32| {
            let words = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            let words = String::from_utf8_lossy(&words);
            words.split('\0').any(|word| word.starts_with("TENCRYPT_FAULT=kill=") && word.contains(&folder))
        };
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = processes.filter_map(|process| process.file_name().to_str()?.parse().ok());
        let faulty: Vec<_> = pids.filter(is_faulty).map(Pid::from_raw).collect();
        for pid in self.agents().into_iter().chain(faulty) {
            // It may have ended.
            let _ = kill(pid, Signal::SIGKILL);
        }
    }

    /// Whether there is a table of ours.
    fn has_tables(&self) -> bool {
        let ran =
            enter(&self.path(), || run(Command::new("nft").args(["list", "tables"]), Duration::from_secs(5)));
        ran.out.contains("tencrypt")
    }

    /// What a launch said counts from now on.
    fn observe(&self, launcher: &Launcher) {
        if launcher.says("guarded") || launcher.says("protected") {
            self.watch.promise(now_ns());
        }
    }

    /// A launch is about to begin: tables of an earlier one close the pod within its first second.
    fn promise_if_tables(&self) {
        if self.has_tables() {
            self.watch.promise(now_ns() + 1_000_000_000);
        }
    }

    /// Waits until `done`, and observes meanwhile.
    fn until(
        &self,
        launcher: &mut Launcher,
        limit: Duration,
        mut done: impl FnMut(&Launcher) -> bool,
    ) -> bool {
        let end = Instant::now() + limit;
        loop {
            self.observe(launcher);
            if done(launcher) {
                return true;
            }
            if Instant::now() > end || launcher.ended(Duration::ZERO).is_some() {
                self.observe(launcher);
                return done(launcher);
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// A launch that nothing hinders.
    fn protect(&self, cluster: &Cluster, how: How, fault: &str) -> Result<Launcher, String> {
        self.promise_if_tables();
        let begun = Instant::now();
        let mut launcher = self.launch(cluster, how, Hindrance::Nothing, fault);
        let limit = PROTECTED_LIMIT * if crate::long() { 1 } else { 2 };
        if !self.until(&mut launcher, limit, |launcher| launcher.says("protected")) {
            return Err(format!("not protected after {:?}:\n{}", begun.elapsed(), launcher.printed()));
        }
        Ok(launcher)
    }

    fn assert_closed(&self, when: &str) -> Result<(), String> {
        match self.watch.leaks() {
            0 => Ok(()),
            leaks => Err(format!("{leaks} canaries left in clear ({when})")),
        }
    }

    /// SIGTERM has been sent: an end with exit code 0 opens the pod, any other one leaves it closed.
    fn ordered_end(&self, launcher: &mut Launcher, limit: Duration) -> Option<i32> {
        let code = launcher.ended(limit);
        if code == Some(0) {
            self.watch.release();
        }
        code
    }

    /// A launch that cannot protect the pod, unless an agent is there already: its exit code, if it ended by itself.
    fn fail(&self, cluster: &Cluster, how: How, hindrance: Hindrance) -> Option<i32> {
        self.promise_if_tables();
        // Where an agent lives it has the port.
        let taken = (hindrance == Hindrance::PortTaken)
            .then(|| enter(&self.path(), || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, TUNNEL_PORT))).ok());
        let mut launcher = self.launch(cluster, how, hindrance, "");
        let limit = Duration::from_millis(if how.guard_first { 1_200 } else { 4_000 });
        self.until(&mut launcher, limit, |launcher| launcher.says("protected"));
        let code = launcher.ended(Duration::ZERO);
        drop(launcher);
        thread::sleep(Duration::from_millis(100));
        drop(taken);
        code
    }
}

/// Where in a pod's life the fault comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    BringUp,
    Adoption,
    Upgrade,
    Stop,
}

impl Phase {
    /// The messages to and from the agent that come then.
    fn messages(self) -> (&'static [&'static str], &'static [&'static str]) {
        match self {
            Self::BringUp => {
                (&["Init", "Changes", "Commit", "GuardLoading", "GuardLoaded"], &["Ready", "GuardFilled"])
            }
            Self::Adoption => (
                &["Hello", "Adopt", "Changes", "Commit", "GuardLoading", "GuardLoaded"],
                &["Hello", "Ready", "Committed", "GuardFilled"],
            ),
            Self::Upgrade => (
                &["Init", "HandOver", "Resume", "Changes", "Commit", "GuardLoading", "GuardLoaded", "Ping"],
                &["HandedOver", "Ready", "Committed", "GuardFilled", "Pong"],
            ),
            Self::Stop => (&["Stop"], &["Stopped"]),
        }
    }
}

/// One case, as it was drawn.
#[derive(Debug)]
struct Drawn {
    phase: Phase,
    side: &'static str,
    direction: &'static str,
    message: &'static str,
    occurrence: usize,
    signal: &'static str,
    who: &'static str,
    how: How,
    relaunched: How,
    hindrance: Hindrance,
    pause: Duration,
}

fn pick<T: Copy>(rng: &mut Rng, from: &[T]) -> T {
    from[rng.below(from.len())]
}

fn draw(rng: &mut Rng) -> Drawn {
    let phase = pick(
        rng,
        &[Phase::BringUp, Phase::BringUp, Phase::Adoption, Phase::Adoption, Phase::Upgrade, Phase::Stop],
    );
    let (to, from) = phase.messages();
    let n = rng.below(to.len() + from.len());
    let (message, is_to_agent) =
        to.get(n).map_or_else(|| (from[n - to.len()], false), |message| (*message, true));
    let (side, who) = pick(rng, &[("launcher", "self"), ("agent", "self"), ("launcher", "both")]);
    let sends = (side == "launcher") == is_to_agent;
    let relaunched = How { guard_first: rng.below(2) == 0, ranges: rng.below(4) == 0 };
    Drawn {
        phase,
        side,
        direction: if sends { "send" } else { "receive" },
        message,
        occurrence: pick(rng, &[1, 1, 1, 2]),
        signal: pick(rng, &["KILL", "STOP"]),
        who,
        how: How { guard_first: rng.below(2) == 0, ranges: relaunched.ranges },
        relaunched,
        hindrance: pick(
            rng,
            &[Hindrance::Nothing, Hindrance::PortTaken, Hindrance::WrongKey, Hindrance::EmptyDirectory],
        ),
        pause: Duration::from_millis(u64::try_from(rng.below(400)).expect("fits")),
    }
}

/// A fault that waits to be armed.
struct Fault {
    file: PathBuf,
    word: String,
    occurrence: u64,
}

impl Fault {
    fn new(cell: &Cell, drawn: &Drawn) -> Self {
        let file = cell.folder.join("count");
        fs::write(&file, "").expect("the count");
        let Drawn { side, direction, message, occurrence, signal, who, .. } = drawn;
        let word =
            format!("kill={side}:{direction}:{message}:{occurrence}:{signal}:{who}:{}", file.display());
        Self { file, word, occurrence: u64::try_from(*occurrence).expect("fits") }
    }

    fn arm(&self) {
        fs::write(&self.file, ".").expect("the count");
    }

    fn met(&self) -> bool {
        fs::metadata(&self.file).is_ok_and(|file| file.len() > self.occurrence)
    }
}

/// Runs a case from an open pod to an open pod. Whether the fault was met.
fn run_case(cluster: &Cluster, cell: &Cell, drawn: &Drawn) -> Result<bool, String> {
    await_clear(cell)?;
    let fault = Fault::new(cell, drawn);
    let armed_at_start = matches!(drawn.phase, Phase::BringUp | Phase::Adoption);
    let mut launcher = if armed_at_start {
        if drawn.phase == Phase::Adoption {
            drop(cell.protect(cluster, drawn.how, "")?);
        }
        fault.arm();
        cell.launch(cluster, drawn.how, Hindrance::Nothing, &fault.word)
    } else {
        let launcher = cell.protect(cluster, drawn.how, &fault.word)?;
        fault.arm();
        launcher.signal(if drawn.phase == Phase::Stop { Signal::SIGTERM } else { Signal::SIGHUP });
        launcher
    };
    cell.until(&mut launcher, Duration::from_millis(2_500), |_| fault.met());
    cell.until(&mut launcher, drawn.pause, |_| false);
    if drawn.phase == Phase::Stop {
        cell.ordered_end(&mut launcher, Duration::from_secs(3));
    }
    drop(launcher);
    cell.assert_closed("after the fault")?;
    if drawn.hindrance != Hindrance::Nothing {
        cell.fail(cluster, drawn.relaunched, drawn.hindrance);
        cell.assert_closed("after the relaunch that failed")?;
    }
    let mut launcher = cell.protect(cluster, drawn.relaunched, "")?;
    thread::sleep(Duration::from_millis(50));
    cell.assert_closed("after the relaunch")?;
    launcher.signal(Signal::SIGTERM);
    let code = cell.ordered_end(&mut launcher, Duration::from_secs(10));
    if code != Some(0) {
        return Err(format!("the ordered stop ended with {code:?}:\n{}", launcher.printed()));
    }
    Ok(fault.met())
}

/// The positive control: a pod that promises nothing is heard.
fn await_clear(cell: &Cell) -> Result<(), String> {
    let before = cell.watch.clear.load(Ordering::SeqCst);
    let end = Instant::now() + Duration::from_secs(5);
    while cell.watch.clear.load(Ordering::SeqCst) == before {
        if Instant::now() > end {
            return Err("no canary is seen of an open pod".to_owned());
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn seed() -> u64 {
    match std::env::var("TENC_SEED") {
        Ok(text) => {
            let text = text.split(':').next().unwrap_or_default();
            text.parse().unwrap_or_else(|e| panic!("TENC_SEED={text}: {e}"))
        }
        Err(_) => now_ns() / 1_000 % 1_000_000,
    }
}

fn matrix(_: &Lab) {
    let seed = seed();
    let time = Duration::from_secs(if crate::long() { 3_600 } else { 90 });
    crate::say(&format!("kill matrix: TENC_SEED={seed} draws its cases again"));
    let cluster = Cluster::up(PODS);
    let begun = Instant::now();
    let failures = Mutex::new(Vec::new());
    let (cases, met) = (AtomicU64::new(0), AtomicU64::new(0));
    let is_failed = || !failures.lock().expect("no panic").is_empty();
    thread::scope(|scope| {
        for (pod, cell) in (0_u64..).zip(&cluster.cells) {
            let (cluster, failures, cases, met, is_failed) = (&cluster, &failures, &cases, &met, &is_failed);
            scope.spawn(move || {
                for round in 0_u64.. {
                    if begun.elapsed() > time || is_failed() {
                        return;
                    }
                    let drawn = draw(&mut Rng(seed.wrapping_mul(1 << 20).wrapping_add(pod << 14 | round)));
                    match run_case(cluster, cell, &drawn) {
                        Ok(was_met) => met.fetch_add(u64::from(was_met), Ordering::SeqCst),
                        Err(error) => {
                            let text =
                                format!("{}, case {round}: {error}\n{drawn:?}\n{}", cell.netns, logs(cell));
                            failures.lock().expect("no panic").push(text);
                            return;
                        }
                    };
                    cases.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
    });
    let failures = failures.into_inner().expect("no panic");
    crate::say(&format!(
        "kill matrix: {} cases in {} s, the fault was met in {}, {} failed (TENC_SEED={seed})",
        cases.load(Ordering::SeqCst),
        begun.elapsed().as_secs(),
        met.load(Ordering::SeqCst),
        failures.len()
    ));
    assert!(failures.is_empty(), "TENC_SEED={seed}: {}", failures.join("\n"));
}

/// The last launchers' words.
fn logs(cell: &Cell) -> String {
    let files = fs::read_dir(&cell.folder).into_iter().flatten().flatten();
    let number = |path: &Path| path.file_stem().and_then(|stem| stem.to_str()?.parse::<u64>().ok());
    let mut logs: Vec<_> = files.filter_map(|file| Some((number(&file.path())?, file.path()))).collect();
    logs.sort();
    let last = logs.iter().rev().take(4).rev();
    last.map(|(number, path)| format!("--- {number}\n{}", fs::read_to_string(path).unwrap_or_default()))
        .collect()
}

const PLAIN: How = How { guard_first: false, ranges: false };

/// A pod whose first launcher was killed just before it sent the commit: its agent listens already.
fn half_way_up(cluster: &Cluster, cell: &Cell) {
    await_clear(cell).expect("the positive control");
    let drawn = Drawn {
        phase: Phase::BringUp,
        side: "launcher",
        direction: "send",
        message: "Commit",
        occurrence: 1,
        signal: "KILL",
        who: "self",
        how: PLAIN,
        relaunched: PLAIN,
        hindrance: Hindrance::Nothing,
        pause: Duration::ZERO,
    };
    let fault = Fault::new(cell, &drawn);
    fault.arm();
    let mut launcher = cell.launch(cluster, PLAIN, Hindrance::Nothing, &fault.word);
    assert_eq!(launcher.ended(Duration::from_secs(10)), Some(137), "{}", launcher.printed());
    assert!(fault.met());
}

fn half_way(_: &Lab) {
    let cluster = Cluster::up(2);
    let cell = &cluster.cells[0];
    half_way_up(&cluster, cell);
    let how = How { guard_first: true, ..PLAIN };
    let mut launcher = cell.launch(&cluster, how, Hindrance::Nothing, "");
    assert!(
        cell.until(&mut launcher, PROTECTED_LIMIT * 2, |launcher| launcher.says("protected")),
        "{}",
        launcher.printed()
    );
    assert!(launcher.says("guarded") && cell.watch.is_promised());
    thread::sleep(Duration::from_millis(500));
    cell.assert_closed("since `guarded`").expect("closed");
    launcher.signal(Signal::SIGTERM);
    assert_eq!(cell.ordered_end(&mut launcher, Duration::from_secs(10)), Some(0), "{}", launcher.printed());
}

/// A pod that was protected once and whose launcher and agent were killed.
fn dead(cluster: &Cluster, cell: &Cell) {
    await_clear(cell).expect("the positive control");
    drop(cell.protect(cluster, PLAIN, "").expect("protected"));
    cell.end_agents();
    // Until then the port is the agent's.
    let end = Instant::now() + Duration::from_secs(5);
    while !cell.agents().is_empty() {
        assert!(Instant::now() < end, "the agent does not end");
        thread::sleep(Duration::from_millis(5));
    }
}

fn failed_relaunch(_: &Lab) {
    let cluster = Cluster::up(2);
    let cell = &cluster.cells[0];
    dead(&cluster, cell);
    for hindrance in
        [Hindrance::PortTaken, Hindrance::WrongKey, Hindrance::EmptyDirectory, Hindrance::PortTaken]
    {
        let code = cell.fail(&cluster, PLAIN, hindrance);
        assert!(code.is_some_and(|code| code != 0), "{hindrance:?}: {code:?}\n{}", logs(cell));
        thread::sleep(Duration::from_millis(300));
        cell.assert_closed("after a relaunch that failed").unwrap_or_else(|e| panic!("{hindrance:?}: {e}"));
    }
    let mut launcher = cell.protect(&cluster, PLAIN, "").expect("protected");
    cell.assert_closed("after the relaunch").expect("closed");
    launcher.signal(Signal::SIGTERM);
    assert_eq!(cell.ordered_end(&mut launcher, Duration::from_secs(10)), Some(0), "{}", launcher.printed());
}

fn cleared(_: &Lab) {
    let cluster = Cluster::up(2);
    let cell = &cluster.cells[0];
    dead(&cluster, cell);
    let code = cell.fail(&cluster, PLAIN, Hindrance::PortTaken);
    assert!(code.is_some_and(|code| code != 0), "{code:?}\n{}", logs(cell));
    cell.assert_closed("before the order").expect("closed");
    assert!(cell.has_tables(), "the pod is not closed");
    let program = faulty_tencrypt().expect("checked by the runner");
    let ran = run(Command::new(program).args(["clear", &cell.netns]), Duration::from_secs(10));
    assert_eq!(ran.code, 0, "{}{}", ran.out, ran.err);
    cell.watch.release();
    assert!(!cell.has_tables(), "tables are left");
    await_clear(cell).expect("the pod is open");
    let left =
        run(Command::new("ip").args(["-n", &cell.netns, "link", "show", "tenc0"]), Duration::from_secs(5));
    assert_ne!(left.code, 0, "tenc0 is left");
}
