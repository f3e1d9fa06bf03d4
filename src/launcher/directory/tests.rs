//! The rules of the directory, told in manifests.

use super::manifest::{ManifestError, Syntax, parse};
use super::*;
use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::proto::directory::{Change, Protocol, ServiceEndpoint, ServicePort, Vip, Workload};
use crate::proto::noise::{PeerKeys, PresharedKey, PublicKey};
use crate::proto::routing::Class;

/// Two backends of `web`, a client (us), and `web`'s slices of both families.
const SHOP: &str = r#"
apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: Pod
  metadata: {name: client, namespace: shop}
  spec: {containers: []}
  status:
    phase: Running
    hostIP: 192.168.0.1
    hostIPs: [{ip: 192.168.0.1}, {ip: "fd00:a::1"}]
    podIP: 10.0.0.1
    podIPs: [{ip: 10.0.0.1}, {ip: "fd00::1"}]
- apiVersion: v1
  kind: Pod
  metadata: {name: web-0, namespace: shop}
  status: {phase: Running, podIPs: [{ip: 10.0.0.2}, {ip: "fd00::2"}]}
- apiVersion: v1
  kind: Pod
  metadata: {name: web-1, namespace: shop}
  status: {phase: Pending, podIPs: [{ip: 10.0.0.3}, {ip: "fd00::3"}]}
- apiVersion: v1
  kind: Service
  metadata: {name: web, namespace: shop}
  spec:
    clusterIP: 10.96.0.1
    clusterIPs: [10.96.0.1, "fd00:96::1"]
    ports:
    - {name: http, port: 80, targetPort: http}
    - {name: dns, port: 53, protocol: UDP}
- apiVersion: discovery.k8s.io/v1
  kind: EndpointSlice
  metadata: {name: web-4, namespace: shop, labels: {kubernetes.io/service-name: web}}
  addressType: IPv4
  ports: [{name: http, port: 8080, protocol: TCP}]
  endpoints:
  - {addresses: [10.0.0.2], conditions: {ready: true}, targetRef: {kind: Pod, name: web-0, namespace: shop}}
  - {addresses: [10.0.0.3], conditions: {ready: false}, targetRef: {kind: Pod, name: web-1, namespace: shop}}
- apiVersion: discovery.k8s.io/v1
  kind: EndpointSlice
  metadata: {name: web-6, namespace: shop, labels: {kubernetes.io/service-name: web}}
  addressType: IPv6
  ports: [{name: http, port: 8080, protocol: TCP}]
  endpoints:
  - {addresses: ["fd00::2"], targetRef: {kind: Pod, name: web-0, namespace: shop}}
"#;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn ips(texts: &[&str]) -> BTreeSet<IpAddr> {
    texts.iter().map(|text| ip(text)).collect()
}

fn objects(yaml: &[&str]) -> Objects {
    let mut all = Objects::default();
    for text in yaml {
        all.extend(parse(text.as_bytes(), Syntax::Yaml).unwrap());
    }
    all
}

fn entries(yaml: &[&str]) -> Entries {
    Entries::of(&objects(yaml), "shop", &[ip("10.0.0.1"), ip("fd00::1")])
}

fn pod(name: &str, more: &str, status: &str) -> String {
    format!(
        "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, namespace: shop}}, {more} status: {{{status}}}}}"
    )
}

fn service(name: &str, spec: &str, status: &str) -> String {
    format!(
        "{{apiVersion: v1, kind: Service, metadata: {{name: {name}, namespace: shop}}, \
         spec: {{{spec}}}, status: {{{status}}}}}"
    )
}

fn slice(name: &str, of: &str, kind: &str, ports: &str, endpoints: &str) -> String {
    format!(
        "{{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {{name: {name}, namespace: shop, \
         labels: {{kubernetes.io/service-name: {of}}}}}, addressType: {kind}, \
         ports: [{ports}], endpoints: [{endpoints}]}}"
    )
}

fn endpoint(address: &str, port: u16, ready: bool) -> ServiceEndpoint {
    ServiceEndpoint { address: ip(address), port, ready }
}

#[test]
fn a_list_of_a_project_gives_workloads_vips_and_node_addresses() {
    let entries = entries(&[SHOP]);
    assert_eq!(entries.workloads, ips(&["10.0.0.2", "10.0.0.3", "fd00::2", "fd00::3"]));
    assert_eq!(entries.exempts, ips(&["192.168.0.1", "fd00:a::1"]));
    let dns = ServicePort { protocol: Protocol::Udp, port: 53, endpoints: vec![] };
    let http = |endpoints| ServicePort { protocol: Protocol::Tcp, port: 80, endpoints };
    let vip = |address, ports| Vip { address: ip(address), ports, client_ip_affinity: false };
    let v4 = vec![endpoint("10.0.0.2", 8080, true), endpoint("10.0.0.3", 8080, false)];
    let v6 = vec![endpoint("fd00::2", 8080, true)];
    assert_eq!(
        entries.vips.into_values().collect::<Vec<_>>(),
        [vip("10.96.0.1", vec![http(v4), dns.clone()]), vip("fd00:96::1", vec![http(v6), dns])]
    );
}

