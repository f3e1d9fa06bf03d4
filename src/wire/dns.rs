//! DNS messages: what the agent has to read of a copy. Bytes are never re-encoded.
//!
//! Only the framing, the names and the few record types that carry addresses are looked at, so a message is refused
//! for being malformed, never for carrying something new. Names are decompressed by hickory-proto.
//! Source: RFC 1035 §4, RFC 2782 (SRV), RFC 9460 (SVCB).

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use hickory_proto::rr::Name;
use hickory_proto::serialize::binary::{BinDecodable, BinDecoder};

/// Length of the fixed header, in bytes.
pub const HEADER_LEN: usize = 12;

const TYPE_A: u16 = 1;
const TYPE_CNAME: u16 = 5;
const TYPE_AAAA: u16 = 28;
const TYPE_SRV: u16 = 33;
const TYPE_SVCB: u16 = 64;
const TYPE_HTTPS: u16 = 65;
const CLASS_IN: u16 = 1;
/// Labels and compression pointers followed in one message. Real answers need hundreds; a message of pointers to pointers
/// would cost the engine's thread a tenth of a second.
const STEPS: usize = 16_384;
const PARAM_IPV4HINT: u16 = 4;
const PARAM_IPV6HINT: u16 = 6;

/// The message id.
#[must_use]
pub fn id(message: &[u8]) -> Option<u16> {
    message.get(..2).map(|b| u16::from_be_bytes([b[0], b[1]]))
}

/// Replaces the id of a message that has one.
pub fn set_id(message: &mut [u8], id: u16) {
    if let Some(field) = message.get_mut(..2) {
        field.copy_from_slice(&id.to_be_bytes());
    }
}

/// Whether a message with a whole header is a response.
#[must_use]
pub fn is_response(message: &[u8]) -> bool {
    message.len() >= HEADER_LEN && message[2] & 0x80 != 0
}

/// Whether `answer` is a response to `query`: same opcode and, byte for byte, the same question. An error response may
/// leave the question out (RFC 1035 servers do so for messages they cannot read).
#[must_use]
pub fn answers(answer: &[u8], query: &[u8]) -> bool {
    if query.len() < HEADER_LEN || !is_response(answer) || answer[2] & 0x78 != query[2] & 0x78 {
        return false;
    }
    let error = answer[3] & 0x0f != 0;
    if error && answer[4..6] == [0, 0] {
        return true;
    }
    let Some(question) = question_section(query) else {
        // A query that we cannot read is forwarded all the same; only the id vouches for its answer.
        return true;
    };
    answer[4..6] == query[4..6] && answer[HEADER_LEN..].starts_with(question)
}

/// The bytes of the question section.
fn question_section(message: &[u8]) -> Option<&[u8]> {
    let mut decoder = BinDecoder::new(message);
    decoder.read_slice(4).ok()?;
    let count = read_u16(&mut decoder)?;
    decoder.read_slice(6).ok()?;
    let mut steps = STEPS;
    for _ in 0..count {
        read_name(message, &mut decoder, &mut steps)?;
        decoder.read_slice(4).ok()?;
    }
    message.get(HEADER_LEN..decoder.index())
}

/// What an answer teaches.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Lesson {
    /// Addresses whose owner name is inside the zone, with the smallest time to live seen, in seconds.
    pub addresses: BTreeMap<IpAddr, u32>,
    /// The same addresses with their owner names.
    pub owned: BTreeSet<(Name, IpAddr)>,
    /// Names inside the zone, with the names that they are said to stand for.
    pub targets: BTreeSet<(Name, Name)>,
    /// Addresses that the question leads to by names outside the zone.
    pub outside: BTreeSet<IpAddr>,
    /// Where the question is inside the zone: addresses of the answer section whose owner the question does not lead to, or whose
    /// class or type is one that careless readers take for an address.
    pub loose: BTreeSet<IpAddr>,
}

/// An answer that could not be read completely.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unparsed {
    /// Whether its question is inside the zone, as far as it could be read.
    pub in_zone: bool,
}

/// The project's zone, if it is known.
#[derive(Clone, Copy)]
struct Zone<'a>(Option<&'a Name>);

