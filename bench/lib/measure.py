"""The measurements of one row at its turn, each with a time limit; one that fails leaves its reason and the next goes on.

| value | what |
|---|---|
| `tcp1` … `tcp20` | Gbit/s at iperf3's receiver, so many streams, cubic on both sides |
| `cpu`, `kcpu` | CPU seconds per GB over these runs: the tunnel's processes at both ends; the machine's kernel threads |
| `udp` | Gbit/s received of what iperf3 can send (-b 0), large datagrams |
| `cpu400` | CPU seconds of the tunnel's processes per GB received at 400 Mbit/s |
| `pps64` | thousand datagrams of 64 bytes received per second, of as many as one thread can send |
| `p50`, `p99` | TCP round trip in us, 64-byte requests on one connection, nothing else going on |
| `load50`, `load99` | the same while iperf3 sends five streams |
| `idle`, `loaded` | private memory in MB of one end (the larger): before any load; the most during 10 and 20 streams and UDP |
| `flows` | flows in the agent's table when it was loaded most |
| `first` | ms from `protected` to the first byte of an answer |
| `idle1000`, `wakeups` | MB and wake-ups per second of an agent that knows 1,000 workloads and has nothing to do |
| `rate`, `lost`, `rekeys` | the numbered UDP stream over rekeys: datagrams per second, lost, handshakes |
| `tenc0`, `socket`, `backlog` | of those lost, what full queues of the kernel dropped: the client's device, the server's socket, a CPU's |
"""

import json
import threading
import time

import shell
from rows import IPERF, SINK
from shell import Failure, Process, inside, probe, run

REQUESTS = 3000
LOAD_STREAMS = 5
SMALL = 64
STREAMS, QUICK_STREAMS = (1, 5, 10, 20), (1, 5, 10)
REKEYS, REKEY_AFTER = 15, 2
# The search for the highest rate without loss: from beyond what the sender can do, to 5 %.
HIGHEST, STEPS, STEP_SECONDS = 400_000, 10, 2
# After the last packet, keepalives and neighbour probes go on for a while.
SETTLE, WATCH = 15.0, 10.0


