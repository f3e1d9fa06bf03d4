//! The guard's skeleton: nft tables of our own in the pod's namespace, which outlive agent and launcher.
//!
//! 1. [`ruleset()`] writes two tables as plain nft text, one for `inet` hooks and one for the devices' egress: the rules of
//!    strict mode (`strict`) say what may pass, those of permissive and audit mode (`counting`) count what may not
//! 2. [`Door`] is the only way to load it, and the only one to open or remove it
//! 3. the agent fills the sets of the project's addresses ([`crate::agent::guard`]); the launcher those of [`Facts`]. Loading
//!    again replaces rules and keeps sets, elements, counters
//! 4. [`would_drops`] reads what permissive and audit mode let pass, [`listing`] shows whether rules are as they were
//!
//! Three states: `filling` passes everything but the addresses filled so far; `closed` passes nothing but the agent's own
//! datagrams and queries, the answers to them, neighbour discovery and ARP; `open` judges every packet. Every refusal has a
//! named counter. In permissive and audit mode an open guard lets everything pass, counts what strict mode would refuse
//! towards the project, and records those flows for ten minutes.
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
use siphasher::sip::SipHasher13;

pub use self::counting::Reason;
pub use self::door::{Door, OrderedStop, Ready};
pub use self::facts::{Exemption, Facts, NotAnExemption};
pub use self::ruleset::{COUNTERS, DNS_UNCAPTURED, counts_drops, ruleset};
use crate::agent::guard::{SET4, SET6, TABLE};
use crate::proto::ladder::Mode;
use crate::proto::ranges::Ranges;
use crate::sys::exec::in_network_namespace;

mod counting;
mod door;
mod facts;
mod ruleset;
mod strict;

/// Where the program is looked for when PATH does not have it: sudo and service managers often leave these out.
const PROGRAMS: [&str; 3] = ["nft", "/usr/sbin/nft", "/sbin/nft"];

/// Guard that keeps the pod closed for the moment in which tables of another shape are replaced.
const SHIELD: &str = "tencrypt-shield";

/// What the guard of one pod depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skeleton {
    /// What becomes of what may not pass.
    pub mode: Mode,
    /// How far the pod is open. Changed by [`Door`] alone.
    pub(super) state: State,
    /// Every device of the pod but `lo` and `tenc0`; frames of packet sockets on others are not guarded.
    pub devices: Vec<DeviceName>,
    /// UDP port of the tunnel, ours and every peer's.
    pub tunnel_port: u16,
    /// Resolvers whose port 53 is captured.
    pub resolvers: Vec<IpAddr>,
    /// LO-HI: the ports of the agent's own sockets towards the resolvers.
    pub dns_ports: RangeInclusive<u16>,
    /// The cluster's pod and service ranges; empty: an address that nobody names passes.
    pub ranges: Ranges,
    /// What the operator vouches for.
    pub exempt: Vec<Exemption>,
    /// Link-local addresses, groups and broadcast pass.
    pub allow_link_scope: bool,
    /// A DHCP client of the pod is let through.
    pub allow_dhcp: bool,
    /// What is known of the world outside the project.
    pub facts: Facts,
}

impl Skeleton {
    /// A closed pod of which nothing is known but the tunnel's port.
    #[must_use]
    pub fn closed(mode: Mode, tunnel_port: u16, devices: Vec<DeviceName>) -> Self {
        Self {
            mode,
            state: State::Closed,
            devices,
            tunnel_port,
            resolvers: Vec::new(),
            dns_ports: 1..=1,
            ranges: Ranges::default(),
            exempt: Vec::new(),
            allow_link_scope: false,
            allow_dhcp: false,
            facts: Facts::default(),
        }
    }

    /// How far the pod is open: `filling`, `closed` or `open`.
    #[must_use]
    pub const fn state(&self) -> &'static str {
        self.state.word()
    }

    /// Tells this skeleton from others, also those of other builds.
    #[must_use]
    pub fn digest(&self) -> u64 {
        SipHasher13::new().hash(ruleset(self, true).as_bytes())
    }
}

/// How far the pod is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Everything passes but what is protected so far; only where none of our tables was before.
    Filling,
    /// Nothing passes but what the agent needs to protect the pod.
    Closed,
    /// Every packet is judged.
    Open,
}

