"""The rows of the benchmark: how each carries traffic from namespace a to namespace b.

A row is set up at its turn and taken down afterwards, so that no other row's processes run beside it. The servers in b
are the same for all: iperf3 on 5301, echo on 7301, the sink of the numbered stream on 7302.

`Row` is plain traffic and the base of all; tunnels with a device are `peers`, Tencrypt is in `tencrypt`.
"""

import os

import shell
from shell import Failure, Process, inside, probe, run
from underlay import V4

IPERF, PONG, SINK = 5301, 7301, 7302
REACH_LIMIT = 15.0


class Row:
    """Plain traffic. `measures` names what can be measured: `tcp`, `udp` and what Tencrypt alone has."""

    name, title = "plain", "plain"
    measures = {"tcp", "udp"}
    address = V4["b"]
    ports = {"iperf": IPERF, "pong": PONG, "stream": SINK}
    # Path of the program, and its version, as the installer found them.
    program = version = None

    def __init__(self, place):
        """`place`: the underlay; what the installer knows of programs; a folder for files."""
        self.place = place
        self.ends = {"a": [], "b": []}
        self.first_byte = None

    # ---- for its subclasses

    def start(self):
        """Begins to carry traffic."""

    def file(self, name):
        return os.path.join(self.place.work, f"{self.name}-{name}")

    def write(self, name, text, mode=0o600):
        path = self.file(name)
        with open(path, "w", encoding="utf-8", opener=lambda p, f: os.open(p, f, mode)) as file:
            file.write(text)
        return path

    def spawn(self, end, *argv, env=None):
        """A process of the tunnel at this end."""
        name = os.path.basename(str(argv[0]))
        process = Process(inside(self.space(end), *argv), self.file(f"{name}-{end}.log"), env=env)
        self.ends[end].append(process)
        return process

    def space(self, end):
        return self.place.underlay.space[end]

    # ---- for the measurements

    def up(self):
        self.start()
        self.reach()

    def reach(self):
        """The echo answers through the row."""
        try:
            run(*probe(self.space("a"), "reach", self.address, self.ports["pong"], REACH_LIMIT), limit=REACH_LIMIT + 5)
        except Failure:
            self.alive()
            raise Failure("nothing comes through") from None

    def alive(self):
        for processes in self.ends.values():
            for process in processes:
                if not process.running():
                    raise Failure(f"{os.path.basename(process.log)} ended: {shell.last_line(process.said())}")

    def pids(self, end=None):
        """All its processes, or those of one end."""
        ends = [end] if end else ["a", "b"]
        return shell.descendants([p.pid for e in ends for p in self.ends[e] if p.running()])

    def memory_pids(self, end):
        return self.pids(end)

    def private_bytes(self):
        """The larger of the two ends."""
        return max(sum(shell.private_bytes(pid) for pid in self.memory_pids(end)) for end in "ab")

    def down(self):
        for processes in self.ends.values():
            for process in processes:
                process.stop()
            processes.clear()
