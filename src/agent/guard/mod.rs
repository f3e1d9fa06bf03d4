//! Elements of the guard's sets: which addresses may be spoken to through the tunnel only, and which in clear.
//!
//! The launcher loads the guard's tables, chains and sets; this file alone fills the sets of the project's addresses, over
//! nfnetlink, before the address is routed and before a DNS answer that names it is released.
//!
//! | set | what it holds |
//! |---|---|
//! | `protected` (both tables) | addresses that are routed into `tenc0`, former ones included |
//! | `peers` | those that sealed datagrams may go to |
//! | `former` | those that left the directory: named in the reason of a drop |
//! | `released` | addresses within the ranges that are vouched for as none of the project's; ten minutes |
//! | `asked`, `fresh` | addresses that the rules met and nobody named: read here, filled by the rules |
//!
//! 1. tables (inet, and netdev where the kernel has egress hooks) change in one transaction (`message`), or none does
//! 2. `check` reads tables, rules and elements back, for the watch; `refill` makes the sets right again
//! 3. `asks` hears that the rules met an unknown address
//!
//! Source: linux/netfilter/nf_tables.h.

mod asks;
mod message;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::hash::Hasher as _;
use std::io;
use std::net::IpAddr;

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLMSG_DONE, NLMSG_ERROR};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use nix::errno::Errno;
use siphasher::sip::SipHasher13;

use message::{
    ATTR_CHAIN_HOOK, ATTR_CHAIN_NAME, ATTR_CHAIN_POLICY, ATTR_CHAIN_TABLE, ATTR_LIST_ELEMENTS, ATTR_LIST_SET,
    ATTR_LIST_TABLE, ATTR_RULE_CHAIN, ATTR_RULE_EXPRESSIONS, ATTR_RULE_TABLE, ATTR_TABLE_FLAGS,
    ATTR_TABLE_NAME, Batch, Change, GET_CHAIN, GET_ELEMENTS, GET_RULE, GET_TABLE, NEW_TABLE, answers,
    attributes, element, element_key, request,
};

pub(super) use asks::Asks;

use super::watch::Tampering;
use crate::wire::netlink::messages;

/// Name of both tables.
pub const TABLE: &str = "tencrypt";
/// Name of the sets of protected IPv4 addresses.
pub const SET4: &str = "protected4";
/// Name of the sets of protected IPv6 addresses.
pub const SET6: &str = "protected6";
/// Group of nfnetlink_log that the rules tell of unknown addresses by.
pub const LOG_GROUP: u16 = 32_412;
/// What the names of the base chains at a device's egress begin with; [`chain_suffix`] follows.
pub const EGRESS_CHAIN: &str = "egress_";

/// The chains of the inet table.
#[rustfmt::skip]
pub const CHAINS: &[&str] = &[
    "postrouting", "prerouting", "pass", "agents", "agents4", "agents6", "tunnel", "resolver_in",
    "control_out6", "control_in6", "closed_out", "closed_in", "open_out", "open_in", "filling_out",
    "filling_in", "ip_options", "link_scope", "to_all", "node_out", "from_tunnel", "protected_out4",
    "protected_in4", "protected_out6", "protected_in6", "out4", "special_out4", "scope_out4",
    "group_out4", "range_out4", "in4", "scope_in4", "range_in4", "flow_in4", "out6", "special_out6",
    "scope_out6", "link_out6", "range_out6", "in6", "scope_in6", "link_in6", "range_in6", "flow_in6",
    "outbound", "resolver", "dns", "inbound", "record_outbound", "record_inbound", "record_dns",
];

/// The chains of the netdev table, but for the hooks.
#[rustfmt::skip]
pub const NETDEV_CHAINS: &[&str] = &[
    "arp_frame", "closed_frame", "closed_tunnel4", "closed_tunnel6", "raw4", "raw6", "protected4",
    "protected6", "judged", "open_frame", "filling_frame", "outbound", "resolver", "dns",
    "record_egress", "record_dns",
];

/// Sets that the launcher fills: another's change of them is tampering with the rules.
#[rustfmt::skip]
const LAUNCHERS_SETS: [&str; 14] = [
    "resolvers4", "resolvers6", "nodes4", "nodes6", "externals4", "externals6", "special4", "special6",
    "gateways4", "gateways6", "broadcasts4", "node_ports", "resolver_endpoints4", "resolver_endpoints6",
];

