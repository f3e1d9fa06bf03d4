//! What a round of random tampering does: drawn from a seed, so that a round can be had again.
//!
//! 1. [`draw`] takes the kind, then its parameters, from one [`Rng`]
//! 2. `apply` and `undo` are bash, run inside the namespace of shop-client; what the agent has to put back needs no `undo`
//!
//! Which rule of a chain is meant is a number that the shell takes modulo what is there.

use std::net::IpAddr;

use tencrypt::agent::netlink::{DNS, MARKED, PROTECTED, REST, T, T53, TUNNEL, UPSTREAM};

use crate::lab::{BACKENDS, Lab, echo_vips, external, web_vips};
use crate::load::CLIENT;

/// What has to become of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// All is as before, and traffic goes on.
    Repaired,
    /// Traffic goes on, the pod counts as protected; it stays until `undo`.
    Harmless,
    /// The pod counts as unprotected until `undo`; whether traffic goes on is not asked.
    Reported,
}

/// What it takes away of what keeps plaintext in the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Takes {
    /// Nothing.
    Nothing,
    /// The way into `tenc0`.
    Way,
    /// The guard, or a part of it.
    Guard,
}

/// One thing that is done to the namespace.
#[derive(Clone, Debug)]
pub struct Tampering {
    /// Its name in reports.
    pub kind: &'static str,
    /// The commands.
    pub apply: String,
    /// What takes it back; empty: the agent does.
    pub undo: String,
    /// What follows.
    pub expect: Expect,
    /// What it takes away.
    pub takes: Takes,
}

/// SplitMix64. Source: Steele, Lea, Flood: Fast splittable pseudorandom number generators.
pub struct Rng(pub u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number from 0 to `n` - 1.
    pub fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(n).expect("fits")).expect("less than a usize")
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())].clone()
    }
}

/// What the kinds are about.
pub struct World {
    protected: Vec<IpAddr>,
    /// Carries none of the load's connections.
    quiet_vips: Vec<IpAddr>,
    elsewhere: String,
    /// The namespaces that have the pod for a neighbour.
    neighbours: [String; 2],
    own: [IpAddr; 2],
    files: String,
}

impl World {
    /// That of a lab whose pods are protected.
    pub fn of(lab: &Lab) -> Self {
        let peers: Vec<_> = BACKENDS.iter().flat_map(|pod| lab.pod(pod).addresses()).collect();
        let quiet_vips: Vec<_> = web_vips().into_iter().chain(echo_vips()).map(|to| to.ip()).collect();
        Self {
            protected: peers.iter().chain(&quiet_vips).copied().collect(),
            quiet_vips,
            elsewhere: format!("{}-ext", lab.name()),
            neighbours: ["node1", "shop-web1"].map(|name| format!("{}-{name}", lab.name())),
            own: lab.pod(CLIENT).addresses(),
            files: lab.run_dir().display().to_string(),
        }
    }

    /// Where a datagram can be sent to that has to go through the tunnel.
    pub fn protected(&self) -> &[IpAddr] {
        &self.protected
    }

    /// The addresses and the routes of the pod's own device, as the lab made them.
    fn restore(&self) -> String {
        let [v4, v6] = self.own;
        format!(
            "ip link set eth0 up; ip addr replace {v4}/24 dev eth0; ip addr replace {v6}/64 dev eth0 nodad; \
             ip route replace default via 10.1.1.1; ip -6 route replace default via fd00:10:1:1::1"
        )
    }
}

type Kind = fn(&mut Rng, &World) -> Tampering;

const KINDS: &[Kind] = &[
    tun_deleted,
    tun_down,
    tun_moved,
    tun_renamed,
    tun_mtu,
    tun_queue,
    tun_flag,
    tun_address,
    rule_deleted,
    rules_flushed,
    rule_replaced,
    rule_before,
    rule_first,
    rule_after,
    route_deleted,
    twin_deleted,
    route_replaced,
    routes_flushed,
    dns_route,
    route_beside,
    way_of_vip,
    way_of_peer,
    way_of_all,
    way_of_local,
    guard_flushed,
    guard_table_deleted,
    guard_table_flushed,
    guard_chain_flushed,
    guard_rule_deleted,
    guard_chain_deleted,
    guard_chain_renamed,
    guard_chain_added,
    guard_policy,
    guard_accept,
    guard_dormant,
    guard_element_deleted,
    guard_element_added,
    guard_set_flushed,
    guard_set_replaced,
    table_beside,
    sysctl,
    ipv6_off,
    tun_ipv6_off,
    address_added,
    address_deleted,
    link_down,
    link_mtu,
    link_address,
    neighbours,
];

