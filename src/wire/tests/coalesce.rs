//! Trains against the packets that they are cut into again.

use proptest::prelude::*;

use super::*;
use crate::wire::coalesce::Coalescer;
use crate::wire::segment::Cut;

/// The trains that these packets become, each as its header and its bytes in one piece.
fn run_with(coalescer: &mut Coalescer, packets: &[Vec<u8>]) -> Vec<(VnetHeader, Vec<u8>)> {
    let mut buffer = Vec::new();
    let mut ranges = Vec::new();
    for packet in packets {
        buffer.extend([0xcc; 16]); // a record's header
        let start = buffer.len();
        buffer.extend_from_slice(packet);
        buffer.resize(start + packet.len().next_multiple_of(16), 0);
        ranges.push(start..buffer.len());
    }
    coalescer.clear();
    for range in ranges {
        coalescer.push(&buffer, range);
    }
    coalescer.finish(&mut buffer);
    coalescer
        .trains()
        .map(|train| {
            assert!(train.parts.len() <= 64);
            (train.vnet, train.parts.iter().flat_map(|part| &buffer[part.clone()]).copied().collect())
        })
        .collect()
}

fn run(packets: &[Vec<u8>]) -> Vec<(VnetHeader, Vec<u8>)> {
    run_with(&mut Coalescer::new(), packets)
}

/// What the pod's stack makes of a train.
fn cut(vnet: &VnetHeader, bytes: &[u8]) -> Vec<Vec<u8>> {
    if *vnet == VnetHeader::PLAIN {
        return vec![bytes.to_vec()];
    }
    let packet = Packet::parse(bytes).unwrap();
    let mut bytes = bytes.to_vec();
    let mut cut = Cut::new(&mut bytes, &packet, vnet).unwrap();
    std::iter::from_fn(|| cut.next_packet().map(<[u8]>::to_vec)).collect()
}

/// The `index`th packet of a sender's flow.
#[derive(Clone)]
struct Maker {
    version: Version,
    header: TcpHeader,
    id: u16,
    dont_fragment: bool,
}

impl Maker {
    fn new(version: Version) -> Self {
        Self { version, header: tcp_header(u32::MAX - 100), id: 0xffff, dont_fragment: false }
    }

    fn ip(&mut self) -> IpHeaders {
        match ip(self.version, Shape::Plain) {
            IpHeaders::Ipv4(mut header, extensions) => {
                header.identification = self.id;
                header.dont_fragment = self.dont_fragment;
                self.id = self.id.wrapping_add(1);
                IpHeaders::Ipv4(header, extensions)
            }
            other => other,
        }
    }

    fn tcp(&mut self, data: &[u8]) -> Vec<u8> {
        let ip = self.ip();
        let bytes = tcp(ip, self.header.clone(), data);
        let len = u32::try_from(data.len()).unwrap();
        self.header.sequence_number = self.header.sequence_number.wrapping_add(len);
        bytes
    }

    fn udp(&mut self, data: &[u8]) -> Vec<u8> {
        let ip = self.ip();
        udp(ip, data)
    }
}

/// `bytes` changed at `at`, with all checksums right again.
fn changed(bytes: &[u8], at: usize, value: u8) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at] = value;
    let packet = Packet::parse(&bytes).unwrap();
    if packet.version == Version::V4 {
        write16(&mut bytes, 10, 0).unwrap();
        let sum = !naive_sum(&bytes[..packet.transport]);
        write16(&mut bytes, 10, sum).unwrap();
    }
    let field = packet.transport + packet.pseudo_checksum_offset().unwrap();
    write16(&mut bytes, field, 0).unwrap();
    let covered = [naive_pseudo(&bytes, &packet), bytes[packet.transport..].to_vec()].concat();
    write16(&mut bytes, field, !naive_sum(&covered)).unwrap();
    assert!(naive_ok(&bytes));
    bytes
}

fn counts(trains: &[(VnetHeader, Vec<u8>)]) -> Vec<usize> {
    trains.iter().map(|(vnet, bytes)| cut(vnet, bytes).len()).collect()
}

