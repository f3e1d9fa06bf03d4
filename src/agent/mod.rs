//! The agent: lives in one pod's network namespace, touches its kernel objects, decides nothing.
//!
//! Bring-up, in order (the guard's skeleton was loaded before by the launcher):
//!
//! 1. `Init` arrives: addresses, keys, port, resolvers; for a successor the descriptors of its predecessor
//! 2. `tenc0`, the tunnel's UDP sockets (a port in use ends it here), the ARP socket
//! 3. rules and tables; what a former agent left is replaced
//! 4. capabilities, files and system calls that are not needed any more are given up (`privileges`)
//! 5. the directory's first generation: each address gets its guard element, then its route
//! 6. packets are read, oldest first; `Ready`: protected
//!
//! Tear-down on `Stop` is the reverse; the guard is the launcher's to remove, last. A failed bring-up tears down what it
//! made; where the pod was closed before, it stays closed. The end of a launcher ends nothing: the next one is accepted
//! (`control`), and without one the agent itself sees when its namespace is gone ([`presence`]).
//! One thread owns the engine (`driver`), a second one the netlink sockets (`applier`); one file per kernel object.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use hickory_proto::rr::Name;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha20Rng;
use socket2::SockRef;
use tracing::{info, warn};

mod applier;
mod dns;
mod driver;
mod flows;
pub mod guard;
mod handover;
pub mod neighbour;
pub mod netlink;
pub mod presence;
mod privileges;
pub mod raw_socket;
mod report;
pub mod sockets;
mod spin;
pub mod state;
pub mod tun;
pub mod udp;
pub mod watch;

use crate::control::{self, AgentChannel, Executable, FromAgent, Init, Inject, Received, ToAgent};
use applier::{Applier, Facts};
use dns::Queries;
use driver::{Driver, End, Kernel, Session};
use guard::{Asks, Guard, Kind};
use neighbour::ArpResponder;
use netlink::{Capture, Netlink};
use presence::Presence;
use raw_socket::RawInjector;
use spin::Spin;
use state::StateFile;
use tun::Tun;
use udp::TunnelSocket;
use watch::Watch;

use crate::proto::ladder::Mode;
use crate::proto::mtu::tun_mtu;
use crate::proto::noise::{Identity, Options, StaticSecret};
use crate::proto::{Config, Engine};
use crate::sys::memory;

/// How an agent ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitKind {
    /// As it was told to, or with its namespace.
    Stopped,
    /// Bring-up failed and was reported over the channel, with this exit code.
    Failed(u8),
}

/// The kernel or a privilege refused what the agent needs.
const REFUSED: u8 = 3;
/// How long the launcher that started us may take to say what to do.
const FIRST_WORD: Duration = Duration::from_secs(10);

/// The descriptors that came with `Init`.
#[derive(Default)]
struct Carried {
    state: Option<OwnedFd>,
    tun: Option<OwnedFd>,
    sockets: Vec<OwnedFd>,
    process: Option<OwnedFd>,
    helper: Option<OwnedFd>,
    listeners: Vec<OwnedFd>,
}

impl Carried {
    fn new(kinds: &[control::Carried], descriptors: Vec<OwnedFd>) -> anyhow::Result<Self> {
        ensure!(
            kinds.len() == descriptors.len(),
            "{} descriptors, {} announced",
            descriptors.len(),
            kinds.len()
        );
        let mut carried = Self::default();
        for (kind, fd) in kinds.iter().zip(descriptors) {
            match kind {
                control::Carried::State => carried.state = Some(fd),
                control::Carried::Tun => carried.tun = Some(fd),
                control::Carried::Socket => carried.sockets.push(fd),
                control::Carried::Process => carried.process = Some(fd),
                control::Carried::HelperTun => carried.helper = Some(fd),
                control::Carried::HelperListener => carried.listeners.push(fd),
            }
        }
        Ok(carried)
    }
}

