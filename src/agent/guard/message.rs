//! Messages of nfnetlink about the guard's sets and tables.
//!
//! 1. one datagram holds a whole transaction: batch begin, one message per set and thousand addresses, batch end
//! 2. the last message asks for an acknowledgement; errors come unasked, each with the number of its message
//! 3. a [`request`] for what there is stands alone
//!
//! Source: linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h.

use std::net::IpAddr;

use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_REQUEST, NLMSG_ERROR};

use crate::wire::netlink::messages;

use super::{Family, Kind, Set, TABLE};

/// Elements per message: a nested attribute holds less than 64 KiB, an IPv6 element takes 28 bytes.
const ELEMENTS_PER_MESSAGE: usize = 1000;

const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const SUBSYSTEM: u16 = 10;
pub(super) const NEW_TABLE: u16 = SUBSYSTEM << 8;
pub(super) const GET_TABLE: u16 = SUBSYSTEM << 8 | 1;
pub(super) const GET_CHAIN: u16 = SUBSYSTEM << 8 | 4;
pub(super) const GET_RULE: u16 = SUBSYSTEM << 8 | 7;
const NEW_ELEMENTS: u16 = SUBSYSTEM << 8 | 12;
pub(super) const GET_ELEMENTS: u16 = SUBSYSTEM << 8 | 13;
const DELETE_ELEMENTS: u16 = SUBSYSTEM << 8 | 14;

const NESTED: u16 = 0x8000;

pub(super) const ATTR_TABLE_NAME: u16 = 1;
pub(super) const ATTR_TABLE_FLAGS: u16 = 2;
pub(super) const ATTR_CHAIN_TABLE: u16 = 1;
pub(super) const ATTR_CHAIN_NAME: u16 = 3;
pub(super) const ATTR_CHAIN_HOOK: u16 = 4;
pub(super) const ATTR_CHAIN_POLICY: u16 = 5;
pub(super) const ATTR_RULE_TABLE: u16 = 1;
pub(super) const ATTR_RULE_CHAIN: u16 = 2;
pub(super) const ATTR_RULE_EXPRESSIONS: u16 = 4;
pub(super) const ATTR_LIST_TABLE: u16 = 1;
pub(super) const ATTR_LIST_SET: u16 = 2;
pub(super) const ATTR_LIST_ELEMENTS: u16 = 3;
const ATTR_LIST_ITEM: u16 = 1;
const ATTR_ELEMENT_KEY: u16 = 1;
const ATTR_DATA_VALUE: u16 = 1;

#[derive(Clone, Copy)]
pub(super) enum Change {
    Add,
    Delete,
}

/// A transaction under construction.
pub(super) struct Batch {
    /// Number of batch begin.
    pub(super) first: u32,
    egress: bool,
    bytes: Vec<u8>,
    pub(super) messages: Vec<(&'static str, Set)>,
    /// Where the newest message starts.
    newest: usize,
}

impl Batch {
    pub(super) fn new(first: u32, egress: bool) -> Self {
        let mut bytes = Vec::new();
        let start = open_message(&mut bytes, BATCH_BEGIN, NLM_F_REQUEST, first, 0, SUBSYSTEM);
        close_message(&mut bytes, start);
        Self { first, egress, bytes, messages: Vec::new(), newest: start }
    }

    pub(super) fn elements(&mut self, change: Change, kind: Kind, addresses: &[IpAddr]) {
        for ipv6 in [false, true] {
            let of_family: Vec<_> = addresses.iter().filter(|a| a.is_ipv6() == ipv6).collect();
            for chunk in of_family.chunks(ELEMENTS_PER_MESSAGE) {
                for family in kind.families(self.egress) {
                    let set = Set { family: *family, kind, ipv6 };
                    match change {
                        Change::Add => self.message("add to", NEW_ELEMENTS, NLM_F_CREATE, set, chunk),
                        Change::Delete => self.message("delete from", DELETE_ELEMENTS, 0, set, chunk),
                    }
                }
            }
        }
    }

    /// Deletes addresses that need not be there. Deleting what is not there fails, adding what is there does not: added first,
    /// everything can be deleted.
    pub(super) fn without(&mut self, kind: Kind, addresses: &[IpAddr]) {
        self.elements(Change::Add, kind, addresses);
        self.elements(Change::Delete, kind, addresses);
    }

    /// Empties the sets of a kind.
    pub(super) fn flush(&mut self, kind: Kind) {
        for ipv6 in [false, true] {
            for family in kind.families(self.egress) {
                self.message("empty", DELETE_ELEMENTS, 0, Set { family: *family, kind, ipv6 }, &[]);
            }
        }
    }

