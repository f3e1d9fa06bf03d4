//! ARP answers that the kernel withholds.
//!
//! Before it answers an ARP request the kernel looks up the way back to the asker, without mark and ports; for a protected
//! address on our own subnet it finds `tenc0`, and where rp_filter is effectively 1 (strict) it stays silent. The peer's
//! neighbour entry then dies, and the tunnel with it. So the agent answers requests *from protected addresses for OWN*.
//!
//! It does so whatever rp_filter says: the setting may change at any time, reading it on each request costs more than an
//! answer, and where the kernel answers too, the second reply says the same.
//!
//! 1. a packet socket brings the ARP requests for OWN on the pod's device, and nothing else (classic BPF filter)
//! 2. `reply` decides and builds the answer
//! 3. the answer leaves by the same socket
//!
//! IPv6 needs none of this: it has no rp_filter, and neighbour advertisements are sent without a route look-up.
//!
//! Source: RFC 826; arp_process in net/ipv4/arp.c.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use socket2::SockFilter;

use crate::sys::packet;

/// Ethernet header and ARP packet for IPv4.
const FRAME_LEN: usize = 42;

const ETHERTYPE_ARP: u16 = 0x0806;
/// Hardware type Ethernet, protocol IPv4, address lengths 6 and 4.
const ARP_FOR_ETHERNET: [u8; 6] = [0, 1, 8, 0, 6, 4];
const REQUEST: [u8; 2] = [0, 1];
const REPLY: [u8; 2] = [0, 2];
/// Requests answered per wake-up: the rest waits until packets were served.
const BATCH: usize = 16;

/// Answers ARP requests on one Ethernet device.
#[derive(Debug)]
pub struct ArpResponder {
    fd: OwnedFd,
    own: Ipv4Addr,
}

impl ArpResponder {
    /// Opens the socket on the device `index`, for requests for `own`.
    ///
    /// # Errors
    /// `EPERM`: needs CAP_NET_RAW.
    pub fn open(index: u32, own: Ipv4Addr) -> io::Result<Self> {
        Ok(Self { fd: packet::open(index, ETHERTYPE_ARP, &filter(own))?, own })
    }

    /// The device's hardware address as it is now: one that was changed a moment ago would lead a peer astray for half a minute.
    fn mac(&self) -> io::Result<[u8; 6]> {
        packet::hardware_address(&self.fd)
    }

    /// Answers what is queued, at most a batch of it.
    ///
    /// # Errors
    /// The device's, `ENETDOWN` among them.
    pub fn answer(&self, is_protected: impl Fn(Ipv4Addr) -> bool) -> io::Result<()> {
        let mut frame = [0; FRAME_LEN];
        for _ in 0..BATCH {
            let len = match nix::unistd::read(&self.fd, &mut frame) {
                Ok(len) => len,
                Err(nix::Error::EAGAIN) => break,
                Err(error) => return Err(error.into()),
            };
            if let Some(answer) = reply(&frame[..len], self.own, self.mac()?, &is_protected) {
                nix::unistd::write(&self.fd, &answer)?;
            }
        }
        Ok(())
    }
}

