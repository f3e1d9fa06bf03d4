//! Floods of initiations with a valid MAC1 on a real agent, which anybody can make who knows the pod's public key.
//!
//! 1. a pod of another project sends 20,000 of them each second, under a thousand addresses that answer no cookie, and
//!    under fifty that do: it is told what the victim said to those, and writes their MAC2. The fifty are workloads of the
//!    victim's directory: the guard lets no cookie out to anybody else
//! 2. control: the same flood to a port of the victim that nobody listens on
//! 3. iperf3 of the victim keeps four fifths of what the control leaves it, a peer that the victim never met connects
//!    within two seconds, and the agent's memory stays what it was
//!
//! May touch: frames on the attacker's device, an agent for shop-lone.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use blake2::digest::consts::U16;
use blake2::digest::{FixedOutput as _, KeyInit as _, Mac as _};
use blake2::{Blake2s256, Blake2sMac, Digest as _};
use chacha20poly1305::aead::AeadInOut as _;
use chacha20poly1305::{Tag, XChaCha20Poly1305, XNonce};
use nix::unistd::Pid;

use tencrypt::proto::noise::PublicKey;

use crate::Case;
use crate::attackers::{Attack, VICTIM, grown, project_key};
use crate::lab::{Lab, Launched, PROJECT, TUNNEL_PORT};
use crate::load;
use crate::packets;
use crate::pod::Frames;
use crate::services::replace;
use crate::status;

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case::new("promise_10_a_flood_from_1000_sources_that_answer_no_cookie_leaves_peers_four_fifths", silent)
        .sealed()
        .seconds(120),
    Case::new("promise_10_a_flood_from_50_sources_that_answer_cookies_leaves_peers_four_fifths", answering)
        .sealed()
        .seconds(120),
];

/// Messages each second.
const RATE: u32 = 20_000;
const SILENT: u32 = 1_000;
const ANSWERING: u32 = 50;
/// Nobody listens here, and no guard asks.
const CLOSED: u16 = 9_630;
/// The web server of the victim.
const WEB: u16 = 8_080;
/// What a peer may wait for.
const NEWCOMER: Duration = Duration::from_secs(2);
/// The agent has noticed the flood by then.
const NOTICED: Duration = Duration::from_millis(300);
/// The machine may be busy with something else for one of them.
const ROUNDS: usize = 3;
/// What the agent's memory may grow by.
const MEMORY_KIB: u64 = 4_096;

/// An address that is nobody's.
fn source(n: u32) -> IpAddr {
    Ipv4Addr::from_bits(u32::from(Ipv4Addr::new(10, 200, 0, 1)) + n).into()
}

/// Another one, for the comparison with a closed port.
fn stranger(source: IpAddr) -> IpAddr {
    let IpAddr::V4(source) = source else { return source };
    Ipv4Addr::from_bits(source.to_bits() + (1 << 16)).into()
}

/// Manifests of Pods with these addresses; gone when it is dropped.
struct Workloads(PathBuf);

impl Workloads {
    fn write(lab: &Lab, addresses: impl Iterator<Item = IpAddr>) -> Self {
        let file = lab.directory(PROJECT).join("flood.yaml");
        let pod = |(n, address): (usize, IpAddr)| {
            format!(
                "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: flood-{n}, namespace: {PROJECT}}}\n\
                 status: {{phase: Running, podIPs: [{{ip: {address}}}]}}\n"
            )
        };
        replace(&file, &addresses.enumerate().map(pod).collect::<String>());
        Self(file)
    }
}

impl Drop for Workloads {
    fn drop(&mut self) {
        // The lab may be gone.
        let _ = fs::remove_file(&self.0);
    }
}

fn mac(key: &[u8], bytes: &[u8]) -> [u8; 16] {
    let mac = <Blake2sMac<U16> as blake2::digest::KeyInit>::new_from_slice(key).expect("a key");
    mac.chain_update(bytes).finalize_fixed().into()
}

fn label(label: &[u8], public: &PublicKey) -> [u8; 32] {
    Blake2s256::new().chain_update(label).chain_update(public.0).finalize().into()
}

/// An initiation with a valid MAC1, which does not decrypt.
fn noise(n: u32, receiver: &PublicKey) -> Vec<u8> {
    let mut message = vec![0; 148];
    message[0] = 1;
    message[4..8].copy_from_slice(&n.to_le_bytes());
    message[8..40].fill(9);
    let mac1 = mac(&label(b"mac1----", receiver), &message[..116]);
    message[116..132].copy_from_slice(&mac1);
    message
}

