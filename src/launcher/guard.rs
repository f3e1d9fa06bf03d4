//! The guard's skeleton: nft tables of our own in the pod's namespace, which outlive agent and launcher.
//!
//! 1. [`ruleset`] writes two tables as plain nft text, one for `inet` hooks and one for the device's egress
//! 2. [`load`] hands it to the `nft` program inside the pod's namespace: one transaction, all or nothing
//! 3. the agent fills the sets ([`crate::agent::guard`]); loading again replaces rules and keeps sets, elements, counters
//! 4. [`remove`] deletes both tables, in one transaction
//!
//! What it promises in strict mode, whoever sends, by whatever route: to a protected address only datagrams of the tunnel
//! leave, and port 53 of a resolver is reached by the agent's sockets alone; from a protected address only datagrams of the
//! tunnel come in. Neighbour discovery and ICMP errors that quote the tunnel pass. What is not from or to a protected address
//! or a resolver is never touched. Every refusal has a named counter.
//!
//! Hooks: postrouting 300 sees what the stack sends, whole; egress sees every frame, those of packet sockets included;
//! prerouting -450 sees what comes in before fragments are put together.
//!
//! Source: nft(8).

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};

use serde::Deserialize;

use crate::agent::guard::{SET4, SET6, TABLE};
use crate::agent::netlink::MARK;
use crate::agent::tun;
use crate::sys::exec::in_network_namespace;

/// Where the program is looked for when PATH does not have it: sudo and service managers often leave these out.
const PROGRAMS: [&str; 3] = ["nft", "/usr/sbin/nft", "/sbin/nft"];

/// What the guard of one pod depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skeleton {
    /// The pod's real device.
    pub device: DeviceName,
    /// UDP port of the tunnel, ours and every peer's.
    pub tunnel_port: u16,
    /// Resolvers whose port 53 is captured.
    pub resolvers: Vec<IpAddr>,
    /// LO-HI: the ports of the agent's own sockets towards the resolvers.
    pub dns_ports: RangeInclusive<u16>,
}

/// A device name that can stand in a ruleset between quotes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceName(String);

impl TryFrom<&str> for DeviceName {
    type Error = Error;

