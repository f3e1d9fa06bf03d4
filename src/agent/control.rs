//! The channel between launcher and agent: one message per SOCK_SEQPACKET packet, descriptors by SCM_RIGHTS.
//!
//! 1. `send` encodes a message (postcard) into at most [`MESSAGE_MAX`] bytes and attaches descriptors
//! 2. the kernel keeps message boundaries and the descriptors' place
//! 3. `recv` takes one packet, decodes it completely and checks every length, count and range
//!
//! The order of a session: `Init` (with the DNS helper's descriptors), `Changes`… `Commit`, then `Ready` (with `tenc0` and
//! the UDP sockets) from the agent; later more `Changes`… `Commit`, `Counters` from the agent; `Stop`, then `Stopped`.
//!
//! Bytes and descriptors from the other end are hostile input on either side: what does not decode to the last byte,
//! carries more descriptors than its type may, or breaks a stated limit is an error, never a panic. Descriptors that were
//! received with a refused message are closed. Buffers are zeroised: they carry keys. May touch: its own socket.
//! Source: unix(7), cmsg(3), recvmsg(2).

use std::io::{self, IoSlice, IoSliceMut};
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, sockopt,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use zeroize::{ZeroizeOnDrop, Zeroizing};

use crate::proto::directory::{Change, Vip};
use crate::proto::noise::StaticSecret;

/// Largest encoded message, in bytes. Four fit the kernel's default socket buffer.
pub const MESSAGE_MAX: usize = 64 * 1024;

/// Room for encoded changes in one [`ToAgent::Changes`]: the rest is the variant and the count.
const CHUNK_MAX: usize = MESSAGE_MAX - 16;

/// Most endpoints of one VIP that are sent, over all its ports: at most 22 bytes each, so that a VIP fits one message.
pub const VIP_ENDPOINTS_MAX: usize = 2_048;

/// Most ports of one VIP that are sent; they and the endpoints stay below [`CHUNK_MAX`] together.
pub const VIP_PORTS_MAX: usize = 1_024;

/// SCM_MAX_FD of the kernel: more never arrive in one packet, so received control data is never cut by our buffer.
const KERNEL_DESCRIPTORS_MAX: usize = 253;

/// Most own addresses of a workload: Kubernetes gives one per family; a few more cost nothing.
const ADDRESSES_MAX: usize = 16;

/// Most resolvers: glibc reads three lines, musl too; a dual-stack list doubles them.
const RESOLVERS_MAX: usize = 16;

/// Most counters in one message, and the longest name.
const COUNTERS_MAX: usize = 512;
const COUNTER_NAME_MAX: usize = 64;

/// Longest reason of a failure, in bytes.
const REASON_MAX: usize = 4_096;

/// How packets from peers are handed to the pod's stack.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Inject {
    /// TUN where the kernel allows it.
    #[default]
    Auto,
    /// Written to `tenc0`, as super-packets.
    Tun,
    /// Through raw sockets on `lo`.
    Raw,
}

/// One address of the protected workload and the private key that belongs to it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct OwnAddress {
    /// The pod's address.
    pub address: IpAddr,
    /// Its derived static key.
    pub secret: StaticSecret,
}

/// The seed of the engine's random numbers; ephemeral keys come from it, so it is a secret.
#[derive(Clone, ZeroizeOnDrop, Serialize, Deserialize)]
pub struct Seed(pub [u8; 32]);

impl std::fmt::Debug for Seed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Seed(..)")
    }
}

