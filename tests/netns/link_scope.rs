//! What stays on the link: link-local addresses, multicast and broadcast. No capability is needed for any of it.
//!
//! The pods of the bridge share a link with each other and with another tenant's pod; a routed pod shares its link with the node.

use std::time::Duration;

use crate::Case;
use crate::lab::{Agents, Lab};
use crate::packets::CANARY;
use crate::pod::Pod;
use crate::ways::{self, BOTH, BRIDGED, Way, link_local, odd};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case::new("control_link_scope_multicast_and_broadcast_are_seen_without_agents", seen)
        .agents(Agents::Off)
        .looks_itself(),
    Case::new("promise_1_nothing_leaves_at_link_scope_to_groups_or_to_all", closed)
        .every_rp_filter()
        .and_with_ranges(),
    Case::new("promise_1_what_strangers_send_at_link_scope_reaches_no_application", inbound)
        .every_rp_filter()
        .looks_itself()
        .and_with_ranges(),
];

const WAYS: &[Way] = &[
    ("an HTTP exchange over the peer's fe80 address", BRIDGED, http),
    ("a datagram to the peer's fe80 address", BRIDGED, |lab, pod| {
        to_link_local(lab, pod, "--unprivileged", &["udp", "big", "zero", "cork", "more", "pktinfo"])
    }),
    ("an ICMPv6 echo request to the peer's fe80 address", BRIDGED, |lab, pod| {
        let to = format!("{}%eth0", link_local(lab.pod("shop-web1")));
        let command = format!("ping -6 -c 1 -W 1 -p 54454e43525950542d544553542d4341 {to}");
        lab.exec(&pod.name, &command, Duration::from_secs(5));
        Ok(())
    }),
    ("multicast", BOTH, |lab, pod| {
        let groups =
            ["224.0.0.1", "224.0.0.251", "239.1.2.3", "ff02::1%eth0", "ff02::fb%eth0", "ff05::7", "ff0e::7"];
        odd(lab, pod, "--unprivileged", &["group", "big"], &groups.map(str::to_owned), 7_007)
    }),
    ("broadcast to all", BOTH, |lab, pod| {
        odd(lab, pod, "--unprivileged --device eth0", &["broadcast"], &["255.255.255.255".to_owned()], 7_007)
    }),
    ("broadcast to the subnet", BRIDGED, |lab, pod| {
        odd(lab, pod, "--unprivileged", &["broadcast"], &["10.1.1.255".to_owned()], 7_007)
    }),
];

fn to_link_local(lab: &Lab, pod: &Pod, options: &str, how: &[&str]) -> Result<(), String> {
    let to = format!("{}%eth0", link_local(lab.pod("shop-web1")));
    odd(lab, pod, options, how, &[to], 7_007)
}

fn http(lab: &Lab, pod: &Pod) -> Result<(), String> {
    let to = link_local(lab.pod("shop-web1"));
    let canary = String::from_utf8_lossy(CANARY);
    let url = format!("-g -H 'X-Canary: {canary}' 'http://[{to}%25eth0]:8080/'");
    let ran = lab.exec(&pod.name, &format!("curl -sS --fail --max-time 1 {url}"), Duration::from_secs(5));
    match ran.out.starts_with("hello from") {
        true => Ok(()),
        false => Err(ran.err),
    }
}

fn seen(lab: &Lab) {
    http(lab, lab.pod("shop-client")).expect("without agents the exchange is complete");
    assert!(ways::seen(lab, WAYS) > 0, "no canary reached another pod: the sniffers see nothing");
}

fn closed(lab: &Lab) {
    ways::closed(lab, WAYS);
    http(lab, lab.pod("shop-client")).expect_err("an exchange in clear");
}

/// Another tenant's datagrams at link scope are no peer's, but an application can't tell.
fn inbound(lab: &Lab) {
    let (from, to) = (lab.pod("bank-client"), lab.pod("shop-web1"));
    let socket = to.udp((std::net::Ipv6Addr::UNSPECIFIED, 9_620));
    socket.set_read_timeout(Some(Duration::from_millis(300))).expect("time-out");
    let targets = [format!("{}%eth0", link_local(to)), "ff02::1%eth0".to_owned()];
    odd(lab, from, "", &["udp"], &targets, 9_620).expect("the stranger sends");
    assert!(socket.recv(&mut [0; 64]).is_err(), "a datagram of link scope came to an application");
}