impl State {
    /// The chain that a hook ends in: `in`, `out` or `frame`.
    fn chain(self, direction: &str) -> String {
        format!("{}_{direction}", self.word())
    }

    const fn word(self) -> &'static str {
        match self {
            Self::Filling => "filling",
            Self::Closed => "closed",
            Self::Open => "open",
        }
    }
}

/// A device name that can stand in a ruleset between quotes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
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
    #[error("cannot read nft's list of {what}")]
    Output {
        /// What was listed.
        what: &'static str,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// A device name that is no plain word.
    #[error("device name {0:?} has characters that the guard cannot hold")]
    Device(String),
}

impl Error {
    /// Whether the table is not there.
    fn is_missing(&self) -> bool {
        matches!(self, Self::Refused { stderr, .. } if stderr.contains("No such file or directory"))
    }
}

/// How much of the skeleton the kernel took.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Loaded {
    /// All that was asked for.
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

/// A flow that strict mode would drop, as its packets look at the hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WouldDrop {
    /// Why.
    pub reason: Reason,
    /// Who sent.
    pub source: IpAddr,
    /// To whom.
    pub destination: IpAddr,
    /// IP protocol number.
    pub protocol: u8,
    /// Source and destination port, where the packet showed any: later fragments do not.
    pub ports: Option<(u16, u16)>,
    /// Its packets.
    pub packets: u64,
    /// Since the last of them, in seconds.
    pub idle_s: u64,
}

/// What nft says where the kernel, or nft itself, has no egress hook. Any other refusal is an error: the guard is never
/// weaker by accident.
const NO_EGRESS: [&str; 3] = ["Operation not supported", "unknown chain hook", "Protocol not supported"];

/// Loads the skeleton into the network namespace `netns`, or replaces the rules of the one that is there.
///
/// # Errors
/// See [`Error`]; after one, what was there before is unchanged, or the pod is closed.
fn load(netns: &OwnedFd, skeleton: &Skeleton) -> Result<Loaded, Error> {
    match load_over(netns, skeleton) {
        // What has our name cannot be loaded over: it is dormant, or has sets or chains of another kind.
        Err(Error::Refused { .. }) => replace(netns, skeleton),
        loaded => loaded,
    }
}

/// Replaces tables of another shape. Old rules must not run on sets that are being deleted: a guard of its own, which drops
/// everything, stands before them meanwhile. Addresses in the sets are kept.
fn replace(netns: &OwnedFd, skeleton: &Skeleton) -> Result<Loaded, Error> {
    let kept = elements(netns, "inet") + &elements(netns, "netdev");
    nft(netns, "shield", &["-f", "-"], &shield())?;
    remove_tables(netns, &[TABLE])?;
    let loaded = load_over(netns, skeleton)?;
    // Addresses that a set of the new shape cannot take are filled in by the agent.
    if let Err(error) = nft(netns, "refill", &["-f", "-"], &kept) {
        tracing::debug!(%error, "addresses of the former guard were not kept");
    }
    remove_tables(netns, &[SHIELD])?;
    Ok(loaded)
}

/// Drops everything, in front of every other table of ours.
fn shield() -> String {
    format!(
        "table inet {SHIELD} {{
    chain postrouting {{
        type filter hook postrouting priority 299; policy drop;
        oifname \"lo\" accept
    }}
    chain prerouting {{
        type filter hook prerouting priority -451; policy drop;
        iifname \"lo\" accept
    }}
}}
"
    )
}

/// What puts the addresses that our sets in this family hold there again.
fn elements(netns: &OwnedFd, family: &str) -> String {
    [SET4, SET6].into_iter().fold(String::new(), |mut text, set| {
        let listed =
            nft(netns, "list a set of", &["list", "set", family, TABLE, set], "").unwrap_or_default();
        let held = listed.split_once("elements = {").and_then(|(_, rest)| rest.split_once('}'));
        for address in held.iter().flat_map(|(held, _)| held.split(',')) {
            if let Ok(address) = address.trim().parse::<IpAddr>()
                && address.is_ipv4() == (set == SET4)
            {
                writeln!(text, "add element {family} {TABLE} {set} {{ {address} }}").expect("a string");
            }
        }
        text
    })
}