#[test]
fn json_gives_what_yaml_gives() {
    let value: serde_json::Value = serde_saphyr::from_str(SHOP).unwrap();
    let json = parse(value.to_string().as_bytes(), Syntax::Json).unwrap();
    assert_eq!(json, objects(&[SHOP]));
    let twice = format!("{value}\n{value}");
    assert_eq!(parse(twice.as_bytes(), Syntax::Json).unwrap(), json);
}

#[test]
fn typed_lists_may_leave_out_the_kind_of_their_items() {
    let list = "{apiVersion: v1, kind: PodList, items: [{metadata: {name: a, namespace: shop}, \
                status: {phase: Running, podIP: 10.0.0.9}}]}";
    assert_eq!(entries(&[list]).workloads, ips(&["10.0.0.9"]));
}

#[test]
fn only_pods_of_their_own_network_that_have_not_ended_are_workloads() {
    let ip = |n: u8| format!("podIPs: [{{ip: 10.0.1.{n}}}]");
    let pods = [
        pod("running", "", &format!("phase: Running, {}", ip(1))),
        pod("pending", "", &format!("phase: Pending, {}", ip(2))),
        pod("done", "", &format!("phase: Succeeded, {}", ip(3))),
        pod("failed", "", &format!("phase: Failed, {}", ip(4))),
        pod("unknown", "", &format!("phase: Unknown, {}", ip(5))),
        pod("none", "", &ip(6)),
        pod("host", "spec: {hostNetwork: true},", &format!("phase: Running, {}", ip(7))),
        pod("unset", "spec: {hostNetwork: false},", "phase: Pending"),
        pod("other", "", &format!("phase: Running, {}", ip(8))).replace("shop", "bank"),
        pod("default", "", &format!("phase: Running, {}", ip(9))).replace(", namespace: shop", ""),
    ];
    let entries = entries(&pods.each_ref().map(String::as_str));
    assert_eq!(entries.workloads, ips(&["10.0.1.1", "10.0.1.2"]));
    assert!(entries.vips.is_empty());
}

#[test]
fn objects_of_other_projects_say_nothing_about_ours() {
    let bank = SHOP.replace("namespace: shop", "namespace: bank");
    assert_eq!(entries(&[&bank]), Entries::default());
    let foreign = slice("x", "web", "IPv4", "{name: http, port: 1}", "{addresses: [10.0.0.2]}");
    let foreign = foreign.replace("namespace: shop", "namespace: bank");
    assert_eq!(entries(&[SHOP, &foreign]), entries(&[SHOP]));
}

#[test]
fn our_own_addresses_are_endpoints_but_no_workloads() {
    let own = slice("own", "web", "IPv4", "{name: http, port: 9}", "{addresses: [10.0.0.1]}");
    let entries = entries(&[SHOP, &own]);
    assert!(!entries.workloads.contains(&ip("10.0.0.1")) && !entries.exempts.contains(&ip("10.0.0.1")));
    assert!(entries.vips[&ip("10.96.0.1")].ports[0].endpoints.contains(&endpoint("10.0.0.1", 9, true)));
}

#[test]
fn an_address_that_no_workload_confirms_is_never_an_endpoint() {
    let target = "targetRef: {kind: Pod, name: ghost}";
    let ghost = slice(
        "g",
        "web",
        "IPv4",
        "{name: http, port: 8080}",
        &format!("{{addresses: [10.9.9.9], {target}}}"),
    );
    let mut expected = entries(&[SHOP]);
    // Closed until the Pod is listed: it may be the project's in a moment.
    let closed = Vip { address: ip("10.9.9.9"), ports: Vec::new(), client_ip_affinity: false };
    expected.vips.insert(closed.address, closed);
    assert_eq!(entries(&[SHOP, &ghost]), expected);
    let listed = pod("ghost", "", "phase: Running, podIP: 10.9.9.9");
    assert!(entries(&[SHOP, &ghost, &listed]).workloads.contains(&ip("10.9.9.9")));
}

