//! The state file: what a successor reads when an agent ended without notice.
//!
//! 1. the launcher makes the file (0600, tmpfs) and hands its descriptor to every agent of the pod, one after the other
//! 2. [`StateFile::open`] reads what the last agent left; a file of another boot, namespace, set of addresses or version
//!    is emptied and begun anew
//! 3. [`StateFile::write`] puts each record into its slot, before the packet that caused it is sent or injected
//!
//! A fixed layout, each slot with the number of its write and a checksum: an agent can be killed at any moment, and then
//! at most the slot it was writing is lost. Written with `pwrite`, not mapped: a full tmpfs would be SIGBUS, and the page
//! cache outlives the process all the same. Holds no keys.
//!
//! Checksum: SipHash-1-3, which endpoint choice uses anyway: 64 bits, fast on short input, and keyed. The key is the file's
//! balance seed, so that no slot of an earlier file is ever taken for one of this.

use std::cmp::Reverse;
use std::fs::File;
use std::hash::Hasher as _;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::time::Duration;

use siphasher::sip::SipHasher13;
use tracing::{info, warn};

use crate::proto::account::Counters;
use crate::proto::journal::{
    FLOW_RECORD_LEN, FlowRecord, MAX_LIVE_PEERS, Record, Restored, add_count, address_bytes, counts,
    decode_address, family,
};
use crate::proto::nat::MAX_FLOWS;

const MAGIC: &[u8; 8] = b"tencstat";
/// Raised whenever the layout or the meaning of a record changes.
const VERSION: u32 = 1;

/// Magic, version, boot id, cookie, addresses, balance seed; the checksum is the last word.
const HEADER_LEN: usize = 512;
/// Where the addresses begin: their number, then 17 bytes each.
const ADDRESSES_AT: usize = 36;
/// A workload has one address per family; more than these are not told apart.
const MAX_ADDRESSES: usize = 16;
const SEED_AT: usize = ADDRESSES_AT + 1 + MAX_ADDRESSES * 17;

/// Word and count; unused ones are zero. Most reasons occur in one sum only.
const COUNT_LEN: usize = WORD_LEN + 8;
const WORD_LEN: usize = 24;
const MAX_COUNTS: usize = 96;

/// A kind of slot: where the first one lies, how many bytes of content each has, and how many there are.
#[derive(Clone, Copy)]
struct Area {
    at: u64,
    body: usize,
    slots: u32,
}

/// Number of the write, and checksum.
const SLOT_FRAME: usize = 16;

impl Area {
    const fn after(before: Self, body: usize, slots: u32) -> Self {
        Self { at: before.end(), body, slots }
    }

    const fn slot_len(self) -> usize {
        self.body + SLOT_FRAME
    }

    const fn end(self) -> u64 {
        self.at + self.slots as u64 * self.slot_len() as u64
    }

    fn offset(self, slot: u32) -> u64 {
        self.at + u64::from(slot) * self.slot_len() as u64
    }
}

const STAMP: Area = Area { at: HEADER_LEN as u64, body: 16, slots: 1 };
const COUNTS: Area = Area::after(STAMP, MAX_COUNTS * COUNT_LEN, 1);
/// Family (0: empty) and address.
#[expect(clippy::cast_possible_truncation, reason = "4096")]
const PEERS: Area = Area::after(COUNTS, 24, MAX_LIVE_PEERS as u32);
/// Whether there is one, and the flow.
#[expect(clippy::cast_possible_truncation, reason = "65,536")]
const FLOWS: Area = Area::after(PEERS, FLOW_RECORD_LEN + 4, MAX_FLOWS as u32);
const FILE_LEN: u64 = FLOWS.end();

/// What has to be the same for a former agent's state to be ours.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Of this boot; see [`parse_boot_id`].
    pub boot_id: [u8; 16],
    /// Of the pod's network namespace.
    pub cookie: u64,
    /// The workload's own addresses, in any order.
    pub addresses: Vec<IpAddr>,
}

/// What /proc/sys/kernel/random/boot_id says, as bytes.
#[must_use]
pub fn parse_boot_id(text: &str) -> Option<[u8; 16]> {
    let digits: String = text.trim().chars().filter(|c| *c != '-').collect();
    let number = u128::from_str_radix(&digits, 16).ok()?;
    (digits.len() == 32).then_some(number.to_be_bytes())
}

