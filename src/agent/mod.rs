//! The agent: lives in one pod's network namespace, touches its kernel objects, decides nothing.
//!
//! Bring-up, in order (the guard's skeleton was loaded before by the launcher):
//!
//! 1. `Init` arrives: addresses, keys, port, resolvers
//! 2. `tenc0`, the tunnel's UDP sockets (a port in use ends it here), the ARP socket
//! 3. rules and tables; what a former agent left is replaced
//! 4. every capability but CAP_NET_ADMIN and CAP_NET_RAW is given up
//! 5. the directory's first generation: each address gets its guard element, then its route
//! 6. `Ready`: protected
//!
//! Tear-down on `Stop` is the reverse; the guard is the launcher's to remove, last. A failed bring-up tears down too.
//! One thread owns the engine (`driver`), a second one the netlink sockets (`applier`); one file per kernel object.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, bail};
use hickory_proto::rr::Name;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha20Rng;
use tracing::{info, warn};

mod applier;
pub mod control;
mod dns;
mod driver;
pub mod guard;
pub mod neighbour;
pub mod netlink;
mod privileges;
pub mod raw_socket;
pub mod tun;
pub mod udp;
pub mod watch;

use applier::{Applier, Facts};
use control::{AgentChannel, FromAgent, Init, Inject, Received, ToAgent};
use dns::Queries;
use driver::{Driver, End, Kernel};
use guard::Guard;
use neighbour::ArpResponder;
use netlink::{Capture, Netlink};
use raw_socket::RawInjector;
use tun::Tun;
use udp::TunnelSocket;
use watch::Watch;

use crate::proto::mtu::tun_mtu;
use crate::proto::noise::{Identity, Options};
use crate::proto::{Config, Engine};

/// How an agent ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitKind {
    /// Ordered to stop; everything it made is gone.
    Stopped,
    /// Bring-up failed and was reported over the channel, with this exit code.
    Failed(u8),
}

/// The kernel or a privilege refused what the agent needs.
const REFUSED: u8 = 3;

/// Runs the agent in the namespace the process is in.
///
/// # Errors
/// What made it end without an order; everything it made stays, closed.
pub fn run(channel: OwnedFd) -> anyhow::Result<ExitKind> {
    let channel = AgentChannel::new(channel)?;
    let (init, descriptors) = match channel.recv().context("wait for the launcher")? {
        Received::Message(ToAgent::Init(init), descriptors) => (*init, descriptors),
        Received::Message(..) => bail!("the launcher's first message was not Init"),
        Received::Closed => bail!("the launcher is gone"),
    };
    // Before tenc0 is ours, nothing was made: what is there is somebody else's.
    let mut opened = false;
    let (engine, kernel) = match bring_up(&init, descriptors, &mut opened) {
        Ok(made) => made,
        Err(error) => {
            let removed = if opened { remove_everything() } else { Ok(()) };
            return Ok(fail(&channel, removed, &error));
        }
    };
    let mut driver = Driver::new(engine, kernel, channel)?;
    let end = driver.run()?;
    let (channel, engine) = driver.dismantle();
    let removed = remove_everything();
    match end {
        End::Stop => {
            report(&engine);
            removed.context("tear down")?;
            // Without a launcher nobody waits for this.
            let _ = channel.send(&FromAgent::Stopped, &[]);
            Ok(ExitKind::Stopped)
        }
        End::PodLinkGone => {
            report(&engine);
            let _ = channel.send(&FromAgent::Stopped, &[]);
            Ok(ExitKind::Stopped)
        }
        End::Failed(error) => Ok(fail(&channel, removed, &error)),
    }
}