impl AsFd for ArpResponder {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The answer to `request`, an Ethernet frame, where it is an ARP request from a protected address for `own`.
fn reply(
    request: &[u8],
    own: Ipv4Addr,
    mac: [u8; 6],
    is_protected: impl Fn(Ipv4Addr) -> bool,
) -> Option<[u8; FRAME_LEN]> {
    let frame: &[u8; FRAME_LEN] = request.first_chunk()?;
    let asker_mac = &frame[22..28];
    let asker = Ipv4Addr::from(<[u8; 4]>::try_from(&frame[28..32]).expect("four bytes"));
    let wanted = Ipv4Addr::from(<[u8; 4]>::try_from(&frame[38..42]).expect("four bytes"));
    let answered = frame[12..14] == ETHERTYPE_ARP.to_be_bytes()
        && frame[14..20] == ARP_FOR_ETHERNET
        && frame[20..22] == REQUEST
        && asker_mac[0] & 1 == 0
        && asker_mac != mac
        && wanted == own
        && asker != own
        && is_protected(asker);
    answered.then(|| {
        let mut answer = *frame;
        answer[..6].copy_from_slice(asker_mac);
        answer[6..12].copy_from_slice(&mac);
        answer[20..22].copy_from_slice(&REPLY);
        answer[22..28].copy_from_slice(&mac);
        answer[28..32].copy_from_slice(&wanted.octets());
        answer[32..38].copy_from_slice(asker_mac);
        answer[38..42].copy_from_slice(&asker.octets());
        answer
    })
}

/// Passes ARP requests for `own`: ether type at 12, operation at 20, target address at 38.
fn filter(own: Ipv4Addr) -> [SockFilter; 8] {
    const LOAD_HALF: u16 = 0x28;
    const LOAD_WORD: u16 = 0x20;
    const JUMP_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    [
        SockFilter::new(LOAD_HALF, 0, 0, 12),
        SockFilter::new(JUMP_EQUAL, 0, 5, ETHERTYPE_ARP.into()),
        SockFilter::new(LOAD_HALF, 0, 0, 20),
        SockFilter::new(JUMP_EQUAL, 0, 3, 1),
        SockFilter::new(LOAD_WORD, 0, 0, 38),
        SockFilter::new(JUMP_EQUAL, 0, 1, own.into()),
        SockFilter::new(RETURN, 0, 0, 0xffff),
        SockFilter::new(RETURN, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
    const PEER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 3);
    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
    const PEER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 3];

    fn request(asker: Ipv4Addr, wanted: Ipv4Addr) -> Vec<u8> {
        let mut frame = vec![0xff; 6];
        frame.extend(PEER_MAC);
        frame.extend(ETHERTYPE_ARP.to_be_bytes());
        frame.extend(ARP_FOR_ETHERNET);
        frame.extend(REQUEST);
        frame.extend(PEER_MAC);
        frame.extend(asker.octets());
        frame.extend([0; 6]);
        frame.extend(wanted.octets());
        frame
    }

    fn answer(frame: &[u8]) -> Option<[u8; FRAME_LEN]> {
        reply(frame, OWN, MAC, |address| address == PEER)
    }

    #[test]
    fn a_protected_peer_that_asks_for_us_is_answered() {
        let answer = answer(&request(PEER, OWN)).unwrap();
        assert_eq!(answer[..6], PEER_MAC);
        assert_eq!(answer[6..12], MAC);
        assert_eq!(answer[12..22], [8, 6, 0, 1, 8, 0, 6, 4, 0, 2]);
        assert_eq!(answer[22..28], MAC);
        assert_eq!(answer[28..32], OWN.octets());
        assert_eq!(answer[32..38], PEER_MAC);
        assert_eq!(answer[38..], PEER.octets());
    }

    #[test]
    fn padding_behind_the_request_is_ignored() {
        let mut frame = request(PEER, OWN);
        frame.resize(60, 0);
        assert!(answer(&frame).is_some());
    }

    #[test]
    fn whoever_is_not_protected_or_wants_another_gets_no_answer() {
        assert_eq!(answer(&request(Ipv4Addr::new(10, 0, 0, 9), OWN)), None);
        assert_eq!(answer(&request(PEER, Ipv4Addr::new(10, 0, 0, 9))), None);
        assert_eq!(reply(&request(OWN, OWN), OWN, MAC, |_| true), None);
    }

    #[test]
    fn what_is_no_arp_request_for_ethernet_and_ipv4_gets_no_answer() {
        for (at, byte) in [(12, 0x86), (14, 9), (16, 0x86), (18, 8), (21, 2), (22, 1)] {
            let mut frame = request(PEER, OWN);
            frame[at] = byte;
            assert_eq!(answer(&frame), None, "byte {at}");
        }
        let frame = request(PEER, OWN);
        for len in 0..FRAME_LEN {
            assert_eq!(answer(&frame[..len]), None, "length {len}");
        }
    }
}