class Measure:
    """One turn of one row: values by name, and reasons of what failed."""

    def __init__(self, row, seconds, quick, first_round):
        self.row, self.seconds, self.quick, self.first_round = row, seconds, quick, first_round
        self.values, self.failures = {}, {}
        self.most = 0
        self.large = 1200 if row.place.underlay.mtu < 9000 else 8000

    def all(self):
        has = self.row.measures
        steps = []
        if has & {"tcp", "udp", "first"}:
            steps.append((("idle",), self.idle))
        if "first" in has:
            steps.append((("first",), self.first))
        if has & {"tcp", "rtt"}:
            steps.append((("p50", "p99"), self.round_trip))
        if "tcp" in has:
            steps += [((f"tcp{n}",), lambda n=n: self.tcp(n)) for n in (QUICK_STREAMS if self.quick else STREAMS)]
            steps.append((("cpu", "kcpu"), self.cost))
        if "tcp1" in has:
            steps.append((("tcp1",), lambda: self.tcp(1)))
        if "udp" in has:
            steps.append((("udp",), self.udp))
            steps.append((("cpu400",), self.udp_cost))
            steps.append((("pps64",), self.small))
        if "tcp" in has:
            steps.append((("load50", "load99"), self.round_trip_loaded))
            steps.append((("loaded", "flows"), self.loaded))
        if "idle" in has and self.first_round:
            steps.append((("idle1000", "wakeups"), self.rest))
        if "stream" in has and self.first_round and not self.quick:
            steps.append((("rate", "lost", "rekeys"), self.stream))
        self.bytes = self.cpu = self.kernel = 0.0
        for names, step in steps:
            try:
                step()
            except Exception as error:  # whatever it is: the next measurement goes on
                reason = str(error) if isinstance(error, Failure) else f"{type(error).__name__}: {error}"
                self.failures.update(dict.fromkeys(names, reason))
        return self

    # ---- one run of iperf3

    def iperf(self, *arguments, seconds=None):
        """Runs it; the end of its report, and the CPU seconds of tunnel and kernel threads."""
        row, seconds = self.row, seconds or self.seconds
        server = iperf_server(row)
        try:
            before, kernel_before = shell.cpu_times(row.pids()), shell.cpu_times(shell.kernel_threads())
            sampler = threading.Timer(seconds * 0.7, self._sample)
            sampler.start()
            text = run(*iperf_client(row, seconds, *arguments), limit=seconds + 20)
            cpu, kernel_cpu = shell.cpu_seconds(row.pids(), before), shell.cpu_seconds(shell.kernel_threads(), kernel_before)
            sampler.join()
        finally:
            server.stop()
        row.alive()
        report = json.loads(text)
        if "error" in report:
            raise Failure(f"iperf3: {report['error']}")
        return report["end"], cpu, kernel_cpu

    def _sample(self):
        self.most = max(self.most, self.row.private_bytes())

    # ---- the measurements

    def idle(self):
        if self.row.pids():
            self.values["idle"] = self.row.private_bytes() / 1e6

    def first(self):
        self.values["first"] = self.row.first_byte

    def round_trip(self, seconds=5.0, names=("p50", "p99")):
        row = self.row
        text = run(*probe(row.space("a"), "ping", row.address, row.ports["pong"], REQUESTS, seconds), limit=seconds + 15)
        for name, value in zip(names, text.split()):
            self.values[name] = float(value)

    def tcp(self, streams):
        end, cpu, kernel = self.iperf("-P", streams, "-C", "cubic")
        if (end["sender_tcp_congestion"], end["receiver_tcp_congestion"]) != ("cubic", "cubic"):
            raise Failure("iperf3 did not use cubic on both sides")
        got = end["sum_received"]
        if not got["bytes"]:
            raise Failure("nothing was received")
        self.values[f"tcp{streams}"] = got["bits_per_second"] / 1e9
        self.bytes += got["bytes"]
        self.cpu += cpu
        self.kernel += kernel

    def cost(self):
        if not self.bytes:
            raise Failure("no TCP run succeeded")
        if self.row.pids():
            self.values["cpu"] = self.cpu / self.bytes * 1e9
        self.values["kcpu"] = self.kernel / self.bytes * 1e9

    def udp(self):
        end, _, _ = self.iperf("-u", "-b", 0, "-l", self.large)
        self.values["udp"] = received(end)["bits_per_second"] / 1e9

    def udp_cost(self):
        end, cpu, _ = self.iperf("-u", "-b", "400M", "-l", self.large)
        if self.row.pids():
            self.values["cpu400"] = cpu / received(end)["bytes"] * 1e9

    def small(self):
        """iperf3 spends too much on each datagram to fill these paths."""
        row = self.row
        drain = Process(probe(row.space("b"), "drain", SINK), row.file("drain.out"))
        try:
            drain.await_line("ready")
            run(*probe(row.space("a"), "flood", row.address, row.ports["stream"], SMALL, self.seconds), limit=self.seconds + 15)
            drain.wait(15)
            got = drain.await_line("received").split()
        finally:
            drain.stop()
        if not int(got[1]):
            raise Failure("nothing was received")
        self.values["pps64"] = int(got[1]) / float(got[3]) / 1e3

    def round_trip_loaded(self):
        row = self.row
        server = iperf_server(row)
        try:
            load = Process(iperf_client(row, self.seconds + 2, "-P", LOAD_STREAMS, "-C", "cubic"), row.file("load.json"))
            try:
                time.sleep(1)
                self.round_trip(float(self.seconds), ("load50", "load99"))
                if not load.running():
                    raise Failure("the load ended before the round trips")
            finally:
                load.stop()
        finally:
            server.stop()

    def loaded(self):
        if not self.row.pids():
            return
        if not self.most:
            raise Failure("no load ran")
        self.values["loaded"] = self.most / 1e6
        if hasattr(self.row, "status"):
            flows = find(self.row.status(), "flows")
            if flows is not None:
                self.values["flows"] = float(flows)

    def rest(self):
        time.sleep(SETTLE / 5 if self.quick else SETTLE)
        self.values["idle1000"] = self.row.private_bytes() / 1e6
        before = [shell.switches(pid) for end in "ab" for pid in self.row.memory_pids(end)]
        watch = WATCH / 2 if self.quick else WATCH
        time.sleep(watch)
        after = [shell.switches(pid) for end in "ab" for pid in self.row.memory_pids(end)]
        self.values["wakeups"] = max(b - a for a, b in zip(before, after)) / watch

    # ---- the numbered stream

    def stream(self):
        rate = self._rate_without_loss()
        rekeys, queues = self.row.rekeys(), overflows(self.row)
        sent, lost, reached = self._stream(rate / 2, REKEYS * REKEY_AFTER + 4)
        self.values.update(rate=reached, sent=sent, lost=lost, rekeys=self.row.rekeys() - rekeys)
        self.values.update((name, count - queues[name]) for name, count in overflows(self.row).items())

    def _rate_without_loss(self):
        """A rate counts as lossy when two runs in a row lose."""
        low, high = 0.0, float(HIGHEST)
        for _ in range(STEPS):
            if (high - low) * 20 <= high:
                break
            middle = (low + high) / 2
            sent, lost, reached = self._stream(middle, STEP_SECONDS)
            if lost:
                sent, lost, reached = self._stream(middle, STEP_SECONDS)
            if lost:
                high = min(reached, middle)
            else:
                low = reached
                # The sender cannot do more than this.
                if reached < middle * 0.97:
                    break
        if not low:
            raise Failure("no rate without a loss was found")
        return low

    def _stream(self, rate, seconds):
        row = self.row
        sink = Process(probe(row.space("b"), "sink", SINK), row.file("sink.out"))
        try:
            sink.await_line("ready")
            words = run(*probe(row.space("a"), "stream", row.address, row.ports["stream"], f"{rate:.0f}", seconds),
                        limit=seconds + 20).split()
            sink.wait(15)
            got = sink.await_line("received").split()
        finally:
            sink.stop()
        sent, elapsed = int(words[1]), float(words[3])
        return sent, sent - int(got[1]), sent / elapsed