/// The file, open; one agent at a time writes it.
#[derive(Debug)]
pub struct StateFile {
    file: File,
    seed: [u8; 16],
    /// Number of the next write.
    sequence: u64,
    failed: bool,
    buffer: Vec<u8>,
}

impl StateFile {
    /// Empties the file and begins it with `seed` for endpoint choice.
    ///
    /// A file that cannot be written is reported once and ends nothing: the agent works, a successor will know less.
    #[must_use]
    pub fn create(fd: OwnedFd, facts: &Facts, seed: [u8; 16]) -> Self {
        let mut new = Self { file: fd.into(), seed, sequence: 1, failed: false, buffer: Vec::new() };
        let begun = new
            .file
            .set_len(0)
            .and_then(|()| new.file.set_len(FILE_LEN))
            .and_then(|()| new.file.write_all_at(&header(facts, seed), 0));
        new.report(begun);
        new
    }

    /// Opens what a former agent left, or begins anew with `fresh_seed`, which is random, if it is none of ours.
    #[must_use]
    pub fn open(fd: OwnedFd, facts: &Facts, fresh_seed: [u8; 16]) -> (Self, Restored) {
        let file = File::from(fd);
        match read_header(&file, facts) {
            Ok(seed) => {
                let (restored, last) = read_slots(&file, seed);
                if restored.skipped > 0 {
                    warn!(slots = restored.skipped, "state file has damaged slots");
                }
                let sequence = last.saturating_add(1);
                (Self { file, seed, sequence, failed: false, buffer: Vec::new() }, restored)
            }
            Err(reason) => {
                info!(reason, "state file begins anew");
                let restored = Restored { balance_seed: fresh_seed, ..Restored::default() };
                (Self::create(file.into(), facts, fresh_seed), restored)
            }
        }
    }

    /// Reads again what a former agent wrote since the file was opened.
    #[must_use]
    pub fn reread(&mut self) -> Restored {
        let (restored, last) = read_slots(&self.file, self.seed);
        self.sequence = last.saturating_add(1);
        restored
    }

    /// Puts one record into its slot.
    pub fn write(&mut self, record: Record) {
        match record {
            Record::Flow { slot, flow } => {
                let mut body = [0; FLOWS.body];
                if let Some(flow) = flow {
                    body[0] = 1;
                    body[1..=FLOW_RECORD_LEN].copy_from_slice(&flow.encode());
                }
                self.put(FLOWS, slot, &body);
            }
            Record::Peer { slot, address } => {
                let mut body = [0; PEERS.body];
                if let Some(address) = address {
                    body[0] = family(address);
                    body[1..17].copy_from_slice(&address_bytes(address));
                }
                self.put(PEERS, slot, &body);
            }
            Record::Stamp(stamp) => {
                let mut body = [0; STAMP.body];
                body[..8].copy_from_slice(&stamp.as_secs().to_le_bytes());
                body[8..12].copy_from_slice(&stamp.subsec_nanos().to_le_bytes());
                self.put(STAMP, 0, &body);
            }
        }
    }

    /// Puts all counts into the file; about once a second, and at the end.
    pub fn write_counters(&mut self, counters: &Counters) {
        let mut body = vec![0; COUNTS.body];
        for (entry, (word, packets)) in body.chunks_exact_mut(COUNT_LEN).zip(counts(counters)) {
            let len = word.len().min(WORD_LEN);
            entry[..len].copy_from_slice(&word.as_bytes()[..len]);
            entry[WORD_LEN..].copy_from_slice(&packets.to_le_bytes());
        }
        self.put(COUNTS, 0, &body);
    }

    fn put(&mut self, area: Area, slot: u32, body: &[u8]) {
        debug_assert!(slot < area.slots && body.len() == area.body, "a slot of the layout");
        let offset = area.offset(slot);
        self.buffer.clear();
        self.buffer.extend_from_slice(&self.sequence.to_le_bytes());
        self.buffer.extend_from_slice(body);
        let sum = checksum(self.seed, offset, &self.buffer);
        self.buffer.extend_from_slice(&sum.to_le_bytes());
        self.sequence = self.sequence.saturating_add(1);
        let written = self.file.write_all_at(&self.buffer, offset);
        self.report(written);
    }

