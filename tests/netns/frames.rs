//! Frames of packet sockets and packets of raw sockets that hide what they are: labels that lie, tags, tunnels of others.
//!
//! A packet socket names the ethertype that the kernel is to believe, beside the one that stands in the frame: a guard that
//! believes the kernel's takes IPv4 for ARP. NET_RAW is enough, which containers have by default in many clusters.
//!
//! May touch: packet and raw sockets in the pods. Source: packet(7); IEEE 802.1Q.

use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsRawFd as _;

use nix::sys::socket as sk;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::Case;
use crate::lab::{Agents, Lab, external};
use crate::packets::{self, CANARY};
use crate::pod::Pod;
use crate::ways::{self, BOTH, Way, targets};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case::new("control_mislabelled_and_wrapped_frames_are_seen_without_agents", |lab| {
        assert!(ways::seen(lab, WAYS) > 0, "no canary reached another pod: the sniffers see nothing");
    })
    .agents(Agents::Off)
    .looks_itself(),
    Case::new("promise_1_frames_whose_label_lies_do_not_leave", |lab| ways::closed(lab, WAYS))
        .every_rp_filter()
        .and_with_ranges(),
];

/// The bridge's hardware address; a routed link takes every one.
const GATEWAY: [u8; 6] = [2, 0, 0, 1, 1, 1];
const ARP: u16 = 0x0806;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const LLDP: u16 = 0x88cc;
const VLAN: u16 = 0x8100;
const QINQ: u16 = 0x88a8;

const WAYS: &[Way] = &[
    ("IP labelled ARP", BOTH, |lab, pod| labelled(lab, pod, ARP, &[])),
    ("IPv4 labelled IPv6, and the other way", BOTH, |lab, pod| {
        labelled(lab, pod, IPV6, &[])?;
        labelled(lab, pod, IPV4, &[])
    }),
    ("IP labelled LLDP", BOTH, |lab, pod| labelled(lab, pod, LLDP, &[])),
    ("IP labelled as a protocol of 802.3", BOTH, |lab, pod| labelled(lab, pod, 0x0004, &[])),
    ("an 802.1Q tag of VLAN 0", BOTH, |lab, pod| labelled(lab, pod, VLAN, &[0x81, 0, 0, 0])),
    ("an 802.1Q tag of VLAN 0, labelled ARP", BOTH, |lab, pod| labelled(lab, pod, ARP, &[0x81, 0, 0, 0])),
    ("an 802.1Q tag of VLAN 0, labelled IP", BOTH, |lab, pod| {
        labelled(lab, pod, IPV4, &[0x81, 0, 0, 0])?;
        labelled(lab, pod, IPV6, &[0x81, 0, 0, 0])
    }),
    ("an 802.1ad tag of VLAN 0", BOTH, |lab, pod| labelled(lab, pod, QINQ, &[0x88, 0xa8, 0, 0])),
    ("two tags", BOTH, |lab, pod| labelled(lab, pod, VLAN, &[0x81, 0, 0, 0, 0x81, 0, 0, 0])),
    ("an ARP frame that is too long", BOTH, |_, pod| {
        let mut frame = packets::arp_reply(pod.v4, pod.mac(), Ipv4Addr::new(10, 1, 1, 1), [0xff; 6]);
        frame.extend(CANARY.repeat(3));
        send_labelled(pod, ARP, &frame)
    }),
    ("LLDP, and a protocol that does not exist", BOTH, |_, pod| {
        for kind in [LLDP, 0x88b5, 0x9000] {
            let head = [&[0xff; 6][..], &pod.mac(), &kind.to_be_bytes()].concat();
            send_labelled(pod, kind, &[&head[..], &CANARY.repeat(4)].concat())?;
        }
        Ok(())
    }),
    ("a frame of 802.3 with a length", BOTH, |_, pod| {
        let length = u16::try_from(3 + 2 * CANARY.len()).expect("small").to_be_bytes();
        let head = [&[0xff; 6][..], &pod.mac(), &length, &[0x42, 0x42, 3]].concat();
        send_labelled(pod, 0x0004, &[&head[..], &CANARY.repeat(2)].concat())
    }),
    ("IPIP, GRE, ESP, AH and 6in4 by a packet socket", BOTH, |lab, pod| {
        for to in targets(lab) {
            for (protocol, payload) in wrapped(pod, to) {
                let packet = packets::other(pod.address(to), to, protocol, &payload);
                send_labelled(pod, label(to), &packets::frame(pod.mac(), [0xff; 6], &packet))?;
            }
        }
        Ok(())
    }),
    ("IPIP, GRE, ESP, AH and 6in4 by a raw socket on the device", BOTH, |lab, pod| {
        for to in targets(lab) {
            for (protocol, payload) in wrapped(pod, to) {
                let socket = pod.raw(to, protocol.into());
                socket.bind_device(Some(pod.device.as_bytes())).expect("SO_BINDTODEVICE");
                // Refused by the guard, or by the kernel that wants a whole header.
                let _ = socket.send_to(&payload, &SockAddr::from(std::net::SocketAddr::from((to, 0))));
            }
        }
        Ok(())
    }),
    ("IPv4 with options by a packet socket", BOTH, |lab, pod| {
        for to in targets(lab).into_iter().filter(IpAddr::is_ipv4) {
            // No operation four times; a loose source route by way of the outside.
            let route = [&[131, 7, 4][..], &[203, 0, 113, 10], &[0]].concat();
            for options in [vec![1, 1, 1, 0], route] {
                let packet = with_options(&packets::udp(pod.v4.into(), to, 7, 7_007, CANARY), &options);
                send_labelled(pod, IPV4, &packets::frame(pod.mac(), [0xff; 6], &packet))?;
            }
        }
        Ok(())
    }),
    ("IPv4-mapped and IPv4-compatible IPv6 by a packet socket", BOTH, |lab, pod| {
        let v4 = lab.pod("shop-web1").v4.octets();
        let mapped = lab.pod("shop-web1").v4.to_ipv6_mapped();
        let compatible =
            std::net::Ipv6Addr::from([&[0; 12][..], &v4].concat().first_chunk::<16>().copied().expect("16"));
        for to in [mapped, compatible] {
            let packet = packets::udp(pod.v6.into(), to.into(), 7, 7_007, CANARY);
            send_labelled(pod, IPV6, &packets::frame(pod.mac(), [0xff; 6], &packet))?;
        }
        Ok(())
    }),
    ("source routes to peers by way of the outside, by a packet socket", BOTH, |lab, pod| {
        let [first4, first6] = external();
        for last in targets(lab) {
            let packet = match last {
                IpAddr::V4(last) => {
                    // One hop is left: the pointer is at the last address.
                    let route = [&[131, 7, 4][..], &last.octets(), &[0]].concat();
                    with_options(&packets::udp(pod.v4.into(), first4, 7, 7_007, CANARY), &route)
                }
                IpAddr::V6(last) => segment_routed(pod, first6, last),
            };
            send_labelled(pod, label(last), &packets::frame(pod.mac(), GATEWAY, &packet))?;
        }
        Ok(())
    }),
    ("bytes behind the end of an IP packet", BOTH, |lab, pod| {
        for to in targets(lab) {
            let packet = [packets::echo_request(pod.address(to), to, &[]), CANARY.to_vec()].concat();
            send_labelled(pod, label(to), &packets::frame(pod.mac(), [0xff; 6], &packet))?;
        }
        Ok(())
    }),
];

