//! Opened packets become as few super-packets as possible, for injection through the TUN device.
//!
//! 1. [`Coalescer::push`] looks at one packet: it joins the open train of its flow, or closes it and starts its own
//! 2. [`Coalescer::finish`] patches the first packet's headers of every train
//! 3. [`Coalescer::trains`] gives the trains in the order of their first packets
//!
//! A train looks, once the kernel has cut it again, exactly like the packets it was made of. Only packets whose
//! checksum was verified join one, since the kernel computes the checksums of a train anew: a wrong one travels
//! alone and untouched. Whatever cannot join closes its flow's train, so nothing overtakes within a flow.
//! Source: the kernel's tcp_gro_receive and udp_gro_receive rules; linux/virtio_net.h.

use std::net::IpAddr;
use std::ops::Range;

use super::checksum::{pseudo_header, sum, transport_checksum_ok};
use super::packet::{Packet, TCP_ACK, TCP_PSH, Version, protocol};
use super::vnet::{Gso, VnetHeader};
use super::{read16, read32, write16};

/// Longest train in bytes, IP header included: the kernel's limit of 65,535 with the same margin as for capture.
const MAX_TRAIN: usize = 61_000;
/// Most packets, and so parts, of one train; the kernel takes 64 UDP segments since 4.18.
pub const MAX_SEGMENTS: usize = 64;
/// Trains that still accept packets; a burst rarely interleaves more flows, and the search is linear.
const MAX_OPEN: usize = 8;
const DONT_FRAGMENT: u8 = 0x40;

/// One packet or super-packet, to be written after its header with one gathering write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Train<'a> {
    /// What the device is told.
    pub vnet: VnetHeader,
    /// The whole first packet, then the payloads of those that follow it.
    pub parts: &'a [Range<usize>],
}

/// Collects the packets of one wake-up. Reusable: after the first bursts it allocates nothing.
#[derive(Debug, Default)]
pub struct Coalescer {
    trains: Vec<Open>,
    /// Indices into `trains`, oldest first.
    open: Vec<usize>,
    /// (train, part) in order of arrival.
    arrivals: Vec<(usize, Range<usize>)>,
    /// The same parts, train by train.
    parts: Vec<Range<usize>>,
    without_udp: bool,
}

impl Coalescer {
    /// An empty coalescer.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether datagrams are merged: kernels before 6.2 refuse such a train.
    pub fn merge_udp(&mut self, merge: bool) {
        self.without_udp = !merge;
    }

    /// Forgets everything but its memory.
    pub fn clear(&mut self) {
        self.trains.clear();
        self.open.clear();
        self.arrivals.clear();
        self.parts.clear();
    }

    /// Takes the packet at `range` of `buffer` (padding after it is cut off), in order of arrival.
    ///
    /// The packet stays where it is until the trains were written.
    pub fn push(&mut self, buffer: &[u8], range: Range<usize>) {
        let Some(bytes) = buffer.get(range.clone()) else { return };
        let Some(packet) = Packet::parse(bytes) else {
            self.open.clear();
            self.begin(Open::alone(range));
            return;
        };
        let Some(bytes) = bytes.get(..packet.len) else { return };
        let range = range.start..range.start + packet.len;
        let Some(segment) = Segment::new(bytes, &packet).filter(|s| !s.is_udp() || !self.without_udp) else {
            self.close_flow(bytes, &packet);
            self.begin(Open::alone(range));
            return;
        };
        if let Some(at) =
            self.open.iter().position(|t| self.trains.get(*t).is_some_and(|t| t.flow == Some(segment.flow)))
        {
            if self.join(at, buffer, bytes, &packet, &segment, &range) {
                return;
            }
            self.open.remove(at);
        }
        let accepts_more = !segment.push;
        let train = self.begin(Open::first(range, &segment));
        if accepts_more {
            if self.open.len() == MAX_OPEN {
                self.open.remove(0);
            }
            self.open.push(train);
        }
    }

    /// Ends the collection: patches the headers of every train of two or more packets. `buffer` is the one that
    /// the packets were pushed from.
    pub fn finish(&mut self, buffer: &mut [u8]) {
        self.open.clear();
        let mut next = 0;
        for train in &mut self.trains {
            train.parts = next..next;
            next += train.segments;
        }
        self.parts.clear();
        self.parts.resize(next, 0..0);
        for (train, part) in self.arrivals.drain(..) {
            let Some(train) = self.trains.get_mut(train) else { continue };
            if let Some(slot) = self.parts.get_mut(train.parts.end) {
                *slot = part;
                train.parts.end += 1;
            }
        }
        for train in &mut self.trains {
            if train.segments > 1 {
                // The headers were there when the packet was pushed; without them nothing may be injected.
                match train.patch(buffer) {
                    Some(vnet) => train.vnet = vnet,
                    None => train.parts = 0..0,
                }
            }
        }
    }