/// The next tampering.
pub fn draw(rng: &mut Rng, world: &World) -> Tampering {
    let kind = rng.below(KINDS.len());
    KINDS[kind](rng, world)
}

fn repaired(kind: &'static str, takes: Takes, apply: impl Into<String>) -> Tampering {
    Tampering { kind, apply: apply.into(), undo: String::new(), expect: Expect::Repaired, takes }
}

fn harmless(kind: &'static str, apply: impl Into<String>, undo: impl Into<String>) -> Tampering {
    let (apply, undo) = (apply.into(), undo.into());
    Tampering { kind, apply, undo, expect: Expect::Harmless, takes: Takes::Nothing }
}

fn reported(
    kind: &'static str,
    takes: Takes,
    apply: impl Into<String>,
    undo: impl Into<String>,
) -> Tampering {
    Tampering { kind, apply: apply.into(), undo: undo.into(), expect: Expect::Reported, takes }
}

/// `ip` for the family of an address.
fn ip(like: IpAddr) -> &'static str {
    if like.is_ipv4() { "ip" } else { "ip -6" }
}

fn family(rng: &mut Rng) -> &'static str {
    rng.pick(&["ip", "ip -6"])
}

fn tun_deleted(_: &mut Rng, _: &World) -> Tampering {
    repaired("tun_deleted", Takes::Way, "ip link del tenc0")
}

fn tun_down(_: &mut Rng, _: &World) -> Tampering {
    repaired("tun_down", Takes::Way, "ip link set tenc0 down")
}

fn tun_moved(_: &mut Rng, world: &World) -> Tampering {
    repaired("tun_moved", Takes::Way, format!("ip link set tenc0 netns {}", world.elsewhere))
}

fn tun_renamed(rng: &mut Rng, _: &World) -> Tampering {
    let apply = format!("ip link set tenc0 down; ip link set tenc0 name other{}", rng.below(100));
    repaired("tun_renamed", Takes::Way, apply)
}

/// Below 1,280 IPv6 leaves the device.
fn tun_mtu(rng: &mut Rng, _: &World) -> Tampering {
    let mtu = rng.pick(&[68, 576, 1_279, 1_280, 1_300, 1_492, 9_000]);
    repaired("tun_mtu", Takes::Way, format!("ip link set tenc0 mtu {mtu}"))
}

fn tun_queue(rng: &mut Rng, _: &World) -> Tampering {
    let length = rng.pick(&[0, 1, 10, 499, 5_000]);
    repaired("tun_queue", Takes::Nothing, format!("ip link set tenc0 txqueuelen {length}"))
}

fn tun_flag(rng: &mut Rng, _: &World) -> Tampering {
    let (flag, to, from) = rng.pick(&[
        ("promisc", "on", "off"),
        ("allmulticast", "on", "off"),
        ("multicast", "off", "on"),
        ("arp", "on", "off"),
    ]);
    harmless("tun_flag", format!("ip link set tenc0 {flag} {to}"), format!("ip link set tenc0 {flag} {from}"))
}

fn tun_address(rng: &mut Rng, _: &World) -> Tampering {
    let address = rng.pick(&["192.0.2.7/32", "10.1.1.200/24", "2001:db8::7/128"]);
    reported(
        "tun_address",
        Takes::Nothing,
        format!("ip addr add {address} dev tenc0"),
        format!("ip addr del {address} dev tenc0"),
    )
}

fn rule_deleted(rng: &mut Rng, _: &World) -> Tampering {
    let (ip, priority) = if rng.below(2) == 0 {
        ("ip", rng.pick(&[UPSTREAM, TUNNEL, MARKED, DNS, PROTECTED, REST]))
    } else {
        // No resolver of the lab has an IPv6 address.
        ("ip -6", rng.pick(&[TUNNEL, MARKED, PROTECTED, REST]))
    };
    repaired("rule_deleted", Takes::Way, format!("{ip} rule del pref {priority}"))
}

fn rules_flushed(rng: &mut Rng, _: &World) -> Tampering {
    let ip = family(rng);
    // IPv6 has no table `default`.
    let last = if ip == "ip" { "ip rule add pref 32767 lookup default" } else { "true" };
    repaired(
        "rules_flushed",
        Takes::Way,
        format!("{ip} rule flush; {ip} rule add pref 32766 lookup main; {last}"),
    )
}

