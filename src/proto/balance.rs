//! Endpoint choice: which ready workload of a Service serves a new flow.
//!
//! Rendezvous hashing over (5-tuple, seed): every endpoint gets a score for the flow, the highest wins. A choice that
//! was forgotten is computed equal as long as its endpoint is there, and a change of one endpoint moves only its own
//! flows. SipHash, because the value has to stay equal across versions of this program.
//! Source: Thaler and Ravishankar, "Using name-based mappings to increase hit rates", 1998.

use std::hash::{Hash, Hasher};
use std::net::IpAddr;

use siphasher::sip::SipHasher13;

use super::directory::{ServiceEndpoint, ServicePort, Vip};
use super::nat::Tuple;

/// The endpoint of `port` for the flow `tuple` of the pod; `None` where no endpoint is ready.
#[must_use]
pub fn choose<'a>(
    seed: &[u8; 16],
    vip: &Vip,
    port: &'a ServicePort,
    tuple: &Tuple,
    usable: impl Fn(&ServiceEndpoint) -> bool,
) -> Option<&'a ServiceEndpoint> {
    let client_port = if vip.client_ip_affinity { 0 } else { tuple.local.1 };
    port.endpoints
        .iter()
        .filter(|endpoint| endpoint.ready && usable(endpoint))
        .max_by_key(|endpoint| score(seed, tuple, client_port, endpoint))
}

fn score(seed: &[u8; 16], tuple: &Tuple, client_port: u16, endpoint: &ServiceEndpoint) -> u64 {
    let mut hasher = SipHasher13::new_with_key(seed);
    hasher.write_u8(tuple.protocol);
    hash_address(tuple.local.0, &mut hasher);
    hasher.write_u16(client_port);
    hash_address(tuple.remote.0, &mut hasher);
    hasher.write_u16(tuple.remote.1);
    hash_address(endpoint.address, &mut hasher);
    endpoint.port.hash(&mut hasher);
    hasher.finish()
}

fn hash_address(address: IpAddr, hasher: &mut impl Hasher) {
    match address {
        IpAddr::V4(v4) => hasher.write(&v4.octets()),
        IpAddr::V6(v6) => hasher.write(&v6.octets()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::directory::Protocol;

    fn service(n: u8) -> Vip {
        let endpoints = (1..=n)
            .map(|i| ServiceEndpoint { address: [10, 1, 1, i].into(), port: 8080, ready: true })
            .collect();
        Vip {
            address: [10, 96, 0, 1].into(),
            ports: vec![ServicePort { protocol: Protocol::Tcp, port: 80, endpoints }],
            client_ip_affinity: false,
        }
    }

    fn flow(port: u16) -> Tuple {
        Tuple { protocol: 6, local: ([10, 1, 2, 3].into(), port), remote: ([10, 96, 0, 1].into(), 80) }
    }

    #[test]
    fn ten_thousand_flows_spread_within_five_percent_of_even() {
        let vip = service(4);
        let mut counts = [0u32; 5];
        for port in 20_000..30_000 {
            let chosen = choose(&[7; 16], &vip, &vip.ports[0], &flow(port), |_| true).unwrap();
            let IpAddr::V4(v4) = chosen.address else { panic!() };
            counts[usize::from(v4.octets()[3])] += 1;
        }
        for count in &counts[1..] {
            assert!((2375..=2625).contains(count), "{counts:?}");
        }
    }

    #[test]
    fn removing_an_endpoint_moves_only_its_own_flows() {
        let (three, vip) = (service(3), service(4));
        for port in 0..1000 {
            let before = choose(&[1; 16], &vip, &vip.ports[0], &flow(port), |_| true).unwrap();
            let after = choose(&[1; 16], &three, &three.ports[0], &flow(port), |_| true).unwrap();
            if before.address != IpAddr::from([10, 1, 1, 4]) {
                assert_eq!(before, after);
            }
        }
    }

    #[test]
    fn client_ip_affinity_ignores_the_port() {
        let mut vip = service(4);
        vip.client_ip_affinity = true;
        let first = choose(&[1; 16], &vip, &vip.ports[0], &flow(1), |_| true);
        assert!((2..500).all(|p| choose(&[1; 16], &vip, &vip.ports[0], &flow(p), |_| true) == first));
    }

    #[test]
    fn an_endpoint_that_is_not_ready_gets_no_new_flow() {
        let mut vip = service(1);
        vip.ports[0].endpoints[0].ready = false;
        assert_eq!(choose(&[1; 16], &vip, &vip.ports[0], &flow(1), |_| true), None);
    }
}