fn load_over(netns: &OwnedFd, skeleton: &Skeleton) -> Result<Loaded, Error> {
    let load = |egress| nft(netns, "load", &["-f", "-"], &ruleset(skeleton, egress));
    match load(true) {
        Ok(_) => Ok(Loaded::Full),
        Err(Error::Refused { stderr, .. }) if NO_EGRESS.iter().any(|words| stderr.contains(words)) => {
            load(false)?;
            Ok(Loaded::WithoutEgress(stderr))
        }
        Err(error) => Err(error),
    }
}

/// How the guard is in `netns`, before this launcher changed anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    /// No table of ours.
    Nothing,
    /// Closed, half made, or not understood.
    Closed,
    /// A launcher opened it, for an agent that was ready.
    Open {
        /// Its rules are those of strict mode.
        strict: bool,
    },
}

fn find(netns: &OwnedFd) -> Result<Found, Error> {
    let tables = nft(netns, "list the tables of", &["list", "tables"], "")?;
    let ours = |name| tables.lines().any(|line| line.split_whitespace().last() == Some(name));
    if !ours(TABLE) {
        return Ok(if ours(SHIELD) { Found::Closed } else { Found::Nothing });
    }
    let hook = nft(netns, "list a chain of", &["list", "chain", "inet", TABLE, "postrouting"], "");
    let hook = hook.unwrap_or_default();
    let open = hook.contains(&format!("goto {}", State::Open.chain("out")));
    let strict = hook.contains("policy drop");
    Ok(if open && !ours(SHIELD) { Found::Open { strict } } else { Found::Closed })
}

/// Removes tables of both families. Deleting what is not there fails, adding what is there does not.
fn remove_tables(netns: &OwnedFd, names: &[&str]) -> Result<(), Error> {
    let removal = |families: &[&str]| -> String {
        let tables = families.iter().flat_map(|family| names.iter().map(move |name| (family, name)));
        tables.fold(String::new(), |mut text, (family, name)| {
            writeln!(text, "add table {family} {name}\ndelete table {family} {name}").expect("a string");
            text
        })
    };
    match nft(netns, "remove", &["-f", "-"], &removal(&["inet", "netdev"])) {
        // A kernel without the netdev family.
        Err(Error::Refused { .. }) => nft(netns, "remove", &["-f", "-"], &removal(&["inet"])).map(drop),
        other => other.map(drop),
    }
}

/// The named counters of both tables; of none, where there is none.
///
/// # Errors
/// See [`Error`].
pub fn counters(netns: &OwnedFd) -> Result<BTreeMap<String, Count>, Error> {
    let list = |family| nft(netns, COUNTERS_OF, &counters_of(family), "");
    parse_counters(list("inet"), list("netdev"))
}

/// As [`counters`], without holding up the thread; dropped before it returns, it ends the program. To be awaited in the
/// thread that starts all programs: nobody else's descriptors are inherited.
///
/// # Errors
/// See [`Error`].
pub async fn counters_beside(netns: &OwnedFd) -> Result<BTreeMap<String, Count>, Error> {
    let (inet, netdev) = (counters_of("inet"), counters_of("netdev"));
    let list = |args| nft_beside(netns, COUNTERS_OF, args);
    let (inet, netdev) = tokio::join!(list(&inet), list(&netdev));
    parse_counters(inet, netdev)
}

const COUNTERS_OF: &str = "list the counters of";

/// Our own table's alone: the pod may have any number of others.
fn counters_of(family: &str) -> [&str; 6] {
    ["-j", "list", "counters", "table", family, TABLE]
}

/// What permissive and audit mode let pass in the last ten minutes though strict would not, sorted.
///
/// # Errors
/// See [`Error`].
pub fn would_drops(netns: &OwnedFd) -> Result<Vec<WouldDrop>, Error> {
    let list = |family| nft(netns, RECORDS_OF, &records_of(family), "");
    parse_records(list("inet"), list("netdev"))
}

/// As [`would_drops`], without holding up the thread: see [`counters_beside`].
///
/// # Errors
/// See [`Error`].
pub async fn would_drops_beside(netns: &OwnedFd) -> Result<Vec<WouldDrop>, Error> {
    let (inet, netdev) = (records_of("inet"), records_of("netdev"));
    let list = |args| nft_beside(netns, RECORDS_OF, args);
    let (inet, netdev) = tokio::join!(list(&inet), list(&netdev));
    parse_records(inet, netdev)
}

const RECORDS_OF: &str = "list the records of";

