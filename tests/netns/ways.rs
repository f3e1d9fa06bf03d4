//! Ways on which a packet might get around the tunnel, each tried without agents and with them.
//!
//! 1. [`seen`] tries each without agents: the leak detector must see it (the positive control). What this kernel lacks is said
//! 2. [`closed`] tries each with agents: the detector must see nothing, and no other pod's device may see the canary
//!
//! Whether the call fails, is sealed or is dropped is the agent's choice. May touch: what the ways touch, in the pods.

use std::net::IpAddr;
use std::thread;
use std::time::Duration;

use crate::lab::{Lab, Ran};
use crate::packets;
use crate::pod::{Pod, Sniffer};

/// A name, the pods from which it is tried, and how; an error is the reason for which it cannot be tried on this machine.
pub type Way = (&'static str, &'static [&'static str], fn(&Lab, &Pod) -> Result<(), String>);

/// A pod of the bridge, and one with a routed link.
pub const BOTH: &[&str] = &["shop-client", "shop-client2"];
/// A pod of the bridge.
pub const BRIDGED: &[&str] = &["shop-client"];

/// How long a packet is on its way.
const ON_ITS_WAY: Duration = Duration::from_millis(40);

/// Pods whose devices are looked at besides the sender's link.
const OTHERS: [&str; 7] =
    ["shop-client", "shop-web1", "shop-client2", "shop-web2", "shop-lone", "bank-client", "bank-server"];

/// Sniffers on the devices of all pods but one.
struct Taps(Vec<(&'static str, Sniffer)>);

impl Taps {
    fn new(lab: &Lab, sender: &str) -> Self {
        Self(OTHERS.iter().filter(|pod| **pod != sender).map(|pod| (*pod, lab.pod(pod).sniff())).collect())
    }

    /// The pods at which the canary arrived in clear.
    fn reached(&self) -> Vec<&'static str> {
        let canary = |tap: &Sniffer| tap.drain().iter().any(|frame| packets::has_canary(frame));
        self.0.iter().filter(|(_, tap)| canary(tap)).map(|(pod, _)| *pod).collect()
    }
}

/// Without agents every way is seen on the sender's link or at another pod. How often a canary reached another pod.
pub fn seen(lab: &Lab, ways: &[Way]) -> usize {
    let (mut unseen, mut reached) = (Vec::new(), 0);
    for (name, pods, run) in ways {
        for pod in *pods {
            let taps = Taps::new(lab, pod);
            lab.reset_leaks();
            if let Err(reason) = run(lab, lab.pod(pod)) {
                crate::say(&format!("not run: {name} from {pod}: {reason}"));
                continue;
            }
            thread::sleep(ON_ITS_WAY);
            let arrived = taps.reached().len();
            reached += arrived;
            let leaks = lab.leaks();
            // One that looks sealed is known by its arrival alone.
            if arrived == 0 && leaks.count(|at, _, direction, _| (at, direction) == (pod, "out")) == 0 {
                unseen.push(format!("{name} from {pod}: {:?}", leaks.rows));
            }
        }
    }
    assert!(unseen.is_empty(), "not seen without agents:\n{}", unseen.join("\n"));
    reached
}

/// With agents nothing is seen, neither on the links of the protected pods nor at other pods.
pub fn closed(lab: &Lab, ways: &[Way]) {
    let mut open = Vec::new();
    for (name, pods, run) in ways {
        for pod in *pods {
            let taps = Taps::new(lab, pod);
            lab.reset_leaks();
            // Refused is as good as dropped.
            let _ = run(lab, lab.pod(pod));
            thread::sleep(ON_ITS_WAY);
            let (leaks, reached) = (lab.leaks(), taps.reached());
            if leaks.leaked > 0 || !reached.is_empty() {
                open.push(format!("{name} from {pod}: {:?}, the canary came to {reached:?}", leaks.rows));
            }
        }
    }
    lab.reset_leaks();
    assert!(open.is_empty(), "in clear:\n{}", open.join("\n"));
    lab.curl("shop-client", "http://web/");
}

/// Runs odd.py in a pod with these words. An error if it could send nothing at all.
pub fn odd(
    lab: &Lab,
    pod: &Pod,
    options: &str,
    ways: &[&str],
    to: &[String],
    port: u16,
) -> Result<(), String> {
    let tries = ways.iter().flat_map(|way| to.iter().map(move |to| format!("{way} '{to}' {port}")));
    let tries: Vec<_> = tries.collect();
    let command = format!("{options} {}", tries.join(" "));
    let ran = run_odd(lab, pod, &command);
    assert!(ran.code == 0, "{command}: {}{}", ran.out, ran.err);
    match ran.out.lines().any(|line| line.starts_with("sent")) {
        true => Ok(()),
        false => Err(ran.out.lines().collect::<Vec<_>>().join("; ")),
    }
}

/// Runs odd.py in a pod with these words.
pub fn run_odd(lab: &Lab, pod: &Pod, words: &str) -> Ran {
    run_script(lab, pod, "odd.py", words)
}

/// Runs a Python program of the lab in a pod.
pub fn run_script(lab: &Lab, pod: &Pod, script: &str, words: &str) -> Ran {
    // The distribution's interpreter first: one below /root is out of reach of an unprivileged process.
    let python = "$([ -x /usr/bin/python3 ] && echo /usr/bin/python3 || echo python3)";
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/netns-scripts");
    lab.exec(&pod.name, &format!("{python} -I {folder}/{script} {words}"), Duration::from_secs(30))
}

/// Addresses of each kind that is protected: a peer on the same node, one on the other, a Service.
pub fn targets(lab: &Lab) -> Vec<IpAddr> {
    let peers = ["shop-web1", "shop-web2"].into_iter().flat_map(|pod| lab.pod(pod).addresses());
    peers.chain(crate::lab::echo_vips().map(|vip| vip.ip())).collect()
}

/// Those of one family, as text.
pub fn texts(lab: &Lab, v4: bool) -> Vec<String> {
    targets(lab).into_iter().filter(|to| to.is_ipv4() == v4).map(|to| to.to_string()).collect()
}

/// All of them, as text.
pub fn all_texts(lab: &Lab) -> Vec<String> {
    targets(lab).iter().map(IpAddr::to_string).collect()
}

/// The link-local address of a pod's real device.
pub fn link_local(pod: &Pod) -> String {
    let out = pod.enter(|| {
        let mut command = std::process::Command::new("ip");
        command
            .args(["-6", "-o", "addr", "show", "dev", &pod.device, "scope", "link"])
            .output()
            .expect("ip addr")
    });
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let address = text.split_whitespace().find_map(|word| word.strip_suffix("/64")).map(str::to_owned);
    address.unwrap_or_else(|| panic!("{} has no link-local address: {text}", pod.name))
}
