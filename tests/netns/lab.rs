//! A lab of its own for a test: `netns-scripts/lab.sh` with a unique name, gone again afterwards.
//!
//! 1. `Lab::up` makes it and takes the namespaces' state before any agent ran
//! 2. `ensure` starts, changes or stops the agents
//! 3. `leaks` reads the detector
//! 4. dropping it takes it down; a sweeper process does so when this process dies
//!
//! May touch: what lab.sh touches, files under /run/tencrypt-lab/NAME.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use crate::pod::Pod;
use crate::snapshot::Snapshot;

/// The tunnel's UDP port in the lab.
pub const TUNNEL_PORT: u16 = 51_820;
/// The project whose pods are protected.
pub const PROJECT: &str = "shop";
/// The pods that `lab.sh protect` protects.
pub const PROTECTED: [&str; 4] = ["shop-client", "shop-web1", "shop-web2", "shop-client2"];
/// The pods that serve `web`, `web-headless` and `echo`.
pub const BACKENDS: [&str; 2] = ["shop-web1", "shop-web2"];

const PODS: &[(&str, [u8; 4], &str)] = &[
    ("shop-client", [10, 1, 1, 11], "fd00:10:1:1::11"),
    ("shop-web1", [10, 1, 1, 12], "fd00:10:1:1::12"),
    ("bank-client", [10, 1, 1, 21], "fd00:10:1:1::21"),
    ("kube-dns", [10, 1, 1, 53], "fd00:10:1:1::53"),
    ("shop-client2", [10, 1, 2, 11], "fd00:10:1:2::11"),
    ("shop-web2", [10, 1, 2, 12], "fd00:10:1:2::12"),
    ("shop-lone", [10, 1, 2, 13], "fd00:10:1:2::13"),
    ("bank-server", [10, 1, 2, 22], "fd00:10:1:2::22"),
];

/// Addresses of the nodes that no Node object names; as in netns-scripts/lib/common.sh.
const NODE_CIDRS: [&str; 5] =
    ["10.1.1.1/32", "fd00:10:1:1::1/128", "fe80::1/128", "10.1.1.0/32", "10.1.2.0/32"];

/// Arguments of `tencrypt launch` that name the cluster's ranges; with them it also gets the manifests of every namespace.
pub const RANGES: &str = "--pod-cidr 10.1.0.0/16 --pod-cidr fd00:10:1::/48 --service-cidr 10.96.0.0/16 --service-cidr fd00:10:96::/112";

/// The cluster's resolver, as the pods' resolv.conf names it.
pub const RESOLVER: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);

/// Both VIPs of `shop/web`, port 80.
pub fn web_vips() -> [SocketAddr; 2] {
    vip(0x01, 80)
}

/// Both VIPs of `shop/echo`, UDP port 7.
pub fn echo_vips() -> [SocketAddr; 2] {
    vip(0x02, 7)
}

/// Both VIPs of `bank/ledger`, port 80.
pub fn ledger_vips() -> [SocketAddr; 2] {
    [
        (Ipv4Addr::new(10, 96, 2, 1), 80).into(),
        ("fd00:10:96::201".parse::<Ipv6Addr>().expect("an address"), 80).into(),
    ]
}

/// The host outside the cluster.
pub fn external() -> [IpAddr; 2] {
    [Ipv4Addr::new(203, 0, 113, 10).into(), "2001:db8:113::10".parse().expect("an address")]
}

fn vip(low: u8, port: u16) -> [SocketAddr; 2] {
    [
        (Ipv4Addr::new(10, 96, 1, low), port).into(),
        (Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x100 + u16::from(low)), port).into(),
    ]
}

/// VIP number `n` of the range that tests take services from; the nodes lead port 80 of each to the web pods.
pub fn pool_vips(n: u16) -> [IpAddr; 2] {
    let [high, low] = n.to_be_bytes();
    assert!(high < 64, "the pool has 16,384 addresses");
    [
        Ipv4Addr::new(10, 96, 64 + high, low).into(),
        Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x4000 + n).into(),
    ]
}

