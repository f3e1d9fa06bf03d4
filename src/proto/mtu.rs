//! Sizes: how much of the link's MTU a sealed packet leaves to the pod.

use std::net::IpAddr;

/// Most bytes in one train of datagrams. With the headers of an overlay (VXLAN, Geneve with options) before it, a longer
/// one passes 65,535 bytes and is cut in software on the way, which costs half the throughput.
pub const MAX_TRAIN: usize = 65_000;
/// Most datagrams in one train: the kernel's UDP_MAX_SEGMENTS was 64 until 6.9.
pub const MAX_SEGMENTS: usize = 64;

/// Outer IPv4 and UDP headers, record header and tag.
const OVERHEAD_V4: u32 = 60;
/// Outer IPv6 and UDP headers, record header and tag.
const OVERHEAD_V6: u32 = 80;

/// The MTU of a protected route: the link's, less the overhead, rounded down to 16 so that a full packet needs no
/// padding. Never below what the family must carry.
#[must_use]
pub fn inner_mtu(link_mtu: u32, family: IpAddr) -> u32 {
    let (overhead, least) = if family.is_ipv4() { (OVERHEAD_V4, 576) } else { (OVERHEAD_V6, 1280) };
    (link_mtu.saturating_sub(overhead) & !15).max(least)
}

/// The MTU of `tenc0` for a pod with the addresses `own`: what the smaller overhead leaves; the routes say what each
/// family really has.
#[must_use]
pub fn tun_mtu(link_mtu: u32, own: &[IpAddr]) -> u32 {
    own.iter().map(|own| inner_mtu(link_mtu, *own)).max().unwrap_or(link_mtu)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_inner_packet_fills_the_link_without_padding() {
        let v4: IpAddr = "10.0.0.1".parse().unwrap();
        let v6: IpAddr = "fd00::1".parse().unwrap();
        for (link, want4, want6) in [(1500, 1440, 1408), (1450, 1376, 1360), (9000, 8928, 8912)] {
            assert_eq!(inner_mtu(link, v4), want4);
            assert_eq!(inner_mtu(link, v6), want6);
            assert!(inner_mtu(link, v4) + 60 <= link && inner_mtu(link, v6) + 80 <= link);
        }
    }
}
