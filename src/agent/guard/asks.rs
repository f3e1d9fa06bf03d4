//! Hears that the guard's rules met an address that nobody named: events of nfnetlink_log, without payload.
//!
//! An event names no address: it only says that the sets `asked` and `fresh` are to be read. Lost events are repeated by the
//! rules, once a second for each address that is still sent to.
//!
//! Source: linux/netfilter/nfnetlink_log.h.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST, NLMSG_ERROR};
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};

use super::LOG_GROUP;
use crate::wire::netlink::messages;

/// NFNL_SUBSYS_ULOG and NFULNL_MSG_CONFIG.
const CONFIG: u16 = 4 << 8 | 1;
/// NFULA_CFG_CMD with NFULNL_CFG_CMD_BIND.
const COMMAND: u16 = 1;
const BIND: u8 = 1;
/// NFULA_CFG_MODE with NFULNL_COPY_NONE.
const MODE: u16 = 2;
/// Events taken per turn.
const TURN: usize = 64;

/// The socket that events come on.
#[derive(Debug)]
pub(in crate::agent) struct Asks {
    socket: Socket,
    listens: bool,
}

impl Asks {
    /// Opens the socket in the calling thread's network namespace; before privileges are dropped.
    ///
    /// # Errors
    /// The kernel's.
    pub(in crate::agent) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket, listens: false })
    }

    /// Binds the log group, unless that is done. A group has one listener: a successor waits until its predecessor has ended.
    ///
    /// # Errors
    /// The kernel's; `EBUSY` where another process has the group.
    pub(in crate::agent) fn listen(&mut self) -> io::Result<()> {
        if self.listens {
            return Ok(());
        }
        self.socket.set_non_blocking(false)?;
        for (sequence, attribute) in [(1, command()), (2, no_payload())] {
            self.socket.send(&config(sequence, &attribute), 0)?;
            acknowledged(&self.socket, sequence)?;
        }
        self.socket.set_non_blocking(true)?;
        self.listens = true;
        Ok(())
    }

    /// Takes what came; whether anything did.
    pub(in crate::agent) fn drain(&self) -> bool {
        let mut any = false;
        if !self.listens {
            return any;
        }
        for _ in 0..TURN {
            let mut bytes = Vec::with_capacity(16);
            match self.socket.recv(&mut bytes, libc::MSG_TRUNC) {
                Ok(_) => any = true,
                // Events were lost: what they were about stands in the sets.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => any = true,
                Err(_) => break,
            }
        }
        any
    }
}

impl AsFd for Asks {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// One attribute: length, kind, value, padding.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).expect("a few bytes");
    let mut bytes = [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), value].concat();
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn command() -> Vec<u8> {
    attribute(COMMAND, &[BIND])
}

/// Copy range 0, mode 0.
fn no_payload() -> Vec<u8> {
    attribute(MODE, &[0; 6])
}

/// A configuration message: netlink header, nfgenmsg with the group, one attribute.
fn config(sequence: u32, attribute: &[u8]) -> Vec<u8> {
    let length = u32::try_from(20 + attribute.len()).expect("a few bytes");
    let flags = NLM_F_REQUEST | NLM_F_ACK;
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend(CONFIG.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    bytes.extend([0; 4]);
    bytes.extend([0, 0]);
    bytes.extend(LOG_GROUP.to_be_bytes());
    bytes.extend(attribute);
    bytes
}

fn acknowledged(socket: &Socket, sequence: u32) -> io::Result<()> {
    loop {
        let (answer, _) = socket.recv_from_full()?;
        for message in messages(&answer) {
            if message.kind == NLMSG_ERROR && message.sequence == sequence {
                return match message.error() {
                    Some(0) => Ok(()),
                    code => Err(io::Error::from_raw_os_error(-code.unwrap_or(-libc::EPROTO))),
                };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_message_has_the_kernels_layout() {
        let bytes = config(7, &command());
        assert_eq!(bytes.len(), 28);
        assert_eq!(bytes[..4], 28_u32.to_ne_bytes());
        assert_eq!(bytes[4..6], 0x0401_u16.to_ne_bytes());
        assert_eq!(bytes[16..20], [0, 0, 0x7e, 0x9c], "any family, version 0, the group in network order");
        assert_eq!(bytes[20..], [5, 0, 1, 0, 1, 0, 0, 0]);
        assert_eq!(config(8, &no_payload())[20..], [10, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    }
}
