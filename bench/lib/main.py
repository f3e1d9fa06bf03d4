"""The end-to-end benchmark: arguments, the rounds, what is written. `run.sh` says how it is called.

1. `--prepare FILE` (as the user): arguments are checked, peers installed; what was found goes to FILE, and `tencrypt` to
   standard output when the program is needed, `report` when nothing has to be measured
2. `--prepared FILE` (as root): per underlay, rounds of all rows, each begun with another row; table, files, exit status
"""

import argparse
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from types import SimpleNamespace

import chart
import install
import peers
import report
import shell
import tencrypt
from measure import Measure
from results import BASE, PEER, PLAIN, Results, goals
from rows import PONG, Row
from shell import Failure, Process, Unavailable, probe
from underlay import NAMES, Underlay

BENCH = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
QUICK_ROWS = [PLAIN, "tencrypt-chacha", "tencrypt-aes", PEER]


def classes():
    """Every row, in the order of the tables."""
    return {Row.name: Row, **tencrypt.classes(), **peers.classes()}


def say(text):
    print(text, file=sys.stderr, flush=True)


def choice(known, what):
    def parse(text):
        if text == "all":
            return list(known)
        chosen = text.split(",")
        for name in chosen:
            if name not in known:
                raise argparse.ArgumentTypeError(f"no {what} '{name}' (one of: {', '.join(known)})")
        # In the order of the tables, each once.
        return [name for name in known if name in chosen]
    return parse


def count(text):
    if not text.isdigit() or not 1 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError("a number from 1 to 1000")
    return int(text)