    fn try_from(name: &str) -> Result<Self, Error> {
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-@:".contains(&b);
        if name.is_empty() || name.len() > 15 || !name.bytes().all(plain) {
            return Err(Error::Device(name.to_owned()));
        }
        Ok(Self(name.to_owned()))
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why the guard is not as asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The program is missing.
    #[error("the program nft is missing: install the package nftables")]
    NoProgram,
    /// The program could not be run in the namespace.
    #[error("cannot run nft in the pod's network namespace: needs CAP_SYS_ADMIN, run as root")]
    Run(#[source] io::Error),
    /// The kernel or nft refused.
    #[error("nft refused to {operation} the guard: {stderr}")]
    Refused {
        /// What was being done.
        operation: &'static str,
        /// What nft said.
        stderr: String,
    },
    /// nft printed what cannot be read.
    #[error("cannot read nft's list of counters")]
    Counters(#[source] serde_json::Error),
    /// A device name that is no plain word.
    #[error("device name {0:?} has characters that the guard cannot hold")]
    Device(String),
}

/// How much of the skeleton the kernel took.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Loaded {
    /// Both tables.
    Full,
    /// The inet table alone: frames of packet sockets are not guarded. Holds what nft said (egress hooks came with 5.16).
    WithoutEgress(String),
}

/// Packets and bytes of one named counter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Packets.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
}

/// What nft says where the kernel, or nft itself, has no egress hook. Any other refusal is an error: the guard is never
/// weaker by accident.
const NO_EGRESS: [&str; 3] = ["Operation not supported", "unknown chain hook", "Protocol not supported"];

/// Loads the skeleton into the network namespace `netns`, or replaces the rules of the one that is there.
///
/// # Errors
/// See [`Error`]; after one, what was there before is unchanged.
pub fn load(netns: &OwnedFd, skeleton: &Skeleton) -> Result<Loaded, Error> {
    match nft(netns, "load", &["-f", "-"], &ruleset(skeleton, true)) {
        Ok(_) => Ok(Loaded::Full),
        Err(Error::Refused { stderr, .. }) if NO_EGRESS.iter().any(|words| stderr.contains(words)) => {
            nft(netns, "load", &["-f", "-"], &ruleset(skeleton, false))?;
            Ok(Loaded::WithoutEgress(stderr))
        }
        Err(error) => Err(error),
    }
}

/// Whether the skeleton, or what is left of one, is in `netns`.
///
/// # Errors
/// See [`Error`].
pub fn is_loaded(netns: &OwnedFd) -> Result<bool, Error> {
    let tables = nft(netns, "list the tables of", &["list", "tables"], "")?;
    Ok(tables.lines().any(|line| line.split_whitespace().last() == Some(TABLE)))
}

/// Removes both tables; tables that are not there are fine.
///
/// # Errors
/// See [`Error`].
pub fn remove(netns: &OwnedFd) -> Result<(), Error> {
    // Deleting what is not there fails, adding what is there does not.
    let tables = |families: &[&str]| {
        families.iter().fold(String::new(), |mut text, family| {
            writeln!(text, "add table {family} {TABLE}\ndelete table {family} {TABLE}").expect("a string");
            text
        })
    };
    match nft(netns, "remove", &["-f", "-"], &tables(&["inet", "netdev"])) {
        // A kernel without the netdev family.
        Err(Error::Refused { .. }) => nft(netns, "remove", &["-f", "-"], &tables(&["inet"])).map(drop),
        other => other.map(drop),
    }
}

/// The named counters of both tables.
///
/// # Errors
/// See [`Error`].
pub fn counters(netns: &OwnedFd) -> Result<BTreeMap<String, Count>, Error> {
    parse_counters(&nft(netns, "list the counters of", &["-j", "list", "counters"], "")?)
        .map_err(Error::Counters)
}

/// As [`counters`], without holding up the thread; dropped before it returns, it ends the program. To be awaited in the
/// thread that starts all programs: nobody else's descriptors are inherited.
///
/// # Errors
/// See [`Error`].
pub async fn counters_beside(netns: &OwnedFd) -> Result<BTreeMap<String, Count>, Error> {
    let operation = "list the counters of";
    for program in PROGRAMS {
        let mut command = Command::new(program);
        command.args(["-j", "list", "counters"]).env("LC_ALL", "C");
        in_network_namespace(&mut command, netns.try_clone().map_err(Error::Run)?);
        let mut command = tokio::process::Command::from(command);
        match command.stdin(Stdio::null()).kill_on_drop(true).output().await {
            Ok(output) if output.status.success() => {
                return parse_counters(&String::from_utf8_lossy(&output.stdout)).map_err(Error::Counters);
            }
            Ok(output) => {
                let stderr = String::from_utf8_lossy(&output.stderr).trim().to_owned();
                return Err(Error::Refused { operation, stderr });
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::Run(error)),
        }
    }
    Err(Error::NoProgram)
}

/// The skeleton as text for `nft -f`; `egress` adds the table at the device's egress.
///
/// `flush table` removes rules and keeps chains, sets, elements and counters, so the text can be loaded again at any time.
#[must_use]
pub fn ruleset(skeleton: &Skeleton, egress: bool) -> String {
    let Skeleton { device, tunnel_port, resolvers, dns_ports } = skeleton;
    let (lo, hi) = (dns_ports.start(), dns_ports.end());
    let resolver_rules = resolvers.iter().fold(String::new(), |mut text, resolver| {
        let family = if resolver.is_ipv4() { "ip" } else { "ip6" };
        write!(
            text,
            "\n        {family} daddr {resolver} meta l4proto {{ tcp, udp }} th dport 53 goto resolver"
        )
        .expect("a string");
        text
    });
    // What passes in both directions besides the tunnel.
    let control = format!(
        "        # Neighbour discovery.
        icmpv6 type 133-137 ip6 hoplimit 255 accept
        # ICMP errors that quote a datagram of the tunnel, which came from and went to its port: without IPv4 options, as they are sent.
        icmp type {{ destination-unreachable, time-exceeded, parameter-problem }} @th,64,8 0x45 @th,136,8 17 @th,224,16 {tunnel_port} @th,240,16 {tunnel_port} accept
        icmpv6 type {{ destination-unreachable, packet-too-big, time-exceeded, parameter-problem }} @th,112,8 17 @th,384,16 {tunnel_port} @th,400,16 {tunnel_port} accept"
    );
    // Both tables have the same outbound rules; only counter and hook differ.
    let outbound = |counter: &str, base: &str| {
        format!(
            "
    set {SET4} {{ type ipv4_addr; }}
    set {SET6} {{ type ipv6_addr; }}
    counter {counter} {{ }}
    counter dns_escaped {{ }}

    # Everything that leaves for a protected address.
    chain outbound {{
        # Datagrams of the tunnel: marked by the agent, of one of the protocol's four message types.
        meta mark {MARK:#x} meta l4proto udp udp sport {tunnel_port} @th,64,32 {{ 0x01000000, 0x02000000, 0x03000000, 0x04000000 }} accept
{control}
        counter name {counter} drop
    }}

    # Everything that leaves for port 53 of a resolver.
    chain resolver {{
        meta mark {MARK:#x} th sport {lo}-{hi} accept
        counter name dns_escaped drop
    }}

{base}
        ip daddr @{SET4} goto outbound
        ip6 daddr @{SET6} goto outbound{resolver_rules}
    }}"
        )
    };
    let postrouting = format!(
        "    chain postrouting {{
        type filter hook postrouting priority 300; policy accept;
        oifname {{ \"lo\", \"{}\" }} accept",
        tun::NAME
    );
    let mut text = format!(
        "add table inet {TABLE}
flush table inet {TABLE}
table inet {TABLE} {{{}

    counter inbound {{ }}

    # Everything that comes from a protected address.
    chain inbound {{
        # A datagram of the tunnel is never a fragment.
        ip frag-off & 0x3fff != 0 counter name inbound drop
        exthdr frag exists counter name inbound drop
        meta l4proto udp udp sport {tunnel_port} udp dport {tunnel_port} accept
{control}
        counter name inbound drop
    }}

    chain prerouting {{
        type filter hook prerouting priority -450; policy accept;
        iifname {{ \"lo\", \"{}\" }} accept
        ip saddr @{SET4} goto inbound
        ip6 saddr @{SET6} goto inbound
    }}
}}
",
        outbound("outbound_postrouting", &postrouting),
        tun::NAME
    );
    if egress {
        let base = format!(
            "    chain egress {{
        type filter hook egress device \"{device}\" priority 0; policy accept;"
        );
        write!(
            text,
            "
add table netdev {TABLE}
flush table netdev {TABLE}
table netdev {TABLE} {{{}
}}
",
            outbound("outbound_egress", &base)
        )
        .expect("a string");
    }
    text
}

/// Runs nft in `netns` with `input` on its standard input; returns its standard output.
fn nft(netns: &OwnedFd, operation: &'static str, args: &[&str], input: &str) -> Result<String, Error> {
    let mut failure = Error::NoProgram;
    for program in PROGRAMS {
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // nft's messages are read by people and by tests.
        command.env("LC_ALL", "C");
        in_network_namespace(&mut command, netns.try_clone().map_err(Error::Run)?);
        match command.spawn() {
            Ok(mut child) => {
                // A program that ends before it has read everything says why on its standard error.
                let _ = child.stdin.take().expect("piped").write_all(input.as_bytes());
                let output = child.wait_with_output().map_err(Error::Run)?;
                if output.status.success() {
                    return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
                }
                let stderr = String::from_utf8_lossy(&output.stderr).trim().to_owned();
                return Err(Error::Refused { operation, stderr });
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                failure = Error::Run(error);
                break;
            }
        }
    }
    Err(failure)
}

fn parse_counters(json: &str) -> Result<BTreeMap<String, Count>, serde_json::Error> {
    #[derive(Deserialize)]
    struct Output {
        nftables: Vec<Object>,
    }
    #[derive(Deserialize)]
    struct Object {
        counter: Option<Counter>,
    }
    #[derive(Deserialize)]
    struct Counter {
        table: String,
        name: String,
        packets: u64,
        bytes: u64,
    }
    let mut counts = BTreeMap::<String, Count>::new();
    let output: Output = serde_json::from_str(json)?;
    for counter in output.nftables.into_iter().filter_map(|o| o.counter).filter(|c| c.table == TABLE) {
        // `dns_escaped` stands in both tables; a packet ends in one of them.
        let count = counts.entry(counter.name).or_default();
        count.packets += counter.packets;
        count.bytes += counter.bytes;
    }
    Ok(counts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn skeleton() -> Skeleton {
        Skeleton {
            device: "eth0".try_into().unwrap(),
            tunnel_port: 51820,
            resolvers: vec!["10.96.0.10".parse().unwrap(), "fd96::10".parse().unwrap()],
            dns_ports: 61000..=62023,
        }
    }

    #[test]
    fn every_drop_has_a_named_counter() {
        let text = ruleset(&skeleton(), true);
        for line in text.lines().filter(|line| line.ends_with("drop")) {
            assert!(line.contains("counter name "), "{line}");
        }
    }

    #[test]
    fn a_reload_never_deletes_a_table_or_a_set() {
        let text = ruleset(&skeleton(), true);
        assert!(!text.contains("delete") && !text.contains("destroy") && !text.contains("flush set"));
    }

    #[test]
    fn every_resolver_is_guarded_in_both_tables() {
        let text = ruleset(&skeleton(), true);
        for rule in ["ip daddr 10.96.0.10 meta", "ip6 daddr fd96::10 meta"] {
            assert_eq!(text.matches(rule).count(), 2, "{rule}");
        }
    }

    #[test]
    fn without_egress_there_is_one_table() {
        assert!(!ruleset(&skeleton(), false).contains("netdev"));
    }

    #[test]
    fn a_device_name_that_could_end_its_quotes_is_refused() {
        for name in ["", "a\"b", "a b", "a;b", "a\nb", "a{b", "sixteen-letters!"] {
            assert!(DeviceName::try_from(name).is_err(), "{name:?}");
        }
        for name in ["eth0", "eth0.5", "net1-a", "veth_b@x"] {
            assert!(DeviceName::try_from(name).is_ok(), "{name:?}");
        }
    }

    #[test]
    fn counters_of_other_tables_are_left_out_and_equal_names_add_up() {
        let counter = |table: &str, name: &str, packets: u64| {
            format!(
                r#"{{"counter":{{"family":"inet","name":"{name}","table":"{table}","handle":1,"packets":{packets},"bytes":60}}}}"#
            )
        };
        let json = format!(
            r#"{{"nftables":[{{"metainfo":{{"version":"1.0.6","json_schema_version":1}}}},{},{},{}]}}"#,
            counter("tencrypt", "dns_escaped", 1),
            counter("tencrypt", "dns_escaped", 2),
            counter("other", "inbound", 9)
        );
        let counts = parse_counters(&json).unwrap();
        assert_eq!(counts.len(), 1);
        assert_eq!(counts["dns_escaped"], Count { packets: 3, bytes: 120 });
        assert!(parse_counters("").is_err());
    }
}
