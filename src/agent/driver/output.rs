//! Everything that the engine has to say, on its way out: records first, then batches, queries, datagrams and packets.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::time::Instant;

use anyhow::Context as _;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::EpollFlags;
use tracing::debug;

use super::sources::Source;
use super::{Driver, clocks};
use crate::agent::tun::Tun;
use crate::agent::udp::TunnelSocket;
use crate::control::FromAgent;
use crate::wire::coalesce::MAX_SEGMENTS;
use crate::wire::vnet::VNET_HEADER_LEN;

/// A datagram or packet that the kernel has no room for waits this long before it is dropped.
const ROOM_WAIT_MS: u8 = 10;
/// IoSlices per injected packet: the vnet header and every part of a train.
const PARTS: usize = 1 + MAX_SEGMENTS;

impl Driver {
    /// Hands out everything the engine has. What a successor has to know is written before anything else happens.
    pub(super) fn drain(&mut self) -> anyhow::Result<()> {
        if !self.session.parked {
            while let Some(record) = self.engine.poll_record() {
                self.kernel.state.write(record);
            }
        }
        while let Some(batch) = self.engine.poll_batch() {
            self.kernel.applier.submit(batch);
        }
        while let Some(addresses) = self.engine.poll_ask() {
            self.session.tell(&FromAgent::WhoIs(addresses), &[]);
        }
        while let Some(forward) = self.engine.poll_forward() {
            let query = forward.query;
            let engine = &mut self.engine;
            match self.kernel.queries.forward(&forward, |socket| engine.open_upstream(socket)) {
                Ok(fd) => {
                    let source = Source::Query(query);
                    let token = self.sources.add(source, fd, EpollFlags::EPOLLIN).context("watch a query")?;
                    self.query_tokens.insert(query, token);
                }
                Err(error) => {
                    debug!(error = format!("{error:#}"), "cannot forward a query");
                    self.engine.count_unforwarded();
                    self.engine.handle_dns_refused(query);
                    self.close_query(query);
                }
            }
        }
        while let Some(query) = self.engine.poll_expired_query() {
            self.close_query(query);
        }
        while let Some(stream) = self.engine.poll_broken_stream() {
            self.streams.close(stream);
            self.forget_closed_streams();
        }
        while let Some(socket) = self.streams.poll_closed() {
            self.engine.close_upstream(&socket);
        }
        while let Some((stream, message)) = self.engine.poll_stream() {
            self.streams.answer(stream, &message);
            // Room was made: the resolver's next messages may be read.
            self.pump(stream, clocks());
        }
        // Until then the sockets are the predecessor's.
        if !self.session.parked {
            self.transmit();
        }
        self.inject()
    }

    fn transmit(&mut self) {
        let mut refused = 0;
        while let Some(transmit) = self.engine.poll_transmit() {
            let socket =
                self.kernel.sockets.iter_mut().find(|(own, _)| own.is_ipv4() == transmit.to.is_ipv4());
            let lost = match socket {
                Some((_, socket)) => send_all(socket, transmit.to, transmit.bytes, transmit.segment),
                None => transmit.bytes.len().div_ceil(transmit.segment.max(1)) as u64,
            };
            refused += if transmit.packets { lost } else { 0 };
        }
        if refused > 0 {
            self.engine.count_unsent(refused);
        }
    }

    fn inject(&mut self) -> anyhow::Result<()> {
        while let Some(packet) = self.engine.poll_inject() {
            let (origin, packets) = (packet.origin, packet.packets);
            let taken = match &self.kernel.raw {
                None => {
                    let header = packet.vnet.encode();
                    let mut parts = [IoSlice::new(&[]); PARTS];
                    match parts.get_mut(..=packet.parts.len()) {
                        Some(parts) => {
                            parts[0] = IoSlice::new(&header[..VNET_HEADER_LEN]);
                            for (slot, range) in parts[1..].iter_mut().zip(packet.parts) {
                                *slot = IoSlice::new(&packet.buffer[range.clone()]);
                            }
                            write_all(&self.kernel.tun, parts)
                        }
                        // Refused rather than cut.
                        None => Err(io::ErrorKind::InvalidInput.into()),
                    }
                }
                Some(raw) => {
                    let mut whole: Vec<u8> = Vec::new();
                    packet
                        .parts
                        .iter()
                        .for_each(|range| whole.extend_from_slice(&packet.buffer[range.clone()]));
                    raw.inject(&mut whole, packet.vnet.partial_checksum)
                }
            };
            match taken {
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(libc::EBADFD) => {
                    self.engine.count_uninjected(origin, packets);
                    self.kernel.watch.note(Instant::now());
                }
                Err(error) => {
                    debug!(%error, "packet not injected");
                    self.engine.count_uninjected(origin, packets);
                }
            }
        }
        Ok(())
    }
}

/// Sends a train; returns how many datagrams the kernel refused.
fn send_all(socket: &mut TunnelSocket, to: SocketAddr, mut bytes: &[u8], segment: usize) -> u64 {
    let size = u16::try_from(segment).ok();
    loop {
        let error = match socket.send(to, bytes, size) {
            Ok(()) => return 0,
            Err(error) => error,
        };
        bytes = &bytes[error.sent.min(bytes.len())..];
        if error.source.kind() != io::ErrorKind::WouldBlock || !has_room(socket.as_fd()) {
            debug!(error = %error.source, %to, "datagrams not sent");
            return bytes.len().div_ceil(segment.max(1)) as u64;
        }
    }
}

fn write_all(tun: &Tun, parts: &[IoSlice<'_>]) -> io::Result<()> {
    loop {
        match tun.write_vectored(parts) {
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && has_room(tun.as_fd()) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Waits a moment for the kernel to take more.
fn has_room(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::POLLOUT)];
    poll(&mut fds, PollTimeout::from(ROOM_WAIT_MS)).is_ok_and(|ready| ready > 0)
}
