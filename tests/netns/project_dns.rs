//! Resolvers that are not plain addresses of the cluster: a cache on the node, a Pod and a Service of the project.
//!
//! May touch: the lab's first node (an address of its bridge), dnsmasq processes that it starts, pods' agents.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::Case;
use crate::dns::{self, Question};
use crate::lab::{Agents, Lab, Launched, PROJECT, RESOLVER, pool_vips, run};
use crate::pod::Pod;
use crate::services::Service;

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case::new("promise_8_a_cache_on_the_node_with_a_link_local_address_answers_as_ever", node_cache)
        .agents(Agents::Off)
        .looks_itself()
        .every_rp_filter(),
    Case::new("promise_1_dns_to_a_pod_or_service_of_the_project_is_sealed", resolver_of_the_project)
        .agents(Agents::Off)
        .looks_itself()
        .every_rp_filter(),
];

/// Where NodeLocal DNSCache listens.
const NODE_CACHE: Ipv4Addr = Ipv4Addr::new(169, 254, 20, 10);

/// What is asked: an address of the project, one outside, a large answer.
fn questions() -> [Question; 3] {
    [("web.shop.svc.cluster.local", 1), ("www.example.test", 1), ("big.shop.svc.cluster.local", 16)]
        .map(|(name, kind)| Question::new(name, kind))
}

/// A name server of the lab's names at another address.
struct Server(Child);

impl Server {
    fn start(lab: &Lab, netns: &str, address: IpAddr) -> Self {
        let lines =
            fs::read_to_string(lab.run_dir().join("dns/dnsmasq.conf")).expect("the lab's dnsmasq.conf");
        let lines = lines.replace("interface=eth0\n", &format!("listen-address={address}\n"));
        let lines = lines.replace("except-interface=lo\n", "");
        let file = lab.run_dir().join(format!("dns/{netns}.conf"));
        fs::write(&file, lines).expect("a configuration");
        let child = Command::new("ip")
            .args(["netns", "exec", &format!("{}-{netns}", lab.name()), "dnsmasq", "--keep-in-foreground"])
            .arg(format!("--conf-file={}", file.display()))
            .arg("--pid-file")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("start dnsmasq");
        Self(child)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A resolv.conf of the project that names `resolver`.
fn resolv_conf(lab: &Lab, resolver: IpAddr) -> PathBuf {
    let file = lab.run_dir().join("resolv.conf");
    let search = "shop.svc.cluster.local svc.cluster.local cluster.local";
    fs::write(&file, format!("nameserver {resolver}\nsearch {search}\n")).expect("a resolv.conf");
    file
}

fn launch(lab: &Lab, pod: &str, resolv_conf: Option<&Path>) -> Launched {
    let mut args = Launched::args(lab, pod, &lab.directory(PROJECT), &lab.key_file(PROJECT));
    if let Some(file) = resolv_conf {
        args.extend(["--resolv-conf".to_owned(), file.display().to_string()]);
    }
    let launched = Launched::start(lab, &args.iter().map(String::as_str).collect::<Vec<_>>());
    launched.wait_ready();
    launched
}

/// The answers to every question over UDP and TCP, `None` where there was none.
fn ask(pod: &Pod, server: IpAddr, limit: Duration) -> Vec<Option<Vec<u8>>> {
    let server = SocketAddr::new(server, 53);
    let all = questions().into_iter().flat_map(|question| {
        let bytes = question.bytes();
        [dns::ask_udp(pod, server, &bytes, limit), dns::ask_tcp(pod, server, &bytes, limit)]
    });
    all.collect()
}

/// What the lab's own resolver says.
fn expected(lab: &Lab) -> Vec<Option<Vec<u8>>> {
    let all = ask(lab.pod("shop-lone"), RESOLVER.into(), Duration::from_secs(2));
    assert!(all.iter().all(Option::is_some), "the lab's resolver answers");
    all
}

/// Waits until a server that was just started answers a pod without an agent.
fn await_server(pod: &Pod, server: IpAddr) {
    let question = Question::new("web.shop.svc.cluster.local", 1).bytes();
    let end = Instant::now() + Duration::from_secs(10);
    while dns::ask_udp(pod, SocketAddr::new(server, 53), &question, Duration::from_millis(200)).is_none() {
        assert!(Instant::now() < end, "no server at {server}");
        thread::sleep(Duration::from_millis(50));
    }
}

fn node_cache(lab: &Lab) {
    let address = format!("{NODE_CACHE}/32");
    let node = format!("{}-node1", lab.name());
    let change = |what| {
        let mut command = Command::new("ip");
        command.args(["-n", &node, "addr", what, &address, "dev", "cni0"]);
        run(&mut command, Duration::from_secs(5)).code
    };
    assert_eq!(change("add"), 0, "an address of the node");
    let server = Server::start(lab, "node1", NODE_CACHE.into());
    let pod = lab.pod("shop-client");
    await_server(pod, NODE_CACHE.into());
    let wanted = expected(lab);
    let agent = launch(lab, "shop-client", Some(&resolv_conf(lab, NODE_CACHE.into())));
    lab.reset_leaks();
    assert_eq!(ask(pod, NODE_CACHE.into(), Duration::from_secs(2)), wanted);
    lab.assert_no_leak();
    drop((agent, server));
    assert_eq!(change("del"), 0);
}

fn resolver_of_the_project(lab: &Lab) {
    let [client, web] = ["shop-client", "shop-web2"].map(|name| lab.pod(name));
    let server = Server::start(lab, "shop-web2", web.v4.into());
    await_server(client, web.v4.into());
    let wanted = expected(lab);
    let _server_agent = launch(lab, "shop-web2", None);
    let vips = pool_vips(9_100);
    let service =
        Service::write(lab, &lab.directory(PROJECT), "names", vips, (53, 53), "UDP", &["shop-web2"]);
    for resolver in [web.v4.into(), vips[0]] {
        let agent = launch(lab, "shop-client", Some(&resolv_conf(lab, resolver)));
        lab.reset_leaks();
        let got = ask(client, resolver, Duration::from_secs(2));
        for (n, wanted) in wanted.iter().enumerate() {
            // The Service has no port for TCP: that is refused.
            let wanted = if n % 2 == 1 && resolver == vips[0] { &None } else { wanted };
            assert_eq!(got[n], *wanted, "question {n} to {resolver}");
        }
        lab.assert_no_leak();
        lab.assert_sealed();
        drop(agent);
    }
    drop((service, server));
}