fn rule_replaced(rng: &mut Rng, _: &World) -> Tampering {
    let (ip, priority) = (family(rng), rng.pick(&[TUNNEL, MARKED, PROTECTED]));
    reported(
        "rule_replaced",
        Takes::Way,
        format!("{ip} rule del pref {priority}; {ip} rule add pref {priority} lookup main"),
        format!("{ip} rule del pref {priority} lookup main"),
    )
}

/// A selector and what it leads to.
fn foreign_rule(rng: &mut Rng, world: &World) -> (&'static str, String) {
    let to = rng.pick(&world.protected);
    let selector = match rng.below(4) {
        0 => String::new(),
        1 => format!("to {to}"),
        2 => "ipproto udp".to_owned(),
        _ => "iif lo".to_owned(),
    };
    let action = rng.pick(&["lookup main", "lookup 77", "lookup local", "unreachable", "goto 32766"]);
    (ip(to), format!("{selector} {action}"))
}

fn rule_before(rng: &mut Rng, world: &World) -> Tampering {
    let (ip, rule) = foreign_rule(rng, world);
    let priority = 1 + rng.below(96);
    reported(
        "rule_before",
        Takes::Way,
        format!("{ip} rule add pref {priority} {rule}"),
        format!("{ip} rule del pref {priority}"),
    )
}

/// Beside the kernel's own rule 0.
fn rule_first(rng: &mut Rng, world: &World) -> Tampering {
    let to = rng.pick(&world.protected);
    let rule = format!("pref 0 to {to} lookup main");
    reported(
        "rule_first",
        Takes::Way,
        format!("{} rule add {rule}", ip(to)),
        format!("{} rule del {rule}", ip(to)),
    )
}

fn rule_after(rng: &mut Rng, world: &World) -> Tampering {
    let to = rng.pick(&world.protected);
    let rule = format!("pref {} to {to} lookup main", 110 + rng.below(30_000));
    harmless("rule_after", format!("{} rule add {rule}", ip(to)), format!("{} rule del {rule}", ip(to)))
}

fn route_deleted(rng: &mut Rng, world: &World) -> Tampering {
    let to = rng.pick(&world.protected);
    repaired("route_deleted", Takes::Way, format!("{} route del {to} table {T} metric 1", ip(to)))
}

fn twin_deleted(rng: &mut Rng, world: &World) -> Tampering {
    let to = rng.pick(&world.protected);
    let apply = format!("{} route del unreachable {to} table {T} metric 4294967295", ip(to));
    repaired("twin_deleted", Takes::Nothing, apply)
}

fn route_replaced(rng: &mut Rng, world: &World) -> Tampering {
    let to = rng.pick(&world.protected);
    let (kind, way) = rng.pick(&[
        ("", "dev eth0"),
        ("", "dev lo"),
        ("", "dev tenc0 mtu 1290"),
        ("blackhole", ""),
        ("prohibit", ""),
        ("throw", ""),
    ]);
    let apply = format!("{} route replace {kind} {to} {way} table {T} metric 1", ip(to));
    repaired("route_replaced", Takes::Way, apply)
}

fn routes_flushed(rng: &mut Rng, _: &World) -> Tampering {
    let (ip, table) = (family(rng), rng.pick(&[T, T53]));
    // An empty table is an answer, too.
    repaired("routes_flushed", Takes::Way, format!("{ip} route flush table {table}"))
}

fn dns_route(rng: &mut Rng, _: &World) -> Tampering {
    let ip = family(rng);
    let apply = rng.pick(&[
        format!("{ip} route del default table {T53} metric 1"),
        format!("{ip} route del unreachable default table {T53} metric 4294967295"),
        format!("{ip} route replace default dev eth0 table {T53} metric 1"),
    ]);
    repaired("dns_route", Takes::Way, apply)
}

/// In our own table: of the same address, or of a range.
fn route_beside(rng: &mut Rng, world: &World) -> Tampering {
    let to = rng.pick(&world.protected);
    let route = match (to.is_ipv4(), rng.below(2)) {
        (true, 0) => format!("{to} dev eth0 table {T}"),
        (false, 0) => format!("{to} dev eth0 table {T} metric 2"),
        (true, _) => format!("10.96.0.0/16 dev eth0 table {T}"),
        (false, _) => format!("fd00:10:96::/64 dev eth0 table {T}"),
    };
    reported(
        "route_beside",
        Takes::Way,
        format!("{} route add {route}", ip(to)),
        format!("{} route del {route}", ip(to)),
    )
}