#[test]
fn a_service_whose_endpoints_are_unknown_pods_stays_protected() {
    let db = service("db", "clusterIP: 10.96.0.9, ports: [{port: 5432}]", "");
    let of = |endpoints| slice("db-1", "db", "IPv4", "{port: 5432}", endpoints);
    for endpoints in [
        "",
        "{addresses: [10.9.9.9], targetRef: {kind: Pod, name: ghost}}",
        "{addresses: [10.9.9.9], targetRef: {kind: Pod, name: ghost}}, {addresses: [203.0.113.1]}",
        "{addresses: [203.0.113.1]}, {addresses: [10.0.0.2]}",
    ] {
        let entries = entries(&[SHOP, &db, &of(endpoints)]);
        assert!(entries.vips.contains_key(&ip("10.96.0.9")), "{endpoints}");
        assert!(!entries.exempts.contains(&ip("10.96.0.9")));
    }
    let done = pod("done", "", "phase: Succeeded, podIP: 10.9.9.8");
    let slice = of("{addresses: [10.9.9.8], targetRef: {kind: Pod, name: done}}");
    assert!(entries(&[SHOP, &db, &slice, &done]).vips.contains_key(&ip("10.96.0.9")));
}

#[test]
fn a_service_with_external_endpoints_alone_is_exempt() {
    let db = service(
        "db",
        "clusterIPs: [10.96.0.9, 'fd00:96::9'], ports: [{port: 5432}]",
        "loadBalancer: {ingress: [{ip: 10.97.0.1}]}",
    );
    let host = pod("host", "spec: {hostNetwork: true},", "phase: Running, podIP: 192.168.0.7");
    for (endpoints, address) in [
        ("{addresses: [203.0.113.1]}", "203.0.113.1"),
        ("{addresses: [203.0.113.2], targetRef: {kind: VirtualMachine, name: vm}}", "203.0.113.2"),
        ("{addresses: [192.168.0.7], targetRef: {kind: Pod, name: host}}", "192.168.0.7"),
    ] {
        let entries = entries(&[SHOP, &host, &db, &slice("db-1", "db", "IPv4", "{port: 5432}", endpoints)]);
        for exempt in [address, "10.96.0.9", "fd00:96::9", "10.97.0.1"] {
            assert!(entries.exempts.contains(&ip(exempt)), "{endpoints}: {exempt}");
            assert!(!entries.vips.contains_key(&ip(exempt)));
        }
        assert_eq!(entries.externals, ["db".to_owned()].into());
    }
}

#[test]
fn an_endpoint_without_a_target_that_a_workload_confirms_is_no_external_one() {
    let db = service("db", "clusterIP: 10.96.0.9, ports: [{port: 5432}]", "");
    let manual = slice("db-1", "db", "IPv4", "{port: 5432}", "{addresses: [10.0.0.2]}");
    let entries = entries(&[SHOP, &db, &manual]);
    assert_eq!(entries.vips[&ip("10.96.0.9")].ports[0].endpoints, [endpoint("10.0.0.2", 5432, true)]);
    assert!(entries.workloads.contains(&ip("10.0.0.2")));
    assert!(!entries.exempts.contains(&ip("10.0.0.2")));
}

#[test]
fn a_vip_that_somebody_calls_an_external_endpoint_stays_a_vip() {
    let bad = service("bad", "clusterIP: 10.96.0.9, ports: [{port: 80}]", "");
    let manual = slice("bad-1", "bad", "IPv4", "{port: 80}", "{addresses: [10.96.0.1]}");
    let entries = entries(&[SHOP, &bad, &manual]);
    assert!(entries.vips.contains_key(&ip("10.96.0.1")));
    assert_eq!(entries.exempts, ips(&["192.168.0.1", "fd00:a::1", "10.96.0.9"]));
}

#[test]
fn ingress_addresses_are_vips_and_external_ips_are_not() {
    let lb = service(
        "lb",
        "type: LoadBalancer, clusterIP: 10.96.0.9, externalIPs: [198.51.100.1], ports: [{port: 80}]",
        "loadBalancer: {ingress: [{ip: 203.0.113.80}, {hostname: lb.example.com}, {ip: 192.168.0.1}]}",
    );
    let entries = entries(&[SHOP, &lb]);
    assert!(entries.vips.contains_key(&ip("10.96.0.9")) && entries.vips.contains_key(&ip("203.0.113.80")));
    assert!(!entries.vips.contains_key(&ip("198.51.100.1")));
    assert!(!entries.vips.contains_key(&ip("192.168.0.1")), "a node address is no VIP");
}

#[test]
fn services_that_share_an_ingress_address_share_its_vip() {
    let status = "loadBalancer: {ingress: [{ip: 203.0.113.80}]}";
    let a = service("a", "type: LoadBalancer, ports: [{port: 80}], sessionAffinity: None", status);
    let b = service("b", "type: LoadBalancer, ports: [{port: 443}], sessionAffinity: ClientIP", status);
    let vip = &entries(&[SHOP, &a, &b]).vips[&ip("203.0.113.80")];
    assert_eq!(vip.ports.iter().map(|p| p.port).collect::<Vec<_>>(), [80, 443]);
    assert!(vip.client_ip_affinity);
}

