//! The cluster's ranges: an address in them that nobody vouches for gets nothing in clear, and does not keep others waiting.

use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use crate::Case;
use crate::lab::{Agents, Lab, Launched, PROJECT, RANGES};
use crate::packets::CANARY;
use crate::ways::{self, BOTH, Way, odd};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case::new("control_unknown_addresses_in_the_ranges_are_seen_without_agents", |lab| {
        ways::seen(lab, WAYS);
    })
    .agents(Agents::Off)
    .looks_itself(),
    Case::new("promise_1_an_unknown_address_in_the_ranges_gets_no_plaintext", unknown)
        .agents(Agents::On(RANGES))
        .every_rp_filter(),
    Case::new("promise_9_an_unknown_source_in_the_ranges_is_answered_at_once_and_for_seconds_only", newcomer)
        .agents(Agents::On(RANGES))
        .looks_itself(),
    Case::new("promise_2_without_a_launcher_new_addresses_in_the_ranges_stay_closed", launcher_gone)
        .agents(Agents::Off),
    Case::new("promise_8_dhcp_leaves_with_its_flag_alone", dhcp)
        .agents(Agents::On("--allow-dhcp"))
        .looks_itself(),
];

/// Pods and Services that no directory lists; the nodes lead port 80 of the second ones to workloads of the project. The last
/// one is the anycast address of a subnet's routers.
const UNKNOWN: [&str; 7] = [
    "10.1.2.200",
    "10.1.77.1",
    "10.96.100.1",
    "fd00:10:1:2::200",
    "fd00:10:1:77::1",
    "fd00:10:96::5001",
    "fd00:10:1:1::",
];

const WAYS: &[Way] = &[
    ("datagrams to unknown addresses", BOTH, |lab, pod| {
        odd(lab, pod, "--unprivileged", &["udp", "zero", "big", "tcp"], &UNKNOWN.map(str::to_owned), 80)
    }),
    ("datagrams to unknown addresses on the device", BOTH, |lab, pod| {
        odd(
            lab,
            pod,
            "--unprivileged --device eth0",
            &["udp", "big", "cork"],
            &UNKNOWN.map(str::to_owned),
            7_007,
        )
    }),
];

fn unknown(lab: &Lab) {
    ways::closed(lab, WAYS);
    // Those of which somebody knows are spoken to, from the first datagram of a name on.
    lab.curl("shop-client", "http://ledger.bank/");
    lab.curl("shop-client2", "-6 http://ledger.bank/");
}

/// An address of another tenant's that is in no directory yet.
struct Newcomer<'l>(&'l Lab);

impl Newcomer<'_> {
    const V4: [u8; 4] = [10, 1, 1, 99];

    fn speak(&self, to: IpAddr, limit: Duration) -> std::io::Result<Duration> {
        let begun = Instant::now();
        self.0.pod("bank-client").enter(|| {
            let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
            socket.bind(&SocketAddr::from((Self::V4, 0)).into())?;
            socket.connect_timeout(&SocketAddr::from((to, 8_080)).into(), limit)
        })?;
        Ok(begun.elapsed())
    }
}

impl Drop for Newcomer<'_> {
    fn drop(&mut self) {
        self.0.exec("bank-client", "ip addr del 10.1.1.99/32 dev eth0", Duration::from_secs(5));
    }
}

fn newcomer(lab: &Lab) {
    let ran = lab.exec("bank-client", "ip addr add 10.1.1.99/32 dev eth0", Duration::from_secs(5));
    assert!(ran.code == 0, "{}", ran.err);
    let (newcomer, to) = (Newcomer(lab), IpAddr::from(lab.pod("shop-web1").v4));
    lab.declare(["10.1.1.99/tcp/8080"]);
    // A first connection does not wait for anybody's word: a lost SYN would cost a second.
    let took = newcomer.speak(to, Duration::from_secs(3)).expect("the first connection");
    assert!(took < Duration::from_millis(900), "the first connection took {took:?}");
    // Nobody vouches for it: 4 s at most, and then it is quiet.
    thread::sleep(Duration::from_millis(5_500));
    let again = newcomer.speak(to, Duration::from_millis(1_500));
    assert!(again.is_err(), "nobody vouched for it, and it is still answered");
    lab.assert_no_leak();
}

fn launcher_gone(lab: &Lab) {
    let (key, directory) = (lab.key_file(PROJECT), lab.directory(PROJECT));
    let mut args = Launched::args(lab, "shop-client", &directory, &key);
    // Unless the whole run has them.
    for project in ["bank", "kube-system"] {
        let folder = lab.directory(project).display().to_string();
        if !args.contains(&folder) {
            args.extend(["--directory".to_owned(), folder]);
        }
    }
    if !args.iter().any(|arg| arg == "--pod-cidr") {
        args.extend(RANGES.split_whitespace().map(str::to_owned));
    }
    let mut launched = Launched::start(lab, &args.iter().map(String::as_str).collect::<Vec<_>>());
    launched.wait_ready();
    lab.reset_leaks();
    lab.curl("shop-client", "http://ledger.bank/");
    // Alone: its agent goes on.
    launched.signal(nix::sys::signal::Signal::SIGKILL);
    launched.ended(Duration::from_secs(5));
    let pod = lab.pod("shop-client");
    for _ in 0..10 {
        for to in UNKNOWN.map(|text| text.parse::<IpAddr>().expect("an address")) {
            let _ = pod.udp_for(to).send_to(CANARY, (to, 80));
            drop(pod.connect((to, 80), Duration::from_millis(20)));
        }
    }
    lab.assert_no_leak();
    // Those that were spoken to before stay.
    lab.curl("shop-client", "http://ledger.bank/");
    // Another launcher takes the pod over, and ends it in order.
    let mut next = Launched::start(lab, &args.iter().map(String::as_str).collect::<Vec<_>>());
    next.wait_ready();
    assert_eq!(next.stop(), Some(0), "{}", next.printed());
}

/// A client's broadcast from port 68: with the flag only.
fn dhcp(lab: &Lab) {
    let discover = |flag: bool| {
        let pod = lab.pod("shop-client");
        let socket = pod.udp(([0, 0, 0, 0], 68));
        socket.set_broadcast(true).expect("SO_BROADCAST");
        socket2::SockRef::from(&socket).bind_device(Some(b"eth0")).expect("SO_BINDTODEVICE");
        let tap = lab.pod("bank-client").sniff();
        let _ = socket.send_to(b"DHCPDISCOVER", SocketAddr::from(([255, 255, 255, 255], 67)));
        let sent = tap.wait(Duration::from_millis(300), |frame| {
            (crate::packets::seen(frame)?.ports == Some((68, 67))).then_some(())
        });
        assert_eq!(sent.is_some(), flag, "with the flag: {flag}");
    };
    discover(true);
    lab.ensure(Agents::On(""));
    discover(false);
}