impl Zone<'_> {
    fn holds(self, name: &Name) -> bool {
        self.0.is_some_and(|zone| zone.zone_of(name))
    }
}

struct Record<'a> {
    owner: Name,
    kind: u16,
    class: u16,
    ttl: u32,
    data: &'a [u8],
    data_at: usize,
}

/// Reads an answer: the addresses that the question leads to, through CNAME records or as the target of one of its SRV or
/// SVCB records, by names inside `zone` and by other ones. Glue and unrelated records teach nothing. Without a zone every
/// name is outside.
///
/// # Errors
/// [`Unparsed`] where the message is cut off, has trailing bytes, or a name or address in it is malformed.
pub fn lesson(message: &[u8], zone: Option<&Name>) -> Result<Lesson, Unparsed> {
    let zone = Zone(zone);
    let mut in_zone = false;
    read_lesson(message, zone, &mut in_zone).ok_or(Unparsed { in_zone })
}

fn read_lesson(message: &[u8], zone: Zone<'_>, in_zone: &mut bool) -> Option<Lesson> {
    let mut decoder = BinDecoder::new(message);
    let mut steps = STEPS;
    read_u16(&mut decoder)?;
    let flags = read_u16(&mut decoder)?;
    let [questions, answers, authorities, additionals] = [(); 4].map(|()| read_u16(&mut decoder));
    let mut asked = Vec::new();
    for _ in 0..questions? {
        let name = read_name(message, &mut decoder, &mut steps)?;
        *in_zone |= zone.holds(&name);
        decoder.read_slice(4).ok()?;
        asked.push(name);
    }
    if flags & 0x7800 != 0 {
        // Not a QUERY: the sections mean something else. A careless reader may take them for an answer all the same.
        return (answers? == 0 || !*in_zone).then(Lesson::default);
    }
    let mut section = |count: Option<u16>| {
        let mut records = Vec::new();
        for _ in 0..count? {
            let record = read_record(message, &mut decoder, &mut steps)?;
            // An answer from outside that leads into the zone counts as one about the zone.
            *in_zone |= zone.holds(&record.owner);
            records.push(record);
        }
        Some(records)
    };
    let answer = section(answers)?;
    section(authorities)?;
    let mut additional = section(additionals)?;
    additional.retain(|record| record.class == CLASS_IN);
    if !decoder.is_empty() {
        return None;
    }
    collect(message, zone, &asked, &answer, &additional, &mut steps)
}

fn read_record<'a>(message: &[u8], decoder: &mut BinDecoder<'a>, steps: &mut usize) -> Option<Record<'a>> {
    let owner = read_name(message, decoder, steps)?.to_lowercase();
    let kind = read_u16(decoder)?;
    let class = read_u16(decoder)?;
    let ttl = decoder.read_u32().ok()?.unverified();
    let length = read_u16(decoder)?;
    let data_at = decoder.index();
    let data = decoder.read_slice(usize::from(length)).ok()?.unverified();
    Some(Record { owner, kind, class, ttl, data, data_at })
}