/// What an agent must know before it touches anything.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Init {
    /// The workload's own addresses, at least one.
    pub addresses: Vec<OwnAddress>,
    /// UDP port of the tunnel, in the whole key domain.
    pub port: u16,
    /// The pod's real link, for example `eth0`.
    pub interface: String,
    /// MTU of that link, in bytes.
    pub link_mtu: u32,
    /// DNS zone of the project, for example `shop.svc.cluster.local`; without one, nothing is learned from DNS.
    pub zone: Option<String>,
    /// Resolvers of the pod's resolv.conf.
    pub resolvers: Vec<IpAddr>,
    /// First and last source port of upstream DNS sockets.
    pub dns_ports: (u16, u16),
    /// How packets from peers are handed to the pod's stack.
    pub inject: Inject,
    /// Seed of the engine's random numbers.
    pub seed: Seed,
    /// Rekey after this many seconds instead of the protocol's 120; tests only.
    pub rekey_after_s: Option<u64>,
    /// The guard has its netdev egress table too, so elements are added to both tables.
    pub netdev_guard: bool,
}

/// From the launcher to the agent.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToAgent {
    /// First message. Descriptors: the DNS helper's TUN, then its listeners in the order of `resolvers`.
    Init(Box<Init>),
    /// A part of the changes that lead to the next generation.
    Changes(Vec<Change>),
    /// All changes since the last commit now count, together.
    Commit {
        /// Number of this state of the directory, increasing.
        generation: u64,
    },
    /// Tear everything down, answer [`FromAgent::Stopped`], exit.
    Stop,
}

/// From the agent to the launcher.
#[derive(Debug, Serialize, Deserialize)]
pub enum FromAgent {
    /// Everything is in place for this generation. Descriptors: `tenc0`, then the UDP sockets.
    Ready {
        /// The generation that was committed when the agent became ready.
        generation: u64,
    },
    /// Bring-up failed; what was made has been removed again.
    Failed {
        /// Exit code for the launcher: 2 usage or configuration, 3 the kernel or a privilege refused.
        exit_code: u8,
        /// What failed, for a person.
        reason: String,
    },
    /// Everything the agent made is gone.
    Stopped,
    /// Counters by name, non-zero ones only.
    Counters(Vec<(String, u64)>),
}

/// What the channel asks of a message type; implemented by the two directions only.
pub trait Message: Serialize + DeserializeOwned {
    /// Descriptors that a message of this variant may carry at most.
    fn descriptors_max(&self) -> usize;

    /// Checks limits that the encoding does not express.
    ///
    /// # Errors
    /// The first limit that is broken.
    fn validate(&self) -> Result<(), &'static str>;
}

impl Message for ToAgent {
    fn descriptors_max(&self) -> usize {
        match self {
            Self::Init(_) => 1 + RESOLVERS_MAX,
            Self::Changes(_) | Self::Commit { .. } | Self::Stop => 0,
        }
    }

    fn validate(&self) -> Result<(), &'static str> {
        match self {
            Self::Init(init) => init.validate(),
            Self::Changes(_) | Self::Commit { .. } | Self::Stop => Ok(()),
        }
    }
}

impl Init {
    fn validate(&self) -> Result<(), &'static str> {
        if self.addresses.is_empty() || self.addresses.len() > ADDRESSES_MAX {
            return Err("count of own addresses");
        }
        if self.port == 0 {
            return Err("tunnel port 0");
        }
        // IFNAMSIZ is 16 with the final zero; the kernel refuses '/', ':' and white space.
        let bad = |b: u8| b == b'/' || b == b':' || b == 0 || b.is_ascii_whitespace();
        if self.interface.is_empty() || self.interface.len() > 15 || self.interface.bytes().any(bad) {
            return Err("interface name");
        }
        // IPv4 needs 576 octets of reassembly; 65,535 is the largest IP packet.
        if !(576..=65_535).contains(&self.link_mtu) {
            return Err("link MTU");
        }
        if let Some(zone) = &self.zone
            && (zone.is_empty() || zone.len() > 253 || !zone.bytes().all(|b| b.is_ascii_graphic()))
        {
            return Err("zone");
        }
        if self.resolvers.len() > RESOLVERS_MAX {
            return Err("count of resolvers");
        }
        if self.dns_ports.0 == 0 || self.dns_ports.0 > self.dns_ports.1 {
            return Err("range of DNS ports");
        }
        if self.rekey_after_s.is_some_and(|s| !(1..=120).contains(&s)) {
            return Err("rekey interval");
        }
        Ok(())
    }
}