    fn report(&mut self, written: io::Result<()>) {
        match written {
            Err(error) if !self.failed => {
                self.failed = true;
                warn!(%error, "state file cannot be written: a successor of this agent will know less");
            }
            Err(_) | Ok(()) => {}
        }
    }
}

fn checksum(key: [u8; 16], offset: u64, bytes: &[u8]) -> u64 {
    let mut hasher = SipHasher13::new_with_key(&key);
    hasher.write_u64(offset);
    hasher.write(bytes);
    hasher.finish()
}

fn header(facts: &Facts, seed: [u8; 16]) -> [u8; HEADER_LEN] {
    let mut out = [0; HEADER_LEN];
    out[..8].copy_from_slice(MAGIC);
    out[8..12].copy_from_slice(&VERSION.to_le_bytes());
    out[12..28].copy_from_slice(&facts.boot_id);
    out[28..36].copy_from_slice(&facts.cookie.to_le_bytes());
    let mut addresses = facts.addresses.clone();
    addresses.sort_unstable();
    addresses.dedup();
    addresses.truncate(MAX_ADDRESSES);
    out[ADDRESSES_AT] = u8::try_from(addresses.len()).expect("at most MAX_ADDRESSES");
    for (entry, address) in out[ADDRESSES_AT + 1..SEED_AT].chunks_exact_mut(17).zip(addresses) {
        entry[0] = family(address);
        entry[1..].copy_from_slice(&address_bytes(address));
    }
    out[SEED_AT..SEED_AT + 16].copy_from_slice(&seed);
    let sum = checksum(seed, 0, &out[..HEADER_LEN - 8]);
    out[HEADER_LEN - 8..].copy_from_slice(&sum.to_le_bytes());
    out
}

/// The balance seed, or why the file is none of ours.
fn read_header(file: &File, facts: &Facts) -> Result<[u8; 16], &'static str> {
    match file.metadata() {
        Ok(metadata) if metadata.len() == FILE_LEN => {}
        Ok(metadata) if metadata.len() == 0 => return Err("new"),
        Ok(_) => return Err("length"),
        Err(_) => return Err("unreadable"),
    }
    let mut found = [0; HEADER_LEN];
    file.read_exact_at(&mut found, 0).map_err(|_| "unreadable")?;
    let seed = found[SEED_AT..SEED_AT + 16].try_into().expect("16 bytes");
    let expected = header(facts, seed);
    for (range, reason) in [
        (0..8, "magic"),
        (8..12, "version"),
        (12..28, "boot"),
        (28..ADDRESSES_AT, "namespace"),
        (ADDRESSES_AT..SEED_AT, "addresses"),
        (SEED_AT..HEADER_LEN, "checksum"),
    ] {
        if found[range.clone()] != expected[range] {
            return Err(reason);
        }
    }
    Ok(seed)
}

/// Everything in the slots, and the number of the last write.
fn read_slots(file: &File, seed: [u8; 16]) -> (Restored, u64) {
    let mut restored = Restored { balance_seed: seed, ..Restored::default() };
    let mut last = 0;
    let mut flows = Vec::new();
    let skipped = &mut restored.skipped;
    for_each_slot(file, seed, STAMP, skipped, |_, sequence, body| {
        last = last.max(sequence);
        let seconds = u64::from_le_bytes(*body.first_chunk()?);
        let nanoseconds = u32::from_le_bytes(*body[8..].first_chunk()?);
        restored.stamp = Some(Duration::new(seconds, Some(nanoseconds).filter(|n| *n < 1_000_000_000)?));
        Some(())
    });
    for_each_slot(file, seed, COUNTS, skipped, |_, sequence, body| {
        last = last.max(sequence);
        for entry in body.chunks_exact(COUNT_LEN) {
            let word = entry[..WORD_LEN].split(|byte| *byte == 0).next().unwrap_or_default();
            let packets = u64::from_le_bytes(*entry[WORD_LEN..].first_chunk()?);
            add_count(&mut restored.counters, std::str::from_utf8(word).ok()?, packets);
        }
        Some(())
    });
    for_each_slot(file, seed, PEERS, skipped, |slot, sequence, body| {
        last = last.max(sequence);
        if body[0] != 0 {
            restored.peers.push((slot, decode_address(body[0], body[1..].first_chunk()?)?));
        }
        Some(())
    });
    for_each_slot(file, seed, FLOWS, skipped, |slot, sequence, body| {
        last = last.max(sequence);
        if body[0] != 0 {
            flows.push((sequence, slot, FlowRecord::decode(body[1..].first_chunk()?)?));
        }
        Some(())
    });
    // Of two that contradict one another, the newer counts.
    flows.sort_unstable_by_key(|(sequence, ..)| Reverse(*sequence));
    restored.flows = flows.into_iter().map(|(_, slot, flow)| (slot, flow)).collect();
    (restored, last)
}

