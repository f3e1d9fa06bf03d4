//! What an application's own sockets can do: options, extension headers, sources, several interfaces. Most of it needs no privilege.

use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use crate::Case;
use crate::lab::{Agents, Lab};
use crate::packets::{self, CANARY};
use crate::pod::Pod;
use crate::ways::{self, BOTH, BRIDGED, Way, all_texts, odd, targets, texts};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case::new("control_source_routes_and_socket_options_are_seen_without_agents", |lab| {
        let reached: usize = [ROUTED, WAYS, DEVICES].into_iter().map(|some| ways::seen(lab, some)).sum();
        assert!(reached > 0, "no canary reached another pod: the sniffers see nothing");
    })
    .agents(Agents::Off)
    .looks_itself(),
    Case::new("promise_1_routing_headers_and_source_routes_carry_nothing", |lab| ways::closed(lab, ROUTED))
        .every_rp_filter()
        .and_with_ranges(),
    Case::new("promise_1_no_option_of_an_applications_socket_leaves_in_clear", |lab| ways::closed(lab, WAYS))
        .every_rp_filter()
        .and_with_ranges(),
    Case::new("promise_1_no_address_route_or_device_of_the_pods_own_leads_around", |lab| {
        ways::closed(lab, DEVICES)
    })
    .every_rp_filter()
    .and_with_ranges(),
    Case::new("control_a_second_device_is_seen_without_agents", |lab| assert!(second_device(lab) > 0))
        .agents(Agents::Off)
        .looks_itself(),
    Case::new("promise_1_a_device_that_is_added_later_is_guarded_too", |lab| {
        assert_eq!(second_device(lab), 0)
    })
    .every_rp_filter()
    .and_with_ranges(),
];

/// The first hop is no address of the project; the last one is.
const ROUTED: &[Way] = &[
    ("a segment routing header of an unprivileged process", BOTH, |lab, pod| {
        odd(lab, pod, "--unprivileged", &["segment_routing"], &texts(lab, false), 7_007)
    }),
    ("a segment routing header on the device", BOTH, |lab, pod| {
        odd(lab, pod, "--unprivileged --device eth0", &["segment_routing"], &texts(lab, false), 7_007)
    }),
    ("a routing header of type 2", BOTH, |lab, pod| {
        odd(lab, pod, "--unprivileged", &["home_address"], &texts(lab, false), 7_007)
    }),
    ("a loose source route", BOTH, |lab, pod| {
        odd(lab, pod, "", &["loose_route", "returned_route"], &texts(lab, true), 7_007)
    }),
    ("a strict source route", BOTH, |lab, pod| {
        odd(lab, pod, "", &["strict_route"], &texts(lab, true), 7_007)
    }),
    ("a source route of an unprivileged process", BOTH, |lab, pod| {
        odd(
            lab,
            pod,
            "--unprivileged",
            &["loose_route", "strict_route", "returned_route"],
            &texts(lab, true),
            7_007,
        )
    }),
];

const PLAIN: &[&str] =
    &["udp", "zero", "big", "cork", "more", "segments", "dontroute", "pktinfo", "udplite", "mapped"];

const WAYS: &[Way] = &[
    ("datagrams of every kind", BOTH, |lab, pod| {
        odd(lab, pod, "--unprivileged", PLAIN, &all_texts(lab), 7_007)
    }),
    ("datagrams of every kind on the device", BOTH, |lab, pod| {
        odd(lab, pod, "--unprivileged --device eth0", PLAIN, &all_texts(lab), 7_007)
    }),
    ("TCP fast open", BOTH, |lab, pod| {
        odd(lab, pod, "--unprivileged --device eth0", &["fastopen", "tcp"], &peers(lab), 8_080)?;
        odd(lab, pod, "--unprivileged", &["fastopen"], &peers(lab), 8_080)
    }),
    ("record route and time stamps", BOTH, |lab, pod| {
        for options in ["--unprivileged", "--unprivileged --device eth0"] {
            odd(lab, pod, options, &["record_route", "timestamp"], &texts(lab, true), 7_007)?;
        }
        Ok(())
    }),
    ("hop-by-hop and destination options", BOTH, |lab, pod| {
        for options in ["", "--device eth0", "--unprivileged"] {
            let kinds = ["hop_by_hop", "destination_options", "routed_options"];
            let sent = odd(lab, pod, options, &kinds, &texts(lab, false), 7_007);
            // Without the privilege the kernel refuses.
            if !options.contains("unprivileged") {
                sent?;
            }
        }
        Ok(())
    }),
    ("IP_FREEBIND and IP_TRANSPARENT", BOTH, |lab, pod| {
        for options in ["", "--device eth0"] {
            odd(lab, pod, options, &["freebind", "transparent"], &all_texts(lab), 7_007)?;
        }
        Ok(())
    }),
];

