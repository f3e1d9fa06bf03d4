//! Who the pod is: the directory names the project and the addresses that are the pod's own.

use std::net::IpAddr;

use super::netns::PodError;
use crate::launcher::directory::Objects;

/// The project of the one Pod of the directory that has one of the pod's `addresses`.
///
/// # Errors
///
/// If none has, or several have.
pub fn project_of(objects: &Objects, addresses: &[IpAddr]) -> Result<String, PodError> {
    let mut holders = objects.workloads_at(addresses);
    match (holders.next(), holders.next()) {
        (Some((id, _)), None) => Ok(id.namespace.clone()),
        (None, _) => Err(PodError::NoPod { addresses: addresses.to_vec() }),
        (Some(_), Some(_)) => Err(PodError::SeveralPods { addresses: addresses.to_vec() }),
    }
}

/// The workload's own addresses, one per family at most: those of its Pod in the directory that the interface has;
/// without a Pod, the interface's first ones. Fixed from here on.
#[must_use]
pub fn own_addresses(objects: &Objects, project: &str, interface: &[IpAddr]) -> Vec<IpAddr> {
    let pod = objects.workloads_at(interface).find(|(id, _)| id.namespace == project);
    let candidates = pod.map_or(interface, |(_, pod)| &pod.addresses);
    let first =
        |ipv4: bool| candidates.iter().find(|a| a.is_ipv4() == ipv4 && interface.contains(a)).copied();
    [first(true), first(false)].into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::{Exit, ExitCode as _};
    use crate::launcher::directory::{Id, Pod};

    fn pod(namespace: &str, name: &str, addresses: &[&str]) -> (Id, Pod) {
        let id = Id { namespace: namespace.to_owned(), name: name.to_owned() };
        let addresses = addresses.iter().map(|a| a.parse().unwrap()).collect();
        (id, Pod { live: true, addresses, ..Pod::default() })
    }

    fn ips(texts: &[&str]) -> Vec<IpAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn the_project_is_that_of_the_one_pod_with_the_address() {
        let mut objects = Objects::default();
        objects.pods.extend([pod("shop", "a", &["10.0.0.1", "fd00::1"]), pod("bank", "b", &["10.0.0.2"])]);
        assert_eq!(project_of(&objects, &ips(&["10.0.0.1", "fd00::1"])).unwrap(), "shop");
        assert_eq!(project_of(&objects, &ips(&["10.0.0.2"])).unwrap(), "bank");
        for (addresses, expected) in
            [(["10.0.0.9", "::9"], "no Pod"), (["10.0.0.1", "10.0.0.2"], "several Pods")]
        {
            let error = project_of(&objects, &ips(&addresses)).unwrap_err();
            assert!(error.to_string().starts_with(expected), "{error}");
            assert_eq!(error.exit(), Exit::Usage);
        }
    }

    #[test]
    fn own_addresses_are_those_that_directory_and_interface_share() {
        let mut objects = Objects::default();
        objects.pods.extend([pod("shop", "a", &["10.0.0.2", "fd00::1"]), pod("bank", "b", &["10.0.0.3"])]);
        let own = |interface: &[&str]| own_addresses(&objects, "shop", &ips(interface));
        assert_eq!(own(&["10.0.0.1", "10.0.0.2", "fd00::1"]), ips(&["10.0.0.2", "fd00::1"]));
        assert_eq!(own(&["10.0.0.2", "fd00::9"]), ips(&["10.0.0.2"]));
        assert_eq!(own(&["10.0.0.3", "10.0.0.4", "fd00::9"]), ips(&["10.0.0.3", "fd00::9"]));
        assert_eq!(own(&["fd00::1"]), ips(&["fd00::1"]));
    }
}
