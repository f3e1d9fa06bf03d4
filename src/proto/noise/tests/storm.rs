//! Two hundred agents that are restarted at once, over a simulated network.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use rand::{Rng, SeedableRng};

use super::super::*;
use super::pair::*;

const AGENTS: usize = 200;
/// Agents on each side, in the order of their numbers, that an agent talks to.
const NEIGHBOURS: usize = 8;
/// Until the last of them runs again.
const RESTART_MS: u32 = 1_000;
const LATENCY: Duration = ms(1);

fn own(agent: usize) -> IpAddr {
    Ipv4Addr::from_bits(0x0a01_0001 + u32::try_from(agent).unwrap()).into()
}

fn number(address: IpAddr) -> usize {
    (0..AGENTS).find(|agent| own(*agent) == address).unwrap()
}

fn key(agent: usize) -> StaticSecret {
    let mut bytes = [7; 32];
    // Clear of the bits that X25519 does not use.
    bytes[8..16].copy_from_slice(&(agent as u64).to_le_bytes());
    StaticSecret(bytes)
}

fn talks_to(agent: usize) -> impl Iterator<Item = usize> {
    (1..=NEIGHBOURS).flat_map(move |n| [(agent + n) % AGENTS, (agent + AGENTS - n) % AGENTS])
}

/// An agent that wants all its sessions back at once.
fn restarted(agent: usize, publics: &[PublicKey], now: Now) -> (Transport, Vec<PeerId>) {
    let identity = Identity { address: own(agent), secret: key(agent) };
    let rng = ChaCha20Rng::seed_from_u64(agent as u64);
    let mut transport = Transport::new(vec![identity], Options::default(), rng);
    let add = |peer: usize| {
        let keys = PeerKeys { public: publics[peer], psk: psk() };
        let id = transport.add_peer(PeerConfig { address: own(peer), port: PORT, keys, accept: None }, now);
        transport.begin(id, now);
        id
    };
    let ids = talks_to(agent).map(add).collect();
    (transport, ids)
}

#[test]
fn two_hundred_agents_restarted_at_once_are_back_within_five_seconds_without_a_storm() {
    let start = epoch();
    let mut rng = ChaCha20Rng::seed_from_u64(1);
    let publics: Vec<_> = (0..AGENTS).map(|agent| key(agent).public()).collect();
    let mut starts = BTreeMap::new();
    for agent in 0..AGENTS {
        let after = Duration::from_millis((rng.next_u32() % RESTART_MS).into());
        starts.insert((start.instant + after, agent), ());
    }
    let mut agents: Vec<Option<(Transport, Vec<PeerId>)>> = (0..AGENTS).map(|_| None).collect();
    let mut wire = BTreeMap::<(Instant, u64), (usize, usize, Vec<u8>)>::new();
    let (mut serial, mut initiations) = (0, BTreeMap::<(usize, usize), usize>::new());
    let end = start.instant + Duration::from_millis(RESTART_MS.into()) + secs(5);
    loop {
        let timers = agents.iter().flatten().filter_map(|(transport, _)| transport.poll_timeout());
        let next = [starts.keys().next().map(|(at, _)| *at), wire.keys().next().map(|(at, _)| *at)];
        let Some(instant) = timers.chain(next.into_iter().flatten()).min().filter(|at| *at <= end) else {
            break;
        };
        let now = Now { instant, wall: start.wall + instant.duration_since(start.instant) };
        while let Some(entry) = starts.first_entry().filter(|entry| entry.key().0 <= instant) {
            let (_, agent) = *entry.key();
            entry.remove();
            agents[agent] = Some(restarted(agent, &publics, now));
        }
        while let Some(entry) = wire.first_entry().filter(|entry| entry.key().0 <= instant) {
            let (from, to, mut bytes) = entry.remove();
            if let Some((transport, _)) = &mut agents[to] {
                let _ = transport.handle(SocketAddr::new(own(from), PORT), &mut bytes, now);
            }
        }
        for (from, slot) in agents.iter_mut().enumerate() {
            let Some((transport, _)) = slot else { continue };
            while transport.poll_timeout().is_some_and(|at| at <= instant) {
                transport.handle_timeout(now);
            }
            while let Some((to, bytes)) = transport.poll_transmit() {
                let to = number(to.ip());
                *initiations.entry((from, to)).or_default() += usize::from(bytes[0] == 1);
                serial += 1;
                wire.insert((instant + LATENCY, serial), (from, to, bytes));
            }
        }
    }
    let now = Now { instant: end, wall: start.wall + end.duration_since(start.instant) };
    for (agent, slot) in agents.iter_mut().enumerate() {
        let (transport, ids) = slot.as_mut().unwrap();
        for (peer, id) in talks_to(agent).zip(ids) {
            assert!(transport.seal(*id, now).is_some(), "{agent} cannot seal for {peer}");
        }
    }
    let most = initiations.values().max().copied().unwrap();
    assert!((1..=6).contains(&most), "{most} initiations of one pair in one direction");
}
