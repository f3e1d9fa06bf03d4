"""The network under the rows: two namespaces, their link, and the namespaces of the nodes where there are any.

    veth1500, veth9000   a ==== b                                        one veth pair
    vxlan1450            a -- br0 node-a ==== vxlan over veth ==== node-b br0 -- b

Every name bears the process's id. Nothing is changed outside these namespaces. Congestion control is cubic on every
route here: a namespace may not choose it by sysctl where the host does not allow it.
"""

import os

from shell import Failure, inside, run

NAMES = {"veth1500": "veth, MTU 1500", "veth9000": "veth, MTU 9000", "vxlan1450": "bridge + vxlan, MTU 1450"}
V4 = {"a": "10.77.0.1", "b": "10.77.0.2"}
V6 = {"a": "fd77::1", "b": "fd77::2"}
NODE = {"a": "192.168.77.1", "b": "192.168.77.2"}
NODE_MTU = 1500


class Underlay:
    """Made by `up`, removed by `down`, which may come at any moment."""

    def __init__(self, name):
        self.name = name
        self.mtu = int(name[-4:])
        self.made = []
        self.space = {end: f"bench-{os.getpid()}-{end}" for end in "ab"}
        self.node = {end: f"bench-{os.getpid()}-node-{end}" for end in "ab"}

    def _make(self, namespace):
        run("ip", "netns", "add", namespace)
        self.made.append(namespace)
        # Duplicate address detection costs a second and finds nothing here.
        script = 'for f in all default; do d=/proc/sys/net/ipv6/conf/$f; echo 0 >$d/disable_ipv6; echo 0 >$d/accept_dad; done'
        run(*inside(namespace, "sh", "-c", script))
        ip(namespace, "link set lo up")
        for prefix in ("127.0.0.0/8", "127.0.0.1"):
            ip(namespace, f"route replace local {prefix} dev lo table local proto kernel scope host src 127.0.0.1 congctl cubic")

    def up(self):
        for end in "ab":
            self._make(self.space[end])
        if self.name.startswith("veth"):
            veth(self.space["a"], "eth0", self.space["b"], "eth0", self.mtu)
        else:
            self._nodes()
        for end in "ab":
            other = "b" if end == "a" else "a"
            space = self.space[end]
            ip(space, f"addr add {V4[end]}/24 dev eth0 noprefixroute")
            ip(space, f"-6 addr add {V6[end]}/64 dev eth0 nodad noprefixroute")
            ip(space, "link set eth0 up")
            ip(space, f"route add 10.77.0.0/24 dev eth0 src {V4[end]} congctl cubic")
            ip(space, f"route add default via {V4[other]} congctl cubic")
            ip(space, "-6 route add fd77::/64 dev eth0 congctl cubic")
            ip(space, f"-6 route add default via {V6[other]} congctl cubic")
        run(*inside(self.space["a"], "ping", "-c", 3, "-i", "0.2", "-W", 1, V4["b"]))

    def _nodes(self):
        for end in "ab":
            self._make(self.node[end])
        veth(self.node["a"], "net0", self.node["b"], "net0", NODE_MTU)
        for end in "ab":
            node, other = self.node[end], NODE["b" if end == "a" else "a"]
            ip(node, f"addr add {NODE[end]}/24 dev net0")
            ip(node, "link set net0 up")
            ip(node, "link add br0 type bridge")
            ip(node, f"link add vx0 mtu {self.mtu} type vxlan id 77 dstport 4789 local {NODE[end]} remote {other} dev net0")
            veth(node, "pod", self.space[end], "eth0", self.mtu)
            for port in ("vx0", "pod"):
                ip(node, f"link set {port} master br0 up")
            ip(node, "link set br0 up")

    def down(self):
        for namespace in self.made:
            try:
                run("ip", "netns", "del", namespace)
            except Failure as failure:
                print(f"bench: {failure}", flush=True)
        self.made.clear()


def ip(namespace, words):
    run("ip", "-n", namespace, *words.split())


def veth(space, name, other_space, other_name, mtu):
    """Both ends are made in their namespaces: the host's own is never entered."""
    run("ip", "link", "add", name, "netns", space, "mtu", mtu, "type", "veth",
        "peer", "name", other_name, "netns", other_space, "mtu", mtu)