#[test]
fn headless_services_and_external_names_have_no_vip() {
    let headless = service("h", "clusterIP: None, clusterIPs: [None], ports: [{port: 80}]", "");
    let name = service("n", "type: ExternalName, externalName: example.com, clusterIP: ''", "");
    let entries_with = entries(&[SHOP, &headless, &name]);
    assert_eq!(entries_with.externals, ["n".to_owned()].into());
    assert_eq!(Entries { externals: BTreeSet::new(), ..entries_with }, entries(&[SHOP]));
}

#[test]
fn ports_are_joined_by_name_and_protocol() {
    let svc = service(
        "two",
        "clusterIP: 10.96.0.9, ports: [{name: a, port: 80, targetPort: 8080}, {name: b, port: 81, targetPort: 8080}]",
        "",
    );
    let slices = [
        slice(
            "t1",
            "two",
            "IPv4",
            "{name: b, port: 9001}, {name: a, port: 9000}",
            "{addresses: [10.0.0.2], conditions: {ready: false}}",
        ),
        slice("t2", "two", "IPv4", "{name: a, port: 9000}", "{addresses: [10.0.0.2]}"),
        slice(
            "t3",
            "two",
            "IPv4",
            "{name: a, port: 9500, protocol: UDP}, {port: 7}",
            "{addresses: [10.0.0.2]}",
        ),
        slice("t4", "two", "FQDN", "{name: a, port: 7}", "{addresses: [example.com]}"),
        slice("t5", "two", "IPv4", "{name: a}", "{addresses: [10.0.0.3]}"),
    ];
    let all: Vec<_> = [SHOP, &svc].into_iter().chain(slices.iter().map(String::as_str)).collect();
    let ports = &entries(&all).vips[&ip("10.96.0.9")].ports;
    assert_eq!(ports[0].endpoints, [endpoint("10.0.0.2", 9000, true)], "ready in one slice is ready");
    assert_eq!(ports[1].endpoints, [endpoint("10.0.0.2", 9001, false)]);
}

#[test]
fn unnamed_ports_meet_each_other() {
    let svc = service("one", "clusterIP: 10.96.0.9, ports: [{port: 80, targetPort: http}]", "");
    let of = slice("o1", "one", "IPv4", "{name: '', port: 8080}", "{addresses: [10.0.0.2]}");
    let ports = &entries(&[SHOP, &svc, &of]).vips[&ip("10.96.0.9")].ports;
    assert_eq!(ports[0].endpoints, [endpoint("10.0.0.2", 8080, true)]);
}

#[test]
fn node_addresses_are_exempt_and_never_workloads() {
    let node = "{apiVersion: v1, kind: Node, metadata: {name: n1}, status: {capacity: {cpu: 4}, addresses: [\
                {type: InternalIP, address: 192.168.0.5}, {type: Hostname, address: n1}, \
                {type: ExternalIP, address: 10.0.0.2}]}}";
    let entries = entries(&[SHOP, node]);
    assert_eq!(entries.exempts, ips(&["10.0.0.2", "192.168.0.1", "192.168.0.5", "fd00:a::1"]));
    assert!(!entries.workloads.contains(&ip("10.0.0.2")));
    assert_eq!(entries.vips[&ip("10.96.0.1")].ports[0].endpoints, [endpoint("10.0.0.3", 8080, false)]);
}

#[test]
fn addresses_that_belong_to_nobody_are_left_out() {
    for address in
        ["127.0.0.5", "169.254.1.1", "224.0.0.5", "0.0.0.0", "255.255.255.255", "::1", "fe80::5", "ff02::1"]
    {
        let pod = pod("odd", "", &format!("phase: Running, podIP: '{address}', hostIP: '{address}'"));
        let vip = service("odd", &format!("clusterIP: '{address}', ports: [{{port: 80}}]"), "");
        assert_eq!(entries(&[SHOP, &pod, &vip]), entries(&[SHOP]), "{address}");
    }
}

#[test]
fn workloads_of_a_family_that_we_do_not_have_are_closed_but_no_peers() {
    let entries = Entries::of(&objects(&[SHOP]), "shop", &[ip("10.0.0.1")]);
    assert!(entries.workloads.iter().all(IpAddr::is_ipv4));
    assert_eq!(entries.workloads.len(), 2);
    let closed: Vec<_> =
        entries.vips.values().filter(|vip| vip.address.is_ipv6() && vip.ports.is_empty()).collect();
    assert!(!closed.is_empty(), "{:?}", entries.vips);
}