/// The binary under test.
pub fn tencrypt() -> PathBuf {
    std::env::var_os("TENCRYPT").map_or_else(|| env!("CARGO_BIN_EXE_tencrypt").into(), PathBuf::from)
}

/// The test build that can be told to misbehave.
pub fn faulty_tencrypt() -> Option<PathBuf> {
    std::env::var_os("TENCRYPT_FAULT_BIN").map(PathBuf::from)
}

/// Which agents run in a lab.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Agents {
    /// None.
    Off,
    /// The four protected pods, launched with these further arguments.
    On(&'static str),
    /// The test build in the four protected pods, with this fault.
    Fault(&'static str),
}

/// What the leak detector saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaks {
    /// Packets that passed a protected pod's link in clear, those of declared destinations excepted.
    pub leaked: u64,
    /// Sealed datagrams.
    pub tunnel: u64,
    /// The detector's rows: pod, family, direction, class, packets.
    pub rows: Vec<[String; 5]>,
}

impl Leaks {
    /// Packets of the rows that `pick` likes, by pod, family, direction and class.
    pub fn count(&self, pick: impl Fn(&str, &str, &str, &str) -> bool) -> u64 {
        self.rows
            .iter()
            .filter(|[pod, family, direction, class, _]| pick(pod, family, direction, class))
            .map(|row| row[4].parse::<u64>().expect("a count"))
            .sum()
    }
}