/// Runs the agent in the namespace the process is in; launchers connect at `listener`.
///
/// # Errors
/// What made it end without an order; everything it made stays, closed.
pub fn run(listener: OwnedFd) -> anyhow::Result<ExitKind> {
    control::claim(&listener)?;
    let channel = first_launcher(&listener)?;
    let (init, descriptors) = match channel.recv().context("wait for the launcher")? {
        Received::Message(ToAgent::Init(init), descriptors) => (*init, descriptors),
        Received::Message(..) => bail!("the launcher's first message was not Init"),
        Received::Closed => bail!("the launcher is gone"),
    };
    let mut carried = Carried::new(&init.carried, descriptors)?;
    let presence = Presence::new(init.place.clone(), carried.process.take());
    // Before tenc0 is ours, nothing was made; and what a former agent made keeps the pod closed.
    let mut made = false;
    let (engine, kernel) = match bring_up(&init, carried, &mut made) {
        Ok(up) => up,
        Err(error) => {
            let removed = if made { remove_everything() } else { Ok(()) };
            return Ok(fail(Some(&channel), removed, &error));
        }
    };
    let session = Session {
        channel: Some(channel),
        listener,
        presence,
        fingerprint: init.fingerprint(),
        executable: executable()?,
        parked: init.parked,
        learned: init.ranges.is_empty(),
    };
    // Its copies of the keys are erased; the engine's are locked into memory.
    drop(init);
    let mut driver = Driver::new(engine, kernel, session)?;
    match driver.run()? {
        End::Stop => {
            let (session, engine) = driver.dismantle();
            report(&engine);
            remove_everything().context("tear down")?;
            // Without a launcher nobody waits for this.
            session.tell(&FromAgent::Stopped, &[]);
            Ok(ExitKind::Stopped)
        }
        End::Failed(error) => {
            let (session, _) = driver.dismantle();
            let removed = if made { remove_everything() } else { Ok(()) };
            Ok(fail(session.channel.as_ref(), removed, &error))
        }
        End::NamespaceGone => {
            info!("the namespace is gone");
            driver.dismantle().0.presence.remove_files();
            Ok(ExitKind::Stopped)
        }
        End::HandOver => {
            let (session, engine) = driver.dismantle();
            // Without it the successor makes its sessions anew.
            let state = handover::seal(&engine.export(driver::clocks())).context("hand over")?;
            session.tell(&FromAgent::HandedOver, &[state.as_fd()]);
            Ok(ExitKind::Stopped)
        }
        End::Abandoned => bail!("the launcher is gone, and another agent protects the pod"),
    }
}

/// The file that this process's program is, also after another one took its name.
///
/// # Errors
/// /proc is not there.
pub fn executable() -> anyhow::Result<Executable> {
    executable_of(Path::new("/proc/self/exe"))
}

/// What an agent that runs the program at `path` says of it.
///
/// # Errors
/// It is not there.
pub fn executable_of(path: &Path) -> anyhow::Result<Executable> {
    let found = std::fs::metadata(path).context("cannot look at our own program")?;
    let changed = found.mtime().cast_unsigned().wrapping_mul(1_000_000_000);
    Ok([found.dev(), found.ino(), found.size(), changed.wrapping_add(found.mtime_nsec().cast_unsigned())])
}

/// The launcher that started us has connected already.
fn first_launcher(listener: &OwnedFd) -> anyhow::Result<AgentChannel> {
    let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    let limit = PollTimeout::try_from(FIRST_WORD).expect("ten seconds");
    poll(&mut fds, limit).context("wait for the launcher")?;
    control::accept(listener)?.context("the launcher did not connect")
}

fn bring_up(init: &Init, carried: Carried, made: &mut bool) -> anyhow::Result<(Engine, Kernel)> {
    let own: Vec<IpAddr> = init.addresses.iter().map(|own| own.address).collect();
    let dns_ports = init.dns_ports.0..=init.dns_ports.1;
    let mut netlink = Netlink::open()?;
    let mut guard = Guard::open(init.skeleton)?;
    let asks = open_asks(init);
    let sockets = sockets(&own, init.port, carried.sockets)?;
    let mut held = Vec::new();
    if init.hold_dns_ports {
        for family in init.resolvers.iter().map(IpAddr::is_ipv6).collect::<BTreeSet<_>>() {
            held.extend(udp::hold_ports(dns_ports.clone(), family)?);
        }
    }
    let stale = netlink.protected()?;
    let peers: Vec<IpAddr> = guard.list(Kind::Peers)?.into_iter().collect();
    let released: Vec<IpAddr> = guard.list(Kind::Released)?.into_iter().collect();
    let arp = arp_responder(&mut netlink, &own);
    // A descriptor whose device was deleted while nobody read leads nowhere.
    let inherited = carried.tun.and_then(|fd| Tun::inherit(fd).ok());
    let fresh = inherited.is_none() && netlink.link(tun::NAME).is_err();
    let tun = Arc::new(inherited.map_or_else(Tun::open, Ok)?);
    *made = fresh;
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
    let runtime = init.place.runtime.parent().context("the runtime files lie nowhere")?;
    privileges::confine(runtime)?;
    let mut rng = ChaCha20Rng::from_seed(init.seed.0);
    let (mut engine_seed, mut balance_seed) = ([0; 32], [0; 16]);
    rng.fill_bytes(&mut engine_seed);
    rng.fill_bytes(&mut balance_seed);
    let (state, restored) = StateFile::open(
        carried.state.context("the launcher sent no state file")?,
        &state_facts(&own, &sockets)?,
        balance_seed,
    );
    let facts = Facts {
        capture,
        link_mtu: init.link_mtu,
        tun: Arc::clone(&tun),
        stale: stale.clone(),
        peers: peers.clone(),
    };
    let mut engine = Engine::new(Config {
        identities: identities(init),
        port: init.port,
        resolvers: init.resolvers.clone(),
        zone: zone(init)?,
        link_mtu: init.link_mtu,
        seed: engine_seed,
        balance_seed: restored.balance_seed,
        options: options(init),
        coalesce: raw.is_none() && tun.offloads() != 0,
        coalesce_udp: tun.offloads() & libc::TUN_F_USO4 != 0,
        mode: init.mode,
        ranges: init.ranges.clone(),
        dns_gate: crate::fault::dns_gate(),
    });
    engine.static_secrets().for_each(memory::lock_in_place);
    let now = driver::clocks();
    engine.adopt(&stale, now);
    engine.adopt_peers(&peers, now);
    engine.adopt_released(&released, now);
    if !init.parked {
        engine.restore(&restored, now);
    }
    engine.handle_launcher(true, now);
    let (applier, spoken_to) = Applier::start(guard, netlink, facts, init.mode)?;
    let kernel = Kernel {
        state,
        tun,
        sockets,
        raw,
        applier,
        watch,
        asks,
        spoken_to,
        helper: carried.helper.map(|tun| (tun, carried.listeners)),
        arp,
        queries: Queries::new(dns_ports, held, rng),
        spin: Spin::new(Duration::from_micros(init.spin_us.into())),
    };
    Ok((engine, kernel))
}

