//! What fuzzing found, once more: every file of `tests/fuzz/corpus` through its target.

use std::fs;
use std::path::Path;

/// The targets, as the fuzzer runs them.
#[path = "fuzz/targets/mod.rs"]
pub mod targets;

/// Replays a target's corpus; at least `least` files, so that an empty folder is noticed.
fn replay(name: &str, target: fn(&[u8]), least: usize) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(name);
    let mut files: Vec<_> = fs::read_dir(&folder)
        .expect("the target's folder")
        .map(|entry| entry.expect("a readable entry").path())
        .collect();
    files.sort();
    assert!(files.len() >= least, "{} files in {}", files.len(), folder.display());
    for file in files {
        let bytes = fs::read(&file).expect("a readable file");
        assert!(std::panic::catch_unwind(|| target(&bytes)).is_ok(), "{}", file.display());
    }
}

#[test]
fn no_datagram_of_a_stranger_moves_a_transport() {
    replay("message_parser", targets::message_parser, 20);
}

#[test]
fn record_opens_once_and_only_as_it_was_sealed() {
    replay("session_open", targets::session_open, 20);
}

#[test]
fn two_transports_meet_again_whatever_happened_between_them() {
    replay("handshake", targets::handshake, 20);
}

#[test]
fn every_packet_of_the_channel_is_a_message_or_refused() {
    replay("control_channel", targets::control_channel, 20);
}

#[test]
fn no_dns_message_panics() {
    replay("dns_answer", targets::dns_answer, 5);
}

#[test]
fn no_inner_packet_panics() {
    replay("inner_packet", targets::inner_packet, 5);
}
