"""Tencrypt's rows: an agent in either namespace, strict, the server reached by its Service's address with DNAT.

The folder that stands for the project's directory has two Pods, one Service and its EndpointSlices.
"""

import json
import os

import shell
from rows import IPERF, PONG, SINK, Row
from shell import Failure, Process, Unavailable, inside, probe, run
from underlay import V4, V6

VIP4, VIP6 = "10.96.1.20", "fd00:10:96::114"
PROJECT = "bench"
# Name, port of the Service, protocol, port of the Pod.
PORTS = [("iperf", 5201, "TCP", IPERF), ("iperf-udp", 5201, "UDP", IPERF), ("pong", 5202, "TCP", PONG),
         ("stream", 5203, "UDP", SINK)]
TUNNEL_PORT = 51820
START_LIMIT, STOP_LIMIT = 30.0, 15.0
REKEY_AFTER = 2
CHACHA, AES = "chacha20poly1305", "aes256gcm"


def metadata(name):
    return {"name": name, "namespace": PROJECT}


def pod(name, node, v4, v6):
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata(name), "spec": {"nodeName": node},
            "status": {"phase": "Running", "podIP": v4, "podIPs": [{"ip": v4}, {"ip": v6}]}}


def directory(others):
    """The manifests, with so many further workloads."""
    ports = [{"name": n, "port": p, "protocol": t, "targetPort": target} for n, p, t, target in PORTS]
    items = [pod(f"pod-{end}", f"node-{end}", V4[end], V6[end]) for end in "ab"]
    items += [pod(f"other-{n}", "node-c", f"10.78.{n // 250}.{n % 250 + 1}", f"fd78::{n + 1:x}") for n in range(others)]
    items.append({"apiVersion": "v1", "kind": "Service", "metadata": metadata("speed"), "spec": {
        "type": "ClusterIP", "clusterIP": VIP4, "clusterIPs": [VIP4, VIP6], "ipFamilies": ["IPv4", "IPv6"],
        "ipFamilyPolicy": "PreferDualStack", "ports": ports}})
    for family, address in (("IPv4", V4["b"]), ("IPv6", V6["b"])):
        items.append({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family,
            "metadata": {**metadata(f"speed-{family.lower()}"), "labels": {"kubernetes.io/service-name": "speed"}},
            "endpoints": [{"addresses": [address], "conditions": {"ready": True}, "nodeName": "node-b",
                           "targetRef": {"kind": "Pod", "name": "pod-b", "namespace": PROJECT}}],
            "ports": [{"name": n, "port": target, "protocol": t} for n, _, t, target in PORTS]})
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": items})


class Tencrypt(Row):
    """IPv4 and ChaCha20-Poly1305, unless a subclass says otherwise."""

    name, title = "tencrypt-chacha", f"Tencrypt {CHACHA}"
    measures = {"tcp", "udp", "first"}
    address = VIP4
    ports = {"iperf": 5201, "pong": 5202, "stream": 5203}
    cipher, arguments = CHACHA, ()
    others = 0

    def __init__(self, place):
        super().__init__(place)
        self.kept, self.agents = [], {}

    def _files(self):
        folder = self.file("directory")
        os.makedirs(folder, exist_ok=True)
        with open(f"{folder}/project.json", "w", encoding="utf-8") as file:
            file.write(directory(self.others))
        # A resolver that nobody asks: every address is in the directory.
        self.write("resolv.conf", f"nameserver 10.96.0.10\nsearch {PROJECT}.svc.cluster.local svc.cluster.local\n")
        self.write("project.key", run(self.program, "keygen"))

    def launch(self, end, stdout):
        """Starts a launcher; its standard output goes to this descriptor."""
        process = Process(
            [self.program, "launch", "--netns", self.space(end), "--project", PROJECT,
             "--project-key-file", self.file("project.key"), "--directory", self.file("directory"),
             "--resolv-conf", self.file("resolv.conf"), "--cipher", self.cipher, *self.arguments],
            self.file(f"launch-{end}.log"), stdout=stdout)
        self.ends[end].append(process)
        return process

    def start(self):
        self._files()
        for end in "ba":
            # The client's time to first byte is measured by one who waits for the line that says `protected`.
            waiter = ("first", self.address, self.ports["pong"]) if end == "a" else ("protected",)
            said, says = os.pipe()
            # The reading end is kept open: a launcher that says more must not meet a closed pipe.
            self.kept.append(said)
            waiting = Process(probe(self.space(end), *waiter), self.file(f"first-{end}.out"), stdin=said)
            try:
                waiting.await_line("ready")
                self.launch(end, says)
                os.close(says)
                says = None
                if waiting.wait(START_LIMIT) != 0:
                    self.alive()
                    raise Failure(f"not protected: {shell.last_line(waiting.said())}")
            finally:
                waiting.stop()
                if says is not None:
                    os.close(says)
            self.agents[end] = self._agent(end)
        self.first_byte = float(shell.last_line(waiting.said()).split()[-1])

    def _agent(self, end):
        for pid in self.pids(end):
            if shell.read(f"/proc/{pid}/cmdline").replace("\0", " ").startswith("tencrypt agent"):
                return pid
        raise Failure("no agent was found")

    def memory_pids(self, end):
        """The agent alone: the launcher is the node's."""
        return [self.agents[end]] if end in self.agents else []

    def status(self):
        """What `tencrypt status` says of the client's pod."""
        return json.loads(run(self.program, "status", self.space("a"), "-o", "json"))

    def down(self):
        refused = []
        for processes in self.ends.values():
            for process in processes:
                ran = process.running()
                orderly = process.stop(STOP_LIMIT)
                if ran and (not orderly or process.popen.returncode != 0):
                    refused.append(f"a launcher ended with {process.popen.returncode}: {shell.last_line(process.said())}")
            processes.clear()
        # An agent outlives a launcher that was killed.
        for pid in self.agents.values():
            if shell.read(f"/proc/{pid}/cmdline").startswith("tencrypt\0agent"):
                os.kill(pid, 9)
        self.agents.clear()
        for fd in self.kept:
            os.close(fd)
        self.kept.clear()
        if refused:
            raise Failure(refused[0])