/// What follows [`EGRESS_CHAIN`] for a device of this name: chain names have no other characters than these.
#[must_use]
pub fn chain_suffix(device: &str) -> String {
    let escape = |byte: u8| {
        if byte.is_ascii_alphanumeric() { char::from(byte).to_string() } else { format!("_{byte:02x}") }
    };
    device.bytes().map(escape).collect()
}

/// Room for the largest transaction in the socket's send buffer.
const SEND_BUFFER: usize = 8 << 20;

/// Family of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Hooks of both IP families.
    Inet = 1,
    /// Hooks of one device.
    Netdev = 5,
}

/// What the addresses in a set are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Routed into `tenc0`.
    Protected,
    /// Sealed datagrams may go there.
    Peers,
    /// Left the directory.
    Former,
    /// Vouched for as none of the project's.
    Released,
    /// Met by the rules on the way out.
    Asked,
    /// Met by the rules on the way in.
    Fresh,
}

impl Kind {
    /// Tables that have sets of this kind.
    fn families(self, egress: bool) -> &'static [Family] {
        match self {
            Self::Protected if egress => &[Family::Inet, Family::Netdev],
            _ => &[Family::Inet],
        }
    }

    const fn word(self) -> &'static str {
        match self {
            Self::Protected => "protected",
            Self::Peers => "peers",
            Self::Former => "former",
            Self::Released => "released",
            Self::Asked => "asked",
            Self::Fresh => "fresh",
        }
    }
}

/// A set, for error messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Set {
    family: Family,
    kind: Kind,
    ipv6: bool,
}

impl fmt::Display for Set {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = match self.family {
            Family::Inet => "inet",
            Family::Netdev => "netdev",
        };
        write!(f, "set {} of table {family} {TABLE}", self.name())
    }
}

impl Set {
    fn name(self) -> String {
        format!("{}{}", self.kind.word(), if self.ipv6 { 6 } else { 4 })
    }
}

/// What the sets of the project's addresses are to hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) protected: BTreeSet<IpAddr>,
    pub(crate) peers: BTreeSet<IpAddr>,
    pub(crate) former: BTreeSet<IpAddr>,
}

impl Wanted {
    fn sets(&self) -> [(Kind, &BTreeSet<IpAddr>); 3] {
        [(Kind::Protected, &self.protected), (Kind::Peers, &self.peers), (Kind::Former, &self.former)]
    }
}

