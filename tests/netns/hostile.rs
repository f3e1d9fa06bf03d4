//! What must not work, and what must not hurt: wrong keys, wrong places, wrong bytes, broken files.
//!
//! A refusal names its reason and leaves nothing behind; a running agent drops, counts and goes on.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use crate::Case;
use crate::lab::{
    Agents, BACKENDS, Lab, Launched, PROJECT, PROTECTED, Ran, TUNNEL_PORT, run, tencrypt, web_vips,
};
use crate::services::replace;

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case::new("promise_6_truncated_and_random_datagrams_are_dropped_and_the_tunnel_goes_on", noise).sealed(),
    Case::new("promise_4_a_workload_with_another_key_is_not_heard", wrong_key).looks_itself(),
    Case::new("promise_4_a_workload_with_another_cipher_is_not_heard", wrong_cipher).looks_itself(),
    Case::new("promise_2_a_malformed_manifest_is_reported_and_changes_nothing", malformed_manifest).sealed(),
    Case::new("launch_refuses_the_hosts_own_namespace", hosts_own_namespace).agents(Agents::Off),
    Case::new("launch_refuses_what_is_no_network_namespace", no_namespace).agents(Agents::Off),
    Case::new("launch_names_the_owner_of_a_port_in_use_and_exits_3", port_in_use).agents(Agents::Off),
    Case::new("launch_names_a_missing_resolv_conf", missing_resolv_conf).agents(Agents::Off),
    Case::new("launch_names_a_missing_or_broken_key_file", broken_key_file).agents(Agents::Off),
    Case::new("launch_refuses_flags_whose_feature_is_not_built_yet", unbuilt_flags).agents(Agents::Off),
    Case::new("launch_refuses_a_pod_that_is_protected_already", protected_already).sealed(),
];

/// Runs `tencrypt launch` that is expected to refuse; with its state compared before and after.
fn refused(lab: &Lab, pod: &str, args: &[String]) -> Ran {
    let ran = run(Command::new(tencrypt()).arg("launch").args(args), Duration::from_secs(15));
    assert!(ran.code != 0 && ran.code != 124, "launch {args:?} was not refused: {ran:?}");
    assert!(!ran.err.contains("panicked") && ran.code < 128, "launch {args:?} crashed: {ran:?}");
    assert!(!ran.err.trim().is_empty(), "launch {args:?} gave no reason");
    assert!(!ran.out.contains("protected"), "launch {args:?} said it protects: {}", ran.out);
    let left: Vec<_> = lab.differences().into_iter().filter(|line| line.starts_with(pod)).collect();
    assert!(left.is_empty(), "launch {args:?} left behind:\n{}", left.join("\n"));
    ran
}

fn usual(lab: &Lab, pod: &str) -> Vec<String> {
    Launched::args(lab, pod, &lab.directory(PROJECT), &lab.key_file(PROJECT))
}

/// The usual arguments with one value exchanged.
fn with(mut args: Vec<String>, flag: &str, value: &str) -> Vec<String> {
    match args.iter().position(|a| a == flag) {
        Some(at) => args[at + 1] = value.to_owned(),
        None => args.extend([flag.to_owned(), value.to_owned()]),
    }
    args
}

fn hosts_own_namespace(lab: &Lab) {
    for netns in ["/proc/self/ns/net", "/proc/1/ns/net", "pid:1"] {
        let ran = refused(lab, "host", &with(usual(lab, "shop-lone"), "--netns", netns));
        // Where even root may not look at PID 1, what cannot be opened is refused for that reason.
        let hidden = netns != "/proc/self/ns/net" && fs::File::open("/proc/1/ns/net").is_err();
        let owners = ["of the host", "of PID 1", "of this process"];
        let named =
            owners.iter().any(|owner| ran.err.contains(owner)) || hidden && ran.err.contains("ermission");
        assert!(named && ran.err.contains("network namespace"), "{netns}: {}", ran.err);
    }
}

fn no_namespace(lab: &Lab) {
    for netns in [
        "/etc/hostname",
        "/proc/self/ns/mnt",
        "/run/netns/does-not-exist",
        "does-not-exist",
        "pid:999999999",
        "/",
    ] {
        let ran = refused(lab, "host", &with(usual(lab, "shop-lone"), "--netns", netns));
        let name = netns.rsplit(['/', ':']).next().unwrap_or_default();
        assert!(ran.err.contains(name), "{netns} is not named: {}", ran.err);
    }
}

fn port_in_use(lab: &Lab) {
    for bind in [SocketAddr::from(([0, 0, 0, 0], TUNNEL_PORT)), "[::]:51820".parse().expect("an address")] {
        let holder = lab.pod("shop-lone").udp(bind);
        let ran = refused(lab, "shop-lone", &usual(lab, "shop-lone"));
        assert_eq!(ran.code, 3, "{}", ran.err);
        assert!(ran.err.contains(&TUNNEL_PORT.to_string()), "the port is not named: {}", ran.err);
        let pid = std::process::id().to_string();
        assert!(ran.err.contains(&pid) || ran.err.contains("netns-"), "the owner is not named: {}", ran.err);
        drop(holder);
    }
}