impl Message for FromAgent {
    fn descriptors_max(&self) -> usize {
        match self {
            // tenc0 and one UDP socket per own address.
            Self::Ready { .. } => 1 + ADDRESSES_MAX,
            Self::Failed { .. } | Self::Stopped | Self::Counters(_) => 0,
        }
    }

    fn validate(&self) -> Result<(), &'static str> {
        match self {
            Self::Ready { .. } | Self::Stopped => Ok(()),
            Self::Failed { exit_code, reason } => {
                if !(2..=3).contains(exit_code) {
                    return Err("exit code");
                }
                // The reason reaches a terminal: no escape sequences.
                if reason.len() > REASON_MAX || reason.chars().any(|c| c.is_control() && c != '\n') {
                    return Err("reason");
                }
                Ok(())
            }
            Self::Counters(list) => {
                let bad = |n: &str| {
                    n.is_empty() || n.len() > COUNTER_NAME_MAX || !n.bytes().all(|b| b.is_ascii_graphic())
                };
                if list.len() > COUNTERS_MAX || list.iter().any(|(name, _)| bad(name)) {
                    return Err("counters");
                }
                Ok(())
            }
        }
    }
}

impl FromAgent {
    /// A failure whose reason keeps to the channel's limits.
    #[must_use]
    pub fn failed(exit_code: u8, reason: &str) -> Self {
        let mut clean = String::new();
        for c in reason.chars().map(|c| if c.is_control() && c != '\n' { ' ' } else { c }) {
            if clean.len() + c.len_utf8() > REASON_MAX {
                break;
            }
            clean.push(c);
        }
        Self::Failed { exit_code, reason: clean }
    }
}