/// Hears of unknown addresses, where there are ranges for them to lie in. Without it they stay closed until a program asks
/// DNS for them.
fn open_asks(init: &Init) -> Option<Asks> {
    if init.ranges.is_empty() || init.mode != Mode::Strict {
        return None;
    }
    Asks::open()
        .inspect_err(
            |error| warn!(%error, "cannot hear of addresses that the guard drops: they are not asked about"),
        )
        .ok()
}

/// What tells this boot, this namespace and this workload from others.
fn state_facts(own: &[IpAddr], sockets: &[(IpAddr, TunnelSocket)]) -> anyhow::Result<state::Facts> {
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").context("read the boot's id")?;
    let (_, socket) = sockets.first().context("no address of our own")?;
    Ok(state::Facts {
        boot_id: state::parse_boot_id(&boot_id).context("the boot's id is none")?,
        cookie: crate::sys::netns::cookie(socket).context("the namespace's cookie: needs Linux 5.14")?,
        addresses: own.to_vec(),
    })
}

/// The tunnel's sockets, by own address: a former agent's, if they are all there and what they should be, else new ones.
fn sockets(
    own: &[IpAddr],
    port: u16,
    inherited: Vec<OwnedFd>,
) -> anyhow::Result<Vec<(IpAddr, TunnelSocket)>> {
    let is_bound = |(fd, own): (&OwnedFd, &IpAddr)| {
        let local = SockRef::from(fd).local_addr().ok().and_then(|local| local.as_socket());
        local.is_some_and(|local| (local.ip(), local.port()) == (*own, port))
    };
    if inherited.len() == own.len() && inherited.iter().zip(own).all(is_bound) {
        return Ok(own.iter().copied().zip(inherited.into_iter().map(TunnelSocket::inherit)).collect());
    }
    drop(inherited);
    own.iter().map(|own| Ok((*own, TunnelSocket::open(SocketAddr::new(*own, port))?))).collect()
}

/// The key in use of each address, then those that are only answered with.
fn identities(init: &Init) -> Vec<Identity> {
    let identity = |address, secret: &StaticSecret| Identity { address, secret: secret.clone() };
    let used = init.addresses.iter().map(|own| identity(own.address, &own.secret));
    let accepted = init.addresses.iter().filter_map(|own| Some(identity(own.address, own.accept.as_ref()?)));
    used.chain(accepted).collect()
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
    let mut options = Options::of(init.suite);
    if let Some(seconds) = init.rekey_after_s {
        options.rekey_after = Duration::from_secs(seconds);
    }
    options
}

/// Answers ARP where the kernel would not; a pod without IPv4 or without an Ethernet link needs none.
fn arp_responder(netlink: &mut Netlink, own: &[IpAddr]) -> Option<ArpResponder> {
    let IpAddr::V4(own) = *own.iter().find(|own| own.is_ipv4())? else { return None };
    let opened = netlink.link_of(own.into()).map_err(anyhow::Error::from).and_then(|link| {
        if link.mac.is_none() {
            return Ok(None);
        }
        Ok(Some(ArpResponder::open(link.index, own)?))
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

fn fail(channel: Option<&AgentChannel>, removed: anyhow::Result<()>, error: &anyhow::Error) -> ExitKind {
    if let Err(left) = removed {
        warn!(error = format!("{left:#}"), "not everything could be removed");
    }
    // The exit code says the same where the launcher is gone.
    let _ = channel.map(|channel| channel.try_send(&FromAgent::failed(REFUSED, &format!("{error:#}")), &[]));
    ExitKind::Failed(REFUSED)
}

fn report(engine: &Engine) {
    let counters = engine.counters();
    info!(sealed = counters.sealed, opened = counters.opened, dns = counters.dns_forwarded, "stopped");
    for (reason, packets) in counters.drops() {
        info!(reason = reason.as_str(), packets, "dropped");
    }
}
