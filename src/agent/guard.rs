//! Elements of the guard's sets: which addresses may be spoken to through the tunnel only.
//!
//! The launcher loads the guard's tables, chains and empty sets; this file alone fills the sets, over nfnetlink, before the
//! address is routed and before a DNS answer that names it is released.
//!
//! 1. one datagram holds a whole transaction: batch begin, one message per set and thousand addresses, batch end
//! 2. both tables (inet, and netdev where the kernel has egress hooks) change in that one transaction, or none does
//! 3. the last message asks for an acknowledgement; errors come unasked, each with the number of its message
//! 4. `check` reads tables, rules and elements back, for the watch; `refill` makes the sets right again
//!
//! Source: linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::hash::Hasher as _;
use std::io;
use std::net::IpAddr;

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use nix::errno::Errno;
use siphasher::sip::SipHasher13;

use super::watch::Tampering;

/// Name of both tables.
pub const TABLE: &str = "tencrypt";
/// Name of the sets of IPv4 addresses.
pub const SET4: &str = "protected4";
/// Name of the sets of IPv6 addresses.
pub const SET6: &str = "protected6";

/// The chains of both tables.
pub const CHAINS: [&str; 13] = [
    "postrouting",
    "prerouting",
    "egress",
    "outbound",
    "resolver",
    "dns",
    "closed_outbound",
    "inbound",
    "closed_inbound",
    "record_outbound",
    "record_egress",
    "record_inbound",
    "record_dns",
];

/// Elements per message: a nested attribute holds less than 64 KiB, an IPv6 element takes 28 bytes.
const ELEMENTS_PER_MESSAGE: usize = 1000;
/// Room for the largest transaction in the socket's send buffer.
const SEND_BUFFER: usize = 8 << 20;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const SUBSYSTEM: u16 = 10;
const NEW_TABLE: u16 = SUBSYSTEM << 8;
const GET_TABLE: u16 = SUBSYSTEM << 8 | 1;
const GET_CHAIN: u16 = SUBSYSTEM << 8 | 4;
const GET_RULE: u16 = SUBSYSTEM << 8 | 7;
const NEW_ELEMENTS: u16 = SUBSYSTEM << 8 | 12;
const GET_ELEMENTS: u16 = SUBSYSTEM << 8 | 13;
const DELETE_ELEMENTS: u16 = SUBSYSTEM << 8 | 14;

const FLAG_REQUEST: u16 = 1;
const FLAG_ACK: u16 = 4;
const FLAG_CREATE: u16 = 0x400;
const FLAG_DUMP: u16 = 0x300;
const NESTED: u16 = 0x8000;

const ATTR_TABLE_NAME: u16 = 1;
const ATTR_TABLE_FLAGS: u16 = 2;
const ATTR_CHAIN_TABLE: u16 = 1;
const ATTR_CHAIN_NAME: u16 = 3;
const ATTR_CHAIN_HOOK: u16 = 4;
const ATTR_CHAIN_POLICY: u16 = 5;
const ATTR_RULE_TABLE: u16 = 1;
const ATTR_RULE_CHAIN: u16 = 2;
const ATTR_RULE_EXPRESSIONS: u16 = 4;
const ATTR_LIST_TABLE: u16 = 1;
const ATTR_LIST_SET: u16 = 2;
const ATTR_LIST_ELEMENTS: u16 = 3;
const ATTR_LIST_ITEM: u16 = 1;
const ATTR_ELEMENT_KEY: u16 = 1;
const ATTR_DATA_VALUE: u16 = 1;

/// Family of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Hooks of both IP families.
    Inet = 1,
    /// Hooks of one device.
    Netdev = 5,
}

/// A set, for error messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Set {
    family: Family,
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
    fn name(self) -> &'static str {
        if self.ipv6 { SET6 } else { SET4 }
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

/// The handle to the sets of one pod.
#[derive(Debug)]
pub struct Guard {
    socket: Socket,
    sequence: u32,
    egress: bool,
    /// Digest of the skeleton that was loaded.
    skeleton: u64,
    /// Of tables, chains and rules as they were loaded.
    fingerprint: u64,
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
        let mut guard = Self { socket, sequence: 0, egress: false, skeleton, fingerprint: 0 };
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
        self.fingerprint = self.take_fingerprint()?.0;
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
    pub(crate) fn check(&mut self, wanted: &BTreeSet<IpAddr>) -> Result<Option<Tampering>, Error> {
        if !self.has_table(Family::Inet)? || (self.egress && !self.has_table(Family::Netdev)?) {
            return Ok(Some(Tampering::GuardTable));
        }
        let (fingerprint, foreign) = self.take_fingerprint()?;
        if fingerprint != self.fingerprint {
            return Ok(Some(Tampering::GuardRules));
        }
        if !self.holds(wanted)? {
            return Ok(Some(Tampering::GuardElement));
        }
        Ok(foreign.then_some(Tampering::GuardForeign))
    }