/// Why the sets are not as asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The capability is missing.
    #[error("changing the guard needs CAP_NET_ADMIN: run as root")]
    Permission,
    /// The skeleton was never loaded, or somebody removed it.
    #[error("table inet {TABLE} is missing: the guard's skeleton was not loaded or was removed")]
    NoTable,
    /// The kernel refused to change a set.
    #[error("cannot {operation} the {set}")]
    Set {
        /// What was being done.
        operation: &'static str,
        /// To which set.
        set: Set,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel refused the transaction as a whole.
    #[error("cannot commit a change of the guard")]
    Commit(#[source] io::Error),
    /// The netlink socket itself failed.
    #[error("nfnetlink socket failed")]
    Socket(#[source] io::Error),
}

/// What a look at the guard's tables shows.
#[derive(Debug, Default)]
struct Fingerprint {
    digest: u64,
    /// Whether there is a chain that is not one of ours.
    foreign: bool,
    hooks: BTreeSet<String>,
}

/// The handle to the sets of one pod.
#[derive(Debug)]
pub struct Guard {
    socket: Socket,
    sequence: u32,
    egress: bool,
    /// Digest of the skeleton that was loaded.
    skeleton: u64,
    /// Of tables, chains, rules and the launcher's sets as they were loaded.
    fingerprint: u64,
    /// Chains at the egress of a device, as they were loaded.
    hooks: BTreeSet<String>,
}

impl Guard {
    /// Opens the socket in the calling thread's network namespace and looks which of the two tables of `skeleton` are there.
    ///
    /// # Errors
    /// [`Error::NoTable`] when the skeleton is missing.
    pub fn open(skeleton: u64) -> Result<Self, Error> {
        let mut socket = Socket::new(NETLINK_NETFILTER).map_err(Error::Socket)?;
        socket.bind_auto().map_err(Error::Socket)?;
        socket.connect(&SocketAddr::new(0, 0)).map_err(Error::Socket)?;
        socket.set_cap_ack(true).map_err(Error::Socket)?;
        // A transaction that does not fit is refused by the kernel, whole; the system's default holds 5,000 addresses.
        let _ = nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::SndBufForce, &SEND_BUFFER);
        let mut guard =
            Self { socket, sequence: 0, egress: false, skeleton, fingerprint: 0, hooks: BTreeSet::new() };
        guard.take_for_right()?;
        Ok(guard)
    }

    /// The launcher loaded `skeleton`. One that was loaded before must look as it did then: a change that came between the
    /// load and this call is none of it.
    ///
    /// # Errors
    /// [`Error::NoTable`] when it is missing.
    pub fn accept(&mut self, skeleton: u64) -> Result<(), Error> {
        if self.skeleton == skeleton {
            return if self.has_table(Family::Inet)? { Ok(()) } else { Err(Error::NoTable) };
        }
        self.skeleton = skeleton;
        self.take_for_right()
    }

    fn take_for_right(&mut self) -> Result<(), Error> {
        if !self.has_table(Family::Inet)? {
            return Err(Error::NoTable);
        }
        self.egress = self.has_table(Family::Netdev)?;
        let found = self.take_fingerprint()?;
        (self.fingerprint, self.hooks) = (found.digest, found.hooks);
        Ok(())
    }

    /// The port number that the kernel tells others our changes by.
    #[must_use]
    pub fn port(&self) -> u32 {
        let mut address = SocketAddr::new(0, 0);
        // A port of 0 is nobody's: our own changes then count as another's, which costs a check.
        let _ = self.socket.get_address(&mut address);
        address.port_number()
    }

    /// What of the guard is not as loaded, or does not hold exactly `wanted`.
    ///
    /// # Errors
    /// See [`Error`].
    pub(crate) fn check(&mut self, wanted: &Wanted) -> Result<Option<Tampering>, Error> {
        if !self.has_table(Family::Inet)? || (self.egress && !self.has_table(Family::Netdev)?) {
            return Ok(Some(Tampering::GuardTable));
        }
        let found = self.take_fingerprint()?;
        if found.digest != self.fingerprint {
            return Ok(Some(Tampering::GuardRules));
        }
        if !self.holds(wanted)? {
            return Ok(Some(Tampering::GuardElement));
        }
        Ok(found.foreign.then_some(Tampering::GuardForeign))
    }

    /// Whether frames of packet sockets on this device are judged, as far as the kernel can do that at all.
    pub(crate) fn has_hook(&self, device: &str) -> bool {
        !self.egress || self.hooks.contains(&(EGRESS_CHAIN.to_owned() + &chain_suffix(device)))
    }

    /// Makes the sets hold exactly what is wanted, in one transaction.
    ///
    /// # Errors
    /// See [`Error`]; after one, no set has changed.
    pub(crate) fn refill(&mut self, wanted: &Wanted) -> Result<(), Error> {
        let mut batch = self.begin();
        for (kind, addresses) in wanted.sets() {
            batch.flush(kind);
            batch.elements(Change::Add, kind, &addresses.iter().copied().collect::<Vec<_>>());
        }
        self.commit(batch)
    }

    /// Whether every set holds exactly the addresses of its family among `wanted`.
    ///
    /// # Errors
    /// See [`Error`].
    pub(crate) fn holds(&mut self, wanted: &Wanted) -> Result<bool, Error> {
        for (kind, addresses) in wanted.sets() {
            for family in kind.families(self.egress) {
                for ipv6 in [false, true] {
                    let held = self.elements(Set { family: *family, kind, ipv6 })?;
                    if held.len() != addresses.iter().filter(|a| a.is_ipv6() == ipv6).count()
                        || !held.iter().all(|address| addresses.contains(address))
                    {
                        return Ok(false);
                    }
                }
            }
        }
        Ok(true)
    }

    /// The addresses in the inet table's sets of this kind.
    ///
    /// # Errors
    /// See [`Error`].
    pub(crate) fn list(&mut self, kind: Kind) -> Result<BTreeSet<IpAddr>, Error> {
        let mut found = BTreeSet::new();
        for ipv6 in [false, true] {
            found.extend(self.elements(Set { family: Family::Inet, kind, ipv6 })?);
        }
        Ok(found)
    }

    fn families(&self) -> &'static [Family] {
        if self.egress { &[Family::Inet, Family::Netdev] } else { &[Family::Inet] }
    }

    /// The addresses in a set; none where there is no such set.
    fn elements(&mut self, set: Set) -> Result<BTreeSet<IpAddr>, Error> {
        let mut found = BTreeSet::new();
        let name = set.name();
        let names = [(ATTR_LIST_TABLE, TABLE), (ATTR_LIST_SET, name.as_str())];
        self.dump(GET_ELEMENTS, set.family, &names, |message| {
            let list = attributes(message).find(|(kind, _)| *kind == ATTR_LIST_ELEMENTS);
            let items = list.into_iter().flat_map(|(_, list)| attributes(list));
            found.extend(items.filter_map(|(_, item)| element(item)));
        })?;
        Ok(found)
    }

    /// What says whether tables, hooks, rules and the launcher's elements are those that were loaded. The order of rules
    /// counts, that of chains does not: one that was deleted comes back as the last one.
    fn take_fingerprint(&mut self) -> Result<Fingerprint, Error> {
        let mut digests = BTreeMap::<(u8, u16, Vec<u8>), SipHasher13>::new();
        let mut found = Fingerprint::default();
        for family in self.families() {
            let known: &[&str] = if *family == Family::Inet { CHAINS } else { NETDEV_CHAINS };
            for (kind, table, chain, kept) in [
                (GET_TABLE, ATTR_TABLE_NAME, None, &[ATTR_TABLE_FLAGS][..]),
                (GET_CHAIN, ATTR_CHAIN_TABLE, Some(ATTR_CHAIN_NAME), &[ATTR_CHAIN_HOOK, ATTR_CHAIN_POLICY]),
                (GET_RULE, ATTR_RULE_TABLE, Some(ATTR_RULE_CHAIN), &[ATTR_RULE_EXPRESSIONS]),
            ] {
                self.dump(kind, *family, &[(table, TABLE)], |message| {
                    let value =
                        |wanted| attributes(message).find(|(kind, _)| *kind == wanted).map(|(_, v)| v);
                    // The kernel filters rules by table; tables and chains come all.
                    if value(table).and_then(|name| name.strip_suffix(&[0])) != Some(TABLE.as_bytes()) {
                        return;
                    }
                    let name = chain.map(|chain| {
                        value(chain).and_then(|name| name.strip_suffix(&[0])).unwrap_or_default()
                    });
                    let is_hook = name.is_some_and(|name| name.starts_with(EGRESS_CHAIN.as_bytes()));
                    if is_hook && *family == Family::Netdev {
                        found.hooks.extend(name.map(|name| String::from_utf8_lossy(name).into_owned()));
                    } else if name.is_some_and(|name| !known.iter().any(|chain| chain.as_bytes() == name)) {
                        found.foreign = true;
                        return;
                    }
                    let key = (*family as u8, kind, name.unwrap_or_default().to_vec());
                    let digest = digests.entry(key).or_default();
                    digest.write_u8(0);
                    for (kind, value) in attributes(message).filter(|(kind, _)| kept.contains(kind)) {
                        digest.write_u16(kind);
                        digest.write_usize(value.len());
                        digest.write(&without_numbers(value));
                    }
                })?;
            }
            self.add_elements(*family, &mut digests)?;
        }
        let mut all = SipHasher13::new();
        for ((family, kind, name), digest) in digests {
            all.write_u8(family);
            all.write_u16(kind);
            all.write(&name);
            all.write_u64(digest.finish());
        }
        found.digest = all.finish();
        Ok(found)
    }

    /// Adds the elements of the launcher's sets, which come in any order.
    fn add_elements(
        &mut self,
        family: Family,
        digests: &mut BTreeMap<(u8, u16, Vec<u8>), SipHasher13>,
    ) -> Result<(), Error> {
        let sets: &[&str] = if family == Family::Inet { &LAUNCHERS_SETS } else { &LAUNCHERS_SETS[..2] };
        for set in sets {
            let mut keys = BTreeSet::new();
            let names = [(ATTR_LIST_TABLE, TABLE), (ATTR_LIST_SET, *set)];
            self.dump(GET_ELEMENTS, family, &names, |message| {
                let list = attributes(message).find(|(kind, _)| *kind == ATTR_LIST_ELEMENTS);
                let items = list.into_iter().flat_map(|(_, list)| attributes(list));
                keys.extend(items.filter_map(|(_, item)| Some(element_key(item)?.to_vec())));
            })?;
            let digest = digests.entry((family as u8, GET_ELEMENTS, set.as_bytes().to_vec())).or_default();
            keys.iter().for_each(|key| digest.write(key));
        }
        Ok(())
    }

    /// Feeds `each` the attributes of every object of a dump.
    fn dump(
        &mut self,
        kind: u16,
        family: Family,
        names: &[(u16, &str)],
        mut each: impl FnMut(&[u8]),
    ) -> Result<(), Error> {
        self.sequence = self.sequence.wrapping_add(1);
        let bytes = request(kind, NLM_F_DUMP, self.sequence, family, names);
        self.socket.send(&bytes, 0).map_err(Error::Socket)?;
        loop {
            let (answer, _) = self.socket.recv_from_full().map_err(Error::Socket)?;
            for message in messages(&answer) {
                match message.kind {
                    _ if message.sequence != self.sequence => {}
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => {
                        let code = message.error().unwrap_or(-libc::EPROTO);
                        return match Errno::from_raw(-code) {
                            Errno::ENOENT | Errno::EAFNOSUPPORT | Errno::EOPNOTSUPP => Ok(()),
                            _ => Err(refused(io::Error::from_raw_os_error(-code), Error::Socket)),
                        };
                    }
                    // The object's attributes stand behind the nfgenmsg.
                    kind if kind >= NEW_TABLE => each(message.payload().get(4..).unwrap_or_default()),
                    _ => {}
                }
            }
        }
    }

    /// Adds `addresses` to the sets of protected ones, and takes them out of the former ones.
    ///
    /// # Errors
    /// See [`Error`]; after one, no set has changed. So for all that follow.
    pub(crate) fn protect(&mut self, addresses: &[IpAddr]) -> Result<(), Error> {
        let mut batch = self.begin();
        batch.elements(Change::Add, Kind::Protected, addresses);
        batch.without(Kind::Former, addresses);
        self.commit(batch)
    }

    /// Adds `addresses` to the sets of protected and of former ones.
    ///
    /// # Errors
    /// As [`Self::protect`].
    pub(crate) fn prohibit(&mut self, addresses: &[IpAddr]) -> Result<(), Error> {
        let mut batch = self.begin();
        batch.elements(Change::Add, Kind::Protected, addresses);
        batch.elements(Change::Add, Kind::Former, addresses);
        self.commit(batch)
    }

    /// Removes `addresses` from the sets of the project.
    ///
    /// # Errors
    /// As [`Self::protect`].
    pub(crate) fn release(&mut self, addresses: &[IpAddr]) -> Result<(), Error> {
        let mut batch = self.begin();
        for kind in [Kind::Peers, Kind::Former, Kind::Protected] {
            batch.without(kind, addresses);
        }
        self.commit(batch)
    }

    /// Adds `addresses` to one kind of set; those that are there already are fine.
    ///
    /// # Errors
    /// As [`Self::protect`].
    pub(crate) fn add(&mut self, kind: Kind, addresses: &[IpAddr]) -> Result<(), Error> {
        let mut batch = self.begin();
        batch.elements(Change::Add, kind, addresses);
        self.commit(batch)
    }

    /// Removes `addresses` from one kind of set; those that are not there are fine.
    ///
    /// # Errors
    /// As [`Self::protect`].
    pub(crate) fn remove(&mut self, kind: Kind, addresses: &[IpAddr]) -> Result<(), Error> {
        let mut batch = self.begin();
        batch.without(kind, addresses);
        self.commit(batch)
    }

    /// Adds `addresses` to those that are released, or gives them another ten minutes.
    ///
    /// # Errors
    /// As [`Self::protect`].
    pub(crate) fn admit(&mut self, addresses: &[IpAddr]) -> Result<(), Error> {
        let mut batch = self.begin();
        batch.without(Kind::Released, addresses);
        batch.elements(Change::Add, Kind::Released, addresses);
        self.commit(batch)
    }

    fn begin(&self) -> Batch {
        Batch::new(self.sequence.wrapping_add(1), self.egress)
    }

    fn commit(&mut self, batch: Batch) -> Result<(), Error> {
        if batch.messages.is_empty() {
            return Ok(());
        }
        let first = batch.first;
        let (bytes, messages) = batch.finish();
        self.sequence = first.wrapping_add(u32::try_from(messages.len()).expect("bounded by memory")) + 1;
        self.socket.send(&bytes, 0).map_err(Error::Socket)?;
        let mut failure = None;
        loop {
            let (answer, _) = self.socket.recv_from_full().map_err(Error::Socket)?;
            for (sequence, code) in answers(&answer) {
                // Batch begin has number `first`, message i has `first + 1 + i`.
                let index = usize::try_from(sequence.wrapping_sub(first)).unwrap_or(usize::MAX);
                let error = io::Error::from_raw_os_error(-code);
                match index.checked_sub(1).map(|i| messages.get(i)) {
                    // The transaction as a whole.
                    None if code != 0 => return Err(refused(error, Error::Commit)),
                    Some(Some((operation, set))) if code != 0 && failure.is_none() => {
                        failure = Some(refused(error, |source| Error::Set { operation, set: *set, source }));
                    }
                    _ => {}
                }
                if index == messages.len() {
                    return failure.map_or(Ok(()), Err);
                }
            }
        }
    }

    fn has_table(&mut self, family: Family) -> Result<bool, Error> {
        self.sequence = self.sequence.wrapping_add(1);
        let names = [(ATTR_TABLE_NAME, TABLE)];
        let bytes = request(GET_TABLE, NLM_F_ACK, self.sequence, family, &names);
        self.socket.send(&bytes, 0).map_err(Error::Socket)?;
        loop {
            let (answer, _) = self.socket.recv_from_full().map_err(Error::Socket)?;
            for (sequence, code) in answers(&answer) {
                let error = io::Error::from_raw_os_error(-code);
                match Errno::from_raw(-code) {
                    _ if sequence != self.sequence => {}
                    Errno::UnknownErrno => return Ok(true),
                    // No such table, or no support for the family at all.
                    Errno::ENOENT | Errno::EAFNOSUPPORT | Errno::EOPNOTSUPP => return Ok(false),
                    _ => return Err(refused(error, Error::Socket)),
                }
            }
        }
    }
}