const DEVICES: &[Way] = &[
    ("a further IPv6 address", BOTH, |lab, pod| {
        let own = "fd00:10:1:77::99";
        with(
            lab,
            pod,
            &format!("ip -6 addr add {own}/128 dev eth0 nodad"),
            &format!("ip -6 addr del {own}/128 dev eth0"),
            || {
                let own: Ipv6Addr = own.parse().expect("an address");
                for to in targets(lab).into_iter().filter(IpAddr::is_ipv6) {
                    let _ = pod.udp((own, 0)).send_to(CANARY, (to, 7_007));
                    let frame = packets::udp(own.into(), to, 7, 7_007, CANARY);
                    let _ = pod.send_frame(&packets::frame(pod.mac(), [0xff; 6], &frame));
                }
                Ok(())
            },
        )
    }),
    ("temporary IPv6 addresses", BRIDGED, temporary),
    ("a second default route", BOTH, |lab, pod| {
        let gateway = "$(ip -4 route show default | awk '{print $3; exit}')";
        let make = format!(
            "ip route add default via {gateway} dev eth0 metric 7 && ip -6 route add default via fe80::1 dev eth0 metric 7"
        );
        let unmake = "ip route del default metric 7; ip -6 route del default metric 7";
        with(lab, pod, &make, unmake, || {
            odd(lab, pod, "--unprivileged", PLAIN, &all_texts(lab), 7_007)?;
            odd(lab, pod, "--unprivileged --device eth0", &["udp"], &all_texts(lab), 7_007)
        })
    }),
    ("routes and rules that come first", BOTH, |lab, pod| {
        let gateway = "$(ip -4 route show default | awk '{print $3; exit}')";
        let make = format!(
            "ip rule add priority 3 lookup 33; ip route add default via {gateway} dev eth0 onlink table 33"
        );
        with(lab, pod, &make, "ip route flush table 33; ip rule del priority 3", || {
            odd(lab, pod, "--unprivileged", PLAIN, &texts(lab, true), 7_007)
        })
    }),
    ("macvlan on the device", BRIDGED, |lab, pod| {
        let make = "ip link add mv0 link eth0 type macvlan mode bridge && ip link set mv0 up && ip addr add 10.1.1.111/24 dev mv0";
        with(lab, pod, make, "ip link del mv0", || {
            for to in targets(lab).into_iter().filter(IpAddr::is_ipv4) {
                let command = format!("--device mv0 udp {to} 7007");
                ways::run_odd(lab, pod, &command);
                let mv0 = Pod { device: "mv0".to_owned(), ..pod.clone() };
                let packet = packets::udp(pod.v4.into(), to, 7, 7_007, CANARY);
                let _ = mv0.send_frame(&packets::frame(mv0.mac(), [0xff; 6], &packet));
            }
            Ok(())
        })
    }),
    ("VXLAN to a peer", BOTH, |lab, pod| {
        let remote = lab.pod("shop-web2").v4;
        let make = format!(
            "ip link add vx0 type vxlan id 5 remote {remote} dstport 4789 dev eth0 && ip link set vx0 up && ip addr add 10.77.0.1/24 dev vx0"
        );
        with(lab, pod, &make, "ip link del vx0", || {
            let vx0 = Pod { device: "vx0".to_owned(), ..pod.clone() };
            let packet = packets::udp(pod.v4.into(), remote.into(), 7, 7_007, CANARY);
            let _ = vx0.send_frame(&packets::frame(vx0.mac(), [0xff; 6], &packet));
            Ok(())
        })
    }),
];

/// Both addresses of both backends, as text.
fn peers(lab: &Lab) -> Vec<String> {
    ["shop-web1", "shop-web2"]
        .iter()
        .flat_map(|pod| lab.pod(pod).addresses())
        .map(|a| a.to_string())
        .collect()
}