/// Writes MAC2 with the cookie of a reply to this very message.
fn prove(message: &mut [u8], reply: &[u8], receiver: &PublicKey) {
    let cipher = XChaCha20Poly1305::new(&label(b"cookie--", receiver).into());
    let nonce: [u8; 24] = reply[8..32].try_into().expect("24 bytes");
    let (mut cookie, tag): ([u8; 16], [u8; 16]) =
        (reply[32..48].try_into().expect("16 bytes"), reply[48..64].try_into().expect("16 bytes"));
    cipher
        .decrypt_inout_detached(
            &XNonce::from(nonce),
            &message[116..132],
            (&mut cookie[..]).into(),
            &Tag::from(tag),
        )
        .expect("a cookie that the victim sealed");
    let mac2 = mac(&cookie, &message[..132]);
    message[132..].copy_from_slice(&mac2);
}

/// The messages of a flood, and whose they are said to be.
struct Flood<'l> {
    attack: Attack<'l>,
    messages: Vec<(IpAddr, Vec<u8>)>,
    /// The sources that answer.
    _workloads: Option<Workloads>,
}

impl<'l> Flood<'l> {
    fn new(lab: &'l Lab, sources: u32, answering: bool) -> Self {
        let attack = Attack::on(lab, VICTIM);
        // Of the comparison with a closed port.
        lab.declare(["udp", "icmp"].map(|protocol| format!("10.200.0.0-10.201.255.255/{protocol}")));
        let receiver = project_key(lab).static_secret(attack.victim.v4.into()).public();
        // Those that are silent may have used up their replies a moment ago.
        let first = if answering { SILENT } else { 0 };
        let messages = (first..first + sources).map(|n| (source(n), noise(n, &receiver))).collect();
        let workloads = answering.then(|| Workloads::write(lab, (first..first + sources).map(source)));
        if answering {
            load::await_route(lab, VICTIM, source(first + sources - 1));
        }
        let mut flood = Self { attack, messages, _workloads: workloads };
        if answering {
            flood.answer(&receiver);
        }
        flood
    }

    /// Every source gets its cookie.
    fn answer(&mut self, receiver: &PublicKey) {
        let tap = self.attack.victim.sniff();
        self.run_for(Duration::from_millis(300), TUNNEL_PORT);
        let (mut answered, total) = (0, self.messages.len());
        let end = Instant::now() + Duration::from_secs(2);
        let frames = std::iter::from_fn(|| {
            thread::sleep(Duration::from_millis(10));
            (Instant::now() < end).then(|| tap.drain())
        });
        for frame in frames.flatten() {
            let Some(seen) = packets::seen(&frame).filter(|_| packets::sealed(&frame) == Some(3)) else {
                continue;
            };
            let Some(reply) = packets::udp_payload(&frame) else { continue };
            let mine = self.messages.iter_mut().find(|(source, message)| {
                // Two replies may come; the second is to a message that is not the first one any more.
                *source == seen.to && message[132..] == [0; 16]
            });
            if let Some((_, message)) = mine {
                prove(message, reply, receiver);
                answered += 1;
            }
            if answered == total {
                break;
            }
        }
        assert_eq!(answered, total, "sources that got a cookie");
    }

    fn frames(&self, port: u16) -> Vec<Vec<u8>> {
        let (from, to) = (self.attack.attacker.mac(), self.attack.victim.mac());
        let victim = self.attack.victim.v4.into();
        let packet = |(source, message): &(IpAddr, Vec<u8>)| {
            let source = if port == TUNNEL_PORT { *source } else { stranger(*source) };
            packets::frame(from, to, &packets::udp(source, victim, TUNNEL_PORT, port, message))
        };
        self.messages.iter().map(packet).collect()
    }

    fn run_for(&self, time: Duration, port: u16) {
        let (end, stop) = (Instant::now() + time, AtomicBool::new(false));
        send(&self.attack.attacker.frames(), &self.frames(port), &stop, &AtomicU64::new(0), end);
    }

    /// Floods a port while `f` runs, ten seconds at most: what `f` gave, and how many messages each second.
    fn during<T>(&self, port: u16, f: impl FnOnce() -> T) -> (T, u64) {
        let (stop, sent) = (AtomicBool::new(false), AtomicU64::new(0));
        let (out, frames) = (self.attack.attacker.frames(), self.frames(port));
        let begun = Instant::now();
        let end = begun + Duration::from_secs(if crate::long() { 60 } else { 10 });
        let given = thread::scope(|scope| {
            scope.spawn(|| send(&out, &frames, &stop, &sent, end));
            let given = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f));
            stop.store(true, Ordering::Release);
            given
        });
        let per_second =
            u128::from(sent.load(Ordering::Acquire)) * 1_000 / begun.elapsed().as_millis().max(1);
        let given = given.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        (given, u64::try_from(per_second).expect("a rate"))
    }
}

