//! Everything a launch has to know, gathered before anything is changed.
//!
//! 1. the namespace is opened and looked at
//! 2. the directory is read; it, or the operator, names the project
//! 3. resolv.conf and key are read, and compared with the project
//! 4. own addresses are fixed, their keys derived
//! 5. later, each new agent is told all of it and the whole directory; what changes comes in generations
//!
//! May touch: nothing but by reading; the directory is watched from here on.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use tracing::{debug, warn};

use self::guard::{Facts, Skeleton};
use self::netns::{PodNetns, Target};
use self::network::PodNetwork;
use self::resolv::ResolvConf;
use self::surroundings::Surroundings;
use super::directory::file::{FileSource, Manifests};
use super::host::Host;
use super::keys::ProjectKey;
use crate::cli;
use crate::control::{self, Carried, Init, OwnAddress, Place, Seed, ToAgent};
use crate::exit::Failure;
use crate::proto::directory::Change;
use crate::proto::is_unicast;
use crate::proto::ladder::Mode;
use crate::proto::ranges::Ranges;
use crate::proto::routing::Class;
use crate::sys::memory;

pub mod agent;
pub mod dns_helper;
pub mod files;
pub(in crate::launcher) mod gate;
pub mod guard;
pub mod holders;
pub mod netns;
pub mod network;
pub mod project;
pub mod resolv;
pub(in crate::launcher) mod supervisor;
pub mod surroundings;
pub(in crate::launcher) mod teardown;

/// Everything that is known before anything is changed.
pub(in crate::launcher) struct Plan {
    pub(in crate::launcher) netns: PodNetns,
    /// A second descriptor of the namespace.
    pub(in crate::launcher) netns_fd: OwnedFd,
    pub(in crate::launcher) project: String,
    pub(in crate::launcher) network: PodNetwork,
    pub(in crate::launcher) addresses: Vec<IpAddr>,
    pub(in crate::launcher) resolvers: Vec<IpAddr>,
    pub(in crate::launcher) skeleton: Skeleton,
    /// What an agent is told, but for what makes one agent different from the next.
    pub(in crate::launcher) init: Init,
    pub(in crate::launcher) source: FileSource,
    pub(in crate::launcher) host: Host,
    generation: u64,
    arguments: cli::Launch,
}

impl Plan {
    pub(in crate::launcher) fn make(arguments: &cli::Launch) -> Result<Self, Failure> {
        let target: Target = arguments.netns.parse()?;
        let netns = PodNetns::open(target)?;
        let netns_fd = netns.as_fd().try_clone_to_owned().context("descriptor").map_err(Failure::kernel)?;
        let network = PodNetwork::inspect(&netns, arguments.port)?;
        let manifests = Manifests::open(&arguments.directory)?;
        let project = project(arguments, &manifests, &network.addresses)?;
        if !manifests.objects().names_project(&project) {
            return Err(Failure::usage(anyhow!(
                "the directory {} names nothing of the project {project}: nothing would be protected",
                arguments
                    .directory
                    .iter()
                    .map(|dir| dir.display().to_string())
                    .collect::<Vec<_>>()
                    .join(", ")
            )));
        }
        let addresses = project::own_addresses(manifests.objects(), &project, &network.addresses);
        if addresses.is_empty() {
            return Err(Failure::usage(anyhow!(
                "none of the addresses of the pod's device {} is one of its Pod in the directory: \
                 add its Pod's manifest, or check --project",
                network.interface
            )));
        }
        let (resolv, key) = read_files(arguments, &netns, &project)?;
        let resolvers = capturable(&resolv, &addresses);
        let init = init(arguments, &netns, &network, &addresses, resolv.zone, &resolvers, &key);
        let surroundings = Surroundings::inspect(&netns)?;
        let skeleton = Skeleton {
            resolvers: resolvers.clone(),
            dns_ports: network.dns_ports.range.clone(),
            ranges: arguments.ranges(),
            exempt: arguments.exempt.clone(),
            allow_link_scope: arguments.allow_link_scope,
            allow_dhcp: arguments.allow_dhcp,
            ..Skeleton::closed(arguments.mode.into(), arguments.port, surroundings.names())
        };
        let host = Host::open().map_err(Failure::kernel)?;
        let source = manifests
            .follow(key, addresses.clone())
            .context("cannot watch the directory")
            .map_err(Failure::kernel)?;
        let mut plan = Self {
            netns,
            netns_fd,
            project,
            network,
            addresses,
            resolvers,
            skeleton,
            init,
            source,
            host,
            generation: 0,
            arguments: arguments.clone(),
        };
        plan.look_around_with(&surroundings);
        plan.warn_of_gaps();
        Ok(plan)
    }