#[test]
fn unknown_kinds_and_fields_and_empty_documents_are_passed_over() {
    let more = "---\n# nothing\n---\napiVersion: apps/v1\nkind: Deployment\nspec: {replicas: many}\n\
                ---\napiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: shop, creationTimestamp: null, colour: 7}\n\
                spec: {containers: [{resources: {limits: {cpu: 1}}}], invented: true}\n\
                status: {phase: Running, podIP: 10.0.0.9, startTime: yesterday}\n";
    assert_eq!(entries(&[more]).workloads, ips(&["10.0.0.9"]));
}

#[test]
fn malformed_manifests_are_refused_as_a_whole() {
    for text in [
        "",
        "# nothing",
        "{",
        "just text",
        "kind: Pod",
        "{apiVersion: v1, kind: Pod, metadata: {namespace: shop}}",
        "{apiVersion: v1, kind: Pod, metadata: {name: a}, status: {podIPs: nonsense}}",
        &pod("a", "", "phase: Running, podIP: 10.0.0.300"),
        &service("a", "clusterIP: everywhere", ""),
        &service("a", "ports: [{port: 70000}]", ""),
        &service("a", "ports: [{port: 0}]", ""),
        &service("a", "ports: [{port: 80, protocol: QUIC}]", ""),
        &slice("a", "a", "IPv5", "", ""),
        &slice("a", "a", "IPv6", "", "{addresses: [10.0.0.1]}"),
        &slice("a", "a", "IPv4", "{port: -1}", ""),
        &format!("{SHOP}\n---\n{}", pod("a", "", "phase: Running, podIP: x")),
        &format!("{SHOP}\n---\n]"),
    ] {
        assert!(parse(text.as_bytes(), Syntax::Yaml).is_err(), "{text}");
    }
    for text in
        [pod("secret", "", "phase: Running, podIP: 10.0.0.300"), pod("secret", "", "podIPs: 10.0.0.300")]
    {
        let error = parse(text.as_bytes(), Syntax::Yaml).unwrap_err();
        assert!(!["secret", "10.0.0"].iter().any(|word| error.to_string().contains(word)), "{error}");
        assert!(format!("{error:?}").contains("10.0.0.300"), "{error:?}");
    }
    assert!(matches!(parse(b"\xff\xfe", Syntax::Yaml), Err(ManifestError::Yaml(_))));
    assert!(matches!(parse(b"{\"kind\":", Syntax::Json), Err(ManifestError::Json(_))));
}

#[test]
fn bombs_do_not_go_off() {
    let mut bomb = String::from("a: &a [x,x,x,x,x,x,x,x,x,x]\n");
    for (this, last) in ('b'..'k').zip('a'..) {
        bomb += &format!("{this}: &{this} [{}]\n", vec![format!("*{last}"); 10].join(","));
    }
    assert!(parse(bomb.as_bytes(), Syntax::Yaml).is_err());
    assert!(parse("[".repeat(100_000).as_bytes(), Syntax::Yaml).is_err());
    assert!(parse("[".repeat(100_000).as_bytes(), Syntax::Json).is_err());
}

fn apply(changes: &[Change], entries: &mut Entries) {
    for change in changes {
        match change.clone() {
            Change::SetWorkload(w) => assert!(entries.workloads.insert(w.address)),
            Change::RemoveWorkload(a) => assert!(entries.workloads.remove(&a)),
            Change::SetVip(vip) => drop(entries.vips.insert(vip.address, vip)),
            Change::RemoveVip(a) => assert!(entries.vips.remove(&a).is_some()),
            Change::SetExempt(a) => assert!(entries.exempts.insert(a)),
            Change::RemoveExempt(a) => assert!(entries.exempts.remove(&a)),
            Change::SetExternal(name) => assert!(entries.externals.insert(name)),
            Change::RemoveExternal(name) => assert!(entries.externals.remove(&name)),
        }
    }
}

fn keyless(address: IpAddr) -> Workload {
    let keys = PeerKeys { public: PublicKey([0; 32]), psk: PresharedKey([0; 32]) };
    Workload { address, keys, accept: None }
}

#[test]
fn changes_lead_from_one_state_to_the_other_and_are_minimal() {
    let node = "{apiVersion: v1, kind: Node, metadata: {name: n}, status: {addresses: [\
                {type: InternalIP, address: 10.0.0.3}]}}";
    let db = service("db", "clusterIP: 10.0.0.2, ports: [{port: 5432}]", "");
    let states = [
        Entries::default(),
        entries(&[SHOP]),
        entries(&[SHOP, node]),
        entries(&[&db]),
        entries(&[&SHOP.replace("8080", "8081")]),
    ];
    for from in &states {
        for to in &states {
            let changes = from.changes_to(to, keyless);
            let mut state = from.clone();
            apply(&changes, &mut state);
            assert_eq!(state, *to);
            assert_eq!(changes.is_empty(), from == to);
        }
    }
    let ready = SHOP.replace("ready: false", "ready: true");
    let changes = states[1].changes_to(&entries(&[&ready]), keyless);
    assert!(matches!(&changes[..], [Change::SetVip(vip)] if vip.address == ip("10.96.0.1")), "{changes:?}");
}