fn label(to: IpAddr) -> u16 {
    if to.is_ipv4() { IPV4 } else { IPV6 }
}

/// A datagram to each target, behind these tags, and for the kernel of type `label`.
fn labelled(lab: &Lab, pod: &Pod, label: u16, tags: &[u8]) -> Result<(), String> {
    for to in targets(lab) {
        let frame =
            packets::frame(pod.mac(), [0xff; 6], &packets::udp(pod.address(to), to, 7, 7_007, CANARY));
        send_labelled(pod, label, &[&frame[..12], tags, &frame[12..]].concat())?;
    }
    Ok(())
}

/// Writes a frame to the pod's device by a packet socket of the type `label`. Refused by a guard is no error.
fn send_labelled(pod: &Pod, label: u16, frame: &[u8]) -> Result<(), String> {
    pod.enter(|| {
        let protocol = Protocol::from(i32::from(label.to_be()));
        let socket = Socket::new(Domain::PACKET, Type::RAW, Some(protocol)).map_err(|e| e.to_string())?;
        let mut devices = nix::ifaddrs::getifaddrs().map_err(|e| e.to_string())?;
        let device = devices
            .find_map(|i| (i.interface_name == pod.device).then(|| i.address?.as_link_addr().copied())?);
        // An address without a protocol leaves the socket its own.
        sk::bind(socket.as_raw_fd(), &device.ok_or("no device")?).map_err(|e| e.to_string())?;
        let _ = sk::send(socket.as_raw_fd(), frame, sk::MsgFlags::empty());
        Ok(())
    })
}

/// Payloads of protocols that carry packets: number and bytes. Each has the canary in clear.
fn wrapped(pod: &Pod, to: IpAddr) -> Vec<(u8, Vec<u8>)> {
    let inner = packets::udp(pod.address(to), to, 7, 7_007, CANARY);
    let (ip_in_ip, ether_type) = if to.is_ipv4() { (4, [0x08, 0x00]) } else { (41, [0x86, 0xdd]) };
    vec![
        (ip_in_ip, inner.clone()),
        (if to.is_ipv4() { 41 } else { 4 }, inner.clone()),
        (47, [&[0, 0][..], &ether_type, &inner].concat()),
        (50, [&[0, 0, 1, 0, 0, 0, 0, 1][..], &inner].concat()),
        (51, [&[17, 4, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1][..], &[0; 12], &inner[inner.len() - 28..]].concat()),
        (136, [&[0, 7, 0x1b, 0x5f, 0, 8, 0, 0][..], CANARY].concat()),
    ]
}

/// A datagram by way of `first` with a routing header of type 4, one segment left.
fn segment_routed(pod: &Pod, first: IpAddr, last: std::net::Ipv6Addr) -> Vec<u8> {
    let IpAddr::V6(hop) = first else { panic!("an IPv6 address") };
    let plain = packets::udp(pod.v6.into(), last.into(), 7, 7_007, CANARY);
    let header = [&[17, 4, 4, 1, 1, 0, 0, 0][..], &last.octets(), &hop.octets()].concat();
    packets::other(pod.v6.into(), first, 43, &[&header[..], &plain[40..]].concat())
}

/// The same IPv4 packet with options, padded to words already.
fn with_options(packet: &[u8], options: &[u8]) -> Vec<u8> {
    let mut head = [&packet[..20], options].concat();
    head[0] = 0x40 | u8::try_from(head.len() / 4).expect("at most 60 bytes");
    let length = u16::try_from(packet.len() + options.len()).expect("a small packet");
    head[2..4].copy_from_slice(&length.to_be_bytes());
    head[10..12].fill(0);
    let sum = packets::header_checksum(&head);
    head[10..12].copy_from_slice(&sum.to_be_bytes());
    [&head, &packet[20..]].concat()
}
