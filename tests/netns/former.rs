//! Addresses that were the project's, or are only half known: in clear neither at once nor when a timer has run out.

use std::fs;
use std::net::IpAddr;
use std::thread;
use std::time::{Duration, Instant};

use crate::Case;
use crate::lab::{Agents, Lab, Launched, PROJECT, pool_vips};
use crate::load;
use crate::packets::CANARY;
use crate::services::{Service, copy_directory, replace};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case::new("promise_1_a_former_peer_and_a_deleted_service_get_no_plaintext_after_35_seconds", former)
        .agents(Agents::Off)
        .seconds(120),
    Case::new("promise_1_an_endpoint_whose_pod_is_not_listed_gets_no_plaintext", unconfirmed)
        .agents(Agents::Off),
    Case::new("promise_1_what_dns_alone_named_gets_no_plaintext_when_its_time_is_over", dns_alone)
        .agents(Agents::Off)
        .seconds(200),
];

/// Longer than an agent keeps a route in whatever state for a former address (30 s on the first version).
const LONGER: Duration = Duration::from_secs(36);

/// Speaks to each address four times a second, from sockets that come and go: no socket names them for long.
fn speak(lab: &Lab, to: &[IpAddr], time: Duration) {
    let (pod, end) = (lab.pod("shop-client"), Instant::now() + time);
    while Instant::now() < end {
        for to in to {
            // Refused is fine.
            let _ = pod.udp_for(*to).send_to(CANARY, (*to, 7_007));
            drop(pod.connect((*to, 8_080), Duration::from_millis(20)));
        }
        let leaks = lab.leaks();
        assert!(leaks.leaked == 0, "after {:?}: {:?}", time.saturating_sub(end - Instant::now()), leaks.rows);
        thread::sleep(Duration::from_millis(250));
    }
}

fn former(lab: &Lab) {
    let directory = copy_directory(lab, "former");
    let key = lab.key_file(PROJECT);
    let vips = pool_vips(9_100);
    let service =
        Service::write(lab, &directory, "former", vips, (80, 8_080), "TCP", &["shop-web1", "shop-web2"]);
    let _servers =
        ["shop-web1", "shop-web2"].map(|pod| Launched::pod(lab, pod, &lab.directory(PROJECT), &key));
    let _client = Launched::pod(lab, "shop-client", &directory, &key);
    lab.reset_leaks();
    let peer = lab.pod("shop-web2").addresses();
    for to in peer {
        let got = lab.pod("shop-client").http_get((to, 8_080), Duration::from_secs(5));
        assert!(got.is_ok(), "control: {to} is a peer: {got:?}");
    }
    for vip in vips {
        load::await_route(lab, "shop-client", vip);
    }
    fs::remove_file(directory.join("pod-shop-web2.yaml")).expect("its manifest");
    drop(service);
    speak(lab, &[&peer[..], &vips].concat(), LONGER);
}

/// Also a Pod that the directory does not list yet is a workload: an EndpointSlice of the project names its address.
fn unconfirmed(lab: &Lab) {
    let directory = copy_directory(lab, "unconfirmed");
    let key = lab.key_file(PROJECT);
    fs::remove_file(directory.join("pod-shop-lone.yaml")).expect("its manifest");
    let _service =
        Service::write(lab, &directory, "unconfirmed", pool_vips(9_101), (80, 8_080), "TCP", &["shop-lone"]);
    let _client = Launched::pod(lab, "shop-client", &directory, &key);
    lab.reset_leaks();
    speak(lab, &lab.pod("shop-lone").addresses(), Duration::from_secs(2));
}

/// A name of the zone whose address no object has. In the short form it is forgotten by the DNS server only.
fn dns_alone(lab: &Lab) {
    let key = lab.key_file(PROJECT);
    let vips = pool_vips(9_102);
    let hosts = lab.run_dir().join("dns/hosts.d/alone");
    replace(
        &hosts,
        &format!("{} alone.shop.svc.cluster.local\n{} alone.shop.svc.cluster.local\n", vips[0], vips[1]),
    );
    let _client = Launched::pod(lab, "shop-client", &lab.directory(PROJECT), &key);
    lab.reset_leaks();
    let end = Instant::now() + Duration::from_secs(5);
    let named = |text: &str| vips.iter().filter(|vip| text.contains(&vip.to_string())).count();
    while named(
        &lab.exec("shop-client", "getent ahosts alone.shop.svc.cluster.local", Duration::from_secs(5)).out,
    ) < 2
    {
        assert!(Instant::now() < end, "the name is not answered");
    }
    fs::remove_file(&hosts).expect("the name");
    // An address of DNS lives at least a minute, and was released half a minute after it.
    speak(lab, &vips, if crate::long() { Duration::from_secs(100) } else { Duration::from_secs(3) });
}