/// Runs `f` between two shell commands in the pod; what cannot be made is the reason why it is not run.
fn with(
    lab: &Lab,
    pod: &Pod,
    make: &str,
    unmake: &str,
    f: impl FnOnce() -> Result<(), String>,
) -> Result<(), String> {
    let made = lab.exec(&pod.name, make, Duration::from_secs(5));
    let outcome = if made.code == 0 { f() } else { Err(format!("{make}: {}", made.err.trim())) };
    std::thread::sleep(Duration::from_millis(20));
    lab.exec(&pod.name, unmake, Duration::from_secs(5));
    outcome
}

/// The kernel makes them of a prefix.
fn temporary(lab: &Lab, pod: &Pod) -> Result<(), String> {
    let sysctl = "/proc/sys/net/ipv6/conf/eth0/use_tempaddr";
    let before = lab.exec(&pod.name, &format!("cat {sysctl}"), Duration::from_secs(5)).out;
    let prefix = "fd00:10:1:78::5/64";
    let make = format!("echo 2 >{sysctl} && ip -6 addr add {prefix} dev eth0 nodad mngtmpaddr noprefixroute");
    let unmake = format!("ip -6 addr del {prefix} dev eth0; echo {} >{sysctl}", before.trim());
    with(lab, pod, &make, &unmake, || {
        let found = lab.exec(&pod.name, "ip -6 -o addr show dev eth0 temporary", Duration::from_secs(5)).out;
        let own =
            found.split_whitespace().find_map(|word| word.strip_suffix("/64")?.parse::<Ipv6Addr>().ok());
        let own = own.ok_or_else(|| format!("the kernel made no temporary address: {found}"))?;
        std::thread::sleep(Duration::from_millis(50));
        for to in targets(lab).into_iter().filter(IpAddr::is_ipv6) {
            let bound = pod.enter(|| std::net::UdpSocket::bind((own, 0))).map_err(|e| e.to_string())?;
            let _ = bound.send_to(CANARY, (to, 7_007));
            let packet = packets::udp(own.into(), to, 7, 7_007, CANARY);
            let _ = pod.send_frame(&packets::frame(pod.mac(), [0xff; 6], &packet));
        }
        Ok(())
    })
}

/// Attaches the pod to the bridge a second time, as Multus does, and speaks to peers there. Frames with the canary that came out.
fn second_device(lab: &Lab) -> usize {
    let (pod, node) = (lab.pod("shop-client"), lab.netns("node1"));
    let in_node = |command: &str| {
        let ran = lab.exec("node1", command, Duration::from_secs(5));
        assert!(ran.code == 0, "{command}: {}", ran.err);
    };
    in_node(&format!(
        "ip link add x-second mtu 1450 type veth peer name eth1 netns {}-shop-client",
        lab.name()
    ));
    let _gone = Removed(lab);
    in_node("ip link set x-second master cni0 up");
    let routes = "ip link set eth1 up && ip addr add 10.1.1.112/32 dev eth1 && ip -6 addr add fd00:10:1:1::112/128 dev eth1 nodad && \
                  ip -6 route add fd00:10:1:1::/64 dev eth1 metric 4096";
    let ran = lab.exec("shop-client", routes, Duration::from_secs(5));
    assert!(ran.code == 0, "{}", ran.err);
    // The agent may take a moment to learn of it.
    std::thread::sleep(Duration::from_millis(500));
    let tap = crate::pod::Sniffer::on(&node, "x-second");
    let _ = odd(lab, pod, "--unprivileged --device eth1", &["udp", "big"], &all_texts(lab), 7_007);
    let second = Pod { device: "eth1".to_owned(), ..pod.clone() };
    for to in targets(lab) {
        let packet = packets::udp(pod.address(to), to, 7, 7_007, CANARY);
        let _ = second.send_frame(&packets::frame(second.mac(), [0xff; 6], &packet));
    }
    std::thread::sleep(Duration::from_millis(100));
    tap.drain().iter().filter(|frame| packets::has_canary(frame)).count()
}

/// Takes the second device away.
struct Removed<'l>(&'l Lab);

impl Drop for Removed<'_> {
    fn drop(&mut self) {
        self.0.exec("node1", "ip link del x-second", Duration::from_secs(5));
    }
}