fn collect(
    message: &[u8],
    zone: Zone<'_>,
    asked: &[Name],
    answer: &[Record<'_>],
    additional: &[Record<'_>],
    steps: &mut usize,
) -> Option<Lesson> {
    let (proper, odd): (Vec<_>, Vec<_>) = answer.iter().partition(|r| r.class == CLASS_IN);
    let mut aliases: BTreeMap<&Name, Vec<Name>> = BTreeMap::new();
    for record in proper.iter().filter(|r| r.kind == TYPE_CNAME) {
        aliases.entry(&record.owner).or_default().push(name_at(message, record, 0, steps)?.0);
    }
    let mut lesson = Lesson::default();
    let mut reached = BTreeSet::new();
    let mut queue: Vec<Name> = asked.iter().map(Name::to_lowercase).collect();
    while let Some(name) = queue.pop() {
        if reached.contains(&name) {
            continue;
        }
        if let Some(targets) = aliases.get(&name) {
            targets.iter().for_each(|target| lead(&mut lesson, zone, &name, target));
            queue.extend(targets.iter().filter(|t| !reached.contains(*t)).cloned());
        }
        reached.insert(name);
    }
    if asked.iter().any(|name| zone.holds(name)) {
        let is_led_to = |r: &&&Record<'_>| matches!(r.kind, TYPE_A | TYPE_AAAA) && reached.contains(&r.owner);
        lesson.loose.extend(odd.iter().filter_map(|record| careless(record)));
        lesson.loose.extend(proper.iter().filter(|r| !is_led_to(r)).filter_map(|record| careless(record)));
    }
    let mut targets = BTreeSet::new();
    for record in proper.into_iter().filter(|r| reached.contains(&r.owner)) {
        match record.kind {
            TYPE_A | TYPE_AAAA => learn(&mut lesson, zone, &record.owner, record.ttl, &[address(record)?]),
            TYPE_SRV => {
                let (target, _) = name_at(message, record, 6, steps)?;
                lead(&mut lesson, zone, &record.owner, &target);
                targets.insert(target);
            }
            TYPE_SVCB | TYPE_HTTPS => {
                let (target, end) = name_at(message, record, 2, steps)?;
                let target = if target.is_root() { record.owner.clone() } else { target };
                lead(&mut lesson, zone, &record.owner, &target);
                learn(&mut lesson, zone, &target, record.ttl, &hints(record.data.get(end..)?)?);
                targets.insert(target);
            }
            _ => {}
        }
    }
    for record in
        additional.iter().filter(|r| matches!(r.kind, TYPE_A | TYPE_AAAA) && targets.contains(&r.owner))
    {
        learn(&mut lesson, zone, &record.owner, record.ttl, &[address(record)?]);
    }
    Some(lesson)
}

/// The address that a reader sees who looks at the low byte of the type alone.
fn careless(record: &Record<'_>) -> Option<IpAddr> {
    match record.kind & 0xff {
        TYPE_A => Some(Ipv4Addr::from(<[u8; 4]>::try_from(record.data).ok()?).into()),
        TYPE_AAAA => Some(Ipv6Addr::from(<[u8; 16]>::try_from(record.data).ok()?).into()),
        _ => None,
    }
}

fn lead(lesson: &mut Lesson, zone: Zone<'_>, owner: &Name, target: &Name) {
    if zone.holds(owner) {
        lesson.targets.insert((owner.clone(), target.clone()));
    }
}

fn learn(lesson: &mut Lesson, zone: Zone<'_>, owner: &Name, ttl: u32, addresses: &[IpAddr]) {
    if !zone.holds(owner) {
        lesson.outside.extend(addresses);
        return;
    }
    // RFC 2181 §8: a TTL with the top bit set is zero.
    let ttl = if ttl > i32::MAX.unsigned_abs() { 0 } else { ttl };
    for address in addresses {
        lesson.addresses.entry(*address).and_modify(|old| *old = ttl.min(*old)).or_insert(ttl);
        lesson.owned.insert((owner.clone(), *address));
    }
}

fn address(record: &Record<'_>) -> Option<IpAddr> {
    match record.kind {
        TYPE_A => Some(Ipv4Addr::from(<[u8; 4]>::try_from(record.data).ok()?).into()),
        _ => Some(Ipv6Addr::from(<[u8; 16]>::try_from(record.data).ok()?).into()),
    }
}

/// The name at `offset` inside the record's data, in lower case, and the offset behind it.
fn name_at(message: &[u8], record: &Record<'_>, offset: usize, steps: &mut usize) -> Option<(Name, usize)> {
    if offset >= record.data.len() {
        return None;
    }
    // Cut behind the record, so that the name cannot run out of it; compression pointers lead backwards only.
    let whole = message.get(..record.data_at + record.data.len())?;
    let at = u16::try_from(record.data_at + offset).ok()?;
    let mut decoder = BinDecoder::new(whole).clone(at);
    let name = read_name(whole, &mut decoder, steps)?;
    Some((name.to_lowercase(), decoder.index().checked_sub(record.data_at)?))
}

/// Reads a name, and takes the labels and pointers on its way off `steps`.
fn read_name(message: &[u8], decoder: &mut BinDecoder<'_>, steps: &mut usize) -> Option<Name> {
    let mut at = decoder.index();
    loop {
        *steps = steps.checked_sub(1)?;
        let length = usize::from(*message.get(at)?);
        match length {
            0 => break,
            0xc0.. => {
                let target = (length & 0x3f) << 8 | usize::from(*message.get(at + 1)?);
                // Backwards only, as the decoder demands it: the walk ends.
                if target >= at {
                    return None;
                }
                at = target;
            }
            _ => at += 1 + length,
        }
    }
    Name::read(decoder).ok()
}

/// The address hints among SVCB parameters.
fn hints(mut parameters: &[u8]) -> Option<Vec<IpAddr>> {
    let mut found = Vec::new();
    while !parameters.is_empty() {
        let (head, rest) = parameters.split_at_checked(4)?;
        let length = usize::from(u16::from_be_bytes([head[2], head[3]]));
        let (value, rest) = rest.split_at_checked(length)?;
        parameters = rest;
        match u16::from_be_bytes([head[0], head[1]]) {
            PARAM_IPV4HINT => {
                let (chunks, cut) = value.as_chunks::<4>();
                found.extend(chunks.iter().map(|c| IpAddr::from(*c)));
                cut.is_empty().then_some(())?;
            }
            PARAM_IPV6HINT => {
                let (chunks, cut) = value.as_chunks::<16>();
                found.extend(chunks.iter().map(|c| IpAddr::from(*c)));
                cut.is_empty().then_some(())?;
            }
            _ => {}
        }
    }
    Some(found)
}

fn read_u16(decoder: &mut BinDecoder<'_>) -> Option<u16> {
    Some(decoder.read_u16().ok()?.unverified())
}

#[cfg(test)]
mod tests {
    use std::str::FromStr;

    use super::*;

    fn zone() -> Name {
        Name::from_str("shop.svc.cluster.local.").unwrap()
    }

    fn name(text: &str) -> Vec<u8> {
        let labels = text.split('.').filter(|l| !l.is_empty());
        let mut out: Vec<u8> =
            labels.flat_map(|l| std::iter::once(u8::try_from(l.len()).unwrap()).chain(l.bytes())).collect();
        out.push(0);
        out
    }

    fn record(owner: &str, kind: u16, data: &[u8]) -> Vec<u8> {
        let mut out = name(owner);
        out.extend(kind.to_be_bytes());
        out.extend([0, 1, 0, 0, 0, 30]);
        out.extend(u16::try_from(data.len()).unwrap().to_be_bytes());
        out.extend(data);
        out
    }

    fn message(question: &str, answers: &[Vec<u8>], additionals: &[Vec<u8>]) -> Vec<u8> {
        let mut out = vec![0x12, 0x34, 0x84, 0, 0, 1];
        out.extend(u16::try_from(answers.len()).unwrap().to_be_bytes());
        out.extend([0, 0]);
        out.extend(u16::try_from(additionals.len()).unwrap().to_be_bytes());
        out.extend(name(question));
        out.extend([0, 1, 0, 1]);
        out.extend(answers.concat());
        out.extend(additionals.concat());
        out
    }

    fn learned(message: &[u8]) -> Vec<String> {
        lesson(message, Some(&zone())).unwrap().addresses.keys().map(ToString::to_string).collect()
    }

    #[test]
    fn a_response_that_is_no_querys_teaches_nothing_and_bears_no_answer_about_the_zone() {
        let record = record("web.shop.svc.cluster.local", 1, &[10, 96, 0, 1]);
        for (question, answers, expected) in [
            ("web.shop.svc.cluster.local", vec![], Ok(Lesson::default())),
            ("example.com", vec![record.clone()], Ok(Lesson::default())),
            ("web.shop.svc.cluster.local", vec![record], Err(Unparsed { in_zone: true })),
        ] {
            let mut m = message(question, &answers, &[]);
            m[2] |= 0x28;
            assert_eq!(lesson(&m, Some(&zone())), expected);
        }
    }

    #[test]
    fn an_address_is_learned_where_its_owner_is_in_the_zone_whatever_the_case() {
        let m = message(
            "wEb.sHop.svc.cluster.local",
            &[record("WEB.shop.svc.cluster.local", 1, &[10, 96, 0, 1])],
            &[],
        );
        assert_eq!(learned(&m), ["10.96.0.1"]);
    }

    #[test]
    fn a_public_name_that_leads_into_the_zone_is_learned_and_a_name_that_leads_out_is_not() {
        let target = name("web.shop.svc.cluster.local");
        let inside = message(
            "www.example.test",
            &[
                record("www.example.test", 5, &target),
                record("web.shop.svc.cluster.local", 1, &[10, 96, 0, 1]),
            ],
            &[],
        );
        assert_eq!(learned(&inside), ["10.96.0.1"]);
        let outside = message(
            "ext.shop.svc.cluster.local",
            &[
                record("ext.shop.svc.cluster.local", 5, &name("www.example.test")),
                record("www.example.test", 1, &[1, 2, 3, 4]),
            ],
            &[],
        );
        assert!(learned(&outside).is_empty());
    }

    fn outside(message: &[u8], zone: Option<&Name>) -> Vec<String> {
        lesson(message, zone).unwrap().outside.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn addresses_that_names_outside_the_zone_lead_to_are_told_apart_and_glue_is_not_among_them() {
        let srv = [&[0, 0, 0, 0, 0, 80][..], &name("a.bank.test")].concat();
        let svcb = [0, 1, 0, 0, 4, 0, 4, 10, 1, 0, 7];
        let m = message(
            "www.bank.test",
            &[
                record("www.bank.test", 5, &name("b.bank.test")),
                record("b.bank.test", 1, &[10, 1, 0, 1]),
                record("b.bank.test", 33, &srv),
                record("b.bank.test", 65, &svcb),
                record("stray.bank.test", 1, &[10, 1, 0, 9]),
            ],
            &[record("a.bank.test", 1, &[10, 1, 0, 3]), record("glue.bank.test", 1, &[10, 1, 0, 8])],
        );
        assert_eq!(outside(&m, Some(&zone())), ["10.1.0.1", "10.1.0.3", "10.1.0.7"]);
        assert!(learned(&m).is_empty());
        let own = [record("web.shop.svc.cluster.local", 1, &[10, 96, 0, 1])];
        let inside = message("web.shop.svc.cluster.local", &own, &[]);
        assert!(outside(&inside, Some(&zone())).is_empty());
        assert_eq!(outside(&inside, None), ["10.96.0.1"], "without a zone every name is outside");
    }

    #[test]
    fn glue_and_unrelated_records_teach_nothing_but_srv_and_svcb_targets_do() {
        let glue = message(
            "a.example",
            &[record("web.shop.svc.cluster.local", 1, &[10, 96, 0, 9])],
            &[record("web.shop.svc.cluster.local", 1, &[10, 96, 0, 9])],
        );
        assert!(learned(&glue).is_empty());
        let srv = [&[0, 0, 0, 0, 0, 80][..], &name("web.shop.svc.cluster.local")].concat();
        let m = message(
            "_http._tcp.web.shop.svc.cluster.local",
            &[record("_http._tcp.web.shop.svc.cluster.local", 33, &srv)],
            &[record("web.shop.svc.cluster.local", 1, &[10, 96, 0, 1])],
        );
        assert_eq!(learned(&m), ["10.96.0.1"]);
        let svcb = [0, 1, 0, 0, 4, 0, 4, 10, 96, 0, 7];
        let m =
            message("web.shop.svc.cluster.local", &[record("web.shop.svc.cluster.local", 65, &svcb)], &[]);
        assert_eq!(learned(&m), ["10.96.0.7"]);
    }

    #[test]
    fn every_cut_of_an_answer_is_unparsed_and_keeps_its_zone() {
        let m = message(
            "web.shop.svc.cluster.local",
            &[record("web.shop.svc.cluster.local", 1, &[10, 96, 0, 1])],
            &[],
        );
        for end in 0..m.len() {
            let unparsed = lesson(&m[..end], Some(&zone())).unwrap_err();
            assert_eq!(unparsed.in_zone, end >= HEADER_LEN + 28, "{end}");
        }
        assert!(lesson(&[m, vec![0]].concat(), Some(&zone())).is_err());
    }

    #[test]
    fn compression_loops_and_long_alias_chains_end() {
        let mut looped = message("web.shop.svc.cluster.local", &[], &[]);
        looped[7] = 1;
        let at = u8::try_from(looped.len()).unwrap();
        looped.extend([0xc0, at, 0, 1, 0, 1, 0, 0, 0, 1, 0, 4, 1, 2, 3, 4]);
        assert_eq!(lesson(&looped, Some(&zone())), Err(Unparsed { in_zone: true }));
        let chain: Vec<_> = (0..1500)
            .rev()
            .map(|i| record(&format!("c{i}"), 5, &name(&format!("c{}", (i + 1) % 1500))))
            .collect();
        assert!(learned(&message("c0", &chain, &[])).is_empty());
    }

    #[test]
    fn record_data_of_every_short_length_is_unparsed_and_panics_nowhere() {
        for kind in [1, 5, 28, 33, 64, 65] {
            for len in 0..9 {
                for owner in ["web.shop.svc.cluster.local", "a.attacker.example"] {
                    let _ =
                        lesson(&message(owner, &[record(owner, kind, &vec![0xff; len])], &[]), Some(&zone()));
                    let _ =
                        lesson(&message(owner, &[record(owner, kind, &vec![0; len])], &[]), Some(&zone()));
                }
            }
        }
        let srv = message("a.attacker.example", &[record("a.attacker.example", 33, &[])], &[]);
        assert_eq!(lesson(&srv, Some(&zone())), Err(Unparsed { in_zone: false }));
    }

    #[test]
    fn a_message_of_pointers_to_pointers_is_given_up() {
        let mut m = message("web.shop.svc.cluster.local", &[], &[]);
        // An opaque record full of pointers, each to the one before it, and records whose owner is the last.
        let chain_at = m.len() + 11;
        let mut chain = vec![0, 0];
        for n in 0..4000usize {
            let target = if n == 0 { chain_at } else { chain_at + 2 * n };
            chain.extend(u16::try_from(0xc000 | target).unwrap().to_be_bytes());
        }
        let last = u16::try_from(0xc000 | (chain_at + chain.len() - 2)).unwrap();
        m.extend(record("", 99, &chain));
        for _ in 0..2000 {
            m.extend(last.to_be_bytes());
            m.extend([0, 1, 0, 1, 0, 0, 0, 1, 0, 4, 10, 96, 0, 1]);
        }
        m[6..8].copy_from_slice(&2001u16.to_be_bytes());
        assert_eq!(lesson(&m, Some(&zone())), Err(Unparsed { in_zone: true }));
    }

    #[test]
    fn an_answer_from_outside_that_leads_into_the_zone_and_does_not_parse_counts_as_one_about_the_zone() {
        let target = name("web.shop.svc.cluster.local");
        let mut m = message(
            "www.example.test",
            &[
                record("www.example.test", 5, &target),
                record("web.shop.svc.cluster.local", 1, &[10, 96, 0, 1]),
            ],
            &[],
        );
        m.push(0);
        assert_eq!(lesson(&m, Some(&zone())), Err(Unparsed { in_zone: true }));
    }

    #[test]
    fn an_answer_fits_only_its_own_question() {
        let mut query = message("web.shop.svc.cluster.local", &[], &[]);
        query[2] = 0x01;
        let answer = message("web.shop.svc.cluster.local", &[], &[]);
        assert!(answers(&answer, &query));
        assert!(!answers(&query, &query), "a query answers nothing");
        assert!(!answers(&message("wEb.shop.svc.cluster.local", &[], &[]), &query), "case is compared");
        assert!(!answers(&message("bad.shop.svc.cluster.local", &[], &[]), &query));
        let refused = [0x12, 0x34, 0x80, 5, 0, 0, 0, 0, 0, 0, 0, 0];
        assert!(answers(&refused, &query));
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300)) {
            let _ = lesson(&bytes, Some(&zone()));
            let _ = answers(&bytes, &bytes);
        }
    }
}