def iperf_server(row):
    server = Process(inside(row.space("b"), "iperf3", "-s", "-p", IPERF, "--forceflush"), row.file("iperf3-server.log"))
    try:
        server.await_line("Server listening")
    except Failure:
        server.stop()
        raise
    return server


def iperf_client(row, seconds, *arguments):
    return inside(row.space("a"), "iperf3", "-J", "-t", seconds, "-p", row.ports["iperf"], "-c", row.address, *arguments)


def received(end):
    """What the receiver of a UDP run got."""
    got = end.get("sum_received") or end["sum"]
    if not got["bytes"]:
        raise Failure("nothing was received")
    return got


def overflows(row):
    """Datagrams that full queues have dropped so far."""
    device = run(*inside(row.space("a"), "cat", "/proc/net/dev"))
    tenc0 = next((int(line.split()[12]) for line in device.splitlines() if line.strip().startswith("tenc0:")), 0)
    names, counts = [line.split() for line in run(*inside(row.space("b"), "cat", "/proc/net/snmp")).splitlines()
                     if line.startswith("Udp:")]
    backlog = sum(int(line.split()[1], 16) for line in shell.read("/proc/net/softnet_stat").splitlines())
    return {"tenc0": tenc0, "socket": int(counts[names.index("RcvbufErrors")]), "backlog": backlog}


def find(document, key):
    """The first value of this key, however deep."""
    if isinstance(document, dict):
        if document.get(key) is not None and not isinstance(document[key], (dict, list)):
            return document[key]
        document = list(document.values())
    if isinstance(document, list):
        for item in document:
            value = find(item, key)
            if value is not None:
                return value
    return None