#[test]
fn the_holder_of_an_address_is_found_among_all_projects() {
    let bank = pod("b", "", "phase: Running, podIP: 10.5.0.1").replace("shop", "bank");
    let gone = pod("c", "", "phase: Failed, podIP: 10.5.0.1");
    let objects = objects(&[SHOP, &bank, &gone]);
    let address = [ip("10.5.0.1")];
    let holders: Vec<_> = objects.workloads_at(&address).map(|(id, _)| id.namespace.as_str()).collect();
    assert_eq!(holders, ["bank"]);
}

fn outside(yaml: &[&str]) -> Outside {
    let (objects, own) = (objects(yaml), [ip("10.0.0.1"), ip("fd00::1")]);
    let entries = Entries::of(&objects, "shop", &own);
    Outside::of(&objects, "shop", &own, &entries)
}

/// The same object in another namespace.
fn of(namespace: &str, object: &str) -> String {
    object.replace("namespace: shop", &format!("namespace: {namespace}"))
}

#[track_caller]
fn assert_class(outside: &Outside, class: Class, addresses: &[&str]) {
    for address in addresses {
        assert_eq!(outside.class(ip(address)), class, "{address}");
    }
}

#[test]
fn addresses_that_objects_of_other_namespaces_name_are_outside_and_the_rest_is_unknown() {
    let endpoints = "{addresses: [10.8.0.2], targetRef: {kind: Pod, name: b}}, {addresses: [10.8.0.3]}";
    let bank = [
        pod("b", "", "phase: Running, podIPs: [{ip: 10.8.0.1}, {ip: 'fd00:8::1'}]"),
        pod("done", "", "phase: Succeeded, podIP: 10.8.0.4"),
        pod("host", "spec: {hostNetwork: true},", "phase: Running, podIP: 10.8.0.5"),
        service(
            "b",
            "clusterIPs: [10.98.0.1, 'fd00:98::1'], externalIPs: [10.98.0.2], ports: [{port: 80}]",
            "loadBalancer: {ingress: [{ip: 10.98.0.3}, {ip: 10.98.0.4, ipMode: Proxy}]}",
        ),
        slice("b", "b", "IPv4", "{port: 80}", endpoints),
    ];
    let bank = bank.each_ref().map(|object| of("bank", object));
    let all: Vec<_> = [SHOP].into_iter().chain(bank.iter().map(String::as_str)).collect();
    let got = outside(&all);
    assert_class(&got, Class::Outside, &["10.8.0.1", "fd00:8::1"]);
    assert_class(&got, Class::Outside, &["10.98.0.1", "fd00:98::1", "10.98.0.3", "10.98.0.4"]);
    assert_class(&got, Class::Unknown, &["10.8.0.4", "10.8.0.5", "10.8.0.6", "fd00:8::2"]);
    // A tenant writes slices and externalIPs by itself: they vouch for nothing.
    assert_class(&got, Class::Unknown, &["10.8.0.2", "10.8.0.3", "10.98.0.2"]);
    assert!(got.node_ports.is_empty() && got.externals.is_empty());
    assert_class(&outside(&[SHOP]), Class::Unknown, &["10.8.0.1", "10.98.0.1"]);
}

#[test]
fn an_address_of_the_project_is_its_own_whoever_else_names_it() {
    let bank = [
        pod("thief", "", "phase: Running, podIPs: [{ip: 10.0.0.2}, {ip: 'fd00::1'}]"),
        service("thief", "clusterIP: 10.96.0.1, externalIPs: [10.0.0.1], ports: [{port: 80}]", ""),
        slice("thief", "thief", "IPv4", "{port: 80}", "{addresses: [10.0.0.3]}"),
    ];
    let bank = bank.each_ref().map(|object| of("bank", object));
    let all: Vec<_> = [SHOP].into_iter().chain(bank.iter().map(String::as_str)).collect();
    let own = ["10.0.0.1", "fd00::1", "10.0.0.2", "fd00::2", "10.0.0.3", "10.96.0.1", "fd00:96::1"];
    assert_class(&outside(&all), Class::Own, &own);
}