    /// Says what passes in clear because of how the launch was configured.
    fn warn_of_gaps(&self) {
        if self.skeleton.mode != Mode::Strict {
            return;
        }
        let arguments = &self.arguments;
        if !self.drops_unclassified() {
            warn!("--unclassified pass: addresses that nothing vouches for are spoken to in clear");
        } else if self.skeleton.ranges.is_empty() {
            warn!(
                "without --pod-cidr and --service-cidr an address of the project passes in clear until the directory or DNS \
                 names it, and ten minutes after the directory forgot it"
            );
        }
        if arguments.allow_link_scope {
            warn!("--allow-link-scope: link-local addresses, multicast and broadcast are spoken to in clear");
        }
    }

    /// Looks at the pod's devices and at what is outside of the project; whether the guard has to be loaded again.
    pub(in crate::launcher) fn look_around(&mut self) -> bool {
        match Surroundings::inspect(&self.netns) {
            Ok(surroundings) => self.look_around_with(&surroundings),
            Err(error) => {
                warn!(error = agent::describe(&error), "the pod's devices cannot be read");
                false
            }
        }
    }

    fn look_around_with(&mut self, surroundings: &Surroundings) -> bool {
        let outside = self.source.outside();
        let own = &self.addresses;
        let of_host = self.host.addresses().iter().filter(|address| !own.contains(address));
        let facts = Facts {
            nodes: outside
                .nodes
                .iter()
                .chain(of_host)
                .copied()
                .filter(|address| is_unicast(*address))
                .collect(),
            node_ranges: self.node_ranges(),
            gateways: self.host.gateways(&surroundings.devices),
            node_ports: outside.node_ports.clone(),
            externals: outside.externals.clone(),
            broadcasts: surroundings.broadcasts.clone(),
            resolver_endpoints: outside.resolver_endpoints(&self.resolvers),
        };
        let before = (
            std::mem::replace(&mut self.skeleton.devices, surroundings.names()),
            std::mem::replace(&mut self.skeleton.facts, facts),
        );
        before.0 != self.skeleton.devices || before.1 != self.skeleton.facts
    }

    /// Whether the operator wants unknown addresses within the ranges to be dropped.
    pub(in crate::launcher) fn drops_unclassified(&self) -> bool {
        self.arguments.unclassified == cli::Unclassified::Drop
    }

    fn node_ranges(&self) -> Ranges {
        self.arguments.node_cidr.iter().copied().collect()
    }

    /// Whose an address is that the agent asks about.
    pub(in crate::launcher) fn class(&self, address: IpAddr) -> Class {
        match self.source.outside().class(address) {
            Class::Unknown if self.is_declared(address) => Class::Outside,
            class => class,
        }
    }

    fn is_declared(&self, address: IpAddr) -> bool {
        let exempt = |net: &guard::Exemption| net.port.is_none() && net.net.contains(&address);
        self.host.addresses().contains(&address)
            || self.node_ranges().contains(address)
            || self.arguments.exempt.iter().any(exempt)
    }

    /// The directory's newest state.
    pub(in crate::launcher) fn generation(&self) -> u64 {
        self.generation
    }

    /// Reads key file and resolv.conf again; the next agent is told what they say.
    pub(in crate::launcher) fn renew(&mut self) -> Result<(), Failure> {
        let (resolv, key) = read_files(&self.arguments, &self.netns, &self.project)?;
        self.resolvers = capturable(&resolv, &self.addresses);
        self.skeleton.resolvers.clone_from(&self.resolvers);
        self.init = init(
            &self.arguments,
            &self.netns,
            &self.network,
            &self.addresses,
            resolv.zone,
            &self.resolvers,
            &key,
        );
        self.source.set_key(key);
        Ok(())
    }

    /// What a new agent is told: which descriptors come along, whether it waits for its predecessor, and randomness of its
    /// own.
    pub(in crate::launcher) fn init_for(
        &self,
        carried: Vec<Carried>,
        parked: bool,
        runtime: &Path,
    ) -> anyhow::Result<Init> {
        let mut init = self.init.clone();
        aws_lc_rs::rand::fill(&mut init.seed.0).map_err(|_| anyhow!("the system gives no random numbers"))?;
        init.carried = carried;
        init.parked = parked;
        init.skeleton = self.skeleton.digest();
        init.place.runtime = runtime.to_owned();
        Ok(init)
    }

    /// The messages that bring changes as the next generation.
    pub(in crate::launcher) fn commit(&mut self, changes: Vec<Change>, whole: bool) -> VecDeque<ToAgent> {
        self.generation += 1;
        debug!(generation = self.generation, changes = changes.len(), whole, "directory");
        let mut messages = VecDeque::from(control::chunks(changes));
        messages.push_back(ToAgent::Commit { generation: self.generation, whole });
        messages
    }