    /// Without addresses: one about the whole set.
    fn message(&mut self, operation: &'static str, kind: u16, flags: u16, set: Set, addresses: &[&IpAddr]) {
        let bytes = &mut self.bytes;
        self.messages.push((operation, set));
        let number = u32::try_from(self.messages.len()).expect("bounded by memory");
        let sequence = self.first.wrapping_add(number);
        self.newest = open_message(bytes, kind, NLM_F_REQUEST | flags, sequence, set.family as u8, 0);
        put_string(bytes, ATTR_LIST_TABLE, TABLE);
        put_string(bytes, ATTR_LIST_SET, &set.name());
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
    pub(super) fn finish(mut self) -> (Vec<u8>, Vec<(&'static str, Set)>) {
        let flags: &mut [u8; 2] =
            self.bytes[self.newest + 6..].first_chunk_mut().expect("a message was opened there");
        *flags = (u16::from_ne_bytes(*flags) | NLM_F_ACK).to_ne_bytes();
        let number = u32::try_from(self.messages.len()).expect("bounded by memory");
        let sequence = self.first.wrapping_add(number).wrapping_add(1);
        let start = open_message(&mut self.bytes, BATCH_END, NLM_F_REQUEST, sequence, 0, SUBSYSTEM);
        close_message(&mut self.bytes, start);
        (self.bytes, self.messages)
    }
}

/// A request about what `names` say, an attribute each; sent alone.
pub(super) fn request(
    kind: u16,
    flags: u16,
    sequence: u32,
    family: Family,
    names: &[(u16, &str)],
) -> Vec<u8> {
    let mut bytes = Vec::new();
    let start = open_message(&mut bytes, kind, NLM_F_REQUEST | flags, sequence, family as u8, 0);
    for (kind, name) in names {
        put_string(&mut bytes, *kind, name);
    }
    close_message(&mut bytes, start);
    bytes
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
pub(super) fn answers(bytes: &[u8]) -> impl Iterator<Item = (u32, i32)> + '_ {
    messages(bytes)
        .filter(|message| message.kind == NLMSG_ERROR)
        .filter_map(|message| Some((message.sequence, message.error()?)))
}

/// Kind (without its flag) and value of each attribute.
pub(super) fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> + '_ {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*rest.first_chunk()?));
        let attribute = rest.get(..length).filter(|a| a.len() >= 4)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        let kind = u16::from_ne_bytes(*attribute[2..].first_chunk()?);
        Some((kind & !NESTED, &attribute[4..]))
    })
}

/// The key of one element of a set.
pub(super) fn element_key(item: &[u8]) -> Option<&[u8]> {
    let (_, key) = attributes(item).find(|(kind, _)| *kind == ATTR_ELEMENT_KEY)?;
    Some(attributes(key).find(|(kind, _)| *kind == ATTR_DATA_VALUE)?.1)
}

/// The address that is the key of one element of a set.
pub(super) fn element(item: &[u8]) -> Option<IpAddr> {
    let value = element_key(item)?;
    match value.len() {
        4 => Some(<[u8; 4]>::try_from(value).ok()?.into()),
        16 => Some(<[u8; 16]>::try_from(value).ok()?.into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        batch.elements(Change::Add, Kind::Protected, &["10.0.0.3".parse().unwrap()]);
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
        batch.elements(Change::Add, Kind::Protected, &addresses);
        let (bytes, messages) = batch.finish();
        assert_eq!(messages.len(), 6);
        let acknowledged: Vec<_> =
            lengths(&bytes).iter().map(|(_, flags, ..)| flags & NLM_F_ACK != 0).collect();
        assert_eq!(acknowledged, [false, false, false, false, false, false, true, false]);
    }

    #[test]
    fn without_an_egress_table_only_the_inet_sets_change() {
        let mut batch = Batch::new(1, false);
        batch.elements(
            Change::Delete,
            Kind::Protected,
            &["10.0.0.3".parse().unwrap(), "fd00::3".parse().unwrap()],
        );
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
        batch.elements(Change::Add, Kind::Protected, &addresses);
        let (bytes, _) = batch.finish();
        let message = messages(&bytes).find(|message| message.kind == NEW_ELEMENTS).unwrap();
        let list =
            attributes(&message.payload()[4..]).find(|(kind, _)| *kind == ATTR_LIST_ELEMENTS).unwrap().1;
        assert_eq!(attributes(list).filter_map(|(_, item)| element(item)).collect::<Vec<_>>(), addresses);
    }

    #[test]
    fn a_refill_empties_and_fills_in_one_transaction() {
        let mut batch = Batch::new(7, true);
        batch.flush(Kind::Protected);
        batch.elements(Change::Add, Kind::Protected, &["10.0.0.3".parse().unwrap()]);
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