/// What a command inside a pod did.
#[derive(Debug)]
pub struct Ran {
    /// Exit code; 128 + n after signal n; 124 when it was stopped at its limit.
    pub code: i32,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

/// A running lab.
pub struct Lab {
    name: String,
    rp_filter: u8,
    pods: BTreeMap<&'static str, Pod>,
    agents: Mutex<Agents>,
    /// Whether a case declared outside destinations of its own.
    declared: AtomicBool,
    before: BTreeMap<&'static str, Snapshot>,
    host_sysctls: Snapshot,
}

impl Lab {
    /// Brings a new lab up, with this rp_filter on `all` and `default` of its pods.
    pub fn up(rp_filter: u8) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("{}{}", name_prefix(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let host_sysctls = Snapshot::sysctls_of(Path::new("/proc/self/ns/net"));
        let mut lab = Self {
            name,
            rp_filter,
            pods: BTreeMap::new(),
            agents: Mutex::new(Agents::Off),
            declared: AtomicBool::new(false),
            before: BTreeMap::new(),
            host_sysctls,
        };
        let up = lab.script(&["up"], &[], Duration::from_secs(60));
        assert!(up.code == 0, "lab.sh up failed:\n{}{}", up.out, up.err);
        for (name, v4, v6) in PODS {
            let netns = Path::new("/run/netns").join(format!("{}-{name}", lab.name));
            let pod = Pod {
                name: (*name).to_owned(),
                netns,
                v4: (*v4).into(),
                v6: v6.parse().expect("an address"),
                device: "eth0".to_owned(),
            };
            lab.pods.insert(name, pod);
        }
        lab.before = lab.pods.iter().map(|(name, pod)| (*name, Snapshot::of(&pod.netns))).collect();
        lab
    }

    /// The value of rp_filter in this lab's pods.
    pub fn rp_filter(&self) -> u8 {
        self.rp_filter
    }

    /// The lab's name, which is what its namespaces begin with.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A pod by name.
    pub fn pod(&self, name: &str) -> &Pod {
        self.pods.get(name).unwrap_or_else(|| panic!("no pod {name}"))
    }

    /// The file of a namespace that is no pod: `node1`, `node2`, `ext`.
    pub fn netns(&self, name: &str) -> PathBuf {
        Path::new("/run/netns").join(format!("{}-{name}", self.name))
    }

    /// The lab's folder of state.
    pub fn run_dir(&self) -> PathBuf {
        Path::new("/run/tencrypt-lab").join(&self.name)
    }

    /// The directory that the agents of `project` watch.
    pub fn directory(&self, project: &str) -> PathBuf {
        self.run_dir().join("directory").join(project)
    }

    /// The key file of `project`.
    pub fn key_file(&self, project: &str) -> PathBuf {
        self.run_dir().join(format!("{project}.key"))
    }

    /// Runs lab.sh.
    pub fn script(&self, args: &[&str], env: &[(&str, &str)], limit: Duration) -> Ran {
        let mut command = Command::new(lab_script());
        command.args(args).env("TENC_LAB", &self.name).env("TENC_LAB_RP_FILTER", self.rp_filter.to_string());
        if !env.iter().any(|(name, _)| *name == "TENCRYPT") {
            command.env("TENCRYPT", tencrypt());
        }
        command.envs(env.iter().copied());
        run(&mut command, limit)
    }

    /// Runs a shell command inside a pod, as `lab.sh exec` does.
    pub fn exec(&self, pod: &str, command: &str, limit: Duration) -> Ran {
        self.script(&["exec", pod, "--", "bash", "-c", command], &[], limit)
    }

    /// The body that `curl ARGS` prints inside a pod. Panics when it fails or the status is not 200.
    pub fn curl(&self, pod: &str, args: &str) -> String {
        let ran = self.try_curl(pod, args);
        assert!(
            ran.code == 0,
            "curl {args} in {pod}: exit {} {}{}",
            ran.code,
            ran.err,
            self.where_is(pod, args)
        );
        ran.out
    }

    /// As `curl`, but failing is an answer.
    pub fn try_curl(&self, pod: &str, args: &str) -> Ran {
        self.exec(pod, &format!("curl -sS --fail --max-time 5 {args}"), Duration::from_secs(10))
    }

    fn where_is(&self, pod: &str, args: &str) -> String {
        let host = args.rsplit('/').nth(1).unwrap_or_default().trim_matches(['[', ']']);
        format!(" (last part: {host}, rp_filter {}, pod {pod})", self.rp_filter)
    }

    /// Starts, changes or stops the agents so that exactly these run.
    pub fn ensure(&self, wanted: Agents) {
        let mut running = self.agents.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if *running == wanted {
            return;
        }
        if *running != Agents::Off {
            let ran = self.script(&["unprotect"], &[], Duration::from_secs(30));
            assert!(ran.code == 0, "lab.sh unprotect failed:\n{}{}", ran.out, ran.err);
            *running = Agents::Off;
        }
        let (args, fault) = match wanted {
            Agents::Off => return,
            Agents::On(args) => (args, None),
            Agents::Fault(fault) => ("", Some(fault)),
        };
        let binary =
            if fault.is_some() { faulty_tencrypt().expect("checked by the runner") } else { tencrypt() };
        let binary = binary.display().to_string();
        let mut env = vec![("TENC_LAUNCH_ARGS", args), ("TENCRYPT", &binary)];
        env.extend(fault.map(|fault| ("TENCRYPT_FAULT", fault)));
        let ran = self.script(&[&["protect"], &PROTECTED[..]].concat(), &env, Duration::from_secs(60));
        assert!(ran.code == 0, "lab.sh protect failed:\n{}{}", ran.out, ran.err);
        *running = wanted;
        drop(running);
        self.flush_neighbours();
    }

    /// Says that the agents are no longer what `ensure` made of them.
    pub fn agents_are(&self, now: Agents) {
        *self.agents.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = now;
    }

    /// Empties every pod's neighbour cache, as on a pod that never spoke.
    pub fn flush_neighbours(&self) {
        for pod in self.pods.values() {
            pod.enter(|| {
                Command::new("ip").args(["neigh", "flush", "all"]).output().expect("ip neigh flush")
            });
        }
    }

    /// Ends what earlier cases left of their connections: the kernel goes on closing those after their sockets are gone.
    pub fn end_connections(&self) {
        for pod in self.pods.values() {
            let ran = pod.enter(|| run(Command::new("ss").args(["-K", "-t"]), Duration::from_secs(5)));
            assert!(ran.code == 0, "ss -K: {}", ran.err);
        }
    }

    /// Sets the leak detector to zero.
    pub fn reset_leaks(&self) {
        let ran = self.script(&["leaks", "--reset"], &[], Duration::from_secs(20));
        assert!(ran.code == 0, "leaks --reset: {}{}", ran.out, ran.err);
    }

    /// What the leak detector saw since it was set to zero.
    pub fn leaks(&self) -> Leaks {
        let ran = self.script(&["leaks"], &[], Duration::from_secs(20));
        let mut rows = Vec::new();
        let mut totals = None;
        for line in ran.out.lines() {
            let words: Vec<_> = line.split_whitespace().collect();
            match words[..] {
                ["leaked", leaked, "tunnel", tunnel] => {
                    totals = Some((leaked.parse().expect("a count"), tunnel.parse().expect("a count")));
                }
                [pod, family, direction, class, packets] if pod != "POD" => {
                    rows.push([pod, family, direction, class, packets].map(str::to_owned));
                }
                _ => {}
            }
        }
        let lost =
            rows.iter().find(|[pod, .., class, _]| (pod.as_str(), class.as_str()) == ("detector", "lost"));
        assert!(lost.is_none(), "the detector lost frames: {lost:?}");
        let (leaked, tunnel) =
            totals.unwrap_or_else(|| panic!("leaks printed no totals:\n{}{}", ran.out, ran.err));
        Leaks { leaked, tunnel, rows }
    }

    /// From now on to the end of the case also `what` (`ADDRESS/PROTOCOL[/PORT]`, the port of either end) is an outside destination.
    pub fn declare<T: AsRef<str>>(&self, what: impl IntoIterator<Item = T>) {
        let what: Vec<T> = what.into_iter().collect();
        let args: Vec<&str> = ["leaks", "--declare"].into_iter().chain(what.iter().map(T::as_ref)).collect();
        let ran = self.script(&args, &[], Duration::from_secs(20));
        assert!(ran.code == 0, "{args:?}: {}{}", ran.out, ran.err);
        self.declared.store(true, Ordering::Relaxed);
    }

    /// Declares every protocol that the tests speak with these addresses.
    pub fn declare_hosts(&self, addresses: impl IntoIterator<Item = IpAddr>) {
        let addresses: Vec<IpAddr> = addresses.into_iter().collect();
        let protocols = ["tcp", "udp", "icmp", "253"];
        self.declare(addresses.iter().flat_map(|a| protocols.map(|protocol| format!("{a}/{protocol}"))));
    }

    /// Takes back what a case declared.
    pub fn undeclare(&self) {
        if self.declared.swap(false, Ordering::Relaxed) {
            let ran = self.script(&["leaks", "--undeclare"], &[], Duration::from_secs(20));
            assert!(ran.code == 0, "leaks --undeclare: {}{}", ran.out, ran.err);
        }
    }

    /// Also this pod's link is judged, to the end of the case.
    pub fn judge(&self, pod: &str) {
        let ran = self.script(&["leaks", "--judge", pod], &[], Duration::from_secs(20));
        assert!(ran.code == 0, "leaks --judge: {}{}", ran.out, ran.err);
        self.declared.store(true, Ordering::Relaxed);
    }

    /// Runs `f` while the canary is looked for in sealed datagrams too, trains of them included. For little traffic.
    pub fn with_deep_look<T>(&self, f: impl FnOnce() -> T) -> T {
        let turn = |to| {
            let ran = self.script(&["leaks", "--deep", to], &[], Duration::from_secs(20));
            assert!(ran.code == 0, "leaks --deep: {}{}", ran.out, ran.err);
        };
        turn("on");
        let outcome = f();
        turn("off");
        outcome
    }

    /// Fails if anything leaked.
    pub fn assert_no_leak(&self) {
        let leaks = self.leaks();
        assert!(leaks.leaked == 0, "{} packets in clear: {:?}", leaks.leaked, leaks.rows);
    }

    /// Fails if nothing was sealed since the detector was set to zero.
    pub fn assert_sealed(&self) {
        assert!(self.leaks().tunnel > 0, "no packet went through the tunnel");
    }

    /// What differs in the pods' namespaces and in the host's sysctls from before any agent ran.
    pub fn differences(&self) -> Vec<String> {
        let mut found = Vec::new();
        for (name, before) in &self.before {
            let after = Snapshot::of(&self.pods[name].netns);
            found.extend(before.difference(&after).into_iter().map(|line| format!("{name}: {line}")));
        }
        let host = Snapshot::sysctls_of(Path::new("/proc/self/ns/net"));
        found.extend(self.host_sysctls.difference(&host).into_iter().map(|line| format!("host: {line}")));
        found
    }

    /// What differs in the pods' sysctls only; those of `tenc0` do not count.
    pub fn sysctl_differences(&self) -> Vec<String> {
        let mut found = Vec::new();
        for (name, before) in &self.before {
            let after = Snapshot::sysctls_of(&self.pods[name].netns);
            let lines = before.difference(&after);
            found.extend(
                lines
                    .into_iter()
                    .filter(|l| l.starts_with("sysctls") && !l.contains("/tenc0/"))
                    .map(|l| format!("{name}: {l}")),
            );
        }
        found
    }

    /// Packets counted by the named nft counters of the agent's own tables, as `family table name`.
    pub fn guard_counters(&self, pod: &str) -> BTreeMap<String, u64> {
        let out = self.pod(pod).enter(|| {
            Command::new("nft").args(["-j", "list", "counters"]).output().expect("nft list counters")
        });
        let json: serde_json::Value = serde_json::from_slice(&out.stdout).expect("nft prints JSON");
        let text = |value: &serde_json::Value, key: &str| value[key].as_str().unwrap_or_default().to_owned();
        json["nftables"]
            .as_array()
            .expect("a list")
            .iter()
            .filter_map(|object| object.get("counter"))
            .filter(|counter| counter["table"] == "tencrypt")
            .map(|counter| {
                let name = format!("{} {}", text(counter, "family"), text(counter, "name"));
                (name, counter["packets"].as_u64().expect("a count"))
            })
            .collect()
    }

    /// The launcher of a pod that `lab.sh protect` started, and its children, launcher first.
    pub fn agent_pids(&self, pod: &str) -> Vec<Pid> {
        let Some(launcher) = self.recorded_pid(&format!("launch-{pod}")) else { return Vec::new() };
        [launcher.as_raw()].into_iter().chain(children(launcher.as_raw())).map(Pid::from_raw).collect()
    }

    /// A program that lab.sh started, by the name it recorded it under.
    pub fn recorded_pid(&self, name: &str) -> Option<Pid> {
        let recorded = fs::read_to_string(self.run_dir().join("pids").join(name)).ok()?;
        recorded.split_whitespace().next()?.parse().ok().map(Pid::from_raw)
    }

    /// What agents and pods counted, and the end of every log, for a failed test's report.
    pub fn logs(&self) -> String {
        let mut text = String::new();
        for pod in PROTECTED {
            let mut status = Command::new(tencrypt());
            status.args(["status", &format!("{}-{pod}", self.name), "-o", "json"]);
            let status = run(&mut status, Duration::from_secs(15));
            let status: serde_json::Value = serde_json::from_str(&status.out).unwrap_or_default();
            let kernel = self.exec(pod, "grep -E '^(Ip|Udp):' /proc/net/snmp", Duration::from_secs(15));
            text += &format!("--- {pod}\n{}\n{}\n{}", status["counters"], status["guard"], kernel.out);
        }
        let Ok(entries) = fs::read_dir(self.run_dir().join("log")) else { return text };
        let mut paths: Vec<_> = entries.flatten().map(|e| e.path()).collect();
        paths.sort();
        for path in paths {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let Ok(log) = fs::read_to_string(&path) else { continue };
            if !name.starts_with("launch-") || name.ends_with(".pid") || log.trim().is_empty() {
                continue;
            }
            let lines: Vec<_> = log.lines().collect();
            let tail = lines[lines.len().saturating_sub(30)..].join("\n");
            text += &format!("--- {name}\n{tail}\n");
        }
        text
    }

    /// Takes the lab down; doing it twice is harmless.
    pub fn down(&self) {
        if self.run_dir().exists() {
            let ran = self.script(&["down"], &[], Duration::from_secs(60));
            if ran.code != 0 {
                crate::say(&format!("lab.sh down of {}: {}{}", self.name, ran.out, ran.err));
            }
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.down();
    }
}

/// The processes whose parent is `parent`.
fn children(parent: i32) -> Vec<i32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let is_child = |pid: &i32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        after_name.split_whitespace().nth(1) == Some(&parent.to_string())
    };
    pids.filter(is_child).collect()
}

/// Whether launchers get what this variable of lab.sh stands for.
fn asked_for(variable: &str) -> bool {
    std::env::var_os(variable).is_some_and(|value| value == "1")
}

fn lab_script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("netns-scripts/lab.sh")
}