#[test]
fn segments_become_the_super_packet_they_were_cut_from() {
    for version in BOTH {
        let data = payload(10 * 1_380 + 7);
        let mut maker = Maker::new(version);
        maker.header.set_options_raw(&[1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
        let mut first = maker.clone();
        let packets: Vec<_> = data
            .chunks(1_380)
            .map(|chunk| {
                maker.header.psh = chunk.len() < 1_380;
                maker.tcp(chunk)
            })
            .collect();
        first.header.psh = true;
        let mut whole = first.tcp(&data);
        let vnet = make_partial(&mut whole, Some(1_380));
        assert_eq!(run(&packets), vec![(vnet, whole)]);
    }
}

#[test]
fn datagrams_become_the_super_packet_they_were_cut_from() {
    for version in BOTH {
        let data = payload(10 * 1_200 + 1);
        let mut maker = Maker::new(version);
        let mut first = maker.clone();
        let packets: Vec<_> = data.chunks(1_200).map(|chunk| maker.udp(chunk)).collect();
        let mut whole = first.udp(&data);
        let vnet = make_partial(&mut whole, Some(1_200));
        assert_eq!(run(&packets), vec![(vnet, whole)]);
    }
}

#[test]
fn lone_packet_is_untouched() {
    for version in BOTH {
        for bytes in [
            Maker::new(version).tcp(b"data"),
            Maker::new(version).udp(b"data"),
            echo(ip(version, Shape::Plain), 1, b""),
        ] {
            assert_eq!(run(std::slice::from_ref(&bytes)), vec![(VnetHeader::PLAIN, bytes)]);
        }
    }
}

#[test]
fn any_difference_of_tcp_headers_starts_a_new_train() {
    for version in BOTH {
        let t = if version == Version::V4 { 20 } else { 40 };
        let mut maker = Maker::new(version);
        maker.header.set_options_raw(&[1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
        let (first, second) = (maker.tcp(&payload(100)), maker.tcp(&payload(100)));
        assert_eq!(run(&[first.clone(), second.clone()]).len(), 1);
        let common = [
            (t, 1, "source port"),
            (t + 3, 1, "destination port"),
            (t + 7, 1, "sequence"),
            (t + 11, 9, "acknowledgement"),
            (t + 12, 0x70, "header length"),
            (t + 13, 0x11, "FIN"),
            (t + 13, 0x12, "SYN"),
            (t + 13, 0x14, "RST"),
            (t + 13, 0x00, "no ACK"),
            (t + 13, 0x30, "URG"),
            (t + 13, 0x50, "ECE"),
            (t + 13, 0x90, "CWR"),
            (t + 15, 1, "window"),
            (t + 19, 1, "urgent pointer"),
            (t + 27, 1, "time stamp"),
        ];
        let own: &[(usize, u8, &str)] = match version {
            Version::V4 => &[
                (1, 3, "congestion experienced"),
                (6, 0x40, "DF"),
                (8, 60, "TTL"),
                (5, 7, "identification"),
                (15, 9, "source"),
            ],
            Version::V6 => &[
                (1, 0x3a, "congestion experienced"),
                (3, 1, "flow label"),
                (7, 60, "hop limit"),
                (39, 8, "destination"),
            ],
        };
        for (at, value, what) in common.iter().chain(own) {
            let packets = [first.clone(), changed(&second, *at, *value)];
            let expected: Vec<_> = packets.iter().map(|p| (VnetHeader::PLAIN, p.clone())).collect();
            assert_eq!(run(&packets), expected, "{what}");
        }
    }
}

#[test]
fn any_difference_of_udp_headers_starts_a_new_train() {
    for version in BOTH {
        let t = if version == Version::V4 { 20 } else { 40 };
        let mut maker = Maker::new(version);
        let (first, second) = (maker.udp(&payload(100)), maker.udp(&payload(100)));
        assert_eq!(run(&[first.clone(), second.clone()]).len(), 1);
        let hop_limit = if version == Version::V4 { 8 } else { 7 };
        for at in [t, t + 3, hop_limit] {
            assert_eq!(run(&[first.clone(), changed(&second, at, 1)]).len(), 2);
        }
        let mut without = second.clone();
        write16(&mut without, t + 6, 0).unwrap();
        assert_eq!(run(&[first.clone(), without]).len(), 2, "no checksum to verify");
        let mut short = second;
        write16(&mut short, t + 4, 50).unwrap();
        assert_eq!(run(&[first, short]).len(), 2, "UDP length below the packet's");
    }
}

#[test]
fn packets_that_cannot_fragment_need_no_consecutive_identification() {
    let mut maker = Maker::new(Version::V4);
    maker.dont_fragment = true;
    let packets = [0, 0, 777].map(|id| {
        maker.id = id;
        maker.tcp(&payload(100))
    });
    assert_eq!(counts(&run(&packets)), [3]);
}

#[test]
fn push_and_short_packets_end_a_train() {
    for version in BOTH {
        let mut maker = Maker::new(version);
        let mut packets = Vec::new();
        for (push, len) in
            [(false, 100), (true, 100), (true, 100), (false, 100), (false, 99), (false, 100), (false, 101)]
        {
            maker.header.psh = push;
            packets.push(maker.tcp(&payload(len)));
        }
        let trains = run(&packets);
        assert_eq!(counts(&trains), [2, 1, 2, 1, 1]);
        let cut: Vec<_> = trains.iter().flat_map(|(vnet, bytes)| cut(vnet, bytes)).collect();
        assert_eq!(cut, packets);
    }
}

#[test]
fn trains_keep_to_64_packets_and_61000_bytes() {
    for version in BOTH {
        let mut maker = Maker::new(version);
        let small: Vec<_> = (0..130).map(|_| maker.tcp(&payload(100))).collect();
        assert_eq!(counts(&run(&small)), [64, 64, 2]);
        let large: Vec<_> = (0..9).map(|_| maker.udp(&payload(8_000))).collect();
        let trains = run(&large);
        assert_eq!(counts(&trains), [7, 2]);
        assert!(trains.iter().all(|(_, bytes)| bytes.len() <= 61_000));
    }
}

#[test]
fn packet_with_a_wrong_checksum_travels_alone_and_untouched() {
    for version in BOTH {
        for datagrams in [false, true] {
            for bad in 0..4 {
                let mut maker = Maker::new(version);
                let mut packets: Vec<_> = (0..4)
                    .map(|_| if datagrams { maker.udp(&payload(100)) } else { maker.tcp(&payload(100)) })
                    .collect();
                *packets[bad].last_mut().unwrap() ^= 1;
                let trains = run(&packets);
                let expected: &[usize] = [&[1, 3][..], &[1, 1, 2], &[2, 1, 1], &[3, 1]][bad];
                assert_eq!(counts(&trains), expected);
                assert!(trains.contains(&(VnetHeader::PLAIN, packets[bad].clone())));
            }
        }
    }
}

#[test]
fn wrong_ipv4_header_checksum_is_not_repaired() {
    for bad in 0..2 {
        let mut maker = Maker::new(Version::V4);
        let mut packets = [maker.tcp(&payload(100)), maker.tcp(&payload(100))];
        packets[bad][10] ^= 1;
        assert_eq!(run(&packets), packets.map(|p| (VnetHeader::PLAIN, p)));
    }
}

#[test]
fn nothing_overtakes_within_a_flow() {
    for version in BOTH {
        let data = |maker: &mut Maker| maker.tcp(&payload(100));
        let mut maker = Maker::new(version);
        let mut ack = maker.clone();
        let options = tcp(ip(version, Shape::Extended), tcp_header(3), &payload(100));
        let fragment = udp(fragment_headers(version, 0, true), &payload(64));
        let later = raw(fragment_headers(version, 64, false), protocol::UDP, &payload(64));
        for between in [ack.tcp(b""), options, fragment, later] {
            let packets = [data(&mut maker), data(&mut maker), between, data(&mut maker), data(&mut maker)];
            maker.id = maker.id.wrapping_add(1);
            let trains = run(&packets);
            assert_eq!(counts(&trains), [2, 1, 2]);
            assert_eq!(trains[1], (VnetHeader::PLAIN, packets[2].clone()));
        }
        let other = echo(ip(version, Shape::Plain), 1, b"ping");
        let packets = [data(&mut maker), other, data(&mut maker)];
        assert_eq!(counts(&run(&packets)), [2, 1], "another protocol is another flow");
    }
}

#[test]
fn eight_interleaved_flows_are_merged() {
    let packets = |flows: u16| {
        let mut makers: Vec<_> = (0..flows)
            .map(|flow| {
                let mut maker = Maker::new(Version::V6);
                maker.header.source_port = 1_000 + flow;
                maker
            })
            .collect();
        let rounds =
            (0..3).flat_map(|_| makers.iter_mut().map(|maker| maker.tcp(&payload(50))).collect::<Vec<_>>());
        rounds.collect::<Vec<_>>()
    };
    assert_eq!(counts(&run(&packets(8))), [3; 8]);
    assert_eq!(
        counts(&run(&packets(9))),
        [1; 27],
        "the oldest gives way: in turns, none is left when its next comes"
    );
}

#[test]
fn datagrams_are_left_apart_where_the_kernel_refuses_them() {
    let mut maker = Maker::new(Version::V4);
    let packets = [maker.udp(b"same"), maker.udp(b"size")];
    let mut coalescer = Coalescer::new();
    coalescer.merge_udp(false);
    assert_eq!(counts(&run_with(&mut coalescer, &packets)), [1, 1]);
    coalescer.merge_udp(true);
    assert_eq!(counts(&run_with(&mut coalescer, &packets)), [2]);
}

#[test]
fn cleared_coalescer_has_forgotten_everything() {
    let mut coalescer = Coalescer::new();
    let mut maker = Maker::new(Version::V4);
    let first = run_with(&mut coalescer, &[maker.tcp(b"1234")]);
    let second = run_with(&mut coalescer, &[maker.tcp(b"1234")]);
    assert_eq!((first.len(), second.len()), (1, 1));
    coalescer.clear();
    assert_eq!(coalescer.trains().count(), 0);
}

/// What a sender may do next: (flow, size, PSH, what is odd about the packet).
type Step = (usize, usize, bool, u8);

/// The packets of three TCP and three UDP flows, as these steps interleave them, and the flow of each.
fn traffic(version: Version, steps: &[Step]) -> Vec<(usize, Vec<u8>)> {
    let mut makers: Vec<_> = (0..3).map(|_| Maker::new(version)).collect();
    for (maker, port) in makers.iter_mut().zip(7_000..) {
        maker.header.source_port = port;
    }
    steps
        .iter()
        .map(|&(flow, size, push, odd)| {
            let maker = &mut makers[flow % 3];
            maker.header.psh = push;
            maker.header.fin = odd == 1;
            if odd == 2 {
                maker.header.window_size += 1;
            }
            if odd == 3 {
                maker.header.sequence_number = maker.header.sequence_number.wrapping_sub(50);
            }
            if odd == 4 {
                maker.id = maker.id.wrapping_add(5);
            }
            let mut bytes = if flow < 3 {
                maker.tcp(&payload(size))
            } else {
                let port = maker.header.source_port;
                let ip = maker.ip();
                let mut out = Vec::new();
                PacketBuilder::ip(ip).udp(port, 53).write(&mut out, &payload(size)).unwrap();
                out
            };
            if odd == 5 {
                *bytes.last_mut().unwrap() ^= 1;
            }
            (flow, bytes)
        })
        .collect()
}

fn flow_of(bytes: &[u8]) -> (u8, u16) {
    let packet = Packet::parse(bytes).unwrap();
    (packet.protocol, packet.ports(bytes).unwrap().0)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn every_flow_arrives_byte_for_byte_and_in_order(
        v6: bool,
        steps in prop::collection::vec((0..6_usize, prop_oneof![4 => Just(100_usize), 1 => 0..120_usize], prop::bool::weighted(0.1), 0..40_u8), 1..120),
    ) {
        let version = if v6 { Version::V6 } else { Version::V4 };
        let packets: Vec<_> = traffic(version, &steps).into_iter().map(|(_, bytes)| bytes).collect();
        let trains = run(&packets);
        let arrived: Vec<_> = trains.iter().flat_map(|(vnet, bytes)| cut(vnet, bytes)).collect();
        prop_assert_eq!(arrived.len(), packets.len());
        let flows: std::collections::BTreeSet<_> = packets.iter().map(|p| flow_of(p)).collect();
        for flow in flows {
            let sent: Vec<_> = packets.iter().filter(|p| flow_of(p) == flow).collect();
            let got: Vec<_> = arrived.iter().filter(|p| flow_of(p) == flow).collect();
            prop_assert_eq!(sent, got);
        }
        // Equal packets keep their order, so the n-th of them is the n-th that was pushed.
        let mut pending: Vec<_> = packets.iter().map(Some).collect();
        let mut firsts = Vec::new();
        for (vnet, bytes) in &trains {
            let places: Vec<_> = cut(vnet, bytes).iter()
                .map(|packet| {
                    let place = pending.iter().position(|p| *p == Some(packet)).unwrap();
                    pending[place] = None;
                    place
                })
                .collect();
            firsts.push(places[0]);
        }
        prop_assert!(firsts.is_sorted(), "trains stand in the order of their first packets: {:?}", firsts);
    }

    #[test]
    fn split_then_coalesce_gives_the_same_super_packet(
        v6: bool, udp_flow: bool, data in prop::collection::vec(any::<u8>(), 2..20_000), size in 400..1_500_u16, push: bool,
    ) {
        prop_assume!(data.len() > usize::from(size));
        let version = if v6 { Version::V6 } else { Version::V4 };
        let mut maker = Maker::new(version);
        maker.header.psh = push;
        let mut whole = if udp_flow { maker.udp(&data) } else { maker.tcp(&data) };
        let vnet = make_partial(&mut whole, Some(size));
        prop_assert_eq!(run(&cut(&vnet, &whole)), vec![(vnet, whole)]);
    }
}
