//! What an agent says about itself when it is asked: one message, however large the project is.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// Most peers that a report names; the rest are counted.
pub const REPORTED_PEERS_MAX: usize = 512;

/// Most words with a count in one list: several times as many as there are reasons to drop a packet.
const WORDS_MAX: usize = 128;

/// Longest such word, in bytes.
const WORD_MAX: usize = 64;

/// Most lines on what stands in the way of protection.
const STANDING_MAX: usize = 64;

/// Longest of them, in bytes.
const LINE_MAX: usize = 256;

/// Counters and tables of one agent at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The directory that was committed last; none before the first.
    pub generation: Option<u64>,
    /// Packets sealed and handed to the network.
    pub sealed: u64,
    /// Packets opened and handed to the pod's stack.
    pub opened: u64,
    /// DNS queries forwarded.
    pub dns_forwarded: u64,
    /// Packets dropped, by reason; reasons that did not occur are left out.
    pub drops: Vec<(String, u64)>,
    /// Flows in the table.
    pub flows: u64,
    /// At most [`REPORTED_PEERS_MAX`] peers, those with a session first, in the order of their addresses.
    pub peers: Vec<PeerReport>,
    /// Peers of the directory.
    pub peers_total: u64,
    /// Those of them with a session.
    pub peers_established: u64,
    /// Foreign changes of what the agent made, by kind.
    pub tampering: Vec<(String, u64)>,
    /// Foreign changes that could not be undone: as long as there is one, the pod does not count as protected.
    pub standing: Vec<String>,
}

/// One peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerReport {
    /// Its address.
    pub address: IpAddr,
    /// There is a session.
    pub established: bool,
}

impl Report {
    /// Checks the limits; within them, a report fits one message.
    pub(super) fn validate(&self) -> Result<(), &'static str> {
        let is_word = |word: &str| {
            (1..=WORD_MAX).contains(&word.len())
                && word.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
        };
        for counts in [&self.drops, &self.tampering] {
            if counts.len() > WORDS_MAX || !counts.iter().all(|(word, _)| is_word(word)) {
                return Err("counted words");
            }
        }
        if self.peers.len() > REPORTED_PEERS_MAX {
            return Err("count of peers");
        }
        // They reach a terminal: no escape sequences.
        let is_line = |line: &String| line.len() <= LINE_MAX && !line.chars().any(char::is_control);
        if self.standing.len() > STANDING_MAX || !self.standing.iter().all(is_line) {
            return Err("what stands");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use super::*;
    use crate::agent::control::{FromAgent, MESSAGE_MAX, Message as _};

    #[test]
    fn the_longest_report_fits_one_message_and_a_longer_one_is_refused() {
        let words = vec![("w".repeat(WORD_MAX), u64::MAX); WORDS_MAX];
        let peer = PeerReport { address: Ipv6Addr::from(u128::MAX).into(), established: true };
        let full = Report {
            generation: Some(u64::MAX),
            drops: words.clone(),
            tampering: words,
            peers: vec![peer; REPORTED_PEERS_MAX],
            standing: vec!["x".repeat(LINE_MAX); STANDING_MAX],
            ..Report::default()
        };
        let message = FromAgent::Report(Box::new(full.clone()));
        message.validate().unwrap();
        assert!(postcard::to_stdvec(&message).unwrap().len() < MESSAGE_MAX);

        let mut peers = full.clone();
        peers.peers.push(peer);
        let mut words = full.clone();
        words.drops.push(("one_more".to_owned(), 1));
        let hostile = |word: &str| Report { drops: vec![(word.to_owned(), 1)], ..Report::default() };
        let line = Report { standing: vec!["\u{1b}[2J".to_owned()], ..Report::default() };
        for wrong in [peers, words, hostile(""), hostile("a b"), hostile("\u{1b}"), line] {
            assert!(FromAgent::Report(Box::new(wrong)).validate().is_err());
        }
    }
}
