//! The document for people: a line per pod, and for one pod also how its guard is, what the guard counted, and the pod's
//! peers, VIPs, flows and would-drop records.
//!
//! Columns are as wide as their longest word. What is left out is counted in a line of its own.

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

use crate::status::PodStatus;

const HEADERS: [&str; 10] =
    ["NAME", "PROJECT", "STATE", "AGENT", "REPLACED", "SEALED", "OPENED", "DROPPED", "PEERS", "FLOWS"];

/// A line per pod.
pub(super) fn pods<'s>(statuses: impl Iterator<Item = &'s PodStatus>) -> String {
    aligned(&HEADERS, statuses.map(pod).collect())
}

fn pod(status: &PodStatus) -> Vec<String> {
    let agent = status.agent.as_ref();
    let counters = status.counters.as_ref();
    let peers = status.peers.as_ref();
    vec![
        // It reaches a terminal: no escape sequences.
        status.name.chars().map(|c| if c.is_control() { '?' } else { c }).collect(),
        or_dash(status.project.clone()),
        status.state.as_str().to_owned(),
        or_dash(agent.map(|agent| agent.pid)),
        or_dash(agent.map(|agent| agent.replaced)),
        or_dash(counters.map(|counters| counters.totals.sealed)),
        or_dash(counters.map(|counters| counters.totals.opened)),
        or_dash(counters.map(|counters| counters.drops.values().sum::<u64>())),
        or_dash(peers.map(|peers| format!("{}/{}", peers.established, peers.total))),
        or_dash(status.flows),
    ]
}

/// Guard, peers, VIPs, flows and would-drop records of one pod, a table each; those without a line are left out.
pub(super) fn details(status: &PodStatus) -> String {
    let mut text = String::new();
    let mut section = |headers: &[&str], rows: Vec<Vec<String>>, left_out: u64| {
        if rows.is_empty() && left_out == 0 {
            return;
        }
        write!(text, "\n{}", aligned(headers, rows)).expect("a string");
        if left_out > 0 {
            writeln!(text, "({left_out} more)").expect("a string");
        }
    };
    section(&["DEGRADED"], status.degraded.iter().map(|reason| vec![reason.clone()]).collect(), 0);
    let headers = ["GUARD", "JUDGED-BY", "UNCLASSIFIED", "LINK-SCOPE", "DHCP", "RELEASED"];
    section(&headers, guard(status).into_iter().collect(), 0);
    let counted = status.guard.iter().flatten().filter(|(_, packets)| **packets > 0);
    let rows = counted.map(|(counter, packets)| vec![counter.clone(), packets.to_string()]);
    section(&["COUNTER", "PACKETS"], rows.collect(), 0);
    if let Some(peers) = &status.peers {
        let rows = peers.items.iter().map(|peer| {
            let since = peer.since_seconds.map(seconds);
            vec![
                peer.address.to_string(),
                yes(peer.established),
                or_dash(peer.standing.map(|standing| standing.as_str())),
                or_dash(peer.captured.map(yes)),
                or_dash(since),
            ]
        });
        let left_out = peers.total.saturating_sub(peers.items.len() as u64);
        section(&["PEER", "SESSION", "STANDING", "CAPTURED", "SINCE"], rows.collect(), left_out);
    }
    if let Some(vips) = &status.vips {
        let rows =
            vips.items.iter().map(|vip| vec![vip.address.to_string(), vip.standing.as_str().to_owned()]);
        section(&["VIP", "STANDING"], rows.collect(), vips.total.saturating_sub(vips.items.len() as u64));
    }
    if let Some(flows) = &status.flow_states {
        let rows = flows.items.iter().map(|flow| {
            vec![
                flow.state.as_str().to_owned(),
                protocol(flow.protocol),
                end(flow.local, flow.local_port),
                end(flow.remote, flow.remote_port),
                or_dash(flow.peer),
                or_dash(flow.idle_seconds.map(seconds)),
            ]
        });
        let headers = ["FLOW", "PROTOCOL", "LOCAL", "REMOTE", "PEER", "IDLE"];
        section(&headers, rows.collect(), flows.left_out);
    }
    if let Some(would) = &status.would_drop {
        let rows = would.items.iter().map(|record| {
            vec![
                record.reason.clone(),
                protocol(record.protocol),
                end(record.source, record.source_port),
                end(record.destination, record.destination_port),
                record.packets.to_string(),
                seconds(record.idle_seconds),
                or_dash(record.standing.map(|standing| standing.as_str())),
            ]
        });
        let headers = ["WOULD-DROP", "PROTOCOL", "SOURCE", "DESTINATION", "PACKETS", "IDLE", "STANDING"];
        section(&headers, rows.collect(), would.left_out);
    }
    text
}