    /// The trains after [`Coalescer::finish`], in the order of their first packets.
    pub fn trains(&self) -> impl Iterator<Item = Train<'_>> {
        self.trains.iter().filter_map(|train| {
            let parts = self.parts.get(train.parts.clone()).filter(|parts| !parts.is_empty())?;
            Some(Train { vnet: train.vnet, parts })
        })
    }

    fn begin(&mut self, train: Open) -> usize {
        let index = self.trains.len();
        self.arrivals.push((index, train.head.clone()));
        self.trains.push(train);
        index
    }

    /// Closes whatever train this packet may belong to; a fragment may belong to any between its addresses.
    fn close_flow(&mut self, bytes: &[u8], packet: &Packet) {
        let ports = if packet.fragment.is_some() { None } else { packet.ports(bytes) };
        let trains = &self.trains;
        self.open.retain(|index| {
            let Some(flow) = trains.get(*index).and_then(|t| t.flow) else { return false };
            let addresses = (flow.source, flow.destination) == (packet.source, packet.destination);
            let same = match ports {
                Some(ports) => flow.protocol == packet.protocol && flow.ports == ports,
                None => packet.fragment.is_some() || flow.protocol == packet.protocol,
            };
            !(addresses && same)
        });
    }

    /// Lets the packet join the open train number `at` if it may.
    fn join(
        &mut self,
        at: usize,
        buffer: &[u8],
        bytes: &[u8],
        packet: &Packet,
        segment: &Segment,
        range: &Range<usize>,
    ) -> bool {
        let Some(index) = self.open.get(at).copied() else { return false };
        let Some(train) = self.trains.get_mut(index) else { return false };
        let Some(head) = buffer.get(train.head.clone()) else { return false };
        if !train.accepts(head, bytes, segment) || !checksums_ok(bytes, packet) {
            return false;
        }
        // The first packet is summed only now: most trains of interactive traffic never get a second one.
        if train.segments == 1 && !Packet::parse(head).is_some_and(|p| checksums_ok(head, &p)) {
            return false;
        }
        train.append(segment);
        if segment.push || segment.payload < train.size || train.segments == MAX_SEGMENTS {
            self.open.remove(at);
        }
        self.arrivals.push((index, range.start + segment.header_len..range.end));
        true
    }
}

/// Whether nothing is lost when the kernel computes this packet's checksums anew.
fn checksums_ok(bytes: &[u8], packet: &Packet) -> bool {
    let header = match packet.version {
        Version::V4 => bytes.get(..packet.transport).is_some_and(|header| sum(header) == 0xffff),
        Version::V6 => true,
    };
    header && transport_checksum_ok(bytes, packet)
}

/// What packets of one train have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Flow {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    ports: (u16, u16),
}

/// A packet that could be part of a train.
#[derive(Clone, Copy, Debug)]
struct Segment {
    flow: Flow,
    version: Version,
    transport: usize,
    header_len: usize,
    payload: usize,
    sequence: u32,
    id: u16,
    push: bool,
}

impl Segment {
    /// `None`: no train ever holds such a packet.
    fn new(bytes: &[u8], packet: &Packet) -> Option<Self> {
        let plain_header = match packet.version {
            Version::V4 => 20,
            Version::V6 => 40,
        };
        if packet.transport != plain_header || packet.fragment.is_some() {
            return None;
        }
        let transport = bytes.get(packet.transport..)?;
        let (transport_len, sequence, push) = match packet.protocol {
            protocol::TCP => {
                let flags = packet.tcp_flags(bytes)?;
                if flags & !TCP_PSH != TCP_ACK {
                    return None;
                }
                (packet.tcp_header_len(bytes)?, read32(transport, 4)?, flags & TCP_PSH != 0)
            }
            protocol::UDP => {
                if usize::from(read16(transport, 4)?) != transport.len() || read16(transport, 6)? == 0 {
                    return None;
                }
                (8, 0, false)
            }
            _ => return None,
        };
        let header_len = packet.transport + transport_len;
        let payload = packet.len.checked_sub(header_len).filter(|n| *n > 0)?;
        Some(Self {
            flow: Flow {
                source: packet.source,
                destination: packet.destination,
                protocol: packet.protocol,
                ports: packet.ports(bytes)?,
            },
            version: packet.version,
            transport: packet.transport,
            header_len,
            payload,
            sequence,
            id: if packet.version == Version::V4 { read16(bytes, 4)? } else { 0 },
            push,
        })
    }

    fn is_udp(&self) -> bool {
        self.flow.protocol == protocol::UDP
    }
}

/// A train, open or closed.
#[derive(Debug)]
struct Open {
    /// The first packet.
    head: Range<usize>,
    /// `None`: travels alone whatever comes.
    flow: Option<Flow>,
    version: Version,
    transport: usize,
    header_len: usize,
    /// Payload bytes of every packet but the last.
    size: usize,
    segments: usize,
    /// Length of the super-packet so far.
    len: usize,
    next_sequence: u32,
    next_id: u16,
    push: bool,
    vnet: VnetHeader,
    /// Where its parts stand once finished.
    parts: Range<usize>,
}

