//! The ladder, and what is older than the agents: who is reachable, by which path, and what ends.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use crate::Case;
use crate::lab::{Agents, Lab, Launched, PROJECT, web_vips};
use crate::services::copy_directory;

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case::new("promise_1_a_connection_older_than_its_protection_is_reset_and_counted", preexisting)
        .agents(Agents::Off)
        .every_rp_filter()
        .looks_itself(),
    Case::new("a_peer_that_leaves_the_directory_ends_its_connections", peer_gone)
        .agents(Agents::Off)
        .looks_itself(),
    Case::new("permissive_keeps_a_half_migrated_project_working_and_flows_on_their_path", half_migrated)
        .agents(Agents::Off)
        .every_rp_filter()
        .looks_itself()
        .seconds(90),
];

const WEB: u16 = 8_080;

fn connect(lab: &Lab, to: SocketAddr) -> TcpStream {
    let stream = lab.pod("shop-client").connect(to, Duration::from_secs(3)).expect("connect");
    stream.set_read_timeout(Some(Duration::from_secs(5))).expect("time-out");
    stream
}

/// Asks and reads an answer over a connection that stays open.
pub fn ask(stream: &mut TcpStream) -> std::io::Result<()> {
    stream.write_all(b"GET / HTTP/1.1\r\nHost: web\r\n\r\n")?;
    let mut answer = [0; 4_096];
    match stream.read(&mut answer)? {
        0 => Err(std::io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(()),
    }
}

/// Both addresses of a pod's web server.
pub fn web(lab: &Lab, pod: &str) -> Vec<SocketAddr> {
    lab.pod(pod).addresses().into_iter().map(|address| SocketAddr::new(address, WEB)).collect()
}

pub fn launch(lab: &Lab, pod: &str, mode: &str) -> Launched {
    let mut args = Launched::args(lab, pod, &lab.directory(PROJECT), &lab.key_file(PROJECT));
    args.extend(["--mode".to_owned(), mode.to_owned()]);
    let launched = Launched::start(lab, &args.iter().map(String::as_str).collect::<Vec<_>>());
    launched.wait_ready();
    launched
}

/// How often `reason` was counted, as the agent says when it stops.
fn counted(mut launched: Launched, reason: &str) -> u64 {
    assert_eq!(launched.stop(), Some(0), "{}", launched.printed());
    let printed = launched.printed();
    let line = printed.lines().find(|line| line.contains(reason) && line.contains("dropped"));
    let packets = line.and_then(|line| line.split("packets=").nth(1)?.split_whitespace().next());
    packets.map_or(0, |n| n.parse().expect("a count"))
}

fn preexisting(lab: &Lab) {
    let inside: Vec<_> = web(lab, "shop-web2").into_iter().chain(web_vips()).collect();
    let mut inside: Vec<_> = inside.into_iter().map(|to| connect(lab, to)).collect();
    let mut outside = connect(lab, web(lab, "bank-server")[0]);
    for stream in inside.iter_mut().chain([&mut outside]) {
        ask(stream).expect("an answer in clear, before the agent");
    }
    let launched = launch(lab, "shop-client", "strict");
    lab.reset_leaks();
    for stream in &mut inside {
        let error = ask(stream).expect_err("an older connection went on");
        assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock, "it hangs instead of ending");
    }
    ask(&mut outside).expect("what is not the project's is not touched");
    lab.assert_no_leak();
    assert_eq!(counted(launched, "preexisting"), 4);
}

fn peer_gone(lab: &Lab) {
    let directory = copy_directory(lab, "peer-gone");
    let key = lab.key_file(PROJECT);
    let client = Launched::pod(lab, "shop-client", &directory, &key);
    let _servers =
        ["shop-web1", "shop-web2"].map(|pod| Launched::pod(lab, pod, &lab.directory(PROJECT), &key));
    let mut lost: Vec<_> = web(lab, "shop-web2").into_iter().map(|to| connect(lab, to)).collect();
    let mut kept = connect(lab, web(lab, "shop-web1")[0]);
    for stream in lost.iter_mut().chain([&mut kept]) {
        ask(stream).expect("an answer through the tunnel");
    }
    fs::remove_file(directory.join("pod-shop-web2.yaml")).expect("its manifest");
    let end = Instant::now() + Duration::from_secs(5);
    for stream in &mut lost {
        while ask(stream).is_ok() {
            assert!(Instant::now() < end, "a connection to a peer that left goes on");
            thread::sleep(Duration::from_millis(50));
        }
    }
    ask(&mut kept).expect("the other peer is not touched");
    assert!(counted(client, "peer_gone") >= 2);
}

fn half_migrated(lab: &Lab) {
    let _agents = ["shop-client", "shop-web1"].map(|pod| launch(lab, pod, "permissive"));
    // Everybody is reachable: web2 and the VIPs in front of it in clear.
    let clear: Vec<_> = web(lab, "shop-web2").into_iter().chain(web_vips()).collect();
    let mut older: Vec<_> = clear.iter().map(|to| connect(lab, *to)).collect();
    lab.reset_leaks();
    older.iter_mut().for_each(|stream| ask(stream).expect("an answer in clear"));
    assert!(lab.leaks().leaked >= 4, "positive control: what is not able goes in clear");
    // web2 gets its agent: new connections are sealed, the older ones go on where they are.
    let _last = launch(lab, "shop-web2", "permissive");
    until("web2 and the VIPs are captured", || sealed(lab, &clear));
    lab.reset_leaks();
    older.iter_mut().for_each(|stream| ask(stream).expect("an older connection ended or hangs"));
    assert!(lab.leaks().leaked > 0, "an older connection changed its path");
    drop(older);
    until("the pins are gone", || !lab.exec("shop-client", "ip rule; ip -6 rule", SHORT).out.contains("97:"));
    lab.reset_leaks();
    for to in clear {
        ask(&mut connect(lab, to)).expect("an answer through the tunnel");
    }
    lab.assert_no_leak();
    lab.assert_sealed();
}

const SHORT: Duration = Duration::from_secs(5);

/// Whether new connections to all of these leave nothing in clear.
fn sealed(lab: &Lab, to: &[SocketAddr]) -> bool {
    lab.reset_leaks();
    to.iter().for_each(|to| ask(&mut connect(lab, *to)).expect("an answer"));
    lab.leaks().leaked == 0
}

pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(12);
    while !done() {
        assert!(Instant::now() < end, "not within 12 s: {what}");
        thread::sleep(Duration::from_millis(200));
    }
}