/// How the guard is; nothing where no launcher answered.
fn guard(status: &PodStatus) -> Option<Vec<String>> {
    let allowed = |allowed: bool| if allowed { "pass" } else { "drop" }.to_owned();
    Some(vec![
        status.guard_state.clone()?,
        or_dash(status.judged_by.clone()),
        or_dash(status.unclassified.clone()),
        or_dash(status.allow_link_scope.map(allowed)),
        or_dash(status.allow_dhcp.map(allowed)),
        or_dash(status.released),
    ])
}

fn or_dash(word: Option<impl ToString>) -> String {
    word.map_or_else(|| "-".to_owned(), |word| word.to_string())
}

fn yes(is: bool) -> String {
    if is { "yes" } else { "no" }.to_owned()
}

fn seconds(n: u64) -> String {
    format!("{n}s")
}

fn protocol(number: u8) -> String {
    match number {
        1 => "icmp".to_owned(),
        6 => "tcp".to_owned(),
        17 => "udp".to_owned(),
        58 => "icmpv6".to_owned(),
        132 => "sctp".to_owned(),
        _ => number.to_string(),
    }
}

fn end(address: IpAddr, port: Option<u16>) -> String {
    port.map_or_else(|| address.to_string(), |port| SocketAddr::new(address, port).to_string())
}

fn aligned(headers: &[&str], rows: Vec<Vec<String>>) -> String {
    let headers = headers.iter().map(|&word| word.to_owned()).collect();
    let rows: Vec<Vec<String>> = [headers].into_iter().chain(rows).collect();
    let columns = rows[0].len();
    let widths: Vec<usize> = (0..columns)
        .map(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default())
        .collect();
    let mut text = String::new();
    for row in &rows {
        let mut line = String::new();
        for (word, width) in row.iter().zip(&widths) {
            write!(line, "{word:width$}  ").expect("a string");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launcher::serve::collect::tests::protected;

    fn words(text: &str) -> Vec<Vec<&str>> {
        text.lines().map(|line| line.split_whitespace().collect()).collect()
    }

    #[test]
    fn the_table_has_a_line_per_pod_and_dashes_for_what_nobody_knows() {
        let closed = PodStatus::closed("b".to_owned(), "no launcher");
        let text = pods([protected("pod-a"), closed].iter());
        let lines = words(&text);
        assert_eq!(lines[0], HEADERS);
        assert_eq!(lines[1], ["pod-a", "shop", "protected", "8", "1", "10", "20", "7", "1/700", "6"]);
        assert_eq!(lines[2], ["b", "-", "closed", "-", "-", "-", "-", "-", "-", "-"]);
        assert!(text.starts_with("NAME   PROJECT  STATE      AGENT  "), "{text}");
        assert_eq!(pods([].iter()).lines().count(), 1);
    }

    #[test]
    fn one_pod_is_told_with_peers_flows_and_what_strict_mode_would_drop() {
        let text = details(&protected("a"));
        let lines = words(&text);
        for line in [
            &["dns", "not", "captured", "(socket", "LB)"][..],
            &["open", "ranges", "drop", "drop", "pass", "3"],
            &["dns_uncaptured", "9"],
            &["10.1.1.12", "yes", "able", "yes", "60s"],
            &["(699", "more)"],
            &["10.96.1.1", "passed"],
            &["protected", "tcp", "10.1.1.11:4000", "10.1.1.12:80", "10.1.1.12", "1s"],
            &["passed", "udp", "10.1.1.11:5", "10.1.1.12:53", "-", "3s"],
            &["(5", "more)"],
            &["outbound_egress", "udp", "10.1.1.11:5", "10.1.1.12:53", "7", "3s", "able"],
        ] {
            assert!(lines.iter().any(|found| found == line), "{line:?}:\n{text}");
        }
        assert_eq!(details(&PodStatus::closed("b".to_owned(), "no launcher")), "");
    }
}