/// Our rules come before the main table.
fn way_of_vip(rng: &mut Rng, world: &World) -> Tampering {
    let to = rng.pick(&world.quiet_vips);
    let route = format!("{to} dev eth0");
    harmless("way_of_vip", format!("{} route add {route}", ip(to)), format!("{} route del {route}", ip(to)))
}

/// Sealed datagrams go by the main table. The agent does not ask which address is a VIP.
fn way_of_peer(rng: &mut Rng, world: &World) -> Tampering {
    let to = rng.pick(&world.protected);
    let (kind, way) = rng.pick(&[("", "dev tenc0"), ("", "dev lo"), ("blackhole", ""), ("unreachable", "")]);
    let route = format!("{kind} {to} {way}");
    reported(
        "way_of_peer",
        Takes::Nothing,
        format!("{} route add {route}", ip(to)),
        format!("{} route del {route}", ip(to)),
    )
}

fn way_of_all(rng: &mut Rng, world: &World) -> Tampering {
    let ip = family(rng);
    let metric = if ip == "ip" { "" } else { "metric 1024" };
    let apply = rng.pick(&[
        format!("{ip} route del default"),
        format!("{ip} route replace default dev tenc0 {metric}"),
        format!("{ip} route replace default dev lo {metric}"),
        format!("{ip} route replace blackhole default {metric}"),
    ]);
    let undo = format!("{ip} route del default; {ip} route del blackhole default; {}", world.restore());
    // An IPv6 peer of the lab's other node has no other way; an IPv4 one has none either.
    reported("way_of_all", Takes::Nothing, apply, undo)
}

/// The kernel's own table comes before every rule.
fn way_of_local(rng: &mut Rng, world: &World) -> Tampering {
    let to = rng.pick(&world.quiet_vips);
    let route = rng.pick(&[format!("local {to} dev lo table local"), format!("{to} dev eth0 table local")]);
    reported(
        "way_of_local",
        Takes::Way,
        format!("{} route add {route}", ip(to)),
        format!("{} route del {route}", ip(to)),
    )
}

/// Chains of both tables that strict mode has rules in; the first three are hooks.
const CHAINS: &[&str] = &[
    "inet tencrypt postrouting",
    "inet tencrypt prerouting",
    "netdev tencrypt egress_eth0",
    "inet tencrypt open_out",
    "inet tencrypt out4",
    "inet tencrypt scope_out6",
    "inet tencrypt protected_out4",
    "inet tencrypt in4",
    "inet tencrypt agents4",
    "inet tencrypt tunnel",
    "inet tencrypt from_tunnel",
    "inet tencrypt closed_out",
    "netdev tencrypt judged",
    "netdev tencrypt raw4",
    "netdev tencrypt protected6",
];

fn guard_flushed(_: &mut Rng, _: &World) -> Tampering {
    repaired("guard_flushed", Takes::Guard, "nft flush ruleset")
}

fn guard_table_deleted(rng: &mut Rng, _: &World) -> Tampering {
    let family = rng.pick(&["inet", "netdev"]);
    let again = rng.pick(&["", "; nft add table inet tencrypt", "; nft add table netdev tencrypt"]);
    repaired("guard_table_deleted", Takes::Guard, format!("nft delete table {family} tencrypt{again}"))
}

fn guard_table_flushed(rng: &mut Rng, _: &World) -> Tampering {
    let family = rng.pick(&["inet", "netdev"]);
    repaired("guard_table_flushed", Takes::Guard, format!("nft flush table {family} tencrypt"))
}

fn guard_chain_flushed(rng: &mut Rng, _: &World) -> Tampering {
    repaired("guard_chain_flushed", Takes::Guard, format!("nft flush chain {}", rng.pick(CHAINS)))
}

fn guard_rule_deleted(rng: &mut Rng, _: &World) -> Tampering {
    let chain = rng.pick(CHAINS);
    let apply = format!(
        "rules=($(nft -a list chain {chain} | sed -n 's/.*# handle //p' | tail -n +2)); \
         nft delete rule {chain} handle ${{rules[{} % ${{#rules[@]}}]}}",
        rng.below(1_000)
    );
    repaired("guard_rule_deleted", Takes::Guard, apply)
}

fn guard_chain_deleted(rng: &mut Rng, _: &World) -> Tampering {
    let hook = rng.pick(&CHAINS[..3]);
    repaired("guard_chain_deleted", Takes::Guard, format!("nft flush chain {hook}; nft delete chain {hook}"))
}

