//! The channel between launcher and agent: one message per SOCK_SEQPACKET packet, descriptors by SCM_RIGHTS.
//!
//! 1. `send` encodes a message (postcard) into at most [`MESSAGE_MAX`] bytes and attaches descriptors
//! 2. the kernel keeps message boundaries and the descriptors' place
//! 3. `recv` takes one packet, decodes it completely and checks every length, count and range
//!
//! The launcher makes a listener at a path and hands it to the agent it starts, so that a later launcher finds that agent
//! again: [`listen`], [`connect`], [`accept`]. One connection at a time; only our own user, root, is heard.
//!
//! A session with a new agent: `Init`, `Changes`… `Commit` of the whole directory, then `Ready` (with `tenc0` and the UDP
//! sockets) from the agent; later more `Changes`… `Commit`; `Stop`, then `Stopped`. With one that runs already: `Hello` and
//! `Adopt`, answered by `Hello` and `Ready`, then the same. Its end never ends the agent.
//!
//! Bytes and descriptors from the other end are hostile input on either side: what does not decode to the last byte,
//! carries more descriptors than its type may, or breaks a stated limit is an error, never a panic. Descriptors that were
//! received with a refused message are closed. Buffers are zeroised: they carry keys. May touch: its own socket.
//! Source: unix(7), cmsg(3), recvmsg(2).

use std::io::{self, IoSlice, IoSliceMut};
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, UCred, sockopt,
};
use zeroize::Zeroizing;

mod messages;
mod report;
#[cfg(test)]
mod tests;

pub use messages::{
    ASKED_MAX, Carried, Executable, FromAgent, Init, Inject, Message, OwnAddress, Place, Seed, ToAgent,
    VERSION, VIP_ENDPOINTS_MAX, VIP_PORTS_MAX, chunks,
};
pub use report::{
    FlowReport, FlowState, PeerReport, REPORTED_FLOWS_MAX, REPORTED_PEERS_MAX, REPORTED_VIPS_MAX, Report,
    Rung, Totals,
};

/// Largest encoded message, in bytes. Four fit the kernel's default socket buffer.
pub const MESSAGE_MAX: usize = 64 * 1024;

/// Connections that wait: one launcher at a time, which another one follows.
const BACKLOG: i32 = 8;

/// SCM_MAX_FD of the kernel: more never arrive in one packet, so received control data is never cut by our buffer.
const KERNEL_DESCRIPTORS_MAX: usize = 253;

/// Why a message was not sent or not received.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The listener could not be made.
    #[error("cannot listen for a launcher")]
    Listen(#[source] io::Error),
    /// The connection could not be made.
    #[error("cannot connect launcher and agent")]
    Connect(#[source] io::Error),
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

/// Makes a listener at `path`, where nothing may be.
///
/// # Errors
/// [`ChannelError::Listen`].
pub fn listen(path: &Path) -> Result<OwnedFd, ChannelError> {
    let fail = |errno: Errno| ChannelError::Listen(errno.into());
    let socket = endpoint().map_err(fail)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path).map_err(fail)?).map_err(fail)?;
    rustix::fs::chmod(path, Mode::RUSR | Mode::WUSR).map_err(fail)?;
    rustix::net::listen(&socket, BACKLOG).map_err(fail)?;
    Ok(socket)
}

/// Makes the calling process the one that [`Channel::peer`] names at the other end of later connections.
///
/// # Errors
/// [`ChannelError::Listen`].
pub fn claim(listener: impl AsFd) -> Result<(), ChannelError> {
    rustix::net::listen(listener, BACKLOG).map_err(|e| ChannelError::Listen(e.into()))
}

/// Connects to the agent that listens at `path`; `None`: nobody does.
///
/// # Errors
/// [`ChannelError::Connect`].
pub fn connect(path: &Path) -> Result<Option<LauncherChannel>, ChannelError> {
    let fail = |errno: Errno| ChannelError::Connect(errno.into());
    let socket = endpoint().map_err(fail)?;
    match rustix::net::connect(&socket, &SocketAddrUnix::new(path).map_err(fail)?) {
        Ok(()) => Channel::new(socket).map(Some),
        Err(Errno::NOENT | Errno::CONNREFUSED) => Ok(None),
        Err(errno) => Err(fail(errno)),
    }
}

/// Takes the next connection, if there is one and it is of our own user: an agent's is root.
///
/// # Errors
/// [`ChannelError::Connect`].
pub fn accept(listener: impl AsFd) -> Result<Option<AgentChannel>, ChannelError> {
    match rustix::net::accept_with(listener, SocketFlags::CLOEXEC) {
        Ok(socket) => {
            let channel = Channel::new(socket)?;
            let ours = rustix::process::geteuid();
            Ok(channel.peer().is_ok_and(|peer| peer.uid == ours).then_some(channel))
        }
        Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => Ok(None),
        Err(errno) => Err(ChannelError::Connect(errno.into())),
    }
}

fn endpoint() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
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

    /// Who is at the other end: for a launcher the process that called [`claim`] last.
    ///
    /// # Errors
    /// [`ChannelError::Connect`].
    pub fn peer(&self) -> Result<UCred, ChannelError> {
        sockopt::socket_peercred(&self.socket).map_err(|e| ChannelError::Connect(e.into()))
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
        #[cfg(feature = "fault-injection")]
        crate::fault::at_message("send", message, self.peer().ok().map(|peer| peer.pid));
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
                Err(Errno::PIPE | Errno::CONNRESET | Errno::CONNREFUSED | Errno::NOTCONN) => {
                    return Err(ChannelError::Closed);
                }
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
                // Reset, once: the other end closed with unread messages of ours. Its own last ones are still to be read.
                Err(Errno::INTR | Errno::CONNRESET) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(e) => return Err(ChannelError::Receive(e.into())),
            }
        };
        let bytes =
            if cut || count > MESSAGE_MAX { Err(ChannelError::Truncated) } else { Ok(&bytes[..count]) };
        match bytes.and_then(|bytes| accepted(bytes, fds.len())) {
            Ok(Some(message)) => {
                #[cfg(feature = "fault-injection")]
                crate::fault::at_message("receive", &message, self.peer().ok().map(|peer| peer.pid));
                Ok(Some(Received::Message(message, fds)))
            }
            // No message encodes to nothing; a peer that sends an empty packet has nothing more to say either.
            Ok(None) => {
                close_beside(fds);
                Ok(Some(Received::Closed))
            }
            Err(error) => {
                close_beside(fds);
                Err(error)
            }
        }
    }
}

/// The message of a whole packet; `None`: it is empty.
fn accepted<M: Message>(bytes: &[u8], descriptors: usize) -> Result<Option<M>, ChannelError> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let message: M = decode(bytes)?;
    if descriptors > message.descriptors_max() {
        return Err(ChannelError::Descriptors(descriptors));
    }
    Ok(Some(message))
}

/// Closes descriptors that the other end chose and nobody wants, beside the calling thread: it may have chosen such as take
/// long to close.
pub fn close_beside(descriptors: Vec<OwnedFd>) {
    if !descriptors.is_empty() {
        // Where there is no thread to be had they are closed here.
        let _ = std::thread::Builder::new().spawn(move || drop(descriptors));
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