/// Hands every slot that was written and is whole to `take`; counts those that are not, and those that `take` refuses.
fn for_each_slot(
    file: &File,
    seed: [u8; 16],
    area: Area,
    skipped: &mut u64,
    mut take: impl FnMut(u32, u64, &[u8]) -> Option<()>,
) {
    const AT_ONCE: u32 = 1024;
    let len = area.slot_len();
    let mut buffer = vec![0; len * area.slots.min(AT_ONCE) as usize];
    let mut first = 0;
    while first < area.slots {
        let count = (area.slots - first).min(AT_ONCE);
        let chunk = &mut buffer[..len * count as usize];
        if file.read_exact_at(chunk, area.offset(first)).is_err() {
            *skipped += u64::from(area.slots - first);
            return;
        }
        for (slot, bytes) in (first..).zip(chunk.chunks_exact(len)) {
            if bytes.iter().all(|byte| *byte == 0) {
                continue;
            }
            let (content, sum) = bytes.split_at(len - 8);
            let whole = sum == checksum(seed, area.offset(slot), content).to_le_bytes();
            let sequence = content.first_chunk().map_or(0, |word| u64::from_le_bytes(*word));
            if !whole || take(slot, sequence, &content[8..]).is_none() {
                *skipped += 1;
            }
        }
        first += count;
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use proptest::prelude::*;

    use super::*;
    use crate::proto::drop::DropReason;
    use crate::proto::nat::{Kind, Tuple};

    fn facts() -> Facts {
        Facts { boot_id: [3; 16], cookie: 77, addresses: vec![ip("fd00::1"), ip("10.1.1.1")] }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn empty() -> File {
        tempfile::tempfile().unwrap()
    }

    fn fd(file: &File) -> OwnedFd {
        file.try_clone().unwrap().into()
    }

    fn flow(port: u16) -> FlowRecord {
        FlowRecord {
            tuple: Tuple { protocol: 6, local: (ip("10.1.1.1"), 8080), remote: (ip("10.1.1.2"), port) },
            peer: ip("10.1.1.2"),
            kind: Kind::Server { service: (ip("10.96.0.1"), 80), client_port: port },
            seen: 3,
        }
    }

    fn filled() -> (File, Counters) {
        let file = empty();
        let mut state = StateFile::create(fd(&file), &facts(), [9; 16]);
        for slot in [0, 7, 65_535] {
            state.write(Record::Flow { slot, flow: Some(flow(u16::try_from(slot).unwrap())) });
        }
        state.write(Record::Flow { slot: 7, flow: None });
        state.write(Record::Peer { slot: 4095, address: Some(ip("fd00::9")) });
        state.write(Record::Stamp(Duration::new(1_700_000_000, 5)));
        let mut counters = Counters::default();
        let counts = ["sealed", "captured", "answered"].map(str::to_owned).into_iter();
        let counts = counts.chain(DropReason::ALL.iter().map(|reason| format!("out.{}", reason.as_str())));
        let counts = counts.chain(DropReason::ALL.iter().map(|reason| format!("in.{}", reason.as_str())));
        let counts = counts.chain(["ans.dns_timeout".to_owned(), "preexisting".to_owned()]);
        counts.zip(1..).for_each(|(word, n)| add_count(&mut counters, &word, n));
        state.write_counters(&counters);
        (file, counters)
    }

    #[test]
    fn promise_7_what_an_agent_wrote_its_successor_reads() {
        let (file, counters) = filled();
        let (mut state, restored) = StateFile::open(fd(&file), &facts(), [1; 16]);
        assert_eq!(restored.balance_seed, [9; 16]);
        assert_eq!(restored.flows, [(65_535, flow(65_535)), (0, flow(0))]);
        assert_eq!(restored.peers, [(4095, ip("fd00::9"))]);
        assert_eq!(restored.stamp, Some(Duration::new(1_700_000_000, 5)));
        assert!(counters.answer_drops.total() > 0 && counters.other_drops.total() > 0);
        assert_eq!(restored.counters, counters);
        assert_eq!(restored.skipped, 0);
        state.write(Record::Flow { slot: 3, flow: Some(flow(0)) });
        let (_, restored) = StateFile::open(fd(&file), &facts(), [1; 16]);
        assert_eq!(restored.flows[0].0, 3, "the newer of two that contradict one another comes first");
    }

    #[test]
    fn state_of_another_boot_namespace_address_or_version_is_discarded() {
        let addresses = vec![ip("10.1.1.1")];
        for other in [
            Facts { boot_id: [4; 16], ..facts() },
            Facts { cookie: 78, ..facts() },
            Facts { addresses, ..facts() },
        ] {
            let (file, _) = filled();
            let (_, restored) = StateFile::open(fd(&file), &other, [1; 16]);
            assert_eq!((restored.balance_seed, restored.flows.len()), ([1; 16], 0));
            let (_, restored) = StateFile::open(fd(&file), &other, [2; 16]);
            assert_eq!((restored.balance_seed, restored.skipped), ([1; 16], 0), "begun anew, and ours now");
        }
        for at in [0, 8, SEED_AT as u64, FILE_LEN] {
            let (file, _) = filled();
            file.write_all_at(&[0xff], at).unwrap();
            let (_, restored) = StateFile::open(fd(&file), &facts(), [1; 16]);
            assert_eq!((restored.balance_seed, restored.flows.len()), ([1; 16], 0), "byte {at}");
            assert_eq!(file.metadata().unwrap().len(), FILE_LEN);
        }
    }

    #[test]
    fn a_torn_slot_is_skipped_and_counted_and_the_others_are_read() {
        let (file, _) = filled();
        file.write_all_at(&[0x55; 40], FLOWS.offset(0) + 30).unwrap();
        let (_, restored) = StateFile::open(fd(&file), &facts(), [1; 16]);
        assert_eq!((restored.flows.len(), restored.peers.len(), restored.skipped), (1, 1, 1));
    }

    #[test]
    fn a_file_that_cannot_be_written_is_reported_once_and_ends_nothing() {
        let full = File::options().read(true).write(true).open("/dev/full").unwrap();
        let (mut state, restored) = StateFile::open(full.into(), &facts(), [1; 16]);
        assert!(state.failed && restored.balance_seed == [1; 16]);
        state.write(Record::Flow { slot: 0, flow: Some(flow(1)) });
    }

    #[test]
    fn the_kernels_boot_id_is_read() {
        let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
        assert!(parse_boot_id(&text).is_some_and(|id| id != [0; 16]));
        assert_eq!(parse_boot_id("00000000-0000-0000-0000-000000000102"), Some(258_u128.to_be_bytes()));
        assert!(
            ["", "12", "zz000000-0000-0000-0000-000000000102"].iter().all(|t| parse_boot_id(t).is_none())
        );
    }

    #[test]
    fn every_word_and_every_count_has_room() {
        assert!(DropReason::ALL.len() + 3 <= MAX_COUNTS);
        assert!(DropReason::ALL.iter().all(|reason| reason.as_str().len() <= WORD_LEN));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

        #[test]
        fn promise_7_damaged_state_never_panics_and_never_gives_what_was_not_written(
            damage in prop::collection::vec((0..FILE_LEN, prop::collection::vec(any::<u8>(), 1..200)), 1..20)
        ) {
            let (file, _) = filled();
            for (at, bytes) in damage {
                let room = usize::try_from(FILE_LEN - at).unwrap().min(bytes.len());
                file.write_all_at(&bytes[..room], at).unwrap();
            }
            let (_, restored) = StateFile::open(fd(&file), &facts(), [1; 16]);
            prop_assert!(restored.flows.iter().all(|(slot, _)| [0, 65_535].contains(slot)));
        }

        #[test]
        fn any_bytes_are_no_state(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            let mut file = empty();
            file.write_all(&bytes).unwrap();
            let (_, restored) = StateFile::open(fd(&file), &facts(), [1; 16]);
            prop_assert_eq!(restored.balance_seed, [1; 16]);
        }
    }
}