fn missing_resolv_conf(lab: &Lab) {
    let missing = "/nonexistent/resolv.conf";
    let ran = refused(lab, "shop-lone", &with(usual(lab, "shop-lone"), "--resolv-conf", missing));
    assert!(ran.err.contains(missing), "the file is not named: {}", ran.err);
    // A folder, and a pipe that nobody writes to, are no resolv.conf either.
    let ran = refused(lab, "shop-lone", &with(usual(lab, "shop-lone"), "--resolv-conf", "/etc"));
    assert!(ran.err.contains("/etc"), "the folder is not named: {}", ran.err);
    let pipe = lab.run_dir().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRUSR).expect("a pipe");
    let ran = refused(
        lab,
        "shop-lone",
        &with(usual(lab, "shop-lone"), "--resolv-conf", &pipe.display().to_string()),
    );
    assert!(ran.err.contains("pipe"), "the pipe is not named: {}", ran.err);
    // The pod's own file gone.
    let own = Path::new("/etc/netns").join(format!("{}-shop-lone", lab.name())).join("resolv.conf");
    let kept = fs::read_to_string(&own).expect("the pod's resolv.conf");
    fs::remove_file(&own).expect("remove it");
    let ran =
        run(Command::new(tencrypt()).arg("launch").args(usual(lab, "shop-lone")), Duration::from_secs(3));
    fs::write(&own, kept).expect("put it back");
    // Refused with its name, or protected by the directory alone and said so; never a crash.
    assert!(ran.err.contains("resolv.conf"), "nothing was said of the missing file: {ran:?}");
    assert!(!ran.err.contains("panicked"), "{}", ran.err);
    wait_for_no_agent(lab, "shop-lone");
}

/// After a launcher was killed at its limit, its agent is killed too, and what they made is removed.
fn wait_for_no_agent(lab: &Lab, pod: &str) {
    for pid in lab.agent_pids(pod) {
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
    }
    if lab.differences().iter().any(|line| line.starts_with(pod)) {
        // A launcher started and stopped in order takes over and removes what is left.
        let mut again = Launched::pod(lab, pod, &lab.directory(PROJECT), &lab.key_file(PROJECT));
        assert_eq!(again.stop(), Some(0), "{}", again.printed());
    }
}

fn broken_key_file(lab: &Lab) {
    let file = lab.run_dir().join("broken.key");
    let name = file.display().to_string();
    for text in [None, Some(""), Some("not base64 at all"), Some("c2hvcnQ="), Some("use\n"), Some("\0\0\0")] {
        match text {
            Some(text) => {
                fs::write(&file, text).expect("a key file");
                fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).expect("chmod");
            }
            None => drop(fs::remove_file(&file)),
        }
        let ran = refused(lab, "shop-lone", &with(usual(lab, "shop-lone"), "--project-key-file", &name));
        assert!(ran.err.contains("broken.key"), "{text:?}: the file is not named: {}", ran.err);
        assert!(!ran.err.contains("c2hvcnQ"), "the refusal shows key material: {}", ran.err);
    }
    // A key that others may read is refused, however good it is.
    fs::copy(lab.key_file(PROJECT), &file).expect("a copy");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).expect("chmod");
    let ran = refused(lab, "shop-lone", &with(usual(lab, "shop-lone"), "--project-key-file", &name));
    assert!(ran.err.contains("0644"), "the mode is not named: {}", ran.err);
}

fn unbuilt_flags(lab: &Lab) {
    for (flag, value) in [("--cipher", "aes128gcm"), ("--config", "f"), ("--no-such-flag", "1")] {
        let ran = refused(lab, "shop-lone", &with(usual(lab, "shop-lone"), flag, value));
        assert_eq!(ran.code, 2, "{flag} {value}: {}", ran.err);
        assert!(ran.err.contains(flag), "{flag} is not named: {}", ran.err);
    }
}

fn protected_already(lab: &Lab) {
    let ran =
        run(Command::new(tencrypt()).arg("launch").args(usual(lab, "shop-client")), Duration::from_secs(15));
    assert!(ran.code != 0 && ran.code != 124 && ran.code < 128, "a second launch: {ran:?}");
    // The first one is not hurt by it.
    lab.curl("shop-client", "http://web/");
    lab.curl("shop-client2", "http://web-headless:8080/");
}

/// Bytes that follow from a number, alike in every run.
pub fn bytes(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    (0..length).map(|_| next()).collect()
}