    /// The messages that bring the whole directory to an agent that may know another one, or none.
    pub(in crate::launcher) fn whole(&mut self) -> VecDeque<ToAgent> {
        let changes = self.source.whole();
        self.commit(changes, true)
    }

    /// Says on standard output that the pod is protected. A reader that is gone changes nothing about that.
    pub(in crate::launcher) fn announce(&self) {
        let addresses = self.addresses.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(",");
        let line = format!(
            "protected {} project={} addresses={addresses} interface={} port={}\n",
            self.netns.name(),
            self.project,
            self.network.interface,
            self.init.port
        );
        let mut stdout = io::stdout();
        if let Err(error) = stdout.write_all(line.as_bytes()).and_then(|()| stdout.flush()) {
            warn!(%error, "cannot print that the pod is protected");
        }
    }
}

fn read_files(
    arguments: &cli::Launch,
    netns: &PodNetns,
    project: &str,
) -> Result<(ResolvConf, ProjectKey), Failure> {
    let resolv = ResolvConf::read(netns, arguments.resolv_conf.as_deref(), project)?;
    let key = ProjectKey::read(&arguments.project_key_file, project, arguments.cipher.into())?;
    Ok((resolv, key))
}

fn init(
    arguments: &cli::Launch,
    netns: &PodNetns,
    network: &PodNetwork,
    addresses: &[IpAddr],
    zone: Option<String>,
    resolvers: &[IpAddr],
    key: &ProjectKey,
) -> Init {
    let own = |address| OwnAddress {
        address,
        secret: key.static_secret(address),
        accept: key.accepted_secret(address),
    };
    let addresses: Vec<_> = addresses.iter().copied().map(own).collect();
    // They stay where they are as long as the plan; what an agent is told is a copy, erased when it was sent.
    for own in &addresses {
        memory::lock_in_place(&own.secret.0);
        own.accept.iter().for_each(|secret| memory::lock_in_place(&secret.0));
    }
    Init {
        carried: Vec::new(),
        parked: false,
        place: Place { path: netns.path(), identity: netns.identity(), runtime: PathBuf::new() },
        addresses,
        port: arguments.port,
        link_mtu: network.mtu,
        zone,
        ranges: arguments.ranges(),
        resolvers: resolvers.to_vec(),
        dns_ports: (*network.dns_ports.range.start(), *network.dns_ports.range.end()),
        hold_dns_ports: network.dns_ports.keep_bound,
        inject: arguments.inject.into(),
        mode: arguments.mode.into(),
        skeleton: 0,
        suite: arguments.cipher.into(),
        spin_us: arguments.spin,
        seed: Seed([0; 32]),
        rekey_after_s: arguments.rekey_after,
    }
}

/// The operator's project, or that of the one Pod with the pod's address. A directory that says otherwise is believed:
/// both are root's words, and a key of the wrong project would leave the pod's traffic in clear.
fn project(arguments: &cli::Launch, manifests: &Manifests, addresses: &[IpAddr]) -> Result<String, Failure> {
    let objects = manifests.objects();
    let Some(project) = &arguments.project else {
        return Ok(project::project_of(objects, addresses)?);
    };
    let project = project.to_ascii_lowercase();
    let holders: Vec<_> = objects.workloads_at(addresses).map(|(id, _)| id).collect();
    match holders.first() {
        Some(other) if holders.iter().all(|id| id.namespace != project) => Err(Failure::usage(anyhow!(
            "project_mismatch: the directory gives the pod's address to {}/{}, not to the project {project}",
            other.namespace,
            other.name
        ))),
        _ => Ok(project),
    }
}

/// The resolvers whose traffic a route can capture: of a family the pod has, and not on loopback.
fn capturable(resolv: &ResolvConf, own: &[IpAddr]) -> Vec<IpAddr> {
    if !resolv.loopback.is_empty() {
        warn!(
            "a resolver on loopback cannot be captured: its names are protected as far as the directory knows them"
        );
    }
    if resolv.ignored > 0 {
        warn!(count = resolv.ignored, "resolvers that are left out: not an address, link-local, or too many");
    }
    if resolv.zone.is_none() {
        warn!("the search list names no zone <project>.svc.<domain>: nothing is learned from DNS");
    }
    let reachable = |resolver: &&IpAddr| own.iter().any(|own| own.is_ipv4() == resolver.is_ipv4());
    resolv.resolvers.iter().filter(reachable).copied().collect()
}