/// nft 1.0.6 finds one set per run: the whole table is listed.
fn records_of(family: &str) -> [&str; 6] {
    ["-n", "-j", "list", "table", family, TABLE]
}

/// Both tables as nft prints them, without elements of sets and values of counters: equal as long as nobody changed them.
/// A table that is not there adds nothing.
///
/// # Errors
/// See [`Error`].
pub fn listing(netns: &OwnedFd) -> Result<String, Error> {
    let mut text = String::new();
    for family in ["inet", "netdev"] {
        match nft(netns, "list", &["-s", "-t", "list", "table", family, TABLE], "") {
            Ok(table) => text += &table,
            Err(error) if error.is_missing() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(text)
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

async fn nft_beside(netns: &OwnedFd, operation: &'static str, args: &[&str]) -> Result<String, Error> {
    for program in PROGRAMS {
        let mut command = Command::new(program);
        command.args(args).env("LC_ALL", "C");
        in_network_namespace(&mut command, netns.try_clone().map_err(Error::Run)?);
        let mut command = tokio::process::Command::from(command);
        match command.stdin(Stdio::null()).kill_on_drop(true).output().await {
            Ok(output) if output.status.success() => {
                return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
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

/// The counters of both tables; without egress, or without the netdev family, there is one table.
fn parse_counters(
    inet: Result<String, Error>,
    netdev: Result<String, Error>,
) -> Result<BTreeMap<String, Count>, Error> {
    let mut counts = BTreeMap::new();
    for (listed, is_optional) in [(inet, false), (netdev, true)] {
        match listed {
            Ok(json) => add_counters(&json, &mut counts)
                .map_err(|source| Error::Output { what: "counters", source })?,
            Err(Error::Refused { .. }) if is_optional => {}
            Err(error) if error.is_missing() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(counts)
}

fn add_counters(json: &str, counts: &mut BTreeMap<String, Count>) -> Result<(), serde_json::Error> {
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
    let output: Output = serde_json::from_str(json)?;
    for counter in output.nftables.into_iter().filter_map(|o| o.counter).filter(|c| c.table == TABLE) {
        // `dns_escaped` stands in both tables; a packet ends in one of them.
        let count = counts.entry(counter.name).or_default();
        count.packets += counter.packets;
        count.bytes += counter.bytes;
    }
    Ok(())
}

/// The records of both tables; one without egress, or without the netdev family, has one table.
fn parse_records(
    inet: Result<String, Error>,
    netdev: Result<String, Error>,
) -> Result<Vec<WouldDrop>, Error> {
    let read = |json: String| parse_table(&json).map_err(|source| Error::Output { what: "records", source });
    let mut records = read(inet?)?;
    match netdev {
        Ok(json) => records.extend(read(json)?),
        Err(Error::Refused { .. }) => {}
        Err(error) => return Err(error),
    }
    records.sort_unstable();
    Ok(records)
}

fn parse_table(json: &str) -> Result<Vec<WouldDrop>, serde_json::Error> {
    #[derive(Deserialize)]
    struct Output {
        nftables: Vec<Object>,
    }
    // Sets of other kinds have elements of other forms.
    #[derive(Deserialize)]
    struct Object {
        set: Option<Set>,
    }
    #[derive(Deserialize)]
    struct Set {
        name: String,
        elem: Option<serde_json::Value>,
    }
    // Under `elem` stands an element with a time.
    #[derive(Deserialize)]
    struct Element {
        elem: Timed,
    }
    #[derive(Deserialize)]
    struct Timed {
        val: Value,
        expires: u64,
        counter: Counter,
    }
    #[derive(Deserialize)]
    struct Value {
        concat: Key,
    }
    #[derive(Deserialize)]
    struct Counter {
        packets: u64,
    }
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Key {
        Ports(IpAddr, IpAddr, u8, u16, u16),
        Portless(IpAddr, IpAddr, u8),
    }
    let output: Output = serde_json::from_str(json)?;
    let mut records = Vec::new();
    for set in output.nftables.into_iter().filter_map(|object| object.set) {
        let Some((reason, elements)) = Reason::of_set(&set.name).zip(set.elem) else { continue };
        for Element { elem } in serde_json::from_value::<Vec<Element>>(elements)? {
            let (source, destination, protocol, ports) = match elem.val.concat {
                Key::Ports(source, destination, protocol, from, to) => {
                    (source, destination, protocol, Some((from, to)))
                }
                Key::Portless(source, destination, protocol) => (source, destination, protocol, None),
            };
            let idle_s = counting::RECORDS_TIMEOUT_S.saturating_sub(elem.expires);
            let packets = elem.counter.packets;
            records.push(WouldDrop { reason, source, destination, protocol, ports, packets, idle_s });
        }
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn counters_of_other_tables_are_left_out_and_equal_names_of_both_add_up() {
        let counter = |table: &str, name: &str, packets: u64| {
            format!(
                r#"{{"counter":{{"family":"inet","name":"{name}","table":"{table}","handle":1,"packets":{packets},"bytes":60}}}}"#
            )
        };
        let list = |packets| {
            format!(
                r#"{{"nftables":[{{"metainfo":{{"version":"1.0.6","json_schema_version":1}}}},{},{}]}}"#,
                counter("tencrypt", "dns_escaped", packets),
                counter("other", "inbound", 9)
            )
        };
        let counts = parse_counters(Ok(list(1)), Ok(list(2))).unwrap();
        assert_eq!(counts.len(), 1);
        assert_eq!(counts["dns_escaped"], Count { packets: 3, bytes: 120 });
        assert!(parse_counters(Ok(list(1)), Ok(String::new())).is_err());
    }

    #[test]
    fn counters_of_a_table_that_is_not_there_are_none_and_another_refusal_is_told() {
        let refused = |words: &str| Err(Error::Refused { operation: COUNTERS_OF, stderr: words.to_owned() });
        let missing = "Error: No such file or directory";
        assert!(parse_counters(refused(missing), refused(missing)).unwrap().is_empty());
        assert!(parse_counters(refused(missing), refused("Protocol not supported")).unwrap().is_empty());
        assert!(parse_counters(refused("Operation not permitted"), refused(missing)).is_err());
    }

    #[test]
    fn records_are_read_from_both_tables_and_unknown_forms_are_errors() {
        let list = |set: &str, elements: &str| {
            format!(
                r#"{{"nftables":[{{"metainfo":{{"version":"1.0.6","json_schema_version":1}}}},{{"set":{{"family":"inet","name":"protected4","table":"tencrypt","handle":2,"elem":["10.0.0.2"]}}}},{{"set":{{"family":"inet","name":"{set}","table":"tencrypt","handle":5,"flags":["timeout"],"timeout":600{elements},"stmt":[{{"counter":null}}]}}}}]}}"#
            )
        };
        let element = |key: &str, expires: u64, packets: u64| {
            format!(
                r#"{{"elem":{{"val":{{"concat":[{key}]}},"expires":{expires},"counter":{{"packets":{packets},"bytes":60}}}}}}"#
            )
        };
        let elements = |elements: &[String]| format!(r#","elem":[{}]"#, elements.join(","));
        assert_eq!(parse_table(&list("would_drop_inbound4", "")).unwrap(), []);
        let udp = element(r#""10.0.0.1","10.0.0.2",17,36011,99"#, 599, 3);
        let inet = list("would_drop_outbound4", &elements(&[udp]));
        let icmp = element(r#""fd00::1","fd00::2",58"#, 20, 1);
        let netdev = list("would_drop_egress6_portless", &elements(&[icmp]));
        let outbound = WouldDrop {
            reason: Reason::Outbound,
            source: "10.0.0.1".parse().unwrap(),
            destination: "10.0.0.2".parse().unwrap(),
            protocol: 17,
            ports: Some((36011, 99)),
            packets: 3,
            idle_s: 1,
        };
        let egress = WouldDrop {
            reason: Reason::Egress,
            source: "fd00::1".parse().unwrap(),
            destination: "fd00::2".parse().unwrap(),
            protocol: 58,
            ports: None,
            packets: 1,
            idle_s: 580,
        };
        assert_eq!(parse_records(Ok(inet.clone()), Ok(netdev)).unwrap(), [outbound, egress]);
        let refused = || Error::Refused { operation: RECORDS_OF, stderr: String::new() };
        assert_eq!(parse_records(Ok(inet.clone()), Err(refused())).unwrap(), [outbound], "no egress hooks");
        assert!(parse_records(Err(refused()), Ok(inet)).is_err());
        let short = elements(&[element(r#""10.0.0.1""#, 1, 1)]);
        assert!(parse_table(&list("would_drop_inbound4", &short)).is_err());
    }
}