/// Why a message was not sent or not received.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// socketpair(2) failed.
    #[error("cannot make the channel")]
    Pair(#[source] io::Error),
    /// The descriptor is no SOCK_SEQPACKET socket of the unix family.
    #[error("the descriptor is no SOCK_SEQPACKET unix socket")]
    WrongSocket,
    /// The message does not encode into [`MESSAGE_MAX`] bytes.
    #[error("message longer than {MESSAGE_MAX} bytes")]
    TooLong,
    /// More descriptors than the message may carry.
    #[error("{0} descriptors with a message that may not carry as many")]
    Descriptors(usize),
    /// sendmsg(2) failed.
    #[error("cannot send")]
    Send(#[source] io::Error),
    /// The other end is closed (send side; the receive side reports [`Received::Closed`]).
    #[error("the other end is closed")]
    Closed,
    /// recvmsg(2) failed.
    #[error("cannot receive")]
    Receive(#[source] io::Error),
    /// The packet or its control data was cut off.
    #[error("received message is truncated")]
    Truncated,
    /// The bytes are no message, or more than one.
    #[error("received bytes are no message")]
    Undecodable,
    /// The message breaks a limit.
    #[error("message breaks a limit: {0}")]
    Invalid(&'static str),
}

/// What `recv` found.
#[derive(Debug)]
pub enum Received<M> {
    /// A message and its descriptors (close-on-exec).
    Message(M, Vec<OwnedFd>),
    /// The other end is closed and everything it sent was read. Stays so: an epoll loop must deregister the channel.
    Closed,
}

/// One end of the channel: sends `Out`, receives `In`.
#[derive(Debug)]
pub struct Channel<Out, In> {
    socket: OwnedFd,
    direction: PhantomData<(Out, In)>,
}

/// The launcher's end.
pub type LauncherChannel = Channel<ToAgent, FromAgent>;

/// The agent's end.
pub type AgentChannel = Channel<FromAgent, ToAgent>;

impl<Out, In> AsFd for Channel<Out, In> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl<Out, In> std::os::fd::AsRawFd for Channel<Out, In> {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.socket.as_raw_fd()
    }
}

/// Makes a connected channel: the launcher's end, and the descriptor of the agent's end.
///
/// # Errors
/// [`ChannelError::Pair`].
pub fn pair() -> Result<(LauncherChannel, OwnedFd), ChannelError> {
    let flags = SocketFlags::CLOEXEC;
    let (ours, theirs) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
        .map_err(|e| ChannelError::Pair(e.into()))?;
    Ok((Channel::new(ours)?, theirs))
}

impl<Out: Message, In: Message> Channel<Out, In> {
    /// Takes over a socket.
    ///
    /// # Errors
    /// [`ChannelError::WrongSocket`] if it is no SOCK_SEQPACKET unix socket.
    pub fn new(socket: OwnedFd) -> Result<Self, ChannelError> {
        let fits = sockopt::socket_domain(&socket).is_ok_and(|d| d == AddressFamily::UNIX)
            && sockopt::socket_type(&socket).is_ok_and(|t| t == SocketType::SEQPACKET);
        if !fits {
            return Err(ChannelError::WrongSocket);
        }
        Ok(Self { socket, direction: PhantomData })
    }

    /// Sends one message; waits while the other end's queue is full.
    ///
    /// # Errors
    /// [`ChannelError`]; [`ChannelError::Closed`] if nobody listens any more.
    pub fn send(&self, message: &Out, descriptors: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
        self.transmit(message, descriptors, SendFlags::NOSIGNAL).map(|_| ())
    }

    /// Sends one message without waiting; `false`: the other end's queue is full and nothing was sent.
    ///
    /// # Errors
    /// As [`Channel::send`].
    pub fn try_send(&self, message: &Out, descriptors: &[BorrowedFd<'_>]) -> Result<bool, ChannelError> {
        self.transmit(message, descriptors, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
    }

    /// Receives one message; waits for it.
    ///
    /// # Errors
    /// [`ChannelError`]; the packet is consumed.
    pub fn recv(&self) -> Result<Received<In>, ChannelError> {
        loop {
            if let Some(received) = self.receive(RecvFlags::empty())? {
                return Ok(received);
            }
        }
    }

    /// Receives one message if there is one.
    ///
    /// # Errors
    /// As [`Channel::recv`].
    pub fn try_recv(&self) -> Result<Option<Received<In>>, ChannelError> {
        self.receive(RecvFlags::DONTWAIT)
    }

    fn transmit(
        &self,
        message: &Out,
        fds: &[BorrowedFd<'_>],
        flags: SendFlags,
    ) -> Result<bool, ChannelError> {
        let encoded = encode(message, fds.len())?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(KERNEL_DESCRIPTORS_MAX))];
        loop {
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
                return Err(ChannelError::Descriptors(fds.len()));
            }
            match rustix::net::sendmsg(&self.socket, &[IoSlice::new(&encoded)], &mut control, flags) {
                Ok(_) => return Ok(true),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => return Err(ChannelError::Closed),
                Err(e) => return Err(ChannelError::Send(e.into())),
            }
        }
    }

    fn receive(&self, flags: RecvFlags) -> Result<Option<Received<In>>, ChannelError> {
        // One byte more than a message may have, so that a longer one is seen as such.
        let mut bytes = Zeroizing::new(vec![0; MESSAGE_MAX + 1]);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(KERNEL_DESCRIPTORS_MAX))];
        let (count, cut, fds) = loop {
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut parts = [IoSliceMut::new(&mut bytes)];
            match rustix::net::recvmsg(
                &self.socket,
                &mut parts,
                &mut control,
                flags | RecvFlags::CMSG_CLOEXEC,
            ) {
                Ok(got) => {
                    let mut fds = Vec::new();
                    for message in control.drain() {
                        if let RecvAncillaryMessage::ScmRights(rights) = message {
                            fds.extend(rights);
                        }
                    }
                    break (got.bytes, got.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC), fds);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                // The other end closed with unread messages of ours.
                Err(Errno::CONNRESET) => return Ok(Some(Received::Closed)),
                Err(e) => return Err(ChannelError::Receive(e.into())),
            }
        };
        if cut || count > MESSAGE_MAX {
            return Err(ChannelError::Truncated);
        }
        if count == 0 {
            // No message encodes to nothing; a peer that sends an empty packet has nothing more to say either.
            return Ok(Some(Received::Closed));
        }
        let message: In = decode(&bytes[..count])?;
        if fds.len() > message.descriptors_max() {
            return Err(ChannelError::Descriptors(fds.len()));
        }
        Ok(Some(Received::Message(message, fds)))
    }
}

