//! The virtio-net header that precedes each packet on a TUN device with `IFF_VNET_HDR`.
//!
//! Source: linux/virtio_net.h, `struct virtio_net_hdr` (10 bytes, native = little endian after TUNSETVNETLE).

/// Length of the header on the device, in bytes.
pub const VNET_HEADER_LEN: usize = 10;

/// How a super-packet is to be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gso {
    /// One ordinary packet.
    None,
    /// TCP over IPv4; segments carry this many payload bytes.
    Tcp4(u16),
    /// TCP over IPv6; segments carry this many payload bytes.
    Tcp6(u16),
    /// UDP, either family; datagrams carry this many payload bytes.
    Udp(u16),
}

/// Offload state of one packet or super-packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VnetHeader {
    /// How to cut it.
    pub gso: Gso,
    /// Length of all headers (IP and transport) in bytes; 0 where `gso` is `None`.
    pub header_len: u16,
    /// Where the partial checksum starts and where it is stored, as (start, offset from start); `None`: complete.
    pub partial_checksum: Option<(u16, u16)>,
    /// TCP with CWR set on the first segment only (VIRTIO_NET_HDR_GSO_ECN).
    pub ecn: bool,
}