    /// Makes the sets hold exactly `addresses`, in one transaction.
    ///
    /// # Errors
    /// See [`Error`]; after one, no set has changed.
    pub fn refill(&mut self, addresses: &[IpAddr]) -> Result<(), Error> {
        let mut batch = self.begin();
        batch.flush();
        batch.elements(Change::Add, addresses);
        self.commit(batch)
    }

    /// Whether every set holds exactly the addresses of its family among `wanted`.
    ///
    /// # Errors
    /// See [`Error`].
    pub(crate) fn holds(&mut self, wanted: &BTreeSet<IpAddr>) -> Result<bool, Error> {
        for family in self.families() {
            for ipv6 in [false, true] {
                let set = Set { family: *family, ipv6 };
                let held = self.elements(set)?;
                if held.len() != wanted.iter().filter(|a| a.is_ipv6() == ipv6).count()
                    || !held.iter().all(|address| wanted.contains(address))
                {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    fn families(&self) -> &'static [Family] {
        if self.egress { &[Family::Inet, Family::Netdev] } else { &[Family::Inet] }
    }

    /// The addresses in a set; none where there is no such set.
    fn elements(&mut self, set: Set) -> Result<BTreeSet<IpAddr>, Error> {
        let mut found = BTreeSet::new();
        let names = [(ATTR_LIST_TABLE, TABLE), (ATTR_LIST_SET, set.name())];
        self.dump(GET_ELEMENTS, set.family, &names, |message| {
            let list = attributes(message).find(|(kind, _)| *kind == ATTR_LIST_ELEMENTS);
            let items = list.into_iter().flat_map(|(_, list)| attributes(list));
            found.extend(items.filter_map(|(_, item)| element(item)));
        })?;
        Ok(found)
    }

    /// What says whether tables, hooks and rules are those that were loaded; and whether there is a chain besides [`CHAINS`].
    /// The order of rules counts, that of chains does not: one that was deleted comes back as the last one.
    fn take_fingerprint(&mut self) -> Result<(u64, bool), Error> {
        let mut digests = BTreeMap::<(u8, u16, Vec<u8>), SipHasher13>::new();
        let mut foreign = false;
        for family in self.families() {
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
                    if name.is_some_and(|name| !CHAINS.iter().any(|chain| chain.as_bytes() == name)) {
                        foreign = true;
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
        }
        let mut all = SipHasher13::new();
        for ((family, kind, name), digest) in digests {
            all.write_u8(family);
            all.write_u16(kind);
            all.write(&name);
            all.write_u64(digest.finish());
        }
        Ok((all.finish(), foreign))
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
        let mut bytes = Vec::new();
        let start = open_message(&mut bytes, kind, FLAG_REQUEST | FLAG_DUMP, self.sequence, family as u8, 0);
        for (kind, name) in names {
            put_string(&mut bytes, *kind, name);
        }
        close_message(&mut bytes, start);
        self.socket.send(&bytes, 0).map_err(Error::Socket)?;
        loop {
            let (answer, _) = self.socket.recv_from_full().map_err(Error::Socket)?;
            for (kind, sequence, payload) in messages(&answer) {
                match kind {
                    _ if sequence != self.sequence => {}
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => {
                        let code = payload.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
                        return match Errno::from_raw(-code) {
                            Errno::ENOENT | Errno::EAFNOSUPPORT | Errno::EOPNOTSUPP => Ok(()),
                            _ => Err(refused(io::Error::from_raw_os_error(-code), Error::Socket)),
                        };
                    }
                    // The object's attributes stand behind the nfgenmsg.
                    _ if kind >= NEW_TABLE => each(payload.get(4..).unwrap_or_default()),
                    _ => {}
                }
            }
        }
    }

    /// Adds `addresses` to the sets; those that are there already are fine.
    ///
    /// # Errors
    /// See [`Error`]; after one, no set has changed.
    pub fn add(&mut self, addresses: &[IpAddr]) -> Result<(), Error> {
        let mut batch = self.begin();
        batch.elements(Change::Add, addresses);
        self.commit(batch)
    }

    /// Removes `addresses` from the sets; those that are not there are fine.
    ///
    /// # Errors
    /// See [`Error`]; after one, no set has changed.
    pub fn remove(&mut self, addresses: &[IpAddr]) -> Result<(), Error> {
        let mut batch = self.begin();
        // Deleting what is not there fails, adding what is there does not: added first, everything can be deleted.
        batch.elements(Change::Add, addresses);
        batch.elements(Change::Delete, addresses);
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
        let mut bytes = Vec::new();
        let start =
            open_message(&mut bytes, GET_TABLE, FLAG_REQUEST | FLAG_ACK, self.sequence, family as u8, 0);
        put_string(&mut bytes, ATTR_TABLE_NAME, TABLE);
        close_message(&mut bytes, start);
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

#[derive(Clone, Copy)]
enum Change {
    Add,
    Delete,
}

/// A transaction under construction.
struct Batch {
    first: u32,
    families: &'static [Family],
    bytes: Vec<u8>,
    messages: Vec<(&'static str, Set)>,
    /// Where the newest message starts.
    newest: usize,
}

impl Batch {
    fn new(first: u32, egress: bool) -> Self {
        let mut bytes = Vec::new();
        let start = open_message(&mut bytes, BATCH_BEGIN, FLAG_REQUEST, first, 0, SUBSYSTEM);
        close_message(&mut bytes, start);
        let families: &[_] = if egress { &[Family::Inet, Family::Netdev] } else { &[Family::Inet] };
        Self { first, families, bytes, messages: Vec::new(), newest: start }
    }

    fn elements(&mut self, change: Change, addresses: &[IpAddr]) {
        for ipv6 in [false, true] {
            let of_family: Vec<_> = addresses.iter().filter(|a| a.is_ipv6() == ipv6).collect();
            for chunk in of_family.chunks(ELEMENTS_PER_MESSAGE) {
                for family in self.families {
                    let set = Set { family: *family, ipv6 };
                    match change {
                        Change::Add => self.message("add to", NEW_ELEMENTS, FLAG_CREATE, set, chunk),
                        Change::Delete => self.message("delete from", DELETE_ELEMENTS, 0, set, chunk),
                    }
                }
            }
        }
    }

    /// Empties every set.
    fn flush(&mut self) {
        for ipv6 in [false, true] {
            for family in self.families {
                self.message("empty", DELETE_ELEMENTS, 0, Set { family: *family, ipv6 }, &[]);
            }
        }
    }

    /// Without addresses: one about the whole set.
    fn message(&mut self, operation: &'static str, kind: u16, flags: u16, set: Set, addresses: &[&IpAddr]) {
        let bytes = &mut self.bytes;
        self.messages.push((operation, set));
        let number = u32::try_from(self.messages.len()).expect("bounded by memory");
        let sequence = self.first.wrapping_add(number);
        self.newest = open_message(bytes, kind, FLAG_REQUEST | flags, sequence, set.family as u8, 0);
        put_string(bytes, ATTR_LIST_TABLE, TABLE);
        put_string(bytes, ATTR_LIST_SET, set.name());
        if addresses.is_empty() {
            return close_message(bytes, self.newest);
        }
        let list = open_attribute(bytes, ATTR_LIST_ELEMENTS | NESTED);
        for address in addresses {
            let item = open_attribute(bytes, ATTR_LIST_ITEM | NESTED);
            let key = open_attribute(bytes, ATTR_ELEMENT_KEY | NESTED);
            let value = open_attribute(bytes, ATTR_DATA_VALUE);
            match address {
                IpAddr::V4(a) => bytes.extend(a.octets()),
                IpAddr::V6(a) => bytes.extend(a.octets()),
            }
            for start in [value, key, item] {
                close_attribute(bytes, start);
            }
        }
        close_attribute(bytes, list);
        close_message(bytes, self.newest);
    }

    /// The bytes to send, and what each message between begin and end is about.
    fn finish(mut self) -> (Vec<u8>, Vec<(&'static str, Set)>) {
        let flags: &mut [u8; 2] =
            self.bytes[self.newest + 6..].first_chunk_mut().expect("a message was opened there");
        *flags = (u16::from_ne_bytes(*flags) | FLAG_ACK).to_ne_bytes();
        let number = u32::try_from(self.messages.len()).expect("bounded by memory");
        let sequence = self.first.wrapping_add(number).wrapping_add(1);
        let start = open_message(&mut self.bytes, BATCH_END, FLAG_REQUEST, sequence, 0, SUBSYSTEM);
        close_message(&mut self.bytes, start);
        (self.bytes, self.messages)
    }
}

/// Writes a netlink header (length still 0) and the nfgenmsg behind it; returns where it starts.
fn open_message(
    bytes: &mut Vec<u8>,
    kind: u16,
    flags: u16,
    sequence: u32,
    family: u8,
    resource: u16,
) -> usize {
    let start = bytes.len();
    bytes.extend([0; 4]);
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    bytes.extend([0; 4]);
    bytes.extend([family, 0]);
    bytes.extend(resource.to_be_bytes());
    start
}

fn close_message(bytes: &mut [u8], start: usize) {
    let length = u32::try_from(bytes.len() - start).expect("bounded by the elements per message");
    bytes[start..start + 4].copy_from_slice(&length.to_ne_bytes());
}

fn open_attribute(bytes: &mut Vec<u8>, kind: u16) -> usize {
    let start = bytes.len();
    bytes.extend([0; 2]);
    bytes.extend(kind.to_ne_bytes());
    start
}

fn close_attribute(bytes: &mut Vec<u8>, start: usize) {
    let length = u16::try_from(bytes.len() - start).expect("bounded by the elements per message");
    bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

fn put_string(bytes: &mut Vec<u8>, kind: u16, text: &str) {
    let start = open_attribute(bytes, kind);
    bytes.extend(text.as_bytes());
    bytes.push(0);
    close_attribute(bytes, start);
}

/// Number and error code (0, or negative) of each acknowledgement in a datagram from the kernel.
fn answers(bytes: &[u8]) -> impl Iterator<Item = (u32, i32)> + '_ {
    messages(bytes)
        .filter(|(kind, ..)| *kind == NLMSG_ERROR)
        .filter_map(|(_, sequence, payload)| Some((sequence, i32::from_ne_bytes(*payload.first_chunk()?))))
}

/// Kind, number and payload of each message in a datagram from the kernel.
fn messages(bytes: &[u8]) -> impl Iterator<Item = (u16, u32, &[u8])> + '_ {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let length = usize::try_from(u32::from_ne_bytes(*rest.first_chunk()?)).ok()?;
        let message = rest.get(..length).filter(|m| m.len() >= 16)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        let kind = u16::from_ne_bytes(*message[4..].first_chunk()?);
        let sequence = u32::from_ne_bytes(*message[8..].first_chunk()?);
        Some((kind, sequence, &message[16..]))
    })
}

/// Kind (without its flag) and value of each attribute.
fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> + '_ {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*rest.first_chunk()?));
        let attribute = rest.get(..length).filter(|a| a.len() >= 4)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        let kind = u16::from_ne_bytes(*attribute[2..].first_chunk()?);
        Some((kind & !NESTED, &attribute[4..]))
    })
}

/// The address of one element of a set.
fn element(item: &[u8]) -> Option<IpAddr> {
    let (_, key) = attributes(item).find(|(kind, _)| *kind == ATTR_ELEMENT_KEY)?;
    let (_, value) = attributes(key).find(|(kind, _)| *kind == ATTR_DATA_VALUE)?;
    match value.len() {
        4 => Some(<[u8; 4]>::try_from(value).ok()?.into()),
        16 => Some(<[u8; 16]>::try_from(value).ok()?.into()),
        _ => None,
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

    fn lengths(bytes: &[u8]) -> Vec<(u16, u16, u32, usize)> {
        let (mut rest, mut found) = (bytes, Vec::new());
        while let Some(header) = rest.first_chunk::<16>() {
            let length = u32::from_ne_bytes(header[..4].try_into().unwrap()) as usize;
            let kind = u16::from_ne_bytes(header[4..6].try_into().unwrap());
            let flags = u16::from_ne_bytes(header[6..8].try_into().unwrap());
            found.push((kind, flags, u32::from_ne_bytes(header[8..12].try_into().unwrap()), length));
            rest = &rest[length..];
        }
        assert!(rest.is_empty());
        found
    }

    #[test]
    fn one_address_is_one_message_per_table_between_begin_and_end() {
        let mut batch = Batch::new(7, true);
        batch.elements(Change::Add, &["10.0.0.3".parse().unwrap()]);
        let (bytes, messages) = batch.finish();
        // 20 bytes of headers, "tencrypt" and "protected4" 16 each, list 4, item 4, key 4, value 8.
        assert_eq!(
            lengths(&bytes),
            [(0x10, 1, 7, 20), (0x0a0c, 0x401, 8, 72), (0x0a0c, 0x405, 9, 72), (0x11, 1, 10, 20),]
        );
        assert_eq!(messages.len(), 2);
        assert_eq!(bytes[16..20], [0, 0, 0, 10], "subsystem in network order");
        assert_eq!((bytes[36], bytes[108]), (1, 5), "families");
        let element = &bytes[20 + 20 + 16 + 16..20 + 72];
        assert_eq!(element, [20, 0, 3, 0x80, 16, 0, 1, 0x80, 12, 0, 1, 0x80, 8, 0, 1, 0, 10, 0, 0, 3]);
    }

    #[test]
    fn many_addresses_are_split_and_only_the_last_message_is_acknowledged() {
        let addresses: Vec<IpAddr> =
            (0..2500_u32).map(|i| IpAddr::from(std::net::Ipv6Addr::from_bits(i.into()))).collect();
        let mut batch = Batch::new(1, true);
        batch.elements(Change::Add, &addresses);
        let (bytes, messages) = batch.finish();
        assert_eq!(messages.len(), 6);
        let acknowledged: Vec<_> =
            lengths(&bytes).iter().map(|(_, flags, ..)| flags & FLAG_ACK != 0).collect();
        assert_eq!(acknowledged, [false, false, false, false, false, false, true, false]);
    }

    #[test]
    fn without_an_egress_table_only_the_inet_sets_change() {
        let mut batch = Batch::new(1, false);
        batch.elements(Change::Delete, &["10.0.0.3".parse().unwrap(), "fd00::3".parse().unwrap()]);
        let (_, messages) = batch.finish();
        assert_eq!(messages.len(), 2);
        assert!(messages.iter().all(|(_, set)| set.family == Family::Inet));
    }

    #[test]
    fn a_cut_off_answer_ends_the_answers() {
        assert_eq!(answers(&[]).count(), 0);
        assert_eq!(answers(&[20, 0, 0, 0, 2, 0]).count(), 0);
        let mut error = [0; 20];
        (error[0], error[4], error[8]) = (20, 2, 9);
        error[16..].copy_from_slice(&(-2_i32).to_ne_bytes());
        assert_eq!(answers(&error).collect::<Vec<_>>(), [(9, -2)]);
        error[0] = 16;
        assert_eq!(answers(&error).count(), 0);
    }

    #[test]
    fn elements_are_read_back_as_they_were_written() {
        let addresses: Vec<IpAddr> = vec!["10.0.0.3".parse().unwrap(), "10.0.0.4".parse().unwrap()];
        let mut batch = Batch::new(7, false);
        batch.elements(Change::Add, &addresses);
        let (bytes, _) = batch.finish();
        let (_, _, payload) = messages(&bytes).find(|(kind, ..)| *kind == NEW_ELEMENTS).unwrap();
        let list = attributes(&payload[4..]).find(|(kind, _)| *kind == ATTR_LIST_ELEMENTS).unwrap().1;
        assert_eq!(attributes(list).filter_map(|(_, item)| element(item)).collect::<Vec<_>>(), addresses);
    }

    #[test]
    fn a_refill_empties_and_fills_in_one_transaction() {
        let mut batch = Batch::new(7, true);
        batch.flush();
        batch.elements(Change::Add, &["10.0.0.3".parse().unwrap()]);
        let (bytes, messages) = batch.finish();
        let kinds: Vec<_> = lengths(&bytes).iter().map(|(kind, ..)| *kind).collect();
        let (empty, fill) = (DELETE_ELEMENTS, NEW_ELEMENTS);
        assert_eq!(kinds, [BATCH_BEGIN, empty, empty, empty, empty, fill, fill, BATCH_END]);
        assert_eq!(messages.len(), 6);
    }

    #[test]
    fn a_cut_off_attribute_ends_the_attributes() {
        for bytes in [&[][..], &[8], &[8, 0, 1, 0, 1], &[3, 0, 1, 0]] {
            assert_eq!(attributes(bytes).count(), 0);
        }
    }
}