fn encode<M: Message>(message: &M, descriptors: usize) -> Result<Zeroizing<Vec<u8>>, ChannelError> {
    message.validate().map_err(ChannelError::Invalid)?;
    if descriptors > message.descriptors_max() {
        return Err(ChannelError::Descriptors(descriptors));
    }
    // The buffer never grows: a reallocation would leave a copy of the keys behind.
    let mut bytes = Zeroizing::new(vec![0; MESSAGE_MAX]);
    let used = postcard::to_slice(message, &mut bytes).map_err(|_| ChannelError::TooLong)?.len();
    bytes.truncate(used);
    Ok(bytes)
}

fn decode<M: Message>(bytes: &[u8]) -> Result<M, ChannelError> {
    let (message, rest) = postcard::take_from_bytes::<M>(bytes).map_err(|_| ChannelError::Undecodable)?;
    if !rest.is_empty() {
        return Err(ChannelError::Undecodable);
    }
    message.validate().map_err(ChannelError::Invalid)?;
    Ok(message)
}

/// Cuts changes into messages that fit, in order. A VIP with more ports or endpoints than [`VIP_PORTS_MAX`] and
/// [`VIP_ENDPOINTS_MAX`] is cut to those: ready endpoints first, then in order, so that every agent keeps the same ones.
#[must_use]
pub fn chunks(changes: Vec<Change>) -> Vec<ToAgent> {
    let mut messages = Vec::new();
    let mut chunk = Vec::new();
    let mut room = CHUNK_MAX;
    for mut change in changes {
        if let Change::SetVip(vip) = &mut change {
            cut_vip(vip);
        }
        let size = encoded_len(&change);
        if size > room {
            messages.push(ToAgent::Changes(std::mem::take(&mut chunk)));
            room = CHUNK_MAX;
        }
        room = room.saturating_sub(size);
        chunk.push(change);
    }
    if !chunk.is_empty() {
        messages.push(ToAgent::Changes(chunk));
    }
    messages
}

fn encoded_len(change: &Change) -> usize {
    let counter = postcard::ser_flavors::Size::default();
    postcard::serialize_with_flavor(change, counter).unwrap_or(CHUNK_MAX)
}

/// Keeps a VIP within one message; see [`chunks`].
fn cut_vip(vip: &mut Vip) {
    vip.ports.truncate(VIP_PORTS_MAX);
    let total: usize = vip.ports.iter().map(|port| port.endpoints.len()).sum();
    if total <= VIP_ENDPOINTS_MAX {
        return;
    }
    tracing::warn!(
        endpoints = total,
        kept = VIP_ENDPOINTS_MAX,
        "service has more endpoints than one agent is told"
    );
    let share = VIP_ENDPOINTS_MAX / vip.ports.len().max(1);
    for port in &mut vip.ports {
        // Stable: within ready and unready the sorted order stays.
        port.endpoints.sort_by_key(|endpoint| !endpoint.ready);
        port.endpoints.truncate(share);
        port.endpoints.sort();
    }
}

#[cfg(test)]
#[path = "control_tests.rs"]
mod tests;
