//! One network namespace of the lab, entered by a thread of ours: sockets opened there stay there.
//!
//! Every kind of socket that an application with capabilities could use to get around a tunnel is made here:
//! plain, bound to a device, IP_UNICAST_IF, raw with and without a header of its own, AF_PACKET.
//! May touch: sockets only. Source: socket(7), ip(7), packet(7), setns(2).

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use nix::libc;
use nix::sched::{CloneFlags, setns};
use nix::sys::socket as sk;
use socket2::{Domain, Protocol, Socket, Type};

/// `setsockopt(IP_UNICAST_IF)`: the interface index in network byte order.
#[derive(Clone, Copy)]
struct UnicastIf;
nix::setsockopt_impl!(UnicastIf, libc::IPPROTO_IP, libc::IP_UNICAST_IF, usize, sk::sockopt::SetUsize);

/// A network namespace with the addresses of its pod.
#[derive(Clone, Debug)]
pub struct Pod {
    /// Its name in the lab, as `lab.sh exec` takes it.
    pub name: String,
    /// The namespace's file.
    pub netns: PathBuf,
    /// The pod's IPv4 address.
    pub v4: Ipv4Addr,
    /// The pod's IPv6 address.
    pub v6: Ipv6Addr,
    /// The name of its real device.
    pub device: String,
}

impl Pod {
    /// The pod's address of the family of `like`.
    pub fn address(&self, like: IpAddr) -> IpAddr {
        if like.is_ipv4() { self.v4.into() } else { self.v6.into() }
    }

    /// Both addresses.
    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }

    /// Runs `f` on a thread inside the namespace. A panic of `f` goes on in the caller.
    pub fn enter<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        enter(&self.netns, f)
    }

    /// A UDP socket bound inside the namespace, with a read time-out of two seconds.
    pub fn udp(&self, bind: impl Into<SocketAddr>) -> UdpSocket {
        let bind = bind.into();
        let socket = self.enter(|| UdpSocket::bind(bind)).unwrap_or_else(|e| panic!("bind {bind}: {e}"));
        socket.set_read_timeout(Some(Duration::from_secs(2))).expect("time-out");
        socket
    }

    /// A UDP socket of the family of `to`, bound to any port inside the namespace.
    pub fn udp_for(&self, to: IpAddr) -> UdpSocket {
        self.udp(any(to, 0))
    }

    /// A UDP socket bound to the pod's real device (SO_BINDTODEVICE).
    pub fn udp_on_device(&self, like: IpAddr) -> UdpSocket {
        let socket =
            self.enter(|| Socket::new(domain(like), Type::DGRAM, Some(Protocol::UDP)).expect("socket"));
        self.enter(|| socket.bind_device(Some(self.device.as_bytes())).expect("SO_BINDTODEVICE"));
        socket.bind(&any(like, 0).into()).expect("bind");
        socket.into()
    }

    /// An IPv4 UDP socket that prefers the pod's real device (IP_UNICAST_IF).
    pub fn udp_unicast_if(&self) -> UdpSocket {
        let socket = self.udp(any(self.v4.into(), 0));
        let index = u32::try_from(self.interface_index()).expect("an index fits");
        let network_order = usize::try_from(index.to_be()).expect("an index fits");
        sk::setsockopt(&socket, UnicastIf, &network_order).expect("IP_UNICAST_IF");
        socket
    }

    /// A raw socket of `protocol`.
    pub fn raw(&self, like: IpAddr, protocol: i32) -> Socket {
        self.enter(|| {
            Socket::new(domain(like), Type::RAW, Some(Protocol::from(protocol))).expect("raw socket")
        })
    }

    /// A raw IPv4 socket whose sender writes the IP header (IP_HDRINCL).
    pub fn raw_with_header(&self) -> Socket {
        let socket = self.raw(self.v4.into(), libc::IPPROTO_RAW);
        socket.set_header_included_v4(true).expect("IP_HDRINCL");
        socket
    }

    /// The index of the pod's real device.
    pub fn interface_index(&self) -> usize {
        self.link_address(&self.device).ifindex()
    }

    /// The link-layer address of a device of this namespace.
    fn link_address(&self, device: &str) -> sk::LinkAddr {
        self.enter(|| link_address(device)).unwrap_or_else(|| panic!("no device {device} in {}", self.name))
    }

    /// The hardware address of the pod's real device.
    pub fn mac(&self) -> [u8; 6] {
        self.link_address(&self.device).addr().expect("a hardware address")
    }

    /// Writes one Ethernet frame to the pod's real device through an AF_PACKET socket.
    pub fn send_frame(&self, frame: &[u8]) -> nix::Result<usize> {
        let to = self.link_address(&self.device);
        let fd = self.enter(packet_socket);
        sk::sendto(fd.as_raw_fd(), frame, &to, sk::MsgFlags::empty())
    }

    /// A packet socket that writes frames to the pod's real device, one after the other.
    pub fn frames(&self) -> Frames {
        Frames { to: self.link_address(&self.device), fd: self.enter(packet_socket) }
    }

    /// A TCP listener inside the namespace.
    pub fn listen(&self, bind: SocketAddr) -> TcpListener {
        self.enter(|| TcpListener::bind(bind)).unwrap_or_else(|e| panic!("listen on {bind}: {e}"))
    }

    /// A TCP connection made inside the namespace.
    pub fn connect(&self, to: impl Into<SocketAddr>, limit: Duration) -> io::Result<TcpStream> {
        let to = to.into();
        let stream = self.enter(|| TcpStream::connect_timeout(&to, limit))?;
        stream.set_read_timeout(Some(limit))?;
        stream.set_write_timeout(Some(limit))?;
        Ok(stream)
    }

    /// One HTTP GET over a connection of ours: status and body.
    pub fn http_get(&self, to: impl Into<SocketAddr>, limit: Duration) -> io::Result<(u16, String)> {
        let mut stream = self.connect(to, limit)?;
        stream.write_all(b"GET / HTTP/1.0\r\nHost: web\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        let status = text.split_whitespace().nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
        let body = text.split_once("\r\n\r\n").map_or("", |(_, body)| body).to_owned();
        Ok((status, body))
    }

    /// Everything that passes the pod's real device from now on, both directions.
    pub fn sniff(&self) -> Sniffer {
        Sniffer::on(&self.netns, &self.device)
    }
}