/// What every lab of this process is called, up to its number.
fn name_prefix() -> String {
    format!("t{}x", std::process::id())
}

/// Runs a command with a hard limit; its whole process group is killed at the end of it.
pub fn run(command: &mut Command, limit: Duration) -> Ran {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let mut stdout = child.stdout.take().expect("piped");
    let mut stderr = child.stderr.take().expect("piped");
    let reader = |mut pipe: Box<dyn std::io::Read + Send>| {
        thread::spawn(move || {
            let mut bytes = Vec::new();
            // A pipe that breaks has given all it had.
            let _ = pipe.read_to_end(&mut bytes);
            String::from_utf8_lossy(&bytes).into_owned()
        })
    };
    let _ = (&mut stdout, &mut stderr);
    let (out, err) = (reader(Box::new(stdout)), reader(Box::new(stderr)));
    let code = wait(&mut child, limit).map_or(124, exit_code);
    if code == 124 {
        // The group may be gone already.
        let _ = killpg(Pid::from_raw(i32::try_from(child.id()).expect("a pid")), Signal::SIGKILL);
        let _ = child.wait();
    }
    Ran { code, out: out.join().expect("a reader"), err: err.join().expect("a reader") }
}

/// Waits for a child, at most so long.
pub fn wait(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let end = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait().expect("wait for a child") {
            return Some(status);
        }
        if Instant::now() > end {
            return None;
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// An exit status as a shell's `$?`.
pub fn exit_code(status: ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt as _;
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// A `tencrypt launch` that a test starts by itself; SIGTERM and a wait when dropped.
pub struct Launched {
    child: Child,
    output: PathBuf,
}

impl Launched {
    /// Starts the binary with these arguments; both its outputs go to a file of the lab.
    pub fn start(lab: &Lab, args: &[&str]) -> Self {
        Self::start_program(lab, &tencrypt(), args)
    }

    /// Starts another binary.
    pub fn start_program(lab: &Lab, program: &Path, args: &[&str]) -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let output = lab.run_dir().join(format!("launched-{}.log", NUMBER.fetch_add(1, Ordering::Relaxed)));
        let file = fs::File::create(&output).expect("a log file");
        let child = Command::new(program)
            .arg("launch")
            .args(args)
            .stdin(Stdio::null())
            .stdout(file.try_clone().expect("a second descriptor"))
            .stderr(file)
            .process_group(0)
            .spawn()
            .expect("start tencrypt launch");
        Self { child, output }
    }

    /// Starts it for a pod of the lab with the project's own key, and waits until it says `protected`.
    pub fn pod(lab: &Lab, pod: &str, directory: &Path, key: &Path) -> Self {
        let launched = Self::start(
            lab,
            &Self::args(lab, pod, directory, key).iter().map(String::as_str).collect::<Vec<_>>(),
        );
        launched.wait_ready();
        launched
    }

    /// The usual arguments for a pod.
    pub fn args(lab: &Lab, pod: &str, directory: &Path, key: &Path) -> Vec<String> {
        let text = |path: &Path| path.display().to_string();
        let netns = format!("{}-{pod}", lab.name);
        let words = [
            "--netns",
            &netns,
            "--project",
            PROJECT,
            "--project-key-file",
            &text(key),
            "--directory",
            &text(directory),
        ];
        let mut args = words.map(str::to_owned).to_vec();
        let others = ["bank", "kube-system"].map(|project| text(&lab.directory(project)));
        args.extend(others.into_iter().flat_map(|folder| ["--directory".to_owned(), folder]));
        args.extend(NODE_CIDRS.iter().flat_map(|net| ["--node-cidr", net]).map(str::to_owned));
        if asked_for("TENC_LAB_RANGES") {
            args.extend(RANGES.split_whitespace().map(str::to_owned));
        }
        args
    }

    /// Its process.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).expect("a pid"))
    }

    /// What it printed so far.
    pub fn printed(&self) -> String {
        fs::read_to_string(&self.output).unwrap_or_default()
    }

    /// Waits for the `protected` line.
    pub fn wait_ready(&self) {
        let end = Instant::now() + Duration::from_secs(15);
        while !self.printed().lines().any(|line| line.starts_with("protected")) {
            assert!(Instant::now() < end, "tencrypt launch did not get ready:\n{}", self.printed());
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Sends it a signal, if it has not ended.
    pub fn signal(&self, signal: Signal) {
        // A child that was not waited for keeps its number.
        let _ = kill(Pid::from_raw(i32::try_from(self.child.id()).expect("a pid")), signal);
    }

    /// Whether it handles this signal by now.
    pub fn has_handler(&self, signal: Signal) -> bool {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap_or_default();
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
        let caught = caught.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
        caught & (1 << (signal as i32 - 1)) != 0
    }

    /// Waits for it to end by itself: its exit code.
    pub fn ended(&mut self, limit: Duration) -> Option<i32> {
        wait(&mut self.child, limit).map(exit_code)
    }

    /// Stops it in order.
    pub fn stop(&mut self) -> Option<i32> {
        if self.child.try_wait().expect("wait for a child").is_none() {
            self.signal(Signal::SIGTERM);
        }
        self.ended(Duration::from_secs(10))
    }
}

impl Drop for Launched {
    fn drop(&mut self) {
        if self.stop().is_none() {
            let _ = killpg(Pid::from_raw(i32::try_from(self.child.id()).expect("a pid")), Signal::SIGKILL);
            let _ = self.child.wait();
        }
    }
}

/// A process that takes this process's labs down when this process ends, however it ends.
pub struct Sweeper {
    child: Child,
    alive: Option<ChildStdin>,
}

impl Sweeper {
    /// Starts it, and lets it remove what a killed run left behind.
    pub fn start() -> Self {
        let script = r#"
            down() { TENC_LAB=$1 "$0" down >/dev/null 2>&1; }
            for folder in /run/tencrypt-lab/t*x*; do
              name=${folder##*/} pid=${folder##*/t}
              [ -d "$folder" ] && ! [ -d "/proc/${pid%%x*}" ] && down "$name"
            done
            read -r _
            # A lab that was being made may go on for a moment: look again until nothing is left.
            for _ in 1 2 3 4; do
              found=
              for path in /run/tencrypt-lab/"$1"* /run/netns/"$1"*-node1; do
                [ -e "$path" ] && found=1 && name=${path##*/} && down "${name%-node1}"
              done
              [ -n "$found" ] || break
              sleep 1
            done
            exit 0
        "#;
        let mut child = Command::new("bash")
            .args(["-c", script])
            .arg(lab_script())
            .arg(name_prefix())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .process_group(0)
            .spawn()
            .expect("start the sweeper");
        let alive = child.stdin.take();
        Self { child, alive }
    }
}

impl Drop for Sweeper {
    fn drop(&mut self) {
        drop(self.alive.take());
        let _ = wait(&mut self.child, Duration::from_secs(120));
    }
}