fn guard_chain_renamed(rng: &mut Rng, _: &World) -> Tampering {
    let chain = rng.pick(CHAINS);
    let (table, _) = chain.rsplit_once(' ').expect("three words");
    reported(
        "guard_chain_renamed",
        Takes::Guard,
        format!("nft rename chain {chain} other"),
        format!("nft flush chain {table} other; nft delete chain {table} other"),
    )
}

fn guard_chain_added(rng: &mut Rng, _: &World) -> Tampering {
    let (priority, policy) = (rng.pick(&[-500, -1, 0, 299, 301]), rng.pick(&["accept", "drop"]));
    let hook = rng.pick(&["output", "postrouting", "prerouting", "input"]);
    reported(
        "guard_chain_added",
        Takes::Nothing,
        format!(
            "nft 'add chain inet tencrypt other {{ type filter hook {hook} priority {priority}; policy {policy}; }}'"
        ),
        "nft flush chain inet tencrypt other; nft delete chain inet tencrypt other",
    )
}

fn guard_policy(rng: &mut Rng, _: &World) -> Tampering {
    let hook = rng.pick(&CHAINS[..3]);
    repaired("guard_policy", Takes::Nothing, format!("nft 'chain {hook} {{ policy drop; }}'"))
}

fn guard_accept(rng: &mut Rng, _: &World) -> Tampering {
    let (chain, verdict) = (rng.pick(CHAINS), rng.pick(&["accept", "return", "counter accept"]));
    let place = rng.pick(&["insert", "add"]);
    repaired("guard_accept", Takes::Guard, format!("nft {place} rule {chain} {verdict}"))
}

fn guard_dormant(rng: &mut Rng, _: &World) -> Tampering {
    let family = rng.pick(&["inet", "netdev"]);
    repaired("guard_dormant", Takes::Guard, format!("nft 'add table {family} tencrypt {{ flags dormant; }}'"))
}

fn set_of(to: IpAddr) -> &'static str {
    if to.is_ipv4() { "protected4" } else { "protected6" }
}

fn guard_element_deleted(rng: &mut Rng, world: &World) -> Tampering {
    let (family, to) = (rng.pick(&["inet", "netdev"]), rng.pick(&world.protected));
    let apply = format!("nft delete element {family} tencrypt {} {{ {to} }}", set_of(to));
    repaired("guard_element_deleted", Takes::Guard, apply)
}

fn guard_element_added(rng: &mut Rng, _: &World) -> Tampering {
    let (family, to) = (rng.pick(&["inet", "netdev"]), rng.pick(&external()));
    let apply = format!("nft add element {family} tencrypt {} {{ {to} }}", set_of(to));
    repaired("guard_element_added", Takes::Nothing, apply)
}

fn guard_set_flushed(rng: &mut Rng, _: &World) -> Tampering {
    let (family, set) = (rng.pick(&["inet", "netdev"]), rng.pick(&["protected4", "protected6"]));
    repaired("guard_set_flushed", Takes::Guard, format!("nft flush set {family} tencrypt {set}"))
}

/// By one of another type: ours is loaded over it.
fn guard_set_replaced(rng: &mut Rng, _: &World) -> Tampering {
    let family = rng.pick(&["inet", "netdev"]);
    let apply = format!(
        "nft 'flush table {family} tencrypt; delete set {family} tencrypt protected4; \
         add set {family} tencrypt protected4 {{ type ether_addr; }}'"
    );
    repaired("guard_set_replaced", Takes::Guard, apply)
}

/// What another table accepts ours still sees.
fn table_beside(rng: &mut Rng, _: &World) -> Tampering {
    let priority = rng.pick(&[-500, -451, -1, 299, 301]);
    let hook = rng.pick(&["output", "postrouting", "prerouting", "input"]);
    let verdict = rng.pick(&["accept", "notrack", "counter"]);
    let verdict =
        if verdict == "notrack" && !matches!(hook, "output" | "prerouting") { "accept" } else { verdict };
    harmless(
        "table_beside",
        format!(
            "nft 'add table inet other; add chain inet other c {{ type filter hook {hook} priority {priority}; \
             policy accept; }}; add rule inet other c {verdict}'"
        ),
        "nft delete table inet other",
    )
}

/// Writes a sysctl and keeps what it was.
fn sysctl_set(world: &World, name: &str, value: &str) -> (String, String) {
    let (path, kept) =
        (format!("/proc/sys/net/{name}"), format!("{}/{}.was", world.files, name.replace('/', ".")));
    (format!("cat {path} >{kept}; echo {value} >{path}"), format!("cat {kept} >{path}"))
}