def arguments(argv):
    parser = argparse.ArgumentParser(prog="run.sh", allow_abbrev=False, description=(
        "The speed of Tencrypt beside clear traffic and beside what people would use instead. Wants an idle machine."))
    parser.add_argument("--peers", metavar="all|LIST", type=choice(peers.classes(), "peer"), default=[PEER],
                        help=f"what to compare with, installed when missing (default {PEER}): {', '.join(peers.classes())}")
    parser.add_argument("--only", metavar="ROW,…", type=choice(classes(), "row"), help=f"only these rows: {', '.join(classes())}")
    parser.add_argument("--underlay", metavar="all|LIST", type=choice(NAMES, "underlay"), default=["veth1500"],
                        help=f"the network under them (default veth1500): {', '.join(NAMES)}")
    parser.add_argument("--rounds", type=count, help="rounds of all rows (default 5)")
    parser.add_argument("--seconds", type=count, help="seconds per iperf3 run (default 5)")
    parser.add_argument("--quick", action="store_true", help="under 3 minutes: two short rounds of four rows; writes nothing")
    parser.add_argument("--write", action="store_true", help="write bench/RESULTS.md and the charts")
    parser.add_argument("--save", metavar="FILE", help="keep what was measured, as JSON")
    parser.add_argument("--from", metavar="FILE,…", dest="saved", help="measure nothing: report on what was kept")
    parser.add_argument("--prepare", help=argparse.SUPPRESS)
    parser.add_argument("--prepared", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.quick and args.write:
        parser.error("--quick measures too little to be written")
    args.rounds = args.rounds or (2 if args.quick else 5)
    args.seconds = args.seconds or (2 if args.quick else 5)
    wanted = args.only or [n for n in classes() if n not in peers.classes() or n in args.peers]
    if args.only:
        args.peers = [n for n in args.only if n in peers.classes()]
    elif args.quick:
        wanted = [n for n in wanted if n in QUICK_ROWS or n in args.peers]
    args.rows = wanted
    return args


def prepare(args):
    if args.saved:
        print("report")
        return 0
    found = {name: install.install(name, say) for name in args.peers}
    with open(args.prepare, "w", encoding="utf-8") as file:
        json.dump(found, file)
    if any(name in tencrypt.classes() for name in args.rows):
        print("tencrypt")
    return 0


# ---- the run

class Bench:
    """All underlays and rounds of one run."""

    def __init__(self, args, found, program):
        self.args, self.found, self.program = args, found, program
        self.work = tempfile.mkdtemp(prefix="tencrypt-bench-")
        self.underlay = self.row = None
        self.document = {"facts": self.facts(), "settings": {"rounds": args.rounds, "seconds": args.seconds, "quick": args.quick},
                         "underlays": {}}
        self.began = time.monotonic()
        self.done, self.total = 0, len(args.underlay) * args.rounds * len(args.rows)

    def facts(self):
        cpu = next((line.partition(": ")[2] for line in shell.read("/proc/cpuinfo").splitlines() if line.startswith("model name")), "?")
        facts = {"CPU": f"{cpu}, {os.cpu_count()} cores", "kernel": f"{platform.system()} {platform.release()}",
                 "load at the start": " ".join(shell.read("/proc/loadavg").split()[:3]),
                 "congestion control": "cubic on both sides, proxies included",
                 "underlay": underlays(self.args.underlay),
                 "iperf3": shell.run("iperf3", "--version").split()[1],
                 "rounds": f"{self.args.rounds}, interleaved, {self.args.seconds} s per iperf3 run"}
        if self.program:
            facts["Tencrypt"] = f"{shell.run(self.program, '--version').strip()}, strict, by VIP with DNAT"
            if "/debug/" in self.program:
                facts["Tencrypt"] += " (A DEBUG BUILD: its figures mean nothing)"
        for name in self.args.peers:
            facts[name] = self.found[name].get("version") or self.found[name]["reason"]
        return facts

    def run(self):
        for name in self.args.underlay:
            self.underlay = Underlay(name)
            rows = {row: {"title": classes()[row].title, "values": {}, "failures": {}} for row in self.args.rows}
            self.document["underlays"][name] = rows
            pong = None
            try:
                self.underlay.up()
                pong = Process(probe(self.underlay.space["b"], "pong", PONG), os.path.join(self.work, "pong.log"))
                pong.await_line("ready")
                order = list(rows)
                for number in range(self.args.rounds):
                    for row in order[number % len(order):] + order[:number % len(order)]:
                        self.turn(name, number, row, rows[row])
            finally:
                if pong:
                    pong.stop()
                self.underlay.down()
                self.underlay = None
        return self.document

    def turn(self, underlay, number, name, data):
        """One row: up, all its measurements, down."""
        began = time.monotonic()
        kind = classes()[name]
        if number and kind.measures == {"idle"}:
            self.progress(number, underlay, name, "once is enough", began)
            return
        text = ""
        try:
            row = self.make(kind)
        except Unavailable as failure:
            data["failures"]["unavailable"] = str(failure)
            self.progress(number, underlay, name, str(failure), began)
            return
        self.row = row
        try:
            row.up()
            took = Measure(row, self.args.seconds, self.args.quick, number == 0).all()
            for value, amount in took.values.items():
                data["values"].setdefault(value, []).append(amount)
            data["failures"].update(took.failures)
            text = brief(took)
        except Unavailable as failure:
            data["failures"]["unavailable"] = text = str(failure)
        except Failure as failure:
            data["failures"]["row"] = f"round {number + 1}: {failure}"
            text = f"failed: {failure}"
        finally:
            self.row = None
            try:
                row.down()
            except Failure as failure:
                data["failures"]["end"] = f"round {number + 1}, at its end: {failure}"
                text += f"  (at its end: {failure})"
        self.progress(number, underlay, name, text, began)

    def make(self, kind):
        if kind.name in peers.classes():
            found = self.found[kind.name]
            if "reason" in found:
                raise Unavailable(found["reason"])
            kind.program, kind.version = found["program"], found["version"]
        elif kind.name != PLAIN:
            kind.program = self.program
        return kind(SimpleNamespace(underlay=self.underlay, work=self.work))

    def progress(self, number, underlay, name, text, began):
        self.done += 1
        now = time.monotonic()
        left = (now - self.began) / self.done * (self.total - self.done)
        where = f"{underlay}, " if len(self.args.underlay) > 1 else ""
        say(f"[{self.done:{len(str(self.total))}}/{self.total}] {where}round {number + 1}/{self.args.rounds}  {name:<19} {text}"
            f"  ({now - began:.0f} s; {minutes(left)} left)")

    def close(self):
        """After the last row, or in the middle of one."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        if self.row:
            try:
                self.row.down()
            except Failure:
                pass
        if self.underlay:
            self.underlay.down()
        shutil.rmtree(self.work, ignore_errors=True)


def brief(took):
    """One line of what was measured."""
    v = took.values
    parts = []
    tcp = [f"{v[n]:.2f}" for n in ("tcp1", "tcp5", "tcp10", "tcp20") if n in v]
    if tcp:
        parts.append("TCP " + " ".join(tcp))
    for name, words in (("cpu", "{:.2f} s/GB"), ("udp", "UDP {:.2f}"), ("pps64", "{:.0f} kpps"), ("idle1000", "{:.1f} MB"),
                        ("lost", "lost {:.0f}")):
        if name in v:
            parts.append(words.format(v[name]))
    if "p50" in v:
        parts.append(f"{v['p50']:.0f}/{v['p99']:.0f} us")
    if took.failures:
        parts.append("failed: " + ", ".join(took.failures))
    return "  ".join(parts)


def minutes(seconds):
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


# ---- what is written

def write(results):
    """RESULTS.md and the charts; charts of an earlier run go."""
    written = {}
    for file in os.listdir(BENCH):
        if file.endswith(".svg"):
            os.unlink(os.path.join(BENCH, file))
    for underlay in results.underlays():
        written[underlay] = []
        for file, alt, svg in chart.charts(results, underlay, NAMES[underlay], underlay != BASE):
            put(os.path.join(BENCH, file), svg)
            written[underlay].append((file, alt))
    put(os.path.join(BENCH, "RESULTS.md"), report.markdown(results, written))


def put(path, text):
    """The file is that of the user who called sudo."""
    with open(path, "w", encoding="utf-8") as out:
        out.write(text)
    if os.geteuid() == 0 and os.environ.get("SUDO_UID"):
        os.chown(path, int(os.environ["SUDO_UID"]), int(os.environ.get("SUDO_GID", -1)))


def load(files):
    """Runs that were kept, as one: their underlays side by side, the facts and the settings of the first."""
    whole = None
    for file in files.split(","):
        try:
            with open(file, encoding="utf-8") as text:
                document = json.load(text)
        except (OSError, ValueError) as error:
            raise Failure(f"{file}: {error}") from None
        if whole is None:
            whole = document
        else:
            whole["underlays"].update(document["underlays"])
            whole["facts"] = {**document["facts"], **whole["facts"]}
    whole["facts"]["underlay"] = underlays(whole["underlays"])
    return whole


def underlays(chosen):
    return "; ".join(NAMES[name] for name in chosen) + "; offloads on"


def stop(number, _frame):
    sys.exit(128 + number)


def main():
    args = arguments(sys.argv[1:])
    if args.prepare:
        return prepare(args)
    if args.saved:
        document = load(args.saved)
    else:
        with open(args.prepared, encoding="utf-8") as file:
            found = json.load(file)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, stop)
        bench = Bench(args, found, os.environ.get("TENCRYPT") or None)
        try:
            document = bench.run()
        finally:
            bench.close()
    results = Results(document)
    if args.save:
        put(args.save, json.dumps(document, indent=1) + "\n")
    print()
    print(report.terminal(results))
    if args.write:
        if document["settings"]["quick"]:
            raise Failure("a quick run measures too little to be written")
        write(results)
    return 1 if any(goal.met is False for goal in goals(results)) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failure as failure:
        say(f"run.sh: {failure}")
        sys.exit(2)
