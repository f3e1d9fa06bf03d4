//! The rules of the directory, told in manifests.

use super::manifest::{ManifestError, Syntax, parse};
use super::*;
use crate::proto::noise::{PeerKeys, PresharedKey, PublicKey};

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
