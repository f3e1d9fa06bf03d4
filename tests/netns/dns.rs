//! A tiny DNS asker: the question's bytes are ours, the answer's bytes come back untouched.
//!
//! May touch: sockets it makes inside a pod. Source: RFC 1035 §4, RFC 6891 (EDNS), RFC 7766 (TCP).

use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::time::Duration;

use crate::pod::Pod;

/// The id of every question, so that whole answers can be compared.
const ID: u16 = 0x7e9c;

/// One question.
#[derive(Clone, Copy, Debug)]
pub struct Question {
    /// The name asked for, dots as usual.
    pub name: &'static str,
    /// The record type's number.
    pub kind: u16,
    /// The opcode: 0 is a query, 2 STATUS, 4 NOTIFY.
    pub opcode: u8,
    /// The UDP payload size offered in an OPT record.
    pub edns: Option<u16>,
}

impl Question {
    /// A plain query.
    pub fn new(name: &'static str, kind: u16) -> Self {
        Self { name, kind, opcode: 0, edns: None }
    }

    /// The same question with an OPT record.
    pub fn edns(self, size: u16) -> Self {
        Self { edns: Some(size), ..self }
    }

    /// The same question with another opcode.
    pub fn opcode(self, opcode: u8) -> Self {
        Self { opcode, ..self }
    }

    /// The message's bytes.
    pub fn bytes(&self) -> Vec<u8> {
        bytes(self.name, self.kind, self.opcode, self.edns)
    }
}

/// The bytes of a question for any name.
pub fn bytes(name: &str, kind: u16, opcode: u8, edns: Option<u16>) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend(ID.to_be_bytes());
    out.extend([opcode << 3 | 1, 0]);
    out.extend([0, 1, 0, 0, 0, 0, 0, u8::from(edns.is_some())]);
    for label in name.trim_end_matches('.').split('.') {
        out.push(u8::try_from(label.len()).expect("a label"));
        out.extend(label.as_bytes());
    }
    out.push(0);
    out.extend(kind.to_be_bytes());
    out.extend([0, 1]);
    if let Some(size) = edns {
        out.extend([0, 0, 41]);
        out.extend(size.to_be_bytes());
        out.extend([0, 0, 0, 0, 0, 0]);
    }
    out
}

/// Asks over UDP from inside the pod, with one socket per question.
pub fn ask_udp(pod: &Pod, server: SocketAddr, question: &[u8], limit: Duration) -> Option<Vec<u8>> {
    let socket = pod.udp_for(server.ip());
    socket.set_read_timeout(Some(limit)).expect("time-out");
    socket.connect(server).ok()?;
    socket.send(question).ok()?;
    let mut answer = vec![0; 65_535];
    let n = socket.recv(&mut answer).ok()?;
    answer.truncate(n);
    Some(answer)
}

/// Asks over TCP from inside the pod.
pub fn ask_tcp(pod: &Pod, server: SocketAddr, question: &[u8], limit: Duration) -> Option<Vec<u8>> {
    let mut stream = pod.connect(server, limit).ok()?;
    let length = u16::try_from(question.len()).expect("a small question");
    stream.write_all(&[&length.to_be_bytes()[..], question].concat()).ok()?;
    let mut length = [0; 2];
    stream.read_exact(&mut length).ok()?;
    let mut answer = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut answer).ok()?;
    Some(answer)
}

/// The number of records in the answer section.
pub fn answers(answer: &[u8]) -> u16 {
    u16::from_be_bytes([answer[6], answer[7]])
}

/// Whether the answer says that it was cut short.
pub fn truncated(answer: &[u8]) -> bool {
    answer[2] & 2 != 0
}

/// An answer to a question of [`bytes`]: one A record.
pub fn answer(question: &[u8], address: [u8; 4]) -> Vec<u8> {
    let end = 12 + question[12..].iter().position(|byte| *byte == 0).expect("the end of the name") + 5;
    let mut out = question[..end].to_vec();
    out[2..12].copy_from_slice(&[0x85, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]);
    out.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 30, 0, 4]);
    out.extend(address);
    out
}