/// Sends the frames over and over at [`RATE`].
fn send(out: &Frames, frames: &[Vec<u8>], stop: &AtomicBool, sent: &AtomicU64, end: Instant) {
    let (begun, mut n) = (Instant::now(), 0);
    while !stop.load(Ordering::Acquire) && Instant::now() < end {
        let due = begun.elapsed().as_micros() * u128::from(RATE) / 1_000_000;
        while u128::from(n) < due {
            // A full queue loses some: fine.
            let _ = out.send(&frames[usize::try_from(n).expect("a count") % frames.len()]);
            n += 1;
        }
        sent.store(n, Ordering::Release);
        thread::sleep(Duration::from_micros(500));
    }
}

/// What has to be left of goodput. The short form, on whatever machine, shows that it does not collapse.
fn least() -> f64 {
    if crate::long() { 0.8 } else { 0.5 }
}

/// What the victim sends to its peer, in bits per second.
fn goodput(lab: &Lab) -> f64 {
    let seconds = if crate::long() { 10 } else { 2 };
    let command = format!("iperf3 -c iperf -p 5201 -t {seconds} --connect-timeout 3000 -J");
    let ran = lab.exec(VICTIM, &command, Duration::from_secs(seconds + 10));
    let report: serde_json::Value = serde_json::from_str(&ran.out).unwrap_or_default();
    report["end"]["sum_received"]["bits_per_second"]
        .as_f64()
        .unwrap_or_else(|| panic!("iperf3: exit {} {}{}", ran.code, ran.out, ran.err))
}

fn memory_kib(pid: Pid) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the agent's status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

fn leaves_four_fifths(lab: &Lab, flood: &Flood) {
    // Whoever never met the victim.
    let mut lone = Launched::pod(lab, "shop-lone", &lab.directory(PROJECT), &lab.key_file(PROJECT));
    // The launcher, and its agent.
    let agents = lab.agent_pids(VICTIM);
    let agent = agents[1];
    goodput(lab);
    let (before, memory) = (status::drops(lab, VICTIM), memory_kib(agent));
    // Of one round: the flood was one, and left what it has to leave.
    let is_good =
        |(share, _, _, rate): &(f64, f64, f64, u64)| *share >= least() && *rate >= u64::from(RATE / 2);
    let mut measured = Vec::new();
    let mut newcomer = None;
    for _ in 0..ROUNDS {
        let (closed, _) = flood.during(CLOSED, || {
            thread::sleep(NOTICED);
            goodput(lab)
        });
        let (open, rate) = flood.during(TUNNEL_PORT, || {
            thread::sleep(NOTICED);
            if newcomer.is_none() {
                let begun = Instant::now();
                let to = (flood.attack.victim.v4, WEB);
                newcomer = lab.pod("shop-lone").connect(to, NEWCOMER).ok().map(|_| begun.elapsed());
            }
            goodput(lab)
        });
        measured.push((open / closed, open, closed, rate));
        if newcomer.is_some() && measured.iter().any(is_good) {
            break;
        }
    }
    let (dropped, grown_by) = (status::drops(lab, VICTIM), memory_kib(agent).saturating_sub(memory));
    crate::say(&format!(
        "of the flood, in bit/s (share, open, closed, messages/s): {measured:.2?}; newcomer after {newcomer:.0?}; \
         memory +{grown_by} KiB; cookie_missing {}, source_limit {}, handshake_invalid {}",
        grown(&before, &dropped, "cookie_missing"),
        grown(&before, &dropped, "source_limit"),
        grown(&before, &dropped, "handshake_invalid"),
    ));
    assert!(measured.iter().any(is_good), "{measured:?}");
    assert!(newcomer.is_some(), "no newcomer connects within {NEWCOMER:?}");
    assert!(grown_by <= MEMORY_KIB, "the agent grew by {grown_by} KiB");
    let refused = grown(&before, &dropped, "cookie_missing") + grown(&before, &dropped, "source_limit");
    assert!(refused >= u64::from(RATE), "the agent did not see the flood: {dropped:?}");
    assert_eq!(lab.agent_pids(VICTIM), agents, "the agent or its launcher ended");
    assert_eq!(lone.stop(), Some(0), "{}", lone.printed());
}

fn silent(lab: &Lab) {
    leaves_four_fifths(lab, &Flood::new(lab, SILENT, false));
}

fn answering(lab: &Lab) {
    leaves_four_fifths(lab, &Flood::new(lab, ANSWERING, true));
}