impl Open {
    fn alone(head: Range<usize>) -> Self {
        Self {
            flow: None,
            version: Version::V4,
            transport: 0,
            header_len: 0,
            size: 0,
            segments: 1,
            len: head.len(),
            next_sequence: 0,
            next_id: 0,
            push: false,
            vnet: VnetHeader::PLAIN,
            parts: 0..0,
            head,
        }
    }

    fn first(head: Range<usize>, segment: &Segment) -> Self {
        Self {
            flow: Some(segment.flow),
            version: segment.version,
            transport: segment.transport,
            header_len: segment.header_len,
            size: segment.payload,
            next_sequence: segment.next_sequence(),
            next_id: segment.id.wrapping_add(1),
            push: segment.push,
            ..Self::alone(head)
        }
    }

    /// Whether a packet with these headers continues this train. Checksums are not looked at.
    fn accepts(&self, head: &[u8], bytes: &[u8], segment: &Segment) -> bool {
        segment.header_len == self.header_len
            && segment.payload <= self.size
            && self.len + segment.payload <= MAX_TRAIN
            && segment.sequence == self.next_sequence
            && self.same_ip_header(head, bytes, segment).unwrap_or(false)
            && (segment.is_udp() || self.same_tcp_header(head, bytes).unwrap_or(false))
    }

    fn same_ip_header(&self, head: &[u8], bytes: &[u8], segment: &Segment) -> Option<bool> {
        Some(match self.version {
            // Type of service; flags, TTL; an identification that a receiver may look at must count on.
            Version::V4 => {
                head.get(..2)? == bytes.get(..2)?
                    && head.get(6..9)? == bytes.get(6..9)?
                    && (head.get(6)? & DONT_FRAGMENT != 0 || segment.id == self.next_id)
            }
            // Traffic class and flow label; hop limit.
            Version::V6 => head.get(..4)? == bytes.get(..4)? && head.get(7)? == bytes.get(7)?,
        })
    }

    /// Acknowledgement, header length, window, urgent pointer, options. Flags were checked to be ACK and PSH.
    fn same_tcp_header(&self, head: &[u8], bytes: &[u8]) -> Option<bool> {
        let head = head.get(self.transport..self.header_len)?;
        let bytes = bytes.get(self.transport..self.header_len)?;
        Some(
            head.get(8..13)? == bytes.get(8..13)?
                && head.get(14..16)? == bytes.get(14..16)?
                && head.get(18..)? == bytes.get(18..)?,
        )
    }

    fn append(&mut self, segment: &Segment) {
        self.segments += 1;
        self.len += segment.payload;
        self.next_sequence = segment.next_sequence();
        self.next_id = segment.id.wrapping_add(1);
        self.push |= segment.push;
    }

    /// Makes the first packet's headers those of the super-packet.
    fn patch(&self, buffer: &mut [u8]) -> Option<VnetHeader> {
        let header = buffer.get_mut(self.head.clone())?.get_mut(..self.header_len)?;
        let transport_len = self.len - self.transport;
        let flow = self.flow?;
        let partial = pseudo_header(header.get(self.version.addresses())?, flow.protocol, transport_len);
        let (ip, transport) = header.split_at_mut_checked(self.transport)?;
        match self.version {
            Version::V4 => {
                write16(ip, 2, u16::try_from(self.len).ok()?)?;
                write16(ip, 10, 0)?;
                write16(ip, 10, !sum(ip))?;
            }
            Version::V6 => write16(ip, 4, u16::try_from(transport_len).ok()?)?,
        }
        let size = u16::try_from(self.size).ok()?;
        let (gso, checksum_at) = match (flow.protocol, self.version) {
            (protocol::UDP, _) => {
                write16(transport, 4, u16::try_from(transport_len).ok()?)?;
                (Gso::Udp(size), 6)
            }
            (_, Version::V4) => (Gso::Tcp4(size), 16),
            (_, Version::V6) => (Gso::Tcp6(size), 16),
        };
        if self.push {
            *transport.get_mut(13)? |= TCP_PSH;
        }
        write16(transport, usize::from(checksum_at), partial)?;
        Some(VnetHeader {
            gso,
            header_len: u16::try_from(self.header_len).ok()?,
            partial_checksum: Some((u16::try_from(self.transport).ok()?, checksum_at)),
            ecn: false,
        })
    }
}

impl Segment {
    /// Where the next packet of the flow begins; always 0 for UDP, so that every datagram continues.
    fn next_sequence(&self) -> u32 {
        if self.is_udp() {
            return 0;
        }
        // A payload is shorter than 65,536 bytes.
        self.sequence.wrapping_add(u32::try_from(self.payload).unwrap_or(0))
    }
}
