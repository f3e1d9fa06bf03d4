//! Ranges of addresses: the cluster's pods and Services, its nodes, exemptions.
//!
//! A range decides what becomes of an address that no object names. Sans-IO.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// A set of addresses, as the fewest networks that hold exactly those.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ranges(Vec<IpNet>);

impl Ranges {
    /// Whether it holds no address at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether it holds `address`.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        self.0.iter().any(|net| net.contains(&address))
    }

    /// Its networks, sorted; none overlaps another.
    pub fn iter(&self) -> impl Iterator<Item = IpNet> + '_ {
        self.0.iter().copied()
    }
}

impl FromIterator<IpNet> for Ranges {
    fn from_iter<T: IntoIterator<Item = IpNet>>(nets: T) -> Self {
        let nets: Vec<IpNet> = nets.into_iter().map(|net| net.trunc()).collect();
        Self(IpNet::aggregate(&nets))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(nets: &[&str]) -> Ranges {
        nets.iter().map(|net| net.parse::<IpNet>().unwrap()).collect()
    }

    #[test]
    fn overlapping_networks_become_one_and_host_bits_do_not_count() {
        let ranges = ranges(&["10.1.0.0/17", "10.1.128.0/17", "10.1.2.3/24", "fd00:10::5/32"]);
        assert_eq!(
            ranges.iter().map(|net| net.to_string()).collect::<Vec<_>>(),
            ["10.1.0.0/16", "fd00:10::/32"]
        );
        assert!(
            ranges.contains("10.1.255.1".parse().unwrap())
                && ranges.contains("fd00:10:9::1".parse().unwrap())
        );
        assert!(
            !ranges.contains("10.2.0.0".parse().unwrap()) && !ranges.contains("fd00:11::".parse().unwrap())
        );
        assert!(Ranges::default().is_empty() && !Ranges::default().contains("10.1.0.1".parse().unwrap()));
    }
}