fn refused(error: io::Error, other: impl FnOnce(io::Error) -> Error) -> Error {
    match error.kind() {
        io::ErrorKind::PermissionDenied => Error::Permission,
        _ => other(error),
    }
}

/// The expressions of a rule without the numbers that the kernel gives to nameless sets, which differ from load to load: the
/// digits of `__set4`, and the length of the attribute that they stand in.
fn without_numbers(expressions: &[u8]) -> Vec<u8> {
    const NAMELESS: &[u8] = b"__set";
    let mut bytes = expressions.to_vec();
    let starts: Vec<usize> =
        bytes.windows(NAMELESS.len()).enumerate().filter(|(_, w)| *w == NAMELESS).map(|(at, _)| at).collect();
    for at in starts {
        if let Some(length) = at.checked_sub(4).and_then(|header| bytes.get_mut(header..header + 2)) {
            length.fill(0);
        }
        bytes
            .iter_mut()
            .skip(at + NAMELESS.len())
            .take_while(|byte| byte.is_ascii_digit())
            .for_each(|byte| *byte = 0);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_looks_the_same_whatever_number_its_nameless_set_has() {
        // An attribute of 11 or 12 bytes: length, kind, name with its end, padding.
        let rule = |length: u8, name: &[u8; 8]| [&[9, 9, length, 0, 1, 0][..], name, &[7, 7]].concat();
        let first = without_numbers(&rule(11, b"__set9\0\0"));
        assert_eq!(first, without_numbers(&rule(12, b"__set10\0")));
        assert_ne!(first, without_numbers(&rule(11, b"__map9\0\0")));
        assert_eq!(without_numbers(b"__set"), b"__set");
    }
}