class TencryptAes(Tencrypt):
    name, title = "tencrypt-aes", f"Tencrypt {AES}"
    cipher = AES


class TencryptNoSpin(Tencrypt):
    """Without the bounded spin: the round trip of an agent that sleeps at once."""

    name, title = "tencrypt-no-spin", f"Tencrypt {CHACHA}, no spin"
    measures = {"rtt"}
    arguments = ("--spin", "0")

    def start(self):
        if self.arguments[0] not in run(self.program, "launch", "--help"):
            raise Unavailable(f"this program has no {self.arguments[0]}")
        super().start()


class TencryptV6(Tencrypt):
    name, title = "tencrypt-chacha-v6", f"Tencrypt {CHACHA}, IPv6"
    address = VIP6


class TencryptAesV6(TencryptAes):
    name, title = "tencrypt-aes-v6", f"Tencrypt {AES}, IPv6"
    address = VIP6


class TencryptRekey(Tencrypt):
    """New keys every two seconds: what a rekey costs, and whether it loses a packet."""

    name, title = "tencrypt-rekey", f"Tencrypt {CHACHA}, rekey every {REKEY_AFTER} s"
    measures = {"tcp1", "stream"}
    arguments = ("--rekey-after", REKEY_AFTER)

    TABLE = f"""
table netdev bench {{
  counter answers {{ }}
  chain in {{
    type filter hook ingress device "eth0" priority 1; policy accept;
    udp sport {TUNNEL_PORT} udp dport {TUNNEL_PORT} @th,64,32 0x02000000 counter name answers
  }}
}}
"""

    def start(self):
        super().start()
        for end in "ab":
            run(*inside(self.space(end), "nft", "-f", "-"), stdin=self.TABLE)

    def rekeys(self):
        """Answers to handshakes (message type 2) so far, at both ends."""
        return sum(int(run(*inside(self.space(end), "nft", "list", "counter", "netdev", "bench", "answers"))
                       .split("packets")[1].split()[0]) for end in "ab")

    def down(self):
        try:
            super().down()
        finally:
            for end in "ab":
                if "bench" in run(*inside(self.space(end), "nft", "list", "tables", "netdev")):
                    run(*inside(self.space(end), "nft", "delete", "table", "netdev", "bench"))


class TencryptIdle(Tencrypt):
    """A project of 1,000 workloads, at rest: what an agent costs that has nothing to do."""

    name, title = "tencrypt-idle", "Tencrypt, 1,000 workloads, idle"
    measures = {"idle"}
    others = 998


def classes():
    return {row.name: row for row in (Tencrypt, TencryptAes, TencryptV6, TencryptAesV6, TencryptNoSpin, TencryptRekey, TencryptIdle)}