fn bring_up(init: &Init, descriptors: Vec<OwnedFd>, opened: &mut bool) -> anyhow::Result<(Engine, Kernel)> {
    let own: Vec<IpAddr> = init.addresses.iter().map(|own| own.address).collect();
    let dns_ports = init.dns_ports.0..=init.dns_ports.1;
    let mut netlink = Netlink::open()?;
    let guard = Guard::open()?;
    let sockets = own.iter().map(|own| Ok((*own, TunnelSocket::open(SocketAddr::new(*own, init.port))?)));
    let sockets = sockets.collect::<anyhow::Result<Vec<_>>>()?;
    let mut held = Vec::new();
    if init.hold_dns_ports {
        for family in init.resolvers.iter().map(IpAddr::is_ipv6).collect::<BTreeSet<_>>() {
            held.extend(udp::hold_ports(dns_ports.clone(), family)?);
        }
    }
    let stale = netlink.protected()?;
    let arp = arp_responder(&mut netlink, &own);
    let tun = Arc::new(Tun::open()?);
    *opened = true;
    netlink.set_up_tun(tun::NAME, tun_mtu(init.link_mtu, &own))?;
    let capture = Capture {
        own: own.clone(),
        resolvers: init.resolvers.clone(),
        dns_ports: dns_ports.clone(),
        tunnel_port: init.port,
    };
    netlink.install_rules(&capture)?;
    let raw = match init.inject {
        Inject::Auto | Inject::Tun => None,
        Inject::Raw => Some(RawInjector::open().context("open raw sockets for injection")?),
    };
    let watch = Watch::open([netlink.port(), guard.port()], Instant::now()).context("watch for tampering")?;
    privileges::drop_all_but_network().context("give up privileges")?;
    let mut rng = ChaCha20Rng::from_seed(init.seed.0);
    let mut engine_seed = [0; 32];
    rng.fill_bytes(&mut engine_seed);
    let facts = Facts { capture, link_mtu: init.link_mtu, tun: Arc::clone(&tun), stale: stale.clone() };
    let mut descriptors = descriptors.into_iter();
    let mut engine = Engine::new(Config {
        identities: init
            .addresses
            .iter()
            .map(|own| Identity { address: own.address, secret: own.secret.clone() })
            .collect(),
        port: init.port,
        resolvers: init.resolvers.clone(),
        zone: zone(init)?,
        link_mtu: init.link_mtu,
        seed: engine_seed,
        options: options(init),
        coalesce: raw.is_none() && tun.offloads() != 0,
        coalesce_udp: tun.offloads() & libc::TUN_F_USO4 != 0,
        dns_gate: crate::fault::dns_gate(),
    });
    engine.adopt(&stale, driver::clocks());
    let kernel = Kernel {
        tun,
        sockets,
        raw,
        applier: Applier::start(guard, netlink, facts)?,
        watch,
        helper: descriptors.next().map(|tun| (tun, descriptors.collect())),
        arp,
        queries: Queries::new(dns_ports, held, rng),
    };
    Ok((engine, kernel))
}

fn zone(init: &Init) -> anyhow::Result<Option<Name>> {
    let parse = |zone: &String| {
        let mut name = Name::from_ascii(zone)?;
        name.set_fqdn(true);
        anyhow::Ok(name.to_lowercase())
    };
    init.zone.as_ref().map(parse).transpose().context("zone of the project")
}

fn options(init: &Init) -> Options {
    let mut options = Options::default();
    if let Some(seconds) = init.rekey_after_s {
        options.rekey_after = std::time::Duration::from_secs(seconds);
    }
    options
}

/// Answers ARP where the kernel would not; a pod without IPv4 or without an Ethernet link needs none.
fn arp_responder(netlink: &mut Netlink, own: &[IpAddr]) -> Option<ArpResponder> {
    let IpAddr::V4(own) = *own.iter().find(|own| own.is_ipv4())? else { return None };
    let opened = netlink.link_of(own.into()).map_err(anyhow::Error::from).and_then(|link| {
        let Some(mac) = link.mac else { return Ok(None) };
        Ok(Some(ArpResponder::open(link.index, mac, own)?))
    });
    opened.unwrap_or_else(|error| {
        warn!(
            error = format!("{error:#}"),
            "cannot answer ARP: with rp_filter 1, peers of the same subnet may lose us"
        );
        None
    })
}

/// Rules, routes and `tenc0`, in the reverse order of bring-up; what is not there is fine.
pub(crate) fn remove_everything() -> anyhow::Result<()> {
    let mut netlink = Netlink::open()?;
    netlink.tear_down()?;
    netlink.delete_tun(tun::NAME)?;
    Ok(())
}

fn fail(channel: &AgentChannel, removed: anyhow::Result<()>, error: &anyhow::Error) -> ExitKind {
    if let Err(left) = removed {
        warn!(error = format!("{left:#}"), "not everything could be removed");
    }
    // The exit code says the same where the launcher is gone.
    let _ = channel.send(&FromAgent::failed(REFUSED, &format!("{error:#}")), &[]);
    ExitKind::Failed(REFUSED)
}

fn report(engine: &Engine) {
    let counters = engine.counters();
    info!(sealed = counters.sealed, opened = counters.opened, dns = counters.dns_forwarded, "stopped");
    for (reason, packets) in counters.drops() {
        info!(reason = reason.as_str(), packets, "dropped");
    }
}