fn sysctl(rng: &mut Rng, world: &World) -> Tampering {
    let device = rng.pick(&["all", "default", "eth0", "tenc0"]);
    let (name, value) = match rng.below(6) {
        0 => (format!("ipv4/conf/{device}/rp_filter"), rng.pick(&["0", "1", "2"])),
        1 => (format!("ipv4/conf/{device}/accept_local"), "1"),
        2 => (format!("ipv4/conf/{device}/forwarding"), "1"),
        3 => (format!("ipv6/conf/{device}/forwarding"), "1"),
        4 => (format!("ipv4/conf/{device}/src_valid_mark"), "1"),
        _ => ("ipv4/conf/default/accept_local".to_owned(), "1"),
    };
    let (mut apply, mut undo) = sysctl_set(world, &name, value);
    // A device that is made anew meanwhile takes the default for its own.
    if name.contains("/default/") {
        let own = name.replace("/default/", "/tenc0/");
        // A name of its own: the other of a pair keeps what it changes, too.
        let kept = format!("{}/{}.own", world.files, own.replace('/', "."));
        apply = format!("cat /proc/sys/net/{own} >{kept}; {apply}");
        undo = format!("{undo}; cat {kept} >/proc/sys/net/{own}");
    }
    harmless("sysctl", apply, undo)
}

fn ipv6_off(rng: &mut Rng, world: &World) -> Tampering {
    let device = rng.pick(&["all", "eth0"]);
    let (apply, undo) = sysctl_set(world, &format!("ipv6/conf/{device}/disable_ipv6"), "1");
    reported("ipv6_off", Takes::Way, apply, format!("{undo}; {}", world.restore()))
}

fn tun_ipv6_off(_: &mut Rng, world: &World) -> Tampering {
    let (apply, undo) = sysctl_set(world, "ipv6/conf/tenc0/disable_ipv6", "1");
    reported("tun_ipv6_off", Takes::Way, apply, undo)
}

fn address_added(rng: &mut Rng, _: &World) -> Tampering {
    let address = rng.pick(&["10.1.1.77/32", "10.1.1.77/24", "192.0.2.9/24", "fd00:10:1:1::77/64"]);
    reported(
        "address_added",
        Takes::Nothing,
        format!("ip addr add {address} dev eth0"),
        format!("ip addr del {address} dev eth0"),
    )
}

fn address_deleted(rng: &mut Rng, world: &World) -> Tampering {
    let own = rng.pick(&world.own);
    let length = if own.is_ipv4() { 24 } else { 64 };
    reported("address_deleted", Takes::Way, format!("ip addr del {own}/{length} dev eth0"), world.restore())
}

fn link_down(_: &mut Rng, world: &World) -> Tampering {
    reported("link_down", Takes::Nothing, "ip link set eth0 down", world.restore())
}

/// As far as the node's end, which keeps its own, goes with it: beyond, full segments are lost with or without an agent.
fn link_mtu(rng: &mut Rng, _: &World) -> Tampering {
    let apply = format!("ip link set eth0 mtu {}", 1_440 + rng.below(14));
    harmless("link_mtu", apply, "ip link set eth0 mtu 1450")
}

/// The neighbours are told, as gratuitous ARP would.
fn link_address(rng: &mut Rng, world: &World) -> Tampering {
    let told = world.neighbours.each_ref().map(|netns| format!("ip -n {netns} neigh flush all")).join("; ");
    harmless(
        "link_address",
        format!(
            "ip -br link show eth0 | awk '{{ print $3 }}' >{files}/mac.was; \
             ip link set eth0 address 02:00:00:99:00:{:02x}; {told}",
            1 + rng.below(200),
            files = world.files
        ),
        format!("ip link set eth0 address $(cat {}/mac.was); {told}", world.files),
    )
}

fn neighbours(rng: &mut Rng, _: &World) -> Tampering {
    let apply = rng.pick(&[
        "ip neigh flush all",
        "ip neigh replace 10.1.1.1 lladdr 02:00:00:01:01:01 nud permanent dev eth0",
        "ip neigh replace fd00:10:1:1::1 lladdr 02:00:00:01:01:01 nud permanent dev eth0",
        "ip neigh replace 10.1.1.1 lladdr 02:00:00:01:01:01 nud stale dev eth0",
    ]);
    harmless("neighbours", apply, "ip neigh flush nud permanent; ip neigh flush all")
}