fn noise(lab: &Lab) {
    lab.curl("shop-client", "http://web/");
    let pids: Vec<_> = PROTECTED.iter().map(|pod| lab.agent_pids(pod)).collect();
    // Another project's pod: what it sends is not the guard's business, so it reaches the agent.
    let sender = lab.pod("bank-client");
    lab.declare_hosts(sender.addresses());
    let targets: Vec<IpAddr> = BACKENDS.iter().flat_map(|pod| lab.pod(pod).addresses()).collect();
    for to in &targets {
        for port in [0, TUNNEL_PORT] {
            let socket = sender.udp(crate::pod::any(*to, port));
            for n in 0..600u64 {
                let mut datagram = bytes(n, usize::try_from(n % 160).expect("small"));
                // Two thirds have a type word, and a third of all the right length of an initiation.
                if n % 3 > 0 && datagram.len() > 4 {
                    datagram[..4].copy_from_slice(&[u8::try_from(n % 5).expect("small"), 0, 0, 0]);
                }
                if n % 3 == 2 {
                    datagram.resize(148, 0);
                }
                // A full buffer loses some: fine.
                let _ = socket.send_to(&datagram, (*to, TUNNEL_PORT));
            }
            for size in [1_392, 1_400, 9_000, 60_000, 65_507] {
                let _ = socket.send_to(&bytes(7, size), (*to, TUNNEL_PORT));
            }
        }
        let silent = sender.udp_for(*to);
        silent.set_read_timeout(Some(Duration::from_millis(200))).expect("time-out");
        silent.send_to(&bytes(9, 148), (*to, TUNNEL_PORT)).expect("send");
        let mut buffer = [0; 256];
        assert!(silent.recv(&mut buffer).is_err(), "the agent answered a datagram without a valid MAC1");
    }
    for to in web_vips() {
        let got = lab.pod("shop-client").http_get(to, Duration::from_secs(3));
        assert!(got.is_ok(), "after the noise {to} is not reached: {got:?}");
    }
    let after: Vec<_> = PROTECTED.iter().map(|pod| lab.agent_pids(pod)).collect();
    assert_eq!(pids, after, "an agent or a launcher ended");
}

fn wrong_key(lab: &Lab) {
    let key = lab.run_dir().join("wrong.key");
    let ran = run(Command::new(tencrypt()).arg("keygen"), Duration::from_secs(5));
    assert!(ran.code == 0 && ran.out.trim().len() == 44, "tencrypt keygen: {ran:?}");
    fs::write(&key, &ran.out).expect("a key file");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).expect("chmod");
    stays_a_stranger(lab, &with(usual(lab, "shop-lone"), "--project-key-file", &key.display().to_string()));
}

fn wrong_cipher(lab: &Lab) {
    stays_a_stranger(lab, &with(usual(lab, "shop-lone"), "--cipher", "aes256gcm"));
}

/// A workload that is protected with these arguments and no other one understand one another.
fn stays_a_stranger(lab: &Lab, arguments: &[String]) {
    let mut stranger = Launched::start(lab, &arguments.iter().map(String::as_str).collect::<Vec<_>>());
    stranger.wait_ready();
    lab.judge("shop-lone");
    let lone = lab.pod("shop-lone");
    for to in web_vips().into_iter().chain([(lab.pod("shop-web1").v4, 8080).into()]) {
        let got = lone.http_get(to, Duration::from_secs(4));
        assert!(got.is_err(), "a stranger was answered by {to}");
    }
    // Neither is it spoken to, and the others go on.
    let got = lab.pod("shop-client").connect((lone.v4, 9_000), Duration::from_secs(4));
    assert!(got.is_err());
    lab.curl("shop-client", "http://web/");
    lab.assert_no_leak();
    assert_eq!(stranger.stop(), Some(0), "{}", stranger.printed());
}

fn malformed_manifest(lab: &Lab) {
    let directory = lab.directory(PROJECT);
    let broken = [
        ("zz-broken.yaml", "apiVersion: v1\nkind: Pod\nmetadata: {name: ["),
        (
            "zz-types.yaml",
            "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\nspec: {clusterIP: 7, ports: many}\n",
        ),
        ("zz-empty.yaml", ""),
        ("zz-binary.json", "\u{1}\u{2}{{{{"),
        (
            "zz-address.yaml",
            "apiVersion: v1\nkind: Pod\nmetadata: {name: bad, namespace: shop}\nstatus: {phase: Running, podIPs: [{ip: 999.1.1.1}]}\n",
        ),
    ];
    for (name, text) in broken {
        replace(&directory.join(name), text);
    }
    // A folder and a link to nowhere where files are expected.
    fs::create_dir_all(directory.join("zz-folder.yaml")).expect("a folder");
    std::os::unix::fs::symlink("/nonexistent", directory.join("zz-link.yaml")).expect("a link");
    thread::sleep(Duration::from_millis(1_500));
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        for pod in ["shop-client", "shop-client2"] {
            lab.curl(pod, "http://web/");
            lab.curl(pod, "-6 http://web-headless:8080/");
        }
    }));
    let log = fs::read_to_string(lab.run_dir().join("log/launch-shop-client.err")).unwrap_or_default();
    for name in broken.map(|(name, _)| name).into_iter().chain(["zz-link.yaml"]) {
        let _ = fs::remove_file(directory.join(name));
    }
    let _ = fs::remove_dir(directory.join("zz-folder.yaml"));
    outcome.expect("the project's traffic goes on");
    assert!(log.contains("zz-broken.yaml"), "the broken manifest is not reported:\n{log}");
    thread::sleep(Duration::from_millis(1_500));
    lab.curl("shop-client", "http://web/");
}