/// Runs `f` on a thread inside the namespace behind `netns`.
pub fn enter<T: Send>(netns: &std::path::Path, f: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let inside = scope.spawn(|| {
            let file = File::open(netns).unwrap_or_else(|e| panic!("open {}: {e}", netns.display()));
            setns(file, CloneFlags::CLONE_NEWNET).expect("setns");
            f()
        });
        inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// The unspecified address of the family of `like`.
pub fn any(like: IpAddr, port: u16) -> SocketAddr {
    if like.is_ipv4() { (Ipv4Addr::UNSPECIFIED, port).into() } else { (Ipv6Addr::UNSPECIFIED, port).into() }
}

fn domain(like: IpAddr) -> Domain {
    if like.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 }
}

fn link_address(device: &str) -> Option<sk::LinkAddr> {
    let mut interfaces = nix::ifaddrs::getifaddrs().expect("getifaddrs");
    interfaces
        .find_map(|i| if i.interface_name == device { i.address?.as_link_addr().copied() } else { None })
}

fn packet_socket() -> OwnedFd {
    sk::socket(
        sk::AddressFamily::Packet,
        sk::SockType::Raw,
        sk::SockFlag::SOCK_CLOEXEC,
        sk::SockProtocol::EthAll,
    )
    .expect("AF_PACKET socket")
}

/// An AF_PACKET socket that writes to one device.
pub struct Frames {
    to: sk::LinkAddr,
    fd: OwnedFd,
}

impl Frames {
    /// Writes one Ethernet frame; an error where the guard drops it.
    pub fn send(&self, frame: &[u8]) -> nix::Result<usize> {
        sk::sendto(self.fd.as_raw_fd(), frame, &self.to, sk::MsgFlags::empty())
    }
}

/// Gives `socket` room for whatever a test sends at once, beyond what the host allows others.
pub fn enlarge(socket: &UdpSocket) {
    sk::setsockopt(socket, sk::sockopt::RcvBufForce, &(8 << 20)).expect("receive buffer");
}

/// An AF_PACKET socket that hears every frame of one device.
pub struct Sniffer {
    fd: OwnedFd,
}

impl Sniffer {
    /// Listens on `device` in the namespace behind `netns`.
    pub fn on(netns: &std::path::Path, device: &str) -> Self {
        enter(netns, || {
            let address = link_address(device).unwrap_or_else(|| panic!("no device {device}"));
            let fd = packet_socket();
            sk::setsockopt(&fd, sk::sockopt::RcvBufForce, &(64 << 20)).expect("receive buffer");
            // getifaddrs leaves the protocol out; the socket's own (all) stays in force for a zero one.
            sk::bind(fd.as_raw_fd(), &address).expect("bind to the device");
            Self { fd }
        })
    }

    /// The frames heard so far and not yet read.
    pub fn drain(&self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        let mut buffer = vec![0; 70_000];
        while let Ok(n) = sk::recv(self.fd.as_raw_fd(), &mut buffer, sk::MsgFlags::MSG_DONTWAIT) {
            frames.push(buffer[..n].to_vec());
        }
        frames
    }

    /// Writes a frame to the device; this sniffer does not hear it.
    pub fn send(&self, frame: &[u8]) {
        sk::send(self.fd.as_raw_fd(), frame, sk::MsgFlags::empty()).expect("send a frame");
    }

    /// From now on each frame carries the kernel's time stamp.
    pub fn stamp(&self) {
        sk::setsockopt(&self.fd, sk::sockopt::ReceiveTimestampns, &true).expect("SO_TIMESTAMPNS");
    }

    /// As [`Self::drain`], each frame with the time since 1970 at which it passed the device. Needs [`Self::stamp`].
    pub fn drain_stamped(&self) -> Vec<(Duration, Vec<u8>)> {
        let mut frames = Vec::new();
        let mut buffer = vec![0; 70_000];
        let mut control = nix::cmsg_space!(nix::sys::time::TimeSpec);
        loop {
            let mut parts = [io::IoSliceMut::new(&mut buffer)];
            let flags = sk::MsgFlags::MSG_DONTWAIT;
            let received =
                sk::recvmsg::<sk::LinkAddr>(self.fd.as_raw_fd(), &mut parts, Some(&mut control), flags);
            let Ok(message) = received else { return frames };
            let stamp = message.cmsgs().expect("control messages").find_map(|control| match control {
                sk::ControlMessageOwned::ScmTimestampns(at) => Some(at),
                _ => None,
            });
            let length = message.bytes;
            // None: it passed before the option was set.
            if let Some(at) = stamp {
                frames.push((at.into(), buffer[..length].to_vec()));
            }
        }
    }

    /// Waits for a frame that `pick` turns into something.
    pub fn wait<T>(&self, limit: Duration, mut pick: impl FnMut(&[u8]) -> Option<T>) -> Option<T> {
        let end = Instant::now() + limit;
        loop {
            if let Some(found) = self.drain().iter().find_map(|f| pick(f)) {
                return Some(found);
            }
            if Instant::now() > end {
                return None;
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
}
