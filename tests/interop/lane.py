"""One implementation and one address family: three namespaces, an agent, a foreign WireGuard, and what is checked of them.

    pod: tencrypt ── eth0 ══ pod ─ bridge, counters: link ─ peer ══ eth0 ── foreign WireGuard: peer

A peer *is* its address here, so inner and outer addresses are equal. The agent's side needs nothing for that; the foreign side
is set up as wg-quick would: the socket's mark goes by the main table, all else to the pod into the tunnel.

1. positive controls: a ping in clear passes and trips the counter of what is not the tunnel; with a wrong psk, handshakes are
   tried by both sides, and nothing passes: the agent seals and opens nothing
2. handshakes by both at once; by the foreign side, then by the agent: who began is read off the wire
3. line rate, in turns (main.py)
4. one packet per 3 s both ways, across rekeys; the session was begun by the foreign side over IPv4, by the agent over IPv6
5. on the wire: the tunnel alone
"""

import base64
import json
import os
import threading
import time

import kdf
import shell
from shell import Failure, Process, inside, run, until

PROBE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "probe.py")
PROJECT, CIPHER = "interop", "chacha20poly1305"
# Where initiations cross, an agent that has the greater address does not answer: over IPv6 it has it.
ADDRESSES = {4: ("10.88.0.1", "10.88.0.2"), 6: ("fd88::2", "fd88::1")}
RESOLVER = {4: "10.88.0.53", 6: "fd88::53"}
PREFIX = {4: 24, 6: 64}
HOST = {4: 32, 6: 128}
TUNNEL_PORT, ECHO, IPERF = 51820, 7007, 5201
MARK, TABLE = "0x7e2c", "88"
# What wg-quick takes on a link of 1500; over IPv6 the next multiple of 16, as the agent does: gotatun pads to 16 beyond the MTU,
# and its datagrams would not fit the link.
MTU = {4: 1420, 6: 1408}
SOCKETS = "/var/run/wireguard"
KINDS = {1: "initiation", 2: "response", 3: "cookie", 4: "data"}
TRANSFER = 4 << 20
INTERVAL = 3
START_LIMIT, STOP_LIMIT = 20.0, 15.0
# A handshake and an answer on an idle machine take milliseconds; the lanes share its cores. The first retry comes after 5 s
# (agent: 0.25 s): what takes this long was not answered at once.
AT_ONCE = 2.0
# More initiations than this for one rekey, and it was repeated or crossed.
NO_STORM = 2


class Full:
    """Ten minutes, a minute."""

    count, rekeys, seconds, transfers = 600 // INTERVAL, 4, 15, 3


class Quick:
    """Everything once; no rekey comes in so short a time."""

    count, rekeys, seconds, transfers = 7, 0, 2, 1


class Stopped(Exception):
    """The run ends: the lane has nothing more to say."""


def derived(key, label, *addresses):
    return kdf.hkdf_sha256(b"", key, kdf.info(f"tencrypt v1 {label}", CIPHER, PROJECT, *map(kdf.address, addresses)), 32)


def secret_of(key, address):
    return kdf.clamp(derived(key, "static", address))


def base64_of(data):
    return base64.b64encode(data).decode() + "\n"