#[test]
fn nodes_are_outside_and_so_are_external_endpoints_of_the_project() {
    let node = "{apiVersion: v1, kind: Node, metadata: {name: n}, status: {addresses: [\
                {type: InternalIP, address: 192.168.0.5}, {type: Hostname, address: n}, \
                {type: ExternalIP, address: 203.0.113.5}, {type: InternalIP, address: 'fe80::5'}, \
                {type: InternalIP, address: 10.0.0.1}]}}";
    let bank = of("bank", &pod("b", "", "phase: Running, podIP: 10.8.0.1, hostIPs: [{ip: 192.168.0.6}]"));
    let db = service("db", "clusterIP: 10.96.0.9, ports: [{port: 5432}]", "");
    let of_db = slice("db", "db", "IPv4", "{port: 5432}", "{addresses: [203.0.113.1]}");
    let got = outside(&[SHOP, node, &bank, &db, &of_db]);
    let nodes = ["192.168.0.1", "192.168.0.5", "192.168.0.6", "203.0.113.5", "fd00:a::1"];
    assert_eq!(got.nodes, ips(&nodes), "neither link-local addresses nor the pod's own");
    assert_class(&got, Class::Outside, &nodes);
    assert_class(&got, Class::Outside, &["203.0.113.1", "10.96.0.9"]);
    assert_class(&got, Class::Own, &["10.0.0.1"]);
}

#[test]
fn node_ports_and_host_ports_of_the_project_lead_back_and_those_of_others_do_not() {
    let node_ports = service(
        "np",
        "clusterIP: 10.96.0.9, type: NodePort, ports: [{name: a, port: 80, nodePort: 30080}, \
         {name: b, port: 53, protocol: UDP, nodePort: 30053}, {name: c, port: 81, nodePort: 0}, {name: d, port: 82}]",
        "",
    );
    let containers = "spec: {containers: [{ports: [{containerPort: 80, hostPort: 8080}, \
                      {hostPort: 8053, protocol: UDP}, {hostPort: 8132, protocol: SCTP}, {containerPort: 81}, \
                      {hostPort: 0}, {hostPort: 70000}, {hostPort: 1, protocol: ICMP}, {hostPort: many}]}, {}], \
                      initContainers: [{ports: [{hostPort: 8081}]}]},";
    let host_ports = pod("hp", containers, "phase: Running, podIP: 10.0.0.4");
    let done = pod("hp-done", &containers.replace("8081", "8082"), "phase: Failed, podIP: 10.0.0.5");
    let wanted = [
        (Protocol::Tcp, 30_080),
        (Protocol::Udp, 30_053),
        (Protocol::Tcp, 8_080),
        (Protocol::Udp, 8_053),
        (Protocol::Sctp, 8_132),
        (Protocol::Tcp, 8_081),
    ];
    assert_eq!(outside(&[SHOP, &node_ports, &host_ports, &done]).node_ports, wanted.into());
    let foreign = [of("bank", &node_ports), of("bank", &host_ports)];
    assert!(outside(&[SHOP, &foreign[0], &foreign[1]]).node_ports.is_empty());
}

#[test]
fn external_addresses_and_balancers_at_a_node_lead_back_by_their_ports() {
    let ports = "ports: [{name: a, port: 80}, {name: b, port: 53, protocol: UDP}]";
    let spec = format!("type: LoadBalancer, clusterIP: 10.96.0.9, externalIPs: [198.51.100.1], {ports}");
    let lb = service(
        "lb",
        &spec,
        "loadBalancer: {ingress: [{ip: 203.0.113.80}, {ip: 192.168.0.1}, {ip: 'fd00:a::1', ipMode: Proxy}, \
         {ip: 203.0.113.81, ipMode: Proxy}, {hostname: lb.example.com}]}",
    );
    let got = outside(&[SHOP, &lb]);
    let wanted = ["198.51.100.1", "192.168.0.1", "fd00:a::1"].into_iter().flat_map(|address| {
        [(Protocol::Tcp, 80), (Protocol::Udp, 53)].map(|(protocol, port)| (ip(address), protocol, port))
    });
    assert_eq!(got.externals, wanted.collect());
    assert_class(&got, Class::Own, &["203.0.113.80"]);
    // A balancer of its own: only the guard's ranges say what becomes of it.
    assert_class(&got, Class::Unknown, &["203.0.113.81", "198.51.100.1"]);
    let entries = entries(&[SHOP, &lb]);
    assert!(
        !entries.vips.contains_key(&ip("203.0.113.81")) && !entries.exempts.contains(&ip("203.0.113.81"))
    );
    assert!(outside(&[SHOP, &of("bank", &lb)]).externals.is_empty());
}

