"""What was measured, and the goals computed from it: medians, ratios of medians, and whether each goal is met."""

from dataclasses import dataclass
from statistics import median
from typing import Optional

STREAMS = ("tcp1", "tcp5", "tcp10")
PLAIN, PEER = "plain", "wireguard-go"
CHACHA, AES = "tencrypt-chacha", "tencrypt-aes"
BASE = "veth1500"
# What the other underlays have to keep of each ratio.
KEEP = 0.9


class Results:
    """The document of a run: `facts`, `settings`, and per underlay the rows with their values and failures."""

    def __init__(self, document):
        self.document = document

    def underlays(self):
        return list(self.document["underlays"])

    def rows(self, underlay):
        return self.document["underlays"][underlay]

    def values(self, underlay, row, name):
        """All rounds; empty where nothing was measured."""
        return self.document["underlays"].get(underlay, {}).get(row, {}).get("values", {}).get(name, [])

    def median(self, underlay, row, name):
        values = self.values(underlay, row, name)
        return median(values) if values else None

    def tcp(self, underlay, row):
        """The median over 1, 5 and 10 streams of their medians; None unless all were measured."""
        medians = [self.median(underlay, row, name) for name in STREAMS]
        return None if None in medians else median(medians)

    def value(self, underlay, row, name):
        return self.tcp(underlay, row) if name == "tcp" else self.median(underlay, row, name)

    def ratio(self, underlay, name, row, other):
        value, base = self.value(underlay, row, name), self.value(underlay, other, name)
        return None if value is None or not base else value / base

    def failures(self):
        """How many values, rows and ends of Tencrypt's own rows failed; one that cannot be had is none."""
        return sum(len(set(data["failures"]) - {"unavailable"}) for rows in self.document["underlays"].values()
                   for row, data in rows.items() if row.startswith("tencrypt"))


@dataclass
class Goal:
    """One goal: what was measured (None: not in this run), and whether it is met."""

    text: str
    measured: Optional[str]
    met: Optional[bool]


# Value, row, other row, limit (at least when positive, at most when negative).
RATIOS = [
    ("tcp", CHACHA, PEER, 1.9), ("tcp", AES, PEER, 3.8), ("tcp", AES, "shadowsocks-rust", 0.9), ("tcp", AES, "stunnel", 1.0),
    ("cpu", CHACHA, PEER, -0.50), ("cpu", AES, PEER, -0.22),
    ("udp", AES, "nebula", 2.0), ("pps64", AES, "nebula", 2.0), ("cpu400", AES, "nebula", -0.6),
    ("p50", CHACHA, "boringtun", -0.65), ("p99", CHACHA, "boringtun", -0.85),
    ("p50", "tencrypt-no-spin", "boringtun", -1.0),
]
# The same on the standing underlay alone: the other family, one stream, one stream over rekeys.
OWN = [
    ("tcp", CHACHA + "-v6", CHACHA, 0.9), ("tcp", AES + "-v6", AES, 0.9),
    ("tcp1", CHACHA, PEER, 1.0), ("tcp1", "tencrypt-rekey", CHACHA, 0.9),
]
WORDS = {"tcp": "TCP, median over 1/5/10 streams", "tcp1": "TCP, 1 stream", "cpu": "CPU seconds per GB (TCP)",
         "udp": "UDP received at -b 0", "pps64": "64-byte packets per second", "cpu400": "UDP CPU per GB at 400 Mbit/s",
         "p50": "TCP round trip, p50", "p99": "TCP round trip, p99"}
# Value, row, limit, unit, words: absolute.
LIMITS = [
    ("load99", CHACHA, 3000, "us", "round trip of a separate flow under 5 streams, p99"),
    ("load99", AES, 3000, "us", "round trip of a separate flow under 5 streams, p99"),
    ("idle1000", "tencrypt-idle", 6, "MB", "private memory, idle, 1,000 workloads known"),
    ("wakeups", "tencrypt-idle", 1, "per s", "wake-ups of an idle agent"),
    ("first", CHACHA, 5, "ms", "first byte after `protected`"),
    ("first", AES, 5, "ms", "first byte after `protected`"),
]
LOADED, PER_FLOW = 8e6, 128
REKEYS = 15


def goals(results):
    """Every goal on every underlay of the run; on the others than the standing one a ratio may be 0.9 of its goal."""
    found = []
    for underlay in results.underlays():
        base = underlay == BASE
        where = "" if base else f" ({underlay})"
        for name, row, other, limit in RATIOS + (OWN if base else []):
            bound = abs(limit) if base else abs(limit) * KEEP if limit > 0 else abs(limit) / KEEP
            found.append(_ratio(results, underlay, name, row, other, bound, limit > 0, where))
        if base:
            found += [_limit(results, underlay, *limit) for limit in LIMITS]
            found += [_loaded(results, underlay, row) for row in (CHACHA, AES)]
            found += _rekeys(results, underlay)
    if any(row.startswith("tencrypt") for underlay in results.underlays() for row in results.rows(underlay)):
        failed = results.failures()
        found.append(Goal("measurements of Tencrypt's rows that failed: 0", str(failed), not failed))
    return found


def _ratio(results, underlay, name, row, other, bound, at_least, where):
    ratio = results.ratio(underlay, name, row, other)
    text = f"{WORDS[name]}{where}: {row} {'>=' if at_least else '<='} {bound:.3g}x {other}"
    if ratio is None:
        return Goal(text, None, None)
    return Goal(text, f"{ratio:.2f}x", ratio >= bound if at_least else ratio <= bound)


def _limit(results, underlay, name, row, limit, unit, words):
    value = results.median(underlay, row, name)
    text = f"{words}: {row} <= {limit:g} {unit}"
    return Goal(text, None, None) if value is None else Goal(text, f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}",
                                                             value <= limit)


def _loaded(results, underlay, row):
    loaded, flows = results.median(underlay, row, "loaded"), results.median(underlay, row, "flows")
    text = f"private memory, loaded: {row} <= 8 MB + {PER_FLOW} B per flow"
    if loaded is None:
        return Goal(text, None, None)
    return Goal(text, f"{loaded:.1f} MB, {flows or 0:.0f} flows", loaded * 1e6 <= LOADED + PER_FLOW * (flows or 0))


def _rekeys(results, underlay):
    lost, rekeys, rate = (results.median(underlay, "tencrypt-rekey", name) for name in ("lost", "rekeys", "rate"))
    texts = ("numbered UDP stream at half the rate without loss: lost 0", f"rekeys during that stream: at least {REKEYS}")
    if lost is None:
        return [Goal(text, None, None) for text in texts]
    return [Goal(texts[0], f"{lost:.0f}, at {rate:.0f} datagrams per second", lost == 0), Goal(texts[1], f"{rekeys:.0f}", rekeys >= REKEYS)]