class Lane:
    """`run` makes it and checks; `down` removes it and may come at any moment, from another thread, and twice."""

    def __init__(self, state, number, title, family, program, foreign, work):
        self.state, self.family, self.program, self.foreign = state, family, program, foreign
        self.title = f"{title} IPv{family}"
        self.doing = "namespaces"
        self.pod, self.peer = ADDRESSES[family]
        self.space = {end: f"interop-{os.getpid()}-{number}-{end}" for end in ("pod", "peer", "link")}
        self.device = f"io{number}x{os.getpid()}"
        self.folder = os.path.join(work, str(number))
        os.mkdir(self.folder)
        self._mutex = threading.Lock()
        self._spaces, self._processes = [], {}

    def run(self):
        self.namespaces()
        self.files()
        self.check("in clear without either", self.clear)
        self.check("wrong psk", self.wrong_psk)
        self.check("handshakes by both at once", self.by_both)
        self.check("handshake by the peer", self.by_peer)
        self.check("handshake by Tencrypt", self.by_tencrypt)
        if self.family == 4:
            self.check("line rate", self.line_rate)
            self.check("restart of the peer", self.peer_restarts)
            self.check(self.slow_name(), self.slow)
        else:
            self.check(self.slow_name(), self.slow)
            self.check("line rate", self.line_rate)
        self.check("wire", self.wire)

    def check(self, name, step):
        self.doing = name
        self.go_on()
        self.state.result(self.title, name, step())

    def go_on(self):
        if self.state.stopping.is_set():
            raise Stopped

    # ---- namespaces, files, processes

    def namespaces(self):
        for end in ("link", "pod", "peer"):
            with self._mutex:
                self.go_on()
                run("ip", "netns", "add", self.space[end])
                self._spaces.append(self.space[end])
            # IPv4 settings come from the host's: only what the foreign side needs of them is set.
            script = ("for f in all default; do echo 0 >/proc/sys/net/ipv6/conf/$f/disable_ipv6; "
                      "echo 0 >/proc/sys/net/ipv6/conf/$f/accept_dad; done")
            if end == "peer":
                script += "; for f in all default; do echo 0 >/proc/sys/net/ipv4/conf/$f/rp_filter; done"
            run(*inside(self.space[end], "sh", "-c", script))
            self.ip(end, "link set lo up")
        self.ip("link", "link add br0 type bridge")
        self.ip("link", "link set br0 addrgenmode none up")
        for end, address in (("pod", self.pod), ("peer", self.peer)):
            run("ip", "link", "add", "eth0", "netns", self.space[end], "type", "veth",
                "peer", "name", end, "netns", self.space["link"])
            self.ip("link", f"link set {end} addrgenmode none master br0 up")
            self.ip(end, "link set eth0 addrgenmode none")
            self.ip(end, f"addr add {address}/{PREFIX[self.family]} dev eth0" + (" nodad" if self.family == 6 else ""))
            self.ip(end, "link set eth0 up")
            self.ip(end, f"route add default via {self.peer if end == 'pod' else self.pod}")
        run(*inside(self.space["link"], "nft", "-f", "-"), stdin=self.counters())

    def counters(self):
        """Every message by its sender and kind; neighbour discovery; errors about the tunnel; whatever is left."""
        names = [f"{end}_{kind}" for end in ("pod", "peer") for kind in KINDS.values()]
        ports = f"{TUNNEL_PORT:04x}" * 2
        return "\n".join([
            "table bridge wire {",
            *(f"counter {name} {{ }}" for name in [*names, "neighbour", "errors", "other"]),
            "chain tunnel {",
            *(f'iifname "{end}" @th,64,32 {number << 24:#010x} counter name {end}_{kind} accept'
              for end in ("pod", "peer") for number, kind in KINDS.items()),
            "}",
            "chain forward { type filter hook forward priority 0;",
            "ether type arp counter name neighbour accept",
            "icmpv6 type { 133-137, 143 } counter name neighbour accept",
            f"udp sport {TUNNEL_PORT} udp dport {TUNNEL_PORT} jump tunnel",
            f"icmp type destination-unreachable @th,224,32 0x{ports} counter name errors accept",
            f"icmpv6 type destination-unreachable @th,384,32 0x{ports} counter name errors accept",
            "counter name other",
            "}\n}\n"])

    def files(self):
        key = os.urandom(32)
        secret = {address: secret_of(key, address) for address in (self.pod, self.peer)}
        psk = derived(key, "psk", *sorted((self.pod, self.peer), key=kdf.address))
        self.public_of_pod = base64_of(kdf.x25519(secret[self.pod], 9)).strip()
        self.write("project.key", base64_of(key))
        self.write("private", base64_of(secret[self.peer]))
        self.write("psk", base64_of(psk))
        self.write("wrong-psk", base64_of(os.urandom(32)))
        self.write("resolv.conf", f"nameserver {RESOLVER[self.family]}\nsearch {PROJECT}.svc.cluster.local\n")
        os.mkdir(self.file("directory"))
        self.write("directory/pods.json", json.dumps({"apiVersion": "v1", "kind": "List", "items": [
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": PROJECT},
             "status": {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]}}
            for name, address in (("protected", self.pod), ("foreign", self.peer))]}))

    def file(self, name):
        return os.path.join(self.folder, name)

    def write(self, name, text):
        with open(os.open(self.file(name), os.O_WRONLY | os.O_CREAT, 0o600), "w", encoding="utf-8") as file:
            file.write(text)

    def ip(self, end, words):
        command = words.split()
        run("ip", f"-{self.family}", "-n", self.space[end], *command)

    def spawn(self, name, argv, env=None):
        with self._mutex:
            self.go_on()
            self._processes[name] = Process(argv, self.file(f"{name}.log"), env=env)
            return self._processes[name]

    def stop(self, name, limit=5.0):
        with self._mutex:
            process = self._processes.pop(name, None)
        if process and process.running():
            if not process.stop(limit):
                raise Failure(f"{name} did not end within {limit:.0f} s")
        elif process:
            raise Failure(f"{name} ended by itself: {shell.last_line(process.said())}")

    def start_tencrypt(self):
        process = self.spawn("tencrypt", [
            self.program, "launch", "--netns", self.space["pod"], "--project", PROJECT, "--cipher", CIPHER,
            "--project-key-file", self.file("project.key"), "--directory", self.file("directory"),
            "--resolv-conf", self.file("resolv.conf")])
        process.await_line("protected", START_LIMIT)

    def stop_tencrypt(self):
        self.stop("tencrypt", STOP_LIMIT)

    def start_foreign(self, psk="psk"):
        os.makedirs(SOCKETS, exist_ok=True)
        program, *arguments = self.foreign
        process = self.spawn("foreign", inside(self.space["peer"], program, *arguments, self.device),
                             env={"LOG_LEVEL": "error", "WG_LOG_LEVEL": "error", "WG_SUDO": "1"})
        until(lambda: os.path.exists(f"{SOCKETS}/{self.device}.sock") or not process.running(), "its socket")
        if not process.running():
            raise Failure(f"the foreign WireGuard ended: {shell.last_line(process.said())}")
        endpoint = f"[{self.pod}]" if self.family == 6 else self.pod
        run(*inside(self.space["peer"], "wg", "set", self.device, "private-key", self.file("private"),
                    "listen-port", TUNNEL_PORT, "fwmark", MARK, "peer", self.public_of_pod, "preshared-key", self.file(psk),
                    "allowed-ips", f"{self.pod}/{HOST[self.family]}", "endpoint", f"{endpoint}:{TUNNEL_PORT}"))
        self.ip("peer", f"link set {self.device} addrgenmode none mtu {MTU[self.family]} up")
        self.ip("peer", f"route replace default dev {self.device} src {self.peer} table {TABLE}")

    def stop_foreign(self):
        self.stop("foreign")
        until(lambda: self.device not in run("ip", "-n", self.space["peer"], "-br", "link"), "the end of its device")
        if os.path.exists(f"{SOCKETS}/{self.device}.sock"):
            os.unlink(f"{SOCKETS}/{self.device}.sock")

    def probe(self, end, *words):
        return inside(self.space[end], shell.PYTHON, "-I", PROBE, *words)

    def last_words(self):
        """The ends of the logs, for a failure."""
        return [f"{name}: {line}" for name in ("tencrypt", "foreign") for line in shell.read(self.file(f"{name}.log")).splitlines()[-8:]]

    def down(self):
        with self._mutex:
            processes = sorted(self._processes.items(), key=lambda item: item[0] != "tencrypt")
            self._processes, spaces, self._spaces = {}, self._spaces, []
        for name, process in processes:
            process.stop(STOP_LIMIT if name == "tencrypt" else 5.0)
        for space in spaces:
            # Programs that ran to their end or not: all in there are this lane's.
            for pid in run("ip", "netns", "pids", space).split():
                try:
                    os.kill(int(pid), 9)
                except ProcessLookupError:
                    pass
            run("ip", "netns", "del", space)
        if os.path.exists(f"{SOCKETS}/{self.device}.sock"):
            os.unlink(f"{SOCKETS}/{self.device}.sock")

    # ---- what is on the wire

    def seen(self):
        listing = json.loads(run(*inside(self.space["link"], "nft", "-j", "list", "counters")))
        return {one["counter"]["name"]: one["counter"]["packets"] for one in listing["nftables"] if "counter" in one}

    def since(self, before):
        return {name: value - before[name] for name, value in self.seen().items()}

    def status(self):
        return json.loads(run(self.program, "status", self.space["pod"], "-o", "json"))

    # ---- the checks; each gives its detail, or fails

    def clear(self):
        before = self.seen()
        self.ping("pod", 1)
        self.ping("peer", 1)
        other = self.since(before)["other"]
        if other < 4:
            raise Failure(f"two pings in clear, but the counter says {other}: it counts nothing")
        # From here on nothing goes to the pod but through the tunnel, not even while there is none.
        self.ip("peer", f"route add unreachable default metric 4000 table {TABLE}")
        self.ip("peer", f"rule add pref 10 fwmark {MARK} lookup main")
        self.ip("peer", f"rule add pref 20 to {self.pod} lookup {TABLE}")
        for end in ("pod", "peer"):
            self.spawn(f"echo-{end}", self.probe(end, "echo", self.family, ECHO)).await_line("ready")
        self.spawn("iperf3", inside(self.space["peer"], "iperf3", "-s"))
        self.quiet = self.seen()
        return f"{other} packets counted"

    def wrong_psk(self):
        before = self.seen()
        self.start_tencrypt()
        self.start_foreign("wrong-psk")
        for end in ("peer", "pod"):
            self.ask(end, "refused", self.other(end), ECHO, 2)
        seen = self.since(before)
        if not all(seen[f"{end}_{kind}"] for end in ("pod", "peer") for kind in ("initiation", "response")):
            raise Failure(f"no handshake was tried and answered by both: {seen}")
        # gotatun sends what waits as soon as it has answered an initiation, without a word that the other could read it: that
        # such data messages come is its own affair, that they are not opened is ours.
        counters = self.status()["counters"]
        if seen["pod_data"] or counters["sealed"] or counters["opened"]:
            raise Failure(f"data messages without a common key: {seen}, {counters}")
        self.stop_tencrypt()
        self.stop_foreign()
        return (f"initiations {seen['pod_initiation']} + {seen['peer_initiation']}, responses {seen['pod_response']} + "
                f"{seen['peer_response']}, sealed 0, opened 0")

    def by_both(self):
        """Neither side has a session, and both have something to send."""
        self.start_foreign()
        self.start_tencrypt()
        before, began = self.seen(), time.monotonic()
        pings = {end: self.spawn(f"ping-{end}", self.pinging(end, 1)) for end in ("pod", "peer")}
        for end, process in pings.items():
            if process.wait(20):
                raise Failure(f"from the {end}: {shell.last_line(process.said())}")
        took = time.monotonic() - began
        if took > AT_ONCE:
            raise Failure(f"the answers took {took:.1f} s")
        seen = self.since(before)
        self.stop_tencrypt()
        self.stop_foreign()
        return (f"answers after {took * 1000:.0f} ms, initiations {seen['pod_initiation']} + {seen['peer_initiation']}, "
                f"responses {seen['pod_response']} + {seen['peer_response']}")

    def by_peer(self):
        self.start_foreign()
        self.start_tencrypt()
        return self.begins("peer")

    def by_tencrypt(self):
        """The foreign side still has the session of a predecessor of this agent."""
        self.stop_tencrypt()
        self.start_tencrypt()
        return self.begins("pod")

    def peer_restarts(self):
        """The agent still has the session of this peer's predecessor."""
        self.stop_foreign()
        self.start_foreign()
        return self.begins("peer")

    def begins(self, end):
        """The first packet comes from this end; then all there is, both ways."""
        before, began = self.seen(), time.monotonic()
        self.ping(end, 1)
        first = time.monotonic() - began
        if first > AT_ONCE:
            raise Failure(f"the first answer took {first:.1f} s")
        self.ping(self.other_end(end), 1)
        for one in (end, self.other_end(end)):
            for _ in range(self.state.phase.transfers):
                self.ask(one, "transfer", self.other(one), ECHO, TRANSFER)
        seen = self.since(before)
        if not seen[f"{end}_initiation"] or seen[f"{self.other_end(end)}_initiation"]:
            raise Failure(f"another side began: {seen}")
        mib = 4 * self.state.phase.transfers * TRANSFER >> 20
        return f"first answer {first * 1000:.0f} ms, then {mib} MiB of TCP, UDP of 0 to 20000 bytes"

    def line_rate(self):
        seconds, rates = self.state.phase.seconds, []
        with self.state.line_rate:
            for title, extra in (("TCP out", ()), ("in", ("-R",)), ("UDP out", ("-u", "-b", "0", "-l", "1300")),
                                 ("in", ("-u", "-b", "0", "-l", "1300", "-R"))):
                self.go_on()
                client = self.spawn("iperf3-client", inside(self.space["pod"], "iperf3", "-c", self.peer, "-p", IPERF, "-t", seconds,
                                                            "-J", *extra))
                status = client.wait(seconds + 30)
                self.go_on()
                said = json.loads(client.said())
                if status or "error" in said:
                    raise Failure(f"{title}: {said.get('error', f'exit status {status}')}")
                end = said["end"]
                total = end.get("sum_received") or end["sum"]
                received = total["bits_per_second"]
                if "-u" in extra and "sum_received" not in end:
                    # What was sent: as fast as one side can. What the other cannot take is lost, as in clear.
                    received *= 1 - end["sum"]["lost_percent"] / 100
                if received <= 0:
                    raise Failure(f"{title}: nothing arrived")
                rates.append(f"{title} {received / 1e9:.2f}")
        return ", ".join(rates) + f" Gbit/s ({seconds} s each)"

    def slow_name(self):
        return f"{self.state.phase.count * INTERVAL} s, 1 packet / 3 s"

    def slow(self):
        phase, before = self.state.phase, self.seen()
        beginner = "peer" if self.family == 4 else "pod"
        paces = {}
        for end, delay in (("pod", 0), ("peer", INTERVAL / 4)):
            paces[end] = self.spawn(f"pace-{end}", self.probe(end, "pace", self.other(end), ECHO, phase.count, INTERVAL, delay))
        results = {end: self.answer(end, process, phase.count * INTERVAL + 60) for end, process in paces.items()}
        seen = self.since(before)
        responses = seen["pod_response"] + seen["peer_response"]
        initiations = seen["pod_initiation"] + seen["peer_initiation"]
        if seen[f"{beginner}_initiation"] < phase.rekeys or responses < phase.rekeys:
            raise Failure(f"fewer than {phase.rekeys} rekeys by the {beginner}: {seen}")
        if initiations > responses + NO_STORM:
            raise Failure(f"initiations repeated: {seen}")
        slowest = max(result["slowest_ms"] for result in results.values())
        return (f"UDP {sum(r['answered'] for r in results.values())} of {sum(r['sent'] for r in results.values())} answered, "
                f"TCP {sum(r['tcp'] for r in results.values())}, slowest {slowest} ms, rekeys {responses} by "
                f"{'Tencrypt' if beginner == 'pod' else 'the peer'}")

    def wire(self):
        self.stop_tencrypt()
        seen = self.since(self.quiet)
        if seen["other"]:
            raise Failure(f"{seen['other']} packets that are not the tunnel's: {seen}")
        tunnel = sum(seen[f"{end}_{kind}"] for end in ("pod", "peer") for kind in KINDS.values())
        return f"{tunnel} tunnel messages, 0 others (ARP and neighbour discovery {seen['neighbour']}, errors {seen['errors']})"

    def other_end(self, end):
        return "peer" if end == "pod" else "pod"

    def other(self, end):
        return self.peer if end == "pod" else self.pod

    def pinging(self, end, count):
        return inside(self.space[end], "ping", "-n", "-c", count, "-i", "0.2", "-W", 8, self.other(end))

    def ping(self, end, count):
        run(*self.pinging(end, count))

    def ask(self, end, *words):
        """A probe to its end; fails with what it said."""
        return self.answer(end, self.spawn(f"probe-{end}", self.probe(end, *words)), 90)

    def answer(self, end, process, limit):
        status = process.wait(limit)
        self.go_on()
        if status != 0:
            raise Failure(f"from the {end}: {shell.last_line(process.said())}")
        return json.loads(process.said())