#[test]
fn an_address_of_a_pod_that_is_not_listed_yet_is_a_vip_without_ports_and_the_projects_own() {
    let target = |kind: &str, namespace: &str| {
        let endpoints = format!(
            "{{addresses: [10.9.9.9], targetRef: {{kind: {kind}, name: ghost, namespace: {namespace}}}}}"
        );
        slice("g", "web", "IPv4", "{name: http, port: 8080}", &endpoints)
    };
    let ghost = target("Pod", "shop");
    let closed = Vip { address: ip("10.9.9.9"), ports: Vec::new(), client_ip_affinity: false };
    assert_eq!(entries(&[SHOP, &ghost]).vips[&ip("10.9.9.9")], closed);
    assert_class(&outside(&[SHOP, &ghost]), Class::Own, &["10.9.9.9"]);
    // A slice of another namespace vouches for the address at the same time: it stays closed.
    let bank = of("bank", &slice("b", "b", "IPv4", "{port: 80}", "{addresses: [10.9.9.9]}"));
    assert_class(&outside(&[SHOP, &ghost, &bank]), Class::Own, &["10.9.9.9"]);
    let host = pod("ghost", "spec: {hostNetwork: true},", "phase: Running, podIP: 10.9.9.9");
    for others in [
        &[SHOP, &target("VirtualMachine", "shop")][..],
        &[SHOP, &target("Pod", "bank")],
        &[SHOP, &ghost, &host],
        &[SHOP, &of("bank", &ghost)],
    ] {
        assert!(!entries(others).vips.contains_key(&ip("10.9.9.9")), "{others:?}");
    }
    let node = pod("n", "", "phase: Running, podIP: 10.0.0.8, hostIP: 10.9.9.9");
    assert!(!entries(&[SHOP, &ghost, &node]).vips.contains_key(&ip("10.9.9.9")), "a node's address");
}

#[test]
fn the_endpoints_of_a_resolver_in_another_namespace_are_known_by_their_ports_for_dns() {
    let dns = service(
        "dns",
        "clusterIPs: [10.96.0.10, 'fd00:96::a'], ports: [{name: dns, port: 53, protocol: UDP}, \
         {name: dns-tcp, port: 53}, {name: metrics, port: 9153}]",
        "",
    );
    let ports =
        "{name: dns, port: 5353, protocol: UDP}, {name: dns-tcp, port: 5353}, {name: metrics, port: 9153}";
    let slices = [
        slice("d4", "dns", "IPv4", ports, "{addresses: [10.7.0.1], targetRef: {kind: Pod, name: d}}"),
        slice("d6", "dns", "IPv6", ports, "{addresses: ['fd00:7::1'], conditions: {ready: false}}"),
        slice("x", "other", "IPv4", ports, "{addresses: [10.7.0.9]}"),
        slice("thief", "dns", "IPv4", ports, "{addresses: [10.0.0.2, 127.0.0.1]}"),
    ];
    let system: Vec<_> = [&dns].into_iter().chain(&slices).map(|object| of("kube-system", object)).collect();
    let all: Vec<_> = [SHOP].into_iter().chain(system.iter().map(String::as_str)).collect();
    let got = outside(&all);
    let wanted: BTreeSet<_> = ["10.7.0.1", "fd00:7::1"]
        .into_iter()
        .flat_map(|address| [Protocol::Udp, Protocol::Tcp].map(|protocol| (ip(address), protocol, 5_353)))
        .collect();
    assert_eq!(got.resolver_endpoints(&[ip("10.96.0.10")]), wanted, "without addresses of the project");
    assert_eq!(got.resolver_endpoints(&[ip("fd00:96::a"), ip("10.96.0.10")]), wanted);
    assert!(got.resolver_endpoints(&[ip("10.96.0.11"), ip("10.7.0.1")]).is_empty(), "no such Service");
    // A resolver of the project is asked through the tunnel.
    let own: Vec<_> = [SHOP, &dns].into_iter().chain(slices.iter().map(String::as_str)).collect();
    assert!(outside(&own).resolver_endpoints(&[ip("10.96.0.10")]).is_empty());
}

#[test]
fn values_of_node_ports_and_external_addresses_that_mean_nothing_are_refused() {
    for spec in [
        "ports: [{port: 80, nodePort: 70000}]",
        "ports: [{port: 80, nodePort: -1}]",
        "externalIPs: [everywhere], ports: [{port: 80}]",
    ] {
        assert!(parse(service("a", spec, "").as_bytes(), Syntax::Yaml).is_err(), "{spec}");
    }
    let status = "loadBalancer: {ingress: [{ip: nowhere, ipMode: Proxy}]}";
    assert!(parse(service("a", "ports: [{port: 80}]", status).as_bytes(), Syntax::Yaml).is_err());
    let name = service("a", "type: ExternalName, externalName: e.example, externalIPs: [10.0.0.7]", "");
    let parsed = objects(&[&name]);
    assert!(
        parsed.services.values().all(|service| service.external_addresses.is_empty()),
        "it has no address"
    );
}
